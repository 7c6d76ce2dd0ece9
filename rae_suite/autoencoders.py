"""One interface to what can be measured: RAEs of this suite, and the RAE and KL autoencoders of diffusers."""

from typing import Optional

import torch
from torch import nn

from modeling_rae import RAEModel
from rae_suite.errors import ConfigError

DEFAULT_IMAGE_SIZE = 256  # pixels, for models that take any size


class Autoencoder(nn.Module):
    """A frozen autoencoder in eval mode.

    `name` is the folder, file or Hub id that was asked for, `loaded` in words what was found there, `kind` the class of
    the network, `image_size` the side S in pixels of the images that it takes and makes; None: any. Pixels are
    (B, 3, S, S) in [0, 1], latents (B, C, h, w) as a diffusion model sees them.
    """

    image_size: Optional[int] = None

    def __init__(self, name: str, model: nn.Module):
        super().__init__()
        self.name, self.loaded, self.model = name, name, model.eval().requires_grad_(False)
        self.kind = type(model).__name__

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Latents, normalised or scaled, without noise."""
        return self.model.encode(pixels).latent

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Pixels, about [0, 1], not clamped."""
        return self.model.decode(latent).sample

    def check_size(self, size: int, key: str) -> None:
        """Raise ConfigError, about the setting `key`, when images of `size` x `size` pixels are not what it takes."""
        if size != self.image_size:
            raise ConfigError(f"{key}: expected {self.image_size} px for {self.name}, got {size}")

    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """The frozen encoder's patch tokens as a grid (B, C, h, w), before latent statistics. Raises ConfigError where
        there is no such encoder."""
        raise ConfigError(f"{self.name} is a {self.kind}: it has no frozen vision encoder, expected an RAE")


class RAE(Autoencoder):
    def __init__(self, name: str, model: RAEModel):
        super().__init__(name, model)
        self.image_size = model.config.image_size

    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.encode(pixels, normalize=False).latent


class DiffusersRAE(Autoencoder):
    def __init__(self, name: str, model: nn.Module):
        super().__init__(name, model)
        self.image_size = model.decoder_image_size

    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model._denormalize_latents(self.encode(pixels) / self.model.config.scaling_factor)


class DiffusersKL(Autoencoder):
    """Its latents are the posterior's mean, shifted and scaled as diffusers' pipelines do."""

    def check_size(self, size: int, key: str) -> None:
        factor = 2 ** (len(self.model.config.block_out_channels) - 1)  # it halves between blocks
        if size % factor or size < 8 * factor:
            raise ConfigError(
                f"{key}: expected a multiple of {factor}, {8 * factor} or more, for {self.name}, got {size}"
            )

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        config = self.model.config
        mean = self.model.encode(2 * pixels - 1).latent_dist.mode()
        return (mean - (config.shift_factor or 0)) * config.scaling_factor

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        config = self.model.config
        mean = latent / config.scaling_factor + (config.shift_factor or 0)
        return (self.model.decode(mean).sample + 1) / 2
