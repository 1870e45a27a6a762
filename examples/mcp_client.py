"""An MCP client: start the server, list its tools, segment, read the mask as a resource."""

from __future__ import annotations

import asyncio
import base64
import io
import sys

from mcp import Client, StdioServerParameters
from PIL import Image

from sam4mllm_tool import embedded

# What a client's configuration file says too:
# {"mcpServers": {"sam4mllm": {"command": "sam4mllm-tool", "args": ["mcp", "--allow-dir", "…"]}}}
SERVER = StdioServerParameters(
    command=sys.executable,
    args=["-c", "from sam4mllm_tool.cli import main; main()", "mcp", "--allow-dir",
          str(embedded.DEMO)],
)  # fmt: skip


async def segment() -> None:
    """Talk to the server."""
    async with Client(SERVER) as client:
        tools = (await client.list_tools()).tools
        print("tools:", ", ".join(tool.name for tool in tools))
        assert len(tools) == 8

        async def tell(number: float, total: float | None, stage: str | None) -> None:
            print(f"  stage {number:.0f}: {stage}")

        result = await client.call_tool(
            "segment_object",
            {
                "image": str(embedded.DEMO / "demo.png"),
                "expression": "the alarm clock left of the tree",
                "count": "1",
            },
            progress_callback=tell,
        )
        assert not result.is_error
        print(result.content[0].text)
        found = result.structured_content["objects"][0]

        link = next(block for block in result.content if block.type == "resource_link")
        png = (await client.read_resource(link.uri)).contents[0]
        mask = Image.open(io.BytesIO(base64.b64decode(png.blob)))
        print(f"{link.uri}: {mask.width}x{mask.height}")
        assert sum(mask.histogram()[1:]) == found["area"]

        view = await client.call_tool("view_objects", {"object_ids": [found["object_id"]]})
        picture = next(block for block in view.content if block.type == "image")
        assert len(picture.data) < 1_000_000


def main() -> None:
    """Run the client."""
    asyncio.run(segment())


if __name__ == "__main__":
    main()
