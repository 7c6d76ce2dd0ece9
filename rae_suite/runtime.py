"""What every command has in common: errors in one line, processes and threads, results for machines."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Optional, Union

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from rae_suite.data import DataError
from rae_suite.errors import ConfigError, RunError, WriteError, fail

INTERRUPTED = 128 + signal.SIGINT  # exit code after Ctrl-C, as shells have it


def loss_of_process(error: RuntimeError) -> Optional[str]:
    """What to say of an error that torch raises when another process is gone or hangs; None: it is another error."""
    text = str(error)
    who = f"process {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    if "DataLoader worker" in text:
        return (
            f"{who}a data loading process died ({text.strip()}); when the system ended it for lack of memory, "
            "data.num_workers must be lower"
        )
    if isinstance(error, torch.distributed.DistError) or "/gloo/" in text:
        reason = re.sub(r"^\[\S+\] ", "", text.splitlines()[0]).split(". ")[0]  # without gloo's source file and advice
        return f"{who}the connection to another process is lost, it died or hangs ({reason})"
    return None


def run_main(function: Callable[[], None]) -> None:
    """Call `function`. Bad input ends in one line and exit code 2, what goes wrong later likewise with code 1, the loss
    of another process too."""
    try:
        function()
    except (ConfigError, DataError) as error:
        fail(error)
    except RunError as error:
        fail(error, error.code, error.everywhere)
    except RuntimeError as error:
        message = loss_of_process(error)
        if message is None:
            raise
        fail(message, code=1, everywhere=True)
    except KeyboardInterrupt:
        fail("stopped by Ctrl-C", INTERRUPTED)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of writing `path`, a file or folder, into WriteError, which says how much space there is."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        place = next(folder for folder in path.absolute().parents if folder.exists())
        free = shutil.disk_usage(place).free / 2**20
        reason = getattr(error, "strerror", None) or error
        message = f"{path} cannot be written ({reason}); {free:.1f} MiB are free in {place}"
        raise WriteError(message, everywhere=True) from error  # the process that writes may be any


# what building something from wrong settings raises, and what a damaged model folder makes of that
BUILD_ERRORS = (ValueError, OSError, ImportError, StrictDataclassError, SafetensorError)
LOAD_ERRORS = (RuntimeError, UnpicklingError, ArithmeticError, AttributeError, LookupError, TypeError)


@contextmanager
def blame(key: str, source: Optional[str] = None) -> Iterator[None]:
    """Turn an error of building something into one about the setting that asked for it; `source` is the Hub id or path
    that it names, whose files may be damaged."""
    try:
        yield
    except (ConfigError, RunError):
        raise  # says what is wrong already
    except (*BUILD_ERRORS, *LOAD_ERRORS) as error:
        if not isinstance(error, BUILD_ERRORS):
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


@contextmanager
def alone(accelerator: Accelerator) -> Iterator[None]:
    """Where a process reads images: an error that it finds is its own, so it says so, and ends with the code of bad
    input; the launcher ends the others."""
    try:
        yield
    except DataError as error:
        message = f"process {accelerator.process_index}: {error}" if accelerator.num_processes > 1 else str(error)
        raise RunError(message, code=2, everywhere=True) from error


def check_precision(accelerator: Accelerator) -> None:
    """Raise ValueError for fp16 on a CPU: Accelerate would compute in float32 without a word."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("fp16 needs a GPU, and this process computes on a CPU; expected bf16 or no")


def cores_of_process(accelerator: Accelerator) -> int:
    """This process's share of the machine's cores."""
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // local_processes)


def share_cores(accelerator: Accelerator, threads: Optional[int] = None) -> None:
    """On a CPU, give this process `threads` threads; none: its share of the machine's cores. (accelerate launch leaves
    one thread.)"""
    if accelerator.device.type == "cpu":
        torch.set_num_threads(threads or cores_of_process(accelerator))


def measuring_accelerator(
    mixed_precision: Optional[str] = None, key: str = "mixed_precision", threads: Optional[int] = None
) -> Accelerator:
    """An Accelerator for commands that measure: float32 products are not of TF32, as in training. Arguments as of
    Accelerator and `share_cores`; raises ConfigError, about the setting `key`, for a precision that cannot be had."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with blame(key):
        # the main process looks at every file of a large data set, or packs all images, while the others wait
        patience = InitProcessGroupKwargs(timeout=timedelta(hours=2))
        accelerator = Accelerator(mixed_precision=mixed_precision, kwargs_handlers=[patience])
        check_precision(accelerator)
    share_cores(accelerator, threads)
    return accelerator


def to_device(pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A batch that a loader gave, on the device. To a CUDA GPU the host does not wait for the copy, from pinned memory;
    other devices do not promise that the memory is kept until the copy was made."""
    return pixels.to(device, non_blocking=device.type == "cuda")


def compute_deterministically() -> None:
    """From here on every operation takes an algorithm that gives the same bits each time, or raises RuntimeError where
    it has none. To be called before anything runs on a GPU: cuBLAS reads its variable when it starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True)


def seeded_generator(*key: int, device: Union[torch.device, str] = "cpu") -> torch.Generator:
    """A generator whose numbers are a function of all of `key`."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(seed)


def progress_bar(items: Iterable, accelerator: Accelerator, name: Optional[str] = None) -> tqdm:
    """The items, with a bar on the main process's terminal; none in a log file."""
    return tqdm(items, name, leave=False, disable=not (accelerator.is_main_process and sys.stderr.isatty()))


def make_folder(path: str, key: str) -> Path:
    """Create a folder. Raises ConfigError, about the setting `key`, when that cannot be done."""
    with blame(key):
        folder = Path(path).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_output_file(path: Optional[str], key: str) -> None:
    """Raise ConfigError, about the setting `key`, unless a file can be written to `path`; none is nothing to write."""
    if path is not None and Path(path).is_dir():
        raise ConfigError(f"{key}: {path} is a folder, expected a file")
    if path is not None:
        make_folder(str(Path(path).absolute().parent), key)


def quiet_transformers() -> None:
    """transformers' bars and load reports would cut through a command's own output; loading is checked strictly."""
    disable_progress_bar()
    set_verbosity_error()


def git_revision() -> Optional[str]:
    """Commit of this checkout, or None."""
    git = shutil.which("git")
    if git is None:
        return None
    done = subprocess.run([git, "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None


def save_results(path: Path, results: dict) -> None:
    """Write results.json through evaluate.save, with what decides whether two results compare: versions and commit.
    Raises WriteError."""
    import evaluate  # seconds: only now

    packages = ("torch", "transformers", "diffusers", "accelerate", "clean-fid", "torchmetrics", "lpips", "pillow")
    results = {**results, "versions": {name: version(name) for name in packages}, "git_revision": git_revision()}
    if shutil.which("git") is None:  # evaluate.save asks it for the working directory's commit
        with writing(path):
            path.write_text(json.dumps(results))
        return
    with writing(path), open(os.devnull, "w") as null:  # git says on stderr that the working directory is no checkout
        stderr = os.dup(2)
        os.dup2(null.fileno(), 2)
        try:
            evaluate.save(path, **results)
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
