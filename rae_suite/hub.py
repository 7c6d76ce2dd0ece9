"""The Hugging Face Hub: what training and scripts/push_to_hub.py share.

The token comes from the usual places (HF_TOKEN, `hf auth login`) and is never written anywhere, nor shown: what the Hub
says is scrubbed of it.
"""

import atexit
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    hf_hub_download,
    is_offline_mode,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from tqdm import tqdm

from rae_suite.cli import require
from rae_suite.errors import ConfigError, RunError, error_names_setting, scrub
from rae_suite.files import remove
from rae_suite.settings import HubConfig

PUSH_SCRIPT = Path(__file__).parent.parent / "scripts" / "push_to_hub.py"
# What a request can end in. HTTPError is httpx's and covers lost connections, too; the xet upload raises
# ConnectionError; the other ones wrap these, or say that an answer or the card is malformed.
HUB_ERRORS = (HTTPError, OSError, RuntimeError, ValueError)
PASSING_STATUS = (408, 409, 412, 429)  # beside 5xx: time-out, another commit at the same time, too many requests
MAX_WAIT = 60  # seconds between two attempts
STOP_TIMEOUT = 5  # seconds that an upload has to stop


class HubError(RunError):
    """The Hub did not do what it was asked to. `refused`: it will not the next time either."""

    def __init__(self, message: str, code: int, refused: bool):
        super().__init__(message, code)
        self.refused = refused


def hub_id(name: Optional[str]) -> Optional[str]:
    """`name` where it can be the id of something on the Hub, None where it is a local path or nothing."""
    if name is None or name.count("/") != 1 or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def data_name(path: str) -> str:
    """A data set's Hub id, or the name of its folder, or of a URL without user and query."""
    return hub_id(path) or Path(scrub(path).split("?")[0]).resolve().name


def fetch_file(source: str, name: str, key: str, missing_ok: bool = False) -> Optional[Path]:
    """The file `name` of the model `source` on the Hub, downloaded unless it is in the cache. Where the model lacks it
    and that is `missing_ok`: None. Raises ConfigError, about the setting `key`, where it cannot be had."""
    with error_names_setting(key, source):
        try:
            return Path(hf_hub_download(source, name))
        except HFValidationError as error:  # more than one slash, say: a path
            raise ConfigError(f"{key}: {source} does not exist, expected a model folder or a Hub id") from error
        except (EntryNotFoundError, HfHubHTTPError) as error:
            if missing_ok and isinstance(error, EntryNotFoundError):
                return None
            if not isinstance(error, HfHubHTTPError):  # nothing in the cache, and no connection
                raise
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"{key}: {source} is no folder and no model on the Hub ({reason})") from error


def check_target(repo_id: Optional[str], key: str) -> None:
    """Raise ConfigError, about the setting `key`, unless it is a repository's name."""
    require(repo_id is not None and repo_id.count("/") == 1, key, "user/name of a model on the Hub", repo_id)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"{key}: expected user/name of a model on the Hub, got {repo_id!r} ({error})") from error


def check_access(repo_id: str, key: str) -> None:
    """Raise ConfigError, about the setting `key`, where an upload is impossible and no connection is needed to know."""
    if is_offline_mode():
        raise ConfigError(f"{key}: HF_HUB_OFFLINE is set, so nothing can be uploaded to {repo_id}; unset it")
    if get_token() is None:
        raise ConfigError(
            f"{key}: there is no token to upload to {repo_id} with; `hf auth login` stores one, or set HF_TOKEN"
        )


def check_encoder_left_out(encoder_id: Optional[str], key: str) -> None:
    """Raise ConfigError, about the setting `key`, where those who load the model could not fetch its encoder."""
    if hub_id(encoder_id) is None:
        raise ConfigError(
            f"{key}: the encoder can only be left out when it has an id on the Hub to be fetched from, "
            f"this model's comes from {encoder_id or 'nowhere else'}"
        )


def check_hub(hub: HubConfig, encoder_id: Optional[str]) -> None:
    """Raise ConfigError where nothing can be uploaded at the end, as far as it is known without a connection."""
    if hub.push:
        check_target(hub.repo_id, "hub.repo_id")
        check_access(hub.repo_id, "hub.push")
        if not hub.include_encoder:
            check_encoder_left_out(encoder_id, "hub.include_encoder")


def _status(error: Exception) -> Optional[int]:
    return getattr(getattr(error, "response", None), "status_code", None)


def _explain(error: Exception, repo_id: str) -> str:
    """What went wrong, in one line that says what to do."""
    status = _status(error)
    said = getattr(error, "server_message", None) or str(error).strip().split("\n")[0] or type(error).__name__
    said = scrub(" ".join(said.split()))
    if status == 401:
        return f"{constants.ENDPOINT} does not know the token ({said}); `hf auth login` stores another, or set HF_TOKEN"
    if status == 403:
        return f"the token may not write to {repo_id} ({said}); check the name, and that the token has write access"
    if status is None and isinstance(error, (HTTPError, ConnectionError)):
        return f"{constants.ENDPOINT} cannot be reached ({said})"
    return f"{constants.ENDPOINT} answered with an error ({said})" if status else f"{type(error).__name__} {said}"


def ask_hub(action: Callable[[], Any], repo_id: str, retries: int = 0, code: int = 1) -> Any:
    """What `action` returns. After an error that may pass it is called again, `retries` times at most, after 1, 4, 16,
    then 60 seconds. Raises HubError, with exit code 2 where the Hub refuses and else `code`."""
    for attempt in range(retries + 1):
        try:
            return action()
        except HUB_ERRORS as raised:
            # what fails in a thread of the LFS upload is the cause of a RuntimeError
            error = raised.__cause__ if isinstance(raised, RuntimeError) and raised.__cause__ else raised
            status = _status(error)
            malformed = status is None and isinstance(error, ValueError)  # a card, a name or an answer: it stays so
            refused = malformed or status is not None and 400 <= status < 500 and status not in PASSING_STATUS
            if refused or attempt == retries:
                raise HubError(f"{repo_id}: {_explain(error, repo_id)}", 2 if refused else code, refused) from None
            wait = min(4**attempt, MAX_WAIT)
            tqdm.write(f"{repo_id}: {_explain(error, repo_id)}; again in {wait} s")
            time.sleep(wait)


def open_repository(repo_id: str, private: bool, key: str, retries: int = 0) -> list:
    """Make the model repository unless it is there; the names of its files. Raises HubError, and ConfigError, about the
    setting `key`, where it is to be private and is not."""

    def create() -> Any:
        api = HfApi()
        api.create_repo(repo_id, private=private or None, exist_ok=True)  # None: as the organisation has it
        return api.model_info(repo_id)

    info = ask_hub(create, repo_id, retries, code=2)
    if private and not info.private:
        raise ConfigError(f"{key}: {repo_id} is there already and is public; make it private on the Hub, or leave this")
    return [file.rfilename for file in info.siblings]


def upload(repo_id: str, files: dict, stale: list, message: str, retries: int) -> str:
    """Put `files`, {name in the repository: path or bytes}, into one commit that also deletes the files `stale`: nobody
    sees half of it. Returns the commit's address. Raises HubError."""

    def commit() -> str:
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        operations += [CommitOperationDelete(name) for name in stale]
        return HfApi().create_commit(repo_id, operations, commit_message=message).commit_url

    return ask_hub(commit, repo_id, retries)


def push_arguments(settings: HubConfig, folder: Path) -> list:
    """The command line of scripts/push_to_hub.py for a run's model folder."""
    arguments = ["--model", str(folder), "--repo_id", settings.repo_id, "--license", settings.license]
    arguments += ["--retries", str(settings.retries), *(["--private"] if settings.private else [])]
    return arguments + ([] if settings.include_encoder else ["--no_encoder"])


def push_command(settings: HubConfig, folder: Path) -> str:
    """The same as a line for a shell."""
    return shlex.join(["python", os.path.relpath(PUSH_SCRIPT), *push_arguments(settings, folder)])


class Publisher:
    """Uploads a run's models while training goes on, on the main process alone.

    Each is uploaded by scripts/push_to_hub.py in a process of its own: no error there, and no wait for the network,
    reaches the training. Its output is in hub.log of the run folder. A folder below hub/ is deleted when it has been
    uploaded, and stays when that failed: the command that is printed then needs it.

    Raises HubError when the Hub refuses the repository; when it cannot be reached now, that is only reported.
    """

    def __init__(self, settings: HubConfig, run_dir: Path):
        self.settings, self.run_dir, self.log = settings, run_dir, run_dir / "hub.log"
        self.process: Optional[subprocess.Popen] = None
        self.folder: Optional[Path] = None  # of the last upload
        atexit.register(self._cancel)
        try:
            open_repository(settings.repo_id, settings.private, "hub.private")
        except HubError as error:
            if error.refused:
                raise
            tqdm.write(f"{error}; training starts, and uploads when it has something")

    def busy(self) -> bool:
        """Whether the last upload is still on its way. Reports it when it has come to its end."""
        if self.process is None:
            return False
        if self.process.poll() is None:
            return True
        code, self.process = self.process.returncode, None
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        last = scrub(lines[-1]) if lines else f"exit code {code}, nothing in {self.log}"
        if code == 0 and self.folder.parent == self.run_dir / "hub":
            remove(self.folder)
        tqdm.write(last if code == 0 else f"not uploaded: {last}\n{self._advice()}")
        return False

    def push(self, folder: Path) -> None:
        """Start to upload a model folder."""
        self.folder = folder
        environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        try:
            with self.log.open("w") as log:
                command = [sys.executable, PUSH_SCRIPT, *push_arguments(self.settings, folder)]
                self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        except OSError as error:  # no memory for another process, a full disk
            tqdm.write(f"not uploaded: {error}\n{self._advice()}")

    def finish(self, folder: Path) -> None:
        """Upload the model that the run ends with, and wait for it. From here on signals end this process, and the
        upload with it: training, which takes them for a request to save, is over."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM during the upload"))
        while self.busy():
            self.process.wait()
        self.push(folder)
        while self.busy():
            self.process.wait()
        with suppress(OSError):  # of uploads that failed, or none
            (self.run_dir / "hub").rmdir()

    def _advice(self) -> str:
        return f"to upload it later: {push_command(self.settings, self.folder)}"

    def _cancel(self) -> None:
        """At the end of this process: a half upload leaves nothing behind on the Hub."""
        if self.busy():
            self.process.terminate()
            try:
                self.process.wait(timeout=STOP_TIMEOUT)
            except subprocess.TimeoutExpired:  # in the middle of a call that hears no signals
                self.process.kill()
                self.process.wait()
            tqdm.write(f"upload stopped\n{self._advice()}")
