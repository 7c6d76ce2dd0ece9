"""Random numbers that are functions of a key, and the table of keys: which random stream is whose."""

from typing import Union

import numpy as np
import torch
from accelerate import Accelerator

from rae_suite.settings import TrainConfig

# The second word of these seeds keeps the random streams apart: NumPy pads (1, 2) with zeros, so it equals (1, 2, 0).
# Two seeds have no such word: that of step_generator, (seed, step, place), and that of eval_rfid.py's noise, (seed,
# image). linear_heads.py has a table of its own, as its seeds meet none of these.
HOLDOUT_STREAM, ORDER_STREAM, CROP_STREAM = 0, 1, 2
SHARD_STREAM, PASS_STREAM, WINDOW_STREAM, MIXTURE_STREAM, LANE_CROP_STREAM = 3, 4, 5, 6, 7
SAMPLE_STREAM, FLOW_STREAM, EVAL_STREAM = 8, 9, 10


def seeded_generator(*key: int, device: Union[torch.device, str] = "cpu") -> torch.Generator:
    """A generator whose numbers are a function of all of `key`."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(seed)


def batch_place(accelerator: Accelerator, train: TrainConfig, streaming: bool, micro_batch: int) -> int:
    """The 0-based place of this process's micro-batch in the global batch, counted in micro-batches: the images of a
    step have the same places however processes and micro-batches share them out.

    `streaming`: whether the images are streamed: a process then has the images of neighbouring lanes; else they are
    shared out as by loaders.TrainBatches.
    """
    if streaming:
        return accelerator.process_index * train.gradient_accumulation_steps + micro_batch
    return micro_batch * accelerator.num_processes + accelerator.process_index


def step_generator(
    accelerator: Accelerator, train: TrainConfig, streaming: bool, step: int, micro_batch: int
) -> torch.Generator:
    """Source of the noise and augmentation of a micro-batch: a function of seed, 0-based step and `batch_place`. So a
    resumed run repeats it, also with micro-batches of this size on other processes."""
    place = batch_place(accelerator, train, streaming, micro_batch)
    return seeded_generator(train.seed, step, place, device=accelerator.device)
