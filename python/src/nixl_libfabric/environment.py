"""`enable` and `disable`: a .pth file in site-packages, which Python reads whenever it starts in this environment.

pip does not know the file, so uninstalling leaves it behind: its line then does nothing.
"""

import os
import site
import sysconfig

FILE = "nixl_libfabric_enabled.pth"
LINE = 'exec("try:\\n from nixl_libfabric.startup import watch\\nexcept ImportError:\\n pass\\nelse:\\n watch()")'


class Refused(Exception):
    """Nothing could be written, or removed."""


def enable():
    """Writes the file and returns its path."""
    refused = []
    for folder in _folders():
        path = os.path.join(folder, FILE)
        try:
            os.makedirs(folder, exist_ok=True)
            # A rename, so that no Python that starts meanwhile reads half a line.
            with open(path + ".new", "w", encoding="utf-8") as file:
                # site runs lines that begin with `import`.
                file.write(f"import sys; {LINE}\n")
            os.replace(path + ".new", path)
            return path
        except OSError as error:
            refused.append(f"{folder}: {error.strerror or error}")
    raise Refused(
        "no site-packages of this Python can be written (" + "; ".join(refused) + "). Set the variable instead, where the program is "
        "started: export NIXL_PLUGIN_DIR=$(python -m nixl_libfabric plugin-dir)"
    )


def disable():
    """Removes the file wherever it is, and returns the paths that were removed."""
    removed = []
    for folder in _folders():
        path = os.path.join(folder, FILE)
        try:
            os.remove(path)
            removed.append(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise Refused(f"{path} cannot be removed: {error.strerror or error}") from error
    return removed


def enabled():
    """The files that are there."""
    return [path for path in (os.path.join(folder, FILE) for folder in _folders()) if os.path.exists(path)]


def _folders():
    """The environment's own site-packages, and the user's where Python reads it."""
    yield sysconfig.get_path("purelib")
    if site.ENABLE_USER_SITE:
        yield site.getusersitepackages()
