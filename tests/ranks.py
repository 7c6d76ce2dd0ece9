"""Processes of one run without a launcher, each as on a machine of its own, in which things go wrong on purpose.

    python tests/ranks.py SCENARIOS.json

A scenario is {"folder", "processes", "argv", "faults", "steps_behind"}; argv begins with train_rae.py, train_dit.py or
training_steps.py; a fault is {"what", "rank", "place", "step", "value"}, see `strike`, `spoil` and `inject`;
steps_behind, which may be left out, is what steps.steps_behind gives. The libraries are imported once, then the
processes are forked, one scenario after the other. `folder` gets <rank>.out, <rank>.err and result.json: for each
process its exit code (minus the signal that ended it) and the seconds that it outlived the first one; null for one that
was still there after DEADLINE; and whether processes that load data were left behind.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import training_steps  # noqa: E402
from forked import free_port  # noqa: E402

import train_dit  # noqa: E402
import train_rae  # noqa: E402
from rae_suite import checkpoints as checkpoint_files  # noqa: E402
from rae_suite import launch, steps  # noqa: E402

DEADLINE = 60  # seconds after the first process has ended
START = 300  # seconds for the first process to end


def strike(fault: dict) -> None:
    """End or halt this process ("kill", "halt"), ask it to stop ("stop"), hold it up ("slow"), or end a process that
    loads data for it ("kill_worker"), as the system does when memory runs out."""
    if fault["what"] == "slow":
        time.sleep(3)
    elif fault["what"] == "kill_worker":
        psutil.Process().children()[0].kill()
    else:
        signals = {"kill": signal.SIGKILL, "halt": signal.SIGSTOP, "stop": signal.SIGTERM}
        os.kill(os.getpid(), signals[fault["what"]])


def spoil(fault: dict, run: train_rae.Run, batches: list) -> list:
    """Make something of a step nan or inf: a pixel of the batch ("pixels"), a gradient of the decoder or of the
    discriminator ("gradient", "disc_gradient"), the discriminator's logits ("logits"). Returns what undoes it."""
    value = float(fault["value"])
    if fault["what"] == "pixels":
        batches[0][0, 0, 0, 0] = value
        return []
    if fault["what"] == "gradient":
        return [next(p for p in run.model.decoder.parameters() if p.requires_grad).register_hook(lambda g: g * value)]
    heads = run.accelerator.unwrap_model(run.discriminator).heads
    if fault["what"] == "disc_gradient":
        return [next(heads.parameters()).register_hook(lambda g: g * value)]
    return [heads[0].register_forward_hook(lambda module, inputs, output: output * value)]


def inject(faults: list) -> None:
    """Put this rank's faults into the functions of a run. `place` is "step" (before it is taken), or "evaluation",
    "checkpoint" or "removal" (of a folder) after that step; `step` is counted from 1."""
    train_step, reconstruct, write_folder = train_rae.train_step, train_rae.reconstruct, checkpoint_files.write_folder
    rmtree = shutil.rmtree
    now = {"step": 0}

    def due(place: str) -> list:
        return [fault for fault in faults if fault["place"] == place and fault["step"] == now["step"]]

    def faulty_step(run, batches, step, *rest):
        now["step"] = step + 1
        handles = []
        for fault in due("step"):
            if "value" in fault:
                handles += spoil(fault, run, batches)
            else:
                strike(fault)
        record = train_step(run, batches, step, *rest)
        for handle in handles:
            handle.remove()
        return record

    def faulty_reconstruct(*arguments):
        for fault in due("evaluation"):
            strike(fault)
        return reconstruct(*arguments)

    def faulty_folder(target, write, *rest):
        def write_part(folder):
            write(folder)
            if target.parent.name == "checkpoints":
                for fault in due("checkpoint"):
                    strike(fault)

        write_folder(target, write_part, *rest)

    def faulty_rmtree(*arguments, **options):
        for fault in due("removal"):
            strike(fault)
        rmtree(*arguments, **options)

    train_rae.train_step, train_rae.reconstruct, shutil.rmtree = faulty_step, faulty_reconstruct, faulty_rmtree
    checkpoint_files.write_folder = faulty_folder


def become_rank(scenario: dict, rank: int, port: int) -> None:
    """Turn this forked process into one of the scenario's, as the launcher on its own machine would start it."""
    os.setpgrp()  # its workers are found by it
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(scenario["folder"]) / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    if scenario["processes"] > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(scenario["processes"]), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
    inject([fault for fault in scenario["faults"] if fault["rank"] == rank])
    if "steps_behind" in scenario:
        steps.steps_behind = lambda device: scenario["steps_behind"]
    sys.argv = scenario["argv"]


def wait_for(processes: dict, halted: set) -> list:
    """Ends of the processes {pid: rank} in order of rank. Those of the ranks `halted` are waited for until the others
    have ended."""
    ends, start, first_end = [None] * len(processes), time.monotonic(), None
    while set(processes.values()) - halted:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            first_end = first_end or time.monotonic()
            outlived = round(time.monotonic() - first_end, 1)
            ends[processes.pop(pid)] = {"code": os.waitstatus_to_exitcode(status), "seconds": outlived}
        elif time.monotonic() - (first_end or start) > (DEADLINE if first_end else START):
            break
        time.sleep(0.05)
    for pid in processes:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return ends


def left_behind(groups: list) -> bool:
    """Whether a process of these process groups is still there after the 15 seconds in which workers notice that they
    are alone."""
    for _ in range(150):
        alive = [p for p in psutil.process_iter(["status"]) if p.info["status"] != psutil.STATUS_ZOMBIE]
        alive = [p for p in alive if psutil.pid_exists(p.pid) and group_of(p.pid) in groups]
        if not alive:
            return False
        time.sleep(0.1)
    return True


def group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return -1


def main() -> bool:
    """Run all scenarios. True in the processes that are forked for them, whose program is still to be run."""
    for scenario in json.loads(Path(sys.argv[1]).read_text()):
        folder, port, processes = Path(scenario["folder"]), free_port(), {}
        folder.mkdir(parents=True, exist_ok=True)
        for rank in range(scenario["processes"]):
            pid = os.fork()
            if pid == 0:
                become_rank(scenario, rank, port)
                return True
            processes[pid] = rank
        groups = list(processes)
        ends = wait_for(processes, {fault["rank"] for fault in scenario["faults"] if fault["what"] == "halt"})
        (folder / "result.json").write_text(json.dumps({"ends": ends, "left_behind": left_behind(groups)}))
    return False


if __name__ == "__main__" and main():
    programs = {
        "train_rae.py": train_rae.main,
        "train_dit.py": train_dit.main,
        "training_steps.py": training_steps.main,
    }
    launch.run_main(programs[sys.argv[0]])
