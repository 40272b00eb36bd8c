/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What a child inherits, when code of the filter forks: nothing of the filter.
 *
 * fork() copies the memory and the descriptors of the whole process, but only the
 * thread that called it. A child of a handler would have all connections of MTAs, and
 * a thread that goes back into libmilter, as soon as the handler returns, and answers
 * on one of them. Its parent answers as well; then each answer on that connection
 * belongs to the command before it.
 *
 * This file registers handlers with pthread_atfork. They run whoever forks: Python, or
 * another library's C code; but for vfork and posix_spawn, after which another program
 * runs. (Python's own part is in milter/children.py.)
 *
 * The invariants
 *
 *   1. In a child each function that acts on a session fails, before it takes a lock.
 *   2. In a child no thread goes from Python back into the shim, or libmilter:
 *      milter_back_from_python ends the process.
 *   3. In a child nothing that was hidden is open: /dev/null is in its place, so that
 *      the number is not given to another file while somebody still believes that it
 *      is his. So the MTA sees the end of a connection when the filter closes it, nobody
 *      connects to a port where only a child listens, and what a child is told by a signal does not ring the filter's
 *      bell.
 *   4. No signal is delivered to a child before 3 is true: all are blocked from before
 *      the fork. A signal that comes meanwhile waits.
 *
 * What is hidden is found by looking at all open descriptors, since libmilter tells
 * nobody of its own, and sockets are duplicated. What is compared is the file itself,
 * or the address of a socket: no number that may belong to another file by now.
 *
 * Locks: a slot of the table is reserved by its state, which is atomic. A child reads
 * the table alone. Locks of the shim that another thread held during the fork stay
 * locked in a child; 1 and 2 keep it away from them.
 */
#define _GNU_SOURCE

#include "child.h"
#include "milter_shim.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum {
    HIDDEN = 64,
    MOST_DESCRIPTORS = 65536 /* that are looked at where there is no /proc */
};

enum state { FREE, RESERVED, USED };

union address {
    struct sockaddr any;
    struct sockaddr_in in;
    struct sockaddr_in6 in6;
    struct sockaddr_un un;
    struct sockaddr_storage storage;
};

struct hidden {
    atomic_int state; /* enum state; the rest belongs to who has reserved it, and to nobody's change once it is used */
    bool listens;
    dev_t device;
    ino_t inode;
    socklen_t size; /* of the address, of one that listens */
    union address address;
};

static struct hidden table[HIDDEN];
static atomic_bool watched; /* libmilter is started in this process */
static atomic_bool child;
static pthread_rwlock_t newcomers = PTHREAD_RWLOCK_INITIALIZER; /* read: they enter; written: somebody forks */
static _Thread_local bool met_python;
static _Thread_local sigset_t mask; /* of a thread that forks, before that */

/* ---- What is hidden ---------------------------------------------------------------------- */

static bool listens(int fd)
{
    int value = 0;
    socklen_t size = sizeof value;

    return getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &value, &size) == 0 && value != 0;
}

/* Does a connection at this address come from a listener at that one? */
static bool accepted_at(const union address *address, socklen_t size, const struct hidden *listener)
{
    const union address *its = &listener->address;

    if (address->any.sa_family != its->any.sa_family)
        return false;
    switch (address->any.sa_family) {
    case AF_INET:
        return address->in.sin_port == its->in.sin_port &&
               (its->in.sin_addr.s_addr == htonl(INADDR_ANY) ||
                address->in.sin_addr.s_addr == its->in.sin_addr.s_addr);
    case AF_INET6:
        return address->in6.sin6_port == its->in6.sin6_port &&
               (IN6_IS_ADDR_UNSPECIFIED(&its->in6.sin6_addr) ||
                IN6_ARE_ADDR_EQUAL(&address->in6.sin6_addr, &its->in6.sin6_addr));
    default: /* a Unix socket's; without a path it is nobody's in particular */
        return size == listener->size && size > offsetof(struct sockaddr_un, sun_path) &&
               memcmp(address, its, size) == 0;
    }
}

static bool is_same(const struct hidden *hidden, const struct stat *file, const union address *address, socklen_t size)
{
    if (atomic_load(&hidden->state) != USED)
        return false;
    if (hidden->device == file->st_dev && hidden->inode == file->st_ino)
        return true;
    return hidden->listens && size > 0 && accepted_at(address, size, hidden);
}

static bool is_hidden(int fd)
{
    struct stat file;
    union address address;
    socklen_t size = sizeof address;

    if (fstat(fd, &file) != 0)
        return false;
    if (!S_ISSOCK(file.st_mode) || getsockname(fd, &address.any, &size) != 0)
        size = 0;
    for (int i = 0; i < HIDDEN; i++)
        if (is_same(&table[i], &file, &address, size))
            return true;
    return false;
}

int milter_hide(int fd)
{
    struct stat file;

    if (fstat(fd, &file) != 0)
        return -1;
    for (int i = 0; i < HIDDEN; i++) {
        struct hidden *hidden = &table[i];
        int expected = FREE;
        if (!atomic_compare_exchange_strong(&hidden->state, &expected, RESERVED))
            continue;
        hidden->device = file.st_dev;
        hidden->inode = file.st_ino;
        hidden->size = sizeof hidden->address;
        hidden->listens = S_ISSOCK(file.st_mode) && listens(fd) &&
                          getsockname(fd, &hidden->address.any, &hidden->size) == 0;
        atomic_store(&hidden->state, USED);
        return i;
    }
    return -1;
}

void milter_show(int number)
{
    if (number >= 0)
        atomic_store(&table[number].state, FREE);
}

/* ---- In a child: by its only thread ------------------------------------------------------- */

static void replace(int fd, int null)
{
    if (null < 0 || dup2(null, fd) < 0 || fcntl(fd, F_SETFD, FD_CLOEXEC) != 0)
        close(fd);
}

/* Where there is no /proc, or no descriptor is left to read it with. */
static void replace_by_number(int null)
{
    const long most = sysconf(_SC_OPEN_MAX);

    for (int fd = 0; fd < MOST_DESCRIPTORS && fd < most; fd++)
        if (is_hidden(fd))
            replace(fd, null);
}

static bool hides_something(void)
{
    for (int i = 0; i < HIDDEN; i++)
        if (atomic_load(&table[i].state) == USED)
            return true;
    return false;
}

static void replace_hidden(void)
{
    const int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    DIR *all = opendir("/proc/self/fd");
    const struct dirent *entry;

    if (all == NULL) {
        replace_by_number(null);
    } else {
        while ((entry = readdir(all)) != NULL) {
            const int fd = atoi(entry->d_name); /* "." and ".." are 0, which is looked at once more */
            if (is_hidden(fd))
                replace(fd, null);
        }
        closedir(all);
    }
    if (null >= 0)
        close(null);
}

/* ---- Around a fork: by the thread that forks ------------------------------------------------ */

static void before_fork(void)
{
    sigset_t all;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &mask);
}

static void after_in_parent(void)
{
    pthread_sigmask(SIG_SETMASK, &mask, NULL);
}

static void after_in_child(void)
{
    const int saved = errno;

    pthread_rwlock_init(&newcomers, NULL); /* its writer had another number in the parent */
    if (atomic_load(&watched))
        atomic_store(&child, true);
    if (hides_something())
        replace_hidden();
    for (int i = 0; i < HIDDEN; i++)
        atomic_store(&table[i].state, FREE);
    pthread_sigmask(SIG_SETMASK, &mask, NULL);
    errno = saved;
}

/* When the extension is loaded, before anything is hidden. */
__attribute__((constructor)) static void prepare(void)
{
    (void)pthread_atfork(before_fork, after_in_parent, after_in_child);
}

void milter_watch_forks(void)
{
    atomic_store(&watched, true);
}

bool milter_is_child(void)
{
    return atomic_load_explicit(&child, memory_order_relaxed);
}

void milter_meet_python(void)
{
    struct milter_event nothing = {.app = 0};

    if (met_python)
        return;
    pthread_rwlock_rdlock(&newcomers);
    milter_python_enter(&nothing); /* which is no filter's */
    pthread_rwlock_unlock(&newcomers);
    met_python = true;
}

void milter_hold_newcomers(void)
{
    pthread_rwlock_wrlock(&newcomers);
}

void milter_let_newcomers_in(void)
{
    pthread_rwlock_unlock(&newcomers);
}

/* Python's part has ended the child before, unless Python does not know of it. */
int milter_back_from_python(int answer)
{
    if (milter_is_child())
        _exit((answer & MILTER_ANSWERED) != 0 ? 0 : 1);
    return answer;
}
