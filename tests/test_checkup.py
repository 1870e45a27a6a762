"""The check-up passes the embedded models, and finds what was broken on purpose."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from random_models import build
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from sam4mllm_tool import embedded
from sam4mllm_tool.checkup.behaviour import segmenter_findings
from sam4mllm_tool.checkup.findings import Finding
from sam4mllm_tool.checkup.run import check_up
from sam4mllm_tool.cli import app
from sam4mllm_tool.pipeline.model import Sam4MLLM, load


def findings(load_model, scenes: int = 3) -> dict[str, Finding]:
    torch.set_num_threads(1)
    return {finding.check: finding for finding in check_up(load_model, scenes=scenes)}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The embedded MLLM's folder, to be broken."""
    return Path(shutil.copytree(embedded.MLLM, tmp_path / "mllm"))


def test_the_embedded_models_pass(embedded_model):
    found = findings(lambda: embedded_model, scenes=12)
    assert {name: one.verdict for name, one in found.items()} == dict.fromkeys(found, "pass")
    assert len(found) == 10
    assert "Yes" in found["yes and no"].detail


def test_the_command_prints_one_document():
    done = CliRunner().invoke(app, ["check", "--scenes", "2", "--json"])
    document = json.loads(done.stdout)
    assert {one["verdict"] for one in document} <= {"pass", "warn"}, document
    assert done.exit_code == 0


def test_weights_that_are_not_finite_fail(copied):
    weights = load_file(copied / "model.safetensors")
    name = next(key for key in weights if key.endswith("norm.weight"))
    weights[name] = torch.full_like(weights[name], torch.nan)
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    found = findings(lambda: load(str(copied)))
    assert found["model"].verdict == "fail" and "finite" in found["model"].detail


def test_swapped_answers_are_called_reversed(embedded_model):
    speech = embedded_model.speech
    words = replace(speech.yes_no, yes=speech.yes_no.no, no=speech.yes_no.yes)
    model = replace(embedded_model, format=replace(speech, yes_no=words))
    found = findings(lambda: model, scenes=10)["points on and off them"]
    assert found.verdict == "fail" and "swapped" in found.advice


def test_a_template_that_was_not_trained_is_noticed(copied):
    template = copied / "chat_template.jinja"
    text = template.read_text()
    template.write_text(text.replace("{%- if add_generation_prompt", "{%- if false and add_gen"))
    if template.read_text() == text:
        template.write_text(text + "{{ '\\n\\nTutor:' }}")
    found = findings(lambda: load(str(copied)), scenes=6)
    assert "fail" in {one.verdict for one in found.values()}


def test_an_adapter_for_another_base_fails_at_loading(tmp_path):
    other = build("llava", tmp_path / "other")
    base = AutoModelForImageTextToText.from_pretrained(embedded.MLLM)
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "a")
    found = findings(lambda: load(str(other), adapter=str(tmp_path / "a")))
    assert list(found) == ["loading"]
    assert found["loading"].verdict == "fail" and found["loading"].advice


def test_random_weights_do_not_pass(tmp_path):
    folder = build("llava", tmp_path / "random")
    found = findings(lambda: load(str(folder), format="sam4mllm"))
    assert found["engine against plain Hugging Face"].verdict == "pass"
    assert found["boxes of drawn things"].verdict == "fail"


def test_a_sam_with_the_wrong_weights_fails(tmp_path):
    folder = Path(shutil.copytree(embedded.SAM, tmp_path / "sam"))
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    weights = {k: torch.randn_like(v.float()).to(v.dtype) * 0.05 for k, v in weights.items()}
    save_file(weights, folder / "model.safetensors")
    model: Sam4MLLM = load(segmenter=str(folder))
    (first, *_) = segmenter_findings(model.segmenter)
    assert first.verdict == "fail" and "--sam" in first.advice
