"""What cases are made of: the table, what a case has at hand, the engine to compare with, and proofs that several cases share."""

import json
import random
import re
import shutil
import time
from pathlib import Path

from engines import BLOCK_TOKENS, Engine
from prompts import blocks, random_prompt

CROSSED = 100
CONCURRENT = 16
# Requests that are on their way to each decoder when the prefill engine is killed, half of them sent before.
HIT = 8
OTHERS = 5
OTHERS_ANSWER_S = 1.0
HIT_DEADLINE_S = 120
# Well below the 30 s after which vLLM frees what was never fetched.
BLOCKS_RETURN_S = 10
START = time.monotonic()


def say(text):
    print(f"[{time.monotonic() - START:5.0f} s] {text}", flush=True)


class Table:
    """Grows row by row, on the screen and in two files: what was seen is there also where a run is cut off."""

    def __init__(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.rows, self.numbers = folder, [], {}

    def add(self, case, proof, status, detail):
        self.rows.append((case, proof, status, detail))
        say(f"{case}: {status} {proof}: {detail}")
        self.write()

    def number(self, case, name, value):
        self.numbers.setdefault(case, {})[name] = value

    def write(self):
        (self.folder / "table.txt").write_text(f"{self}\n")
        (self.folder / "table.json").write_text(json.dumps({"rows": self.rows, "numbers": self.numbers}, indent=1))

    def failed(self):
        return any(status == "FAIL" for _, _, status, _ in self.rows)

    def __str__(self):
        head = ("case", "proof", "", "what was seen")
        widths = [max(len(row[column]) for row in [head, *self.rows]) for column in range(3)]
        lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]) for row in [head, *self.rows]]
        return "\n".join(lines)


class Case:
    """What one case has at hand: its name in the table, a folder for logs, the engine to compare with, what must be closed."""

    # What a proof that does not hold is called. A case that is there to compare with says what it saw, and fails nothing.
    failure = "FAIL"

    def __init__(self, name, place, table, reference, stack):
        self.name, self.place, self.table, self.reference, self.stack = name, place, table, reference, stack
        self.folder = table.folder / name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def keep(self, thing):
        self.stack.callback(thing.close)
        return thing

    def proof(self, name, well, detail=""):
        self.table.add(self.name, name, "PASS" if well else self.failure, detail)

    def note(self, name, detail):
        self.table.add(self.name, name, "-", detail)

    def number(self, name, value):
        self.table.number(self.name, name, value)

    def say(self, text):
        say(f"{self.name}: {text}")

    def expected(self, prompt):
        return self.reference(prompt)

    def block_bytes(self):
        return self.place.shape.block_bytes(BLOCK_TOKENS)


class Reference:
    """The answers of an engine that knows nothing of transfers; it starts beside the first engines and serves all cases."""

    def __init__(self, place, folder):
        self.place, self.folder, self.engine, self.known, self.is_ready = place, folder, None, {}, False

    def start(self):
        self.engine = self.engine or Engine(self.place, "reference", self.folder)

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


# Proofs


def rails_lines(engine):
    """What each agent of an engine said of its rails."""
    return [line for line in engine.log_text().splitlines() if re.search(r"nixl-libfabric agent [^:]+: libfabric ", line)]


def prove_plugin(case, engines, backend, provider):
    file = case.place.plugins / f"libplugin_{backend}.so"
    well, rails = True, ""
    for engine in engines:
        files = engine.files()
        libfabrics = {Path(path).resolve() for path in files if Path(path).name.startswith("libfabric.so")}
        others = [path for path in files if "/libplugin_" in path and Path(path).resolve() != file.resolve()]
        well &= any(Path(path).resolve() == file.resolve() for path in files) and len(libfabrics) == 1 and not others
        lines = [line for line in rails_lines(engine) if f"provider {provider}" in line]
        well &= len(lines) == 1
        rails = lines[0].split(", ", 1)[1].split(", topology")[0] if lines else "no line in the log"
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


def prove_transfers(case, mover, prompts):
    """What NIXL told of the transfers is what the prompts' blocks need; the transfers."""
    seen = mover.transfers()
    total, needed = sum(transfer["bytes"] for transfer in seen), blocks(*prompts) * case.block_bytes()
    case.proof("bytes", total == needed and len(seen) == len(prompts),
               f"{total} in {len(seen)} transfers = {blocks(*prompts)} blocks x {case.block_bytes()} for {len(prompts)} requests")
    return seen


def prove_two_workers(case, prefill, decode, lengths):
    """Prefill in one worker, decode in two with half of the heads each: either fetches its part of every block."""
    workers = [len(rails_lines(engine)) for engine in (prefill, decode)]
    case.proof("one worker and two", workers == [1, 2], f"{workers[0]} agent of the prefill engine, {workers[1]} of the decoder")
    prove_answers(case, prefill, decode, lengths)
    prove_crossing(case, prefill, decode)
    prove_concurrency(case, prefill, decode)
    prove_blocks_return(case, prefill)


def prove_nothing_failed(case, engines):
    counts = {}
    for engine in engines:
        for name, value in engine.metrics().items():
            if not isinstance(value, list):
                counts[name] = counts.get(name, 0) + value
    case.proof("no failures", not any(counts.values()), "failed transfers and notifications, expired leases: all 0" if not any(
        counts.values()) else str(counts))


def prove_blocks_return(case, engine):
    case.proof("blocks return", engine.blocks_return(BLOCKS_RETURN_S), f"the {engine.name} engine has all blocks back")


def prove_end(case, engines):
    statuses = [engine.ended() for engine in [engine.quit() for engine in engines]]
    case.proof("orderly end", not any(statuses) and None not in statuses, f"exit statuses {statuses}")


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


def prove_kill(case, prefill, decoders, restart, needs_peer=True):
    """kill -9 of the prefill engine while decoders, {policy: engine}, fetch from it. The engine of `restart` comes in its place.

    It stands still before that, so that transfers are in flight for certain: nothing answers them. Where a transfer needs nothing of
    its peer but its memory, those before the kill end well.
    """
    before, hits, usual = random_prompt(100, "before"), {}, 0.0
    works = True
    for policy, decode in decoders.items():
        works &= decode.generate(before, kv=prefill.prefill(before))["tokens"] == case.expected(before)
        usual = max(usual, answer_others(case, decode)[1])
        prompts = [random_prompt(300 + index, f"hit {policy}") for index in range(HIT)]
        expected = [case.expected(prompt) for prompt in prompts]
        hits[policy] = prompts, expected, [prefill.prefill(prompt) for prompt in prompts]
    case.proof("before", works, "a transfer works")

    def hit(part):
        return {policy: [decoders[policy].begin(prompt, kv=kv) for prompt, kv in list(zip(prompts, ready))[part]]
                for policy, (prompts, _, ready) in hits.items()}

    prefill.stop()
    sent = hit(slice(HIT // 2))
    stopped = [answer_others(case, decode) for decode in decoders.values()]
    prefill.kill()
    killed = time.monotonic()
    later = hit(slice(HIT // 2, HIT))
    dead = [answer_others(case, decode) for decode in decoders.values()]
    slowest = [max(seconds for _, seconds in seen) for seen in (stopped, dead)]
    case.proof("others go on", all(right for right, _ in stopped + dead) and max(slowest) < OTHERS_ANSWER_S,
               f"answers in at most {slowest[0]:.2f} s while it stands still, {slowest[1]:.2f} s after kill -9; {usual:.2f} s before")

    for policy, (_, expected, _) in hits.items():
        answers = [decoders[policy].wait(number, HIT_DEADLINE_S) for number in sent[policy] + later[policy]]
        took = time.monotonic() - killed
        right = [answer["tokens"] == tokens for answer, tokens in zip(answers, expected)]
        failed = [answer["reason"] == "error" for answer in answers]
        case.number(f"over after kill, {policy}, s", took)
        well = right if policy != "fail" else failed if needs_peer else [*right[: HIT // 2], *failed[HIT // 2 :]]
        case.proof(f"the hit requests, {policy}", all(well),
                   f"{sum(right)} right, {sum(failed)} failed, of {HIT}; the last {took:.1f} s after kill -9")
    for decode in decoders.values():
        prove_blocks_return(case, decode)

    case.say("starting the prefill engine again")
    again = restart().ready()
    prompts = [random_prompt(length, "again") for length in (33, 300)]
    right = [decode.generate(prompt, kv=again.prefill(prompt))["tokens"] == case.expected(prompt)
             for decode in decoders.values() for prompt in prompts]
    case.proof("restarted at the same address", all(right), "used again by the same decoder")
    prove_end(case, (again, *decoders.values()))
