"""The cases that need a GPU. Each prints one line: PASS, FAIL or SKIP, its name, and what is worth knowing.

    cases.py shm          everything that goes over libfabric's shm provider with CUDA IPC, or stays in one agent
    cases.py tcp          a provider that cannot register GPU memory
    cases.py staging      the same provider, with GPU memory by way of host memory
    cases.py same_host    as staging, and what two processes of a host reach by CUDA alone
    cases.py sweep        no test: copies by the driver and by the plugin's kernel, for lengths and numbers of pieces
    cases.py efa          libfabric's efa provider over software EFA devices: run.sh says how it is started
    cases.py sanitizer    a short run without PyTorch, to be started under compute-sanitizer
"""

import ctypes
import os
import sys
import time

import numpy as np

import checks
import cuda
import staging
from checks import GIB, KIB, MIB, case, expect, meet, move, refused, versions, vram_is_listed
from efa import run_efa
from kinds import (
    busy_streams, current_stays, expandable_segments, graph_capture, imported, kind_of_memory, leaks, refused_memory, tensors,
)
from node import Node, Remote
from same_host import run_same_host
from sweep import run_sweep

# One operation for each descriptor: which way the shm provider takes depends on the size of the operation, and CUDA IPC,
# the one to be tested, is for large ones.
WHOLE = {"striping_threshold": str(GIB), "chunk_bytes_max": str(GIB)}
SIZES = [64 * KIB + 1, MIB, 8 * MIB, 32 * MIB]


def matrix(a, b, devices=(0, 0)):
    """Every direction between VRAM and DRAM, both operations, all sizes."""
    slowest = []
    for size in SIZES:
        places = {}
        for side, node, device in (("here", a, devices[0]), ("there", b, devices[1])):
            for kind in ("cudaMalloc", "pinned"):
                places[side, kind] = address = node.allocate(kind, size, device)
                node.register(address, size, device)
        meet(a, b)
        segments = {"cudaMalloc": "VRAM", "pinned": "DRAM"}
        for near, far in (("cudaMalloc", "cudaMalloc"), ("cudaMalloc", "pinned"), ("pinned", "cudaMalloc")):
            for operation in ("WRITE", "READ"):
                seconds = move(
                    a, b, operation, places["here", near], places["there", far], size, devices,
                    (segments[near], segments[far]), seed=size % 97,
                )
                slowest.append((seconds, f"{operation} {segments[near]} with {segments[far]} {size}"))
        for (side, _), address in places.items():
            (a if side == "here" else b).free(address)
    seconds, what = max(slowest)
    return f"{len(slowest)} transfers, slowest {seconds * 1e3:.1f} ms ({what})"


def many_pieces(a, b):
    """4,096 descriptors of 8 KiB, scattered on one side."""
    count, size = 4096, 8 * KIB
    here, there = a.allocate("cudaMalloc", count * size), b.allocate("cudaMalloc", count * size)
    a.register(here, count * size)
    b.register(there, count * size)
    meet(a, b)
    a.fill(here, 5)
    order = np.random.default_rng(1).permutation(count)
    local = [(here + int(i) * size, size, 0) for i in order]
    remote = [(there + int(i) * size, size, 0) for i in order]
    seconds = a.run(a.prepare("WRITE", (local, "VRAM"), (remote, "VRAM"), b.name))
    difference = b.difference(there, 5)
    expect(difference is None, difference)
    a.free(here)
    b.free(there)
    return f"{seconds * 1e3:.1f} ms"


def done_means_arrived(a, b):
    """The end of a transfer that takes the GPU a while is read without regard to any other stream once it is DONE."""
    size, tail = GIB, 64 * KIB
    here, there = a.allocate("cudaMalloc", size), b.allocate("cudaMalloc", size)
    a.register(here, size)
    b.register(there, size)
    meet(a, b)
    for round_, (operation, giver, taker) in enumerate((("WRITE", (a, here), (b, there)), ("READ", (b, there), (a, here))) * 2):
        giver[0].fill(giver[1], round_)
        taker[0].fill(taker[1], round_ + 100)
        handle = a.prepare(operation, ([(here, size, 0)], "VRAM"), ([(there, size, 0)], "VRAM"), b.name)
        a.run(handle)
        expect(
            np.array_equal(taker[0].tail_at_once(taker[1], tail), giver[0].tail_at_once(giver[1], tail)),
            f"{operation} was DONE before its bytes were there",
        )
        del handle
    a.free(here)
    b.free(there)
    return f"{size} bytes"


def speed(a, b, where):
    rows = []
    for size in (64 * KIB, MIB, 8 * MIB, 64 * MIB, 256 * MIB):
        if a is not b and size > 64 * MIB:
            continue
        here, there = a.allocate("cudaMalloc", size), b.allocate("cudaMalloc", size)
        a.register(here, size)
        b.register(there, size)
        meet(a, b)
        handle = a.prepare("WRITE", ([(here, size, 0)], "VRAM"), ([(there, size, 0)], "VRAM"), b.name)
        a.run(handle)
        ours = min(a.run(handle) for _ in range(10))
        spare = a.allocate("cudaMalloc", size)
        plain = min(plain_copy(spare, here, size) for _ in range(10))
        del handle
        for node, address in ((a, here), (b, there), (a, spare)):
            node.free(address)
        rows.append(f"{size // KIB} KiB {size / ours / 1e9:.2f} ({ours * 1e6:.0f} us) of {size / plain / 1e9:.0f}")
    return f"{where}, GB/s of a plain cudaMemcpy's: " + ", ".join(rows)


def plain_copy(to, source, size):
    cuda.synchronize()
    start = time.monotonic()
    cuda.runtime("cudaMemcpy", ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(size), 3)
    cuda.synchronize()
    return time.monotonic() - start


# The runs


def run_shm():
    import torch

    torch.cuda.init()
    versions()
    a, b = Node("here", WHOLE), Node("beside", WHOLE)
    case("memory kinds list VRAM", vram_is_listed, a)
    case("an agent with itself", matrix, a, a)
    case("two agents of one process", matrix, a, b)
    case("one agent, 4,096 pieces", many_pieces, a, a)
    far = None
    try:
        far = Remote("there", WHOLE)
    except Exception as error:
        print(f"FAIL  a second process  {error}", flush=True)
    if far:
        case("two processes", matrix, a, far)
        case("two processes, 4,096 pieces", many_pieces, a, far)
        case("two processes, DONE means arrived", done_means_arrived, a, far)
        for kind, segment in cuda.Block.KINDS.items():
            if kind not in ("managed", "pageable"):
                case(f"{kind} memory as {segment}", kind_of_memory, a, far, kind, segment)
        case("another process's memory as VRAM", imported, a, far)
        case("PyTorch's busy streams", busy_streams, a, far, torch)
    case("memory that is no VRAM is refused", refused_memory, a)
    case("PyTorch's tensors", tensors, a, b, torch)
    case("PyTorch's expandable segments", expandable_segments, a, torch)
    case("current device and context stay", current_stays, a, b)
    case("a graph is captured meanwhile", graph_capture, a, torch)
    case("1,000 registrations leak nothing", leaks, a)
    case("speed within an agent", speed, a, a, "VRAM to VRAM of one agent")
    if far:
        case("speed between processes", speed, a, far, "VRAM to VRAM of two processes")
        far.close()
    if cuda.device_count() > 1:
        case("two GPUs, one process", matrix, a, b, (0, 1))
        case("two GPUs, an agent with itself", matrix, a, a, (0, 1))


def run_tcp():
    cuda.runtime("cudaFree", None)
    versions()
    a = Node("here")

    def not_listed():
        plugin, backend = a.mems()
        expect("VRAM_SEG" not in backend, f"backend {backend}")
        return f"backend: {backend}"

    def not_registered():
        address = a.allocate("cudaMalloc", MIB)
        words = refused("VRAM", a.register, address, MIB)
        a.free(address)
        return words

    def host_memory_works():
        addresses = [a.allocate("pinned", MIB) for _ in range(2)]
        for address in addresses:
            a.register(address, MIB)
        meet(a, a)
        move(a, a, "WRITE", *addresses, MIB, segments=("DRAM", "DRAM"))

    case("tcp: memory kinds do not list VRAM", not_listed)
    case("tcp: VRAM is refused", not_registered)
    case("tcp: host memory works", host_memory_works)


def run_staging():
    cuda.runtime("cudaFree", None)
    versions()
    params = {"vram_staging": "true"}
    a, far = Node("here", params), Remote("there", params)

    case("staging: memory kinds list VRAM", vram_is_listed, a)
    case("staging: an agent with itself", matrix, a, a)
    case("staging: two processes", matrix, a, far)
    case("staging: two processes, 4,096 pieces", many_pieces, a, far)
    case("staging: DONE means arrived", done_means_arrived, a, far)
    for kind in ("cudaMallocAsync", "VMM"):
        case(f"staging: {kind} memory", kind_of_memory, a, far, kind, "VRAM")
    case("staging: current device and context stay", current_stays, a, a)
    if cuda.device_count() > 1:
        case("staging: two GPUs", matrix, a, far, (0, 1))
    case("staging: rates beside page-locked host memory", staging.beside_host_memory, a, far)
    case("staging: 8 requests of 63 MiB at once", staging.at_once, a, far)
    case("staging: the first transfer with a peer", staging.first_transfers, a, params)
    case("staging: a peer that is killed", staging.deaths, a, params)
    far.close()


def run_sanitizer():
    global SIZES
    SIZES = [64 * KIB + 1, 8 * MIB]
    cuda.runtime("cudaFree", None)
    a, b = Node("here", WHOLE), Node("beside", WHOLE)
    case("memcheck: an agent with itself", matrix, a, a)
    case("memcheck: two agents of one process", matrix, a, b)
    case("memcheck: VMM memory", kind_of_memory, a, b, "VMM", "VRAM")


if __name__ == "__main__":
    runs = {
        "shm": run_shm, "tcp": run_tcp, "staging": run_staging, "same_host": run_same_host, "sweep": run_sweep,
        "efa": run_efa, "sanitizer": run_sanitizer,
    }
    runs[sys.argv[1]]()
    sys.stdout.flush()
    # Interpreters differ in the order in which they end things at exit; what is tested is over.
    os._exit(1 if checks.failures else 0)
