"""A page in the browser on which the tools are used by hand: ``sam4mllm-tool playground``."""
