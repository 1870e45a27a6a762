# The MCP server (and the command line) in a container.
#
#   docker build --tag sam4mllm-tool .                               # CPU
#   docker build --tag sam4mllm-tool:cuda --build-arg TORCH=cu128 .  # CUDA
#
# TORCH is a folder of https://download.pytorch.org/whl: cpu, cu126, cu128, … The driver of the host
# must be new enough for it; the CUDA libraries come with torch. docs/install.md says how to run it.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
ARG TORCH=cpu
WORKDIR /src
COPY . .
RUN sh container/install.sh /opt/venv "https://download.pytorch.org/whl/${TORCH}"

FROM python:${PYTHON}-slim-bookworm
RUN useradd --uid 10001 --create-home tool \
    && install --directory --owner tool /pictures /output /state
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/home/tool/hub
USER 10001
WORKDIR /home/tool
EXPOSE 8765
# Off loopback the server starts with a token only: --env SAM4MLLM_TOKEN=…
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8765/health', timeout=4)"]
ENTRYPOINT ["sam4mllm-tool"]
CMD ["mcp", "--transport", "http", "--host", "0.0.0.0", "--allow-dir", "/pictures"]
