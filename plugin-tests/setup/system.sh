#!/bin/sh
# usage: system.sh [<section>]
# Installs the Debian packages that versions.toml names in a section, [debian] if none is said, as root or through sudo. Does
# nothing when all are there.
set -eu
section=${1:-debian}
here=$(cd "$(dirname "$0")" && pwd)

if ! command -v cargo >/dev/null 2>&1; then
    echo "setup: no cargo on PATH. Install Rust 1.88 or newer first (rustup, or your distribution's package)." >&2
    exit 1
fi

# The list stands in versions.toml; python3 may be among what is missing, so sed reads it.
packages=$(sed -n "/^\[$section\]/,/^]/"'{/^ *"/{s/[",]/ /g;p}}' "$here/versions.toml")
[ -n "$packages" ] || { echo "setup: no packages found in versions.toml" >&2; exit 1; }
missing=""
for package in $packages; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
if [ -z "$missing" ]; then
    echo "setup: Debian packages: all there"
    exit 0
fi
if ! command -v apt-get >/dev/null 2>&1; then
    echo "setup: not a Debian system: install by hand what stands for:$missing" >&2
    exit 1
fi
as_root=""
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null 2>&1 || { echo "setup: needs root or sudo to install:$missing" >&2; exit 1; }
    as_root="sudo"
fi
echo "setup: Debian packages: installing$missing"
$as_root apt-get update -qq
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing >/dev/null
