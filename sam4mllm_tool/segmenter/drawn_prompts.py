"""A prompt encoder that also draws its prompts onto the image embedding.

SAM's decoder learns from a billion masks to relate a point's position code to the patch at that
position. Trained on about ten thousand pictures it hardly does: of the points that contradict a
mask drawn from the box alone, half were still contradicted after they were given as prompts. Here
boxes and points are also drawn as maps, like the click maps of interactive segmentation before SAM
(Xu et al. 2016, "Deep interactive object selection"), so that a prompt's information is located
where it applies.
"""

import torch
from segment_anything.modeling import PromptEncoder
from torch import Tensor, nn

REACHES = (1.5, 5.0, 16.0)
"""Standard deviations, in cells of the mask logits, of the spots that points are drawn as."""
CHANNELS = 3 + 2 * len(REACHES)
FAR = 1.5
"""Distances from a box's centre are clamped to this many half sides."""


class DrawnPromptEncoder(PromptEncoder):
    """segment_anything's prompt encoder; what is drawn is added to its dense embedding.

    New weights are zero, so a model trained without drawn prompts gives the same output as before.
    """

    def __init__(
        self,
        embed_dim: int,
        image_embedding_size: tuple[int, int],
        input_image_size: tuple[int, int],
        mask_in_chans: int,
    ) -> None:
        super().__init__(embed_dim, image_embedding_size, input_image_size, mask_in_chans)
        last = nn.Conv2d(64, embed_dim, kernel_size=1)
        nn.init.zeros_(last.weight)
        assert last.bias is not None
        nn.init.zeros_(last.bias)
        self.drawing = nn.Sequential(
            nn.Conv2d(CHANNELS, 32, kernel_size=2, stride=2),
            nn.GELU(),
            nn.Conv2d(32, 64, kernel_size=2, stride=2),
            nn.GELU(),
            last,
        )

    def forward(
        self,
        points: tuple[Tensor, Tensor] | None,
        boxes: Tensor | None,
        masks: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Sparse and dense embeddings; arguments as segment_anything's own.

        Args:
            points: coordinates N x K x 2, pixels of the square input, and labels N x K.
            boxes: N x 4 (x_min, y_min, x_max, y_max), the same pixels.
            masks: logits of earlier masks, N x 1 x 4g x 4g.
        """
        sparse, dense = super().forward(points, boxes, masks)
        drawn = draw_prompts(points, boxes, self.input_image_size[0], self.mask_input_size[0])
        if drawn is not None:
            dense = dense + self.drawing(drawn)
        return sparse, dense


def draw_prompts(
    points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, side: int, cells: int
) -> Tensor | None:
    """N prompts as pictures, N x CHANNELS x cells x cells; `None` without points and boxes.

    Channels: share of the cell inside the box; column and row from the box's centre, in half
    sides; Gaussian spots of increasing width at foreground points, then at background points.

    Args:
        points: as of `DrawnPromptEncoder.forward`; labels other than 0 and 1 are not drawn.
        boxes: as of `DrawnPromptEncoder.forward`.
        side: of the square input, pixels.
        cells: side of the drawing.
    """
    if points is not None:
        spots = _spots(points, side, cells)
    elif boxes is not None:
        spots = boxes.new_zeros(len(boxes), 2 * len(REACHES), cells, cells)
    else:
        return None
    if boxes is not None:
        frame = _frame(boxes.reshape(-1, 4), side, cells)
    else:
        frame = spots.new_zeros(len(spots), 3, cells, cells)
    return torch.cat([frame, spots], dim=1)


def _frame(boxes: Tensor, side: int, cells: int) -> Tensor:
    low, high = boxes.reshape(-1, 2, 2).unbind(1)  # N x (x, y)
    edges = torch.arange(cells, device=boxes.device) * (side / cells)
    size = side / cells
    low, high, edges = low[..., None], high[..., None], edges.to(boxes.dtype)
    inside = (torch.minimum(high, edges + size) - torch.maximum(low, edges)).clamp(min=0) / size
    half = ((high - low) / 2).clamp(min=size / 2)
    away = ((edges + size / 2 - (low + high) / 2) / half).clamp(-FAR, FAR)
    columns = away[:, 0, None, :].expand(-1, cells, -1)
    rows = away[:, 1, :, None].expand(-1, -1, cells)
    covered = inside[:, 1, :, None] * inside[:, 0, None, :]
    return torch.stack([covered, columns, rows], dim=1)


def _spots(points: tuple[Tensor, Tensor], side: int, cells: int) -> Tensor:
    where, labels = points
    middles = torch.arange(cells, device=where.device, dtype=where.dtype) + 0.5
    away = ((where + 0.5) * (cells / side))[..., None] - middles  # N x K x (x, y) x cells
    near = [torch.exp(-0.5 * (away / reach) ** 2) for reach in REACHES]
    drawn = []
    for label in (1, 0):
        chosen = (labels == label).to(where.dtype)[..., None]
        for columns, rows in (one.unbind(2) for one in near):
            drawn.append(torch.einsum("nkh,nkw->nhw", rows * chosen, columns).clamp(max=1))
    return torch.stack(drawn, dim=1)
