"""Requests that are released, or whose agent goes, while they are in flight."""

import pytest

MIB = 1 << 20


@pytest.mark.stock_fails("releasing a request in flight corrupts the next one")
@pytest.mark.parametrize("operation", ["WRITE", "READ"])
def test_release_in_flight(bed, progress, operation):
    """Ten times: a transfer of 128 MiB is dropped right after its post, and the next one must be whole when DONE."""
    size = 128 * MIB
    first, second = bed.pair(progress_thread=progress)
    near, far = first.buffer(size, seed=1), second.buffer(size, seed=2)
    # The dropped transfers have buffers of their own: nobody can say what they still move.
    near_dropped, far_dropped = first.buffer(size, seed=3), second.buffer(size, seed=4)
    first.knows(second)
    source, target = (near, far) if operation == "WRITE" else (far, near)
    for turn in range(10):
        dropped = first.prepare(operation, [near_dropped[:]], [far_dropped[:]], second, b"dropped")
        first.call("post", dropped)
        first.call("release", dropped)
        source.fill(10 + turn)
        first.transfer(operation, [near[:]], [far[:]], second, b"kept")
        target.check(10 + turn)


@pytest.mark.stock_fails("without a progress thread the peer of an agent that went fails others' transfers")
def test_agent_goes_with_transfers_in_flight(bed, progress):
    """Destroying an agent in the middle of its transfers neither hangs nor crashes it or its peer."""
    size = 64 * MIB
    first, second = bed.pair(progress_thread=progress)
    source, target = first.buffer(size, seed=1), second.buffer(size)
    first.knows(second)
    for _ in range(4):
        first.call("post", first.prepare("WRITE", [source[:]], [target[:]], second, b"going"))
    assert first.close() == 0
    third = bed.agent("third", progress_thread=progress).knows(second)
    second.knows(third)
    source = third.buffer(MIB, seed=5)
    third.transfer("WRITE", [source[:]], [target[:MIB]], second, b"still here")
    assert (third.name, b"still here") in second.call("receive", 5, 5)


@pytest.mark.stock_fails("a peer that was removed and added again answers no more")
def test_deregister_then_register_again(bed, progress):
    first, second = bed.pair(progress_thread=progress)
    source, target = first.buffer(MIB, seed=1), second.buffer(MIB)
    for seed in range(20, 25):
        first.knows(second)
        source.fill(seed)
        first.transfer("WRITE", [source[:]], [target[:]], second, b"%d" % seed)
        second.receives(b"%d" % seed, sender=first)
        target.check(seed)
        for buffer in (source, target):
            buffer.agent.call("deregister", buffer.region)
            buffer.region = buffer.agent.call("register", [buffer[:]])
        first.call("remove_remote", second.name)
