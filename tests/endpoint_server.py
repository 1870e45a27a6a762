"""A small OpenAI-compatible server over the local engine, with true log-probabilities.

It understands what vLLM 0.33 understands beyond OpenAI's fields, as its ``ChatCompletionRequest``,
``SamplingParams`` and ``Sampler`` have it: ``continue_final_message``, ``structured_outputs``,
``ignore_eos``, ``min_tokens``, ``add_special_tokens`` (false by default: the start token is the
template's business), ``allowed_token_ids`` (a mask on what may be said), ``logprob_token_ids``
(all of these, and the token said, in ``top_logprobs``; at most 128; ``logprobs`` must be true),
``return_tokens_as_token_ids``; log-probabilities are those of before any mask. ``/tokenize`` lies
in its root. It can be set to misbehave in each of these.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import regex
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sam4mllm_tool.grammar import Grammar
from sam4mllm_tool.images.loading import load_image
from sam4mllm_tool.mllm.encoding import Encoded
from sam4mllm_tool.mllm.engine import Spot
from sam4mllm_tool.mllm.local import LocalMllm
from sam4mllm_tool.protocols import Dialogue, Turn
from sam4mllm_tool.types import RgbImage


@dataclass
class Manners:
    """How the server behaves; a test changes it as it likes."""

    owner: str = "vllm"
    logprobs: bool = True
    failures: int = 0  # so many requests are answered with 503 first
    status: int | None = None
    delay: float = 0.0
    keep_to_regex: bool = True
    likely: tuple[str, ...] = ()  # tokens that take the likeliest one's place in a new reply
    ignored: frozenset[str] = frozenset()  # fields that it does not look at
    processed: bool = False  # log-probabilities of after the mask (--logprobs-mode)
    other_ids: bool = False  # top_logprobs of other tokens than asked for
    value: float | None = None  # takes the place of every log-probability in top_logprobs
    tokenizes: bool = True
    longest: int = 100_000  # it says no more tokens than that
    thought: str = ""  # what the model thinks before each free reply
    apart: bool = False  # thoughts are given apart, as with --reasoning-parser
    requests: list[dict[str, Any]] = field(default_factory=list)
    tokenized: list[dict[str, Any]] = field(default_factory=list)
    active: int = 0
    most_active: int = 0


class TestServer:
    """Chat completions by a :class:`LocalMllm`."""

    __test__ = False

    def __init__(self, mllm: LocalMllm) -> None:
        self.mllm = mllm
        self.manners = Manners()
        # Regexes whose grammar is known are kept to token by token as the local engine does;
        # by a regex alone there are several ways to cut the same text into tokens.
        self.grammars: dict[str, Grammar] = {}
        encoder = mllm.encoder
        self.texts = [encoder.decode_continuation([i]) for i in range(len(encoder.tokenizer))]
        for end in mllm.end_ids:
            self.texts[end] = ""
        self.app = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/tokenize", self.tokenize, methods=["POST"]),
            ]
        )

    async def models(self, request: Request) -> JSONResponse:
        entry = {"id": "tiny", "object": "model", "created": 0, "owned_by": self.manners.owner}
        return JSONResponse({"object": "list", "data": [entry]})

    async def chat(self, request: Request) -> JSONResponse:
        manners, body = self.manners, await request.json()
        manners.requests.append(body)
        if manners.failures:
            manners.failures -= 1
            return JSONResponse({"error": {"message": "busy"}}, status_code=503)
        if manners.status:
            return JSONResponse({"error": {"message": "no"}}, status_code=manners.status)
        if refusal := self._refusal(body):
            return JSONResponse({"error": {"message": refusal}}, status_code=400)
        body = {name: value for name, value in body.items() if name not in manners.ignored}
        answer = await run_in_threadpool(self._answer, body)
        return Response(json.dumps(answer), media_type="application/json")  # NaN and all

    async def tokenize(self, request: Request) -> JSONResponse:
        body = await request.json()
        self.manners.tokenized.append(body)
        if not self.manners.tokenizes:
            return JSONResponse({"detail": "Not Found"}, status_code=404)
        tokenizer = self.mllm.encoder.tokenizer
        if "prompt" in body:
            text, add = body["prompt"], body.get("add_special_tokens", True)
        else:
            text = self.mllm.encoder.processor.apply_chat_template(
                [
                    {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]}
                    for m in body["messages"]
                ],
                add_generation_prompt=True,
                tokenize=False,
            )
            add = body.get("add_special_tokens", False)
        ids = tokenizer(text, add_special_tokens=add)["input_ids"]
        return JSONResponse({"count": len(ids), "max_model_len": 4096, "tokens": ids})

    def _refusal(self, body: dict[str, Any]) -> str:
        """What vLLM's validators say to a request that makes no sense."""
        asked = body.get("logprob_token_ids")
        if asked is not None and not body.get("logprobs"):
            return "when using `logprob_token_ids`, `logprobs` must be set to true."
        for name in ("logprob_token_ids", "allowed_token_ids"):
            ids = body.get(name)
            if ids is not None and (not ids or not all(0 <= i < len(self.texts) for i in ids)):
                return f"{name} is empty or contains out-of-vocab token ids"
        if asked is not None and (len(asked) > 128 or body.get("top_logprobs")):
            return "logprob_token_ids: too many, or together with top_logprobs"
        return ""

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        manners = self.manners
        manners.active += 1
        manners.most_active = max(manners.most_active, manners.active)
        time.sleep(manners.delay)
        try:
            choices = [
                self._choice(body, i, torch.Generator().manual_seed(body.get("seed", 0) + i))
                for i in range(body.get("n", 1))
            ]
        finally:
            manners.active -= 1
        return {
            "id": "x", "object": "chat.completion", "created": 0, "model": "tiny",
            "choices": choices, "usage": {"prompt_tokens": 0, "completion_tokens": 0,
                                          "total_tokens": 0},
        }  # fmt: skip

    def _choice(self, body: dict[str, Any], index: int, dice: torch.Generator) -> dict[str, Any]:
        turns, image = _read_messages(body["messages"])
        continued = ""
        if body.get("continue_final_message"):
            assert body.get("add_generation_prompt") is False
            continued = turns.pop().text
        engine, encoder = self.mllm.engine, self.mllm.encoder
        spot = self._start(image, tuple(turns), body)
        pattern = (body.get("structured_outputs") or {}).get("regex")
        pattern = pattern if self.manners.keep_to_regex else None
        grammar = self.mllm._grammar(self.grammars[pattern]) if pattern in self.grammars else None
        place = grammar.start if grammar else None
        ends, read = set(self.mllm.end_ids), encoder.encode_continuation(continued)
        content, entries = "", []
        ids = list(read)
        free = not continued and not body.get("allowed_token_ids") and self.manners.thought
        thought = encoder.encode_continuation(self.manners.thought) if free else []
        while len(entries) < min(body["max_tokens"], self.manners.longest):
            spot, logits = engine.read(spot, ids, 1)
            scores = raw = logits[-1].log_softmax(-1)
            if not continued and len(entries) < len(self.manners.likely):
                favourite = self.texts.index(self.manners.likely[len(entries)])
                scores = scores.index_fill(0, torch.tensor([favourite]), 9.0).log_softmax(-1)
                raw = scores
            if body.get("allowed_token_ids"):
                scores = _only(scores, body["allowed_token_ids"]).log_softmax(-1)
                raw = scores if self.manners.processed else raw
            if grammar is not None:
                scores = _only(scores, grammar.allowed(place)).log_softmax(-1)
            elif pattern is not None:
                scores = self._masked(scores, pattern, content, ends).log_softmax(-1)
            if body.get("temperature", 1.0) == 0:
                token = int(scores.argmax())
            else:
                token = int(torch.multinomial(scores.exp(), 1, generator=dice))
            if len(entries) < len(thought):
                token = thought[len(entries)]
            shown = raw if body.get("allowed_token_ids") else scores
            entries.append(self._entry(shown, token, body))
            place = grammar.allowed(place)[token] if grammar else None
            if token in ends and not body.get("ignore_eos"):
                break
            content += self.texts[token]
            ids = [token]
        logprobs = {"content": entries} if body.get("logprobs") and self.manners.logprobs else None
        message = {"role": "assistant", "content": content}
        if self.manners.apart:
            reasoning, close, answer = content.partition("</think>")
            message |= {"reasoning": reasoning, "content": answer if close else None}
        return {"index": index, "finish_reason": "stop", "message": message, "logprobs": logprobs}

    def _masked(
        self, scores: torch.Tensor, pattern: str, said: str, ends: set[int]
    ) -> torch.Tensor:
        whole = regex.compile(pattern)

        def fits(i: int) -> bool:
            if i in ends:
                return whole.fullmatch(said) is not None
            text = self.texts[i]
            return bool(text) and whole.fullmatch(said + text, partial=True) is not None

        return _only(scores, [i for i in range(len(self.texts)) if fits(i)])

    def _start(self, image: RgbImage, dialogue: Dialogue, body: dict[str, Any]) -> Spot:
        """The prompt as vLLM makes it: no start token but the template's, unless asked for."""
        encoded, inputs = self.mllm._encoded(image, dialogue)
        encoder = self.mllm.encoder
        start = encoder.tokenizer("", add_special_tokens=True)["input_ids"]
        written = encoder._render(dialogue).startswith(encoder.tokenizer.bos_token or "\0")
        ids, end = encoded.ids, encoded.image_end
        if body.get("add_special_tokens") and written:
            ids, end = (*start, *ids), end + len(start)
        if not body.get("add_special_tokens") and not written:
            ids, end = ids[len(start) :], end - len(start)
        return self.mllm.engine.open(image.digest, Encoded(ids, end), inputs)

    def _entry(self, scores: torch.Tensor, token: int, body: dict[str, Any]) -> dict[str, Any]:
        by_id = body.get("return_tokens_as_token_ids")

        def one(i: int, value: float | None = None) -> dict[str, Any]:
            text = self.texts[i] if i < len(self.texts) else ""
            logprob = max(float(scores[i]), -9999.0) if value is None else value
            return {"token": f"token_id:{i}" if by_id else text, "bytes": None, "logprob": logprob}

        top = body.get("top_logprobs") or 0
        best = scores.topk(min(top, len(scores))).indices.tolist() if top else []
        if asked := body.get("logprob_token_ids"):
            best = list(dict.fromkeys([token, *asked]))
            best = [i + 1 for i in best] if self.manners.other_ids else best
        return {**one(token), "top_logprobs": [one(i, self.manners.value) for i in best]}


def _only(scores: torch.Tensor, allowed: Iterable[int]) -> torch.Tensor:
    kept = torch.full_like(scores, -torch.inf)
    tokens = list(allowed)
    kept[tokens] = scores[tokens]
    return kept


def _read_messages(messages: list[dict[str, Any]]) -> tuple[list[Turn], Any]:
    turns, image = [], None
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            assert [part["type"] for part in content] == ["image_url", "text"]
            uri = content[0]["image_url"]["url"]
            assert uri.startswith("data:image/png;base64,")
            image = load_image(base64.b64decode(uri.partition(",")[2])).image
            content = content[1]["text"]
        turns.append(Turn(message["role"], content))
    return turns, image


@contextmanager
def running(server: TestServer) -> Iterator[str]:
    """Serve on a free port of the loopback; gives the base URL."""
    config = uvicorn.Config(server.app, host="127.0.0.1", port=0, log_level="error")
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    while not runner.started:
        time.sleep(0.01)
    port = runner.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/v1"
    runner.should_exit = True
    thread.join(10)
