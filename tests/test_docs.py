"""Links between the pages lead somewhere, and the audit's page names every metric as scripts and pages do."""

import re

from tests.conftest import ROOT
from util.audit import AUDIT_METRICS

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages_lead_somewhere():
    broken = []
    for page in PAGES:
        for link in re.findall(r"(?:\]\(|src=\")(?!https?:)([^)\s\"]+)", page.read_text()):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
                broken.append(f"{page.name}: {link}")
    assert not broken


def test_the_audits_page_names_metrics_as_scripts_and_pages_do():
    text = (ROOT / "docs" / "audit.md").read_text().split("## From a metric")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:4]] for line in text.splitlines() if line.startswith("|")]
    groups, titles, keys = (" ".join(column) for column in zip(*cells, strict=True))
    assert [name for name in AUDIT_METRICS if f"`{name}`" not in groups] == []
    found = [(key, title) for figure in AUDIT_METRICS.values() for key, title in figure.titles.items()]
    assert [key for key, _ in found if f"`{key}`" not in keys] == []
    assert [title for _, title in found if title not in titles] == []
