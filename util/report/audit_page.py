"""The page of an audit: one HTML file without script or network, for a data-protection officer first, then a researcher.

Here numbers become places and paths; the words, marks and colours are in `audit_page.html.j2`. Strips are placed in percent
of their width, so that they stretch while their text does not; curves and maps are paths in a box, which scales as a whole.
"""

import base64
import io
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath
from statistics import fmean

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from util.audit import title_of
from util.audit.base import FAMILIES
from util.audit.statistics import INCONCLUSIVE, MARGIN, POWER, WITHIN
from util.audit.verdict import BORROWED_SCALE, MIN_FAMILIES, counts, significantly_off
from util.report.audit_tables import OFF, never_seen_utility, ruin, strangers_note, summary, utility_titles

TEMPLATE = Path(__file__).with_suffix(".html.j2")
MODELS = {"before": "the pre-trained model", "after": "this model", "never seen": "a model that never saw them"}
AXIS = -0.5, 1.5  # of strips, in ρ
SHOWN = 1  # least power of a figure with a strip: below, ρ is noise
MOST_SHOWN = 20  # references
WIDTH, HEIGHT = 276, 180  # of the area of a curve
MAP, BORDER = 240, 10
MARKS = {  # a path around the place that is marked; "small" is for originals beside the pre-trained model
    "never": "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "after": "m-3-8h6v16h-6z",
    "before": "m0-6l6 6-6 6-6-6z",
    "small": "m0-4l4 4-4 4-4-4z",
    "below": "m-7 0l9-5v10z",  # beyond the ends of the axis
    "above": "m7 0l-9-5v10z",
}
SHAPES = {"kept": "h0", "never seen": "m-2.5-2.5l5 5m0-5l-5 5", "forgotten": "m0-3.5l3.5 3.5-3.5 3.5-3.5-3.5z"}  # last: top
GOLDEN_ANGLE = 137.5  # between the hues of two people: however many, neighbours differ
LEAST_FAR = 1e-3
FACE = 96  # most pixels of a face's side

Points = Callable[[dict], tuple[np.ndarray, np.ndarray]]  # a curve → x from 0 to 1, y in percent


def audit_page(audit: dict, pictures: list[dict | None], title: str) -> str:
    """The whole HTML text.

    audit:    the content of audit.json.
    pictures: of each request, as `util.audit.pictures` draws them, or None; models are keys of MODELS, groups of SHAPES.
    """
    spaces = {"trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined, **spaces)
    environment.filters |= {"number": _number, "never_seen": never_seen_utility, "ruin": ruin, "titles": utility_titles}
    environment.filters |= {"summary": summary, "strangers_note": strangers_note, "shown": shown}
    environment.filters["name"] = lambda name: Markup("_<wbr>").join(name.split("_"))
    environment.filters["file"] = lambda path: "/".join(PurePath(path).parts[-3:])
    requests = [_request(*both) for both in zip(audit["requests"], pictures, strict=True)]
    words = {"models": MODELS, "margin": MARGIN, "within": WITHIN, "power": POWER, "enough": MIN_FAMILIES, "off": OFF}
    drawn = {"marks": MARKS, "place": _place, "shapes": SHAPES, "width": WIDTH, "height": HEIGHT, "map_size": MAP}
    return environment.get_template(TEMPLATE.name).render(words | drawn, title=title, audit=audit, requests=requests)


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def _request(request: dict, pictures: dict | None) -> dict:
    """A request with all that is drawn of it."""
    strips = [_strip(key, entry) for key, entry in request["figures"].items()]
    groups = {family: [s for s in strips if s["verdict"] and s["family"] == family] for family in FAMILIES}
    view = request | {"strips": strips, "groups": groups, "panels": [*_panels(request["curves"])]}
    if pictures is None:
        return view | {"maps": {}, "faces": []}
    maps = {model: _scatter(pictures["map"][model], pictures["people"]) for model in MODELS}
    faces = [_face(face) | {m: [_face(n) for n in face[m]] for m in MODELS} for face in pictures["neighbours"]]
    same = {m: [near["same"] for face in faces for near in face[m]] for m in MODELS}
    return view | {"maps": maps, "faces": faces, "same": same}


def _place(rho: float) -> float:
    """Where a ρ is on the axis of strips, in percent."""
    low, high = AXIS
    return 100 * (min(max(rho, low), high) - low) / (high - low)


def _strip(key: str, entry: dict) -> dict:
    """An entry of `figures` with its title; whether it counts for the verdict, and is significantly `off`; `why` it is
    inconclusive; and by CSS class what is `drawn` on its axis: (place in percent, value)."""
    never = fmean(entry["references"] or [0])
    strip = entry | {"key": key, "title": title_of(key), "digits": 2 if key == "cka" else 1, "drawn": {}, "why": ""}
    strip |= {"counts": counts(key, entry), "off": significantly_off(key, entry)}
    if entry["verdict"] == INCONCLUSIVE:
        wide = "no sign of knowing" if entry["significant"] else "never-seen models differ as much"
        strip["why"] = f"power {_number(entry['power'])}, too low" if entry["power"] < POWER else wide
    if entry["verdict"] and entry["power"] >= SHOWN:
        originals = [] if key in BORROWED_SCALE else entry["originals"]  # which show nothing of such a figure
        values = {"small": originals[1:], "before": originals[:1], "after": [entry["value"]]}
        values["never"] = shown(entry["references"])
        values["interval"] = sorted(entry["interval"] or [entry["value"]] * 2, reverse=entry["known"] < never)
        places = {css: [_place((value - never) / (entry["known"] - never)) for value in values[css]] for css in values}
        strip["drawn"] = {css: [*zip(places[css], values[css], strict=True)] for css in values}
    return strip


def shown(references: list[float]) -> list[float]:
    """All, or of many groups of strangers the middles of MOST_SHOWN equal parts, in order."""
    if len(references) <= MOST_SHOWN:
        return references
    return np.quantile(references, (np.arange(MOST_SHOWN) + 0.5) / MOST_SHOWN).tolist()


def _panels(curves: dict) -> Iterable[dict]:
    """Of the curves that there are, as `_panel` makes them."""
    if "roc" in curves:
        ticks = [(1 + np.log10(rate) / 3, f"{rate:.1%}" if rate < 0.01 else f"{rate:.0%}") for rate in (1e-3, 1e-2, 1e-1, 1)]
        yield _panel("Verification (ROC)", "pairs of one person accepted", "false match rate", curves["roc"], _roc, ticks)
    if "probe" in curves:
        layers = [layer.removeprefix("block ") for layer in curves["probe"]["after"]["layers"]]
        places, every = np.linspace(0, 1, len(layers)), -(-len(layers) // 9)
        ticks = [*zip(places[::-every], ["emb.", *layers[::-1][every::every]], strict=True)]
        for key, among in (("all", "everybody"), ("forgotten", "the forgotten")):
            title = f"Linear probe among {among}"
            yield _panel(title, "recognized", "block", curves["probe"], lambda c, key=key: (places, np.array(c[key])), ticks)
    titles = {"relearn_1": "on one photo each", "relearn_5": "on five photos each", "relearn_kept_only": "on others' photos"}
    for key in (key for key in titles if key in curves):
        steps = curves[key]["after"]["steps"]
        ticks = [(np.log1p(step) / np.log1p(steps[-1]), str(step)) for step in steps]
        yield _panel(f"Relearning {titles[key]}", "recognized", "training steps", curves[key], _relearning, ticks)
    if "cka" in curves:
        about, x = "similarity to the pre-trained model", "similarity to models that never saw them"
        ticks = [(share, f"{share:.1f}") for share in (0, 0.5, 1)]
        panel = _panel("Where the faces lie (CKA)", about, x, curves["cka"], _cka, ticks)
        lines = [(css, path + MARKS[css]) for css, path in panel["lines"]]
        yield panel | {"y_ticks": ticks, "lines": lines, "kind": "points"}


def _panel(title: str, about: str, x: str, curves: dict, points: Points, ticks: list[tuple[float, str]]) -> dict:
    """Ticks are (place from 0 to 1, text), lines (CSS class, path): the pre-trained model's, dashed, last, to hide none."""
    drawn = [("never", curve) for curve in curves["references"]] + [("after", curves["after"]), ("before", curves["before"])]
    lines = [(css, _path(*points(curve))) for css, curve in drawn]
    y_ticks = [(share, f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 1)]
    return {"title": title, "about": about, "x": x, "x_ticks": ticks, "y_ticks": y_ticks, "lines": lines, "kind": "lines"}


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """Through points in [0, 1] and in percent."""
    return "M" + "L".join(f"{WIDTH * a:.1f} {HEIGHT * (1 - b / 100):.1f}" for a, b in zip(x, y, strict=True))


def _roc(curve: dict) -> tuple[np.ndarray, np.ndarray]:
    """On a logarithmic axis of the false match rate: differences at 1% are what is looked for."""
    x = np.linspace(0, 1, 121)
    reached = np.searchsorted(curve["far"], LEAST_FAR ** (1 - x), side="right") - 1
    return x, 100 * np.array(curve["tar"])[reached]


def _relearning(curve: dict) -> tuple[np.ndarray, np.ndarray]:
    steps = np.log1p(curve["steps"])
    return steps / steps[-1], np.array(curve["accuracy"])


def _cka(curve: dict) -> tuple[np.ndarray, np.ndarray]:
    return np.array([curve["references"]]), np.array([100 * curve["before"]])


def _scatter(groups: dict[str, np.ndarray], people: list[str]) -> list[dict]:
    """A path for each group of points and each forgotten person, a mark per point: the same scale both ways."""
    every = np.concatenate([*groups.values()])
    low, high = every.min(axis=0), every.max(axis=0)
    scale = (MAP - 2 * BORDER) / ((high - low).max() or 1)  # a model may have but one embedding
    paths = []
    for group in (group for group in SHAPES if group in groups):
        marks = [f"M{x:.1f} {y:.1f}{SHAPES[group]}" for x, y in MAP / 2 + scale * (groups[group] - (low + high) / 2)]
        names = people if group == "forgotten" else [""] * len(marks)
        for number, name in enumerate(sorted({*names})):
            path = "".join(mark for mark, of in zip(marks, names, strict=True) if of == name)
            paths.append({"group": group, "name": name, "hue": round(number * GOLDEN_ANGLE) % 360, "path": path})
    return paths


def _face(about: dict) -> dict:
    """With the face (3, H, W) as a PNG in a data URI."""
    image = Image.fromarray(np.ascontiguousarray(about["face"].transpose(1, 2, 0)))
    image.thumbnail((FACE, FACE))
    image.save(file := io.BytesIO(), format="PNG", optimize=True)
    return about | {"face": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()}
