"""Training of the embedded MLLM from scratch."""
