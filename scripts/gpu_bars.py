"""Measure on a GPU what this project promises to be fast at, and print the table of promises filled in.

python scripts/gpu_bars.py                    within ten minutes; needs one CUDA device of 8 GB, made for a large one
python scripts/gpu_bars.py --jobs-per-gpu 8   more of the table's runs side by side
The whole table (13 methods, 4 tasks, 100 epochs each) is run twice with few epochs and extended along the straight line
through the two, and said to be so. On a CPU, with small sizes, the script shows that it works, not how fast.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# A script's own folder, not the repository's root, is where Python looks first.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from backbone.recognizer import Architecture, build_recognizer, default_image_size
from data import load_data
from methods import METHODS
from scripts.benchmark import measure, peak_memory
from scripts.both_paths import Bench
from util.cli.arguments import HelpFormatter, add_fast_path_arguments, add_hardware_arguments, hardware_of, run_main
from util.report.results import load_results
from util.report.tables import markdown_table
from util.runtime.errors import RunError
from util.runtime.files import write_json
from util.runtime.hardware import Hardware
from util.storage.checkpoint import Checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 100  # of a task in the whole table


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--model", default="face_vit_p8s8_d6", help="a timm model")
    parser.add_argument("--identities", type=int, default=100)
    parser.add_argument("--train-per-identity", type=int, default=360)
    parser.add_argument("--test-per-identity", type=int, default=90)
    parser.add_argument("--batch-size", type=int, default=48, help="of forgetting, images of each stream")
    parser.add_argument("--pretrain-batch-size", type=int, default=480)
    parser.add_argument("--epochs", type=int, nargs=2, default=[1, 4], help="a task's epochs in the two runs of the table")
    parser.add_argument("--methods", nargs="+", default=["all"], metavar="NAME", help="rows of the table")
    parser.add_argument("--jobs-per-gpu", type=int, default=4, help="runs of the table side by side")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    add_hardware_arguments(parser)
    add_fast_path_arguments(parser)
    args = parser.parse_args(argv)
    args.workers, args.eval_images = min(4, os.cpu_count() or 1), 2 * args.batch_size
    return args


def pretraining(args: argparse.Namespace, hardware: Hardware, size: int, folder: Path) -> dict:
    """Images per second of a pre-training step at its own batch size, gathering the batch included, and its memory."""
    sizes = argparse.Namespace(**vars(args) | {"batch_size": args.pretrain_batch_size})
    work, _ = Bench(sizes, hardware, size, folder).fast_training("pretrain", hardware)
    seconds = measure({"step": work}, args.repeats, hardware)["step"]
    return {"images_per_second": work.images / seconds, "memory_mb": peak_memory(work, hardware)}


def forgetting(bench: Bench, repeats: int) -> dict:
    """GS-LoRA's forget step on both paths, and the time to the first step."""
    works = {"fast": bench.fast_training("gs_lora", bench.hardware)[0], "plain": bench.plain_training("gs_lora")[0]}
    seconds = measure(works, repeats, bench.hardware)
    figures = {"ratio": seconds["plain"] / seconds["fast"], "ms": {path: 1000 * taken for path, taken in seconds.items()}}
    figures["start"] = {"eager": bench.seconds_to_first_step(False)}
    if bench.hardware.compile:
        figures["start"]["compiled"] = bench.seconds_to_first_step(True)
    return figures


def whole_table(args: argparse.Namespace, hardware: Hardware, size: int, folder: Path) -> dict:
    """Seconds of the whole table, from two short ones, and the most memory that one of its runs needed."""
    numbers = (args.identities, args.train_per_identity, args.test_per_identity)
    train_set, _ = load_data("synthetic_faces", size, *numbers, 0, device=hardware.device)
    checkpoint = folder / "untrained.pth"
    torch.manual_seed(0)
    model = build_recognizer(Architecture(args.model, args.identities, size))
    save_checkpoint(checkpoint, Checkpoint(model, train_set.classes))
    taken, memory = {}, 0.0
    for epochs in args.epochs:
        output = folder / f"table-{epochs}"
        words = ["scripts/compare.py", "--methods", *args.methods, "--jobs-per-gpu", args.jobs_per_gpu]
        words += ["--output-dir", output, "--"]
        words += ["--checkpoint", checkpoint, "--as-published", "--batch-size", args.batch_size, "--data-ratio", 0.1]
        words += ["--identities", numbers[0], "--train-per-identity", numbers[1], "--test-per-identity", numbers[2]]
        words += ["--epochs", epochs, "--warmup-epochs", 0, "--device", hardware.device.type]
        words += ["--compile", "on" if hardware.compile else "off"]
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RunError(f"the table of {epochs} epochs failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
        taken[epochs] = time.perf_counter() - start
        for path in output.glob("*/results.json"):
            memory = max(memory, *(task["peak_memory_mb"] for task in load_results(path)["tasks"]))
    few, more = args.epochs
    slope = (taken[more] - taken[few]) / (more - few)
    return {"measured_seconds": taken, "seconds": taken[more] + slope * (EPOCHS - more), "memory_mb": memory}


def show(figures: dict, args: argparse.Namespace) -> str:
    """The promises beside what was measured."""
    pretrain, forget, table = figures["pretraining"], figures["forgetting"], figures["table"]
    ms, runs = forget["ms"], table["measured_seconds"]
    measured = {
        "pretraining": f"{pretrain['images_per_second']:,.0f} images/s",
        "forgetting": f"{forget['ratio']:.1f} × ({ms['fast']:.1f} ms, plain {ms['plain']:.1f} ms)",
        "table": f"{table['seconds'] / 60:.1f} minutes, extended from "
        + ", ".join(f"{seconds:.0f} s with {epochs} epochs" for epochs, seconds in runs.items())
        + f", {args.jobs_per_gpu} runs at once",
        "start": ", ".join(f"{ended:.1f} s {name}" for name, (_, ended) in forget["start"].items()),
    }
    both = f"batch {args.batch_size} + {args.batch_size}"
    methods = len(METHODS) if args.methods == ["all"] else len(args.methods)
    rows = [
        [f"pre-training, batch {args.pretrain_batch_size}, data included", "≥ 25,000 images/s", measured["pretraining"]],
        [f"GS-LoRA forget step, {both}", "≥ 10 × the plain path", measured["forgetting"]],
        [f"the whole table, {methods} methods, {EPOCHS} epochs a task", "≤ 20 minutes", measured["table"]],
        ["memory of that, largest method", "≤ 8 GB", f"{table['memory_mb'] / 1024:.2f} GB"],
        ["start to first step, cached data", "≤ 10 s eager, ≤ 60 s compiled", measured["start"]],
    ]
    return markdown_table(["work", "promise", "measured"], rows)


def main(argv: list[str] | None) -> None:
    args = parse_arguments(argv)
    hardware = hardware_of(args).resolve_compile(math.inf)
    size = default_image_size(args.model)
    print(f"{args.model}, {hardware.describe()}, torch {torch.__version__}", flush=True)
    figures: dict = {"device": hardware.describe(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures["pretraining"] = pretraining(args, hardware, size, folder / "pretraining")
        figures["forgetting"] = forgetting(Bench(args, hardware, size, folder / "forgetting"), args.repeats)
        figures["table"] = whole_table(args, hardware, size, folder)
    print(f"\n{show(figures, args)}")
    if args.json is not None:
        write_json(args.json, figures)


if __name__ == "__main__":
    run_main(main)
