"""A model that is quickly trained."""

from pathlib import Path

import pytest

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
