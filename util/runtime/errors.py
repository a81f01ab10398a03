"""What a user can cause: `run_main` (util/cli/main.py) prints it in one line and ends with `exit_code`."""


class UsageError(Exception):
    """The command asks for something impossible (a missing folder, a class count that does not fit)."""

    exit_code = 2


class RunError(Exception):
    """The command was right and the run failed (a damaged file, a NaN loss, a full disk)."""

    exit_code = 1


def one_line(error: BaseException, line: int = 0) -> str:
    """A line of what a library says, or the kind of error where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[line]
