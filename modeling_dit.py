"""Diffusion transformer on the latents of a Representation Autoencoder (RAE): DiT-DH, plain DiT with no head, and the
model of RAEv2.

The file that downstream code needs beside modeling_rae.py; it imports torch and diffusers alone and travels with the
weights:

    pipe = DiffusionPipeline.from_pretrained("user/my-dit", trust_remote_code=True)
    images = pipe(class_labels=[207, 360]).images

or, without the pipeline:

    model = RAEDiTModel.from_pretrained("runs/ditdh_xl/final/transformer", torch_dtype=torch.bfloat16)
    times = sampling_times(50, shift=48**0.5)  # 50 points: 49 steps
    latent = sample_ode(lambda x, t: predict_velocity(model, x, t, labels), noise, times)  # (B, C, h, w)

Time runs from 0 (data) to 1 (noise): x_t = (1 - t) * data + t * noise, and the model predicts v = noise - data. A model
that learns the data instead (RAEv2) turns its prediction into that velocity itself.

Sources: Diffusion Transformers with Representation Autoencoders (arXiv 2510.11690), whose published checkpoints use the
same parameter names as the models here (their classes: DiTwDDTHead and LightningDiT); the wide head with a condition
per token comes from DDT (arXiv 2504.05741), the block from LightningDiT (arXiv 2501.01423) and DiT (arXiv 2212.09748).
RAEv2 (arXiv 2605.18324; its class: DiTwDDTHeadIG) has conditions as tokens, and a second output for internal guidance.
"""

import difflib
import json
import logging
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from torch.nn import functional as F

# Backbones: RAEDiTModel(**SIZES["XL"]) is a plain DiT-XL, RAEDiTModel(**SIZES["XL"], **PUBLISHED_HEAD) a DiT-DH-XL.
SIZES = {
    "S": {"hidden_size": 384, "num_layers": 12, "num_attention_heads": 6},
    "B": {"hidden_size": 768, "num_layers": 12, "num_attention_heads": 12},
    "L": {"hidden_size": 1024, "num_layers": 24, "num_attention_heads": 16},
    "XL": {"hidden_size": 1152, "num_layers": 28, "num_attention_heads": 16},
    "XXL": {"hidden_size": 1280, "num_layers": 32, "num_attention_heads": 16},
    "H": {"hidden_size": 1536, "num_layers": 32, "num_attention_heads": 16},
    "G": {"hidden_size": 2048, "num_layers": 40, "num_attention_heads": 16},
    "T": {"hidden_size": 2688, "num_layers": 40, "num_attention_heads": 21},
}
PUBLISHED_HEAD = {
    "head_hidden_size": 2048,
    "head_num_layers": 2,
    "head_num_attention_heads": 16,
}  # of every published DiT-DH
RAEV2 = {
    "in_channels": 1024,
    "hidden_size": 1440,
    "num_layers": 28,
    "num_attention_heads": 20,
    **PUBLISHED_HEAD,
    "use_qk_norm": True,
    "use_pos_embed": False,
    "num_time_tokens": 4,
    "num_class_tokens": 8,
    "base_num_layers": 8,
    "prediction": "data",
}  # RAEDiTModel(**RAEV2) is the published model on DINOv3-L
FOURIER_FREQUENCIES = 256
LEAST_TIME = 0.05  # of the division that turns predicted data into a velocity (RAEv2)


# --------------------------------------------------------------------------------------------------------------------
# Configuration
# --------------------------------------------------------------------------------------------------------------------

# Our names and the published ones; what DiT-DH has twice is a pair (backbone, head) there
PUBLISHED_NAMES = {
    "sample_size": "input_size",
    "in_channels": "in_channels",
    "patch_size": "patch_size",
    "mlp_ratio": "mlp_ratio",
    "num_classes": "num_classes",
    "class_dropout_prob": "class_dropout_prob",
    "use_qk_norm": "use_qknorm",
    "use_swiglu": "use_swiglu",
    "use_rms_norm": "use_rmsnorm",
    "use_rope": "use_rope",
}
PUBLISHED_PAIRS = {"hidden_size": "hidden_size", "num_layers": "depth", "num_attention_heads": "num_heads"}
PUBLISHED_OFF = ("wo_shift", "learn_sigma")  # no published model has these switched on, and this file cannot do so


def config_from_published(published: dict) -> dict:
    """Arguments of RAEDiTModel from a published config: its parameters, and under `kind` its class, DiTwDDTHead or
    LightningDiT. Raises ValueError for another class, for unknown or missing keys and for what is not supported."""
    published = dict(published)
    kind = published.pop("kind", None)
    if kind not in ("DiTwDDTHead", "LightningDiT"):
        raise ValueError(f"kind: expected DiTwDDTHead or LightningDiT, got {kind!r}")
    for name in PUBLISHED_OFF:
        if published.pop(name, False):
            raise ValueError(f"{name}: expected false, got true: not supported")
    config = {}
    if kind == "DiTwDDTHead":
        config["use_pos_embed"] = published.pop("use_pos_embed", True)
    names = {**PUBLISHED_NAMES, **PUBLISHED_PAIRS}
    missing, unknown = sorted({*names.values()} - {*published}), sorted({*published} - {*names.values()})
    if missing or unknown:
        raise ValueError(f"published config of a {kind}: missing keys {missing}, unknown keys {unknown}")
    config.update({ours: published[theirs] for ours, theirs in PUBLISHED_NAMES.items()})
    for ours, theirs in PUBLISHED_PAIRS.items():
        value = published[theirs]
        if kind == "LightningDiT":
            config[ours] = value
        elif isinstance(value, (list, tuple)) and len(value) == 2:
            config[ours], config[f"head_{ours}"] = value
        else:
            raise ValueError(f"{theirs}: expected two numbers, of backbone and head, got {value!r}")
    return config


def config_to_published(config: dict) -> dict:
    """The published config, with its class under `kind`, of a model with this config (an RAEDiTModel's `.config`): of
    RAE's code, or of RAEv2's, whose class of a model with a base head is DiTwDDTHeadIG. Raises ValueError for what
    these classes cannot express: a plain DiT without position table, another prediction than theirs."""
    has_tokens = config["num_time_tokens"] is not None
    predicted = "data" if has_tokens else "velocity"
    if config["prediction"] != predicted:
        whose = "RAEv2's model" if has_tokens else "DiTwDDTHead and LightningDiT"
        raise ValueError(f"prediction: expected {predicted}, as of {whose}, got {config['prediction']}")
    if has_tokens:
        return _config_to_raev2(config)
    has_head = config["head_hidden_size"] is not None
    published = {theirs: config[ours] for ours, theirs in PUBLISHED_NAMES.items()}
    for ours, theirs in PUBLISHED_PAIRS.items():
        published[theirs] = [config[ours], config[f"head_{ours}"]] if has_head else config[ours]
    if has_head:
        published["use_pos_embed"] = config["use_pos_embed"]
    elif not config["use_pos_embed"]:
        raise ValueError("use_pos_embed: expected true, as in every published LightningDiT, got false")
    return {"kind": "DiTwDDTHead" if has_head else "LightningDiT", **published, "wo_shift": False}


def _config_to_raev2(config: dict) -> dict:
    """`config_to_published` for a model with conditions as tokens; their numbers are of `cond_arch`."""
    shared = ("sample_size", "in_channels", "mlp_ratio", "num_classes")
    published = {PUBLISHED_NAMES[ours]: config[ours] for ours in shared}
    published |= {theirs: [config[ours], config[f"head_{ours}"]] for ours, theirs in PUBLISHED_PAIRS.items()}
    published["patch_size"] = [1, 1]
    published["cond_arch"] = {"num_t_tokens": config["num_time_tokens"], "num_c_tokens": config["num_class_tokens"]}
    if config["base_num_layers"] is None:
        return {"kind": "DiTwDDTHead", **published}
    return {"kind": "DiTwDDTHeadIG", **published, "base_model_depth": config["base_num_layers"]}


def _check_config(config: dict) -> None:
    """Raise ValueError, with the field's name and both values, for a config that no model can be built from."""
    head = {name: config[name] for name in PUBLISHED_HEAD}
    has_head = config["head_hidden_size"] is not None
    if len({value is None for value in head.values()}) > 1:
        raise ValueError(f"expected all or none of {', '.join(head)}, got {head}")
    has_tokens = config["num_time_tokens"] is not None
    whole_numbers = ["sample_size", "in_channels", "patch_size", "num_classes", *PUBLISHED_PAIRS]
    optional = [name for name in ("num_time_tokens", "num_class_tokens", "base_num_layers") if config[name] is not None]
    for name in [*whole_numbers, *(head if has_head else ()), *optional]:
        if type(config[name]) is not int or config[name] < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {config[name]!r}")
    for name in ("use_qk_norm", "use_swiglu", "use_rms_norm", "use_rope", "use_pos_embed", "train_constants"):
        if not isinstance(config[name], bool):
            raise ValueError(f"{name}: expected true or false, got {config[name]!r}")
    for name, least, most in (("mlp_ratio", 1e-3, 1e3), ("class_dropout_prob", 0, 1)):
        value = config[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise ValueError(f"{name}: expected a number from {least} to {most}, got {value!r}")
    if config["sample_size"] % config["patch_size"]:
        raise ValueError(
            f"sample_size ({config['sample_size']}) must be a multiple of patch_size ({config['patch_size']})"
        )
    if has_head and config["patch_size"] != 1:
        raise ValueError(f"patch_size: expected 1, as the head works on single tokens, got {config['patch_size']}")
    if config["use_pos_embed"] and config["hidden_size"] % 4:
        raise ValueError(f"hidden_size ({config['hidden_size']}) must be a multiple of 4 for the position table")
    if config["prediction"] not in ("velocity", "data"):
        raise ValueError(f"prediction: expected velocity or data, got {config['prediction']!r}")
    _check_tokens(config, has_tokens, has_head)
    for prefix in ("", "head_") if has_head else ("",):
        _check_heads(prefix, config[f"{prefix}hidden_size"], config[f"{prefix}num_attention_heads"], config["use_rope"])


def _check_tokens(config: dict, has_tokens: bool, has_head: bool) -> None:
    """Raise ValueError for what conditions as tokens, or the base head, cannot be combined with."""
    if has_tokens != (config["num_class_tokens"] is not None):
        counts = (config["num_time_tokens"], config["num_class_tokens"])
        raise ValueError(f"expected both or none of num_time_tokens, num_class_tokens, got {counts}")
    base = config["base_num_layers"]
    if base is not None and not (has_tokens and base <= config["num_layers"]):
        raise ValueError(
            f"base_num_layers: expected nothing without num_time_tokens, and at most num_layers "
            f"({config['num_layers']}) with them, got {base}"
        )
    if has_tokens:
        if not has_head:
            raise ValueError("num_time_tokens: expected none without a head, see head_hidden_size")
        needed = {"use_qk_norm": True, "use_swiglu": True, "use_rms_norm": True, "use_rope": True,
                  "use_pos_embed": False}  # fmt: skip
        for name, value in needed.items():
            if config[name] != value:
                raise ValueError(
                    f"{name}: expected {str(value).lower()} with num_time_tokens, as in RAEv2, got {config[name]}"
                )


def _check_heads(prefix: str, width: int, heads: int, rope: bool) -> None:
    if width % heads:
        raise ValueError(f"{prefix}hidden_size ({width}) must be a multiple of {prefix}num_attention_heads ({heads})")
    if rope and width // heads % 4:
        raise ValueError(
            f"{prefix}hidden_size / {prefix}num_attention_heads is {width // heads}, expected a multiple of 4 for the "
            "rotary table"
        )


# --------------------------------------------------------------------------------------------------------------------
# Positions
# --------------------------------------------------------------------------------------------------------------------


def position_table(width: int, grid: int) -> torch.Tensor:
    """MAE's 2-D sin-cos table (arXiv 2111.06377), computed in float64.

    Returns (1, N, width) float32, tokens in row-major order: the first half of the channels from the column index, the
    second half from the row index, each half sines then cosines.
    """
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))  # (width/4,)
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency  # (grid, width/4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, width/2)
    column = axis[None, :, :].expand(grid, -1, -1)  # (grid, grid, width/2)
    row = axis[:, None, :].expand(-1, grid, -1)  # (grid, grid, width/2)
    return torch.cat([column, row], dim=2).reshape(1, grid * grid, width).float()


def rotary_table(head_dim: int, grid: int, num_unturned: int = 0) -> tuple:
    """Cosines and sines of the 2-D rotary embedding (arXiv 2104.09864), (N, head_dim) float32 each, tokens in row-major
    order: the first half of a head's channels turn with the row index, the others with the column index, and two
    neighbouring channels form a pair. `num_unturned` tokens without a position, which do not turn, follow them."""
    half = head_dim // 2
    frequency = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float32) / half)  # (half/2,)
    axis = torch.arange(grid, dtype=torch.float32)[:, None] * frequency  # (grid, half/2)
    axis = axis.repeat_interleave(2, dim=1)  # (grid, half), both channels of a pair
    row = axis[:, None, :].expand(-1, grid, -1)  # (grid, grid, half)
    column = axis[None, :, :].expand(grid, -1, -1)  # (grid, grid, half)
    angle = torch.cat([row, column], dim=2).reshape(grid * grid, head_dim)
    angle = F.pad(angle, (0, 0, 0, num_unturned))
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, rotary: tuple) -> torch.Tensor:
    """Turn the neighbouring pairs of channels of x (B, heads, N, d) by a rotary table's angles; float32, as the table
    is, whatever x is."""
    cos, sin = rotary  # (N, d) each
    x = x.float()
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)  # (B, heads, N, d/2) each
    turned = torch.stack([-second, first], dim=-1).flatten(-2)  # (B, heads, N, d)
    return x * cos + turned * sin


class Float32Constants(nn.Module):
    """A module whose own parameters and buffers, not those of its children, stay in float32 when a model is cast to 16
    bits with `.to(dtype)`, `.half()` or `.bfloat16()`: in bfloat16 the angles of embeddings would be off for good."""

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            kept = not moved.is_floating_point() or torch.finfo(moved.dtype).bits >= 32
            return moved if kept else tensor.to(moved.device, torch.float32)

        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(at_least_float32, recurse=False)


class RotaryEmbedding(Float32Constants):
    """A rotary table as buffers. They can be computed, but published files hold them: persistent buffers under the
    published names let such a file load strictly, and let a file of ours load strictly into the published classes."""

    def __init__(self, head_dim: int, grid: int, num_unturned: int = 0):
        super().__init__()
        self.size = (head_dim, grid, num_unturned)  # arguments of rotary_table
        cos, sin = rotary_table(*self.size)
        self.register_buffer("freqs_cos", cos)
        self.register_buffer("freqs_sin", sin)

    def forward(self) -> tuple:
        return self.freqs_cos, self.freqs_sin


# --------------------------------------------------------------------------------------------------------------------
# Layers
# --------------------------------------------------------------------------------------------------------------------


class CastLinear(nn.Linear):
    """A Linear that casts its input to the dtype of 16-bit weights: the residual stream and what comes from the float32
    constants is float32 then too, as under autocast. With float32 weights the input stays as it is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if self.weight.dtype == torch.float32 else x.to(self.weight.dtype))


class RMSNorm(nn.Module):
    """RMS norm over the last dimension (arXiv 1910.07467), float32 inside, cast back before the learned weight."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


def make_norm(width: int, rms: bool) -> nn.Module:
    """Norm of blocks and of the final layer: RMS norm, or LayerNorm without weight and bias."""
    return RMSNorm(width) if rms else nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def make_head_norm(head_dim: int, rms: bool) -> nn.Module:
    """Norm of queries and keys: RMS norm, or LayerNorm with weight and bias and torch's epsilon."""
    return RMSNorm(head_dim) if rms else nn.LayerNorm(head_dim, eps=1e-5)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x (B, N, W), shift and scale (B, 1 or N, W)."""
    return x * (1 + scale) + shift


class PatchEmbed(nn.Module):
    """Latent (B, C, h, w) to tokens (B, N, W) in row-major order."""

    def __init__(self, patch_size: int, in_channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj(x.to(self.proj.weight.dtype))  # (B, W, h/p, w/p)
        # contiguous, because otherwise every norm and sum of the residual stream would walk through transposed memory
        return x.flatten(2).transpose(1, 2).contiguous()


class TimeEmbedding(Float32Constants):
    """Times (B,) in [0, 1] to (B, W): random Fourier features (arXiv 2006.10739) and a two-layer MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.W = nn.Parameter(torch.empty(FOURIER_FREQUENCIES))
        self.mlp = nn.Sequential(CastLinear(2 * FOURIER_FREQUENCIES, width), nn.SiLU(), CastLinear(width, width))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        # float32 whatever the model is: angles reach 2 pi * 4, and bfloat16 is no finer than 0.1 there
        angle = t.float()[:, None] * self.W.float() * 2 * math.pi  # (B, 256)
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=1))  # (B, 512) -> (B, W)


class TimeTokens(TimeEmbedding):
    """Times (B,) to (B, W), and to tokens (B, n, W): that embedding plus a learnt vector for each."""

    def __init__(self, width: int, num_tokens: int):
        super().__init__(width)
        self.learnable_tokens = nn.Parameter(torch.empty(num_tokens, width))

    def forward(self, t: torch.Tensor) -> tuple:
        time = super().forward(t)
        return time, self.learnable_tokens + time[:, None]


class LabelEmbedding(nn.Module):
    """Class labels (B,) to (B, W)."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return self.embedding_table(labels)


class ClassTokens(Float32Constants):
    """Class labels (B,) to tokens (B, n, W): the label's row of a table plus a learnt vector for each."""

    def __init__(self, rows: int, width: int, num_tokens: int):
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)
        self.learnable_tokens = nn.Parameter(torch.empty(num_tokens, width))

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return self.learnable_tokens + self.embedding_table(labels)[:, None]


class Attention(nn.Module):
    """Self-attention (B, N, W) to (B, N, W), softmax(q k^T / sqrt(d)) v, without mask and dropout. `fused`: whether
    queries, keys and values are one Linear, which is a matter of names in files."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool, rms: bool, fused: bool = True):
        super().__init__()
        head_dim = width // num_heads
        self.num_heads, self.fused = num_heads, fused
        if fused:
            self.qkv = CastLinear(width, 3 * width)
        else:
            self.q, self.k, self.v = (CastLinear(width, width) for _ in range(3))
        self.q_norm = make_head_norm(head_dim, rms) if qk_norm else nn.Identity()
        self.k_norm = make_head_norm(head_dim, rms) if qk_norm else nn.Identity()
        self.proj = CastLinear(width, width)

    def forward(self, x: torch.Tensor, rotary: Optional[tuple]) -> torch.Tensor:
        q, k, v = self._project(x)  # (B, heads, N, d) each
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)  # (B, heads, N, d)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, N, heads, d) -> (B, N, W)

    def _project(self, x: torch.Tensor) -> Sequence:
        if self.fused:
            qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, N, 3, heads, d)
            return qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return [linear(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v)]


class SwiGLU(nn.Module):
    """SwiGLU MLP (arXiv 2002.05202), hidden width 2/3 of a plain MLP's, so that it has as many parameters. `fused`:
    whether gate and value are one Linear."""

    def __init__(self, width: int, mlp_ratio: float, fused: bool = True):
        super().__init__()
        hidden, self.fused = int(2 / 3 * int(width * mlp_ratio)), fused
        if fused:
            self.w12 = CastLinear(width, 2 * hidden)
        else:
            self.w1, self.w2 = (CastLinear(width, hidden) for _ in range(2))
        self.w3 = CastLinear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1) if self.fused else (self.w1(x), self.w2(x))  # (B, N, hidden) each
        return self.w3(F.silu(gate) * value)


class GELUMLP(nn.Module):
    """MLP with tanh-approximated GELU."""

    def __init__(self, width: int, mlp_ratio: float):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.fc1 = CastLinear(width, hidden)
        self.fc2 = CastLinear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulated_block(
    block: nn.Module, x: torch.Tensor, modulation: torch.Tensor, rotary: Optional[tuple]
) -> torch.Tensor:
    """Attention and MLP of a block on x (B, N, W), with adaptive norms and gates: modulation (B, 1 or N, 6 W)."""
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
    x = x + gate1 * block.attn(modulate(block.norm1(x), shift1, scale1), rotary)
    return x + gate2 * block.mlp(modulate(block.norm2(x), shift2, scale2))


class RAEDiTBlock(nn.Module):
    """Transformer block with adaptive norm (DiT's adaLN-Zero, arXiv 2212.09748)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, qk_norm: bool, swiglu: bool, rms: bool):
        super().__init__()
        self.norm1 = make_norm(width, rms)
        self.attn = Attention(width, num_heads, qk_norm, rms)
        self.norm2 = make_norm(width, rms)
        self.mlp = (SwiGLU if swiglu else GELUMLP)(width, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), CastLinear(width, 6 * width))

    def forward(self, x: torch.Tensor, condition: torch.Tensor, rotary: Optional[tuple]) -> torch.Tensor:
        """x (B, N, W); condition (B, 1, W), the same for all tokens, or (B, N, W), one per token."""
        return modulated_block(self, x, self.adaLN_modulation(condition), rotary)


class RAEDiTTokenBlock(nn.Module):
    """RAEv2's block: a plain transformer block in the backbone, whose conditions are tokens, and an adaptive one in the
    head."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, adaptive: bool):
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, num_heads, qk_norm=True, rms=True, fused=False)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, mlp_ratio, fused=False)
        self.adaln_modulation = nn.Sequential(nn.SiLU(), CastLinear(width, 6 * width)) if adaptive else None

    def forward(self, x: torch.Tensor, condition: Optional[torch.Tensor], rotary: tuple) -> torch.Tensor:
        """x (B, N, W); condition (B, N, W), None in the backbone."""
        if self.adaln_modulation is not None:
            return modulated_block(self, x, self.adaln_modulation(condition), rotary)
        x = x + self.attn(self.norm1(x), rotary)
        return x + self.mlp(self.norm2(x))


class FinalLayer(nn.Module):
    """Adaptive norm and Linear: (B, N, W) and condition (B, 1 or N, W) to (B, N, out)."""

    def __init__(self, width: int, out_features: int, rms: bool):
        super().__init__()
        self.norm_final = make_norm(width, rms)
        self.linear = CastLinear(width, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), CastLinear(width, 2 * width))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)  # (B, 1 or N, W) each
        return self.linear(modulate(self.norm_final(x), shift, scale))


class TokenFinalLayer(nn.Module):
    """FinalLayer under RAEv2's names."""

    def __init__(self, width: int, out_features: int):
        super().__init__()
        self.norm = RMSNorm(width)
        self.linear = CastLinear(width, out_features)
        self.adaln_modulation = nn.Sequential(nn.SiLU(), CastLinear(width, 2 * width))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaln_modulation(condition).chunk(2, dim=-1)  # (B, N, W) each
        return self.linear(modulate(self.norm(x), shift, scale))


def unpatchify(patches: torch.Tensor, patch_size: int, channels: int) -> torch.Tensor:
    """(B, N, p*p*C), values ordered (row, column, channel), N a square, to (B, C, h, w)."""
    grid = math.isqrt(patches.shape[1])
    x = patches.reshape(-1, grid, grid, patch_size, patch_size, channels)  # (B, h/p, w/p, p, p, C)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (B, C, h/p, p, w/p, p)
    return x.reshape(-1, channels, grid * patch_size, grid * patch_size).contiguous()


# --------------------------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class RAEDiTOutput(Transformer2DModelOutput):
    """`sample`: the predicted velocity noise - data, (B, C, h, w); `base_sample`: that of the base head, if there is
    one."""

    base_sample: Optional[torch.Tensor] = None


def data_to_velocity(data: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The velocity (x - data) / max(t, LEAST_TIME) of latents x (B, C, h, w) at times t (B,) from predicted data."""
    return (x - data) / t.clamp_min(LEAST_TIME).view(-1, 1, 1, 1)


class RAEDiTModel(Float32Constants, ModelMixin, ConfigMixin):
    """DiT-DH (arXiv 2510.11690), or a plain DiT where there is no head. It predicts the velocity of RAE latents.

    DiT-DH's backbone is deep and narrow. It reads the noisy latent under one condition per image, time plus label, and
    its output, with the time added again, is one condition per token. Under these the head, shallow and wide, reads the
    noisy latent a second time and predicts the velocity. A plain DiT is the backbone with the final layer.

    RAEv2's model (see RAEV2) is a DiT-DH whose backbone has plain blocks: time and label are tokens behind those of the
    image, which have no position and are dropped before the head. A base head, one final layer, predicts from the
    tokens of an early block: `guide` takes it for the weaker model (internal guidance).

    In 16 bits: load with `from_pretrained(..., torch_dtype=torch.bfloat16)`, cast with `.to(torch.bfloat16)`, or use
    autocast around a float32 model. All three keep the Fourier frequencies, the position table and the rotary tables in
    float32. They compute the Fourier product, the rotation and (with a position table) the backbone's residual stream
    in float32, and the head's residual stream in 16 bits, as the published code does under autocast. RAEv2's learnt
    vectors stay in float32 too, and make the backbone's residual stream float32.

    Args:
        sample_size: side h = w of the latents; only this one.
        in_channels: channels C of the latents, and of the output.
        patch_size: side of the patch of latent positions that becomes a token; DiT-DH: 1.
        hidden_size, num_layers, num_attention_heads: width, blocks and heads of the backbone, see SIZES.
        head_hidden_size, head_num_layers, head_num_attention_heads: the same of DiT-DH's head, see PUBLISHED_HEAD; all
            None for a plain DiT.
        mlp_ratio: width of an MLP without SwiGLU, relative to the block's.
        num_classes: number of class labels.
        class_dropout_prob: probability with which training replaces a label with the null label. The model does not do
            so itself; above 0 the label table has a row for the null label.
        use_qk_norm: whether queries and keys are normalised per head.
        use_swiglu: SwiGLU MLPs; if not, MLPs with GELU.
        use_rms_norm: RMS norms; if not, LayerNorms, without weight and bias except for queries and keys.
        use_rope: 2-D rotary embedding in every attention.
        use_pos_embed: 2-D sin-cos position table on the backbone's tokens.
        train_constants: whether the position table and the Fourier frequencies are trained. They are parameters in any
            case, so every file holds them: the published code trains them though it builds them frozen.
        num_time_tokens, num_class_tokens: tokens that tell the backbone time and label; both None for adaptive norms.
        base_num_layers: blocks before the base head; None for no base head.
        prediction: what the weights predict, "velocity" or "data"; the output is a velocity in any case.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["RAEDiTBlock", "RAEDiTTokenBlock"]
    _repeated_blocks = ["RAEDiTBlock", "RAEDiTTokenBlock"]
    _keep_in_fp32_modules = ["W", "pos_embed", "freqs_cos", "freqs_sin", "learnable_tokens"]
    _skip_layerwise_casting_patterns = ["x_embedder", "s_embedder", "t_embedder", "ctx_embedder", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 16,
        in_channels: int = 768,
        patch_size: int = 1,
        hidden_size: int = 1152,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        head_hidden_size: Optional[int] = None,
        head_num_layers: Optional[int] = None,
        head_num_attention_heads: Optional[int] = None,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        use_qk_norm: bool = False,
        use_swiglu: bool = True,
        use_rms_norm: bool = True,
        use_rope: bool = True,
        use_pos_embed: bool = True,
        train_constants: bool = False,
        num_time_tokens: Optional[int] = None,
        num_class_tokens: Optional[int] = None,
        base_num_layers: Optional[int] = None,
        prediction: str = "velocity",
    ):
        super().__init__()
        _check_config(self.config)
        self.gradient_checkpointing = False
        self.has_head, self.has_tokens = head_hidden_size is not None, num_time_tokens is not None
        self.has_base_head = base_num_layers is not None
        self._build_with_tokens() if self.has_tokens else self._build_with_adaptive_norms()
        self._initialize()
        self._freeze_constants()

    def _build_with_adaptive_norms(self) -> None:
        """DiT-DH or a plain DiT."""
        c = self.config
        last_width = c.head_hidden_size if self.has_head else c.hidden_size
        grid, rows = c.sample_size // c.patch_size, c.num_classes + (c.class_dropout_prob > 0)
        self.pos_embed = nn.Parameter(position_table(c.hidden_size, grid)) if c.use_pos_embed else None
        self.x_embedder = PatchEmbed(c.patch_size, c.in_channels, last_width)
        self.t_embedder = TimeEmbedding(c.hidden_size)
        self.y_embedder = LabelEmbedding(rows, c.hidden_size)
        options = (c.mlp_ratio, c.use_qk_norm, c.use_swiglu, c.use_rms_norm)
        self.blocks = nn.ModuleList(
            RAEDiTBlock(c.hidden_size, c.num_attention_heads, *options) for _ in range(c.num_layers)
        )
        self.final_layer = FinalLayer(last_width, c.patch_size**2 * c.in_channels, c.use_rms_norm)
        rotary = RotaryEmbedding(c.hidden_size // c.num_attention_heads, grid) if c.use_rope else None
        if self.has_head:
            self.s_embedder = PatchEmbed(c.patch_size, c.in_channels, c.hidden_size)
            self.s_projector = self._projector()
            self.blocks.extend(
                RAEDiTBlock(last_width, c.head_num_attention_heads, *options) for _ in range(c.head_num_layers)
            )
            self.enc_feat_rope = rotary
            self.dec_feat_rope = RotaryEmbedding(last_width // c.head_num_attention_heads, grid) if c.use_rope else None
        else:
            self.feat_rope = rotary

    def _build_with_tokens(self) -> None:
        """RAEv2's model."""
        c, width, head_width = self.config, self.config.hidden_size, self.config.head_hidden_size
        self.pos_embed = None
        self.x_embedder = PatchEmbed(1, c.in_channels, head_width)
        self.s_embedder = PatchEmbed(1, c.in_channels, width)
        self.s_projector = self._projector()
        self.t_embedder = TimeTokens(width, c.num_time_tokens)
        self.ctx_embedder = ClassTokens(c.num_classes + (c.class_dropout_prob > 0), width, c.num_class_tokens)
        kinds = [(width, c.num_attention_heads, False)] * c.num_layers
        kinds += [(head_width, c.head_num_attention_heads, True)] * c.head_num_layers
        self.blocks = nn.ModuleList(RAEDiTTokenBlock(w, heads, c.mlp_ratio, adaptive) for w, heads, adaptive in kinds)
        self.final_layer = TokenFinalLayer(head_width, c.in_channels)
        self.base_final_layer = TokenFinalLayer(width, c.in_channels) if self.has_base_head else None
        extra = c.num_time_tokens + c.num_class_tokens
        self.enc_rope = RotaryEmbedding(width // c.num_attention_heads, c.sample_size, extra)
        self.dec_rope = RotaryEmbedding(head_width // c.head_num_attention_heads, c.sample_size)

    def _projector(self) -> nn.Module:
        width, head_width = self.config.hidden_size, self.config.head_hidden_size
        return CastLinear(width, head_width) if width != head_width else nn.Identity()

    @property
    def label_table(self) -> nn.Embedding:
        """A row for each class, and one for the null label."""
        return (self.ctx_embedder if self.has_tokens else self.y_embedder).embedding_table

    def _initialize(self) -> None:
        """The published initialisation; a new model's output is 0, or where it predicts data, what data of 0 gives. A
        plain DiT has Xavier uniform Linears with zero biases, the others keep torch's default."""
        if not self.has_head:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)
        for embedder in (self.x_embedder, self.s_embedder) if self.has_head else (self.x_embedder,):
            nn.init.xavier_uniform_(embedder.proj.weight.flatten(1))  # as a matrix
            nn.init.zeros_(embedder.proj.bias)
        nn.init.normal_(self.t_embedder.W)
        for weight in (self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight):
            nn.init.normal_(weight, std=0.02)
        nn.init.normal_(self.label_table.weight, std=0.02)
        for embedder in (self.t_embedder, self.ctx_embedder) if self.has_tokens else ():
            nn.init.normal_(embedder.learnable_tokens, std=self.config.hidden_size**-0.5)
        for linear in self._zero_linears():
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def _zero_linears(self) -> list:
        """Linears that start at 0: those of adaptive norms, and the last ones."""
        if not self.has_tokens:
            modulations = [part.adaLN_modulation[1] for part in (*self.blocks, self.final_layer)]
            return [*modulations, self.final_layer.linear]
        last = [layer for layer in (self.final_layer, self.base_final_layer) if layer is not None]
        adaptive = [*self.blocks[self.config.num_layers :], *last]
        return [*(part.adaln_modulation[1] for part in adaptive), *(layer.linear for layer in last)]

    def _freeze_constants(self) -> None:
        self.t_embedder.W.requires_grad_(self.config.train_constants)
        if self.pos_embed is not None:
            self.pos_embed.requires_grad_(self.config.train_constants)

    def to(self, *args, **kwargs) -> "RAEDiTModel":
        """As in diffusers, except that the constants stay in float32 (see Float32Constants). diffusers warns at every
        cast that they would not: that message is left out."""
        logger = logging.getLogger(ModelMixin.__module__)

        def is_true(record: logging.LogRecord) -> bool:
            return "should be kept in float32" not in record.getMessage()

        logger.addFilter(is_true)
        try:
            return super().to(*args, **kwargs)
        finally:
            logger.removeFilter(is_true)

    @property
    def null_label(self) -> int:
        """The label that stands for no class. Raises ValueError when the model was built without one."""
        if not self.config.class_dropout_prob > 0:
            raise ValueError("the model has no null label: its class_dropout_prob is 0, expected above 0")
        return self.config.num_classes

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *, output_loading_info: bool = False, **kwargs):
        """As in diffusers, but strict: missing and unexpected weights raise ValueError."""
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        for kind in ("missing_keys", "unexpected_keys"):
            if names := sorted(info.get(kind, ())):
                raise ValueError(
                    f"{pretrained_model_name_or_path}: {len(names)} {kind.replace('_', ' ')}, the first is "
                    f"'{names[0]}'; these are not the weights of the model that its config.json describes"
                )
        return (model, info) if output_loading_info else model

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        return_dict: bool = True,
    ) -> Union[RAEDiTOutput, tuple]:
        """Velocity of noisy latents.

        Args:
            hidden_states: (B, C, h, w) noisy normalised latents.
            timestep: (B,) in [0, 1], 1 is noise; not multiplied by 1,000. Keep it in float32.
            class_labels: (B,) class indices, or `null_label`. They are not compared with the table's length, because
                that would be a CPU-GPU sync point.
            return_dict: whether the result is an object with `.sample` or a tuple.

        Returns:
            `sample` (B, C, h, w), the predicted noise - data; with a base head also `base_sample`, the same of it.

        Raises:
            ValueError: inputs of another shape or kind.
        """
        self._check_inputs(hidden_states, timestep, class_labels)
        if self.has_tokens:
            predictions = self._dit_dh_of_tokens(hidden_states, timestep, class_labels)  # (B, N, C), one or two
        else:
            time = self.t_embedder(timestep)[:, None]  # (B, E) -> (B, 1, E)
            condition = time + self.y_embedder(class_labels)[:, None]  # (B, 1, E)
            dit = self._dit_dh(hidden_states, time, condition) if self.has_head else self._dit(hidden_states, condition)
            predictions = (dit,)  # (B, N, p*p*C)
        samples = [unpatchify(patches, self.config.patch_size, self.config.in_channels) for patches in predictions]
        if self.config.prediction == "data":
            samples = [data_to_velocity(data, hidden_states, timestep) for data in samples]  # (B, C, h, w)
        return RAEDiTOutput(*samples) if return_dict else tuple(samples)

    def _dit(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Plain DiT: latent (B, C, h, w) and condition (B, 1, E) to patches (B, N, p*p*C)."""
        h = self._run(self.blocks, self._add_positions(self.x_embedder(x)), condition, self.feat_rope)
        return self.final_layer(h, condition)

    def _dit_dh(self, x: torch.Tensor, time: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """DiT-DH: latent (B, C, h, w) and conditions (B, 1, E) to patches (B, N, C)."""
        depth = self.config.num_layers
        s = self._add_positions(self.s_embedder(x))  # (B, N, E)
        # every block applies SiLU to its condition, so here it is applied twice, as published
        s = self._run(self.blocks[:depth], s, F.silu(condition), self.enc_feat_rope)
        s = self.s_projector(F.silu(time.to(s.device) + s))  # (B, N, D), from here on a condition per token
        h = self.x_embedder(x)  # (B, N, D), the noisy latent again, without position table
        h = self._run(self.blocks[depth:], h, s, self.dec_feat_rope)
        return self.final_layer(h, s)

    def _dit_dh_of_tokens(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> tuple:
        """RAEv2's model: latent (B, C, h, w), times and labels (B,) to patches (B, N, C) of the head, and of the base
        head if there is one."""
        depth, base = self.config.num_layers, self.config.base_num_layers or 0
        image = self.s_embedder(x)  # (B, N, E)
        time, time_tokens = self.t_embedder(t)  # (B, E) and (B, n, E)
        tokens = torch.cat([image, time_tokens.to(image.device), self.ctx_embedder(labels).to(image.device)], dim=1)
        tokens = self._run(self.blocks[:base], tokens, None, self.enc_rope)
        early = tokens[:, : image.shape[1]]
        tokens = self._run(self.blocks[base:depth], tokens, None, self.enc_rope)
        time = time[:, None].to(tokens.device)  # (B, 1, E)
        s = self.s_projector(F.silu(time + tokens[:, : image.shape[1]]))  # (B, N, D)
        h = self._run(self.blocks[depth:], self.x_embedder(x), s, self.dec_rope)
        full = self.final_layer(h, s)
        if not self.has_base_head:
            return (full,)
        early = F.silu(time + early)  # (B, N, E), state and condition of the base head
        return full, self.base_final_layer(early, early)

    def _add_positions(self, tokens: torch.Tensor) -> torch.Tensor:
        # on the tokens' device, which is another than the table's where a device map spreads the model
        return tokens if self.pos_embed is None else tokens + self.pos_embed.to(tokens.device)

    def _run(
        self, blocks: nn.ModuleList, x: torch.Tensor, condition: Optional[torch.Tensor], rope: Optional[RotaryEmbedding]
    ) -> torch.Tensor:
        """Blocks one after the other, (B, N, W) to (B, N, W)."""
        rotary = None if rope is None else rope()
        for block in blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, condition, rotary)
            else:
                x = block(x, condition, rotary)
        return x

    def _check_inputs(self, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> None:
        channels, size, shape = self.config.in_channels, self.config.sample_size, tuple(hidden_states.shape)
        if len(shape) != 4 or shape[1:] != (channels, size, size):
            raise ValueError(f"hidden_states: expected latents (B, {channels}, {size}, {size}), got {shape}")
        for name, value, floating in (("timestep", timestep, True), ("class_labels", class_labels, False)):
            if tuple(value.shape) != (hidden_states.shape[0],):
                raise ValueError(
                    f"{name}: expected shape ({hidden_states.shape[0]},), one for each latent, got {tuple(value.shape)}"
                )
            if value.is_floating_point() != floating:
                kind = "times in [0, 1] as floats" if floating else "class indices as integers"
                raise ValueError(f"{name}: expected {kind}, got {value.dtype}")


# --------------------------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------------------------


def shift_times(t: torch.Tensor, shift: float) -> torch.Tensor:
    """Times pushed towards noise, s t / (1 + (s - 1) t) (SD3, arXiv 2403.03206, equation 23); the same in training and
    sampling. 1 is no shift."""
    return shift * t / (1 + (shift - 1) * t)


def sampling_times(num_steps: int, shift: float = 1.0, end: str = "published") -> torch.Tensor:
    """Times of a sampling run, falling from 1, float32 on the CPU: the solver reads them on the host.

    Args:
        num_steps: as published and in FID tables.
        shift: factor s of `shift_times`.
        end: "published": `num_steps` points, so one step fewer, of which the last is the shifted 0.001 and is not
            followed by a step to 0. "zero" (RAEv2 and the authors' JAX code): `num_steps` steps, the last to 0.

    Raises:
        ValueError: another `end`, or too few steps.
    """
    return shift_times(unshifted_times(num_steps, end), shift)


def unshifted_times(num_steps: int, end: str) -> torch.Tensor:
    """`sampling_times` before the shift."""
    if end not in ("published", "zero"):
        raise ValueError(f"end: expected published or zero, got {end!r}")
    least = 2 if end == "published" else 1
    if num_steps < least:
        raise ValueError(f"num_steps: expected at least {least} with end={end!r}, got {num_steps}")
    if end == "published":
        return 1 - torch.linspace(0, 0.999, num_steps, device="cpu")
    return torch.linspace(1, 0, num_steps + 1, device="cpu")


def predict_velocity(model: Callable, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The model's velocity in float32 for latents x (B, C, h, w), which all are at time t, a scalar on the CPU, and
    labels (B,). One forward pass."""
    times = torch.full((x.shape[0],), float(t), dtype=torch.float32, device=x.device)  # a fill: nothing is copied
    return model(x, times, labels).sample.float()


def guide(weak: torch.Tensor, strong: torch.Tensor, scale: float) -> torch.Tensor:
    """Extrapolate from the weaker prediction through the stronger one; scale 1 is the stronger one."""
    return weak + scale * (strong - weak)


def guidance_is_on(t: torch.Tensor, scale: float, interval: tuple) -> bool:
    """Whether guidance changes anything at the shifted time t: `scale` is not 1 and t lies in `interval`, both ends
    included, compared in float32 as t is."""
    t_min, t_max = interval
    return scale != 1 and bool(t_min <= torch.as_tensor(t, dtype=torch.float32) <= t_max)


def cfg_velocity(
    model: Callable,
    x: torch.Tensor,
    t: torch.Tensor,
    labels: torch.Tensor,
    null_label: int,
    scale: float,
    interval: tuple = (0.0, 1.0),
) -> torch.Tensor:
    """Velocity under classifier-free guidance (arXiv 2207.12598) in an interval of times (arXiv 2404.07724). Arguments
    and result as in `predict_velocity`; one forward pass, of 2 B latents where guidance is on."""
    if not guidance_is_on(t, scale, interval):
        return predict_velocity(model, x, t, labels)
    both = torch.cat([labels, torch.full_like(labels, null_label)])  # (2 B,)
    with_label, without = predict_velocity(model, torch.cat([x, x]), t, both).chunk(2)  # (B, C, h, w) each
    return guide(without, with_label, scale)


def autoguidance_velocity(
    model: Callable,
    weaker_model: Callable,
    x: torch.Tensor,
    t: torch.Tensor,
    labels: torch.Tensor,
    scale: float,
    interval: tuple = (0.0, 1.0),
) -> torch.Tensor:
    """Velocity guided by a weaker model with the same labels (arXiv 2406.02507). Arguments and result as in
    `predict_velocity`; one forward pass of each model where guidance is on, else one of `model`."""
    strong = predict_velocity(model, x, t, labels)
    if not guidance_is_on(t, scale, interval):
        return strong
    return guide(predict_velocity(weaker_model, x, t, labels), strong, scale)


def internal_velocity(
    model: Callable,
    x: torch.Tensor,
    t: torch.Tensor,
    labels: torch.Tensor,
    scale: float,
    interval: tuple = (0.0, 1.0),
) -> torch.Tensor:
    """Velocity guided by the model's own base head (RAEv2). Arguments and result as in `predict_velocity`; one forward
    pass."""
    times = torch.full((x.shape[0],), float(t), dtype=torch.float32, device=x.device)
    out = model(x, times, labels)
    full = out.sample.float()
    return guide(out.base_sample.float(), full, scale) if guidance_is_on(t, scale, interval) else full


def guidance_kind(has_base_head: bool, has_guide: bool, internal: bool = True) -> str:
    """What a guidance scale other than 1 is the scale of: "autoguidance" with a guide, "internal guidance" of a model
    with a base head unless `internal` is false, else "classifier-free guidance"."""
    if has_guide:
        return "autoguidance"
    return "internal guidance" if internal and has_base_head else "classifier-free guidance"


def guided_velocity(
    model: Any, guide: Optional[Any], labels: torch.Tensor, scale: float, interval: tuple, internal: bool = True
) -> Callable:
    """Velocity of classes `labels` (B,) as `sample_ode` takes it, under the guidance of `guidance_kind`. Raises
    ValueError for classifier-free guidance of a model that was trained without it."""
    kind = guidance_kind(model.has_base_head, guide is not None, internal)
    if kind == "autoguidance":
        return lambda x, t: autoguidance_velocity(model, guide, x, t, labels, scale, interval)
    if kind == "internal guidance":
        return lambda x, t: internal_velocity(model, x, t, labels, scale, interval)
    null_label = None if scale == 1 else model.null_label
    return lambda x, t: cfg_velocity(model, x, t, labels, null_label, scale, interval)


@torch.no_grad()
def sample_ode(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noise: torch.Tensor,
    times: torch.Tensor,
    solver: str = "euler",
    callback: Optional[Callable[[int, torch.Tensor, torch.Tensor], None]] = None,
) -> torch.Tensor:
    """Follow dx/dt = velocity(x, t) from `noise` at times[0] to times[-1]. Nothing random happens here.

    Args:
        velocity: of the state x (B, ...) at time t, a scalar on the CPU.
        noise: (B, ...), the state at times[0]; the state is float32 whatever the noise is.
        times: (n,) as `sampling_times` gives them.
        solver: "euler", one velocity per step, or "heun2", two: the mean of those at both ends of an Euler step.
        callback: called after each step with its index from 0, the time reached and the state there.

    Returns:
        The state at times[-1], in float32.

    Raises:
        ValueError: another solver, or fewer than two times.
    """
    if solver not in ("euler", "heun2"):
        raise ValueError(f"solver: expected euler or heun2, got {solver!r}")
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"times: expected at least 2 points (n,), got shape {tuple(times.shape)}")
    x, times = noise.float(), times.cpu()
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
        step = t_next - t
        slope = velocity(x, t)
        if solver == "heun2":
            slope = (slope + velocity(x + step * slope, t_next)) / 2
        x = x + step * slope
        if callback is not None:
            callback(i, t_next, x)
    return x


# --------------------------------------------------------------------------------------------------------------------
# The pipeline
# --------------------------------------------------------------------------------------------------------------------

CODE = Path(__file__)
CODE_TEXT = CODE.read_text()  # now: until a pipeline is saved, diffusers may have put another model's file in its place
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def find_class(label: Union[int, str], class_names: dict, num_classes: int) -> int:
    """Index of the class that `label` is: an index, or a name among `class_names` {index: name}, or one of the parts
    that commas separate in a name ("tench" of "tench, Tinca tinca"), in which upper and lower case are the same. Text
    that is no name may be an index too. Raises ValueError, with the nearest names, for anything else."""
    if isinstance(label, str):
        parts = {index: [part.strip() for part in name.split(",")] for index, name in class_names.items()}
        wanted = label.strip().casefold()
        found = [index for index, name in class_names.items() if name == label]
        found = found or [index for index, words in parts.items() if wanted in (word.casefold() for word in words)]
        if len(found) > 1:
            raise ValueError(f"class {label!r}: expected the name of one class, got that of the classes {found}")
        if found:
            return found[0]
        if not wanted.isdecimal():
            names = {word.casefold(): word for words in parts.values() for word in words}
            nearest = ", ".join(names[word] for word in difflib.get_close_matches(wanted, names, n=3, cutoff=0))
            hint = f"the nearest names are {nearest}" if nearest else "this model's classes have no names"
            raise ValueError(f"class {label!r}: expected a name or an index from 0 to {num_classes - 1}; {hint}")
        label = wanted
    index = int(label) if isinstance(label, str) else operator.index(label)
    if not 0 <= index < num_classes:
        raise ValueError(f"class {index}: expected an index from 0 to {num_classes - 1}")
    return index


class RAEDiTPipeline(DiffusionPipeline):
    """Images of classes: the transformer carries noise to a latent, which the RAE decodes.

    Args:
        transformer: an RAEDiTModel.
        rae: an RAEModel with latents of the transformer's shape.
        scheduler: diffusers' FlowMatchEulerDiscreteScheduler. Its `shift` is the factor of `shift_times`.
        guide: a weaker RAEDiTModel of the same latents and classes; a guidance scale other than 1 is then
            autoguidance's. None: it is that of internal guidance where the transformer has a base head, else that of
            classifier-free guidance.
        num_inference_steps, end, guidance_scale, guidance_start, guidance_end: defaults of a call, see `__call__`;
            guidance is on at times from `guidance_start` to `guidance_end`.
        class_names: {index: name}.
        rae_id: where the RAE comes from when it is not saved with the pipeline.
        internal_guidance: whether the guidance of a transformer with a base head is internal; if not, classifier-free.

    Raises:
        ValueError: parts that do not fit each other, or no RAE; the message has the line that loads it.
    """

    model_cpu_offload_seq = "transformer->rae"  # a guide takes turns with the transformer: it is offloaded at the end
    _optional_components = ["rae", "guide"]  # files may lack them
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: ModelMixin,  # a loaded part's class is of another execution of this file than the pipeline's
        rae: nn.Module,
        scheduler: FlowMatchEulerDiscreteScheduler,
        guide: Optional[ModelMixin] = None,
        num_inference_steps: int = 50,
        end: str = "published",
        guidance_scale: float = 1.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        class_names: Optional[dict] = None,
        rae_id: Optional[str] = None,
        internal_guidance: bool = True,
    ):
        super().__init__()
        if rae is None:
            raise ValueError(
                f"this pipeline was saved without its RAE; load it with from_pretrained(..., "
                f'rae=AutoModel.from_pretrained("{rae_id}", trust_remote_code=True)), AutoModel from transformers'
            )
        check_parts_fit(transformer, rae, guide)
        _check_guidance(guidance_scale, (guidance_start, guidance_end))
        unshifted_times(num_inference_steps, end)  # raises
        self.register_modules(transformer=transformer, rae=rae, scheduler=scheduler, guide=guide)
        self.register_to_config(
            num_inference_steps=num_inference_steps,
            end=end,
            guidance_scale=float(guidance_scale),
            guidance_start=float(guidance_start),
            guidance_end=float(guidance_end),
            # a dictionary, because diffusers takes lists for parts of the pipeline; JSON's keys are text
            class_names=None if class_names is None else {str(index): name for index, name in class_names.items()},
            rae_id=rae_id,
            internal_guidance=internal_guidance,
        )

    @property
    def class_names(self) -> dict:
        """{index: name}, empty where the classes have no names."""
        return {int(index): name for index, name in (self.config.class_names or {}).items()}

    def get_label_ids(self, label: Union[str, int, Sequence]) -> list:
        """Indices of classes from their names or indices, see `find_class`."""
        labels = [label] if isinstance(label, (str, int)) else list(label)
        return [find_class(item, self.class_names, self.transformer.config.num_classes) for item in labels]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Union[int, str, Sequence, torch.Tensor],
        guidance_scale: Optional[float] = None,
        num_inference_steps: Optional[int] = None,
        generator: Union[torch.Generator, list, None] = None,
        latents: Optional[torch.Tensor] = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Optional[Callable] = None,
        callback_on_step_end_tensor_inputs: Sequence = ("latents",),
        guidance_interval: Optional[tuple] = None,
        end: Optional[str] = None,
        internal_guidance: Optional[bool] = None,
    ) -> Union[ImagePipelineOutput, tuple]:
        """Draw images.

        Args:
            class_labels: names or indices of classes, one for each of B images; one alone is one image.
            guidance_scale: 1 is off. The factor of autoguidance with a guide, of internal guidance with a base head,
                else of classifier-free guidance.
            num_inference_steps: points in time as published: with the `end` "published" there is one step fewer.
            generator: source of the noise, or a list with one for each image.
            latents: (B, C, h, w), the noise itself in place of a generator.
            output_type: "pil" (rounded to 8 bit), "np" (B, H, W, 3) or "pt" (B, 3, H, W) in [0, 1], or "latent"
                (B, C, h, w), normalised as the RAE's `decode` takes it; float32.
            return_dict: whether the result is an ImagePipelineOutput with `.images` or a tuple.
            callback_on_step_end: called after each step with the pipeline, the step's index, its time times 1,000 and
                {"latents": ...}; "latents" in the dictionary that it returns replace the state.
            callback_on_step_end_tensor_inputs: names of the tensors that it is given, of which there is "latents".
            guidance_interval: (least, greatest) time at which guidance is on, both included; 1 is noise.
            end: see `sampling_times`.
            internal_guidance: see the pipeline's argument of that name.
            None for any of guidance_scale, num_inference_steps, guidance_interval, end and internal_guidance: as in the
            pipeline's config.

        Raises:
            ValueError: arguments that cannot be used, before anything is computed.
        """
        config = self.config
        scale = config.guidance_scale if guidance_scale is None else guidance_scale
        interval = (config.guidance_start, config.guidance_end) if guidance_interval is None else guidance_interval
        _check_guidance(scale, interval)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type: expected one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        if not set(callback_on_step_end_tensor_inputs) <= set(self._callback_tensor_inputs):
            known, found = self._callback_tensor_inputs, list(callback_on_step_end_tensor_inputs)
            raise ValueError(f"callback_on_step_end_tensor_inputs: expected some of {known}, got {found}")
        device, self._interrupt = self._execution_device, False
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.reshape(-1).tolist()
        labels = torch.tensor(self.get_label_ids(class_labels), device=device)
        internal = config.internal_guidance if internal_guidance is None else internal_guidance
        velocity = guided_velocity(self.transformer, self.guide, labels, scale, interval, internal)
        points = config.num_inference_steps if num_inference_steps is None else num_inference_steps
        timesteps = self._set_times(points, config.end if end is None else end)
        latents = self._prepare_latents(len(labels), generator, latents, device)
        with self.progress_bar(total=len(timesteps)) as bar:
            for i, timestep in enumerate(timesteps):
                if self.interrupt:
                    break
                v = velocity(latents, self.scheduler.sigmas[i])
                latents = self.scheduler.step(v, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    given = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                    latents = (callback_on_step_end(self, i, timestep, given) or {}).pop("latents", latents)
                bar.update()
        images = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def interrupt(self) -> bool:
        """Whether sampling is to stop after the present step; a callback sets `pipeline._interrupt`."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Steps of the last call."""
        return self._num_timesteps

    def _set_times(self, num_steps: int, end: str) -> torch.Tensor:
        """Give the scheduler the times of `sampling_times`, bit for bit, and return its timesteps (times 1,000) of the
        steps that are to be taken. Its own choice of times is not used: it shifts the last one twice."""
        times = unshifted_times(num_steps, end)
        points = times if end == "published" else times[:-1]
        self.scheduler.set_timesteps(sigmas=points.tolist(), device="cpu")
        self.scheduler.set_begin_index(0)
        timesteps = self.scheduler.timesteps
        timesteps = timesteps[:-1] if end == "published" else timesteps  # the scheduler ends with a step to 0
        self._num_timesteps = len(timesteps)
        return timesteps

    def _prepare_latents(
        self, count: int, generator: Any, latents: Optional[torch.Tensor], device: torch.device
    ) -> torch.Tensor:
        """Noise (B, C, h, w), in float32 whatever the models are: steps are smaller than what bfloat16 resolves."""
        config = self.transformer.config
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"generator: expected one for each of the {count} images, got {len(generator)}")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents: expected shape {shape}, got {tuple(latents.shape)}")
        return latents.to(device, torch.float32)

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        # forward, not decode: offloading loads the weights before forward
        pixels = self.rae(latent=latents).sample.float().clamp(0, 1)  # (B, 3, H, W)
        if output_type == "pt":
            return pixels
        array = pixels.permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
        return self.numpy_to_pil(array) if output_type == "pil" else array

    def save_pretrained(self, save_directory: Union[str, Path], *args, include_rae: bool = True, **kwargs) -> None:
        """As in diffusers. `include_rae=False` leaves the RAE out: the folder then says that it comes from
        `config.rae_id`, and whoever loads it passes it. Raises ValueError when there is no such id."""
        if not include_rae and self.config.rae_id is None:
            raise ValueError("include_rae=False needs a place to load the RAE from: register_to_config(rae_id=...)")
        registered = self.config.rae
        self.register_to_config(rae=registered if include_rae else (None, None))
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.register_to_config(rae=registered)

    def to_json_string(self) -> str:
        """Text of model_index.json. The code's names are those of files in the folder, not of the modules that this
        process has made of them, so that a pipeline that was loaded can be saved and loaded again."""
        index = json.loads(super().to_json_string())
        index["_class_name"] = [CODE.stem, type(self).__name__]
        index.pop("_name_or_path", None)  # a path of this machine
        for name in ("transformer", "rae", "guide"):
            if index[name][0] is not None:
                part = getattr(self, name)
                kind = type(getattr(part, "_orig_mod", part))  # of what torch.compile was given
                index[name] = [kind.__module__.rpartition(".")[2], kind.__name__]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: Union[str, Path], *args, **kwargs) -> None:
        """Write model_index.json, and this file beside everything that is loaded with it: the last step of
        `save_pretrained`, and before an upload. The RAE writes its own file."""
        folder = Path(save_directory)
        for place in ("", "transformer", *(["guide"] if self.guide is not None else [])):
            (folder / place).mkdir(parents=True, exist_ok=True)
            (folder / place / CODE.name).write_text(CODE_TEXT)
        super().save_config(save_directory, *args, **kwargs)


def check_parts_fit(transformer: RAEDiTModel, rae: Any, guide: Optional[RAEDiTModel]) -> None:
    """Raise ValueError, with both values, for parts that are of different latents or classes."""
    size = {name: transformer.config[name] for name in ("in_channels", "sample_size", "num_classes")}
    if guide is not None:
        other = {name: guide.config[name] for name in size}
        if other != size:
            raise ValueError(f"guide: expected a model of the transformer's latents and classes {size}, got {other}")
    latent = (rae.config.latent_channels, rae.config.latent_size)
    if latent != (size["in_channels"], size["sample_size"]):
        raise ValueError(
            f"rae: expected latents of {size['in_channels']} channels and side {size['sample_size']}, as the "
            f"transformer's, got {latent[0]} channels and side {latent[1]}"
        )


def _check_guidance(scale: float, interval: tuple) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"guidance_scale: expected a finite number, got {scale}")
    if not (len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1):
        raise ValueError(
            f"guidance_interval: expected two times in [0, 1], the least and the greatest, got {tuple(interval)}"
        )
