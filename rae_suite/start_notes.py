"""The first lines of a run: its batch, and settings of a long run that make a short one look broken."""

from typing import Any

from accelerate import Accelerator

from rae_suite.ema import EMA
from rae_suite.settings import TrainConfig
from rae_suite.updates import decay_steps


def batch_line(train: TrainConfig, accelerator: Accelerator, micro_batch: int, sharded: bool) -> str:
    """How the global batch comes about, and what computes it."""
    return (
        f"batch {train.global_batch_size} = {accelerator.num_processes} processes x {micro_batch} images x "
        f"{train.gradient_accumulation_steps} accumulated, precision {accelerator.mixed_precision}, "
        f"{accelerator.device.type}{', sharded (FSDP2)' if sharded else ''}"
    )


def start_notes(config: Any, ema: EMA, steps_per_epoch: int, total_steps: int, starts: dict) -> list:
    """Lines for settings that do not fit the run's length. `starts`: steps at which losses begin, by their names."""
    notes = []
    if ema.lags(total_steps):
        notes.append(
            f"ema.decay {ema.decay} averages over {1 / (1 - ema.decay):.0f} steps and the run has {total_steps}: "
            "results and pictures, which are of the averaged weights, lag behind; ema.warmup: true or a smaller decay"
        )
    if config.logging.every_steps > total_steps:
        notes.append(
            f"logging.every_steps {config.logging.every_steps} is longer than the run of {total_steps} steps: "
            "losses of the first and the last step alone will be written"
        )
    warmup, end = decay_steps(config.lr_schedule, steps_per_epoch)
    if config.lr_schedule.warmup_from_zero and warmup >= total_steps:
        notes.append(f"the learning rate's warm-up of {warmup} steps does not end in the run's {total_steps}")
    elif config.lr_schedule.type != "constant" and end < total_steps:
        notes.append(
            f"the last {total_steps - end} of {total_steps} steps run at lr_schedule.final_lr "
            f"{config.lr_schedule.final_lr:g}; with lr_schedule.stretch: true the decay ends with the run"
        )
    elif config.lr_schedule.type == "cosine" and end > total_steps:
        notes.append(
            f"the learning rate's decay would end with step {end}, the run has {total_steps}; with "
            "lr_schedule.stretch: true it ends with the run"
        )
    for what, step in starts.items():
        if step >= total_steps:
            notes.append(f"{what} would begin with step {step}, the run has {total_steps}")
    return [f"note: {note}" for note in notes]
