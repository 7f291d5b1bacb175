"""Processes that are no agents: one throws bytes at an agent, the other shows the bytes that an agent sends it."""

import queue
import struct
import subprocess
import threading
import time

from bed.places import TARGET, Host


def field(tag, value):
    return tag + struct.pack("<Q", len(value)) + value + b"|"


def blob(*fields):
    return b"nixlSerDes|" + b"".join(fields)


def nested(outer, first, last):
    """The blob inside NIXL's agent metadata whose first and last fields have these tags."""
    at = outer.index(blob(first))
    end = outer.index(last, at) + len(last)
    (size,) = struct.unpack_from("<Q", outer, end)
    return outer[at : end + 8 + size + 1]


def endpoint_name(metadata):
    """The address of rail 0 out of an agent's metadata: a sockaddr_in, without its padding."""
    at = metadata.index(b"dest_data_ep_0") + len(b"dest_data_ep_0")
    (size,) = struct.unpack_from("<Q", metadata, at)
    return metadata[at + 8 : at + 8 + size][:16]


class RawReceiver:
    """Prints what comes in: see raw_receiver.c."""

    def __init__(self, space, libfabric):
        self.process = subprocess.Popen(
            [*space.enter(), TARGET / "receiver" / "raw_receiver"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=Host(libfabric=libfabric).environment(),
        )
        _, name, key, address = self.process.stdout.readline().split()
        self.name, self.key, self.address = bytes.fromhex(name), int(key, 16), int(address, 16)
        self.lines = queue.Queue()
        threading.Thread(target=lambda: [self.lines.put(line.split()) for line in self.process.stdout], daemon=True).start()

    def events(self, count, seconds=10):
        """The next `count` events: ("message", immediate, bytes) or ("write", immediate, b"")."""
        deadline, found = time.monotonic() + seconds, []
        while len(found) < count:
            kind, immediate, *payload = self.lines.get(timeout=max(0.0, deadline - time.monotonic()))
            found.append((kind, int(immediate, 16), bytes.fromhex("".join(payload))))
        return found

    def close(self):
        self.process.stdin.close()
        self.process.wait(10)
