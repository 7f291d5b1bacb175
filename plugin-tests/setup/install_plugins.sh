#!/bin/sh
# usage: install_plugins.sh <site-packages> [<folder>]
# Makes a folder for NIXL_PLUGIN_DIR, which replaces NIXL's own: links to the plugins of the NIXL found there, and ours.
# Where NIXL is installed for several CUDAs (the package nixl brings nixl-cu12, vLLM adds nixl-cu13), it is the one that
# `import nixl` takes: that of torch's CUDA, else the newest. Plugins of the other one would bring another core with them.
set -eu
site=$1
folder=${2:-target/nixl-plugins}
ours=target/plugins

cuda=""
if [ -e "$site/torch/version.py" ]; then cuda=$(sed -n "s/^cuda.*= *'\([0-9]*\)\..*/\1/p" "$site/torch/version.py"); fi
stock=""
for core in "$site/.nixl_cu$cuda.mesonpy.libs" "$site/.nixl_cu13.mesonpy.libs" "$site"/.nixl*.mesonpy.libs; do
    for candidate in "$core/plugins" "$core"; do
        if [ -n "$site" ] && [ -e "$candidate/libplugin_UCX.so" ]; then stock=$(readlink -f "$candidate"); break 2; fi
    done
done
if [ -z "$stock" ]; then
    echo "install-plugins: no NIXL plugins under '$site'." >&2
    echo "  give the folder that NIXL is installed in: make install-plugins NIXL=\$(python -c 'import sysconfig; print(sysconfig.get_path(\"platlib\"))')" >&2
    exit 1
fi
mkdir -p "$folder"
for plugin in "$stock"/lib*.so; do
    case $plugin in */libplugin_LIBFABRIC.so | */libplugin_Libfabric.so) continue ;; esac
    ln -sfn "$plugin" "$folder/"
done
for plugin in "$ours"/libplugin_*.so; do
    # A rename, never a write into a file that a running process may have mapped.
    cp "$plugin" "$folder/.new"
    mv "$folder/.new" "$folder/$(basename "$plugin")"
done
echo "install-plugins: $(ls "$folder" | grep -c libplugin_) plugins in $folder: ours and those of $stock"
echo "  export NIXL_PLUGIN_DIR=$(readlink -f "$folder")"
