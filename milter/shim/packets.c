/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Whole packets for libmilter.
 *
 * libmilter reads a packet with five system calls, and writes each answer at once.
 * Where its calls are redirected (redirect.h), those of mi_rd_cmd, mi_wr_cmd, poll and
 * close come to the functions ours_* at the end of this file.
 * A connection has an entry in a table by its descriptor, and while it is busy a
 * block of memory: one recv takes all that has arrived into the block, and what
 * belongs to a packet that has begun straight into that packet's memory, which
 * libmilter gets and frees. All other descriptors go to the system.
 *
 * libmilter's engine asks with a poll whether there is another command, before it
 * reads one. The answer is yes only when a whole packet is here, or the end of the
 * connection: so it never waits within a packet, nor does the thread that runs it.
 * (A libmilter with a thread for each connection does not ask, and waits here.)
 *
 * When answers go out
 *
 *   When the session has no other packet, before it enters Python and after a
 *   progress packet (milter_io_flush, milter_io_push), when the block is full, and at the end.
 *   So a session that waits for its MTA holds nothing back, and no memory: its
 *   block was given back.
 *
 * A peer that does not read
 *
 *   is waited for with libmilter's time-out, and then the session fails, as in
 *   libmilter's own way of writing. Before a thread waits, it gives away the lead
 *   (scheduler.h). An error is kept in the entry: the next packet that libmilter
 *   wants to read is then none, and it ends the session.
 *
 * Who may touch an entry
 *
 *   A session is served by one thread at a time, and handed over by the field `turn`
 *   (scheduler.c). That thread alone touches the entry and its block, but for handlers
 *   that act and progress that is sent by any thread, under the session's lock
 *   (milter_shim.c), while the serving thread is in Python. It took that lock on the
 *   way there, and takes it on the way back. Entries are never freed.
 */
#define _GNU_SOURCE

#include "packets.h"

#include "child.h"
#include "milter_shim.h"
#include "redirect.h"
#include "scheduler.h"

#if MILTER_REDIRECT

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <syslog.h>
#include <unistd.h>

enum {
    INPUT = 16 * 1024, /* bytes that one recv may take beyond the packet that has begun */
    OUTPUT = 8 * 1024, /* bytes of small packets that wait to be written together */
    BLOCKS_KEPT = 32,  /* free blocks that are not given back to malloc */
    CHUNK = 256,       /* entries that are allocated at once */
    CHUNKS = 4096      /* descriptors above CHUNK * CHUNKS are not served */
};

/* What libmilter's mi_rd_cmd says in the place of a letter, when there is no packet (libmilter.h). */
enum { TIMED_OUT = 1, WRITE_ERROR = 2, NO_MEMORY = 3, READ_ERROR = 4, PEER_ENDED = 5, TOO_BIG = 7 };

struct block {
    struct block *next_free;
    char input[INPUT];
    char output[OUTPUT];
};

static _Atomic(struct connection *) table[CHUNKS];
static atomic_int most_descriptors;
static _Atomic size_t max_data_size = MILTER_MAX_DATA_SIZE;

static pthread_mutex_t blocks_lock = PTHREAD_MUTEX_INITIALIZER;
static struct block *free_blocks; /* under blocks_lock */
static unsigned free_count;       /* the same */

/* The packet that this thread has given to libmilter last. */
static _Thread_local struct {
    int fd;
    char command;
    const char *end;
} last_read = {-1, 0, NULL};


/* ---- Entries and blocks ------------------------------------------------------------------ */

/* Any thread. The entry of a descriptor, NULL when it has none (yet). */
static struct connection *entry(int fd)
{
    if (fd < 0 || fd >= CHUNK * CHUNKS)
        return NULL;
    struct connection *chunk = atomic_load_explicit(&table[fd / CHUNK], memory_order_acquire);
    return chunk != NULL ? &chunk[fd % CHUNK] : NULL;
}

struct connection *milter_connection(int fd)
{
    struct connection *connection = entry(fd);

    return connection != NULL && !milter_is_child() && atomic_load(&connection->open) ? connection : NULL;
}

int milter_most_descriptors(void)
{
    return atomic_load(&most_descriptors);
}

/* By libmilter's listener, the only thread that makes entries. NULL: no memory, or too high a descriptor. */
static struct connection *make_entry(int fd)
{
    if (fd >= CHUNK * CHUNKS)
        return NULL;
    if (atomic_load(&table[fd / CHUNK]) == NULL) {
        struct connection *chunk = calloc(CHUNK, sizeof *chunk);
        if (chunk == NULL)
            return NULL;
        for (int i = 0; i < CHUNK; i++)
            chunk[i].fd = fd / CHUNK * CHUNK + i;
        atomic_store(&table[fd / CHUNK], chunk);
        if ((fd / CHUNK + 1) * CHUNK > atomic_load(&most_descriptors))
            atomic_store(&most_descriptors, (fd / CHUNK + 1) * CHUNK);
    }
    return entry(fd);
}

/* By the thread that serves the session. False: no memory; it goes on without a block. */
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

/* By the thread that serves the session, when it is about to wait, or ends. */
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

/* By the thread that serves the session, or finds the entry of one that is abandoned. */
static void clear(struct connection *connection)
{
    give_block_back(connection);
    free(connection->data);
    connection->data = NULL;
    connection->filled = 0;
    connection->failure = 0;
    connection->stage = BETWEEN;
}

struct connection *milter_adopt(int fd, bool tcp)
{
    struct connection *connection = make_entry(fd);

    if (tcp)
        set_option(fd, TCP_NODELAY);
    if (connection == NULL)
        return NULL;
    if (atomic_load(&connection->open)) { /* else it was cleared when it was closed, before that was said there */
        if (!milter_abandon(connection))
            return NULL;
        clear(connection);
    }
    connection->tcp = tcp;
    connection->ended = connection->ends = connection->drained = connection->left = false;
    connection->error = 0;
    connection->timeout = -1;
    connection->unheard = false;
    connection->due[0] = '\0';
    atomic_store(&connection->open, true);
    return connection;
}

/* ---- Writing ----------------------------------------------------------------------------- */

static size_t gathered(const struct connection *connection)
{
    return connection->output_end - connection->output_begin;
}

/* The parts (two at most) without their first bytes. */
static void skip(struct iovec *parts, size_t size)
{
    for (int i = 0; i < 2; i++) {
        const size_t here = size < parts[i].iov_len ? size : parts[i].iov_len;
        parts[i].iov_base = (char *)parts[i].iov_base + here;
        parts[i].iov_len -= here;
        size -= here;
    }
}

/*
 * By the thread that serves the session, without waiting. Writes as much of the parts as the peer takes, and moves
 * them on. True: all is written.
 */
static bool send_parts(struct connection *connection, int fd, struct iovec *parts)
{
    while (connection->error == 0 && parts[0].iov_len + parts[1].iov_len > 0) {
        const struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
        const ssize_t sent = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);

        if (sent >= 0)
            skip(parts, (size_t)sent);
        else if (errno == EAGAIN || errno == EWOULDBLOCK)
            return false;
        else if (errno != EINTR)
            connection->error = errno;
    }
    return connection->error == 0;
}

/* By the thread that serves the session. Writes the parts, and waits for a slow reader. False: error says why not. */
static bool send_all(struct connection *connection, int fd, struct iovec *parts)
{
    while (!send_parts(connection, fd, parts) && connection->error == 0) {
        struct pollfd writable = {fd, POLLOUT, 0};

        milter_hand_over();
        if (real_poll(&writable, 1, connection->timeout) == 0)
            connection->error = ETIMEDOUT;
    }
    return connection->error == 0;
}

static bool flush(struct connection *connection, int fd)
{
    if (connection->block == NULL)
        return connection->error == 0;
    struct iovec parts[2] = {{connection->block->output + connection->output_begin, gathered(connection)}, {NULL, 0}};
    const bool sent = send_all(connection, fd, parts);
    connection->output_begin = connection->output_end = 0;
    return sent;
}

/* Without waiting; and by the thread that closes it. */
static void push(struct connection *connection, int fd)
{
    if (connection->block == NULL)
        return;
    struct iovec parts[2] = {{connection->block->output + connection->output_begin, gathered(connection)}, {NULL, 0}};
    send_parts(connection, fd, parts);
    connection->output_begin = connection->output_end - (unsigned)parts[0].iov_len;
    if (parts[0].iov_len == 0)
        connection->output_begin = connection->output_end = 0;
}

/* By the thread that serves the session, or acts on it. The data is the caller's. False: the session is over. */
static bool put(struct connection *connection, int fd, char command, const char *data, size_t size)
{
    const uint32_t length = (uint32_t)size + 1;
    const char head[MILTER_HEAD] = {(char)(length >> 24), (char)(length >> 16), (char)(length >> 8), (char)length,
                                    command};
    struct iovec parts[2] = {{(void *)(uintptr_t)head, MILTER_HEAD}, {(void *)(uintptr_t)data, size}};

    if (take_block(connection) && MILTER_HEAD + size > OUTPUT - connection->output_end && !flush(connection, fd))
        return false;
    if (connection->block == NULL || MILTER_HEAD + size > OUTPUT)
        return send_all(connection, fd, parts);
    char *end = connection->block->output + connection->output_end;
    memcpy(end, head, MILTER_HEAD);
    if (size > 0)
        memcpy(end + MILTER_HEAD, data, size);
    connection->output_end += (unsigned)(MILTER_HEAD + size);
    return connection->error == 0;
}

/* ---- Reading ----------------------------------------------------------------------------- */

static size_t buffered(const struct connection *connection)
{
    return connection->input_end - connection->input_begin;
}

/* Takes as many bytes as are there from the block, `size` at most. Returns how many. */
static size_t take(struct connection *connection, char *place, size_t size)
{
    const size_t here = buffered(connection) < size ? buffered(connection) : size;

    if (here > 0)
        memcpy(place, connection->block->input + connection->input_begin, here);
    connection->input_begin += (unsigned)here;
    return here;
}

/* The head is here. libmilter counts in an int, and takes what is negative there for none. */
static void begin_packet(struct connection *connection)
{
    const unsigned char *head = connection->head;
    const uint32_t length = (uint32_t)head[0] << 24 | (uint32_t)head[1] << 16 | (uint32_t)head[2] << 8 | head[3];

    connection->command = (char)head[MILTER_HEAD - 1];
    connection->size = length > 0 && length - 1 <= INT32_MAX ? length - 1 : 0;
    connection->filled = 0;
    connection->stage = WITHIN;
    if (connection->size > atomic_load(&max_data_size))
        connection->failure = TOO_BIG;
    else if (connection->size > 0 && (connection->data = malloc(connection->size + 1)) == NULL)
        connection->failure = NO_MEMORY;
    if (connection->failure != 0)
        connection->size = 0;
}

/* Makes a packet of what is buffered. True: it is whole. */
static bool assemble(struct connection *connection)
{
    if (connection->stage == BETWEEN) {
        connection->filled += take(connection, (char *)connection->head + connection->filled,
                                   MILTER_HEAD - connection->filled);
        if (connection->filled == MILTER_HEAD)
            begin_packet(connection);
    }
    if (connection->stage == WITHIN) {
        if (connection->size > 0)
            connection->filled += take(connection, connection->data + connection->filled,
                                       connection->size - connection->filled);
        if (connection->filled == connection->size)
            connection->stage = WHOLE;
    }
    return connection->stage == WHOLE;
}

/*
 * By the thread that serves the session, when nothing is buffered: one recv into what is missing of the packet, its
 * head or its data, and behind that into the block, if there is memory for one. What it brings less than it may
 * was all there was, but for the end of the connection, which epoll has told of (scheduler.c).
 */
static void receive(struct connection *connection, int fd)
{
    const bool within = connection->stage == WITHIN;
    char *place = (within ? connection->data : (char *)connection->head) + connection->filled;
    const size_t missing = (within ? connection->size : MILTER_HEAD) - connection->filled;
    const bool buffers = take_block(connection);
    struct iovec parts[2] = {{place, missing}, {buffers ? connection->block->input : NULL, buffers ? INPUT : 0}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = buffers ? 2 : 1};
    const ssize_t received = recvmsg(fd, &message, MSG_DONTWAIT);

    if (received < 0) {
        connection->drained = errno == EAGAIN || errno == EWOULDBLOCK;
        if (!connection->drained && errno != EINTR) {
            connection->error = errno;
            connection->failure = READ_ERROR;
        }
        return;
    }
    const size_t here = (size_t)received < missing ? (size_t)received : missing;
    connection->ended = received == 0;
    connection->drained = (size_t)received < missing + parts[1].iov_len && !connection->ends;
    connection->filled += here;
    connection->input_begin = 0;
    connection->input_end = (unsigned)((size_t)received - here);
}

/* Is there something that libmilter should read, a packet or the end of the connection? Without the system. */
static bool has_news(struct connection *connection)
{
    return assemble(connection) || connection->ended || connection->error != 0;
}

void milter_look_again(struct connection *connection, bool ends)
{
    connection->ends = ends;
    connection->drained = connection->left = false;
}

/*
 * By the thread that serves the session, which libmilter's engine asks for the next packet without having called the
 * shim. It ignores what cannot follow the command before, and the MTA would wait for an answer until it takes the
 * filter for broken, and passes mail perhaps. Postfix does that after a message that it refused at its end
 * (smtpd_end_of_data_restrictions): whatever the client says then belongs to no message that the filter knows of.
 */
static void answer_ignored(struct connection *connection, int fd)
{
    if (connection->unheard)
        put(connection, fd, 't', NULL, 0); /* a temporary failure */
    connection->unheard = false;
}

/*
 * By the thread that serves the session, whose scheduler waits for what comes next. False: nothing has come, or
 * others should get on; all answers are written, and the block was given back.
 */
static bool next_is_here(struct connection *connection, int fd)
{
    answer_ignored(connection, fd);
    while (!has_news(connection)) {
        connection->left = !connection->drained && !milter_goes_on();
        if (!connection->drained && !connection->left) {
            receive(connection, fd);
            continue;
        }
        flush(connection, fd);
        if (connection->error != 0)
            return true;
        give_block_back(connection);
        if (connection->tcp)
            set_option(fd, TCP_QUICKACK);
        return false;
    }
    return true;
}

/* By libmilter's own thread for this session: waits for the next packet. 0, or what libmilter says in its place. */
static char wait_for_packet(struct connection *connection, int fd)
{
    answer_ignored(connection, fd);
    while (!has_news(connection)) {
        struct pollfd readable = {fd, POLLIN, 0};

        receive(connection, fd);
        if (!connection->drained || has_news(connection))
            continue;
        flush(connection, fd);
        give_block_back(connection);
        if (connection->tcp)
            set_option(fd, TCP_QUICKACK);
        if (connection->error == 0 && real_poll(&readable, 1, connection->timeout) == 0)
            return TIMED_OUT;
    }
    if (connection->stage == WHOLE || connection->failure != 0)
        return connection->failure;
    return connection->error != 0 ? WRITE_ERROR : PEER_ENDED;
}

/* ---- For the shim: see packets.h ----------------------------------------------------------- */

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
    struct connection *connection = milter_connection(fd);

    if (connection != NULL)
        snprintf(connection->due, sizeof connection->due, "%s", letters);
}

void milter_io_heard(int fd)
{
    struct connection *connection = milter_connection(fd);

    if (connection != NULL)
        connection->unheard = false;
}

bool milter_io_flush(int fd)
{
    struct connection *connection = milter_connection(fd);
    return connection == NULL || flush(connection, fd);
}

int milter_io_push(int fd)
{
    struct connection *connection = milter_connection(fd);

    if (connection == NULL)
        return 1;
    push(connection, fd);
    if (connection->error != 0)
        return -1;
    return gathered(connection) == 0;
}

void milter_io_limit(size_t size)
{
    atomic_store(&max_data_size, size);
}

/* ---- What libmilter calls ------------------------------------------------------------------ */

static int milliseconds(const struct timeval *timeout)
{
    return timeout != NULL ? (int)(timeout->tv_sec * 1000 + timeout->tv_usec / 1000) : -1;
}

/* The data is libmilter's, which frees it. An end and an error: NULL, and a letter that says which. */
char *ours_mi_rd_cmd(int sd, struct timeval *timeout, char *command, size_t *size, char *name)
{
    struct connection *connection = milter_connection(sd);

    if (connection == NULL)
        return real_mi_rd_cmd(sd, timeout, command, size, name);
    *size = 0;
    connection->timeout = milliseconds(timeout);
    *command = wait_for_packet(connection, sd);
    if (*command == READ_ERROR)
        milter_log(LOG_ERR, "%s, mi_rd_cmd: read returned -1: %s", name, strerror(connection->error));
    if (*command != 0)
        return NULL;

    char *data = connection->data;
    *command = connection->command;
    *size = connection->size;
    connection->data = NULL;
    connection->filled = 0;
    connection->stage = BETWEEN;
    if (data != NULL)
        data[*size] = '\0'; /* libmilter reads on where an MTA forgot it */
    if (*command == 'C' && data != NULL)
        milter_mend_client(data, *size);
    connection->unheard = *command != '\0' && strchr(connection->due, *command) != NULL;
    last_read.fd = sd;
    last_read.command = *command;
    last_read.end = data != NULL ? data + *size : NULL;
    return data;
}

/* The data is the caller's. By the thread that serves the session, or one that acts on it. */
int ours_mi_wr_cmd(int sd, struct timeval *timeout, int command, char *data, size_t size)
{
    struct connection *connection = milter_connection(sd);

    if (connection == NULL)
        return real_mi_wr_cmd(sd, timeout, command, data, size);
    if (size > atomic_load(&max_data_size) || (size > 0 && data == NULL))
        return MI_FAILURE;
    connection->timeout = milliseconds(timeout);
    return put(connection, sd, (char)command, data, size) ? MI_SUCCESS : MI_FAILURE;
}

/* libmilter's engine asks for one connection whether a command has come; its listener waits for the next one. */
int ours_poll(struct pollfd *fds, nfds_t count, int timeout)
{
    struct connection *connection = count == 1 ? milter_connection(fds->fd) : NULL;

    if (connection == NULL)
        return real_poll(fds, count, timeout);
    const bool here = next_is_here(connection, fds->fd);
    fds->revents = here ? POLLIN : 0;
    return here;
}

int ours___poll_chk(struct pollfd *fds, nfds_t count, int timeout, size_t size)
{
    if (size / sizeof *fds < count)
        abort();
    return ours_poll(fds, count, timeout);
}

/* The entry is left before the descriptor is, which may be another connection's at once. */
int ours_close(int fd)
{
    struct connection *connection = milter_connection(fd);

    if (connection != NULL) {
        push(connection, fd);
        milter_unwatch(fd);
        clear(connection);
        atomic_store(&connection->open, false);
    }
    return real_close(fd);
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

void milter_io_limit(size_t size)
{
    (void)size;
}

#endif
