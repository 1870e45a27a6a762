"""MLLM backends: a local transformers engine with prefix reuse, and its full-recompute oracle.

Nothing is imported here, so that asking for one backend does not import the others' libraries.
"""
