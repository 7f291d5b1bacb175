#!/bin/sh
# Runs the cases that need a GPU: PASS, FAIL or SKIP for each, and the versions. Exit status 0: nothing failed.
#
#   run.sh BUNDLE      a folder or .tar.xz that pack.sh made: the plugin, a libfabric with CUDA, a NIXL wheel
#
# It needs python3 with numpy (and PyTorch, for the cases about it), CUDA's runtime library, no network and no compiler.
# LIMIT_S (default 220) bounds the whole. OUT, if set, names a folder for the log.
set -u
here=$(cd "$(dirname "$0")" && pwd)
bundle=${1:?a bundle made by pack.sh}
limit=${LIMIT_S:-220}
end=$(($(date +%s) + limit))
if [ -f "$bundle" ]; then
    unpacked=$(mktemp -d)
    tar -xJf "$bundle" -C "$unpacked" || exit 2
    bundle=$unpacked
fi
bundle=$(cd "$bundle" && pwd)
log=${OUT:-$(mktemp -d)}/gpu.log
: >"$log"

export NIXL_PLUGIN_DIR="$bundle/plugin" NIXL_LOG_LEVEL="${NIXL_LOG_LEVEL:-INFO}" PYTHONUNBUFFERED=1
export PYTHONPATH="$bundle/nixl:$here" LD_LIBRARY_PATH="$bundle/libfabric${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"

# One run of cases.py, its lines to the screen and everything to the log. Arguments: name, provider, command in front.
cases() {
    name=$1 provider=$2
    shift 2
    left=$((end - $(date +%s)))
    if [ "$left" -lt 5 ]; then
        echo "FAIL  $name  no time was left" | tee -a "$log"
        return
    fi
    FI_PROVIDER=$provider timeout "$left" "$@" python3 "$here/cases.py" "$name" >"$log.part" 2>&1
    status=$?
    grep -E '^(PASS|FAIL|SKIP|VERSIONS)  ' "$log.part"
    if [ $status -ne 0 ] && ! grep -q '^FAIL' "$log.part"; then
        echo "FAIL  $name  the run ended with status $status" | tee -a "$log.part"
    fi
    cat "$log.part" >>"$log"
    rm "$log.part"
}

nvidia-smi --query-gpu=index,name,pci.bus_id,driver_version --format=csv,noheader 2>/dev/null
cases shm shm
cases tcp tcp
cases staging tcp
if command -v compute-sanitizer >/dev/null; then
    cases sanitizer shm compute-sanitizer --tool memcheck --error-exitcode 9 --target-processes application-only
else
    echo "SKIP  sanitizer  compute-sanitizer is not here" | tee -a "$log"
fi
failed=$(grep -c '^FAIL' "$log")
echo "$(grep -c '^PASS' "$log") passed, $failed failed, $(grep -c '^SKIP' "$log") skipped; log: $log"
[ "$failed" -eq 0 ]
