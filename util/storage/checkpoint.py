"""Checkpoints: what a trained recognizer is on disk. Loading never runs code from the file."""

import io
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from backbone.lora import apply_adapters
from backbone.published import from_published, is_published
from backbone.recognizer import Architecture, Recognizer, build_recognizer
from data.image_set import ImageSet, with_classes
from util.runtime.errors import RunError, UsageError
from util.runtime.files import atomic_write, check_finite, readable, state_mismatch

FORMAT = "continual-forgetting-1"
# Arguments of timm's that name files or addresses to load.
LOADING = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "pretrained_model_args"}
LARGEST = 1 << 24  # of the numbers in a file's architecture


@dataclass
class Checkpoint:
    """A recognizer with what is known of it: the class names it was trained on, and the classes forgotten so far.

    `classes` is empty for published checkpoints, which do not name theirs. `forgotten` holds one list of class ids a
    task, in order. `info` is free: the data set, the accuracies after training.
    """

    model: Recognizer
    classes: tuple[str, ...] = ()
    forgotten: list[list[int]] = field(default_factory=list)
    info: dict = field(default_factory=dict)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    data = {
        "format": FORMAT,
        "architecture": asdict(checkpoint.model.architecture),
        "classes": list(checkpoint.classes),
        "forgotten": checkpoint.forgotten,
        "info": checkpoint.info,
        "model": {key: tensor.detach().cpu() for key, tensor in checkpoint.model.state_dict().items()},
    }
    torch_save(path, data)


def load_checkpoint(path: Path, head: str | None = None, adapters: str | None = None) -> Checkpoint:
    """Load one of our checkpoints or a published one, on the CPU.

    A published file does not say which margin head it was trained with; `head` does (default: cosface, or softmax
    where the head has a bias). Nor does one with adapters say whether its weights contain them: `adapters` ("merged" or
    "apart") does. Raises UsageError if it is needed and not given.
    """
    if path.suffix == ".onnx":
        raise UsageError(f"{path} is no checkpoint: make one of it with train_pretrain.py --model {path}")
    data = torch_load(path)
    with readable(path):
        if isinstance(data, dict) and data.get("format") == FORMAT:
            return _load_own(path, data, head)
        if isinstance(data, dict) and is_published(data):
            return _load_published(path, data, head, adapters)
    raise UsageError(f"{path} is no checkpoint of a face recognizer, neither this project's nor a published one")


def _load_own(path: Path, data: dict, head: str | None) -> Checkpoint:
    architecture, state = _architecture(data["architecture"]), data["model"]
    _check_sizes(state, path)
    if architecture.model_options.get("depth", 1) > len(state):
        raise ValueError("fewer tensors than blocks")
    with torch.device("meta"):  # takes no memory: the shapes are compared first
        _check_fits(build_recognizer(architecture), state, path)
    if head is not None and head != architecture.head:
        raise UsageError(f"{path} was trained with --head {architecture.head}, not {head}; leave --head out")

    classes, count = tuple(data["classes"]), architecture.num_classes
    if len(classes) not in (0, count) or len({*classes}) < len(classes) or not all(isinstance(c, str) for c in classes):
        raise ValueError("impossible classes")
    forgotten = [[int(c) for c in task] for task in data["forgotten"]]
    ids = [c for task in forgotten for c in task]
    if not all(forgotten) or len({*ids}) < len(ids) or not {*ids} < {*range(count)}:
        raise ValueError("impossible forgotten classes")
    model = build_recognizer(architecture)
    load_weights(model, state, path)
    return Checkpoint(model, classes, forgotten, dict(data["info"]))


def _architecture(fields: dict) -> Architecture:
    a = Architecture(**fields)
    values = [a.num_classes, a.image_size, *a.head_options.values()]
    possible = all(isinstance(value, int | float) and 0 <= value <= LARGEST for value in values)
    options = [v for value in a.model_options.values() for v in (value if isinstance(value, list | tuple) else [value])]
    possible &= all((isinstance(v, int | float) and 0 <= v <= LARGEST) or isinstance(v, str | None) for v in options)
    possible &= 0 < a.crop_pct <= 1
    named = isinstance(a.model, str) and isinstance(a.head, str)
    if not possible or not named or a.model_options.keys() & LOADING:
        raise ValueError("impossible architecture")
    return a


def _load_published(path: Path, data: dict, head: str | None, merged_or_apart: str | None) -> Checkpoint:
    _check_sizes(data, path)
    try:
        architecture, state, adapters = from_published(data, head)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    model = build_recognizer(architecture)
    load_weights(model, state, path)
    if merged_or_apart is None and any(tensor.any() for name, tensor in adapters.items() if name.endswith("lora_B")):
        message = f"{path} has adapters, and does not say whether its weights contain them"
        raise UsageError(f"{message}: add --published-adapters merged (the published training loop saves them so) or apart")
    if merged_or_apart != "merged":
        apply_adapters(model.backbone, adapters, path)
    return Checkpoint(model)


def _check_sizes(state: dict, path: Path) -> None:
    """Refuse tensors that repeat few numbers many times: a copy of them could fill the memory."""
    if any(torch.is_tensor(value) and value.nbytes > path.stat().st_size for value in state.values()):
        raise RunError(f"{path}: refused: a tensor claims to be larger than the file")


def load_weights(model: torch.nn.Module, state: dict, path: Path) -> None:
    """Load a state dict that must fit exactly and be finite. Nothing is loaded where it is not."""
    _check_fits(model, state, path)
    check_finite(state, path)
    model.load_state_dict(state)


def _check_fits(model: torch.nn.Module, state: dict, path: Path) -> None:
    if problems := state_mismatch(state, model.state_dict()):
        raise UsageError(f"{path} does not fit the model: {problems}")


def load_backbone(model: Recognizer, path: Path, adapters: str | None = None) -> None:
    """Start from backbone weights in a local file: timm's (.safetensors, .bin, .pth), arcface_torch's, a checkpoint of ours,
    a published one.

    A classifier that the model does not have is left out; position embeddings of another image size are resampled as timm
    does. `adapters`: of a published one, as in `load_checkpoint`.
    """
    from backbone.timm_models import timm

    backbone, own = model.backbone, model.backbone.state_dict()
    with readable(path):
        state = timm.models.load_state_dict(str(path), weights_only=True)
        _check_sizes(state, path)
        if is_published(state):
            state = _load_published(path, state, None, adapters).model.state_dict()
        classifier = backbone.pretrained_cfg.get("classifier") or ()
        heads = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
        ours = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
        plain = {key: value for key, value in (ours or state).items() if key in own or not key.startswith(heads)}
    resample = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    with readable(path, "does not fit the model"):
        load_weights(backbone, resample(plain, backbone) if resample else plain, path)


def torch_save(path: Path, data: dict) -> None:
    """`torch.save`, whole or not at all. OSError (a full disk) is passed on."""
    content = io.BytesIO()  # written by ourselves: torch's writer tells that something failed, not what
    torch.save(data, content)
    with atomic_write(path) as file:
        file.write(content.getbuffer())


def torch_load(path: Path):
    """`torch.load` of tensors and plain values only, on the CPU."""
    with readable(path):
        return torch.load(path, map_location="cpu", weights_only=True)


def align_classes(
    checkpoint: Checkpoint, data: Sequence[ImageSet], path: Path, forgotten: Collection[int] = ()
) -> tuple[ImageSet, ...]:
    """`data`, the sets of one data set, with labels and classes as the checkpoint has them.

    People whom the checkpoint has forgotten, or whose class ids are in `forgotten`, may have no images any more.
    Raises UsageError for any other difference. Says so where images of a class are others than it was trained on.
    """
    known, name, found = checkpoint.model.architecture.num_classes, data[0].name, data[0].classes
    classes = checkpoint.classes or found
    may_lack = {classes[c] for c in {*forgotten}.union(*checkpoint.forgotten) if c < len(classes)}
    missing, strange = sorted({*classes} - {*found} - may_lack), sorted({*found} - {*classes})
    if missing or strange or len(classes) != known:
        first = [f"{names[0]!r} {where}" for names, where in ((missing, "there"), (strange, "here")) if names]
        message = f"{path} knows {known} classes, the data set {name} has {len(found)}"
        raise UsageError(f"{message}: not in both are {', '.join(first)}" if first else f"{message}: use its training data")
    before, now = checkpoint.info.get("class_digests", {}), data[0].contents
    if other := sorted(c for c in before.keys() & now.keys() if before[c] != now[c]):
        message = f"the images of {len(other)} of {known} classes are others than {path} was trained on, {other[0]!r} first"
        print(f"warning: {name}: {message}", file=sys.stderr)
    return tuple(with_classes(images, classes) for images in data)
