"""How long the first transfer to a peer takes: ours beside NIXL's own LIBFABRIC plugin, on 32 software EFA devices on each of
two hosts, in one run. Run by `make bench-first`. Method and results: benches/README.md.
"""

import argparse
import statistics
import time
from pathlib import Path

from choices import STRAIGHT, TARGET, machine, plugin_named

from bed.agent import Agent
from bed.softefa import SoftEfa

import inside

BLOCK_BYTES = 4 << 10
DEADLINE_S = 120
# The provider gives a rail its packets, 9 MB, at its first poll: half a second for 32, which is opening's, not the peer's.
SETTLE_S = 2
PARTS = ("add_remote_agent", "make_connection", "first WRITE", "in all", "second WRITE")
HANDLES = "address handles"


def handles(network, devices):
    return sum(values["softefa_address_handles"] for index in range(2) for values in network.host(index, devices).counters().values())


def measure(plugin, devices, blocks, connects, folder):
    """Seconds of each part of one pair's first transfer, and address handles that the pair made meanwhile."""
    network = SoftEfa(devices=devices)
    network.control(STRAIGHT)
    agents = []
    try:
        for index, name in enumerate(("near", "far")):
            agent = Agent(name, plugin.host(("NIXL_LOG_LEVEL", "ERROR")), network.space(index), folder / f"{name}.log")
            agents.append(agent)
            agent.create(progress_thread=True)
        near, far = agents
        source, target = near.buffer(2 * blocks * BLOCK_BYTES, seed=1), far.buffer(2 * blocks * BLOCK_BYTES)
        parts = [slice(2 * at * BLOCK_BYTES, (2 * at + 1) * BLOCK_BYTES) for at in range(blocks)]
        time.sleep(SETTLE_S)
        before = handles(network, devices)
        times = near.run(
            inside.time_first, far.call("metadata"), "far", [source[part] for part in parts], [target[part] for part in parts],
            connects, deadline=DEADLINE_S)
        made = handles(network, devices) - before
        target.check(1, [(part.start, part.start, BLOCK_BYTES) for part in parts])
        return dict(zip(PARTS, times)) | {HANDLES: made}
    finally:
        for agent in agents:
            agent.kill()
        network.close()


def table(found, plugins):
    first, *others = plugins
    yield "| blocks | connected before | part |" + "".join(f" {name}, ms |" for name in plugins) + "".join(f" {other} / {first} |" for other in others)
    yield "|---:|---|---|" + "---:|" * (2 * len(plugins) - 1)
    for blocks, connects in dict.fromkeys(key[1:] for key in found):
        for part in (*PARTS, HANDLES):
            values = {name: statistics.median(sample[part] for sample in found[name, blocks, connects]) for name in plugins}
            counted = part == HANDLES
            cells = [f"{value:,.0f}" if counted else f"{1000 * value:,.1f}" for value in values.values()]
            cells += [f"{values[other] / values[first]:.2f}" if values[first] else "-" for other in others]
            yield f"| {blocks} | {'yes' if connects else 'no'} | {part}{' (number)' if counted else ''} | {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=32)
    parser.add_argument("--blocks", default="1,256", help=f"blocks of {BLOCK_BYTES} bytes in the first transfer")
    parser.add_argument("--plugins", default="ours,stock", help="ours, stock, and folders with other builds of ours, as FOLDER or NAME=FOLDER")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=TARGET / "bench")
    chosen = parser.parse_args()
    plugins = [plugin_named(text) for text in chosen.plugins.split(",")]
    chosen.out.mkdir(parents=True, exist_ok=True)
    cases = [(blocks, connects) for blocks in map(int, chosen.blocks.split(",")) for connects in (False, True)]
    found = {}
    for turn in range(chosen.rounds):
        shift = turn % len(plugins)
        for case in cases:
            for plugin in plugins[shift:] + plugins[:shift]:
                print(f"round {turn + 1} of {chosen.rounds}: {plugin.name}, {case[0]} blocks", flush=True)
                sample = measure(plugin, chosen.devices, *case, chosen.out)
                found.setdefault((plugin.name, *case), []).append(sample)
    about = machine()
    lines = [f"{about['time']}, {about['cores']} cores of {about['processor']}, nixl-cu12 {about['nixl']}, libfabric {about['libfabric']}; "
             f"{chosen.devices} software EFA devices on each host; medians of {chosen.rounds} interleaved rounds.", ""]
    text = "\n".join([*lines, *table(found, [plugin.name for plugin in plugins])]) + "\n"
    (chosen.out / "first.md").write_text(text)
    print(f"\n{text}\nwritten to {chosen.out}/first.md")


if __name__ == "__main__":
    main()
