"""SHA-256 of models and images: what they are, wherever and however they are kept."""

import functools
import hashlib
import json

from torch import Tensor, nn

from data.image_set import ImageSet
from util.runtime.errors import UsageError


def weights_sha256(model: nn.Module) -> str:
    """Of a state dict's names, dtypes, shapes and values; the same on every device and in every file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def image_hashes(images: ImageSet, indices: Tensor | None = None) -> list[str]:
    """Of the decoded pixels, uint8 (3, H, W), of each image (of those at `indices`)."""
    chosen = range(len(images)) if indices is None else indices.tolist()
    return [hashlib.sha256(images.images[i].cpu().contiguous().numpy()).hexdigest() for i in chosen]


def joint_hash(images: ImageSet) -> str:
    return hashlib.sha256("".join(image_hashes(images)).encode()).hexdigest()


@functools.lru_cache(maxsize=8)
def data_sha256(images: ImageSet) -> str:
    """Of the decoded pixels, the labels and the classes' names."""
    digest = hashlib.sha256(json.dumps(images.classes).encode())
    for part in [*images.images.split(1024), images.labels]:
        digest.update(part.cpu().contiguous().numpy())
    return digest.hexdigest()


def check_strangers(
    strangers: ImageSet, train_set: ImageSet, indices: Tensor | None = None, option: str = "--strangers"
) -> None:
    """Raise UsageError where strangers share a name with the training set, or an image with it (with those at `indices`)."""
    if shared := sorted({*strangers.classes} & {*train_set.classes}):
        raise UsageError(f"{option} has {len(shared)} identities of the training set, {shared[0]!r} first")
    known, hashes = {*image_hashes(train_set, indices)}, image_hashes(strangers)
    if same := [strangers.classes[c] for c, own in zip(strangers.labels, hashes, strict=True) if own in known]:
        raise UsageError(f"{option} has {len(same)} images of the training set, of {same[0]!r} first")
