"""Signals that ask a run to stop."""

import os
import signal
from typing import Optional

import psutil


def _launcher() -> Optional[int]:
    """Process id of the accelerate launch or torchrun that started this process, or None."""
    try:
        parent = psutil.Process().parent()
        words = " ".join(parent.cmdline()) if parent is not None else ""
    except psutil.Error:  # not ours to look at
        return None
    return parent.pid if any(name in words for name in ("accelerate", "torchrun", "torch.distributed")) else None


class StopSignal:
    """Whether the run was asked to stop, by SIGTERM or SIGUSR1 (a scheduler's warning), or by the end of the launcher:
    accelerate launch dies of a signal without passing it on. The loop then saves and ends cleanly."""

    def __init__(self):
        self.signal: Optional[str] = None
        self.launcher = _launcher()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame) -> None:
        self.signal = signal.Signals(number).name

    @property
    def received(self) -> Optional[str]:
        """What asked for the stop, or None."""
        if self.signal is None and self.launcher is not None and os.getppid() != self.launcher:
            return "the end of its launcher"
        return self.signal
