"""A stand-in for a hosted LLM: a local HTTP server that speaks its API and follows a script.

It lets the examples run without an account. Point the official client at its address:

    OpenAI(base_url=f"{llm.url}/v1", api_key="none")
    Anthropic(base_url=llm.url, api_key="none")

A script is a list of steps, one per request; each is a function from the latest tool results, as
text, to the tool calls to make next, or to the final answer.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple


class Call(NamedTuple):
    """A tool call the stand-in makes."""

    name: str
    arguments: dict[str, Any]


Step = Callable[[str], "list[Call] | str"]


@dataclass
class ScriptedLlm:
    """The server; use it as a context manager. ``requests`` holds what it was sent."""

    steps: Sequence[Step]
    requests: list[dict[str, Any]] = field(default_factory=list)

    def __enter__(self) -> ScriptedLlm:
        script = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                script.requests.append(request)
                body = json.dumps(_FORMS[self.path.rpartition("/v1/")[2]](script, request)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """Address of the server, without ``/v1``."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def _next(self, seen: Iterable[str]) -> tuple[int, list[Call] | str]:
        turn = len(self.requests) - 1
        return turn, self.steps[turn]("\n".join(seen))

    def chat_completion(self, request: dict[str, Any]) -> dict[str, Any]:
        """POST /v1/chat/completions."""
        messages = request["messages"]
        latest = _after_last(messages, lambda message: message["role"] == "assistant")
        turn, reply = self._next(_text(message["content"]) for message in latest)
        calls = [] if isinstance(reply, str) else reply
        message = {
            "role": "assistant",
            "content": reply if isinstance(reply, str) else None,
            "tool_calls": [
                {
                    "id": f"call_{turn}_{number}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
                }
                for number, call in enumerate(calls)
            ]
            or None,
        }
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "choices": [
                {
                    "index": 0,
                    "message": message,
                    "finish_reason": "tool_calls" if calls else "stop",
                    "logprobs": None,
                }
            ],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }

    def response(self, request: dict[str, Any]) -> dict[str, Any]:
        """POST /v1/responses; the whole conversation comes in ``input``."""
        items = request["input"] if isinstance(request["input"], list) else []
        outputs = _after_last(items, lambda item: item.get("type") == "function_call")
        turn, reply = self._next(_text(item.get("output")) for item in outputs)
        output: list[dict[str, Any]]
        if isinstance(reply, str):
            text = {"type": "output_text", "text": reply, "annotations": []}
            output = [_message(f"msg_{turn}", [text])]
        else:
            output = [
                {
                    "type": "function_call",
                    "id": f"fc_{turn}",
                    "call_id": f"call_{turn}_{number}",
                    "name": call.name,
                    "arguments": json.dumps(call.arguments),
                    "status": "completed",
                }
                for number, call in enumerate(reply)
            ]
        return {
            "id": f"resp_{turn}",
            "object": "response",
            "created_at": 0,
            "status": "completed",
            "model": request["model"],
            "output": output,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": request.get("tools", []),
            "usage": {
                "input_tokens": 1,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": 1,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": 2,
            },
        }

    def message(self, request: dict[str, Any]) -> dict[str, Any]:
        """POST /v1/messages."""
        messages = request["messages"]
        latest = messages[-1]["content"]
        blocks = latest if isinstance(latest, list) else []
        results = [block for block in blocks if block["type"] == "tool_result"]
        turn, reply = self._next(_text(block["content"]) for block in results)
        content: list[dict[str, Any]]
        if isinstance(reply, str):
            content = [{"type": "text", "text": reply}]
        else:
            content = [
                {
                    "type": "tool_use",
                    "id": f"toolu_{turn}_{number}",
                    "name": call.name,
                    "input": call.arguments,
                }
                for number, call in enumerate(reply)
            ]
        return {
            "id": f"msg_{turn}",
            "type": "message",
            "role": "assistant",
            "model": request["model"],
            "content": content,
            "stop_reason": "end_turn" if isinstance(reply, str) else "tool_use",
            "stop_sequence": None,
            "usage": {"input_tokens": 1, "output_tokens": 1},
        }


_FORMS: dict[str, Callable[[ScriptedLlm, dict[str, Any]], dict[str, Any]]] = {
    "chat/completions": ScriptedLlm.chat_completion,
    "responses": ScriptedLlm.response,
    "messages": ScriptedLlm.message,
}


def _message(identity: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "type": "message",
        "id": identity,
        "role": "assistant",
        "status": "completed",
        "content": content,
    }


def _after_last(items: list[Any], matches: Callable[[Any], bool]) -> list[Any]:
    """What follows the last item that matches."""
    last = max((n for n, item in enumerate(items) if matches(item)), default=-1)
    return items[last + 1 :]


def _text(content: Any) -> str:
    """The text of a string or of content blocks."""
    if isinstance(content, str):
        return content
    return "\n".join(block["text"] for block in content or () if "text" in block)
