"""modeling_rae.py with tiny random encoders: latents, decoder, statistics, noise, and files. Seconds on a CPU."""

import ast
import copy
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import modeling_rae
from modeling_rae import RAEConfig, RAEModel, sincos_position_table, unpatchify
from rae_suite.errors import ConfigError, error_names_setting

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

PATCH, GRID, WIDTH = 4, 3, 32  # the encoders: 12 px images, 3 x 3 tokens
VISION = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, image_size=PATCH * GRID, patch_size=PATCH)
TEXT = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
DECODER = dict(
    encoder_input_size=PATCH * GRID,
    decoder_hidden_size=24,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=3,
    decoder_intermediate_size=40,
    decoder_patch_size=2,
)
KINDS = ("dinov2", "dinov2_with_registers", "siglip", "siglip_vision_model", "vit_mae")

PREFIX_TOKENS = {"dinov2": 1, "dinov2_with_registers": 4, "siglip": 0, "siglip_vision_model": 0, "vit_mae": 1}
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALF = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])


def build_encoder(kind):
    t = transformers
    if kind == "dinov2":
        return t.Dinov2Model(t.Dinov2Config(**VISION, mlp_ratio=2))
    if kind == "dinov2_with_registers":
        return t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**VISION, mlp_ratio=2, num_register_tokens=3))
    if kind == "siglip":
        vision = {**VISION, "intermediate_size": 48}
        return t.SiglipModel(t.SiglipConfig(vision_config=vision, text_config=TEXT))
    if kind == "siglip_vision_model":
        return t.SiglipVisionModel(t.SiglipVisionConfig(**VISION, intermediate_size=48))
    decoder = dict(decoder_num_attention_heads=2, decoder_hidden_size=16, decoder_num_hidden_layers=1)
    return t.ViTMAEForPreTraining(
        t.ViTMAEConfig(**VISION, intermediate_size=48, decoder_intermediate_size=16, **decoder)
    )


def randomise(module, seed):
    """Weights large enough for every part to matter, norms' affine parts and biases included."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad or parameter.ndim > 1:  # MAE's fixed position tables too
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


@pytest.fixture(scope="session")
def encoders(tmp_path_factory):
    """Folders as published encoders look: save_pretrained's files and a preprocessor config."""
    root = tmp_path_factory.mktemp("encoders")
    for i, kind in enumerate(KINDS):
        torch.manual_seed(i)
        randomise(build_encoder(kind), i).save_pretrained(root / kind)
        mean, std = HALF if kind.startswith("siglip") else IMAGENET
        processor = transformers.ViTImageProcessor(image_mean=mean, image_std=std)
        processor.save_pretrained(root / kind)
    return root


@pytest.fixture
def rae(encoders):
    return make_rae(encoders)


def make_rae(encoders, kind="dinov2_with_registers", stats=False, **changes):
    """An RAE with a random, but not freshly initialised decoder (and statistics), in eval mode."""
    model = RAEModel.from_encoder(str(encoders / kind), **{**DECODER, **changes}, use_latent_stats=stats)
    randomise(model.decoder, 7)
    if stats:
        generator = torch.Generator().manual_seed(8)
        shape = model.latent_mean.shape
        model.set_latent_stats(torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) + 0.1)
    return model.eval()


def images(count=2, size=PATCH * GRID, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def latents(model, count=2, seed=1):
    shape = (count, model.config.latent_channels, model.config.latent_size, model.config.latent_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain_tokens(folder, kind, pixels, mean, std):
    """(B, N, C): the stock transformers model's tokens before its final LayerNorm, in image order, normalised here."""
    cls = dict(siglip="SiglipModel", siglip_vision_model="SiglipVisionModel", vit_mae="ViTMAEModel")
    model = getattr(transformers, cls.get(kind, "AutoModel")).from_pretrained(folder).eval()
    model = getattr(model, "vision_model", model)
    norm = model.post_layernorm if kind.startswith("siglip") else model.layernorm
    caught = []
    norm.register_forward_pre_hook(lambda module, arguments: caught.append(arguments[0]))
    options = {} if kind.startswith("dino") else {"interpolate_pos_encoding": True}
    if kind == "vit_mae":
        model.config.mask_ratio = 0.0
    normalised = (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    with torch.no_grad():
        out = model(normalised, **options)
    tokens = caught[0][:, PREFIX_TOKENS[kind] :]
    if kind == "vit_mae":  # a random order, undone with the model's own inverse permutation
        tokens = tokens.gather(1, out.ids_restore[..., None].expand_as(tokens))
    return F.layer_norm(tokens, tokens.shape[-1:], eps=norm.eps)


def bicubic(pixels, size):
    """Bicubic resize (a = -0.75, half-pixel centres, borders repeated, no antialiasing) as a float64 matrix product."""
    old = pixels.shape[-1]

    def kernel(x, a=-0.75):
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    matrix = np.zeros((size, old))
    for i in range(size):
        centre = (i + 0.5) * old / size - 0.5
        for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[i, min(max(j, 0), old - 1)] += kernel(centre - j)
    return torch.from_numpy(matrix @ pixels.double().numpy() @ matrix.T).float()


# Encoders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [GRID, GRID + 2])
@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_the_stock_encoders_tokens(encoders, kind, grid):
    """Tokens of every family, also with an interpolated position table, are the stock model's: final LayerNorm without
    affine, prefix tokens dropped, row-major order, mean and std from the encoder's own processor."""
    model = make_rae(encoders, kind, encoder_input_size=grid * PATCH)
    mean, std = HALF if kind.startswith("siglip") else IMAGENET
    assert (model.config.image_mean, model.config.image_std) == (mean, std)
    pixels = images(size=grid * PATCH)
    latent = model.encode(pixels).latent
    assert latent.shape == (2, WIDTH, grid, grid)
    tokens = plain_tokens(encoders / kind, kind, pixels, mean, std)
    assert tokens.std(dim=1).min() > 1e-3  # tokens differ, so their order is tested
    torch.testing.assert_close(latent, tokens.transpose(1, 2).reshape(2, WIDTH, grid, grid), rtol=1e-4, atol=1e-5)
    assert (latent.mean(dim=1).abs() < 1e-5).all() and ((latent.var(dim=1, correction=0) - 1).abs() < 1e-2).all()


@pytest.mark.parametrize("size", [8, 18, 31])
def test_images_of_another_size_are_resized_bicubically(rae, size):
    """The encoder gets the not antialiased bicubic resize of the image, then mean and std."""
    seen = []
    rae.encoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    pixels = images(size=size)
    assert rae.encode(pixels).latent.shape == (2, WIDTH, GRID, GRID)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET)
    torch.testing.assert_close(seen[0] * std + mean, bicubic(pixels, PATCH * GRID), rtol=1e-4, atol=1e-5)


def test_unusable_encoders_are_named(encoders, tmp_path):
    """A processor without mean and std, an unknown family, missing files and missing weights are errors that say so."""
    folder = tmp_path / "encoder"
    transformers.AutoModel.from_pretrained(encoders / "dinov2").save_pretrained(folder)
    with pytest.raises(OSError, match="preprocessor_config.json"):
        RAEModel.from_encoder(str(folder), **DECODER)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_std": [1, 1, 1]}))
    with pytest.raises(ValueError, match="image_mean"):
        RAEModel.from_encoder(str(folder), **DECODER)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}))
    state = load_file(folder / "model.safetensors")
    lost = next(name for name in state if name.endswith("norm2.weight"))
    save_file({k: v for k, v in state.items() if k != lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=lost):
        RAEModel.from_encoder(str(folder), **DECODER)
    with pytest.raises(ValueError, match="'resnet' is not supported"):
        RAEConfig(encoder_config={"model_type": "resnet"}, **DECODER)


# Decoder --------------------------------------------------------------------------------------------------------------


def test_unpatchify_puts_every_value_in_its_place():
    """Value (row, column, channel) of token (i, j) is pixel (i*p + row, j*p + column)."""
    grid, patch = 3, 2
    patches = torch.randn(2, grid * grid, patch * patch * 3)
    pixels = unpatchify(patches, patch)
    assert pixels.shape == (2, 3, grid * patch, grid * patch)
    for y in range(grid * patch):
        for x in range(grid * patch):
            token = (y // patch) * grid + x // patch
            first = ((y % patch) * patch + x % patch) * 3
            assert torch.equal(pixels[:, :, y, x], patches[:, token, first : first + 3])


@pytest.mark.parametrize("stats", [False, True])
def test_decode_is_last_layer_times_std_plus_mean(encoders, stats):
    """The sample is the unpatchified output of the last Linear, CLS dropped, in the image's mean and std; latents are
    denormalised first. `return_last_layer` gives both sides of that Linear."""
    model = make_rae(encoders, stats=stats)
    z = latents(model)
    out = model.decode(z, return_last_layer=True)
    raw = z * (model.latent_var + 1e-5).sqrt() + model.latent_mean if stats else z
    hidden = model.decoder(raw)
    torch.testing.assert_close(out.last_hidden_state, hidden)
    weight, bias = model.decoder.decoder_pred.weight, model.decoder.decoder_pred.bias
    torch.testing.assert_close(out.patches, hidden @ weight.t() + bias)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET)
    torch.testing.assert_close(out.sample, unpatchify(out.patches[:, 1:], 2) * std + mean)
    assert torch.equal(model.decode(z).sample, out.sample) and model.decode(z).patches is None
    assert out.sample.shape == (2, 3, 6, 6)


def test_16_bit_decoders_take_float32_latents(encoders):
    """Statistics are applied, and pixels made, in float32; between them the decoder computes in 16 bits."""
    model = make_rae(encoders, stats=True)
    z = latents(model)
    expected = model.decode(z).sample
    low = model.to(torch.bfloat16)
    out = low.decode(z, return_last_layer=True)
    assert out.patches.dtype == torch.bfloat16 and out.sample.dtype == torch.float32
    raw = z * (low.latent_var + 1e-5).sqrt() + low.latent_mean
    assert torch.equal(out.last_hidden_state, low.decoder(raw.bfloat16()))
    assert torch.equal(out.sample, low.patches_to_pixels(out.patches.float()))
    assert low.decode(z.bfloat16()).sample.dtype == torch.bfloat16
    assert (out.sample - expected).norm() < 2e-2 * expected.norm()


def test_pixels_are_float32_under_autocast(rae):
    """Their mean and standard deviation are not rounded to bfloat16, and pixels above 0.5 are finer than 1/256."""
    latent = torch.randn(2, WIDTH, GRID, GRID)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = rae.decode(latent, return_last_layer=True)
    assert out.patches.dtype == torch.bfloat16 and out.sample.dtype == torch.float32
    assert torch.equal(out.sample, rae.patches_to_pixels(out.patches.float()))
    assert rae.to(torch.bfloat16).decode(latent.bfloat16()).sample.dtype == torch.bfloat16
    rae.float()


def test_new_decoder_starts_as_mae():
    """Xavier weights, zero biases, zero CLS token and the sin-cos table: column first, sines then cosines."""
    model = RAEModel(RAEConfig(encoder_config={"model_type": "dinov2", **VISION}, **DECODER))
    decoder = model.decoder
    table = decoder.decoder_pos_embed
    assert torch.equal(table.detach(), sincos_position_table(24, GRID)) and table.shape == (1, 1 + GRID**2, 24)
    assert not table[0, 0].any() and not decoder.trainable_cls_token.any()
    row, column, frequency = 2, 1, 10000 ** (-np.arange(6) / 6)
    expected = np.concatenate([f(p * frequency) for p in (column, row) for f in (np.sin, np.cos)])
    np.testing.assert_allclose(table[0, 1 + row * GRID + column].detach().numpy(), expected, atol=1e-6)
    for name, parameter in decoder.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "layernorm" in name or "norm.weight" in name:
            assert (parameter == 1).all(), name
        elif parameter.ndim == 2:
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert 0.9 * bound < parameter.abs().max() <= bound, name


def test_token_grid_of_another_size_is_resized_bilinearly(encoders):
    """A larger or smaller grid is resized after the first Linear, which commutes with it, where that is asked for; with
    statistics, which are per position, it is an error that has both."""
    model = make_rae(encoders, encoder_input_size=16)  # 4 x 4 tokens
    with pytest.raises(ValueError, match=r"grid \(8, 8\) differs from the model's, \(4, 4\); other_grid='keep'"):
        model.decode(torch.randn(2, WIDTH, 8, 8))
    resized = partial(model.decode, other_grid="resize")
    large = torch.randn(2, WIDTH, 8, 8)
    torch.testing.assert_close(resized(large).sample, model.decode(F.avg_pool2d(large, 2)).sample, rtol=1e-4, atol=1e-4)
    small = torch.randn(2, WIDTH, 2, 2)
    weights = torch.tensor([[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]])
    expected = model.decode(weights @ small @ weights.t()).sample
    torch.testing.assert_close(resized(small).sample, expected, rtol=1e-4, atol=1e-4)
    assert resized(torch.randn(1, WIDTH, 2, 5)).sample.shape == (1, 3, 8, 8)
    with_stats = make_rae(encoders, stats=True)
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(3, 3\)"):
        with_stats.decode(small, other_grid="resize")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stats", [False, True])
def test_rectangles(encoders, kind, stats, monkeypatch):
    """Each patch becomes a token and a patch again; a square is computed as ever."""
    model = make_rae(encoders, kind, stats=stats)
    patch, grid = model.config.decoder_patch_size, model.config.latent_size
    tall = torch.rand(2, 3, (grid + 2) * patch, grid * patch)
    latent = model.encode(tall).latent
    assert latent.shape == (2, WIDTH, grid + 2, grid)
    sample = model.decode(latent, other_grid="keep").sample
    assert sample.shape == tall.shape and torch.equal(model(tall).sample, sample)
    with pytest.raises(ValueError, match=r"differs from the model's"):
        model.decode(latent)
    with pytest.raises(ValueError, match=f"sides that {patch} divides, got {grid * patch} x {grid * patch + 1} pixels"):
        model.encode(torch.rand(1, 3, grid * patch, grid * patch + 1))
    square = model.encode(tall[:, :, : grid * patch]).latent
    assert torch.equal(model.decode(square, other_grid="keep").sample, model.decode(square).sample)
    monkeypatch.setattr(RAEModel, "takes_rectangles", False)
    with pytest.raises(ValueError, match=r"must be \(B, 3, S, S\) for this encoder, got"):
        model.encode(tall)


def test_a_rectangle_is_decoded_at_its_places(encoders):
    """What a token stands for stays at its place: an image that is wide is not a square one stretched."""
    model = make_rae(encoders)
    model.decoder.decoder_layers = torch.nn.ModuleList()  # whose attention mixes all places
    patch, grid = model.config.decoder_patch_size, model.config.latent_size
    latent = torch.randn(1, WIDTH, grid, 2 * grid)
    other = latent.clone()
    other[..., 1, -1] += 10
    change = (model.decode(latent, other_grid="keep").sample - model.decode(other, other_grid="keep").sample).abs()
    places = F.max_pool2d(change.amax(1, keepdim=True), patch)[0, 0]  # (h, w)
    assert places.argmax() == 1 * 2 * grid + 2 * grid - 1
    table = model.decoder._positions((grid, 2 * grid))
    along = table[0, 1:].unflatten(0, (grid, 2 * grid))
    torch.testing.assert_close(along.unflatten(1, (grid, 2)).mean(2)[:, 1:-1],
                               model.decoder.decoder_pos_embed[0, 1:].unflatten(0, (grid, grid))[:, 1:-1],
                               atol=0.2, rtol=0)  # fmt: skip


def test_wrong_inputs_are_refused_with_their_shapes(rae):
    """Wrong channels, pixels that are not (B, 3, S, S), and anything but exactly one input."""
    with pytest.raises(ValueError, match=rf"{WIDTH}.*\(2, 5, 3, 3\)"):
        rae.decode(torch.zeros(2, 5, 3, 3))
    with pytest.raises(ValueError, match=rf"{WIDTH}.*\(2, 9, {WIDTH}\)"):
        rae.decode(torch.zeros(2, 9, WIDTH))
    for shape in [(3, 12, 12), (2, 1, 12, 12)]:
        with pytest.raises(ValueError, match=str(shape).replace("(", r"\(").replace(")", r"\)")):
            rae.encode(torch.zeros(shape))
    for inputs in ({}, {"pixel_values": images(), "latent": latents(rae)}):
        with pytest.raises(ValueError, match="exactly one"):
            rae(**inputs)


@pytest.mark.parametrize(
    "changes, numbers",
    [
        ({"encoder_input_size": 14}, (4, 14)),
        ({"decoder_num_attention_heads": 5}, (5, 24)),
        ({"decoder_hidden_size": 6}, (4, 6)),
        ({"decoder_patch_size": 0}, (0,)),
    ],
)
def test_sizes_that_do_not_fit_are_errors_with_both_numbers(changes, numbers):
    """RAEConfig refuses sizes that do not divide before anything is built."""
    with pytest.raises(ValueError) as caught:
        RAEConfig(encoder_config={"model_type": "dinov2", **VISION}, **{**DECODER, **changes})
    assert all(str(number) in str(caught.value) for number in numbers), caught.value


def test_forward_composes_encode_and_decode(encoders):
    """`rae(pixels)`, `rae(latent=...)` and encode followed by decode are the same function."""
    model = make_rae(encoders, stats=True)
    z = model.encode(images()).latent
    assert torch.equal(model(images()).sample, model.decode(z).sample)
    assert torch.equal(model(latent=z).sample, model.decode(z).sample)
    with_last = model(images(), return_last_layer=True)
    assert torch.equal(model.decoder.decoder_pred(with_last.last_hidden_state), with_last.patches)


def test_config_answers_what_diffusion_code_asks():
    """latent_channels, latent_size, image_size and scaling_factor, for square and tuple patch sizes."""
    encoder = {"model_type": "dinov2", **VISION}
    config = RAEConfig(encoder_config=encoder, **{**DECODER, "encoder_input_size": 20, "decoder_patch_size": 6})
    assert (config.latent_channels, config.latent_size, config.image_size) == (WIDTH, 5, 30)
    assert config.scaling_factor == 1.0 and RAEConfig(scaling_factor=0.5).scaling_factor == 0.5
    model = RAEModel(config)
    assert model.encode(images(size=20)).latent.shape[1:] == (WIDTH, 5, 5)
    assert model(images(size=20)).sample.shape[-1] == 30


# Statistics -----------------------------------------------------------------------------------------------------------


def test_latents_are_normalised_with_the_statistics(encoders):
    """encode gives (z - mean) / sqrt(var + 1e-5), decode inverts it; shapes that do not broadcast and a model without
    statistics are errors."""
    plain, model = make_rae(encoders), make_rae(encoders, stats=True)
    model.latent_var[0] = 0.0  # here the epsilon is what counts
    z = plain.encode(images()).latent
    expected = (z.double() - model.latent_mean.double()) / (model.latent_var.double() + 1e-5).sqrt()
    torch.testing.assert_close(model.encode(images()).latent.double(), expected, rtol=1e-5, atol=1e-5)
    seen = []
    model.decoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    model(images())
    torch.testing.assert_close(seen[0], z, rtol=1e-5, atol=1e-5)

    shape = model.latent_mean.shape
    good, bad = torch.ones(shape), torch.ones(WIDTH, 2, 1)
    for mean, var, name in ((bad, good, "mean"), (good, bad, "var")):
        with pytest.raises(ValueError, match=rf"latent {name} has shape \({WIDTH}, 2, 1\).*\({WIDTH}, 3, 3\)"):
            model.set_latent_stats(mean, var)
    assert not (model.latent_mean == 1).all()  # a refused call changes nothing
    with pytest.raises(ValueError, match="use_latent_stats"):
        plain.set_latent_stats(good, good)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_without_a_mean(encoders, tmp_path, dtype):
    """Nothing is subtracted, noise is divided by the same deviation, and files and precisions are as with a mean."""
    model = make_rae(encoders, stats=True, noise_tau=0.5)
    var = model.latent_var.clone()
    with_zeros = copy.deepcopy(model)
    with_zeros.set_latent_stats(torch.zeros_like(var), var)
    model.set_latent_stats(None, var)
    models = [m.to(dtype) for m in (model, with_zeros)]
    model.save_pretrained(tmp_path)
    assert "latent_mean" not in load_file(tmp_path / "model.safetensors")
    models.append(RAEModel.from_pretrained(tmp_path, dtype=dtype))
    assert "latent_mean" not in models[-1].state_dict() and torch.equal(models[-1].latent_var, var)
    generators = [torch.Generator().manual_seed(3) for _ in models]
    pixels = images().to(dtype)
    found = [m.encode(pixels, g, add_noise=True).latent for m, g in zip(models, generators, strict=True)]
    samples = [m.decode(found[0]).sample for m in models]
    for values in (found, samples):
        assert all(torch.equal(value, values[0]) for value in values)
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(3, 3\)"):
        model.decode(torch.zeros(1, WIDTH, 2, 2, dtype=dtype))


# Noise and training mode ----------------------------------------------------------------------------------------------


def test_noise_is_for_training_and_reproducible(encoders):
    """encode adds noise in training mode only (or as told), the same for the same generator; tau 0 adds none."""
    model = make_rae(encoders, noise_tau=0.8)
    clean = model.encode(images()).latent
    assert torch.equal(model.encode(images()).latent, clean)
    assert not torch.equal(model.encode(images(), add_noise=True).latent, clean)
    model.train()
    assert torch.equal(model.encode(images(), add_noise=False).latent, clean)

    def noisy(seed):
        return model.encode(images(), generator=torch.Generator().manual_seed(seed)).latent

    assert torch.equal(noisy(1), noisy(1)) and not torch.equal(noisy(1), noisy(2))
    assert not torch.equal(model(images()).sample, model(images()).sample)
    silent = make_rae(encoders, noise_tau=0.0).train()
    assert torch.equal(silent.encode(images()).latent, clean)


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("distribution", ["uniform", "half_normal"])
def test_noise_strength(encoders, stats, distribution):
    """sigma = tau * U[0, 1] per sample, or |N(0, tau^2)|, in units of the tokens: with statistics the noise is divided
    by their std."""
    tau = 0.6
    model = make_rae(encoders, stats=stats, noise_tau=tau, noise_distribution=distribution)
    zero = torch.zeros(400, WIDTH, GRID, GRID)
    noise = model.add_noise(zero, torch.Generator().manual_seed(0))
    if stats:
        noise = noise * (model.latent_var + 1e-5).sqrt()
    sigma = noise.flatten(1).std(dim=1).sort().values  # 288 values each: about 4 % accurate
    quantiles = (torch.arange(400) + 0.5) / 400
    if distribution == "uniform":
        expected = tau * quantiles
        assert sigma[-1] < tau * 1.15
    else:
        expected = tau * 2**0.5 * torch.erfinv(quantiles)
        assert sigma[-1] > tau * 2
    assert (sigma - expected)[:-40].abs().max() < 0.15 * tau and abs(sigma.mean() - expected.mean()) < 0.05 * tau
    shape = noise / noise.flatten(1).std(dim=1).view(-1, 1, 1, 1)
    assert shape.mean().abs() < 0.02 and abs((shape**4).mean() - 3) < 0.15  # normal


def test_default_noise_has_the_bits_it_always_had(encoders):
    """Uniform, drawn before the noise: recorded numbers of the published code depend on it."""
    model, zero = make_rae(encoders, noise_tau=0.6), torch.zeros(3, WIDTH, GRID, GRID)
    generator = torch.Generator().manual_seed(0)
    sigma = 0.6 * torch.rand(3, 1, 1, 1, generator=generator)
    expected = sigma * torch.randn(zero.shape, generator=generator)
    assert torch.equal(model.add_noise(zero, torch.Generator().manual_seed(0)), expected)


@pytest.mark.parametrize("train_table", [False, True])
@pytest.mark.parametrize("source", ["new", "loaded", "loaded without encoder"])
def test_only_the_decoder_learns(encoders, tmp_path, source, train_table):
    """A new or loaded model's encoder is frozen and stays in eval mode under .train(); the decoder learns, its position
    table only when asked to."""
    model = make_rae(encoders, train_position_embedding=train_table)
    if source != "new":
        model.save_pretrained(tmp_path, include_encoder=source == "loaded")
        model = RAEModel.from_pretrained(tmp_path)
        assert not model.training
    model.train()
    assert model.training and model.decoder.training
    assert not any(module.training for module in model.encoder.modules())
    decoder = {f"decoder.{name}" for name, _ in model.decoder.named_parameters()}
    expected = decoder if train_table else decoder - {"decoder.decoder_pos_embed"}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected
    model(images()).sample.square().mean().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == expected


# Execution modes ------------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_nothing_but_memory(rae):
    """Same loss and gradients, and every block runs twice."""
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            rae.gradient_checkpointing_enable()
        rae.train().zero_grad()
        calls = []
        hook = rae.decoder.decoder_layers[0].intermediate.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        loss = rae(images()).sample.square().mean()
        loss.backward()
        hook.remove()
        gradients = {name: p.grad.clone() for name, p in rae.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients, len(calls)))
    (loss, gradients, once), (other_loss, other_gradients, twice) = results
    assert (once, twice) == (1, 2) and torch.equal(loss, other_loss) and gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-6, atol=1e-7, msg=name)


def test_sdpa_equals_eager(encoders, tmp_path):
    """attn_implementation reaches encoder and decoder and does not change the result."""
    make_rae(encoders).save_pretrained(tmp_path)
    samples = {}
    for implementation in ("sdpa", "eager"):
        model = RAEModel.from_pretrained(tmp_path, attn_implementation=implementation)
        assert model.config._attn_implementation == model.encoder.config._attn_implementation == implementation
        assert model.decoder.decoder_layers[0].attention.attention.config._attn_implementation == implementation
        samples[implementation] = model(images()).sample
    assert RAEModel.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    torch.testing.assert_close(samples["sdpa"], samples["eager"], rtol=1e-5, atol=1e-5)


def test_only_torch_and_transformers_are_imported():
    """modeling_rae.py travels alone: torch, transformers, its safetensors, and the standard library."""
    tree = ast.parse(Path(modeling_rae.__file__).read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import would need a second file"
            imported.add(node.module.split(".")[0])
    assert {"torch", "transformers"} <= imported <= {"torch", "transformers", "safetensors", *sys.stdlib_module_names}


STATISTICS = ("latent_mean", "latent_var")


def dtypes(model: RAEModel) -> set:
    """Types of all tensors but the statistics, which are float32."""
    state = model.state_dict()
    assert all(state.pop(name).dtype == torch.float32 for name in STATISTICS if name in state)
    return {tensor.dtype for tensor in state.values()}


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_bit_exact(encoders, tmp_path, kind, dtype):
    """save_pretrained and from_pretrained keep every tensor, statistics included, and every output; bf16 computes in
    bf16, but statistics stay in float32; config.json holds neither weights nor statistics; the code goes along."""
    model = make_rae(encoders, kind, stats=True)
    statistics = {name: model.state_dict()[name].clone() for name in STATISTICS}
    model = model.to(dtype)
    model.save_pretrained(tmp_path)
    loaded = RAEModel.from_pretrained(tmp_path, dtype=dtype)
    state, other = model.state_dict(), loaded.state_dict()
    assert state.keys() == other.keys() and "latent_mean" in state
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())
    assert dtypes(loaded) == {dtype} and all(torch.equal(state[name], statistics[name]) for name in STATISTICS)
    pixels = images().to(dtype)
    out, z = model(pixels).sample, model.encode(pixels).latent
    assert out.dtype == z.dtype == dtype and out.isfinite().all()
    assert torch.equal(loaded(pixels).sample, out) and torch.equal(loaded.encode(pixels).latent, z)

    text = (tmp_path / "config.json").read_text()
    config = json.loads(text)
    assert len(text) < 5000 and "latent_mean" not in text and "latent_var" not in text
    assert config["model_type"] == "rae" and config["auto_map"]["AutoModel"] == "modeling_rae.RAEModel"
    assert (tmp_path / "modeling_rae.py").read_text() == Path(modeling_rae.__file__).read_text()
    assert not any("head" in name or "text_model" in name for name in state)  # only what the RAE uses is saved


@pytest.mark.parametrize("kind", ["dinov2_with_registers", "siglip", "vit_mae"])
def test_encoder_can_stay_out_of_the_file(encoders, tmp_path, kind):
    """include_encoder=False writes decoder and statistics; loading fetches the encoder from its recorded folder, also
    in another dtype; the loaded model can be bundled again; without an id, or with a lost folder, it is an error."""
    model = make_rae(encoders, kind, stats=True)
    model.save_pretrained(tmp_path / "slim", include_encoder=False)
    saved = load_file(tmp_path / "slim" / "model.safetensors")
    assert saved.keys() == {name for name in model.state_dict() if not name.startswith("encoder.")}
    assert model.config.encoder_bundled  # the model itself has not changed
    loaded = RAEModel.from_pretrained(tmp_path / "slim")
    assert torch.equal(loaded(images()).sample, model(images()).sample)
    half = RAEModel.from_pretrained(tmp_path / "slim", dtype=torch.bfloat16)
    assert dtypes(half) == {torch.bfloat16}
    loaded.save_pretrained(tmp_path / "whole")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    config["encoder_id"] = None
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config))
    whole = RAEModel.from_pretrained(tmp_path / "whole")
    assert torch.equal(whole(images()).sample, model(images()).sample)
    with pytest.raises(ValueError, match="encoder_id"):
        whole.save_pretrained(tmp_path / "none", include_encoder=False)
    assert not (tmp_path / "none").exists()

    config = json.loads((tmp_path / "slim" / "config.json").read_text())
    config["encoder_id"] = str(tmp_path / "lost")
    (tmp_path / "slim" / "config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match="lost"):
        RAEModel.from_pretrained(tmp_path / "slim")


@pytest.mark.parametrize(
    "lost, bundled",
    [
        ("decoder.decoder_norm.weight", True),
        ("decoder.decoder_norm.weight", False),
        ("latent_var", True),
        ("latent_var", False),
        ("encoder.encoder.layer.1.norm2.bias", True),
        ("new", True),
        ("new", False),
    ],
)
def test_missing_and_unexpected_keys_are_named(encoders, tmp_path, lost, bundled):
    """Loading is strict, with and without the encoder in the file."""
    model = make_rae(encoders, stats=True)
    model.save_pretrained(tmp_path, include_encoder=bundled)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    if lost == "new":
        lost, kind = "decoder.surplus.weight", "unexpected"
        state[lost] = torch.zeros(2)
    else:
        kind = "missing"
        del state[lost]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"1 {kind} keys.*'{lost}'"):
        RAEModel.from_pretrained(tmp_path)


OTHER_PROCESS = """
import importlib.util, sys
import torch
from safetensors.torch import load_file, save_file
if sys.argv[1] == "repo":
    from modeling_rae import RAEModel as loader
    options = {}
else:
    assert all(importlib.util.find_spec(name) is None for name in ("modeling_rae", "train_rae", "config"))
    from transformers import AutoModel as loader
    options = {"trust_remote_code": True}
torch.set_num_threads(int(sys.argv[2]))
out = {}
for name in ("float32", "bfloat16", "slim"):
    dtype = getattr(torch, name, torch.float32)
    rae = loader.from_pretrained(name, dtype=dtype, **options)
    assert type(rae).__name__ == "RAEModel" and not rae.training
    pixels = load_file("pixels.safetensors")["pixels"].to(dtype)
    with torch.no_grad():
        z = rae.encode(pixels).latent
        out[f"{name}.latent"], out[f"{name}.sample"] = z.contiguous(), rae.decode(z).sample
        assert torch.equal(rae(pixels).sample, out[f"{name}.sample"])
    out.update({f"{name}.state.{key}": tensor for key, tensor in rae.state_dict().items()})
save_file(out, "out.safetensors")
"""


def test_other_processes_compute_the_same(encoders, tmp_path):
    """A folder gives bit-equal weights and outputs in a process of this repo, and through AutoModel in one that has
    transformers alone: fp32, bf16, and with the encoder elsewhere."""
    folders = {}
    model = make_rae(encoders, stats=True)
    expected = {}
    with torch.no_grad():
        for name, dtype, bundled in (
            ("float32", torch.float32, True),
            ("slim", torch.float32, False),
            ("bfloat16", torch.bfloat16, True),
        ):
            model = model.to(dtype)
            for source in ("repo", "hub"):
                folders[source] = tmp_path / source
                model.save_pretrained(tmp_path / source / name, include_encoder=bundled)
            expected[f"{name}.latent"] = model.encode(images(size=20).to(dtype)).latent
            expected[f"{name}.sample"] = model(images(size=20).to(dtype)).sample
            expected |= {f"{name}.state.{key}": tensor.clone() for key, tensor in model.state_dict().items()}
    repo = Path(modeling_rae.__file__).parent
    processes = {}
    for source, folder in folders.items():
        save_file({"pixels": images(size=20)}, folder / "pixels.safetensors")
        home = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "home" / "modules")}
        environment = {**os.environ, **home, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(repo) if source == "repo" else ""}
        processes[source] = subprocess.Popen(
            [sys.executable, "-c", OTHER_PROCESS, source, str(torch.get_num_threads())],
            cwd=folder,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
    for source, process in processes.items():
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        found = load_file(folders[source] / "out.safetensors")
        assert found.keys() == expected.keys()
        different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
        assert not different, (source, different)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_loading_arguments_of_transformers(encoders, tmp_path, device_map):
    """device_map, dtype and attn_implementation behave as in transformers."""
    model = make_rae(encoders)
    model.save_pretrained(tmp_path)
    mapped = RAEModel.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(mapped(images()).sample, model.eval()(images()).sample)
    assert {"RAEDecoderLayer", "Dinov2WithRegistersLayer"} <= set(mapped._no_split_modules)
    eager = RAEModel.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.bfloat16)
    assert {eager.config._attn_implementation, eager.encoder.config._attn_implementation} == {"eager"}
    assert {p.dtype for p in eager.parameters()} == {torch.bfloat16}


def test_training_after_inference_mode(encoders):
    """What an evaluation under inference_mode leaves behind can be used with gradients."""
    model = make_rae(encoders)
    with torch.inference_mode():
        model(images())
    model(images()).sample.sum().backward()
    assert all(p.grad is not None for p in model.decoder.parameters() if p.requires_grad)


def test_encoder_weights_that_do_not_fit(encoders, tmp_path):
    """An encoder folder whose config and weights differ is an error that names the weight and both shapes."""
    folder = shutil.copytree(encoders / "dinov2", tmp_path / "encoder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mlp_ratio": config["mlp_ratio"] + 1}))
    with pytest.raises(ValueError, match="'encoder.layer.0.mlp.fc1.bias' has shape"):
        RAEModel.from_encoder(str(folder), **DECODER)


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_published_in_bfloat16(encoders, tmp_path, kind):
    """One dtype everywhere: float32 for a new model, later what loading asks for. A bf16 model takes fp32 pixels."""
    folder = shutil.copytree(encoders / kind, tmp_path / "encoder")
    transformers.AutoModel.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    model = make_rae(tmp_path, "encoder", stats=True)
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}
    for bundled in (True, False):
        model.save_pretrained(tmp_path / "rae", include_encoder=bundled)
        loaded = RAEModel.from_pretrained(tmp_path / "rae")
        assert {t.dtype for t in loaded.state_dict().values()} == {torch.float32}
        assert torch.equal(loaded(images()).sample, model(images()).sample)
        half = RAEModel.from_pretrained(tmp_path / "rae", dtype=torch.bfloat16)
        assert dtypes(half) == {torch.bfloat16}
        latent = half.encode(images()).latent
        assert latent.dtype == torch.bfloat16
        torch.testing.assert_close(latent.float(), model.encode(images()).latent, rtol=0.2, atol=0.2)


def test_threads_do_not_mix_their_latents(encoders):
    """Each gets the latents of its own images where several blocks make them."""
    model = make_rae(encoders, encoder_layers=[0, 1])
    batches = [images(seed=seed) for seed in range(4)]
    expected = [model.encode(pixels).latent for pixels in batches]
    blocks = [m for m in model.encoder.modules() if type(m).__name__ == "Dinov2WithRegistersLayer"]
    blocks[1].register_forward_hook(lambda *_: time.sleep(0.02))  # the other threads run now
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda pixels: model.encode(pixels).latent, batches))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_statistics_follow_the_latents_device(encoders):
    """As where a device map has put encoder and decoder on another device than the statistics."""
    model = make_rae(encoders, stats=True, noise_tau=0.5)
    model.encoder.to("meta")
    model.decoder.to("meta")
    assert model.latent_mean.device.type == "cpu"
    latent = model.encode(images().to("meta"), add_noise=True).latent
    assert latent.device.type == model.decode(latent).sample.device.type == "meta"


def test_hub_arguments_reach_the_encoder(encoders, tmp_path, monkeypatch):
    """Loading without the encoder in the file asks for it as the caller asked for the model."""
    make_rae(encoders).save_pretrained(tmp_path / "slim", include_encoder=False)
    seen = []
    for name in ("AutoConfig", "AutoModel"):
        real = getattr(modeling_rae, name).from_pretrained

        def spy(*args, real=real, **options):
            seen.append(options)
            return real(*args, **options)

        monkeypatch.setattr(getattr(modeling_rae, name), "from_pretrained", spy)
    hub = {"token": "secret", "cache_dir": str(tmp_path / "cache"), "local_files_only": True, "force_download": False}
    RAEModel.from_pretrained(tmp_path / "slim", **hub)
    assert len(seen) == 2
    for options in seen:
        assert hub.items() <= options.items() and options["trust_remote_code"] is False


@pytest.mark.parametrize("name", ["model.safetensors", "model-00002-of-*.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("part", ["rae", "encoder"])
def test_a_damaged_file_is_named(encoders, tmp_path, part, name):
    """A truncated weights file, shard or index, of the model itself or of its encoder elsewhere."""
    folder, shards = tmp_path / part, {} if name == "model.safetensors" else {"max_shard_size": "30KB"}
    transformers.AutoModel.from_pretrained(encoders / "dinov2").save_pretrained(tmp_path / "encoder", **shards)
    shutil.copy(encoders / "dinov2" / "preprocessor_config.json", tmp_path / "encoder")
    make_rae(tmp_path, "encoder").save_pretrained(tmp_path / "rae", include_encoder=part == "rae", **shards)
    (file,) = folder.glob(name)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match=f"{file} is damaged or incomplete: "):
        RAEModel.from_pretrained(tmp_path / "rae")
    if part == "encoder":
        named = error_names_setting("model.encoder", str(folder))
        with pytest.raises(ConfigError, match=f"model.encoder: {file} is damaged"), named:
            RAEModel.from_encoder(str(folder), **DECODER)


def test_blame_takes_the_error_of_a_damaged_file(tmp_path):
    """Also where another model's weights are loaded."""
    (tmp_path / "weights.safetensors").write_bytes(b"short")
    with pytest.raises(ConfigError, match="gan.backbone: "), error_names_setting("gan.backbone", str(tmp_path)):
        load_file(tmp_path / "weights.safetensors")


def test_a_folder_of_another_model(encoders, tmp_path):
    """Is refused by its model_type; RAE configs still go through every way of transformers."""
    for loader in (RAEConfig, RAEModel):
        with pytest.raises(ValueError, match="expected a config of model_type rae, got dinov2$"):
            loader.from_pretrained(encoders / "dinov2")
    config = make_rae(encoders).config
    config.save_pretrained(tmp_path)
    for found in (RAEConfig.from_pretrained(tmp_path), RAEConfig.from_dict(config.to_dict())):
        assert found.to_diff_dict() == config.to_diff_dict()
    assert RAEConfig.from_dict(RAEConfig().to_dict()).to_dict() == RAEConfig().to_dict()
    auto = transformers.AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(auto).__name__ == "RAEConfig" and auto.latent_channels == WIDTH


def test_an_encoder_that_cannot_be_had(encoders, tmp_path, monkeypatch):
    """The error says that it is the encoder, and what to do; one that is code of its own is not run or asked about."""
    model = make_rae(encoders)
    model.config.encoder_id = "someone/encoder"
    with pytest.raises(OSError, match="the encoder someone/encoder cannot be had .*; set encoder_id in config.json"):
        model.load_encoder()

    def gated(*args, **options):
        raise OSError("You are trying to access a gated repo.\nMore.")

    monkeypatch.setattr(modeling_rae, "read_config", gated)
    with pytest.raises(
        OSError, match=r"\(You are .* gated repo.\); ask for access on its page and run `hf auth login`, or"
    ):
        model.load_encoder()
    monkeypatch.undo()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        RAEModel.from_encoder(str(tmp_path), **DECODER)


def test_an_offloaded_encoder_cannot_be_fetched(encoders):
    """Its weights have no place to be copied to."""
    model = make_rae(encoders)
    model.encoder.to("meta")
    with pytest.raises(ValueError, match="the encoder .*dinov2_with_registers have no place .* meta"):
        model.load_encoder()
