"""The MCP server under many clients: identity, queues, deadlines, limits, and its end."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import anyio
import httpx2
import pytest
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client
from sam4mllm_integrations.mcp_credentials import Credentials, read_tokens
from sam4mllm_integrations.mcp_work import FairQueue, Limits, deadline
from test_integration_mcp import ERAS, HELLO, RED, EndlessMllm, over_http

from benchmarks.load import all_clients
from benchmarks.load_server import free_port, server
from sam4mllm_tool.errors import Busy, CallTimeout, InputError
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.testing import ColourSegmenter, TruthfulMllm

HERE = Path(__file__).parent
ROOT = HERE.parent


@asynccontextmanager
async def client_with(url: str, era: str = "auto", **headers: str):
    async with (
        httpx2.AsyncClient(headers=headers, timeout=60) as http,
        Client(streamable_http_client(url, http_client=http), mode=era) as client,
    ):
        yield client


def busy(error: MCPError) -> bool:
    data = error.error.data
    return data["error"] == "Busy" and data["retryable"] and data["retry_after"] > 0


async def segment(client: Client, path, expression="the red block") -> str:
    result = await client.call_tool(
        "segment_object", {"image": str(path), "expression": expression}
    )
    return result.structured_content["objects"][0]["object_id"]


# -- many at once --------------------------------------------------------------------------------


@pytest.mark.parametrize("era", ["legacy", "auto"])
def test_nothing_is_lost_or_crossed_between_clients(era):
    """The short form of ``python -m benchmarks.load``: more clients than once had room."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.load", "--serve", str(port), "--clients", "40"]
    with server([*command, "--think", "0"], port) as (url, _):
        tally, results = anyio.run(all_clients, url, 40, 4, era, True)
    assert dict(tally.outcomes) == {"ok": 160}, tally.examples
    assert len({json.dumps(one) for one in results}) == 40


# -- identity ------------------------------------------------------------------------------------


@ERAS
async def test_clients_beyond_the_bound_are_refused_and_none_is_forgotten(era, model, blocks_file):
    limits = Limits(clients=2)
    options = {"allow_dirs": [blocks_file.parent], "limits": limits}
    with over_http(lambda: model, **options) as url:
        async with client_with(url, era) as first, client_with(url, era) as second:
            handles = [await segment(first, blocks_file), await segment(second, blocks_file)]
            with pytest.raises((MCPError, Exception)) as refused:
                async with client_with(url, era) as third:
                    await segment(third, blocks_file)
            error = _the_error(refused.value)
            assert era == "legacy" or busy(error)
            for one, handle in zip((first, second), handles, strict=True):
                assert not (await one.call_tool("view_objects", {"object_ids": [handle]})).is_error


def _the_error(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def test_an_invented_cookie_opens_no_workspace(model, blocks_file):
    with over_http(lambda: model, allow_dirs=[blocks_file.parent]) as url:
        async with client_with(url) as victim:
            handle = await segment(victim, blocks_file)
            for cookie in ("a", "a.b", "x" * 200, "", "sam4mllm.é"):
                async with client_with(
                    url, "2026-07-28", Cookie=f"sam4mllm_client={cookie}".encode()
                ) as guest:
                    told = await guest.call_tool("view_objects", {"object_ids": [handle]})
                    assert told.is_error


def test_a_cookie_is_bound_to_the_key_that_signed_it():
    ours, theirs = Credentials(), Credentials()
    cookie = ours.new_cookie()
    name = cookie.partition(".")[0]
    assert ours.name_in(cookie) == name
    assert theirs.name_in(cookie) is None
    for forged in (name, f"{name}.", f"{name}x{cookie[len(name) :]}", cookie[:-1], f"é.{cookie}"):
        assert ours.name_in(forged) is None
    assert len({ours.new_cookie() for _ in range(100)}) == 100


@ERAS
async def test_a_users_handles_belong_to_the_token(era, model, blocks_file):
    users = {"alice": "token-of-alice", "bob": "token-of-bob"}
    with over_http(lambda: model, allow_dirs=[blocks_file.parent], users=users) as url:
        alice = {"Authorization": "Bearer token-of-alice"}
        async with client_with(url, era, **alice) as one:
            handle = await segment(one, blocks_file)
        async with client_with(url, era, **alice) as again:
            assert not (await again.call_tool("view_objects", {"object_ids": [handle]})).is_error
        async with client_with(url, era, Authorization="bearer token-of-bob") as other:
            assert (await other.call_tool("view_objects", {"object_ids": [handle]})).is_error
        for wrong in ("Bearer token-of-carol", "Bearer", "token-of-alice", "Basic token-of-bob"):
            assert httpx2.post(url, json={}, headers={"Authorization": wrong}).status_code == 401


async def test_another_users_session_id_is_not_found(model):
    users = {"alice": "token-of-alice", "bob": "token-of-bob"}
    accept = {"Accept": "application/json, text/event-stream"}
    with over_http(lambda: model, users=users) as url:
        headers = accept | {"Authorization": "Bearer token-of-alice"}
        session = httpx2.post(url, json=HELLO, headers=headers).headers["mcp-session-id"]
        stolen = accept | {"Authorization": "Bearer token-of-bob", "mcp-session-id": session}
        listing = {"jsonrpc": "2.0", "id": 2, "method": "tools/list"}
        assert httpx2.post(url, json=listing, headers=stolen).status_code == 404


async def test_a_client_that_was_forgotten_gets_no_old_handle_again(model, blocks_file):
    users = {"alice": "token-of-alice"}
    limits = Limits(idle_seconds=0.2)
    options = {"allow_dirs": [blocks_file.parent], "users": users, "limits": limits}
    with over_http(lambda: model, **options) as url:
        async with client_with(url, Authorization="Bearer token-of-alice") as client:
            assert await segment(client, blocks_file) == "obj_1"
            await anyio.sleep(0.5)
            told = await client.call_tool("view_objects", {"object_ids": ["obj_1"]})
            assert told.is_error and "obj_1 has expired" in told.content[0].text
            assert await segment(client, blocks_file) == "obj_2"


def test_tokens_are_read_from_a_file(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("# who may\nalice  s3cret\n\nbob other # a comment\n")
    assert read_tokens(path) == {"alice": "s3cret", "bob": "other"}
    for text in ("", "alice", "alice a b", "alice a\nalice b", "alice a\nbob a", "\udcff"):
        path.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(InputError) as caught:
            read_tokens(path)
        assert caught.value.hint
    with pytest.raises(InputError):
        read_tokens(tmp_path / "missing")


# -- work ----------------------------------------------------------------------------------------


async def test_clients_take_turns_at_the_model():
    queue, order = FairQueue(places=1, max_waiting=10), []

    async def call(client: str) -> None:
        async with queue.place(client):
            order.append(client)

    async with anyio.create_task_group() as tasks, queue.place("another"):
        for number, client in enumerate(["greedy"] * 6 + ["b", "c", "b"], 1):
            tasks.start_soon(call, client)
            while queue.waiting < number:
                await anyio.sleep(0)
    assert order == ["greedy", "b", "c", "greedy", "b", "greedy", "greedy", "greedy", "greedy"]
    assert queue.waiting == 0


async def test_beyond_the_bound_the_queue_is_busy_and_cancelled_calls_leave_it():
    queue = FairQueue(places=1, max_waiting=2)
    async with anyio.create_task_group() as tasks:

        async def hold(client: str) -> None:
            async with queue.place(client):
                await anyio.sleep(60)

        for client in "abc":
            tasks.start_soon(hold, client)
        await anyio.sleep(0.01)
        with pytest.raises(Busy) as caught:
            async with queue.place("d"):
                pass
        assert caught.value.retry_after >= 1
        tasks.cancel_scope.cancel()
    assert queue.waiting == 0
    with anyio.fail_after(1):
        async with queue.place("e"):
            pass


async def test_one_client_holds_half_the_places_at_most():
    """Eight slow downloads of one client would leave the others none."""
    queue, running = FairQueue(places=4, max_waiting=20, each=2), []
    goes_on = anyio.Event()

    async def call(client: str) -> None:
        async with queue.place(client):
            running.append(client)
            await goes_on.wait()

    async with anyio.create_task_group() as tasks:
        for client in ["greedy"] * 5 + ["b", "c"]:
            tasks.start_soon(call, client)
        await anyio.sleep(0.01)
        assert running == ["greedy", "greedy", "b", "c"] and queue.waiting == 3
        goes_on.set()
        await anyio.sleep(0.01)
    assert running[4:] == ["greedy"] * 3 and queue.waiting == 0
    # Every place is free again, and a client that was cancelled holds none.
    with anyio.move_on_after(0.01):
        async with queue.place("greedy"), queue.place("greedy"), queue.place("greedy"):
            raise AssertionError("it holds a third")
    async with queue.place("greedy"), queue.place("greedy"), queue.place("b"), queue.place("c"):
        pass


async def test_a_deadline_is_its_own_error():
    with pytest.raises(CallTimeout), deadline(0.01):
        await anyio.sleep(5)
    with pytest.raises(TimeoutError), deadline(5):
        raise TimeoutError


@ERAS
async def test_the_deadline_frees_the_place_and_waiting_calls_are_bounded(era, truth, blocks_file):
    mllm = EndlessMllm(truth)
    limits = Limits(model_calls=1, waiting_calls=1, call_seconds=1.5)
    options = {"allow_dirs": [blocks_file.parent], "limits": limits}
    with over_http(lambda: Sam4MLLM(mllm, ColourSegmenter()), **options) as url:
        async with client_with(url, era) as client, client_with(url, era) as other:
            await segment(other, blocks_file)
            arguments = {"image": str(blocks_file), "expression": "forever"}
            stuck = [asyncio.create_task(client.call_tool("segment_object", arguments))]
            assert await asyncio.to_thread(mllm.begun.wait, 20)
            stuck.append(asyncio.create_task(client.call_tool("segment_object", arguments)))
            await anyio.sleep(0.3)
            with pytest.raises(MCPError, match="Retry after") as caught:
                await segment(other, blocks_file)
            assert busy(caught.value)
            # What needs no model is answered meanwhile.
            begun = time.monotonic()
            assert not (await other.call_tool("view_objects", {"image": "img_1"})).is_error
            assert time.monotonic() - begun < 1
            for call in stuck:
                with pytest.raises(MCPError, match=r"longer than 1\.5 s") as caught:
                    await call
                assert caught.value.error.data["error"] == "CallTimeout"
            assert await segment(other, blocks_file)


async def test_a_slow_source_takes_no_place_at_the_model(truth, blocks_file, monkeypatch):
    """One client's download lasts; the others' calls are answered."""
    opened = threading.Event()

    def slow(url, policy):
        opened.wait(120)
        raise InputError("at last", hint="none")

    monkeypatch.setattr("sam4mllm_tool.images.fetching.fetch", slow)
    model = Sam4MLLM(TruthfulMllm(truth), ColourSegmenter())
    options = {"allow_dirs": [blocks_file.parent], "limits": Limits(model_calls=1)}
    with over_http(lambda: model, **options) as url:
        async with client_with(url) as client, client_with(url) as other:
            arguments = {"image": "http://slow.example/a.png", **RED}
            waiting = asyncio.create_task(client.call_tool("segment_object", arguments))
            await anyio.sleep(0.2)
            try:
                with anyio.fail_after(60):
                    assert await segment(other, blocks_file)
            finally:
                opened.set()
            assert "at last" in (await waiting).content[0].text


# -- HTTP ----------------------------------------------------------------------------------------


PING = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
ACCEPT = {"Accept": "application/json, text/event-stream"}


def test_hosts_and_origins_can_be_allowed(model):
    http = {"allowed_hosts": ["tools.example"], "allowed_origins": ["https://app.example"]}
    with over_http(lambda: model, http=http) as url:
        for headers, refused in [
            ({"Host": "tools.example"}, False),
            ({"Host": "tools.example:8443", "Origin": "https://tools.example:8443"}, False),
            ({"Origin": "https://app.example"}, False),
            ({"Origin": "http://app.example"}, True),
            ({"Host": "evil.example"}, True),
            ({"Origin": "https://tools.example.evil"}, True),
        ]:
            status = httpx2.post(url, json=PING, headers=ACCEPT | headers).status_code
            assert (status in {403, 421}) == refused, headers


def test_listening_everywhere_the_machines_names_are_good(model):
    from sam4mllm_integrations.hosts import served_names

    names = served_names("0.0.0.0")
    assert {"127.0.0.1", "localhost", socket.gethostname()} <= set(names)
    assert socket.gethostname() not in served_names("127.0.0.1")


async def test_the_largest_picture_fits_into_a_request(model, rng):
    import base64

    from PIL import Image

    noise = Image.fromarray(rng.integers(0, 255, (1500, 1500, 3), dtype="uint8"))
    import io

    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    assert len(uri) > 4 * 1024**2  # what the SDK takes by default
    with over_http(lambda: model) as url:
        async with client_with(url) as client:
            result = await client.call_tool("view_objects", {"image": uri, "max_side": 64})
            assert result.structured_content["image_width"] == 1500
    with over_http(lambda: model, http={"max_body": 100_000}) as url:
        answer = httpx2.post(url, content=b" " * 100_001, headers=ACCEPT)
        assert answer.status_code == 413


@pytest.mark.parametrize("version", [{}, {"mcp-protocol-version": "2026-07-28"}])
def test_a_request_of_very_many_values_is_refused_before_it_is_parsed(model, version):
    """80 MB of brackets would become 2 GB of lists, made while every other client waits."""
    many = b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"x":[' + b"[]," * 150_000 + b"0]}}"
    with over_http(lambda: model) as url:
        answer = httpx2.post(url, content=many, headers=ACCEPT | version)
        assert (answer.status_code, answer.text) == (413, "Too many values.")
        assert httpx2.get(url.replace("/mcp", "/health")).text == "alive"


async def _raw(url: str, sent: bytes, seconds: float) -> tuple[bytes, float]:
    """What comes back for some bytes, and after how long the connection is closed."""
    host, _, port = url.removeprefix("http://").removesuffix("/mcp").partition(":")
    begun = time.monotonic()
    with anyio.fail_after(seconds):
        async with await anyio.connect_tcp(host, int(port)) as stream:
            await stream.send(sent)
            received = b""
            try:
                while True:
                    received += await stream.receive()
            except anyio.EndOfStream:
                return received, time.monotonic() - begun


HEAD = b"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


async def test_requests_that_dawdle_are_ended():
    from sam4mllm_integrations.mcp_http import HttpSettings
    from sam4mllm_integrations.mcp_serving import HttpServer
    from sam4mllm_integrations.mcp_tools import ToolServer

    settings = HttpSettings(port=free_port(), header_seconds=0.3, body_seconds=0.4)
    running = HttpServer(ToolServer(lambda: None), settings)
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        while not running.started:
            await anyio.sleep(0.01)
        url = f"http://127.0.0.1:{settings.port}/mcp"
        for sent in (b"", b"POST /mcp HT", HEAD):
            received, seconds = await _raw(url, sent, 5)
            assert received == b"" and 0.2 < seconds < 2
        received, seconds = await _raw(url, HEAD + b"Content-Length: 99\r\n\r\n{", 5)
        assert received.startswith(b"HTTP/1.1 408") and seconds < 3
        assert httpx2.get(f"http://127.0.0.1:{settings.port}/health").text == "alive"
    finally:
        running.should_exit = True
        await asyncio.to_thread(thread.join)


def test_the_client_library_gives_up_idle_connections_before_the_server_does():
    """Else the server closes a connection just as a request is sent on it, and the call is lost."""
    from sam4mllm_integrations.mcp_http import HttpSettings
    from sam4mllm_integrations.mcp_serving import HttpServer
    from sam4mllm_integrations.mcp_tools import ToolServer

    served = HttpServer(ToolServer(lambda: None), HttpSettings())
    assert served.config.timeout_keep_alive > 2 * httpx2.Limits().keepalive_expiry


def test_many_idle_connections_keep_nobody_out():
    """More than the usual limit on open files, here a smaller one, would let in."""
    port = free_port()
    code = (
        "import resource, runpy, sys\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))\n"
        "runpy.run_module('benchmarks.load', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", code, "--serve", str(port)]
    with server(command, port) as (url, _), ExitStack() as idle:
        for _ in range(300):
            idle.enter_context(socket.create_connection(("127.0.0.1", port)))
        for _ in range(3):
            assert httpx2.get(url.replace("/mcp", "/health"), timeout=60).text == "alive"


async def test_a_connection_without_a_token_is_not_kept(model):
    with over_http(lambda: model, token="secret") as url:
        received, _ = await _raw(url, HEAD + b"Content-Length: 2\r\n\r\n{}", 10)
    assert received.startswith(b"HTTP/1.1 401")


def test_stages_are_spans_of_the_call(model, blocks_file, tmp_path):
    """With the SDK of OpenTelemetry, in a process of its own: a provider is set once."""
    code = f"""
import asyncio, json
from pathlib import Path
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
exported = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exported))
trace.set_tracer_provider(provider)
from mcp import Client
from blocks_stdio_server import load
from sam4mllm_integrations.mcp_server import ToolServer
async def main():
    async with Client(ToolServer(load, [Path({str(tmp_path)!r})]).server) as client:
        arguments = {{"image": {str(blocks_file)!r}, "expression": "the red block"}}
        await client.call_tool("segment_object", arguments)
asyncio.run(main())
print(json.dumps([json.loads(span.to_json()) for span in exported.get_finished_spans()]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stderr
    spans = json.loads(done.stdout)
    stages = [span for span in spans if "sam4mllm.tool" in span["attributes"]]
    assert [span["name"] for span in stages] == ["locate", "points", "image embedding", "mask"]
    ends = [span["end_time"] for span in stages]
    assert [span["start_time"] for span in stages][1:] == ends[:-1]  # one after the other
    (call,) = [s for s in spans if s["context"]["span_id"] == stages[0]["parent_id"]]
    assert "segment_object" in call["name"]
    assert {span["parent_id"] for span in stages} == {call["context"]["span_id"]}
    assert {span["attributes"]["sam4mllm.tool"] for span in stages} == {"segment_object"}


async def test_health_readiness_metrics_and_the_log(model, blocks_file, caplog):
    caplog.set_level("INFO", "sam4mllm_tool.calls")
    options = {"allow_dirs": [blocks_file.parent], "token": "secret"}
    with over_http(lambda: model, **options) as url:
        base = url.removesuffix("/mcp")
        assert httpx2.get(f"{base}/health").text == "alive"
        assert httpx2.get(f"{base}/ready").status_code == 503
        assert httpx2.get(f"{base}/metrics").status_code == 401
        async with client_with(url, Authorization="Bearer secret") as client:
            await segment(client, blocks_file)
            await client.call_tool("view_objects", {"image": "img_9"})
        assert httpx2.get(f"{base}/ready").json() == {"ready": True, "draining": False}
        text = httpx2.get(f"{base}/metrics", headers={"Authorization": "Bearer secret"}).text
    from prometheus_client.parser import text_string_to_metric_families

    values = {
        (one.name, *sorted(one.labels.values())): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }
    assert values["sam4mllm_calls_total", "ok", "segment_object"] == 1
    assert values["sam4mllm_calls_total", "tool_error", "view_objects"] == 1
    assert values["sam4mllm_stage_seconds_count", "locate"] == 1
    assert values["sam4mllm_waiting_calls",] == 0
    assert values["sam4mllm_kept_bytes",] > 200 * 120 * 3
    first = json.loads(caplog.records[0].message)
    assert (first["tool"], first["outcome"]) == ("segment_object", "ok")
    assert len(first["request_id"]) == 16
    assert set(first["stages"]) == {"locate", "image embedding", "points", "mask"}


# -- the end -------------------------------------------------------------------------------------


async def test_sigterm_lets_running_calls_end():
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.load", "--serve", str(port), "--clients", "8"]
    with server([*command, "--think", "0.8"], port) as (url, process):
        from benchmarks.load_server import area, gauges, question

        async def call(number: int, goes: asyncio.Event) -> int:
            async with client_with(url) as client:
                await client.list_tools()
                connected.append(number)
                await goes.wait()
                answer = await client.call_tool("segment_object", question(number))
                return answer.structured_content["objects"][0]["area"]

        connected: list[int] = []
        early, late = asyncio.Event(), asyncio.Event()
        calls = [asyncio.create_task(call(number, early)) for number in range(6)]
        refused = asyncio.create_task(call(7, late))
        while len(connected) < 7:
            await anyio.sleep(0.01)
        early.set()
        while (await gauges(url))["waiting_calls"] < 3:  # all are accepted, most of them wait
            await anyio.sleep(0.01)
        os.kill(process.pid, signal.SIGTERM)
        late.set()
        with pytest.raises(BaseException) as told:
            await refused
        assert busy(_the_error(told.value))
        assert await asyncio.gather(*calls) == [area(number) for number in range(6)]
        with anyio.fail_after(10):
            while process.is_running() and process.status() != "zombie":
                await anyio.sleep(0.05)


def test_without_the_extra_the_command_says_one_line():
    code = (
        "import sys; sys.modules['mcp'] = None\n"
        "from sam4mllm_tool.cli import main\nsys.argv = ['sam4mllm-tool', 'mcp']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert 'pip install "sam4mllm-tool[mcp]"' in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2
