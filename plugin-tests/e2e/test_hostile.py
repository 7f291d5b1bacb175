"""Control messages that no honest peer sends: logged and dropped, whatever they say."""

import random
import struct
import subprocess

import pytest

from bed.places import TARGET, Host
from bed.raw import blob, endpoint_name, field

pytestmark = pytest.mark.tcp
MIB = 1 << 20
NOTIFICATION, TRANSFER, HANDSHAKE = 2, 4, 8
CONTROL_2, TRANSFER_2 = 11, 13
ALL_ONES = 0xFFFF_FFFF


def handshake(index=1, name=b"nobody", connection=None):
    tail = [field(b"conn", connection)] if connection is not None else []
    return blob(
        field(b"idx", struct.pack("<H", index)), field(b"name", name),
        field(b"has_conn", bytes([connection is not None])), *tail,
    )


def connection_info(rails):
    return blob(field(b"num_rails", rails), field(b"dest_data_ep_0", bytes(56)))


def fragment(transfer=0, index=0, count=1, size=0, total=0, expected=0, name=0, payload=b""):
    return struct.pack("<HHHIIIH", transfer, index, count, size, total, expected, name) + payload


def control(kind, session, body):
    return struct.pack("<B3xQ", kind, session) + body


def immediate(kind, index=0, transfer=0):
    return kind | (index & 0xFF) << 4 | (transfer & 0xFFFF) << 12


NOTIFICATIONS = [
    b"", b"\0", b"12345", bytes(9), bytes(10), bytes(19),
    fragment(count=0), fragment(count=0xFFFF), fragment(index=7, count=3), fragment(index=0xFFFF, count=0xFFFF),
    fragment(size=ALL_ONES, total=ALL_ONES), fragment(size=5, total=5, payload=b"abc"), fragment(size=3, total=1 << 31, payload=b"abc"),
    fragment(size=3, total=3, name=0xFFFF, payload=b"abc"), fragment(size=3, total=2, payload=b"abc"),
    fragment(size=3, total=3, name=3, payload=b"who"), fragment(expected=ALL_ONES, size=3, total=3, name=3, payload=b"who"),
    fragment(count=2, size=3, total=6, payload=b"abc"), fragment(count=9, size=3, total=6, payload=b"abc"),
    fragment(size=8000, total=8000, payload=bytes(8000)),
]
HANDSHAKES = [
    b"", b"nixlSerDes|", b"nixlSerDes", blob(b"idx"), blob(b"idx" + struct.pack("<Q", 1 << 63)), blob(b"idx" + b"\xff" * 8),
    blob(field(b"idx", b"")), blob(field(b"idx", b"1234567")), handshake(name=b""), handshake(name=b"x" * 7000), handshake(name=b"\xff\0|"),
    handshake(index=0xFFFF), handshake(connection=b""), handshake(connection=b"nixlSerDes|"),
    *[handshake(connection=connection_info(rails)) for rails in (b"", b"0", b"-1", b"1e9", b"100000000000000", b"2", b"rails", b"1" * 3000)],
    handshake(name=b"stranger", connection=connection_info(b"1")),
]
CONTROLS = [
    b"", b"\1", bytes(11), bytes(12), control(0, 0, b""), control(255, ALL_ONES, bytes(100)),
    *[control(kind, session, bytes(size)) for kind in (1, 2, 3, 4) for session in (0, 1, (1 << 64) - 1) for size in (0, 1, 27, 28, 8000)],
    control(1, 1, struct.pack("<QII", 0, 10, 0) + b"no number"),
    control(1, 1, struct.pack("<QII", (1 << 64) - 1, ALL_ONES, ALL_ONES) + b"far out"),
]


def scripted():
    for index in (0, 1, 2, 255):
        for kind, bodies in ((NOTIFICATION, NOTIFICATIONS), (HANDSHAKE, HANDSHAKES), (CONTROL_2, CONTROLS)):
            for body in bodies:
                yield immediate(kind, index), body
        for kind in (TRANSFER, TRANSFER_2):
            yield immediate(kind, index, 0xFFFF), b""
    for kind in range(16):
        yield immediate(kind, 3, 77), b"a kind of message"
    yield ALL_ONES, b"?"
    # A notification of many pieces that all say something different.
    for index in range(10):
        yield immediate(NOTIFICATION, 1, 9), fragment(transfer=9, index=index, count=10 + index, size=3, total=30 - index, payload=b"abc")


def garbage(seed):
    dice = random.Random(seed)
    for _ in range(400):
        body = bytearray(dice.choice(NOTIFICATIONS + HANDSHAKES + CONTROLS) or b"\0")
        for _ in range(dice.randrange(1, 6)):
            body[dice.randrange(len(body))] = dice.randrange(256)
        yield immediate(dice.choice([NOTIFICATION, HANDSHAKE, CONTROL_2, dice.randrange(16)]), dice.randrange(4)), bytes(body)


def throw(bed, victim, messages):
    """Sends the messages from a process that is no agent; returns how many the victim's endpoint took."""
    address = endpoint_name(victim.call("metadata")).hex()
    lines = "".join(f"{address} {data:x} {body.hex() or '-'}\n" for data, body in messages)
    done = subprocess.run(
        [*bed.network.space(0).enter(), TARGET / "sender" / "raw_sender"], input=lines, text=True, capture_output=True,
        env=Host(libfabric=victim.host.libfabric).environment(), timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.stock_fails("malformed control messages crash the process")
@pytest.mark.ucx_fails("has no such messages")
@pytest.mark.parametrize("messages", [scripted, lambda: garbage(1), lambda: garbage(2)], ids=["scripted", "garbage-1", "garbage-2"])
def test_malformed_messages(bed, progress, messages):
    messages = list(messages())
    first, second = bed.pair(progress_thread=progress)
    source, target = first.buffer(MIB, seed=1), second.buffer(MIB)
    first.knows(second)
    first.transfer("WRITE", [source[:]], [target[:]], second, b"before")
    second.receives(b"before", sender=first)

    assert throw(bed, second, messages) == len(messages)
    # Small pieces can make a well-formed notification from nobody; nothing may claim to come from a peer that sent nothing.
    strange = [sender for sender, _ in second.call("receive", 1000, 0.5)]
    assert first.name not in strange

    source.fill(2)
    first.transfer("WRITE", [source[:]], [target[:]], second, b"after")
    second.receives(b"after", sender=first)
    target.check(2)


@pytest.mark.stock_fails("malformed control messages crash the process")
@pytest.mark.ucx_fails("has no such messages")
@pytest.mark.parametrize("connection", [None, connection_info(b"1")], ids=["bare", "with-address"])
def test_forged_handshake(bed, progress, connection):
    """A handshake in the name of a known peer, from somebody else, does not cut that peer off."""
    first, second = bed.pair(progress_thread=progress)
    source, target = first.buffer(MIB, seed=1), second.buffer(MIB)
    first.knows(second), second.knows(first)
    first.transfer("WRITE", [source[:]], [target[:]], second, b"before")
    second.receives(b"before", sender=first)
    forged = [(immediate(HANDSHAKE), handshake(index, first.name.encode(), connection)) for index in (0, 1, 2, 200)]
    assert throw(bed, second, forged) == len(forged)
    first.transfer("WRITE", [source[:]], [target[:]], second, b"after")
    second.receives(b"after", sender=first, deadline=10)
    second.transfer("READ", [target[:]], [source[:]], first, b"back")
    first.receives(b"back", sender=second, deadline=10)


@pytest.mark.ours
def test_dropped_messages_are_logged(bed):
    victim = bed.agent("victim", progress_thread=True)
    throw(bed, victim, [(immediate(NOTIFICATION, 1), b"12345"), (immediate(HANDSHAKE), handshake(connection=connection_info(b"-1")))])
    victim.call("receive", 1, 1)
    assert "WARN" in victim.log_text()
