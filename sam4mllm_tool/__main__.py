"""``python -m sam4mllm_tool …`` is the command line, for launchers that want a module."""

from sam4mllm_tool.cli import main

if __name__ == "__main__":
    main()
