"""streams.py: shards into lanes, lanes into steps, exactly once and exactly again after a stop. Tiny images, real
files, real workers, and a web server on loopback."""

import io
import itertools
import json
import os
import shutil
import socket
import tarfile
import threading
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import run_command
from PIL import Image

from rae_suite import lanes, shard_reading, shards
from rae_suite.cli import config_yaml
from rae_suite.errors import DataError
from rae_suite.lanes import StreamLoader
from rae_suite.randomness import step_generator
from rae_suite.settings import DataConfig
from rae_suite.settings_rae import parse_config
from rae_suite.shards import expand_braces, list_shards
from rae_suite.streams import load_stream_eval_images, open_stream

SIZE = 8


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


def write_parquet(path, ids, row_group_size=4, side=10, broken=(), labels=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = [{"bytes": b"no image" if i in broken else png(i, side), "path": None} for i in ids]
    table = pa.table(
        {
            "image": rows or pa.array([], features.arrow_schema.field("image").type),
            "label": [i % labels if labels else i for i in ids],
        }
    )
    pq.write_table(table.cast(features.arrow_schema), path, row_group_size=row_group_size)


def write_tar(path, ids, side=10):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for i in ids:
            for name, content in (
                (f"{i:06}.png", png(i, side)),
                (f"{i:06}.txt", b"a caption"),
                (f"{i:06}.cls", b"%d" % i),
            ):
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


def open_(cfg, batch=8, world_size=1, seed=0, began=None):
    return open_stream(cfg, batch, seed, SimpleNamespace(is_main_process=True, num_processes=world_size), began)


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


# Which shards ---------------------------------------------------------------------------------------------------------


def test_names_of_shards(tmp_path):
    assert list(expand_braces("a-{08..11}.tar")) == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert list(expand_braces("{x,y}/{0..1}.tar")) == ["x/0.tar", "x/1.tar", "y/0.tar", "y/1.tar"]
    for name in ("b.tar", "a.tar", "index.json"):
        (tmp_path / name).touch()
    a, b = str(tmp_path / "a.tar"), str(tmp_path / "b.tar")
    assert list_shards(f"{tmp_path}/*", "data.path") == [a, b]
    listed = tmp_path / "all.txt"
    listed.write_text(f"https://host/{{0..1}}.tar?key=1\n\n{tmp_path}/*.tar\n")
    assert list_shards(str(listed), "data.path") == ["https://host/0.tar?key=1", "https://host/1.tar?key=1", a, b]


def test_shards_of_a_hub_data_set(tmp_path, monkeypatch):
    """`datasets` says which files a data set has; a commit in their names does not make it another one."""
    write_shards(tmp_path / "a@0123456789012345678901234567890123456789", [10, 10], write_parquet)
    shutil.copytree(tmp_path / "a@0123456789012345678901234567890123456789", tmp_path / "a@" / ("8" * 40))
    fingerprints, asked = [], []
    for folder in sorted(tmp_path.glob("a@*")):
        files = {datasets.Split.TRAIN: [str(path) for path in sorted(folder.rglob("*.parquet"))]}
        builder = SimpleNamespace(config=SimpleNamespace(data_files=files))
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, b=builder, **k: asked.append((a, k)) or b)
        stream = open_(settings("user/name", config_name="small"))
        arguments, options = asked.pop()
        assert arguments == ("user/name",) and options["name"] == "small" and stream.num_images == 20
        fingerprints.append(stream.fingerprint())
    assert fingerprints[0] == fingerprints[1]


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
    assert held.name(3).endswith("validation-00001-of-00002.parquet[0]") and held.label(3) == 103
    assert held.fingerprint() == load_stream_eval_images(cfg, 8).fingerprint()
    assert held.fingerprint() != load_stream_eval_images(cfg, 7).fingerprint()


def test_evaluation_images_from_elsewhere(tmp_path, images):
    write_shards(tmp_path, [10, 10], write_tar)
    cfg = settings(f"{tmp_path}/train-{{000..001}}.tar", steps_per_epoch=2)
    assert len(load_stream_eval_images(replace(cfg, eval_path=str(images), image_column="png"), None)) == 8
    # a folder without splits is meant as a whole, also where a preset names a split
    assert len(load_stream_eval_images(replace(cfg, eval_path=f"{images}/validation", eval_split="val"), None)) == 8
    column = [{"bytes": png(5), "path": None}] * 3
    saved = datasets.Dataset.from_dict({"a": column, "b": column}).cast_column("a", datasets.Image())
    saved.cast_column("b", datasets.Image()).save_to_disk(tmp_path / "saved")
    elsewhere = replace(cfg, eval_path=f"{tmp_path}/saved", image_column="b")
    assert len(load_stream_eval_images(elsewhere, None)) == 3
    held = load_stream_eval_images(replace(cfg, eval_path=cfg.path, config_name="of the training images"), 4)
    assert [held.name(i).rpartition("/")[2] for i in range(4)] == [
        "train-000.tar:000000.png", "train-000.tar:000001.png", "train-001.tar:000010.png", "train-001.tar:000011.png",
    ]  # fmt: skip
    assert len(load_stream_eval_images(replace(cfg, eval_split="train"), 5)) == 5


def test_shards_that_no_split_takes(tmp_path):
    """`datasets` takes the shards with a split's name alone, once one has it: the others are named, a glob takes all,
    and so does a folder whose README.md says so."""
    for write, ending, odd in ((write_parquet, "parquet", "train-00000"), (write_tar, "tar", "steam-train-0")):
        folder = tmp_path / ending
        for i, name in enumerate((odd, "extra-00000", "more/extra-00001")):
            write(folder / f"{name}.{ending}", range(16 * i, 16 * i + 16))
        write(folder / f"@eaDir/extra.{ending}", range(4))
        cfg = settings(folder, steps_per_epoch=6, shuffle_buffer=48)
        names = f"extra-00000.{ending}, more/extra-00001.{ending};"
        with pytest.raises(DataError, match=f"data.path: 2 of 3 shards in {folder} are of no split.*: {names}"):
            open_(cfg)
        glob = replace(cfg, path=f"{folder}/**/*.{ending}", stream_lanes=1)
        assert sorted(numbers(torch.cat(steps(glob, 6)[0]))) == list(range(48))
    (tmp_path / "parquet/README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: extra-*.parquet\n---\n"
    )
    assert open_(settings(tmp_path / "parquet")).num_images == 16


def test_sources_joined_as_in_open_clip(tmp_path):
    """fsspec would read the first of them once for each of the second; its own chains are not meant."""
    write_shards(tmp_path, [10, 10], write_tar)
    first, second = f"{tmp_path}/train-{{000..001}}.tar", f"{tmp_path}/train-001.tar"
    (tmp_path / "list.txt").write_text(f"{second}::{second}\n")
    for path in (f"{first}::{second}", f"https://host/a.tar::{second}", f"{tmp_path}/list.txt::{second}",
                 f"{tmp_path}/list.txt"):  # fmt: skip
        with pytest.raises(DataError, match="data.path: .* joins several sources with '::'; expected a .txt file that"):
            open_(settings(path, steps_per_epoch=1))
    assert list_shards(f"simplecache::file://{second}", "data.path") == [f"simplecache::file://{second}"]


# Names in tars --------------------------------------------------------------------------------------------------------


def write_names(path, names):
    """A tar of these files, the images numbered in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with tarfile.open(path, "w") as archive:
        for name in names:
            is_image = name.endswith((".png", ".jpg"))
            content = png(count) if is_image else name.rpartition("/")[2].encode()
            count += is_image
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def names_read(path, **changed):
    """Names of the images that a stream reads, in the order of the tar."""
    cfg = settings(path, steps_per_epoch=1, stream_lanes=1, **changed)
    held = load_stream_eval_images(replace(cfg, eval_split="train"), 100)
    return [held.name(i).rpartition(":")[2] for i in range(len(held))]


NAMES = {
    "dots and numbers": ([f"photo 0.{i}.png" for i in range(8)], None),
    "versions": (["v1.5_cat 1.png", "v1.5_cat 2.png", "v1.6_dog 1.png"], None),
    "initials": (["J.K. Rowling.png", "J.R. Tolkien.png", "A.A. Milne.png"], None),
    "a field in several": (["1.jpg", "1.mask.png", "2.jpg", "2.mask.png"], ["1.jpg", "2.jpg"]),
    "a word in several": (["cat.final.png", "dog.final.png"], None),
    "labels": ([f"photo 0.{i}.{ending}" for i in range(3) for ending in ("png", "cls")],
               [f"photo 0.{i}.png" for i in range(3)]),
    "folders": (["a/photo 0.1.png", "b/photo 0.1.png", "./c/photo 0.2.png"], None),
    "system files": (["a/1.png", "._a/1.png", "a/._1.png", "__MACOSX/a/1.png", "a/@eaDir/1.png/THUMB.jpg", "./.x.png",
                      "./a/2.png", "a/Thumbs.db"], ["a/1.png", "./a/2.png"]),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_dots_in_names(tmp_path, name):
    """Every image is read, whatever dots its name has; only what is a field of several samples belongs to one."""
    names, expected = NAMES[name]
    write_names(tmp_path / "a.tar", names)
    column = "jpg" if "field" in name else None
    assert names_read(tmp_path / "a.tar", image_column=column) == (names if expected is None else expected)


def test_several_images_of_one_sample(tmp_path):
    """An error, also in a tar of one sample; its advice leaves nothing out that it does not name."""
    for names in (["1.jpg", "1.mask.png", "2.jpg", "2.mask.png"], ["a.jpg", "a.mask.png"], ["a.jpg", "a.png"]):
        write_names(tmp_path / "a.tar", names)
        with pytest.raises(DataError, match="data.image_column: sample . of .* several images.* leaves out the others"):
            open_(settings(tmp_path / "a.tar", steps_per_epoch=1))
    write_names(tmp_path / "a.tar", ["1.jpg", "1.mask.png", "2.jpg", "2.mask.png"])
    assert names_read(tmp_path / "a.tar", image_column="mask.png") == ["1.mask.png", "2.mask.png"]
    write_names(tmp_path / "views.tar", [f"{i}.{view}.png" for i in range(3) for view in range(2)])
    assert names_read(tmp_path / "views.tar", image_column="1.png") == ["0.1.png", "1.1.png", "2.1.png"]
    write_names(tmp_path / "dots.tar", [f"photo 0.{i}.png" for i in range(8)])
    with pytest.raises(DataError, match="none of the first 1 shards gives an image"):  # not one of eight
        open_(settings(tmp_path / "dots.tar", steps_per_epoch=1, image_column="1.png"))


def test_fields_are_those_of_the_beginning(tmp_path):
    """All lanes, and a run that continues without the shard that they were found in, read the same names."""
    write_names(tmp_path / "0.tar", [f"{i}.{end}" for i in range(8) for end in ("jpg", "mask.png")])
    write_names(tmp_path / "1.tar", [f"{i}.mask.png" for i in range(1)] + [f"{i}.jpg" for i in range(1, 9)])
    cfg = settings(f"{tmp_path}/*.tar", steps_per_epoch=2, image_column="jpg", max_unreadable_shards=1)
    stream = open_(cfg)
    record = json.loads(json.dumps(stream.record()))
    assert record[0]["fields"] == ["mask"]
    _, states = steps(cfg, 4)
    (tmp_path / "0.tar").unlink()
    again = open_(cfg, began=record)
    assert again.sources[0].columns == stream.sources[0].columns and again.fingerprint() == stream.fingerprint()
    assert open_(cfg).sources[0].columns[2] == []  # without the record, the second shard would decide
    loader = StreamLoader(again, cfg, SIZE, 0, 1, 1, states[-1])
    assert set(numbers(next(iter(loader))["pixels"])) <= set(range(1, 9))  # no mask, which is number 0


def test_images_that_pillow_cannot_read_in_a_tar(tmp_path, monkeypatch):
    monkeypatch.setattr(
        shard_reading, "check_codecs", lambda files: (_ for _ in ()).throw(DataError(f"no codec {files}"))
    )
    write_names(tmp_path / "a.tar", ["1.png"])
    with pytest.raises(DataError, match=r"no codec \['1.png'\]"):
        open_(settings(tmp_path / "a.tar", steps_per_epoch=1))


# Exactly once ---------------------------------------------------------------------------------------------------------

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
        source = lanes.LaneSource(stream, 0, lane, 6, 0)
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
    source = lanes.LaneSource(open_(settings(tmp_path, stream_lanes=1)), 0, 0, 10, 0)
    for _ in range(200):
        source.draw()
        assert len(source.left) + len(source.next) <= 10


# Independence ---------------------------------------------------------------------------------------------------------


def test_noise_goes_with_its_images(tmp_path):
    """Four micro-batches have the same images and the same noise on one, two and four processes."""
    write_shards(tmp_path, [10, 10], write_parquet)
    cfg, found = settings(tmp_path), []
    for processes, micro_batches in ((1, 4), (2, 2), (4, 1)):
        stream, pairs = open_(cfg, world_size=processes), set()
        train = SimpleNamespace(seed=0, gradient_accumulation_steps=micro_batches)
        for rank in range(processes):
            accelerator = SimpleNamespace(num_processes=processes, process_index=rank, device="cpu")
            batches = iter(StreamLoader(stream, cfg, SIZE, rank, processes, micro_batches))
            for i in range(micro_batches):
                seen = tuple(numbers(next(batches)["pixels"]))
                pairs.add((seen, step_generator(accelerator, train, True, 0, i).initial_seed()))
        found.append(pairs)
    assert len(found[0]) == 4 and found[0] == found[1] == found[2]


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


# Stop and go on -------------------------------------------------------------------------------------------------------


def cases(tmp_path):
    write_shards(tmp_path / "parquet", UNEVEN, write_parquet, broken=(3, 40, 41))
    write_shards(tmp_path / "tar", [9, 14, 5, 8, 6], write_tar, first=100)
    whole = (tmp_path / "tar/train-001.tar").read_bytes()
    (tmp_path / "tar/train-001.tar").write_bytes(whole[: len(whole) // 2])
    write_shards(tmp_path / "few", [13, 15], write_tar, first=200)
    write_shards(tmp_path / "gone", [9, 9, 9, 9], write_tar)
    (tmp_path / "gone/train-002.tar").write_bytes(b"no tar" * 500)
    write_shards(tmp_path / "damaged", [16, 16, 16, 16], write_parquet)
    damage(tmp_path / "damaged/train-002.parquet", length=400)
    mixture = {f"{tmp_path}/{name}/*": weight for name, weight in (("parquet", 1.0), ("tar", 2.0), ("few", 0.5))}
    return {
        "epochs": settings(tmp_path / "parquet"),
        "broken": settings(f"{tmp_path}/tar/*", steps_per_epoch=4),
        "a lane without any": settings(f"{tmp_path}/gone/*", steps_per_epoch=4),
        "epochs of damaged files": settings(tmp_path / "damaged"),
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


# What cannot be read --------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Files of a folder on loopback, in ranges. `failures[path]`: statuses of its next answers to GET, "cut" for half a
    file; "down" is 503, also to HEAD."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.failures = folder, {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.split("?")[0]
        file = self.server.folder / path.lstrip("/")
        content = file.read_bytes() if file.is_file() else b""
        failures = self.server.failures.get(path, [])
        status = 200 if file.is_file() else 404
        if failures and (self.command == "GET" or failures[0] == "down"):
            status = failures.pop(0)
            status = 503 if status == "down" else status
        if status not in (200, "cut"):
            self.send_error(status)
            return
        first, last = 0, len(content) - 1
        if "Range" in self.headers:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            last = min(last, len(content) - 1)
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last + 1 - first))
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            part = content[first : last + 1]
            self.wfile.write(part[: len(part) // 2] if status == "cut" else part)

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture
def pauses(monkeypatch):
    """Seconds of the pauses that were asked for and not made."""
    asked = []
    monkeypatch.setattr(shard_reading.time, "sleep", asked.append)
    return asked


@pytest.mark.parametrize("write", [write_parquet, write_tar])
def test_shards_of_a_web_server(tmp_path, write):
    """The same as from disk, with workers, from a range of URLs with a query and from a list."""
    write_shards(tmp_path, [12, 5, 20, 9], write)
    suffix = "parquet" if write is write_parquet else "tar"
    local = settings(f"{tmp_path}/*.{suffix}", steps_per_epoch=4)
    whole, _ = steps(local, 8)
    with Server(tmp_path) as server:
        (tmp_path / "list.txt").write_text("".join(f"{server.url}/train-00{i}.{suffix}\n" for i in range(4)))
        url = f"{server.url}/train-{{000..003}}.{suffix}?signature=1"
        assert same_steps(whole, steps(replace(local, path=url, num_workers=2), 8, world_size=2)[0])
        assert same_steps(whole, steps(replace(local, path=f"{server.url}/list.txt"), 8)[0])
        assert same_steps(whole, steps(replace(local, path=f"{server.url}/list.txt?signature=1"), 8)[0])
        if write is write_parquet:
            assert open_(replace(local, path=url, steps_per_epoch=None)).num_images == 46


LINES = (
    "{folder}/a.tar", "a.tar", "~/a.tar", "file://{folder}/a.tar", "local://{folder}/a.tar", "{folder}/*.tar",
    "simplecache::{url}/a.tar", "simplecache::file://{folder}/a.tar", "zip://a.tar::{url}/x.zip", "s3://bucket/a.tar",
    "{url}/a{{::,.tar::}}file://{folder}/a.tar", "{url}/b{{:}}:file://{folder}/a.tar", "{{file,http}}://{folder}/a.tar",
    "{folder}/list.txt", "file://{folder}/list.txt",
)  # fmt: skip


def test_a_list_from_a_server_names_its_own_kind_of_address_only(tmp_path):
    """No local file, no chain of protocols, no other kind, in whatever way it is written; a local list names what it
    wants, and so does a list that it names only what is its own."""
    (tmp_path / "list.txt").write_text(f"{tmp_path}/a.tar\n")
    (tmp_path / "a.tar").touch()
    with Server(tmp_path) as server:
        url, lists = server.url, tmp_path / "server.txt"
        assert list_shards(str(tmp_path / "list.txt"), "data.path") == [f"{tmp_path}/a.tar"]
        for line in LINES:
            line = line.format(folder=tmp_path, url=url)
            lists.write_text(f"{url}/0.tar\n{line}\n")
            for path in (f"{url}/server.txt", f"{url}/server.txt?signature=1", f"simplecache::{url}/server.txt"):
                words = "data.path: list .*server.txt names .*; expected addresses that begin with https:// or http://"
                with pytest.raises(DataError, match=words):
                    list_shards(path, "data.path")
        (tmp_path / "mine.txt").write_text(f"{url}/server.txt\nfile://{tmp_path}/x.tar\nsimplecache::{url}/y.tar\n")
        with pytest.raises(DataError, match="list http.*server.txt names"):
            list_shards(str(tmp_path / "mine.txt"), "data.path")
        lists.write_text(f"{url}/{{0..1}}.tar\nhttps://elsewhere/2.tar\n{url}/inner.txt\n")
        (tmp_path / "inner.txt").write_text(f"{url}/3.tar\n")
        names = [f"{url}/0.tar", f"{url}/1.tar", "https://elsewhere/2.tar", f"{url}/3.tar"]
        assert list_shards(f"{url}/server.txt", "data.path") == names
        names += [f"file://{tmp_path}/x.tar", f"simplecache::{url}/y.tar"]
        assert list_shards(str(tmp_path / "mine.txt"), "data.path") == names
    fsspec.filesystem("memory").pipe_file("/list.txt", b"memory://0.tar\nfile:///etc/1.tar\n")
    with pytest.raises(DataError, match="names file:///etc/1.tar; expected addresses that begin with memory://"):
        list_shards("memory://list.txt", "data.path")


@pytest.mark.parametrize("write", [write_parquet, write_tar])
@pytest.mark.parametrize("failure", [503, "cut", "down"])
def test_a_server_that_fails_twice(tmp_path, pauses, write, failure):
    """Tried again after pauses, at the place where it broke: nothing is lost and nothing comes twice."""
    write_shards(tmp_path, [40, 25], write)
    suffix = "parquet" if write is write_parquet else "tar"
    local = settings(f"{tmp_path}/*.{suffix}", steps_per_epoch=4, shard_retries=2)
    whole, _ = steps(local, 20)
    with Server(tmp_path) as server:
        cfg = replace(local, path=f"{server.url}/train-{{000..001}}.{suffix}")
        stream = open_(cfg)
        loader = iter(StreamLoader(stream, cfg, SIZE, 0, 1, 1))
        again = [next(loader)["pixels"] for _ in range(3)]
        server.failures[f"/train-000.{suffix}"] = [failure] * 2
        server.failures[f"/train-001.{suffix}"] = [failure] * 2
        again += [next(loader)["pixels"] for _ in range(17)]
        assert same_steps(whole, again) and set(pauses) <= {1, 4}
        assert not any(server.failures.values()) and pauses


def test_a_missing_shard_is_skipped(tmp_path, caplog):
    """Of a server and on disk: said once, though several lanes look for it."""
    ids = write_shards(tmp_path, [10, 10], write_tar)
    with Server(tmp_path) as server:
        for place in (server.url, tmp_path):
            caplog.clear()
            cfg = settings(f"{place}/train-{{000..002}}.tar", steps_per_epoch=4, max_unreadable_shards=1)
            pixels, after = steps(cfg, 20)
            assert set(numbers(torch.cat(pixels))) == set(ids)
            assert (
                caplog.text.count("unreadable shard 1 (at most 1)") == 1
                and "train-002.tar: FileNotFound" in caplog.text
            )
            with pytest.raises(DataError, match="data.max_unreadable_shards: 1 shards cannot be read.*train-002.tar"):
                steps(replace(cfg, max_unreadable_shards=0), 20)


def damage(path, start=0.5, length=200):
    content = bytearray(path.read_bytes())
    first = int(len(content) * start)
    content[first : first + length] = b"\xa5" * length
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["cut", "damaged header", "no tar", "empty", "two images"])
def test_a_damaged_tar_is_read_up_to_the_damage(tmp_path, caplog, pauses, how):
    """Then tried again, skipped and said; all other images go on to come."""
    ids = write_shards(tmp_path, [10, 10, 10, 10], write_tar)
    tar = tmp_path / "train-001.tar"
    whole = tar.read_bytes()
    headers = [m.offset for m in tarfile.open(tar).getmembers()]
    if how == "cut":
        tar.write_bytes(whole[: headers[12] + 700])
    elif how == "damaged header":
        tar.write_bytes(whole[: headers[12]] + b"\xa5" * 512 + whole[headers[12] + 512 :])
    elif how == "two images":  # of sample 14
        tar.write_bytes(whole[: headers[13]] + whole[headers[12] : headers[13]] + whole[headers[13] :])
    else:
        tar.write_bytes(b"" if how == "empty" else b"\xa5" * 5000)
    first = 4 if how in ("cut", "damaged header", "two images") else 0
    lost = set(range(10 + first, 20))
    cfg = settings(f"{tmp_path}/*.tar", steps_per_epoch=4, shard_retries=2, shuffle_buffer=3, stream_lanes=2)
    pixels, after = steps(cfg, 16)
    assert set(numbers(torch.cat(pixels))) == set(ids) - lost
    assert caplog.text.count("unreadable shard") == 1
    assert f"skipped from image {first} on" in caplog.text
    assert pauses == ([] if how == "two images" else [1, 4])  # the lane that has it, once: later passes know
    again, after_again = steps(cfg, 6, states=after[9])
    assert same_steps(again, pixels[10:]) and after_again == after[10:]


def test_damaged_parquet_files(tmp_path, caplog, pauses):
    """One without a footer counts as empty; one with damaged pages is read up to them."""
    ids = write_shards(tmp_path, [16, 16, 16, 16], write_parquet)
    (tmp_path / "train-000.parquet").write_bytes(b"no parquet file")
    damage(tmp_path / "train-002.parquet", length=400)
    cfg = settings(tmp_path, shard_retries=1, max_unreadable_shards=2)
    stream = open_(cfg)
    assert stream.num_images == 48 and stream.steps_per_epoch == 6 and pauses == [1]
    pixels, _ = steps(cfg, 30)
    seen = set(numbers(torch.cat(pixels)))
    assert set(ids[16:32] + ids[48:]) <= seen and not seen & set(ids[:16]) and 4 <= len(seen & set(ids[32:48])) < 16
    assert "train-000.parquet: ArrowInvalid" in caplog.text and "train-002.parquet: OSError" in caplog.text
    with pytest.raises(DataError, match="data.max_unreadable_shards: 2 shards cannot be read, expected at most 1"):
        steps(replace(cfg, max_unreadable_shards=1), 30)
    with pytest.raises(DataError, match="data.max_unreadable_shards: 1 shards cannot be read.*train-000.parquet"):
        open_(replace(cfg, max_unreadable_shards=0))


@pytest.mark.parametrize("write", [write_parquet, write_tar])
def test_shards_that_are_gone_keep_their_places(tmp_path, write, caplog):
    """A run goes on when a shard that it began with is gone, whether a folder is listed or all have names; also when
    all have moved; not with a shard more. One that could not be read at the beginning stays out."""
    suffix = "parquet" if write is write_parquet else "tar"
    ids = write_shards(tmp_path / "a", [10, 10, 10, 10], write)
    cfg = settings(f"{tmp_path}/a/*.{suffix}", steps_per_epoch=5, max_unreadable_shards=1)
    stream = open_(cfg)
    record = json.loads(json.dumps(stream.record()))
    _, states = steps(cfg, 3)
    (tmp_path / f"a/train-001.{suffix}").unlink()
    (tmp_path / "a").rename(tmp_path / "b")
    assert open_(replace(cfg, path=f"{tmp_path}/b/*.{suffix}")).fingerprint() != stream.fingerprint()
    for path in (f"{tmp_path}/b/*.{suffix}", f"{tmp_path}/b/train-{{000..003}}.{suffix}"):
        cfg = replace(cfg, path=path)
        again = open_(cfg, began=record)
        assert again.fingerprint() == stream.fingerprint() and again.num_images == stream.num_images
        loader = StreamLoader(again, cfg, SIZE, 0, 1, 1, states[-1])
        seen = numbers(torch.cat([batch["pixels"] for batch in itertools.islice(loader, 20)]))
        assert set(ids[:10] + ids[20:]) <= set(seen)
        assert len(loader.unreadable.names) == 1 and f"train-001.{suffix}: FileNotFoundError" in caplog.text
    write(tmp_path / f"b/train-004.{suffix}", range(40, 50))
    assert open_(replace(cfg, path=f"{tmp_path}/b/*"), began=record).fingerprint() != stream.fingerprint()
    if write is write_parquet:
        began = json.loads(json.dumps(open_(cfg).record()))
        assert began[0]["lengths"] == [10, 0, 10, 10]
        write(tmp_path / "b/train-001.parquet", ids[10:20])
        again = open_(cfg, began=began)
        assert again.record() == began and "train-001.parquet: could not be read when the run began" in caplog.text
        assert open_(cfg).num_images == 40


def test_a_server_that_says_nothing(tmp_path, monkeypatch):
    """Not waited for beyond the limit, for a shard, its footer and a list."""
    monkeypatch.setattr(shards, "SERVER_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        for name, words in (("a.tar", "none of the first 1 shards gives an image"), ("a.parquet", "no rows"),
                            ("a.txt", "cannot be read")):  # fmt: skip
            with pytest.raises(DataError, match=f"data.path: .*{words}.*[Tt]imeout"):
                open_(settings(f"{url}/{name}", steps_per_epoch=1))


def test_nothing_left_to_read_is_an_error(tmp_path):
    """Not an endless search. As long as there are images, a lane whose own shards are gone reads those of others."""
    ids = write_shards(tmp_path, [10, 10, 10, 10], write_tar)
    cfg = settings(f"{tmp_path}/*.tar", steps_per_epoch=4, shuffle_buffer=2)
    stream = open_(cfg)
    for i in (0, 2, 3):
        (tmp_path / f"train-00{i}.tar").unlink()
    loader = iter(StreamLoader(stream, cfg, SIZE, 0, 1, 1))
    assert set(numbers(torch.cat([next(loader)["pixels"] for _ in range(10)]))) == set(ids[10:20])
    (tmp_path / "train-001.tar").unlink()
    with pytest.raises(DataError, match=r"data.path: none of 4 shards gives an image.*train-00\d.tar: FileNotFound"):
        next(iter(StreamLoader(stream, cfg, SIZE, 0, 1, 1)))
    write_shards(tmp_path, [10, 10, 10, 10], write_tar)
    other = replace(stream, sources=[replace(stream.sources[0], columns=("jpg", None, []))])
    with pytest.raises(DataError, match=r"data.path: none of 4 shards gives an image, the first is .*train-000.tar$"):
        next(iter(StreamLoader(other, cfg, SIZE, 0, 1, 1)))


@pytest.mark.parametrize("write", [write_parquet, write_tar])
def test_labels_go_with_their_images(tmp_path, write):
    """Each image is labelled with its own number here; -1 where a shard has no labels, an error where what was asked
    for is none."""
    write_shards(tmp_path, [10, 10], write)
    cfg = settings(f"{tmp_path}/*", steps_per_epoch=2)
    for batch in itertools.islice(StreamLoader(open_(cfg), cfg, SIZE, 0, 1, 2), 8):
        assert batch["label"].dtype == torch.int64 and batch["label"].tolist() == numbers(batch["pixels"])
    if write is write_tar:
        other = replace(cfg, label_column="json")
        assert set(next(iter(StreamLoader(open_(other), other, SIZE, 0, 1, 1)))["label"].tolist()) == {-1}
        with pytest.raises(DataError, match="data.label_column: .*txt holds b'a caption', expected a number"):
            open_(replace(cfg, label_column="txt"))


def test_unreadable_images_are_replaced_and_bounded(tmp_path):
    """By the next of the lane; an epoch still has its size."""
    ids = write_shards(tmp_path, [20, 20], write_parquet, broken=(3, 21))
    cfg = settings(tmp_path, stream_lanes=2)
    stream = open_(cfg, batch=9 * 2)
    batches = list(itertools.islice(StreamLoader(stream, cfg, SIZE, 0, 1, 3), 6))
    assert [name for batch in batches for name in batch["unreadable"]] and len(batches[0]["pixels"]) == 6
    for step in (batches[:3], batches[3:]):
        seen = numbers(torch.cat([batch["pixels"] for batch in step]))
        assert len(set(seen)) == 18 and not {3, 21} & set(seen) and set(seen) <= set(ids)
    (tmp_path / "train-001.parquet").unlink()
    write_parquet(tmp_path / "train-000.parquet", ids[:20], broken=ids)
    with pytest.raises(DataError, match="data.max_unreadable: 3 images in a row cannot be read, expected at most 2"):
        steps(replace(cfg, max_unreadable=2), 1)


# Settings -------------------------------------------------------------------------------------------------------------


def test_bad_settings_are_one_line(tmp_path):
    write_shards(tmp_path / "p", [10, 10], write_parquet)
    write_shards(tmp_path / "t", [10, 10], write_tar)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "images/1.png")
    datasets.Dataset.from_dict({"image": [1]}).save_to_disk(tmp_path / "saved")
    (tmp_path / "list.txt").write_text("a.zip\n")
    (tmp_path / "loop.txt").write_text(f"{tmp_path}/other.txt\n")
    (tmp_path / "other.txt").write_text(f"{tmp_path}/loop.txt\n")
    os.mkfifo(tmp_path / "pipe.tar")
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        for name in ("a.jpg", "a.mask.png"):
            archive.addfile(tarfile.TarInfo(name))
    good, tar = settings(tmp_path / "p"), {"path": f"{tmp_path}/t/*.tar", "steps_per_epoch": 2}
    two = {f"{tmp_path}/t/*.tar": 1.0, f"{tmp_path}/p": 1.0}
    for changed, words in (
        ({"path": f"{tmp_path}/nothing"}, "data.path: .*/nothing is no folder, glob or URL"),
        ({"path": "user/name"}, "data.path: user/name is .* nor a Hub data set that can be reached"),
        ({"path": f"{tmp_path}/nothing*.tar"}, "data.path: .* names no shards"),
        ({"path": f"{tmp_path}/x.tar", "steps_per_epoch": 1}, "none of the first 1 shards gives an image.*x.tar: File"),
        ({"path": f"{tmp_path}/images"}, "data.path: .*images is made of files like 1.png; expected .parquet or tar"),
        ({"path": f"{tmp_path}/saved"}, "data.path: .* is a saved data set"),
        ({"path": f"{tmp_path}/list.txt"}, "data.path: a.zip is no shard"),
        ({"path": f"{tmp_path}/none.txt"}, "data.path: list .*none.txt cannot be read"),
        ({"path": f"{tmp_path}/loop.txt"}, "data.path: list .*loop.txt names itself"),
        ({"path": f"{tmp_path}/{{0..99999999999}}.tar"}, "data.path: .* names more than 1000000 shards"),
        ({"path": f"{tmp_path}/pipe.tar", "steps_per_epoch": 1}, "data.path: none of .*pipe.tar: OSError: no regular"),
        ({"path": f"{tmp_path}/{{t,t}}/*.tar"}, "data.path: .* names .*train-000.tar twice"),
        ({"path": f"{tmp_path}/*/train-000.*"}, "data.path: expected either parquet files or tar shards"),
        ({"path": f"{tmp_path}/twice.tar", "steps_per_epoch": 1}, "data.image_column: sample a of .*twice.tar"),
        ({**tar, "steps_per_epoch": None}, "data.steps_per_epoch: needed, because the number of images in"),
        ({**tar, "image_column": "webp"}, "data.path: none of the first 2 shards gives an image; .* no images in it"),
        ({**tar, "config_name": "a"}, "data.config_name: 'a' is for Hub data sets"),
        ({"train_split": "other"}, "data.path: there is no split 'other' in .*, it has train; .*data.eval_path"),
        ({"image_column": "label"}, "data.image_column: column 'label'"),
        ({"holdout_fraction": 0.1}, "data.holdout_fraction: 0.1, but a stream holds no images out"),
        ({"stream_lanes": 3}, "data.stream_lanes: 3 .* is no divisor of the global batch of 8"),
        ({"stream_lanes": 1}, "data.stream_lanes: 1 is not a multiple of 2 processes"),
        ({"num_workers": 3}, "data.num_workers: 3 workers do not share 2 lanes of a process evenly"),
        ({"mixture": {**two, f"{tmp_path}/x.tar": 1.0}}, "data.mixture: none of the first 1 shards gives an image"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=words) as raised:
            open_(replace(good, **changed), world_size=2)
        assert "\n" not in str(raised.value)
    done = run_command(
        "train_rae.py", "--data.streaming", "--data.path", tmp_path / "saved", "--train.output_dir", tmp_path / "run",
        check=False,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: data.path: ") and done.stderr.count("\n") == 1
    with pytest.raises(DataError, match="train.global_batch_size: 24, but there are 20 training images"):
        open_(good, batch=24)
    (tmp_path / "text").mkdir()
    for changed, num_samples, words in (
        ({}, None, "eval.num_samples: needed, because evaluation images of .* are held in memory"),
        ({}, 4, "data.eval_split: there is no split 'validation'"),
        (tar, 4, "data.eval_path: needed, because .* has no split level"),
        ({"eval_path": f"{tmp_path}/nothing"}, 4, "data.eval_path: .*nothing is no folder"),
        ({"eval_path": f"{tmp_path}/nothing.tar"}, 4, "data.eval_path: none of .*nothing.tar: FileNotFoundError"),
        ({"eval_path": f"{tmp_path}/text"}, 4, "data.eval_path: .*text holds no image files"),
        ({"eval_path": f"{tmp_path}/saved"}, 4, "data.image_column: column|data.image_column: no image column"),
    ):
        with pytest.raises(DataError, match=words):
            load_stream_eval_images(replace(good, **changed), num_samples)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.eval_path", "x"], "data.eval_path: expected nothing unless data.streaming is true, got 'x'"),
        (["--data.shuffle_buffer", "5"], "data.shuffle_buffer: expected nothing unless data.streaming is true, got 5"),
        (["--data.mixture", '{"a": 1, "b": 2}'], "data.mixture: expected nothing unless data.streaming is true"),
        (["--data.streaming", "--data.mixture", '{"a": 1}'], "data.mixture: expected several sources"),
        (["--data.streaming", "--data.mixture", '{"a": 1, "b": 0}'], "data.mixture: expected a positive weight for b"),
        (["--data.streaming", "--data.mixture", '{"a": 1, "b/c.tar": 2}'], "data.steps_per_epoch: expected a value"),
        (["--data.streaming", "--data.shard_retries", "-1"], "data.shard_retries: expected a number of at least 0"),
        (["--data.streaming", "--data.stream_lanes", "0"], "data.stream_lanes: expected a positive number"),
    ],
)
def test_bad_flags_are_one_line(capsys, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        parse_config(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_mixture_survives_the_run_folder(tmp_path):
    """Names with dots, braces and colons, from a flag and back from the resolved config."""
    mixture = {"https://host/a-{000..127}.tar": 0.5, "user/name": 2.0}
    arguments = ["--data.streaming", "--data.mixture", json.dumps(mixture), "--data.eval_path", "x"]
    config = parse_config([*arguments, "--data.steps_per_epoch", "10"])
    assert config.data.mixture == mixture
    (tmp_path / "config.yaml").write_text(config_yaml(config))
    assert parse_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_other_shards_are_another_run(tmp_path):
    write_shards(tmp_path / "a", [10, 10], write_tar)
    cfg = settings(f"{tmp_path}/a/*.tar", steps_per_epoch=2)
    before = open_(cfg).fingerprint()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert open_(replace(cfg, path=f"{tmp_path}/b/*.tar")).fingerprint() == before
    write_shards(tmp_path / "a", [10, 10, 1], write_tar)
    assert open_(cfg).fingerprint() != before
