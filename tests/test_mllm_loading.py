"""A checkpoint that cannot be used gives an error that says what to do."""

from __future__ import annotations

import json
import shutil
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import enable_progress_bars
from mllm_dialogues import FORM, ask_box
from random_models import build, picture
from safetensors.torch import load_file, save_file

from sam4mllm_tool import embedded
from sam4mllm_tool.concurrency import CallCancelled, CallContext, call_context
from sam4mllm_tool.errors import CheckpointError, DeviceOutOfMemory
from sam4mllm_tool.mllm import files, loading, placement
from sam4mllm_tool.mllm.local import LocalMllm
from sam4mllm_tool.protocols import CheckpointNotes, Mllm, YesNoWords
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
    assert "on the Hub" in str(fails("nobody/has-this-model"))


def test_a_misspelt_name_names_the_nearest_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Did you mean 'embedded'?" in fails("embeded").hint
    assert f"Did you mean {str(folder)!r}?" in fails(folder.parent / "chekpoint").hint
    assert "Did you mean" not in fails(folder.parent / "quite different").hint
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hint = fails("Qwen/Qwen2.5-VL-7B-Instuct").hint
    assert "Did you mean 'Qwen/Qwen2.5-VL-7B-Instruct'?" in hint


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


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"]
)
def test_a_file_cut_short_is_named(folder: Path, name: str) -> None:
    file = folder / name
    file.write_bytes(file.read_bytes()[:-20])
    assert str(file) in str(fails(folder))


def test_a_download_that_was_broken_off_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.safetensors.part")
    said = str(fails(folder))
    assert "model.safetensors is missing" in said and "model.safetensors.part" in said
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    (folder / "model.safetensors.part").rename(folder / shards["a"])
    assert shards["b"] in str(fails(folder))
    index.write_text(json.dumps({"weight_map": None}))
    assert index.name in str(fails(folder))


def test_a_pointer_in_place_of_a_file_is_named(folder: Path) -> None:
    """What a clone without Git LFS holds."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 15\n"
    (folder / "model.safetensors").write_text(pointer)
    error = fails(folder)
    assert "model.safetensors" in str(error) and "git lfs pull" in error.hint


def test_a_tokenizer_without_one_token_for_yes_is_named(folder: Path) -> None:
    mllm = LocalMllm.from_pretrained(folder, device="cpu")
    words = YesNoWords(yes=("Certainly",), no=("No",))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*'Certainly'"):
        mllm.answer_yes_no(picture(0), ask_box("abc", picture(0)), words=words, count=1)


# --- the hub --------------------------------------------------------------------------------------


def test_a_hub_that_falls_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = threading.Event()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: silent.wait(30))
    monkeypatch.setattr(files, "HUB_PATIENCE", 0.3)
    begun = time.monotonic()
    try:
        assert "no answer within" in str(fails("nobody/has-this-model"))
    finally:
        silent.set()
    assert time.monotonic() - begun < 5


def test_a_slow_hub_is_not_given_up_while_bytes_come(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def download(name: str, *, tqdm_class: Any, **_: Any) -> str:
        with tqdm_class(total=6, desc="model.safetensors", mininterval=0) as bar:
            for _ in range(6):
                time.sleep(0.1)
                bar.update(1)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(files, "HUB_PATIENCE", 0.3)
    enable_progress_bars()  # building the random model turned them off
    stages: list[str] = []
    with call_context(CallContext(on_stage=stages.append)):
        assert files.find_checkpoint("some/model") == folder
    assert stages == ["download"]
    assert "model.safetensors" in capfd.readouterr().err, "progress is shown meanwhile"


def test_a_cancelled_call_waits_for_no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    silent, context = threading.Event(), CallContext()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: silent.wait(30))
    context.cancelled.set()
    try:
        with call_context(context), pytest.raises(CallCancelled):
            files.find_checkpoint("some/model")
    finally:
        silent.set()


# --- device, dtype and room -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "able", "expected"),
    [
        ("cuda", True, torch.bfloat16),
        ("cuda", False, torch.float16),  # Volta, Turing: bfloat16 only emulated
        ("mps", True, torch.bfloat16),
        ("mps", False, torch.float16),  # before macOS 14
        ("cpu", True, torch.float32),
    ],
)
def test_the_usual_dtype_is_one_the_device_calculates_in(
    device: str, able: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def native(including_emulation: bool = True) -> bool:
        return able or including_emulation  # as torch answers on a T4

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", native)
    monkeypatch.setattr(
        torch.backends.mps, "is_macos_or_newer", lambda major, minor: able and major <= 14
    )
    assert placement.usual_dtype(torch.device(device)) is expected


def test_weights_go_straight_to_their_device() -> None:
    cpu = placement.choose_placement("cpu", "float32")
    assert "device_map" not in loading._options(cpu)
    gpu = replace(cpu, device=torch.device("cuda:1"), dtype=torch.bfloat16)
    options = loading._options(gpu)
    assert options["device_map"] == {"": torch.device("cuda:1")}
    assert options["dtype"] is torch.bfloat16
    spread = replace(gpu, device_map="auto")
    assert loading._options(spread)["device_map"] == "auto"


def test_weights_loaded_by_a_device_map_are_the_same(folder: Path) -> None:
    plain = LocalMllm.from_pretrained(folder, device="cpu").model.state_dict()
    placed = LocalMllm.from_pretrained(folder, device="cpu", device_map={"": "cpu"}).model
    for name, weight in placed.state_dict().items():
        assert torch.equal(weight, plain[name])


def test_caches_get_what_the_weights_leave(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = placement.choose_placement("cpu", "float32")
    weights = placement.weight_bytes(folder, on_cpu)

    def room(free: float, wanted: int | None = None, reserve: int = 0) -> int:
        monkeypatch.setattr(placement, "_free_bytes", lambda device: int(free))
        return placement.cache_room(folder, on_cpu, wanted, reserve)

    assert room(1e12) == placement.USUAL_CACHE
    small = room(3 * weights)
    assert 0 < 2 * small + 1.15 * weights < 3 * weights
    assert room(3 * weights, reserve=weights) < small
    assert room(4 * weights, wanted=weights) == weights
    for wanted, reserve in ((2 * weights, 0), (weights, 2 * weights)):
        with pytest.raises(DeviceOutOfMemory, match="caches") as caught:
            room(4 * weights, wanted, reserve)
        assert "cache_bytes" in caught.value.hint


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
    assert mllm.notes == CheckpointNotes(vocabulary=frozenset({"red", "dog"}))


def test_notes_bound_what_a_checkpoint_is_asked(folder: Path) -> None:
    (folder / "sam4mllm.json").write_text('{"lower_case": true, "points_per_question": 16}')
    notes = LocalMllm.from_pretrained(folder, device="cpu").notes
    assert notes.lower_case and notes.points_per_question == 16
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
    on_cpu = placement.choose_placement("cpu", "float32")
    needed = placement.weight_bytes(folder, on_cpu)
    assert needed == sum(t.numel() * 4 for t in load_file(folder / "model.safetensors").values())
    half = placement.choose_placement("cpu", "bfloat16")
    assert placement.weight_bytes(folder, half) * 2 == needed
    monkeypatch.setattr(placement, "_free_bytes", lambda device: needed)
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


def test_an_adapter_with_more_than_fits_is_not_loaded_in_part(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = loading.load_model(folder, placement.choose_placement("cpu", "float32"))
    settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(model, settings).save_pretrained(tmp_path, save_embedding_layers=False)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    LocalMllm.from_pretrained(folder, tmp_path, device="cpu")
    deeper = "base_model.model.model.language_model.layers.30.self_attn.q_proj.lora_A.weight"
    save_file({**whole, deeper: torch.zeros(2, 64)}, file)
    assert "layers.30" in str(fails(folder, adapter=tmp_path))
    save_file({k: v for k, v in whole.items() if "lm_head" not in k}, file)
    assert "lm_head" in str(fails(folder, adapter=tmp_path))


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
    assert mllm.format_name == "sam4mllm" and mllm.notes.vocabulary
