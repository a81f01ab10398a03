"""Files that are written whole or not at all."""

import contextlib
import hashlib
import io
import json
import math
import os
import tempfile
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
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(TEMPORARY_SUFFIX, f".{path.name}.", path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0600 would lock out the others of a shared machine
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: Path, data: dict) -> None:
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and string metadata as one safetensors file, whole or not at all."""
    with atomic_write(path) as file:
        file.write(save(tensors, metadata=metadata))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file that `save_tensors` wrote. Raises UsageError if it is missing, RunError if it is damaged."""
    if not Path(path).is_file():
        raise UsageError(f"no file {path}")
    try:
        tensors = load_file(path)
    except Exception as error:  # damage makes the reader raise almost anything
        raise RunError(f"{path}: not a readable safetensors file ({error})") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise RunError(f"{path}: {name} holds values that are not finite numbers")
    return tensors


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not finite")
    return number


def read_json(path: Path) -> dict:
    """Read a JSON file. Raises UsageError if it is missing, RunError if it is no JSON object of finite numbers."""
    try:
        data = json.loads(path.read_text(), parse_float=_finite, parse_constant=_finite)
    except FileNotFoundError:
        raise UsageError(f"no file {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(data, dict):
        raise RunError(f"{path}: not a JSON object")
    return data
