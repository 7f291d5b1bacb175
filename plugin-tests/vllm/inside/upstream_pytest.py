"""A plugin for pytest, loaded into vLLM's own tests: the backend that they use, which agents they build, and what came of it.

    UPSTREAM_BACKEND    the backend of a connector whose configuration names none; vLLM's own default is UCX
    UPSTREAM_AGENTS     fake: as vLLM has it; real: NIXL's own agent wherever a test puts vLLM's fake one
    UPSTREAM_RESULTS    a file for the outcomes, the backends of every agent built, and the plugins that the process has mapped
"""

import gc
import json
import os
import sys
import types
from pathlib import Path

import pytest

BACKEND = os.environ["UPSTREAM_BACKEND"]
REAL = os.environ["UPSTREAM_AGENTS"] == "real"
RESULTS = Path(os.environ["UPSTREAM_RESULTS"])

# One test starts Ray, on a GPU; the rest of the file needs only to import it.
sys.modules.setdefault("ray", types.ModuleType("ray"))
NEEDS_RAY = "[ray]"

tests = {}
built = []


def use_backend():
    from vllm.config import KVTransferConfig

    plain = KVTransferConfig.get_from_extra_config

    def with_backend(self, key, default):
        return plain(self, key, [BACKEND] if key == "backends" else default)

    KVTransferConfig.get_from_extra_config = with_backend


def count_agents():
    from nixl._api import nixl_agent

    plain = nixl_agent.__init__

    def counted(self, *arguments, **options):
        plain(self, *arguments, **options)
        built.append(sorted(self.backends))

    nixl_agent.__init__ = counted
    return nixl_agent


def pytest_collection_modifyitems(config, items):
    left_out = [item for item in items if item.name.endswith(NEEDS_RAY)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    use_backend()
    agent = count_agents()
    for item in items if REAL else ():
        for patching in getattr(item.obj, "patchings", ()):
            if patching.new is getattr(item.module, "FakeNixlWrapper", None):
                patching.new = agent
    # Every test ends with a collection of garbage: what has been imported by now need not be looked through each time. vLLM
    # thaws it at the end of each test, which would undo that.
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    built.clear()
    tests[item.nodeid] = {"outcome": "passed"}
    result = yield
    tests[item.nodeid]["agents"] = list(built)
    return result


def pytest_runtest_logreport(report):
    """Of preparation, call and end, all must pass."""
    if report.outcome != "passed":
        tests[report.nodeid]["outcome"] = report.outcome


def pytest_sessionfinish():
    fields = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    files = sorted({field[5] for field in fields if len(field) == 6 and field[5].startswith("/")})
    RESULTS.write_text(json.dumps({"tests": tests, "files": files}))


def pytest_unconfigure():
    """UCX crashes in its destructors at the end of a process with many agents."""
    if BACKEND == "UCX":
        sys.stdout.flush()
        os._exit(0)
