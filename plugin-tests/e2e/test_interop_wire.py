"""What the stock plugin puts on the wire, and what ours makes of peers whose extension it does not know."""

import os
import struct

import pytest

from bed.agent import Refused
from bed.places import ROOT, Host
from bed.raw import RawReceiver, blob, endpoint_name, field, nested
from test_hostile import HANDSHAKE, handshake, immediate, throw
from test_interop import LIBFABRICS, MIB, STOCK_VERSIONS, exchange

pytestmark = pytest.mark.ours
FIXTURES = ROOT / "plugin-tests" / "fixtures" / "stock-wire"
LONG = bytes(range(1, 251)) * 36


@pytest.fixture
def libfabric():
    return LIBFABRICS[0]


def capture(bed, nixl):
    """Lines "<what> <immediate> <bytes>" of everything that a stock agent says to a receiver that is no agent."""
    host = Host("stock", nixl, LIBFABRICS[0])
    stock, fake = (bed.agent(name, host, progress_thread=True) for name in ("stock", "fake"))
    source = stock.buffer(64 << 10, seed=1)
    memory = fake.buffer(64 << 10)
    raw = RawReceiver(bed.network.space(0), LIBFABRICS[0])
    try:
        metadata = fake.call("metadata")
        public = nested(metadata, b"key_0", b"addr")
        yield "connection_info", None, nested(metadata, b"num_rails", b"dest_data_ep_0")
        yield "public_metadata", None, public
        # The fake agent's metadata, with the raw receiver's endpoint and memory in it.
        there = struct.pack("<Q", raw.address)
        metadata = metadata.replace(public, blob(field(b"key_0", struct.pack("<Q", raw.key)), field(b"addr", there)))
        metadata = metadata.replace(struct.pack("<Q", memory.address), there).replace(endpoint_name(metadata), raw.name[:16])
        memory.address = raw.address

        stock.call("add_remote", metadata)
        yield "handshake_with_conn", *raw.events(1)[0][1:]
        throw(bed, stock, [(immediate(HANDSHAKE), handshake(index=7, name=fake.name.encode()))])
        stock.call("send", fake.name, b"alone")
        yield "alone", *raw.events(1)[0][1:]
        stock.call("send", fake.name, LONG)
        for _, data, body in raw.events(2):
            yield "long", data, body
        parts = [slice(start, start + 100) for start in (0, 1000, 5000)]
        for operation, expected in (("WRITE", 4), ("READ", 1)):
            stock.transfer(operation, [source[part] for part in parts], [memory[part] for part in parts], fake, b"over")
            for kind, data, body in raw.events(expected):
                yield f"{operation.lower()}_{kind}", data, body
        # One who brings its connection info is answered without.
        info = blob(field(b"num_rails", b"1"), field(b"dest_data_ep_0", raw.name.ljust(56, b"\0")))
        throw(bed, stock, [(immediate(HANDSHAKE), handshake(index=9, name=b"stranger", connection=info))])
        yield "handshake_without_conn", *raw.events(1)[0][1:]
    finally:
        raw.close()


@pytest.mark.parametrize("nixl", STOCK_VERSIONS)
def test_the_stock_plugin_sends_what_the_fixtures_say(bed, nixl):
    """The fixtures are what tests/wire_golden.rs reads. WRITE_FIXTURES=1 writes them anew."""
    found = list(capture(bed, nixl))
    file = FIXTURES / f"nixl-{nixl}.txt"
    if "WRITE_FIXTURES" in os.environ:
        lines = [f"{what} {'-' if data is None else f'{data:x}'} {body.hex() or '-'}" for what, data, body in found]
        file.write_text(f"# What nixl-cu12 {nixl}'s own LIBFABRIC plugin sends over tcp: what, immediate data, bytes.\n" + "\n".join(lines) + "\n")
    kept = [line.split() for line in file.read_text().splitlines() if not line.startswith("#")]

    # Ports, addresses, numbers and the order of writes differ from run to run; their places and lengths do not.
    def shapes(lines):
        return sorted((what, len(body)) for what, body in lines)

    assert shapes((what, body) for what, _, body in found) == shapes((what, b"" if text == "-" else bytes.fromhex(text)) for what, _, text in kept)


def of_later_version(metadata):
    """An agent's metadata with an extension of version 9."""
    mark = b"nlf_ext" + metadata[metadata.index(b"nlf_ext") + 7 :][:8]
    return metadata.replace(mark + struct.pack("<H", 1), mark + struct.pack("<H", 9))


@pytest.mark.parametrize("who", ["one", "both"])
def test_an_extension_of_a_later_version_means_the_stock_wire(bed, progress, who):
    """Two of ours, of which one or both see an extension that they do not know: they get on all the same."""
    host = Host(extra=(("NIXL_LOG_LEVEL", "DEBUG"),))
    first, second = (bed.agent(name, host, progress_thread=progress) for name in ("first", "second"))
    source, target = first.buffer(MIB, seed=1), second.buffer(MIB)
    metadata = [agent.call("metadata") for agent in (first, second)]
    # The second hears of the first by its metadata before the first's own hello.
    second.stop()
    first.call("add_remote", of_later_version(metadata[1]))
    second.begin("add_remote", of_later_version(metadata[0]) if who == "both" else metadata[0])
    second.resume()
    second.finish()
    assert f"{second.name} has 1 rails" in first.log_text()
    assert first.log_text().count("reads the stock plugin's wire") == 1
    for turn in range(3):
        source.fill(turn)
        first.transfer("WRITE", [source[:]], [target[:]], second, b"w" * 20_000)
        second.receives(b"w" * 20_000, sender=first)
        target.check(turn)
        for one, peer in ((first, second), (second, first)):
            one.call("send", peer.name, b"word" * 5000)
            peer.receives(b"word" * 5000, sender=one)


def strangers(agent, count, change=lambda metadata: metadata):
    """Metadata of agents that do not exist: like `agent`'s, with other names and ports that nobody listens on."""
    metadata, name = agent.call("metadata"), agent.name.encode()
    endpoint = endpoint_name(metadata)
    for number in range(count):
        other_name = b"%0*d" % (len(name), number)
        other_endpoint = endpoint[:2] + struct.pack(">H", 1 + number) + endpoint[4:]
        yield other_name.decode(), change(metadata.replace(name, other_name).replace(endpoint, other_endpoint))


def add_all(worker, blobs):
    """Adds them all; returns how many were refused."""
    refused = 0
    for metadata in blobs:
        try:
            worker.add_remote(metadata)
        except Exception:
            refused += 1
    return refused


def test_more_than_256_peers(bed, progress):
    """300 peers that do not exist, and then one that does: it gets an index beyond what the stock wire holds."""
    first = bed.agent("first", progress_thread=progress)
    model, real = bed.agent("model", progress_thread=True), bed.agent("real", progress_thread=progress)
    assert first.run(add_all, [metadata for _, metadata in strangers(model, 300)]) == 0
    first.knows(real), real.knows(first)
    exchange(first, real, turns=2)
    exchange(real, first, turns=1)


def test_at_most_255_stock_peers(bed, progress):
    """The stock wire tells 255 peers apart: the next is refused, says why, and may come when another has gone."""
    first = bed.agent("first", progress_thread=progress)
    model, real = bed.agent("model", progress_thread=True), bed.agent("real", Host("stock"), progress_thread=True)
    blobs = dict(strangers(model, 255, of_later_version))
    assert first.run(add_all, list(blobs.values())) == 0
    with pytest.raises(Refused):
        first.call("add_remote", real.call("metadata"))
    assert "255 peers" in first.log_text()
    first.call("remove_remote", next(iter(blobs)))
    first.knows(real), real.knows(first)
    exchange(first, real, turns=1)


def test_a_failed_transfer_is_announced(bed, progress):
    """The memory is gone when the write comes: the sender fails, the receiver's user hears nothing, and both go on."""
    first, second = bed.pair(progress_thread=progress)
    source, target, gone = first.buffer(MIB, seed=1), second.buffer(MIB), second.buffer(8 * MIB)
    wide = first.buffer(8 * MIB, seed=2)
    first.knows(second)
    handles = [first.prepare("WRITE", [wide[:]], [gone[:]], second, b"never") for _ in range(3)]
    second.call("deregister", gone.region)
    for handle in handles:
        with pytest.raises(Refused):
            first.call("post", handle, b"never")
            first.call("wait", handle, 20)
        first.call("release", handle)
    for turn in range(3):
        source.fill(turn)
        first.transfer("WRITE", [source[:]], [target[:]], second, b"after")
        second.receives(b"after", sender=first)
        target.check(turn)
