"""The kind of checkpoint in a directory, read without loading it."""

from __future__ import annotations

import json
from pathlib import Path

SMALL_SAM = "sam4mllm-small-sam"


def model_type_of(directory: Path) -> str | None:
    """``model_type`` of the directory's config.json, if it can be read."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    model_type = config.get("model_type") if isinstance(config, dict) else None
    return model_type if isinstance(model_type, str) else None
