#!/bin/sh
# Install the package of this folder with its MCP server into a new virtual environment.
#
#   sh container/install.sh VENV [TORCH_INDEX]
#
# TORCH_INDEX is the package index that torch comes from; by default the one that pip uses.
set -eu
venv=$1
index=${2:-}
# What a container keeps is what the image weighs.
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

python3 -m venv "$venv"
"$venv/bin/pip" install "torch>=2.6" "torchvision>=0.21" ${index:+--index-url "$index"}
"$venv/bin/pip" install ".[mcp]"
