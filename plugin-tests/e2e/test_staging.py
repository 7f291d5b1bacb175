"""GPU memory by way of host memory (`vram_staging`), on a stand-in for CUDA: real processes, which can die."""

import ctypes
import dataclasses
import itertools
import os
import subprocess
import time

import numpy as np
import pytest

from bed.agent import Buffer
from bed.places import ROOT
from test_efa import ends
from test_peers import CALL_LIMIT_S

MIB = 1 << 20
# A dead peer must be reported within this, with connect_timeout_ms at its default of 30 s.
DEAD_LIMIT_S = 10
# A peer that stands still for so long is not reported.
STILL_S = 2

pytestmark = [pytest.mark.ours]


@pytest.fixture(scope="session")
def standin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    subprocess.run(["sh", ROOT / "plugin-tests" / "cuda-standin" / "build.sh", folder], check=True)
    return folder


@pytest.fixture(autouse=True)
def gpus(bed, standin):
    """Agents are on hosts with GPUs that the NICs do not reach."""
    extra = (("NIXL_LIBFABRIC_LIBCUDA", str(standin / "libcuda.so.1")), ("SOFTEFA_GPU", "none"))
    bed.host = dataclasses.replace(bed.host, extra=extra)


# Run in the agent's process: the stand-in's GPU memory is memory that the processor reads and writes.


def on_gpu(worker, size, seed):
    driver = os.environ["NIXL_LIBFABRIC_LIBCUDA"]
    # First, so that the runtime finds the driver by its name.
    ctypes.CDLL(driver, mode=ctypes.RTLD_GLOBAL)
    runtime = ctypes.CDLL(os.path.join(os.path.dirname(driver), "libcudart.so.13"))
    runtime.cudaSetDevice(0)
    pointer = ctypes.c_void_p()
    assert runtime.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(size)) == 0
    memory = np.frombuffer((ctypes.c_uint8 * size).from_address(pointer.value), dtype=np.uint8)
    number = worker._keep(worker.buffers, memory)
    worker.fill(number, seed)
    descriptors = worker.agent.get_reg_descs([(pointer.value, size, 0, "")], "VRAM")
    worker.agent.register_memory(descriptors)
    worker._keep(worker.regions, descriptors)
    return number, pointer.value


def prepared(worker, operation, local, remote, peer):
    def descriptors(slices, kind):
        return worker.agent.get_xfer_descs(np.array([(at, size, 0) for at, size in slices], dtype=np.uint64), kind)

    handle = worker.agent.initialize_xfer(operation, descriptors(*local), descriptors(*remote), peer, b"moved")
    return worker._keep(worker.handles, handle)


def gpu(agent, size, seed=None):
    return Buffer(agent, *agent.run(on_gpu, size, seed), size)


def prepare(operation, here, there, near="VRAM", far="VRAM"):
    """All of one buffer with all of another."""
    return here.agent.run(prepared, operation, ([here[:]], near), ([there[:]], far), there.agent.name)


def move(operation, here, there, seed):
    source, target = (here, there) if operation == "WRITE" else (there, here)
    source.fill(seed), target.fill()
    handle = prepare(operation, here, there)
    here.agent.call("post", handle, b"moved")
    assert ends(here.agent, handle, CALL_LIMIT_S) == "DONE"
    there.agent.receives(b"moved", sender=here.agent)
    target.check(seed)


class Pair:
    """Two agents with GPU memory, and a third that must not be hurt."""

    def __init__(self, bed, progress):
        options = {"progress_thread": progress, "vram_staging": True}
        self.first, self.second, self.third = (bed.agent(name, **options) for name in ("first", "second", "third"))
        self.here, self.there, self.beside = (gpu(agent, 24 * MIB) for agent in (self.first, self.second, self.third))
        self.first.knows(self.second, self.third), self.second.knows(self.first), self.third.knows(self.first)
        self.seeds = itertools.count(1)

    def healthy(self):
        for operation in ("WRITE", "READ"):
            move(operation, self.here, self.beside, next(self.seeds))


def test_both_ways(bed, progress):
    pair = Pair(bed, progress)
    for operation in ("WRITE", "READ"):
        move(operation, pair.here, pair.there, next(pair.seeds))
    pair.healthy()
    assert "set vram_staging" not in pair.first.log_text(), "it is set"
    assert f"agent {pair.first.name}: VRAM moves through host memory" in pair.first.log_text()


def silent(agent, handle):
    """Still under way, whatever the peer does not say."""
    return ends(agent, handle, STILL_S) == "PROC"


@pytest.mark.parametrize("operation", ["WRITE", "READ"])
@pytest.mark.parametrize("met", [False, True], ids=["never-met", "met"])
@pytest.mark.parametrize("phase", ["before", "in"])
def test_killed_peer(bed, operation, met, phase):
    """A peer that dies is known at once, whatever it was asked for: to lend memory, or to copy."""
    pair = Pair(bed, progress=True)
    pair.healthy()
    if met:
        move(operation, pair.here, pair.there, next(pair.seeds))
    handle = prepare(operation, pair.here, pair.there)
    if phase == "before":
        pair.second.kill()
    else:
        # It takes what it is sent, and does nothing of it.
        pair.second.stop()
    pair.first.call("post", handle, b"moved")
    if phase == "in":
        assert silent(pair.first, handle)
        pair.second.kill()
    assert "DISCONNECT" in ends(pair.first, handle, DEAD_LIMIT_S).upper()
    assert "staging memory within" not in pair.first.log_text() and "did not copy within" not in pair.first.log_text()
    pair.first.call("release", handle)
    pair.healthy()


@pytest.mark.parametrize("operation", ["WRITE", "READ"])
def test_stopped_peer(bed, request, operation):
    """A peer that stands still is waited for, and delays nobody else; when it goes on, so do its transfers."""
    pair = Pair(bed, progress=True)
    move(operation, pair.here, pair.there, next(pair.seeds))
    handle = prepare(operation, pair.here, pair.there)
    pair.second.stop()
    pair.first.call("post", handle, b"moved")
    assert silent(pair.first, handle)
    if request.config.getoption("network") == "tcp":
        # Over efa what is in flight to a process that stands still holds up others, staged or not.
        pair.healthy()
    pair.second.resume()
    assert ends(pair.first, handle, CALL_LIMIT_S) == "DONE"
    pair.second.receives(b"moved", sender=pair.first)
