/* A preload library for tools/fault_merge.py: disturbs one system call of a process.
 *
 * It counts the calls that concern files below a root folder, kind by kind. At call number `at` of the chosen kind it
 * makes the call fail, come back short, or lets something happen first: a shell command, or a signal.
 *
 * The settings are in `faults`, memory that forked children share with their parent: the parent fills it in through
 * ctypes, and reads the counts after the child has ended. Only the child whose copy of `faults_armed` is set is
 * disturbed.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

enum kind { /* the order of KINDS in fault_process.py */
    OPEN, READ, PREAD, WRITE, PWRITE, FSYNC, CLOSE, RENAME, UNLINK, MKDIR, COPY, SENDFILE, CLONE, TRUNCATE,
    FLOCK, MMAP, STAT, LIST, MODE, ADVISE, SPACE, SOCKET, DISK, ANY, KINDS
};
enum action { FAIL = 1, SHORT, SIGNAL, COMMAND };
enum outcome { GO_ON, FAILED, HALF };

struct settings {
    long counts[KINDS];
    long at;
    long hits;
    long again;                      /* the number of a second call that is disturbed; 0: none */
    int kind, action, value, sticky; /* value: of errno, or the signal; sticky: from `at` on, not only then */
    char root[1024];
    char command[4096];
    char where[1024]; /* the path of the call that was disturbed */
};

struct settings *faults;
int faults_armed;

extern char **environ;
static const char *const NAMES[] = {
    "open", "read", "pread", "write", "pwrite", "fsync", "close", "rename", "unlink", "mkdir", "copy", "sendfile",
    "clone", "truncate", "flock", "mmap", "stat", "list", "mode", "advise", "space", "socket",
};

__attribute__((constructor)) static void begin(void)
{
    faults = mmap(NULL, sizeof *faults, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

static void run_command(void)
{
    char *argv[] = {"sh", "-c", faults->command, NULL};
    char *env[] = {"PATH=/usr/bin:/bin", NULL};
    pid_t child;
    if (posix_spawn(&child, "/bin/sh", NULL, NULL, argv, env) == 0)
        waitpid(child, NULL, 0);
}

static enum outcome disturb(const char *name, const char *where)
{
    int kept = errno;
    faults->hits++;
    snprintf(faults->where, sizeof faults->where, "%s %s", name, where);
    errno = kept;
    switch (faults->action) {
    case FAIL:
        errno = faults->value;
        return FAILED;
    case SHORT:
        return HALF;
    case SIGNAL:
        raise(faults->value);
        return GO_ON;
    default:
        run_command();
        errno = kept;
        return GO_ON;
    }
}

static int is_due(enum kind kind)
{
    long number = __atomic_add_fetch(&faults->counts[kind], 1, __ATOMIC_SEQ_CST);
    if ((int)kind != faults->kind)
        return 0;
    return number == faults->at || number == faults->again || (faults->sticky && number > faults->at);
}

static enum outcome count(enum kind kind, int fills_disk, const char *where)
{
    int due = is_due(kind);
    due |= is_due(ANY);
    if (fills_disk)
        due |= is_due(DISK);
    return due ? disturb(NAMES[kind], where) : GO_ON;
}

static int is_inside(const char *path)
{
    size_t length = strlen(faults->root);
    return !strncmp(path, faults->root, length) && (path[length] == '/' || !path[length]);
}

static int name_of(int fd, char *path, size_t size)
{
    char link[64];
    int kept = errno;
    if (fd == AT_FDCWD)
        strcpy(link, "/proc/self/cwd");
    else
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, size - 1);
    errno = kept;
    path[length < 0 ? 0 : length] = 0;
    return length > 0;
}

static enum outcome at_fd(enum kind kind, int fills_disk, int fd)
{
    char path[2048];
    if (!faults_armed || fd < 0 || !name_of(fd, path, sizeof path))
        return GO_ON;
    if (kind != SOCKET && !is_inside(path))
        return GO_ON;
    return count(kind, fills_disk, path);
}

static enum outcome at_path(enum kind kind, int fills_disk, int folder, const char *name)
{
    char path[4096];
    if (!faults_armed || !name)
        return GO_ON;
    if (*name == '/')
        snprintf(path, sizeof path, "%s", name);
    else {
        if (!name_of(folder, path, 2048))
            return GO_ON;
        size_t length = strlen(path);
        snprintf(path + length, sizeof path - length, "/%s", name);
    }
    return is_inside(path) ? count(kind, fills_disk, path) : GO_ON;
}

static enum outcome at_socket(int fd)
{
    struct sockaddr address;
    socklen_t size = sizeof address;
    int kept = errno;
    if (!faults_armed)
        return GO_ON;
    int found = getsockname(fd, &address, &size);
    errno = kept;
    if (found || (address.sa_family != AF_INET && address.sa_family != AF_INET6))
        return GO_ON;
    enum outcome outcome = at_fd(SOCKET, 0, fd);
    if (outcome == FAILED) { /* the other side must know */
        kept = errno;
        shutdown(fd, SHUT_RDWR);
        errno = kept;
    }
    return outcome;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define HALF_OF(size) ((size) > 1 ? (size) / 2 : (size))

/* A call on a descriptor that moves `size` bytes, and so may come back short. */
#define MOVE(type, name, kind, fills_disk, fd, parameters, size, arguments) \
    type name parameters                                                    \
    {                                                                       \
        static __typeof__(&name) real;                                      \
        if (!real)                                                          \
            real = REAL(name);                                              \
        switch (at_fd(kind, fills_disk, fd)) {                              \
        case FAILED:                                                        \
            return -1;                                                      \
        case HALF:                                                          \
            size = HALF_OF(size);                                           \
            return real arguments;                                          \
        default:                                                            \
            return real arguments;                                          \
        }                                                                   \
    }

/* A call that succeeds or fails. */
#define CALL(type, failure, name, test, parameters, arguments) \
    type name parameters                                       \
    {                                                          \
        static __typeof__(&name) real;                         \
        if (!real)                                             \
            real = REAL(name);                                 \
        return (test) == FAILED ? (failure) : real arguments;  \
    }

#define OPENER(name, folder, parameters, with_mode, without)                      \
    int name parameters                                                           \
    {                                                                             \
        static __typeof__(&name) real;                                            \
        mode_t mode = 0;                                                          \
        if (!real)                                                                \
            real = REAL(name);                                                    \
        if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) {                \
            va_list more;                                                         \
            va_start(more, flags);                                                \
            mode = va_arg(more, mode_t);                                          \
            va_end(more);                                                         \
        }                                                                         \
        if (at_path(OPEN, !!(flags & O_CREAT), folder, path) == FAILED)           \
            return -1;                                                            \
        return flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE ? real with_mode : real without; \
    }

OPENER(open, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode), (path, flags))
OPENER(open64, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode), (path, flags))
OPENER(openat, folder, (int folder, const char *path, int flags, ...), (folder, path, flags, mode), (folder, path, flags))
OPENER(openat64, folder, (int folder, const char *path, int flags, ...), (folder, path, flags, mode), (folder, path, flags))

MOVE(ssize_t, read, READ, 0, fd, (int fd, void *data, size_t size), size, (fd, data, size))
MOVE(ssize_t, pread, PREAD, 0, fd, (int fd, void *data, size_t size, off_t at), size, (fd, data, size, at))
MOVE(ssize_t, pread64, PREAD, 0, fd, (int fd, void *data, size_t size, off64_t at), size, (fd, data, size, at))
MOVE(ssize_t, write, WRITE, 1, fd, (int fd, const void *data, size_t size), size, (fd, data, size))
MOVE(ssize_t, pwrite, PWRITE, 1, fd, (int fd, const void *data, size_t size, off_t at), size, (fd, data, size, at))
MOVE(ssize_t, pwrite64, PWRITE, 1, fd, (int fd, const void *data, size_t size, off64_t at), size, (fd, data, size, at))
MOVE(ssize_t, copy_file_range, COPY, 1, to,
     (int from, off64_t *from_at, int to, off64_t *to_at, size_t size, unsigned flags), size,
     (from, from_at, to, to_at, size, flags))
MOVE(ssize_t, sendfile, SENDFILE, 1, to, (int to, int from, off_t *at, size_t size), size, (to, from, at, size))
MOVE(ssize_t, sendfile64, SENDFILE, 1, to, (int to, int from, off64_t *at, size_t size), size, (to, from, at, size))

CALL(int, -1, fsync, at_fd(FSYNC, 0, fd), (int fd), (fd))
CALL(int, -1, fdatasync, at_fd(FSYNC, 0, fd), (int fd), (fd))
CALL(int, -1, rename, at_path(RENAME, 0, AT_FDCWD, from), (const char *from, const char *to), (from, to))
CALL(int, -1, renameat, at_path(RENAME, 0, folder, from),
     (int folder, const char *from, int other, const char *to), (folder, from, other, to))
CALL(int, -1, renameat2, at_path(RENAME, 0, folder, from),
     (int folder, const char *from, int other, const char *to, unsigned flags), (folder, from, other, to, flags))
CALL(int, -1, link, at_path(RENAME, 0, AT_FDCWD, from), (const char *from, const char *to), (from, to))
CALL(int, -1, unlink, at_path(UNLINK, 0, AT_FDCWD, path), (const char *path), (path))
CALL(int, -1, unlinkat, at_path(UNLINK, 0, folder, path), (int folder, const char *path, int flags), (folder, path, flags))
CALL(int, -1, rmdir, at_path(UNLINK, 0, AT_FDCWD, path), (const char *path), (path))
CALL(int, -1, mkdir, at_path(MKDIR, 1, AT_FDCWD, path), (const char *path, mode_t mode), (path, mode))
CALL(int, -1, mkdirat, at_path(MKDIR, 1, folder, path), (int folder, const char *path, mode_t mode), (folder, path, mode))
CALL(int, -1, ftruncate, at_fd(TRUNCATE, 1, fd), (int fd, off_t size), (fd, size))
CALL(int, -1, ftruncate64, at_fd(TRUNCATE, 1, fd), (int fd, off64_t size), (fd, size))
CALL(int, -1, flock, at_fd(FLOCK, 0, fd), (int fd, int operation), (fd, operation))
CALL(void *, MAP_FAILED, mmap, at_fd(MMAP, 0, fd),
     (void *address, size_t size, int protection, int flags, int fd, off_t at),
     (address, size, protection, flags, fd, at))
CALL(void *, MAP_FAILED, mmap64, at_fd(MMAP, 0, fd),
     (void *address, size_t size, int protection, int flags, int fd, off64_t at),
     (address, size, protection, flags, fd, at))
CALL(int, -1, stat, at_path(STAT, 0, AT_FDCWD, path), (const char *path, struct stat *found), (path, found))
CALL(int, -1, lstat, at_path(STAT, 0, AT_FDCWD, path), (const char *path, struct stat *found), (path, found))
CALL(int, -1, fstat, at_fd(STAT, 0, fd), (int fd, struct stat *found), (fd, found))
CALL(int, -1, fstatat, at_path(STAT, 0, folder, path),
     (int folder, const char *path, struct stat *found, int flags), (folder, path, found, flags))
CALL(int, -1, stat64, at_path(STAT, 0, AT_FDCWD, path), (const char *path, struct stat64 *found), (path, found))
CALL(int, -1, lstat64, at_path(STAT, 0, AT_FDCWD, path), (const char *path, struct stat64 *found), (path, found))
CALL(int, -1, fstat64, at_fd(STAT, 0, fd), (int fd, struct stat64 *found), (fd, found))
CALL(int, -1, fstatat64, at_path(STAT, 0, folder, path),
     (int folder, const char *path, struct stat64 *found, int flags), (folder, path, found, flags))
CALL(DIR *, NULL, opendir, at_path(LIST, 0, AT_FDCWD, path), (const char *path), (path))
CALL(DIR *, NULL, fdopendir, at_fd(LIST, 0, fd), (int fd), (fd))
CALL(int, -1, chmod, at_path(MODE, 0, AT_FDCWD, path), (const char *path, mode_t mode), (path, mode))
CALL(int, -1, fchmod, at_fd(MODE, 0, fd), (int fd, mode_t mode), (fd, mode))
CALL(int, -1, fchmodat, at_path(MODE, 0, folder, path),
     (int folder, const char *path, mode_t mode, int flags), (folder, path, mode, flags))
CALL(int, -1, utimensat, at_path(MODE, 0, folder, path),
     (int folder, const char *path, const struct timespec times[2], int flags), (folder, path, times, flags))
CALL(int, -1, futimens, at_fd(MODE, 0, fd), (int fd, const struct timespec times[2]), (fd, times))
CALL(int, errno, posix_fadvise, at_fd(ADVISE, 0, fd), (int fd, off_t at, off_t size, int advice), (fd, at, size, advice))
CALL(int, errno, posix_fadvise64, at_fd(ADVISE, 0, fd),
     (int fd, off64_t at, off64_t size, int advice), (fd, at, size, advice))
CALL(int, -1, statvfs64, at_path(SPACE, 0, AT_FDCWD, path), (const char *path, struct statvfs64 *found), (path, found))
CALL(int, -1, fstatvfs64, at_fd(SPACE, 0, fd), (int fd, struct statvfs64 *found), (fd, found))
CALL(int, -1, connect, at_socket(fd), (int fd, const struct sockaddr *address, socklen_t size), (fd, address, size))
CALL(ssize_t, -1, send, at_socket(fd), (int fd, const void *data, size_t size, int flags), (fd, data, size, flags))
CALL(ssize_t, -1, recv, at_socket(fd), (int fd, void *data, size_t size, int flags), (fd, data, size, flags))

int close(int fd)
{
    static __typeof__(&close) real;
    if (!real)
        real = REAL(close);
    enum outcome found = at_fd(CLOSE, 0, fd);
    int kept = errno, result = real(fd); /* Linux closes the descriptor even where close fails */
    if (found != FAILED)
        return result;
    errno = kept;
    return -1;
}

int ioctl(int fd, unsigned long request, ...)
{
    static __typeof__(&ioctl) real;
    va_list more;
    va_start(more, request);
    void *argument = va_arg(more, void *);
    va_end(more);
    if (!real)
        real = REAL(ioctl);
    if (request == 0x4020940D && at_fd(CLONE, 0, fd) == FAILED) /* FICLONERANGE */
        return -1;
    return real(fd, request, argument);
}
