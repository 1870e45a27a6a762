"""The public surface, and the wheel a user gets."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import sam4mllm_tool

ROOT = Path(__file__).resolve().parent.parent


def test_every_public_name_can_be_imported_and_is_documented():
    for name in sam4mllm_tool.__all__:
        value = getattr(sam4mllm_tool, name)
        assert value.__doc__, name
    assert sorted(sam4mllm_tool.__all__) == sorted(dir(sam4mllm_tool))


def test_errors_form_the_tree_their_docstring_draws():
    errors = importlib.import_module("sam4mllm_tool.errors")
    drawn = set(re.findall(r"[├└]── (\w+)", errors.__doc__)) | {"Sam4MllmError"}
    defined = {
        n
        for n, v in vars(errors).items()
        if isinstance(v, type) and issubclass(v, errors.Sam4MllmError)
    }
    assert drawn == defined


def test_all_means_every_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def within(extra: str) -> set[str]:
        """The extras an extra takes in, by way of others too."""
        named = [re.match(r"sam4mllm-tool\[(.*)\]", need) for need in extras[extra]]
        direct = {name for found in named if found for name in found[1].split(",")}
        return direct.union(*map(within, direct))

    # Ray is 750 MB and for clusters: it is asked for by name.
    assert within("all") == set(extras) - {"all", "dev", "docs", "ray"}
    assert within("dev") == set(extras) - {"dev"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(out), "."]
    subprocess.run(command, cwd=ROOT, check=True)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_the_right_names_and_the_weights(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {
        "sam4mllm_tool",
        "sam4mllm_integrations",
    }
    needed = [
        "sam4mllm_tool/py.typed",
        "sam4mllm_tool/__init__.pyi",
        "sam4mllm_tool/embedded/mllm/model.safetensors",
        "sam4mllm_tool/embedded/mllm/tokenizer.json",
        "sam4mllm_tool/embedded/sam/model.safetensors",
        "sam4mllm_tool/embedded/demo/demo.png",
        "sam4mllm_integrations/langchain_tools.py",
        *(
            f"sam4mllm_tool/playground/static/{name.name}"
            for name in (ROOT / "sam4mllm_tool" / "playground" / "static").iterdir()
        ),
    ]
    assert [n for n in needed if n not in names] == []
    assert not [n for n in names if "__pycache__" in n]


def test_the_installed_wheel_works_from_an_empty_folder(wheel, tmp_path):
    """A fresh environment that sees this one's dependencies, but not the source tree."""
    home = tmp_path / "env"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    site = next((home / "lib").glob("python*/site-packages"))
    dependencies = Path(next(p for p in sys.path if p.endswith("site-packages")))
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel],
        check=True,
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    code = "import sam4mllm_tool.cli as c; print(c.__file__); c.app(['demo', '--out', 'out'])"
    done = subprocess.run(
        [python, "-c", code],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(dependencies)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))
    assert (empty / "out" / "demo_obj_1.png").is_file()
