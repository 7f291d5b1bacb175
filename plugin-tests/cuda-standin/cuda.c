// A stand-in for libcuda.so.1: devices, contexts and memory that exist only here, for tests without a GPU.
//
// It keeps the rules of the driver that our code could break: a context stack for each thread, calls that need a
// current context, primary contexts that come into being when retained, memory kinds and their attributes, copies that
// finish only after they were asked for, captures that an unsafe call ruins. It writes down each call.
// "Device memory" is host memory, so copies move real bytes. Hidden, it has a second mapping that only copies know: the
// addresses that an application sees cannot be read or written, as a GPU's.
// Memory of a device is a memory file, which another process maps when it is lent, and which outlives its owner.
//
// A test drives it through the standin_ functions at the end. For a whole process: CUDA_STANDIN_DEVICES=n,
// CUDA_STANDIN_FAIL=call:nth:code, CUDA_STANDIN_LOG=path (calls are appended), CUDA_STANDIN_HIDDEN=1.
// cudart.c stands in for libcudart.so above it.
//
// With -DWITH_CUDA_H the compiler compares each prototype and number here with NVIDIA's header.

#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifdef WITH_CUDA_H
#include <cuda.h>
#else
typedef unsigned int CUresult, CUdevice_attribute, CUpointer_attribute, CUmemRangeHandleType, CUstreamCaptureMode;
typedef unsigned int CUmemAllocationHandleType;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr, CUmemGenericAllocationHandle;
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct { char reserved[64]; } CUipcMemHandle;
typedef struct { unsigned int type; int id; } CUmemLocation;
typedef struct {
    unsigned int type, requestedHandleTypes;
    struct { unsigned int type; int id; } location;
    void *win32HandleMetaData;
    struct { unsigned char compressionType, gpuDirectRDMACapable; unsigned short usage; unsigned char reserved[4]; } allocFlags;
} CUmemAllocationProp;
typedef struct { CUmemLocation location; unsigned int flags; } CUmemAccessDesc;
enum {
    CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1, CUDA_ERROR_OUT_OF_MEMORY = 2, CUDA_ERROR_NO_DEVICE = 100,
    CUDA_ERROR_INVALID_DEVICE = 101, CUDA_ERROR_INVALID_CONTEXT = 201, CUDA_ERROR_MAP_FAILED = 205,
    CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222, CUDA_ERROR_INVALID_HANDLE = 400,
    CUDA_ERROR_NOT_FOUND = 500, CUDA_ERROR_NOT_READY = 600, CUDA_ERROR_ILLEGAL_ADDRESS = 700,
    CUDA_ERROR_NOT_SUPPORTED = 801, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900,
    CU_POINTER_ATTRIBUTE_CONTEXT = 1, CU_POINTER_ATTRIBUTE_MEMORY_TYPE = 2, CU_POINTER_ATTRIBUTE_SYNC_MEMOPS = 6,
    CU_POINTER_ATTRIBUTE_BUFFER_ID = 7,
    CU_POINTER_ATTRIBUTE_IS_MANAGED = 8, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL = 9,
    CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE = 10, CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE = 15,
    CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE = 17, CU_POINTER_ATTRIBUTE_MAPPING_SIZE = 18,
    CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR = 19,
    CU_MEMORYTYPE_HOST = 1, CU_MEMORYTYPE_DEVICE = 2,
    CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED = 116, CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED = 124,
    CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD = 1, CU_MEM_RANGE_FLAG_DMA_BUF_MAPPING_TYPE_PCIE = 1,
    CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR = 1, CU_MEM_ACCESS_FLAGS_PROT_READWRITE = 3,
    CU_MEM_LOCATION_TYPE_DEVICE = 1, CU_MEM_LOCATION_TYPE_HOST_NUMA = 3, CU_MEM_ALLOCATION_TYPE_PINNED = 1,
    CU_STREAM_CAPTURE_MODE_GLOBAL = 0, CU_STREAM_CAPTURE_MODE_RELAXED = 2,
};
#endif

enum { DEVICES_MAX = 8, STACK_MAX = 32, PIECES_MAX = 4096, OPS_MAX = 4096, LOG_BYTES_MAX = 1 << 20, PAGE = 4096 };

// Kinds of memory, as tests/cuda_bed/mod.rs numbers them.
enum kind { DEVICE, IMPORTED, ASYNC, VMM, MANAGED, HOST, VMM_ON_HOST };

struct CUctx_st { int device; int alive; char name[16]; };
// A copy, or, with units, a launch of the copy kernel, whose table is at src.
struct op { uintptr_t dst, src; size_t bytes; unsigned units; };
struct unit { uint64_t dst, src, bytes, unused; };
struct CUmod_st { CUcontext ctx; };
struct CUfunc_st { CUcontext ctx; };
struct CUstream_st { CUcontext ctx; struct op ops[OPS_MAX]; unsigned long queued, done; int polls_left; };
struct CUevent_st { CUcontext ctx; CUstream stream; unsigned long mark; };
struct piece {
    uintptr_t base; size_t size; enum kind kind; int device; CUcontext ctx; int sync_memops;
    char *alias; // where the bytes are, if not at base
    unsigned long long id; // of this allocation, never used again
    int file; // where another process finds the bytes: descriptor and one, or 0
    unsigned handle_types, access; // of VMM memory: as what it is exported; devices that may use it, as bits
    struct lender { int pid; const void *tag; uintptr_t base; } lender; // of memory that another process has lent
    int opened; // how often
};
// Memory of cuMemCreate; its file can be mapped.
struct handle { int fd, device; size_t size; unsigned handle_types; };
// What is in a CUipcMemHandle: like the driver's it does not tell an allocation from a later one at its address.
struct ticket { struct lender lender; int fd, device; size_t size; };

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static int initialised, device_count = 2;
static struct { struct CUctx_st ctx; int refs; } primary[DEVICES_MAX];
static int contexts_created, contexts_made, live_streams, live_events, live_pinned, live_handles, live_modules;
static int kernels, contexts_ruined;
static struct piece pieces[PIECES_MAX];
static int piece_count;
static unsigned long long last_id;
static uintptr_t place;
static struct handle handles[PIECES_MAX];
static char call_log[LOG_BYTES_MAX];
static size_t log_len;
static const char *log_path;
static struct { char call[64]; int nth, seen; CUresult code; } fault;
static long calls_total;
static int capturing, capture_ruined;
static struct { int dmabuf, dmabuf_across, pcie_flag, gdr, polls, hidden, exportable, jit; } option = { 1, 1, 1, 1, 3, 0, 1, 1 };

static __thread CUcontext stack[STACK_MAX];
static __thread int depth;
static __thread CUstreamCaptureMode capture_mode;

static int lock(void) { pthread_mutex_lock(&mutex); return 0; }
static void unlock(int *unused) { (void)unused; pthread_mutex_unlock(&mutex); }
#define LOCKED __attribute__((cleanup(unlock), unused)) int locked_ = lock()

static const char *name(CUcontext ctx) { return ctx ? ctx->name : "none"; }
static CUcontext top(void) { return depth ? stack[depth - 1] : NULL; }

// Writes a call down; the result is what it has to fail with.
__attribute__((format(printf, 2, 3)))
static CUresult enter(const char *call, const char *format, ...) {
    char line[256];
    int used = snprintf(line, sizeof line, "%d %s", gettid(), call);
    if (*format) {
        va_list args;
        va_start(args, format);
        used += snprintf(line + used, sizeof line - used, " ");
        vsnprintf(line + used, sizeof line - used, format, args);
        va_end(args);
    }
    size_t len = strlen(line);
    if (log_len + len + 2 < LOG_BYTES_MAX) {
        memcpy(call_log + log_len, line, len);
        call_log[log_len + len] = '\n';
        log_len += len + 1;
    }
    if (log_path) {
        FILE *file = fopen(log_path, "a");
        if (file) {
            fprintf(file, "%s\n", line);
            fclose(file);
        }
    }
    calls_total++;
    if (fault.nth && (!strcmp(fault.call, "*") || !strcmp(fault.call, call)) && ++fault.seen == fault.nth)
        return fault.code;
    return initialised || !strcmp(call, "cuInit") ? CUDA_SUCCESS : 3;
}
#define ENTER(call, ...) \
    LOCKED; \
    do { \
        CUresult rc_ = enter(call, __VA_ARGS__); \
        if (rc_ != CUDA_SUCCESS) return rc_; \
    } while (0)
#define NEED_CONTEXT() \
    if (!top() || !top()->alive) return CUDA_ERROR_INVALID_CONTEXT
// What CUDA calls a potentially unsafe call while a thread captures in the global mode.
#define UNSAFE_IN_CAPTURE() \
    if (capturing && capture_mode != CU_STREAM_CAPTURE_MODE_RELAXED) { \
        capture_ruined = 1; \
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED; \
    }

__attribute__((constructor)) static void from_environment(void) {
    const char *text = getenv("CUDA_STANDIN_DEVICES");
    if (text) device_count = atoi(text) < DEVICES_MAX ? atoi(text) : DEVICES_MAX;
    log_path = getenv("CUDA_STANDIN_LOG");
    text = getenv("CUDA_STANDIN_HIDDEN");
    option.hidden = text && atoi(text);
    text = getenv("CUDA_STANDIN_FAIL");
    if (text) sscanf(text, "%63[^:]:%d:%u", fault.call, &fault.nth, (unsigned *)&fault.code);
    for (int i = 0; i < DEVICES_MAX; i++) {
        primary[i].ctx.device = i;
        snprintf(primary[i].ctx.name, sizeof primary[i].ctx.name, "primary%d", i);
    }
}

static struct piece *find(uintptr_t addr) {
    for (int i = 0; i < piece_count; i++)
        if (addr >= pieces[i].base && addr < pieces[i].base + pieces[i].size) return &pieces[i];
    return NULL;
}

// How many of the bytes at addr lie behind each other, at most bytes, and where they really are.
static size_t run(uintptr_t addr, size_t bytes, char **at) {
    const struct piece *p = find(addr);
    *at = p && p->alias ? p->alias + (addr - p->base) : (char *)addr;
    if (p) return p->base + p->size - addr < bytes ? p->base + p->size - addr : bytes;
    // Ordinary memory, which must not reach into a GPU's.
    for (int i = 0; i < piece_count; i++)
        if (pieces[i].base > addr && pieces[i].base - addr < bytes) bytes = pieces[i].base - addr;
    return bytes;
}

static void move_bytes(uintptr_t dst, uintptr_t src, size_t bytes) {
    while (bytes) {
        char *to, *from;
        size_t step = run(dst, run(src, bytes, &from), &to);
        memcpy(to, from, step);
        dst += step, src += step, bytes -= step;
    }
}

// Whether all of this is memory of a device.
static int on_device(uintptr_t addr, size_t bytes) {
    while (bytes) {
        const struct piece *p = find(addr);
        if (!p || p->kind == HOST || p->kind == VMM_ON_HOST) return 0;
        size_t step = p->base + p->size - addr;
        if (step >= bytes) return 1;
        addr += step, bytes -= step;
    }
    return 1;
}

CUresult cuInit(unsigned int flags) {
    ENTER("cuInit", "%s", "");
    (void)flags;
    if (!device_count) return CUDA_ERROR_NO_DEVICE;
    initialised = 1;
    return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
    *version = 12090;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char **text) {
    static __thread char buffer[32];
    snprintf(buffer, sizeof buffer, "STANDIN_ERROR_%u", (unsigned)error);
    *text = buffer;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    (void)error;
    *text = "told to fail";
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
    ENTER("cuDeviceGetCount", "%s", "");
    *count = device_count;
    return CUDA_SUCCESS;
}

// Handles differ from ordinals, so that mixing them up shows.
enum { HANDLE_BASE = 40 };
static int ordinal(CUdevice device) { return device - HANDLE_BASE; }
#define NEED_DEVICE(device) \
    if (ordinal(device) < 0 || ordinal(device) >= device_count) return CUDA_ERROR_INVALID_DEVICE

CUresult cuDeviceGet(CUdevice *device, int number) {
    ENTER("cuDeviceGet", "%d", number);
    if (number < 0 || number >= device_count) return CUDA_ERROR_INVALID_DEVICE;
    *device = number + HANDLE_BASE;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    ENTER("cuDeviceGetAttribute", "%d", (int)attribute);
    NEED_DEVICE(device);
    switch ((int)attribute) {
    case CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED: *value = option.dmabuf; return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED: *value = option.gdr; return CUDA_SUCCESS;
    default: return CUDA_ERROR_INVALID_VALUE;
    }
}

CUresult cuDeviceGetName(char *text, int len, CUdevice device) {
    ENTER("cuDeviceGetName", "%s", "");
    NEED_DEVICE(device);
    snprintf(text, len, "Stand-in GPU %d", ordinal(device));
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetPCIBusId(char *text, int len, CUdevice device) {
    ENTER("cuDeviceGetPCIBusId", "%s", "");
    NEED_DEVICE(device);
    snprintf(text, len, "0000:%02X:00.0", 0x1a + ordinal(device));
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned int *flags, int *active) {
    ENTER("cuDevicePrimaryCtxGetState", "%d", ordinal(device));
    NEED_DEVICE(device);
    *flags = 0;
    *active = primary[ordinal(device)].refs > 0;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *ctx, CUdevice device) {
    ENTER("cuDevicePrimaryCtxRetain", "%d", ordinal(device));
    NEED_DEVICE(device);
    if (primary[ordinal(device)].refs++ == 0) contexts_created++;
    primary[ordinal(device)].ctx.alive = 1;
    *ctx = &primary[ordinal(device)].ctx;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    ENTER("cuDevicePrimaryCtxRelease", "%d", ordinal(device));
    NEED_DEVICE(device);
    if (primary[ordinal(device)].refs == 0) return CUDA_ERROR_INVALID_CONTEXT;
    if (--primary[ordinal(device)].refs == 0) primary[ordinal(device)].ctx.alive = 0;
    return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent_v2(CUcontext ctx) {
    ENTER("cuCtxPushCurrent", "%s", name(ctx));
    if (!ctx || !ctx->alive || depth == STACK_MAX) return CUDA_ERROR_INVALID_CONTEXT;
    stack[depth++] = ctx;
    return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent_v2(CUcontext *ctx) {
    ENTER("cuCtxPopCurrent", "%s", name(top()));
    if (!depth) return CUDA_ERROR_INVALID_CONTEXT;
    *ctx = stack[--depth];
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *ctx) {
    ENTER("cuCtxGetCurrent", "%s", "");
    *ctx = top();
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext ctx) {
    ENTER("cuCtxSetCurrent", "%s", name(ctx));
    if (depth) depth--;
    if (ctx) stack[depth++] = ctx;
    return CUDA_SUCCESS;
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode) {
    ENTER("cuThreadExchangeStreamCaptureMode", "%d", (int)*mode);
    CUstreamCaptureMode before = capture_mode;
    capture_mode = *mode;
    *mode = before;
    return CUDA_SUCCESS;
}

static CUresult attribute_of(void *data, CUpointer_attribute attribute, const struct piece *p) {
    switch ((int)attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT: *(CUcontext *)data = p->ctx; break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
        *(unsigned *)data = p->kind == HOST || p->kind == VMM_ON_HOST ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
        break;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID: *(unsigned long long *)data = p->id; break;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED: *(unsigned char *)data = p->kind == MANAGED; break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)data = p->device; break;
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE: *(unsigned char *)data = p->kind == DEVICE; break;
    case CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE: *(unsigned char *)data = 1; break;
    case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE: *(void **)data = p->kind == ASYNC ? (void *)0x5000 : NULL; break;
    case CU_POINTER_ATTRIBUTE_MAPPING_SIZE: *(size_t *)data = p->size; break;
    case CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR: *(CUdeviceptr *)data = p->base; break;
    default: return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttributes(unsigned int n, CUpointer_attribute *attributes, void **data, CUdeviceptr addr) {
    ENTER("cuPointerGetAttributes", "%u", n);
    const struct piece *p = find(addr);
    for (unsigned i = 0; p && i < n; i++) {
        CUresult rc = attribute_of(data[i], attributes[i], p);
        if (rc != CUDA_SUCCESS) return rc;
    }
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr addr) {
    ENTER("cuPointerGetAttribute", "%d", (int)attribute);
    const struct piece *p = find(addr);
    return p ? attribute_of(data, attribute, p) : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuPointerSetAttribute(const void *value, CUpointer_attribute attribute, CUdeviceptr addr) {
    ENTER("cuPointerSetAttribute", "%d", (int)attribute);
    NEED_CONTEXT();
    struct piece *p = find(addr);
    if (!p || attribute != CU_POINTER_ATTRIBUTE_SYNC_MEMOPS || p->kind == VMM) return CUDA_ERROR_INVALID_VALUE;
    p->sync_memops = *(const unsigned *)value;
    return CUDA_SUCCESS;
}

CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr addr) {
    ENTER("cuMemGetAddressRange", "%s", name(top()));
    NEED_CONTEXT();
    const struct piece *p = find(addr);
    if (!p) return CUDA_ERROR_NOT_FOUND;
    *base = p->base;
    *size = p->size;
    return CUDA_SUCCESS;
}

// Handles below are of cuMemCreate, those from here on stand for a mapped piece.
enum { RETAINED = PIECES_MAX };

CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle *handle, void *addr) {
    ENTER("cuMemRetainAllocationHandle", "%s", "");
    const struct piece *p = find((uintptr_t)addr);
    if (!p || (p->kind != VMM && p->kind != VMM_ON_HOST)) return CUDA_ERROR_INVALID_VALUE;
    *handle = RETAINED + (p - pieces);
    live_handles++;
    return CUDA_SUCCESS;
}

CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp *prop, CUmemGenericAllocationHandle handle) {
    ENTER("cuMemGetAllocationPropertiesFromHandle", "%s", "");
    if (handle < RETAINED) return CUDA_ERROR_INVALID_VALUE;
    const struct piece *p = &pieces[handle - RETAINED];
    memset(prop, 0, sizeof *prop);
    prop->type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop->location.type = p->kind == VMM ? CU_MEM_LOCATION_TYPE_DEVICE : CU_MEM_LOCATION_TYPE_HOST_NUMA;
    prop->location.id = p->device;
    prop->allocFlags.gpuDirectRDMACapable = 1;
    prop->requestedHandleTypes = p->handle_types;
    return CUDA_SUCCESS;
}

CUresult cuMemExportToShareableHandle(void *shareable, CUmemGenericAllocationHandle handle, CUmemAllocationHandleType type,
                                      unsigned long long flags) {
    ENTER("cuMemExportToShareableHandle", "%d", (int)type);
    if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR || flags) return CUDA_ERROR_INVALID_VALUE;
    int file = handle < RETAINED ? handles[handle].fd + 1 : pieces[handle - RETAINED].file;
    unsigned types = handle < RETAINED ? handles[handle].handle_types : pieces[handle - RETAINED].handle_types;
    if (!(types & type) || !file) return CUDA_ERROR_INVALID_VALUE;
    int fd = fcntl(file - 1, F_DUPFD_CLOEXEC, 0);
    if (fd < 0) return CUDA_ERROR_OUT_OF_MEMORY;
    *(int *)shareable = fd;
    return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    ENTER("cuMemRelease", "%s", "");
    if (handle < RETAINED) {
        // What is mapped stays.
        close(handles[handle].fd);
        handles[handle].size = 0;
        return CUDA_SUCCESS;
    }
    live_handles--;
    return CUDA_SUCCESS;
}

CUresult cuMemGetHandleForAddressRange(void *handle, CUdeviceptr addr, size_t size, CUmemRangeHandleType type,
                                       unsigned long long flags) {
    ENTER("cuMemGetHandleForAddressRange", "%s size=%zu flags=%llu", name(top()), size, flags);
    if (type != CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD || addr % PAGE || size % PAGE || !size)
        return CUDA_ERROR_INVALID_VALUE;
    if (!option.dmabuf || (flags && !option.pcie_flag)) return CUDA_ERROR_NOT_SUPPORTED;
    int touched = 0;
    for (int i = 0; i < piece_count; i++) {
        const struct piece *p = &pieces[i];
        if (p->base < addr + size && p->base + p->size > addr) {
            if (p->kind == MANAGED || p->kind == HOST || p->kind == VMM_ON_HOST) return CUDA_ERROR_INVALID_VALUE;
            touched++;
        }
    }
    if (!touched || (touched > 1 && !option.dmabuf_across)) return CUDA_ERROR_INVALID_VALUE;
    char tag[64];
    snprintf(tag, sizeof tag, "dmabuf-cuda-standin-%p", (void *)&mutex);
    int fd = memfd_create(tag, MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, size) != 0) return CUDA_ERROR_OUT_OF_MEMORY;
    *(int *)handle = fd;
    return CUDA_SUCCESS;
}

CUresult cuMemHostAlloc(void **base, size_t bytes, unsigned int flags) {
    ENTER("cuMemHostAlloc", "%s flags=%u", name(top()), flags);
    NEED_CONTEXT();
    UNSAFE_IN_CAPTURE();
    *base = malloc(bytes);
    if (!*base) return CUDA_ERROR_OUT_OF_MEMORY;
    live_pinned++;
    return CUDA_SUCCESS;
}

CUresult cuMemFreeHost(void *base) {
    ENTER("cuMemFreeHost", "%s", name(top()));
    NEED_CONTEXT();
    free(base);
    live_pinned--;
    return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream *stream, unsigned int flags) {
    ENTER("cuStreamCreate", "%s flags=%u", name(top()), flags);
    NEED_CONTEXT();
    *stream = calloc(1, sizeof **stream);
    (*stream)->ctx = top();
    live_streams++;
    return CUDA_SUCCESS;
}

// Whether kernels of a context may touch all of this.
static int kernels_reach(CUcontext ctx, uintptr_t addr, size_t bytes) {
    while (bytes) {
        const struct piece *p = find(addr);
        int reached = p && (p->kind == IMPORTED ? p->ctx == ctx : p->kind == VMM ? p->access >> ctx->device & 1
                            : (p->kind == DEVICE || p->kind == ASYNC) && p->device == ctx->device);
        if (!reached) return 0;
        size_t step = p->base + p->size - addr;
        if (step >= bytes) return 1;
        addr += step, bytes -= step;
    }
    return 1;
}

// The copy kernel. What it must not touch ends its context, as on a GPU.
static void run_kernel(CUcontext ctx, const struct unit *units, unsigned count) {
    for (unsigned i = 0; i < count; i++) {
        const struct unit *u = &units[i];
        if (!kernels_reach(ctx, u->dst, u->bytes) || !kernels_reach(ctx, u->src, u->bytes)) {
            contexts_ruined++;
            return;
        }
        move_bytes(u->dst, u->src, u->bytes);
    }
}

// Does the oldest copy once it has been asked for often enough.
static void advance(CUstream stream) {
    if (stream->done == stream->queued || --stream->polls_left > 0) return;
    const struct op *op = &stream->ops[stream->done++ % OPS_MAX];
    if (op->units) run_kernel(stream->ctx, (const struct unit *)op->src, op->units);
    else move_bytes(op->dst, op->src, op->bytes);
    stream->polls_left = option.polls;
}

CUresult cuStreamQuery(CUstream stream) {
    ENTER("cuStreamQuery", "%s", name(top()));
    NEED_CONTEXT();
    UNSAFE_IN_CAPTURE();
    advance(stream);
    return stream->done == stream->queued ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

CUresult cuStreamDestroy_v2(CUstream stream) {
    ENTER("cuStreamDestroy", "%s queued=%lu", name(top()), stream->queued - stream->done);
    NEED_CONTEXT();
    live_streams--;
    free(stream);
    return CUDA_SUCCESS;
}

CUresult cuEventCreate(CUevent *event, unsigned int flags) {
    ENTER("cuEventCreate", "%s flags=%u", name(top()), flags);
    NEED_CONTEXT();
    *event = calloc(1, sizeof **event);
    (*event)->ctx = top();
    live_events++;
    return CUDA_SUCCESS;
}

CUresult cuEventRecord(CUevent event, CUstream stream) {
    ENTER("cuEventRecord", "%s", name(top()));
    NEED_CONTEXT();
    if (event->ctx != stream->ctx) return CUDA_ERROR_INVALID_HANDLE;
    event->stream = stream;
    event->mark = stream->queued;
    return CUDA_SUCCESS;
}

CUresult cuEventQuery(CUevent event) {
    ENTER("cuEventQuery", "%s", name(top()));
    NEED_CONTEXT();
    UNSAFE_IN_CAPTURE();
    if (!event->stream) return CUDA_SUCCESS;
    if (event->stream->done < event->mark) advance(event->stream);
    return event->stream->done >= event->mark ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

CUresult cuEventDestroy_v2(CUevent event) {
    ENTER("cuEventDestroy", "%s", name(top()));
    NEED_CONTEXT();
    live_events--;
    free(event);
    return CUDA_SUCCESS;
}

static CUresult queue_op(struct op op, CUstream stream) {
    if (stream->ctx != top()) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->queued - stream->done == OPS_MAX) return CUDA_ERROR_OUT_OF_MEMORY;
    if (stream->queued == stream->done) stream->polls_left = option.polls;
    stream->ops[stream->queued++ % OPS_MAX] = op;
    return CUDA_SUCCESS;
}

static CUresult queue(CUdeviceptr dst, CUdeviceptr src, size_t bytes, CUstream stream) {
    struct op op = { dst, src, bytes, 0 };
    return queue_op(op, stream);
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    ENTER("cuModuleLoadData", "%s", name(top()));
    NEED_CONTEXT();
    UNSAFE_IN_CAPTURE();
    if (!option.jit || !strstr(image, ".entry nixl_libfabric_copy(")) return CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
    *module = calloc(1, sizeof **module);
    (*module)->ctx = top();
    live_modules++;
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *text) {
    ENTER("cuModuleGetFunction", "%s", text);
    NEED_CONTEXT();
    if (strcmp(text, "nixl_libfabric_copy")) return CUDA_ERROR_NOT_FOUND;
    *function = (CUfunction)module;
    return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {
    ENTER("cuModuleUnload", "%s", name(top()));
    NEED_CONTEXT();
    live_modules--;
    free(module);
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                        CUstream stream, void **parameters, void **extra) {
    ENTER("cuLaunchKernel", "%s blocks=%u", name(top()), gx);
    NEED_CONTEXT();
    if (f->ctx != top()) return CUDA_ERROR_INVALID_HANDLE;
    if (!gx || gy != 1 || gz != 1 || bx != 256 || by != 1 || bz != 1 || shared || extra) return CUDA_ERROR_INVALID_VALUE;
    struct op op = { 0, *(uint64_t *)parameters[0], 0, gx };
    kernels++;
    return queue_op(op, stream);
}

CUresult cuMemcpyAsync(CUdeviceptr dst, CUdeviceptr src, size_t bytes, CUstream stream) {
    ENTER("cuMemcpyAsync", "%s bytes=%zu", name(top()), bytes);
    NEED_CONTEXT();
    return queue(dst, src, bytes, stream);
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr dst, const void *src, size_t bytes, CUstream stream) {
    ENTER("cuMemcpyHtoDAsync", "%s bytes=%zu", name(top()), bytes);
    NEED_CONTEXT();
    return on_device(dst, bytes) ? queue(dst, (uintptr_t)src, bytes, stream) : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemcpyDtoHAsync_v2(void *dst, CUdeviceptr src, size_t bytes, CUstream stream) {
    ENTER("cuMemcpyDtoHAsync", "%s bytes=%zu", name(top()), bytes);
    NEED_CONTEXT();
    return on_device(src, bytes) ? queue((uintptr_t)dst, src, bytes, stream) : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuStreamSynchronize(CUstream stream) {
    ENTER("cuStreamSynchronize", "%s", name(top()));
    NEED_CONTEXT();
    UNSAFE_IN_CAPTURE();
    while (stream->done != stream->queued) {
        stream->polls_left = 0;
        advance(stream);
    }
    return CUDA_SUCCESS;
}

// libfabric asks for the first name of this call, and links what the driver has under it.
#undef cuMemGetAddressRange
CUresult cuMemGetAddressRange(CUdeviceptr *base, size_t *size, CUdeviceptr addr) {
    return cuMemGetAddressRange_v2(base, size, addr);
}

CUresult cuDeviceCanAccessPeer(int *can, CUdevice device, CUdevice peer) {
    (void)device, (void)peer;
    *can = 1;
    return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr *base, size_t size, size_t alignment, CUdeviceptr wanted, unsigned long long flags) {
    ENTER("cuMemAddressReserve", "%zu", size);
    (void)alignment, (void)wanted, (void)flags;
    void *at = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    *base = (uintptr_t)at;
    return CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr base, size_t size) {
    ENTER("cuMemAddressFree", "%zu", size);
    munmap((void *)(uintptr_t)base, size);
    return CUDA_SUCCESS;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *prop, unsigned long long flags) {
    ENTER("cuMemCreate", "%zu", size);
    (void)flags;
    for (int i = 1; i < PIECES_MAX; i++) {
        if (handles[i].size) continue;
        int fd = memfd_create("vmm", MFD_CLOEXEC);
        if (fd < 0 || ftruncate(fd, size) != 0) return CUDA_ERROR_OUT_OF_MEMORY;
        handles[i] = (struct handle){ fd, prop->location.id, size, prop->requestedHandleTypes };
        *handle = i;
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuMemMap(CUdeviceptr addr, size_t size, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long flags) {
    ENTER("cuMemMap", "%zu", size);
    (void)flags;
    if (handle >= RETAINED || offset + size > handles[handle].size || piece_count == PIECES_MAX) return CUDA_ERROR_INVALID_VALUE;
    char *alias = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, handles[handle].fd, offset);
    if (alias == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    struct piece p = { .base = addr, .size = size, .kind = VMM, .device = handles[handle].device, .alias = alias, .id = ++last_id };
    p.file = fcntl(handles[handle].fd, F_DUPFD_CLOEXEC, 0) + 1;
    p.handle_types = handles[handle].handle_types;
    pieces[piece_count++] = p;
    return CUDA_SUCCESS;
}

CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *handle, void *shareable, CUmemAllocationHandleType type) {
    ENTER("cuMemImportFromShareableHandle", "%d", (int)type);
    struct stat facts;
    int given = (int)(intptr_t)shareable;
    if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR || fstat(given, &facts)) return CUDA_ERROR_INVALID_VALUE;
    for (int i = 1; i < PIECES_MAX; i++) {
        if (handles[i].size) continue;
        int fd = fcntl(given, F_DUPFD_CLOEXEC, 0);
        if (fd < 0) return CUDA_ERROR_OUT_OF_MEMORY;
        handles[i] = (struct handle){ fd, 0, (size_t)facts.st_size, 0 };
        *handle = i;
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuMemSetAccess(CUdeviceptr addr, size_t size, const CUmemAccessDesc *access, size_t count) {
    ENTER("cuMemSetAccess", "%zu", size);
    for (int i = 0; i < piece_count; i++)
        for (size_t k = 0; k < count && pieces[i].base >= addr && pieces[i].base < addr + size; k++)
            if (access[k].flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE) pieces[i].access |= 1u << access[k].location.id;
    return CUDA_SUCCESS;
}

CUresult cuMemGetAccess(unsigned long long *flags, const CUmemLocation *location, CUdeviceptr addr) {
    ENTER("cuMemGetAccess", "%d", location->id);
    const struct piece *p = find(addr);
    if (!p || p->kind != VMM) return CUDA_ERROR_INVALID_VALUE;
    *flags = p->access >> location->id & 1 ? CU_MEM_ACCESS_FLAGS_PROT_READWRITE : 0;
    return CUDA_SUCCESS;
}

static void forget(uintptr_t base, size_t size) {
    for (int i = piece_count - 1; i >= 0; i--) {
        if (pieces[i].base < base || pieces[i].base >= base + size) continue;
        if (pieces[i].alias) munmap(pieces[i].alias, pieces[i].size);
        if (pieces[i].file) close(pieces[i].file - 1);
        pieces[i] = pieces[--piece_count];
    }
}

CUresult cuMemUnmap(CUdeviceptr addr, size_t size) {
    ENTER("cuMemUnmap", "%zu", size);
    forget(addr, size);
    return CUDA_SUCCESS;
}

CUresult cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr addr) {
    ENTER("cuIpcGetMemHandle", "%s", name(top()));
    NEED_CONTEXT();
    const struct piece *p = find(addr);
    if (!p || p->kind != DEVICE || !p->file) return CUDA_ERROR_INVALID_VALUE;
    struct ticket ticket = { { getpid(), &mutex, p->base }, p->file - 1, p->device, p->size };
    memset(handle, 0, sizeof *handle);
    memcpy(handle, &ticket, sizeof ticket);
    return CUDA_SUCCESS;
}

static int same_lender(const struct lender *a, const struct lender *b) {
    return a->pid == b->pid && a->tag == b->tag && a->base == b->base;
}

#undef cuIpcOpenMemHandle
CUresult cuIpcOpenMemHandle_v2(CUdeviceptr *addr, CUipcMemHandle handle, unsigned int flags) {
    ENTER("cuIpcOpenMemHandle", "%s flags=%u", name(top()), flags);
    NEED_CONTEXT();
    struct ticket t;
    memcpy(&t, &handle, sizeof t);
    if (t.lender.pid == getpid() && t.lender.tag == &mutex) return CUDA_ERROR_INVALID_CONTEXT;
    // What is open stays what it is, whatever became of it in the other process.
    for (int i = 0; i < piece_count; i++) {
        if (!pieces[i].opened || pieces[i].ctx != top() || !same_lender(&pieces[i].lender, &t.lender)) continue;
        pieces[i].opened++;
        *addr = pieces[i].base;
        return CUDA_SUCCESS;
    }
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", t.lender.pid, t.fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0 || piece_count == PIECES_MAX) return CUDA_ERROR_MAP_FAILED;
    char *base = mmap(NULL, t.size, option.hidden ? PROT_NONE : PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    char *alias = option.hidden ? mmap(NULL, t.size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) : NULL;
    close(fd);
    if (base == MAP_FAILED || alias == MAP_FAILED) return CUDA_ERROR_MAP_FAILED;
    struct piece p = { .base = (uintptr_t)base, .size = t.size, .kind = IMPORTED, .device = t.device, .ctx = top(), .alias = alias,
                       .id = ++last_id, .lender = t.lender, .opened = 1 };
    pieces[piece_count++] = p;
    *addr = p.base;
    return CUDA_SUCCESS;
}

CUresult cuIpcCloseMemHandle(CUdeviceptr addr) {
    ENTER("cuIpcCloseMemHandle", "%s", name(top()));
    NEED_CONTEXT();
    struct piece *p = find(addr);
    if (!p || !p->opened || p->base != addr) return CUDA_ERROR_INVALID_VALUE;
    if (--p->opened == 0) {
        size_t size = p->size;
        forget(addr, size);
        munmap((void *)(uintptr_t)addr, size);
    }
    return CUDA_SUCCESS;
}

// ---- the test's side ----

// What an application does when it uses a device: its primary context comes into being and is kept.
CUcontext standin_app_uses(int device) {
    LOCKED;
    primary[device].refs++;
    primary[device].ctx.alive = 1;
    return &primary[device].ctx;
}

// cuCtxCreate of the application, which leaves nothing current.
CUcontext standin_app_context(int device) {
    LOCKED;
    CUcontext ctx = calloc(1, sizeof *ctx);
    ctx->device = device;
    ctx->alive = 1;
    snprintf(ctx->name, sizeof ctx->name, "own%d", contexts_made++);
    return ctx;
}

// Makes a context the only one on the calling thread's stack; NULL empties the stack.
void standin_app_current(CUcontext ctx) {
    depth = 0;
    if (ctx) stack[depth++] = ctx;
}

int standin_depth(void) { return depth; }
CUcontext standin_current(void) { return top(); }
int standin_capture_mode(void) { return (int)capture_mode; }

// The next memory that is made begins here, where nothing may be mapped: allocators give an address again.
void standin_place(uint64_t addr) {
    LOCKED;
    place = addr;
}

// Forgets all memory but the piece at this address.
void standin_forget_all_but(uint64_t addr) {
    LOCKED;
    for (int i = piece_count - 1; i >= 0; i--)
        if (pieces[i].base != addr) forget(pieces[i].base, pieces[i].size);
}

// Memory made of consecutive handles, one for each size; device -1 leaves a hole. Sizes are in bytes.
uint64_t standin_map(int kind, const size_t *sizes, const int *devices, int count, CUcontext ctx) {
    LOCKED;
    size_t total = 0;
    for (int i = 0; i < count; i++) total += sizes[i];
    int on_gpu = kind != HOST && kind != VMM_ON_HOST && kind != MANAGED;
    int hidden = option.hidden && on_gpu;
    int fixed = place ? MAP_FIXED_NOREPLACE : 0;
    char *base = mmap((void *)place, total, hidden ? PROT_NONE : PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | fixed, -1, 0);
    place = 0;
    if (base == MAP_FAILED || piece_count + count > PIECES_MAX) return 0;
    char *at = base;
    for (int i = 0; i < count; at += sizes[i++]) {
        if (devices[i] < 0) continue;
        // Without a file, where there are too many, it can be used but not lent.
        int fd = on_gpu && (uintptr_t)at % PAGE == 0 ? memfd_create("gpu", MFD_CLOEXEC) : -1;
        if (fd >= 0 && ftruncate(fd, sizes[i]) != 0) return 0;
        int flags = fd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
        char *alias = NULL;
        if (hidden) alias = mmap(NULL, sizes[i], PROT_READ | PROT_WRITE, flags, fd, 0);
        else if (fd >= 0 && mmap(at, sizes[i], PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, 0) == MAP_FAILED) return 0;
        if (alias == MAP_FAILED) return 0;
        struct piece p = { .base = (uintptr_t)at, .size = sizes[i], .kind = (enum kind)kind, .device = devices[i], .ctx = ctx,
                           .alias = alias, .id = ++last_id, .file = fd + 1, .access = 1u << devices[i],
                           .handle_types = option.exportable };
        pieces[piece_count++] = p;
    }
    return (uintptr_t)base;
}

// Frees what standin_map made of one size. Returns 0 if nothing begins there.
int standin_unmap(uint64_t base) {
    LOCKED;
    const struct piece *p = find(base);
    if (!p || p->base != base) return 0;
    size_t size = p->size;
    forget(base, size);
    munmap((void *)(uintptr_t)base, size);
    return 1;
}

// A copy between memory of any kinds, over when it returns.
void standin_copy(uint64_t dst, uint64_t src, size_t bytes) {
    LOCKED;
    move_bytes(dst, src, bytes);
}

// Fails the nth call (from 1 on) of a name from now on, or of any name ("*"); nth 0 fails none.
void standin_fail(const char *call, int nth, unsigned code) {
    LOCKED;
    snprintf(fault.call, sizeof fault.call, "%s", call);
    fault.nth = nth;
    fault.seen = 0;
    fault.code = (CUresult)code;
}

void standin_option(const char *key, int value) {
    LOCKED;
    if (!strcmp(key, "dmabuf")) option.dmabuf = value;
    else if (!strcmp(key, "dmabuf_across")) option.dmabuf_across = value;
    else if (!strcmp(key, "pcie_flag")) option.pcie_flag = value;
    else if (!strcmp(key, "gdr")) option.gdr = value;
    else if (!strcmp(key, "polls")) option.polls = value;
    else if (!strcmp(key, "devices")) device_count = value;
    else if (!strcmp(key, "hidden")) option.hidden = value;
    else if (!strcmp(key, "capturing")) capturing = value;
    else if (!strcmp(key, "exportable")) option.exportable = value;
    else if (!strcmp(key, "jit")) option.jit = value;
    else abort();
}

long standin_count(const char *what) {
    LOCKED;
    if (!strcmp(what, "calls")) return calls_total;
    if (!strcmp(what, "contexts_created")) return contexts_created;
    if (!strcmp(what, "streams")) return live_streams;
    if (!strcmp(what, "events")) return live_events;
    if (!strcmp(what, "pinned")) return live_pinned;
    if (!strcmp(what, "handles")) return live_handles;
    if (!strcmp(what, "modules")) return live_modules;
    if (!strcmp(what, "kernels")) return kernels;
    if (!strcmp(what, "contexts_ruined")) return contexts_ruined;
    if (!strcmp(what, "opened")) {
        int opened = 0;
        for (int i = 0; i < piece_count; i++) opened += pieces[i].opened;
        return opened;
    }
    if (!strcmp(what, "pieces")) return piece_count;
    if (!strcmp(what, "capture_ruined")) return capture_ruined;
    if (!strncmp(what, "primary", 7)) return primary[atoi(what + 7)].refs;
    abort();
}

// Forgets what a test let leak on purpose: live objects, capture mode; primary contexts are held once where active.
void standin_reset_counts(void) {
    LOCKED;
    live_streams = live_events = live_pinned = live_handles = live_modules = 0;
    capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
    for (int i = 0; i < DEVICES_MAX; i++) primary[i].refs = primary[i].refs > 0;
}

// Writes down what another stand-in sees, with the context that is current then.
void standin_note(const char *text) {
    LOCKED;
    enter(text, "%s", name(top()));
}

// Copies the log, one call a line as "thread call arguments", and forgets it. Returns its length.
size_t standin_take_log(char *into, size_t cap) {
    LOCKED;
    size_t len = log_len < cap ? log_len : cap;
    memcpy(into, call_log, len);
    log_len = 0;
    return len;
}

// The part of a dmabuf's name in /proc/self/fd that belongs to this copy of the library.
const void *standin_tag(void) { return &mutex; }
