"""vLLM on a GPU, prefill and decode in two engines: the proofs of `make test-vllm`, and times, for each way that GPU memory can take.

    python3 plugin-tests/vllm/gpu/run.py <bundle> [case ...] [--limit <seconds>] [--out <folder>]

    <bundle>   the folder that unpack.sh made; "cpus": a rehearsal without a GPU, with the vLLM of `make test-vllm`
    case       such as staging-pull, or staging for all of that way; all of them by default, the most telling first

All engines share one GPU. Engines of the cases to come start while the first runs. No case can hang: each has a deadline, and
no case begins after --limit. The table grows row by row, on the screen and in <out>/table.txt and table.json; logs of the engines
are beside them. Status 1: a proof failed. --list says what the cases are and about how long they take.
"""

import argparse
import signal
import statistics
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent / "e2e")]

from fleet import Fleet, GpuCase  # noqa: E402
from place import WAYS, Bundle, Rehearsal  # noqa: E402
from prompts import LENGTHS, random_prompt  # noqa: E402
from proofs import (  # noqa: E402
    Reference, Table, prove_answers, prove_blocks_return, prove_concurrency, prove_crossing, prove_end, prove_kill,
    prove_nothing_failed, prove_plugin, prove_transfers, prove_two_workers, say,
)

START_DEADLINE_S, CASE_DEADLINE_S = 300, 120
# Tokens of a prompt, and how many of them: blocks of 32 tokens are 1 MiB each.
SMALL, LARGE, MIDDLE = (32, 20), (4000, 20), (2016, 8)


class Late(Exception):
    """The case did not end within its deadline."""


# What is done with a way


def serve(case):
    """As `make test-vllm` does over its networks, then times."""
    prefill, decode = case.engines["prefill"], case.engines["decode"]
    mover = prefill if case.part == "push" else decode
    if case.way.backend == "LIBFABRIC":
        prove_plugin(case, (prefill, decode), case.way.backend, case.way.provider)
    first = random_prompt(SMALL[0], "first")
    sent = time.monotonic()
    answer = decode.generate(first, kv=prefill.prefill(first))["tokens"]
    asked = time.monotonic() - sent
    prompts = [first, *prove_answers(case, prefill, decode, LENGTHS)]
    prompts += prove_crossing(case, prefill, decode)
    prompts += prove_concurrency(case, prefill, decode)
    seen = prove_transfers(case, mover, prompts)
    prove_blocks_return(case, prefill)
    if seen:
        case.number("first, ms", 1000 * seen[0]["seconds"])
        case.proof("first transfer", answer == case.expected(first),
                   f"{seen[0]['bytes'] / 2**20:g} MiB in {1000 * seen[0]['seconds']:.1f} ms, the request in {1000 * asked:.0f} ms")
        measure(case, prefill, decode, mover)
    if case.way.says:
        lines = [line for line in mover.log_text().splitlines() if case.way.says in line]
        case.proof("it goes this way", bool(lines), lines[0].split("nixl-libfabric ")[-1] if lines else "no line in the log")
    prove_nothing_failed(case, (prefill, decode))
    prove_end(case, (prefill, decode))


def measure(case, prefill, decode, mover):
    """By NIXL's own times of each transfer: from its post to the moment that vLLM sees its end."""
    case.fleet.settle()
    for length, count in (SMALL, LARGE):
        prompts = [random_prompt(case.fits(length), f"timed {index}") for index in range(count)]
        before = len(mover.transfers())
        for prompt in prompts:
            decode.generate(prompt, tokens=1, kv=prefill.prefill(prompt))
        seen = mover.transfers()[before:]
        size = seen[0]["bytes"]
        seconds, post = (statistics.median(transfer[name] for transfer in seen) for name in ("seconds", "post"))
        case.number(f"{size / 2**20:g} MiB, ms", 1000 * seconds)
        case.note(f"{size / 2**20:g} MiB", (
            f"median of {len(seen)}: {1000 * seconds:.2f} ms, {size / seconds / 1e9:.2f} GB/s, of which post {1000 * post:.2f} ms; "
            f"{1000 * min(transfer['seconds'] for transfer in seen):.2f} to {1000 * max(transfer['seconds'] for transfer in seen):.2f} ms; "
            f"{seen[0]['descriptors']} descriptors"))
    together(case, prefill, decode, mover)


def together(case, prefill, decode, mover):
    """Several large transfers at once: bytes by the time from the first post to the last end."""
    length, count = MIDDLE
    prompts = [random_prompt(case.fits(length), f"together {index}") for index in range(count)]
    ready = [prefill.prefill(prompt) for prompt in prompts]
    before = len(mover.transfers())
    for number in [decode.begin(prompt, tokens=1, kv=kv) for prompt, kv in zip(prompts, ready)]:
        decode.wait(number)
    seen = mover.transfers()[before:]
    took = max(transfer["end"] for transfer in seen) - min(transfer["end"] - transfer["seconds"] for transfer in seen)
    rate = sum(transfer["bytes"] for transfer in seen) / took / 1e9
    case.number("8 at once, GB/s", rate)
    case.note(f"{count} at once", f"{len(seen)} of {seen[0]['bytes'] / 2**20:g} MiB in {1000 * took:.0f} ms, {rate:.2f} GB/s together")


def kill(case):
    """One prefill engine dies, two decoders fetch from it: one fails what it hit, the other computes it itself."""
    decoders = {"fail": case.engines["decode"], "recompute": case.engines["decode-recompute"]}
    prove_kill(case, case.engines["prefill"], decoders, case.engines["prefill-again"].go, needs_peer=not case.way.option)


def two_workers(case):
    prove_two_workers(case, case.engines["prefill"], case.engines["decode"], LENGTHS)


PARTS = {"pull": serve, "push": serve, "kill": kill, "tp": two_workers}
# What most depends on a GPU first. With each: about how many seconds, engines being up.
ORDER = [
    *((way, part) for way in ("staging", "same-host", "ucx") for part in ("pull", "push")),
    *((way, "kill") for way in ("staging", "same-host")),
    *((way, part) for way in ("host", "ucx-host") for part in ("pull", "push")),
    *((way, "kill") for way in ("host", "ucx")),
    *(("efa", part) for part in ("pull", "push", "kill")),
    ("staging", "tp"), ("host", "tp"),
    *((way, part) for way in ("host-same-host", "ucx-tcp") for part in ("pull", "push")),
]
EXPECTED_S = {"pull": 12, "push": 12, "kill": 15, "tp": 60}
FIRST_START_S = 60


def chosen(words, parser):
    names = [f"{way}-{part}" for way, part in ORDER]
    wanted = []
    for word in words:
        if found := [name for name in names if name == word or name.rpartition("-")[0] == word]:
            wanted += [name for name in found if name not in wanted]
        else:
            parser.error(f"unknown case {word}; known: {', '.join(names)}, and {', '.join(WAYS)}")
    return wanted or names


def listing(names):
    for name in names:
        way, _, part = name.rpartition("-")
        print(f"{name:20} {EXPECTED_S[part]:4} s  {WAYS[way].what}{'; prefill in one worker, decode in two' if part == 'tp' else ''}")
    print(f"{'':20} {FIRST_START_S:4} s  until the first engines are up")


def limited(seconds, what):
    """Calls it, and raises Late in it when the time is up."""
    def ring(*_):
        raise Late(f"not over after {seconds:.0f} s")

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        what()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def run_all(cases, fleet, table, end):
    for index, case in enumerate(cases):
        left = end - time.monotonic()
        try:
            if reason := case.missing():
                table.add(case.name, "left out", "SKIP", reason)
            elif left < EXPECTED_S[case.part]:
                table.add(case.name, "left out", "SKIP", "no time was left")
            else:
                fleet.ahead(index)
                limited(min(left, START_DEADLINE_S), case.ready)
                limited(max(1, min(end - time.monotonic(), CASE_DEADLINE_S)), lambda: PARTS[case.part](case))
        except Exception as problem:
            (case.folder / "failure.log").write_text(traceback.format_exc())
            table.add(case.name, "runs to its end", case.failure, f"{type(problem).__name__}: {problem}")
        finally:
            case.stack.close()
            case.engines = {}


def summary(table):
    """The numbers as a table for the documentation."""
    names = list(dict.fromkeys(name for numbers in table.numbers.values() for name in numbers))
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for case, numbers in table.numbers.items():
        lines.append(f"| {case} | " + " | ".join(f"{numbers[name]:.3g}" if name in numbers else "" for name in names) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("cases", nargs="*", metavar="case")
    parser.add_argument("--out", type=Path, default=Path("vllm-gpu"), help="folder for the table and the logs (vllm-gpu)")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for the whole (1800)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a variable for all engines on our plugin")
    parser.add_argument("--plugin", type=Path, help="a newer libnixl_libfabric.so, in place of the bundle's")
    parser.add_argument("--list", action="store_true", help="say what would run, and about how long it takes")
    options = parser.parse_args()
    names = chosen(options.cases, parser)
    if options.list:
        return listing(names)
    end = time.monotonic() + options.limit
    place = Rehearsal() if options.bundle == Path("cpus") else Bundle(options.bundle.resolve(), options.plugin)
    table = Table(options.out.resolve())
    reference = Reference(place, table.folder)
    fleet = Fleet(reference)
    extra = dict(pair.split("=", 1) for pair in options.set)
    for name in names:
        way, _, part = name.rpartition("-")
        fleet.cases.append(GpuCase(name, WAYS[way], part, place, table, reference, fleet, extra))
    say(f"{len(fleet.cases)} cases; what grows: {table.folder}/table.txt")
    try:
        run_all(fleet.cases, fleet, table, end)
    finally:
        for case in fleet.cases:
            case.stack.close()
        reference.close()
    text = f"{table}\n\n{summary(table)}\n"
    (table.folder / "summary.md").write_text(text)
    print(f"\n{text}")
    return 1 if table.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
