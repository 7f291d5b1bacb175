"""Numbers for `KERNEL_PIECE_BYTES_MAX` and the lengths of units (src/cuda): the same pieces copied by the driver, one by one, and by
the plugin's kernel, within one GPU. No test: it prints NUMBER lines."""

import ctypes
import time
from pathlib import Path

import cuda
from checks import KIB, MIB, versions

PTX = Path(__file__).resolve().parents[2] / "src/cuda/copy.ptx"
ROUNDS = 20


class Kernel:
    def __init__(self):
        module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        text = PTX.read_bytes() + b"\0"
        start = time.perf_counter()
        cuda.driver("cuModuleLoadData", ctypes.byref(module), text)
        self.load_s = time.perf_counter() - start
        cuda.driver("cuModuleGetFunction", ctypes.byref(self.function), module, b"nixl_libfabric_copy")

    def launcher(self, triples, unit, stream):
        units = [
            (to + at, source + at, min(unit, size - at)) for to, source, size in triples for at in range(0, size, unit)
        ]
        table = ctypes.c_void_p()
        cuda.driver("cuMemHostAlloc", ctypes.byref(table), ctypes.c_size_t(32 * len(units)), ctypes.c_uint(1))
        words = (ctypes.c_uint64 * (4 * len(units))).from_address(table.value)
        words[:] = [word for entry in units for word in (*entry, 0)]
        argument = ctypes.c_uint64(table.value)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        call, kept = cuda.DRIVER.cuLaunchKernel, (argument, words)
        given = (self.function, len(units), 1, 1, 256, 1, 1, 0, stream, arguments, None)

        def work():
            code = call(*given)
            if code:
                raise RuntimeError(f"cuLaunchKernel: CUDA error {code}")
            return kept

        return work, len(units)


def timed(work, stream):
    best = float("inf")
    for _ in range(ROUNDS):
        cuda.runtime("cudaStreamSynchronize", stream)
        start = time.perf_counter()
        work()
        cuda.runtime("cudaStreamSynchronize", stream)
        best = min(best, time.perf_counter() - start)
    return best


def run_sweep():
    cuda.runtime("cudaFree", None)
    versions()
    stream = ctypes.c_void_p()
    cuda.runtime("cudaStreamCreateWithFlags", ctypes.byref(stream), ctypes.c_uint(1))
    kernel = Kernel()
    print(f"NUMBER  the kernel is compiled and loaded in {kernel.load_s * 1e3:.1f} ms", flush=True)
    source, target = cuda.Block("cudaMalloc", 512 * MIB), cuda.Block("cudaMalloc", 512 * MIB)
    source.fill(1)
    for size in (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB):
        for count in (1, 4, 16, 256, 4096):
            total = size * count
            if total > 256 * MIB:
                continue
            step = 2 * size if count > 1 else size
            triples = [(target.address + i * step, source.address + i * step, size) for i in range(count)]
            copies = cuda.RUNTIME.cudaMemcpyAsync
            given = [(ctypes.c_void_p(t), ctypes.c_void_p(s), ctypes.c_size_t(n), 3, stream) for t, s, n in triples]

            def one_by_one(given=given):
                for arguments in given:
                    copies(*arguments)

            told = [f"one by one {timed(one_by_one, stream) * 1e6:.1f} us"]
            for unit in (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB):
                if total / unit <= 1 << 16:
                    launch, units = kernel.launcher(triples, unit, stream)
                    seconds = timed(launch, stream)
                    told.append(f"{units} units of {unit // KIB} KiB {seconds * 1e6:.1f} us, {total / seconds / 1e9:.0f} GB/s")
            print(f"NUMBER  {count} x {size // KIB} KiB: " + "; ".join(told), flush=True)
    target.fill(2)
    launch, _ = kernel.launcher([(target.address, source.address, 512 * MIB)], 64 * KIB, stream)
    launch()
    cuda.runtime("cudaStreamSynchronize", stream)
    difference = target.difference(1)
    print(f"NUMBER  the kernel's bytes are {'the same' if difference is None else difference}", flush=True)
