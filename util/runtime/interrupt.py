"""SIGINT and SIGTERM while training: the step at hand is finished, the run saved, and then it ends."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from util.runtime import distributed
from util.runtime.errors import RunError


class Interrupted(RunError):
    """The run was asked to stop, and could save before."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


@contextlib.contextmanager
def stop_on_signals() -> Iterator[list[signal.Signals]]:
    """Inside, SIGINT and SIGTERM are noted in the list; a SIGINT after the first interrupts at once, as it would outside.

    In the main thread alone. Several processes would each stop at a step of their own: they end at once instead, and
    continue from the last save.
    """
    received: list[signal.Signals] = []

    def note(number: int, _: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number))

    alone = threading.current_thread() is threading.main_thread() and distributed.world_size() == 1
    with _handled_by(note, signal.SIGINT, signal.SIGTERM) if alone else contextlib.nullcontext():
        yield received


def end_on_sigterm() -> contextlib.AbstractContextManager:
    """Inside, SIGTERM ends the script as SIGINT does, so that it can end what it has started. In the main thread alone."""

    def end(number: int, _: object) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}", number)

    return _handled_by(end, signal.SIGTERM)


@contextlib.contextmanager
def deferred(*numbers: signal.Signals) -> Iterator[None]:
    """Inside, these signals wait. In the main thread alone."""
    received: list[int] = []
    with _handled_by(lambda number, _: received.append(number), *numbers):
        yield
    for number in received:
        signal.raise_signal(number)


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, object], None], *numbers: signal.Signals) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
