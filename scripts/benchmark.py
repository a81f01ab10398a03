"""Measure the fast path: beside a plain one, and with one of its parts undone at a time.

python scripts/benchmark.py                     training steps and evaluation of face_vit_p8s8_d6, fast and plain
python scripts/benchmark.py ablation --batch-size 8

The plain path: float32, eager, timm's last block, torch's dropout and default AdamW, JPEGs decoded in DataLoader workers.
Its attention is the fast path's: fused on CUDA, written out on a CPU. All take turns in one process; medians are shown.
"""

import argparse
import io
import math
import os
import sys
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

# A script's own folder, not the repository's root, is where Python looks first.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import train_forget
from backbone.recognizer import Architecture, Recognizer, build_recognizer, default_image_size, to_device
from data.batches import Batch, batches
from data.synthetic_faces import synthetic_faces
from data.tasks import forgetting_tasks, whole_set
from methods import METHODS
from methods.pretrain import Pretrain
from util.cli import options
from util.cli.main import run_main
from util.evaluation.evaluate import predict
from util.runtime.files import write_json
from util.runtime.hardware import Hardware
from util.training.engine import Trainer
from util.training.optim import Schedule

# What can be undone: fields of Hardware, all off on the plain path.
FIELDS = ("bf16", "compile", "cuda_graphs", "cls_only_last_block", "fast_dropout", "fused_optimizer")
IDENTITIES = 8  # half of them are forgotten
Work = namedtuple("Work", ("run", "images"))


class Bench:
    """A model, drawn faces, `count` of each identity, and the work that is done with them."""

    def __init__(self, hardware: Hardware, model: str, batch_size: int, count: int) -> None:
        self.model, self.batch_size, self.hardware = model, batch_size, hardware
        self.plain_hardware = replace(hardware, **dict.fromkeys(FIELDS, False))
        self.faces, _ = synthetic_faces(IDENTITIES, count, 1, default_image_size(model), 0, hardware.device)
        (self.task,) = forgetting_tasks(self.faces.labels, IDENTITIES, [range(IDENTITIES // 2)], seed=0, data_ratio=1)
        self.whole = whole_set(self.faces.labels, IDENTITIES)

    def begin(self, name: str, hardware: Hardware) -> Trainer:
        """At the start of the task, with a rate so small that the weights last."""
        words = f"--batch-size {self.batch_size} --epochs 100 --lr 1e-6 --min-lr 0 --checkpoint none"
        args = train_forget.parse_arguments([*words.split(), "--method", name if name in METHODS else "retrain"])
        args.mirror = "on"  # an option of pre-training
        method = METHODS.get(name, Pretrain)(args, hardware)
        model, task = untrained(self.model, hardware), self.task if name in METHODS else self.whole
        method.begin_task(model, task, self.faces, args.epochs)
        return Trainer(model.to(hardware.device).train(), method, task, self.faces, Schedule.of(args))

    def step(self, name: str, plain: bool = False, **fields: bool) -> Work:
        """A training step, with other `fields` of Hardware or on the plain path."""
        trainer = self.begin(name, self.plain_hardware if plain else replace(self.hardware, **fields))
        (plan,) = trainer.method.passes(trainer.task, 0, 1)
        if plain:
            order = self.decoded(endless(lambda: plan.schedule(torch.default_generator)))
            stream = (Batch(*parts, plan.sizes, plan.name) for parts in order)
        else:
            stream = endless(lambda: batches(self.faces, plan, torch.default_generator, self.hardware.device))
        return Work(lambda: trainer.step(next(stream)), sum(plan.sizes.values()))

    def evaluation(self, plain: bool = False) -> Work:
        hardware = self.plain_hardware if plain else self.hardware
        model = untrained(self.model, hardware).eval()
        if not plain:
            return Work(lambda: predict(model, self.faces, hardware), len(self.faces))
        rows = torch.arange(len(self.faces)).view(IDENTITIES, -1)
        stream = self.decoded(endless(lambda: rows))
        count = torch.no_grad()(lambda images, labels, _: (model(images).argmax(dim=1) == labels).sum().item())
        return Work(lambda: count(*next(stream)), rows.shape[1])

    def decoded(self, order: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """Images, labels and positions of batches. Without end: workers start once, not at every epoch."""
        files = list(zip(map(jpeg, self.faces.images), self.faces.labels.cpu(), torch.arange(len(self.faces)), strict=True))
        workers, pinned = min(8, os.cpu_count() or 1), self.hardware.device.type == "cuda"
        for batch in DataLoader(files, batch_sampler=order, num_workers=workers, collate_fn=decode, pin_memory=pinned):
            yield [part.to(self.hardware.device) for part in batch]


def endless(epoch: Callable[[], Iterable]) -> Iterator:
    while True:
        yield from epoch()


def jpeg(image: torch.Tensor) -> bytes:
    to_pil_image(image).save(file := io.BytesIO(), "jpeg", quality=95)
    return file.getvalue()


def decode(files: list[tuple]) -> list[torch.Tensor]:
    jpegs, *rest = zip(*files, strict=True)
    images = [pil_to_tensor(Image.open(io.BytesIO(jpeg))) for jpeg in jpegs]
    return [torch.stack(part) for part in (images, *rest)]


def untrained(model: str, hardware: Hardware) -> Recognizer:
    return to_device(build_recognizer(Architecture(model, IDENTITIES, default_image_size(model))), hardware)


def measure(args: argparse.Namespace, *works: Work) -> list[float]:
    """Median seconds of one run of each, taken in turn."""
    from torch.utils.benchmark import Measurement, Timer  # warns of a missing GPU where `can_compile` has not silenced it

    for work in works * (5 if args.device == "cuda" else 1):  # CUDA graphs are replayed from the third run on
        work.run()
    found = [[] for _ in works]
    for _ in range(3):
        for work, measured in zip(works, found, strict=True):
            timer = Timer("run()", globals={"run": work.run}, num_threads=torch.get_num_threads())
            measured.append(timer.blocked_autorange(min_run_time=args.min_run_time))
    return [Measurement.merge(measured)[0].median for measured in found]


def steps(args: argparse.Namespace, hardware: Hardware) -> list[dict]:
    bench = Bench(hardware, args.model, args.batch_size, max(args.batch_size, hardware.eval_batch // IDENTITIES))
    rows = []
    for name in ("gs_lora", "der_pp", "ewc", "pretrain", "evaluation"):
        work = bench.evaluation if name == "evaluation" else partial(bench.step, name)
        works = work(), work(plain=True)
        fast, plain = (work.images / seconds for work, seconds in zip(works, measure(args, *works), strict=True))
        rows.append({"work": name, "fast : plain": fast / plain, "images/s fast": fast, "images/s plain": plain})
    return rows


def ablation(args: argparse.Namespace, hardware: Hardware) -> list[dict]:
    bench = Bench(hardware, args.model, args.batch_size, args.batch_size)
    fields = {field: False for field in FIELDS if getattr(hardware, field)}
    fields["fused_attention"] = not hardware.fused_attention
    works = {"gs_lora": bench.step("gs_lora")}
    works |= {f"{field} {'on' if on else 'off'}": bench.step("gs_lora", **{field: on}) for field, on in fields.items()}
    seconds = measure(args, *works.values())
    return [{"work": n, "ms": 1000 * s, "times as long": s / seconds[0]} for n, s in zip(works, seconds, strict=True)]


MODES = {"steps": steps, "ablation": ablation}


def main(argv: list[str] | None) -> None:
    parser = options.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", nargs="?", choices=MODES, default="steps", help="what to measure")
    parser.add_argument("--model", default="face_vit_p8s8_d6", metavar="NAME", help="a timm model, or one of the papers'")
    parser.add_argument("--batch-size", type=options.number(int, 1), default=48, help="images of each stream in a step")
    parser.add_argument("--min-run-time", type=float, default=1.0, help="seconds that are timed in each of three turns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options.add_hardware(parser)
    options.add_fast_path(parser)
    args = parser.parse_args(argv)
    hardware = options.hardware_of(args).resolve_compile(math.inf)
    args.device = hardware.device.type
    print(f"{args.model}, batch size {args.batch_size}, torch {torch.__version__}, {hardware.describe()}", flush=True)
    rows = MODES[args.mode](args, hardware)
    print(f"\n{pd.DataFrame(rows).to_markdown(index=False, floatfmt=',.2f')}")
    if args.json is not None:
        about = {"model": args.model, "batch size": args.batch_size, "torch": torch.__version__}
        write_json(args.json, {**about, "device": hardware.describe(), args.mode: rows})


if __name__ == "__main__":
    run_main(main)
