"""The cases that need a GPU. Each prints one line: PASS, FAIL or SKIP, its name, and what is worth knowing.

    cases.py shm          everything that goes over libfabric's shm provider with CUDA IPC, or stays in one agent
    cases.py tcp          a provider that cannot register GPU memory
    cases.py staging      the same provider, with GPU memory by way of host memory
    cases.py efa          libfabric's efa provider over software EFA devices: run.sh says how it is started
    cases.py sanitizer    a short run without PyTorch, to be started under compute-sanitizer
"""

import ctypes
import itertools
import os
import platform
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np

import cuda
from node import BACKEND, Node, Remote, nixl

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
# One operation for each descriptor: which way the shm provider takes depends on the size of the operation, and CUDA IPC,
# the one to be tested, is for large ones.
WHOLE = {"striping_threshold": str(GIB), "chunk_bytes_max": str(GIB)}
SIZES = [64 * KIB + 1, MIB, 8 * MIB, 32 * MIB]
failures = 0


class Skip(Exception):
    pass


def case(name, test, *arguments):
    global failures
    start = time.monotonic()
    try:
        verdict, note = "PASS", test(*arguments)
    except Skip as reason:
        verdict, note = "SKIP", str(reason)
    except Exception as error:
        verdict, note = "FAIL", f"{type(error).__name__}: {error}"
        failures += 1
        traceback.print_exc()
    print(f"{verdict}  {name}  ({time.monotonic() - start:.1f} s){'  ' + note if note else ''}", flush=True)


def expect(condition, words):
    if not condition:
        raise AssertionError(words)


def refused(what, call, *arguments):
    """The call must raise; its words are the answer."""
    try:
        call(*arguments)
    except Exception as error:
        return f"{what}: {type(error).__name__}"
    raise AssertionError(f"{what} was accepted")


# Moving bytes


def meet(a, b):
    for one, other in ((a, b), (b, a)):
        if one is not other:
            try:
                one.forget(other.name)
            except Exception:
                pass
            one.meet(other.metadata())


def move(a, b, operation, here, there, size, devices=(0, 0), segments=("VRAM", "VRAM"), seed=1):
    """One transfer of `a` with memory of `b`; every byte of the target is checked. Returns seconds."""
    source, target = ((a, here), (b, there)) if operation == "WRITE" else ((b, there), (a, here))
    source[0].fill(source[1], seed)
    target[0].fill(target[1], seed + 1000)
    handle = a.prepare(operation, ([(here, size, devices[0])], segments[0]), ([(there, size, devices[1])], segments[1]), b.name)
    seconds = a.run(handle)
    difference = target[0].difference(target[1], seed)
    expect(difference is None, f"{operation} of {size} bytes, {segments[0]} with {segments[1]}: {difference}")
    del handle
    return seconds


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


# Kinds of memory


def kind_of_memory(a, b, kind, segment):
    size = 8 * MIB
    try:
        address = a.allocate(kind, size)
    except RuntimeError as error:
        raise Skip(str(error)) from error
    a.register(address, size, 0, segment)
    plain = a.allocate("cudaMalloc", size)
    a.register(plain, size)
    notes = []
    meet(a, a)
    move(a, a, "WRITE", address, plain, size, segments=(segment, "VRAM"))
    move(a, a, "READ", address, plain, size, segments=(segment, "VRAM"), seed=2)
    there = b.allocate("cudaMalloc", size)
    b.register(there, size)
    meet(a, b)
    for operation in ("WRITE", "READ"):
        try:
            move(a, b, operation, address, there, size, segments=(segment, "VRAM"), seed=3)
        except AssertionError:
            raise
        except Exception as error:
            notes.append(f"{operation} refused by the provider: {error}")
    for node, what in ((a, address), (a, plain), (b, there)):
        node.free(what)
    return "; ".join(notes) or "within the agent and between two"


def refused_memory(a):
    words = []
    for kind in ("managed", "pinned", "pageable"):
        address = a.allocate(kind, MIB)
        words.append(refused(f"{kind} as VRAM", a.register, address, MIB, 0, "VRAM"))
        a.free(address)
    address = a.allocate("cudaMalloc", MIB)
    end = ((address >> 21) + 2) << 21
    words.append(refused("a range beyond its allocation", a.register, address, end - address + GIB, 0, "VRAM"))
    a.free(address)
    words.append(refused("freed memory", a.register, address, 256 * MIB, 0, "VRAM"))
    return "; ".join(words)


def expandable_segments(a, torch):
    """PyTorch's own VMM allocator."""
    try:
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    except Exception as error:
        raise Skip(f"PyTorch has no such switch: {error}") from error
    try:
        torch.cuda.empty_cache()
        source = torch.arange(24 * MIB, dtype=torch.int32, device="cuda")
        target = torch.zeros_like(source)
        size = source.numel() * 4
        for tensor in (source, target):
            a.register(tensor.data_ptr(), size, 0, "VRAM")
        torch.cuda.synchronize()
        pieces = [(tensor.data_ptr(), size, 0) for tensor in (source, target)]
        meet(a, a)
        a.run(a.prepare("WRITE", ([pieces[0]], "VRAM"), ([pieces[1]], "VRAM"), a.name))
        expect(torch.equal(source, target), "the tensors differ")
        for tensor in (source, target):
            a.deregister(tensor.data_ptr())
    finally:
        torch.cuda.memory._set_allocator_settings("expandable_segments:False")
    return f"{size} bytes"


# A good guest


def current_stays(a, b):
    """Calls change neither the device nor the context of the thread, with a context and without one."""
    size = MIB
    states = []

    def calls():
        before = (cuda.current_context(), cuda.current_device() if cuda.current_context() else None)
        addresses = [a.allocate("cudaMalloc", size) for _ in range(2)] if before[0] else spare
        for address in addresses:
            a.register(address, size, 0, "VRAM")
            states.append((before[0], cuda.current_context(), "register"))
        meet(a, a)
        handle = a.prepare("WRITE", ([(addresses[0], size, 0)], "VRAM"), ([(addresses[1], size, 0)], "VRAM"), a.name)
        a.run(handle)
        states.append((before[0], cuda.current_context(), "transfer"))
        a.agent.get_new_notifs()
        states.append((before[0], cuda.current_context(), "notifications"))
        del handle
        for address in addresses:
            a.deregister(address)
            states.append((before[0], cuda.current_context(), "deregister"))
        if before[0]:
            expect(cuda.current_device() == before[1], "another device is current")
            for address in addresses:
                a.free(address)

    spare = [a.allocate("cudaMalloc", size) for _ in range(2)]
    calls()
    thread = threading.Thread(target=calls)
    thread.start()
    thread.join()
    for address in spare:
        a.free(address)
    changed = [what for before, after, what in states if before != after]
    expect(not changed, f"the context changed in {changed}")
    expect(any(before is None for before, _, _ in states), "no thread without a context took part")
    unused = [d for d in range(1, cuda.device_count()) if cuda.context_is_active(d)]
    expect(not unused, f"a context was made on the unused devices {unused}")
    return f"{len(states)} calls"


def busy_streams(a, b, torch):
    """Transfers while several streams of PyTorch compute: neither disturbs the other."""
    size = 32 * MIB
    streams = [torch.cuda.Stream() for _ in range(3)]
    factors = torch.randn(2048, 2048, device="cuda")
    expected = factors @ factors
    torch.cuda.synchronize()
    here, there, spare = a.allocate("cudaMalloc", size), b.allocate("cudaMalloc", size), a.allocate("cudaMalloc", size)
    for node, address in ((a, here), (b, there), (a, spare)):
        node.register(address, size)
    meet(a, b)
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            for _ in range(200):
                result = factors @ factors
            results.append(result)
    seconds = 0.0
    for seed in range(3):
        move(a, b, "WRITE", here, there, size, seed=10 + seed)
        start = time.monotonic()
        a.run(a.prepare("WRITE", ([(here, size, 0)], "VRAM"), ([(spare, size, 0)], "VRAM"), a.name))
        seconds += time.monotonic() - start
        expect(a.difference(spare, 10 + seed) is None, "the copy within the agent differs")
    torch.cuda.synchronize()
    expect(all(torch.equal(result, expected) for result in results), "a product is wrong")
    for node, address in ((a, here), (b, there), (a, spare)):
        node.free(address)
    return f"copies within the agent took {seconds / 3 * 1e3:.2f} ms"


def tensors(a, b, torch):
    """Tensors as users pass them: NIXL takes address, size and device from them."""
    source = torch.randint(0, 255, (64, 256 * KIB), dtype=torch.uint8, device="cuda")
    target = torch.zeros_like(source)
    torch.cuda.synchronize()
    regions = [a.agent.register_memory([tensor], backends=[BACKEND]) for tensor in (source, target)]
    # Every other row: descriptors that are not contiguous.
    local, remote = (a.agent.get_xfer_descs([row for row in tensor[::2]]) for tensor in (source, target))
    a.run(a.agent.initialize_xfer("WRITE", local, remote, a.name))
    expect(torch.equal(source[::2], target[::2]), "rows differ")
    expect(not target[1::2].any().item(), "rows between were written")
    for region in regions:
        a.agent.deregister_memory(region, backends=[BACKEND])
    return f"{source[::2].numel()} bytes in {len(source[::2])} rows"


def graph_capture(a, torch):
    """A CUDA graph is captured while a transfer runs."""
    size = 8 * MIB
    here, there = a.allocate("cudaMalloc", size), a.allocate("cudaMalloc", size)
    for address in (here, there):
        a.register(address, size)
    meet(a, a)
    a.fill(here, 4)
    handle = a.prepare("WRITE", ([(here, size, 0)], "VRAM"), ([(there, size, 0)], "VRAM"), a.name)
    tensor = torch.ones(1024, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        tensor * 2
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="global"):
        doubled = tensor * 2
        a.run(handle)
        result = doubled + 1
    graph.replay()
    torch.cuda.synchronize()
    expect(result.eq(3).all().item(), "the graph computes something else")
    expect(a.difference(there, 4) is None, "the copy differs")
    for address in (here, there):
        a.free(address)


def leaks(a):
    size, part, rounds = 64 * MIB, 2 * MIB, 1000
    address = a.allocate("cudaMalloc", size)

    def once(i):
        at = address + (i % 32) * part
        a.register(at, part, 0, "VRAM")
        a.deregister(at)

    for i in range(32):
        once(i)
    cuda.synchronize()
    before = cuda.open_files(), cuda.free_bytes()
    start = time.monotonic()
    for i in range(rounds):
        once(i)
    seconds = time.monotonic() - start
    cuda.synchronize()
    after = cuda.open_files(), cuda.free_bytes()
    expect(before == after, f"(files, free device bytes) went from {before} to {after}")
    a.free(address)
    return f"{seconds / rounds * 1e6:.0f} us each"


# Numbers


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


def versions():
    fabric = ctypes.CDLL("libfabric.so.1")
    packed = fabric.fi_version()
    driver = ctypes.c_int()
    cuda.driver("cuDriverGetVersion", ctypes.byref(driver))
    nvidia = Path("/proc/driver/nvidia/version")
    module = nvidia.read_text().splitlines()[0].split("  ")[1] if nvidia.exists() else "unknown"
    torch = sys.modules.get("torch")
    print(
        f"VERSIONS  kernel {platform.release()}, NVIDIA driver {module}, CUDA driver API {driver.value}, "
        f"{cuda.device_count()} GPUs, Python {platform.python_version()}, PyTorch {torch.__version__ if torch else '-'}, "
        f"{nixl().__name__}, libfabric {packed >> 16}.{packed & 0xFFFF}, provider {os.environ.get('FI_PROVIDER')}",
        flush=True,
    )


def vram_is_listed(a):
    plugin, backend = a.mems()
    expect("VRAM_SEG" in plugin and "VRAM_SEG" in backend, f"plugin {plugin}, backend {backend}")
    return f"backend: {backend}"


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


def wire_speed(a, b, kind):
    """GB/s of a 64 MiB transfer each way, memory of one kind on both sides."""
    size = 64 * MIB
    segment = cuda.Block.KINDS[kind]
    here, there = a.allocate(kind, size), b.allocate(kind, size)
    a.register(here, size)
    b.register(there, size)
    meet(a, b)
    rates = []
    for operation in ("WRITE", "READ"):
        handle = a.prepare(operation, ([(here, size, 0)], segment), ([(there, size, 0)], segment), b.name)
        a.run(handle)
        rates.append(size / min(a.run(handle) for _ in range(7)) / 1e9)
        del handle
    a.free(here)
    b.free(there)
    return rates


def run_staging():
    cuda.runtime("cudaFree", None)
    versions()
    params = {"vram_staging": "true"}
    a, far = Node("here", params), Remote("there", params)

    def speed_of_staging():
        host, staged = wire_speed(a, far, "pinned"), wire_speed(a, far, "cudaMalloc")
        ratios = [there / here for here, there in zip(host, staged)]
        expect(min(ratios) >= 0.8, f"WRITE, READ in GB/s: host memory {host}, VRAM {staged}")
        words = (f"{what} {v:.2f} GB/s, {r:.2f} of host memory's" for what, v, r in zip(("WRITE", "READ"), staged, ratios))
        return ", ".join(words)

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
    case("staging: speed over tcp", speed_of_staging)
    far.close()


# Software EFA devices: GPU memory that libfabric has registered with a NIC


def carry(a, b, operation, here, there, size, devices, segments, seed):
    """One transfer with a notification; the target is read as soon as `b` has that, whatever `a` knows by then."""
    source, target = ((a, here), (b, there)) if operation == "WRITE" else ((b, there), (a, here))
    source[0].fill(source[1], seed)
    target[0].fill(target[1], seed + 1000)
    word = f"{operation} {size} {seed}".encode()
    handle = a.prepare(
        operation, ([(here, size, devices[0])], segments[0]), ([(there, size, devices[1])], segments[1]), b.name, word
    )
    a.post(handle)
    what = f"{operation} of {size} bytes, {segments[0]} with {segments[1]}"
    deadline = time.monotonic() + 30
    while word not in b.notifications().get(a.name, []):
        expect(a.agent.check_xfer_state(handle) != "ERR", f"{what} failed")
        expect(time.monotonic() < deadline, f"{what}: no notification after 30 s")
    difference = target[0].difference(target[1], seed)
    expect(difference is None, f"{what}, when its notification came: {difference}")
    state = a.wait(handle)
    expect(state == "DONE", f"{what} ended as {state}")
    del handle


def efa_matrix(a, b, devices=(0, 0)):
    """Every direction between VRAM and DRAM, both operations, from a byte up, each with a notification."""
    count, segments = 0, {"cudaMalloc": "VRAM", "pinned": "DRAM"}
    for size in (1, 4 * KIB + 3, 64 * KIB + 1, MIB, 8 * MIB, 64 * MIB):
        places = {}
        for side, node, device in (("here", a, devices[0]), ("there", b, devices[1])):
            for kind in segments:
                places[side, kind] = address = node.allocate(kind, size, device)
                node.register(address, size, device)
        meet(a, b)
        for near, far in (("cudaMalloc", "cudaMalloc"), ("cudaMalloc", "pinned"), ("pinned", "cudaMalloc")):
            for operation in ("WRITE", "READ"):
                count += 1
                carry(
                    a, b, operation, places["here", near], places["there", far], size, devices,
                    (segments[near], segments[far]), count,
                )
        for (side, _), address in places.items():
            (a if side == "here" else b).free(address)
    return f"{count} transfers"


def efa_blocks(a, b, operation, count=4096, size=8 * KIB):
    """Scattered descriptors on one side."""
    here, there = a.allocate("cudaMalloc", count * size), b.allocate("cudaMalloc", count * size)
    a.register(here, count * size)
    b.register(there, count * size)
    meet(a, b)
    order = [int(i) for i in np.random.default_rng(2).permutation(count)]
    source, target = ((a, here), (b, there)) if operation == "WRITE" else ((b, there), (a, here))
    source[0].fill(source[1], 5)
    target[0].fill(target[1], 6)
    local, remote = ([(base + i * size, size, 0) for i in order] for base in (here, there))
    a.run(a.prepare(operation, (local, "VRAM"), (remote, "VRAM"), b.name))
    difference = target[0].difference(target[1], 5)
    expect(difference is None, difference)
    a.free(here)
    b.free(there)
    return f"{count} blocks of {size} bytes"


def efa_kind(a, b, kind):
    """Memory that the driver may not export, so that the plugin may have to refuse it, in words."""
    size = 8 * MIB
    try:
        address = a.allocate(kind, size)
    except RuntimeError as error:
        raise Skip(str(error)) from error
    try:
        a.register(address, size, 0, "VRAM")
    except Exception as error:
        a.free(address)
        expect(f"VRAM {address:#x}" in log_of_run(), "refused without a word in the log")
        return f"refused: {type(error).__name__}"
    there = b.allocate("cudaMalloc", size)
    b.register(there, size)
    meet(a, b)
    for seed, operation in enumerate(("WRITE", "READ")):
        carry(a, b, operation, address, there, size, (0, 0), ("VRAM", "VRAM"), seed)
    a.free(address)
    b.free(there)
    return "registered, written and read"


def efa_part(a, b):
    """Registrations that begin and end within pages, in the middle of an allocation."""
    size, at, part = 4 * MIB, MIB + 12345, MIB + 777
    here, there = a.allocate("cudaMalloc", size), b.allocate("cudaMalloc", size)
    for node, address in ((a, here), (b, there)):
        node.fill(address, 1)
        node.register(address + at, part, 0, "VRAM")
    a.fill(here, 2)
    meet(a, b)
    pieces = [([(address + at, part, 0)], "VRAM") for address in (here, there)]
    a.run(a.prepare("WRITE", *pieces, b.name))
    words = b.mixture(there, [(0, at, 1), (at, part, 2), (at + part, size - at - part, 1)])
    expect(words is None, words)
    for node, address in ((a, here), (b, there)):
        node.deregister(address + at)
        node.free(address)
    return f"{part} bytes at {at} of {size}"


def efa_death(a, start):
    """The peer is killed while GPU memory moves both ways; what is left works with its successor."""
    size = 64 * MIB
    here = a.allocate("cudaMalloc", size)
    a.register(here, size)
    ends = []
    for round_ in range(2):
        b = start(f"mortal{round_}")
        there = b.allocate("cudaMalloc", size)
        b.register(there, size)
        meet(a, b)
        carry(a, b, "WRITE", here, there, size, (0, 0), ("VRAM", "VRAM"), round_)
        pieces = [([(address, size, 0)], "VRAM") for address in (here, there)]
        handles = [a.prepare(operation, *pieces, b.name) for operation in ("WRITE", "READ")]
        for handle in handles:
            a.post(handle)
        b.kill()
        ends += [end_of(a, handle) for handle in handles]
        del handle, handles
        a.forget(b.name)
    expect("PROC" not in ends, f"not over after 30 s: {ends}")
    a.free(here)
    return f"ended as {', '.join(ends)}"


def end_of(a, handle):
    try:
        return a.wait(handle, 30)
    except Exception as error:
        return type(error).__name__


def log_of_run():
    """Everything that this process and its children have printed so far."""
    return Path(os.environ["CASES_LOG"]).read_text(errors="replace")


def registered_as(way, devices):
    """The plugin's word on how each device's memory was registered."""
    text = log_of_run()
    wanted, other = ("by dmabuf", "by address") if way == "dmabuf" else ("by address", "by dmabuf")
    for device in range(devices):
        expect(f"memory of GPU {device} is registered {wanted}" in text, f"no word of GPU {device} {wanted}")
    expect(f"is registered {other}" not in text, f"some memory was registered {other}")
    return f"{devices} GPUs, all {wanted}"


def run_efa():
    way, fabric = os.environ["SOFTEFA_GPU"], os.environ["EFA_FABRIC"]
    name = f"{fabric}, {way}: "
    cuda.runtime("cudaFree", None)
    versions()
    params = {"fabric": fabric}
    launcher = [os.environ["SOFTEFA_ENV"], "--host", "b", "--"]
    if way == "none":
        case(name + "VRAM is refused in words or staged", efa_none, params, launcher)
        return
    if way == "dmabuf" and (code := cuda.no_dmabuf()):
        print(f"SKIP  {name}everything  the driver exports no dmabuf: CUDA error {code}", flush=True)
        return
    start = lambda what: Remote(what, params, 0, launcher)
    a, far = Node("here", params), start("there")
    gpus = min(cuda.device_count(), 2)
    case(name + "memory kinds list VRAM", vram_is_listed, a)
    case(name + "one GPU", efa_matrix, a, far)
    case(name + "current device and context stay", current_stays, a, a)
    if gpus > 1:
        case(name + "two GPUs", efa_matrix, a, far, (0, 1))
        case(name + "two GPUs, the other way", efa_matrix, a, far, (1, 0))
    else:
        print(f"SKIP  {name}two GPUs  there is one", flush=True)
    for operation in ("WRITE", "READ"):
        case(f"{name}4,096 blocks, {operation}", efa_blocks, a, far, operation)
    case(name + "part of an allocation", efa_part, a, far)
    for kind in ("cudaMallocAsync", "VMM"):
        case(f"{name}{kind} memory", efa_kind, a, far, kind)
    case(name + "1,000 registrations leak nothing", leaks, a)
    case(name + "the peer is killed", efa_death, a, start)
    case(name + "the log says how memory was registered", registered_as, way, gpus)
    far.close()


def efa_none(params, launcher):
    """The host lets no NIC reach its GPUs."""
    # An agent for nothing else: NIXL's metadata names the kind of memory even after it was refused, and then no peer
    # whose backend lacks that kind takes it in.
    refuser = Node("refuser", params)
    plugin, backend = refuser.mems()
    expect("VRAM_SEG" not in backend, f"backend {backend}")
    words = [f"backend: {backend}"]
    address = refuser.allocate("cudaMalloc", MIB)
    words.append(refused("VRAM", refuser.register, address, MIB))
    refuser.free(address)
    expect("vram_staging" in log_of_run(), "the log does not say what to do")
    a, far = Node("here", params), Remote("there", params, 0, launcher)
    pinned = [node.allocate("pinned", 8 * MIB) for node in (a, far)]
    for node, where in zip((a, far), pinned):
        node.register(where, 8 * MIB)
    meet(a, far)
    for seed, operation in enumerate(("WRITE", "READ")):
        carry(a, far, operation, *pinned, 8 * MIB, (0, 0), ("DRAM", "DRAM"), seed)
    far.close()
    staged = {**params, "vram_staging": "true"}
    a, far = Node("staged here", staged), Remote("staged there", staged, 0, launcher)
    places = [node.allocate("cudaMalloc", 8 * MIB) for node in (a, far)]
    for node, where in zip((a, far), places):
        node.register(where, 8 * MIB)
    meet(a, far)
    for seed, operation in enumerate(("WRITE", "READ")):
        carry(a, far, operation, *places, 8 * MIB, (0, 0), ("VRAM", "VRAM"), seed)
    far.close()
    return "; ".join(words) + "; staged: written and read"


def run_sanitizer():
    global SIZES
    SIZES = [64 * KIB + 1, 8 * MIB]
    cuda.runtime("cudaFree", None)
    a, b = Node("here", WHOLE), Node("beside", WHOLE)
    case("memcheck: an agent with itself", matrix, a, a)
    case("memcheck: two agents of one process", matrix, a, b)
    case("memcheck: VMM memory", kind_of_memory, a, b, "VMM", "VRAM")


if __name__ == "__main__":
    runs = {"shm": run_shm, "tcp": run_tcp, "staging": run_staging, "efa": run_efa, "sanitizer": run_sanitizer}
    runs[sys.argv[1]]()
    sys.stdout.flush()
    # Interpreters differ in the order in which they end things at exit; what is tested is over.
    os._exit(1 if failures else 0)
