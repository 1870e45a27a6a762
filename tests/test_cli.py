"""The command line, as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from typer.testing import CliRunner

from sam4mllm_tool import embedded
from sam4mllm_tool.cli import app, main
from sam4mllm_tool.errors import CheckpointError, ImageError, InputError, PromptError

DEMO = str(embedded.DEMO / "demo.png")
RUNNER = CliRunner()


def run(*arguments: str) -> str:
    result = RUNNER.invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_segment_prints_one_json_document_whose_mask_reads_back(tmp_path):
    output = run("segment", DEMO, "the tree", "--json", "--out", tmp_path)
    document = json.loads(output)
    assert document["image_size"] == [320, 320]
    assert document["status"] == "found"
    (one,) = document["objects"]
    assert len(one["box"]) == 4
    assert {"x", "y", "label", "p_yes", "p_no"} == set(one["points"][0])
    rle = {**one["mask"], "counts": one["mask"]["counts"].encode()}
    written = np.asarray(Image.open(tmp_path / "mask_1.png")) == 255
    assert np.array_equal(coco_mask.decode(rle).astype(bool), written)
    assert one["area"] == written.sum()
    assert set(document["timings"]) >= {"locate", "points", "mask"}
    assert (tmp_path / "overlay.png").is_file()


@pytest.mark.parametrize("strategy", ["pqpp", "ppg", "adaptive", "box_only"])
def test_every_strategy_runs(strategy):
    document = json.loads(run("segment", DEMO, "the tree", "--strategy", strategy, "--json"))
    assert document["status"] == "found"


def test_candidate_points_are_spread_as_named():
    command = ("segment", DEMO, "the tree", "--points", "15", "--json", "--candidates")
    grid, jittered = (
        [(p["x"], p["y"]) for p in json.loads(run(*command, name))["objects"][0]["points"]]
        for name in ("grid", "jittered")
    )
    assert len(grid) == len(jittered) == 15 and not set(grid) & set(jittered)
    wrong = RUNNER.invoke(app, [*map(str, command), "jitered"])
    assert wrong.exit_code != 0 and "jittered" in str(wrong.exception)


def test_segment_shows_the_dialogue_and_writes_the_trace(tmp_path):
    page = tmp_path / "deep" / "trace.html"
    output = run("segment", DEMO, "the tree", "--trace", page)
    assert "Please provide the bounding box" in output
    assert "p_yes" in output
    assert "<html" in page.read_text(encoding="utf-8")


def test_probe_answers_the_points_that_were_asked():
    output = run("probe", DEMO, "the tree", "--point", "10,20", "--point", "200.5,240", "--json")
    document = json.loads(output)
    assert [(p["x"], p["y"]) for p in document["points"]] == [(10, 20), (200.5, 240)]
    assert "p_yes" in run("probe", DEMO, "the tree")


def test_tools_prints_all_schemas():
    tools = json.loads(run("tools"))
    assert [t["name"] for t in tools][:2] == ["segment_object", "locate_object"]
    assert all(t["arguments"]["type"] == t["result"]["type"] == "object" for t in tools)


def test_demo_writes_what_it_says(tmp_path):
    output = run("demo", "--out", tmp_path / "demo")
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert names == {"mask_1.png", "overlay.png", "trace.html", "trace.json"}
    for name in names:
        assert name in output.replace("\n", "")


def test_doctor_checks_itself():
    report = json.loads(run("doctor", "--json"))
    assert report["self_check"]["ok"]
    assert report["packages"]["torch"]
    assert set(report["checkpoints"]) >= {"mllm", "sam"}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["segment", "/nowhere.png", "x"], ImageError),
        (["segment", DEMO, " "], InputError),
        (["segment", DEMO, "x", "--trace", "t.txt"], InputError),
        (["segment", DEMO, "x", "--mllm", "/nowhere"], CheckpointError),
        (["segment", DEMO, "x", "--sam", "/nowhere.pth"], CheckpointError),
        (["probe", DEMO, "x", "--point", "a,b"], PromptError),
        (["probe", DEMO, "x", "--point", "9999,3"], PromptError),
    ],
)
def test_bad_input_is_a_typed_error(arguments, error):
    with pytest.raises(error) as caught:
        RUNNER.invoke(app, arguments, catch_exceptions=False)
    assert caught.value.hint


def test_errors_become_a_message_a_hint_and_a_status(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sam4mllm-tool", "segment", "/nowhere.png", "x"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert "ImageError" in told
    assert "Hint:" in told
    assert "Traceback" not in told


def test_help_and_import_need_no_torch():
    code = (
        "import sys, sam4mllm_tool, sam4mllm_tool.cli, sam4mllm_tool.tools.toolbox;"
        "import sam4mllm_integrations.langchain_tools;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert "segment" in run("--help")
    assert Path(DEMO).is_file()
