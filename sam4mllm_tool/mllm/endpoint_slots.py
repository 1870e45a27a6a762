"""Yes and no in the token probabilities of a server's reply, and whether those can be believed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sam4mllm_tool.errors import EndpointError, ProbabilitiesMissing, ThoughtCutOff
from sam4mllm_tool.protocols import YesNoWords
from sam4mllm_tool.types import YesNo

_ROUNDING = 1e-3
_ID = "token_id:"
_LEAD = 8


@dataclass(frozen=True)
class SlotTokens:
    """Ids of the single tokens that say yes and no in the served model's vocabulary."""

    yes: frozenset[int]
    no: frozenset[int]

    @property
    def both(self) -> list[int]:
        """All of them, ascending."""
        return sorted(self.yes | self.no)

    def request(self, count: int) -> dict[str, Any]:
        """Fields by which vLLM answers ``count`` slots in one request.

        ``allowed_token_ids`` allows only yes and no, and ``logprob_token_ids`` gives the
        log-probabilities of just these tokens at each slot, of the model's raw distribution over
        the whole vocabulary (vLLM's default ``--logprobs-mode raw_logprobs``).
        """
        return {
            "max_tokens": count,
            "logprobs": True,
            "extra_body": {
                "min_tokens": count,
                "ignore_eos": True,
                "allowed_token_ids": self.both,
                "logprob_token_ids": self.both,
                "return_tokens_as_token_ids": True,
            },
        }


def read_slots(content: Sequence[Any], tokens: SlotTokens, count: int, name: str) -> list[YesNo]:
    """Full-vocabulary probabilities of yes and no at each of ``count`` slots.

    Args:
        content: the reply's ``logprobs.content``: the token chosen at each slot, with the
            log-probabilities of the requested tokens.
        tokens: what was requested.
        count: how many slots.
        name: the server, for errors.

    Raises:
        ProbabilitiesMissing: the server gives no log-probabilities, or not those requested.
        EndpointError: what it gives cannot be probabilities, or other tokens were chosen.
    """
    if not content:
        raise ProbabilitiesMissing(
            f"{name} returns no token probabilities",
            hint="It ignores the field 'logprobs'. Serve the model with vLLM.",
        )
    if len(content) != count:
        raise EndpointError(
            f"{name} answered {len(content)} of {count} questions",
            hint="It ignores the field 'min_tokens' or 'ignore_eos'.",
            retryable=False,
        )
    return [_read_slot(slot, tokens, name) for slot in content]


def _read_slot(slot: Any, tokens: SlotTokens, name: str) -> YesNo:
    chosen = token_id(slot.token)
    if chosen is None:
        raise EndpointError(
            f"{name} names the token {slot.token!r} by its text",
            hint="It ignores the field 'return_tokens_as_token_ids'; server='vllm-0.12' does "
            "without it.",
            retryable=False,
        )
    answer = _requested(slot, tokens, name)
    if chosen not in tokens.both:
        raise EndpointError(
            f"{name} chose token {chosen}, which is neither yes nor no",
            hint="It ignores the field 'allowed_token_ids'; serve the model with vLLM.",
            retryable=False,
        )
    return answer


def _requested(slot: Any, tokens: SlotTokens, name: str) -> YesNo:
    found = {token_id(option.token): option.logprob for option in slot.top_logprobs}
    missing = [token for token in tokens.both if token not in found]
    if missing:
        raise ProbabilitiesMissing(
            f"{name} gives no probability for token {missing[0]}",
            hint="It ignores the field 'logprob_token_ids', as vLLM did until mid-2026; "
            "server='vllm-0.12' works without it.",
        )
    return chances((found[i] for i in tokens.yes), (found[i] for i in tokens.no), name)


def read_after(close: int | None, content: Sequence[Any], tokens: SlotTokens, name: str) -> YesNo:
    """Probabilities of yes and no where the answer begins: at the first word behind a thought.

    The slot of yes or no comes a few tokens at most (line breaks, ``<answer>``) after
    ``</think>``.

    Raises:
        ThoughtCutOff: the thought was not closed, or no yes or no follows it.
        ProbabilitiesMissing, EndpointError: as of :func:`read_slots`.
    """
    ids = [token_id(slot.token) for slot in content]
    behind = [i for i, token in enumerate(ids) if token is not None and token == close]
    answer = content[behind[-1] + 1 :] if behind else []
    named = [slot for slot in answer[:_LEAD] if token_id(slot.token) in tokens.both]
    if not named:
        raise ThoughtCutOff(raw_reply=" ".join(slot.token for slot in content), budget=len(content))
    return _requested(named[0], tokens, name)


def chances(yes: Iterable[float], no: Iterable[float], name: str) -> YesNo:
    """Log-probabilities of the spellings of yes and of no → their sums as probabilities.

    Raises:
        EndpointError: they are no probabilities (NaN, above 1).
    """
    p_yes, p_no = (math.fsum(math.exp(p) for p in logs) for logs in (list(yes), list(no)))
    if not 0 <= p_yes + p_no <= 1 + _ROUNDING:  # NaN fails every comparison
        raise EndpointError(
            f"{name} gives {p_yes:.3g} for yes and {p_no:.3g} for no, which are not probabilities",
            hint="The served weights overflow or are damaged (try --dtype float32), or the server "
            "was not started with --logprobs-mode raw_logprobs.",
            retryable=False,
        )
    return YesNo(min(p_yes, 1.0), min(p_no, 1.0))


def likeliest_slot(options: Sequence[Any], words: YesNoWords, name: str) -> tuple[YesNo, str]:
    """Probabilities of yes and no among the likeliest tokens of a slot, read by their text, and
    the likelier one in its likeliest spelling.
    """
    yes, no = spellings(words.yes), spellings(words.no)
    found: Mapping[str, float] = {o.token: o.logprob for o in options if o.token in yes | no}
    sums = chances(
        (found[t] for t in found if t in yes), (found[t] for t in found if t in no), name
    )
    return sums, max(found, key=lambda token: found[token], default=words.no[0])


@lru_cache(maxsize=64)
def spellings(words: tuple[str, ...]) -> frozenset[str]:
    """Each word in the cases and with the space that a token may have."""
    cased = {form for w in words for form in (w, w.capitalize(), w.lower(), w.upper())}
    return frozenset(cased | {f" {form.strip()}" for form in cased})


def token_id(token: str) -> int | None:
    """The id in ``token_id:1234``, as vLLM writes tokens on request."""
    digits = token.removeprefix(_ID)
    return int(digits) if token.startswith(_ID) and digits.isdigit() else None
