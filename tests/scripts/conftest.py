"""A model that is quickly trained, and references of it that are trained in this process."""

import contextlib
from pathlib import Path

import pytest

import scripts.references
import train_pretrain
from tests.conftest import SMALL


@pytest.fixture
def early(colours, command, tmp_path_factory) -> Path:
    """A checkpoint that is pre-trained for a few epochs, made once a session: its references are as quickly trained."""
    folder = tmp_path_factory.getbasetemp() / "early"
    if not (folder / "checkpoint.pth").exists():
        options = ("--epochs", 6, "--batch-size", 24, "--lr", "2e-3", "--warmup-epochs", 1, "--output-dir", folder)
        code, _, err = command("train_pretrain.py", "--data", colours, *SMALL, *options)
        assert code == 0, err
    return folder / "checkpoint.pth"


@pytest.fixture
def here(monkeypatch) -> list[str]:
    """References are trained in this process, which spares start-ups: the labels of those that were."""
    trained = []

    def run_jobs(jobs, gpus):
        for job in jobs:
            trained.append(job.label)
            with job.run.open_log() as log, contextlib.redirect_stdout(log):
                train_pretrain.main(job.arguments)
            yield job

    monkeypatch.setattr(scripts.references, "run_jobs", run_jobs)
    return trained
