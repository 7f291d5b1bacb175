"""Kinds of memory, and what the application does with its GPU meanwhile."""

import threading
import time

import cuda
from checks import GIB, KIB, MIB, Skip, expect, log_of_run, meet, move, refused
from node import BACKEND


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


def imported(a, b):
    """Memory of another process, opened by CUDA's IPC calls: within the agent, and between two where the provider takes it."""
    size = 8 * MIB
    theirs, here, there = b.allocate("cudaMalloc", size), a.allocate("cudaMalloc", size), b.allocate("cudaMalloc", size)
    try:
        address = a.take_in(b.export(theirs), size)
    except RuntimeError as error:
        raise Skip(str(error)) from error
    try:
        a.register(address, size)
    except Exception as error:
        # The driver exports no dmabuf of it, and the provider does not take its address.
        expect("another process exported it" in log_of_run(), "the log does not name the cause")
        for node, what in ((a, address), (a, here), (b, there), (b, theirs)):
            node.free(what)
        return f"refused: {type(error).__name__}"
    for node, what in ((a, here), (b, there)):
        node.register(what, size)
    meet(a, a)
    meet(a, b)
    move(a, a, "WRITE", here, address, size)
    expect(b.difference(theirs, 1) is None, "its owner sees other bytes")
    move(a, a, "READ", here, address, size, seed=2)
    notes = []
    for operation in ("WRITE", "READ"):
        try:
            move(a, b, operation, address, there, size, seed=3)
        except AssertionError:
            raise
        except Exception as error:
            notes.append(f"{operation} refused by the provider: {error}")
    for node, what in ((a, address), (a, here), (b, there), (b, theirs)):
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
