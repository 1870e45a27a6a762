"""What can be said of the objects of a name, one condition at a time, and of several joined.

A condition clearly holds of an object, clearly does not, or neither (`None`); an expression is made
only where everything it depends on is clear.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sam4mllm_tool.scenes import wording as w
from sam4mllm_tool.scenes.facts import (
    SIDES,
    Group,
    colours_of,
    extremes_in_size,
    gap,
    landmarks_in,
    members_of,
    names_in,
    nearest_to,
    outermost,
    side_of,
    side_of_picture,
)
from sam4mllm_tool.scenes.render import Scene
from sam4mllm_tool.scenes.speaker import Kind, ReferringExpression, Speaker
from sam4mllm_tool.scenes.sprites import animals, plurals

NEAR, FAR = 0.08, 0.25  # gap of two boxes, shares of the shorter side
DRAWS = 40  # combinations of conditions tried for a name
Truth = tuple[bool | None, ...]


@dataclass(frozen=True)
class Condition:
    """A predicate ("red", "above the car") and of which members of a group it holds.

    Attributes:
        aspect: what it is about; an expression has one condition of each aspect.
        words: what stands after "is".
        holds: one value for each member of the group.
        adjective: the word that may stand before the noun instead.
    """

    aspect: str
    words: str
    holds: Truth
    adjective: str | None = None

    @property
    def negated(self) -> Condition:
        """The opposite."""
        opposite = tuple(None if one is None else not one for one in self.holds)
        return Condition(self.aspect, f"not {self.words}", opposite)


def conditions(scene: Scene, group: Group, say: Speaker) -> Iterator[Condition]:
    """Everything that clearly holds of some member of a group of one name."""
    members = group.members
    for colour in colours_of(scene, group.noun):
        holds: Truth = tuple(scene.objects[n].colour == colour for n in members)
        yield Condition("colour", colour, holds, colour)
    sizes = ("small", "big") if len(members) == 2 else ("smallest", "biggest")
    for word, number in zip(sizes, extremes_in_size(scene, group), strict=True):
        if number is not None:
            words = word if len(members) == 2 else f"the {word}"
            yield Condition("size", words, tuple(n == number for n in members), word)
    for side in SIDES:
        if len(members) == 1:
            holds = (side_of_picture(scene, members[0], side),)
        elif (outer := outermost(scene, group, side)) is not None:
            holds = tuple(n == outer for n in members)
        else:
            continue
        yield Condition("place", say.pick(w.PLACE[side]), holds)
    truth = {"clearly": True, "not": False, "maybe": None}
    for noun, landmark in landmarks_in(scene):
        if landmark in members:
            continue
        for side in SIDES:
            where = say.pick(w.BESIDE[side], m=noun)
            found = tuple(truth[side_of(scene, n, landmark, side)] for n in members)
            yield Condition("relation", where, found)
        yield Condition("near", say.pick(w.NEXT_TO, m=noun), _near(scene, members, landmark))


def clauses(scene: Scene, say: Speaker) -> Iterator[ReferringExpression]:
    """Two or three conditions that one object fulfils; contradicted where just one is untrue."""
    for name in names_in(scene):
        group = Group(name, plurals()[name], members_of(scene, name))
        known = [one for one in conditions(scene, group, say) if {*one.holds} - {None}]
        for _ in range(DRAWS):
            drawn = say.rng.sample(known, min(len(known), say.rng.choice((2, 2, 3))))
            if len(drawn) < 2 or len({one.aspect for one in drawn}) < len(drawn):
                continue
            if say.rng.random() < 0.3:
                drawn[0] = drawn[0].negated
            columns = list(zip(*(one.holds for one in drawn), strict=True))
            if not _ranked_clearly(drawn):
                continue
            fits = [all(column) for column in columns]
            denied = [False in column for column in columns]
            if fits.count(True) == 1 and denied.count(False) == 1:
                target = group.members[fits.index(True)]
                yield _joined(drawn, name, "clauses", (target,), say)
            elif all(denied) and any(c.count(True) == len(c) - 1 for c in columns):
                yield _joined(drawn, name, "contradicted", (), say)


def _ranked_clearly(drawn: Sequence[Condition]) -> bool:
    """Whether ranks mean the same among all of a name as among those that fit the other words.

    A rank that one of those has among all, it has among them too. Otherwise "the red dog on the
    left" may be the left one of two red dogs right of a blue one.
    """
    for one in drawn:
        if one.aspect not in ("place", "size") or len(one.holds) == 1:
            continue
        others = zip(*(c.holds for c in drawn if c is not one), strict=True)
        fits = [held for held, rest in zip(one.holds, others, strict=True) if False not in rest]
        positive = not one.words.startswith("not ")
        if len(fits) > 1 and not (positive and True in fits):
            return False
    return True


def negations(scene: Scene, say: Speaker) -> Iterator[ReferringExpression]:
    """ "The dog that is not red", "the object that is not a dog"; contradicted if all are."""
    for name in names_in(scene):
        group = Group(name, plurals()[name], members_of(scene, name))
        alone = len(group.members) == 1
        usable = [
            one
            for one in conditions(scene, group, say)
            if None not in one.holds and (alone or any(one.holds)) and one.aspect != "near"
            and (one.aspect != "place" or len(group.members) == 2)
        ]  # fmt: skip
        if alone and colours_of(scene, name):
            others = [c for c in scene.world.colours if c not in colours_of(scene, name)]
            usable.append(Condition("colour", say.rng.choice(others), (False,)))
        for one in say.rng.sample(usable, min(2, len(usable))):
            left = tuple(n for n, held in zip(group.members, one.holds, strict=True) if not held)
            words = {"n": group.noun, "p": group.plural, "x": one.words}
            wordings = w.NOT_SEVERAL if len(left) > 1 else w.NOT
            yield say.say(wordings, "negation" if left else "contradicted", left, **words)
    yield from _other_than(scene, say)


def nearest(scene: Scene, say: Speaker) -> Iterator[ReferringExpression]:
    """ "The apple next to the car", "the thing nearest to the tree"."""
    everything = tuple(range(len(scene.objects)))
    for noun, landmark in landmarks_in(scene):
        for name in [*names_in(scene), "thing", "object"]:
            members = everything if name in w.CLASSES else members_of(scene, name)
            if landmark in members and name not in w.CLASSES:
                continue
            others = tuple(n for n in members if n != landmark)
            target = nearest_to(scene, others, landmark)
            if target is None or (len(others) == 1 and name in w.CLASSES):
                continue
            if len(others) > 1:
                yield say.say(w.NEAREST, "nearest", (target,), n=name, m=noun)
            if gap(scene, target, landmark) < NEAR:
                where = say.pick(w.NEXT_TO, m=noun)
                yield say.say(w.RELATION, "nearest", (target,), n=name, x=where)


def _near(scene: Scene, members: Sequence[int], landmark: int) -> Truth:
    gaps = [gap(scene, n, landmark) for n in members]
    return tuple(True if g < NEAR else False if g > FAR else None for g in gaps)


def _other_than(scene: Scene, say: Speaker) -> Iterator[ReferringExpression]:
    """What is of a class but not of one of its names."""
    classes = {
        "shape": tuple(n for n, thing in enumerate(scene.objects) if thing.kind == "shape"),
        "animal": tuple(n for n, thing in enumerate(scene.objects) if thing.name in animals()),
    }
    everything = tuple(range(len(scene.objects)))
    for name in say.rng.sample(names_in(scene), min(2, len(names_in(scene)))):
        mine = members_of(scene, name)
        kinds = [key for key, members in classes.items() if mine[0] in members]
        noun = say.rng.choice([*kinds, "object", "thing"])
        left = tuple(n for n in classes.get(noun, everything) if n not in mine)
        words = {"n": name, "p": plurals()[name], "x": noun, "y": w.CLASSES[noun]}
        one = w.OTHER if noun in classes else w.SOMETHING
        wordings = w.OTHERS if len(left) > 1 else one
        yield say.say(wordings, "negation" if left else "contradicted", left, **words)


def _joined(
    drawn: Sequence[Condition], noun: str, kind: Kind, targets: tuple[int, ...], say: Speaker
) -> ReferringExpression:
    """The conditions as adjectives and clauses."""
    first = next((one for one in drawn if one.adjective), None)
    rest = [one for one in drawn if one is not first]
    rest.sort(key=lambda one: (one.words.startswith("not "), one.aspect != "place"))
    if first is not None:
        noun = f"{first.adjective} {noun}"
    if len(rest) == 3:  # three places: the last one is left to the second clause
        rest = [rest[0], replace(rest[1], words=f"{rest[1].words} and {rest[2].words}")]
    if len(rest) == 1:
        return say.say(w.ONE_CLAUSE, kind, targets, n=noun, x=rest[0].words)
    bare = rest[0].aspect == "place" and not rest[0].words.startswith("not ")
    wordings = w.PLACED if bare else w.JOINED
    return say.say(wordings, kind, targets, n=noun, x=rest[0].words, y=rest[1].words)
