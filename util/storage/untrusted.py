"""Files from strangers: what is checked of a checkpoint before anything is built or allocated for it.

Loading itself runs no code (`torch.load(weights_only=True)`). What is left to an attacker is size: archives that inflate,
tensors that claim more than the file holds, architectures of any depth; and names that would make timm fetch something.
"""

import math
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from backbone.recognizer import Architecture
from util.runtime.errors import RunError

# What train_pretrain.py and the published layout set. Others of timm's arguments could name files or addresses to load.
MODEL_OPTIONS = {"depth", "embed_dim", "mlp_ratio", "num_heads", "pos_drop_rate", "proj_drop_rate"}
HEAD_OPTIONS = {"scale", "margin", "k", "a", "b"}
LARGEST = 1 << 16  # of a width, a depth, an image's side
MOST_NESTED = 100


def check_archive(path: Path) -> None:
    """Raise RunError unless the file is an archive as torch writes it: nothing compressed, nothing larger than the file."""
    if not zipfile.is_zipfile(path):
        raise RunError(f"{path}: not a checkpoint, damaged, or written by a torch before 1.6: load and save it anew there")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise RunError(f"{path}: refused: it is compressed, as no checkpoint is")
    if sum(entry.file_size for entry in entries) > Path(path).stat().st_size:
        raise RunError(f"{path}: refused: its entries claim to be larger than the file")


def check_tensors(path: Path, data: object) -> None:
    """Raise RunError if a tensor in `data` is not plain, or claims more than its storage holds."""
    for name, tensor in tensors_in(data):
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized:
            raise RunError(f"{path}: refused: {name} is no plain tensor")
        if tensor.device.type != "cpu" or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise RunError(f"{path}: refused: {name} claims to be larger than what the file holds")


def tensors_in(data: object) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dicts and lists, with the way to it. Raises ValueError where they are nested too deeply."""
    waiting: list[tuple[str, object, int]] = [("", data, 0)]
    while waiting:
        name, value, depth = waiting.pop()
        if depth > MOST_NESTED:
            raise ValueError("nested too deeply")
        if isinstance(value, Tensor):
            yield name or "it", value
        elif isinstance(value, dict):
            waiting += [(f"{name}.{key}".lstrip("."), inner, depth + 1) for key, inner in value.items()]
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += [(f"{name}[{number}]", inner, depth + 1) for number, inner in enumerate(value)]


def check_finite(path: Path | str, state: dict[str, Tensor]) -> None:
    """Raise RunError for the first tensor that holds NaN or an infinity."""
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise RunError(f"{path}: {name} holds values that are not finite; the file is damaged, or its training diverged")


def checked_architecture(fields: object) -> Architecture:
    """The Architecture of a checkpoint. Raises ValueError if it asks for anything that no checkpoint of ours does."""
    if not isinstance(fields, dict):
        raise ValueError("no architecture")
    architecture = Architecture(**fields)
    for name in ("model", "head"):
        _require(isinstance(getattr(architecture, name), str), name)
    _require(_is_number(architecture.num_classes, int, 10**7), "num_classes")
    _require(_is_number(architecture.image_size, int, LARGEST), "image_size")
    for name, known in (("model_options", MODEL_OPTIONS), ("head_options", HEAD_OPTIONS)):
        options = getattr(architecture, name)
        _require(isinstance(options, dict) and options.keys() <= known, name)
        for option, value in options.items():
            whole = option in ("depth", "embed_dim", "num_heads")
            _require(_is_number(value, int if whole else (int, float), LARGEST, 1 if whole else 0), option)
    return architecture


def checked_classes(classes: object, num_classes: int) -> tuple[str, ...]:
    """The class names, or none. Raises ValueError if they are not as many different names as there are classes."""
    _require(isinstance(classes, list) and all(isinstance(name, str) for name in classes), "classes")
    _require(len(classes) in (0, num_classes) and len({*classes}) == len(classes), "classes")
    return tuple(classes)


def checked_forgotten(forgotten: object, num_classes: int) -> list[list[int]]:
    """The ids forgotten by task. Raises ValueError unless they are different, known, and leave a class."""
    _require(isinstance(forgotten, list) and all(isinstance(task, list) and task for task in forgotten), "forgotten")
    ids = [c for task in forgotten for c in task]
    _require(all(_is_number(c, int, num_classes - 1, 0) for c in ids), "forgotten")
    _require(len({*ids}) == len(ids) < num_classes, "forgotten")
    return forgotten


def _is_number(value: object, kind: type | tuple, most: float, least: float = 1) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and least <= value <= most


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"impossible {what}")
