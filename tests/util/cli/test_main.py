"""How a script ends."""

import time

import pytest

from util.cli.main import run_main
from util.runtime.errors import RunError, UsageError


@pytest.fixture
def ended(monkeypatch, capsys):
    """ended(error, rank) → the exit code, what process `rank` of torchrun's says, and the seconds before it does."""

    def ended(error: BaseException, rank: int) -> tuple[int, str, float]:
        slept = []
        monkeypatch.setattr(time, "sleep", slept.append)
        monkeypatch.setattr("sys.argv", ["folder/script.py"])
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a test")
        monkeypatch.setenv("RANK", str(rank))

        def main(argv: object) -> None:
            raise error

        with pytest.raises(SystemExit) as caught:
            run_main(main)
        return caught.value.code, capsys.readouterr().err, sum(slept)

    return ended


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize(("error", "code"), [(RunError("the disk is full"), 1), (UsageError("no such folder"), 2)])
def test_what_another_process_than_the_first_meets_is_said(ended, error, code, rank):
    assert ended(error, rank)[:2] == (code, f"script.py: error in process {rank}: {error}\n")


def test_what_all_meet_the_first_says_before_the_others(ended):
    code, said, first = ended(RunError("damaged"), 0)
    assert (code, said, first) == (1, "script.py: error: damaged\n", 0)
    waits = [ended(RunError("damaged"), rank)[2] for rank in (1, 2, 3)]
    assert waits == sorted({*waits})
    assert waits[0] > 2  # torchrun has ended them by then


def test_an_interrupt_is_said_once(ended):
    assert ended(KeyboardInterrupt(), 0)[:2] == (130, "script.py: error: interrupted\n")
    assert ended(KeyboardInterrupt(), 1) == (130, "", 0)
