/* Sees every system call that changes files below one folder, and at the n-th does what it was told.
 *
 * A library that is only put in front of libc would not do: safetensors writes from Rust, and renames its finished
 * file by a system call of its own, past libc. So the kernel is asked (seccomp) to send SIGSYS for the calls in `CALLS`,
 * whoever makes them. The handler makes the call itself, from the one instruction that the filter lets through.
 *
 * A change is a call that succeeded: a folder that was there already is not made. Numbers start at 1, so that killing
 * after change n, for every n from 0 to the number of changes, meets every state that the files can be left in.
 *
 * Loaded by LD_PRELOAD it can shift the wall clock, too.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

long crash_raw(long number, long a, long b, long c, long d, long e, long f);
extern char crash_raw_end[]; /* the address that the kernel sees in calls of crash_raw */

#if defined(__x86_64__)
#define ARCHITECTURE AUDIT_ARCH_X86_64
__asm__(".text\n.globl crash_raw\n.type crash_raw, @function\ncrash_raw:\n"
        "mov %rdi, %rax\nmov %rsi, %rdi\nmov %rdx, %rsi\nmov %rcx, %rdx\nmov %r8, %r10\nmov %r9, %r8\n"
        "mov 8(%rsp), %r9\nsyscall\n.globl crash_raw_end\ncrash_raw_end:\nret\n");
#define ARGUMENTS(r) {(r)[REG_RDI], (r)[REG_RSI], (r)[REG_RDX], (r)[REG_R10], (r)[REG_R8], (r)[REG_R9]}
#define REGISTERS(context) ((context)->uc_mcontext.gregs)
#define RESULT REG_RAX
#elif defined(__aarch64__)
#define ARCHITECTURE AUDIT_ARCH_AARCH64
__asm__(".text\n.globl crash_raw\n.type crash_raw, %function\ncrash_raw:\n"
        "mov x8, x0\nmov x0, x1\nmov x1, x2\nmov x2, x3\nmov x3, x4\nmov x4, x5\nmov x5, x6\nsvc #0\n"
        ".globl crash_raw_end\ncrash_raw_end:\nret\n");
#define ARGUMENTS(r) {(r)[0], (r)[1], (r)[2], (r)[3], (r)[4], (r)[5]}
#define REGISTERS(context) ((context)->uc_mcontext.regs)
#define RESULT 0
#else
#error "only x86-64 and AArch64 are known"
#endif

enum kind { OPEN, WRITE, WRITEV, OTHER };
enum { NONE = -1, HERE = -2 }; /* no such argument; a path without a folder before it */

/* Which arguments name what a call changes: `at` the folder's descriptor (HERE: none), `path` the path, or `fd` alone. */
struct call {
    int number;
    const char *name;
    enum kind kind;
    int fd, at, path, at2, path2;
    int flags; /* which argument has open's flags */
    int grows; /* whether a full disk can refuse it */
};

#define BY_FD(name, kind, fd, grows) {SYS_##name, #name, kind, fd, NONE, NONE, NONE, NONE, NONE, grows}
#define BY_PATH(name, at, path, grows) {SYS_##name, #name, OTHER, NONE, at, path, NONE, NONE, NONE, grows}
#define BY_TWO(name, at, path, at2, path2) {SYS_##name, #name, OTHER, NONE, at, path, at2, path2, NONE, 1}

static const struct call CALLS[] = {
    {SYS_openat, "openat", OPEN, NONE, 0, 1, NONE, NONE, 2, 1},
    BY_FD(write, WRITE, 0, 1),
    BY_FD(pwrite64, WRITE, 0, 1),
    BY_FD(writev, WRITEV, 0, 1),
    BY_FD(pwritev, WRITEV, 0, 1),
    BY_FD(pwritev2, WRITEV, 0, 1),
    BY_FD(sendfile, OTHER, 0, 1),
    BY_FD(copy_file_range, OTHER, 2, 1),
    BY_FD(fallocate, OTHER, 0, 1),
    BY_FD(ftruncate, OTHER, 0, 1),
    BY_PATH(truncate, HERE, 0, 1),
    BY_FD(fsync, OTHER, 0, 1),
    BY_FD(fdatasync, OTHER, 0, 1),
    BY_TWO(renameat2, 0, 1, 2, 3),
    BY_TWO(linkat, 0, 1, 2, 3),
    BY_PATH(symlinkat, 1, 2, 1),
    BY_PATH(mkdirat, 0, 1, 1),
    BY_PATH(unlinkat, 0, 1, 0),
#ifdef SYS_renameat
    BY_TWO(renameat, 0, 1, 2, 3),
#endif
#ifdef SYS_open /* the older calls, which AArch64 never had */
    {SYS_open, "open", OPEN, NONE, HERE, 0, NONE, NONE, 1, 1},
    {SYS_creat, "creat", OTHER, NONE, HERE, 0, NONE, NONE, NONE, 1},
    BY_TWO(rename, HERE, 0, HERE, 1),
    BY_TWO(link, HERE, 0, HERE, 1),
    BY_PATH(symlink, HERE, 1, 1),
    BY_PATH(mkdir, HERE, 0, 1),
    BY_PATH(unlink, HERE, 0, 0),
    BY_PATH(rmdir, HERE, 0, 0),
#endif
};
enum { COUNT = sizeof(CALLS) / sizeof(CALLS[0]) };

enum plan { WATCH, KILL_AFTER, KILL_WITHIN, FAIL_ONCE, FAIL_FROM };

static char root[PATH_MAX];
static size_t root_length;
static int log_fd = -1;
static enum plan plan = WATCH;
static long planned;
static int planned_error;
static long changes; /* atomic */
static long failures;
static long clock_shift; /* seconds */

/* --- which paths --- */

static void path_of_fd(long fd, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%ld", fd);
    long length = crash_raw(SYS_readlinkat, AT_FDCWD, (long)link, (long)out, PATH_MAX - 1, 0, 0);
    out[length < 0 ? 0 : length] = 0;
}

static void path_at(long fd, const char *path, char *out) {
    char folder[PATH_MAX];
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
        return;
    }
    if ((int)fd == AT_FDCWD) {
        long length = crash_raw(SYS_getcwd, (long)folder, PATH_MAX, 0, 0, 0, 0);
        folder[length < 0 ? 0 : length] = 0;
    } else {
        path_of_fd((int)fd, folder);
    }
    snprintf(out, PATH_MAX, "%.*s/%.*s", PATH_MAX / 2, folder, PATH_MAX / 2 - 2, path);
}

static int is_below(const char *path) {
    return root_length && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static int exists(const char *path) {
    return crash_raw(SYS_faccessat, AT_FDCWD, (long)path, F_OK, 0, 0, 0) == 0;
}

/* --- what happens --- */

static void note(long number, const char *what, const char *path, const char *path2, long result) {
    char line[3 * PATH_MAX];
    if (log_fd < 0)
        return;
    int length = snprintf(line, sizeof line, "%ld\t%s\t%s\t%s\t%ld\n", number, what, path, path2, result);
    crash_raw(SYS_write, log_fd, (long)line, length, 0, 0, 0);
}

static void die(void) {
    for (;;)
        crash_raw(SYS_kill, crash_raw(SYS_getpid, 0, 0, 0, 0, 0, 0), SIGKILL, 0, 0, 0, 0);
}

/* Write the first half of what was to be written. */
static long write_half(const struct call *call, const long *a) {
    if (call->kind == WRITE)
        return crash_raw(call->number, a[0], a[1], a[2] / 2, a[3], a[4], a[5]);
    const struct iovec *parts = (const struct iovec *)a[1];
    long whole = 0, done = 0;
    for (long i = 0; i < a[2]; i++)
        whole += (long)parts[i].iov_len;
    for (long i = 0; i < a[2] && done < whole / 2; i++) {
        long left = whole / 2 - done, size = (long)parts[i].iov_len;
        struct iovec part = {parts[i].iov_base, (size_t)(size < left ? size : left)};
        long offset = call->number == SYS_writev || a[3] == -1 ? a[3] : a[3] + done; /* -1: where the file stands */
        long written = crash_raw(call->number, a[0], (long)&part, 1, offset, a[4], a[5]);
        if (written < 0)
            return written;
        done += written;
    }
    return done;
}

static int is_refused(const struct call *call, const char *path, long next) {
    if (plan != FAIL_ONCE && plan != FAIL_FROM)
        return 0;
    if (plan == FAIL_ONCE ? (next != planned || failures) : next < planned)
        return 0;
    if ((planned_error == ENOSPC || planned_error == EDQUOT) && !call->grows)
        return 0;
    if (!strncmp(call->name, "mkdir", 5) && exists(path))
        return 0; /* the kernel would say so first */
    return 1;
}

static long change(const struct call *call, const long *a, const char *path, const char *path2) {
    long next = __atomic_load_n(&changes, __ATOMIC_SEQ_CST) + 1;
    if (is_refused(call, path, next)) {
        failures++;
        note(next, "failed", path, call->name, -planned_error);
        return -planned_error;
    }
    if (plan == KILL_WITHIN && next == planned && (call->kind == WRITE || call->kind == WRITEV)) {
        note(next, "torn", path, "", write_half(call, a));
        die();
    }
    long result = crash_raw(call->number, a[0], a[1], a[2], a[3], a[4], a[5]);
    if (result < 0)
        return result;
    next = __atomic_add_fetch(&changes, 1, __ATOMIC_SEQ_CST);
    note(next, call->name, path, path2, result);
    if (plan == KILL_AFTER && next == planned)
        die();
    return result;
}

static long handle(const struct call *call, const long *a) {
    char path[PATH_MAX] = "", path2[PATH_MAX] = "";
    int is_change = call->kind != OPEN || (a[call->flags] & (O_CREAT | O_TRUNC));
    if (is_change) {
        if (call->fd != NONE)
            path_of_fd(a[call->fd], path);
        else
            path_at(call->at == HERE ? AT_FDCWD : a[call->at], (const char *)a[call->path], path);
        if (call->path2 != NONE)
            path_at(call->at2 == HERE ? AT_FDCWD : a[call->at2], (const char *)a[call->path2], path2);
    }
    if (is_change && (is_below(path) || is_below(path2)))
        return change(call, a, path, path2);
    return crash_raw(call->number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

static void on_trap(int signal, siginfo_t *info, void *given) {
    ucontext_t *context = given;
    const long arguments[6] = ARGUMENTS(REGISTERS(context));
    (void)signal;
    for (int i = 0; i < COUNT; i++)
        if (CALLS[i].number == info->si_syscall)
            REGISTERS(context)[RESULT] = handle(&CALLS[i], arguments);
}

/* --- what Python calls --- */

/* Watch what lies below `folder`, an absolute path without links; write a line for each change to `log` unless -1.
 * The process stays watched until it ends, and so do its children. Returns 0 or what went wrong. */
int crash_watch(const char *folder, int log) {
    static struct sock_filter filter[COUNT + 9];
    unsigned long end = (unsigned long)crash_raw_end;
    int n = 0;
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch));
    filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCHITECTURE, 0, COUNT + 5);
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, instruction_pointer));
    filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)end, 0, 2);
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, instruction_pointer) + 4);
    filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)(end >> 32), COUNT + 1, 0);
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (int i = 0; i < COUNT; i++)
        filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)CALLS[i].number, COUNT - i, 0);
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP);
    struct sock_fprog program = {(unsigned short)n, filter};
    struct sigaction action = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART};
    root_length = (size_t)snprintf(root, sizeof root, "%s", folder);
    log_fd = log;
    changes = failures = 0;
    if (sigaction(SIGSYS, &action, NULL) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        return errno;
    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) ? errno : 0;
}

/* Kill the process after change `number` is whole; after 0, at once. */
void crash_kill_after(long number) {
    plan = KILL_AFTER, planned = number;
    if (!number)
        die();
}

/* Kill the process when half of change `number`, a write, is done. */
void crash_kill_within(long number) { plan = KILL_WITHIN, planned = number; }

/* Let the call that would be change `number` fail with `error`. */
void crash_fail_once(long number, int error) { plan = FAIL_ONCE, planned = number, planned_error = error; }

/* The same for every later call, too; of a full disk, those that need no room succeed. */
void crash_fail_from(long number, int error) { plan = FAIL_FROM, planned = number, planned_error = error; }

long crash_changes(void) { return __atomic_load_n(&changes, __ATOMIC_SEQ_CST); }

/* Set the wall clock of this process `seconds` forward, if the library was preloaded. */
void crash_shift_clock(long seconds) { clock_shift = seconds; }

/* --- the wall clock, in front of libc's --- */

int clock_gettime(clockid_t id, struct timespec *now) {
    long result = crash_raw(SYS_clock_gettime, id, (long)now, 0, 0, 0, 0);
    if (result < 0) {
        errno = (int)-result;
        return -1;
    }
    if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)
        now->tv_sec += clock_shift;
    return 0;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out)
        *out = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *restrict out, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    out->tv_sec = now.tv_sec, out->tv_usec = now.tv_nsec / 1000;
    return 0;
}
