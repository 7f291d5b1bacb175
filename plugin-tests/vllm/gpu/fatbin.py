"""Blanks the GPU code of a shared library that one GPU does not run, so that the library compresses to a fraction.

    fatbin.py <library> [<architecture> ...]        such as 90; none: all of its code

The file keeps its size, its sections and every entry's header: the CUDA runtime picks an entry by its header, and code of other
architectures is never looked at. NVIDIA's nvprune does the same to archives and relocatable objects only. The format is not
documented; what is read here is what nvcc 11 to 13 writes, and what does not look like it is an error.
"""

import struct
import sys
from pathlib import Path

SECTION = b".nv_fatbin"
# A container: magic, version, size of this header, size of what follows.
CONTAINER = struct.Struct("<IHHQ")
MAGIC = 0xBA55ED50
# An entry: kind, version, size of this header, size of the code that follows; then, at 28, the architecture.
ENTRY = struct.Struct("<HHIQ")
ARCHITECTURE = struct.Struct("<I")
ARCHITECTURE_AT = 28
KINDS = {1: "PTX", 2: "machine code"}
CONTAINER_ALIGNMENT = 8


class Unknown(Exception):
    """It is not the format that this knows."""


def section(image):
    """Where the library's GPU code begins and ends, of an ELF file for 64 bits; None if it has none."""
    if image[:6] != b"\x7fELF\x02\x01":
        raise Unknown("not a little-endian ELF file for 64 bits")
    (table,) = struct.unpack_from("<Q", image, 0x28)
    size, count, names = struct.unpack_from("<HHH", image, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", image, table + index * size) for index in range(count)]
    strings = headers[names][4]
    for name, _, _, _, offset, length in headers:
        if image[strings + name:strings + name + len(SECTION) + 1] == SECTION + b"\0":
            return offset, offset + length
    return None


def entries(image):
    """Each entry's kind, architecture, and where its code begins and ends."""
    found = section(image)
    if not found:
        return
    at, end = found
    while at < end:
        magic, version, header, length = CONTAINER.unpack_from(image, at)
        if magic != MAGIC:
            if magic == 0:  # padding between containers
                at += CONTAINER_ALIGNMENT
                continue
            raise Unknown(f"no container at {at:#x}")
        if version != 1 or at + header + length > end:
            raise Unknown(f"a container of version {version} with {length} bytes at {at:#x}")
        entry, last = at + header, at + header + length
        while entry < last:
            kind, _, size, code = ENTRY.unpack_from(image, entry)
            (architecture,) = ARCHITECTURE.unpack_from(image, entry + ARCHITECTURE_AT)
            if kind not in KINDS or entry + size + code > last:
                raise Unknown(f"an entry of kind {kind} with {code} bytes at {entry:#x}")
            yield kind, architecture, entry + size, entry + size + code
            entry += size + code
        at = last


def blank(path, architectures):
    """Bytes of GPU code before and after, of the library at `path`, which is changed in place.

    What the driver would have compiled from PTX of an older architecture goes, too: the caller knows that it is not called.
    """
    image = bytearray(path.read_bytes())
    before = after = 0
    for kind, architecture, start, end in list(entries(image)):
        before += end - start
        if KINDS[kind] == "machine code" and architecture in architectures:
            after += end - start
        else:
            image[start:end] = bytes(end - start)
    path.write_bytes(image)
    return before, after


if __name__ == "__main__":
    print("{} bytes of GPU code, {} left".format(*blank(Path(sys.argv[1]), {int(word) for word in sys.argv[2:]})))
