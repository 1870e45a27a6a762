"""A playground over stand-ins, on a thread of the test's process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sam4mllm_tool.images.access import ImagePolicy
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.playground.gate import Address
from sam4mllm_tool.playground.serving import listen, playground_server


@contextmanager
def playground(
    model: Sam4MLLM, *, folder: Path | None = None, policy: ImagePolicy | None = None
) -> Iterator[str]:
    """The address, ending in a slash; the server runs within the ``with`` block."""
    opened, address = listen(Address.on("127.0.0.1", 0))
    server = playground_server(model, address, folder=folder, policy=policy)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield address.url
    finally:
        server.should_exit = True
        thread.join(20)
        opened.close()
