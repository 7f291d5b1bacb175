/* A libcuda.so.1 for machines without a GPU driver: every call answers "no device".
 * NIXL's own LIBFABRIC plugin links libcuda and does not load without it; ours opens it at run time and needs no stand-in.
 * Only the comparison with the stock plugin uses this file. */

enum { CUDA_ERROR_NO_DEVICE = 100, CUDA_VERSION = 12090 };

int cuDriverGetVersion(int *version) {
    *version = CUDA_VERSION;
    return 0;
}

/* The arguments are never read, so one shape serves every prototype of the C calling convention. */
#define NO_DEVICE(name) \
    int name(void) { return CUDA_ERROR_NO_DEVICE; }

NO_DEVICE(cuInit)
NO_DEVICE(cuDeviceGet)
NO_DEVICE(cuDeviceGetCount)
NO_DEVICE(cuDeviceGetAttribute)
NO_DEVICE(cuDeviceGetPCIBusId)
NO_DEVICE(cuDevicePrimaryCtxRetain)
NO_DEVICE(cuDevicePrimaryCtxRelease)
NO_DEVICE(cuCtxGetCurrent)
NO_DEVICE(cuCtxGetDevice)
NO_DEVICE(cuCtxSetCurrent)
NO_DEVICE(cuCtxPushCurrent)
NO_DEVICE(cuCtxPopCurrent)
NO_DEVICE(cuGetErrorString)
NO_DEVICE(cuGetProcAddress)
NO_DEVICE(cuGetProcAddress_v2)
NO_DEVICE(cuMemGetHandleForAddressRange)
NO_DEVICE(cuPointerGetAttribute)
NO_DEVICE(cuPointerGetAttributes)
