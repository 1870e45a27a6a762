"""The small models that ship with the package, and where they lie."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent
NAME = "embedded"
"""What the shipped checkpoints are called wherever a model is named."""
MLLM = _HERE / "mllm"
ADAPTER = _HERE / "mllm_adapter"
SAM = _HERE / "sam"
DEMO = _HERE / "demo"
