"""How cost grows: time and memory of forgetting with GS-LoRA, for more images and for larger models.

python scripts/scaling.py --output-dir exps/scaling
1, 4 and 16 times the images through face_vit_p8s8_d6 (an epoch, and the evaluation of a quarter as many test images), then
the same images through 6, 12 and 18 blocks and through ViT-B/16 at 224 pixels. Leaves scaling.png, scaling.md and
scaling.json; exponents are slopes in the double logarithmic plot.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path

# A script's own folder, not the repository's root, is where Python looks first.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from backbone.recognizer import default_image_size, forward_flops
from data.batches import batches
from scripts.benchmark import measure, peak_memory
from scripts.both_paths import IDENTITIES, Bench, Work
from util.cli.arguments import HelpFormatter, add_fast_path_arguments, add_hardware_arguments, hardware_of, run_main
from util.evaluation.evaluate import predict
from util.report.figures import save_figure, scaling_figure
from util.report.tables import markdown_table
from util.runtime.errors import UsageError
from util.runtime.files import write_json, write_text
from util.runtime.hardware import Hardware

MODELS = ("face_vit_p8s8_d6", "face_vit_p8s8_d12", "face_vit_p8s8_d18", "vit_base_patch16_224")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="timm models, the first for the images")
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 4, 16], help="multiples of the images")
    parser.add_argument("--batch-size", type=int, default=16, help="images of each stream in a step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output-dir", type=Path, required=True)
    add_hardware_arguments(parser)
    add_fast_path_arguments(parser)
    args = parser.parse_args(argv)
    if min(args.batch_size, args.repeats, *args.factors) < 1:
        raise UsageError("--batch-size, --repeats and --factors must be at least 1")
    args.workers = 0
    return args


def epoch_of(bench: Bench) -> Work:
    """One epoch of GS-LoRA and one evaluation."""
    _, trainer = bench.fast_training("gs_lora", bench.hardware)
    (plan,) = trainer.method.passes(0)

    def run() -> None:
        for batch in batches(bench.train_set, plan, torch.Generator().manual_seed(0), bench.hardware.device):
            trainer.step(batch)
        predict(trainer.model, bench.test_set, bench.hardware)

    return Work(run, len(bench.train_set), keep_memory=bench.keep_memory)


def cost(model: str, factor: int, args: argparse.Namespace, hardware: Hardware) -> dict:
    """Seconds and peak memory of an epoch with `factor` times the images of one batch."""
    size = default_image_size(model)
    images = factor * 2 * args.batch_size
    sizes = argparse.Namespace(**vars(args) | {"model": model, "eval_images": max(IDENTITIES, images // 4)})
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(sizes, hardware, size, Path(folder), images)
        work = epoch_of(bench)
        seconds = measure({"epoch": work}, args.repeats, hardware)["epoch"]
        return {
            "model": model,
            "images": work.images,
            "gflops_per_image": forward_flops(bench.model) / 1e9,
            "parameters": bench.model.num_parameters(),
            "seconds": seconds,
            "memory_mb": peak_memory(work, hardware),
        }


def exponent(rows: list[dict], x: str, y: str) -> float:
    """The slope of log y over log x."""
    return float(np.polyfit(*(np.log([row[key] for row in rows]) for key in (x, y)), 1)[0])


def show(figures: dict) -> str:
    names = {"images": "images", "models": "GFLOPs per image"}
    tables = []
    for kind, rows in (("images", figures["images"]), ("models", figures["models"])):
        cells = [
            [
                row["model"],
                str(row["images"]),
                f"{row['gflops_per_image']:.1f}",
                f"{row['parameters'] / 1e6:.1f}",
                f"{row['seconds']:.2f}",
                f"{1000 * row['seconds'] / row['images']:.1f}",
                f"{row['memory_mb']:.0f}",
            ]
            for row in rows
        ]
        header = ["model", "images", "GFLOPs / image", "M parameters", "s / epoch", "ms / image", "MB"]
        exponents = ", ".join(f"{key}^{value:.2f}" for key, value in figures["exponents"][kind].items())
        tables.append(f"{markdown_table(header, cells)}\n\nGrows with the {names[kind]} as {exponents}.")
    return "\n\n".join(tables)


def main(argv: list[str] | None) -> None:
    args = parse_arguments(argv)
    hardware = hardware_of(args).resolve_compile(math.inf)
    print(f"batch {args.batch_size} + {args.batch_size}, {hardware.describe()}, torch {torch.__version__}", flush=True)
    figures: dict = {"device": hardware.describe(), "torch": torch.__version__, "batch_size": args.batch_size}
    figures["images"] = [cost(args.models[0], factor, args, hardware) for factor in args.factors]
    same = args.factors[len(args.factors) // 2]
    figures["models"] = [cost(model, same, args, hardware) for model in args.models]
    figures["exponents"] = {
        kind: {name: exponent(figures[kind], x, y) for name, y in (("time", "seconds"), ("memory", "memory_mb"))}
        for kind, x in (("images", "images"), ("models", "gflops_per_image"))
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "scaling.json", figures)
    write_text(args.output_dir / "scaling.md", show(figures) + "\n")
    save_figure(scaling_figure(figures), args.output_dir / "scaling.png")
    print(f"\n{show(figures)}")


if __name__ == "__main__":
    run_main(main)
