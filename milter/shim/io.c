/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * libmilter's system calls on connections, served from memory where possible.
 *
 * libmilter reads a command with five system calls, and writes each answer at
 * once. Where its static archive is linked, the linker redirects the archive's
 * calls of accept, poll, read, writev, close and syslog to the functions
 * __wrap_* at the end of this file. Each connection that libmilter accepts has
 * an entry in a table by its descriptor, and while it is busy a block of memory,
 * into which one recv takes all that has arrived. libmilter itself stays as it
 * is, and must not be able to tell the difference, but by the clock. All other
 * descriptors (its pipe, its listening socket, and those that the rest of this
 * extension uses) go straight to the system.
 *
 * When what was written goes out
 *
 *   Before the session waits for input, before it enters Python and after a
 *   progress packet (milter_io_flush, milter_io_push), when the block is full, and at the end.
 *   So a session that waits for its MTA holds nothing back, and no memory: its
 *   block was given back.
 *
 * A peer that does not read
 *
 *   is waited for with the time-out that libmilter gave with its last poll, and
 *   then the session fails, as in libmilter's own way of writing. All other
 *   errors are kept in the entry, and shown at the next poll as POLLERR, at the
 *   next write as they came: libmilter then ends the session.
 *
 * Who may touch an entry
 *
 *   A session is served by one thread at a time, and libmilter hands it over
 *   under its own mutex. That thread alone touches the entry and its block, but
 *   for two others:
 *
 *   1. Handlers act, and progress is sent, by any thread, under the session's
 *      lock (milter_shim.c), while the serving thread is in Python. It took that
 *      lock on the way there, and takes it on the way back.
 *   2. libmilter's controller polls the descriptors of all sessions that wait.
 *      It looks at nothing but the atomic fields of an entry, since its list may
 *      be out of date. Entries are never freed, so there is always one to look at.
 *
 * Sessions that wait for a worker (libmilter built with its pool of workers)
 *
 *   libmilter promises a session on which something has come to an idle worker, if
 *   it believes that there is one; else it starts a worker for it. A worker counts
 *   as idle until it wakes up, so several sessions may be promised to the same one.
 *   The others wait in a queue until any worker has nothing to do, and a worker
 *   stays with a session as long as the next command comes within a millisecond:
 *   behind sessions that never pause, or handlers that take long, they wait without
 *   bound. So what is promised is counted here, and when the queue did not move for
 *   a while, as many workers are started as sessions wait, by the function that
 *   libmilter itself starts them with. Those that are not needed any more end by
 *   themselves.
 *
 * When something runs out
 *
 *   Without a descriptor for it, a connection cannot be accepted, and libmilter would
 *   try again at once, for ever. So a failed accept takes a while here. Without a
 *   thread libmilter would forget the session that it wanted to serve by it; so the
 *   session is given to the workers that there are (serve_later). Both are logged
 *   once when they begin, and once when they are over.
 */
#define _GNU_SOURCE

#include "child.h"
#include "io.h"
#include "threads.h"

#if MILTER_IO_WRAPPED

#include <errno.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <syslog.h>
#include <time.h>
#include <unistd.h>

enum {
    INPUT = 16 * 1024, /* bytes that one recv may take */
    OUTPUT = 8 * 1024, /* bytes of small packets that wait to be written together */
    BLOCKS_KEPT = 32,  /* free blocks that are not given back to malloc */
    CHUNK = 256,       /* entries that are allocated at once */
    CHUNKS = 4096,     /* descriptors above CHUNK * CHUNKS are served without a block */
    PAUSE = 50,        /* milliseconds until the next accept, when one has failed */
    LOOK = 1,          /* milliseconds between two looks at the queue, while there is one */
    YIELDS = 2,        /* times that a thread gives way before it goes to sleep */
    CONNECT = 'C'      /* the letter of that command */
};

/* Nanoseconds in which a worker should come for one of the sessions in the queue. */
static const int64_t PATIENCE = 1000 * 1000;
/* Nanoseconds until threads are tried again, when there were none. */
static const uint64_t RETRY = 100 * 1000 * 1000;

struct block {
    struct block *next_free;
    char input[INPUT];
    char output[OUTPUT];
};

struct connection {
    /* Any thread: */
    atomic_bool open;   /* accepted by libmilter, and not closed */
    atomic_bool queued; /* promised to a worker that was idle, and has not come yet: counted in queue_length */
    /* Whoever serves the session: */
    bool tcp;
    bool ended;   /* the peer has closed its side, all it sent was taken */
    bool blocked; /* the last try to write wrote less than all */
    int error;    /* errno of a read or write that failed for good */
    int timeout;  /* milliseconds, of libmilter's last poll */
    unsigned header_size; /* bytes of a packet's length and letter that libmilter has read */
    uint32_t data_size;   /* told by that length, the letter included */
    uint32_t data_left;   /* bytes of data that it will read, before the next header; into one piece of memory */
    char command;         /* the letter that it has read last */
    bool unheard;         /* that command is due an answer, and the shim has not heard of it */
    char due[8];          /* the letters of commands that are due an answer, see milter_io_answer */
    struct block *block;
    unsigned input_begin, input_end;
    unsigned output_begin, output_end;
};

static _Atomic(struct connection *) table[CHUNKS];
static atomic_uint queue_length;
static _Atomic uint64_t queue_moved; /* when a worker came for one of the queue, or the first one was promised */
static atomic_bool has_pool; /* libmilter was built with its pool of workers */
static void *(*_Atomic worker)(void *); /* libmilter's function for its workers, once it is known */

static pthread_mutex_t blocks_lock = PTHREAD_MUTEX_INITIALIZER;
static struct block *free_blocks; /* under blocks_lock */
static unsigned free_count;       /* the same */

/* What this thread has read last. */
static _Thread_local struct {
    int fd;
    char command;
    const char *end;
} last_read = {-1, 0, NULL};
static atomic_int log_descriptor = -1;
static atomic_int expected_family = AF_UNSPEC;
static _Thread_local bool giving_back; /* see serve_later */

void __wrap_syslog(int priority, const char *format, ...) __attribute__((format(printf, 2, 3)));
int __real_accept(int fd, struct sockaddr *address, socklen_t *size);
int __real_close(int fd);
int __real_pthread_cond_signal(pthread_cond_t *condition);
int __real_poll(struct pollfd *fds, nfds_t count, int timeout);
ssize_t __real_read(int fd, void *buffer, size_t size);
ssize_t __real_write(int fd, const void *buffer, size_t size);
ssize_t __real_writev(int fd, const struct iovec *parts, int count);

/* ---- Entries and blocks ------------------------------------------------------------------ */

/* Any thread. The entry of a descriptor, NULL when it has none (yet). */
static struct connection *entry(int fd)
{
    if (fd < 0 || fd >= CHUNK * CHUNKS)
        return NULL;
    struct connection *chunk = atomic_load_explicit(&table[fd / CHUNK], memory_order_acquire);
    return chunk != NULL ? &chunk[fd % CHUNK] : NULL;
}

/* Any thread. The entry of a connection of libmilter, NULL for all other descriptors, and for all in a forked child. */
static struct connection *connection_of(int fd)
{
    struct connection *connection = entry(fd);
    return connection != NULL && !milter_is_child() && atomic_load(&connection->open) ? connection : NULL;
}

/* By libmilter's listener. The entry, made if need be; NULL: no memory, or too high a descriptor. */
static struct connection *make_entry(int fd)
{
    struct connection *chunk, *none = NULL;

    if (fd >= CHUNK * CHUNKS)
        return NULL;
    if (atomic_load(&table[fd / CHUNK]) == NULL) {
        chunk = calloc(CHUNK, sizeof *chunk);
        if (chunk == NULL)
            return NULL;
        if (!atomic_compare_exchange_strong(&table[fd / CHUNK], &none, chunk))
            free(chunk);
    }
    return entry(fd);
}

/* By whoever serves the session. False: no memory; it goes on without a block. */
static bool take_block(struct connection *connection)
{
    if (connection->block != NULL)
        return true;
    pthread_mutex_lock(&blocks_lock);
    struct block *block = free_blocks;
    if (block != NULL) {
        free_blocks = block->next_free;
        free_count--;
    }
    pthread_mutex_unlock(&blocks_lock);
    if (block == NULL)
        block = malloc(sizeof *block);
    connection->block = block;
    connection->input_begin = connection->input_end = 0;
    connection->output_begin = connection->output_end = 0;
    return block != NULL;
}

/* By whoever serves the session, when it is about to wait: with nothing to read and nothing to write. */
static void give_block_back(struct connection *connection)
{
    struct block *block = connection->block;

    if (block == NULL)
        return;
    connection->block = NULL;
    connection->input_begin = connection->input_end = 0;
    connection->output_begin = connection->output_end = 0;
    pthread_mutex_lock(&blocks_lock);
    if (free_count < BLOCKS_KEPT) {
        block->next_free = free_blocks;
        free_blocks = block;
        free_count++;
        block = NULL;
    }
    pthread_mutex_unlock(&blocks_lock);
    free(block);
}

static void set_option(int fd, int option)
{
    const int on = 1;
    (void)setsockopt(fd, IPPROTO_TCP, option, &on, sizeof on); /* without it: slower, not wrong */
}

/* ---- The queue for a worker -------------------------------------------------------------- */

/* In libmilter's controller and its listener: the sessions that it is about to hand out, in its order. */
static _Thread_local struct {
    const struct pollfd *fds;
    nfds_t count, next;
} dispatch;

/* In libmilter's listener, which starts the first workers: the function that it started twice. */
static _Thread_local struct {
    void *(*last)(void *);
    void *(*twice)(void *);
} first_threads;

static uint64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static struct connection *next_dispatched(void)
{
    while (dispatch.next < dispatch.count) {
        const struct pollfd *polled = &dispatch.fds[dispatch.next++];
        struct connection *connection = polled->revents != 0 ? connection_of(polled->fd) : NULL;
        if (connection != NULL)
            return connection;
    }
    return NULL;
}

/* By libmilter's controller or listener, under libmilter's lock: an idle worker is told of a session. */
static void enter_queue(struct connection *connection)
{
    if (atomic_exchange(&connection->queued, true))
        return;
    if (atomic_fetch_add(&queue_length, 1) == 0)
        atomic_store(&queue_moved, now());
}

/* By the worker that comes for the session, and by whoever closes it. */
static void leave_queue(struct connection *connection)
{
    if (!atomic_load(&connection->queued) || !atomic_exchange(&connection->queued, false))
        return;
    atomic_store(&queue_moved, now());
    atomic_fetch_sub(&queue_length, 1);
}

static bool queue_stands(void)
{
    return atomic_load(&queue_length) > 0 && (int64_t)(now() - atomic_load(&queue_moved)) > PATIENCE;
}

/* By whoever starts threads for libmilter. Says once that there are none, and once that there are again. */
static void note_start(int error)
{
    static atomic_bool failing;

    if (error != 0) {
        if (!atomic_exchange(&failing, true))
            __wrap_syslog(LOG_ERR,
                          "no thread can be started (%s): connections wait for those that there are. Raise the limit "
                          "of threads (systemd: TasksMax=, LimitNPROC=; ulimit -u) or of memory, or let the MTA open "
                          "fewer connections",
                          strerror(error));
    } else if (atomic_load(&failing) && atomic_exchange(&failing, false)) {
        __wrap_syslog(LOG_NOTICE, "threads can be started again");
    }
}

/* By libmilter's controller or listener: a worker for each session of a queue that stands. */
static void start_workers(void)
{
    void *(*const routine)(void *) = atomic_load(&worker);
    pthread_t thread;

    uint64_t pause = 0;

    for (unsigned missing = routine != NULL ? atomic_load(&queue_length) : 0; missing > 0; missing--) {
        const int error = milter_start_thread(&thread, NULL, routine, NULL); /* it detaches itself */
        note_start(error);
        if (error != 0) {
            pause = RETRY;
            break;
        }
    }
    atomic_store(&queue_moved, now() + pause);
}

/*
 * By libmilter's listener: the next connection is often there as soon as others
 * had the processor. To sleep and to be woken up takes longer than to give way.
 */
static int look_again(struct pollfd *fds, nfds_t count)
{
    int result = 0;

    for (int i = 0; i < YIELDS && result == 0; i++) {
        sched_yield();
        result = __real_poll(fds, count, 0);
    }
    return result;
}

/*
 * By libmilter's controller and listener, which hand out sessions: they look
 * after the queue while they wait. And by anybody else whose descriptor is not
 * a connection's, which does no harm.
 */
static int poll_others(struct pollfd *fds, nfds_t count, int timeout)
{
    int result = count == 1 ? look_again(fds, count) : 0;

    while (result == 0) {
        const bool look = atomic_load(&queue_length) > 0 && (timeout < 0 || timeout > LOOK);

        if (look && queue_stands())
            start_workers();
        result = __real_poll(fds, count, look ? LOOK : timeout);
        if (result != 0 || !look)
            break;
        if (timeout > 0)
            timeout -= LOOK;
    }
    return result;
}

/* By libmilter's controller, after its poll: it will hand out these, if connections are among them. */
static void note_ready(const struct pollfd *fds, nfds_t count, int ready)
{
    nfds_t first = 0;

    while (ready > 0 && first < count && (fds[first].revents == 0 || connection_of(fds[first].fd) == NULL))
        first++;
    dispatch.fds = fds;
    dispatch.count = ready > 0 && first < count ? count : 0;
    dispatch.next = first;
}

/* ---- Connections begin ------------------------------------------------------------------- */

/* By libmilter's listener. Nobody else knows the descriptor yet. */
static void adopt(int fd, bool tcp)
{
    struct connection *connection = make_entry(fd);

    if (tcp)
        set_option(fd, TCP_NODELAY);
    if (connection == NULL)
        return;
    if (atomic_load(&connection->open)) { /* somebody closed the descriptor behind our back */
        leave_queue(connection);
        give_block_back(connection);
    }
    connection->tcp = tcp;
    connection->ended = connection->blocked = false;
    connection->error = 0;
    connection->timeout = -1;
    connection->header_size = 0;
    connection->data_left = 0;
    connection->unheard = false;
    connection->due[0] = '\0';
    atomic_store(&connection->open, true);
}

/* ---- Writing ----------------------------------------------------------------------------- */

static size_t gathered(const struct connection *connection)
{
    return connection->output_end - connection->output_begin;
}

static bool fails_for_good(int error)
{
    return error != EAGAIN && error != EWOULDBLOCK && error != EINTR;
}

/*
 * By whoever serves the session. Writes what was gathered, then the parts (eight
 * at most; libmilter has two), as far as it goes without waiting. Returns how
 * many bytes of the parts went; 0, when there are none and all gathered went;
 * else -1 and errno, EAGAIN if the peer must read first.
 */
static ssize_t send_now(struct connection *connection, int fd, const struct iovec *parts, int count)
{
    struct iovec all[9];
    const size_t first = gathered(connection);
    size_t size = first;
    int n = 0;

    if (first > 0)
        all[n++] = (struct iovec){connection->block->output + connection->output_begin, first};
    for (int i = 0; i < count && i < 8; i++) {
        all[n++] = parts[i];
        size += parts[i].iov_len;
    }
    const struct msghdr message = {.msg_iov = all, .msg_iovlen = (size_t)n};
    const ssize_t sent = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0 && fails_for_good(errno))
        connection->error = errno;
    else
        connection->blocked = sent < (ssize_t)size;
    if (sent < 0)
        return -1;
    if ((size_t)sent < first) {
        connection->output_begin += (unsigned)sent;
        errno = EAGAIN;
        return -1;
    }
    connection->output_begin = connection->output_end = 0;
    if ((size_t)sent == first && size > first) {
        errno = EAGAIN;
        return -1;
    }
    return sent - (ssize_t)first;
}

/* By whoever serves the session. Waits for a slow reader; false: the session is over, error says why. */
static bool flush(struct connection *connection, int fd)
{
    while (connection->error == 0 && gathered(connection) > 0) {
        struct pollfd writable = {fd, POLLOUT, 0};

        if (send_now(connection, fd, NULL, 0) >= 0 || connection->error != 0)
            break;
        if (errno != EINTR && __real_poll(&writable, 1, connection->timeout) == 0)
            connection->error = ETIMEDOUT;
    }
    return connection->error == 0;
}

/* By whoever serves the session, without waiting; and by whoever closes it, when libmilter holds its lock. */
static void flush_what_goes(struct connection *connection, int fd)
{
    size_t left = 0;

    while (connection->error == 0 && gathered(connection) > 0) {
        if (send_now(connection, fd, NULL, 0) < 0 && errno != EINTR && gathered(connection) == left)
            break;
        left = gathered(connection);
    }
}

/* libmilter is about to write a packet; small ones are gathered without asking the system. */
static int await_output(struct connection *connection, struct pollfd *fds, int timeout)
{
    connection->timeout = timeout;
    if (connection->blocked && connection->error == 0) {
        const int result = __real_poll(fds, 1, timeout);
        connection->blocked = result <= 0;
        return result;
    }
    fds->revents = POLLOUT;
    return 1;
}

static ssize_t write_parts(struct connection *connection, int fd, const struct iovec *parts, int count)
{
    size_t size = 0;

    if (connection->error != 0) {
        errno = connection->error;
        return -1;
    }
    for (int i = 0; i < count; i++)
        size += parts[i].iov_len;
    if (!take_block(connection))
        return __real_writev(fd, parts, count);
    if (size > OUTPUT - connection->output_end)
        return send_now(connection, fd, parts, count);
    for (int i = 0; i < count; i++) {
        memcpy(connection->block->output + connection->output_end, parts[i].iov_base, parts[i].iov_len);
        connection->output_end += (unsigned)parts[i].iov_len;
    }
    return (ssize_t)size;
}

/* ---- Reading ----------------------------------------------------------------------------- */

static size_t buffered(const struct connection *connection)
{
    return connection->input_end - connection->input_begin;
}

/* By whoever serves the session: what a recv said, when it brought nothing. */
static void note_end(struct connection *connection, ssize_t received)
{
    if (received == 0)
        connection->ended = true;
    else if (fails_for_good(errno))
        connection->error = errno;
}

/*
 * By whoever serves the session, when nothing is buffered: one recv into `rest`
 * of libmilter's memory first (which may be empty), and then into the block.
 * Returns how many bytes of the rest were filled.
 */
static size_t receive(struct connection *connection, int fd, char *rest, size_t size)
{
    struct iovec parts[2] = {{rest, size}, {connection->block->input, INPUT}};
    struct msghdr message = {.msg_iov = size > 0 ? parts : parts + 1, .msg_iovlen = size > 0 ? 2 : 1};
    ssize_t received;

    do
        received = recvmsg(fd, &message, MSG_DONTWAIT);
    while (received < 0 && errno == EINTR);
    if (received <= 0) {
        note_end(connection, received);
        return 0;
    }
    if ((size_t)received <= size)
        return (size_t)received;
    connection->input_begin = 0;
    connection->input_end = (unsigned)((size_t)received - size);
    return size;
}

/* Of a packet of this length. libmilter counts in an int, and takes what is negative there for none. */
static uint32_t data_after(uint32_t length)
{
    return length > 0 && length - 1 <= INT32_MAX ? length - 1 : 0;
}

static bool is_due(const struct connection *connection)
{
    return connection->command != '\0' && strchr(connection->due, connection->command) != NULL;
}

/* By whoever serves the session: libmilter reads the five bytes of a header, in pieces perhaps, then the data. */
static void follow(struct connection *connection, unsigned char *bytes, size_t size)
{
    if (connection->data_left > 0) {
        connection->data_left -= size < connection->data_left ? (uint32_t)size : connection->data_left;
        if (connection->data_left == 0 && connection->command == CONNECT) {
            const size_t all = data_after(connection->data_size);
            milter_mend_client((char *)bytes + size - all, all);
        }
        connection->unheard = connection->data_left == 0 && is_due(connection);
        return;
    }
    for (; size > 0; bytes++, size--) {
        if (connection->header_size++ < 4) {
            connection->data_size = connection->data_size << 8 | *bytes;
            continue;
        }
        connection->command = (char)*bytes;
        connection->header_size = 0;
        connection->data_left = data_after(connection->data_size);
        connection->unheard = connection->data_left == 0 && is_due(connection);
    }
}

/* By libmilter, after a poll that said there is something. */
static ssize_t read_some(struct connection *connection, int fd, char *buffer, size_t size)
{
    size_t here = buffered(connection);

    if (connection->error != 0) {
        errno = connection->error;
        return -1;
    }
    if (connection->block == NULL)
        return connection->ended ? 0 : __real_read(fd, buffer, size);
    if (here > size)
        here = size;
    memcpy(buffer, connection->block->input + connection->input_begin, here);
    connection->input_begin += (unsigned)here;
    if (here < size && !connection->ended)
        here += receive(connection, fd, buffer + here, size - here);
    return (ssize_t)here;
}

/* ---- Waiting for input ------------------------------------------------------------------- */

/*
 * By whoever serves the session: libmilter has read a whole command, and asks for the next one without having called
 * the shim. It ignores what cannot follow the command before, and the MTA would wait for an answer until it takes the
 * filter for broken, and passes mail perhaps. Postfix does that after a message that it refused at its end
 * (smtpd_end_of_data_restrictions): whatever the client says then belongs to no message that the filter knows of.
 */
static void answer_ignored(struct connection *connection, int fd)
{
    static char temporary_failure[] = {0, 0, 0, 1, 't'};
    const struct iovec answer = {temporary_failure, sizeof temporary_failure};

    connection->unheard = false;
    (void)write_parts(connection, fd, &answer, 1); /* if it fails, the next call says so */
}

/* Is there anything that libmilter should look at? */
static bool has_news(const struct connection *connection)
{
    return buffered(connection) > 0 || connection->ended || connection->error != 0;
}

static int say_ready(const struct connection *connection, struct pollfd *fds)
{
    fds->revents = connection->error != 0 ? POLLIN | POLLERR | POLLHUP : POLLIN;
    return 1;
}

/*
 * By the thread that serves the session: libmilter wants to know if a command,
 * or the rest of one, has come. Between two commands a worker of the pool asks
 * without POLLPRI, with a short time-out, and leaves the session to the
 * controller if nothing has.
 */
static int await_input(struct connection *connection, struct pollfd *fds, int timeout)
{
    const int fd = fds->fd;
    const bool between = (fds->events & POLLPRI) == 0;
    const bool soon = gathered(connection) > 0 || connection->data_left > 0;

    fds->revents = 0;
    leave_queue(connection);
    if (connection->unheard)
        answer_ignored(connection, fd);
    if (!between)
        connection->timeout = timeout;
    if (has_news(connection))
        return say_ready(connection, fds);

    flush(connection, fd);
    for (int i = 0; soon && i < YIELDS; i++)
        sched_yield(); /* the MTA often has what comes next ready as soon as it had the processor */
    if (connection->error == 0 && take_block(connection))
        receive(connection, fd, NULL, 0);
    for (;;) {
        if (has_news(connection))
            return say_ready(connection, fds);
        give_block_back(connection);
        if (connection->tcp)
            set_option(fd, TCP_QUICKACK);
        struct pollfd readable = {fd, POLLIN, 0};
        const int result = __real_poll(&readable, 1, timeout);
        if (result <= 0)
            return result;
        if (!take_block(connection)) {
            fds->revents = readable.revents;
            return result;
        }
        receive(connection, fd, NULL, 0);
    }
}

/* ---- For the shim and for Python: see io.h ------------------------------------------------ */

int milter_io_descriptor(void)
{
    return last_read.fd;
}

char milter_io_command(void)
{
    return last_read.command;
}

const char *milter_io_data_end(void)
{
    return last_read.end;
}

void milter_io_answer(int fd, const char *letters)
{
    struct connection *connection = connection_of(fd);

    if (connection != NULL)
        snprintf(connection->due, sizeof connection->due, "%s", letters);
}

void milter_io_heard(int fd)
{
    struct connection *connection = connection_of(fd);

    if (connection != NULL)
        connection->unheard = false;
}

bool milter_io_flush(int fd)
{
    struct connection *connection = connection_of(fd);
    return connection == NULL || flush(connection, fd);
}

int milter_io_push(int fd)
{
    struct connection *connection = connection_of(fd);

    if (connection == NULL)
        return 1;
    flush_what_goes(connection, fd);
    if (connection->error != 0)
        return -1;
    return gathered(connection) == 0 && !connection->blocked;
}

int milter_io_log_to(int fd)
{
    return atomic_exchange(&log_descriptor, fd);
}

void milter_io_expect(int family)
{
    atomic_store(&expected_family, family);
}

/* ---- libmilter's log --------------------------------------------------------------------- */

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
    if (fd < 0 || __real_write(fd, line, (size_t)size) != size) {
        errno = saved;
        vsyslog(priority, format, again);
    }
    va_end(again);
    errno = saved;
}

/* ---- What the linker puts in the place of libmilter's calls ------------------------------ */

#define WRAP __attribute__((used, visibility("hidden")))

static bool accept_fails; /* for want of something; libmilter's listener alone touches it */

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
static int note_failed_accept(int error)
{
    struct rlimit limit = {0, 0};

    if (error == EINVAL) {
        __real_poll(NULL, 0, PAUSE);
        return EAGAIN;
    }
    if (!runs_out(error))
        return error;
    if (!accept_fails) {
        accept_fails = true;
        (void)getrlimit(RLIMIT_NOFILE, &limit);
        __wrap_syslog(LOG_ERR,
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
        __wrap_syslog(LOG_NOTICE, "all connections that waited were accepted");
    }
}

WRAP int __wrap_accept(int fd, struct sockaddr *address, socklen_t *size)
{
    static _Thread_local struct pollfd newcomer;
    const socklen_t room = size != NULL ? *size : 0;
    const int accepted = __real_accept(fd, address, size);

    if (size != NULL && *size > room)
        *size = room; /* of another family; libmilter takes this for the size of its memory at the next call */
    if (accepted < 0) {
        errno = note_failed_accept(errno);
    } else {
        note_accept(fd);
        const bool named = address != NULL && *size >= sizeof address->sa_family;
        adopt(accepted, named && (address->sa_family == AF_INET || address->sa_family == AF_INET6));
        const int family = atomic_load(&expected_family);
        if (named && family != AF_UNSPEC)
            address->sa_family = (sa_family_t)family; /* libmilter looks at nothing else of it */
        newcomer = (struct pollfd){accepted, POLLIN, POLLIN};
        note_ready(&newcomer, 1, 1);
        if (first_threads.twice != NULL && !atomic_exchange(&has_pool, true) && atomic_load(&worker) == NULL)
            atomic_store(&worker, first_threads.twice);
    }
    return accepted;
}

/* libmilter tells its workers of a session in the queue. */
WRAP int __wrap_pthread_cond_signal(pthread_cond_t *condition)
{
    struct connection *connection = next_dispatched();

    if (connection != NULL)
        enter_queue(connection);
    return __real_pthread_cond_signal(condition);
}

/*
 * By libmilter's controller or listener, under libmilter's lock: there is no thread
 * for this session, and no idle worker. libmilter's function for workers gives a
 * session back, to be served by any worker, when it cannot detach its thread. So
 * it is called here, and fails to (threads.c). Then whoever waits for the queue
 * tries again to start a worker.
 */
static void serve_later(struct connection *connection, void *(*routine)(void *), void *session)
{
    giving_back = true;
    milter_refuse_detach(true);
    routine(session);
    milter_refuse_detach(false);
    giving_back = false;
    enter_queue(connection);
    atomic_store(&queue_moved, now() + RETRY);
}

/*
 * libmilter starts a worker for a session, or, before it accepts the first one,
 * its controller and some workers that have none. Anybody's threads start here,
 * but only libmilter's listener has the one, and accepts later.
 */
WRAP int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*routine)(void *),
                               void *argument)
{
    struct connection *connection = next_dispatched();

    if (connection != NULL) {
        atomic_store(&worker, routine);
    } else if (argument == NULL) {
        if (first_threads.last == routine)
            first_threads.twice = routine;
        first_threads.last = routine;
    }
    const int error = milter_start_thread(thread, attributes, routine, argument);
    note_start(error);
    if (error == 0 || connection == NULL || !atomic_load(&has_pool))
        return error;
    serve_later(connection, routine, argument);
    return 0;
}

/* The entry is left before the descriptor is, which may be another connection's at once. */
WRAP int __wrap_close(int fd)
{
    struct connection *connection = connection_of(fd);

    if (connection != NULL) {
        flush_what_goes(connection, fd);
        leave_queue(connection);
        give_block_back(connection);
        atomic_store(&connection->open, false);
    }
    return __real_close(fd);
}

WRAP int __wrap_poll(struct pollfd *fds, nfds_t count, int timeout)
{
    struct connection *connection;

    connection = count == 1 ? connection_of(fds->fd) : NULL;
    if (connection == NULL) {
        dispatch.count = 0;
        const int ready = poll_others(fds, count, timeout);
        note_ready(fds, count, ready);
        return ready;
    }
    if ((fds->events & POLLOUT) != 0)
        return await_output(connection, fds, timeout);
    return await_input(connection, fds, timeout);
}

WRAP int __wrap___poll_chk(struct pollfd *fds, nfds_t count, int timeout, size_t size)
{
    if (size / sizeof *fds < count)
        abort();
    return __wrap_poll(fds, count, timeout);
}

WRAP ssize_t __wrap_read(int fd, void *buffer, size_t size)
{
    struct connection *connection = connection_of(fd);

    last_read.fd = fd; /* of any connection, or the one before would be taken for this one */
    last_read.command = 0;
    last_read.end = NULL;
    if (connection == NULL)
        return __real_read(fd, buffer, size);
    const ssize_t result = read_some(connection, fd, buffer, size);
    if (result > 0)
        follow(connection, buffer, (size_t)result);
    last_read.command = connection->command;
    last_read.end = (const char *)buffer + (result > 0 ? result : 0);
    return result;
}

WRAP ssize_t __wrap___read_chk(int fd, void *buffer, size_t size, size_t room)
{
    if (size > room)
        abort();
    return __wrap_read(fd, buffer, size);
}

WRAP ssize_t __wrap_writev(int fd, const struct iovec *parts, int count)
{
    struct connection *connection = connection_of(fd);

    if (connection == NULL)
        return __real_writev(fd, parts, count);
    return write_parts(connection, fd, parts, count);
}

WRAP ssize_t __wrap_write(int fd, const void *buffer, size_t size)
{
    struct connection *connection = connection_of(fd);

    if (connection == NULL)
        return __real_write(fd, buffer, size);
    const struct iovec part = {(void *)(uintptr_t)buffer, size};
    return write_parts(connection, fd, &part, 1);
}

WRAP void __wrap_syslog(int priority, const char *format, ...)
{
    va_list arguments;

    if (giving_back)
        return; /* that a thread could not be detached */
    va_start(arguments, format);
    log_line(priority, format, arguments);
    va_end(arguments);
}

WRAP void __wrap___syslog_chk(int priority, int flag, const char *format, ...)
{
    va_list arguments;

    (void)flag;
    if (giving_back)
        return;
    va_start(arguments, format);
    log_line(priority, format, arguments);
    va_end(arguments);
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

int milter_io_descriptor(void)
{
    return -1;
}

char milter_io_command(void)
{
    return 0;
}

const char *milter_io_data_end(void)
{
    return NULL;
}

void milter_io_answer(int fd, const char *letters)
{
    (void)fd;
    (void)letters;
}

void milter_io_heard(int fd)
{
    (void)fd;
}

bool milter_io_flush(int fd)
{
    (void)fd;
    return true;
}

int milter_io_push(int fd)
{
    (void)fd;
    return 1;
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

bool milter_io_wrapped(void)
{
    return false;
}

const char *milter_io_symbols(void)
{
    return "";
}

#endif
