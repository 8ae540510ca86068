"""SIGINT and SIGTERM end a loop where it can be continued, not where it happens to be."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Stop:
    """Notes SIGINT and SIGTERM, so that a loop can stop where it may be continued; a second SIGINT acts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def check(self) -> None:
        """Raise `Stopped` if a signal came."""
        if self.signal is not None:
            raise Stopped

    def exception(self) -> BaseException:
        """What ends the process as the signal would have."""
        return KeyboardInterrupt() if self.signal == signal.SIGINT else SystemExit(128 + (self.signal or 0))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        self._restore(signal.SIGINT)  # not SIGTERM, which many send to a whole group and to each of its processes

    def _restore(self, *numbers: int) -> None:
        for number in numbers or tuple(self._previous):
            if number in self._previous:
                signal.signal(number, self._previous.pop(number))


class Stopped(Exception):
    """A signal asked the loop to stop."""
