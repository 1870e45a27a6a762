"""``sam4mllm-tool serve``: the tools over HTTP, from this process or from a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sam4mllm_tool.cli.common import (
    AdapterOption,
    DeviceOption,
    FormatOption,
    MllmOption,
    SamDecoderOption,
    SamDtypeOption,
    SamOption,
    console,
)
from sam4mllm_tool.cli.engines import (
    AddressOption,
    CpusOption,
    Engine,
    EngineOption,
    GpusOption,
    require_ray,
)
from sam4mllm_tool.cli.mcp import CoordinatesOption, Transport, mcp
from sam4mllm_tool.errors import InputError


def serve(
    engine: EngineOption = Engine.LOCAL,
    replicas: Annotated[int, typer.Option(min=1, help="Ray: processes with the MLLM.")] = 1,
    sam_replicas: Annotated[
        int | None,
        typer.Option(min=1, help="Ray: processes with the segmenter; by default --replicas."),
    ] = None,
    servers: Annotated[
        int, typer.Option(min=1, help="Ray: tool servers; more than one require --state.")
    ] = 1,
    cpus: CpusOption = 0.5,
    gpus: GpusOption = 0,
    sam_gpus: Annotated[float, typer.Option(min=0, help="Ray: GPUs per segmenter.")] = 0,
    address: AddressOption = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; a token is required except on loopback.")
    ] = "127.0.0.1",
    port: int = 8765,
    token: Annotated[
        str | None, typer.Option(envvar="SAM4MLLM_TOKEN", help="Bearer token clients must send.")
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(
            envvar="SAM4MLLM_TOKENS",
            help="File with one line 'USER TOKEN' per user; handles belong to the user's token.",
        ),
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Folder that keeps handles across restarts.")
    ] = None,
    allow_dir: Annotated[
        list[Path] | None, typer.Option(help="Folder that may be read; repeatable.")
    ] = None,
    output_dir: Annotated[
        list[Path] | None,
        typer.Option(help="Folder that save_objects may write to; repeatable. None by default."),
    ] = None,
    read_only: Annotated[bool, typer.Option(help="Leave out tools that write files.")] = False,
    network: Annotated[bool, typer.Option(help="Let tools open http(s) URLs.")] = False,
    coordinates: Annotated[CoordinatesOption, typer.Option(help="Unit of coordinates.")] = (
        CoordinatesOption.PIXELS
    ),
    mllm: MllmOption = "embedded",
    adapter: AdapterOption = None,
    format: FormatOption = None,
    sam: SamOption = "embedded",
    sam_decoder: SamDecoderOption = None,
    sam_dtype: SamDtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Serve the tools to MCP clients over HTTP, with one or more model processes."""
    if engine is Engine.LOCAL:
        if replicas > 1 or servers > 1:
            raise InputError("several replicas or servers need Ray", hint="Add --engine ray.")
        mcp(
            Transport.HTTP, host=host, port=port, token=token, tokens=tokens, state=state,
            allow_dir=allow_dir, output_dir=output_dir, read_only=read_only, network=network,
            coordinates=coordinates, mllm=mllm, adapter=adapter, format=format, sam=sam,
            sam_decoder=sam_decoder, sam_dtype=sam_dtype, device=device,
        )  # fmt: skip
        return
    require_ray()
    from sam4mllm_integrations.mcp_ray import ServeSettings, serve_ray

    if servers > 1 and state is None:
        raise InputError("several tool servers need a shared state folder", hint="Add --state.")
    settings = ServeSettings(
        mllm=mllm, adapter=adapter or None, format=format or None, sam=sam,
        sam_decoder=sam_decoder or None, sam_dtype=sam_dtype, device=device, replicas=replicas,
        sam_replicas=sam_replicas, servers=servers, cpus=cpus, gpus=gpus, sam_gpus=sam_gpus,
        host=host, port=port, token=token, tokens=tokens and tokens.resolve(),
        state=state and state.resolve(), allow_dirs=absolute(allow_dir),
        output_dirs=absolute(output_dir), read_only=read_only, network=network,
        coordinates=coordinates.value,
    )  # fmt: skip
    console.print(f"starting {replicas} replicas …", markup=False, highlight=False)
    serve_ray(settings, address, on_ready=lambda: console.print(
        f"serving on http://{host}:{port}/mcp", markup=False, highlight=False, soft_wrap=True,
    ))  # fmt: skip


def absolute(folders: list[Path] | None) -> tuple[Path, ...]:
    """Absolute paths, which are valid in other processes."""
    return tuple(folder.resolve() for folder in folders or ())
