"""``dialogues`` and ``train``, as a researcher types them."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sam4mllm_tool.cli import app
from sam4mllm_tool.datasets import load_examples
from sam4mllm_tool.errors import DatasetError, InputError
from sam4mllm_tool.pipeline.model import load
from sam4mllm_tool.scenes.export import export_scenes
from sam4mllm_tool.scenes.world import SMALL_WORLD

RUNNER = CliRunner()


def run(*arguments: object) -> str:
    result = RUNNER.invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def refcoco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_scenes(
        tmp_path_factory.mktemp("refcoco"), 0, 6, "train", "refcoco", world=SMALL_WORLD
    )


def test_conversations_are_shown_and_their_points_drawn(tmp_path: Path) -> None:
    output = run("dialogues", "--count", 3, "--show", 2, "--out", tmp_path, "--vqa-share", 0)
    assert output.count("image small-") == 2
    assert "Please provide the bounding box" in output
    assert "Check if the points listed below are located on the object" in output
    assert len(list(tmp_path.glob("*.png"))) == 2
    assert output == run("dialogues", "--count", 3, "--show", 2, "--out", tmp_path)


def test_scenes_do_not_give_absence_away() -> None:
    output = run("dialogues", "--count", 12, "--show", 30, "--ppg", 0)
    asked = re.findall(r"\((1|1\+|0\+)\):\s+\"[^\"]+\"\.\s+assistant (\S+)", output)
    found = [reply.startswith("[") for count, reply in asked if count == "0+"]
    assert True in found and False in found
    assert all(reply.startswith("[") for count, reply in asked if count != "0+")


def test_every_world_gets_its_turn() -> None:
    worlds = ("--world", "small", "--world", "full")
    output = run("dialogues", "--count", 2, "--show", 30, "--ppg", 0, *worlds)
    assert {"small-0", "full-0", "small-1", "full-1"} <= set(re.findall(r"image (\S+)", output))
    with pytest.raises(InputError, match="no world"):
        run("dialogues", "--world", "flat")


def test_vqa_is_read_from_a_file(tmp_path: Path, refcoco: Path) -> None:
    picture = next(refcoco.rglob("*.jpg"))
    said = [{"from": "human", "value": "<image>\nHow warm?"}, {"from": "gpt", "value": "Quite."}]
    records = [{"id": "a", "image": picture.name, "conversations": said}]
    (tmp_path / "vqa.json").write_text(json.dumps(records))
    (tmp_path / "images").symlink_to(picture.parent)
    output = run("dialogues", "--data", f"vqa={tmp_path}/vqa.json", "--data", f"refcoco={refcoco}")
    assert "How warm?" in output and "Quite." in output and "bounding box" in output


def test_pictures_of_other_splits_are_not_learnt_from(refcoco: Path, tmp_path: Path) -> None:
    """A picture that also stands in val (of this or of a named data set) is left out."""
    learnt = dict.fromkeys(e.image_id for e in load_examples("refcoco", refcoco, "train"))
    refs = next(refcoco.rglob("refs*.json"))
    records = json.loads(refs.read_text())
    barred = str(next(iter(learnt)))
    for record in records:
        if str(record["image_id"]) == barred:
            record["split"] = "val"
            break
    refs.write_text(json.dumps(records))
    options = ["--data", f"refcoco={refcoco}", "--show", 99]
    shown = set(re.findall(r"image (\S+)", run("dialogues", *options)))
    assert shown == {str(image) for image in learnt} - {barred}
    with pytest.raises(DatasetError):  # named, so that it has to be there
        run("dialogues", *options, "--exclude", f"refcoco+={refcoco}")


def test_an_adapter_is_trained_examined_and_served(tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    options = ["--count", 3, "--rank", 4, "--vqa-share", 0.2, "--held-out", 1, "--save-steps", 4]
    run("train", "--out", out, *options, "--tensorboard", "--device", "cpu")
    about = json.loads((out / "sam4mllm.json").read_text())
    assert about["base_model"] == "embedded"
    assert about["lora"]["rank"] == 4 and about["lora"]["alpha"] == 8
    assert about["data"]["loosened"] > 0
    states = sorted(out.rglob("trainer_state.json"), key=lambda p: len(p.read_text()))
    history = json.loads(states[-1].read_text())["log_history"]
    assert any("eval_box_acc50" in line for line in history)
    assert any("eval_loss" in line for line in history)
    assert list((out / "tensorboard").glob("events*"))
    assert str(out) in load(adapter=str(out), device="cpu").mllm.name
    with pytest.raises(InputError, match="unknown preset"):
        run("train", "--out", out, "--preset", "huge")
