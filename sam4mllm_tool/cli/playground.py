"""``sam4mllm-tool playground``: the tools by hand, on a page in the browser."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from sam4mllm_tool.cli.common import (
    AdapterOption,
    DeviceOption,
    FormatOption,
    MaxBytesOption,
    MaxPixelsOption,
    MllmOption,
    SamDecoderOption,
    SamOption,
    console,
    load_models,
)
from sam4mllm_tool.errors import InputError
from sam4mllm_tool.images.access import ImagePolicy


def playground(
    host: Annotated[
        str, typer.Option(help="Where it listens; off loopback the address holds a secret.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 7860,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="Name by which a proxy is reached; repeatable.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder whose pictures are offered beside the scenes.")
    ] = None,
    network: Annotated[bool, typer.Option(help="Let http(s) pictures be opened.")] = False,
    open_browser: Annotated[
        bool, typer.Option("--open", help="Open the page in the browser.")
    ] = False,
    max_pixels: MaxPixelsOption = ImagePolicy.max_pixels,
    max_bytes: MaxBytesOption = ImagePolicy.max_bytes,
    mllm: MllmOption = "embedded",
    adapter: AdapterOption = None,
    format: FormatOption = None,
    sam: SamOption = "embedded",
    sam_decoder: SamDecoderOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Click on pictures, see the dialogue happen (needs the extra 'playground')."""
    try:
        from sam4mllm_tool.playground.gate import Address
        from sam4mllm_tool.playground.serving import serve
    except ImportError as error:
        raise InputError(
            "the playground is not installed", hint='Run: pip install "sam4mllm-tool[playground]"'
        ) from error

    def announce(url: str) -> None:
        console.print(f"The playground is at {url} (Ctrl+C ends it).", markup=False, soft_wrap=True)
        if open_browser:
            webbrowser.open(url)

    serve(
        lambda: load_models(mllm, adapter, format, sam, sam_decoder, device),
        Address.on(host, port, allowed_host or ()),
        announce,
        loading=loading(mllm, adapter, format, sam, sam_decoder),
        folder=folder,
        policy=ImagePolicy(allow_network=network, max_pixels=max_pixels, max_bytes=max_bytes),
    )


def loading(
    mllm: str, adapter: str | None, format: str | None, sam: str, sam_decoder: str | None
) -> str:
    """The options as a call of :func:`sam4mllm_tool.load`."""
    arguments = [] if mllm == "embedded" else [repr(mllm)]
    if adapter:
        arguments.append(f"adapter={adapter!r}")
    if sam != "embedded":
        arguments.append(f"segmenter={sam!r}")
    if format:
        arguments.append(f"format={format!r}")
    if sam_decoder:
        arguments.append(f"segmenter_options={{'decoder': {sam_decoder!r}}}")
    return f"load({', '.join(arguments)})"
