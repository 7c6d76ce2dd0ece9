"""What a command prints: a closed terminal or pipe does not end it, and messages stay on lines of their own."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm


class SurvivingStream:
    """stdout or stderr that may lose its reader (`| head`, the end of an ssh session): from then on what is written
    goes nowhere, and nothing is raised."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if not isinstance(error, BlockingIOError):  # then it may have room again later
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())  # what is still in its buffer goes there too
            os.close(null)


class LinesAboveBars(logging.Handler):
    """Log messages on stderr as they are, above the progress bars."""

    def __init__(self):
        super().__init__()
        self.owner = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        if os.getpid() == self.owner:
            tqdm.write(self.format(record), file=sys.stderr)
        else:  # a data loading process has a copy of the bar, which it must not draw
            sys.stderr.write(f"{self.format(record)}\n")


@contextmanager
def surviving_output() -> Iterator[None]:
    """Within this context stdout and stderr may be closed, and log messages do not cut through progress bars."""
    before = sys.stdout, sys.stderr
    for number, stream in enumerate(before, start=1):
        if stream is None:  # closed when the process began: the next file that is opened must not take its place
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
    sys.stdout, sys.stderr = (
        SurvivingStream(open(number, "w", closefd=False) if stream is None else stream)
        for number, stream in enumerate(before, start=1)
    )
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.flush()  # reconfigure would do so too, and raise where the reader is gone
            with suppress(OSError):  # a pipe that has taken a file's place cannot tell its position
                stream.reconfigure(errors="backslashreplace")  # a path on the command line may be no UTF-8
    logging.basicConfig(format="%(message)s", handlers=[LinesAboveBars()])
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def close_bars() -> None:
    """End the progress bars that are still drawn, so that an error gets a line of its own."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def print_once(message: str) -> None:
    """Print on the main process, also where no Accelerator is at hand."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)
