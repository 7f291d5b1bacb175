#!/bin/sh
# usage: install_plugins.sh <site-packages> [<folder>]
# Makes a folder for NIXL_PLUGIN_DIR, which replaces NIXL's own: links to the plugins of the NIXL found there, and ours.
#
# NIXL's plugins find their libraries (UCX's, for one) by paths relative to the folder that they are loaded from, and a link
# counts as lying where the link lies. So the folder has the shape of the NIXL that it links to:
#     <folder>/nixl/plugins      for NIXL_PLUGIN_DIR
#     <folder>/nixl              NIXL's own libraries
#     <folder>/nixl_cu<N>.libs   those that came with its wheel
#
# Where NIXL is installed for several CUDAs (the package nixl brings nixl-cu12, vLLM adds nixl-cu13), it is the one that
# `import nixl` takes: that of torch's CUDA, else the newest.
set -eu
site=$1
folder=${2:-target/nixl-plugins}
ours=target/plugins

cuda=""
if [ -e "$site/torch/version.py" ]; then cuda=$(sed -n "s/^cuda.*= *'\([0-9]*\)\..*/\1/p" "$site/torch/version.py"); fi
stock=""
for core in "$site/.nixl_cu$cuda.mesonpy.libs" "$site/.nixl_cu13.mesonpy.libs" "$site"/.nixl*.mesonpy.libs; do
    if [ -n "$site" ] && [ -e "$core/plugins/libplugin_UCX.so" ]; then stock=$(readlink -f "$core"); break; fi
done
if [ -z "$stock" ]; then
    echo "install-plugins: no NIXL plugins under '$site'." >&2
    echo "  give the folder that NIXL is installed in: make install-plugins NIXL=\$(python -c 'import sysconfig; print(sysconfig.get_path(\"platlib\"))')" >&2
    exit 1
fi

# What an earlier run has linked goes: it may have been another NIXL's.
plugins=$folder/nixl/plugins
mkdir -p "$plugins"
find "$folder/nixl" -type l -delete
find "$folder" -maxdepth 1 -type l -name 'nixl*.libs' -delete
for library in "$stock"/lib*.so*; do
    ln -sfn "$library" "$folder/nixl/"
done
for libraries in "$(dirname "$stock")"/nixl*.libs; do
    if [ -d "$libraries" ]; then ln -sfn "$libraries" "$folder/"; fi
done
for plugin in "$stock"/plugins/lib*.so; do
    case $plugin in */libplugin_LIBFABRIC.so | */libplugin_Libfabric.so) continue ;; esac
    ln -sfn "$plugin" "$plugins/"
done
for plugin in "$ours"/libplugin_*.so; do
    # A rename, never a write into a file that a running process may have mapped.
    cp "$plugin" "$plugins/.new"
    mv "$plugins/.new" "$plugins/$(basename "$plugin")"
done
echo "install-plugins: $(ls "$plugins" | grep -c libplugin_) plugins, ours and those of $stock"
echo "  export NIXL_PLUGIN_DIR=$(readlink -f "$plugins")"
