"""What a user meets first: wrong places and kinds of files, missing tools, and where results go."""

import io
import json
import os
import stat
import tarfile

import numpy as np
import pytest
import torch
from conftest import PLAIN, error_line, flags, run_command, tiny_rae
from PIL import Image
from transformers import AutoModel

from modeling_rae import RAEModel


@pytest.fixture(scope="module")
def rae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "rae"
    tiny_rae().save_pretrained(folder)
    return folder


def refused(*line, **variables) -> str:
    """The one line of a command that does not start; a training script's run folder is one that is not there."""
    if line[0].startswith("train_") and "--train.output_dir" not in line:
        line = (*line, "--train.output_dir", "runs/not_there")
    done = run_command(*line, check=False, **variables)
    assert done.returncode == 2, done
    return error_line(done.stderr)


# Kinds of files -------------------------------------------------------------------------------------------------------


def write_tar(file) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (32, 32)).save(stream, "PNG")
    with tarfile.open(file, "w") as archive:
        member = tarfile.TarInfo("0.png")
        member.size = len(stream.getvalue())
        archive.addfile(member, io.BytesIO(stream.getvalue()))


@pytest.mark.parametrize("name", ["train-0.tar", "data/train-00000.parquet", "deep/er/a.tgz"])
def test_shards_without_streaming_are_named(tmp_path, rae, name):
    file = tmp_path / "shards" / name
    file.parent.mkdir(parents=True)
    write_tar(file)
    found = f"holds no image files but {name}, from which training reads images with data.streaming: true"
    assert found in refused("train_rae.py", *flags({**PLAIN, "data.path": tmp_path / "shards"}))
    assert found in refused("eval_rfid.py", "--model", rae, "--data.path", tmp_path / "shards")
    words = f"{file} is a file, from which training reads images with data.streaming: true"
    assert words in refused("train_rae.py", *flags({**PLAIN, "data.path": file}))


def test_a_file_of_weights_is_no_encoder(tmp_path, images):
    """Meta publishes its encoders so."""
    file = tmp_path / "dinov2_vitb14_pretrain.pth"
    torch.save({"cls_token": torch.zeros(1)}, file)
    settings = {**PLAIN, "data.path": images, "model.encoder_weights": "pretrained", "model.encoder_config": "{}"}
    line = refused("train_rae.py", *flags({**settings, "model.encoder": file}))
    assert line.startswith(f"error: model.encoder: {file} is a file, expected a Hub id, or a folder with config.json")
    assert "facebook/dinov2-base" in line


def test_what_costs_nothing_is_looked_at_first(tmp_path, images, rae):
    """A wrong split or batch is found before an encoder is fetched, and before weights are read: here, those that
    cannot be read."""
    absent = {"model.encoder": "nobody/nothing", "model.encoder_weights": "pretrained", "model.encoder_config": "{}"}
    settings = {**PLAIN, **absent, "data.path": images, "data.eval_split": "absent"}
    assert "no split 'absent'" in refused("train_rae.py", *flags(settings))
    RAEModel.from_pretrained(rae).encoder.save_pretrained(tmp_path / "encoder")
    (tmp_path / "encoder/preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    (tmp_path / "encoder/model.safetensors").unlink()
    settings = {**PLAIN, "data.path": images, "model.encoder_weights": "pretrained", "model.encoder_config": "{}",
                "model.encoder": tmp_path / "encoder", "model.encoder_input_size": 32,
                "model.image_size": 32, "model.decoder_patch_size": 8}  # fmt: skip
    wrong = {"data.eval_split": "absent", "train.global_batch_size": 4096}
    for key, value in wrong.items():
        line = refused("train_rae.py", *flags({**settings, key: value}))
        assert "no split 'absent'" in line or "train.global_batch_size: 4096, but there are" in line
    assert "model.safetensors" in refused("train_rae.py", *flags(settings))
    (tmp_path / "stage1").mkdir()
    settings = {"model.rae": tmp_path / "stage1", "data.path": images, "data.eval_split": "absent"}
    assert "no split 'absent'" in refused("train_dit.py", *flags(settings))


def test_a_missing_compiler_is_said_at_the_start(tmp_path, images):
    """Before networks are built, in one line."""
    settings = {**PLAIN, "data.path": images, "train.compile": "true", "train.output_dir": tmp_path / "run"}
    line = refused("train_rae.py", *flags(settings), PATH=str(tmp_path), CXX="absent-compiler")
    assert line.startswith("error: train.compile: torch.compile makes no code for cpu here (")
    assert "expected a C++ compiler (g++, or one that CXX names), or train.compile false" in line
    assert not (tmp_path / "run").exists()


# Results --------------------------------------------------------------------------------------------------------------


def test_results_of_several_models_are_told_apart(tmp_path, images, rae):
    """A picture each, one of all, and none of an earlier evaluation is lost. A command that is refused leaves
    nothing."""
    other = tmp_path / "other"
    model = tiny_rae(noise_tau=0.1)
    torch.nn.init.constant_(model.decoder.decoder_pred.bias, 0.5)
    model.save_pretrained(other)
    line = ("eval_rfid.py", "--metrics", "psnr", "--data.path", images, "--data.num_workers", 0)
    cwd = os.getcwd()
    try:
        os.chdir(tmp_path)
        script = (os.path.join(cwd, line[0]), *line[1:])
        first, second, third = ("evaluations/" + f"{rae.parent.name}-rae{end}" for end in ("", "-2", "-3"))
        for folder in (first, second):
            done = run_here(tmp_path, *script, "--model", rae, other)
            assert f"results   {folder}/results.json" in done.stdout
        rows = json.loads((tmp_path / first / "results.json").read_text())["rows"]
        names = {os.path.basename(row["comparison"]) for row in rows}
        assert names == {f"comparison-{rae.parent.name}-rae.png", f"comparison-{tmp_path.name}-other.png"}
        assert all((tmp_path / first / name).is_file() for name in names)
        together = np.asarray(Image.open(tmp_path / first / "comparison.png"))
        height = together.shape[0] // 3  # of the images, and of each model
        blocks = [together[i * height : (i + 1) * height] for i in range(3)]
        assert all((a != b).any() for a, b in [blocks[:2], blocks[1:], blocks[::2]])
        assert run_here(tmp_path, *script, "--model", rae, "--image_size", 64, check=False).returncode == 2
        assert not (tmp_path / third).exists()
    finally:
        os.chdir(cwd)


def run_here(folder, script, *args, check=True):
    """A command in another working directory."""
    import subprocess
    import sys

    line = [sys.executable, script, *map(str, args)]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr
    return done


def test_files_have_the_modes_that_the_umask_gives(tmp_path, images, rae):
    """safetensors writes for the owner alone."""
    os.umask(mask := os.umask(0))
    settings = {**PLAIN, "data.path": images, "train.output_dir": tmp_path / "run", "train.max_steps": 1,
                "gan.weight": 0}  # fmt: skip
    run_command("train_rae.py", *flags(settings))
    run_command("scripts/reconstruct.py", "--model", rae, "--input", images / "validation", "--output",
                tmp_path / "out", "--save_latents", "--data.num_workers", 0)  # fmt: skip
    files = [path for path in tmp_path.rglob("*.safetensors")]
    assert {path.parent.name for path in files} >= {"final", "best", "step-00000001"} and len(files) > 10
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}


def test_an_encoder_left_out_is_found_from_any_folder(tmp_path, monkeypatch):
    """Also where its path was relative to another working directory."""
    model = tiny_rae()
    AutoModel.from_config(model.config.encoder_config).save_pretrained(tmp_path / "encoder")
    monkeypatch.chdir(tmp_path)
    model.config.encoder_id = "encoder"
    model.load_encoder()
    model.save_pretrained(tmp_path / "light", include_encoder=False)
    assert model.config.encoder_id == "encoder"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = RAEModel.from_pretrained(tmp_path / "light")
    assert all(torch.equal(a, b) for a, b in zip(found.encoder.parameters(), model.encoder.parameters(), strict=True))
