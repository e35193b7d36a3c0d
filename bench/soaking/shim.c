/* Loaded before libc into the daemon of a soak: a disk that fails and a wall clock that steps, switched from outside.
 *
 * KVSTORED_SOAK_CONTROL names a file that is mapped: the supervisor writes to it, and the next call sees it.
 * KVSTORED_SOAK_UNDER is the folder whose files fail. Each `one_in`th write, sync or read of them ends with the errno that
 * is set for its kind; 0: none does. The clock's offset is for calls that come from Python's own code: gRPC waits by
 * absolute times of the kernel's clock, for which a shifted one would be a longer wait and not a step.
 */
#define _GNU_SOURCE
#define _LARGEFILE64_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct control {
    int64_t write_code, sync_code, read_code, one_in, offset_s, fired, calls;
};

static struct control none, *control = &none;
static char under[4096];
static uintptr_t low[8], high[8];
static int ranges;

static int note_python(struct dl_phdr_info *info, size_t size, void *data) {
    (void)size, (void)data;
    int main_program = !info->dlpi_name[0];
    if (!main_program && !strstr(info->dlpi_name, "libpython")) return 0;
    for (int i = 0; i < info->dlpi_phnum && ranges < 8; i++) {
        const ElfW(Phdr) *h = &info->dlpi_phdr[i];
        if (h->p_type != PT_LOAD || !(h->p_flags & PF_X)) continue;
        low[ranges] = info->dlpi_addr + h->p_vaddr;
        high[ranges] = low[ranges] + h->p_memsz;
        ranges++;
    }
    return 0;
}

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("KVSTORED_SOAK_CONTROL"), *folder = getenv("KVSTORED_SOAK_UNDER");
    if (!path || !folder) return;
    strncpy(under, folder, sizeof under - 1);
    dl_iterate_phdr(note_python, NULL);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return;
    void *p = mmap(NULL, sizeof none, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (p != MAP_FAILED) control = p;
}

static int fails(int fd, int64_t code) {
    if (!code) return 0;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    size_t want = strlen(under);
    if (n < (ssize_t)want || memcmp(path, under, want)) return 0;
    if (__atomic_add_fetch(&control->calls, 1, __ATOMIC_RELAXED) % (control->one_in > 0 ? control->one_in : 1)) return 0;
    __atomic_add_fetch(&control->fired, 1, __ATOMIC_RELAXED);
    errno = (int)code;
    return 1;
}

#define REAL(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name))
#define WRITES(fd) fails(fd, control->write_code)
#define READS(fd) fails(fd, control->read_code)
#define SYNCS(fd) fails(fd, control->sync_code)

ssize_t write(int fd, const void *b, size_t n) {
    return WRITES(fd) ? -1 : REAL(ssize_t, "write", int, const void *, size_t)(fd, b, n);
}
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t at) {
    return WRITES(fd) ? -1 : REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t)(fd, b, n, at);
}
ssize_t pwrite(int fd, const void *b, size_t n, off_t at) { return pwrite64(fd, b, n, at); }
ssize_t writev(int fd, const struct iovec *v, int n) {
    return WRITES(fd) ? -1 : REAL(ssize_t, "writev", int, const struct iovec *, int)(fd, v, n);
}
ssize_t pwritev64(int fd, const struct iovec *v, int n, off64_t at) {
    return WRITES(fd) ? -1 : REAL(ssize_t, "pwritev64", int, const struct iovec *, int, off64_t)(fd, v, n, at);
}
ssize_t pwritev(int fd, const struct iovec *v, int n, off_t at) { return pwritev64(fd, v, n, at); }
ssize_t pwritev64v2(int fd, const struct iovec *v, int n, off64_t at, int how) {
    return WRITES(fd) ? -1 : REAL(ssize_t, "pwritev64v2", int, const struct iovec *, int, off64_t, int)(fd, v, n, at, how);
}
ssize_t pwritev2(int fd, const struct iovec *v, int n, off_t at, int how) { return pwritev64v2(fd, v, n, at, how); }
ssize_t pread64(int fd, void *b, size_t n, off64_t at) {
    return READS(fd) ? -1 : REAL(ssize_t, "pread64", int, void *, size_t, off64_t)(fd, b, n, at);
}
ssize_t pread(int fd, void *b, size_t n, off_t at) { return pread64(fd, b, n, at); }
ssize_t preadv64(int fd, const struct iovec *v, int n, off64_t at) {
    return READS(fd) ? -1 : REAL(ssize_t, "preadv64", int, const struct iovec *, int, off64_t)(fd, v, n, at);
}
ssize_t preadv(int fd, const struct iovec *v, int n, off_t at) { return preadv64(fd, v, n, at); }
ssize_t preadv64v2(int fd, const struct iovec *v, int n, off64_t at, int how) {
    return READS(fd) ? -1 : REAL(ssize_t, "preadv64v2", int, const struct iovec *, int, off64_t, int)(fd, v, n, at, how);
}
ssize_t preadv2(int fd, const struct iovec *v, int n, off_t at, int how) { return preadv64v2(fd, v, n, at, how); }
int fdatasync(int fd) { return SYNCS(fd) ? -1 : REAL(int, "fdatasync", int)(fd); }
int fsync(int fd) { return SYNCS(fd) ? -1 : REAL(int, "fsync", int)(fd); }

static int from_python(void *caller) {
    for (int i = 0; i < ranges; i++)
        if ((uintptr_t)caller >= low[i] && (uintptr_t)caller < high[i]) return 1;
    return 0;
}

int clock_gettime(clockid_t clock, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = REAL(int, "clock_gettime", clockid_t, struct timespec *);
    int rc = real(clock, t);
    if (!rc && clock == CLOCK_REALTIME && control->offset_s && from_python(__builtin_return_address(0)))
        t->tv_sec += control->offset_s;
    return rc;
}
