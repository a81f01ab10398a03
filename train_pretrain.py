"""Pre-train a recognizer, or enrol people in one that others have trained.

python train_pretrain.py                                     the tiny model on synthetic faces, minutes on a CPU
python train_pretrain.py --data DIR --model face_vit_p8s8_d6 --epochs 1200 --batch-size 480 --lr 3e-4 --warmup-epochs 10
                                                             the paper's model and schedule
python train_pretrain.py --without-classes "ann, bob"        a model that never saw them: a reference of the audit
python train_pretrain.py --model FILE.onnx --data DIR --epochs 0      a recognizer that others have trained: enrol people
python train_pretrain.py --model iresnet50 --weights backbone.pth --data DIR --epochs 10             and fine-tune it
python train_pretrain.py --resume                            continue an interrupted run
Leaves checkpoint.pth, config.json, checkpoints/last.pth and TensorBoard events in --output-dir.
"""

import argparse
import time
from pathlib import Path

from backbone.heads import HEADS
from backbone.published import to_published
from backbone.recognizer import Recognizer, to_device, training_flops
from data import build_datasets
from data.image_set import ImageSet, with_classes
from data.tasks import ForgettingTask, listed_names, name_list, named_classes, pretraining_task
from methods.pretrain import Pretrain
from util.cli import options
from util.cli.config import add_config_option, describe_run, saved_arguments
from util.cli.main import run_main
from util.evaluation.evaluate import predict
from util.runtime.errors import UsageError
from util.runtime.files import write_json
from util.runtime.hardware import Hardware
from util.storage.checkpoint import Checkpoint, save_checkpoint, torch_save
from util.storage.folders import PretrainFolder
from util.training.engine import Trainer
from util.training.monitor import Monitor, open_writer
from util.training.optim import make_optimizer
from util.training.resume import LastState, add_resume_options, identity_of, should_resume
from util.training.start import ROWS, build_model, choose_start, describe_model, enrol

SCRIPT = Path(__file__).name
# By default a set is shown as often as makes this many images in all: four minutes of the tiny model on two CPU cores.
IMAGES_SHOWN, MIN_EPOCHS = 120_000, 10
# The options that a pre-trained model depends on, beside the data, the classes left out and the seed.
RECIPE = ("model", "image_size", "depth", "head", "drop_rate", "weights", "pretrained", "epochs", "warmup_epochs")
RECIPE += ("batch_size", "lr", "min_lr", "weight_decay", "opt", "clip_grad", "sched", "decay_on", "init", "mirror")
# Of a model that others have trained; they are told where they are not these.
RECIPE_OF_WEIGHTS = {"published_adapters": None, "rows": "random", "class_map": None, "embedding": "features"}
RECIPE_OF_WEIGHTS |= {"mean": None, "std": None, "bgr": False, "crop_pct": 1.0}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = build_parser()
    parser.use_defaults(saved_arguments(argv, SCRIPT))
    return parser.parse_args(argv)


def build_parser() -> options.Parser:
    parser = options.Parser(__doc__)
    add_config_option(parser)
    options.add_data(parser)
    names = {"type": options.class_list, "metavar": "LIST"}
    parser.add_argument("--without-classes", **names, help=f"people to leave out; class ids stay: {options.NAMES}")
    parser.add_argument("--absent-classes", **names, help="people left out whose images are gone; they keep their class ids")
    group = parser.add_argument_group("model")
    help_text = "timm model (face_vit_*, iresnet*, any other), folder with config.json, hf-hub:NAME, or ONNX file"
    group.add_argument("--model", default="face_vit_tiny", metavar="NAME", help=help_text)
    group.add_argument("--image-size", type=options.number(int, 1), help="image size in pixels (default: the model's own)")
    group.add_argument("--depth", type=options.number(int, 1), help="number of blocks (default: the model's own)")
    group.add_argument("--head", choices=HEADS, help="head (default: cosface; with --rows classifier softmax)")
    help_text = "dropout rate of the embedding and of blocks (default: the model's)"
    group.add_argument("--drop-rate", type=options.number(float, 0, 0.99), help=help_text)
    group.add_argument("--init", choices=("timm", "published"), default="timm", help="random weights to start from")
    group.add_argument("--weights", type=Path, metavar="FILE", help="local file of backbone weights to start from")
    group.add_argument("--pretrained", action="store_true", help="start from timm's published weights (needs a network)")
    options.add_published(group, head=False)
    help_text = f"initial rows of the head: {', '.join(ROWS)}, or a file (default: random; with given weights: enrolment)"
    group.add_argument("--rows", metavar="NAME", help=help_text)
    help_text = "file whose line i names row i of the classifier or of --rows (default: ImageNet's numbers, or numbers)"
    group.add_argument("--class-map", type=Path, metavar="FILE", help=help_text)
    help_text = "embedding: timm's pooled features, or the model's own last layer"
    group.add_argument("--embedding", choices=("features", "projection"), default="features", help=help_text)
    rgb = {"type": options.number(float), "nargs": 3, "metavar": ("R", "G", "B")}
    group.add_argument("--mean", **rgb, help="mean of the pixels, 0 to 1 (default: the model's own, or found for ONNX)")
    group.add_argument("--std", **rgb, help="standard deviation of the pixels; 0.0039216 for a model of 0 to 255")
    group.add_argument("--bgr", action="store_true", help="feed pixels as BGR, not RGB")
    help_text = "central share of an image's shorter side that is kept"
    group.add_argument("--crop-pct", type=options.number(float, 0.01, 1), default=1.0, help=help_text)
    options.add_optimization(parser, fewest_epochs=0, lr=1e-3, warmup_epochs=None)
    parser.add_argument("--mirror", choices=("on", "off"), default="on", help="mirror training images at random")
    group = parser.add_argument_group("output")
    group.add_argument("--output-dir", type=Path, help="folder of the run (default: one in exps/)")
    group.add_argument("--published-layout", action="store_true", help="also write published.pth in the published layout")
    add_resume_options(group)
    options.add_hardware(parser)
    options.add_fast_path(parser)
    return parser


def recipe_in(arguments: dict) -> dict:
    """What a pre-trained model depends on, of the arguments of its run or of a recipe that more was written into."""
    others = {key: arguments.get(key, default) for key, default in RECIPE_OF_WEIGHTS.items()}
    return {key: arguments[key] for key in RECIPE} | {k: v for k, v in others.items() if v != RECIPE_OF_WEIGHTS[k]}


def choose_epochs(args: argparse.Namespace, train_images: int) -> None:
    """Fill in --epochs and --warmup-epochs where they were not given; few where others have trained the model."""
    if args.epochs is None:
        args.epochs = MIN_EPOCHS if args.rows != "random" else max(MIN_EPOCHS, round(IMAGES_SHOWN / train_images))
    if args.warmup_epochs is None:
        least = 0 if args.rows == "random" else min(1, args.epochs)  # whole steps at once ruin weights that others trained
        args.warmup_epochs = max(least, args.epochs // 10)
    options.check_warmup(args)


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    hardware = options.start_hardware(args)
    source = choose_start(args)
    if args.epochs is not None:
        choose_epochs(args, 1)  # finds what is wrong before the data are read
    data = build_datasets(args, describe_model(args, source, 2).image_size, hardware.device, crop_pct=args.crop_pct)
    absent = [] if args.absent_classes is None else listed_names(args.absent_classes)
    data = tuple(with_classes(split, sorted({*split.classes, *absent})) for split in data)
    train_set = data[0]
    without = [] if args.without_classes is None else named_classes(args.without_classes, train_set.classes)
    without += [c for c, name in enumerate(train_set.classes) if name in absent]
    task = pretraining_task(train_set.labels.cpu(), len(train_set.classes), without)
    if len(task.remain) < 2:
        raise UsageError(f"--without-classes leaves {len(task.remain)} classes; at least 2 are needed")
    choose_epochs(args, len(task.remain_indices))
    model = build_model(args, source, train_set.classes)
    hardware = hardware.resolve_compile(training_flops(model, args.epochs * len(task.remain_indices)))
    to_device(model, hardware)
    make_optimizer(model, args, hardware)  # raises if there is none of that name
    if args.published_layout:
        to_published(model)  # raises if the layout cannot hold it
    name = f"pretrain-{train_set.tag}-{source.model.removesuffix('.onnx')}-seed{args.seed}"
    folder = PretrainFolder(args.output_dir or Path("exps") / name)
    with folder.locked():
        pretrain(args, hardware, model, data, task, folder)


def pretrain(
    args: argparse.Namespace,
    hardware: Hardware,
    model: Recognizer,
    data: tuple[ImageSet, ImageSet],
    task: ForgettingTask,
    folder: PretrainFolder,
) -> None:
    """The run, in its folder."""
    train_set, test_set = data
    identity = identity_of(args, train_set)
    resume = should_resume(folder, args, identity, model)
    if resume and folder.finished:
        folder.discard()  # it may have been killed just before
        print(f"finished before: {folder.results}")
        return
    if not resume:
        folder.set_aside()
    write_json(folder.config, describe_run(args, SCRIPT, hardware, train_set.images.device) | identity)
    print(
        f"pre-training {model.architecture.model} ({model.num_parameters():,} parameters) on {train_set.name}: "
        f"{len(task.remain)} classes, {len(task.remain_indices)} images of {train_set.image_size}×{train_set.image_size}, "
        f"{hardware.describe()}"
    )
    if task.old:
        print(f"left out: {name_list(task.old, train_set.classes)}", flush=True)

    start = time.perf_counter()
    if args.rows == "enrolment" and not resume:
        enrol(model, task, train_set, hardware)
    images_per_second = train(Pretrain(args, hardware), model, task, train_set, folder, resume)
    accuracies = predict(model, test_set, hardware).accuracies(task.remain)
    info = {"dataset": train_set.name, "epochs": args.epochs, "seed": args.seed, **accuracies}
    info |= {"recipe": recipe_in(options.plain_arguments(args)), "without_classes": list(task.old)}
    info |= {"class_digests": train_set.contents, "val_fraction": args.val_fraction}
    save_checkpoint(folder.results, Checkpoint(model, train_set.classes, info=info))
    if args.published_layout:
        torch_save(folder.path / "published.pth", to_published(model))
    folder.discard()
    measured = "test" if args.val_fraction is None else "held-out"
    trained = f"{args.epochs} epochs in {time.perf_counter() - start:.0f} s ({images_per_second:.0f} images/s)"
    print(
        f"{measured} accuracy {accuracies['acc']:.2f}%, with margin {accuracies['margin_acc']:.2f}%, after "
        f"{trained if args.epochs else 'enrolment'}: {folder.results}"
    )


def train(
    method: Pretrain, model: Recognizer, task: ForgettingTask, train_set: ImageSet, folder: PretrainFolder, resume: bool
) -> float:
    """The epochs that are left. Returns images per second."""
    args, images_per_second = method.args, 0.0
    method.begin_task(model, task, train_set, args.epochs)
    if args.epochs:
        trainer = Trainer(model, method, task)
        last = LastState(folder.last, args.save_every, resume)
        last.restore(trainer)
        progress = "pretrain", "pre-training", args.epochs, trainer.position.epoch
        with open_writer(folder.path) as writer, Monitor(writer, *progress) as monitor:
            images_per_second = trainer.train(monitor, last.save, last.after_epoch)
    method.end_task(model)
    return images_per_second


if __name__ == "__main__":
    run_main(main)
