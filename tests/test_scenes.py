"""Scenes: exact masks, the same scene everywhere, expressions that mean what they say."""

import hashlib
import random
import re
from itertools import product

import numpy as np
import pytest

from sam4mllm_tool.errors import InputError
from sam4mllm_tool.scenes import render
from sam4mllm_tool.scenes.expressions import ReferringExpression, expressions
from sam4mllm_tool.scenes.outline import convex_hull, is_concave, is_thin
from sam4mllm_tool.scenes.plan import draw_placed, plan_scene
from sam4mllm_tool.scenes.render import Scene, SceneObject, render_scene, scene_seed
from sam4mllm_tool.scenes.sheet import contact_sheet
from sam4mllm_tool.scenes.sprites import COLOURS, SHAPES, functions, plurals, sprites
from sam4mllm_tool.scenes.world import FULL_WORLD, HELD_OUT_WORLD, SAM_WORLD, SMALL_WORLD, WORLDS


def label_map(scene: Scene) -> np.ndarray:
    labels = np.full(scene.image.size[::-1], -1, dtype=np.int8)
    for number, thing in enumerate(scene.objects):
        labels[thing.mask] = number
    return labels


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_masks_equal_recompositing_from_the_plan(world):
    for index in range(6):
        scene = render_scene(world, "val", index)
        width, height = scene.image.size
        plan = plan_scene(world, width / height, random.Random(scene_seed(world, "val", index, 0)))
        alphas = np.zeros((len(plan), height + 400, width + 400), dtype=np.uint8)
        for number, placed in enumerate(plan):
            picture, (x, y) = draw_placed(placed, scene.image.size)
            rows, columns = (
                slice(y + 200, y + 200 + picture.height),
                slice(x + 200, x + 200 + picture.width),
            )
            alphas[number, rows, columns] = np.asarray(picture)[..., 3]
        solid = alphas[:, 200:-200, 200:-200] > 127
        front = np.where(solid.any(0), len(plan) - 1 - solid[::-1].argmax(0), -1)
        assert len(scene.objects) == len(plan)
        for number, thing in enumerate(scene.objects):
            assert np.array_equal(thing.full_mask, solid[number])
            assert np.array_equal(thing.mask, front == number)


def test_attributes_follow_from_the_masks():
    for index in range(20):
        scene = render_scene(SAM_WORLD, "train", index)
        assert not np.sum([thing.mask for thing in scene.objects], axis=0).max() > 1
        for thing in scene.objects:
            rows, columns = np.nonzero(thing.mask)
            assert thing.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert thing.occluded == (thing.area < 0.9 * thing.full_area)
            assert not (thing.mask & ~thing.full_mask).any()
            assert thing.colour is None or thing.colour in COLOURS


# One digest of the label maps of ten scenes a world: the same on every machine.
DIGESTS = {
    "small": "47c6f6a04b585760",
    "small-alike": "1f826caeb8cf02ef",
    "small-overlap": "61bd2642733805f0",
    "small-look-alike": "b709e8617a161ba3",
    "full": "8b39f5f7ca496763",
    "sam": "5cdb9d842b830862",
    "crowded": "27ca1c531a58a944",
    "held-out": "a4276c9a61a6ad09",
}


@pytest.mark.parametrize("name", WORLDS)
def test_scenes_are_the_same_everywhere(name):
    digest = hashlib.sha256()
    for index in range(10):
        scene = render_scene(WORLDS[name], "test", index, seed=3)
        digest.update(label_map(scene).tobytes())
        digest.update(repr([(thing.name, thing.colour) for thing in scene.objects]).encode())
    assert digest.hexdigest()[:16] == DIGESTS[name]


def test_a_scene_is_the_same_at_every_size():
    for index in range(10):
        small, large = (render_scene(FULL_WORLD, "train", index, size=s) for s in (96, 288))
        assert [t.name for t in small.objects] == [t.name for t in large.objects]
        for one, other in zip(small.objects, large.objects, strict=True):
            assert np.abs(3 * np.array(one.box) - np.array(other.box)).max() <= 6


def test_splits_seeds_and_worlds_never_share_a_stream():
    keys = product(WORLDS.values(), render.SPLITS, range(40), range(4))
    seeds = [scene_seed(*key) for key in keys]
    assert len(set(seeds)) == len(seeds)
    with pytest.raises(InputError, match="split"):
        render_scene(SMALL_WORLD, "training", 0)


def test_nothing_held_out_is_in_a_training_world():
    held_out = {sprites()[key].id for key in HELD_OUT_WORLD.sprites}
    assert len(held_out) >= 25
    assert all(sprites()[key].held_out for key in held_out)
    for world in (SMALL_WORLD, FULL_WORLD, SAM_WORLD):
        assert not held_out & set(world.sprites)
        assert not set(HELD_OUT_WORLD.shapes) & set(world.shapes)
    assert len(SAM_WORLD.sprites) >= 95


def test_outline_measures():
    disc = np.hypot(*np.mgrid[-20:21, -20:21]) <= 20
    ring = disc & (np.hypot(*np.mgrid[-20:21, -20:21]) > 12)
    line = np.eye(60, dtype=bool) | np.eye(60, k=1, dtype=bool)
    assert not is_concave(disc) and not is_thin(disc)
    assert is_concave(ring) and np.array_equal(convex_hull(ring), convex_hull(disc))
    assert is_thin(line)


# -- an independent reading of the texts ------------------------------------------------------

SIDES = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}
NUMBER_WORDS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "both": 2}
ORDINAL_WORDS = {"second": 2, "third": 3, "fourth": 4, "fifth": 5, "sixth": 6} | NUMBER_WORDS


def read(text: str, scene: Scene) -> tuple[int, ...]:
    """What a careful reader makes of a text: indices of the objects it can mean."""
    questions = {q: name for name, qs in functions().items() for q in qs}
    if text in questions:
        return nouns(questions[text], scene)
    for words, side in (
        (" to the left of the ", "left"),
        (" left of the ", "left"),
        (" to the right of the ", "right"),
        (" right of the ", "right"),
        (" above the ", "top"),
        (" higher up than the ", "top"),
        (" below the ", "bottom"),
        (" lower down than the ", "bottom"),
    ):
        if words in text:
            first, _, second = text.partition(words)
            (landmark,) = nouns(second, scene)
            axis, sign = SIDES[side]
            at = scene.objects[landmark].centre[axis]
            return tuple(
                number
                for number in nouns(first, scene)
                if sign * (scene.objects[number].centre[axis] - at) < 0
            )
    members = nouns(text, scene)
    if re.search(r"^(all|every|each|both)\b", text) or (
        plural_noun(text) and "of the two" not in text
    ):
        count = next(
            (n for word, n in NUMBER_WORDS.items() if re.search(rf"\b{word}\b", text)), None
        )
        assert count is None or not members or count == len(members)
        return members
    if match := re.search(r"(second|third|fourth|fifth|sixth|number \w+) .*from the (\w+)$", text):
        place = ORDINAL_WORDS[match[1].removeprefix("number ")]
        return (ranked(members, match[2], scene)[place - 1],)
    if re.search(r"big|larg", text):
        return tuple(sorted(members, key=lambda n: scene.objects[n].full_area)[-1:])
    if re.search(r"small|tin|little", text):
        return tuple(sorted(members, key=lambda n: scene.objects[n].full_area)[:1])
    for pattern, side in (
        (r"\bleft|leftmost", "left"),
        (r"\bright|rightmost", "right"),
        (r"\btop|upper|high", "top"),
        (r"bottom|lower|lowest", "bottom"),
    ):
        if re.search(pattern, text):
            return tuple(ranked(members, side, scene)[:1])
    return members


def read_compound(text: str, scene: Scene) -> tuple[int, ...]:
    """Objects of which everything holds that a text says; size and side are among all of a name."""
    first = re.split(r" (?:to the )?(?:left|right|above|below|higher|lower)\b", text)[0]
    said = {*nouns(re.sub(r" on the \w+| at the \w+", "", first), scene)}
    like = nouns(re.sub("|".join(COLOURS), "", first), scene)
    if match := re.search(r"\b(big|small)\b", text):
        by_size = sorted(like, key=lambda n: scene.objects[n].full_area)
        said &= {by_size[-1 if match[1] == "big" else 0]}
    if match := re.search(r"(?:on|at) the (left|right|top|bottom)$", text):
        said &= {ranked(like, match[1], scene)[0]}
    elif first != text:
        said &= {*read(text, scene)}
    return tuple(sorted(said))


def ranked(members, side, scene):
    axis, sign = SIDES[side]
    return sorted(members, key=lambda n: sign * scene.objects[n].centre[axis])


def plural_noun(text: str) -> bool:
    return any(
        re.search(rf"\b{plural}\b", text) for name, plural in plurals().items() if plural != name
    )


def nouns(text: str, scene: Scene) -> tuple[int, ...]:
    """Objects of the category and colour that a text names (the longest name it holds)."""
    held = [n for n in plurals() if re.search(rf"\b({n}|{plurals()[n]})\b", text)]
    name = max(held, key=len)
    rest = re.sub(rf"\b({name}|{plurals()[name]})\b", "", text)
    colour = next((c for c in COLOURS if re.search(rf"\b{c}\b", rest)), None)
    return tuple(
        number
        for number, thing in enumerate(scene.objects)
        if thing.name == name and colour in (None, thing.colour)
    )


@pytest.mark.parametrize("world", (SMALL_WORLD, FULL_WORLD, HELD_OUT_WORLD), ids=lambda w: w.name)
def test_every_expression_means_its_targets(world):
    kinds = set()
    for index in range(250):
        scene = render_scene(world, "train", index, size=96)
        for phrase in expressions(scene, random.Random(index)):
            kinds.add(phrase.kind)
            compound = phrase.kind in ("compound", "contradicted")
            reader = read_compound if compound else read
            assert reader(phrase.text, scene) == phrase.targets, phrase
            assert (len(phrase.targets) == 0) == (phrase.kind in ("absent", "contradicted"))
            assert (len(phrase.targets) > 1) == (phrase.kind == "plural")
    assert kinds >= {"category", "colour", "size", "position", "relation", "plural", "absent"}
    assert kinds >= {"function", "ordinal", "compound", "contradicted"}


def test_what_is_untrue_is_told_from_what_is_true():
    """A red dog on the left and a blue one: size and place of both are denied the wrong way."""
    scene = hand_made(("dog", "red", 10, 40, 10), ("dog", "blue", 60, 30, 30),
                      ("car", None, 40, 80, 10))  # fmt: skip
    texts = {(phrase.text, phrase.targets) for phrase in said(scene)}
    assert {("the red dog on the left", (0,)), ("the big blue dog", (1,)),
            ("the small dog on the left", (0,)), ("the red dog on the right", ()),
            ("the small blue dog", ()), ("the red dog above the car", (0,)),
            ("the red dog below the car", ())} <= texts  # fmt: skip
    assert not any(text.startswith("the red dog at the") for text, _ in texts)


def hand_made(*things: tuple[str, str | None, int, int, int]) -> Scene:
    """A 100 px scene of squares: (name, colour, left, top, side)."""
    objects = []
    for name, colour, left, top, side in things:
        mask = np.zeros((100, 100), dtype=bool)
        mask[top : top + side, left : left + side] = True
        box = (float(left), float(top), float(left + side), float(top + side))
        objects.append(
            SceneObject(name, colour, "sprite", mask, mask, box, False, False, False, False)
        )
    image = render_scene(SMALL_WORLD, "test", 0, size=100).image
    return Scene(image, tuple(objects), 0, "test", 0, SMALL_WORLD)


def said(scene: Scene) -> set[ReferringExpression]:
    return {phrase for turn in range(60) for phrase in expressions(scene, random.Random(turn))}


def test_margins_keep_silent_about_what_barely_holds():
    scene = hand_made(("dog", None, 10, 10, 20), ("dog", None, 60, 12, 22))
    kinds = {(phrase.kind, phrase.targets) for phrase in said(scene)}
    assert ("position", (0,)) in kinds and ("plural", (0, 1)) in kinds
    texts = {phrase.text for phrase in said(scene)}
    assert "both dogs" in texts and "the dog on the left" in texts
    assert not {"the upper dog", "the bigger dog", "the dog"} & {
        phrase.text for phrase in said(scene) if phrase.kind != "absent"
    }


def test_relation_needs_one_landmark_and_one_clear_answer():
    scene = hand_made(
        ("car", "red", 40, 40, 10), ("dog", None, 10, 40, 10), ("dog", None, 70, 40, 10)
    )
    relations = {(p.text, p.targets) for p in said(scene) if p.kind == "relation"}
    assert ("the dog left of the car", (1,)) in relations
    assert ("the dog to the right of the car", (2,)) in relations
    assert not any("of the dog" in text for text, _ in relations)


def test_singular_and_plural_agree():
    scene = hand_made(*[("pair of scissors", "red", 5 + 30 * n, 40, 20) for n in range(3)])
    texts = {phrase.text for phrase in said(scene) if phrase.kind == "plural"}
    assert "the three pairs of scissors" in texts and "every pair of scissors" in texts
    assert not any(re.search(r"(every|each) .*pairs|(all|three) .*pair of", text) for text in texts)


def test_contact_sheet_shows_every_scene():
    scenes = [render_scene(FULL_WORLD, "val", index) for index in range(3)]
    sheet = contact_sheet(scenes, columns=2, side=128)
    assert sheet.size == (2 * (2 * 128 + 8), sheet.height)
    last = np.asarray(sheet)[sheet.height // 2 :]
    assert last[:, : sheet.width // 2].std() > 5
    assert (last[:, sheet.width // 2 :] == 255).all()


def test_catalogue_is_complete():
    assert len(sprites()) >= 100 and len(SHAPES) >= 10
    assert all(question.endswith("?") for qs in functions().values() for question in qs)
    asked = [q for name in functions() for q in functions()[name]]
    assert len(asked) == len(set(asked)), "one question, one answer"
