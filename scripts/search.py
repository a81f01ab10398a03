"""Try the values of a method's options on a grid, and set the outcomes side by side, best first.

python scripts/search.py --method ewc --grid lr=1e-4,1e-3 lambda=1,10 --seeds 1337 1 -- \\
    --checkpoint FILE --data DIR --val-fraction 0.2
What follows -- goes to train_forget.py; with --val-fraction there, the test set is not looked at.
"""

import argparse
import contextlib
import itertools
import sys
from pathlib import Path

# A script's own folder, not the repository's root, is where Python looks first.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_forget
from methods import METHODS
from util.cli.arguments import run_main
from util.report.results import load_results
from util.report.tables import markdown_table, percent
from util.runtime.errors import RunError, UsageError
from util.runtime.files import write_text

Grid = dict[str, list[str]]


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    argv = sys.argv[1:] if argv is None else argv
    ours, further = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--grid", nargs="+", required=True, metavar="OPTION=V1,V2", help="spaces in a value as +")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337])
    parser.add_argument("--output-dir", type=Path, required=True, help="table.md, and a folder for each run")
    return parser.parse_args(ours), further


def read_grid(entries: list[str]) -> Grid:
    grid: Grid = {}
    for entry in entries:
        option, _, values = entry.partition("=")
        if not option or not values:
            raise UsageError(f"--grid {entry!r}: write option=value,value")
        grid[option.lstrip("-")] = values.split(",")
    return grid


def outcome(runs: list[dict]) -> dict[str, float]:
    """Means over all tasks and runs of H, Acc_r and the loss of Acc_r, and the highest Acc_f and Acc_o of any task."""
    tasks = [task for run in runs for task in run["tasks"]]

    def values(key: str) -> list[float]:
        return [task["after"][key] for task in tasks if task["after"][key] is not None]

    mean = lambda numbers: sum(numbers) / len(numbers)  # noqa: E731
    return {
        "H ↑": mean(values("h_mean")),
        "Acc_r ↑": mean(values("acc_remain")),
        "most Acc_r lost": max(task["before"]["acc_remain"] - task["after"]["acc_remain"] for task in tasks),
        "most Acc_f": max(values("acc_forget")),
        "most Acc_o": max(values("acc_old"), default=0.0),
        "margin H ↑": mean(values("margin_h_mean")),
    }


def run_point(method: str, options: list[str], seed: int, folder: Path, further: list[str]) -> dict | None:
    """One run's results; None, and a line that says why, where it failed."""
    arguments = ["--method", method, *further, "--seed", str(seed), *options, "--output-dir", str(folder)]
    if not (folder / "figure.png").exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with (folder / "log.txt").open("w") as log, contextlib.redirect_stdout(log):
                train_forget.main([*arguments, "--overwrite"])
        except RunError as error:
            print(f"{' '.join(options)}, seed {seed}: {error}", file=sys.stderr)
            return None
    return load_results(folder / "results.json")


def main(argv: list[str] | None) -> None:
    args, further = parse_arguments(argv)
    grid = read_grid(args.grid)
    rows = []
    for point in itertools.product(*grid.values()):
        options = [word for option, value in zip(grid, point, strict=True) for word in (f"--{option}", *value.split("+"))]
        name = "-".join(f"{option}={value}" for option, value in zip(grid, point, strict=True))
        runs = [run_point(args.method, options, s, args.output_dir / f"{name}-seed{s}", further) for s in args.seeds]
        if None not in runs:
            rows.append((point, outcome(runs)))
            print(name, *(f"{key} {percent(value)}" for key, value in rows[-1][1].items()), sep="  ", flush=True)
    if not rows:
        raise RunError("no point of the grid could be run")
    rows.sort(key=lambda row: -row[1]["H ↑"])
    table = markdown_table([*grid, *rows[0][1]], [[*point, *map(percent, found.values())] for point, found in rows])
    title = f"{METHODS[args.method].title}, seeds {args.seeds}: {' '.join(further)}"
    write_text(args.output_dir / "table.md", f"{title}\n\n{table}\n")
    print(f"\n{table}")


if __name__ == "__main__":
    run_main(main)
