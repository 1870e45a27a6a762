"""Replies spread evenly over what a model might say.

Arithmetic sampling: Vilnis et al., "Arithmetic Sampling: Parallel Diverse Decoding for Large
Language Models" (ICML 2023, arXiv 2210.15458). All replies of a grammar, sorted, divide the numbers
from 0 to 1 among themselves, each as much as its probability. Numbers at even distances then name
replies as often as the model would give them at temperature 1, with no randomness and a smaller
variance than independent draws: a reply of probability p comes between p·n - 1 and p·n + 1 times.
Float32 holds some 20 bits of a code: what long replies need beyond those, rounding decides.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from sam4mllm_tool.mllm.decoding import Spoken, fork_at
from sam4mllm_tool.mllm.grammar_tokens import Place, TokenGrammar
from sam4mllm_tool.mllm.reading import Decoding, Spot, read, together

_BELOW_ONE = math.nextafter(1.0, 0.0)

Codes = tuple[float, ...]
"""Numbers from 0 to below 1, each of which names a reply."""


def even_codes(count: int) -> Codes:
    """``count`` numbers at even distances."""
    return tuple((n + 0.5) / count for n in range(count))


def speak_spread(
    spot: Spot, grammar: TokenGrammar, limit: int, count: int
) -> Decoding[list[Spoken]]:
    """``count`` replies within a grammar, in its order; a beginning they share is read once."""
    nothing = Spoken((), 0.0, spot)
    return (yield from _spread(nothing, (), grammar.start, grammar, limit, even_codes(count)))


def _spread(
    begun: Spoken,
    new: tuple[int, ...],
    place: Place,
    grammar: TokenGrammar,
    limit: int,
    codes: Codes,
) -> Decoding[list[Spoken]]:
    """A reply for each code, all of which begin with ``begun``; ``new`` is what is unread of it."""
    forced, place = grammar.forced(place)
    begun = replace(begun, ids=begun.ids + tuple(forced))
    if grammar.at_end(place) or len(begun.ids) >= limit:
        return [begun] * len(codes)
    spot, logits = yield from read(begun.spot, (*new, *forced))
    fork = fork_at(logits[-1], spot, grammar, place, begun.ids, begun.score)

    def branch(choice: int, some: Codes) -> Decoding[list[Spoken]]:
        token = int(fork.tokens[choice])
        score = fork.score + float(fork.log_probabilities[choice])
        chosen = replace(fork, spot=None, chosen=choice)
        longer = Spoken(begun.ids, score, spot, (*begun.forks, chosen))
        if grammar.is_end(token):
            return [longer] * len(some)
        longer = replace(longer, ids=(*begun.ids, token))
        behind = grammar.allowed(place)[token]
        return (yield from _spread(longer, (token,), behind, grammar, limit, some))

    found = yield from together([branch(*one) for one in divided(fork.log_probabilities, codes)])
    return [reply for some in found for reply in some]


def divided(log_probabilities: Tensor, codes: Sequence[float]) -> Iterator[tuple[int, Codes]]:
    """The choices that codes fall on, each with its codes as numbers within its own share.

    Args:
        log_probabilities: of all choices, shape (choices,); together they have probability 1.
        codes: in ascending order.
    """
    sums = log_probabilities.cpu().double().exp().cumsum(-1)
    ends: list[float] = (sums / sums[-1]).tolist()
    fallen: dict[int, list[float]] = {}
    for code in codes:
        choice = bisect_right(ends, code)
        start = ends[choice - 1] if choice else 0.0
        within = (code - start) / (ends[choice] - start)
        fallen.setdefault(choice, []).append(min(within, _BELOW_ONE))
    for choice, some in fallen.items():
        yield choice, tuple(some)
