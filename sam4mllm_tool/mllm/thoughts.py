"""Thinking models: a thought is generated to its end before the answer is read.

Two kinds are published. The chat template opens the thought (Qwen3-VL-Thinking: the generation
prompt ends with ``<think>`` and a line break), or the model opens it itself, with its first token
(GLM-4.1V-Thinking) or behind a line break (GLM-4.6V). Either closes it with ``</think>``, after
which come line breaks, with GLM also ``<answer>``, and then the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sam4mllm_tool.errors import ThoughtCutOff
from sam4mllm_tool.mllm.encoding import DialogueEncoder
from sam4mllm_tool.mllm.reading import Decoding, Spot, read

OPEN, CLOSE, ANSWER = "<think>", "</think>", "<answer>"
_LEAD = 8


@dataclass(frozen=True)
class Thinking:
    """How one checkpoint thinks.

    Attributes:
        open, close: ids of ``<think>`` and ``</think>``.
        budget: tokens that a thought may take; 0 closes it at once.
    """

    encoder: DialogueEncoder
    open: int
    close: int
    budget: int

    def is_open(self, ids: Sequence[int]) -> bool:
        """Whether a prompt ends inside a thought: at ``<think>``, or line breaks behind it."""
        for token in reversed(ids):
            if token == self.open:
                return True
            if not self._is_blank(token):
                return False
        return False

    def leads(self, token: int) -> bool:
        """Whether a reply that begins with this token may be a thought."""
        return token == self.open or self._is_blank(token)

    def opened(self, spot: Spot) -> Decoding[Spot | None]:
        """The place after the ``<think>`` that the model writes at ``spot``, with the line breaks
        before it; ``None`` if it writes none.
        """
        for _ in range(_LEAD):
            after, logits = yield from read(spot, ())
            token = int(logits[-1].argmax())
            spot = replace(after, unread=(token,))
            if not self._is_blank(token):
                return spot if token == self.open else None
        return None

    def past(self, spot: Spot, end_ids: Sequence[int]) -> Decoding[Spot]:
        """The place where the answer begins, after the end of the thought that is open at ``spot``.

        Raises:
            ThoughtCutOff: the budget is spent, or the turn ended, before the thought was closed.
        """
        if self.budget == 0:
            closing = self.encoder.encode_continuation(f"\n{CLOSE}\n\n")
            return replace(spot, unread=(*spot.unread, *closing))
        ids: list[int] = []
        while not ids or ids[-1] != self.close:
            after, logits = yield from read(spot, ids[-1:])
            token = int(logits[-1].argmax())
            if token in end_ids or len(ids) == self.budget:
                thought = self.encoder.decode_continuation(ids)
                raise ThoughtCutOff(raw_reply=f"{OPEN}{thought}", budget=len(ids))
            ids.append(token)
            spot = after
        return (yield from self._lead(replace(spot, unread=(self.close,))))

    def _lead(self, spot: Spot) -> Decoding[Spot]:
        """The place after the line breaks and tags that the model writes before its answer."""
        answer = self.encoder.encode_continuation(ANSWER)
        for _ in range(_LEAD):
            after, logits = yield from read(spot, ())
            token = int(logits[-1].argmax())
            if token == answer[0]:
                return replace(after, unread=tuple(answer))
            if not self._is_blank(token):
                break
            spot = replace(after, unread=(token,))
        return spot

    def _is_blank(self, token: int) -> bool:
        """Whether a token is white space alone."""
        text = self.encoder.decode_continuation([token])
        return bool(text) and text.isspace()


def thinking_of(encoder: DialogueEncoder, budget: int) -> Thinking | None:
    """How a checkpoint thinks, ``None`` if its vocabulary has no tokens for it."""
    marks = [encoder.encode_continuation(mark) for mark in (OPEN, CLOSE)]
    if any(len(ids) != 1 for ids in marks):
        return None
    return Thinking(encoder, marks[0][0], marks[1][0], budget)
