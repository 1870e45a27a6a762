"""Referring expressions of known kind for a scene, each naming its targets and nothing else.

A fact that only just holds (two cats at almost the same height, a size ratio of 1.1) makes an
ambiguous expression, so every comparison needs a clear margin.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from sam4mllm_tool.scenes.render import Scene, SceneObject
from sam4mllm_tool.scenes.sprites import functions, plurals, sprites

Kind = Literal[
    "category",
    "colour",
    "size",
    "position",
    "ordinal",
    "relation",
    "plural",
    "absent",
    "function",
]

MARGIN = 0.06  # clear difference of two places, share of the shorter side
SIZE_RATIO = 1.35  # clear difference of two sizes
NAMELESS = "blob"

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")

CATEGORY = ("the {n}", "the {n} in the picture", "the only {n}", "{n}", "the {n} here")
COLOUR = ("the {c} {n}", "the {n} that is {c}", "the {c}-coloured {n}", "{c} {n}")
BIGGEST = ("the biggest {n}", "the largest {n}", "the {n} that is bigger than the others")
BIGGER = ("the bigger {n}", "the larger of the two {p}", "the big {n}", "the larger {n}")
SMALLEST = ("the smallest {n}", "the tiniest {n}", "the {n} that is smaller than the others")
SMALLER = ("the smaller {n}", "the smaller of the two {p}", "the small {n}", "the little {n}")
POSITION = {
    "left": (
        "the leftmost {n}",
        "the {n} furthest to the left",
        "the {n} closest to the left edge",
    ),
    "right": (
        "the rightmost {n}",
        "the {n} furthest to the right",
        "the {n} closest to the right edge",
    ),
    "top": ("the topmost {n}", "the highest {n}", "the {n} nearest the top"),
    "bottom": ("the bottommost {n}", "the lowest {n}", "the {n} nearest the bottom"),
}
POSITION_OF_TWO = {
    "left": ("the {n} on the left", "the left {n}", "the left one of the two {p}"),
    "right": ("the {n} on the right", "the right {n}", "the right one of the two {p}"),
    "top": ("the upper {n}", "the top {n}", "the higher of the two {p}"),
    "bottom": ("the lower {n}", "the bottom {n}", "the lower of the two {p}"),
}
ORDINAL = (
    "the {o} {n} from the {s}",
    "{n} number {k} from the {s}",
    "the {o} {n} counting from the {s}",
)
RELATION = {
    "left": ("the {n} to the left of the {m}", "the {n} left of the {m}"),
    "right": ("the {n} to the right of the {m}", "the {n} right of the {m}"),
    "top": ("the {n} above the {m}", "the {n} higher up than the {m}"),
    "bottom": ("the {n} below the {m}", "the {n} lower down than the {m}"),
}
PLURAL = ("all the {p}", "the {p}", "every {n}", "the {k} {p}", "all {k} {p}", "each {n}")
PLURAL_OF_TWO = ("both {p}", "the two {p}", "all the {p}", "the {p}", "every {n}")
ABSENT = (*CATEGORY[:2], "the {n} on the left", "the biggest {n}", "all the {p}", "the {n}")


@dataclass(frozen=True)
class ReferringExpression:
    """A text, how it refers, and the indices in `scene.objects` it refers to (none: absent)."""

    text: str
    kind: Kind
    targets: tuple[int, ...]


@dataclass(frozen=True)
class _Group:
    """The objects that one noun ("cat", "red car") names."""

    noun: str
    plural: str
    members: tuple[int, ...]


def expressions(scene: Scene, rng: random.Random) -> list[ReferringExpression]:
    """Every unambiguous expression of known kind, one wording drawn for each.

    The list always ends with expressions whose target is absent.
    """
    found = [*_named(scene, rng)]
    for group in _groups(scene):
        found += _sizes(scene, group, rng)
        found += _positions(scene, group, rng)
        found += _ordinals(scene, group, rng)
        found += _relations(scene, group, rng)
    found += _absent(scene, rng)
    return list(dict.fromkeys(found))


def _members(scene: Scene, name: str, colour: str | None = None) -> tuple[int, ...]:
    return tuple(
        number
        for number, thing in enumerate(scene.objects)
        if thing.name == name and colour in (None, thing.colour)
    )


def _names(scene: Scene) -> list[str]:
    return list(dict.fromkeys(t.name for t in scene.objects if t.name != NAMELESS))


def _colours(scene: Scene, name: str) -> list[str]:
    used = (thing.colour for thing in scene.objects if thing.name == name)
    return list(dict.fromkeys(colour for colour in used if colour is not None))


def _groups(scene: Scene) -> Iterator[_Group]:
    """Nouns by category and, where it narrows the category down, by colour and category."""
    for name in _names(scene):
        everything = _members(scene, name)
        yield _Group(name, plurals()[name], everything)
        for colour in _colours(scene, name):
            members = _members(scene, name, colour)
            if 1 < len(members) < len(everything):
                yield _Group(f"{colour} {name}", f"{colour} {plurals()[name]}", members)


def _named(scene: Scene, rng: random.Random) -> Iterator[ReferringExpression]:
    """Category, colour, function and plural: what the words alone pick out."""
    for name in _names(scene):
        members = _members(scene, name)
        if len(members) == 1:
            yield _say(rng, CATEGORY, "category", members, n=name)
            if functions().get(name):
                yield ReferringExpression(rng.choice(functions()[name]), "function", members)
        for colour in _colours(scene, name):
            coloured = _members(scene, name, colour)
            if len(coloured) == 1:
                yield _say(rng, COLOUR, "colour", coloured, n=name, c=colour)
    for group in _groups(scene):
        count = len(group.members)
        if count > 1:
            wordings = PLURAL_OF_TWO if count == 2 else PLURAL
            words = {"n": group.noun, "p": group.plural, "k": NUMBERS[count]}
            yield _say(rng, wordings, "plural", group.members, **words)


def _sizes(scene: Scene, group: _Group, rng: random.Random) -> Iterator[ReferringExpression]:
    """The biggest and the smallest, where full and visible size agree by a clear ratio."""
    if len(group.members) < 2:
        return
    words = {"n": group.noun, "p": group.plural}
    two = len(group.members) == 2
    by_full = _ranked(scene, group, lambda thing: thing.full_area)
    by_seen = _ranked(scene, group, lambda thing: thing.area)
    sides = [float(scene.objects[number].full_area) ** 0.5 for number in by_full]
    if by_full[-1] == by_seen[-1] and sides[-1] > SIZE_RATIO * sides[-2]:
        yield _say(rng, BIGGER if two else BIGGEST, "size", by_full[-1:], **words)
    if by_full[0] == by_seen[0] and SIZE_RATIO * sides[0] < sides[1]:
        yield _say(rng, SMALLER if two else SMALLEST, "size", by_full[:1], **words)


def _positions(scene: Scene, group: _Group, rng: random.Random) -> Iterator[ReferringExpression]:
    """The outermost member on each of the four sides."""
    if len(group.members) < 2:
        return
    wordings = POSITION_OF_TWO if len(group.members) == 2 else POSITION
    for side in ("left", "right", "top", "bottom"):
        ranked = _ranked(scene, group, _distance_along(scene, side))
        if _gaps(scene, ranked[:2], side):
            words = {"n": group.noun, "p": group.plural}
            yield _say(rng, wordings[side], "position", ranked[:1], **words)


def _ordinals(scene: Scene, group: _Group, rng: random.Random) -> Iterator[ReferringExpression]:
    """ "The second cat from the right", for three members and more."""
    if len(group.members) < 3:
        return
    for side in ("left", "right", "top", "bottom"):
        ranked = _ranked(scene, group, _distance_along(scene, side))
        for place in range(1, len(ranked) - 1):
            if _gaps(scene, ranked[: place + 2], side):
                words = {"n": group.noun, "o": ORDINALS[place], "k": NUMBERS[place + 1], "s": side}
                yield _say(rng, ORDINAL, "ordinal", (ranked[place],), **words)


def _relations(scene: Scene, group: _Group, rng: random.Random) -> Iterator[ReferringExpression]:
    """ "The cat right of the car", where the other noun names one object."""
    for noun, landmark in _landmarks(scene):
        if landmark in group.members:
            continue
        for side, wordings in RELATION.items():
            where = [_side_of(scene, member, landmark, side) for member in group.members]
            if where.count("clearly") == 1 and where.count("not") == len(where) - 1:
                target = group.members[where.index("clearly")]
                yield _say(rng, wordings, "relation", (target,), n=group.noun, m=noun)


def _absent(scene: Scene, rng: random.Random) -> Iterator[ReferringExpression]:
    """Things of this world that the scene lacks: another category, another colour."""
    world = scene.world
    present = set(_names(scene))
    known = dict.fromkeys([sprites()[key].name for key in world.sprites] + list(world.shapes))
    missing = [name for name in known if name not in present]
    for name in rng.sample(missing, min(2, len(missing))):
        yield _say(rng, ABSENT, "absent", (), n=name, p=plurals()[name])
    for name in _names(scene):
        used = _colours(scene, name)
        others = [colour for colour in world.colours if colour not in used]
        if used and others:
            yield _say(rng, COLOUR, "absent", (), n=name, c=rng.choice(others))


def _say(
    rng: random.Random, wordings: Iterable[str], kind: Kind, targets: tuple[int, ...], **words: str
) -> ReferringExpression:
    return ReferringExpression(rng.choice(tuple(wordings)).format(**words), kind, targets)


def _landmarks(scene: Scene) -> Iterator[tuple[str, int]]:
    for name in _names(scene):
        members = _members(scene, name)
        if len(members) == 1:
            yield name, members[0]
        else:
            for colour in _colours(scene, name):
                coloured = _members(scene, name, colour)
                if len(coloured) == 1:
                    yield f"{colour} {name}", coloured[0]


def _ranked(scene: Scene, group: _Group, key: Callable[[SceneObject], float]) -> tuple[int, ...]:
    return tuple(sorted(group.members, key=lambda number: key(scene.objects[number])))


def _distance_along(scene: Scene, side: str) -> Callable[[SceneObject], float]:
    """Distance of a centre from one side of the picture, up to a constant, in shorter sides."""
    axis, sign = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}[side]
    shorter = min(scene.image.size)
    return lambda thing: sign * thing.centre[axis] / shorter


def _gaps(scene: Scene, ranked: tuple[int, ...], side: str) -> bool:
    """Whether neighbours in a ranking lie clearly apart."""
    distance = _distance_along(scene, side)
    places = [distance(scene.objects[number]) for number in ranked]
    return all(after - before > MARGIN for before, after in pairwise(places))


def _side_of(scene: Scene, member: int, landmark: int, side: str) -> str:
    """Whether a member lies "clearly" on that side of the landmark, clearly "not", or "maybe".

    "Clearly" also asks that the named direction is the main one.
    """
    thing, other = scene.objects[member], scene.objects[landmark]
    beyond = _distance_along(scene, side)(other) - _distance_along(scene, side)(thing)
    across = _distance_along(scene, "top" if side in ("left", "right") else "left")
    if beyond > MARGIN and beyond > abs(across(other) - across(thing)):
        return "clearly"
    return "not" if beyond < -MARGIN else "maybe"
