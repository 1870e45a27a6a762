"""A forward pass that does not do what the engine counts on ends with an error, not an answer."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mllm_dialogues import FORM, answers, ask_box, ask_points, check_same
from random_models import build, picture
from transformers import TrainingArguments

from sam4mllm_tool.errors import BackendError
from sam4mllm_tool.mllm.engine import cache_argument
from sam4mllm_tool.mllm.local import LocalMllm
from sam4mllm_tool.mllm.oracle import RecomputeMllm
from sam4mllm_tool.training.lora import recomputing
from sam4mllm_tool.types import TargetCount

ONE = FORM.box_grammar(TargetCount.ONE)
IMAGE = picture(50)
OPENING = ask_box("abc", IMAGE)
QUESTION = ask_points(OPENING, "[001,002,800,900]", IMAGE, 5, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("qwen2_5_vl", tmp_path_factory.mktemp("passes"))


@pytest.fixture
def mllm(folder: Path) -> LocalMllm:
    return LocalMllm.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def truth(folder: Path) -> LocalMllm:
    return RecomputeMllm.from_pretrained(folder, device="cpu")


# --- the cache's name -----------------------------------------------------------------------------


def without_shim(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from transformers 5.40 on: the old name goes into ``**kwargs`` and is not looked at."""
    for kind in (type(model), type(model.model), type(model.model.language_model)):
        monkeypatch.setattr(kind, "forward", bare(kind.forward))


def bare(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` without the decorator that renames an argument."""

    def call(self: Any, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    call.__wrapped__ = forward  # type: ignore[attr-defined]
    return call


def test_later_versions_without_the_old_name(
    mllm: LocalMllm, truth: LocalMllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_shim(mllm.model, monkeypatch)
    said = [mllm.generate(IMAGE, OPENING, grammar=ONE).text for _ in range(2)]
    assert said == [truth.generate(IMAGE, OPENING, grammar=ONE).text] * 2
    check_same(answers(mllm, IMAGE, QUESTION, 5), answers(truth, IMAGE, QUESTION, 5))


def test_earlier_versions_take_the_old_name(
    folder: Path, truth: LocalMllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    mllm = LocalMllm.from_pretrained(folder, device="cpu")
    expected = answers(truth, IMAGE, QUESTION, 5)
    kind, forward = type(mllm.model), type(mllm.model).forward

    def earlier(self: Any, *, past_key_values: Any = None, **kwargs: Any) -> Any:
        out = forward(self, cache=past_key_values, **kwargs)
        return type("Output", (), {"logits": out.logits, "past_key_values": out.cache})()

    monkeypatch.setattr(kind, "forward", earlier)
    assert cache_argument(mllm.model) == "past_key_values"
    mllm = LocalMllm(mllm.model, mllm.encoder.processor, name="earlier")
    check_same(answers(mllm, IMAGE, QUESTION, 5), expected)


def test_a_cache_that_is_not_taken_is_an_error(
    mllm: LocalMllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model would answer as if it had seen neither picture nor question."""
    mllm.generate(IMAGE, OPENING, grammar=ONE)
    forward = type(mllm.model).forward

    def forgetful(self: Any, cache: Any = None, **kwargs: Any) -> Any:
        return forward(self, **kwargs)

    monkeypatch.setattr(type(mllm.model), "forward", forgetful)
    with pytest.raises(BackendError, match="cache holds"):
        answers(mllm, IMAGE, QUESTION, 5)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_our_calls_are_not_deprecated(family: str, tmp_path: Path) -> None:
    """Neither while loading nor while asking, whoever the warning is meant for."""
    folder = build(family, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        for kind in (LocalMllm, RecomputeMllm):
            mllm = kind.from_pretrained(folder, device="cpu")
            mllm.generate(IMAGE, OPENING, grammar=ONE)
            mllm.generate(IMAGE, OPENING, max_new_tokens=3)
            mllm.alternates(IMAGE, OPENING, grammar=ONE, count=2)
            answers(mllm, IMAGE, QUESTION, 5)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_trainers_arguments_are_not_deprecated(wanted: bool, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to=[], **recomputing(wanted)
        )
    assert arguments.activation_checkpointing is wanted


# --- logits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", [LocalMllm, RecomputeMllm])
def test_logits_that_are_not_finite_are_no_answer(
    folder: Path, kind: type[LocalMllm], value: float
) -> None:
    mllm = kind.from_pretrained(folder, device="cpu")
    head = mllm.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: torch.full_like(out, value))
    for ask in (
        lambda: mllm.generate(IMAGE, OPENING, grammar=ONE),
        lambda: mllm.generate(IMAGE, OPENING, max_new_tokens=3),
        lambda: mllm.alternates(IMAGE, OPENING, grammar=ONE, count=2),
        lambda: answers(mllm, IMAGE, QUESTION, 5),
    ):
        with pytest.raises(BackendError, match="not finite") as caught:
            ask()
        assert "dtype" in caught.value.hint


def test_a_checkpoints_sampling_settings_change_no_answer(
    folder: Path, tmp_path: Path, truth: LocalMllm
) -> None:
    """Qwen2.5-VL's generation_config.json asks for a repetition penalty (1.05; here stronger)."""
    strict = Path(shutil.copytree(folder, tmp_path / "strict"))
    file = strict / "generation_config.json"
    settings = json.loads(file.read_text())
    settings |= {"do_sample": True, "repetition_penalty": 3.0, "temperature": 0.7, "top_p": 0.8}
    file.write_text(json.dumps(settings))
    for kind in (LocalMllm, RecomputeMllm):
        mllm = kind.from_pretrained(strict, device="cpu")
        for grammar in (ONE, None):
            said = mllm.generate(IMAGE, OPENING, grammar=grammar, max_new_tokens=12)
            plain = truth.generate(IMAGE, OPENING, grammar=grammar, max_new_tokens=12)
            assert said.text == plain.text
            assert said.log_probability == pytest.approx(plain.log_probability, abs=1e-3)
        check_same(answers(mllm, IMAGE, QUESTION, 5), answers(truth, IMAGE, QUESTION, 5))
