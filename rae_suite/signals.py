"""Signals that ask a run to stop."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Optional

import psutil

PATIENCE = 10.0  # seconds that a run which was asked to stop waits for its next images
AT_ONCE = 1.0  # seconds within which Ctrl-C counts once: a launcher passes on what the terminal has sent already


class StoppedWaiting(BaseException):
    """The run was asked to stop while it waited for images. No Exception: readers of images catch all of these."""


def _launcher() -> Optional[int]:
    """Process id of the accelerate launch or torchrun that started this process, or None."""
    try:
        parent = psutil.Process().parent()
        words = " ".join(parent.cmdline()) if parent is not None else ""
    except psutil.Error:  # not ours to look at
        return None
    return parent.pid if any(name in words for name in ("accelerate", "torchrun", "torch.distributed")) else None


class StopSignal:
    """Whether the run was asked to stop: by SIGTERM, SIGUSR1 (a scheduler's warning), SIGHUP (the end of a terminal),
    Ctrl-C, or the end of the launcher, as accelerate launch dies of a signal without passing it on. The loop then saves
    and ends cleanly. A second Ctrl-C is a KeyboardInterrupt."""

    active: Optional["StopSignal"] = None  # the process's own; see waiting_for_images

    def __init__(self):
        self.signal: Optional[str] = None
        self.interrupted: Optional[float] = None  # when Ctrl-C came first
        self.launcher = _launcher()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)
        for number in (signal.SIGHUP, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and background jobs ignore them
                signal.signal(number, self._receive)
        signal.signal(signal.SIGALRM, self._look)
        StopSignal.active = self

    def _receive(self, number: int, frame) -> None:
        if number == signal.SIGINT:
            self._interrupt()
        self.signal = self.signal or ("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)

    def _interrupt(self) -> None:
        now = time.monotonic()
        if self.interrupted is None:
            self.interrupted = now
            if os.environ.get("RANK", "0") == "0":
                with suppress(OSError):  # print may be at work just now, which must not be called again
                    os.write(2, b"\nCtrl-C: the run saves and ends after this step; once more ends it at once\n")
        elif now - self.interrupted > AT_ONCE:
            raise KeyboardInterrupt

    @property
    def received(self) -> Optional[str]:
        """What asked for the stop, or None."""
        if self.signal is None and self.launcher is not None and os.getppid() != self.launcher:
            return "the end of its launcher"
        return self.signal

    def _look(self, number: int, frame) -> None:
        if self.received is not None:
            raise StoppedWaiting(self.received)


@contextmanager
def waiting_for_images() -> Iterator[None]:
    """Within this context a run that was asked to stop waits for PATIENCE seconds, then StoppedWaiting is raised.
    Without a StopSignal, signals do what they do in any process."""
    if StopSignal.active is None:
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, PATIENCE, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
