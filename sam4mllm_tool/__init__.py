"""Language to pixels for LLM agents: SAM4MLLM's box-and-points dialogue as typed tools.

The public names are listed in ``__init__.pyi`` and imported at first use, so that importing the
package imports no torch.
"""

from importlib.metadata import version

import lazy_loader

__version__ = version("sam4mllm-tool")

__getattr__, _, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = [*_names, "__version__"]


def __dir__() -> list[str]:
    return __all__
