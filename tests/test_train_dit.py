"""train_dit.py as users run it: the real command line on real images, tiny."""

import json
import re
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import (
    ROOT,
    checkpoint_state,
    error_line,
    flags,
    read_metrics,
    run_command,
    run_ranks,
    same,
    tiny_dit,
    tiny_rae,
)
from harness import Training, differences
from PIL import Image
from safetensors.torch import load_file, save_file
from test_streams import write_parquet

import train_dit
from modeling_rae import RAEModel
from rae_suite.checkpoints import checkpoints, read_checkpoint
from rae_suite.cli import read_yaml
from rae_suite.dit_card import figures_of_card
from rae_suite.dit_evaluation import held_out_loss
from rae_suite.dit_folders import load_pipeline_parts, model_from_state, save_pipeline
from rae_suite.dit_networks import frozen_digests, read_start_weights
from rae_suite.errors import ConfigError, DataError
from rae_suite.files import step_of
from rae_suite.flow import training_times
from rae_suite.labels import Classes
from rae_suite.loaders import eval_loader
from rae_suite.run_folder import RunState, check_same_frozen
from rae_suite.settings_dit import parse_config
from rae_suite.splits import load_splits
from rae_suite.updates import learning_rate

MODEL = {
    "model.hidden_size": 16,
    "model.num_layers": 2,
    "model.num_attention_heads": 2,
    "model.head_hidden_size": 32,
    "model.head_num_layers": 1,
    "model.head_num_attention_heads": 2,
}
TINY = {
    **MODEL,
    "latents.stats": "compute",
    "data.num_workers": 0,
    "train.max_steps": 4,
    "train.global_batch_size": 8,
    "train.cpu_threads": 1,
    "train.save_every_steps": 2,
    "optimizer.lr": 1e-3,
    "ema.decay": 0.9,
    "sampling.num_inference_steps": 3,
    "eval.every_steps": 2,
    "eval.num_generated": 8,
    "eval.batch_size": 4,
    "logging.every_steps": 1,
    "logging.num_samples": 4,
    "logging.report_to": "[]",
    "logging.progress_bar": "false",
}
# nothing but training
PLAIN = {**TINY, "eval.metrics": "[loss]", "eval.every_steps": 100, "logging.samples_every_steps": 100}


@pytest.fixture(scope="session")
def rae(tmp_path_factory):
    """The folder of an RAE of 32 px, latents (16, 4, 4), without statistics."""
    folder = tmp_path_factory.mktemp("rae") / "rae"
    tiny_rae().save_pretrained(folder)
    return folder


def train(rae, images, run_dir, settings=TINY, check=True, **changed):
    settings = {**settings, "model.rae": rae, "data.path": images, "train.output_dir": run_dir, **changed}
    return run_command("train_dit.py", *flags(settings), check=check)


@pytest.fixture(scope="module")
def whole(rae, images, tmp_path_factory):
    """The folder of a finished run, and what it printed."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    done = train(rae, images, run_dir, **{"eval.raw": "true", "sampling.guidance_scale": 1.5})
    return run_dir, done.stdout


# ---------------------------------------------------------------------------------------------------------- a whole run


def test_files_and_lines_of_a_run(whole, rae):
    run_dir, printed = whole
    assert "DiT-DH" in printed and "on latents 16 x 4 x 4" in printed and "of 4 classes" in printed
    names = {path.name for path in run_dir.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "samples", "curves.png", "progress.png", "checkpoints", "best", "final",
            "rae", "latent_stats.safetensors"} <= names  # fmt: skip
    settings = read_yaml(run_dir / "config.yaml")
    assert settings["model"]["num_classes"] == 4
    assert settings["model"]["class_names"] == [f"class_{i}" for i in range(4)]
    lines = read_metrics(run_dir)
    training = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in training] == [1, 2, 3, 4]
    assert training[0]["loss"] == pytest.approx(2.0, abs=0.4)  # a new model's output is 0: 1 + mean of squared latents
    evaluations = [line for line in lines if line["kind"] == "eval"]
    assert [(line["step"], line["model"]) for line in evaluations] == [
        (step, model) for step in (0, 2, 4) for model in ("raw", "ema")
    ]
    for line in evaluations:
        assert line["num_samples"] == 8 and line["num_generated"] == 8 and line["fdd"] > 0
        times = [line[f"loss_time{k}"] for k in (1, 2, 3, 4)]
        assert line["loss"] == pytest.approx(np.mean(times), rel=1e-9) and len(set(times)) == 4
    pictures = sorted((run_dir / "samples").iterdir())
    assert [path.name for path in pictures] == [f"step-{step:08d}.png" for step in (0, 2, 4)]
    sizes = [Image.open(picture).size for picture in pictures]
    assert sizes[-1] == (404, 836) and sizes[0] == (404, 420)  # the raw weights' rows, while the average lags behind


def test_latent_statistics_are_those_of_the_training_images(whole, rae, images, tmp_path):
    """Computed once, as compute_latent_stats.py does; kept in the run, in rae/ and in final/."""
    run_dir, _ = whole
    stats = load_file(run_dir / "latent_stats.safetensors")
    run_command("scripts/compute_latent_stats.py", *flags({"model": rae, "data.path": images, "data.num_workers": 0,
                "output": tmp_path / "rae", "stats_file": tmp_path / "stats.safetensors"}))  # fmt: skip
    expected = load_file(tmp_path / "stats.safetensors")
    for name in ("mean", "var"):
        torch.testing.assert_close(stats[name], expected[name], rtol=1e-5, atol=1e-6)
        for folder in ("rae", "final/rae"):
            held = RAEModel.from_pretrained(run_dir / folder)
            assert torch.equal(getattr(held, f"latent_{name}"), stats[name])


def test_the_evaluated_and_exported_weights_are_the_averaged_ones(whole):
    """The recorded loss of the averaged weights is that of the checkpoint's `ema`, and not of its `model`."""
    run_dir, _ = whole
    state = read_checkpoint(checkpoints(run_dir)[-1])
    last = {line["model"]: line for line in read_metrics(run_dir)[-2:]}
    assert last["raw"]["loss"] != last["ema"]["loss"] and last["raw"]["fdd"] != last["ema"]["fdd"]
    exported, rae, _ = load_pipeline_parts(str(run_dir / "final"), "model")
    for name, weight in exported.named_parameters():
        assert torch.equal(weight, state["ema"][name]), name
    config = parse_config(["--config", str(run_dir / "config.yaml")])
    run = SimpleNamespace(config=config, rae=rae)
    source = load_splits(config.data, 0)[1]
    for weights, part in (("ema", "ema"), ("raw", "model")):
        found = held_out_loss(
            model_from_state(dict(exported.config), state[part]),
            partial(train_dit.encode, run),
            eval_loader(source, 32, 4),
            Classes(4, None),
            partial(training_times, distribution=config.flow.time_distribution, shift=1.0),
            config.train.seed,
            Accelerator(cpu=True),
            on_unreadable=list,
            sharded=False,
        )
        assert found["loss"] == pytest.approx(last[weights]["loss"], rel=1e-5), weights
    with pytest.raises(DataError, match="data.eval_split: none of the evaluation images can be read"):
        held_out_loss(exported, list, [], Classes(4, None), list, 0, Accelerator(cpu=True), list, sharded=False)


def test_a_finished_run_says_so(whole, rae, images):
    run_dir, _ = whole
    done = train(rae, images, run_dir, **{"eval.raw": "true", "sampling.guidance_scale": 1.5})
    assert f"{run_dir} is finished: 4 of 4 steps" in done.stdout
    again = run_command("train_dit.py", "--config", run_dir / "config.yaml")
    assert "is finished" in again.stdout


# ------------------------------------------------------------------------------------------- the same run in other ways


STOPS = [  # as in test_resume.py: how, at which call of what, with how many workers, and the step that is saved last
    ("usr1", "flow_loss", 3, 0, 3),  # asked for in the second step, agreed on in the third
    ("kill", "flow_loss", 2, 1, 3),
    ("term", "measure", 1, 1, 5),  # of step 4
    ("kill", "train_step", 1, 0, 5),
    ("term", "save_checkpoint", 1, 0, 7),  # of step 6
]


@pytest.mark.parametrize("processes, streaming", [(1, False), (2, False), (1, True)])
def test_resume_is_exact(processes, streaming, rae, images, tmp_path):
    """Stopped by SIGTERM, SIGUSR1 and SIGKILL in accumulation, evaluation and checkpoint writing, each part with
    another number of workers: the same bits as a run that nothing stopped."""
    settings = {**TINY, "model.rae": rae, "train.max_steps": 8, "train.gradient_accumulation_steps": 2}
    settings |= {"eval.every_steps": 4}
    if streaming:
        for i, ids in enumerate((range(9), range(9, 12), range(12, 26))):
            write_parquet(tmp_path / f"shards/{i}.parquet", ids, side=40, labels=4)
        settings |= {"data.streaming": "true", "data.shuffle_buffer": 5, "data.stream_lanes": 2, "model.num_classes": 4}
        settings |= {"eval.num_samples": 8, "data.eval_path": images / "validation", "latents.stats": "unnormalized"}
    data = f"{tmp_path}/shards/*" if streaming else images
    whole = Training(tmp_path / "whole", data, "train_dit.py", **settings)
    assert whole.go(processes) == [0] * processes, whole.output()
    training = Training(tmp_path / "run", data, "train_dit.py", **settings)
    for i, (signal, function, count, workers, step) in enumerate(STOPS):
        rank = i % processes
        fault = {"place": f"call {function}", "count": count, "action": signal, "rank": rank}
        codes = training.go(processes, (fault,), **{"data.num_workers": workers})
        assert codes[rank] == (-9 if signal == "kill" else 0), training.output()
        assert step_of(checkpoints(training.run_dir)[-1]) == step
    assert training.go(processes) == [0] * processes, training.output()
    # cards name the folder, and final/ the one of its RAE
    assert [name for name in differences(training.run_dir, whole.run_dir) if name not in ("best/", "final/")] == []
    ours, theirs = (load_pipeline_parts(str(t.run_dir / "final"), "model")[0] for t in (training, whole))
    assert same(ours.state_dict(), theirs.state_dict())


def test_accumulation_and_processes_equal_one_large_batch(rae, images, tmp_path):
    """8 images in one batch, in four micro-batches, and on two processes: to 1e-6 relative; ranks to the bit."""
    plain = {**PLAIN, "optimizer.eps": 1e-4}  # or AdamW makes a step of every rounding of a gradient that is about 0
    run_dirs = {name: tmp_path / name for name in ("one", "accumulated", "two")}
    train(rae, images, run_dirs["one"], plain)
    train(rae, images, run_dirs["accumulated"], plain, **{"train.gradient_accumulation_steps": 4})
    settings = {**plain, "model.rae": rae, "data.path": images, "train.output_dir": run_dirs["two"]}
    (found,) = run_ranks({"folder": tmp_path / "ranks", "processes": 2, "argv": ["train_dit.py", settings]})
    assert [end["code"] for end in found["ends"]] == [0, 0], found
    expected = checkpoint_state(run_dirs["one"])
    for name in ("accumulated", "two"):
        state = checkpoint_state(run_dirs[name])
        for part in ("model", "ema"):
            for key, tensor in expected[part].items():
                difference = (state[part][key] - tensor).norm() / tensor.norm().clamp_min(1e-3)
                assert difference < 1e-6, (name, part, key, difference)


def test_fsdp(rae, images, tmp_path):
    """Shared out among two processes: DDP's numbers from about half the memory; checkpoints of either continue the
    other; a process without images of an evaluation joins in."""
    settings = {**TINY, "train.gradient_accumulation_steps": 2, "optimizer.eps": 1e-4, "eval.num_samples": 3}
    settings |= {"eval.batch_size": 1, "eval.num_generated": 5, "sampling.guidance_scale": 1.5, "model.rae": rae}
    plan = [("ddp", False, 4), ("fsdp", True, 4), ("changing", True, 1), ("changing", False, 3), ("changing", True, 4)]
    runs = [
        {
            "fsdp": fsdp,
            "argv": ["train_dit.py", *flags({**settings, "data.path": images, "train.output_dir": tmp_path / name,
                                             "train.max_steps": steps})],
            "nan_steps": [],
        }
        for name, fsdp, steps in plan
    ]  # fmt: skip
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    config = ROOT / "accelerate_configs" / "fsdp2_8gpu.yaml"
    launch = ["--config_file", config, "--num_processes", 2, "--mixed_precision", "no", "--main_process_port", 0]
    done = run_command("tests/distributed_runs.py", tmp_path / "runs.json", launch=tuple(map(str, launch)))
    assert done.stdout.count(", sharded (FSDP2)") == 3
    held = json.loads((tmp_path / "runs.rank0.json").read_text())
    for name, whole in held[0]["bytes"].items():
        assert held[1]["bytes"][name] < 0.6 * whole, name
    for line, other in zip(*(read_metrics(tmp_path / name) for name in ("ddp", "fsdp")), strict=True):
        numbers = {key: value for key, value in line.items() if key not in ("kind", "model")}
        assert {key: other[key] for key in numbers} == pytest.approx(numbers, rel=1e-4), line
    expected = checkpoint_state(tmp_path / "ddp")
    for name in ("fsdp", "changing"):
        state = checkpoint_state(tmp_path / name)
        for part in ("model", "ema"):
            for key, tensor in expected[part].items():
                torch.testing.assert_close(state[part][key], tensor, rtol=1e-4, atol=1e-6, msg=f"{name} {part} {key}")
        exported, _, _ = load_pipeline_parts(str(tmp_path / name / "final"), "model")
        assert all(torch.equal(weight, state["ema"][key]) for key, weight in exported.named_parameters())


@pytest.mark.parametrize("settings", [{"train.mixed_precision": "bf16"}, {"train.compile": "true"},
                                      {"model.gradient_checkpointing": "true"}])  # fmt: skip
def test_other_ways_of_computing(settings, rae, images, tmp_path, monkeypatch):
    """The losses of four steps in bf16, compiled and with activations computed again."""
    losses = []
    monkeypatch.setattr(torch, "compile", partial(without_inductor, torch.compile))
    for name, changed in (("plain", {}), ("other", settings)):
        monkeypatch.setattr("sys.argv", ["train_dit.py", *flags({**PLAIN, "model.rae": rae, "data.path": images,
                            "train.output_dir": tmp_path / name, **changed})])  # fmt: skip
        AcceleratorState._reset_state()
        train_dit.main()
        losses.append([line["loss"] for line in read_metrics(tmp_path / name) if line["kind"] == "train"])
    AcceleratorState._reset_state()
    tolerance = 2e-2 if "train.mixed_precision" in settings else 1e-6
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)


def without_inductor(compile_function, function, options=None, **rest):
    """torch.compile that runs the graphs as they were captured: inductor's code takes minutes."""
    return compile_function(function, backend="eager", **rest)


# ------------------------------------------------------------------------------------------------------- labels and RAE


def test_images_without_labels_are_one_class(rae, images, tmp_path):
    folder = tmp_path / "images"
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
        for i, file in enumerate(sorted((images / split).rglob("*.png"))):
            shutil.copy(file, folder / split / f"{i}.png")
    train(rae, folder, tmp_path / "run", PLAIN)
    assert read_yaml(tmp_path / "run/config.yaml")["model"]["num_classes"] == 1
    table = checkpoint_state(tmp_path / "run")["model"]["y_embedder.embedding_table.weight"]
    assert table.shape[0] == 2  # the class and the null label
    done = train(rae, folder, tmp_path / "other", PLAIN, check=False, **{"model.num_classes": 4})
    assert "model.num_classes: 4, but the images of data.train_split have no labels" in error_line(done.stderr)
    done = train(rae, folder, tmp_path / "other", PLAIN, check=False, **{"model.class_names": "[a,b]"})
    assert "model.class_names: ['a', 'b'], but the images of data.train_split have no labels" in error_line(done.stderr)
    assert done.returncode == 2 and not (tmp_path / "other").exists()


def test_start_from_a_model_with_other_classes(whole, rae, images, tmp_path):
    """`model.init_from` takes a run, its checkpoint, its final/ or a published file; a label table of other classes is
    new."""
    run_dir, _ = whole
    start, _, _ = load_pipeline_parts(str(run_dir / "final"), "model")
    settings = {**PLAIN, "train.max_steps": 1, "optimizer.lr": 1e-20}
    table = "y_embedder.embedding_table.weight"
    names = {"same": [f"class_{i}" for i in range(4)], "other": [f"class_{i}" for i in range(5)]}
    torch.save({"ema": dict(start.state_dict()), "model": {}}, tmp_path / "ep-0000001.pt")
    names["published"] = names["same"]
    for name, source in (
        ("same", run_dir),
        ("other", checkpoints(run_dir)[-1]),
        ("published", tmp_path / "ep-0000001.pt"),
    ):
        changed = {"model.init_from": source, "model.class_names": json.dumps(names[name])}
        train(rae, images, tmp_path / name, settings, **changed)
        state = checkpoint_state(tmp_path / name)["model"]
        for key, tensor in start.state_dict().items():
            if key != table:
                torch.testing.assert_close(state[key], tensor, msg=key)
        assert len(state[table]) == len(names[name]) + 1
        assert torch.allclose(state[table][:4], start.state_dict()[table][:4], atol=1e-6) == (name != "other")
    done = train(rae, images, tmp_path / "wide", check=False, **{"model.init_from": run_dir, "model.hidden_size": 24})
    assert f"model.init_from: {run_dir} is of another architecture" in error_line(done.stderr)
    (tmp_path / "ep-0000001.pt").unlink()  # a run that goes on does not need it
    changed["train.max_steps"] = 2
    assert "continuing from" in train(rae, images, tmp_path / "published", settings, **changed).stdout


def test_label_tables_of_many_classes(tmp_path, capsys):
    """More than ten, whose names come back in their order; in another order the table is new, which is said."""
    names, own = tuple(f"class {i}" for i in range(12)), tiny_dit(num_classes=12)
    save_pipeline(tmp_path / "dit", own, tiny_rae(), class_names=names, sampling={})
    table, run_dir = "y_embedder.embedding_table.weight", tmp_path / "run"
    read = partial(read_start_weights, str(tmp_path / "dit"), run_dir=run_dir)
    assert same(read(own, Classes(12, names)), dict(own.state_dict())) and "note" not in capsys.readouterr().out
    weights = read(own, Classes(12, names[::-1]))
    assert table not in weights and len(weights) == len(own.state_dict()) - 1
    assert "is of other classes, the label table is new" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="another architecture: its prediction is velocity, the run's is data"):
        read(tiny_dit(num_classes=12, prediction="data"), Classes(12, names))


def test_bad_input(whole, rae, images, tmp_path):
    """One clear line, exit code 2, and nothing written."""
    run_dir, _ = whole
    stats = tmp_path / "stats.safetensors"
    save_file({"mean": torch.zeros(16, 8, 8), "var": torch.ones(16, 8, 8)}, stats)
    four = {"data.path": images}
    for changed, words in (
        ({"latents.stats": "null"}, "latents.stats: .* has no statistics of its latents, and training on latents that"),
        ({"latents.stats": stats}, r"latents.stats: .*\(16, 8, 8\).*\(16, 4, 4\)"),
        ({"model.rae": tmp_path}, "model.rae: .* has no config.json"),
        ({"model.num_classes": 3}, "model.num_classes: 3, but the images of data.train_split are of 4 classes"),
        ({"model.class_names": "[class_0,class_1]"}, "model.class_names: the images of data.train_split have 2 "),
        ({"train.global_batch_size": 32}, "train.global_batch_size: 32, but there are 24 training images in data.path"),
        ({"model.hidden_size": 18}, "model: hidden_size .18. must be a multiple of 4"),
        ({"flow.time_distribution": "normal"}, "flow.time_distribution: time distribution: expected uniform or logit"),
        ({"flow.shift": 0.5}, "flow.shift: expected a number of at least 1, got 0.5"),
        ({"eval.best_metric": "fdd", "eval.metrics": "[loss]"}, "eval.best_metric: expected one of eval.metrics"),
        ({"sampling.guidance_scale": 2, "model.class_dropout_prob": 0}, "model.class_dropout_prob: expected a"),
        ({"data.eval_split": "test"}, "data.eval_split: there is no split 'test'"),
        ({"data.path": ""}, "data.path: expected a folder of images, or a Hub data set id, got ''"),
        ({"data.streaming": "true"}, "latents.stats: expected a file of mean and var .* with data.streaming, got"),
        ({"data.resize_size": 40}, "data.resize_size: expected nothing with data.crop center, got 40"),
        ({"data.crop": "random", "data.resize_size": 10}, "data.resize_size: 10 is smaller than the image size"),
        ({"sampling.guide": tmp_path / "none", "sampling.guidance_scale": 2}, "sampling.guide: .*none"),
        ({"model.init_from": tmp_path / "none"}, "model.init_from: .*none"),
        ({"eval.metrics": "[loss]", "eval.reference": stats}, "eval.reference: expected nothing unless eval.metrics"),
        ({"eval.inception_path": stats}, "eval.inception_path: expected nothing unless eval.metrics has one of Incep"),
        ({"flow.shift": 2, "flow.shift_base": 99}, "flow.shift_base: expected nothing with flow.shift, got 99"),
    ):  # fmt: skip
        done = train(rae, images, tmp_path / "run", check=False, **{**four, **changed})
        assert done.returncode == 2, (changed, done.stderr)
        assert re.search(words, error_line(done.stderr)), (changed, done.stderr)
        assert not (tmp_path / "run").exists(), changed
    done = train(rae, images, run_dir, check=False, **{"model.num_layers": 3, "optimizer.lr": 1})
    line = error_line(done.stderr)
    assert "model.num_layers is 2 there and 3 now; optimizer.lr is 0.001 there and 1.0 now" in line


def test_another_autoencoder_is_not_the_same_run(whole, rae, images, tmp_path):
    run_dir = shutil.copytree(whole[0], tmp_path / "run")
    other = tiny_rae()
    with torch.no_grad():
        next(other.encoder.parameters()).add_(1)
    other.save_pretrained(tmp_path / "other")
    longer = {"train.max_steps": 5, "eval.raw": "true", "sampling.guidance_scale": 1.5}
    done = train(tmp_path / "other", images, run_dir, check=False, **longer)
    assert re.search("error: (latents.stats, )?model.rae: the weights are not those that", done.stderr), done.stderr
    moved = shutil.copytree(rae, tmp_path / "moved")  # equal weights in another place are the same run
    longer["sampling.num_inference_steps"] = 4
    assert "continuing from" in train(moved, images, run_dir, **longer).stdout


def test_encoder_settings_are_compared(tmp_path):
    """Those of the autoencoder that decide its latents; a checkpoint of an earlier version does not say them."""
    frozen, path = frozen_digests(tiny_rae()), tmp_path / "step-1"
    key = "model.rae (settings of its encoder)"
    changed = frozen_digests(tiny_rae(image_mean=[0.1, 0.2, 0.3]))
    assert frozen["latents.stats"] is None and {name for name in frozen if frozen[name] != changed[name]} == {key}
    older = {name: digest for name, digest in frozen.items() if name != key}
    check_same_frozen(RunState(frozen=older), changed, path)
    with pytest.raises(ConfigError, match=r"of its encoder\): the settings are not those that .*step-1 was trained wi"):
        check_same_frozen(RunState(frozen=frozen), changed, path)


def test_a_start_that_came_to_no_checkpoint(whole, rae, images, tmp_path):
    """What it left does not bind the next start: other settings, and another autoencoder, whose statistics are new. The
    same one finds the statistics there."""
    run_dir, other = tmp_path / "run", tiny_rae()
    run_dir.mkdir()
    for name in ("config.yaml", "rae", "latent_stats.safetensors"):
        source = whole[0] / name
        shutil.copytree(source, run_dir / name) if source.is_dir() else shutil.copy(source, run_dir / name)
    again = shutil.copytree(run_dir, tmp_path / "again")
    with torch.no_grad():
        next(other.encoder.parameters()).mul_(2)
    other.save_pretrained(tmp_path / "other")
    first = load_file(run_dir / "latent_stats.safetensors")
    settings = {**PLAIN, "train.max_steps": 1}
    done = train(tmp_path / "other", images, run_dir, settings, **{"optimizer.lr": 1e-4})
    assert "statistics of the latents computed over 24 training images" in done.stdout
    assert not same(load_file(run_dir / "latent_stats.safetensors"), first)
    held = RAEModel.from_pretrained(run_dir / "rae").encoder.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in other.encoder.state_dict().items())
    done = train(rae, images, again, settings, **{"optimizer.lr": 1e-4})
    assert "statistics" not in done.stdout and same(load_file(again / "latent_stats.safetensors"), first)


def test_statistics_do_not_depend_on_the_models_precision(whole, rae, images, tmp_path):
    """The encoder has its own. A fork has the statistics of the run that it comes from, whatever its batches are."""
    expected = load_file(whole[0] / "latent_stats.safetensors")
    settings = {**PLAIN, "train.max_steps": 1, "train.mixed_precision": "bf16"}
    train(rae, images, tmp_path / "bf16", settings)
    assert same(load_file(tmp_path / "bf16/latent_stats.safetensors"), expected)
    fork = {"train.fork_from": checkpoints(whole[0])[-1], "train.max_steps": 5, "eval.batch_size": 3}
    done = train(rae, images, tmp_path / "fork", PLAIN, **fork)
    assert "a new run from" in done.stdout and "statistics of the latents computed" not in done.stdout
    assert same(load_file(tmp_path / "fork/latent_stats.safetensors"), expected)


# -------------------------------------------------------------------------------------------------------- what is drawn


def test_figures_in_training_are_those_afterwards(rae, images, inception, tmp_path):
    """The metrics of drawn images that a run writes are those that eval_fid.py has of the same images, drawn by
    sample_dit.py from final/; with a reference file, and with the held-out images."""
    reference = np.stack([np.array(Image.open(file)) for file in sorted((images / "train").rglob("*.png"))])
    np.savez(tmp_path / "reference.npz", arr_0=reference[:, :32, :32])
    run_dir, names = tmp_path / "run", ["fid", "sfid", "is", "precision", "recall"]
    settings = {
        **TINY,
        "train.max_steps": 2,
        "eval.num_generated": 12,
        "eval.metrics": f"[loss, fdd, {', '.join(names)}]",
        "eval.inception_path": inception,
        "eval.reference": tmp_path / "reference.npz",
        "eval.best_metric": "fdd",
        "eval.num_samples": 2,  # the drawn images' metrics do not need them
        "ema.decay": 0.5,
    }
    train(rae, images, run_dir, settings)
    how = "fdd of 12 drawn images, 3 points in time, 2 euler steps, no guidance"
    assert checkpoint_state(run_dir)["state"]["best_of"] == how
    np.savez(tmp_path / "other.npz", mu_fdd=np.zeros(16), sigma_fdd=np.eye(16), encoder=np.str_("0" * 64))
    other = {"eval.reference": tmp_path / "other.npz", "eval.metrics": "[fdd]"}
    found = read_metrics(run_dir)[-1]
    drawn = {"num_samples": 12, "batch_size": 4, "quantize": "round", "num_inference_steps": 3}
    at_once = {"eval.metrics": f"[{', '.join(names)}]", "eval.reference": tmp_path / "reference.npz"}
    at_once |= {"eval.inception_path": inception}
    model = {"model": run_dir / "final", "output_dir": tmp_path / "drawn"}
    done = run_command("sample_dit.py", *flags({**model, **drawn, **at_once}))
    sampled = json.loads((tmp_path / "drawn/results.json").read_text())["metrics"]
    assert "Inception Score" in done.stdout and set(sampled) == set(names)
    for kind, metrics in (("inception", names), ("encoder", ["fdd"])):
        more = {"inception": {"inception_path": inception}, "encoder": {"encoder": run_dir / "rae"}}
        output = tmp_path / kind
        run_command("eval_fid.py", *flags({"samples": tmp_path / "drawn", "reference": tmp_path / "reference.npz",
                    "features": f"[{kind}]", "output_dir": output, "num_workers": 0, **more[kind]}))  # fmt: skip
        afterwards = json.loads((output / "results.json").read_text())
        for name in metrics:
            assert sampled.get(name, afterwards[name]) == pytest.approx(afterwards[name], rel=1e-6, abs=1e-9), name
            assert found[name] == pytest.approx(afterwards[name], rel=1e-4, abs=1e-6), name
    for changed, words in (
        ({"eval.reference": tmp_path / "none.npz"}, "eval.reference: .*none.npz does not exist"),
        ({"eval.inception_path": tmp_path / "none.pt"}, "eval.inception_path: file .*none.pt does not exist"),
        ({**other, "eval.inception_path": "null"}, "eval.reference: the statistics in .* are of another network"),
        ({"eval.num_generated": 3}, "eval.num_generated: the samples are 3 images, expected at least 4"),
    ):
        done = train(rae, images, tmp_path / "refused", settings, check=False, **changed)
        assert done.returncode == 2 and re.search(words, error_line(done.stderr)), done.stderr
        assert not (tmp_path / "refused").exists()


def test_the_card_of_a_run(whole):
    """final/ and best/ say what was measured at their step; final/ shows the grid of that step."""
    run_dir, _ = whole
    for folder in ("final", "best"):
        figures = figures_of_card(run_dir / folder)
        assert f"at step {4 if folder == 'final' else ''}" in figures.how and "3 points in time" in figures.how
        step = int(figures.how.split("at step ")[1].split()[0])
        lines = [row for row in read_metrics(run_dir) if (row["kind"], row.get("model")) == ("eval", "ema")]
        (line,) = [row for row in lines if row["step"] == step]
        assert figures.values == {"fdd": round(line["fdd"], 4)} and figures.num_samples == 8
    assert (run_dir / "final/samples.png").read_bytes() == (run_dir / "samples/step-00000004.png").read_bytes()
    card = (run_dir / "final/README.md").read_text()
    assert "class_dropout_prob" in card and "![Images that it drew" in card and "'class_0', 'class_1'" in card


def test_the_published_schedule():
    """1,251 steps an epoch: 2e-4 for 40 epochs, then linear to 2e-5 at epoch 800, then constant."""
    config = parse_config(["--model.rae", "x"])
    steps = {0: 2e-4, 40 * 1251: 2e-4, 420 * 1251: 1.1e-4, 800 * 1251 - 1: 2e-5, 800 * 1251: 2e-5, 1400 * 1251: 2e-5}
    for step, expected in steps.items():
        found = learning_rate(step, config.optimizer.lr, config.lr_schedule, 1251)
        assert found == pytest.approx(expected, rel=1e-5), step
