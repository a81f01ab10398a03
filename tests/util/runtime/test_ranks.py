"""What several processes share out, and how long they wait for each other."""

import json
from pathlib import Path

import pytest

from tests.util.runtime.test_distributed import torchrun


@pytest.fixture(scope="module")
def found() -> dict:
    done = torchrun(Path(__file__).with_name("ranks_worker.py"))
    lines = [line for line in done.stderr.splitlines() if line.startswith("{")]
    assert len(lines) == 1, done.stderr
    return json.loads(lines[0])


@pytest.mark.parametrize("what", ["images", "one image", "batches"])
def test_importances_are_those_of_one_process_whatever_each_has_room_for(found, what):
    assert found[what] < 1e-12


def test_only_decoding_is_waited_for_long(found):
    assert 600 <= found["timeout"] <= 1800
    assert not found["waited"]  # longer than DECODING, which the worker sets to seconds
