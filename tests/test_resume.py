"""A run that is stopped, however and wherever, and continued ends with the bits of the run that was not."""

import functools
import json
import signal
import time

import psutil
import pytest
from harness import Training, differences
from test_streams import write_parquet, write_tar

from rae_suite.checkpoints import checkpoints
from rae_suite.files import step_of

# every loss but LPIPS, which has no state and is slow; 3 steps an epoch, 2 micro-batches a step
SETTINGS = {
    "train.max_steps": 12,
    "perceptual.weight": "0",
    "eval.metrics": "[psnr]",
    "eval.every_steps": 4,
    "logging.report_to": "[]",
}
# What stops each part of a run in turn, how many processes load its data, and the step that its last checkpoint has.
# The signal comes at the `count`-th call of a function since the part began; all but SIGKILL end it one step later.
STOPS = [
    ("usr1", "generator_gradient", 3, 0, 3),  # between the micro-batches of step 2; ends at an epoch's end
    ("hup", "discriminator_step", 1, 2, 5),  # GAN phase; ends mid-epoch
    ("kill", "generator_gradient", 2, 2, 5),  # between the micro-batches of step 6
    ("kill", "discriminator_step", 2, 0, 6),
    ("term", "measure", 1, 2, 9),  # of step 8
    ("kill", "train_step", 1, 0, 9),  # an epoch's end
    ("int int usr1", "save_checkpoint", 1, 0, 11),  # of step 10
]


@pytest.fixture(scope="module")
def streams(images, tmp_path_factory):
    """Settings of runs that stream: of one process from parquet files, epoch after epoch, of two from a mixture of
    parquet files and tars."""
    folder = tmp_path_factory.mktemp("shards")
    for i, ids in enumerate((range(9), range(9, 12), range(12, 26))):
        write_parquet(folder / f"p/{i}.parquet", ids, side=40)
        write_tar(folder / f"t/{i}.tar", ids, side=40)
    both = {"data.streaming": "true", "data.shuffle_buffer": 5, "data.stream_lanes": 4, "eval.num_samples": 8}
    both["data.eval_path"] = images / "validation"
    mixture = json.dumps({f"{folder}/p/*": 1.0, f"{folder}/t/{{0..2}}.tar": 2.0})
    return {
        1: {**both, "data.path": f"{folder}/p/*"},
        2: {**both, "data.mixture": mixture, "data.steps_per_epoch": 3},
    }


@pytest.fixture(scope="module")
def whole(images, streams, tmp_path_factory):
    """Gives the folder of a finished run of one or two processes that nothing stopped."""

    @functools.cache
    def run(processes: int, streaming: bool = False):
        folder = tmp_path_factory.mktemp("whole")
        training = Training(folder / "run", images, **{**SETTINGS, **(streams[processes] if streaming else {})})
        assert training.go(processes) == [0] * processes, training.output()
        return training.run_dir

    return run


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("processes", [1, 2])
def test_resume_is_exact(processes, streaming, images, streams, whole, tmp_path):
    """Stopped by SIGTERM, SIGUSR1, SIGHUP, Ctrl-C and SIGKILL to one process, in the middle of an epoch and at its end,
    in accumulation, GAN phase, evaluation and checkpoint writing, each part with another number of workers."""
    training = Training(tmp_path / "run", images, **{**SETTINGS, **(streams[processes] if streaming else {})})
    for i, (signals, function, count, workers, step) in enumerate(STOPS):
        rank = i % processes
        fault = {"place": f"call {function}", "count": count, "action": signals, "rank": rank}
        codes = training.go(processes, (fault,), **{"data.num_workers": workers})
        assert codes[rank] == (-9 if signals == "kill" else 0), training.output()
        assert step_of(checkpoints(training.run_dir)[-1]) == step
        if signals != "kill":
            assert f"after step {step}, saved; the same command continues" in training.output()
            assert "Traceback" not in training.output() and not any(codes)
    assert training.go(processes, **{"data.num_workers": 2}) == [0] * processes
    assert differences(training.run_dir, whole(processes, streaming)) == []


def test_signals_before_the_loop_and_ctrl_c(images, whole, tmp_path):
    """SIGTERM and Ctrl-C end a run at once that has nothing to save yet; in the loop a second Ctrl-C ends it with one
    line that names the checkpoint that it goes on from. Nothing is lost by either."""
    training = Training(tmp_path / "run", images, **SETTINGS)
    assert training.go(faults=({"place": "call load_splits", "count": 1, "action": "term"},)) == [-15]
    assert not training.run_dir.exists()
    assert training.go(faults=({"place": "call measure", "count": 1, "action": "term"},)) == [-15]
    assert training.go(faults=({"place": "call build_run", "count": 1, "action": "int"},)) == [130]
    assert training.error() == "error: stopped by Ctrl-C"
    interrupt = {"place": "call generator_gradient", "count": 10, "action": "int pause int"}
    assert training.go(faults=(interrupt,), **{"data.num_workers": 2}) == [130]
    saved = training.run_dir / "checkpoints/step-00000004"
    line = f"error: stopped by Ctrl-C; the last good checkpoint is {saved}; the same command continues"
    assert training.error() == line
    assert training.go() == [0]
    assert differences(training.run_dir, whole(1)) == []


def test_stopping_a_launch_of_two(images, whole, tmp_path):
    """SIGTERM to accelerate launch alone, which passes it on, then to every process there is, as Slurm sends it, and
    Ctrl-C, which a terminal sends to all of them and the launcher once more: each time the run saves and ends, and
    nothing is left running."""
    training = Training(tmp_path / "run", images, **SETTINGS)
    for how in ("launcher", "everyone", "Ctrl-C"):
        begin = training.step()
        launcher = training.launch(2, **{"data.num_workers": 1})
        while training.step() <= max(begin, 0):
            assert launcher.poll() is None, training.output()
            time.sleep(0.01)
        processes = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
        for process in processes if how != "launcher" else processes[:1]:
            process.send_signal(signal.SIGINT if how == "Ctrl-C" else signal.SIGTERM)
        launcher.wait(120)
        assert psutil.wait_procs(processes, 60)[1] == []
        step = training.step()
        by = "Ctrl-C" if how == "Ctrl-C" else "SIGTERM"
        assert f"stopped by {by} after step {step}, saved" in training.output() or step == 12, training.output()
        assert step_of(checkpoints(training.run_dir)[-1]) == step
    assert training.go(2) == [0, 0]
    assert differences(training.run_dir, whole(2)) == []
