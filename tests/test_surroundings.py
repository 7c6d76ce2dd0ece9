"""What the machine around a command does to it: memory that processes share is full, its output is closed, images never
come, files stay open on a network drive, a file system has no locks, a tracker cannot start. Real commands."""

import io
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from accelerate import Accelerator
from conftest import PLAIN, ROOT, command, error_line, flags, read_metrics, run_command, tiny_rae
from forked import close_readers, shrink_shared_memory
from harness import Training
from test_streams import write_parquet
from tqdm import tqdm

from rae_suite import files, output, run_folder, trackers
from rae_suite.checkpoints import checkpoints
from rae_suite.errors import ConfigError


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "run" / "final"
    tiny_rae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_parquet(folder / "train-0.parquet", range(32), side=40)
    return folder


def long_commands(images: Path, model: Path, shards: Path, folder: Path, workers: int) -> dict:
    """Command lines that read images, by name, and what each writes."""
    data = {"data.path": images, "data.num_workers": workers}
    train = {**PLAIN, **data, "train.output_dir": folder / "run", "train.save_every_steps": "1"}
    streamed = {**train, "data.path": f"{shards}/*.parquet", "data.streaming": "true", "data.shuffle_buffer": 8}
    streamed |= {"data.eval_path": images / "validation", "eval.num_samples": 8}
    probe = {**data, "model": model, "features.cache_dir": folder / "cache", "output_dir": folder / "probe"}
    probe |= {"train.lrs": "[0.1]", "train.weight_decays": "[0]", "train.min_steps": 1, "train.epochs": 1}
    evaluate = {**data, "model": model, "metrics": "[psnr]", "data.eval_split": "train", "data.train_split": "none"}
    reconstruct = {"model": model, "input": images, "data.num_workers": workers, "output": folder / "pictures"}
    return {
        "train": (["train_rae.py", *flags(train)], folder / "run/final"),
        "streamed": (["train_rae.py", *flags(streamed)], folder / "run/final"),
        "evaluate": (["eval_rfid.py", *flags({**evaluate, "output_dir": folder / "e"})], folder / "e/results.json"),
        "probe": (["linear_probe.py", *flags(probe)], folder / "probe/results.json"),
        "reconstruct": (["scripts/reconstruct.py", *flags(reconstruct)], folder / "pictures/grid.png"),
        "statistics": (["scripts/compute_latent_stats.py", *flags({**data, "model": model, "output": folder / "new"})],
                       folder / "new/model.safetensors"),
    }  # fmt: skip


COMMANDS = ("train", "streamed", "evaluate", "probe", "reconstruct", "statistics")


# ------------------------------------------------------------------------------------------------------ shared memory


@pytest.mark.parametrize("name", COMMANDS)
def test_full_shared_memory(name, images, model, shards, tmp_path):
    """One line that says what is full and what helps, exit code 1, and nobody waits."""
    argv, _ = long_commands(images, model, shards, tmp_path, workers=2)[name]
    done = run_command(*argv, check=False, surroundings=(shrink_shared_memory, "64k"))
    if done.returncode == 99:
        pytest.skip("no /dev/shm can be mounted here")
    assert done.returncode == 1, done
    line = error_line(done.stderr)
    assert line.startswith("error: /dev/shm, through which data loading processes hand over their images, is full; it ")
    assert "holds 0.0625 MiB in all" in line and "data.num_workers" in line


def test_shared_memory_that_holds_nothing(images, model, shards, tmp_path):
    """Not even the queues that data loading processes are started with."""
    argv, _ = long_commands(images, model, shards, tmp_path, workers=1)["evaluate"]
    done = run_command(*argv, check=False, surroundings=(shrink_shared_memory, "4k"))
    if done.returncode == 99:
        pytest.skip("no /dev/shm can be mounted here")
    assert done.returncode == 1 and "error: /dev/shm, " in error_line(done.stderr)


# ------------------------------------------------------------------------------------------------------ closed output


@pytest.mark.parametrize("name", COMMANDS)
def test_closed_output(name, images, model, shards, tmp_path):
    """A command whose stdout and stderr nobody reads any more comes to its end."""
    argv, result = long_commands(images, model, shards, tmp_path, workers=1)[name]
    done = run_command(*argv, check=False, surroundings=(close_readers,))
    assert done.returncode == 0 and result.exists()


def test_training_into_head(images, tmp_path):
    """As in a shell, bar and messages in one pipe."""
    settings = {**PLAIN, "data.path": images, "train.output_dir": tmp_path / "run", "logging.progress_bar": "true"}
    line = " ".join(map(str, command("train_rae.py", *flags(settings))))
    pipe = f"set -o pipefail; {line} 2>&1 | head -2"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(["bash", "-c", pipe], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("\n") == 2 and (tmp_path / "run/final").exists(), done


def test_help_into_head():
    """Whoever reads the first lines of the help sees those and no traceback."""
    pipe = f"set -o pipefail; {sys.executable} train_dit.py --help | head -1"
    done = subprocess.run(["bash", "-c", pipe], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("usage: train_dit.py"), done


def test_streams_that_were_never_there():
    """`command >&- 2>&-`: what is opened next does not take their places."""
    code = (
        "import os; from rae_suite.output import surviving_output\n"
        "with surviving_output():\n print('x'); file = open('/proc/self/stat'); os._exit(file.fileno())"
    )
    done = subprocess.run(["bash", "-c", f'exec "{sys.executable}" -c "{code}" >&- 2>&-'], cwd=ROOT)
    assert done.returncode > 2


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_messages_have_lines_of_their_own(monkeypatch):
    """Beside a progress bar; an error at the end, too."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    handler = output.LinesAboveBars()
    logger = logging.Logger("x")
    logger.addHandler(handler)
    bar = tqdm(total=10, file=sys.stderr, mininterval=0)
    bar.update()
    logger.warning("unreadable image 1: a.png")
    output.close_bars()
    sys.stderr.write("error: stopped\n")
    lines = [line.split("\r")[-1] for line in sys.stderr.getvalue().split("\n")]
    assert "unreadable image 1: a.png" in lines and "error: stopped" in lines
    assert bar.disable


# ------------------------------------------------------------------------------------------------ images never come


@pytest.mark.parametrize("streaming", [False, True])
def test_waiting_for_images_ends_with_a_signal(streaming, images, shards, tmp_path):
    """The data loading processes hang, as with a server that is gone: SIGTERM saves what there is and ends the run."""
    settings = {"perceptual.weight": "0", "eval.metrics": "[psnr]", "eval.every_steps": 99, "data.num_workers": 1,
                "train.max_steps": 99, "train.save_every_steps": 99, "logging.report_to": "[]"}  # fmt: skip
    if streaming:
        settings |= {"data.path": f"{shards}/*", "data.streaming": "true", "data.eval_path": images / "validation"}
        settings |= {"eval.num_samples": 8, "data.shuffle_buffer": 4}
    training = Training(tmp_path / "run", images, **settings)
    (rank,) = training.start(faults=({"place": "call train_step", "count": 4, "action": "halt"},))
    step, deadline = -2, time.monotonic() + 120
    while step != training.step() or step < 3:  # until it stands still; what was loaded ahead is used up
        step = training.step()
        time.sleep(3)
        assert rank.is_alive() and time.monotonic() < deadline, training.output()
    os.kill(rank.pid, signal.SIGTERM)
    rank.join(60)
    assert rank.exitcode == 0, training.output()
    (saved,) = checkpoints(training.run_dir)
    assert f"stopped by SIGTERM after step {int(saved.name[5:])}, saved; the same command" in training.output()
    assert training.go(**{"train.max_steps": int(saved.name[5:]) + 1}) == [0], training.output()


def test_waiting_in_an_evaluation(images, tmp_path):
    """There is no step to save: one line that says where the run goes on."""
    settings = {"perceptual.weight": "0", "eval.metrics": "[psnr]", "eval.every_steps": 2, "train.save_every_steps": 1}
    training = Training(tmp_path / "run", images, **settings, **{"data.num_workers": 1, "eval.batch_size": 1})
    # the first two are of the raw and the averaged model at step 0
    (rank,) = training.start(faults=({"place": "call measure", "count": 3, "action": "halt"},))
    deadline = time.monotonic() + 120
    while training.step() < 2:
        time.sleep(0.1)
        assert rank.is_alive() and time.monotonic() < deadline, training.output()
    time.sleep(2)
    os.kill(rank.pid, signal.SIGTERM)
    rank.join(60)
    assert rank.exitcode == 1
    saved = training.run_dir / "checkpoints/step-00000001"
    assert training.error() == (
        f"error: stopped by SIGTERM while it waited for images; the last good checkpoint is {saved}; the same command "
        "continues"
    )


# -------------------------------------------------------------------------------------------- file systems that cannot


def stand_in(folder: Path, code: str) -> dict:
    """Environment in which every Python process begins with this code."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(folder)}


BUSY_FOLDERS = """
import errno, os
rmdir = os.rmdir
def busy(path, *rest, **options):
    if os.path.basename(os.fspath(path)).startswith("step-0000"):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
    return rmdir(path, *rest, **options)
os.rmdir = busy
"""


def test_checkpoints_that_cannot_be_removed(images, tmp_path):
    """As on NFS, where an open file stays in its folder: a warning, and another attempt at each checkpoint."""
    settings = {**PLAIN, "data.path": images, "train.output_dir": tmp_path / "run", "train.save_every_steps": "1",
                "train.keep_last": "1", "train.max_steps": "3"}  # fmt: skip
    variables = stand_in(tmp_path / "site", BUSY_FOLDERS)
    done = run_command("train_rae.py", *flags(settings), **variables)
    first = tmp_path / "run/checkpoints/step-00000001"
    said = f"{first} cannot be removed now (Directory not empty), this is tried again later"
    assert done.stderr.count(said) == 2 and "Traceback" not in done.stderr
    assert len(checkpoints(tmp_path / "run")) == 3
    run_command("train_rae.py", *flags({**settings, "train.max_steps": "4"}))
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000004"]


def test_folders_are_replaced_where_none_can_be_removed(tmp_path, monkeypatch, caplog):
    """What cannot be deleted is out of the way, and goes at the next start."""

    def fill(text):
        return lambda folder: (folder.mkdir(), (folder / "file").write_text(text))

    def busy(path, *rest, **options):
        raise OSError(39, "Directory not empty", path)

    files.write_folder(tmp_path / "best", fill("one"), True, lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", busy)
        for text in ("two", "three"):
            files.write_folder(tmp_path / "best", fill(text), True, lambda: None)
            assert (tmp_path / "best/file").read_text() == text
    assert "Directory not empty" in caplog.text and len(list(tmp_path.iterdir())) > 1
    run_folder.restore_folders(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    files.remove(tmp_path / "nothing")


NO_LOCKS = """
import errno, fcntl, os
def flock(*_):
    raise OSError({number}, os.strerror({number}))
fcntl.flock = flock
"""


@pytest.mark.parametrize("number", [37, 38, 524])  # NFS without lockd, Lustre without -o flock, autofs
def test_file_systems_without_locks(number, images, model, shards, tmp_path):
    """A warning, of the run folder and of the cache of features, and on."""
    lines = long_commands(images, model, shards, tmp_path, workers=0)
    variables = stand_in(tmp_path / "site", NO_LOCKS.format(number=number))
    for name, folder in (("train", "run"), ("probe", "cache/")) if number == 37 else (("train", "run"),):
        argv, result = lines[name]
        argv = [*argv, *(flags({"train.max_steps": 1}) if name == "train" else [])]
        argv = dict(zip(argv[1::2], argv[2::2], strict=True))  # the last of each flag
        done = run_command(lines[name][0][0], *(part for pair in argv.items() for part in pair), **variables)
        assert result.exists() and f"{tmp_path}/{folder}" in done.stderr
        assert done.stderr.count("this file system has no locks (") == (1 if name == "train" else 2)


# ----------------------------------------------------------------------------------------------------------- starts


def test_a_start_that_failed_blocks_nothing(images, tmp_path):
    """A folder in which nothing was evaluated yet is no run's, and other settings may begin in it; one with an
    evaluation is."""
    settings = {"perceptual.weight": "0", "eval.metrics": "[psnr]", "train.max_steps": 2, "logging.report_to": "[]"}
    training = Training(tmp_path / "run", images, **settings)
    assert training.go(faults=({"place": "call measure", "count": 1, "action": "term"},)) == [-15]
    assert (training.run_dir / "config.yaml").exists() and not (training.run_dir / "metrics.jsonl").exists()
    assert training.go(**{"optimizer.lr": "3.0e-3"}) == [0], training.output()
    assert [line["step"] for line in read_metrics(training.run_dir) if line["kind"] == "train"] == [1, 2]
    assert training.go(**{"train.max_steps": 3}) == [2] and "optimizer.lr" in training.error()


def test_somebody_elses_config_is_left_alone(images, tmp_path):
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    training = Training(tmp_path, images)
    training.log = tmp_path.parent / "log"
    assert training.go() == [2] and (tmp_path / "config.yaml").read_text() == "mine: 1\n"


class Server(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(404)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def address():
    """Of a web server that has nothing to give."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("case", ["no login", "no network"])
def test_wandb_that_cannot_start(case, images, tmp_path, address):
    """One line before anything is built, within seconds, and no run folder."""
    settings = {**PLAIN, "data.path": images, "train.output_dir": tmp_path / "run", "logging.report_to": "[wandb]"}
    variables = {"HOME": str(tmp_path), "WANDB_BASE_URL": address, "WANDB_API_KEY": ""}
    if case == "no network":
        variables |= {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = run_command("train_rae.py", *flags(settings), check=False, **variables)
    line = error_line(done.stderr)
    reason = "No API key" if case == "no login" else "http://127.0.0.1:9 cannot be reached: "
    assert done.returncode == 2 and line.startswith("error: logging.report_to: tracker wandb cannot start (")
    assert reason in line and "WANDB_MODE=offline" in line
    assert not (tmp_path / "run").exists()


def test_other_trackers_that_cannot_start(tmp_path, monkeypatch):
    """Whatever their packages raise is one line; a full disk is what it was."""
    config = type("Config", (), {"logging": type("Logging", (), {"report_to": ("mlflow",), "project": "rae"})})
    for error, expected, words in (
        (RuntimeError("no\nserver"), ConfigError, r"tracker mlflow cannot start \(RuntimeError: no server\)"),
        (ConnectionError("refused"), ConfigError, r"tracker mlflow cannot start \(ConnectionError: refused\)"),
        (OSError(28, "No space left on device"), files.WriteError, "logs cannot be written"),
    ):
        accelerator = Accelerator()

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(accelerator, "init_trackers", fail)
        with pytest.raises(expected, match=words) as caught:
            trackers.start_trackers(config, accelerator, tmp_path, 0)
        assert "\n" not in str(caught.value)
