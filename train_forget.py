"""Forget classes of a trained recognizer, one request after another.

python train_forget.py --checkpoint FILE --data DIR                     four tasks, each forgets a fifth of the classes
python train_forget.py --checkpoint FILE --data DIR --num-tasks 1       single-step forgetting of a tenth
python train_forget.py --checkpoint FILE --data DIR --forget-classes "ann, bob" --then eve
                                                    deletion by name: Unseen; --strangers and more: --method unseen --help
python train_forget.py --checkpoint FILE --data DIR --resume            continue an interrupted run
Leaves config.json, results.json, table.md, figure.png, events, checkpoints/, adapters/ and deletions/ in --output-dir.
"""

import argparse
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

from backbone.published import to_published
from backbone.recognizer import to_device, training_flops
from data import build_datasets, place_images
from data.copies import check_copies, check_forgotten
from data.image_set import ImageSet
from data.pairs import load_pairs
from data.records import is_record_file
from data.tasks import ForgettingTask, drawn_requests, forgetting_tasks, name_list, named_requests, warn_of_few_photos
from methods import METHODS, method_class
from methods.base import PRESETS, Method
from util.cli import options
from util.cli.config import add_config_option, describe_run, saved_arguments
from util.cli.main import run_main
from util.report.results import load_results
from util.report.tables import Comparison
from util.runtime.errors import UsageError
from util.runtime.hardware import Hardware
from util.storage.checkpoint import Checkpoint, align_classes, load_checkpoint
from util.storage.folders import RunFolder
from util.storage.hashes import image_hashes
from util.training.continual import ContinualRun
from util.training.optim import make_optimizer
from util.training.resume import add_resume_options, identity_of, should_resume

SCRIPT = Path(__file__).name
# Defaults of a request by name, which is to delete; the others are of the papers' protocol.
BY_NAME = {"method": "unseen", "data_ratio": 1.0, "epochs": 5, "min_updates": 300, "batch_size": 16}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    config = saved_arguments(argv, SCRIPT)
    chooser = options.Parser(add_help=False)
    add_method_choice(chooser)
    chooser.add_argument("--forget-classes")
    chooser.add_argument("--epochs")
    chooser.set_defaults(method=None)
    chooser.use_defaults({key: config[key] for key in ("method", "as_published", "forget_classes") if key in config})
    chosen = chooser.parse_known_args(argv)[0]
    by_name = chosen.forget_classes is not None and chosen.as_published is None
    method = method_class(chosen.method or (BY_NAME["method"] if by_name else "gs_lora"))
    parser = build_parser(method, chosen.as_published)
    for action in parser.actions():
        if action.dest in BY_NAME:
            action.help += f" (default: {action.default}; of a request by name: {BY_NAME[action.dest]})"
    if by_name:  # epochs that are given are made, and no more
        parser.set_defaults(**BY_NAME | ({} if chosen.epochs is None else {"min_updates": 0}))
    parser.use_defaults(config)
    args = parser.parse_args(argv)
    options.check_warmup(args)
    if args.forget_classes is None and args.then:
        raise UsageError("--then follows --forget-classes, which names the first classes to forget")
    if args.forget_classes is not None and (args.num_tasks, args.forget_per_task) != (None, None):
        raise UsageError("--forget-classes names what is forgotten: it excludes --num-tasks and --forget-per-task")
    return args


def add_method_choice(parser: options.Parser) -> None:
    names = f"{', '.join(METHODS)}; --method NAME --help shows its options"
    parser.add_argument("--method", default="gs_lora", metavar="NAME", help=names)
    listed = (f"{name:12} {sys.modules[m.__module__].__doc__.splitlines()[0]}" for name, m in METHODS.items())
    help_text = "print each method with its paper"
    parser.add_argument("--list-methods", action="version", version="\n".join(listed), help=help_text)
    help_text = "options of the published code, for its 4-task table or few-shot; options given after it still count"
    parser.add_argument("--as-published", nargs="?", const="table", choices=PRESETS, help=help_text)


def build_parser(method: type[Method], as_published: str | None) -> options.Parser:
    """The shared options and those of `method`."""
    parser = options.Parser(__doc__, "%(prog)s --checkpoint FILE [options]")
    add_config_option(parser)
    add_method_choice(parser)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="pre-trained recognizer")
    options.add_published(parser)
    options.add_data(parser)
    group = parser.add_argument_group("forgetting protocol")
    count, ratio = options.number(int, 1), options.number(float, 1e-12, 1)
    group.add_argument("--num-tasks", type=count, help="number of requests, of random classes (default: 4)")
    help_text = "number of classes that a task forgets (default: a fifth of all, a tenth with --num-tasks 1)"
    group.add_argument("--forget-per-task", type=count, help=help_text)
    names = {"type": options.class_list, "metavar": "LIST"}
    group.add_argument("--forget-classes", **names, help=f"people to forget, not random classes: {options.NAMES}")
    group.add_argument("--then", action="append", default=[], **names, help="people to forget in a further task; repeatable")
    help_text = "go on although photos of a named person also lie under another name"
    group.add_argument("--allow-copies", action="store_true", help=help_text)
    group.add_argument("--data-ratio", type=ratio, default=0.1, help="share of a class's training images that are used")
    group.add_argument("--few-shot", type=count, metavar="N", help="training images a class, instead of --data-ratio")
    group.add_argument("--missing-classes", type=int, default=0, metavar="N", help="remaining classes without images")
    options.add_optimization(parser, epochs=100)
    streams, help_text = ("longest", "forget", "remain"), "images of which an epoch is one pass: D_f, D_r, or the longer"
    parser.add_argument("--epoch-over", choices=streams, default="longest", help=help_text)
    none = {"type": options.number(int, 0), "default": 0}
    parser.add_argument("--min-updates", **none, help="fewest updates of a task, which makes more epochs if needed")
    group = parser.add_argument_group("output")
    group.add_argument("--output-dir", type=Path, help="folder of the run (default: one in exps/)")
    group.add_argument("--eval-every", **none, help="epochs between two logs of test accuracies; 0 logs none")
    options.add_pairs(group, "to measure before and after each task")
    group.add_argument("--published-layout", action="store_true", help="also write published/task_<t>.pth")
    add_resume_options(group)
    help_text = "task_<t>.pth of an earlier run, to continue after its tasks"
    group.add_argument("--resume-from", type=Path, metavar="FILE", help=help_text)
    options.add_method(parser, method, as_published)
    options.add_hardware(parser)
    options.add_fast_path(parser)
    return parser


def make_tasks(args: argparse.Namespace, train_set: ImageSet, earlier: list[list[int]]) -> list[ForgettingTask]:
    """A task for each request, those of the `earlier` ones, lists of class ids, first."""
    classes, done = train_set.classes, len(earlier)
    if args.forget_classes is not None:
        requests = [*earlier, *named_requests([args.forget_classes, *args.then], classes, earlier)]
    else:
        num_tasks = args.num_tasks or 4
        per_task = args.forget_per_task or max(1, round(len(classes) / (10 if num_tasks == 1 else 5)))
        requests = drawn_requests(len(classes), num_tasks, per_task, args.seed)
        if earlier != [sorted(request) for request in requests[:done]]:
            message = f"{args.resume_from} has not forgotten what the first tasks of this run forget"
            raise UsageError(f"{message}: check --seed, --num-tasks and --forget-per-task")
    if args.resume_from is not None and not 0 < done < len(requests):
        raise UsageError(f"{args.resume_from} has forgotten {done} tasks of {len(requests)}: none to continue with")
    images = {"data_ratio": args.data_ratio, "few_shot": args.few_shot, "num_missing": args.missing_classes}
    return forgetting_tasks(train_set.labels, len(classes), requests, seed=args.seed, earlier=done, **images)


def assemble(args: argparse.Namespace, hardware: Hardware) -> ContinualRun:
    """All parts of a run. Raises UsageError if they do not fit together."""
    checkpoint = load_checkpoint(args.checkpoint, args.head, args.published_adapters)
    if checkpoint.forgotten:
        message = f"{args.checkpoint} has already forgotten {sum(map(len, checkpoint.forgotten))} classes"
        raise UsageError(f"{message}: give the pre-trained one with --checkpoint, this one with --resume-from")
    model = checkpoint.model
    named = args.forget_classes is not None
    # Of a person who is named, also copies in other files: the pixels tell.
    by_pixels = named and not is_record_file(args.data)
    everything = by_pixels or getattr(args, "importance_data", "sampled") == "all"
    a = model.architecture
    data = build_datasets(args, a.image_size, hardware.device, not everything, a.crop_pct)
    begun = Checkpoint(model) if args.resume_from is None else load_checkpoint(args.resume_from)
    earlier = begun.forgotten
    data = align_classes(checkpoint, data, args.checkpoint, [c for request in earlier for c in request])
    if args.val_fraction is not None and (checkpoint.info.get("val_fraction") or 0) < args.val_fraction:
        print(f"warning: {args.checkpoint} may have been trained on images that --val-fraction holds out", file=sys.stderr)
    make_optimizer(model, args, hardware)  # raises if there is none of that name
    if args.published_layout:
        to_published(model)  # raises if the layout cannot hold it
    tasks = make_tasks(args, data[0], earlier)
    left = tasks[len(earlier) :]
    refuse = named and not args.allow_copies
    check_forgotten(data, left[0], {*begun.info.get("forgotten_digests", ())}, refuse)
    data = place_images(args, data, hardware.device, tasks)
    sets = [replace(split, digests=tuple(image_hashes(split))) for split in data] if by_pixels else data
    check_copies(sets, left, refuse)
    if named:
        warn_of_few_photos(left, *(split.labels.cpu() for split in data), data[0].classes)
    method = METHODS[args.method](args, hardware)
    method.check(model, left, data[0])
    pairs = load_pairs(args.pairs or [], a.image_size, args.cache_dir, a.crop_pct)
    return ContinualRun(args, model, method, data, tasks, len(earlier), pairs)


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    hardware = options.start_hardware(args)
    run = assemble(args, hardware)
    run.method.hardware = hardware.resolve_compile(training_flops(run.model, run.images_shown()))
    folder = RunFolder(args.output_dir or Path("exps") / default_name(args, run))
    with folder.locked():
        forget(args, run, folder, options.given_options(argv))


def default_name(args: argparse.Namespace, run: ContinualRun) -> str:
    """Of the run's folder: another one for other data, for other people and after other tasks."""
    suffix = ""
    if args.forget_classes is not None:
        requests = [[run.data[0].classes[c] for c in task.forget] for task in run.tasks]
        suffix = f"-named-{hashlib.sha256(json.dumps(requests).encode()).hexdigest()[:8]}"
    return f"{args.method}-{run.data[0].tag}-{run.tasks[run.earlier].setting}{suffix}-seed{args.seed}"


def forget(args: argparse.Namespace, run: ContinualRun, folder: RunFolder, given: set[str]) -> None:
    """The run, in its folder."""
    hardware, model, (train_set, _) = run.method.hardware, run.model, run.data
    identity = identity_of(args, train_set)
    resume = should_resume(folder, args, identity, model, len(run.tasks))
    to_device(model, hardware)
    sizes = [len(task.forget) for task in run.tasks[run.earlier :]]
    counts = f"{len(sizes)} × {sizes[0]}" if len({*sizes}) == 1 else " + ".join(map(str, sizes))
    print(
        f"{run.method.title} on {train_set.name}: {counts} of {len(train_set.classes)} classes, "
        f"{model.architecture.model}, {hardware.describe()} → {folder.path}",
        *(f"task {task.number} forgets {name_list(task.forget, train_set.classes)}" for task in run.tasks[run.earlier :]),
        sep="\n",
        flush=True,
    )
    if unused := sorted(given & {options.option_name(name) for name in run.method.unused}):
        print(f"{run.method.title} has no use for {', '.join(unused)}")
    config = describe_run(args, SCRIPT, hardware, train_set.images.device) | identity
    if resume and folder.finished:
        folder.discard()  # it may have been killed just before
    results = load_results(folder.results) if resume and folder.finished else run.run(folder, resume, config)
    print("", *Comparison([results]).narrow(), "", f"results, checkpoints and figure: {folder.path}", sep="\n")


if __name__ == "__main__":
    run_main(main)
