"""Errors that end a command in one line. Imports nothing that takes time: config.py answers --help with it."""

import argparse
import os
import sys
from typing import NoReturn, Union


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the key, the value and what is expected."""


class RunError(RuntimeError):
    """A run went wrong after it had begun. `code` is the exit code, `everywhere` whether this process alone knows."""

    def __init__(self, message: str, code: int = 1, everywhere: bool = False):
        super().__init__(message)
        self.code, self.everywhere = code, everywhere


class WriteError(RunError):
    """A file cannot be written: the disk is full, or the folder is gone or read-only."""


def fail(message: Union[str, Exception], code: int = 2, everywhere: bool = False) -> NoReturn:
    """End the process with one line on stderr. What every process of a machine finds alike is said by its first, unless
    `everywhere`."""
    if everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"error: {' '.join(str(message).split())}\n")
    sys.exit(code)


class OneLineParser(argparse.ArgumentParser):
    """argparse's parser, and those of its subcommands: bad input ends in one line, and flags are written out."""

    def __init__(self, **options):
        super().__init__(**{**options, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        fail(message)
