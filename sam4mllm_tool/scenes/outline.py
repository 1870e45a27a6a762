"""What the outline of a mask is like: concave, thin."""

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Mask = npt.NDArray[np.bool_]

CONCAVE_BELOW = 0.72  # share of the convex hull that is filled
THIN_BELOW = 0.16  # thickness over the longest side


def is_concave(mask: Mask) -> bool:
    """Whether a bool H x W mask leaves much of its convex hull empty (holes count as empty)."""
    return bool(mask.sum() < CONCAVE_BELOW * convex_hull(mask).sum())


def is_thin(mask: Mask) -> bool:
    """Whether no part of a bool H x W mask is thick compared with its longest side.

    Erodes with a 3 x 3 square until nothing is left: each step takes two pixels of thickness.
    """
    rows, columns = np.nonzero(mask)
    longest = max(np.ptp(rows), np.ptp(columns)) + 1
    image, steps = Image.fromarray(np.pad(mask, 1).astype(np.uint8) * 255), 0
    while image.getbbox() is not None:
        image, steps = image.filter(ImageFilter.MinFilter(3)), steps + 1
    return bool(2 * steps < THIN_BELOW * longest)


def convex_hull(mask: Mask) -> Mask:
    """The filled convex hull of a bool H x W mask, same shape (Andrew's monotone chain)."""
    rows, columns = np.nonzero(mask)
    points = sorted(set(zip(columns.tolist(), rows.tolist(), strict=True)))
    ring = _chain(points) + _chain(points[::-1])
    image = Image.new("L", mask.shape[::-1], 0)
    if len(ring) < 2:
        return mask
    ImageDraw.Draw(image).polygon(ring, fill=255, outline=255)
    return np.asarray(image) > 0


def _chain(points: list[tuple[int, int]]) -> list[tuple[int, int]]:
    chain: list[tuple[int, int]] = []
    for point in points:
        while len(chain) >= 2 and _turn(chain[-2], chain[-1], point) <= 0:
            chain.pop()
        chain.append(point)
    return chain[:-1]


def _turn(a: tuple[int, int], b: tuple[int, int], c: tuple[int, int]) -> int:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
