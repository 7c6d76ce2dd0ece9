"""Images as cameras, scanners and other programs leave them: what is in a file beside its picture, sizes, names."""

import csv
import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from conftest import flags, run_command, tiny_rae
from PIL import Image, PngImagePlugin

from rae_suite.errors import UnreadableImage
from rae_suite.sources import HeldSource
from rae_suite.splits import scan_folder

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def plain_png(**options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "PNG", **options)
    return stream.getvalue()


def part(name: bytes, data: bytes, checksum: int = 0) -> bytes:
    """A part of a PNG; `checksum` makes it wrong."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data) ^ checksum)


def with_part(added: bytes, before: bytes = b"IDAT") -> bytes:
    """The PNG with a part before its pixels or its end."""
    content = plain_png()
    place = content.index(before) - 4
    return content[:place] + added + content[place:]


def load(content: bytes) -> np.ndarray:
    return np.asarray(HeldSource([("x", content, None)]).load(0))


LARGE = bytes(3 * 2**20)
ODD_PARTS = {
    "colour profile of 3 MB": part(b"iCCP", b"p\0\0" + zlib.compress(LARGE)),
    "compressed comment of 3 MB": part(b"zTXt", b"Comment\0\0" + zlib.compress(LARGE)),
    "international comment of 3 MB": part(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(LARGE)),
    "XMP of 3 MB": part(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"<x/>" + LARGE.replace(b"\0", b" "))),
    "comment whose checksum is wrong": part(b"tEXt", b"Comment\0text", checksum=1),
    "EXIF whose checksum is wrong": part(b"eXIf", b"MM\0*\0\0\0\x08\0\0", checksum=1),
    "resolution cut short": part(b"pHYs", b"\0\0"),
    "gamma cut short": part(b"gAMA", b"\0"),
    "white point cut short": part(b"cHRM", b"\0"),
    "time cut short": part(b"tIME", b"\0"),
    "profile without a name": part(b"iCCP", b""),
    "sRGB without a value": part(b"sRGB", b""),
    "animation without a length": part(b"acTL", b""),
    "part of a program's own": part(b"prIv", b"anything"),
}


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
@pytest.mark.parametrize("kind", ODD_PARTS)
def test_a_png_is_read_whatever_else_is_in_it(kind, before):
    assert np.array_equal(load(with_part(ODD_PARTS[kind], before)), PIXELS)


def test_the_parts_of_a_png_that_count():
    """Transparency, and an orientation wherever Pillow finds one, are not lost with the rest."""
    keyed = part(b"tRNS", struct.pack(">3H", *PIXELS[0, 0].tolist()))
    assert load(with_part(keyed))[0, 0].tolist() == [255, 255, 255]
    exif = Image.Exif()
    exif[274] = 3
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="3"/>')
    for content in (plain_png(exif=exif), plain_png(pnginfo=texts)):
        assert np.array_equal(load(content), PIXELS[::-1, ::-1])


@pytest.mark.parametrize("name", [b"IHDR", b"IDAT"])
def test_a_png_whose_picture_is_damaged_is_unreadable(name):
    content = bytearray(plain_png())
    place = content.index(name)
    length = struct.unpack(">I", content[place - 4 : place])[0]
    content[place + 4 + length] ^= 1  # the checksum's first byte
    with pytest.raises(UnreadableImage, match=f"the checksum of {name.decode()} does not fit"):
        load(bytes(content))
    with pytest.raises(UnreadableImage, match="cut off"):
        load(plain_png()[:-12])


def test_the_largest_image_is_a_setting(tmp_path):
    """A scan of more than max_megapixels is named with the setting; a larger value reads it."""
    folder, rae = tmp_path / "scans", tmp_path / "rae"
    folder.mkdir()
    Image.fromarray(PIXELS).save(folder / "small.png")
    Image.new("L", (200, 100)).save(folder / "scan.png")
    tiny_rae().save_pretrained(rae)
    line = ("scripts/reconstruct.py", "--model", rae, "--input", folder, "--output", tmp_path / "out")
    done = run_command(*line, "--data.max_megapixels", 0.01, "--data.num_workers", 0)
    assert "scan.png: ValueError: 0.02 megapixels, and data.max_megapixels is 0.01" in done.stderr
    assert "1, 1 unreadable skipped" in done.stdout
    assert "images            2\n" in run_command(*line, "--data.num_workers", 0).stdout
    done = run_command("eval_rfid.py", "--model", rae, "--data.path", folder, "--output_dir", tmp_path / "e",
                       "--metrics", "psnr", "--data.max_megapixels", 0.01, "--data.num_workers", 0)  # fmt: skip
    assert "scan.png: ValueError: 0.02 megapixels" in done.stderr


def test_more_pixels_than_pillow_allows_are_read_where_they_are_allowed():
    stream = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(stream, "PNG")
    source = HeldSource([("scan", stream.getvalue(), None)])
    with pytest.raises(UnreadableImage, match="scan: ValueError: 200 megapixels, and data.max_megapixels is 179"):
        source.load(0)
    assert HeldSource(source._images, max_megapixels=200).load(0).size == (20_000, 10_000)


@pytest.fixture(scope="module")
def odd_names(tmp_path_factory):
    """Two classes of 12 images, one of which has a name that is not UTF-8, and so have some of its files."""
    folder = os.fsencode(tmp_path_factory.mktemp("odd"))
    for name in (b"caf\xe9", b"tea"):
        os.mkdir(folder + b"/" + name)
        for i in range(12):
            pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            with open(folder + b"/" + name + b"/\xe9%d.png" % i, "wb") as file:
                Image.fromarray(pixels).save(file, "PNG")
    rae = os.fsdecode(folder) + "-rae"
    tiny_rae().save_pretrained(rae)
    return os.fsdecode(folder), rae


def test_names_that_are_not_utf8_are_written_escaped(odd_names, tmp_path):
    """In every command, from its input to its last file."""
    folder, rae = odd_names
    assert "caf\\xe9" in scan_folder(folder, ["tea", "caf\udce9"]).class_names
    options = {"data.path": folder, "data.num_workers": 0}
    run_command("scripts/reconstruct.py", "--model", rae, "--input", folder, "--output", tmp_path / "out")
    with (tmp_path / "out/images.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24 and sorted(row["name"] for row in rows)[0] == "caf\\xe9/\\xe90"
    assert (tmp_path / "out/reconstructions/caf\\xe9/\\xe90.png").is_file()
    run_command("eval_rfid.py", "--model", rae, "--metrics", "psnr", "--output_dir", tmp_path / "e", *flags(options))
    assert "\\xe9" in json.loads((tmp_path / "e/results.json").read_text())["rows"][0]["worst"][0]["name"]
    run_command("linear_probe.py", "--model", rae, "--output_dir", tmp_path / "p", "--data.holdout_fraction", 0.2,
                "--train.min_steps", 5, "--train.epochs", 1, *flags(options))  # fmt: skip
    assert "caf\\xe9" in {line["class"] for line in json.loads((tmp_path / "p/results.json").read_text())["per_class"]}
    run_command("scripts/prepare_data.py", "convert", "--input", folder, "--output", tmp_path / "hf",
                "--splits", "train:0.5,val:0.5", "--num_workers", 1)  # fmt: skip
    import datasets

    rows = datasets.load_from_disk(tmp_path / "hf")["train"]
    assert "caf\\xe9" in rows.features["label"].names and rows[0]["image"].size == (32, 32)
