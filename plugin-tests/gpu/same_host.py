"""Two processes of one host: their GPU memory is reached by CUDA, and by way of host memory where CUDA does not lend it."""

import ctypes
import os
import signal
import threading
import time

import numpy as np

import cuda
from checks import KIB, MIB, Skip, case, expect, log_of_run, meet, move, versions
from node import Node, Remote

# The other way is there, so that what is not lent is moved, too.
# SAME_HOST=ptracer_any: where the host has Yama's ptrace_scope at 1.
PARAMS = {"vram_staging": "true", "same_host": os.environ.get("SAME_HOST", "auto")}
PROOF = "is reached by CUDA"
SIZES = [1, 3, 15, 16, 17, 255, 4 * KIB - 1, 64 * KIB + 1, MIB, 16 * MIB + 5, 256 * MIB]
STANDIN = "CUDA_STANDIN_HIDDEN" in os.environ
if STANDIN:
    # It copies by the processor, call by call.
    SIZES = SIZES[:-2] + [2 * MIB + 5]


def pair(a, b, size, devices=(0, 0), kinds=("cudaMalloc", "cudaMalloc")):
    here, there = a.allocate(kinds[0], size, devices[0]), b.allocate(kinds[1], size, devices[1])
    a.register(here, size, devices[0])
    b.register(there, size, devices[1])
    meet(a, b)
    return here, there


def sizes(a, b, devices=(0, 0)):
    """Every size at places that lie differently to a multiple of 16; what lies around is not touched."""
    margin = 64
    slowest = (0.0, "")
    for size in SIZES:
        room = size + 2 * margin
        here, there = pair(a, b, room, devices)
        for operation in ("WRITE", "READ"):
            for near, far in ((margin, margin), (margin + 1, margin + 1), (margin + 3, margin + 8)):
                source, target = ((a, here, near), (b, there, far)) if operation == "WRITE" else ((b, there, far), (a, here, near))
                seed = size % 89 + near
                source[0].fill(source[1], seed)
                target[0].fill(target[1], seed + 500)
                seconds = a.transfer(
                    operation, ([(here + near, size, devices[0])], "VRAM"), ([(there + far, size, devices[1])], "VRAM"), b.name
                )
                slowest = max(slowest, (seconds, f"{operation} {size}"))
                at, place = target[2], source[2]
                difference = target[0].holds(target[1], [
                    (0, at, seed + 500, 0), (at, size, seed, place), (at + size, room - at - size, seed + 500, at + size),
                ])
                expect(difference is None, f"{operation} of {size} bytes at {near} and {far}: {difference}")
        a.free(here)
        b.free(there)
    return f"slowest {slowest[0] * 1e3:.2f} ms ({slowest[1]})"


def pieces(a, b, shapes, devices=(0, 0)):
    """Many descriptors, each side in an order of its own."""
    notes = []
    for count, size, gap in shapes:
        room = count * (size + gap)
        here, there = pair(a, b, room, devices)
        order = np.random.default_rng(count).permutation(count)
        near = [(here + i * (size + gap), size, devices[0]) for i in range(count)]
        far = [(there + int(order[i]) * (size + gap), size, devices[1]) for i in range(count)]
        for operation in ("WRITE", "READ"):
            source, target = ((a, here), (b, there)) if operation == "WRITE" else ((b, there), (a, here))
            source[0].fill(source[1], 21)
            target[0].fill(target[1], 22)
            seconds = a.transfer(operation, (near, "VRAM"), (far, "VRAM"), b.name)
            parts = []
            for i in range(count):
                ends = (i * (size + gap), int(order[i]) * (size + gap))
                place, at = ends if operation == "WRITE" else ends[::-1]
                parts += [(at, size, 21, place), (at + size, gap, 22, at + size)]
            difference = target[0].holds(target[1], parts)
            expect(difference is None, f"{operation} of {count} x {size}: {difference}")
            notes.append(f"{operation} {count} x {size} {seconds * 1e3:.2f} ms")
        a.free(here)
        b.free(there)
    return ", ".join(notes)


def from_the_other_side(a, b):
    """The other process transfers."""
    here, there = pair(a, b, 4 * MIB)
    b.meet(a.metadata())
    for seed, operation in ((31, "WRITE"), (32, "READ")):
        source, target = ((b, there), (a, here)) if operation == "WRITE" else ((a, here), (b, there))
        source[0].fill(source[1], seed)
        target[0].fill(target[1], seed + 100)
        b.transfer(operation, ([(there, 4 * MIB, 0)], "VRAM"), ([(here, 4 * MIB, 0)], "VRAM"), a.name)
        difference = target[0].difference(target[1], seed)
        expect(difference is None, f"{operation}: {difference}")
    a.free(here)
    b.free(there)


def kinds(a, b):
    """Memory that is lent by descriptors, and such as is not lent, on either side; host memory here with GPU memory there."""
    size = 6 * MIB + 4096
    notes = []
    for near, far in (
        ("VMM-exportable", "cudaMalloc"), ("cudaMalloc", "VMM-exportable"), ("VMM-exportable", "VMM-exportable"),
        ("cudaMalloc", "VMM"), ("VMM", "cudaMalloc"), ("cudaMalloc", "cudaMallocAsync"), ("cudaMallocAsync", "cudaMalloc"),
        ("pinned", "cudaMalloc"), ("pageable", "cudaMalloc"), ("cudaMalloc", "pinned"), ("pinned", "VMM-exportable"),
    ):
        try:
            here, there = pair(a, b, size, kinds=(near, far))
        except RuntimeError as error:
            notes.append(f"{near} with {far} not possible: {error}")
            continue
        segments = (cuda.Block.KINDS[near], cuda.Block.KINDS[far])
        for seed, operation in ((41, "WRITE"), (42, "READ")):
            seconds = move(a, b, operation, here, there, size, segments=segments, seed=seed)
        notes.append(f"{near} with {far} {seconds * 1e3:.2f} ms")
        a.free(here)
        b.free(there)
    return ", ".join(notes)


def allocated_anew(a, b):
    """What is freed and allocated again, mostly at the same address, is never reached by what was mapped before."""
    size, same, last = 32 * MIB, 0, None
    here = a.allocate("cudaMalloc", size)
    a.register(here, size)
    for round_ in range(8):
        there = b.allocate("cudaMalloc", size)
        same += there == last
        b.register(there, size)
        # What b has besides, at another address: an old mapping would be of this, or of nothing.
        meet(a, b)
        for seed, operation in ((51 + round_, "WRITE"), (61 + round_, "READ")):
            move(a, b, operation, here, there, size, seed=seed)
        b.free(there)
        last = there
    a.free(here)
    return f"{same} of 7 times at the same address"


def deregistered(a, b):
    """A deregistration waits for copies, and nothing comes after it."""
    size = 128 * MIB if not STANDIN else 2 * MIB
    late = 0
    for round_ in range(6):
        here, there = pair(a, b, size)
        a.fill(here, 71)
        handles = [a.prepare("WRITE", ([(here, size, 0)], "VRAM"), ([(there, size, 0)], "VRAM"), b.name) for _ in range(4)]
        a.run(handles[0])
        ended, errors = threading.Event(), []

        def post():
            while not ended.is_set():
                for handle in handles:
                    try:
                        if a.post(handle) == "PROC":
                            a.wait(handle)
                    except Exception as error:
                        errors.append(str(error))
                        return

        thread = threading.Thread(target=post)
        thread.start()
        time.sleep(0.02 * round_ / 5)
        b.deregister(there)
        b.fill(there, 72)
        time.sleep(0.02)
        difference = b.difference(there, 72)
        ended.set()
        thread.join()
        late += bool(errors)
        expect(difference is None, f"something came after the deregistration: {difference}")
        try:
            a.run(handles[1])
        except Exception:
            pass
        else:
            raise AssertionError("a transfer into deregistered memory is DONE")
        del handles
        b.free(there)
        a.free(here)
    return f"{late} of 6 deregistrations met transfers"


def killed(a, b):
    """kill -9 of a peer in the middle of transfers: they fail soon, those of others go on, and none of its memory is kept."""
    before = cuda.free_bytes()
    victim = Remote("victim", PARAMS)
    size = 256 * MIB if not STANDIN else 2 * MIB
    here, there = pair(a, victim, size)
    mine, theirs = pair(a, b, MIB)
    handle = a.prepare("WRITE", ([(here, size, 0)], "VRAM"), ([(there, size, 0)], "VRAM"), victim.name)
    other = a.prepare("WRITE", ([(mine, MIB, 0)], "VRAM"), ([(theirs, MIB, 0)], "VRAM"), b.name)
    a.run(handle)
    died = []

    def kill():
        time.sleep(0.05)
        victim.process.send_signal(signal.SIGKILL)
        victim.process.wait()
        died.append(time.monotonic())

    thread = threading.Thread(target=kill)
    thread.start()
    failed, done_after = None, 0
    deadline = time.monotonic() + 20
    while failed is None and time.monotonic() < deadline:
        dead = bool(died)
        try:
            a.run(handle)
            done_after += dead
        except Exception:
            failed = time.monotonic()
        a.run(other)
    thread.join()
    expect(failed is not None, "transfers with a dead process go on")
    expect(done_after == 0, f"{done_after} transfers that began after its end are DONE")
    expect(failed - died[0] < 0.1, f"the error came {(failed - died[0]) * 1e3:.0f} ms after its end")
    seed = 81
    move(a, b, "WRITE", mine, theirs, MIB, seed=seed)
    a.free(here)
    a.free(mine)
    b.free(theirs)
    deadline = time.monotonic() + 5
    while (now := cuda.free_bytes()) < before - 8 * MIB and time.monotonic() < deadline:
        time.sleep(0.05)
    expect(now >= before - 8 * MIB, f"{(before - now) // MIB} MiB of the GPU are still taken")
    victim.pipe.close()
    del handle, other
    # Its successor under the same name.
    successor = Remote("victim", PARAMS)
    here, there = pair(a, successor, MIB)
    for operation in ("WRITE", "READ"):
        move(a, successor, operation, here, there, MIB, seed=82)
    a.free(here)
    successor.close()
    a.forget("victim")
    return f"the error came {max(0.0, failed - died[0]) * 1e3:.1f} ms after its end"


def guest(a, b):
    """Neither the calling thread's context nor one on an unused device is touched, also in a thread that has none."""
    here, there = pair(a, b, MIB)
    changed = []

    def calls():
        before = cuda.current_context()
        for operation in ("WRITE", "READ"):
            for count in (1, 16):
                step = MIB // count // 2
                near = [(here + 2 * i * step, step, 0) for i in range(count)]
                far = [(there + 2 * i * step, step, 0) for i in range(count)]
                a.transfer(operation, (near, "VRAM"), (far, "VRAM"), b.name)
                if cuda.current_context() != before:
                    changed.append((operation, count))

    calls()
    thread = threading.Thread(target=calls)
    thread.start()
    thread.join()
    expect(not changed, f"the context changed in {changed}")
    unused = [d for d in range(1, cuda.device_count()) if cuda.context_is_active(d)]
    expect(not unused, f"a context was made on the unused devices {unused}")
    a.free(here)
    b.free(there)


def done_means_there(a, b):
    """Once it is DONE, a stream of the other process that waits for nothing sees the last byte."""
    size, tail = (256 * MIB, 64 * KIB) if not STANDIN else (2 * MIB, 64 * KIB)
    here, there = pair(a, b, size)
    for seed in range(10):
        a.fill(here, seed)
        b.fill(there, seed + 100)
        a.transfer("WRITE", ([(here, size, 0)], "VRAM"), ([(there, size, 0)], "VRAM"), b.name)
        expect(
            np.array_equal(b.tail_at_once(there, tail), a.tail_at_once(here, tail)), "WRITE was DONE before its bytes were there"
        )
    a.free(here)
    b.free(there)


# Numbers


class Bare:
    """Copies of another process's memory, opened by CUDA's IPC calls, on a stream of one's own."""

    def __init__(self):
        self.stream = ctypes.c_void_p()
        cuda.runtime("cudaStreamCreateWithFlags", ctypes.byref(self.stream), ctypes.c_uint(1))

    def synchronize(self):
        cuda.runtime("cudaStreamSynchronize", self.stream)

    def timed(self, work, rounds):
        best = float("inf")
        for _ in range(rounds):
            self.synchronize()
            start = time.perf_counter()
            work()
            self.synchronize()
            best = min(best, time.perf_counter() - start)
        return best

    def one_by_one(self, triples):
        call, stream = cuda.RUNTIME.cudaMemcpyAsync, self.stream
        arguments = [(ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(n), 4, stream) for to, source, n in triples]

        def work():
            for given in arguments:
                call(*given)

        return work

    def batch(self, triples):
        """cuMemcpyBatchAsync (CUDA 12.8; without the index of what failed from 13.0 on), or None."""
        newer = getattr(cuda.DRIVER, "cuMemcpyBatchAsync_v2", None)
        call = newer or getattr(cuda.DRIVER, "cuMemcpyBatchAsync", None)
        if call is None:
            return None
        count = len(triples)
        to, source, sizes = ((ctypes.c_uint64 * count)(*column) for column in zip(*triples))
        # CUmemcpyAttributes: access in stream order; no hints of where the memory is; no flags.
        attributes = (ctypes.c_uint32 * 6)(1, 0, 0, 0, 0, 0)
        first, failed = (ctypes.c_size_t * 1)(0), ctypes.c_size_t()
        given = [to, source, sizes, ctypes.c_size_t(count), attributes, first, ctypes.c_size_t(1)]
        given += [self.stream] if newer else [ctypes.byref(failed), self.stream]

        def work():
            code = call(*given)
            if code:
                raise RuntimeError(f"cuMemcpyBatchAsync: CUDA error {code}")

        try:
            work()
            self.synchronize()
        except RuntimeError as error:
            print(f"NUMBER  {error}", flush=True)
            return None
        return work


def rates(a, b, devices=(0, 0)):
    """GB/s of transfers beside those of bare copies of the same shape in the same run."""
    shapes = [(1, 64 * MIB), (1, 256 * MIB), (177, 125 * MIB // 177 // 256 * 256), (4096, 64 * KIB), (4096, 16 * KIB), (1024, 4 * KIB)]
    if STANDIN:
        shapes = [(1, MIB), (64, 4 * KIB)]
    bare, worst = Bare(), (float("inf"), "")
    for count, size in shapes:
        room = 2 * count * size if count > 1 else size
        here, there = pair(a, b, room, devices)
        mapped = a.take_in(b.export(there), room)
        # Every other piece: nothing joins.
        places = [2 * i * size for i in range(count)] if count > 1 else [0]
        near = [(here + at, size, devices[0]) for at in places]
        far = [(there + at, size, devices[1]) for at in places]
        total, rounds = count * size, 20
        for operation in ("WRITE", "READ"):
            handle = a.prepare(operation, (near, "VRAM"), (far, "VRAM"), b.name)
            a.run(handle)
            ours = min(a.run(handle) for _ in range(rounds))
            ends = [(mapped + at, here + at, size) for at in places]
            triples = ends if operation == "WRITE" else [(source, to, n) for to, source, n in ends]
            found = {"one by one": bare.timed(bare.one_by_one(triples), rounds)}
            batch = bare.batch(triples) if count > 1 else None
            if batch:
                found["cuMemcpyBatchAsync"] = bare.timed(batch, rounds)
            whole = (mapped, here, total) if operation == "WRITE" else (here, mapped, total)
            ceiling = bare.timed(bare.one_by_one([whole]), rounds)
            best = min(found.values())
            ratio = best / ours
            worst = min(worst, (ratio, f"{operation} {count} x {size}"))
            told = ", ".join(f"{way} {total / seconds / 1e9:.0f} GB/s" for way, seconds in found.items())
            print(
                f"NUMBER  {operation} {count} x {size}: ours {ours * 1e6:.0f} us, {total / ours / 1e9:.0f} GB/s; bare: {told}; "
                f"{ratio:.2f} of the better; one piece of as many bytes {total / ceiling / 1e9:.0f} GB/s ({ceiling / ours:.2f})",
                flush=True,
            )
            del handle
        a.free(mapped)
        a.free(here)
        b.free(there)
    return f"least: {worst[1]} {worst[0]:.2f} of a bare copy of the same shape"


def latencies(a, b):
    here, there = pair(a, b, MIB)
    told = []
    for size in (8, 4 * KIB, 64 * KIB, 256 * KIB, MIB):
        handle = a.prepare("WRITE", ([(here, size, 0)], "VRAM"), ([(there, size, 0)], "VRAM"), b.name)
        a.run(handle)
        times = sorted(a.run(handle) for _ in range(200))
        told.append(f"{size} B {times[100] * 1e6:.1f} us (least {times[0] * 1e6:.1f})")
        del handle
    a.free(here)
    b.free(there)
    return "p50 " + ", ".join(told)


def first_transfer(a, b):
    """What mapping costs: the preparation with a region that was never reached, and its first transfer."""
    here, there = pair(a, b, 64 * MIB)
    start = time.perf_counter()
    handle = a.prepare("WRITE", ([(here, 64 * MIB, 0)], "VRAM"), ([(there, 64 * MIB, 0)], "VRAM"), b.name)
    prepared = time.perf_counter() - start
    posted = a.run(handle)
    del handle
    a.free(here)
    b.free(there)
    return f"prepared in {prepared * 1e6:.0f} us, then {posted * 1e6:.0f} us"


def run_same_host():
    cuda.runtime("cudaFree", None)
    versions()
    a, far = Node("here", PARAMS), Remote("there", PARAMS)
    case("same host: sizes", sizes, a, far)

    def proof():
        expect(PROOF in log_of_run(), f"no line says that it {PROOF}")

    case("same host: the log says so", proof)
    shapes = [(4096, 64 * KIB, 0), (4096, 1000, 24), (4096, 1001, 6), (177, 125 * MIB // 177, 0), (20_000, 16, 16)]
    case("same host: many pieces", pieces, a, far, shapes if not STANDIN else [(400, 1001, 6), (20_000, 16, 16)])
    case("same host: transfers of the other process", from_the_other_side, a, far)
    case("same host: kinds of memory", kinds, a, far)
    case("same host: freed and allocated anew", allocated_anew, a, far)
    case("same host: DONE means there", done_means_there, a, far)
    case("same host: context and devices stay", guest, a, far)
    case("same host: deregistered meanwhile", deregistered, a, far)
    case("same host: killed, and its successor", killed, a, far)
    case("same host: first transfer", first_transfer, a, far)
    case("same host: small transfers", latencies, a, far)
    case("same host: rates", rates, a, far)
    if cuda.device_count() > 1 and not STANDIN:
        other = Remote("on-gpu-1", PARAMS, 1)
        case("same host, two GPUs: sizes", sizes, a, other, (0, 1))
        case("same host, two GPUs: many pieces", pieces, a, other, shapes[:2], (0, 1))
        case("same host, two GPUs: rates", rates, a, other, (0, 1))
        other.close()
        hidden = Remote("sees-gpu-1", PARAMS, 0, ("env", "CUDA_VISIBLE_DEVICES=1"))
        case("same host, a GPU that this process does not see: sizes", sizes_of_hidden, a, hidden)
        hidden.close()
    off = Remote("off", {**PARAMS, "same_host": "off"})
    case("same host: off at the peer", lambda: sizes_few(a, off))
    off.close()
    far.close()


def sizes_few(a, b):
    here, there = pair(a, b, MIB)
    for operation in ("WRITE", "READ"):
        move(a, b, operation, here, there, MIB, seed=91)
    a.free(here)
    b.free(there)


def sizes_of_hidden(a, b):
    # The peer's device 0 is this machine's second one, which a process that sees only the first one reaches, if CUDA lets it.
    if cuda.device_count() < 2:
        raise Skip("one GPU")
    here, there = pair(a, b, 64 * MIB)
    seconds = [move(a, b, operation, here, there, 64 * MIB, seed=92) for operation in ("WRITE", "READ")]
    a.free(here)
    b.free(there)
    return ", ".join(f"{64 * MIB / s / 1e9:.0f} GB/s" for s in seconds)
