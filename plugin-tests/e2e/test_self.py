"""An agent that is its own peer."""

import time

import pytest

MIB = 1 << 20


def move_and_look(worker, operation, local, remote, last, value, seconds):
    """Posts a transfer to oneself and returns the state at the end with the last byte, read at once."""
    handle = worker.prepare(operation, local, remote, worker.agent.name)
    buffer = worker.buffers[last]
    state = worker.post(handle)
    deadline = time.monotonic() + seconds
    while state == "PROC" and time.monotonic() < deadline:
        state = worker.state(handle)
    seen = int(buffer[-1])
    worker.release(handle)
    return state, seen == value


@pytest.mark.stock_fails("a transfer to oneself is DONE before a byte moved")
@pytest.mark.parametrize("operation", ["WRITE", "READ"])
@pytest.mark.parametrize("size", [1, 5000, 256 * MIB], ids=["1B", "5000B", "256MiB"])
def test_done_means_done(bed, progress, operation, size):
    agent = bed.agent(progress_thread=progress)
    source, target = agent.buffer(size, seed=3), agent.buffer(size)
    local, remote = (source, target) if operation == "WRITE" else (target, source)
    last = int(agent.run(last_byte, source.number))
    state, present = agent.run(move_and_look, operation, [local[:]], [remote[:]], target.number, last, 60, deadline=90)
    assert state == "DONE"
    assert present, "DONE, and the last byte was not there"
    target.check(3)


def last_byte(worker, buffer):
    return worker.buffers[buffer][-1]


@pytest.mark.stock_fails("a transfer to oneself is DONE before a byte moved")
def test_notification_to_oneself(bed, progress):
    agent = bed.agent(progress_thread=progress)
    source, target = agent.buffer(MIB, seed=3), agent.buffer(MIB)
    agent.transfer("WRITE", [source[:]], [target[:]], agent, b"to myself")
    agent.receives(b"to myself", sender=agent)
    target.check(3)
    agent.call("send", agent.name, b"a word")
    agent.receives(b"a word", sender=agent)
