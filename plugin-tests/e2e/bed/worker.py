"""The process of one agent: it does what the test tells it over a pipe, and nothing else.

Started by agent.py as `worker.py <fd>`. Every public method of Worker is a command. With `drive` set, an idle worker asks
for notifications all the time, as a program without a progress thread must.
"""

import ctypes
import faulthandler
import importlib
import os
import signal
import sys
import time
import types
from multiprocessing.connection import Connection

import numpy as np

from bed.pattern import first_difference, pattern

IDLE_POLL_S = 0.0005


def load_nixl():
    if "torch" not in sys.modules:
        # NIXL up to 1.3 imports torch, only to ask whether an argument is a tensor.
        try:
            return importlib.import_module("nixl_cu12")
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            sys.modules["torch"] = types.SimpleNamespace(Tensor=type("Tensor", (), {}))
    return importlib.import_module("nixl_cu12")


class Worker:
    def __init__(self, pipe):
        self.pipe = pipe
        self.agent = None
        self.drive = False
        self.buffers = {}
        self.regions = {}
        self.handles = {}
        self.inbox = []
        self.next_id = 1

    def _keep(self, table, value):
        number, self.next_id = self.next_id, self.next_id + 1
        table[number] = value
        return number

    # The agent itself

    def create(self, name, backend, params, progress_thread, sync_mode):
        nixl = load_nixl()
        settings = {"enable_prog_thread": progress_thread, "backends": []}
        if sync_mode is not None:
            settings["sync_mode"] = nixl.nixl_thread_sync_t[f"NIXL_THREAD_SYNC_{sync_mode.upper()}"]
        self.agent = nixl.nixl_agent(name, nixl.nixl_agent_config(**settings))
        self.backend = backend
        if backend is not None:
            self.agent.create_backend(backend, params)
            self.drive = not progress_thread

    def plugins(self):
        return self.agent.get_plugin_list()

    def plugin_facts(self, backend):
        return self.agent.get_plugin_params(backend), self.agent.get_plugin_mem_types(backend)

    def backend_facts(self):
        return self.agent.get_backend_params(self.backend), self.agent.get_backend_mem_types(self.backend)

    def close(self):
        self.drive = False
        self.handles.clear()
        self.agent = None

    # Memory

    def allocate(self, size, seed):
        buffer = np.zeros(size, dtype=np.uint8) if seed is None else pattern(seed, size)
        return self._keep(self.buffers, buffer), buffer.ctypes.data

    def fill(self, buffer, seed):
        array = self.buffers[buffer]
        array[:] = 0 if seed is None else pattern(seed, array.size)

    def compare(self, buffer, seed, placed=None):
        """Compares the whole buffer: zero but for `placed`, a list of (offset, source offset, length) of stream `seed`."""
        array = self.buffers[buffer]
        if placed is None:
            return first_difference(array, pattern(seed, array.size))
        expected = np.zeros(array.size, dtype=np.uint8)
        source = pattern(seed, max((start + length for _, start, length in placed), default=0))
        for offset, start, length in placed:
            expected[offset : offset + length] = source[start : start + length]
        return first_difference(array, expected)

    def compare_part(self, buffer, start, size, seed):
        """Compares a part of the buffer with the first bytes of stream `seed`."""
        return first_difference(self.buffers[buffer][start : start + size], pattern(seed, size))

    def register(self, regions):
        """Regions are (address, length); one registration for the list."""
        descriptors = self.agent.get_reg_descs([(address, size, 0, "") for address, size in regions], "DRAM")
        self.agent.register_memory(descriptors)
        return self._keep(self.regions, descriptors)

    def deregister(self, region):
        self.agent.deregister_memory(self.regions.pop(region))

    def query(self, address, size):
        return self.agent.query_memory([(address, size, 0, "")], self.backend, "DRAM")

    # Peers

    def metadata(self):
        return self.agent.get_agent_metadata()

    def add_remote(self, metadata):
        name = self.agent.add_remote_agent(metadata)
        return name.decode() if isinstance(name, bytes) else name

    def remove_remote(self, name):
        self.agent.remove_remote_agent(name)

    def make_connection(self, name):
        self.agent.make_connection(name)

    # Transfers

    def prepare(self, operation, local, remote, peer, notification=b""):
        def descriptors(slices):
            table = np.array([(address, length, 0) for address, length in slices], dtype=np.uint64)
            return self.agent.get_xfer_descs(table, "DRAM")

        handle = self.agent.initialize_xfer(operation, descriptors(local), descriptors(remote), peer, notification)
        return self._keep(self.handles, handle)

    def post(self, handle, notification=b""):
        return self.agent.transfer(self.handles[handle], notification)

    def state(self, handle):
        return self.agent.check_xfer_state(self.handles[handle])

    def wait(self, handle, seconds):
        """Polls until the transfer is over, or says PROC when the time is up."""
        deadline = time.monotonic() + seconds
        while (state := self.state(handle)) == "PROC":
            if time.monotonic() > deadline:
                break
            self.collect()
        return state

    def release(self, handle):
        self.handles.pop(handle).release()

    def cost(self, handle):
        return self.agent.estimate_xfer_cost(self.handles[handle])

    # Notifications

    def send(self, peer, message):
        self.agent.send_notif(peer, message)

    def collect(self):
        for sender, messages in self.agent.get_new_notifs().items():
            self.inbox.extend((sender, message) for message in messages)

    def receive(self, count, seconds):
        """The first `count` notifications, or as many as came in time; they leave the inbox."""
        deadline = time.monotonic() + seconds
        self.collect()
        while len(self.inbox) < count and time.monotonic() < deadline:
            time.sleep(0 if self.drive else IDLE_POLL_S)
            self.collect()
        taken, self.inbox = self.inbox[:count], self.inbox[count:]
        return taken

    # Anything else: a function of the test module, called with this worker

    def run(self, module, function, arguments):
        return getattr(importlib.import_module(module), function)(self, *arguments)


def serve(pipe):
    worker = Worker(pipe)
    while True:
        while worker.drive and not pipe.poll(IDLE_POLL_S):
            worker.collect()
        try:
            command, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, getattr(worker, command)(*arguments))
        except Exception as error:
            answer = (False, (type(error).__name__, str(error)))
        pipe.send(answer)


if __name__ == "__main__":
    # A stopped or blocked worker must not outlive the test that made it.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    serve(Connection(int(sys.argv[1])))
    if "UCX_TLS" in os.environ:
        # UCX's libnl in the wheel crashes at exit.
        os._exit(0)
