"""Files that are written whole or not at all, and read or refused in one line."""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from safetensors.torch import load_file, save
from torch import Tensor

from util.runtime import distributed
from util.runtime.errors import RunError, UsageError

TEMPORARY_SUFFIX = ".tmp"


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside `path` for writing; on leaving the block it is synced and renamed to `path`.

    If the block raises, `path` is untouched and nothing is left behind. OSError (a full disk) is passed on. Where several
    processes share a run, the first one writes.
    """
    if distributed.rank():
        yield io.BytesIO()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of the file `path`, made if need be, until the block ends or the process dies, however it dies.

    Raises BlockingIOError if another process holds it and `wait` is off. A file system without locks (some NFS) is told in
    one line on stderr, and the block runs without.
    """
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError as error:
            message = f"{path.parent} cannot be locked ({error.strerror}): nothing keeps a second run out"
            print(f"warning: {message}", file=sys.stderr)
        yield


@contextlib.contextmanager
def readable(path: Path, complaint: str = "damaged checkpoint") -> Iterator[None]:
    """Turn what reading a missing, damaged or dangerous file raises into one line: UsageError or RunError."""
    if not path.is_file():
        raise UsageError(f"no file {path}")
    try:
        yield
    except (UsageError, RunError):
        raise
    except Exception as error:  # damage makes the readers raise almost anything
        if isinstance(error.__cause__ or error, pickle.UnpicklingError):  # whose text tells how to load it nevertheless
            raise RunError(f"{path}: refused: it holds more than tensors and plain values, or is no checkpoint") from None
        line = (str(error).splitlines() or [""])[0]
        raise RunError(f"{path}: {complaint}: {type(error).__name__} {line}") from None


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        # A file name that is no UTF-8 is there as Python reads it: its odd bytes are written as \\udcXX.
        file.write(text.encode(errors="backslashreplace"))


def write_json(path: Path, data: dict) -> None:
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict:
    """Read a JSON object of finite numbers."""
    with readable(path, "not readable as JSON"):
        data = json.loads(path.read_text())
        json.dumps(data, allow_nan=False)  # raises for NaN and infinities, which Python's reader takes
    if not isinstance(data, dict):
        raise RunError(f"{path}: not a JSON object")
    return data


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    with atomic_write(path) as file:
        file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=metadata))


def load_tensors(path: Path) -> dict[str, Tensor]:
    with readable(path, "not a readable safetensors file"):
        tensors = load_file(path)
        check_finite(tensors, path)
    return tensors


def check_finite(tensors: dict[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise RunError(f"{path}: {name} holds values that are not finite; the file is damaged, or its training diverged")


def state_mismatch(state: dict, expected: dict[str, Tensor]) -> str:
    """What keeps `state` from being loaded where `expected` is the state dict; empty if nothing does."""
    problems = [f"{key} is missing" for key in expected if key not in state]
    problems += [f"{key} is unexpected" for key in state if key not in expected]
    for key, ours in expected.items():
        value = state.get(key, ours)
        if not isinstance(value, Tensor) or value.is_floating_point() != ours.is_floating_point():
            problems.append(f"{key} is no {'float' if ours.is_floating_point() else 'integer'} tensor")
        elif value.shape != ours.shape:
            problems.append(f"{key} has shape {tuple(value.shape)}, not {tuple(ours.shape)}")
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more
