"""From whatever a caller has (path, URL, data URI, bytes, PIL, numpy) to an upright RGB image.

The same picture gives the same pixels whichever way it comes in. Limits are checked before
anything is decoded, and ``LoadedImage.notes`` lists what was changed.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote_to_bytes, urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sam4mllm_tool.errors import AccessDenied, ImageError
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.images.decoding import check_pixels, decode, upright_rgb
from sam4mllm_tool.images.folders import check_bytes, read_file
from sam4mllm_tool.images.isolation import decode_isolated
from sam4mllm_tool.types import RgbImage

__all__ = ["ImagePolicy", "ImageSource", "LoadedImage", "load_image"]

ImageSource: TypeAlias = "str | Path | bytes | Image.Image | NDArray[np.uint8]"


@dataclass(frozen=True)
class LoadedImage:
    """An image and the changes made to get it, one sentence each."""

    image: RgbImage
    notes: tuple[str, ...] = ()


ImageLike: TypeAlias = "RgbImage | LoadedImage | ImageSource"
"""What the pipeline takes as an image."""


def to_rgb_image(image: ImageLike) -> RgbImage:
    """The picture of whatever a caller gave as an image; files are read under the default policy.

    Raises:
        ImageError, AccessDenied: see :func:`load_image`.
    """
    if isinstance(image, RgbImage):
        return image
    return image.image if isinstance(image, LoadedImage) else load_image(image).image


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
        return _loaded(*upright_rgb(lambda: source, policy.max_pixels))
    data = read_picture(source, policy)
    decoder = decode_isolated if policy.isolated else decode
    return _loaded(*decoder(data, policy.max_pixels))


def read_picture(source: str | Path | bytes, policy: ImagePolicy) -> bytes:
    """The encoded picture behind a path, URL or data URI.

    Raises:
        ImageError, AccessDenied: as :func:`load_image`.
    """
    data = source if isinstance(source, bytes) else _read(source, policy)
    if not data:
        raise ImageError("The picture is empty (zero bytes).", hint="Give a complete picture file.")
    check_bytes(len(data), policy)
    return data


def _loaded(image: Image.Image, notes: tuple[str, ...]) -> LoadedImage:
    return LoadedImage(RgbImage.from_pil(image), notes)


def _read(source: str | Path, policy: ImagePolicy) -> bytes:
    if isinstance(source, Path):
        return read_file(source, policy)
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
            return read_file(_path_of_file_url(text), policy)
        case _ if "://" in text[:32]:
            raise AccessDenied(
                f"URLs of the kind {scheme[:20]!r} cannot be opened.",
                hint="Give a file path, a data URI or an http(s) URL.",
            )
    return read_file(Path(source), policy)


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
    from urllib.request import url2pathname  # slow to import: it brings http and ssl

    return Path(url2pathname(parts.path))


def _read_data_uri(uri: str, policy: ImagePolicy) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise ImageError(
            "The data URI has no data.", hint="It looks like 'data:image/png;base64,iVBOR…'."
        )
    check_bytes(len(payload) * 3 // 4, policy)
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


def _from_array(array: NDArray[Any], policy: ImagePolicy) -> LoadedImage:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ImageError(
            f"An array of shape {array.shape} and type {array.dtype} is not an RGB picture.",
            hint="Give uint8 of shape (height, width, 3).",
        )
    check_pixels(array.shape[1], array.shape[0], policy.max_pixels)
    return LoadedImage(RgbImage.from_pil(Image.fromarray(np.ascontiguousarray(array))))
