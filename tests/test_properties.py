"""Properties that hold for any input, with examples drawn by hypothesis: the same ones each time."""

import dataclasses
import math
import tempfile
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import tiny_rae
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from modeling_rae import LATENT_VAR_EPS, unpatchify
from rae_suite import errors, images, loaders, sources, splits
from rae_suite.cli import check_limits, config_dict, config_yaml, flat
from rae_suite.errors import ConfigError
from rae_suite.metrics import quantize, to_8bit
from rae_suite.moments import Moments
from rae_suite.settings import LRScheduleConfig, check_same_config
from rae_suite.settings_rae import Config, check_config, parse_config
from rae_suite.values import PathText
from train_rae import learning_rate

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50, print_blob=False)
settings.load_profile("repeatable")

sides = st.integers(1, 120)
seeds = st.integers(0, 2**32 - 1)


def noise(width: int, height: int, seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


# Crops ----------------------------------------------------------------------------------------------------------------


@given(sides, sides, st.integers(1, 40), st.integers(0, 30), seeds)
def test_random_crop_is_a_window_of_the_resized_image(width, height, size, margin, seed):
    """Of the size asked for, inside, at most a level off; the same for the same seed."""
    image, resize = noise(width, height, seed), size + margin
    crop = images.random_crop(image, size, resize, seed)
    assert crop.shape == (3, size, size)
    assert torch.equal(crop, images.random_crop(image, size, resize, np.random.default_rng(seed)))
    long = int(resize * max(width, height) / min(width, height))  # torchvision's rule: the longer side is rounded down
    shape = (resize, long) if width <= height else (long, resize)
    resized = np.asarray(image.resize(shape, Image.Resampling.BICUBIC))
    assert min(resized.shape[:2]) == resize
    windows = np.lib.stride_tricks.sliding_window_view(resized, (size, size), axis=(0, 1))  # (rows, columns, 3, s, s)
    assert (np.abs(windows - crop.numpy().astype(int)) <= 1).all(axis=(2, 3, 4)).any()


@settings(max_examples=8)
@given(st.integers(1, 6), st.integers(0, 4), st.integers(0, 4), st.integers(0, 1000))
def test_positions_of_random_crops_are_uniform(size, rows, columns, seed):
    """Every one of the (rows + 1) x (columns + 1) windows equally often: chi squared below its 1e-6 quantile."""
    height, width = size + rows, size + columns
    short = min(height, width)
    place = np.arange(height * width, dtype=np.uint8).reshape(height, width)  # each pixel says where it is
    image = Image.fromarray(np.repeat(place[..., None], 3, 2))
    windows = (height - size + 1) * (width - size + 1)
    draws = 200 * windows
    generator = np.random.default_rng(seed)
    found = [images.random_crop(image, size, short, generator)[0, 0, 0].item() for _ in range(draws)]
    counts = np.unique(found, return_counts=True)[1]
    assert len(counts) == windows
    chi_squared = ((counts - 200) ** 2 / 200).sum()
    assert chi_squared <= windows + 5 * math.sqrt(2 * windows) + 25


@given(sides, sides, st.integers(1, 40), seeds)
def test_center_crop_takes_the_middle(width, height, size, seed):
    """Of the size asked for; an image of that size is its own crop, a square one is only resized, and its mirror image
    gives the mirror image."""
    image = noise(width, height, seed)
    crop = images.center_crop(image, size)
    assert crop.size == (size, size) and crop.mode == "RGB"
    assert np.array_equal(crop, images.center_crop(image.copy(), size))
    if width == height == size:
        assert np.array_equal(crop, image)
    if width == height:  # nothing is cut off
        mirror = Image.Transpose.FLIP_LEFT_RIGHT
        mirrored = images.center_crop(image.transpose(mirror), size).transpose(mirror)
        assert np.abs(np.asarray(mirrored).astype(int) - np.asarray(crop)).max() <= 2  # rounding
    if width == height < 2 * size:  # what image processors do, without halving first
        stock = torchvision.transforms.Resize(size, torchvision.transforms.InterpolationMode.BICUBIC)
        assert np.array_equal(crop, stock(image))


@given(sides, sides, st.integers(1, 40), st.tuples(*[st.integers(0, 255)] * 3), seeds)
def test_crops_of_one_colour_are_that_colour(width, height, size, color, seed):
    """No border shines in: resizing weights pixels of the image alone."""
    image = Image.new("RGB", (width, height), color)
    assert (np.asarray(images.center_crop(image, size)) == color).all()
    assert (images.random_crop(image, size, size + 3, seed).permute(1, 2, 0).numpy() == color).all()


# Sharing out ----------------------------------------------------------------------------------------------------------


def train_batches(num_images, micro, world, accumulation, seed, start=0, total=0):
    """The TrainBatches of all ranks."""
    size = micro * world * accumulation
    return [loaders.TrainBatches(num_images, size, micro, rank, world, seed, start, total) for rank in range(world)]


def by_step(batches) -> list:
    """The set of (epoch, index) of each step, over all ranks and micro-batches; none may be there twice."""
    per_step = batches[0].micro_batches_per_step
    ranks = [list(rank) for rank in batches]
    steps = []
    for start in range(0, len(ranks[0]), per_step):
        given = [item for rank in ranks for batch in rank[start : start + per_step] for item in batch]
        assert len(given) == len(set(given)) == batches[0].global_batch_size
        steps.append(frozenset(given))
    return steps


shares = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))


@given(shares, st.integers(0, 40), seeds, st.integers(1, 3))
def test_an_epoch_shows_every_image_once(share, surplus, seed, epochs):
    """Over any number of processes and micro-batches, but for those that fill no last batch; each epoch has an order of
    its own."""
    micro, world, accumulation = share
    size = micro * world * accumulation
    num_images = size + surplus
    steps_per_epoch = num_images // size
    batches = train_batches(num_images, micro, world, accumulation, seed, 0, epochs * steps_per_epoch)
    assert all(len(rank) == len(list(rank)) for rank in batches)
    steps = by_step(batches)
    for epoch in range(epochs):
        shown = [i for step in steps[epoch * steps_per_epoch : (epoch + 1) * steps_per_epoch] for i in step]
        assert {e for e, _ in shown} == {epoch}
        assert len({i for _, i in shown}) == len(shown) == steps_per_epoch * size
        assert all(0 <= i < num_images for _, i in shown)


@given(shares, shares, st.integers(0, 30), seeds, st.data())
def test_a_resumed_run_sees_what_the_whole_one_does(share, other, surplus, seed, draw):
    """From any step on, and with the same global batch over other processes and micro-batches."""
    size = math.lcm(math.prod(share), math.prod(other))
    num_images, total = size + surplus, 5
    start = draw.draw(st.integers(0, total))

    def given_by(micro, world, _, first) -> list:
        return by_step(
            [loaders.TrainBatches(num_images, size, micro, rank, world, seed, first, total) for rank in range(world)]
        )

    assert given_by(*other, start) == given_by(*share, 0)[start:]


class Numbers(sources.ImageSource):
    """Images that are their own number."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def label(self, i):
        return None

    def load(self, i):
        return Image.new("RGB", (2, 2), (i, 0, 0))

    def fingerprint(self, indices=None):
        return f"{self.count} {indices}"


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 5), st.one_of(st.none(), st.integers(1, 80)))
def test_every_image_is_evaluated_once(count, batch_size, world, num_samples):
    """By one process, in equally many batches of all, with its own pixels; a sample is spread evenly."""
    source = Numbers(count)
    ranks = [loaders.eval_loader(source, 2, batch_size, 0, rank, world, num_samples) for rank in range(world)]
    batches = [list(loader) for loader in ranks]
    assert len({len(rank) for rank in batches}) == 1
    assert all(len(batch["index"]) <= batch_size for rank in batches for batch in rank)
    found = torch.cat([batch["index"] for rank in batches for batch in rank])
    chosen = list(loaders.chosen_images(source, num_samples))
    assert sorted(found.tolist()) == chosen
    assert len(chosen) == min(count, num_samples or count)
    gaps = np.diff([*chosen, count])
    assert gaps.max() - gaps.min() <= 1 and chosen[0] == 0
    for rank in batches:
        for batch in rank:
            assert batch["pixels"].shape == (len(batch["index"]), 3, 2, 2)
            assert torch.equal(batch["pixels"][:, 0, 0, 0].long(), batch["index"])


@given(st.integers(2, 80), st.floats(0.01, 0.9), seeds)
def test_held_out_images_are_apart(count, fraction, seed):
    """Every image is on one side, the same with the same seed."""
    if max(1, round(count * fraction)) >= count:
        with pytest.raises(errors.DataError, match="data.holdout_fraction"):
            splits._hold_out(Numbers(count), fraction, seed)
        return
    sides = splits._hold_out(Numbers(count), fraction, seed)
    names = [[source.load(i).getpixel((0, 0))[0] for i in range(len(source))] for source in sides]
    assert sorted(names[0] + names[1]) == list(range(count)) and names == [sorted(side) for side in names]
    assert len(names[1]) == max(1, round(count * fraction))
    again = splits._hold_out(Numbers(count), fraction, seed)
    assert [source.fingerprint() for source in again] == [source.fingerprint() for source in sides]


# Configs --------------------------------------------------------------------------------------------------------------


def values_of(key: str, kind: typing.Any) -> st.SearchStrategy:
    """Values that a setting takes."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if type(None) in parts:
        return st.none() | values_of(key, next(part for part in parts if part is not type(None)))
    if origin is typing.Literal:
        return st.sampled_from(parts)
    if origin is tuple and parts[-1] is ...:
        return st.lists(values_of(key, parts[0]), max_size=4, unique=True).map(lambda v: tuple(sorted(v)))
    if origin is tuple:
        return st.tuples(*(values_of(key, part) for part in parts))
    if origin is dict and parts[1] is not typing.Any:
        return st.dictionaries(words, values_of(key, parts[1]), max_size=3)
    if origin is dict:
        nested = st.recursive(plain_values, lambda v: st.lists(v, max_size=3) | st.dictionaries(words, v, max_size=3))
        return st.dictionaries(words, nested, max_size=3)
    if kind is float:
        return st.floats(0, 1, exclude_min=True, exclude_max=True)
    return {bool: st.booleans(), int: st.integers(1, 10**6), str: texts, PathText: paths}[kind]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    [
        "1e3",
        "12e4567",
        "0123",
        "1_000",
        "true",
        "on",
        "2024-01-01",
        "{x",
        "[a]",
        "{a: 1}",
        "*a",
        "!a",
        "- a",
        ".nan",
        "'",
        "~",
        "null",
        "None",
    ]
)
paths = texts.filter(lambda text: not text.startswith("~"))  # the home folder
words = st.text("abcXYZ_\u00e9", min_size=1, max_size=5)
plain_values = st.booleans() | st.integers(-(10**9), 10**9) | words


@st.composite
def configs(draw) -> Config:
    """Configs of train_rae.py with any values in a few settings."""

    def changed(schema: type, prefix: str = "") -> typing.Any:
        values = {}
        for item in dataclasses.fields(schema):
            key = prefix + item.name
            if dataclasses.is_dataclass(item.default_factory):
                values[item.name] = changed(item.default_factory, f"{key}.")
            elif draw(st.integers(0, 3)) == 0:
                values[item.name] = draw(values_of(key, item.type))
        return schema(**values)

    config = changed(Config)
    try:  # what contradicts something else is not a config
        check_limits(config)
        check_config(config)
    except ConfigError:
        assume(False)
    return config


@settings(max_examples=15, phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # shrinking takes minutes
@given(configs())
def test_a_config_is_the_same_when_it_is_read_again(config):
    """As YAML, from the run folder."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(config_yaml(config))
        again, written = (flat(config_dict(c)) for c in (parse_config(["--config", str(file)]), config))
        assert {key: value for key, value in again.items() if value != written[key]} == {}
        check_same_config(config, file)


schedules = st.builds(
    LRScheduleConfig,
    type=st.sampled_from(["cosine", "linear", "constant"]),
    warmup_steps=st.none() | st.integers(0, 50),
    warmup_epochs=st.floats(0, 5),
    warmup_from_zero=st.booleans(),
    decay_end_step=st.none() | st.integers(0, 100),
    decay_end_epoch=st.floats(0, 20),
    final_lr=st.floats(0, 1e-3),
)


@given(schedules, st.floats(1e-6, 1e-2), st.integers(1, 30))
def test_learning_rate_is_bounded_and_has_no_jumps(schedule, peak, steps_per_epoch):
    """Between the values at its ends, from step to step no further than warm-up or decay needs, and final_lr from then
    on."""
    rates = [learning_rate(step, peak, schedule, steps_per_epoch) for step in range(700)]
    warmup = schedule.warmup_steps
    warmup = int(schedule.warmup_epochs * steps_per_epoch) if warmup is None else warmup
    end = schedule.decay_end_step
    end = max(warmup, int(schedule.decay_end_epoch * steps_per_epoch) if end is None else end)
    least = min(peak / warmup if warmup and schedule.warmup_from_zero else peak,
                peak if schedule.type == "constant" else schedule.final_lr)  # fmt: skip
    tiny = 1e-9 * max(peak, schedule.final_lr)
    assert all(least - tiny <= rate <= max(peak, schedule.final_lr) + tiny for rate in rates)
    if warmup:
        assert rates[warmup - 1] == pytest.approx(peak)
    if schedule.type == "constant":
        assert rates[warmup:] == [peak] * len(rates[warmup:])
    else:
        assert rates[end:] == pytest.approx([schedule.final_lr] * len(rates[end:]))
        steepest = math.pi / 2 * abs(peak - schedule.final_lr) / max(1, end - warmup)
        assert (np.abs(np.diff(rates[warmup : end + 1])) <= steepest + tiny).all()
    rise = peak / warmup if warmup and schedule.warmup_from_zero else 0
    assert np.diff(rates[:warmup]) == pytest.approx(rise)


# Tensors --------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), seeds)
def test_unpatchify_is_undone_by_cutting(batch, grid, patch, seed):
    """Values of a patch are ordered (row, column, channel), patches by rows."""
    image = torch.rand(batch, 3, grid * patch, grid * patch, generator=torch.Generator().manual_seed(seed))
    cut = image.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, 3, h, w, p, p)
    patches = cut.permute(0, 2, 3, 4, 5, 1).reshape(batch, grid * grid, patch * patch * 3)
    assert torch.equal(unpatchify(patches, patch), image)


@pytest.fixture(scope="module")
def rae():
    return tiny_rae(use_latent_stats=True).eval()


@given(seeds, st.floats(-5, 5), st.floats(-6, 4))
def test_statistics_are_taken_off_and_put_back(rae, seed, shift, exponent):
    """encode divides by what decode multiplies with: the decoder sees the tokens as they were."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(16, 4, 4, generator=generator) + shift
    var = torch.rand(16, 4, 4, generator=generator) * 10.0**exponent
    rae.set_latent_stats(mean, var)
    pixels = torch.rand(1, 3, 32, 32, generator=generator)
    with torch.no_grad():
        plain, normal = (rae.encode(pixels, normalize=normalize).latent for normalize in (False, True))
    torch.testing.assert_close(normal, (plain - mean) / (var + LATENT_VAR_EPS).sqrt(), rtol=1e-4, atol=1e-4)
    seen = []
    handle = rae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        with torch.no_grad():
            rae.decode(normal)
    finally:
        handle.remove()
    torch.testing.assert_close(seen[0], plain, rtol=1e-4, atol=1e-4)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.booleans(), st.floats(-1e4, 1e4), seeds)
def test_moments_do_not_depend_on_the_batches(sizes, covariance, shift, seed):
    """Nor on empty ones among them: those of all samples at once."""
    total = sum(sizes)
    if total < 2:
        return
    values = torch.randn(total, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + shift
    moments = Moments((3,), covariance)
    for batch in values.split(sizes):
        moments.update(batch)
    assert moments.count == total
    torch.testing.assert_close(moments.mean, values.mean(0), rtol=1e-10, atol=1e-10)
    expected = torch.cov(values.T, correction=1) if covariance else values.var(0, correction=1)
    torch.testing.assert_close(moments.variance(1), expected, rtol=1e-7, atol=1e-7)


@given(st.lists(st.floats(-2, 3, width=32), min_size=1, max_size=30))
def test_eight_bit_values_are_the_nearest(values):
    """In [0, 255], off by half a level at most, and themselves when they are quantised again."""
    pixels = torch.tensor(values).reshape(1, 1, 1, -1)
    levels = to_8bit(pixels)
    assert levels.dtype == torch.uint8
    difference = levels.double() / 255 - pixels.double().clamp(0, 1)
    assert difference.abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(to_8bit(levels.float() / 255), levels)
    assert torch.equal(quantize(quantize(pixels)), quantize(pixels))
