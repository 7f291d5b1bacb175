"""Builds the plugin for arm64 and runs it under qemu's user emulation, between agents of NIXL's arm64 wheels.

    target/arm64/debian          Debian's arm64 Python, libfabric and hwloc, unpacked; nothing of it is installed
    target/arm64/nixl/<version>  one nixl-cu12 wheel each
    target/arm64/venv/bin/python Debian's Python with numpy, in the emulator
    target/arm64/plugins         the plugin

which is the shape of target/, so that the end-to-end tests run there by E2E_TARGET. Needs what `system.sh debian-arm64` installs,
and Rust's standard library for the target. Emulated atomics and memory order are those of the machine below: a missing fence that
only arm64 shows is not shown here, nor are pages of another size than 4 KiB.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "target" / "arm64"
TARGET = "aarch64-unknown-linux-gnu"
VERSIONS = tomllib.loads((ROOT / "plugin-tests" / "setup" / "versions.toml").read_text())
# The wheel that the tests run on, the oldest and the newest.
MAIN, *OTHERS = VERSIONS["nixl"]["versions"][0], "1.0.0", "1.5.1"
PYTHON = ROOT / "target" / "venv" / "bin" / "python"
EMULATOR = ["qemu-aarch64", "-L", str(HERE / "debian")]
# Test programs that run nothing but themselves.
TESTS = ["abi_exports", "abi_header", "abi_layout", "topology_golden", "topology_properties", "wire_golden"]
# What the emulator has not: process_vm_readv(2), by which agents of one host reach each other (over rails instead, in the scenarios);
# and what `make setup` has not for this processor: a CUDA runtime.
NOT_THERE = [
    "neighbour::tests::a_full_board", "neighbour::tests::memory_of_a_neighbour", "neighbour::tests::only_what_is_registered",
    "neighbour::tests::scribbling", "neighbour::tests::whoever_is_not_the_peer", "neighbour::tests::withdrawing",
    "sys::process::tests::a_process_is_told", "sys::process::tests::bytes_are_read", "transfer::copies::tests",
    "sys::cudart::tests::the_cuda_runtime_of_a_wheel",
]
SCENARIOS = {MAIN: "random_lists or repost"} | dict.fromkeys(OTHERS, "repost_turns")


def run(*command, check=True, **more):
    print("arm64:", shlex.join(map(str, command)), flush=True)
    return subprocess.run([str(part) for part in command], check=check, **more)


def apt(*command, folder, **more):
    """apt with the machine's sources, but for two processors and with a state of its own, in which nothing is installed."""
    state = folder / "apt"
    for name in ("lists/partial", "archives/partial"):
        (state / name).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    options = {"Dir::State": state, "Dir::State::status": state / "status", "Dir::Cache": state, "Acquire::Languages": "none",
               "APT::Architectures": "amd64,arm64", "APT::Sandbox::User": "root"}
    return run(command[0], *(f"-o{key}={value}" for key, value in options.items()), *command[1:], cwd=folder, **more)


def unpack_debian(root):
    """The packages and all that they depend on, unpacked."""
    folder = root.with_name("debs")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # Sources beside Debian's may lack the processor. Whether enough was read shows in the next step.
    apt("apt-get", "update", "-qq", folder=folder, check=False, stderr=subprocess.DEVNULL)
    wanted = [f"{name}:arm64" for name in VERSIONS["arm64"]["packages"]]
    plan = apt("apt-get", "install", "-s", "--no-install-recommends", *wanted, folder=folder, capture_output=True, text=True).stdout
    names = [line.split()[1] for line in plan.splitlines() if line.startswith("Inst ")]
    apt("apt-get", "download", "-qq", *names, folder=folder, stderr=subprocess.DEVNULL)
    root.mkdir()
    for package in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(package), str(root)], check=True)
    shutil.rmtree(folder)


def unpack_wheels(folder, *packages):
    version = next((HERE / "debian" / "usr" / "bin").glob("python3.*[0-9]")).name.removeprefix("python")
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (28, 27, 24, 17)] + ["--platform=manylinux2014_aarch64"]
    run(PYTHON, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps", "--only-binary=:all:", *platforms,
        f"--python-version={version}", f"--target={folder}", *packages)


def provide(folder, install):
    """`install(folder)`, once; half of it counts for nothing."""
    if not folder.is_dir():
        partial = folder.with_name(folder.name + ".new")
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        install(partial)
        partial.rename(folder)


def set_up():
    missing = [tool for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64") if not shutil.which(tool)]
    if missing:
        raise SystemExit(f"arm64: no {', '.join(missing)}: sh plugin-tests/setup/system.sh debian-arm64")
    sysroot = subprocess.run(["rustc", "--print", "sysroot"], check=True, capture_output=True, text=True).stdout.strip()
    if not (Path(sysroot) / "lib" / "rustlib" / TARGET).is_dir():
        raise SystemExit(f"arm64: this Rust has no standard library for {TARGET}: rustup target add {TARGET}")
    provide(HERE / "debian", unpack_debian)
    provide(HERE / "site", lambda folder: unpack_wheels(folder, *VERSIONS["arm64"]["wheels"]))
    for version in SCENARIOS:
        provide(HERE / "nixl" / version, lambda folder, v=version: unpack_wheels(folder, f"nixl-cu12=={v}"))
    python = HERE / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    # A relative LD_LIBRARY_PATH would be the emulator's own; the agents' is empty with Debian's libfabric.
    python.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{HERE}/site" exec {shlex.join(EMULATOR)} {HERE}/debian/usr/bin/python3 "$@"\n')
    python.chmod(0o755)


def cargo(command, *arguments, env=None):
    variables = {"CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER": "aarch64-linux-gnu-gcc",
                 "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER": shlex.join(EMULATOR),
                 # Of the tests, too, one of which compiles a core and starts it.
                 "CXX": "aarch64-linux-gnu-g++", "ABI_CORE_RUNNER": shlex.join(EMULATOR)}
    return run("cargo", command, f"--target={TARGET}", *arguments, cwd=ROOT, env=os.environ | variables | (env or {}))


def build():
    cargo("build", "--release", "--lib")
    plugins = HERE / "plugins"
    plugins.mkdir(exist_ok=True)
    for name in ("LIBFABRIC", "Libfabric"):
        shutil.copyfile(ROOT / "target" / TARGET / "release" / "libnixl_libfabric.so", plugins / f"libplugin_{name}.so")


def main(arguments):
    set_up()
    build()
    cargo("test", "--lib", *(f"--test={name}" for name in TESTS), "--", *(f"--skip={name}" for name in NOT_THERE),
          env={"NIXL_WHEEL_DIR": str(HERE / "nixl" / MAIN)})
    for version, names in SCENARIOS.items():
        run(PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "-q", f"--nixl={version}", "--libfabric=system",
            "plugin-tests/e2e/test_transfer.py", *(arguments or ["-k", names]), cwd=ROOT, env=os.environ | {"E2E_TARGET": str(HERE)})


if __name__ == "__main__":
    main(sys.argv[1:])
