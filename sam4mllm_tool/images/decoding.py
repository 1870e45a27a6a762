"""From encoded bytes to upright RGB pixels, within limits that hold before and while decoding.

No more than Pillow and numpy is imported here: this also runs in the worker processes of
:mod:`sam4mllm_tool.images.isolation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from sam4mllm_tool.errors import ImageError, InputError

# Raster formats Pillow decodes by itself; EPS and the like would start other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "ICO", "JPEG2000")
_KNOWN_FORMATS = f"Give a complete picture file ({', '.join(FORMATS[:6])} …)."
_WHITE = (255, 255, 255, 255)
# An encoder's progressive script has about ten scans; each costs a pass over the whole picture.
MAX_JPEG_SCANS = 64
_START_OF_SCAN = b"\xff\xda"
_BAND_PIXELS = 2**20

_Decoded = tuple[Image.Image, tuple[str, ...]]


def decode(data: bytes, max_pixels: int) -> _Decoded:
    """The picture in ``data`` as upright RGB, and the changes made, one sentence each.

    Raises:
        ImageError: not a picture, broken, or over a limit.
    """
    return upright_rgb(lambda: _open(data), max_pixels)


def upright_rgb(open_image: Callable[[], Image.Image], max_pixels: int) -> _Decoded:
    """An image as a new upright RGB image, and the notes; ``open_image`` may fail like a decoder.

    Raises:
        ImageError: not a picture, broken, or over a limit.
    """
    notes: list[str] = []
    try:
        opened = open_image()
        check_pixels(*opened.size, max_pixels)
        if getattr(opened, "is_animated", False):
            notes.append(f"The picture has several frames; frame {opened.tell() + 1} is used.")
        opened.load()
        rgb = _to_rgb(_upright(opened, notes), notes)
        return (opened.copy() if rgb is opened else rgb), tuple(notes)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("This is not a picture of a known format.", hint=_KNOWN_FORMATS) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"The picture is far over the limit of {max_pixels:,} pixels.",
            hint="Scale the picture down.",
        ) from error
    except MemoryError as error:
        raise ImageError(
            "Decoding the picture takes too much memory.", hint="Scale the picture down."
        ) from error
    # A broken file can make Pillow's decoders raise nearly anything.
    except Exception as error:
        raise ImageError(
            f"The picture cannot be decoded: {str(error)[:200] or type(error).__name__}.",
            hint=_KNOWN_FORMATS,
        ) from error


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Refuse sizes without pixels or with too many of them.

    Raises:
        ImageError: so.
    """
    if width < 1 or height < 1:
        raise ImageError("The picture has no pixels.", hint="Give a picture of at least 1×1.")
    if width * height > max_pixels:
        raise ImageError(
            f"The picture is {width}×{height}; the limit is {max_pixels:,} pixels.",
            hint="Scale the picture down.",
        )


def _open(data: bytes) -> Image.Image:
    Image.init()
    opened = Image.open(BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
    # Compressed data never holds the marker: it is escaped there. A thumbnail may hold a few.
    scans = data.count(_START_OF_SCAN) if opened.format in {"JPEG", "MPO"} else 0
    if scans > MAX_JPEG_SCANS:
        raise ImageError(
            f"The JPEG has {scans} scans; the limit is {MAX_JPEG_SCANS}.",
            hint="Save the picture again, as a plain (baseline) JPEG.",
        )
    return opened


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    try:
        turned = ImageOps.exif_transpose(image)
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # broken EXIF does not make the pixels unreadable
        notes.append("The EXIF data cannot be read; the picture is taken as upright.")
        return image
    if orientation in range(2, 9):
        notes.append("The picture was turned upright as its EXIF orientation says.")
    return turned


def _to_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    if image.has_transparency_data:
        return _on_white(image, notes)
    if image.mode.startswith("I;16"):
        notes.append("16-bit values were brought to 8 bits.")
        return _grey(image, 0.0, 65535.0)
    if image.mode in {"I", "F"}:
        ranges = (255.0, 65535.0) if image.mode == "I" else (1.0, 255.0, 65535.0)
        return _grey(image, *_range(image, ranges, notes))
    if image.mode == "CMYK":
        notes.append("CMYK was converted to RGB without a colour profile.")
    return image if image.mode == "RGB" else image.convert("RGB")


def _range(image: Image.Image, ranges: tuple[float, ...], notes: list[str]) -> tuple[float, float]:
    """32-bit pixels carry no range: the first of ``ranges`` that holds them, or their own."""
    extremes = [(values.min(), values.max()) for _, values in _values(image)]
    low = float(min(least for least, _ in extremes))
    high = float(max(most for _, most in extremes))
    for top in ranges:
        if low >= 0 and high <= top:
            notes.append(f"Values were taken as 0…{top:g} and brought to 8 bits.")
            return 0.0, top
    notes.append(f"Values from {low:g} to {high:g} were stretched to 8 bits.")
    return low, high


def _grey(image: Image.Image, low: float, high: float) -> Image.Image:
    """The values from ``low`` to ``high`` as grey from 0 to 255."""
    scale = 255.0 / ((high - low) or 1.0)
    grey = np.empty((image.height, image.width), np.uint8)
    for top, values in _values(image):
        scaled = np.rint((values - low) * scale).clip(0, 255)
        grey[top : top + len(values)] = scaled
    return Image.fromarray(grey).convert("RGB")


def _on_white(image: Image.Image, notes: list[str]) -> Image.Image:
    result = Image.new("RGB", image.size, _WHITE[:3])
    transparent = False
    for top, band in _bands(image):
        rgba = band.convert("RGBA")
        transparent |= rgba.getchannel("A").getextrema() != (255, 255)
        white = Image.new("RGBA", rgba.size, _WHITE)
        result.paste(Image.alpha_composite(white, rgba).convert("RGB"), (0, top))
    if transparent:
        notes.append("Transparent parts were laid on white.")
    return result


def _values(image: Image.Image) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """The values of :func:`_bands`; what is not finite is 0."""
    for top, band in _bands(image):
        values = np.asarray(band).astype(np.float64)
        yield top, np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Some rows at a time, with the first row's number.

    Converted in one piece the picture would take many times the memory of its pixels.
    """
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))
