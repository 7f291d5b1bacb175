"""Two NIXL agents in two processes move bytes through the plugin, with nothing but NIXL's own Python API.

The initiator writes blocks into the target's memory and reads them back; each transfer carries a notification, the target
answers each WRITE with one of its own, and both check every byte. Run by `make demo`.
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "e2e"))
from bed.places import LIBFABRIC_VERSIONS, NIXL_VERSIONS, PLUGINS, TARGET, Host  # noqa: E402

KIB, MIB = 1 << 10, 1 << 20
# Blocks per transfer, bytes per block.
SHAPES = [(1, 1), (1, 4 * KIB), (1, 64 * KIB + 7), (1, MIB), (1, 16 * MIB), (1, 64 * MIB), (512, 128 * KIB), (4096, 16 * KIB)]
REGION = 128 * MIB
ROUNDS = 5
PATIENCE_S = 60


def new_agent(name, backend):
    """An agent with one backend, and one registered region."""
    import numpy
    from nixl_cu12 import nixl_agent, nixl_agent_config

    agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=True, backends=[backend]))
    region = numpy.zeros(REGION, dtype=numpy.uint8)
    agent.register_memory(agent.get_reg_descs([(region.ctypes.data, REGION, 0, "")], "DRAM"))
    return agent, region


def wait_for_notification(agent, peer):
    deadline = time.monotonic() + PATIENCE_S
    while not (messages := agent.get_new_notifs().get(peer)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{agent.name}: no notification from {peer} in {PATIENCE_S} s")
        time.sleep(0.0001)
    return messages[0]


def transfer(agent, operation, local, remote, peer, message):
    """Posts one transfer and returns how long it took until DONE."""
    request = agent.initialize_xfer(operation, agent.get_xfer_descs(local, "DRAM"), agent.get_xfer_descs(remote, "DRAM"), peer, message)
    start = time.perf_counter()
    state = agent.transfer(request)
    while state == "PROC":
        if time.perf_counter() - start > PATIENCE_S:
            raise TimeoutError(f"{operation} not done in {PATIENCE_S} s")
        state = agent.check_xfer_state(request)
    elapsed = time.perf_counter() - start
    if state != "DONE":
        raise RuntimeError(f"{operation}: {state}")
    agent.release_xfer_handle(request)
    return elapsed


def blocks(base, count, size):
    """Blocks with a gap of their own size between them, so that none can be joined."""
    step = size if count == 1 else 2 * size
    return [(base + index * step, size, 0) for index in range(count)]


def marked(region, count, size):
    """The same blocks as an array that can be filled and compared."""
    if count == 1:
        return region[:size].reshape(1, size)
    return region[: 2 * count * size].reshape(count, 2 * size)[:, :size]


def loaded(words):
    """The files with one of these words in their names that this process has mapped."""
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    return sorted(path for path in paths if any(word in os.path.basename(path) for word in words))


def target(pipe, backend):
    agent, region = new_agent("target", backend)
    pipe.send((agent.get_agent_metadata(), region.ctypes.data, os.getpid()))
    agent.add_remote_agent(pipe.recv())
    pattern = source_pattern()
    for count, size in SHAPES:
        for turn in range(ROUNDS):
            message = wait_for_notification(agent, "initiator")
            expected = pattern[turn : turn + count * size].reshape(count, size)
            whole = (marked(region, count, size) == expected).all()
            agent.send_notif("initiator", b"whole" if whole else b"damaged: " + message)
            # The initiator has read the block back; it may be overwritten from here on.
            wait_for_notification(agent, "initiator")
            marked(region, count, size)[:] = 0
            agent.send_notif("initiator", b"cleared")
    pipe.recv()


def source_pattern():
    import numpy

    return numpy.resize(numpy.random.default_rng(1).integers(1, 256, 1_048_573, dtype=numpy.uint8), 64 * MIB + ROUNDS)


def initiator(pipe, backend):
    agent, region = new_agent("initiator", backend)
    metadata, remote, pid = pipe.recv()
    pipe.send(agent.get_agent_metadata())
    agent.add_remote_agent(metadata)
    print(f"  machine    {platform.node()}, {os.cpu_count()} cores, Linux {platform.release()}")
    print(f"  processes  initiator {os.getpid()}, target {pid}; Python {platform.python_version()}")
    for path in loaded(["libplugin_", "libfabric.so", "libnixl.so"]):
        print(f"  loaded     {path}")
    for key, value in sorted(agent.get_backend_params(backend).items()):
        if key in ("provider", "devices", "libfabric"):
            print(f"  {key:<10} {value}")
    print(f"\n  {'':8} {'blocks':>7} {'bytes each':>11} {'median':>12} {'GB/s':>7}")
    pattern, local = source_pattern(), region.ctypes.data
    for count, size in SHAPES:
        times = {"WRITE": [], "READ": []}
        mine = marked(region, count, size)
        for turn in range(ROUNDS):
            expected = pattern[turn : turn + count * size].reshape(count, size)
            mine[:] = expected
            near, far = blocks(local, count, size), blocks(remote, count, size)
            times["WRITE"].append(transfer(agent, "WRITE", near, far, "target", b"written"))
            answer = wait_for_notification(agent, "target")
            if answer != b"whole":
                raise RuntimeError(f"WRITE of {count} x {size} bytes: {answer}")
            mine[:] = 0
            times["READ"].append(transfer(agent, "READ", near, far, "target", b"read"))
            if not (mine == expected).all():
                raise RuntimeError(f"READ of {count} x {size} bytes brought wrong bytes")
            wait_for_notification(agent, "target")
        for operation, seconds in times.items():
            median = statistics.median(seconds)
            print(f"  {operation:8} {count:7} {size:11,} {median * 1e6:9,.0f} us {count * size / median / 1e9:7.2f}", flush=True)
    pipe.send("over")


def play(role, pipe, backend):
    role(pipe, backend)
    if backend == "UCX":
        # UCX's libnl in the wheel crashes at exit.
        sys.stdout.flush()
        os._exit(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plugin", choices=PLUGINS, default="ours")
    parser.add_argument("--libfabric", choices=LIBFABRIC_VERSIONS, default="system")
    parser.add_argument("--nixl", choices=[version for version in NIXL_VERSIONS if version >= "1.4"], default=NIXL_VERSIONS[0])
    chosen = parser.parse_args()
    host = Host(chosen.plugin, chosen.nixl, chosen.libfabric, (("NIXL_LOG_LEVEL", os.environ.get("NIXL_LOG_LEVEL", "ERROR")),))
    # The children take it over when they start as new processes.
    os.environ.update(host.environment())
    sys.path.insert(0, str(TARGET / "nixl" / chosen.nixl))
    print(f"NIXL {chosen.nixl}, backend {host.backend}, libfabric {chosen.libfabric}: two agents, every byte checked\n", flush=True)

    context = multiprocessing.get_context("spawn")
    ends = context.Pipe()
    children = [context.Process(target=play, args=(role, end, host.backend), name=role.__name__) for role, end in zip((initiator, target), ends)]
    for child in children:
        child.start()
    while all(child.is_alive() for child in children):
        time.sleep(0.1)
    time.sleep(0.5)
    failed = [child.name for child in children if child.exitcode not in (0, None)]
    for child in children:
        if failed:
            child.kill()
        child.join(10)
    if failed or any(child.exitcode != 0 for child in children):
        raise SystemExit(f"\ndemo: FAILED ({', '.join(failed) or 'a process did not end'})")
    transfers = 2 * ROUNDS * len(SHAPES)
    print(f"\ndemo: {transfers} transfers, {ROUNDS * 2 * sum(count * size for count, size in SHAPES):,} bytes, all as they should be")


if __name__ == "__main__":
    main()
