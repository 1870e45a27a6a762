"""Examinations during base training: boxes, points, words and refusals on held-out scenes."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from recipes.embedded_mllm.forward import forward, to_pixels
from recipes.embedded_mllm.lessons import (
    FORMAT,
    UNIT,
    Lesson,
    Plan,
    Teacher,
    Turn,
    box_of,
    boxes_reply,
    left_to_right,
)
from recipes.embedded_mllm.model import END
from recipes.embedded_mllm.packing import Packed, Packer
from recipes.embedded_mllm.scenes import BaseScene, Reference, SceneShards
from sam4mllm_tool.errors import DialogueError
from sam4mllm_tool.geometry import box_iou
from sam4mllm_tool.pipeline.points import grid_points
from sam4mllm_tool.types import Box, TargetCount

EACH_KIND = 24
BATCH = 36
GRIDS = (9, 16)
CROWDED = 300
"""Scenes with overlapping objects that are asked about."""


class Examination:
    """Held-out questions, the same every time."""

    def __init__(
        self,
        folder: Path,
        model: LlavaForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        packer: Packer,
        processor: LlavaProcessor,
    ) -> None:
        self.model, self.tokenizer, self.packer = model, tokenizer, packer
        self.processor = processor
        shards = SceneShards(folder / "scenes", "val")
        self.scenes = [shards[index] for index in range(600)]
        self.asked = _pick(self.scenes, EACH_KIND, random.Random(5))
        self.crowded = SceneShards(folder / "scenes-hard", "val")

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        """All figures; the model is left in training mode."""
        self.model.eval()
        try:
            return self._boxes() | self._points() | self._words() | self._neighbours()
        finally:
            self.model.train()

    def _boxes(self) -> dict[str, float]:
        """Acc@0.5 by kind (a plural needs every box), recall of absence and false alarms."""
        hits: dict[str, list[bool]] = defaultdict(list)
        alarms = []
        for start in range(0, len(self.asked), BATCH):
            part = self.asked[start : start + BATCH]
            questions = [
                FORMAT.ask_boxes(reference.text, TargetCount.ZERO_OR_MORE, UNIT)
                for _, reference in part
            ]
            for (scene, reference), reply in zip(
                part, self.answer([s for s, _ in part], questions), strict=True
            ):
                try:
                    boxes = FORMAT.read_boxes(reply, UNIT).boxes
                except DialogueError:
                    boxes = (Box(0, 0, 0, 0),)
                truth = [box_of(scene, n) for n in left_to_right(scene, reference)]
                hits[reference.kind].append(_same(boxes, truth))
                if truth:
                    alarms.append(not boxes)
        found = {kind: float(np.mean(right)) for kind, right in sorted(hits.items())}
        nothing = {reference.kind for _, reference in self.asked if not reference.targets}
        present = [value for kind, value in found.items() if kind not in nothing]
        return {"box": float(np.mean(present)), **found, "false alarms": float(np.mean(alarms))}

    def answer(self, scenes: list[BaseScene], questions: list[str]) -> list[str]:
        """Replies by transformers' own greedy ``generate``."""
        prompts = [self._prompt(question) for question in questions]
        longest = max(map(len, prompts))
        pad = [[0] * (longest - len(prompt)) for prompt in prompts]
        tokens = torch.tensor([left + prompt for left, prompt in zip(pad, prompts, strict=True)])
        mask = torch.tensor(
            [[0] * len(left) + [1] * len(p) for left, p in zip(pad, prompts, strict=True)]
        )
        pictures = torch.from_numpy(np.stack([scene.image for scene in scenes]))
        pixels = to_pixels(pictures)
        end = self.tokenizer.convert_tokens_to_ids(END)
        made = self.model.generate(
            input_ids=tokens, attention_mask=mask, pixel_values=pixels, max_new_tokens=34,
            do_sample=False, eos_token_id=end, pad_token_id=0,
        )  # fmt: skip
        return list(self.tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True))

    def _prompt(self, question: str) -> list[int]:
        tokens, _ = self.packer.lesson(Lesson("category", (Turn(question, ""),)))
        return [*self.packer.prefix, *tokens[:-1]]  # without the end of the empty reply

    def _points(self) -> dict[str, float]:
        """Yes/no on grids over the true box; earlier answers are given as they should be.

        ``points`` is the balanced accuracy; ``geometry`` that of answering every cell of the
        grid with its majority, which needs no picture.
        """
        found = {}
        for size in GRIDS:
            said: list[tuple[BaseScene, list[Lesson]]] = []
            truth: list[bool] = []
            cells: list[int] = []
            for scene, reference in self.asked:
                if len(reference.targets) != 1:
                    continue
                target, box = reference.targets[0], box_of(scene, reference.targets[0])
                grid = grid_points(box, size)
                inside = [scene.object_at(*point) == target for point in grid]
                question = FORMAT.ask_points(reference.text, box, grid, UNIT)
                first = FORMAT.ask_boxes(reference.text, TargetCount.ZERO_OR_MORE, UNIT)
                turns = (
                    Turn(first, boxes_reply(scene, reference), taught=False),
                    Turn(question, "".join("Yes" if one else "No" for one in inside)),
                )
                said.append((scene, [Lesson("points", turns)]))
                truth += inside
                cells += range(size)
            right = self._forced(said, {"Yes", "No"})
            truth_array, cell_array = np.array(truth), np.array(cells)
            correct = np.array(right)
            usual = np.array([truth_array[cell_array == cell].mean() > 0.5 for cell in range(size)])
            blind = usual[cell_array] == truth_array
            found[f"points{size}"] = _balanced(correct, truth_array)
            found[f"geometry{size}"] = _balanced(blind, truth_array)
        return {"points": found["points9"], **found}

    def _neighbours(self) -> dict[str, float]:
        """Scenes whose objects overlap: round 2 right on background, target and other objects.

        Half of each grid's points off the target are moved onto other objects, boxes are inexact.
        """
        if not len(self.crowded):
            return {}
        teacher, hits = Teacher(random.Random(7)), defaultdict[str, list[bool]](list)
        plan = Plan(list_sizes=(9,), hard=0.5, jitter=0.1)
        half = len(self.crowded) // 2
        for index in range(0, len(self.crowded), max(1, len(self.crowded) // CROWDED)):
            scene = self.crowded[index]
            if (lesson := teacher.points(scene, plan)) is None:
                continue
            world = "overlap" if index < half else "alike"
            question, reply = lesson.turns[1].question, lesson.turns[1].reply
            places = re.findall(r"\((\d{3}),(\d{3})\)", question)
            answers = re.findall("Yes|No", reply)
            right = self._forced([(scene, [lesson])], {"Yes", "No"})[-len(answers) :]
            for (x, y), answer, good in zip(places, answers, right, strict=True):
                on = scene.object_at((int(x) + 0.5) / 1000, (int(y) + 0.5) / 1000) >= 0
                place = "target" if answer == "Yes" else "other" if on else "background"
                hits[f"{world} {place}"].append(good)
        return {name: float(np.mean(good)) for name, good in sorted(hits.items())}

    def _words(self) -> dict[str, float]:
        """What-at: single questions, and lists of five; verification."""
        teacher, plan, found = Teacher(random.Random(6)), Plan(list_sizes=(5,)), {}
        for name, make in (("what", teacher.what), ("lists", teacher.what_list)):
            lessons = [
                (scene, [make(scene, plan) for _ in range(2)]) for scene in self.scenes[:120]
            ]
            right = self._forced(lessons, None)
            found[name] = float(np.mean(right))
        lessons = [
            (s, [x for _ in range(2) if (x := teacher.verify(s, plan))]) for s in self.scenes[:150]
        ]
        found["verify"] = float(np.mean(self._forced([x for x in lessons if x[1]], {"Yes", "No"})))
        return found

    def _forced(
        self, asked: list[tuple[BaseScene, list[Lesson]]], words: set[str] | None
    ) -> list[bool]:
        """Whether each decisive token is the likeliest, the reply so far being the true one.

        ``words`` are the decisive ones; None means every word.
        """
        right: list[bool] = []
        for start in range(0, len(asked), BATCH):
            part = asked[start : start + BATCH]
            packed: Packed = self.packer.pack([lessons for _, lessons in part])
            pictures = torch.from_numpy(np.stack([scene.image for scene, _ in part]))
            _, hidden, _ = forward(self.model, pictures, packed)
            for row in range(len(part)):
                chosen = packed.targets[row] != -100
                targets = packed.targets[row][chosen]
                best = self.model.lm_head(hidden[row][chosen]).argmax(-1)
                tokens = self.tokenizer.convert_ids_to_tokens(targets)
                for token, same in zip(tokens, (best == targets).tolist(), strict=True):
                    word = token.removeprefix("Ġ")
                    if word in words if words else re.fullmatch("[a-zA-Z]+", word):
                        right.append(same)
        return right


def _pick(
    scenes: list[BaseScene], each: int, rng: random.Random
) -> list[tuple[BaseScene, Reference]]:
    """Up to ``each`` questions per kind, one per scene and kind."""
    found: dict[str, list[tuple[BaseScene, Reference]]] = defaultdict(list)
    for scene in scenes:
        for kind in sorted({reference.kind for reference in scene.references}):
            chosen = rng.choice([r for r in scene.references if r.kind == kind])
            if len(found[kind]) < each:
                found[kind].append((scene, chosen))
    return [asked for kind in sorted(found) for asked in found[kind]]


def _same(boxes: tuple[Box, ...], truth: list[Box]) -> bool:
    """Whether the boxes are as many as the truth and fit one by one (IoU >= 0.5)."""
    left = list(truth)
    for box in boxes:
        best = max(left, key=lambda other: box_iou(box, other), default=None)
        if best is None or box_iou(box, best) < 0.5:
            return False
        left.remove(best)
    return not left


def _balanced(correct: np.ndarray, truth: np.ndarray) -> float:
    return float((correct[truth].mean() + correct[~truth].mean()) / 2)
