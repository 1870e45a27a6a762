"""Scenes: exact masks, the same scene everywhere, expressions that mean what they say."""

import hashlib
import json
import random
import re
from itertools import product
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from sam4mllm_tool.errors import InputError
from sam4mllm_tool.scenes import render
from sam4mllm_tool.scenes.expressions import Kind, ReferringExpression, expressions
from sam4mllm_tool.scenes.outline import convex_hull, is_concave, is_thin
from sam4mllm_tool.scenes.plan import draw_placed, plan_scene
from sam4mllm_tool.scenes.render import Scene, SceneObject, render_scene, scene_seed
from sam4mllm_tool.scenes.sheet import contact_sheet
from sam4mllm_tool.scenes.sprites import COLOURS, SHAPES, animals, functions, plurals, sprites
from sam4mllm_tool.scenes.world import FULL_WORLD, HELD_OUT_WORLD, SAM_WORLD, SMALL_WORLD, WORLDS

HAND_WRITTEN = Path(__file__).parents[1] / "benchmarks" / "language.json"


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
REQUESTS = (
    r"^(can you )?(please )?(find|show me|segment|mark) |^where (is|do you see) "
    r"|^which (one )?is (?=the )|^do you see "
)
RELATIONS = {
    "left": r"(to|on|at) the left( side)? of|left of|further (to the )?left than",
    "right": r"(to|on|at) the right( side)? of|right of|further (to the )?right than",
    "top": r"up above|up over|above|over|higher up than|higher than|further up than",
    "bottom": r"down below|down under|further below than|below|under|beneath|lower down than"
              r"|lower than|further down than",
    "near": r"next to|beside|close by|(very )?near|(very )?close to|by",
}  # fmt: skip
PLACES = r"(?:on|at|up at|down at) the (left|right|top|bottom)( side| edge)?( of the picture)?"


def read(text: str, scene: Scene) -> set[int]:
    """What a careful reader makes of a text: indices of the objects it can mean."""
    questions = {q: n for w in ("train", "held-out") for n, qs in functions(w).items() for q in qs}
    if text not in questions:
        text = re.sub(r"\?$", "", re.sub(REQUESTS, "", text))
    if text in questions or f"{text}?" in questions:
        return named(questions.get(text) or questions[f"{text}?"], scene)
    for short in ("alarm clock", "pair of scissors"):
        text = re.sub(rf"(?<!{short.rpartition(' ')[0]} )\b{short.split()[-1]}\b", short, text)
    parts = re.split(
        r" (?:that|which) (?:is|are) |(?= (?:that|which) (?:isn|aren))| and (?:is |which is )?"
        r"|(?= not )|(?= other than)", text)  # fmt: skip
    found = read_simple(parts[0], scene)
    head = re.split(rf" (?:{'|'.join(RELATIONS.values())}|on|at|up|down)\b", parts[0])[0]
    head = re.sub("^(every|each|all)( of)?( the)?", "the", head)
    for part in parts[1:]:
        found &= predicate(part.strip(), head, scene)
    if len(found) > 1 and (
        match := re.search(rf" (?:{RELATIONS['near']}) the ([^,]*?)(?: and|$)", text)
    ):
        (landmark,) = nouns(match[match.lastindex], scene)
        found = {min(found, key=lambda n: apart(n, landmark, scene))}
    return found


def predicate(text: str, head: str, scene: Scene) -> set[int]:
    """Objects of which a part after "is" holds; `head` is the noun before it."""
    denied = re.sub(r"^(not|other than|(that|which) (isn't|aren't)) ", "", text)
    if denied != text:
        return set(range(len(scene.objects))) - predicate(denied, head, scene)
    if held_names(text) and not re.search("|".join(RELATIONS.values()), text):
        return nouns(text, scene) if "est to" not in text else read_simple(f"{head} {text}", scene)
    if text in COLOURS:
        return nouns(f"{text} thing", scene)
    return read_simple(f"{singular(head)} {text}", scene)


CLASSES = {"object": "objects", "thing": "things", "animal": "animals", "shape": "shapes"}
NOUNS = [
    (name, plural, re.compile(rf"\b({name}|{plural})\b"), re.compile(rf"\b{plural}\b"))
    for name, plural in (plurals() | CLASSES).items()
]


def singular(text: str) -> str:
    """The noun of a text in the singular."""
    for name, _, _, several in NOUNS:
        text = several.sub(name, text)
    return text


def read_simple(text: str, scene: Scene) -> set[int]:
    """A noun with adjectives and one place or relation after it."""
    for side, words in RELATIONS.items():
        match = re.search(rf" (?:{words}) the (.*)$", text)
        if match and held_names(match[match.lastindex]):
            landmarks = nouns(match[match.lastindex], scene)
            first = read_simple(text[: match.start()], scene)
            assert len(landmarks) == 1 or not (first and landmarks), text
            return {n for n in first for m in landmarks if beside(n, m, side, scene)}
    match = re.search(
        r"(?:^the (?:near|clos)est (.*?)|^(.*?)(?: the)? (?:nearest|closest))(?: to)? the (.*)$",
        text,
    )
    if match and held_names(match[3]):
        (landmark,) = nouns(match[3], scene)
        first = nouns(match[1] or match[2], scene) - {landmark}
        return {min(first, key=lambda n: apart(n, landmark, scene))}
    members = nouns(text, scene)
    like = nouns(re.sub("|".join(COLOURS), "", text), scene)
    if re.search(r"^(all|every|each|both|(the )?(two|three|four|five|six|seven))\b", text) or (
        plural_noun(text)
        and not re.search(r"(one|\w+er|\w+est|\w+most|cond|left|right|rd|th) of", text)
    ):
        count = next((n for x, n in NUMBER_WORDS.items() if re.search(rf"\b{x}\b", text)), None)
        return members if count in (None, len(members)) else set()
    if match := re.search(r"(second|third|fourth|fifth|sixth|number \w+)\b.*from the (\w+)$", text):
        place = ORDINAL_WORDS[match[1].removeprefix("number ")]
        return {ranked(members, match[2], scene)[place - 1]}
    found = members
    for pattern, last in ((r"big|larg", -1), (r"small|tin[iy]|little", 0)):
        if re.search(pattern, text):
            group = members if len(members) > 1 else like
            found = found & set(sorted(group, key=lambda n: scene.objects[n].full_area)[last:][:1])
            break
    for pattern, side in (
        (r"\bleft|leftmost", "left"), (r"\bright|rightmost", "right"),
        (r"\btop|upper|\bhigh", "top"), (r"bottom|\blower|lowest", "bottom"),
    ):  # fmt: skip
        if re.search(pattern, text):
            group = members if len(members) > 1 else like
            if len(group) > 1:
                found = found & {ranked(group, side, scene)[0]}
            else:
                axis, sign = SIDES[side]
                middle = scene.image.size[axis] / 2
                found = {n for n in found if sign * (scene.objects[n].centre[axis] - middle) < 0}
            break
    return found


def beside(number: int, landmark: int, side: str, scene: Scene) -> bool:
    """Whether an object lies there as seen from a landmark."""
    if side == "near":
        return number != landmark and apart(number, landmark, scene) < 0.16
    axis, sign = SIDES[side]
    places = [scene.objects[n].centre[axis] for n in (number, landmark)]
    return sign * (places[0] - places[1]) < 0


def apart(one: int, other: int, scene: Scene) -> float:
    """Smallest distance of two boxes, shares of the shorter side."""
    a, b = (scene.objects[n].box for n in (one, other))
    gaps = [max(a[i] - b[i + 2], b[i] - a[i + 2], 0) for i in (0, 1)]
    return float(np.hypot(*gaps)) / min(scene.image.size)


def ranked(members, side, scene):
    axis, sign = SIDES[side]
    return sorted(members, key=lambda n: sign * scene.objects[n].centre[axis])


def plural_noun(text: str) -> bool:
    return any(name != plural and several.search(text) for name, plural, _, several in NOUNS)


def held_names(text: str) -> list[str]:
    return [name for name, _, any_, _ in NOUNS if name not in CLASSES and any_.search(text)]


def named(name: str, scene: Scene) -> set[int]:
    return {number for number, thing in enumerate(scene.objects) if thing.name == name}


def nouns(text: str, scene: Scene) -> set[int]:
    """Objects of the category (or class) and colour that a text names."""
    held = held_names(text)
    if held:
        name = max(held, key=len)
        text = re.sub(rf"\b({name}|{plurals()[name]})\b", "", text)
        members = named(name, scene)
    elif re.search(r"\banimal", text):
        members = {n for n, thing in enumerate(scene.objects) if thing.name in animals()}
    elif re.search(r"\bshape", text):
        members = {n for n, thing in enumerate(scene.objects) if thing.name in SHAPES}
    else:
        assert re.search(r"thing|object", text), text
        members = set(range(len(scene.objects)))
    colour = next((c for c in COLOURS if re.search(rf"\b{c}\b", text)), None)
    return {n for n in members if colour in (None, scene.objects[n].colour)}


@pytest.mark.parametrize("wording", ("train", "held-out"))
@pytest.mark.parametrize("world", (SMALL_WORLD, FULL_WORLD, HELD_OUT_WORLD), ids=lambda w: w.name)
def test_every_expression_means_its_targets(world, wording):
    kinds = set()
    for index in range(60):
        scene = render_scene(world, "train", index, size=96)
        for phrase in expressions(scene, random.Random(index), wording):
            kinds.add(phrase.kind)
            assert read(phrase.text, scene) == set(phrase.targets), phrase
            untrue = phrase.kind in ("absent", "contradicted", "miscounted")
            assert (len(phrase.targets) == 0) == untrue
            if phrase.kind != "negation":
                assert (len(phrase.targets) > 1) == (phrase.kind == "plural")
    assert kinds >= {*get_args(Kind)} - {"function"}
    assert "function" in kinds or (world, wording) != (SMALL_WORLD, "held-out")


def test_expressions_written_by_hand_mean_objects_that_are_there():
    """Colours and names that a text holds are those of its targets, where nothing is denied."""
    written = json.loads(HAND_WRITTEN.read_text(encoding="utf-8"))
    assert len(written["expressions"]) >= 100
    assert len({index for index, *_ in written["expressions"]}) == 30
    for index, kind, targets, text in written["expressions"]:
        scene = render_scene(WORLDS[written["world"]], written["split"], index, written["seed"])
        meant = [scene.objects[number] for number in targets]
        untrue = kind in ("absent", "contradicted", "miscounted")
        assert kind == "negation" or bool(meant) != untrue, text
        for thing in meant if kind in ("category", "colour", "size", "ordinal") else ():
            assert thing.name.split()[-1] in text or "circle" in text, text
            assert all(c == thing.colour for c in COLOURS if c in text.split()), text


def test_a_number_that_is_not_the_groups_names_nothing():
    """Two dogs and one car: "both dogs" and "two dogs" are there, "two cars" and "three dogs" not.

    Where there are three, "two dogs" may be any two of them: that is not said.
    """
    scene = hand_made(
        ("dog", None, 10, 10, 10), ("dog", None, 60, 30, 30), ("car", None, 40, 80, 10)
    )
    texts = {(phrase.text, phrase.targets) for phrase in said(scene)}
    assert {("both dogs", (0, 1)), ("two dogs", (0, 1)), ("two cars", ()), ("both cars", ()),
            ("three dogs", ()), ("all four dogs", ())} <= texts  # fmt: skip
    three = hand_made(*[("dog", None, 5 + 30 * n, 40, 20) for n in range(3)])
    texts = {(phrase.text, phrase.targets) for phrase in said(three)}
    assert {("both dogs", ()), ("the two dogs", ()), ("three dogs", (0, 1, 2))} <= texts
    assert not any(text == "two dogs" for text, _ in texts)


def test_negation_nearness_and_joined_conditions():
    scene = hand_made(("star", "red", 5, 10, 20), ("star", "blue", 70, 10, 20),
                      ("car", "red", 30, 12, 20), ("dog", None, 40, 70, 20))  # fmt: skip
    texts = {(phrase.text, phrase.targets) for phrase in said(scene)}
    assert {("the star that is not red", (1,)), ("the star which is not blue", (0,)),
            ("the car that is not red", ()), ("the star nearest to the car", (0,)),
            ("the star next to the car", (0,)), ("the thing closest to the car", (0,)),
            ("the objects which aren't stars", (2, 3)), ("the animal that is not a dog", ()),
            ("the red star that is left of the car", (0,)),
            ("the red star which is right of the car", ())} <= texts  # fmt: skip
    assert not any(text.startswith("the star next to the dog") for text, _ in texts)


def test_what_is_untrue_is_told_from_what_is_true():
    """A red dog on the left and a blue one: size and place of both are denied the wrong way."""
    scene = hand_made(("dog", "red", 10, 40, 10), ("dog", "blue", 60, 30, 30),
                      ("car", None, 40, 80, 10))  # fmt: skip
    texts = {(phrase.text, phrase.targets) for phrase in said(scene)}
    assert {("the red dog on the left", (0,)), ("the big blue dog", (1,)),
            ("the small dog on the left", (0,)), ("the red dog on the right", ()),
            ("the small blue dog", ())} <= texts  # fmt: skip
    for side, targets in (("top", {(0,)}), ("bottom", {()})):
        where = rf"the red dog (that is |which is )?({RELATIONS[side]}) the car"
        assert {told for text, told in texts if re.fullmatch(where, text)} == targets
    assert not any(re.match("the (red|blue) dog at the (top|bottom)", text) for text, _ in texts)


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
    return {phrase for turn in range(250) for phrase in expressions(scene, random.Random(turn))}


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
    asked = [q for w in ("train", "held-out") for qs in functions(w).values() for q in qs]
    assert len(asked) == len(set(asked)), "one question, one answer"
