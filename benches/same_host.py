"""Host memory of two processes of one host: this plugin without a network, beside a bare process_vm copy, its own tcp path, NIXL's
own LIBFABRIC plugin over tcp, and UCX with all that it has, in one run. Run by `make bench-same-host`. Method and results:
benches/README.md.
"""

import argparse
import os
import shutil
import statistics
from pathlib import Path

from choices import TARGET, machine, plugin_named

from bed.networks import OneHost

import inside
from pair import KIB, MIB, SAMPLES_MAX, SAMPLES_MIN, SHAPE_SECONDS, Pair

SHAPES = [("4 KiB", 1, 4 * KIB), ("1 MiB", 1, MIB), ("64 MiB", 1, 64 * MIB), ("4096 x 16 KiB", 4096, 16 * KIB)]
OPERATIONS = ("WRITE", "READ")
BARE = "bare copy"
AUTO = ("NIXL_LIBFABRIC_SAME_HOST", "auto")
SUBJECTS = {
    "same host": ("ours", (AUTO,)),
    "tcp": ("ours", ()),
    "stock, tcp": ("stock", ()),
    "UCX, shared memory": ("ucx", (("UCX_TLS", "all"),)),
}
DEADLINE_S = 60


def measure(subject, progress, network, folder, checked):
    """Samples of one pair by operation and shape, and those of the bare copy between the same two processes."""
    kind, extra = SUBJECTS[subject]
    folder = folder / f"same-host-logs-{subject.replace(', ', '-').replace(' ', '-')}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pair = Pair(plugin_named(kind).host(("NIXL_LOG_LEVEL", "INFO" if kind == "ours" else "ERROR"), *extra), progress, network, folder)
    found = {}
    try:
        if kind == "ours" and (("is on this host" in pair.near.log_text()) != (AUTO in extra)):
            raise SystemExit(f"benches: '{subject}' did not go the way that its name says; see {pair.near.log}")
        for operation in OPERATIONS:
            for shape, count, size in SHAPES:
                found[subject, operation, shape] = pair.measure(operation, count, size, checked)
                if AUTO in extra:
                    places = pair.places(count, size)
                    near, far = ([buffer[part] for part in places] for buffer in (pair.source, pair.target))
                    samples, _ = pair.beside(
                        None, inside.time_bare_copies, operation, near, far, pair.far.process.pid, SAMPLES_MIN, SAMPLES_MAX,
                        SHAPE_SECONDS)
                    found[BARE, operation, shape] = samples
        return found
    finally:
        pair.close()


def table(found, progress):
    columns = ["same host", BARE, *[subject for subject in SUBJECTS if subject != "same host"]]
    yield f"#### Times until DONE, progress thread {'on' if progress else 'off'}"
    yield ""
    yield "| operation | shape |" + "".join(f" {name}, us |" for name in columns) + "".join(f" {name} / same host |" for name in columns[1:])
    yield "|---|---|" + "---:|" * (2 * len(columns) - 1)
    for operation in OPERATIONS:
        for shape, *_ in SHAPES:
            times = [1e6 * statistics.median(found[name, operation, shape]) for name in columns]
            cells = [f"{value:,.1f}" if value < 100 else f"{value:,.0f}" for value in times]
            cells += [f"{value / times[0]:.2f}" for value in times[1:]]
            yield f"| {operation} | {shape} | {' | '.join(cells)} |"
    yield ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=TARGET / "bench")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    network = OneHost(links=1)
    found = {False: {}, True: {}}
    load = os.getloadavg()
    try:
        for turn in range(chosen.rounds):
            order = list(SUBJECTS)[turn % len(SUBJECTS) :] + list(SUBJECTS)[: turn % len(SUBJECTS)]
            for progress, samples in found.items():
                for subject in order:
                    print(f"round {turn + 1} of {chosen.rounds}: {subject}, progress thread {'on' if progress else 'off'}", flush=True)
                    for key, values in measure(subject, progress, network, chosen.out, turn == 0).items():
                        samples.setdefault(key, []).extend(values)
    finally:
        network.close()
    about = machine()
    lines = [f"{about['time']}, {about['cores']} cores of {about['processor']}, Linux {about['kernel']}, nixl-cu12 {about['nixl']}, "
             f"libfabric {about['libfabric']}; medians of {chosen.rounds} interleaved rounds; load average {load[0]:.1f} at the start, "
             f"{os.getloadavg()[0]:.1f} at the end.", ""]
    text = "\n".join([*lines, *(line for progress, samples in found.items() for line in table(samples, progress))])
    (chosen.out / "same-host.md").write_text(text)
    print(f"\n{text}\nwritten to {chosen.out}/same-host.md")


if __name__ == "__main__":
    main()
