"""Measure the fast path: beside a plain one, and with one of its parts undone at a time.

python scripts/benchmark.py                     training steps and evaluation of face_vit_p8s8_d6, fast and plain
python scripts/benchmark.py ablation --batch-size 8

The plain path: float32, eager, timm's last block, torch's dropout and default AdamW, JPEGs decoded in DataLoader workers,
a forward pass for each stream, the teacher run and the loss read back in every step. Its attention is the fast path's: fused
(timm's default) on CUDA, written out on a CPU, where that is faster. Both take turns in one process; medians are shown.
"""

import argparse
import copy
import io
import math
import os
import sys
from collections import namedtuple
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
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

# What can be undone: fields of Hardware, all off on the plain path, and parts of a step.
FIELDS = ("bf16", "compile", "cuda_graphs", "cls_only_last_block", "fast_dropout", "fused_optimizer")
FORWARD, LOSS, TEACHER = "one forward pass", "loss left on the device", "teacher once a task"
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

    def fast(self, name: str, *undone: str, **fields: bool) -> Work:
        """A training step without the parts `undone`, and with other `fields` of Hardware."""
        trainer = self.begin(name, replace(self.hardware, **fields))
        step, (plan,) = make_step(trainer, undone), trainer.method.passes(trainer.task, 0, 1)
        stream = endless(lambda: batches(self.faces, plan, torch.default_generator, self.hardware.device))
        return Work(lambda: step(next(stream)), sum(plan.sizes.values()))

    def plain(self, name: str) -> Work:
        trainer = self.begin(name, self.plain_hardware)
        undone = [FORWARD, LOSS, TEACHER] if name == "der_pp" else [FORWARD, LOSS]
        step, (plan,) = make_step(trainer, undone), trainer.method.passes(trainer.task, 0, 1)
        stream = self.decoded(endless(lambda: plan.schedule(torch.default_generator)))
        return Work(lambda: step(Batch(*next(stream), plan.sizes, plan.name)), sum(plan.sizes.values()))

    def evaluations(self) -> tuple[Work, Work]:
        model, plain_model = (untrained(self.model, hardware).eval() for hardware in (self.hardware, self.plain_hardware))
        rows = torch.arange(len(self.faces)).view(IDENTITIES, -1)
        stream = self.decoded(endless(lambda: rows))
        count = torch.no_grad()(lambda images, labels, _: (plain_model(images).argmax(dim=1) == labels).sum().item())
        fast = Work(lambda: predict(model, self.faces, self.hardware), len(self.faces))
        return fast, Work(lambda: count(*next(stream)), rows.shape[1])

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


def make_step(trainer: Trainer, undone: Collection[str]) -> Callable[[Batch], object]:
    embed, teacher = trainer.model.embed, None
    if TEACHER in undone:  # its outputs are computed beside those that are looked up
        teacher = copy.deepcopy(trainer.model).eval()
        trainer.hardware.compile_backbone(teacher)

    def step(batch: Batch) -> object:
        if FORWARD in undone:
            trainer.model.embed = lambda images: torch.cat([embed(part) for part in batch.split(images).values()])
        if teacher is not None:
            with torch.no_grad(), trainer.hardware.autocast():
                teacher(batch.split(batch.images)["remain"])
        loss = trainer.step(batch)["total"]
        return loss.item() if LOSS in undone else loss

    return step


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
        works = bench.evaluations() if name == "evaluation" else (bench.fast(name), bench.plain(name))
        fast, plain = (work.images / seconds for work, seconds in zip(works, measure(args, *works), strict=True))
        rows.append({"work": name, "fast : plain": fast / plain, "images/s fast": fast, "images/s plain": plain})
    return show(rows)


def ablation(args: argparse.Namespace, hardware: Hardware) -> list[dict]:
    bench = Bench(hardware, args.model, args.batch_size, args.batch_size)
    fields = {field: False for field in FIELDS if getattr(hardware, field)}
    fields["fused_attention"] = not hardware.fused_attention
    works = {"gs_lora": bench.fast("gs_lora")}
    works |= {f"{field} {'on' if on else 'off'}": bench.fast("gs_lora", **{field: on}) for field, on in fields.items()}
    works |= {f"without {part}": bench.fast("gs_lora", part) for part in (FORWARD, LOSS)}
    works |= {"der_pp": bench.fast("der_pp"), f"without {TEACHER}": bench.fast("der_pp", TEACHER)}
    table = pd.DataFrame({"work": [*works], "ms": [1000 * seconds for seconds in measure(args, *works.values())]})
    table["times as long"] = table["ms"] / table["ms"].where(table["work"].isin(METHODS)).ffill()
    return show(table.to_dict("records"))


def show(rows: list[dict]) -> list[dict]:
    print(f"\n{pd.DataFrame(rows).to_markdown(index=False, floatfmt=',.2f')}\n", flush=True)
    return rows


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
    results = {"model": args.model, "batch size": args.batch_size, "torch": torch.__version__}
    print(*(f"{key} {value}" for key, value in results.items()), hardware.describe(), sep="\n", flush=True)
    results |= {"device": hardware.describe(), args.mode: MODES[args.mode](args, hardware)}
    if args.json is not None:
        write_json(args.json, results)


if __name__ == "__main__":
    run_main(main)
