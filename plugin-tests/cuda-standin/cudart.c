// A stand-in for libcudart.so above cuda.c's driver, for whole processes without a GPU: what applications and libfabric
// call. Memory is the driver's; copies are over when they return.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int cudaError_t;
typedef void *cudaStream_t;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2, cudaErrorNoDevice = 100,
       cudaErrorInvalidDevice = 101 };
enum kind { DEVICE, IMPORTED, ASYNC, VMM, MANAGED, HOST };

// Of cuda.c.
unsigned cuInit(unsigned);
unsigned cuDeviceGet(int *, int);
unsigned cuDeviceGetCount(int *);
unsigned cuDevicePrimaryCtxRetain(void **, int);
unsigned cuCtxGetCurrent(void **);
unsigned cuCtxSetCurrent(void *);
struct handle { char bytes[64]; };
unsigned cuIpcGetMemHandle(struct handle *, uint64_t);
unsigned cuIpcOpenMemHandle_v2(uint64_t *, struct handle, unsigned);
unsigned cuIpcCloseMemHandle(uint64_t);
uint64_t standin_map(int kind, const size_t *sizes, const int *devices, int count, void *context);
int standin_unmap(uint64_t base);
void standin_copy(uint64_t dst, uint64_t src, size_t bytes);

static __thread int device;
static void *contexts[8];

// The calling thread uses its device: its primary context is there, and current if none is.
static void *context(void) {
    int handle;
    if (!contexts[device] && (cuInit(0) || cuDeviceGet(&handle, device) || cuDevicePrimaryCtxRetain(&contexts[device], handle)))
        return NULL;
    void *current = NULL;
    cuCtxGetCurrent(&current);
    if (!current) cuCtxSetCurrent(contexts[device]);
    return contexts[device];
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = 0;
    if (cuInit(0) || cuDeviceGetCount(count)) return cudaErrorNoDevice;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *now) {
    *now = device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int wanted) {
    int count;
    if (cudaGetDeviceCount(&count)) return cudaErrorNoDevice;
    if (wanted < 0 || wanted >= count) return cudaErrorInvalidDevice;
    device = wanted;
    void *made = context();
    if (made) cuCtxSetCurrent(made);
    return cudaSuccess;
}

static cudaError_t allocate(void **at, size_t size, enum kind kind) {
    void *made = context();
    if (!made) return cudaErrorNoDevice;
    *at = (void *)(uintptr_t)standin_map(kind, &size, &device, 1, kind == ASYNC || kind == HOST ? NULL : made);
    return *at ? cudaSuccess : cudaErrorMemoryAllocation;
}

static cudaError_t release(void *at) {
    if (!context()) return cudaErrorNoDevice;
    return !at || standin_unmap((uintptr_t)at) ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaMalloc(void **at, size_t size) { return allocate(at, size, DEVICE); }
cudaError_t cudaFree(void *at) { return release(at); }
cudaError_t cudaMallocAsync(void **at, size_t size, cudaStream_t stream) { (void)stream; return allocate(at, size, ASYNC); }
cudaError_t cudaFreeAsync(void *at, cudaStream_t stream) { (void)stream; return release(at); }
cudaError_t cudaMallocManaged(void **at, size_t size, unsigned flags) { (void)flags; return allocate(at, size, MANAGED); }
cudaError_t cudaMallocHost(void **at, size_t size) { return allocate(at, size, HOST); }
cudaError_t cudaFreeHost(void *at) { return release(at); }
cudaError_t cudaHostRegister(void *at, size_t size, unsigned flags) { (void)at, (void)size, (void)flags; return cudaSuccess; }
cudaError_t cudaHostUnregister(void *at) { (void)at; return cudaSuccess; }

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, int kind) {
    (void)kind;
    standin_copy((uintptr_t)to, (uintptr_t)from, size);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, cudaStream_t stream) {
    (void)stream;
    return cudaMemcpy(to, from, size, kind);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    (void)flags;
    *stream = malloc(1);
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) { (void)stream; return cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { free(stream); return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *available = *total = (size_t)16 << 30;
    return cudaSuccess;
}

const char *cudaGetErrorName(cudaError_t error) { (void)error; return "STANDIN_ERROR"; }
const char *cudaGetErrorString(cudaError_t error) { (void)error; return "an error of the stand-in"; }

cudaError_t cudaIpcGetMemHandle(struct handle *handle, void *at) {
    return context() && !cuIpcGetMemHandle(handle, (uintptr_t)at) ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaIpcOpenMemHandle(void **at, struct handle handle, unsigned flags) {
    uint64_t addr = 0;
    if (!context() || cuIpcOpenMemHandle_v2(&addr, handle, flags)) return cudaErrorInvalidValue;
    *at = (void *)(uintptr_t)addr;
    return cudaSuccess;
}

cudaError_t cudaIpcCloseMemHandle(void *at) {
    return context() && !cuIpcCloseMemHandle((uintptr_t)at) ? cudaSuccess : cudaErrorInvalidValue;
}
