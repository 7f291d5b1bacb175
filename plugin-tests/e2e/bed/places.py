"""Where things lie, and the environment that a process needs to load a given plugin in a given NIXL."""

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path

BED = Path(__file__).resolve().parent
ROOT = BED.parents[2]
# Another folder of the same shape is how agents run on another processor: plugin-tests/arm64.
TARGET = Path(os.environ.get("E2E_TARGET", ROOT / "target"))
PYTHON = TARGET / "venv" / "bin" / "python"
VERSIONS = tomllib.loads((ROOT / "plugin-tests" / "setup" / "versions.toml").read_text())
NIXL_VERSIONS = VERSIONS["nixl"]["versions"]
LIBFABRIC_VERSIONS = ["system", *VERSIONS["libfabric"]]
NEWEST_LIBFABRIC = LIBFABRIC_VERSIONS[-1]

PLUGINS = ("ours", "stock", "ucx")


@dataclass(frozen=True)
class Host:
    """What an agent's process runs on: which plugin, in which NIXL, over which libfabric."""

    plugin: str = "ours"
    nixl: str = NIXL_VERSIONS[0]
    libfabric: str = NEWEST_LIBFABRIC
    # Extra environment, as pairs: a frozen class holds no dict.
    extra: tuple = ()

    @property
    def backend(self):
        return "UCX" if self.plugin == "ucx" else "LIBFABRIC"

    def library_path(self):
        folders = []
        if self.libfabric != "system":
            folders.append(TARGET / "libfabric" / self.libfabric)
        if self.plugin == "stock":
            # The stock plugin links these two; ours asks for neither.
            (python,) = (TARGET / "venv" / "lib").glob("python3*")
            folders.append(python / "site-packages" / "nvidia" / "cuda_runtime" / "lib")
            folders.append(TARGET / "standin")
        return folders

    def environment(self):
        site = TARGET / "nixl" / self.nixl
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("NIXL_", "FI_", "UCX_"))}
        environment |= {
            "PYTHONPATH": f"{site}:{BED.parent}:{ROOT / 'benches'}",
            "LD_LIBRARY_PATH": ":".join(map(str, self.library_path())),
            "NIXL_LOG_LEVEL": "INFO",
            "PYTHONUNBUFFERED": "1",
        }
        if self.plugin == "ours":
            environment["NIXL_PLUGIN_DIR"] = os.environ.get("PLUGIN_DIR", str(TARGET / "plugins"))
            # All agents of the bed are on one host, and most tests are about the network. An option of an agent beats it.
            environment["NIXL_LIBFABRIC_SAME_HOST"] = "off"
        if self.plugin == "ucx":
            # Its default between processes of one host is shared memory: tcp is the like-for-like comparison.
            environment |= {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}
        return environment | dict(self.extra)
