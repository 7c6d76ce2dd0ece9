"""How a command starts and ends: accelerators, precision, threads, errors in one line.

Accelerate's own preparation for FSDP is not used (see sharding.py), so an Accelerator is always built for data
parallelism, and what `accelerate launch` asks for is read from its environment variables.
"""

import os
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Optional

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, ProjectConfiguration
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from rae_suite.errors import ConfigError, DataError, RunError, error_names_setting, fail, one_line, scrub
from rae_suite.loaders import SHARED_MEMORY_FULL, cores, shared_memory_in_words
from rae_suite.output import close_bars, surviving_output
from rae_suite.settings import TrainConfig

INTERRUPTED = 128 + signal.SIGINT  # exit code after Ctrl-C, as shells have it


def loss_of_process(error: RuntimeError) -> Optional[str]:
    """What to say of an error that torch raises when another process is gone or hangs; None: it is another error."""
    text = str(error)
    who = f"process {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    if "DataLoader worker" in text:
        whole = f"{text} {error.__cause__}"  # which may know the code with which it ended
        if f"exit code {SHARED_MEMORY_FULL}." in whole or "Bus error" in whole:
            return who + shared_memory_in_words()
        return (
            f"{who}a data loading process died ({text.strip()}); when the system ended it for lack of memory, "
            "data.num_workers must be lower"
        )
    if isinstance(error, torch.distributed.DistError) or "/gloo/" in text:
        reason = re.sub(r"^\[\S+\] ", "", text.splitlines()[0]).split(". ")[0]  # without gloo's source file and advice
        return f"{who}the connection to another process is lost, it died or hangs ({reason})"
    return None


def print_scrubbed(kind: type, error: BaseException, trace: Optional[TracebackType]) -> None:
    """What Python prints of an error that nobody expects, without credentials."""
    sys.stderr.write(scrub("".join(traceback.format_exception(kind, error, trace))))


def run_main(function: Callable[[], None]) -> None:
    """Call `function`. Bad input ends in one line and exit code 2, what goes wrong later likewise with code 1, the loss
    of another process too. A closed stdout or stderr ends nothing."""
    sys.excepthook = print_scrubbed
    with surviving_output():
        try:
            function()
        except BaseException as error:
            close_bars()
            end_in_one_line(error)
            raise


def end_in_one_line(error: BaseException) -> None:
    """End the process with the line and the exit code of an error that is known; return for any other."""
    if isinstance(error, (ConfigError, DataError)):
        fail(error)
    if isinstance(error, RunError):
        fail(error, error.code, error.everywhere)
    if isinstance(error, RuntimeError) and loss_of_process(error) is not None:
        fail(loss_of_process(error), code=1, everywhere=True)
    if isinstance(error, KeyboardInterrupt):
        fail("stopped by Ctrl-C", INTERRUPTED)


@contextmanager
def data_errors_end_this_process(accelerator: Accelerator) -> Iterator[None]:
    """An unreadable image is found by one process only: let that one print the error and end with the code of bad
    input. The launcher ends the others."""
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
    return max(1, cores() // local_processes)


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
    with error_names_setting(key):
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


def progress_bar(items: Iterable, accelerator: Accelerator, name: Optional[str] = None) -> tqdm:
    """The items, with a bar on the main process's terminal; none in a log file. (tqdm.auto's bar would begin to iterate
    twice, which loads the first images twice.)"""
    return tqdm(items, name, leave=False, disable=not (accelerator.is_main_process and sys.stderr.isatty()))


def quiet_transformers() -> None:
    """transformers' bars and load reports would cut through a command's own output; loading is checked strictly."""
    disable_progress_bar()
    set_verbosity_error()


# Settings of accelerate launch's fsdp_config as it hands them over, and the one value of each that is supported
FSDP_SETTINGS = {
    "fsdp_version": ("FSDP_VERSION", "2"),
    "fsdp_reshard_after_forward": ("FSDP_RESHARD_AFTER_FORWARD", "true"),
    "fsdp_auto_wrap_policy": ("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP"),  # the units are always the blocks
    "fsdp_transformer_layer_cls_to_wrap": ("FSDP_TRANSFORMER_CLS_TO_WRAP", "none"),
    "fsdp_ignored_modules": ("FSDP_IGNORED_MODULES", "none"),
    "fsdp_offload_params": ("FSDP_OFFLOAD_PARAMS", "false"),
    "fsdp_cpu_ram_efficient_loading": ("FSDP_CPU_RAM_EFFICIENT_LOADING", "false"),
    "fsdp_activation_checkpointing": ("FSDP_ACTIVATION_CHECKPOINTING", "false"),  # model.gradient_checkpointing is it
}

OTHER_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def fsdp_is_asked_for() -> bool:
    """Whether accelerate launch was told to use FSDP."""
    return _is_set("ACCELERATE_USE_FSDP")


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether models are shared out among the processes: one process has nothing to share out."""
    return fsdp_is_asked_for() and accelerator.use_distributed


def check_launch() -> None:
    """Raise ConfigError when accelerate launch asks for something else than data parallelism or FSDP2 as it is here."""
    dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if dynamo.lower() != "no":  # it would wrap the whole model, whose weights then have other names
        raise ConfigError(f"accelerate launch: expected dynamo_backend no, got {dynamo}; train.compile: true compiles")
    for variable, engine in OTHER_ENGINES.items():
        if _is_set(variable):
            raise ConfigError(f"accelerate launch: {engine} is not supported, expected data parallelism or FSDP2")
    if fsdp_is_asked_for():
        for name, (variable, supported) in FSDP_SETTINGS.items():
            found = os.environ.get(variable, supported)
            if found.lower() != supported.lower():
                raise ConfigError(
                    f"accelerate launch: expected {name} {supported}, got {found} (a config that works is "
                    "accelerate_configs/fsdp2_8gpu.yaml)"
                )


@contextmanager
def plain_accelerator() -> Iterator[None]:
    """Within this context an Accelerator is built for data parallelism, which is what the discriminator gets: its small
    heads stay whole on every process."""
    asked = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ["ACCELERATE_USE_FSDP"] = asked


def launcher() -> str:
    """What started this process, for messages."""
    by_accelerate = any(name.startswith("ACCELERATE_") and name != "ACCELERATE_USE_CPU" for name in os.environ)
    return "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ and not by_accelerate else "accelerate launch"


def check_processes(accelerator: Accelerator) -> None:
    """Raise ConfigError when the processes that a launcher started do not know of each other."""
    started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if started != accelerator.num_processes:
        raise ConfigError(
            f"{launcher()}: it started {started} processes, and there is no GPU for them; to train with several "
            "processes on a CPU set ACCELERATE_USE_CPU=true"
        )


def build_accelerator(train: TrainConfig, report_to: tuple) -> Accelerator:
    """The Accelerator of a training run, with the trackers `report_to`; this process's threads and TF32 are set, too.
    Raises ConfigError for what is asked for and cannot be had: trackers, engines, a precision, TF32, steps that are
    skipped on a device that cannot."""
    for name in report_to:
        if name not in (*LOGGER_TYPE_TO_CLASS, "csv"):
            known = ", ".join(["csv", *LOGGER_TYPE_TO_CLASS])
            raise ConfigError(f"logging.report_to: expected trackers among {known}, got {name!r}")
    report_to = tuple(name for name in report_to if name != "csv")  # see metrics_file.py
    check_launch()
    # Accelerate drops a timeout of exactly 10 minutes, because it equals its default: so add a microsecond
    timeout = timedelta(minutes=train.timeout_minutes, microseconds=1)
    # Accelerate only has the deprecated name; torch's new one is missing in the oldest torch that is supported
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    with error_names_setting("train.mixed_precision"), plain_accelerator():
        accelerator = Accelerator(
            mixed_precision=train.mixed_precision,
            # the step divides by the micro-batches itself; an environment variable would have it done twice
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=list(report_to) or None,
            project_config=ProjectConfiguration(project_dir=train.output_dir, logging_dir=f"{train.output_dir}/logs"),
            # buffers are the same on all processes by construction; a broadcast would change the discriminator's
            # spectral-norm vectors between its two forward passes
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=timeout),
            ],
        )
        check_precision(accelerator)
    check_processes(accelerator)
    check_skipping(train.max_nonfinite_steps, accelerator.device)
    set_tf32(train.tf32, accelerator)
    share_cores(accelerator, train.cpu_threads)
    if train.compile:
        check_compiler(accelerator.device)
    missing = set(report_to) - {str(tracker) for tracker in accelerator.log_with}
    if missing:
        raise ConfigError(f"logging.report_to: the package of tracker '{sorted(missing)[0]}' is not installed")
    return accelerator


def check_compiler(device: torch.device) -> None:
    """Raise ConfigError where torch.compile makes no code for this device: it needs a C++ compiler, and else fails in
    the first step. Where there is one, that is believed on a CPU: to try takes seconds."""
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")):
        return
    size = 17 + time.time_ns() % 999_983  # code of its own: what an earlier process compiled would say nothing
    try:
        torch.compile(lambda x: x.sin() + 1, fullgraph=True, dynamic=False)(torch.zeros(size, device=device))
    except Exception as error:  # of many classes, with the compiler's whole output
        reason = one_line(str(error).strip().splitlines()[0] if str(error).strip() else error)
        raise ConfigError(
            f"train.compile: torch.compile makes no code for {device.type} here ({reason}); expected a C++ compiler "
            "(g++, or one that CXX names), or train.compile false"
        ) from error


def check_skipping(max_nonfinite_steps: int, device: torch.device) -> None:
    """Raise ConfigError where steps that are not finite cannot be skipped."""
    if max_nonfinite_steps and device.type == "mps":
        raise ConfigError(
            f"train.max_nonfinite_steps: expected 0, got {max_nonfinite_steps}: the fused AdamW of Apple's GPUs takes "
            "its step whatever the gradients are"
        )


def set_tf32(allowed: bool, accelerator: Accelerator, key: str = "train.tf32") -> None:
    """Let float32 products and convolutions use TF32, or forbid it: torch's default enables TF32 for convolutions only.
    Raises ConfigError, about the setting `key`, on a device that has no TF32."""
    on_gpu = accelerator.device.type == "cuda"
    if allowed and not on_gpu:
        raise ConfigError(f"{key}: expected false, TF32 is a GPU's and this process computes on {accelerator.device}")
    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def without_tf32() -> Iterator[None]:
    """Within this context float32 products and convolutions are those of float32, whatever the run allows: TF32 changes
    the third digit of what is measured."""
    parts = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [part.allow_tf32 for part in parts]
    try:
        for part in parts:
            part.allow_tf32 = False
        yield
    finally:
        for part, allowed in zip(parts, before, strict=True):
            part.allow_tf32 = allowed


def micro_batch_size(train: TrainConfig, num_processes: int) -> int:
    """Images of one forward pass in one process. Raises ConfigError when the global batch does not divide."""
    size, rest = divmod(train.global_batch_size, num_processes * train.gradient_accumulation_steps)
    if rest or size == 0:
        raise ConfigError(
            f"train.global_batch_size: {train.global_batch_size} is not a multiple of {num_processes} processes "
            f"x {train.gradient_accumulation_steps} train.gradient_accumulation_steps"
        )
    return size


def say(accelerator: Accelerator, message: str) -> None:
    """Print on the main process, above the progress bar."""
    if accelerator.is_main_process:
        tqdm.write(message)
