"""What a slow device costs: ours beside NIXL's own LIBFABRIC plugin, on software EFA devices of which one is slow, in one run.
Run by `make bench-slow`. Method and results: benches/README.md.
"""

import argparse
import statistics
from pathlib import Path

from choices import STRAIGHT, TARGET, machine, plugin_named

from bed.agent import Agent
from bed.softefa import SoftEfa

import inside

DEADLINE_S = 300
# Of host memory every device carries its part, however many the links above them could feed.
ALL_DEVICES = {"max_bw_per_dram_seg": 1_000_000}


def measure(plugin, chosen, slow, folder):
    """Seconds of each transfer, and MiB that each device of the sender wrote."""
    network = SoftEfa(devices=chosen.devices)
    agents = []
    try:
        for index, name in enumerate(("near", "far")):
            agent = Agent(name, plugin.host(("NIXL_LOG_LEVEL", "ERROR")), network.space(index), folder / f"{name}.log")
            agents.append(agent)
            agent.create(progress_thread=True, **ALL_DEVICES)
        names = sorted(network.host(0).counters())
        lines = [STRAIGHT, f"src=h0 gbps={chosen.gbps}"]
        if slow:
            # Not the first, which carries messages too.
            lines.append(f"src=h0/{names[-1]} gbps={chosen.gbps / chosen.slower}")
        network.control(*lines)
        near, far = agents
        size = chosen.blocks * chosen.block
        source, target = near.buffer(2 * size, seed=1), far.buffer(2 * size)
        parts = [slice(2 * at * chosen.block, (2 * at + 1) * chosen.block) for at in range(chosen.blocks)]
        near.knows(far)
        times = near.run(
            inside.time_transfers, "WRITE", [source[part] for part in parts], [target[part] for part in parts], "far",
            chosen.transfers, chosen.transfers, 0, deadline=DEADLINE_S)
        target.check(1, [(part.start, part.start, chosen.block) for part in parts])
        written = network.host(0).counters()
        return times, [written[name]["rdma_write_bytes"] / (1 << 20) for name in names]
    finally:
        for agent in agents:
            agent.kill()
        network.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--gbps", type=float, default=0.4, help="speed of a device: low enough that the processor does not decide")
    parser.add_argument("--slower", type=float, default=10, help="how many times slower one of them is")
    parser.add_argument("--blocks", type=int, default=256)
    parser.add_argument("--block", type=int, default=128 << 10, help="bytes")
    parser.add_argument("--transfers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plugins", default="ours,stock", help="ours, stock, and folders with other builds of ours, as FOLDER or NAME=FOLDER")
    parser.add_argument("--out", type=Path, default=TARGET / "bench")
    chosen = parser.parse_args()
    plugins = [plugin_named(text) for text in chosen.plugins.split(",")]
    chosen.out.mkdir(parents=True, exist_ok=True)
    found, shares = {}, {}
    for turn in range(chosen.rounds):
        shift = turn % len(plugins)
        for slow in (False, True):
            for plugin in plugins[shift:] + plugins[:shift]:
                times, written = measure(plugin, chosen, slow, chosen.out)
                found.setdefault((plugin.name, slow), []).extend(times)
                shares[plugin.name, slow] = written
                print(f"round {turn + 1} of {chosen.rounds}: {plugin.name}, {'one slow' if slow else 'all alike'}: "
                      f"{statistics.median(times):.2f} s", flush=True)
    bits = 8 * chosen.blocks * chosen.block
    about = machine()
    lines = [
        f"{about['time']}, {about['cores']} cores of {about['processor']}, nixl-cu12 {about['nixl']}, libfabric {about['libfabric']}; "
        f"{chosen.devices} software EFA devices of {chosen.gbps} Gb/s, WRITEs of {chosen.blocks} blocks of {chosen.block >> 10} KiB; "
        f"medians of {chosen.rounds} interleaved rounds.", "",
        "| devices |" + "".join(f" {plugin.name}, Gb/s |" for plugin in plugins) + f" {plugins[0].name} / {plugins[-1].name} | MiB by each device |",
        "|---|" + "---:|" * (len(plugins) + 1) + "---|",
    ]
    for slow in (False, True):
        speeds = [bits / statistics.median(found[plugin.name, slow]) / 1e9 for plugin in plugins]
        carried = "; ".join(f"{plugin.name} {', '.join(f'{part:.0f}' for part in shares[plugin.name, slow])}" for plugin in plugins)
        what = f"one at 1/{chosen.slower:g} of its speed" if slow else "all alike"
        lines.append(f"| {what} |" + "".join(f" {speed:.2f} |" for speed in speeds) + f" {speeds[0] / speeds[-1]:.2f} | {carried} |")
    text = "\n".join(lines) + "\n"
    (chosen.out / "slow.md").write_text(text)
    print(f"\n{text}\nwritten to {chosen.out}/slow.md")


if __name__ == "__main__":
    main()
