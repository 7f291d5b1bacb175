"""Options: what is set is what is used, and what cannot be used is refused in words."""

import pytest

from bed.agent import Refused
from bed.places import Host

pytestmark = pytest.mark.ours
MIB = 1 << 20


def errors(agent):
    return [line for line in agent.log_text().splitlines() if "ERROR" in line]


@pytest.mark.parametrize(
    ("key", "value"),
    [("cq_entries", "lots"), ("spin_us", "-1"), ("chunk_bytes_max", "3"), ("require_rdma", "maybe"), ("fabric", "ethernet"),
     ("connect_timeout_ms", "99999999999999999999"), ("max_rails", "1.5")],
)
def test_bad_value_is_refused(bed, key, value):
    """One error, naming the key and the value."""
    agent = bed.process("misconfigured")
    with pytest.raises(Refused):
        agent.create({key: value})
    (line,) = errors(agent)
    assert key in line and value in line


STOCK_VALUES = {"split_batch_size": "0", "num_threads": "9999", "post_queue_size": "0", "striping_threshold": "lots", "max_bw_per_dram_seg": "-1"}


@pytest.mark.tcp
def test_what_the_stock_plugin_starts_with_is_a_warning(bed):
    first, second = bed.pair(progress_thread=True, **STOCK_VALUES)
    source, target = first.buffer(4 * MIB, seed=1), second.buffer(4 * MIB)
    first.knows(second)
    first.transfer("WRITE", [source[:]], [target[:]], second, b"all")
    second.receives(b"all", sender=first)
    target.check(1)
    warnings = [line for line in first.log_text().splitlines() if "WARN" in line and "going on with" in line]
    assert sorted(key for line in warnings for key in STOCK_VALUES if key in line) == ["max_bw_per_dram_seg", "num_threads", "striping_threshold"]
    assert not errors(first)


def test_bad_value_in_the_environment_is_refused(bed):
    host = Host(libfabric=bed.host.libfabric, extra=(("NIXL_LIBFABRIC_MAX_RAILS", "many"),))
    agent = bed.process("misconfigured", host)
    with pytest.raises(Refused):
        agent.create()
    (line,) = errors(agent)
    assert "NIXL_LIBFABRIC_MAX_RAILS" in line and "many" in line


def test_unknown_option_is_named(bed):
    """A key that the plugin does not know is most likely a typing error: said, in a line, whatever comes of it."""
    agent = bed.process("mistyped")
    try:
        agent.create(striping_treshold=1)
    except Refused:
        pass
    assert "striping_treshold" in agent.log_text()


@pytest.mark.tcp
def test_one_summary_line(bed):
    agent = bed.agent()
    lines = [line for line in agent.log_text().splitlines() if "INFO" in line and "tcp" in line and "libfabric" in line.lower()]
    assert len(lines) == 1, agent.log_text()


@pytest.mark.tcp
def test_software_provider_is_a_warning(bed):
    agent = bed.agent()
    assert any("WARN" in line and "tcp" in line for line in agent.log_text().splitlines()), agent.log_text()


@pytest.mark.tcp
def test_chosen_provider_is_no_warning(bed):
    agent = bed.agent(provider="tcp")
    assert "WARN" not in agent.log_text()


@pytest.mark.tcp
def test_require_rdma_refuses_a_software_provider(bed):
    agent = bed.process("strict")
    with pytest.raises(Refused):
        agent.create(require_rdma="true")
    (line,) = errors(agent)
    assert "require_rdma" in line


@pytest.mark.tcp
@pytest.mark.parametrize("provider", ["efa", "nonsense"])
def test_missing_provider_is_refused(bed, provider):
    agent = bed.process("choosy")
    with pytest.raises(Refused):
        agent.create(provider=provider)
    (line,) = errors(agent)
    assert provider in line


@pytest.mark.tcp
def test_missing_device_is_refused(bed):
    agent = bed.process("choosy")
    with pytest.raises(Refused):
        agent.create(devices="rdmap79s0")
    (line,) = errors(agent)
    assert "rdmap79s0" in line and "eth0" in line, "names the option and what there is"


@pytest.mark.tcp
def test_fi_provider_keeps_its_meaning(bed):
    host = Host(libfabric=bed.host.libfabric, extra=(("FI_PROVIDER", "tcp"),))
    first, second = bed.pair(host=host, progress_thread=True)
    source, target = first.buffer(MIB, seed=1), second.buffer(MIB)
    first.knows(second)
    first.transfer("WRITE", [source[:]], [target[:]], second, b"tcp")
    second.receives(b"tcp", sender=first)
    target.check(1)


@pytest.mark.parametrize(
    "options",
    [{"chunk_bytes_max": 131072}, {"striping_threshold": 1}, {"split_batch_size": 1}, {"rails_per_device": 3}, {"rails_per_device": 16, "max_rails": 5},
     {"control_recv_buffers": 8, "control_send_buffers": 1}, {"wait": "sleep"}, {"wait": "fd", "spin_us": 0}, {"post_queue_size": 1, "split_batch_size": 16},
     {"num_threads": 3, "rails_per_device": 4}, {"cq_entries": 64}],
    ids=lambda options: "-".join(options),
)
def test_odd_settings_move_every_byte(bed, progress, options):
    """Settings at their limits change the speed, not the bytes."""
    first, second = bed.pair(progress_thread=progress, **options)
    count, block = 300, 40_000
    source, target = first.buffer(count * block, seed=1), second.buffer(count * block)
    back = first.buffer(count * block)
    first.knows(second)
    parts = [slice(index * block, (index + 1) * block) for index in range(count)]
    first.transfer("WRITE", [source[part] for part in parts], [target[part] for part in reversed(parts)], second, b"n" * 100_000)
    second.receives(b"n" * 100_000, sender=first)
    first.transfer("READ", [back[part] for part in reversed(parts)], [target[part] for part in parts], second)
    back.check(1)
    target.fill()
    first.transfer("WRITE", [source[:]], [target[:]], second, b"whole")
    second.receives(b"whole", sender=first)
    target.check(1)
