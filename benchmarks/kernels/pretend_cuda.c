/* A libcuda.so.1 that launches nothing and keeps what it was asked to launch (pretended.py). */

#include <string.h>

typedef int CUresult; /* 0 is success */
typedef unsigned long long CUdeviceptr;

typedef struct {
    unsigned grid[3], block[3], shared;
    void *stream, *attributes;
    unsigned attribute_count;
} CUlaunchConfig;

enum { MAX_PARAMETERS = 256 };

CUlaunchConfig pretend_config;
int pretend_count, pretend_sizes[MAX_PARAMETERS];    /* set before a launch: the kernel's parameters, in bytes */
unsigned char pretend_values[MAX_PARAMETERS][8];     /* what they were */

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, void *function, void **parameters, void **extra) {
    (void)function, (void)extra;
    pretend_config = *config;
    memset(pretend_values, 0, sizeof pretend_values);
    for (int i = 0; i < pretend_count; i++) memcpy(pretend_values[i], parameters[i], pretend_sizes[i]);
    return 0;
}

/* Where Triton asks for the address on the device of a tensor's memory. */
CUresult cuPointerGetAttribute(void *result, int attribute, CUdeviceptr pointer) {
    (void)attribute;
    *(CUdeviceptr *)result = pointer;
    return 0;
}

CUresult cuCtxGetCurrent(void **context) {
    *context = (void *)1;
    return 0;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    (void)error;
    *text = "pretended";
    return 0;
}

/* What Triton's launcher links to and does not call here. */
#define SUCCEED(name) \
    CUresult name(void) { return 0; }
SUCCEED(cuCtxGetDevice)
SUCCEED(cuCtxGetLimit)
SUCCEED(cuCtxSetCurrent)
SUCCEED(cuCtxSetLimit)
SUCCEED(cuDeviceGet)
SUCCEED(cuDeviceGetAttribute)
SUCCEED(cuDevicePrimaryCtxRetain)
SUCCEED(cuDriverGetVersion)
SUCCEED(cuFuncGetAttribute)
SUCCEED(cuFuncSetAttribute)
SUCCEED(cuFuncSetCacheConfig)
SUCCEED(cuModuleGetFunction)
SUCCEED(cuModuleLoadData)
SUCCEED(cuModuleUnload)
SUCCEED(cuOccupancyMaxActiveClusters)
SUCCEED(cuPointerGetAttributes)
SUCCEED(cuStreamIsCapturing)
SUCCEED(cuTensorMapEncodeIm2col)
SUCCEED(cuTensorMapEncodeTiled)
