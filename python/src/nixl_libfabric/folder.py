"""Makes the folder that NIXL_PLUGIN_DIR is to name: this plugin beside all others of one NIXL.

NIXL_PLUGIN_DIR replaces NIXL's own folder, and NIXL's plugins find their libraries by paths relative to where they are linked.
So the folder has the shape of the NIXL that it links to:

    nixl-libfabric-plugins/<key>/nixl/plugins      for NIXL_PLUGIN_DIR
    nixl-libfabric-plugins/<key>/nixl              NIXL's own libraries
    nixl-libfabric-plugins/<key>/nixl_cu<N>.libs   those that came with its wheel

It lies in the user's cache, or else among the temporary files: site-packages may be read-only, and what is there belongs to
pip. <key> stands for the links and where they lead. So a folder is never changed, processes may share it, and after an upgrade
there is another one.
"""

import hashlib
import os
import shutil
import tempfile

from nixl_libfabric import nixl

ROOT_NAME = "nixl-libfabric-plugins"
_TAIL = os.path.join("nixl", "plugins")


def is_ours(path):
    """Whether a value of NIXL_PLUGIN_DIR was made here, if perhaps on another machine or for another NIXL."""
    parts = os.path.normpath(path).split(os.sep)
    return len(parts) >= 4 and parts[-4].startswith(ROOT_NAME) and os.path.join(*parts[-2:]) == _TAIL


def make(core, ours=None):
    """The folder of plugins for the NIXL whose libraries are in `core`; made unless it is there. OSError if it cannot be."""
    links = plan(core, ours or nixl.own_plugins())
    key = hashlib.sha256(repr(sorted(links.items())).encode()).hexdigest()[:16]
    refused = []
    for root in _roots():
        try:
            _private(root)
            folder = os.path.join(root, key)
            if not _is_whole(folder, links):
                _build(root, folder, links)
            return os.path.join(folder, _TAIL)
        except OSError as error:
            refused.append(f"{root}: {error.strerror or error}")
    raise OSError(
        "no folder can be made for NIXL's plugins; set XDG_CACHE_HOME or TMPDIR to one that can be written: " + "; ".join(refused)
    )


def plan(core, ours):
    """The links, as {place in the folder: where it leads}."""
    site, package = os.path.dirname(core), os.path.basename(core).removeprefix(".").removesuffix(".mesonpy.libs")
    links = {}
    for name in os.listdir(core):
        if name.startswith("lib"):
            links[os.path.join("nixl", name)] = os.path.join(core, name)
    if os.path.isdir(os.path.join(site, f"{package}.libs")):
        links[f"{package}.libs"] = os.path.join(site, f"{package}.libs")
    # Ours second: they take the place of NIXL's own LIBFABRIC.
    for plugins in (os.path.join(core, "plugins"), ours):
        for name in os.listdir(plugins):
            if name.startswith("lib"):
                links[os.path.join(_TAIL, name)] = os.path.join(plugins, name)
    return links


def _roots():
    home = os.path.expanduser("~")
    cache = os.environ.get("XDG_CACHE_HOME") or (os.path.join(home, ".cache") if home != "~" else "")
    if os.path.isabs(cache):
        yield os.path.join(cache, ROOT_NAME)
    yield os.path.join(tempfile.gettempdir(), f"{ROOT_NAME}-{os.geteuid()}")


def _private(root):
    """Makes the folder for this user alone. What is loaded from it is code: nobody else may have a say in it."""
    os.makedirs(root, mode=0o700, exist_ok=True)
    status = os.lstat(root)
    if os.path.islink(root) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise OSError("it is a link, belongs to another user, or can be written by others")


def _is_whole(folder, links):
    return all(_leads_to(os.path.join(folder, place), target) for place, target in links.items())


def _leads_to(link, target):
    try:
        return os.readlink(link) == target
    except OSError:
        return False


def _build(root, folder, links):
    """Makes the folder under another name, and gives it its own when it is whole: other processes may do the same now."""
    new = tempfile.mkdtemp(prefix=".new-", dir=root)
    try:
        for place, target in links.items():
            os.makedirs(os.path.dirname(os.path.join(new, place)), exist_ok=True)
            os.symlink(target, os.path.join(new, place))
        try:
            os.rename(new, folder)
        except OSError:
            # Somebody was first, or has damaged it since.
            if not _is_whole(folder, links):
                os.rename(folder, os.path.join(new, "damaged"))
                os.rename(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
