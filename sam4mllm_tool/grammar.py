"""A tiny grammar for replies made of fixed text and fixed-width numbers.

Coordinate replies such as ``[281,251,863,999]`` are mostly punctuation that the format fixes
beforehand. With the grammar as data, an engine can feed the fixed parts without generating them,
and a server's reply can be checked. A grammar is a sequence of parts::

    (Literal("["), Number(3), Literal(","), …, Choice(((), (Literal(" "), …))))
"""

from __future__ import annotations

from dataclasses import dataclass

_REGEX_ESCAPES = {sign: f"\\{sign}" for sign in "\\^$.|?*+()[]{}"} | {"\n": r"\n"}


@dataclass(frozen=True)
class Literal:
    """Fixed text."""

    text: str


@dataclass(frozen=True)
class Number:
    """Exactly ``digits`` decimal digits, zero-padded."""

    digits: int = 3


@dataclass(frozen=True)
class Choice:
    """One of several continuations; an empty option means that nothing follows here.

    Options must differ in their first token, so that the model's next token decides.
    """

    options: tuple[Grammar, ...]


@dataclass(frozen=True)
class Repeat:
    """``item`` between ``minimum`` and ``maximum`` times; the model decides when to stop."""

    item: Grammar
    minimum: int = 0
    maximum: int = 8


Part = Literal | Number | Choice | Repeat
Grammar = tuple[Part, ...]


def grammar_regex(grammar: Grammar) -> str:
    """The grammar as a regular expression that matches whole replies.

    Only literals, groups, ``|``, ``{m,n}`` and ``[0-9]`` are used, which every guided-decoding
    backend knows.
    """
    return "".join(_part_regex(part) for part in grammar)


def _part_regex(part: Part) -> str:
    match part:
        case Literal(text):
            return "".join(_REGEX_ESCAPES.get(c, c) for c in text)
        case Number(digits):
            return f"[0-9]{{{digits}}}"
        case Choice(options):
            return f"({'|'.join(grammar_regex(option) for option in options)})"
        case Repeat(item, minimum, maximum):
            return f"({grammar_regex(item)}){{{minimum},{maximum}}}"
