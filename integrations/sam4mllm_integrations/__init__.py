"""Adapters of the sam4mllm tools to agent frameworks: one file each, one extra each."""
