"""More than one rail: over two links between two hosts, where each link's own counter says what went over it."""

import subprocess

import pytest

from bed.networks import CONTAINERS, TUNNEL, OddHosts, OneHost

pytestmark = pytest.mark.tcp
MIB = 1 << 20
SIZE = 64 * MIB


def sent(network, host):
    """Bytes that each interface of a host has sent."""
    table = subprocess.run([*network.space(host).enter(), "cat", "/proc/net/dev"], check=True, capture_output=True, text=True).stdout
    lines = (line.split(":") for line in table.splitlines() if ":" in line)
    return {name.strip(): int(numbers.split()[8]) for name, numbers in lines}


def moved(network, work):
    """What `work` makes host 0 send, by interface."""
    before = sent(network, 0)
    work()
    after = sent(network, 0)
    return {name: after[name] - before[name] for name in after if name.startswith("eth")}


def write_all(first, second):
    source, target = first.buffer(SIZE, seed=1), second.buffer(SIZE)
    first.knows(second)
    first.transfer("WRITE", [source[:]], [target[:]], second, b"all")
    second.receives(b"all", sender=first)
    target.check(1)


@pytest.mark.ours
def test_a_large_write_uses_both_links(bed, two_hosts, progress):
    first, second = bed.pair(network=two_hosts, progress_thread=progress, devices="eth0,eth1")
    shares = moved(two_hosts, lambda: write_all(first, second))
    assert sum(shares.values()) >= SIZE
    assert min(shares.values()) > SIZE // 5, shares


@pytest.mark.ours
def test_small_descriptors_are_spread(bed, two_hosts, progress):
    first, second = bed.pair(network=two_hosts, progress_thread=progress, devices="eth0,eth1")
    count, block = 1024, 16 << 10
    source, target = first.buffer(2 * count * block, seed=1), second.buffer(2 * count * block)
    first.knows(second)
    # Every other block, so that no two can be joined.
    parts = [slice(2 * index * block, (2 * index + 1) * block) for index in range(count)]
    shares = moved(two_hosts, lambda: first.transfer("WRITE", [source[part] for part in parts], [target[part] for part in parts], second, b"x"))
    # How many each gets is decided by who has room; that both have a part is not left to that.
    assert min(shares.values()) > count * block // 50, shares
    second.receives(b"x", sender=first)
    target.check(1, [(part.start, part.start, block) for part in parts])


@pytest.mark.ours
@pytest.mark.parametrize("device", ["eth0", "eth1"])
def test_devices_chooses_the_link(bed, two_hosts, device):
    first, second = bed.pair(network=two_hosts, progress_thread=True, devices=device)
    shares = moved(two_hosts, lambda: write_all(first, second))
    assert shares.pop(device) >= SIZE
    assert sum(shares.values()) < MIB, shares


@pytest.mark.ours
@pytest.mark.parametrize(("near", "far"), [(1, 3), (4, 2), (5, 1)])
def test_unequal_numbers_of_rails(bed, two_hosts, progress, near, far):
    """The two sides have different numbers of rails."""
    first = bed.agent("first", network=two_hosts, progress_thread=progress, devices="eth*", rails_per_device=5, max_rails=near)
    second = bed.agent("second", network=two_hosts, progress_thread=progress, devices="eth*", rails_per_device=5, max_rails=far)
    first.knows(second), second.knows(first)
    write_all(first, second)
    write_all(second, first)


def test_one_host_with_two_interfaces(bed, wired_host, progress):
    first, second = bed.pair(network=wired_host, progress_thread=progress)
    write_all(first, second)
    back = second.buffer(SIZE, seed=5)
    target = first.buffer(SIZE)
    first.knows(second)
    first.transfer("READ", [target[:]], [back[:]], second, b"read")
    second.receives(b"read", sender=first)
    target.check(5)


@pytest.mark.stock_fails("needs an interface besides lo")
def test_host_with_only_loopback(bed, loopback_only, progress):
    first, second = bed.pair(network=loopback_only, progress_thread=progress)
    write_all(first, second)


def meet(bed, network, **options):
    """Two agents as `network` places them, and a write between them."""
    first, second = bed.pair(network=network, progress_thread=True, **options)
    source, target = first.buffer(MIB, seed=1), second.buffer(MIB)
    first.knows(second)
    first.transfer("WRITE", [source[:]], [target[:]], second, b"there")
    second.receives(b"there", sender=first)
    target.check(1)


@pytest.fixture(params=[CONTAINERS, TUNNEL, CONTAINERS + TUNNEL], ids=["containers", "tunnel", "both"])
def beside(request):
    return request.param


def test_interfaces_that_lead_nowhere_are_not_taken(bed, beside):
    network = OddHosts(others=f"({beside})\n")
    try:
        meet(bed, network)
    finally:
        network.close()


def test_a_host_without_ipv4(bed):
    network = OddHosts("fd00:77::{host}/64", "fd00:77::ffff", f"({CONTAINERS})\n")
    try:
        meet(bed, network)
    finally:
        network.close()


@pytest.mark.ours
def test_an_interface_that_cannot_be_opened_gives_way_to_the_next(bed):
    """An address that the kernel still looks for on the link can be listed, and not be bound to."""
    network = OneHost(links=2)
    network.spaces[0].run(
        "echo 1000 > /proc/sys/net/ipv6/conf/eth1/dad_transmits; ip -4 address flush dev eth1; "
        "ip address add fd00:78::1/64 dev eth1; ip -6 route add default via fd00:78::ffff dev eth1"
    )
    try:
        meet(bed, network)
        log = bed.agents[0].log_text()
        assert "eth1 is left out" in log and "1 rails on eth0," in log
    finally:
        network.close()


@pytest.mark.ours
def test_loopback_is_taken_where_it_is_named(bed, two_hosts):
    agent = bed.agent("self", network=two_hosts, progress_thread=True, devices="lo")
    (line,) = (line for line in agent.log_text().splitlines() if "rails on" in line)
    assert "1 rails on lo," in line
