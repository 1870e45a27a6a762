#!/bin/sh
# Run the Dockerfile's steps without a container engine: the files that .dockerignore lets through,
# a new virtual environment, the server, its health check.
#
#   sh container/check.sh [TORCH_INDEX]
#
# Some GB are downloaded unless pip has them. INSTALLED=DIR is a folder of installed packages
# (site-packages) to be used instead.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
server=
trap 'test -z "$server" || kill "$server" 2>/dev/null; rm -rf "$work"' EXIT

mkdir "$work/src" "$work/src/container" "$work/pictures" "$work/home"
cp "$root/container/install.sh" "$work/src/container/"
for name in pyproject.toml README.md LICENSE sam4mllm_tool integrations; do
    cp -R "$root/$name" "$work/src/"
done
cd "$work/src"
if [ -n "${INSTALLED:-}" ]; then
    python3 -m venv "$work/venv"
    echo "$INSTALLED" > "$("$work/venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/installed.pth"
fi
sh container/install.sh "$work/venv" "${1:-}"

cd "$work/home"
port=$("$work/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
env -i PATH="$work/venv/bin:$PATH" HOME="$work/home" SAM4MLLM_TOKEN=check OMP_NUM_THREADS=1 \
    sam4mllm-tool mcp --transport http --host 0.0.0.0 --port "$port" --allow-dir "$work/pictures" &
server=$!
health="import urllib.request as r; r.urlopen('http://127.0.0.1:$port/health', timeout=4)"
tries=0
until "$work/venv/bin/python" -c "$health" 2>/dev/null; do
    kill -0 "$server" || { echo "the server ended" >&2; exit 1; }
    tries=$((tries + 1))
    [ "$tries" -lt 120 ] || { echo "no health after $tries tries" >&2; exit 1; }
    sleep 1
done
echo "healthy on port $port"
