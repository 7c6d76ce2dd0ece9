"""Trackers of a run (tensorboard, wandb, ...): whether they can start, and their start."""

import errno
import logging
import ssl
import sys
import threading
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Optional

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from rae_suite.cli import config_dict
from rae_suite.errors import ConfigError, one_line, scrub
from rae_suite.files import write_text, writing

logger = logging.getLogger(__name__)

SERVER_TIMEOUT = 10  # seconds in which a tracker's server must answer
REMEDY = "; expected a login and a network for it, another logging.report_to, or, of wandb, WANDB_MODE=offline"


def check_trackers(report_to: tuple, accelerator: Accelerator) -> None:
    """Raise ConfigError, on all processes, where wandb, which tries for two minutes, will not start. Every process
    calls this."""
    problem = None
    if "wandb" in report_to and accelerator.is_main_process:
        problem = wandb_problem()
    [problem] = broadcast_object_list([problem])
    if problem is not None:
        raise ConfigError(f"logging.report_to: tracker wandb cannot start ({problem}){REMEDY}")


def wandb_problem() -> Optional[str]:
    """Why wandb cannot start as it is set up, or None: no login, no connection, or a key that its server refuses."""
    import wandb  # a second

    try:
        settings = wandb.setup().settings
        if settings.mode not in ("online", "shared", "run"):
            return None
        wandb.login(verify=False)
        if settings.http_proxy is None and settings.https_proxy is None:  # wandb's own, which nobody else knows
            reach(settings.base_url)
        wandb.login(verify=True)
    except (wandb.errors.Error, OSError, ValueError) as error:
        return one_line(error)
    return None


def reach(address: str) -> None:
    """Raise OSError where no server answers. Any answer will do, also one whose certificate is only known to others."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=SERVER_TIMEOUT).close()
    except urllib.error.HTTPError:
        return
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):
            raise OSError(f"{address} cannot be reached: {error.reason}") from error


def start_trackers(config: object, accelerator: Accelerator, run_dir: Path, step: int) -> None:
    """Start the trackers; a run that continues at `step` goes on in the same wandb run, and tensorboard forgets what it
    has of later steps. Raises ConfigError for one that does not start."""
    sys.argv = [scrub(word) for word in sys.argv]  # wandb publishes the command line
    options = {"tensorboard": {"purge_step": step + 1 if step else 0}}  # step 0 is evaluated again
    if "wandb" in config.logging.report_to and accelerator.is_main_process:
        id_file = run_dir / "wandb_run_id.txt"
        if not id_file.exists():
            write_text(id_file, uuid.uuid4().hex[:8])
        run_id = id_file.read_text().strip()
        options["wandb"] = {"id": run_id, "resume": "allow", "name": run_dir.name, "dir": str(run_dir)}
    with writing(run_dir / "logs"):
        try:
            accelerator.init_trackers(config.logging.project, init_kwargs=options)
        except Exception as error:  # each package has its own
            if isinstance(error, OSError) and (error.filename is not None or error.errno == errno.ENOSPC):
                raise  # of the run folder, not of a connection
            names = " or ".join(config.logging.report_to)
            raise ConfigError(
                f"logging.report_to: tracker {names} cannot start ({type(error).__name__}: {one_line(error)}){REMEDY}"
            ) from error
    # tensorboard writes in a thread, whose traceback would bury the one line that its error, raised here again, ends in
    show = threading.excepthook
    threading.excepthook = lambda failed: type(failed.thread).__name__ == "_AsyncWriterThread" or show(failed)
    if accelerator.is_main_process:
        for tracker in accelerator.trackers:
            if tracker.name != "tensorboard":  # its hyperparameter table takes no nested settings
                tracker.store_init_configuration(config_dict(config))
            if not hasattr(tracker, "log_images"):
                logger.warning("tracker %s takes no images: sample grids are in %s/samples", tracker.name, run_dir)
