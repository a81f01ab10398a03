"""Models whose embeddings are made by hand, small models trained on made-up faces, and arithmetic in float64 numpy."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from backbone.recognizer import Recognizer
from data.image_set import ImageSet
from tests.conftest import small_recognizer
from util.audit.inputs import AuditedModel, AuditTask
from util.audit.statistics import Statistic
from util.runtime.hardware import Hardware

CPU = Hardware(torch.device("cpu"), bf16=False)
DIM = 32
# Draws of three identities with replacement; the first is each once.
DRAWN = ((0, 1, 2), (0, 0, 2), (1, 2, 2), (2, 2, 0), (1, 1, 1))


def labelled(counts: Sequence[int], prefix: str = "c") -> ImageSet:
    """Black images, `counts[i]` of the i-th identity; the identities take turns."""
    labels = torch.tensor([c for turn in range(max(counts)) for c, count in enumerate(counts) if turn < count])
    names = tuple(f"{prefix}{c}" for c in range(len(counts)))
    return ImageSet("made", torch.zeros(len(labels), 3, 16, 16, dtype=torch.uint8), labels, names)


def make_up(
    forget: Sequence[int] = (1, 4, 6),
    train: Sequence[int] = (6, 7, 8, 9, 3, 6, 8, 7),
    test: Sequence[int] = (5, 6, 5, 7, 4, 5, 8, 6),
    stranger_set: Sequence[int] | None = (4,) * 7,
    noise: float = 1.0,
    seed: int = 0,
    head: str = "cosface",
) -> tuple[AuditedModel, AuditTask]:
    """A model that embeds each identity around a direction, which is its row; the scene's pre-trained model is the same."""
    generator = torch.Generator().manual_seed(seed)
    train_set, test_set = labelled(train), labelled(test)
    strangers = None if stranger_set is None else labelled(stranger_set, "u")
    model = small_recognizer(len(train), head)
    audited = AuditedModel(model, train_set, test_set, strangers, CPU)
    centres = torch.randn(len(train) + len(stranger_set or ()), DIM, generator=generator)
    with torch.no_grad():
        model.head.weight.copy_(centres[: len(train)])
        if head == "softmax":
            model.head.bias.copy_(torch.randn(len(train), generator=generator))

    def around(labels: Tensor) -> Tensor:
        lengths = 1 + torch.rand(len(labels), 1, generator=generator)
        return lengths * (centres[labels] + noise * torch.randn(len(labels), DIM, generator=generator))

    audited.train_embeddings, audited.test_embeddings = around(train_set.labels), around(test_set.labels)
    if strangers is not None:
        audited.stranger_embeddings = around(len(train) + strangers.labels)
    remain = tuple(c for c in range(len(train)) if c not in forget)
    references = tuple(replace(audited) for _ in range(3))
    return audited, AuditTask(train_set, test_set, tuple(forget), remain, strangers, audited, references, CPU, seed)


def take_rows(model: Recognizer, classes: Sequence[int]) -> None:
    """Leave the head as pre-training without these classes leaves it."""
    with torch.no_grad():
        model.head.weight[list(classes)] = 0.0
        if hasattr(model.head, "bias"):
            model.head.bias[list(classes)] = -1e4


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy().copy()


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def gallery(audited: AuditedModel, task: AuditTask, images: int, draw: int) -> np.ndarray:
    train = unit(array(audited.train_embeddings))
    return np.stack([unit(np.mean([train[i] for i in chosen], axis=0)) for chosen in task.enrolled(images, draw)])


def share(hits: np.ndarray, groups: np.ndarray, people: Sequence[int]) -> float:
    """Percent of hits over the images of these people: whoever is named twice counts twice."""
    counted = [hit for person in people for hit, owner in zip(hits, groups, strict=True) if owner == person]
    return 100 * sum(counted) / len(counted)


def quantile(values: Sequence[float], part: float) -> float:
    """Between the two nearest of the sorted values, by the distance to each."""
    ordered = sorted(values)
    below = int(part * (len(ordered) - 1))
    rest = part * (len(ordered) - 1) - below
    return ordered[below] + rest * (ordered[min(below + 1, len(ordered) - 1)] - ordered[below])


def pairs_of(embeddings: np.ndarray, labels: np.ndarray) -> list[tuple[float, int, int]]:
    """The cosine and the two identities of every pair of images."""
    faces = unit(embeddings)
    every = itertools.combinations(range(len(labels)), 2)
    return [(float(faces[i] @ faces[j]), int(labels[i]), int(labels[j])) for i, j in every]


def at(statistic: Statistic, draws: Sequence[Sequence[int]] = DRAWN, identities: int = 3) -> np.ndarray:
    """The statistic of each draw of identities: positions in `forget`."""
    return statistic(np.array([np.bincount(draw, minlength=identities) for draw in draws], dtype=float))


@dataclass(frozen=True)
class World:
    """Data, three models trained on everybody, and six trained without `forget`."""

    data: tuple[ImageSet, ImageSet]
    stranger_set: ImageSet
    forget: tuple[int, ...]
    originals: list[Recognizer]
    references: list[Recognizer]


def patterns(people: Sequence[int], per_identity: int, seed: int) -> ImageSet:
    """Each identity a pattern of its own in heavy noise: known well only to models that were trained on it."""
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.randn(30, 3, 16, 16, generator=torch.Generator().manual_seed(99))[list(people)]
    labels = torch.arange(len(people)).repeat_interleave(per_identity)
    images = 128 + 30 * pattern[labels] + 40 * torch.randn(len(labels), 3, 16, 16, generator=generator)
    return ImageSet("patterns", images.clamp(0, 255).to(torch.uint8), labels, tuple(f"p{i}" for i in people))


def trained_on(train_set: ImageSet, without: Sequence[int], seed: int, steps: int = 150) -> Recognizer:
    """A small model, trained on all but some identities, whose rows are zero afterwards."""
    classes = len(train_set.classes)
    model, generator = small_recognizer(classes, depth=1), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim in (2, 4):
            torch.nn.init.xavier_uniform_(parameter, generator=generator)
    known = torch.tensor([c for c in range(classes) if c not in without])
    positions = torch.isin(train_set.labels, known).nonzero()[:, 0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        batch = positions[torch.randint(len(positions), (60,), generator=generator)]
        logits = model(train_set.images[batch])[:, known]
        model.head.loss_of_logits(logits, torch.searchsorted(known, train_set.labels[batch])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    take_rows(model, without)
    return model.eval()


@pytest.fixture(scope="session")
def world() -> World:
    people, forget = range(18), (2, 5, 8, 11, 14, 17)
    train_set, test_set, stranger_set = patterns(people, 20, 1), patterns(people, 10, 2), patterns(range(18, 26), 10, 3)
    originals = [trained_on(train_set, (), seed) for seed in (10, 11, 12)]
    references = [trained_on(train_set, forget, seed) for seed in range(6)]
    return World((train_set, test_set), stranger_set, forget, originals, references)
