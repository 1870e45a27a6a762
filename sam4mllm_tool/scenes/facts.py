"""What clearly holds in a scene: groups, ranks, places relative to each other.

A fact that only just holds (two cats at almost the same height, a size ratio of 1.1) makes an
ambiguous expression, so every comparison needs a clear margin.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from sam4mllm_tool.scenes.render import Scene, SceneObject
from sam4mllm_tool.scenes.sprites import plurals

OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
SIDES = tuple(OPPOSITE)
MARGIN = 0.06  # clear difference of two places, share of the shorter side
SIZE_RATIO = 1.35  # clear difference of two sizes
NAMELESS = "blob"


@dataclass(frozen=True)
class Group:
    """The objects that one noun ("cat", "red car") names."""

    noun: str
    plural: str
    members: tuple[int, ...]


def members_of(scene: Scene, name: str, colour: str | None = None) -> tuple[int, ...]:
    """Numbers of the objects of a name and, if given, a colour."""
    return tuple(
        number
        for number, thing in enumerate(scene.objects)
        if thing.name == name and colour in (None, thing.colour)
    )


def names_in(scene: Scene) -> list[str]:
    """Names of the objects that have one, in the order of drawing."""
    return list(dict.fromkeys(t.name for t in scene.objects if t.name != NAMELESS))


def colours_of(scene: Scene, name: str) -> list[str]:
    """Colours that objects of a name have."""
    used = (thing.colour for thing in scene.objects if thing.name == name)
    return list(dict.fromkeys(colour for colour in used if colour is not None))


def groups_in(scene: Scene) -> Iterator[Group]:
    """Nouns by category and, where it narrows the category down, by colour and category."""
    for name in names_in(scene):
        everything = members_of(scene, name)
        yield Group(name, plurals()[name], everything)
        for colour in colours_of(scene, name):
            members = members_of(scene, name, colour)
            if 1 < len(members) < len(everything):
                yield Group(f"{colour} {name}", f"{colour} {plurals()[name]}", members)


def landmarks_in(scene: Scene) -> Iterator[tuple[str, int]]:
    """Nouns that name one object, by category or by colour and category, with its number."""
    for name in names_in(scene):
        members = members_of(scene, name)
        if len(members) == 1:
            yield name, members[0]
        else:
            for colour in colours_of(scene, name):
                coloured = members_of(scene, name, colour)
                if len(coloured) == 1:
                    yield f"{colour} {name}", coloured[0]


def ranked(scene: Scene, group: Group, key: Callable[[SceneObject], float]) -> tuple[int, ...]:
    """A group's members by a measure, smallest first."""
    return tuple(sorted(group.members, key=lambda number: key(scene.objects[number])))


def distance_along(scene: Scene, side: str) -> Callable[[SceneObject], float]:
    """Distance of a centre from one side of the picture, up to a constant, in shorter sides."""
    axis, sign = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}[side]
    shorter = min(scene.image.size)
    return lambda thing: sign * thing.centre[axis] / shorter


def clearly_apart(scene: Scene, in_order: tuple[int, ...], side: str) -> bool:
    """Whether neighbours in a ranking lie clearly apart."""
    distance = distance_along(scene, side)
    places = [distance(scene.objects[number]) for number in in_order]
    return all(after - before > MARGIN for before, after in pairwise(places))


def side_of(scene: Scene, member: int, landmark: int, side: str) -> str:
    """Whether a member lies "clearly" on that side of the landmark, clearly "not", or "maybe".

    "Clearly" also asks that the named direction is the main one.
    """
    thing, other = scene.objects[member], scene.objects[landmark]
    beyond = distance_along(scene, side)(other) - distance_along(scene, side)(thing)
    across = distance_along(scene, "top" if side in ("left", "right") else "left")
    if beyond > MARGIN and beyond > abs(across(other) - across(thing)):
        return "clearly"
    return "not" if beyond < -MARGIN else "maybe"


def extremes_in_size(scene: Scene, group: Group) -> tuple[int | None, int | None]:
    """The smallest and the biggest, where full and visible size agree by a clear ratio."""
    if len(group.members) < 2:
        return None, None
    by_full = ranked(scene, group, lambda thing: thing.full_area)
    by_seen = ranked(scene, group, lambda thing: thing.area)
    sides = [float(scene.objects[number].full_area) ** 0.5 for number in by_full]
    small = by_full[0] == by_seen[0] and SIZE_RATIO * sides[0] < sides[1]
    big = by_full[-1] == by_seen[-1] and sides[-1] > SIZE_RATIO * sides[-2]
    return by_full[0] if small else None, by_full[-1] if big else None


def outermost(scene: Scene, group: Group, side: str) -> int | None:
    """The member clearly nearest to a side, of two and more."""
    in_order = ranked(scene, group, distance_along(scene, side))
    return in_order[0] if len(in_order) > 1 and clearly_apart(scene, in_order[:2], side) else None


def alone_beside(scene: Scene, group: Group, landmark: int, side: str) -> int | None:
    """The one member clearly on that side of the landmark, where all others clearly are not."""
    where = [side_of(scene, member, landmark, side) for member in group.members]
    alone = where.count("clearly") == 1 and where.count("not") == len(where) - 1
    return group.members[where.index("clearly")] if alone else None


def side_of_picture(scene: Scene, number: int, side: str) -> bool | None:
    """Whether an object's centre lies in that half of the picture; `None` near the middle."""
    axis = 0 if side in ("left", "right") else 1
    share = scene.objects[number].centre[axis] / scene.image.size[axis]
    if abs(share - 0.5) < 0.1:
        return None
    return (share < 0.5) == (side in ("left", "top"))


def gap(scene: Scene, one: int, other: int) -> float:
    """Distance of the boxes of two objects, shares of the shorter side; 0 if they meet."""
    a, b = scene.objects[one].box, scene.objects[other].box
    across, down = (max(a[n] - b[n + 2], b[n] - a[n + 2], 0.0) for n in (0, 1))
    return math.hypot(across, down) / min(scene.image.size)


def nearest_to(scene: Scene, members: tuple[int, ...], landmark: int) -> int | None:
    """The member clearly nearest to a landmark: by the gap to it and by the distance of centres."""
    if not members:
        return None
    centre = scene.objects[landmark].centre
    shorter = min(scene.image.size)
    measures: list[Callable[[int], float]] = [
        lambda n: math.dist(scene.objects[n].centre, centre) / shorter,
        lambda n: gap(scene, n, landmark),
    ]
    first = min(members, key=measures[0])
    rest = [n for n in members if n != first]
    clear = all(measure(n) - measure(first) > MARGIN for measure in measures for n in rest)
    return first if clear else None
