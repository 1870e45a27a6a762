"""Several GPUs and machines, by Ray (``pip install "sam4mllm-tool[ray]"``).

Ray is imported by the modules of this package alone, and they are imported only where
``--engine ray`` is asked for.
"""
