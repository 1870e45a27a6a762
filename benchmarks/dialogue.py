"""How much faster the dialogue is than recomputing everything in each round.

    python -m benchmarks.dialogue [--json] [--repeats N] [--threads N]

Both sides use the same random weights (about 100M parameters), the same grammar and the same
questions, and must give the same answers; the oracle is two ``model.generate`` calls per object, as
in the authors' procedure. Figures are medians of ratios of neighbouring runs, at about 600 and
1,900 image tokens, with 30 points per question:

- ``first_object``: oracle / engine, both rounds about an image neither has seen;
- ``second_object``: the same for another expression on that image;
- ``extra_points``: 30 more points of the same object;
- ``floor_ratio``: whole first object with mask / the least it can cost: one pass over image and
  question, one pass per free number of the box, one pass over all answers, SAM encode and decode.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from benchmarks.random_llava import mix_answers, random_llava
from sam4mllm_tool.mllm.local import LocalMllm
from sam4mllm_tool.mllm.oracle import RecomputeMllm
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.pipeline.points import grid_points
from sam4mllm_tool.pipeline.results import Location
from sam4mllm_tool.protocols import Segmenter, SegmentPrompt, Turn
from sam4mllm_tool.segmenter.segment_anything import SegmentAnythingSegmenter
from sam4mllm_tool.segmenter.small import SmallSamConfig, build_small_sam
from sam4mllm_tool.types import Point, PromptPoint, RgbImage, TargetCount

POINTS = 30
IMAGE_TOKENS = (576, 1936)
BARS = {"first_object": 1.6, "second_object": 4.5, "extra_points": 4.5, "floor_ratio": 1.3}
NAMES = tuple(BARS)


@dataclass(frozen=True)
class Outcome:
    """The outcome of one object's dialogue, for comparing the two sides."""

    location: Location
    points: tuple[PromptPoint, ...]


class Contest:
    """Engine and oracle over the same weights."""

    def __init__(self, image_tokens: int, clock: Callable[[], float]) -> None:
        model, processor, self.image_tokens = random_llava(image_tokens)
        self.parameters = sum(p.numel() for p in model.parameters())
        segmenter = _segmenter()
        self.engine = Sam4MLLM(LocalMllm(model, processor, name="engine"), segmenter)
        self.oracle = Sam4MLLM(RecomputeMllm(model, processor, name="oracle"), segmenter)
        self.clock = clock
        self.probability_gap, self.yes, self.answers = 0.0, 0, 0

    def round(self, seed: int) -> dict[str, float]:
        """All ratios on one new picture."""
        image = random_picture(seed)
        engine, oracle = self.engine, self.oracle
        _mix_answers(engine, image)
        fast, outcome = self._timed(lambda: _dialogue(engine, image, "the red apple"))
        mask, _ = self._timed(lambda: _mask(engine, image, outcome))
        least, _ = self._timed(_Floor(engine, random_picture(seed + 10_000), outcome).run)
        slow, truth = self._timed(lambda: _dialogue(oracle, image, "the red apple"))
        self._check(outcome, truth)
        first, floor_ratio = slow / fast, (fast + mask) / least
        fast, outcome = self._timed(lambda: _dialogue(engine, image, "the dog on the left"))
        slow, truth = self._timed(lambda: _dialogue(oracle, image, "the dog on the left"))
        self._check(outcome, truth)
        second = slow / fast
        fast, outcome = self._timed(lambda: _more_points(engine, image, outcome))
        slow, truth = self._timed(lambda: _more_points(oracle, image, truth))
        self._check(outcome, truth)
        return dict(zip(NAMES, (first, second, slow / fast, floor_ratio), strict=True))

    def _timed(self, run: Callable[[], Any]) -> tuple[float, Any]:
        start = self.clock()
        result = run()
        return self.clock() - start, result

    def _check(self, outcome: Outcome, truth: Outcome) -> None:
        """Stop unless both sides gave the same answers: else the comparison means nothing."""
        if outcome.location.dialogue != truth.location.dialogue:
            raise SystemExit(f"boxes differ: {outcome.location} {truth.location}")
        for one, other in zip(outcome.points, truth.points, strict=True):
            gap = max(abs(_p(one.p_yes) - _p(other.p_yes)), abs(_p(one.p_no) - _p(other.p_no)))
            self.probability_gap = max(self.probability_gap, gap)
            self.yes += _p(one.p_yes) > _p(one.p_no)
            self.answers += 1
        if self.probability_gap > 1e-4:
            raise SystemExit(f"probabilities differ by {self.probability_gap}")


class _Floor:
    """The least work that a first object needs, in plain calls of the model."""

    def __init__(self, side: Sam4MLLM, image: RgbImage, outcome: Outcome) -> None:
        assert isinstance(side.mllm, LocalMllm)
        self.mllm, self.segmenter = side.mllm, side.segmenter
        self.image, self.outcome = image, outcome
        encoder, location = self.mllm.encoder, outcome.location
        question = side.speech.ask_points(
            location.expression, location.objects[0].box, _points(location), image.size
        )
        inputs = encoder.image_inputs(image)
        asked = encoder.encode(location.dialogue[:-1], inputs)
        full = encoder.encode((*location.dialogue, Turn("user", question)), inputs)
        opening = (*asked.ids, *encoder.encode_continuation("["))
        self.first = self.mllm.engine.image_arguments(inputs, opening, asked.image_end)
        read = len(opening) + 6  # three numbers, three commas
        self.tails = [
            torch.tensor([[*full.ids[read:], *encoder.encode_continuation(word * 29)]])
            for word in ("Yes", "No")
        ]
        self.number = torch.tensor([encoder.encode_continuation("500,")])

    @torch.inference_mode()
    def read(self) -> DynamicCache:
        """One prefill, three more free numbers, one answer pass."""
        model: Any = self.mllm.model
        cache = DynamicCache(config=model.config.get_text_config())
        model(**self.first, cache=cache, use_cache=True, logits_to_keep=1)
        for _ in range(3):
            model(input_ids=self.number, cache=cache, use_cache=True, logits_to_keep=1)
        self.answer(0, cache)
        return cache

    def answer(self, tail: int, cache: DynamicCache) -> None:
        """One pass over question and answers."""
        ids = self.tails[tail]
        self.mllm.model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=POINTS)

    def run(self) -> None:
        """All of that, and SAM."""
        self.read()
        _mask_of(self.segmenter, self.image, self.outcome)


def _dialogue(side: Sam4MLLM, image: RgbImage, expression: str) -> Outcome:
    """Both rounds."""
    location = side.locate(image, expression, count=TargetCount.ONE)
    box = location.objects[0].box
    return Outcome(location, side.check_points(image, location, box, _points(location)))


def _more_points(side: Sam4MLLM, image: RgbImage, known: Outcome) -> Outcome:
    """Round 2 again, with other points."""
    location = known.location
    box = location.objects[0].box
    return Outcome(location, side.check_points(image, location, box, _points(location, 6)))


def _mask(side: Sam4MLLM, image: RgbImage, outcome: Outcome) -> None:
    _mask_of(side.segmenter, image, outcome)


def _mask_of(segmenter: Segmenter, image: RgbImage, outcome: Outcome) -> None:
    segmenter.embed(image)
    box = outcome.location.objects[0].box
    segmenter.predict(image, [SegmentPrompt(box, _shown(outcome.points))])


def _points(location: Location, skip: int = 0) -> list[Point]:
    return grid_points(location.objects[0].box, POINTS + skip)[skip:]


def _shown(points: Sequence[PromptPoint]) -> tuple[PromptPoint, ...]:
    return tuple(p for p in points if p.label.value != "undecided")


def _p(value: float | None) -> float:
    assert value is not None
    return value


@torch.inference_mode()
def _mix_answers(side: Sam4MLLM, image: RgbImage) -> None:
    """Look at the answer slots of a dialogue about a picture, and make the answers differ."""
    floor = _Floor(side, image, _dialogue(side, image, "the red apple"))
    states: list[torch.Tensor] = []
    head = floor.mllm.model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][0].clone()))
    cache = floor.read()
    cache.crop(-floor.tails[0].shape[1])
    floor.answer(1, cache)
    hook.remove()
    words = floor.mllm.encoder.tokenizer.convert_tokens_to_ids(["Yes", "No"])
    mix_answers(floor.mllm.model, words, states[-2:])
    floor.mllm.engine.store.clear()  # neither side has seen the picture


def _segmenter() -> Segmenter:
    torch.manual_seed(0)
    return SegmentAnythingSegmenter(build_small_sam(SmallSamConfig()), name="small SAM")


def random_picture(seed: int) -> RgbImage:
    """A smooth random picture of 640×480 pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return RgbImage.from_pil(Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC))


def measure(repeats: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Medians per image size and, as the headline, the worse of both."""
    sizes = {}
    for tokens in IMAGE_TOKENS:
        contest = Contest(tokens, clock)
        rounds = [contest.round(1 + i) for i in range(repeats)]
        sizes[str(contest.image_tokens)] = {
            **{name: statistics.median(r[name] for r in rounds) for name in NAMES},
            "probability_gap": contest.probability_gap,
            "share_of_yes": contest.yes / contest.answers,
            "parameters": contest.parameters,
        }
    worse = {
        name: (max if name == "floor_ratio" else min)(s[name] for s in sizes.values())
        for name in NAMES
    }
    return {**worse, "points": POINTS, "repeats": repeats, "by_image_tokens": sizes}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--repeats", type=int, default=3, help="pictures per size (median)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # CPU seconds of one thread: the measure that other processes disturb least.
    clock = time.process_time if options.threads == 1 else time.perf_counter
    result = measure(options.repeats, clock)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        _show(result)


def _show(result: dict[str, Any]) -> None:
    table = Table(title="Engine against full recomputation (medians of ratios)")
    table.add_column("figure")
    for tokens in result["by_image_tokens"]:
        table.add_column(f"{tokens} image tokens", justify="right")
    table.add_column("bar", justify="right")
    for name in NAMES:
        sign = "≤" if name == "floor_ratio" else "≥"
        figures = [f"{size[name]:.2f}×" for size in result["by_image_tokens"].values()]
        table.add_row(name, *figures, f"{sign} {BARS[name]}×")
    gaps = [f"{size['probability_gap']:.0e}" for size in result["by_image_tokens"].values()]
    table.add_row("largest gap of p_yes, p_no", *gaps, "≤ 1e-04")
    yes = [f"{size['share_of_yes']:.0%}" for size in result["by_image_tokens"].values()]
    table.add_row("answers that were yes", *yes, "")
    Console().print(table)


if __name__ == "__main__":
    main()
