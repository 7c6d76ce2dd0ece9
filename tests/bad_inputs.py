"""A corpus of unusual and malformed inputs, images, configs, weight files and model folders, and what becomes of each.

    python tests/bad_inputs.py FOLDER

writes all of it into FOLDER with manifest.json (file, what it is, outcome, words), so that a person can look at it;
tests/test_bad_inputs.py runs every case. The corpus is the same each time. Outcomes:

    read      the file is good, though of an unusual kind: the right pixels come out, the settings are those written
    skipped   an image that cannot be read: named, counted, bounded by data.max_unreadable
    ignored   no image by its name: never opened
    error     one line with `words` in it, exit code 2

Two kinds of damage cannot be seen and are "read": flipped bits in the compressed data of a JPEG, and in a weight, as
neither format has a checksum. Where such a weight makes values that are not finite, the command stops at them, with
exit code 1.
"""

import collections
import copy
import dataclasses
import functools
import gzip
import io
import json
import os
import pickle
import re
import struct
import sys
import tempfile
import typing
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any, Optional

import numpy as np
import safetensors.torch
import torch
import transformers
import yaml
from PIL import Image
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository root
from rae_suite.settings_rae import Config  # noqa: E402
from rae_suite.values import PathText, inner_type  # noqa: E402

WIDTH, HEIGHT = 40, 30  # of the picture
LOSSY = 4.0  # largest mean difference, in levels of 255, that a compressed picture may have


@dataclasses.dataclass(frozen=True)
class Case:
    """One input. `content`: the file's bytes, or of a folder {name: bytes}; None: made by `write_special`."""

    file: str
    what: str
    outcome: str
    content: Any = None
    words: tuple = ()  # of the error
    settings: Optional[dict] = None  # of a config that is read: {key: value}
    pixels: Optional[np.ndarray] = None  # of an image that is read, (H, W, 3) uint8
    tolerance: float = 0.0  # mean difference from them, in levels of 255


# Images ---------------------------------------------------------------------------------------------------------------


@functools.cache
def picture() -> np.ndarray:
    """Smooth colours, uint8 (HEIGHT, WIDTH, 3), no two of whose rotations and mirror images are alike."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    red, green, blue = 6 * x, 8 * y, 3 * x + 4 * y
    return np.stack([red, green, blue], axis=2).astype(np.uint8)


def save(image: Any, file_format: str, **options: Any) -> bytes:
    """An image file; `image` is Pillow's, or an array."""
    stream = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(stream, file_format, **options)
    return stream.getvalue()


def encode(file_format: str, mode: str = "RGB", **options: Any) -> bytes:
    return save(Image.fromarray(picture()).convert(mode), file_format, **options)


def grey_picture() -> np.ndarray:
    """The picture's luma (ITU-R 601), three equal channels."""
    luma = np.rint(picture() @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
    return np.repeat(luma[..., None], 3, axis=2)


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, color: int, rows: bytes, *chunks: bytes, interlace: int = 0) -> bytes:
    """A PNG file from its filtered rows; `chunks` go before them."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace)
    body = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(rows, 9)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def png_rows(values: np.ndarray) -> bytes:
    """Rows (H, bytes of a row), each with filter 0."""
    return b"".join(b"\0" + row.tobytes() for row in values.reshape(len(values), -1))


def interlaced_png() -> bytes:
    """The picture in Adam7's seven passes."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = b"".join(png_rows(picture()[top::down, left::right]) for top, left, down, right in passes)
    return png(WIDTH, HEIGHT, 8, 2, rows, interlace=1)


def on_white(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours (H, W, 3) with alpha (H, W) in [0, 255] on white."""
    share = alpha[..., None] / 255
    return np.rint(colors * share + 255 * (1 - share)).astype(np.uint8)


def alpha_ramp() -> np.ndarray:
    """Alpha (HEIGHT, WIDTH), transparent on the left."""
    return np.broadcast_to(np.linspace(0, 255, WIDTH).round().astype(np.uint8), (HEIGHT, WIDTH)).copy()


def upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """What EXIF says an image with `orientation` looks like: the places of its first row and first column."""
    return {
        1: lambda v: v,  # top, left
        2: lambda v: v[:, ::-1],  # top, right
        3: lambda v: v[::-1, ::-1],  # bottom, right
        4: lambda v: v[::-1],  # bottom, left
        5: lambda v: v.transpose(1, 0, 2),  # left, top
        6: lambda v: v.transpose(1, 0, 2)[:, ::-1],  # right, top
        7: lambda v: v.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
        8: lambda v: v.transpose(1, 0, 2)[::-1],  # left, bottom
    }.get(orientation, lambda v: v)(values)


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[274] = orientation
    return block


def animation(file_format: str, **options: Any) -> bytes:
    """The picture, then two frames of one colour."""
    stream = io.BytesIO()
    first = palette_image(False)[0] if file_format == "GIF" else Image.fromarray(picture())
    others = [Image.new("RGB", (WIDTH, HEIGHT), color) for color in ("red", "blue")]
    first.save(stream, file_format, save_all=True, append_images=others, **options)
    return stream.getvalue()


def few_colors() -> np.ndarray:
    """The picture in 64 colours, which a palette holds."""
    return (picture() // 64 * 85).astype(np.uint8)


def palette_image(transparent: bool) -> tuple:
    """(`few_colors` as a palette image, and as it looks with its first colour transparent or not)."""
    image = Image.fromarray(few_colors()).quantize(64, dither=Image.Dither.NONE)
    first = np.asarray(image) == 0
    return image, on_white(few_colors(), np.where(first & transparent, 0, 255))


def rgba() -> np.ndarray:
    return np.dstack([picture(), alpha_ramp()])


def grey16() -> np.ndarray:
    """16 bits of grey, the whole range."""
    return np.linspace(0, 65535, WIDTH * HEIGHT).round().astype(np.uint16).reshape(HEIGHT, WIDTH)


def eight_bit(values: np.ndarray, white: float) -> np.ndarray:
    """Grey values of [0, white] as 8-bit RGB."""
    return np.repeat(np.floor(values / white * 255 + 0.5).astype(np.uint8)[..., None], 3, axis=2)


def good_images() -> list:
    """(file, what, content, the right pixels, tolerance): images of kinds that a plain reader gets wrong."""
    photo, grey, flat = picture(), grey_picture(), few_colors()
    palette, opaque = palette_image(False)
    cases = [
        ("baseline.jpg", "JPEG", encode("JPEG", quality=95), photo, LOSSY),
        ("full.jpg", "JPEG, colours at full resolution", encode("JPEG", quality=95, subsampling=0), photo, LOSSY),
        ("progressive.jpg", "progressive JPEG", encode("JPEG", quality=95, progressive=True), photo, LOSSY),
        ("restart.jpg", "JPEG with restart markers", encode("JPEG", quality=95, restart_marker_blocks=1), photo, LOSSY),
        ("grey.jpg", "grey JPEG", encode("JPEG", "L", quality=95), grey, LOSSY),
        ("cmyk.jpg", "CMYK JPEG, inverted as Adobe does", encode("JPEG", "CMYK", quality=95), photo, LOSSY),
        (
            "icc.jpg",
            "JPEG with a damaged colour profile",
            encode("JPEG", quality=95, icc_profile=b"none"),
            photo,
            LOSSY,
        ),
        ("comment.jpg", "JPEG with 60 kB of comment", encode("JPEG", quality=95, comment=b"x" * 60_000), photo, LOSSY),
        (
            "trailing.jpg",
            "JPEG with other bytes after its end",
            encode("JPEG", quality=95) + b"tail" * 99,
            photo,
            LOSSY,
        ),
        ("camera.jpg", "MPO: a JPEG with a second picture", animation("MPO", quality=95), photo, LOSSY),
        ("rgb.png", "PNG", encode("PNG"), photo, 0),
        ("UPPER.PNG", "PNG with capital letters in its name", encode("PNG"), photo, 0),
        ("interlaced.png", "PNG in seven passes", interlaced_png(), photo, 0),
        ("grey.png", "8-bit grey PNG", save(grey[..., 0], "PNG"), grey, 0),
        (
            "one_bit.png",
            "1-bit PNG",
            save(Image.fromarray(grey[..., 0] > 99), "PNG"),
            np.where(grey > 99, 255, 0).astype(np.uint8),
            0,
        ),
        ("palette.png", "palette PNG", save(palette, "PNG"), opaque, 0),
        (
            "palette_transparent.png",
            "palette PNG with a transparent colour",
            save(palette, "PNG", transparency=0),
            palette_image(True)[1],
            0,
        ),
        ("rgba.png", "RGBA PNG", save(rgba(), "PNG"), on_white(photo, alpha_ramp()), 1),
        (
            "grey_alpha.png",
            "grey PNG with alpha",
            save(Image.fromarray(np.dstack([grey[..., 0], alpha_ramp()])), "PNG"),
            on_white(grey, alpha_ramp()),
            1,
        ),
        ("grey16.png", "16-bit grey PNG", save(grey16(), "PNG"), eight_bit(grey16(), 65535), 0),
        (
            "grey16_transparent.png",
            "16-bit grey PNG with a transparent grey",
            png(WIDTH, HEIGHT, 16, 0, png_rows(grey16().astype(">u2")), chunk(b"tRNS", struct.pack(">H", 0))),
            np.maximum(eight_bit(grey16(), 65535), np.where(grey16() == 0, 255, 0).astype(np.uint8)[..., None]),
            0,
        ),
        (
            "rgb16.png",
            "16-bit RGB PNG",
            png(WIDTH, HEIGHT, 16, 2, png_rows((photo.astype(np.uint16) * 257).astype(">u2"))),
            photo,
            0,
        ),
        (
            "color_key.png",
            "RGB PNG with a transparent colour",
            save(photo, "PNG", transparency=tuple(photo[5, 5].tolist())),
            on_white(photo, np.where((photo == photo[5, 5]).all(2), 0, 255)),
            0,
        ),
        ("animated.png", "animated PNG", animation("PNG"), photo, 0),
        ("text.png", "PNG with text", png(WIDTH, HEIGHT, 8, 2, png_rows(photo), chunk(b"tEXt", b"Title\0x")), photo, 0),
        (
            "text_bomb.png",
            "PNG with a text that unpacks to 80 MB, which the picture does not depend on",
            png(WIDTH, HEIGHT, 8, 2, png_rows(photo), chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(80_000_000), 9))),
            photo,
            0,
        ),
        ("trailing.png", "PNG with other bytes after its end", encode("PNG") + b"tail" * 99, photo, 0),
        ("lossy.webp", "WebP", encode("WEBP", quality=95), photo, LOSSY),
        ("lossless.webp", "lossless WebP", encode("WEBP", lossless=True), photo, 0),
        (
            "alpha.webp",
            "WebP with alpha",
            save(rgba(), "WEBP", lossless=True, exact=True),
            on_white(photo, alpha_ramp()),
            1,
        ),
        ("animated.webp", "animated WebP", animation("WEBP", lossless=True), photo, 0),
        ("still.gif", "GIF", save(palette, "GIF"), flat, 0),
        (
            "transparent.gif",
            "GIF with a transparent colour",
            save(palette, "GIF", transparency=0),
            palette_image(True)[1],
            0,
        ),
        ("animated.gif", "animated GIF", animation("GIF"), flat, 0),
        ("plain.tif", "TIFF", encode("TIFF"), photo, 0),
        ("lzw.tiff", "TIFF, LZW", encode("TIFF", compression="tiff_lzw"), photo, 0),
        ("deflate.tif", "TIFF, deflate", encode("TIFF", compression="tiff_adobe_deflate"), photo, 0),
        ("jpeg.tif", "TIFF, JPEG", encode("TIFF", compression="jpeg", quality=95), photo, LOSSY),
        ("cmyk.tif", "CMYK TIFF", encode("TIFF", "CMYK"), photo, 1),
        ("lab.tif", "CIE Lab TIFF", encode("TIFF", "LAB", icc_profile=b""), photo, LOSSY),
        ("grey16.tif", "16-bit grey TIFF", save(grey16(), "TIFF"), eight_bit(grey16(), 65535), 0),
        (
            "float.tif",
            "TIFF of floats in [0, 1]",
            save((grey16() / 65535).astype(np.float32), "TIFF"),
            eight_bit(grey16(), 65535),
            1,
        ),
        ("pages.tif", "TIFF of several pages", animation("TIFF"), photo, 0),
        ("alpha.tif", "RGBA TIFF", save(rgba(), "TIFF"), on_white(photo, alpha_ramp()), 1),
        ("bits24.bmp", "BMP", encode("BMP"), photo, 0),
        ("palette.bmp", "palette BMP", save(palette, "BMP"), opaque, 0),
        ("binary.ppm", "PPM", encode("PPM"), photo, 0),
        (
            "text.ppm",
            "PPM as text",
            f"P3 {WIDTH} {HEIGHT} 255\n".encode() + " ".join(map(str, photo.ravel())).encode(),
            photo,
            0,
        ),
        ("binary.pgm", "PGM", save(grey[..., 0], "PPM"), grey, 0),
        (
            "bits16.pgm",
            "16-bit PGM",
            f"P5 {WIDTH} {HEIGHT} 65535\n".encode() + grey16().astype(">u2").tobytes(),
            eight_bit(grey16(), 65535),
            0,
        ),
        (
            "bitmap.pbm",
            "PBM",
            save(Image.fromarray(grey[..., 0] > 99), "PPM"),
            np.where(grey > 99, 255, 0).astype(np.uint8),
            0,
        ),
        ("png_inside.jpg", "PNG with a JPEG's name", encode("PNG"), photo, 0),
        ("jpeg_inside.png", "JPEG with a PNG's name", encode("JPEG", quality=95), photo, LOSSY),
        ("webp_inside.gif", "WebP with a GIF's name", encode("WEBP", lossless=True), photo, 0),
        ("one_pixel.png", "1 x 1 pixel", save(photo[:1, :1], "PNG"), photo[:1, :1], 0),
        ("one_row.png", "40 x 1 pixels", save(photo[:1], "PNG"), photo[:1], 0),
        ("one_column.png", "1 x 30 pixels", save(photo[:, :1], "PNG"), photo[:, :1], 0),
        (
            "thin.png",
            "1 x 100 pixels, the thinnest that is taken",
            save(np.repeat(photo[:1, :1], 100, 0), "PNG"),
            np.repeat(photo[:1, :1], 100, 0),
            0,
        ),
        (
            "bad_exif.jpg",
            "JPEG with a damaged EXIF block",
            encode("JPEG", quality=95, exif=b"Exif\0\0nonsense"),
            photo,
            LOSSY,
        ),
    ]
    for orientation in (*range(1, 9), 0, 9):
        content = encode("JPEG", quality=95, exif=exif(orientation))
        cases.append(
            (
                f"exif_{orientation}.jpg",
                f"JPEG with EXIF orientation {orientation}",
                content,
                upright(photo, orientation),
                LOSSY,
            )
        )
    return cases


def bombs() -> dict:
    """{file: content} of small files that ask for 900 million pixels or more."""
    side = 30_000
    row = zlib.compressobj(9)
    rows = b"".join(row.compress(bytes(1 + side // 8)) for _ in range(side)) + row.flush()  # all of it is there
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    jpeg, tiff = bytearray(encode("JPEG")), bytearray(encode("TIFF"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65_500, 65_500)
    for tag in (256, 257):  # width, height: of type LONG
        entry = tiff.index(struct.pack("<H", tag), 8)
        tiff[entry : entry + 12] = struct.pack("<HHII", tag, 4, 1, side)
    gif, bmp = bytearray(encode("GIF", "P")), bytearray(encode("BMP"))
    gif[6:10] = struct.pack("<HH", 65_500, 65_500)
    bmp[18:26] = struct.pack("<ii", side, side)
    return {
        "bomb.png": whole,
        "bomb.jpg": bytes(jpeg),
        "bomb.tif": bytes(tiff),
        "bomb.gif": bytes(gif),
        "bomb.bmp": bytes(bmp),
        "bomb.ppm": f"P6 {side} {side} 255\n".encode() + bytes(100),
        "bomb.webp": b"RIFF"
        + struct.pack("<I", 22)
        + b"WEBPVP8X"
        + struct.pack("<I", 10)
        + bytes(4)
        + b"\xff\x3f\0" * 2,
    }


def bad_images() -> list:
    """(file, what, content) of images that cannot be read."""
    good = {file: content for file, _, content, _, _ in good_images()}
    cut = (
        "baseline.jpg",
        "progressive.jpg",
        "cmyk.jpg",
        "rgb.png",
        "animated.png",
        "lossy.webp",
        "lossless.webp",
        "still.gif",
        "plain.tif",
        "lzw.tiff",
        "bits24.bmp",
        "binary.ppm",
    )
    cases = [
        (f"cut_{tenths}0_{file}", f"the first {tenths}0% of {file}", good[file][: len(good[file]) * tenths // 10])
        for file in cut
        for tenths in range(1, 10)
    ]
    for tenths in range(9):  # behind the signature, before the end's own chunk
        flipped = bytearray(good["rgb.png"])
        place = 8 + (len(flipped) - 8) * tenths // 10
        flipped[place] ^= 1 << tenths % 8
        cases.append((f"flipped_{tenths}.png", f"PNG with a bit flipped in byte {place}", bytes(flipped)))
    for name in ("jpg", "png", "webp", "gif", "tif", "bmp", "ppm"):
        cases.append((f"empty.{name}", "no bytes", b""))
        cases.append((f"zeros.{name}", "1000 zero bytes", bytes(1000)))
        head = good[{"jpg": "baseline.jpg", "webp": "lossy.webp"}.get(name) or next(f for f in cut if f.endswith(name))]
        cases.append((f"signature.{name}", "the first 12 bytes", head[:12]))
    cases += [
        (file, "a small file that asks for 900 million pixels, or for much memory", c) for file, c in bombs().items()
    ]
    photo = picture()
    cases += [
        ("words.jpg", "text", b"This is no image.\n"),
        ("page.jpg", "a web page that came instead of an image", b"<!DOCTYPE html><html><body>404</body></html>"),
        ("pointer.png", "a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        ("packed.jpg", "a JPEG in gzip", gzip.compress(good["baseline.jpg"], mtime=0)),
        ("archive.png", "the beginning of a zip file", b"PK\x03\x04" + bytes(60)),
        ("vector.png", "SVG", b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'),
        ("document.png", "PDF", b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n%%EOF\n"),
        ("program.png", "EPS: a program that Ghostscript would run", postscript()),
        ("wide.png", "101 x 1 pixels", save(np.repeat(photo[:1, :1], 101, 1), "PNG")),
        ("tall.png", "1 x 5000 pixels", save(np.repeat(photo[:1, :1], 5000, 0), "PNG")),
        ("no_pixels.png", "0 x 0 pixels", png(0, 0, 8, 2, b"")),
        ("no_pixels.ppm", "0 x 0 pixels", b"P6 0 0 255\n"),
        ("negative.ppm", "a negative width", b"P6 -3 4 255\n" + bytes(36)),
        ("no_data.png", "PNG without pixels", png(WIDTH, HEIGHT, 8, 2, b"")),
        ("bad_depth.png", "PNG of 3 bits", png(WIDTH, HEIGHT, 3, 2, png_rows(photo))),
        (
            "bad_filter.png",
            "PNG with an unknown row filter",
            png(WIDTH, HEIGHT, 8, 2, png_rows(photo).replace(b"\0" + photo[9].tobytes(), b"\x09" + photo[9].tobytes())),
        ),
        ("no_palette.png", "palette PNG without a palette", png(WIDTH, HEIGHT, 8, 3, png_rows(photo[..., 0]))),
        ("no_frames.gif", "GIF without an image", good["still.gif"][:13] + b";"),
        ("loop.tif", "TIFF whose directory is outside of the file", b"II*\0" + struct.pack("<I", 2**31)),
        ("no_tags.tif", "TIFF with an empty directory", b"II*\0" + struct.pack("<IHI", 8, 0, 0)),
        (
            "short_rows.bmp",
            "BMP whose rows lie behind its end",
            good["bits24.bmp"][:10] + struct.pack("<I", 10**6) + good["bits24.bmp"][14:],
        ),
        ("bad_number.ppm", "PPM with a word for a width", b"P6 wide 4 255\n" + bytes(36)),
        ("too_bright.ppm", "PPM with a value over its maximum", b"P3 1 1 255\n300 0 0\n"),
        (
            "no_tables.jpg",
            "JPEG without its quantisation tables",
            good["baseline.jpg"].replace(b"\xff\xdb", b"\xff\xfe"),
        ),
        ("markers.jpg", "JPEG of nothing but its first marker", b"\xff\xd8" * 500),
    ]
    return cases


def postscript() -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n0 0 40 30 rectfill\nshowpage\n%%EOF\n"


def image_cases() -> list:
    cases = [Case(f"images/{f}", what, "read", c, pixels=p, tolerance=t) for f, what, c, p, t in good_images()]
    cases += [Case(f"images/{file}", what, "skipped", content) for file, what, content in bad_images()]
    cases += [
        Case("images/pipe.png", "a named pipe, which nobody writes to", "skipped"),
        Case("images/zero.png", "a link to a device that has no end", "skipped"),
        Case("images/gone.png", "a link to nothing", "skipped"),
        Case("images/notes.txt", "a text file", "ignored", b"notes\n"),
        Case("images/.hidden.png", "a hidden file", "ignored", b""),
        Case("images/photo.heic", "an image of a kind that is not taken", "ignored", b"....ftypheic"),
        Case("images/none", "a file without extension", "ignored", encode("PNG")),
        Case("images/folder.png", "a folder with an image's name and nothing in it", "ignored"),
    ]
    return cases


def write_special(path: Path) -> None:
    """What bytes alone do not make."""
    if path.name == "pipe.png":
        os.mkfifo(path)
    elif path.name == "folder.png":
        path.mkdir()
    else:
        path.symlink_to({"zero.png": "/dev/zero", "gone.png": "nowhere"}[path.name])


# Configs --------------------------------------------------------------------------------------------------------------


def settings_of(schema: type, prefix: str = "") -> dict:
    """{key: type} of every setting of a config's dataclass, and {key: dataclass} of every group."""
    found = {}
    for item in dataclasses.fields(schema):
        is_group = dataclasses.is_dataclass(item.default_factory)
        found[prefix + item.name] = item.default_factory if is_group else item.type
        if is_group:
            found.update(settings_of(item.default_factory, f"{prefix}{item.name}."))
    return found


def wrong_values(kind: Any) -> dict:
    """{name: value} of what no setting of a type takes. A text takes every word, and a list a single one."""
    inner = inner_type(kind)
    origin, parts = typing.get_origin(inner), typing.get_args(inner)
    word = parts[0] if origin is tuple else inner
    wrong = {"list": [[]]}
    if origin is not dict:
        wrong["mapping"] = {"a": 1}
    if word not in (str, PathText):
        wrong["word"] = "words"
    if word not in (str, PathText, bool):
        wrong["switch"] = True
    if word is bool or origin is dict or typing.get_origin(word) is typing.Literal:
        wrong["number"] = 5
    if word in (int, bool):
        wrong["fraction"] = 1.5
    if word is float:
        wrong |= {"nan": float("nan"), "huge": 1e308}
    if word in (int, float):
        wrong["digits"] = 10**400
    if kind is inner:
        wrong["null"] = None
    return wrong


def nested(key: str, value: Any) -> str:
    """YAML in which the setting has the value."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return yaml.safe_dump(value)


def config_cases() -> list:
    cases = []
    for key, kind in settings_of(Config).items():
        is_group = dataclasses.is_dataclass(kind)
        wrong = {"word": "words", "number": 5, "list": ["a"], "null": None} if is_group else wrong_values(kind)
        for name, value in wrong.items():
            what = f"{key} is {value!r}"
            cases.append(Case(f"configs/{key}_{name}.yaml", what, "error", nested(key, value).encode(), (key,)))
        if is_group:
            unknown, words = f"{key}.no_such_setting", (key.split(".")[0], "no_such_setting")
            cases.append(Case(f"configs/{unknown}.yaml", "an unknown key", "error", nested(unknown, 1).encode(), words))
    good = "train: {seed: 4}\n"
    texts = {
        "no_such_group": ("an unknown group", "no_such_group: {weight: 1}", "no_such_group"),
        "no_such_setting": ("an unknown setting beside the groups", "seed: 1", "did you mean train.seed"),
        "setting_of_another_group": ("a setting in the wrong group", "train: {lr: 1}", "did you mean optimizer.lr"),
        "empty": ("nothing", "", "found nothing"),
        "blank": ("blank lines", " \n\n", "found nothing"),
        "comment": ("a comment alone", "# train: {seed: 1}\n", "found nothing"),
        "null": ("null", "null", "found nothing"),
        "list": ("a list", "- train\n", "found [train]"),
        "number": ("a number", "5", "found 5"),
        "words": ("words", "just words", "found just words"),
        "page": ("a web page", "<!DOCTYPE html>\n<html><body>404: not found</body></html>", "YAML"),
        "python": ("Python", "seed = 1\nepochs = 3\n", "found seed = 1"),
        "toml": ("TOML", "[train]\nseed = 1\n", "line 2"),
        "latin1": ("text in Latin-1", "train: {output_dir: r\xe9sum\xe9}".encode("latin-1"), "utf-8"),
        "utf16": ("text in UTF-16", good.encode("utf-16"), "utf-8"),
        "image": ("an image", encode("PNG"), "utf-8"),
        "zeros": ("zero bytes", bytes(1000), "#x0000"),
        "control": ("a control character", "train: {output_dir: a\x07}", "#x0007"),
        "tab": ("a tab as indentation", "train:\n\tseed: 1\n", "line 2"),
        "indentation": ("wrong indentation", "train:\n  seed: 1\n epochs: 2\n", "line 3"),
        "cut_mapping": ("a mapping cut off", "train: {seed: 1", "line 1"),
        "cut_text": ("a text cut off", 'train: {output_dir: "runs', "line 1"),
        "colons": ("a colon too many", "train: {seed: 1}: x", "line 1"),
        "no_anchor": ("an alias without an anchor", "train: {seed: *s}", "undefined alias"),
        "anchor_twice": ("an anchor given twice", "data: {path: &a x, train_split: &a y}", "duplicate anchor"),
        "anchor_type": ("an alias of another type", "optimizer: {lr: &a 0.5}\ntrain: {seed: *a}", "train.seed"),
        "anchor_unknown": ("an anchor under an unknown key", "x: &o {lr: 0.5}\noptimizer: *o\n", "x"),
        "anchor_empty": ("an anchor without a name", "train: &\n  seed: 1\n", "line 1"),
        "anchor_alone": ("an anchor of nothing", "train: &t\n", "train"),
        "loop": ("an alias within its own anchor", "model: &m {encoder_config: {x: *m}}", "model.encoder_config"),
        "loop_of_all": ("a file that contains itself", "&all {train: *all}", "train.train"),
        "merge_number": ("a merge of a number", "train: {<<: 5}", "line 1"),
        "merge_list": ("a merge of numbers", "train: {<<: [1, 2]}", "line 1"),
        "merge_nothing": ("a merge without an anchor", "gan: {optimizer: {<<: *o}}", "undefined alias"),
        "merge_unknown": ("a merge of unknown keys", "data: &d {path: x}\ntrain: {<<: *d}", "train.path"),
        "deep_lists": ("100,000 lists in each other", "[" * 100_000, "nested too deeply"),
        "deep_mappings": (
            "1000 mappings in each other",
            "gan: " + "{a: " * 1000 + "1" + "}" * 1000,
            "nested too deeply",
        ),
        "setting_twice": ("a setting given twice", "train: {seed: 1, seed: 2}", "'seed' given twice"),
        "group_twice": (
            "a group given twice",
            "train: {seed: 1}\ngan: {weight: 1}\ntrain: {epochs: 3}",
            "'train' given twice",
        ),
        "two_documents": ("two documents", good + "---\n" + good, "single document"),
        "version": ("YAML of a coming version", "%YAML 9.9\n---\n" + good, "line 1"),
        "run_code": (
            "a call of a function",
            "train: {output_dir: !!python/object/apply:os.mkdir [SPRUNG]}",
            "os.mkdir",
        ),
        "name_code": ("the name of a function", "train: {output_dir: !!python/name:os.mkdir }", "os.mkdir"),
        "tag": ("an unknown tag", "train: {seed: !seed 1}", "!seed"),
        "class_path": (
            "the path of a class",
            "gan: {class_path: os.mkdir, init_args: {path: SPRUNG}}",
            "gan.class_path",
        ),
        "binary": ("bytes for a text", "train: {output_dir: !!binary aGVsbG8=}", "binary is not for settings"),
        "number_key": ("a number for a key", "train: {1: 2}", "1"),
        "no_key": ("null for a key", "null: 2", "null"),
        "list_key": ("a list for a key", "? [a, b]\n: 1\n", "no text in line 1"),
        "huge_number": ("a number of 5000 digits", f"train: {{seed: {'9' * 5000}}}", "(5000 characters)"),
        "infinite": ("a number too large for a float", "optimizer: {lr: 1.0e999}", "optimizer.lr"),
        "huge_in_list": ("a huge number in a list", "optimizer: {betas: [0.9, 1.0e+308]}", "optimizer.betas"),
        "digits_in_list": (
            "one of 400 digits in a list",
            f"optimizer: {{betas: [0.9, {'9' * 400}]}}",
            "optimizer.betas: expected a number of at most 1e+12, got [0.9, inf]",
        ),
        "hexadecimal": ("300 hexadecimal digits", f"optimizer: {{lr: 0x{'f' * 300}}}", "optimizer.lr"),
        "threads": ("more threads than start", "train: {cpu_threads: 20000}", "train.cpu_threads: expected at most"),
        "workers": ("too many processes", "data: {num_workers: 3000}", "data.num_workers: expected at most"),
        "two_years": ("a time limit that ends at once", "train: {timeout_minutes: 1.1e+6}", "train.timeout_minutes"),
        "zero_byte": ("a path that no system takes", 'train: {output_dir: "a\\0b"}', "train.output_dir"),
    }
    for name, (what, text, words) in texts.items():
        content = text if isinstance(text, bytes) else text.encode()
        cases.append(Case(f"configs/{name}.yaml", what, "error", content, (words,)))
    read = {
        "byte_order_mark": ("text with a byte order mark", "\ufeff" + good, {"train.seed": 4}),
        "windows": ("lines that end as on Windows", "train:\r\n  seed: 4\r\n", {"train.seed": 4}),
        "json": ("JSON", '{"train": {"seed": 4}}', {"train.seed": 4}),
        "quoted": ("a number in quotes", "train: {seed: '4'}", {"train.seed": 4}),
        "exponent": ("a number that PyYAML alone takes for text", "optimizer: {lr: 1e-3}", {"optimizer.lr": 1e-3}),
        "date": ("a date for a text", "train: {output_dir: 2024-01-01}", {"train.output_dir": "2024-01-01"}),
        "merge": (
            "a group merged into another",
            "optimizer: &o {lr: 0.5, eps: 0.1}\ngan: {optimizer: {<<: *o, eps: 0.2}}",
            {"optimizer.eps": 0.1, "gan.optimizer.lr": 0.5, "gan.optimizer.eps": 0.2},
        ),
    }
    for name, (what, text, settings) in read.items():
        cases.append(Case(f"configs/{name}.yaml", what, "read", text.encode(), settings=settings))
    return cases


# Weight files and model folders ---------------------------------------------------------------------------------------


class Trap:
    """What creates a file where it is unpickled by a reader that runs what a pickle asks for: a folder `SPRUNG` in the
    working directory."""

    def __reduce__(self):
        return (os.mkdir, ("SPRUNG",))


HOSTILE_CODE = b"import os\n\nos.mkdir('SPRUNG')\n"  # of a .py file


def torch_file(held: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(held, stream, **options)
    return stream.getvalue()


def trap_files() -> dict:
    """{name: content} of files that run code in a careless reader."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:  # torch.save's format by hand
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), pickle.dumps({"x": Trap()}, 2))
        archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")
    with warnings.catch_warnings():  # both are deprecated
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.save(torch.jit.script(torch.nn.Identity()), scripted := io.BytesIO())
    return {
        "trap_torch": torch_file({"mean": torch.ones(2), "x": Trap()}),
        "trap_torch_alone": torch_file(Trap()),
        "trap_old_torch": torch_file({"x": Trap()}, _use_new_zipfile_serialization=False),
        "trap_zip": packed.getvalue(),
        "trap_pickle": pickle.dumps({"x": Trap()}),
        "trap_pickle_0": pickle.dumps(Trap(), 0),
        "script": scripted.getvalue(),
    }


def damaged_safetensors(content: bytes) -> dict:
    """{name: content} of damage that shows in a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]

    def rebuilt(change: Any) -> bytes:
        """With a changed header."""
        changed = copy.deepcopy(header)
        change(changed[max(name for name in changed if name != "__metadata__")])
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + data

    damaged = {f"cut_{tenths}0": content[: len(content) * tenths // 10] for tenths in range(10)}
    for place in (0, 3, 7, 8, 9, 20, length // 2, length):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        damaged[f"flipped_{place}"] = bytes(flipped)
    return damaged | {
        "longer": content + bytes(100),
        "zeros": bytes(len(content)),
        "huge_header": struct.pack("<Q", 2**62) + content[8:],
        "long_header": struct.pack("<Q", len(content)) + content[8:],
        "no_json": content[:8] + b"x" * length + data,
        "outside": rebuilt(lambda tensor: tensor["data_offsets"].__setitem__(1, 2**40)),
        "backwards": rebuilt(lambda tensor: tensor["data_offsets"].reverse()),
        "negative": rebuilt(lambda tensor: tensor["data_offsets"].__setitem__(0, -4)),
        "other_shape": rebuilt(lambda tensor: tensor["shape"].append(2)),
        "huge_shape": rebuilt(lambda tensor: tensor.__setitem__("shape", [2**40, 2**40])),
        "other_type": rebuilt(lambda tensor: tensor.__setitem__("dtype", "F99")),
    }


@functools.cache
def model_files() -> dict:
    """{name: content} of a tiny RAE's folder."""
    from conftest import tiny_rae  # of tests/

    with tempfile.TemporaryDirectory() as folder:
        tiny_rae(use_latent_stats=True).save_pretrained(folder)
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


def changed_config(**changes: Any) -> dict:
    """A model folder whose config.json has other values; of `encoder_config` too, with `encoder_*` written as there."""
    config = json.loads(model_files()["config.json"])
    for name, value in changes.items():
        part, name = (config["encoder_config"], name[2:]) if name.startswith("e_") else (config, name)
        part[name] = value
        if value is ...:
            del part[name]
    return model_files() | {"config.json": json.dumps(config).encode()}


def changed_weights(change: Any) -> dict:
    """A model folder after `change` of its tensors."""
    tensors = safetensors.torch.load(model_files()["model.safetensors"])
    change(tensors)
    return model_files() | {"model.safetensors": safetensors.torch.save(tensors, {"format": "pt"})}


def absurd_values() -> list:
    """(key, value, words of the error) of values in a config.json that no network has: numbers, and attention that is
    code on the Hub. `e_*` is of the encoder."""
    inf, nan, kernel = float("inf"), float("nan"), "some/kernel"
    numbers = [
        (key, 10**9, f"{key.removeprefix('e_')} is 1000000000, expected at most 1000000")
        for key in ("num_labels", "e_num_labels", "e_vocab_size", "e_intermediate_size", "e_hidden_size",
                    "e_patch_size", "e_num_channels", "e_image_size", "e_num_attention_heads", "e_mlp_ratio",
                    "e_num_register_tokens", "e_max_position_embeddings", "decoder_intermediate_size")
    ]  # fmt: skip
    numbers += [(key, 10**9, "expected at most 1000") for key in ("e_num_hidden_layers", "decoder_num_hidden_layers")]
    numbers += [
        (key, value, "expected a finite number")
        for key in ("noise_tau", "scaling_factor", "decoder_layer_norm_eps", "e_layer_norm_eps", "e_layerscale_value")
        for value in (inf, nan)
    ]
    numbers += [
        (key, [0.5, value, 0.5], f"{key} is ") for key in ("image_mean", "image_std") for value in (inf, -inf, nan)
    ]
    numbers.append(("e_text_config", {"num_labels": 10**9}, "num_labels is 1000000000"))
    attention = [
        (f"{part}{key}", value, f"{key} is '{kernel}', expected one of eager,")
        for part in ("", "e_")
        for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
        for value in (kernel, {"": kernel}, {"": "sdpa", "encoder_config": kernel})
    ]
    return [*numbers, *attention, ("attn_implementation", f"{kernel}:function", f"'{kernel}:function'")]


def model_cases() -> list:
    """Folders of RAEs. All are errors but those that hold more than is needed."""
    good = model_files()
    weights, config = good["model.safetensors"], good["config.json"]
    without = {name: {n: c for n, c in good.items() if n != name} for name in good}
    index = {"metadata": {}, "weight_map": {"decoder.decoder_pred.weight": "model-00001-of-00002.safetensors"}}
    outside = {"metadata": {}, "weight_map": {"decoder.decoder_pred.weight": "../../other/model.safetensors"}}
    name = "decoder.decoder_pred.weight"
    cases = {
        "empty": ("an empty folder", {}, "config.json"),
        "no_config": ("no config.json", without["config.json"], "config.json"),
        "no_weights": ("no weights", without["model.safetensors"], "model.safetensors"),
        "config_empty": ("an empty config.json", good | {"config.json": b""}, "config.json"),
        "config_cut": ("a config.json cut off", good | {"config.json": config[: len(config) // 2]}, "config.json"),
        "config_words": ("words for a config.json", good | {"config.json": b"words"}, "config.json"),
        "config_list": ("a list for a config.json", good | {"config.json": b"[1]"}, "config.json"),
        "config_null": ("null for a config.json", good | {"config.json": b"null"}, "config.json"),
        "config_latin1": (
            "a config.json in Latin-1",
            good | {"config.json": b'{"model_type": "ra\xe9"}'},
            "config.json",
        ),
        "config_zeros": ("zero bytes for a config.json", good | {"config.json": bytes(500)}, "config.json"),
        "config_deep": ("a config.json nested 100,000 deep", good | {"config.json": b"[" * 100_000}, "config.json"),
        "weights_lack": ("a tensor is missing", changed_weights(lambda t: t.pop(name)), name),
        "weights_extra": ("a tensor too many", changed_weights(lambda t: t.update(more=torch.ones(1))), "more"),
        "weights_shape": ("a tensor of another shape", changed_weights(lambda t: t.update({name: t[name][:8]})), name),
        "weights_scalar": (
            "a number for a matrix",
            changed_weights(lambda t: t.update({name: torch.tensor(1.0)})),
            name,
        ),
        "weights_none": ("no tensors", changed_weights(lambda t: t.clear()), "model"),
        "index_missing": (
            "an index of files that are missing",
            without["model.safetensors"] | {"model.safetensors.index.json": json.dumps(index).encode()},
            "model",
        ),
        "index_outside": (
            "an index that leads out of the folder",
            without["model.safetensors"] | {"model.safetensors.index.json": json.dumps(outside).encode()},
            "model",
        ),
        "index_words": (
            "words for an index",
            without["model.safetensors"] | {"model.safetensors.index.json": b"words"},
            "model",
        ),
        "index_list": (
            "a list for an index",
            without["model.safetensors"] | {"model.safetensors.index.json": b"[]"},
            "model",
        ),
        "bin_trap": (
            "a pickle that runs code for weights",
            without["model.safetensors"] | {"pytorch_model.bin": torch_file({name: Trap()})},
            "model",
        ),
        "bin_old_trap": (
            "the same in the old format",
            without["model.safetensors"] | {"pytorch_model.bin": pickle.dumps(Trap())},
            "model",
        ),
        "pt_trap": (
            "the same under another name",
            without["model.safetensors"] | {"model.pt": torch_file({name: Trap()})},
            "model",
        ),
        "safetensors_trap": (
            "the same in model.safetensors",
            good | {"model.safetensors": pickle.dumps(Trap())},
            "model.safetensors",
        ),
    }
    for damage, content in damaged_safetensors(weights).items():
        cases[f"weights_{damage}"] = (f"weights: {damage}", good | {"model.safetensors": content}, "model.safetensors")
    settings = json.loads(config)
    for key in settings:
        if key.startswith(("encoder_", "decoder_", "image_")) or key in ("noise_tau", "scaling_factor", "model_type"):
            for kind, wrong in (("word", "words"), ("list", [["x"]]), ("mapping", {"a": 1})):
                if key not in ("encoder_id", "encoder_revision", "encoder_final_norm") or kind != "word":
                    cases[f"{key}_{kind}"] = (f"{key} is {wrong!r}", changed_config(**{key: wrong}), key)
    for key, wrong in (
        ("model_type", "vit"),
        ("model_type", None),
        ("model_type", ...),
        ("encoder_config", ...),
        ("encoder_config", None),
        ("e_model_type", "no_such_type"),
        ("e_model_type", "bert"),
        ("e_model_type", ...),
        ("e_model_type", 5),
        ("e_hidden_size", "wide"),
        ("e_hidden_size", 32),
        ("e_hidden_size", -16),
        ("e_hidden_size", 10**12),
        ("e_hidden_size", None),
        ("e_patch_size", 0),
        ("e_patch_size", "x"),
        ("e_patch_size", []),
        ("e_num_hidden_layers", -1),
        ("e_num_hidden_layers", 2),
        ("e_num_hidden_layers", 10**9),
        ("e_num_attention_heads", 3),
        ("e_num_attention_heads", 0),
        ("e_image_size", 0),
        ("e_image_size", -3),
        ("e_hidden_act", "no_such_function"),
        ("e_layer_norm_eps", "x"),
        ("e_num_register_tokens", 9),
        ("encoder_input_size", 0),
        ("encoder_input_size", -32),
        ("encoder_input_size", 30),
        ("encoder_input_size", 64),
        ("encoder_layers", [0, 5]),
        ("encoder_layers", []),
        ("encoder_prefix_tokens", -1),
        ("encoder_prefix_tokens", 99),
        ("encoder_final_norm", "no_such_norm"),
        ("encoder_bundled", False),
        ("image_mean", [0.5]),
        ("image_std", [0, 0, 0]),
        ("image_std", None),
        ("decoder_hidden_size", 0),
        ("decoder_hidden_size", 64),
        ("decoder_hidden_size", 10**12),
        ("decoder_hidden_size", -32),
        ("decoder_hidden_size", None),
        ("decoder_num_hidden_layers", -1),
        ("decoder_num_hidden_layers", 2),
        ("decoder_num_hidden_layers", 0),
        ("decoder_num_hidden_layers", 10**9),
        ("decoder_num_attention_heads", 0),
        ("decoder_num_attention_heads", 5),
        ("decoder_num_attention_heads", -2),
        ("decoder_intermediate_size", -1),
        ("decoder_intermediate_size", 65),
        ("decoder_patch_size", 0),
        ("decoder_patch_size", 7),
        ("decoder_patch_size", 1.5),
        ("decoder_layer_norm_eps", -1.0),
        ("decoder_hidden_act", "no_such_function"),
        ("use_latent_stats", False),
        ("use_latent_stats", "maybe"),
        ("latent_stats_have_mean", False),
        ("latent_stats_have_mean", "maybe"),
        ("encoder_keep_final_affine", True),
        ("encoder_keep_final_affine", "maybe"),
        ("scaling_factor", 0),
        ("scaling_factor", None),
        ("noise_tau", -1),
        ("noise_distribution", "normal"),
        ("dtype", "float7"),
        ("attn_implementation", "no_such_attention"),
        ("quantization_config", {"load_in_8bit": True}),
    ):
        given = "missing" if wrong is ... else re.sub(r"[^\w-]+", "_", str(wrong))
        cases[f"{key}_is_{given}"] = (f"{key} is {given}", changed_config(**{key: wrong}), "")
    for key, wrong, words in absurd_values():
        cases[f"{key}_is_absurd_{len(cases)}"] = (f"{key} is {wrong!r}", changed_config(**{key: wrong}), words)
    tensor = weights.index(safetensors.torch.load(weights)[name].numpy().tobytes())
    flipped = bytearray(weights)
    flipped[tensor] ^= 1  # the last bit of a number
    bad_encoder = {
        "encoder_config": json.loads(config)["encoder_config"] | {"auto_map": {"AutoModel": "hostile.Model"}}
    }
    read = {
        "flipped_weight": ("a flipped bit in a weight", good | {"model.safetensors": bytes(flipped)}),
        "hostile_code": ("code that runs where it is trusted", good | {"modeling_rae.py": HOSTILE_CODE}),
        "hostile_encoder": ("the same for its encoder", changed_config(**bad_encoder) | {"hostile.py": HOSTILE_CODE}),
        "bin_beside": ("a pickle beside the weights", good | {"pytorch_model.bin": torch_file({name: Trap()})}),
    }
    return [
        *(Case(f"models/{name}", what, "error", files, (words,)) for name, (what, files, words) in cases.items()),
        *(Case(f"models/{name}", what, "read", files) for name, (what, files) in read.items()),
    ]


def statistics() -> dict:
    """Latent statistics of the tiny RAE."""
    return {"mean": torch.zeros(16, 4, 4), "var": torch.ones(16, 4, 4)}


def file_cases() -> list:
    """Files of latent statistics, which are no weights of a VGG16 or ViT either."""
    stats = statistics()
    safe, new = safetensors.torch.save(stats), torch_file(stats)
    # the old format has a storage's address in memory for its key, behind the key's length: one storage, one fixed key
    one = torch.stack([stats["mean"], stats["var"]])
    old = re.sub(
        rb"X....\d{9,}",
        b"X" + struct.pack("<I", 20) + b"0" * 20,
        torch_file({"mean": one[0], "var": one[1]}, _use_new_zipfile_serialization=False),
        flags=re.DOTALL,
    )
    wrong = {f"{name}.safetensors": content for name, content in damaged_safetensors(safe).items()}
    for tenths in range(10):
        wrong[f"cut_{tenths}0.pt"] = new[: len(new) * tenths // 10]
        wrong[f"old_cut_{tenths}0.pt"] = old[: len(old) * tenths // 10]
    for name, content in trap_files().items():
        wrong |= {f"{name}.pt": content, f"{name}.safetensors": content}
    wrong |= {"safetensors.pt": safe, "torch.safetensors": new, "image.pt": encode("PNG"), "words.pt": b"words"}
    for name, held in {
        "list": [1, 2],
        "tensor": torch.ones(3),
        "nothing": None,
        "text": "words",
        "no_tensors": {},
        "nested": {"ema": stats},
        "numbers": {"mean": 0.0, "var": 1.0},
        "number_keys": {1: torch.ones(1)},
        "integers": {name: value.long() for name, value in stats.items()},
        "complex": {name: value.to(torch.complex64) for name, value in stats.items()},
        "sparse": {name: value.to_sparse() for name, value in stats.items()},
        "no_values": {name: value.to("meta") for name, value in stats.items()},
        "not_finite": {**stats, "mean": stats["mean"] + float("nan")},
        "negative": {**stats, "var": -stats["var"]},
        "other_shape": {name: value[:8] for name, value in stats.items()},
        "no_var": {"mean": stats["mean"]},
        "arrays": {name: value.numpy() for name, value in stats.items()},
        "module": torch.nn.Identity(),
    }.items():
        wrong[f"{name}.pt"] = torch_file(held)
    flipped = bytearray(safe)
    flipped[-2] ^= 1  # of the last number
    read = {"good.safetensors": safe, "good.pt": new, "good_old.pt": old, "flipped_weight.safetensors": bytes(flipped)}
    return [
        *(Case(f"files/{name}", f"tensors: {name}", "error", content, (name,)) for name, content in wrong.items()),
        *(Case(f"files/{name}", f"tensors: {name}", "read", content) for name, content in read.items()),
    ]


def reference_cases() -> list:
    """.npz files for eval_rfid.py --reference, of features of width 4."""

    def npz(**arrays: Any) -> bytes:
        np.savez(stream := io.BytesIO(), **arrays)
        return stream.getvalue()

    mu, sigma, images = np.zeros(4), np.eye(4), np.zeros((5, 8, 8, 3), np.uint8)
    good, pictures = npz(mu=mu, sigma=sigma), npz(arr_0=images)
    wrong = {f"cut_{tenths}0": good[: len(good) * tenths // 10] for tenths in range(10)}
    wrong |= {
        "trap": npz(mu=np.array([Trap()]), sigma=sigma),
        "trap_images": npz(arr_0=np.array([Trap()])),
        "trap_pickle": pickle.dumps(Trap()),
        "words": b"words",
        "other_names": npz(mean=mu, cov=sigma),
        "no_sigma": npz(mu=mu),
        "width": npz(mu=mu[:3], sigma=sigma[:3, :3]),
        "not_square": npz(mu=mu, sigma=sigma[:3]),
        "not_finite": npz(mu=mu + np.nan, sigma=sigma),
        "text": npz(mu=np.array(["a"] * 4), sigma=sigma),
        "complex": npz(mu=mu + 1j, sigma=sigma),
        "one_image": npz(arr_0=images[:1]),
        "no_images": npz(arr_0=images[:0]),
        "channels": npz(arr_0=images[..., :1]),
        "floats": npz(arr_0=images / 255),
        "flipped": pictures[:200] + bytes([pictures[200] ^ 1]) + pictures[201:],
    }
    return [
        *(Case(f"references/{n}.npz", f"reference: {n}", "error", c, ("reference", n)) for n, c in wrong.items()),
        *(Case(f"references/{n}.npz", f"reference: {n}", "read", c) for n, c in (("good", good), ("images", pictures))),
    ]


def metrics_cases() -> list:
    """metrics.jsonl of a run."""
    line = b'{"kind": "train", "step": 1, "loss": 0.5}\n'
    wrong = {
        "words": b"words\n",
        "cut": line[:20] + b"\n" + line,
        "zeros": line + bytes(30) + b"\n",
        "latin1": line + b'{"kind": "\xe9", "step": 2}\n',
        "list": b"[1, 2]\n",
        "number": b"5\n",
        "no_step": line + b'{"kind": "train"}\n',
        "no_kind": line + b'{"step": 2}\n',
        "text_step": line + b'{"kind": "train", "step": "2"}\n',
        "no_model": line + b'{"kind": "eval", "step": 0, "num_samples": 8}\n',
        "no_number_of_images": line + b'{"kind": "eval", "step": 0, "model": "ema"}\n',
        "text_loss": line + b'{"kind": "train", "step": 2, "loss": "0.5"}\n',
        "blank": line + b"\n" + line,
        "deep": b"[" * 100_000 + b"\n",
    }
    read = {"good": line, "nothing": b"", "cut_end": line + line[:20], "zeros_at_the_end": line + bytes(30)}
    return [
        *(Case(f"metrics/{n}.jsonl", f"metrics: {n}", "error", c, (f"{n}.jsonl", "line")) for n, c in wrong.items()),
        *(Case(f"metrics/{n}.jsonl", f"metrics: {n}", "read", c) for n, c in read.items()),
    ]


def encoder_cases() -> list:
    """Folders for model.encoder and gan.backbone that hold code, as code or as pickles. None of it may run."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
        transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
        transformers.ViTImageProcessor().save_pretrained(folder)
        good = {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}
    settings = json.loads(good["config.json"])
    processor = json.loads(good["preprocessor_config.json"])
    code = {"hostile.py": HOSTILE_CODE}
    auto_map = {"auto_map": {"AutoConfig": "hostile.Config", "AutoModel": "hostile.Model"}}
    hostile_processor = processor | {"auto_map": {"AutoImageProcessor": "hostile.Processor"}}
    no_weights = {name: content for name, content in good.items() if name != "model.safetensors"}

    def as_json(held: dict) -> bytes:
        return json.dumps(held).encode()

    said = {}  # words of errors beside the folder's name
    wrong = {
        "unknown_type": good | code | {"config.json": as_json(settings | auto_map | {"model_type": "hostile"})},
        "no_type": good | code | {"config.json": as_json(auto_map)},
        "bin_trap": no_weights | {"pytorch_model.bin": torch_file({"x": Trap()})},
        "old_bin_trap": no_weights | {"pytorch_model.bin": pickle.dumps(Trap())},
        "safetensors_trap": good | {"model.safetensors": pickle.dumps(Trap())},
        "no_weights": no_weights,
    }
    for key, value, words in absurd_values():
        if key.startswith("e_"):  # of a network that transformers has
            changed = good | {"config.json": as_json(settings | {key.removeprefix("e_"): value})}
            name = f"absurd_{len(wrong)}"
            wrong[name] = changed
            said[name] = words
    wrong["std"] = good | {"preprocessor_config.json": as_json(processor | {"image_std": [0.5, float("inf"), 0.5]})}
    said["std"] = "image_std: expected three positive numbers"
    read = {
        "known_type": good | code | {"config.json": as_json(settings | auto_map)},
        "processor": good | code | {"preprocessor_config.json": as_json(hostile_processor)},
        "bin_beside": good | {"pytorch_model.bin": torch_file({"x": Trap()})},
    }
    return [
        *(Case(f"encoders/{n}", f"encoder: {n}", "error", files, (n, said.get(n, ""))) for n, files in wrong.items()),
        *(Case(f"encoders/{name}", f"encoder: {name}", "read", files) for name, files in read.items()),
    ]


# The corpus -----------------------------------------------------------------------------------------------------------


def corpus() -> list:
    return [
        *image_cases(),
        *config_cases(),
        *model_cases(),
        *file_cases(),
        *reference_cases(),
        *metrics_cases(),
        *encoder_cases(),
    ]


def write(cases: list, folder: Path) -> None:
    """Write the cases below `folder`."""
    for case in cases:
        path = folder / case.file
        files = case.content if isinstance(case.content, dict) else {".": case.content}
        (path if isinstance(case.content, dict) else path.parent).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_special(path) if content is None else (path / name).write_bytes(content)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("expected: python tests/bad_inputs.py FOLDER")
    disable_progress_bar()
    folder, cases = Path(sys.argv[1]), corpus()
    folder.mkdir(parents=True)
    write(cases, folder)
    listed = [{name: getattr(case, name) for name in ("file", "what", "outcome", "words")} for case in cases]
    (folder / "manifest.json").write_text(json.dumps(listed, indent=1) + "\n")
    for outcome, number in collections.Counter(case.outcome for case in cases).items():
        print(f"{outcome:<10}{number:>6}")


if __name__ == "__main__":
    main()
