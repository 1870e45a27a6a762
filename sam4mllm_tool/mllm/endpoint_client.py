"""Requests to an OpenAI-compatible server, and its errors as ours."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any, Literal

from sam4mllm_tool.concurrency import check_cancelled
from sam4mllm_tool.errors import EndpointError, ProbabilitiesMissing
from sam4mllm_tool.protocols import Dialogue
from sam4mllm_tool.types import RgbImage

try:
    import openai
    from openai.types.chat.chat_completion import Choice
except ImportError as missing:
    raise EndpointError(
        "talking to a server needs the openai client",
        hint="Install it: pip install 'sam4mllm-tool[openai]'.",
        retryable=False,
    ) from missing

ServerKind = Literal["vllm", "vllm-0.12", "vllm-guided", "sglang", "plain"]


@dataclass(frozen=True)
class Dialect:
    """What a kind of server can do beyond OpenAI's own parameters.

    Attributes:
        slots: all yes/no answers in one request (``allowed_token_ids``, ``logprob_token_ids``),
            and ``/tokenize``.
        continues: a reply can be continued (``continue_final_message``).
        regex_key: field that restricts the reply to a regular expression.
    """

    slots: bool
    continues: bool
    regex_key: str | None

    def constrained(self, pattern: str) -> dict[str, Any]:
        """Request fields that restrict the reply to a regular expression."""
        if self.regex_key == "structured_outputs":
            return {"structured_outputs": {"regex": pattern}}
        return {self.regex_key: pattern} if self.regex_key else {}


DIALECTS: dict[ServerKind, Dialect] = {
    "vllm": Dialect(slots=True, continues=True, regex_key="structured_outputs"),
    "vllm-0.12": Dialect(slots=False, continues=True, regex_key="structured_outputs"),
    "vllm-guided": Dialect(slots=False, continues=True, regex_key="guided_regex"),
    "sglang": Dialect(slots=False, continues=True, regex_key="regex"),
    "plain": Dialect(slots=False, continues=False, regex_key=None),
}


class ChatClient:
    """One model at one server. Safe from many threads.

    Args: as of :class:`~sam4mllm_tool.mllm.endpoint.OpenAIEndpointMllm`.

    Raises:
        EndpointError: the server cannot be reached, or does not serve ``model``.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None,
        *,
        api_key: str | None,
        server: ServerKind | None,
        timeout: float,
        retries: int,
    ) -> None:
        key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self.client = openai.OpenAI(
            base_url=base_url, api_key=key, max_retries=retries, timeout=timeout
        )
        served = self._served(model) if model is None or server is None else None
        self.model = model or (served.id if served else "")
        self.kind: ServerKind = server or _kind_of(served.owned_by if served else "")
        self.dialect = DIALECTS[self.kind]
        self.name = f"{self.model} at {base_url}"
        # vLLM's tokenizer is served in its root.
        self._root = base_url.rstrip("/").removesuffix("/v1")
        self._data_uri = lru_cache(maxsize=16)(_data_uri)

    def close(self) -> None:
        """Close the pooled connections."""
        self.client.close()

    def ask(
        self,
        image: RgbImage,
        dialogue: Dialogue,
        *,
        begun: str = "",
        extra_body: dict[str, Any] | None = None,
        **options: Any,
    ) -> Sequence[Choice]:
        """One request for chat completions; ``begun`` is the beginning of the reply.

        Raises:
            CallCancelled: the current call is no longer wanted.
            EndpointError, ProbabilitiesMissing: the server fails or refuses.
        """
        check_cancelled()
        messages = self._messages(image, dialogue)
        fields = dict(extra_body or {})
        if begun:
            if not self.dialect.continues:
                raise EndpointError(
                    f"{self.name} did not answer with yes or no alone, and this kind of server "
                    "cannot continue a reply from there",
                    hint="Serve the model with vLLM or SGLang, or ask about one point at a time.",
                    retryable=False,
                )
            messages.append({"role": "assistant", "content": begun})
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

    def tokenize(self, request: dict[str, Any]) -> dict[str, Any]:
        """vLLM's ``/tokenize`` for a prompt or for messages.

        Raises:
            EndpointError: the server does not answer it.
        """
        body = {"model": self.model, **request}
        try:
            with _typed_errors(self.name):
                answer = self.client.with_options(base_url=self._root).post(
                    "/tokenize", cast_to=object, body=body
                )
        except EndpointError as error:
            raise EndpointError(
                f"{self.name} does not answer /tokenize: {error.message}",
                hint=f"The address is {self._root}/tokenize; server='vllm-0.12' works without it.",
                retryable=error.retryable,
            ) from error
        return answer if isinstance(answer, dict) else {}

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
    """PNG, so that the server sees the same pixels."""
    buffer = BytesIO()
    image.pil.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


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
