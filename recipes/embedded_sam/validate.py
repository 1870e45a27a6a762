"""A quick validation while a small SAM trains: box alone, box and points, one point."""

from functools import lru_cache

import numpy as np
import torch
from segment_anything.modeling import Sam

from recipes.embedded_sam.data import covered, jitter_box, mask_box, pixel_on
from recipes.embedded_sam.interaction import decode
from recipes.embedded_sam.loss import mask_iou
from sam4mllm_tool.scenes.render import render_scene
from sam4mllm_tool.scenes.world import SAM_WORLD
from sam4mllm_tool.segmenter.small import SmallSamConfig

SCENES = 48
MIN_PIXELS = 100


@torch.no_grad()
def validate(sam: Sam, config: SmallSamConfig, seed: int) -> dict[str, float]:
    """Mean IoU at the mask logits' resolution, best-scored of three masks, by kind of prompt.

    Boxes are the true ones with every edge moved by up to 10%; points are uniform in the box.
    """
    sam.eval()
    sums: dict[str, list[float]] = {}
    for image, targets, boxes, points, labels, inside in _prompts(config, seed):
        embedding = sam.image_encoder((image - sam.pixel_mean) / sam.pixel_std)
        embedding = embedding.expand(len(targets), -1, -1, -1)
        none = points[:, :0], labels[:, :0]
        one = inside[:, None], torch.ones(len(inside), 1, dtype=torch.long)
        for name, where, box in (
            ("box", none, boxes),
            ("box_10_points", (points, labels), boxes),
            ("one_point", one, None),
        ):
            logits, quality = decode(sam, embedding, *where, box, None)
            best = quality[:, 1:].argmax(1)
            chosen = logits[:, 1:][torch.arange(len(best)), best]
            sums.setdefault(name, []).extend(mask_iou(chosen > 0, targets > 127).tolist())
    return {name: float(np.mean(values)) for name, values in sums.items()}


@lru_cache(maxsize=1)
def _prompts(config: SmallSamConfig, seed: int) -> list[tuple[torch.Tensor, ...]]:
    rng = np.random.default_rng(seed)
    prompts = []
    for index in range(SCENES):
        scene = render_scene(SAM_WORLD, "val", index, seed, config.image_size)
        masks = [thing.mask for thing in scene.objects if thing.area >= MIN_PIXELS]
        if not masks:
            continue
        boxes = np.stack([jitter_box(mask_box(mask), 0.1, mask, rng) for mask in masks])
        points = rng.uniform(boxes[:, None, :2], boxes[:, None, 2:], (len(masks), 10, 2))
        points = np.floor(points).clip(0, config.image_size - 1)
        columns, rows = points.astype(int).transpose(2, 0, 1)
        labels = np.stack(masks)[np.arange(len(masks))[:, None], rows, columns]
        pixels = np.array(scene.image, dtype=np.float32).transpose(2, 0, 1)[None]
        arrays = (
            pixels,
            np.stack([covered(mask, 4 * config.grid) for mask in masks]),
            boxes,
            points.astype(np.float32),
            labels.astype(np.int64),
            np.stack([pixel_on(mask, rng) for mask in masks]),
        )
        prompts.append(tuple(torch.from_numpy(array) for array in arrays))
    return prompts
