"""Every example is run as a program, on the embedded models."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
HELPERS = {"scripted_llm"}
PROGRAMS = sorted(p.stem for p in EXAMPLES.glob("*.py") if p.stem not in HELPERS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_example_runs(name, capfd):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capfd.readouterr().out
