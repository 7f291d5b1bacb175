"""Agents of one host: their host memory is reached without a network, where the kernel lets both, and nowhere else."""

import pytest

pytestmark = pytest.mark.ours
MIB = 1 << 20


@pytest.mark.parametrize("operation", ["WRITE", "READ"])
@pytest.mark.parametrize("size", [1, 5000, 256 * MIB], ids=["1B", "5000B", "256MiB"])
def test_done_means_done(bed, progress, operation, size):
    first, second = bed.pair(progress_thread=progress, same_host="auto")
    near, far = first.buffer(size, seed=1), second.buffer(size, seed=2)
    first.knows(second)
    first.transfer(operation, [near[:]], [far[:]], second, b"done")
    second.receives(b"done", sender=first)
    near.check(1 if operation == "WRITE" else 2)
    far.check(1 if operation == "WRITE" else 2)
    assert "is on this host" in first.log_text()
