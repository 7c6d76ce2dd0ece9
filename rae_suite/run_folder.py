"""The folder of a run, <output_dir>, and how a run continues from what is in it.

    config.yaml       the resolved config, itself a valid --config
    metrics.jsonl     one JSON object a line
    checkpoints/      step-*: complete state, the newest `train.keep_last`
    best, final       from_pretrained folders with the averaged weights
    samples/, pairs/  pictures of each evaluation; curves.png and progress.png show all of them
    shards.json       of a streamed run: the shards that it began with
    rae, latent_stats.safetensors   of stage 2: the autoencoder and its statistics, with which the run trains

Folders are written beside their place, synced to disk and renamed, so a half-written folder is never taken for a whole
one. The old folder is deleted after that.
"""

import fcntl
import logging
import os
import socket
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Optional, TextIO, get_args

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from rae_suite.checkpoints import (
    checkpoints,
    find_damage,
    last_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from rae_suite.cli import config_yaml, with_settings
from rae_suite.errors import ConfigError, RunError, WriteError
from rae_suite.files import check_folder, locks_are_missing, remove, step_of, write_text, writing
from rae_suite.hub import push_command
from rae_suite.launch import INTERRUPTED, say
from rae_suite.metrics_file import MetricsFile
from rae_suite.settings import HubConfig, check_same_config, differing_settings, read_run_settings
from rae_suite.sharding import load_part
from rae_suite.signals import StoppedWaiting
from rae_suite.training_data import SHARDS, TrainingData

logger = logging.getLogger(__name__)

CHECKPOINT_FORMAT = 1  # to be raised when older versions could not continue from a new checkpoint
# what state.json of older formats lacks
OLDER_STATE = {"format": 0, "images": None}
# what a start leaves in a new run folder before the run has anything to show: it may be that of another run then
LEFT_BY_A_START = {"config.yaml", SHARDS, "wandb_run_id.txt", "wandb", "mlflow_run_id.txt", "dvclive", "logs",
                   "checkpoints", "hub.log", "hub", "rae", "latent_stats.safetensors"}  # fmt: skip
# digests in RunState.frozen that older checkpoints lack
OLDER_FROZEN = {"model.rae (settings of its encoder)"}


@dataclass
class RunState:
    """What a checkpoint holds beside networks and optimizers. Plain values."""

    step: int = 0
    format: int = CHECKPOINT_FORMAT
    images: Optional[str] = None  # digest of the list of training images; None of a stream, and in format 0
    num_images: Optional[int] = 0  # of the training split; None where a stream's number is not known
    frozen: dict = field(default_factory=dict)  # digests of the networks that do not learn, by setting
    best: Optional[float] = None
    best_of: str = ""  # what `best` is comparable with: metric and number of images
    nonfinite_in_a_row: int = 0
    skipped_steps: int = 0  # because of something not finite, over the whole run
    stream: Optional[dict] = None  # of a streaming run: fingerprint of the shards, states of all lanes


# --------------------------------------------------------------------------------------------------------------------
# The folder: whose it is, and its lock
# --------------------------------------------------------------------------------------------------------------------


def restore_folders(run_dir: Path) -> None:
    """Clean up after a crash in `write_folder`: put a folder back that was caught between the two renames, drop what
    was half written."""
    for folder in (run_dir, run_dir / "checkpoints", run_dir / "hub"):
        for old in folder.glob(".*.old"):
            target = folder / old.name.removeprefix(".").removesuffix(".old")
            remove(old) if target.exists() else old.rename(target)
        for path in (*folder.glob(".*.partial*"), *folder.glob(".*.removed")):
            remove(path)


def lock_run_folder(run_dir: Path) -> TextIO:
    """Hold the run folder until the returned file is closed or the process ends. Raises BlockingIOError when another
    process holds it. A file system without locks (Lustre and NFS can be mounted so) is a warning."""
    file = (run_dir / ".lock").open("a")  # what the process that holds it wrote stays
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if not locks_are_missing(error):
            raise
        logger.warning(
            "%s: this file system has no locks (%s), so take care that no other process works in it",
            run_dir,
            error.strerror,
        )
    held = weakref.ref(file)

    def let_go() -> None:
        if held() is not None:
            held().close()

    os.register_at_fork(after_in_child=let_go)  # or data loading processes would hold it on after a SIGKILL
    return file


def resolve_config(config: Any, accelerator: Accelerator) -> Any:
    """The config with what the launch and the beginning of the run decide: the precision, and a stream's lanes."""
    values = {"train.mixed_precision": accelerator.mixed_precision}
    if config.data.streaming and config.data.stream_lanes is None:
        fork = config.train.fork_from
        run_dir = Path(config.train.output_dir) if fork is None else Path(fork).parent.parent
        began = {} if belongs_to_no_run(run_dir) else read_run_settings(run_dir / "config.yaml")
        values["data.stream_lanes"] = began.get("data.stream_lanes") or accelerator.num_processes * max(
            1, config.data.num_workers
        )
    return with_settings(config, values)


def belongs_to_no_run(run_dir: Path) -> bool:
    """Whether a folder is no run's: there is none, it has no config.yaml, or it has that of a run and nothing but what
    a start leaves that ended before the run had evaluated anything."""
    saved = run_dir / "config.yaml"
    if not saved.exists():
        return True
    names = {path.name for path in run_dir.iterdir() if not path.name.startswith(".")}
    if checkpoints(run_dir) or not names <= LEFT_BY_A_START:
        return False
    try:
        return "train.output_dir" in read_run_settings(saved)
    except ConfigError:
        return False


def check_run_folder(config: Any) -> Path:
    """The run folder: a new one, one of a start that failed, or one of the same config. Raises ConfigError for anything
    else."""
    run_dir = Path(config.train.output_dir)
    saved = run_dir / "config.yaml"
    check_folder(config.train.output_dir, "train.output_dir")
    if not belongs_to_no_run(run_dir):
        check_same_config(config, saved)
        MetricsFile(run_dir / "metrics.jsonl", enabled=False).read()  # or names the line that is damaged
    elif not saved.exists() and run_dir.exists() and any(not path.name.startswith(".") for path in run_dir.iterdir()):
        raise ConfigError(f"train.output_dir: {run_dir} is not empty and has no config.yaml of a run")
    if config.train.fork_from is not None and not checkpoints(run_dir):
        fork = Path(config.train.fork_from)
        if not (fork / "manifest.json").is_file():
            raise ConfigError(f"train.fork_from: {fork} is no checkpoint, expected <run folder>/checkpoints/step-*")
    return run_dir


def take_run_folder(config: Any, run_dir: Path) -> TextIO:
    """Create the run folder, lock it against a second run, and write the config. Keep the result until the end."""
    with writing(run_dir / ".lock"):
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock = lock_run_folder(run_dir)
        except BlockingIOError:
            raise ConfigError(f"train.output_dir: another run is at work in {run_dir}") from None
    with writing(run_dir):
        restore_folders(run_dir)
    write_text(run_dir / "config.yaml", config_yaml(config))
    return lock


def check_shared_folder(run_dir: Path, lock: Optional[TextIO], patience: float = 90) -> None:
    """Raise ConfigError, on all processes, when some machine does not see the main process's run folder, from which
    all of them read checkpoints. `lock`: the main process's, what `take_run_folder` gave. `patience`: seconds; a
    network file system may remember for a minute that a file was not there."""
    token = uuid.uuid4().hex
    if lock is not None:
        lock.truncate(0)  # it was opened to append
        lock.write(token)
        lock.flush()
        os.fsync(lock.fileno())
    [token] = broadcast_object_list([token])
    file, deadline = run_dir / ".lock", time.monotonic() + patience
    while not (seen := file.exists() and file.read_text() == token) and time.monotonic() < deadline:
        time.sleep(1)
    elsewhere = sorted({host for host in gather_object([None if seen else socket.gethostname()]) if host is not None})
    if elsewhere:
        raise ConfigError(
            f"train.output_dir: {run_dir} on {', '.join(elsewhere)} is another folder than the main process's, "
            "expected one on a file system that all machines share"
        )


# --------------------------------------------------------------------------------------------------------------------
# Saving and continuing
# --------------------------------------------------------------------------------------------------------------------


def save_run(
    accelerator: Accelerator, run_dir: Path, state: RunState, parts: dict, loader: Any, keep_last: int
) -> None:
    """Write a checkpoint of the run. Every process calls this.

    Args:
        parts: what changes while the run goes on, by name: networks, optimizers, the moving average.
        loader: the training loader; a stream's says where its lanes stand.
    """
    if state.stream is not None:
        state.stream["lanes"] = gather_object([loader.states[lane] for lane in sorted(loader.states)])
    states = {name: part.state_dict() for name, part in with_scaler(accelerator, parts).items()}
    states = {"state": asdict(state), **states}
    save_checkpoint(accelerator, run_dir, state.step, states, keep_last)


def with_scaler(accelerator: Accelerator, parts: dict) -> dict:
    return parts if accelerator.scaler is None else {**parts, "scaler": accelerator.scaler}


def find_checkpoint(accelerator: Accelerator, run_dir: Path, parts: dict) -> Optional[Path]:
    """The newest whole checkpoint, the same on all processes, or None. Raises RunError when all are damaged."""
    found = [None, None]
    if accelerator.is_main_process:
        try:
            found[0] = newest_checkpoint(run_dir, ["state", *parts], tqdm.write)
        except ValueError as error:
            found[1] = str(error)
    path, problem = broadcast_object_list(found)
    if problem is not None:
        raise RunError(problem)
    return path


def load_state(state: RunState, saved: dict) -> None:
    """Take over saved values. Raises KeyError for one that is missing, and ValueError for another type, and for a
    format that is not known yet."""
    saved = {**OLDER_STATE, **saved}
    if isinstance(saved["format"], int) and saved["format"] > CHECKPOINT_FORMAT:
        raise ValueError(
            f"state.json: format is {saved['format']}, this version knows formats up to {CHECKPOINT_FORMAT}"
        )
    for item in fields(state):
        value, kinds = saved[item.name], get_args(item.type) or (item.type,)
        if not isinstance(value, kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"state.json: {item.name} is {value!r}, expected {expected}")
        setattr(state, item.name, value)


def load_checkpoint(path: Path, state: RunState, parts: dict, check: Callable[[RunState], None]) -> None:
    """Load the complete state into `state` and `parts`. `check` is given the state before the parts are read, and
    raises ConfigError for one of another run. Raises RunError, which names the checkpoint, when it cannot be read."""
    try:
        load_state(state, read_checkpoint(path, "state.json")["state"])
        check(state)
        saved = read_checkpoint(path)
        for name, part in parts.items():
            load_part(part, saved[name], name)
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise RunError(f"checkpoint {path} cannot be read: {type(error).__name__} {error}") from error
    state.format = CHECKPOINT_FORMAT


def check_same_frozen(state: RunState, frozen: dict, path: Path, way_out: str = "another train.output_dir or ") -> None:
    """Raise ConfigError, which names them all, for frozen networks, {setting: digest}, that are not those of the
    checkpoint `path`. `way_out`: what there is to choose beside the same networks."""
    known = frozen.keys() - (OLDER_FROZEN - state.frozen.keys())
    changed = [setting for setting in frozen if setting in known and state.frozen.get(setting) != frozen[setting]]
    if changed:
        what = "latents" if changed == ["data.latents"] else "weights"
        what = "settings" if set(changed) <= OLDER_FROZEN else what
        raise ConfigError(
            f"{', '.join(changed)}: the {what} are not those that {path} was trained with; choose {way_out}the same "
            f"{what}"
        )


def continue_run(
    accelerator: Accelerator, config: Any, run_dir: Path, data: TrainingData, parts: dict, frozen: dict
) -> tuple[RunState, bool]:
    """The run's state and whether it continues: loaded, with its `parts`, from the newest whole checkpoint if there is
    one, else from the one that train.fork_from names. Raises RunError when all are damaged, and ConfigError when the
    run began with other images or `frozen` networks, {setting: digest}."""
    state = RunState(frozen=frozen, num_images=data.num_images, images=data.list_digest)
    state.stream = None if data.batches is not None else {"shards": data.shards, "lanes": None}
    checkpoint = find_checkpoint(accelerator, run_dir, with_scaler(accelerator, parts))
    if checkpoint is None:
        return (state if config.train.fork_from is None else fork_run(accelerator, config, data, parts, frozen)), False

    def check(saved: RunState) -> None:
        check_same_frozen(saved, frozen, checkpoint)
        check_same_images(saved, data, run_dir)

    load_checkpoint(checkpoint, state, with_scaler(accelerator, parts), check)
    say(accelerator, f"continuing from {checkpoint}")
    state.images = data.list_digest
    return state, True


def fork_run(accelerator: Accelerator, config: Any, data: TrainingData, parts: dict, frozen: dict) -> RunState:
    """The state of a new run that goes on from the checkpoint `train.fork_from` of another, loaded with its `parts`.
    What differs between the two configs is said. Raises ConfigError for a checkpoint that is damaged, or of other
    networks or shards than this run's."""
    path, state = Path(config.train.fork_from), RunState()
    damage = find_damage(path, ["state", *parts])
    if damage is not None:
        raise ConfigError(f"train.fork_from: {path} is damaged or of a run with other networks ({damage})")
    if (path / "scaler.json").exists():
        parts = with_scaler(accelerator, parts)
    same = {key: frozen[key] for key in frozen.keys() - {"data.latents"}}  # which may be read where images were encoded
    try:
        load_checkpoint(path, state, parts, lambda saved: check_same_frozen(saved, same, path, way_out=""))
        state.frozen = frozen
    except RunError as error:
        raise ConfigError(f"train.fork_from: {error}") from error
    stream = state.stream or {"shards": None, "lanes": None}
    if stream["shards"] != data.shards or len(stream["lanes"] or ()) != (config.data.stream_lanes or 0):
        raise ConfigError(
            f"train.fork_from: {path} is of a run on other shards or lanes, expected those of its own run"
        )
    settings = path.parent.parent / "config.yaml"
    changed = differing_settings(config, settings, forkable) if settings.exists() else ["its settings are not known"]
    say(accelerator, "\n  ".join([f"a new run from {path}, {len(changed)} settings differ", *changed]))
    state.num_images, state.images, state.best, state.best_of = data.num_images, data.list_digest, None, ""
    return state


def forkable(settings: dict) -> dict:
    """Those of the settings that say something of a fork."""
    return {key: value for key, value in settings.items() if key not in ("train.output_dir", "train.fork_from")}


def check_same_images(state: RunState, data: TrainingData, run_dir: Path) -> None:
    """Raise ConfigError when the run began with other images."""
    other = f"choose another train.output_dir, with model.init_from {run_dir}/best"
    if data.batches is None:
        if (state.stream or {}).get("shards") != data.shards:
            raise ConfigError(
                f"data.path: the shards, or their numbers of images, are not those that {run_dir} began with (see its "
                f"{SHARDS}); take out what was added, or {other}"
            )
    elif state.images is not None and state.images != data.list_digest and state.num_images == data.num_images:
        raise ConfigError(
            f"data.path: the {data.num_images} training images of {data.path} have other names than those that "
            f"{run_dir} began with; name the same data, or {other}"
        )
    elif state.num_images != data.num_images:
        raise ConfigError(
            f"data.path: {data.path} has {data.num_images} training images, {run_dir} began with "
            f"{state.num_images}; take out what was added, put back what is missing (an empty file with the name of a "
            f"lost one will do: it is skipped), or {other}"
        )


def is_finished(
    accelerator: Accelerator, run_dir: Path, total_steps: int, whole: Callable[[Path], bool], hub: HubConfig
) -> bool:
    """Whether the run has come to its end, which is said: as the main process sees it, because another machine may lack
    the folder. `whole`: whether the folder final/ holds a complete model."""
    saved, final = checkpoints(run_dir), run_dir / "final"
    steps = step_of(saved[-1]) if saved else 0
    [finished] = broadcast_object_list([steps >= total_steps and whole(final)])
    if finished and accelerator.is_main_process:
        print(f"{run_dir} is finished: {steps} of {total_steps} steps, model in {final}")
        if hub.push:
            print(f"to upload it: {push_command(hub, final)}")
    return finished


@contextmanager
def errors_name_checkpoint(run_dir: Path) -> Iterator[None]:
    """Say what the run continues from when it ends by a second Ctrl-C, while it waits for images, or because something
    cannot be written."""
    try:
        yield
    except WriteError as error:
        message = f"{error}; {last_checkpoint(run_dir)}; the same command continues"
        raise RunError(message, everywhere=True) from error
    except KeyboardInterrupt:
        raise RunError(
            f"stopped by Ctrl-C; {last_checkpoint(run_dir)}; the same command continues", INTERRUPTED
        ) from None
    except StoppedWaiting as stopped:
        message = f"stopped by {stopped} while it waited for images; {last_checkpoint(run_dir)}"
        raise RunError(f"{message}; the same command continues", everywhere=True) from None
