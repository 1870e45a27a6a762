"""A web page for using the tools by hand: ``sam4mllm-tool playground``."""
