/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * libmilter's listener and its log, where its static archive is linked: the linker
 * redirects the archive's calls of accept and syslog to the functions __wrap_*.
 * (Its packets and its sessions: packets.c, scheduler.c.)
 *
 * Without a descriptor for it, a connection cannot be accepted, and libmilter would
 * try again at once, for ever. So a failed accept takes a while here. It is logged
 * once when it begins, and once when it is over.
 */
#define _GNU_SOURCE

#include "redirect.h"

#if MILTER_IO_WRAPPED

#include "packets.h"
#include "scheduler.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <syslog.h>
#include <unistd.h>

enum { PAUSE = 50 }; /* milliseconds until the next accept, when one has failed */

static atomic_int log_descriptor = -1;
static atomic_int expected_family = AF_UNSPEC;

int __real_accept(int fd, struct sockaddr *address, socklen_t *size);
int __real_poll(struct pollfd *fds, nfds_t count, int timeout);

/* ---- The log ----------------------------------------------------------------------------- */

int milter_io_log_to(int fd)
{
    return atomic_exchange(&log_descriptor, fd);
}

/* By any thread of libmilter, whose errno stays as it was. */
static void log_line(int priority, const char *format, va_list arguments)
{
    const int saved = errno, fd = atomic_load(&log_descriptor);
    char line[PIPE_BUF];
    va_list again;

    va_copy(again, arguments);
    const int prefix = snprintf(line, sizeof line, "<%d>", priority);
    int size = vsnprintf(line + prefix, sizeof line - (size_t)prefix, format, arguments);
    if (size < 0)
        size = 0;
    size += prefix;
    if (size > (int)sizeof line - 1)
        size = (int)sizeof line - 1;
    for (int i = 0; i < size; i++)
        if (line[i] == '\n')
            line[i] = ' ';
    line[size++] = '\n';
    if (fd < 0 || write(fd, line, (size_t)size) != size) {
        errno = saved;
        vsyslog(priority, format, again);
    }
    va_end(again);
    errno = saved;
}

void milter_log(int priority, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    log_line(priority, format, arguments);
    va_end(arguments);
}

void __wrap_syslog(int priority, const char *format, ...) __attribute__((format(printf, 2, 3)));

WRAP void __wrap_syslog(int priority, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    log_line(priority, format, arguments);
    va_end(arguments);
}

WRAP void __wrap___syslog_chk(int priority, int flag, const char *format, ...)
{
    va_list arguments;

    (void)flag;
    va_start(arguments, format);
    log_line(priority, format, arguments);
    va_end(arguments);
}

/* ---- The listener ------------------------------------------------------------------------ */

void milter_io_expect(int family)
{
    atomic_store(&expected_family, family);
}

static bool accept_fails; /* for want of something; libmilter's listener alone touches it */

static bool is_shut(int fd)
{
    struct pollfd listener = {fd, 0, 0};

    return __real_poll(&listener, 1, 0) > 0 && (listener.revents & POLLHUP) != 0;
}

static bool runs_out(int error)
{
    return error == EMFILE || error == ENFILE || error == ENOMEM || error == ENOBUFS;
}

/*
 * By libmilter's listener: accept has failed. libmilter tries again at once, so
 * that waits here for a while. A socket that does not listen is one that another
 * process has shut down, or that was replaced behind the descriptor: nothing to
 * tell of, but libmilter would give up after some. Returns the errno for libmilter.
 */
static int note_failed_accept(int fd, int error)
{
    struct rlimit limit = {0, 0};

    if (error == EINVAL || is_shut(fd)) {
        __real_poll(NULL, 0, PAUSE);
        return EAGAIN;
    }
    if (!runs_out(error))
        return error;
    if (!accept_fails) {
        accept_fails = true;
        (void)getrlimit(RLIMIT_NOFILE, &limit);
        milter_log(LOG_ERR,
                   "connections cannot be accepted (%s): they wait until others have ended. A process may have %llu "
                   "open files: raise the limit (systemd: LimitNOFILE=; ulimit -n), or let the MTA open fewer "
                   "connections",
                   strerror(error), (unsigned long long)limit.rlim_cur);
    }
    __real_poll(NULL, 0, PAUSE);
    return error;
}

/* By libmilter's listener, which has accepted a connection: it is over when no other one waits. */
static void note_accept(int fd)
{
    struct pollfd others = {fd, POLLIN, 0};

    if (accept_fails && __real_poll(&others, 1, 0) == 0) {
        accept_fails = false;
        milter_log(LOG_NOTICE, "all connections that waited were accepted");
    }
}

WRAP int __wrap_accept(int fd, struct sockaddr *address, socklen_t *size)
{
    const socklen_t room = size != NULL ? *size : 0;
    const int accepted = __real_accept(fd, address, size);

    if (size != NULL && *size > room)
        *size = room; /* of another family; libmilter takes this for the size of its memory at the next call */
    if (accepted < 0) {
        errno = note_failed_accept(fd, errno);
        return accepted;
    }
    note_accept(fd);
    const bool named = address != NULL && *size >= sizeof address->sa_family;
    const int family = atomic_load(&expected_family);
    milter_expect_session(
        milter_adopt(accepted, named && (address->sa_family == AF_INET || address->sa_family == AF_INET6)));
    if (named && family != AF_UNSPEC)
        address->sa_family = (sa_family_t)family; /* libmilter looks at nothing else of it */
    return accepted;
}

/* ---- Did the linker do it? ---------------------------------------------------------------- */

/*
 * MILTER_IO_SYMBOLS comes from the build: X(read) X(poll) and so on, the names
 * that libmilter's archive refers to. The linker treats a reference from here
 * like one from there, so it shows where those end.
 */
#define X(symbol)                                                                                                      \
    void reference_##symbol(void) __asm__(#symbol);                                                                    \
    void wrapper_##symbol(void) __asm__("__wrap_" #symbol);
MILTER_IO_SYMBOLS
#undef X

/* Any thread. Volatile, or the compiler would say that two names are two functions. */
bool milter_io_wrapped(void)
{
#define X(symbol) {reference_##symbol, wrapper_##symbol},
    static void (*const volatile pairs[][2])(void) = {MILTER_IO_SYMBOLS};
#undef X
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++)
        if (pairs[i][0] != pairs[i][1])
            return false;
    return true;
}

const char *milter_io_symbols(void)
{
#define X(symbol) #symbol " "
    return MILTER_IO_SYMBOLS;
#undef X
}

#else /* libmilter is linked as it is */

bool milter_io_wrapped(void)
{
    return false;
}

const char *milter_io_symbols(void)
{
    return "";
}

int milter_io_log_to(int fd)
{
    (void)fd;
    return -1;
}

void milter_io_expect(int family)
{
    (void)family;
}

#endif
