"""An MCP server over stdio whose models know one picture, for tests: FOLDER [GATE].

With GATE, loading waits until that file exists.
"""

import sys
import time
from pathlib import Path

import numpy as np
from sam4mllm_integrations.mcp_server import serve

from sam4mllm_tool.pipeline.model import Sam4MLLM
from sam4mllm_tool.testing import ColourSegmenter, TruthfulMllm
from sam4mllm_tool.types import Mask


def load() -> Sam4MLLM:
    red = np.zeros((120, 200), bool)
    red[15:45, 70:190] = True  # as drawn in conftest.py
    return Sam4MLLM(TruthfulMllm({"the red block": [Mask(red)]}), ColourSegmenter())


def main() -> None:
    folders = [Path(folder) for folder in sys.argv[1].split(":") if folder]
    gate = Path(sys.argv[2]) if len(sys.argv) > 2 else None

    def load_behind_the_gate() -> Sam4MLLM:
        while gate is not None and not gate.exists():
            time.sleep(0.02)
        return load()

    serve(load_behind_the_gate, allow_dirs=folders)


if __name__ == "__main__":
    main()
