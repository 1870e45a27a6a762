"""What an LLM reads: results and complaints in a few plain lines."""

from __future__ import annotations

from pydantic import ValidationError

from sam4mllm_tool.tools import schemas as m

MOST_POINTS = 40


def object_line(one: m.ObjectSummary) -> str:
    """An object in one line."""
    parts = [f"{one.object_id} '{one.name[:80]}' box {one.box}"]
    if one.score is not None:
        parts.append(f"score {one.score:.2f}")
    if one.area is not None:
        parts.append(f"mask {one.area} px ({100 * (one.area_fraction or 0):.1f}% of the image)")
    if one.predicted_iou is not None:
        parts.append(f"predicted IoU {one.predicted_iou:.2f}")
    if one.points_inside or one.points_outside or one.points_undecided:
        parts.append(
            f"points {one.points_inside} inside, {one.points_outside} outside, "
            f"{one.points_undecided} undecided"
        )
    return ", ".join(parts)


def points_text(name: str, points: list[m.PointResult]) -> str:
    """Each point with its answer, the first ``MOST_POINTS`` of them."""
    lines = [f"{name}:"]
    for p in points[:MOST_POINTS]:
        clash = " (the mask disagrees)" if p.disagrees else ""
        lines.append(f"({p.x:g}, {p.y:g}) {p.answer}, p_yes {p.p_yes:.2f}{clash}")
    if len(points) > MOST_POINTS:
        lines.append(f"… and {len(points) - MOST_POINTS} more in the structured result")
    return "\n".join(lines)


def pair_line(pair: m.PairComparison) -> str:
    """How two objects lie to each other, in one line."""
    if pair.distance is None:
        return f"{pair.a} and {pair.b} have no relation: one of the masks is empty"
    where = " and ".join(side.replace("_", " ") for side in pair.position) or "at the same place as"
    return (
        f"{pair.a} is {where} {pair.b}: IoU {pair.iou:.2f}, "
        f"{100 * pair.a_inside_b:.0f}% of {pair.a} in {pair.b}, gap {pair.distance:g}"
    )


def complaint(name: str, error: ValidationError) -> str:
    """Which arguments do not fit, and why."""
    parts = []
    for one in error.errors(include_url=False, include_input=False)[:5]:
        where = ".".join(str(step) for step in one["loc"])
        parts.append(f"{where}: {one['msg']}" if where else str(one["msg"]))
    return f"arguments of {name} do not fit: " + "; ".join(parts)
