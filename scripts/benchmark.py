"""Measure the fast path against a plain one, and without one of its parts at a time.

python scripts/benchmark.py                     training steps and evaluation of face_vit_p8s8_d6, fast and plain
python scripts/benchmark.py ablation --batch-size 8

The plain path: float32, eager, timm's last block, torch's dropout and default AdamW. Both take turns in one process.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root

import pandas as pd
import torch

import train_forget
from backbone.recognizer import Architecture, Recognizer, build_recognizer, to_device
from backbone.sources import find_source
from data.batches import Batch, batches
from data.synthetic_faces import synthetic_faces
from data.tasks import forgetting_tasks, pretraining_task
from methods import METHODS
from methods.pretrain import Pretrain
from util.cli import options
from util.cli.main import run_main
from util.evaluation.evaluate import predict
from util.runtime.files import write_json
from util.runtime.hardware import Hardware
from util.training.engine import Trainer

# What can be undone: fields of Hardware, all off on the plain path.
FIELDS = ("bf16", "compile", "cuda_graphs", "cls_only_last_block", "fast_dropout", "fused_optimizer")
IDENTITIES = 8  # half of them are forgotten
Work = tuple[Callable[[], object], int]  # what is timed, and how many images it takes


class Bench:
    """A model, synthetic faces, `count` of each identity, and the work that is done with them."""

    def __init__(self, model: str, batch_size: int, count: int, device: torch.device) -> None:
        self.model, self.batch_size, self.device = model, batch_size, device
        self.faces, _ = synthetic_faces(IDENTITIES, count, 1, find_source(model).image_size, 0, device)
        (self.task,) = forgetting_tasks(self.faces.labels, IDENTITIES, [range(IDENTITIES // 2)], seed=0, data_ratio=1)
        self.whole = pretraining_task(self.faces.labels, IDENTITIES)

    def untrained(self, hardware: Hardware) -> Recognizer:
        architecture = Architecture(self.model, IDENTITIES, self.faces.image_size)
        return to_device(build_recognizer(architecture), hardware)

    def begin(self, name: str, hardware: Hardware) -> Trainer:
        """At the start of the task, with a rate so small that the weights last."""
        words = f"--batch-size {self.batch_size} --epochs 100 --lr 1e-6 --min-lr 0 --checkpoint none"
        args = train_forget.parse_arguments([*words.split(), "--method", name if name in METHODS else "retrain"])
        args.mirror = "on"  # an option of pre-training
        method = METHODS.get(name, Pretrain)(args, hardware)
        model, task = self.untrained(hardware), self.task if name in METHODS else self.whole
        method.begin_task(model, task, self.faces, args.epochs)
        return Trainer(model.to(hardware.device).train(), method, task)

    def batches(self, trainer: Trainer) -> Iterator[Batch]:
        (plan,) = trainer.method.passes(trainer.task, 0, 1)
        while True:
            yield from batches(self.faces, plan, torch.default_generator, self.device)

    def work(self, name: str, hardware: Hardware) -> Work:
        """A training step of a method, or the evaluation of all faces."""
        if name == "evaluation":
            return partial(predict, self.untrained(hardware), self.faces, hardware), len(self.faces)
        trainer = self.begin(name, hardware)
        stream = self.batches(trainer)
        return lambda: trainer.step(next(stream)), len(next(stream))


def measure(args: argparse.Namespace, *works: Work) -> list[float]:
    """Median seconds of one run of each, taken in turn."""
    from torch.utils.benchmark import Measurement, Timer  # warns of a missing GPU where `can_compile` has not silenced it

    for run, _ in works * (5 if args.device == "cuda" else 1):  # CUDA graphs are replayed from the third run on
        run()
    found = [[] for _ in works]
    for _ in range(3):
        for (run, _), measured in zip(works, found, strict=True):
            timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
            measured.append(timer.blocked_autorange(min_run_time=args.min_run_time))
    return [Measurement.merge(measured)[0].median for measured in found]


def steps(args: argparse.Namespace, hardware: Hardware) -> list[dict]:
    count = max(args.batch_size, hardware.eval_batch // IDENTITIES)
    bench, rows = Bench(args.model, args.batch_size, count, hardware.device), []
    for name in ("gs_lora", "der_pp", "ewc", "pretrain", "evaluation"):
        works = [bench.work(name, path) for path in (hardware, replace(hardware, **dict.fromkeys(FIELDS, False)))]
        fast, plain = (images / seconds for (_, images), seconds in zip(works, measure(args, *works), strict=True))
        rows.append({"work": name, "fast : plain": fast / plain, "images/s fast": fast, "images/s plain": plain})
    return rows


def ablation(args: argparse.Namespace, hardware: Hardware) -> list[dict]:
    bench = Bench(args.model, args.batch_size, args.batch_size, hardware.device)
    fields = {field: False for field in FIELDS if getattr(hardware, field)}
    fields["fused_attention"] = not hardware.fused_attention
    paths = {"gs_lora": hardware}
    paths |= {f"{name} {'on' if on else 'off'}": replace(hardware, **{name: on}) for name, on in fields.items()}
    seconds = measure(args, *(bench.work("gs_lora", path) for path in paths.values()))
    return [{"work": n, "ms": 1000 * s, "times as long": s / seconds[0]} for n, s in zip(paths, seconds, strict=True)]


MODES = {"steps": steps, "ablation": ablation}


def main(argv: list[str]) -> None:
    parser = options.Parser(__doc__)
    parser.add_argument("mode", nargs="?", choices=MODES, default="steps", help="what to measure")
    parser.add_argument("--model", default="face_vit_p8s8_d6", metavar="NAME", help="timm model, or one of the papers'")
    parser.add_argument("--batch-size", type=options.number(int, 1), default=48, help="images of each stream in a step")
    parser.add_argument("--min-run-time", type=float, default=1.0, help="least seconds of each of three timings")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the numbers to")
    options.add_hardware(parser)
    options.add_fast_path(parser)
    args = parser.parse_args(argv)
    hardware = options.start_hardware(args).resolve_compile(math.inf)
    args.device = hardware.device.type
    print(f"{args.model}, batch size {args.batch_size}, torch {torch.__version__}, {hardware.describe()}", flush=True)
    rows = MODES[args.mode](args, hardware)
    print(f"\n{pd.DataFrame(rows).to_markdown(index=False, floatfmt=',.2f')}")
    if args.json is not None:
        about = {"model": args.model, "batch size": args.batch_size, "torch": torch.__version__}
        write_json(args.json, {**about, "device": hardware.describe(), args.mode: rows})


if __name__ == "__main__":
    run_main(main)
