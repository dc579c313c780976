#!/usr/bin/env bash
# The peers, as requirements-peers.txt pins them, in the environment given as $1: nothing of ours but
# torch is in it. Beside the packages it unpacks the sources of those that ship tests of their own,
# and compiles ggml's quantizer from the sources that llama-cpp-python carries (needs `cc`).
set -euo pipefail
constraints="$PWD/constraints.txt" requirements="$PWD/requirements-peers.txt"
cd "$1"
pip() { bin/python -m pip "$@" --quiet --disable-pip-version-check; }

pip install -c "$constraints" torch numpy safetensors pandas pytest
pip install -c "$constraints" -r "$requirements"
# fouroversix builds CUDA code unless told not to.
export SKIP_CUDA_BUILD=1 FORCE_BUILD=1
pip install --no-build-isolation --no-deps fouroversix==1.0.5

mkdir -p sources
sources() {  # name of the archive, then pip's arguments
    local archive="sources/$1.tar.gz"
    [ -f "$archive" ] || pip download --no-deps -d sources "${@:2}"
}
sources compressed_tensors-0.20.0 --no-binary compressed-tensors compressed-tensors==0.20.0
sources fouroversix-1.0.5 --no-build-isolation --no-binary fouroversix fouroversix==1.0.5
sources llama_cpp_python-0.3.36 --no-binary llama-cpp-python llama-cpp-python==0.3.36
for archive in sources/*.tar.gz; do
    [ -d "${archive%.tar.gz}" ] || tar xzf "$archive" -C sources --exclude '*/third_party/*'
done

cc -O2 -fPIC -shared -ffp-contract=off -o libggml.so -lm -xc \
    -I sources/llama_cpp_python-0.3.36/vendor/llama.cpp/ggml/include \
    -I sources/llama_cpp_python-0.3.36/vendor/llama.cpp/ggml/src \
    sources/llama_cpp_python-0.3.36/vendor/llama.cpp/ggml/src/ggml-quants.c
