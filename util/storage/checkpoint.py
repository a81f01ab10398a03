"""Checkpoints: what a trained recogniser is on disk. Loading never runs code from the file."""

import contextlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn

from backbone.lora import apply_adapters
from backbone.published import from_published, is_published, to_published
from backbone.recognizer import Recognizer, build_recognizer
from data.image_set import ImageSet
from util.runtime.errors import RunError, UsageError
from util.runtime.files import atomic_write
from util.storage.untrusted import (
    check_archive,
    check_finite,
    check_tensors,
    checked_architecture,
    checked_classes,
    checked_forgotten,
)

FORMAT = "continual-forgetting-1"


@dataclass
class Checkpoint:
    """A recogniser with what is known of it: the class names it was trained on, and the classes forgotten so far.

    `classes` is empty for published checkpoints, which do not name theirs. `forgotten` holds one list of class ids a
    task, in order. `info` is free: the data set, the accuracies after training.
    """

    model: Recognizer
    classes: tuple[str, ...] = ()
    forgotten: list[list[int]] = field(default_factory=list)
    info: dict = field(default_factory=dict)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint whole or not at all."""
    torch_save(
        path,
        {
            "format": FORMAT,
            "architecture": checkpoint.model.architecture.as_dict(),
            "classes": list(checkpoint.classes),
            "forgotten": checkpoint.forgotten,
            "info": checkpoint.info,
            "model": {key: tensor.detach().cpu() for key, tensor in checkpoint.model.state_dict().items()},
        },
    )


def save_published(path: Path, model: Recognizer) -> None:
    """Write the bare state dict of the published layout. Raises UsageError if that cannot hold the model."""
    torch_save(path, to_published(model))


def load_checkpoint(path: Path, head: str | None = None) -> Checkpoint:
    """Load one of our checkpoints or a published one, on the CPU.

    A published file does not say which margin head it was trained with; `head` does (default: cosface, or softmax
    where the head has a bias).
    Raises UsageError if the file is missing or is no recogniser, RunError if it is damaged.
    """
    data = torch_load(path)
    if isinstance(data, dict) and data.get("format") == FORMAT:
        return _load_own(path, data, head)
    if isinstance(data, dict) and is_published(data):
        return _load_published(path, data, head)
    raise UsageError(
        f"{path} is no checkpoint of a face recogniser: it has neither this project's format nor the published layout"
    )


def _load_own(path: Path, data: dict, head: str | None) -> Checkpoint:
    try:
        architecture = checked_architecture(data["architecture"])
        classes = checked_classes(data["classes"], architecture.num_classes)
        forgotten = checked_forgotten(data["forgotten"], architecture.num_classes)
        info, state = dict(data["info"]), dict(data["model"])
        if architecture.model_options.get("depth", 1) > len(state):
            raise ValueError("fewer tensors than blocks")
        with torch.device("meta"):  # takes no memory: the shapes are compared first
            check_fits(build_recognizer(architecture), state, path)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise RunError(f"{path}: damaged checkpoint: {type(error).__name__} {error}") from None
    if head is not None and head != architecture.head:
        raise UsageError(f"{path} was trained with --head {architecture.head}, not {head}; leave --head out")
    checkpoint = Checkpoint(build_recognizer(architecture), classes, forgotten, info)
    load_weights(checkpoint.model, state, path)
    return checkpoint


def _load_published(path: Path, data: dict, head: str | None) -> Checkpoint:
    try:
        architecture, state, adapters = from_published(data, head)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    model = build_recognizer(architecture)
    load_weights(model, state, path)
    apply_adapters(model.backbone, adapters, path)
    return Checkpoint(model)


def load_weights(model: torch.nn.Module, state: dict, path: Path) -> None:
    """Load a state dict that must fit exactly. Nothing is loaded where it does not.

    Raises UsageError as `check_fits` does, RunError for values that are not finite.
    """
    check_fits(model, state, path)
    check_finite(path, state)
    model.load_state_dict(state)


def check_fits(model: torch.nn.Module, state: dict, path: Path) -> None:
    """Raise UsageError naming the tensors of `state` that `model` has not, lacks, or has in another shape or kind."""
    ours = model.state_dict()
    expected = {key: tuple(tensor.shape) for key, tensor in ours.items()}
    found = {
        key: tuple(value.shape)
        if torch.is_tensor(value) and key in ours and value.is_floating_point() == ours[key].is_floating_point()
        else None
        for key, value in state.items()
    }
    problems = [f"{key} is missing" for key in expected if key not in found]
    problems += [f"{key} is unexpected" for key in found if key not in expected]
    problems += [
        f"{key} has shape {found[key]}, not {expected[key]}"
        for key in expected
        if key in found and found[key] != expected[key]
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UsageError(f"{path} does not fit the model: {'; '.join(problems[:3])}{more}")


def load_backbone(model: Recognizer, path: Path) -> None:
    """Start from backbone weights in a local file: timm's (.safetensors, .bin, .pth) or a checkpoint of ours.

    A classifier is left out; position embeddings of another image size are resampled as timm does.
    Raises UsageError if the file is missing or does not fit, RunError if it is damaged.
    """
    with _readable(path):
        if Path(path).suffix != ".safetensors":
            check_archive(path)
        state = timm.models.load_state_dict(str(path), weights_only=True)
        check_tensors(path, state)
    ours = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    plain = {key: value for key, value in (ours or state).items() if not key.startswith(("head.", "head_dist."))}
    try:
        fitted = checkpoint_filter_fn(plain, model.backbone)
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:
        raise UsageError(f"{path} does not fit the model: {str(error).splitlines()[0]}") from None
    load_weights(model.backbone, fitted, path)


def torch_save(path: Path, data: dict) -> None:
    """`torch.save`, whole or not at all. OSError (a full disk) is passed on."""
    with atomic_write(path) as file:
        target = _Target(file)
        try:
            torch.save(data, target)
        except RuntimeError:
            raise target.error or RunError(f"{path}: cannot be written") from None


class _Target:
    """A file that remembers why it could not be written to: torch's writer tells that something failed, not what."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.flush = file, file.flush
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


def torch_load(path: Path):
    """`torch.load` of tensors and plain values only, on the CPU.

    Raises UsageError if there is no such file, RunError if it is damaged or holds anything that could run code.
    """
    with _readable(path):
        check_archive(path)
        data = torch.load(path, map_location="cpu", weights_only=True)
        check_tensors(path, data)
        return data


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what reading a damaged or dangerous file raises into one line."""
    if not Path(path).is_file():
        raise UsageError(f"no checkpoint file {path}")
    try:
        yield
    except (UsageError, RunError):
        raise
    except pickle.UnpicklingError:
        raise RunError(f"{path}: refused: it holds more than tensors and plain values, or is no checkpoint") from None
    except Exception as error:  # damage makes the readers raise almost anything
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(f"{path}: damaged or truncated checkpoint: {line}") from None


def check_classes(checkpoint: Checkpoint, image_set: ImageSet, path: Path) -> None:
    """Raise UsageError unless the checkpoint was trained on exactly the classes of `image_set`."""
    known = checkpoint.model.architecture.num_classes
    if known != len(image_set.classes):
        raise UsageError(
            f"{path} knows {known} classes, the data set {image_set.name} has {len(image_set.classes)}: "
            f"use the data it was trained on"
        )
    if checkpoint.classes and checkpoint.classes != image_set.classes:
        ours, theirs = next(p for p in zip(checkpoint.classes, image_set.classes, strict=True) if p[0] != p[1])
        raise UsageError(f"{path} was trained on other classes than {image_set.name}: {ours!r} there, {theirs!r} here")
