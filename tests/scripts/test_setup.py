"""scripts/setup.sh with a stand-in for python3: what is installed where, and when."""

import os
import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "scripts" / "setup.sh"
# Imports succeed where the file `complete` lies beside the interpreter; `-m venv` makes an interpreter without it, and
# `-m pip` completes it. Every call is noted.
STAND_IN = """#!/usr/bin/env bash
here=$(dirname "$0")
echo "$(basename "$here") $*" >>"$CALLS"
case "$1 $2" in
"-c "*) echo "$0" ;;
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip") sleep 1 && touch "$here/complete" ;;
"- "*) cat >/dev/null && [ -f "$here/complete" ] ;;
esac
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A checkout with nothing but the set-up, and a python3 that lacks the packages."""
    checkout = tmp_path / "a checkout"
    (checkout / "scripts").mkdir(parents=True)
    (checkout / "scripts" / "setup.sh").write_text(SETUP.read_text())
    (checkout / "requirements.txt").write_text("torch>=2\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text(STAND_IN)
    (tmp_path / "bin" / "python3").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.delenv("PYTHON", raising=False)
    return checkout


def start(place: Path) -> subprocess.Popen:
    command = ["bash", "-c", f'source "{place}/scripts/setup.sh" && echo "$PYTHON in $PWD"']
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/")


def calls(place: Path, word: str) -> int:
    return sum(word in line for line in (place.parent / "calls").read_text().splitlines())


def test_a_python_with_every_package_is_used_as_it_is(place):
    (place.parent / "bin" / "complete").touch()
    for _ in range(2):
        out, err = start(place).communicate()
        assert out.strip() == f"{place.parent / 'bin' / 'python3'} in {place}"
        assert err == ""
    assert not (place / ".venv").exists()
    assert calls(place, "bin - requirements.txt") == 1, "the second time a stamp spares the check"


def test_else_an_environment_is_made_once_though_two_start_at_once(place):
    both = [start(place), start(place)]
    answers = [process.communicate() for process in both]
    again = start(place).communicate()
    for out, _ in [*answers, again]:
        assert out.strip() == f"{place / '.venv' / 'bin' / 'python'} in {place}"
    assert calls(place, "-m pip") == 1
    assert sum("installing the packages of requirements.txt" in err for _, err in answers) == 1
    assert again[1] == ""


def test_changed_requirements_are_looked_at_again(place):
    start(place).communicate()
    (place / "requirements.txt").write_text("torch>=3\n")
    (place / ".venv" / "bin" / "complete").unlink()
    start(place).communicate()
    assert calls(place, "-m pip") == 2
    assert calls(place, "-m venv") == 1


def test_a_failed_installation_says_so(place):
    broken = place.parent / "bin" / "python3"
    broken.write_text(STAND_IN.replace('sleep 1 && touch "$here/complete"', "echo no network >&2; exit 1"))
    process = start(place)
    out, err = process.communicate()
    assert process.returncode == 1
    assert out == ""
    assert "no network" in err
    assert "setup: the installation failed" in err
