"""Trainings that go wrong on purpose, and what they must end with all the same."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent), str(FOLDER.parent.parent)]

from conftest import (  # noqa: E402
    ROOT,
    TINY,
    checkpoint_state,
    command,
    flags,
    processes_on_cpu,
    read_metrics,
    same,
)
from forked import become_command, forks, rank_environments  # noqa: E402

# all losses, accumulation, evaluation of both models, grids, and checkpoints at other steps than evaluations
BUSY = {
    **TINY,
    "train.gradient_accumulation_steps": "2",
    "train.save_every_steps": "2",
    "eval.raw": "true",
    "logging.report_to": "[tensorboard]",
    "logging.samples_every_steps": "6",
}
DEADLINE = 300  # seconds until a run counts as hanging


def run_rank(argv: list, environment: dict, log: Path, faults: tuple) -> None:
    """In a forked process: the command line `argv` with these faults, and its output in `log`."""
    import trigger

    os.environ.update(environment)
    become_command(argv, log)
    for fault in faults:
        trigger.arm(fault)
    trigger.run_main(trigger.PROGRAMS[argv[0]].main)


class Training:
    """A command line and its run folder. `go` may be called again and again, as a user gives the command again."""

    def __init__(self, run_dir: Path, images: Path, program: str = "train_rae.py", **settings):
        self.run_dir, self.log, self.program = run_dir, run_dir.with_name(f"{run_dir.name}.log"), program
        defaults = BUSY if program == "train_rae.py" else {}
        self.settings = {**defaults, "data.path": images, "train.output_dir": run_dir, **settings}

    def start(self, processes: int = 1, faults: tuple = (), **settings) -> list:
        """Start the command's processes, each as a launcher would; their output goes to a new log."""
        self.log.unlink(missing_ok=True)
        argv, ranks = [self.program, *flags({**self.settings, **settings})], []
        for environment in rank_environments(processes):
            ranks.append(forks().Process(target=run_rank, args=(argv, environment, self.log, faults)))
            ranks[-1].start()
        return ranks

    def wait(self, ranks: list) -> list:
        """Exit codes of the processes, minus the signal of those that died of one. AssertionError when one hangs."""
        end = time.monotonic() + DEADLINE
        for rank in ranks:
            rank.join(max(0, end - time.monotonic()))
        hanging = [rank for rank in ranks if rank.exitcode is None]
        for rank in hanging:
            rank.kill()
        assert not hanging, f"{len(hanging)} of {len(ranks)} processes hang: {self.output()}"
        return [rank.exitcode for rank in ranks]

    def launch(self, processes: int, **settings) -> subprocess.Popen:
        """Start the real command under accelerate launch, in a process group of its own."""
        line = command(self.program, *flags({**self.settings, **settings}), launch=processes_on_cpu(processes))
        with self.log.open("w") as log:
            return subprocess.Popen(line, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)

    def go(self, processes: int = 1, faults: tuple = (), **settings) -> list:
        """One run of the command; see `start` and `wait`."""
        return self.wait(self.start(processes, faults, **settings))

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def error(self) -> str:
        """The one line that the run ended with. AssertionError when there is none, or a traceback."""
        lines = [line for line in self.output().splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in self.output(), self.output()
        return lines[0]

    def step(self) -> int:
        """The last step in metrics.jsonl; -1 without."""
        file = self.run_dir / "metrics.jsonl"
        steps = re.findall(r'"step": (\d+).*\n', file.read_text()) if file.exists() else []
        return int(steps[-1]) if steps else -1


def folder_bytes(folder: Path) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def differences(run_dir: Path, expected: Path) -> list:
    """What of a run is not what the run `expected` has, bit for bit: the parts of its newest checkpoint (networks,
    average, optimizers, counters), metrics.jsonl without times, best/, final/, pictures; and what a crash left over."""
    parts, expected_parts = checkpoint_state(run_dir), checkpoint_state(expected)
    names = sorted(parts.keys() | expected_parts.keys())
    found = [name for name in names if not same(parts.get(name), expected_parts.get(name))]
    if read_metrics(run_dir) != read_metrics(expected):
        found.append("metrics.jsonl")
    for folder in ("best", "final", "samples"):
        if folder_bytes(run_dir / folder) != folder_bytes(expected / folder):
            found.append(f"{folder}/")
    for picture in ("curves.png", "progress.png"):
        if (run_dir / picture).read_bytes() != (expected / picture).read_bytes():
            found.append(picture)
    return found + sorted(path.name for path in run_dir.rglob(".*") if path.name != ".lock")
