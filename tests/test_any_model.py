"""Whatever --model is given, in every command that takes a model: checkpoints, run folders, files of the published
code, diffusers' autoencoders, and what is none of these."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import PLAIN, ROOT, error_line, flags, run_command, same, tiny_rae
from diffusers import AutoencoderKL, AutoencoderRAE
from safetensors.torch import load_file

import eval_rfid
import linear_probe
from modeling_rae import RAEModel
from rae_suite import model_loading, run_models
from rae_suite.checkpoints import checkpoints
from rae_suite.dit_folders import load_pipeline_parts
from rae_suite.errors import ConfigError
from rae_suite.launch import run_main
from rae_suite.model_loading import load_autoencoder, load_rae
from rae_suite.published_rae import PublishedOptions
from rae_suite.run_folder import lock_run_folder

STEPS = {"train.max_steps": "4", "train.save_every_steps": "2", "eval.every_steps": "2", "eval.raw": "true"}
PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def script(name: str):
    specification = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


COMMANDS = {
    "eval_rfid.py": eval_rfid,
    "linear_probe.py": linear_probe,
    **{name: script(name) for name in ("reconstruct", "push_to_hub", "compute_latent_stats", "convert_checkpoint")},
}


@pytest.fixture(scope="module")
def run_dir(images, tmp_path_factory) -> Path:
    """A finished run with its last two checkpoints and latent statistics, whose final/ is the last one's average."""
    folder = tmp_path_factory.mktemp("runs")
    stats = {"mean": torch.zeros(64, 8, 8), "var": torch.linspace(0.5, 2, 64).view(64, 1, 1).expand(64, 8, 8)}
    torch.save({name: value.clone() for name, value in stats.items()}, folder / "stat.pt")
    settings = {**PLAIN, **STEPS, "model.latent_stats": folder / "stat.pt", "data.path": images}
    run_command("train_rae.py", *flags({**settings, "train.output_dir": folder / "run"}))
    return folder / "run"


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command in this process; gives (exit code, stdout, stderr)."""

    def run(name: str, **settings) -> tuple:
        words = []
        for key, value in settings.items():
            values = value if isinstance(value, list) else [value]
            words += [f"--{key.replace('__', '.')}", *map(str, values)]
        monkeypatch.setattr(sys, "argv", [name, *words])
        capsys.readouterr()
        code = 0
        try:
            run_main(COMMANDS[name].main)
        except SystemExit as stopped:
            code = stopped.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def evaluate(call, images, tmp_path):
    """eval_rfid.py on the training images; gives (the rows of its results, what it printed)."""

    def run(*models, **settings) -> tuple:
        settings = {"data.path": images, "data.eval_split": "train", "data.num_workers": 0, "metrics": "[psnr]"} | {
            "output_dir": tmp_path / "evaluation", "model": list(models), **settings
        }  # fmt: skip
        code, out, err = call("eval_rfid.py", **settings)
        assert code == 0, err
        return json.loads((tmp_path / "evaluation/results.json").read_text())["rows"], out

    return run


@torch.no_grad()
def computed(model) -> tuple:
    latent = model.encode(PIXELS[:, :, :32, :32])
    latent = getattr(latent, "latent", latent)
    sample = model.decode(latent)
    return latent, getattr(sample, "sample", sample)


# ------------------------------------------------------------------------------------------- what a run folder offers


def test_a_checkpoint_is_a_model(run_dir):
    """Its averaged weights are final/ to the bit, encoder and statistics included; its raw ones are what trained."""
    first, last = checkpoints(run_dir)
    final = RAEModel.from_pretrained(run_dir / "final").state_dict()
    averaged, raw = (load_rae(str(last), "model", weights) for weights in ("ema", "raw"))
    assert same(dict(averaged.state_dict()), dict(final)) and not averaged.training
    assert averaged.config.use_latent_stats and not any(p.requires_grad for p in averaged.parameters())
    assert same(dict(raw.decoder.state_dict()), load_file(last / "decoder.safetensors"))
    assert not same(dict(raw.decoder.state_dict()), dict(averaged.decoder.state_dict()))
    earlier = load_autoencoder(str(first))
    assert earlier.loaded == f"checkpoint {first}, averaged weights"
    assert same(dict(earlier.model.decoder.state_dict()), load_file(first / "ema.safetensors"))


def test_a_run_folder_is_its_final_or_its_newest_checkpoint(run_dir, tmp_path, capsys):
    """Which it is, is said; raw weights are in the checkpoint alone."""
    last = checkpoints(run_dir)[-1]
    assert load_autoencoder(str(run_dir)).loaded == str(run_dir / "final")
    assert capsys.readouterr().out == f"model {run_dir}: {run_dir}/final\n"
    assert load_autoencoder(str(run_dir), weights="raw").loaded == f"checkpoint {last}, raw weights"
    going_on = tmp_path / "run"
    shutil.copytree(run_dir, going_on)
    (going_on / "final" / "model.safetensors").write_bytes(b"cut off")
    capsys.readouterr()
    found = load_autoencoder(str(going_on))
    assert found.name == str(going_on) and same(computed(found), computed(load_autoencoder(str(run_dir))))
    expected = f"checkpoint {going_on}/checkpoints/{last.name}, averaged weights"
    assert capsys.readouterr().out.splitlines()[0] == f"model {going_on}: {expected}"
    shutil.rmtree(going_on / "checkpoints")
    with pytest.raises(ConfigError, match="is a run folder without final/ and without checkpoints"):
        load_autoencoder(str(going_on))


def test_a_training_that_goes_on_is_evaluated(run_dir, evaluate, images, tmp_path):
    """By one or two processes, while the training holds its folder; what it then continues from is untouched."""
    going_on = tmp_path / "run"
    shutil.copytree(run_dir, going_on)
    shutil.rmtree(going_on / "final")
    last = checkpoints(going_on)[-1]
    before = {file: file.read_bytes() for file in going_on.rglob("*") if file.is_file()}
    with lock_run_folder(going_on):
        rows, _ = evaluate(going_on, last, run_dir / "final")
        assert len({row["psnr"] for row in rows}) == 1
        assert rows[0]["loaded"] == rows[1]["loaded"] == f"checkpoint {last}, averaged weights"
        settings = {"model": going_on, "metrics": "[psnr]", "output_dir": tmp_path / "two", "data.num_workers": 0}
        settings |= {"data.path": images, "data.eval_split": "train"}
        run_command("eval_rfid.py", *flags(settings), processes=2)
    row = json.loads((tmp_path / "two/results.json").read_text())["rows"][0]
    assert row["loaded"] == rows[0]["loaded"] and row["psnr"] == pytest.approx(rows[0]["psnr"], abs=1e-4)
    after = {file: file.read_bytes() for file in going_on.rglob("*") if file.is_file() and file.name != ".lock"}
    assert after == {file: content for file, content in before.items() if file.name != ".lock"}


def test_processes_take_the_main_ones_choice(run_dir, monkeypatch):
    """A run that goes on may write a checkpoint between the looks of two processes."""
    mains = run_dir / "checkpoints/step-00000002"
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(run_models, "broadcast_object_list", lambda mine: [mains] if mine == [None] else mine)
    assert run_models.model_of_run(run_dir, "model", "raw", lambda folder: False) == mains
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    assert run_models.model_of_run(run_dir, "model", "raw", lambda folder: False) == checkpoints(run_dir)[-1]


@pytest.mark.parametrize("when", ["before", "while it is found", "while it is read"])
def test_a_checkpoint_that_was_rotated_away(run_dir, tmp_path, monkeypatch, when):
    """One line says so, and which is there now."""
    going_on = tmp_path / "run"
    shutil.copytree(run_dir, going_on)
    first, last = checkpoints(going_on)
    build = model_loading.build_rae

    def slow(*arguments):
        if when == "while it is read":
            shutil.rmtree(first)
        return build(*arguments)

    monkeypatch.setattr(model_loading, "build_rae", slow)
    if when == "before":
        shutil.rmtree(first)
    if when == "while it is found":
        (first / "state.json").unlink()
    with pytest.raises(ConfigError) as caught:
        load_autoencoder(str(first))
    lost = "ema.safetensors" if when == "while it is read" else "state.json"
    assert str(caught.value) == (
        f"model: {first} has no {lost}, or no longer: a run deletes all but its newest train.keep_last checkpoints; "
        f"the newest one is {last}"
    )


def test_a_checkpoint_with_other_frozen_weights(run_dir, tmp_path):
    """What config.yaml names may have changed since: nothing else is taken in its place."""
    moved = tmp_path / "run"
    shutil.copytree(run_dir, moved)
    last = checkpoints(moved)[-1]
    text = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    with pytest.raises(ConfigError, match=f"model.encoder of {moved}/config.yaml has other weights than those"):
        load_autoencoder(str(last))
    (moved / "config.yaml").write_text(text.replace("stat.pt", "gone.pt"))
    with pytest.raises(ConfigError, match=rf"model: {last} needs what {moved}/config.yaml names: .*gone.pt"):
        load_autoencoder(str(last))
    (moved / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=f"model: {last} is no checkpoint in a run folder"):
        load_autoencoder(str(last))


# ----------------------------------------------------------------------------------------------------- every command


def test_commands_take_checkpoints(run_dir, evaluate, call, images, tmp_path):
    """Checkpoints of two runs have rows of their own; reconstructions, features, statistics and uploads are those of
    final/."""
    last, final = checkpoints(run_dir)[-1], run_dir / "final"
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    rows, _ = evaluate(last, other / "checkpoints" / last.name)
    assert rows[0]["psnr"] == rows[1]["psnr"]
    raw, out = evaluate(run_dir, weights="raw")
    assert raw[0]["psnr"] != rows[0]["psnr"] and f"model {run_dir}: checkpoint {last}, raw weights" in out
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    evaluated = {line["model"]: line for line in lines if line["kind"] == "eval" and line["step"] == 4}

    photo = write_photo(tmp_path / "photo.png")
    for model in (last, final):
        settings = {"input": photo, "output": tmp_path / f"out-{model.name}", "data.num_workers": 0}
        assert call("reconstruct", model=model, **settings)[0] == 0
    pictures = [file.read_bytes() for file in sorted(tmp_path.glob("out-*/reconstructions/*.png"))]
    assert len(pictures) == 2 and pictures[0] == pictures[1]

    probe = {"data.path": images, "data.num_workers": 0, "features.cache_dir": tmp_path / "cache", "train.min_steps": 5}
    probe |= {"output_dir": tmp_path / "probe", "train.lrs": "[0.1]", "train.cpu_threads": 1}
    code, out, err = call("linear_probe.py", model=run_dir, weights="raw", **probe)
    assert code == 0, err
    assert json.loads((tmp_path / "probe/results.json").read_text())["loaded"] == f"checkpoint {last}, raw weights"

    stats = {"data.path": images, "data.num_workers": 0}
    code, _, err = call("compute_latent_stats", model=last, **stats)
    assert code == 2 and f"output: expected a new folder for checkpoint {last}, averaged weights" in err
    code, _, err = call("compute_latent_stats", model=last, output=tmp_path / "normalised", **stats)
    assert code == 0, err
    made, averaged = load_rae(str(tmp_path / "normalised"), "model"), load_rae(str(last), "model")
    assert same(dict(made.decoder.state_dict()), dict(averaged.decoder.state_dict()))
    assert not torch.equal(made.latent_var, averaged.latent_var)

    for weights in ("ema", "raw"):
        code, _, err = call("push_to_hub", model=last, repo_id="user/rae", dry_run="true", weights=weights)
        assert code == 0, err
        uploaded = last.with_name(f"{last.name}-upload")
        assert f"| {evaluated[weights]['psnr']:.4f} |" in (uploaded / "README.md").read_text()
        expected = load_rae(str(last), "model", weights)
        assert same(dict(RAEModel.from_pretrained(uploaded).state_dict()), dict(expected.state_dict()))
        shutil.rmtree(uploaded)
    assert call("push_to_hub", model=run_dir, repo_id="user/rae", dry_run="true")[0] == 0
    assert (run_dir / "final-upload" / "model.safetensors").is_file()
    shutil.rmtree(run_dir / "final-upload")


def write_photo(file: Path) -> Path:
    from torchvision.utils import save_image

    save_image(PIXELS[0], file)
    return file


def test_conversion_finds_out_what_its_input_is(run_dir, call, tmp_path):
    """Without --from: a checkpoint becomes a model folder, a published decoder, and what that becomes again."""
    last = checkpoints(run_dir)[-1]
    code, out, err = call("convert_checkpoint", to="rae", input=last, output=tmp_path / "rae")
    assert code == 0 and out.splitlines()[1].split() == ["from", "checkpoint", f"{last},", "ema"], out + err
    assert same(load_file(tmp_path / "rae/model.safetensors"), load_file(run_dir / "final/model.safetensors"))
    code, out, err = call("convert_checkpoint", to="published", input=run_dir, weights="raw", output=tmp_path / "files")
    assert code == 0, err
    decoder = torch.load(tmp_path / "files/model.pt", weights_only=True)
    assert same(decoder, load_file(last / "decoder.safetensors"))
    for settings, words in (
        ({"from": "rae", "input": last}, "is a checkpoint of train_rae.py"),
        ({"input": tmp_path / "files/model.pt", "weights": "raw", "encoder": "x"}, "--weights: expected ema, got raw"),
        ({"input": tmp_path / "files/model.pt"}, "--encoder: expected a Hub id or folder for a decoder"),
        ({"input": last, "encoder": "x"}, "--encoder: expected nothing for a checkpoint of train_rae.py"),
    ):
        code, _, err = call("convert_checkpoint", to="rae", output=tmp_path / "new", **settings)
        assert code == 2 and words in err, err


# --------------------------------------------------------------------------- files of the published code, and diffusers


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple:
    """(a decoder file, a training checkpoint, statistics, the folder of their encoder)."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=8, image_size=32)
    encoder = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**sizes))
    encoder.save_pretrained(folder / "encoder")
    transformers.ViTImageProcessor(image_mean=[0.4] * 3, image_std=[0.3] * 3).save_pretrained(folder / "encoder")
    decoder = tiny_rae().decoder.state_dict()
    raw = {name: tensor + 0.01 if "layernorm" in name else tensor for name, tensor in decoder.items()}
    torch.save(decoder, folder / "model.pt")
    parts = ({f"decoder.{name}": tensor for name, tensor in state.items()} for state in (raw, decoder))
    torch.save(dict(zip(("model", "ema"), parts, strict=True)), folder / "ep-0000002.pt")
    torch.save({"mean": None, "var": torch.full((16, 4, 4), 4.0)}, folder / "stat.pt")
    return tuple(folder / name for name in ("model.pt", "ep-0000002.pt", "stat.pt", "encoder"))


def test_published_files(published, evaluate, call, tmp_path):
    """With their encoder; the rest is asked for in one line."""
    decoder, training, stats, encoder = published
    options = {"published.encoder": encoder, "published.encoder_input_size": 32, "published.stats": stats}
    options |= {"published.decoder_num_attention_heads": 2}
    rows, _ = evaluate(decoder, training, **options)
    assert rows[0]["psnr"] == rows[1]["psnr"] and rows[1]["loaded"] == f"checkpoint {training}, averaged weights"
    raw, _ = evaluate(training, weights="raw", **options)
    assert raw[0]["psnr"] != rows[0]["psnr"]
    given = PublishedOptions(str(encoder), encoder_input_size=32, decoder_num_attention_heads=2, stats=str(stats))
    model = load_rae(str(decoder), "model", published=given)
    assert same(dict(model.decoder.state_dict()), torch.load(decoder, weights_only=True))
    assert model.latent_mean is None and model.latent_var.eq(4).all() and model.config.image_mean == [0.4] * 3

    photo = {"input": write_photo(tmp_path / "photo.png"), "output": tmp_path / "out", "data.num_workers": 0}
    assert call("reconstruct", model=decoder, **photo, **options)[0] == 0
    convert = f"python scripts/convert_checkpoint.py --to rae --input {decoder} --encoder"
    code, _, err = call("reconstruct", model=decoder, **photo)
    assert code == 2 and "without its encoder: give it with --published.encoder" in err and convert in err
    with pytest.raises(ConfigError, match=f"model.rae: .*without its encoder: convert it once with {convert}"):
        load_rae(str(decoder), "model.rae")
    for wrong, words in (
        ({"published.encoder_input_size": 64}, "published.encoder_input_size: 64 px in patches of 8 px"),
        ({"published.stats": tmp_path / "none.pt"}, "published.stats: file .*none.pt does not exist"),
        ({"published.image_std": [1, 0, 1]}, "published.image_std: expected positive numbers"),
        ({"model": encoder}, "published.encoder: expected nothing unless model is a file of the published code"),
    ):
        code, _, err = call("reconstruct", **{"model": decoder, **photo, **options, **wrong})
        assert code == 2 and re.search(words, err), err


def test_diffusers_models(evaluate, call, images, tmp_path):
    """An AutoencoderRAE is run by diffusers where it is measured, and becomes an RAE where one is needed."""
    torch.manual_seed(0)
    decoder = dict(decoder_hidden_size=24, decoder_num_hidden_layers=1, decoder_num_attention_heads=3)
    sizes = dict(encoder_hidden_size=64, encoder_num_hidden_layers=1, encoder_patch_size=14, encoder_input_size=224)
    theirs = AutoencoderRAE("dinov2", **sizes, **decoder, decoder_intermediate_size=40, patch_size=2)
    theirs.save_pretrained(tmp_path / "theirs")
    AutoencoderKL(block_out_channels=(32,), latent_channels=2).save_pretrained(tmp_path / "kl")
    rows, _ = evaluate(tmp_path / "theirs", tmp_path / "kl")
    assert [row["kind"] for row in rows] == ["AutoencoderRAE", "AutoencoderKL"]
    rae = load_rae(str(tmp_path / "theirs"), "model")
    for found, expected in zip(computed(rae), computed(load_autoencoder(str(tmp_path / "theirs"))), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="rae: .* is a AutoencoderKL, expected an RAE"):
        load_rae(str(tmp_path / "kl"), "rae")
    stats = {"data.path": images, "data.num_workers": 0, "output": tmp_path / "rae"}
    code, _, err = call("compute_latent_stats", model=tmp_path / "theirs", **stats)
    assert code == 0, err
    assert RAEModel.from_pretrained(tmp_path / "rae").config.use_latent_stats


# -------------------------------------------------------------------------------------------- stage 2, and wrong things


def test_stage_2_takes_a_checkpoint(run_dir, images, tmp_path):
    """As model.rae: the run keeps a copy, with which it goes on, and is the one that final/ gives, to the bit."""
    small = {"model.hidden_size": 16, "model.num_layers": 1, "model.num_attention_heads": 2}
    small |= {
        "model.head_hidden_size": "none",
        "model.head_num_layers": "none",
        "model.head_num_attention_heads": "none",
    }
    small |= {"train.max_steps": 1, "train.global_batch_size": 8, "data.num_workers": 0, "eval.metrics": "[loss]"}
    small |= {"train.cpu_threads": 1, "logging.report_to": "[]", "data.path": images, "logging.samples_every_steps": 9}
    small |= {"sampling.num_inference_steps": 2}
    states, copy = [], shutil.copytree(run_dir, tmp_path / "copy")
    for name, source in (("a", checkpoints(copy)[-1]), ("b", run_dir / "final")):
        run_command("train_dit.py", *flags({**small, "model.rae": source, "train.output_dir": tmp_path / name}))
        transformer, rae, _ = load_pipeline_parts(str(tmp_path / name), "model")
        states.append((dict(transformer.state_dict()), dict(rae.state_dict())))
    assert same(*states)
    shutil.rmtree(copy / "checkpoints")
    small |= {"model.rae": copy / "checkpoints/step-00000004", "train.output_dir": tmp_path / "a"}
    run_command("train_dit.py", *flags({**small, "train.max_steps": 2}))
    with pytest.raises(ConfigError, match=f"model: {tmp_path}/a is of a run of stage 2, expected an RAE's folder"):
        load_autoencoder(str(tmp_path / "a"))


def test_what_is_no_model(run_dir, tmp_path, call, images):
    """One message says what was found and what is expected."""
    expected = f"expected {model_loading.KINDS}"
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline/model_index.json").write_text("{}")
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    for name, words in (
        ("notes.txt", "no file of tensors"),
        ("other.pt", "is no checkpoint that is known here"),
        ("empty", "has no config.json"),
        ("bert", "is a bert"),
        ("pipeline", f"has no config.json (a pipeline; its RAE may be {tmp_path}/pipeline/rae)"),
        ("nowhere", "does not exist"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_autoencoder(str(tmp_path / name))
        message = str(caught.value)
        assert message.startswith("model: ") and str(tmp_path / name) in message, message
        assert words in message and message.endswith(expected), message
    for source in (run_dir / "final", run_dir / "best"):
        with pytest.raises(ConfigError, match="^weights: expected ema, got raw: .* holds one set of weights"):
            load_autoencoder(str(source), weights="raw")
    done = run_command("eval_rfid.py", "--model", tmp_path / "empty", "--data.path", images, check=False)
    assert done.returncode == 2 and error_line(done.stderr).endswith(expected)
