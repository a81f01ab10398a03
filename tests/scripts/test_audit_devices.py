"""Which GPU an audit runs on."""

import os

import pytest

from scripts import audit
from util.runtime.errors import UsageError


@pytest.mark.parametrize(("gpus", "seen"), [(["--gpus", "2", "3"], "2"), (["--gpus", "GPU-4f"], "GPU-4f"), ([], "7")])
def test_an_audit_runs_on_the_first_of_its_gpus(gpus, seen, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(UsageError, match="no run that has finished a task"):
        audit.main([str(tmp_path), *gpus])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
