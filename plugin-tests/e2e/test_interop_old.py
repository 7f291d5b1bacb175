"""Agents of NIXL before 1.4, whose LIBFABRIC plugin has no handshake. Ours says so instead of waiting for ever."""

import pytest

from bed.agent import Refused
from bed.places import Host
from test_interop import LIBFABRICS, MIB, arrives

pytestmark = pytest.mark.ours
TIMEOUT_MS = 2000
OLD = ["1.3.2", "1.2.0", "1.1.0", "1.0.0"]


@pytest.fixture
def libfabric():
    return LIBFABRICS[0]


def meet(bed, nixl, progress):
    """Ours and an old stock agent, which know each other's metadata as far as they take it."""
    ours = bed.agent("ours", Host("ours"), progress_thread=progress, connect_timeout_ms=TIMEOUT_MS)
    old = bed.agent("old", Host("stock", nixl), progress_thread=True)
    return ours, old


def wait_for(agent, text, seconds=15):
    """Until the agent's log has the text; asks for notifications meanwhile, as a program does."""
    for _ in range(seconds * 10):
        if text in agent.log_text():
            return True
        agent.call("receive", 1, 0.1)
    return False


@pytest.mark.parametrize("nixl", OLD)
def test_notified_work_fails_with_the_remedy(bed, progress, nixl):
    """What needs the handshake ends with an error that names the versions and what to do; the agent goes on."""
    ours, old = meet(bed, nixl, progress)
    source, target = ours.buffer(MIB, seed=1), old.buffer(MIB)
    ours.knows(old)
    handle = ours.prepare("WRITE", [source[:]], [target[:]], old, b"never")
    with pytest.raises(Refused, match="DISCONNECT"):
        ours.call("post", handle, b"never")
        state = ours.call("wait", handle, 15, deadline=30)
        raise AssertionError(f"the transfer is {state}")
    ours.call("release", handle)
    for words in ("NIXL 1.0 to 1.3", "upgrade it to 1.4 or later", old.name):
        assert words in ours.log_text()
    with pytest.raises(Refused, match="DISCONNECT"):
        ours.call("send", old.name, b"never")

    friend = bed.agent("friend", Host("ours"), progress_thread=progress)
    there = friend.buffer(MIB)
    ours.knows(friend), friend.knows(ours)
    ours.transfer("WRITE", [source[:]], [there[:]], friend, b"whole")
    friend.receives(b"whole", sender=ours)
    there.check(1)


@pytest.mark.parametrize("nixl", OLD[:1] + OLD[-1:])
def test_data_alone_needs_no_handshake(bed, progress, nixl):
    """READ and WRITE without notification work: memory is described alike since 1.0."""
    ours, old = meet(bed, nixl, progress)
    source, target, back = ours.buffer(8 * MIB, seed=1), old.buffer(8 * MIB), ours.buffer(8 * MIB)
    ours.knows(old)
    ours.transfer("WRITE", [source[:]], [target[:]], old)
    arrives(target, 1)
    ours.transfer("READ", [back[:]], [target[:]], old)
    back.check(1)


@pytest.mark.parametrize("nixl", OLD[:1])
def test_what_it_sends_is_not_taken_for_another_peers(bed, progress, nixl):
    """An old agent says its own number for us where a newer one says ours for it, so it seems to be another peer."""
    ours, old = meet(bed, nixl, progress)
    newer = bed.agent("newer", Host("stock"), progress_thread=True)
    ours.knows(newer), newer.knows(ours)
    old.knows(ours), ours.knows(old)
    old.call("send", ours.name, b"from an old one")
    assert wait_for(ours, "an agent of NIXL before 1.4")
    newer.call("send", ours.name, b"from a newer one")
    ours.receives(b"from a newer one", sender=newer)
