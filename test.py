"""Evaluate a checkpoint, ours or a published one: recognition in both readings, per class and group, and verification.

python test.py --checkpoint FILE --data DIR
python test.py --checkpoint PRETRAINED --adapters task_1.safetensors task_2.safetensors    the model after task 2
python test.py --checkpoint RUN/checkpoints/task_2.pth --results RUN/results.json          the groups of that run
python test.py --checkpoint RUN/checkpoints/task_2.pth --deposit RUN/deposits/task_2.safetensors    LIRF: what is recovered
python test.py --verify-record RUN/deletions/task_2.json                                 is the record of deletion true?
Leaves test.json, per_class.csv and roc.png in --output-dir.
"""

import argparse
import csv
import io
import sys
from pathlib import Path

from backbone.halves import replace_lower_half
from backbone.lora import apply_adapters
from backbone.recognizer import to_device
from data import build_datasets
from data.image_set import ImageSet
from data.tasks import named_classes
from util.cli import options
from util.cli.main import run_main
from util.evaluation.evaluate import Predictions, embed_images, predictions_of
from util.evaluation.verification import FALSE_ACCEPT_RATES, verify
from util.report.results import load_results
from util.report.tables import markdown_table, percent
from util.runtime.errors import RunError, UsageError
from util.runtime.files import load_tensors, write_json, write_text
from util.storage.checkpoint import Checkpoint, check_classes, load_checkpoint
from util.training.deletion_record import load_record, verify_record

Groups = dict[str, list[int]]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    chooser = options.Parser(add_help=False)
    add_record_option(chooser)
    record = chooser.parse_known_args(argv)[0].verify_record
    parser = build_parser()
    if record is not None:
        parser.use_defaults({"checkpoint": None} | settings_of(load_record(record)))
    args = parser.parse_args(argv)
    if args.forget_classes is not None and args.results is not None:
        raise UsageError("--forget-classes and --results both name the groups: give one of them")
    return args


def build_parser() -> options.Parser:
    parser = options.Parser(description=__doc__.splitlines()[0])
    add_record_option(parser)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="ours or published layout")
    parser.add_argument(
        "--adapters", type=Path, nargs="+", default=[], metavar="FILE", help="adapter files to add, in the order of tasks"
    )
    parser.add_argument(
        "--deposit", type=Path, metavar="FILE", help="LIRF's deposit, in place of the checkpoint's lower half"
    )
    parser.add_argument("--head", help="head of a published checkpoint, which does not name its own (default: cosface)")
    options.add_data(parser)
    group = parser.add_argument_group("groups of classes")
    group.add_argument("--forget-classes", metavar="LIST", help="ids or names, separated by commas, against the others")
    group.add_argument("--results", type=Path, metavar="FILE", help="take the groups from a run's results.json")
    group.add_argument("--task", type=int, help="task of --results (default: the checkpoint's own, or the last)")
    group = parser.add_argument_group("verification")
    group.add_argument(
        "--pairs", type=options.number(int, 0), default=20000, help="genuine and impostor pairs to draw, each; 0: none"
    )
    group.add_argument("--seed", type=int, default=0, help="seed of the pairs")
    options.add_hardware(parser)
    parser.add_argument("--output-dir", type=Path, help="default: exps/test-<folder>-<checkpoint>")
    return parser


def add_record_option(parser: options.Parser) -> None:
    parser.add_argument(
        "--verify-record", type=Path, metavar="FILE", help="recompute a run's deletions/task_<t>.json, and say if it is true"
    )


def settings_of(record: dict) -> dict:
    """The data and the arithmetic that a record was made with, as defaults of our options."""
    keys = ("data", "val_fraction", "identities", "train_per_identity", "test_per_identity", "data_seed")
    settings = {key: record["arguments"][key] for key in keys if key in record["arguments"]}
    hardware = record["hardware"]
    last_block = "on" if hardware.get("cls_only_last_block") else "off"
    return settings | {"precision": "bf16" if hardware.get("bf16") else "fp32", "cls_only_last_block": last_block}


def confirm(args: argparse.Namespace) -> None:
    """Print every check of --verify-record. Raises RunError if one fails."""
    record = load_record(args.verify_record)
    hardware = options.hardware_of(args)
    data = build_datasets(args, record["images"]["size"], hardware.device)
    failed, rows = [], []
    for what, so, details in verify_record(args.verify_record, record, data, hardware):
        rows.append([what, "not checked" if so is None else "confirmed" if so else "NOT SO", details])
        failed += [what] * (so is False)
    print(markdown_table(["Record", "", "Found"], rows))
    if failed:
        raise RunError(f"{args.verify_record}: {len(failed)} of {len(rows)} checks failed: {', '.join(failed)}")
    print(f"\n{args.verify_record}: confirmed")


def class_groups(args: argparse.Namespace, checkpoint: Checkpoint, test_set: ImageSet) -> Groups:
    """Named groups of class ids, from --forget-classes, --results, or what the checkpoint itself has forgotten."""
    everything = range(len(test_set.classes))
    if args.forget_classes is not None:
        forget = named_classes(args.forget_classes, test_set.classes)
        return {"forgotten": forget, "remaining": [c for c in everything if c not in forget]}
    if args.results is not None:
        return groups_of_results(args, checkpoint, test_set)
    if not checkpoint.forgotten:
        return {}
    *earlier, latest = checkpoint.forgotten
    old = [c for classes in earlier for c in classes]
    return named_groups([c for c in everything if c not in {*old, *latest}], latest, old)


def groups_of_results(args: argparse.Namespace, checkpoint: Checkpoint, test_set: ImageSet) -> Groups:
    tasks = load_results(args.results)["tasks"]
    wanted = args.task or len(args.adapters) or len(checkpoint.forgotten) or len(tasks)
    chosen = next((task for task in tasks if task["task"] == wanted), None)
    if chosen is None:
        raise UsageError(f"{args.results} has no task {wanted}: it has {', '.join(str(t['task']) for t in tasks) or 'none'}")
    forget, remain = chosen["forget_classes"], chosen["remain_classes"]
    if max(*forget, *remain) >= len(test_set.classes):
        raise UsageError(f"{args.results} is of another data set: it names class {max(*forget, *remain)}")
    old = [c for c in range(len(test_set.classes)) if c not in {*forget, *remain}]
    return named_groups(remain, forget, old)


def named_groups(remain: list[int], forget: list[int], old: list[int]) -> Groups:
    groups = {"remaining": remain, "forgotten last": forget, "forgotten earlier": old}
    return {name: classes for name, classes in groups.items() if classes}


def per_class_csv(predictions: Predictions, classes: tuple[str, ...], groups: Groups) -> str:
    group_of = {c: name for name, members in groups.items() for c in members}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "name", "group", "images", "acc", "margin_acc"])
    for c, name in enumerate(classes):
        accuracies = ["" if value is None else round(value, 4) for value in predictions.accuracies([c]).values()]
        writer.writerow([c, name, group_of.get(c, ""), int((predictions.labels == c).sum()), *accuracies])
    return text.getvalue()


def main(argv: list[str] | None) -> None:
    args = parse_arguments(argv)
    if args.verify_record is not None:
        confirm(args)
        return
    hardware = options.hardware_of(args)
    checkpoint = load_checkpoint(args.checkpoint, args.head)
    for path in args.adapters:
        apply_adapters(checkpoint.model.backbone, load_tensors(path), path)
    if args.deposit is not None:
        replace_lower_half(checkpoint.model.backbone, load_tensors(args.deposit), args.deposit)
    _, test_set = build_datasets(args, checkpoint.model.architecture.image_size, hardware.device)
    check_classes(checkpoint, test_set, args.checkpoint)
    groups = class_groups(args, checkpoint, test_set)
    model = to_device(checkpoint.model, hardware)

    embeddings = embed_images(model, test_set, hardware)
    predictions = predictions_of(model, embeddings, test_set.labels)
    measured, rows, curves = {}, [], {}
    for name, classes in ({"all": list(range(len(test_set.classes)))} | groups).items():
        chosen = predictions.among(classes)
        measured[name] = {"classes": classes, "images": int(chosen.sum()), **predictions.accuracies(classes)}
        pairs = verify(embeddings[chosen.to(embeddings.device)], predictions.labels[chosen], args.pairs, args.seed)
        if pairs is not None:
            curves[name] = pairs.pop("curve")
        measured[name]["verification"] = pairs
        rows.append(_row(name, measured[name]))
    header = ["Group", "Classes", "Images", "Acc %", "Margin acc %", "AUC %", *(f"TAR@{r:g} %" for r in FALSE_ACCEPT_RATES)]
    print(markdown_table(header, rows))

    output = args.output_dir or Path("exps") / f"test-{args.checkpoint.parent.name}-{args.checkpoint.stem}"
    sources = {"checkpoint": str(args.checkpoint), "adapters": [str(path) for path in args.adapters]}
    sources["deposit"] = None if args.deposit is None else str(args.deposit)
    write_json(output / "test.json", {**sources, "dataset": test_set.name, "groups": measured})
    write_text(output / "per_class.csv", per_class_csv(predictions, test_set.classes, groups))
    if curves:
        from util.report.figures import roc_figure, save_figure

        save_figure(roc_figure(curves), output / "roc.png")
    print(f"\nper class, figures and numbers: {output}")


def _row(name: str, values: dict) -> list[str]:
    pairs = values["verification"] or {}
    rates = [percent(pairs.get(key)) for key in ("auc", *(f"tar_at_far_{rate:g}" for rate in FALSE_ACCEPT_RATES))]
    accuracies = [percent(values["acc"]), percent(values["margin_acc"])]
    return [name, str(len(values["classes"])), str(values["images"]), *accuracies, *rates]


if __name__ == "__main__":
    run_main(main)
