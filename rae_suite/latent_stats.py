"""Exact mean and variance of an autoencoder's latents over images."""

from functools import partial
from typing import Optional

import torch
from accelerate import Accelerator

from modeling_rae import RAEModel
from rae_suite.digests import encoder_digest
from rae_suite.errors import DataError, RunError
from rae_suite.launch import data_errors_end_this_process, progress_bar, to_device
from rae_suite.loaders import UnreadableLog, eval_loader
from rae_suite.moments import Moments
from rae_suite.settings import ImagesConfig
from rae_suite.sources import ImageSource


def encoder_autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a frozen encoder runs in a `precision` of its own, "float32" or "bf16", whatever autocast is
    on around it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


class LatentReader:
    """Goes through the images, centre-cropped, on all processes. With `flip` each image counts with its mirror image:
    the published statistics flip at random, both ways is the exact value of that. `precision`: the encoder's own; None:
    the accelerator's."""

    def __init__(
        self,
        images: ImageSource,
        data: ImagesConfig,
        batch_size: int,
        flip: bool,
        accelerator: Accelerator,
        precision: Optional[str] = None,
    ):
        self.images, self.data, self.accelerator = images, data, accelerator
        self.batch_size, self.flip = batch_size, flip
        self.precision = precision
        own = partial(encoder_autocast, precision, accelerator.device)
        self.autocast = accelerator.autocast if precision is None else own
        self.unreadable = UnreadableLog(data.max_unreadable)

    def digest(self, model: RAEModel) -> str:
        """What the statistics depend on: encoder and its precision, images, mirror images."""
        return f"{encoder_digest(model)} {self.precision} {self.images.list_digest()} {self.flip}"

    @torch.no_grad()
    def moments(self, model: RAEModel, normalize: bool, num_samples: Optional[int]) -> tuple[Moments, int]:
        """Moments of the model's latents (C, h, w), normalised or not, and the number of images that they are from. The
        same on all processes, which all call this."""
        accelerator = self.accelerator
        shape = (model.config.latent_channels, model.config.latent_size, model.config.latent_size)
        moments = Moments(shape, device=accelerator.device)
        loader = eval_loader(
            self.images,
            model.config.image_size,
            self.batch_size,
            self.data.num_workers,
            accelerator.process_index,
            accelerator.num_processes,
            num_samples,
        )
        with data_errors_end_this_process(accelerator):
            for batch in progress_bar(loader, accelerator, "latent statistics"):
                self.unreadable.add(batch["unreadable"])
                if len(batch["pixels"]) == 0:
                    continue
                pixels = to_device(batch["pixels"], accelerator.device).float() / 255
                for view in (pixels, pixels.flip(3)) if self.flip else (pixels,):
                    with self.autocast():
                        latent = model.encode(view, normalize=normalize).latent
                    moments.update(latent)
        moments.merge_processes(accelerator)
        return moments, moments.count // (2 if self.flip else 1)

    def stats(self, model: RAEModel, num_samples: Optional[int] = None) -> tuple[dict, int]:
        """`mean` and `var` of the latents without normalisation, float32 (C, h, w) on the CPU, and the number of
        images. Raises DataError for fewer than two images and RunError for values that are not finite."""
        moments, num_images = self.moments(model, False, num_samples)
        if num_images < 2:
            raise DataError(f"data.path: {num_images} images of {self.data.path} can be read, expected at least 2")
        stats = {"mean": moments.mean.float().cpu(), "var": moments.variance().float().cpu()}
        for name, value in stats.items():
            if not value.isfinite().all():
                raise RunError(f"the {name} of the latents is not finite; nothing was written")
        return stats, num_images
