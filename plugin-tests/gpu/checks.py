"""How a case is run and told, and transfers of which every byte is checked."""

import ctypes
import os
import platform
import sys
import time
import traceback
from pathlib import Path

import cuda
from node import nixl

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
failures = 0


class Skip(Exception):
    pass


def case(name, test, *arguments):
    global failures
    start = time.monotonic()
    try:
        verdict, note = "PASS", test(*arguments)
    except Skip as reason:
        verdict, note = "SKIP", str(reason)
    except Exception as error:
        verdict, note = "FAIL", f"{type(error).__name__}: {error}"
        failures += 1
        traceback.print_exc()
    print(f"{verdict}  {name}  ({time.monotonic() - start:.1f} s){'  ' + note if note else ''}", flush=True)


def expect(condition, words):
    if not condition:
        raise AssertionError(words)


def refused(what, call, *arguments):
    """The call must raise; its words are the answer."""
    try:
        call(*arguments)
    except Exception as error:
        return f"{what}: {type(error).__name__}"
    raise AssertionError(f"{what} was accepted")


def log_of_run():
    """Everything that this process and its children have printed so far."""
    return Path(os.environ["CASES_LOG"]).read_text(errors="replace")


# Moving bytes


def meet(a, b):
    for one, other in ((a, b), (b, a)):
        if one is not other:
            try:
                one.forget(other.name)
            except Exception:
                pass
            one.meet(other.metadata())


def move(a, b, operation, here, there, size, devices=(0, 0), segments=("VRAM", "VRAM"), seed=1):
    """One transfer of `a` with memory of `b`; every byte of the target is checked. Returns seconds."""
    source, target = ((a, here), (b, there)) if operation == "WRITE" else ((b, there), (a, here))
    source[0].fill(source[1], seed)
    target[0].fill(target[1], seed + 1000)
    handle = a.prepare(operation, ([(here, size, devices[0])], segments[0]), ([(there, size, devices[1])], segments[1]), b.name)
    seconds = a.run(handle)
    difference = target[0].difference(target[1], seed)
    expect(difference is None, f"{operation} of {size} bytes, {segments[0]} with {segments[1]}: {difference}")
    del handle
    return seconds


# What a run begins with


def versions():
    fabric = ctypes.CDLL("libfabric.so.1")
    packed = fabric.fi_version()
    driver = ctypes.c_int()
    cuda.driver("cuDriverGetVersion", ctypes.byref(driver))
    nvidia = Path("/proc/driver/nvidia/version")
    module = nvidia.read_text().splitlines()[0].split("  ")[1] if nvidia.exists() else "unknown"
    torch = sys.modules.get("torch")
    print(
        f"VERSIONS  kernel {platform.release()}, NVIDIA driver {module}, CUDA driver API {driver.value}, "
        f"{cuda.device_count()} GPUs, Python {platform.python_version()}, PyTorch {torch.__version__ if torch else '-'}, "
        f"{nixl().__name__}, libfabric {packed >> 16}.{packed & 0xFFFF}, provider {os.environ.get('FI_PROVIDER')}",
        flush=True,
    )


def vram_is_listed(a):
    plugin, backend = a.mems()
    expect("VRAM_SEG" in plugin and "VRAM_SEG" in backend, f"plugin {plugin}, backend {backend}")
    return f"backend: {backend}"
