"""Peers that stop, die, go and come back. None of them may hold up a call, or harm a transfer to somebody else."""

import time

import pytest

from bed.agent import Refused

MIB = 1 << 20
# Ours is told to give up on a peer after this; the stock plugin waits for 60 s and cannot be told.
CONNECT_TIMEOUT_MS = 2000
# No single call may take longer, on however busy a machine.
CALL_LIMIT_S = 12
# A dead peer must be reported within this.
VERDICT_LIMIT_S = 15
# A dead peer whose address refuses connections, with connect_timeout_ms at its default of 30 s.
DEAD_LIMIT_S = 10
# A peer that stands still for so long is not reported.
STILL_S = 4


def options(host):
    return {"connect_timeout_ms": CONNECT_TIMEOUT_MS} if host.plugin == "ours" else {}


def attempt(agent, command, *arguments):
    """Calls, within the limit; returns the answer, or what the agent's call raised."""
    try:
        return agent.call(command, *arguments, deadline=CALL_LIMIT_S)
    except Refused as refused:
        return refused


class Triangle:
    """Agent `a` with a healthy peer `c` and a peer `b` that something will happen to."""

    def __init__(self, bed, host, progress, acquainted):
        self.a, self.b, self.c = (bed.agent(name, progress_thread=progress, **options(host)) for name in "abc")
        self.source = self.a.buffer(MIB, seed=1)
        self.for_b = self.a.buffer(8 * MIB, seed=99)
        self.to_b, self.to_c = self.b.buffer(8 * MIB), self.c.buffer(MIB)
        self.b_metadata = self.b.call("metadata")
        self.a.knows(self.c), self.c.knows(self.a)
        self.turn = 0
        self.healthy(1)
        if acquainted:
            self.a.knows(self.b), self.b.knows(self.a)
            self.a.transfer("WRITE", [self.for_b[:MIB]], [self.to_b[:MIB]], self.b, b"hello")
            self.b.receives(b"hello", sender=self.a)

    def healthy(self, count=20):
        """Transfers to the healthy peer are DONE, whole and notified."""
        for _ in range(count):
            self.turn += 1
            self.source.fill(self.turn)
            message = b"%d" % self.turn
            self.a.transfer("WRITE", [self.source[:]], [self.to_c[:]], self.c, message, deadline=CALL_LIMIT_S)
            self.c.receives(message, sender=self.a)
            self.to_c.check(self.turn)


def approach(triangle):
    """Everything one does with a peer. Returns the request towards it, or None where it was refused on the way."""
    a, b = triangle.a, triangle.b
    attempt(a, "add_remote", triangle.b_metadata)
    attempt(a, "make_connection", b.name)
    attempt(a, "send", b.name, b"are you there?")
    attempt(a, "send", b.name, b"?" * 100_000)
    handle = attempt(a, "prepare", "WRITE", [triangle.for_b[:]], [triangle.to_b[:]], b.name, b"done")
    if isinstance(handle, Refused):
        return None
    return handle if not isinstance(attempt(a, "post", handle, b"done"), Refused) else None


def ends(agent, handle, limit):
    """What the request ends with: a state, or the error's text; PROC when it has not ended in time."""
    try:
        return agent.call("wait", handle, limit, deadline=limit + CALL_LIMIT_S)
    except Refused as refused:
        return str(refused)


def verdict(triangle, handle):
    """What the request ends with: a state, or the error's text; PROC when it has not ended in time."""
    deadline = time.monotonic() + VERDICT_LIMIT_S
    while time.monotonic() < deadline:
        state = attempt(triangle.a, "state", handle)
        if state != "PROC":
            return str(state)
        triangle.healthy(1)
    return "PROC"


@pytest.mark.stock_fails("a peer that does not answer freezes the whole agent")
@pytest.mark.parametrize("acquainted", [False, True], ids=["never-met", "connected"])
def test_stopped_peer(bed, host, progress, acquainted):
    """A peer that stands still (SIGSTOP) delays nobody; when it goes on, so do its transfers."""
    triangle = Triangle(bed, host, progress, acquainted)
    triangle.b.stop()
    handle = approach(triangle)
    triangle.healthy()
    if acquainted:
        assert handle is not None, "the post to a connected peer was refused"
    if handle is not None:
        attempt(triangle.a, "state", handle)
        triangle.healthy(5)
    triangle.b.resume()
    if acquainted:
        # It only stood still: nothing was lost.
        assert triangle.a.call("wait", handle, 30, deadline=60) == "DONE"
        triangle.b.receives(b"are you there?", b"?" * 100_000, b"done", sender=triangle.a)
        triangle.to_b.check(99)
    triangle.healthy(2)


@pytest.mark.stock_fails("a dead peer freezes the whole agent, or fails other peers' transfers")
@pytest.mark.parametrize("acquainted", [False, True], ids=["never-met", "connected"])
def test_killed_peer(bed, host, progress, acquainted):
    """A peer that died is reported as disconnected, and only to those who ask for it."""
    triangle = Triangle(bed, host, progress, acquainted)
    triangle.b.kill()
    handle = approach(triangle)
    triangle.healthy()
    if handle is not None:
        assert "DISCONNECT" in verdict(triangle, handle).upper()
        attempt(triangle.a, "release", handle)
    attempt(triangle.a, "remove_remote", triangle.b.name)
    triangle.healthy(2)


@pytest.mark.stock_fails("a dead peer fails other peers' transfers")
def test_killed_in_mid_transfer(bed, host, progress):
    """SIGKILL with 256 MiB under way, and a transfer to the healthy peer beside it."""
    size = 256 * MIB
    triangle = Triangle(bed, host, progress, acquainted=True)
    source, target = triangle.a.buffer(size, seed=7), triangle.b.buffer(size)
    triangle.a.knows(triangle.b)
    handle = triangle.a.prepare("WRITE", [source[:]], [target[:]], triangle.b, b"never")
    triangle.a.call("post", handle, b"never")
    triangle.b.kill()
    assert "DISCONNECT" in verdict(triangle, handle).upper()
    attempt(triangle.a, "release", handle)
    triangle.healthy()


@pytest.mark.stock_fails("without a progress thread a dead peer fails other peers' transfers")
def test_killed_sender_leaves_nothing_behind(bed, host, progress):
    """The receiver of a dead sender goes on serving others, and takes the sender's next life for a new peer."""
    triangle = Triangle(bed, host, progress, acquainted=True)
    size = 64 * MIB
    source, target = triangle.b.buffer(size, seed=7), triangle.a.buffer(size)
    triangle.b.knows(triangle.a)
    triangle.b.call("post", triangle.b.prepare("WRITE", [source[:]], [target[:]], triangle.a, b"never"))
    triangle.b.kill()
    triangle.healthy()
    attempt(triangle.a, "remove_remote", triangle.b.name)
    again = bed.process("b")
    again.name = triangle.b.name
    again.create(progress_thread=progress, **options(host))
    triangle.a.knows(again), again.knows(triangle.a)
    source = again.buffer(MIB, seed=8)
    again.transfer("WRITE", [source[:]], [target[:MIB]], triangle.a, b"new life")
    assert (again.name, b"new life") in triangle.a.call("receive", 2, 5)


@pytest.mark.stock_fails("a peer that was removed and added again answers no more")
@pytest.mark.parametrize("who", ["sender", "receiver", "both"])
def test_removed_and_added_again(bed, host, progress, who):
    """One side forgets the other, which knows nothing of it, and meets it again: both directions work at once."""
    first, second = bed.pair(progress_thread=progress, **options(host))
    near, far = first.buffer(MIB, seed=1), second.buffer(MIB)
    first.knows(second), second.knows(first)
    for turn in range(10):
        near.fill(turn)
        first.transfer("WRITE", [near[:]], [far[:]], second, b"there", deadline=CALL_LIMIT_S)
        second.receives(b"there", sender=first)
        far.check(turn)
        second.transfer("READ", [far[:]], [near[:]], first, b"back", deadline=CALL_LIMIT_S)
        first.receives(b"back", sender=second)
        for one, other in ((first, second), (second, first)):
            if who in ("both", "sender" if one is first else "receiver"):
                one.call("remove_remote", other.name)
                one.knows(other)


def reconnect(worker, peer, metadata, count):
    for _ in range(count):
        worker.remove_remote(peer)
        worker.add_remote(metadata)


@pytest.mark.stock_fails("an agent has 256 connections in its life")
def test_two_thousand_reconnects(bed, progress):
    first, second = bed.pair(progress_thread=progress)
    source, target = first.buffer(MIB, seed=1), second.buffer(MIB)
    metadata = second.call("metadata")
    first.call("add_remote", metadata)
    for turn in range(20):
        first.run(reconnect, second.name, metadata, 100, deadline=60)
        source.fill(turn)
        first.transfer("WRITE", [source[:]], [target[:]], second, b"%d" % turn)
        second.receives(b"%d" % turn, sender=first)
        target.check(turn)


def test_new_lives_of_one_name(bed, host, progress):
    """A peer that ends and starts again under its name, again and again, while another one stays."""
    triangle = Triangle(bed, host, progress, acquainted=True)
    name = triangle.b.name
    for turn in range(5):
        (triangle.b.kill if turn % 2 else triangle.b.close)()
        triangle.a.call("remove_remote", name)
        triangle.b = bed.process("b")
        triangle.b.name = name
        triangle.b.create(progress_thread=progress, **options(host))
        triangle.to_b = triangle.b.buffer(8 * MIB)
        triangle.a.knows(triangle.b), triangle.b.knows(triangle.a)
        triangle.for_b.fill(50 + turn)
        triangle.a.transfer("WRITE", [triangle.for_b[:]], [triangle.to_b[:]], triangle.b, b"again")
        triangle.b.receives(b"again", sender=triangle.a)
        triangle.to_b.check(50 + turn)
        triangle.healthy(2)


@pytest.mark.ours
@pytest.mark.tcp
@pytest.mark.parametrize("acquainted", [False, True], ids=["never-met", "connected"])
def test_idle_peer_that_died(bed, host, progress, acquainted):
    """Nothing is under way when it dies. Its address refuses connections, so nobody waits for connect_timeout_ms (30 s)."""
    near, far = bed.pair(progress_thread=progress) if acquainted else (bed.agent("near", progress_thread=progress), bed.agent("far"))
    source, target = near.buffer(MIB, seed=1), far.buffer(MIB)
    near.knows(far)
    if acquainted:
        near.transfer("WRITE", [source[:]], [target[:]], far, b"hello")
    far.kill()
    try:
        handle = near.prepare("WRITE", [source[:]], [target[:]], far)
        near.call("post", handle)
        verdict = ends(near, handle, DEAD_LIMIT_S)
    except Refused as refused:
        verdict = str(refused)
    assert "DISCONNECT" in verdict.upper()


@pytest.mark.ours
@pytest.mark.tcp
def test_stopped_peer_is_no_dead_one(bed, host, progress):
    """The connection has to be made while the peer stands still: its kernel accepts, so nothing is reported; then it goes on."""
    near, far = (bed.agent(name, progress_thread=progress) for name in ("near", "far"))
    source, target = near.buffer(MIB, seed=1), far.buffer(MIB)
    near.knows(far), far.knows(near)
    far.stop()
    handle = near.prepare("WRITE", [source[:]], [target[:]], far, b"there")
    near.call("post", handle, b"there")
    assert ends(near, handle, STILL_S) == "PROC"
    far.resume()
    assert ends(near, handle, 30) == "DONE"
    far.receives(b"there", sender=near)
    target.check(1)
