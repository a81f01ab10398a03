"""What a model is trained and tested on: images and labels as two tensors."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


def no_decoding(indices: Tensor) -> None:
    """`ImageSet.decode` where everything is decoded."""


@dataclass(frozen=True)
class ImageSet:
    """A decoded data set."""

    name: str
    images: Tensor  # uint8 (N, 3, H, W), RGB; mapped from a cache file it is read only
    labels: Tensor  # int64 (N,), indices into `classes`
    classes: tuple[str, ...]
    files: tuple[str, ...] = ()  # of each image, its path below the data folder; of synthetic faces, which one it is
    digests: tuple[str, ...] = ()  # of each image, the SHA-256 of its file
    # Of the whole data set, both splits, the SHA-256 of each class, by name.
    contents: dict[str, str] = field(default_factory=dict, compare=False)
    # Of a set that is decoded on demand: decodes the images at these positions, int64 (N,). Until then they are black.
    decode: Callable[[Tensor], None] = field(default=no_decoding, compare=False)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> int:
        return self.images.shape[-1]

    def subset(self, indices: Tensor | slice) -> "ImageSet":
        """The images at `indices` (N,), copied, or of a slice, not copied; the classes stay."""
        positions = range(len(self))[indices] if isinstance(indices, slice) else indices.tolist()
        files, digests = (tuple(values[i] for i in positions) if values else () for values in (self.files, self.digests))
        if isinstance(indices, Tensor):
            self.decode(indices)
        decode = (lambda rows: self.decode(rows + positions.start)) if isinstance(indices, slice) else no_decoding
        tensors = {"images": self.images[indices], "labels": self.labels[indices]}
        return replace(self, **tensors, files=files, digests=digests, decode=decode)

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
    places = {name: c for c, name in enumerate(classes)}
    ids = torch.tensor([places[name] for name in images.classes], device=images.labels.device)
    return replace(images, labels=ids[images.labels], classes=tuple(classes))


def joined(first: ImageSet, second: ImageSet) -> ImageSet:
    """The decoded images of both, copied; the classes of the second, who are other people, follow those of the first."""
    device = first.images.device
    images = torch.cat([first.images, second.images.to(device)])
    labels = torch.cat([first.labels, len(first.classes) + second.labels.to(device)])
    names = {key: getattr(first, key) + getattr(second, key) for key in ("classes", "files", "digests")}
    return replace(first, images=images, labels=labels, decode=no_decoding, **names)


def class_digests(*splits: ImageSet) -> dict[str, str]:
    """The SHA-256 of each class's images over all `splits`, whatever their order, their names and their split."""
    found = defaultdict(list)
    for images in splits:
        for label, digest in zip(images.labels.tolist(), images.digests, strict=True):
            found[images.classes[label]].append(digest)
    return {name: hashlib.sha256("".join(sorted(own)).encode()).hexdigest() for name, own in sorted(found.items())}
