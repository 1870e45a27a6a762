"""A run's figures over its steps as one HTML page, without a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from sam4mllm_tool.disk import write_whole
from sam4mllm_tool.drawing.html import render

PANELS: tuple[tuple[str, Mapping[str, str]], ...] = (
    ("Loss", {"loss": "training", "eval_loss": "held out"}),
    ("Box Acc@0.5", {"eval_box_acc50": "held out"}),
    ("Point accuracy, balanced", {"eval_point_accuracy": "held out"}),
    ("cIoU", {"eval_cIoU": "held out"}),
    ("Targets found and refused", {"eval_t_acc": "T-acc", "eval_n_acc": "N-acc"}),
    ("Learning rate", {"learning_rate": "rate"}),
)
WIDTH, HEIGHT, MARGIN = 360, 190, 46
# Okabe and Ito's palette.
COLOURS = ("#0072b2", "#d55e00")

Curve = list[tuple[int, float]]


def convergence_page(history: Sequence[Mapping[str, Any]], title: str) -> str:
    """One self-contained page of what transformers' ``Trainer`` logged.

    Args:
        history: ``TrainerState.log_history``; a figure that was never logged has no panel.
    """
    panels = [_panel(name, _curves(history, keys)) for name, keys in PANELS]
    return render(
        "convergence.html.j2",
        title=title,
        steps=max((line["step"] for line in history), default=0),
        panels=[panel for panel in panels if panel],
        width=WIDTH,
        height=HEIGHT,
        margin=MARGIN,
    )


def _curves(history: Sequence[Mapping[str, Any]], keys: Mapping[str, str]) -> dict[str, Curve]:
    found = {
        name: [(line["step"], float(line[key])) for line in history if key in line]
        for key, name in keys.items()
    }
    return {name: curve for name, curve in found.items() if curve}


def _panel(title: str, curves: dict[str, Curve]) -> dict[str, Any] | None:
    """A panel's axes and curves in the page's units; all curves share both axes."""
    if not curves:
        return None
    steps = [step for curve in curves.values() for step, _ in curve]
    values = [value for curve in curves.values() for _, value in curve]
    first, last, low, high = min(steps), max(steps), min(values), max(values)

    def place(step: int, value: float) -> str:
        across = (step - first) / max(1, last - first)
        up = (value - low) / (high - low) if high > low else 0.5
        x = MARGIN + across * (WIDTH - 8 - MARGIN)
        return f"{x:.1f},{HEIGHT - MARGIN - up * (HEIGHT - MARGIN - 8):.1f}"

    shown = [
        {"name": name, "colour": colour, "points": " ".join(place(*point) for point in curve),
         "begin": f"{curve[0][1]:.3g}", "end": f"{curve[-1][1]:.3g}"}
        for (name, curve), colour in zip(curves.items(), COLOURS, strict=False)
    ]  # fmt: skip
    return {"title": title, "curves": shown, "first": first, "last": last,
            "low": f"{low:.3g}", "high": f"{high:.3g}"}  # fmt: skip


class ConvergencePage(TrainerCallback):
    """Rewrites the page after each evaluation and at the end.

    Args:
        file: the page to write.
        title: of the page.
    """

    def __init__(self, file: Path, title: str) -> None:
        self._file, self._title = file, title

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After an evaluation."""
        self._write(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """At the end."""
        self._write(state)

    def _write(self, state: Any) -> None:
        if state.is_world_process_zero:
            write_whole(self._file, convergence_page(state.log_history, self._title))
