"""Boxes and points of round-2 questions in training, on a picture drawn by hand."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from sam4mllm_tool.datasets.scenes import scene_examples
from sam4mllm_tool.scenes.world import LOOK_ALIKE_WORLD
from sam4mllm_tool.training.candidates import Candidates, jittered, well_inside
from sam4mllm_tool.training.dialogues import Recipe, conversations
from sam4mllm_tool.types import Box, Mask

WIDTH, HEIGHT = 90, 50


def _mask(x0: int, y0: int, x1: int, y1: int) -> Mask:
    pixels = np.zeros((HEIGHT, WIDTH), dtype=bool)
    pixels[y0:y1, x0:x1] = True
    return Mask(pixels)


# The target is an L around the neighbour's corner; a third object lies apart.
NEIGHBOUR, APART = _mask(40, 10, 75, 30), _mask(2, 2, 8, 9)
TARGET = Mask(_mask(20, 5, 60, 45).pixels & ~NEIGHBOUR.pixels)
BOX = Box(20, 5, 60, 45)
PLAIN = Candidates(asked=(12, 12), jitter=0.0)


def _draws(candidates: Candidates, mask: Mask = TARGET, number: int = 80):
    others = [one for one in (TARGET, NEIGHBOUR, APART) if one is not mask]
    assert mask.box is not None
    for seed in range(number):
        yield candidates.draw(mask.box, mask, others, random.Random(seed), "picture")


def _share_on(mask: Mask, draws) -> float:
    return float(np.mean([mask.contains(*point) for _, points in draws for point in points]))


def test_hard_points_lie_on_other_objects_in_the_box() -> None:
    plain, hard = (_share_on(NEIGHBOUR, _draws(replace(PLAIN, hard_points=h))) for h in (0, 0.4))
    assert plain == pytest.approx(20 * 20 / 40**2, abs=0.03), "its share of the box"
    # The L and the neighbour fill the box, so all that is off the one is on the other already.
    assert hard == pytest.approx(plain, abs=0.03)
    wide = replace(PLAIN, jitter=0.25)
    kept, moved = (list(_draws(replace(wide, hard_points=h))) for h in (0, 0.4))
    assert [box for box, _ in kept] == [box for box, _ in moved]
    on, rest = _share_on(TARGET, kept), 1 - _share_on(TARGET, kept) - _share_on(NEIGHBOUR, kept)
    assert rest > 0.1
    assert _share_on(TARGET, moved) == pytest.approx(on), "as many are on the object as before"
    gained = _share_on(NEIGHBOUR, moved) - _share_on(NEIGHBOUR, kept)
    assert gained == pytest.approx(0.4 * rest, abs=0.03)
    for box, points in _draws(replace(wide, hard_points=1.0), number=20):
        assert len(points) == 12
        assert all(TARGET.contains(*p) or NEIGHBOUR.contains(*p) for p in points)
        assert all(box.x_min <= p.x < box.x_max + 1 for p in points), "none outside the box"


def test_without_neighbours_points_stay_as_they_are() -> None:
    rngs = random.Random(3), random.Random(3)
    hard = replace(PLAIN, hard_points=1.0).draw(BOX, TARGET, [], rngs[0], "picture")
    assert hard == PLAIN.draw(BOX, TARGET, [], rngs[1], "picture")
    far = replace(PLAIN, hard_points=1.0).draw(BOX, TARGET, [APART], random.Random(3), "picture")
    assert far == hard, "an object outside the box is none of its points' business"


def test_a_shared_box_and_its_points_are_the_same_for_either_object() -> None:
    shared = replace(PLAIN, shared_boxes=1.0, hard_points=0.5)
    mine, its = (list(_draws(shared, mask, 30)) for mask in (TARGET, NEIGHBOUR))
    assert mine == its
    box, points = mine[0]
    assert box == Box(20, 5, 75, 45)
    assert any(TARGET.contains(*p) for p in points)
    assert any(NEIGHBOUR.contains(*p) for p in points)
    other = shared.draw(BOX, TARGET, [NEIGHBOUR], random.Random(0), "another picture")
    assert other[0] == box
    assert other[1] != points
    assert next(_draws(shared, APART))[0] == APART.box, "nothing overlaps it"


def test_jitter_moves_edges_by_its_share_and_stays_in_the_picture() -> None:
    boxes = [jittered(BOX, 0.25, (WIDTH, HEIGHT), random.Random(seed)) for seed in range(300)]
    lefts, bottoms = [b.x_min for b in boxes], [b.y_max for b in boxes]
    assert min(lefts) == pytest.approx(10, abs=0.5)
    assert max(lefts) == pytest.approx(30, abs=0.5)
    assert max(bottoms) == HEIGHT, "not 55"
    assert all(box.area > 0 for box in boxes)


def test_well_inside_is_deep_in_the_region() -> None:
    region = _mask(10, 10, 51, 31).pixels  # 41 x 21 pixels: 11 deep in the middle row
    deep = well_inside(region, 0.5)
    assert deep[20, 30]
    assert not deep[14, 30], "5 pixels from the top edge"
    assert deep[16, 30], "7 pixels"
    left = _mask(0, 0, 20, HEIGHT).pixels
    off = well_inside(~region, 0.5, among=left & ~region)
    assert off[0, 0], "the picture's border is no outline"
    assert not off[20, 8]
    assert not (off & ~left).any()
    assert not well_inside(np.zeros((3, 4), dtype=bool), 0.5).any()


def test_dialogues_of_scenes_know_their_neighbours() -> None:
    """The same points with opposite answers, as the masks of the scene have them."""
    examples = list(scene_examples(LOOK_ALIKE_WORLD, "train", 7, 6))
    recipe = Recipe(ppg_share=0.0, references=1,
                    candidates=Candidates(shared_boxes=1.0, hard_points=0.4))  # fmt: skip
    answers: dict[tuple, set[str]] = {}
    for conversation in conversations(examples, recipe):
        for number, points in conversation.points.items():
            reply = conversation.turns[2 * number + 1].text
            answers.setdefault(tuple((p.x, p.y) for p in points), set()).add(reply)
    assert any(len(replies) > 1 for replies in answers.values())
