"""Code blocks of README and docs run; the site builds without a warning; the map is the tree."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from langchain_agent import ScriptedChat
from langchain_core.messages import AIMessage
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

from sam4mllm_tool import embedded

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the picture that the pages speak of."""
    (tmp_path / "pictures").mkdir()
    for name in ("demo.png", "desk.png"):
        shutil.copy(embedded.DEMO / "demo.png", tmp_path / "pictures" / name)
    shutil.copy(embedded.DEMO / "demo.png", tmp_path / "desk.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def chat_model() -> ScriptedChat:
    """Stands for a hosted chat model: one tool call, then an answer."""
    arguments = {"image": "pictures/desk.png", "expression": "the tree"}
    call = {"name": "segment_object", "args": arguments, "id": "1"}
    return ScriptedChat(messages=iter([AIMessage("", tool_calls=[call]), AIMessage("A tenth.")]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs_in_order(page, workplace):
    sybil = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()], path=str(page.parent))
    document = sybil.parse(page)
    document.namespace["chat_model"] = chat_model()
    for example in document:
        try:
            example.evaluate()
        except Exception as error:
            if type(error).__name__ == "SkipTest":
                assert str(error), f"{page.name}: a skipped block needs a reason"
                continue
            raise


def test_every_skipped_block_says_why():
    for page in PAGES:
        for line in page.read_text().splitlines():
            if line.startswith("<!-- skip:"):
                assert re.search(r'"[^"]{8,}"', line), f"{page.name}: {line}"


def test_the_site_builds_strictly(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    assert (tmp_path / "tools" / "index.html").is_file()


def test_the_map_in_contributing_is_the_tree():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"^  (\w+)/? ", text.split("```")[1], re.MULTILINE))
    package = ROOT / "sam4mllm_tool"
    there = {p.stem for p in package.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    there -= {"__init__", "__main__"}
    assert named == there, f"missing {there - named}, gone {named - there}"
