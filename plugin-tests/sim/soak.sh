#!/bin/sh
# Runs schedules until one fails, or until it is stopped. Argument: the first seed.
set -eu
cd "$(dirname "$0")/../.."
first=${1:-1000000}
while :; do
    if ! SIM_FIRST=$first SIM_SEEDS=2000 RUST_BACKTRACE=0 \
        cargo test -q -p nixl-libfabric-sim --test schedules the_laws -- --nocapture; then
        exit 1
    fi
    first=$((first + 2000))
    echo "next: $0 $first"
done
