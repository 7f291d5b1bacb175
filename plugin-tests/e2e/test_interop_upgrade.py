"""A fleet is upgraded node by node: a ring of four agents, two of each kind, each replaced in turn by the other kind under
its name, while the traffic between the others goes on."""

import threading
import time

import pytest

from bed.places import Host
from test_interop import KINDS, LIBFABRICS, STOCK_VERSIONS, other

pytestmark = pytest.mark.ours
SIZE = 300_000
PAUSE_S = 0.002


@pytest.fixture
def libfabric():
    return LIBFABRICS[0]


def start(worker, peer, source, target, label):
    """From now on a thread of the worker writes to the peer, over and over, each time with a numbered notification."""
    traffic = {"stop": threading.Event(), "done": 0, "failures": []}

    def work():
        try:
            handle = worker.prepare("WRITE", [source], [target], peer)
            while not traffic["stop"].is_set():
                worker.post(handle, b"%s %d" % (label, traffic["done"]))
                if (state := worker.wait(handle, 30)) != "DONE":
                    raise RuntimeError(state)
                traffic["done"] += 1
                time.sleep(PAUSE_S)
            worker.release(handle)
        except Exception as error:
            traffic["failures"].append(f"{peer}: {type(error).__name__}: {error}")

    traffic["thread"] = threading.Thread(target=work)
    traffic["thread"].start()
    worker.traffic = traffic


def stop(worker):
    """Ends the traffic; returns how many transfers were DONE and what went wrong."""
    worker.traffic["stop"].set()
    worker.traffic["thread"].join(40)
    return worker.traffic["done"], worker.traffic["failures"]


def done_so_far(worker):
    return worker.traffic["done"]


class Ring:
    def __init__(self, bed, kinds, progress, nixl):
        self.bed, self.progress = bed, progress
        self.hosts = {kind: Host(kind, nixl, LIBFABRICS[0]) for kind in KINDS}
        self.kinds = list(kinds)
        self.agents, self.sources, self.targets = [None] * 4, [None] * 4, [None] * 4
        self.lives = 0
        for place in range(4):
            self.start_agent(place)
        for place in range(4):
            self.introduce(place)
        for place in range(4):
            self.begin(place)

    def start_agent(self, place, name=None):
        agent = self.bed.process(f"node{place}", self.hosts[self.kinds[place]])
        agent.name = name or agent.name
        agent.create(progress_thread=self.progress, sync_mode="strict")
        self.agents[place] = agent
        self.sources[place], self.targets[place] = agent.buffer(SIZE, seed=10 + place), agent.buffer(SIZE)

    def introduce(self, place):
        """A node and the two beside it get to know each other."""
        node = self.agents[place]
        for beside in (self.agents[place - 1], self.agents[(place + 1) % 4]):
            node.knows(beside), beside.knows(node)

    def begin(self, place):
        """The node begins to write to the next one."""
        to = (place + 1) % 4
        self.lives += 1
        self.targets[to].fill(None)
        label = b"life %d" % self.lives
        self.agents[place].run(start, self.agents[to].name, self.sources[place][:], self.targets[to][:], label)
        return label

    def end(self, place):
        """Stops the node's traffic: everything was DONE, every notification came, once, and every byte is there."""
        to = (place + 1) % 4
        self.get_on([self.agents[place]])
        done, failures = self.agents[place].run(stop)
        assert failures == []
        found = self.agents[to].call("receive", done, 30, deadline=60)
        label = found[0][1].rsplit(b" ", 1)[0]
        assert sorted(found) == sorted((self.agents[place].name, b"%s %d" % (label, number)) for number in range(done))
        assert self.agents[to].call("receive", 1, 0.2) == [], "a notification came twice"
        self.targets[to].check(10 + place)

    def replace(self, place, gently):
        """The node becomes one of the other kind. Its own traffic and its neighbour's to it stop before; the others' does not."""
        before, after = (place - 1) % 4, (place + 1) % 4
        self.end(before), self.end(place)
        running = [self.agents[after], self.agents[(place + 2) % 4]]
        name = self.agents[place].name
        if gently:
            self.agents[place].close()
        else:
            self.agents[place].kill()
        for beside in (before, after):
            self.agents[beside].call("remove_remote", name)
        self.kinds[place] = other(self.kinds[place])
        self.start_agent(place, name)
        self.introduce(place)
        self.begin(before), self.begin(place)
        self.get_on(running)

    def get_on(self, agents):
        """Each of these agents completes one transfer more."""
        counts = [agent.run(done_so_far) for agent in agents]
        deadline = time.monotonic() + 30
        while any(now <= then for now, then in zip([agent.run(done_so_far) for agent in agents], counts)):
            assert time.monotonic() < deadline, "the traffic stands still"
            time.sleep(0.05)


@pytest.mark.parametrize("gently", [True, False], ids=["closed", "killed"])
@pytest.mark.parametrize("nixl", [STOCK_VERSIONS[0], STOCK_VERSIONS[-1]])
def test_rolling_upgrade(bed, progress, nixl, gently):
    """There and back again: in eight steps every node has been of both kinds, with every pair of kinds beside each other."""
    ring = Ring(bed, ["stock", "stock", "ours", "ours"], progress, nixl)
    for place in (0, 1, 2, 3, 0, 1, 2, 3):
        ring.replace(place, gently)
    for place in range(4):
        ring.end(place)
