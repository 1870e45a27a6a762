"""Every example is run as a program, on the embedded models."""

import runpy
from pathlib import Path

import pytest

from sam4mllm_tool import embedded

EXAMPLES = Path(__file__).parents[1] / "examples"
HELPERS = {"scripted_llm"}
# These assert what only trained models can get right.
SKILLED = {"count_and_compare", "refine_with_points"}
PROGRAMS = sorted(p.stem for p in EXAMPLES.glob("*.py") if p.stem not in HELPERS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_example_runs(name, capfd):
    if name in SKILLED and not embedded.ADAPTER.is_dir():
        pytest.skip("the embedded models are not trained yet")
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capfd.readouterr().out
