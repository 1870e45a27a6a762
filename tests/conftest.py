"""Shared pictures and models."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.testing import ColourSegmenter, TruthfulMllm
from sam4mllm_tool.types import Mask, RgbImage

RED, BLUE, WHITE = (214, 40, 40), (45, 95, 215), (255, 255, 255)


# Several workers (`-n`) share the cores: one thread of torch each. Read when torch is imported.
# Workers get a width of 80 columns; tests of the command line choose their own.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.pop("COLUMNS", None)

SLOWEST = (
    "test_cluster", "test_cluster_batches", "test_playground_browser", "test_training_families",
    "test_training_runs", "test_cli_training", "test_cli", "test_mcp_trust",
)  # fmt: skip
"""Files of tests that take a quarter of a minute and more."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that run the shipped models, so that the others can be run alone.

    The files that take longest come first: no worker (`-n`) is left with one of them at the end.
    """
    for item in items:
        if "embedded_model" in getattr(item, "fixturenames", ()):
            item.add_marker("shipped")
    items.sort(key=lambda item: item.path.stem not in SLOWEST)


def pytest_collection_finish() -> None:
    """Spare the garbage collector what imports and collection left: it looks at it no more."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests share a worker, and so do all tests on the Ray cluster."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "cluster" if "/cluster/" in file else file

    return Files(config, log)


@pytest.fixture(scope="session")
def blocks() -> RgbImage:
    """200×120, white, with a red block (70,15)–(190,45) and a blue one (10,54)–(50,114).

    No number fits by accident: the picture is not square, no block is, each has its own size, and
    neither a swap of x and y nor a mirror puts one block on itself or on the other.
    """
    picture = Image.new("RGB", (200, 120), WHITE)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((70, 15, 189, 44), fill=RED)
    draw.rectangle((10, 54, 49, 113), fill=BLUE)
    return RgbImage.from_pil(picture)


@pytest.fixture(scope="session")
def truth(blocks: RgbImage) -> dict[str, list[Mask]]:
    red = Mask((blocks.array == RED).all(axis=2))
    blue = Mask((blocks.array == BLUE).all(axis=2))
    return {"the red block": [red], "the blue block": [blue], "all blocks": [red, blue]}


@pytest.fixture
def model(truth: dict[str, list[Mask]]) -> Sam4MLLM:
    """The pipeline over truthful stand-ins."""
    return Sam4MLLM(TruthfulMllm(truth), ColourSegmenter())


@pytest.fixture(scope="session")
def embedded_model() -> Sam4MLLM:
    """The shipped models, loaded once."""
    import torch

    from sam4mllm_tool.pipeline.model import load

    torch.set_num_threads(1)
    return load()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread of torch: tiny models are faster without others."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def demo_image() -> tuple[RgbImage, str]:
    """The shipped demo picture and its expression."""
    import json

    from sam4mllm_tool import embedded
    from sam4mllm_tool.images.loading import load_image

    question = json.loads((embedded.DEMO / "demo.json").read_text())
    return load_image(embedded.DEMO / question["picture"]).image, question["expression"]


@pytest.fixture
def blocks_file(blocks: RgbImage, tmp_path: Path) -> Path:
    """The blocks picture as a PNG file."""
    path = tmp_path / "blocks.png"
    blocks.pil.save(path)
    return path
