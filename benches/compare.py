"""Ours beside NIXL's own LIBFABRIC plugin, UCX and other builds of ours, on one machine, in one run. Run by `make bench`.

Every round starts a fresh pair of agents for each plugin, with and without progress thread, one pair at a time and in a
changing order, and measures all shapes on it (pair.py); the tables (tables.py) and plots (plots.py) hold medians over all
samples of all rounds. Every LIBFABRIC plugin runs on the same libfabric. Method and results: benches/README.md.

What the numbers are not: two busy-polling processes on a small machine measure its scheduler as much as the plugin, and neither
tcp nor a software device is EFA. Only the ratios within one run mean something.
"""

import argparse
import json
import os
from pathlib import Path

from choices import STRAIGHT, TARGET, machine, network_and_rails, plugin_named

from bed.agent import Died, NoAnswer, Refused
from bed.networks import OneHost
from bed.softefa import SoftEfa

import plots
from pair import LONG_LISTS, OPERATIONS, SHAPES, Pair
from tables import on_or_off, report

PLUGINS = {"tcp": "ours,stock,ucx", "efa": "ours,stock"}
# The last: a process that ended before it was asked.
FAILURES = (Refused, NoAnswer, Died, AssertionError, BrokenPipeError)


def network_of(text):
    name, rails = network_and_rails(text)
    if name == "efa":
        network = SoftEfa(devices=rails)
        network.control(STRAIGHT)
        return name, network
    if rails > 1:
        raise SystemExit(f"bench: --network {text}: over tcp the C++ plugin and UCX have one rail here, whatever interfaces there are")
    return name, OneHost(links=1)


def run_pair(plugin, progress, network, folder, shapes, samples, checked):
    """Measures everything on one pair; what fails is said, and the rest of the pair left out."""

    def add(*key):
        return samples.setdefault((plugin.name, progress, *key), [])

    pair, what = None, "start"
    try:
        # The plugin's own warnings would be written while it is measured.
        pair = Pair(plugin.host(("NIXL_LOG_LEVEL", "ERROR")), progress, network, folder)
        what = "notified WRITE"
        done, there = pair.notified()
        add("notified", "done").extend(done), add("notified", "there").extend(there)
        for shape in shapes:
            for operation in OPERATIONS:
                what = f"{operation} {shape[0]}"
                add(operation, shape[0]).extend(pair.measure(operation, *shape[1:], checked))
                if shape in LONG_LISTS:
                    add("processor", operation, shape[0]).append(pair.processor(operation, *shape[1:]))
        if progress:
            what = "idle"
            add("idle").append(pair.idle())
            add("wakeup").extend(pair.wakeups())
    except FAILURES as error:
        print(f"  {plugin.name}, {what}: gave up this round: {error}", flush=True)
    finally:
        if pair:
            pair.close()


def options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="tcp", help="tcp, or efa:N for N software EFA devices on each of two hosts")
    parser.add_argument("--plugins", help="ours, stock, ucx (tcp only), and folders with other builds of ours, as FOLDER or NAME=FOLDER")
    parser.add_argument("--shapes", help=f"some of: {', '.join(name for name, *_ in SHAPES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=TARGET / "bench")
    return parser.parse_args()


def shapes_named(text):
    shapes = [shape for shape in SHAPES if text is None or shape[0] in text.split(",")]
    if not shapes:
        raise SystemExit(f"bench: --shapes {text}: known are {', '.join(name for name, *_ in SHAPES)}")
    return shapes


def main():
    chosen = options()
    shapes = shapes_named(chosen.shapes)
    kind, network = network_of(chosen.network)
    plugins = [plugin_named(text) for text in (chosen.plugins or PLUGINS[kind]).split(",")]
    if kind == "efa" and any(plugin.kind == "ucx" for plugin in plugins):
        raise SystemExit("bench: UCX does not run on software EFA devices: leave it out of --plugins")
    about = machine() | {
        "network": chosen.network, "rounds": chosen.rounds, "plugins": [plugin.name for plugin in plugins],
        "load_at_start": os.getloadavg()[0],
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    contestants = [(plugin, progress) for plugin in plugins for progress in (False, True)]
    samples = {}
    for turn in range(chosen.rounds):
        shift = turn % len(contestants)
        for plugin, progress in contestants[shift:] + contestants[:shift]:
            print(f"round {turn + 1} of {chosen.rounds}: {plugin.name}, progress thread {on_or_off(progress)}", flush=True)
            run_pair(plugin, progress, network, chosen.out, shapes, samples, checked=turn == 0)
    network.close()
    text = "\n".join(report(samples, about)) + "\n"
    start = chosen.out / f"compare-{chosen.network.replace(':', '-')}"
    start.with_suffix(".md").write_text(text)
    rows = [{"key": list(key), "values": values} for key, values in samples.items()]
    start.with_suffix(".json").write_text(json.dumps({"about": about, "samples": rows}, indent=1))
    pictures = plots.draw(samples, about, plugins=about["plugins"], start=start)
    print(f"\n{text}\nwritten to {start}.md, {', '.join([f'{start.name}.json', *(picture.name for picture in pictures)])}")


if __name__ == "__main__":
    main()
