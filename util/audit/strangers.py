"""The audit beside strangers, for models that nobody can retrain: are the forgotten people like people never seen *to this
model*? Nothing is trained.

Forgotten people and strangers stand in one scene, each with as many photos, all in one gallery. As a statistic is a function
of the identities' weights, one measurement tells it of the forgotten people and of any group of as many strangers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from backbone.recognizer import Recognizer, with_rows
from data.image_set import ImageSet
from util.audit import BESIDE_STRANGERS, Figure
from util.audit.audit import Audit, check_originals, check_unseen, rounded, shared, unmeasured, with_images
from util.audit.statistics import CONFIDENCE, compare
from util.audit.subject import ENROLLED, Scene, Subject
from util.audit.utility import utility
from util.runtime.errors import UsageError
from util.runtime.hardware import Hardware
from util.storage.hashes import weights_sha256

GROUPS = 200  # of strangers, drawn with replacement
ROUNDS = 5  # in which everybody's photos are drawn anew; figures are their mean
LEAST, MOST = 20, 200  # strangers that are needed, and used
PHOTOS = 4  # of a stranger: two to enrol, two to test


@dataclass(frozen=True)
class Strangers:
    """Ids `people` in the unseen set, and how many photos everybody enrols and tests with; the others have too few."""

    people: tuple[int, ...]
    enrolled: int
    tested: int
    left_out: int

    @property
    def about(self) -> dict:
        return {"people": len(self.people), "photos": [self.enrolled, self.tested], "left_out": self.left_out}


def choose_strangers(scene: Scene) -> Strangers:
    """Whom the forgotten are compared with. Raises UsageError where there are fewer than LEAST with PHOTOS photos."""
    if scene.unseen is None:
        raise UsageError("--strangers needs people in no training set: --unseen DIR, <identity>/<image>")
    counts = np.bincount(scene.unseen.labels.cpu(), minlength=len(scene.unseen.classes))
    enough = np.sort(counts[counts >= PHOTOS])[::-1]
    if len(enough) < LEAST:
        raise UsageError(
            f"--unseen has {len(enough)} people with {PHOTOS} photos or more: --strangers needs {LEAST}; add people in no "
            f"training set, or audit beside --references"
        )
    train, test = (np.bincount(s.labels.cpu())[list(scene.forget)].min() for s in (scene.train_set, scene.test_set))
    most = int(enough[max(LEAST, len(enough) // 2) - 1])  # what at least half of them have
    tested = min(int(test), most // 2)
    enrolled = min(int(train), most - tested)
    people = np.flatnonzero(counts >= enrolled + tested)
    used = np.sort(scene.generator().permutation(people)[:MOST])
    return Strangers(tuple(used.tolist()), enrolled, tested, len(counts) - len(people))


def audit_beside_strangers(
    before: Recognizer,
    after: Recognizer,
    data: tuple[ImageSet, ImageSet],
    forget: Sequence[int],
    unseen: ImageSet | None,
    *,
    hardware: Hardware,
    remain: Sequence[int],
    figures: Sequence[str] = tuple(BESIDE_STRANGERS),
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> Audit:
    """Are the identities `forget` to `after` what the strangers `unseen` are? Arguments as `util.audit.audit.audit`.

    In the entries "references" are what GROUPS groups of strangers show in the same model, "originals" what the forgotten
    show in `before`, "known" the groups' mean and what `before` shows more of the forgotten than of strangers.
    """
    check_originals([before], forget, data[0].classes)
    check_unseen(unseen, data[0])
    data, present = with_images(*data)
    remain = [c for c in remain if not after.head.absent[c]]  # who has no row is not kept
    people = (tuple(place for place, c in enumerate(present) if c in group) for group in (forget, remain))
    known = shared(before, weights_sha256(before), present, *data, unseen, hardware, True)
    subject = Subject(with_rows(after, present), *data, unseen, hardware)
    scene = Scene(*data, *people, unseen, known, (), hardware, seed)
    strangers = choose_strangers(scene)
    entries = figures_beside(strangers, subject, scene, figures, progress)
    useful = utility(subject, scene) | {"before": utility(known, scene), "references": []}
    return Audit(scene, subject, entries, rounded(useful), {}, strangers.about)


def figures_beside(
    strangers: Strangers,
    subject: Subject,
    scene: Scene,
    figures: Sequence[str] = tuple(BESIDE_STRANGERS),
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, dict]:
    """The entries of an audit."""
    weights = _weights(len(scene.forget), len(strangers.people), scene.generator())
    measured, entries = [BESIDE_STRANGERS[name] for name in figures], {}
    progress("the pre-trained model")
    showed = _measure(scene.before, scene, strangers, measured, weights[:2])
    progress("the unlearned model")
    shows = _measure(subject, scene, strangers, measured, weights)
    for figure in measured:
        for key in (key for key in figure.titles if key in shows):
            entries[key] = rounded(_entry(key, figure, showed, shows, scene, len(strangers.people)))
    return entries


def _weights(count: int, others: int, generator: np.random.Generator) -> np.ndarray:
    """Rows, over `count` forgotten people and the strangers: the former, the latter, GROUPS groups of as many strangers,
    and the rest the forgotten drawn anew."""
    groups = generator.multinomial(count, [1 / others] * others, 2 * GROUPS)
    groups = groups[(groups > 0).sum(axis=1) >= min(count, 2)][:GROUPS]  # one person has no impostors
    again = generator.multinomial(count, [1 / count] * count, GROUPS)
    own = np.concatenate([np.ones((1, count)), np.zeros((1 + GROUPS, count)), again])
    theirs = np.concatenate([np.zeros((1, others)), np.ones((1, others)), groups, np.zeros((GROUPS, others))])
    return np.hstack([own, theirs])


def _entry(key: str, figure: Figure, showed: dict, shows: dict, scene: Scene, others: int) -> dict:
    """One of an audit's `figures`; `showed` by the pre-trained model, `shows` by the unlearned one."""
    if reason := next((found[key] for found in (showed, shows) if isinstance(found[key], str)), None):
        return unmeasured(figure) | {"reason": reason}
    value, groups, again = shows[key][0], shows[key][2 : 2 + GROUPS], shows[key][2 + GROUPS :]
    told, average = showed[figure.known_by.get(key, key)]
    resolution, independent = scene.resolution(key), others / len(scene.forget)
    known = groups.mean() + told - average
    entry = {"value": value, "known": known, "references": groups.tolist(), "originals": [showed[key][0]]}
    tail = 50 * (1 - CONFIDENCE)
    entry["interval"] = np.nanpercentile(again, [tail, 100 - tail]).tolist() if len(scene.forget) > 1 else None
    found = compare(value, groups, [known], resolution, key in figure.falling, independent)
    return unmeasured(figure) | entry | {"resolution": resolution, "independent": independent} | vars(found)


def _measure(
    subject: Subject, scene: Scene, strangers: Strangers, figures: Sequence[Figure], weights: np.ndarray
) -> dict[str, np.ndarray | str]:
    """By key, the figure for each row of weights (B, forgotten and strangers), or in a few words why there is none."""
    found: dict[str, list] = {}
    for number in range(ROUNDS):
        stage = _together(subject, scene, strangers, number)
        for figure in figures:
            for key, statistic in figure.measure(*stage).statistics.items():
                if key.endswith(f"_{ENROLLED}") and strangers.enrolled < ENROLLED:
                    statistic = f"needs strangers with {ENROLLED + 2} photos"
                found.setdefault(key, []).append(statistic if isinstance(statistic, str) else statistic(weights))
    found.pop("tpir_1pct", None)  # whose threshold takes strangers besides
    return {key: rounds[0] if isinstance(rounds[0], str) else np.mean(rounds, axis=0) for key, rounds in found.items()}


def _together(subject: Subject, scene: Scene, strangers: Strangers, number: int) -> tuple[Subject, Scene]:
    """Forgotten people and strangers as one scene's `forget`, with as many photos each, drawn in round `number`."""
    generator, known, count = scene.generator(number), len(scene.train_set.classes), len(strangers.people)
    counts, sets = (strangers.enrolled, strangers.tested), []
    theirs = _some(scene.unseen, strangers.people, sum(counts), generator)
    theirs = np.split(theirs.reshape(count, -1), [counts[0]], axis=1)
    for images, embeddings, few, new in zip(
        (scene.train_set, scene.test_set), (subject.train, subject.test), counts, theirs, strict=True
    ):
        labels = images.labels.cpu()
        others = (~torch.isin(labels, torch.tensor(scene.forget))).nonzero()[:, 0]
        own = torch.cat([others, torch.from_numpy(_some(images, scene.forget, few, generator))])
        labels = torch.cat([labels[own], known + torch.arange(count).repeat_interleave(few)])
        names = images.classes + tuple(scene.unseen.classes[c] for c in strangers.people)
        made = ImageSet("", torch.empty(len(labels), 0), labels, names)  # figures beside strangers look at embeddings alone
        sets.append((made, torch.cat([embeddings[own], subject.unknown[new.flatten()]])))
    (train_set, train), (test_set, test) = sets
    model = with_rows(subject.model, [*range(known), *[0] * count])
    with torch.no_grad():
        model.head.weight[known:] = 0.0
    ids = tuple(range(known, known + count))
    stage = Scene(train_set, test_set, (*scene.forget, *ids), scene.remain, None, None, (), scene.hardware, scene.seed, ids)
    found = replace(subject, model=model, train_set=train_set, test_set=test_set, unseen=None)
    found.train, found.test = train, test
    return found, stage


def _some(images: ImageSet, people: Sequence[int], count: int, generator: np.random.Generator) -> np.ndarray:
    """Positions of `count` images of each person, drawn; person by person."""
    labels = images.labels.cpu().numpy()
    return np.concatenate([generator.permutation(np.flatnonzero(labels == c))[:count] for c in people])
