"""Requests that no honest client sends, and moments at which a server is told to end."""

import asyncio
import contextlib
import json
import signal
import socket
import time

import anyio
import httpx2
import pytest
from sam4mllm_integrations.mcp_bodies import Bodies, BodyRefused, ClientGone
from sam4mllm_integrations.mcp_http import HttpSettings
from sam4mllm_integrations.mcp_serving import HttpServer, serve_http
from sam4mllm_integrations.mcp_tools import ToolServer
from sam4mllm_integrations.mcp_work import Limits
from test_integration_mcp import HELLO, over_http

from sam4mllm_tool.errors import InputError

ACCEPT = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}
PING = {"jsonrpc": "2.0", "id": 4, "method": "ping"}
MODERN = {"mcp-protocol-version": "2026-07-28", "mcp-method": "tools/call", "mcp-name": "x"}


def call(arguments, name="view_objects") -> dict:
    params = {"name": name, "arguments": arguments}
    return {"jsonrpc": "2.0", "id": 5, "method": "tools/call", "params": params}


def text(value) -> bytes:
    return json.dumps(value).encode()


DEEP = b"[" * 10_000 + b"]" * 10_000
BODIES = {
    "nothing": b"",
    "null": b"null",
    "a number": b"7",
    "an empty batch": b"[]",
    "a batch": text([PING, call({})]),
    "half": b'{"jsonrpc": "2.0", ',
    "not a number": b'{"jsonrpc": "2.0", "id": NaN, "method": "ping"}x',
    "nested 10,000 deep": DEEP,
    "nested in the arguments": text(call({"image": "?"})).replace(b'"?"', DEEP),
    "not UTF-8": b'{"jsonrpc": "2.0", "id": 1, "method": "\xff"}',
    "half a character": b'{"jsonrpc": "2.0", "id": 1, "method": "\\ud800"}',
    "UTF-16": json.dumps(PING).encode("utf-16"),
    "keys twice": b'{"jsonrpc": "2.0", "jsonrpc": "1.0", "id": 1, "method": "ping"}',
    "a huge id": b'{"jsonrpc": "2.0", "id": ' + b"9" * 5_000 + b', "method": "ping"}',
    "no method": b'{"jsonrpc": "2.0", "id": 5}',
    "a number for a method": b'{"jsonrpc": "2.0", "id": 5, "method": 5}',
    "an unknown method": b'{"jsonrpc": "2.0", "id": 5, "method": "no/such"}',
    "a list of params": b'{"jsonrpc": "2.0", "id": 5, "method": "tools/call", "params": [1]}',
    "no params": b'{"jsonrpc": "2.0", "id": 5, "method": "tools/call"}',
    "no name": text(call({}, None)),
    "no such tool": text(call({}, "x" * 100_000)),
    "a list of arguments": text(call([1])),
    "a picture that is a list": text(call({"image": [1]})),
    "a path with a NUL": text(call({"image": "a\0b"})),
    "a path of a megabyte": text(call({"image": "x" * 2**20})),
    "a strange _meta": text({**PING, "method": "tools/list", "params": {"_meta": 5}}),
    "a strange call id": text(
        {
            **PING,
            "method": "tools/call",
            "params": {"name": "view_objects", "_meta": {"sam4mllm/call-id": [1]}},
        }
    ),
    "a strange address": text({**PING, "method": "resources/read", "params": {"uri": "file:///x"}}),
}


def refusal(answer: httpx2.Response) -> str:
    """The message of an error, in whatever form it comes."""
    body = answer.text.strip()
    if answer.headers["content-type"].startswith("text/event-stream"):
        (data,) = [line[6:] for line in body.splitlines() if line.startswith("data: ")]
        body = data
    told = json.loads(body)
    if "error" in told:
        return told["error"]["message"]
    assert told["result"]["isError"], body[:300]
    return told["result"]["content"][0]["text"]


def session_of(client: httpx2.Client, url: str) -> dict[str, str]:
    opened = client.post(url, json=HELLO, headers=ACCEPT)
    return ACCEPT | {"mcp-session-id": opened.headers["mcp-session-id"]}


def test_whatever_is_posted_is_refused_in_one_line_and_the_session_lives(model, caplog):
    with over_http(lambda: model) as url, httpx2.Client(timeout=60) as client:
        session = session_of(client, url)
        for headers in (session, ACCEPT | MODERN):
            for name, body in BODIES.items():
                answer = client.post(url, content=body, headers=headers)
                assert answer.status_code < 500, name
                told = refusal(answer)
                assert told.strip() and "\n" not in told and len(told) < 500, (name, told)
                assert "Traceback" not in told and "pydantic" not in told, (name, told)
            assert client.post(url, json=PING, headers=session).status_code == 200
    assert "Traceback" not in caplog.text


def test_sessions_that_are_none_are_not_found_and_the_others_are_not_disturbed(model):
    with over_http(lambda: model) as url, httpx2.Client(timeout=60) as client:
        session = session_of(client, url)
        strange = ("f" * 32, "f" * 30_000, "../..", b"\xff\xfe")
        for name in strange:
            wrong = ACCEPT | {"mcp-session-id": name}
            for method in ("POST", "GET", "DELETE"):
                answer = client.request(method, url, headers=wrong, content=text(PING))
                assert answer.status_code == 404 and refusal(answer) == "Session not found"
        missing = client.post(url, json=PING, headers=ACCEPT)
        assert missing.status_code == 400 and "Missing session ID" in refusal(missing)
        assert client.post(url, json=PING, headers=session).status_code == 200


def test_beyond_the_bound_sessions_are_refused_with_a_time_to_come_again(model):
    with over_http(lambda: model, limits=Limits(clients=2)) as url, httpx2.Client() as client:
        first, _ = session_of(client, url), session_of(client, url)
        answer = client.post(url, json=HELLO, headers=ACCEPT)
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
        assert client.post(url, json=PING, headers=first).status_code == 200
        assert client.delete(url, headers=first).status_code == 200
        assert client.post(url, json=HELLO, headers=ACCEPT).status_code == 200


def test_a_client_that_leaves_amid_its_request_is_no_error_of_the_server(model, caplog):
    with over_http(lambda: model) as url:
        host, port = url.removeprefix("http://").removesuffix("/mcp").split(":")
        head = f"POST /mcp HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        head += "Accept: application/json, text/event-stream\r\nContent-Length: 500\r\n\r\n{"
        for _ in range(3):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(head.encode())
                time.sleep(0.05)
        assert httpx2.get(url.replace("/mcp", "/health")).text == "alive"
    assert "Error handling" not in caplog.text and "Traceback" not in caplog.text


# -- the bodies of all requests together -----------------------------------------------------------


def arriving(*parts: bytes):
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages[-1]["more_body"] = False

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    return receive


async def test_bodies_count_as_they_arrive_until_they_are_answered():
    bodies = Bodies(most_bytes=100, seconds=5)
    with bodies.one(arriving(b"a" * 30, b"b" * 30), announced=0) as first:
        await first()
        assert bodies.held == 30
        with bodies.one(arriving(b"c" * 40), announced=40) as second:
            assert bodies.held == 70
            await second()
            assert bodies.held == 70  # announced and arrived are the same bytes
            with pytest.raises(BodyRefused) as caught, bodies.one(arriving(b""), announced=31):
                pass
            assert caught.value.status == 503 and caught.value.headers["Retry-After"]
        await first()
        assert bodies.held == 60
        silent = arriving(b"d" * 41)  # says nothing of its size
        with bodies.one(silent, announced=0) as third, pytest.raises(BodyRefused):
            await third()
    assert bodies.held == 0


async def test_a_body_that_does_not_come_or_breaks_off():
    async def never():
        await anyio.sleep(60)

    bodies = Bodies(most_bytes=100, seconds=0.05)
    with bodies.one(never, announced=0) as receive:
        with pytest.raises(BodyRefused) as caught:
            await receive()
        assert caught.value.status == 408

    async def gone():
        return {"type": "http.disconnect"}

    with bodies.one(gone, announced=9) as receive, pytest.raises(ClientGone):
        await receive()
    with bodies.one(arriving(b"{}"), announced=0) as receive:
        await receive()
        assert (await receive())["type"] == "http.disconnect"  # of a complete request: told


# -- what an operator sees -------------------------------------------------------------------------


def test_with_log_each_call_is_a_line_on_standard_error(monkeypatch, capsys):
    from sam4mllm_integrations import mcp_watch

    monkeypatch.setattr(mcp_watch.logger, "handlers", [])
    monkeypatch.setattr(mcp_watch.logger, "propagate", True)
    level = mcp_watch.logger.level
    mcp_watch.log_calls()
    try:
        with mcp_watch.Watch({}).call("view_objects", "session 0123456789abcdef") as one:
            pass
    finally:
        mcp_watch.logger.setLevel(level)
    line = json.loads(capsys.readouterr().err)
    assert (line["tool"], line["outcome"]) == ("view_objects", "ok")
    assert line["request_id"] == one.request_id and line["client"] == "session 01234567"


# -- the end -------------------------------------------------------------------------------------


def test_a_second_sigterm_loses_no_call_and_a_second_interrupt_ends_at_once():
    server = HttpServer(ToolServer(lambda: None), HttpSettings())
    for _ in range(2):
        server.handle_exit(signal.SIGTERM, None)
        assert server._tools.draining and not server.should_exit and not server.force_exit
    server.handle_exit(signal.SIGINT, None)
    assert server.should_exit and server.force_exit


def test_a_port_that_is_taken_is_one_line_with_a_hint():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = HttpSettings(port=taken.getsockname()[1])
        with pytest.raises(InputError, match=f"port {settings.port}") as caught:
            serve_http(ToolServer(lambda: None), settings)
        assert "--port" in caught.value.hint


async def test_a_call_that_is_accepted_is_answered_whatever_the_number_of_signals(model):
    """SIGTERM again and again while a request is under way."""
    settings = HttpSettings(port=_free_port())
    tools = ToolServer(lambda: model)
    running = HttpServer(tools, settings)
    serving = asyncio.create_task(running._serve())  # the signals are sent by hand
    while not running.started:
        await anyio.sleep(0.01)
    url = f"http://127.0.0.1:{settings.port}/mcp"
    async with httpx2.AsyncClient(timeout=30) as client:
        opened = await client.post(url, json=HELLO, headers=ACCEPT)
        session = ACCEPT | {"mcp-session-id": opened.headers["mcp-session-id"]}

        async def slow():
            yield text(PING)[:9]
            for _ in range(3):
                running.handle_exit(signal.SIGTERM, None)
                await anyio.sleep(0.2)
            ready = await client.get(url.replace("/mcp", "/ready"))
            assert (ready.status_code, ready.json()["draining"]) == (503, True)
            yield text(PING)[9:]

        answer = await client.post(url, content=slow(), headers=session)
        assert answer.status_code == 200 and json.loads(answer.text.split("data: ")[1])["id"] == 4
        with anyio.fail_after(20):
            with contextlib.suppress(asyncio.CancelledError):
                await serving


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
