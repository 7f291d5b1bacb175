"""Bytes: every one arrives where it belongs, and none anywhere else."""

import random

import pytest

MIB = 1 << 20
SIZES = [1, 7, 4096, 65_537, MIB, 16 * MIB + 3, 64 * MIB]
# The most that one list of a random transfer may span.
RANDOM_SPAN = 24 * MIB
DONE_EARLY = "an un-notified WRITE is DONE before its bytes are there"


def move(operation, near, far, source, target, placed, notification=b""):
    """Moves `placed`, a list of (target offset, source offset, length), by a WRITE or a READ of agent `near`."""
    there = [target[offset : offset + length] for offset, _, length in placed]
    here = [source[start : start + length] for _, start, length in placed]
    if operation == "WRITE":
        near.transfer("WRITE", here, there, far, notification)
    else:
        near.transfer("READ", there, here, far, notification)


def buffers(operation, near, far, source_size, target_size):
    """Source and target of a transfer that `near` starts: it reads from `far`, or writes to it."""
    giver, taker = (near, far) if operation == "WRITE" else (far, near)
    source = giver.buffer(source_size, seed=source_size)
    target = taker.buffer(target_size)
    # Registered after the pair met: both must know the new regions.
    near.knows(far)
    return source, target


@pytest.mark.stock_fails(DONE_EARLY)
@pytest.mark.parametrize("operation", ["WRITE", "READ"])
@pytest.mark.parametrize("notify", [False, True], ids=["silent", "notified"])
def test_sizes(bed, progress, operation, notify):
    near, far = bed.pair(progress_thread=progress)
    for size in SIZES:
        source, target = buffers(operation, near, far, size, size + 64)
        message = f"{size} bytes".encode() if notify else b""
        move(operation, near, far, source, target, [(32, 0, size)], message)
        if notify:
            far.receives(message, sender=near)
        target.check(source.size, [(32, 0, size)])


def scattered(random, count):
    """`count` places of random length, out of order on both sides, without overlap in the target."""
    lengths = [random.choice([1, 13, 100, 4096, 4097, 65_536, 300_001]) for _ in range(count)]
    offsets, end = [], 0
    for length in lengths:
        end += random.randrange(0, 3000)
        offsets.append(end)
        end += length
    placed = [(offset, random.randrange(0, RANDOM_SPAN - length), length) for offset, length in zip(offsets, lengths)]
    random.shuffle(placed)
    return placed, end


@pytest.mark.parametrize("operation", ["WRITE", "READ"])
@pytest.mark.parametrize("seed", range(3))
def test_random_lists(bed, progress, operation, seed):
    near, far = bed.pair(progress_thread=progress)
    placed, end = scattered(random.Random(seed), 200)
    source, target = buffers(operation, near, far, RANDOM_SPAN, end)
    move(operation, near, far, source, target, placed, b"scattered")
    far.receives(b"scattered", sender=near)
    target.check(source.size, placed)


@pytest.mark.parametrize("operation", ["WRITE", "READ"])
def test_many_small_descriptors(bed, progress, operation):
    """4096 blocks of 16 KiB in reverse order: the shape of a KV cache."""
    near, far = bed.pair(progress_thread=progress)
    count, block = 4096, 16 << 10
    source, target = buffers(operation, near, far, count * block, count * block)
    placed = [(index * block, (count - 1 - index) * block, block) for index in range(count)]
    move(operation, near, far, source, target, placed, b"blocks")
    far.receives(b"blocks", sender=near)
    target.check(source.size, placed)


def test_both_directions_at_once(bed, progress):
    size = 8 * MIB
    first, second = bed.pair(progress_thread=progress)
    pairs = []
    for near, far in ((first, second), (second, first)):
        pairs.append((near, far, near.buffer(size, seed=1), far.buffer(size)))
    first.knows(second)
    second.knows(first)
    handles = [(near, near.prepare("WRITE", [source[:]], [target[:]], far)) for near, far, source, target in pairs]
    for near, handle in handles:
        near.call("post", handle)
    for near, handle in handles:
        near.begin("wait", handle, 60)
    assert [near.finish(90) for near, _ in handles] == ["DONE", "DONE"]
    for *_, target in pairs:
        target.check(1)


def test_repost_with_another_notification(bed, progress):
    """A request is posted again and again: each post carries the notification it was given."""
    first, second = bed.pair(progress_thread=progress)
    source, target = first.buffer(70_000, seed=1), second.buffer(70_000)
    first.knows(second)
    handle = first.prepare("WRITE", [source[:]], [target[:]], second, b"one")
    # NIXL's core hands the last notification on when a post brings none.
    for turn, (given, expected) in enumerate([(b"", b"one"), (b"two", b"two"), (b"", b"two"), (b"3" * 20_000,) * 2]):
        source.fill(100 + turn)
        first.call("post", handle, given)
        assert first.call("wait", handle, 30) == "DONE"
        second.receives(expected, sender=first)
        target.check(100 + turn)
    first.call("release", handle)


@pytest.mark.stock_fails(DONE_EARLY)
def test_repost_turns_notified(bed, progress):
    """A request made without a notification stays silent until a post brings one."""
    first, second = bed.pair(progress_thread=progress)
    source, target = first.buffer(70_000, seed=1), second.buffer(70_000)
    first.knows(second)
    handle = first.prepare("WRITE", [source[:]], [target[:]], second)
    for turn, message in enumerate([b"", b"", b"now"]):
        source.fill(100 + turn)
        first.call("post", handle, message)
        assert first.call("wait", handle, 30) == "DONE"
        target.check(100 + turn)
    second.receives(b"now", sender=first)
    first.call("release", handle)


def test_many_transfers_in_flight(bed, progress):
    first, second = bed.pair(progress_thread=progress)
    count, size = 64, 100_000
    source, target = first.buffer(count * size, seed=9), second.buffer(count * size)
    first.knows(second)
    messages = [f"part {index}".encode() for index in range(count)]
    handles = []
    for index, message in enumerate(messages):
        part = slice(index * size, (index + 1) * size)
        handles.append(first.prepare("WRITE", [source[part]], [target[part]], second, message))
    for handle, message in zip(handles, messages):
        first.call("post", handle, message)
    assert {first.call("wait", handle, 30) for handle in handles} == {"DONE"}
    second.receives(*messages, sender=first)
    target.check(9)
