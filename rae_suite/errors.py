"""Errors that end a command in one line. Imports nothing that takes time: the scripts answer --help with it."""

import argparse
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import NoReturn, Optional, Union


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the key, the value and what is expected."""


class DataError(ValueError):
    """Bad input. The message is one line with the file or setting, the value found and what is expected."""

    def __init__(self, message: object):
        # A DataLoader raises a worker's error again with the whole traceback as its message; its last line is ours.
        last_line = str(message).strip().splitlines()[-1]
        super().__init__(re.sub(r"^[\w.]*DataError: ", "", last_line))


class UnreadableImage(Exception):
    """One image that cannot be decoded; `name` says which, `reason` why."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


class RunError(RuntimeError):
    """A run went wrong after it had begun. `code` is the exit code, `everywhere` whether this process alone knows."""

    def __init__(self, message: str, code: int = 1, everywhere: bool = False):
        super().__init__(message)
        self.code, self.everywhere = code, everywhere


class WriteError(RunError):
    """A file cannot be written: the disk is full, or the folder is gone or read-only."""


def one_line(error: Union[str, Exception], limit: int = 300) -> str:
    """What an error says, in one line of at most `limit` characters."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


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


@contextmanager
def renamed_settings(old: str, new: str) -> Iterator[None]:
    """Let errors about the setting or group `old` name `new`, whose values were read by what reads `old` elsewhere."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise type(error)(re.sub(rf"(?<![\w.]){re.escape(old)}", new, str(error))) from error


# what a damaged model folder makes of building a network from it
LOAD_ERRORS = (RuntimeError, UnpicklingError, ArithmeticError, AttributeError, LookupError, TypeError)


@contextmanager
def error_names_setting(key: str, source: Optional[str] = None) -> Iterator[None]:
    """Turn an error of building something into a ConfigError about the setting `key` that asked for it. `source` is the
    Hub id or path that the setting names: files there may be damaged."""
    from huggingface_hub.constants import HF_HUB_CACHE  # a tenth of a second each: not for --help
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    build_errors = (ValueError, OSError, ImportError, StrictDataclassError, SafetensorError)  # from wrong settings
    try:
        yield
    except (ConfigError, RunError):
        raise  # says what is wrong already
    except (*build_errors, *LOAD_ERRORS) as error:
        if not isinstance(error, build_errors):
            if source is None:
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"{key}: {source} cannot be loaded ({type(error).__name__}: {reason})") from error
        message = str(error)
        if message.startswith((key.split(".")[0] + ".", f"{key}:")):
            raise ConfigError(message) from error  # names its setting already
        if isinstance(error, OSError) and source is not None and not os.path.exists(source):
            message = (
                f"'{source}' is no local folder, is not in the cache {HF_HUB_CACHE}, and could not be fetched "
                f"({message.split('. ')[0]}); {key} also takes the path of a local copy"
            )
        elif source is not None and source not in message:
            message = f"{source}: {message}"
        raise ConfigError(f"{key}: {message}") from error
