"""How an adapter is trained, as values: the published recipe, ours, and each number's source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from sam4mllm_tool.training.candidates import Candidates
from sam4mllm_tool.training.dialogues import Recipe
from sam4mllm_tool.training.token_loss import SPREAD
from sam4mllm_tool.types import TargetCount


@dataclass(frozen=True)
class LoraRecipe:
    """How an adapter is trained.

    Attributes:
        rank, alpha, dropout: of the LoRA layers.
        projector: how the projector between picture and text is trained: by LoRA layers, in full,
            or not at all.
        vision: LoRA layers in the vision tower too. The published recipe has none; a small tower
            has to learn from more pictures.
        rate: peak learning rate of the one-cycle schedule (PyTorch's ``OneCycleLR``).
        warm_up: share of the steps in which the rate rises.
        annealing: the curve of the rate between its ends.
        weight_decay: of AdamW.
        clip: largest norm of a step's gradient; 0 for no clipping.
        optimizer: a name that transformers' ``TrainingArguments.optim`` takes.
        epochs: passes over the conversations.
        batch: conversations per step and device.
        accumulate: steps whose gradients are summed.
        bf16: compute in bfloat16, the frozen weights held in it.
        checkpointing: recompute activations to save memory.
        smoothing: standard deviation of the label smoothing of coordinates, in steps of 0-999, with
            with a small weight of punctuation (:class:`TokenLoss`); 0 is plain cross-entropy.
        longest: tokens of text a conversation may have (a picture counts as one); its last
            questions are left out until it fits.
        seed: of initialisation, order and dropout.
    """

    rank: int = 128
    alpha: int = 128
    dropout: float = 0.05
    projector: Literal["lora", "full", "frozen"] = "lora"
    vision: bool = False
    rate: float = 1e-4
    warm_up: float = 0.01
    annealing: Literal["linear", "cos"] = "linear"
    weight_decay: float = 0.001
    clip: float = 0.0
    optimizer: str = "adamw_torch"
    epochs: float = 3
    batch: int = 1
    accumulate: int = 8
    bf16: bool = True
    checkpointing: bool = True
    smoothing: float = 0.0
    longest: int = 1536
    seed: int = 0


@dataclass(frozen=True)
class Preset:
    """A recipe by name.

    Attributes:
        learning: how to train.
        dialogues: how conversations are made.
        reasons: value → why it differs from the published one.
        alpha_per_rank: alpha follows a changed rank at this ratio; ``None``: alpha stays.
        judge: the segmenter that judges PPG's groups where none is named; empty: one must be named.
    """

    learning: LoraRecipe
    dialogues: Recipe
    reasons: Mapping[str, str] = field(default_factory=dict)
    alpha_per_rank: float | None = None
    judge: str = ""


_SCRIPT = "authors' script (sam4mllm_train.py)"
_NOTEBOOK = "authors' notebook (to_chat_format.ipynb)"
_DATA = "authors' notebooks (data/*.ipynb)"
_PAPER = "paper"
_OURS = "ours"
PUBLISHED_SOURCES = {
    "rank": _SCRIPT, "alpha": _SCRIPT, "dropout": _SCRIPT,
    "projector": f"{_SCRIPT}; the paper speaks of tuning the resampler: --projector full",
    "vision": f"{_SCRIPT}: not trained",
    "rate": _SCRIPT, "warm_up": f"{_SCRIPT}: pct_start", "annealing": _SCRIPT,
    "weight_decay": _SCRIPT, "clip": f"{_SCRIPT}: no clipping",
    "optimizer": f"{_OURS}: the script's AdamW8bit is --optimizer adamw_bnb_8bit (CUDA only)",
    "epochs": _SCRIPT, "batch": _SCRIPT,
    "accumulate": f"{_SCRIPT}; with its ten GPUs 80 conversations per step",
    "bf16": _SCRIPT, "checkpointing": _SCRIPT, "smoothing": f"{_PAPER}: plain cross-entropy",
    "longest": f"{_SCRIPT} and notebook: 1,536 tokens before the picture is put in",
    "seed": f"{_OURS}: the script sets none",
    "format": _NOTEBOOK, "references": f"{_NOTEBOOK}: MAX_PACKING",
    "count": f"{_NOTEBOOK}: every question asks with 0+",
    "every_target": f"{_NOTEBOOK}: round 2 about each box, in random order",
    "order": f"{_DATA}: boxes as annotated", "picture": f"{_SCRIPT}: resized to a square",
    "ppg_share": f"{_NOTEBOOK}: no PPG; the paper's n1, n2, K and k are \"few\"",
    "positive": f"{_OURS}: the paper says few", "negative": f"{_OURS}: the paper says few",
    "inset": _OURS, "tries": f"{_OURS}: the paper says few", "best": f"{_OURS}: the paper says few",
    "vqa_share": f"{_OURS}: shares of data sets are given by --data NAME=PATH:SHARE",
    "loosened": f"{_OURS}: not needed where all ask with 0+",
    "candidates.spread": _DATA, "candidates.radius": _DATA,
    "candidates.asked": f"{_NOTEBOOK}: clipped to 1-20",
    "candidates.normal": f"{_NOTEBOOK}: N(10, 4)",
    "candidates.grids": f"{_NOTEBOOK}: none", "candidates.jitter": f"{_NOTEBOOK}: the true box",
    "candidates.hard_points": f"{_NOTEBOOK}: none", "candidates.shared_boxes": f"{_NOTEBOOK}: none",
}  # fmt: skip
"""Value of the published preset → where it is from."""

PUBLISHED = Preset(
    LoraRecipe(),
    Recipe(
        ppg_share=0.0, count=TargetCount.ZERO_OR_MORE, every_target=True, order="annotated",
        picture=(672, 672),
        candidates=Candidates(asked=(1, 20), normal=(10.0, 4.0), jitter=0.0),
    ),
)  # fmt: skip
_CHANGED_FOR_SMALL = (
    "rank", "alpha", "dropout", "projector", "rate", "warm_up", "annealing", "weight_decay", "clip",
    "epochs", "batch", "accumulate", "bf16", "checkpointing", "smoothing", "longest", "count",
    "every_target", "order", "picture", "ppg_share", "candidates.asked", "candidates.normal",
    "candidates.jitter",
)  # fmt: skip
_FOR_SMALL = "ours: chosen for the embedded model on a CPU"
PRESETS: dict[str, Preset] = {
    "published": PUBLISHED,
    "ours": Preset(
        LoraRecipe(smoothing=SPREAD, clip=1.0),
        Recipe(
            ppg_share=0.0, count=TargetCount.ZERO_OR_MORE, every_target=True, picture=(672, 672),
            candidates=Candidates(asked=(1, 30), jitter=0.1),
        ),
        {
            "smoothing": "ours: for plain cross-entropy, 499 instead of 500 is as wrong as 000",
            "clip": "ours: transformers' default",
            "order": "ours: from left to right, an order that the picture shows",
            "candidates.asked": "ours: the pipeline asks up to 30 points",
            "candidates.normal": "ours: all numbers are equally likely",
            "candidates.jitter": "ours: round 1's boxes are not exact either",
        },
    ),
    "small": Preset(
        LoraRecipe(
            rank=16, alpha=32, dropout=0.0, projector="full", rate=1e-3, warm_up=0.3,
            annealing="cos", weight_decay=0.0, clip=1.0, epochs=1, batch=8, accumulate=1,
            bf16=False, checkpointing=False, smoothing=SPREAD, longest=2048,
        ),
        Recipe(),
        dict.fromkeys(_CHANGED_FOR_SMALL, _FOR_SMALL),
        alpha_per_rank=2.0,
        judge="embedded",
    ),
}  # fmt: skip
"""``published``: the authors' values. ``ours``: the same with our changes. ``small``: for the
embedded model, on a CPU."""


def recipe_rows(
    preset: Preset, learning: LoraRecipe, dialogues: Recipe
) -> Iterator[tuple[str, Any, str]]:
    """(name, value, source) of each value of a run that began from a preset."""
    before = dict(_values(preset.learning, preset.dialogues))
    for name, value in _values(learning, dialogues):
        if value != before[name]:
            yield name, value, f"asked for (preset: {_shown(before[name])})"
        else:
            yield name, value, preset.reasons.get(name, PUBLISHED_SOURCES[name])


def _values(learning: LoraRecipe, dialogues: Recipe) -> Iterator[tuple[str, Any]]:
    for one in fields(learning):
        yield one.name, getattr(learning, one.name)
    for one in fields(dialogues):
        if one.name not in ("seed", "candidates"):
            yield one.name, getattr(dialogues, one.name)
    for one in fields(dialogues.candidates):
        yield f"candidates.{one.name}", getattr(dialogues.candidates, one.name)


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
