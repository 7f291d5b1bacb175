"""GPU memory by way of host memory, beside page-locked host memory over the same provider: rates, first transfers, deaths."""

import os
import signal
import time

import cuda
from checks import KIB, MIB, expect, meet
from node import Remote

SIZES = [64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB]
# A death is told by what happens, so it takes a moment; by a time-out it would take connect_timeout_ms, which is 30 s.
DEATH_S_MAX = 10
KINDS = ("pinned", "cudaMalloc")


class Way:
    """Memory of one kind at two agents that know each other."""

    def __init__(self, a, b, kind, size):
        self.a, self.b, self.size, self.segment = a, b, size, cuda.Block.KINDS[kind]
        self.here, self.there = a.allocate(kind, size), b.allocate(kind, size)
        a.register(self.here, size)
        b.register(self.there, size)

    def handle(self, operation, size=None, at=0):
        local, remote = ([(address + at, size or self.size, 0)] for address in (self.here, self.there))
        return self.a.prepare(operation, (local, self.segment), (remote, self.segment), self.b.name)

    def free(self):
        self.a.free(self.here)
        self.b.free(self.there)


def ways(a, b, size):
    both = [Way(a, b, kind, size) for kind in KINDS]
    meet(a, b)
    return both


def beside_host_memory(a, b):
    """The best of each kind, measured in turns, so that both see the same machine."""
    host, vram = ways(a, b, max(SIZES))
    rows = []
    for operation in ("WRITE", "READ"):
        for size in SIZES:
            handles = [way.handle(operation, size) for way in (host, vram)]
            times = [[a.run(handle) for handle in handles] for _ in range(40 if size <= MIB else 12)]
            on_host, staged = (min(column) for column in zip(*times[1:]))
            del handles
            rows.append(
                f"{operation} {size // KIB} KiB: host {on_host * 1e6:.0f} us {size / on_host / 1e9:.2f} GB/s, "
                f"staged {staged * 1e6:.0f} us {size / staged / 1e9:.2f} GB/s, {on_host / staged:.2f} of its rate"
            )
    host.free(), vram.free()
    for row in rows:
        print(f"NUMBER  staging: {row}", flush=True)


def at_once(a, b, count=8, size=63 * MIB):
    """Several requests in flight together."""
    rates = {}
    for operation in ("WRITE", "READ"):
        for way in (both := ways(a, b, count * size)):
            handles = [way.handle(operation, size, at=i * size) for i in range(count)]
            seconds = []
            for _ in range(5):
                start = time.monotonic()
                for handle in handles:
                    a.post(handle)
                for handle in handles:
                    state = a.wait(handle)
                    expect(state == "DONE", f"{operation} ended as {state}")
                seconds.append(time.monotonic() - start)
            del handle, handles
            rates[operation, way.segment] = count * size / min(seconds) / 1e9
        for way in both:
            way.free()
    return ", ".join(f"{operation} {segment} {rate:.2f} GB/s" for (operation, segment), rate in rates.items())


def first_transfers(a, params, size=MIB):
    """The first transfer with a peer that was met a second ago."""
    words = []
    for operation in ("WRITE", "READ"):
        for kind in KINDS:
            b = Remote(f"new-{operation}-{kind}", params)
            way = Way(a, b, kind, size)
            meet(a, b)
            time.sleep(1)
            first, then = (a.run(way.handle(operation)) for _ in range(2))
            words.append(f"{operation} {way.segment} {first * 1e3:.2f} ms, then {then * 1e3:.2f}")
            a.free(way.here)
            a.forget(b.name)
            b.close()
    return "; ".join(words)


def deaths(a, params, size=64 * MIB):
    """kill -9 before a transfer, in it, and while the peer owes an answer."""
    words, slow = [], []
    for operation in ("WRITE", "READ"):
        for phase in ("before", "in", "silent"):
            b = Remote(f"mortal-{operation}-{phase}", params)
            way = Way(a, b, "cudaMalloc", size)
            meet(a, b)
            a.run(way.handle(operation))
            handle = way.handle(operation)
            if phase == "before":
                b.kill()
            elif phase == "silent":
                os.kill(b.process.pid, signal.SIGSTOP)
            start = time.monotonic()
            verdict = end_of(a.post, handle)
            if phase != "before":
                time.sleep(0.002 if phase == "in" else 1)
                start = time.monotonic()
                b.kill()
            if verdict == "PROC":
                verdict = end_of(a.wait, handle)
            seconds = time.monotonic() - start
            words.append(f"{operation} {phase} {seconds:.2f} s ({verdict})")
            if seconds > DEATH_S_MAX or "Disconnect" not in verdict:
                slow.append(words[-1])
            del handle
            a.forget(b.name)
            a.free(way.here)
    expect(not slow, "; ".join(slow))
    return "; ".join(words)


def end_of(call, handle):
    try:
        return call(handle)
    except Exception as error:
        return type(error).__name__
