/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Memory and disks that run out, and system calls that fail, are interrupted or do less than
 * they could. The linker sends the calls of the shim here (--wrap), and those of libmilter where its
 * archive is linked; the clients and the stand-in use others, or have their own way.
 */
#define _GNU_SOURCE
#include "stress.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

int __real_open(const char *, int, ...);
ssize_t __real_write(int, const void *, size_t);
ssize_t __real_sendmsg(int, const struct msghdr *, int);
ssize_t __real_recvmsg(int, struct msghdr *, int);
int __real_epoll_wait(int, struct epoll_event *, int, int);
int __real_epoll_ctl(int, int, int, struct epoll_event *);
void *__wrap_malloc(size_t size);
void *__wrap_realloc(void *old, size_t size);
void *__wrap_calloc(size_t n, size_t size);
char *__wrap_strdup(const char *text);
void *calloc_for_ever(size_t n, size_t size); /* the shim's: it gives none of them back */
char *strdup_for_ever(const char *text);
void __wrap_free(void *memory);
int __wrap_open(const char *name, int flags, ...);
ssize_t __wrap_write(int file, const void *bytes, size_t size);
ssize_t __wrap_sendmsg(int fd, const struct msghdr *message, int flags);
ssize_t __wrap_recvmsg(int fd, struct msghdr *message, int flags);
int __wrap_epoll_wait(int fd, struct epoll_event *events, int count, int timeout);
int __wrap_epoll_ctl(int fd, int what, int other, struct epoll_event *event);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument);

atomic_ulong faults, disk_faults;
atomic_long kept, stay;

static bool runs_out(void)
{
    if (!with_faults || atomic_load(&stop_clients) || chance(300) != 0)
        return false;
    atomic_fetch_add(&faults, 1);
    return true;
}

void *__wrap_malloc(size_t size)
{
    void *memory = runs_out() ? NULL : __real_malloc(size);

    if (memory != NULL)
        atomic_fetch_add(&kept, 1);
    return memory;
}

void *__wrap_realloc(void *old, size_t size)
{
    void *memory = runs_out() ? NULL : __real_realloc(old, size);

    if (old == NULL && memory != NULL)
        atomic_fetch_add(&kept, 1);
    return memory;
}

void *__wrap_calloc(size_t n, size_t size)
{
    void *memory = runs_out() ? NULL : __real_calloc(n, size);

    if (memory != NULL)
        atomic_fetch_add(&kept, 1);
    return memory;
}

char *__wrap_strdup(const char *text)
{
    char *copy = __wrap_malloc(strlen(text) + 1);

    return copy != NULL ? strcpy(copy, text) : NULL;
}

char *strdup_for_ever(const char *text)
{
    const size_t size = strlen(text) + 1;
    char *copy = runs_out() ? NULL : __real_malloc(size);

    return copy != NULL ? memcpy(copy, text, size) : NULL;
}

void *calloc_for_ever(size_t n, size_t size)
{
    void *memory = runs_out() ? NULL : __real_calloc(n, size);

    if (memory != NULL)
        atomic_fetch_add(&stay, 1);
    return memory;
}

void __wrap_free(void *memory)
{
    if (memory != NULL)
        atomic_fetch_sub(&kept, 1);
    __real_free(memory);
}

static bool disk_fails(int error, unsigned odds)
{
    if (atomic_load(&stop_clients) || chance(odds) != 0)
        return false;
    atomic_fetch_add(&disk_faults, 1);
    errno = error;
    return true;
}

/* Some file systems know no nameless files. */
int __wrap_open(const char *name, int flags, ...)
{
    va_list arguments;

    va_start(arguments, flags);
    const mode_t mode = va_arg(arguments, mode_t);
    va_end(arguments);
    if (disk_fails(EMFILE, 50))
        return -1;
    if (chance(3) == 0) {
        errno = EOPNOTSUPP;
        return -1;
    }
    return __real_open(name, flags, mode);
}

static bool is_on_disk(int file)
{
    struct stat status;

    return fstat(file, &status) == 0 && S_ISREG(status.st_mode);
}

ssize_t __wrap_write(int file, const void *bytes, size_t size)
{
    if (!is_on_disk(file))
        return __real_write(file, bytes, size);
    if (disk_fails(ENOSPC, 100))
        return -1;
    if (chance(10) == 0) {
        errno = EINTR;
        return -1;
    }
    return __real_write(file, bytes, size > 1 && chance(4) == 0 ? 1 + chance((unsigned)size - 1) : size);
}

/* ---- System calls of the redirected libmilter ------------------------------------------------ */

static bool fails(int error, unsigned odds)
{
    if (!with_faults || !atomic_load(&started) || atomic_load(&stop_clients) || chance(odds) != 0)
        return false;
    atomic_fetch_add(&faults, 1);
    errno = error;
    return true;
}

/* A part of what is to be sent, or all of it. */
ssize_t __wrap_sendmsg(int fd, const struct msghdr *message, int flags)
{
    size_t first = 0; /* what was sent already leaves an empty part */

    if (fails(EINTR, 16) || fails(EAGAIN, 50) || fails(ENOBUFS, 5000))
        return -1;
    while (first < (size_t)message->msg_iovlen && message->msg_iov[first].iov_len == 0)
        first++;
    if (first == (size_t)message->msg_iovlen || !fails(0, 16))
        return __real_sendmsg(fd, message, flags);
    struct iovec part = message->msg_iov[first];
    part.iov_len = 1 + chance((unsigned)part.iov_len);
    const struct msghdr less = {.msg_iov = &part, .msg_iovlen = 1};
    return __real_sendmsg(fd, &less, flags);
}

/* It takes all that there is, as the system does: what comes in parts, the clients send in parts. */
ssize_t __wrap_recvmsg(int fd, struct msghdr *message, int flags)
{
    if (fails(EINTR, 16) || fails(ENOMEM, 5000))
        return -1;
    return __real_recvmsg(fd, message, flags);
}

/* Others get on before this thread does, so that it tells of what is over. */
int __wrap_epoll_wait(int fd, struct epoll_event *events, int count, int timeout)
{
    if (fails(EINTR, 50))
        return -1;
    const int ready = __real_epoll_wait(fd, events, count, timeout);
    if (chance(200) == 0)
        nap(chance(3000));
    return ready;
}

int __wrap_epoll_ctl(int fd, int what, int other, struct epoll_event *event)
{
    if (what == EPOLL_CTL_ADD && fails(ENOSPC, 100))
        return -1;
    const int result = __real_epoll_ctl(fd, what, other, event);
    if (what == EPOLL_CTL_ADD && chance(20) == 0)
        nap(chance(3000));
    return result;
}

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument)
{
    return fails(EAGAIN, 2) ? EAGAIN : __real_pthread_create(thread, attributes, start, argument);
}
