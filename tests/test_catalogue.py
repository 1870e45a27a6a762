"""The list of known combinations: its numbers add up and its commands can be typed."""

import json
import shlex

import pytest
import torch
import typer
from safetensors import safe_open
from typer.testing import CliRunner

from sam4mllm_tool import embedded
from sam4mllm_tool.catalogue import (
    MLLM_BYTES,
    XL1,
    combinations,
    is_hub_id,
    nearest_checkpoint,
)
from sam4mllm_tool.cli import app
from sam4mllm_tool.errors import CheckpointError
from sam4mllm_tool.formats import FORMATS
from sam4mllm_tool.segmenter import load_segmenter
from sam4mllm_tool.segmenter.efficientvit import VARIANTS, build_efficientvit_sam

KNOWN = combinations()
COMMANDS = [command for one in KNOWN for command in one.commands]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_can_be_typed(command):
    """Every option is one that the command takes; a server's own command is left to it."""
    program, name, *arguments = shlex.split(command)
    if program == "vllm":
        json.loads(arguments[arguments.index("--hf-overrides") + 1])
        return
    assert program == "sam4mllm-tool"
    group = typer.main.get_command(app)
    context = group.commands[name].make_context(name, arguments)
    assert context.params.get("format") in {None, *FORMATS}


def test_downloads_are_what_the_parameters_take():
    """Parameters are counted, sizes are the hub's: two sources, which agree within 1%."""
    parts = {part.name: part for one in KNOWN for part in one.mllm if part.download}
    assert len(parts) >= 5
    for part in parts.values():
        assert part.bytes_each == MLLM_BYTES
        assert part.download == pytest.approx(part.memory, rel=0.01), part.name


def test_parameters_are_those_of_the_architecture():
    with torch.device("meta"):
        sam = build_efficientvit_sam(VARIANTS["xl1"])
    assert sum(p.numel() for p in sam.parameters()) == XL1.parameters
    # "203.3M" of the makers' table
    assert round(XL1.parameters / 1e6, 1) == 203.3


def test_the_shipped_models_are_counted_from_their_files():
    (shipped,) = [one for one in KNOWN if one.run]
    with safe_open(embedded.MLLM / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert shipped.mllm[0].parameters == pytest.approx(stored, rel=0.02)
    assert shipped.download == 0 and shipped.memory < 100e6


def test_the_list_is_printed_as_a_table_and_as_json():
    shown = CliRunner().invoke(app, ["models"], env={"COLUMNS": "200"}).output
    document = json.loads(CliRunner().invoke(app, ["models", "--json"]).output)
    assert [one["name"] for one in document] == [one.name for one in KNOWN]
    for one in KNOWN:
        assert all(command in shown for command in one.commands)
    assert "run by us" in shown and "unknown size" in shown and "18.2 GB" in shown
    paper = document[1]
    assert paper["run"] is False and paper["downloads_of_unknown_size"] == 2
    assert paper["memory_bytes"] == sum(
        part["parameters"] * part["bytes_each"] for part in paper["mllm"] + paper["segmenter"]
    )


def test_a_misspelt_name_names_the_nearest_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "sam_vit_h_4b8939.pth").touch()
    (tmp_path / "llava-next").mkdir()
    (tmp_path / "README.md").touch()
    monkeypatch.chdir(tmp_path)
    near = {
        "embeded": "embedded",
        "llava-hf/llama3-llava-next-8b": "llava-hf/llama3-llava-next-8b-hf",
        "facebook/sam2.1-hiera-lage": "facebook/sam2.1-hiera-large",
        "lava-next": "llava-next",
        str(tmp_path / "sam_vit_h_4b8939.pt"): str(tmp_path / "sam_vit_h_4b8939.pth"),
    }
    for name, meant in near.items():
        assert nearest_checkpoint(name) == f"Did you mean {meant!r}? "
    assert nearest_checkpoint("something else") == nearest_checkpoint("/no/such/folder") == ""


@pytest.mark.parametrize(
    ("name", "on_the_hub"),
    [("Qwen/Qwen2.5-VL", True), ("embeded", False), ("./a", False), ("/a", False), ("~/a", False),
     ("a/b/c", False), ("../a", False)],
)  # fmt: skip
def test_only_owner_and_name_are_looked_for_on_the_hub(name, on_the_hub):
    assert is_hub_id(name) == on_the_hub


def test_a_misspelt_segmenter_is_refused_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    for name, hint in (("embeded", "Did you mean 'embedded'?"), (tmp_path / "none", "Give a")):
        with pytest.raises(CheckpointError, match="no segmenter at") as caught:
            load_segmenter(name)
        assert caught.value.hint.startswith(hint)
