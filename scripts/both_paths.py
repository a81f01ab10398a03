"""What `scripts/benchmark.py` measures: each piece of work on the fast path and on the plain one, with the same inputs."""

import argparse
import contextlib
import copy
import io
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

import train_forget
import train_pretrain
from backbone.recognizer import Architecture, Recognizer, build_recognizer, to_device
from data import load_data
from data.batches import Batch, batches, random_flip
from data.image_set import ImageSet
from data.synthetic_faces import synthetic_faces
from data.tasks import drawn_requests, forgetting_tasks
from methods import METHODS
from methods.base import Method
from methods.pretrain import Pretrain
from scripts import plain_path
from util.evaluation.evaluate import predict
from util.runtime.hardware import Hardware, choose_hardware
from util.storage.checkpoint import Checkpoint, save_checkpoint
from util.training.engine import Optimization, Trainer

IDENTITIES = 8  # half of them to forget
EPOCHS = 20  # of a task, each of one step


@dataclass
class Work:
    """One measured piece of work: `run` does it once, on `images` images with `flops` of matrix products (0: unknown)."""

    run: Callable[[], object]
    images: int
    flops: float = 0.0
    keep_memory: bool = False


class Bench:
    """The inputs: drawn faces as JPEG files in `folder`, an untrained model, one forgetting task of half the faces.

    There are training images for one batch of `args.batch_size` of each stream, or as many as `images` says.
    """

    def __init__(
        self, args: argparse.Namespace, hardware: Hardware, image_size: int, folder: Path, images: int | None = None
    ) -> None:
        self.args, self.hardware, self.folder = args, hardware, folder
        per_identity = -(-(images or 2 * args.batch_size) // IDENTITIES)
        drawn = synthetic_faces(IDENTITIES, per_identity, -(-args.eval_images // IDENTITIES), image_size, 0)
        self.files = {}
        for split, images in zip(("train", "test"), drawn, strict=True):
            self.files[split] = write_jpegs(folder / "faces" / split, images)
        sets = load_data(str(folder / "faces"), image_size, 0, 0, 0, 0, folder / "cache")
        self.train_set, self.test_set = (images.to(hardware.device) for images in sets)
        (self.task,) = forgetting_tasks(
            self.train_set.labels, IDENTITIES, drawn_requests(IDENTITIES, 1, IDENTITIES // 2, 0), seed=0, data_ratio=1.0
        )
        torch.manual_seed(0)
        self.model = build_recognizer(Architecture(args.model, IDENTITIES, image_size))
        self.keep_memory = hardware.device.type == "cpu" and args.keep_memory != "off"

    def plain_hardware(self) -> Hardware:
        device = str(self.hardware.device)
        off = {"cls_only_last_block": "off", "dropout": "torch", "fused_optimizer": "off", "compile": "off"}
        return choose_hardware(device, "fp32", "plain", **off).resolve_compile(0)

    def arguments(self, name: str) -> argparse.Namespace:
        """The script's own defaults for this method; the rate is small, for the model has to last."""
        shared = ["--batch-size", str(self.args.batch_size), "--lr", "1e-6", "--min-lr", "0", "--epochs", "100"]
        if name == "pretrain":
            args = train_pretrain.parse_arguments(shared)
            train_pretrain.choose_epochs(args, len(self.train_set))
            return args
        return train_forget.parse_arguments(["--method", name, "--checkpoint", "none", *shared])

    def begin(self, name: str, hardware: Hardware) -> tuple[Method, Recognizer]:
        """A method that has begun the task, and its model on the device."""
        model = to_device(copy.deepcopy(self.model), hardware)
        method = (Pretrain if name == "pretrain" else METHODS[name])(self.arguments(name), hardware)
        torch.manual_seed(0)
        method.begin_run(model, [self.task], self.train_set)
        method.begin_task(model, self.task, self.train_set)
        model.to(hardware.device)
        return method, model

    def fast_training(
        self, name: str, hardware: Hardware, step: Callable[[Trainer, Batch], object] = Trainer.step
    ) -> tuple[Work, Trainer]:
        """`step` lets the benchmark undo what a method or the trainer does well."""
        method, model = self.begin(name, hardware)
        trainer = Trainer(model, method, self.train_set, Optimization.of(method.args), seed=0)
        model.train()
        stream = self.batches(method)
        with FlopCounterMode(display=False) as counter, hardware.eager():
            trainer.step(next(stream))
        images = len(next(stream))
        return Work(lambda: step(trainer, next(stream)), images, counter.get_total_flops(), self.keep_memory), trainer

    def batches(self, method: Method) -> Iterator[Batch]:
        (plan,) = method.passes(0)
        generator = torch.Generator().manual_seed(0)
        while True:
            yield from batches(self.train_set, plan, generator, self.hardware.device)

    def plain_training(self, name: str) -> tuple[Work, plain_path.PlainTraining]:
        method, model = self.begin(name, self.plain_hardware())
        model.train()
        teacher = copy.deepcopy(self.model).to(self.hardware.device).eval() if name == "der_pp" else None
        training = plain_path.PlainTraining(
            name,
            method.args,
            model,
            self.loaders(method),
            teacher,
            getattr(method, "importance", None),
            getattr(method, "forgotten", None),
        )
        (plan,) = method.passes(0)
        return Work(training.step, sum(plan.sizes.values())), training

    def loaders(self, method: Method) -> dict[str, DataLoader]:
        """For each stream of the method, its files decoded in worker processes."""
        paths, labels = self.files["train"]
        (plan,) = method.passes(0)
        loaders = {}
        for stream, indices in plan.streams.items():
            files = [paths[i] for i in indices], [labels[i] for i in indices]
            dataset = plain_path.JpegFiles(*files, mirror=isinstance(method, Pretrain))
            loaders[stream] = plain_path.load(dataset, plan.sizes[stream], self.args.workers)
        return loaders

    def decoding(self) -> Callable[[Trainer, Batch], object]:
        """A GS-LoRA step on images that are decoded from their files for it."""
        method, _ = self.begin("gs_lora", self.hardware)
        streams = [plain_path.endless(loader) for loader in self.loaders(method).values()]

        def step(trainer: Trainer, batch: Batch) -> object:
            images = torch.cat([next(stream)[0] for stream in streams]).to(self.hardware.device)
            return trainer.step(replace(batch, images=(255 * images).to(torch.uint8)))

        return step

    def losses(self, trainer: Trainer, plain: plain_path.PlainTraining) -> tuple[float, float]:
        """Both paths' loss of the same batch, with the same random labels, without dropout."""
        trainer.model.eval()
        plain.model.load_state_dict(trainer.model.state_dict())
        plain.model.eval()
        batch = next(self.batches(trainer.method))
        images, labels = batch.split(batch.images.float() / 255), batch.split(batch.labels)
        with torch.no_grad():
            torch.manual_seed(1)
            with trainer.hardware.autocast():
                fast = trainer.method.loss(trainer.model, batch)["total"].item()
            torch.manual_seed(1)
            if isinstance(trainer.method, Pretrain):  # the same images mirrored, for the same seed
                images["train"] = random_flip(batch.images).float() / 255
            straightforward = plain.loss({name: (images[name], labels[name]) for name in images}).item()
        trainer.model.train()
        plain.model.train()
        return fast, straightforward

    def evaluation(self) -> tuple[Work, Work]:
        hardware, count = self.hardware, len(self.test_set)
        fast = to_device(copy.deepcopy(self.model), hardware)
        plain = to_device(copy.deepcopy(self.model), self.plain_hardware())
        files = plain_path.JpegFiles(*self.files["test"])
        with FlopCounterMode(display=False) as counter:
            predict(fast, self.test_set, hardware)
        flops = counter.get_total_flops()
        loader = plain_path.load(files, 48, self.args.workers, train=False)
        return (
            Work(lambda: predict(fast, self.test_set, hardware), count, flops, self.keep_memory),
            Work(lambda: plain_path.evaluate(plain, loader), count),
        )

    def task_arguments(self, compiled: bool) -> list[str]:
        """train_forget.py's, for GS-LoRA on these faces; saves the checkpoint that they name."""
        checkpoint = self.folder / "checkpoint.pth"
        save_checkpoint(checkpoint, Checkpoint(self.model, self.train_set.classes))
        words = ["--checkpoint", checkpoint, "--data", self.task_folder(), "--cache-dir", self.folder / "cache"]
        words += ["--num-tasks", 1, "--forget-per-task", IDENTITIES // 2, "--data-ratio", 1, "--overwrite"]
        words += ["--batch-size", self.args.batch_size, "--epochs", EPOCHS, "--output-dir", self.folder / "run"]
        words += ["--device", self.hardware.device, "--compile", "on" if compiled else "off"]
        return [str(word) for word in [*words, "--precision", "bf16" if self.hardware.bf16 else "fp32"]]

    def task_folder(self) -> Path:
        """The faces with one test image a class: by this, evaluations weigh as in the paper's setting, where 9,000 test
        images before and after a task stand against 7,600 steps of 96."""
        folder = self.folder / "task"
        if not folder.exists():
            shutil.copytree(self.folder / "faces" / "train", folder / "train")
            paths, labels = self.files["test"]
            for label in {*labels}:
                target = folder / "test" / self.test_set.classes[label] / "0.jpg"
                target.parent.mkdir(parents=True)
                shutil.copy(paths[labels.index(label)], target)
        return folder

    def seconds_to_first_step(self, compiled: bool) -> tuple[float, float]:
        """From the start of a process of train_forget.py to the beginning and to the end of its first step, data in the
        cache. Before it the pre-trained model is evaluated; compiling is part of the step."""
        script = (
            "import sys, time; import train_forget; from util.training.engine import Trainer; step = Trainer.step\n"
            "def first(trainer, batch):\n"
            "    print('\\n', time.time()); step(trainer, batch); trainer.hardware.synchronize()\n"
            "    print(time.time()); sys.exit()\n"
            "Trainer.step = first; train_forget.main(sys.argv[1:])"
        )
        root = Path(train_forget.__file__).parent
        start = time.time()
        words = [sys.executable, "-c", script, *self.task_arguments(compiled)]
        done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True)
        begun, ended = map(float, done.stdout.split()[-2:])
        return begun - start, ended - start

    def fast_task(self) -> tuple[float, float]:
        """train_forget.py on GS-LoRA, from files to files: seconds in all, and those in the training steps."""
        argv = self.task_arguments(self.hardware.compile)
        in_steps, step = 0.0, Trainer.step

        def timed(trainer: Trainer, batch: Batch) -> object:
            nonlocal in_steps
            start = time.perf_counter()
            losses = step(trainer, batch)
            self.hardware.synchronize()
            in_steps += time.perf_counter() - start
            return losses

        start = time.perf_counter()
        Trainer.step = timed
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                train_forget.main(argv)
        finally:
            Trainer.step = step
        return time.perf_counter() - start, in_steps

    def plain_task(self) -> float:
        """The same task on the plain path. It recognises as many test images as it trains on: the published code sweeps
        9,000 of them in every 100 steps of 96. Seconds in all."""
        start = time.perf_counter()
        work, training = self.plain_training("gs_lora")
        steps = EPOCHS * max(len(stream) for stream in training.loaders.values())
        test = plain_path.load(plain_path.JpegFiles(*self.files["test"]), 48, self.args.workers, train=False)
        waiting = 0
        with SummaryWriter(self.folder / "plain") as writer:
            for step in range(steps):
                writer.add_scalar("loss", work.run(), step)
                waiting += work.images
                if waiting >= len(self.test_set) or step == steps - 1:
                    waiting = 0
                    writer.add_scalar("accuracy", plain_path.evaluate(training.model, test), step)
        torch.save(training.model.state_dict(), self.folder / "plain.pth")
        return time.perf_counter() - start


def two_forward_passes(trainer: Trainer, batch: Batch) -> object:
    """A GS-LoRA step that runs the model on each stream apart."""
    joint = trainer.model.embed
    trainer.model.embed = lambda images: torch.cat([joint(part) for part in batch.split(images).values()])
    try:
        return trainer.step(batch)
    finally:
        del trainer.model.embed


def read_back(trainer: Trainer, batch: Batch) -> object:
    """A step that waits for the loss."""
    return trainer.step(batch)["total"].item()


def teacher_every_step(trainer: Trainer, batch: Batch) -> object:
    """A step that also runs the model without gradients on the stream whose teacher's outputs are looked up."""
    with torch.no_grad(), trainer.hardware.autocast():
        trainer.model.head(trainer.model.embed(batch.split(batch.images)["remain"]))
    return trainer.step(batch)


def write_jpegs(folder: Path, images: ImageSet) -> tuple[list[str], list[int]]:
    paths = []
    for number, (image, label) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
        path = folder / images.classes[label] / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, quality=95)
        paths.append(str(path))
    return paths, images.labels.tolist()
