"""One NIXL agent with memory of its own, in this process (Node) or in another one (Remote): both take the same calls."""

import ctypes
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection

import cuda

BACKEND = "LIBFABRIC"
WAIT_S = 20.0


def nixl():
    for name in ("nixl_cu13", "nixl_cu12"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    raise ModuleNotFoundError("no NIXL wheel on PYTHONPATH")


class Node:
    def __init__(self, name, params=None, progress_thread=True):
        api = nixl()
        self.name = name
        self.agent = api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=progress_thread, backends=[]))
        self.agent.create_backend(BACKEND, params or {})
        self.blocks, self.regions = {}, {}

    def mems(self):
        return self.agent.get_plugin_mem_types(BACKEND), self.agent.get_backend_mem_types(BACKEND)

    def allocate(self, kind, size, device=0):
        block = cuda.Block(kind, size, device)
        self.blocks[block.address] = block
        return block.address

    def export(self, address):
        return cuda.export(address)

    def take_in(self, handle, size):
        """Memory that another process has exported."""
        block = cuda.Imported(handle, size)
        self.blocks[block.address] = block
        return block.address

    def register(self, address, size, device=0, segment=None):
        segment = segment or self.blocks[address].segment
        descriptors = self.agent.get_reg_descs([(address, size, device, "")], segment)
        self.regions[address] = self.agent.register_memory(descriptors, backends=[BACKEND])

    def deregister(self, address):
        self.agent.deregister_memory(self.regions.pop(address), backends=[BACKEND])

    def free(self, address):
        if address in self.regions:
            self.deregister(address)
        self.blocks.pop(address).free()

    def fill(self, address, seed):
        self.blocks[address].fill(seed)

    def difference(self, address, seed):
        return self.blocks[address].difference(seed)

    def mixture(self, address, parts):
        return self.blocks[address].mixture(parts)

    def holds(self, address, parts):
        return self.blocks[address].holds(parts)

    def tail_at_once(self, address, size):
        return cuda.read_at_once(address + self.blocks[address].size - size, size)

    def metadata(self):
        return self.agent.get_agent_metadata()

    def meet(self, metadata):
        """Takes in a peer's metadata, again if need be: regions registered since then are in it."""
        self.agent.add_remote_agent(metadata)

    def forget(self, name):
        self.agent.remove_remote_agent(name)

    def prepare(self, operation, local, remote, peer, notification=b""):
        """`local` and `remote` are lists of (address, size, device) with the name of their segment."""
        descriptors = [self.agent.get_xfer_descs(pieces, segment) for pieces, segment in (local, remote)]
        return self.agent.initialize_xfer(operation, *descriptors, peer, notification)

    def wait(self, handle, seconds=WAIT_S):
        """The last state; "PROC" if the time is up."""
        deadline = time.monotonic() + seconds
        while (state := self.agent.check_xfer_state(handle)) == "PROC" and time.monotonic() < deadline:
            pass
        return state

    def run(self, handle):
        """Posts and waits; returns the seconds that it took."""
        start = time.monotonic()
        state = self.agent.transfer(handle)
        if state == "PROC":
            state = self.wait(handle)
        if state != "DONE":
            raise RuntimeError(f"the transfer ended as {state}" if state != "PROC" else f"not done after {WAIT_S} s")
        return time.monotonic() - start

    def transfer(self, operation, local, remote, peer):
        """Prepares, posts and waits, for a node in another process; returns the seconds that it took."""
        return self.run(self.prepare(operation, local, remote, peer))

    def post(self, handle):
        return self.agent.transfer(handle)

    def notifications(self):
        """What has come since the last call: messages by the name of their sender."""
        return self.agent.get_new_notifs()

    def facts(self):
        return cuda.open_files(), cuda.free_bytes(), cuda.current_device()


class Remote:
    """A Node in a process of its own, which `launcher` starts."""

    def __init__(self, name, params=None, device=0, launcher=()):
        ours, theirs = socket.socketpair()
        command = [*launcher, sys.executable, __file__, str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        self.pipe = Connection(ours.detach())
        self.name = name
        self._call("__init__", name, params, device)

    def _call(self, method, *arguments):
        self.pipe.send((method, arguments))
        if not self.pipe.poll(60):
            raise RuntimeError(f"{self.name}: no answer to {method}")
        done, answer = self.pipe.recv()
        if not done:
            raise RuntimeError(f"{self.name}: {answer}")
        return answer

    def __getattr__(self, method):
        return lambda *arguments: self._call(method, *arguments)

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.pipe.close()

    def close(self):
        self.pipe.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def serve(pipe):
    node = None
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if method == "__init__":
                name, params, device = arguments
                cuda.set_device(device)
                cuda.runtime("cudaFree", None)
                node, answer = Node(name, params), None
            else:
                answer = getattr(node, method)(*arguments)
            pipe.send((True, answer))
        except Exception as error:
            pipe.send((False, f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    serve(Connection(int(sys.argv[1])))
    os._exit(0)
