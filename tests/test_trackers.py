"""Trackers and launchers with real runs: what they are given, and what they say."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from accelerate import Accelerator
from conftest import PLAIN, ROOT, error_line, flags, run_command

from rae_suite import trackers
from rae_suite.errors import ConfigError
from rae_suite.loaders import WorkerLoader, cores
from rae_suite.metrics_file import MetricsFile

FAST = {**PLAIN, "gan.weight": "0", "train.max_steps": "2", "eval.every_steps": "1", "train.global_batch_size": "4"}


def needs(package: str):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} of requirements-extra.txt is not installed")


def train(images, run_dir, settings, **options):
    settings = {**FAST, "data.path": images, "train.output_dir": run_dir, **settings}
    return run_command("train_rae.py", *flags(settings), **options)


# csv ------------------------------------------------------------------------------------------------------------------


def read_table(file) -> list:
    with Path(file).open(encoding="utf-8") as table:
        return list(csv.DictReader(table))


def test_metrics_as_a_table(images, tmp_path):
    """metrics.csv has what metrics.jsonl has, also after the run went on."""
    for steps in (1, 3):
        train(images, tmp_path / "run", {"logging.report_to": "[csv]", "train.max_steps": steps})
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    table = read_table(tmp_path / "run/metrics.csv")
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [0, 1, 2, 3] and len(table) == len(lines)
    for line, row in zip(lines, table, strict=True):
        assert {name: str(value) for name, value in line.items() if value is not None} == {
            name: value for name, value in row.items() if value != ""
        }


def test_a_table_gets_new_columns_and_forgets(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", True, as_table=True)
    for step, values in enumerate([{"a": 1.5}, {"a": float("nan")}, {"b": 2}]):
        file.append({"kind": "train", "step": step, **values})
    assert [(row["a"], row["b"]) for row in read_table(tmp_path / "metrics.csv")] == [("1.5", ""), ("", ""), ("", "2")]
    again = MetricsFile(tmp_path / "metrics.jsonl", True, as_table=True)
    again.forget_after(0)
    again.append({"kind": "train", "step": 1, "a": 3})
    assert [(row["step"], row["a"]) for row in read_table(tmp_path / "metrics.csv")] == [("0", "1.5"), ("1", "3")]


# other trackers -------------------------------------------------------------------------------------------------------

PICTURE = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive",
                                  "swanlab"])  # fmt: skip
def test_every_tracker_gets_the_picture(name, monkeypatch):
    """In the shape that its own function takes, under the name and the step."""
    seen = []

    def keep(*values, **options):
        seen.append((values, options))

    package = ModuleType(name)
    package.log_image, package.Image = keep, lambda image: image  # of mlflow and trackio
    monkeypatch.setitem(sys.modules, name, package)
    tracker = SimpleNamespace(name=name, log=keep, tracker=SimpleNamespace(log_image=keep))
    if name in ("tensorboard", "wandb", "aim", "clearml", "swanlab"):
        tracker.log_images = keep
    trackers.show_picture(tracker, "samples", PICTURE, 7)
    [(values, options)] = seen
    flat_values = [part for value in values for part in (value.values() if isinstance(value, dict) else [value])]
    [picture] = [value for value in flat_values if isinstance(value, np.ndarray)]
    several = name in ("tensorboard", "wandb", "swanlab")
    assert picture.shape == ((1, 2, 4, 3) if several else (2, 4, 3)) and np.array_equal(picture.reshape(-1), range(24))
    assert "samples" in str((values, options)) and "7" in str((values, options))


def test_a_tracker_that_cannot_start_is_found_before_the_networks(images, tmp_path, monkeypatch):
    """A package that is broken, and a server that does not answer."""
    (tmp_path / "mlflow.py").write_text("raise ImportError('no protobuf here')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    with pytest.raises(ConfigError, match=r"tracker mlflow cannot start \(ImportError: no protobuf here\)"):
        trackers.check_trackers(("csv", "tensorboard", "mlflow"), Accelerator())
    package = ModuleType("mlflow")
    package.get_tracking_uri = lambda: "http://127.0.0.1:9"
    monkeypatch.setitem(sys.modules, "mlflow", package)
    with pytest.raises(ConfigError, match=r"tracker mlflow cannot start \(http://127.0.0.1:9 cannot be reached"):
        trackers.check_trackers(("mlflow",), Accelerator())


def test_a_run_goes_on_in_the_same_mlflow_run(tmp_path):
    assert trackers.options_of_trackers(("mlflow",), tmp_path / "x", 0)["mlflow"] == {"run_name": "x"}
    (tmp_path / "mlflow_run_id.txt").write_text("abc")
    assert trackers.options_of_trackers(("mlflow",), tmp_path, 3)["mlflow"] == {"run_id": "abc"}


@needs("mlflow")
def test_mlflow(images, tmp_path):
    address = f"sqlite:///{tmp_path}/mlflow.db"
    for steps in (1, 2):
        settings = {"logging.report_to": "[mlflow]", "train.max_steps": steps, "logging.project": "digits"}
        train(images, tmp_path / "run", settings, MLFLOW_TRACKING_URI=address)
    import mlflow

    client = mlflow.MlflowClient(address)
    [run] = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2]
    assert run.data.params["train.seed"] == "0"
    assert client.list_artifacts(run.info.run_id)


@needs("trackio")
def test_trackio(images, tmp_path):
    settings = {"logging.report_to": "[trackio]", "logging.project": "digits"}
    train(images, tmp_path / "run", settings, TRACKIO_DIR=str(tmp_path / "trackio"))
    assert list((tmp_path / "trackio").rglob("*digits*"))


# launchers ------------------------------------------------------------------------------------------------------------


def launched(*line, **variables):
    """A command under its own launcher, run to its end."""
    environment = {**os.environ, **variables}
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def torchrun(processes: int, *line) -> tuple:
    return sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *line


def test_torchrun(images, tmp_path):
    """Two processes train together; without a device for them the error names what started them."""
    settings = {**FAST, "data.path": images, "train.output_dir": tmp_path / "run", "train.max_steps": "1"}
    done = launched(*torchrun(2, "train_rae.py", *flags(settings)), ACCELERATE_USE_CPU="true")
    assert done.returncode == 0 and "batch 4 = 2 processes x 2 images" in done.stdout, done.stderr
    done = launched(*torchrun(2, "train_rae.py", *flags(settings)), ACCELERATE_USE_CPU="false", CUDA_VISIBLE_DEVICES="")
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: torchrun: it started 2 processes, and there is no GPU for them")


def test_the_first_screen(images, tmp_path):
    """`python train_rae.py` on one device says what it does and nothing else, with more workers than cores too."""
    settings = {**FAST, "data.path": images, "train.output_dir": tmp_path / "run", "data.num_workers": cores() + 1,
                "logging.report_to": "[tensorboard,csv]"}  # fmt: skip
    done = launched(sys.executable, "train_rae.py", *flags(settings))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith("no --config: the settings are those of the demo") and "Loading" not in done.stdout


def test_no_more_workers_than_cores():
    assert WorkerLoader([0], num_workers=cores() + 3).num_workers == cores()
    assert WorkerLoader([0], num_workers=1).num_workers == 1


def test_a_tracker_that_does_not_exist(images, tmp_path):
    done = train(images, tmp_path / "run", {"logging.report_to": "[cvs]"}, check=False)
    assert done.returncode == 2
    assert error_line(done.stderr).startswith("error: logging.report_to: expected trackers among csv, ")
