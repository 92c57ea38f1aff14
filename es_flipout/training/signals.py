"""Handling of the signals that ask a process to end: Ctrl-C, SIGTERM (a scheduler), SIGHUP (a closed terminal)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # SIGHUP does not exist on Windows
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """The process was asked to end.

    Attributes:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Handler:
    """Calls ``stop`` at the first signal. Later ones have nothing to add while files are being saved, except Ctrl-C.

    Attributes:
        number: the first signal; None before.
    """

    def __init__(self, stop: Callable[[int], None]) -> None:
        self._stop = stop
        self.number: int | None = None

    def __call__(self, number: int, frame: object = None) -> None:
        """Handle a signal."""
        if self.number is None:
            self.number = number
            self._stop(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt


@contextmanager
def stop_on_signals(stop: Callable[[int], None], at_the_end: bool = False) -> Iterator[Handler]:
    """Call ``stop`` at the first signal that asks the process to end (main thread only).

    After that, SIGTERM and SIGHUP are ignored and Ctrl-C raises KeyboardInterrupt. Signals that were ignored before, as
    ``nohup`` does, stay so. Within another such context, a signal that the outer one has had counts: Python ignores
    what a handler raises while an object is finalized or C code calls back, so that ``stop`` may have had no effect.

    Args:
        stop: called with the number of the signal.
        at_the_end: the process ends after this context: ignore further signals instead of restoring handlers.
    """
    handler = Handler(stop)
    if threading.current_thread() is not threading.main_thread():
        yield handler
        return
    previous = {number: signal.getsignal(number) for number in _SIGNALS}
    previous = {number: before for number, before in previous.items() if before not in (signal.SIG_IGN, None)}
    for number in previous:
        signal.signal(number, handler)
    try:
        earlier = next((before.number for before in previous.values() if isinstance(before, Handler)), None)
        if earlier is not None:
            handler(earlier)
        yield handler
    finally:
        for number, before in previous.items():
            if isinstance(before, Handler) and before.number is None:
                before.number = handler.number
            signal.signal(number, signal.SIG_IGN if at_the_end else before)


def raise_stopped(number: int) -> None:
    """Raise :class:`Stopped`."""
    raise Stopped(number)
