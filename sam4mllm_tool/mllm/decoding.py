"""Greedy decoding, alternates and yes/no answers over an engine's passes.

Each is a :data:`~sam4mllm_tool.mllm.reading.Decoding`: it yields the reads it needs and continues
with their logits. Several of them can share a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from sam4mllm_tool.mllm.grammar_tokens import Place, TokenGrammar, YesNoTokens
from sam4mllm_tool.mllm.reading import Decoding, Spot, read, together
from sam4mllm_tool.types import YesNo

_JACOBI_PASSES = 8
"""Passes over all slots after which answers are read one by one: they depend on each other."""


Leads = Callable[[int], bool]
"""Whether a reply that begins with this token may be a thought."""


def no_lead(token: int) -> bool:
    """No token leads to a thought."""
    return False


@dataclass(frozen=True, eq=False)
class Fork:
    """A free choice in a reply, with its alternatives.

    Attributes:
        spot: the place after which the choice was made, everything read (``None`` if it was
            not kept).
        tokens, log_probabilities: the allowed tokens, and their probabilities among themselves.
        place: where the reply was in its grammar.
        chosen: index of the token that was chosen.
        before: the reply's ids before the choice.
        score: sum of log-probabilities before the choice.
    """

    spot: Spot | None
    place: Place
    tokens: Tensor
    log_probabilities: Tensor
    chosen: int
    before: tuple[int, ...]
    score: float


@dataclass(frozen=True, eq=False)
class Spoken:
    """A reply as tokens, without the end-of-turn token.

    Attributes:
        spot: the last place the model has read to.
        forks: the free choices, in order.
    """

    ids: tuple[int, ...]
    score: float
    spot: Spot
    forks: tuple[Fork, ...] = field(default=(), repr=False)


def speak_freely(
    spot: Spot, end_ids: Sequence[int], limit: int, leads: Leads = no_lead
) -> Decoding[Spoken | None]:
    """Greedy reply without a grammar, up to ``limit`` tokens.

    ``None`` if its first token leads to a thought.
    """
    ids: list[int] = []
    score = 0.0
    new: tuple[int, ...] = ()
    while len(ids) < limit:
        spot, logits = yield from read(spot, new)
        token = int(logits[-1].argmax())
        if not ids and leads(token):
            return None
        score += float(logits[-1].log_softmax(-1)[token])
        if token in end_ids:
            break
        ids.append(token)
        new = (token,)
    return Spoken(tuple(ids), score, spot)


def speak(
    spot: Spot, grammar: TokenGrammar, limit: int, start: Fork | None = None, choice: int = 0
) -> Decoding[Spoken]:
    """Greedy reply within a grammar; forced tokens are read in the same pass as the next free one.

    Args:
        spot: the end of the dialogue.
        grammar: what the reply may be.
        limit: most tokens of the reply, forced ones included.
        start: a choice of an earlier reply; the new reply takes another option there …
        choice: … namely this one of its tokens.
    """
    ids: list[int] = []
    forks: list[Fork] = []
    score, place = 0.0, grammar.start
    new: list[int] = []
    if start is not None and start.spot is not None:
        token = int(start.tokens[choice])
        score = start.score + float(start.log_probabilities[choice])
        if grammar.is_end(token):
            return Spoken(start.before, score, start.spot)
        # Everything before the choice was read for the earlier reply: only the new tail is read.
        spot, place = start.spot, grammar.allowed(start.place)[token]
        ids, new = [*start.before, token], [token]
    while True:
        # Only a free token costs a pass. `new` holds what was decided since the last pass: the
        # token chosen there, and the brackets and commas that follow it by the grammar.
        forced, place = grammar.forced(place)
        ids += forced
        new += forced
        if grammar.at_end(place) or len(ids) >= limit:
            return Spoken(tuple(ids), score, spot, tuple(forks))
        spot, logits = yield from read(spot, new)
        fork = fork_at(logits[-1], spot, grammar, place, tuple(ids), score)
        forks.append(fork)
        token = int(fork.tokens[fork.chosen])
        score += float(fork.log_probabilities[fork.chosen])
        if grammar.is_end(token):
            return Spoken(tuple(ids), score, spot, tuple(forks))
        place = grammar.allowed(place)[token]
        ids.append(token)
        new = [token]


def speak_alternates(
    spot: Spot, grammar: TokenGrammar, limit: int, count: int
) -> Decoding[list[Spoken]]:
    """The greedy reply, then others that differ from it at one choice and are greedy afterwards.

    A full beam search would read every reply from its beginning; these share everything before
    their choice. Of a choice between numbers only the peaks are taken: a neighbour of a likely
    coordinate gives nearly the same box.
    """
    greedy = yield from speak(spot, grammar, limit)
    found = {greedy.ids: greedy}
    ways = iter(other_ways(greedy.forks, grammar, count))
    while some := list(islice(ways, max(0, count - len(found)))):
        others = yield from together(
            [speak(spot, grammar, limit, fork, choice) for _, fork, choice in some]
        )
        for other in others:
            found.setdefault(other.ids, other)
    rest = [reply for reply in found.values() if reply is not greedy]
    return [greedy, *sorted(rest, key=lambda reply: -reply.score)]


def answer_slots(
    spot: Spot, tokens: YesNoTokens, count: int, can_cut: bool, leads: Leads = no_lead
) -> Decoding[tuple[list[YesNo], Spot] | None]:
    """Answer ``count`` slots as greedy decoding would, several slots per pass (Jacobi iteration).

    ``None`` if the model would begin with a token that leads to a thought.

    All answers are guessed and read at once. Why the result is exact: slot i's logits depend only
    on the tokens before it. If all answers before slot i were guessed right, its logits are those
    of one-by-one decoding, whatever was guessed after it. So the answers are final up to and
    including the first slot that was guessed wrong (its own answer is known from this pass). From
    there it continues with better guesses, and each pass settles at least one slot.

    After Santilli et al., "Accelerating Transformer Inference for Translation via Parallel
    Decoding" (2023, arXiv 2305.10427).
    """
    guesser = _Guesser(tokens, count)
    answers = guesser.first_guess()  # the first `settled` of them are final
    rows: list[Tensor] = []
    start, settled, passes = 0, 0, 0  # `spot` has read the first `start` answers
    while settled < count:
        # A cache that cannot be cut must not read guesses before the question was kept.
        one_by_one = passes >= _JACOBI_PASSES or (not can_cut and passes == 0)
        # The answers before `end` are read: settled ones that `spot` has not read, then guesses.
        # The logits after the question or an answer decide the next slot, so slots `settled` to
        # `end` come out of this pass.
        end = settled if one_by_one else count - 1
        keep = end + 1 - settled
        after, logits = yield from read(spot, answers[start:end], keep)
        if settled == 0 and leads(int(logits[0].argmax())):
            return None
        picks = guesser.see(settled, answers, logits)
        guessed = answers[settled:end]
        right = next((i for i, guess in enumerate(guessed) if guess != picks[i]), len(guessed))
        rows.append(logits[: right + 1])
        answers[settled : settled + right + 1] = picks[: right + 1]
        settled += right + 1
        if settled - 1 == end:  # every answer that was read is final
            spot, start = after, end
        elif can_cut:  # drop what was read from the first wrong guess on
            spot = after.cut(len(after.ids) - (end - (settled - 1)))
            start = settled - 1
        # Else `spot` stays: the next pass reads the settled answers again, and then new guesses.
        guesser.guess(settled, answers)
        passes += 1
    probabilities = torch.cat(rows).softmax(-1)
    p_yes = probabilities[:, list(tokens.yes)].sum(-1).tolist()
    p_no = probabilities[:, list(tokens.no)].sum(-1).tolist()
    return [YesNo(y, n) for y, n in zip(p_yes, p_no, strict=True)], spot


class _Guesser:
    """Guesses answers from the margins that the slots had in earlier passes.

    A slot's margin (yes over no, in logits) is remembered for either answer in the slot before.
    Where it was seen after the other answer only, it is corrected by the mean effect of the answer
    before, over all slots of the pass: a model often tends to repeat, or to alternate. A guess
    never changes a result, only the number of passes.
    """

    def __init__(self, tokens: YesNoTokens, count: int) -> None:
        self._yes, self._no = list(tokens.yes), list(tokens.no)
        self._margins: list[dict[bool, float]] = [{} for _ in range(count)]
        self._effect = 0.0

    def first_guess(self) -> list[int]:
        """Yes and no in an irregular order: each follows either, so the effect can be estimated."""
        mixture = (int(slot * 0.618034) % 2 for slot in range(len(self._margins)))
        return [self._no[0] if odd else self._yes[0] for odd in mixture]

    def see(self, first: int, answers: Sequence[int], logits: Tensor) -> list[int]:
        """Remember a pass, return its picks; row ``i`` is slot ``first + i`` after ``answers``."""
        yes, no = logits[:, self._yes].max(-1), logits[:, self._no].max(-1)
        margins = (yes.values - no.values).tolist()
        after: dict[bool, list[float]] = {True: [], False: []}
        for slot, margin in enumerate(margins, first):
            before = slot > 0 and answers[slot - 1] in self._yes
            self._margins[slot][before] = margin
            if slot > 0:
                after[before].append(margin)
        if after[True] and after[False]:
            means = {before: sum(some) / len(some) for before, some in after.items()}
            self._effect = means[True] - means[False]
        rows = zip(margins, yes.indices.tolist(), no.indices.tolist(), strict=True)
        return [self._yes[y] if margin >= 0 else self._no[n] for margin, y, n in rows]

    def guess(self, first: int, answers: list[int]) -> None:
        """Guess the answers from slot ``first`` on, each from the one before it."""
        for slot in range(first, len(answers)):
            before = answers[slot - 1] in self._yes
            seen = self._margins[slot]
            if before in seen:
                margin = seen[before]
            else:
                margin = seen.get(not before, 0.0) + (self._effect if before else -self._effect)
            answers[slot] = self._yes[0] if margin >= 0 else self._no[0]


def fork_at(
    logits: Tensor, spot: Spot, grammar: TokenGrammar, place: Place, before: tuple[int, ...],
    score: float,
) -> Fork:  # fmt: skip
    """The choice after ``spot``, the likeliest option chosen."""
    tokens = torch.tensor(list(grammar.allowed(place)), device=logits.device)
    among = logits[tokens].log_softmax(-1)
    return Fork(spot, place, tokens, among, int(among.argmax()), before, score)


def other_ways(
    forks: Iterable[Fork], grammar: TokenGrammar, count: int
) -> list[tuple[float, Fork, int]]:
    """The likeliest other choices: (score up to and with it, fork, index of the token)."""
    ways = []
    for fork in forks:
        likely = grammar.peaks(fork.tokens, fork.log_probabilities)
        likely[fork.chosen] = -torch.inf
        for value, choice in zip(*likely.topk(min(count, len(likely))), strict=True):
            if torch.isfinite(value):
                ways.append((fork.score + float(value), fork, int(choice)))
    return sorted(ways, key=lambda way: -way[0])
