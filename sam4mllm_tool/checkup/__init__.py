"""What ``sam4mllm-tool check`` finds out about a checkpoint on the first day, in a few minutes."""
