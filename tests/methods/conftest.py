"""A method at the start of a task, its first batch, and the arithmetic of the losses in numpy."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from backbone import lora
from backbone.recognizer import Recognizer, to_device
from data.batches import Batch, batches
from data.image_set import ImageSet
from data.tasks import ForgettingTask
from methods import METHODS
from methods.base import Method
from tests.conftest import drawn_tasks
from train_forget import parse_arguments


def arguments(name: str, *options: str):
    """The options of a command line, with small sizes."""
    small = ("--batch-size", "8", "--epochs", "4", "--device", "cpu")
    return parse_arguments(["--method", name, "--checkpoint", "x", *small, *options])


def tasks_over(images: ImageSet, number: int) -> list[ForgettingTask]:
    per_task = max(1, len(images.classes) // (number + 1))
    options = {"num_tasks": number, "per_task": per_task, "seed": 1337, "data_ratio": 0.5}
    return drawn_tasks(images.labels, len(images.classes), **options)


def move(model: Recognizer, seed: int = 3, std: float = 0.05) -> None:
    """Move everything in training; adapters further, since a product of two small matrices is tiny."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += (4 * std if "lora_" in name else std) * noise.to(parameter.dtype)


@dataclass
class Begun:
    """A method within a task; `pretrained` and `before` are copies of the models that entered the run and the task."""

    method: Method
    model: Recognizer
    pretrained: Recognizer
    before: Recognizer
    images: ImageSet
    tasks: list[ForgettingTask]

    @property
    def task(self) -> ForgettingTask:
        return self.method.task

    def batch(self, pass_number: int = 0, epoch: int = 0) -> Batch:
        return first_batch(self.method, self.images, pass_number, epoch)


def first_batch(method: Method, images: ImageSet, pass_number: int = 0, epoch: int = 0) -> Batch:
    plan = method.passes(method.task, epoch, method.epochs)[pass_number]
    return next(iter(batches(images, plan, torch.Generator().manual_seed(0), torch.device("cpu"))))


@pytest.fixture
def method_arguments() -> Callable:
    return arguments


@pytest.fixture
def make_tasks() -> Callable:
    return tasks_over


@pytest.fixture
def move_weights() -> Callable:
    return move


@pytest.fixture
def begin(make_recognizer, make_images, cpu) -> Callable[..., Begun]:
    """begin(name, *options) → a method in a task, its weights moved away from those that entered the task."""

    def begin(
        name: str,
        *options: str,
        number: int = 1,
        tasks: int = 2,
        moved: bool = True,
        entered_moved: bool = False,
        classes: int = 6,
        **model_options,
    ) -> Begun:
        images = make_images(num_classes=classes)
        model = to_device(make_recognizer(num_classes=classes, dtype=torch.float64, **model_options).eval(), cpu)
        pretrained = copy.deepcopy(model)
        method = METHODS[name](arguments(name, *options), cpu)
        all_tasks = tasks_over(images, tasks)
        method.begin_run(model, all_tasks, images)
        if entered_moved:
            move(model, seed=5)
        before = copy.deepcopy(model)
        torch.manual_seed(11)
        method.begin_task(model, all_tasks[number - 1], images, method.args.epochs)
        if moved:
            move(model)
        return Begun(method, model, pretrained, before, images, all_tasks)

    return begin


@pytest.fixture
def shift_labels(monkeypatch) -> Callable:
    """Make wrong labels known: the next class."""

    def shift() -> None:
        def next_class(labels: Tensor, num_classes: int) -> Tensor:
            assert num_classes == 6
            return (labels + 1) % num_classes

        monkeypatch.setattr("methods.relabel.wrong_labels", next_class)

    return shift


class Arithmetic:
    """The losses' parts in float64 numpy. Logits are label-free: 64 times the cosines."""

    @staticmethod
    def array(tensor: Tensor) -> np.ndarray:
        return tensor.detach().double().numpy().copy()

    def embeddings(self, model: Recognizer, images: Tensor) -> np.ndarray:
        return self.array(model.embed(images))

    def logits_of(self, model: Recognizer, embeddings: np.ndarray) -> np.ndarray:
        w = self.array(model.head.weight)
        e = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        return 64 * e @ (w / np.linalg.norm(w, axis=1, keepdims=True)).T

    def logits(self, model: Recognizer, images: Tensor) -> np.ndarray:
        return self.logits_of(model, self.embeddings(model, images))

    @staticmethod
    def with_margin(logits: np.ndarray, labels) -> np.ndarray:
        training = logits.copy()
        training[np.arange(len(labels)), np.asarray(labels)] -= 64 * 0.35
        return training

    @staticmethod
    def softmax(logits: np.ndarray) -> np.ndarray:
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    def cross_entropy(self, logits: np.ndarray, labels) -> float:
        """The mean over the rows, with CosFace's margin taken off here."""
        p = self.softmax(self.with_margin(logits, labels))
        return float(-np.log(p[np.arange(len(labels)), np.asarray(labels)]).mean())

    def kl(self, teacher: np.ndarray, student: np.ndarray, temperature: float = 1.0) -> float:
        p, q = self.softmax(teacher / temperature), self.softmax(student / temperature)
        return float(temperature**2 * (p * np.log(p / q)).sum(axis=1).mean())


@pytest.fixture
def arithmetic() -> Arithmetic:
    return Arithmetic()


@pytest.fixture
def random_adapters() -> Callable:
    """Give every adapter of a model new weights."""

    def fill(model: Recognizer, seed: int) -> None:
        torch.manual_seed(seed)
        for layer in lora.adapted_layers(model.backbone).values():
            torch.nn.init.normal_(layer.lora_A, std=0.3)
            torch.nn.init.normal_(layer.lora_B, std=0.3)

    return fill
