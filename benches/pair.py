"""Two agents of one plugin in two processes, and what compare.py measures on them."""

import os
import time
from pathlib import Path

from bed.agent import Agent

import inside

KIB, MIB = 1 << 10, 1 << 20
# Name, blocks, bytes per block.
SHAPES = [
    ("4 KiB", 1, 4 * KIB), ("64 KiB", 1, 64 * KIB), ("1 MiB", 1, MIB), ("16 MiB", 1, 16 * MIB), ("64 MiB", 1, 64 * MIB),
    ("4096 x 16 KiB", 4096, 16 * KIB), ("16384 x 4 KiB", 16384, 4 * KIB),
]
LONG_LISTS = SHAPES[-2:]
OPERATIONS = ("WRITE", "READ")
BUFFER_BYTES = 128 * MIB
SAMPLES_MAX = 200
SAMPLES_MIN = 3
SHAPE_SECONDS = 0.4
PROCESSOR_SECONDS = 0.5
NOTIFIED = 500
NOTIFIED_BYTES = 4 * KIB
IDLE_SECONDS = 2.0
WAKEUPS = 40
# Where a progress thread is on, a receiver that looks all the time would take the core that the thread needs.
RECEIVER_LOOK_S = 0.00002
DEADLINE_S = 60


class Pair:
    """Each agent has one large registered buffer."""

    def __init__(self, host, progress, network, folder):
        self.progress, self.agents = progress, []
        for index, name in enumerate(("near", "far")):
            agent = Agent(name, host, network.space(index), folder / f"{name}.log")
            self.agents.append(agent)
            agent.create(progress_thread=progress)
        self.near, self.far = self.agents
        self.source = self.near.buffer(BUFFER_BYTES, seed=1)
        self.target = self.far.buffer(BUFFER_BYTES, seed=2)
        self.near.knows(self.far), self.far.knows(self.near)
        self.near.transfer("WRITE", [self.source[:8]], [self.target[:8]], self.far, b"met")
        self.far.receives(b"met", sender=self.near)

    def places(self, count, size):
        step = size if count == 1 else 2 * size  # gaps, so that no two blocks can be joined
        return [slice(index * step, index * step + size) for index in range(count)]

    def beside(self, pause, function, *arguments):
        """What the near agent's function returns, and the processor seconds of the far one meanwhile."""
        # Without a progress thread the far side must be driven, as its program would; with one it has nothing to do.
        self.far.begin("run", "inside", "stand_by", (pause,))
        found = self.near.run(function, *arguments, deadline=DEADLINE_S)
        self.far.begin("collect")
        seconds = self.far.finish(DEADLINE_S)
        self.far.finish(DEADLINE_S)
        return found, seconds

    def measure(self, operation, count, size, checked):
        parts = self.places(count, size)
        near, far = ([buffer[part] for part in parts] for buffer in (self.source, self.target))
        if checked:
            self.source.fill(3 if operation == "WRITE" else None)
            self.target.fill(None if operation == "WRITE" else 3)
        samples, _ = self.beside(
            None, inside.time_transfers, operation, near, far, "far", SAMPLES_MIN, SAMPLES_MAX, SHAPE_SECONDS)
        if checked:
            changed = self.target if operation == "WRITE" else self.source
            changed.check(3, [(part.start, part.start, size) for part in parts])
        return samples

    def processor(self, operation, count, size):
        """Processor seconds for each descriptor: near and far."""
        parts = self.places(count, size)
        handle = self.near.prepare(operation, [self.source[part] for part in parts], [self.target[part] for part in parts], self.far)
        (posts, near), far = self.beside(inside.UNHURRIED_S, inside.post_unhurried, handle, PROCESSOR_SECONDS)
        self.near.call("release", handle)
        return near / (posts * count), far / (posts * count)

    def notified(self):
        """Seconds of small WRITEs until DONE, and until the far program has the notification."""
        block = slice(0, NOTIFIED_BYTES)
        self.far.begin("run", "inside", "receive_times", (NOTIFIED, RECEIVER_LOOK_S if self.progress else None, DEADLINE_S))
        done = self.near.run(inside.time_notified, [self.source[block]], [self.target[block]], "far", NOTIFIED, deadline=DEADLINE_S)
        return done, self.far.finish(DEADLINE_S)

    def idle(self):
        """Share of a core that the idle far agent takes, in percent."""
        before = processor_seconds(self.far.process.pid)
        time.sleep(IDLE_SECONDS)
        return 100 * (processor_seconds(self.far.process.pid) - before) / IDLE_SECONDS

    def wakeups(self):
        self.far.begin("run", "inside", "receive_times", (WAKEUPS, RECEIVER_LOOK_S, DEADLINE_S))
        self.near.run(inside.send_times, "far", WAKEUPS, deadline=DEADLINE_S)
        return self.far.finish(DEADLINE_S)

    def close(self):
        for agent in self.agents:
            agent.kill()


def processor_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
