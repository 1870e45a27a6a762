"""An MLLM behind an OpenAI-compatible server: vLLM, SGLang, or any other.

The official client sends the requests (retries with backoff, timeouts, pooled connections); this
module turns dialogues into requests and token log-probabilities into answers. See
``docs/endpoint.md`` for how to start a server.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from sam4mllm_tool.concurrency import call_each
from sam4mllm_tool.errors import DialogueError, EndpointError, ProbabilitiesMissing, ThoughtCutOff
from sam4mllm_tool.formats import DialogueFormat
from sam4mllm_tool.grammar import Grammar, grammar_regex
from sam4mllm_tool.mllm.endpoint_check import (
    CLOSE,
    OPEN,
    PROBE,
    PROBE_DIALOGUE,
    Examiner,
    Served,
)
from sam4mllm_tool.mllm.endpoint_client import ChatClient, ServerKind
from sam4mllm_tool.mllm.endpoint_slots import SlotTokens, likeliest_slot, read_after, read_slots
from sam4mllm_tool.protocols import NO_NOTES, Dialogue, Question, Reply, YesNoWords
from sam4mllm_tool.types import RgbImage, YesNo

LONGEST_REPLY = 1024
_SIDE_BY_SIDE = 8
"""Requests of one call that are under way at a time."""


class OpenAIEndpointMllm:
    """Dialogues about images through ``/v1/chat/completions``. Thread-safe.

    Args:
        base_url: up to and including ``/v1``.
        model: name at the server; ``None`` takes the first one it lists.
        format_name: dialogue format of the served checkpoint.
        api_key: sent as bearer token; ``None`` takes ``OPENAI_API_KEY`` of the environment, if any
            (local servers take anything).
        server: which extra fields the server knows; ``None`` asks it (``owned_by`` of its model).
        timeout: seconds for one request, connecting included.
        retries: on timeouts, lost connections and statuses 408, 409, 429 and 5xx, with
            exponential backoff.
        top_logprobs: likeliest tokens per slot, among which yes and no are found where the
            server cannot be asked for just these; 20 is the most that vLLM gives unless started
            with a larger ``--max-logprobs``.
        thought_budget: tokens that a thinking model may think before it answers.

    Raises:
        EndpointError: the server cannot be reached, or does not serve ``model``.
    """

    notes = NO_NOTES  # a server has no notes about its checkpoint
    own_format: DialogueFormat | None = None

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        *,
        format_name: str = "generic",
        api_key: str | None = None,
        server: ServerKind | None = None,
        timeout: float = 120.0,
        retries: int = 4,
        top_logprobs: int = 20,
        thought_budget: int = 4096,
    ) -> None:
        self.client = ChatClient(
            base_url, model, api_key=api_key, server=server, timeout=timeout, retries=retries
        )
        self.model, self.server, self.name = self.client.model, self.client.kind, self.client.name
        self.format_name = format_name
        self.top_logprobs = top_logprobs
        self.thought_budget = thought_budget
        self._examiner = Examiner(self.client.tokenize, self.name)
        self._once = threading.RLock()
        self._served_once = lru_cache(maxsize=1)(self._examine_template)
        self._tokens_once = lru_cache(maxsize=8)(self._examine_slots)

    def close(self) -> None:
        """Close the pooled connections."""
        self.client.close()

    def generate(
        self,
        image: RgbImage,
        dialogue: Dialogue,
        *,
        grammar: Grammar | None = None,
        max_new_tokens: int = 256,
    ) -> Reply:
        """Greedy reply to the last user turn.

        The grammar is enforced by servers that can; the reply is checked here in any case.
        ``log_probability`` is the sum of the server's log-probabilities, which vLLM renormalises
        over what the grammar allows; ``None`` where the server cannot enforce it or returns none.

        Raises:
            ThoughtCutOff: the model thought for longer than it may.
            DialogueError: the reply is not one of the grammar's.
            EndpointError: see the class.
        """
        return self._replies(image, dialogue, grammar, max_new_tokens)[0]

    def alternates(
        self, image: RgbImage, dialogue: Dialogue, *, grammar: Grammar, count: int
    ) -> list[Reply]:
        """The greedy reply, then up to ``count - 1`` different ones, sampled with a fixed seed and
        sorted by probability. (The local engine searches for them instead.)
        """
        greedy = self.generate(image, dialogue, grammar=grammar, max_new_tokens=LONGEST_REPLY)
        if count < 2:
            return [greedy]
        sampled = self._replies(
            image, dialogue, grammar, LONGEST_REPLY, n=2 * count, temperature=1.0, seed=0
        )
        different = {reply.text: reply for reply in sampled if reply.text != greedy.text}
        ranked = sorted(different.values(), key=lambda r: -(r.log_probability or -math.inf))
        return [greedy, *ranked[: count - 1]]

    def sample(
        self, image: RgbImage, dialogue: Dialogue, *, grammar: Grammar, count: int
    ) -> list[Reply]:
        """``count`` replies at temperature 1 with a fixed seed, in one request. Raises as
        :meth:`generate`.
        """
        return self._replies(
            image, dialogue, grammar, LONGEST_REPLY, n=count, temperature=1.0, seed=0
        )

    def answer_yes_no(
        self, image: RgbImage, dialogue: Dialogue, *, words: YesNoWords, count: int
    ) -> list[YesNo]:
        """Answers to the last user turn's ``count`` questions, given in one reply.

        vLLM is asked for all of them in one request: only yes and no are allowed, and their
        probabilities at each slot are those over the whole vocabulary. Other servers let the model
        answer freely; where it answers anything but yes and no, the reply is continued from there
        with the likelier word, and spellings outside the ``top_logprobs`` likeliest tokens count as
        probability 0.

        Raises:
            ThoughtCutOff: the model thought for longer than it may.
            ProbabilitiesMissing: the server gives no token probabilities.
            EndpointError: the server ignores a field, or a reply must be continued and the server
                cannot; see also the class.
        """
        if count < 1:
            return []
        if not self.client.dialect.slots:
            return self._answer_freely(image, dialogue, words, count)
        tokens = self._tokens(words)
        if self._served().thinks:
            return self._answer_after_thought(image, dialogue, tokens, count)
        content = self._content(image, dialogue, "", tokens.request(count))
        return read_slots(content, tokens, count, self.name)

    def answer_each(self, questions: Sequence[Question], *, words: YesNoWords) -> list[list[YesNo]]:
        """:meth:`answer_yes_no` of each: one request first, after which the server has the picture
        in its prefix cache, then the others side by side. Raises as it does.
        """

        def answers(one: Question) -> list[YesNo]:
            return self.answer_yes_no(one.image, one.dialogue, words=words, count=one.count)

        first, others = questions[:1], questions[1:]
        return [*map(answers, first), *call_each(answers, others, _SIDE_BY_SIDE)]

    # --- the self-test on first use -------------------------------------------------------------

    def _served(self) -> Served:
        if not self.client.dialect.slots:
            return Served(add_start=False, thinks=False)
        with self._once:
            return self._served_once()

    def _examine_template(self) -> Served:
        served = self._examiner.served()
        if served.close is not None and not served.thinks:
            choice = self.client.ask(
                PROBE, PROBE_DIALOGUE, extra_body=_start(served), max_tokens=4, logprobs=True
            )[0]
            content = choice.logprobs.content if choice.logprobs else None
            served = replace(served, thinks=self._examiner.opens_thought(content))
        if self.format_name == "sam4mllm" and not served.thinks:
            self._examiner.check_template()
        return served

    def _tokens(self, words: YesNoWords) -> SlotTokens:
        with self._once:
            return self._tokens_once(words)

    def _examine_slots(self, words: YesNoWords) -> SlotTokens:
        tokens = self._examiner.slot_tokens(words)
        content = self._content(PROBE, PROBE_DIALOGUE, "", tokens.request(2))
        self._examiner.check_slots(content, tokens, 2)
        return tokens

    # --- requests ---------------------------------------------------------------------------------

    def _content(
        self, image: RgbImage, dialogue: Dialogue, begun: str, request: dict[str, Any]
    ) -> Sequence[Any]:
        """The tokens of one reply, with their log-probabilities and alternatives."""
        fields = {**request.pop("extra_body", {}), **_start(self._served())}
        choice = self.client.ask(image, dialogue, begun=begun, extra_body=fields, **request)[0]
        return (choice.logprobs.content if choice.logprobs else None) or []

    def _answer_after_thought(
        self, image: RgbImage, dialogue: Dialogue, tokens: SlotTokens, count: int
    ) -> list[YesNo]:
        if count > 1:
            raise EndpointError(
                f"{self.name} thinks before it answers, and can be asked one question at a time",
                hint="Use the dialogue format of this model family, which asks about one point.",
                retryable=False,
            )
        request = tokens.request(1) | {"max_tokens": self.thought_budget + 16}
        fields = request["extra_body"]
        del fields["allowed_token_ids"], fields["ignore_eos"], fields["min_tokens"]
        content = self._content(image, dialogue, "", request)
        return [read_after(self._served().close, content, tokens, self.name)]

    def _answer_freely(
        self, image: RgbImage, dialogue: Dialogue, words: YesNoWords, count: int
    ) -> list[YesNo]:
        answers: list[YesNo] = []
        begun = ""
        while len(answers) < count:
            for token in self._likeliest(image, dialogue, begun, count - len(answers)):
                answer, word = likeliest_slot(token.top_logprobs, words, self.name)
                answers.append(answer)
                begun += word
                if word != token.token or len(answers) == count:
                    break
        return answers

    def _likeliest(
        self, image: RgbImage, dialogue: Dialogue, begun: str, count: int
    ) -> Sequence[Any]:
        """The next tokens of a reply that begins with ``begun``, with likely alternatives."""
        # `ignore_eos`: a model that would stop early must answer the remaining questions too.
        extra = {"ignore_eos": True} if self.client.dialect.continues else {}
        options = {"max_tokens": count, "logprobs": True, "top_logprobs": self.top_logprobs}
        content = self._content(image, dialogue, begun, options | {"extra_body": extra})
        if not content or not content[0].top_logprobs:
            raise ProbabilitiesMissing(
                f"{self.name} returns no token probabilities",
                hint="Serve the model with vLLM or SGLang, which answer logprobs and top_logprobs; "
                "transformers' own server ignores both.",
            )
        return content

    def _replies(
        self,
        image: RgbImage,
        dialogue: Dialogue,
        grammar: Grammar | None,
        max_tokens: int,
        **sampling: Any,
    ) -> list[Reply]:
        pattern = grammar_regex(grammar) if grammar is not None else None
        extra = self.client.dialect.constrained(pattern) if pattern else {}
        served = self._served()
        choices = self.client.ask(
            image,
            dialogue,
            extra_body=extra | _start(served),
            max_tokens=max_tokens + (self.thought_budget if served.thinks else 0),
            logprobs=True,
            **sampling,
        )
        replies = []
        for choice in choices:
            text = self._without_thought(choice.message, served.thinks)
            tokens = _behind_thought((choice.logprobs.content if choice.logprobs else None) or [])
            if pattern is not None:
                text = self._checked(text, pattern)
            scored = tokens and (pattern is None or extra)
            score = math.fsum(token.logprob for token in tokens) if scored else None
            replies.append(Reply(text, score, len(tokens), 0))
        return replies

    def _without_thought(self, message: Any, thinks: bool) -> str:
        """The answer alone: servers give thoughts apart, or before it up to ``</think>``.

        Raises:
            ThoughtCutOff: there is a thought and no answer.
        """
        thought = getattr(message, "reasoning", None) or getattr(message, "reasoning_content", None)
        text: str = message.content or ""
        if CLOSE in text:
            thought, _, text = text.rpartition(CLOSE)
        elif text.lstrip().startswith(OPEN) or (thinks and not thought):
            raise ThoughtCutOff(raw_reply=text, budget=self.thought_budget)
        if thought and not text.strip():
            raise ThoughtCutOff(raw_reply=str(thought), budget=self.thought_budget)
        return text.lstrip() if thought else text

    def _checked(self, text: str, pattern: str) -> str:
        """The reply, which must fit the grammar if the server can enforce one.

        Other servers may reply with anything that a format's reader accepts.
        """
        key = self.client.dialect.regex_key
        if key is None or re.fullmatch(pattern, text):
            return text
        raise DialogueError(
            f"{self.name} did not keep to the reply's form",
            raw_reply=text,
            hint=f"This server does not enforce {key!r}; give server='vllm-guided' for vLLM before "
            "0.12, or server='plain'.",
        )


def _start(served: Served) -> dict[str, Any]:
    """The start token, where the served template leaves it to the tokenizer."""
    return {"add_special_tokens": True} if served.add_start else {}


def _behind_thought(tokens: Sequence[Any]) -> Sequence[Any]:
    """The tokens behind the last ``</think>``."""
    closes = [index for index, token in enumerate(tokens) if token.token == CLOSE]
    return tokens[closes[-1] + 1 :] if closes else tokens
