"""Metrics: what the endpoint says is what was moved, while it moves; nothing that happens to the endpoint hurts the backend."""

import json
import re
import shutil
import socket
import subprocess

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bed.agent import Refused
from bed.places import TARGET

pytestmark = [pytest.mark.ours, pytest.mark.tcp]
MIB = 1 << 20
ROOT = TARGET.parent
TOOL = TARGET / "release" / "nixl-libfabric"
PREFIX = "nixl_libfabric_"


def place(agent):
    """Where the log says that the metrics are."""
    return re.search(r"metrics are served at (\S+)", agent.log_text()).group(1)


def inside(agent, bed, *command, check=True):
    """Runs a command in the agent's network namespace."""
    space = bed.network.space(0)
    return subprocess.run([*space.enter(), *map(str, command)], check=check, capture_output=True, text=True, timeout=60)


FETCH = """
import socket, sys
where = sys.argv[1]
if where.startswith("/"):
    s = socket.socket(socket.AF_UNIX); s.connect(where)
else:
    host, _, port = where.rpartition(":"); s = socket.create_connection((host, int(port)), 30)
s.settimeout(30)
s.sendall(b"GET /metrics HTTP/1.1\\r\\nHost: x\\r\\nAccept-Encoding: gzip\\r\\n\\r\\n")
answer = b""
while part := s.recv(65536):
    answer += part
sys.stdout.write(answer.decode())
"""


def scrape(agent, bed):
    head, _, body = inside(agent, bed, "python3", "-c", FETCH, place(agent)).stdout.partition("\n\n")
    assert head.startswith("HTTP/1.1 200 ") and "version=0.0.4" in head
    return body


def numbers(text):
    """Samples by name and labels, read by Prometheus' own parser."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name.removeprefix(PREFIX), frozenset(sample.labels.items())
            assert key not in found, f"{key} stands there twice"
            found[key] = sample.value
    return found


def total(samples, metric, **labels):
    return sum(value for (name, has), value in samples.items() if name == metric and labels.items() <= dict(has).items())


def move(first, second, bed):
    """Three writes and two reads of different sizes; gives what `first` must have counted."""
    source, target = first.buffer(8 * MIB, seed=1), second.buffer(8 * MIB)
    first.knows(second)
    for size in (4096, MIB, 8 * MIB):
        first.transfer("WRITE", [source[:size]], [target[:size]], second, b"n")
    target.check(1)
    back = first.buffer(2 * MIB)
    for _ in range(2):
        first.transfer("READ", [back[:]], [target[: 2 * MIB]], second)
    second.receives(b"n", b"n", b"n", sender=first)
    return {"write": 4096 + 9 * MIB, "read": 4 * MIB}


@pytest.mark.parametrize("where", ["127.0.0.1:0", "socket"])
def test_counters_are_what_was_moved(bed, progress, tmp_path, where):
    where = f"{tmp_path}/%p.sock" if where == "socket" else where
    first, second = bed.pair(progress_thread=progress, metrics=where)
    moved = move(first, second, bed)
    samples = numbers(scrape(first, bed))
    for op, size in moved.items():
        assert total(samples, "rail_bytes_total", op=op) == size
        assert total(samples, "peer_bytes_total", op=op, peer=second.name) == size
    assert total(samples, "transfer_seconds_count", op="write", size="64KiB") == 1
    assert total(samples, "transfer_seconds_count", op="write") == total(samples, "peer_transfers_total", op="write") == 3
    assert total(samples, "transfer_seconds_count", op="read", size="64MiB") == 2
    assert 0 < total(samples, "transfer_seconds_sum", op="write") < 60
    assert total(samples, "rail_operations_total", op="write") >= 3
    assert total(samples, "rail_operations_in_flight") == 0 < total(samples, "rail_window_operations")
    assert total(samples, "rail_messages_total", direction="out") >= 3
    assert total(samples, "peers") == total(samples, "peer_ready") == total(samples, "healthy") == 1
    assert not any(total(samples, name) for name in ("rail_errors_total", "transfer_errors_total", "deadlines_total"))
    assert {dict(labels)["agent"] for _, labels in samples} == {first.name}
    # The other side was passed by.
    theirs = numbers(scrape(second, bed))
    assert total(theirs, "rail_bytes_total") == 0 and total(theirs, "rail_messages_total", direction="in") >= 3


def test_scrapes_while_transfers_run(bed):
    first, second = bed.pair(progress_thread=True, metrics="127.0.0.1:0")
    source, target = first.buffer(64 * MIB, seed=1), second.buffer(64 * MIB)
    first.knows(second)
    before, seen = -1, 0
    for _ in range(5):
        handle = first.prepare("WRITE", [source[:]], [target[:]], second)
        first.call("post", handle, b"")
        now = total(numbers(scrape(first, bed)), "rail_bytes_total", op="write")
        assert now >= before
        before, seen = now, seen + 1
        assert first.call("wait", handle, 60, deadline=90) == "DONE"
        first.call("release", handle)
    assert total(numbers(scrape(first, bed)), "rail_bytes_total", op="write") == seen * 64 * MIB
    target.check(1)


def test_failed_transfers_are_counted(bed):
    first, second = bed.pair(progress_thread=True, metrics="127.0.0.1:0", connect_timeout_ms=1000)
    source, target = first.buffer(MIB, seed=1), second.buffer(MIB)
    first.knows(second)
    first.transfer("WRITE", [source[:]], [target[:]], second)
    second.kill()
    handle = first.prepare("WRITE", [source[:]], [target[:]], second)
    with pytest.raises(Refused):
        first.call("post", handle, b"")
        first.call("wait", handle, 60, deadline=90)
    samples = numbers(scrape(first, bed))
    assert total(samples, "transfer_errors_total") == total(samples, "peer_errors_total") == 1
    assert total(samples, "transfer_seconds_count", op="write") == 1
    assert total(samples, "rail_errors_total") + total(samples, "deadlines_total", option="connect_timeout_ms") >= 1


@pytest.mark.parametrize("where", ["127.0.0.1:0", "socket"])
def test_top_shows_a_process(bed, tmp_path, where):
    where = f"{tmp_path}/%p.sock" if where == "socket" else where
    first, second = bed.pair(progress_thread=True, metrics=where)
    moved = move(first, second, bed)
    pid = first.process.pid
    shown = json.loads(inside(first, bed, TOOL, "top", pid, "--once", "--json").stdout)
    (agent,) = shown["agents"]
    assert (agent["agent"], agent["healthy"], agent["provider"]) == (first.name, True, "tcp")
    counters = [rail["counters"] for rail in agent["rails"]]
    for op, size in moved.items():
        assert sum(rail[f"{op}_bytes"]["total"] for rail in counters) == size
    (peer,) = agent["peers"]
    assert peer["peer"] == second.name and peer["ready"] and peer["counters"]["transfers"]["total"] == 5
    table = inside(first, bed, TOOL, "top", place(first), "--once").stdout
    assert first.name in table and second.name in table and "write GB/s" in table


def test_top_says_what_to_set(bed):
    agent = bed.agent("silent")
    done = inside(agent, bed, TOOL, "top", agent.process.pid, "--once", check=False)
    assert done.returncode == 2 and "NIXL_LIBFABRIC_METRICS=127.0.0.1:0" in done.stderr
    assert "nixl-metrics" not in threads(agent), "off is off"


def threads(agent):
    listed = subprocess.run(["sh", "-c", f"cat /proc/{agent.process.pid}/task/*/comm"], check=True, capture_output=True, text=True)
    return listed.stdout.split()


def test_a_port_in_use_is_a_warning_and_the_next_of_a_range_is_taken(bed):
    first = bed.agent("first", progress_thread=True, metrics="127.0.0.1:9400")
    second = bed.agent("second", progress_thread=True, metrics="127.0.0.1:9400")
    third = bed.agent("third", progress_thread=True, metrics="127.0.0.1:9400-9403")
    (line,) = (line for line in second.log_text().splitlines() if "no metrics are served" in line)
    assert "WARN" in line and "127.0.0.1:9400 cannot be listened on" in line
    assert place(third) == "127.0.0.1:9401"
    source, target = first.buffer(MIB, seed=1), second.buffer(MIB)
    first.knows(second), second.knows(first)
    first.transfer("WRITE", [source[:]], [target[:]], second)
    target.check(1)
    assert "nixl-metrics" in threads(first) and "nixl-metrics" not in threads(second)


def two_agents(worker, folder):
    """Runs in the agent's process: a second agent beside it; both at one endpoint, which ends with the last."""
    import os

    from bed.worker import load_nixl

    nixl = load_nixl()
    other = nixl.nixl_agent("beside", nixl.nixl_agent_config(enable_prog_thread=True, backends=[]))
    other.create_backend(worker.backend, {"metrics": f"{folder}/m.sock"})
    found = []
    for _ in range(2):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{folder}/m.sock")
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            text = b"".join(iter(lambda: client.recv(65536), b"")).decode()
        found.append(sorted(set(re.findall(r'healthy\{agent="([^"]+)"', text))))
        other = None
    worker.agent = None
    return found, os.path.exists(f"{folder}/m.sock")


def test_agents_of_a_process_share_an_endpoint(bed, tmp_path):
    agent = bed.agent("shared", progress_thread=True, metrics=f"{tmp_path}/m.sock")
    found, is_left = agent.run(two_agents, str(tmp_path))
    assert found == [sorted(["beside", agent.name]), [agent.name]] and not is_left


def test_what_prometheus_would_say(bed):
    """promtool, where it is installed."""
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("no promtool here")
    first, second = bed.pair(progress_thread=True, metrics="127.0.0.1:0")
    move(first, second, bed)
    done = subprocess.run([promtool, "check", "metrics"], input=scrape(first, bed), capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr


def test_the_dashboard_asks_for_what_there_is(bed):
    first, second = bed.pair(progress_thread=True, metrics="127.0.0.1:0")
    move(first, second, bed)
    samples = numbers(scrape(first, bed))
    labels = {}
    for name, has in samples:
        labels.setdefault(name, set()).update(dict(has))
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    asked = set()
    for query in queries:
        names = re.findall(rf"\b{PREFIX}(\w+)", query)
        assert names, query
        asked.update(names)
        by = {label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")}
        selected = set(re.findall(r"(\w+)=~?\"", query))
        for name in names:
            assert name in labels, f"no {name} in the answer: {query}"
            assert by | selected <= labels[name], f"{name} lacks {(by | selected) - labels[name]}: {query}"
    # What is not on the dashboard is so on purpose.
    families = {name.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum") for name in labels}
    shown = {name.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum") for name in asked}
    assert families - shown == {"rail_messages_total", "rail_immediates_total", "malformed_messages_total", "peer_transfers_total", "peer_errors_total"}
