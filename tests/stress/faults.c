/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Memory and disks that run out. The linker sends the calls of the shim here (--wrap);
 * nobody else's are concerned.
 */
#define _GNU_SOURCE
#include "stress.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <unistd.h>

int __real_open(const char *, int, ...);
ssize_t __real_write(int, const void *, size_t);
void *__wrap_malloc(size_t size);
void *__wrap_realloc(void *old, size_t size);
void *__wrap_calloc(size_t n, size_t size);
void __wrap_free(void *memory);
int __wrap_open(const char *name, int flags, ...);
ssize_t __wrap_write(int file, const void *bytes, size_t size);

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

ssize_t __wrap_write(int file, const void *bytes, size_t size)
{
    if (disk_fails(ENOSPC, 100))
        return -1;
    if (chance(10) == 0) {
        errno = EINTR;
        return -1;
    }
    return __real_write(file, bytes, size > 1 && chance(4) == 0 ? 1 + chance((unsigned)size - 1) : size);
}
