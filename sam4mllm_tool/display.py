"""Small encoded pictures for people to look at: in a notebook, on a page, in a viewer."""

from __future__ import annotations

import base64
import io
import sys
from typing import Any, Literal

from PIL import Image

MAX_SIDE = 640
"""Longest side in pixels of a picture in a notebook."""

Format = Literal["PNG", "JPEG"]


def encoded(picture: Image.Image, form: Format, max_side: int = MAX_SIDE) -> bytes:
    """The picture as a file, its sides at most ``max_side`` pixels."""
    small = picture.copy()
    small.thumbnail((max_side, max_side))
    buffer = io.BytesIO()
    small.save(buffer, format=form, **({"quality": 90} if form == "JPEG" else {}))
    return buffer.getvalue()


def data_uri(picture: Image.Image, form: Format, max_side: int = MAX_SIDE) -> str:
    """:func:`encoded` as a ``data:`` URI."""
    text = base64.b64encode(encoded(picture, form, max_side)).decode("ascii")
    return f"data:image/{form.lower()};base64,{text}"


def show(value: Any, picture: Image.Image) -> None:
    """Show ``value`` as output of a notebook's cell, or ``picture`` in the desktop's viewer."""
    # A notebook's kernel has imported IPython; nobody else needs it.
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is not None and hasattr(shell, "kernel"):
        from IPython.display import display

        display(value)
    else:
        picture.show()
