"""From whatever a caller has (path, URL, data URI, bytes, PIL, numpy) to an upright RGB image.

The same picture gives the same pixels whichever way it comes in. Limits are checked before
anything is decoded, and what had to be changed on the way is told in ``LoadedImage.notes``.
"""

from __future__ import annotations

import base64
import binascii
import stat
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from sam4mllm_tool.errors import AccessDenied, ImageError, InputError
from sam4mllm_tool.images.access import ImagePolicy, readable_path, safe_output_path
from sam4mllm_tool.types import RgbImage

__all__ = ["ImagePolicy", "ImageSource", "LoadedImage", "load_image", "safe_output_path"]

ImageSource: TypeAlias = "str | Path | bytes | Image.Image | NDArray[np.uint8]"

# Raster formats Pillow decodes by itself; EPS and the like would start other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "ICO", "JPEG2000")
_KNOWN_FORMATS = f"Give a complete picture file ({', '.join(FORMATS[:6])} …)."
_WHITE = (255, 255, 255, 255)


@dataclass(frozen=True)
class LoadedImage:
    """An image and what was changed to get it, a sentence each."""

    image: RgbImage
    notes: tuple[str, ...] = ()


def load_image(source: ImageSource, policy: ImagePolicy | None = None) -> LoadedImage:
    """Load one picture as upright RGB.

    Args:
        source: file path, ``file:`` / ``http(s):`` / ``data:`` URL, encoded bytes, PIL image
            (never changed), or ``uint8`` array of shape (height, width, 3).
        policy: what is allowed; by default any readable path and no network.

    Raises:
        ImageError: not a picture, broken, or over a limit.
        AccessDenied: a path or URL the policy does not allow.
    """
    policy = policy or ImagePolicy()
    if isinstance(source, np.ndarray):
        return _from_array(source, policy)
    if isinstance(source, Image.Image):
        return _decoded(lambda: source, policy)
    data = source if isinstance(source, bytes) else _read(source, policy)
    if not data:
        raise ImageError("The picture is empty (zero bytes).", hint="Give a complete picture file.")
    _check_bytes(len(data), policy)
    return _decoded(lambda: _open(data), policy)


def _read(source: str | Path, policy: ImagePolicy) -> bytes:
    if isinstance(source, Path):
        return _read_file(source, policy)
    if not isinstance(source, str):
        raise ImageError(
            f"A picture cannot be made from {type(source).__name__}.",
            hint="Give a path, URL, data URI, bytes, PIL image or numpy array.",
        )
    text = source.strip()
    scheme, separator, _ = text.partition(":")
    match scheme.lower() if separator else "":
        case "data":
            return _read_data_uri(text, policy)
        case "http" | "https":
            # Imported at need: most pictures are files.
            from sam4mllm_tool.images.fetching import fetch

            return fetch(text, policy)
        case "file":
            return _read_file(_path_of_file_url(text), policy)
        case _ if "://" in text[:32]:
            raise AccessDenied(
                f"URLs of the kind {scheme[:20]!r} cannot be opened.",
                hint="Give a file path, a data URI or an http(s) URL.",
            )
    return _read_file(Path(source), policy)


def _path_of_file_url(url: str) -> Path:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ImageError(f"Not a URL: {url[:120]!r}.", hint="Check the URL.") from error
    if parts.netloc not in {"", "localhost"}:
        raise AccessDenied(
            f"A file URL of another host cannot be opened: {parts.netloc[:80]!r}.",
            hint="Give a path on this machine.",
        )
    return Path(url2pathname(parts.path))


def _read_file(path: Path, policy: ImagePolicy) -> bytes:
    try:
        resolved = readable_path(path.expanduser(), policy)
        status = resolved.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"Not a file: {str(path)[:120]!r}.", hint="Give the path of a file.")
        _check_bytes(status.st_size, policy)
        return resolved.read_bytes()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(
            f"Cannot read {str(path)[:120]!r}: {reason}.",
            hint="Check that the path is right and the file can be read.",
        ) from error


def _read_data_uri(uri: str, policy: ImagePolicy) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise ImageError(
            "The data URI has no data.", hint="It looks like 'data:image/png;base64,iVBOR…'."
        )
    _check_bytes(len(payload) * 3 // 4, policy)
    try:
        data = unquote_to_bytes(payload)
    except UnicodeEncodeError as error:
        raise ImageError(
            "The data URI holds characters that no URL has.", hint="Encode the file as base64."
        ) from error
    if not header.lower().rstrip().endswith(";base64"):
        return data
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error as error:
        raise ImageError(
            f"The data URI is not valid base64: {error}.", hint="Encode the whole file again."
        ) from error


def _check_bytes(size: int, policy: ImagePolicy) -> None:
    if size > policy.max_bytes:
        raise ImageError(
            f"The picture has {size} bytes; the limit is {policy.max_bytes}.",
            hint="Use a smaller or better compressed picture.",
        )


def _check_pixels(width: int, height: int, policy: ImagePolicy) -> None:
    if width < 1 or height < 1:
        raise ImageError("The picture has no pixels.", hint="Give a picture of at least 1×1.")
    if width * height > policy.max_pixels:
        raise ImageError(
            f"The picture is {width}×{height}; the limit is {policy.max_pixels:,} pixels.",
            hint="Scale the picture down.",
        )


def _from_array(array: NDArray[Any], policy: ImagePolicy) -> LoadedImage:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ImageError(
            f"An array of shape {array.shape} and type {array.dtype} is not an RGB picture.",
            hint="Give uint8 of shape (height, width, 3).",
        )
    _check_pixels(array.shape[1], array.shape[0], policy)
    return LoadedImage(RgbImage.from_pil(Image.fromarray(np.ascontiguousarray(array))))


def _open(data: bytes) -> Image.Image:
    Image.init()
    return Image.open(BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])


def _decoded(open_image: Callable[[], Image.Image], policy: ImagePolicy) -> LoadedImage:
    notes: list[str] = []
    try:
        opened = open_image()
        _check_pixels(*opened.size, policy)
        if getattr(opened, "is_animated", False):
            notes.append(f"The picture has several frames; frame {opened.tell() + 1} is used.")
        opened.load()
        rgb = _to_rgb(_upright(opened, notes), notes)
        if rgb is opened:
            rgb = opened.copy()
        return LoadedImage(RgbImage.from_pil(rgb), tuple(notes))
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("This is not a picture of a known format.", hint=_KNOWN_FORMATS) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"The picture is far over the limit of {policy.max_pixels:,} pixels.",
            hint="Scale the picture down.",
        ) from error
    # A broken file can make Pillow's decoders raise nearly anything.
    except Exception as error:
        raise ImageError(
            f"The picture cannot be decoded: {str(error)[:200] or type(error).__name__}.",
            hint=_KNOWN_FORMATS,
        ) from error


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
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema() != (255, 255):
            notes.append("Transparent parts were laid on white.")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, _WHITE), rgba).convert("RGB")
    if image.mode.startswith("I;16"):
        notes.append("16-bit values were brought to 8 bits.")
        return _grey(np.asarray(image).astype(np.float64) / 257.0)
    if image.mode in {"I", "F"}:
        ranges = (255.0, 65535.0) if image.mode == "I" else (1.0, 255.0, 65535.0)
        return _grey(_stretched(np.asarray(image, dtype=np.float64), ranges, notes))
    if image.mode == "CMYK":
        notes.append("CMYK was converted to RGB without a colour profile.")
    return image if image.mode == "RGB" else image.convert("RGB")


def _stretched(
    values: NDArray[np.float64], ranges: tuple[float, ...], notes: list[str]
) -> NDArray[np.float64]:
    """32-bit pixels carry no range: the first of ``ranges`` that holds them, or their own."""
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    for top in ranges:
        if low >= 0 and high <= top:
            notes.append(f"Values were taken as 0…{top:g} and brought to 8 bits.")
            return values * (255.0 / top)
    notes.append(f"Values from {low:g} to {high:g} were stretched to 8 bits.")
    return (values - low) * (255.0 / (high - low))


def _grey(values: NDArray[np.float64]) -> Image.Image:
    return Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8)).convert("RGB")
