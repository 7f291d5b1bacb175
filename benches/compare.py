"""Ours beside NIXL's own LIBFABRIC plugin and UCX, over tcp on one machine, in one run. Run by `make bench`.

Every round starts a fresh pair of agents for each plugin, with and without progress thread, one pair at a time and in a
changing order, and measures all shapes on it; the tables hold medians over all samples of all rounds. Both LIBFABRIC
plugins run on the same libfabric. A time is from the post to the moment when the poll of the state says DONE.

What the numbers are not: two busy-polling processes on a small machine measure its scheduler as much as the plugin, and tcp is
not EFA. Only the ratios within one run mean something.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "plugin-tests" / "e2e"))
sys.path.insert(0, str(ROOT / "benches"))

from bed.agent import Agent, Died, NoAnswer, Refused  # noqa: E402
from bed.networks import OneHost  # noqa: E402
from bed.places import NEWEST_LIBFABRIC, NIXL_VERSIONS, PLUGINS, TARGET, Host  # noqa: E402

import inside  # noqa: E402

KIB, MIB = 1 << 10, 1 << 20
# Name, blocks, bytes per block.
SHAPES = [
    ("4 KiB", 1, 4 * KIB), ("64 KiB", 1, 64 * KIB), ("1 MiB", 1, MIB), ("16 MiB", 1, 16 * MIB), ("64 MiB", 1, 64 * MIB),
    ("4096 x 16 KiB", 4096, 16 * KIB), ("16384 x 4 KiB", 16384, 4 * KIB),
]
OPERATIONS = ("WRITE", "READ")
BUFFER_BYTES = 128 * MIB
SAMPLES_MAX = 200
SAMPLES_MIN = 3
SHAPE_SECONDS = 0.4
IDLE_SECONDS = 2.0
WAKEUPS = 40
DEADLINE_S = 60


class Pair:
    """Two agents of one plugin, each with one large registered buffer."""

    def __init__(self, host, progress, network, folder):
        self.agents = []
        for name in ("near", "far"):
            log = folder / f"{host.plugin}-{name}.log"
            self.agents.append(Agent(name, host, network.space(0), log).create(progress_thread=progress))
        self.near, self.far = self.agents
        self.source = self.near.buffer(BUFFER_BYTES, seed=1)
        self.target = self.far.buffer(BUFFER_BYTES, seed=2)
        self.near.knows(self.far), self.far.knows(self.near)
        self.near.transfer("WRITE", [self.source[:8]], [self.target[:8]], self.far, b"met")
        self.far.receives(b"met", sender=self.near)

    def measure(self, operation, count, size, checked):
        step = size if count == 1 else 2 * size  # gaps, so that no two blocks can be joined
        parts = [slice(index * step, index * step + size) for index in range(count)]
        near, far = ([buffer[part] for part in parts] for buffer in (self.source, self.target))
        if checked:
            self.source.fill(3 if operation == "WRITE" else None)
            self.target.fill(None if operation == "WRITE" else 3)
        # Without a progress thread the far side must be driven, as its program would; with one it has nothing to do.
        self.far.begin("run", "inside", "stand_by", ())
        samples = self.near.run(
            inside.time_transfers, operation, near, far, "far", SAMPLES_MIN, SAMPLES_MAX, SHAPE_SECONDS, deadline=DEADLINE_S)
        self.far.begin("collect")
        self.far.finish(DEADLINE_S), self.far.finish(DEADLINE_S)
        if checked:
            changed = self.target if operation == "WRITE" else self.source
            changed.check(3, [(part.start, part.start, size) for part in parts])
        return samples

    def idle(self):
        """Share of a core that the idle far agent takes, in percent."""
        before = processor_seconds(self.far.process.pid)
        time.sleep(IDLE_SECONDS)
        return [100 * (processor_seconds(self.far.process.pid) - before) / IDLE_SECONDS]

    def wakeups(self):
        self.far.begin("run", "inside", "receive_times", (WAKEUPS, DEADLINE_S))
        self.near.run(inside.send_times, "far", WAKEUPS, deadline=DEADLINE_S)
        return self.far.finish(DEADLINE_S)

    def close(self):
        for agent in self.agents:
            agent.kill()


def processor_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run_pair(host, progress, network, folder, samples, checked):
    """Measures everything on one pair; what fails is said and left out."""

    def add(key, work):
        try:
            samples.setdefault((host.plugin, progress, *key), []).extend(work())
        except (Refused, NoAnswer, Died, AssertionError) as error:
            print(f"  {host.plugin}, {' '.join(map(str, key))}: {error}", flush=True)
            raise

    pair = None
    try:
        pair = Pair(host, progress, network, folder)
        for shape, count, size in SHAPES:
            for operation in OPERATIONS:
                add((operation, shape), lambda: pair.measure(operation, count, size, checked))
        if progress:
            add(("idle",), pair.idle)
            add(("wakeup",), pair.wakeups)
    except (Refused, NoAnswer, Died, AssertionError) as error:
        print(f"  {host.plugin}: gave up this round: {error}", flush=True)
    finally:
        if pair:
            pair.close()


def facts(rounds, plugins):
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "?")
    return {
        "time": time.strftime("%Y-%m-%d"), "processor": model, "cores": os.cpu_count(), "kernel": platform.release(),
        "nixl": NIXL_VERSIONS[0], "libfabric": NEWEST_LIBFABRIC, "rounds": rounds, "plugins": plugins, "load_at_start": os.getloadavg()[0],
    }


def number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def table(samples, plugins, progress):
    """Medians in microseconds and, for each of the others, how many times ours that is."""
    others = [plugin for plugin in plugins if plugin != "ours"]
    compared = others if "ours" in plugins else []
    yield f"| operation | shape | {' | '.join(f'{plugin}, us' for plugin in plugins)}{''.join(f' | {plugin} / ours' for plugin in compared)} |"
    yield "|---|---|" + "---:|" * (len(plugins) + len(compared))
    for operation in OPERATIONS:
        for shape, *_ in SHAPES:
            medians = {
                plugin: statistics.median(found) * 1e6
                for plugin in plugins if (found := samples.get((plugin, progress, operation, shape)))
            }
            cells = [number(medians[plugin]) if plugin in medians else "-" for plugin in plugins]
            cells += [f"{medians[plugin] / medians['ours']:.2f}" if {plugin, "ours"} <= set(medians) else "-" for plugin in compared]
            yield f"| {operation} | {shape} | {' | '.join(cells)} |"


def report(samples, about):
    plugins = about["plugins"]
    yield (f"{about['time']}, {about['cores']} cores of {about['processor']}, Linux {about['kernel']}, nixl-cu12 {about['nixl']}, "
           f"libfabric {about['libfabric']} (tcp), UCX over tcp; medians of {about['rounds']} interleaved rounds.")
    for progress in (False, True):
        yield f"\n### Progress thread {'on' if progress else 'off'}\n"
        yield from table(samples, plugins, progress)
    yield "\n### An idle agent with the progress thread on\n"
    yield "| plugin | processor, % of a core | notification to a sleeping agent, us (median) | 9 of 10 within, us |"
    yield "|---|---:|---:|---:|"
    for plugin in plugins:
        idle, wakeups = samples.get((plugin, True, "idle")), sorted(samples.get((plugin, True, "wakeup"), []))
        if idle and wakeups:
            ninth = wakeups[int(0.9 * (len(wakeups) - 1))]
            yield f"| {plugin} | {statistics.median(idle):.1f} | {number(statistics.median(wakeups) * 1e6)} | {number(ninth * 1e6)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plugins", default=",".join(PLUGINS))
    parser.add_argument("--out", type=Path, default=TARGET / "bench")
    chosen = parser.parse_args()
    plugins = chosen.plugins.split(",")
    about, samples, network = facts(chosen.rounds, plugins), {}, OneHost(links=1)
    quiet = (("NIXL_LOG_LEVEL", "ERROR"),)
    contestants = [
        (Host(plugin, extra=quiet), progress) for plugin in plugins for progress in (False, True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(chosen.rounds):
            shift = turn % len(contestants)
            for host, progress in contestants[shift:] + contestants[:shift]:
                print(f"round {turn + 1} of {chosen.rounds}: {host.plugin}, progress thread {'on' if progress else 'off'}", flush=True)
                run_pair(host, progress, network, Path(folder), samples, checked=turn == 0)
    network.close()
    text = "\n".join(report(samples, about)) + "\n"
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "compare.md").write_text(text)
    rows = [{"key": list(key), "seconds": values} for key, values in samples.items()]
    (chosen.out / "compare.json").write_text(json.dumps({"about": about, "samples": rows}, indent=1))
    print(f"\n{text}\nwritten to {chosen.out}/compare.md and compare.json")


if __name__ == "__main__":
    main()
