"""Simulated interaction: prompt, look at the error, point into it, prompt again.

The recipe of SAM (Kirillov et al. 2023, appendix A) on a small scale: three candidate masks of
which the best is taught, a predicted IoU for each, and in later rounds one more point from the
error region, mostly together with the former mask's logits.
"""

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, Sam

from recipes.embedded_sam.data import PromptBatch, PromptGroup
from recipes.embedded_sam.dense import DenseHeads, read_dense
from recipes.embedded_sam.loss import mask_loss, near_points

SINGLE = 0.4  # weight of the single-mask output
DENSE = 0.6  # weight of pre-training's loss, where it is kept
IOU = 1.5  # weight of the IoU head
ROUNDS = (1, 1, 2, 2, 3)
AFRESH = 0.5  # chance that a round is not shown the former mask and must use points alone
BOXED_OTHERS = 1.0  # weight of the other candidates where a box leaves little to choose among


def decode(
    sam: Sam,
    embeddings: torch.Tensor,
    points: torch.Tensor,
    labels: torch.Tensor,
    boxes: torch.Tensor | None,
    masks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All four masks of N prompts, each with an image embedding of its own.

    The same as `sam.mask_decoder` called prompt by prompt, in one batch.

    Args:
        sam: the model.
        embeddings: N x C x g x g.
        points: N x K x 2 pixels of the square input; K may be 0 if there are boxes.
        labels: N x K.
        boxes: N x 4, or None.
        masks: logits of former masks, N x 1 x 4g x 4g, or None.

    Returns:
        mask logits N x 4 x 4g x 4g (first the single-mask output) and predicted IoU N x 4.
    """
    given = (points, labels) if points.shape[1] else None
    sparse, dense = sam.prompt_encoder(points=given, boxes=boxes, masks=masks)
    positions = sam.prompt_encoder.get_dense_pe()
    with torch.autocast(embeddings.device.type, torch.bfloat16, enabled=sam.training):
        logits, quality = _predict(sam.mask_decoder, embeddings + dense, positions, sparse)
    return logits.float(), quality.float()


def _predict(
    decoder: MaskDecoder, source: torch.Tensor, positions: torch.Tensor, sparse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    number, width, height, _ = source.shape[0], source.shape[1], source.shape[2], source.shape[3]
    output = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([output.expand(number, -1, -1), sparse], dim=1)
    told, seen = decoder.transformer(source, positions.expand(number, -1, -1, -1), tokens)
    features = decoder.output_upscaling(seen.transpose(1, 2).reshape(number, width, height, height))
    filters = torch.stack(
        [mlp(told[:, 1 + place]) for place, mlp in enumerate(decoder.output_hypernetworks_mlps)], 1
    )
    logits = torch.einsum("nmc,nchw->nmhw", filters, features)
    return logits, decoder.iou_prediction_head(told[:, 0])


def interaction_step(
    sam: Sam,
    batch: PromptBatch,
    generator: torch.Generator,
    *,
    teach_encoder: bool = True,
    others: float = 0.15,
    heads: DenseHeads | None = None,
) -> tuple[float, float, float]:
    """Encode the pictures, go through the rounds, and leave gradients on all parameters.

    Without `teach_encoder` the image encoder gets none: a decoder that knows nothing yet would
    only spoil it. `others` is the weight of the candidates that were not the best. With
    `heads` the objects that nobody points at are taught too, by pre-training's loss: it costs
    little beside the encoding.

    Returns:
        mean loss, IoU of the chosen candidate in the first round, and in the last round.
    """
    pixels = (batch.images.float() - sam.pixel_mean) / sam.pixel_std
    cast = torch.autocast(pixels.device.type, torch.bfloat16)
    with cast, torch.set_grad_enabled(teach_encoder):
        encoded = sam.image_encoder(pixels)
    embedding = encoded.detach().float().requires_grad_()
    total, first, last = 0.0, [], []
    for group in batch.groups:
        rounds = ROUNDS[int(torch.randint(len(ROUNDS), (), generator=generator))]
        share = len(group.picture) / sum(len(other.picture) for other in batch.groups) / rounds
        chosen = _play(sam, embedding, group, rounds, share, generator, others)
        total += sum(loss for loss, _ in chosen) * share
        first.append(chosen[0][1])
        last.append(chosen[-1][1])
    if heads is not None:
        loss, _ = read_dense(sam, heads, embedding, batch)
        (DENSE * loss).backward()
    if teach_encoder:
        assert embedding.grad is not None
        encoded.backward(embedding.grad.to(encoded.dtype))
    return total, float(sum(first) / len(first)), float(sum(last) / len(last))


def _play(
    sam: Sam,
    embedding: torch.Tensor,
    group: PromptGroup,
    rounds: int,
    share: float,
    generator: torch.Generator,
    others: float,
) -> list[tuple[float, float]]:
    """All rounds of one group; each round's gradients are added up at once."""
    targets = group.targets.float() / 255
    points, labels, masks = group.points, group.labels, None
    history = []
    others = others if group.boxes is None else BOXED_OTHERS
    for _ in range(rounds):
        own = embedding[group.picture]
        logits, quality = decode(sam, own, points, labels, group.boxes, masks)
        stress = near_points(points, targets.shape[-1], sam.image_encoder.img_size)
        loss, iou = candidates_loss(logits, quality, targets, others, stress)
        (share * loss).backward()
        best = quality[:, 1:].detach().argmax(1)
        each = torch.arange(len(best))
        history.append((float(loss.detach()), float(iou[:, 1:][each, best].mean())))
        found = logits.detach()[:, 1:][each, best]
        new_points, new_labels = error_points(found, targets, sam, generator)
        masks = found[:, None]
        if float(torch.rand((), generator=generator)) < AFRESH:
            masks = None
        points = torch.cat([points, new_points], dim=1)
        labels = torch.cat([labels, new_labels], dim=1)
    return history


def candidates_loss(
    logits: torch.Tensor,
    quality: torch.Tensor,
    targets: torch.Tensor,
    others: float,
    stress: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss of N x 4 candidates (first the single-mask output), and their IoU, N x 4."""
    losses, iou = mask_loss(logits, targets, stress=stress)
    several = losses[:, 1:]
    taught = (1 - others) * several.amin(1) + others * several.mean(1) + SINGLE * losses[:, 0]
    return taught.mean() + IOU * F.mse_loss(quality, iou), iou


def error_points(
    logits: torch.Tensor, targets: torch.Tensor, sam: Sam, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """One point each where mask and target differ (anywhere on the target if nowhere).

    Returns:
        points N x 1 x 2 in pixels, labels N x 1.
    """
    number, cells = targets.shape[0], targets.shape[-1]
    inside = targets > 0.5
    wrong = ((logits > 0) != inside) & ((targets - 0.5).abs() > 0.3)  # not on the very edge
    weights = torch.where(wrong.flatten(1).any(1)[:, None], wrong.flatten(1), inside.flatten(1))
    weights = weights.float() + 1e-9
    place = torch.multinomial(weights, 1, generator=generator)[:, 0]
    size = sam.image_encoder.img_size / cells
    shift = torch.rand(number, 2, generator=generator)
    cell = torch.stack([place % cells, place // cells], dim=1)
    labels = inside.flatten(1)[torch.arange(number), place].long()
    return ((cell + shift) * size).floor()[:, None], labels[:, None]
