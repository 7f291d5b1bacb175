// A stand-in for libnrt.so.1: one Neuron device's memory at 0x10000000, 1 MiB, with its EFA device at 0000:a0:1c.0.
//
// NRT_STANDIN_OLD at build time leaves out the calls that only newer runtimes have.

#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

enum { NRT_SUCCESS = 0, NRT_FAILURE = 1, NRT_INVALID = 2, NRT_RESOURCE = 4 };
enum { BASE = 0x10000000, SIZE = 1 << 20 };

static int holds(uint64_t va, uint64_t size) { return va >= BASE && size <= SIZE && va - BASE <= SIZE - size; }

int nrt_get_total_nc_count(uint32_t *count) {
    *count = 8;
    return NRT_SUCCESS;
}

int nrt_get_dmabuf_fd(uint64_t va, uint64_t size, int *fd) {
    if (va != BASE || !holds(va, size)) return NRT_INVALID;
    *fd = memfd_create("nrt-standin", MFD_CLOEXEC);
    return *fd < 0 ? NRT_FAILURE : NRT_SUCCESS;
}

#ifndef NRT_STANDIN_OLD
int nrt_get_dmabuf_fd_v2(uint64_t va, uint64_t size, int *fd, uint64_t *offset) {
    if (!holds(va, size)) return NRT_INVALID;
    *fd = memfd_create("nrt-standin", MFD_CLOEXEC);
    *offset = va - BASE;
    return *fd < 0 ? NRT_FAILURE : NRT_SUCCESS;
}

int nrt_get_attached_efa_bdf(const void *va, char *bdf, size_t *len) {
    static const char text[] = "0000:a0:1c.0";
    if (!holds((uintptr_t)va, 1)) return NRT_FAILURE;
    if (*len < sizeof text) return NRT_RESOURCE;
    memcpy(bdf, text, sizeof text);
    *len = sizeof text - 1;
    return NRT_SUCCESS;
}
#endif
