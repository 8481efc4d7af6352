/* An NVRTC that compiles nothing: its machine code names the architecture and counts the compilations. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

static int version_minor = 2, compilations, failure;
static char architecture[32];

EXPORT int stand_in_compilations(void) { return compilations; }
EXPORT void stand_in_version(int minor) { version_minor = minor; }
EXPORT void stand_in_fail(int code) { failure = code; }

EXPORT int nvrtcVersion(int *major, int *minor) {
    *major = 13;
    *minor = version_minor;
    return 0;
}

EXPORT int nvrtcCreateProgram(void **program, const char *source, const char *name, int headers, const char *const *texts,
                              const char *const *names) {
    (void)texts, (void)names;
    *program = malloc(1);
    return source && name && headers == 0 ? 0 : 3;
}

EXPORT int nvrtcDestroyProgram(void **program) {
    free(*program);
    *program = NULL;
    return 0;
}

EXPORT int nvrtcCompileProgram(void *program, int count, const char *const *options) {
    (void)program;
    for (int index = 0; index < count; ++index) {
        const char *value = strchr(options[index], '=');
        if (strncmp(options[index], "--gpu-architecture", 18) == 0) snprintf(architecture, sizeof architecture, "%s", value + 1);
    }
    __sync_fetch_and_add(&compilations, 1);
    return failure;
}

static size_t text(char *buffer, size_t size) { return snprintf(buffer, size, "CUBIN for %s", architecture) + 1; }

EXPORT int nvrtcGetCUBINSize(void *program, size_t *size) {
    (void)program;
    *size = text(NULL, 0);
    return 0;
}

EXPORT int nvrtcGetCUBIN(void *program, char *cubin) {
    (void)program;
    text(cubin, 64);
    return 0;
}

static const char LOG[] = "a note\nkernel.cu(7): error: identifier \"x\" is undefined\n\n1 error detected.\n";

EXPORT int nvrtcGetProgramLogSize(void *program, size_t *size) {
    (void)program;
    *size = sizeof LOG;
    return 0;
}

EXPORT int nvrtcGetProgramLog(void *program, char *log) {
    (void)program;
    memcpy(log, LOG, sizeof LOG);
    return 0;
}
