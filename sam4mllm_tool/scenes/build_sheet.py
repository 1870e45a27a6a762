"""Rebuild the packaged sprite sheet from the Noto Color Emoji font.

Only needed when the catalogue changes::

    python -m sam4mllm_tool.scenes.build_sheet /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf

`assets/sprites.json` is the catalogue, written by hand except for three fields per sprite that this
script fills in: `cell` (x, y, width, height in the sheet), `concave` and `thin`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sam4mllm_tool.scenes.outline import is_concave, is_thin

ASSETS = Path(__file__).parent / "assets"
STRIKE = 109  # the only size the bitmap font holds
SIDE = 112  # longest side of a sprite in the sheet, pixels
COLUMNS = 12


def draw_glyph(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One emoji, cropped to its visible pixels and scaled to `SIDE`: RGBA."""
    canvas = Image.new("RGBA", (200, 200), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((20, 30), character, font=font, embedded_color=True)
    visible = canvas.getchannel("A").point(lambda alpha: 255 if alpha > 40 else 0).getbbox()
    if visible is None:
        raise SystemExit(f"the font has no picture for {character!r}")
    glyph = canvas.crop(visible)
    scale = SIDE / max(glyph.size)
    width, height = (max(1, round(side * scale)) for side in glyph.size)
    return glyph.resize((width, height), Image.Resampling.LANCZOS)


def build_sheet(font_path: Path, assets: Path = ASSETS) -> None:
    """Draw every catalogued sprite into one sheet and note where each one lies."""
    catalogue = json.loads((assets / "sprites.json").read_text(encoding="utf-8"))
    font = ImageFont.truetype(str(font_path), STRIKE)
    rows = -(-len(catalogue) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * SIDE, rows * SIDE), (0, 0, 0, 0))
    for place, sprite in enumerate(catalogue):
        glyph = draw_glyph(sprite["character"], font)
        x, y = place % COLUMNS * SIDE, place // COLUMNS * SIDE
        sheet.paste(glyph, (x, y))
        mask = np.asarray(glyph.getchannel("A")) > 127
        sprite["cell"] = [x, y, *glyph.size]
        sprite["concave"], sprite["thin"] = is_concave(mask), is_thin(mask)
    sheet.save(assets / "sprites.png", optimize=True)
    lines = ",\n".join(json.dumps(sprite, ensure_ascii=False) for sprite in catalogue)
    (assets / "sprites.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("font", type=Path)
    build_sheet(parser.parse_args().font)
