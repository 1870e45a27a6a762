"""An expression as a checkpoint was taught to read it: its case, and its words if they are few."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher

from sam4mllm_tool.protocols import CheckpointNotes

SHORTEST = 4  # letters of a word that may be corrected: "cat" is no misspelt "car"
CLOSE = 0.82  # similarity of a misspelt word and the known one: "light" and "right" have 0.8
CLEAR = 0.04  # and by so much closer than to any other known word
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


@dataclass(frozen=True)
class Reading:
    """What is asked, and what a reader of the result should know about it."""

    text: str
    notes: tuple[str, ...] = ()


def read_expression(expression: str, notes: CheckpointNotes) -> Reading:
    """Fold case, correct words that are clearly misspelt known ones, name those not taught.

    Words are corrected for checkpoints that state their vocabulary, unless their notes say
    ``correct_spelling: false``.
    """
    text = expression.lower() if notes.lower_case else expression
    general = (notes.caution,) if notes.caution else ()
    if notes.vocabulary is None:
        return Reading(text, general)
    words = dict.fromkeys(_WORD.findall(text))
    strange = [word for word in words if _stem(word) not in notes.vocabulary]
    corrected = {}
    if notes.correct_spelling:
        found = {word: nearest_word(word.lower(), notes.vocabulary) for word in strange}
        corrected = {word: right for word, right in found.items() if right}
    text = _WORD.sub(lambda match: corrected.get(match[0], match[0]), text)
    said = [f'read "{word}" as "{right}"' for word, right in corrected.items()]
    unknown = list(dict.fromkeys(w.lower() for w in strange if w not in corrected))
    if unknown:
        listed = ", ".join(unknown[:8])
        said.append(f"the model was not taught these words and may guess: {listed}")
    return Reading(text, (*general, *said))


def nearest_word(word: str, vocabulary: Iterable[str]) -> str | None:
    """The known word that a misspelt one clearly stands for, else ``None``.

    The first letters agree; letters that are only swapped count as the closest.
    """
    if len(word) < SHORTEST:
        return None
    scored = sorted(
        ((_similarity(word, known), known) for known in vocabulary if known[:1] == word[:1]),
        reverse=True,
    )
    if not scored or scored[0][0] < CLOSE:
        return None
    clear = len(scored) == 1 or scored[0][0] - scored[1][0] >= CLEAR
    return scored[0][1] if clear else None


def _similarity(word: str, known: str) -> float:
    """difflib's ratio, 0-1."""
    if sorted(word) == sorted(known):
        return 1.0
    return SequenceMatcher(None, word, known, autojunk=False).ratio()


def _stem(word: str) -> str:
    """ "isn" of "isn't", "dog" of "dog's"."""
    return re.split("['’]", word.lower())[0]
