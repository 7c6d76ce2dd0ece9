"""scripts/encode_latents.py and training from what it writes: the real command lines, tiny."""

import json
import os
import re
import shutil
from contextlib import redirect_stderr
from io import StringIO

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import (
    checkpoint_state,
    error_line,
    flags,
    read_metrics,
    run_command,
    same,
    tiny_rae,
)
from forked import forks
from harness import folder_bytes, run_rank
from PIL import Image
from safetensors.torch import load_file
from test_faults import small_disk
from test_train_dit import PLAIN

import train_dit
from modeling_rae import RAEModel
from rae_suite.dit_folders import load_rae
from rae_suite.errors import ConfigError
from rae_suite.images import center_crop, to_tensor
from rae_suite.rae_networks import give_latent_stats
from rae_suite.settings_dit import parse_config
from rae_suite.splits import load_splits
from rae_suite.stored_latents import open_latents

BROKEN = 5  # index of a training image that cannot be read
# micro-batches of 4, with the mirror image half of the time
TRAIN = {**PLAIN, "latents.stats": "null", "train.gradient_accumulation_steps": 2, "train.max_steps": 6}
ENCODE = {"dtype": "float32", "batch_size": 4, "shard_images": 7, "data.num_workers": 0}


@pytest.fixture(scope="module")
def rae(tmp_path_factory):
    """The folder of an RAE of 32 px whose latents (16, 4, 4) are normalised."""
    folder = tmp_path_factory.mktemp("rae") / "rae"
    model = tiny_rae()
    give_latent_stats(model, torch.randn(16, 4, 4), torch.rand(16, 4, 4) + 0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(images, tmp_path_factory):
    """24 training images of 4 classes, one of which cannot be read, and 8 others."""
    folder = shutil.copytree(images, tmp_path_factory.mktemp("data") / "data")
    broken = sorted((folder / "train").rglob("*.png"))[BROKEN]
    broken.write_bytes(broken.read_bytes()[:50])
    return folder


def argv_of(rae, data, folder, **changed):
    return flags({**ENCODE, "model": rae, "data.path": data, "output": folder, **changed})


def encode(*arguments, check=True, processes=1, **changed):
    line = argv_of(*arguments, **changed)
    return run_command("scripts/encode_latents.py", *line, check=check, processes=processes)


@pytest.fixture(scope="module")
def stored(rae, data, tmp_path_factory):
    """The folder of their latents, and what was printed."""
    folder = tmp_path_factory.mktemp("stored") / "latents"
    return folder, encode(rae, data, folder).stdout


def train(rae, data, run_dir, monkeypatch, settings=TRAIN, **changed):
    """Runs train_dit.py in this process. Returns the losses."""
    settings = {**settings, "model.rae": rae, "data.path": data, "train.output_dir": run_dir, **changed}
    monkeypatch.setattr("sys.argv", ["train_dit.py", *flags(settings)])
    AcceleratorState._reset_state()
    try:
        train_dit.main()
    finally:
        AcceleratorState._reset_state()
    return [line["loss"] for line in read_metrics(run_dir) if line["kind"] == "train"]


@pytest.fixture(scope="module")
def on_line(rae, data, tmp_path_factory):
    """The folder of a run that encodes its images in each step."""
    run_dir = tmp_path_factory.mktemp("on_line") / "run"
    settings = {**TRAIN, "model.rae": rae, "data.path": data, "train.output_dir": run_dir}
    assert "latents encoded in each step" in run_command("train_dit.py", *flags(settings)).stdout
    return run_dir


# ------------------------------------------------------------------------------------------------ what is written


def test_the_folder(stored, rae, data):
    """Each image's latent and that of its crop's mirror image, its label and name; exact mean and variance; the work
    was announced."""
    folder, printed = stored
    first, *_, last = printed.splitlines()
    assert re.match(
        r"24 images x 2 views of 16 x 4 x 4 in float32: 0\.08 MB in 4 shards, of which 0 are there; 24 ", first
    )
    assert re.search(r"24 images at about [\d.]+ images/s, measured on one batch, take about \d\d:\d\d", first)
    assert last == f"to train on them: train_dit.py --data.latents {folder}"
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock", "latents.json", *(f"shard-0000{i}.safetensors" for i in range(4)), "stats.safetensors"
    ]  # fmt: skip
    info = json.loads((folder / "latents.json").read_text())
    assert info["unreadable"] == [BROKEN] and info["class_names"] == [f"class_{i}" for i in range(4)]
    model, files, seen = load_rae(str(rae), "model"), sorted((data / "train").rglob("*.png")), []
    shards = [load_file(folder / f"shard-0000{i}.safetensors") for i in range(4)]
    assert [len(shard["latents"]) for shard in shards] == [7, 7, 7, 3]
    for i, file in enumerate(files):
        shard, row = shards[i // 7], i % 7
        start = shard["name_ends"][row - 1] if row else 0
        assert bytes(shard["names"][start : shard["name_ends"][row]].tolist()).decode() == str(file)
        if i == BROKEN:
            assert not shard["readable"][row] and shard["labels"][row] == -1 and not shard["latents"][row].any()
            continue
        assert shard["readable"][row] and shard["labels"][row] == int(file.parent.name[-1])
        pixels = to_tensor(center_crop(Image.open(file).convert("RGB"), 32))[None].float() / 255
        with torch.no_grad():
            views = [model.encode(view, normalize=False).latent[0] for view in (pixels, pixels.flip(3))]
        torch.testing.assert_close(shard["latents"][row], torch.stack(views), rtol=1e-5, atol=1e-6)
        seen.append(shard["latents"][row])
    seen, stats = torch.cat(seen).double(), load_file(folder / "stats.safetensors")
    torch.testing.assert_close(stats["mean"].double(), seen.mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(stats["var"].double(), seen.var(0, correction=0), rtol=1e-6, atol=1e-7)


def test_several_processes_write_the_same_files(stored, rae, data, tmp_path):
    encode(rae, data, tmp_path / "two", processes=2, **{"data.num_workers": 1})
    assert folder_bytes(tmp_path / "two") == folder_bytes(stored[0])


def go(rae, data, folder, log, *faults):
    """The command in a process of its own in which something goes wrong. Returns its exit code."""
    argv = ["scripts/encode_latents.py", *argv_of(rae, data, folder)]
    process = forks().Process(target=run_rank, args=(argv, {}, log, faults))
    process.start()
    process.join(300)
    return process.exitcode


def test_continued_after_a_kill(stored, rae, data, tmp_path):
    """With what is there; half a file counts for nothing, and neither does a shard that has lost its end."""
    folder = tmp_path / "latents"
    fault = {"place": r"os\.rename .*/\.shard-", "count": 3, "action": "half"}
    assert go(rae, data, folder, tmp_path / "log", fault) == -9
    assert len(list(folder.glob("shard-*"))) == 2 and list(folder.glob(".shard-*.partial*"))
    kept = folder / "shard-00000.safetensors"
    changed = kept.stat().st_mtime_ns
    os.truncate(folder / "shard-00001.safetensors", 1000)
    done = encode(rae, data, folder)
    assert "of which 1 are there; 17 images at" in done.stdout
    assert kept.stat().st_mtime_ns == changed
    assert folder_bytes(folder) == folder_bytes(stored[0])
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert f"{folder} is finished: 4 shards" in encode(rae, data, folder).stdout
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


def test_a_full_disk_loses_nothing(stored, rae, data, tmp_path):
    """One line; the shards that are written stay, and with space again the same command goes on."""
    with small_disk(tmp_path / "disk") as disk:
        fault = {"place": r"os\.rename .*/\.shard-", "count": 2, "action": "fill", "disk": str(disk), "leave": 0}
        assert go(rae, data, disk / "latents", tmp_path / "log", fault) == 1
        (line,) = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("error: ")]
        assert "shard-00002.safetensors cannot be written (" in line and "No space left on device" in line, line
        assert line.endswith("the shards that are there stay, and the same command continues")
        assert len(list((disk / "latents").glob("*shard-*"))) == 2  # and nothing half-written takes space
        done = encode(rae, data, disk / "latents", check=False)
        assert done.returncode == 2 and "output: 0.04 MB are needed for 24 images x 2 views" in error_line(done.stderr)
        (disk / "filler").unlink()
        assert "of which 2 are there" in encode(rae, data, disk / "latents").stdout
        assert folder_bytes(disk / "latents") == folder_bytes(stored[0])


def test_moments_are_of_latents_before_rounding(stored, rae, data, tmp_path):
    """The statistics of bf16 and fp16 latents are those of float32 ones; the latents are the rounded ones."""
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        encode(rae, data, tmp_path / name, dtype=name)
        assert same(load_file(tmp_path / name / "stats.safetensors"), load_file(stored[0] / "stats.safetensors"))
        theirs, ours = (load_file(place / "shard-00002.safetensors") for place in (stored[0], tmp_path / name))
        assert torch.equal(ours["latents"], theirs["latents"].to(dtype))


# ---------------------------------------------------------------------------------------------------------- training


def test_losses_are_those_of_encoding_on_line(stored, on_line, rae, data, tmp_path, monkeypatch):
    """To the bit where the micro-batches have the shape of the encoded ones: losses, weights, averages, optimizer. An
    unreadable image is replaced as on line. With another batch 1e-5, in bf16 a percent."""
    losses = [line["loss"] for line in read_metrics(on_line) if line["kind"] == "train"]
    workers = {"data.num_workers": 1}
    assert train(rae, data, tmp_path / "run", monkeypatch, **workers, **{"data.latents": stored[0]}) == losses
    expected, found = checkpoint_state(on_line), checkpoint_state(tmp_path / "run")
    for part in ("model", "ema", "optimizer"):
        assert same(found[part], expected[part]), part
    assert read_metrics(tmp_path / "run") == read_metrics(on_line)
    for name, tolerance, changed in (("other", 1e-5, {"batch_size": 5}), ("bf16", 1e-2, {"dtype": "bf16"})):
        encode(rae, data, tmp_path / name, **changed)
        others = train(rae, data, tmp_path / f"run_{name}", monkeypatch, **{"data.latents": tmp_path / name})
        assert others == pytest.approx(losses, rel=tolerance) and (name == "other" or others != losses)


def test_resume_is_exact(stored, on_line, rae, data, tmp_path, monkeypatch):
    """A run that stops in between, and goes on from a copy of the latents, is the run that did not."""
    moved = shutil.copytree(stored[0], tmp_path / "moved")
    train(rae, data, tmp_path / "run", monkeypatch, **{"data.latents": stored[0], "train.max_steps": 3})
    train(rae, data, tmp_path / "run", monkeypatch, **{"data.latents": moved})
    expected, found = checkpoint_state(on_line), checkpoint_state(tmp_path / "run")
    for part in ("model", "ema", "optimizer"):
        assert same(found[part], expected[part]), part
    encode(rae, data, tmp_path / "bf16", dtype="bf16")
    for other in (tmp_path / "bf16", "null"):
        with pytest.raises(ConfigError, match="data.latents: the latents are not those that .* was trained with"):
            train(rae, data, tmp_path / "run", monkeypatch, **{"data.latents": other, "train.max_steps": 7})
    fork = {"train.fork_from": tmp_path / "run/checkpoints/step-00000006", "train.max_steps": 7}
    train(rae, data, tmp_path / "fork", monkeypatch, **fork, **{"data.latents": tmp_path / "bf16"})


def test_statistics_are_those_of_encoding_on_line(rae, data, stored, tmp_path, monkeypatch):
    """latents.stats: compute takes what the folder has, of the views that training sees."""
    for flip in ("true", "false"):
        changed = {"latents.stats": "compute", "data.flip": flip, "train.max_steps": 1}
        train(rae, data, tmp_path / f"{flip}_stored", monkeypatch, **changed, **{"data.latents": stored[0]})
        train(rae, data, tmp_path / f"{flip}_on_line", monkeypatch, **changed)
        ours, theirs = (load_file(tmp_path / f"{flip}_{how}/latent_stats.safetensors") for how in ("stored", "on_line"))
        for name in ("mean", "var"):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    flipped, plain = (load_file(tmp_path / f"{flip}_stored/latent_stats.safetensors") for flip in ("true", "false"))
    assert (flipped["mean"] - plain["mean"]).abs().max() > 1e-3


def config_of(rae, data, folder, **changed):
    return parse_config(flags({**TRAIN, "model.rae": rae, "data.path": data, "data.latents": folder, **changed}))


def test_shards_are_mapped(stored, rae, data):
    """All can be open at a time without an open file, and what is read is not copied."""
    config = config_of(rae, data, stored[0])
    store = open_latents(config, load_rae(str(rae), "model"), load_splits(config.data, 0)[0])
    before = len(os.listdir("/proc/self/fd"))
    places = [store.latent(index, False).untyped_storage().data_ptr() for index in range(24)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(set(places)) == 4  # a storage for each shard
    mapped = [line for line in open("/proc/self/maps") if str(stored[0]) in line]
    assert len({line.split()[-1] for line in mapped}) == 4


# ---------------------------------------------------------------------------------------------------------- bad input


def test_other_latents_are_refused(stored, rae, data, tmp_path):
    """Of another encoder, of other images, encoded in another way, not finished, damaged: one line that says which."""
    other = tiny_rae()
    with torch.no_grad():
        next(other.encoder.parameters()).add_(1e-3)
    renamed = shutil.copytree(data, tmp_path / "renamed")
    first = sorted((renamed / "train").rglob("*.png"))[0]
    first.rename(first.with_name("0000_other.png"))
    fewer = shutil.copytree(data, tmp_path / "fewer")
    sorted((fewer / "train").rglob("*.png"))[0].unlink()
    encode(rae, data, tmp_path / "plain", flip="false")
    for name in ("begun", "lost", "short"):
        shutil.copytree(stored[0], tmp_path / name)
    info = json.loads((stored[0] / "latents.json").read_text())
    begun = {name: value for name, value in info.items() if name not in ("shards", "unreadable", "digest")}
    (tmp_path / "begun/latents.json").write_text(json.dumps(begun))
    (tmp_path / "lost/shard-00002.safetensors").unlink()
    os.truncate(tmp_path / "short/shard-00001.safetensors", 9000)
    own, decoder = load_rae(str(rae), "model"), RAEModel.from_pretrained(rae)
    with torch.no_grad():
        next(decoder.decoder.parameters()).add_(1)
    decoder.latent_mean.add_(1)
    for model, images, folder, changed, words in (
        (other, data, stored[0], {}, "are of another encoder than that of model.rae"),
        (own, renamed, stored[0], {}, "are of images with other names than those of"),
        (own, fewer, stored[0], {}, "are of another number of images than .*: 24, expected 23"),
        (own, data, stored[0], {"data.holdout_fraction": 0.2, "data.eval_split": "held"}, "another number of images"),
        (own, data, stored[0], {"latents.encoder_precision": "bf16"}, "in another precision: float32, expected bf16"),
        (own, data, tmp_path / "plain", {}, "has no mirror images, expected some or data.flip false"),
        (own, data, tmp_path / "plain", {"data.flip": "false"}, None),
        (decoder, data, stored[0], {}, None),  # another decoder and other statistics: the same latents
        (own, data, tmp_path / "begun", {}, "is not finished"),
        (own, data, tmp_path / "lost", {}, "shard-00002.safetensors is damaged: no file, expected"),
        (own, data, tmp_path / "short", {}, "shard-00001.safetensors is damaged: 9000 bytes, expected"),
        (own, data, data, {}, "has no latents.json, expected a folder of scripts/encode_latents.py"),
    ):
        config = config_of(rae, images, folder, **changed)
        source = load_splits(config.data, 0, need_eval=False)[0]
        if words is None:
            assert open_latents(config, model, source) is not None
            continue
        with pytest.raises(ConfigError, match=f"data.latents: .*{words}"):
            open_latents(config, model, source)


def test_bad_settings(stored, rae, data, tmp_path):
    """Before anything is loaded, and nothing is written."""
    for changed, words in (
        ({"data.crop": "random"}, "data.crop: expected center with data.latents, got 'random'"),
        ({"data.streaming": "true"}, "data.latents: expected nothing with data.streaming"),
    ):
        with pytest.raises(SystemExit), redirect_stderr(StringIO()) as errors:
            config_of(rae, data, stored[0], **changed)
        assert words in errors.getvalue()
    settings = {**TRAIN, "model.rae": rae, "data.path": data, "train.output_dir": tmp_path / "run"}
    done = run_command("train_dit.py", *flags({**settings, "data.latents": data}), check=False)
    assert done.returncode == 2 and "data.latents: " in error_line(done.stderr) and not (tmp_path / "run").exists()
    for changed, words in (
        ({"shard_images": 8}, "output: .* was begun for other latents: shard_images is 7 there and 8 now"),
        ({"dtype": "bf16", "flip": "false"}, "dtype is float32 there and bf16 now; flip is True there and False now"),
        ({"output": data}, "output: .* is not empty and has no latents.json"),
        ({"model": data}, "model: "),
        ({"data.train_split": "test"}, "data.train_split: there is no split 'test'"),
    ):
        done = encode(rae, data, stored[0], check=False, **changed)
        assert done.returncode == 2 and re.search(words, error_line(done.stderr)), done.stderr
