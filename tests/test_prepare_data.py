"""scripts/prepare_data.py through its real command line. About half a minute on a CPU at most."""

import hashlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image
from test_data import load_split
from test_faults import PAGE, fill, small_disk

from rae_suite import splits
from scripts import convert_checkpoint, prepare_data

SCRIPT = pathlib.Path(__file__).resolve().parents[1] / "scripts" / "prepare_data.py"


def prepare(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


def succeed(*arguments):
    result = prepare(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def run(capsys):
    """Runs main() in this process, because starting Python takes two seconds; returns (exit code, stdout, stderr)."""
    specification = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)

    def call(*arguments):
        capsys.readouterr()
        try:
            code = module.run_main(lambda: module.main([str(argument) for argument in arguments])) or 0
        except SystemExit as stopped:
            code = stopped.code
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def fail(run):
    """Runs main() on bad input and returns its one line on stderr."""

    def call(*arguments):
        code, _, message = run(*arguments)
        assert code == 2
        assert message.count("\n") == 1 and message.startswith("error: "), message
        return message

    return call


def config(path, **changes):
    settings = dict(
        path=str(path), config_name=None, train_split="train", eval_split="validation", holdout_fraction=0.0,
        image_column=None, label_column=None, max_megapixels=1000,
    )  # fmt: skip
    return types.SimpleNamespace(**{**settings, **changes})


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    content = [(str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    return hashlib.sha256(repr(content).encode()).hexdigest()


@pytest.fixture(scope="module")
def dummy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dummy") / "images"
    succeed(
        "dummy", "--output", folder, "--num_images", 60, "--num_classes", 3, "--size", 24,
        "--splits", "train:0.5,validation:0.3,test:0.2", "--seed", 4,
    )  # fmt: skip
    return folder


def test_digits(tmp_path, run, fail):
    from sklearn.datasets import load_digits

    output, counts_file = tmp_path / "deep" / "digits", tmp_path / "counts.json"
    printed = succeed("digits", "--output", output, "--json", counts_file)
    counts = json.loads(counts_file.read_text())["counts"]
    assert "1,437 images" in printed and counts == {"train": 1437, "validation": 180, "test": 180}
    train, evaluation = splits.load_splits(config(output), 0)
    assert train.class_names == evaluation.class_names == [str(digit) for digit in range(10)]
    digits = load_digits()
    for source, share in ((train, 0.8), (evaluation, 0.1)):
        per_class = np.bincount([source.label(i) for i in range(len(source))], minlength=10)
        assert np.abs(per_class - share * np.bincount(digits.target)).max() <= 2  # stratified
    names = {path.name: path for path in output.rglob("*.png")}
    assert len(names) == 1797  # every digit once, in one split
    path = names["001000.png"]
    image = Image.open(path)
    assert (image.mode, image.size, path.parent.name) == ("L", (32, 32), str(digits.target[1000]))
    small = Image.fromarray(np.rint(digits.images[1000] * 255 / 16).astype(np.uint8))
    assert np.array_equal(np.asarray(image), np.asarray(small.resize((32, 32), Image.Resampling.BICUBIC)))

    before = digest(output)
    assert "nothing to do" in run("digits", "--output", output)[1]
    assert digest(output) == before
    assert "size 32, not 16" in fail("digits", "--output", output, "--size", 16)
    path.unlink()
    assert "run again" in fail("digits", "--output", output)
    assert os.listdir(output.parent) == ["digits"]  # nothing left beside it


def test_dummy_is_deterministic_and_balanced(dummy, tmp_path, run):
    again, other = tmp_path / "again", tmp_path / "other"
    command = ["dummy", "--num_images", 60, "--num_classes", 3, "--size", 24]
    command += ["--splits", "train:0.5,validation:0.3,test:0.2"]
    for folder, seed in ((again, 4), (other, 5)):
        assert run(*command, "--output", folder, "--seed", seed)[0] == 0
    assert digest(again) == digest(dummy) != digest(other)
    train, evaluation = splits.load_splits(config(dummy), 0)
    assert (len(train), len(evaluation), len(load_split(config(dummy), "test"))) == (30, 18, 12)
    assert np.bincount([train.label(i) for i in range(30)]).tolist() == [10, 10, 10]
    assert train.load(0).size == (24, 24)
    pixels = np.stack([np.asarray(train.load(i), dtype=float) for i in range(30)])
    assert pixels.std(axis=(1, 2)).min() > 5  # no flat images
    assert len({image.tobytes() for image in pixels}) == 30


def test_convert_keeps_bytes_and_labels(dummy, tmp_path, run, fail):
    import datasets

    output = tmp_path / "converted"
    succeed("convert", "--input", dummy, "--output", output)
    saved = datasets.load_from_disk(output)
    assert {name: len(rows) for name, rows in saved.items()} == {"train": 30, "validation": 18, "test": 12}
    assert saved["train"].features == datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["class_0", "class_1", "class_2"])
    )
    before, after = load_split(config(dummy), "train"), load_split(config(output), "train")
    undecoded = saved["train"].cast_column("image", datasets.Image(decode=False))
    for i in range(30):
        assert undecoded[i]["image"]["bytes"] == pathlib.Path(before.name(i)).read_bytes()
        assert after.label(i) == before.label(i)
    assert np.array_equal(np.asarray(after.load(5)), np.asarray(before.load(5)))
    assert "nothing to do" in run("convert", "--input", dummy, "--output", output)[1]
    message = fail("convert", "--input", dummy, "--output", tmp_path / "x", "--splits", "a:1")
    assert "already has the splits test, train, validation" in message


def test_convert_splits_class_folders_and_bounds_unreadable_files(dummy, tmp_path, run):
    images = tmp_path / "images"
    for source in (dummy / "train").rglob("*.png"):
        target = images / source.parent.name / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    broken = [images / "class_0" / "broken.png", images / "class_1" / "broken.jpg"]
    for path in broken:
        path.write_text("not an image")
    output = tmp_path / "converted"
    result = prepare("convert", "--input", images, "--output", output, "--splits", "train:0.75,validation:0.25")
    assert result.returncode == 0, result.stderr
    assert all(str(path) in result.stderr for path in broken)
    train, evaluation = splits.load_splits(config(output), 0)
    assert len(train) + len(evaluation) == 30 and 6 <= len(evaluation) <= 8
    code, _, message = run("convert", "--input", images, "--output", tmp_path / "x", "--max_unreadable", 1)
    assert code == 2 and "error: --max_unreadable: 2 images" in message
    assert not list(tmp_path.glob("x*"))


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    """In every script whose command line is argparse's."""
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = ["--output", "~/a", "--json", "~/b"]
    args = prepare_data.parse_arguments(["convert", "--input", "~/c/~", *paths])
    assert (args.output, args.json, args.input) == (f"{tmp_path}/a", f"{tmp_path}/b", f"{tmp_path}/c/~")
    arguments = ["--from", "published", "--to", "rae", "--input", "~/c", *paths, "--stats", "~/d", "--encoder", "~/e"]
    args = convert_checkpoint.parse_arguments(arguments)
    assert args.output == tmp_path / "a" and args.stats == tmp_path / "d" and args.encoder == f"{tmp_path}/e"


def test_a_full_disk_is_no_bad_input(tmp_path, run):
    """Exit code 1 and one line that names the file; nothing is left beside it, and no word is a credential."""
    with small_disk(tmp_path / "disk") as disk:
        fill(disk, 20 * PAGE)
        code, _, message = run("dummy", "--output", disk / "images", "--num_images", 40, "--size", 32)
        assert code == 1 and message.count("\n") == 1, message
        assert ".png cannot be written (" in message and "No space left on device" in message
        assert os.listdir(disk) == ["filler"]
    token = "hf_" + "a" * 30
    code, _, message = run("convert", "--input", tmp_path / token, "--output", tmp_path / "x")
    assert code == 2 and token not in message and "<token> does not exist" in message


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, fail):
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "flat" / "x.png")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    output = tmp_path / "output"
    result = prepare("convert", "--input", tmp_path / "missing", "--output", output)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert "required" in fail("digits")
    assert "are required: --output" in fail("digits", "--outp", output)  # flags are written out
    assert "invalid choice" in fail("nonsense")
    assert "--size" in fail("digits", "--output", output, "--size", 0)
    assert "not a folder of this script" in fail("digits", "--output", tmp_path / "other")
    assert "sum to 0.9" in fail("dummy", "--output", output, "--splits", "train:0.5,test:0.4")
    assert "--splits" in fail("dummy", "--output", output, "--splits", "train:0.5,train:0.5")
    assert "gets none" in fail("dummy", "--output", output, "--num_images", 1, "--size", 8)
    assert "does not exist" in fail("convert", "--input", tmp_path / "missing", "--output", output)
    assert "without class folders" in fail("convert", "--input", tmp_path / "flat", "--output", output)
    assert "--output: " in (message := fail("digits", "--output", tmp_path / "other" / "file" / "x")), message
    assert "--json: " in fail("digits", "--output", output, "--json", tmp_path)
    assert not output.exists()
    assert (tmp_path / "other" / "file").read_text() == "mine"
