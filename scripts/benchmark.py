"""Time importances of single images (EWC's Fisher information, MAS) against an ordinary backward pass, same images.

python scripts/benchmark.py --model face_vit_tiny --images 480
Both run on random images, interleaved in one process; medians of the repeats after one warm-up.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

# A script's own folder, not the repository's root, is where Python looks first.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from backbone.recognizer import Architecture, Recognizer, build_recognizer, default_image_size
from data.image_set import ImageSet
from methods.importance import batch_importance, image_importance
from util.arguments import add_hardware_arguments, hardware_of, run_main
from util.hardware import Hardware
from util.tables import markdown_table


def measure(works: dict[str, Callable[[], object]], repeats: int, hardware: Hardware) -> dict[str, float]:
    """Median seconds of each piece of work, taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            hardware.synchronize()
            start = time.perf_counter()
            work()
            hardware.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def backward(model: Recognizer, image_set: ImageSet, hardware: Hardware, batch_size: int) -> None:
    """What one epoch of training does with these images, without the optimizer's step."""
    for images, labels in zip(image_set.images.split(batch_size), image_set.labels.split(batch_size), strict=True):
        with hardware.autocast():
            loss = model.head.loss(model.embed(images), labels)
        loss.backward()
        model.zero_grad(set_to_none=True)


def main(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="face_vit_tiny", help="a timm model")
    parser.add_argument("--images", type=int, default=480, help="how many random images")
    parser.add_argument("--batch-size", type=int, default=48, help="of the backward pass, and of the batch approximation")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    add_hardware_arguments(parser)
    args = parser.parse_args(argv)
    hardware = hardware_of(args)
    torch.manual_seed(0)
    size = default_image_size(args.model)
    model = hardware.place(build_recognizer(Architecture(args.model, args.classes, size)))
    model.head.requires_grad_(False)
    images = torch.randint(0, 256, (args.images, 3, size, size), dtype=torch.uint8)
    labels = torch.randint(0, args.classes, (args.images,))
    model.eval()  # as for importances: no dropout on either side
    image_set = ImageSet("random", images, labels, tuple(map(str, range(args.classes)))).to(hardware.device)
    rest = (torch.square, image_set, torch.arange(args.images), hardware)
    works = {
        "backward pass": lambda: backward(model, image_set, hardware, args.batch_size),
        "Fisher, single images": lambda: image_importance(model, model.head.loss_of_logits, *rest),
        "Fisher, batches": lambda: batch_importance(model, model.head.loss_of_logits, *rest, args.batch_size),
    }
    seconds = measure(works, args.repeats, hardware)
    base = seconds["backward pass"]
    rows = [[name, f"{taken / base:.2f}", f"{1000 * taken / args.images:.2f}"] for name, taken in seconds.items()]
    print(f"{args.model}, {args.images} images, {hardware.describe()}, torch {torch.__version__}\n")
    print(markdown_table(["work", "ratio", "ms per image"], rows))


if __name__ == "__main__":
    run_main(main)
