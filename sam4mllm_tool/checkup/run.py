"""The whole check-up, one finding after the other."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator

from sam4mllm_tool.checkup.behaviour import dialogue_findings, drawn_cases, segmenter_findings
from sam4mllm_tool.checkup.findings import Finding, guarded
from sam4mllm_tool.pipeline.model import Sam4MLLM


def check_up(load: Callable[[], Sam4MLLM], *, scenes: int = 20) -> Iterator[Finding]:
    """Load a model and check it; checks that an earlier failure makes meaningless are left out.

    Args:
        load: loads the model, e.g. ``lambda: load("…")``.
        scenes: how many drawn scenes to ask about.
    """
    loaded: list[Sam4MLLM] = []
    yield from guarded("loading", lambda: _loading(load, loaded))
    if not loaded:
        return
    (model,) = loaded
    yield from guarded("SAM draws a planted ellipse", lambda: segmenter_findings(model.segmenter))
    yield from guarded("model", lambda: _mllm(model))
    yield from guarded("dialogue", lambda: dialogue_findings(model, scenes))


def _loading(load: Callable[[], Sam4MLLM], loaded: list[Sam4MLLM]) -> Iterator[Finding]:
    begun = time.perf_counter()
    model = load()
    loaded.append(model)
    seconds = time.perf_counter() - begun
    detail = f"{model.mllm.name} and {model.segmenter.name} in {seconds:.1f} s; {_memory()}"
    yield Finding("loading", "pass", detail)


def _mllm(model: Sam4MLLM) -> Iterator[Finding]:
    from sam4mllm_tool.checkup.mllm import mllm_findings
    from sam4mllm_tool.mllm.local import LocalMllm

    if not isinstance(model.mllm, LocalMllm):
        yield Finding("model", "pass", "served elsewhere; its tokens and logits are not looked at")
        return
    (case,) = drawn_cases(1)
    yield from mllm_findings(model.mllm, model.speech, case.image)


def _memory() -> str:
    """Peak memory of the process, and of the GPU if there is one."""
    import torch

    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1024**3
    text = f"{host:.1f} GiB of host memory at most"
    if torch.cuda.is_available():
        text += f", {torch.cuda.max_memory_allocated() / 1024**3:.1f} GiB of GPU memory"
    return text
