"""Which NIXL is installed, which of several `import nixl` would take, and where its plugins are.

A NIXL from a wheel is a package nixl_cu<N> with its libraries beside it:

    nixl_cu12/                               the Python package
    .nixl_cu12.mesonpy.libs/lib*.so          NIXL's own libraries
    .nixl_cu12.mesonpy.libs/plugins/         its plugins, in the folder that it takes without NIXL_PLUGIN_DIR
    nixl_cu12.libs/                          libraries that came with the wheel, UCX's among them

The package `nixl` holds no library: it imports one of them.
"""

import os
import re
import sys
from importlib.machinery import PathFinder

PACKAGE = re.compile(r"nixl_cu(\d+)")


class NotFound(Exception):
    """There is no NIXL here whose plugins could be linked."""


def installed():
    """The packages nixl_cu<N> on the path, newest CUDA first."""
    found = set()
    for entry in sys.path:
        try:
            found.update(name for name in os.listdir(entry or ".") if PACKAGE.fullmatch(name))
        except OSError:
            continue
    return sorted(found, key=_cuda_major, reverse=True)


def preferred():
    """The package that `import nixl` would take: one that is already imported, else that of torch's CUDA, else the newest."""
    packages = installed()
    if not packages:
        raise NotFound(
            "no NIXL is installed for this Python: pip install nixl-cu12 or nixl-cu13. Of a NIXL that was built from source, "
            "set NIXL_PLUGIN_DIR to a folder with its plugins and those of " + own_plugins()
        )
    for package in packages:
        if package in sys.modules:
            return package
    cuda = _torch_cuda_major()
    return next((package for package in packages if _cuda_major(package) == cuda), packages[0])


def find(package):
    """The folder of a package's libraries, with `plugins` in it."""
    # Not importlib.util.find_spec, which asks every finder, and so also the one that calls this.
    spec = PathFinder.find_spec(package)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        core = os.path.join(os.path.dirname(os.path.realpath(place)), f".{package}.mesonpy.libs")
        if os.path.isdir(os.path.join(core, "plugins")):
            return core
    raise NotFound(f"{package} has no folder .{package}.mesonpy.libs/plugins beside it: it is no NIXL of a wheel")


def own_plugins():
    """The folder with this package's two plugin files."""
    return os.path.join(os.path.dirname(os.path.realpath(__file__)), "plugins")


def _cuda_major(package):
    return int(PACKAGE.fullmatch(package).group(1))


def _torch_cuda_major():
    """CUDA version of torch, which NIXL follows, without importing it: that takes a second."""
    torch = sys.modules.get("torch")
    version = getattr(getattr(torch, "version", None), "cuda", None)
    if version is None:
        spec = PathFinder.find_spec("torch")
        try:
            with open(os.path.join(os.path.dirname(spec.origin), "version.py"), encoding="utf-8") as file:
                match = re.search(r"^cuda\b[^=]*= *'([^']+)'", file.read(), re.MULTILINE)
        except (AttributeError, TypeError, OSError):
            return None
        version = match and match.group(1)
    return int(version.split(".")[0]) if version else None
