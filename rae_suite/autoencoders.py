"""One interface to what can be measured: RAEs of this suite, and the RAE and KL autoencoders of diffusers."""

from typing import Optional

import torch
from torch import nn
from transformers import PreTrainedConfig

from modeling_rae import RAEModel, read_config, vision_config
from rae_suite.errors import ConfigError, error_names_setting

DEFAULT_IMAGE_SIZE = 256  # pixels, for models that take any size
DEFAULT_ENCODER_SIZE = 224  # pixels, what most vision encoders are trained with


class Autoencoder(nn.Module):
    """A frozen autoencoder in eval mode.

    `name` is the folder, file or Hub id that was asked for, `loaded` in words what was found there, `kind` the class of
    the network, `image_size` the side S in pixels of the images that it takes and makes; None: any. Pixels are
    (B, 3, S, S) in [0, 1], latents (B, C, h, w) as a diffusion model sees them. `rectangle_step`: pixels that divide
    the sides of the rectangles that it takes too; None: squares alone.
    """

    image_size: Optional[int] = None
    rectangle_step: Optional[int] = None

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

    def cls(self, pixels: torch.Tensor) -> torch.Tensor:
        """The frozen encoder's CLS token (B, C). Raises ConfigError where there is none."""
        raise ConfigError(f"{self.name} is a {self.kind}: it has no CLS token")


class RAE(Autoencoder):
    def __init__(self, name: str, model: RAEModel):
        super().__init__(name, model)
        self.image_size = model.config.image_size
        self.rectangle_step = model.config.decoder_patch_size if model.takes_rectangles else None

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return self.model.decode(latent, other_grid="keep").sample

    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.encode(pixels, normalize=False).latent

    def cls(self, pixels: torch.Tensor) -> torch.Tensor:
        family, outputs = self.model.config.encoder_family(), []
        if family.prefix_tokens(self.model.config.encoder_config) == 0:
            raise ConfigError(f"{type(self.model.encoder).__name__} of {self.name} has no CLS token")
        handle = self.model.encoder.register_forward_hook(lambda *call: outputs.append(call[-1].last_hidden_state))
        try:
            self.model.encode(pixels, normalize=False)
        finally:
            handle.remove()
        token = outputs[0][:, 0]
        return token if family.norm_in_forward else self.model.encoder_norm(token)


class Encoder(RAE):
    """A vision encoder alone, as published, with the weight and bias of its last norm; it decodes nothing."""

    def __init__(self, name: str, model: RAEModel):
        super().__init__(name, model)
        self.kind = type(model.encoder).__name__

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class DiffusersRAE(Autoencoder):
    def __init__(self, name: str, model: nn.Module):
        super().__init__(name, model)
        self.image_size = model.decoder_image_size

    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model._denormalize_latents(self.encode(pixels) / self.model.config.scaling_factor)


class DiffusersKL(Autoencoder):
    """Its latents are the posterior's mean, shifted and scaled as diffusers' pipelines do."""

    @property
    def rectangle_step(self) -> int:
        return 2 ** (len(self.model.config.block_out_channels) - 1)  # it halves between blocks

    def check_size(self, size: int, key: str) -> None:
        factor = self.rectangle_step
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


def is_encoder(source: str) -> bool:
    """Whether a folder or Hub repository is that of a vision encoder of transformers."""
    try:
        settings, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError):
        return False  # load_autoencoder says what is wrong
    return "_class_name" not in settings and settings.get("model_type", "rae") != "rae"


def load_encoder(source: str, image_size: Optional[int], key: str = "model") -> Encoder:
    """The vision encoder in a folder or on the Hub, on the CPU in float32. `image_size`: side in pixels of its images;
    none: 224, or the number below it that the encoder's patches divide. Raises ConfigError, about the setting `key`."""
    with error_names_setting(key, source):
        patch = vision_config(read_config(source)).patch_size
        patch = patch if isinstance(patch, int) else patch[0]
        size = image_size or DEFAULT_ENCODER_SIZE // patch * patch
        # an RAE whose decoder is as small as one can be
        decoder = dict(decoder_hidden_size=4, decoder_num_hidden_layers=1, decoder_num_attention_heads=1,
                       decoder_intermediate_size=4, decoder_patch_size=patch)  # fmt: skip
        keep = {"encoder_keep_final_affine": True}
        return Encoder(source, RAEModel.from_encoder(source, encoder_input_size=size, **decoder, **keep))
