/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * io.c under stress, without libmilter: a stand-in that reads, writes and hands
 * over sessions as libmilter's pool of workers does, and clients that count
 * every byte.
 *
 *   io_stress seconds [clients [seed [faults]]]
 *
 *   faults=1: memory runs out now and then, and system calls are interrupted or do less than they could
 *
 * The stand-in calls poll, read, writev and the others by their names; the linker
 * redirects them, as it does with libmilter's. So each packet that a client sends
 * passes io.c twice. A packet is a length (32 bits), and that many bytes:
 *
 *   kind     r answer, n no answer, p answer while another thread sends progress, q the end
 *   size     32 bits, of the answer's filling
 *   number   32 bits, of the packet in its connection
 *   place    16 bits, in a table where the client notes what it has read
 *   filling  bytes that follow from the number
 *
 * What is checked, by the stand-in (S), by the clients (C) and at the end (E):
 *   S  packets come in order, and each byte is what it must be
 *   S  a descriptor is that of the session, as milter_io_descriptor has it
 *   C  answers come in order, with progress only where it was asked for, and each byte is what it must be
 *   C  an answer comes although nothing more is sent, and before a progress packet's work is done (else: a hang)
 *   E  each session ended, the queue is empty, and no block is lost
 *   E  a line for the log goes to the pipe in one piece, or to the system's log if the pipe is full
 *
 * Clients also stop in the middle of a packet, vanish, and read late.
 */
#define _GNU_SOURCE
#include "../../../milter/shim/io.c"

int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument);

#include <fcntl.h>
#include <signal.h>
#include <sys/un.h>

/* child.c has it called; here is no Python. */
struct milter_event;
int milter_python_enter(struct milter_event *event);
int milter_python_enter(struct milter_event *event)
{
    (void)event;
    return 0;
}

enum { WORKERS = 3, MOST_WORKERS = 64, CONNECTIONS = 512, LARGE = 150000, PATIENCE_MS = 60000, HEAD = 11 };
enum { PLACES = 1 << 16, GONE = UINT_MAX };

static atomic_bool stop_clients, stop_all;
static atomic_uint violations, open_sessions;
static atomic_ulong packets, answers, sessions_served, vanished, faults_made;
static atomic_uint progress_read[PLACES]; /* by place: 1 + the number of the packet, once its progress has come */
static atomic_uint places;
static bool with_faults;
static char path[64];

static void violation(const char *format, ...)
{
    char text[256];
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (atomic_fetch_add(&violations, 1) < 20)
        fprintf(stderr, "VIOLATION %s\n", text);
}

static _Thread_local uint64_t random_state;
static atomic_ulong seeds;

static unsigned chance(unsigned n) /* 0 ... n-1 */
{
    if (random_state == 0)
        random_state = (atomic_fetch_add(&seeds, 1) + 1) * 0x9E3779B97F4A7C15u;
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (unsigned)(random_state >> 33) % n;
}

static unsigned char filling(uint32_t number, size_t place)
{
    return (unsigned char)(number * 31 + place * 7 + (place >> 8));
}

static bool fault(void)
{
    if (!with_faults || chance(16) != 0)
        return false;
    atomic_fetch_add(&faults_made, 1);
    return true;
}

/* ---- Faults: io.c calls these, and nobody else does ---------------------------------------- */

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
ssize_t __real_sendmsg(int fd, const struct msghdr *message, int flags);
ssize_t __real_recvmsg(int fd, struct msghdr *message, int flags);

void *__wrap_malloc(size_t size)
{
    return size == sizeof(struct block) && fault() ? NULL : __real_malloc(size);
}

void *__wrap_calloc(size_t count, size_t size)
{
    return size == sizeof(struct connection) && fault() ? NULL : __real_calloc(count, size);
}

ssize_t __wrap_sendmsg(int fd, const struct msghdr *message, int flags)
{
    if (fault()) {
        errno = EINTR;
        return -1;
    }
    size_t first = 0; /* what was sent already leaves an empty part */
    while (first < (size_t)message->msg_iovlen && message->msg_iov[first].iov_len == 0)
        first++;
    if (first < (size_t)message->msg_iovlen && fault()) { /* a byte less than the first part, or one */
        struct iovec part = message->msg_iov[first];
        part.iov_len = part.iov_len > 1 ? part.iov_len - 1 : 1;
        const struct msghdr less = {.msg_iov = &part, .msg_iovlen = 1};
        return __real_sendmsg(fd, &less, flags);
    }
    return __real_sendmsg(fd, message, flags);
}

ssize_t __wrap_recvmsg(int fd, struct msghdr *message, int flags)
{
    if (fault()) {
        errno = EINTR;
        return -1;
    }
    if (fault()) {
        struct iovec part = {message->msg_iov[0].iov_base, 1 + chance((unsigned)message->msg_iov[0].iov_len)};
        struct msghdr less = {.msg_iov = &part, .msg_iovlen = 1};
        return __real_recvmsg(fd, &less, flags);
    }
    return __real_recvmsg(fd, message, flags);
}

/* ---- The stand-in: sessions ---------------------------------------------------------------- */

enum state { FREE, READY, RUNNING, LEFT, WAITING };

struct session {
    enum state state; /* under lock */
    int fd;
    uint32_t next; /* number of the packet that must come */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work = PTHREAD_COND_INITIALIZER;
static struct session sessions[CONNECTIONS];
static int workers_idle, workers_all, wake_pipe[2];

static void put16(unsigned char *where, unsigned value)
{
    where[0] = (unsigned char)(value >> 8);
    where[1] = (unsigned char)value;
}

static void put32(unsigned char *where, uint32_t value)
{
    for (int i = 0; i < 4; i++)
        where[i] = (unsigned char)(value >> (24 - 8 * i));
}

static uint32_t get32(const unsigned char *where)
{
    return (uint32_t)where[0] << 24 | (uint32_t)where[1] << 16 | (uint32_t)where[2] << 8 | where[3];
}

/* As libmilter reads: poll before each read. 1, 0 for the end of the connection. */
static int read_all(int fd, unsigned char *buffer, size_t size)
{
    while (size > 0) {
        struct pollfd readable = {fd, POLLIN | POLLPRI, 0};
        const int ready = poll(&readable, 1, PATIENCE_MS);
        if (ready < 0 && errno == EINTR)
            continue;
        if (ready <= 0 || (readable.revents & (POLLERR | POLLHUP | POLLNVAL)) != 0)
            return 0;
        const ssize_t got = read(fd, buffer, size);
        if (got <= 0)
            return 0;
        buffer += got;
        size -= (size_t)got;
    }
    return 1;
}

/* As libmilter writes: poll before each writev, a head and a body. */
static int write_all(int fd, unsigned char *head, size_t head_size, unsigned char *body, size_t body_size)
{
    struct iovec parts[2] = {{head, head_size}, {body, body_size}};

    while (parts[0].iov_len + parts[1].iov_len > 0) {
        struct pollfd writable = {fd, POLLOUT, 0};
        const int ready = poll(&writable, 1, PATIENCE_MS);
        if (ready == 0 || (ready < 0 && errno != EINTR))
            return 0;
        if (ready < 0)
            continue;
        ssize_t sent = writev(fd, parts, 2);
        if (sent < 0 && errno != EINTR && errno != EAGAIN)
            return 0;
        for (int i = 0; i < 2 && sent > 0; i++) {
            const size_t part = (size_t)sent < parts[i].iov_len ? (size_t)sent : parts[i].iov_len;
            parts[i].iov_base = (char *)parts[i].iov_base + part;
            parts[i].iov_len -= part;
            sent -= (ssize_t)part;
        }
    }
    return 1;
}

static int answer(int fd, char kind, uint32_t number, uint32_t size)
{
    unsigned char head[4 + HEAD], *body = __real_malloc(size + 1);

    put32(head, HEAD + size);
    head[4] = (unsigned char)kind;
    put32(head + 5, size);
    put32(head + 9, number);
    put16(head + 13, 0);
    for (uint32_t i = 0; i < size; i++)
        body[i] = filling(number, i);
    const int written = write_all(fd, head, sizeof head, body, size);
    free(body);
    return written;
}

struct progress {
    pthread_mutex_t lock;
    int fd, failed;
    uint32_t number;
};

/* Another thread of a handler, under the session's lock, while the serving thread waits for it. */
static void *send_progress(void *argument)
{
    struct progress *progress = argument;

    pthread_mutex_lock(&progress->lock);
    progress->failed = !answer(progress->fd, 'P', progress->number, 0) || !milter_io_flush(progress->fd);
    pthread_mutex_unlock(&progress->lock);
    return NULL;
}

/* The handler goes on once the client has read what was sent until now, or is gone. */
static void wait_for_client(uint32_t number, unsigned place)
{
    for (int i = 0; i < PATIENCE_MS; i++) {
        const unsigned read = atomic_load(&progress_read[place]);
        if (read == GONE || read > number)
            return;
        usleep(1000);
    }
    violation("progress does not arrive");
}

static int answer_with_progress(int fd, uint32_t number, uint32_t size, unsigned place)
{
    struct progress progress = {PTHREAD_MUTEX_INITIALIZER, fd, 0, number};
    pthread_t thread;

    milter_io_flush(fd); /* as before each entry into Python */
    if (__real_pthread_create(&thread, NULL, send_progress, &progress) != 0)
        return 0;
    pthread_mutex_lock(&progress.lock);
    const int written = answer(fd, 'Q', number, 0); /* an action of the handler itself */
    pthread_mutex_unlock(&progress.lock);
    pthread_join(thread, NULL);
    milter_io_flush(fd); /* as before the next entry into Python */
    wait_for_client(number, place);
    return written && !progress.failed && answer(fd, 'A', number, size);
}

/* One packet of a session. 0: the session is over. */
static int serve_packet(struct session *session)
{
    unsigned char head[4 + HEAD], *body;

    if (!read_all(session->fd, head, 5)) /* as libmilter: length and kind, then the rest */
        return 0;
    const uint32_t size = get32(head) - HEAD;
    if (size > LARGE || !read_all(session->fd, head + 5, HEAD - 1)) {
        if (size > LARGE)
            violation("a packet of %u bytes: the stream is out of step", size);
        return 0;
    }
    body = __real_malloc(size + 1);
    if (size > 0 && !read_all(session->fd, body, size)) {
        free(body);
        return 0;
    }
    const int descriptor = milter_io_descriptor();
    if (descriptor != session->fd)
        violation("the descriptor is %d, not %d", descriptor, session->fd);
    const uint32_t number = get32(head + 9), wanted = get32(head + 5);
    if (number != session->next++)
        violation("packet %u instead of %u", number, session->next - 1);
    for (uint32_t i = 0; i < size; i++)
        if (body[i] != filling(number, i)) {
            violation("byte %u of packet %u is wrong", i, number);
            break;
        }
    free(body);
    atomic_fetch_add(&packets, 1);
    switch (head[4]) {
    case 'r':
        return answer(session->fd, 'A', number, wanted);
    case 'p':
        return answer_with_progress(session->fd, number, wanted, (unsigned)head[13] << 8 | head[14]);
    case 'n':
        return 1;
    case 'q':
        return 0;
    default:
        violation("a packet of kind %d", head[4]);
        return 0;
    }
}

/* As libmilter: go on while the next packet comes within a millisecond. */
static bool serve(struct session *session)
{
    for (;;) {
        struct pollfd readable = {session->fd, POLLIN, 0};
        int ready;

        do
            ready = poll(&readable, 1, 1);
        while (ready < 0 && errno == EINTR);
        if (ready == 0)
            return true;
        if (!serve_packet(session))
            return false;
    }
}

/* ---- The stand-in: workers, controller, listener ------------------------------------------- */

static struct session *ready_session(void)
{
    for (int i = 0; i < CONNECTIONS; i++)
        if (sessions[i].state == READY) {
            sessions[i].state = RUNNING;
            return &sessions[i];
        }
    return NULL;
}

static void wake_controller(void)
{
    if (write(wake_pipe[1], "", 1) != 1 && errno != EAGAIN)
        violation("the pipe: %s", strerror(errno));
}

static void *work_on(void *argument)
{
    struct session *session = argument;

    pthread_detach(pthread_self());
    pthread_mutex_lock(&lock);
    workers_all++;
    while (!atomic_load(&stop_all)) {
        if (session == NULL)
            session = ready_session();
        if (session == NULL) {
            if (workers_all > WORKERS && workers_idle > 1)
                break;
            workers_idle++;
            pthread_cond_wait(&work, &lock);
            workers_idle--;
            continue;
        }
        pthread_mutex_unlock(&lock);
        const bool waits = serve(session);
        if (!waits && chance(2) == 0)
            milter_io_flush(session->fd); /* as the shim does when a session ends */
        pthread_mutex_lock(&lock);
        if (waits) {
            session->state = LEFT;
            wake_controller();
        } else {
            close(session->fd);
            session->state = FREE;
            atomic_fetch_sub(&open_sessions, 1);
            atomic_fetch_add(&sessions_served, 1);
        }
        session = NULL;
    }
    workers_all--;
    pthread_mutex_unlock(&lock);
    return NULL;
}

/* Under the lock. */
static void dispatch_session(struct session *session)
{
    pthread_t thread;

    if (workers_idle > 0) {
        session->state = READY;
        pthread_cond_signal(&work);
    } else {
        session->state = RUNNING;
        if (pthread_create(&thread, NULL, work_on, session) != 0)
            violation("no thread");
    }
}

static void *control(void *unused)
{
    struct pollfd fds[CONNECTIONS + 1];

    while (!atomic_load(&stop_all)) {
        nfds_t count = 1;

        fds[0] = (struct pollfd){wake_pipe[0], POLLIN | POLLPRI, 0};
        pthread_mutex_lock(&lock);
        for (int i = 0; i < CONNECTIONS; i++)
            if (sessions[i].state == LEFT || sessions[i].state == WAITING) {
                sessions[i].state = WAITING;
                fds[count++] = (struct pollfd){sessions[i].fd, POLLIN | POLLPRI, 0};
            }
        pthread_mutex_unlock(&lock);
        if (poll(fds, count, 100) <= 0)
            continue;
        if (fds[0].revents != 0) {
            char bytes[64];
            while (read(wake_pipe[0], bytes, sizeof bytes) > 0)
                continue;
        }
        pthread_mutex_lock(&lock);
        for (nfds_t n = 1; n < count; n++)
            for (int i = 0; fds[n].revents != 0 && i < CONNECTIONS; i++)
                if (sessions[i].state == WAITING && sessions[i].fd == fds[n].fd) {
                    dispatch_session(&sessions[i]);
                    break;
                }
        pthread_mutex_unlock(&lock);
    }
    return unused;
}

static void *listen_for(void *argument)
{
    const int listener = *(int *)argument;
    pthread_t thread;

    pthread_create(&thread, NULL, control, NULL);
    pthread_detach(thread);
    for (int i = 0; i < WORKERS; i++)
        pthread_create(&thread, NULL, work_on, NULL);
    while (!atomic_load(&stop_all)) {
        struct pollfd readable = {listener, POLLIN, 0};
        if (poll(&readable, 1, 100) <= 0)
            continue;
        struct sockaddr_un address;
        socklen_t size = sizeof address;
        const int fd = accept(listener, (struct sockaddr *)&address, &size);
        if (fd < 0)
            continue;
        pthread_mutex_lock(&lock);
        int i = 0;
        while (i < CONNECTIONS && sessions[i].state != FREE)
            i++;
        if (i == CONNECTIONS) {
            close(fd);
        } else {
            atomic_fetch_add(&open_sessions, 1);
            sessions[i] = (struct session){FREE, fd, 0};
            dispatch_session(&sessions[i]);
        }
        pthread_mutex_unlock(&lock);
    }
    return NULL;
}

/* ---- Clients: nothing here is redirected, since it uses send and recv ---------------------- */

struct client {
    int fd;
    unsigned place;
    uint32_t sent;                /* packets */
    uint32_t owed[4096][2];       /* number and size of the answers that must come; a ring */
    unsigned char progress[4096]; /* of each: progress was asked for */
    unsigned first, last;
};

static bool put_bytes(struct client *client, const unsigned char *bytes, size_t size)
{
    while (size > 0) {
        const size_t part = chance(4) == 0 ? 1 + chance((unsigned)size) : size;
        const ssize_t sent = send(client->fd, bytes, part, MSG_NOSIGNAL);
        if (sent < 0)
            return false;
        bytes += sent;
        size -= (size_t)sent;
    }
    return true;
}

static void make_packet(struct client *client, unsigned char *packet, char kind, uint32_t size, uint32_t wanted)
{
    put32(packet, HEAD + size);
    packet[4] = (unsigned char)kind;
    put32(packet + 5, wanted);
    put32(packet + 9, client->sent);
    put16(packet + 13, client->place);
    for (uint32_t i = 0; i < size; i++)
        packet[4 + HEAD + i] = filling(client->sent, i);
    if (kind == 'r' || kind == 'p') {
        client->owed[client->last % 4096][0] = client->sent;
        client->owed[client->last % 4096][1] = wanted;
        client->progress[client->last++ % 4096] = kind == 'p';
    }
    client->sent++;
}

static bool get_bytes(struct client *client, unsigned char *bytes, size_t size)
{
    while (size > 0) {
        struct pollfd readable = {client->fd, POLLIN, 0};
        const int ready = __real_poll(&readable, 1, PATIENCE_MS);
        if (ready < 0 && errno == EINTR)
            continue;
        const ssize_t got = ready > 0 ? recv(client->fd, bytes, size, 0) : 0;
        if (got <= 0) {
            violation(ready == 0 ? "no answer: a hang" : "the connection ended before its answer (%s)", strerror(errno));
            return false;
        }
        bytes += got;
        size -= (size_t)got;
    }
    return true;
}

/* The next answer, and what comes before it. */
static bool get_answer(struct client *client, unsigned char *body)
{
    const uint32_t number = client->owed[client->first % 4096][0], size = client->owed[client->first % 4096][1];
    const bool progress = client->progress[client->first++ % 4096];
    unsigned asides = 0;

    for (;;) {
        unsigned char head[4 + HEAD];
        if (!get_bytes(client, head, sizeof head))
            return false;
        if (progress && (head[4] == 'P' || head[4] == 'Q') && get32(head) == HEAD && get32(head + 9) == number) {
            if (++asides == 2)
                atomic_store(&progress_read[client->place], number + 1);
            continue;
        }
        if (head[4] != 'A' || get32(head) != HEAD + size || get32(head + 9) != number) {
            violation("answer %c %u of %u bytes, not A %u", head[4], get32(head + 9), get32(head), number);
            return false;
        }
        if (asides != (progress ? 2u : 0u))
            violation("%u packets before the answer", asides);
        if (!get_bytes(client, body, size))
            return false;
        for (uint32_t i = 0; i < size; i++)
            if (body[i] != filling(number, i)) {
                violation("byte %u of answer %u is wrong", i, number);
                return false;
            }
        atomic_fetch_add(&answers, 1);
        return true;
    }
}

/* Some packets in one piece, perhaps the last one; then their answers. False: the connection is over. */
static bool converse(struct client *client, unsigned char *room, unsigned char *body)
{
    static const uint32_t sizes[] = {0, 0, 1, 20, 60, 100, 4000, 16384 - 13, 16384, 65535, LARGE};
    size_t size = 0;
    const unsigned burst = 1 + chance(chance(8) == 0 ? 60 : 4);

    for (unsigned i = 0; i < burst; i++) {
        const uint32_t filled = sizes[chance(chance(4) == 0 ? 11 : 6)];
        /* A client that sends and does not read must not ask for more than the sockets hold. */
        const uint32_t wanted = burst > 4 ? chance(40) : sizes[chance(chance(8) == 0 ? 11 : 5)];
        if (size + filled + 4 + HEAD > 2 * LARGE)
            break;
        /* Progress is waited for, and so the last thing: the client reads only when all is sent. */
        const char kind = i == burst - 1 && chance(4) == 0 ? 'p' : "rnn"[chance(3)];
        make_packet(client, room + size, kind, filled, burst > 1 ? wanted % 4000 : wanted);
        size += 4 + HEAD + filled;
    }
    const bool last = chance(20) == 0;
    if (last) {
        make_packet(client, room + size, 'q', 0, 0);
        size += 4 + HEAD;
    }
    if (chance(200) == 0) { /* gone in the middle of it */
        put_bytes(client, room, chance((unsigned)size));
        atomic_fetch_add(&vanished, 1);
        return false;
    }
    if (!put_bytes(client, room, size)) {
        violation("the connection ended while packets were sent (%s)", strerror(errno));
        return false;
    }
    if (chance(8) == 0)
        usleep(chance(4000));
    while (client->first != client->last)
        if (!get_answer(client, body))
            return false;
    return !last;
}

static void *be_client(void *unused)
{
    unsigned char *room = __real_malloc(3 * LARGE), *body = __real_malloc(LARGE + 1);
    struct client *client = __real_malloc(sizeof *client);

    while (!atomic_load(&stop_clients)) {
        struct sockaddr_un address = {.sun_family = AF_UNIX};
        memcpy(address.sun_path, path, sizeof path);
        memset(client, 0, sizeof *client);
        client->place = atomic_fetch_add(&places, 1) % PLACES;
        atomic_store(&progress_read[client->place], 0);
        client->fd = socket(AF_UNIX, SOCK_STREAM, 0);
        if (client->fd < 0 || connect(client->fd, (struct sockaddr *)&address, sizeof address) != 0) {
            violation("no connection: %s", strerror(errno));
            break;
        }
        while (converse(client, room, body) && !atomic_load(&stop_clients))
            continue;
        __real_close(client->fd);
        atomic_store(&progress_read[client->place], GONE);
    }
    free(client);
    free(body);
    free(room);
    return unused;
}

/* ---- The log -------------------------------------------------------------------------------- */

static unsigned system_log; /* lines that went there */

void __wrap_vsyslog(int priority, const char *format, va_list arguments)
{
    char text[2 * PIPE_BUF];

    vsnprintf(text, sizeof text, format, arguments);
    if (priority != LOG_ERR || strspn(text, "x") != strlen(text))
        violation("to the system's log: %d %.20s", priority, text);
    system_log++;
}

/* A line of so many letters, as libmilter writes it. */
static void log_letters(int size)
{
    char letters[2 * PIPE_BUF];

    memset(letters, 'x', (size_t)size);
    letters[size] = '\0';
    errno = EBADMSG;
    syslog(LOG_ERR, "%s", letters);
    if (errno != EBADMSG)
        violation("errno is %d after a log line", errno);
}

static void expect_line(int fd, const char *begin, size_t size)
{
    char line[2 * PIPE_BUF];
    const ssize_t got = __real_read(fd, line, sizeof line);

    if (got != (ssize_t)size || strncmp(line, begin, strlen(begin)) != 0 || line[got - 1] != '\n' ||
        memchr(line, '\n', (size_t)got) != line + got - 1)
        violation("a line of %zd bytes, not %zu: %.20s", got, size, line);
}

static void check_log(void)
{
    int ends[2];

    log_letters(5);
    if (system_log != 1 || pipe(ends) != 0 || fcntl(ends[1], F_SETFL, O_NONBLOCK) != 0)
        violation("a line without a pipe goes to the system's log");
    if (milter_io_log_to(ends[1]) != -1)
        violation("there was a pipe before");
    syslog(LOG_WARNING, "one\ntwo %d", 3);
    expect_line(ends[0], "<4>one two 3\n", 13);
    log_letters(3 * PIPE_BUF / 2);
    expect_line(ends[0], "<3>xxx", PIPE_BUF);
    for (int i = 0; i < 1000 && system_log == 1; i++)
        log_letters(1000);
    if (system_log != 2)
        violation("a line that the pipe does not take goes to the system's log");
    char lines[2 * PIPE_BUF];
    if (__real_read(ends[0], lines, sizeof lines) != sizeof lines)
        violation("the pipe is full of lines");
    log_letters(1000);
    if (milter_io_log_to(-1) != ends[1] || system_log != 2)
        violation("the pipe has room again");
    log_letters(7);
    if (system_log != 3)
        violation("the pipe was given up");
}

/* Signals without SA_RESTART, to whichever thread, so that polls are interrupted. */
static void interrupted(int number)
{
    (void)number;
}

int main(int argc, char **argv)
{
    const double seconds = argc > 1 ? atof(argv[1]) : 5;
    const int clients = argc > 2 ? atoi(argv[2]) : 8;
    pthread_t listener_thread, client_threads[CONNECTIONS];
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int listener;

    atomic_store(&seeds, argc > 3 ? strtoul(argv[3], NULL, 10) * 1000 : 0);
    with_faults = argc > 4 && atoi(argv[4]) != 0;
    signal(SIGPIPE, SIG_IGN);
    sigaction(SIGUSR1, &(struct sigaction){.sa_handler = interrupted}, NULL);
    if (!milter_io_wrapped()) {
        fprintf(stderr, "the linker did not redirect all of: %s\n", milter_io_symbols());
        return 1;
    }
    check_log();
    snprintf(path, sizeof path, "/tmp/io-stress.%d", (int)getpid());
    memcpy(address.sun_path, path, sizeof path);
    listener = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) != 0 || listen(listener, 128) != 0 ||
        pipe(wake_pipe) != 0 || fcntl(wake_pipe[0], F_SETFL, O_NONBLOCK) != 0 ||
        fcntl(wake_pipe[1], F_SETFL, O_NONBLOCK) != 0) {
        perror(path);
        return 1;
    }
    __real_pthread_create(&listener_thread, NULL, listen_for, &listener);
    for (int i = 0; i < clients; i++)
        __real_pthread_create(&client_threads[i], NULL, be_client, NULL);
    for (int i = 0; i < (int)(seconds * 1000); i++) {
        usleep(1000);
        if (with_faults)
            kill(getpid(), SIGUSR1);
    }
    atomic_store(&stop_clients, true);
    for (int i = 0; i < clients; i++)
        pthread_join(client_threads[i], NULL);
    for (int i = 0; i < PATIENCE_MS && atomic_load(&open_sessions) > 0; i++)
        usleep(1000);
    if (atomic_load(&open_sessions) > 0)
        violation("%u sessions never end", atomic_load(&open_sessions));
    if (atomic_load(&queue_length) != 0)
        violation("%u sessions in the queue, and there are none", atomic_load(&queue_length));
    for (int i = 0; i < CHUNKS; i++)
        for (int n = 0; table[i] != NULL && n < CHUNK; n++)
            if (table[i][n].open || table[i][n].queued || table[i][n].block != NULL)
                violation("descriptor %d was left open", i * CHUNK + n);
    if (free_count > BLOCKS_KEPT)
        violation("%u blocks are kept", free_count);
    atomic_store(&stop_all, true);
    pthread_join(listener_thread, NULL);
    unlink(path);
    printf("%lu packets, %lu answers, %lu sessions, %lu vanished, %lu faults, %u violations\n", atomic_load(&packets),
           atomic_load(&answers), atomic_load(&sessions_served), atomic_load(&vanished), atomic_load(&faults_made),
           atomic_load(&violations));
    fflush(stdout);
    _exit(atomic_load(&violations) > 0 || atomic_load(&answers) == 0);
}
