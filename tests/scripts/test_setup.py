"""scripts/setup.sh with a stand-in for python3: what is installed where, and when."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
# A Python whose packages are those of the folder `site` beside it. `-m venv` makes one without any, `-m pip install` puts
# alpha 2.0 there, and only what is to find packages really runs. Every call is noted.
STAND_IN = f"""#!/usr/bin/env bash
here=$(cd "$(dirname "$0")" && pwd)
echo "$(basename "$here") $*" >>"$CALLS"
case "$*" in
*sys.executable*) [ ! -f "$here/old" ] && echo "$here/$(basename "$0")" ;;
-V) echo Python 3.8.18 ;;
"-m venv --clear "*) rm -rf "$4" && mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && touch "$4/bin/pip" ;;
"-m ensurepip") touch "$here/pip" ;;
"-m pip --version") [ -f "$here/pip" ] ;;
"-m pip install "*) sleep 1 && "$MAKE" "$here/site" 2.0 ;;
*) PYTHONPATH="$here/site" exec {sys.executable} "$@" ;;
esac
"""
MAKE = """#!/usr/bin/env bash
mkdir -p "$1/alpha-0.dist-info" && echo "print()" >"$1/alpha.py"
printf 'Metadata-Version: 2.1\\nName: alpha\\nVersion: %s\\n' "$2" >"$1/alpha-0.dist-info/METADATA"
"""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A checkout with nothing but the set-up, and a python3 that lacks the package."""
    checkout = tmp_path / "a checkout"
    (checkout / "scripts").mkdir(parents=True)
    for name in ("command_line.sh", "setup.sh"):
        shutil.copy(SCRIPTS / name, checkout / "scripts")
    (checkout / "requirements.txt").write_text("# alphabet>=9 is not meant\nalpha>=1.5  # nor this: beta>=2\n\n")
    python = executable(tmp_path / "bin" / "python3", STAND_IN)
    monkeypatch.setenv("PATH", f"{python.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("MAKE", str(executable(tmp_path / "make", MAKE)))
    monkeypatch.delenv("PYTHON", raising=False)
    return checkout


def start(place: Path, **variables: str) -> subprocess.Popen:
    command = f'source "{place}/scripts/command_line.sh" && source scripts/setup.sh && echo "$PYTHON in $PWD"'
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(["bash", "-c", command], cwd=place.parent, env={**os.environ, **variables}, **pipes)


def run(place: Path, **variables: str) -> tuple[str, str]:
    return tuple(text.strip() for text in start(place, **variables).communicate())


def calls(place: Path, word: str) -> int:
    return sum(word in line for line in (place.parent / "calls").read_text().splitlines())


def has(folder: Path, version: str | None) -> None:
    """Give the Python in this folder that version of the package, or none."""
    shutil.rmtree(folder / "site", ignore_errors=True)
    if version is not None:
        subprocess.run([os.environ["MAKE"], folder / "site", version], check=True)


def own(place: Path) -> str:
    return f"{place.parent / 'bin' / 'python3'} in {place}"


def made(place: Path) -> str:
    return f"{place / '.venv' / 'bin' / 'python'} in {place}"


def test_a_python_with_every_package_is_used_as_it_is(place):
    has(place.parent / "bin", "1.5")
    for _ in range(2):
        assert run(place) == (own(place), "")
    assert not (place / ".venv").exists()
    assert calls(place, "bin - import requirements.txt") == 1, "the second time a stamp spares the imports"


@pytest.mark.parametrize(("version", "told"), [("1.4.9", "alpha>=1.5 (it has 1.4.9)"), (None, "alpha")])
def test_one_that_lacks_a_package_or_its_version_is_not(place, version, told):
    has(place.parent / "bin", version)
    out, err = run(place)
    assert out == made(place)
    assert f"python3 lacks {told}" in err
    assert len(err.splitlines()) == 2


def test_one_whose_package_is_broken_is_not(place):
    has(place.parent / "bin", "2.0")
    (place.parent / "bin" / "site" / "alpha.py").write_text("raise OSError('libalpha.so: cannot open')")
    out, err = run(place)
    assert out == made(place)
    assert "python3 lacks a working package (libalpha.so: cannot open)" in err


def test_one_without_packaging_is_not(place):
    has(place.parent / "bin", "2.0")
    (place.parent / "bin" / "site" / "packaging.py").write_text("raise ImportError(name='packaging')")
    out, err = run(place)
    assert out == made(place)
    assert "python3 lacks packaging:" in err


def test_else_an_environment_is_made_once_though_two_start_at_once(place):
    both = [start(place), start(place)]
    answers = [process.communicate() for process in both]
    again = run(place)
    assert [out.strip() for out, _ in answers] == [made(place)] * 2
    assert again == (made(place), "")
    assert calls(place, "-m pip install") == 1
    assert sum("installing the packages of requirements.txt" in err for _, err in answers) == 1
    assert sum("another script is installing: waiting" in err for _, err in answers) == 1


def test_a_stamp_does_not_outlive_the_packages(place):
    has(place.parent / "bin", "2.0")
    assert run(place)[0] == own(place)
    has(place.parent / "bin", "1.0")
    assert run(place)[0] == made(place)
    has(place / ".venv" / "bin", None)
    assert run(place)[0] == made(place)
    assert calls(place, "-m pip install") == 2
    assert calls(place, "-m venv") == 1


def test_a_stamp_does_not_outlive_another_python3(place):
    assert run(place)[0] == made(place)
    other = executable(place.parent / "other" / "python3", STAND_IN)
    has(other.parent, "2.0")
    assert run(place, PATH=f"{other.parent}:{os.environ['PATH']}")[0] == f"{other} in {place}"


def test_changed_requirements_are_looked_at_again(place):
    run(place)
    (place / "requirements.txt").write_text("alpha>=1.9\n")
    assert run(place) == (made(place), "")
    (place / "requirements.txt").write_text("alpha>=3\n")
    out, err = run(place)
    assert out == ""
    assert ".venv lacks alpha>=3 (it has 2.0), though it was installed" in err
    assert calls(place, "-m pip install") == 2


def test_an_environment_whose_python_is_gone_is_made_anew(place):
    (place / ".venv" / "bin").mkdir(parents=True)
    (place / ".venv" / "bin" / "python").symlink_to(place / "gone")
    assert run(place)[0] == made(place)
    assert calls(place, "-m venv --clear") == 1


def test_one_that_was_left_without_pip_is_completed(place):
    executable(place / ".venv" / "bin" / "python", STAND_IN)
    (place / ".venv" / "theirs").touch()
    assert run(place)[0] == made(place)
    assert (place / ".venv" / "theirs").exists()
    assert calls(place, "-m ensurepip") == 1


def test_a_python3_that_is_too_old_says_so_unless_an_environment_is_there(place):
    (place.parent / "bin" / "old").touch()
    out, err = run(place)
    assert out == ""
    assert err == "setup: python3 is Python 3.8.18: install Python 3.10 or newer"
    (place.parent / "bin" / "old").unlink()
    assert run(place)[0] == made(place)
    (place.parent / "bin" / "old").touch()
    assert run(place) == (made(place), "")


def test_a_folder_that_cannot_be_written_needs_no_stamp(place):
    has(place.parent / "bin", "2.0")
    (place / ".setup").mkdir()
    assert run(place) == (own(place), "")


def test_a_python_of_the_callers_is_taken_as_it_is(place):
    assert run(place, PYTHON="bin/python3") == (own(place), "")
    assert not (place.parent / "calls").exists()


def test_a_failed_installation_says_so(place):
    broken = place.parent / "bin" / "python3"
    broken.write_text(STAND_IN.replace('sleep 1 && "$MAKE" "$here/site" 2.0', "echo no network >&2; exit 1"))
    process = start(place)
    out, err = process.communicate()
    assert process.returncode == 1
    assert out == ""
    assert "no network" in err
    assert "setup: the installation failed" in err
