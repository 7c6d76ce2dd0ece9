"""Digests of networks: keys for what they compute."""

import hashlib
import json

import torch
from torch import nn

from rae_suite.sharding import gather_to_cpu

# settings of an RAE, beside the encoder's weights, that decide what its latents are before normalisation
DECIDES_LATENTS = ("encoder_input_size", "encoder_layers", "encoder_add_spatial_mean", "encoder_keep_final_affine",
                   "image_mean", "image_std")  # fmt: skip


def weights_digest(network: nn.Module, without: tuple = ()) -> str:
    """SHA-256 of the weights, but those whose names begin with one of `without`: a key for what they computed."""
    digest = hashlib.sha256()
    for name, weight in sorted(network.state_dict().items()):
        if not name.startswith(without):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(gather_to_cpu(weight, keep=True).reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def encoder_settings(rae: nn.Module) -> str:
    """An RAE's settings that, beside the encoder's weights, decide what its latents are."""
    return json.dumps([getattr(rae.config, name) for name in DECIDES_LATENTS])


def encoder_settings_digest(rae: nn.Module) -> str:
    """SHA-256 of `encoder_settings`."""
    return hashlib.sha256(encoder_settings(rae).encode()).hexdigest()


def encoder_digest(rae: nn.Module) -> str:
    """SHA-256 of all that an RAE's latents depend on before they are normalised."""
    whole = encoder_settings(rae) + weights_digest(rae, ("decoder.", "latent_"))
    return hashlib.sha256(whole.encode()).hexdigest()


def latents_digest(model: nn.Module) -> str:
    """SHA-256 of all that an autoencoder's latents depend on: the settings and weights that are not the decoder's, so
    that `best/` and `final/` of a run, or two decoders for one encoder, share what was computed from their latents."""
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    left_out = ("_", "decoder_", "encoder_id", "encoder_revision", "encoder_bundled", "noise_", "dtype")
    kept = {name: value for name, value in config.items() if not name.startswith(left_out)}
    settings = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.sha256((settings + weights_digest(model, ("decoder.", "post_quant_conv."))).encode()).hexdigest()
