"""vLLM's own tests of its NIXL connector, run with UCX and with our plugin: what passes with UCX must pass with ours.

They come out of vLLM's source distribution, which is fetched when a case here needs them, from the package index that uv is
configured for. What runs in vLLM's Python is in `inside`: stand-ins for the models that the tests name, and a plugin for pytest
that makes them use the backend that is asked for.
"""

import hashlib
import json
import subprocess
import tarfile
import tomllib
import urllib.request

import setup
from cpus import CPUS
from engines import HERE, kv_config
from servers import Server

# Run by vLLM's Python.
INSIDE = HERE / "inside"
FOLDER = setup.FOLDER / "upstream"
TESTS = FOLDER / "source"
PYTHON_PACKAGES = FOLDER / "packages"
MODELS = FOLDER / "models"
SOURCES = f"vllm=={setup.VLLM}"
# Each without its dependencies: vLLM has those.
PACKAGES = ["pytest==9.2.0", "pluggy==1.7.0", "iniconfig==2.3.1", "tblib==3.2.2"]
# Of vLLM's tests, what is run and what that imports.
WANTED = (
    "pyproject.toml", "tests/__init__.py", "tests/ci_envs.py", "tests/conftest.py", "tests/utils.py", "tests/models/__init__.py",
    "tests/models/registry.py", "tests/models/utils.py", "tests/v1/__init__.py", "tests/v1/attention/__init__.py",
    "tests/v1/attention/utils.py", "tests/v1/kv_connector/__init__.py", "tests/v1/kv_connector/unit/",
    "tests/v1/kv_connector/nixl_integration/",
)
UNIT = "tests/v1/kv_connector/unit/test_nixl_connector.py"
EDGE = "tests/v1/kv_connector/nixl_integration/test_edge_cases.py"
PROXY = "tests/v1/kv_connector/nixl_integration/toy_proxy_server.py"

BACKENDS = {"ucx": "UCX", "ours": "LIBFABRIC"}
UNIT_DEADLINE_S = 3600
EDGE_DEADLINE_S = 600
PORTS = {"PREFILL_PORT": 8100, "DECODE_PORT": 8200, "PROXY_PORT": 8192}


# What is fetched


def sources(folder):
    """vLLM's source distribution; uv finds it in its index without building anything."""
    (folder / "wanted.txt").write_text(SOURCES + "\n")
    lock = folder / "pylock.toml"
    setup.uv("pip", "compile", "--quiet", "--no-deps", "--no-header", "--python", setup.PYTHON, "--format", "pylock.toml",
             "--output-file", lock, folder / "wanted.txt")
    (package,) = tomllib.loads(lock.read_text())["packages"]
    archive = folder / "vllm.tar.gz"
    urllib.request.urlretrieve(package["sdist"]["url"], archive)
    if hashlib.sha256(archive.read_bytes()).hexdigest() != package["sdist"]["hashes"]["sha256"]:
        raise SystemExit(f"setup: {SOURCES}: what was downloaded has not the checksum that the index names")
    return archive


def install(folder):
    folder.mkdir()
    archive = sources(folder)
    with tarfile.open(archive) as members:
        for member in members:
            name = member.name.partition("/")[2]
            if member.isfile() and name.startswith(WANTED):
                place = TESTS / name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(members.extractfile(member).read())
    archive.unlink()
    setup.uv("pip", "install", "--no-deps", "--python", setup.PYTHON, "--target", PYTHON_PACKAGES, *PACKAGES)
    setup.run(setup.PYTHON, INSIDE / "upstream_models.py", MODELS, setup.MODEL)


def provide():
    recipe = hashlib.sha256((INSIDE / "upstream_models.py").read_bytes() + repr(WANTED).encode()).hexdigest()[:16]
    setup.provide([(FOLDER, " ".join([SOURCES, *PACKAGES, recipe]), install)])


# The unit file


class Run:
    """The unit file in one process, with one backend; `agents` says whether the connectors have vLLM's fake or real agents."""

    def __init__(self, case, agents, plugin, only=()):
        again = "-again" if only else ""
        self.log, self.results = (case.folder / f"{agents}-{plugin}{again}.{kind}" for kind in ("log", "json"))
        settings = CPUS.environment(plugin, 5600) | {
            "PYTHONPATH": f"{TESTS}:{PYTHON_PACKAGES}:{INSIDE}", "HF_HOME": str(MODELS), "VLLM_CPU_KVCACHE_SPACE": "1",
            "UPSTREAM_BACKEND": BACKENDS[plugin], "UPSTREAM_AGENTS": agents, "UPSTREAM_RESULTS": str(self.results),
        }
        del settings["VLLM_ENABLE_V1_MULTIPROCESSING"]
        command = [
            *case.network.space(0).enter(), str(setup.PYTHON), "-m", "pytest", "-p", "upstream_pytest", "-p", "no:cacheprovider", "-v",
            *(only or [UNIT]),
        ]
        with open(self.log, "wb") as output:
            done = subprocess.run(
                command, env=settings, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=TESTS, timeout=UNIT_DEADLINE_S)
        if not self.results.exists():
            raise RuntimeError(f"pytest ended with {done.returncode} before its end; its log: {self.log}")
        found = json.loads(self.results.read_text())
        self.tests, self.files = found["tests"], found["files"]
        self.passed = {name for name, test in self.tests.items() if test["outcome"] == "passed"}

    def built(self, backend):
        """The tests that built a real agent with this backend."""
        return [name for name, test in self.tests.items() if any(backend in agent for agent in test["agents"])]


def unit(case):
    """First as vLLM has it: every connector has a fake agent. Then once more with NIXL's own agent wherever the fake was.

    Tests that look into the fake itself fail then, with any backend.
    """
    provide()
    compare(case, "fake")
    ours = compare(case, "real")
    file = str(setup.PLUGINS / "libplugin_LIBFABRIC.so")
    built = ours.built("LIBFABRIC")
    others = [path for path in ours.files if "/libplugin_" in path and path != file]
    case.proof("our file is mapped", ours.passed.intersection(built) and file in ours.files and not others,
               f"{len(built)} tests built agents with it, {len(ours.passed.intersection(built))} of them pass")


def compare(case, agents):
    """The run with ours, after one with UCX."""
    runs = {}
    for plugin in BACKENDS:
        case.say(f"{UNIT} with {agents} agents, {plugin}")
        runs[plugin] = Run(case, agents, plugin)
    ucx, ours = runs["ucx"], runs["ours"]
    worse, again = sorted(ucx.passed - ours.passed), ""
    if worse:
        # Some have limits of 0.1 s, which a busy machine breaks: a second try, by themselves.
        second = Run(case, agents, "ours", worse).passed
        again = f", and {len(second)} more at a second try"
        worse = sorted(set(worse) - second)
    case.proof(f"{agents} agents", ucx.passed and not worse, (
        f"{len(ours.tests)} tests, {len(ours.built('LIBFABRIC'))} with an agent: {len(ucx.passed)} pass with UCX, "
        f"{len(ours.passed)} with ours{again}" + (f"; worse: {shorten(worse)}" if worse else "")))
    if neither := sorted(ours.tests.keys() - ucx.passed - ours.passed):
        case.note(f"{agents} agents: neither", f"{len(neither)} pass with neither: {shorten(neither)}")
    return ours


def shorten(names, most=4):
    """Of names of tests in one file."""
    return ", ".join(name.partition("::")[2] for name in names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# The edge cases


def edge(case):
    """vLLM's test against two API servers and its own proxy, with a cache of prefixes: that is what its edges are about."""
    provide()
    outcomes = {plugin: edge_with(case, plugin) for plugin in BACKENDS}
    for plugin, (status, count, total, _) in outcomes.items():
        case.proof(f"passes with {plugin}", status == 0 and count > 0,
                   f"pytest ended with {status}; {count:.0f} transfers, {total:.0f} bytes together")
    mapped = outcomes["ours"][3]
    case.proof("our file is mapped", all(mapped), "in the worker's process of both servers")


def edge_with(case, plugin):
    """pytest's exit status, how many transfers there were and of how many bytes, and each server's processes that have our file."""
    case.say(f"{EDGE}, {plugin}: starting two API servers")
    inside = case.network.space(0).enter()
    folder = case.folder / plugin
    folder.mkdir()
    servers, helpers = [], []
    settings = CPUS.environment(plugin, 5600) | {name: str(port) for name, port in PORTS.items()} | {
        "PYTHONPATH": str(PYTHON_PACKAGES), "PREFILL_HOST": "127.0.0.1", "DECODE_HOST": "127.0.0.1", "PROXY_HOST": "127.0.0.1",
    }

    def run(name, *command):
        with open(folder / f"{name}.log", "wb") as output:
            return subprocess.Popen(
                [*inside, str(setup.PYTHON), *map(str, command)], env=settings, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                cwd=TESTS)

    try:
        for name, side_port in (("prefill", 5600), ("decode", 5601)):
            servers.append(Server(
                name, folder, kv_config("NixlConnector", "kv_both", BACKENDS[plugin]), side_port, inside, plugin,
                CPUS.options | {"enable_prefix_caching": True}))
        prefill, decode = (server.ready() for server in servers)
        helpers.append(run("relay", INSIDE / "relay.py", PORTS["PREFILL_PORT"], prefill.socket, PORTS["DECODE_PORT"], decode.socket))
        helpers.append(run("proxy", PROXY, "--port", PORTS["PROXY_PORT"], "--prefiller-hosts", "127.0.0.1", "--decoder-hosts", "127.0.0.1",
                           "--prefiller-ports", PORTS["PREFILL_PORT"], "--decoder-ports", PORTS["DECODE_PORT"]))
        wait = (f"import socket, time\nfor port in {list(PORTS.values())}:\n"
                "    while socket.socket().connect_ex(('127.0.0.1', port)):\n        time.sleep(0.1)")
        subprocess.run([*inside, str(setup.PYTHON), "-c", wait], check=True, timeout=EDGE_DEADLINE_S)
        test = run("pytest", "-m", "pytest", "-p", "no:cacheprovider", "-sv", "--noconftest", EDGE)
        helpers.append(test)
        status = test.wait(EDGE_DEADLINE_S)
        file = setup.PLUGINS / "libplugin_LIBFABRIC.so"
        count, total = (decode.metric(f"vllm:nixl_bytes_transferred_{part}") for part in ("count", "sum"))
        return status, count, total, [server.maps(file) for server in servers]
    finally:
        for helper in helpers:
            if helper.poll() is None:
                helper.kill()
            helper.wait(30)
        for server in servers:
            server.close()
