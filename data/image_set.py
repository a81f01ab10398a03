"""What a model is trained and tested on: images and labels as two tensors."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """A decoded data set.

    images:  uint8 (N, 3, H, W), RGB; may be mapped from a cache file (then on the CPU and read only by intent).
    labels:  int64 (N,), indices into `classes`.
    classes: the class names, in label order.
    files:   of each image, its path below the data folder; of drawn faces, which one it is.
    digests: of each image, the SHA-256 of its file.
    contents: of the whole data set, both splits, the SHA-256 of each class, by name.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    files: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()
    contents: dict[str, str] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> int:
        return self.images.shape[-1]

    def subset(self, indices: Tensor | slice) -> "ImageSet":
        """The images at `indices` (N,), copied, or of a slice, not copied; the classes stay."""
        positions = range(len(self))[indices] if isinstance(indices, slice) else indices.tolist()
        files, digests = (tuple(values[i] for i in positions) if values else () for values in (self.files, self.digests))
        tensors = {"images": self.images[indices], "labels": self.labels[indices]}
        return replace(self, **tensors, files=files, digests=digests)

    def to(self, device: torch.device | str) -> "ImageSet":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    @property
    def content_sha256(self) -> str:
        """Of all class names and images of the data set."""
        return hashlib.sha256(json.dumps(self.contents).encode()).hexdigest()

    @property
    def tag(self) -> str:
        """A name for folders: the data set's, and the beginning of its hash."""
        return f"{self.name}-{self.content_sha256[:8]}"


def with_classes(images: ImageSet, classes: Sequence[str]) -> ImageSet:
    """The same images with their labels in another list of classes, which has all of theirs."""
    ids = torch.tensor([classes.index(name) for name in images.classes], device=images.labels.device)
    return replace(images, labels=ids[images.labels], classes=tuple(classes))


def class_digests(*splits: ImageSet) -> dict[str, str]:
    """What each class consists of: the SHA-256 of its images' digests, by class name, over all `splits`.

    It does not depend on the order of the images, on their names or on how they are split.
    """
    found = defaultdict(list)
    for images in splits:
        for label, digest in zip(images.labels.tolist(), images.digests, strict=True):
            found[images.classes[label]].append(digest)
    return {name: hashlib.sha256("".join(sorted(own)).encode()).hexdigest() for name, own in sorted(found.items())}
