"""Whether two engines, each with a progress thread, starve each other where cores are few.

One pair of engines does the same work again and again, on other cores each time, by turns:

    own       the prefill engine on one core, the decoder on another
    shared    both engines on both of these cores
    one       both engines on one core

Measured is vLLM's own sum of transfer times (vllm:nixl_xfer_time_seconds) in a round, which is all prompts prefilled and decoded,
as many at a time as there are. What `shared` takes is compared with `own` of the same round, and so with the same noise of other
programs; the median over the rounds counts.
"""

import os
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

from prompts import LENGTHS, random_prompt

# UCX is there to compare with.
ROUNDS = {"ours": 100, "ucx": 20}
RATIO_MAX = 2.0
IDLE_S = 3


def confine(engine, cores):
    """All its threads, and those that they will start."""
    for task in Path(f"/proc/{engine.pid}/task").iterdir():
        try:
            os.sched_setaffinity(int(task.name), cores)
        except ProcessLookupError:
            pass


def progress_seconds(engine):
    """The processor time that our threads have had."""
    total = 0
    for task in Path(f"/proc/{engine.pid}/task").iterdir():
        try:
            if (task / "comm").read_text().startswith("nixl-fabric"):
                total += int((task / "schedstat").read_text().split()[0])
        except OSError:
            pass  # it ended meanwhile
    return total / 1e9


def work(case, prefill, decode, prompts):
    """Whether all answers are right: all prompts at once, each decoded as soon as it is prefilled."""
    prefills = [prefill.begin_prefill(prompt) for prompt in prompts]
    decodes = [decode.begin(prompt, kv=prefill.wait(number)["kv"]) for prompt, number in zip(prompts, prefills)]
    return [decode.wait(number)["tokens"] for number in decodes] == [case.expected(prompt) for prompt in prompts]


def measure(case, pair, prompts, cores):
    """Milliseconds: the sums of transfer and of post times, the whole round, and our threads' processor time in both engines."""
    for engine, own in zip(pair, cores):
        confine(engine, own)
    before, threads, start = pair[1].metrics(), sum(map(progress_seconds, pair)), time.monotonic()
    right = work(case, *pair, prompts)
    took = time.monotonic() - start
    after = pair[1].metrics()
    sums = [after[name][1] - before[name][1] for name in ("vllm:nixl_xfer_time_seconds", "vllm:nixl_post_time_seconds")]
    return right, [1000 * seconds for seconds in (*sums, took, sum(map(progress_seconds, pair)) - threads)]


def expired(pair):
    return sum(engine.metrics()["vllm:nixl_num_kv_expired_reqs"] for engine in pair)


def starve(case):
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        case.note("cores", "left out: it needs two")
        return
    first, second = ({core} for core in cores)
    layouts = {"own": (first, second), "shared": (first | second, first | second), "one": (first, first)}
    prompts = [random_prompt(length, "starve") for length in LENGTHS]
    for plugin in ("ours", "ucx"):
        with ExitStack() as stack:
            one = case.part(plugin, stack)
            pair = one.pair(plugin=plugin, backend="UCX" if plugin == "ucx" else "LIBFABRIC")
            seen, right = rounds(one, pair, prompts, layouts, ROUNDS[plugin])
            middle = compare(one, seen)
            if plugin == "ours":
                count = ROUNDS[plugin] * len(layouts)
                one.proof("no starvation", middle <= RATIO_MAX, f"{middle:.2f} is at most {RATIO_MAX}")
                one.proof("answers", right, f"as without transfer in {count} rounds of {len(prompts)} prompts")
                one.proof("no lease expires", expired(pair) == 0, f"vllm:nixl_num_kv_expired_reqs {expired(pair):.0f} after {count} rounds")
                one.note("idle", f"our threads {idle_share(pair):.2f} ms of processor time a second, both engines together")


def rounds(case, pair, prompts, layouts, count):
    """What was measured for each layout, and whether all answers were right. The first round connects the two engines."""
    all_right = work(case, *pair, prompts)
    seen = {name: [] for name in layouts}
    for number in range(count):
        for name in list(layouts) if number % 2 else reversed(layouts):
            right, numbers = measure(case, pair, prompts, layouts[name])
            all_right &= right
            seen[name].append(numbers)
    return seen, all_right


def compare(case, seen):
    """How many times the transfer time of `own` that of `shared` is."""
    for name, numbers in seen.items():
        transfer, post, took, threads = (statistics.median(column) for column in zip(*numbers))
        ratios = sorted(some[0] / own[0] for some, own in zip(numbers, seen["own"]))
        low, high = ratios[len(ratios) // 4], ratios[-len(ratios) // 4]
        case.note(f"cores: {name}", (
            f"{statistics.median(ratios):.2f} times `own`, half of the rounds {low:.2f} to {high:.2f}: "
            f"transfers {transfer:.1f} ms, of which post {post:.1f} ms, in a round of {took:.0f} ms"
            + (f"; our threads {threads:.1f} ms of processor time" if threads else "") + f"; load {os.getloadavg()[1]:.1f}"))
    return statistics.median(some[0] / own[0] for some, own in zip(seen["shared"], seen["own"]))


def idle_share(pair):
    before = sum(map(progress_seconds, pair))
    time.sleep(IDLE_S)
    return 1000 * (sum(map(progress_seconds, pair)) - before) / IDLE_S
