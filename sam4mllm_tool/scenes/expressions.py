"""Referring expressions of known kind for a scene, each naming its targets and nothing else."""

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, product

from sam4mllm_tool.scenes import wording as w
from sam4mllm_tool.scenes.conditions import clauses, nearest, negations
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
from sam4mllm_tool.scenes.speaker import (
    Kind,
    ReferringExpression,
    Speaker,
    Wording,
    Wordings,
)
from sam4mllm_tool.scenes.sprites import functions, plurals, sprites

__all__ = ["Kind", "ReferringExpression", "Wording", "expressions"]

MOST = 2  # expressions per scene of a kind that has very many
MOST_UNTRUE = 3  # contradicted ones per scene
SHORTENED = 0.4  # share of the expressions in which a long name is cut short
_Told = tuple[Wordings, int | None, dict[str, str]]
"""Wordings, the object that both attributes fit (`None`: contradicted), and their words."""


def expressions(
    scene: Scene, rng: random.Random, wording: Wording = "train"
) -> list[ReferringExpression]:
    """Every unambiguous expression of known kind, one wording drawn for each.

    The list always ends with expressions whose target is absent: things that are not there,
    things of which something is said that is true of none, and groups of another number: "two
    dogs", "both dogs" or "the two dogs" name nothing where there are not exactly two dogs.

    Args:
        scene: what is seen.
        rng: draws the wordings, and which expressions of the most numerous kinds are given.
        wording: "train", or "held-out" for templates that no model was trained on.
    """
    say = Speaker(rng, wording)
    found = [*_named(scene, say)]
    for group in groups_in(scene):
        found += _sizes(scene, group, say)
        found += _positions(scene, group, say)
        found += _ordinals(scene, group, say)
        found += _relations(scene, group, say)
    absent, untrue = [*_absent(scene, say), *_miscounted(scene, say)], []
    for numerous in (_compounds, negations, nearest, clauses):
        some = _some(rng, numerous(scene, say))
        found += [phrase for phrase in some if phrase.targets]
        untrue += [phrase for phrase in some if not phrase.targets]
    absent += rng.sample(untrue, min(MOST_UNTRUE, len(untrue)))
    found += _requests(found, say, MOST)
    absent += _requests(absent, say, 1)
    by_text: dict[str, ReferringExpression] = {}  # some texts are of two kinds: the simpler counts
    for phrase in [*found, *absent]:
        short = _shortened(phrase, rng)
        by_text.setdefault(short.text, short)
    return list(by_text.values())


def _named(scene: Scene, say: Speaker) -> Iterator[ReferringExpression]:
    """Category, colour, function and plural: what the words alone pick out."""
    for name in names_in(scene):
        members = members_of(scene, name)
        if len(members) == 1:
            yield say.say(w.CATEGORY, "category", members, n=name)
            asked = functions(say.wording).get(name)
            if asked:
                yield ReferringExpression(say.rng.choice(asked), "function", members)
        for colour in colours_of(scene, name):
            coloured = members_of(scene, name, colour)
            if len(coloured) == 1:
                yield say.say(w.COLOUR, "colour", coloured, n=name, c=colour)
    for group in groups_in(scene):
        count = len(group.members)
        if count > 1:
            wordings = w.PLURAL_OF_TWO if count == 2 else w.PLURAL
            words = {"n": group.noun, "p": group.plural, "k": w.NUMBERS[count]}
            yield say.say(wordings, "plural", group.members, **words)


def _sizes(scene: Scene, group: Group, say: Speaker) -> Iterator[ReferringExpression]:
    """The biggest and the smallest."""
    words = {"n": group.noun, "p": group.plural}
    two = len(group.members) == 2
    smallest, biggest = extremes_in_size(scene, group)
    if biggest is not None:
        yield say.say(w.BIGGER if two else w.BIGGEST, "size", (biggest,), **words)
    if smallest is not None:
        yield say.say(w.SMALLER if two else w.SMALLEST, "size", (smallest,), **words)


def _positions(scene: Scene, group: Group, say: Speaker) -> Iterator[ReferringExpression]:
    """The outermost member on each of the four sides."""
    wordings = w.POSITION_OF_TWO if len(group.members) == 2 else w.POSITION
    for side in SIDES:
        target = outermost(scene, group, side)
        if target is not None:
            words = {"n": group.noun, "p": group.plural}
            yield say.say(wordings[side], "position", (target,), **words)


def _ordinals(scene: Scene, group: Group, say: Speaker) -> Iterator[ReferringExpression]:
    """ "The second cat from the right", for three members and more."""
    if len(group.members) < 3:
        return
    for side in SIDES:
        in_order = ranked(scene, group, distance_along(scene, side))
        for place in range(1, len(in_order) - 1):
            if clearly_apart(scene, in_order[: place + 2], side):
                words = {"n": group.noun, "p": group.plural, "o": w.ORDINALS[place],
                         "k": w.NUMBERS[place + 1], "s": side}  # fmt: skip
                yield say.say(w.ORDINAL, "ordinal", (in_order[place],), **words)


def _relations(scene: Scene, group: Group, say: Speaker) -> Iterator[ReferringExpression]:
    """ "The cat right of the car", where the other noun names one object."""
    for noun, landmark in landmarks_in(scene):
        if landmark in group.members:
            continue
        for side in SIDES:
            target = alone_beside(scene, group, landmark, side)
            if target is not None:
                where = say.pick(w.BESIDE[side], m=noun)
                yield say.say(w.RELATION, "relation", (target,), n=group.noun, x=where)


def _absent(scene: Scene, say: Speaker) -> Iterator[ReferringExpression]:
    """Things of this world that the scene lacks: another category, another colour."""
    world, present = scene.world, names_in(scene)
    known = dict.fromkeys([sprites()[key].name for key in world.sprites] + list(world.shapes))
    missing = [name for name in known if name not in present]
    for name in say.rng.sample(missing, min(2, len(missing))):
        yield say.say(w.ABSENT, "absent", (), n=name, p=plurals()[name])
    for name in present:
        used = colours_of(scene, name)
        others = [colour for colour in world.colours if colour not in used]
        if used and others:
            yield say.say(w.COLOUR, "absent", (), n=name, c=say.rng.choice(others))
    if missing and present:  # beside a thing that is there, and beside one that is not
        pair = [say.rng.choice(present), say.rng.choice(missing)]
        say.rng.shuffle(pair)
        where = say.pick(say.rng.choice([*w.BESIDE.values(), w.NEXT_TO]), m=pair[1])
        yield say.say(w.RELATION, "absent", (), n=pair[0], x=where)
        colour, name = say.rng.choice(world.colours), say.rng.choice(missing)
        yield say.say(w.NOT, "absent", (), n=name, x=colour)


def _miscounted(scene: Scene, say: Speaker) -> Iterator[ReferringExpression]:
    """A number of things that is not theirs: one name of the scene is drawn."""
    names = names_in(scene)
    if not names:
        return
    name = say.rng.choice(names)
    count = len(members_of(scene, name))
    number = say.rng.choice([k for k in range(2, 5) if k != count])
    wordings = w.MISCOUNTED_AS_TWO if number == 2 and (count > 2 or _coin(say)) else w.MISCOUNTED
    if number > count or wordings is w.MISCOUNTED_AS_TWO:  # "three dogs" may be three of four
        words = {"p": plurals()[name], "k": w.NUMBERS[number]}
        yield say.say(wordings, "miscounted", (), **words)


def _coin(say: Speaker) -> bool:
    return say.rng.random() < 0.5


def _compounds(scene: Scene, say: Speaker) -> Iterator[ReferringExpression]:
    """Expressions with two attributes of one object, and contradicted ones (one is false).

    Size and side are those among all of the name, so that readers who look only among those of
    the colour find the same object. What is untrue is said of the only object of its colour.
    """
    for name in names_in(scene):
        group = Group(name, plurals()[name], members_of(scene, name))
        told = chain(_among_like(scene, group, say), _beside(scene, group, say))
        for wordings, target, words in told:
            kind: Kind = "contradicted" if target is None else "compound"
            yield say.say(wordings, kind, () if target is None else (target,), **words)


def _among_like(scene: Scene, group: Group, say: Speaker) -> Iterator[_Told]:
    """Size or side with colour, and size with side."""
    sizes = _size_words(scene, group)
    sides = [(side, outermost(scene, group, side)) for side in SIDES]
    ranks = [(w.ATTRIBUTE, word, other, n) for word, other, n in sizes]
    ranks += [
        (w.AT_PLACE, say.pick(w.PLACE[side]), say.pick(w.PLACE[OPPOSITE[side]]), n)
        for side, n in sides
        if n is not None
    ]
    for wordings, true, false, number in ranks:
        colour = scene.objects[number].colour
        if colour is None:
            continue
        noun = f"{colour} {group.noun}"
        yield wordings, number, {"n": noun, "x": true}
        if members_of(scene, group.noun, colour) == (number,):
            yield wordings, None, {"n": noun, "x": false}
    for (word, _, number), (side, outer) in product(sizes, sides):
        if number == outer:
            yield w.AT_PLACE, number, {"n": f"{word} {group.noun}", "x": say.pick(w.PLACE[side])}


def _beside(scene: Scene, group: Group, say: Speaker) -> Iterator[_Told]:
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
        true = say.pick(w.BESIDE[side], m=landmark_noun)
        false = say.pick(w.BESIDE[OPPOSITE[side]], m=landmark_noun)
        for some in coloured:
            target = alone_beside(scene, some, landmark, side)
            if target is None:
                continue
            yield w.RELATION, target, {"n": some.noun, "x": true}
            if some.members == (target,):
                yield w.RELATION, None, {"n": some.noun, "x": false}
        for word, _, number in sizes:
            if side_of(scene, number, landmark, side) == "clearly":
                yield w.RELATION, number, {"n": f"{word} {name}", "x": true}


def _size_words(scene: Scene, group: Group) -> list[tuple[str, str, int]]:
    """(word, its opposite, number) of the clearly biggest and smallest."""
    smallest, biggest = extremes_in_size(scene, group)
    words = (("big", "small", biggest), ("small", "big", smallest))
    return [(word, opposite, n) for word, opposite, n in words if n is not None]


def _some(rng: random.Random, found: Iterable[ReferringExpression]) -> list[ReferringExpression]:
    """A few of those with a target and a few without."""
    different = list(dict.fromkeys(found))
    there = [phrase for phrase in different if phrase.targets]
    absent = [phrase for phrase in different if not phrase.targets]
    return [one for some in (there, absent) for one in rng.sample(some, min(MOST, len(some)))]


def _requests(
    found: Iterable[ReferringExpression], say: Speaker, most: int
) -> list[ReferringExpression]:
    """Some of the noun phrases about one thing, or about none, as whole sentences."""
    phrases = [p for p in found if len(p.targets) < 2 and re.match(r"the \w+", p.text)]
    return [
        say.say(w.REQUEST, "request" if phrase.targets else phrase.kind, phrase.targets,
                x=phrase.text)
        for phrase in say.rng.sample(phrases, min(most, len(phrases)))
    ]  # fmt: skip


def _shortened(phrase: ReferringExpression, rng: random.Random) -> ReferringExpression:
    """Often "the clock" for "the alarm clock", and "the scissors" for the pair."""
    text = phrase.text
    if rng.random() < SHORTENED:
        for long, short in w.SHORT_NAMES.items():
            text = re.sub(rf"(?<!\ba )(?<!every )(?<!each )\b{long}\b", short, text)
    return replace(phrase, text=text)
