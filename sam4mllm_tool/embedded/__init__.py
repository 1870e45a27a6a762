"""The small models that ship with the package, and their folders."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent
NAME = "embedded"
"""The name of the shipped checkpoints wherever a model is named."""
MLLM = _HERE / "mllm"
SAM = _HERE / "sam"
DEMO = _HERE / "demo"
