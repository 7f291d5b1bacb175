"""One agent with 1,000 peers. They are many to a process, since a thousand processes do not fit into a machine."""

import time

import numpy as np
import pytest

from bed.softefa import SoftEfa
from bed.worker import load_nixl

BYTES = 4096


def start_crowd(worker, names, backend, options):
    """Several agents in one process; returns the metadata of each, and where its buffer lies."""
    nixl, crowd = load_nixl(), {}
    for name in names:
        agent = nixl.nixl_agent(name, nixl.nixl_agent_config(enable_prog_thread=False, backends=[]))
        agent.create_backend(backend, options)
        buffer = np.zeros(BYTES, dtype=np.uint8)
        agent.register_memory(agent.get_reg_descs([(buffer.ctypes.data, BYTES, 0, "")], "DRAM"))
        crowd[name] = agent, buffer
    worker.crowd = crowd
    return {name: (agent.get_agent_metadata(), buffer.ctypes.data) for name, (agent, buffer) in crowd.items()}


def crowd_answers(worker, hub, metadata, target, first, seconds):
    """Each agent waits for the hub's word, and writes what came with it back into its own place at the hub."""
    waiting, writing, deadline = dict(worker.crowd), {}, time.monotonic() + seconds
    for agent, _ in waiting.values():
        agent.add_remote_agent(metadata)
    while waiting or writing:
        assert time.monotonic() < deadline, f"{len(waiting)} heard nothing, {len(writing)} still write"
        for name, (agent, buffer) in list(waiting.items()):
            said = agent.get_new_notifs()
            if not said:
                continue
            assert said == {hub: [name.encode()]}, f"{name} was told {said}"
            del waiting[name]
            place = target + (first + list(worker.crowd).index(name)) * BYTES
            local, remote = ([(address, BYTES, 0)] for address in (buffer.ctypes.data, place))
            handle = agent.initialize_xfer("WRITE", agent.get_xfer_descs(local, "DRAM"), agent.get_xfer_descs(remote, "DRAM"), hub, name.encode())
            agent.transfer(handle)
            writing[name] = agent, handle
        for name, (agent, handle) in list(writing.items()):
            if (state := agent.check_xfer_state(handle)) != "PROC":
                assert state == "DONE", f"{name}: {state}"
                handle.release()
                del writing[name]


def drop_crowd(worker):
    worker.crowd.clear()


def write_to_crowd(worker, source, places):
    """One transfer to each peer, all in flight together."""
    handles = [worker.prepare("WRITE", [(source + index * BYTES, BYTES)], [(address, BYTES)], name, name.encode())
               for index, (name, address) in enumerate(places)]
    for handle, (name, _) in zip(handles, places):
        worker.post(handle, name.encode())
    for handle, (name, _) in zip(handles, places):
        assert worker.wait(handle, 60) == "DONE", name
        worker.release(handle)


@pytest.mark.stock_fails("256 peers")
def test_a_thousand_peers(bed, host, network, progress):
    """One agent writes to each of 1,000, and each writes that back, so that the bytes pass every agent."""
    crowds, each = 20, 50
    if isinstance(network, SoftEfa):
        if network.fabric == "efa":
            pytest.skip("1,000 endpoints of fabric efa on one machine take 48 GB; those of efa-direct 2.5 GB")
        network.devices = 1
    hub = bed.agent("hub", progress_thread=progress)
    size = crowds * each * BYTES
    source, target = hub.buffer(size, seed=1), hub.buffer(size)
    processes = [bed.process(f"crowd{number}") for number in range(crowds)]
    places = []
    for number, process in enumerate(processes):
        names = [f"peer{number * each + index}" for index in range(each)]
        for name, (metadata, address) in process.run(start_crowd, names, host.backend, {}, deadline=120).items():
            assert hub.call("add_remote", metadata) == name
            places.append((name, address))
    for number, process in enumerate(processes):
        process.begin("run", __name__, "crowd_answers", (hub.name, hub.call("metadata"), target[:][0], number * each, 120))
    hub.run(write_to_crowd, source[:][0], places, deadline=150)
    for process in processes:
        process.finish(150)
    told = hub.call("receive", len(places), 30, deadline=60)
    assert sorted(told) == sorted((name, name.encode()) for name, _ in places)
    target.check(1)
    for process in processes:
        process.run(drop_crowd)
