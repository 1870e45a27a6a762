"""Dense pre-training of a small SAM's image encoder: whole objects, before prompts are used.

Every object of a picture is drawn at once by a one-layer query: the image embedding at one of its
pixels (or over all of it) is mapped to a filter over the mask decoder's upscaled features (the
idea of CondInst, Tian et al. 2020). No mask decoder runs, so a picture costs little more than its
encoding, and encoder and upscaling layers start the interactive stage with separable objects.
"""

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torch import nn

from recipes.embedded_sam.data import DenseBatch
from recipes.embedded_sam.loss import mask_loss


class DenseHeads(nn.Module):
    """Read-outs used in pre-training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        features = width // 8
        self.query = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, features + 1)
        )
        self.dense = nn.Conv2d(features, 4, 1)  # foreground, boundary, offset to centre


def dense_loss(sam: Sam, heads: DenseHeads, batch: DenseBatch) -> tuple[torch.Tensor, float]:
    """Loss of one batch, and the mean IoU of the masks drawn by query (at the logits' grid)."""
    pixels = (batch.images.float() - sam.pixel_mean) / sam.pixel_std
    with torch.autocast("cpu", torch.bfloat16):
        embedding = sam.image_encoder(pixels)
    return read_dense(sam, heads, embedding, batch)


def read_dense(
    sam: Sam, heads: DenseHeads, embedding: torch.Tensor, batch: DenseBatch
) -> tuple[torch.Tensor, float]:
    """The same from the image embedding, B x C x g x g: every object of every picture."""
    with torch.autocast("cpu", torch.bfloat16):
        features = sam.mask_decoder.output_upscaling(embedding)
        dense = heads.dense(features)
    embedding, features, dense = embedding.float(), features.float(), dense.float()
    side, grid = batch.images.shape[-1], embedding.shape[-1]
    logits, targets, read = [], [], []
    for number, (masks, seeds) in enumerate(zip(batch.masks, batch.seeds, strict=True)):
        queries = heads.query(_pooled(embedding[number], masks, seeds * grid / side))
        filters, bias = queries[:, :-1], queries[:, -1]
        logits.append(torch.einsum("kc,chw->khw", filters, features[number]) + bias[:, None, None])
        targets.append(masks)
        read.append(_dense_loss(dense[number], masks))
    target = torch.cat(targets)
    loss, iou = mask_loss(torch.cat(logits), target, boxed=True)
    return loss.mean() + torch.stack(read).mean(), float(iou.mean())


def _pooled(embedding: torch.Tensor, masks: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """Embedding (C x g x g) of each object: at its seed, for every second one over its mask."""
    columns, rows = seeds.long().clamp(max=embedding.shape[-1] - 1).T
    at_seed = embedding[:, rows, columns].T
    weights = F.adaptive_avg_pool2d(masks[:, None], embedding.shape[-1])[:, 0]
    weights = weights / weights.sum((1, 2), keepdim=True).clamp(min=1e-6)
    whole = torch.einsum("kij,cij->kc", weights, embedding)
    odd = (torch.arange(len(masks)) % 2 == 1)[:, None]
    return torch.where(odd, whole, at_seed)


def _dense_loss(dense: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Foreground, boundary between objects, and the offset to the own object's centre."""
    cells = masks.shape[-1]
    foreground = masks.sum(0).clamp(max=1)
    edge = (F.max_pool2d(masks, 3, 1, 1) - -F.max_pool2d(-masks, 3, 1, 1)).amax(0)
    place = (torch.arange(cells) + 0.5) / cells
    areas = masks.sum((1, 2)).clamp(min=1e-6)
    centre_x = (masks.sum(1) * place).sum(1) / areas
    centre_y = (masks.sum(2) * place).sum(1) / areas
    owner = masks.argmax(0)
    offset_x = centre_x[owner] - place[None, :]
    offset_y = centre_y[owner] - place[:, None]
    inside = (foreground > 0.5).float()
    wrong = (dense[2] - 4 * offset_x).abs() + (dense[3] - 4 * offset_y).abs()
    return (
        0.5 * F.binary_cross_entropy_with_logits(dense[0], foreground)
        + 0.5 * F.binary_cross_entropy_with_logits(dense[1], edge)
        + 0.5 * (wrong * inside).sum() / inside.sum().clamp(min=1)
    )
