"""How fast is the fast path? Each piece of work, interleaved in one process with a straightforward implementation of it.

python scripts/benchmark.py                                   face_vit_p8s8_d6, 48 + 48 images: half an hour on two cores
python scripts/benchmark.py --batch-size 8 --eval-images 40   the same in a few minutes
python scripts/benchmark.py --only steps ablation --json FILE     some of the tables, also as JSON
Inputs are drawn faces and untrained weights; medians of the repeats, after one run that does not count.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

# A script's own folder, not the repository's root, is where Python looks first.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from backbone.recognizer import default_image_size
from methods.importance import batch_importance, image_importance
from scripts.both_paths import EPOCHS, Bench, Work, read_back, teacher_every_step, two_forward_passes
from util.cli.arguments import HelpFormatter, add_fast_path_arguments, add_hardware_arguments, hardware_of, run_main
from util.report.tables import markdown_table
from util.runtime.errors import RunError, UsageError
from util.runtime.files import write_json
from util.runtime.hardware import Hardware, keep_freed_memory

TABLES = ("steps", "ablation", "task", "start", "importances")
TRAININGS = {"gs_lora": "forget step, GS-LoRA", "der_pp": "forget step, DER++", "ewc": "forget step, EWC*"} | {
    "pretrain": "pre-training step"
}
MEASURED_SECONDS = 0.5  # of work in one repeat, at least: a step of milliseconds is run several times
BF16_TOLERANCE = 0.02


def measure(works: dict[str, Work], repeats: int, hardware: Hardware) -> dict[str, float]:
    """Median seconds of each piece of work, taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    counts = dict.fromkeys(works, 1)
    kept = None
    for repeat in range(repeats + 1):
        for name, work in works.items():
            if work.keep_memory != kept:
                kept = work.keep_memory
                _set_up(work, hardware)
            start = time.perf_counter()
            for _ in range(counts[name]):
                work.run()
            hardware.synchronize()
            taken = (time.perf_counter() - start) / counts[name]
            if repeat:
                seconds[name].append(taken)
            else:
                counts[name] = math.ceil(MEASURED_SECONDS / taken)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def _set_up(work: Work, hardware: Hardware) -> None:
    """Give a work the memory that it keeps: by a run that does not count."""
    keep_freed_memory(work.keep_memory)
    if work.keep_memory:
        work.run()
    hardware.synchronize()


def peak_memory(work: Work, hardware: Hardware) -> float:
    """MB that one run needs beyond what lay in memory before it."""
    keep_freed_memory(False)
    hardware.reset_peak_memory()
    before = hardware.peak_memory_mb()
    keep_freed_memory(work.keep_memory)
    work.run()
    hardware.synchronize()
    return hardware.peak_memory_mb() - before


def matmul_rate(hardware: Hardware) -> float:
    """bf16 FLOPs per second of a large matrix product on this device (fp32 where it has no bf16)."""
    size = 8192 if hardware.device.type == "cuda" else 2048
    a = torch.randn(size, size, device=hardware.device, dtype=torch.bfloat16 if hardware.bf16 else torch.float32)
    return 2 * size**3 / measure({"product": Work(lambda: a @ a, 1)}, 3, hardware)["product"]


def steps_table(bench: Bench, repeats: int) -> list[dict]:
    """Every step and the evaluation on both paths. Raises RunError if the two do not compute the same."""
    rate = matmul_rate(bench.hardware)
    rows = []
    for name, title in TRAININGS.items():
        fast, trainer = bench.fast_training(name, bench.hardware)
        plain, training = bench.plain_training(name)
        losses = bench.losses(trainer, training)
        if not abs(losses[0] - losses[1]) <= BF16_TOLERANCE * abs(losses[1]):
            raise RunError(f"{title}: the paths disagree: loss {losses[0]:.4f} on the fast, {losses[1]:.4f} on the plain")
        rows.append(_row(title, fast, plain, bench, repeats, rate) | {"losses": losses})
    rows.append(_row("evaluation", *bench.evaluation(), bench, repeats, rate) | {"losses": None})
    return rows


def _row(title: str, fast: Work, plain: Work, bench: Bench, repeats: int, rate: float) -> dict:
    works = {"fast": fast, "plain": plain}
    seconds = measure(works, repeats, bench.hardware)
    memory = {path: peak_memory(work, bench.hardware) for path, work in works.items()}
    return {
        "work": title,
        "ratio": seconds["plain"] / seconds["fast"],
        "images": fast.images,
        "images_per_second": {path: work.images / seconds[path] for path, work in works.items()},
        "memory_mb": memory,
        "utilisation": fast.flops / seconds["fast"] / rate,
    }


def ablation_table(bench: Bench, repeats: int) -> list[dict]:
    """GS-LoRA's forget step (of DER++ for the teacher) with one part of the fast path undone at a time."""
    hardware = bench.hardware
    on_cuda = hardware.device.type == "cuda"
    undone = {
        "bf16": {"bf16": False},
        "compiled blocks": {"compile": False, "cuda_graphs": False},
        "CUDA graphs": {"cuda_graphs": False},
        "class-token-only last block": {"cls_only_last_block": False},
        "fast dropout": {"fast_dropout": False},
        "fused optimizer": {"fused_optimizer": False},
    }
    parts = {name: fields for name, fields in undone.items() if any(getattr(hardware, field) for field in fields)}
    attention = "fused attention" if hardware.fused_attention else "written-out attention"
    parts[attention] = {"fused_attention": not hardware.fused_attention}
    # What needs most memory comes first, what gives it back comes last: between them every work finds what it needs.
    works = {"DER++": bench.fast_training("der_pp", hardware)[0]}
    works["teacher once a task"] = bench.fast_training("der_pp", hardware, teacher_every_step)[0]
    works[""] = bench.fast_training("gs_lora", hardware)[0]
    works |= {name: bench.fast_training("gs_lora", replace(hardware, **fields))[0] for name, fields in parts.items()}
    works["one forward pass"] = bench.fast_training("gs_lora", hardware, two_forward_passes)[0]
    works["images decoded once"] = bench.fast_training("gs_lora", hardware, bench.decoding())[0]
    works["loss left on the device"] = bench.fast_training("gs_lora", hardware, read_back)[0]
    if not on_cuda:
        works["freed memory kept"] = replace(works[""], keep_memory=not works[""].keep_memory)
    seconds = measure(works, repeats, hardware)
    base = {"teacher once a task": "DER++"}
    return [
        {"part": name, "ratio": seconds[name] / seconds[base.get(name, "")], "ms": 1000 * seconds[name]}
        for name in works
        if name not in ("", "DER++")
    ]


def task_row(bench: Bench) -> dict:
    """A whole task on both paths, from the files on."""
    keep_freed_memory(bench.keep_memory)
    first, _ = bench.fast_task()
    fast, in_steps = bench.fast_task()
    keep_freed_memory(False)
    plain = bench.plain_task()
    return {"ratio": plain / fast, "seconds": {"fast": fast, "plain": plain}, "first": first, "share": 1 - in_steps / fast}


def importance_table(bench: Bench, repeats: int) -> list[dict]:
    """Importances of single images (EWC's Fisher information, MAS) against an ordinary backward pass, same images."""
    hardware, images = bench.hardware, bench.train_set
    _, model = bench.begin("ewc", replace(hardware, compile=False))
    model.eval()  # as for importances: no dropout on either side
    rest = (torch.square, images, torch.arange(len(images)), hardware)
    objective, size = model.head.loss_of_logits, bench.args.batch_size

    def backward() -> None:
        for part, labels in zip(images.images.split(size), images.labels.split(size), strict=True):
            with hardware.autocast():
                loss = model.head.loss(model.embed(part), labels)
            loss.backward()
            model.zero_grad(set_to_none=True)

    works = {
        "backward pass": backward,
        "Fisher, single images": lambda: image_importance(model, objective, *rest),
        "Fisher, batches": lambda: batch_importance(model, objective, *rest, size),
    }
    works = {name: Work(run, len(images), keep_memory=bench.keep_memory) for name, run in works.items()}
    seconds = measure(works, repeats, hardware)
    base = seconds["backward pass"]
    return [
        {"work": name, "ratio": taken / base, "ms_per_image": 1000 * taken / len(images)} for name, taken in seconds.items()
    ]


def show(results: dict) -> str:
    """The tables that were measured, as Markdown."""
    tables = []
    if rows := results.get("steps"):
        header = ["work", "fast : plain", "images/s fast", "plain", "MB fast", "plain", "of matmul rate"]
        header += ["loss fast", "plain"]
        cells = [
            [row["work"], f"{row['ratio']:.1f} ×"]
            + [f"{row['images_per_second'][path]:.1f}" for path in ("fast", "plain")]
            + [f"{row['memory_mb'][path]:.0f}" for path in ("fast", "plain")]
            + [f"{100 * row['utilisation']:.0f}%"]
            + ([f"{loss:.3f}" for loss in row["losses"]] if row["losses"] else ["–", "–"])
            for row in rows
        ]
        tables.append(markdown_table(header, cells))
    if rows := results.get("ablation"):
        cells = [[row["part"], f"{row['ratio']:.2f} ×", f"{row['ms']:.0f}"] for row in rows]
        tables.append(markdown_table(["without", "the step takes", "ms"], cells))
    if row := results.get("task"):
        tables.append(
            f"A whole task of {EPOCHS} epochs, from files to files: {row['ratio']:.1f} × the plain path "
            f"({row['seconds']['fast']:.1f} s, plain {row['seconds']['plain']:.1f} s; {row['first']:.1f} s where blocks are "
            f"compiled first); {100 * row['share']:.0f}% of it outside the training steps."
        )
    if seconds := results.get("start"):
        taken = ", ".join(f"{begun:.1f} s and {ended:.1f} s {name}" for name, (begun, ended) in seconds.items())
        tables.append(f"From the start of a process to the beginning and the end of its first step, cached data: {taken}.")
    if rows := results.get("importances"):
        cells = [[row["work"], f"{row['ratio']:.2f} ×", f"{row['ms_per_image']:.2f}"] for row in rows]
        tables.append(markdown_table(["work", "ratio", "ms per image"], cells))
    return "\n\n".join(tables)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--model", default="face_vit_p8s8_d6", help="a timm model")
    parser.add_argument("--image-size", type=int, help="pixels; none: the model's own")
    parser.add_argument("--batch-size", type=int, default=48, help="images of each stream in a step")
    parser.add_argument("--eval-images", type=int, default=200, help="images of the evaluation")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="the plain path's DataLoader workers")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES, help="which tables to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    add_hardware_arguments(parser)
    add_fast_path_arguments(parser)
    args = parser.parse_args(argv)
    if min(args.batch_size, args.eval_images, args.repeats) < 1 or args.workers < 0:
        raise UsageError("--batch-size, --eval-images and --repeats must be at least 1, --workers at least 0")
    return args


def main(argv: list[str] | None) -> None:
    args = parse_arguments(argv)
    hardware = hardware_of(args).resolve_compile(math.inf)
    size = args.image_size or default_image_size(args.model)
    print(f"{args.model}, {size}×{size} pixels, batch {args.batch_size}, {hardware.describe()}, torch {torch.__version__}")
    results: dict = {"model": args.model, "batch_size": args.batch_size, "hardware": hardware.as_dict()}
    results |= {"device": hardware.describe(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, hardware, size, Path(folder))
        measures = {
            "steps": lambda: steps_table(bench, args.repeats),
            "ablation": lambda: ablation_table(bench, args.repeats),
            "task": lambda: task_row(bench),
            "start": lambda: {
                name: bench.seconds_to_first_step(compiled)
                for name, compiled in (("eager", False), ("compiled", True))
                if hardware.compile or not compiled
            },
            "importances": lambda: importance_table(bench, args.repeats),
        }
        for name in args.only:
            results[name] = measures[name]()
            print(f"\n{show({name: results[name]})}", flush=True)
            if args.json is not None:
                write_json(args.json, results)


if __name__ == "__main__":
    run_main(main)
