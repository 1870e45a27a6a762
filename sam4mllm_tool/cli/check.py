"""``sam4mllm-tool check``: does a checkpoint work as it should?"""

from __future__ import annotations

from typing import Annotated

import typer

from sam4mllm_tool.checkup.findings import Finding
from sam4mllm_tool.cli.common import (
    EXIT_BACKEND,
    AdapterOption,
    DeviceOption,
    FormatOption,
    JsonOption,
    MllmOption,
    SamDecoderOption,
    SamDtypeOption,
    SamOption,
    console,
    print_json,
)

_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red"}


def check(
    mllm: MllmOption = "embedded",
    adapter: AdapterOption = None,
    format: FormatOption = None,
    sam: SamOption = "embedded",
    sam_decoder: SamDecoderOption = None,
    sam_dtype: SamDtypeOption = "auto",
    device: DeviceOption = "auto",
    scenes: Annotated[int, typer.Option(min=1, max=500, help="Drawn scenes to ask about.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Check a checkpoint in a few minutes: tokens, logits, replies, boxes, points, masks."""
    from sam4mllm_tool.checkup.run import check_up
    from sam4mllm_tool.pipeline.model import Sam4MLLM, load

    def loaded() -> Sam4MLLM:
        return load(
            mllm,
            adapter=adapter,
            format=format,
            segmenter=sam,
            device=device,
            segmenter_options={"decoder": sam_decoder, "dtype": sam_dtype},
        )

    findings: list[Finding] = []
    for finding in check_up(loaded, scenes=scenes):
        findings.append(finding)
        if not as_json:
            _show(finding)
    if as_json:
        print_json([finding.to_json() for finding in findings])
    if any(finding.verdict == "fail" for finding in findings):
        raise typer.Exit(EXIT_BACKEND)


def _show(finding: Finding) -> None:
    style = _STYLES[finding.verdict]
    console.print(f"[{style}]{finding.verdict}[/]  [bold]{finding.check}[/]: ", end="")
    console.print(finding.detail, markup=False, highlight=False, soft_wrap=True)
    if finding.advice:
        console.print(f"      {finding.advice}", markup=False, highlight=False, soft_wrap=True)
