"""Files that the published code's trainer wrote (tests/cases/published), and RAEv2's SigLIP2: the numbers that the
published classes compute. Half a minute on a CPU."""

import json
import re

import pytest
import torch
import transformers
from conftest import PLAIN, ROOT, flags, run_command
from diffusers import AutoencoderRAE
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from modeling_rae import IMAGENET_MEAN, IMAGENET_STD, RAEConfig, RAEModel
from rae_suite.dit_networks import open_rae
from rae_suite.errors import ConfigError
from rae_suite.published_rae import AVERAGE_DRIFT
from rae_suite.rae_networks import build_rae, build_rae_config, read_latent_stats
from rae_suite.settings_dit import DiTModelConfig, LatentsConfig
from rae_suite.settings_rae import parse_config
from rae_suite.start_weights import read_decoder_start
from scripts import convert_checkpoint

FILES = ROOT / "tests" / "cases" / "published"
CHECKPOINT = FILES / "ep-0000001.pt"
ENCODERS = ROOT / "tests" / "parity" / "encoders"
ENCODER = ENCODERS / "dinov2"
OPTIONS = ["--encoder", ENCODER, "--encoder_input_size", 56, "--decoder_num_attention_heads", 3]
SHAPE = (32, 4, 4)  # of the latents


def convert(source, target, path, output, *arguments):
    """Runs the script in this process. Returns the notes of its report."""
    line = ["--from", source, "--to", target, "--input", path, "--output", output, *arguments]
    report = output.with_suffix(".json")
    convert_checkpoint.main([*map(str, line), "--json", str(report)])
    return json.loads(report.read_text())["notes"]


def refused(*arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        convert(*arguments)
    return str(caught.value)


def assert_close(found, expected, relative):
    """Within a share of the largest value, every number."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= relative * expected.abs().max()


# Training checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights, part", [(None, "ema"), ("ema", "ema"), ("raw", "model")])
def test_training_checkpoint(tmp_path, weights, part):
    """The averaged weights by default, the raw ones by name: latents and reconstructions of the published classes, and
    exactly the pretrained encoder, which is said where the checkpoint's own copy of it differs."""
    chosen = [] if weights is None else ["--weights", weights]
    done = run_command(
        "scripts/convert_checkpoint.py", "--from", "training", "--to", "rae", "--input", CHECKPOINT, *OPTIONS,
        "--output", tmp_path / "rae", *chosen,
    )  # fmt: skip
    said = re.search(
        r"note +the encoder has the pretrained weights of .* by rounding, up to (\S+) of a number", done.stdout
    )
    assert (said is not None) == (part == "ema")
    assert said is None or 1e-8 < float(said[1]) < 1e-6
    model, expected = RAEModel.from_pretrained(tmp_path / "rae"), load_file(FILES / "expected.safetensors")
    with torch.no_grad():
        latent = model.encode(expected["pixels"]).latent
        assert_close(latent, expected[f"{part}.latent"], 1e-4 if part == "ema" else 1e-5)
        assert_close(model.decode(expected[f"{part}.latent"]).sample, expected[f"{part}.reconstruction"], 1e-5)
        assert_close(model.decode(latent).sample, expected[f"{part}.reconstruction"], 1e-5)
    pretrained = transformers.AutoModel.from_pretrained(ENCODER).state_dict()
    for name, tensor in model.encoder.state_dict().items():
        assert torch.equal(tensor, pretrained[name]), name
    saved = torch.load(CHECKPOINT, weights_only=True)[part]
    for name, tensor in model.decoder.state_dict().items():
        assert torch.equal(tensor, saved[f"decoder.{name}"]), name


def averaged(tensors, decay, steps):
    """What an average in float32 makes of numbers that do not change."""
    shadow = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        for _ in range(steps):
            shadow[name].mul_(decay).add_(tensor, alpha=1 - decay)
    return shadow


@pytest.mark.parametrize(
    "name, change",
    [
        ("rounded to half precision", lambda tensor: tensor.half().float()),
        ("fine-tuned a little", lambda tensor: tensor + 1e-4 * torch.randn_like(tensor)),
        ("one number", lambda tensor: tensor.index_put((torch.tensor(0),), tensor[0] * 1.001)),
        ("nan", lambda tensor: tensor * torch.nan),
        ("other shape", lambda tensor: tensor[:-1]),
        ("integers", lambda tensor: tensor.long()),
        ("zeros", lambda tensor: tensor * 0),
    ],
)
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_another_encoder_is_refused(tmp_path, weights, name, change):
    """However little it differs from the pretrained one, as long as no average explains that; --force does not help."""
    torch.manual_seed(0)
    saved = torch.load(CHECKPOINT, weights_only=True)
    key = "encoder.encoder.encoder.layer.1.mlp.fc1.weight"
    for part in ("model", "ema"):
        saved[part][key] = change(saved["model"][key])
    torch.save(saved, tmp_path / "other.pt")
    message = refused(
        "training", "rae", tmp_path / "other.pt", tmp_path / "rae", *OPTIONS, "--weights", weights, "--force"
    )
    assert f"--encoder: 'encoder.layer.1.mlp.fc1.weight' of {ENCODER} differs" in message
    assert not (tmp_path / "rae").exists()


@pytest.mark.parametrize("decay, dtype", [(0.9978, torch.float32), (0.9999, torch.float32), (0.9999, torch.bfloat16)])
def test_a_long_average_is_the_same_encoder(tmp_path, decay, dtype):
    """Thousands of steps move each number by a share of it that depends on the decay alone, also behind the prefixes of
    wrappers and in another precision; raw weights are not averaged, so there the same difference is refused."""
    saved = torch.load(CHECKPOINT, weights_only=True)
    encoder = {name: tensor for name, tensor in saved["model"].items() if name.startswith("encoder.")}
    drifted = averaged(encoder, decay, 3000)
    largest = max(((a - encoder[n]).abs() / encoder[n].abs().clamp(min=1e-30)).max().item() for n, a in drifted.items())
    assert 1e-6 < largest < AVERAGE_DRIFT
    for part in ("model", "ema"):
        whole = {**saved[part], **drifted}
        saved[part] = {f"module._orig_mod.{name}": tensor.to(dtype) for name, tensor in whole.items()}
    torch.save(saved, tmp_path / "long.pt")
    notes = convert("training", "rae", tmp_path / "long.pt", tmp_path / "rae", *OPTIONS)
    if dtype == torch.float32:
        assert "differs by rounding" in notes[0]
        raw = [*OPTIONS, "--weights", "raw"]
        assert "differs from the encoder's" in refused("training", "rae", tmp_path / "long.pt", tmp_path / "raw", *raw)


# Statistics -----------------------------------------------------------------------------------------------------------


def numbers(shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.05


def own_statistics() -> dict:
    """{file name: what it holds}: other shapes and types that the published code takes."""
    channel, position = (32, 1, 1), (1, 4, 4)
    return {
        "mixed.pt": {"mean": numbers((1, *SHAPE), 1), "var": numbers(channel, 2)},
        "positions.pt": {"mean": numbers(position, 1), "var": numbers(position[1:], 2)},
        "channel.safetensors": {"mean": numbers(channel, 1), "var": numbers(channel, 2)},
        "no_mean.safetensors": {"var": numbers(SHAPE, 2)},
        "scalars.pt": {"mean": torch.tensor(0.3), "var": torch.tensor([2.0])},
        "double.pt": {"mean": numbers(SHAPE, 1).double(), "var": numbers((1, *SHAPE), 2).double()},
        "none_scalar.pt": {"mean": None, "var": torch.tensor(2.0)},
    }


PUBLISHED_STATISTICS = ["stat_none.pt", "stat_nokey.pt", "stat_channel.pt", "stat_batch.pt"]


@pytest.fixture
def statistics(tmp_path):
    """A function that gives the path of a file, by its name."""

    def path(name):
        if name in PUBLISHED_STATISTICS:
            return FILES / name
        write = save_file if name.endswith(".safetensors") else torch.save
        write(own_statistics()[name], tmp_path / name)
        return tmp_path / name

    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of the published RAE without statistics."""
    folder = tmp_path_factory.mktemp("plain") / "rae"
    convert("training", "rae", CHECKPOINT, folder, *OPTIONS, "--weights", "raw")
    return folder


@torch.no_grad()
def check_statistics(model, plain, file):
    """Latents and reconstructions are those of the published code: (z - mean) / sqrt(var + 1e-5) by torch's own
    broadcasting over (B, C, h, w), nothing subtracted where there is no mean, and the inverse before decoding."""
    held = load_file(file) if file.suffix == ".safetensors" else torch.load(file)
    mean = held.get("mean")
    mean, std = (0 if mean is None else mean.double()), (held["var"].double() + 1e-5).sqrt()
    pixels = load_file(FILES / "expected.safetensors")["pixels"]
    base = RAEModel.from_pretrained(plain)
    raw = base.encode(pixels).latent.double()
    assert_close(model.encode(pixels).latent.double(), (raw - mean) / std, 1e-6)
    latent = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    assert_close(model.decode(latent).sample, base.decode((latent.double() * std + mean).float()).sample, 1e-5)
    has_mean = held.get("mean") is not None
    assert model.config.latent_stats_have_mean == has_mean == ("latent_mean" in model.state_dict())
    assert model.latent_var.shape == SHAPE and model.latent_var.dtype == torch.float32


@pytest.mark.parametrize("name", [*PUBLISHED_STATISTICS, *own_statistics()])
def test_statistics(statistics, plain, tmp_path, name):
    """Wherever they are read: the conversion, the settings of both stages' training, a call of the model, and the
    model's folder, which keeps a missing mean missing."""
    file = statistics(name)
    options = [*OPTIONS, "--weights", "raw", "--stats", file]
    convert("training", "rae", CHECKPOINT, tmp_path / "rae", *options)
    model = RAEModel.from_pretrained(tmp_path / "rae")
    check_statistics(model, plain, file)
    assert ("latent_mean" in load_file(tmp_path / "rae" / "model.safetensors")) == (model.latent_mean is not None)

    settings = {"encoder": ENCODER, "encoder_input_size": 56, "image_size": 64, "decoder_hidden_size": 48,
                "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 3, "decoder_intermediate_size": 96,
                "decoder_patch_size": 16, "latent_stats": file, "init_from": plain, "encoder_config": "{}",
                "encoder_weights": "pretrained"}  # fmt: skip
    config = parse_config(flags({f"model.{key}": value for key, value in settings.items()}))
    rae_config = build_rae_config(config.model)
    assert rae_config.latent_stats_have_mean == (model.latent_mean is not None)
    trained = build_rae(config.model, 0, rae_config).eval()
    trained.decoder.load_state_dict(read_decoder_start(config.model.init_from, rae_config))
    check_statistics(trained, plain, file)
    trained.save_pretrained(tmp_path / "trained", include_encoder=False)
    check_statistics(RAEModel.from_pretrained(tmp_path / "trained"), plain, file)

    stage2 = open_rae(DiTModelConfig(rae=str(plain)), LatentsConfig(stats=str(file)))
    check_statistics(stage2, plain, file)
    stage2.save_pretrained(tmp_path / "stage2")
    check_statistics(RAEModel.from_pretrained(tmp_path / "stage2"), plain, file)

    model.set_latent_stats(torch.ones(SHAPE), torch.ones(SHAPE))  # one that has other statistics already
    held = read_latent_stats(file, model.config, "--stats")
    model.set_latent_stats(**held)
    check_statistics(model, plain, file)


def test_statistics_without_mean_to_every_side(plain, tmp_path):
    """The published form has None again, diffusers zeros, with a note; both ways back end without a mean."""
    convert(
        "training", "rae", CHECKPOINT, tmp_path / "rae", *OPTIONS, "--weights", "raw", "--stats", FILES / "stat_none.pt"
    )
    first = load_file(tmp_path / "rae" / "model.safetensors")
    notes = convert("rae", "published", tmp_path / "rae", tmp_path / "published")
    held = torch.load(tmp_path / "published" / "stat.pt", weights_only=True)
    assert held["mean"] is None and torch.equal(held["var"], first["latent_var"])
    flags = notes[0].removeprefix("to read it back: ").replace("stat.pt", str(tmp_path / "published/stat.pt")).split()
    convert("published", "rae", tmp_path / "published" / "model.pt", tmp_path / "back", *flags)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert first.keys() == back.keys() and all(torch.equal(first[name], back[name]) for name in first)
    assert (tmp_path / "rae/config.json").read_text() == (tmp_path / "back/config.json").read_text()


def test_folders_are_read_strictly(tmp_path):
    """A mean that the config does not have, or has and the file has not, is an error; a config from before the setting
    means a mean."""
    convert("training", "rae", CHECKPOINT, tmp_path / "rae", *OPTIONS, "--stats", FILES / "stat_none.pt")
    model, file = RAEModel.from_pretrained(tmp_path / "rae"), tmp_path / "rae" / "model.safetensors"
    without = load_file(file)
    save_file({**without, "latent_mean": torch.zeros(SHAPE)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="1 unexpected keys, the first is 'latent_mean'"):
        RAEModel.from_pretrained(tmp_path / "rae")
    text = json.loads((tmp_path / "rae" / "config.json").read_text())
    assert text.pop("latent_stats_have_mean") is False
    (tmp_path / "rae" / "config.json").write_text(json.dumps(text))
    old = RAEModel.from_pretrained(tmp_path / "rae")
    assert old.config.latent_stats_have_mean and torch.equal(old.latent_mean, torch.zeros(SHAPE))
    assert torch.equal(old.latent_var, model.latent_var)
    save_file(without, file, {"format": "pt"})
    with pytest.raises(ValueError, match="1 missing keys, the first is 'latent_mean'"):
        RAEModel.from_pretrained(tmp_path / "rae")


@pytest.mark.parametrize(
    "stats, words",
    [
        ({"mean": torch.zeros(48, 4, 4), "var": torch.ones(SHAPE)}, r"'mean' in .* \(48, 4, 4\), .*\(32, 4, 4\)"),
        ({"mean": None, "var": torch.ones(32, 2, 2)}, r"'var' in .* has shape \(32, 2, 2\), .*\(32, 4, 4\)"),
        ({"var": torch.ones(32)}, r"'var' in .* has shape \(32,\), .* one value a channel is \(32, 1, 1\)"),
        ({"var": torch.ones(4)}, r"'var' in .* has shape \(4,\)"),  # torch would repeat it along the width
        ({"var": torch.ones(2, *SHAPE)}, r"'var' in .* has shape \(2, 32, 4, 4\), .*\(32, 4, 4\)"),
        ({"var": torch.ones(0, 4, 4)}, r"'var' in .* has shape \(0, 4, 4\)"),
        ({"mean": torch.zeros(SHAPE)}, r"holds \['mean'\], expected 'mean' and 'var', or 'var' without a mean"),
        ({"mean": torch.zeros(SHAPE), "var": None}, "'var' in .* is a NoneType, expected a tensor"),
        ({"var": torch.ones(SHAPE).double() * 1e300}, "'var' in .* has values that are not finite"),
        ({"mean": torch.zeros(32, 1, 1).long(), "var": torch.ones(SHAPE)}, "'mean' in .* is torch.int64"),
        ({"var": -torch.ones(32, 1, 1)}, "'var' in .* goes down to -1, expected at least 0"),
    ],
)  # fmt: skip
def test_statistics_that_do_not_fit(tmp_path, stats, words):
    """One line with what was found and what the latents are."""
    torch.save(stats, tmp_path / "stat.pt")
    message = refused("training", "rae", CHECKPOINT, tmp_path / "rae", *OPTIONS, "--stats", tmp_path / "stat.pt")
    assert re.search(f"--stats: .*{words}", message) and "\n" not in message


def test_training_with_statistics_without_mean(images, tmp_path):
    """train_rae.py takes the published file, its checkpoints and `final/` have no mean, and the run goes on with it."""
    settings = {
        **PLAIN,
        "data.path": images,
        "data.resize_size": "72",
        "train.output_dir": tmp_path / "run",
        "train.max_steps": "1",
        "model.encoder": ENCODER,
        "model.encoder_weights": "pretrained",
        "model.encoder_config": "{}",
        "model.encoder_input_size": "56",
        "model.image_size": "64",
        "model.decoder_patch_size": "16",
        "model.latent_stats": FILES / "stat_none.pt",
        "gan.weight": "0",
    }
    run_command("train_rae.py", *flags(settings))
    run_command("train_rae.py", *flags({**settings, "train.max_steps": "2"}))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"train"' in line] == [1, 2]
    model = RAEModel.from_pretrained(tmp_path / "run" / "final")
    assert model.latent_mean is None
    assert torch.equal(model.latent_var, torch.load(FILES / "stat_none.pt")["var"])


# diffusers' statistics ------------------------------------------------------------------------------------------------

# the smallest, the mean and the largest variance of DINOv2-B's latents, one of nearly 0, and 0 itself
VARIANCES = torch.tensor([0.00532, 0.775, 9.128, 1e-5, 0.0])


@pytest.fixture
def wide_rae():
    """An RAE that AutoencoderRAE can hold, 64 channels of 16 x 16, with such variances."""
    sizes = dict(hidden_size=64, patch_size=14, image_size=518, num_attention_heads=1, num_hidden_layers=1)
    encoder = transformers.Dinov2WithRegistersConfig(**sizes)
    decoder = dict(decoder_hidden_size=24, decoder_num_hidden_layers=1, decoder_num_attention_heads=3)
    torch.manual_seed(0)
    config = RAEConfig(
        encoder_config=encoder, decoder_intermediate_size=40, decoder_patch_size=2, use_latent_stats=True, **decoder
    )
    model = RAEModel(config).eval()
    var = VARIANCES.repeat(64 * 256 // len(VARIANCES) + 1)[: 64 * 256].view(64, 16, 16)
    model.set_latent_stats(torch.randn(64, 16, 16), var)
    return model


@pytest.mark.parametrize("has_mean", [True, False])
def test_diffusers_divides_by_the_same(wide_rae, tmp_path, has_mean):
    """diffusers divides by (std + 1e-5), this suite by sqrt(var + 1e-5). Both ways of the conversion keep the divisor
    to the rounding of float32. sqrt(var + 1e-5) as std, which is what diffusers makes of published statistics, is
    1.4e-4 off at the smallest variance of DINOv2-B, sqrt(var) 8e-4."""
    if not has_mean:
        wide_rae.set_latent_stats(None, wide_rae.latent_var.clone())
    wide_rae.save_pretrained(tmp_path / "rae")
    notes = convert("rae", "diffusers", tmp_path / "rae", tmp_path / "diffusers")
    assert any("AutoencoderRAE has zeros" in note for note in notes) != has_mean
    twin = AutoencoderRAE.from_pretrained(tmp_path / "diffusers")
    var, mean = wide_rae.latent_var.double(), wide_rae.latent_mean.double() if has_mean else 0.0
    divisor = (var + 1e-5).sqrt()
    assert (twin._latents_mean == mean).all()
    assert ((twin._latents_std.double() + 1e-5) / divisor - 1).abs().max() < 6e-8
    tokens = torch.randn(1, 64, 16, 16, generator=torch.Generator().manual_seed(1))
    assert_close(twin._normalize_latents(tokens).double(), (tokens.double() - mean) / divisor, 3e-7)
    assert ((divisor + 1e-5) / divisor - 1)[var == VARIANCES[0]].max() == pytest.approx(1.4e-4, rel=0.05)
    assert (1 - (var.sqrt() + 1e-5) / divisor)[var == VARIANCES[0]].max() == pytest.approx(8e-4, rel=0.05)

    convert("diffusers", "rae", tmp_path / "diffusers", tmp_path / "back")
    back = RAEModel.from_pretrained(tmp_path / "back")
    assert (back.latent_mean is not None) == has_mean
    assert ((back.latent_var.double() + 1e-5).sqrt() / divisor - 1).abs().max() < 2e-7
    pixels = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = wide_rae.encode(pixels).latent
        assert_close(back.encode(pixels).latent, expected, 3e-7)
        assert_close(twin.encode(pixels).latent, expected, 1e-6)


# RAEv2's SigLIP2 ------------------------------------------------------------------------------------------------------

SIGLIP = ["--encoder", ENCODERS / "siglip2", "--encoder_input_size", 64, "--decoder_num_attention_heads", 3]
RAEV2 = ["--encoder_keep_final_affine", "--image_mean", *IMAGENET_MEAN, "--image_std", *IMAGENET_STD]


@pytest.fixture
def siglip_decoder(tmp_path):
    """A published decoder for 4 x 4 tokens of width 32."""
    saved = torch.load(CHECKPOINT, weights_only=True)["model"]
    torch.save(
        {n.removeprefix("decoder."): t for n, t in saved.items() if n.startswith("decoder.")}, tmp_path / "model.pt"
    )
    return tmp_path / "model.pt"


@torch.no_grad()
def raev2_tokens(pixels, layers):
    """RAEv2's latents of SigLIP2, written out: ImageNet's mean and std, every chosen block's output through the final
    LayerNorm with its weight and bias; of several blocks the mean, and the last one's spatial mean added."""
    model = transformers.SiglipVisionModel.from_pretrained(ENCODERS / "siglip2").eval()
    model = getattr(model, "vision_model", model)
    norm = model.post_layernorm
    assert (norm.weight - 1).abs().max() > 0.05 and norm.bias.abs().max() > 0.03
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    out = model((pixels - mean) / std, output_hidden_states=True, interpolate_pos_encoding=True)
    if layers is None:
        return out.last_hidden_state
    blocks = []
    norm_input = []
    norm.register_forward_pre_hook(lambda module, arguments: norm_input.append(arguments[0]))
    model((pixels - mean) / std, interpolate_pos_encoding=True)
    for layer in layers:
        hidden = norm_input[0] if layer == model.config.num_hidden_layers - 1 else out.hidden_states[layer + 1]
        blocks.append(F.layer_norm(hidden, (32,), norm.weight, norm.bias, norm.eps))
    return torch.stack(blocks).mean(0) + blocks[-1].mean(1, keepdim=True)


@pytest.mark.parametrize("layers", [None, [0, 1], [0]])
def test_raev2s_siglip2(siglip_decoder, tmp_path, layers):
    """Through the converter's flags and back with those that it prints, through a run's settings, and through files
    with and without the encoder; without the flags the latents are others, and that is said."""
    chosen = [
        "--no_denormalize_output",
        *(["--encoder_add_spatial_mean", "--encoder_layers", *layers] if layers else []),
    ]
    notes = convert("published", "rae", siglip_decoder, tmp_path / "rae", *SIGLIP, *RAEV2, *chosen)
    assert notes == []
    model = RAEModel.from_pretrained(tmp_path / "rae")
    pixels = load_file(FILES / "expected.safetensors")["pixels"]
    expected = raev2_tokens(pixels, layers)

    def check(rae):
        with torch.no_grad():
            assert_close(rae.encode(pixels).latent.flatten(2).transpose(1, 2), expected, 1e-5)
        assert rae.config.image_mean == list(IMAGENET_MEAN) and rae.config.image_std == list(IMAGENET_STD)

    check(model)
    names = [name for name in load_file(tmp_path / "rae" / "model.safetensors") if "post_layernorm" in name]
    assert len(names) == 2  # once, not a second time as a module of the RAE's own
    model.save_pretrained(tmp_path / "slim", include_encoder=False)
    check(RAEModel.from_pretrained(tmp_path / "slim"))

    (note,) = convert("rae", "published", tmp_path / "rae", tmp_path / "published")
    flags_back = note.removeprefix("to read it back: ").split()
    convert("published", "rae", tmp_path / "published" / "model.pt", tmp_path / "back", *flags_back)
    check(RAEModel.from_pretrained(tmp_path / "back"))

    settings = {"encoder": ENCODERS / "siglip2", "encoder_weights": "pretrained", "encoder_config": "{}",
                "encoder_input_size": 64, "image_size": 64, "decoder_patch_size": 16, "encoder_keep_final_affine": True,
                "image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}  # fmt: skip
    if layers:
        settings |= {"encoder_layers": layers, "encoder_add_spatial_mean": "true"}
    config = parse_config(flags({f"model.{key}": value for key, value in settings.items()}))
    check(build_rae(config.model, 0, build_rae_config(config.model)).eval())

    (note,) = convert("published", "rae", siglip_decoder, tmp_path / "plain", *SIGLIP, *chosen)
    assert "--encoder_keep_final_affine --image_mean 0.485 0.456 0.406 --image_std 0.229 0.224 0.225" in note
    with torch.no_grad():
        other = RAEModel.from_pretrained(tmp_path / "plain").encode(pixels).latent.flatten(2).transpose(1, 2)
    assert (other - expected).abs().max() > 0.1


def test_a_checkpoint_shows_whether_the_affine_part_is_kept(tmp_path):
    """RAEv2's training checkpoint has the weight and bias of SigLIP2's final LayerNorm, RAE's has not: each is refused
    with the other's flag."""
    saved = torch.load(CHECKPOINT, weights_only=True)["model"]
    decoder = {name: tensor for name, tensor in saved.items() if name.startswith("decoder.")}
    whole = load_file(ENCODERS / "siglip2" / "model.safetensors")
    vision = {f"encoder.model.{n}": t for n, t in whole.items() if n.startswith("vision_model.") and ".head." not in n}
    torch.save({"model": {**decoder, **vision}}, tmp_path / "raev2.pt")
    plain = {name: tensor for name, tensor in vision.items() if "post_layernorm" not in name}
    torch.save({"model": {**decoder, **plain}}, tmp_path / "rae.pt")
    raw = [*SIGLIP, "--weights", "raw"]
    assert convert("training", "rae", tmp_path / "raev2.pt", tmp_path / "kept", *raw, *RAEV2) == []
    assert convert("training", "rae", tmp_path / "rae.pt", tmp_path / "plain", *raw) == []
    message = refused("training", "rae", tmp_path / "raev2.pt", tmp_path / "other", *raw)
    assert "--encoder_keep_final_affine: expected it" in message
    message = refused("training", "rae", tmp_path / "rae.pt", tmp_path / "other", *raw, *RAEV2)
    assert "--encoder_keep_final_affine: expected not to be given" in message


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--image_std", 0, 1, 1], "--image_std: expected positive numbers, got [0.0, 1.0, 1.0]"),
        (["--image_mean", 0, 0, 0], "--image_mean: expected nothing for a folder"),
        (["--encoder_keep_final_affine"], "--encoder_keep_final_affine: expected nothing for a folder"),
    ],
)
def test_flags_that_cannot_be(plain, siglip_decoder, tmp_path, flags, words):
    source = ["rae", "published", plain] if "nothing" in words else ["published", "rae", siglip_decoder]
    flags = flags if "nothing" in words else [*SIGLIP, *flags]
    assert words in refused(*source, tmp_path / "new", *flags)
