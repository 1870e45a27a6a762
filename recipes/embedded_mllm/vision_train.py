"""Vision training (stage 1): ``python -m recipes.embedded_mllm.vision_train FOLDER``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlavaForConditionalGeneration

from recipes.embedded_mllm.forward import to_pixels, tower_features
from recipes.embedded_mllm.init import init_vision, place_codes
from recipes.embedded_mllm.layout import Layout
from recipes.embedded_mllm.model import BaseShape, build_model, build_tokenizer, shape_of
from recipes.embedded_mllm.optimizer import make_optimizers
from recipes.embedded_mllm.scenes import SceneShards
from recipes.embedded_mllm.vision import DenseHeads, Questions, dense_loss, patch_answers
from recipes.embedded_mllm.world import questions_of, words_of
from sam4mllm_tool.scenes.world import WORLDS

Batch = tuple[Tensor, Tensor, Tensor]


class DenseBatches(IterableDataset[Batch]):
    """Endless batches (pictures uint8 B x H x W x 3, answers, boxes), shuffled by seed."""

    def __init__(
        self, folder: Path, questions: Questions, grid: int, size: int, seed: int, split: str
    ) -> None:
        self.folder, self.questions, self.grid = folder, questions, grid
        self.size, self.seed, self.split = size, seed, split

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        cache = SceneShards(self.folder, self.split)
        rng = np.random.default_rng(self.seed)
        while True:
            order = rng.permutation(len(cache))
            for start in range(0, len(order) - self.size + 1, self.size):
                yield dense_batch(
                    cache, order[start : start + self.size], self.questions, self.grid
                )


def dense_batch(cache: SceneShards, indices: np.ndarray, questions: Questions, grid: int) -> Batch:
    """Pictures, patch answers and boxes of these scenes."""
    scenes = [cache[int(index)] for index in indices]
    answers, boxes = zip(*(patch_answers(s, questions, grid) for s in scenes), strict=True)
    pictures = np.stack([scene.image for scene in scenes])
    return tuple(map(torch.from_numpy, (pictures, np.stack(answers), np.stack(boxes))))  # type: ignore[return-value]


@torch.no_grad()
def measure(
    tower: torch.nn.Module, heads: DenseHeads, batch: Batch, questions: Questions
) -> dict[str, float]:
    """Accuracy of names on covered patches, mean box IoU, balanced accuracy of the other groups."""
    pictures, answers, boxes = batch
    names = len(questions.names)
    features = tower_features(tower, to_pixels(pictures)).float()
    logits, numbers = heads(features)
    groups, busy = questions.groups, ~boxes[..., 0].isnan()
    full = busy & (answers[..., groups["cells"]].mean(-1) > 0.5)
    correct = logits[..., :names].argmax(-1) == answers[..., :names].argmax(-1)
    figures = {"name": correct[full].float().mean().item()}
    for group in ("colours", "flags", "relations", "cells"):
        predicted, truth = logits[..., groups[group]] > 0, answers[..., groups[group]] > 0.5
        where = busy if group == "cells" else full
        hits = [
            (predicted == truth)[where][truth[where] == value].float().mean() for value in (0, 1)
        ]
        figures[group] = (sum(hits) / 2).item()
    figures["silent"] = (logits[..., :names].max(-1).values < 0)[~busy].float().mean().item()
    edges = numbers.argmax(-1).float().add(0.5).div(1000)
    figures["box_iou"] = _iou(edges[full], boxes[full]).mean().item()
    return figures


def _iou(a: Tensor, b: Tensor) -> Tensor:
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(box[:, 2:] - box[:, :2]).clamp(min=0).prod(-1) for box in (a, b)]
    return shared / (areas[0] + areas[1] - shared + 1e-9)


def fit_heads(
    scenes: Path, tower: torch.nn.Module, heads: DenseHeads, shape: BaseShape, steps: int = 300
) -> dict[str, float]:
    """Train new heads on a frozen tower. Returns their held-out accuracy."""
    questions, weights = heads.questions, torch.ones(heads.questions.count)
    batches = DenseBatches(scenes, questions, shape.grid, 32, 0, "train")
    optimizers = make_optimizers(heads.named_parameters(), 5e-3, "adamw")
    for step, (pictures, answers, boxes) in zip(range(steps), batches, strict=False):
        optimizers.set_scale(1 - step / steps)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            features = tower_features(tower, to_pixels(pictures)).float()
        loss, _ = dense_loss(heads, features, answers, boxes, weights)
        optimizers.step(loss, heads.parameters())
    held_out = dense_batch(SceneShards(scenes, "val"), np.arange(200), questions, shape.grid)
    return measure(tower, heads, held_out, questions)


def main() -> None:
    """Train for ``--minutes``; writes ``vision.safetensors`` every few minutes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="folder with the scenes; the weights are written to it"
    )
    parser.add_argument("--world", default="small", choices=sorted(WORLDS))
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--optimizer", default="muon", choices=["muon", "adamw"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="vision")
    parser.add_argument(
        "--start",
        type=Path,
        help="saved base whose tower is trained further; its place code is kept",
    )
    parser.add_argument("--heads", type=Path, help="saved heads that the tower must satisfy")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    shape, world = BaseShape(), WORLDS[options.world]
    projector: torch.nn.Module | None = None
    questions = questions_of(world)
    heads = DenseHeads(shape.vision_width, questions)
    weights = torch.ones(questions.count)
    weights[questions.groups["relations"]] = 0.5
    scenes = options.folder / "scenes"
    if options.start is None:
        model = build_model(build_tokenizer(words_of(world)), shape)
        init_vision(model, shape)
        tower = model.model.vision_tower
    else:
        model = LlavaForConditionalGeneration.from_pretrained(options.start, dtype=torch.float32)
        shape, tower = shape_of(model), model.model.vision_tower
        projector = model.model.multi_modal_projector.requires_grad_(False)
        if options.heads:
            heads.load_state_dict(load_file(options.heads))
        else:
            print("heads", fit_heads(scenes, tower, heads, shape), flush=True)
        heads.requires_grad_(False)  # the decoder relies on the features that they read
    places = place_codes(shape)
    batches = DenseBatches(scenes, questions, shape.grid, options.batch, options.seed, "train")
    loader = iter(DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=4))
    held_out = dense_batch(SceneShards(scenes, "val"), np.arange(200), questions, shape.grid)
    named = [*tower.named_parameters(), *heads.named_parameters()]
    named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    optimizers = make_optimizers(named, options.rate, options.optimizer)
    started, step, sums = time.time(), 0, np.zeros(2)
    while (share := (time.time() - started) / (options.minutes * 60)) < 1:
        optimizers.set_scale(min(1, (step + 1) / 50) * min(1, max(0.03, (1 - share) / 0.4)))
        pictures, answers, boxes = next(loader)
        with torch.autocast("cpu", torch.bfloat16):
            features = tower_features(tower, to_pixels(pictures))
        loss, parts = dense_loss(heads, features.float(), answers, boxes, weights)
        if projector is not None:  # patches must keep their place code
            seen = projector(features.float())[..., Layout.place]
            loss = loss + functional.mse_loss(seen, places.expand_as(seen))
        optimizers.step(loss, [p for _, p in named])
        step += 1
        sums += [parts["answers"], parts["boxes"]]
        if step % 25 == 0:
            log = " ".join(f"{k} {v:.3f}" for k, v in zip(parts, sums / 25, strict=True))
            print(
                f"{share * options.minutes:.1f} min, {step * options.batch} pictures: {log}",
                flush=True,
            )
            sums[:] = 0
        if step % 200 == 0:
            save(options.folder / f"{options.name}.safetensors", tower, heads)
            figures = measure(tower, heads, held_out, questions)
            print("  ", {k: round(v, 3) for k, v in figures.items()}, flush=True)
    figures = measure(tower, heads, held_out, questions)
    print("end", {k: round(v, 3) for k, v in figures.items()}, flush=True)
    save(options.folder / f"{options.name}.safetensors", tower, heads)


def save(file: Path, tower: torch.nn.Module, heads: DenseHeads) -> None:
    """Write tower and heads, with ``tower.`` and ``heads.`` before their names."""
    kept = {f"tower.{k}": v for k, v in tower.state_dict().items()}
    kept |= {f"heads.{k}": v for k, v in heads.state_dict().items()}
    save_file({k: v.contiguous() for k, v in kept.items()}, file)


if __name__ == "__main__":
    main()
