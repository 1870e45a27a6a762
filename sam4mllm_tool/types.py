"""The values that travel through the package.

Coordinates are pixels of the upright (EXIF-rotated) image, origin at the top-left corner of the
top-left pixel: the centre of that pixel is (0.5, 0.5). Boxes are ``x_min, y_min, x_max, y_max``
with the maxima exclusive. Masks are ``bool`` arrays of shape (height, width).
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from sam4mllm_tool.display import encoded, show

_DIGEST_ROWS = 256


class Box(NamedTuple):
    """An axis-aligned box in pixels, maxima exclusive."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float

    @property
    def width(self) -> float:
        """Width in pixels."""
        return self.x_max - self.x_min

    @property
    def height(self) -> float:
        """Height in pixels."""
        return self.y_max - self.y_min

    @property
    def area(self) -> float:
        """Area in square pixels, never negative."""
        return max(0.0, self.width) * max(0.0, self.height)

    @property
    def centre(self) -> tuple[float, float]:
        """Centre (x, y) in pixels."""
        return (self.x_min + self.x_max) / 2, (self.y_min + self.y_max) / 2


class Point(NamedTuple):
    """A point in pixels."""

    x: float
    y: float


class PointLabel(enum.StrEnum):
    """What a prompt point tells SAM; undecided points are not shown to it."""

    FOREGROUND = "foreground"
    BACKGROUND = "background"
    UNDECIDED = "undecided"


class YesNo(NamedTuple):
    """Full-vocabulary probabilities of *yes* and *no* at one answer slot; their sum is <= 1."""

    p_yes: float
    p_no: float


@dataclass(frozen=True)
class PromptPoint:
    """A point with its label, and the probabilities behind the label where an MLLM gave them."""

    x: float
    y: float
    label: PointLabel
    p_yes: float | None = None
    p_no: float | None = None


class TargetCount(enum.StrEnum):
    """How many objects an expression may mean: exactly one, one or more, none or more."""

    ONE = "1"
    ONE_OR_MORE = "1+"
    ZERO_OR_MORE = "0+"


class Status(enum.StrEnum):
    """Outcome of a query that did not fail; *not found* is an outcome, not an error."""

    FOUND = "found"
    NOT_FOUND = "not_found"


@dataclass(frozen=True)
class RgbImage:
    """An upright RGB picture with the digest of its pixels, the key of every image cache.

    Attributes:
        pil: mode "RGB", never mutated.
        digest: hex SHA-256 over size and pixels.
    """

    pil: Image.Image = field(compare=False, repr=False)
    digest: str

    @classmethod
    def from_pil(cls, image: Image.Image) -> RgbImage:
        """Wrap a PIL image (converted to RGB if needed; orientation is taken as upright)."""
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        digest = hashlib.sha256(f"{rgb.size}".encode())
        for top in range(0, rgb.height, _DIGEST_ROWS):  # the bytes of a photograph are many
            bottom = min(top + _DIGEST_ROWS, rgb.height)
            digest.update(rgb.crop((0, top, rgb.width, bottom)).tobytes())
        return cls(pil=rgb, digest=digest.hexdigest())

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self.pil.width

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self.pil.height

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.pil.size

    @cached_property
    def array(self) -> NDArray[np.uint8]:
        """Read-only ``uint8`` array of shape (height, width, 3)."""
        array = np.asarray(self.pil, dtype=np.uint8)
        array.setflags(write=False)
        return array

    def _repr_jpeg_(self) -> bytes:
        """How a notebook shows it, bounded in size."""
        return encoded(self.pil, "JPEG")


@dataclass(frozen=True, eq=False)
class Mask:
    """A binary mask of one image: ``pixels`` is ``bool`` of shape (height, width), read-only."""

    pixels: NDArray[np.bool_]

    def __post_init__(self) -> None:
        pixels = np.ascontiguousarray(self.pixels, dtype=bool)
        if pixels.ndim != 2:
            raise ValueError(f"a mask has two dimensions, not {pixels.ndim}")
        pixels.setflags(write=False)
        object.__setattr__(self, "pixels", pixels)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and np.array_equal(self.pixels, other.pixels)

    def __hash__(self) -> int:
        return hash((self.pixels.shape, self.pixels.tobytes()))

    @classmethod
    def from_rle(cls, rle: dict[str, Any]) -> Mask:
        """Read a COCO RLE (compressed ``counts`` as ``str`` or ``bytes``)."""
        counts = rle["counts"]
        counts = counts.encode("ascii") if isinstance(counts, str) else counts
        return cls(coco_mask.decode({"size": list(rle["size"]), "counts": counts}).astype(bool))

    def to_rle(self) -> dict[str, Any]:
        """COCO RLE: ``{"size": [height, width], "counts": str}``, JSON-ready."""
        rle = coco_mask.encode(np.asfortranarray(self.pixels.astype(np.uint8)))
        return {"size": [int(v) for v in rle["size"]], "counts": rle["counts"].decode("ascii")}

    def to_pil(self) -> Image.Image:
        """Mode "L" picture: 255 on the object, 0 elsewhere."""
        return Image.fromarray(self.pixels.astype(np.uint8) * 255)

    def show(self) -> None:
        """White on black: in a notebook as the cell's output, else in the desktop's viewer."""
        show(self, self.to_pil())

    def _repr_png_(self) -> bytes:
        """How a notebook shows it, bounded in size."""
        return encoded(self.to_pil(), "PNG")

    def resized(self, size: tuple[int, int]) -> Mask:
        """The mask at another (width, height), each pixel the nearest one's."""
        if size == (self.width, self.height):
            return self
        return Mask(np.asarray(self.to_pil().resize(size, Image.Resampling.NEAREST)) > 0)

    @property
    def height(self) -> int:
        """Height in pixels."""
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        """Width in pixels."""
        return int(self.pixels.shape[1])

    @cached_property
    def area(self) -> int:
        """Number of pixels on the object."""
        return int(self.pixels.sum())

    @cached_property
    def box(self) -> Box | None:
        """Tight box around the mask; ``None`` if the mask is empty."""
        if not self.area:
            return None
        columns = np.flatnonzero(self.pixels.any(axis=0))
        rows = np.flatnonzero(self.pixels.any(axis=1))
        return Box(float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))

    def contains(self, x: float, y: float) -> bool:
        """Whether the pixel under the point (x, y) is on the object."""
        row, column = int(np.floor(y)), int(np.floor(x))
        inside = 0 <= row < self.height and 0 <= column < self.width
        return bool(inside and self.pixels[row, column])
