"""Builds the wheel into target/wheel/dist, and refuses to if its tag would not be true. Run by `make wheel`.

A program that is linked here asks for this machine's glibc. cargo-zigbuild links for the glibc of the tag instead, with the
lists of symbols that zig carries of every version. The C++ shim is compiled by g++ all the same, and libstdc++ and libgcc_s
are the system's: NIXL passes std::string and std::vector through the boundary, which zig's libc++ lays out differently, and
an exception must meet one unwinder.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OUT = ROOT / "target" / "wheel"
TOOLS = OUT / "tools"
TARGET = "x86_64-unknown-linux-gnu"
GLIBC = "2.28"
PLATFORM = f"manylinux_{GLIBC.replace('.', '_')}_x86_64"
PLUGIN_NAMES = ("LIBFABRIC", "Libfabric")


def run(*command, **environment):
    subprocess.run([str(word) for word in command], check=True, cwd=ROOT, env={**os.environ, **environment})


def install_tools():
    """A virtual environment with the pinned tools, made anew when they change."""
    requirements = HERE / "build-requirements.txt"
    stamp = TOOLS / ".installed"
    if stamp.is_file() and stamp.read_text() == requirements.read_text():
        return
    shutil.rmtree(TOOLS, ignore_errors=True)
    run(sys.executable, "-m", "venv", TOOLS)
    run(TOOLS / "bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check",
        "install", "--only-binary", ":all:", "-r", requirements)
    stamp.write_text(requirements.read_text())


def system_library(name):
    """The shared library that g++ would link."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(found):
        raise SystemExit(f"wheel: g++ has no {name}; install the C++ compiler whole")
    return found


def compile_for_old_glibc():
    """Lays the plugin, under both of its names, and the program into target/wheel/compiled as the package has them."""
    libraries = [system_library(name) for name in ("libstdc++.so.6", "libgcc_s.so.1")]
    target = TARGET.replace("-", "_")
    run(
        TOOLS / "bin/cargo-zigbuild", "zigbuild", "--profile", "wheel", "--target", f"{TARGET}.{GLIBC}", "--lib", "--bins",
        PATH=f"{TOOLS / 'bin'}:{os.environ['PATH']}",
        CARGO_ZIGBUILD_CACHE_DIR=str(OUT / "zigbuild"),
        ZIG_GLOBAL_CACHE_DIR=str(OUT / "zig"),
        # The shim: g++ with its own headers, and by path what `-l` would make zig's.
        **{f"CXX_{target}": "g++", f"CXXSTDLIB_{target}": ""},
        # The system's libstdc++ itself may ask for a newer glibc than the tag's: it is not what ends up in the wheel.
        RUSTFLAGS=" ".join(f"-Clink-arg={argument}" for argument in (*libraries, "-Wl,--allow-shlib-undefined")),
    )
    built = ROOT / "target" / TARGET / "wheel"
    compiled = OUT / "compiled"
    shutil.rmtree(compiled, ignore_errors=True)
    (compiled / "plugins").mkdir(parents=True)
    (compiled / "bin").mkdir()
    for name in PLUGIN_NAMES:
        shutil.copy(built / "libnixl_libfabric.so", compiled / "plugins" / f"libplugin_{name}.so")
    shutil.copy(built / "nixl-libfabric", compiled / "bin" / "nixl-libfabric")
    return compiled


def pack(compiled):
    dist = OUT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    run(
        TOOLS / "bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check",
        "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", dist, HERE,
        NIXL_LIBFABRIC_COMPILED=str(compiled), NIXL_LIBFABRIC_WHEEL_TAG=f"py3-none-{PLATFORM}",
    )
    (wheel,) = dist.glob("*.whl")
    return wheel


def check_tag(wheel):
    """auditwheel reads every ELF file's symbol versions and libraries, and says which systems have them."""
    report = subprocess.run([TOOLS / "bin/auditwheel", "show", wheel], check=True, capture_output=True, text=True).stdout
    consistent = re.search(r'consistent\s+with\s+the\s+following\s+platform\s+tag:\s+"manylinux_(\d+)_(\d+)_', report)
    if not consistent or tuple(map(int, consistent.groups())) > tuple(map(int, GLIBC.split("."))):
        raise SystemExit(f"wheel: {wheel.name} does not keep what {PLATFORM} promises:\n{report}")
    print(f"wheel: {wheel}, {wheel.stat().st_size / 1e6:.1f} MB, needs no more than manylinux_{'_'.join(consistent.groups())}")


def main():
    install_tools()
    check_tag(pack(compile_for_old_glibc()))


if __name__ == "__main__":
    main()
