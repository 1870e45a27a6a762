"""Training goes on from the last whole checkpoint, whatever a kill or a full disk has left."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_training import PQPP, _examples, base  # noqa: F401

import sam4mllm_tool.training.checkpoints as checkpoints
from sam4mllm_tool.errors import StorageError
from sam4mllm_tool.training.dialogues import conversations
from sam4mllm_tool.training.lora import train
from sam4mllm_tool.training.recipe import LoraRecipe

RECIPE = LoraRecipe(
    rank=2, alpha=2, dropout=0.1, rate=1e-2, epochs=4, batch=2, accumulate=1, bf16=False,
    checkpointing=False,
)  # fmt: skip


def _learn(base: Path, out: Path, **options: object) -> dict[str, torch.Tensor]:  # noqa: F811
    torch.set_num_threads(1)
    found = list(conversations(_examples() * 2, PQPP))
    train(base, found, out, RECIPE, PQPP, device="cpu", save_steps=2, **options)  # type: ignore[arg-type]
    return load_file(out / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:  # noqa: F811
    """A whole run, and the folder of one that was stopped after six of eight steps."""
    folder = tmp_path_factory.mktemp("run")
    whole = _learn(base, folder / "whole")
    _learn(base, folder / "stopped", stop_after=6)
    (folder / "stopped/adapter_model.safetensors").unlink()
    return folder / "stopped", whole


DAMAGE = {
    "optimizer cut off": lambda f: _cut(f / "optimizer.pt"),
    "a byte of the optimizer": lambda f: _flip(f / "optimizer.pt"),
    "weights cut off": lambda f: _cut(f / "adapter_model.safetensors"),
    "no state": lambda f: (f / "trainer_state.json").unlink(),
    "half a state": lambda f: _cut(f / "trainer_state.json"),
    "random numbers empty": lambda f: (f / "rng_state.pth").write_bytes(b""),
}


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_torn_checkpoint_falls_back_to_the_one_before(
    run: tuple[Path, dict], tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(run[0] / "checkpoints", tmp_path / "checkpoints"))
    newest, before = folder / "checkpoint-6", folder / "checkpoint-4"
    assert checkpoints.last_whole(folder) == newest
    DAMAGE[damage](newest)
    assert checkpoints.last_whole(folder) == before
    assert "checkpoint-6 is incomplete" in caplog.text
    assert (folder / "torn-checkpoint-6").is_dir() and not newest.exists()
    DAMAGE[damage](before)
    assert checkpoints.last_whole(folder) is None
    assert checkpoints.last_whole(tmp_path / "nowhere") is None


def test_the_weights_are_those_of_a_run_that_never_stopped(
    base: Path,  # noqa: F811
    run: tuple[Path, dict],
    tmp_path: Path,
) -> None:
    stopped, whole = run
    for case, damage in (("torn", True), ("whole", False), ("none", None)):
        out = Path(shutil.copytree(stopped, tmp_path / case))
        if damage:
            _cut(out / "checkpoints/checkpoint-6/optimizer.pt")
        if damage is None:
            shutil.rmtree(out / "checkpoints")
        again = _learn(base, out, resume=True)
        assert again.keys() == whole.keys()
        assert all(torch.equal(again[name], whole[name]) for name in whole), case


def test_a_full_disk_is_a_typed_error_and_the_checkpoint_before_is_kept(
    base: Path,  # noqa: F811
    run: tuple[Path, dict],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second checkpoint finds no room for its optimizer."""
    save, saved = torch.save, []

    def full(value: object, file: object, *arguments: object, **options: object) -> None:
        save(value, file, *arguments, **options)
        if os.fspath(file).endswith("optimizer.pt"):  # type: ignore[call-overload]
            saved.append(file)
            if len(saved) == 2:
                _cut(Path(os.fspath(file)))  # type: ignore[call-overload]
                raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StorageError, match="No space left") as error:
        _learn(base, tmp_path)
    assert error.value.retryable
    monkeypatch.undo()
    again = _learn(base, tmp_path, resume=True)
    assert all(torch.equal(again[name], run[1][name]) for name in again)


FULL = {  # on file systems of 100 to 380 KiB
    "basic_ios::clear: iostream error": RuntimeError,
    "[enforce fail at inline_container.cc:672] . unexpected pos 31872 vs 31764": RuntimeError,
    "Error while serializing: I/O error: No space left on device (os error 28)": SafetensorError,
}


@pytest.mark.parametrize("said", FULL)
def test_what_pytorch_and_safetensors_say_of_a_full_disk_is_typed(
    said: str, tmp_path: Path
) -> None:
    with pytest.raises(StorageError, match="cannot be written"), checkpoints.saving(tmp_path):
        raise FULL[said](said)
    with pytest.raises(RuntimeError, match="shape"), checkpoints.saving(tmp_path):
        raise RuntimeError("mat1 and mat2 have another shape")
