"""scripts/slurm/train_rae.sbatch without SLURM: its variables are set, srun and scontrol are stand-ins."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from conftest import PLAIN, ROOT, flags, read_metrics

from rae_suite.checkpoints import checkpoints

STANDINS = {
    "srun": 'exec "$@"\n',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$*" >> "$SCONTROL_LOG"; fi\n',
}


def submit(folder: Path, settings: dict, element: int = 1) -> subprocess.Popen:
    """An element of an array of two runs; its output goes to job.log. The second run, element 1, has the settings."""
    bin_dir = folder / "bin"
    bin_dir.mkdir(exist_ok=True)
    for name, text in STANDINS.items():
        (bin_dir / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (bin_dir / name).chmod(0o755)
    (folder / "runs.txt").write_text(f"# comment\nfirst --no.such.setting 1\nsecond {' '.join(flags(settings))}\n")
    variables = {
        **os.environ, "PATH": f"{bin_dir}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT), "SCONTROL_LOG": str(folder / "scontrol.log"), "LAUNCH": "accelerate_configs/cpu.yaml",
        "SLURM_ARRAY_TASK_ID": str(element), "SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_GPUS_ON_NODE": "1", "SCRIPT": str(ROOT / "train_rae.py"),
    }  # fmt: skip
    for name in ("accelerate_configs", "configs"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    script = ROOT / "scripts/slurm/train_rae.sbatch"
    with (folder / "job.log").open("a") as log:
        return subprocess.Popen(["bash", script, "runs.txt"], cwd=folder, env=variables, stdout=log, stderr=log)


def test_a_run_is_warned_saved_put_back_and_finished(images, tmp_path):
    """SIGUSR1, sent to all processes of the step as SLURM does: the run saves, the script exits 0 and asks for its
    place in the queue; the same script then finishes the run, and asks for nothing."""
    settings = {**PLAIN, "data.path": images, "train.max_steps": 1000, "eval.every_steps": 1000}
    run_dir, asked = tmp_path / "runs/second", tmp_path / "scontrol.log"
    job = submit(tmp_path, settings)
    deadline = time.time() + 250
    while not (run_dir / "metrics.jsonl").exists() or read_metrics(run_dir)[-1]["step"] < 2:
        assert job.poll() is None and time.time() < deadline, (tmp_path / "job.log").read_text()
        time.sleep(0.1)
    # SLURM warns the processes of the step, and not the script itself
    step = psutil.Process(job.pid).children(recursive=True)
    assert len(step) >= 2, step  # the launcher and the training process
    for process in step:
        process.send_signal(signal.SIGUSR1)
    assert job.wait(200) == 0, (tmp_path / "job.log").read_text()
    saved = checkpoints(run_dir)
    assert saved and not (run_dir / "final").exists()
    assert asked.read_text() == "requeue 4242\n"

    stopped_at = int(saved[-1].name.removeprefix("step-"))
    job = submit(tmp_path, {**settings, "train.max_steps": stopped_at + 1})
    assert job.wait(250) == 0, (tmp_path / "job.log").read_text()
    assert (run_dir / "final").is_dir() and asked.read_text() == "requeue 4242\n"
    assert read_metrics(run_dir)[-1]["step"] == stopped_at + 1


def test_a_run_that_fails_is_not_put_back(tmp_path):
    job = submit(tmp_path, {}, element=0)
    assert job.wait(250) not in (0, None)
    assert not (tmp_path / "scontrol.log").exists()
    assert "no.such" in (tmp_path / "job.log").read_text()
