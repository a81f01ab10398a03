"""What a user can cause, told in one line.

Raise these instead of a bare exception wherever the message says what is wrong, where, and what to do;
`util.cli.main.run_main` prints that line without a traceback and ends with `exit_code`.
"""


class UsageError(Exception):
    """The command asks for something impossible (a missing folder, a class count that does not fit)."""

    exit_code = 2


class RunError(Exception):
    """The command was right and the run failed (a damaged file, a NaN loss, a full disk)."""

    exit_code = 1
