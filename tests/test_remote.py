"""``--server``: the command line against a running MCP server, held against a run without one."""

import http.server
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image
from sam4mllm_integrations import mcp_connection
from sam4mllm_integrations.mcp_remote import RemoteTools
from sam4mllm_integrations.mcp_work import Limits
from test_integration_mcp import HELLO, over_http
from typer.testing import CliRunner

from benchmarks.load_server import free_port
from sam4mllm_tool.cli import app
from sam4mllm_tool.errors import (
    AccessDenied,
    Busy,
    CheckpointError,
    EndpointError,
    ExpressionError,
    ImageError,
    InputError,
)
from sam4mllm_tool.pipeline.trace import Trace

RUNNER = CliRunner()
RED = "the red block"


def run(*arguments) -> str:
    result = RUNNER.invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def url(model):
    with over_http(lambda: model) as address:
        yield address


@pytest.fixture
def local(model, monkeypatch):
    """Without --server, the same models are loaded here."""
    monkeypatch.setattr("sam4mllm_tool.pipeline.model.load", lambda *_, **__: model)


def test_documents_and_files_are_those_of_a_local_run(url, local, blocks_file, tmp_path):
    written = {}
    for name, options in {"here": [], "there": ["--server", url]}.items():
        folder = tmp_path / name
        printed = run("segment", blocks_file, RED, "--json", "--out", folder, *options)
        document = json.loads(printed)
        assert document.pop("timings").keys() == {"locate", "points", "image embedding", "mask"}
        files = [Path(path) for path in document.pop("files")]
        assert [path.parent for path in files] == [folder] * 3
        written[name] = {path.name: path.read_bytes() for path in files}, document
    assert written["here"] == written["there"]  # the same models: the very same answers
    with Image.open(tmp_path / "there" / "blocks_obj_1.png") as mask:
        red = np.zeros((120, 200), bool)
        red[15:45, 70:190] = True
        assert np.array_equal(np.asarray(mask) == 255, red)


def test_the_dialogue_and_the_trace_come_back(url, blocks_file, tmp_path):
    shown = run("segment", blocks_file, RED, "--server", url, "--trace", tmp_path / "t.json")
    assert "p_yes" in shown and "mask 3600 pixels" in shown
    trace = Trace.load(tmp_path / "t.json")
    assert trace.image["source"] == "blocks.png" and trace.exchanges
    run("segment", blocks_file, RED, "--server", url, "--trace", tmp_path / "t.html")
    assert "<html" in (tmp_path / "t.html").read_text(encoding="utf-8")


async def test_it_works_where_a_loop_runs_already(url, blocks_file):
    """In a notebook, for instance."""
    trace = RemoteTools(url).segment(blocks_file.read_bytes(), RED)
    assert trace.objects[0]["area"] == 3600


def test_options_reach_the_server(url, blocks_file, tmp_path):
    options = ("--strategy", "box_only", "--count", "1", "--trace", tmp_path / "t.json")
    run("segment", blocks_file, RED, "--server", url, *options)
    trace = Trace.load(tmp_path / "t.json")
    assert (trace.strategy, trace.count) == ("box_only", "1")
    run("segment", blocks_file, RED, "--server", url, "--points", 4, *options[-2:])
    assert len(Trace.load(tmp_path / "t.json").objects[0]["points"]) == 4


def test_many_pictures_leave_nothing_behind(url, blocks, tmp_path):
    for name in ("a.png", "b.png"):
        blocks.pil.save(tmp_path / name)
    (tmp_path / "c.png").write_bytes(b"no picture")
    result = RUNNER.invoke(app, ["segment", str(tmp_path), RED, "--json", "--server", url])
    document = json.loads(result.stdout)
    assert [Path(one["source"]).name for one in document["pictures"]] == ["a.png", "b.png"]
    assert [one["objects"][0]["area"] for one in document["pictures"]] == [3600, 3600]
    assert list(document["failures"]) == [str(tmp_path / "c.png")]
    # Each session was closed, so the server keeps no client and no picture.
    metrics = httpx2.get(url.replace("/mcp", "/metrics")).text
    assert "sam4mllm_clients 0.0" in metrics and "sam4mllm_kept_bytes 0.0" in metrics


def test_probe_is_that_of_a_local_run(url, local, blocks_file):
    asked = ("probe", blocks_file, RED, "--json", "--point", "80,20", "--point", "12.5,100")
    here, there = json.loads(run(*asked)), json.loads(run(*asked, "--server", url))
    assert there.pop("box") == pytest.approx(here.pop("box"), abs=0.05)
    places = [(80, 20, "foreground"), (12.5, 100, "background")]
    assert [(p["x"], p["y"], p["label"]) for p in there["points"]] == places
    for one, other in zip(here.pop("points"), there.pop("points"), strict=True):
        assert other.keys() == one.keys()
        assert other["p_yes"] == pytest.approx(one["p_yes"], abs=1e-4)
        assert other["p_no"] == pytest.approx(one["p_no"], abs=1e-4)
    assert here == there
    with pytest.raises(ExpressionError):
        run("probe", blocks_file, "the green block", "--server", url)


def test_a_server_whose_numbers_are_thousandths(model, blocks_file):
    with over_http(lambda: model, coordinates="relative_1000") as url:
        document = json.loads(run("segment", blocks_file, RED, "--json", "--server", url))
        assert document["objects"][0]["box"] == pytest.approx([70, 15, 190, 45], abs=1)
        with pytest.raises(InputError, match="thousandths"):
            run("probe", blocks_file, RED, "--server", url)


def test_no_torch_is_imported(url, blocks_file):
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "from sam4mllm_tool.cli import main\n"
        f"sys.argv = ['sam4mllm-tool', 'segment', {str(blocks_file)!r}, {RED!r}, '--json']\n"
        "main()"
    )
    environment = {**os.environ, "SAM4MLLM_SERVER": url}  # a setting like any other
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert json.loads(done.stdout)["objects"][0]["area"] == 3600
    assert done.stderr.splitlines()[-1] == "False"


# -- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--mllm", "--sam", "--device", "--candidates"])
def test_options_of_local_models_are_refused(option, blocks_file):
    value = "poisson" if option == "--candidates" else "embedded"
    asked = ["segment", blocks_file, RED, option, value, "--server", "http://127.0.0.1:9"]
    with pytest.raises(InputError, match=option) as caught:
        run(*asked)
    assert "--server ''" in caught.value.hint


@pytest.mark.parametrize(
    "address",
    ["", "nonsense", "ftp://a/mcp", "http://", "http://[::1", "http://u:p@a/", "/a", "h:x"],
)
def test_what_is_no_address(address):
    with pytest.raises(InputError, match="address of a server") as caught:
        RemoteTools(address)
    assert caught.value.hint


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "ключ"])
def test_what_is_no_token(token):
    with pytest.raises(InputError, match="token"):
        RemoteTools("http://127.0.0.1:9", token)


def test_a_server_that_is_away(blocks_file):
    with pytest.raises(EndpointError, match="cannot be reached") as caught:
        run("segment", blocks_file, RED, "--server", f"http://127.0.0.1:{free_port()}")
    assert caught.value.retryable and "sam4mllm-tool mcp" in caught.value.hint


def test_the_token_comes_from_the_option_or_the_environment(model, blocks_file, monkeypatch):
    with over_http(lambda: model, token="secret") as url:
        asked = ("segment", blocks_file, RED, "--json", "--server", url)
        for wrong, said in (((), "asks for a token"), (("--token", "no"), "not know this token")):
            with pytest.raises(AccessDenied, match=said) as caught:
                run(*asked, *wrong)
            assert "SAM4MLLM_TOKEN" in caught.value.hint
        assert run(*asked, "--token", "secret")
        monkeypatch.setenv("SAM4MLLM_TOKEN", "secret")
        assert run(*asked)


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(url, blocks_file, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert RemoteTools(url).segment(blocks_file.read_bytes(), RED).objects


def test_a_busy_server_is_asked_again_for_a_while(model, blocks_file, monkeypatch):
    pauses = []
    with over_http(lambda: model, limits=Limits(clients=1)) as url:
        monkeypatch.setattr(mcp_connection.time, "sleep", pauses.append)
        with _session(url) as leave:
            remote = RemoteTools(url, busy_seconds=12)
            with pytest.raises(Busy) as caught:
                remote.segment(blocks_file.read_bytes(), RED)
            assert pauses == [5, 5] and caught.value.hint  # a third would be too long
            monkeypatch.setattr(mcp_connection.time, "sleep", lambda seconds: leave())
            assert remote.segment(blocks_file.read_bytes(), RED).objects


@contextmanager
def _session(url):
    """Another client that takes the only place, until it is asked to leave."""
    accept = {"Accept": "application/json, text/event-stream"}
    session = httpx2.post(url, json=HELLO, headers=accept).headers["mcp-session-id"]
    yield lambda: httpx2.delete(url, headers=accept | {"mcp-session-id": session})


def test_what_the_server_refuses_and_what_fails_there(model, blocks_file):
    small, other = {"http": {"max_body": 300}}, {"tools": ["view_objects"]}
    for options, error, said in (
        (small, ImageError, "larger"),
        (other, InputError, "no tool 'segment_object'"),
    ):
        with over_http(lambda: model, **options) as url, pytest.raises(error, match=said):
            run("segment", blocks_file, RED, "--server", url)

    def load():
        raise CheckpointError("weights are missing", hint="Install them.")

    with over_http(load) as url:
        with pytest.raises(CheckpointError, match="weights are missing") as caught:
            run("segment", blocks_file, RED, "--server", url)
        assert caught.value.hint == "Install them." and not caught.value.retryable


@pytest.mark.parametrize(
    "status, kind, body",
    [
        (200, "text/html", b"<html>"),
        (200, "application/json", b"{}"),
        (202, "application/json", b""),
        (302, "text/html", b""),
        (404, "text/html", b"nothing here"),
        (500, "text/html", b"oh no"),
    ],
)
def test_what_is_no_mcp_server(status, kind, body, blocks_file):
    class Other(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.send_header("Location", "http://elsewhere.example/")
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(EndpointError, match="does not answer as an MCP server") as caught:
        run("segment", blocks_file, RED, "--server", f"http://127.0.0.1:{server.server_port}")
    assert caught.value.hint
    server.shutdown()
