"""Encoder families of modeling_rae.py, latents from several blocks, and their presets: tiny random encoders against the
stock transformers models, then the published architectures at full size. About a minute on a CPU."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import PLAIN, ROOT, flags, run_command
from safetensors.torch import load_file, save_file
from test_modeling import DECODER, GRID, KINDS, PATCH, TEXT, VISION, WIDTH, images, randomise
from torch import nn
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from modeling_rae import ENCODER_FAMILIES, RAEConfig, RAEModel, unpatchify
from rae_suite.errors import ConfigError
from rae_suite.rae_networks import build_rae_config
from rae_suite.settings_rae import parse_config

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


BLOCKS = 4
TINY_VIT = {**VISION, "num_hidden_layers": BLOCKS, "intermediate_size": 48}
# model_type: architecture, prefix tokens, and whether last_hidden_state has been through the final norm
FAMILIES = {
    "dinov2": ({"mlp_ratio": 2}, 1, True),
    "dinov2_with_registers": ({"mlp_ratio": 2, "num_register_tokens": 3}, 4, True),
    "dinov3_vit": ({"num_register_tokens": 3}, 4, True),
    "clip_vision_model": ({}, 1, False),
    "ijepa": ({}, 0, True),
    "siglip_vision_model": ({}, 0, True),
    "vit": ({}, 1, True),
    "vit_mae": ({"mask_ratio": 0.0}, 1, True),
    "deit": ({}, 2, True),
}
OTHER = {"deit": {"encoder_prefix_tokens": 2, "encoder_final_norm": "layernorm"}}  # not in the registry
# as published checkpoints come: the class that was saved, and the vision architecture in it
SOURCES = {
    "dinov3_vit": ("DINOv3ViTModel", "dinov3_vit"),
    "clip": ("CLIPModel", "clip_vision_model"),
    "clip_vision_model": ("CLIPVisionModel", "clip_vision_model"),
    "ijepa": ("IJepaModel", "ijepa"),
    "vit": ("ViTModel", "vit"),
    "vit_classifier": ("ViTForImageClassification", "vit"),
    "deit": ("DeiTForImageClassificationWithTeacher", "deit"),
}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


def vit_config(model_type):
    return transformers.AutoConfig.for_model(model_type, **TINY_VIT, **FAMILIES[model_type][0])


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders that save_pretrained of the stock classes wrote, as on the Hub, with a processor of unusual mean and
    std."""
    root = tmp_path_factory.mktemp("encoders")
    for i, (source, (name, model_type)) in enumerate(SOURCES.items()):
        config = vit_config(model_type)
        if source == "clip":
            config = transformers.CLIPConfig(vision_config=config.to_dict(), text_config=TEXT)
        torch.manual_seed(i)
        randomise(getattr(transformers, name)(config), i).save_pretrained(root / source)
        transformers.CLIPImageProcessor(image_mean=MEAN, image_std=STD).save_pretrained(root / source)
    return root


def from_folder(encoders, source, **changes):
    settings = {**DECODER, **OTHER.get(SOURCES[source][1], {}), **changes}
    return RAEModel.from_encoder(str(encoders / source), **settings).eval()


def from_architecture(model_type, scale=0.3, **changes):
    """An RAE with random weights, norms' affine parts included."""
    config = RAEConfig(encoder_config=vit_config(model_type), **{**DECODER, **OTHER.get(model_type, {}), **changes})
    torch.manual_seed(0)
    model = RAEModel(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.encoder.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def tokens_of(latent):
    return latent.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, N, C)


def stock_blocks(model, model_type, normalised):
    """Every block's output (B, prefix + N, C) from output_hidden_states of a stock model, and its last_hidden_state."""
    options = {} if model_type.startswith("dino") else {"interpolate_pos_encoding": True}
    if model_type == "vit_mae":
        options["noise"] = torch.arange(normalised.shape[-1] ** 2 // PATCH**2).float().expand(len(normalised), -1)
    with torch.no_grad():
        out = model(normalised, output_hidden_states=True, **options)
    assert len(out.hidden_states) == BLOCKS + 1
    return out.hidden_states[1:], out.last_hidden_state


# Families -------------------------------------------------------------------------------------------------------------


def test_every_family_is_tested():
    """A new registry entry needs an encoder here, and in test_modeling.py or SOURCES one that is read from files."""
    elsewhere = {"aimv2_vision_model"}  # whose norms are RMSNorms: test_encoder_probe.py
    assert ENCODER_FAMILIES.keys() == FAMILIES.keys() - OTHER.keys() | elsewhere
    files = {{"siglip": "siglip_vision_model"}.get(kind, kind) for kind in KINDS}
    assert files | {model_type for _, model_type in SOURCES.values()} == FAMILIES.keys()


@pytest.mark.parametrize("grid", [GRID, GRID + 2])
@pytest.mark.parametrize("source", SOURCES)
def test_latents_are_the_stock_encoders_tokens(encoders, source, grid):
    """From a published folder, heads and text model beside: the stock model's patch tokens, prefix dropped, after the
    final norm without its affine part; at another size with an interpolated position table."""
    model = from_folder(encoders, source, encoder_input_size=grid * PATCH)
    assert (model.config.image_mean, model.config.image_std) == (MEAN, STD)
    pixels = images(size=grid * PATCH)
    latent = model.encode(pixels).latent
    assert latent.shape == (2, WIDTH, grid, grid)
    found = tokens_of(latent)

    model_type = SOURCES[source][1]
    stock = transformers.AutoModel.from_pretrained(encoders / source, config=vit_config(model_type)).eval()
    prefix, in_forward = FAMILIES[model_type][1:]
    normalised = (pixels - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    blocks, last = stock_blocks(stock, model_type, normalised)
    expected = F.layer_norm(blocks[-1][:, prefix:], (WIDTH,), eps=model.encoder_norm.eps)
    assert expected.std(dim=1).min() > 1e-2  # tokens differ, so their order is tested
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if in_forward:
        norm = getattr(stock, "norm", None) or stock.layernorm
        torch.testing.assert_close(found * norm.weight + norm.bias, last[:, prefix:], rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(blocks[-1], last)  # CLIP's final norm sees only the pooled token


@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_patch_is_one_token(model_type):
    """A change of one input patch changes the token at its place most, for all places of a grid that is not the
    pretraining one."""
    grid = GRID + 1
    model = from_architecture(model_type, scale=0.05, encoder_input_size=grid * PATCH)
    pixels = images(1, size=grid * PATCH)
    before = model.encode(pixels).latent
    for row in range(grid):
        for column in range(grid):
            changed = pixels.clone()
            changed[:, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = 0.0
            difference = (model.encode(changed).latent - before).norm(dim=1)[0]  # (h, w)
            assert divmod(difference.argmax().item(), grid) == (row, column)


@pytest.mark.parametrize("kind, expected", [
    ("DINOv3ViTImageProcessor", ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])),
    ("CLIPImageProcessor", ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])),
    ("ViTImageProcessor", ([0.5] * 3, [0.5] * 3)),
])  # fmt: skip
def test_mean_and_std_come_from_the_processor(tmp_path, kind, expected):
    """From the file of each family's own processor, alone or inside that of a processor of images and text."""
    vit_config("vit").save_pretrained(tmp_path)
    old_name = f"{kind}Fast"  # in the first releases of transformers 5
    (getattr(transformers, kind, None) or getattr(transformers, old_name))().save_pretrained(tmp_path)
    config = RAEConfig.from_encoder(str(tmp_path), **DECODER)
    assert (config.image_mean, config.image_std) == expected
    alone = tmp_path / "preprocessor_config.json"
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": json.loads(alone.read_text())}))
    alone.unlink()
    config = RAEConfig.from_encoder(str(tmp_path), **DECODER)
    assert (config.image_mean, config.image_std) == expected


def test_the_encoder_sees_normalised_pixels(encoders):
    model = from_folder(encoders, "dinov3_vit")
    seen = []
    model.encoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    pixels = images()
    model.encode(pixels)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(seen[0] * std + mean, pixels)


@pytest.mark.parametrize("source", SOURCES)
def test_files(encoders, tmp_path, source):
    """A saved RAE comes back bit for bit, with its encoder and without; only what it uses is in the file; a missing
    weight of the encoder is named."""
    model = from_folder(encoders, source, encoder_layers=[0, 2])
    latent = model.encode(images()).latent
    for bundled in (True, False):
        model.save_pretrained(tmp_path / str(bundled), include_encoder=bundled)
        loaded = RAEModel.from_pretrained(tmp_path / str(bundled))
        assert torch.equal(loaded.encode(images()).latent, latent)
        assert loaded.config.encoder_layers == [0, 2] and not loaded.encoder.training
    names = [name for name in load_file(tmp_path / "True" / "model.safetensors") if name.startswith("encoder.")]
    unused = ("text_model", "pooler", "classifier", "projection.", "post_layernorm", "layernorm.weight", ".norm.weight")
    assert not [n for n in names if any(part in n.replace("patch_embeddings.projection", "") for part in unused)]
    assert not [n for n in names if f".{BLOCKS - 1}." in n] and [n for n in names if ".2." in n]  # 0 to 2 are needed

    file = tmp_path / "True" / "model.safetensors"
    state = load_file(file)
    save_file({name: state[name] for name in state if name != names[-1]}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="1 missing keys, the first is 'encoder."):
        RAEModel.from_pretrained(tmp_path / "True")


@pytest.mark.parametrize("source", SOURCES)
def test_an_encoder_folder_without_a_weight(encoders, tmp_path, source):
    """Building an RAE from it names the weight; nothing stays random."""
    folder = shutil.copytree(encoders / source, tmp_path / source)
    state = load_file(folder / "model.safetensors")
    lost = next(name for name in state if ".1." in name and "norm" in name and "text" not in name)
    save_file({name: state[name] for name in state if name != lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 weights of \w+ are missing from its file.*{lost.split('.')[-2]}"):
        from_folder(tmp_path, source)


def test_automodel_needs_transformers_alone(encoders, tmp_path):
    """AutoModel.from_pretrained(trust_remote_code=True), in a process without this repository, gives the same latents
    and reconstructions bit for bit: several blocks, CLIP, and an encoder that the registry does not know."""
    changes = {"encoder_layers": [0, 3], "encoder_add_spatial_mean": True, "denormalize_output": False}
    expected = {}
    for source in ("dinov3_vit", "clip", "deit"):
        model = from_folder(encoders, source, **changes)
        model.save_pretrained(tmp_path / source)
        with torch.no_grad():
            expected |= {f"{source}.latent": model.encode(images()).latent, f"{source}.sample": model(images()).sample}
    save_file({"pixels": images()}, tmp_path / "pixels.safetensors")
    code = """
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
torch.set_num_threads(1)
pixels, out = load_file("pixels.safetensors")["pixels"], {}
for source in ("dinov3_vit", "clip", "deit"):
    rae = AutoModel.from_pretrained(source, trust_remote_code=True)
    with torch.no_grad():
        out |= {f"{source}.latent": rae.encode(pixels).latent, f"{source}.sample": rae(pixels).sample}
save_file(out, "out.safetensors")
"""
    environment = {**os.environ, "PYTHONPATH": "", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_config_from_before_these_settings(encoders, tmp_path):
    """A config.json without them means what it meant."""
    model = from_folder(encoders, "vit")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("encoder_layers", "encoder_add_spatial_mean", "encoder_prefix_tokens", "encoder_final_norm",
                 "denormalize_output", "encoder_keep_final_affine", "latent_stats_have_mean"):  # fmt: skip
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = RAEModel.from_pretrained(tmp_path)
    assert loaded.config.denormalize_output and loaded.config.encoder_layers is None
    assert torch.equal(loaded(images()).sample, model(images()).sample)


# Encoders that the registry does not know -----------------------------------------------------------------------------


def test_an_unknown_encoder_needs_its_two_settings():
    """The number of prefix tokens and the final norm are never guessed; a wrong one is an error with what was found."""
    other = {"encoder_config": vit_config("deit"), **DECODER}
    for settings in ({}, {"encoder_prefix_tokens": 2}, {"encoder_final_norm": "layernorm"}):
        with pytest.raises(
            ValueError, match="'deit' is not supported without encoder_prefix_tokens .*encoder_final_norm"
        ):
            RAEConfig(**other, **settings)
    model = RAEModel(RAEConfig(**other, encoder_prefix_tokens=1, encoder_final_norm="layernorm"))
    with pytest.raises(ValueError, match=r"returned \(2, 11, 32\), expected \(B, 10, 32\): 1 prefix .* 9 patches"):
        model.encode(images())
    for name in ("layer_norm", "layernorm_before", "embeddings"):
        with pytest.raises(ValueError, match=rf"encoder_final_norm: .* \['layernorm'\], or none, got '{name}'"):
            RAEModel(RAEConfig(**other, encoder_prefix_tokens=2, encoder_final_norm=name))
    with pytest.raises(ValueError, match="'resnet' has no hidden_size"):
        RAEConfig(encoder_config={"model_type": "resnet"}, encoder_prefix_tokens=0, encoder_final_norm="none")


def test_settings_win_over_the_registry(encoders):
    """A wrong number of tokens for a known family is an error, the right one changes nothing."""
    expected = from_folder(encoders, "dinov3_vit").encode(images()).latent
    same = from_folder(encoders, "dinov3_vit", encoder_prefix_tokens=4, encoder_final_norm="norm")
    torch.testing.assert_close(same.encode(images()).latent, expected, rtol=1e-5, atol=1e-5)  # normalised once more
    with pytest.raises(ValueError, match=r"\(2, 13, 32\), expected \(B, 14, 32\): 5 prefix tokens"):
        from_folder(encoders, "dinov3_vit", encoder_prefix_tokens=5).encode(images())


def test_an_encoder_without_a_final_norm():
    """BEiT with mean pooling has none outside of its pooler: its tokens are normalised all the same."""
    config = transformers.BeitConfig(**TINY_VIT, use_mean_pooling=True)
    settings = {"encoder_prefix_tokens": 1, "encoder_final_norm": "none", "encoder_layers": [1, 3]}
    model = RAEModel(RAEConfig(encoder_config=config, image_mean=[0] * 3, image_std=[1] * 3, **DECODER, **settings))
    blocks, last = stock_blocks(model.encoder, "beit", images())
    assert torch.equal(blocks[-1], last)
    expected = sum(F.layer_norm(block[:, 1:], (WIDTH,), eps=1e-6) for block in (blocks[1], blocks[3])) / 2
    torch.testing.assert_close(tokens_of(model.encode(images()).latent), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"one of \[\], or none, got 'layernorm'"):
        RAEModel(RAEConfig(encoder_config=config, **DECODER, encoder_prefix_tokens=1, encoder_final_norm="layernorm"))


# Several blocks (RAEv2) -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [[3], [1], [0, 2], [0, 1, 2, 3]])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_latent_is_the_mean_over_normalised_blocks(model_type, layers):
    """Against a direct computation with the stock model's hidden states: each chosen block's output through the final
    LayerNorm without affine, averaged; then the last chosen one's spatial mean added."""
    prefix, in_forward = FAMILIES[model_type][1:]
    stock = from_architecture(model_type)  # all blocks are there; its final norm has no affine part
    model = from_architecture(model_type, encoder_layers=layers, image_mean=[0] * 3, image_std=[1] * 3)
    assert model.encoder.load_state_dict(stock.encoder.state_dict(), strict=False).missing_keys == []
    blocks, last = stock_blocks(stock.encoder, model_type, images())
    normalised = [F.layer_norm(block[:, prefix:], (WIDTH,), eps=model.encoder_norm.eps) for block in blocks]
    if in_forward:
        torch.testing.assert_close(last[:, prefix:], normalised[-1])
    expected = sum(normalised[i].double() for i in layers) / len(layers)
    found = tokens_of(model.encode(images()).latent)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)

    model.config.encoder_add_spatial_mean = True
    expected += normalised[layers[-1]].double().mean(dim=1, keepdim=True)
    found = tokens_of(model.encode(images()).latent)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    blocks_left = {int(name.split(".")[i + 1]) for name, _ in model.encoder.named_parameters()
                   for i, part in enumerate(name.split(".")) if part in ("layer", "layers")}  # fmt: skip
    assert blocks_left == set(range(layers[-1] + 1))  # the others are neither built, saved nor run


@pytest.mark.parametrize("layers", [None, [1], [0, 2, 3]])
@pytest.mark.parametrize("source", [source for source in SOURCES if source != "deit"])
def test_the_final_norm_can_keep_its_affine_part(encoders, tmp_path, source, layers):
    """RAEv2's SigLIP2, for every family of the registry: each chosen block's output through the stock model's own final
    LayerNorm, averaged; in files with and without the encoder, and in a copy, without the weights being there twice."""
    changes = {"encoder_layers": layers, "encoder_keep_final_affine": True, "image_mean": [0] * 3, "image_std": [1] * 3}
    model = from_folder(encoders, source, **changes)
    model_type = SOURCES[source][1]
    prefix = FAMILIES[model_type][1]
    stock = transformers.AutoModel.from_pretrained(encoders / source, config=vit_config(model_type)).eval()
    (norm,) = (m for n, m in stock.named_modules() if f".{n}".endswith(f".{ENCODER_FAMILIES[model_type].final_norm}"))
    assert (norm.weight - 1).abs().max() > 0.1 and norm.bias.abs().max() > 0.1
    blocks, _ = stock_blocks(stock, model_type, images())
    chosen = [norm(blocks[i])[:, prefix:] for i in layers or [BLOCKS - 1]]
    expected = torch.stack(chosen).mean(dim=0)
    torch.testing.assert_close(tokens_of(model.encode(images()).latent), expected, rtol=1e-4, atol=1e-4)

    latent, other = model.encode(images()).latent, copy.deepcopy(model)
    assert other.encoder_norm is not model.encoder_norm
    for bundled in (True, False):
        model.save_pretrained(tmp_path / str(bundled), include_encoder=bundled)
        loaded = RAEModel.from_pretrained(tmp_path / str(bundled))
        assert torch.equal(loaded.encode(images()).latent, latent)
    assert not [name for name, p in loaded.encoder.named_parameters() if p.requires_grad]
    model.encoder_norm.weight.data.zero_()
    assert torch.equal(other.encode(images()).latent, latent)
    names = [name for name in model.state_dict() if "encoder_norm" in name]
    assert (
        names == []
        and len(model.state_dict()) == len(from_folder(encoders, source, encoder_layers=layers).state_dict()) + 2
    )


def test_where_no_affine_part_can_be_kept():
    """Whether an encoder that the registry does not know applies its norm itself is not known."""
    other = {"encoder_config": vit_config("deit"), **DECODER, **OTHER["deit"]}
    with pytest.raises(ValueError, match="encoder_keep_final_affine: expected false with encoder_final_norm, got true"):
        RAEConfig(**other, encoder_keep_final_affine=True)
    with pytest.raises(ValueError, match="encoder_keep_final_affine: expected true or false, got 1"):
        RAEConfig(encoder_config=vit_config("vit"), **DECODER, encoder_keep_final_affine=1)


def test_pixels_can_be_normalised_otherwise(encoders, tmp_path):
    """image_mean and image_std win over the processor's, each by itself, and together they need none."""
    folder = shutil.copytree(encoders / "vit", tmp_path / "vit")
    own = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    config = RAEConfig.from_encoder(str(folder), **DECODER, image_mean=own["image_mean"])
    assert (config.image_mean, config.image_std) == (own["image_mean"], STD)
    config = RAEConfig.from_encoder(str(folder), **DECODER, image_std=own["image_std"])
    assert (config.image_mean, config.image_std) == (MEAN, own["image_std"])
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(OSError, match="preprocessor_config.json"):
        RAEConfig.from_encoder(str(folder), **DECODER, image_std=own["image_std"])
    for encoder in ({"encoder": folder}, {"encoder": "vit", "encoder_weights": "random"}):
        settings = {"encoder_weights": "pretrained", "encoder_config": "{}", "encoder_input_size": 12, **own, **encoder}
        if settings["encoder_weights"] == "random":
            settings["encoder_config"] = json.dumps(TINY_VIT)
        argv = flags({f"model.{key}": value for key, value in {**settings, "image_size": 12}.items()})
        config = build_rae_config(parse_config(argv).model)
        assert config.image_mean == own["image_mean"] and config.image_std == own["image_std"]


@pytest.mark.parametrize(
    "flag, words",
    [
        (["--model.image_mean", "0.5", "0.5"], "model.image_mean: expected three numbers, got [0.5, 0.5]"),
        (["--model.image_std", "1", "0", "1"], "model.image_std: expected positive numbers, got [1.0, 0.0, 1.0]"),
    ],
)
def test_means_and_deviations_that_cannot_be(capsys, flag, words):
    with pytest.raises(SystemExit):
        parse_config(flag)
    assert capsys.readouterr().err == f"error: {words}\n"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_last_block_alone_is_the_default(model_type, dtype):
    """Bit for bit, and equal to the tokens of one plain call of the encoder."""
    default = from_architecture(model_type, image_mean=[0] * 3, image_std=[1] * 3).to(dtype)
    one = from_architecture(model_type, image_mean=[0] * 3, image_std=[1] * 3, encoder_layers=[BLOCKS - 1]).to(dtype)
    pixels = images().to(dtype)
    latent = default.encode(pixels).latent
    assert torch.equal(one.encode(pixels).latent, latent) and latent.dtype == dtype
    _, last = stock_blocks(default.encoder, model_type, pixels)
    if not default.config.encoder_family().norm_in_forward:
        last = F.layer_norm(last, (WIDTH,), eps=default.encoder_norm.eps)
    assert torch.equal(tokens_of(latent), last[:, FAMILIES[model_type][1] :])


@pytest.mark.parametrize("layers", [[], [4], [-1], [1, 1], [2, 1]])
def test_blocks_that_cannot_be_meant(capsys, layers):
    """One line that names the setting, from the model and from the command line."""
    with pytest.raises(ValueError, match=r"encoder_layers: .* 4 blocks \(0 to 3\), got \[") as caught:
        from_architecture("dinov3_vit", encoder_layers=layers)
    assert str(layers) in str(caught.value) and "\n" not in str(caught.value)
    argv = ["--model.encoder", "dinov3_vit", "--model.encoder_config", json.dumps(TINY_VIT)]
    argv += ["--model.encoder_input_size", "12", "--model.encoder_layers", f"{layers}"]
    if layers == [4]:  # how many blocks there are is known with the encoder's config
        with pytest.raises(ConfigError, match=r"encoder_layers: .* 4 blocks \(0 to 3\), got \[4\]"):
            build_rae_config(parse_config(argv).model)
    else:
        with pytest.raises(SystemExit):
            parse_config(argv)
        error = capsys.readouterr().err
        assert error.startswith("error: model.encoder_layers: expected ascending") and error.count("\n") == 1


def test_denormalize_output(encoders):
    """RAE: the decoder's output times std plus mean; RAEv2: the decoder's output."""
    model = from_folder(encoders, "dinov3_vit")
    randomise(model.decoder, 7)
    out = model(images(), return_last_layer=True)
    raw = unpatchify(out.patches[:, 1:], DECODER["decoder_patch_size"])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(out.sample, raw * std + mean)
    model.config.denormalize_output = False
    assert torch.equal(model(images()).sample, raw) and torch.equal(model.patches_to_pixels(out.patches), raw)


def test_no_gradient_reaches_the_encoder():
    """Also with several blocks, in training mode: a latent has no graph, the decoder learns, and no block's output is
    kept between calls."""
    model = from_architecture("dinov3_vit", encoder_layers=[0, 2], encoder_add_spatial_mean=True).train()
    with torch.inference_mode():
        model(images())  # what it leaves behind (rotary positions) can be used with gradients
    assert not any(module.training for module in model.encoder.modules())
    assert not model.encode(images()).latent.requires_grad
    model(images()).sample.square().mean().backward()
    assert all(p.grad is None and not p.requires_grad for p in model.encoder.parameters())
    assert all(p.grad is not None for p in model.decoder.parameters() if p.requires_grad)
    assert model._block_outputs == []


@pytest.mark.parametrize("how, keep", [(how, False) for how in ("copied", "whole model", "encoder", "blocks")]
                         + [("whole model", True), ("encoder", True)])  # fmt: skip
def test_several_blocks_when_copied_or_compiled(how, keep):
    """A deep copy uses its own blocks' outputs, also without the original; compiled whole (one graph), in part or block
    by block, every call gives what it gives uncompiled."""
    model = from_architecture("dinov3_vit", encoder_layers=[0, 2, 3], encoder_keep_final_affine=keep)
    batches = [images(seed=seed) for seed in range(3)]
    expected = [model.encode(pixels).latent for pixels in batches]
    other = copy.deepcopy(model)
    model.encoder = None
    encode = other.encode
    if how == "whole model":
        encode = torch.compile(other.encode, backend="aot_eager", fullgraph=True)
    elif how != "copied":
        blocks = [m for m in other.encoder.modules() if type(m).__name__ == "DINOv3ViTLayer"]
        for module in [other.encoder] if how == "encoder" else blocks:
            module.compile(backend="aot_eager")
    with torch.no_grad():
        for pixels, latent in zip(batches, expected, strict=True):
            torch.testing.assert_close(encode(pixels).latent, latent, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("how", ["DDP", "FSDP2"])
def test_several_blocks_when_distributed(how, keep):
    """The chosen blocks' outputs arrive also through DistributedDataParallel's and FSDP2's own hooks, and the final
    LayerNorm's weight and bias, where they are kept, are there after the encoder's own call."""
    changes = {"encoder_layers": [0, 2, 3], "encoder_add_spatial_mean": True, "encoder_keep_final_affine": keep}
    model = from_architecture("siglip_vision_model", **changes)
    expected = model(images()).sample
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        if how == "DDP":
            wrapped = nn.parallel.DistributedDataParallel(model)
        else:
            mesh = init_device_mesh("cpu", (1,))
            for module in [m for m in model.modules() if type(m).__name__ in model._no_split_modules]:
                fully_shard(module, mesh=mesh)
            wrapped = fully_shard(model, mesh=mesh)
        for _ in range(2):
            sample = wrapped(images()).sample
            torch.testing.assert_close(sample, expected, rtol=1e-5, atol=1e-5)
            sample.square().mean().backward()
        assert all(p.grad is not None for p in model.decoder.parameters() if p.requires_grad)
    finally:
        destroy_process_group()


def test_training_with_several_blocks(images, tmp_path):
    """The command line takes all of it: an encoder that the registry does not know, three of its blocks, the decoder's
    output as it is; the exported model remembers."""
    settings = {
        **PLAIN,
        "data.path": images,
        "train.output_dir": tmp_path / "run",
        "train.max_steps": "2",
        "model.encoder": "deit",
        "model.encoder_config": json.dumps({**TINY_VIT, "image_size": 32}),
        "model.encoder_input_size": "32",
        "model.image_size": "32",
        "model.decoder_patch_size": "4",
        "model.encoder_prefix_tokens": "2",
        "model.encoder_final_norm": "layernorm",
        "model.encoder_add_spatial_mean": "true",
        "model.denormalize_output": "false",
        "gan.weight": "0",
    }
    run_command("train_rae.py", *flags(settings), "--model.encoder_layers", "0", "2", "3")
    rae = RAEModel.from_pretrained(tmp_path / "run" / "final")
    assert rae.config.encoder_layers == [0, 2, 3] and rae.config.encoder_add_spatial_mean
    assert (
        not rae.config.denormalize_output and rae.config.encoder_family().prefix_tokens(rae.config.encoder_config) == 2
    )
    assert rae(torch.rand(1, 3, 32, 32)).sample.shape == (1, 3, 32, 32)


# Published architectures ----------------------------------------------------------------------------------------------

VIT_B = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
VIT_L = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
SO400M = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16)
VIT_H = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16)
PATCH_16 = dict(image_size=224, patch_size=16)
DINOV2 = dict(image_size=518, patch_size=14, num_register_tokens=4)
# what the config.json on the Hub says; millions of parameters without heads and the final affine part
PUBLISHED = {
    "facebook/dinov2-with-registers-base": ("dinov2_with_registers", {**VIT_B, **DINOV2}, 86.6),
    "facebook/dinov2-with-registers-large": ("dinov2_with_registers", {**VIT_L, **DINOV2}, 304.4),
    "google/siglip-so400m-patch14-384": ("siglip_vision_model", {**SO400M, "image_size": 384, "patch_size": 14}, 413.0),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": ("dinov3_vit", {**VIT_L, **PATCH_16, "num_register_tokens": 4}, 303.1),
    "openai/clip-vit-base-patch16": ("clip_vision_model", {**VIT_B, **PATCH_16}, 85.8),
    "google/vit-base-patch16-224": ("vit", {**VIT_B, **PATCH_16}, 85.8),
    "facebook/vit-mae-base": ("vit_mae", {**VIT_B, **PATCH_16}, 85.8),
    "facebook/ijepa_vith14_1k": ("ijepa", {**VIT_H, "image_size": 224, "patch_size": 14}, 630.8),
}
# preset: encoder, latent (C, h, w), side of the images
PRESETS = {
    "dinov2_l": ("facebook/dinov2-with-registers-large", (1024, 16, 16), 256),
    "dinov2_b_512": ("facebook/dinov2-with-registers-base", (768, 32, 32), 512),
    "siglip_so400m_378": ("google/siglip-so400m-patch14-384", (1152, 27, 27), 378),
    "dinov3_l_k7": ("facebook/dinov3-vitl16-pretrain-lvd1689m", (1024, 16, 16), 256),
    "dinov3_l_k23": ("facebook/dinov3-vitl16-pretrain-lvd1689m", (1024, 16, 16), 256),
}
SMALL_DECODER = {name: value for name, value in DECODER.items() if name.startswith("decoder_")}


def published_config(encoder_id):
    model_type, settings, _ = PUBLISHED[encoder_id]
    return transformers.AutoConfig.for_model(model_type, **settings)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit_their_encoders(preset, tmp_path):
    """With the encoder's own config.json, the preset's sizes are right, and its decoder is ViT-XL."""
    encoder, latent, side = PRESETS[preset]
    argv = ["--config", str(ROOT / "configs" / f"{preset}.yaml")]
    assert parse_config(argv).model.encoder == encoder
    config = published_config(encoder)
    if config.model_type == "siglip_vision_model":
        config = transformers.SiglipConfig(vision_config=config.to_dict())
    config.save_pretrained(tmp_path)
    transformers.ViTImageProcessor().save_pretrained(tmp_path)
    rae = build_rae_config(parse_config([*argv, "--model.encoder", str(tmp_path)]).model)
    assert (rae.latent_channels, rae.latent_size, rae.latent_size) == latent and rae.image_size == side
    assert (rae.decoder_hidden_size, rae.decoder_num_hidden_layers, rae.decoder_num_attention_heads,
            rae.decoder_intermediate_size) == (1152, 28, 16, 4096)  # fmt: skip
    several = {"dinov3_l_k7": list(range(11, 24, 2)), "dinov3_l_k23": list(range(1, 24))}.get(preset)
    assert rae.encoder_layers == several
    assert rae.encoder_add_spatial_mean == (not rae.denormalize_output) == (several is not None)


def random_weights(shape):
    """Normal values that repeat: drawing hundreds of millions of them would take most of the test's time."""
    values = 0.02 * torch.randn(2**16 - 1, generator=torch.Generator().manual_seed(0))
    return values.repeat(shape.numel() // len(values) + 1)[: shape.numel()].view(shape)


@pytest.mark.parametrize("encoder", [name for name in PUBLISHED if name != "facebook/dinov2-with-registers-large"])
def test_published_architectures_at_full_size(encoder):
    """One image through each family with random weights, as its preset says where it has one: as many parameters as
    published, finite latents of the right shape, normalised token by token. (I-JEPA's 2.5 GB are cut to 2 of its 32
    blocks, and to their 41 million parameters.)"""
    config, millions = published_config(encoder), PUBLISHED[encoder][2]
    if config.model_type == "ijepa":
        config.num_hidden_layers, millions = 2, 40.5
    preset = next((name for name, (used, *_) in PRESETS.items() if used == encoder), "mae_b")
    settings = parse_config(["--config", str(ROOT / "configs" / f"{preset}.yaml")]).model
    rae_config = RAEConfig(
        encoder_config=config,
        encoder_input_size=settings.encoder_input_size if config.model_type != "ijepa" else 224,
        encoder_layers=settings.encoder_layers,
        **SMALL_DECODER,
    )
    with torch.device("meta"):
        empty = RAEModel(rae_config)
    assert sum(p.numel() for p in empty.encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    state = {name: random_weights(tensor.shape) for name, tensor in empty.state_dict().items()}
    rae = RAEModel.from_pretrained(None, config=rae_config, state_dict=state)
    torch.set_num_threads(os.cpu_count())
    with torch.inference_mode():
        latent = rae.encode(images(1, size=rae_config.encoder_input_size)).latent
    torch.set_num_threads(1)
    assert latent.shape == (1, rae_config.latent_channels, rae_config.latent_size, rae_config.latent_size)
    assert latent.isfinite().all() and (latent.mean(dim=1).abs() < 1e-4).all()
    if rae_config.encoder_layers is None:
        assert ((latent.var(dim=1, correction=0) - 1).abs() < 1e-2).all()
    assert latent.flatten(2).std(dim=2).min() > 0  # tokens differ
