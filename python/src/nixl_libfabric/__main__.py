"""The command: what concerns Python is done here, the rest by the compiled program beside this file."""

import os
import sys

from nixl_libfabric import environment, folder, nixl, startup

HELP = """\
Usage: nixl-libfabric COMMAND, or python -m nixl_libfabric COMMAND

  plugin-dir    print the folder for NIXL_PLUGIN_DIR: this plugin and all others of the NIXL that `import nixl` takes
  enable        have every Python of this environment set NIXL_PLUGIN_DIR when it imports NIXL
  disable       no longer
"""


def main():
    arguments = sys.argv[1:]
    command = arguments[0] if arguments else "--help"
    try:
        if command in ("plugin-dir", "enable", "disable"):
            if len(arguments) > 1:
                raise SystemExit(f"nixl-libfabric: {command} takes no arguments")
            {"plugin-dir": _plugin_dir, "enable": _enable, "disable": _disable}[command]()
        else:
            if command in ("--help", "-h", "help"):
                print(HELP, flush=True)
            _run_program(arguments)
    except (nixl.NotFound, environment.Refused, OSError) as error:
        raise SystemExit(f"nixl-libfabric: {error}") from None


def _plugin_dir():
    print(folder.make(nixl.find(nixl.preferred())))


def _enable():
    print(f"enabled by {environment.enable()}: NIXL finds the plugin in every Python of this environment")
    present = os.environ.get(startup.VARIABLE)
    if present and not folder.is_ours(present):
        print(f"but NIXL_PLUGIN_DIR is set to {present}, and that wins: unset it, also where your programs are started")


def _disable():
    removed = environment.disable()
    print(f"disabled: removed {', '.join(removed)}" if removed else "it was not enabled")


def _run_program(arguments):
    program = os.path.join(os.path.dirname(os.path.realpath(__file__)), "bin", "nixl-libfabric")
    if arguments and arguments[0] == "doctor":
        arguments = ["doctor", *_told_to_doctor(), *arguments[1:]]
    os.execv(program, ["nixl-libfabric", *arguments])


def _told_to_doctor():
    """What the program cannot know: the NIXL of this Python, and the folder that it would be given."""
    try:
        core = nixl.find(nixl.preferred())
    except nixl.NotFound:
        return []
    told = ["--nixl", core]
    if not os.environ.get(startup.VARIABLE):
        try:
            told += ["--plugin-dir", folder.make(core)]
        except OSError:
            pass  # the doctor says that none is set
    return told


if __name__ == "__main__":
    main()
