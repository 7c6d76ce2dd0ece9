"""Errors that end a command in one line. Imports nothing that takes time: the scripts answer --help with it."""

import argparse
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
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
        self.name, self.reason = name, scrub(reason)
        super().__init__(f"{name}: {self.reason}")


class RunError(RuntimeError):
    """A run went wrong after it had begun. `code` is the exit code, `everywhere` whether this process alone knows."""

    def __init__(self, message: str, code: int = 1, everywhere: bool = False):
        super().__init__(message)
        self.code, self.everywhere = code, everywhere


class WriteError(RunError):
    """A file cannot be written: the disk is full, or the folder is gone or read-only."""


# Of a URL: user and password (a password may have a slash in it, a port has not), and the query, which may be a
# signature; the query of an address without its beginning; a token of the Hub.
URL_USER = re.compile(r"(?<=://)(?:[^\s/?#'\"]*|[^\s/:?#'\"]*:(?!\d*[/?])[^\s#'\"]*)@")
URL_QUERY = re.compile(r"(://[^\s?'\"]*)\?[^\s'\"]+")
PART_OF_QUERY = re.compile(r"(?<=\S)\?[\w.~%-]+=[^\s'\"]*")
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")
SECRET = "<secret>"  # stands for a user, a password or a query


def scrub(text: str) -> str:
    """The text without credentials: users, passwords and queries of URLs, tokens of the Hub. Whatever is printed,
    written or published goes through here, and what libraries say of a URL does too."""
    from huggingface_hub import get_token  # a tenth of a second: not for --help

    token = ""
    with suppress(OSError):
        token = get_token() or ""
    text = text.replace(token, "<token>") if len(token) >= 8 else text  # a mirror's "none" is no secret, but a word
    text = URL_USER.sub(f"{SECRET}@", text)
    text = URL_QUERY.sub(rf"\1?{SECRET}", text)
    text = PART_OF_QUERY.sub(f"?{SECRET}", text)
    return HUB_TOKEN.sub("<token>", text)


def one_line(error: Union[str, Exception], limit: int = 300) -> str:
    """What an error says, in one line of at most `limit` characters, without credentials."""
    return scrub(" ".join(str(error).split()))[:limit] or type(error).__name__


def is_first_of_machine() -> bool:
    """Whether this is the process that says what every process of a machine finds alike."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def fail(message: Union[str, Exception], code: int = 2, everywhere: bool = False) -> NoReturn:
    """End the process with one line on stderr. What every process of a machine finds alike is said by its first, unless
    `everywhere`."""
    if everywhere or is_first_of_machine():
        sys.stderr.write(f"error: {scrub(' '.join(str(message).split()))}\n")
    sys.exit(code)


class OneLineParser(argparse.ArgumentParser):
    """argparse's parser, and those of its subcommands: bad input ends in one line, flags are written out, and ~ at the
    beginning of a value is the home folder."""

    def __init__(self, **options):
        super().__init__(**{**options, "allow_abbrev": False})

    def parse_known_args(self, args: Optional[list] = None, namespace: Optional[argparse.Namespace] = None) -> tuple:
        found, rest = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            if isinstance(value, (str, Path)):
                setattr(found, name, type(value)(os.path.expanduser(value)))
        return found, rest

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
LOAD_ERRORS = (RuntimeError, UnpicklingError, ArithmeticError, AttributeError, LookupError, TypeError, MemoryError)


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
