"""train_rae.py as users run it: the real command line on real images, tiny."""

import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import (
    PLAIN,
    ROOT,
    TINY,
    checkpoint_state,
    command,
    error_line,
    flags,
    processes_on_cpu,
    read_metrics,
    run_command,
    same,
)
from PIL import Image

import train_rae
from modeling_rae import RAEModel
from rae_suite import launch, rae_networks, updates
from rae_suite.checkpoints import read_checkpoint
from rae_suite.randomness import step_generator
from rae_suite.settings import LRScheduleConfig
from rae_suite.settings_rae import parse_config


def train(images, run_dir, settings, check=True, launch=(), **environment):
    settings = {**settings, "data.path": images, "train.output_dir": run_dir}
    return run_command("train_rae.py", *flags(settings), check=check, launch=launch, **environment)


@pytest.fixture(scope="module")
def whole_run(images, tmp_path_factory):
    """Six uninterrupted steps with every loss on, accumulation, noise and augmentation."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    settings = {**TINY, "train.gradient_accumulation_steps": "2", "eval.raw": "true"}
    settings["logging.samples_every_steps"] = "null"  # the default: with each evaluation
    done = train(images, run_dir, settings)
    return run_dir, settings, done.stdout


def test_run_folder(whole_run):
    """A run leaves what the README promises, and its numbers say that every loss was on and learning happened."""
    run_dir, _, stdout = whole_run
    lines = read_metrics(run_dir)
    trained = [line for line in lines if line["kind"] == "train"]
    evals = [line for line in lines if line["kind"] == "eval"]
    names = {"kind", "step", "epoch", "loss", "recon", "lpips", "gan", "adaptive_weight", "disc_loss", "logits_real",
             "logits_fake", "accuracy", "grad_norm", "lr", "lr_disc", "disc_grad_norm",
             "skipped_steps"}  # fmt: skip
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 5, 6]
    assert all(line.keys() == names for line in trained)
    assert trained[0]["lpips"] == 0 and trained[0]["disc_loss"] is None
    assert trained[1]["lpips"] > 0 and trained[1]["disc_loss"] > 0 and trained[1]["gan"] == 0
    assert trained[2]["gan"] != 0 and trained[2]["adaptive_weight"] > 0
    for line in trained:
        total = line["recon"] + line["lpips"] + 0.75 * line["adaptive_weight"] * line["gan"]
        # a mean of products over micro-batches is not the product of means
        assert line["loss"] == pytest.approx(total, rel=1e-5 if line["gan"] == 0 else 2e-2)
    assert [(line["step"], line["model"]) for line in evals] == [(s, m) for s in (0, 3, 6) for m in ("raw", "ema")]
    assert all({"psnr", "ssim", "lpips"} <= line.keys() and line["num_samples"] == 8 for line in evals)
    assert evals[-1]["psnr"] > evals[1]["psnr"]

    model = RAEModel.from_pretrained(run_dir / "final")
    parts = checkpoint_state(run_dir)
    assert set(parts) == {"state", "decoder", "ema", "optimizer", "discriminator", "disc_optimizer"}
    shadow = parts["ema"]
    assert all(torch.equal(p, shadow[n]) for n, p in model.decoder.named_parameters())
    assert RAEModel.from_pretrained(run_dir / "best").config.image_size == 32
    for step in (0, 3, 6):
        grid = Image.open(run_dir / f"samples/step-{step:08d}.png")
        assert grid.size == (8 * 100 + 4, 2 * 100 + 4)  # 8 images of 96 px over their reconstructions, 4 px apart
    assert Image.open(run_dir / "curves.png").width > 1000
    for text in (f"{run_dir}/samples/step-00000006.png", f"{run_dir}/curves.png", f"{run_dir}/final"):
        assert text in stdout
    assert "before" in stdout and f"{evals[-1]['psnr']:.4f}" in stdout


def test_resolved_config_is_a_config(whole_run):
    run_dir, settings, _ = whole_run
    config = parse_config(["--config", str(run_dir / "config.yaml")])
    assert config.gan.start_step == 2 and config.train.output_dir == str(run_dir)


def test_finished_run_says_so(images, whole_run):
    """The same command on a finished run exits 0 and changes nothing."""
    run_dir, settings, _ = whole_run
    before = (run_dir / "metrics.jsonl").read_bytes()
    done = train(images, run_dir, settings)
    assert "is finished: 6 of 6 steps" in done.stdout
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_checkpoints_and_evaluation_leave_no_trace(images, whole_run, tmp_path):
    """Evaluating and saving at every step, with workers, gives the same weights as the run that did neither."""
    whole, settings, _ = whole_run
    run_dir = tmp_path / "busy"
    busy = {"eval.every_steps": "1", "train.save_every_steps": "1", "data.num_workers": "2", "eval.batch_size": "3"}
    train(images, run_dir, {**settings, **busy})
    assert same(checkpoint_state(run_dir), checkpoint_state(whole))
    assert [p.name for p in sorted((run_dir / "checkpoints").iterdir())] == ["step-00000005", "step-00000006"]


def test_resume_forgets_lines_after_the_checkpoint(images, tmp_path):
    """A run killed after its checkpoint writes the lines of the lost steps again, once."""
    run_dir = tmp_path / "killed"
    train(images, run_dir, {**PLAIN, "train.max_steps": "3"})
    expected = read_metrics(run_dir)
    with (run_dir / "metrics.jsonl").open("a") as file:  # steps whose weights were lost, and half a line
        file.write(json.dumps({"kind": "train", "step": 4, "loss": 7}) + "\n" + '{"kind": "tra')
    shutil.copytree(run_dir / "checkpoints/step-00000003", run_dir / "checkpoints/.step-00000004.partial")
    (run_dir / "best").rename(run_dir / ".best.old")  # killed between the two renames
    train(images, run_dir, {**PLAIN, "train.max_steps": "5"})
    lines = read_metrics(run_dir)
    assert lines[: len(expected)] == expected
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5]
    assert all(line.get("loss") != 7 for line in lines)
    assert RAEModel.from_pretrained(run_dir / "best") is not None
    names = {path.name for path in run_dir.rglob(".*")}
    assert names == {".lock"}


def test_killed_before_the_first_checkpoint(images, whole_run, tmp_path):
    """Such a run begins again, in the same folder; its lines stand there once. Two runs in one folder exclude each
    other, and a damaged config.yaml is named."""
    _, settings, _ = whole_run
    run_dir = tmp_path / "run"
    settings = {**PLAIN, "train.max_steps": "2", "data.path": images, "train.output_dir": run_dir}
    process = subprocess.Popen(command("train_rae.py", *flags(settings)), cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (run_dir / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)  # it holds the folder while the second run looks at it
    done = run_command("train_rae.py", *flags(settings), check=False)
    process.kill()
    process.wait()
    assert done.returncode == 2 and "another run is at work in" in error_line(done.stderr)
    assert (run_dir / ".lock").read_text()  # what the other machines of the first run read is still there
    assert not list((run_dir / "checkpoints").glob("step-*"))
    run_command("train_rae.py", *flags(settings))
    kinds = [(line["kind"], line["step"]) for line in read_metrics(run_dir)]
    assert kinds == [("eval", 0), ("train", 1), ("train", 2), ("eval", 2)]
    weights = run_dir / "checkpoints/step-00000002/optimizer.pt"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = run_command("train_rae.py", *flags({**settings, "train.max_steps": "3"}), check=False)
    assert done.returncode == 1 and f"{weights.parent} is damaged (optimizer.pt has" in error_line(done.stderr)
    (run_dir / "config.yaml").write_text("")
    done = run_command("train_rae.py", *flags(settings), check=False)
    assert done.returncode == 2 and "config.yaml is damaged" in error_line(done.stderr)


def test_continuing_differently(images, whole_run, tmp_path):
    """A finished run can be made longer, with another best metric; other images or another precision are refused."""
    whole, settings, _ = whole_run
    run_dir = shutil.copytree(whole, tmp_path / "run")
    more = {**settings, "train.max_steps": "7", "eval.metrics": "[ssim,psnr]", "eval.best_metric": "ssim"}
    done = train(images, run_dir, more)
    assert "ssim" in done.stdout and read_metrics(run_dir)[-1]["step"] == 7
    best, final = (RAEModel.from_pretrained(run_dir / name).state_dict() for name in ("best", "final"))
    assert same(best, final)  # the best SSIM so far, whatever the PSNR was before
    (before,) = [line for line in done.stdout.splitlines() if line.startswith("psnr")]
    assert before.split()[1] == f"{read_metrics(run_dir)[1]['psnr']:.4f}"  # of step 0, also under other settings
    # longer, stopped, and then declared long enough: final/ is of the last step, not of the first end
    longer = {**more, "train.max_steps": "4000", "data.path": images, "train.output_dir": run_dir}
    process = subprocess.Popen(command("train_rae.py", *flags(longer)), cwd=ROOT, stdout=subprocess.DEVNULL)
    while read_metrics(run_dir)[-1]["step"] < 8:
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == 0 and not (run_dir / "final").exists()
    newest = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    train(images, run_dir, {**more, "train.max_steps": str(int(newest.name.removeprefix("step-")))})
    ema = read_checkpoint(newest)["ema"]
    final = RAEModel.from_pretrained(run_dir / "final")
    assert all(torch.equal(p, ema[n]) for n, p in final.decoder.named_parameters())
    done = train(images, run_dir, {**more, "train.mixed_precision": "bf16"}, check=False)
    assert done.returncode == 2 and "train.mixed_precision is 'no' there and 'bf16' now" in error_line(done.stderr)
    data = shutil.copytree(images, tmp_path / "data")
    train(data, tmp_path / "other", {**PLAIN, "train.max_steps": "1"})
    extra = next((data / "train").rglob("*.png"))
    shutil.copy(extra, extra.with_name("extra.png"))
    done = train(data, tmp_path / "other", {**PLAIN, "train.max_steps": "2"}, check=False)
    assert done.returncode == 2 and "25 training images" in error_line(done.stderr) and "24" in done.stderr


def test_stopping_the_launcher(images, tmp_path):
    """accelerate launch dies of SIGTERM without passing it on; the run notices, saves and ends."""
    run_dir = tmp_path / "run"
    settings = {**PLAIN, "train.max_steps": "1000", "data.path": images, "train.output_dir": run_dir}
    launch = command("train_rae.py", *flags(settings), launch=processes_on_cpu(1))
    launcher = subprocess.Popen(launch, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (run_dir / "metrics.jsonl").exists() or len(read_metrics(run_dir)) < 2:
        assert launcher.poll() is None
        time.sleep(0.01)
    launcher.terminate()
    launcher.wait()
    deadline = time.time() + 60
    while not list((run_dir / "checkpoints").glob("step-*")):
        assert time.time() < deadline
        time.sleep(0.05)
    with (run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits for the end of the run
    lines = read_metrics(run_dir)
    checkpoint = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    assert lines[-1]["step"] == int(checkpoint.name.removeprefix("step-")) < 1000


# --------------------------------------------------------------------------------------- steps, inside this process


def tiny_run(images, accelerator, **settings):
    config = parse_config(flags({**PLAIN, "data.path": images, **settings}))
    return train_rae.build_run(config, accelerator, rae_networks.build_rae_config(config.model), steps_per_epoch=3)


def take_steps(run, pixels, micro_batches, steps=3):
    records = [train_rae.train_step(run, list(pixels.chunk(micro_batches)), step).read() for step in range(steps)]
    return records, {n: p.detach().clone() for n, p in run.model.decoder.named_parameters()}


def relative_difference(a: dict, b: dict) -> float:
    return max(((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-3)).item() for n in b)


def test_accumulation_is_a_bigger_batch(images):
    """Four micro-batches of 2 are one batch of 8, losses and weights, up to the order of sums."""
    pixels = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    settings = {"gan.weight": "0", "model.noise_tau": "0", "train.clip_grad_norm": "0.5", "optimizer.eps": "1.0e-4"}
    one, weights = take_steps(tiny_run(images, Accelerator(cpu=True), **settings), pixels, 1)
    four, accumulated = take_steps(tiny_run(images, Accelerator(cpu=True), **settings), pixels, 4)
    assert relative_difference(accumulated, weights) < 1e-5
    for a, b in zip(one, four, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_clipping_limits_the_step(images):
    """The logged norm is the one before clipping; Adam's first moment shows what was left after it."""
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    moments = []
    for limit in ("1.0e+9", "0.25"):
        run = tiny_run(images, Accelerator(cpu=True), **{"gan.weight": "0", "train.clip_grad_norm": limit})
        (record,), _ = take_steps(run, pixels, 1, steps=1)
        state = run.optimizer.state.values()
        moments.append((record["grad_norm"], sum(s["exp_avg"].norm() ** 2 for s in state).sqrt().item()))
    (norm, free), (same_norm, clipped) = moments
    assert norm == same_norm > 0.25
    assert free == pytest.approx(norm * 0.1, rel=1e-3)  # 1 - beta1
    assert clipped == pytest.approx(0.25 * 0.1, rel=1e-3)


def fp16_accelerator(init_scale):
    """Accelerate refuses fp16 without a GPU; its loss scaling works on the CPU when switched on by hand."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    return accelerator


def test_fp16_loss_scaling(images):
    """Scaled losses in half precision take nearly the float32 step, for both networks; an overflow skips the step and
    halves the scale instead of ending the run."""
    pixels = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    settings = {"gan.start_step": "0", "gan.update_start_step": "0"}
    try:
        half_run = tiny_run(images, fp16_accelerator(1024.0), **settings)
        (half, _), weights = take_steps(half_run, pixels, 2, steps=2)
        heads = {n: p.clone() for n, p in half_run.discriminator.heads.named_parameters()}
        overflowing = tiny_run(images, fp16_accelerator(2.0**120), **settings)
        before = {n: p.detach().clone() for n, p in overflowing.model.decoder.named_parameters()}
        (record,), after = take_steps(overflowing, pixels, 1, steps=1)
        skipping = tiny_run(images, fp16_accelerator(1024.0), **settings)
        bad = [train_rae.train_step(skipping, [pixels * math.nan], step).read() for step in range(2)]
        (good,), _ = take_steps(skipping, pixels, 1, steps=1)
    finally:
        Accelerator().state._reset_state()
    assert [record["nonfinite"] for record in bad] == ["recon", "recon"] and good["nonfinite"] is None
    full_run = tiny_run(images, Accelerator(cpu=True), **settings)
    (full, _), expected = take_steps(full_run, pixels, 2, steps=2)
    assert half["loss"] == pytest.approx(full["loss"], rel=2e-2)
    assert half["adaptive_weight"] == pytest.approx(full["adaptive_weight"], rel=5e-2)
    assert half["grad_norm"] == pytest.approx(full["grad_norm"], rel=5e-2)
    start = dict(tiny_run(images, Accelerator(cpu=True), **settings).model.decoder.named_parameters())
    moved = torch.cat([(expected[n] - start[n]).flatten() for n in expected])
    half_moved = torch.cat([(weights[n] - start[n]).flatten() for n in expected])
    assert torch.nn.functional.cosine_similarity(moved, half_moved, dim=0) > 0.95
    assert not any(torch.equal(p, heads[n]) for n, p in build_heads(images, settings) if n.endswith("weight_orig"))
    assert record["nonfinite"] is None
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert overflowing.accelerator.scaler.get_scale() < 2.0**120


def test_discriminator_with_broken_gradients_is_left_alone(images):
    """A finite loss with a gradient that is not finite does not reach the discriminator's weights."""
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    run = tiny_run(images, Accelerator(cpu=True), **{"gan.update_start_step": "0", "gan.updates_per_step": "2"})
    heads = list(run.discriminator.heads.parameters())
    before = [p.detach().clone() for p in heads]
    heads[0].register_hook(lambda gradient: gradient * math.inf)
    record = train_rae.train_step(run, [pixels], 0).read()
    assert record["nonfinite"] == "disc_grad_norm" and math.isfinite(record["disc_loss"])
    assert all(torch.equal(p, old) for p, old in zip(heads, before, strict=True))


def build_heads(images, settings):
    return tiny_run(images, Accelerator(cpu=True), **settings).discriminator.heads.named_parameters()


def test_discriminator_input(images):
    """Without noise, and with a decoder that stands still, old and new reconstructions are the same; otherwise not."""
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    settings = {"gan.update_start_step": "0", "gan.start_step": "0", "model.noise_tau": "0"}
    losses, decoded = {}, {}
    for lr in ("1.0e-20", "1.0e-2"):
        for source in ("fresh", "reuse"):
            run = tiny_run(images, Accelerator(cpu=True), **settings, **{"optimizer.lr": lr, "gan.disc_input": source})
            calls = []
            run.model.decoder.register_forward_hook(lambda *args, calls=calls: calls.append(1))
            records, _ = take_steps(run, pixels, 2, steps=2)
            losses[lr, source], decoded[source] = [record["disc_loss"] for record in records], len(calls)
    assert losses["1.0e-20", "fresh"] == pytest.approx(losses["1.0e-20", "reuse"], rel=1e-6)
    assert losses["1.0e-2", "fresh"] != pytest.approx(losses["1.0e-2", "reuse"], rel=1e-4)
    assert decoded == {"fresh": 8, "reuse": 4}  # two steps of two micro-batches


def test_noise_depends_on_step_rank_and_micro_batch(images):
    run = tiny_run(images, Accelerator(cpu=True))
    draws = [
        torch.rand(4, generator=step_generator(run.accelerator, run.config.train, False, *key))
        for key in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[3])


def test_gradients_are_not_divided_twice(images, new_accelerator, monkeypatch):
    """A variable of accelerate launch that would divide the discriminator's gradients once more."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    config = parse_config(flags({**PLAIN, "data.path": images}))
    assert launch.build_accelerator(config.train, config.logging.report_to).gradient_accumulation_steps == 1


def test_skipping_is_refused_where_nothing_is_skipped():
    launch.check_skipping(0, torch.device("mps"))
    launch.check_skipping(1, torch.device("cuda"))
    with pytest.raises(ValueError, match="train.max_nonfinite_steps: expected 0, got 1"):
        launch.check_skipping(1, torch.device("mps"))


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(type="cosine", warmup_epochs=1, decay_end_epoch=3, final_lr=0.1),
         [0.5, 1, 1, 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2, 0.55, 0.1 + 0.9 * (1 - math.cos(math.pi / 4)) / 2,
          0.1, 0.1]),
        (dict(type="linear", warmup_steps=2, warmup_from_zero=False, decay_end_step=6, final_lr=0.2),
         [1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2]),
        (dict(type="constant", warmup_steps=4), [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        (dict(type="cosine", warmup_steps=0, decay_end_step=0, final_lr=0.3), [0.3] * 8),
    ],
)  # fmt: skip
def test_learning_rate(settings, expected):
    """Warm-up from zero or at the peak, cosine, linear and constant, in epochs of two steps and in steps."""
    schedule = LRScheduleConfig(**settings)
    found = [updates.learning_rate(step, 1.0, schedule, steps_per_epoch=2) for step in range(8)]
    assert found == pytest.approx(expected)


# -------------------------------------------------------------------------------------------- precision, trackers


def test_bf16_with_trackers(images, tmp_path):
    """bf16 autocast trains; tensorboard and wandb (offline) get scalars and the sample grid."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = tmp_path / "tracked"
    settings = {**PLAIN, "train.mixed_precision": "bf16", "logging.report_to": "[tensorboard,wandb]"}
    settings["logging.samples_every_steps"] = "null"  # the default: with each evaluation
    train(images, run_dir, settings, WANDB_MODE="offline", WANDB_SILENT="true")
    assert all(np.isfinite(line["loss"]) for line in read_metrics(run_dir) if line["kind"] == "train")
    events = EventAccumulator(str(run_dir / "logs" / "rae"), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("eval_ema/psnr")] == [0, 3, 6]
    assert [event.step for event in events.Images("reconstructions")] == [0, 3, 6]
    (offline,) = (run_dir / "wandb").glob("offline-run-*")
    assert (run_dir / "wandb_run_id.txt").read_text() in offline.name
    assert len(list(offline.glob("files/media/images/reconstructions*.png"))) == 3


def test_unreadable_images(images, tmp_path):
    """A broken file is skipped with a warning that names it; too many end the run with exit code 2."""
    data = shutil.copytree(images, tmp_path / "data")
    files = sorted((data / "train").rglob("*.png"))
    files[0].write_bytes(files[0].read_bytes()[:60])
    settings = {**PLAIN, "train.max_steps": "3"}
    done = train(data, tmp_path / "one", settings)
    assert done.stderr.count(f"unreadable image 1 (at most 10): {files[0]}: ") == 1
    files[9].write_text("not an image")
    done = train(data, tmp_path / "two", {**settings, "data.max_unreadable": "1"}, check=False)
    assert done.returncode == 2
    assert error_line(done.stderr).startswith("error: data.max_unreadable: 2 images cannot be read")


# ---------------------------------------------------------------------------------------------------- bad input


def fails(capsys, monkeypatch, images, settings) -> str:
    """Run train_rae.py's main in this process, expect exit code 2, give its one line."""
    AcceleratorState._reset_state()  # as in a new process
    monkeypatch.setattr(sys, "argv", ["train_rae.py", *flags({**PLAIN, "data.path": images, **settings})])
    with pytest.raises(SystemExit) as exit_info:
        launch.run_main(train_rae.main)
    assert exit_info.value.code == 2
    return error_line(capsys.readouterr().err)


def encoder_config(**changes) -> str:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "patch_size": 4, "image_size": 32}
    return json.dumps({**sizes, **changes})


def backbone_config(**changes) -> str:
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 8, "image_size": 32}
    return json.dumps({**sizes, **changes})


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"gan.wieght": 1}, ["gan.wieght"]),
        ({"train.epochs": "many"}, ["train.epochs", "many"]),
        ({"data.path": "/no/such/folder"}, ["data.path", "/no/such/folder"]),
        ({"data.path": "EMPTY"}, ["data.path", "EMPTY"]),
        ({"data.train_split": "trian"}, ["data.train_split", "trian", "validation"]),
        ({"data.eval_split": "val"}, ["data.eval_split", "val", "holdout_fraction"]),
        ({"data.path": "COLUMNS", "data.image_column": "photo"}, ["data.image_column", "photo", "picture"]),
        ({"train.global_batch_size": 9, "train.gradient_accumulation_steps": 2}, ["train.global_batch_size", "9", "2"]),
        ({"train.global_batch_size": 64}, ["24", "64"]),
        ({"model.image_size": 48, "data.resize_size": 72}, ["model.image_size", "48", "32"]),
        ({"model.encoder_input_size": 30}, ["30", "4"]),
        ({"model.decoder_num_attention_heads": 5}, ["5", "32"]),
        ({"model.encoder": "resnet"}, ["model.encoder", "resnet"]),
        ({"model.encoder_config": '{"num_hiden_layers": 2}'}, ["model.encoder_config", "num_hiden_layers"]),
        ({"model.encoder_config": '{"hidden_size": "wide"}'}, ["model.encoder", "hidden_size"]),
        ({"model.encoder_config": encoder_config(hidden_act="swishy")}, ["model.encoder_config: {", "swishy"]),
        ({"model.encoder_config": encoder_config(model_type="vit")}, ["model.encoder_config: ", "'model_type'"]),
        ({"model.encoder_config": encoder_config(num_register_tokens=-1)}, ["model.encoder_config: num_reg", "is -1"]),
        ({"gan.backbone_config": '{"with": 64}'}, ["gan.backbone_config", "with"]),
        ({"gan.backbone_config": backbone_config(num_channels=5)}, ["gan.backbone_config: {", "Expected 5 but got 3"]),
        ({"gan.backbone_config": backbone_config(patch_size=64)}, ["gan.backbone_config: {", "(32 x 32)", "(64 x 64)"]),
        ({"gan.backbone_config": backbone_config(hidden_act="gelu")}, ["gan.backbone_config: hidden_act is 'gelu'"]),
        ({"gan.backbone_config": backbone_config(layer_norm_eps="x")}, ["gan.backbone_config: layer_norm_eps is 'x'"]),
        ({"gan.backbone_config": backbone_config(hidden_size="x")}, ["gan.backbone_config: {", "hidden_size", "'x'"]),
        ({"gan.backbone_config": backbone_config(to_dict=1)}, ["gan.backbone_config: ", "'to_dict'"]),
        ({"gan.kernel_size": 101}, ["gan.kernel_size: expected at most 99, the backbone has 49 tokens"]),
        ({"model.attn_implementation": "fast"}, ["model.attn_implementation", "fast", "sdpa"]),
        ({"model.decoder_num_hidden_layers": -1}, ["model.decoder_num_hidden_layers", "-1"]),
        ({"data.resize_size": 16}, ["data.resize_size", "16", "32"]),
        ({"train.output_dir": "FILE/run"}, ["train.output_dir", "FILE"]),
        ({"model.encoder_weights": "pretrained", "model.encoder_config": "{}", "model.encoder": "no/such"},
         ["model.encoder", "no/such"]),
        ({"model.latent_stats": "/no/stats.pt"}, ["model.latent_stats", "/no/stats.pt"]),
        ({"gan.weights": "pretrained", "gan.backbone_config": "{}"}, ["gan.backbone", "facebook/dino-vits8"]),
        ({"gan.key_depths": "[0,7]"}, ["gan.key_depths", "7", "4"]),
        ({"logging.report_to": "[comet_ml]"}, ["logging.report_to", "comet_ml"]),
        ({"logging.report_to": "[tensorbord]"}, ["logging.report_to", "tensorbord", "tensorboard"]),
        ({"train.mixed_precision": "fp16"}, ["train.mixed_precision", "fp16 needs a GPU"]),
        ({"train.tf32": "true"}, ["train.tf32", "cpu"]),
    ],
)  # fmt: skip
def test_bad_input(settings, words, images, tmp_path, capsys, monkeypatch):
    """One line that names the setting and what was found, exit code 2, and no run folder left behind."""
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").touch()
    if settings.get("data.path") == "COLUMNS":
        from datasets import Dataset, DatasetDict, Features
        from datasets import Image as ImageFeature

        files = [str(f) for f in sorted(images.rglob("*.png"))]
        data = Dataset.from_dict({"picture": files}, Features({"picture": ImageFeature()}))
        DatasetDict(train=data, validation=data).save_to_disk(str(tmp_path / "COLUMNS"))
    place = {name: tmp_path / name for name in ("EMPTY", "COLUMNS", "FILE/run")}
    settings = {key: place.get(value, value) for key, value in settings.items()}
    line = fails(capsys, monkeypatch, images, {"train.output_dir": tmp_path / "run", **settings})
    assert all(str(word) in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_other_run_and_other_architecture(images, whole_run, tmp_path, capsys, monkeypatch):
    """A run folder of another config, a folder of something else, and a start model of another architecture."""
    run_dir, settings, _ = whole_run
    line = fails(capsys, monkeypatch, images, {**settings, "gan.weight": 0.5, "train.output_dir": run_dir})
    assert "gan.weight" in line and "0.75" in line and "0.5" in line and str(run_dir) in line
    line = fails(capsys, monkeypatch, images, {"train.output_dir": images})
    assert "train.output_dir" in line and str(images) in line
    start = {"model.init_from": run_dir / "final", "train.output_dir": tmp_path / "run"}
    line = fails(capsys, monkeypatch, images, {**start, "model.decoder_num_hidden_layers": 3})
    assert all(word in line for word in ("model.init_from", "decoder_num_hidden_layers", "2", "3"))
    torch.save([1.0], tmp_path / "stats.pt")
    settings = {"model.latent_stats": tmp_path / "stats.pt", "train.output_dir": tmp_path / "run"}
    assert "holds a list" in fails(capsys, monkeypatch, images, settings)
    torch.save({"mean": torch.zeros(64, 4, 4), "var": torch.ones(64, 4, 4)}, tmp_path / "stats.pt")
    line = fails(capsys, monkeypatch, images, settings)
    assert all(word in line for word in ("model.latent_stats", "(64, 4, 4)", "(64, 8, 8)"))


def test_start_from_a_trained_model(images, whole_run, tmp_path):
    """`model.init_from` takes over the decoder; `model.latent_stats` normalises its latents."""
    run_dir, _, _ = whole_run
    torch.save({"mean": torch.full((64, 8, 8), 0.5), "var": torch.full((64, 8, 8), 4.0)}, tmp_path / "stats.pt")
    settings = {**PLAIN, "model.init_from": run_dir / "final", "train.max_steps": "1", "optimizer.lr": "1.0e-20",
                "gan.weight": "0", "model.latent_stats": tmp_path / "stats.pt"}  # fmt: skip
    train(images, tmp_path / "run", settings)
    old, new = (RAEModel.from_pretrained(folder) for folder in (run_dir / "final", tmp_path / "run/final"))
    for (name, a), b in zip(old.decoder.named_parameters(), new.decoder.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    pixels = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(new.encode(pixels).latent, (old.encode(pixels).latent - 0.5) / (4 + 1e-5) ** 0.5)
    torch.testing.assert_close(new(pixels).sample, old(pixels).sample, rtol=1e-4, atol=1e-4)
    torch.save({"mean": torch.full((64, 8, 8), 0.5), "var": torch.full((64, 8, 8), 2.0)}, tmp_path / "stats.pt")
    done = train(images, tmp_path / "run", {**settings, "train.max_steps": "2"}, check=False)
    assert "error: model.latent_stats: the weights are not those" in done.stderr


def test_nonfinite_loss(images, tmp_path):
    """A loss that is not finite ends the run with step, term and last good checkpoint; skipping is bounded."""
    settings = {**PLAIN, "optimizer.lr": "1.0e+12", "train.save_every_steps": "1", "lr_schedule.warmup_steps": "0",
                "gan.weight": "0"}  # fmt: skip
    done = train(images, tmp_path / "stop", settings, check=False)
    assert done.returncode == 1
    line = error_line(done.stderr)
    assert "recon is nan at step 2" in line or "recon is inf at step 2" in line, line
    assert str(tmp_path / "stop/checkpoints/step-00000001") in line
    done = train(images, tmp_path / "skip", {**settings, "train.max_nonfinite_steps": "2"}, check=False)
    assert done.returncode == 1 and done.stdout.count("skipped: ") == 2
    assert "at step 4" in error_line(done.stderr)


def test_bad_input_under_accelerate_launch(tmp_path):
    """The launcher passes the failure on, with the one line on stderr."""
    arguments = ("--data.path", "/no/such/folder", "--train.output_dir", tmp_path / "run")
    done = run_command("train_rae.py", *arguments, launch=("--cpu", "-q"), check=False)
    assert done.returncode != 0
    assert "error: data.path: /no/such/folder does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_lists_every_setting():
    done = run_command("train_rae.py", "--help", **{"COLUMNS": "200", "PATH": os.environ["PATH"]})
    for name in ("--gan.max_adaptive_weight", "--data.max_unreadable", "--ema.decay", "--gan.optimizer.lr"):
        assert name in done.stdout
    assert "Upper bound of the adaptive weight" in done.stdout
