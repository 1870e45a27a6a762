"""Stage 2 of base training: ``python -m recipes.embedded_mllm.train FOLDER``.

Starts from the tower of stage 1, folds its heads into the projector, and teaches the dialogue.
Writes checkpoints every few minutes, and continues from the last one when started again. Lessons
become harder (:data:`COURSE`) when the model reaches given accuracies, not at fixed times.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoTokenizer, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from recipes.embedded_mllm.early import EarlyHeads
from recipes.embedded_mllm.forward import ATTENTION, forward, to_pixels, tower_features
from recipes.embedded_mllm.init import init_language, place_codes
from recipes.embedded_mllm.layout import Layout, make_meanings
from recipes.embedded_mllm.lessons import TOPICS, Plan, Teacher
from recipes.embedded_mllm.measure import Examination
from recipes.embedded_mllm.model import (
    IMAGE,
    LONGEST_LIST,
    BaseShape,
    build_model,
    build_processor,
    build_tokenizer,
    save_base,
    shape_of,
)
from recipes.embedded_mllm.optimizer import Optimizers, make_optimizers
from recipes.embedded_mllm.packing import Looks, Packed, Packer
from recipes.embedded_mllm.projector import fold_projector
from recipes.embedded_mllm.scenes import BaseScene, SceneShards
from recipes.embedded_mllm.vision import (
    DenseHeads,
    dense_loss,
    patch_answers,
    point_answers,
    question_weights,
)
from recipes.embedded_mllm.vision_train import fit_heads
from recipes.embedded_mllm.world import known_words, questions_of, words_of
from sam4mllm_tool.scenes.world import WORLDS
from sam4mllm_tool.training.token_loss import TokenLoss

COURSE = (
    Plan(boxes=5, absent=1.5, what=4, what_lists=1, points=1, verify=1, list_sizes=(2, 3, 4, 5)),
    Plan(boxes=5, absent=1.5, what=2, what_lists=1, points=3, verify=1, list_sizes=(2, 4, 6, 9)),
    Plan(boxes=5, absent=1.5, what=0.5, what_lists=0.5, points=3, verify=0.5, ppg=0.7,
         list_sizes=(4, 6, 9, 9, 10, 12, LONGEST_LIST)),
    Plan(boxes=8, absent=2.6, what=0.05, what_lists=0.1, points=2.4, verify=0.1, ppg=0.3, hard=0.7,
         shared=0.15, jitter=0.25, list_sizes=(1, 1, 2, 4, 6, 9, 9, 12, LONGEST_LIST)),
)  # fmt: skip
"""Lesson plans, from easy to hard; the last one is about the object that a point lies on."""
GATES = ({"what": 0.7, "lists": 0.55}, {"points": 0.72}, {"box": 0.85})
"""Figures that an evaluation must reach before the next plan starts."""
EARLY = "early.safetensors"


@dataclass(frozen=True)
class Batch:
    """B pictures (uint8), their lessons, and the targets of patches and written points."""

    pictures: Tensor
    packed: Packed
    answers: Tensor  # B x patches x questions
    boxes: Tensor  # B x patches x 4
    looks: Looks
    look_answers: Tensor  # N x questions
    look_boxes: Tensor  # N x 4


class LessonBatches(IterableDataset[Batch]):
    """Endless batches (pictures, packed lessons, dense answers, boxes) from cached scenes."""

    def __init__(self, folder: Path, packer: Packer, shape: BaseShape, size: int, seed: int,
                 longest: int, world: str) -> None:  # fmt: skip
        self.folder, self.packer, self.shape = folder, packer, shape
        self.size, self.seed, self.longest = size, seed, longest
        self.questions = questions_of(WORLDS[world])

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        shards, rng = SceneShards(self.folder / "scenes", "train"), random.Random(self.seed)
        teacher = Teacher(rng)
        while True:
            order = list(range(len(shards)))
            rng.shuffle(order)
            while len(order) >= 3 * self.size:
                stage = int((self.folder / "stage").read_text() or 0)
                scenes: list[BaseScene] = []
                while len(scenes) < self.size and order:
                    scene = shards[order.pop()]
                    if len(scene.things) > 1 or rng.random() < 0.4:
                        scenes.append(scene)
                lessons = [teacher.lessons(scene, COURSE[stage]) for scene in scenes]
                dense = [patch_answers(s, self.questions, self.shape.grid) for s in scenes]
                answers, boxes = (np.stack(part) for part in zip(*dense, strict=True))
                packed = self.packer.pack(lessons, self.longest)
                looks = self.packer.looks(packed)
                rows, points = looks.rows.tolist(), looks.points.tolist()
                seen = point_answers(scenes, rows, points, self.questions)
                yield Batch(
                    torch.from_numpy(np.stack([scene.image for scene in scenes])), packed,
                    torch.from_numpy(answers), torch.from_numpy(boxes),
                    looks, torch.from_numpy(seen[0]), torch.from_numpy(seen[1]),
                )  # fmt: skip


def new_rates(name: str) -> float:
    """Learning-rate factors of a new model: low for built-in circuits, to preserve them."""
    if "vision_tower" in name:
        return 0.6
    if "lm_head" in name:
        return 0.5
    if "projector" in name or "embed_tokens" in name:
        return 0.2
    if any(f"layers.{n}.self_attn" in name or f"layers.{n}.input" in name for n in (0, 1)):
        return 0.1
    return 0.3 if "layers.2.self_attn" in name else 1.0


def later_rates(name: str) -> float:
    """Learning-rate factors of a trained base: moderate, to keep what it has learnt."""
    if name.startswith("early."):
        return 6.0
    if "vision_tower" in name or "lm_head" in name:
        return 0.5
    if "projector" in name or "embed_tokens" in name:
        return 0.25
    return 0.4 if any(f"layers.{n}.self_attn" in name for n in (0, 1, 2)) else 1.0


def start_model(
    folder: Path, world: str, shape: BaseShape, seed: int
) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerFast, DenseHeads]:
    """A model with the tower of stage 1 and with circuits in its decoder; stage 1's heads."""
    torch.manual_seed(seed)
    questions = questions_of(WORLDS[world])
    tokenizer = build_tokenizer(words_of(WORLDS[world]))
    model = build_model(tokenizer, shape)
    heads = DenseHeads(shape.vision_width, questions)
    load_tower(folder / "vision.safetensors", model, heads)
    meanings = make_meanings(questions, seed)
    init_language(model, tokenizer, questions, meanings)
    shards = SceneShards(folder / "scenes", "train")
    pictures = torch.from_numpy(np.stack([shards[n].image for n in range(200)]))
    with torch.no_grad():
        features = tower_features(model.model.vision_tower, to_pixels(pictures))
    print(fold_projector(model, heads, questions, meanings, features, shape), flush=True)
    return model, tokenizer, heads


def earlier_model(
    folder: Path, start: Path, world: str, tower: Path | None, dense: float
) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerFast, DenseHeads]:
    """A saved base to continue with, and stage 1's heads.

    Tower and heads come from a run of stage 1 (``tower``). Without one, the heads are fitted on the
    base's own tower, if they are used.
    """
    tokenizer = build_tokenizer(words_of(WORLDS[world]))
    model = LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    adapt_vocabulary(model, AutoTokenizer.from_pretrained(start), tokenizer)
    heads = DenseHeads(BaseShape().vision_width, questions_of(WORLDS[world]))
    if tower:
        load_tower(tower, model, heads)
    elif dense:
        read = fit_heads(folder / "scenes", model.model.vision_tower, heads, shape_of(model))
        print("heads", read, flush=True)
    return model, tokenizer, heads


def load_tower(file: Path, model: LlavaForConditionalGeneration, heads: DenseHeads) -> None:
    """Load the tower and heads that stage 1 wrote."""
    stored = load_file(file)
    for module, prefix in ((model.model.vision_tower, "tower."), (heads, "heads.")):
        own = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
        module.load_state_dict(own)


@torch.no_grad()
def adapt_vocabulary(
    model: LlavaForConditionalGeneration,
    old: PreTrainedTokenizerFast,
    new: PreTrainedTokenizerFast,
) -> None:
    """Change the model's vocabulary; a new word starts near the mean of all words."""
    before, after = old.get_vocab(), new.get_vocab()
    if before == after:
        return
    size = -(-len(new) // 64) * 64
    words = [index for token, index in before.items() if re.fullmatch("Ġ?[a-z]{2,}", token)]
    rows = {index: before.get(token) for token, index in after.items()}
    tables = (model.get_input_embeddings().weight, model.lm_head.weight)
    kept = [table.detach().clone() for table in tables]
    model.resize_token_embeddings(size)
    tables = (model.get_input_embeddings().weight, model.lm_head.weight)
    for table, known in zip(tables, kept, strict=True):
        middle, spread = known[words].mean(0), known[words].std(0)
        for index, source in rows.items():
            fresh = middle + 0.3 * spread * torch.randn(len(middle))
            table[index] = fresh if source is None else known[source]
    model.config.image_token_index = after[IMAGE]


def main() -> None:
    """Train for ``--minutes``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--world", default="small", choices=sorted(WORLDS))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--longest", type=int, default=448)
    parser.add_argument(
        "--dense", type=float, default=0.3, help="weight of stage 1's loss; 0: none"
    )
    parser.add_argument(
        "--look", type=float, default=0.03,
        help="weight of the loss of what lies at each written point; 0: none",
    )  # fmt: skip
    parser.add_argument("--tower", type=Path, help="with --start: tower and heads of stage 1")
    parser.add_argument("--optimizer", default="adamw", choices=["muon", "adamw"])
    parser.add_argument("--examine", type=float, default=8, help="minutes between evaluations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="saved base to continue with, at the last plan")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape, folder = BaseShape(), options.folder
    if options.start is None:
        model, tokenizer, heads = start_model(folder, options.world, shape, options.seed)
    else:
        model, tokenizer, heads = earlier_model(
            folder, options.start, options.world, options.tower, options.dense
        )
        shape = shape_of(model)
    model.set_attn_implementation(ATTENTION)
    heads.requires_grad_(False)
    early = EarlyHeads(shape.text_width, heads.questions)
    if options.start and (options.start / EARLY).exists():
        early.load_state_dict(load_file(options.start / EARLY))
    trained = [*model.named_parameters(), *early.named_parameters(prefix="early")]
    optimizers = make_optimizers(trained, options.rate, options.optimizer,
                                 new_rates if options.start is None else later_rates)  # fmt: skip
    state = {"step": 0, "seconds": 0.0, "pictures": 0}
    state["stage"] = 0 if options.start is None else len(GATES)
    if (folder / "resume.pt").exists():
        state = resume(folder, model, early, optimizers)
    (folder / "stage").write_text(str(state["stage"]))
    packer = Packer(tokenizer, shape.grid**2, TOPICS)
    batches = LessonBatches(folder, packer, shape, options.batch, options.seed + state["step"],
                            options.longest, options.world)  # fmt: skip
    loader = iter(DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=6))
    examination = Examination(folder, model, tokenizer, packer, build_processor(tokenizer, shape))
    loss_of, parameters = TokenLoss(tokenizer), [parameter for _, parameter in trained]
    weights = question_weights(heads.questions)
    places = place_codes(shape)  # patches must keep their place code
    clock = time.time() - state["seconds"]
    next_exam = state["seconds"] + (options.examine * 60 if state["step"] or options.start else 0)
    sums = np.zeros((len(TOPICS), 3))
    while True:
        state["seconds"] = time.time() - clock
        share = state["seconds"] / (options.minutes * 60)
        if state["seconds"] >= next_exam or share >= 1:
            examine(state, examination, folder, model, early, optimizers, options, shape)
            clock = time.time() - state["seconds"]
            next_exam = state["seconds"] + options.examine * 60
            if share >= 1:
                break
        optimizers.set_scale(
            min(1, (state["step"] + 1) / 60) * min(1, max(0.02, (1 - share) / 0.35))
        )
        batch = next(loader)
        packed = batch.packed
        with torch.autocast("cpu", torch.bfloat16):
            features, hidden, states = forward(model, batch.pictures, packed)
            chosen = packed.targets != -100
            logits = model.lm_head(hidden[chosen])
        targets = packed.targets[chosen]
        loss, each = loss_of(logits, targets)
        dense = torch.zeros(())
        if options.dense:
            dense, _ = dense_loss(heads, features.float(), batch.answers, batch.boxes, weights)
        looked, verdict = early(states, batch.looks, batch.look_answers, batch.look_boxes)
        seen = model.model.multi_modal_projector(features.float())[..., Layout.place]
        place_loss = functional.mse_loss(seen, places.expand_as(seen))
        total_loss = (
            loss + options.dense * dense + options.look * looked + 0.5 * verdict + place_loss
        )
        optimizers.step(total_loss, parameters)
        state["step"] += 1
        state["pictures"] += len(batch.pictures)
        topics, right = packed.topics[chosen].numpy(), (logits.argmax(-1) == targets).numpy()
        decisive = (loss_of.weigh(targets) > 0.3).numpy()
        for topic in range(len(TOPICS)):
            mine = (topics == topic) & decisive
            sums[topic] += mine.sum(), right[mine].sum(), each.numpy()[mine].sum()
        if state["step"] % 50 == 0:
            log = " ".join(
                f"{topic} {hits / n:.2f}/{summed / n:.2f}"
                for topic, (n, hits, summed) in zip(TOPICS, sums, strict=True) if n
            )  # fmt: skip
            print(
                f"{state['seconds'] / 60:.1f} min step {state['step']} dense {dense:.2f} "
                f"look {looked:.2f} verdict {verdict:.3f} place {place_loss:.2f} {log}",
                flush=True,
            )
            sums[:] = 0


def examine(
    state: dict[str, Any],
    examination: Examination,
    folder: Path,
    model: LlavaForConditionalGeneration,
    early: EarlyHeads,
    optimizers: Optimizers,
    options: argparse.Namespace,
    shape: BaseShape,
) -> None:
    """Evaluate, start the next plan if its gate is reached, and write checkpoint and curve."""
    figures = examination.run()
    gate = GATES[state["stage"]] if state["stage"] < len(GATES) else None
    if gate and all(figures[key] >= value for key, value in gate.items()):
        state["stage"] += 1
        (folder / "stage").write_text(str(state["stage"]))
    line = {"minutes": round(state["seconds"] / 60, 1), "pictures": state["pictures"],
            "stage": state["stage"], **figures}  # fmt: skip
    print("EXAM", json.dumps(line), flush=True)
    with (folder / "curve.jsonl").open("a") as curve:
        curve.write(json.dumps(line) + "\n")
    save_base(folder / "model", model, examination.processor, known_words(WORLDS[options.world]),
              options.world, shape)  # fmt: skip
    save_file(early.state_dict(), folder / "model" / EARLY)
    kept = {k: v.contiguous() for k, v in model.state_dict().items()}
    kept |= {f"early.{k}": v for k, v in early.state_dict().items()}
    save_file(kept, folder / "last.safetensors")
    torch.save({"state": state, "optimizers": optimizers.state_dict()}, folder / "resume.pt")


def resume(
    folder: Path, model: LlavaForConditionalGeneration, early: EarlyHeads, optimizers: Optimizers
) -> dict[str, Any]:
    """Load weights, optimiser state and clock of the last checkpoint."""
    kept = load_file(folder / "last.safetensors")
    early.load_state_dict({k[6:]: kept.pop(k) for k in list(kept) if k.startswith("early.")})
    model.load_state_dict(kept)
    stored = torch.load(folder / "resume.pt", weights_only=True)
    optimizers.load_state_dict(stored["optimizers"])
    return dict(stored["state"])


if __name__ == "__main__":
    main()
