"""Evaluation during base training: boxes, points, words and absence, on held-out scenes."""

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
"""Approximate number of scenes with overlapping objects that are used."""


class Examination:
    """Evaluation on held-out questions, which are the same every time."""

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
        """Acc@0.5 by kind (a plural needs every box), recall of absence, and false alarms.

        A false alarm is an answer "absent" about an object that is in the picture.
        """
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
        figures = {kind: float(np.mean(right)) for kind, right in sorted(hits.items())}
        absent_kinds = {reference.kind for _, reference in self.asked if not reference.targets}
        present = [value for kind, value in figures.items() if kind not in absent_kinds]
        return {"box": float(np.mean(present)), **figures, "false alarms": float(np.mean(alarms))}

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
        generated = self.model.generate(
            input_ids=tokens, attention_mask=mask, pixel_values=pixels, max_new_tokens=34,
            do_sample=False, eos_token_id=end, pad_token_id=0,
        )  # fmt: skip
        return list(self.tokenizer.batch_decode(generated[:, longest:], skip_special_tokens=True))

    def _prompt(self, question: str) -> list[int]:
        tokens, _ = self.packer.lesson(Lesson("category", (Turn(question, ""),)))
        return [*self.packer.prefix, *tokens[:-1]]  # without the end of the empty reply

    def _points(self) -> dict[str, float]:
        """Yes/no on grids over the true box; earlier answers are given correctly.

        ``points`` is the balanced accuracy; ``geometry`` that of answering every cell of the
        grid with its majority, which needs no picture.
        """
        figures = {}
        for size in GRIDS:
            asked: list[tuple[BaseScene, list[Lesson]]] = []
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
                asked.append((scene, [Lesson("points", turns)]))
                truth += inside
                cells += range(size)
            right = self._forced(asked, {"Yes", "No"})
            truth_array, cell_array = np.array(truth), np.array(cells)
            correct = np.array(right)
            usual = np.array([truth_array[cell_array == cell].mean() > 0.5 for cell in range(size)])
            blind = usual[cell_array] == truth_array
            figures[f"points{size}"] = _balanced(correct, truth_array)
            figures[f"geometry{size}"] = _balanced(blind, truth_array)
        return {"points": figures["points9"], **figures}

    def _neighbours(self) -> dict[str, float]:
        """Accuracy of round 2 with overlapping objects: on background, target and other objects.

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
        """Accuracy of words at single points and at lists of five, and of verification."""
        teacher, plan, figures = Teacher(random.Random(6)), Plan(list_sizes=(5,)), {}
        for name, make in (("what", teacher.what), ("lists", teacher.what_list)):
            lessons = [
                (scene, [make(scene, plan) for _ in range(2)]) for scene in self.scenes[:120]
            ]
            right = self._forced(lessons, None)
            figures[name] = float(np.mean(right))
        lessons = [
            (s, [x for _ in range(2) if (x := teacher.verify(s, plan))]) for s in self.scenes[:150]
        ]
        figures["verify"] = float(
            np.mean(self._forced([x for x in lessons if x[1]], {"Yes", "No"}))
        )
        return figures

    def _forced(
        self, asked: list[tuple[BaseScene, list[Lesson]]], words: set[str] | None
    ) -> list[bool]:
        """Whether each decisive token is the most likely one after the true reply so far.

        ``words`` are the decisive tokens; ``None`` means every word.
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
    picked: dict[str, list[tuple[BaseScene, Reference]]] = defaultdict(list)
    for scene in scenes:
        for kind in sorted({reference.kind for reference in scene.references}):
            chosen = rng.choice([r for r in scene.references if r.kind == kind])
            if len(picked[kind]) < each:
                picked[kind].append((scene, chosen))
    return [asked for kind in sorted(picked) for asked in picked[kind]]


def _same(boxes: tuple[Box, ...], truth: list[Box]) -> bool:
    """Whether there are as many boxes as in the truth, and each matches one (IoU >= 0.5)."""
    unmatched = list(truth)
    for box in boxes:
        best = max(unmatched, key=lambda other: box_iou(box, other), default=None)
        if best is None or box_iou(box, best) < 0.5:
            return False
        unmatched.remove(best)
    return not unmatched


def _balanced(correct: np.ndarray, truth: np.ndarray) -> float:
    return float((correct[truth].mean() + correct[~truth].mean()) / 2)
