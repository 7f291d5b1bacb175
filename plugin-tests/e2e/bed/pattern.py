"""Bytes that tell where they belong."""

import numpy as np

# Prime, so that no transfer shifted by a chunk, a page or a descriptor meets the same bytes again.
PERIOD = 1_048_573


def pattern(seed, size):
    """The first `size` bytes of stream `seed`; no byte is zero, so that untouched memory never looks right."""
    block = np.random.default_rng(seed).integers(1, 256, PERIOD, dtype=np.uint8)
    return np.resize(block, size)


def first_difference(found, expected):
    """None when both are equal, else a line that says where and how much they differ."""
    if found.size != expected.size:
        return f"{found.size} bytes instead of {expected.size}"
    wrong = np.flatnonzero(found != expected)
    if wrong.size == 0:
        return None
    at = int(wrong[0])
    return f"{wrong.size} of {found.size} bytes wrong, first at {at}: {found[at]} instead of {expected[at]}"
