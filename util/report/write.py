"""A comparison of runs as files: table.md, table.csv, table.tex and figure.png."""

from pathlib import Path

from util.report.tables import Comparison
from util.runtime.files import write_text


def write_report(comparison: Comparison, folder: Path) -> None:
    """Write the comparison's files to `folder`."""
    # matplotlib takes a second to import: only once there is something to draw.
    from util.report.figures import comparison_figure, save_figure

    write_text(folder / "table.md", comparison.markdown() + "\n")
    write_text(folder / "table.csv", comparison.csv())
    write_text(folder / "table.tex", comparison.latex())
    save_figure(comparison_figure(comparison), folder / "figure.png")
