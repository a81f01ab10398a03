"""Forget classes task by task: checkpoint → tasks → method → engine → results.

python train_forget.py --checkpoint FILE --data DIR                     four tasks, each forgets a fifth of the classes
python train_forget.py --checkpoint FILE --data DIR --num-tasks 1       single-step forgetting of a tenth
python train_forget.py --checkpoint FILE --data DIR --forget-classes "ann, bob" --then eve    by name, in two tasks
python train_forget.py --checkpoint FILE --data DIR --resume            continue an interrupted run
Leaves config.json, results.json, table.md, figure.png, TensorBoard events, checkpoints/ and adapters/ in --output-dir.
"""

import argparse
import sys
from pathlib import Path

from backbone.published import to_published
from backbone.recognizer import forward_flops, to_device
from data import build_datasets
from data.image_set import ImageSet
from data.tasks import ForgettingTask, drawn_requests, forgetting_tasks, named_requests
from methods import METHODS, method_class
from methods.base import PRESETS, Method
from util.cli import options
from util.cli.config import add_config_option, describe_run, saved_arguments
from util.cli.main import run_main
from util.report.tables import Comparison
from util.runtime.distributed import main_process_first
from util.runtime.errors import UsageError
from util.runtime.files import sha256, write_json
from util.runtime.hardware import Hardware
from util.storage.checkpoint import check_classes, load_checkpoint
from util.storage.folders import RunFolder
from util.training.continual import ContinualRun
from util.training.optim import Schedule, epochs_for, make_optimizer
from util.training.resume import add_resume_options, needed_bytes, prepare_run_dir


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    config = saved_arguments(argv)
    chooser = options.Parser(add_help=False)
    add_method_choice(chooser)
    chooser.use_defaults({key: config[key] for key in ("method", "as_published") if key in config})
    chosen = chooser.parse_known_args(argv)[0]
    parser = build_parser(method_class(chosen.method), chosen.as_published)
    parser.use_defaults(config)
    args = parser.parse_args(argv)
    options.check_warmup(args)
    if args.forget_classes is None and args.then:
        raise UsageError("--then follows --forget-classes, which names the first classes to forget")
    if args.forget_classes is not None and (args.num_tasks, args.forget_per_task) != (None, None):
        raise UsageError("--forget-classes names what is forgotten: it excludes --num-tasks and --forget-per-task")
    return args


def add_method_choice(parser: options.Parser) -> None:
    parser.add_argument("--method", default="gs_lora", help=f"{', '.join(METHODS)}; with --help, its options")
    parser.add_argument(
        "--as-published",
        nargs="?",
        const="table",
        choices=PRESETS,
        help="as the published code ran the method, for its 4-task table or few-shot; further options still count",
    )


def build_parser(method: type[Method], as_published: str | None) -> options.Parser:
    """The shared options and those of `method`."""
    parser = options.Parser(description=__doc__.splitlines()[0])
    add_config_option(parser)
    add_method_choice(parser)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="the pre-trained recognizer")
    options.add_published(parser)
    options.add_data(parser)
    group = parser.add_argument_group("forgetting protocol")
    count, ratio = options.number(int, 1), options.number(float, 1e-12, 1)
    group.add_argument("--num-tasks", type=count, help="requests to forget, in turn, of drawn classes (default: 4)")
    group.add_argument(
        "--forget-per-task", type=count, help="classes a task forgets (default: a fifth of all, a tenth with --num-tasks 1)"
    )
    group.add_argument(
        "--forget-classes", metavar="LIST", help="instead of drawn ones, forget these: names or ids, separated by commas"
    )
    group.add_argument("--then", action="append", default=[], metavar="LIST", help="and these in a further task; repeatable")
    group.add_argument("--data-ratio", type=ratio, default=0.1, help="share of a class's training images a method sees")
    group.add_argument("--few-shot", type=count, metavar="N", help="exactly N images a class instead of --data-ratio")
    group.add_argument("--missing-classes", type=int, default=0, metavar="M", help="remaining classes without images")
    options.add_optimization(parser, epochs=100)
    parser.add_argument(
        "--epoch-over",
        choices=("longest", "forget", "remain"),
        default="longest",
        help="whose pass an epoch is, of the paired streams of D_f and D_r",
    )
    parser.add_argument(
        "--min-updates", type=options.number(int, 0), default=0, help="more epochs where a task makes fewer updates"
    )
    options.add_hardware(parser)
    options.add_fast_path(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--output-dir", type=Path, help="default: exps/<method>-<dataset>-<setting>-seed<seed>")
    group.add_argument(
        "--eval-every", type=options.number(int, 0), default=0, help="log test accuracies every so many epochs; 0: no"
    )
    group.add_argument("--published-layout", action="store_true", help="also write published/task_<t>.pth in that layout")
    add_resume_options(group)
    group.add_argument(
        "--resume-from", type=Path, metavar="FILE", help="start after the tasks that this task_<t>.pth has forgotten"
    )
    options.add_method(parser, method, as_published)
    return parser


def make_tasks(args: argparse.Namespace, train_set: ImageSet) -> list[ForgettingTask]:
    num_classes = len(train_set.classes)
    earlier = [] if args.resume_from is None else load_checkpoint(args.resume_from).forgotten
    if args.forget_classes is not None:
        words = [args.forget_classes, *args.then]
        requests = [*earlier, *named_requests(words, train_set.classes, earlier)]
    else:
        num_tasks = 4 if args.num_tasks is None else args.num_tasks
        share = 10 if num_tasks == 1 else 5
        per_task = max(1, round(num_classes / share)) if args.forget_per_task is None else args.forget_per_task
        requests = drawn_requests(num_classes, num_tasks, per_task, args.seed)
        if earlier != [sorted(request) for request in requests[: len(earlier)]]:
            raise UsageError(
                f"{args.resume_from} has not forgotten what the first tasks of this run forget: check --seed, --num-tasks "
                f"and --forget-per-task"
            )
    if args.resume_from is not None and not 0 < len(earlier) < len(requests):
        raise UsageError(f"{args.resume_from} has forgotten {len(earlier)} tasks of {len(requests)}: none to continue with")
    return forgetting_tasks(
        train_set.labels,
        num_classes,
        requests,
        seed=args.seed,
        data_ratio=args.data_ratio,
        few_shot=args.few_shot,
        num_missing=args.missing_classes,
    )


def assemble(args: argparse.Namespace, hardware: Hardware) -> ContinualRun:
    """All parts of a run. Raises UsageError if they do not fit together."""
    checkpoint = load_checkpoint(args.checkpoint, args.head, args.published_adapters)
    if checkpoint.forgotten:
        count = sum(map(len, checkpoint.forgotten))
        raise UsageError(
            f"{args.checkpoint} has already forgotten {count} classes: give the pre-trained one with --checkpoint, "
            f"this one with --resume-from"
        )
    model = checkpoint.model
    data = build_datasets(args, model.architecture.image_size, hardware.device)
    check_classes(checkpoint, data[0], args.checkpoint)
    make_optimizer(model, Schedule.of(args), hardware)  # raises if there is none of that name
    if args.published_layout:
        to_published(model)  # raises if the layout cannot hold it
    tasks = make_tasks(args, data[0])
    method = METHODS[args.method](args, hardware)
    method.check_model(model)
    return ContinualRun(args, model, method, data, tasks)


def training_flops(run: ContinualRun) -> float:
    """About how many FLOPs the training takes: a forward pass, and twice as much backward."""
    images = 0
    for task in run.tasks:
        epochs = epochs_for(run.method, task, run.args.epochs, run.args.min_updates)
        plans = [plan for epoch in range(epochs) for plan in run.method.passes(task, epoch, epochs)]
        images += sum(plan.steps * sum(plan.sizes.values()) for plan in plans)
    return 3 * images * forward_flops(run.model)


def main(argv: list[str] | None) -> None:
    args = parse_arguments(argv)
    hardware = options.hardware_of(args)
    run = assemble(args, hardware)
    run.method.hardware = hardware.resolve_compile(training_flops(run))
    name = f"{args.method}-{run.data[0].name}-{run.tasks[0].setting}-seed{args.seed}"
    folder = RunFolder(args.output_dir or Path("exps") / name)
    with folder.locked():
        forget(args, run, folder)


def forget(args: argparse.Namespace, run: ContinualRun, folder: RunFolder) -> None:
    """The run, in its folder."""
    hardware, model, (train_set, _) = run.method.hardware, run.model, run.data
    identity = {"checkpoint_sha256": sha256(args.checkpoint)}
    with main_process_first():
        resume = prepare_run_dir(folder, args, hardware, needed_bytes(model, len(run.tasks)), **identity)
    write_json(folder.config, describe_run(args, hardware, train_set.images.device) | identity)

    to_device(model, hardware)
    sizes = [len(task.forget) for task in run.tasks]
    counts = f"{len(sizes)} × {sizes[0]}" if len({*sizes}) == 1 else " + ".join(map(str, sizes))
    print(
        f"{run.method.title} on {train_set.name}: {counts} of {len(train_set.classes)} classes, "
        f"{model.architecture.model}, {hardware.describe()} → {folder.path}",
        flush=True,
    )
    results = run.run(folder, resume)
    print("", *Comparison([results]).narrow(), "", f"results, checkpoints and figure: {folder.path}", sep="\n")


if __name__ == "__main__":
    run_main(main)
