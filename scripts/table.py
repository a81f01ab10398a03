"""Set runs side by side in one table: any number of results.json files, runs of one method averaged over their seeds.

python scripts/table.py --results exps/*/results.json --output-dir exps/table
python scripts/table.py --results RUN/results.json --published --output-dir exps/table     beside the papers' numbers
python scripts/table.py --results 4/results.json 8/results.json --labels 4 8 --sweep rank --output-dir exps/sweep
Leaves table.md, table.csv, table.tex and figure.png.
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root

from methods import METHODS
from util.cli import options
from util.cli.config import describe_command
from util.cli.main import run_main
from util.report.figures import write_tables
from util.report.results import load_results
from util.report.tables import PUBLISHED_OPTION, Comparison
from util.runtime.errors import UsageError
from util.runtime.files import write_json
from util.storage.folders import CONFIG, claim

SCRIPT = Path(__file__).name


def main(argv: list[str]) -> None:
    parser = options.Parser(__doc__)
    parser.add_argument("--results", type=Path, nargs="+", required=True, metavar="FILE", help="results.json of each run")
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="name of each run; equal ones are averaged")
    parser.add_argument("--sweep", metavar="TITLE", help="quantity that the labels are values of, the x axis of the figure")
    parser.add_argument("--published", **PUBLISHED_OPTION)
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of the table and the figure")
    args = parser.parse_args(argv)
    if args.labels and len(args.labels) != len(args.results):
        raise UsageError(f"{len(args.labels)} labels for {len(args.results)} results: give one each")

    runs = [load_results(path) for path in args.results]
    if args.labels is None:
        (method, seed), count = Counter((run["method"], run["seed"]) for run in runs).most_common(1)[0]
        if count > 1:
            raise UsageError(f"{method} with seed {seed} is there more than once: tell the runs apart with --labels")
        runs.sort(key=lambda run: ([*METHODS].index(run["method"]), run["seed"]))  # as in the papers' tables
    claim(args.output_dir, SCRIPT)
    write_json(args.output_dir / CONFIG, describe_command(args, SCRIPT))
    comparison = Comparison(runs, args.labels, published=args.published, sweep=args.sweep)
    write_tables(comparison, args.output_dir)
    print(*comparison.narrow(comparison.papers_margin), sep="\n")
    print(f"\nthe whole table and the figure: {args.output_dir}")


if __name__ == "__main__":
    run_main(main)
