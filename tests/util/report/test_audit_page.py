import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from util.report.audit_page import MODELS, VERDICTS, audit_page

NASTY = '<b>&"x'
KEYS = "acc_forget sign_flip readout enrolment_1 enrolment_5 tpir_1pct verification_auc verification_tar_1pct "
KEYS += "verification_tar_01pct collapse_1pct probe_embedding probe_block_0 probe_block_1 membership_images "
KEYS += "membership_person relearn_1 relearn_5 relearn_kept_only cka"
UNMEASURED = {"tpir_1pct": "needs --unseen", "membership_person": f"needs {NASTY}"}
ONE_PHOTO = "recognized after one enrolment photo"
NEVER, KNOWING = [22.0, 24.0, 23.5], [96.4, 95.0]


def figure(verdict: str, **other) -> dict:
    numbers = {"known": 95.7, "delta": 71.9, "z": 30.1, "rho": 0.98, "power": 61.0}
    entry = {"value": 95.1, "interval": [91.0, 98.0], "references": NEVER, "originals": KNOWING}
    return {**entry, **numbers, "verdict": verdict, **other}


def curves() -> dict:
    probe = {"layers": ["block 0", "block 1", "embedding"], "all": [50.0, 60.0, 97.0], "forgotten": [60.0, 70.0, 99.0]}
    kinds = {"roc": {"far": [0, 0.01, 1], "tar": [0.2, 0.6, 1]}, "probe": probe, "cka": {"references": 0.6, "before": 0.9}}
    kinds |= {f"relearn_{how}": {"steps": [0, 1, 10], "accuracy": [20.0, 30.0, 90.0]} for how in ("1", "5", "kept_only")}
    return {name: {"after": curve, "before": curve, "references": [curve] * 3} for name, curve in kinds.items()}


def request(**other) -> dict:
    verdicts = [*VERDICTS]
    figures = {key: figure(verdicts[number % len(verdicts)]) for number, key in enumerate(KEYS.split())}
    nothing = dict.fromkeys(figures["cka"]) | {"references": [], "originals": []}
    figures |= {key: {**nothing, "reason": reason} for key, reason in UNMEASURED.items()}
    figures["enrolment_1"] = figure("still known")
    where = {"value": 0.61, "references": [0.6, 0.62], "originals": [0.4], "reason": "a picture of where, no verdict"}
    figures["cka"] = nothing | where
    useful = {"acc_remain": 97.7, "verification_auc_remain": None, "old_templates_tar_1pct": 98.25}
    about = {"task": 1, "after_task": 1, "forget": [NASTY, "ann"], "images": 12, "verdict": "still known"}
    about["utility"] = useful | {"before": useful, "references": [{"acc_remain": 96.5, "verification_auc_remain": None}]}
    return {**about, "figures": figures, "curves": curves(), **other}


def pictures() -> dict:
    rng = np.random.default_rng(0)
    groups = {"forgotten": rng.normal(size=(4, 2)), "kept": rng.normal(size=(5, 2)), "never seen": rng.normal(size=(6, 2))}
    face = rng.integers(0, 256, (3, 150, 100), dtype=np.uint8)
    near = [{"face": face, "name": name, "same": name == NASTY, "cosine": 0.5} for name in (NASTY, "ann_lee", "bob")]
    neighbours = [{"face": face, "name": NASTY} | dict.fromkeys(MODELS, near)]
    return {"map": {model: dict(groups) for model in MODELS}, "neighbours": neighbours}


def page(*requests: dict, drawn: dict | None = None, method: str | None = "GS-LoRA") -> str:
    model = {"seed": 1, "sha256": "0123abcd", "acc_remain": 97.9, "without": []}
    audit = {"schema": 1, "data": NASTY, "recipe": {"epochs": 150}, "method": method, "originals": [model] * 2}
    audit |= {"references": [{**model, "without": ["ann", NASTY]}] * 3, "requests": [*requests]}
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
    assert Reader(html).text.count(NASTY) == 9  # title and heading, data, forgotten, reason thrice, without, face


def test_every_figure_and_verdict_is_there():
    text = Reader(page(request())).text
    assert {*KEYS.split()} <= {*text.split()}
    for word, (_, sign, meaning) in VERDICTS.items():
        assert f"{sign} {word}" in text
        assert meaning in text.lower()
    assert "“as if never seen” means: not distinguished by these figures on these data." in text


def test_the_sentence_of_a_request():
    sentence = "A model that never saw them recognizes 23% of their photos after one enrolment, the pre-trained model 96%; "
    text = Reader(page(request())).text
    assert f"2 people were to be forgotten. {sentence}this one recognizes 95%: ▲ still known ." in text
    sentence += "this one recognizes 25%: as if never seen. All figures together: ▲ still known"
    figures = request()["figures"] | {"enrolment_1": figure("as if never seen", value=25.0)}
    assert f"1 person was to be forgotten. {sentence}" in Reader(page(request(forget=["ann"], figures=figures))).text
    del figures["enrolment_1"]
    text = Reader(page(request(figures=figures))).text
    assert "2 people were to be forgotten. All figures together: ▲ still known" in text


def test_what_cannot_be_said_is_said():
    figures = {"collapse_1pct": figure("cannot tell", power=0.4), "readout": figure("cannot tell", power=9.0)}
    text = Reader(page(request(figures=request()["figures"] | figures))).text
    for reason in UNMEASURED.values():
        assert f"Not measured ({reason}): " in text
        assert f"not measured: {reason}" in text
    assert "come out alike: mistaken for somebody else, at a false match rate of 1%." in text
    assert "differ among themselves as much: recognized by the better of the two" in text


def test_a_strip_has_a_mark_for_each_model():
    strip = strip_of(page(request()), ONE_PHOTO)
    found = re.findall(r'<svg x="([\d.]+)%"[^>]*><title>[^<]*</title>\s*<path class="(\w+)"', strip)
    places = {css: [float(x) for x, other in found if other == css] for _, css in found}
    assert places == {"before": KNOWING[::-1], "after": [95.1], "never": NEVER}  # the pre-trained model on top of the others
    assert 'x1="91.0%" x2="98.0%"' in strip
    # A fifth of the way to what is known, 95.7, is 14.51 points, from a mean of 23.17.
    assert 'class="band" x="8.66%" width="29.01%"' in strip
    assert '<svg x="61.0%"' in strip_of(page(request()), r"likeness to models that never saw them \(CKA\)")


def test_the_band_stays_on_the_axis():
    figures = {"enrolment_1": figure("as if never seen", references=[1.0, 2.0, 3.0], rho=0.0, delta=0.0, known=97.0)}
    assert 'class="band" x="0%" width="21.0%"' in strip_of(page(request(figures=figures)), ONE_PHOTO)


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
    assert [len(re.findall("M", path)) for path in re.findall(r'<path class="forgotten" d="(.*?)"', html)[1:]] == [4] * 3
    assert "the same person, 1 of 3 for the pre-trained model, 1 of 3 for this model, 1 of 3 for a model" in reader.text
    assert reader.text.count("✓ same") == 3 and "ann_<wbr>lee" in html
    source = next(attrs["src"] for tag, attrs in reader.tags if tag == "img")
    with Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) as image:
        assert image.size == (64, 96)


def test_a_model_with_one_embedding_has_a_map():
    drawn = pictures()
    drawn["map"]["after"] = {"forgotten": np.ones((4, 2)), "kept": np.ones((5, 2))}
    assert page(request(), drawn=drawn).count("M120.0 120.0") == 9


def test_runs_warn_of_their_files():
    warning = "still hold the forgotten people"
    assert warning in Reader(page(request())).text
    assert warning not in Reader(page(request(), method=None)).text


def test_bottom_of_the_page():
    text = Reader(page(request(), request(task=2, after_task=3))).text
    assert "Request 2, measured after request 3" in text
    assert "97.7 → 97.7 (96.5) – → – (–) 98.2 → 98.2 (–)" in text
    assert f"Never saw ann, {NASTY} seed kept, % SHA-256 1 97.9 0123abcd" in text
    assert "epochs: 150." in text
