"""Which requests of which runs scripts/audit.py audits, against which models and strangers."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tests.conftest import SMALL, results_of
from tests.scripts.audit.conftest import FIRST, QUICK, SECOND, audit_of, rows_of
from tests.test_bad_input import refused
from util.audit.statistics import compare
from util.runtime.files import sha256


def test_all_requests_each_after_its_task_and_after_the_last(whole, run, here, command, tmp_path):
    options = ("--requests", "all", "--metrics", "readout", "verification", "--num-references", 3, "--num-originals", 1)
    code, out, err = command("scripts/audit.py", run, *options, "--output-dir", tmp_path)
    assert code == 0, err
    assert [label.split(", ")[0] for label in here][-3:] == ["colours without 7 classes"] * 3
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
    assert heads == [f"{name}, a first look" for name in ("Request 1", "Request 2", "Request 1, after task 2")]


def test_requests_by_number_are_audited_after_their_tasks(run, here, command, tmp_path):
    options = ("--metrics", "readout", "--num-references", 3, "--num-originals", 1, "--output-dir", tmp_path)
    code, _, err = command("scripts/audit.py", run, "--requests", 2, *options)
    assert code == 0, err
    (request,) = audit_of(tmp_path)["requests"]
    assert (request["task"], request["after_task"], request["forget"]) == (2, 2, SECOND)
    code, _, err = command("scripts/audit.py", run, "--requests", 1, 3, *options)
    assert code == 2
    assert err.startswith("audit.py: error: --requests 3: ") and err.endswith(" has finished 1, 2\n")


def test_a_first_look_is_four_figures_beside_three_references(whole, run, here, command, tmp_path):
    here.clear()  # what the fixtures have trained
    code, out, err = command("scripts/audit.py", run, "--quick", "--output-dir", tmp_path)
    assert code == 0, err
    content = audit_of(tmp_path)
    (request,) = content["requests"]
    assert {*request["figures"]} == {*QUICK}
    assert (len(content["references"]), len(content["originals"])) == (3, 1)
    assert not here
    assert (tmp_path / "audit.html").exists()
    lines = out.splitlines()
    assert lines[0] == "Request 1, a first look: are its 5 people still known? 20 test faces, %"
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


def test_a_comparison_is_audited_run_by_run_beside_shared_references(early, colours, here, command, tmp_path):
    words = ("--checkpoint", early, "--data", colours, "--forget-classes", "c8,c9", "--epochs", 1, "--data-ratio", 1)
    folder = tmp_path / "runs"
    code, _, err = command("scripts/compare.py", "--methods", "gs_lora", "l2", "--output-dir", folder, "--", *words)
    assert code == 0, err
    (folder / "der-seed1337").mkdir()  # has not finished a task
    code, out, err = command("scripts/audit.py", folder, "--quick")
    assert code == 0, err
    assert here == ["GS-LoRA", "L2*", *(f"colours without 2 classes, seed {seed}" for seed in (1, 2, 3))]
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
    assert rows["verdict"]["GS-LoRA", "request"] == other["requests"][0]["verdict"]
    assert rows["never_seen"]["L2*", "verification_auc"] == pytest.approx(
        np.mean(one["requests"][0]["figures"]["verification_auc"]["references"])
    )
    refused(command("scripts/audit.py", folder, "--quick", "--output-dir", folder / "one"), 2, "--output-dir is for one run")
    assert not (folder / "one").exists()


def test_each_seed_of_a_comparison_has_a_table(seeds, here, command, tmp_path):
    """Whom a run forgets may depend on its seed."""
    code, out, err = command("scripts/audit.py", tmp_path, "--quick")
    assert code == 0, err
    assert rows_of(tmp_path / "audit.md") == ["Method", "Never seen", "Originals", "L2*"] * 2
    heads = [line for line in (tmp_path / "audit.md").read_text().splitlines() if line.startswith("## ")]
    assert heads == ["## Seed 1", "## Seed 2"]
    printed = [line.split()[0] for line in out.splitlines() if line[:2] in ("Re", "Ne", "L2")]
    assert printed == ["Request", "Never", "L2*"] * 2


def test_the_pages_of_several_runs_are_where_it_says(seeds, here, command):
    code, out, err = command("scripts/audit.py", *seeds, "--quick", "--metrics", "readout")
    assert code == 0, err
    told = out.splitlines()[-1].split("look at: ")[1]
    for folder in seeds:
        page = folder / "audit" / "audit.html"
        assert page.exists()
        assert str(page) in told or page in Path("/").glob(told[1:])


def test_two_checkpoints_are_audited_without_a_run(early, run, colours, here, command, tmp_path, monkeypatch):
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


def test_given_references_and_originals_are_used(files, references, trained, here, tmp_path):
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


def test_beside_strangers_nothing_is_trained(run, crowd, here, command, tmp_path, monkeypatch):
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
        assert request["figures"]["enrolment_5"]["reason"] == "needs strangers with 9 photos"
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
    assert [line.split()[0] for line in out.splitlines() if line[:2] in ("Ne", "St")] == ["Never"]


def test_a_name_given_twice_counts_once(files, tmp_path):
    code, _, err = files("--forget-classes", "c0,c1,#0,c1")
    assert code == 0, err
    assert audit_of(tmp_path / "audit")["requests"][0]["forget"] == ["c0", "c1"]


def test_the_pre_trained_model_itself_is_never_as_if_never_seen(files, early, tmp_path):
    """Nobody's identity is at the bottom of its list either: a sign flip of 0 alone acquits no model."""
    code, _, err = files("--after", early)
    assert code == 0, err
    (request,) = audit_of(tmp_path / "audit")["requests"]
    assert request["figures"]["sign_flip"]["value"] == 0
    assert request["verdict"] in ("still known", "not enough evidence")


def test_a_figure_of_which_those_who_know_show_less_cannot_tell():
    """Else a model that shows nothing of it would still know."""
    assert compare(0.0, [100.0, 100.0, 100.0], [85.0, 40.0], resolution=5.0)["verdict"] == "inconclusive"


def test_a_run_that_goes_on_after_anothers_first_task_is_audited(run, here, command, tmp_path):
    copy, results = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("audit")), results_of(run)
    (copy / "results.json").write_text(json.dumps(results | {"tasks": results["tasks"][1:]}))
    refused(command("scripts/audit.py", copy, "--quick", "--requests", 1), 2, f"--requests 1: {copy} has finished 2")
    code, _, err = command("scripts/audit.py", copy, "--metrics", "readout", "--num-references", 3, "--num-originals", 1)
    assert code == 0, err
    (request,) = audit_of(copy / "audit")["requests"]
    assert (request["task"], request["after_task"], request["forget"]) == (2, 2, SECOND)


def test_a_moved_run_is_audited_where_its_files_are_told(whole, run, early, trained, colours, command, tmp_path):
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
    colours, crowd, here, command, tmp_path, monkeypatch
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


def test_names_that_are_no_text_are_audited(colours, here, command, tmp_path):
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


def test_after_erasure_later_requests_are_audited_alone(run, erased, strangers, here, command, tmp_path):
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


def test_originals_belong_to_given_references(early, command):
    words = ("--before", early, "--after", early, "--forget-classes", "c1", "--originals", early)
    refused(command("scripts/audit.py", *words), 2, "--originals does nothing without --references")
