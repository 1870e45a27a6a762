"""The command line, as a user types it."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from typer.testing import CliRunner

import sam4mllm_tool
from sam4mllm_tool import embedded
from sam4mllm_tool.cli import app, evaluate, main
from sam4mllm_tool.errors import (
    CheckpointError,
    ImageError,
    InputError,
    PromptError,
    Sam4MllmError,
)
from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.pipeline.results import Settings
from sam4mllm_tool.testing import ColourSegmenter, TruthfulMllm
from sam4mllm_tool.types import Mask

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
    written = np.asarray(Image.open(tmp_path / "demo_obj_1.png")) == 255
    assert np.array_equal(coco_mask.decode(rle).astype(bool), written)
    assert one["area"] == written.sum()
    assert set(document["timings"]) >= {"locate", "points", "mask"}
    assert (tmp_path / "demo_overlay.png").is_file()
    made = COCO(tmp_path / "demo_coco_rle.json")  # the data set's own reader
    assert np.array_equal(made.annToMask(made.anns[1]), written)
    again = json.loads(run("segment", DEMO, "the tree", "--json", "--out", tmp_path))
    assert {Path(name).name for name in again["files"]} == {
        "demo_obj_1-2.png", "demo_coco_rle-2.json", "demo_overlay-2.png"
    }  # nothing is overwritten  # fmt: skip


@pytest.mark.parametrize("strategy", ["pqpp", "ppg", "adaptive", "box_only", "propose"])
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
    assert names == {
        "demo_obj_1.png", "demo_coco_rle.json", "demo_overlay.png", "trace.html", "trace.json"
    }  # fmt: skip
    for name in names:
        assert name in output.replace("\n", "")


def test_doctor_checks_itself():
    report = json.loads(run("doctor", "--json"))
    assert report["self_check"]["ok"]
    assert report["packages"]["torch"]
    assert report["settings"]["values"] == {}
    assert set(report["checkpoints"]) >= {"mllm", "sam"}


@pytest.fixture
def stand_in() -> Sam4MLLM:
    """A model that finds the same tree in every picture of the demo's size."""
    tree = np.zeros((320, 320), bool)
    tree[40:220, 150:260] = True
    return Sam4MLLM(TruthfulMllm({"the tree": [Mask(tree)]}), ColourSegmenter())


@pytest.fixture
def loads(monkeypatch, stand_in) -> list[str]:
    """The MLLMs that were loaded, in place of loading them."""
    loaded: list[str] = []

    def load(mllm: str = "embedded", **options: object):
        loaded.append(mllm)
        return replace(stand_in, settings=options.get("settings") or Settings())

    monkeypatch.setattr("sam4mllm_tool.pipeline.model.load", load)
    return loaded


def test_many_pictures_take_one_load_and_one_that_is_broken_stops_nothing(tmp_path, loads):
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    shutil.copy(DEMO, folder / "b.png")
    shutil.copy(DEMO, folder / "deeper" / "c.png")
    (folder / "a.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("left alone")
    asked = ["segment", str(folder), f"{tmp_path}/pict*/b.p?g", "the tree", "--json"]
    found = RUNNER.invoke(app, [*asked, "--out", str(tmp_path / "out"), "--formats", "png"])
    assert found.exit_code == 2
    document = json.loads(found.stdout)
    assert [Path(one["source"]).name for one in document["pictures"]] == ["b.png", "c.png"]
    assert list(map(Path, document["failures"])) == [folder / "a.png"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"b_obj_1.png", "c_obj_1.png"}
    assert loads == ["embedded"]


@pytest.mark.parametrize("command", [["segment"], ["probe"], ["check", "--scenes", "1"]])
def test_the_segmenters_dtype_is_an_option(command, monkeypatch):
    options: list[dict] = []

    def load(*_, segmenter_options, **__):
        options.append(segmenter_options)
        raise CheckpointError("stop here", hint="-")

    monkeypatch.setattr("sam4mllm_tool.pipeline.model.load", load)
    where = [] if command[0] == "check" else [DEMO, "the tree"]
    for dtype in ([], ["--sam-dtype", "bfloat16"]):
        RUNNER.invoke(app, [command[0], *where, *command[1:], *dtype])
    assert [one["dtype"] for one in options] == ["auto", "bfloat16"]


def test_what_is_wrong_is_said_before_anything_is_loaded(tmp_path, loads):
    for wrong in (
        ["segment", DEMO, " "],
        ["segment", DEMO, "x", "--formats", "png,tiff"],
        ["segment", DEMO, DEMO, str(tmp_path), "x", "--trace", "t.html"],
        ["segment", DEMO, f"{tmp_path}/*.png", "x"],
        ["segment", DEMO, "x", "--max-pixels", "100"],
        ["segment", DEMO, "x", "--candidates", "gird"],
        ["segment", DEMO, "x", "--mllm", "./nowhere"],
        ["segment", DEMO, "x", "--sam", "nowhere.pth"],
        ["segment", DEMO, "x", "--sam-decoder", "nowhere.pt"],
        ["segment", DEMO, "x", "--format", "qwen"],
        ["probe", DEMO, " "],
        ["probe", DEMO, "x", "--point", "9999,3"],
        ["probe", DEMO, "x", "--max-bytes", "100"],
    ):
        with pytest.raises(Sam4MllmError) as caught:
            RUNNER.invoke(app, wrong, catch_exceptions=False)
        assert caught.value.hint, wrong
    assert loads == []


@pytest.fixture
def user_file(tmp_path, monkeypatch) -> Path:
    """The user's configuration file, in an empty home; the working folder is empty too."""
    monkeypatch.setattr("typer.get_app_dir", lambda _: str(tmp_path / "config"))
    (tmp_path / "config").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "config" / "sam4mllm.toml"


def test_settings_stand_in_for_options_the_nearest_first(user_file, monkeypatch, loads):
    user_file.write_text('mllm = "of-the-user"\nsam = "of-the-user"\nmax_pixels = 100\n')
    named = Path("project.toml")
    named.write_text('mllm = "of-the-project"\nmax_pixels = 1000000\n')

    def asked(*more: str) -> str:
        run("--settings", named, "segment", DEMO, "the tree", "--json", *more)
        return loads[-1]

    assert asked() == "of-the-project"
    monkeypatch.setenv("SAM4MLLM_MLLM", "of-the-environment")
    assert asked() == "of-the-environment"
    assert asked("--mllm", "as-typed") == "as-typed"
    monkeypatch.setenv("SAM4MLLM_SETTINGS", str(named))
    shown = json.loads(RUNNER.invoke(app, ["doctor", "--json"]).stdout)["settings"]
    assert shown["values"] == {
        "mllm": {"value": "of-the-environment", "from": "SAM4MLLM_MLLM"},
        "max_pixels": {"value": 1000000, "from": "project.toml"},
        "sam": {"value": "of-the-user", "from": str(user_file)},
    }
    assert shown["files"] == ["project.toml", str(user_file)]


def test_the_folder_one_works_in_chooses_nothing(user_file, loads):
    """Whoever made it could otherwise send the pictures to a server of theirs."""
    Path("sam4mllm.toml").write_text('mllm = "http://elsewhere.example/v1"\nmax_pixels = 1\n')
    found = RUNNER.invoke(app, ["segment", DEMO, "the tree", "--json"], catch_exceptions=False)
    assert loads == ["embedded"]
    assert "--settings sam4mllm.toml" in found.stderr
    assert json.loads(found.stdout)["status"] == "found"


def test_with_the_embedded_models_the_command_for_photographs_is_shown(loads):
    told = RUNNER.invoke(app, ["segment", DEMO, "the tree"]).stderr
    assert "drawn scenes only" in told
    # what it shows is what the command takes
    mllm, sam = re.findall(r"--mllm (\S+) --sam (\S+)", told)[0]
    again = RUNNER.invoke(app, ["segment", DEMO, "the tree", "--mllm", mllm, "--sam", sam])
    assert again.exit_code == 0 and loads == ["embedded", mllm]
    assert "drawn scenes only" not in again.stderr
    assert RUNNER.invoke(app, ["segment", DEMO, "the tree", "--json"]).stderr == ""


def test_where_defaults_come_from_is_told_beside_the_output(user_file, monkeypatch, loads):
    user_file.write_text('mllm = "of-the-user"\nallow_dir = ["pictures"]\n')
    monkeypatch.setenv("SAM4MLLM_DEVICE", "cpu")
    found = RUNNER.invoke(app, ["segment", DEMO, "the tree", "--json"], catch_exceptions=False)
    assert found.stderr.splitlines() == [
        "defaults from SAM4MLLM_DEVICE: device",
        f"defaults from {user_file}: mllm",  # segment has no --allow-dir
    ]
    assert json.loads(found.stdout)["status"] == "found"
    assert RUNNER.invoke(app, ["tools"]).stderr == ""
    evaluated = RUNNER.invoke(app, ["eval", "scenes", "--world", "none"])
    assert f"defaults from {user_file}: mllm" in evaluated.stderr


def test_a_setting_that_means_another_option_elsewhere_is_left_alone(user_file, tmp_path):
    user_file.write_text('format = "qwen3_vl"\n')
    run("scenes", "--out", tmp_path / "scenes", "--count", "1")


@pytest.mark.parametrize("text", ["mlm = 'x'", "max_pixels = 'many'", "mllm = "])
def test_settings_that_cannot_be_read_are_typed_errors(user_file, text):
    user_file.write_text(text)
    with pytest.raises(InputError) as caught:
        RUNNER.invoke(app, ["tools"], catch_exceptions=False)
    assert str(user_file) in str(caught.value)


def test_a_settings_file_that_is_not_there_is_a_typed_error(user_file):
    with pytest.raises(InputError, match=r"nowhere\.toml") as caught:
        RUNNER.invoke(app, ["--settings", "nowhere.toml", "tools"], catch_exceptions=False)
    assert caught.value.hint


def commands_with_json() -> set[str]:
    """Every command that has ``--json``, as it is typed."""

    def of(command, name: str) -> set[str]:
        if hasattr(command, "commands"):
            return set().union(*(of(one, f"{name} {n}") for n, one in command.commands.items()))
        return {name.strip()} if any("--json" in p.opts for p in command.params) else set()

    return of(typer.main.get_command(app), "")


JSON_COMMANDS = {
    "segment": [DEMO, "the tree"],
    "probe": [DEMO, "the tree", "--point", "200,240"],
    "models": [],
    "doctor": [],
    "check": ["--scenes", "1"],
    "annotate": ["PICTURES", "--expressions", "EXPRESSIONS", "--out", "OUT"],
    "eval sam": ["--objects", "2"],
    "eval scenes": ["--limit", "2"],
    **{
        f"eval {name}": ["--data", "coco=nowhere", "--split", "val"]
        for name in ("run", *evaluate.BENCHMARKS)
    },
}


def test_every_command_with_json_is_tried():
    assert commands_with_json() == set(JSON_COMMANDS)


@pytest.mark.parametrize("command", JSON_COMMANDS)
def test_json_is_one_document_and_nothing_else(command, tmp_path, stand_in, monkeypatch):
    """An error leaves standard output empty; what there is to say of it goes to standard error."""
    monkeypatch.setattr("sam4mllm_tool.pipeline.model.load", lambda *_, **__: stand_in)
    monkeypatch.setattr(
        "sam4mllm_tool.segmenter.load_segmenter", lambda *_, **__: stand_in.segmenter
    )
    shutil.copy(DEMO, tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("the tree\n")
    files = {"PICTURES": tmp_path, "EXPRESSIONS": tmp_path / "a.txt", "OUT": tmp_path / "o.json"}
    arguments = [str(files.get(one, one)) for one in JSON_COMMANDS[command]]
    found = RUNNER.invoke(app, [*command.split(), *arguments, "--json"])
    if "nowhere" in " ".join(arguments):
        assert isinstance(found.exception, InputError) and found.stdout == ""
        return
    assert found.exit_code in (0, 4), found.output  # 4: a check or self-check failed
    assert json.loads(found.stdout)
    assert found.stderr == ""


def test_version_and_completion():
    assert run("--version").strip() == f"sam4mllm-tool {sam4mllm_tool.__version__}"
    assert "--install-completion" in run("--help")
    script = subprocess.run(
        [sys.executable, "-m", "sam4mllm_tool"],
        env={**os.environ, "_SAM4MLLM_TOOL_COMPLETE": "source_bash"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "_SAM4MLLM_TOOL_COMPLETE=complete_bash" in script.stdout


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


@pytest.mark.parametrize(
    ("module", "unneeded"),
    [
        # --help and each completion wait for this
        ("sam4mllm_tool.cli", "torch scipy ssl jinja2 markdown_it pydantic_settings"),
        # with a served MLLM and --server
        ("sam4mllm_tool.mllm.endpoint", "torch transformers peft"),
    ],
)
def test_only_what_is_needed_is_imported(module, unneeded):
    code = f"import sys, {module}; print(*set(sys.modules) & set({unneeded.split()}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_console_shows_our_own_lines_only(tmp_path):
    """In a process of its own, where libraries have not yet said what they say once."""
    code = f"""
import os, sys
from sam4mllm_tool.cli import app
for number, arguments in enumerate((
    ["segment", {DEMO!r}, "the tree", "--json"],
    ["segment", {DEMO!r}, "the tree", "--out", "segmented"],
    ["probe", {DEMO!r}, "the tree"],
    ["demo", "--out", "demo"],
    ["doctor"],
)):
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        file = os.open(f"{{number}}{{stream.name}}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, stream.fileno())
    app(arguments, standalone_mode=False)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert json.loads((tmp_path / "0<stdout>").read_text())["status"] == "found"
    errors = [path.read_text().lower() for path in sorted(tmp_path.glob("?<stderr>"))]
    assert len(errors) == 5 and errors[0] == ""
    for text in errors:
        assert "warn" not in text and "deprecated" not in text
