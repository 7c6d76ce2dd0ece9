"""Images, splits, crops, order and loaders, on real files of every kind. Seconds on a CPU."""

import io
import logging
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import types
import zlib

import datasets
import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis.strategies import booleans, floats, integers, sampled_from
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from rae_suite import errors, folders, images, loaders, randomness, sources, splits

PARITY_DIR = pathlib.Path(os.environ.get("PARITY_DIR", pathlib.Path(__file__).parent / "parity"))


def config(path, **changes):
    """A stand-in for the `data` group of the configuration."""
    settings = dict(
        path=str(path), config_name=None, train_split="train", eval_split="validation", holdout_fraction=0.0,
        image_column=None, label_column=None, resize_size=None, max_unreadable=10, max_megapixels=179, num_workers=0,
    )  # fmt: skip
    return types.SimpleNamespace(**{**settings, **changes})


def load_split(cfg, split="train"):
    """The images that an evaluation of this split measures."""
    return splits.load_eval_images(types.SimpleNamespace(**{**vars(cfg), "eval_split": split}), seed=0)


def picture(width=40, height=30, seed=0):
    """Smooth random colours: unlike noise, they survive JPEG."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def save(path, seed=0, **size):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed=seed, **size).save(path)


def class_tree(root, classes=("cat", "dog"), count=3):
    for number, name in enumerate(classes):
        for i in range(count):
            save(root / name / f"{i}.png", seed=10 * number + i)
    return root


def encoded(image, file_format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def decoded(content):
    return np.asarray(images.to_rgb(Image.open(io.BytesIO(content))))


def rows(count=6, label=True, **columns):
    """A `datasets.Dataset` with an Image column and, if asked, a ClassLabel one."""
    content = {"image": [{"bytes": encoded(picture(seed=i)), "path": None} for i in range(count)]}
    features = {"image": datasets.Image()}
    if label:
        content["label"] = [i % 2 for i in range(count)]
        features["label"] = datasets.ClassLabel(names=["cat", "dog"])
    for name, (values, feature) in columns.items():
        content[name], features[name] = values, feature
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def one_line_error(call, *fragments):
    with pytest.raises(errors.DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert str(fragment) in message, message
    return message


VIEW = images.TrainingView(16)


class Source(sources.ImageSource):
    """Pictures made on demand; those in `broken` are unreadable."""

    def __init__(self, count, broken=()):
        self.count = count
        self.broken = set(broken)

    def __len__(self):
        return self.count

    def name(self, i):
        return f"made[{i}]"

    def label(self, i):
        return None

    def load(self, i):
        if i in self.broken:
            raise errors.UnreadableImage(self.name(i), "broken")
        return picture(seed=i)


# Conversions ----------------------------------------------------------------------------------------------------------


def test_gray_palette_and_one_bit_become_rgb():
    gray = picture().convert("L")
    expected = np.asarray(gray.convert("RGB"))
    assert np.array_equal(decoded(encoded(gray)), expected)
    assert np.array_equal(decoded(encoded(gray.convert("1"))), np.asarray(gray.convert("1").convert("RGB")))
    palette = picture().quantize(16)
    assert np.array_equal(decoded(encoded(palette)), np.asarray(palette.convert("RGB")))
    assert decoded(encoded(gray)).shape == (30, 40, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_on_white(mode):
    alpha = Image.new("L", (3, 1))
    alpha.putdata([0, 128, 255])
    image = Image.new("L", (3, 1), 100).convert(mode)
    image.putalpha(alpha)
    half = round(255 + (100 - 255) * 128 / 255)
    assert np.abs(decoded(encoded(image)).astype(int)[0, :, 0] - [255, half, 100]).max() <= 1


def test_palette_and_color_key_transparency_show_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    assert decoded(encoded(palette, transparency=0)).tolist() == [[[255, 255, 255], [0, 0, 255]]]
    assert decoded(encoded(palette, "GIF", transparency=0)).tolist() == [[[255, 255, 255], [0, 0, 255]]]
    key = Image.new("RGB", (1, 1), (9, 8, 7))
    assert decoded(encoded(key, transparency=(9, 8, 7))).tolist() == [[[255, 255, 255]]]


def test_cmyk_jpeg_keeps_its_colors():
    image = picture()
    found = decoded(encoded(image.convert("CMYK"), "JPEG", quality=95)).astype(int)
    assert np.abs(found - np.asarray(image)).mean() < 5


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled_not_clipped(file_format):
    values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    content = encoded(Image.fromarray(values), file_format)
    assert Image.open(io.BytesIO(content)).mode == "I;16"
    assert decoded(content)[0, :, 1].tolist() == [0, 0, 1, 1, 128, 255]


def test_16_bit_pgm_and_float_tiff():
    pgm = b"P5 3 1 65535\n" + np.array([0, 32768, 65535], dtype=">u2").tobytes()
    assert decoded(pgm)[0, :, 0].tolist() == [0, 128, 255]
    values = np.array([[-1.0, 0.0, 0.5, 1.0, 7.0, np.nan]], dtype=np.float32)
    assert decoded(encoded(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 0, 128, 255, 255, 0]


def tiff(values, zero_is_white=False, order="<", bits=None, data=None):
    """A grey TIFF, uncompressed, of the array's type and byte order; `bits` and `data` where it has no such type."""
    values = np.atleast_2d(np.asarray(values))
    data = values.astype(values.dtype.newbyteorder(order)).tobytes() if data is None else data
    height, width = values.shape
    sample_format = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    shorts = {258: bits or 8 * values.itemsize, 259: 1, 262: int(not zero_is_white), 277: 1, 339: sample_format}
    longs = {256: width, 257: height, 273: 8 + 2 + 12 * 10 + 4, 278: height, 279: len(data)}
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(shorts | longs))
    for tag in sorted(shorts | longs):
        entry = (3, 1, shorts[tag], 0) if tag in shorts else (4, 1, longs[tag])
        head += struct.pack(order + ("HHIHH" if tag in shorts else "HHII"), tag, *entry)
    return head + struct.pack(order + "I", 0) + data


@pytest.mark.parametrize("order", "<>")
def test_grey_tiffs_are_black_to_white_whatever_they_store(order):
    """16 bits and floats of either byte order, with 0 for black or for white, like those of 8 bits; 12 bits."""
    shades = np.array([0, 1, 100, 254, 255])
    for values in (shades.astype(np.uint8), (257 * shades).astype(np.uint16), (shades / 255).astype(np.float32)):
        assert decoded(tiff(values, order=order))[0, :, 0].tolist() == shades.tolist()
        assert decoded(tiff(values, True, order))[0, :, 0].tolist() == (255 - shades).tolist()
    for compression in ("tiff_lzw", "packbits"):
        content = encoded(Image.fromarray((257 * shades[None]).astype(np.uint16)), "TIFF", compression=compression,
                          tiffinfo={262: 0})  # fmt: skip
        assert decoded(content)[0, :, 0].tolist() == (255 - shades).tolist()
    packed = tiff(np.zeros((1, 2), np.uint16), bits=12, data=bytes([0x80, 0x0F, 0xFF]))  # 2048 and 4095
    assert decoded(packed)[0, :, 0].tolist() == [128, 255]


@pytest.mark.parametrize("kind", ["i1", "i2", "i4", "u4", "f2", "f8"])
def test_tiffs_without_a_known_white_are_unreadable(tmp_path, kind):
    (tmp_path / "a.tif").write_bytes(tiff(np.zeros((4, 4), kind)))
    source = load_split(config(tmp_path))
    with pytest.raises(errors.UnreadableImage, match="which is white|no image of a known format"):
        source.load(0)


def test_premultiplied_grey():
    values = np.array([[[100, 255], [100, 100], [0, 0], [50, 200]]], np.uint8)  # grey and alpha
    image = Image.fromarray(values, "LA")
    premultiplied = Image.frombytes("La", (4, 1), values.tobytes())
    assert np.asarray(images.to_rgb(premultiplied))[0, :, 0].tolist() == [100, 255, 255, 105]
    assert np.asarray(images.to_rgb(image))[0, 0].tolist() == [100, 100, 100]


def png(bits, color_type, values, transparent):
    """A PNG of one row; grey values, or triples, one of which is transparent."""
    per_sample = [sample for value in values for sample in (value if color_type == 2 else (value,))]
    row = "".join(f"{sample:0{bits}b}" for sample in per_sample)
    row = row.ljust(-(-len(row) // 8) * 8, "0")
    row = bytes(int(row[i : i + 8], 2) for i in range(0, len(row), 8))
    key = transparent if color_type == 2 else (transparent,)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", len(values), 1, bits, color_type, 0, 0, 0),
        b"tRNS": struct.pack(f">{len(key)}H", *key),
        b"IDAT": zlib.compress(b"\0" + row),
        b"IEND": b"",
    }
    parts = (struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_is_white(bits):
    """Of every depth, whichever grey it is; the others stay."""
    most = 2**bits - 1
    values = sorted({0, 1, most // 3, most - 1, most})
    shades = [round(255 * value / most) for value in values]
    for place, value in enumerate(values):
        found = decoded(png(bits, 0, values, value))[0, :, 0].tolist()
        if bits == 16:  # other greys may fall together with the transparent one only after it was found
            assert found[place] == 255
        assert found == [255 if shade_of == value else shade for shade_of, shade in zip(values, shades, strict=True)]


def test_a_transparent_colour(tmp_path):
    assert decoded(png(8, 2, [(1, 2, 3), (4, 5, 6)], (1, 2, 3))).tolist() == [[[255, 255, 255], [4, 5, 6]]]
    (tmp_path / "a.png").write_bytes(png(16, 2, [(257, 514, 771), (258, 514, 771)], (257, 514, 771)))
    with pytest.raises(errors.UnreadableImage, match="a transparent colour of 16 bits"):
        load_split(config(tmp_path)).load(0)


@pytest.mark.parametrize("ending", [".avif", ".jp2", ".j2k"])
def test_avif_and_jpeg_2000(tmp_path, ending, monkeypatch):
    """They are listed beside other images; where Pillow lacks the decoder, one line says so."""
    class_tree(tmp_path, ("a",), count=2)
    expected = picture(seed=5)
    expected.save(tmp_path / "a" / f"x{ending.upper()}")
    source = load_split(config(tmp_path))
    assert len(source) == 3
    assert np.abs(np.asarray(source.load(2)).astype(int) - np.asarray(expected)).mean() < 5
    monkeypatch.setattr(images.features, "check", lambda name: False)
    images._missing_endings.cache_clear()
    try:
        words = f"x{ending.upper()} is of the format {'AVIF' if ending == '.avif' else 'JPEG 2000'}, which this build"
        one_line_error(lambda: load_split(config(tmp_path)), words, "11.3 or newer")
    finally:
        monkeypatch.undo()
        images._missing_endings.cache_clear()


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decoded(content)[0, 0].tolist() == [255, 0, 0]
    image = Image.open(io.BytesIO(content))
    image.seek(1)
    assert images.to_rgb(image).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(file_format):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        content = encoded(picture(), file_format, exif=exif)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
        assert np.array_equal(decoded(content), np.asarray(expected))


def test_damaged_exif_is_ignored():
    assert decoded(encoded(picture(), "JPEG", exif=b"Exif\0\0nonsense")).shape == (30, 40, 3)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_truncated_and_foreign_files_are_unreadable(tmp_path, file_format):
    content = encoded(picture(), file_format)
    (tmp_path / "0.png").write_bytes(content[: len(content) * 2 // 3])
    (tmp_path / "1.png").write_text("not an image")
    (tmp_path / "2.png").write_bytes(b"")
    (tmp_path / "3.png").symlink_to(tmp_path / "missing")
    source = load_split(config(tmp_path), "train")
    for i in range(4):
        with pytest.raises(errors.UnreadableImage) as caught:
            source.load(i)
        assert caught.value.name == str(tmp_path / f"{i}.png")


# Crops ----------------------------------------------------------------------------------------------------------------


def test_center_crop_is_adms_to_the_last_bit():
    folder = PARITY_DIR / "center_crop"
    expected = sorted(folder.glob("expected_*.png"))
    assert expected
    for path in expected:
        size = int(re.search(r"\d+", path.stem).group())
        found = images.center_crop(Image.open(folder / "input.png").convert("RGB"), size)
        assert np.array_equal(np.asarray(found), np.asarray(Image.open(path)))


@pytest.mark.parametrize("width,height", [(40, 30), (31, 77), (200, 9), (16, 16), (7, 5)])
def test_crops_have_the_size_asked_for(width, height):
    assert images.center_crop(picture(width, height), 16).size == (16, 16)
    assert images.random_crop(picture(width, height), 16, 24, 0).shape == (3, 16, 16)


def resized_then_cropped(image, size, resize_size, seed):
    """What random_crop stands for, by torchvision and with the position that the seed draws."""
    resize = torchvision.transforms.Resize(
        resize_size, torchvision.transforms.InterpolationMode.BICUBIC, antialias=True
    )
    image = resize(image)
    generator = np.random.default_rng(seed)
    top, left = (int(generator.integers(length - size + 1)) for length in (image.height, image.width))
    return np.asarray(image.crop((left, top, left + size, top + size))).astype(int)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    short=integers(1, 300),
    ratio=floats(1, 4),
    upright=booleans(),
    size=integers(1, 64),
    extra=integers(0, 40),
    near=booleans(),
    kind=sampled_from(["picture", "noise", "black and white"]),
    seed=integers(0, 2**32),
)
def test_random_crop_is_the_resized_image_cropped(short, ratio, upright, size, extra, near, kind, seed):
    """Enlarged, reduced and hardly resized, with the sharpest edges that there are: at most one level apart."""
    resize_size = max(size, short + extra % 5 - 2) if near else size + extra
    width, height = (short, int(short * ratio)) if upright else (int(short * ratio), short)
    image = picture(width, height, seed)
    if kind != "picture":
        values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(values if kind == "noise" else np.where(values < 128, 0, 255).astype(np.uint8))
    found = images.random_crop(image, size, resize_size, seed).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(found - resized_then_cropped(image, size, resize_size, seed)).max() <= 1


@pytest.mark.parametrize("width,height", [(500, 375), (375, 500), (500, 333), (334, 500), (1203, 800), (500, 1200)])
def test_random_crop_of_photographs_at_full_size(tmp_path, width, height):
    """The same from JPEG files, turned ones too, as the loader gives them."""
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for number, orientation in enumerate((1, 6, 3, 8)):
        exif = Image.Exif()
        exif[274] = orientation
        photographs[number % 2].resize((width, height)).save(tmp_path / f"{number}.jpg", quality=95, exif=exif)
    shown = loaders.TrainImages(splits.scan_folder(str(tmp_path)), images.TrainingView(256), seed=9)
    for number in range(4):
        upright = ImageOps.exif_transpose(Image.open(tmp_path / f"{number}.jpg"))
        expected = resized_then_cropped(upright, 256, 384, (9, randomness.CROP_STREAM, 5, number))
        found = shown[5, number]["pixels"].permute(1, 2, 0).numpy().astype(int)
        assert np.abs(found - expected).max() <= 1


def test_random_crop_reaches_every_position_and_takes_a_generator():
    ramp = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).convert("RGB")
    corners = [int(images.random_crop(ramp, 2, 4, seed)[0, 0, 0]) for seed in range(200)]
    assert set(corners) == {0, 1, 2, 4, 5, 6, 8, 9, 10}
    one, other = np.random.default_rng(3), np.random.default_rng(3)
    assert torch.equal(images.random_crop(ramp, 2, 4, one), images.random_crop(ramp, 2, 4, other))


def test_resize_size():
    assert [images.training_resize_size(256), images.training_resize_size(64), images.training_resize_size(64, 70)] == [
        384, 96, 70,
    ]  # fmt: skip
    one_line_error(lambda: images.training_resize_size(64, 63), "data.resize_size", 63, 64)


# Folders --------------------------------------------------------------------------------------------------------------


def test_class_folders_match_torchvision(tmp_path):
    class_tree(tmp_path / "a", ("zebra", "ant", "Bee"))
    save(tmp_path / "a" / "ant" / "UPPER.JPEG")
    save(tmp_path / "a" / "ant" / "deep" / "er" / "x.png")
    (tmp_path / "a" / "ant" / "notes.txt").write_text("x")
    (tmp_path / "a" / "ant" / ".hidden.png").write_text("x")
    (tmp_path / "a" / ".cache").mkdir()
    (tmp_path / "a" / "ant" / "link.png").symlink_to(tmp_path / "a" / "zebra" / "0.png")
    source = load_split(config(tmp_path / "a"))
    expected = torchvision.datasets.ImageFolder(tmp_path / "a", is_valid_file=lambda path: "/." not in path
                                                and not path.endswith(".txt"), allow_empty=True)  # fmt: skip
    classes = [name for name in expected.classes if not name.startswith(".")]
    assert source.class_names == classes == ["Bee", "ant", "zebra"]
    found = sorted((source.name(i), source.class_names[source.label(i)]) for i in range(len(source)))
    assert found == sorted((path, expected.classes[label]) for path, label in expected.samples)
    labels = [source.label(i) for i in range(len(source))]
    assert labels == sorted(labels)


def test_split_folders_share_one_class_numbering(tmp_path):
    class_tree(tmp_path / "train", ("ant", "bee", "cat"))
    class_tree(tmp_path / "validation", ("bee", "cat"), count=1)
    class_tree(tmp_path / "test", ("unlabelled",))
    (tmp_path / "train" / "empty").mkdir()
    train, evaluation = splits.load_splits(config(tmp_path), seed=0)
    assert len(train) == 9 and len(evaluation) == 2
    assert train.class_names == evaluation.class_names == ["ant", "bee", "cat"]
    assert [evaluation.label(i) for i in range(2)] == [1, 2]
    assert evaluation.name(0) == str(tmp_path / "validation" / "bee" / "0.png")
    assert evaluation.load(0).size == (40, 30)
    assert len(load_split(config(tmp_path), "test")) == 3


def test_split_folders_without_classes(tmp_path):
    for i in range(3):
        save(tmp_path / "train" / f"{i}.png")
    save(tmp_path / "validation" / "0.png")
    train, evaluation = splits.load_splits(config(tmp_path), seed=0)
    assert (len(train), len(evaluation)) == (3, 1)
    assert train.class_names is None and train.label(0) is None


def test_plain_folder_has_no_labels(tmp_path):
    save(tmp_path / "b.png")
    save(tmp_path / "a.JPG")
    save(tmp_path / "nested" / "c.webp")
    source = load_split(config(tmp_path), "train")
    assert [os.path.relpath(source.name(i), tmp_path) for i in range(3)] == ["a.JPG", "b.png", "nested/c.webp"]
    assert source.class_names is None and source.label(0) is None


def test_class_called_train_is_a_class(tmp_path):
    class_tree(tmp_path, ("car", "train", "boat"))
    source = load_split(config(tmp_path), "train")
    assert source.class_names == ["boat", "car", "train"] and len(source) == 9


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    class_tree(tmp_path / "real", ("cat",))
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "cat").symlink_to(tmp_path / "real" / "cat")
    (tmp_path / "real" / "cat" / "loop").symlink_to(tmp_path / "real")
    source = load_split(config(tmp_path / "links"), "train")
    assert len(source) == 3 and source.class_names == ["cat"]


def test_names_that_are_not_utf8(tmp_path):
    save(tmp_path / "cat" / "0.png")
    os.rename(tmp_path / "cat" / "0.png", os.fsencode(tmp_path / "cat") + b"/\xff\xe9.png")
    save(tmp_path / "cat" / "grün.png")
    source = load_split(config(tmp_path), "train")
    assert {source.load(i).size for i in range(2)} == {(40, 30)}


def test_hidden_and_system_files_are_left_out(tmp_path):
    """Thumbnails of network drives and desktops, waste baskets, what archives of a Mac have beside the files."""
    class_tree(tmp_path, count=4)
    for name in ("@eaDir", "@EADIR", "__MACOSX", ".thumbnails", "@Recycle", "$RECYCLE.BIN", "#recycle", "lost+found",
                 "System Volume Information"):  # fmt: skip
        save(tmp_path / "cat" / name / "0.png" / "SYNOPHOTO_THUMB_M.jpg")
        save(tmp_path / name / "1.png")
    save(tmp_path / "dog" / "._0.png")
    source = load_split(config(tmp_path))
    assert len(source) == 8 and source.class_names == ["cat", "dog"]
    assert not any("@" in source.name(i) or "._" in source.name(i) for i in range(8))


def test_other_files_are_counted_by_extension(tmp_path, caplog, walked):
    """Also in folders that hold nothing else, and from the list that is kept; text beside the images is not counted."""
    class_tree(tmp_path / "a", count=2)
    others = ("cat/x.heic", "cat/y.HEIC", "cat/z.tga", "fox/0.heic", "raw", "cat/0.txt", "labels.csv", "cat/0.json",
              "cat/Thumbs.db", "cat/.DS_Store")  # fmt: skip
    for name in others:
        (tmp_path / "a" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "a" / name).touch()
    for _ in range(2):
        caplog.clear()
        assert content(tmp_path / "a")[1] == ["cat", "dog"]
        said = "5 files left out: 3 .heic, 1 without extension, 1 .tga"
        assert [record.getMessage() for record in caplog.records] == [f"{tmp_path}/a: {said}"]
        walked.clear()
    assert not walked
    (tmp_path / "a" / "fox" / "0.heic").rename(tmp_path / "a" / "fox" / "0.txt")
    caplog.clear()
    assert content(tmp_path / "a") and "4 files left out: 2 .heic" in caplog.text


# Lists of large folders -----------------------------------------------------------------------------------------------


@pytest.fixture
def walked(tmp_path, monkeypatch):
    """Lists of all folders are kept; gives the folders that were listed."""
    monkeypatch.setattr(folders, "INDEX_CACHE", tmp_path / "home" / "indexes")
    monkeypatch.setattr(folders, "INDEXED_FROM", 1)
    monkeypatch.setattr(folders, "SETTLED", 0.0)
    listed, walk = [], folders._walk

    def recorded(path, *rest):
        listed.append(os.path.basename(path))
        return walk(path, *rest)

    monkeypatch.setattr(folders, "_walk", recorded)
    return listed


def content(path):
    """All names and labels; a moment later than what was done to the folder before, so that its times tell."""
    time.sleep(0.02)
    source = load_split(config(path), "train")
    return [(source.name(i), source.label(i)) for i in range(len(source))], source.class_names


def replace_folder(root):
    """Another folder with the same name and times in the place of root/dog, as unpacking an archive would leave it."""
    times = [(path, os.stat(path)) for path in (root, root / "dog")]
    shutil.rmtree(root / "dog")
    save(root / "dog" / "other.png")
    for path, status in times:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES = {
    "file added": lambda root: save(root / "dog" / "new.png"),
    "file removed": lambda root: (root / "dog" / "1.png").unlink(),
    "file renamed": lambda root: (root / "dog" / "1.png").rename(root / "dog" / "x.png"),
    "file moved to another class": lambda root: (root / "dog" / "1.png").rename(root / "cat" / "x.png"),
    "file added deep below": lambda root: save(root / "cat" / "a" / "b" / "new.png"),
    "folder renamed deep below": lambda root: (root / "cat" / "a" / "b").rename(root / "cat" / "a" / "c"),
    "folder removed deep below": lambda root: shutil.rmtree(root / "cat" / "a"),
    "class added": lambda root: save(root / "bird" / "0.png"),
    "class removed": lambda root: shutil.rmtree(root / "dog"),
    "class renamed": lambda root: (root / "dog").rename(root / "wolf"),
    "file beside the classes": lambda root: save(root / "0.png"),
    "times put back": replace_folder,
}


@pytest.mark.parametrize("change", CHANGES)
def test_list_of_files_is_kept_until_a_folder_changes(tmp_path, walked, monkeypatch, change):
    root = class_tree(tmp_path / "images")
    save(root / "cat" / "a" / "b" / "0.png")
    os.rename(root / "dog" / "0.png", os.fsencode(root / "dog") + b"/\xff\n.png")
    first = content(root)
    assert len(first[0]) == 7 and walked[:2] == ["cat", "a"]
    walked.clear()
    assert content(root) == first and not walked
    CHANGES[change](root)
    found = content(root)
    assert found != first and walked
    assert content(root) == found
    monkeypatch.setattr(folders, "INDEX_CACHE", tmp_path / "other")
    assert content(root) == found


def test_another_data_set_at_the_same_place_is_listed(tmp_path, walked):
    first = content(class_tree(tmp_path / "images", count=2))
    (tmp_path / "images").rename(tmp_path / "old")
    class_tree(tmp_path / "images", count=4)
    assert len(content(tmp_path / "images")[0]) == 8
    assert len(content(tmp_path / "old")[0]) == len(first[0]) == 4


@pytest.mark.parametrize("damage", ["empty", "truncated", "changed", "foreign"])
def test_damaged_list_of_files_is_made_again(tmp_path, walked, caplog, damage):
    root = class_tree(tmp_path / "images")
    first = content(root)
    [file] = (tmp_path / "home" / "indexes").iterdir()
    whole = file.read_bytes()
    position = whole.index(b"0.png")
    file.write_bytes({
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "changed": whole[:position] + b"7" + whole[position + 1 :],
        "foreign": encoded(picture()),
    }[damage])  # fmt: skip
    assert content(root) == first
    assert [file.name in record.getMessage() for record in caplog.records] == [True]
    walked.clear()
    assert content(root) == first and not walked


def test_list_of_files_without_a_place_for_it(tmp_path, walked, caplog):
    root = class_tree(tmp_path / "images")
    (tmp_path / "home").write_text("a file where the folder should be")
    assert content(root) == content(root)
    assert len(walked) == 4 and "not kept" in caplog.text


def test_list_of_files_is_not_kept_of_few_or_while_they_change(tmp_path, walked, monkeypatch):
    root = class_tree(tmp_path / "images")
    monkeypatch.setattr(folders, "SETTLED", 60.0)
    content(root)
    monkeypatch.setattr(folders, "SETTLED", 0.0)
    monkeypatch.setattr(folders, "INDEXED_FROM", 7)
    content(root)
    assert not (tmp_path / "home").exists()


def test_processes_that_list_a_folder_at_once(tmp_path, walked):
    root = class_tree(tmp_path / "images", count=20)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(content, [root] * 8)
    assert all(one == found[0] for one in found) and len(found[0][0]) == 40
    assert len(list((tmp_path / "home" / "indexes").iterdir())) == 1
    walked.clear()
    assert content(root) == found[0] and not walked


# `datasets` -----------------------------------------------------------------------------------------------------------


def test_saved_dataset_dict(tmp_path):
    datasets.DatasetDict(train=rows(6), validation=rows(4)).save_to_disk(tmp_path)
    train, evaluation = splits.load_splits(config(tmp_path), seed=0)
    assert (len(train), len(evaluation)) == (6, 4)
    assert [train.label(i) for i in range(6)] == [0, 1, 0, 1, 0, 1] and train.class_names == ["cat", "dog"]
    assert evaluation.name(3) == "validation[3]"
    assert np.array_equal(np.asarray(train.load(2)), np.asarray(picture(seed=2)))


def test_single_saved_dataset_is_one_split(tmp_path):
    rows(6).save_to_disk(tmp_path)
    assert len(load_split(config(tmp_path))) == 6
    train, evaluation = splits.load_splits(config(tmp_path, holdout_fraction=0.3), seed=0)
    assert (len(train), len(evaluation)) == (4, 2)
    one_line_error(lambda: splits.load_splits(config(tmp_path), 0), "data.eval_split", "no split level", "validation")


def test_columns_of_paths_bytes_and_dicts(tmp_path):
    save(tmp_path / "x.png", seed=7)
    path, content = str(tmp_path / "x.png"), encoded(picture(seed=7))
    values = {
        "path": ([path], datasets.Value("string")),
        "raw": ([content], datasets.Value("binary")),
        "both": (
            [{"bytes": None, "path": path}],
            {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        ),
        "file": ([path], datasets.Image()),
    }
    for name, (column, feature) in values.items():
        dataset = datasets.Dataset.from_dict({name: column}, features=datasets.Features({name: feature}))
        source = sources.ColumnSource(dataset, "train", image_column=name)
        assert np.array_equal(np.asarray(source.load(0)), np.asarray(picture(seed=7)))
    raw = datasets.Dataset.from_dict({"jpg": [content], "id": [b"x"]})
    assert sources.ColumnSource(raw, "train").load(0).size == (40, 30)


def test_very_thin_images_are_unreadable(tmp_path):
    """Resizing their shorter side would take gigabytes; they count as unreadable, with the reason."""
    for width in (400, 404):
        Image.new("RGB", (width, 4)).save(tmp_path / f"{width}.png")
    source = splits.scan_folder(str(tmp_path))
    assert source.load(0).size == (400, 4)
    with pytest.raises(errors.UnreadableImage, match="404.png: .*404 x 4 pixels"):
        source.load(1)


def test_damaged_rows_are_unreadable():
    dataset = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"junk", "path": None}, None]}, features=datasets.Features(image=datasets.Image())
    )
    source = sources.ColumnSource(dataset, "test")
    for i in range(2):
        with pytest.raises(errors.UnreadableImage, match=rf"test\[{i}\]"):
            source.load(i)


def test_string_integer_and_missing_labels():
    strings = rows(3, label=False, label_text=(["dog", None, "ant"], datasets.Value("string")))
    source = sources.ColumnSource(strings, "train", label_column="label_text")
    assert source.class_names == ["ant", "dog"] and [source.label(i) for i in range(3)] == [1, None, 0]
    integers = rows(3, label=False, labels=([4, -1, 2], datasets.Value("int32")))
    source = sources.ColumnSource(integers, "train")
    assert source.class_names is None and [source.label(i) for i in range(3)] == [4, None, 2]
    assert sources.ColumnSource(rows(2, label=False), "train").label(0) is None


def test_fine_label_is_preferred_and_other_pairs_are_ambiguous():
    two = datasets.ClassLabel(names=["a", "b"])
    cifar = rows(2, label=False, fine_label=([1, 0], two), coarse_label=([0, 1], two))
    assert sources.ColumnSource(cifar, "train").label(0) == 1
    other = sources.ColumnSource(rows(2, label=False, shape=([1, 0], two), size=([0, 1], two)), "train")
    assert other.load(0).size == (40, 30) and other.label(0) is None  # stage 1 needs no labels
    one_line_error(other.check_labels, "data.label_column", "shape, size")


def test_column_errors(tmp_path):
    images = ([{"bytes": encoded(picture()), "path": None}], datasets.Image())

    def source(columns, **asked):
        content = {name: values for name, (values, _) in columns.items()}
        features = datasets.Features({name: feature for name, (_, feature) in columns.items()})
        return lambda: sources.ColumnSource(datasets.Dataset.from_dict(content, features=features), "train", **asked)

    number = ([1.5], datasets.Value("float32"))
    one_line_error(source({"x": number}), "data.image_column", "no image column", "x")
    one_line_error(source({"left": images, "right": images}), "data.image_column", "left, right")
    one_line_error(source({"image": images}, image_column="img"), "data.image_column", "'img'", "image")
    one_line_error(source({"image": number}, image_column="image"), "data.image_column", "float32", "expected")
    one_line_error(source({"image": images, "y": number}, label_column="z"), "data.label_column", "'z'", "image, y")
    one_line_error(source({"image": images, "y": number}, label_column="y"), "data.label_column", "float32")
    one_line_error(source({"image": ([], datasets.Image())}), "data.path", "no rows")
    assert source({"left": images, "image": images})().load(0).size == (40, 30)


def test_hub_data_set(monkeypatch):
    asked = []

    def load_dataset(path, name):
        asked.append((path, name))
        return datasets.DatasetDict(train=rows(4), test=rows(2))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train, evaluation = splits.load_splits(config("user/name.v1", config_name="small", eval_split="test"), seed=0)
    assert (len(train), len(evaluation)) == (4, 2) and asked == [("user/name.v1", "small")]
    one_line_error(lambda: splits.load_splits(config("name"), 0), "data.eval_split", "'validation'", "test, train")


def test_hub_errors_are_one_line(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    one_line_error(
        lambda: load_split(config("user/surely_not_there"), "train"),
        "data.path", "'user/surely_not_there'", "neither a local folder nor a Hub data set", "HF_HUB_OFFLINE",
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    call = lambda: load_split(config("data/digits"), "train")  # noqa: E731
    one_line_error(call, "scripts/prepare_data.py digits --output data/digits")

    def bad_config(path, name):
        raise ValueError("BuilderConfig 'x' not found.\nAvailable: ['a']")

    monkeypatch.setattr(datasets, "load_dataset", bad_config)
    call = lambda: load_split(config("user/name", config_name="x"), "train")  # noqa: E731
    one_line_error(call, "data.config_name 'x'", "not found. Available: ['a']")


# Splits ---------------------------------------------------------------------------------------------------------------


def test_holdout_is_seeded_and_never_overlaps(tmp_path):
    class_tree(tmp_path, count=10)

    def names(seed, fraction=0.15, **asked):
        train, held_out = splits.load_splits(config(tmp_path, holdout_fraction=fraction), seed, **asked)
        return tuple(held and {held.name(i) for i in range(len(held))} for held in (train, held_out))

    train, held_out = names(0)
    assert len(held_out) == 3 and len(train) == 17 and not train & held_out
    assert names(0) == (train, held_out) and names(1) != (train, held_out)
    assert names(0, need_eval=False) == (train, None)
    assert len(names(0, fraction=0.001)[1]) == 1
    _, source = splits.load_splits(config(tmp_path, holdout_fraction=0.5), 0)
    assert source.class_names == ["cat", "dog"]
    assert all(f"/{source.class_names[source.label(i)]}/" in source.name(i) for i in range(len(source)))


def test_evaluation_on_training_images_must_be_asked_for(tmp_path):
    class_tree(tmp_path)
    train, evaluation = splits.load_splits(config(tmp_path, eval_split="train"), 0)
    assert evaluation is train and len(train) == 6
    assert splits.load_splits(config(tmp_path), 0, need_eval=False)[1] is None
    one_line_error(lambda: splits.load_splits(config(tmp_path), 0), "data.eval_split", "data.holdout_fraction")


def test_a_split_that_was_asked_for_must_be_there(tmp_path):
    """Measured alone, data without a split level is taken whole only where no split was asked for. What the images are
    is said in words."""
    class_tree(tmp_path / "plain", count=5)
    datasets.Dataset.from_dict({"image": [None] * 4}).cast_column("image", datasets.Image()).save_to_disk(
        tmp_path / "saved"
    )

    def split(path, seed=0, **changes):
        return splits.load_eval_images(config(tmp_path / path, **changes), seed).split

    assert split("plain") == split("plain", eval_split="train") == "all 10 images (no splits)"
    assert split("saved") == "all 4 images (no splits)"
    assert split("plain", 7, holdout_fraction=0.1) == "10% held out of train, seed 7"
    train, _ = splits.load_splits(config(tmp_path / "plain", holdout_fraction=0.125), 3)
    assert train.split == "train without the 12.5% held out of train, seed 3"
    for path in ("plain", "saved"):
        one_line_error(
            lambda path=path: split(path, eval_split="val"),
            "data.eval_split: there is no split 'val'", "no split level", "or no data.eval_split, which means all",
        )  # fmt: skip
        one_line_error(
            lambda path=path: splits.load_splits(config(tmp_path / path, train_split="fit"), 0, need_eval=False),
            "data.train_split: there is no split 'fit'", "or no data.train_split",
        )  # fmt: skip
    class_tree(tmp_path / "split" / "train")
    class_tree(tmp_path / "split" / "val")
    assert split("split", eval_split="val") == "val" and split("split", eval_split="train") == "train"
    assert "no data.eval_split" not in one_line_error(lambda: split("split"), "'validation'", "train, val")


def test_similar_split_names_are_not_guessed(tmp_path):
    class_tree(tmp_path / "train")
    class_tree(tmp_path / "val")
    one_line_error(
        lambda: splits.load_splits(config(tmp_path), 0),
        "data.eval_split", "'validation'", "train, val", "data.holdout_fraction",
    )  # fmt: skip
    assert len(splits.load_splits(config(tmp_path, eval_split="val"), 0)[1]) == 6
    one_line_error(lambda: splits.load_splits(config(tmp_path, train_split="fit"), 0), "data.train_split", "'fit'")
    one_line_error(lambda: load_split(config(tmp_path), "test"), "'test'", "train, val")
    train, held_out = splits.load_splits(config(tmp_path, holdout_fraction=0.5), 0)
    assert (len(train), len(held_out)) == (3, 3)


def test_holdout_errors(tmp_path):
    class_tree(tmp_path / "train")
    class_tree(tmp_path / "val")
    both = config(tmp_path, eval_split="val", holdout_fraction=0.1)
    one_line_error(lambda: splits.load_splits(both, 0), "data.holdout_fraction", "data.eval_split 'val'")
    same = config(tmp_path, eval_split="train", holdout_fraction=0.1)
    one_line_error(lambda: splits.load_splits(same, 0), "data.holdout_fraction", "data.eval_split 'train'")
    for fraction in (-0.1, 1.0):
        one_line_error(
            lambda fraction=fraction: splits.load_splits(config(tmp_path, holdout_fraction=fraction), 0),
            "data.holdout_fraction", fraction,
        )  # fmt: skip
    one_line_error(lambda: splits.load_splits(config(tmp_path, holdout_fraction=0.99), 0), "leaves none")


def test_path_errors(tmp_path):
    def load(path, **changes):
        return lambda: load_split(config(path, **changes), "train")

    one_line_error(load(tmp_path / "missing"), "data.path", tmp_path / "missing", "does not exist")
    one_line_error(load("./missing"), "data.path", "./missing", "does not exist")
    one_line_error(load("a/b/c"), "data.path", "a/b/c", "does not exist")
    one_line_error(load(""), "data.path")
    (tmp_path / "empty" / "inside").mkdir(parents=True)
    one_line_error(load(tmp_path / "empty"), "data.path", tmp_path / "empty", "no image files")
    (tmp_path / "file").write_text("x")
    one_line_error(load(tmp_path / "file"), "data.path", "is a file")
    class_tree(tmp_path / "images")
    one_line_error(load(tmp_path / "images", config_name="x"), "data.config_name", "'x'")
    one_line_error(load(tmp_path / "images", image_column="x"), "data.image_column", "'x'")
    one_line_error(load(tmp_path / "images", label_column="x"), "data.label_column", "'x'")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    one_line_error(load(tmp_path / "saved"), "data.path", tmp_path / "saved", "not a complete saved data set")


# Data sets, collate, unreadable images --------------------------------------------------------------------------------


def test_crop_is_a_function_of_seed_epoch_and_index():
    def pixels(seed, epoch, index):
        return loaders.TrainImages(Source(4), images.TrainingView(16, 24), seed)[epoch, index]["pixels"]

    first = pixels(0, 0, 1)
    assert first.dtype == torch.uint8 and first.shape == (3, 16, 16) and first.is_contiguous()
    assert torch.equal(first, pixels(0, 0, 1))
    for other in (pixels(0, 1, 1), pixels(1, 0, 1), pixels(0, 0, 2)):
        assert not torch.equal(first, other)


def test_unreadable_training_image_is_replaced_by_the_next():
    shown = loaders.TrainImages(Source(4, broken=[2, 3]), VIEW, max_unreadable=2)
    item = shown[0, 2]
    assert item["index"] == 0 and item["unreadable"] == ["made[2]: broken", "made[3]: broken"]
    assert shown[0, 1]["unreadable"] == []
    shown = loaders.TrainImages(Source(4, broken=[2, 3]), VIEW, max_unreadable=1)
    one_line_error(lambda: shown[0, 2], "data.max_unreadable", "2 images in a row", "at most 1", "made[3]")
    shown = loaders.TrainImages(Source(2, broken=[0, 1]), VIEW, max_unreadable=10)
    one_line_error(lambda: shown[0, 0], "data.path: none of 2 training images can be read", "made[1]")


def test_batches_carry_labels(tmp_path):
    """Of class folders and of data sets, for training and evaluation; -1 where there is none."""
    class_tree(tmp_path / "files", count=3)
    files = splits.scan_folder(str(tmp_path / "files"), folders.class_folders(str(tmp_path / "files")))
    column = sources.ColumnSource(rows(6, label=False, labels=([4, -1, 2, 0, 1, 3], datasets.Value("int32"))), "train")
    for source in (files, sources.SubsetSource(files, [1, 4]), column, sources.ColumnSource(rows(6, label=False), "t")):
        labels = [-1 if source.label(i) is None else source.label(i) for i in range(len(source))]
        batches = loaders.TrainBatches(len(source), 2, 2, 0, 1, seed=0, start_step=0, total_steps=len(source) // 2)
        for batch in (*loaders.train_loader(source, batches, VIEW), *loaders.eval_loader(source, 16, 4, num_workers=1)):
            assert batch["label"].dtype == torch.int64
            assert batch["label"].tolist() == [labels[i] for i in batch["index"].tolist()]
    assert set(labels) == {-1} and len({files.label(i) for i in range(len(files))}) > 1


def test_evaluation_drops_unreadable_images():
    cropped = loaders.EvalImages(Source(3, broken=[1]), 16)
    batch = loaders.collate([cropped[i] for i in range(3)])
    assert batch["pixels"].shape == (2, 3, 16, 16) and batch["index"].tolist() == [0, 2]
    assert batch["unreadable"] == ["made[1]: broken"]
    expected = np.asarray(images.center_crop(picture(seed=2), 16))
    assert np.array_equal(batch["pixels"][1].permute(1, 2, 0).numpy(), expected)
    empty = loaders.collate([cropped[1]], image_size=16)
    assert empty["pixels"].shape == (0, 3, 16, 16) and empty["pixels"].dtype == torch.uint8
    assert empty["index"].dtype == torch.int64 and empty["unreadable"] == ["made[1]: broken"]


def test_unreadable_log_warns_once_and_stops(caplog):
    log = loaders.UnreadableLog(2)
    with caplog.at_level(logging.WARNING):
        log.add(["a", "b", "a"])
        log.add(["b"])
    assert [record.getMessage() for record in caplog.records] == [
        "unreadable image 1 (at most 2): a",
        "unreadable image 2 (at most 2): b",
    ]
    one_line_error(lambda: log.add(["c"]), "data.max_unreadable", "3 images", "at most 2", "c")
    one_line_error(lambda: loaders.UnreadableLog(0).add(["x"]), "1 images", "x")


# Order ----------------------------------------------------------------------------------------------------------------


def batches(rank=0, world_size=1, micro=2, start=0, total=7, **changes):
    settings = dict(num_images=27, global_batch_size=8, seed=3, **changes)
    return loaders.TrainBatches(
        micro_batch_size=micro, rank=rank, world_size=world_size, start_step=start, total_steps=total, **settings
    )


def test_micro_batches_of_all_ranks_make_the_same_global_batches():
    whole = list(batches(micro=8))
    assert len(whole) == 7
    for world_size in (1, 2, 4):
        for micro in (1, 2, 4, 8):
            if micro * world_size > 8:
                continue
            ranks = [list(batches(rank, world_size, micro)) for rank in range(world_size)]
            per_step = 8 // (micro * world_size)
            assert all(len(rank) == 7 * per_step for rank in ranks)
            for step in range(7):
                pieces = [ranks[r][step * per_step + m] for m in range(per_step) for r in range(world_size)]
                assert sum(pieces, []) == whole[step]


def test_epochs_are_permutations_and_the_last_incomplete_batch_is_dropped():
    order = batches(micro=8)
    assert order.steps_per_epoch == 3
    steps = list(order)
    assert [step[0][0] for step in steps] == [0, 0, 0, 1, 1, 1, 2]
    epochs = [[index for step in steps[3 * e : 3 * e + 3] for _, index in step] for e in (0, 1)]
    for epoch in epochs:
        assert len(set(epoch)) == 24 and set(epoch) <= set(range(27))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("start", [0, 1, 3, 5, 7, 9])
def test_resume_gives_the_tail(start):
    whole, tail = batches(1, 2, 2), batches(1, 2, 2, start=start)
    expected = list(whole)[2 * start :]
    assert list(tail) == expected and len(tail) == len(expected)


def test_order_errors():
    one_line_error(lambda: batches(micro=3), "global batch size 8", "micro-batch size 3", "1 processes = 3")
    one_line_error(
        lambda: loaders.TrainBatches(7, 8, 8, 0, 1, 0, 0, 1),
        "train.global_batch_size: 8, but there are 7 training images in data.path",
    )
    one_line_error(lambda: batches(rank=2, world_size=2), "rank 2")


# Loaders --------------------------------------------------------------------------------------------------------------


def test_training_is_the_same_with_any_number_of_workers():
    state = torch.get_rng_state()

    def run(workers):
        loader = loaders.train_loader(Source(27, broken=[4]), batches(total=4), VIEW, num_workers=workers)
        return list(loader)

    one, other = run(0), run(2)
    assert len(one) == len(other) == 16
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a["pixels"], b["pixels"]) and torch.equal(a["index"], b["index"])
        assert a["pixels"].shape == (2, 3, 16, 16) and a["unreadable"] == b["unreadable"]
    assert ["made[4]: broken"] in [batch["unreadable"] for batch in one]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("world_size,num_samples", [(1, None), (2, None), (3, 10), (4, 99), (4, 2)])
def test_evaluation_counts_every_image_once(world_size, num_samples):
    source = Source(17)
    ranks = [loaders.eval_loader(source, 16, 4, 0, rank, world_size, num_samples) for rank in range(world_size)]
    seen = [list(loader) for loader in ranks]
    indices = sorted(index for rank in seen for batch in rank for index in batch["index"].tolist())
    expected = range(17) if num_samples in (None, 99) else [i * 17 // num_samples for i in range(num_samples)]
    assert indices == list(expected)
    assert len({len(rank) for rank in seen}) == 1
    assert all(batch["pixels"].shape[1:] == (3, 16, 16) for rank in seen for batch in rank)


def test_evaluation_loader_can_be_read_twice_with_workers(tmp_path):
    datasets.DatasetDict(train=rows(5)).save_to_disk(tmp_path)
    source = load_split(config(tmp_path), "train")
    loader = loaders.eval_loader(source, 16, 2, num_workers=2)
    first, second = list(loader), list(loader)
    assert [batch["index"].tolist() for batch in first] == [[0, 1], [2, 3], [4]]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a["pixels"], b["pixels"])


class Signals(Source):
    def load(self, i):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        return super().load(i)


def test_workers_leave_signals_to_the_main_process():
    """Also where a library, as Arrow does, starts threads within the fork, before a worker can say anything."""
    threads = [True]

    def start_thread():
        if threads:
            threading.Thread(target=time.sleep, args=(30,), daemon=True).start()

    os.register_at_fork(after_in_child=start_thread)
    try:
        assert len(list(loaders.eval_loader(Signals(2), 16, 1, num_workers=1))) == 2
    finally:
        threads.clear()  # what is registered stays


def test_an_error_in_a_worker_is_one_line_and_ends_the_run(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.png").write_text("not an image")
    code = f"""
from rae_suite import errors, images, loaders, splits
batches = loaders.TrainBatches(8, 4, 2, 0, 1, 0, 0, 100)
view = images.TrainingView(16)
loader = loaders.train_loader(splits.scan_folder({str(tmp_path)!r}), batches, view, max_unreadable=3, num_workers=2)
try:
    for batch in loader:
        pass
except errors.DataError as error:
    print(str(error).count(chr(10)), error)
    raise
"""
    root = pathlib.Path(loaders.__file__).parents[1]
    # the uncaught error keeps the loader and its workers until the exit
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert result.stdout.startswith("0 data.max_unreadable: 4 images in a row cannot be read")
    assert result.returncode == 1 and "errors.DataError: data.max_unreadable" in result.stderr


def test_fingerprint_follows_the_content(tmp_path):
    """Of files, of saved data sets and of columns of paths: other content is another fingerprint, reading is not."""

    def save(shade):
        file = tmp_path / "files" / "a.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8 + shade, 8), (shade,) * 3).save(file)
        rows = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": str(file)}]})
        rows = rows.cast_column("image", datasets.Image())
        rows.save_to_disk(tmp_path / "saved")
        paths = datasets.Dataset.from_dict({"image": [str(file)]})
        saved = sources.ColumnSource(datasets.load_from_disk(str(tmp_path / "saved")), "train")
        found = [splits.scan_folder(str(file.parent)), saved, sources.ColumnSource(paths, "train")]
        prints = [source.fingerprint() for source in found]
        for source in found:
            source.load(0)
        assert prints == [source.fingerprint() for source in found]
        return prints

    before, after = save(10), save(20)
    assert all(one != other for one, other in zip(before, after, strict=True))


def test_fingerprint_of_a_part_looks_at_that_part_only(tmp_path):
    class_tree(tmp_path / "files", count=3)
    files = splits.scan_folder(str(tmp_path / "files"))
    part = sources.SubsetSource(files, [1, 4])
    before = part.fingerprint()
    assert before != files.fingerprint() and before != sources.SubsetSource(files, [1, 3]).fingerprint()
    save(tmp_path / "files" / "cat" / "0.png", seed=99)
    assert part.fingerprint() == before
    assert sources.SubsetSource(sources.SubsetSource(files, [0, 1, 4]), [1, 2]).fingerprint() == before
    save(tmp_path / "files" / "cat" / "1.png", seed=99)
    assert part.fingerprint() != before
    column = sources.ColumnSource(rows(6), "train")
    prints = [sources.SubsetSource(column, indices).fingerprint() for indices in ([0, 1], [0, 2], [0, 1])]
    assert prints[0] == prints[2] != prints[1] and column.fingerprint() not in prints
