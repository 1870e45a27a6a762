"""MLLM backends: a local transformers engine with prefix reuse, its full-recompute oracle, and
OpenAI-compatible endpoints.

Backends are imported inside :func:`load_mllm`: torch takes seconds, and only users of a server
need its client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sam4mllm_tool import embedded
from sam4mllm_tool.errors import check_options

if TYPE_CHECKING:
    from sam4mllm_tool.mllm.endpoint import OpenAIEndpointMllm
    from sam4mllm_tool.mllm.local import LocalMllm

__all__ = ["is_address", "load_mllm"]


def is_address(name: str) -> bool:
    """Whether an MLLM's name is the address of a server."""
    return name.startswith(("http://", "https://"))


def load_mllm(
    name: str = embedded.NAME,
    *,
    adapter: str | None = None,
    recompute: bool = False,
    **options: Any,
) -> LocalMllm | OpenAIEndpointMllm:
    """The MLLM of that name; the embedded one comes with its own adapter.

    Args:
        name: as in :meth:`sam4mllm_tool.Sam4MLLM.from_pretrained`.
        adapter: a PEFT adapter over it. A server's adapter is a model of its own there: its name
            is the option ``model``.
        recompute: start every question over, without reusing anything (slow; for comparisons).
        options: passed on to ``LocalMllm.from_pretrained`` or ``OpenAIEndpointMllm``.

    Raises:
        InputError: an option that this kind of MLLM does not have.
        CheckpointError: a checkpoint is missing, corrupt or of the wrong kind.
        DeviceOutOfMemory: the device is too small for it.
        EndpointError: the server cannot be reached.
    """
    if is_address(name):
        from sam4mllm_tool.mllm.endpoint import OpenAIEndpointMllm

        check_options(options, OpenAIEndpointMllm)
        if adapter is not None:
            options.setdefault("model", adapter)
        return OpenAIEndpointMllm(name, **options)
    from sam4mllm_tool.mllm.local import LocalMllm, base_of
    from sam4mllm_tool.mllm.oracle import RecomputeMllm

    check_options(options, LocalMllm.from_pretrained)
    if name == embedded.NAME and adapter is not None:
        name = base_of(adapter) or embedded.NAME
    if name == embedded.NAME:
        name = str(embedded.MLLM)
        # Reports should read the same wherever it is installed.
        options.setdefault("name", embedded.NAME + (f" + {adapter}" if adapter else ""))
    kind = RecomputeMllm if recompute else LocalMllm
    return kind.from_pretrained(name, adapter=adapter, **options)
