"""Set runs side by side in one table: any number of results.json files, runs of one method averaged over their seeds.

python scripts/table.py --results exps/*/results.json --output-dir exps/table
python scripts/table.py --results RUN/results.json --published --output-dir exps/table     beside the papers' numbers
Leaves table.md, table.csv, table.tex and figure.png.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

# A script's own folder, not the repository's root, is where Python looks first.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from methods import METHODS
from util.cli.main import run_main
from util.report.results import load_results
from util.report.tables import Comparison
from util.report.write import write_report
from util.runtime.errors import UsageError


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, nargs="+", required=True, metavar="FILE", help="results.json of each run")
    parser.add_argument("--labels", nargs="+", help="a name for each run; equal names are averaged; none: the methods")
    parser.add_argument("--published", action="store_true", help="add the papers' rows (CASIA-100 alone), by the margin")
    parser.add_argument("--output-dir", type=Path, required=True, help="where the table and the figure go")
    args = parser.parse_args(argv)
    if args.labels and len(args.labels) != len(args.results):
        raise UsageError(f"{len(args.labels)} labels for {len(args.results)} results: give one each")
    return args


def load_runs(paths: list[Path], labels: list[str] | None) -> tuple[list[dict], list[str]]:
    """The finished tasks of each run and its label, in the order of the papers' tables."""
    runs = [load_results(path) for path in paths]
    unfinished = next((path for path, run in zip(paths, runs, strict=True) if not run["tasks"]), None)
    if unfinished is not None:
        raise UsageError(f"{unfinished} has no finished task")
    if labels is None:
        known = Counter((run["method"], run["seed"]) for run in runs)
        twice = next((key for key, count in known.items() if count > 1), None)
        if twice is not None:
            raise UsageError(f"{twice[0]} with seed {twice[1]} is there more than once: tell the runs apart with --labels")
        order = [*METHODS]
        runs.sort(key=lambda run: (order.index(run["method"]) if run["method"] in order else len(order), run["seed"]))
        labels = [METHODS[run["method"]].title if run["method"] in METHODS else run["method"] for run in runs]
    return runs, labels


def main(argv: list[str] | None) -> None:
    args = parse_arguments(argv)
    comparison = Comparison(*load_runs(args.results, args.labels))
    if args.published:
        comparison.add_published()
    write_report(comparison, args.output_dir)
    print(f"{comparison.markdown()}\n\ntables and figure: {args.output_dir}")


if __name__ == "__main__":
    run_main(main)
