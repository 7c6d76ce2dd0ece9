"""Published stage-2 files to this suite and back: the numbers that the published classes computed. Seconds on a CPU."""

import re

import pytest
import torch
import yaml
from conftest import ROOT, error_line, run_command, tiny_dit, tiny_rae
from safetensors.torch import load_file, save_file
from test_parity2 import OWN_CASES, load_model, published_config

from modeling_dit import PUBLISHED_HEAD, SIZES, RAEDiTModel, config_from_published
from modeling_rae import RAEModel
from rae_suite.dit_folders import load_pipeline_parts
from rae_suite.errors import ConfigError, RunError
from rae_suite.published_dit import PublishedDiTOptions, compare_dits, config_of_tensors
from rae_suite.rae_networks import give_latent_stats
from rae_suite.settings_dit import parse_config
from rae_suite.settings_rae import parse_config as parse_config_rae
from rae_suite.updates import learning_rate
from scripts import convert_checkpoint

MODELS = sorted(path.name for path in (OWN_CASES / "models").iterdir())
SIZES_OF = ("sample_size", "in_channels", "patch_size", "hidden_size", "num_layers", "num_attention_heads",
            "head_hidden_size", "head_num_layers", "head_num_attention_heads", "mlp_ratio", "num_classes",
            "use_qk_norm", "use_swiglu", "use_rms_norm", "use_rope", "use_pos_embed")  # fmt: skip


def published_state(name):
    return load_file(OWN_CASES / "models" / name / "state.safetensors")


def convert(source, target, path, output, *arguments, check=True):
    return run_command(
        "scripts/convert_checkpoint.py", "--from", source, "--to", target, "--input", path, "--output", output,
        *arguments, check=check,
    )  # fmt: skip


def assert_same_outputs(model, name):
    """The outputs that the published class had for this model."""
    tensors = {
        key: tensor.float() if tensor.is_floating_point() else tensor
        for key, tensor in load_file(OWN_CASES / f"model_unit/{name}.safetensors").items()
    }
    with torch.no_grad():
        output = model(tensors["x"], tensors["t"], tensors["y"]).sample
    assert (output - tensors["output"]).norm() <= 1e-5 * tensors["output"].norm()


@pytest.fixture(scope="module")
def rae(tmp_path_factory):
    """The folder of an RAE, latents (16, 4, 4), whose statistics have no mean, as in the published file."""
    folder = tmp_path_factory.mktemp("rae") / "rae"
    model = tiny_rae()
    give_latent_stats(model, None, torch.rand(16, 4, 4, generator=torch.Generator().manual_seed(0)) + 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name, tmp_path):
    """A published file becomes a transformer with the published outputs, and that a file with the same tensors."""
    saved = {key: tensor.float() for key, tensor in published_state(name).items()}
    torch.save(saved, tmp_path / "stage2_model.pt")
    classes = published_config(name)["num_classes"]
    no_null = [] if len(saved["y_embedder.embedding_table.weight"]) > classes else ["--num_classes", classes]
    done = convert("published", "dit", tmp_path / "stage2_model.pt", tmp_path / "dit", *no_null)
    assert f"{len(saved)} of {len(saved)} equal bit for bit" in done.stdout
    model, rae, _ = load_pipeline_parts(str(tmp_path / "dit"), "model")
    assert rae is None
    expected = {"use_pos_embed": True, **config_from_published(published_config(name))}
    assert {key: model.config[key] for key in SIZES_OF} == {key: expected.get(key) for key in SIZES_OF}
    assert_same_outputs(model, name)
    convert("dit", "published", tmp_path / "dit", tmp_path / "back")
    written = torch.load(tmp_path / "back/stage2_model.pt", weights_only=True)
    assert written.keys() == saved.keys() and all(torch.equal(written[key], saved[key]) for key in saved)
    params = yaml.safe_load((tmp_path / "back/stage2_params.yaml").read_text())
    theirs = published_config(name)
    assert params["class"] == theirs["kind"]
    dropout = {"class_dropout_prob": theirs["class_dropout_prob"]}  # no file holds it
    assert {**params["params"], **dropout, "kind": theirs["kind"]} == theirs
    assert not (tmp_path / "back/stat.pt").exists()


@pytest.mark.parametrize("weights", [None, "ema", "raw"])
def test_training_checkpoint(weights, tmp_path):
    """The averaged weights by default, the raw ones by name, without the prefixes of wrappers."""
    raw = {f"module._orig_mod.{key}": tensor.float() + 0.01 for key, tensor in published_state("dh_published").items()}
    held = {"step": 5, "epoch": 1, "model": raw, "ema": published_state("dh_published"), "optimizer": {"state": {}}}
    torch.save(held, tmp_path / "ep-0000001.pt")
    chosen = [] if weights is None else ["--weights", weights]
    done = convert("training", "dit", tmp_path / "ep-0000001.pt", tmp_path / "dit", *chosen)
    assert ("raw weights" if weights == "raw" else "averaged weights") in done.stdout
    model = load_pipeline_parts(str(tmp_path / "dit"), "model")[0]
    expected = load_model("dh_published")
    if weights == "raw":
        assert all(torch.equal(tensor, raw[f"module._orig_mod.{key}"]) for key, tensor in model.state_dict().items())
    else:
        assert compare_dits(expected, model)["tensors"]["different"] == []


def test_a_published_model_samples_with_one_command(rae, tmp_path):
    """The pipeline has the RAE, whose missing mean stays missing, and the published file's time shift; back, the
    statistics go along as stat.pt with mean None."""
    torch.save(published_state("dh_published"), tmp_path / "stage2_model.pt")
    done = convert("published", "dit", tmp_path / "stage2_model.pt", tmp_path / "dit", "--rae", rae)
    assert "variance, no mean" in done.stdout
    held = RAEModel.from_pretrained(tmp_path / "dit/rae")
    assert held.latent_mean is None and torch.equal(held.latent_var, RAEModel.from_pretrained(rae).latent_var)
    run_command("sample_dit.py", "--model", tmp_path / "dit", "--num_samples", 3, "--num_inference_steps", 3,
                "--output_dir", tmp_path / "samples")  # fmt: skip
    assert len(list((tmp_path / "samples/images").glob("*.png"))) == 3
    convert("dit", "published", tmp_path / "dit", tmp_path / "back")
    stats = torch.load(tmp_path / "back/stat.pt", weights_only=True)
    assert stats["mean"] is None and torch.equal(stats["var"], held.latent_var)


def test_statistics_of_a_file(tmp_path):
    """An RAE without statistics is refused, and takes those of --stats."""
    tiny_rae().save_pretrained(tmp_path / "rae")
    torch.save(published_state("dh_published"), tmp_path / "stage2_model.pt")
    arguments = ["published", "dit", tmp_path / "stage2_model.pt", tmp_path / "dit", "--rae", tmp_path / "rae"]
    done = convert(*arguments, check=False)
    assert done.returncode == 2 and "has no statistics of its latents" in error_line(done.stderr)
    assert not (tmp_path / "dit").exists()
    torch.save({"mean": None, "var": torch.full((16, 4, 4), 0.5)}, tmp_path / "stat.pt")
    convert(*arguments, "--stats", tmp_path / "stat.pt")
    held = RAEModel.from_pretrained(tmp_path / "dit/rae")
    assert held.latent_mean is None and (held.latent_var == 0.5).all()


@pytest.mark.parametrize("size, head, count", [("XL", PUBLISHED_HEAD, 838_675_796), ("S", PUBLISHED_HEAD, None),
                                               ("XL", {}, None), ("L", {}, None)])  # fmt: skip
def test_published_sizes(size, head, count):
    """The sizes of the published networks from their shapes alone, with the rotary tables and without."""
    with torch.device("meta"):
        model = RAEDiTModel(**SIZES[size], **head)
    state = model.state_dict()
    config, _ = config_of_tensors(state, "the file", PublishedDiTOptions(), "--input", "--")
    assert {key: config.get(key) for key in SIZES_OF} == {key: model.config[key] for key in SIZES_OF}
    assert count is None or sum(p.numel() for p in model.parameters()) == count
    without = {name: tensor for name, tensor in state.items() if "rope" not in name}
    config, notes = config_of_tensors(without, "the file", PublishedDiTOptions(), "--input", "--")
    assert not config["use_rope"] and "no rotary tables" in notes[0]
    assert config["num_attention_heads"] == SIZES[size]["num_attention_heads"]


@pytest.mark.parametrize("ratio", [4.0, 3.5, 2.7, 1.0])
@pytest.mark.parametrize("swiglu", [True, False])
def test_mlp_widths(ratio, swiglu):
    """Of both parts, whatever the ratio was."""
    with torch.device("meta"):
        state = RAEDiTModel(**SIZES["S"], **PUBLISHED_HEAD, mlp_ratio=ratio, use_swiglu=swiglu).state_dict()
    config, _ = config_of_tensors(state, "the file", PublishedDiTOptions(), "--input", "--")  # compares all shapes
    assert ratio == 2.7 or config["mlp_ratio"] == ratio


def test_a_head_as_wide_as_its_backbone(tmp_path):
    """Nothing in such a file says where the head begins."""
    model = tiny_dit(head_hidden_size=32, head_num_attention_heads=2, num_layers=3, head_num_layers=2)
    torch.save(model.state_dict(), tmp_path / "stage2_model.pt")
    arguments = ["published", "dit", tmp_path / "stage2_model.pt", tmp_path / "dit"]
    done = convert(*arguments, check=False)
    assert "--head_num_layers: expected how many of the 5 blocks" in error_line(done.stderr)
    convert(*arguments, "--head_num_layers", 2)
    found = load_pipeline_parts(str(tmp_path / "dit"), "model")[0]
    assert (found.config.num_layers, found.config.head_num_layers) == (3, 2)
    assert compare_dits(model, found)["velocity"]["largest_difference"] == 0


PRESETS = {"ditdh_s": ("S", True, 16), "ditdh_xl": ("XL", True, 16), "dit_xl": ("XL", False, 16),
           "ditdh_s_512": ("S", True, 32), "ditdh_xl_512": ("XL", True, 32)}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_published_models(name):
    """Of the published sizes and recipe, whose batch arithmetic holds; the header has the launch command."""
    size, head, grid = PRESETS[name]
    file = ROOT / "configs" / f"{name}.yaml"
    config = parse_config(["--config", str(file)])
    settings = {field: getattr(config.model, field) for field in (*SIZES["XL"], *PUBLISHED_HEAD)}
    assert settings == {**SIZES[size], **(PUBLISHED_HEAD if head else dict.fromkeys(PUBLISHED_HEAD))}
    header = file.read_text().split("\n\n")[0]
    assert f"train_dit.py --config configs/{name}.yaml" in header
    processes, micro, accumulated = map(int, re.search(r"(\d+) processes x (\d+) images x (\d+) acc", header).groups())
    assert processes * micro * accumulated == config.train.global_batch_size == 1024
    assert accumulated == config.train.gradient_accumulation_steps
    assert config.train.output_dir == f"runs/{name}"
    steps = [0, 40 * 1251 - 1, 420 * 1251, 800 * 1251]
    rates = [learning_rate(step, config.optimizer.lr, config.lr_schedule, 1251) for step in steps]
    assert rates == pytest.approx([2e-4, 2e-4, 1.1e-4, 2e-5] if head else [2e-4] * 4)
    assert config.ema.decay == (0.9995 if head else 0.9999)
    encoder = parse_config_rae(["--config", str(ROOT / f"configs/{config.model.rae.split('/')[1]}.yaml")]).model
    assert encoder.encoder_input_size // 14 == grid


def test_bad_input(rae, tmp_path):
    """One clear line, and nothing written."""
    state = published_state("dh_published")
    files = {name: tmp_path / f"{name}.pt" for name in ("good", "short", "long", "sigma", "decoder", "wrapped", "text")}
    torch.save(state, files["good"])
    torch.save({key: tensor for key, tensor in state.items() if "w3.bias" not in key}, files["short"])
    torch.save({**state, "extra.weight": torch.zeros(1)}, files["long"])
    torch.save({**state, "final_layer.linear.weight": torch.zeros(32, 64)}, files["sigma"])
    torch.save({"decoder_embed.weight": torch.zeros(4, 4)}, files["decoder"])
    torch.save({"model": state}, files["wrapped"])
    files["text"].write_text("no tensors")
    small = tiny_rae().config.encoder_config.to_dict() | {"hidden_size": 8}
    tiny_rae(encoder_config=small, encoder_input_size=32).save_pretrained(tmp_path / "other")
    save_file({"var": torch.ones(16, 8, 8)}, tmp_path / "stats.safetensors")
    for file, source, target, arguments, words in (
        ("short", "published", "dit", [], "lacks 5 keys, the first is 'blocks.0.mlp.w3.bias'"),
        ("long", "published", "dit", [], "has unexpected 1 keys, the first is 'extra.weight'"),
        ("sigma", "published", "dit", [], "'final_layer.linear.weight' of the stage-2 model in"),
        ("decoder", "published", "dit", [], "is no stage-2 model that is known here"),
        ("text", "published", "dit", [], "is no file of tensors"),
        ("wrapped", "published", "dit", [], "use --from training"),
        ("wrapped", "training", "dit", [], "has no 'ema' and so no ema weights"),
        ("good", "training", "dit", [], "use --from published"),
        ("good", "published", "dit", ["--num_classes", 5], "--num_classes: the label table of"),
        ("good", "published", "dit", ["--num_attention_heads", 4], "--num_attention_heads: "),
        ("good", "published", "dit", ["--rae", tmp_path / "other"], "--rae: "),
        ("good", "published", "dit", ["--rae", rae, "--stats", tmp_path / "stats.safetensors"], "--stats: "),
        ("good", "published", "dit", ["--stats", tmp_path / "stats.safetensors"], "--stats: expected nothing without"),
        ("good", "published", "dit", ["--encoder", "x"], "--encoder: expected nothing"),
        ("good", "published", "dit", ["--weights", "ema"], "--weights: expected nothing with --from published"),
        ("good", "published", "rae", ["--encoder", "x"], "is a stage-2 model, expected"),
        ("decoder", "published", "rae", ["--encoder", "x", "--rae", rae], "--rae: expected nothing unless --to dit"),
        ("good", "diffusers", "dit", [], "--from: expected published or training with a stage-2 model"),
        ("good", "dit", "rae", [], "--to: expected published with a stage-2 model"),
        ("good", "dit", "dit", [], "--to: expected another side"),
    ):
        line = ["--from", source, "--to", target, "--input", files[file], "--output", tmp_path / "out", *arguments]
        with pytest.raises(ConfigError) as caught:
            convert_checkpoint.main([*map(str, line)])
        assert words in str(caught.value), (words, caught.value)
        assert not (tmp_path / "out").exists()


def test_a_damaged_result_is_not_kept(tmp_path, monkeypatch):
    """The proof is of what was written: one number that changes on the way stops the conversion."""
    torch.save(published_state("guide"), tmp_path / "stage2_model.pt")
    write = convert_checkpoint.write_own_dit

    def damaged(source, rae, folder):
        write(source, rae, folder)
        file = folder / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        tensors["t_embedder.W"][3] += 1e-3
        save_file(tensors, file)

    monkeypatch.setattr(convert_checkpoint, "write_own_dit", damaged)
    line = ["--from", "published", "--to", "dit", "--input", tmp_path / "stage2_model.pt", "--output", tmp_path / "o"]
    with pytest.raises(RunError, match="1 tensors changed, the first is 't_embedder.W'"):
        convert_checkpoint.main([*map(str, line)])
    assert not (tmp_path / "o").exists()
