"""One picture of many scenes: each with its masks outlined and some of its expressions."""

import random
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sam4mllm_tool.scenes.expressions import ReferringExpression, expressions
from sam4mllm_tool.scenes.render import Mask, Scene

PALETTE = ((230, 25, 75), (0, 130, 200), (60, 180, 75), (245, 130, 48), (145, 30, 180))
TEXT_LINES = 9
LINE = 13  # pixels


def contact_sheet(scenes: Sequence[Scene], columns: int = 4, side: int = 256) -> Image.Image:
    """Scenes in rows: the picture, its masks in colours with numbers, expressions below.

    A number before an expression is the object it means; `-` marks an absent target.
    """
    cells = [_cell(scene, side) for scene in scenes]
    width, height = cells[0].size
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for place, cell in enumerate(cells):
        sheet.paste(cell, (place % columns * width, place // columns * height))
    return sheet


def _cell(scene: Scene, side: int) -> Image.Image:
    scale = side / max(scene.image.size)
    size = (round(scene.image.width * scale), round(scene.image.height * scale))
    cell = Image.new("RGB", (2 * side + 8, size[1] + TEXT_LINES * LINE + 12), "white")
    cell.paste(scene.image.resize(size), (0, 0))
    cell.paste(masks_picture(scene).resize(size, Image.Resampling.NEAREST), (side + 2, 0))
    draw, font = ImageDraw.Draw(cell), ImageFont.load_default(11)
    chosen = _varied(expressions(scene, random.Random(scene.index)), TEXT_LINES)
    for row, phrase in enumerate(chosen):
        who = ",".join(map(str, phrase.targets)) or "-"
        text = f"{who}  {phrase.text}  ({phrase.kind})"
        draw.text((3, size[1] + 3 + row * LINE), text, fill="black", font=font)
    return cell


def masks_picture(scene: Scene) -> Image.Image:
    """Visible masks in colours over a pale copy of the scene, each with its object's number."""
    pixels = np.asarray(scene.image, dtype=float) * 0.25 + 190
    for number, thing in enumerate(scene.objects):
        colour = np.asarray(PALETTE[number % len(PALETTE)], dtype=float)
        pixels[thing.mask] = 0.35 * pixels[thing.mask] + 0.65 * colour
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for number, thing in enumerate(scene.objects):
        draw.text(
            _inside(thing.mask),
            str(number),
            "white",
            font,
            "mm",
            stroke_width=2,
            stroke_fill="black",
        )
    return picture


def _inside(mask: Mask) -> tuple[float, float]:
    """The mask's own pixel nearest to its centre of mass."""
    rows, columns = np.nonzero(mask)
    nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
    return float(columns[nearest]), float(rows[nearest])


def _varied(found: list[ReferringExpression], most: int) -> list[ReferringExpression]:
    """Up to `most` expressions, going round the kinds."""
    by_kind: dict[str, list[ReferringExpression]] = {}
    for phrase in found:
        by_kind.setdefault(phrase.kind, []).append(phrase)
    rounds = range(max(map(len, by_kind.values()), default=0))
    turns = [queue[turn] for turn in rounds for queue in by_kind.values() if turn < len(queue)]
    return turns[:most]
