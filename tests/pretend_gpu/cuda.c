/* CUDA's runtime and driver as PyTorch calls them, of eight GPUs that are host memory and run no kernel.

   What is not here answers 0, success: __init__.py writes those functions. Types are CUDA 13's, by their sizes. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static int zero() { return 0; }

/* Devices: an H100's capability, so that PyTorch and Megatron choose what they choose there. */
struct properties {
    char name[256], uuid[16], luid[8];
    unsigned mask;
    size_t memory, shared_of_block;
    int registers, warp;
    size_t pitch;
    int threads, block[3], grid[3];
    size_t constants;
    int major, minor;
    size_t alignment, pitch_alignment;
    int multiprocessors;
};
static const size_t MEMORY = (size_t)80 << 30;
static __thread int current;

int cudaGetDeviceCount(int *count) { return *count = 8, 0; }
int cudaGetDevice(int *device) { return *device = current, 0; }
int cudaSetDevice(int device) { return current = device, 0; }
int cudaDriverGetVersion(int *version) { return *version = 13000, 0; }
int cudaRuntimeGetVersion(int *version) { return *version = 13000, 0; }
int cudaMemGetInfo(size_t *available, size_t *total) { return *available = *total = MEMORY, 0; }
int cudaGetDeviceProperties(struct properties *p, int device) {
    strcpy(p->name, "pretended GPU");
    p->memory = MEMORY, p->shared_of_block = 49152, p->registers = 65536, p->warp = 32, p->threads = 1024;
    p->block[0] = p->block[1] = 1024, p->block[2] = 64;
    p->grid[0] = 2147483647, p->grid[1] = p->grid[2] = 65535;
    p->major = 9, p->minor = 0, p->alignment = 512, p->multiprocessors = 132;
    return 0;
}
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { return *flags = 0, *active = 1, 0; }
const char *cudaGetErrorString(int error) { return error ? "the pretended GPU cannot do this" : "none"; }
const char *cudaGetErrorName(int error) { return cudaGetErrorString(error); }

/* Memory: host memory that other processes can open, as CUDA's IPC has it. */
static struct { char *at; size_t size; int file; } held[65536];
static int taken;

int cudaMalloc(void **at, size_t size) {
    size = size ? (size + 4095) & ~(size_t)4095 : 4096;
    int place = __sync_fetch_and_add(&taken, 1), file = memfd_create("pretended GPU", 0);
    if (place >= 65536 || file < 0 || ftruncate(file, size)) return 2;
    *at = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (*at == MAP_FAILED) return 2;
    held[place].at = *at, held[place].size = size, held[place].file = file;
    return 0;
}
int cudaFree(void *at) {
    for (int i = 0; at && i < taken; i++)
        if (held[i].at == at) munmap(at, held[i].size), close(held[i].file), held[i].at = 0;
    return 0;
}
int cudaHostAlloc(void **at, size_t size, unsigned flags) { return cudaMalloc(at, size); }
int cudaMallocHost(void **at, size_t size) { return cudaMalloc(at, size); }
int cudaFreeHost(void *at) { return cudaFree(at); }
struct handle { long process, file, size, rest[5]; };
int cudaIpcGetMemHandle(struct handle *handle, void *at) {
    for (int i = 0; i < taken; i++)
        if (held[i].at == at) {
            *handle = (struct handle){getpid(), held[i].file, held[i].size};
            return 0;
        }
    return 1;
}
int cudaIpcOpenMemHandle(void **at, struct handle handle, unsigned flags) {
    char path[64];
    sprintf(path, "/proc/%ld/fd/%ld", handle.process, handle.file);
    int file = open(path, O_RDWR);
    if (file < 0) return 1;
    *at = mmap(0, handle.size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    return *at == MAP_FAILED;
}
int cudaMemcpy(void *to, const void *from, size_t size, int kind) { return memmove(to, from, size), 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
    return memmove(to, from, size), 0;
}
int cudaMemset(void *at, int value, size_t size) { return memset(at, value, size), 0; }
int cudaMemsetAsync(void *at, int value, size_t size, void *stream) { return memset(at, value, size), 0; }
int cudaPointerGetAttributes(int *attributes, const void *at) { return attributes[0] = 1, 0; } /* of the host */

/* Streams and events: all work is done when it is asked for. */
static uintptr_t names = 4096;
static int named(void **thing) { return *thing = (void *)__sync_add_and_fetch(&names, 16), 0; }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { return named(stream); }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return named(stream); }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return named(event); }
int cudaEventCreate(void **event) { return named(event); }
int cudaIpcOpenEventHandle(void **event, struct handle handle) { return named(event); }
int cudaEventElapsedTime(float *milliseconds, void *start, void *end) { return *milliseconds = 1, 0; }
/* A graph is captured, which PyTorch asks about; __init__.py has its replay. Nothing may wait meanwhile. */
static int capturing;
int cudaEventSynchronize(void *event) { return capturing ? 907 : 0; }
int cudaStreamBeginCapture(void *stream, int mode) { return capturing = 1, 0; }
int cudaStreamEndCapture(void *stream, void **graph) { return capturing = 0, named(graph); }
int cudaGraphInstantiateWithFlags(void **executable) { return named(executable); }
int cudaGraphGetNodes(void *graph, void **nodes, size_t *count) { return *count = 1, 0; }
int cudaStreamIsCapturing(void *stream, int *status) { return *status = capturing, 0; }
int cudaStreamGetCaptureInfo(
    void *stream, int *status, unsigned long long *id, void **graph, void *nodes, void *edges, size_t *count
) {
    if (id) *id = capturing;
    if (graph) *graph = (void *)names;
    if (count) *count = 0;
    return *status = capturing, 0;
}
int cublasCreate_v2(void **handle) { return named(handle); }
int cublasLtCreate(void **handle) { return named(handle); }
int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                     unsigned long long flags, int *result) {
    if (result) *result = 0; /* found */
    *function = strcmp(name, "cuDevicePrimaryCtxGetState") ? (void *)zero : (void *)cuDevicePrimaryCtxGetState;
    return 0;
}
void **__cudaRegisterFatBinary(void *binary) { static void *handle[4]; return handle; }
