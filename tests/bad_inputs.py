"""A corpus of unusual and malformed inputs: images, configs, weight files and model folders, each with what becomes of it.

    python tests/bad_inputs.py FOLDER

writes all of it into FOLDER with manifest.json (file, what it is, outcome, words), so that a person can look at it;
tests/test_bad_inputs.py runs every case. The corpus is the same each time. Outcomes:

    read      the file is good, though of an unusual kind: the right pixels come out, the settings are those written
    skipped   an image that cannot be read: named, counted, bounded by data.max_unreadable
    ignored   no image by its name: never opened
    error     one line with `words` in it, exit code 2

Two kinds of damage cannot be seen and are "read": flipped bits in a JPEG's compressed data, and in a weight, for which
neither format has a checksum. (What is then not finite stops later, see test_weights_that_are_not_finite.)
"""

import dataclasses
import functools
import gzip
import io
import json
import os
import pickle
import re
import shutil
import struct
import sys
import tempfile
import typing
import zlib
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository root

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
        ("icc.jpg", "JPEG with a damaged colour profile", encode("JPEG", quality=95, icc_profile=b"none"), photo, LOSSY),
        ("comment.jpg", "JPEG with 60 kB of comment", encode("JPEG", quality=95, comment=b"x" * 60_000), photo, LOSSY),
        ("trailing.jpg", "JPEG with other bytes after its end", encode("JPEG", quality=95) + b"tail" * 99, photo, LOSSY),
        ("camera.jpg", "MPO: a JPEG with a second picture", animation("MPO", quality=95), photo, LOSSY),
        ("rgb.png", "PNG", encode("PNG"), photo, 0),
        ("UPPER.PNG", "PNG with capital letters in its name", encode("PNG"), photo, 0),
        ("interlaced.png", "PNG in seven passes", interlaced_png(), photo, 0),
        ("grey.png", "8-bit grey PNG", save(grey[..., 0], "PNG"), grey, 0),
        ("one_bit.png", "1-bit PNG", save(Image.fromarray(grey[..., 0] > 99), "PNG"), np.where(grey > 99, 255, 0).astype(np.uint8), 0),
        ("palette.png", "palette PNG", save(palette, "PNG"), opaque, 0),
        ("palette_transparent.png", "palette PNG with a transparent colour", save(palette, "PNG", transparency=0), palette_image(True)[1], 0),
        ("rgba.png", "RGBA PNG", save(rgba(), "PNG"), on_white(photo, alpha_ramp()), 1),
        ("grey_alpha.png", "grey PNG with alpha", save(Image.fromarray(np.dstack([grey[..., 0], alpha_ramp()])), "PNG"), on_white(grey, alpha_ramp()), 1),
        ("grey16.png", "16-bit grey PNG", save(grey16(), "PNG"), eight_bit(grey16(), 65535), 0),
        ("grey16_transparent.png", "16-bit grey PNG with a transparent grey", png(WIDTH, HEIGHT, 16, 0, png_rows(grey16().astype(">u2")), chunk(b"tRNS", struct.pack(">H", 0))), np.maximum(eight_bit(grey16(), 65535), np.where(grey16() == 0, 255, 0).astype(np.uint8)[..., None]), 0),
        ("rgb16.png", "16-bit RGB PNG", png(WIDTH, HEIGHT, 16, 2, png_rows((photo.astype(np.uint16) * 257).astype(">u2"))), photo, 0),
        ("color_key.png", "RGB PNG with a transparent colour", save(photo, "PNG", transparency=tuple(photo[5, 5].tolist())), on_white(photo, np.where((photo == photo[5, 5]).all(2), 0, 255)), 0),
        ("animated.png", "animated PNG", animation("PNG"), photo, 0),
        ("text.png", "PNG with text", png(WIDTH, HEIGHT, 8, 2, png_rows(photo), chunk(b"tEXt", b"Title\0x")), photo, 0),
        ("trailing.png", "PNG with other bytes after its end", encode("PNG") + b"tail" * 99, photo, 0),
        ("lossy.webp", "WebP", encode("WEBP", quality=95), photo, LOSSY),
        ("lossless.webp", "lossless WebP", encode("WEBP", lossless=True), photo, 0),
        ("alpha.webp", "WebP with alpha", save(rgba(), "WEBP", lossless=True, exact=True), on_white(photo, alpha_ramp()), 1),
        ("animated.webp", "animated WebP", animation("WEBP", lossless=True), photo, 0),
        ("still.gif", "GIF", save(palette, "GIF"), flat, 0),
        ("transparent.gif", "GIF with a transparent colour", save(palette, "GIF", transparency=0), palette_image(True)[1], 0),
        ("animated.gif", "animated GIF", animation("GIF"), flat, 0),
        ("plain.tif", "TIFF", encode("TIFF"), photo, 0),
        ("lzw.tiff", "TIFF, LZW", encode("TIFF", compression="tiff_lzw"), photo, 0),
        ("deflate.tif", "TIFF, deflate", encode("TIFF", compression="tiff_adobe_deflate"), photo, 0),
        ("jpeg.tif", "TIFF, JPEG", encode("TIFF", compression="jpeg", quality=95), photo, LOSSY),
        ("cmyk.tif", "CMYK TIFF", encode("TIFF", "CMYK"), photo, 1),
        ("lab.tif", "CIE Lab TIFF", encode("TIFF", "LAB"), photo, LOSSY),
        ("grey16.tif", "16-bit grey TIFF", save(grey16(), "TIFF"), eight_bit(grey16(), 65535), 0),
        ("float.tif", "TIFF of floats in [0, 1]", save((grey16() / 65535).astype(np.float32), "TIFF"), eight_bit(grey16(), 65535), 1),
        ("pages.tif", "TIFF of several pages", animation("TIFF"), photo, 0),
        ("alpha.tif", "RGBA TIFF", save(rgba(), "TIFF"), on_white(photo, alpha_ramp()), 1),
        ("bits24.bmp", "BMP", encode("BMP"), photo, 0),
        ("palette.bmp", "palette BMP", save(palette, "BMP"), opaque, 0),
        ("binary.ppm", "PPM", encode("PPM"), photo, 0),
        ("text.ppm", "PPM as text", f"P3 {WIDTH} {HEIGHT} 255\n".encode() + " ".join(map(str, photo.ravel())).encode(), photo, 0),
        ("binary.pgm", "PGM", save(grey[..., 0], "PPM"), grey, 0),
        ("bits16.pgm", "16-bit PGM", f"P5 {WIDTH} {HEIGHT} 65535\n".encode() + grey16().astype(">u2").tobytes(), eight_bit(grey16(), 65535), 0),
        ("bitmap.pbm", "PBM", save(Image.fromarray(grey[..., 0] > 99), "PPM"), np.where(grey > 99, 255, 0).astype(np.uint8), 0),
        ("png_inside.jpg", "PNG with a JPEG's name", encode("PNG"), photo, 0),
        ("jpeg_inside.png", "JPEG with a PNG's name", encode("JPEG", quality=95), photo, LOSSY),
        ("webp_inside.gif", "WebP with a GIF's name", encode("WEBP", lossless=True), photo, 0),
        ("one_pixel.png", "1 x 1 pixel", save(photo[:1, :1], "PNG"), photo[:1, :1], 0),
        ("one_row.png", "40 x 1 pixels", save(photo[:1], "PNG"), photo[:1], 0),
        ("one_column.png", "1 x 30 pixels", save(photo[:, :1], "PNG"), photo[:, :1], 0),
        ("thin.png", "1 x 100 pixels, the thinnest that is taken", save(np.repeat(photo[:1, :1], 100, 0), "PNG"), np.repeat(photo[:1, :1], 100, 0), 0),
        ("bad_exif.jpg", "JPEG with a damaged EXIF block", encode("JPEG", quality=95, exif=b"Exif\0\0nonsense"), photo, LOSSY),
    ]
    for orientation in (*range(1, 9), 0, 9):
        content = encode("JPEG", quality=95, exif=exif(orientation))
        cases.append((f"exif_{orientation}.jpg", f"JPEG with EXIF orientation {orientation}", content, upright(photo, orientation), LOSSY))
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
        "bomb.webp": b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\x3f\0" * 2,
        "text_bomb.png": png(WIDTH, HEIGHT, 8, 2, png_rows(picture()), chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(80_000_000), 9))),
    }  # fmt: skip


def bad_images() -> list:
    """(file, what, content) of images that cannot be read."""
    good = {file: content for file, _, content, _, _ in good_images()}
    cut = ("baseline.jpg", "progressive.jpg", "cmyk.jpg", "rgb.png", "animated.png", "lossy.webp", "lossless.webp", "still.gif",
           "plain.tif", "lzw.tiff", "bits24.bmp", "binary.ppm")  # fmt: skip
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
    cases += [(file, "a small file that asks for 900 million pixels, or for much memory", c) for file, c in bombs().items()]
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
        ("bad_filter.png", "PNG with an unknown row filter", png(WIDTH, HEIGHT, 8, 2, png_rows(photo).replace(b"\0" + photo[9].tobytes(), b"\x09" + photo[9].tobytes()))),
        ("no_palette.png", "palette PNG without a palette", png(WIDTH, HEIGHT, 8, 3, png_rows(photo[..., 0]))),
        ("no_frames.gif", "GIF without an image", good["still.gif"][:13] + b";"),
        ("loop.tif", "TIFF whose directory is outside of the file", b"II*\0" + struct.pack("<I", 2**31)),
        ("no_tags.tif", "TIFF with an empty directory", b"II*\0" + struct.pack("<IHI", 8, 0, 0)),
        ("short_rows.bmp", "BMP whose rows lie behind its end", good["bits24.bmp"][:10] + struct.pack("<I", 10**6) + good["bits24.bmp"][14:]),
        ("bad_number.ppm", "PPM with a word for a width", b"P6 wide 4 255\n" + bytes(36)),
        ("too_bright.ppm", "PPM with a value over its maximum", b"P3 1 1 255\n300 0 0\n"),
        ("no_tables.jpg", "JPEG without its quantisation tables", good["baseline.jpg"].replace(b"\xff\xdb", b"\xff\xfe")),
        ("markers.jpg", "JPEG of nothing but its first marker", b"\xff\xd8" * 500),
    ]  # fmt: skip
    return cases


def postscript() -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n0 0 40 30 rectfill\nshowpage\n%%EOF\n"
