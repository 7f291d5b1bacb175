"""CUDA as an application uses it, by ctypes: memory of every kind, and what is current on the calling thread."""

import ctypes
import os
from ctypes import byref, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_ulonglong, c_ushort, c_void_p

import numpy as np


def _load(*names):
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            last = error
    raise last


RUNTIME = _load("libcudart.so.13", "libcudart.so.12", "libcudart.so")
DRIVER = _load("libcuda.so.1")
VMM_PIECE_BYTES = 2 << 20


def runtime(call, *arguments):
    code = getattr(RUNTIME, call)(*arguments)
    if code:
        raise RuntimeError(f"{call}: CUDA error {code}")


def driver(call, *arguments):
    code = getattr(DRIVER, call)(*arguments)
    if code:
        raise RuntimeError(f"{call}: CUDA error {code}")


def device_count():
    count = c_int()
    runtime("cudaGetDeviceCount", byref(count))
    return count.value


def current_device():
    device = c_int()
    runtime("cudaGetDevice", byref(device))
    return device.value


def current_context():
    context = c_void_p()
    driver("cuCtxGetCurrent", byref(context))
    return context.value


def set_device(device):
    runtime("cudaSetDevice", device)


def context_is_active(device):
    handle, flags, active = c_int(), c_uint(), c_int()
    driver("cuDeviceGet", byref(handle), device)
    driver("cuDevicePrimaryCtxGetState", handle, byref(flags), byref(active))
    return bool(active.value)


def no_dmabuf():
    """Why the driver does not export memory of cudaMalloc as dmabuf: its error; 0 where it does."""
    pointer, fd = c_void_p(), c_int(-1)
    runtime("cudaMalloc", byref(pointer), c_size_t(2 << 20))
    code = DRIVER.cuMemGetHandleForAddressRange(byref(fd), pointer, c_size_t(2 << 20), 1, c_ulonglong(0))
    if not code:
        os.close(fd.value)
    runtime("cudaFree", pointer)
    return code


def free_bytes():
    free, total = c_size_t(), c_size_t()
    runtime("cudaMemGetInfo", byref(free), byref(total))
    return free.value


def synchronize():
    runtime("cudaDeviceSynchronize")


def copy(to, source, size):
    runtime("cudaMemcpy", c_void_p(to), c_void_p(source), c_size_t(size), 4)


class _Location(ctypes.Structure):
    _fields_ = [("type", c_int), ("id", c_int)]


class _AllocationFlags(ctypes.Structure):
    _fields_ = [("compression", c_ubyte), ("gdr", c_ubyte), ("usage", c_ushort), ("reserved", c_ubyte * 4)]


class _AllocationProperties(ctypes.Structure):
    _fields_ = [
        ("type", c_int), ("handle_types", c_int), ("location", _Location), ("win32", c_void_p), ("flags", _AllocationFlags),
    ]


class _Access(ctypes.Structure):
    _fields_ = [("location", _Location), ("flags", c_int)]


class Block:
    """Memory of one kind. `segment` is what NIXL is told that it is."""

    KINDS = {
        "cudaMalloc": "VRAM", "cudaMallocAsync": "VRAM", "VMM": "VRAM", "VMM-exportable": "VRAM", "managed": "VRAM",
        "pageable": "DRAM", "pinned": "DRAM", "host-registered": "DRAM",
    }

    def __init__(self, kind, size, device=0):
        self.kind, self.size, self.device, self.segment = kind, size, device, self.KINDS[kind]
        before = current_device()
        set_device(device)
        self.address, self._free = getattr(self, "_" + kind.replace("-", "_"))()
        set_device(before)

    def _cudaMalloc(self):
        pointer = c_void_p()
        runtime("cudaMalloc", byref(pointer), c_size_t(self.size))
        return pointer.value, lambda: runtime("cudaFree", pointer)

    def _cudaMallocAsync(self):
        pointer = c_void_p()
        runtime("cudaMallocAsync", byref(pointer), c_size_t(self.size), None)
        synchronize()
        return pointer.value, lambda: runtime("cudaFreeAsync", pointer, None)

    def _managed(self):
        pointer = c_void_p()
        runtime("cudaMallocManaged", byref(pointer), c_size_t(self.size), 1)
        return pointer.value, lambda: runtime("cudaFree", pointer)

    def _VMM_exportable(self):
        """As `_VMM`, of handles that may be exported as file descriptors: PyTorch's are."""
        return self._VMM(1)

    def _VMM(self, handle_types=0):
        """One address range over several handles, as PyTorch's expandable segments are made."""
        pieces = -(-self.size // VMM_PIECE_BYTES)
        reserved = pieces * VMM_PIECE_BYTES
        runtime("cudaFree", None)
        properties = _AllocationProperties(1, handle_types, _Location(1, self.device))
        properties.flags.gdr = 1
        base = c_uint64()
        driver("cuMemAddressReserve", byref(base), c_size_t(reserved), c_size_t(0), c_uint64(0), c_ulonglong(0))
        handles = []
        for piece in range(pieces):
            handle = c_ulonglong()
            driver("cuMemCreate", byref(handle), c_size_t(VMM_PIECE_BYTES), byref(properties), c_ulonglong(0))
            at = c_uint64(base.value + piece * VMM_PIECE_BYTES)
            driver("cuMemMap", at, c_size_t(VMM_PIECE_BYTES), c_size_t(0), handle, c_ulonglong(0))
            handles.append(handle)
        access = _Access(_Location(1, self.device), 3)
        driver("cuMemSetAccess", base, c_size_t(reserved), byref(access), c_size_t(1))

        def free():
            driver("cuMemUnmap", base, c_size_t(reserved))
            for handle in handles:
                driver("cuMemRelease", handle)
            driver("cuMemAddressFree", base, c_size_t(reserved))

        return base.value, free

    def _pageable(self):
        self._array = np.zeros(self.size, dtype=np.uint8)
        return self._array.ctypes.data, lambda: None

    def _pinned(self):
        pointer = c_void_p()
        runtime("cudaMallocHost", byref(pointer), c_size_t(self.size))
        return pointer.value, lambda: runtime("cudaFreeHost", pointer)

    def _host_registered(self):
        self._array = np.zeros(self.size, dtype=np.uint8)
        pointer = c_void_p(self._array.ctypes.data)
        runtime("cudaHostRegister", pointer, c_size_t(self.size), 0)
        return pointer.value, lambda: runtime("cudaHostUnregister", pointer)

    def fill(self, seed):
        data = pattern(seed, self.size)
        copy(self.address, data.ctypes.data, self.size)
        synchronize()

    def difference(self, seed):
        """None if every byte is the pattern's, else where the first other one is."""
        data = np.empty(self.size, dtype=np.uint8)
        copy(data.ctypes.data, self.address, self.size)
        wrong = np.flatnonzero(data != pattern(seed, self.size))
        return f"{wrong.size} of {self.size} bytes wrong, the first at {wrong[0]}" if wrong.size else None

    def mixture(self, parts):
        """As `difference`, of (offset, length, seed): each part has what a fill with that seed put there."""
        data = np.empty(self.size, dtype=np.uint8)
        copy(data.ctypes.data, self.address, self.size)
        for offset, length, seed in parts:
            wrong = np.flatnonzero((data != pattern(seed, self.size))[offset : offset + length])
            if wrong.size:
                return f"{wrong.size} of {length} bytes at {offset} wrong, the first at {offset + wrong[0]}"
        return None

    def holds(self, parts):
        """As `mixture`, of (offset, length, seed, where in that seed's pattern)."""
        data = np.empty(self.size, dtype=np.uint8)
        copy(data.ctypes.data, self.address, self.size)
        patterns = {}
        for offset, length, seed, place in parts:
            if seed not in patterns:
                patterns[seed] = pattern(seed, self.size)
            wrong = np.flatnonzero(data[offset : offset + length] != patterns[seed][place : place + length])
            if wrong.size:
                return f"{wrong.size} of {length} bytes at {offset} wrong, the first at {offset + wrong[0]}"
        return None

    def free(self):
        if self._free:
            self._free()
        self._free = None


class _IpcHandle(ctypes.Structure):
    _fields_ = [("bytes", c_ubyte * 64)]


def export(address):
    """What another process opens this allocation with."""
    handle = _IpcHandle()
    runtime("cudaIpcGetMemHandle", byref(handle), c_void_p(address))
    return bytes(handle)


class Imported(Block):
    """Memory that another process has exported."""

    def __init__(self, handle, size):
        self.kind, self.size, self.device, self.segment = "imported", size, current_device(), "VRAM"
        pointer = c_void_p()
        runtime("cudaIpcOpenMemHandle", byref(pointer), _IpcHandle.from_buffer_copy(handle), c_uint(1))
        self.address, self._free = pointer.value, lambda: runtime("cudaIpcCloseMemHandle", pointer)


def pattern(seed, size):
    places = np.arange(-(-size // 4), dtype=np.uint32)
    places = (places + np.uint32(seed * 7919 + 1)) * np.uint32(2654435761)
    places ^= places >> np.uint32(15)
    return places.view(np.uint8)[:size]


def read_at_once(address, size):
    """What is there now: by a stream that waits for no other."""
    stream, data = c_void_p(), np.empty(size, dtype=np.uint8)
    runtime("cudaStreamCreateWithFlags", byref(stream), c_uint(1))
    runtime("cudaMemcpyAsync", c_void_p(data.ctypes.data), c_void_p(address), c_size_t(size), 4, stream)
    runtime("cudaStreamSynchronize", stream)
    runtime("cudaStreamDestroy", stream)
    return data


def open_files():
    return len(os.listdir("/proc/self/fd"))
