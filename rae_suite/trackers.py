"""Trackers of a run (tensorboard, wandb, ...): whether they can start, and their start."""

import errno
import importlib
import ssl
import sys
import threading
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Optional

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import broadcast_object_list

from rae_suite.cli import config_dict, flat
from rae_suite.errors import ConfigError, one_line, scrub
from rae_suite.files import write_text, writing

MLFLOW_RUN_ID = "mlflow_run_id.txt"  # in the run folder
SERVER_TIMEOUT = 10  # seconds in which a tracker's server must answer
REMEDY = "; expected a login and a network for it, another logging.report_to, or, of wandb, WANDB_MODE=offline"


def check_trackers(report_to: tuple, accelerator: Accelerator) -> None:
    """Raise ConfigError, on all processes, for a tracker that will not start: wandb tries for two minutes, and others
    when all networks were built. Every process calls this."""
    found = [None, None]
    if accelerator.is_main_process:
        problems = ((name, PROBLEMS.get(name, package_problem)(name)) for name in report_to if name != "csv")
        found = list(next((pair for pair in problems if pair[1] is not None), found))
    name, problem = broadcast_object_list(found)
    if problem is not None:
        raise ConfigError(f"logging.report_to: tracker {name} cannot start ({problem}){REMEDY}")


def package_problem(name: str) -> Optional[str]:
    """Why the package of a tracker cannot be used, or None."""
    try:
        importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except Exception as error:  # of an installation that is broken, anything
        return f"{type(error).__name__}: {one_line(error)}"
    return None


def wandb_problem(name: str = "wandb") -> Optional[str]:
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


def mlflow_problem(name: str = "mlflow") -> Optional[str]:
    """Why mlflow cannot start, or None: its server does not answer."""
    problem = package_problem(name)
    if problem is not None:
        return problem
    import mlflow

    try:
        address = mlflow.get_tracking_uri()
        if address.startswith(("http://", "https://")):
            reach(address)
    except (OSError, ValueError) as error:
        return one_line(error)
    return None


PROBLEMS = {"wandb": wandb_problem, "mlflow": mlflow_problem}


def reach(address: str) -> None:
    """Raise OSError where no server answers. Any answer will do, also one whose certificate is only known to others."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=SERVER_TIMEOUT).close()
    except urllib.error.HTTPError:
        return
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):
            raise OSError(f"{address} cannot be reached: {error.reason}") from error


def options_of_trackers(report_to: tuple, run_dir: Path, step: int) -> dict:
    """Arguments of the trackers' start, by their names: a run that continues at `step` goes on in the same run of
    wandb, mlflow and trackio."""
    options = {"tensorboard": {"purge_step": step + 1 if step else 0}}  # step 0 is evaluated again
    if "wandb" in report_to:
        id_file = run_dir / "wandb_run_id.txt"
        if not id_file.exists():
            write_text(id_file, uuid.uuid4().hex[:8])
        run_id = id_file.read_text().strip()
        options["wandb"] = {"id": run_id, "resume": "allow", "name": run_dir.name, "dir": str(run_dir)}
    if "mlflow" in report_to:
        id_file = run_dir / MLFLOW_RUN_ID
        options["mlflow"] = {"run_id": id_file.read_text()} if id_file.exists() else {"run_name": run_dir.name}
    if "trackio" in report_to:
        options["trackio"] = {"name": run_dir.name, "resume": "allow"}
    if "dvclive" in report_to:
        options["dvclive"] = {"dir": str(run_dir / "dvclive"), "resume": step > 0}
    return options


def show_picture(tracker: GeneralTracker, name: str, picture: np.ndarray, step: int) -> None:
    """Show a picture, uint8 (H, W, 3), to a tracker under `name`. Accelerate has a function for some trackers only."""
    if tracker.name == "tensorboard":
        tracker.log_images({name: picture[None]}, step=step, dataformats="NHWC")
    elif tracker.name == "mlflow":
        import mlflow

        mlflow.log_image(picture, key=name, step=step)
    elif tracker.name == "trackio":
        import trackio

        tracker.log({name: trackio.Image(picture)}, step=step)
    elif tracker.name == "comet_ml":
        tracker.tracker.log_image(picture, name=name, step=step)
    elif tracker.name == "dvclive":
        tracker.tracker.log_image(f"{name}-{step:08d}.png", picture)
    elif tracker.name in ("aim", "clearml"):  # one picture; wandb and swanlab take several
        tracker.log_images({name: picture}, step=step)
    elif hasattr(tracker, "log_images"):
        tracker.log_images({name: picture[None]}, step=step)


def start_trackers(config: object, accelerator: Accelerator, run_dir: Path, step: int) -> None:
    """Start the trackers; a run that continues at `step` goes on in the same wandb run, and tensorboard forgets what it
    has of later steps. Raises ConfigError for one that does not start."""
    sys.argv = [scrub(word) for word in sys.argv]  # wandb publishes the command line
    options = options_of_trackers(config.logging.report_to, run_dir, step) if accelerator.is_main_process else {}
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
            if tracker.name == "mlflow":
                write_text(run_dir / MLFLOW_RUN_ID, tracker.tracker.info.run_id)
            if tracker.name == "wandb":
                tracker.store_init_configuration(config_dict(config))
            elif tracker.name != "tensorboard" and step == 0:  # tensorboard's table takes no lists; mlflow no changes
                tracker.store_init_configuration(flat(config_dict(config)))
