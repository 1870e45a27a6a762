"""The one place where backends and pipeline are wired together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sam4mllm_tool import embedded
from sam4mllm_tool.formats import get_format
from sam4mllm_tool.pipeline import Sam4MLLM, Settings
from sam4mllm_tool.protocols import Segmenter

if TYPE_CHECKING:
    from sam4mllm_tool.mllm.endpoint import OpenAIEndpointMllm
    from sam4mllm_tool.mllm.local import LocalMllm

EMBEDDED = "embedded"


def load(
    mllm: str = EMBEDDED,
    *,
    adapter: str | None = None,
    segmenter: str = EMBEDDED,
    device: str = "auto",
    dtype: str = "auto",
    format: str | None = None,
    settings: Settings | None = None,
    **mllm_options: Any,
) -> Sam4MLLM:
    """Load an MLLM (with an optional PEFT adapter) and a segmenter.

    Args:
        mllm: ``"embedded"`` (with an adapter: the base it was trained over), a directory or hub id
            of a transformers image-text-to-text model, or the address of an OpenAI-compatible
            server (``http://host:8000/v1``).
        adapter: directory or hub id of a PEFT adapter over it.
        segmenter: ``"embedded"``, a segment-anything checkpoint file, or a directory or hub id of
            a transformers SAM family.
        device: ``"auto"`` (CUDA, then MPS, then CPU), or a torch device.
        dtype: ``"auto"`` (bfloat16 on CUDA, else float32), or a torch dtype name.
        format: name of a dialogue format, if the checkpoint's own should not be used.
        settings: how the dialogue is held.
        mllm_options: passed on to ``LocalMllm.from_pretrained`` or ``OpenAIEndpointMllm``.

    Raises:
        CheckpointError: a checkpoint is missing, corrupt or of the wrong kind.
        DeviceOutOfMemory: the device is too small for it.
        EndpointError: the server cannot be reached.
    """
    served = is_address(mllm)
    options = mllm_options if served else {"device": device, "dtype": dtype, **mllm_options}
    talker = load_mllm(mllm, adapter=adapter, **options)
    return Sam4MLLM(
        mllm=talker,
        segmenter=load_sam(segmenter, device=device),
        settings=settings or Settings(),
        format=get_format(format) if format else talker.own_format,
    )


def is_address(name: str) -> bool:
    """Whether an MLLM's name is the address of a server."""
    return name.startswith(("http://", "https://"))


def load_mllm(
    name: str = EMBEDDED, *, adapter: str | None = None, **options: Any
) -> LocalMllm | OpenAIEndpointMllm:
    """The MLLM of that name; the embedded one comes with its own adapter.

    A server's adapter is a model of its own there: its name is the option ``model``.
    """
    if is_address(name):
        # Kept here: only who has a server needs the client.
        from sam4mllm_tool.mllm.endpoint import OpenAIEndpointMllm

        if adapter is not None:
            options.setdefault("model", adapter)
        return OpenAIEndpointMllm(name, **options)
    from sam4mllm_tool.mllm.local import LocalMllm, base_of

    if name == EMBEDDED and adapter is not None:
        name = base_of(adapter) or EMBEDDED
    if name == EMBEDDED:
        name = str(embedded.MLLM)
        # Reports should read the same wherever it is installed.
        options.setdefault("name", EMBEDDED + (f" + {adapter}" if adapter else ""))
        if adapter is None and embedded.ADAPTER.is_dir():
            adapter = str(embedded.ADAPTER)
            options.setdefault("merge_adapter", True)  # nothing will be taught to it: be quick
    return LocalMllm.from_pretrained(name, adapter=adapter, **options)


def load_sam(name: str = EMBEDDED, *, device: str = "auto") -> Segmenter:
    """The segmenter of that name."""
    from sam4mllm_tool.segmenter import load_segmenter

    return load_segmenter(str(embedded.SAM) if name == EMBEDDED else name, device=device)
