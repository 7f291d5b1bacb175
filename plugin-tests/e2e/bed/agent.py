"""The test's end of an agent: starts its process, sends it commands, and can stop or kill it."""

import os
import signal
import socket
import subprocess
import time
from multiprocessing.connection import Connection

from bed.places import BED, PYTHON, Host

CALL_DEADLINE_S = 30.0
TRANSFER_DEADLINE_S = 60.0


class Refused(Exception):
    """The agent's call raised: `kind` is the name of NIXL's exception, `text` its words."""

    def __init__(self, kind, text):
        super().__init__(f"{kind}: {text}")
        self.kind, self.text = kind, text


class NoAnswer(Exception):
    """The agent's call did not return within its deadline."""


class Died(Exception):
    """The agent's process ended by itself."""


class Buffer:
    """Memory of an agent; buffer[a:b] is a slice of it, as transfers take it."""

    def __init__(self, agent, number, address, size):
        self.agent, self.number, self.address, self.size = agent, number, address, size

    def __getitem__(self, part):
        start, stop, _ = part.indices(self.size)
        return self.address + start, stop - start

    def fill(self, seed=None):
        self.agent.call("fill", self.number, seed)

    def check(self, seed, placed=None):
        """Every byte of the buffer is the pattern's, or, with `placed`, zero but for those places."""
        difference = self.agent.call("compare", self.number, seed, placed)
        assert difference is None, f"{self.agent.name}: {difference}"


class Agent:
    def __init__(self, name, host=Host(), space=None, log=None, wrap=()):
        self.name, self.host, self.log = name, host, log
        self.hangs = self.stopped = False
        ours, theirs = socket.socketpair()
        command = [*(space.enter() if space else ()), *wrap, str(PYTHON), "-m", "bed.worker", str(theirs.fileno())]
        with open(log or os.devnull, "ab") as output:
            self.process = subprocess.Popen(
                command, env=host.environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                pass_fds=[theirs.fileno()], cwd=BED.parent,
            )
        theirs.close()
        self.pipe = Connection(ours.detach())

    # Commands

    def begin(self, command, *arguments):
        """Sends a command without waiting; `finish` takes its answer."""
        self.pipe.send((command, arguments))

    def finish(self, deadline=CALL_DEADLINE_S, what="call"):
        if not self.pipe.poll(deadline):
            self.process.send_signal(signal.SIGUSR1)  # writes the stacks of its threads to the log
            time.sleep(0.2)
            self.hangs = True
            raise NoAnswer(f"{self.name}: {what} still runs after {deadline} s; its log: {self.log}")
        try:
            well, answer = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            raise Died(f"{self.name}: process ended with {self.process.wait(10)} in {what}; its log: {self.log}") from None
        if not well:
            raise Refused(*answer)
        return answer

    def call(self, command, *arguments, deadline=CALL_DEADLINE_S):
        self.begin(command, *arguments)
        return self.finish(deadline, command)

    def run(self, function, *arguments, deadline=TRANSFER_DEADLINE_S):
        """Runs a function of a test module inside the agent's process, with the worker as its first argument."""
        return self.call("run", function.__module__, function.__name__, arguments, deadline=deadline)

    # Shorthands that tests read well with

    def create(self, params=None, progress_thread=False, sync_mode=None, backend="", **options):
        params = {key: str(value) for key, value in ((params or {}) | options).items()}
        self.call("create", self.name, self.host.backend if backend == "" else backend, params, progress_thread, sync_mode)
        return self

    def buffer(self, size, seed=None, register=True):
        number, address = self.call("allocate", size, seed)
        buffer = Buffer(self, number, address, size)
        if register:
            buffer.region = self.call("register", [buffer[:]])
        return buffer

    def knows(self, *others):
        for other in others:
            assert self.call("add_remote", other.call("metadata")) == other.name
        return self

    def prepare(self, operation, local, remote, peer, notification=b""):
        return self.call("prepare", operation, local, remote, peer.name, notification)

    def transfer(self, operation, local, remote, peer, notification=b"", deadline=TRANSFER_DEADLINE_S):
        """One transfer from preparation to release; raises unless it is DONE in time."""
        handle = self.prepare(operation, local, remote, peer, notification)
        self.call("post", handle, notification)
        state = self.call("wait", handle, deadline, deadline=deadline + CALL_DEADLINE_S)
        assert state == "DONE", f"{operation} to {peer.name}: {state} after {deadline} s"
        self.call("release", handle)

    def receives(self, *messages, sender, deadline=CALL_DEADLINE_S):
        """Exactly these notifications came from `sender`, in any order, and no other."""
        found = self.call("receive", len(messages), deadline, deadline=deadline + CALL_DEADLINE_S)
        assert sorted(found) == sorted((sender.name, message) for message in messages)

    def log_text(self):
        return self.log.read_text(errors="replace") if self.log else ""

    # The process

    def stop(self):
        self.process.send_signal(signal.SIGSTOP)
        self.stopped = True

    def resume(self):
        self.process.send_signal(signal.SIGCONT)
        self.stopped = False

    def kill(self):
        self.process.kill()
        self.process.wait()

    def close(self, deadline=CALL_DEADLINE_S):
        """Destroys the agent, ends its process, and returns the exit status."""
        try:
            self.call("close", deadline=deadline)
        finally:
            self.pipe.close()
            try:
                self.process.wait(deadline)
            except subprocess.TimeoutExpired:
                self.kill()
        return self.process.returncode
