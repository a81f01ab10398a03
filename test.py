"""Evaluate a checkpoint, ours or a published one: accuracy without and with the head's margin, per class, and verification.

python test.py --checkpoint FILE --data DIR
python test.py --checkpoint FILE --pairs lfw.bin pairs.txt:FOLDER                        the field's verification benchmarks
python test.py --checkpoint RUN/checkpoints/task_4.pth --data DIR --whole-classifier DIR    and the classes beyond DIR's
python test.py --checkpoint PRETRAINED --adapters task_1.safetensors task_2.safetensors    the model after task 2
python test.py --checkpoint RUN/checkpoints/task_2.pth --deposit RUN/deposits/task_2.safetensors    LIRF: what is recovered
python test.py --verify-record RUN/deletions/task_2.json                                 is the record of deletion true?
Leaves config.json, test.json, per_class.csv in --output-dir.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from backbone.blocks import replace_lower_half
from backbone.lora import apply_adapters
from backbone.recognizer import to_device
from data import build_datasets, place_images
from data.cache import cache_folder
from data.image_folder import flat_folder
from data.image_set import ImageSet
from data.pairs import load_pairs
from data.tasks import named_classes
from util.cli import options
from util.cli.config import describe_command
from util.cli.main import run_main
from util.evaluation.evaluate import Predictions, embed_images, predict, predictions_of
from util.evaluation.verification import BENCHMARK_RATES, FALSE_ACCEPT_RATES, pair_benchmark, verify
from util.runtime.errors import RunError, UsageError
from util.runtime.files import load_tensors, read_json, readable, write_json, write_text
from util.runtime.hardware import Hardware
from util.storage.checkpoint import Checkpoint, align_classes, load_checkpoint
from util.storage.folders import CONFIG, claim, default_folder
from util.training.deletion_record import load_record, settings_of
from util.training.record_check import signatures, verify_record
from util.training.start import class_ids, whole_classifier

SCRIPT = Path(__file__).name


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.verify_record is not None:
        parser.use_defaults(settings_of(load_record(args.verify_record)))
        args = parser.parse_args(argv)
        for file in filter(None, (args.checkpoint, args.allowed_signers)):
            if not file.is_file():
                raise UsageError(f"no file {file}")
    elif args.checkpoint is None:
        raise UsageError("name the model with --checkpoint FILE, or a record with --verify-record FILE")
    return args


def build_parser() -> options.Parser:
    parser = options.Parser(__doc__)
    where = "checkpoint, ours or published; with --verify-record, the pre-trained one if it was moved"
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help=where)
    parser.add_argument("--verify-record", type=Path, metavar="FILE", help="record of deletion to recompute and check")
    signers = "OpenSSH's allowed signers: a record or audit that none of them has signed fails"
    parser.add_argument("--allowed-signers", type=Path, metavar="FILE", help=signers)
    parser.add_argument("--adapters", type=Path, nargs="+", default=[], metavar="FILE", help="adapters, by task")
    parser.add_argument("--deposit", type=Path, metavar="FILE", help="deposit of LIRF, in place of the lower half")
    options.add_published(parser)
    options.add_data(parser)
    help_text = f"classes to measure as a group (default: those that were forgotten): {options.NAMES}"
    parser.add_argument("--forget-classes", type=options.class_list, metavar="LIST", help=help_text)
    help_text = "restore the model's own classifier, and measure the classes of DIR/<class>/<image> that --data lacks"
    parser.add_argument("--whole-classifier", type=Path, metavar="DIR", help=help_text)
    options.add_pairs(parser, "to measure instead of --data")
    count = {"type": options.number(int, 0), "default": 20000}
    parser.add_argument("--random-pairs", **count, help="genuine pairs of test images, and impostor pairs as many")
    parser.add_argument("--seed", type=options.number(int, 0, 2**63), default=0, help="seed of the random pairs")
    options.add_hardware(parser)
    parser.add_argument("--output-dir", type=Path, help="folder of the results (default: one in exps/)")
    return parser


def confirm(args: argparse.Namespace) -> None:
    """Print every check of --verify-record. Raises RunError if one fails."""
    record = load_record(args.verify_record)
    hardware = options.start_hardware(args)
    pixels = record["images"]
    data = build_datasets(args, pixels["size"], hardware.device, crop_pct=pixels.get("crop_pct", 1.0))
    said = {True: "confirmed", False: "NOT SO", None: "not checked"}
    checks = verify_record(args.verify_record, record, data, hardware, args.checkpoint)
    checks += signatures(args.verify_record, args.allowed_signers)
    table = pd.DataFrame([(what, said[so], found) for what, so, found in checks], columns=["Record", "", "Found"])
    print(table.to_markdown(index=False, disable_numparse=True))
    failed, unknown = ([what for what, so, _ in checks if so is value] for value in (False, None))
    if failed:
        raise RunError(f"{args.verify_record}: {len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
    print(f"\n{args.verify_record}: confirmed" + f", but for {len(unknown)} that could not be checked" * bool(unknown))


def class_groups(args: argparse.Namespace, checkpoint: Checkpoint, classes: tuple[str, ...]) -> dict[str, list[int]]:
    """Named groups of class ids, from --forget-classes or what the checkpoint itself has forgotten."""
    everything, groups = {*range(len(classes))}, {}
    if args.forget_classes is not None:
        forget = {*named_classes(args.forget_classes, classes)}
        groups = {"forgotten": forget, "remaining": everything - forget}
    elif checkpoint.forgotten:
        forget, remain = {*checkpoint.forgotten[-1]}, everything.difference(*checkpoint.forgotten)
        groups = {"remaining": remain, "forgotten last": forget, "forgotten earlier": everything - remain - forget}
    return {name: sorted(members) for name, members in groups.items() if members}


def load_model(args: argparse.Namespace) -> Checkpoint:
    """The checkpoint, with the adapters or the deposit that `args` name."""
    checkpoint = load_checkpoint(args.checkpoint, args.head, args.published_adapters)
    backbone, image_size = checkpoint.model.backbone, checkpoint.model.architecture.image_size
    for path in args.adapters:
        apply_adapters(backbone, load_tensors(path), path)
    if args.deposit is not None:
        replace_lower_half(backbone, image_size, load_tensors(args.deposit), args.deposit)
    return checkpoint


def load_images(args: argparse.Namespace, checkpoint: Checkpoint, device: torch.device) -> tuple[ImageSet, dict]:
    """The test set, with the checkpoint's classes, and the groups of these. Images of forgotten classes may be gone."""
    a = checkpoint.model.architecture
    _, test_set = build_datasets(args, a.image_size, device, on_demand=True, crop_pct=a.crop_pct)
    (test_set,) = place_images(args, [test_set], device)
    groups = class_groups(args, checkpoint, checkpoint.classes or test_set.classes)
    forgotten = [c for name, classes in groups.items() if name != "remaining" for c in classes]
    (aligned,) = align_classes(checkpoint, [test_set], args.checkpoint, forgotten)
    if args.val_fraction is not None and aligned.classes != test_set.classes:
        raise UsageError("--val-fraction: the images held out depend on classes whose images are gone")
    return aligned, groups


def measure(
    embeddings: Tensor, predictions: Predictions, groups: dict[str, list[int]], args: argparse.Namespace
) -> tuple[dict, pd.DataFrame]:
    """Of each group of classes: its entry in test.json, and its row in the table that is printed."""
    measured, rows = {}, []
    for name, classes in groups.items():
        chosen = predictions.among(classes)
        found = {"classes": classes, "images": int(chosen.sum()), **predictions.accuracies(classes)}
        images = embeddings[chosen.to(embeddings.device)], predictions.labels[chosen]
        pairs = verify(*images, args.random_pairs, args.seed) or {}
        measured[name] = found | {"verification": pairs or None}
        row = {"Group": name, "Classes": len(classes), "Images": found["images"]}
        row |= {"Acc %": found["acc"], "Margin acc %": found["margin_acc"], "AUC %": pairs.get("auc")}
        rows.append(row | {f"TAR@{rate:g} %": pairs.get(f"tar_at_far_{rate:g}") for rate in FALSE_ACCEPT_RATES})
    return measured, pd.DataFrame(rows, dtype=object)


def pretrained(args: argparse.Namespace, checkpoint: Checkpoint) -> Checkpoint:
    """The model that the run of `checkpoint` began with."""
    path = args.checkpoint
    if "recipe" not in checkpoint.info:
        config = path.absolute().parent.parent / CONFIG
        with readable(config, "not the config.json of a run"):
            path = Path(read_json(config)["arguments"]["checkpoint"])
    return load_checkpoint(path)


def measure_others(args: argparse.Namespace, checkpoint: Checkpoint, hardware: Hardware) -> dict:
    """With the whole classifier: accuracy (%) on the classes of its folder that the checkpoint has not, before and after."""
    a, before = checkpoint.model.architecture, pretrained(args, checkpoint)
    recipe = before.info.get("recipe", {})
    models = {when: whole_classifier(recipe, each.model) for when, each in (("before", before), ("after", checkpoint))}
    images = flat_folder(args.whole_classifier, a.image_size, args.cache_dir or cache_folder(), a.crop_pct)
    rows, class_map = models["after"].architecture.num_classes, recipe.get("class_map")
    ids = class_ids(images.classes, rows, class_map and Path(class_map))
    others = [row for name, row in zip(images.classes, ids, strict=True) if name not in checkpoint.classes]
    if not others:
        raise UsageError(f"--whole-classifier {args.whole_classifier}: all of its classes are the checkpoint's")
    images = replace(images, labels=torch.tensor(ids)[images.labels])
    found = {"rows": rows, "classes": len(others)}
    for when, model in models.items():
        predictions = predict(to_device(model, hardware), images, hardware)
        found |= {"images": int(predictions.among(others).sum()), when: predictions.accuracies(others)["acc"]}
    print(
        f"\n{len(others)} other classes, {found['images']} images, with all {rows} rows of the classifier: "
        f"accuracy {found['before']:.2f}% before, {found['after']:.2f}% after"
    )
    return found


def measure_pairs(args: argparse.Namespace, checkpoint: Checkpoint, hardware: Hardware, output: Path) -> None:
    """The benchmarks of --pairs, printed and in test.json."""
    a = checkpoint.model.architecture
    pairs = load_pairs(args.pairs, a.image_size, args.cache_dir, a.crop_pct)
    measured = pair_benchmark(to_device(checkpoint.model, hardware), pairs, hardware)
    rates = {f"tar_at_far_{rate:g}": f"TAR@FAR={rate:g} %" for rate in BENCHMARK_RATES}
    heads = {"genuine_pairs": "Genuine", "impostor_pairs": "Impostor", "accuracy": "Acc %", "accuracy_std": "±"}
    heads |= {"auc": "AUC %"} | rates
    table = pd.DataFrame(measured.values(), dtype=object)[[*heads]].rename(columns=heads)
    table.insert(0, "Pairs", [*measured])
    print(table.to_markdown(index=False, floatfmt=".2f", missingval="–", numalign="right"))
    if table.isna().to_numpy().any():
        print("–: too few impostor pairs for that FAR")
    write_json(output / CONFIG, describe_command(args, SCRIPT))
    write_json(output / "test.json", {"checkpoint": str(args.checkpoint), "pairs": measured})
    print(f"\nall numbers: {output}")


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    if args.verify_record is not None:
        return confirm(args)
    hardware = options.start_hardware(args)
    checkpoint = load_model(args)
    more = [*args.adapters, *filter(None, [args.deposit])]
    what = " ".join(args.pairs or []) or (args.forget_classes or "") + str(args.whole_classifier or "")
    output = args.output_dir or default_folder("test", args.checkpoint, *more, suffix=what)
    claim(output, SCRIPT)
    if (output / CONFIG).exists():
        saved = read_json(output / CONFIG).get("arguments", {})
        if other := options.first_difference(saved, args, {"output_dir", "cache_dir", "device", "images"}):
            raise UsageError(f"{output} holds results of other options: {other}; choose another --output-dir")
    if args.pairs:
        return measure_pairs(args, checkpoint, hardware, output)
    test_set, groups = load_images(args, checkpoint, hardware.device)
    model = to_device(checkpoint.model, hardware)
    embeddings = embed_images(model, test_set, hardware)
    if not embeddings.isfinite().all():
        raise RunError(f"{args.checkpoint}: embeddings of the test images are not finite")
    predictions = predictions_of(model, embeddings, test_set.labels)
    everything = {"all": list(range(len(test_set.classes)))}
    measured, table = measure(embeddings, predictions, everything | groups, args)
    print(table.to_markdown(index=False, floatfmt=".2f", missingval="–", numalign="right"))

    group_of = {c: name for name, classes in groups.items() for c in classes}
    per_class = pd.DataFrame(
        {"class": c, "name": name, "group": group_of.get(c), "images": int((predictions.labels == c).sum())}
        | predictions.accuracies([c])
        for c, name in enumerate(test_set.classes)
    )
    write_json(output / CONFIG, describe_command(args, SCRIPT))
    found = {"checkpoint": str(args.checkpoint), "dataset": test_set.name, "groups": measured}
    if args.whole_classifier:
        found["whole_classifier"] = measure_others(args, checkpoint, hardware)
    write_json(output / "test.json", found)
    write_text(output / "per_class.csv", per_class.round(4).to_csv(index=False))
    print(f"\nper class, and all numbers: {output}")


if __name__ == "__main__":
    run_main(main)
