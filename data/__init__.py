"""What a model is trained and tested on."""

import argparse
import os

import torch

from data import image_folder, synthetic_faces
from data.cache import cache_folder
from data.image_set import ImageSet
from data.tasks import split_validation
from util.runtime import distributed

SYNTHETIC = "synthetic_faces"


def build_datasets(args: argparse.Namespace, image_size: int, device: torch.device) -> tuple[ImageSet, ImageSet]:
    """The training and the test set that the data options name; on the device if the training set has room there."""
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
    """
    if source != SYNTHETIC:
        return image_folder.image_folder(source, image_size, cache_dir)
    return synthetic_faces.synthetic_faces(
        identities, train_per_identity, test_per_identity, image_size, seed, device, cache_folder(cache_dir)
    )
