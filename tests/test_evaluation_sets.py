"""Several named evaluation sets in one run of stage 1."""

import json

import numpy as np
import pytest
from conftest import PLAIN, error_line, flags, read_metrics, run_command
from PIL import Image

from rae_suite.pictures import panels_of


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """Five grey images without splits: another number, and another result."""
    folder = tmp_path_factory.mktemp("faces")
    for i in range(5):
        Image.fromarray(np.full((40, 40, 3), 40 * i + 20, np.uint8)).save(folder / f"{i}.png")
    return folder


def train(images, run_dir, *extra, check=True, **settings):
    base = {**PLAIN, "gan.weight": 0, "train.max_steps": 2, "eval.every_steps": 1, "data.path": images,
            "train.output_dir": run_dir, "logging.samples_every_steps": "null"}  # fmt: skip
    settings = {key.replace("__", "."): value for key, value in settings.items()}
    return run_command("train_rae.py", *flags({**base, **settings}), *extra, check=check)


def test_metrics_of_sets_stand_beside_those_of_the_data(images, faces, tmp_path):
    """Each in its own name; a set that is the data itself has the same numbers; best/ follows a set's metric."""
    sets = json.dumps({"faces": str(faces), "again": str(images)})
    done = train(images, tmp_path / "run", eval__sets=sets, eval__best_metric="faces/psnr")
    lines = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "eval"]
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert line["again/psnr"] == line["psnr"] != line["faces/psnr"]
        assert (line["num_samples"], line["again/num_samples"], line["faces/num_samples"]) == (8, 8, 5)
    assert "faces/psnr" in done.stdout.splitlines()[-8:][0] or "faces/psnr  " in done.stdout
    state = json.loads(next((tmp_path / "run/checkpoints").glob("*2/state.json")).read_text())
    assert state["best"] == max(line["faces/psnr"] for line in lines)
    assert state["best_of"] == "faces/psnr of 5 images"
    assert set(panels_of(lines)["PSNR in dB, EMA"]) == {"psnr", "again/psnr", "faces/psnr"}


def test_the_numbers_of_a_run_do_not_depend_on_its_sets(images, faces, tmp_path):
    for name, sets in (("with", {"faces": str(faces)}), ("without", {})):
        train(images, tmp_path / name, eval__sets=json.dumps(sets))
    with_sets, without = (read_metrics(tmp_path / name) for name in ("with", "without"))
    assert [{k: v for k, v in line.items() if "/" not in k} for line in with_sets] == without


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"eval__sets": '{"faces": "/absent/faces"}'}, "eval.sets.faces: /absent/faces does not exist"),
        ({"eval__sets": '{"a/b": "x"}'}, "eval.sets: expected names of letters, digits, - and _, got 'a/b'"),
        ({"eval__best_metric": "faces/psnr"}, "eval.best_metric: expected one of eval.metrics ['psnr'], got 'faces/"),
        ({"eval__best_metric": "pnsr"}, "eval.best_metric: expected one of eval.metrics ['psnr'], got 'pnsr'"),
    ],
)  # fmt: skip
def test_sets_that_cannot_be_measured(images, tmp_path, settings, words):
    done = train(images, tmp_path / "run", check=False, **settings)
    assert done.returncode == 2 and error_line(done.stderr).startswith(f"error: {words}")
    assert not (tmp_path / "run").exists()
