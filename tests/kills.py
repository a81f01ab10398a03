"""Kill real processes of train_forget.py and train_pretrain.py at random moments, resume them, and compare the ends.

python tests/kills.py SCRATCH KILLS SEED -- SCRIPT ARGUMENTS…     KILLS by SIGKILL at least; prints one JSON line of counts
A process is forked from this one, which has imported everything and computed nothing, so that it starts at once. Each
round kills it twice, by SIGKILL or, once in three times, by SIGTERM, and lets the third one end; its files must be those
of an uninterrupted run, byte by byte but for times. Whatever a kill leaves must be whole.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_forget
import train_pretrain
import util.report.figures  # noqa: F401  imported by every run, at its end: once is enough
from util.cli.main import run_main

SCRIPTS = {"train_forget.py": train_forget.main, "train_pretrain.py": train_pretrain.main}
TIMES = {"train_seconds", "eval_seconds", "images_per_second", "peak_memory_mb", "started", "finished", "resumed"}
# Where a run may differ from another of the same options: file names in it, the way there, times.
NOT_COMPARED = {"config.json", "last.pth", "figure.png", "table.md", "log", ".lock"}


def start(script: str, words: list[str], log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [script, *words]
    code = 0
    try:
        run_main(SCRIPTS[script])
    except SystemExit as exit_:
        code = exit_.code or 0
    sys.stdout.flush()
    os._exit(code)


def run(script: str, words: list[str], log: Path) -> float:
    """Let a process end well. Returns its seconds."""
    begun = time.monotonic()
    _, status = os.waitpid(start(script, words, log), 0)
    if status:
        sys.exit(f"{script} {' '.join(words)}: exit code {os.waitstatus_to_exitcode(status)}\n{log.read_text()[-3000:]}")
    return time.monotonic() - begun


def kill(script: str, words: list[str], log: Path, after: float, number: signal.Signals) -> bool:
    """Whether the process was still there to be killed."""
    pid = start(script, words, log)
    time.sleep(after)
    os.kill(pid, number)  # as long as it was not waited for, the number is its own
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -number, 128 + number):
        sys.exit(f"{number.name} after {after:.3f} s: exit code {code}\n{log.read_text()[-3000:]}")
    return code != 0


def check_whole(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.name.startswith("."):
            continue  # temporary, or the lock
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".pth":
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    sys.exit(f"{path}: damaged")


def content(folder: Path) -> dict[str, str]:
    """A hash of every file that counts, times left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in NOT_COMPARED and "tfevents" not in path.name:
            text = path.read_bytes()
            if path.suffix == ".json":
                text = json.dumps(without_times(json.loads(text)), sort_keys=True).encode()
            elif path.suffix == ".safetensors":  # writes its header's entries in any order
                end = 8 + int.from_bytes(text[:8], "little")
                text = json.dumps(json.loads(text[8:end]), sort_keys=True).encode() + text[end:]
            found[str(path.relative_to(folder))] = hashlib.sha256(text).hexdigest()
    return found


def without_times(value):
    if isinstance(value, dict):
        dropped = TIMES | {"previous_record", "output_dir", "resume", "save_every"}
        return {key: without_times(inner) for key, inner in value.items() if key not in dropped}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def main() -> None:
    split = sys.argv.index("--")
    scratch, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    script, *words = sys.argv[split + 1 :]
    chance = random.Random(seed)
    scratch.mkdir(parents=True, exist_ok=True)
    log, whole = scratch / "log", scratch / "whole"
    seconds = run(script, [*words, "--output-dir", str(whole)], log)
    expected = content(whole)
    done = {"by": {"SIGKILL": 0, "SIGTERM": 0}, "rounds": 0, "files": len(expected)}
    while done["by"]["SIGKILL"] < kills:
        folder = scratch / f"round_{done['rounds']}"
        again = [*words, "--output-dir", str(folder), "--resume"]
        for _ in range(2):
            number = signal.SIGTERM if chance.random() < 1 / 3 else signal.SIGKILL
            killed = kill(script, again, log, chance.uniform(0.05, 1) * seconds, number)
            check_whole(folder)
            done["by"][number.name] += killed
        run(script, again, log)
        found = content(folder)
        if found != expected:
            differing = sorted(path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path))
            sys.exit(f"round {done['rounds']}: not the same as uninterrupted: {', '.join(differing)}")
        done["rounds"] += 1
    print(json.dumps(done))


if __name__ == "__main__":
    main()
