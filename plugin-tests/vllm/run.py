"""vLLM with prefill and decode in two engines, keys and values between them moved by our plugin: `make test-vllm`.

    target/venv/bin/python plugin-tests/vllm/run.py [case ...]

Each case starts engines of its own, beside one engine without any transfer that gives the answers to compare with. It ends
with a table of proofs, and with status 1 if one of them failed. Logs: target/vllm. The prompts are random token ids, the
answers 16 token ids at temperature 0.
"""

import argparse
import random
import shutil
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
from engines import BLOCK_BYTES, Engine, kv_config  # noqa: E402
from prompts import LENGTHS, blocks, random_prompt  # noqa: E402
from servers import Server  # noqa: E402

from bed.networks import OneHost  # noqa: E402
from bed.places import TARGET  # noqa: E402
from bed.softefa import SoftEfa  # noqa: E402

CROSSED = 100
CONCURRENT = 16
TIMED = 20
TIMED_LENGTH = 700
# Requests that are on their way when the prefill engine is killed, half of them sent before.
HIT = 8
OTHERS = 5
OTHERS_ANSWER_S = 1.0
HIT_DEADLINE_S = 120
# Well below the 30 s after which vLLM frees what was never fetched.
BLOCKS_RETURN_S = 10
PREFILL_PORT, DECODE_PORT = 5600, 5601
LOGS = TARGET / "vllm"


class Table:
    def __init__(self):
        self.rows = []

    def add(self, case, proof, status, detail):
        self.rows.append((case, proof, status, detail))
        say(f"{case}: {status} {proof}: {detail}")

    def failed(self):
        return any(status == "FAIL" for _, _, status, _ in self.rows)

    def __str__(self):
        head = ("case", "proof", "", "what was seen")
        widths = [max(len(row[column]) for row in [head, *self.rows]) for column in range(3)]
        lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]) for row in [head, *self.rows]]
        return "\n".join(lines)


START = time.monotonic()


def say(text):
    print(f"[{time.monotonic() - START:5.0f} s] {text}", flush=True)


class Case:
    """What one case has at hand: engines, networks, its name in the table."""

    def __init__(self, name, table, reference, stack):
        self.name, self.table, self.reference, self.stack = name, table, reference, stack
        self.folder = LOGS / name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.network = self.keep(OneHost())
        self.hosts = [[], []]

    def part(self, name, stack):
        """A case within this one, with engines of its own until `stack` ends."""
        return Case(f"{self.name}/{name}", self.table, self.reference, stack)

    def keep(self, thing):
        self.stack.callback(thing.close)
        return thing

    def proof(self, name, well, detail=""):
        self.table.add(self.name, name, "PASS" if well else "FAIL", detail)

    def note(self, name, detail):
        self.table.add(self.name, name, "-", detail)

    def say(self, text):
        say(f"{self.name}: {text}")

    def on_efa(self, devices, fault):
        efa = self.keep(SoftEfa(devices))
        efa.control(fault)
        self.hosts = [efa.host(0).enter(), efa.host(1).enter()]

    def engine(self, name, kv, plugin="ours"):
        decode = name.startswith("decode")
        self.reference.start()
        return self.keep(Engine(
            name, self.folder, kv, plugin, DECODE_PORT if decode else PREFILL_PORT,
            enter=[*self.network.space(0).enter(), *self.hosts[decode]],
        ))

    def pair(self, connector="NixlConnector", backend="LIBFABRIC", plugin="ours", policy="fail"):
        say(f"{self.name}: starting two engines: {connector}, {backend}, plugin {plugin}")
        prefill = self.engine("prefill", kv_config(connector, "kv_producer", backend, policy), plugin)
        decode = self.engine("decode", kv_config(connector, "kv_consumer", backend, policy), plugin)
        return prefill.ready(), decode.ready()

    def expected(self, prompt):
        return self.reference(prompt)


class Reference:
    """The answers of an engine that knows nothing of transfers; it starts beside the first engines and serves all cases."""

    def __init__(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.engine, self.known, self.is_ready = folder, None, {}, False

    def start(self):
        self.engine = self.engine or Engine("reference", self.folder)

    def __call__(self, prompt):
        self.start()
        if not self.is_ready:
            self.engine.ready()
            self.is_ready = True
        key = tuple(prompt)
        if key not in self.known:
            self.known[key] = self.engine.generate(prompt)["tokens"]
        return self.known[key]

    def close(self):
        if self.engine:
            self.engine.close()


# Proofs that several cases share


def prove_plugin(case, engines, backend, provider):
    file = setup.PLUGINS / f"libplugin_{backend}.so"
    well, rails = True, ""
    for engine in engines:
        files = engine.files()
        libfabrics = {Path(path).resolve() for path in files if Path(path).name.startswith("libfabric.so")}
        others = [path for path in files if "/libplugin_" in path and path != str(file)]
        well &= str(file) in files and len(libfabrics) == 1 and not others
        lines = [line for line in engine.log_text().splitlines() if "nixl-libfabric agent" in line and f"provider {provider}" in line]
        well &= len(lines) == 1
        rails = lines[0].split(", ", 1)[1].split(", memory")[0] if lines else "no line in the log"
    case.proof("our file is mapped", well, f"{file.name} and one libfabric in both processes; log: {rails}")


def prove_answers(case, prefill, decode, lengths):
    wrong = []
    prompts = [random_prompt(length, "answer") for length in lengths]
    for prompt in prompts:
        answer = decode.generate(prompt, kv=prefill.prefill(prompt))
        if answer["tokens"] != case.expected(prompt):
            wrong.append(f"{len(prompt)} ({answer['reason']})")
    case.proof("answers", not wrong, f"as without transfer for prompts of {', '.join(map(str, lengths))} tokens" + (
        f"; wrong: {', '.join(wrong)}" if wrong else ""))
    return prompts


def prove_crossing(case, prefill, decode):
    """The decoder computes the last token of the prompt itself, so both prompts end in the same."""
    fetched, asked = random_prompt(CROSSED, "fetched"), random_prompt(CROSSED, "asked")
    asked[-1] = fetched[-1]
    differ = case.expected(fetched) != case.expected(asked)
    answer = decode.generate(asked, kv=prefill.prefill(fetched))
    case.proof("crossing", differ and answer["tokens"] == case.expected(fetched),
               "asked B with the transfer parameters of A, and the answer is A's")
    return [fetched]


def prove_concurrency(case, prefill, decode):
    dice = random.Random("concurrent")
    prompts = [random_prompt(dice.randrange(20, 300), f"concurrent {index}") for index in range(CONCURRENT)]
    prefills = [prefill.begin_prefill(prompt) for prompt in prompts]
    decodes = [decode.begin(prompt, kv=prefill.wait(number)["kv"]) for prompt, number in zip(prompts, prefills)]
    answers = [decode.wait(number) for number in decodes]
    right = sum(answer["tokens"] == case.expected(prompt) for prompt, answer in zip(prompts, answers))
    case.proof("concurrent requests", right == CONCURRENT, f"{right} of {CONCURRENT} right, {sum(map(len, prompts))} tokens")
    return prompts


def transfers(metrics):
    """What vLLM counted: transfers, bytes, and mean times in milliseconds."""
    count, total = metrics["vllm:nixl_bytes_transferred"]
    mean = {name: 1000 * metrics[f"vllm:nixl_{name}_time_seconds"][1] / max(count, 1) for name in ("xfer", "post")}
    return count, total, mean


def prove_bytes(case, mover, prompts):
    count, total, mean = transfers(mover.metrics())
    expected = blocks(*prompts) * BLOCK_BYTES
    case.proof("bytes", total == expected and count == len(prompts),
               f"vllm:nixl_bytes_transferred {total:.0f} = {blocks(*prompts)} blocks x {BLOCK_BYTES}, {count} transfers")
    case.note("times", f"transfer {mean['xfer']:.2f} ms, of which post {mean['post']:.2f} ms, mean by vLLM's metrics")


def prove_nothing_failed(case, engines):
    counts = {}
    for engine in engines:
        for name, value in engine.metrics().items():
            if not isinstance(value, list):
                counts[name] = counts.get(name, 0) + value
    case.proof("no failures", not any(counts.values()), "failed transfers and notifications, expired leases: all 0" if not any(
        counts.values()) else str(counts))


def prove_end(case, engines):
    statuses = [engine.quit() for engine in engines]
    case.proof("orderly end", not any(statuses) and None not in statuses, f"exit statuses {statuses}")


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
    case.proof("blocks return", prefill.blocks_return(BLOCKS_RETURN_S), "every notification came: the prefill engine has all blocks back")
    prove_nothing_failed(case, (prefill, decode))
    prove_end(case, (prefill, decode))


def kill(case, policy="fail", efa=None):
    """kill -9 of the prefill engine while the decoder fetches from it.

    It stands still before that, so that transfers are in flight for certain: nothing answers them.
    """
    if efa:
        case.on_efa(*efa)
    prefill, decode = case.pair(policy=policy)
    before = random_prompt(100, "before")
    case.proof("before", decode.generate(before, kv=prefill.prefill(before))["tokens"] == case.expected(before), "a transfer works")
    usual = answer_others(case, decode)[1]

    prompts = [random_prompt(300 + index, "hit") for index in range(HIT)]
    expected = [case.expected(prompt) for prompt in prompts]
    ready = [prefill.prefill(prompt) for prompt in prompts]
    prefill.stop()
    hit = [decode.begin(prompt, kv=kv) for prompt, kv in zip(prompts[:HIT // 2], ready)]
    stopped = answer_others(case, decode)
    prefill.kill()
    killed = time.monotonic()
    hit += [decode.begin(prompt, kv=kv) for prompt, kv in zip(prompts[HIT // 2:], ready[HIT // 2:])]
    dead = answer_others(case, decode)
    slowest = max(stopped[1], dead[1])
    case.proof("others go on", stopped[0] and dead[0] and slowest < OTHERS_ANSWER_S,
               f"answers in at most {stopped[1]:.2f} s while it stands still, {dead[1]:.2f} s after kill -9; {usual:.2f} s before")

    answers = [decode.wait(number, HIT_DEADLINE_S) for number in hit]
    took = time.monotonic() - killed
    right = [answer["tokens"] == tokens for answer, tokens in zip(answers, expected)]
    failed = [answer["reason"] == "error" for answer in answers]
    case.proof("the hit requests", all(failed) if policy == "fail" else all(right),
               f"policy {policy}: {sum(right)} right, {sum(failed)} failed, of {HIT}; the last {took:.1f} s after kill -9")

    case.proof("blocks return", decode.blocks_return(BLOCKS_RETURN_S), "the decoder has all blocks back")

    say(f"{case.name}: starting the prefill engine again")
    again = case.engine("prefill-again", kv_config("NixlConnector", "kv_producer", "LIBFABRIC", policy)).ready()
    prompts = [random_prompt(length, "again") for length in (33, 300)]
    right = [decode.generate(prompt, kv=again.prefill(prompt))["tokens"] == case.expected(prompt) for prompt in prompts]
    case.proof("restarted at the same address", all(right), "used again by the same decoder")
    prove_end(case, (again, decode))


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
    case.proof("blocks return", decode.blocks_return(BLOCKS_RETURN_S), "the decoder has all blocks back")
    prove_end(case, (decode,))


def answer_others(case, decode):
    """Requests without any transfer, one after the other: whether all are right, and the longest time for one."""
    right, slowest = True, 0.0
    for index in range(OTHERS):
        prompt = random_prompt(20, f"other {index}")
        expected = case.expected(prompt)
        sent = time.monotonic()
        right &= decode.generate(prompt)["tokens"] == expected
        slowest = max(slowest, time.monotonic() - sent)
    return right, slowest


def servers(case):
    """Two API servers, each with its engine in another process, and a router between them that is this program."""
    say(f"{case.name}: starting two API servers")
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
    total, expected = decode.metric("vllm:nixl_bytes_transferred_sum"), blocks(*prompts, *many) * BLOCK_BYTES
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
    table, reference = Table(), Reference(LOGS)
    try:
        for name in wanted:
            with ExitStack() as stack:
                try:
                    CASES[name](Case(name, table, reference, stack))
                except Exception as problem:
                    (LOGS / name / "failure.log").write_text(traceback.format_exc())
                    table.add(name, "runs to its end", "FAIL", f"{type(problem).__name__}: {problem}")
    finally:
        reference.close()
    print(f"\n{table}\n")
    return 1 if table.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
