"""Weights that libraries fetch from a web address: a local copy, torch.hub's folder, or a download that is checked."""

import hashlib
import os
import tempfile
from http.client import HTTPException
from pathlib import Path
from typing import Optional
from urllib.request import Request, urlopen

import torch

from rae_suite.errors import ConfigError
from rae_suite.files import give_default_permissions

SECONDS = 60  # without a byte: then the download has failed


def fetched_file(
    url: str, setting: str, what: str, path: Optional[str] = None, hash_prefix: Optional[str] = None
) -> Path:
    """The file behind `url`: the local copy `path`, else in torch.hub's folder (TORCH_HOME), downloaded when it is not
    there. A download becomes a file only when it is whole.

    Args:
        setting: name of the setting that gave `path`, for errors.
        what: what needs the file, for errors.
        hash_prefix: how the SHA-256 of the download begins; a file that is there already is not compared.

    Raises:
        ConfigError: there is no such file, or it could not be fetched: no connection, cut, other content.
    """
    name = Path(url).name
    if path is not None:
        file = Path(path)
        if not file.is_file():
            raise ConfigError(f"{setting}: file {path} does not exist, expected a copy of {name}")
        return file
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            download(url, file, hash_prefix)
        except (OSError, HTTPException) as error:
            raise ConfigError(
                f"{setting}: {what} needs {name}, {file} does not exist and {url} could not be fetched "
                f"({error}); {setting} also takes the path of a local copy"
            ) from error
    return file


def download(url: str, file: Path, hash_prefix: Optional[str] = None) -> None:
    """Write what is behind `url` into `file`, whole or not at all. Raises OSError for no connection, fewer bytes than
    the server announced (urllib and torch.hub accept such a file), or another SHA-256."""
    with urlopen(Request(url, headers={"User-Agent": "rae-suite"}), timeout=SECONDS) as response:
        announced, digest, received = response.headers.get("Content-Length"), hashlib.sha256(), 0
        beside = tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}-", delete=False)
        try:
            with beside:
                while block := response.read(2**20):
                    beside.write(block)
                    digest.update(block)
                    received += len(block)
            if announced is not None and received != int(announced):
                raise OSError(f"the download was cut after {received} of {announced} bytes")
            if hash_prefix is not None and not digest.hexdigest().startswith(hash_prefix):
                found = digest.hexdigest()[: len(hash_prefix)]
                raise OSError(f"the file has another content: its SHA-256 begins with {found}, expected {hash_prefix}")
            give_default_permissions(Path(beside.name))
            os.replace(beside.name, file)
        except BaseException:
            os.unlink(beside.name)
            raise
