"""The SDK's refusals of whole requests, in one line each."""

from __future__ import annotations

import json

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

_NOT_JSON_RPC = "The body is not one JSON-RPC request, notification or response."
_SECONDS_UNTIL_ROOM = "5"


def plain_refusals(send: Send) -> Send:
    """``send``, with refusals that a client can show, and that say when to come again.

    Of a body that is not JSON-RPC the SDK tells what pydantic found missing in each of the four
    kinds of message, a dozen lines; of too many sessions it does not tell how long to wait.
    """
    held: Message | None = None

    async def send_plain(message: Message) -> None:
        nonlocal held
        if message["type"] == "http.response.start":
            if message["status"] == 400:
                held = message
                return
            if message["status"] == 503:
                MutableHeaders(scope=message).setdefault("retry-after", _SECONDS_UNTIL_ROOM)
        elif held is not None:
            body = _in_one_line(message.get("body", b""))
            if not message.get("more_body"):
                MutableHeaders(scope=held)["content-length"] = str(len(body))
                message = {**message, "body": body}
            start, held = held, None
            await send(start)
        await send(message)

    return send_plain


def _in_one_line(body: bytes) -> bytes:
    """A JSON-RPC error with one line for a message; any other body as it is."""
    try:
        answer = json.loads(body)
        message = str(answer["error"]["message"])
    except (ValueError, TypeError, KeyError):
        return body
    if "\n" not in message:
        return body
    answer["error"]["message"] = _NOT_JSON_RPC
    return json.dumps(answer).encode()
