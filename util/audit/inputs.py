"""What the metrics look at: a task (whose forgetting is audited, on which images) and a model (its embeddings and rows)."""

import copy
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.blocks import block_names, block_outputs, summary
from backbone.heads import Head
from backbone.recognizer import Recognizer, to_device
from data.image_set import ImageSet
from util.evaluation.evaluate import embed_images, map_images
from util.runtime.errors import UsageError
from util.runtime.hardware import Hardware

DRAWS = 10  # galleries drawn for each metric that enrols
ENROLLED = 5  # images a row is made of, where a model has none of its own
TRAINED = "photos_"  # what the keys of metrics on the forgotten identities' training images begin with
PER_IDENTITY = 60  # most training images of an identity that probes are fitted on
PROBED = 12  # blocks, evenly spaced, that probes look at


@dataclass(frozen=True)
class AuditTask:
    """Who was to be forgotten, who is to be known, and the images that tell.

    `forget` are the ids audited, `remain` those that the model is to know; whoever is neither was forgotten earlier or
    later. `stranger_set` holds people in no training set; `references` never saw `forget`.
    """

    train_set: ImageSet
    test_set: ImageSet
    forget: tuple[int, ...]
    remain: tuple[int, ...]
    stranger_set: ImageSet | None
    before: "AuditedModel | None"
    references: "tuple[AuditedModel, ...]"
    hardware: Hardware
    seed: int = 0
    strangers: tuple[int, ...] = ()  # those of `forget` that no model has seen, who stand beside the forgotten

    def generator(self, *parts: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *parts])

    @cached_property
    def train_by_class(self) -> list[np.ndarray]:
        """Positions of each identity's training images, in an order drawn once."""
        labels = self.train_set.labels.cpu().numpy()
        return [self.generator(c).permutation(np.flatnonzero(labels == c)) for c in range(len(self.train_set.classes))]

    @cached_property
    def forget_train(self) -> Tensor:
        """Positions of the forgotten identities' training images."""
        return torch.from_numpy(np.concatenate([self.train_by_class[c] for c in self.forget]))

    @cached_property
    def forget_test(self) -> Tensor:
        return torch.isin(self.test_set.labels.cpu(), torch.tensor(self.forget)).nonzero()[:, 0]

    @cached_property
    def remain_test(self) -> Tensor:
        return torch.isin(self.test_set.labels.cpu(), torch.tensor(self.remain)).nonzero()[:, 0]

    @cached_property
    def forget_labels(self) -> Tensor:
        """Class ids of the images at `forget_test`."""
        return self.test_set.labels.cpu()[self.forget_test]

    @cached_property
    def test_groups(self) -> np.ndarray:
        """Of each image at `forget_test`, which of the forgotten identities: positions in `forget`. Of one person alone,
        which image: there the bootstrap draws photos."""
        if len(self.forget) == 1:
            return np.arange(len(self.forget_test))
        return np.searchsorted(self.forget, self.forget_labels.numpy())

    @cached_property
    def train_groups(self) -> np.ndarray:
        """As `test_groups`, of each image at `forget_train`."""
        if len(self.forget) == 1:
            return len(self.forget_test) + np.arange(len(self.forget_train))
        return np.searchsorted(self.forget, self.train_set.labels.cpu().numpy()[self.forget_train])

    @property
    def num_groups(self) -> int:
        """How many identities, or photos of one person, the bootstrap draws."""
        return len(self.forget_test) + len(self.forget_train) if len(self.forget) == 1 else len(self.forget)

    def resolution(self, key: str) -> float:
        """What one image is worth in a metric, in percent."""
        return 100 / len(self.forget_train if key.startswith(TRAINED) else self.forget_test)

    def enrolled(self, images: int, draw: int) -> list[np.ndarray]:
        """Positions of `images` training images of each identity (all, if it has fewer) for the gallery of a draw."""
        return [self.generator(draw, c).permutation(own)[:images] for c, own in enumerate(self.train_by_class)]

    def check(self) -> None:
        """Raise UsageError where the images do not suffice."""
        classes = self.train_set.classes
        if missing := [classes[c] for c in self.forget if not len(self.train_by_class[c])]:
            raise UsageError(f"the images of {', '.join(missing)} are gone: nothing of them can be audited")
        for c in self.forget:
            if len(self.train_by_class[c]) < 2:
                raise UsageError(f"{classes[c]} has 1 training images: the audit needs 2 or more")
            if not (self.forget_labels == c).any():
                raise UsageError(f"{classes[c]} has no test images: nothing of it can be audited")
        remain = len(self.test_set.labels.cpu()[self.remain_test].unique())
        if remain < 2:
            raise UsageError(f"{remain} identities with test images remain: the audit needs 2 or more")


@dataclass(eq=False)
class AuditedModel:
    """A model, and what the metrics need of it, each computed at its first use: float32, on the CPU.

    `original`: trained with everybody, and nobody forgotten.
    """

    model: Recognizer
    train_set: ImageSet
    test_set: ImageSet
    stranger_set: ImageSet | None
    hardware: Hardware
    original: bool = False
    probes: dict = field(default_factory=dict)  # by seed, those fitted to each layer

    @cached_property
    def train_embeddings(self) -> Tensor:  # (N, dim), as those below
        return self._embed(self.train_set)

    @cached_property
    def test_embeddings(self) -> Tensor:
        return self._embed(self.test_set)

    @cached_property
    def stranger_embeddings(self) -> Tensor:
        return self._embed(self.stranger_set)

    def _embed(self, images: ImageSet) -> Tensor:
        return embed_images(to_device(self.model, self.hardware), images, self.hardware).cpu()

    def templates(self, task: AuditTask, images: int, draw: int) -> Tensor:
        """The gallery: the normalized mean of some training images of each identity, (C, dim) of unit length."""
        unit = F.normalize(self.train_embeddings)
        return F.normalize(torch.stack([unit[positions].mean(dim=0) for positions in task.enrolled(images, draw)]))

    def head(self, task: AuditTask, draw: int = 0, own: bool = False) -> Head:
        """A copy of the head with the kept people's rows. Everybody else's are made anew, of templates of 5 images, as long
        as the others on average: all models are read alike, whatever was done to a row.

        own: made anew are only those that the model does not have.
        """
        head = copy.deepcopy(self.model.head).float().cpu().requires_grad_(False)
        anew = head.absent
        if not own:
            anew |= torch.ones_like(anew).index_fill(0, torch.tensor(task.remain), False)
        if anew.any():
            length = head.weight[~anew].norm(dim=1).mean()
            head.weight[anew] = length * self.templates(task, ENROLLED, draw)[anew]
            if hasattr(head, "bias"):
                head.bias[anew] = head.bias[~anew].mean()
        return head

    def tokens(self, images: ImageSet, positions: Tensor) -> list[Tensor]:
        """The class token (the mean over places, where there is none) after PROBED blocks or all: (N, dim) each."""

        def of(batch: Tensor) -> Tensor:
            outputs = block_outputs(model.backbone, model.normalize(batch), names)
            seen = [summary(model.backbone, output) for output in outputs]
            widths[:] = [part.shape[1] for part in seen]
            return torch.cat(seen, dim=1)

        model, widths = to_device(self.model, self.hardware), []
        blocks = block_names(model.backbone)
        count = min(len(blocks), PROBED)
        names = [blocks[(place + 1) * len(blocks) // count - 1] for place in range(count)]
        return [*map_images(model, of, images, self.hardware, positions).cpu().split(widths, dim=1)]
