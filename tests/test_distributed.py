"""Several processes train what one trains. Real processes."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import PLAIN, TINY, error_line, flags, processes_on_cpu, read_metrics, run_command, run_ranks
from safetensors.torch import load_file

from rae_suite.loaders import TrainBatches
from rae_suite.settings_rae import parse_config
from rae_suite.splits import load_splits

# 20 steps with L1 and LPIPS; 16 px because VGG16 is slow. The losses have kinks (L1, ReLU): where float32's rounding
# puts a value on the other side of one, the next step differs, so the learning rate is a quarter of the published one.
# Adam divides a gradient by its own size: where that is near zero, its usual epsilon makes whole steps of rounding
ROUNDED = {
    **TINY,
    "model.image_size": "16",
    "model.encoder_input_size": "16",
    "data.resize_size": "18",
    "gan.weight": "0",
    "perceptual.start_step": "0",
    "optimizer.lr": "5.0e-5",
    "optimizer.eps": "1.0e-4",
    "lr_schedule.decay_end_step": "20",
    "train.max_steps": "20",
}
# the published learning rate and epsilon: no rounding hides a difference
EXACT = {**PLAIN, "gan.weight": "0", "optimizer.lr": "2.0e-4", "train.max_steps": "20"}
WHOLE = {"model.noise_tau": "0", "train.global_batch_size": "6"}
# all losses, whose 8-bit rounding of reconstructions is all kinks: in float64 only. Spectral norms take a power
# iteration for each of a process's micro-batches, so they are off where those differ
ADVERSARIAL = {**PLAIN, "gan.spectral_norm": "false"}
ON_ONE = {"train.gradient_accumulation_steps": "8"}
ON_TWO = {"train.gradient_accumulation_steps": "4"}
RUNS = {
    1: {
        "whole": {**ROUNDED, **WHOLE},
        "whole, float64": {**EXACT, **WHOLE},
        "accumulated": {**ROUNDED, **ON_ONE},
        "adversarial, accumulated, float64": {**ADVERSARIAL, **ON_ONE},
    },
    2: {
        "whole": {**ROUNDED, **WHOLE},
        "whole, float64": {**EXACT, **WHOLE},
        "accumulated": {**ROUNDED, **ON_TWO},
        "adversarial, accumulated, float64": {**ADVERSARIAL, **ON_TWO},
        "adversarial": PLAIN,
    },
    3: {
        "whole": {**ROUNDED, **WHOLE},
        "whole, float64": {**EXACT, **WHOLE},
        "adversarial": {**PLAIN, "train.global_batch_size": "9", "train.gradient_accumulation_steps": "3"},
    },
}


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """{processes: {name: the weights of each rank}} of RUNS."""
    folder = tmp_path_factory.mktemp("trained")
    places = {(count, name): folder / str(count) / name for count, runs in RUNS.items() for name in runs}
    scenarios = [
        {
            "folder": place.parent,
            "processes": count,
            "argv": ["training_steps.py", place, {**RUNS[count][name], "data.path": images}],
        }
        for (count, name), place in places.items()
    ]
    for scenario, result in zip(scenarios, run_ranks(*scenarios), strict=True):
        assert all(end and end["code"] == 0 for end in result["ends"]), (scenario, result)
    weights = {count: {} for count in RUNS}
    for (count, name), place in places.items():
        weights[count][name] = [load_file(f"{place}.rank{rank}.safetensors") for rank in range(count)]
    return weights


def difference(trained, name: str, processes: int, network: str) -> float:
    """Relative difference of a network's weights to those of one process. Makes sure that both saw the same images.
    The keys' biases are left out: attention takes no notice of them, so their gradient is rounding alone."""
    ranks, (single,) = trained[processes][name], trained[1][name]
    assert torch.cat([rank["seen"] for rank in ranks]).sort().values.equal(single["seen"].sort().values)
    names = [n for n in single if n.startswith(network) and not n.endswith("key.bias")]
    a, b = (torch.cat([run[n].double().flatten() for n in names]) for run in (ranks[0], single))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("processes", (2, 3))
def test_equal_to_one_process(trained, processes):
    """The weights of one process, up to the order of sums, after 20 steps; to 1e-12 in float64."""
    for network in ("decoder.", "ema."):
        assert difference(trained, "whole", processes, network) < 1e-5
    assert difference(trained, "whole, float64", processes, "decoder.") < 1e-12


def test_accumulation_on_one_and_two_processes(trained):
    """8 micro-batches on one process are 4 on each of two, latent noise and augmentation included, for decoder, average
    and discriminator."""
    for network in ("decoder.", "ema."):
        assert difference(trained, "accumulated", 2, network) < 1e-5
    for network in ("decoder.", "heads."):
        assert difference(trained, "adversarial, accumulated, float64", 2, network) < 1e-9


@pytest.mark.parametrize("processes", (2, 3))
def test_ranks_have_the_same_weights(trained, processes):
    """With every loss on, noise, augmentation and spectral norms, the ranks see different images and have the same
    decoder, average and discriminator, bit for bit."""
    first, *others = trained[processes]["adversarial"]
    assert any(name.startswith("heads.") and name.endswith("weight_u") for name in first)
    for other in others:
        assert first.keys() == other.keys()
        for name in first:
            assert torch.equal(first[name], other[name]) == (name != "seen"), name


def launched(images, run_dir, settings, processes, check=True):
    settings = {**PLAIN, "train.max_steps": "2", "data.path": images, "train.output_dir": run_dir, **settings}
    return run_command("train_rae.py", *flags(settings), launch=processes_on_cpu(processes), check=check)


def test_launched_run_with_two_processes(images, tmp_path):
    """The whole command under accelerate launch: each evaluation image counts once, and one process can go on."""
    done = launched(images, tmp_path / "run", {"eval.batch_size": "3"}, 2)
    assert "8 = 2 processes x 4 images x 1 accumulated" in done.stdout
    evals = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "eval"]
    assert [line["num_samples"] for line in evals] == [8, 8]
    settings = {**PLAIN, "train.max_steps": "3", "data.path": images, "train.output_dir": tmp_path / "run"}
    run_command("train_rae.py", *flags(settings))
    assert read_metrics(tmp_path / "run")[-1]["step"] == 3


def test_fewer_images_than_processes(images, tmp_path):
    """Three processes and one evaluation image, and training images that no batch size divides: all of it is used.
    Fewer training images than a global batch are an error on all of them before anything starts."""
    data = shutil.copytree(images, tmp_path / "data")
    for path in sorted((data / "validation").rglob("*.png"))[1:]:
        path.unlink()
    few = shutil.copytree(data, tmp_path / "few")
    for path in sorted((few / "train").rglob("*.png"))[2:]:
        path.unlink()
    settings = {**PLAIN, "train.global_batch_size": "9", "train.max_steps": "4", "train.output_dir": tmp_path / "run"}
    other = {**settings, "train.global_batch_size": "3", "train.output_dir": tmp_path / "other"}
    run, refused = run_ranks(
        {"folder": tmp_path / "0", "processes": 3, "argv": ["train_rae.py", {**settings, "data.path": data}]},
        {"folder": tmp_path / "1", "processes": 3, "argv": ["train_rae.py", {**other, "data.path": few}]},
    )
    assert [end["code"] for end in run["ends"]] == [0, 0, 0], run["err"]
    lines = read_metrics(tmp_path / "run")
    assert [line["num_samples"] for line in lines if line["kind"] == "eval"] == [1, 1, 1]
    assert [line["epoch"] for line in lines if line["kind"] == "train"] == [0.5, 1.0, 1.5, 2.0]  # 24 // 9 steps each
    assert [end["code"] for end in refused["ends"]] == [2, 2, 2], refused["err"]
    for stderr in refused["err"]:
        assert (
            "train.global_batch_size: 3, but there are 2 training images in data.path; expected at most 2"
            in error_line(stderr)
        )
    assert not (tmp_path / "other").exists()


def test_pictures_of_an_earlier_start_go_first(images, tmp_path):
    """A run that was killed before its first checkpoint left pictures. However slowly they are removed, those that
    another process writes stay."""
    settings = {**PLAIN, "train.max_steps": "1", "eval.save_pairs": "8", "data.path": images}
    scenario = {"processes": 2, "argv": ["train_rae.py", {**settings, "train.output_dir": tmp_path / "run"}]}
    killed = [{"what": "kill", "rank": rank, "place": "step", "step": 1} for rank in (0, 1)]
    slow = [{"what": "slow", "rank": 0, "place": "removal", "step": 0}]
    first, second = run_ranks(
        {"folder": tmp_path / "0", **scenario, "faults": killed},
        {"folder": tmp_path / "1", **scenario, "faults": slow},
    )
    assert [end["code"] for end in first["ends"]] == [-9, -9], first
    assert [end["code"] for end in second["ends"]] == [0, 0], second
    assert len(list((tmp_path / "run" / "pairs" / "step-00000000-ema" / "images").iterdir())) == 8


def test_an_error_of_one_process_ends_all(images, tmp_path):
    """Unreadable images that only the second process meets: its line is printed and the launcher fails."""
    data = shutil.copytree(images, tmp_path / "data")
    settings = {"data.path": data, "data.max_unreadable": "0", "train.max_steps": "1"}
    config = parse_config(flags({**PLAIN, **settings}))
    order = TrainBatches(24, 8, 4, 1, 2, config.train.seed, 0, 1)
    source, _ = load_splits(config.data, config.train.seed)
    ((_, index), *_) = next(iter(order))
    Path(source.name(index)).write_text("not an image")
    done = launched(data, tmp_path / "run", settings, 2, check=False)
    assert done.returncode != 0
    assert f"error: process 1: data.max_unreadable: {source.name(index)}" in done.stderr or (
        "error: process 1: data.max_unreadable: 1 images" in done.stderr
    ), done.stderr
