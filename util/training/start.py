"""What pre-training starts from: a network with random weights or somebody's, and a head whose rows come from chance, the
model's own classifier, enrolled people or a file."""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.heads import HEADS, Head, Softmax
from backbone.published import initialize_as_published
from backbone.recognizer import Architecture, Recognizer, build_recognizer
from backbone.sources import Source, find_source
from data.image_set import ImageSet
from data.tasks import ForgettingTask
from util.evaluation.evaluate import embed_images
from util.runtime.errors import UsageError
from util.runtime.files import readable
from util.runtime.hardware import Hardware
from util.storage.checkpoint import load_backbone, load_weights
from util.training.optim import derived_seed

ROWS = ("random", "enrolment", "classifier")


def choose_start(args: argparse.Namespace) -> Source:
    """The model, and what --weights, --rows and --head are where they were not given."""
    source = find_source(args.model)
    if args.weights is None:
        args.weights = source.weights
    elif args.weights != source.weights:
        source.state = None
    started = args.weights is not None or args.pretrained or source.state is not None
    args.rows = args.rows or ("enrolment" if started else "random")
    args.head = args.head or ("softmax" if args.rows == "classifier" else "cosface")
    if args.epochs == 0 and args.rows == "random":
        raise UsageError("--epochs 0 leaves a model of random weights: give --weights, or a --model that has its own")
    if args.init == "published" and not source.model.startswith("face_vit_"):
        raise UsageError("--init published is for the Face Transformers, face_vit_*")
    if args.rows not in ROWS and not Path(args.rows).is_file():
        raise UsageError(f"--rows {args.rows} is no file, nor one of {', '.join(ROWS)}")
    return source


def describe_model(args: argparse.Namespace, source: Source, num_classes: int) -> Architecture:
    sizes = {} if args.drop_rate is None else {"pos_drop_rate": args.drop_rate, "proj_drop_rate": args.drop_rate}
    sizes |= {} if args.depth is None else {"depth": args.depth}
    if args.embedding == "projection":
        sizes["num_classes"] = _projection_dim(source, args.weights)
    size = args.image_size or source.image_size
    if size is None:
        raise UsageError(f"{args.model} takes images of any size: give --image-size")
    pixels = {name: getattr(args, name) for name in ("mean", "std", "bgr") if getattr(args, name)}
    pixels |= {"crop_pct": args.crop_pct} if args.crop_pct < 1 else {}
    options, pixels = source.options | sizes, source.pixels | pixels
    return Architecture(source.model, num_classes, size, args.head, options, {}, pixels, source.graph)


def _projection_dim(source: Source, weights: Path | None) -> int:
    """How many numbers the last layer in a timm model's weights makes."""
    from backbone.timm_models import timm

    if weights is None and source.state is None:
        raise UsageError("--embedding projection needs weights that have one: --weights FILE, or a model's folder")
    name = timm.get_pretrained_cfg(source.model).classifier if timm.is_model(source.model) else None
    state = source.state or _load_rows(weights)
    if f"{name}.weight" not in state:
        raise UsageError(f"{weights or source.model} has no last layer {name}: --embedding features")
    return len(state[f"{name}.weight"])


def build_model(args: argparse.Namespace, source: Source, classes: tuple[str, ...]) -> Recognizer:
    """The backbone with its weights, and the head with the rows of `classes` where `args.rows` is a file or "classifier".

    Otherwise the rows are random. Raises UsageError where there is no classifier, or a class is not among its rows.
    """
    torch.manual_seed(derived_seed(args.seed))
    model = build_recognizer(describe_model(args, source, len(classes)), args.pretrained)
    if args.init == "published":
        initialize_as_published(model.backbone)
    if source.state is not None:
        own = model.backbone.state_dict()
        load_weights(model.backbone, {key: value for key, value in source.state.items() if key in own}, Path(args.model))
    elif args.weights is not None:
        load_backbone(model, args.weights, args.published_adapters)
    if args.rows not in ("random", "enrolment"):
        weight, bias = _classifier(args, source, model)
        _copy_rows(model.head, weight, bias, class_ids(classes, len(weight), args.class_map))
    return model


@torch.no_grad()
def enrol(model: Recognizer, task: ForgettingTask, train_set: ImageSet, hardware: Hardware) -> None:
    """Each person's row is the mean of the unit embeddings of their training images, as face recognizers enrol people."""
    if isinstance(model.head, Softmax):
        raise UsageError("--rows enrolment is for heads that compare directions: choose another --head than softmax")
    indices = task.remain_indices
    labels = train_set.labels.cpu()[indices].to(hardware.device)
    unit = F.normalize(embed_images(model, train_set, hardware, indices))
    rows = torch.zeros_like(model.head.weight).index_add_(0, labels, unit)
    model.head.weight.copy_(F.normalize(rows))


def whole_classifier(recipe: dict, model: Recognizer) -> Recognizer:
    """The model with all rows of the classifier that its own were cut from by the `recipe` of pre-training, those of
    forgotten classes included. The backbone is shared. Raises UsageError where there is no such classifier."""
    if recipe.get("rows") in (None, "random", "enrolment"):
        raise UsageError("--whole-classifier: the model's rows were not taken from one (--rows classifier, or a file)")
    weight, bias = _classifier(argparse.Namespace(**recipe), find_source(recipe["model"]), model)
    architecture = replace(model.architecture, num_classes=len(weight))
    head = HEADS[architecture.head](weight.shape[1], len(weight), **architecture.head_options)
    _copy_rows(head, weight, bias, range(len(weight)))
    return Recognizer(architecture, model.backbone, head).eval()


@torch.no_grad()
def _copy_rows(head: Head, weight: Tensor, bias: Tensor | None, ids: Sequence[int]) -> None:
    head.weight.copy_(weight[[*ids]])
    if isinstance(head, Softmax) and bias is not None:
        head.bias.copy_(bias[[*ids]])


def _classifier(args: argparse.Namespace, source: Source, model: Recognizer) -> tuple[Tensor, Tensor | None]:
    """All rows (K, dim) and biases (K,): of the classifier in a timm model's state dict, or of the one matrix in a file."""
    from backbone.timm_models import timm

    file = args.weights if args.rows == "classifier" else args.rows
    if file is not None:
        state = _load_rows(Path(file))
    else:
        state = source.state or timm.create_model(args.model, pretrained=True).state_dict()
    name = model.backbone.pretrained_cfg.get("classifier")
    weight = state.get(f"{name}.weight")
    if weight is None:
        matrices = [tensor for tensor in state.values() if tensor.ndim == 2]
        weight = matrices[0] if len(matrices) == len(state) - (len(state) > 1) == 1 else None
    dim = model.head.weight.shape[1]
    if weight is None or weight.shape[1] != dim:
        message = "no classifier" if weight is None else f"rows of {weight.shape[1]} values"
        where = file or args.model
        raise UsageError(f"{where}: {message}, where --rows needs (classes, {dim}); --rows enrolment needs none")
    bias = next((tensor for tensor in state.values() if tensor.shape == weight.shape[:1]), None)
    return weight, state.get(f"{name}.bias", bias)


def class_ids(classes: tuple[str, ...], count: int, class_map: Path | None) -> list[int]:
    """Which of a classifier's `count` rows each class is: its line in the class map; its ImageNet number (n01440764); a
    number itself; or, where there are as many classes as rows, its place."""
    if class_map is not None:
        names = class_map.read_text("utf-8").split("\n")
        known = {name.split()[0] if name.split() else "": line for line, name in enumerate(names)}
        known |= {name.strip(): line for line, name in enumerate(names)}
    elif all(re.fullmatch(r"n\d{8}", name) for name in classes):
        from timm.data import ImageNetInfo

        known = {name: place for place, name in enumerate(ImageNetInfo().label_names())}
    elif all(name.isdecimal() for name in classes):
        known = {name: int(name) for name in classes}
    elif len(classes) == count:
        print("rows are taken in the order of the folders' names; --class-map FILE gives another", file=sys.stderr)
        known = {name: place for place, name in enumerate(classes)}
    else:
        message = f"{len(classes)} classes, {count} rows, and no names that tell which is which"
        raise UsageError(f"{message}: give --class-map FILE, in which line i names row i")
    if strange := [name for name in classes if not 0 <= known.get(name, -1) < count]:
        where = f"{class_map or 'the classifier'} of {count} rows"
        raise UsageError(f"{len(strange)} classes are not in {where}, {strange[0]!r} first: give --class-map FILE")
    return [known[name] for name in classes]


def _load_rows(path: Path) -> dict[str, Tensor]:
    """The state dict, or .npy matrix, in a file."""
    from backbone.timm_models import timm

    with readable(path):
        if path.suffix == ".npy":
            return {"weight": torch.from_numpy(np.load(path, allow_pickle=False)).float()}
        return timm.models.load_state_dict(str(path), weights_only=True)
