"""Referring expressions of known kind for a scene, each naming its targets and nothing else."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, product
from typing import Literal

from sam4mllm_tool.scenes.facts import (
    OPPOSITE,
    SIDES,
    Group,
    alone_beside,
    clearly_apart,
    colours_of,
    distance_along,
    extremes_in_size,
    groups_in,
    landmarks_in,
    members_of,
    names_in,
    outermost,
    ranked,
    side_of,
)
from sam4mllm_tool.scenes.render import Scene
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
    "compound",
    "contradicted",
]

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
BESIDE = {
    "left": "the {n} on the left",
    "right": "the {n} on the right",
    "top": "the {n} at the top",
    "bottom": "the {n} at the bottom",
}
COMPOUNDS = 2  # most of them, and of contradicted ones, a scene
_Told = tuple[tuple[str, ...], int | None, dict[str, str]]
"""Wordings, the object that both attributes fit (``None``: contradicted), and their words."""
ABSENT = (*CATEGORY[:2], "the {n} on the left", "the biggest {n}", "all the {p}", "the {n}")


@dataclass(frozen=True)
class ReferringExpression:
    """A text, how it refers, and the indices in `scene.objects` it refers to (none: absent)."""

    text: str
    kind: Kind
    targets: tuple[int, ...]


def expressions(scene: Scene, rng: random.Random) -> list[ReferringExpression]:
    """Every unambiguous expression of known kind, one wording drawn for each.

    The list always ends with expressions whose target is absent: things that are not there, and
    things of which something is said that is true of none.
    """
    found = [*_named(scene, rng)]
    for group in groups_in(scene):
        found += _sizes(scene, group, rng)
        found += _positions(scene, group, rng)
        found += _ordinals(scene, group, rng)
        found += _relations(scene, group, rng)
    absent = [*_absent(scene, rng)]
    compound, contradicted = _compounds(scene, rng)
    told = {phrase.text for phrase in found}  # with two red of three, place and colour say it too
    found += [phrase for phrase in compound if phrase.text not in told]
    return list(dict.fromkeys([*found, *absent, *contradicted]))


def _named(scene: Scene, rng: random.Random) -> Iterator[ReferringExpression]:
    """Category, colour, function and plural: what the words alone pick out."""
    for name in names_in(scene):
        members = members_of(scene, name)
        if len(members) == 1:
            yield _say(rng, CATEGORY, "category", members, n=name)
            if functions().get(name):
                yield ReferringExpression(rng.choice(functions()[name]), "function", members)
        for colour in colours_of(scene, name):
            coloured = members_of(scene, name, colour)
            if len(coloured) == 1:
                yield _say(rng, COLOUR, "colour", coloured, n=name, c=colour)
    for group in groups_in(scene):
        count = len(group.members)
        if count > 1:
            wordings = PLURAL_OF_TWO if count == 2 else PLURAL
            words = {"n": group.noun, "p": group.plural, "k": NUMBERS[count]}
            yield _say(rng, wordings, "plural", group.members, **words)


def _sizes(scene: Scene, group: Group, rng: random.Random) -> Iterator[ReferringExpression]:
    """The biggest and the smallest."""
    words = {"n": group.noun, "p": group.plural}
    two = len(group.members) == 2
    smallest, biggest = extremes_in_size(scene, group)
    if biggest is not None:
        yield _say(rng, BIGGER if two else BIGGEST, "size", (biggest,), **words)
    if smallest is not None:
        yield _say(rng, SMALLER if two else SMALLEST, "size", (smallest,), **words)


def _positions(scene: Scene, group: Group, rng: random.Random) -> Iterator[ReferringExpression]:
    """The outermost member on each of the four sides."""
    wordings = POSITION_OF_TWO if len(group.members) == 2 else POSITION
    for side in SIDES:
        target = outermost(scene, group, side)
        if target is not None:
            words = {"n": group.noun, "p": group.plural}
            yield _say(rng, wordings[side], "position", (target,), **words)


def _ordinals(scene: Scene, group: Group, rng: random.Random) -> Iterator[ReferringExpression]:
    """ "The second cat from the right", for three members and more."""
    if len(group.members) < 3:
        return
    for side in SIDES:
        in_order = ranked(scene, group, distance_along(scene, side))
        for place in range(1, len(in_order) - 1):
            if clearly_apart(scene, in_order[: place + 2], side):
                words = {"n": group.noun, "o": ORDINALS[place], "k": NUMBERS[place + 1], "s": side}
                yield _say(rng, ORDINAL, "ordinal", (in_order[place],), **words)


def _relations(scene: Scene, group: Group, rng: random.Random) -> Iterator[ReferringExpression]:
    """ "The cat right of the car", where the other noun names one object."""
    for noun, landmark in landmarks_in(scene):
        if landmark in group.members:
            continue
        for side, wordings in RELATION.items():
            target = alone_beside(scene, group, landmark, side)
            if target is not None:
                yield _say(rng, wordings, "relation", (target,), n=group.noun, m=noun)


def _absent(scene: Scene, rng: random.Random) -> Iterator[ReferringExpression]:
    """Things of this world that the scene lacks: another category, another colour."""
    world = scene.world
    present = set(names_in(scene))
    known = dict.fromkeys([sprites()[key].name for key in world.sprites] + list(world.shapes))
    missing = [name for name in known if name not in present]
    for name in rng.sample(missing, min(2, len(missing))):
        yield _say(rng, ABSENT, "absent", (), n=name, p=plurals()[name])
    for name in names_in(scene):
        used = colours_of(scene, name)
        others = [colour for colour in world.colours if colour not in used]
        if used and others:
            yield _say(rng, COLOUR, "absent", (), n=name, c=rng.choice(others))


def _compounds(
    scene: Scene, rng: random.Random
) -> tuple[list[ReferringExpression], list[ReferringExpression]]:
    """Expressions with two attributes of one object, and contradicted ones (one is false).

    Size and side are those among all of the name, so that readers who look only among those of
    the colour find the same object. What is untrue is said of the only object of its colour.
    """
    true: list[ReferringExpression] = []
    false: list[ReferringExpression] = []
    for name in names_in(scene):
        group = Group(name, plurals()[name], members_of(scene, name))
        for wordings, target, words in chain(_among_like(scene, group), _beside(scene, group)):
            if target is None:
                false.append(_say(rng, wordings, "contradicted", (), **words))
            else:
                true.append(_say(rng, wordings, "compound", (target,), **words))
    return _some(rng, true), _some(rng, false)


def _among_like(scene: Scene, group: Group) -> Iterator[_Told]:
    """Size or side with colour, and size with side."""
    sizes = _size_words(scene, group)
    sides = [(side, outermost(scene, group, side)) for side in SIDES]
    ranks = [(f"the {word} {{n}}", f"the {other} {{n}}", n) for word, other, n in sizes]
    ranks += [(BESIDE[side], BESIDE[OPPOSITE[side]], n) for side, n in sides if n is not None]
    for wording, opposite, number in ranks:
        colour = scene.objects[number].colour
        if colour is None:
            continue
        words = {"n": f"{colour} {group.noun}"}
        yield (wording,), number, words
        if members_of(scene, group.noun, colour) == (number,):
            yield (opposite,), None, words
    for (word, _, number), (side, outer) in product(sizes, sides):
        if number == outer:
            yield (BESIDE[side],), number, {"n": f"{word} {group.noun}"}


def _beside(scene: Scene, group: Group) -> Iterator[_Told]:
    """Colour or size with the place beside a landmark."""
    name, plural = group.noun, group.plural
    coloured = [
        Group(f"{colour} {name}", f"{colour} {plural}", members_of(scene, name, colour))
        for colour in colours_of(scene, name)
    ]
    sizes = _size_words(scene, group)
    for (landmark_noun, landmark), side in product(landmarks_in(scene), SIDES):
        if landmark in group.members:
            continue
        for some in coloured:
            target = alone_beside(scene, some, landmark, side)
            if target is None:
                continue
            words = {"n": some.noun, "m": landmark_noun}
            yield RELATION[side], target, words
            if some.members == (target,):
                yield RELATION[OPPOSITE[side]], None, words
        for word, _, number in sizes:
            if side_of(scene, number, landmark, side) == "clearly":
                yield RELATION[side], number, {"n": f"{word} {name}", "m": landmark_noun}


def _size_words(scene: Scene, group: Group) -> list[tuple[str, str, int]]:
    """(word, its opposite, number) of the clearly biggest and smallest."""
    smallest, biggest = extremes_in_size(scene, group)
    words = (("big", "small", biggest), ("small", "big", smallest))
    return [(word, opposite, n) for word, opposite, n in words if n is not None]


def _some(rng: random.Random, found: list[ReferringExpression]) -> list[ReferringExpression]:
    different = list(dict.fromkeys(found))
    return rng.sample(different, min(COMPOUNDS, len(different)))


def _say(
    rng: random.Random, wordings: Iterable[str], kind: Kind, targets: tuple[int, ...], **words: str
) -> ReferringExpression:
    return ReferringExpression(rng.choice(tuple(wordings)).format(**words), kind, targets)
