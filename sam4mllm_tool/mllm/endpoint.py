"""An MLLM behind an OpenAI-compatible server: vLLM, SGLang, or any other.

The official client does the talking (retries with backoff, timeouts, pooled connections); this
module turns dialogues into requests and token log-probabilities into answers. See
``docs/endpoint.md`` for how to start a server.
"""

from __future__ import annotations

import base64
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any, Literal

from sam4mllm_tool.concurrency import check_cancelled
from sam4mllm_tool.errors import DialogueError, EndpointError, ProbabilitiesMissing
from sam4mllm_tool.formats import DialogueFormat
from sam4mllm_tool.grammar import Grammar, grammar_regex
from sam4mllm_tool.protocols import NO_NOTES, Dialogue, Reply, YesNoWords
from sam4mllm_tool.types import RgbImage, YesNo

try:
    import openai
    from openai.types.chat.chat_completion import Choice
    from openai.types.chat.chat_completion_token_logprob import (
        ChatCompletionTokenLogprob,
        TopLogprob,
    )
except ImportError as missing:
    raise EndpointError(
        "talking to a server needs the openai client",
        hint="Install it: pip install 'sam4mllm-tool[openai]'.",
        retryable=False,
    ) from missing

LONGEST_REPLY = 1024
ServerKind = Literal["vllm", "vllm-guided", "sglang", "plain"]


@dataclass(frozen=True)
class _Dialect:
    """What a kind of server can do beyond OpenAI's own parameters."""

    continues: bool
    regex_key: str | None

    def constrained(self, pattern: str) -> dict[str, Any]:
        """Request fields that restrict the reply to a regular expression."""
        if self.regex_key == "structured_outputs":
            return {"structured_outputs": {"regex": pattern}}
        return {self.regex_key: pattern} if self.regex_key else {}


_DIALECTS: dict[ServerKind, _Dialect] = {
    "vllm": _Dialect(continues=True, regex_key="structured_outputs"),
    "vllm-guided": _Dialect(continues=True, regex_key="guided_regex"),  # before vLLM 0.12
    "sglang": _Dialect(continues=True, regex_key="regex"),
    "plain": _Dialect(continues=False, regex_key=None),
}


class OpenAIEndpointMllm:
    """Holds dialogues about images through ``/v1/chat/completions``. Safe from many threads.

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
        top_logprobs: likeliest tokens a slot among which yes and no are looked for; 20 is the most
            that vLLM gives unless started with a larger ``--max-logprobs``.

    Raises:
        EndpointError: the server cannot be reached, or does not serve ``model``.
    """

    notes = NO_NOTES  # a server does not say what it serves
    own_format: DialogueFormat | None = None  # a server does not tell what it serves

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
    ) -> None:
        key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self.client = openai.OpenAI(
            base_url=base_url, api_key=key, max_retries=retries, timeout=timeout
        )
        served = self._served(model) if model is None or server is None else None
        self.model = model or (served.id if served else "")
        self.server: ServerKind = server or _kind_of(served.owned_by if served else "")
        self.name = f"{self.model} at {base_url}"
        self.format_name = format_name
        self.top_logprobs = top_logprobs
        self._dialect = _DIALECTS[self.server]
        self._data_uri = lru_cache(maxsize=16)(_data_uri)

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
        over what the grammar allows; ``None`` where the server cannot enforce it or tells none.

        Raises:
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

    def answer_yes_no(
        self, image: RgbImage, dialogue: Dialogue, *, words: YesNoWords, count: int
    ) -> list[YesNo]:
        """Answers to the last user turn's ``count`` questions, given in one reply.

        The model answers freely, and each token's likeliest spelling of yes or no counts. As long
        as that is what the model said, one request holds all answers; where it said anything else,
        the reply is continued from there with the right word. Spellings outside the
        ``top_logprobs`` likeliest tokens count as probability 0.

        Raises:
            ProbabilitiesMissing: the server gives no token probabilities.
            EndpointError: a reply must be continued and the server cannot; see also the class.
        """
        answers: list[YesNo] = []
        said = ""
        while len(answers) < count:
            wanted = count - len(answers) + (2 if not said and words.prefix else 0)
            for token in self._tokens(image, dialogue, said, wanted):
                if _leads_to(said + token.token, words.prefix) and not answers:
                    said += token.token
                    continue
                if len(said) < len(words.prefix) and self._dialect.continues:
                    said = words.prefix  # it left the prefix out: start again behind it
                    break
                answer, word = _read_slot(token.top_logprobs, words)
                answers.append(answer)
                said += word
                if word != token.token or len(answers) == count:
                    break
        return answers

    def _tokens(
        self, image: RgbImage, dialogue: Dialogue, said: str, count: int
    ) -> list[ChatCompletionTokenLogprob]:
        """The next tokens of a reply that begins with ``said``, with their alternatives."""
        # A model that would stop early is made to go on: the missing answers are asked for anyway.
        extra = {"ignore_eos": True} if self._dialect.continues else {}
        options = {"max_tokens": count, "logprobs": True, "top_logprobs": self.top_logprobs}
        choice = self._ask(image, dialogue, said=said, extra=extra, **options)[0]
        content = choice.logprobs.content if choice.logprobs else None
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
        extra = self._dialect.constrained(pattern) if pattern else {}
        choices = self._ask(
            image, dialogue, extra=extra, max_tokens=max_tokens, logprobs=True, **sampling
        )
        replies = []
        for choice in choices:
            text = choice.message.content or ""
            tokens = (choice.logprobs.content if choice.logprobs else None) or []
            if pattern is not None:
                text = self._checked(text, pattern)
            scored = tokens and (pattern is None or extra)
            score = math.fsum(token.logprob for token in tokens) if scored else None
            replies.append(Reply(text, score, len(tokens), 0))
        return replies

    def _checked(self, text: str, pattern: str) -> str:
        """The reply if it fits the grammar; a newline that the server cut off is put back.

        Servers that cannot enforce a grammar may say anything that a format's reader accepts.
        """
        for whole in (text, f"\n{text}"):
            if re.fullmatch(pattern, whole):
                return whole
        if self._dialect.regex_key is None:
            return text
        raise DialogueError(
            f"{self.name} did not keep to the reply's form",
            raw_reply=text,
            hint=f"This server does not enforce {self._dialect.regex_key!r}; give "
            "server='vllm-guided' for vLLM before 0.12, or server='plain'.",
        )

    def _ask(
        self,
        image: RgbImage,
        dialogue: Dialogue,
        *,
        said: str = "",
        extra: dict[str, Any] | None = None,
        **options: Any,
    ) -> Sequence[Choice]:
        """One request; ``said`` is the beginning of the reply, to be continued."""
        check_cancelled()
        messages = self._messages(image, dialogue)
        fields = dict(extra or {})
        if said:
            if not self._dialect.continues:
                raise EndpointError(
                    f"{self.name} did not answer with yes or no alone, and this kind of server "
                    "cannot be told to go on from there",
                    hint="Serve the model with vLLM or SGLang, or ask about one point at a time.",
                    retryable=False,
                )
            messages.append({"role": "assistant", "content": said})
            fields |= {"continue_final_message": True, "add_generation_prompt": False}
        with _typed_errors(self.name):
            answer = self.client.chat.completions.create(
                model=self.model,
                messages=messages,  # type: ignore[arg-type]
                extra_body=fields,
                **{"temperature": 0.0, **options},
            )
        if not answer.choices:
            raise EndpointError(f"{self.name} answered without a reply", hint="Try again.")
        return answer.choices

    def _messages(self, image: RgbImage, dialogue: Dialogue) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        shown = False
        for turn in dialogue:
            content: Any = turn.text
            if turn.role == "user" and not shown:
                shown = True
                picture = {"type": "image_url", "image_url": {"url": self._data_uri(image)}}
                content = [picture, {"type": "text", "text": turn.text}]
            messages.append({"role": turn.role, "content": content})
        return messages

    def _served(self, model: str | None) -> Any:
        """The server's entry for the model, or its first one."""
        with _typed_errors(str(self.client.base_url)):
            listed = list(self.client.models.list().data)
        found = next((entry for entry in listed if model in (None, entry.id)), None)
        if found is None:
            names = ", ".join(entry.id for entry in listed) or "nothing"
            raise EndpointError(
                f"{self.client.base_url} does not serve {model!r}",
                hint=f"It serves {names}.",
                retryable=False,
            )
        return found


def _kind_of(owner: str) -> ServerKind:
    kinds: dict[str, ServerKind] = {"vllm": "vllm", "sglang": "sglang"}
    return kinds.get(owner, "plain")


def _data_uri(image: RgbImage) -> str:
    """PNG, so that the server sees the very pixels."""
    buffer = BytesIO()
    image.pil.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _leads_to(said: str, prefix: str) -> bool:
    """Whether what was said so far is (the beginning of) the prefix before the first answer."""
    return bool(prefix) and prefix.startswith(said)


def _read_slot(options: Sequence[TopLogprob], words: YesNoWords) -> tuple[YesNo, str]:
    """Probabilities of yes and no, and the likelier one in its likeliest spelling."""
    yes, no = _spellings(words.yes), _spellings(words.no)
    p_yes = math.fsum(math.exp(o.logprob) for o in options if o.token in yes)
    p_no = math.fsum(math.exp(o.logprob) for o in options if o.token in no)
    named = [option for option in options if option.token in yes | no]
    best = max(named, key=lambda option: option.logprob, default=None)
    return YesNo(min(p_yes, 1.0), min(p_no, 1.0)), best.token if best else words.no[0]


@lru_cache(maxsize=64)
def _spellings(words: tuple[str, ...]) -> frozenset[str]:
    """Each word in the cases and with the space that a token may have."""
    cased = {form for w in words for form in (w, w.capitalize(), w.lower(), w.upper())}
    return frozenset(cased | {f" {form.strip()}" for form in cased})


@contextmanager
def _typed_errors(name: str) -> Iterator[None]:
    """The client's errors as ours. It has already retried what is worth retrying."""
    try:
        yield
    except openai.APITimeoutError as error:
        raise EndpointError(
            f"{name} did not answer in time", hint="Give more time (timeout=…), or try later."
        ) from error
    except openai.APIConnectionError as error:
        raise EndpointError(
            f"{name} cannot be reached: {error.__cause__ or error}",
            hint="Check that the server runs and that its address ends in /v1.",
        ) from error
    except openai.APIStatusError as error:
        if error.status_code == 400 and "logprob" in str(error):
            raise ProbabilitiesMissing(
                f"{name} refuses to give token probabilities: {error.message}",
                hint="Ask for fewer (top_logprobs=…), or start vLLM with a larger --max-logprobs.",
            ) from error
        busy = error.status_code in (408, 409, 429) or error.status_code >= 500
        raise EndpointError(
            f"{name} answered {error.status_code}: {error.message}",
            hint="Try again later." if busy else "See docs/endpoint.md for how to serve a model.",
            retryable=busy,
        ) from error
    except openai.APIError as error:
        raise EndpointError(
            f"{name} sent an answer that is not a chat completion: {error}",
            hint="Check that the address is that of an OpenAI-compatible server.",
            retryable=False,
        ) from error
