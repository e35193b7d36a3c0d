/* Loaded before libc into a process of the torture: the nth write or sync of one file fails.
 *
 * LMDB calls libc by itself, so what its own writes do when the disk refuses them cannot be tried from Python.
 * arm(suffix, call, nth, code): the nth `call` (0 write of any kind, 1 sync) on a file whose path ends so returns -1 with
 * errno `code`; a code of 0 makes it a short write. fired(): whether it did.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static char suffix[256];
static int kind = -1, left, code_, hit;

void arm(const char *s, int call, int nth, int code) {
    strncpy(suffix, s, sizeof suffix - 1);
    kind = call, left = nth, code_ = code, hit = 0;
}

int fired(void) { return hit; }

static int due(int fd, int call) {
    char link[64], path[4096];
    if (kind != call || left <= 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    size_t want = strlen(suffix);
    if (n < (ssize_t)want || memcmp(path + n - want, suffix, want)) return 0;
    if (--left) return 0;
    return hit = 1;
}

#define REAL(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name))

static ssize_t refuse(void) {
    if (code_) {
        errno = code_;
        return -1;
    }
    return 1; /* a short write */
}

ssize_t write(int fd, const void *b, size_t n) {
    return due(fd, 0) ? refuse() : REAL(ssize_t, "write", int, const void *, size_t)(fd, b, n);
}
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t at) {
    return due(fd, 0) ? refuse() : REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t)(fd, b, n, at);
}
ssize_t pwrite(int fd, const void *b, size_t n, off_t at) { return pwrite64(fd, b, n, at); }
ssize_t pwritev(int fd, const struct iovec *v, int n, off_t at) {
    return due(fd, 0) ? refuse() : REAL(ssize_t, "pwritev", int, const struct iovec *, int, off_t)(fd, v, n, at);
}
ssize_t writev(int fd, const struct iovec *v, int n) {
    return due(fd, 0) ? refuse() : REAL(ssize_t, "writev", int, const struct iovec *, int)(fd, v, n);
}
int fdatasync(int fd) { return due(fd, 1) ? (int)refuse() : REAL(int, "fdatasync", int)(fd); }
int fsync(int fd) { return due(fd, 1) ? (int)refuse() : REAL(int, "fsync", int)(fd); }
