"""Language to pixels for LLM agents: SAM4MLLM's box-and-points dialogue as typed tools.

The public names are listed in ``__init__.pyi`` and imported at first use, so that importing the
package imports no torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
