"""Reading the ``refs(….).p`` files, which are published as pickles, without trusting them.

A pickle can run any code, but only through a *global*: every class or function it wants to call is
first requested by name (``find_class``), by extension code (which ends in ``find_class`` too), or
as a persistent object. Here all of these are refused, so the result can only hold values that the
format writes inline: ``None``, booleans, numbers, strings, bytes, lists, tuples, dicts and sets.
The REFER files hold nothing else. A file that requests more is rejected before anything is called.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NoReturn

from sam4mllm_tool.errors import DatasetError

MAX_BYTES = 512 * 1024 * 1024


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it asks for a persistent object")


def read_plain_pickle(path: Path) -> Any:
    """The plain value pickled in ``path`` (Python 2 strings are read as UTF-8).

    Raises:
        DatasetError: it is not a pickle, too large, or holds anything but plain values.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise DatasetError(
            f"{path} has {size:,} bytes", hint=f"Files over {MAX_BYTES:,} bytes are not read."
        )
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file, encoding="utf-8").load()
    # A hostile or broken pickle can make the unpickler raise nearly anything.
    except Exception as error:
        raise DatasetError(
            f"{path} is not a pickle of plain values: {error}",
            hint="Take the file from the original archive, or convert it to a JSON file beside it.",
        ) from error
