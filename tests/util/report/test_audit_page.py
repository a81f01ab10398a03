import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from util.audit import AUDIT_METRICS
from util.audit.statistics import INCONCLUSIVE, OVER_FORGOTTEN, STILL_KNOWN, WITHIN
from util.audit.verdict import AS_IF_NEVER_SEEN, LIKE_STRANGERS, NOT_ENOUGH, UNLIKE_STRANGERS, judge
from util.report.audit_page import MODELS, audit_page

NASTY = '<b>&"x'
KEYS = "acc_forget sign_flip enrolment_1 enrolment_5 tpir_1pct verification_auc verification_tar_1pct "
KEYS += "verification_tar_01pct collapse_1pct probe_embedding probe_block_0 probe_block_1 membership_images "
KEYS += "membership_person relearn_1 relearn_5 relearn_kept_only cka"
FAMILY = {key: figure.family for figure in AUDIT_METRICS.values() for key in figure.titles}
UNMEASURED = {"tpir_1pct": "needs --strangers", "membership_person": f"needs {NASTY}"}
ONE_PHOTO = "re-identification from 1 photo"
NEVER, KNOWING = [22.0, 24.0, 23.5], [96.4, 95.0]
ALL = (STILL_KNOWN, OVER_FORGOTTEN, WITHIN, INCONCLUSIVE)


def figure(verdict: str, key: str = "enrolment_1", **other) -> dict:
    numbers = {
        "known": 95.7,
        "delta": 71.9,
        "z": 30.1,
        "p": 0.0,
        "rho": 0.98,
        "power": 61.0,
        "significant": verdict != INCONCLUSIVE,
    }
    entry = {"family": FAMILY.get(key, "verification"), "value": 95.1, "interval": [91.0, 98.0]}
    return {**entry, "references": NEVER, "originals": KNOWING, **numbers, "verdict": verdict, **other}


def curves() -> dict:
    probe = {"layers": ["block 0", "block 1", "embedding"], "all": [50.0, 60.0, 97.0], "forgotten": [60.0, 70.0, 99.0]}
    kinds = {"roc": {"far": [0, 0.01, 1], "tar": [0.2, 0.6, 1]}, "probe": probe, "cka": {"references": 0.6, "before": 0.9}}
    kinds |= {f"relearn_{how}": {"steps": [0, 1, 10], "accuracy": [20.0, 30.0, 90.0]} for how in ("1", "5", "kept_only")}
    return {name: {"after": curve, "before": curve, "references": [curve] * 3} for name, curve in kinds.items()}


def request(**other) -> dict:
    figures = {key: figure(ALL[number % len(ALL)], key) for number, key in enumerate(KEYS.split())}
    nothing = dict.fromkeys(figures["cka"]) | {"references": [], "originals": []}
    figures |= {key: {**nothing, "family": FAMILY[key], "reason": reason} for key, reason in UNMEASURED.items()}
    figures["enrolment_1"] = figure("still known")
    where = {"value": 0.61, "references": [0.6, 0.62], "originals": [0.4], "reason": "a picture of where, no verdict"}
    figures["cka"] = nothing | where | {"family": ""}
    figures |= other.pop("figures", {})
    useful = {"acc_remain": 97.7, "verification_auc_remain": None, "old_templates_tar_1pct": 98.25}
    about = {"task": 1, "after_task": 1, "forget": [NASTY, "ann"], "images": 12, **judge(figures)}
    about |= {"after_file": f"/runs/{NASTY}/checkpoints/task_1.pth", "after_sha256": "fedc9876"}
    about |= {"record_file": "/runs/one/deletions/task_1.json", "record_sha256": "4567cdef"}
    about["utility"] = useful | {"before": useful, "references": [{"acc_remain": 96.5, "verification_auc_remain": None}]}
    return {**about, "figures": figures, "curves": curves(), **other}


def pictures() -> dict:
    rng = np.random.default_rng(0)
    groups = {"forgotten": rng.normal(size=(4, 2)), "kept": rng.normal(size=(5, 2)), "never seen": rng.normal(size=(6, 2))}
    face = rng.integers(0, 256, (3, 150, 100), dtype=np.uint8)
    near = [{"face": face, "name": name, "same": name == NASTY, "cosine": 0.5} for name in (NASTY, "ann_lee", "bob")]
    neighbours = [{"face": face, "name": NASTY} | dict.fromkeys(MODELS, near)]
    people = [NASTY, "ann", "ann", NASTY]
    return {"map": {model: dict(groups) for model in MODELS}, "people": people, "neighbours": neighbours}


def page(*requests: dict, drawn: dict | None = None, **other) -> str:
    model = {"seed": 1, "sha256": "0123abcd", "acc_remain": 97.9, "without": []}
    audit = {"schema": 3, "data": NASTY, "recipe": {"epochs": 150}, "method": "GS-LoRA", "originals": [model] * 2}
    audit |= {
        "date": "2026-11-29T20:44:34+00:00",
        "git_commit": "c0ffee+",
        "python": "3.11.7",
        "packages": {"torch": "2.13.0"},
    }
    audit |= {"references": [{**model, "without": ["ann", NASTY]}] * 3, "requests": [*requests]}
    audit |= {"first_look": [], "restoring": [], **other}
    return audit_page(audit, [drawn] * len(requests), f"Audit of {NASTY}")


class Reader(HTMLParser):
    """What a reader sees, as `text`; `depth` of each tag must come back to nought."""

    EMPTY = {"meta", "br", "img", "wbr"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(html)
        self.close()
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open += [] if tag in self.EMPTY else [tag]

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


def strip_of(html: str, title: str) -> str:
    """The strip beside a figure's title."""
    return re.search(rf'{title}</span>\s*(<svg class="strip".*?)</li>', html, re.DOTALL)[1]


@pytest.mark.parametrize("drawn", [None, pictures()])
def test_the_page_is_whole_and_needs_nothing_else(drawn):
    html = page(request(), request(task=2, after_task=3), drawn=drawn)
    reader = Reader(html)
    assert not reader.open
    assert not {"script", "link", "iframe", "object", "b&"} & {tag for tag, _ in reader.tags}
    assert "http://" not in html and "https://" not in html and "url(" not in html and "@import" not in html
    sources = [attrs["src"] for _, attrs in reader.tags if "src" in attrs]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert len(sources) == (0 if drawn is None else 2 * (1 + 3 * 3))


def test_links_lead_somewhere():
    tags = Reader(page(request(), request(task=2, after_task=3), method=None)).tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert ids == ["request-1", "request-2"]
    assert [attrs["href"] for tag, attrs in tags if tag == "a"] == [f"#{name}" for name in ids]


def test_what_comes_from_the_data_is_escaped():
    html = page(request(), drawn=pictures())
    assert NASTY not in html
    assert Reader(html).text.count(NASTY) == 12  # title, heading, data, file, forgotten, reasons, without, face, maps


def test_every_figure_and_verdict_is_there():
    text = Reader(page(request())).text
    assert {*KEYS.split()} <= {*text.split()}
    for sign, words in (
        ("▲", [STILL_KNOWN]),
        ("▼", [OVER_FORGOTTEN, UNLIKE_STRANGERS]),
        ("●", [WITHIN, AS_IF_NEVER_SEEN, LIKE_STRANGERS]),
        ("?", [INCONCLUSIVE, NOT_ENOUGH]),
    ):
        assert all(f"{sign} {word}" in text for word in words)
    assert "“still known” means: the model still shows that it was trained with the person." in text
    assert "cannot tell" not in text.lower()


def test_what_a_certificate_names():
    text = Reader(page(request())).text
    assert text.count("evidence, not legal proof") == 1
    examined = text[text.index("What was examined") :]
    assert "Date 2026-11-29T20:44:34+00:00 " in examined
    assert f"Model {NASTY}/checkpoints/task_1.pth SHA-256 fedc9876 " in examined
    assert "Record of deletion one/deletions/task_1.json SHA-256 4567cdef " in examined
    assert "Code commit c0ffee+ ; Python 3.11.7, torch 2.13.0" in examined
    assert "First look" not in text
    bare = request()
    del bare["record_file"], bare["record_sha256"]
    assert "Record of deletion" not in Reader(page(bare, method=None, git_commit=None)).text


def test_beside_strangers_it_says_so_and_draws_twenty_of_many_groups():
    strangers = {"people": 195, "photos": [3, 2], "left_out": 105}
    many = figure(WITHIN, references=[float(value) for value in range(200)], interval=None)
    html = page(request(strangers=strangers, references=[], figures={"enrolment_1": many}), references=[])
    text = Reader(html).text
    assert ", compared with strangers, no retrained references and 2 models trained with everybody." in text
    assert "The request, compared with 195 strangers, no retrained references (3 + 2 photos of everybody; 105" in text
    assert "of strangers it re-identifies 100%" in text
    assert strip_of(html, ONE_PHOTO).count('class="never"') == 20


def test_a_first_look_says_what_is_missing():
    text = Reader(page(request(), first_look=["3 references instead of 5", "without cka"])).text
    assert "First look , not a whole audit: 3 references instead of 5; without cka." in text


def test_the_sentence_of_a_request():
    text = Reader(page(request())).text
    sentence = (
        "Enrol one photo of a person, and this model re-identifies 95% of the person's other photos; models that never saw "
    )
    sentence += "the person re-identify 23%, the pre-trained model 96%. "
    assert f"The request : ▲ still known 2 people were to be forgotten. {sentence}" in text
    assert "Within the margin (20% of the way from never seen to known): 3 of 13 metrics with power, 3 of these " in text
    assert "By family: re-identification: still known; verification: over-forgotten; " in text
    one = request(forget=["ann"])
    del one["figures"]["enrolment_1"]
    text = Reader(page(one)).text
    assert "1 person was to be forgotten. Within the margin" in text and "1 people" not in text


def test_too_little_evidence_names_the_worst_undecided_figure():
    worst = {"verdict": "not enough evidence", "undecided": {"figure": "enrolment_1", "rho": 0.77}}
    text = Reader(page(request(**worst))).text
    assert f"Worst undecided: {ONE_PHOTO}, 77% of the way back." in text
    assert "“not enough evidence” means: these data can tell too little: fewer than 3 families" in text


def test_what_a_figure_cannot_show_is_said():
    figures = {"collapse_1pct": figure(INCONCLUSIVE, power=0.4), "enrolment_5": figure(INCONCLUSIVE, power=9.0)}
    figures |= {"sign_flip": figure(WITHIN), "relearn_1": figure(INCONCLUSIVE, significant=True)}
    html = page(request(figures=figures))
    assert "? inconclusive power 0.4, too low" in row_of(html, "mistaken for somebody else")
    assert "? inconclusive never-seen models differ as much" in row_of(html, "re-identification from 5")
    assert "? inconclusive no sign of knowing" in row_of(html, "relearning from 1 photo")
    assert "● within the margin not counted" in row_of(html, "the smallest logit")
    unmeasured = "open-set identification from 5 photos (TPIR at FPIR 1%): needs --strangers"
    assert unmeasured in Reader(html).text and "<summary>Not measured: 2</summary>" in html


def test_the_nearest_faces_come_first_and_long_lists_of_inconclusive_figures_are_folded():
    html = page(request(figures={"enrolment_5": figure(INCONCLUSIVE)}), drawn=pictures())
    assert html.index("The nearest faces") < html.index("Is the person recognized?") < html.index("What was examined")
    assert "Inconclusive:" not in html  # two in no family
    keys = ["verification_auc", "verification_tar_1pct", "verification_tar_01pct"]
    html = page(request(figures={key: figure(INCONCLUSIVE, key) for key in keys}))
    shown, folded = html[html.index("Are two photos") : html.index("Does the model show")].split("<details><summary>")
    assert folded.startswith("Inconclusive: ")
    assert all(shown.count(title) == 0 and folded.count(title) == 1 for title in ("TAR at FMR 1%", "TAR at FMR 0.1%"))
    assert folded.count('class="axis"') == 1


def test_figures_within_the_margin_and_yet_off_are_marked_and_explained():
    explained = "* Within the equivalence margin, and yet farther from models that never saw the person than chance explains"
    for significant in (True, False):
        keys = (key for key, family in FAMILY.items() if family and key not in UNMEASURED)
        figures = {key: figure(WITHIN, key, significant=significant) for key in keys}
        figures |= {f"probe_block_{block}": figure(WITHIN, significant=significant) for block in range(2)}
        html = page(request(figures=figures))
        assert (explained in Reader(html).text) == significant
        row = row_of(html, ONE_PHOTO)
        assert ("● within the margin* significantly off" in row) == significant == ("*" in row)
        assert "*" not in row_of(html, "the smallest logit")  # not counted


def test_a_figure_added_last_stands_in_its_family():
    html = page(request(figures={"nearest": figure(STILL_KNOWN)}))
    assert html.index("Is the person recognized?") < html.index("nearest") < html.index("Are two photos of the person")


def row_of(html: str, title: str) -> str:
    """The words of a figure's row."""
    return Reader(next(row for row in re.findall(r"<li>.*?</li>", html, re.DOTALL) if title in row)).text


def test_a_strip_has_a_mark_for_each_model_on_the_verdicts_axis():
    html = page(request())
    strip = strip_of(html, ONE_PHOTO)
    found = re.findall(r'<svg x="([\d.]+)%"[^>]*><title>([\d.]+)</title>\s*<path class="(\w+)"', strip)
    places = {css: {float(value): float(x) for x, value, other in found if other == css} for *_, css in found}
    never = sum(NEVER) / 3

    def on_axis(value: float) -> float:  # from −0.5 to 1.5
        return pytest.approx(100 * ((value - never) / (95.7 - never) + 0.5) / 2, abs=0.01)

    groups = {"before": KNOWING[::-1], "after": [95.1], "never": NEVER}  # the pre-trained model on top of the others
    assert places == {css: {value: on_axis(value) for value in values} for css, values in groups.items()}
    low, high = map(float, re.search(r'class="interval" x1="([\d.]+)%" x2="([\d.]+)%"', strip).groups())
    assert (low, high) == (on_axis(91.0), on_axis(98.0))
    assert 'class="band" x="15.0%" width="20.0%"' in strip
    assert "95.1 (91.0–98.0) never seen 23.2, before 95.7" in row_of(html, ONE_PHOTO)


def test_what_lies_beyond_the_axis_is_marked_at_its_end():
    # From 22, never seen, to 62, before: the axis ends at 2 and at 82.
    entry = figure(STILL_KNOWN, known=62.0, references=[22.0] * 3, value=83.0, interval=[1.0, 90.0])
    strip = strip_of(page(request(figures={"enrolment_1": entry})), ONE_PHOTO)
    assert re.search(r'<svg x="100.0%"[^>]*><title>83.0</title>\s*<path class="after"\s*d="M0 0m7 0l-9-5v10z"', strip)
    assert re.search(r'<svg x="0.0%"[^>]*><title>1.0</title>\s*<path class="end"\s*d="M0 0m-7 0l9-5v10z"', strip)
    assert 'x1="0.0%" x2="100.0%"' in strip


def test_a_figure_that_falls_runs_the_other_way():
    entry = figure(WITHIN, references=[40.0, 40.0, 40.0], known=10.0, originals=[10.0], value=40.0, interval=[34.0, 46.0])
    strip = strip_of(page(request(figures={"enrolment_1": entry})), ONE_PHOTO)
    assert 'class="interval" x1="15.0%" x2="35.0%"' in strip
    assert re.search(r'<svg x="75.0%"[^>]*><title>10.0</title>', strip)


def test_figures_without_a_gap_show_numbers_only():
    for gap in ({"rho": None, "known": sum(NEVER) / 3, "power": 0.0}, {"power": 0.9}):
        html = page(request(figures={"enrolment_1": figure(INCONCLUSIVE, **gap)}))
        assert "no axis: never seen and before are too close 95.1 (91.0–98.0)" in row_of(html, ONE_PHOTO)
    originals = re.findall(
        'class="before"', strip_of(page(request(figures={"sign_flip": figure(WITHIN)})), "over its own rows")
    )
    assert not originals  # which show nothing of it


def test_curves_that_there_are_none_of_are_left_out():
    assert page(request()).count('class="lines" viewBox') == 6  # two of the probe
    html = page(request(curves={"relearn_5": curves()["relearn_5"]}))
    assert html.count('class="lines" viewBox') == 1
    assert html.count('class="never" d="M0.0 144.0L') == 3  # 20% at step 0
    assert "Curves" not in Reader(page(request(curves={}))).text


def test_roc_shows_what_is_reached_at_each_rate():
    path = re.search(r'class="after" d="M(0\.0 .*?)"', page(request(curves={"roc": curves()["roc"]})))[1]
    points = np.array([point.split() for point in path.split("L")], dtype=float)
    assert points[0].tolist() == [0, 144]  # 20% at 0.1%
    assert points[points[:, 0] == 96.6, 1] == 72  # 60% from 1% on, a third of the way and a little
    assert points[-1].tolist() == [276, 0]


def test_pictures():
    html = page(request(), drawn=pictures())
    reader = Reader(html)
    forgotten = re.findall(r'<path class="forgotten" style="fill:(.*?)" d="(.*?)"><title>(.*?)</title>', html)
    assert [path.count("M") for _, path, _ in forgotten] == [2, 2] * 3  # two people on three maps
    assert len({colour for colour, _, _ in forgotten}) == len({name for _, _, name in forgotten}) == 2
    assert "the same person, 1 of 3 for the pre-trained model, 1 of 3 for this model, 1 of 3 for a model" in reader.text
    assert reader.text.count("✓ same") == 3 and "ann_<wbr>lee" in html
    source = next(attrs["src"] for tag, attrs in reader.tags if tag == "img")
    with Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) as image:
        assert image.size == (64, 96)


def test_a_model_with_one_embedding_has_a_map():
    drawn = pictures()
    drawn["map"]["after"] = {"forgotten": np.ones((4, 2)), "kept": np.ones((5, 2))}
    assert page(request(), drawn=drawn).count("M120.0 120.0") == 9


@pytest.mark.parametrize(
    ("folders", "warning"),
    [
        (["adapters"], "folder adapters can bring the forgotten people back. Delete it, or guard it"),
        (["adapters", "deposits"], "folders adapters, deposits can bring the forgotten people back. Delete them,"),
    ],
)
def test_runs_warn_of_files_that_bring_people_back(folders, warning):
    assert warning in Reader(page(request(), restoring=folders)).text
    assert "bring the forgotten" not in Reader(page(request())).text


def test_bottom_of_the_page():
    text = Reader(page(request(), request(task=2, after_task=3))).text
    assert "Request 2, measured after request 3" in text
    assert "97.7 → 97.7 (96.5) – → – (–) 98.2 → 98.2 (–)" in text
    assert f"Never saw ann, {NASTY} seed accuracy on its own people, % SHA-256 1 97.9 0123abcd" in text
    assert "epochs: 150." in text
