"""How expressions are put into words: templates of training and evaluation kept apart."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "category",
    "colour",
    "size",
    "position",
    "ordinal",
    "relation",
    "plural",
    "function",
    "compound",
    "negation",
    "nearest",
    "clauses",
    "request",
    "absent",
    "contradicted",
    "miscounted",
]
Wording = Literal["train", "held-out"]


@dataclass(frozen=True)
class ReferringExpression:
    """A text, how it refers, and the indices in `scene.objects` it refers to (none: absent)."""

    text: str
    kind: Kind
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Wordings:
    """Templates of one meaning: those that models are trained on, and those they never see.

    The held-out ones use only words that occur in training, so that they test how words are put
    together and not which words are known.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class Speaker:
    """Draws wordings from one of the two sets."""

    rng: random.Random
    wording: Wording = "train"

    def pick(self, wordings: Wordings, **words: str) -> str:
        """One of the templates, filled in; `an` is `n` with its indefinite article."""
        if "n" in words:
            words["an"] = with_article(words["n"])
        found = wordings.train if self.wording == "train" else wordings.held_out
        return self.rng.choice(found).format(**words)

    def say(
        self, wordings: Wordings, kind: Kind, targets: tuple[int, ...], **words: str
    ) -> ReferringExpression:
        """An expression for these targets in one of the wordings."""
        return ReferringExpression(self.pick(wordings, **words), kind, targets)


def with_article(noun: str) -> str:
    """ "a dog", "an apple"."""
    return f"{'an' if re.match('[aeiou]|L ', noun) else 'a'} {noun}"
