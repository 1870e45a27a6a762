"""Running on several GPUs and machines with Ray (``pip install "sam4mllm-tool[ray]"``).

The modules of this package import Ray; they are themselves imported for ``--engine ray`` only.
"""
