/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The shim under stress, without Python: real libmilter, clients that keep the
 * protocol and clients that do not, and a stand-in for Python that fails, sleeps,
 * lies in wait with old contexts, and checks what it is told.
 *
 *   stress seconds [clients [seed [faults [terminated [idle]]]]]
 *
 *   faults=1: memory runs out now and then; terminated=1: no garbage without a final NUL;
 *   idle=1: connections pause longer than libmilter's time-out (needs a libmilter that looks every second)
 *
 * Each client writes down what it sends (a transcript for each connection and each
 * message), so that the stand-in can compare. What is checked, by the stand-in (S), by the
 * clients (C), and whenever the clients pause (P):
 *
 *   S  a log parses to its last byte, and tells what the client sent: in order, complete, byte for byte
 *   S  a gathered message is what the client sent, in memory up to the spool size, else in a file without
 *      a name; or an error is told, and only where there was one
 *   S  at most one abort for a message, and none after its decision
 *   S  nothing enters without a reason that the plan knows, and nothing after the gate was closed
 *      and the last handler had returned
 *   S  the end of a connection is told once: by an entry, or by milter_take_ended
 *   S  a context acts only while its call goes on
 *   C  an answer comes exactly where one was agreed (a missing one is a hang)
 *   C  a message is accepted or discarded only by a verdict of the stand-in, and never once something failed
 *   C  the changes that the stand-in left arrive, all of them, in their order
 *   C  events that were deferred have been told when the message, or the connection, is over
 *   C  a reply's text belongs to the message that is refused
 *   C  nothing stands between two parts of a new body
 *   P  no session is open, no connection untold, no memory kept, no descriptor left
 *
 * At the end, each of the ways that are to be tried has been tried.
 */
#define _GNU_SOURCE
#include "milter_shim.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum {
    CONVERSATIONS = 1 << 16,
    MESSAGES = 1 << 22,
    FIRST_NUMBER = 1000, /* of messages and connections; garbage has lower ones */
    CLIENTS = 64,        /* at most; the numbers of each are its own, modulo this */
    REMEMBERED = 64,     /* messages and connections of one client */
    CONTEXTS = 512,
    LATE_THREADS = 3,
    PATIENCE = 60000,
    RUNS = 1 << 14,
    LOG_FULL = 64 * 1024, /* of the shim */
    PACKET = 65535,
    MOST_SESSIONS = 256 + CLIENTS * 8, /* as many ends may wait to be told, and some connections be open */
    POOL = 1 << 18
};
enum { FAILED = 1, ACCEPTED = 2, DISCARDED = 4, PASSED = 8, BLIND = 16 }; /* of a message */

/* What is to be tried at least once. */
enum way {
    BATCHES,
    FULL_LOGS,
    IN_MEMORY,
    IN_FILE,
    CONTENT_LOST,
    FEW_CHANGES,
    MANY_CHANGES,
    BAD_CHANGES,
    ENDED_QUIETLY,
    ENDED_HELD,
    ENDED_DEFERRED,
    ENDED_ENOUGH,
    ABORTED,
    PAUSES,
    WAYS
};
static const char *const way_names[WAYS] = {
    "batches",      "full logs",   "gathered in memory", "in a file", "contents lost",  "few changes", "many changes",
    "bad changes",  "quiet ends",  "held ends",          "deferred ends", "many ends",  "aborts",      "pauses",
};
static atomic_ulong ways[WAYS];

/* One run of the filter. */
struct run {
    struct milter_run *run;
    struct milter_plan plan;
    bool sound;            /* the directory for long messages is there */
    bool bodies_left;      /* new bodies are left as changes; else handlers send them */
    bool quiet;            /* only whole messages are wanted; the stand-in keeps nothing, and never fails */
    bool seldom;           /* only negotiations are wanted */
    bool observing;        /* all handlers observe */
    atomic_bool ending;    /* the gate is about to be closed */
    atomic_bool gone;      /* nothing may enter */
};
static struct run runs[RUNS];
static atomic_int current_app;

static atomic_bool stop_clients, stop_all, pause_clients;
static atomic_int pausing;
static atomic_uint violations, hangs;
static atomic_ulong messages, connections;
static atomic_ulong entries, late_done, late_expired, passed, refused, cut, timeouts;
static atomic_uchar fate[MESSAGES]; /* by the number of the message */
static bool with_faults, idle, terminated; /* terminated: garbage ends with NUL, as libmilter takes for granted */
static char path[64], spool_directory[64];
static char pool[POOL]; /* bytes for bodies */

static void violation(const char *format, ...)
{
    va_list arguments;
    char text[512];

    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (atomic_fetch_add(&violations, 1) < 20)
        fprintf(stderr, "VIOLATION %s\n", text);
}

static void tried(enum way way)
{
    atomic_fetch_add(&ways[way], 1);
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

static void nap(unsigned microseconds)
{
    const struct timespec pause = {0, microseconds * 1000L};
    nanosleep(&pause, NULL);
}

/* Until then, or until enough has gone wrong. */
static void seconds(double s)
{
    while (s > 0 && atomic_load(&violations) < 20) {
        nap(10000);
        s -= 0.01;
    }
}

/* ---- Memory and disks that run out: the linker sends the shim's calls here (--wrap) ------- */

void *__real_malloc(size_t);
void *__real_realloc(void *, size_t);
void *__real_calloc(size_t, size_t);
void __real_free(void *);
int __real_open(const char *, int, ...);
ssize_t __real_write(int, const void *, size_t);
void *__wrap_malloc(size_t size);
void *__wrap_realloc(void *old, size_t size);
void *__wrap_calloc(size_t n, size_t size);
void __wrap_free(void *memory);
int __wrap_open(const char *name, int flags, ...);
ssize_t __wrap_write(int file, const void *bytes, size_t size);

static atomic_ulong faults, disk_faults, disk_faults_told;
static atomic_long kept; /* allocations of the shim that grow and go */
static atomic_long stay; /* sessions and runs */

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

/* Bytes that grow: the stress's own, which no fault concerns. */
struct bytes {
    char *at;
    size_t size, room;
};

static void add(struct bytes *bytes, const void *more, size_t size)
{
    if (bytes->size + size > bytes->room) {
        bytes->room = 2 * (bytes->size + size);
        bytes->at = __real_realloc(bytes->at, bytes->room);
    }
    if (size > 0)
        memcpy(bytes->at + bytes->size, more, size);
    bytes->size += size;
}

static void add_text(struct bytes *bytes, const char *text)
{
    add(bytes, text, strlen(text) + 1);
}

static void empty(struct bytes *bytes)
{
    if (bytes->room > 64 * 1024) {
        __real_free(bytes->at);
        *bytes = (struct bytes){NULL, 0, 0};
    }
    bytes->size = 0;
}

static void discard(struct bytes *bytes)
{
    __real_free(bytes->at);
    *bytes = (struct bytes){NULL, 0, 0};
}

/* ---- Records and transcripts ---------------------------------------------------------------- */

static const unsigned long no_reply[MILTER_STAGES] = {
    SMFIP_NR_CONN, SMFIP_NR_HELO, SMFIP_NR_MAIL, SMFIP_NR_RCPT, SMFIP_NR_DATA,
    SMFIP_NR_HDR,  SMFIP_NR_EOH,  SMFIP_NR_BODY, 0,             SMFIP_NR_UNKN,
};

static enum milter_mode mode_of(const struct run *run, char letter)
{
    static const char letters[] = "CHMRTLNBEUAQ"; /* by stage */
    const char *found = strchr(letters, letter);

    if (found == NULL || (letter == 'E' && run->plan.mode[MILTER_EOM] == MILTER_IGNORE))
        return MILTER_RECORD; /* the end is always told */
    return run->plan.mode[found - letters];
}

static const char *field(const char **at, const char *end)
{
    const char *start = *at, *nul = start < end ? memchr(start, 0, (size_t)(end - start)) : NULL;

    if (nul == NULL)
        return NULL;
    *at = nul + 1;
    return start;
}

/* Where the record ends; NULL when it is broken, as it may be when memory ran out. */
static const char *record_end(const char *at, const char *end)
{
    const char *letter = field(&at, end);
    int fields = 0;

    if (letter == NULL || letter[0] == 0 || letter[1] != 0)
        return NULL;
    if (strchr("MR", *letter) != NULL) {
        const char *count = field(&at, end);
        fields = count != NULL ? atoi(count) : 0;
        if (fields < 1)
            return NULL;
    } else if (strchr("CHULB", *letter) != NULL)
        fields = *letter == 'C' ? 4 : *letter == 'L' ? 2 : 1;
    else if (strchr("TNEAQX", *letter) == NULL)
        return NULL;
    for (; fields > 0; fields--)
        if (field(&at, end) == NULL)
            return NULL;
    return at;
}

/*
 * What a client sends of one message, or of one connection outside of its messages:
 * written before the packet is sent, so that whoever is told of it finds it here.
 */
struct transcript {
    pthread_mutex_t lock;
    unsigned number;       /* of the message, or the connection */
    struct bytes log;      /* as the shim would write it, but with the space after a colon */
    size_t told;           /* how much of the log the stand-in has been told */
    bool finished;         /* all of it was sent, and the client said that this is the end */
    /* Of a message: */
    unsigned connection;
    size_t before;         /* size of the connection's log when it began */
    struct bytes content;  /* what is to be gathered */
    size_t header_size;
    struct bytes changes;  /* packets that the stand-in's changes make */
    /* Of a connection: */
    bool ruined;           /* the stand-in failed with what belongs to no message */
};
static struct transcript message_transcripts[CLIENTS * REMEMBERED], connection_transcripts[CLIENTS * REMEMBERED];

static struct transcript *place_of(struct transcript *all, unsigned number)
{
    return &all[(number - FIRST_NUMBER) % (CLIENTS * REMEMBERED)];
}

/* By a client. The caller unlocks it. */
static struct transcript *begin_transcript(struct transcript *all, unsigned number)
{
    struct transcript *t = place_of(all, number);

    pthread_mutex_lock(&t->lock);
    t->number = number;
    t->told = t->before = t->header_size = 0;
    t->finished = t->ruined = false;
    empty(&t->log);
    empty(&t->content);
    empty(&t->changes);
    return t;
}

/* Locked; NULL when it has made way for another one. */
static struct transcript *find_transcript(struct transcript *all, unsigned number)
{
    struct transcript *t = place_of(all, number);

    if (number < FIRST_NUMBER)
        return NULL;
    pthread_mutex_lock(&t->lock);
    if (t->number == number)
        return t;
    pthread_mutex_unlock(&t->lock);
    return NULL;
}

/* Skips records of stages that the plan ignores. Returns whether others are left before `limit`. */
static bool more_records(const struct transcript *t, size_t *at, size_t limit, const struct run *run)
{
    while (*at < limit && mode_of(run, t->log.at[*at]) == MILTER_IGNORE)
        *at = (size_t)(record_end(t->log.at + *at, t->log.at + t->log.size) - t->log.at);
    return *at < limit;
}

static void mark(unsigned message, unsigned char what)
{
    atomic_fetch_or(&fate[message % MESSAGES], what);
}

/* ---- Contexts that are used late, by other threads -------------------------------------- */

struct context {
    struct milter_session *session;
    uint64_t token;
    bool bodies;      /* a new body may be sent */
    atomic_bool over; /* the next call of this session has begun, so this one's has ended for sure */
    struct context *older; /* so that the sanitizer finds all of them */
};
static struct context *_Atomic contexts[CONTEXTS], *_Atomic all_contexts;

static int act(struct milter_session *session, uint64_t token, bool bodies)
{
    char buffer[64];

    switch (chance(9)) {
    case 0: return milter_macro(session, token, "i", buffer, sizeof buffer);
    case 1: return milter_macro(session, token, "{auth_authen}", buffer, chance(3));
    case 2: return milter_add_header(session, token, "X-Stress", "value");
    case 3: return milter_insert_header(session, token, 1, "X-Stress", "value");
    case 4: return milter_change_header(session, token, "Subject", 1, chance(2) ? NULL : "changed");
    case 5: return milter_add_recipient(session, token, "<a@b>", chance(2) ? NULL : "NOTIFY=NEVER");
    case 6: return milter_quarantine(session, token, "reason");
    case 7:
        if (bodies)
            return milter_send_body(session, token, "body\r\n", chance(7));
    }
    return milter_progress(session, token);
}

static int take_ended(struct milter_run *run);

static void *late(void *unused)
{
    (void)unused;
    while (!atomic_load(&stop_all)) {
        struct context *context = atomic_load(&contexts[chance(CONTEXTS)]);
        const int app = atomic_load(&current_app);
        if (app != 0 && !runs[app].seldom && chance(100) == 0)
            take_ended(runs[app].run);
        if (context == NULL) {
            nap(100);
            continue;
        }
        const bool over = atomic_load(&context->over);
        const int result = act(context->session, context->token, context->bodies);
        atomic_fetch_add(&late_done, 1);
        if (result == MILTER_EXPIRED)
            atomic_fetch_add(&late_expired, 1);
        else if (over)
            violation("a context of an ended call answered %d", result);
        if (chance(50) == 0)
            nap(200);
    }
    return NULL;
}

/* ---- The stand-in for Python: what it remembers of a connection ------------------------- */

struct conversation {
    uint64_t number;
    int app;
    bool known, told;  /* it has objects of this connection; it was told that they can go */
    bool failed_at_end; /* it failed when it was told: so it is told again */
    bool client, in_message, owes;
    bool lost;         /* where the log stands in the transcript of the message is not known any more */
    unsigned message, connection;
    size_t at, client_at, body_at; /* in the transcripts */
    int flags;         /* of the last answer */
    struct context *last;
};
static struct conversation conversations[CONVERSATIONS];

static struct conversation *conversation_of(uint64_t number, int app)
{
    struct conversation *c = &conversations[number % CONVERSATIONS];

    if (c->number != number) {
        memset(c, 0, sizeof *c);
        c->number = number;
        c->app = app;
    }
    return c;
}

/* What was told is not what was sent. Told once for each message. */
static void wrong(struct conversation *c, const char *what)
{
    if (!c->lost)
        violation("message %u of connection %u: %s", c->message, c->connection, what);
    c->lost = true;
}

/* These connections are gone, and had no more to tell. Any thread. */
static void hear_ends(const uint64_t *numbers, int count, int most)
{
    if (count < 0 || count > most)
        violation("%d ended connections are told where there is room for %d", count, most);
    for (int i = 0; i < count; i++) {
        struct conversation *c = &conversations[numbers[i] % CONVERSATIONS];
        tried(ENDED_QUIETLY);
        if (c->number != numbers[i] || !c->known) {
            if (!with_faults) /* a log with a hole may have hidden it altogether */
                violation("an end is told of a connection that nobody knew");
            continue;
        }
        if (c->told && !c->failed_at_end)
            violation("the end of a connection is told twice");
        const bool quietly = c->failed_at_end || with_faults; /* a log with a hole is not shown at the end either */
        if (runs[c->app].plan.mode[MILTER_CLOSE] == MILTER_ENTER && !quietly)
            violation("a connection ended without its handlers");
        if ((c->flags & MILTER_HOLDS) != 0 && !quietly)
            violation("a connection with state ended quietly");
        c->told = true;
        c->failed_at_end = false;
    }
}

static int take_ended(struct milter_run *run)
{
    uint64_t numbers[8];
    const int most = 1 + (int)chance(8);
    const int count = milter_take_ended(run, numbers, most);

    hear_ends(numbers, count, most);
    return count;
}

/* ---- The stand-in reads a log ------------------------------------------------------------ */

/* What one log holds. */
struct reading {
    const struct run *run;
    const struct milter_event *event;
    size_t chunks_read, events;
    bool client_deferred, message_deferred, client;
};

/* Compares a record with the transcript's. */
static bool same_record(const struct transcript *t, size_t at, const char *record, size_t size, const struct reading *r)
{
    const char *sent = t->log.at + at, *sent_end = record_end(sent, t->log.at + t->log.size);
    const bool verbatim = r->run->plan.leading_space || (r->event->steps & SMFIP_HDR_LEADSPC) == 0;
    size_t name = 2;

    if (*sent == 'L' && *record == 'L') { /* "L", name, value */
        name += strlen(sent + 2) + 1;
        if (size < name || memcmp(sent, record, name) != 0)
            return false;
        sent += name;
        record += name;
        size -= name;
        if (!verbatim && *sent == ' ')
            sent++;
    }
    return (size_t)(sent_end - sent) == size && memcmp(sent, record, size) == 0;
}

/* The next record of a transcript; false when it is another one. */
static bool follows(struct transcript *t, size_t *at, const char *record, size_t size, const struct reading *r)
{
    if (!more_records(t, at, t->log.size, r->run) || !same_record(t, *at, record, size, r))
        return false;
    *at = (size_t)(record_end(t->log.at + *at, t->log.at + t->log.size) - t->log.at);
    t->told = *at;
    return true;
}

static void read_client(struct conversation *c, const char *record, size_t size, struct reading *r)
{
    if (*record == 'C') {
        c->client = r->client = true;
        c->connection = strncmp(record + 2, "host", 4) == 0 ? (unsigned)atoi(record + 6) : 0;
        c->client_at = 0;
    }
    struct transcript *t = find_transcript(connection_transcripts, c->connection);
    if (t != NULL) {
        if (!follows(t, &c->client_at, record, size, r))
            wrong(c, "what the client says is not told in order");
        pthread_mutex_unlock(&t->lock);
    }
}

/* A message begins: all that came before it is known. */
static void read_mail(struct conversation *c, const char *record, size_t size, struct reading *r)
{
    const char *at = record + 2, *end = record + size;

    field(&at, end); /* the number of arguments */
    c->message = (unsigned)atoi(at + 1);
    c->in_message = true;
    c->owes = c->lost = false;
    c->at = c->body_at = 0;
    c->flags &= ~MILTER_TRACKS;
    struct transcript *t = find_transcript(message_transcripts, c->message);
    if (t == NULL)
        return;
    const size_t before = t->before;
    const bool good = t->connection == c->connection || c->connection == 0;
    if (!follows(t, &c->at, record, size, r))
        wrong(c, "MAIL is not what was sent");
    pthread_mutex_unlock(&t->lock);
    if (!good)
        violation("message %u belongs to another connection than %u", c->message, c->connection);
    t = find_transcript(connection_transcripts, c->connection);
    if (t != NULL) {
        if (more_records(t, &c->client_at, before, r->run) && !with_faults)
            wrong(c, "something that came before MAIL is told later");
        pthread_mutex_unlock(&t->lock);
    }
}

static void read_message(struct conversation *c, const char *record, size_t size, struct reading *r)
{
    const size_t piece = *record == 'B' ? (size_t)strtoull(record + 2, NULL, 10) : 0;
    const char *chunk = r->event->chunks + r->chunks_read;

    if (!c->in_message)
        violation("%c without a message", *record);
    if (piece > r->event->chunks_size - r->chunks_read) {
        wrong(c, "a piece of the body is missing");
        return;
    }
    r->chunks_read += piece;
    struct transcript *t = c->lost ? NULL : find_transcript(message_transcripts, c->message);
    if (t == NULL)
        return;
    const bool next = follows(t, &c->at, record, size, r);
    if (!next && *record == 'U' && with_faults)
        c->lost = true; /* what said that the message is over may be lost */
    else if (!next)
        wrong(c, "an event is not what was sent");
    else if (piece > 0 && (t->header_size + c->body_at + piece > t->content.size ||
                           memcmp(t->content.at + t->header_size + c->body_at, chunk, piece) != 0))
        wrong(c, "a piece of the body is not what was sent");
    c->body_at += piece;
    pthread_mutex_unlock(&t->lock);
}

/* The message is given up, or the connection is over: was everything told that the client sent before? */
static void read_end(struct conversation *c, struct transcript *all, unsigned number, size_t *at,
                     const struct reading *r)
{
    struct transcript *t = c->lost ? NULL : find_transcript(all, number);

    if (t == NULL)
        return;
    if (t->finished && more_records(t, at, t->log.size, r->run) && !with_faults)
        wrong(c, all == message_transcripts ? "an event is missing at the abort" : "an event is missing at the close");
    pthread_mutex_unlock(&t->lock);
}

static void read_record(struct conversation *c, const char *record, size_t size, struct reading *r)
{
    if (mode_of(r->run, *record) == MILTER_IGNORE && strchr("AQ", *record) == NULL)
        violation("%c is told, though nobody wants it", *record);
    if (mode_of(r->run, *record) == MILTER_DEFER)
        *(c->in_message || *record == 'M' ? &r->message_deferred : &r->client_deferred) = true;
    r->events++;
    switch (*record) {
    case 'C':
    case 'H':
        read_client(c, record, size, r);
        r->client = true;
        break;
    case 'U':
        if (c->in_message)
            read_message(c, record, size, r);
        else
            read_client(c, record, size, r);
        break;
    case 'M':
        read_mail(c, record, size, r);
        break;
    case 'A':
        tried(ABORTED);
        if (!c->in_message)
            violation("A without a message: aborted twice, or after the decision");
        read_end(c, message_transcripts, c->message, &c->at, r);
        c->in_message = c->owes = false;
        break;
    case 'X':
        c->in_message = c->owes = false;
        c->flags &= ~MILTER_TRACKS;
        break;
    case 'Q':
        if (c->in_message && c->message >= FIRST_NUMBER && !with_faults)
            violation("Q within message %u", c->message);
        c->lost = false;
        read_end(c, connection_transcripts, c->connection, &c->client_at, r);
        break;
    default:
        read_message(c, record, size, r);
    }
}

/* False: the log is broken. */
static bool read_log(struct conversation *c, struct reading *r)
{
    const char *at = r->event->log, *end = at + r->event->log_size;

    if (r->event->log_size + r->event->chunks_size > LOG_FULL + PACKET + 256)
        violation("%zu bytes of events have gathered", r->event->log_size + r->event->chunks_size);
    while (at < end) {
        const char *next = record_end(at, end);
        if (next == NULL)
            return false;
        read_record(c, at, (size_t)(next - at), r);
        at = next;
    }
    if (r->chunks_read != r->event->chunks_size)
        wrong(c, "there is more of the body than the log tells");
    if (r->events > 1 && (r->client_deferred || r->message_deferred))
        tried(BATCHES);
    return true;
}

/* ---- The stand-in reads a gathered message ------------------------------------------------ */

/* Was there a reason not to gather it? */
static void check_content_error(const struct run *run, const struct milter_event *event)
{
    const int error = event->content_error;
    bool reason = false;

    tried(CONTENT_LOST);
    if (error == ENOMEM)
        reason = with_faults;
    else if (error == ENOSPC || error == EMFILE)
        reason = atomic_fetch_add(&disk_faults_told, 1) < atomic_load(&disk_faults);
    else if (error == ENOENT)
        reason = !run->sound;
    if (!reason)
        violation("a message could not be gathered, for no reason: %s", strerror(error));
}

/* All of the content, wherever it lies. The caller discards it. */
static struct bytes content_of(const struct run *run, const struct milter_event *event)
{
    struct bytes content = {NULL, 0, 0};
    struct stat status;

    if (event->content_file < 0) {
        if (event->content_size > 0)
            add(&content, event->content, event->content_size);
        if (event->content_size > run->plan.spool_size)
            violation("%zu bytes of a message are in memory", event->content_size);
        tried(IN_MEMORY);
        return content;
    }
    if (event->content != NULL || event->content_size <= run->plan.spool_size)
        violation("a message of %zu bytes is in a file", event->content_size);
    if (fstat(event->content_file, &status) != 0 || status.st_nlink != 0 ||
        (fcntl(event->content_file, F_GETFD) & FD_CLOEXEC) == 0)
        violation("the file of a message has a name, or is inherited");
    content.at = __real_malloc(event->content_size + 1);
    const ssize_t size = pread(event->content_file, content.at, event->content_size + 1, 0);
    content.size = size > 0 ? (size_t)size : 0;
    if (content.size != event->content_size)
        violation("the file of a message holds %zd bytes, and not %zu", size, event->content_size);
    tried(IN_FILE);
    return content;
}

/* At each entry. False: the message cannot be judged. */
static bool read_content(struct conversation *c, const struct reading *r)
{
    const struct milter_event *event = r->event;

    if (event->stage != MILTER_EOM || !r->run->plan.gathers) {
        if (event->content_error != 0 || event->content != NULL || event->content_file != -1 ||
            event->content_size != 0)
            violation("content in stage %d of a plan that %s", event->stage, 
                      r->run->plan.gathers ? "gathers" : "does not");
        return true;
    }
    if (event->content_error != 0) {
        check_content_error(r->run, event);
        return false;
    }
    struct bytes content = content_of(r->run, event);
    struct transcript *t = c->in_message ? find_transcript(message_transcripts, c->message) : NULL;
    if (t != NULL) {
        if (content.size != t->content.size || event->header_size != t->header_size ||
            (content.size > 0 && memcmp(content.at, t->content.at, content.size) != 0))
            violation("message %u is not gathered as it was sent", c->message);
        pthread_mutex_unlock(&t->lock);
    }
    discard(&content);
    return true;
}

/* ---- The stand-in leaves changes ----------------------------------------------------------- */

/* A packet as the client will see it: size, letter, bytes. */
static void add_packet(struct bytes *packets, char letter, const void *bytes, size_t size)
{
    const uint32_t length = (uint32_t)size;

    add(packets, &length, sizeof length);
    add(packets, &letter, 1);
    add(packets, bytes, size);
}

static void leave_header(char letter, struct bytes *changes, struct bytes *packets)
{
    const uint32_t index = chance(3), on_the_wire = htonl(index);
    struct bytes packet = {NULL, 0, 0};
    char digits[12], value[400];

    memset(value, 'v', sizeof value);
    value[chance(10) != 0 ? chance(30) : chance(sizeof value)] = 0;
    if (letter != 'h') {
        snprintf(digits, sizeof digits, "%u", index);
        add_text(changes, digits);
        add(&packet, &on_the_wire, sizeof on_the_wire);
    }
    add_text(changes, "X-Left");
    add_text(changes, value);
    add_text(&packet, "X-Left");
    add_text(&packet, value);
    add_packet(packets, letter, packet.at, packet.size);
    discard(&packet);
}

static void leave_address(char letter, struct bytes *changes, struct bytes *packets)
{
    static const char address[] = "<left@server>\0NOTIFY=NEVER";
    const size_t size = letter == '2' ? sizeof address : strlen(address) + 1;

    add(changes, address, size);
    add_packet(packets, letter, address, size);
}

static void leave_body(struct bytes *changes, struct bytes *packets)
{
    const size_t size = chance(4) != 0 ? chance(200) : chance(3 * PACKET);
    const char *body = pool + chance(POOL - 3 * PACKET);
    char digits[24];
    size_t done = 0;

    snprintf(digits, sizeof digits, "%zu", size);
    add_text(changes, digits);
    add(changes, body, size);
    do {
        const size_t part = size - done < PACKET ? size - done : PACKET;
        add_packet(packets, 'b', body + done, part);
        done += part;
    } while (done < size);
}

/* A change that cannot be sent: not granted, too long, cut off, or unknown. */
static bool leave_bad(struct bytes *changes, unsigned long granted)
{
    char *value;

    switch (chance(4)) {
    case 0:
        if ((granted & SMFIF_CHGBODY) != 0)
            return false;
        add(changes, "b\0" "1\0x", 5);
        return true;
    case 1:
        value = __real_malloc(2 * PACKET);
        memset(value, 'v', 2 * PACKET);
        value[2 * PACKET - 1] = 0;
        add(changes, "h\0X-Long", 9);
        add_text(changes, value);
        __real_free(value);
        return true;
    case 2:
        add(changes, "h\0X-Cut\0cut", 11);
        return true;
    default:
        add(changes, "?", 2);
        return true;
    }
}

/* Some changes that were granted. False: they will fail. */
static bool make_changes(const struct milter_event *event, bool bodies, struct bytes *changes, struct bytes *packets)
{
    bool body = false;

    for (unsigned n = 1 + chance(chance(5) != 0 ? 4 : 40); n > 0; n--) {
        static const char letters[] = "himeeh+2-bb";
        const char letter[2] = {letters[chance(sizeof letters - 1)], 0};
        if (letter[0] == 'b' ? body || !bodies || (event->actions & SMFIF_CHGBODY) == 0
                             : (letter[0] == 'e' && (event->actions & SMFIF_CHGFROM) == 0) ||
                                   (letter[0] == '2' && (event->actions & SMFIF_ADDRCPT_PAR) == 0))
            continue;
        add_text(changes, letter);
        if (strchr("him", letter[0]) != NULL)
            leave_header(letter[0], changes, packets);
        else if (letter[0] != 'b')
            leave_address(letter[0], changes, packets);
        else
            leave_body(changes, packets);
        body = body || letter[0] == 'b';
    }
    return chance(20) != 0 || !leave_bad(changes, event->actions);
}

/* On a verdict that accepts. False: no memory. */
static bool leave_changes(struct conversation *c, struct milter_event *event, const struct run *run)
{
    struct bytes changes = {NULL, 0, 0}, packets = {NULL, 0, 0};
    bool left = true;

    if (!make_changes(event, run->bodies_left, &changes, &packets)) {
        tried(BAD_CHANGES);
        mark(c->message, FAILED);
        packets.size = 0;
    }
    if (changes.size > event->changes_capacity && milter_reserve_changes(event, changes.size) == NULL) {
        left = false;
        if (!with_faults)
            violation("no memory for %zu bytes of changes", changes.size);
    } else {
        tried(changes.size > 1024 ? MANY_CHANGES : FEW_CHANGES);
        if (changes.size > event->changes_capacity)
            violation("less room for changes than was asked for");
        memcpy(event->changes, changes.at != NULL ? changes.at : "", changes.size);
        event->changes_size = changes.size;
        struct transcript *t = find_transcript(message_transcripts, c->message);
        if (t != NULL) {
            add(&t->changes, packets.at, packets.size);
            pthread_mutex_unlock(&t->lock);
        }
    }
    discard(&changes);
    discard(&packets);
    return left;
}

/* ---- The stand-in is entered ---------------------------------------------------------------- */

static void enter_conversation(struct conversation *c, int app)
{
    if (atomic_load(&runs[app].gone))
        violation("entered after the gate");
    if (c->told)
        violation("a connection is told of after its end");
    c->known = true;
}

int milter_python_negotiate(struct milter_session *session, uint64_t token, uint64_t number, int app,
                            unsigned long offered_actions, unsigned long offered_steps, unsigned long *actions,
                            unsigned long *steps)
{
    (void)offered_steps, (void)steps;
    enter_conversation(conversation_of(number, app), app);
    if (chance(50) == 0 || (runs[app].plan.required & ~offered_actions) != 0)
        return 0;
    if (chance(4) == 0)
        *actions &= ~(unsigned long)SMFIF_CHGBODY;
    if ((*actions & SMFIF_SETSYMLIST) != 0)
        milter_request_macros(session, token, SMFIM_ENVFROM, "i j");
    return MILTER_ANSWERED;
}

/* Why does the shim enter? Its reasons, from the plan and the last answer. */
static void check_reason(const struct conversation *c, const struct reading *r)
{
    const struct milter_event *event = r->event;
    const bool silent = (event->steps & no_reply[event->stage < MILTER_ABORT ? event->stage : MILTER_EOM]) != 0;
    bool reason = r->run->plan.mode[event->stage] == MILTER_ENTER;

    if (event->stage == MILTER_CLOSE) {
        /* or so many ended that it is time to tell of them */
        reason = reason || (c->flags & MILTER_HOLDS) != 0 || r->client_deferred || event->ended_count == MILTER_ENDED;
        if (r->run->seldom && event->ended_count == MILTER_ENDED)
            tried(ENDED_ENOUGH);
        if ((c->flags & MILTER_HOLDS) != 0)
            tried(ENDED_HELD);
        if (r->client_deferred)
            tried(ENDED_DEFERRED);
    } else if (event->stage == MILTER_ABORT)
        reason = reason || (c->flags & MILTER_TRACKS) != 0 || r->message_deferred;
    else
        reason = reason || ((r->client_deferred || r->message_deferred || (c->flags & MILTER_OWED) != 0) && !silent) ||
                 ((c->flags & MILTER_TRACKS) != 0 && event->stage == MILTER_EOM);
    if (event->log_size + event->chunks_size > LOG_FULL) {
        tried(FULL_LOGS);
        reason = true;
    }
    if (!reason && !with_faults) /* the events that were the reason may be lost */
        violation("an entry in stage %d, mode %d, that nobody needs", event->stage, r->run->plan.mode[event->stage]);
}

static void remember(struct conversation *c, const struct milter_event *event)
{
    /* Contexts are never freed (the late threads look at them): a few, used again and again, would hide races. */
    struct context *context = __real_malloc(sizeof *context);

    context->session = event->session;
    context->token = event->token;
    context->bodies = !runs[event->app].bodies_left;
    atomic_init(&context->over, false);
    c->last = context;
    context->older = atomic_exchange(&all_contexts, context);
    atomic_store(&contexts[chance(CONTEXTS)], context);
}

static int set_reply(struct conversation *c, const struct milter_event *event, bool reject)
{
    char line[4][64];
    char *lines[4];
    const size_t count = 1 + chance(4);

    for (size_t i = 0; i < count; i++) {
        snprintf(line[i], sizeof line[i], "message %u", c->message);
        lines[i] = line[i];
    }
    return milter_set_reply(event->session, event->token, reject ? "554" : "451",
                            chance(2) ? NULL : reject ? "5.7.1" : "4.7.1", lines, count);
}

/* The engine failed. What belongs to no message is lost for the whole connection. */
static int fail(struct conversation *c, const struct reading *r)
{
    const int stage = r->event->stage;

    if (c->in_message)
        mark(c->message, FAILED);
    if (r->client || r->client_deferred || stage == MILTER_CONNECT || stage == MILTER_HELO ||
        (stage == MILTER_UNKNOWN && !c->in_message)) {
        struct transcript *t = find_transcript(connection_transcripts, c->connection);
        if (t != NULL) {
            t->ruined = true;
            pthread_mutex_unlock(&t->lock);
        }
    }
    if (stage == MILTER_CLOSE)
        c->failed_at_end = true;
    return 0;
}

/* Is the message over with this refusal? */
static bool refusal_decides(int stage)
{
    return stage >= MILTER_MAIL && stage <= MILTER_EOM && stage != MILTER_RCPT;
}

/* Something failed, so that the shim answers "temporary failure", whatever it is told. */
static bool has_failed(const struct conversation *c)
{
    struct transcript *t = find_transcript(connection_transcripts, c->connection);
    bool ruined = false;

    if (t != NULL) {
        ruined = t->ruined;
        pthread_mutex_unlock(&t->lock);
    }
    return ruined || (atomic_load(&fate[c->message % MESSAGES]) & FAILED) != 0;
}

static int verdict_of(struct conversation *c, const struct milter_event *event)
{
    const int stage = event->stage;
    /* The shim turns each verdict on a failed message into a temporary failure, which at RCPT is not its end. */
    const bool decides =
        stage >= MILTER_MAIL && stage <= MILTER_EOM && (stage != MILTER_RCPT || !has_failed(c));

    switch (chance(stage == MILTER_EOM ? 5 : 25)) {
    case 0: {
        const bool reject = chance(2) == 0;
        if (!with_faults && chance(2) == 0 && set_reply(c, event, reject) != MILTER_OK)
            violation("a reply was refused");
        if (refusal_decides(stage))
            c->in_message = false;
        return reject ? SMFIS_REJECT : SMFIS_TEMPFAIL;
    }
    case 1:
        if (!decides)
            break;
        mark(c->message, ACCEPTED);
        c->in_message = false;
        return SMFIS_ACCEPT;
    case 2:
        if (!decides || chance(2) == 0)
            break;
        mark(c->message, DISCARDED);
        c->in_message = false;
        return SMFIS_DISCARD;
    case 3:
        if (stage == MILTER_EOM)
            break;
        return SMFIS_SKIP;
    case 4:
        if (chance(10) != 0) /* no verdict at all */
            break;
        if (refusal_decides(stage)) {
            mark(c->message, FAILED);
            c->in_message = false;
        }
        return 77;
    }
    if (stage == MILTER_EOM) {
        mark(c->message, PASSED);
        if (!c->client)
            mark(c->message, BLIND);
        c->in_message = false;
    }
    return SMFIS_CONTINUE;
}

/* The answer, of a stand-in that did not fail. */
static int answer_of(struct conversation *c, struct milter_event *event, const struct reading *r)
{
    const bool silent = (event->steps & no_reply[event->stage < MILTER_ABORT ? event->stage : MILTER_EOM]) != 0;
    int answer = MILTER_ANSWERED;

    if (!r->run->quiet)
        answer |= (c->in_message && chance(4) == 0 ? MILTER_TRACKS : 0) | (chance(4) == 0 ? MILTER_HOLDS : 0);
    if (event->stage == MILTER_ABORT || event->stage == MILTER_CLOSE)
        return answer;
    if (c->in_message && !r->run->quiet && chance(50) == 0 && (silent || r->message_deferred)) {
        c->owes = true;
        mark(c->message, FAILED);
    }
    answer |= c->owes ? MILTER_OWED : 0;
    if (silent)
        return answer | SMFIS_CONTINUE;
    if (c->owes) {
        if (refusal_decides(event->stage))
            c->in_message = false;
        return answer | SMFIS_TEMPFAIL;
    }
    return answer | verdict_of(c, event);
}

/* The call itself: 0 is a failure. */
static int enter(struct conversation *c, struct milter_event *event, struct reading *r)
{
    const bool quiet = r->run->quiet;

    if (!read_log(c, r)) {
        violation("a log that cannot be read, stage %d", event->stage);
        return 0;
    }
    check_reason(c, r);
    if (quiet && event->stage != MILTER_EOM && event->log_size <= LOG_FULL)
        violation("an entry in stage %d, though only whole messages are wanted", event->stage);
    if (!read_content(c, r)) {
        mark(c->message, FAILED);
        c->in_message = false;
        return c->flags = MILTER_ANSWERED | SMFIS_TEMPFAIL;
    }
    if (chance(20) == 0 && event->stage != MILTER_CLOSE)
        remember(c, event);
    for (unsigned n = chance(4); n > 0 && event->stage == MILTER_EOM; n--)
        if (act(event->session, event->token, !r->run->bodies_left) == MILTER_EXPIRED)
            violation("a call that goes on is said to be over");
    if (chance(30) == 0)
        nap(chance(3000));
    if (!quiet && chance(30) == 0)
        return fail(c, r);

    const int answer = answer_of(c, event, r), verdict = answer & 0xff;
    if (event->stage == MILTER_EOM && (verdict == SMFIS_CONTINUE || verdict == SMFIS_ACCEPT) && chance(3) == 0 &&
        !leave_changes(c, event, r->run))
        return fail(c, r);
    c->flags = c->in_message ? answer : answer & ~MILTER_TRACKS;
    return answer;
}

int milter_python_enter(struct milter_event *event)
{
    struct conversation *c = conversation_of(event->number, event->app);
    struct reading r = {.run = &runs[event->app], .event = event};

    atomic_fetch_add(&entries, 1);
    enter_conversation(c, event->app);
    if (c->last != NULL)
        atomic_store(&c->last->over, true);
    c->last = NULL;
    if (event->stage == MILTER_CLOSE)
        c->told = true;
    hear_ends(event->ended, event->ended_count, MILTER_ENDED);
    if (chance(10) == 0 && atomic_load(&current_app) == event->app)
        take_ended(r.run->run);
    return enter(c, event, &r);
}

/* ---- The MTA's side ----------------------------------------------------------------------- */

enum { CLOSED = 0, HANGS = '?' }; /* instead of an answer's letter */

/* The numbers of one client's next message and connection. */
struct numbers {
    unsigned message, connection;
};

struct mta {
    int fd;
    struct numbers *next;
    unsigned version;
    unsigned long steps;
    int app;
    unsigned message;
    struct transcript *connection_log, *message_log;
    bool in_message;
    bool ended, cut;       /* closed by the filter, or by us in the middle of a packet */
    struct bytes packet;   /* the last answer */
    struct bytes changes;  /* packets before a verdict */
    unsigned sent[REMEMBERED], made[REMEMBERED]; /* the messages and connections of this socket */
    unsigned sent_count, made_count;
};

static bool put(struct mta *m, char command, const void *data, size_t size)
{
    unsigned char *packet = __real_malloc(size + 5);
    const uint32_t length = htonl((uint32_t)size + 1);
    bool sent = true;

    memcpy(packet, &length, 4);
    packet[4] = (unsigned char)command;
    if (size > 0)
        memcpy(packet + 5, data, size);
    size += 5;
    if (chance(3000) == 0) { /* the connection drops anywhere, also within a packet */
        size = chance((unsigned)size);
        m->ended = m->cut = true;
        atomic_fetch_add(&cut, 1);
    }
    for (size_t done = 0; done < size;) {
        const ssize_t n = send(m->fd, packet + done, size - done, MSG_NOSIGNAL);
        if (n <= 0) {
            sent = false;
            m->ended = true;
            break;
        }
        done += (size_t)n;
    }
    __real_free(packet);
    return sent && !m->ended;
}

/* Reads `size` bytes. False: the connection is closed, or nothing comes. */
static bool receive(struct mta *m, char *where, size_t size, char *instead)
{
    while (size > 0) {
        struct pollfd ready = {m->fd, POLLIN, 0};
        if (poll(&ready, 1, PATIENCE) == 0) {
            atomic_fetch_add(&hangs, 1);
            *instead = HANGS;
            return false;
        }
        const ssize_t n = recv(m->fd, where, size, 0);
        if (n <= 0) {
            *instead = CLOSED;
            return false;
        }
        where += n;
        size -= (size_t)n;
    }
    return true;
}

/* The answer's letter. Its bytes are in m->packet, with a NUL behind them. */
static char get(struct mta *m)
{
    char head[5], instead;
    uint32_t length;

    if (!receive(m, head, sizeof head, &instead)) {
        m->ended = true;
        return instead;
    }
    memcpy(&length, head, sizeof length);
    const size_t size = ntohl(length) - 1;
    if (size > 1 << 20) {
        violation("an answer of %zu bytes", size);
        m->ended = true;
        return CLOSED;
    }
    m->packet.size = 0;
    if (m->packet.room < size + 1) {
        discard(&m->packet);
        m->packet.at = __real_malloc(m->packet.room = size + 1);
    }
    if (!receive(m, m->packet.at, size, &instead)) {
        m->ended = true;
        return instead;
    }
    m->packet.at[m->packet.size = size] = 0;
    return head[4];
}

/* ---- The MTA's side: what it writes down ----------------------------------------------------- */

static struct transcript *transcript_of(struct mta *m)
{
    struct transcript *t = m->in_message ? m->message_log : m->connection_log;

    pthread_mutex_lock(&t->lock);
    return t;
}

/* A record and its fields, before its packet is sent. */
static void note(struct mta *m, const char *letter, ...)
{
    struct transcript *t = transcript_of(m);
    const char *text;
    va_list fields;

    add_text(&t->log, letter);
    va_start(fields, letter);
    while ((text = va_arg(fields, const char *)) != NULL)
        add_text(&t->log, text);
    va_end(fields);
    pthread_mutex_unlock(&t->lock);
}

static void note_header(struct mta *m, const char *name, const char *value)
{
    struct transcript *t = transcript_of(m);

    add_text(&t->content, name);
    add_text(&t->content, value);
    t->header_size = t->content.size;
    pthread_mutex_unlock(&t->lock);
    note(m, "L", name, value, NULL);
}

static void note_body(struct mta *m, const char *piece, size_t size)
{
    struct transcript *t = transcript_of(m);
    char digits[24];

    snprintf(digits, sizeof digits, "%zu", size);
    add(&t->content, piece, size);
    pthread_mutex_unlock(&t->lock);
    note(m, "B", digits, NULL);
}

/* The message is given up, or the connection about to be left; nothing that was sent got lost on the way. */
static void note_end(struct mta *m)
{
    struct transcript *t = transcript_of(m);

    t->finished = !m->ended;
    pthread_mutex_unlock(&t->lock);
}

/* The letter of an event that was deferred and not told, though it is over; or 0. */
static char untold(const struct transcript *t, const struct run *run)
{
    size_t at = t->told;

    while (more_records(t, &at, t->log.size, run)) {
        if (mode_of(run, t->log.at[at]) == MILTER_DEFER)
            return t->log.at[at];
        at = (size_t)(record_end(t->log.at + at, t->log.at + t->log.size) - t->log.at);
    }
    return 0;
}

/* The socket is about to be closed without QUIT: what the filter has not read yet, it may never read. */
static void withdraw_ends(struct transcript *all, const unsigned *numbers, unsigned count)
{
    for (unsigned i = count > REMEMBERED ? count - REMEMBERED : 0; i < count; i++) {
        struct transcript *t = find_transcript(all, numbers[i % REMEMBERED]);
        if (t == NULL)
            continue;
        t->finished = false;
        pthread_mutex_unlock(&t->lock);
    }
}

/* The connection is closed, and all was sent: what was to be told has been told. */
static void settle(const struct mta *m, struct transcript *all, const unsigned *numbers, unsigned count)
{
    for (unsigned i = count > REMEMBERED ? count - REMEMBERED : 0; i < count; i++) {
        struct transcript *t = find_transcript(all, numbers[i % REMEMBERED]);
        if (t == NULL)
            continue;
        const char letter = untold(t, &runs[m->app]);
        if (letter != 0 && !atomic_load(&runs[m->app].ending))
            violation("%c of %u was deferred, and never told", letter, t->number);
        pthread_mutex_unlock(&t->lock);
    }
}

/* ---- The MTA's side: what it is answered ------------------------------------------------------ */

enum outcome { ON, DECIDED, OVER };

/* Did the changes that were left arrive, after those that were made in the call? */
static void check_changes(const struct mta *m)
{
    struct transcript *t = find_transcript(message_transcripts, m->message);

    if (t == NULL)
        return;
    if (t->changes.size > 0 &&
        (m->changes.size < t->changes.size ||
         memcmp(m->changes.at + m->changes.size - t->changes.size, t->changes.at, t->changes.size) != 0))
        violation("message %u is not changed as the stand-in wanted", m->message);
    pthread_mutex_unlock(&t->lock);
}

/* A message passes, accepted or not. */
static void check_passed(const struct mta *m, unsigned char f)
{
    const bool asked = runs[m->app].plan.mode[MILTER_EOM] == MILTER_ENTER;

    if ((f & BLIND) != 0)
        violation("message %u passes by handlers that never heard of its client", m->message);
    if ((f & (PASSED | ACCEPTED)) == 0 && asked)
        violation("message %u passes without a verdict", m->message);
    pthread_mutex_lock(&m->connection_log->lock);
    if (m->connection_log->ruined)
        violation("message %u passes, though the stand-in failed before it", m->message);
    pthread_mutex_unlock(&m->connection_log->lock);
    pthread_mutex_lock(&m->message_log->lock);
    const char letter = untold(m->message_log, &runs[m->app]);
    pthread_mutex_unlock(&m->message_log->lock);
    if (letter != 0)
        violation("message %u passes, and %c was never told", m->message, letter);
    check_changes(m);
    atomic_fetch_add(&passed, 1);
}

/* An MTA that wants answers everywhere gets libmilter's own "continue" where the filter gives none. */
static bool faked(const struct mta *m, unsigned long silent)
{
    return silent != 0 && (runs[m->app].plan.steps & silent) != 0;
}

/* The changes before the answer; the answer's letter. */
static char answer_of_stage(struct mta *m, char stage)
{
    bool in_body = false, body_over = false;

    m->changes.size = 0;
    for (;;) {
        const char letter = get(m);
        if (stage != 'E' || letter == CLOSED || letter == HANGS || strchr("+2-mhiqebp", letter) == NULL)
            return letter;
        if (letter == 'b' && body_over)
            violation("a new body is interrupted");
        body_over = body_over || (in_body && letter != 'b');
        in_body = in_body || letter == 'b';
        if (letter != 'p')
            add_packet(&m->changes, letter, m->packet.at, m->packet.size);
    }
}

/* Take the answer of one stage, and judge it. */
static enum outcome judge(struct mta *m, unsigned long silent, char stage)
{
    if ((m->steps & silent) != 0)
        return ON;
    const char letter = answer_of_stage(m, stage);
    const unsigned char f = atomic_load(&fate[m->message % MESSAGES]);
    const bool in_message = strchr("MRTLNBE", stage) != NULL;

    switch (letter) {
    case HANGS:
        violation("no answer to %c of message %u", stage, m->message);
        return OVER;
    case CLOSED:
        return OVER;
    case 'c':
        if (in_message && (f & FAILED) != 0 && !faked(m, silent))
            violation("%c of message %u goes on, though something failed", stage, m->message);
        if (stage == 'E')
            check_passed(m, f);
        return stage == 'E' ? DECIDED : ON;
    case 's':
        if (stage != 'B')
            violation("skip in %c", stage);
        return ON;
    case 'a':
        if (in_message && ((f & ACCEPTED) == 0 || (f & FAILED) != 0))
            violation("%c of message %u accepted by nobody (%x)", stage, m->message, f);
        if (stage == 'E')
            check_passed(m, f);
        return stage == 'U' ? ON : DECIDED;
    case 'd':
        if (in_message && ((f & DISCARDED) == 0 || (f & FAILED) != 0))
            violation("%c of message %u discarded by nobody (%x)", stage, m->message, f);
        return DECIDED;
    case 'y': {
        char mine[32];
        snprintf(mine, sizeof mine, "message %u", m->message);
        if (in_message && strstr(m->packet.at, mine) == NULL)
            violation("%c of message %u refused with the reply of another: %s", stage, m->message, m->packet.at);
    } /* fall through */
    case 'r':
    case 't':
        atomic_fetch_add(&refused, 1);
        return strchr("RUCH", stage) != NULL ? ON : DECIDED;
    default:
        violation("an answer %02x to %c", letter, stage);
        return OVER;
    }
}

/* ---- The MTA's side: what it says --------------------------------------------------------------- */

static bool sends(const struct mta *m, unsigned long declined)
{
    return (m->steps & declined) == 0;
}

static void macros(struct mta *m, char stage)
{
    char data[64];

    if (chance(3) == 0)
        return;
    const int n = snprintf(data, sizeof data, "%ci%cq%u%c{auth_authen}%cme", stage, 0, m->message, 0, 0) + 1;
    put(m, 'D', data, (size_t)n);
}

static enum outcome unknown(struct mta *m, unsigned odds)
{
    char command[16];

    if (m->version < 3 || !sends(m, SMFIP_NOUNKNOWN) || chance(odds) != 0)
        return ON;
    snprintf(command, sizeof command, "XFOO%u", chance(100));
    note(m, "U", command, NULL);
    if (!put(m, 'U', command, strlen(command) + 1))
        return OVER;
    return judge(m, SMFIP_NR_UNKN, 'U');
}

static enum outcome say_mail(struct mta *m)
{
    char address[32], data[64];

    macros(m, 'M');
    snprintf(address, sizeof address, "<%u@client>", m->message);
    const int n = snprintf(data, sizeof data, "%s%cSIZE=1", address, 0) + 1;
    note(m, "M", "2", address, "SIZE=1", NULL);
    return put(m, 'M', data, (size_t)n) ? judge(m, SMFIP_NR_MAIL, 'M') : OVER;
}

static enum outcome say_rcpt(struct mta *m, unsigned number)
{
    char address[100];

    macros(m, 'R');
    snprintf(address, sizeof address, "<rcpt%u-%048d@server>", number, 0);
    note(m, "R", "1", address, NULL);
    return put(m, 'R', address, strlen(address) + 1) ? judge(m, SMFIP_NR_RCPT, 'R') : OVER;
}

static enum outcome say_data(struct mta *m)
{
    char byte;

    note(m, "T", NULL);
    if (!put(m, 'T', NULL, 0))
        return OVER;
    if (idle && chance(20) == 0)
        seconds(4); /* libmilter's controller closes the session in the middle of the message */
    struct pollfd closed = {m->fd, POLLIN, 0};
    if (idle && poll(&closed, 1, 0) == 1 && recv(m->fd, &byte, 1, MSG_PEEK) == 0)
        atomic_fetch_add(&timeouts, 1);
    return judge(m, SMFIP_NR_DATA, 'T');
}

static enum outcome say_header(struct mta *m)
{
    char name[16], value[250], data[300];

    snprintf(name, sizeof name, "X-Sent%u", chance(10));
    const size_t size = chance(200);
    memset(value, 'a' + (int)chance(26), size);
    value[size] = 0;
    if (chance(2))
        value[0] = size > 0 ? ' ' : 0;
    note_header(m, name, value);
    const int n = snprintf(data, sizeof data, "%s%c%s", name, 0, value) + 1;
    return put(m, 'L', data, (size_t)n) ? judge(m, SMFIP_NR_HDR, 'L') : OVER;
}

static enum outcome say_body(struct mta *m, size_t size)
{
    const char *piece = pool + chance((unsigned)(POOL - size));

    note_body(m, piece, size);
    return put(m, 'B', piece, size) ? judge(m, SMFIP_NR_BODY, 'B') : OVER;
}

/* All of a message, as far as it comes. `whole`: it is not given up on the way. */
static enum outcome say_message(struct mta *m, bool whole)
{
    enum outcome o;

#define STEP(expression)                          \
    do {                                          \
        if ((o = (expression)) != ON)             \
            return o;                             \
        if (!whole && chance(6) == 0)             \
            return ON;                            \
    } while (0)
    STEP(say_mail(m));
    STEP(unknown(m, 20));
    for (unsigned i = 0, count = chance(50) == 0 ? 900 : 1 + chance(3); i < count; i++)
        STEP(say_rcpt(m, i));
    STEP(unknown(m, 20));
    if (m->version >= 4 && sends(m, SMFIP_NODATA))
        STEP(say_data(m));
    if (sends(m, SMFIP_NOHDRS))
        for (unsigned i = chance(50) == 0 ? 500 : chance(6); i > 0; i--)
            STEP(say_header(m));
    if (sends(m, SMFIP_NOEOH)) {
        note(m, "N", NULL);
        STEP(put(m, 'N', NULL, 0) ? judge(m, SMFIP_NR_EOH, 'N') : OVER);
    }
    if (sends(m, SMFIP_NOBODY)) {
        const bool large = chance(50) == 0;
        for (unsigned i = large ? 6 : chance(4); i > 0; i--)
            STEP(say_body(m, large || chance(30) == 0 ? PACKET : 1 + chance(3000)));
    }
    macros(m, 'E');
    note(m, "E", NULL);
    return put(m, 'E', NULL, 0) ? judge(m, 0, 'E') : OVER;
#undef STEP
}

/* One message; OVER when the connection is gone. */
static enum outcome message(struct mta *m)
{
    m->message = m->next->message;
    m->next->message += CLIENTS;
    m->sent[m->sent_count++ % REMEMBERED] = m->message;
    atomic_fetch_add(&messages, 1);
    atomic_store(&fate[m->message % MESSAGES], 0);
    const size_t before = m->connection_log->log.size; /* only this thread writes there */
    m->message_log = begin_transcript(message_transcripts, m->message);
    m->message_log->connection = m->connection_log->number;
    m->message_log->before = before;
    pthread_mutex_unlock(&m->message_log->lock);

    m->in_message = true;
    const enum outcome o = say_message(m, chance(20) != 0);
    if (o == ON)
        note_end(m);
    m->in_message = false;
    if (o == ON || (o == DECIDED && chance(3) == 0))
        for (unsigned i = 1 + chance(2); i > 0; i--)
            if (!put(m, 'A', NULL, 0))
                return OVER;
    return o == OVER ? OVER : ON;
}

static bool negotiate(struct mta *m)
{
    static const unsigned long offers[] = {0, 0, 0x7f, 0x17f, 0x37f, 0x37f, 0x1fffff};
    uint32_t offer[3], answer[3];

    m->version = 2 + chance(5);
    if (m->version == 5)
        m->version = 6;
    offer[0] = htonl(m->version);
    offer[1] = htonl(m->version == 6 ? 0x1ff : 0x3f);
    offer[2] = htonl((uint32_t)offers[m->version]);
    if (!put(m, 'O', offer, sizeof offer))
        return false;
    if (get(m) != 'O' || m->packet.size < sizeof answer)
        return false;
    memcpy(answer, m->packet.at, sizeof answer);
    m->steps = ntohl(answer[2]);
    return true;
}

/* Another connection, perhaps on the same socket. */
static bool say_connect(struct mta *m)
{
    static const struct {
        const char *wire; /* family, port, address */
        size_t size;
        const char *family, *port, *address;
    } ways_to_connect[] = {
        {"6\1\1::1", 7, "6", "257", "::1"},
        {"U\0", 2, "U", "0", ""},
        {"L\1\1/path", 9, "L", "0", "/path"},
        {"4\1\1" "192.0.2.1", 13, "4", "257", "192.0.2.1"},
    };
    const size_t way = chance(4);
    const unsigned number = m->next->connection;
    char data[64];

    m->next->connection += CLIENTS;
    m->made[m->made_count++ % REMEMBERED] = number;
    atomic_fetch_add(&connections, 1);
    m->connection_log = begin_transcript(connection_transcripts, number);
    pthread_mutex_unlock(&m->connection_log->lock);
    const int n = snprintf(data, sizeof data, "host%u", number) + 1;
    memcpy(data + n, ways_to_connect[way].wire, ways_to_connect[way].size);
    note(m, "C", data, ways_to_connect[way].family, ways_to_connect[way].port,
         ways_to_connect[way].address, NULL);
    macros(m, 'C');
    return put(m, 'C', data, (size_t)n + ways_to_connect[way].size) && judge(m, SMFIP_NR_CONN, 'C') != OVER;
}

static bool greet(struct mta *m)
{
    char name[16];

    if (!say_connect(m))
        return false;
    for (unsigned i = chance(3); i > 0; i--) {
        macros(m, 'H');
        snprintf(name, sizeof name, "helo%u", chance(100));
        note(m, "H", name, NULL);
        if (!put(m, 'H', name, strlen(name) + 1) || judge(m, SMFIP_NR_HELO, 'H') == OVER)
            return false;
    }
    return unknown(m, 10) != OVER;
}

static int call_filter(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof address) != 0) {
        close(fd);
        return -1;
    }
    return fd;
}

/* Packets that mean nothing, in no order: nothing to judge but that nobody crashes. */
static void garbage(struct mta *m)
{
    static const char letters[] = "ADBCEHLMONQTRUKXz";
    char data[200];

    if (chance(4) != 0 && !negotiate(m))
        return;
    for (unsigned i = chance(40); i > 0 && !m->ended; i--) {
        const unsigned size = chance(60);
        for (unsigned k = 0; k < size; k++)
            data[k] = chance(3) ? (char)('a' + chance(26)) : (char)chance(256) * (chance(2) != 0);
        if ((terminated || chance(2)) && size > 0)
            data[size - 1] = 0;
        if (chance(3) == 0) {
            static const char connection[] = "host\0" "4\1\1" "192.0.2.1";
            put(m, 'C', connection, sizeof connection);
        }
        put(m, letters[chance(sizeof letters - 1)], data, size);
        char sink[4096];
        while (recv(m->fd, sink, sizeof sink, MSG_DONTWAIT) > 0)
            continue;
    }
}

static bool goes_on(void)
{
    return !atomic_load(&stop_clients) && !atomic_load(&pause_clients);
}

/* Messages, and perhaps other connections on the same socket. */
static void talk(struct mta *m)
{
    bool again = true;

    while (again && !m->ended && goes_on()) {
        enum outcome o = ON;
        for (unsigned i = chance(5); i > 0 && o == ON; i--)
            o = message(m);
        again = o == ON && chance(2) == 0 && message(m) == ON;
        if (again) { /* libmilter understands QUIT_NC only after the end of a message or an unknown command */
            again = m->version >= 3 && sends(m, SMFIP_NOUNKNOWN) && unknown(m, 1) == ON;
            if (again)
                note_end(m);
            again = again && put(m, 'K', NULL, 0) && (nap(chance(2000)), greet(m));
        }
    }
}

static void quit(struct mta *m)
{
    if (m->ended)
        return;
    note_end(m);
    if (!put(m, 'Q', NULL, 0))
        return;
    const char letter = get(m);
    if (letter == HANGS)
        violation("QUIT did not close the connection");
    else if (letter != CLOSED)
        violation("an answer %02x after QUIT", letter);
    if (letter == CLOSED && !with_faults) { /* what was lost cannot be told */
        settle(m, message_transcripts, m->sent, m->sent_count);
        settle(m, connection_transcripts, m->made, m->made_count);
    }
}

static void *client(void *argument)
{
    const unsigned first = FIRST_NUMBER + (unsigned)(uintptr_t)argument;
    struct numbers next = {first, first};

    while (!atomic_load(&stop_clients)) {
        if (!goes_on()) {
            atomic_fetch_add(&pausing, 1);
            while (!goes_on() && !atomic_load(&stop_clients))
                nap(500);
            atomic_fetch_sub(&pausing, 1);
            continue;
        }
        struct mta m = {.fd = call_filter(), .next = &next};
        if (m.fd < 0) {
            nap(1000);
            continue;
        }
        m.app = atomic_load(&current_app);
        if (chance(8) == 0)
            garbage(&m);
        else if (m.app != 0 && negotiate(&m) && atomic_load(&current_app) == m.app && greet(&m)) {
            talk(&m);
            quit(&m);
        }
        if (m.ended) {
            withdraw_ends(message_transcripts, m.sent, m.sent_count);
            withdraw_ends(connection_transcripts, m.made, m.made_count);
        }
        close(m.fd);
        discard(&m.packet);
        discard(&m.changes);
    }
    return NULL;
}

/* ---- The process --------------------------------------------------------------------------- */

static bool handles(const struct run *run, int stage)
{
    if (run->quiet || run->seldom)
        return run->quiet && stage == MILTER_EOM;
    return run->observing || chance(2) != 0 || (stage == MILTER_EOM && chance(2));
}

static enum milter_mode mode_for(const struct run *run, int stage, bool handled, bool silent)
{
    if (handled)
        return silent && (run->observing || chance(3) != 0) ? MILTER_DEFER : MILTER_ENTER;
    return stage <= MILTER_RCPT ? MILTER_RECORD : MILTER_IGNORE;
}

static void plan_stages(struct run *run, bool wants_messages)
{
    struct milter_plan *plan = &run->plan;
    bool handled[MILTER_STAGES];

    for (int stage = 0; stage < MILTER_STAGES; stage++) {
        handled[stage] = handles(run, stage);
        const bool silent = no_reply[stage] != 0 && (!handled[stage] || run->observing || chance(3) != 0);
        plan->mode[stage] = (unsigned char)mode_for(run, stage, handled[stage], silent);
        if (silent)
            plan->steps |= no_reply[stage];
    }
    if (!handled[MILTER_UNKNOWN])
        plan->steps |= SMFIP_NOUNKNOWN | (handled[MILTER_DATA] ? 0 : SMFIP_NODATA);
    if (!handled[MILTER_HEADER] && !wants_messages)
        plan->steps |= SMFIP_NOHDRS | (handled[MILTER_EOH] ? 0 : SMFIP_NOEOH);
    if (!handled[MILTER_BODY] && !wants_messages)
        plan->steps |= SMFIP_NOBODY;
    else if (handled[MILTER_BODY] && (plan->steps & SMFIP_NR_BODY) == 0)
        plan->steps |= SMFIP_SKIP;
}

/* A plan as plan.py makes them, of any set of handlers. */
static void make_plan(struct run *run, int app)
{
    static const size_t spool_sizes[] = {0, 1, 100, 5000, 100000, 1 << 20};
    struct milter_plan *plan = &run->plan;

    run->quiet = app % 6 == 2;
    run->observing = app % 6 == 3;
    run->seldom = app % 6 == 5;
    run->sound = run->quiet || chance(5) != 0;
    run->bodies_left = chance(2) != 0;
    plan->app = app;
    plan->actions = 0x1ff & ~(unsigned long)SMFIF_SETSYMLIST;
    plan->required = chance(8) == 0 ? SMFIF_ADDRCPT_PAR : 0;
    plan->gathers = run->quiet || (!run->seldom && chance(2) != 0);
    plan->leading_space = chance(2) != 0;
    if (plan->gathers || plan->leading_space)
        plan->steps |= SMFIP_HDR_LEADSPC;
    plan->spool_size = run->quiet ? 1000 : spool_sizes[chance(sizeof spool_sizes / sizeof *spool_sizes)];
    plan->spool_directory = run->sound ? spool_directory : "/nowhere/at/all";
    plan_stages(run, plan->gathers);
    if (run->quiet)
        plan->required = 0;
    else
        plan->negotiates = run->seldom || chance(3) == 0;
    if (chance(2))
        plan->macros[SMFIM_ENVFROM] = "i j {auth_authen}";
}

/* Begins another run. Memory may run out here, too. */
static struct run *begin(int app)
{
    struct run *run = &runs[app];

    make_plan(run, app);
    while ((run->run = milter_begin(&run->plan)) == NULL)
        continue;
    atomic_store(&current_app, app);
    return run;
}

/* Descriptors of this process, or -1 where nobody tells. */
static int descriptors(void)
{
    DIR *all = opendir("/proc/self/fd");
    int count = 0;

    if (all == NULL)
        return -1;
    while (readdir(all) != NULL)
        count++;
    closedir(all);
    return count;
}

/* By the main thread, when no session is open and the gate is closed: everybody knows of every end. */
static void check_ends(int app)
{
    unsigned untold = 0;

    for (size_t i = 0; i < CONVERSATIONS; i++) {
        const struct conversation *c = &conversations[i];
        if (c->number != 0 && c->app == app && c->known && (!c->told || c->failed_at_end))
            untold++;
    }
    if (untold > 0)
        violation("%u connections have ended, and nobody was told", untold);
}

/* Comes after all connections that wait to be accepted, and is served to its end. */
static void come_last(void)
{
    struct numbers none = {0, 0};
    bool served = false;

    while (!served) {
        struct mta m = {.fd = call_filter(), .next = &none};
        if (m.fd < 0)
            continue;
        if (negotiate(&m))
            served = put(&m, 'Q', NULL, 0) && get(&m) == CLOSED;
        else
            served = !m.cut;
        close(m.fd);
        discard(&m.packet);
    }
}

static bool all_gone(struct run *run, int least)
{
    return milter_wait_sessions(run->run, 0) == 0 && atomic_load(&kept) == 0 && descriptors() <= least;
}

/* All clients have left: nothing may be left of them. */
static void check_rest(struct run *run)
{
    static int least = 1 << 30;

    tried(PAUSES);
    come_last();
    for (int patience = 2000; patience > 0 && !all_gone(run, least); patience--)
        nap(10000);
    if (milter_wait_sessions(run->run, 0) != 0)
        violation("%d sessions are left when all clients have gone", milter_wait_sessions(run->run, 0));
    if (atomic_load(&kept) != 0)
        violation("%ld pieces of memory are kept when all clients have gone", atomic_load(&kept));
    if (atomic_load(&stay) - atomic_load(&current_app) > MOST_SESSIONS)
        violation("%ld sessions were made, and not used again", atomic_load(&stay));
    if (descriptors() > least)
        violation("%d descriptors are open, and once there were %d", descriptors(), least);
    least = descriptors();
}

static void end(struct run *run, int app, int clients)
{
    const bool pause = atomic_load(&stop_clients) || chance(3) == 0;

    if (pause) {
        atomic_store(&pause_clients, true);
        while (atomic_load(&pausing) < clients && !atomic_load(&stop_clients))
            nap(1000);
        check_rest(run);
    } else if (chance(2))
        milter_wait_sessions(run->run, (int)chance(200));
    atomic_store(&run->ending, true);
    milter_end(run->run);
    if (milter_wait_handlers(run->run, 20000) != 0)
        violation("handlers do not end");
    else
        atomic_store(&run->gone, true);
    atomic_store(&current_app, 0); /* who negotiates meanwhile cannot tell with which run */
    while (take_ended(run->run) > 0)
        continue;
    if (pause)
        check_ends(app);
    atomic_store(&pause_clients, false);
}

static void report(int app, bool complete)
{
    fprintf(stderr,
            "%d runs, %lu connections, %lu messages (%lu passed, %lu refusals), %lu connections cut, %lu timed out, "
            "%lu entries, %lu late uses (%lu expired), %lu faults, %lu of disks\n",
            app, atomic_load(&connections), atomic_load(&messages), atomic_load(&passed),
            atomic_load(&refused), atomic_load(&cut), atomic_load(&timeouts), atomic_load(&entries),
            atomic_load(&late_done), atomic_load(&late_expired), atomic_load(&faults), atomic_load(&disk_faults));
    for (int way = 0; way < WAYS; way++)
        fprintf(stderr, "%s%s: %lu", way > 0 ? ", " : "", way_names[way], atomic_load(&ways[way]));
    fprintf(stderr, "\n");
    for (int way = 0; way < WAYS; way++)
        if (complete && atomic_load(&ways[way]) == 0)
            violation("%s: not tried", way_names[way]);
    fprintf(stderr, "%u violations, %u hangs\n", atomic_load(&violations), atomic_load(&hangs));
    fflush(stderr);
}

/* libmilter, listening. */
static bool serve(int wake_fd)
{
    char connection[80];

    snprintf(path, sizeof path, "/tmp/stress-%d.sock", (int)getpid());
    snprintf(connection, sizeof connection, "unix:%s", path);
    return milter_register("stress") == MI_SUCCESS && smfi_setconn(connection) == MI_SUCCESS &&
           smfi_setbacklog(256) == MI_SUCCESS && smfi_opensocket(true) == MI_SUCCESS && milter_serve(wake_fd) == 0;
}

static void prepare(void)
{
    for (size_t i = 0; i < CLIENTS * REMEMBERED; i++) {
        pthread_mutex_init(&message_transcripts[i].lock, NULL);
        pthread_mutex_init(&connection_transcripts[i].lock, NULL);
    }
    for (size_t i = 0; i < POOL; i++)
        pool[i] = (char)chance(256);
}

int main(int argc, char **argv)
{
    const double duration = argc > 1 ? atof(argv[1]) : 10;
    const int clients = argc > 2 && atoi(argv[2]) <= CLIENTS ? atoi(argv[2]) : 16;
    int wake[2], app = 0;
    pthread_t *threads = __real_calloc((size_t)clients, sizeof *threads), lates[LATE_THREADS];
    struct timespec begun, now;

    atomic_store(&seeds, (unsigned long)(argc > 3 ? atol(argv[3]) : getpid()) * 1000);
    with_faults = argc > 4 && atoi(argv[4]) != 0;
    terminated = argc > 5 && atoi(argv[5]) != 0;
    idle = argc > 6 && atoi(argv[6]) != 0;
    if (idle)
        smfi_settimeout(1);
    signal(SIGPIPE, SIG_IGN);
    prepare();
    snprintf(spool_directory, sizeof spool_directory, "/tmp/stress-spool-XXXXXX");
    if (mkdtemp(spool_directory) == NULL || pipe(wake) != 0 || !serve(wake[1])) {
        fprintf(stderr, "libmilter does not start\n");
        return 2;
    }
    clock_gettime(CLOCK_MONOTONIC, &begun);
    struct run *run = begin(++app);
    for (int i = 0; i < clients; i++)
        pthread_create(&threads[i], NULL, client, (void *)(uintptr_t)i);
    for (int i = 0; i < LATE_THREADS; i++)
        pthread_create(&lates[i], NULL, late, NULL);

    do { /* runs of a filter, most of them ended under load */
        seconds(0.1 + chance(500) / 1000.0);
        for (int patience = 1000; run->seldom && atomic_load(&ways[ENDED_ENOUGH]) == 0 && patience > 0; patience--)
            nap(10000);
        end(run, app, clients);
        run = begin(++app);
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while ((double)(now.tv_sec - begun.tv_sec) < duration && atomic_load(&violations) < 20 && app < RUNS - 1);

    atomic_store(&stop_clients, true);
    for (int i = 0; i < clients; i++)
        pthread_join(threads[i], NULL);
    end(run, app, 0);
    atomic_store(&stop_all, true);
    for (int i = 0; i < LATE_THREADS; i++)
        pthread_join(lates[i], NULL);
    struct pollfd ready = {wake[0], POLLIN, 0};
    if (poll(&ready, 1, 0) != 0)
        violation("libmilter stopped");
    unlink(path);
    if (rmdir(spool_directory) != 0)
        violation("%s: %s", spool_directory, strerror(errno));
    report(app, duration >= 3 && atomic_load(&violations) == 0);
    __real_free(threads);
    return atomic_load(&violations) != 0;
}
