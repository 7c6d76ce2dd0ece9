"""Two machines, played by two `accelerate launch --num_machines 2` on loopback with one CPU process each."""

import socket
import subprocess
import time

import psutil
import pytest
from conftest import PLAIN, ROOT, checkpoint_state, command, flags, read_metrics, run_command, same
from forked import free_port

from rae_suite.checkpoints import checkpoints
from rae_suite.errors import ConfigError
from rae_suite.run_folder import check_shared_folder

CONFIG = str(ROOT / "accelerate_configs" / "multi_node.yaml")
SETTINGS = {**PLAIN, "train.max_steps": "1000", "train.save_every_steps": "2", "eval.every_steps": "1000"}


def last_step(run_dir) -> int:
    lines = read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    return lines[-1]["step"] if lines else 0


class Nodes:
    """The launches of both machines, their outputs in files."""

    def __init__(self, folder, settings: dict):
        port = free_port()
        self.logs = [folder / f"node{rank}.log" for rank in (0, 1)]
        self.launchers = [self.launch(rank, port, settings) for rank in (0, 1)]

    def launch(self, rank: int, port: int, settings: dict) -> subprocess.Popen:
        launch = ("-q", "--config_file", CONFIG, "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1",
                  "--main_process_port", str(port), "--num_processes", "2", "--mixed_precision", "no")  # fmt: skip
        with self.logs[rank].open("w") as log:
            return subprocess.Popen(
                command("train_rae.py", *flags(settings), launch=launch), cwd=ROOT, stdout=log, stderr=log
            )

    def worker(self, rank: int) -> psutil.Process:
        [worker] = psutil.Process(self.launchers[rank].pid).children()
        return worker

    def wait_for_step(self, run_dir, step: int) -> None:
        deadline = time.time() + 200
        while last_step(run_dir) < step:
            assert all(launcher.poll() is None for launcher in self.launchers), self.outputs()
            assert time.time() < deadline, self.outputs()
            time.sleep(0.05)

    def outputs(self) -> list:
        return [log.read_text() for log in self.logs]

    def end(self) -> None:
        for launcher in self.launchers:
            if launcher.poll() is None:
                for process in [*psutil.Process(launcher.pid).children(), launcher]:
                    process.kill()
                launcher.wait()


@pytest.fixture
def start(tmp_path):
    started = []

    def start_nodes(settings: dict) -> Nodes:
        started.append(Nodes(tmp_path, settings))
        return started[-1]

    yield start_nodes
    for nodes in started:
        nodes.end()


def test_two_machines(images, tmp_path, start):
    """One machine dies: the other ends with one line of ours within a minute. The same commands continue; a SIGTERM to
    a training process of one machine makes both save and end; all is as on one machine, to the last bit."""
    run_dir = tmp_path / "run"
    settings = {**SETTINGS, "data.path": images, "train.output_dir": run_dir}
    nodes = start(settings)
    nodes.wait_for_step(run_dir, 3)
    for process in (psutil.Process(nodes.launchers[1].pid), nodes.worker(1)):
        process.kill()
    assert nodes.launchers[0].wait(timeout=60) != 0
    output = nodes.outputs()[0]
    lines = [line for line in output.splitlines() if "error: " in line]
    assert len(lines) == 1 and "the connection to another process is lost" in lines[0], output
    assert "[rank0]: Traceback" not in output  # accelerate launch adds one of its own
    saved = checkpoints(run_dir)[-1]

    nodes = start(settings)
    nodes.wait_for_step(run_dir, last_step(run_dir) + 3)
    nodes.worker(1).terminate()
    assert [launcher.wait(timeout=120) for launcher in nodes.launchers] == [0, 0], nodes.outputs()
    output = nodes.outputs()[0]
    assert f"continuing from {saved}" in output and "stopped by another process after step" in output

    alone = {**settings, "train.output_dir": tmp_path / "alone", "train.max_steps": last_step(run_dir)}
    launch = ("--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    run_command("train_rae.py", *flags(alone), launch=launch)
    expected, found = (
        [line for line in read_metrics(folder) if line["kind"] == "train"] for folder in (tmp_path / "alone", run_dir)
    )
    assert found == expected
    expected, found = (checkpoint_state(folder) for folder in (tmp_path / "alone", run_dir))
    for part in expected.keys() - {"state"}:  # in which the best evaluation is: the run alone has one more
        assert same(found[part], expected[part]), part


def test_run_folder_of_another_machine(tmp_path):
    """A machine that does not see the main process's run folder is named on all of them."""
    for folder in ("main", "other"):
        (tmp_path / folder).mkdir()
    lock = (tmp_path / "main" / ".lock").open("w")
    (tmp_path / "other" / ".lock").write_text("an older run's")
    check_shared_folder(tmp_path / "main", lock)
    for folder in ("other", "missing"):
        with pytest.raises(ConfigError, match=rf"train.output_dir: \S+{folder} on {socket.gethostname()} is another"):
            check_shared_folder(tmp_path / folder, lock, patience=0)
