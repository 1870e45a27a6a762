"""The MCP server through the official client, over stdio and HTTP, in both protocol eras."""

import asyncio
import base64
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import numpy as np
import pytest
from mcp import Client, MCPError, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from mcp_types import ListRootsResult, Root
from PIL import Image
from pycocotools import mask as coco_mask
from sam4mllm_integrations import mcp_tools
from sam4mllm_integrations.mcp_server import Credentials, HttpSettings, ToolServer, serve

from sam4mllm_tool.concurrency import check_cancelled
from sam4mllm_tool.errors import CheckpointError, InputError
from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.testing import ColourSegmenter, ScriptedMllm, TruthfulMllm
from sam4mllm_tool.tools.builtin import BUILTIN_TOOLS

HERE = Path(__file__).parent
HELLO = {
    "jsonrpc": "2.0", "id": 1, "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {},
               "clientInfo": {"name": "t", "version": "1"}},
}  # fmt: skip
"""The first request of a session, as any client sends it."""
ERAS = pytest.mark.parametrize("era", ["legacy", "auto"])
RED = {"expression": "the red block"}


@contextmanager
def over_http(load, *, token=None, users=None, http=None, **options) -> Iterator[str]:
    """A real server on a free port; yields the address."""
    import uvicorn
    from sam4mllm_integrations.mcp_http import http_app

    settings = HttpSettings(credentials=Credentials(token, users or {}), **(http or {}))
    app = http_app(ToolServer(load, **options), settings)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        server.should_exit = True
        thread.join()


def over_stdio(folders="", gate="") -> StdioServerParameters:
    command = [str(HERE / "blocks_stdio_server.py"), str(folders), *([str(gate)] if gate else [])]
    return StdioServerParameters(command=sys.executable, args=command, env=dict(os.environ))


@pytest.fixture
def address(model, tmp_path) -> Iterator[str]:
    with over_http(lambda: model, allow_dirs=[tmp_path]) as url:
        yield url


def roots(*folders: Path):
    async def answer(context) -> ListRootsResult:
        return ListRootsResult(roots=[Root(uri=folder.as_uri()) for folder in folders])

    return answer


def said(result) -> str:
    return result.content[0].text


@ERAS
async def test_stdio_from_list_to_mask(era, blocks_file, truth):
    async with Client(over_stdio(blocks_file.parent), mode=era) as client:
        tools = (await client.list_tools()).tools
        assert [tool.name for tool in tools] == [spec.name for spec in BUILTIN_TOOLS]
        assert {tool.name for tool in tools if tool.annotations.read_only_hint} == {
            spec.name for spec in BUILTIN_TOOLS if spec.read_only
        }
        result = await client.call_tool("segment_object", {"image": str(blocks_file), **RED})
        assert not result.is_error
        # The client has checked this against the tool's output schema.
        assert result.structured_content["objects"][0]["area"] == 3600
        assert "counts" not in json.dumps(result.structured_content)
        links = {block.name: block.uri for block in result.content if block.type == "resource_link"}
        assert links == {
            "obj_1.png": "sam4mllm://masks/obj_1.png",
            "obj_1.json": "sam4mllm://masks/obj_1.json",
        }
        listed = {str(one.uri) for one in (await client.list_resources()).resources}
        assert listed == set(links.values())
        png = (await client.read_resource(links["obj_1.png"])).contents[0]
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(png.blob)))) > 0
        assert np.array_equal(pixels, truth["the red block"][0].pixels)
        coco = json.loads((await client.read_resource(links["obj_1.json"])).contents[0].text)
        rle = coco["annotations"][0]["segmentation"]
        assert np.array_equal(coco_mask.decode(rle) > 0, pixels)


@ERAS
async def test_tools_are_listed_before_any_weights_are_loaded(era, blocks_file, tmp_path):
    gate = tmp_path / "gate"
    async with Client(over_stdio(tmp_path, gate), mode=era) as client:
        assert len((await client.list_tools()).tools) == len(BUILTIN_TOOLS)
        # What needs no model is not kept waiting either.
        seen = await client.call_tool("view_objects", {"image": str(blocks_file)})
        assert not seen.is_error
        call = asyncio.create_task(
            client.call_tool("segment_object", {"image": str(blocks_file), **RED})
        )
        await asyncio.sleep(0.3)
        assert not call.done()
        gate.touch()
        assert (await call).structured_content["status"] == "found"


async def test_schemas_are_made_once(address, blocks_file, monkeypatch):
    made = []
    schema = mcp_tools.arguments_schema
    monkeypatch.setattr(
        mcp_tools, "arguments_schema", lambda model: made.append(model) or schema(model)
    )
    for _ in range(2):
        async with Client(address) as client:
            assert not (
                await client.call_tool("view_objects", {"image": str(blocks_file)})
            ).is_error
    assert len(made) == len(BUILTIN_TOOLS)


def test_importing_the_server_pulls_no_torch():
    code = "import sam4mllm_integrations.mcp_server, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@ERAS
async def test_clients_at_once_keep_apart_what_is_theirs(era, address, blocks_file):
    async def one(expression: str, area: int) -> None:
        async with Client(address, mode=era) as client:
            arguments = {"image": str(blocks_file), "expression": expression}
            for number in range(1, 4):
                result = await client.call_tool("segment_object", arguments)
                made = result.structured_content["objects"][0]
                assert (made["object_id"], made["area"]) == (f"obj_{number}", area)
            view = await client.call_tool("view_objects", {"image": "img_1"})
            assert set(view.structured_content["shown"].values()) == {"obj_1", "obj_2", "obj_3"}
            missing = await client.call_tool("view_objects", {"object_ids": ["obj_4"]})
            assert missing.is_error
            with pytest.raises(MCPError, match="no object 'obj_4'"):
                await client.read_resource("sam4mllm://masks/obj_4.png")

    await asyncio.gather(*[one("the red block", 3600), one("the blue block", 2400)] * 3)


async def test_cookie_less_clients_of_the_newest_protocol_still_work(address, blocks_file):
    # A version pin skips the introduction at which the cookie is handed out.
    async with Client(address, mode="2026-07-28") as client:
        result = await client.call_tool("segment_object", {"image": str(blocks_file), **RED})
        handle = result.structured_content["objects"][0]["object_id"]
        again = await client.call_tool("view_objects", {"object_ids": [handle]})
        assert not again.is_error


@ERAS
async def test_progress_tells_every_stage(era, address, blocks_file):
    stages = []

    async def note(progress, total, message):
        stages.append((progress, message))

    async with Client(address, mode=era) as client:
        arguments = {"image": str(blocks_file), **RED}
        await client.call_tool("segment_object", arguments, progress_callback=note)
    named = ["locate", "points", "image embedding", "mask"]
    assert stages == list(enumerate(named, 1))


@dataclass
class EndlessMllm(TruthfulMllm):
    """Thinks about 'forever' until nobody wants the answer any more."""

    begun: threading.Event = field(default_factory=threading.Event)
    freed: threading.Event = field(default_factory=threading.Event)

    def generate(self, image, dialogue, **options):
        try:
            while "forever" in dialogue[-1].text:
                self.begun.set()
                check_cancelled()
                time.sleep(0.005)
        finally:
            self.freed.set()
        return super().generate(image, dialogue, **options)


@ERAS
async def test_cancelling_frees_the_model(era, truth, blocks_file):
    mllm = EndlessMllm(truth)
    model = Sam4MLLM(mllm, ColourSegmenter())
    with over_http(lambda: model, allow_dirs=[blocks_file.parent]) as url:
        async with Client(url, mode=era) as client:
            arguments = {"image": str(blocks_file), "expression": "forever"}
            call = asyncio.create_task(client.call_tool("segment_object", arguments))
            assert await asyncio.to_thread(mllm.begun.wait, 20)
            call.cancel()
            assert await asyncio.to_thread(mllm.freed.wait, 20)
            after = await client.call_tool("segment_object", {**arguments, **RED})
            assert after.structured_content["status"] == "found"


async def test_pictures_stay_under_the_stated_limit(model, tmp_path, rng):
    noise = Image.fromarray(rng.integers(0, 255, (1500, 2000, 3), dtype=np.uint8))
    noise.save(tmp_path / "noise.png")
    tools = ToolServer(lambda: model, [tmp_path], max_picture_characters=300_000)
    async with Client(tools.server) as client:
        arguments = {"image": str(tmp_path / "noise.png"), "max_side": 2048}
        result = await client.call_tool("view_objects", arguments)
    block = result.content[1]
    assert len(block.data) <= 300_000
    picture = Image.open(io.BytesIO(base64.b64decode(block.data)))
    assert picture.get_format_mimetype() == block.mime_type
    told = result.structured_content["view_width"], result.structured_content["view_height"]
    assert picture.size == told
    assert abs(picture.width / picture.height - 4 / 3) < 0.02


async def test_a_small_picture_is_sent_without_loss(model, blocks, blocks_file):
    tools = ToolServer(lambda: model, [blocks_file.parent])
    async with Client(tools.server) as client:
        result = await client.call_tool("view_objects", {"image": str(blocks_file)})
    assert result.content[1].mime_type == "image/png"
    sent = Image.open(io.BytesIO(base64.b64decode(result.content[1].data)))
    assert sent.size == blocks.size


@ERAS
async def test_a_call_repeated_under_its_id_gets_the_first_answer(era, address, blocks_file):
    arguments = {"image": str(blocks_file), **RED}
    async with Client(address, mode=era) as client:

        async def handles(call_id):
            meta = {"sam4mllm/call-id": call_id}
            answer = await client.call_tool("segment_object", arguments, meta=meta)
            return [one["object_id"] for one in answer.structured_content["objects"]], answer

        first, answer = await handles("a")
        assert (first, await handles("a")) == (["obj_1"], (first, answer))
        assert (await handles("b"))[0] == ["obj_2"]
        assert (await handles("a"))[0] == ["obj_1"]
        seen = await client.call_tool("view_objects", {"image": str(blocks_file)})
        assert sorted(seen.structured_content["shown"].values()) == ["obj_1", "obj_2"]
        for bad in (7, "x" * 201):
            with pytest.raises(MCPError, match="call-id"):
                await handles(bad)


async def test_links_can_be_left_out(model, blocks_file):
    tools = ToolServer(lambda: model, [blocks_file.parent], mask_links=False)
    async with Client(tools.server) as client:
        result = await client.call_tool("segment_object", {"image": str(blocks_file), **RED})
        assert [block.type for block in result.content] == ["text"]
        assert len((await client.list_resources()).resources) == 2


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, arguments, complaint",
    [
        ("segment_object", {"image": "img_9", **RED}, "no image 'img_9'"),
        ("segment_object", {"expression": "x"}, "image: Field required"),
        ("segment_object", {"image": "/etc/passwd", **RED}, "does not allow"),
        ("segment_with_prompts", {"image": "BLOCKS", "box": [9, 9, 9, 9]}, "no area"),
        ("is_point_inside_object", {}, "give object_id, or image and expression"),
    ],
)
async def test_what_the_agent_can_mend_is_a_tool_error_with_a_hint(
    address, blocks_file, name, arguments, complaint
):
    arguments = {k: str(blocks_file) if v == "BLOCKS" else v for k, v in arguments.items()}
    async with Client(address) as client:
        result = await client.call_tool(name, arguments)
    assert result.is_error
    assert complaint in said(result)
    assert "Hint: " in said(result)


async def test_a_reply_that_cannot_be_read_is_a_tool_error(blocks_file):
    model = Sam4MLLM(ScriptedMllm(["I would rather not."]), ColourSegmenter())
    tools = ToolServer(lambda: model, [blocks_file.parent])
    async with Client(tools.server) as client:
        result = await client.call_tool("locate_object", {"image": str(blocks_file), **RED})
    assert result.is_error


@ERAS
async def test_what_the_system_got_wrong_is_a_protocol_error(era, blocks_file):
    def load() -> Sam4MLLM:
        raise CheckpointError("weights are missing", hint="Install them.")

    with over_http(load, allow_dirs=[blocks_file.parent]) as url:
        async with Client(url, mode=era) as client:
            await client.list_tools()
            with pytest.raises(MCPError, match=r"weights are missing Hint: Install them\.") as told:
                await client.call_tool("segment_object", {"image": str(blocks_file), **RED})
            told.value.data.pop("request_id")
            assert told.value.data == {"error": "CheckpointError", "retryable": False}
            with pytest.raises(MCPError, match="no tool 'nonsense'"):
                await client.call_tool("nonsense", {})


# -- who may reach what --------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path, blocks) -> tuple[Path, Path]:
    """Two folders side by side with the same picture in each."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        blocks.pil.save(tmp_path / name / "blocks.png")
    return tmp_path / "a", tmp_path / "b"


async def _allowed(client: Client, folder: Path) -> tuple[bool, bool]:
    """Whether the folder may be read, and written."""
    read = await client.call_tool("segment_object", {"image": str(folder / "blocks.png"), **RED})
    made = await client.call_tool(
        "segment_with_prompts", {"image": _data_uri(folder), "box": [70, 15, 190, 45]}
    )
    handle = made.structured_content["objects"][0]["object_id"]
    save = {"object_ids": [handle], "folder": str(folder / "out")}
    written = await client.call_tool("save_objects", save)
    assert written.is_error != (folder / "out").exists()
    shutil.rmtree(folder / "out", ignore_errors=True)
    return not read.is_error, not written.is_error


def _data_uri(folder: Path) -> str:
    data = base64.b64encode((folder / "blocks.png").read_bytes()).decode()
    return f"data:image/png;base64,{data}"


@ERAS
async def test_reading_and_writing_folders_are_separate(era, model, folders):
    tools = ToolServer(lambda: model, [folders[0]], ImagePolicy(output_dirs=(folders[1],)))
    async with Client(tools.server, mode=era) as client:
        assert await _allowed(client, folders[0]) == (True, False)
        assert await _allowed(client, folders[1]) == (False, True)


@ERAS
async def test_roots_are_enough_for_the_client_that_started_the_server(era, model, folders):
    server, callback = ToolServer(lambda: model).server, roots(folders[1])
    async with Client(server, mode=era, list_roots_callback=callback) as client:
        assert await _allowed(client, folders[0]) == (False, False)
        assert await _allowed(client, folders[1]) == (True, False)


@ERAS
async def test_without_allow_dir_and_roots_no_file_can_be_reached(era, model, folders):
    async with Client(ToolServer(lambda: model).server, mode=era) as client:
        assert await _allowed(client, folders[0]) == (False, False)


@ERAS
async def test_roots_narrow_what_http_clients_may_reach_and_never_widen_it(era, model, folders):
    parent = folders[0].parent
    with over_http(lambda: model, allow_dirs=[parent]) as url:
        async with Client(url, mode=era, list_roots_callback=roots(folders[0])) as client:
            assert await _allowed(client, folders[0]) == (True, False)
            assert await _allowed(client, folders[1]) == (False, False)
    with over_http(lambda: model, allow_dirs=[folders[0]]) as url:
        async with Client(url, mode=era, list_roots_callback=roots(parent)) as client:
            assert await _allowed(client, folders[0]) == (True, False)
            assert await _allowed(client, folders[1]) == (False, False)
    with over_http(lambda: model) as url:
        async with Client(url, mode=era, list_roots_callback=roots(parent)) as client:
            assert await _allowed(client, folders[0]) == (False, False)


@pytest.mark.filterwarnings("ignore:The roots capability is deprecated")
async def test_changed_roots_are_asked_for_again(model, folders):
    now = [folders[0]]

    async def answer(context) -> ListRootsResult:
        return ListRootsResult(roots=[Root(uri=folder.as_uri()) for folder in now])

    server = ToolServer(lambda: model).server
    async with Client(server, mode="legacy", list_roots_callback=answer) as client:
        assert await _allowed(client, folders[0]) == (True, False)
        now[0] = folders[1]
        await client.send_roots_list_changed()
        assert await _allowed(client, folders[1]) == (True, False)
        assert await _allowed(client, folders[0]) == (False, False)


async def test_roots_over_stdio(folders):
    async with Client(over_stdio(), list_roots_callback=roots(folders[1])) as client:
        assert await _allowed(client, folders[0]) == (False, False)
        assert await _allowed(client, folders[1]) == (True, False)


@asynccontextmanager
async def client_with(url: str, headers: dict[str, str]):
    async with (
        httpx2.AsyncClient(headers=headers) as http,
        Client(streamable_http_client(url, http_client=http)) as client,
    ):
        yield client


async def test_a_token_is_asked_of_everyone(model):
    with over_http(lambda: model, token="secret") as url:
        async with client_with(url, {"Authorization": "Bearer secret"}) as client:
            assert len((await client.list_tools()).tools) == len(BUILTIN_TOOLS)
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            answer = httpx2.post(url, json={}, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "headers, status",
    [({"Host": "evil.example"}, 421), ({"Origin": "http://evil.example"}, 403)],
)
def test_web_pages_are_turned_away(model, headers, status):
    request = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
    accept = {"Accept": "application/json, text/event-stream"}
    with over_http(lambda: model) as url:
        assert httpx2.post(url, json=request, headers=accept | headers).status_code == status


def test_an_open_address_needs_a_token(model):
    with pytest.raises(InputError, match="other machines"):
        serve(lambda: model, transport="http", http=HttpSettings(host="0.0.0.0"))
    with pytest.raises(InputError, match="unknown transport"):
        serve(lambda: model, transport="pigeon")


async def test_network_policy_is_passed_on(model):
    tools = ToolServer(lambda: model, policy=ImagePolicy(allow_network=True))
    async with Client(tools.server) as client:
        assert (await client.list_tools()).tools[0].annotations.open_world_hint
        result = await client.call_tool("segment_object", {"image": "http://127.0.0.1/x", **RED})
        assert result.is_error
        assert "private" in said(result)
