"""The frame every script runs in."""

import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from util.runtime import distributed
from util.runtime.errors import RunError, UsageError

CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
CANNOT_WRITE |= {errno.EEXIST, errno.ENOENT}  # a file where a folder is to be; a folder that is gone


def run_main(main: Callable[[list[str]], None]) -> None:
    """Run a script's main on its arguments, and end with one line instead of a traceback for what a user can cause.

    Exit code 2 for wrong usage, 1 for a failed run, 130 when interrupted.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        main(sys.argv[1:])
        distributed.stop()
    except (UsageError, RunError) as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        if distributed.rank():  # as all are
            sys.exit(130)
        _fail("interrupted", 130)
    except BrokenPipeError:  # whoever read the output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"cannot write: {error.strerror}{where}; files already complete are kept", 1)


def _fail(message: str, code: int) -> None:
    """Say why, and end. What several processes meet the lowest of them says: torchrun ends the others with it."""
    rank = distributed.rank()
    time.sleep(rank and 2 + rank / 2)
    print(f"{Path(sys.argv[0]).name}: error{f' in process {rank}' if rank else ''}: {message}", file=sys.stderr, flush=True)
    sys.exit(code)
