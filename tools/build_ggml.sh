#!/bin/sh
# ggml from the sources of a Python package that brings stable-diffusion.cpp, for the processor that this runs on.
#   build_ggml.sh PYTHON PACKAGE==VERSION FOLDER
set -eu
python=$1 package=$2
mkdir -p "$3"
out=$(cd "$3" && pwd)
"$python" -m pip download --quiet --no-deps --no-binary :all: --dest "$out/source" "$package"
tar -xzf "$out"/source/*.tar.gz -C "$out/source"
cmake -S "$out"/source/*/vendor/stable-diffusion.cpp/ggml -B "$out" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
    -DGGML_BUILD_TESTS=OFF -DGGML_BUILD_EXAMPLES=OFF
cmake --build "$out" --parallel
