"""Software EFA devices: GPU memory that libfabric's efa provider has registered with a NIC. run.sh says how this is started."""

import os
import time

import numpy as np

import cuda
from checks import KIB, MIB, Skip, case, expect, log_of_run, meet, refused, versions, vram_is_listed
from kinds import current_stays, imported, leaks
from node import Node, Remote


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
    case(name + "another process's memory", imported, a, far)
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
    staged = {**params, "vram_staging": "true"}
    for name, options, kind, segment in (("", params, "pinned", "DRAM"), ("staged ", staged, "cudaMalloc", "VRAM")):
        a, far = Node(name + "here", options), Remote(name + "there", options, 0, launcher)
        places = [node.allocate(kind, 8 * MIB) for node in (a, far)]
        for node, where in zip((a, far), places):
            node.register(where, 8 * MIB)
        meet(a, far)
        for seed, operation in enumerate(("WRITE", "READ")):
            carry(a, far, operation, *places, 8 * MIB, (0, 0), (segment, segment), seed)
        far.close()
    return "; ".join(words) + "; staged: written and read"
