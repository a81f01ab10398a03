"""What scripts/audit.py leaves: audit.json with its whole schema, tables and scalars."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import results_of
from tests.scripts.audit.conftest import FIRST, KEYS, T, audit_of
from util.runtime.files import sha256


def test_it_says_when_with_what_and_how_much_was_measured(whole):
    content, run = audit_of(whole), whole.parent
    assert {"date", "python", "packages", "git_commit"} <= {*content}
    assert content["date"].endswith("+00:00") and content["packages"]["torch"] == version("torch")
    assert content["first_look"] == ["3 models that never saw them instead of 5"]
    assert content["restoring"] == []  # L2* leaves no such files
    (request,) = content["requests"]
    assert Path(request["after_file"]) == (run / "checkpoints" / "task_1.pth").resolve()
    assert Path(request["record_file"]) == (run / "deletions" / "task_1.json").resolve()


@pytest.mark.parametrize("kind", ["adapters", "deposits"])
def test_a_first_look_and_files_that_bring_people_back_are_named(kind, run, whole, command, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("audit"))
    (copy / kind).mkdir()
    (copy / kind / "task_1.safetensors").touch()
    code, _, err = command(
        "scripts/audit.py", copy, "--metrics", "cka", "readout", "--num-references", 3, "--num-originals", 2
    )
    assert code == 0, err
    content = audit_of(copy / "audit")
    without = "without enrolment, verification, probe, membership_images, membership_person, relearning"
    assert content["first_look"] == ["3 models that never saw them instead of 5", without]
    assert content["restoring"] == [kind]


def test_it_leaves_its_files_and_the_whole_schema(whole, early, colours):
    assert {path.name for path in whole.iterdir()} == {"audit.json", "audit.md", "audit.html", "config.json"}
    content = audit_of(whole)
    assert (content["schema"], content["data"], content["method"]) == (3, "colours", "L2*")
    assert content["recipe"] == torch.load(early, weights_only=True)["info"]["recipe"]
    assert [entry["seed"] for entry in content["references"]] == [1, 2, 3]
    assert [entry["seed"] for entry in content["originals"]] == [1337, 1]
    assert content["originals"][0]["sha256"] == sha256(early)
    for group, without in (("references", FIRST), ("originals", [])):
        for entry in content[group]:
            assert entry["sha256"] == sha256(Path(entry["file"]))
            assert entry["without"] == without
            assert 0 <= entry["acc_remain"] <= 100
    (request,) = content["requests"]
    assert (request["task"], request["after_task"], request["forget"], request["images"]) == (1, 1, FIRST, 20)
    assert request["references"] == [entry["sha256"] for entry in content["references"]]
    assert request["after_sha256"] == sha256(whole.parent / "checkpoints" / "task_1.pth")
    assert request["record_sha256"] == sha256(whole.parent / "deletions" / "task_1.json")
    useful = {"acc_remain", "verification_auc_remain", "old_templates_tar_1pct"}
    assert {*request["utility"]} == useful | {"before", "references"}
    assert {*request["utility"]["before"]} == useful
    assert [{*reference} for reference in request["utility"]["references"]] == 3 * [useful - {"old_templates_tar_1pct"}]
    assert request["utility"]["acc_remain"] == pytest.approx(results_of(whole.parent)["tasks"][0]["after"]["acc_remain"])
    assert {*request["figures"]} == {*KEYS}
    assert {"roc", "probe", "relearn_1", "relearn_5", "relearn_kept_only", "cka"} <= {*request["curves"]}
    for curve in request["curves"].values():
        assert len(curve["references"]) == 3
    html = (whole / "audit.html").read_text()
    assert all(name in html for name in FIRST)
    assert f"{whole}/audit.html" in (whole.parent.parent / "audit.out").read_text().splitlines()[-1]


@pytest.mark.parametrize("key", KEYS)
def test_every_figure_is_compared_as_documented(whole, key):
    (request,) = audit_of(whole)["requests"]
    found = request["figures"][key]
    compared = ("interval", "delta", "z", "p", "rho", "power", "significant", "verdict")
    assert {"value", "references", "originals", *compared} <= {*found}
    if found["verdict"] is None:
        assert found["reason"]
        assert not any(found[name] for name in compared)
        assert key in ("verification_tar_01pct", "verification_tar_1pct", "cka")
        return
    value, references, originals = found["value"], np.array(found["references"]), np.array(found["originals"])
    assert (len(references), len(originals)) == (3, 2)
    if key == "sign_flip":  # the originals show nothing of it: what they know is read as usual
        originals = np.array(request["figures"]["acc_forget"]["originals"])
    assert all(0 <= number <= 100 for number in (value, *references, *originals, *found["interval"]))
    assert found["interval"][0] <= found["interval"][1]
    spread = max(references.std(ddof=1), found["resolution"])
    assert key.startswith("photos_") or found["resolution"] == pytest.approx(100 / 20)
    delta, gap = value - references.mean(), originals.mean() - references.mean()
    rho = delta / gap if abs(gap) > 1e-6 else None
    assert found["delta"] == pytest.approx(delta, abs=1e-3)
    assert found["z"] == pytest.approx(delta / (spread * (4 / 3) ** 0.5), abs=1e-3)
    towards = -gap if key == "collapse_1pct" else gap  # of which those who know the person show less
    assert found["power"] == pytest.approx(max(0, towards) / spread, abs=1e-3)
    assert found["rho"] == (None if rho is None else pytest.approx(rho, rel=1e-2, abs=1e-2))
    if found["power"] < 3 or (abs(rho) > 0.2 and abs(found["z"]) <= T):
        assert found["verdict"] == "inconclusive"
    elif abs(rho) <= 0.2:
        assert found["verdict"] == "within the margin"
    else:
        known = "inconclusive" if key == "collapse_1pct" else "still known"
        assert found["verdict"] == (known if rho > 0 else "over-forgotten")


def test_the_markdown_has_every_figure(whole):
    (request,) = audit_of(whole)["requests"]
    text = (whole / "audit.md").read_text()
    for key, entry in request["figures"].items():
        (row,) = [line for line in text.splitlines() if f"(`{key}`)" in line]
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        assert cells[1] == ("–" if entry["value"] is None else f"{entry['value']:.2f}")
        off = ", and yet significantly off" * (entry["verdict"] == "within the margin" and entry["significant"])
        assert cells[-1] == (entry["verdict"] or entry["reason"]) + off
    assert f"**{request['verdict']}**" in text


def test_the_scalars_are_in_the_events_of_the_run(whole):
    events = EventAccumulator(str(whole.parent))
    events.Reload()
    figures = audit_of(whole)["requests"][0]["figures"]
    tags = {tag for tag in events.Tags()["scalars"] if tag.startswith("audit/request_1/value/")}
    assert tags == {f"audit/request_1/value/{key}" for key in figures if figures[key]["value"] is not None}
    for key in ("enrolment_1", "probe_embedding"):
        scalar = events.Scalars(f"audit/request_1/value/{key}")[0]
        assert (scalar.step, scalar.value) == (1, pytest.approx(figures[key]["value"], rel=1e-5))


def test_with_strangers_their_figures_are_measured_and_without_them_it_is_said(whole, run, here, command, tmp_path):
    here.clear()  # what the fixtures have trained
    figures = audit_of(whole)["requests"][0]["figures"]
    assert figures["tpir_1pct"]["value"] is not None
    assert figures["membership_person"]["value"] is not None
    words = ("--metrics", "enrolment", "membership_person", "--num-references", 3, "--num-originals", 1)
    code, _, err = command("scripts/audit.py", run, *words, "--output-dir", tmp_path)
    assert code == 0, err
    figures = audit_of(tmp_path)["requests"][0]["figures"]
    assert {*figures} == {"enrolment_1", "enrolment_5", "photos_enrolment_1", "tpir_1pct", "membership_person"}
    for key in ("tpir_1pct", "membership_person"):
        assert (figures[key]["value"], figures[key]["reason"]) == (None, "needs --strangers")
        assert f"(`{key}`)" in (tmp_path / "audit.md").read_text()
    assert not here


def test_an_audit_that_is_repeated_trains_nothing_and_finds_the_same(whole, run, strangers, here, command, tmp_path):
    here.clear()  # what the fixtures have trained
    figures = ("readout", "verification", "membership_person", "relearning")
    options = ("--num-references", 3, "--num-originals", 2, "--strangers", strangers, "--metrics", *figures)
    code, out, err = command("scripts/audit.py", run, *options, "--output-dir", tmp_path)
    assert code == 0, err
    assert not here
    assert "reference" not in out
    (again,), (request,) = (audit_of(folder)["requests"] for folder in (tmp_path, whole))
    assert again["figures"] == {key: request["figures"][key] for key in again["figures"]}
    assert again["utility"] == request["utility"]


def test_benchmarks_are_measured_before_and_after_and_on_the_references(
    files, colours, early, run, references, command, tmp_path
):
    for person in range(4):
        for number, image in enumerate(sorted((colours / "test" / f"c{person}").iterdir()), start=1):
            (tmp_path / "faces" / f"c{person}").mkdir(parents=True, exist_ok=True)
            shutil.copy(image, tmp_path / "faces" / f"c{person}" / f"c{person}_{number:04}.png")
    lines = ["2 2", "c0 1 2", "c1 1 2", "c0 1 c1 1", "c2 1 c3 1", "c2 1 2", "c3 1 2", "c0 2 c2 2", "c1 2 c3 2"]
    (tmp_path / "pairs.txt").write_text("\n".join(lines))
    pairs = ("--pairs", f"{tmp_path / 'pairs.txt'}:{tmp_path / 'faces'}")
    code, _, err = files(*pairs)
    assert code == 0, err
    expected = []
    for path in (early, run / "checkpoints" / "task_1.pth", *references):
        assert (
            command("test.py", "--checkpoint", path, *pairs, "--output-dir", tmp_path / path.parent.name / path.name)[0] == 0
        )
        found = json.loads((tmp_path / path.parent.name / path.name / "test.json").read_text())
        expected.append(pytest.approx(found["pairs"]["faces"]["accuracy"], abs=1e-3))
    useful = audit_of(tmp_path / "audit")["requests"][0]["utility"]
    assert [entry["pairs_faces"] for entry in (useful["before"], useful, *useful["references"])] == expected
    assert "faces accuracy" in (tmp_path / "audit" / "audit.md").read_text()
    assert "<th>faces accuracy</th>" in (tmp_path / "audit" / "audit.html").read_text()
