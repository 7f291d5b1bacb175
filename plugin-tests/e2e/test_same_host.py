"""Agents of one host: their host memory is reached without a network where the kernel lets both, and nowhere else."""

import ctypes
import mmap
import os
import random
import time

import pytest

from bed.agent import Refused
from test_metrics import numbers, scrape, total

pytestmark = [pytest.mark.ours, pytest.mark.tcp]
MIB = 1 << 20
# A guard against hanging, not a measurement.
VERDICT_LIMIT_S = 20
ON = {"same_host": "auto"}
MET = "is on this host: its host memory is reached directly"
# NIXL looks for a file in HOME, which another user may not.
DEBUG = (("NIXL_LOG_LEVEL", "DEBUG"), ("HOME", "/"))


def loud(host):
    return type(host)(host.plugin, host.nixl, host.libfabric, DEBUG)


def moved(agent, bed):
    """Bytes that went without a network, and bytes that went by rails, as this side counts them."""
    samples = numbers(scrape(agent, bed))
    return total(samples, "same_host_bytes_total"), total(samples, "rail_bytes_total")


def by_network(first, second, bed):
    """A transfer each way goes by rails, though `first` may reach others without them."""
    source, target = first.buffer(MIB, seed=5), second.buffer(MIB)
    first.knows(second), second.knows(first)
    before = moved(first, bed)
    first.transfer("WRITE", [source[:]], [target[:]], second, b"by network")
    second.receives(b"by network", sender=first)
    target.check(5)
    after = moved(first, bed)
    assert (after[0] - before[0], after[1] - before[1]) == (0, MIB)


@pytest.mark.parametrize("operation", ["WRITE", "READ"])
@pytest.mark.parametrize("size", [1, 5000, 64 * MIB], ids=["1B", "5000B", "64MiB"])
def test_done_means_done(bed, progress, operation, size):
    first, second = bed.pair(progress_thread=progress, metrics="127.0.0.1:0", **ON)
    near, far = first.buffer(size, seed=1), second.buffer(size, seed=2)
    first.knows(second), second.knows(first)
    first.transfer(operation, [near[:]], [far[:]], second, b"done")
    second.receives(b"done", sender=first)
    near.check(1 if operation == "WRITE" else 2)
    far.check(1 if operation == "WRITE" else 2)
    assert moved(first, bed) == (size, 0)
    for agent in (first, second):
        assert MET in agent.log_text()
        assert total(numbers(scrape(agent, bed)), "peer_same_host") == 1


@pytest.mark.parametrize("operation", ["WRITE", "READ"])
def test_random_lists(bed, progress, operation):
    """Thousands of descriptors of all lengths, over several regions on both sides."""
    rng = random.Random(f"{operation}-{progress}")
    first, second = bed.pair(progress_thread=progress, metrics="127.0.0.1:0", **ON)
    source, target = (first, second) if operation == "WRITE" else (second, first)
    sources = [source.buffer(4 * MIB, seed=seed) for seed in (1, 2)]
    targets = [target.buffer(4 * MIB) for _ in range(2)]
    first.knows(second)
    pieces, placed = [], ([], [])
    at = [0, 0]
    while True:
        pair, length, gap = rng.randrange(2), rng.choice([1, 7, 512, 4096, 16384]), rng.choice([0, 0, 3])
        if at[pair] + length > 4 * MIB:
            break
        pieces.append((pair, at[pair], length))
        placed[pair].append((at[pair], at[pair], length))
        at[pair] += length + gap
    rng.shuffle(pieces)
    froms = [sources[pair][start : start + length] for pair, start, length in pieces]
    tos = [targets[pair][start : start + length] for pair, start, length in pieces]
    near, far = (froms, tos) if operation == "WRITE" else (tos, froms)
    for message in (b"once", b"again"):
        first.transfer(operation, near, far, second, message)
        second.receives(message, sender=first)
    for pair, seed in enumerate((1, 2)):
        targets[pair].check(seed, placed[pair])
    assert moved(first, bed) == (2 * sum(length for *_, length in pieces), 0)


def test_a_request_is_posted_again_and_released_in_flight(bed, progress):
    first, second = bed.pair(progress_thread=progress, **ON)
    source, target = first.buffer(64 * MIB, seed=1), second.buffer(64 * MIB)
    spare, dropped = first.buffer(64 * MIB, seed=9), second.buffer(64 * MIB)
    first.knows(second)
    handle = first.prepare("WRITE", [source[:]], [target[:]], second)
    for seed in range(1, 5):
        lost = first.prepare("WRITE", [spare[:]], [dropped[:]], second, b"dropped")
        first.call("post", lost)
        first.call("release", lost)
        source.fill(seed)
        first.call("post", handle, b"%d" % seed)
        assert first.call("wait", handle, 60, deadline=90) == "DONE"
        assert (first.name, b"%d" % seed) in second.call("receive", 2, 1)
        target.check(seed)


# Where it is not to be


@pytest.mark.parametrize("where", ["here", "there"])
def test_an_agent_that_has_it_off_is_reached_by_network(bed, where):
    """It says nothing of its host, as agents of older versions do."""
    options = [dict(ON), {"same_host": "off"}]
    if where == "here":
        options.reverse()
    first, second = (bed.agent(name, progress_thread=True, metrics="127.0.0.1:0", **option) for name, option in zip("ab", options))
    by_network(first, second, bed)
    assert all(MET not in agent.log_text() for agent in (first, second))


def test_a_stock_peer_is_reached_by_network(bed, host):
    stock = type(host)("stock", host.nixl, host.libfabric)
    first = bed.agent("ours", progress_thread=True, metrics="127.0.0.1:0", **ON)
    second = bed.agent("stock", stock, progress_thread=True)
    by_network(first, second, bed)
    first.receives(sender=second)
    source, target = second.buffer(MIB, seed=7), first.buffer(MIB)
    second.knows(first)
    second.transfer("WRITE", [source[:]], [target[:]], first, b"back")
    first.receives(b"back", sender=second)
    target.check(7)


@pytest.mark.parametrize(
    "wrap, why",
    [
        (["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"], "its processes have another namespace"),
        (["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"], "it runs as another user"),
        (["setpriv", "--no-new-privs"], None),
    ],
    ids=["pid-namespace", "user", "same"],
)
def test_a_process_that_is_out_of_reach_is_reached_by_network(bed, host, wrap, why):
    if os.geteuid() != 0:
        pytest.skip("takes root to make such a process")
    first = bed.agent("first", loud(host), progress_thread=True, metrics="127.0.0.1:0", **ON)
    second = bed.process("second", loud(host), wrap=wrap).create(progress_thread=True, metrics="127.0.0.1:0", **ON)
    if why is None:
        first.knows(second)
        assert MET in first.log_text()
        return
    by_network(first, second, bed)
    by_network(second, first, bed)
    assert all(MET not in agent.log_text() for agent in (first, second))
    assert why in first.log_text()


def protected_region(worker, size, protection):
    """Memory that may not be touched, registered. Returns its address."""
    worker.mapping = mmap.mmap(-1, size)
    address = ctypes.addressof(ctypes.c_char.from_buffer(worker.mapping))
    protect(worker, address, size, protection)
    worker.register([(address, size)])
    return address


def protect(worker, address, size, protection):
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), protection) == 0


def test_one_region_that_cannot_be_reached_sends_all_by_network(bed):
    first, second = bed.pair(progress_thread=True, metrics="127.0.0.1:0", **ON)
    source, plain = first.buffer(2 * MIB, seed=1), second.buffer(MIB)
    # It cannot be read when it is tried, as memory of a device that is mapped into the process.
    address = second.run(protected_region, MIB, 0)
    first.knows(second)
    alone = first.prepare("WRITE", [source[:MIB]], [plain[:]], second)
    mixed = first.prepare("WRITE", [source[:MIB], source[MIB:]], [plain[:], (address, MIB)], second)
    second.run(protect, address, MIB, mmap.PROT_READ | mmap.PROT_WRITE)
    for handle, counted in ((alone, (MIB, 0)), (mixed, (0, 2 * MIB))):
        before = moved(first, bed)
        first.call("post", handle)
        assert first.call("wait", handle, 30) == "DONE"
        after = moved(first, bed)
        assert (after[0] - before[0], after[1] - before[1]) == counted
    plain.check(1, [(0, 0, MIB)])


# Memory that goes


def keep_writing(worker, local, remote, peer, seconds):
    """Posts one WRITE after the other until one fails or the time is up; returns its state, or the words of a refusal."""
    handle = worker.prepare("WRITE", local, remote, peer)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = worker.post(handle)
            while state == "PROC" and time.monotonic() < deadline:
                state = worker.state(handle)
        except Exception as error:
            return str(error)
        if state != "DONE":
            return state
    return "late"


def deregister_and_watch(worker, region, buffer, seconds):
    """Deregisters, fills the memory, and says whether anybody writes it after that."""
    worker.deregister(region)
    return is_left_alone(worker.buffers[buffer], seconds)


def is_left_alone(array, seconds):
    """Fills memory, and says whether nobody else writes it."""
    array[:] = 0xEE
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not (array == 0xEE).all():
            return False
    return True


def test_nothing_is_written_after_deregistration(bed, progress):
    first, second = bed.pair(progress_thread=progress, **ON)
    source = first.buffer(64 * MIB, seed=1)
    first_targets = [second.buffer(64 * MIB) for _ in range(5)]
    first.knows(second)
    for target in first_targets:
        first.begin("run", __name__, "keep_writing", ([source[:]], [target[:]], second.name, VERDICT_LIMIT_S))
        time.sleep(0.05)
        assert second.run(deregister_and_watch, target.region, target.number, 0.3), "written after its deregistration"
        outcome = first.finish(2 * VERDICT_LIMIT_S)
        assert outcome != "late" and outcome != "DONE", outcome


def test_an_agent_that_goes_leaves_its_memory_alone(bed):
    """Its process lives on, and what was registered is its own again."""
    first, second = bed.pair(progress_thread=True, **ON)
    source, target = first.buffer(64 * MIB, seed=1), second.buffer(64 * MIB)
    first.knows(second)
    first.begin("run", __name__, "keep_writing", ([source[:]], [target[:]], second.name, VERDICT_LIMIT_S))
    time.sleep(0.05)
    assert second.run(go_and_watch, target.number, 0.3), "written after its agent was gone"
    outcome = first.finish(2 * VERDICT_LIMIT_S)
    assert outcome not in ("late", "DONE"), outcome


def go_and_watch(worker, buffer, seconds):
    worker.close()
    return is_left_alone(worker.buffers[buffer], seconds)


def test_memory_registered_anew_is_reached_with_new_metadata_only(bed):
    first, second = bed.pair(progress_thread=True, metrics="127.0.0.1:0", **ON)
    source, target = first.buffer(MIB, seed=1), second.buffer(MIB)
    first.knows(second)
    stale = first.prepare("WRITE", [source[:]], [target[:]], second)
    second.call("deregister", target.region)
    target.region = second.call("register", [target[:]])
    with pytest.raises(Refused):
        first.call("post", stale)
        assert first.call("wait", stale, VERDICT_LIMIT_S) != "DONE"
        raise Refused("late", "it failed when it was asked for")
    target.check(0, [])
    first.call("remove_remote", second.name)
    first.knows(second)
    first.transfer("WRITE", [source[:]], [target[:]], second)
    target.check(1)


# Processes that go


def test_killed_in_mid_write(bed, progress):
    """A GiB is on its way when its target is killed: an error, and nobody else is hurt."""
    first, second = bed.pair(progress_thread=progress, **ON)
    third = bed.agent("third", progress_thread=progress, **ON)
    source, target = first.buffer(1024 * MIB, seed=1), second.buffer(1024 * MIB)
    small, other = first.buffer(MIB, seed=2), third.buffer(MIB)
    first.knows(second, third), third.knows(first)
    handle = first.prepare("WRITE", [source[:]], [target[:]], second, b"never")
    first.begin("run", __name__, "post_and_time", (handle, VERDICT_LIMIT_S))
    time.sleep(0.02)
    second.kill()
    killed_at = time.monotonic()
    outcome, ended_at = first.finish(2 * VERDICT_LIMIT_S)
    assert outcome != "PROC"
    print(f"{outcome} {1000 * (ended_at - killed_at):.1f} ms after the end of the process")
    for _ in range(10):
        first.transfer("WRITE", [small[:]], [other[:]], third, b"well")
        third.receives(b"well", sender=first)
    other.check(2)
    # Restarted under the same name.
    again = bed.process("again")
    again.name = second.name
    again.create(progress_thread=progress, **ON)
    fresh = again.buffer(MIB)
    first.call("remove_remote", second.name)
    first.knows(again), again.knows(first)
    first.transfer("WRITE", [small[:]], [fresh[:]], again, b"anew")
    again.receives(b"anew", sender=first)
    fresh.check(2)


def post_and_time(worker, handle, seconds):
    """The state in which a post ends, and when it does."""
    try:
        state = worker.post(handle, b"never")
        if state == "PROC":
            state = worker.wait(handle, seconds)
    except Exception as error:
        state = str(error)
    return state, time.monotonic()


def test_a_writer_that_is_killed_or_stopped_lets_go(bed):
    """Its slot on the target's board does not hold up a deregistration longer than it must."""
    target = bed.agent("target", progress_thread=True, drain_timeout_ms=2000, **ON)
    for fate in ("killed", "stopped"):
        writer = bed.agent("writer", progress_thread=True, **ON)
        source, memory = writer.buffer(64 * MIB, seed=1), target.buffer(64 * MIB)
        writer.knows(target)
        writer.begin("run", __name__, "keep_writing", ([source[:]], [memory[:]], target.name, VERDICT_LIMIT_S))
        time.sleep(0.05)
        if fate == "killed":
            writer.kill()
            target.call("deregister", memory.region)
            continue
        writer.stop()
        try:
            target.call("deregister", memory.region, deadline=VERDICT_LIMIT_S)
        except Refused as refused:
            # It was stopped within a turn.
            assert "BACKEND" in refused.kind.upper() or "NOT_ALLOWED" in refused.kind.upper(), refused
        writer.resume()
        assert writer.finish(2 * VERDICT_LIMIT_S) not in ("late", "DONE")


def test_memory_of_a_stopped_peer_is_reached(bed):
    """Its kernel does that. The notification waits until it goes on."""
    first, second = bed.pair(progress_thread=True, **ON)
    source, target = first.buffer(MIB, seed=1), second.buffer(MIB)
    first.knows(second), second.knows(first)
    first.transfer("WRITE", [source[:]], [target[:]], second, b"before")
    second.receives(b"before", sender=first)
    second.stop()
    source.fill(2)
    first.transfer("WRITE", [source[:]], [target[:]], second)
    second.resume()
    target.check(2)


def become_another_program(worker):
    os.execv("/bin/sleep", ["sleep", "60"])


def test_a_process_that_becomes_another_program_is_not_written(bed):
    first, second = bed.pair(progress_thread=True, connect_timeout_ms=2000, **ON)
    source, target = first.buffer(MIB, seed=1), second.buffer(MIB)
    first.knows(second)
    handle = first.prepare("WRITE", [source[:]], [target[:]], second)
    second.begin("run", __name__, "become_another_program", ())
    exe = f"/proc/{second.process.pid}/exe"
    deadline = time.monotonic() + VERDICT_LIMIT_S
    while "python" in os.readlink(exe) and time.monotonic() < deadline:
        time.sleep(0.01)
    state, _ = first.run(post_and_time, handle, VERDICT_LIMIT_S)
    assert state not in ("DONE", "PROC"), state
    second.kill()


def fork_and_go(worker):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def test_children_of_either_change_nothing(bed):
    first, second = bed.pair(progress_thread=True, **ON)
    source, target = first.buffer(MIB, seed=1), second.buffer(MIB)
    first.knows(second)
    for seed in (1, 2, 3):
        source.fill(seed)
        first.transfer("WRITE", [source[:]], [target[:]], second)
        target.check(seed)
        first.run(fork_and_go), second.run(fork_and_go)


# Boards that are full, or scribbled on


def board_of(agent):
    """The file of the agent's board, as a process of its user sees it."""
    pid = agent.process.pid
    for fd in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{fd}"
        if "nixl-board" in os.readlink(path):
            return path
    raise AssertionError("no board")


def test_scribbling_on_a_board_hurts_no_process(bed):
    """Who may write the board may write all of the process; so transfers may fail, and nothing may crash or hang."""
    first, second = bed.pair(progress_thread=True, drain_timeout_ms=500, connect_timeout_ms=2000, **ON)
    source, target = first.buffer(MIB, seed=1), second.buffer(MIB)
    first.knows(second), second.knows(first)
    path = board_of(second)
    rng = random.Random(7)
    with open(path, "r+b", buffering=0) as board:
        size = os.fstat(board.fileno()).st_size
        for start in (24, 64, 64 + 65536):
            board.seek(start)
            board.write(rng.randbytes(min(65536, size - start)))
            handle = first.prepare("WRITE", [source[:]], [target[:]], second)
            first.run(post_and_time, handle, VERDICT_LIMIT_S)
        with pytest.raises(OSError):
            os.ftruncate(board.fileno(), 4096)
    try:
        second.call("deregister", target.region)
    except Refused:
        pass
    # Both are well with others.
    third = bed.agent("third", progress_thread=True, **ON)
    spare = third.buffer(MIB)
    for agent in (first, second):
        other = agent.buffer(MIB, seed=3)
        agent.knows(third), third.knows(agent)
        agent.transfer("WRITE", [other[:]], [spare[:]], third, b"well")
        third.receives(b"well", sender=agent)
        spare.check(3)


def test_who_finds_no_place_on_a_board_goes_by_network(bed):
    first, second = bed.pair(progress_thread=True, metrics="127.0.0.1:0", **ON)
    with open(board_of(second), "r+b", buffering=0) as board:
        # Every slot is that of a process which lives: this one.
        start = int(open(f"/proc/{os.getpid()}/stat").read().rsplit(")", 1)[1].split()[19])
        owner = (os.getpid() << 42 | start).to_bytes(8, "little")
        for slot in range(1024):
            board.seek(64 + 64 * slot)
            board.write(owner)
    third = bed.agent("third", progress_thread=True, metrics="127.0.0.1:0", **ON)
    by_network(third, second, bed)
