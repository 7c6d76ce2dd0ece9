"""The parts of a PNG file that its picture depends on.

Everything else in it (colour profiles, comments, resolutions, times) may be damaged or large, and Pillow refuses such
files: so they are decoded without it.
"""

import io
import struct
import zlib
from typing import BinaryIO

from PIL import PngImagePlugin

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# beside the critical parts: what is transparent, and which side is up
NEEDED = (b"tRNS", b"eXIf")
# texts that Pillow finds an orientation in, too
TEXTS = (b"zTXt", b"iTXt", b"tEXt")
ORIENTATION_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
MOST_TEXT = 2**26  # bytes that such a text may have when it is decompressed
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, MOST_TEXT)


def is_png(stream: BinaryIO) -> bool:
    """Whether a stream, which is put back to where it was, holds a PNG."""
    start = stream.tell()
    found = stream.read(len(SIGNATURE))
    stream.seek(start)
    return found == SIGNATURE


def needed_parts(stream: BinaryIO) -> BinaryIO:
    """The PNG in a stream as a smaller one. Of an animation, the picture that viewers without animations show.

    Raises ValueError where it is cut off, and where the checksum of a part that is needed does not fit.
    """
    content, kept, place = memoryview(stream.read()), [SIGNATURE], len(SIGNATURE)
    while place + 12 <= len(content):
        length, name = struct.unpack(">I4s", content[place : place + 8])
        part = content[place : place + 12 + length]
        if len(part) < 12 + length:
            break
        if is_needed(name, part[8:-4]):
            sound = zlib.crc32(part[4:-4]) == int.from_bytes(part[-4:], "big")
            if sound:
                kept.append(part)
            elif is_critical(name) or name == b"tRNS":
                raise ValueError(f"damaged: the checksum of {name.decode('latin-1')} does not fit")
        if name == b"IEND":
            return io.BytesIO(b"".join(kept))
        place += len(part)
    raise ValueError("cut off: it has no end")


def is_critical(name: bytes) -> bool:
    return name[:1].isupper()


def is_needed(name: bytes, data: memoryview) -> bool:
    """Whether the picture depends on a part of a PNG."""
    return is_critical(name) or name in NEEDED or (name in TEXTS and bytes(data[:24]).startswith(ORIENTATION_TEXTS))
