"""Commands with random odd values: each runs, or ends in one line that says why, and refused ones touch nothing.

FUZZ_COMMANDS=2000 pytest -rP tests/test_odd_commands.py tries that many of each script.
"""

import argparse
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

import test
import train_forget
import train_pretrain
from methods import METHODS
from tests.conftest import SMALL

COMMANDS = int(os.environ.get("FUZZ_COMMANDS", "40"))
NUMBERS = ["-1", "0", "1", "3", "2.5", "1e-300", "1e300", "nan", "inf", "-inf", "", "x", "½", "0x10", "1_0"]
WORDS = ["", " ", "x", "-", "c1", "c1,c1", "c1,,c2", '"c1', "c3,99", "\N{SNOWMAN}", "a\nb", "x" * 300]
WORDS += ["cosface", "adam", "off"]
LARGE = "99999999999999999999"
# They would write elsewhere, compile for long, or ask the network.
LEFT_OUT = {"help", "output_dir", "cache_dir", "compile", "pretrained"}


def parser_of(script: str, method: str) -> argparse.ArgumentParser:
    if script == "train_forget.py":
        return train_forget.build_parser(METHODS[method], None)
    return train_pretrain.build_parser() if script == "train_pretrain.py" else test.build_parser()


def odd_words(parser: argparse.ArgumentParser, chance: random.Random, paths: list[str]) -> list[str]:
    """One to three options of the parser, each with a value that may or may not make sense."""
    words = []
    for action in chance.sample([a for a in parser.actions() if a.dest not in LEFT_OUT], chance.randint(1, 3)):
        if getattr(action.type, "__name__", "") in ("int", "float"):
            values = NUMBERS + [LARGE] * ("seed" in action.dest)
        elif action.type is Path:
            values = paths
        else:
            values = [*WORDS, *paths, *(action.choices or [])]
        count = 0 if action.nargs == 0 else chance.choice([1, 1, 1, 1, 0, 2])
        words += [action.option_strings[0], *(chance.choice(values) for _ in range(count))]
    return words


@pytest.mark.parametrize("script", ["train_forget.py", "train_pretrain.py", "test.py"])
def test_odd_commands_run_or_say_why_not(script, trained, colours, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output, chance, codes = tmp_path / "run", random.Random(script), Counter()
    (tmp_path / "text.json").write_text("[1]")
    (tmp_path / "empty").mkdir()
    own = {
        "train_forget.py": ["--checkpoint", trained, "--num-tasks", 1, "--epochs", 1, "--batch-size", 12],
        "train_pretrain.py": [*SMALL, "--epochs", 1, "--batch-size", 40],
        "test.py": ["--checkpoint", trained, "--random-pairs", 10],
    }[script]
    base = [*map(str, [*own, "--data", colours, "--device", "cpu", "--output-dir", output])]
    assert command(script, *base)[0] == 0
    paths = ["absent", "empty", "text.json", "/dev/null", "", str(colours), str(trained), str(output)]
    paths += [str(file) for file in output.rglob("*") if file.suffix in (".json", ".pth", ".safetensors")]
    shutil.copytree(output, tmp_path / "whole")
    for _ in range(COMMANDS):
        method = chance.choice([*METHODS])
        words = [*base, "--method", method] if script == "train_forget.py" else list(base)
        words += ["--overwrite"] * (script != "test.py") + odd_words(parser_of(script, method), chance, paths)
        code, _, err = command(script, *words)
        lines = [line for line in err.splitlines() if f"{script}: error: " in line]
        assert code in (0, 1, 2), (code, words[len(base) :], err)
        assert "Traceback" not in err, (words[len(base) :], err)
        assert len(lines) == (code > 0), (code, words[len(base) :], err)
        codes[code] += 1
        if code == 2:
            assert content(output) == content(tmp_path / "whole"), words[len(base) :]
        else:
            shutil.rmtree(output)
            shutil.copytree(tmp_path / "whole", output)
    print(script, dict(codes))
    assert codes[2] > COMMANDS / 4


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != ".lock"}
