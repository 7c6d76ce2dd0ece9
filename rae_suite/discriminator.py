"""The GAN's discriminator: a frozen DINO ViT with trained heads, and DiffAug.

Architecture of StyleGAN-T's (arXiv 2301.09515) and VAR's discriminator as the RAE paper uses it (arXiv 2510.11690):
features of ViT-S/8 after chosen blocks, one small convolutional head on each. Parameter names of the heads are the
published ones, so published discriminators load.
"""

from pathlib import Path
from typing import Optional

import torch
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

from modeling_rae import IMAGENET_MEAN, IMAGENET_STD, read_config
from rae_suite.files import read_tensors
from rae_suite.state_dicts import check_loading_info

# --------------------------------------------------------------------------------------------------------------------
# Frozen backbone
# --------------------------------------------------------------------------------------------------------------------

# What the published discriminator computes with, whatever a checkpoint's config.json says
BACKBONE_SETTINGS = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}


class DinoBackbone(nn.Module):
    """Frozen DINO ViT that gives its patch tokens at several depths.

    Args:
        vit: transformers ViT.
        key_depths: 0-based blocks whose output is wanted, beside the last one's, which comes first.

    Raises:
        ValueError: a depth that the network does not have.
    """

    def __init__(self, vit: ViTModel, key_depths: tuple):
        super().__init__()
        self.vit = vit.requires_grad_(False)
        blocks = [module for module in vit.modules() if type(module).__name__ == "ViTLayer"]
        bad = [depth for depth in key_depths if not 0 <= depth < len(blocks)]
        if bad:
            raise ValueError(f"gan.key_depths: block {bad[0]} does not exist, the backbone has {len(blocks)} (0-based)")
        self.blocks = blocks  # a plain list: a ModuleList would register these children of `vit` a second time
        self.key_depths = tuple(key_depths)
        # [-1, 1] to [0, 1] and ImageNet's normalisation in one multiplication and addition
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("scale", 0.5 / std, persistent=False)
        self.register_buffer("shift", (0.5 - mean) / std, persistent=False)

    def forward(self, images: torch.Tensor) -> list:
        """Images (B, 3, H, W) in [-1, 1] to 1 + len(key_depths) feature maps (B, C, N), not through the final norm."""
        size = self.vit.config.image_size
        images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
        tokens = self.vit.embeddings(images * self.scale + self.shift)
        outputs = []
        for block in self.blocks:
            tokens = block(tokens)
            outputs.append(tokens[:, 1:].transpose(1, 2))  # without CLS: (B, N, C) -> (B, C, N)
        return [outputs[-1]] + [outputs[depth] for depth in self.key_depths]


def _timm_to_transformers(state: dict) -> dict:
    """Rename a DINO state dict with timm's names to the names of transformers' ViT checkpoints."""
    renames = (
        ("pos_embed", "embeddings.position_embeddings"),
        ("cls_token", "embeddings.cls_token"),
        ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
        ("blocks.", "encoder.layer."),
        (".norm1.", ".layernorm_before."),
        (".norm2.", ".layernorm_after."),
        (".attn.proj.", ".attention.output.dense."),
        (".mlp.fc1.", ".intermediate.dense."),
        (".mlp.fc2.", ".output.dense."),
    )
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("norm."):
            name = "layernorm." + name.removeprefix("norm.")
        for old, new in renames:
            name = name.replace(old, new)
        if ".attn.qkv." in name:
            for part, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = chunk.contiguous()
        else:
            renamed[name] = tensor
    return renamed


def _load_timm_file(path: Path, num_attention_heads: Optional[int]) -> ViTModel:
    state = {name: t for name, t in read_tensors(path, "gan.backbone").items() if not name.startswith("head.")}
    for name in ("pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"):
        if name not in state:
            raise ValueError(f"gan.backbone: {path} is no DINO ViT with timm's names, it has no '{name}'")
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    grid = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    if num_attention_heads is None and width % 64:
        raise ValueError(f"gan.backbone: {path} is {width} wide, expected a multiple of 64, the width of DINO's heads")
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        num_attention_heads=num_attention_heads or width // 64,  # DINO's heads are 64 wide; the file does not say
        intermediate_size=state["blocks.0.mlp.fc1.weight"].shape[0],
        patch_size=patch,
        image_size=grid * patch,
        **BACKBONE_SETTINGS,
    )
    return _strict_vit(None, config=config, state_dict=_timm_to_transformers(state))


def _strict_vit(source: Optional[str], **kwargs) -> ViTModel:
    vit, info = ViTModel.from_pretrained(
        source, add_pooling_layer=False, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    # what a file has beside, a classifier for instance, is not used
    check_loading_info({**info, "unexpected_keys": ()}, source or "the file", "gan.backbone")
    return vit


def load_backbone(
    source: str, weights: str = "pretrained", config: Optional[dict] = None, num_attention_heads: Optional[int] = None
) -> ViTModel:
    """The discriminator's ViT, float32, without pooling layer.

    Args:
        source: Hub id or folder of a transformers ViT, or a `.pth`/`.safetensors` file with timm's names, such as the
            published dino_vit_small_patch8_224.pth (read with `weights_only=True`).
        weights: "pretrained", or "random" for an untrained ViT with the settings `config`.
        config: fields of ViTConfig, for random weights only.
        num_attention_heads: for a file with timm's names; default width / 64.

    Raises:
        ValueError: the file is something else, or weights are missing.
        OSError: the backbone cannot be had.
    """
    if weights == "random":
        return ViTModel(ViTConfig(**{**(config or {}), **BACKBONE_SETTINGS}), add_pooling_layer=False)
    if Path(source).suffix in (".pth", ".pt", ".safetensors"):
        return _load_timm_file(Path(source), num_attention_heads)
    config = read_config(source, **BACKBONE_SETTINGS)
    if config.model_type != "vit":
        raise ValueError(f"gan.backbone: {source} has model_type '{config.model_type}', expected 'vit'")
    return _strict_vit(source, config=config, dtype=torch.float32)


# --------------------------------------------------------------------------------------------------------------------
# Heads
# --------------------------------------------------------------------------------------------------------------------


class SpectralConv1d(nn.Module):
    """Conv1d, circular padding, with its weight divided by its largest singular value (arXiv 1802.05957).

    One power iteration at each training-mode forward; parameter names of torch.nn.utils.spectral_norm. Written out
    because under autocast the stock version runs the power iteration in half precision.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        conv = nn.Conv1d(in_channels, out_channels, kernel_size)  # for its initialisation
        self.bias = conv.bias
        self.weight_orig = conv.weight
        self.register_buffer("weight_u", F.normalize(torch.randn(out_channels), dim=0, eps=1e-12))
        self.register_buffer("weight_v", F.normalize(torch.randn(in_channels * kernel_size), dim=0, eps=1e-12))
        self.padding = kernel_size // 2

    def _weight(self) -> torch.Tensor:
        with torch.autocast(self.weight_orig.device.type, enabled=False):
            matrix = self.weight_orig.flatten(1)  # (out, in * kernel)
            if self.training:
                with torch.no_grad():
                    self.weight_v.copy_(F.normalize(matrix.t() @ self.weight_u, dim=0, eps=1e-12))
                    self.weight_u.copy_(F.normalize(matrix @ self.weight_v, dim=0, eps=1e-12))
            # clones: a second forward before the backward changes the buffers in place
            sigma = self.weight_u.clone() @ (matrix @ self.weight_v.clone())
            return self.weight_orig / sigma

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = self.padding
        if not torch.compiler.is_compiling():
            x = F.pad(x, (p, p), mode="circular") if p else x
            return F.conv1d(x, self._weight(), self.bias)
        # the same in the layout that tokens have, channels last, which convolutions keep in four dimensions alone
        x = x.unsqueeze(2)  # (B, C, 1, N)
        x = torch.cat([x[..., -p:], x, x[..., :p]], dim=3) if p else x
        return F.conv2d(x, self._weight().unsqueeze(2), self.bias).squeeze(2)


class PerSampleNorm(nn.Module):
    """Normalise (B, C, N) over the tokens of each sample and channel, population variance, float32; then an affine map
    per channel. The published 'bn' with a virtual batch of 1."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.weight.dtype)
        if not torch.compiler.is_compiling():
            return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)
        var, mean = torch.var_mean(x, dim=2, correction=0, keepdim=True)  # in the tokens' layout, as convolutions
        return (x - mean) * (var + self.eps).rsqrt() * self.weight[:, None] + self.bias[:, None]


class Residual(nn.Module):
    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.fn(x) + x) / 2**0.5


class DinoDiscriminator(nn.Module):
    """Frozen DINO ViT with one trained head per feature map.

    Args:
        vit: the backbone, see `load_backbone`.
        key_depths: 0-based blocks whose features are judged, beside the last one's.
        kernel_size: of the heads' residual convolution, odd.
        norm: "per_sample" or "group" (GroupNorm of 32 groups).
        norm_eps: epsilon of that norm.
        spectral_norm: whether all convolutions are spectrally normalised.

    Raises:
        ValueError: a block that does not exist, an even kernel or one that goes around more than once, a width that 32
            groups do not divide.
    """

    def __init__(
        self,
        vit: ViTModel,
        key_depths: tuple = (2, 5, 8, 11),
        kernel_size: int = 9,
        norm: str = "per_sample",
        norm_eps: float = 1e-6,
        spectral_norm: bool = True,
    ):
        super().__init__()
        width = vit.config.hidden_size
        tokens = vit.embeddings.patch_embeddings.num_patches
        if 0 < tokens < kernel_size // 2:
            raise ValueError(f"gan.kernel_size: expected at most {2 * tokens + 1}, the backbone has {tokens} tokens")
        if norm == "group" and width % 32:
            raise ValueError(f"gan.norm 'group' needs a width that is a multiple of 32, the backbone has {width}")

        def conv(out_channels: int, kernel: int) -> nn.Module:
            if spectral_norm:
                return SpectralConv1d(width, out_channels, kernel)
            return nn.Conv1d(width, out_channels, kernel, padding=kernel // 2, padding_mode="circular")

        def block(kernel: int) -> nn.Module:
            norm_layer = PerSampleNorm(width, norm_eps) if norm == "per_sample" else nn.GroupNorm(32, width, norm_eps)
            return nn.Sequential(conv(width, kernel), norm_layer, nn.LeakyReLU(0.2))

        self.backbone = DinoBackbone(vit, key_depths).eval()
        self.heads = nn.ModuleList(
            nn.Sequential(block(1), Residual(block(kernel_size)), conv(1, 1)) for _ in range(1 + len(key_depths))
        )

    def train(self, mode: bool = True) -> "DinoDiscriminator":
        """Of the heads: the backbone stays in eval mode."""
        self.training = mode
        self.heads.train(mode)
        return self

    def judge(self, *batches: list) -> list:
        """Feature maps of one or two batches, in their order, to logits (B, heads * N) each. One call for both, because
        the spectral norms' vectors change between them: two calls of a compiled function would keep the same buffers
        for one backward pass."""
        logits = []
        for features in batches:
            maps = [head(x).squeeze(1) for head, x in zip(self.heads, features, strict=True)]  # (B, N) each
            logits.append(torch.cat(maps, dim=1))  # (B, heads * N)
        return logits

    def forward(self, fake: torch.Tensor, real: Optional[torch.Tensor] = None):
        """Images (B, 3, H, W) in [-1, 1] to logits (B, heads * N); with `real` a pair (fake logits, real logits).

        The pair is one call so that a DistributedDataParallel wrapper sees one forward for one backward; the spectral
        norms still take a power iteration for each of the two, fake first, as published.
        """
        if real is None:
            return self.judge(self.backbone(fake))[0]
        with torch.no_grad():  # the images are data here: only the heads learn
            features = self.backbone(torch.cat([fake, real]))
        return tuple(self.judge([x[: len(fake)] for x in features], [x[len(fake) :] for x in features]))


# --------------------------------------------------------------------------------------------------------------------
# Differentiable augmentation
# --------------------------------------------------------------------------------------------------------------------


def _shift(images: torch.Tensor, offset: torch.Tensor, dim: int) -> torch.Tensor:
    """out[i] = images[i + offset] along `dim` (2 or 3), zeros from outside; offset (B,) in pixels."""
    size = images.shape[dim]
    source = torch.arange(size, device=images.device) + offset[:, None]  # (B, size)
    shape = (-1, 1, size, 1) if dim == 2 else (-1, 1, 1, size)
    inside = ((source >= 0) & (source < size)).view(shape)
    index = source.clamp(0, size - 1).view(shape).expand_as(images)
    return images.gather(dim, index) * inside


def diff_augment(
    images: torch.Tensor,
    uniforms: torch.Tensor,
    translate: bool = True,
    color: bool = True,
    cutout: float = 0.0,
) -> torch.Tensor:
    """DiffAug (arXiv 2006.10738) as a function of its random numbers.

    Args:
        images: (B, 3, H, W), any range.
        uniforms: (7, B, 1, 1) in [0, 1): shift rows, shift columns, brightness, saturation, contrast, cutout row,
            cutout column.
        translate, color: whether to shift by up to an eighth of the side, and to change the colours.
        cutout: side of the zeroed rectangle as a share of the image's; 0 for none.
    """
    height, width = images.shape[2:]
    if translate:
        for dim, size, u in ((2, height, uniforms[0]), (3, width, uniforms[1])):
            reach = round(size / 8)
            images = _shift(images, (u.flatten() * (2 * reach + 1)).floor().long() - reach, dim)
    if color:
        brightness, saturation, contrast = (u.view(-1, 1, 1, 1) for u in uniforms[2:5])
        images = images + (brightness - 0.5)
        grey = images.mean(dim=1, keepdim=True)
        images = (images - grey) * (2 * saturation) + grey
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        images = (images - mean) * (contrast + 0.5) + mean
    if cutout > 0:
        hit = []  # which rows, and which columns, the rectangle covers
        for size, u in ((height, uniforms[5]), (width, uniforms[6])):
            side = round(cutout * size)
            start = (u.flatten() * (size + 1 - side % 2)).floor().long() - side // 2  # (B,)
            position = torch.arange(size, device=images.device)
            hit.append((position >= start[:, None]) & (position < start[:, None] + side))  # (B, size)
        images = images * ~(hit[0][:, None, :, None] & hit[1][:, None, None, :])
    return images


class DiffAug:
    """Random `diff_augment`: translation, colour and cutout are each switched on with probability `prob`, by one coin
    flip a call. Random numbers come from `generator`, on the images' device."""

    def __init__(self, prob: float = 1.0, cutout: float = 0.0):
        self.prob, self.cutout = prob, cutout

    def __call__(self, images: torch.Tensor, generator: Optional[torch.Generator] = None) -> torch.Tensor:
        if self.prob <= 0:
            return images
        device = images.device
        uniforms = torch.rand(7, images.shape[0], 1, 1, generator=generator, device=device)
        if self.prob >= 1:
            return diff_augment(images, uniforms, cutout=self.cutout)
        # each transform is computed and, on the device, taken or not: the host does not wait for the coins
        transforms = (
            {"color": False},
            {"translate": False},
            {"translate": False, "color": False, "cutout": self.cutout},
        )
        coins = torch.rand(len(transforms), generator=generator, device=device) < self.prob
        for coin, transform in zip(coins.unbind(), transforms, strict=True):
            images = torch.where(coin, diff_augment(images, uniforms, **transform), images)
        return images
