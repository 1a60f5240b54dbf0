"""SIGTERM and SIGINT during training: save what was trained, and leave with a code that says so."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch.utils.data import get_worker_info

# EX_TEMPFAIL of sysexits.h, "try again": a run that leaves with it loses nothing when it is resumed.
EXIT_RESUMABLE = 75
LISTENED = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """A signal asked the run to stop. No `Exception`, so that nobody who handles those swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.name = signal.Signals(number).name


class SignalWatch:
    """Turns signals into `Interrupted`, raised in the main thread where it does no harm.

    Raised at once, it ends a forward pass, a generation, a reward call or a wait after the operation that runs. Within
    a protected region (the optimizer's step, a save) it waits for the region's end. With several processes it waits for
    `Agreement` between two steps, because each would stop elsewhere, and the others would wait for it for ever.

    Args:
        raises_at_once: False where processes have to agree first.
    """

    def __init__(self, *, raises_at_once: bool) -> None:
        self.raises_at_once = raises_at_once
        self.received: int | None = None
        self._depth = 0
        self._process = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals during the block; outside the main thread, which no signal reaches, do nothing."""
        self.received, self._depth, self._process = None, 0, os.getpid()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {number: signal.signal(number, self._handle) for number in LISTENED}
        try:
            yield
        finally:
            for number, handler in before.items():
                if handler is not None:  # a program around Python's set it, and only that can set it again
                    signal.signal(number, handler)

    @contextlib.contextmanager
    def protected(self) -> Iterator[None]:
        """Let the block end before a signal is heard."""
        self.protect()
        try:
            yield
        finally:
            self._depth -= 1
        self.check()

    def protect(self) -> None:
        """Begin a region that ends with `release`."""
        self._depth += 1

    def release(self) -> None:
        """End every region that is open, and hear the signal that came meanwhile."""
        self._depth = 0
        self.check()

    def check(self) -> None:
        """Raise if a signal came and nothing has to be waited for.

        Raises:
            Interrupted: now.
        """
        if self.received is not None and self.raises_at_once and self._depth == 0:
            raise Interrupted(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            _handle_in_child(number)
            return
        if number == signal.SIGINT and self.received == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt("interrupted twice: stopped at once, nothing more was saved")
        if self.received is None or number == signal.SIGINT:
            first = self.received is None
            self.received = number
            if first:
                self.check()


def _handle_in_child(number: int) -> None:
    """A forked process has our handler too, and Ctrl-C reaches the whole group.

    A data worker waits for the process that reads from it to end it: one that dies raises an error there, which would
    stop the save.
    """
    if number == signal.SIGINT and get_worker_info() is None:
        raise KeyboardInterrupt
    if number == signal.SIGTERM:
        raise SystemExit(128 + number)
