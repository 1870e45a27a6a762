"""Language to pixels for LLM agents: SAM4MLLM's box-and-points dialogue as typed tools."""
