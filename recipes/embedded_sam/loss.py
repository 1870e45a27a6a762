"""Losses of a small SAM, at the resolution of its mask logits."""

import torch
import torch.nn.functional as F

MARGIN = 0.15  # the true box is enlarged by this share of its sides
OUTSIDE = 0.5  # weight of the background outside that box
REACH = 3.0  # cells around a prompt point in which mistakes weigh more
STRESS = 4.0  # how much more, at the point


def mask_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    boxed: bool = False,
    stress: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and IoU of N masks.

    Cross-entropy inside the slightly enlarged true box, where object and surroundings must be
    distinguished, a weaker one outside, and dice. Over the whole picture, the easy background would
    dominate the loss.

    Args:
        logits: N x G x G, or N x M x G x G for M candidates.
        targets: N x G x G, share of each cell that the mask covers.
        boxed: judge dice and IoU inside the enlarged box alone, and the background outside it
            hardly at all, for masks that are drawn without knowing the box.
        stress: N x G x G, how much more a mistake in a cell weighs than elsewhere in the box.

    Returns:
        loss and IoU (of logits > 0 with targets > 0.5, no gradient), N or N x M.
    """
    inside = near_box(targets)
    outside = 1 - inside
    weights = inside if stress is None else inside * (1 + stress)
    if logits.dim() == 4:
        targets, inside, outside = targets[:, None], inside[:, None], outside[:, None]
        weights = weights[:, None]
    entropy = F.binary_cross_entropy_with_logits(
        logits, targets.expand_as(logits), reduction="none"
    )
    near = (entropy * weights).sum((-1, -2)) / weights.sum((-1, -2))
    far = (entropy * outside).sum((-1, -2)) / outside.sum((-1, -2)).clamp(min=1)
    probability, found = logits.sigmoid(), logits.detach() > 0
    if boxed:
        probability, found = probability * inside, found & (inside > 0)
    overlap = (probability * targets).sum((-1, -2))
    total = probability.sum((-1, -2)) + targets.sum((-1, -2))
    dice = 1 - (2 * overlap + 1) / (total + 1)
    weight = OUTSIDE / 5 if boxed else OUTSIDE
    return 2 * near + weight * far + dice, mask_iou(found, targets > 0.5)


def near_points(points: torch.Tensor, cells: int, side: float) -> torch.Tensor:
    """`STRESS` at prompt points, falling off within `REACH` cells: N x cells x cells.

    A point determines what its surroundings belong to. With equal weights, the few cells that a
    point decides would hardly count, and the model would not learn to follow points.

    Args:
        points: N x K x 2 pixels of a picture of that side; K may be 0.
        cells: of the mask logits, per side.
        side: of the picture, pixels.
    """
    middles = torch.arange(cells, device=points.device) + 0.5
    away = (points * cells / side)[..., None] - middles
    near = torch.exp(-0.5 * (away / REACH) ** 2)
    return STRESS * torch.einsum("nkw,nkh->nhw", near[:, :, 0], near[:, :, 1]).clamp(max=1)


def mask_iou(masks: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """IoU of bool masks over the last two axes; 1 where both are empty."""
    intersection = (masks & targets).sum((-1, -2))
    union = (masks | targets).sum((-1, -2))
    return torch.where(union > 0, intersection / union.clamp(min=1), torch.ones_like(union))


def near_box(targets: torch.Tensor) -> torch.Tensor:
    """1 inside each target's box, enlarged by `MARGIN` and a cell; N x G x G, float."""
    cells = targets.shape[-1]
    place = torch.arange(cells, device=targets.device)
    ranges = []
    for axis in (-1, -2):  # rows: reduce columns, and the other way round
        present = targets.amax(axis) > 0
        first = torch.where(present, place, cells).amin(-1)
        last = torch.where(present, place, -1).amax(-1)
        margin = MARGIN * (last - first + 1) + 1
        low, high = (first - margin)[:, None], (last + margin)[:, None]
        ranges.append((place >= low) & (place <= high))
    rows, columns = ranges
    return (rows[:, :, None] & columns[:, None, :]).float()
