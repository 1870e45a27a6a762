"""``sam4mllm-tool doctor``: what is installed, which devices there are, does the main job run."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from sam4mllm_tool.cli.common import EXIT_BACKEND, JsonOption, alive, console, print_json
from sam4mllm_tool.errors import Sam4MllmError

PACKAGES = (
    "sam4mllm-tool", "torch", "torchvision", "transformers", "peft", "segment-anything",
    "pydantic", "pillow", "langchain-core", "langgraph", "mcp", "openai", "anthropic",
    "smolagents", "llama-index-core", "pydantic-ai-slim", "openai-agents", "gradio",
    "bitsandbytes", "vllm",
)  # fmt: skip


def doctor(context: typer.Context, as_json: JsonOption = False) -> None:
    """Report packages, devices and embedded checkpoints, and segment a test picture."""
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "settings": _settings(context.obj),
        "devices": _devices(),
        "checkpoints": _checkpoints(),
    }
    with alive("loading the embedded models …", quiet=as_json):
        report["self_check"] = _self_check()
    if as_json:
        print_json(report)
    else:
        _show(report)
    if not report["self_check"]["ok"]:
        raise SystemExit(EXIT_BACKEND)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _settings(named: Path | None) -> dict[str, Any]:
    """Defaults of the options that are set somewhere, and the files looked for."""
    from sam4mllm_tool.cli.settings import files_read, read_defaults

    values = {one.name: {"value": one.value, "from": one.source} for one in read_defaults(named)}
    return {"files": [str(path) for path in files_read(named)], "values": values}


def _devices() -> list[str]:
    import torch

    cuda = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return [*cuda, *mps, f"cpu ({torch.get_num_threads()} threads)"]


def _checkpoints() -> dict[str, str]:
    from sam4mllm_tool import embedded

    places = {"mllm": embedded.MLLM, "sam": embedded.SAM}
    return {name: _megabytes(path) for name, path in places.items() if path.is_dir()}


def _megabytes(folder: Any) -> str:
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return f"{size / 1e6:.1f} MB of weights"


def _self_check() -> dict[str, Any]:
    """The main job on a plain picture: does it run, and how long does it take?"""
    from PIL import Image, ImageDraw

    from sam4mllm_tool.pipeline.model import load
    from sam4mllm_tool.types import RgbImage

    picture = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(picture).ellipse((60, 60, 190, 190), fill="red")
    start = time.perf_counter()
    try:
        found = load().segment(RgbImage.from_pil(picture), "the red circle")
    except Sam4MllmError as error:
        return {"ok": False, "error": str(error)}
    seconds = round(time.perf_counter() - start, 2)
    return {"ok": True, "seconds_with_loading": seconds, "status": found.status.value}


def _show(report: dict[str, Any]) -> None:
    table = Table(title=f"Python {report['python']}", title_justify="left")
    table.add_column("package")
    table.add_column("version")
    for name, version in report["packages"].items():
        table.add_row(name, version or "[dim]not installed[/]")
    console.print(table)
    for name, one in report["settings"]["values"].items():
        console.print(f"setting: {name} = {one['value']} (from {one['from']})", highlight=False)
    looked = ", ".join(report["settings"]["files"])
    console.print(f"settings are read from SAM4MLLM_… and {looked}", highlight=False)
    for device in report["devices"]:
        console.print(f"device: {device}", highlight=False)
    for name, size in report["checkpoints"].items():
        console.print(f"embedded {name}: {size}", highlight=False)
    check = report["self_check"]
    if check["ok"]:
        console.print(
            f"[green]self-check passed[/] in {check['seconds_with_loading']} s, loading included"
        )
    else:
        console.print(f"[red]self-check failed[/]: {check['error']}")
