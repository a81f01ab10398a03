"""What a model is trained and tested on."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from data import image_folder, synthetic_faces
from data.cache import cache_folder
from data.image_set import ImageSet, class_digests
from data.records import is_record_file
from data.tasks import ForgettingTask, split_validation
from util.runtime import distributed
from util.runtime.errors import UsageError

SYNTHETIC = "synthetic_faces"
STRANGERS_SIZE = 300, 4, 0  # identities, images of each, none for a test split


def build_datasets(
    args: argparse.Namespace, image_size: int, device: torch.device, on_demand: bool = False, crop_pct: float = 1.0
) -> tuple[ImageSet, ImageSet]:
    """The training and the test set that the data options name; on the device if the training set has room there.

    `args.data` is "synthetic_faces", an image folder (one of that name is reached as ./synthetic_faces) or a .rec. With
    `on_demand`, no training image is decoded, and both sets are in host memory: `place_images` does the rest.
    `crop_pct`, the share of the shorter side that is seen, does nothing to synthetic faces.
    """
    cache_dir = args.cache_dir or cache_folder()
    with distributed.main_process_first():
        if args.data == SYNTHETIC:
            counts = args.identities, args.train_per_identity, args.test_per_identity
            data = synthetic_faces.synthetic_faces(*counts, image_size, args.data_seed, device, cache_dir)
        else:
            data = image_folder.image_folder(args.data, image_size, cache_dir, args.val_fraction, on_demand, crop_pct)
    contents = class_digests(*data)
    train_set, test_set = (replace(split, contents=contents) for split in data)
    if args.val_fraction is not None and not is_record_file(args.data):
        split = split_validation(train_set.labels, len(train_set.classes), args.val_fraction)
        train_set, test_set = map(train_set.subset, split)
    data = train_set, test_set
    return data if on_demand else place_images(args, data, device)


def place_images(
    args: argparse.Namespace, data: Sequence[ImageSet], device: torch.device, tasks: Sequence[ForgettingTask] = ()
) -> tuple[ImageSet, ...]:
    """`data` where --images says, on the device if its first set has room there; the images of `tasks` are decoded."""
    for task in tasks:
        data[0].decode(torch.cat([task.forget_indices, task.remain_indices]))
    on_device = args.images == "device" or (args.images == "auto" and has_room(device, data[0].images.nbytes))
    return tuple(images.to(device) if on_device else images for images in data)


def build_strangers(
    args: argparse.Namespace, image_size: int, device: torch.device, crop_pct: float = 1.0
) -> ImageSet | None:
    """People in no training set: of the folder `args.strangers`, or further ones drawn; None where there are none."""
    if args.strangers is not None:
        return people_folder(args, args.strangers, image_size, crop_pct)
    if args.data != SYNTHETIC:
        return None
    more = {"first": args.identities, "seed": args.data_seed, "device": device}
    more["cache_dir"] = args.cache_dir or cache_folder()
    return synthetic_faces.synthetic_faces(*STRANGERS_SIZE, image_size=image_size, **more)[0]


def people_folder(args: argparse.Namespace, root: Path | str, image_size: int, crop_pct: float = 1.0) -> ImageSet:
    """The photos in a folder `root`, <person>/<image>."""
    with distributed.main_process_first():
        people = image_folder.flat_folder(root, image_size, args.cache_dir or cache_folder(), crop_pct)
    if {*people.classes} <= {"train", "test"}:
        raise UsageError(f"{root} holds train/ and test/: a folder <person>/<image> is needed, as {root}/train")
    return people


def has_room(device: torch.device, size: int) -> bool:
    """Whether `size` bytes of images leave most of the device's free memory to the model."""
    return device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > 4 * size
