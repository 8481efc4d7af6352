/* A CUDA driver without a GPU: records every call, fails on request, and passes launches to emulated kernels, if any.
   Device memory is the memory of this process. */
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
typedef int Result;

static char record[1 << 20];
static size_t recorded;
static char failing[64];
static Result failure;
static int devices = 2, major = 9, minor = 0, capture_mode = 0;
static void *contexts[16];
static int depth;

extern int emulated_launch(const char *name, unsigned across, unsigned down, unsigned threads, void **parameters)
    __attribute__((weak));

EXPORT const char *stand_in_record(void) { return record; }
EXPORT void stand_in_forget(void) { record[recorded = 0] = 0; }
EXPORT void stand_in_fail(const char *call, int code) {
    snprintf(failing, sizeof failing, "%s", call);
    failure = code;
}
EXPORT void stand_in_devices(int count, int of_major, int of_minor) {
    devices = count;
    major = of_major;
    minor = of_minor;
}
EXPORT int stand_in_depth(void) { return depth; }

/* Records a call and returns its result code. */
static Result call(const char *name, const char *format, ...) {
    if (recorded > sizeof record - 1024) recorded = 0; /* a benchmark makes more calls than there is room for */
    va_list arguments;
    va_start(arguments, format);
    recorded += snprintf(record + recorded, sizeof record - recorded, "%s", name);
    recorded += vsnprintf(record + recorded, sizeof record - recorded, format, arguments);
    recorded += snprintf(record + recorded, sizeof record - recorded, "\n");
    va_end(arguments);
    return strcmp(name, failing) == 0 ? failure : 0;
}

#define CALL(name, ...)                          \
    do {                                         \
        Result result = call(name, __VA_ARGS__); \
        if (result) return result;               \
    } while (0)

EXPORT Result cuInit(unsigned flags) { return call("cuInit", " %u", flags); }

EXPORT Result cuGetErrorName(Result error, const char **text) {
    *text = error == 100 ? "CUDA_ERROR_NO_DEVICE" : error == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : NULL;
    return *text ? 0 : 1;
}

EXPORT Result cuGetErrorString(Result error, const char **text) {
    *text = error == 100 ? "no CUDA-capable device is detected" : error == 700 ? "an illegal memory access" : NULL;
    return *text ? 0 : 1;
}

EXPORT Result cuDriverGetVersion(int *version) {
    CALL("cuDriverGetVersion", "");
    *version = 13020;
    return 0;
}

EXPORT Result cuDeviceGetCount(int *count) {
    CALL("cuDeviceGetCount", "");
    *count = devices;
    return 0;
}

EXPORT Result cuDeviceGet(int *device, int ordinal) {
    CALL("cuDeviceGet", " %d", ordinal);
    *device = 40 + ordinal;
    return 0;
}

EXPORT Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    CALL("cuDeviceGetAttribute", " %d of %d", attribute, device);
    *value = attribute == 75 ? major : attribute == 76 ? minor : 0;
    return 0;
}

EXPORT Result cuDevicePrimaryCtxRetain(void **context, int device) {
    CALL("cuDevicePrimaryCtxRetain", " %d", device);
    *context = (void *)(uintptr_t)(0xc000 + device);
    return 0;
}

EXPORT Result cuCtxPushCurrent_v2(void *context) {
    CALL("cuCtxPushCurrent", " %p", context);
    contexts[depth++ % 16] = context;
    return 0;
}

EXPORT Result cuCtxPopCurrent_v2(void **context) {
    CALL("cuCtxPopCurrent", "");
    *context = depth > 0 ? contexts[--depth % 16] : NULL;
    return 0;
}

EXPORT Result cuThreadExchangeStreamCaptureMode(int *mode) {
    CALL("cuThreadExchangeStreamCaptureMode", " %d", *mode);
    int before = capture_mode;
    capture_mode = *mode;
    *mode = before;
    return 0;
}

EXPORT Result cuLibraryLoadData(void **library, const void *code, int *options, void **values, unsigned count, int *more,
                                void **more_values, unsigned more_count) {
    CALL("cuLibraryLoadData", " %.5s options %u %u mode %d", (const char *)code, count, more_count, capture_mode);
    *library = (void *)0x11b;
    return options || values || more || more_values ? 1 : 0;
}

EXPORT Result cuLibraryUnload(void *library) { return call("cuLibraryUnload", " %p", library); }

EXPORT Result cuLibraryGetKernel(void **kernel, void *library, const char *name) {
    static char names[64][32];
    static int known;
    CALL("cuLibraryGetKernel", " %p %s", library, name);
    for (int index = 0; index < known; ++index) {
        if (strcmp(names[index], name) == 0) {
            *kernel = names[index];
            return 0;
        }
    }
    snprintf(names[known], sizeof names[known], "%s", name);
    *kernel = names[known++];
    return 0;
}

EXPORT Result cuKernelGetFunction(void **function, void *kernel) {
    CALL("cuKernelGetFunction", " %s", (const char *)kernel);
    *function = kernel;
    return depth > 0 ? 0 : 201;
}

EXPORT Result cuLaunchKernel(void *function, unsigned across, unsigned down, unsigned deep, unsigned threads, unsigned by_y,
                             unsigned by_z, unsigned shared, void *stream, void **parameters, void **extra) {
    const char *name = function;
    CALL("cuLaunchKernel", " %s grid %u %u %u block %u %u %u shared %u stream %p context %p", name, across, down, deep, threads,
         by_y, by_z, shared, stream, depth > 0 ? contexts[depth - 1] : NULL);
    if (extra || !parameters) return 1;
    return emulated_launch ? emulated_launch(name, across, down, threads, parameters) : 0;
}
