"""Draw what forgetting cost kept people against what is left of forgotten people, from the rows of an audit.

python scripts/scatter.py docs/results/casia100_defaults_audit.csv docs/scatter.png \\
    --title "CASIA-100: 20 of 100 people forgotten"
The rows are those of audit.csv, which scripts/audit.py leaves in a comparison's folder: its first request.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root

import pandas as pd

from util.cli import options
from util.cli.main import run_main
from util.report.comparison_page import scatter_of
from util.report.figures import save_figure
from util.runtime.files import readable


def main(argv: list[str]) -> None:
    parser = options.Parser(__doc__, "%(prog)s CSV PNG [options]")
    parser.add_argument("rows", type=Path, metavar="CSV", help="rows of an audit")
    parser.add_argument("figure", type=Path, metavar="PNG", help="file of the figure")
    parser.add_argument("--title", default="", help="title of the figure")
    parser.add_argument("--class-order", type=int, default=1337, help="class order to draw")
    args = parser.parse_args(argv)
    with readable(args.rows, "no rows of an audit"):
        rows = pd.read_csv(args.rows)
        rows = rows[(rows["class_order"] == args.class_order) & (rows["request"] == 1) & (rows["after_task"] == 1)]
        figure = scatter_of(rows, args.title)
    save_figure(figure, args.figure)


if __name__ == "__main__":
    run_main(main)
