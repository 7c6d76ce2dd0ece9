"""Runs in which something breaks: killed while writing, damaged checkpoints, a full disk, files that vanish.

tests/faults/kill.py (make faults) kills at many more moments.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import error_line, flags, run_command
from harness import Training, differences, folder_bytes
from kill import PLACES, left_behind, named_life
from test_streams import write_parquet
from trigger import fill

import train_rae
from rae_suite import errors, rae_networks, run_folder
from rae_suite.checkpoints import checkpoints, find_damage, newest_checkpoint, read_checkpoint
from rae_suite.errors import WriteError
from rae_suite.files import is_whole_model
from rae_suite.results import save_results
from rae_suite.settings_rae import parse_config

# every loss but LPIPS, which has no state and is slow
SETTINGS = {
    "train.max_steps": 8,
    "perceptual.weight": "0",
    "eval.metrics": "[psnr]",
    "eval.every_steps": 4,
    "logging.samples_every_steps": 4,
    "logging.report_to": "[]",
}


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """A finished run that still has all its checkpoints, of steps 2, 4, 6 and 8."""
    training = Training(tmp_path_factory.mktemp("whole") / "run", images, **SETTINGS)
    assert training.go(**{"train.keep_last": 99}) == [0], training.output()
    return training.run_dir


def as_at(step: int, whole: Path, run_dir: Path, images: Path) -> Training:
    """The same run, in a folder of its own, as if it had been killed some time after its checkpoint of that step."""
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "final")
    for later in checkpoints(run_dir)[step // 2 :]:
        shutil.rmtree(later)
    return Training(run_dir, images, **SETTINGS)


def test_killed_while_writing(images, whole, tmp_path):
    """A few of the places at which make faults kills."""
    training = Training(tmp_path / "run", images, **SETTINGS)
    names = ("config.yaml half-written, first start", "metrics.jsonl, half a line", "checkpoint: a file cut in half",
             "sample picture half-written", "best/: between its two renames", "final/: half-written")  # fmt: skip
    rows = named_life(training, "1 process", {name: PLACES[name] for name in names})
    assert [row["caught"] for row in rows] == [
        ".config.partial.yaml", "half a line", ".step-00000004.partial", "-", ".best.old, .best.partial",
        ".final.partial",
    ]  # fmt: skip
    assert training.go() == [0] and left_behind(training) == "-"
    assert differences(training.run_dir, whole) == []


# --------------------------------------------------------------------------------------------- damaged checkpoints


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


PARTS = ("state", "decoder", "ema", "optimizer", "discriminator", "disc_optimizer")  # of these runs' checkpoints


def damages(checkpoint: Path) -> dict:
    """Ways to damage a checkpoint, by name: what does it, and what is said of it."""
    ways = {}
    for file in sorted(path for path in checkpoint.iterdir() if path.name != "manifest.json"):
        name, size = file.name, file.stat().st_size
        ways[f"{name} truncated"] = (lambda f=file, s=size: os.truncate(f, s // 2), f"{name} has {size // 2} bytes")
        ways[f"{name} flipped"] = (lambda f=file: flip_bit(f), f"{name} holds something else")
        ways[f"{name} removed"] = (lambda f=file: f.unlink(), f"{name}: No such file")
    manifest = checkpoint / "manifest.json"
    ways["manifest removed"] = (manifest.unlink, "manifest.json: No such file")
    ways["manifest truncated"] = (lambda: os.truncate(manifest, 100), "manifest.json is not readable")
    ways["manifest of other content"] = (lambda: manifest.write_text("[]"), "manifest.json is not readable")
    ways["manifest with a list"] = (lambda: manifest.write_text('{"files": []}'), "manifest.json is not readable")
    ways["manifest of nothing"] = (lambda: manifest.write_text('{"files": {}}'), "manifest.json does not list decoder")
    ways["emptied"] = (lambda: [file.unlink() for file in checkpoint.iterdir()], "manifest.json: No such file")
    return ways


def test_every_damage_is_known(whole, tmp_path):
    """Each file truncated, flipped in one bit or removed: the checkpoint before is taken, and the reason said."""
    assert newest_checkpoint(whole, PARTS, pytest.fail).name == "step-00000008"
    for i, name in enumerate(damages(whole / "checkpoints/step-00000008")):
        run_dir = tmp_path / str(i)
        shutil.copytree(whole / "checkpoints", run_dir / "checkpoints")
        spoil, reason = damages(run_dir / "checkpoints/step-00000008")[name]
        spoil()
        said = []
        assert newest_checkpoint(run_dir, PARTS, said.append).name == "step-00000006", name
        assert len(said) == 1 and f"is damaged ({reason}" in said[0] and "damaged-step-00000008" in said[0], said
        assert (run_dir / "checkpoints/damaged-step-00000008").is_dir()


def test_damaged_checkpoints(images, whole, tmp_path):
    """The run goes on from the checkpoint before and ends the same. When none is whole it deletes nothing."""
    training = as_at(6, whole, tmp_path / "run", images)
    flip_bit(training.run_dir / "checkpoints/step-00000006/optimizer.pt")
    everything = shutil.copytree(training.run_dir, tmp_path / "all")
    assert training.go() == [0]
    newest = training.run_dir / "checkpoints/step-00000006"
    assert (f"checkpoint {newest} is damaged (optimizer.pt holds something else than was written), now "
            "damaged-step-00000006; the one before is used") in training.output()  # fmt: skip
    assert f"continuing from {training.run_dir}/checkpoints/step-00000004" in training.output()
    assert differences(training.run_dir, whole) == []

    training = Training(everything, images, **SETTINGS)
    for checkpoint in checkpoints(everything):
        (checkpoint / "manifest.json").write_text("{")
    before = folder_bytes(everything / "checkpoints")
    assert training.go() == [1]
    newest = everything / "checkpoints/step-00000006"
    assert training.error() == (
        f"error: {newest} is damaged (manifest.json is not readable), and there is no older checkpoint that is whole"
    )
    assert folder_bytes(everything / "checkpoints") == before


def other_contents() -> dict:
    """What a checkpoint's file may hold that is whole, but none of the run's: file, what changes it, what is said."""

    def moment(saved: dict) -> dict:
        saved["state"][0]["exp_avg"] = torch.zeros(3)
        return saved

    def no_moment(saved: dict) -> dict:
        del saved["state"][0]["exp_avg"]
        return saved

    return {
        "optimizer.pt": (
            (lambda saved: [saved], "ValueError optimizer.pt holds a list, expected a dictionary"),
            (moment, "ValueError optimizer: the state of parameter 0 has shapes {'step': (), 'exp_avg': (3,),"),
            (no_moment, "ValueError optimizer: the state of parameter 0 has shapes {'step': (), 'exp_avg_sq': "),
            (lambda saved: saved | {"state": {99: {}}}, "IndexError list index out of range"),
        ),
        "state.json": (
            (lambda saved: [saved], "ValueError state.json holds a list, expected a dictionary"),
            (lambda saved: saved | {"step": "8"}, "ValueError state.json: step is '8', expected int"),
            (lambda saved: saved | {"best": "8"}, "ValueError state.json: best is '8', expected float or NoneType"),
            (lambda saved: {"step": 8}, "KeyError 'num_images'"),
        ),
    }


def test_checkpoint_of_other_content(images, whole, tmp_path):
    """Whole files, as the manifest says, that hold something else: one line that names the checkpoint."""
    config = parse_config(["--config", str(whole / "config.yaml")])
    accelerator = Accelerator()
    run = train_rae.build_run(config, accelerator, rae_networks.build_rae_config(config.model), steps_per_epoch=3)
    checkpoint = shutil.copytree(whole / "checkpoints/step-00000008", tmp_path / "step-00000008")
    parts, check = run.parts(), partial(run_folder.check_same_frozen, frozen=run.frozen, path=checkpoint)
    run_folder.load_checkpoint(checkpoint, run_folder.RunState(), parts, check)
    for name, contents in other_contents().items():
        file = checkpoint / name
        for change, words in contents:
            saved = change(read_checkpoint(whole / "checkpoints/step-00000008")[file.stem])
            file.unlink()  # what was read of it is still mapped
            file.write_text(json.dumps(saved)) if file.suffix == ".json" else torch.save(saved, file)
            with pytest.raises(errors.RunError, match=re.escape(f"checkpoint {checkpoint} cannot be read: {words}")):
                run_folder.load_checkpoint(checkpoint, run_folder.RunState(), parts, check)
        shutil.copy(whole / "checkpoints/step-00000008" / name, file)


def test_names_that_are_not_the_runs(images, whole, tmp_path):
    """Pictures and checkpoints by other names are left alone; a picture that cannot be read is left out, said once."""
    training = as_at(4, whole, tmp_path / "run", images)
    junk = [training.run_dir / name for name in ("checkpoints/step-abc", "checkpoints/step-1", "pairs/step-x")]
    for folder in junk:
        folder.mkdir(parents=True)
    junk.append(training.run_dir / "samples/step-abc.png")
    for file in (junk[-1], training.run_dir / "samples/step-00000000.png"):
        file.write_bytes(b"")
    assert training.go(**{"logging.samples_every_steps": 2}) == [0], training.output()
    said = f"{training.run_dir}/samples/step-00000000.png cannot be read (UnidentifiedImageError), it is left out of"
    assert training.output().count(said) == 1 and "step-abc" not in training.output()
    assert all(path.exists() for path in junk)
    assert f"continuing from {training.run_dir}/checkpoints/step-00000004" in training.output()


def test_damaged_final_model(images, whole, tmp_path):
    """A finished run whose final/ was damaged writes it again from its last checkpoint."""
    assert is_whole_model(whole / "final", train_rae.CODE)
    run_dir = shutil.copytree(whole, tmp_path / "run")
    for name in ("config.json", "modeling_rae.py", "model.safetensors"):
        folder = shutil.copytree(whole / "final", tmp_path / name)
        (folder / name).unlink()
        assert not is_whole_model(folder, train_rae.CODE)
    os.truncate(run_dir / "final/model.safetensors", 100_000)
    training = Training(run_dir, images, **SETTINGS)
    assert training.go() == [0] and "is finished" not in training.output()
    assert differences(run_dir, whole) == []
    assert training.go() == [0] and "is finished: 8 of 8 steps" in training.output()


# ------------------------------------------------------------------------------------------- a disk that takes no more


@contextlib.contextmanager
def small_disk(folder: Path):
    """A file system of 24 MiB in memory."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


# where the disk gets full, but for how many bytes; what then cannot be written; settings
FULL = {
    "a network's file": (r"open w .*/\.step-\d+4\.partial/state", 100_000, "checkpoints/step-00000004", {}),
    "an optimizer's file": (r"open w .*/\.step-\d+4\.partial/state", 300_000, "checkpoints/step-00000004", {}),
    "best/": (r"os\.mkdir .*/\.best\.partial", 100_000, "best", {}),
    "final/": (r"os\.mkdir .*/\.final\.partial", 100_000, "final", {}),
    "sample picture": (r"open w\+ .*/samples/step-", 4096, "samples/step-00000004.png", {}),
    "metrics.jsonl": (r"call train_step", 0, "metrics.jsonl", {"train.max_steps": 40, "train.save_every_steps": 99,
                                                               "eval.every_steps": 99,
                                                               "logging.samples_every_steps": 99}),
    "tensorboard": (r"open w\+ .*/progress\.png", 0, "logs", {"logging.report_to": "[tensorboard]",
                                                             "train.save_every_steps": 99}),
}  # fmt: skip


@pytest.mark.parametrize("name", FULL)
def test_full_disk(name, images, whole, tmp_path):
    """One line says what cannot be written, how much space there is and which checkpoint is left; with space again the
    same command goes on."""
    place, leave, path, settings = FULL[name]
    with small_disk(tmp_path / "disk") as disk:
        training = as_at(2, whole, disk / "run", images)
        fault = {"place": place, "count": 1, "action": "fill", "disk": str(disk), "leave": leave}
        assert training.go(faults=(fault,), **settings) == [1], training.output()
        line = training.error()
        assert line.startswith(f"error: {training.run_dir / path} cannot be written ("), line
        assert "No space left on device" in line and f"MiB are free in {disk}" in line, line
        last = checkpoints(training.run_dir)[-1]
        assert line.endswith(f"; the last good checkpoint is {last}; the same command continues")
        assert find_damage(last, PARTS) is None and left_behind(training) in ("-", "half a line")
        (disk / "filler").unlink()
        if name in ("a network's file", "final/"):
            assert training.go() == [0]
            assert differences(training.run_dir, whole) == []


PAGE = 4096  # bytes that a file takes at least; a reconstruction of 32 px takes no more
# a command, what of it is on the disk, how many pages are left there, what then cannot be written
FULL_COMMANDS = (
    ("scripts/reconstruct.py", "output", 0, "reconstructions/"),
    ("scripts/reconstruct.py", "output", 8, "latents/"),
    ("scripts/reconstruct.py", "output", 8, "images.csv"),
    ("scripts/reconstruct.py", "output", 9, "grid.png"),
    ("scripts/reconstruct.py", "json", 0, "out/table.json"),
    ("linear_probe.py", "output_dir", 0, "confusion.png"),
    ("eval_rfid.py", "output_dir", 0, "comparison.png"),
)


@pytest.mark.parametrize("name, key, pages, path", FULL_COMMANDS)
def test_full_disk_of_other_commands(name, key, pages, path, images, whole, tmp_path):
    """The same line from them, exit code 1."""
    settings = {
        "scripts/reconstruct.py": {"input": images / "validation", "output": tmp_path / "out",
                                   "save_latents": path == "latents/"},
        "linear_probe.py": {"data.path": images, "train.lrs": "[0.1]", "train.weight_decays": "[0]",
                            "train.min_steps": 1, "train.epochs": 1, "features.cache_dir": tmp_path / "cache"},
        "eval_rfid.py": {"data.path": images, "metrics": "[psnr]"},
    }[name]  # fmt: skip
    with small_disk(tmp_path / "disk") as disk:
        (disk / "out").mkdir()
        fill(disk, pages * PAGE)
        settings |= {"model": whole / "final", "data.num_workers": 0}
        settings[key] = disk / ("out/table.json" if key == "json" else "out")
        done = run_command(name, *flags(settings), check=False)
        line = error_line(done.stderr)
        assert done.returncode == 1 and line.startswith(f"error: {disk}/out") and path in line, line
        assert "cannot be written (" in line and "No space left on device" in line, line
        assert "); 0.0 MiB are free in " in line, line


def test_full_disk_at_the_results(tmp_path, monkeypatch):
    """results.json, with git and without."""
    with small_disk(tmp_path / "disk") as disk:
        fill(disk, 0)
        for path in (os.environ["PATH"], ""):
            with (
                monkeypatch.context() as patch,
                pytest.raises(WriteError, match="results.json cannot be written .No sp"),
            ):
                patch.setenv("PATH", path)
                save_results(disk / "results.json", {"psnr": 1.0})


def test_full_disk_with_two_processes(images, tmp_path):
    """The main process finds the disk full; the other one does not wait for it."""
    with small_disk(tmp_path / "disk") as disk:
        training = Training(disk / "run", images, **SETTINGS)
        place, leave, path, _ = FULL["a network's file"]
        fault = {"place": place, "count": 1, "action": "fill", "disk": str(disk), "leave": leave}
        codes = training.go(2, (fault,))
        assert codes[0] == 1 and codes[1] != 0
        assert f"error: {training.run_dir / path} cannot be written (" in training.output()
        assert find_damage(training.run_dir / "checkpoints/step-00000002", PARTS) is None
        (disk / "filler").unlink()
        assert training.go(2) == [0, 0]


def test_run_folder_that_goes_away(images, whole, tmp_path):
    """A run folder that is deleted, or in which nothing can be made any more."""
    training = as_at(2, whole, tmp_path / "gone", images)
    fault = {"place": "call train_step", "count": 2, "action": "remove", "disk": str(training.run_dir)}
    assert training.go(faults=(fault,)) == [1]
    line = training.error()
    assert f"{training.run_dir}/metrics.jsonl cannot be written (No such file or directory)" in line
    assert line.endswith("the last good checkpoint is none; the same command continues")

    training = as_at(2, whole, tmp_path / "locked", images)
    folder = training.run_dir / "checkpoints"
    if subprocess.run(["chattr", "+i", folder], capture_output=True).returncode:
        pytest.skip("no folder can be made read-only for root here")
    subprocess.run(["chattr", "-i", folder], check=True)
    try:
        fault = {"place": "call train_step", "count": 2, "action": "read-only", "disk": str(folder)}
        assert training.go(faults=(fault,)) == [1]
    finally:
        subprocess.run(["chattr", "-i", folder], check=True)
    assert f"{folder}/step-00000004 cannot be written (Operation not permitted)" in training.error()
    assert training.go() == [0]
    assert differences(training.run_dir, whole) == []


# ------------------------------------------------------------------------------------------- images that go away


def test_images_that_vanish(images, tmp_path):
    """An image that is deleted and one that becomes garbage in mid-run are skipped and named. The run then cannot be
    continued as it is; with an empty file in the lost one's place it ends as the run that was not stopped."""
    runs = {}
    for name in ("whole", "stopped"):
        data = shutil.copytree(images, tmp_path / "data")
        lost, spoilt = sorted((data / "train").rglob("*.png"))[3:5]
        training = runs[name] = Training(tmp_path / name, data, **SETTINGS)
        faults = [
            {"place": "call train_step", "count": 2, "action": "remove", "disk": str(lost)},
            {"place": "call train_step", "count": 2, "action": "garbage", "disk": str(spoilt)},
            {"place": "call train_step", "count": 7, "action": "kill"},
        ]
        assert training.go(faults=faults[: 2 if name == "whole" else 3]) == [0 if name == "whole" else -9]
        for file in (lost, spoilt):
            assert training.output().count(f": {file}: ") == 1, training.output()
        if name == "whole":
            shutil.rmtree(data)
    assert training.go() == [2]
    assert "has 23 training images" in training.error() and "began with 24; take out what was added" in training.error()
    lost.touch()
    assert training.go() == [0]
    assert differences(training.run_dir, runs["whole"].run_dir) == []


def test_shard_that_vanishes(images, tmp_path):
    """A streaming run skips a shard that is deleted in mid-run; stopped by SIGKILL it goes on without it."""
    for i in range(4):
        write_parquet(tmp_path / f"shards/{i}.parquet", range(8 * i, 8 * i + 8), side=40)
    settings = {"data.path": f"{tmp_path}/shards/*", "data.streaming": "true", "data.shuffle_buffer": 2}
    settings |= {"data.shard_retries": 0, "data.eval_path": images / "validation", "eval.num_samples": 8}
    training = Training(tmp_path / "run", images, **{**SETTINGS, **settings})
    lost = {"place": "call train_step", "count": 2, "action": "remove", "disk": f"{tmp_path}/shards/2.parquet"}
    assert training.go(faults=(lost, {"place": "call train_step", "count": 6, "action": "kill"})) == [-9]
    assert training.go() == [0], training.output()
    assert training.output().count("2.parquet: FileNotFoundError") == 1 and training.step() == 8
    write_parquet(tmp_path / "shards/4.parquet", range(8), side=40)
    assert training.go(**{"train.max_steps": 9}) == [2]
    assert "the shards, or their numbers of images, are not those that" in training.error()


def test_class_that_vanishes(images, tmp_path):
    """All images of a class deleted in mid-run, more than may be unreadable: the run stops with one line, also when
    other processes load the data."""
    data = shutil.copytree(images, tmp_path / "data")
    folder = sorted((data / "train").iterdir())[0]
    training = Training(tmp_path / "run", data, **{**SETTINGS, "data.num_workers": 2, "data.max_unreadable": 3})
    fault = {"place": "call train_step", "count": 1, "action": "remove", "disk": str(folder)}
    assert training.go(faults=(fault,), **{"train.max_steps": 30}) == [2]
    assert training.error().startswith("error: data.max_unreadable: 4 images") and str(folder) in training.error()
