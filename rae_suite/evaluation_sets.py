"""Evaluators of a run of stage 1: of its own evaluation images, and of further named sets."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Optional

from accelerate import Accelerator

from rae_suite.errors import renamed_settings
from rae_suite.frechet import FrechetMetric, cached_references
from rae_suite.loaders import UnreadableLog, eval_loader
from rae_suite.metric_names import IMAGE_METRICS
from rae_suite.metrics import Evaluator
from rae_suite.settings import DataConfig, ImagesConfig
from rae_suite.sources import ImageSource
from rae_suite.splits import WHOLE, find_splits, load_eval_images


def open_sets(sets: dict, data: DataConfig) -> dict:
    """The images of eval.sets, {name: path} as settings have it, by name: of data with splits data.eval_split's.
    Raises DataError, about the set, for one that is not there."""
    opened = {}
    for name, path in sets.items():
        cfg = ImagesConfig(path, eval_split=data.eval_split, max_megapixels=data.max_megapixels)
        with renamed_settings("data.path", f"eval.sets.{name}"):
            if WHOLE in find_splits(cfg):  # then it is meant as a whole, also where a preset names a split
                cfg = replace(cfg, eval_split=ImagesConfig.eval_split)
            opened[name] = load_eval_images(cfg, seed=0)
    return opened


def build_evaluator(
    images: ImageSource,
    config: Any,
    size: int,
    accelerator: Accelerator,
    perceptual: Optional[Callable],
    distances: Sequence[FrechetMetric],
    unreadable: UnreadableLog,
    sharded: bool,
) -> Evaluator:
    """What measures a run's reconstructions of `images`, cropped to `size` pixels, as its settings say."""
    loader = eval_loader(
        images,
        size,
        config.eval.batch_size,
        config.data.num_workers,
        accelerator.process_index,
        accelerator.num_processes,
        config.eval.num_samples,
    )
    return Evaluator(
        loader,
        accelerator,
        [name for name in config.eval.metrics if name in IMAGE_METRICS],
        perceptual,
        distances,
        cached_references(distances, images, config.eval.num_samples, size, accelerator),
        unreadable.add,
        sharded=sharded,
    )
