"""Sets NIXL_PLUGIN_DIR in time: when NIXL is imported, for that NIXL.

NIXL reads the variable when a process makes its first agent. Which of several NIXLs that will be is known for certain only
when it is imported, so a finder on sys.meta_path waits for that; it finds nothing itself. A value that the user has set stays.
One that was set here, and inherited from the parent process, is set anew.

`enable` has this module imported whenever Python starts: it imports nothing that Python has not loaded by then.
"""

import os
import sys

VARIABLE = "NIXL_PLUGIN_DIR"


def activate():
    """Has NIXL find the plugin in this process and in those that it starts. The entry point of vLLM and SGLang.

    May be called at any time before the first agent is made, and again. Never raises: what stands in the way is logged.
    """
    watch()
    from nixl_libfabric import nixl

    try:
        package = nixl.preferred()
    except nixl.NotFound:
        return  # one that is installed later is noticed when it is imported
    _set(package)


def watch():
    """The same, but nothing happens before NIXL is imported."""
    if not any(type(finder).__name__ == _NixlImports.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _NixlImports())


class _NixlImports:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("nixl_cu") and name.removeprefix("nixl_cu").isdigit():
            _set(name)
        return None


def _set(package):
    import logging

    from nixl_libfabric import folder, nixl

    log = logging.getLogger("nixl_libfabric")
    present = os.environ.get(VARIABLE)
    if present and not folder.is_ours(present):
        log.info("%s is set to %s and stays; nixl-libfabric is not there unless you put it there", VARIABLE, present)
        return
    try:
        os.environ[VARIABLE] = folder.make(nixl.find(package))
    except (OSError, nixl.NotFound) as error:
        log.warning("%s is not set, so that NIXL does not find nixl-libfabric: %s", VARIABLE, error)
