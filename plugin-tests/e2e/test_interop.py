"""Our plugin and NIXL's own C++ one in one fleet: metadata, data and notifications, both ways, every byte checked.

Agents of the stock plugin run the NIXL that carries it, ours run in the same NIXL: the versions with a handshake on the wire.
What is known to be wrong in the stock plugin is stepped around, and said where.
"""

import random
import time

import pytest

from bed.places import Host
from test_notify import message, post_many, receive_intact, send_from_threads
from test_transfer import scattered

pytestmark = pytest.mark.ours

MIB = 1 << 20
STOCK_VERSIONS = ["1.5.0", "1.4.1", "1.4.0"]
LIBFABRICS = ["2.5.1", "2.4.0"]
# Fragments hold 8172 or 8182 bytes of name and message together.
MESSAGE_SIZES = [0, 1, 1000, 8160, 8164, 8165, 8172, 8173, 8192, 16_354, 16_355, 100_000, MIB]
KINDS = ["ours", "stock"]


def other(kind):
    return "stock" if kind == "ours" else "ours"


class Fleet:
    """Makes agents of either kind that differ in nothing else."""

    def __init__(self, bed, nixl=STOCK_VERSIONS[0], libfabric=LIBFABRICS[0], ours=False, stock=False, network=None):
        self.bed, self.network = bed, network
        self.hosts = {kind: Host(kind, nixl, libfabric) for kind in KINDS}
        self.progress = {"ours": ours, "stock": stock}

    def agent(self, kind, **options):
        return self.bed.agent(kind, self.hosts[kind], self.network, progress_thread=self.progress[kind], **options)

    def pair(self, initiator, **options):
        """The initiator and an agent of the other kind, which know each other; options are ours only."""
        first, second = (self.agent(kind, **(options if kind == "ours" else {})) for kind in (initiator, other(initiator)))
        return first.knows(second), second.knows(first)


@pytest.fixture
def libfabric():
    """Which libfabric the bed's own host has; the tests here say themselves on what they run."""
    return LIBFABRICS[0]


@pytest.fixture(params=[(False, False), (True, False), (False, True), (True, True)],
                ids=["progress-none", "progress-ours", "progress-stock", "progress-both"])
def fleet(bed, request):
    return Fleet(bed, ours=request.param[0], stock=request.param[1])


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind}-initiates")
def initiator(request):
    return request.param


def arrives(target, seed, placed=None, seconds=30):
    """The stock plugin says DONE before the bytes of a WRITE without notification are there: they come soon after."""
    deadline = time.monotonic() + seconds
    while target.agent.call("compare", target.number, seed, placed) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    target.check(seed, placed)


def exchange(first, second, size=4 * MIB + 5, turns=3):
    """WRITE and READ with and without notification, and messages both ways."""
    source, target, back = first.buffer(size, seed=1), second.buffer(size), first.buffer(size)
    first.knows(second)
    for turn in range(turns):
        source.fill(100 + turn)
        first.transfer("WRITE", [source[:]], [target[:]], second, b"w" * 50_000)
        second.receives(b"w" * 50_000, sender=first)
        target.check(100 + turn)
        first.transfer("READ", [back[:]], [target[:]], second, b"r" * 9000)
        second.receives(b"r" * 9000, sender=first)
        back.check(100 + turn)
        source.fill(200 + turn)
        first.transfer("WRITE", [source[:]], [target[:]], second)
        arrives(target, 200 + turn)
        first.transfer("READ", [back[:]], [target[:]], second)
        back.check(200 + turn)
        for one, peer in ((first, second), (second, first)):
            one.call("send", peer.name, b"word %d" % turn)
            peer.receives(b"word %d" % turn, sender=one)


@pytest.mark.parametrize("ours_progress", [False, True], ids=["ours-off", "ours-on"])
@pytest.mark.parametrize("stock_progress", [False, True], ids=["stock-off", "stock-on"])
@pytest.mark.parametrize("version", LIBFABRICS)
@pytest.mark.parametrize("nixl", STOCK_VERSIONS)
def test_every_version(bed, nixl, version, initiator, ours_progress, stock_progress):
    exchange(*Fleet(bed, nixl, version, ours_progress, stock_progress).pair(initiator))


@pytest.mark.parametrize("nixl", STOCK_VERSIONS[1:])
def test_another_nixl_around_it(bed, initiator, nixl):
    """The NIXL around the plugins may be of different versions too."""
    hosts = {"ours": Host("ours", STOCK_VERSIONS[0], LIBFABRICS[0]), "stock": Host("stock", nixl, LIBFABRICS[1])}
    first, second = (bed.agent(kind, hosts[kind], progress_thread=True) for kind in (initiator, other(initiator)))
    first.knows(second), second.knows(first)
    exchange(first, second)


def test_notification_sizes(fleet, initiator):
    """Alone, after a WRITE and after a READ: around the borders of fragments, and up to 1 MiB."""
    first, second = fleet.pair(initiator)
    near, far = first.buffer(70_000, seed=1), second.buffer(70_000)
    first.knows(second)
    for size in MESSAGE_SIZES:
        text = message(0, size, size)
        first.call("send", second.name, bytes(size))
        second.receives(bytes(size), sender=first)
        near.fill(size)
        first.transfer("WRITE", [near[:]], [far[:]], second, text)
        second.receives(text, sender=first)
        far.check(size)
        first.transfer("READ", [near[:]], [far[:]], second, text)
        second.receives(text, sender=first)


@pytest.mark.parametrize("operation", ["WRITE", "READ"])
def test_scattered_descriptors(fleet, initiator, operation):
    first, second = fleet.pair(initiator)
    placed, end = scattered(random.Random(5), 200)
    giver, taker = (first, second) if operation == "WRITE" else (second, first)
    source, target = giver.buffer(24 * MIB, seed=24), taker.buffer(end)
    first.knows(second)
    pairs = [(source[start : start + length], target[offset : offset + length]) for offset, start, length in placed]
    here, there = zip(*pairs) if operation == "WRITE" else zip(*((to, of) for of, to in pairs))
    first.transfer(operation, here, there, second, b"scattered")
    second.receives(b"scattered", sender=first)
    target.check(24, placed)


@pytest.mark.parametrize("operation", ["WRITE", "READ"])
def test_many_small_descriptors(fleet, initiator, operation):
    """4096 blocks of 16 KiB in reverse order: more immediates than any queue holds."""
    first, second = fleet.pair(initiator)
    count, block = 4096, 16 << 10
    giver, taker = (first, second) if operation == "WRITE" else (second, first)
    source, target = giver.buffer(count * block, seed=3), taker.buffer(count * block)
    first.knows(second)
    blocks = [slice(index * block, (index + 1) * block) for index in range(count)]
    of, to = [source[part] for part in reversed(blocks)], [target[part] for part in blocks]
    here, there = (of, to) if operation == "WRITE" else (to, of)
    first.transfer(operation, here, there, second, b"blocks")
    second.receives(b"blocks", sender=first)
    target.check(3, [(index * block, (count - 1 - index) * block, block) for index in range(count)])


@pytest.mark.tcp
@pytest.mark.parametrize(("devices", "rails_per_device"), [("eth0", 1), ("eth0,eth1", 1), ("eth1", 3), ("eth0,eth1", 8)])
def test_rail_counts(bed, wired_host, initiator, devices, rails_per_device, progress):
    """Over tcp the stock plugin has one rail; ours as many as it is told."""
    fleet = Fleet(bed, ours=progress, stock=progress, network=wired_host)
    first, second = fleet.pair(initiator, devices=devices, rails_per_device=rails_per_device)
    exchange(first, second, size=32 * MIB + 1, turns=2)


class Unequal:
    """Hosts with different numbers of devices: agents are placed on them in turn."""

    def __init__(self, efa, devices):
        self.efa, self.devices = efa, devices

    def space(self, index):
        return self.efa.host(index, self.devices[index % len(self.devices)])


@pytest.mark.efa
@pytest.mark.parametrize("devices", [(4, 32), (32, 4), (1, 4)], ids=lambda devices: "{} to {}".format(*devices))
def test_different_devices(bed, efa, initiator, devices, progress):
    """As many rails as devices, on either side; the initiator's come first."""
    fleet = Fleet(bed, ours=progress, stock=progress, network=Unequal(efa, devices))
    first, second = fleet.pair(initiator)
    exchange(first, second, size=16 * MIB + 1, turns=2)


def look_away(_worker, seconds):
    """The program is elsewhere: nobody polls, and its devices go on."""
    time.sleep(seconds)


def write_in_turn(worker, local, remote, peer, count):
    """Notified writes, one after the other; returns how each ended."""
    handle = worker.prepare("WRITE", local, remote, peer, b"x")
    ends = []
    for number in range(count):
        worker.post(handle, b"%d" % number)
        ends.append(worker.wait(handle, 60))
    worker.release(handle)
    return ends


@pytest.mark.efa
@pytest.mark.parametrize("version", LIBFABRICS)
@pytest.mark.parametrize("devices", [4, 1], ids=["4-devices", "1-device"])
def test_target_that_does_not_look(bed, efa, version, devices):
    """100,000 writes of 4 KiB with immediates come while nobody looks at the completion queues: none is lost, for each takes
    a receive, and where there is none the sender's device tries again."""
    efa.devices = devices
    first, second = Fleet(bed, libfabric=version).pair("stock")
    writes, block, transfers = 1000, 4096, 100
    source, target = first.buffer(writes * block, seed=1), second.buffer(writes * block)
    first.knows(second)
    first.transfer("WRITE", [source[:]], [target[:]], second, b"met")
    second.receives(b"met", sender=first)
    blocks = [slice(index * block, (index + 1) * block) for index in range(writes)]
    # Apart from one another, so that nobody makes one of two.
    here, there = [source[part] for part in blocks], [target[part] for part in reversed(blocks)]
    second.begin("run", __name__, "look_away", (2,))
    arguments = (here, there, second.name, transfers)
    ends = first.run(write_in_turn, *arguments, deadline=120)
    second.finish(60)
    assert ends == ["DONE"] * transfers
    found = second.call("receive", transfers, 60, deadline=90)
    assert [text for _, text in found] == [b"%d" % number for number in range(transfers)]
    assert counted(efa, 1, "softefa_cq_overruns") == 0
    assert counted(efa, 1, "rx_drops") > 0
    assert counted(efa, 0, "rdma_write_bytes") == (transfers + 1) * writes * block


def counted(efa, host, name):
    return sum(values[name] for values in efa.host(host).counters().values())


@pytest.mark.efa
@pytest.mark.parametrize("version", LIBFABRICS)
def test_devices_write(bed, efa, initiator, version):
    """Writes with immediates are the devices' own: libfabric emulates them in silence where two peers differ."""
    first, second = Fleet(bed, libfabric=version).pair(initiator)
    source, target = first.buffer(4 * MIB, seed=1), second.buffer(4 * MIB)
    first.knows(second)
    first.transfer("WRITE", [source[:]], [target[:]], second, b"met")
    second.receives(b"met", sender=first)
    assert counted(efa, 0, "rdma_write_bytes") == 4 * MIB


def test_many_agents(fleet):
    """Three of each kind: everybody writes to everybody at once, and every byte and every word is told from the others."""
    agents = [fleet.agent(kind) for kind in KINDS * 3]
    size = 100_000
    sources = [agent.buffer(size, seed=number) for number, agent in enumerate(agents)]
    targets = [agent.buffer(size * len(agents)) for agent in agents]
    for agent in agents:
        agent.knows(*(peer for peer in agents if peer is not agent))
    for turn in range(3):
        handles = {}
        for n, agent in enumerate(agents):
            for p, peer in enumerate(agents):
                if p != n:
                    text = b"%d to %d, %d " % (n, p, turn) * 1000
                    there = [targets[p][n * size : (n + 1) * size]]
                    handles[n, p] = agent.prepare("WRITE", [sources[n][:]], there, peer, text), text
        for (n, _), (handle, text) in handles.items():
            agents[n].call("post", handle, text)
        for (n, _), (handle, _) in handles.items():
            assert agents[n].call("wait", handle, 60, deadline=90) == "DONE"
            agents[n].call("release", handle)
        for p, peer in enumerate(agents):
            found = peer.call("receive", len(agents) - 1, 30, deadline=60)
            assert sorted(found) == sorted((agents[n].name, text) for (n, to), (_, text) in handles.items() if to == p)
            for n in range(len(agents)):
                if n != p:
                    assert peer.call("compare_part", targets[p].number, n * size, size, n) is None, f"{n} to {p}"


def test_messages_of_two_threads(fleet):
    """The stock receiver mixes the fragments of stock senders' threads; it has no reason to with ours."""
    first = fleet.agent("ours", sync_mode="rw")
    second = fleet.agent("stock")
    first.knows(second), second.knows(first)
    sizes = [0, 1, 8192, 10_000, 100_000] * 20
    second.begin("run", "test_notify", "receive_intact", (2 * len(sizes), 60))
    assert first.run(send_from_threads, second.name, 2, sizes, deadline=90) == []
    seen, damaged = second.finish(90)
    assert damaged == 0
    assert seen == {(thread, index): 1 for thread in range(2) for index in range(len(sizes))}


def test_transfer_numbers_wrap(bed, initiator):
    """70,000 transfers: their numbers have 16 bits on this wire. Now and then one has a notification."""
    first, second = Fleet(bed).pair(initiator)
    source, target = first.buffer(4096, seed=1), second.buffer(4096)
    first.knows(second)
    silent = first.prepare("WRITE", [source[:64], source[128:256]], [target[:64], target[128:256]], second)
    for turn in range(100):
        first.run(post_many, silent, 700, deadline=120)
        source.fill(turn)
        first.transfer("WRITE", [source[:]], [target[:]], second, b"%d" % turn)
        second.receives(b"%d" % turn, sender=first)
        target.check(turn)


@pytest.mark.parametrize("who", ["ours", "stock", "both"])
def test_removed_and_added_again(fleet, initiator, who):
    """One side forgets the other, which knows nothing of it, and meets it again. The stock plugin does not answer a hello
    of a peer that it knows: it has to be remembered what it said at the first."""
    first, second = fleet.pair(initiator)
    near, far = first.buffer(MIB, seed=1), second.buffer(MIB, seed=2)
    first.knows(second), second.knows(first)
    kinds = {initiator: first, other(initiator): second}
    for turn in range(10):
        near.fill(turn)
        first.transfer("WRITE", [near[:]], [far[:]], second, b"there", deadline=12)
        second.receives(b"there", sender=first)
        far.check(turn)
        second.transfer("READ", [far[:]], [near[:]], first, b"back", deadline=12)
        first.receives(b"back", sender=second)
        for kind, agent in kinds.items():
            if who in (kind, "both"):
                peer = kinds[other(kind)]
                agent.call("remove_remote", peer.name)
                agent.knows(peer)


@pytest.mark.parametrize("progress", [False, True], ids=["progress-off", "progress-on"])
def test_killed_stock_peer(bed, progress):
    """It dies with 64 MiB under way: we say so, and go on with others; its next life is a new peer."""
    fleet = Fleet(bed, ours=progress, stock=progress)
    first = fleet.agent("ours", connect_timeout_ms=2000)
    victim, healthy = fleet.agent("stock"), fleet.agent("stock")
    source = first.buffer(64 * MIB, seed=7)
    targets = {peer: peer.buffer(64 * MIB) for peer in (victim, healthy)}
    for peer in (victim, healthy):
        first.knows(peer), peer.knows(first)
        first.transfer("WRITE", [source[:MIB]], [targets[peer][:MIB]], peer, b"before")
        peer.receives(b"before", sender=first)
    handle = first.prepare("WRITE", [source[:]], [targets[victim][:]], victim, b"never")
    first.call("post", handle, b"never")
    victim.kill()
    try:
        state = first.call("wait", handle, 15, deadline=30)
    except Exception as refused:
        state = str(refused)
    assert "DISCONNECT" in state.upper()
    first.call("release", handle)
    first.transfer("WRITE", [source[:]], [targets[healthy][:]], healthy, b"after")
    healthy.receives(b"after", sender=first)
    targets[healthy].check(7)

    first.call("remove_remote", victim.name)
    again = bed.process("stock", fleet.hosts["stock"])
    again.name = victim.name
    again.create(progress_thread=progress)
    first.knows(again), again.knows(first)
    exchange(first, again, turns=1)
