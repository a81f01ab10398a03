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

from backbone.fast_path import to_device
from backbone.recognizer import Recognizer, forward_flops
from data import build_datasets
from data.batches import Pass
from data.image_set import ImageSet
from data.tasks import ForgettingTask, drawn_requests, forgetting_tasks, named_requests
from methods import METHODS, method_class
from methods.base import Method
from util.cli.arguments import (
    HelpFormatter,
    add_data_arguments,
    add_fast_path_arguments,
    add_hardware_arguments,
    add_optimization_arguments,
    check_optimization,
    hardware_of,
    run_main,
)
from util.cli.config import add_config_argument, describe_run, with_config
from util.report.tables import narrow_table
from util.runtime.distributed import main_process_first
from util.runtime.errors import UsageError
from util.runtime.files import sha256, write_json
from util.runtime.hardware import Hardware
from util.storage.checkpoint import Checkpoint, check_classes, load_checkpoint, published_state
from util.storage.folders import RunFolder
from util.training.continual import ContinualRun
from util.training.engine import Optimization, epochs_of_task, make_optimizer
from util.training.resume import add_resume_arguments, check_resume, enter, needed_bytes

# Of the optimisation options, where neither the command nor the method says otherwise.
SHARED_DEFAULTS = {"lr": 1e-4, "weight_decay": 0.05, "warmup_epochs": 0, "opt": "adamw"}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    argv = with_config(sys.argv[1:] if argv is None else argv, lambda words: build_parser(words)[0])
    parser, method = build_parser(argv)
    args = parser.parse_args(argv)
    for key, value in (SHARED_DEFAULTS | method.defaults).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    check_optimization(args)
    method.check_arguments(args)
    check_requests(args)
    check_resume(args)
    if args.eval_every < 0 or args.min_updates < 0:
        raise UsageError("--eval-every and --min-updates must be at least 0")
    return args


def check_requests(args: argparse.Namespace) -> None:
    """Fill in --num-tasks where classes are drawn. Raises UsageError where classes are both named and to be drawn."""
    if args.forget_classes is None:
        if args.then:
            raise UsageError("--then follows --forget-classes, which names the first classes to forget")
        args.num_tasks = 4 if args.num_tasks is None else args.num_tasks
    elif args.num_tasks is not None or args.forget_per_task is not None:
        raise UsageError("--forget-classes names what is forgotten: it excludes --num-tasks and --forget-per-task")


def build_parser(argv: list[str]) -> tuple[argparse.ArgumentParser, type[Method]]:
    """The shared options and those of the method that `argv` names."""
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--method", default="gs_lora")
    chooser.add_argument("--as-published", action="store_true")
    known = chooser.parse_known_args(argv)[0]
    method = method_class(known.method)
    # Abbreviated, --method and --as-published would be missed by the chooser.
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=HelpFormatter, allow_abbrev=False
    )
    add_config_argument(parser)
    parser.add_argument("--method", choices=METHODS, default="gs_lora", help="how to forget; --help shows its options")
    parser.add_argument(
        "--as-published", action="store_true", help="the method's published readings and values; further options still count"
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="the pre-trained recogniser")
    parser.add_argument("--head", help="head of a published checkpoint, which does not name its own; none: cosface")
    add_data_arguments(parser)
    group = parser.add_argument_group("forgetting protocol")
    group.add_argument("--num-tasks", type=int, help="requests to forget, one after another, of classes drawn; none: 4")
    group.add_argument(
        "--forget-per-task", type=int, help="classes a task forgets; none: a fifth of all, a tenth with --num-tasks 1"
    )
    group.add_argument(
        "--forget-classes", metavar="LIST", help="instead of drawn ones, forget these: names or ids, separated by commas"
    )
    group.add_argument("--then", action="append", default=[], metavar="LIST", help="and these in a further task; repeatable")
    group.add_argument("--data-ratio", type=float, default=0.1, help="share of a class's training images a method sees")
    group.add_argument("--few-shot", type=int, metavar="N", help="exactly N images a class instead of --data-ratio")
    group.add_argument("--missing-classes", type=int, default=0, metavar="M", help="remaining classes without images")
    add_optimization_arguments(parser, epochs=100, batch_size=48)
    parser.add_argument(
        "--min-updates", type=int, default=0, metavar="N", help="more epochs for a task whose images make fewer updates"
    )
    add_hardware_arguments(parser)
    add_fast_path_arguments(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--output-dir", type=Path, help="none: exps/<method>-<dataset>-<setting>-seed<seed>")
    group.add_argument("--eval-every", type=int, default=0, metavar="N", help="log test accuracies every N epochs; 0: no")
    group.add_argument("--published-layout", action="store_true", help="also write published/task_<t>.pth in that layout")
    add_resume_arguments(group)
    group.add_argument(
        "--resume-from", type=Path, metavar="FILE", help="start after the tasks that this task_<t>.pth has forgotten"
    )
    method.add_arguments(parser)
    if known.as_published:
        parser.set_defaults(**method.published)
    return parser, method


def make_tasks(args: argparse.Namespace, train_set: ImageSet) -> list[ForgettingTask]:
    num_classes = len(train_set.classes)
    earlier = [] if args.resume_from is None else load_checkpoint(args.resume_from).forgotten
    if args.forget_classes is not None:
        words = [args.forget_classes, *args.then]
        requests = [*earlier, *named_requests(words, train_set.classes, earlier)]
    else:
        share = 10 if args.num_tasks == 1 else 5
        per_task = max(1, round(num_classes / share)) if args.forget_per_task is None else args.forget_per_task
        requests = drawn_requests(num_classes, args.num_tasks, per_task, args.seed)
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


def planned_work(args: argparse.Namespace, model: Recognizer, tasks: list[ForgettingTask]) -> float:
    """About how many FLOPs the run's training will take: forward and twice as much backward, for paired batches."""
    images = 0
    for task in tasks:
        plan = Pass({"forget": task.forget_indices, "remain": task.remain_indices}, args.batch_size)
        images += epochs_of_task(args, plan.steps) * plan.steps * sum(plan.sizes.values())
    return 3 * images * forward_flops(model)


def load_pretrained(args: argparse.Namespace) -> Checkpoint:
    checkpoint = load_checkpoint(args.checkpoint, args.head)
    if checkpoint.forgotten:
        count = sum(map(len, checkpoint.forgotten))
        raise UsageError(
            f"{args.checkpoint} has already forgotten {count} classes: give the pre-trained one with --checkpoint, "
            f"this one with --resume-from"
        )
    return checkpoint


def assemble(
    args: argparse.Namespace, hardware: Hardware
) -> tuple[Checkpoint, tuple[ImageSet, ImageSet], list[ForgettingTask]]:
    """The pre-trained model, the data and the tasks. Raises UsageError if they do not fit together."""
    pretrained = load_pretrained(args)
    data = build_datasets(args, pretrained.model.architecture.image_size, hardware.device)
    check_classes(pretrained, data[0], args.checkpoint)
    METHODS[args.method].check_model(args, pretrained.model)
    make_optimizer(pretrained.model, Optimization.of(args), hardware)  # knows whether there is one of that name
    if args.published_layout:
        published_state(pretrained.model)  # knows whether the layout can hold it
    return pretrained, data, make_tasks(args, data[0])


def main(argv: list[str] | None) -> None:
    args = parse_arguments(argv)
    hardware = hardware_of(args)
    pretrained, data, tasks = assemble(args, hardware)
    hardware = hardware.decide(planned_work(args, pretrained.model, tasks))
    name = f"{args.method}-{data[0].name}-{tasks[0].setting}-seed{args.seed}"
    folder = RunFolder(args.output_dir or Path("exps") / name)
    with folder.locked():
        forget(args, hardware, pretrained, data, tasks, folder)


def forget(
    args: argparse.Namespace,
    hardware: Hardware,
    pretrained: Checkpoint,
    data: tuple[ImageSet, ImageSet],
    tasks: list[ForgettingTask],
    folder: RunFolder,
) -> None:
    """The run, in its folder."""
    checkpoint_sha256 = sha256(args.checkpoint)
    with main_process_first():
        needed = needed_bytes(pretrained.model, len(tasks))
        enter(folder, args, hardware, needed, checkpoint_sha256=checkpoint_sha256)
    config = describe_run(args, hardware, data[0].images.device) | {"checkpoint_sha256": checkpoint_sha256}
    write_json(folder.config, config)

    model = to_device(pretrained.model, hardware)
    sizes = [len(task.forget) for task in tasks]
    counts = f"{len(sizes)} × {sizes[0]}" if len({*sizes}) == 1 else " + ".join(map(str, sizes))
    print(
        f"{METHODS[args.method].title} on {data[0].name}: {counts} of {len(data[0].classes)} classes, "
        f"{model.architecture.model}, {hardware.describe()} → {folder.path}",
        flush=True,
    )
    results = ContinualRun(args, METHODS[args.method](args, hardware), model, data, tasks, folder).run()
    table = narrow_table([results], [METHODS[args.method].title])
    print(f"\n{table}\n\nresults, checkpoints and figure: {folder.path}")


if __name__ == "__main__":
    run_main(main)
