"""Pictures that mean harm: small or valid-looking files that cost far more than they show."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

from PIL import Image


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def many_scans(scans: int = 3000, side: int = 3000) -> bytes:
    """A progressive JPEG whose last scan comes again and again: a pass over all pixels each."""
    data = encoded(Image.new("L", (side, side), 128), "JPEG", progressive=True, quality=10)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def float_tiff(side: int = 5000) -> bytes:
    """150 kB that become 100 MB of 32-bit floats."""
    return encoded(Image.new("F", (side, side), 0.5), "TIFF", compression="tiff_adobe_deflate")


def png_that_claims(side: int) -> bytes:
    """A PNG of one compressed run that says it has side² pixels."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1_000_000), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts
    )


def deep_gif(frames: int = 300_000) -> bytes:
    """A tiny frame, very often."""
    data = encoded(Image.new("P", (8, 8)), "GIF")
    return data[:-1] + data[data.rindex(b"\x2c") : -1] * frames + b";"


def talkative_gif(size: int = 20_000_000) -> bytes:
    """Comments of one letter each, which a reader may put together one by one."""
    data = encoded(Image.new("P", (8, 8)), "GIF")
    comment, frame = b"\x21\xfe\x01a\x00", data.index(b"\x2c")
    return data[:frame] + comment * (size // len(comment)) + data[frame:]


def spelled_out(side: int = 2500) -> bytes:
    """A PPM with its numbers as text, which Pillow reads in Python."""
    return b"P3\n%d %d\n255\n" % (side, side) + b"0 " * (3 * side**2)


def many_directories(count: int = 50_000) -> bytes:
    """A TIFF of one pixel in very many directories."""
    tags = (
        (256, 1),
        (257, 1),
        (258, 8),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, 1),
        (279, 1),
    )
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    size = 2 + len(entries) + 4
    offsets = [8 + size * n for n in range(1, count)] + [0]
    return (
        b"II*\0"
        + struct.pack("<I", 8)
        + b"".join(
            struct.pack("<H", len(tags)) + entries + struct.pack("<I", offset) for offset in offsets
        )
    )


CORPUS: dict[str, Callable[[], bytes]] = {
    "scans": many_scans,
    "float TIFF": float_tiff,
    "PNG of 4e12 pixels": lambda: png_that_claims(2_000_000),
    "deep GIF": deep_gif,
    "talkative GIF": talkative_gif,
    "spelled out": spelled_out,
    "directories": many_directories,
}


def polyglots(picture: Image.Image) -> dict[str, bytes]:
    """The picture in files that are something else as well."""
    png, gif = encoded(picture, "PNG"), encoded(picture, "GIF")
    bmp = encoded(picture, "BMP")
    return {
        "PNG and ZIP": png + b"PK\x05\x06" + bytes(18),
        "PNG and HTML": png + b"<script>alert(1)</script>",
        "GIF and script": gif + b"*/=1;alert(1)//",
        "BMP and EXE": bmp + b"MZ" + bytes(62),
    }
