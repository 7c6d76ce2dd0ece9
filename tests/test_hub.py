"""hub.py, scripts/push_to_hub.py and the uploads of train_rae.py, against a small Hub on loopback."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import PLAIN, ROOT, flags, read_metrics, run_command, same, tiny_rae
from hub_server import READER, WRITER, HubServer, Repository
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images
from transformers import AutoImageProcessor, AutoModel, ViTImageProcessor

import eval_rfid
import train_rae
from modeling_rae import RAEModel
from rae_suite import cli, hub
from rae_suite.hub import HubError, Publisher, ask_hub, hub_id, push_command, scrub
from rae_suite.images import center_crop
from rae_suite.launch import run_main
from rae_suite.rae_networks import image_processor_json
from rae_suite.run_log import upload
from rae_suite.settings import HubConfig
from rae_suite.settings_rae import parse_config
from scripts import push_to_hub

FILES = {"config.json", "modeling_rae.py", "model.safetensors", "preprocessor_config.json", "README.md"}


@pytest.fixture
def server(monkeypatch):
    """A Hub that this process uses, with a token that may write. `server.waits`: seconds between attempts."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        server.waits = []
        monkeypatch.setattr(hub, "time", SimpleNamespace(sleep=server.waits.append))
        yield server


@pytest.fixture(scope="module")
def bundled(tmp_path_factory) -> Path:
    """A model folder without a run."""
    folder = tmp_path_factory.mktemp("models") / "plain"
    tiny_rae().save_pretrained(folder)
    return folder


@pytest.fixture
def model(bundled, tmp_path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(bundled, tmp_path / "model"))


@pytest.fixture
def push(monkeypatch, capsys):
    """Runs push_to_hub.py's main in this process; gives (exit code, stdout, stderr)."""

    def run(model, *arguments, repo_id="user/rae") -> tuple:
        command_line = ["push_to_hub.py", "--model", model, "--repo_id", repo_id, *arguments]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command_line])
        capsys.readouterr()
        code = 0
        try:
            run_main(push_to_hub.main)
        except SystemExit as stopped:
            code = stopped.code
        captured = capsys.readouterr()
        for token in (WRITER, READER):
            assert token not in captured.out + captured.err
        return code, captured.out, captured.err

    return run


def error_line(result: tuple, code: int = 2) -> str:
    assert result[0] == code, result
    (line,) = result[2].splitlines()
    assert line.startswith("error: ")
    return line


# ------------------------------------------------------------------------------------------------ image processor


def processed(folder: Path, image: Image.Image, **options) -> torch.Tensor:
    return AutoImageProcessor.from_pretrained(folder, **options)(image, return_tensors="pt").pixel_values


def levels(pixels: torch.Tensor, image: Image.Image, size: int) -> torch.Tensor:
    """Absolute difference from the evaluation's crop, in levels of 255."""
    reference = torch.from_numpy(np.array(center_crop(image, size))).permute(2, 0, 1)
    return (pixels[0] * 255 - reference).abs()


@pytest.mark.parametrize("photo", [0, 1])
def test_stock_processor_crops_like_the_evaluation(tmp_path, photo):
    """On scikit-learn's photographs (640 x 427), of which the largest differences were measured: a square one, 2 levels
    of 255 with torchvision's resize, none with Pillow's; the whole one, 146 levels at edges and 7 on average, as its
    crop lies beside by less than a pixel; at less than half the size, where the evaluation halves first, 45 levels."""
    image = Image.fromarray(load_sample_images().images[photo])
    square = image.crop((100, 0, 527, 427))
    (tmp_path / "preprocessor_config.json").write_text(image_processor_json(256))
    pixels = processed(tmp_path, square)
    assert pixels.shape == (1, 3, 256, 256) and pixels.dtype == torch.float32
    assert 0 <= pixels.min() < 0.1 and 0.9 < pixels.max() <= 1
    assert levels(pixels, square, 256).max() <= 2.01
    assert levels(processed(tmp_path, square, use_fast=False), square, 256).max() < 0.01
    whole = levels(processed(tmp_path, image), image, 256)
    assert whole.mean() < 8 and whole.quantile(0.5) < 4
    (tmp_path / "preprocessor_config.json").write_text(image_processor_json(64))
    small = levels(processed(tmp_path, square), square, 64)
    assert small.mean() < 4 and small.max() < 50


def test_stock_processor_takes_other_images(tmp_path):
    """Grey ones become three channels, smaller ones are enlarged."""
    (tmp_path / "preprocessor_config.json").write_text(image_processor_json(32))
    pixels = processed(tmp_path, Image.new("L", (20, 24), 51))
    assert pixels.shape == (1, 3, 32, 32) and torch.allclose(pixels, torch.tensor(0.2))


# ------------------------------------------------------------------------------------------------------- uploading


def test_upload_is_repeated_and_complete(server, model, push):
    """Two failures, then all files in one commit; weight files of an earlier model go, other files stay."""
    there = Repository(private=False)
    there.files |= {"model-00001-of-00002.safetensors": b"", "model.safetensors.index.json": b""}
    own = {"notes.md", "model_ema.safetensors", "model.safetensors.bak", "old/model.safetensors"}
    there.files |= dict.fromkeys(own, b"mine")
    server.repositories["user/rae"] = there
    server.fail("POST", "/commit/", 500, times=2)
    (model / "secrets.txt").write_text("not for the Hub")
    code, out, err = push(model)
    assert (code, err, server.waits) == (0, "", [1, 4])
    assert out.count("again in") == 2 and "failure for Bearer <token>" in out
    assert f"uploaded to user/rae: {server.endpoint}/user/rae/commit/" in out
    assert there.files.keys() == {*FILES, *own, ".gitattributes"}
    assert there.commits == [f"Upload {model.parent.name}/model"]
    for name in ("config.json", "modeling_rae.py", "model.safetensors"):
        assert there.files[name] == (model / name).read_bytes()
    assert there.files["preprocessor_config.json"].decode() == image_processor_json(32)
    assert push(model)[0] == 0 and server.count("PUT", "/lfs/") == 1  # the weights were there already


def test_upload_that_fails_for_ever(server, model, push):
    """One line, exit code 1, and how often it was tried."""
    server.fail("POST", "/commit/", 503, times=99)
    code, out, err = push(model, "--retries", 4)
    assert code == 1 and server.waits == [1, 4, 16, 60] and out.count("again in") == 4
    assert err.startswith("error: user/rae: ") and err.count("\n") == 1
    assert server.repositories["user/rae"].commits == []
    server.fail("PUT", "/lfs/", 400, times=1)
    server.blobs.clear()
    assert "(failure for None)" in error_line(push(model))  # from a thread, under another error; storage sees no token
    assert len(server.waits) == 4  # a refusal is not repeated


@pytest.mark.parametrize("repo_id", ["rae", "a/b/c", "user/a b", ".user/rae", "user/rae.git", "user/a--b"])
def test_malformed_repository(server, model, push, repo_id):
    message = error_line(push(model, repo_id=repo_id))
    assert message.startswith("error: repo_id: expected user/name") and repo_id in message
    assert server.requests == []


def test_no_way_to_the_hub(server, model, push, monkeypatch, tmp_path):
    """No token, offline, no connection: told apart, and nothing is uploaded."""
    with monkeypatch.context() as changed:
        changed.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE" in error_line(push(model))
    with monkeypatch.context() as changed:
        changed.delenv("HF_TOKEN")
        changed.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        message = error_line(push(model))
        assert "hf auth login" in message and "HF_TOKEN" in message
    assert server.requests == []
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    code, out, err = push(model, "--retries", 1)
    assert code == 2 and server.waits == [1] and "again in 1 s" in out
    assert err.startswith("error: user/rae: http://127.0.0.1:9 cannot be reached")


@pytest.mark.parametrize(
    "token, repo_id, words",
    [
        ("hf_UnknownUnknown", "user/rae", "does not know the token"),
        (READER, "user/rae", "the token may not write to user/rae"),
        (WRITER, "other/rae", "the token may not write to other/rae"),
    ],
)
def test_no_rights(server, model, push, monkeypatch, token, repo_id, words):
    """Also in a repository that is there: nothing is uploaded, nothing repeated."""
    monkeypatch.setenv("HF_TOKEN", token)
    assert words in error_line(push(model, repo_id=repo_id))
    server.repositories["user/rae"] = server.repositories["other/rae"] = Repository(private=False)
    assert words in error_line(push(model, repo_id=repo_id))
    assert server.count("PUT", "/lfs/") == server.count("POST", "/commit/") == len(server.waits) == 0


def test_private(server, model, push):
    """A new repository is private; one that is there and public is not taken for a private one."""
    assert push(model, "--private")[0] == 0 and server.repositories["user/rae"].private
    server.repositories["user/rae"] = Repository(private=False)
    assert "user/rae is there already and is public" in error_line(push(model, "--private"))
    assert server.repositories["user/rae"].commits == []


def change_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_folders_that_are_no_model(server, model, push, tmp_path):
    """Each with its reason, before the Hub is asked."""
    weights = load_file(model / "model.safetensors")
    damages = {
        "has no config.json": lambda folder: (folder / "config.json").unlink(),
        "has no modeling_rae.py": lambda folder: (folder / "modeling_rae.py").unlink(),
        "is no model config": lambda folder: (folder / "config.json").write_text("[]"),
        "is a vit, expected an RAE": lambda folder: change_config(folder, model_type="vit"),
        "encoder_input_size (33)": lambda folder: change_config(folder, encoder_input_size=33),
        "model.safetensors) cannot be read": lambda folder: (folder / "model.safetensors").unlink(),
        "cannot be read: ": lambda folder: os.truncate(folder / "model.safetensors", 5000),
        "no 'encoder.*'": lambda folder: save_file(
            {k: v for k, v in weights.items() if not k.startswith("encoder.")}, folder / "model.safetensors"
        ),
        "no 'decoder.*'": lambda folder: save_file({"x": torch.zeros(1)}, folder / "model.safetensors"),
    }
    for i, (words, damage) in enumerate(damages.items()):
        folder = tmp_path / f"damaged-{i}"
        shutil.copytree(model, folder)
        damage(folder)
        message = error_line(push(folder))
        assert message.startswith("error: model: ") and words in message, (words, message)
    assert "does not exist, expected an RAE" in error_line(push(tmp_path / "nowhere"))
    assert server.requests == []


def test_several_weight_files(server, model, push, tmp_path):
    """All of them and their index go up; one that is missing is found before."""
    folder = tmp_path / "shards"
    RAEModel.from_pretrained(model).save_pretrained(folder, max_shard_size="30KB")
    shards = {path.name for path in folder.glob("model-*.safetensors")}
    assert len(shards) > 1
    assert push(folder)[0] == 0
    there = server.repositories["user/rae"].files.keys()
    assert there >= {*shards, "model.safetensors.index.json"} and "model.safetensors" not in there
    (folder / sorted(shards)[-1]).unlink()
    assert sorted(shards)[-1] in error_line(push(folder))
    shutil.copy(model / "model.safetensors", tmp_path / "x.safetensors")  # readable, but not the folder's
    for index, words in (
        ({"weight_map": {"a": "../x.safetensors"}}, "names files of other folders"),
        ({"weight_map": {"a": str(tmp_path / "x.safetensors")}}, "names files of other folders"),
        ({"weight_map": {"a": 3}}, "cannot be read"),
        ({"weight_map": [3]}, "cannot be read"),
        ([3], "cannot be read"),
    ):
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert words in error_line(push(folder))


def test_encoder_can_be_left_out(server, model, push, tmp_path):
    """Where it can be fetched from the Hub: a folder on this disk, or nowhere, is refused."""
    assert "comes from nowhere else" in error_line(push(model, "--no_encoder"))
    change_config(model, encoder_id=str(tmp_path))
    assert f"comes from {tmp_path}" in error_line(push(model, "--no_encoder"))
    change_config(model, encoder_id="user/encoder", decoder_intermediate_size=128)
    assert "has shape (64,), its config.json says (128,)" in error_line(push(model, "--no_encoder"))
    change_config(model, decoder_intermediate_size=64)
    assert server.requests == []
    assert push(model, "--no_encoder")[0] == 0
    files = server.repositories["user/rae"].files
    (tmp_path / "down").mkdir()
    for name, content in files.items():
        (tmp_path / "down" / name).write_bytes(content)
    ours, whole = load_file(tmp_path / "down" / "model.safetensors"), load_file(model / "model.safetensors")
    assert ours.keys() == {key for key in whole if not key.startswith("encoder.")}
    assert all(torch.equal(ours[key], whole[key]) for key in ours)
    card = ModelCard.load(tmp_path / "down" / "README.md")
    assert card.data.base_model == "user/encoder" and "are fetched from there" in card.text
    # a folder without an encoder is uploaded as it is
    assert push(tmp_path / "down", repo_id="user/again")[0] == 0
    again = server.repositories["user/again"].files
    assert all(again[name] == files[name] for name in ("config.json", "model.safetensors"))


def test_dry_run(server, model, push, monkeypatch):
    """Writes what would go up and asks nobody, without a token."""
    monkeypatch.delenv("HF_TOKEN")
    code, out, _ = push(model, "--dry_run", "--license", "mit")
    folder = model.with_name("model-upload")
    assert code == 0 and {path.name for path in folder.iterdir()} == FILES
    for name in FILES:
        assert f"{name:<36}{(folder / name).stat().st_size:>16,} bytes" in out
    assert (folder / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and card.data.eval_results is None and card.data.base_model is None
    assert server.requests == []


def test_links_out_of_the_folder_are_not_published(server, model, push, tmp_path):
    """Neither for the code, nor for the weights; from the Hub's cache, which is made of links, it is."""
    (tmp_path / "secret").write_text("a key")
    for name in ("modeling_rae.py", "model.safetensors"):
        (model / name).rename(tmp_path / name)
        for target in (tmp_path / "secret", tmp_path / name):
            (model / name).symlink_to(target)
            for option in ([], ["--dry_run"]):
                line = error_line(push(model, *option))
                assert f"{model / name} is a link to {target}" in line or "cannot be read" in line
            (model / name).unlink()
        (tmp_path / name).rename(model / name)
    assert not server.repositories and not model.with_name("model-upload").exists()
    snapshot = tmp_path / "models--user--rae/snapshots/0"
    shutil.copytree(model, snapshot.parents[1] / "blobs")
    snapshot.mkdir(parents=True)
    for file in (snapshot.parents[1] / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert push(snapshot)[0] == 0
    assert server.repositories["user/rae"].files.keys() == {*FILES, ".gitattributes"}


def test_tokens_are_scrubbed(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "not-of-the-usual-form")
    assert scrub("a not-of-the-usual-form b hf_AbcAbcAbcAbcAbc0, hf_hub") == "a <token> b <token>, hf_hub"


def test_names_are_not_scrubbed():
    for name in ("user/hf_imagenet_rae", "user/hf_imagenetrae", "runs/hf_a_very_long_name_of_a_run"):
        assert scrub(name) == name


def test_malformed_answers_are_not_asked_for_again(server):
    """What is wrong with a card or a name is so the next time, too; a lost connection may not be."""

    def fail(error):
        raise error

    with pytest.raises(HubError, match="ValueError a bad card") as raised:
        ask_hub(lambda: fail(ValueError("a bad card")), "user/rae", retries=3)
    assert raised.value.refused and server.waits == []
    with pytest.raises(HubError) as raised:
        ask_hub(lambda: fail(ConnectionError("gone")), "user/rae", retries=3)
    assert not raised.value.refused and server.waits == [1, 4, 16]


def test_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data/digits").mkdir(parents=True)
    names = ("facebook/dino-vits8", "data/digits", str(tmp_path), "a/b/c", "dino", None)
    assert [hub_id(name) for name in names] == ["facebook/dino-vits8", None, None, None, None, None]


# ------------------------------------------------------------------------------------------------------------ card


@pytest.fixture
def run_dir(bundled, tmp_path) -> Path:
    """A run folder with three evaluations; the second is the best one."""
    folder = tmp_path / "runs" / "small"
    for name in ("final", "best", "hub/step-00000006"):
        shutil.copytree(bundled, folder / name)
    config = parse_config(["--data.path", "user/photos"])
    config.perceptual.weights = "pretrained"
    (folder / "config.yaml").write_text(cli.config_yaml(config))
    lines = [
        {"kind": "eval", "model": model, "step": step, "num_samples": 8, "psnr": psnr, "lpips": lpips}
        for step, psnr, lpips in ((0, 10.0, 0.9), (3, 30.0, 0.5), (6, 20.0, 0.1), (9, 25.0, None))
        for model in ("ema", "raw")
    ]
    lines[-2]["rfid"] = 2.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "samples").mkdir()
    for step in (0, 3, 6, 9):
        Image.new("RGB", (8, 8), (step, 0, 0)).save(folder / "samples" / f"step-{step:08d}.png")
    return folder


def written_card(push, folder: Path, *arguments) -> ModelCard:
    code, _, err = push(folder, "--dry_run", *arguments)
    assert code == 0, err
    return ModelCard.load(folder.with_name(f"{folder.name}-upload") / "README.md")


def test_card_of_a_run(push, run_dir):
    """The figures, the picture and the settings of the step that the folder is of."""
    expected = {
        "final": (9, {"psnr": 25.0, "rfid": 2.0}),
        "best": (3, {"psnr": 30.0, "lpips": 0.5}),
        "hub/step-00000006": (6, {"psnr": 20.0, "lpips": 0.1}),
    }
    for name, (step, values) in expected.items():
        card = written_card(push, run_dir / name)
        data = card.data
        assert {result.metric_type: result.metric_value for result in data.eval_results} == values
        if name == "final":
            assert data.eval_results[1].metric_config == "legacy_tensorflow"
            assert "| rFID (legacy_tensorflow) | 2.0000 |" in card.text
        assert data.eval_results[0].dataset_type == "user/photos"
        assert data.eval_results[0].dataset_split == "validation"
        assert data.eval_results[0].dataset_args == {"num_samples": 8}
        assert f"at step {step} of training" in card.text and f"| PSNR (dB) | {values['psnr']:.4f} |" in card.text
        with Image.open((run_dir / name).with_name(f"{Path(name).name}-upload") / "reconstructions.png") as picture:
            assert picture.getpixel((0, 0))[0] == step
        assert "](reconstructions.png)" in card.text
    assert data.license == "apache-2.0" and data.library_name == "transformers" and data.datasets == "user/photos"
    assert data.pipeline_tag == "image-feature-extraction" and data.tags == ["rae", "representation-autoencoder"]
    assert data.model_name == "rae" and "arxiv.org/abs/2510.11690" in card.text
    settings = card.text.split("```yaml\n")[1].split("\n```")[0]
    assert yaml.safe_load(settings) == yaml.safe_load((run_dir / "config.yaml").read_text())


def test_card_says_which_images(push, run_dir):
    """A part that was held out; images of another data set, whose splits, if it is a folder, nobody knows any more."""
    config, text = run_dir / "config.yaml", (run_dir / "config.yaml").read_text()
    for old, new, data, split in (
        ("holdout_fraction: 0.0", "holdout_fraction: 0.1", "user/photos", "10% held out of train, seed 0"),
        ("eval_path: null", "eval_path: /data/imagenet/val", "val", None),
        ("eval_path: null", "eval_path: user/other", "user/other", "validation"),
    ):
        assert old in text
        config.write_text(text.replace(old, new))
        card = written_card(push, run_dir / "final")
        assert (card.data.eval_results[0].dataset_type, card.data.eval_results[0].dataset_split) == (data, split)
        said = f"; split: {split}" if split else ""
        assert f"8 images of `{data}`{said}; at step 9 of training." in card.text


def test_card_of_a_step_that_was_not_evaluated(push, run_dir):
    """No figures and no picture, rather than those of another step."""
    (run_dir / "hub" / "step-00000006").rename(run_dir / "hub" / "step-00000007")
    card = written_card(push, run_dir / "hub" / "step-00000007")
    assert card.data.eval_results is None and "PSNR" not in card.text and "](reconstructions.png)" not in card.text


@pytest.mark.parametrize(
    "changes, step",
    [
        ([("num_samples", 16), ("num_samples", 8)], 9),  # 8 images again: the best starts anew
        ([("psnr", None), ("num_samples", 8)], 3),  # not finite: is no best one, and changes nothing
        ([("ssim", 0.5), ("no_psnr", 0)], 9),  # a time without the metric
    ],
)
def test_card_of_the_best_since_the_evaluation_changed(push, run_dir, changes, step):
    """A line changed at step 6, and one at step 9; the best value is at step 3."""
    file = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for at, (name, value) in zip((6, 9), changes, strict=True):
        for line in lines:
            if line["step"] == at:
                line[name] = value
            if line["step"] == 6 and changes[1][0] == "no_psnr":
                line.pop("psnr", None)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert f"at step {step} of training" in written_card(push, run_dir / "best").text
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("best_metric: psnr", "best_metric: rfdd"))
    assert written_card(push, run_dir / "best").data.eval_results is None  # never measured


def test_card_of_the_best_on_another_set(push, run_dir):
    """best_metric of a set that eval.sets names: its direction, and the number of that set's images."""
    config, file = run_dir / "config.yaml", run_dir / "metrics.jsonl"
    config.write_text(config.read_text().replace("best_metric: psnr", "best_metric: faces/lpips"))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        count, lpips = {0: (5, 0.1), 3: (4, 0.3), 6: (4, 0.2), 9: (4, 0.4)}[line["step"]]
        line |= {"faces/num_samples": count, "faces/lpips": lpips}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    card = written_card(push, run_dir / "best")
    assert "at step 6 of training" in card.text  # step 0 had other images
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {"psnr": 20, "lpips": 0.1}


def test_card_claims_nothing_that_was_not_measured(push, run_dir, model):
    """LPIPS of an untrained VGG16; a folder beside a run's own; a damaged run."""
    config = run_dir / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("  weights: pretrained", "  weights: random"))
    assert [result.metric_type for result in written_card(push, run_dir / "best").data.eval_results] == ["psnr"]
    card = written_card(push, model)
    assert card.data.eval_results is None and "PSNR" not in card.text and "](reconstructions.png)" not in card.text
    shutil.copytree(model, run_dir / "other")
    assert written_card(push, run_dir / "other").data.eval_results is None
    for damaged in ("eval: 3\n", "a: [", "3"):
        config.write_text(damaged)
        assert "config.yaml or metrics.jsonl" in error_line(push(run_dir / "best", "--dry_run"))
    config.write_text(text)
    (run_dir / "metrics.jsonl").unlink()
    card = written_card(push, run_dir / "best")
    assert card.data.eval_results is None and "All settings" in card.text


def test_card_with_results_of_eval_rfid(push, run_dir, images, monkeypatch, tmp_path):
    """Real results of two models: those of the one that is published, without noise, and its picture."""
    final, results = run_dir / "final", tmp_path / "evaluation"
    settings = {"data.path": images, "data.num_workers": 0, "metrics": "[psnr,ssim]", "output_dir": results}
    command_line = ["eval_rfid.py", "--model", run_dir / "best", final, "--latent_noise", 1, 0, *flags(settings)]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command_line])
    run_main(eval_rfid.main)
    rows = json.loads((results / "results.json").read_text())["rows"]
    assert [(Path(row["model"]).name, row["latent_noise"]) for row in rows][3] == ("final", 0)
    card = written_card(push, final, "--results", results / "results.json")
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values == {name: round(rows[3][name], 4) for name in ("psnr", "ssim")}
    assert card.data.eval_results[0].dataset_type == images.name
    assert "split: validation; ADM centre crop to 32 pixels, 8 bit by round." in card.text
    picture = final.with_name("final-upload") / "reconstructions.png"
    comparison = results / Path(rows[3]["comparison"]).name
    assert picture.read_bytes() == comparison.read_bytes()

    file, found = tmp_path / "changed.json", json.loads((results / "results.json").read_text())
    file.write_text(json.dumps({**found, "split": "all 60 images (no splits)"}))
    card = written_card(push, final, "--results", file)
    assert card.data.eval_results[0].dataset_split == "all 60 images (no splits)"
    found["config"]["data"]["holdout_fraction"] = 0.5
    del found["split"]  # as older ones, which can say what their settings say
    file.write_text(json.dumps(found))
    assert "split: 50% held out of train, seed 0;" in written_card(push, final, "--results", file).text

    other = run_dir / "hub" / "step-00000006"
    message = error_line(push(other, "--results", results / "results.json", "--dry_run"))
    assert "error: results: " in message and str(final) in message
    comparison.rename(tmp_path / "elsewhere.png")
    comparison.symlink_to(tmp_path / "elsewhere.png")
    message = error_line(push(final, "--results", results / "results.json", "--dry_run"))
    assert f"results: {comparison} is a link to {tmp_path}/elsewhere.png" in message
    for text in ("{}", "[1]", "{", '{"rows": [{"model": 3}]}'):
        (tmp_path / "bad.json").write_text(text)
        message = error_line(push(final, "--results", tmp_path / "bad.json", "--dry_run"))
        assert "bad.json is no results.json" in message
    assert "cannot be read" in error_line(push(final, "--results", tmp_path / "none.json", "--dry_run"))


# -------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def published(images, tmp_path_factory):
    """A run of two processes that uploads at step 3, which fails for good, and at the end, which fails once."""
    run_dir = tmp_path_factory.mktemp("runs") / "published"
    settings = {
        **PLAIN,
        "data.path": images,
        "train.output_dir": run_dir,
        "hub.push": "true",
        "hub.repo_id": "user/run",
        "hub.every_steps": 3,
        "hub.retries": 1,
    }
    launch = ("--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    with HubServer() as server:
        server.fail("POST", "/commit/", 500, times=3)
        home = tmp_path_factory.mktemp("home")
        done = run_command("train_rae.py", *flags(settings), launch=launch, **server.environment(home))
        yield run_dir, server, done


def test_training_uploads_and_goes_on(published):
    """A failed upload is reported with its command and does not stop the run; the one process that uploads is the main
    process; no token is left anywhere."""
    run_dir, server, done = published
    stdout, repository = done.stdout, server.repositories["user/run"]
    folder = run_dir / "hub" / "step-00000003"
    assert "not uploaded: error: user/run: " in stdout and "failure for Bearer <token>" in stdout
    later = f"to upload it later: python scripts/push_to_hub.py --model {folder} --repo_id user/run "
    assert stdout.count(later) == 1 and f"uploaded to user/run: {server.endpoint}" in stdout
    assert repository.commits == ["Upload published/final"]
    assert server.count("POST", "/commit/") == 4 and server.count("POST", "/repos/create") == 3  # start, two uploads
    assert [line["step"] for line in read_metrics(run_dir) if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert repository.files.keys() == {*FILES, "reconstructions.png", ".gitattributes"}
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        assert repository.files[name] == (run_dir / "final" / name).read_bytes()
    assert (run_dir / "best" / "preprocessor_config.json").exists()
    assert list((run_dir / "hub").iterdir()) == [folder] and (folder / "model.safetensors").exists()  # for that command
    card = ModelCard(repository.files["README.md"].decode())
    last = [line for line in read_metrics(run_dir) if line["kind"] == "eval"][-1]
    assert card.data.eval_results[0].metric_value == round(last["psnr"], 4)
    for text in (stdout, done.stderr, *(file.read_text(errors="replace") for file in run_dir.glob("*.*"))):
        assert WRITER not in text
    assert all(WRITER.encode() not in content for content in repository.files.values())


def put_model_without_encoder(server, folder: Path) -> RAEModel:
    """user/small, whose encoder is user/encoder."""
    torch.manual_seed(0)
    AutoModel.from_config(tiny_rae().config.encoder_config).save_pretrained(folder / "encoder")
    ViTImageProcessor().save_pretrained(folder / "encoder")
    decoder = dict(decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
    rae = RAEModel.from_encoder(str(folder / "encoder"), encoder_input_size=32, decoder_patch_size=8, **decoder).eval()
    rae.config.encoder_id = "user/encoder"
    rae.save_pretrained(folder / "small", include_encoder=False)
    for name in ("encoder", "small"):
        files = {path.name: path.read_bytes() for path in (folder / name).iterdir()}
        server.repositories[f"user/{name}"] = Repository(False, files)
    return rae


def test_card_snippet_loads_it_back(published, tmp_path):
    """What the card says, run as it stands in a folder with nothing but an image, with empty caches: the same numbers
    as here. A model without its encoder is loaded beside."""
    run_dir, server, _ = published
    small = put_model_without_encoder(server, tmp_path)
    photo = Image.fromarray(load_sample_images().images[0])
    here = tmp_path / "here"
    here.mkdir()
    photo.save(here / "image.png")
    card = ModelCard(server.repositories["user/run"].files["README.md"].decode())
    snippet = card.text.split("```python\n")[1].split("```")[0]
    more = """
small = AutoModel.from_pretrained("user/small", trust_remote_code=True)
with torch.no_grad():
    other = small(pixels).sample
out = dict(pixels=pixels, latent=latent, sample=sample, other=other, weights=small.state_dict())
torch.save(dict(out, type=type(rae).__module__), "out.pt")
"""
    environment = {**os.environ, **server.environment(tmp_path / "home", token=""), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", snippet + more], cwd=here, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    out = torch.load(here / "out.pt", weights_only=True)
    assert out["type"].startswith("transformers_modules.")  # the Hub's code, not this repository's
    rae = RAEModel.from_pretrained(run_dir / "final")
    pixels = processed(run_dir / "final", photo)
    with torch.no_grad():
        latent = rae.encode(pixels).latent
        sample = rae.decode(latent).sample
        other = small(pixels).sample
    assert same(out["weights"], small.state_dict())
    # those weights are elsewhere in memory than a file's, and sums of other alignment are rounded otherwise
    torch.testing.assert_close(out["other"], other)
    assert torch.equal(out["pixels"], pixels) and torch.equal(out["latent"], latent)
    assert torch.equal(out["sample"], sample)
    with Image.open(here / "reconstruction.png") as picture:
        shown = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    assert torch.equal(shown, (sample[0].clamp(0, 1) * 255).round().byte())


@pytest.mark.parametrize(
    "settings, token, words",
    [
        ({}, WRITER, "hub.repo_id: expected user/name of a model on the Hub, got None"),
        ({"hub.repo_id": "rae"}, WRITER, "hub.repo_id: expected user/name of a model on the Hub, got 'rae'"),
        ({"hub.repo_id": "user/rae"}, None, "hub.push: there is no token to upload to user/rae with"),
        ({"hub.repo_id": "user/rae"}, READER, "user/rae: the token may not write to user/rae"),
        ({"hub.repo_id": "user/rae", "hub.include_encoder": "false"}, WRITER, "hub.include_encoder: "),
        ({"hub.repo_id": "user/rae", "hub.retries": -1}, WRITER, "hub.retries: expected"),
        ({"hub.repo_id": "user/rae", "hub.every_steps": 0}, WRITER, "hub.every_steps: expected"),
        ({"hub.push": "false", "hub.repo_id": "user/rae"}, WRITER, "hub.repo_id: expected nothing unless hub.push is"),
        ({"hub.push": "false", "hub.every_steps": 3}, WRITER, "hub.every_steps: expected nothing unless hub.push is"),
        ({"hub.push": "false", "hub.private": "true"}, WRITER, "hub.private: expected nothing unless hub.push is"),
    ],
)
def test_training_that_could_not_upload_does_not_start(
    server, images, tmp_path, monkeypatch, capsys, settings, token, words
):
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    settings = {**PLAIN, "data.path": images, "train.output_dir": tmp_path / "run", "hub.push": "true", **settings}
    monkeypatch.setattr(sys, "argv", ["train_rae.py", *flags(settings)])
    with pytest.raises(SystemExit) as stopped:
        run_main(train_rae.main)
    assert stopped.value.code == 2 and not (tmp_path / "run").exists()
    assert f"error: {words}" in capsys.readouterr().err


def test_finished_run_says_how_to_upload_it(published, images, monkeypatch, capsys):
    """Started again with hub.push, a finished run prints the command of its model."""
    run_dir, server, _ = published
    settings = {**PLAIN, "data.path": images, "train.output_dir": run_dir, "hub.push": "true", "hub.repo_id": "user/b"}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setattr(sys, "argv", ["train_rae.py", *flags(settings)])
    run_main(train_rae.main)
    out = capsys.readouterr().out
    assert f"{run_dir} is finished" in out
    assert f"to upload it: {push_command(HubConfig(push=True, repo_id='user/b'), run_dir / 'final')}\n" in out


def test_one_upload_at_a_time(capsys):
    """While one is on its way, the next is left out: nothing is exported into its folder."""
    log, exported = SimpleNamespace(state=SimpleNamespace(step=4)), []
    upload(SimpleNamespace(is_main_process=True), SimpleNamespace(busy=lambda: True), log, exported.append)
    assert exported == []
    assert "step 4: not uploaded, the upload before is still on its way" in capsys.readouterr().out


def test_publisher_survives_everything(server, model, tmp_path, monkeypatch, capsys):
    """No connection at the start, no process to be had, an upload that is cut off by the end of the run."""
    endpoint = server.endpoint
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    publisher = Publisher(HubConfig(push=True, repo_id="user/rae", private=True, include_encoder=False), tmp_path)
    assert "cannot be reached" in capsys.readouterr().out and server.waits == []
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)

    def no_memory(*arguments, **options):
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as changed:
        changed.setattr(hub.subprocess, "Popen", no_memory)
        publisher.push(model)
    out = capsys.readouterr().out
    assert "not uploaded: [Errno 12] Cannot allocate memory" in out and not publisher.busy()
    script = os.path.relpath(ROOT / "scripts" / "push_to_hub.py")
    options = f"--model {model} --repo_id user/rae --license apache-2.0 --retries 5 --private --no_encoder"
    assert f"to upload it later: python {script} {options}" in out

    slow = tmp_path / "slow.py"
    ignoring = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', flush=True)\n"
    slow.write_text(f"{ignoring}time.sleep(600)\n")
    monkeypatch.setattr(hub, "PUSH_SCRIPT", slow)
    monkeypatch.setattr(hub, "STOP_TIMEOUT", 0.1)
    publisher.push(model)
    while "deaf" not in publisher.log.read_text():
        assert publisher.busy()
    process = publisher.process
    publisher._cancel()
    assert process.returncode is not None and "upload stopped" in capsys.readouterr().out
    slow.write_text("raise SystemExit(3)\n")
    publisher.push(model)
    publisher.process.wait()
    publisher.log.unlink()
    assert not publisher.busy() and "not uploaded: exit code 3" in capsys.readouterr().out


def test_step_folders_stay_until_they_are_uploaded(server, model, tmp_path, monkeypatch, capsys):
    """The printed command needs the folder. What an upload says is shown without tokens."""
    publisher, script = Publisher(HubConfig(push=True, repo_id="user/rae"), tmp_path), tmp_path / "script.py"
    monkeypatch.setattr(hub, "PUSH_SCRIPT", script)
    folders = [Path(shutil.copytree(model, tmp_path / "hub" / f"step-0000000{step}")) for step in (1, 2)]
    for folder, code in zip(folders, (1, 0), strict=True):
        script.write_text(f"print('code {code} {READER}')\nraise SystemExit({code})\n")
        publisher.push(folder)
        publisher.process.wait()
        assert not publisher.busy()
    out = capsys.readouterr().out
    assert "not uploaded: code 1 <token>\nto upload it later: " in out and "\ncode 0 <token>\n" in out
    assert [folder.exists() for folder in folders] == [True, False]


def test_sigterm_ends_the_final_upload(server, model, tmp_path, monkeypatch):
    """Also where the loop's own handler was there before, which asks for a checkpoint: the upload is cancelled."""
    publisher = Publisher(HubConfig(push=True, repo_id="user/rae"), tmp_path)
    script = tmp_path / "slow.py"
    # asks its parent to stop, as a scheduler does, and then takes its time
    script.write_text("import os, signal, time\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(600)\n")
    monkeypatch.setattr(hub, "PUSH_SCRIPT", script)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(SystemExit, match="SIGTERM"):
            publisher.finish(model)
        process = publisher.process
        assert process.poll() is None
        publisher._cancel()
        assert process.returncode == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)


def test_eval_results_beside_the_card(push, run_dir, model):
    """As the Hub's own reader takes them; nothing where the data is not on the Hub."""
    from huggingface_hub import parse_eval_result_entries

    written_card(push, run_dir / "final")
    text = (run_dir / "final-upload/.eval_results/reconstruction.yaml").read_text()
    entries = parse_eval_result_entries(yaml.safe_load(text))
    values = {entry.task_id: entry.value for entry in entries}
    assert values == {"reconstruction_psnr": 25.0, "reconstruction_rfid": 2.0}
    assert {entry.dataset_id for entry in entries} == {"user/photos"}
    assert entries[0].notes == "8 images; split: validation; at step 9 of training"
    (run_dir / "config.yaml").write_text((run_dir / "config.yaml").read_text().replace("user/photos", "/data/photos"))
    written_card(push, run_dir / "final")
    assert not (run_dir / "final-upload/.eval_results").exists()
