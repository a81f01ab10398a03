"""Set single-step runs side by side: one table and one figure from their results.json files."""

import argparse
import sys
from pathlib import Path

# A script's own folder, not the repository's root, is where Python looks first.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.cli.main import run_main
from util.report.figures import save_figure, sweep_figure
from util.report.results import load_results
from util.report.tables import sweep_table
from util.runtime.errors import UsageError
from util.runtime.files import write_text


def main(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", required=True, help="what differs between the runs, for the titles")
    parser.add_argument("--labels", nargs="+", required=True, help="the value of each run")
    parser.add_argument("--results", type=Path, nargs="+", required=True, help="results.json of each run")
    parser.add_argument("--output-dir", type=Path, required=True, help="table.md and figure.png go here")
    args = parser.parse_args(argv)
    if len(args.labels) != len(args.results):
        raise UsageError(f"{len(args.labels)} labels for {len(args.results)} results: give one each")
    runs = [load_results(path) for path in args.results]
    unfinished = next((path for path, run in zip(args.results, runs, strict=True) if not run["tasks"]), None)
    if unfinished is not None:
        raise UsageError(f"{unfinished} has no finished task")
    first = runs[0]
    title = f"{first['method']} on {first['dataset']['name']}, {first['tasks'][-1]['setting']}, seed {first['seed']}"
    table = f"{title}\n\n{sweep_table(args.sweep, args.labels, runs)}\n"
    write_text(args.output_dir / "table.md", table)
    save_figure(sweep_figure(title, args.sweep, args.labels, runs), args.output_dir / "figure.png")
    print(f"\n{table}\ntable and figure: {args.output_dir}")


if __name__ == "__main__":
    run_main(main)
