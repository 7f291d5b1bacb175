#!/bin/sh
# Puts the parts of pack.py together, on the machine with the GPU.
#
#   unpack.sh <folder> [<parts>]
#
#   <folder>   for the bundle
#   <parts>    the folder with bundle.00, bundle.01, ...: by default the one that this lies in
#
# Parts may come in several trips: with some missing it says so and does nothing else, status 3.
set -eu
folder=$1
parts=$(cd "${2:-$(dirname "$0")}" && pwd)
python=${PYTHON:-python3}
mkdir -p "$folder"
cd "$parts"
for part in $(sed 's/.*  //' bundle.sha256); do
    if [ ! -e "$part" ]; then
        echo "unpack: $part is not here yet"
        exit 3
    fi
done
sha256sum --check --quiet bundle.sha256
cd "$folder"
cat "$parts"/bundle.[0-9]* | tar -xJf -
[ -e target/plugins/libplugin_Libfabric.so ] || ln -s libplugin_LIBFABRIC.so target/plugins/libplugin_Libfabric.so
sh plugin-tests/setup/install_plugins.sh site plugins
# The model with torch and transformers that are here; byte code meanwhile: without it each engine's start takes a minute more.
"$python" plugin-tests/vllm/model.py wide model &
"$python" -m compileall -q -j 0 site >/dev/null 2>&1 || true
wait $!
echo "unpack: $(du -sh . | cut -f1) in $(pwd)"
