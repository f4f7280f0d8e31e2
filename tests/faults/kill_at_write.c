/* Ends the process that it is loaded into (LD_PRELOAD) at a chosen change of a file.

   After `kill_at(...)` every call that changes something below a folder is counted, whichever library makes it: Python, SQLite,
   Arrow, torch, or the Rust of safetensors. Each is written to a log, as "name path" with the path relative to the folder.
   Before the n-th that matches the chosen call and path the signal is sent; with `inside`, half of a write is done by then. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX], call_pattern[64], path_pattern[PATH_MAX];
static size_t folder_length;
static int log_fd = -1, chosen_signal, is_inside;
static long chosen;
static atomic_long seen;
static atomic_int is_armed;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* `at` = 0 only logs. The folder is one without symbolic links in its path. */
void kill_at(const char *of, const char *call, const char *path, long at, int signal, int inside, const char *log) {
    log_fd = REAL(open)(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    folder_length = (size_t)snprintf(folder, sizeof folder, "%s/", of);
    snprintf(call_pattern, sizeof call_pattern, "%s", call);
    snprintf(path_pattern, sizeof path_pattern, "%s", path);
    chosen = at, chosen_signal = signal, is_inside = inside;
    atomic_store(&is_armed, 1);
}

/* Whether this call is the chosen one, where none was before it. */
static int is_chosen(const char *call, const char *path) {
    char line[PATH_MAX + 64];
    if (strncmp(path, folder, folder_length)) return 0;
    path += folder_length;
    int matches = chosen && !fnmatch(call_pattern, call, 0) && !fnmatch(path_pattern, path, 0);
    int is_it = matches && atomic_fetch_add(&seen, 1) + 1 == chosen;
    int length = snprintf(line, sizeof line, "%s%s %s\n", is_it ? "! " : "", call, path);
    (void)!REAL(write)(log_fd, line, (size_t)length);
    return is_it;
}

static const char *path_of(int fd, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, buffer, PATH_MAX - 1);
    buffer[length < 0 ? 0 : length] = 0;
    return buffer;
}

static const char *path_at(int directory, const char *path, char *buffer) {
    if (path[0] == '/') return path;
    if (directory != AT_FDCWD) path_of(directory, buffer);
    else if (!getcwd(buffer, PATH_MAX)) return path;
    while (!strncmp(path, "./", 2)) path += 2;
    strncat(buffer, "/", PATH_MAX - strlen(buffer) - 1);
    return strncat(buffer, path, PATH_MAX - strlen(buffer) - 1);
}

/* Python sets a flag at SIGINT and goes on: then the call is done in full. */
static void end(void) { kill(getpid(), chosen_signal); }

static int begin(const char *call, const char *path) {
    int before = errno, is_it = atomic_load(&is_armed) && is_chosen(call, path);
    if (is_it) end();
    errno = before;
    return is_it;
}

static int begin_at(const char *call, int directory, const char *path) {
    char buffer[PATH_MAX];
    return atomic_load(&is_armed) && begin(call, path_at(directory, path, buffer));
}

static int begin_fd(const char *call, int fd) {
    char buffer[PATH_MAX];
    return atomic_load(&is_armed) && begin(call, path_of(fd, buffer));
}

/* Writes: DONE is what was written before the signal. */
#define WRITING(call, fd, half)                                                                                          \
    ssize_t done = 0;                                                                                                    \
    char buffer[PATH_MAX];                                                                                               \
    if (atomic_load(&is_armed)) {                                                                                        \
        int before = errno;                                                                                              \
        if (is_chosen(call, path_of(fd, buffer))) {                                                                      \
            if (is_inside) done = (half);                                                                                \
            if (done < 0) done = 0;                                                                                      \
            end();                                                                                                       \
        }                                                                                                                \
        errno = before;                                                                                                  \
    }

static ssize_t sum(ssize_t done, ssize_t rest) { return rest < 0 ? (done ? done : rest) : done + rest; }

ssize_t write(int fd, const void *data, size_t size) {
    WRITING("write", fd, REAL(write)(fd, data, size / 2))
    return sum(done, REAL(write)(fd, (const char *)data + done, size - (size_t)done));
}

#define PWRITE(name)                                                                                                     \
    ssize_t name(int fd, const void *data, size_t size, off64_t at) {                                                    \
        WRITING("write", fd, REAL(name)(fd, data, size / 2, at))                                                         \
        return sum(done, REAL(name)(fd, (const char *)data + done, size - (size_t)done, at + done));                     \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

/* Of several pieces the first is the half. */
ssize_t writev(int fd, const struct iovec *pieces, int count) {
    WRITING("write", fd, count > 1 ? REAL(write)(fd, pieces[0].iov_base, pieces[0].iov_len) : 0)
    if (!done) return REAL(writev)(fd, pieces, count);
    return done == (ssize_t)pieces[0].iov_len ? sum(done, REAL(writev)(fd, pieces + 1, count - 1)) : done;
}

#define COPY(name, off)                                                                                                  \
    ssize_t name(int to, int from, off *at, size_t size) {                                                               \
        WRITING("write", to, REAL(name)(to, from, at, size / 2))                                                         \
        return sum(done, REAL(name)(to, from, at, size - (size_t)done));                                                 \
    }
COPY(sendfile, off_t)
COPY(sendfile64, off64_t)

/* Everything else is done whole or not at all. */
#define FD(name, call, parameters, fd, ...)                                                                              \
    int name parameters { begin_fd(call, fd); return REAL(name)(__VA_ARGS__); }
FD(ftruncate, "truncate", (int fd, off_t size), fd, fd, size)
FD(ftruncate64, "truncate", (int fd, off64_t size), fd, fd, size)
FD(fsync, "sync", (int fd), fd, fd)
FD(fdatasync, "sync", (int fd), fd, fd)

#define AT(name, call, parameters, directory, path, ...)                                                                 \
    int name parameters { begin_at(call, directory, path); return REAL(name)(__VA_ARGS__); }
AT(rename, "rename", (const char *a, const char *b), AT_FDCWD, b, a, b)
AT(renameat, "rename", (int d, const char *a, int e, const char *b), e, b, d, a, e, b)
AT(renameat2, "rename", (int d, const char *a, int e, const char *b, unsigned f), e, b, d, a, e, b, f)
AT(unlink, "remove", (const char *path), AT_FDCWD, path, path)
AT(unlinkat, "remove", (int d, const char *path, int flags), d, path, d, path, flags)
AT(rmdir, "remove", (const char *path), AT_FDCWD, path, path)
AT(mkdir, "mkdir", (const char *path, mode_t mode), AT_FDCWD, path, path, mode)
AT(mkdirat, "mkdir", (int d, const char *path, mode_t mode), d, path, d, path, mode)

#define OPEN(name, directory, ...)                                                                                       \
    {                                                                                                                    \
        mode_t mode = 0;                                                                                                 \
        va_list more;                                                                                                    \
        va_start(more, flags);                                                                                           \
        if ((flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE) mode = va_arg(more, mode_t);                                                  \
        va_end(more);                                                                                                    \
        if (flags & (O_CREAT | O_TRUNC)) begin_at("open", directory, path);                                              \
        return REAL(name)(__VA_ARGS__, flags, mode);                                                                     \
    }
int open(const char *path, int flags, ...) OPEN(open, AT_FDCWD, path)
int open64(const char *path, int flags, ...) OPEN(open64, AT_FDCWD, path)
int openat(int d, const char *path, int flags, ...) OPEN(openat, d, d, path)
int openat64(int d, const char *path, int flags, ...) OPEN(openat64, d, d, path)
