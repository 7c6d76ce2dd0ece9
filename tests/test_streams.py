"""streams.py: shards into lanes, lanes into steps, exactly once and exactly again after a stop. Tiny images, real files,
real workers, and a web server on loopback."""

import io
import json
import signal
import subprocess
import tarfile
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import PLAIN, ROOT, command, flags, read_metrics, run_command
from PIL import Image

import streams
from config import DataConfig
from streams import StreamLoader, expand_braces, list_shards, load_stream_eval_images, open_stream

SIZE = 8
LAUNCH_TWO = ("--multi_gpu", "--num_processes", "2", "--main_process_port", "0")


def png(number, side=10):
    """An image that says its number in two channels, with a texture of its own in the third."""
    pixels = np.empty((side, side, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = divmod(number, 256)
    pixels[..., 2] = np.random.default_rng(number).integers(0, 256, (side, side))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def numbers(pixels):
    """Which images (B, 3, S, S) are crops of."""
    return (pixels[:, 0, 0, 0].int() * 256 + pixels[:, 1, 0, 0].int()).tolist()


def write_parquet(path, ids, row_group_size=4, side=10, broken=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = [{"bytes": b"no image" if i in broken else png(i, side), "path": None} for i in ids]
    table = pa.table({"image": rows or pa.array([], features.arrow_schema.field("image").type), "label": list(ids)})
    pq.write_table(table.cast(features.arrow_schema), path, row_group_size=row_group_size)


def write_tar(path, ids, side=10):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for i in ids:
            for name, content in ((f"{i:06}.png", png(i, side)), (f"{i:06}.txt", b"a caption")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def write_shards(folder, sizes, write, first=0, **options):
    """Shards of the given sizes, numbered on; the ids that they hold."""
    for i, size in enumerate(sizes):
        suffix = "parquet" if write is write_parquet else "tar"
        write(folder / f"train-{i:03}.{suffix}", range(first, first + size), **options)
        first += size
    return list(range(first - sum(sizes), first))


def settings(path, **changed):
    base = dict(path=str(path), streaming=True, shuffle_buffer=6, stream_lanes=4, num_workers=0, resize_size=10)
    return DataConfig(**{**base, "shard_retries": 0, **changed})


def open_(cfg, batch=8, world_size=1, seed=0):
    return open_stream(cfg, batch, seed, SimpleNamespace(is_main_process=True, num_processes=world_size))


def steps(cfg, count, batch=8, world_size=1, micro_batches=1, states=None, seed=0):
    """(list of steps, pixels (B, 3, S, S) each as all ranks together see it; states of all lanes after each)."""
    stream = open_(cfg, batch, world_size, seed)
    loaders = [StreamLoader(stream, cfg, SIZE, rank, world_size, micro_batches, states) for rank in range(world_size)]
    iterators = [iter(loader) for loader in loaders]
    pixels, after = [], []
    for _ in range(count):
        parts = [next(iterator)["pixels"] for iterator in iterators for _ in range(micro_batches)]
        assert all(len(part) == batch // world_size // micro_batches for part in parts)
        pixels.append(torch.cat(parts))
        states = [loader.states[lane] for loader in loaders for lane in sorted(loader.states)]
        after.append(json.loads(json.dumps(states)))
    return pixels, after


def same_steps(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


# Which shards -----------------------------------------------------------------------------------------------------------


def test_names_of_shards(tmp_path):
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{x,y}/{0..1}.tar") == ["x/0.tar", "x/1.tar", "y/0.tar", "y/1.tar"]
    for name in ("b.tar", "a.tar", "index.json"):
        (tmp_path / name).touch()
    a, b = str(tmp_path / "a.tar"), str(tmp_path / "b.tar")
    assert list_shards(f"{tmp_path}/*", "data.path") == [a, b]
    listed = tmp_path / "all.txt"
    listed.write_text(f"https://host/{{0..1}}.tar?key=1\n\n{tmp_path}/*.tar\n")
    assert list_shards(str(listed), "data.path") == ["https://host/0.tar?key=1", "https://host/1.tar?key=1", a, b]


def test_splits_of_a_folder(tmp_path):
    """Shards of a folder belong to splits as `datasets` finds them; evaluation images are held."""
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", range(9))
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", range(9, 20))
    write_parquet(tmp_path / "data/validation-00000-of-00002.parquet", range(100, 103))
    write_parquet(tmp_path / "data/validation-00001-of-00002.parquet", range(103, 120))
    cfg = settings(tmp_path)
    stream = open_(cfg)
    assert stream.num_images == 20 and stream.steps_per_epoch == 2
    held = load_stream_eval_images(cfg, 8)
    shown = [np.asarray(held.load(i))[0, 0, 1] for i in range(len(held))]
    assert shown == [100, 101, 102, 103, 104, 105, 106, 107]  # a short shard is made up for by the next
    assert held.name(3).endswith("validation-00001-of-00002.parquet[0]") and held.label(3) is None
    assert held.fingerprint() == load_stream_eval_images(cfg, 8).fingerprint()
    assert held.fingerprint() != load_stream_eval_images(cfg, 7).fingerprint()


def test_evaluation_images_from_elsewhere(tmp_path, images):
    write_shards(tmp_path, [10, 10], write_tar)
    cfg = settings(f"{tmp_path}/train-{{000..001}}.tar", steps_per_epoch=2)
    assert len(load_stream_eval_images(replace(cfg, eval_path=str(images)), None)) == 8
    held = load_stream_eval_images(replace(cfg, eval_path=cfg.path), 4)
    assert [held.name(i).rpartition("/")[2] for i in range(4)] == [
        "train-000.tar:000000.png", "train-000.tar:000001.png", "train-001.tar:000010.png", "train-001.tar:000011.png",
    ]  # fmt: skip
    assert len(load_stream_eval_images(replace(cfg, eval_split="train"), 5)) == 5


# Exactly once -----------------------------------------------------------------------------------------------------------

UNEVEN = [7, 1, 0, 30, 13, 2, 18]  # 71 rows, 8 steps of 8 and 7 rows over


def test_every_image_once_an_epoch(tmp_path):
    """Two processes with two workers each; what does not fill a batch is another one in each epoch."""
    ids = write_shards(tmp_path, UNEVEN, write_parquet)
    cfg = settings(tmp_path, num_workers=2)
    assert open_(cfg).steps_per_epoch == 8
    pixels, _ = steps(cfg, 24, world_size=2)
    seen = [numbers(torch.cat(pixels[epoch : epoch + 8])) for epoch in (0, 8, 16)]
    for epoch in seen:
        assert len(epoch) == 64 == len(set(epoch)) and set(epoch) <= set(ids)
        assert epoch != sorted(epoch)
    assert len({tuple(epoch) for epoch in seen}) == 3
    assert set().union(*seen) == set(ids)


@pytest.mark.parametrize("write", [write_parquet, write_tar])
@pytest.mark.parametrize("sizes", [[20], [9, 15], [5, 9, 14, 8, 6, 7, 10, 6, 5]], ids=len)
def test_a_lane_gives_all_its_own_before_any_again(tmp_path, write, sizes):
    """Of unknown length, or with epochs of a given length: whatever the number of shards beside 4 lanes."""
    ids = write_shards(tmp_path, sizes, write)
    cfg = settings(f"{tmp_path}/*", steps_per_epoch=3)
    stream = open_(cfg)
    parts = []
    for lane in range(4):
        source = streams.LaneSource(stream, 0, lane, 6, 0)
        rows = sum(
            len(range(start, min(stop or 99, sizes[shard]), step))
            for shard, start, stop, step in stream.share(0, lane, 0)
        )
        given = [source.draw()[0] for _ in range(3 * rows)]
        passes = [given[i : i + rows] for i in (0, rows, 2 * rows)]
        assert len(set(passes[0])) == rows and all(set(p) == set(passes[0]) for p in passes)
        assert rows == 1 or passes[0] != passes[1]
        parts.append(set(passes[0]))
    assert sum(map(len, parts)) == len(set().union(*parts)) == len(ids)


def test_the_buffer_shuffles(tmp_path):
    """A window of one keeps the order; larger ones mix within the window and no further."""
    ids = write_shards(tmp_path, [40], write_tar)
    cfg = settings(f"{tmp_path}/*", stream_lanes=1, steps_per_epoch=1)
    orders = {}
    for size in (1, 10, 40, 1000):
        pixels, _ = steps(replace(cfg, shuffle_buffer=size), 10, batch=4)
        orders[size] = numbers(torch.cat(pixels))
        assert sorted(orders[size]) == ids
    assert orders[1] == ids
    assert [sorted(orders[10][i : i + 10]) for i in (0, 10, 20, 30)] == [ids[i : i + 10] for i in (0, 10, 20, 30)]
    assert orders[10] != ids and orders[40] == orders[1000] != ids


def test_only_the_buffer_is_held(tmp_path):
    write_shards(tmp_path, [40, 40], write_parquet)
    source = streams.LaneSource(open_(settings(tmp_path, stream_lanes=1)), 0, 0, 10, 0)
    for _ in range(200):
        source.draw()
        assert len(source.left) + len(source.next) <= 10


# Independence ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_parquet, write_tar])
def test_steps_depend_on_nothing_but_seed_and_lanes(tmp_path, write):
    """Processes, workers and accumulation share out the same images, to the last pixel."""
    write_shards(tmp_path, UNEVEN, write)
    cfg = settings(f"{tmp_path}/*", steps_per_epoch=None if write is write_parquet else 5)
    whole, after = steps(cfg, 12)
    for world_size, workers, micro_batches in ((1, 4, 1), (2, 0, 2), (2, 2, 1), (4, 1, 2)):
        again, after_again = steps(replace(cfg, num_workers=workers), 12, 8, world_size, micro_batches)
        assert same_steps(whole, again) and after == after_again, (world_size, workers, micro_batches)
    assert not same_steps(whole, steps(cfg, 12, seed=1)[0])
    assert not same_steps(whole, steps(replace(cfg, stream_lanes=2), 12)[0])


def test_mixture(tmp_path):
    """Images come from the sources in the proportion of their weights, and each source goes its own way."""
    a = write_shards(tmp_path / "a", [30, 30], write_parquet)
    b = write_shards(tmp_path / "b", [25, 40, 12], write_tar, first=100)
    c = write_shards(tmp_path / "c", [50], write_tar, first=200)
    mixture = {f"{tmp_path}/a": 1.0, f"{tmp_path}/b/*": 2.0, f"{tmp_path}/c/train-000.tar": 5.0}
    cfg = settings("", mixture=mixture, steps_per_epoch=10, stream_lanes=2)
    pixels, _ = steps(cfg, 200)
    seen = numbers(torch.cat(pixels))
    shares = [sum(number in ids for number in seen) / len(seen) for ids in (a, b, c)]
    assert np.allclose(shares, [1 / 8, 2 / 8, 5 / 8], atol=0.04)  # 1600 draws: 3 standard deviations
    for ids in (a, b, c):
        times = Counter(number for number in seen if number in ids)
        assert set(times) == set(ids) and max(times.values()) - min(times.values()) <= 3  # lanes draw unequally often
    again = steps(replace(cfg, num_workers=1), 200, world_size=2)[0]
    assert same_steps(pixels, again)


# Stop and go on --------------------------------------------------------------------------------------------------------


def cases(tmp_path):
    write_shards(tmp_path / "parquet", UNEVEN, write_parquet, broken=(3, 40, 41))
    write_shards(tmp_path / "tar", [9, 14, 5, 8, 6], write_tar, first=100)
    whole = (tmp_path / "tar/train-001.tar").read_bytes()
    (tmp_path / "tar/train-001.tar").write_bytes(whole[: len(whole) // 2])
    few = write_shards(tmp_path / "few", [13, 15], write_tar, first=200)
    assert few
    mixture = {f"{tmp_path}/{name}/*": weight for name, weight in (("parquet", 1.0), ("tar", 2.0), ("few", 0.5))}
    return {
        "epochs": settings(tmp_path / "parquet"),
        "broken": settings(f"{tmp_path}/tar/*", steps_per_epoch=4),
        "few shards": settings(f"{tmp_path}/few/*", steps_per_epoch=4, shuffle_buffer=3),
        "no buffer": settings(f"{tmp_path}/parquet/*", steps_per_epoch=3, shuffle_buffer=1),
        "mixture": settings("", mixture=mixture, steps_per_epoch=4, shuffle_buffer=9),
        "large buffer": settings(tmp_path / "parquet", shuffle_buffer=50),
    }


def test_a_stopped_stream_goes_on_exactly(tmp_path):
    """Stopped after any step: the rest is the rest of the uninterrupted stream, and so are the states."""
    for name, cfg in cases(tmp_path).items():
        whole, after = steps(cfg, 20)
        for stop in range(1, 20):
            length = min(3, 20 - stop) if stop % 5 else 20 - stop  # some to the end
            rest, rest_after = steps(cfg, length, states=after[stop - 1])
            assert same_steps(rest, whole[stop : stop + length]), (name, stop)
            assert rest_after == after[stop : stop + length], (name, stop)
        rest, _ = steps(replace(cfg, num_workers=2), 6, world_size=2, micro_batches=2, states=after[6])
        assert same_steps(rest, whole[7:13]), name


def test_states_are_small(tmp_path):
    """They don't grow with the buffer."""
    write_shards(tmp_path, [60, 60], write_parquet)
    _, small = steps(settings(tmp_path), 3)
    _, large = steps(settings(tmp_path, shuffle_buffer=100), 3)
    assert len(json.dumps(large[-1])) < len(json.dumps(small[-1])) + 20 < 600


def train_settings(run_dir, **changed):
    return {**PLAIN, "train.output_dir": run_dir, "data.streaming": "true", "data.shuffle_buffer": "5", "eval.num_samples": 4,
            "data.stream_lanes": "4", "train.save_every_steps": "2", "train.keep_last": 9, **changed}  # fmt: skip


def final_state(run_dir):
    """Every byte of the newest checkpoint's tensors and states."""
    [folder] = sorted((run_dir / "checkpoints").glob("step-*"))[-1:]
    return folder.name, {
        str(file.relative_to(folder)): load(file) for file in sorted(folder.rglob("*")) if file.is_file()
    }


def load(file):
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    if file.suffix in (".json", ".txt"):
        return file.read_text()
    return None if "random_states" in file.name else torch.load(file, weights_only=True)


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """19 training images in three uneven parquet files, as many in tars, evaluation images beside them."""
    folder = tmp_path_factory.mktemp("shards")
    for i, ids in enumerate((range(7), range(7, 9), range(9, 19))):
        write_parquet(folder / f"p/train-{i:05}-of-00003.parquet", ids, side=40)
        write_tar(folder / f"t/{i:03}.tar", ids, side=40)
    write_parquet(folder / "p/validation-00000-of-00001.parquet", range(30, 36), side=40)
    return folder


@pytest.mark.parametrize("processes", [1, 2])
def test_train_stop_and_resume_is_exact(shards, tmp_path, processes):
    """The real command line: one uninterrupted run, and one stopped after an odd number of steps by SIGTERM or at
    max_steps and continued, with 0 and 2 workers: networks, moving average, optimizers, counters and metrics."""
    launch = LAUNCH_TWO if processes == 2 else ()
    paths = {
        1: {"data.path": shards / "p"},
        2: {"data.path": f"{shards}/t/{{000..002}}.tar", "data.eval_path": shards / "p", "data.steps_per_epoch": "3"},
    }
    base = train_settings("", **paths[processes])
    run_command("train_rae.py", *flags({**base, "train.output_dir": tmp_path / "whole"}), launch=launch)
    stopped = {**base, "train.output_dir": tmp_path / "stopped", "data.num_workers": "2"}
    if processes == 1:
        process = subprocess.Popen(
            command("train_rae.py", *flags(stopped)), cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        deadline = time.time() + 120
        metrics = tmp_path / "stopped/metrics.jsonl"
        while not metrics.exists() or len(read_metrics(tmp_path / "stopped")) < 2:
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
        assert process.returncode == 0
    else:
        run_command("train_rae.py", *flags({**stopped, "train.max_steps": "3"}), launch=launch)
    run_command("train_rae.py", *flags({**stopped, "data.num_workers": str(2 - processes)}), launch=launch)
    assert read_metrics(tmp_path / "stopped")[-1] == read_metrics(tmp_path / "whole")[-1]
    lines = [
        [line for line in read_metrics(tmp_path / name) if line["kind"] == "train"] for name in ("whole", "stopped")
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 6
    assert equal(final_state(tmp_path / "stopped"), final_state(tmp_path / "whole"))
