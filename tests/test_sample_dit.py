"""sample_dit.py and what it is made of: labels, noise, passes, the models that it takes, files, interruptions."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import error_line, flags, processes_on_cpu, run_command, same, tiny_dit, tiny_rae
from forked import forks, run_script
from PIL import Image
from safetensors.torch import save_file
from test_faults import PAGE, fill, small_disk

import sample_dit
from benchmarks import sampling as benchmark
from rae_suite.class_labels import balanced_labels, indices_of_classes, random_labels
from rae_suite.dit_folders import load_guide, load_pipeline_parts, save_pipeline
from rae_suite.errors import ConfigError, RunError
from rae_suite.flow import guidance_kind
from rae_suite.generation import count_passes, draw_images, draw_latents, image_noise
from rae_suite.sample_files import check_same_settings, is_whole_npz, is_whole_png
from rae_suite.settings_dit import FlowConfig, SamplingConfig

NAMES = [f"class {letter}" for letter in "abcdefghij"]
SHIFT = 2.5


@pytest.fixture(scope="module")
def models() -> dict:
    return {
        "transformer": tiny_dit(),
        "rae": tiny_rae(use_latent_stats=True).eval(),
        "guide": tiny_dit(1, num_layers=1),
    }


@pytest.fixture(scope="module")
def pipeline(models, tmp_path_factory) -> Path:
    """A pipeline folder without guide."""
    folder = tmp_path_factory.mktemp("models") / "final"
    save_pipeline(folder, models["transformer"], models["rae"], class_names=NAMES, sampling={"shift": SHIFT})
    return folder


@pytest.fixture(scope="module")
def run_dir(models, pipeline, tmp_path_factory) -> Path:
    """A run folder of stage 2 with one checkpoint, whose raw weights are those of the pipeline and whose averaged ones
    lack buffers; no final/."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    config = {name: value for name, value in models["transformer"].config.items() if not name.startswith("_")}
    config = {
        **config,
        "rae": "user/rae",
        "sample_size": None,
        "in_channels": None,
        "num_classes": None,
        "class_names": NAMES,
    }
    checkpoint = run / "checkpoints" / "step-00000008"
    checkpoint.mkdir(parents=True)
    settings = {"model": config, "data": {"path": "x"}, "flow": asdict(FlowConfig()), "sampling": {"solver": "heun"}}
    (run / "config.yaml").write_text(json.dumps(settings))
    shutil.copytree(pipeline / "rae", run / "rae")
    (checkpoint / "state.json").write_text('{"step": 8}')
    averaged = tiny_dit(5)
    save_file(dict(models["transformer"].state_dict()), checkpoint / "model.safetensors")
    save_file({name: p.detach().clone() for name, p in averaged.named_parameters()}, checkpoint / "ema.safetensors")
    return run


SMALL = {"num_samples": 10, "batch_size": 4, "num_inference_steps": 4}


def sample(model, output_dir, *arguments, check: bool = True, **settings) -> subprocess.CompletedProcess:
    line = ["sample_dit.py", *flags({**SMALL, "model": model, "output_dir": output_dir, **settings}), *arguments]
    return run_command(*line, check=check)


def pngs(folder: Path) -> dict:
    return {path.name: path.read_bytes() for path in (folder / "images").iterdir()}


# Labels ---------------------------------------------------------------------------------------------------------------


def test_balanced_labels_are_the_published_permutation():
    """Of 50,000 in 1,000 classes; other numbers have every class equally often, up to one."""
    expected = torch.arange(1000).repeat_interleave(50)
    expected = expected[torch.randperm(50_000, generator=torch.Generator().manual_seed(3))]
    found = balanced_labels(50_000, range(1000), 3)
    assert torch.equal(found, expected) and torch.equal(found, balanced_labels(50_000, range(1000), 3))
    assert not torch.equal(found, balanced_labels(50_000, range(1000), 4))
    assert len(found[:1000].unique()) > 500  # as of independent draws, 632
    for count in (1, 7, 10, 25):
        labels = balanced_labels(count, [4, 2, 9, 7], 0)
        counts = torch.stack([(labels == label).sum() for label in (4, 2, 9, 7)])
        assert len(labels) == count == counts.sum() and counts.max() - counts.min() <= 1


def test_random_labels():
    labels = random_labels(20_000, [5, 8], 0)
    assert set(labels.tolist()) == {5, 8} and abs((labels == 5).float().mean() - 0.5) < 0.02
    assert torch.equal(labels, random_labels(20_000, [5, 8], 0))


def test_classes_are_found_by_name_or_index():
    names = dict(enumerate(NAMES))
    assert indices_of_classes(["class c", "7", "CLASS A"], names, 10, "classes") == [2, 7, 0]
    assert indices_of_classes([], names, 10, "classes") == list(range(10))
    for asked, message in (
        (["klass b"], "classes: class 'klass b': .*nearest names are class b, "),
        (["10"], "classes: class 10: expected an index from 0 to 9"),
        (["class b", "1"], "classes: expected each class once, got class 1 2 times"),
    ):
        with pytest.raises(ConfigError, match=message):
            indices_of_classes(asked, names, 10, "classes")


# Drawing --------------------------------------------------------------------------------------------------------------


def draw(models: dict, labels: torch.Tensor, batch_size: int, sampling: SamplingConfig, **options) -> torch.Tensor:
    parts = []
    for start in range(0, len(labels), batch_size):
        stop = min(start + batch_size, len(labels))
        indices, own = range(start, stop), labels[start:stop]
        parts.append(draw_images(models["transformer"], models["rae"], own, indices, 3, sampling, SHIFT, **options))
    return torch.cat(parts)


def test_noise_is_a_function_of_seed_and_index():
    noise = image_noise([3, 4, 5], (16, 4, 4), 7)
    assert noise.shape == (3, 16, 4, 4) and torch.equal(image_noise([5], (16, 4, 4), 7)[0], noise[2])
    assert not torch.equal(noise[0], noise[1]) and not torch.equal(image_noise([3], (16, 4, 4), 8)[0], noise[0])
    many = image_noise(range(500), (16, 4, 4), 0)
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01


@pytest.mark.parametrize("guided", ["not", "by labels", "by a guide"])
@pytest.mark.parametrize("solver", ["euler", "heun2"])
def test_images_do_not_depend_on_the_batch(models, guided, solver):
    """But for the order of sums: pixels before they are 8-bit agree to 1e-5."""
    sampling = SamplingConfig(4, solver=solver, guidance_scale=1.0 if guided == "not" else 1.5)
    guide, labels = models["guide"] if guided == "by a guide" else None, torch.arange(14) % 10
    images = {size: draw(models, labels, size, sampling, guide=guide) for size in (1, 7, 14)}
    assert images[1].dtype == torch.uint8 and images[1].shape == (14, 3, 32, 32)
    for size in (7, 14):
        assert (images[size].int() - images[1].int()).abs().max() <= 1
        assert (images[size] != images[1]).float().mean() < 1e-3
    noise = image_noise(range(14), (16, 4, 4), 3)
    latents = [
        torch.cat(
            [
                draw_latents(models["transformer"], labels[i : i + n], noise[i : i + n], sampling, SHIFT, guide)
                for i in range(0, 14, n)
            ]
        )
        for n in (1, 7, 14)
    ]
    for other in latents[1:]:
        torch.testing.assert_close(other, latents[0], rtol=1e-5, atol=1e-5)
    assert len({latent.numpy().tobytes() for latent in latents[0]}) == 14


def test_rounding_and_precision(models):
    """Truncated pixels are those of the decoder, rounded ones half a level higher on average; autocast is used."""
    labels, sampling = torch.arange(6), SamplingConfig(4)
    noise = image_noise(range(6), (16, 4, 4), 3)
    with torch.no_grad():
        pixels = models["rae"].decode(draw_latents(models["transformer"], labels, noise, sampling, SHIFT)).sample
    scaled = pixels.clamp(0, 1) * 255
    assert torch.equal(draw(models, labels, 6, sampling), scaled.byte())
    rounded = draw(models, labels, 6, sampling, rounding="round")
    assert torch.equal(rounded, scaled.round().byte()) and (rounded > scaled.byte()).float().mean() > 0.3
    low = draw(models, labels, 6, sampling, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    difference = (low.float() - scaled).abs()
    assert 0 < difference.mean() < 5


def test_pixels_that_are_not_finite_end_the_run(models):
    broken = tiny_dit()
    broken.final_layer.linear.bias.data[3] = math.nan
    with pytest.raises(RunError, match="image 2 has pixels that are not finite"):
        labels, sampling = torch.tensor([1, 2]), SamplingConfig(3)
        draw_images(broken, models["rae"], labels, [2, 3], 0, sampling, SHIFT)


@pytest.mark.parametrize(
    "settings, guided, passes",
    [
        ({}, False, (49, 0)),
        ({"end": "zero"}, False, (50, 0)),
        ({"solver": "heun2"}, False, (98, 0)),
        ({"guidance_scale": 1.5}, False, (98, 0)),
        ({"guidance_scale": 1.5}, True, (49, 49)),
        ({"guidance_scale": 1.5, "guidance_interval": (0.0, 0.5)}, False, (55, 0)),
        ({"guidance_scale": 1.5, "guidance_interval": (0.0, 0.5)}, True, (49, 6)),
        ({"guidance_scale": 1.5, "guidance_interval": (0.0, 0.5), "solver": "heun2", "end": "zero"}, True, (100, 13)),
    ],
)
def test_passes(models, settings, guided, passes):
    """Unguided sampling has one pass of one latent for each step; guidance costs what it needs where it is on."""
    sampling, seen = SamplingConfig(**settings), {"transformer": 0, "guide": 0}

    def count(name):
        def hook(module, arguments):
            seen[name] += len(arguments[0])

        return models[name].register_forward_pre_hook(hook)

    hooks = [count(name) for name in seen]
    guide = models["guide"] if guided else None
    draw_latents(
        models["transformer"], torch.tensor([1, 2]), image_noise([0, 1], (16, 4, 4), 0), sampling, 48**0.5, guide
    )
    for hook in hooks:
        hook.remove()
    assert (seen["transformer"] / 2, seen["guide"] / 2) == passes
    kind = guidance_kind(has_base_head=False, has_guide=guided)
    assert count_passes(sampling, 48**0.5, kind) == {"model": passes[0], "guide": passes[1]}


def test_benchmark(models, tmp_path, new_accelerator, monkeypatch, capsys):
    """Each kind of guidance beside the published sampler: the same images, half the passes without guidance."""
    monkeypatch.setattr(benchmark, "build", lambda size, head: models["transformer" if head else "guide"])
    monkeypatch.setattr(benchmark, "build_rae", lambda *size: models["rae"])
    seen = []
    hook = models["transformer"].register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    benchmark.main(["--points", "4", "--repeats", "1", "--json", str(tmp_path / "x.json")])
    hook.remove()
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert list(rows) == list(benchmark.KINDS) and all(row["difference"] < 0.01 for row in rows.values())
    assert seen[:12] == [2, 2, 2, 4, 4, 4] * 2  # unguided: here, published, and both timed
    assert rows["autoguidance"]["passes"] == {"model": 3, "guide": 3} and rows["unguided"]["times_published"] > 0
    assert all(f"{kind} " in capsys.readouterr().out for kind in list(rows)[:1])
    wrong = tiny_dit(3)
    monkeypatch.setattr(benchmark, "draw_images", lambda model, *rest, **options: draw_images(wrong, *rest, **options))
    with pytest.raises(SystemExit, match="unguided: the two samplers' images differ by"):
        benchmark.main(["--points", "4"])


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(pipeline, tmp_path_factory) -> Path:
    """Ten images as PNG and .npz, of one process."""
    folder = tmp_path_factory.mktemp("samples") / "one"
    done = sample(pipeline, folder, "--npz")
    assert "10 images, 0 are there" in done.stdout and "10 of 10 images" in done.stdout, done.stdout
    assert "images/s" in done.stdout and "left" in done.stdout
    return folder


def test_what_is_written(models, pipeline, drawn):
    """PNG, .npz, labels, grid and results agree with each other and with what the functions draw."""
    labels = balanced_labels(10, range(10), 0)
    sampling, indices = SamplingConfig(4), [range(4), range(4, 8), range(8, 10)]
    images = [
        draw_images(models["transformer"], models["rae"], labels[i.start : i.stop], i, 0, sampling, SHIFT)
        for i in indices
    ]
    images = torch.cat(images).permute(0, 2, 3, 1).numpy()
    assert sorted(pngs(drawn)) == [f"{i:06d}.png" for i in range(10)]
    with np.load(drawn / "samples.npz") as npz:
        assert npz.files == ["arr_0"] and npz["arr_0"].dtype == np.uint8
        array = npz["arr_0"]
    for i in range(10):
        assert np.array_equal(np.asarray(Image.open(drawn / "images" / f"{i:06d}.png")), array[i])
    # the processes read the weights from a file, and sums of another alignment are rounded otherwise
    assert (array != images).mean() < 1e-3 and np.abs(array.astype(int) - images).max() <= 1
    with (drawn / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["label"]) for row in rows] == labels.tolist()
    assert [row["name"] for row in rows] == [NAMES[label] for label in labels] and rows[3]["file"] == "000003.png"
    results = json.loads((drawn / "results.json").read_text())
    assert results["loaded"] == f"pipeline {pipeline}" and results["passes_per_image"] == {"model": 3, "guide": 0}
    expected = {"quantize": "truncate", "precision": "float32", "labels": "balanced", "points": 4, "drawn": 10,
                "guidance": "no guidance", "sampler": "euler", "end": "published", "shift": SHIFT}  # fmt: skip
    assert {name: results[name] for name in expected} == expected
    assert results["how"] == (
        "4 points in time, 3 euler steps, no guidance, balanced labels, 8 bit by truncate, float32"
    )
    assert results["images_per_second"] == pytest.approx(10 / results["seconds"])
    picture = np.asarray(Image.open(drawn / "grid.png"))
    order = sorted(range(10), key=lambda i: labels[i].item())
    height = picture.shape[0] - 104  # of the line with the classes' names; tiles of 96 pixels, 4 between them
    assert picture.shape == (height + 104, 10 * 100 + 4, 3) and picture[:height].min() < 128
    for column in (0, 9):
        left = 4 + 100 * column
        assert np.array_equal(picture[height + 4 : height + 100 : 3, left : left + 96 : 3], array[order[column]])


def test_two_processes_draw_the_same_files(pipeline, drawn, tmp_path):
    """Real ones, under accelerate launch; the .npz alone stays if that is asked for."""
    settings = {**SMALL, "model": pipeline, "output_dir": tmp_path / "two", "npz": "true", "png": "false"}
    done = run_command("sample_dit.py", *flags(settings), launch=processes_on_cpu(2))
    assert done.stdout.count("packing") == 1
    assert json.loads((tmp_path / "two" / "results.json").read_text())["num_processes"] == 2
    for name in ("samples.npz", "grid.png", "labels.csv"):
        assert (tmp_path / "two" / name).read_bytes() == (drawn / name).read_bytes(), name
    assert not (tmp_path / "two" / "images").exists()
    again = sample(pipeline, tmp_path / "two", "--npz", png="false")
    assert "nothing was left to draw" in again.stdout and not (tmp_path / "two" / "images").exists()


def test_a_packed_set_is_measured_again(pipeline, drawn, tmp_path):
    """With samples.npz alone, or with some of the PNG files that an interruption left: the figures of the same images,
    nothing is drawn, and the picture stays."""
    folder = tmp_path / "packed"
    settings = {"png": "false", "npz": "true", "eval.metrics": "[fdd]", "eval.reference": drawn / "samples.npz"}
    sample(pipeline, folder, **settings)
    first, picture = json.loads((folder / "results.json").read_text()), (folder / "grid.png").read_bytes()
    assert first["drawn"] == 10 and not (folder / "images").exists()
    for left in (0, 3):
        for name in sorted(pngs(drawn))[:left]:
            (folder / "images").mkdir(exist_ok=True)
            shutil.copy(drawn / "images" / name, folder / "images")
        done = sample(pipeline, folder, **settings)
        again = json.loads((folder / "results.json").read_text())
        assert "nothing was left to draw" in done.stdout and again["drawn"] == 0
        assert again["metrics"]["fdd"] == pytest.approx(first["metrics"]["fdd"], abs=1e-6)
        assert (folder / "grid.png").read_bytes() == picture and not (folder / "images").exists()
    (folder / "grid.png").unlink()
    assert "picture" not in sample(pipeline, folder, **settings).stdout


def test_an_interrupted_set_is_continued(pipeline, drawn, tmp_path):
    """Missing, torn and half-written images are drawn again, the others stay; a lost .npz is packed; the bits are those
    of an uninterrupted run, also on two processes."""
    folder = Path(shutil.copytree(drawn, tmp_path / "samples"))
    images = folder / "images"
    (images / "000001.png").unlink()
    os.truncate(images / "000006.png", 500)
    (images / ".000009.png.partial").write_bytes(b"half")
    for name in ("samples.npz", "results.json", "grid.png"):
        (folder / name).unlink()
    kept = (images / "000009.png").stat().st_mtime_ns
    settings = {**SMALL, "model": pipeline, "output_dir": folder, "npz": "true"}
    done = run_command("sample_dit.py", *flags(settings), processes=2)
    assert "10 images, 2 are there" in done.stdout  # batches are drawn whole: 0 to 3, 4 to 7
    assert pngs(folder) == pngs(drawn) and (images / "000009.png").stat().st_mtime_ns == kept
    assert (folder / "samples.npz").read_bytes() == (drawn / "samples.npz").read_bytes()
    assert (folder / "grid.png").exists()
    assert json.loads((folder / "results.json").read_text())["drawn"] == 8
    (folder / "samples.npz").unlink()
    done = sample(pipeline, folder, "--npz", batch_size=3)  # another batch size may continue too
    assert "packing" in done.stdout and "nothing was left to draw" in done.stdout
    assert (folder / "samples.npz").read_bytes() == (drawn / "samples.npz").read_bytes()


def test_a_killed_run_leaves_no_half_files(pipeline, drawn, tmp_path):
    """Killed as soon as there are some images; every one is whole, and the same command ends with the same files."""
    folder = tmp_path / "killed"
    settings = {**SMALL, "model": pipeline, "output_dir": folder, "batch_size": 1}
    line = ["sample_dit.py", *flags(settings)]
    process = forks().Process(target=run_script, args=(line, tmp_path, dict(os.environ)))
    process.start()
    deadline = time.monotonic() + 120
    while len(list(folder.glob("images/0*.png"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.join()
    there = list(folder.glob("images/0*.png"))
    assert there and process.exitcode == -signal.SIGKILL
    for path in there:
        assert np.asarray(Image.open(path)).shape == (32, 32, 3)
    done = sample(pipeline, folder)
    assert pngs(folder) == pngs(drawn) and "10 images, " in done.stdout


def test_other_settings_do_not_continue(pipeline, drawn, tmp_path):
    """Whatever changes a pixel is named; what does not may differ."""
    for settings, words in (
        ({"seed": 1}, "seed is 0 there and 1 now"),
        ({"num_samples": 12}, "num_samples is 10 there and 12 now"),
        ({"num_inference_steps": 5}, "sampling is "),
        ({"quantize": "round"}, "quantize is 'truncate' there and 'round' now"),
        ({"classes": "[class b]"}, "classes is [] there"),
    ):
        done = sample(pipeline, drawn, check=False, **settings)
        assert done.returncode == 2 and words in error_line(done.stderr)
    other = Path(shutil.copytree(pipeline, tmp_path / "final"))
    changed = tiny_dit(9)
    save_file(dict(changed.state_dict()), other / "transformer" / "diffusion_pytorch_model.safetensors")
    assert "transformer is " in error_line(sample(other, drawn, check=False).stderr)
    moved = Path(shutil.copytree(pipeline, tmp_path / "elsewhere"))
    assert "nothing was left to draw" in sample(moved, drawn).stdout
    (tmp_path / "mine" / "images").mkdir(parents=True)
    with pytest.raises(ConfigError, match="has images and no settings.json"):
        check_same_settings(tmp_path / "mine", {}, "output_dir")


def test_classes_and_labels(pipeline, tmp_path):
    sample(pipeline, tmp_path / "named", "--classes", "class c", "7")
    rows = list(csv.DictReader((tmp_path / "named" / "labels.csv").open()))
    assert sorted(row["label"] for row in rows) == ["2"] * 5 + ["7"] * 5
    sample(pipeline, tmp_path / "random", labels="random", seed=4)
    rows = list(csv.DictReader((tmp_path / "random" / "labels.csv").open()))
    assert [int(row["label"]) for row in rows] == random_labels(10, range(10), 4).tolist()


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"model": "/nothing/here"}, "model: /nothing/here does not exist, expected a pipeline folder"),
        ({"classes": "[class x]"}, "classes: class 'class x': expected a name or an index from 0 to 9; the nearest"),
        ({"guidance_interval": "[0.9,0.1]", "guidance_scale": 2}, "sampling.guidance_interval: expected two times"),
        ({"guidance_interval": "[0.1,0.9]"}, "sampling.guidance_interval: expected nothing unless"),
        ({"guide": "x/y"}, "sampling.guide: expected nothing unless sampling.guidance_scale is another than 1"),
        ({"num_inference_steps": 1}, "sampling.num_inference_steps: expected at least 2 unless sampling.end is zero"),
        ({"sampling.end": "one"}, "sampling.end: expected one of 'published', 'zero', got one"),
        ({"num_samples": 0}, "num_samples: expected a positive number, got 0"),
        ({"png": "false"}, "png: expected true unless npz is, got False"),
        ({"weights": "raw"}, "weights: expected ema, got raw"),
        ({"rae": "/nothing/here"}, "rae: /nothing/here does not exist"),
        ({"eval.inception_path": "x.pt"}, "eval.inception_path: expected nothing unless eval.metrics name one of Inc"),
        ({"eval.inception_path": "x.pt", "eval.metrics": "[fdd]", "eval.reference": "x.npz"}, "eval.inception_path"),
        ({"tf32": "true"}, "tf32: expected false, TF32 is a GPU's"),
        ({"mixed_precision": "fp16"}, "mixed_precision: fp16 needs a GPU"),
    ],
)
def test_bad_settings_are_refused(pipeline, tmp_path, new_accelerator, monkeypatch, capsys, settings, words):
    """In one line, before anything is made."""
    line = flags({**SMALL, "model": pipeline, "output_dir": tmp_path / "out", **settings})
    monkeypatch.setattr(sys, "argv", ["sample_dit.py", *line])
    with pytest.raises(SystemExit) as stopped:
        sample_dit.run_main(sample_dit.main)
    assert stopped.value.code == 2 and not (tmp_path / "out").exists()
    assert error_line(capsys.readouterr().err).startswith(f"error: {words}")


# What it takes for a model --------------------------------------------------------------------------------------------


def test_run_folders_and_checkpoints(models, pipeline, run_dir, tmp_path):
    """A checkpoint's averaged or raw weights; a run folder's final/, else its newest checkpoint, which is said."""
    checkpoint = run_dir / "checkpoints" / "step-00000008"
    transformer, rae, settings = load_pipeline_parts(str(checkpoint), "model", "raw")
    assert same(dict(transformer.state_dict()), dict(models["transformer"].state_dict()))
    assert same(dict(rae.state_dict()), dict(models["rae"].state_dict()))
    assert settings.found == f"checkpoint {checkpoint}, raw weights" and settings.class_names[2] == "class c"
    assert transformer.config.num_classes == 10 and not transformer.training
    for source in (checkpoint, run_dir):
        averaged, _, settings = load_pipeline_parts(str(source), "model")
        assert same(dict(averaged.state_dict()), dict(tiny_dit(5).state_dict()))
        assert settings.found == f"checkpoint {checkpoint}, averaged weights" and settings.weights == "averaged"
    whole = Path(shutil.copytree(run_dir, tmp_path / "run"))
    shutil.copytree(pipeline, whole / "final")
    _, _, settings = load_pipeline_parts(str(whole), "model")
    assert settings.found == f"pipeline {whole / 'final'}" and settings.weights == "averaged"
    assert load_pipeline_parts(str(whole), "model", "raw")[2].weights == "raw"
    (whole / "final" / "modeling_dit.py").unlink()  # not whole
    assert "checkpoint" in load_pipeline_parts(str(whole), "model")[2].found


def test_class_names_are_in_the_order_of_their_indices(models, tmp_path):
    """Of twelve, too: model_index.json has them in the order of texts, 0, 1, 10, 11, 2."""
    names = {index: f"class {index}" for index in range(12)}
    transformer = tiny_dit(num_classes=12)
    save_pipeline(tmp_path / "final", transformer, models["rae"], class_names=[*names.values()], sampling={})
    stored = json.loads((tmp_path / "final" / "model_index.json").read_text())["class_names"]
    assert [*stored][:4] == ["0", "1", "10", "11"]
    _, _, settings = load_pipeline_parts(str(tmp_path / "final"), "model")
    assert [*settings.class_names.items()] == [*names.items()]


def test_a_transformer_alone_needs_its_rae(models, pipeline, drawn, tmp_path):
    """With --rae it draws the pipeline's images; the time shift follows from the latents unless a pipeline says it."""
    done = sample(pipeline / "transformer", tmp_path / "out", check=False)
    assert error_line(done.stderr).startswith("error: rae: expected the RAE of ")
    transformer, rae, settings = load_pipeline_parts(str(pipeline / "transformer"), "model")
    assert rae is None and settings.shift == 1.0 and settings.class_names == {}
    sample(pipeline / "transformer", tmp_path / "out", rae=pipeline / "rae")
    assert pngs(tmp_path / "out").keys() == pngs(drawn).keys() and pngs(tmp_path / "out") != pngs(drawn)
    other = tiny_rae(use_latent_stats=True)
    other.latent_mean += 1
    other.save_pretrained(tmp_path / "rae")
    done = sample(pipeline, tmp_path / "no", check=False, rae=tmp_path / "rae")
    assert "is of another latent space than the RAE of" in error_line(done.stderr)


def test_guides(models, pipeline, tmp_path):
    """Given as a pipeline or a transformer; the model's own unless that is left out; of other latents or classes, or a
    RAE with other statistics: refused before sampling."""
    folders = {name: tmp_path / name for name in ("guide", "guided", "statistics", "classes", "latents")}
    other = tiny_rae(use_latent_stats=True)
    other.latent_var += 1
    save_pipeline(folders["guide"], models["guide"], models["rae"], sampling={})
    save_pipeline(folders["guided"], models["transformer"], models["rae"], guide=models["guide"], sampling={})
    save_pipeline(folders["statistics"], models["guide"], other, sampling={})
    save_pipeline(folders["classes"], tiny_dit(num_classes=9), models["rae"], sampling={})
    tiny_dit(in_channels=8).save_pretrained(folders["latents"])
    own = load_pipeline_parts(str(folders["guided"]), "model")[2].guide
    arguments = (models["transformer"], models["rae"], "sampling.guide")
    expected = dict(models["guide"].state_dict())
    for name, place in ((str(folders["guide"]), None), (f"{folders['guide']}/transformer", own), (None, own)):
        assert same(dict(load_guide(name, place, *arguments).state_dict()), expected)
    assert load_guide("off", own, *arguments) is load_guide(None, None, *arguments) is None
    for name, words in (
        ("statistics", "is of another latent space: its RAE has another encoder or other statistics"),
        ("classes", "guide: expected a model of the transformer's latents and classes .*'num_classes': 9"),
        ("latents", "guide: expected a model of .*'in_channels': 8"),
    ):
        with pytest.raises(ConfigError, match=f"^sampling.guide: .*{words}"):
            load_guide(str(folders[name]), None, *arguments)
    save_pipeline(tmp_path / "always labels", tiny_dit(class_dropout_prob=0.0), models["rae"], sampling={})
    done = sample(tmp_path / "always labels", tmp_path / "no", check=False, guidance_scale=2)
    assert "sampling.guidance_scale: " in (line := error_line(done.stderr)) and "has no null label" in line
    results = {}
    for name, line in {
        "own": ["--model", folders["guided"]],
        "given": ["--model", pipeline, "--guide", folders["guide"], "--rae", pipeline / "rae"],
        "left out": ["--model", folders["guided"], "--guide", "off"],
    }.items():
        output = tmp_path / "out" / name
        rest = [*flags({**SMALL, "output_dir": output, "guidance_scale": 1.4}), "--guidance_interval", "0.1", "1"]
        run_command("sample_dit.py", *line, *rest)
        results[name] = (pngs(output), json.loads((output / "results.json").read_text()))
    words = {name: result["guidance"].split(" at")[0] for name, (_, result) in results.items()}
    assert words == {"own": "autoguidance 1.4", "given": "autoguidance 1.4", "left out": "classifier-free guidance 1.4"}
    assert results["own"][1]["guide"] == str(own) and results["left out"][1]["guide"] is None
    assert results["own"][1]["passes_per_image"] == {"model": 3, "guide": 3}
    assert results["own"][0] != results["left out"][0]


def test_what_is_no_stage_2_model(pipeline, run_dir, tmp_path):
    """Each is refused with its name and what is expected."""
    (tmp_path / "empty").mkdir()
    stage1 = Path(shutil.copytree(run_dir, tmp_path / "stage1"))
    (stage1 / "config.yaml").write_text("model: {encoder: x}\n")
    without = Path(shutil.copytree(run_dir, tmp_path / "without"))
    shutil.rmtree(without / "checkpoints")
    torn = Path(shutil.copytree(run_dir, tmp_path / "torn"))
    os.truncate(torn / "checkpoints" / "step-00000008" / "ema.safetensors", 3000)
    missing = Path(shutil.copytree(pipeline, tmp_path / "missing"))
    (missing / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    wrong = Path(shutil.copytree(run_dir, tmp_path / "wrong"))
    config = json.loads((wrong / "config.yaml").read_text())
    (wrong / "config.yaml").write_text(json.dumps({**config, "model": {**config["model"], "num_layers": 3}}))
    for source, words in (
        (tmp_path / "empty", "has no model_index.json and no config.json, expected a pipeline folder"),
        (pipeline / "rae", "is a rae, expected a pipeline folder"),
        (stage1, "is a checkpoint of a run of stage 1, expected a pipeline folder"),
        (without, "is a run folder without final/ and without checkpoints"),
        (torn, "ema.safetensors is no file of tensors"),
        (missing, "diffusion_pytorch_model.safetensors"),
        (wrong, "weights do not fit the model's settings: .*blocks.3"),
        ("user/nothing", "user/nothing.*is no local folder, is not in the cache"),
    ):
        with pytest.raises(ConfigError, match=f"^model: .*{words}"):
            load_pipeline_parts(str(source), "model")


# Files ----------------------------------------------------------------------------------------------------------------


def test_whole_files_are_told_from_others(drawn, tmp_path):
    png = tmp_path / "a.png"
    assert not is_whole_png(png)
    whole = (drawn / "images" / "000000.png").read_bytes()
    for content, expected in (
        (whole, True),
        (whole[:-1], False),
        (b"", False),
        (whole[:12], False),
        (b"x" * 99, False),
    ):
        png.write_bytes(content)
        assert is_whole_png(png) == expected
    assert is_whole_npz(drawn, 10, 32) and not is_whole_npz(drawn, 11, 32) and not is_whole_npz(drawn, 10, 64)
    shutil.copy(drawn / "samples.npz", tmp_path)
    os.truncate(tmp_path / "samples.npz", 20_000)
    assert not is_whole_npz(tmp_path, 10, 32)


@pytest.mark.parametrize("pages, path", [(0, "settings.json"), (4, "images"), (12, "samples.npz"), (20, "grid.png")])
def test_a_full_disk(pipeline, drawn, tmp_path, pages, path):
    """One line that names what cannot be written; with room again, the same command ends with the same files."""
    with small_disk(tmp_path / "disk") as disk:
        fill(disk, pages * PAGE)
        done = sample(pipeline, disk, "--npz", check=False)
        line = error_line(done.stderr)
        assert done.returncode == 1 and line.startswith(f"error: {disk / path} cannot be written ("), line
        assert "No space left on device" in line
        (disk / "filler").unlink()
        sample(pipeline, disk, "--npz")
        assert pngs(disk) == pngs(drawn)
        for name in ("samples.npz", "grid.png", "labels.csv"):
            assert (disk / name).read_bytes() == (drawn / name).read_bytes()
