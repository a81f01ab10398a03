"""scripts/audit.py through its own command line, on small images: two requests, of five people and of two."""

import json
import re
import shutil
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.manifold import TSNE
from sklearn.model_selection import GridSearchCV
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import ROOT, SMALL, coloured_images, results_of, write_folder
from tests.scripts.test_references import early, here  # noqa: F401
from tests.test_bad_input import refused
from util.audit.statistics import compare
from util.runtime.files import sha256

FIRST, SECOND = [f"c{c}" for c in range(5)], ["c5", "c6"]
KEYS = [
    *("acc_forget", "sign_flip", "enrolment_1", "enrolment_5", "photos_enrolment_1", "tpir_1pct"),
    *("verification_auc", "photos_verification_auc", "verification_tar_1pct", "verification_tar_01pct", "collapse_1pct"),
    *("probe_embedding", "probe_block_0", "probe_block_1", "membership_images", "membership_person"),
    *("relearn_1", "photos_relearn_1", "relearn_5", "relearn_kept_only", "cka"),
]
QUICK = [*KEYS[:11], "membership_images"]
# The 97.5% quantile of Student's t at two degrees, for three references.
T = 4.302653


@pytest.fixture(autouse=True)
def quick_figures(monkeypatch):
    """Relearning, the search for a probe's C and the map of embeddings take most of an audit's time."""
    monkeypatch.setattr("util.audit.relearning.STEPS", (0, 1, 3))
    monkeypatch.setattr("util.audit.probe.PER_IDENTITY", 4)
    monkeypatch.setattr("util.audit.pictures.TSNE", partial(TSNE, max_iter=250))
    search = "util.audit.probe.GridSearchCV"
    monkeypatch.setattr(search, lambda probe, grid, cv: GridSearchCV(probe, {key: [0.1] for key in grid}, cv=cv))


@pytest.fixture
def run(early, colours, command, tmp_path_factory) -> Path:  # noqa: F811
    """A run of two requests, made once a session."""
    folder = tmp_path_factory.getbasetemp() / "audited"
    if not (folder / "figure.png").exists():
        words = ("--method", "l2", "--checkpoint", early, "--data", colours, "--output-dir", folder)
        requests = ("--forget-classes", ",".join(FIRST), "--then", ",".join(SECOND))
        code, _, err = command("train_forget.py", *words, *requests, "--epochs", 4, "--batch-size", 12, "--data-ratio", 1)
        assert code == 0, err
    return folder


@pytest.fixture
def strangers(tmp_path_factory) -> Path:
    """Six people in no training set, <identity>/<image>, made once a session."""
    folder = tmp_path_factory.getbasetemp() / "strangers"
    if not folder.exists():
        images = coloured_images(16, 4, 32, seed=2)
        write_folder(folder / "split", images.subset(images.labels > 9), images.subset(slice(0)))
        (folder / "split" / "train").rename(folder / "faces")
    return folder / "faces"


@pytest.fixture
def crowd(tmp_path_factory) -> Path:
    """24 people in no training set, two of them with three photos, made once a session."""
    folder = tmp_path_factory.getbasetemp() / "crowd"
    if not folder.exists():
        images = coloured_images(34, 4, 32, seed=3)
        write_folder(folder / "split", images.subset(images.labels > 9), images.subset(slice(0)))
        (folder / "split" / "train").rename(folder / "faces")
        for name in ("c12", "c20"):
            next((folder / "faces" / name).iterdir()).unlink()
    return folder / "faces"


@pytest.fixture
def whole(run, strangers, here, command, tmp_path_factory) -> Path:  # noqa: F811
    """The audit of the first request with every figure, made once a session."""
    if not (run / "audit").exists():
        options = ("--num-references", 3, "--num-originals", 2, "--strangers", strangers)
        code, out, err = command("scripts/audit.py", run, *options)
        assert code == 0, err
        assert len(here) <= 4
        (run.parent / "audit.out").write_text(out)
    return run / "audit"


@pytest.fixture
def references(whole) -> list[Path]:
    """Files of three models that never saw the first request's people."""
    return [Path(entry["file"]) for entry in audit_of(whole)["references"]]


@pytest.fixture
def files(early, run, colours, references, command, tmp_path):  # noqa: F811
    """Audit two checkpoints beside given references."""
    words = ("--before", early, "--after", run / "checkpoints" / "task_1.pth", "--forget-classes", ",".join(FIRST))
    words += ("--data", colours, "--references", *references, "--metrics", "readout", "--output-dir", tmp_path / "audit")
    return lambda *more: command("scripts/audit.py", *words, *more)


def audit_of(folder: Path) -> dict:
    """audit.json, which holds finite numbers alone."""

    def refuse(word: str):
        raise AssertionError(f"{word} in {folder}/audit.json")

    return json.loads((folder / "audit.json").read_text(), parse_constant=refuse)


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


def test_it_leaves_its_files_and_the_whole_schema(whole, early, colours):  # noqa: F811
    assert {path.name for path in whole.iterdir()} == {"audit.json", "audit.md", "audit.html", "config.json"}
    content = audit_of(whole)
    assert (content["schema"], content["data"], content["method"]) == (2, "colours", "L2*")
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
    compared = ("interval", "delta", "z", "rho", "power", "significant", "verdict")
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
        (scalar,) = events.Scalars(f"audit/request_1/value/{key}")
        assert (scalar.step, scalar.value) == (1, pytest.approx(figures[key]["value"], rel=1e-5))


def test_with_strangers_their_figures_are_measured_and_without_them_it_is_said(whole, run, here, command, tmp_path):  # noqa: F811
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


def test_an_audit_that_is_repeated_trains_nothing_and_finds_the_same(whole, run, strangers, here, command, tmp_path):  # noqa: F811
    figures = ("readout", "verification", "membership_person", "relearning")
    options = ("--num-references", 3, "--num-originals", 2, "--strangers", strangers, "--metrics", *figures)
    code, out, err = command("scripts/audit.py", run, *options, "--output-dir", tmp_path)
    assert code == 0, err
    assert not here
    assert "reference" not in out
    (again,), (request,) = (audit_of(folder)["requests"] for folder in (tmp_path, whole))
    assert again["figures"] == {key: request["figures"][key] for key in again["figures"]}
    assert again["utility"] == request["utility"]


def test_all_requests_each_after_its_task_and_after_the_last(whole, run, here, command, tmp_path):  # noqa: F811
    options = ("--requests", "all", "--metrics", "readout", "verification", "--num-references", 3, "--num-originals", 1)
    code, out, err = command("scripts/audit.py", run, *options, "--output-dir", tmp_path)
    assert code == 0, err
    assert [label.split(", ")[0] for label in here] == ["colours without 7 classes"] * 3
    content = audit_of(tmp_path)
    moments = [(request["task"], request["after_task"]) for request in content["requests"]]
    assert moments == [(1, 1), (2, 2), (1, 2)]
    assert [request["forget"] for request in content["requests"]] == [FIRST, SECOND, FIRST]
    files = {entry["sha256"]: entry for entry in content["references"]}
    assert len(files) == 6
    assert len(content["originals"]) == 1
    for request, gone in zip(content["requests"], (5, 7, 7), strict=True):
        assert len(request["references"]) == 3
        for digest in request["references"]:
            rows = torch.load(files[digest]["file"], weights_only=True)["model"]["head.weight"]
            assert (rows == 0).all(dim=1).tolist() == [True] * gone + [False] * (10 - gone)
        after = run / "checkpoints" / f"task_{request['after_task']}.pth"
        assert request["after_sha256"] == sha256(after)
    heads = [line.split(":")[0] for line in out.splitlines() if line.startswith("Request")]
    assert heads == ["Request 1", "Request 2", "Request 1, after task 2"]


def test_requests_by_number_are_audited_after_their_tasks(run, here, command, tmp_path):  # noqa: F811
    options = ("--metrics", "readout", "--num-references", 3, "--num-originals", 1, "--output-dir", tmp_path)
    code, _, err = command("scripts/audit.py", run, "--requests", 2, *options)
    assert code == 0, err
    (request,) = audit_of(tmp_path)["requests"]
    assert (request["task"], request["after_task"], request["forget"]) == (2, 2, SECOND)
    code, _, err = command("scripts/audit.py", run, "--requests", 1, 3, *options)
    assert code == 2
    assert err.startswith("audit.py: error: --requests 3: ") and err.endswith(" has finished 1, 2\n")


def test_a_first_look_is_four_figures_beside_three_references(whole, run, here, command, tmp_path):  # noqa: F811
    code, out, err = command("scripts/audit.py", run, "--quick", "--output-dir", tmp_path)
    assert code == 0, err
    content = audit_of(tmp_path)
    (request,) = content["requests"]
    assert {*request["figures"]} == {*QUICK}
    assert (len(content["references"]), len(content["originals"])) == (3, 1)
    assert not here
    assert (tmp_path / "audit.html").exists()
    lines = out.splitlines()
    assert lines[0] == "Request 1: are its 5 people still known? 20 test faces, %"
    assert [line[:12].rstrip() for line in lines[3:6]] == ["Never seen", "Pre-train", "L2*"]
    figures = request["figures"]
    shown = [figures[key] for key in ("sign_flip", "enrolment_1", "enrolment_5", "verification_auc")]
    values = [[np.mean(f["references"]) for f in shown], [f["originals"][0] for f in shown], [f["value"] for f in shown]]
    assert [line[12:].split()[1:5] for line in lines[3:6]] == [[f"{value:.1f}" for value in row] for row in values]
    assert lines[5].split()[1] == f"{results_of(run)['tasks'][0]['after']['h_mean']:.2f}"
    assert lines[5].rstrip().endswith(request["verdict"])
    code, _, err = command("scripts/audit.py", run, "--quick", "--metrics", "cka", "--output-dir", tmp_path)
    assert code == 0, err
    assert [*audit_of(tmp_path)["requests"][0]["figures"]] == ["cka"]


def test_a_comparison_is_audited_run_by_run_beside_shared_references(early, colours, here, command, tmp_path):  # noqa: F811
    words = ("--checkpoint", early, "--data", colours, "--forget-classes", "c8,c9", "--epochs", 1, "--data-ratio", 1)
    folder = tmp_path / "runs"
    code, _, err = command("scripts/compare.py", "--methods", "gs_lora", "l2", "--output-dir", folder, "--", *words)
    assert code == 0, err
    (folder / "der-seed1337").mkdir()  # has not finished a task
    code, out, err = command("scripts/audit.py", folder, "--quick")
    assert code == 0, err
    assert here == [f"colours without 2 classes, seed {seed}" for seed in (1, 2, 3)]
    lines = out.split("about 0:00 left\n")[-1].splitlines()
    assert [line.split()[0] for line in lines[3:7]] == ["Never", "Pre-train", "L2*", "GS-LoRA"]
    one, other = (audit_of(folder / f"{name}-seed1337" / "audit") for name in ("l2", "gs_lora"))
    assert (one["method"], other["method"]) == ("L2*", "GS-LoRA")
    assert one["references"] == other["references"]
    assert rows_of(folder / "audit.md") == ["Method", "Never seen", "Originals", "L2*", "GS-LoRA"]
    assert not (folder / "der-seed1337" / "audit").exists()
    assert out.splitlines()[-1].endswith(f"{folder / 'index.html'}")
    links = re.findall('<a href="([^"]*)"', (folder / "index.html").read_text())
    assert sorted(links) == ["gs_lora-seed1337/audit/audit.html", "l2-seed1337/audit/audit.html"]
    rows = pd.read_csv(folder / "audit.csv").set_index(["method", "metric"])
    figures = other["requests"][0]["figures"]
    assert rows["value"]["GS-LoRA", "enrolment_1"] == pytest.approx(figures["enrolment_1"]["value"])
    assert rows["never_seen"]["L2*", "verification_auc"] == pytest.approx(
        np.mean(one["requests"][0]["figures"]["verification_auc"]["references"])
    )
    refused(command("scripts/audit.py", folder, "--quick", "--output-dir", folder / "one"), 2, "--output-dir is for one run")
    assert not (folder / "one").exists()


def rows_of(path: Path) -> list[str]:
    """What the tables of an audit.md call their rows."""
    return [line.split("|")[1].strip() for line in path.read_text().splitlines() if line[:2] == "| "]


@pytest.fixture
def seeds(run, tmp_path) -> list[Path]:
    """The run with one seed and with another, in a folder."""
    folders = [shutil.copytree(run, tmp_path / f"seed{seed}", ignore=shutil.ignore_patterns("audit")) for seed in (1, 2)]
    for seed, folder in enumerate(folders, start=1):
        (folder / "results.json").write_text(json.dumps(results_of(run) | {"seed": seed}))
    return folders


def test_each_seed_of_a_comparison_has_a_table(seeds, here, command, tmp_path):  # noqa: F811
    """Whom a run forgets may depend on its seed."""
    code, out, err = command("scripts/audit.py", tmp_path, "--quick")
    assert code == 0, err
    assert rows_of(tmp_path / "audit.md") == ["Method", "Never seen", "Originals", "L2*"] * 2
    heads = [line for line in (tmp_path / "audit.md").read_text().splitlines() if line.startswith("## ")]
    assert heads == ["## Seed 1", "## Seed 2"]
    printed = [line.split()[0] for line in out.splitlines() if line[:2] in ("Re", "Ne", "L2")]
    assert printed == ["Request", "Never", "L2*"] * 2


def test_the_pages_of_several_runs_are_where_it_says(seeds, here, command):  # noqa: F811
    code, out, err = command("scripts/audit.py", *seeds, "--quick", "--metrics", "readout")
    assert code == 0, err
    told = out.splitlines()[-1].split("look at: ")[1]
    for folder in seeds:
        page = folder / "audit" / "audit.html"
        assert page.exists()
        assert str(page) in told or page in Path("/").glob(told[1:])


def test_two_checkpoints_are_audited_without_a_run(early, run, colours, here, command, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    words = ("--before", early, "--after", run / "checkpoints" / "task_1.pth", "--data", colours, "--quick")
    code, out, err = command("scripts/audit.py", *words, "--forget-classes", "c4, #3,c2,c1,c0")
    assert code == 0, err
    (folder,) = (tmp_path / "exps").glob(f"audit-{run.name}-task_1-*")
    content = audit_of(folder)
    assert content["method"] is None
    (request,) = content["requests"]
    assert sorted(request["forget"]) == FIRST
    assert "record_sha256" not in request
    assert [line.split()[0] for line in out.splitlines() if line.startswith("task_1")] == ["task_1"]
    assert len(content["references"]) == 3


def test_given_references_and_originals_are_used(files, references, trained, here, tmp_path):  # noqa: F811
    here.clear()  # what the fixtures have trained
    code, _, err = files("--originals", trained)
    assert code == 0, err
    content = audit_of(tmp_path / "audit")
    assert [Path(entry["file"]) for entry in content["references"]] == references
    assert [Path(entry["file"]) for entry in content["originals"]][1] == trained
    assert len(content["requests"][0]["figures"]["acc_forget"]["originals"]) == 2
    assert not here


def test_references_that_lack_more_people_serve_each_of_their_requests(files, tmp_path):
    """The others that they lack are not kept: no threshold rests on them."""
    told = []
    for names in ("c0", "c0,c1,c2,c3,c4"):
        code, _, err = files("--forget-classes", names, "--metrics", "verification")
        assert code == 0, err
        (request,) = audit_of(tmp_path / "audit")["requests"]
        told.append(request["figures"]["verification_tar_01pct"]["reason"])
        assert request["figures"]["verification_auc"]["value"] is not None
    assert told[0] == told[1]


def test_beside_strangers_nothing_is_trained(run, crowd, here, command, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("util.audit.strangers.GROUPS", 30)
    words = ("scripts/audit.py", run, "--compare-with", "strangers", "--requests", 1, 2, "--output-dir", tmp_path / "audit")
    code, out, err = command(*words, "--strangers", crowd)
    assert code == 0, err
    assert not here
    content = audit_of(tmp_path / "audit")
    assert (content["references"], len(content["originals"]), content["first_look"]) == ([], 1, [])
    about = {"people": 22, "photos": [2, 2], "left_out": 2}
    for request, forget in zip(content["requests"], (FIRST, SECOND), strict=True):
        assert (request["strangers"], request["references"], request["forget"]) == (about, [], forget)
        assert request["verdict"] in ("like strangers", "still known", "unlike strangers", "not enough evidence")
        judged = {key for key, entry in request["figures"].items() if entry["verdict"]}
        assert judged >= {"acc_forget", "enrolment_1", "verification_auc", "membership_images", "photos_apart", "apart"}
        assert request["figures"]["enrolment_5"]["reason"] == "needs strangers with 7 photos"
        assert all(len(request["figures"][key]["references"]) == 30 for key in judged)
    told = "compared with 22 strangers, no retrained references (2 + 2 photos of everybody; 2 people with fewer left out)"
    for text in (out, *((tmp_path / "audit" / f"audit.{kind}").read_text() for kind in ("md", "html"))):
        assert text.count(told) >= 2
    assert "groups of strangers, each by the others: " in out


def test_strangers_and_references_give_both(files, crowd, tmp_path):
    code, out, err = files("--compare-with", "both", "--strangers", crowd)
    assert code == 0, err
    content = audit_of(tmp_path / "audit")
    never, strangers = content["requests"]
    assert (len(content["references"]), len(never["references"]), never["strangers"]) == (3, 3, None)
    assert (strangers["references"], strangers["strangers"]["people"]) == ([], 22)
    assert [line.split()[0] for line in out.splitlines() if line[:2] in ("Ne", "St")] == ["Never", "Strangers"]


def test_without_enough_strangers_it_says_what_to_do(files, strangers, tmp_path):
    refused(files("--compare-with", "both"), 2, "comparing with strangers needs people in no training set: --strangers DIR")
    refused(
        files("--compare-with", "both", "--strangers", strangers),
        2,
        "--strangers has 6 people with 4 photos or more, and 20 are needed",
    )
    refused(
        files("--compare-with", "both", "--metrics", "cka"),
        2,
        "--compare-with both needs one of --metrics readout enrolment",
    )
    assert not (tmp_path / "audit").exists()


def test_a_name_given_twice_counts_once(files, tmp_path):
    code, _, err = files("--forget-classes", "c0,c1,#0,c1")
    assert code == 0, err
    assert audit_of(tmp_path / "audit")["requests"][0]["forget"] == ["c0", "c1"]


def test_the_pre_trained_model_itself_is_never_as_if_never_seen(files, early, tmp_path):  # noqa: F811
    """Nobody's identity is at the bottom of its list either: a sign flip of 0 alone acquits no model."""
    code, _, err = files("--after", early)
    assert code == 0, err
    (request,) = audit_of(tmp_path / "audit")["requests"]
    assert request["figures"]["sign_flip"]["value"] == 0
    assert request["verdict"] in ("still known", "not enough evidence")


def test_a_figure_of_which_those_who_know_show_less_cannot_tell():
    """Else a model that shows nothing of it would still know."""
    assert compare(0.0, [100.0, 100.0, 100.0], [85.0, 40.0], resolution=5.0).verdict == "inconclusive"


def test_nothing_to_audit_is_refused(run, command, tmp_path):
    refused(command("scripts/audit.py"), 2, "name the folders of runs, or --before, --after and --forget-classes")
    refused(command("scripts/audit.py", "--before", "a.pth", "--after", "b.pth"), 2, "name the folders of runs, or --before")
    for folder in (tmp_path, tmp_path / "absent", run / "checkpoints"):
        refused(command("scripts/audit.py", folder), 2, f"{folder}: no run that has finished a task, nor a folder of such")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--forget-classes", "c0,eve"], 2, "no class 'eve'"),
        (["--forget-classes", ""], 2, "a list of names is empty"),
        (["--before", "absent.pth"], 2, "no file absent.pth"),
        (["--after", "absent.pth"], 2, "no file absent.pth"),
        (["--references", "absent.pth"], 2, "no file absent.pth"),
        (["--originals", "absent.pth"], 2, "no file absent.pth"),
        (["--references", ROOT], 2, f"no file {ROOT}"),
        (["--originals", "/dev/null"], 2, "no file /dev/null"),
        (["--references", __file__], 1, f"{__file__}: refused"),
        (["--recipe", ROOT], 2, f"no file {ROOT}"),
        (["--recipe", __file__], 1, f"{__file__}: not readable as JSON"),
        (["--strangers", __file__], 2, "cannot be read as <class>/<image>"),
        (["--strangers", "absent"], 2, "absent: cannot be read as <class>/<image>"),
        (["--data", "absent"], 2, "absent: cannot be read as {train,test}/<class>/<image>"),
        (["--metrics", "aura"], 2, "--metrics: invalid choice: 'aura'"),
        (["--requests", "some"], 2, "--requests: some is neither the number of a request nor all"),
        (["--requests", "0"], 2, "--requests: 0 is neither the number of a request nor all"),
        (["--num-references", 0], 2, "--num-references: 0 is out of range"),
        (["--head", "arcface"], 2, "was trained with --head cosface, not arcface"),
        (["--output-dir", __file__], 2, f"{__file__} is a file, not a folder"),
    ],
)
def test_impossible_audits_are_refused(options, code, message, files, tmp_path):
    refused(files(*options), code, message)
    assert not (tmp_path / "audit").exists()


def test_references_that_say_nothing_are_refused(files, references, early, tmp_path):  # noqa: F811
    refused(files("--references", *references[:2]), 2, "2 references: their spread cannot be told from fewer than 3")
    refused(files("--references", *references[:2], references[0]), 2, "2 references: their spread cannot be told")
    message = "reference 3 was trained with 5 of the 5 forgotten identities, 'c0' first"
    refused(files("--references", *references[:2], early), 2, message)
    refused(files("--originals", references[0]), 2, "original 1 was trained without 'c0'")
    refused(files("--before", references[0]), 2, "the pre-trained model was trained without 'c0'")
    message = "reference 1 was trained with 1 of the 6 forgotten identities, 'c7' first"
    refused(files("--forget-classes", ",".join([*FIRST, "c7"])), 2, message)
    assert not (tmp_path / "audit").exists()


def test_strangers_who_are_none_are_refused(files, colours, strangers, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(files("--strangers", tmp_path / "empty"), 2, "0 class folders; at least 1 are needed")
    refused(files("--strangers", colours / "train"), 2, "--strangers has 10 identities of the training set, 'c0' first")
    renamed = shutil.copytree(strangers, tmp_path / "renamed")
    shutil.copy(next((colours / "train" / "c8").iterdir()), renamed / "c12" / "copy.png")
    refused(files("--strangers", renamed), 2, "--strangers has 1 images of the training set, of 'c12' first")
    damaged = shutil.copytree(strangers, tmp_path / "damaged")
    (damaged / "c11" / "0.png").write_bytes(b"no image")
    refused(files("--strangers", damaged), 1, "images cannot be decoded: c11/0.png (not an image)")
    assert not (tmp_path / "audit").exists()


@pytest.fixture
def poor(colours, tmp_path) -> Path:
    """The data, but for the training images of c3, of which there is one, and the test images of c4: there are none."""
    folder = shutil.copytree(colours, tmp_path / "colours")
    for path in [*(folder / "train" / "c3").iterdir()][1:]:
        path.unlink()
    shutil.rmtree(folder / "test" / "c4")
    return folder


def test_people_with_too_few_images_are_named(files, poor):
    refused(files("--data", poor, "--forget-classes", "c0,c3"), 2, "c3 has 1 training images: the audit needs 2 or more")
    refused(files("--data", poor, "--forget-classes", "c0,c4"), 2, "c4 has no test images: nothing of it can be audited")


def test_kept_people_without_test_images_are_told(files, colours, tmp_path):
    folder = shutil.copytree(colours, tmp_path / "colours")
    for c in range(5, 10):
        shutil.rmtree(folder / "test" / f"c{c}")
    for figure in ("readout", "verification"):
        refused(files("--data", folder, "--metrics", figure), 2, "test images")


def test_two_photos_of_everybody_are_enough(files, colours, tmp_path):
    folder = shutil.copytree(colours, tmp_path / "colours")
    for person in (folder / "train").iterdir():
        for path in sorted(person.iterdir())[2:]:
            path.unlink()
    code, _, err = files("--data", folder, "--metrics", "probe")
    assert code == 0, err
    assert audit_of(tmp_path / "audit")["requests"][0]["figures"]["probe_embedding"]["value"] is not None


def test_data_of_other_people_are_refused(files, colours, tmp_path):
    for name, change in (("fewer", shutil.rmtree), ("renamed", lambda folder: folder.rename(folder.with_name("d9")))):
        folder = shutil.copytree(colours, tmp_path / name)
        for split in ("train", "test"):
            change(folder / split / "c9")
        told = "knows 10 classes, the data set fewer has 9" if name == "fewer" else "'c9' there, 'd9' here"
        refused(files("--data", folder), 2, told)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--num-references", 2], 2, "3"),
        (["--after", "absent.pth"], 2, "no file absent.pth"),
        (["--forget-classes", ",".join(f"c{c}" for c in range(9))], 2, "the audit needs 2 or more"),
        (["--forget-classes", ",".join(f"c{c}" for c in range(10))], 2, "the audit needs 2 or more"),
        (["--forget-classes", "c0,c3"], 2, "c3 has 1 training images"),
        (["--forget-classes", "c0,c4"], 2, "c4 has no test images"),
        (["--strangers", "known"], 2, "--strangers has 9 identities of the training set"),
    ],
)
def test_what_is_wrong_is_found_before_a_reference_is_trained(
    options,
    code,
    message,
    early,  # noqa: F811
    run,
    poor,
    command,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr("scripts.references.train_references", lambda *_: pytest.fail("references were trained first"))
    shutil.copytree(poor / "test", tmp_path / "known")
    monkeypatch.chdir(tmp_path)
    words = ("--before", early, "--after", run / "checkpoints" / "task_1.pth", "--data", poor, "--forget-classes", "c0,c1")
    refused(command("scripts/audit.py", *words, *options), code, message)


def test_a_run_that_goes_on_after_anothers_first_task_is_audited(run, here, command, tmp_path):  # noqa: F811
    copy, results = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("audit")), results_of(run)
    (copy / "results.json").write_text(json.dumps(results | {"tasks": results["tasks"][1:]}))
    refused(command("scripts/audit.py", copy, "--quick", "--requests", 1), 2, f"--requests 1: {copy} has finished 2")
    code, _, err = command("scripts/audit.py", copy, "--metrics", "readout", "--num-references", 3, "--num-originals", 1)
    assert code == 0, err
    (request,) = audit_of(copy / "audit")["requests"]
    assert (request["task"], request["after_task"], request["forget"]) == (2, 2, SECOND)


def test_the_table_of_a_folder_replaces_nothing_of_the_users(seeds, here, command, tmp_path):  # noqa: F811
    (tmp_path / "audit.md").write_text("mine")
    refused(command("scripts/audit.py", tmp_path, "--quick"), 2, f"{tmp_path / 'audit.md'} is there and not of this script")
    assert (tmp_path / "audit.md").read_text() == "mine"
    (tmp_path / "audit.md").rename(tmp_path / "index.html")
    refused(command("scripts/audit.py", tmp_path, "--quick"), 2, f"{tmp_path / 'index.html'} is there and not of this")


def test_runs_that_are_not_whole_are_refused(run, command, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("audit"))
    config, results = json.loads((copy / "config.json").read_text()), results_of(copy)

    def with_config(**changes: object) -> None:
        (copy / "config.json").write_text(json.dumps(config | changes))

    (copy / "results.json").write_text(json.dumps(results | {"tasks": []}))
    refused(command("scripts/audit.py", copy, "--quick"), 2, str(copy))
    (copy / "results.json").write_text("{}")
    refused(command("scripts/audit.py", copy, "--quick"), 1, "not a results.json of schema 1")
    (copy / "results.json").write_text(json.dumps(results))
    with_config(arguments=config["arguments"] | {"checkpoint": "gone.pth"})
    refused(command("scripts/audit.py", copy, "--quick"), 2, "no file gone.pth: --before says where the checkpoint lies")
    for changes in ({"arguments": {}}, {"arguments": None}, {"hardware": None}):
        with_config(**changes)
        refused(command("scripts/audit.py", copy, "--quick"), 1, str(copy / "config.json"))
    (copy / "config.json").unlink()
    refused(command("scripts/audit.py", copy, "--quick"), 2, f"no file {copy / 'config.json'}")
    assert not (copy / "audit").exists()


def test_a_moved_run_is_audited_where_its_files_are_told(whole, run, early, trained, colours, command, tmp_path):  # noqa: F811
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("audit"))
    config = json.loads((copy / "config.json").read_text())
    config["arguments"] |= {"checkpoint": str(tmp_path / "gone.pth"), "data": str(tmp_path / "gone")}
    (copy / "config.json").write_text(json.dumps(config))
    words = ("scripts/audit.py", copy, "--quick", "--metrics", "readout")
    refused(command(*words, "--data", colours), 2, f"no file {tmp_path / 'gone.pth'}: --before says where")
    refused(command(*words, "--before", early), 2, f"no folder {tmp_path / 'gone'}: --data says where")
    refused(command(*words, "--before", trained), 2, f"{trained} is not the checkpoint that {copy} began with")
    refused(command(*words, "--before", early, "--after", early), 2, "name the folders of runs, or --before, --after")
    assert not (copy / "audit").exists()
    code, _, err = command(*words, "--before", early, "--data", colours)
    assert code == 0, err
    assert audit_of(copy / "audit")["originals"][0]["file"] == str(early)


def test_a_published_checkpoint_is_audited_by_a_recipe_beside_references_or_strangers(
    colours,
    crowd,
    here,  # noqa: F811
    command,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr("util.audit.strangers.GROUPS", 30)
    pre = tmp_path / "pre"
    data = ("--data", colours, "--precision", "fp32")  # at this width bfloat16 is slow on some CPUs
    words = ("--model", "face_vit_p8s8_d6", "--image-size", 32, "--depth", 1, "--epochs", 1, "--published-layout")
    code, _, err = command("train_pretrain.py", *data, *words, "--output-dir", pre)
    assert code == 0, err
    words = ("--before", pre / "published.pth", "--after", pre / "checkpoint.pth", "--forget-classes", "c8,c9")
    words += (*data, "--quick", "--metrics", "readout", "--output-dir", tmp_path / "audit")
    code, _, err = command("scripts/audit.py", *words, "--recipe", pre / "config.json")
    assert code == 0, err
    assert len(here) == 3
    content = audit_of(tmp_path / "audit")
    assert content["recipe"] == torch.load(pre / "checkpoint.pth", weights_only=True)["info"]["recipe"]
    assert "All trained by this recipe" in (tmp_path / "audit" / "audit.html").read_text()
    files = [entry["file"] for entry in content["references"]]
    code, _, err = command("scripts/audit.py", *words, "--references", *files, "--originals", pre / "published.pth")
    assert code == 0, err
    content = audit_of(tmp_path / "audit")
    assert (content["recipe"], [entry["without"] for entry in content["references"]]) == (None, 3 * [["c8", "c9"]])
    assert "All trained by this recipe" not in (tmp_path / "audit" / "audit.html").read_text()
    refused(command("scripts/audit.py", *words), 2, "names no recipe of pre-training")
    code, _, err = command("scripts/audit.py", *words, "--strangers", crowd)  # nothing else can be compared with
    assert code == 0, err
    assert [request["strangers"]["people"] for request in audit_of(tmp_path / "audit")["requests"]] == [22]


def test_names_that_are_no_text_are_audited(colours, here, command, tmp_path):  # noqa: F811
    """Of folders: a byte that is no UTF-8, a newline, a comma, quotes, a leading space, a number."""
    odd = ["\udcff", "c1\nc2", 'a, "b"', " c3", "7"]
    data = shutil.copytree(colours, tmp_path / "colours")
    for c, name in enumerate(odd):
        for split in ("train", "test"):
            (data / split / f"c{c}").rename(data / split / name)
    checkpoint = tmp_path / "pre" / "checkpoint.pth"
    words = ("--data", data, *SMALL, "--epochs", 1, "--output-dir", checkpoint.parent)
    code, _, err = command("train_pretrain.py", *words)
    assert code == 0, err
    people = sorted([*odd, *(f"c{c}" for c in range(5, 10))])
    people, audit = sorted([*odd, *(f"c{c}" for c in range(5, 10))]), tmp_path / "audit\udcfe"
    words = ("--data", data, "--forget-classes", ",".join(f"#{people.index(name)}" for name in odd), "--output-dir", audit)
    words += ("--before", checkpoint, "--after", checkpoint, "--num-references", 3, "--num-originals", 2)
    code, out, err = command("scripts/audit.py", *words, "--metrics", "readout")
    assert code == 0, err
    assert len(here) == 4
    content = audit_of(audit)
    assert [entry["without"] for entry in content["references"]] == 3 * [content["requests"][0]["forget"]]
    assert sorted(content["requests"][0]["forget"]) == sorted(odd)
    assert "\\udcff" in (audit / "audit.html").read_text()
    assert "audit\\udcfe/audit.html" in out


@pytest.fixture
def erased(run, colours, tmp_path) -> Path:
    """The data without any image of the first request's people."""
    folder = shutil.copytree(colours, tmp_path / "colours")
    for name in FIRST:
        for split in ("train", "test"):
            shutil.rmtree(folder / split / name)
    return folder


def test_after_erasure_later_requests_are_audited_alone(run, erased, strangers, here, command, tmp_path):  # noqa: F811
    words = ("scripts/audit.py", run, "--data", erased, "--strangers", strangers, "--output-dir", tmp_path / "audit")
    words += ("--num-references", 3, "--num-originals", 2, "--metrics", "readout", "enrolment")
    gone = "the images of c0, c1, c2, c3, c4 are gone: nothing of them can be audited"
    refused(command(*words), 2, gone)
    refused(command(*words, "--requests", "all"), 2, gone)
    assert not here and not (tmp_path / "audit").exists()
    code, _, err = command(*words, "--requests", 2)
    assert code == 0, err
    assert here == ["colours without 7 classes, seed 1", "colours without 7 classes, seed 2", *here[2:]]
    content = audit_of(tmp_path / "audit")
    (request,) = content["requests"]
    assert (request["forget"], request["images"]) == (SECOND, 8)
    assert all(figure["value"] is not None for figure in request["figures"].values())
    assert [entry["without"] for entry in content["references"]] == 3 * [SECOND]
    assert [entry["without"] for entry in content["originals"]] == 2 * [[]]
    for entry in content["references"]:
        checkpoint = torch.load(entry["file"], weights_only=True)
        assert (checkpoint["model"]["head.weight"] == 0).all(dim=1).tolist() == [True] * 7 + [False] * 3
        assert checkpoint["classes"] == [f"c{c}" for c in range(10)]


def test_references_that_do_not_fit_are_refused(files, references, colours, command, tmp_path):
    folder = shutil.copytree(colours, tmp_path / "fewer")
    for split in ("train", "test"):
        shutil.rmtree(folder / split / "c9")
    for name, data, *words in (
        ("classes", folder, *SMALL),
        ("size", colours, *SMALL[2:], "--image-size", 48),
        ("head", colours, *SMALL, "--head", "softmax"),
    ):
        words = ("--data", data, *words, "--epochs", 1, "--output-dir", tmp_path / name)
        code, _, err = command("train_pretrain.py", *words)
        assert code == 0, err
    for name, told in (
        ("classes", "knows 9 classes, the data set colours has 10"),
        ("size", "was trained on images of 48 pixels"),
        ("head", "in its head bias is unexpected"),
    ):
        path = tmp_path / name / "checkpoint.pth"
        refused(files("--references", *references[:2], path), 2, told)
        refused(files("--originals", path), 2, told)
    assert not (tmp_path / "audit").exists()


def test_what_a_checkpoint_says_of_itself_may_be_anything(files, early, tmp_path):  # noqa: F811
    checkpoint = torch.load(early, weights_only=True)
    checkpoint["info"] = {"acc": float("nan"), "seed": "x", "without_classes": [99], "recipe": {"lr": torch.ones(2)}}
    torch.save(checkpoint, tmp_path / "odd.pth")
    code, _, err = files("--before", tmp_path / "odd.pth")
    assert code == 0, err
    (entry,) = audit_of(tmp_path / "audit")["originals"]
    assert (entry["seed"], entry["acc_remain"], entry["without"]) == (None, None, [])


def test_originals_belong_to_given_references(early, command):  # noqa: F811
    words = ("--before", early, "--after", early, "--forget-classes", "c1", "--originals", early)
    refused(command("scripts/audit.py", *words), 2, "--originals does nothing without --references")


def test_a_folder_of_something_else_is_not_written_to(files, tmp_path):
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "letters.txt").write_text("mine")
    refused(files(), 2, str(tmp_path / "audit"))
    assert [path.name for path in (tmp_path / "audit").iterdir()] == ["letters.txt"]
    (tmp_path / "audit" / "letters.txt").unlink()
    for _ in range(2):
        code, _, err = files()
        assert code == 0, err
    config = json.loads((tmp_path / "audit" / "config.json").read_text())
    assert (config["script"], len(config["arguments"]["references"])) == ("audit.py", 3)
    assert "torch" in config["packages"]
