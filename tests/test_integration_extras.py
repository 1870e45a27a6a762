"""An adapter whose framework is not installed says which extra to install."""

import runpy
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ADAPTERS = {
    "mcp_server": ("mcp.server.stdio", "mcp"),
    "langgraph_workflow": ("langgraph.graph", "langgraph"),
    "openai_functions": ("openai.types.chat", "openai"),
    "anthropic_tools": ("anthropic", "anthropic"),
    "smolagents_tools": ("smolagents", "smolagents"),
    "llama_index_tools": ("llama_index.core.llms", "llamaindex"),
    "openai_agents_tools": ("agents", "openai-agents"),
    "pydantic_ai_tools": ("pydantic_ai", "pydantic-ai"),
}


@pytest.mark.parametrize("module", ADAPTERS)
def test_the_extra_is_named(module, monkeypatch):
    package, extra = ADAPTERS[module]
    for known in [name for name in sys.modules if name.startswith("sam4mllm_integrations.")]:
        monkeypatch.delitem(sys.modules, known)  # else what they imported would not be missed
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'pip install "sam4mllm-tool\[{extra}\]"'):
        runpy.run_path(str(ROOT / f"integrations/sam4mllm_integrations/{module}.py"))


@pytest.mark.parametrize(
    "package, function", [("supervision", "to_detections"), ("datasets", "features")]
)
def test_interop_names_its_extras(package, function, monkeypatch):
    from sam4mllm_tool.masks import interop

    monkeypatch.setitem(sys.modules, package, None)
    arguments = [[]] if function == "to_detections" else []
    with pytest.raises(ImportError, match=rf'pip install "sam4mllm-tool\[{package}\]"'):
        getattr(interop, function)(*arguments)


def test_every_extra_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {extra for _, extra in ADAPTERS.values()} | {"supervision", "datasets"}
    assert extras <= set(project["optional-dependencies"])
