"""Runs of two requests on small images, of five people and of two, and what their audits need."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from sklearn.manifold import TSNE
from sklearn.model_selection import GridSearchCV

from tests.conftest import coloured_images, results_of, write_folder

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
def run(early, colours, command, tmp_path_factory) -> Path:
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
def whole(run, strangers, here, command, tmp_path_factory) -> Path:
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
def files(early, run, colours, references, command, tmp_path):
    """Audit two checkpoints beside given references."""
    words = ("--before", early, "--after", run / "checkpoints" / "task_1.pth", "--forget-classes", ",".join(FIRST))
    words += ("--data", colours, "--references", *references, "--metrics", "readout", "--output-dir", tmp_path / "audit")
    return lambda *more: command("scripts/audit.py", *words, *more)


def audit_of(folder: Path) -> dict:
    """audit.json, which holds finite numbers alone."""

    def refuse(word: str):
        raise AssertionError(f"{word} in {folder}/audit.json")

    return json.loads((folder / "audit.json").read_text(), parse_constant=refuse)


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


@pytest.fixture
def poor(colours, tmp_path) -> Path:
    """The data, but for the training images of c3, of which there is one, and the test images of c4: there are none."""
    folder = shutil.copytree(colours, tmp_path / "colours")
    for path in [*(folder / "train" / "c3").iterdir()][1:]:
        path.unlink()
    shutil.rmtree(folder / "test" / "c4")
    return folder


@pytest.fixture
def erased(run, colours, tmp_path) -> Path:
    """The data without any image of the first request's people."""
    folder = shutil.copytree(colours, tmp_path / "colours")
    for name in FIRST:
        for split in ("train", "test"):
            shutil.rmtree(folder / split / name)
    return folder
