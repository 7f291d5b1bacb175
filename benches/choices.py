"""What the benches can be asked to compare: plugins by name or folder, and networks. Shared by compare.py and cost.py."""

import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "plugin-tests" / "e2e"))

from bed.places import NEWEST_LIBFABRIC, NIXL_VERSIONS, TARGET, Host  # noqa: E402

PLUGIN_FILE = "libplugin_LIBFABRIC.so"
NETWORKS = ("tcp", "efa")
RAILS_MAX = 32
# The software device's disorder and held operations are for tests; here they would be measured.
STRAIGHT = "hold_pct=0 pieces=1 shuffle=0"


@dataclass(frozen=True)
class Plugin:
    """`kind` is what bed.places calls it: ours, stock or ucx; `folder` has its file, UCX's is the wheel's own."""

    name: str
    kind: str
    folder: Path | None

    @property
    def file(self):
        return self.folder / PLUGIN_FILE

    def host(self, *extra):
        chosen = (("NIXL_PLUGIN_DIR", str(self.folder)),) if self.kind == "ours" else ()
        return Host(self.kind, extra=(*chosen, *extra))


def plugin_named(text):
    """`ours`, `stock`, `ucx`, a folder with another build of ours, or such a folder with a name: `before=FOLDER`."""
    if text == "ucx":
        return Plugin(text, text, None)
    if text == "stock":
        folder = TARGET / "nixl" / NIXL_VERSIONS[0] / ".nixl_cu12.mesonpy.libs" / "plugins"
        return Plugin(text, text, folder.resolve())
    name, _, folder = text.partition("=")
    if text == "ours":
        folder = os.environ.get("PLUGIN_DIR", TARGET / "plugins")
    plugin = Plugin(name, "ours", Path(folder or name).resolve())
    if not plugin.file.is_file():
        raise SystemExit(f"benches: '{text}': there is no {plugin.file}; a plugin is ours, stock, ucx, "
                         f"a folder with {PLUGIN_FILE}, or NAME=FOLDER")
    return plugin


def network_and_rails(text):
    """`tcp:2` is two interfaces of a network namespace, `efa:4` four software EFA devices; `tcp` is `tcp:1`."""
    name, colon, rails = text.partition(":")
    rails = rails if colon else "1"
    if name not in NETWORKS or not rails.isdigit() or not 1 <= int(rails) <= RAILS_MAX:
        raise SystemExit(f"benches: there is no network '{text}': {' or '.join(NETWORKS)}, a colon, and 1 to {RAILS_MAX} rails, such as efa:4")
    return name, int(rails)


def machine():
    """What every table says of where and on what it was measured."""
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "?")
    return {
        "time": time.strftime("%Y-%m-%d"), "processor": model, "cores": os.cpu_count(), "kernel": platform.release(),
        "nixl": NIXL_VERSIONS[0], "libfabric": NEWEST_LIBFABRIC,
    }
