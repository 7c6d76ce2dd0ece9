"""scripts/convert_checkpoint.py on tiny models of every side. About a minute on a CPU."""

import importlib.util
import json
import os
import shutil

import pytest
import torch
import transformers
from conftest import ROOT, run_command
from diffusers import AutoencoderRAE
from diffusers.models.autoencoders import autoencoder_rae
from safetensors.torch import load_file, save_file
from torch import nn

from modeling_rae import RAEConfig, RAEDecoder, RAEModel, sincos_position_table
from rae_suite.launch import run_main
from rae_suite.published_rae import number_of_heads, published_differences
from rae_suite.rae_networks import image_processor_json

PARITY = ROOT / "tests" / "parity"
GRID, WIDTH, IMAGE = 16, 64, 32  # on 16 x 16 tokens diffusers' position table is MAE's
INPUTS = {"dinov2": (14, 224), "mae": (16, 256), "siglip2": (16, 256)}  # patch, input in pixels
DECODER = dict(
    decoder_hidden_size=24, decoder_num_hidden_layers=2, decoder_num_attention_heads=3, decoder_intermediate_size=40
)
MODEL_FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / "scripts/convert_checkpoint.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def convert(script, capsys):
    """Runs the script in this process; returns (exit code, stdout, stderr)."""

    def call(source, target, path, output, *arguments):
        capsys.readouterr()
        line = ["--from", source, "--to", target, "--input", path, "--output", output, *arguments]
        code = 0
        try:
            run_main(lambda: script.main([str(argument) for argument in line]))
        except SystemExit as stopped:
            code = stopped.code
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def succeed(convert):
    """Converts and returns what is printed."""

    def call(*arguments):
        code, out, err = convert(*arguments)
        assert code == 0, err
        return out

    return call


@pytest.fixture
def refuse(convert):
    """Runs a conversion that must fail, checks that nothing is left of it, and returns its one line on stderr."""

    def call(source, target, path, output, *arguments, code=2):
        above = next(folder for folder in output.parents if folder.is_dir())
        before = sorted(above.iterdir())
        found, _, message = convert(source, target, path, output, *arguments)
        assert found == code, message
        assert message.count("\n") == 1 and message.startswith("error: "), message
        assert sorted(above.iterdir()) == before
        return message

    return call


def seeded(build, seed):
    """What build() returns, with weights large enough for every part to matter, norms and biases included."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build().eval()
        for parameter in module.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return module


def latent_stats(seed=3):
    generator = torch.Generator().manual_seed(seed)
    shape = (WIDTH, GRID, GRID)
    return {"mean": torch.randn(shape, generator=generator), "var": torch.rand(shape, generator=generator) + 0.01}


def build_diffusers(kind="dinov2", stats=False, seed=0, **changes):
    patch, size = INPUTS[kind]
    if stats:
        values = latent_stats()
        changes |= {"latents_mean": values["mean"], "latents_std": (values["var"] + 1e-5).sqrt()}
    settings = dict(
        encoder_type=kind,
        encoder_hidden_size=WIDTH,
        encoder_patch_size=patch,
        encoder_num_hidden_layers=2,
        encoder_input_size=size,
        patch_size=IMAGE // GRID,
        **DECODER,
    )
    return seeded(lambda: AutoencoderRAE(**{**settings, **changes}), seed)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """AutoencoderRAE folders as diffusers writes them, by encoder and whether they have statistics."""
    root = tmp_path_factory.mktemp("diffusers")
    made = {}
    for kind, stats in (("dinov2", False), ("dinov2", True), ("mae", False), ("mae", True)):
        made[kind, stats] = root / f"{kind}{stats}"
        build_diffusers(kind, stats).save_pretrained(made[kind, stats])
    return made


@pytest.fixture
def rae(folders, tmp_path, succeed):
    """A folder of an RAE with statistics that diffusers can hold."""
    succeed("diffusers", "rae", folders["dinov2", True], tmp_path / "rae")
    return tmp_path / "rae"


def images(size=IMAGE, count=2):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def latent_and_sample(model):
    latent = model.encode(images()).latent
    return latent, model.decode(latent).sample


def assert_same_model(a, b):
    """Latents and reconstructions of other images than the script's agree."""
    for found, expected in zip(latent_and_sample(a), latent_and_sample(b), strict=True):
        assert expected.std() > 1e-2
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def assert_equal_tensors(a, b, but=()):
    assert a.keys() - set(but) == b.keys() - set(but)
    different = [name for name in a if name not in but and not torch.equal(a[name], b[name])]
    assert not different


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(file, change):
    """Writes change(tensors) over a safetensors file."""
    save_file(change(load_file(file)), file, {"format": "pt"})


# Diffusers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("kind", ["dinov2", "mae"])
def test_diffusers_to_rae_and_back(folders, tmp_path, succeed, kind, stats):
    """An AutoencoderRAE and its conversion compute the same; the way back gives the same file, and from there the same
    RAE again. Only std and variance are converted by arithmetic, and come back to the last digits."""
    folder = folders[kind, stats]
    out = succeed("diffusers", "rae", folder, tmp_path / "rae", "--json", tmp_path / "report.json")
    model = RAEModel.from_pretrained(tmp_path / "rae")
    assert_same_model(model, AutoencoderRAE.from_pretrained(folder))
    assert (model.config.use_latent_stats, model.config.train_position_embedding) == (stats, False)
    assert (tmp_path / "rae" / "preprocessor_config.json").read_text() == image_processor_json(IMAGE)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["images"]["number"] == 3 and report["tensors"]["different"] == []
    latents = report["images"]["latents"]
    assert latents["largest_value"] > 1
    # without statistics diffusers divides by 1.00001, with them the conversion is exact but for rounding
    assert latents["largest_difference"] < (1e-6 if stats else 1.1e-5) * latents["largest_value"]
    assert report["images"]["reconstructions"]["largest_difference"] < 1e-4
    assert "position table    sin-cos" in out and "3 images" in out

    succeed("rae", "diffusers", tmp_path / "rae", tmp_path / "back")
    twin, info = AutoencoderRAE.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_model(twin, AutoencoderRAE.from_pretrained(folder))
    original, back = load_file(folder / MODEL_FILE), load_file(tmp_path / "back" / MODEL_FILE)
    assert_equal_tensors(original, back, but=("decoder.decoder_pos_embed", "_latents_std"))
    torch.testing.assert_close(back["_latents_std"], original["_latents_std"], rtol=1e-6, atol=0)
    old, new = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "back"))
    defaults = {
        "image_size": IMAGE,
        "encoder_norm_mean": [0.485, 0.456, 0.406],
        "encoder_norm_std": [0.229, 0.224, 0.225],
    }
    assert {**old, **defaults, "latents_std": 0} == {**new, "latents_std": 0}

    succeed("diffusers", "rae", tmp_path / "back", tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("rae", "again"))
    assert_equal_tensors(first, second, but=("latent_var",))
    if stats:
        torch.testing.assert_close(second["latent_var"], first["latent_var"], rtol=1e-6, atol=1e-9)
    assert (tmp_path / "rae/config.json").read_text() == (tmp_path / "again/config.json").read_text()


def test_half_precision_becomes_float32(folders, tmp_path, succeed):
    """Weights in bfloat16 keep their values; both sides are compared in float32."""
    AutoencoderRAE.from_pretrained(folders["mae", False]).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    succeed("diffusers", "rae", tmp_path / "half", tmp_path / "rae")
    half, model = load_file(tmp_path / "half" / MODEL_FILE), RAEModel.from_pretrained(tmp_path / "rae")
    assert half["decoder.decoder_pred.weight"].dtype == torch.bfloat16
    assert torch.equal(model.decoder.decoder_pred.weight, half["decoder.decoder_pred.weight"].float())
    assert model.config.image_mean == half["encoder_mean"].flatten().tolist()


def old_name(name, kind):
    """The name that transformers 4 gave to a tensor of the encoder."""
    if not name.startswith("encoder."):
        return name
    for new, old in (("q_proj", "attention.query"), ("k_proj", "attention.key"), ("v_proj", "attention.value")):
        name = name.replace(f"attention.{new}", f"attention.{old}")
    name = name.replace("attention.o_proj", "attention.output.dense")
    if kind == "mae":
        name = name.replace("encoder.layers.", "encoder.encoder.layer.")
        name = name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
    return name


@pytest.mark.parametrize("kind", ["dinov2", "mae"])
def test_names_of_older_transformers(folders, tmp_path, succeed, kind):
    """A file with the encoder names of transformers 4, which diffusers itself no longer loads, gives the same RAE."""
    folder = shutil.copytree(folders[kind, False], tmp_path / "old")
    edit_tensors(folder / MODEL_FILE, lambda tensors: {old_name(n, kind): t for n, t in tensors.items()})
    _, info = AutoencoderRAE.from_pretrained(folder, output_loading_info=True, low_cpu_mem_usage=False)
    assert info["missing_keys"]
    assert "3 images" in succeed("diffusers", "rae", folder, tmp_path / "rae")
    assert_same_model(RAEModel.from_pretrained(tmp_path / "rae"), AutoencoderRAE.from_pretrained(folders[kind, False]))


class NestedSiglip(nn.Module):
    """SiglipVisionModel as it was when diffusers' code for it was written: all of it in `vision_model`."""

    def __init__(self, config):
        super().__init__()
        self.vision_model = transformers.SiglipVisionModel(config)

    def forward(self, *args, output_hidden_states, **options):
        return self.vision_model(*args, **options)


@pytest.fixture
def older_transformers(monkeypatch):
    """With it diffusers builds SigLIP2 encoders."""
    return lambda: monkeypatch.setattr(autoencoder_rae, "SiglipVisionModel", NestedSiglip)


@pytest.fixture
def siglip_folder(tmp_path):
    """An AutoencoderRAE with a SigLIP2 encoder, made by hand: its own names, a pooling head, mean and std of 0.5."""
    patch, size = INPUTS["siglip2"]
    config = transformers.SiglipVisionConfig(
        hidden_size=WIDTH, patch_size=patch, image_size=256, num_attention_heads=1, num_hidden_layers=2
    )
    encoder = seeded(lambda: transformers.SiglipVisionModel(config), 1).state_dict()
    state = {f"encoder.vision_model.{n}": t for n, t in encoder.items() if not n.startswith("post_layernorm")}
    assert "encoder.vision_model.head.probe" in state
    other = build_diffusers("mae")
    state |= {name: tensor for name, tensor in other.state_dict().items() if not name.startswith("encoder.")}
    state |= {name: torch.full((1, 3, 1, 1), 0.5) for name in ("encoder_mean", "encoder_std")}
    folder = tmp_path / "siglip2"
    other.save_pretrained(folder)
    save_file(state, folder / MODEL_FILE, {"format": "pt"})
    edit_config(folder, encoder_type="siglip2", encoder_norm_mean=[0.5] * 3, encoder_norm_std=[0.5] * 3)
    return folder


def test_siglip2_without_building_it(siglip_folder, tmp_path, succeed, refuse, older_transformers):
    """The installed diffusers cannot build this model: it is read and written nevertheless, compared tensor by tensor
    and, in a diffusers that can build it, computes the same both ways."""
    with pytest.raises(AttributeError):
        AutoencoderRAE.from_pretrained(siglip_folder)
    out = succeed("diffusers", "rae", siglip_folder, tmp_path / "rae")
    assert "cannot build a siglip2 encoder" in out and "not compared on images" in out
    message = refuse("rae", "diffusers", tmp_path / "rae", tmp_path / "back")
    assert "cannot build a siglip2 encoder" in message and "--force" in message
    assert "equal bit for bit" in succeed("rae", "diffusers", tmp_path / "rae", tmp_path / "back", "--force")

    older_transformers()
    model = RAEModel.from_pretrained(tmp_path / "rae")
    assert model.config.image_mean == [0.5, 0.5, 0.5]
    original = AutoencoderRAE.from_pretrained(siglip_folder)
    assert_same_model(model, original)
    twin, info = AutoencoderRAE.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_model(twin, original)
    assert "3 images" in succeed("diffusers", "rae", siglip_folder, tmp_path / "compared")


def test_stored_position_table_of_a_diffusers_folder(folders, tmp_path, succeed, refuse):
    """A table in the file that is not the one that diffusers computes stops the conversion; --force keeps it."""
    folder = shutil.copytree(folders["dinov2", False], tmp_path / "stored")
    table = sincos_position_table(24, GRID) + 0.01
    edit_tensors(folder / MODEL_FILE, lambda tensors: {**tensors, "decoder.decoder_pos_embed": table})
    assert "position table" in refuse("diffusers", "rae", folder, tmp_path / "rae")
    assert "differs" in succeed("diffusers", "rae", folder, tmp_path / "rae", "--force")
    model = RAEModel.from_pretrained(tmp_path / "rae")
    assert torch.equal(model.decoder.decoder_pos_embed, table)
    assert model.config.train_position_embedding and model.decoder.decoder_pos_embed.requires_grad


def test_other_grids_have_diffusers_own_table(tmp_path, succeed, refuse):
    """On other grids than 16 x 16 diffusers' table is not MAE's: the RAE gets diffusers', and MAE's is refused."""
    build_diffusers(encoder_input_size=56).save_pretrained(tmp_path / "small")
    assert "diffusers' sin-cos" in succeed("diffusers", "rae", tmp_path / "small", tmp_path / "rae")
    model = RAEModel.from_pretrained(tmp_path / "rae")
    mae = sincos_position_table(24, 4)
    assert (model.decoder.decoder_pos_embed - mae).abs().max() > 0.1 and not model.config.train_position_embedding
    model.decoder.decoder_pos_embed.data.copy_(mae)
    model.save_pretrained(tmp_path / "mae")
    assert "position table (sin-cos)" in refuse("rae", "diffusers", tmp_path / "mae", tmp_path / "back")
    out = succeed("rae", "diffusers", tmp_path / "mae", tmp_path / "back", "--force")
    assert "differs" in out
    assert "position table (sin-cos)" not in succeed("rae", "diffusers", tmp_path / "rae", tmp_path / "exact")


@pytest.mark.parametrize("stats", [False, True])
def test_scaling_factor_goes_into_the_statistics(tmp_path, succeed, stats):
    """AutoencoderRAE multiplies its latents by scaling_factor; an RAE's statistics can say the same."""
    build_diffusers("mae", stats, scaling_factor=0.5).save_pretrained(tmp_path / "scaled")
    assert "scaling_factor 0.5" in succeed("diffusers", "rae", tmp_path / "scaled", tmp_path / "rae")
    model = RAEModel.from_pretrained(tmp_path / "rae")
    assert model.config.scaling_factor == 1 and model.config.use_latent_stats
    assert_same_model(model, AutoencoderRAE.from_pretrained(tmp_path / "scaled"))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"reshape_to_2d": False}, "reshape_to_2d"),
        ({"num_channels": 1}, "num_channels"),
        ({"encoder_type": "clip"}, "dinov2 or siglip2 or mae, got 'clip'"),
        ({"encoder_hidden_size": "64"}, "encoder_hidden_size"),
        ({"encoder_hidden_size": 32}, "at least 64"),
        ({"image_size": 48}, "48"),
        ({"encoder_cls": "dinov2"}, "'encoder_cls'"),
        ({"decoder_num_attention_heads": 5}, "(5)"),
        (
            {"decoder_num_hidden_layers": 3},
            "lacks 16 keys, the first is 'decoder.decoder_layers.2.attention.to_k.bias'",
        ),
        ({"decoder_num_hidden_layers": 1}, "has unexpected 16 keys"),
        ({"encoder_num_hidden_layers": 1}, "has unexpected 18 keys"),
        ({"encoder_num_hidden_layers": 3}, "lacks 18 keys"),
        ({"decoder_intermediate_size": 48}, "(40,), expected (48,)"),
        ({"encoder_patch_size": 7, "encoder_input_size": 112}, "(64, 3, 14, 14), expected (64, 3, 7, 7)"),
    ],
)
def test_diffusers_folders_that_cannot_be_read(folders, tmp_path, refuse, changes, words):
    """Settings that an RAE cannot have, or that do not fit the tensors, are named."""
    folder = shutil.copytree(folders["dinov2", False], tmp_path / "bad")
    edit_config(folder, **changes)
    assert words in refuse("diffusers", "rae", folder, tmp_path / "rae")


def test_diffusers_files_that_cannot_be_read(folders, tmp_path, refuse):
    """A missing file, tensors that are too many or too few, and a std that no variance has."""
    folder = shutil.copytree(folders["dinov2", True], tmp_path / "bad")
    good = load_file(folder / MODEL_FILE)

    def refused(tensors):
        save_file(tensors, folder / MODEL_FILE, {"format": "pt"})
        return refuse("diffusers", "rae", folder, tmp_path / "rae")

    assert "has unexpected 1 keys, the first is 'extra'" in refused({**good, "extra": torch.ones(1)})
    assert "lacks 1 keys, the first is 'encoder_mean'" in refused(
        {n: t for n, t in good.items() if n != "encoder_mean"}
    )
    assert "_latents_std goes down to 0.001" in refused(
        {**good, "_latents_std": torch.full((WIDTH, GRID, GRID), 0.001)}
    )
    assert "_latents_mean has shape (3,)" in refused({**good, "_latents_mean": torch.zeros(3)})
    (folder / MODEL_FILE).write_bytes(b"no tensors")
    assert MODEL_FILE in refuse("diffusers", "rae", folder, tmp_path / "rae")
    (folder / MODEL_FILE).unlink()
    assert MODEL_FILE in refuse("diffusers", "rae", folder, tmp_path / "rae")


def test_models_that_diffusers_cannot_hold(rae, tmp_path, succeed, refuse):
    """Every difference is named; --force writes the rest, and the differing images are reported."""
    model = RAEModel.from_pretrained(rae)
    model.config.update({"denormalize_output": False, "scaling_factor": 0.5, "encoder_add_spatial_mean": True})
    model.config.update({"encoder_layers": [0, 1], "decoder_hidden_act": "relu", "decoder_layer_norm_eps": 1e-6})
    model.decoder.decoder_pos_embed.data += 0.1
    model.save_pretrained(tmp_path / "special")
    message = refuse("rae", "diffusers", tmp_path / "special", tmp_path / "back")
    for words in (
        "blocks [0, 1]",
        "spatial mean",
        "denormalised",
        "relu",
        "1e-06",
        "scaling_factor is 0.5",
        "(learnt)",
    ):
        assert words in message, words
    out = succeed("rae", "diffusers", tmp_path / "special", tmp_path / "back", "--force")
    assert out.count("\ndiffers ") == 7
    twin = AutoencoderRAE.from_pretrained(tmp_path / "back")
    assert torch.equal(twin.decoder.decoder_pred.weight, model.decoder.decoder_pred.weight)


def test_models_that_the_published_code_cannot_hold(rae, tmp_path, succeed, refuse):
    """Settings that neither the files nor the printed flags hold are named; a revision is among the flags."""
    changes = {"decoder_hidden_act": "relu", "decoder_layer_norm_eps": 1e-6, "scaling_factor": 0.5}
    changes |= {"encoder_final_norm": "none", "encoder_revision": "12e4567"}
    config = RAEConfig.from_pretrained(rae, **changes)
    model = seeded(lambda: RAEModel(config), 9)
    model.save_pretrained(tmp_path / "special")
    message = refuse("rae", "published", tmp_path / "special", tmp_path / "back")
    for words in (
        "decoder_hidden_act is relu, in the published code gelu",
        "decoder_layer_norm_eps is 1e-06, in the published code 1e-12",
        "scaling_factor is 0.5, in the published code 1",
        "encoder_final_norm is none",
        "--force",
    ):
        assert words in message, words
    out = succeed("rae", "published", tmp_path / "special", tmp_path / "back", "--force")
    assert out.count("\ndiffers ") == 4 and "--encoder_revision 12e4567" in out
    model.config.encoder_prefix_tokens = 4
    assert ("", "encoder_prefix_tokens is 4") in published_differences(model)


@pytest.mark.parametrize(
    "encoder, words",
    [
        ({"model_type": "dinov2"}, "not dinov2"),
        ({"model_type": "vit_mae"}, "the encoder's image_size is 56, in diffusers 224"),
        ({"model_type": "dinov2_with_registers", "image_size": 518, "num_register_tokens": 2}, "is 2, in diffusers 4"),
        ({"model_type": "vit_mae", "hidden_size": 32}, "under 64"),
        (
            {"model_type": "siglip_vision_model", "image_size": 256, "keep": True},
            "no AutoencoderRAE holds such weights: the final LayerNorm has weight and bias (encoder_keep_final_affine)",
        ),
    ],
)
def test_encoders_that_diffusers_cannot_hold(tmp_path, refuse, encoder, words):
    """No --force helps where the encoder's weights have no place in an AutoencoderRAE."""
    sizes = dict(image_size=56, patch_size=14, hidden_size=64, num_attention_heads=1, num_hidden_layers=1)
    keep = {"encoder_keep_final_affine": encoder.pop("keep", False)}
    sizes |= encoder
    config = RAEConfig(encoder_config=sizes, encoder_input_size=56, decoder_patch_size=2, **DECODER, **keep)
    RAEModel(config).save_pretrained(tmp_path / "rae")
    assert words in refuse("rae", "diffusers", tmp_path / "rae", tmp_path / "back", "--force")


def test_single_block_is_a_shallower_encoder(rae, tmp_path, succeed):
    """An RAE on an earlier block's tokens is an AutoencoderRAE with fewer blocks."""
    config = RAEConfig.from_pretrained(rae, encoder_layers=[0])
    model = seeded(lambda: RAEModel(config), 9)
    model.decoder.decoder_pos_embed.data.copy_(sincos_position_table(24, GRID))
    model.save_pretrained(tmp_path / "first")
    succeed("rae", "diffusers", tmp_path / "first", tmp_path / "back")
    twin = AutoencoderRAE.from_pretrained(tmp_path / "back")
    assert len(twin.encoder.encoder.layer) == 1
    assert_same_model(twin, model)


# Published code -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(folders, tmp_path_factory):
    """A transformers folder as published encoders have one: the encoder of an AutoencoderRAE, and its processor."""
    folder = tmp_path_factory.mktemp("encoder")
    model = AutoencoderRAE.from_pretrained(folders["dinov2", False]).encoder
    norm = torch.nn.LayerNorm(WIDTH)  # diffusers drops its affine part, a published encoder has it
    state = {**model.state_dict(), "layernorm.weight": norm.weight + 1, "layernorm.bias": norm.bias + 1}
    model.save_pretrained(folder, state_dict=state)
    transformers.ViTImageProcessor(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
    return folder


@pytest.fixture
def flags(encoder):
    return ["--encoder", encoder, "--decoder_num_attention_heads", 3]


def decoder_tensors(seed=0, learnt=False):
    """A published decoder's tensors for the tiny encoder on 16 x 16 tokens."""
    table = sincos_position_table(24, GRID)
    config = RAEConfig(
        encoder_config={"model_type": "dinov2", "hidden_size": WIDTH, "num_attention_heads": 1, "patch_size": 14},
        decoder_patch_size=IMAGE // GRID,
        **DECODER,
    )
    decoder = seeded(lambda: RAEDecoder(config), seed).state_dict()
    return {**decoder, "decoder_pos_embed": table + 0.01 * seed if learnt else table}


@pytest.fixture
def published(tmp_path):
    """A published decoder file."""
    torch.save(decoder_tensors(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.mark.parametrize("case", sorted(path.parent.name for path in PARITY.glob("cases/*/trace.json")))
def test_published_decoder_computes_what_the_published_code_does(tmp_path, succeed, case):
    """Recorded reconstructions of the published code, from its own weights; the way back gives the same file."""
    folder = PARITY / "cases" / case
    settings = json.loads((folder / "trace.json").read_text())["case"]
    decoder, tensors = settings["decoder"], load_file(folder / "decoder_init.safetensors")
    torch.save(tensors, tmp_path / "model.pt")
    encoder = PARITY / "encoders" / settings["encoder"]
    heads = ["--decoder_num_attention_heads", decoder["num_attention_heads"]]
    flags = ["--encoder", encoder, "--encoder_input_size", settings["encoder_input_size"], *heads]
    succeed("published", "rae", tmp_path / "model.pt", tmp_path / "rae", *flags)
    model = RAEModel.from_pretrained(tmp_path / "rae")
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size"):
        assert getattr(model.config, f"decoder_{name}") == decoder[name]
    assert model.config.encoder_id == str(encoder)
    pixels = load_file(folder / "images.safetensors")["eval"]
    expected = load_file(folder / "expected.safetensors")["initial_reconstruction"]
    with torch.no_grad():
        found = model(pixels).sample
    assert (found - expected).norm() < 1e-3 * expected.norm()

    out = succeed("rae", "published", tmp_path / "rae", tmp_path / "back")
    assert f"--encoder {encoder} --encoder_input_size {settings['encoder_input_size']}" in out
    assert sorted(os.listdir(tmp_path / "back")) == ["model.pt"]
    assert_equal_tensors(torch.load(tmp_path / "back" / "model.pt", weights_only=True), tensors)


def test_published_statistics_and_diffusers(published, flags, tmp_path, succeed):
    """model.pt and stat.pt to all sides: the RAE normalises with the statistics, diffusers does the same, the way back
    is exact, and reading it with the flags that were printed gives the same RAE."""
    stats = latent_stats()
    torch.save(stats, tmp_path / "stat.pt")
    flags += ["--stats", tmp_path / "stat.pt"]
    succeed("published", "rae", published, tmp_path / "rae", *flags)
    model = RAEModel.from_pretrained(tmp_path / "rae")
    assert model.config.image_mean == [0.4, 0.5, 0.6]
    raw = model.encode(images(), normalize=False).latent
    torch.testing.assert_close(model.encode(images()).latent, (raw - stats["mean"]) / (stats["var"] + 1e-5).sqrt())
    succeed("published", "diffusers", published, tmp_path / "diffusers", *flags)
    assert_same_model(AutoencoderRAE.from_pretrained(tmp_path / "diffusers"), model)

    out = succeed("rae", "published", tmp_path / "rae", tmp_path / "back")
    for name in ("model.pt", "stat.pt"):
        back, original = (torch.load(f / name, weights_only=True) for f in (tmp_path / "back", tmp_path))
        assert_equal_tensors(back, original)
    printed = out.split("to read it back: ")[1].split("\n")[0].replace("stat.pt", str(tmp_path / "back/stat.pt"))
    succeed("published", "rae", tmp_path / "back" / "model.pt", tmp_path / "again", *printed.split())
    assert_equal_tensors(*(load_file(tmp_path / name / "model.safetensors") for name in ("rae", "again")))
    assert (tmp_path / "rae/config.json").read_text() == (tmp_path / "again/config.json").read_text()

    succeed("diffusers", "published", tmp_path / "diffusers", tmp_path / "from_diffusers")
    assert_equal_tensors(torch.load(tmp_path / "from_diffusers/model.pt", weights_only=True), decoder_tensors())


def test_learnt_position_table(flags, tmp_path, succeed, refuse):
    """A learnt table is kept, learns on, and is refused for diffusers, which has none; forced, it comes back whole."""
    tensors = decoder_tensors(seed=1, learnt=True)
    torch.save(tensors, tmp_path / "model.pt")
    assert "position table    learnt" in succeed("published", "rae", tmp_path / "model.pt", tmp_path / "rae", *flags)
    model = RAEModel.from_pretrained(tmp_path / "rae")
    assert torch.equal(model.decoder.decoder_pos_embed, tensors["decoder_pos_embed"])
    assert model.config.train_position_embedding
    message = refuse("rae", "diffusers", tmp_path / "rae", tmp_path / "diffusers")
    assert "position table (learnt) differs by up to 0.01" in message
    out = succeed("rae", "diffusers", tmp_path / "rae", tmp_path / "diffusers", "--force")
    assert "differs           the position table" in out
    succeed("diffusers", "rae", tmp_path / "diffusers", tmp_path / "back", "--force")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("rae", "back"))
    assert_equal_tensors(first, second)


def test_raev2_decoders(published, flags, tmp_path, succeed):
    """What the weights of a RAEv2 decoder do not show comes from the command line."""
    flags += ["--encoder_layers", 0, 1, "--encoder_add_spatial_mean", "--no_denormalize_output"]
    succeed("published", "rae", published, tmp_path / "rae", *flags)
    config = RAEConfig.from_pretrained(tmp_path / "rae")
    assert config.encoder_layers == [0, 1] and config.encoder_add_spatial_mean and not config.denormalize_output
    out = succeed("rae", "published", tmp_path / "rae", tmp_path / "back")
    assert "--encoder_layers 0 1 --encoder_add_spatial_mean --no_denormalize_output" in out


@pytest.fixture
def training(encoder, tmp_path):
    """A training checkpoint of the published code: different raw and averaged decoders, and all the rest of it."""
    whole = transformers.AutoModel.from_pretrained(encoder).state_dict()
    copy = {f"encoder.encoder.{name}": t for name, t in whole.items() if not name.startswith("layernorm")}

    def state(seed):
        return {**copy, **{f"decoder.{name}": tensor for name, tensor in decoder_tensors(seed).items()}}

    network = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.95))
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    saved = {"step": 10, "epoch": 2, "model": state(1), "ema": state(2)}
    for prefix in ("", "disc_"):
        saved |= {f"{prefix}optimizer": optimizer.state_dict(), f"{prefix}scheduler": scheduler.state_dict()}
    file = tmp_path / "ep-0000002.pt"
    torch.save({**saved, "disc": network.state_dict()}, file)
    return file


def test_training_checkpoint(training, flags, tmp_path, succeed):
    """The averaged weights by default, the raw ones by name, also from under the prefixes of wrappers."""
    for arguments, seed in (([], 2), (["--weights", "ema"], 2), (["--weights", "raw"], 1)):
        out = succeed("training", "rae", training, tmp_path / f"rae{seed}", *flags, *arguments, "--overwrite")
        assert "not compared" not in out
        found = RAEModel.from_pretrained(tmp_path / f"rae{seed}").decoder.state_dict()
        assert_equal_tensors(found, decoder_tensors(seed))
    succeed("training", "published", training, tmp_path / "published", *flags)
    assert_equal_tensors(torch.load(tmp_path / "published/model.pt", weights_only=True), decoder_tensors(2))

    saved = torch.load(training, weights_only=True)
    half = {name: tensor.bfloat16() for name, tensor in saved["ema"].items()}
    torch.save({"ema": half}, tmp_path / "half.pt")
    assert "not compared" not in succeed("training", "rae", tmp_path / "half.pt", tmp_path / "half", *flags)
    decoder = {name: tensor.bfloat16().float() for name, tensor in decoder_tensors(2).items()}
    assert_equal_tensors(RAEModel.from_pretrained(tmp_path / "half").decoder.state_dict(), decoder)

    saved["ema"] = {f"module._orig_mod.{name}": t for name, t in saved["ema"].items() if name.startswith("decoder.")}
    torch.save(saved, training)
    assert "it was not compared" in succeed("training", "rae", training, tmp_path / "wrapped", *flags)
    assert_equal_tensors(RAEModel.from_pretrained(tmp_path / "wrapped").decoder.state_dict(), decoder_tensors(2))


def test_training_checkpoints_that_do_not_fit(training, published, encoder, flags, tmp_path, refuse):
    """Another encoder than the checkpoint's own, weights that it does not have, and decoders given for checkpoints."""
    other = shutil.copytree(encoder, tmp_path / "other")
    name = "embeddings.patch_embeddings.projection.bias"
    edit_tensors(other / "model.safetensors", lambda tensors: {**tensors, name: tensors[name] + 1})
    output = tmp_path / "rae"
    message = refuse("training", "rae", training, output, "--encoder", other, *flags[2:])
    assert f"'{name}' of {other} differs" in message
    assert "use --from training" in refuse("published", "rae", training, output, *flags)
    assert "use --from published" in refuse("training", "rae", published, output, *flags)
    saved = torch.load(training, weights_only=True)
    for change, words in (
        ({3: torch.ones(1)}, "'ema' of {} has the key 3, expected names"),
        ({f"encoder.encoder.{name}": 1}, f"'{name}' of the checkpoint's encoder is no tensor"),
    ):
        torch.save({"ema": {**saved["ema"], **change}}, tmp_path / "bad.pt")
        message = refuse("training", "rae", tmp_path / "bad.pt", output, *flags)
        assert words.format(tmp_path / "bad.pt") in message
    del saved["ema"]
    torch.save(saved, training)
    assert "has no 'ema'" in refuse("training", "rae", training, output, *flags)


def test_published_decoders_that_do_not_fit(encoder, flags, tmp_path, refuse):
    """Keys, shapes, sizes and statistics: both values are named."""

    def refused(tensors, *arguments):
        torch.save(tensors, tmp_path / "model.pt")
        return refuse("published", "rae", tmp_path / "model.pt", tmp_path / "rae", *(arguments or flags))

    good = decoder_tensors()
    assert "lacks 1 keys, the first is 'decoder_norm.bias'" in refused(
        {name: tensor for name, tensor in good.items() if name != "decoder_norm.bias"}
    )
    assert "lacks 16 keys, the first is 'decoder_layers.0." in refused(
        {name: tensor for name, tensor in good.items() if not name.startswith("decoder_layers.0.")}
    )
    assert "has unexpected 2 keys, the first is 'a'" in refused({**good, "b": torch.ones(1), "a": torch.ones(1)})
    assert "(25,), expected (24,)" in refused({**good, "decoder_norm.bias": torch.ones(25)})
    assert "floating-point" in refused({**good, "decoder_norm.bias": torch.ones(24, dtype=torch.int64)})
    assert "floating-point" in refused({**good, "decoder_norm.bias": 1})
    assert "other ranks" in refused({**good, "decoder_pos_embed": torch.ones(257, 24)})
    assert "of each of -1 tokens" in refused({**good, "decoder_pos_embed": torch.ones(1, 0, 24)})
    assert "makes 13 values of each of 256 tokens" in refused({**good, "decoder_pred.weight": torch.ones(13, 24)})
    assert "gives 64 channels, " in refused({**good, "decoder_embed.weight": torch.ones(24, 48)})
    small = {**good, "decoder_pos_embed": sincos_position_table(24, 4)}
    assert "16x16 tokens" in refused(small) and "4x4 (56 px would give them)" in refused(small)
    message = refused(good, "--encoder", encoder)
    assert "--decoder_num_attention_heads: " in message and "width 24, 2 blocks and MLP width 40" in message
    assert "divisor of the width 24, got 5" in refused(good, *flags[:2], "--decoder_num_attention_heads", 5)
    assert "--encoder: 'nowhere'" in refused(good, "--encoder", "nowhere", *flags[2:])
    assert "encoder_layers" in refused(good, *flags, "--encoder_layers", 7)
    for stats, words in (
        ({"mean": torch.zeros(WIDTH, GRID, GRID)}, "expected 'mean' and 'var'"),
        (
            {"mean": torch.zeros(WIDTH, 4, 4), "var": torch.ones(WIDTH, 4, 4)},
            "(64, 4, 4), the latents (64, 16, 16)",
        ),
        ({"mean": 0.0, "var": 1.0}, "is a float"),
        ({**latent_stats(), "mean": torch.zeros(WIDTH, GRID, GRID, dtype=torch.int64)}, "'mean' in {} is torch.int64"),
        ({**latent_stats(), "var": -latent_stats()["var"]}, "'var' in {} goes down to -1"),
        ({**latent_stats(), "var": latent_stats()["var"] * torch.nan}, "'var' in {} has values that are not finite"),
        ({**latent_stats(), "mean": latent_stats()["mean"] / 0}, "'mean' in {} has values that are not finite"),
    ):
        words = words.format(tmp_path / "stat.pt")
        torch.save(stats, tmp_path / "stat.pt")
        assert words in refused(good, *flags, "--stats", tmp_path / "stat.pt")
    assert "--stats: " in refused(good, *flags, "--stats", tmp_path / "missing.pt")


@pytest.mark.parametrize("size, heads", [((768, 12, 3072), 12), ((1024, 24, 4096), 16), ((1152, 28, 4096), 16)])
def test_known_sizes_have_known_heads(size, heads):
    """ViT-B, L and XL need no flag."""
    names = ("hidden_size", "num_hidden_layers", "intermediate_size")
    sizes = {f"decoder_{name}": value for name, value in zip(names, size, strict=True)}
    assert number_of_heads(sizes, None, "--") == heads
    assert number_of_heads(sizes, 8, "--") == 8


# Input and output -----------------------------------------------------------------------------------------------------


class Trap:
    """Touches a file when it is unpickled by a reader that runs what a pickle asks for."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


@pytest.mark.parametrize("source", ["published", "training", "stats"])
def test_code_in_a_pickle_does_not_run(published, training, flags, tmp_path, refuse, source):
    """A file with anything but tensors and numbers in it is refused."""
    files = {"published": published, "training": training, "stats": tmp_path / "stat.pt"}
    held = latent_stats() if source == "stats" else torch.load(files[source], weights_only=True)
    torch.save({**held, "trap": Trap(tmp_path / "sprung")}, files[source])
    if source == "stats":
        flags += ["--stats", files["stats"]]
    kind, file = ("published", published) if source == "stats" else (source, files[source])
    message = refuse(kind, "rae", file, tmp_path / "rae", *flags)
    assert "open" in message and "was not run" in message
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"hello world", b"\x80\x02}q\x00.", b"PK\x03\x04 cut off", bytes(range(256))])
def test_damaged_files(tmp_path, flags, refuse, content):
    """One line for whatever is no checkpoint."""
    (tmp_path / "model.pt").write_bytes(content)
    message = refuse("published", "rae", tmp_path / "model.pt", tmp_path / "rae", *flags)
    assert "model.pt is no file of tensors" in message


def test_wrong_sides_are_named(folders, rae, published, tmp_path, flags, refuse):
    """A folder or file of another side is said to be one, with the flag for it."""
    diffusers, output = folders["mae", False], tmp_path / "new"
    assert "use --from rae" in refuse("diffusers", "published", rae, output)
    assert "use --from diffusers" in refuse("rae", "published", diffusers, output)
    assert "use --from diffusers" in refuse("published", "rae", diffusers, output, *flags)
    assert "use --from published" in refuse("rae", "diffusers", published, output)
    assert "does not exist, expected an RAE's folder" in refuse(
        "published", "rae", tmp_path / "nothing", output, *flags
    )
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refuse("rae", "published", tmp_path / "empty", output)
    (tmp_path / "empty" / "config.json").write_text("{")
    assert "is no model config" in refuse("rae", "published", tmp_path / "empty", output)
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    assert "AutoencoderKL, expected an RAE" in refuse("rae", "published", tmp_path / "empty", output)
    torch.save([1, 2], tmp_path / "list.pt")
    assert "no checkpoint that is known here" in refuse("published", "rae", tmp_path / "list.pt", output, *flags)


def test_command_lines_that_cannot_be(rae, published, tmp_path, flags, refuse):
    """Settings that would be ignored, sides that are the same, and values out of range."""
    output = tmp_path / "new"
    assert "--to: expected another side" in refuse("rae", "rae", rae, output)
    assert "invalid choice: 'training'" in refuse("rae", "training", rae, output)
    assert "--encoder: expected nothing for a folder of this suite" in refuse("rae", "published", rae, output, *flags)
    assert "--weights: expected ema, got raw" in refuse(
        "published", "rae", published, output, "--weights", "raw", *flags
    )
    assert "--encoder: expected a Hub id" in refuse("published", "rae", published, output)
    assert "--encoder_input_size" in refuse("published", "rae", published, output, *flags, "--encoder_input_size", 0)
    assert f"--json: {tmp_path} is a folder" in refuse("rae", "published", rae, output, "--json", tmp_path)
    assert "--json: " in refuse("rae", "published", rae, output, "--json", published / "report.json")
    for below in ("x", "x/y"):
        assert f"--output: {published} is a file" in refuse("rae", "published", rae, published / below)


def test_output_is_not_replaced_unasked(rae, published, tmp_path, succeed, refuse):
    """A filled --output needs --overwrite, which replaces converted models only, and never the input."""
    output = tmp_path / "out" / "model"
    output.mkdir(parents=True)
    succeed("rae", "published", rae, output)  # an empty folder is no obstacle
    before = (output / "model.pt").read_bytes()
    assert "or --overwrite" in refuse("rae", "published", rae, output)
    (output / "stat.pt").unlink()
    succeed("rae", "published", rae, output, "--overwrite")
    assert (output / "model.pt").read_bytes() == before and (output / "stat.pt").is_file()
    assert sorted(os.listdir(output.parent)) == ["model"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("words")
    assert "no converted model" in refuse("rae", "published", rae, tmp_path / "other", "--overwrite")
    assert "or --overwrite" in refuse("rae", "published", rae, published)
    assert "holds --input" in refuse("rae", "published", rae, rae, "--overwrite")


@pytest.mark.parametrize("kind", ["value", "name", "nan"])
def test_wrongly_written_model_leaves_nothing(script, folders, tmp_path, refuse, monkeypatch, kind):
    """What was written is loaded and compared: exit code 1, and neither --output nor the folders above it are there."""
    name = "decoder.decoder_norm.bias"

    def write(model, folder):
        script.write_rae(model, folder)
        changes = {"value": {name: torch.ones(24)}, "name": {"other": torch.ones(24)}, "nan": {}}[kind]
        edit_tensors(folder / "model.safetensors", lambda tensors: {**tensors, **changes})

    monkeypatch.setitem(script.WRITERS, "rae", write)
    folder = folders["dinov2", False]
    if kind == "nan":  # is not equal to itself
        folder = shutil.copytree(folder, tmp_path / "source")
        edit_tensors(folder / MODEL_FILE, lambda tensors: {**tensors, name: torch.full((24,), torch.nan)})
    message = refuse("diffusers", "rae", folder, tmp_path / "deep" / "er" / "rae", code=1)
    assert (name if kind != "name" else "'other'") in message and "nothing was written" in message


@pytest.mark.parametrize("where", ["latents", "reconstructions"])
def test_images_that_differ_leave_nothing(script, rae, tmp_path, refuse, monkeypatch, where):
    """Equal tensors are not enough: images through both models must agree to 1e-4."""
    name = {"latents": "_normalize_latents", "reconstructions": "_denormalize_image"}[where]
    method = getattr(AutoencoderRAE, name)
    monkeypatch.setattr(AutoencoderRAE, name, lambda self, x: method(self, x) + 2e-2)
    message = refuse("rae", "diffusers", rae, tmp_path / "diffusers", code=1)
    assert message.startswith(f"error: {where} differ by 0.0")
    monkeypatch.setattr(AutoencoderRAE, name, lambda self, x: method(self, x) * torch.nan)
    assert "differ by nan" in refuse("rae", "diffusers", rae, tmp_path / "diffusers", code=1)


def test_force_accepts_what_was_named_only(rae, tmp_path, succeed, refuse, monkeypatch):
    """A learnt table excuses other reconstructions, not other latents."""
    model = RAEModel.from_pretrained(rae)
    model.decoder.decoder_pos_embed.data += 0.1
    model.save_pretrained(tmp_path / "learnt")
    succeed("rae", "diffusers", tmp_path / "learnt", tmp_path / "diffusers", "--force")
    method = AutoencoderRAE._normalize_latents
    monkeypatch.setattr(AutoencoderRAE, "_normalize_latents", lambda self, x: method(self, x) + 2e-2)
    message = refuse("rae", "diffusers", tmp_path / "learnt", tmp_path / "other", "--force", code=1)
    assert message.startswith("error: latents differ by 0.0")


def test_command_line(published, encoder, tmp_path):
    """The real command: a conversion with its report, and one line for what is missing."""
    run_command(
        "scripts/convert_checkpoint.py", "--from", "published", "--to", "rae", "--input", published,
        "--encoder", encoder, "--decoder_num_attention_heads", 3,
        "--output", tmp_path / "rae", "--json", tmp_path / "report.json",
    )  # fmt: skip
    assert json.loads((tmp_path / "report.json").read_text())["images"]["latents"]["largest_difference"] == 0
    model = transformers.AutoModel.from_pretrained(tmp_path / "rae", trust_remote_code=True)
    assert_equal_tensors(model.decoder.state_dict(), decoder_tensors())
    done = run_command("scripts/convert_checkpoint.py", "--from", "rae", "--to", "published", check=False)
    assert done.returncode == 2
    assert done.stderr == "error: the following arguments are required: --input, --output\n"
