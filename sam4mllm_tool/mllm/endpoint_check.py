"""A test of what a server does with a prompt, on first use, against what the formats need.

Everything here is asked once per connection, with a picture of a few pixels. vLLM's ``/tokenize``
(in its root, not under ``/v1``) tells how the served tokenizer and chat template see a text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from sam4mllm_tool.errors import EndpointError, ProbabilitiesMissing
from sam4mllm_tool.mllm.endpoint_slots import SlotTokens, read_slots, spellings
from sam4mllm_tool.protocols import Dialogue, Turn, YesNoWords
from sam4mllm_tool.types import RgbImage

Tokenize = Callable[[dict[str, Any]], dict[str, Any]]
"""A request to ``/tokenize`` without the model's name → its answer."""

OPEN, CLOSE = "<think>", "</think>"
_SURE = 1 - 1e-5
_ASKED = Turn("user", "What is in this picture?")
_REPLY = "[281,251,863,999]"
PROBE = RgbImage.from_pil(Image.new("RGB", (56, 56), (200, 120, 40)))
"""A small picture; what is in it does not matter."""
PROBE_DIALOGUE: Dialogue = (_ASKED,)


@dataclass(frozen=True)
class Served:
    """What the served tokenizer and chat template make of a dialogue.

    Attributes:
        add_start: the template does not write the tokenizer's start token, so the server must.
        thinks: a thought comes before each answer.
        close: id of ``</think>``, ``None`` if it or ``<think>`` is not one token.
    """

    add_start: bool
    thinks: bool
    close: int | None = None


class Examiner:
    """Asks a server's tokenizer.

    Args:
        tokenize: see :data:`Tokenize`.
        name: the server, for errors.
    """

    def __init__(self, tokenize: Tokenize, name: str) -> None:
        self._tokenize, self._name = tokenize, name

    def served(self) -> Served:
        """Start token and thoughts of the served chat template.

        A model may open its thoughts itself, even if the template opens none.

        Raises:
            EndpointError: the server does not answer ``/tokenize``.
        """
        bare, whole = (
            self._ids({"prompt": "a", "add_special_tokens": add}) for add in (False, True)
        )
        start = whole[: whole.index(bare[0])]
        prompt = self._chat([_ASKED])
        lacks_start = bool(start) and prompt[: len(start)] != start
        marks = [self._ids({"prompt": mark, "add_special_tokens": False}) for mark in (OPEN, CLOSE)]
        if any(len(ids) != 1 for ids in marks):
            return Served(lacks_start, thinks=False)
        opens, closes = marks[0][0], marks[1][0]
        return Served(lacks_start, opens in prompt[-3:], closes)

    def check_template(self) -> None:
        """Make sure that an earlier reply is written where a new reply would begin.

        SAM4MLLM's replies begin directly after the generation prompt. A template that writes
        something between the two (llava-hf's newline before every text) shows the model another
        dialogue than it was trained in.

        Raises:
            EndpointError: it does not.
        """
        prompt = self._chat([_ASKED])
        past = self._chat([_ASKED, Turn("assistant", _REPLY), _ASKED])
        reply = self._continuation(_REPLY)
        if past[: len(prompt) + len(reply)] != prompt + reply:
            raise EndpointError(
                f"the chat template that {self._name} serves writes an earlier reply elsewhere "
                "than where replies begin",
                hint="Serve the adapter's own template: --chat-template chat_template.jinja, the "
                "file beside the adapter.",
                retryable=False,
            )

    def opens_thought(self, content: Any) -> bool:
        """Whether a reply's first tokens open a thought, line breaks before it left out."""
        return "".join(slot.token for slot in content or ()).lstrip().startswith(OPEN)

    def slot_tokens(self, words: YesNoWords) -> SlotTokens:
        """All spellings of yes and no that are one token in the middle of a reply.

        Raises:
            EndpointError: one of them has none, or a token says both.
        """
        yes, no = (self._single(spellings) for spellings in (words.yes, words.no))
        if not yes or not no or yes & no:
            raise EndpointError(
                f"the tokenizer that {self._name} serves does not write {words.yes[0]!r} "
                f"and {words.no[0]!r} as one token each",
                hint="Choose a format whose words are single tokens in this model's vocabulary.",
                retryable=False,
            )
        return SlotTokens(yes, no)

    def check_slots(self, content: Any, tokens: SlotTokens, count: int) -> None:
        """Check the answer to a question that is not about yes or no.

        Raises:
            ProbabilitiesMissing, EndpointError: with the field that the server ignores.
        """
        answers = read_slots(content, tokens, count, self._name)
        if all(p_yes + p_no > _SURE for p_yes, p_no in answers):
            raise ProbabilitiesMissing(
                f"{self._name} gives probabilities among the allowed tokens only, not of the whole "
                "vocabulary",
                hint="Start vLLM with --logprobs-mode raw_logprobs, its default.",
            )

    def _single(self, words: tuple[str, ...]) -> frozenset[int]:
        found = (self._continuation(text) for text in sorted(spellings(words)))
        return frozenset(ids[0] for ids in found if len(ids) == 1)

    def _continuation(self, text: str) -> list[int]:
        """Ids of a text as they come in the middle of a reply."""
        anchor = self._ids({"prompt": "0", "add_special_tokens": False})
        ids = self._ids({"prompt": "0" + text, "add_special_tokens": False})
        if ids[: len(anchor)] == anchor:
            return ids[len(anchor) :]
        return self._ids({"prompt": text, "add_special_tokens": False})

    def _chat(self, turns: list[Turn]) -> list[int]:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        return self._ids({"messages": messages, "add_special_tokens": False})

    def _ids(self, request: dict[str, Any]) -> list[int]:
        tokens = self._tokenize(request).get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise EndpointError(
                f"{self._name} answers /tokenize without a list of ids: {json.dumps(tokens)[:80]}",
                hint="server='vllm-0.12' and server='plain' do without it.",
                retryable=False,
            )
        return tokens
