"""Options that do nothing beside others: refused, from one table, instead of ignored without a word."""

import argparse
from collections.abc import Callable, Sequence

from data import SYNTHETIC
from util.runtime.errors import UsageError

Arguments = argparse.Namespace
OF_SYNTHETIC = "--identities --train-per-identity --test-per-identity --data-seed"
OF_EVALUATION = "--adapters --deposit --forget-classes --whole-classifier --pairs --random-pairs --seed --output-dir"
OF_CLASSES = f"--data {OF_SYNTHETIC} --val-fraction --forget-classes --whole-classifier --random-pairs --seed"
OF_REFERENCES = "--num-references --num-originals --jobs-per-gpu"
# Which options, when they do nothing, in words and as a condition on the arguments.
TABLE: tuple[tuple[str, str, Callable[[Arguments], bool]], ...] = (
    (OF_SYNTHETIC, f"unless --data is {SYNTHETIC}", lambda a: a.data != SYNTHETIC),
    ("--min-lr", "with --sched step", lambda a: a.sched == "step"),
    ("--min-lr", "above --lr", lambda a: a.min_lr > a.lr),
    ("--decay-on", "with --weight-decay 0", lambda a: a.weight_decay == 0),
    ("--init --pretrained", "with --weights, which says where to start", lambda a: getattr(a, "weights", None) is not None),
    ("--published-adapters", "without --weights", lambda a: getattr(a, "weights", "none here") is None),
    ("--allow-copies", "without --forget-classes", lambda a: a.forget_classes is None),
    ("--seed", "with --random-pairs 0", lambda a: getattr(a, "random_pairs", None) == 0),
    (OF_CLASSES, "with --pairs, which are measured alone", lambda a: hasattr(a, "random_pairs") and bool(a.pairs)),
    (OF_EVALUATION, "with --verify-record", lambda a: getattr(a, "verify_record", None) is not None),
    ("--allowed-signers", "without --verify-record", lambda a: a.verify_record is None),
    ("--originals", "without --references", lambda a: a.references is None),
    ("--requests", "without a RUN", lambda a: not a.runs),
    (OF_REFERENCES, "with --references, which are given", lambda a: getattr(a, "references", None) is not None),
    ("--gpus --jobs-per-gpu", "with --cluster slurm: see --sbatch", lambda a: getattr(a, "cluster", "local") != "local"),
    ("--sbatch", "without --cluster slurm", lambda a: a.cluster == "local"),
    ("--sweep", "without --labels", lambda a: a.labels is None),
)


def given_options(argv: Sequence[str]) -> set[str]:
    """The options that a command line names: `--lr` of `--lr 1` and of `--lr=1`."""
    return {word.split("=", 1)[0] for word in argv if word.startswith("--")}


def refuse_ignored(args: Arguments, given: set[str]) -> None:
    """Raise UsageError for the first of the options `given`, with another value than the default, that does nothing."""
    for options, when, ignored in TABLE:
        for name in options.split():
            if name in given and ignored(args):
                raise UsageError(f"{name} does nothing {when}: leave it out")
