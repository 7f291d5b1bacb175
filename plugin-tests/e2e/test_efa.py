"""What only EFA does: no order, many devices, silent loss, devices that die. Run with --network efa or efa-direct."""

import os
import time
from pathlib import Path

import pytest

from bed.agent import Refused
from bed.softefa import LOOK_S

pytestmark = pytest.mark.efa
MIB = 1 << 20


def counted(network, host, devices, counter):
    counters = network.host(host, devices).counters()
    return {name: values[counter] for name, values in counters.items() if values[counter]}


def total(network, counter):
    return sum(counted(network, 0, None, counter).values())


def wrote(network, host, devices=None):
    """Bytes written by RDMA, by device, of the devices that wrote; or read by the target in place of that."""
    return counted(network, host, devices, "rdma_write_bytes" if network.writes else "rdma_read_resp_bytes")


def was_written(network, host, devices=None):
    return counted(network, host, devices, "rdma_write_recv_bytes" if network.writes else "rdma_read_bytes")


def write_all(first, second, size, seed):
    source, target = first.buffer(size, seed=seed), second.buffer(size)
    first.knows(second)
    first.transfer("WRITE", [source[:]], [target[:]], second, b"all")
    second.receives(b"all", sender=first)
    target.check(seed)


def write_until(first, second, size, all_took):
    """Writes one buffer until all have taken of it, and says how often: those whose peers answer first may do the first ones alone."""
    source, target = first.buffer(size, seed=1), second.buffer(size)
    first.knows(second)
    for count in range(1, 51):
        first.transfer("WRITE", [source[:]], [target[:]], second)
        if all_took():
            break
    target.check(1)
    return count


def test_devices_become_rails(bed, efa, request):
    agent = bed.agent(progress_thread=True)
    log = agent.log_text()
    assert ("have no RDMA write" in log) != efa.writes
    assert f"{request.config.getoption('--devices')} rails" in log and "provider efa" in log
    assert "WARN" not in log, "an RDMA device is nothing to warn of"


def files_of_libfabric():
    """Shared memory of the processes that run now; programs that were killed leave theirs behind."""
    return {path.name for path in Path("/dev/shm").iterdir() if "fe80" in path.name}


@pytest.mark.ours
def test_no_shared_memory(bed, efa, progress):
    """The provider's own shared memory costs a domain, an endpoint and a queue for each rail, and is never used."""
    efa.shm = True
    before = files_of_libfabric()
    first, second = bed.pair(progress_thread=progress)
    write_all(first, second, MIB, 1)
    assert files_of_libfabric() <= before


@pytest.mark.ours
@pytest.mark.parametrize("disorder", ["", "reorder_us=2000 hold_pct=60", "ack_delay_us=300 jitter_us=500", "rnr_pct=20"],
                         ids=["as-it-comes", "disorder", "late-acknowledged", "receiver-not-ready"])
def test_done_means_arrived(bed, efa, progress, disorder):
    """The data is looked at the moment a silent write is DONE, and the moment the notification of another is there."""
    efa.control(disorder)
    size = 3 * MIB
    first, second = bed.pair(progress_thread=progress)
    source, target, marked = first.buffer(size, seed=1), second.buffer(size), second.buffer(size)
    first.knows(second)
    for turn in range(8):
        source.fill(10 + turn)
        first.transfer("WRITE", [source[:]], [target[:]], second)
        target.check(10 + turn)
        second.begin("run", "test_notify", "receive_and_compare", (marked.number, 10 + turn))
        first.transfer("WRITE", [source[:]], [marked[:]], second, b"there")
        assert second.finish(60) is None


def mixed_posts(worker, local, remote, peer, count, silent_each):
    """Posts one write after the other, each `silent_each`-th without a notification; returns how many were notified."""
    depth, notified = 32, 0
    loud = [worker.prepare("WRITE", [local], [remote], peer, b"x") for _ in range(depth)]
    silent = [worker.prepare("WRITE", [local], [remote], peer) for _ in range(depth)]
    flying = []
    for number in range(count):
        quiet = number % silent_each == 0
        slot = number % depth
        handle = (silent if quiet else loud)[slot]
        if len(flying) == depth:
            # The slot's last post, if it still flies, is the oldest.
            assert worker.wait(flying.pop(0), 30) == "DONE"
        worker.post(handle, b"" if quiet else b"%d" % number)
        notified += not quiet
        flying.append(handle)
    for handle in flying:
        assert worker.wait(handle, 30) == "DONE"
    for handle in loud + silent:
        worker.release(handle)
    return notified


def count_numbers(worker, count, seconds):
    """Receives `count` notifications: how many different ones, and how many in all."""
    texts = [text for _, text in worker.receive(count, seconds)]
    return len(set(texts)), len(texts)


@pytest.mark.stock_fails("transfers of one peer are numbered by 16 bits, and silent ones stay in its receiver's table")
def test_seventy_thousand_notified(bed, efa, progress):
    """More notified transfers to one peer than 16 bits can number, with silent ones between."""
    count, silent_each = 84_000, 6
    first, second = bed.pair(progress_thread=progress)
    source, target = first.buffer(4096, seed=1), second.buffer(4096)
    first.knows(second)
    expected = count - count // silent_each
    second.begin("run", __name__, "count_numbers", (expected, 240))
    assert first.run(mixed_posts, source[:256], target[:256], second.name, count, silent_each, deadline=240) == expected
    assert second.finish(60) == (expected, expected)
    assert second.call("receive", 1, 0.2) == [], "a notification came twice"
    target.check(1, [(0, 0, 256)])


@pytest.mark.ours
@pytest.mark.parametrize(("near", "far"), [(32, 4), (4, 32)])
def test_unequal_hosts(bed, host, efa, progress, near, far):
    """32 devices on one side and 4 on the other: each rail that memory of the smaller side lies on carries its part."""
    if not efa.writes:
        pytest.skip("a p4d has 4 devices")
    efa.devices = near
    first = bed.agent("first", progress_thread=progress, max_bw_per_dram_seg=1_000_000)
    efa.devices = far
    second = bed.agent("second", progress_thread=progress, max_bw_per_dram_seg=1_000_000)
    first.knows(second), second.knows(first)
    few = (lambda: wrote(efa, 0, near)) if near < far else (lambda: was_written(efa, 1, far))
    count = write_until(first, second, 32 * MIB, lambda: len(few()) == min(near, far))
    sent, landed = wrote(efa, 0, near), was_written(efa, 1, far)
    assert sum(sent.values()) == sum(landed.values()) == count * 32 * MIB
    for side, share, devices in ((sent, "sent", near), (landed, "landed", far)):
        if devices == min(near, far):
            # Rails take what they get done, so their parts differ; but each takes some.
            assert len(side) == devices, f"{share}: {side}"


@pytest.mark.ours
def test_memory_is_only_on_its_rails(bed, efa, progress):
    """What the topology gives host memory is what carries it, on both sides, and all of that does."""
    first, second = bed.pair(progress_thread=progress, max_bw_per_dram_seg=200)
    count = write_until(first, second, 16 * MIB, lambda: len(wrote(efa, 0)) == len(was_written(efa, 1)) == 2)
    sent, landed = wrote(efa, 0), was_written(efa, 1)
    assert len(sent) == len(landed) == 2, f"{sent} {landed}: two rails of 100 Gb/s"
    assert sum(sent.values()) == count * 16 * MIB


@pytest.mark.ours
def test_silent_drop_names_the_remedy(bed, efa, progress):
    """A wrong security group: everything leaves and nothing arrives. The error says where to look."""
    first, second = (bed.agent(name, progress_thread=progress, connect_timeout_ms=2500) for name in ("first", "second"))
    efa.control("src=h0 drop_pct=100 unreachable_ms=never")
    source, target = first.buffer(MIB, seed=1), second.buffer(MIB)
    first.knows(second)
    with pytest.raises(Refused) as refused:
        first.transfer("WRITE", [source[:]], [target[:]], second, b"lost", deadline=15)
    assert "DISCONNECT" in str(refused.value)
    assert "security group" in first.log_text() and "tx_pkts" in first.log_text()
    sent = sum(values["tx_pkts"] for values in efa.host(0).counters().values())
    assert sent > 0


@pytest.mark.ours
def test_unreachable_names_the_remedy(bed, efa, progress):
    """The same, where the device gives up by itself."""
    first, second = bed.pair(progress_thread=progress, connect_timeout_ms=8000)
    efa.control("src=h0 drop_pct=100 unreachable_ms=300")
    source, target = first.buffer(MIB, seed=1), second.buffer(MIB)
    first.knows(second)
    with pytest.raises(Refused) as refused:
        first.transfer("WRITE", [source[:]], [target[:]], second, b"lost", deadline=15)
    assert "DISCONNECT" in str(refused.value)
    assert "security group" in first.log_text()


@pytest.mark.ours
def test_transfer_timeout_ends_what_the_network_swallowed(bed, efa, progress):
    """Between two that know each other packets vanish for ever: transfer_timeout_ms is how long one waits for them."""
    # Long enough for a slow machine to move the first transfer.
    first, second = bed.pair(progress_thread=progress, transfer_timeout_ms=6000)
    write_all(first, second, MIB, 1)
    source, target = first.buffer(MIB, seed=2), second.buffer(MIB)
    first.knows(second)
    efa.control("src=h0 drop_pct=100 unreachable_ms=never")
    with pytest.raises(Refused):
        first.transfer("WRITE", [source[:]], [target[:]], second, deadline=30)
    assert "transfer_timeout_ms" in first.log_text()


@pytest.mark.parametrize("operation", ["WRITE", "READ"])
def test_first_operation_is_silent(bed, progress, operation):
    """The first thing between two agents that only exchanged metadata, without a notification."""
    first, second = (bed.agent(name, progress_thread=progress) for name in ("first", "second"))
    near, far = first.buffer(MIB, seed=1), second.buffer(MIB, seed=2)
    first.knows(second)
    first.transfer(operation, [near[:]], [far[:]], second)
    (far if operation == "WRITE" else near).check(1 if operation == "WRITE" else 2)


def ends(agent, handle, seconds):
    """How a request ends: a state, or the error's text."""
    try:
        return agent.call("wait", handle, seconds, deadline=seconds + 10)
    except Refused as refused:
        return str(refused)


def watch_out(first, second, handle):
    """Posts a write while notifications go the same way; then all of them are there, once, and so is the data."""
    count = 60
    first.run(send_numbers, second.name, count)
    first.call("post", handle, b"meanwhile")
    return count + 1


@pytest.mark.ours
@pytest.mark.parametrize("carries_messages", [True, False], ids=["first", "other"])
@pytest.mark.parametrize("how", ["dead", "cut-off"])
def test_device_that_dies(bed, efa, progress, how, carries_messages):
    """A device of the peer dies in the middle, or its link goes down: transfers and notifications get there by the others."""
    if not efa.writes and carries_messages:
        pytest.skip("what a p4d writes are messages, and fail with their endpoint")
    # Where the target reads in place of it, libfabric does not tell the sender that it could not: the sender asks.
    limit = {} if efa.writes else {"connect_timeout_ms": 8000}
    first, second = bed.pair(progress_thread=progress, **limit)
    third = bed.agent("third", progress_thread=progress)
    first.knows(third), third.knows(first)
    write_all(first, third, MIB, 2)
    source, target = first.buffer(64 * MIB, seed=3), second.buffer(64 * MIB)
    first.knows(second)
    first.transfer("WRITE", [source[:]], [target[:]], second)
    written, carrier = was_written(efa, 1), min(efa.host(1).counters())
    dying = carrier if carries_messages else max(set(written) - {carrier}, key=written.get)
    fault = f"host=h1/{dying} {'dead=1' if how == 'dead' else 'drop_pct=100'} unreachable_ms=300"
    # Half a second for the whole.
    efa.control("src=h0 gbps=0.3")
    source.fill(4)
    handle = first.prepare("WRITE", [source[:]], [target[:]], second, b"meanwhile")
    expected = watch_out(first, second, handle)
    efa.control("src=h0 gbps=0.3", fault)
    verdict = ends(first, handle, 60)
    first.call("release", handle)
    if efa.writes:
        assert verdict == "DONE"
        target.check(4)
        assert second.run(count_numbers, expected, 60, deadline=90) == (expected, expected)
        efa.control(fault)
        for turn in range(4):
            source.fill(10 + turn)
            first.transfer("WRITE", [source[:]], [target[:]], second, b"%d" % turn)
            target.check(10 + turn)
        second.receives(*(b"%d" % turn for turn in range(4)), sender=first)
        assert second.call("receive", 1, 0.3) == [], "a notification came twice"
    elif verdict == "DONE":
        # The target had fetched it.
        target.check(4)
    else:
        # An emulated write is several packets, and not over for the device when it fails.
        assert "ERR" in verdict
    write_all(first, third, MIB, 4)
    # When it is well again, so are transfers.
    efa.control()
    write_all(first, third, MIB, 5)


@pytest.mark.ours
def test_killed_peer_of_ways_not_taken_before(bed, efa, progress):
    """Of an endpoint that never answered libfabric says only that somebody was not reached: long before the peer's time is over."""
    first, second = bed.pair(progress_thread=progress, connect_timeout_ms=600_000)
    near, far = first.buffer(16 * MIB), second.buffer(16 * MIB, seed=1)
    first.knows(second)
    first.transfer("READ", [near[:64]], [far[:64]], second)
    handle = first.prepare("READ", [near[:]], [far[:]], second)
    second.kill()
    first.call("post", handle)
    assert "ERR" in ends(first, handle, 60)
    first.call("release", handle)


@pytest.mark.ours
@pytest.mark.parametrize("carries_messages", [True, False], ids=["first", "other"])
def test_own_link_that_goes_down(bed, efa, progress, carries_messages):
    """One of this host's devices reaches nobody any more, and nothing says so: its transfers go over the others."""
    if not efa.writes:
        pytest.skip("an emulated write is not over for the device when it fails")
    first, second = bed.pair(progress_thread=progress)
    near, far = first.buffer(64 * MIB, seed=1), second.buffer(64 * MIB, seed=2)
    first.knows(second), second.knows(first)
    first.transfer("WRITE", [near[:]], [far[:]], second, b"before")
    second.receives(b"before", sender=first)
    carrier = min(efa.host(0).counters())
    down = carrier if carries_messages else max(set(wrote(efa, 0)) - {carrier})
    near.fill(3)
    efa.control("src=h0 gbps=0.3")
    handle = first.prepare("WRITE", [near[:]], [far[:]], second, b"meanwhile")
    expected = watch_out(first, second, handle)
    efa.control("src=h0 gbps=0.3", f"host=h0/{down} drop_pct=100 unreachable_ms=300")
    assert ends(first, handle, 60) == "DONE"
    far.check(3)
    assert second.run(count_numbers, expected, 60, deadline=90) == (expected, expected)
    for turn in range(3):
        near.fill(10 + turn)
        first.transfer("WRITE", [near[:]], [far[:]], second, b"%d" % turn)
        far.check(10 + turn)
    second.receives(b"0", b"1", b"2", sender=first)
    if not carries_messages:
        log = first.log_text()
        assert f"on {down}" in log and "does not reach endpoint" in log


@pytest.mark.ours
@pytest.mark.parametrize("carries_messages", [True, False], ids=["first", "other"])
@pytest.mark.parametrize("operation", ["WRITE", "READ"])
def test_own_device_that_dies(bed, efa, progress, operation, carries_messages):
    """One of this host's devices dies in the middle: the transfer and all later ones go over the others, the peer's too."""
    if not efa.writes:
        pytest.skip("a write of a p4d is a read of its peer, whose transfer it is not")
    first, second = bed.pair(progress_thread=progress)
    near, far = first.buffer(64 * MIB, seed=1), second.buffer(64 * MIB, seed=2)
    first.knows(second), second.knows(first)
    first.transfer(operation, [near[:]], [far[:]], second, b"before")
    second.receives(b"before", sender=first)
    (near if operation == "WRITE" else far).fill(3)
    first_device = min(efa.host(0).counters())
    moved = wrote(efa, 0) if operation == "WRITE" else counted(efa, 0, None, "rdma_read_bytes")
    dying = first_device if carries_messages else max(set(moved) - {first_device})
    # Half a second for the whole.
    efa.control("src=h0 gbps=0.3")
    handle = first.prepare(operation, [near[:]], [far[:]], second, b"meanwhile")
    first.call("post", handle, b"meanwhile")
    efa.control("src=h0 gbps=0.3", f"host=h0/{dying} dead=1 unreachable_ms=300")
    assert ends(first, handle, 30) == "DONE"
    (far if operation == "WRITE" else near).check(3)
    second.receives(b"meanwhile", sender=first)
    efa.control(f"host=h0/{dying} dead=1 unreachable_ms=300")
    for turn in range(4):
        (near if operation == "WRITE" else far).fill(10 + turn)
        first.transfer(operation, [near[:]], [far[:]], second, b"%d" % turn)
        (far if operation == "WRITE" else near).check(10 + turn)
    second.receives(*(b"%d" % turn for turn in range(4)), sender=first)
    log = first.log_text()
    assert log.count("has failed and is out of use") == 1 and f"on {dying}" in log
    # Told, the peer does not use it either, whatever rail it begins with.
    assert f"devices of {first.name} have failed" in second.log_text()
    for turn in range(4):
        second.transfer("WRITE", [far[: 4096 * turn + 1]], [near[: 4096 * turn + 1]], first)
    second.transfer("READ", [far[:]], [near[:]], first)


@pytest.mark.ours
def test_writes_share_doorbells(bed, efa):
    """A list that nothing of can be joined: the device is told once for sixteen writes, or for fewer at the ends of the queues."""
    if not efa.writes:
        pytest.skip("the device writes by messages")
    count, block = 4096, 4096
    first, second = bed.pair(progress_thread=False)
    source, target = first.buffer(2 * count * block, seed=1), second.buffer(2 * count * block)
    first.knows(second)
    blocks = [slice(2 * i * block, (2 * i + 1) * block) for i in range(count)]

    def transfer():
        before = [total(efa, name) for name in ("softefa_posted_wrs", "softefa_doorbells")]
        first.transfer("WRITE", [source[b] for b in blocks], [target[b] for b in blocks], second)
        after = [total(efa, name) for name in ("softefa_posted_wrs", "softefa_doorbells")]
        return [new - old for new, old in zip(after, before)]

    transfer()
    for speed in "", "gbps=2":  # a device that keeps up, and one whose completions come one by one
        efa.control(f"src=h0 {speed}")
        posted, doorbells = transfer()
        assert posted == count
        assert 16 * doorbells <= 1.1 * posted, f"{doorbells} doorbells"


@pytest.mark.ours
def test_device_that_is_slow(bed, efa, progress):
    """A device at a hundredth of the others' speed delays its share and loses none."""
    first, second = bed.pair(progress_thread=progress)
    write_all(first, second, 8 * MIB, 1)
    slow = next(iter(wrote(efa, 0)))
    efa.control(f"src=h0/{slow} gbps=0.2 delay_us=1000")
    write_all(first, second, 16 * MIB, 2)


@pytest.mark.ours
@pytest.mark.parametrize("status", [1, 5, 7, 9, 11, 13])
def test_failed_operation_fails_its_transfer_alone(bed, efa, progress, status):
    """One write in the middle ends with a status of the device: its transfer fails, unless others can do it; the next is whole."""
    # Where the target reads in place of it, libfabric does not tell the sender that it could not.
    limit = {} if efa.writes else {"transfer_timeout_ms": 6000}
    first, second = bed.pair(progress_thread=progress, **limit)
    write_all(first, second, 8 * MIB, 1)
    source, target = first.buffer(24 * MIB, seed=2), second.buffer(24 * MIB)
    first.knows(second)
    handle = first.prepare("WRITE", [source[:]], [target[:]], second, b"half")
    operation = "src=h0 dst=h1 op=write" if efa.writes else "src=h1 dst=h0 op=read"
    efa.control(f"{operation} nth=3 status={status}", f"seed={status}")
    first.call("post", handle, b"half")
    # The device itself has failed, or its way to the peer, which others reach.
    others_do = efa.writes and status in (1, 9, 13)
    verdict = ends(first, handle, 30)
    assert verdict == "DONE" if others_do else "ERR" in verdict
    first.call("release", handle)
    efa.control()
    if others_do:
        target.check(2)
        second.receives(b"half", sender=first)
    else:
        assert second.call("receive", 1, 0.3) == [], "the notification of a transfer that failed"
    write_all(first, second, 8 * MIB, 3)


@pytest.mark.ours
@pytest.mark.parametrize("phase", ["before", "in", "after"])
@pytest.mark.parametrize("deed", ["kill", "stop", "restart"])
def test_peer_in_each_phase(bed, efa, progress, deed, phase):
    """Killed, stopped for a while or started anew, before, in and after a transfer: the verdict is right, others go on."""
    first, second = bed.pair(progress_thread=progress, connect_timeout_ms=4000)
    third = bed.agent("third", progress_thread=progress)
    first.knows(third), third.knows(first)
    write_all(first, second, MIB, 1)
    source, target = first.buffer(48 * MIB, seed=2), second.buffer(48 * MIB)
    first.knows(second)
    handle = first.prepare("WRITE", [source[:]], [target[:]], second, b"big")
    if phase == "before":
        (second.stop if deed == "stop" else second.kill)()
    try:
        first.call("post", handle, b"big")
        posted = True
    except Refused as refused:
        assert phase == "before" and "DISCONNECT" in str(refused)
        posted = False
    if phase == "in":
        (second.stop if deed == "stop" else second.kill)()
    verdict = None
    if phase == "after":
        verdict = ends(first, handle, 30)
        assert verdict == "DONE"
        (second.stop if deed == "stop" else second.kill)()
    write_all(first, third, MIB, 3)
    if deed == "stop":
        time.sleep(0.3)
        second.resume()
        assert posted and ends(first, handle, 30) == "DONE"
        second.receives(b"big", sender=first)
        target.check(2)
    elif posted and verdict is None:
        assert ends(first, handle, 30) == "DONE" or "DISCONNECT" in ends(first, handle, 30)
    if posted:
        first.call("release", handle)
    if deed == "restart":
        again = bed.process("second", network=_Same(efa, 1))
        again.name = second.name
        again.create(progress_thread=progress)
        first.call("remove_remote", second.name)
        first.knows(again), again.knows(first)
        write_all(first, again, 8 * MIB, 5)
    write_all(first, third, MIB, 4)


class _Same:
    """Places an agent on a given host."""

    def __init__(self, network, host):
        self.network, self.host = network, host

    def space(self, index):
        return self.network.host(self.host)


@pytest.mark.ours
def test_two_agents_of_one_host(bed, efa, progress):
    """Agents that share their devices, and talk to a third on another host."""
    place = _Same(efa, 0)
    first, second = (bed.agent(name, network=place, progress_thread=progress) for name in ("first", "second"))
    third = bed.agent("third", progress_thread=progress)
    for agent in (first, second):
        agent.knows(third), third.knows(agent)
    write_all(first, third, 4 * MIB, 1)
    write_all(second, third, 4 * MIB, 2)
    write_all(third, first, 4 * MIB, 3)


def resident(agent):
    """Bytes of memory that the agent's process has."""
    pages = Path(f"/proc/{agent.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGESIZE")


def send_numbers(worker, peer, count):
    for number in range(count):
        worker.send(peer, b"%d" % number)


@pytest.mark.ours
def test_notifications_that_nobody_takes(bed, efa):
    """Senders wait: libfabric would keep 9 KB for each of them. Then all come, once, and a write that may have waited with them."""
    count = 40_000
    first = bed.agent("first", progress_thread=True)
    second = bed.agent("second", progress_thread=True, inbox_bytes_max="64K")
    source, target = first.buffer(MIB, seed=2), second.buffer(MIB)
    first.knows(second), second.knows(first)
    write_all(first, second, MIB, 1)
    before = resident(second)
    first.run(send_numbers, second.name, count)
    # As long as it grows, and a second more.
    most, quiet_since = before, time.monotonic()
    while time.monotonic() < quiet_since + 1:
        time.sleep(0.05)
        if (now := resident(second)) > most + MIB:
            most, quiet_since = now, time.monotonic()
    assert most - before < 48 * MIB, f"{(most - before) / MIB:.0f} MiB for {count} notifications of some bytes"
    assert "does it call getNotifs?" in second.log_text()
    handle = first.prepare("WRITE", [source[:]], [target[:]], second)
    first.call("post", handle)
    assert second.run(count_numbers, count, 60, deadline=90) == (count, count)
    assert first.call("wait", handle, 30) == "DONE"
    target.check(2)


@pytest.mark.ours
def test_address_handles_of_rails_that_talk(bed, efa):
    """A peer with 32 devices is no reason for 32 address handles on each of ours: a device gets one when it has something to say."""
    if not efa.writes:
        pytest.skip("a p4d has 4 devices")
    efa.devices = 32

    def read(name):
        return [{device: values[name] for device, values in efa.host(index).counters().items()} for index in range(2)]

    def changed(name, before):
        return [{device: now - was[device] for device, now in side.items() if now > was[device]}
                for was, side in zip(before, read(name))]

    first, second = bed.pair(progress_thread=True)
    handles, packets = read("softefa_address_handles"), read("tx_pkts")
    for size in (8, 64 * MIB):
        write_all(first, second, size, 1)
        time.sleep(LOOK_S)
        for made, said in zip(changed("softefa_address_handles", handles), changed("tx_pkts", packets)):
            print(f"{size} bytes: handles {made}, talked {sorted(said)}")
            # One for each device that talks, and one more where messages and data of one go to two devices there.
            assert set(made) <= set(said) and sum(made.values()) <= len(said) + 1, (made, said)
        if size == 8:
            assert len(said) <= 2, "one rail for messages, one for data"
