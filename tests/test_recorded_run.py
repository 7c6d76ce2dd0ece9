"""A run folder that an earlier version wrote (tests/recorded_run: 3 steps of a tiny run, with what that version itself
measured in steps 4 to 6) continues. Data and networks may lie elsewhere meanwhile, as long as they are the same."""

import hashlib
import json
import shutil

import pytest
import yaml
from conftest import ROOT, checkpoint_state, error_line, flags, make_images, read_metrics, run_command, same
from safetensors.torch import load_file, save_file

from rae_suite.cli import config_yaml
from rae_suite.settings_rae import parse_config

RECORDED = ROOT / "tests" / "recorded_run"
NEWER = {"time", "images_per_second"}  # of lines of metrics.jsonl: what a clock decides


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The data and the encoder, both in other places than those that the recorded run names."""
    folder = tmp_path_factory.mktemp("places")
    shutil.copytree(ROOT / "tests/parity/encoders/dinov2", folder / "encoder")
    return {"data.path": f"{make_images(folder / 'images')}/", "model.encoder": folder / "encoder"}


def continued(folder, places, complete=False, check=True, **settings):
    """The recorded run, continued to step 6 in `folder`; `complete`: its config.yaml lists all of today's settings."""
    shutil.copytree(RECORDED, folder)
    saved = folder / "config.yaml"
    if complete:
        saved.write_text(config_yaml(parse_config(["--config", str(saved)])))
    own = {"train.max_steps": 6, "train.output_dir": folder, **places, **settings}
    return run_command("train_rae.py", "--config", RECORDED / "config.yaml", *flags(own), check=check)


def test_it_continues_with_the_same_numbers(places, tmp_path):
    done = continued(tmp_path / "run", places)
    assert "continuing from" in done.stdout
    expected = [json.loads(line) for line in (RECORDED / "expected.jsonl").read_text().splitlines()]
    found = read_metrics(tmp_path / "run")[-len(expected) :]
    assert [line["step"] for line in found] == [4, 5, 6, 6]
    for line, recorded in zip(found, expected, strict=True):
        for name in recorded.keys() - NEWER:
            value = recorded[name]
            same_value = value if isinstance(value, (str, type(None))) else pytest.approx(value, rel=1e-4)
            assert line[name] == same_value, name
    settings = yaml.safe_load((RECORDED / "config.yaml").read_text())
    assert "crop" not in settings["data"]  # or the recorded file lacks no setting, and nothing is shown
    continued(tmp_path / "complete", places, complete=True)
    assert same(checkpoint_state(tmp_path / "complete"), checkpoint_state(tmp_path / "run"))


def test_other_settings_data_and_networks_are_refused(places, tmp_path):
    """All settings are named at once; data by other names and an encoder with other weights too."""
    done = continued(tmp_path / "a", places, check=False, **{"train.seed": 1, "data.flip": "true"})
    line = error_line(done.stderr)
    assert "data.flip is False there and True now; train.seed is 0 there and 1 now" in line and done.returncode == 2

    images = tmp_path / "images"
    shutil.copytree(places["data.path"], images)
    first = sorted((images / "train").rglob("*.png"))[0]
    first.rename(first.with_name("renamed.png"))
    done = continued(tmp_path / "b", {**places, "data.path": images}, check=False)
    assert done.returncode == 0  # that version kept the number of images only
    longer = flags({**places, "train.max_steps": 7})
    done = run_command("train_rae.py", "--config", tmp_path / "b" / "config.yaml", *longer, check=False)
    assert "training images of" in error_line(done.stderr) and "other names" in error_line(done.stderr)

    others = {"model.encoder": ROOT / "tests/parity/encoders/dinov2", "gan.backbone": changed_backbone(tmp_path)}
    done = continued(tmp_path / "c", {**places, **others}, check=False)
    assert error_line(done.stderr).startswith("error: gan.backbone: the weights are not those that")


def changed_backbone(folder):
    copy = shutil.copytree(ROOT / "tests/parity/discriminator/hf_vit", folder / "backbone")
    weights = load_file(copy / "model.safetensors")
    weights[min(weights)] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_a_checkpoint_of_a_newer_version(places, tmp_path):
    folder = tmp_path / "run"
    continued(folder, places)
    state = next((folder / "checkpoints").glob("step-00000006/state.json"))
    values = json.loads(state.read_text())
    assert values["format"] == 1  # what is written now says so
    state.write_text(json.dumps({**values, "format": 2}))
    manifest = state.with_name("manifest.json")
    files = json.loads(manifest.read_text())["files"]
    files["state.json"] = [state.stat().st_size, hashlib.sha256(state.read_bytes()).hexdigest()]
    manifest.write_text(json.dumps({"files": files}))
    done = run_command("train_rae.py", "--config", folder / "config.yaml", "--train.max_steps", 8, check=False)
    assert "state.json: format is 2, this version knows formats up to 1" in error_line(done.stderr)
