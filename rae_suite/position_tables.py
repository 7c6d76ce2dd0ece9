"""Position tables of decoders: MAE's, diffusers', or one that was learnt."""

import math

import torch
from torch.nn import functional as F

from modeling_rae import sincos_position_table

TABLE_TOLERANCE = 1e-5  # tables that are closer are the same one: a step of training moves a table further


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.float() - b.float()).abs().max().item()


def diffusers_table(width: int, grid: int) -> torch.Tensor:
    """The table (1, 1 + grid**2, width) that AutoencoderRAE computes. It is MAE's on a 16 x 16 grid only: positions of
    other grids are scaled to that one."""
    from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder as DiffusersDecoder  # seconds

    sizes = dict(hidden_size=1, patch_size=1, decoder_num_attention_heads=1, decoder_num_hidden_layers=0)
    return DiffusersDecoder(decoder_hidden_size=width, num_patches=grid**2, **sizes).decoder_pos_embed


def table_kind(table: torch.Tensor) -> str:
    """What a table (1, 1 + h*w, D) is: "sin-cos" (MAE's), "diffusers' sin-cos", or "learnt"."""
    width, grid = table.shape[2], math.isqrt(table.shape[1] - 1)
    for kind, compute in (("sin-cos", sincos_position_table), ("diffusers' sin-cos", diffusers_table)):
        if largest_difference(table, compute(width, grid)) <= TABLE_TOLERANCE:
            return kind
    return "learnt"


def interpolated_table(table: torch.Tensor, grid: int) -> torch.Tensor:
    """A table (1, 1 + h*h, D) for a grid of `grid` x `grid` tokens, (1, 1 + grid**2, D): bicubic, as transformers' ViTs
    do for images of another size, so that a decoder sees its positions where it learnt them. CLS stays as it is."""
    side = math.isqrt(table.shape[1] - 1)
    patches = table[:, 1:].float().transpose(1, 2).unflatten(2, (side, side))  # (1, D, h, h)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)
