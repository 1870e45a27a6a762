"""A checkpoint that cannot be used gives an error that says what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from mllm_dialogues import FORM, ask_box
from random_models import build, picture
from safetensors.torch import load_file, save_file

from sam4mllm_tool import embedded
from sam4mllm_tool.errors import CheckpointError, DeviceOutOfMemory
from sam4mllm_tool.mllm import loading
from sam4mllm_tool.mllm.local import LocalMllm
from sam4mllm_tool.protocols import Mllm, Taught
from sam4mllm_tool.types import TargetCount


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llava", tmp_path_factory.mktemp("loading"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "checkpoint"))


def fails(folder: Path | str, **options: object) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        LocalMllm.from_pretrained(folder, device="cpu", **options)  # type: ignore[arg-type]
    assert caught.value.hint
    return caught.value


def test_missing_folder(tmp_path: Path) -> None:
    assert "no checkpoint directory" in str(fails(tmp_path / "nowhere"))


def test_a_hub_id_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "hub" in str(fails("nobody/has-this-model"))


def test_a_file_is_no_folder(folder: Path) -> None:
    fails(folder / "config.json")


def test_empty_folder(tmp_path: Path) -> None:
    fails(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_is_missing(folder: Path, name: str) -> None:
    (folder / name).unlink()
    fails(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("keep", [0, 100])
def test_a_file_is_cut_short(folder: Path, name: str, keep: int) -> None:
    file = folder / name
    file.write_bytes(file.read_bytes()[:keep])
    fails(folder)


def test_truncated_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "damaged" in str(fails(folder))


def test_only_safetensors_are_read(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "safetensors" in str(fails(folder))


def test_weights_of_another_shape_or_none(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if "q_proj" in key)
    save_file(weights | {name: torch.zeros(3, 3)}, folder / "model.safetensors", {"format": "pt"})
    fails(folder)
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "missing" in str(fails(folder))


def test_a_text_model_is_the_wrong_kind(folder: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1,
              "num_attention_heads": 1, "vocab_size": 10, "intermediate_size": 8}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    assert "chat about images" in str(fails(folder))


def test_remote_code_is_not_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('remote code ran')")
    fails(folder)


def test_without_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    assert "chat template" in str(fails(folder))


def test_damaged_notes(folder: Path) -> None:
    (folder / "sam4mllm.json").write_text("{")
    assert "sam4mllm.json" in str(fails(folder))


def test_notes_name_format_and_words(folder: Path) -> None:
    (folder / "sam4mllm.json").write_text('{"format": "other", "vocabulary": ["Red", "dog"]}')
    mllm = LocalMllm.from_pretrained(folder, device="cpu")
    assert mllm.format_name == "other"
    assert mllm.taught == Taught(frozenset({"red", "dog"}))


def test_an_adapters_notes_go_before_its_bases(folder: Path, tmp_path: Path) -> None:
    (folder / "sam4mllm.json").write_text('{"lower_case": true, "points_per_question": 16}')
    assert LocalMllm.from_pretrained(folder, device="cpu").taught == Taught(None, True, 16)
    for wrong in ("0", "-3", '"many"', "2.5"):
        (folder / "sam4mllm.json").write_text(f'{{"points_per_question": {wrong}}}')
        assert "points_per_question" in str(fails(folder))


def test_unusable_placements(folder: Path) -> None:
    for options in ({"dtype": "int8"}, {"dtype": "nonsense"}, {"quantization": "2bit"}):
        fails(folder, **options)
    with pytest.raises(CheckpointError):
        LocalMllm.from_pretrained(folder, device="no such device")
    if not torch.cuda.is_available():
        with pytest.raises(CheckpointError, match="cuda"):
            LocalMllm.from_pretrained(folder, device="cuda")


def test_quantization_needs_bitsandbytes(folder: Path) -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        assert "bitsandbytes" in str(fails(folder, quantization="4bit"))
    else:
        pytest.skip("bitsandbytes is installed")


def test_too_big_for_the_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placement = loading.choose_placement("cpu", "float32")
    needed = loading.weight_bytes(folder, placement)
    assert needed == sum(t.numel() * 4 for t in load_file(folder / "model.safetensors").values())
    half = loading.choose_placement("cpu", "bfloat16")
    assert loading.weight_bytes(folder, half) * 2 == needed
    monkeypatch.setattr(loading, "_free_bytes", lambda device: needed)
    with pytest.raises(DeviceOutOfMemory) as caught:
        LocalMllm.from_pretrained(folder, device="cpu")
    assert "4bit" in caught.value.hint
    LocalMllm.from_pretrained(folder, device="cpu", dtype="bfloat16")


def test_adapters_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    fails(folder, adapter=tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    fails(folder, adapter=empty)
    strange = tmp_path / "strange"
    strange.mkdir()
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "task_type": None}
    (strange / "adapter_config.json").write_text(json.dumps(config))
    weights = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 8)}
    save_file(weights, strange / "adapter_model.safetensors")
    assert "convert-adapter" in fails(folder, adapter=strange).hint


def test_half_precision_and_eager_attention_run(folder: Path) -> None:
    image = picture(0)
    grammar = FORM.box_grammar(TargetCount.ONE)
    for options in ({"dtype": "bfloat16"}, {"attn_implementation": "eager"}):
        mllm = LocalMllm.from_pretrained(folder, device="cpu", **options)  # type: ignore[arg-type]
        said = mllm.generate(image, ask_box("abc", image), grammar=grammar)
        assert FORM.read_boxes(said.text, image.size).boxes


def test_the_embedded_model_loads() -> None:
    mllm = LocalMllm.from_pretrained(embedded.MLLM, device="cpu")
    assert isinstance(mllm, Mllm)
    assert mllm.format_name == "sam4mllm" and mllm.taught.words
