"""The loss terms of RAE training (arXiv 2510.11690, section 3) as functions of tensors, and the adaptive GAN weight.

Pixels are in [0, 1]; the perceptual loss and the discriminator see `2 * x - 1`, in [-1, 1].
"""

import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rae_suite.checkpointing import read_tensors

# --------------------------------------------------------------------------------------------------------------------
# Adversarial losses
# --------------------------------------------------------------------------------------------------------------------


def hinge_discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """0.5 * (mean relu(1 - real) + mean relu(1 + fake)), logits of any shape."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vanilla_discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """0.5 * (mean softplus(-real) + mean softplus(fake)), logits of any shape."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


DISCRIMINATOR_LOSSES = {"hinge": hinge_discriminator_loss, "vanilla": vanilla_discriminator_loss}


def generator_loss(fake: torch.Tensor) -> torch.Tensor:
    """-mean(logits), the published "vanilla" generator loss."""
    return -fake.mean()


def to_discriminator_range(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in [0, 1] to [-1, 1], clamped and rounded to 8 bit, as real images are."""
    return (pixels.clamp(0, 1) * 255).round() / 127.5 - 1


# --------------------------------------------------------------------------------------------------------------------
# LPIPS
# --------------------------------------------------------------------------------------------------------------------


def random_vgg16_state() -> dict:
    """An untrained VGG16 (`features.*`, 13 convolutions) that is the same on every machine: zero biases, weights of
    variance 2 / fan-in from a generator seeded with the layer's name."""
    channels = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    positions = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # of the convolutions among torchvision's features
    state, fan_in = {}, 3
    for i, (position, width) in enumerate(zip(positions, channels, strict=True)):
        random = np.random.RandomState(zlib.crc32(f"vgg16.conv{i}".encode()))
        weight = random.standard_normal((width, fan_in, 3, 3)) * np.sqrt(2 / (9 * fan_in))
        state[f"features.{position}.weight"] = torch.from_numpy(weight.astype(np.float32))
        state[f"features.{position}.bias"] = torch.zeros(width)
        fan_in = width
    return state


class _NoRandomWeights(TorchFunctionMode):
    """New layers are left as the memory was: torchvision's VGG16 draws 138 million values, 120 million of them for a
    classifier that LPIPS drops, and all others are replaced."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in ("normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _pretrained_vgg16_file(setting: str) -> Path:
    """torchvision's VGG16 in torch.hub's folder, downloaded when it is not there."""
    from torchvision.models import VGG16_Weights

    url = VGG16_Weights.IMAGENET1K_V1.url
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(file), hash_prefix=file.stem.split("-")[-1], progress=False)
        except (OSError, RuntimeError) as error:  # no connection; a file with another hash
            raise OSError(
                f"{setting}: LPIPS needs VGG16's weights, {file} does not exist and the download failed "
                f"({error}); put the file there or name a local copy"
            ) from None
    return file


def build_lpips(
    weights: str = "pretrained", vgg_path: Optional[str] = None, setting: str = "perceptual.vgg_path"
) -> nn.Module:
    """LPIPS 0.1 on VGG16 (arXiv 1801.03924) from the lpips package, frozen, in eval mode.

    It is called on two batches (B, 3, H, W) in [-1, 1] and gives (B, 1, 1, 1). The linear heads come with the package.

    Args:
        weights: "pretrained" (torchvision's VGG16, from `vgg_path` or torch.hub's folder, else downloaded) or "random".
        vgg_path: local copy of torchvision's vgg16-397923af.pth.
        setting: name of the setting that gave `vgg_path`, for errors.

    Raises:
        OSError: the weights cannot be had; the message names file and setting.
        ValueError: the file holds something else.
    """
    import lpips  # slow to import

    if weights == "random":
        file, state = None, random_vgg16_state()
    else:
        file = Path(vgg_path) if vgg_path is not None else _pretrained_vgg16_file(setting)
        state = read_tensors(file, setting)
        if "features.0.weight" not in state:
            raise ValueError(f"{setting}: {file} is not torchvision's VGG16, it has no 'features.0.weight'")
    with warnings.catch_warnings(), _NoRandomWeights():  # lpips still passes torchvision's old `pretrained` argument
        warnings.simplefilter("ignore", UserWarning)
        model = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    own = {name: name.split(".")[-2:] for name in model.net.state_dict()}  # slice1.0.weight -> features.0.weight
    try:
        model.net.load_state_dict({name: state[f"features.{i}.{kind}"] for name, (i, kind) in own.items()})
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{setting}: {file} is not torchvision's VGG16 ({error})") from None
    return model.requires_grad_(False).eval()


# --------------------------------------------------------------------------------------------------------------------
# The generator's loss and its gradient
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class GeneratorTerms:
    """Loss terms of one batch, detached scalars. `loss` = recon + perceptual_weight * lpips
    + gan_weight * adaptive_weight * gan; terms that are off are 0."""

    loss: torch.Tensor
    recon: torch.Tensor
    lpips: torch.Tensor
    gan: torch.Tensor
    adaptive_weight: torch.Tensor


def adaptive_weight(base_norm: torch.Tensor, gan_norm: torch.Tensor, maximum: float) -> torch.Tensor:
    """||dL/dW|| / (||dG/dW|| + 1e-6), clamped to [0, maximum] (VQGAN, arXiv 2012.09841, eq. 7): W is the weight of the
    decoder's last layer, L the reconstruction and perceptual loss, G the adversarial one."""
    return (base_norm / (gan_norm + 1e-6)).clamp(0, maximum)


def generator_gradient(
    patches: torch.Tensor,
    last_hidden_state: torch.Tensor,
    patches_to_pixels: Callable,
    pixels: torch.Tensor,
    perceptual: Optional[Callable] = None,
    perceptual_weight: float = 1.0,
    adversary: Optional[Callable] = None,
    gan_weight: float = 0.75,
    max_adaptive_weight: float = 1e4,
    scale_loss: Callable = lambda loss: loss,
) -> tuple:
    """The generator's loss terms and the gradient with respect to the output of the decoder's last layer, one backward
    through each network: `patches.backward(gradient)` then finishes the step.

    The published code differentiates the last layer's weight for the adaptive weight and then everything again. Here
    the losses are differentiated once, down to the last layer's output t; with its input h the gradient of the
    layer's weight is (dL/dt)^T h, and dL/dt + gan_weight * w * dG/dt goes on to the rest of the decoder.

    Args:
        patches: t, (B, 1 + N, p*p*3). Its graph is not touched.
        last_hidden_state: h, (B, 1 + N, D).
        patches_to_pixels: differentiable map from t to pixels (B, 3, H, W).
        pixels: the images, (B, 3, H, W) in [0, 1].
        perceptual: function of two batches in [-1, 1], images first; None switches the term off.
        perceptual_weight: factor of its mean.
        adversary: function of reconstructions in [-1, 1] to logits; None switches the term off.
        gan_weight, max_adaptive_weight: factor of the adversarial term, and bound of its adaptive weight.
        scale_loss: fp16 loss scaling (GradScaler.scale); gradients are those of scaled losses, terms are not scaled.

    Returns:
        (gradient like `patches`, GeneratorTerms)
    """
    t = patches.detach().requires_grad_()
    mapped = patches_to_pixels(t)
    reconstruction = mapped.detach().requires_grad_()  # each loss is differentiated down to here, then freed
    zero = reconstruction.new_zeros(())

    recon = (reconstruction - pixels).abs().mean()
    perceived = zero if perceptual is None else perceptual(2 * pixels - 1, 2 * reconstruction - 1).mean()
    loss = recon + perceptual_weight * perceived
    (base_gradient,) = torch.autograd.grad(scale_loss(loss), reconstruction)
    if adversary is None:
        (gradient,) = torch.autograd.grad(mapped, t, base_gradient)
        return gradient, GeneratorTerms(loss.detach(), recon.detach(), perceived.detach(), zero, zero)

    gan = generator_loss(adversary(2 * reconstruction - 1))
    (gan_gradient,) = torch.autograd.grad(scale_loss(gan), reconstruction)
    (base_t,) = torch.autograd.grad(mapped, t, base_gradient, retain_graph=True)
    (gan_t,) = torch.autograd.grad(mapped, t, gan_gradient)
    h = last_hidden_state.detach().flatten(0, 1)  # (B * (1 + N), D)
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    unscale = scale_loss(torch.ones_like(loss, dtype=torch.float32))
    with torch.autocast(h.device.type, enabled=False):  # a sum over all tokens of scaled gradients overflows float16
        base_norm, gan_norm = ((g.flatten(0, 1).to(h.dtype).t() @ h).norm() / unscale for g in (base_t, gan_t))
    w = adaptive_weight(base_norm, gan_norm, max_adaptive_weight)
    loss = loss.detach() + gan_weight * w * gan.detach()
    terms = GeneratorTerms(loss, recon.detach(), perceived.detach(), gan.detach(), w)
    return base_t + gan_weight * w * gan_t, terms
