#!/bin/sh
# Runs the cases that need a GPU: PASS, FAIL or SKIP for each, and the versions. Exit status 0: nothing failed.
#
#   run.sh BUNDLE      a folder or .tar.xz that pack.sh made: the plugin, a libfabric with CUDA, a NIXL wheel
#
# It needs python3 with numpy (and PyTorch, for the cases about it), CUDA's runtime library, no network and no compiler.
# LIMIT_S (default 480) bounds the whole. OUT, if set, names a folder for the log. ONLY, if set, is a list of what to run:
# shm tcp staging same_host sweep sanitizer efa. The last needs a bundle with software EFA devices: GPU memory is then registered with
# libfabric's real efa provider, by dmabuf, by address, and where the host refuses both.
#
# Without a GPU: cuda-standin/build.sh DIR, then LD_LIBRARY_PATH=DIR NIXL_LIBFABRIC_LIBCUDA=DIR/libcuda.so.1
# CUDA_STANDIN_HIDDEN=1 ONLY="efa same_host" run.sh BUNDLE.
set -u
here=$(cd "$(dirname "$0")" && pwd)
bundle=${1:?a bundle made by pack.sh}
limit=${LIMIT_S:-480}
only=${ONLY:-shm tcp staging same_host sanitizer efa}
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
export PYTHONPATH="$bundle/nixl:$here" CASES_LOG="$log.part"
# Both ends are on one host here, and most cases are about providers: those about the host say so by an option.
export NIXL_LIBFABRIC_SAME_HOST=off
libraries=${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LD_LIBRARY_PATH="$bundle/libfabric$libraries"

wanted() {
    case " $only " in *" $1 "*) return 0 ;; esac
    return 1
}

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
    grep -E '^(PASS|FAIL|SKIP|VERSIONS|NUMBER)  ' "$log.part"
    if [ $status -ne 0 ] && ! grep -q '^FAIL' "$log.part"; then
        echo "FAIL  $name  the run ended with status $status" | tee -a "$log.part"
    fi
    cat "$log.part" >>"$log"
    rm "$log.part"
}

nvidia-smi --query-gpu=index,name,pci.bus_id,driver_version --format=csv,noheader 2>/dev/null
# The cases on software EFA devices, two hosts with four each, which hold and reorder half of what they carry. Arguments:
# fabric, and the registrations of GPU memory that the hosts take.
efa() {
    export EFA_FABRIC=$1 SOFTEFA_GPU=$2 SOFTEFA_ENV="$bundle/softefa/softefa-env"
    export SOFTEFA_DIR="/dev/shm/softefa-gpu-$$" SOFTEFA_DEVICES=4 SOFTEFA_TRACE=1 FI_LOG_LEVEL="${FI_LOG_LEVEL:-warn}"
    mkdir -p "$SOFTEFA_DIR"
    echo "reorder_us=500 hold_pct=50" >"$SOFTEFA_DIR/control"
    before=$(grep -c '^FAIL' "$log")
    LD_LIBRARY_PATH="$bundle/libfabric-efa$libraries" cases efa efa "$SOFTEFA_ENV" --host a --
    if [ "$(grep -c '^FAIL' "$log")" -ne "$before" ]; then
        for trace in "$SOFTEFA_DIR"/trace-*; do
            echo "== the last of $trace"
            "$SOFTEFA_ENV" trace "$trace" | tail -n 200
        done >>"$log"
    fi
    rm -rf "$SOFTEFA_DIR"
}

wanted shm && cases shm shm
wanted tcp && cases tcp tcp
wanted staging && cases staging tcp
wanted same_host && cases same_host tcp
wanted sweep && cases sweep tcp
if ! wanted efa; then
    :
elif [ ! -d "$bundle/softefa" ]; then
    echo "SKIP  efa  the bundle has no software EFA devices (pack.sh says how)" | tee -a "$log"
else
    for way in dmabuf pointer none; do
        efa efa "$way"
    done
    for way in dmabuf pointer; do
        efa efa-direct "$way"
    done
fi
if ! wanted sanitizer; then
    :
elif command -v compute-sanitizer >/dev/null; then
    cases sanitizer shm compute-sanitizer --tool memcheck --error-exitcode 9 --target-processes application-only
else
    echo "SKIP  sanitizer  compute-sanitizer is not here" | tee -a "$log"
fi
failed=$(grep -c '^FAIL' "$log")
echo "$(grep -c '^PASS' "$log") passed, $failed failed, $(grep -c '^SKIP' "$log") skipped; log: $log"
[ "$failed" -eq 0 ]
