"""What pre-training starts from: a network with random weights or somebody's, as the options say."""

import argparse
from pathlib import Path

import torch

from backbone.published import initialize_as_published
from backbone.recognizer import Architecture, Recognizer, build_recognizer
from backbone.sources import Source, find_source
from util.runtime.errors import UsageError
from util.storage.checkpoint import load_backbone, load_weights
from util.training.optim import derived_seed
from util.training.rows import ROWS, load_rows


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
        sizes["num_classes"] = projection_dim(source, args.weights)
    size = args.image_size or source.image_size
    if size is None:
        raise UsageError(f"{args.model} takes images of any size: give --image-size")
    pixels = {name: getattr(args, name) for name in ("mean", "std", "bgr") if getattr(args, name)}
    pixels |= {"crop_pct": args.crop_pct} if args.crop_pct < 1 else {}
    return Architecture(
        source.model, num_classes, size, args.head, source.options | sizes, {}, source.pixels | pixels, source.graph
    )


def projection_dim(source: Source, weights: Path | None) -> int:
    """How many numbers the last layer in a timm model's weights makes."""
    from backbone.timm_models import timm

    if weights is None and source.state is None:
        raise UsageError("--embedding projection needs weights that have one: --weights FILE, or a model's folder")
    name = timm.get_pretrained_cfg(source.model).classifier if timm.is_model(source.model) else None
    state = source.state or load_rows(weights)
    if f"{name}.weight" not in state:
        raise UsageError(f"{weights or source.model} has no last layer {name}: --embedding features")
    return len(state[f"{name}.weight"])


def build_model(args: argparse.Namespace, source: Source, num_classes: int) -> Recognizer:
    """The backbone with its weights, and a head of random rows."""
    torch.manual_seed(derived_seed(args.seed))
    model = build_recognizer(describe_model(args, source, num_classes), args.pretrained)
    if args.init == "published":
        initialize_as_published(model.backbone)
    if source.state is not None:
        own = model.backbone.state_dict()
        load_weights(model.backbone, {key: value for key, value in source.state.items() if key in own}, Path(args.model))
    elif args.weights is not None:
        load_backbone(model, args.weights, args.published_adapters)
    return model
