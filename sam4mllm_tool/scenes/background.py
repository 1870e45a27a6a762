"""Procedural backgrounds: RGB pictures that hold no object."""

import random

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.float64]


def background(kind: str, size: tuple[int, int], seed: int) -> Image.Image:
    """A background of the given kind: RGB of (width, height) pixels, the same for the same seed.

    Pattern sizes are shares of the picture, so another size shows the same pattern.
    """
    rng = random.Random(seed)
    noise = np.random.Generator(np.random.PCG64(seed))
    light, other = _colour(rng, 90), _colour(rng, 60)
    if kind == "plain":
        pixels = np.broadcast_to(light, (*size[::-1], 3))
    elif kind == "clutter":
        pixels = _clutter(rng, noise, size)
    else:
        share = _PATTERNS[kind](rng, noise, size)[..., None]
        pixels = share * light + (1 - share) * (0.5 * light + 0.5 * other)
    if rng.random() < 0.5:
        pixels = pixels + noise.normal(0, rng.uniform(1, 10), (*size[::-1], 1))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _colour(rng: random.Random, darkest: int) -> npt.NDArray[np.float64]:
    return np.array([rng.randint(darkest, 255) for _ in range(3)], dtype=float)


def _axes(size: tuple[int, int]) -> tuple[Pixels, Pixels]:
    """Column (1 x W) and row (H x 1) positions as shares of the shorter side."""
    width, height = size
    shorter = min(size)
    return np.arange(width)[None, :] / shorter, np.arange(height)[:, None] / shorter


def _gradient(rng: random.Random, noise: np.random.Generator, size: tuple[int, int]) -> Pixels:
    x, y = _axes(size)
    ramp = x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1)
    low, high = ramp.min(), ramp.max()
    return np.asarray((ramp - low) / max(high - low, 1e-6))


def _smooth(noise: np.random.Generator, cells: int, size: tuple[int, int]) -> Pixels:
    coarse = Image.fromarray((noise.random((cells, cells)) * 255).astype(np.uint8))
    return np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=float) / 255


def _clouds(rng: random.Random, noise: np.random.Generator, size: tuple[int, int]) -> Pixels:
    return _smooth(noise, rng.choice([3, 6, 12]), size)


def _stripes(rng: random.Random, noise: np.random.Generator, size: tuple[int, int]) -> Pixels:
    x, y = _axes(size)
    period, slope = rng.uniform(0.06, 0.3), rng.choice([0.0, 1.0, -1.0, 0.5])
    along = (x + slope * y) if rng.random() < 0.5 else (y + slope * x)
    return np.asarray(along / period % 2 < 1, dtype=float) * np.ones(size[::-1])


def _checker(rng: random.Random, noise: np.random.Generator, size: tuple[int, int]) -> Pixels:
    x, y = _axes(size)
    period = rng.uniform(0.05, 0.2)
    return np.asarray((x // period + y // period) % 2, dtype=float)


def _grain(rng: random.Random, noise: np.random.Generator, size: tuple[int, int]) -> Pixels:
    return _smooth(noise, 24, size) * 0.5 + _smooth(noise, 64, size) * 0.5


def _clutter(rng: random.Random, noise: np.random.Generator, size: tuple[int, int]) -> Pixels:
    """Busy, coloured at three scales: it may contain the colour of any object."""
    pixels = np.zeros((*size[::-1], 3))
    for cells, weight in ((3, 0.5), (8, 0.3), (32, 0.2)):
        layer = Image.fromarray((noise.random((cells, cells, 3)) * 255).astype(np.uint8))
        pixels += weight * np.asarray(layer.resize(size, Image.Resampling.BICUBIC), dtype=float)
    contrast = rng.uniform(0.6, 1.8)
    return np.asarray((pixels - 128) * contrast + rng.uniform(90, 170))


_PATTERNS = {
    "gradient": _gradient,
    "clouds": _clouds,
    "stripes": _stripes,
    "checker": _checker,
    "grain": _grain,
}
