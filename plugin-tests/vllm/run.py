"""vLLM with prefill and decode in two engines, keys and values between them moved by our plugin: `make test-vllm`.

    target/venv/bin/python plugin-tests/vllm/run.py [case ...]

Each case starts engines of its own, beside one engine without any transfer that gives the answers to compare with. It ends
with a table of proofs, and with status 1 if one of them failed. Logs: target/vllm. The prompts are random token ids, the
answers 16 token ids at temperature 0.
"""

import argparse
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import setup  # noqa: E402
import starve  # noqa: E402
import upstream  # noqa: E402
from cpus import CPUS  # noqa: E402
from engines import TWO_WORKERS, Engine, kv_config  # noqa: E402
from prompts import LENGTHS, blocks, random_prompt  # noqa: E402
from proofs import (  # noqa: E402
    CONCURRENT, HIT_DEADLINE_S, OTHERS_ANSWER_S, Case, Reference, Table, answer_others, prove_answers, prove_blocks_return,
    prove_concurrency, prove_crossing, prove_end, prove_kill, prove_nothing_failed, prove_plugin, prove_two_workers,
)
from servers import Server  # noqa: E402

from bed.networks import OneHost  # noqa: E402
from bed.places import TARGET  # noqa: E402
from bed.softefa import SoftEfa  # noqa: E402

TIMED = 20
TIMED_LENGTH = 700
PREFILL_PORT, DECODE_PORT = 5600, 5601


class CpuCase(Case):
    """On this host's CPUs, in a network of its own."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.network = self.keep(OneHost())
        self.hosts = [[], []]

    def part(self, name, stack):
        """A case within this one, with engines of its own until `stack` ends."""
        return CpuCase(f"{self.name}/{name}", self.place, self.table, self.reference, stack)

    def on_efa(self, devices, fault):
        efa = self.keep(SoftEfa(devices))
        efa.control(fault)
        self.hosts = [efa.host(0).enter(), efa.host(1).enter()]

    def engine(self, name, kv, plugin="ours", options=None):
        decode = name.startswith("decode")
        self.reference.start()
        return self.keep(Engine(
            self.place, name, self.folder, kv, plugin, DECODE_PORT if decode else PREFILL_PORT,
            enter=[*self.network.space(0).enter(), *self.hosts[decode]], options=options,
        ))

    def pair(self, connector="NixlConnector", backend="LIBFABRIC", plugin="ours", policy="fail"):
        self.say(f"starting two engines: {connector}, {backend}, plugin {plugin}")
        prefill = self.engine("prefill", kv_config(connector, "kv_producer", backend, policy), plugin)
        decode = self.engine("decode", kv_config(connector, "kv_consumer", backend, policy), plugin)
        return prefill.ready(), decode.ready()


def transfers(metrics):
    """What vLLM counted: transfers, bytes, and mean times in milliseconds."""
    count, total = metrics["vllm:nixl_bytes_transferred"]
    mean = {name: 1000 * metrics[f"vllm:nixl_{name}_time_seconds"][1] / max(count, 1) for name in ("xfer", "post")}
    return count, total, mean


def prove_bytes(case, mover, prompts):
    """By vLLM's own metrics."""
    count, total, mean = transfers(mover.metrics())
    expected = blocks(*prompts) * case.block_bytes()
    case.proof("bytes", total == expected and count == len(prompts),
               f"vllm:nixl_bytes_transferred {total:.0f} = {blocks(*prompts)} blocks x {case.block_bytes()}, {count} transfers")
    case.note("times", f"transfer {mean['xfer']:.2f} ms, of which post {mean['post']:.2f} ms, mean by vLLM's metrics")


# Cases


def serve(case, connector="NixlConnector", backend="LIBFABRIC", provider="tcp", lengths=LENGTHS, efa=None):
    if efa:
        case.on_efa(*efa)
    prefill, decode = case.pair(connector, backend)
    prove_plugin(case, (prefill, decode), backend, provider)
    prompts = prove_answers(case, prefill, decode, lengths)
    prompts += prove_crossing(case, prefill, decode)
    prompts += prove_concurrency(case, prefill, decode)
    prove_bytes(case, prefill if connector == "NixlPushConnector" else decode, prompts)
    prove_blocks_return(case, prefill)
    prove_nothing_failed(case, (prefill, decode))
    prove_end(case, (prefill, decode))


def kill(case, policy="fail", efa=None):
    if efa:
        case.on_efa(*efa)
    prefill, decode = case.pair(policy=policy)
    kv = kv_config("NixlConnector", "kv_producer", "LIBFABRIC", policy)
    prove_kill(case, prefill, {policy: decode}, lambda: case.engine("prefill-again", kv))


def kill_idle(case, efa=None):
    """kill -9 of the prefill engine between two transfers; the next one finds nobody.

    libfabric's tcp does not tell that a peer has gone when it carries nothing for it: it connects again and again, and what
    fails the transfer is connect_timeout_ms.
    """
    if efa:
        case.on_efa(*efa)
    prefill, decode = case.pair()
    before, hit = random_prompt(100, "before"), random_prompt(300, "hit")
    case.proof("before", decode.generate(before, kv=prefill.prefill(before))["tokens"] == case.expected(before), "a transfer works")
    kv = prefill.prefill(hit)
    prefill.kill()
    right, _ = answer_others(case, decode)
    sent = time.monotonic()
    number = decode.begin(hit, kv=kv)
    still, slowest = answer_others(case, decode)
    case.proof("others go on", right and still and slowest < OTHERS_ANSWER_S, f"answers in at most {slowest:.2f} s")
    answer = decode.wait(number, HIT_DEADLINE_S)
    case.proof("the hit request", answer["reason"] == "error", f"failed after {time.monotonic() - sent:.1f} s")
    prove_blocks_return(case, decode)
    prove_end(case, (decode,))


def servers(case):
    """Two API servers, each with its engine in another process, and a router between them that is this program."""
    case.say("starting two API servers")
    case.reference.start()

    def start(name, role, port):
        return case.keep(Server(name, case.folder, kv_config("NixlConnector", role, "LIBFABRIC"), port, case.network.space(0).enter()))

    prefill, decode = start("prefill", "kv_producer", PREFILL_PORT), start("decode", "kv_consumer", DECODE_PORT)
    prefill.ready(), decode.ready()
    file = setup.PLUGINS / "libplugin_LIBFABRIC.so"
    mapped = [server.maps(file) for server in (prefill, decode)]
    case.proof("our file is mapped", all(mapped) and prefill.process.pid not in mapped[0], "in the worker's process of both servers")

    def route(prompt):
        return decode.complete(prompt, kv=prefill.prefill(prompt))[0]

    prompts = [random_prompt(length, "served") for length in LENGTHS]
    wrong = [len(prompt) for prompt in prompts if route(prompt) != case.expected(prompt)]
    case.proof("answers", not wrong, f"as without transfer, but for prompts of {wrong} tokens" if wrong else "as without transfer")
    many = [random_prompt(50 + 13 * index, "served at once") for index in range(CONCURRENT)]
    expected = [case.expected(prompt) for prompt in many]
    with ThreadPoolExecutor(CONCURRENT) as pool:
        right = sum(answer == tokens for answer, tokens in zip(pool.map(route, many), expected))
    case.proof("concurrent requests", right == CONCURRENT, f"{right} of {CONCURRENT} right")
    total, expected = decode.metric("vllm:nixl_bytes_transferred_sum"), blocks(*prompts, *many) * case.block_bytes()
    case.proof("bytes", total == expected, f"/metrics: {total:.0f}, expected {expected}")

    hit, other = random_prompt(300, "hit"), random_prompt(20, "other")
    expected, kv = case.expected(other), prefill.prefill(hit)
    prefill.kill()
    with ThreadPoolExecutor(1) as pool:
        failing = pool.submit(decode.complete, hit, kv=kv)
        sent = time.monotonic()
        answer = decode.complete(other)[0]
        took = time.monotonic() - sent
        failed = failing.result()[0] is None
        ended = time.monotonic() - sent
    case.proof("others go on", answer == expected and took < OTHERS_ANSWER_S, f"answered {took:.2f} s after kill -9 of the prefill server")
    case.proof("the hit request", failed, f"the server answers it with an error, after {ended:.1f} s")
    prefill = start("prefill-again", "kv_producer", PREFILL_PORT).ready()
    prompt = random_prompt(100, "again")
    case.proof("restarted at the same address", route(prompt) == case.expected(prompt), "used again by the same decoder")
    statuses = [server.quit() for server in (prefill, decode)]
    case.proof("orderly end", statuses == [0, 0], f"exit statuses {statuses} after SIGTERM")


def tensor_parallel(case, connector="NixlConnector"):
    case.say(f"starting an engine of one worker and one of two: {connector}")
    prefill = case.engine("prefill", kv_config(connector, "kv_producer", "LIBFABRIC"))
    decode = case.engine("decode", kv_config(connector, "kv_consumer", "LIBFABRIC"), options=TWO_WORKERS)
    prefill.ready(), decode.ready()
    prove_two_workers(case, prefill, decode, LENGTHS)
    prove_end(case, (prefill, decode))


def ucx_kept(case):
    """UCX out of the same folder of plugins."""
    prefill, decode = case.pair(backend="UCX")
    mapped = [any(Path(path).name == "libplugin_UCX.so" for path in engine.files()) for engine in (prefill, decode)]
    case.proof("UCX's file is mapped", all(mapped), "libplugin_UCX.so in both processes, NIXL_PLUGIN_DIR being our folder")
    prove_answers(case, prefill, decode, (33, 257))


def times(case):
    """Ours, NIXL's own plugin and UCX in turn. Numbers of one run on a busy machine: only large differences mean something."""
    prompts = [random_prompt(TIMED_LENGTH, f"timed {index}") for index in range(TIMED)]
    for plugin in ("ours", "stock", "ucx"):
        try:
            with ExitStack() as stack:
                one = case.part(plugin, stack)
                prefill, decode = one.pair(plugin=plugin, backend="UCX" if plugin == "ucx" else "LIBFABRIC")
                right = sum(decode.generate(prompt, kv=prefill.prefill(prompt))["tokens"] == one.expected(prompt) for prompt in prompts)
                count, total, mean = transfers(decode.metrics())
                detail = (f"{right} of {TIMED} right; {total / max(count, 1) / 2**20:.2f} MiB a transfer, "
                          f"{mean['xfer']:.2f} ms, of which post {mean['post']:.2f} ms")
                one.proof("times", right == TIMED, detail) if plugin == "ours" else one.note("times", detail)
        except Exception as problem:
            if plugin == "ours":
                raise
            case.note(f"{plugin}: no times", str(problem))


REORDERED = (4, "reorder_us=500 hold_pct=50")
CASES = {
    "pull": serve,
    "push": partial(serve, connector="NixlPushConnector"),
    "name": partial(serve, backend="Libfabric", lengths=(5, 257)),
    "efa": partial(serve, provider="efa", efa=REORDERED),
    "efa-push": partial(serve, connector="NixlPushConnector", provider="efa", efa=REORDERED),
    "kill": kill,
    "kill-recompute": partial(kill, policy="recompute"),
    "kill-efa": partial(kill, efa=REORDERED),
    "kill-idle": kill_idle,
    "kill-idle-efa": partial(kill_idle, efa=REORDERED),
    "tp": tensor_parallel,
    "tp-push": partial(tensor_parallel, connector="NixlPushConnector"),
    "servers": servers,
    "ucx-kept": ucx_kept,
    "unit": upstream.unit,
    "edge": upstream.edge,
    "times": times,
    "starve": starve.starve,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(CASES)}; all of them by default")
    wanted = parser.parse_args().cases or list(CASES)
    if unknown := [name for name in wanted if name not in CASES]:
        parser.error(f"unknown case {', '.join(unknown)}; known: {', '.join(CASES)}")
    table = Table(TARGET / "vllm")
    reference = Reference(CPUS, table.folder)
    try:
        for name in wanted:
            with ExitStack() as stack:
                try:
                    CASES[name](CpuCase(name, CPUS, table, reference, stack))
                except Exception as problem:
                    (table.folder / name / "failure.log").write_text(traceback.format_exc())
                    table.add(name, "runs to its end", "FAIL", f"{type(problem).__name__}: {problem}")
    finally:
        reference.close()
    print(f"\n{table}\n")
    return 1 if table.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
