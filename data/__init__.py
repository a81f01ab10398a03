"""What a model is trained and tested on."""

import argparse
import hashlib
import os

import numpy as np
import torch

from data.cache import cached_images
from data.image_folder import image_folder as load_folder  # so that data.image_folder stays the module
from data.image_set import ImageSet
from data.tasks import split_validation
from util.runtime import distributed

SYNTHETIC = "synthetic_faces"


def build_datasets(args: argparse.Namespace, image_size: int, device: torch.device) -> tuple[ImageSet, ImageSet]:
    """The training and the test set that the data options name; the training set on the device if that has room."""
    with distributed.main_process_first():
        train_set, test_set = load_data(
            args.data,
            image_size,
            identities=args.identities,
            train_per_identity=args.train_per_identity,
            test_per_identity=args.test_per_identity,
            seed=args.data_seed,
            cache_dir=args.cache_dir,
            device=device,
        )
    if args.val_fraction is not None:
        split = split_validation(train_set.labels, len(train_set.classes), args.val_fraction)
        train_set, test_set = map(train_set.subset, split)
    if args.images == "device" or (args.images == "auto" and has_room(device, train_set.images.nbytes)):
        return train_set.to(device), test_set.to(device)
    return train_set, test_set


def has_room(device: torch.device, size: int) -> bool:
    """Whether `size` bytes of images leave most of the device's free memory to the model."""
    return device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > 4 * size


def load_data(
    source: str,
    image_size: int,
    identities: int,
    train_per_identity: int,
    test_per_identity: int,
    seed: int,
    cache_dir: str | os.PathLike | None = None,
    device: torch.device | str = "cpu",
) -> tuple[ImageSet, ImageSet]:
    """The training and the test set of `source`, on the CPU, mapped from the cache (see data/cache.py).

    source: "synthetic_faces", drawn on `device` from the four numbers, or an image folder, which ignores them
            (one named synthetic_faces is reached as ./synthetic_faces).

    Raises UsageError and RunError as `image_folder` and `synthetic_faces` do.
    """
    if source != "synthetic_faces":
        return load_folder(source, image_size, cache_dir)
    return _synthetic_faces(
        (identities, train_per_identity, test_per_identity, image_size, seed), cache_dir, torch.device(device)
    )


def _synthetic_faces(
    numbers: tuple[int, int, int, int, int], cache_dir: str | os.PathLike | None, device: torch.device
) -> tuple[ImageSet, ImageSet]:
    from data import synthetic_faces as faces  # not needed for image folders

    identities, *per_identity, image_size, _ = numbers
    if min(numbers) < 0 or identities * image_size * sum(per_identity) == 0:
        return faces.synthetic_faces(*numbers)  # it says which number is wrong
    cut = identities * per_identity[0]

    def fill(array: np.ndarray) -> None:
        images = torch.from_numpy(array)
        for part, drawn in zip((images[:cut], images[cut:]), faces.synthetic_faces(*numbers, device), strict=True):
            part.copy_(drawn.images)

    # Devices differ in the rounding of their arithmetic, so each has its own file.
    digest = hashlib.sha256(repr((faces.VERSION, numbers, device.type)).encode()).hexdigest()[:32]
    shape = (identities * sum(per_identity), 3, image_size, image_size)
    images = cached_images(f"synthetic_faces-{image_size}-{digest}", shape, fill, cache_dir)
    classes = tuple(f"id{identity:03d}" for identity in range(identities))
    train, test = (
        ImageSet("synthetic_faces", part, torch.arange(identities).repeat_interleave(count), classes)
        for part, count in zip((images[:cut], images[cut:]), per_identity, strict=True)
    )
    return train, test
