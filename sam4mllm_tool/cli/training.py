"""What ``dialogues`` and ``train`` share: their options, and what the options mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sam4mllm_tool.cli.common import console
from sam4mllm_tool.errors import InputError, nearest

if TYPE_CHECKING:
    from sam4mllm_tool.training.dialogues import Recipe
    from sam4mllm_tool.training.mixture import Source
    from sam4mllm_tool.training.recipe import LoraRecipe, Preset

DataOption = Annotated[
    list[str],
    typer.Option(
        help="'scenes', or NAME=PATH[:SHARE], repeatable: refcoco=DIR, grefcoco=DIR:0.5, "
        "vqa=FILE:0.2, … SHARE is how much of the set's conversations an epoch holds."
    ),
]
WorldOption = Annotated[
    list[str],
    typer.Option(
        help="World of scenes, repeatable; COUNT scenes of each, or N times as many with NAME:N."
    ),
]
SplitOption = Annotated[str, typer.Option(help="Split to learn from.")]
CountOption = Annotated[
    int | None, typer.Option(min=1, help="Scenes per world (2000), or records per set (all).")
]
PresetOption = Annotated[
    str | None,
    typer.Option(help="published, ours or small (by default small for the embedded model and "
                 "scenes, else published); other options override its values."),
]  # fmt: skip
PpgOption = Annotated[
    float | None, typer.Option(min=0, max=1, help="Share of references asked with PPG.")
]
JudgeOption = Annotated[
    str | None,
    typer.Option("--sam", help="Segmenter that judges PPG's points and draws the held-out masks: "
                 "'embedded', a checkpoint or a family; only --preset small has a default."),
]  # fmt: skip
ReferencesOption = Annotated[
    int | None, typer.Option(min=1, help="Most references per conversation.")
]
PointsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Most points per round-2 question; all numbers are equally likely."),
]
GridsOption = Annotated[
    float | None, typer.Option(min=0, max=1, help="Share of round-2 questions about an even grid.")
]
JitterOption = Annotated[
    float | None,
    typer.Option(min=0, max=0.5, help="Largest move of round 2's box edges, as a share of a side."),
]
HardPointsOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Share of round 2's points off the object that are moved onto other objects.",
    ),
]
SharedBoxesOption = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Share of round-2 boxes that hold an overlapping object too; "
                 "its expressions get the same box and points."),
]  # fmt: skip
VqaShareOption = Annotated[
    float | None,
    typer.Option(min=0, max=0.9, help="Share of scenes that ask what lies at a place."),
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=PATH of data sets whose val and test pictures are left out too; those of the "
        "training sets always are."
    ),
]
SMALL = "small"
# In scenes only absent things have the count "0+"; a model would learn that "0+" means absent. With
# half of the other expressions asked with "0+", it refused a quarter of the compound expressions.
LOOSENED = 0.85


def fitting_preset(base: str, sources: Sequence[Source]) -> str:
    """The default preset: ``small`` for the embedded model with scenes alone."""
    scenes = all(source.path is None for source in sources)
    return SMALL if base == "embedded" and scenes else "published"


def preset_named(name: str) -> Preset:
    """The preset of that name.

    Raises:
        InputError: there is none.
    """
    from sam4mllm_tool.training.recipe import PRESETS

    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}", hint=nearest(name, PRESETS, "Presets"))
    return PRESETS[name]


def sources_of(data: Sequence[str]) -> list[Source]:
    """The data sets that ``--data`` names.

    Raises:
        InputError: see :meth:`Source.parse`.
    """
    from sam4mllm_tool.training.mixture import Source

    return [Source.parse(text) for text in data]


def learning_of(preset: Preset, **asked: Any) -> LoraRecipe:
    """The preset's learning with the given options instead of its values."""
    changes = {name: value for name, value in asked.items() if value is not None}
    if changes.get("projector", "lora") not in ("lora", "full", "frozen"):
        raise InputError(
            f"unknown --projector {changes['projector']!r}", hint="Use lora, full or frozen."
        )
    if preset.alpha_per_rank and "rank" in changes:
        changes.setdefault("alpha", round(preset.alpha_per_rank * changes["rank"]))
    return replace(preset.learning, **changes)


def candidate_changes(
    points: int | None,
    grids: float | None,
    jitter: float | None,
    hard_points: float | None,
    shared_boxes: float | None,
) -> dict[str, Any]:
    """The given options about round 2's questions."""
    asked = {"grids": grids, "jitter": jitter, "hard_points": hard_points,
             "shared_boxes": shared_boxes}  # fmt: skip
    changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    return changes | ({"asked": (1, points), "normal": None} if points else {})


def dialogues_of(
    preset: Preset,
    sources: Sequence[Source],
    seed: int,
    ppg: float | None,
    references: int | None,
    vqa_share: float | None,
    candidates: dict[str, Any],
) -> Recipe:
    """The preset's conversations with the given options instead of its values."""
    kept = preset.dialogues
    scenes = any(source.path is None for source in sources)
    return replace(
        kept,
        seed=seed,
        ppg_share=kept.ppg_share if ppg is None else ppg,
        references=references or kept.references,
        vqa_share=kept.vqa_share if vqa_share is None else vqa_share,
        candidates=replace(kept.candidates, **candidates),
        loosened=LOOSENED if scenes and kept.count is None else kept.loosened,
    )


def judge_of(preset: Preset, named: str | None) -> str:
    """The segmenter's name; the embedded one only where it is named, or fits the preset.

    Raises:
        InputError: no segmenter is named, and the preset has none.
    """
    if not (named or preset.judge):
        raise InputError(
            "no segmenter named to judge points and draw masks with",
            hint="Name it with --sam: a SAM checkpoint or family, or 'embedded'.",
        )
    return named or preset.judge


def excluded_ids(sources: list[Source], others: list[str] | None, split: str) -> frozenset[str]:
    """Ids of the pictures to leave out, with a warning for each split that is missing."""
    from sam4mllm_tool.training.mixture import excluded_pictures

    if split != "train":
        return frozenset()
    return excluded_pictures(
        sources, sources_of(others or []), lambda text: console.print(f"[yellow]{text}[/]")
    )
