"""One short scenario on every combination of libfabric, NIXL and progress thread that the plugin promises."""

import pytest

from bed.places import LIBFABRIC_VERSIONS, NIXL_VERSIONS, Host

pytestmark = pytest.mark.tcp
MIB = 1 << 20


def scenario(bed, host, progress, **options):
    first, second = bed.pair(host=host, progress_thread=progress, **options)
    source, target = first.buffer(4 * MIB + 5, seed=1), second.buffer(4 * MIB + 5)
    back = first.buffer(4 * MIB + 5)
    first.knows(second)
    for turn in range(3):
        source.fill(turn)
        first.transfer("WRITE", [source[:]], [target[:]], second, b"written" * 5000)
        second.receives(b"written" * 5000, sender=first)
        target.check(turn)
        first.transfer("READ", [back[:]], [target[:]], second, b"read")
        second.receives(b"read", sender=first)
        back.check(turn)
    second.call("send", first.name, b"")
    first.receives(b"", sender=second)


@pytest.mark.ours
@pytest.mark.parametrize("version", LIBFABRIC_VERSIONS)
@pytest.mark.parametrize("nixl", [NIXL_VERSIONS[0], NIXL_VERSIONS[1], NIXL_VERSIONS[-1]])
def test_libfabric_versions(bed, progress, version, nixl):
    scenario(bed, Host(nixl=nixl, libfabric=version), progress)


@pytest.mark.ours
@pytest.mark.parametrize("version", LIBFABRIC_VERSIONS)
@pytest.mark.parametrize("provider", ["tcp", "shm"])
def test_providers(bed, progress, version, provider):
    """shm connects processes of one host; tcp anything."""
    scenario(bed, Host(libfabric=version), progress, provider=provider)


@pytest.mark.ours
def test_one_binary_talks_across_versions(bed, progress):
    """The two ends have libfabrics of different versions."""
    first = bed.agent("older", Host(libfabric="1.22.0"), progress_thread=progress)
    second = bed.agent("newer", Host(libfabric="2.5.1"), progress_thread=progress)
    first.knows(second), second.knows(first)
    source, target = first.buffer(MIB, seed=1), second.buffer(MIB)
    first.knows(second)
    first.transfer("WRITE", [source[:]], [target[:]], second, b"hello")
    second.receives(b"hello", sender=first)
    target.check(1)


@pytest.mark.ours
@pytest.mark.parametrize("initiator", ["ours", "stock"])
def test_talks_to_the_stock_plugin(bed, initiator):
    """An agent with our plugin and one with NIXL's own, both ways."""
    hosts = {"ours": Host("ours"), "stock": Host("stock")}
    other = "stock" if initiator == "ours" else "ours"
    first = bed.agent(initiator, hosts[initiator], progress_thread=True)
    second = bed.agent(other, hosts[other], progress_thread=True)
    first.knows(second), second.knows(first)
    source, target, back = first.buffer(5 * MIB, seed=1), second.buffer(5 * MIB), first.buffer(5 * MIB)
    first.knows(second)
    for turn in range(5):
        source.fill(turn)
        first.transfer("WRITE", [source[:]], [target[:]], second, b"w" * 50_000)
        second.receives(b"w" * 50_000, sender=first)
        target.check(turn)
        first.transfer("READ", [back[:]], [target[:]], second, b"r")
        second.receives(b"r", sender=first)
        back.check(turn)
        second.call("send", first.name, b"word" * 10_000)
        first.receives(b"word" * 10_000, sender=second)
