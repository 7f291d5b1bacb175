"""Instructions for each descriptor, counted by callgrind: ours and NIXL's own LIBFABRIC plugin. Run by `make cost`.

benches/cost/driver.cpp opens two engines of a plugin in one process and drives them in turn by one thread; callgrind writes a
profile for each phase of each transfer, benches/cost/profiles.py reads them, and this file runs and compares. Method and
results: benches/README.md.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from choices import ROOT, STRAIGHT, TARGET, machine, network_and_rails, plugin_named

from bed.networks import OneHost
from bed.softefa import SoftEfa

sys.path.insert(0, str(ROOT / "benches" / "cost"))

import profiles  # noqa: E402

DRIVER = TARGET / "bench" / "cost-driver"
RUN_DEADLINE_S = 600
# The driver's status when a transfer does not end.
EXIT_DEADLINE = 3
PROVIDER = {"tcp": [("FI_PROVIDER", "tcp")], "efa": []}
# As many as the driver makes in one idle phase.
IDLE_CALLS = 1000
PARTS = ("plugin", "libraries", "libfabric")
# Row of the table, and the phases of the driver that it adds up.
ROWS = [
    ("prepare", ["shuffled prepare"]),
    ("prepare, contiguous", ["contiguous prepare"]),
    ("post", ["shuffled post"]),
    ("complete", ["shuffled complete"]),
    ("**post + complete**", ["shuffled post", "shuffled complete"]),
    ("**receive**", ["shuffled receive"]),
    ("release", ["shuffled release"]),
]
IDLE_ROWS = [("getNotifs, idle", 0, "none idle look"), ("checkXfer, done", None, "shuffled idle check")]
LAST_PHASE = "contiguous release"
FUNCTION_PHASES = ("shuffled prepare", "shuffled post", "shuffled complete", "shuffled receive")
FUNCTIONS_SHOWN = 12
NAME_SHOWN = 80


def build_driver():
    if not shutil.which("valgrind"):
        raise SystemExit("cost: no valgrind here: install the package valgrind, which also brings valgrind/callgrind.h")
    DRIVER.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-g1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'include'}",
         "-o", DRIVER, ROOT / "benches" / "cost" / "driver.cpp", "-ldl", "-pthread"], check=True)


def network_of(name, rails):
    if name == "tcp":
        return OneHost(links=rails)
    network = SoftEfa(devices=rails, hosts=1)
    # Both agents are in one process, so on one host.
    network.control(f"loopback=1 {STRAIGHT}")
    return network


def measure(case, plugin, operation, counts, folder):
    """{(descriptors, "list phase"): {turn: profile}}."""
    name, rails = case
    network = network_of(name, rails)
    host = plugin.host(("NIXL_LOG_LEVEL", "FATAL"), *PROVIDER[name])
    command = [
        *network.space(0).enter(), "valgrind", "--tool=callgrind", "--quiet", "--instr-atstart=no",
        f"--callgrind-out-file={folder / 'out'}", str(DRIVER), str(plugin.file),
        *(["-o", "devices=eth*"] if name == "tcp" and rails > 1 else []), operation, *map(str, counts),
    ]
    try:
        done = subprocess.run(command, env=host.environment(), timeout=RUN_DEADLINE_S, capture_output=True, text=True)
    finally:
        network.close()
    if done.returncode == EXIT_DEADLINE:
        print(f"cost: {plugin.name}, {name}, {rails} rails: a transfer did not end; what came after it is left out", flush=True)
    elif done.returncode != 0:
        raise SystemExit(f"cost: {plugin.name}, {name}, {rails} rails: the driver ended with {done.returncode}\n{done.stderr}")
    connections = int(done.stdout.split()[1])
    if name == "tcp" and connections < rails:
        raise SystemExit(f"cost: {plugin.name}: {connections} connections where {rails} rails were wanted")
    found = defaultdict(lambda: defaultdict(profiles.Profile))
    for file in folder.glob("out.*"):
        label, profile = profiles.read(file)
        if label:
            count, phase = label.split(" ", 1)
            phase, turn = phase.rsplit(" ", 1)
            if turn != "0":  # it warms up
                found[int(count), phase][turn] += profile
    return found


def figures(found, count, phases, divisor):
    """For each part the median over turns, and how far apart the plugin's own are."""
    turns = found[count, phases[0]]
    totals = [sum((found[count, phase][turn] for phase in phases), profiles.Profile()).parts() for turn in turns]
    values = {part: statistics.median(total[part] for total in totals) / divisor for part in PARTS}
    own = [total["plugin"] / divisor for total in totals]
    return values | {"plugin_least": min(own), "plugin_most": max(own)}


def table_of(found, counts):
    """{(descriptors or "a call", row's name): figures} for one plugin and number of rails."""
    # A transfer that did not end leaves a turn without its last phase.
    whole = [count for count in counts if 0 < len(found[count, LAST_PHASE]) == len(found[count, ROWS[0][1][0]])]
    rows = {(count, name): figures(found, count, phases, count) for count in whole for name, phases in ROWS}
    for name, count, phase in IDLE_ROWS:
        if count is not None or whole:
            rows["a call", name] = figures(found, whole[0] if count is None else count, [phase], IDLE_CALLS)
    return rows


def number(value):
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def cost_table(plugins, tables):
    yield "| descriptors | phase |" + "".join(f" {plugin} | its libraries | libfabric |" for plugin in plugins)
    yield "|---:|---|" + "---:|---:|---:|" * len(plugins)
    keys = dict.fromkeys(key for table in tables.values() for key in table)
    for number_of, name in sorted(keys, key=lambda key: isinstance(key[0], str)):
        cells = (
            number(tables[plugin][number_of, name][part]) if (number_of, name) in tables.get(plugin, {}) else "-"
            for plugin in plugins for part in PARTS
        )
        label = f"{number_of:,}" if isinstance(number_of, int) else number_of
        yield f"| {label} | {name} | {' | '.join(cells)} |"


def function_costs(found, count, phases):
    """{function of the plugin, or called by it: {phase: instructions per descriptor}}, the dearest first."""
    costs = defaultdict(lambda: dict.fromkeys(phases, 0.0))
    for phase in phases:
        turns = found[count, phase]
        for turn in turns.values():
            own = {function: cost for (owner, function), cost in turn.functions.items() if owner == "plugin"}
            called = {f"-> {name}": cost for name, cost in turn.called("plugin", "system").items()}
            for function, cost in (own | called).items():
                costs[function][phase] += cost / len(turns) / count
    return dict(sorted(costs.items(), key=lambda item: -sum(item[1].values())))


def short(function):
    """Rust's paths without the crate, C++ names without their parameters; the end of a name says more than its beginning."""
    name = re.sub(r"nixl_libfabric::|<impl [^<>]*>::", "", function)
    name = re.sub(r"(\w)\(.*$", r"\1", name).replace("|", " ")
    return name if len(name) <= NAME_SHOWN else "..." + name[3 - NAME_SHOWN :]


def function_table(costs, phases):
    yield f"| function | {' | '.join(phase.split()[1] for phase in phases)} |"
    yield "|---|" + "---:|" * len(phases)
    for function, by_phase in list(costs.items())[:FUNCTIONS_SHOWN]:
        yield f"| `{short(function)}` | {' | '.join(number(by_phase[phase]) for phase in phases)} |"


def report(about, results):
    """`results`: {(network, rails): {plugin: (table, functions)}}."""
    yield (f"{about['time']}, {about['processor']}, nixl-cu12 {about['nixl']}, libfabric {about['libfabric']}, {about['valgrind']}; "
           f"{about['operation'].upper()}, instructions per descriptor of 4 KiB, or per call.")
    for (network, rails), plugins in results.items():
        yield f"\n### {network}, {rails} rail{'s' if rails > 1 else ''}\n"
        yield from cost_table(list(plugins), {plugin: table for plugin, (table, _) in plugins.items()})
        if (network, rails) != next(iter(results)):
            continue  # cost.json has them
        for plugin, (_, functions) in plugins.items():
            yield f"\nFunctions of {plugin}, {about['functions_at']:,} descriptors:\n"
            yield from function_table(functions, FUNCTION_PHASES)


def facts(operation, counts):
    version = subprocess.run(["valgrind", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    return machine() | {
        "valgrind": version, "operation": operation, "functions_at": min(counts, key=lambda count: abs(count - 4096)),
    }


def rows_of(case, plugin, about, table, functions):
    """What goes into the JSON file."""
    start = {"network": case[0], "rails": case[1], "plugin": plugin}
    for (count, name), values in table.items():
        yield start | {"descriptors": count, "phase": name.strip("*"), "instructions": values}
    for function, by_phase in functions.items():
        yield start | {"descriptors": about["functions_at"], "function": function, "instructions": by_phase}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--descriptors", default="1,64,4096,16384", help="lengths of the lists")
    parser.add_argument("--networks", default="tcp:1,tcp:32,efa:32", help="interfaces (tcp) or software EFA devices (efa): their number")
    parser.add_argument("--operation", choices=("write", "read"), default="write")
    parser.add_argument("--plugin", default="ours,stock", help="ours, stock, and folders with other builds of ours, as FOLDER or NAME=FOLDER")
    parser.add_argument("--keep", action="store_true", help="leave callgrind's files, for callgrind_annotate")
    parser.add_argument("--out", type=Path, default=TARGET / "bench")
    chosen = parser.parse_args()
    counts = [int(count) for count in chosen.descriptors.split(",")]
    plugins = [plugin_named(text) for text in chosen.plugin.split(",")]
    if any(plugin.kind == "ucx" for plugin in plugins):
        raise SystemExit("cost: the driver calls LIBFABRIC plugins; ucx is none")
    build_driver()
    about, results, rows = facts(chosen.operation, counts), {}, []
    for case in map(network_and_rails, chosen.networks.split(",")):
        results[case] = {}
        for plugin in plugins:
            if plugin.kind == "stock" and case[0] == "tcp" and case[1] > 1:
                print("cost: over tcp the C++ plugin opens one rail, whatever interfaces there are: left out", flush=True)
                continue
            print(f"cost: {plugin.name}, {case[0]}, {case[1]} rails", flush=True)
            folder = Path(tempfile.mkdtemp(prefix="cost-"))
            found = measure(case, plugin, chosen.operation, counts, folder)
            functions = function_costs(found, about["functions_at"], FUNCTION_PHASES)
            results[case][plugin.name] = table_of(found, counts), functions
            rows += rows_of(case, plugin.name, about, *results[case][plugin.name])
            if chosen.keep:
                print(f"cost: callgrind's files are in {folder}", flush=True)
            else:
                shutil.rmtree(folder)
    text = "\n".join(report(about, results)) + "\n"
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "cost.md").write_text(text)
    (chosen.out / "cost.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    print(f"{text}\nwritten to {chosen.out}/cost.md and cost.json")


if __name__ == "__main__":
    main()
