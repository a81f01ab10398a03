"""The audit against strangers, for models that nobody can retrain: are the forgotten people like people never seen *to this
model*? Nothing is trained.

Forgotten people and strangers stand in one task, each with as many photos, all in one gallery. As a statistic is a function
of the identities' weights, one measurement tells it of the forgotten people and of any group of as many strangers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import trange

from backbone.recognizer import with_rows
from data.image_set import ImageSet
from util.audit import STRANGER_METRICS, AuditMetric
from util.audit.inputs import ENROLLED, AuditedModel, AuditTask
from util.audit.statistics import compare, middle, rounded
from util.runtime.errors import UsageError

GROUPS = 200  # of strangers, drawn with replacement
ROUNDS = 5  # in which everybody's photos are drawn anew; metrics are their mean
MIN_STRANGERS, MAX_STRANGERS = 20, 200  # strangers that are needed, and used
MIN_PHOTOS = 4  # of a stranger: two to enrol, two to test


@dataclass(frozen=True)
class Strangers:
    """Ids `people` in the strangers' set, and how many photos everybody enrols and tests with; the others have too few."""

    people: tuple[int, ...]
    enrolled: int
    tested: int
    left_out: int

    @property
    def about(self) -> dict:
        return {"people": len(self.people), "photos": [self.enrolled, self.tested], "left_out": self.left_out}


def choose_strangers(task: AuditTask) -> Strangers:
    """Whom the forgotten are compared with. Raises UsageError where fewer than MIN_STRANGERS have MIN_PHOTOS photos."""
    if task.stranger_set is None:
        raise UsageError("comparing with strangers needs people in no training set: --strangers DIR, <identity>/<image>")
    counts = np.bincount(task.stranger_set.labels.cpu(), minlength=len(task.stranger_set.classes))
    enough = np.sort(counts[counts >= MIN_PHOTOS])[::-1]
    if len(enough) < MIN_STRANGERS:
        raise UsageError(
            f"--strangers has {len(enough)} people with {MIN_PHOTOS} photos or more, and {MIN_STRANGERS} are needed; add "
            f"people in no training set, or audit beside --references"
        )
    train, test = (np.bincount(s.labels.cpu())[list(task.forget)].min() for s in (task.train_set, task.test_set))
    most = int(enough[max(MIN_STRANGERS, len(enough) // 2) - 1])  # what at least half of them have
    tested = min(int(test), most // 2)
    enrolled = min(int(train), most - tested)
    people = np.flatnonzero(counts >= enrolled + tested)
    used = np.sort(task.generator().permutation(people)[:MAX_STRANGERS])
    return Strangers(tuple(used.tolist()), enrolled, tested, len(counts) - len(people))


def metrics_against_strangers(
    strangers: Strangers, audited: AuditedModel, task: AuditTask, metrics: Sequence[str] = tuple(STRANGER_METRICS)
) -> dict[str, dict]:
    """The entries of an audit.

    There "references" are what GROUPS groups of strangers show in the same model, "originals" what the forgotten show in
    the pre-trained model, "known" the groups' mean and what the pre-trained model shows more of them than of strangers.
    """
    weights = _weights(len(task.forget), len(strangers.people), task.generator())
    measured, entries = [metric for name, metric in STRANGER_METRICS.items() if name in metrics], {}
    before_scores = _measure(task.before, task, strangers, measured, weights[:2])
    after_scores = _measure(audited, task, strangers, measured, weights)
    for metric in measured:
        for key in (key for key in metric.titles if key in after_scores):
            entries[key] = rounded(_entry(key, metric, before_scores, after_scores, task, len(strangers.people)))
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


def _entry(key: str, metric: AuditMetric, before_scores: dict, after_scores: dict, task: AuditTask, others: int) -> dict:
    """One of an audit's `metrics`; `before_scores` by the pre-trained model, `after_scores` by the unlearned one."""
    if reason := next((found[key] for found in (before_scores, after_scores) if isinstance(found[key], str)), None):
        return metric.unmeasured() | {"reason": reason}
    value, groups, again = after_scores[key][0], after_scores[key][2 : 2 + GROUPS], after_scores[key][2 + GROUPS :]
    before_score, average = before_scores[metric.scale_from.get(key, key)]
    resolution, independent = task.resolution(key), others / len(task.forget)
    known = groups.mean() + before_score - average
    entry = {"value": value, "references": groups.tolist(), "originals": [before_scores[key][0]]}
    entry |= {"interval": middle(again) if len(task.forget) > 1 else None, "known": known}
    entry |= {"resolution": resolution, "independent": independent}
    entry |= compare(value, groups, [known], resolution, key in metric.lower_if_known, independent)
    return metric.unmeasured() | entry


def _measure(
    audited: AuditedModel, task: AuditTask, strangers: Strangers, metrics: Sequence[AuditMetric], weights: np.ndarray
) -> dict[str, np.ndarray | str]:
    """By key, the metric for each row of weights (B, forgotten and strangers), or in a few words why there is none."""
    found: dict[str, list] = {}
    for number in trange(ROUNDS, desc="rounds", leave=False, disable=None):
        round_task = _with_strangers(audited, task, strangers, number)
        for metric in metrics:
            for key, statistic in metric.measure(*round_task).statistics.items():
                if key.endswith(f"_{ENROLLED}") and strangers.enrolled < ENROLLED:
                    statistic = f"needs strangers with {2 * ENROLLED - 1} photos"
                found.setdefault(key, []).append(statistic if isinstance(statistic, str) else statistic(weights))
    found.pop("tpir_1pct", None)  # whose threshold takes strangers besides
    return {key: rounds[0] if isinstance(rounds[0], str) else np.mean(rounds, axis=0) for key, rounds in found.items()}


def _with_strangers(
    audited: AuditedModel, task: AuditTask, strangers: Strangers, number: int
) -> tuple[AuditedModel, AuditTask]:
    """Forgotten people and strangers as one task's `forget`, with as many photos each, drawn in round `number`."""
    generator, known = task.generator(number), len(task.train_set.classes)
    ids = tuple(range(known, known + len(strangers.people)))
    names = task.train_set.classes + tuple(task.stranger_set.classes[c] for c in strangers.people)
    theirs = _sample_images(task.stranger_set, strangers.people, strangers.enrolled + strangers.tested, generator)
    theirs = np.split(theirs.reshape(len(ids), -1), [strangers.enrolled], axis=1)
    embedded = (task.train_set, audited.train_embeddings), (task.test_set, audited.test_embeddings)
    sets = []
    for (images, embeddings), new in zip(embedded, theirs, strict=True):
        labels, few = images.labels.cpu(), new.shape[1]
        others = (~torch.isin(labels, torch.tensor(task.forget))).nonzero()[:, 0]
        own = torch.cat([others, torch.from_numpy(_sample_images(images, task.forget, few, generator))])
        labels = torch.cat([labels[own], torch.tensor(ids).repeat_interleave(few)])
        made = ImageSet("", torch.empty(len(labels), 0), labels, names)  # metrics beside strangers look at embeddings alone
        sets.append((made, torch.cat([embeddings[own], audited.stranger_embeddings[new.flatten()]])))
    model = with_rows(audited.model, [*range(known), *[0] * len(ids)])
    with torch.no_grad():
        model.head.weight[known:] = 0.0
    (train_set, train), (test_set, test) = sets
    seen = {"train_set": train_set, "test_set": test_set, "stranger_set": None}
    found = replace(audited, model=model, **seen)
    found.train_embeddings, found.test_embeddings = train, test
    return found, replace(task, **seen, forget=(*task.forget, *ids), before=None, references=(), strangers=ids)


def _sample_images(images: ImageSet, people: Sequence[int], count: int, generator: np.random.Generator) -> np.ndarray:
    """Positions of `count` images of each person, drawn; person by person."""
    labels = images.labels.cpu().numpy()
    return np.concatenate([generator.permutation(np.flatnonzero(labels == c))[:count] for c in people])
