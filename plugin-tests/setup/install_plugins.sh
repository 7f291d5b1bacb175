#!/bin/sh
# usage: install_plugins.sh <site-packages> [<folder>]
# Makes a folder for NIXL_PLUGIN_DIR, which replaces NIXL's own: links to the plugins of the NIXL found there, and ours.
set -eu
site=$1
folder=${2:-target/nixl-plugins}
ours=target/plugins

stock=""
for candidate in "$site"/.nixl*.mesonpy.libs/plugins "$site"/.nixl*.mesonpy.libs; do
    if [ -n "$site" ] && [ -e "$candidate/libplugin_UCX.so" ]; then stock=$(readlink -f "$candidate"); break; fi
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
echo "install-plugins: $(ls "$folder" | grep -c libplugin_) plugins in $folder"
echo "  export NIXL_PLUGIN_DIR=$(readlink -f "$folder")"
