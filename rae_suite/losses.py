"""The loss terms of RAE training (arXiv 2510.11690, section 3) as functions of tensors, and the adaptive GAN weight.

Pixels are in [0, 1]; the perceptual loss and the discriminator see `2 * x - 1`, in [-1, 1].
"""

from collections.abc import Callable
from typing import Optional

import torch
from torch.nn import functional as F

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
# The generator's loss and its gradient
# --------------------------------------------------------------------------------------------------------------------


def adaptive_weight(base_norm: torch.Tensor, gan_norm: torch.Tensor, maximum: float) -> torch.Tensor:
    """||dL/dW|| / (||dG/dW|| + 1e-6), clamped to [0, maximum] (VQGAN, arXiv 2012.09841, eq. 7): W is the weight of the
    decoder's last layer, L the reconstruction and perceptual loss, G the adversarial one."""
    return (base_norm / (gan_norm + 1e-6)).clamp(0, maximum)


def l1(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of pixels (B, 3, H, W)."""
    return (reconstruction - images).abs().mean()


def perceptual_loss(lpips: Callable) -> Callable:
    """The loss of two batches of pixels (B, 3, H, W) in [0, 1] that LPIPS, a function of two in [-1, 1], images first,
    stands for."""
    return lambda reconstruction, images: lpips(2 * images - 1, 2 * reconstruction - 1).mean()


def generator_gradient(
    patches: torch.Tensor,
    last_hidden_state: torch.Tensor,
    patches_to_pixels: Callable,
    images: torch.Tensor,
    pixel_losses: dict,
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
        images: (B, 3, H, W) in [0, 1].
        pixel_losses: {name: (factor, function of reconstructions and images)}; a function of None is a term that is
            off: its value is 0.
        adversary: function of reconstructions in [-1, 1] to logits; None switches the term off.
        gan_weight, max_adaptive_weight: factor of the adversarial term, and bound of its adaptive weight.
        scale_loss: fp16 loss scaling (GradScaler.scale); gradients are those of scaled losses, terms are not scaled.

    Returns:
        (gradient like `patches`, terms): detached scalars by name. `loss` is the sum of all pixel losses with their
        factors and of gan_weight * adaptive_weight * gan; then the pixel losses, `gan` and `adaptive_weight`.
    """
    t = patches.detach().requires_grad_()
    mapped = patches_to_pixels(t)
    reconstruction = mapped.detach().requires_grad_()  # each loss is differentiated down to here, then freed
    zero = reconstruction.new_zeros(())

    values = {name: zero if f is None else f(reconstruction, images) for name, (_, f) in pixel_losses.items()}
    loss = sum(factor * values[name] for name, (factor, _) in pixel_losses.items())
    (base_gradient,) = torch.autograd.grad(scale_loss(loss), reconstruction)
    terms = {"loss": loss.detach(), **{name: value.detach() for name, value in values.items()}}
    if adversary is None:
        (gradient,) = torch.autograd.grad(mapped, t, base_gradient)
        return gradient, {**terms, "gan": zero, "adaptive_weight": zero}

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
    terms["loss"] = terms["loss"] + gan_weight * w * gan.detach()
    return base_t + gan_weight * w * gan_t, {**terms, "gan": gan.detach(), "adaptive_weight": w}
