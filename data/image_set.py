"""What a model is trained and tested on: images and labels as two tensors."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """A decoded data set.

    images:  uint8 (N, 3, H, W), RGB; may be mapped from a cache file (then on the CPU and read only by intent).
    labels:  int64 (N,), indices into `classes`.
    classes: the class names, in label order.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> int:
        return self.images.shape[-1]

    def subset(self, indices: Tensor | slice) -> "ImageSet":
        """The images at `indices` (N,), copied, or of a slice, not copied; the classes stay."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def to(self, device: torch.device | str) -> "ImageSet":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))
