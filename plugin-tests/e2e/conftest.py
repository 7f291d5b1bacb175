"""Options and fixtures. `pytest plugin-tests/e2e --plugin stock` runs the same scenarios on NIXL's own LIBFABRIC plugin."""

import itertools

import pytest

from bed.agent import Agent
from bed.networks import LoopbackOnly, OneHost, TwoHosts
from bed.places import LIBFABRIC_VERSIONS, NEWEST_LIBFABRIC, NIXL_VERSIONS, PLUGINS, TARGET, Host
from bed.softefa import SoftEfa

NETWORKS = ("tcp", "efa", "efa-direct")


def pytest_addoption(parser):
    group = parser.getgroup("nixl")
    group.addoption("--plugin", choices=PLUGINS, default="ours", help="which plugin the agents load")
    group.addoption("--nixl", choices=NIXL_VERSIONS, default=NIXL_VERSIONS[0], help="version of the nixl-cu12 wheel")
    group.addoption("--network", choices=NETWORKS, default="tcp", help="tcp over Ethernet links, or a fabric of software EFA devices")
    group.addoption("--devices", type=int, default=4, help="EFA devices of each host")
    group.addoption("--topology", default="p5.48xlarge", help="instance type that the EFA devices are of; a p4d.24xlarge cannot write")
    group.addoption("--shm", action="store_true", help="let the efa provider have its shared memory, which is its default")
    group.addoption("--same-host", action="store_true", help="let agents reach each other's host memory without a network, which is their default")
    group.addoption("--seed", type=int, default=1, help="decides order and faults of the EFA devices")
    group.addoption("--libfabric", default=NEWEST_LIBFABRIC,
                    help=f"comma-separated versions, or 'all': {', '.join(LIBFABRIC_VERSIONS)}")


def pytest_configure(config):
    if config.option.basetemp is None:
        # The agents' logs of a failed test stay here until the next run.
        logs = TARGET / "e2e"
        logs.mkdir(parents=True, exist_ok=True)
        config.option.basetemp = logs / f"{config.getoption('plugin')}-{config.getoption('network')}"
    config.addinivalue_line("markers", "ours: speaks of what only our plugin has; skipped with the others")
    config.addinivalue_line("markers", "tcp: speaks of Ethernet links or of libfabric's tcp; skipped on other networks")
    config.addinivalue_line("markers", "efa: speaks of EFA devices; skipped on other networks")
    config.addinivalue_line("markers", "stock_fails(why): the stock plugin is known to fail this; expected there")
    config.addinivalue_line("markers", "ucx_fails(why): the same for UCX")


def pytest_collection_modifyitems(config, items):
    plugin, network = config.getoption("plugin"), config.getoption("network")
    for item in items:
        if plugin != "ours" and item.get_closest_marker("ours"):
            item.add_marker(pytest.mark.skip(reason="speaks of our plugin only"))
        if item.get_closest_marker("efa" if network == "tcp" else "tcp"):
            item.add_marker(pytest.mark.skip(reason=f"does not speak of --network {network}"))
        known = item.get_closest_marker(f"{plugin}_fails")
        if known:
            item.add_marker(pytest.mark.xfail(reason=known.args[0], strict=False))


def pytest_generate_tests(metafunc):
    if "libfabric" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("libfabric")
        versions = LIBFABRIC_VERSIONS if wanted == "all" else wanted.split(",")
        metafunc.parametrize("libfabric", versions, ids=[f"libfabric-{version}" for version in versions])


@pytest.fixture
def host(request, libfabric):
    option = request.config.getoption
    extra = (("NIXL_LIBFABRIC_SAME_HOST", "auto"),) if option("same_host") else ()
    return Host(option("plugin"), option("nixl"), libfabric, extra)


@pytest.fixture(scope="session")
def one_host():
    network = OneHost(links=1)
    yield network
    network.close()


@pytest.fixture(scope="session")
def loopback_only():
    network = LoopbackOnly()
    yield network
    network.close()


@pytest.fixture(scope="session")
def wired_host():
    """One host with two Ethernet interfaces."""
    network = OneHost(links=2)
    yield network
    network.close()


@pytest.fixture(scope="session")
def two_hosts():
    """Two hosts joined by two Ethernet links: agents are placed on them in turn."""
    network = TwoHosts(links=2)
    yield network
    network.close()


class Bed:
    """Makes agents and, at the end of the test, sees each of them off."""

    names = itertools.count(1)

    def __init__(self, host, network, folder):
        self.host, self.network, self.folder = host, network, folder
        self.agents = []

    def process(self, name="agent", host=None, network=None, wrap=()):
        """A process in which no agent was created yet."""
        name = f"{name}-{next(self.names)}"
        space = (network or self.network).space(len(self.agents))
        agent = Agent(name, host or self.host, space, self.folder / f"{name}.log", wrap)
        self.agents.append(agent)
        return agent

    def agent(self, name="agent", host=None, network=None, **options):
        return self.process(name, host, network).create(**options)

    def pair(self, host=None, network=None, **options):
        """Two agents that know each other."""
        first = self.agent("first", host, network, **options)
        second = self.agent("second", host, network, **options)
        return first.knows(second), second.knows(first)

    def close(self):
        """Every agent that still runs must go in peace: it is destroyed and its process ends with status 0."""
        statuses = {}
        for agent in self.agents:
            if agent.process.poll() is None and not agent.hangs and not agent.stopped:
                try:
                    statuses[agent.name] = agent.close()
                finally:
                    agent.process.kill()
        assert all(status == 0 for status in statuses.values()), f"exit statuses: {statuses}"


@pytest.fixture
def efa(request):
    """A network of software EFA devices, new for each test: no fault and no counter of another test is in it."""
    option = request.config.getoption
    network = SoftEfa(option("devices"), option("network"), option("topology"), seed=option("seed"), shm=option("shm"))
    yield network
    network.close()


@pytest.fixture
def network(request):
    """What agents are on unless their test places them itself."""
    return request.getfixturevalue("one_host" if request.config.getoption("network") == "tcp" else "efa")


@pytest.fixture
def bed(host, network, tmp_path):
    bed = Bed(host, network, tmp_path)
    try:
        yield bed
        bed.close()
    finally:
        for agent in bed.agents:
            agent.process.kill()


@pytest.fixture(params=[False, True], ids=["progress-off", "progress-on"])
def progress(request):
    return request.param
