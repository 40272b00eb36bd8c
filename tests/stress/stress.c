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
 * What is checked, by the stand-in (S) and by the clients (C):
 *   S  a log parses to its last byte, and its events are in order
 *   S  at most one abort for a message, and none after its decision
 *   S  nothing enters after the gate was closed and the last handler had returned
 *   S  a context acts only while its call goes on
 *   C  an answer comes exactly where one was agreed (a missing one is a hang)
 *   C  a message is accepted or discarded only by a verdict of the stand-in, and never once something failed
 *   C  a reply's text belongs to the message that is refused
 *   C  nothing stands between two parts of a new body
 */
#define _GNU_SOURCE
#include "milter_shim.h"

#include <arpa/inet.h>
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
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { CONVERSATIONS = 1 << 16, MESSAGES = 1 << 22, CONTEXTS = 512, LATE_THREADS = 3, PATIENCE = 60000, RUNS = 100000 };
enum { FAILED = 1, ACCEPTED = 2, DISCARDED = 4, PASSED = 8, BLIND = 16 };

static atomic_bool stop_clients, stop_all;
static atomic_uint violations, hangs;
static atomic_ulong messages = 1000; /* garbage has lower numbers */
static atomic_ulong entries, sessions_made, late_done, late_expired, passed, refused, aborts, cut, timeouts, faults;
static atomic_uchar fate[MESSAGES]; /* by the number of the message */
static atomic_bool gone[RUNS];      /* by the number of the run: nothing may enter */
static atomic_int wanted_eom[RUNS];
static bool with_faults, idle, terminated; /* terminated: garbage ends with NUL, as libmilter takes for granted */
static char path[64];

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

/* ---- Memory that runs out: the linker sends the shim's allocations here (--wrap) -------- */

void *__real_realloc(void *, size_t);
void *__real_calloc(size_t, size_t);
void *__wrap_realloc(void *old, size_t size);
void *__wrap_calloc(size_t n, size_t size);

static bool runs_out(void)
{
    if (!with_faults || atomic_load(&stop_clients) || chance(300) != 0)
        return false;
    atomic_fetch_add(&faults, 1);
    return true;
}

void *__wrap_realloc(void *old, size_t size)
{
    return runs_out() ? NULL : __real_realloc(old, size);
}

void *__wrap_calloc(size_t n, size_t size)
{
    return runs_out() ? NULL : __real_calloc(n, size);
}

static const unsigned long no_reply[MILTER_STAGES] = {
    SMFIP_NR_CONN, SMFIP_NR_HELO, SMFIP_NR_MAIL, SMFIP_NR_RCPT, SMFIP_NR_DATA,
    SMFIP_NR_HDR,  SMFIP_NR_EOH,  SMFIP_NR_BODY, 0,             SMFIP_NR_UNKN,
};

/* ---- Contexts that are used late, by other threads -------------------------------------- */

struct context {
    struct milter_session *session;
    uint64_t token;
    atomic_bool over; /* the next call of this session has begun, so this one's has ended for sure */
    atomic_int users;
};
static struct context *_Atomic contexts[CONTEXTS];

static int act(struct milter_session *session, uint64_t token)
{
    char buffer[64];
    unsigned long actions, steps;

    switch (chance(10)) {
    case 0: return milter_macro(session, token, "i", buffer, sizeof buffer);
    case 1: return milter_macro(session, token, "{auth_authen}", buffer, chance(3));
    case 2: return milter_granted(session, token, &actions, &steps);
    case 3: return milter_add_header(session, token, "X-Stress", "value");
    case 4: return milter_insert_header(session, token, 1, "X-Stress", "value");
    case 5: return milter_change_header(session, token, "Subject", 1, chance(2) ? NULL : "changed");
    case 6: return milter_add_recipient(session, token, "<a@b>", chance(2) ? NULL : "NOTIFY=NEVER");
    case 7: return milter_send_body(session, token, "body\r\n", chance(7));
    case 8: return milter_quarantine(session, token, "reason");
    default: return milter_progress(session, token);
    }
}

static void *late(void *unused)
{
    (void)unused;
    while (!atomic_load(&stop_all)) {
        struct context *context = atomic_load(&contexts[chance(CONTEXTS)]);
        if (context == NULL) {
            nap(100);
            continue;
        }
        const bool over = atomic_load(&context->over);
        const int result = act(context->session, context->token);
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

/* ---- The stand-in for Python ------------------------------------------------------------- */

struct conversation {
    uint64_t number;
    bool client, in_message, shaky, owes, open, failed; /* failed: outside a message, so for ever */
    unsigned message;
    struct context *last;
};
static struct conversation conversations[CONVERSATIONS];
static atomic_int silent_stages[RUNS];

static struct conversation *conversation_of(uint64_t number)
{
    struct conversation *c = &conversations[number % CONVERSATIONS];

    if (c->number != number) {
        memset(c, 0, sizeof *c);
        c->number = number;
        c->shaky = with_faults;
    }
    return c;
}

static void mark(unsigned message, unsigned char what)
{
    atomic_fetch_or(&fate[message % MESSAGES], what);
}

static const char *field(const char **at, const char *end)
{
    const char *start = *at, *nul = start < end ? memchr(start, 0, (size_t)(end - start)) : NULL;

    if (nul == NULL)
        return NULL;
    *at = nul + 1;
    return start;
}

/* False: the log is broken, as it may be when memory ran out. */
static bool replay(struct conversation *c, const char *log, size_t size, size_t chunk)
{
    const char *at = log, *end = log + size, *f, *g;

    while (at < end) {
        const char *letter = field(&at, end);
        if (letter == NULL || letter[1] != 0)
            return false;
        switch (*letter) {
        case 'C':
            for (int i = 0; i < 4; i++)
                if (field(&at, end) == NULL)
                    return false;
            c->client = true;
            break;
        case 'H':
        case 'U':
            if (field(&at, end) == NULL)
                return false;
            break;
        case 'M':
        case 'R': {
            if ((f = field(&at, end)) == NULL)
                return false;
            const int count = atoi(f);
            if (count < 1)
                return false;
            for (int i = 0; i < count; i++) {
                if ((g = field(&at, end)) == NULL)
                    return false;
                if (i == 0 && *letter == 'M') {
                    c->message = (unsigned)atoi(g + 1);
                    c->in_message = true;
                    c->shaky = c->failed || with_faults;
                    c->owes = false;
                } else if (i == 0 && !c->in_message && !c->shaky)
                    violation("R without a message");
            }
            break;
        }
        case 'L':
            if (field(&at, end) == NULL || field(&at, end) == NULL)
                return false;
            /* fall through */
        case 'T':
        case 'N':
        case 'B':
        case 'E':
            if (*letter == 'B' && at != end)
                violation("B is not the last record");
            if (*letter == 'B' && chunk == 0 )
                violation("B without a chunk");
            if (!c->in_message && !c->shaky)
                violation("%c without a message", *letter);
            break;
        case 'A':
            if (!c->in_message && !c->shaky)
                violation("A without a message: aborted twice, or after the decision");
            atomic_fetch_add(&aborts, 1);
            c->in_message = c->owes = false;
            break;
        case 'X':
            c->in_message = c->owes = false;
            break;
        case 'Q':
            if (c->in_message && !c->shaky && c->message >= 1000)
                violation("Q within message %u", c->message);
            c->open = false;
            break;
        default:
            return false;
        }
    }
    return true;
}

int milter_python_negotiate(struct milter_session *session, uint64_t token, uint64_t number, int app,
                            unsigned long offered_actions, unsigned long offered_steps, unsigned long *actions,
                            unsigned long *steps)
{
    (void)session, (void)number, (void)offered_actions, (void)offered_steps, (void)steps;
    if (atomic_load(&gone[app]))
        violation("negotiate entered after the gate");
    if (chance(50) == 0)
        return 0;
    if (chance(4) == 0)
        *actions &= ~(unsigned long)SMFIF_CHGBODY;
    if ((*actions & SMFIF_SETSYMLIST) != 0)
        milter_request_macros(session, token, SMFIM_ENVFROM, "i j");
    return MILTER_ANSWERED;
}

static void remember(struct conversation *c, struct milter_session *session, uint64_t token)
{
    /* Contexts are never freed (the late threads look at them): a few, used again and again, would hide races. */
    struct context *context = malloc(sizeof *context);
    context->session = session;
    context->token = token;
    atomic_init(&context->over, false);
    atomic_init(&context->users, 0);
    c->last = context;
    atomic_store(&contexts[chance(CONTEXTS)], context);
}

static int set_reply(struct conversation *c, struct milter_session *session, uint64_t token, bool reject)
{
    char line[4][64];
    char *lines[4];
    const size_t count = 1 + chance(4);

    for (size_t i = 0; i < count; i++) {
        snprintf(line[i], sizeof line[i], "message %u", c->message);
        lines[i] = line[i];
    }
    return milter_set_reply(session, token, reject ? "554" : "451", chance(2) ? NULL : reject ? "5.7.1" : "4.7.1",
                            lines, count);
}

int milter_python_enter(struct milter_session *session, uint64_t token, uint64_t number, int app, int stage,
                        const char *log, size_t log_size, const char *chunk, size_t chunk_size)
{
    struct conversation *c = conversation_of(number);
    const bool silent = (atomic_load(&silent_stages[app]) >> stage & 1) != 0;
    volatile unsigned char sum = 0;

    atomic_fetch_add(&entries, 1);
    if (atomic_load(&gone[app]))
        violation("entered after the gate");
    if (c->last != NULL)
        atomic_store(&c->last->over, true);
    c->last = NULL;
    c->open = true;
    for (size_t i = 0; i < chunk_size; i++)
        sum = (unsigned char)(sum + (unsigned char)chunk[i]);
    if (chance(80) == 0) { /* the engine crashed before it read the log */
        if (c->in_message)
            mark(c->message, FAILED);
        c->shaky = c->failed = true;
        return 0;
    }
    if (!replay(c, log, log_size, chunk_size)) {
        if (!with_faults)
            violation("a log that cannot be read, stage %d", stage);
        c->shaky = true;
        mark(c->message, FAILED);
        return 0;
    }
    if (chance(20) == 0 && stage != MILTER_CLOSE)
        remember(c, session, token);
    for (unsigned n = chance(4); n > 0 && stage == MILTER_EOM; n--) {
        const int result = act(session, token);
        if (result == MILTER_EXPIRED)
            violation("a call that goes on is said to be over");
    }
    if (chance(30) == 0)
        nap(chance(3000));
    if (chance(40) == 0) { /* the engine crashed */
        if (c->in_message)
            mark(c->message, FAILED);
        c->shaky = c->failed = true;
        return 0;
    }
    if (stage == MILTER_ABORT || stage == MILTER_CLOSE)
        return MILTER_ANSWERED;

    int answer = MILTER_ANSWERED | (c->in_message && chance(4) == 0 ? MILTER_TRACKS : 0);
    if (c->owes && !silent) {
        if (stage != MILTER_RCPT && stage != MILTER_UNKNOWN && stage != MILTER_CONNECT && stage != MILTER_HELO)
            c->in_message = false;
        return answer | MILTER_OWED | SMFIS_TEMPFAIL;
    }
    if (silent) {
        if (c->in_message && chance(50) == 0) {
            c->owes = true;
            mark(c->message, FAILED);
        }
        return answer | (c->owes ? MILTER_OWED : 0) | SMFIS_CONTINUE;
    }
    switch (chance(stage == MILTER_EOM ? 5 : 25)) {
    case 0: {
        const bool reject = chance(2) == 0;
        if (!c->shaky && chance(2) == 0 && set_reply(c, session, token, reject) != MILTER_OK && !with_faults)
            violation("a reply was refused");
        if (stage >= MILTER_MAIL && stage <= MILTER_EOM && stage != MILTER_RCPT)
            c->in_message = false;
        return answer | (reject ? SMFIS_REJECT : SMFIS_TEMPFAIL);
    }
    case 1:
        if (stage >= MILTER_MAIL && stage <= MILTER_EOM) {
            mark(c->message, ACCEPTED);
            c->in_message = false;
            return answer | SMFIS_ACCEPT;
        }
        break;
    case 2:
        if (stage >= MILTER_MAIL && stage <= MILTER_EOM && chance(2)) {
            mark(c->message, DISCARDED);
            c->in_message = false;
            return answer | SMFIS_DISCARD;
        }
        break;
    case 3:
        if (stage != MILTER_EOM)
            return answer | SMFIS_SKIP;
        break;
    case 4:
        if (chance(10) == 0) { /* no verdict at all */
            c->shaky = true;
            if (c->in_message && stage != MILTER_RCPT && stage != MILTER_UNKNOWN)
                mark(c->message, FAILED);
            return answer | 77;
        }
        break;
    }
    if (stage == MILTER_EOM) {
        mark(c->message, PASSED);
        if (!c->client)
            mark(c->message, BLIND);
        c->in_message = false;
    }
    return answer | SMFIS_CONTINUE;
}

/* ---- The MTA's side ----------------------------------------------------------------------- */

struct mta {
    int fd;
    unsigned version;
    unsigned long steps, actions;
    unsigned message;
    int run;
    bool ended; /* closed by the filter, or cut by us */
};

static bool put(struct mta *m, char command, const void *data, size_t size)
{
    unsigned char *packet = malloc(size + 5);
    const uint32_t length = htonl((uint32_t)size + 1);
    bool sent = true;

    memcpy(packet, &length, 4);
    packet[4] = (unsigned char)command;
    if (size > 0)
        memcpy(packet + 5, data, size);
    size += 5;
    if (chance(3000) == 0) { /* the connection drops anywhere, also within a packet */
        size = chance((unsigned)size);
        m->ended = true;
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
    free(packet);
    return sent && !m->ended;
}

/* The answer's letter; 0: the filter closed the connection. */
static char get(struct mta *m, char *data, size_t room)
{
    unsigned char head[5];
    size_t have = 0, size = 5, length = 0;
    unsigned char *where = head, *body = NULL;

    for (;;) {
        while (have < size) {
            struct pollfd ready = {m->fd, POLLIN, 0};
            if (poll(&ready, 1, PATIENCE) == 0) {
                atomic_fetch_add(&hangs, 1);
                free(body);
                m->ended = true;
                return '?';
            }
            const ssize_t n = recv(m->fd, where + have, size - have, 0);
            if (n <= 0) {
                free(body);
                m->ended = true;
                return 0;
            }
            have += (size_t)n;
        }
        if (where != head)
            break;
        uint32_t raw;
        memcpy(&raw, head, 4);
        length = ntohl(raw) - 1;
        if (length > 1 << 20) {
            violation("an answer of %zu bytes", length);
            m->ended = true;
            return 0;
        }
        if (length == 0)
            break;
        where = body = malloc(length + 1);
        have = 0;
        size = length;
    }
    if (room > 0) {
        const size_t n = length < room - 1 ? length : room - 1;
        if (n > 0)
            memcpy(data, body, n);
        data[n] = 0;
    }
    free(body);
    return (char)head[4];
}

enum outcome { ON, DECIDED, OVER };

/* Take the answer of one stage, and judge it. */
static enum outcome judge(struct mta *m, unsigned long silent, char stage)
{
    char text[256];
    bool in_body = false, body_over = false, faked = false;

    if ((m->steps & silent) != 0)
        return ON;
    /* An MTA that wants answers everywhere gets libmilter's own "continue" where the filter gives none. */
    for (int i = 0; i < MILTER_STAGES; i++)
        faked = faked || ((no_reply[i] & silent) != 0 && (atomic_load(&silent_stages[m->run]) >> i & 1) != 0);
    for (;;) {
        const char letter = get(m, text, sizeof text);
        const unsigned char f = atomic_load(&fate[m->message % MESSAGES]);
        const bool in_message = strchr("MRTLNBE", stage) != NULL;
        if (letter == '?') {
            violation("no answer to %c of message %u", stage, m->message);
            return OVER;
        }
        if (letter == 0)
            return OVER;
        if (stage == 'E' && strchr("+2-mhiqeb", letter) != NULL) {
            if (letter == 'b') {
                if (body_over)
                    violation("a new body is interrupted");
                in_body = true;
            } else if (in_body)
                body_over = true;
            continue;
        }
        if (stage == 'E' && letter == 'p') {
            if (in_body)
                body_over = true;
            continue;
        }
        switch (letter) {
        case 'c':
            if (in_message && (f & FAILED) != 0 && !faked)
                violation("%c of message %u goes on, though something failed", stage, m->message);
            if (stage == 'E' && (f & BLIND) != 0)
                violation("message %u passes by handlers that never heard of its client", m->message);
            if (stage == 'E' && (f & PASSED) == 0 && atomic_load(&wanted_eom[m->run]))
                violation("message %u passes without a verdict", m->message);
            if (stage == 'E')
                atomic_fetch_add(&passed, 1);
            return stage == 'E' ? DECIDED : ON;
        case 's':
            if (stage != 'B')
                violation("skip in %c", stage);
            return ON;
        case 'a':
            if (in_message && ((f & ACCEPTED) == 0 || (f & FAILED) != 0))
                violation("%c of message %u accepted by nobody (%x)", stage, m->message, f);
            return stage == 'U' ? ON : DECIDED;
        case 'd':
            if (in_message && ((f & DISCARDED) == 0 || (f & FAILED) != 0))
                violation("%c of message %u discarded by nobody (%x)", stage, m->message, f);
            return DECIDED;
        case 'y': {
            char mine[32];
            snprintf(mine, sizeof mine, "message %u", m->message);
            if (in_message && strstr(text, mine) == NULL)
                violation("%c of message %u refused with the reply of another: %s", stage, m->message, text);
        } /* fall through */
        case 'r':
        case 't':
            atomic_fetch_add(&refused, 1);
            return stage == 'R' || stage == 'U' || stage == 'C' || stage == 'H' ? ON : DECIDED;
        default:
            violation("an answer %02x to %c", letter, stage);
            return OVER;
        }
    }
}

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
    if (m->version < 3 || !sends(m, SMFIP_NOUNKNOWN) || chance(odds) != 0)
        return ON;
    if (!put(m, 'U', "XFOO", 5))
        return OVER;
    return judge(m, SMFIP_NR_UNKN, 'U');
}

/* One message; OVER when the connection is gone. */
static enum outcome message(struct mta *m, int run)
{
    char data[300];
    const bool whole = chance(20) != 0; /* or give up anywhere */
    enum outcome o;

    m->message = (unsigned)atomic_fetch_add(&messages, 1);
    atomic_store(&fate[m->message % MESSAGES], 0);
    m->run = run;
#define STEP(expression)                                                                           \
    do {                                                                                           \
        if ((o = (expression)) != ON)                                                              \
            goto end;                                                                              \
        if (!whole && chance(6) == 0)                                                              \
            goto end;                                                                              \
    } while (0)
    macros(m, 'M');
    int n = snprintf(data, sizeof data, "<%u@client>%cSIZE=1", m->message, 0) + 1;
    if (!put(m, 'M', data, (size_t)n))
        return OVER;
    STEP(judge(m, SMFIP_NR_MAIL, 'M'));
    STEP(unknown(m, 20));
    for (unsigned i = 0, count = chance(50) == 0 ? 900 : 1 + chance(3); i < count; i++) {
        macros(m, 'R');
        n = snprintf(data, sizeof data, "<rcpt%u-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa@server>", i) + 1;
        if (!put(m, 'R', data, (size_t)n))
            return OVER;
        STEP(judge(m, SMFIP_NR_RCPT, 'R'));
    }
    STEP(unknown(m, 20));
    if (m->version >= 4 && sends(m, SMFIP_NODATA)) {
        if (!put(m, 'T', NULL, 0))
            return OVER;
        if (idle && chance(20) == 0)
            seconds(4); /* libmilter's controller closes the session in the middle of the message */
        struct pollfd closed = {m->fd, POLLIN, 0};
        if (idle && poll(&closed, 1, 0) == 1 && recv(m->fd, data, 1, MSG_PEEK) == 0)
            atomic_fetch_add(&timeouts, 1);
        STEP(judge(m, SMFIP_NR_DATA, 'T'));
    }
    if (sends(m, SMFIP_NOHDRS))
        for (unsigned i = chance(50) == 0 ? 500 : chance(6); i > 0; i--) {
            n = snprintf(data, sizeof data, "Received%c%0*d", 0, (int)chance(200) + 1, 1) + 1;
            if (!put(m, 'L', data, (size_t)n))
                return OVER;
            STEP(judge(m, SMFIP_NR_HDR, 'L'));
        }
    if (sends(m, SMFIP_NOEOH)) {
        if (!put(m, 'N', NULL, 0))
            return OVER;
        STEP(judge(m, SMFIP_NR_EOH, 'N'));
    }
    if (sends(m, SMFIP_NOBODY))
        for (unsigned i = chance(4); i > 0; i--) {
            static const char body[65535];
            if (!put(m, 'B', body, chance(30) == 0 ? sizeof body : 1 + chance(3000)))
                return OVER;
            STEP(judge(m, SMFIP_NR_BODY, 'B'));
        }
    macros(m, 'E');
    if (!put(m, 'E', NULL, 0))
        return OVER;
    o = judge(m, 0, 'E');
end:
    if (o == ON || (o == DECIDED && chance(3) == 0))
        for (unsigned i = 1 + chance(2); i > 0; i--)
            if (!put(m, 'A', NULL, 0))
                return OVER;
    return o == OVER ? OVER : ON;
}

static bool negotiate(struct mta *m, bool any_version)
{
    static const unsigned long offers[] = {0, 0, 0x7f, 0x17f, 0x37f, 0x37f, 0x1fffff};
    uint32_t offer[3], answer[64];

    m->version = any_version ? 2 + chance(5) : 6;
    if (m->version == 5)
        m->version = 6;
    offer[0] = htonl(m->version);
    offer[1] = htonl(m->version == 6 ? 0x1ff : 0x3f);
    offer[2] = htonl((uint32_t)offers[m->version]);
    if (!put(m, 'O', offer, sizeof offer))
        return false;
    if (get(m, (char *)answer, sizeof answer) != 'O')
        return false;
    m->actions = ntohl(answer[1]);
    m->steps = ntohl(answer[2]);
    return true;
}

static atomic_int current_app;

static bool greet(struct mta *m)
{
    char data[64];
    int n;

    macros(m, 'C');
    switch (chance(4)) {
    case 0: n = snprintf(data, sizeof data, "host%c6%c%c::1", 0, 1, 1) + 1; break;
    case 1: n = snprintf(data, sizeof data, "host%cU", 0); data[n++] = 0; data[n++] = 0; break;
    case 2: n = snprintf(data, sizeof data, "host%cL%c%c/path", 0, 1, 1) + 1; break;
    default: n = snprintf(data, sizeof data, "host%c4%c%c192.0.2.1", 0, 1, 1) + 1; break;
    }
    if (!put(m, 'C', data, (size_t)n) || judge(m, SMFIP_NR_CONN, 'C') == OVER)
        return false;
    for (unsigned i = chance(3); i > 0; i--) {
        macros(m, 'H');
        if (!put(m, 'H', "helo", 5) || judge(m, SMFIP_NR_HELO, 'H') == OVER)
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

    if (chance(4) != 0 && !negotiate(m, true))
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

static void *client(void *unused)
{
    (void)unused;
    while (!atomic_load(&stop_clients)) {
        struct mta m = {.fd = call_filter()};
        if (m.fd < 0) {
            nap(1000);
            continue;
        }
        atomic_fetch_add(&sessions_made, 1);
        if (chance(8) == 0) {
            garbage(&m);
            close(m.fd);
            continue;
        }
        const int run = atomic_load(&current_app);
        if (run != 0 && negotiate(&m, true) && atomic_load(&current_app) == run && greet(&m)) {
            bool again = true;
            while (again && !m.ended && !atomic_load(&stop_clients)) {
                enum outcome o = ON;
                for (unsigned i = chance(5); i > 0 && o == ON; i--)
                    o = message(&m, run);
                again = o == ON && chance(2) == 0 && message(&m, run) == ON;
                if (again) { /* libmilter understands QUIT_NC only after the end of a message or an unknown command */
                    again = m.version >= 3 && sends(&m, SMFIP_NOUNKNOWN) && unknown(&m, 1) == ON &&
                            put(&m, 'K', NULL, 0) && (nap(chance(2000)), greet(&m));
                }
            }
            if (!m.ended && put(&m, 'Q', NULL, 0)) {
                const char letter = get(&m, NULL, 0);
                if (letter != 0 && letter != '?')
                    violation("an answer %02x after QUIT", letter);
                if (letter == '?')
                    violation("QUIT did not close the connection");
            }
        }
        close(m.fd);
    }
    return NULL;
}

/* ---- The process --------------------------------------------------------------------------- */


/* A plan as plan.py makes them, of any set of handlers. */
static struct milter_run *begin(int app)
{
    struct milter_plan plan = {.app = app, .actions = 0x1ff & ~(unsigned long)SMFIF_SETSYMLIST};
    bool handled[MILTER_STAGES];
    int silent = 0;

    for (int stage = 0; stage < MILTER_STAGES; stage++) {
        handled[stage] = chance(2) != 0 || stage == MILTER_EOM;
        const bool remembered = stage <= MILTER_RCPT;
        plan.mode[stage] = handled[stage] ? MILTER_ENTER : remembered ? MILTER_RECORD : MILTER_IGNORE;
        if (no_reply[stage] != 0 && (!handled[stage] || chance(3) == 0)) {
            silent |= 1 << stage;
            plan.steps |= no_reply[stage];
        }
    }
    if (!handled[MILTER_UNKNOWN])
        plan.steps |= SMFIP_NOUNKNOWN | (handled[MILTER_DATA] ? 0 : SMFIP_NODATA);
    if (!handled[MILTER_HEADER])
        plan.steps |= SMFIP_NOHDRS | (handled[MILTER_EOH] ? 0 : SMFIP_NOEOH);
    if (!handled[MILTER_BODY])
        plan.steps |= SMFIP_NOBODY;
    else if ((silent >> MILTER_BODY & 1) == 0)
        plan.steps |= SMFIP_SKIP;
    plan.negotiates = chance(3) == 0;
    if (chance(2))
        plan.macros[SMFIM_ENVFROM] = "i j {auth_authen}";
    atomic_store(&silent_stages[app], silent);
    atomic_store(&wanted_eom[app], 1);
    return milter_begin(&plan);
}


static long resident(void)
{
    long pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");

    if (file != NULL) {
        if (fscanf(file, "%*d %ld", &pages) != 1)
            pages = 0;
        fclose(file);
    }
    return pages * 4;
}

int main(int argc, char **argv)
{
    const double duration = argc > 1 ? atof(argv[1]) : 10;
    const int clients = argc > 2 ? atoi(argv[2]) : 16;
    int wake[2], app = 0;
    pthread_t *threads = calloc((size_t)clients, sizeof *threads), lates[LATE_THREADS];
    struct timespec begun, now;

    atomic_store(&seeds, (unsigned long)(argc > 3 ? atol(argv[3]) : getpid()) * 1000);
    with_faults = argc > 4 && atoi(argv[4]) != 0;
    terminated = argc > 5 && atoi(argv[5]) != 0;
    idle = argc > 6 && atoi(argv[6]) != 0;
    if (idle)
        smfi_settimeout(1);
    signal(SIGPIPE, SIG_IGN);
    snprintf(path, sizeof path, "/tmp/stress-%d.sock", (int)getpid());
    char connection[80];
    snprintf(connection, sizeof connection, "unix:%s", path);
    if (pipe(wake) != 0 || milter_register("stress") != MI_SUCCESS || smfi_setconn(connection) != MI_SUCCESS ||
        smfi_setbacklog(256) != MI_SUCCESS || smfi_opensocket(true) != MI_SUCCESS || milter_serve(wake[1]) != 0) {
        fprintf(stderr, "libmilter does not start\n");
        return 2;
    }
    clock_gettime(CLOCK_MONOTONIC, &begun);
    struct milter_run *run = begin(++app);
    atomic_store(&current_app, app);
    for (int i = 0; i < clients; i++)
        pthread_create(&threads[i], NULL, client, NULL);
    for (int i = 0; i < LATE_THREADS; i++)
        pthread_create(&lates[i], NULL, late, NULL);

    do { /* runs of a filter, each ended under load */
        seconds(0.2 + chance(1000) / 1000.0);
        if (chance(2))
            milter_wait_sessions(run, (int)chance(200));
        milter_end(run);
        if (milter_wait_handlers(run, 20000) != 0)
            violation("handlers do not end");
        else
            atomic_store(&gone[app], true);
        run = NULL;
        atomic_store(&current_app, 0); /* who negotiates meanwhile cannot tell with which run */
        while (run == NULL) /* memory may run out here, too */
            run = begin(++app);
        atomic_store(&current_app, app);
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while ((double)(now.tv_sec - begun.tv_sec) < duration && atomic_load(&violations) < 20 && app < RUNS - 100);

    atomic_store(&stop_clients, true);
    for (int i = 0; i < clients; i++)
        pthread_join(threads[i], NULL);
    const int open_sessions = milter_wait_sessions(run, 20000);
    if (open_sessions != 0)
        violation("%d sessions are left when all clients have gone", open_sessions);
    milter_end(run);
    if (milter_wait_handlers(run, 20000) != 0)
        violation("handlers do not end");
    atomic_store(&gone[app], true);
    atomic_store(&stop_all, true);
    for (int i = 0; i < LATE_THREADS; i++)
        pthread_join(lates[i], NULL);
    struct pollfd ready = {wake[0], POLLIN, 0};
    if (poll(&ready, 1, 0) != 0)
        violation("libmilter stopped");
    unlink(path);
    fprintf(stderr,
            "%d runs, %lu connections, %lu messages (%lu passed, %lu refusals, %lu aborts), %lu connections cut, %lu timed out, "
            "%lu entries, %lu late uses (%lu expired), %lu faults, %ld KiB: %u violations, %u hangs\n",
            app, atomic_load(&sessions_made), atomic_load(&messages), atomic_load(&passed), atomic_load(&refused),
            atomic_load(&aborts), atomic_load(&cut), atomic_load(&timeouts), atomic_load(&entries), atomic_load(&late_done),
            atomic_load(&late_expired), atomic_load(&faults), resident(), atomic_load(&violations),
            atomic_load(&hangs));
    fflush(stderr);
    free(threads);
    return atomic_load(&violations) != 0;
}
