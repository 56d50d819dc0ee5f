"""Signals that wait until a micro-batch is done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_HELD = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held_interrupts() -> Iterator[None]:
    """Lets handlers of SIGINT and SIGTERM act only at the end; a second signal of a kind acts at once.

    Axolotl's handler saves the model where it stands, and inside a step that may be with perturbed or attacked
    weights. Signals without a handler in Python end the process at once, and save nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: handler for number in _HELD if callable(handler := signal.getsignal(number))}
    waiting: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if number in waiting:
            handlers[signal.Signals(number)](number, frame)
        waiting.append(number)

    try:
        for number in handlers:
            signal.signal(number, hold)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in dict.fromkeys(waiting):
            signal.raise_signal(late)
