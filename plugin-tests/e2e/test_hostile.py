"""Control messages that no honest peer sends: logged and dropped, whatever they say."""

import random
import struct
import subprocess

import pytest

from bed.places import TARGET, Host
from bed.raw import RawReceiver, blob, endpoint_name, field

pytestmark = pytest.mark.tcp
MIB = 1 << 20
FAILURE, NOTIFICATION, TRANSFER, HANDSHAKE = 1, 2, 4, 8
CONTROL_2 = 11
FRAGMENT_2, STAGING_2 = 1, 2
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
        for kind in (TRANSFER, FAILURE):
            for body in (b"", b"123", b"\xff" * 4, bytes(8000)):
                yield immediate(kind, index, 0xFFFF), body
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
    dropped = [line for line in victim.log_text().splitlines() if "WARN" in line and "dropped what a peer sent: " in line]
    assert [any(why in line for line in dropped) for why in ("fragment of 5 bytes is cut short", "`-1` rails")] == [True, True], dropped


class Impostor:
    """A peer that the victim speaks version 2 with, and that is no agent: what it says reaches the victim's real receiver."""

    def __init__(self, bed, victim):
        self.bed, self.victim, self.session = bed, victim, 0x5E55_1014
        self.raw = RawReceiver(bed.network.space(0), victim.host.libfabric)
        model = bed.agent("impostor", progress_thread=True)
        self.name = model.name
        metadata = model.call("metadata")
        victim.call("add_remote", metadata.replace(endpoint_name(metadata), self.raw.name[:16]))
        ((_, _, hello),) = self.raw.events(1)
        (self.index,) = struct.unpack_from("<H", hello, hello.index(b"idx") + 3 + 8)
        (theirs,) = struct.unpack_from("<Q", hello, hello.index(b"nlf_hs") + 6 + 8 + 4)
        extension = field(b"nlf_hs", struct.pack("<HHQQ", 1, 0, self.session, theirs))
        throw(bed, victim, [(immediate(HANDSHAKE), handshake(7, self.name.encode()) + extension)])

    def say(self, *bodies):
        messages = [(CONTROL_2 | self.index << 4, control(kind, self.session, body)) for kind, body in bodies]
        assert throw(self.bed, self.victim, messages) == len(messages)

    def close(self):
        self.raw.close()


def piece(number, total, offset, payload):
    return FRAGMENT_2, struct.pack("<QII", number, total, offset) + payload


def staging(what, body):
    return STAGING_2, struct.pack("<B3x", what) + body


EDGES_64 = (0, 1, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)
PIECES = [
    piece(number, total, offset, payload)
    for number in EDGES_64 for total in (0, 1, 8000, 1 << 31, ALL_ONES) for offset in (0, 1, 7999, ALL_ONES) for payload in (b"", b"x", bytes(8000))
    # All but whole ones, which are notifications whatever their number.
    if total != len(payload) or offset or not number
]
REGION = blob(field(b"key_0", b"\xff" * 8), field(b"addr", b"\xff" * 8))
STAGING = [
    *[staging(what, body) for what in (0, 1, 6, 255) for body in (b"", bytes(4), b"\xff" * 4000)],
    *[staging(2, struct.pack("<IH", size, slots) + region) for size in (0, 1, 4095, 4096, ALL_ONES) for slots in (0, 1, 0xFFFF) for region in (b"", REGION)],
    *[staging(3, struct.pack("<QQIHB", ticket, address, size, slot, into))
      for ticket in (0, EDGES_64[-1]) for address in EDGES_64 for size in (0, 1, ALL_ONES) for slot in (0, 0xFFFF) for into in (0, 1, 255)],
    *[staging(4, struct.pack("<Q", ticket) + text) for ticket in EDGES_64 for text in (b"", b"\xff\0 not text", bytes(8000))],
    *[staging(5, struct.pack("<QHBx", ticket, slot, 1) + struct.pack("<QI", address, size) * count)
      for ticket in (0, EDGES_64[-1]) for slot in (0, 0xFFFF) for address in EDGES_64 for size in (0, 1, ALL_ONES) for count in (0, 1, 64, 65, 600)],
    *[staging(what, bytes(size)) for what in (2, 3, 4, 5) for size in (0, 1, 5, 22)],
]


@pytest.mark.ours
@pytest.mark.parametrize("staged", [False, True], ids=["plain", "staged"])
def test_a_peer_that_says_impossible_things(bed, progress, staged):
    first, second = bed.pair(progress_thread=progress, vram_staging=staged)
    impostor = Impostor(bed, second)
    try:
        impostor.say(piece(1, 6, 0, b"before"))
        assert second.call("receive", 1, 30) == [(impostor.name, b"before")]
        for bodies in (PIECES, STAGING):
            impostor.say(*bodies)
            second.call("receive", 1000, 0.5)
            assert "dropped what a peer sent: " in second.log_text()
        # It is still listened to, and so is everybody else.
        impostor.say(piece(77, 10, 4, b" after"), piece(77, 10, 0, b"soon"))
        assert second.call("receive", 1, 30) == [(impostor.name, b"soon after")]
    finally:
        impostor.close()
    source, target = first.buffer(MIB, seed=1), second.buffer(MIB)
    first.knows(second)
    first.transfer("WRITE", [source[:]], [target[:]], second, b"whole")
    second.receives(b"whole", sender=first)
    target.check(1)
