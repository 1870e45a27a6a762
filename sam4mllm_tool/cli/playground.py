"""``sam4mllm-tool playground``: a web page for using the tools by hand."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sam4mllm_tool.cli.common import (
    AdapterOption,
    DeviceOption,
    FormatOption,
    MaxBytesOption,
    MaxPixelsOption,
    MllmOption,
    ProposerOption,
    SamDecoderOption,
    SamDtypeOption,
    SamOption,
    console,
    load_models,
    not_installed,
)
from sam4mllm_tool.images.access import ImagePolicy

if TYPE_CHECKING:
    from sam4mllm_tool.pipeline.model import Sam4MLLM


def playground(
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on; except on loopback, the printed URL contains a secret."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 selects a free one.")] = 7860,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="Additional host name, such as a proxy's; repeatable.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder with pictures to offer in addition to the scenes.")
    ] = None,
    network: Annotated[bool, typer.Option(help="Allow pictures from http(s) URLs.")] = False,
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
    sam_dtype: SamDtypeOption = "auto",
    proposer: ProposerOption = "mllm",
    device: DeviceOption = "auto",
) -> None:
    """Use the tools by hand on a web page (needs the extra 'playground')."""
    try:
        from sam4mllm_tool.playground.gate import Address
        from sam4mllm_tool.playground.serving import serve
    except ImportError as error:
        raise not_installed("the playground", "playground") from error

    def announce(url: str) -> None:
        console.print(
            f"The playground is at {url} (Ctrl+C stops it).", markup=False, soft_wrap=True
        )
        if open_browser:
            webbrowser.open(url)

    def load() -> Sam4MLLM:
        return load_models(
            mllm, adapter, format, sam, sam_decoder, device, sam_dtype=sam_dtype, proposer=proposer
        )

    serve(
        load,
        Address.on(host, port, allowed_host or ()),
        announce,
        loading=loading(
            mllm, adapter, format, sam, sam_decoder, sam_dtype=sam_dtype, proposer=proposer
        ),
        folder=folder,
        policy=ImagePolicy(allow_network=network, max_pixels=max_pixels, max_bytes=max_bytes),
    )


def loading(
    mllm: str,
    adapter: str | None,
    format: str | None,
    sam: str,
    sam_decoder: str | None,
    *,
    sam_dtype: str,
    proposer: str,
) -> str:
    """The options as Python code that calls :func:`sam4mllm_tool.load`, defaults left out."""
    segmenter_options = {"decoder": sam_decoder or None, "dtype": sam_dtype or "auto"}
    given: dict[str, Any] = {
        "adapter": adapter or None,
        "segmenter": sam,
        "format": format or None,
        "proposer": proposer or "mllm",
        "segmenter_options": {
            k: v for k, v in segmenter_options.items() if v not in (None, "auto")
        },
    }
    defaults: tuple[Any, ...] = (None, "embedded", "mllm", {})
    arguments = [] if mllm == "embedded" else [repr(mllm)]
    arguments += [f"{name}={value!r}" for name, value in given.items() if value not in defaults]
    return f"load({', '.join(arguments)})"
