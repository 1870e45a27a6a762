"""A reply grammar over one tokenizer's tokens: which tokens may come next.

A grammar is written in characters, the model answers in tokens, and every tokenizer cuts text
differently. So the grammar is not compiled into one automaton over characters; it is expanded
step by step into the tokens of the tokenizer at hand, as in a nondeterministic automaton:

- A *track* is one way in which the reply may continue: the parts that are left, as a linked list.
  Tracks of a ``Choice`` or ``Repeat`` share the parts after it, so nothing is copied per option.
- A *place* is the set of all tracks that agree with the tokens so far. There may be several
  because options can begin with the same token: after ``[`` of ``[1,2] [3,4]`` it is open whether
  this is the last box, and the choice is made only where the tokens differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sam4mllm_tool.errors import CheckpointError
from sam4mllm_tool.grammar import Choice, Grammar, Literal, Number, Part, Repeat
from sam4mllm_tool.mllm.encoding import DialogueEncoder


@dataclass(frozen=True)
class _Forced:
    """Token ids still to come of a literal."""

    ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Track:
    """What comes next, and what comes after it; ``None`` stands for the end of the reply."""

    head: Part | _Forced
    rest: _Track | None


_NEIGHBOURS = 15
"""Numbers this close (of 1000) to a likelier one do not count as alternates."""

Place = frozenset["_Track | None"]
"""Where a reply is within a grammar."""


class TokenGrammar:
    """Which token ids may come next at every place in a grammar.

    Numbers consist of tokens that hold digits only, however the tokenizer groups them: if every
    ``000``…``999`` is a token, a three-digit number is one token; else any grouping is allowed. The
    end of the reply is an end-of-turn token.
    """

    def __init__(self, grammar: Grammar, encoder: DialogueEncoder, end_ids: Sequence[int]) -> None:
        self._encoder = encoder
        self._digits = _digit_tokens(encoder)
        self._end_ids = tuple(end_ids)
        self._next: dict[Place, dict[int, Place]] = {}
        self.start: Place = frozenset({_chain(grammar, None)})

    def allowed(self, place: Place) -> dict[int, Place]:
        """Token ids that may come next, each with the place it leads to.

        End-of-turn tokens lead to the empty place.
        """
        if place not in self._next:
            self._next[place] = self._expand(place)
        return self._next[place]

    def forced(self, place: Place) -> tuple[list[int], Place]:
        """The tokens that are the only allowed ones from here on, and the place after them.

        They need no decision of the model, so they are read together with the next free token.
        """
        ids: list[int] = []
        while len(options := self.allowed(place)) == 1 and not self.at_end(place):
            token, place = next(iter(options.items()))
            ids.append(token)
        return ids, place

    def at_end(self, place: Place) -> bool:
        """Whether nothing but the end of the turn may come."""
        return all(track is None for track in place)

    def is_end(self, token: int) -> bool:
        """Whether a token ends the turn."""
        return token in self._end_ids

    def peaks(self, tokens: Tensor, log_probabilities: Tensor) -> Tensor:
        """Log-probabilities of allowed tokens, minus infinity where a number close by is likelier.

        A neighbour of a likely coordinate gives nearly the same box. Other tokens stay as they are.
        """
        values = self._digits.values
        numbers = [(values[t], i) for i, t in enumerate(tokens.tolist()) if t in values]
        found = log_probabilities.clone()
        if len(numbers) < 4 * _NEIGHBOURS:  # single digits are no neighbours in value
            return found
        order = torch.tensor([i for _, i in sorted(numbers)], device=found.device)
        line = found[order]
        around = torch.nn.functional.max_pool1d(
            line[None], 2 * _NEIGHBOURS + 1, stride=1, padding=_NEIGHBOURS
        )[0]
        found[order] = torch.where(line < around, -torch.inf, line)
        return found

    def _expand(self, place: Place) -> dict[int, Place]:
        # Tracks that allow the same token stay together behind it: which one is meant may show
        # only later. A token that only one of them allows ends the others.
        merged: dict[int, set[_Track | None]] = {}
        for track in place:
            for token, behind in self._steps(track):
                merged.setdefault(token, set()).update(behind)
        return {token: frozenset(merged[token]) for token in sorted(merged)}

    def _steps(self, track: _Track | None) -> list[tuple[int, set[_Track | None]]]:
        """(token, tracks after it) for one track.

        Parts that write nothing by themselves (a choice, a repetition, an empty literal) are
        opened here until a token is found, so every step is exactly one token.
        """
        if track is None:
            return [(token, set()) for token in self._end_ids]
        head, rest = track.head, track.rest
        match head:
            case Literal(text):
                ids = tuple(self._encoder.encode_continuation(text))
                return self._steps(_Track(_Forced(ids), rest))
            case _Forced(ids):
                if not ids:
                    return self._steps(rest)
                return [(ids[0], {_Track(_Forced(ids[1:]), rest) if ids[1:] else rest})]
            case Number(digits):
                return self._number(digits, rest)
            case Choice(options):
                return [step for option in options for step in self._steps(_chain(option, rest))]
            case Repeat(item, minimum, maximum):
                return self._repeat(item, minimum, maximum, rest)

    def _number(self, digits: int, rest: _Track | None) -> list[tuple[int, set[_Track | None]]]:
        steps: list[tuple[int, set[_Track | None]]] = []
        for length, tokens in self._digits.groups(digits):
            # One track for all tokens of that length: places stay few, and are expanded once.
            behind = _Track(Number(digits - length), rest) if length < digits else rest
            steps += [(token, {behind}) for token in tokens]
        return steps

    def _repeat(
        self, item: Grammar, minimum: int, maximum: int, rest: _Track | None
    ) -> list[tuple[int, set[_Track | None]]]:
        steps: list[tuple[int, set[_Track | None]]] = []
        if maximum > 0:
            more = Repeat(item, max(0, minimum - 1), maximum - 1)
            steps += self._steps(_chain(item, _Track(more, rest)))
        if minimum <= 0:
            steps += self._steps(rest)
        return steps


def _chain(parts: Sequence[Part], rest: _Track | None) -> _Track | None:
    """A track of these parts; neighbouring literals are joined, to be tokenised as one."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, Literal) and joined and isinstance(joined[-1], Literal):
            part = Literal(joined.pop().text + part.text)  # type: ignore[union-attr]
        joined.append(part)
    for part in reversed(joined):
        rest = _Track(part, rest)
    return rest


@dataclass(frozen=True)
class _DigitTokens:
    """Tokens made of ASCII digits only.

    Attributes:
        by_length: ids by number of digits.
        values: number by id.
        thousand: the ids of 000 … 999, if this tokenizer writes each as one token.
    """

    by_length: dict[int, tuple[int, ...]]
    values: dict[int, int]
    thousand: tuple[int, ...]

    def groups(self, digits: int) -> list[tuple[int, tuple[int, ...]]]:
        """(length, tokens) that may come next in a number with that many digits left."""
        if digits == 3 and self.thousand:
            return [(3, self.thousand)]
        return [(n, tokens) for n, tokens in sorted(self.by_length.items()) if n <= digits]


@lru_cache(maxsize=16)
def _digit_tokens(encoder: DialogueEncoder) -> _DigitTokens:
    by_length: dict[int, list[int]] = {}
    vocabulary = encoder.tokenizer.get_vocab()
    for token, index in vocabulary.items():
        if token.isascii() and token.isdigit():
            by_length.setdefault(len(token), []).append(index)
    if len(by_length.get(1, ())) != 10 and len(by_length.get(3, ())) != 1000:
        raise CheckpointError(
            "the tokenizer has no tokens for the ten digits",
            hint="Ask without a grammar, or use another checkpoint.",
        )
    values = {index: int(t) for t, index in vocabulary.items() if t.isascii() and t.isdigit()}
    # A vocabulary may hold numbers that its tokenizer never writes.
    written = encoder.encode_continuation(",".join(f"{n:03d}" for n in range(1000)))[::2]
    thousand = tuple(written) if [values.get(i) for i in written] == list(range(1000)) else ()
    return _DigitTokens({n: tuple(sorted(ids)) for n, ids in by_length.items()}, values, thousand)


@dataclass(frozen=True)
class YesNoTokens:
    """How one tokenizer writes yes and no.

    Attributes:
        yes, no: ids of single tokens that spell the word (with or without a space or capital).
    """

    yes: tuple[int, ...]
    no: tuple[int, ...]


def yes_no_tokens(encoder: DialogueEncoder, yes: Sequence[str], no: Sequence[str]) -> YesNoTokens:
    """Find all spellings of both words that are one token.

    Raises:
        CheckpointError: a word has no spelling of one token, or both share one.
    """
    yes_ids, no_ids = (_single_tokens(encoder, words) for words in (yes, no))
    if not yes_ids or not no_ids or set(yes_ids) & set(no_ids):
        raise CheckpointError(
            f"the tokenizer (tokenizer.json) does not write {yes[0]!r} and {no[0]!r} as one token "
            "each",
            hint="Choose words that are single tokens in this checkpoint's vocabulary.",
        )
    return YesNoTokens(yes_ids, no_ids)


def _single_tokens(encoder: DialogueEncoder, words: Sequence[str]) -> tuple[int, ...]:
    unknown = encoder.tokenizer.unk_token_id
    found: dict[int, None] = {}
    for word in words:
        for spelling in dict.fromkeys((word, word.capitalize(), word.lower(), word.upper())):
            for text in (spelling, " " + spelling):
                ids = encoder.encode_continuation(text)
                # An uncased tokenizer finds the token of another spelling.
                decoded = encoder.decode_continuation(ids).strip()
                if len(ids) == 1 and ids[0] != unknown and decoded == spelling:
                    found[ids[0]] = None
    return tuple(found)
