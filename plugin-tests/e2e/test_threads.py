"""Several threads of one program on one agent, in the sync modes that allow it."""

import threading

import pytest

MIB = 1 << 20


def work(worker, peer, jobs, rounds):
    """Each thread has (operation, local, remote) of its own and posts it `rounds` times; returns what went wrong."""
    failures = []

    def repeat(number, operation, local, remote):
        try:
            handle = worker.prepare(operation, [local], [remote], peer)
            for turn in range(rounds):
                worker.post(handle, b"%d:%d" % (number, turn))
                if (state := worker.wait(handle, 60)) != "DONE":
                    raise RuntimeError(f"round {turn}: {state}")
                worker.send(peer, b"word %d:%d" % (number, turn))
            worker.release(handle)
        except Exception as error:
            failures.append(f"thread {number}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=repeat, args=(number, *job)) for number, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


@pytest.mark.parametrize("sync_mode", ["strict", "rw"])
def test_transfers_from_four_threads(bed, progress, sync_mode):
    """Writes, reads and messages of four threads: every byte and every notification."""
    rounds, size = 25, 3 * MIB
    first = bed.agent("first", progress_thread=progress, sync_mode=sync_mode)
    second = bed.agent("second", progress_thread=progress, sync_mode=sync_mode)
    first.knows(second), second.knows(first)
    operations = ["WRITE", "READ", "WRITE", "READ"]
    near = [first.buffer(size, seed=number if operation == "WRITE" else None) for number, operation in enumerate(operations)]
    far = [second.buffer(size, seed=number if operation == "READ" else None) for number, operation in enumerate(operations)]
    first.knows(second)
    jobs = [(operation, near[number][:], far[number][:]) for number, operation in enumerate(operations)]
    assert first.run(work, second.name, jobs, rounds, deadline=120) == []
    expected = [text % (number, turn) for text in (b"%d:%d", b"word %d:%d") for number in range(4) for turn in range(rounds)]
    second.receives(*expected, sender=first)
    for number, operation in enumerate(operations):
        (far if operation == "WRITE" else near)[number].check(number)


@pytest.mark.parametrize("sync_mode", ["none", "strict", "rw"])
def test_each_sync_mode(bed, progress, sync_mode):
    first, second = (bed.agent(name, progress_thread=progress, sync_mode=sync_mode) for name in ("first", "second"))
    first.knows(second), second.knows(first)
    source, target = first.buffer(MIB, seed=1), second.buffer(MIB)
    first.knows(second)
    first.transfer("WRITE", [source[:]], [target[:]], second, b"w")
    second.receives(b"w", sender=first)
    target.check(1)
