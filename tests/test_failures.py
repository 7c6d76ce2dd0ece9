"""Processes that die, and numbers that go wrong: how a run ends, and that the same command continues it. Real runs."""

import json
import math
import subprocess
import time

import psutil
import pytest
import torch
from accelerate import Accelerator
from conftest import (
    PLAIN,
    ROOT,
    checkpoint_state,
    command,
    error_line,
    flags,
    processes_on_cpu,
    read_metrics,
    run_command,
    run_ranks,
    same,
)
from test_train import fp16_accelerator, take_steps, tiny_run

import train_rae
from rae_suite import losses, run_folder, steps
from rae_suite.errors import RunError

BUSY = {**PLAIN, "train.save_every_steps": "1", "train.max_steps": "4"}


def deaths() -> dict:
    """Scenarios in which a process is lost: name to processes, settings and faults."""
    scenarios = {
        f"rank {rank} in a {place}": (2, {}, [{"what": "kill", "rank": rank, "place": place, "step": 3}])
        for rank in (0, 1)
        for place in ("step", "evaluation", "checkpoint")
    }
    halt = [{"what": "halt", "rank": 1, "place": "step", "step": 3}]
    scenarios["halted"] = (2, {"train.timeout_minutes": "0.25"}, halt)
    endless = {"train.max_steps": "1000", "data.num_workers": "1"}
    for rank in (0, 1):
        worker = {"what": "kill_worker", "rank": rank, "place": "step", "step": 2}
        scenarios[f"worker of {rank + 1}"] = (rank + 1, endless, [worker])
    return scenarios


def fault(what, step, value="nan", rank=0) -> dict:
    return {"what": what, "rank": rank, "place": "step", "step": step, "value": value}


def failures() -> dict:
    """Scenarios in which a number goes wrong."""
    skipping = {"train.max_nonfinite_steps": "2", "train.max_steps": "6"}
    return {
        "pixels": (1, {}, [fault("pixels", 3, "inf")]),  # nan after the encoder
        "gradient": (1, {}, [fault("gradient", 3, "inf")]),
        "logits": (1, {}, [fault("logits", 3)]),
        "logits before the adversarial loss": (1, {}, [fault("logits", 2)]),
        "disc_gradient": (1, {}, [fault("disc_gradient", 3)]),
        "pixels of one rank": (2, {}, [fault("pixels", 3, rank=1)]),
        "gradient of one rank": (2, {}, [fault("gradient", 3, rank=1)]),
        "skipped": (1, skipping, [fault("pixels", 2), fault("gradient", 3), fault("disc_gradient", 5)]),
        "too many": (1, skipping, [fault("pixels", step) for step in (2, 3, 4)]),
        "untouched": (1, {**skipping, "train.max_steps": "6"}, []),
    }


def run_scenarios(plan: dict, images, folder) -> dict:
    """{name: (run folder, result)}"""
    scenarios = []
    for name, (processes, settings, faults) in plan.items():
        place = folder / name
        settings = {**BUSY, **settings, "data.path": images, "train.output_dir": place / "run"}
        argv = ["train_rae.py", settings]
        scenarios.append({"folder": place, "processes": processes, "argv": argv, "faults": faults})
    results = run_ranks(*scenarios)
    return {name: (folder / name / "run", result) for name, result in zip(plan, results, strict=True)}


# two fixtures: the two halves of this file may run in two processes
@pytest.fixture(scope="module")
def died(images, tmp_path_factory):
    return run_scenarios(deaths(), images, tmp_path_factory.mktemp("deaths"))


@pytest.fixture(scope="module")
def failed(images, tmp_path_factory):
    return run_scenarios(failures(), images, tmp_path_factory.mktemp("failures"))


# ------------------------------------------------------------------------------------------------- a process is lost


@pytest.mark.parametrize("place", ("step", "evaluation", "checkpoint"))
@pytest.mark.parametrize("rank", (0, 1))
def test_a_process_dies(died, rank, place):
    """SIGKILL of either process, in a step, an evaluation or a checkpoint, without a launcher that would end the other:
    the other ends within a minute with one line that says so."""
    run_dir, result = died[f"rank {rank} in a {place}"]
    dead, other = result["ends"][rank], result["ends"][1 - rank]
    assert dead["code"] == -9
    assert other is not None and other["code"] == 1 and other["seconds"] < 60
    line = error_line(result["err"][1 - rank])
    assert line.startswith(f"error: process {1 - rank}: the connection to another process is lost, it died or hangs")
    assert "gloo/" not in line
    saved = [path.name for path in sorted((run_dir / "checkpoints").glob("step-*"))]
    # the checkpoint of step 3 comes after the evaluation of step 3
    assert saved == ["step-00000001", "step-00000002"]


def test_the_run_goes_on_after_a_death(images, died):
    """The command on a folder whose run died while it wrote a checkpoint."""
    run_dir, result = died["rank 0 in a checkpoint"]
    assert list((run_dir / "checkpoints").glob(".*"))
    settings = {**BUSY, "data.path": images, "train.output_dir": run_dir}
    done = run_command("train_rae.py", *flags(settings))
    assert "continuing from" in done.stdout and "step-00000002" in done.stdout
    assert [line["step"] for line in read_metrics(run_dir) if line["kind"] == "train"] == [1, 2, 3, 4]
    assert not list((run_dir / "checkpoints").glob(".*"))


def test_a_process_hangs(died):
    """A process that is still there but no longer answers: the other waits for train.timeout_minutes."""
    _, result = died["halted"]
    assert result["ends"][1] is None
    assert result["ends"][0]["code"] == 1
    line = error_line(result["err"][0])
    assert "process 0: the connection to another process is lost" in line and "Timed out waiting 15000ms" in line


def test_a_data_loading_process_dies(died):
    """As when the system ends it for lack of memory: one line, exit code 1, nothing left behind; the other process of
    the run ends too."""
    _, single = died["worker of 1"]
    assert [end["code"] for end in single["ends"]] == [1]
    line = error_line(single["err"][0])
    assert line.startswith("error: a data loading process died (") and "Killed" in line and "data.num_workers" in line
    _, pair = died["worker of 2"]
    assert [end["code"] for end in pair["ends"]] == [1, 1] and pair["ends"][0]["seconds"] < 60
    assert error_line(pair["err"][1]).startswith("error: process 1: a data loading process died")
    assert error_line(pair["err"][0]).startswith("error: process 0: the connection to another process is lost")
    assert not single["left_behind"] and not pair["left_behind"]


def test_a_process_dies_under_the_launcher(images, tmp_path):
    """accelerate launch ends the others and fails, within a minute."""
    run_dir = tmp_path / "run"
    settings = {**PLAIN, "train.max_steps": "100000", "data.path": images, "train.output_dir": run_dir}
    launch = command("train_rae.py", *flags(settings), launch=("-q", *processes_on_cpu(2)))
    launcher = subprocess.Popen(launch, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (run_dir / "metrics.jsonl").exists() or len(read_metrics(run_dir)) < 4:
        assert launcher.poll() is None
        time.sleep(0.05)
    ranks = {process.environ()["RANK"]: process for process in psutil.Process(launcher.pid).children()}
    start = time.monotonic()
    ranks["1"].kill()
    _, stderr = launcher.communicate(timeout=120)
    assert launcher.returncode != 0 and time.monotonic() - start < 60
    assert "error: process 0: the connection to another process is lost" in stderr
    assert not any(process.is_running() for process in ranks.values())


# -------------------------------------------------------------------------------------------- numbers that go wrong


@pytest.mark.parametrize(
    "name, term, step",
    [
        ("pixels", "recon is nan", 3),
        ("gradient", "grad_norm is inf", 3),
        ("logits", "gan is nan", 3),
        ("logits before the adversarial loss", "disc_loss is nan", 2),
        ("disc_gradient", "disc_grad_norm is nan", 3),
        ("pixels of one rank", "recon is nan", 3),
        ("gradient of one rank", "grad_norm is nan", 3),
    ],
)
def test_not_finite(failed, name, term, step):
    """The run stops on all processes with term, step and last good checkpoint, whose state is finite."""
    run_dir, result = failed[name]
    assert [end["code"] for end in result["ends"]] == [1] * len(result["ends"])
    saved = run_dir / "checkpoints" / f"step-{step - 1:08d}"
    for stderr in result["err"]:
        assert error_line(stderr) == f"error: {term} at step {step}; the last good checkpoint is {saved}"
    assert sorted((run_dir / "checkpoints").iterdir())[-1] == saved
    assert is_finite(checkpoint_state(run_dir))


def is_finite(state) -> bool:
    if isinstance(state, dict):
        return all(map(is_finite, state.values()))
    if isinstance(state, (list, tuple)):
        return all(map(is_finite, state))
    return bool(state.isfinite().all()) if isinstance(state, torch.Tensor) else True


def test_the_run_goes_on_once_the_cause_is_gone(images, failed):
    """The same command, without the fault, ends where a run without it ends, bit for bit."""
    run_dir, _ = failed["logits before the adversarial loss"]
    whole, _ = failed["untouched"]
    run_command(
        "train_rae.py", *flags({**BUSY, "train.max_steps": "6", "data.path": images, "train.output_dir": run_dir})
    )
    assert same(checkpoint_state(run_dir), checkpoint_state(whole))


def test_skipped_steps_are_counted(failed):
    """Skipped steps are told, counted in metrics.jsonl and at the end; not more than train.max_nonfinite_steps in a
    row."""
    run_dir, result = failed["skipped"]
    assert [end["code"] for end in result["ends"]] == [0], result["err"]
    trained = [line for line in read_metrics(run_dir) if line["kind"] == "train"]
    assert [line["skipped_steps"] for line in trained] == [0, 1, 2, 2, 3, 3]
    assert [line["recon"] is None for line in trained] == [False, True, False, False, False, False]
    out = result["out"][0]
    for text in (
        "recon is nan at step 2 (1 in",
        "grad_norm is nan at step 3 (2 in",
        "disc_grad_norm is nan at step 5 (1",
    ):
        assert f"skipped: {text}" in out
    assert "steps skipped, not finite: 3 of 6" in out
    run_dir, result = failed["too many"]
    assert [end["code"] for end in result["ends"]] == [1]
    assert "recon is nan at step 4; the last good checkpoint is" in error_line(result["err"][0])
    assert is_finite(checkpoint_state(run_dir))


# ------------------------------------------------------------------------------------ steps, inside this process


def everything(run) -> dict:
    """All that training changes: both networks with their buffers, both optimizers, the average."""
    return {
        "decoder": run.model.decoder.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "heads": run.discriminator.heads.state_dict(),
        "disc_optimizer": run.disc_optimizer.state_dict(),
        "ema": run.ema.state_dict(),
    }


def copied(state):
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    return state.clone() if isinstance(state, torch.Tensor) else json.loads(json.dumps(state))


def without_rates(state: dict) -> dict:
    """Without learning rates, which are set before a step is tried."""
    rates = {"lr", "initial_lr"}
    groups = {
        name: [{k: v for k, v in group.items() if k not in rates} for group in state[name]["param_groups"]]
        for name in ("optimizer", "disc_optimizer")
    }
    return {**state, **{name: {"state": state[name]["state"], "groups": groups[name]} for name in groups}}


@pytest.mark.parametrize(
    "what, changed",
    [("pixels", set()), ("gradient", set()), ("logits", set()), ("disc_gradient", {"decoder", "optimizer", "ema"})],
)
def test_a_skipped_update_changes_nothing(images, what, changed):
    """What is not finite in the decoder's step leaves all as it was; in the discriminator's, which comes second, its
    weights, moments and spectral-norm vectors."""
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    run = tiny_run(images, Accelerator(cpu=True), **{"gan.start_step": "0", "gan.update_start_step": "0"})
    take_steps(run, pixels, 2, steps=2)
    before = without_rates(copied(everything(run)))
    batches = [part.clone() for part in pixels.chunk(2)]
    heads = run.discriminator.heads
    hooks = []
    if what == "pixels":
        batches[1][0, 0, 0, 0] = math.nan
    elif what == "gradient":
        hooks = [run.model.decoder.decoder_pred.weight.register_hook(lambda g: g * math.nan)]
    elif what == "logits":
        hooks = [heads[0].register_forward_hook(lambda module, inputs, output: output * math.inf)]
    else:
        hooks = [heads[0][-1].bias.register_hook(lambda g: g * math.inf)]
    record = train_rae.train_step(run, batches, 2).read()
    for hook in hooks:
        hook.remove()
    assert record["nonfinite"] is not None
    after = without_rates(everything(run))
    assert {name for name in before if not same(before[name], after[name])} == changed
    record = train_rae.train_step(run, list(pixels.chunk(2)), 3).read()
    assert record["nonfinite"] is None
    assert not any(same(before[name], without_rates(everything(run))[name]) for name in before)


def test_fp16_term_with_good_gradients(images, monkeypatch):
    """A loss that is not finite while its gradients are, so that the loss scaler sees nothing: skipped all the same."""
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    try:
        run = tiny_run(images, fp16_accelerator(1024.0), **{"gan.start_step": "0", "gan.update_start_step": "0"})
        take_steps(run, pixels, 2, steps=1)
        before = without_rates(copied(everything(run)))
        loss = losses.DISCRIMINATOR_LOSSES[run.config.gan.loss]
        monkeypatch.setitem(
            losses.DISCRIMINATOR_LOSSES, run.config.gan.loss, lambda real, fake: loss(real, fake) + math.inf
        )
        record = train_rae.train_step(run, list(pixels.chunk(2)), 1).read()
        assert record["nonfinite"] == "disc_loss" and math.isfinite(record["disc_grad_norm"])
        after = without_rates(everything(run))
        changed = {name for name in before if not same(before[name], after[name])}
        assert changed == {"decoder", "optimizer", "ema"} and run.accelerator.scaler.get_scale() == 1024
    finally:
        Accelerator().state._reset_state()


def test_fp16_overflow_is_no_failure_until_it_never_ends(images, tmp_path):
    """The loss scaler halves its scale and goes on: such steps are neither failures nor counted. Gradients that
    overflow at every scale end the run."""
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    settings = {"gan.start_step": "0", "gan.update_start_step": "0"}
    try:
        run = tiny_run(images, fp16_accelerator(2.0**40), **settings)
        state, skipped = run_folder.RunState(), 0
        start = {n: p.detach().clone() for n, p in run.model.decoder.named_parameters()}
        for step in range(59):
            record = train_rae.train_step(run, [pixels], step).read()
            steps.stop_on_nonfinite(record, state, 0, run.accelerator, tmp_path)
            if math.isfinite(record["grad_norm"]) and math.isfinite(record["disc_grad_norm"]):
                break
            skipped += 1
        assert 5 < skipped < 40 and state.skipped_steps == 0
        assert any(not torch.equal(start[n], p) for n, p in run.model.decoder.named_parameters())

        run = tiny_run(images, fp16_accelerator(2.0**10), **settings)
        run.model.decoder.decoder_pred.bias.register_hook(lambda g: g * math.inf)
        state = run_folder.RunState()
        with pytest.raises(RunError, match="grad_norm is (inf|nan) at step 12; the last good checkpoint is none"):
            for step in range(59):
                record = train_rae.train_step(run, [pixels], step).read()
                steps.stop_on_nonfinite(record, state, 0, run.accelerator, tmp_path)
    finally:
        Accelerator().state._reset_state()
