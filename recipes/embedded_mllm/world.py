"""What the base model must learn about a world: its dense questions and its words."""

from __future__ import annotations

import re

from recipes.embedded_mllm.vision import Questions
from sam4mllm_tool.scenes import wording
from sam4mllm_tool.scenes.speaker import Wordings
from sam4mllm_tool.scenes.sprites import functions, plurals, sprites
from sam4mllm_tool.scenes.world import World

LESSON_WORDS = "What is at each point Name every object background"


def names_of(world: World) -> tuple[str, ...]:
    """Names that a world's objects can have."""
    names = [sprites()[key].name for key in world.sprites] + list(world.shapes)
    return tuple(dict.fromkeys(names))


def questions_of(world: World) -> Questions:
    """The dense questions of stage 1."""
    return Questions(names_of(world), world.colours)


def words_of(world: World) -> list[str]:
    """Texts whose words should be single tokens."""
    names = names_of(world)
    texts = [LESSON_WORDS, *names, *world.colours, *wording.ORDINALS, *wording.NUMBERS]
    texts += [plurals()[name] for name in names]
    texts += [text for name in names for text in functions().get(name, ())]
    for name, templates in vars(wording).items():
        texts += _strings(templates) if name.isupper() else []
    return [text.replace("{", " ").replace("}", " ") for text in texts]


def known_words(world: World) -> list[str]:
    """The lower-case words of the expressions that the model is taught."""
    texts = " ".join(words_of(world)).lower()
    return sorted({word for word in re.findall(r"[a-z]+", texts) if len(word) > 1 or word == "a"})


def _strings(value: object) -> list[str]:
    """The training templates in a constant of the wording module; empty if it has none."""
    if isinstance(value, Wordings):
        return list(value.train)
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for part in value.values() for text in _strings(part)] + _strings(tuple(value))
    if isinstance(value, tuple) and all(isinstance(text, str) for text in value):
        return list(value)
    return []
