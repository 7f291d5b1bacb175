#!/bin/sh
# Makes the bundle that run.sh takes to a machine with a GPU.
#
#   pack.sh PLUGIN LIBFABRIC NIXL OUT [SOFTEFA_ENV EFA_LIBFABRIC]
#
#   PLUGIN     libnixl_libfabric.so of a release build
#   LIBFABRIC  folder with a libfabric.so.1 that was built with CUDA (--with-cuda --enable-cuda-dlopen, provider shm)
#   NIXL       folder with an unpacked NIXL wheel for the Python there
#   OUT        the bundle, a .tar.xz
#
# With these two it also runs the cases on software EFA devices:
#
#   SOFTEFA_ENV    softefa-env of a release build that was run once, so that its libraries lie beside it
#   EFA_LIBFABRIC  folder with a libfabric.so.1 that was built with CUDA and with provider efa, against rdma-core's headers
#                  of version 50 or newer (efadv.h with RDMA write) and libibverbs.so and libefa.so of any origin
set -eu
plugin=$1 libfabric=$2 nixl=$3 out=$4 softefa=${5:-} efa_libfabric=${6:-}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/plugin" "$folder/libfabric" "$folder/nixl"
cp "$plugin" "$folder/plugin/libplugin_LIBFABRIC.so"
cp -L "$libfabric/libfabric.so.1" "$folder/libfabric/"
if [ -n "$softefa" ]; then
    mkdir "$folder/softefa" "$folder/softefa/softefa-lib" "$folder/libfabric-efa"
    cp "$softefa" "$folder/softefa/softefa-env"
    for library in libibverbs.so.1 libefa.so.1 libsoftefa.so; do
        cp "$(dirname "$softefa")/softefa-lib/$library" "$folder/softefa/softefa-lib/"
    done
    strip --strip-debug "$folder"/softefa/softefa-env "$folder"/softefa/softefa-lib/libsoftefa.so
    cp -L "$efa_libfabric/libfabric.so.1" "$folder/libfabric-efa/"
fi
# The wheel without its plugins and its expert-parallel kernels: what the bindings link, found by the loader itself.
bindings=$(ls "$nixl"/nixl_cu1?/_bindings*.so)
(cd "$nixl" && cp -r nixl_cu1? "$folder/nixl/")
for library in $(ldd "$bindings" | sed -n 's/.*=> \([^ ]*\) .*/\1/p') "$(dirname "$bindings")"/_utils*.so; do
    case $(realpath "$library") in
    "$(realpath "$nixl")"/*)
        inside=$(realpath --relative-to="$nixl" "$library")
        mkdir -p "$folder/nixl/$(dirname "$inside")"
        cp "$library" "$folder/nixl/$inside"
        ;;
    esac
done
tar -C "$folder" -cJf "$out" .
ls -l "$out"
