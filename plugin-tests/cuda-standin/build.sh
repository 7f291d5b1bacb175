#!/bin/sh
# Builds the stand-ins for whole processes into a folder for LD_LIBRARY_PATH: build.sh FOLDER
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
flags="-std=gnu11 -Wall -Wextra -Werror -O1 -g -fPIC -shared -pthread"
${CC:-cc} $flags -Wl,-soname,libcuda.so.1 -o "$1/libcuda.so.1" "$here/cuda.c"
${CC:-cc} $flags -Wl,-soname,libcudart.so.13 -o "$1/libcudart.so.13" "$here/cudart.c" "$1/libcuda.so.1"
ln -sf libcudart.so.13 "$1/libcudart.so"
