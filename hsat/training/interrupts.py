"""Ctrl-C and SIGTERM end a training between two steps, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from hsat.distributed import World


class TrainingInterrupted(Exception):
    """A training was ended by a signal after a whole step, and its state was saved.

    Attributes:
        step: Steps made.
        total: Steps of the whole run.
        signal: Number of the signal.
    """

    def __init__(self, *, step: int, total: int, signal: int) -> None:
        super().__init__(f"stopped after step {step} of {total}, which is saved")
        self.step, self.total, self.signal = step, total, signal


class StopRequest:
    """Whether a signal has asked this process to stop.

    Attributes:
        signal: Number of the signal; 0 for none.
    """

    def __init__(self) -> None:
        self.signal = 0

    def agreed(self, world: World) -> bool:
        """Whether any rank was asked to stop, so that all of them do; called by all ranks after every step."""
        self.signal = world.largest(self.signal)
        return self.signal != 0


def leave_process_group(worker: int) -> None:
    """In a process that reads patches: signals to the group, as Ctrl-C is one, are for the training alone.

    Else they would end the readers in the middle of a step.  Readers end with the training, whose end they see.

    Args:
        worker: Number of the process, which a DataLoader tells.
    """
    os.setsid()


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within the block the first SIGINT or SIGTERM makes a request; a second SIGINT raises KeyboardInterrupt."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # Python handles signals in the main thread only
        return

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = number
        if signal.SIGINT in before:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a reader that ends now must not end the step

    readers = signal.getsignal(signal.SIGCHLD)
    heard = [one for one in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(one) is not signal.SIG_IGN]
    before = {number: signal.getsignal(number) for number in heard}  # a process in the background ignores Ctrl-C
    for number in heard:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if request.signal:
            signal.signal(signal.SIGCHLD, readers)
