/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The shim between libmilter and Python: it records what the MTA says, and
 * calls Python only where a handler has something to say.
 *
 * The way of an event
 *
 *   1. A packet has come. The scheduler's leader runs libmilter's engine for its session
 *      (scheduler.c), which takes the packet (packets.c), and calls one of the thirteen
 *      functions that milter_register registered, say on_header. Where libmilter is linked
 *      as it is, its own thread does.
 *   2. The function appends a record to the session's log, and content that
 *      on_message wants to the gathered message (content.c). Nobody else touches
 *      either: a session is served by one thread at a time.
 *   3. conclude() looks at the plan. Does no handler want this stage, or do its
 *      handlers only observe, the event waits in the log for a later call, and
 *      libmilter gets its answer here.
 *   4. Otherwise enter_python() passes the gate, gives the session a token, and calls
 *      milter_python_enter with the whole log. This takes the GIL. While it lasts, another
 *      thread may take the lead, and serve other sessions.
 *   5. Handlers act through the functions under "The session" in the header.
 *      Each takes the session's lock, and does nothing unless its token is the
 *      session's: the call that a context was made for is still going on.
 *   6. Back in C, the token is withdrawn (which waits for an action that another
 *      thread has under way), the log is emptied, the changes that Python left
 *      behind are sent (changes.c), and the verdict is checked.
 *   7. conclude() turns it into libmilter's answer. Whatever went wrong on the
 *      way is a temporary failure, never "continue".
 *
 * Memory
 *
 *   A session struct is made when an MTA negotiates, and goes to a list of free
 *   ones at the end of the connection: it is never given back to malloc, so the
 *   lock and the token of a session can be looked at for ever, by whoever kept a
 *   context too long. Tokens are never used twice. A run lives for ever (a few
 *   hundred bytes for each start of a filter in this process).
 *
 * Locks
 *
 *   session->lock   token, ctx and every smfi_* call that Python asks for.
 *   registry_lock   the free list, the ring of closed sessions, and each run's
 *                   list of ended ones.
 *   No function holds both. Python is never entered with either.
 *
 * A log is a sequence of records. A record is a letter (that of the protocol's
 * command) and its fields, each of them ended by NUL:
 *
 *   C host family port address     family 4, 6, L (a path) or U (unknown)
 *   H name
 *   M count argument...            count in decimal
 *   R count argument...
 *   T, N, E, A, Q                  data, end of header, end of message, abort, close
 *   L name value
 *   B size                         a piece of the body: its bytes are among the chunks
 *   U command
 *   X                              the message is over, decided without Python
 */
#define _GNU_SOURCE

#include "milter_shim.h"

#include "child.h"
#include "content.h"
#include "packets.h"
#include "scheduler.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* The size of a piece of memory, where the system tells it. */
#if defined __FreeBSD__
#include <malloc_np.h>
#define MEMORY_SIZE(memory) malloc_usable_size((void *)(uintptr_t)(memory))
#elif defined __linux__
#include <malloc.h>
#define MEMORY_SIZE(memory) malloc_usable_size((void *)(uintptr_t)(memory))
#elif defined __APPLE__
#include <malloc/malloc.h>
#define MEMORY_SIZE(memory) malloc_size(memory)
#endif

enum {
    LOG_KEPT = 4096,       /* a larger log is given back once Python has read it */
    LOG_FULL = 64 * 1024,  /* a log of this size is delivered, wanted or not; the chunks of the body count */
    UNHEARD_MOST = 256,    /* ended connections of which Python has objects; with more, it is called to drop them */
    CHANGES_FIRST = 1024,  /* bytes of changes for which no memory must be asked */
    CLOSED_SESSIONS = 256, /* how many closed sessions are remembered, see resume() */
    REPLY_LINES = 32,      /* libmilter's limit of lines in a reply */
    HANG_UP = 21,          /* libmilter's _SMFIS_ABORT (engine.c): close the connection, without a reply */
    END_OF_MESSAGE = 'E'   /* the letter of that command */
};

enum failure { SOUND, MESSAGE_FAILED, CONNECTION_FAILED };
enum body { BODY_UNTOUCHED, BODY_BEGUN, BODY_ENDED };

struct milter_run {
    struct milter_plan plan;
    struct spool spool;
    struct milter_session *ended; /* under registry_lock: closed, and Python does not know it yet */
    atomic_int unheard;           /* how many those are */
    atomic_bool closed;  /* the gate: no callback enters Python any more */
    atomic_int inside;   /* callbacks in Python, or on their way */
    atomic_int sessions; /* open connections of MTAs */
    struct milter_run *next_wanted; /* under registry_lock */
};

_Static_assert(sizeof(atomic_int) == sizeof(int) && ATOMIC_INT_LOCK_FREE == 2,
               "whoever looks on reads the count of sessions as an int");

struct milter_session {
    pthread_mutex_t lock;
    /* Under the lock, since contexts in other threads look at them: */
    uint64_t token; /* of the call into Python that is going on, or 0 */
    SMFICTX *ctx;
    enum milter_stage stage;
    enum body body;
    unsigned long actions; /* SMFIF_* granted */
    unsigned long steps;   /* SMFIP_* agreed, with those that libmilter fakes */
    /* Only for the thread that serves the session: */
    struct milter_run *run;
    uint64_t number;
    int descriptor;  /* for packets.c; -1 where libmilter's packets are not ours */
    bool in_message; /* between MAIL and the message's end */
    uint64_t message_began;
    bool known;      /* Python has heard of this session */
    bool seen;       /* Python has heard of this message */
    bool owed;
    bool tracked;
    bool held;             /* Python keeps state of this session */
    bool client_unread;    /* the log holds CONNECT or HELO, which Python has not read */
    bool client_deferred;  /* the log holds events outside a message that observers wait for */
    bool message_deferred; /* the same within the message */
    bool lost; /* a part of the log is missing: Python must not judge by the rest */
    enum failure failure;
    sfsistat decision; /* of a message that ended with a piece of its body, in one packet with its end; else to go on */
    struct buffer log;
    struct buffer chunks; /* of the body, for the records B in the log */
    size_t message_mark;  /* where the message begins in the log */
    size_t record_mark;   /* where the record of this event begins */
    struct content content;
    size_t header_size; /* of the content */
    struct milter_session *next; /* in the list of free or ended ones */
};

/* What is left of a session after its end, in case the connection goes on without a negotiation. */
struct closed_session {
    SMFICTX *ctx;
    struct milter_run *run;
    unsigned long actions, steps;
};

static pthread_mutex_t registry_lock = PTHREAD_MUTEX_INITIALIZER;
static struct milter_session *free_sessions;
static struct milter_run *wanted_runs; /* that serve only who wants them */
static struct closed_session closed_sessions[CLOSED_SESSIONS];
static unsigned closed_count;

static _Atomic(struct milter_run *) current_run;
static atomic_int wanted_count; /* of those: nobody takes the lock for none */
static _Atomic uint64_t last_token;
static _Atomic uint64_t last_number;
static _Atomic size_t max_data_size = MILTER_MAX_DATA_SIZE;
static sigset_t startup_mask; /* written before libmilter's first thread, then only read */

static const unsigned long no_reply_bit[MILTER_STAGES] = {
    [MILTER_CONNECT] = SMFIP_NR_CONN, [MILTER_HELO] = SMFIP_NR_HELO,    [MILTER_MAIL] = SMFIP_NR_MAIL,
    [MILTER_RCPT] = SMFIP_NR_RCPT,    [MILTER_DATA] = SMFIP_NR_DATA,    [MILTER_HEADER] = SMFIP_NR_HDR,
    [MILTER_EOH] = SMFIP_NR_EOH,      [MILTER_BODY] = SMFIP_NR_BODY,    [MILTER_UNKNOWN] = SMFIP_NR_UNKN,
};

/* ---- Sessions: made, remembered, released ----------------------------------------------- */

/* By the thread that serves the session, without a lock. */
static void count_session(struct milter_run *run, int change)
{
    atomic_fetch_add(&run->sessions, change);
    if (run->plan.open_sessions != NULL)
        atomic_fetch_add((atomic_int *)run->plan.open_sessions, change);
}

/* By a thread of libmilter, without a lock. The caller owns the session until release(). */
static struct milter_session *new_session(SMFICTX *ctx, struct milter_run *run)
{
    pthread_mutex_lock(&registry_lock);
    struct milter_session *session = free_sessions;
    if (session != NULL)
        free_sessions = session->next;
    pthread_mutex_unlock(&registry_lock);

    if (session == NULL) {
        session = calloc(1, sizeof *session);
        if (session == NULL)
            return NULL;
        if (pthread_mutex_init(&session->lock, NULL) != 0) {
            free(session);
            return NULL;
        }
    }

    pthread_mutex_lock(&session->lock);
    session->token = 0;
    session->ctx = ctx;
    session->body = BODY_UNTOUCHED;
    session->actions = 0;
    session->steps = 0;
    pthread_mutex_unlock(&session->lock);

    session->run = run;
    session->number = atomic_fetch_add(&last_number, 1) + 1;
    session->message_began = 0;
    session->descriptor = milter_io_descriptor();
    session->in_message = session->known = session->seen = false;
    session->owed = session->tracked = session->held = false;
    session->client_unread = session->client_deferred = session->message_deferred = false;
    session->lost = false;
    session->failure = SOUND;
    session->decision = SMFIS_CONTINUE;
    session->log = session->chunks = (struct buffer){NULL, 0, 0};
    session->message_mark = session->record_mark = session->header_size = 0;
    content_init(&session->content);
    session->next = NULL;
    count_session(run, 1);
    return session;
}

/*
 * By the thread that serves the session, outside Python. The session is nobody's
 * afterwards; but one of which Python still has objects goes to the run's list of
 * ended ones: the next call into Python drops them, which costs less than a call
 * of its own at each end of a connection.
 */
static void release(struct milter_session *session)
{
    struct milter_run *run = session->run;

    milter_io_flush(session->descriptor); /* libmilter closes it under its own lock, where nothing may wait */
    pthread_mutex_lock(&session->lock);
    const struct closed_session closed = {session->ctx, run, session->actions, session->steps};
    session->ctx = NULL;
    pthread_mutex_unlock(&session->lock);
    buffer_free(&session->log);
    buffer_free(&session->chunks);
    content_clear(&session->content);

    pthread_mutex_lock(&registry_lock);
    unsigned place = closed_count % CLOSED_SESSIONS;
    for (unsigned i = 0; i < CLOSED_SESSIONS; i++) /* malloc gives the same addresses again and again */
        if (closed_sessions[i].ctx == closed.ctx)
            place = i;
    if (place == closed_count % CLOSED_SESSIONS)
        closed_count++;
    closed_sessions[place] = closed;
    const bool unheard = session->known && !atomic_load(&run->closed);
    struct milter_session **list = unheard ? &run->ended : &free_sessions;
    session->next = *list;
    *list = session;
    if (unheard)
        atomic_fetch_add(&run->unheard, 1);
    pthread_mutex_unlock(&registry_lock);

    count_session(run, -1);
}

/*
 * By a thread of libmilter, at an event that has no session: after QUIT_NC the
 * same connection begins anew, without a negotiation, while what was negotiated
 * still holds. libmilter tells a filter neither that, nor when a connection is
 * gone for good; so the last sessions that ended are remembered by their
 * context, one for each address. A peer that skips the negotiation may find what
 * another left behind there; nothing but CONNECT makes such a session sound, and
 * CONNECT libmilter takes only after a negotiation.
 */
static struct milter_session *resume(SMFICTX *ctx)
{
    struct closed_session closed = {NULL, NULL, 0, 0};

    pthread_mutex_lock(&registry_lock);
    for (unsigned i = 0; i < CLOSED_SESSIONS && closed.ctx == NULL; i++)
        if (closed_sessions[i].ctx == ctx)
            closed = closed_sessions[i];
    pthread_mutex_unlock(&registry_lock);
    if (closed.ctx == NULL)
        return NULL;

    struct milter_session *session = new_session(ctx, closed.run);
    if (session == NULL)
        return NULL;
    pthread_mutex_lock(&session->lock);
    session->actions = closed.actions;
    session->steps = closed.steps;
    pthread_mutex_unlock(&session->lock);
    session->failure = CONNECTION_FAILED; /* unless this is CONNECT: then the caller knows better */
    smfi_setpriv(ctx, session);
    return session;
}

/*
 * By each callback of libmilter but connect, abort and close. NULL: there is no
 * memory, or nothing is known of this connection. The answer is then HANG_UP: in
 * a stage that does not reply, libmilter would forget the message at any other
 * one, drop what follows, and leave the MTA waiting.
 */
static struct milter_session *session_of(SMFICTX *ctx)
{
    struct milter_session *session = smfi_getpriv(ctx);

    if (session == NULL)
        session = resume(ctx);
    if (session != NULL) {
        session->record_mark = session->log.size;
        milter_io_heard(session->descriptor);
    }
    return session;
}

/* ---- The log ---------------------------------------------------------------------------- */

/* By the thread that serves the session: something was lost; the next stage that replies says so. */
static void fail(struct milter_session *session)
{
    session->failure = session->in_message && session->failure != CONNECTION_FAILED ? MESSAGE_FAILED
                                                                                    : CONNECTION_FAILED;
}

/* By the thread that serves the session. */
static void log_bytes(struct milter_session *session, const char *bytes, size_t size)
{
    if (!buffer_append(&session->log, bytes, size)) {
        session->lost = true;
        fail(session);
    }
}

static void log_text(struct milter_session *session, const char *text)
{
    log_bytes(session, text, strlen(text) + 1);
}

static void log_number(struct milter_session *session, size_t number)
{
    char digits[24];

    snprintf(digits, sizeof digits, "%zu", number);
    log_text(session, digits);
}

static void log_arguments(struct milter_session *session, const char *letter, char **arguments)
{
    size_t n = 0;

    while (arguments[n] != NULL)
        n++;
    log_text(session, letter);
    log_number(session, n);
    for (size_t i = 0; i < n; i++)
        log_text(session, arguments[i]);
}

static void log_client(struct milter_session *session, const char *hostname, _SOCK_ADDR *address)
{
    char host[INET6_ADDRSTRLEN] = "", port[8] = "0";
    const char *family = "U", *where = host;

    if (address != NULL && address->sa_family == AF_INET) {
        const struct sockaddr_in *in = (const struct sockaddr_in *)(const void *)address;
        family = "4";
        inet_ntop(AF_INET, &in->sin_addr, host, sizeof host);
        snprintf(port, sizeof port, "%u", (unsigned)ntohs(in->sin_port));
    } else if (address != NULL && address->sa_family == AF_INET6) {
        const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)(const void *)address;
        family = "6";
        inet_ntop(AF_INET6, &in6->sin6_addr, host, sizeof host);
        snprintf(port, sizeof port, "%u", (unsigned)ntohs(in6->sin6_port));
    } else if (address != NULL && address->sa_family == AF_UNIX) {
        family = "L";
        where = ((const struct sockaddr_un *)(const void *)address)->sun_path;
    }
    log_text(session, "C");
    log_text(session, hostname);
    log_text(session, family);
    log_text(session, port);
    log_text(session, where);
}

/* After Python has read the log. */
static void empty_log(struct milter_session *session)
{
    if (session->log.capacity > LOG_KEPT)
        buffer_free(&session->log);
    buffer_free(&session->chunks);
    session->log.size = session->message_mark = 0;
    session->client_deferred = session->message_deferred = false;
}

/* Forget the events of the message, which ended without Python; it must only hear that it is over. */
static void forget_message(struct milter_session *session)
{
    session->log.size = session->message_mark;
    buffer_free(&session->chunks);
    session->message_deferred = false;
    if (session->seen)
        log_text(session, "X");
}

/* The message is over, and whoever wanted to know of it does. */
static void end_message(struct milter_session *session)
{
    session->in_message = session->seen = session->tracked = false;
    if (session->failure == MESSAGE_FAILED) {
        session->failure = SOUND;
        session->lost = false;
    }
    content_clear(&session->content);
    session->header_size = 0;
}

/* ---- Into Python and back --------------------------------------------------------------- */

/*
 * libmilter's threads have SIGHUP, SIGINT and SIGTERM blocked, and a process
 * that a handler starts would inherit that: it could not be terminated.
 */
static void adopt_signal_mask(void)
{
    static _Thread_local bool adopted;

    if (!adopted) {
        pthread_sigmask(SIG_SETMASK, &startup_mask, NULL);
        adopted = true;
    }
}

/*
 * By a thread of libmilter. The invariant of the gate: once milter_end has set
 * closed, and inside was seen to be 0, no thread is in Python or will enter it.
 * Both are sequentially consistent: either milter_end sees this thread inside,
 * or this thread sees the gate closed.
 */
static bool pass_gate(struct milter_run *run)
{
    atomic_fetch_add(&run->inside, 1);
    if (!atomic_load(&run->closed))
        return true;
    atomic_fetch_sub(&run->inside, 1);
    return false;
}

/*
 * By the thread that serves the session, before it enters Python. Returns the
 * token of the call, or 0 when the gate is closed; else end_call must follow.
 */
static uint64_t begin_call(struct milter_session *session, enum milter_stage stage)
{
    if (!pass_gate(session->run))
        return 0;
    adopt_signal_mask();
    milter_io_flush(session->descriptor); /* the MTA shall not wait for Python without need */
    session->known = true;

    const uint64_t token = atomic_fetch_add(&last_token, 1) + 1;
    pthread_mutex_lock(&session->lock);
    session->token = token;
    session->stage = stage;
    pthread_mutex_unlock(&session->lock);
    return token;
}

/* By the same thread, back from Python. Waits for an action that another thread has under way. */
static void end_call(struct milter_session *session)
{
    pthread_mutex_lock(&session->lock);
    session->token = 0;
    pthread_mutex_unlock(&session->lock);
    atomic_fetch_sub(&session->run->inside, 1);
}

/* The content is whole now: Python may read it until the call returns. */
static void show_content(struct milter_session *session, struct milter_event *event)
{
    content_finish(&session->content);
    event->content_error = session->content.error;
    event->content_size = content_size(&session->content);
    event->header_size = session->header_size;
    event->content_file = session->content.file;
    event->content = session->content.file < 0 ? session->content.memory.bytes : NULL;
}

/*
 * What Python is told in the call with this token. `chunk` is what the last record
 * of the log speaks of, if that is a piece of the body and none waits. The caller
 * gives the event a place for changes.
 */
static struct milter_event event_of(struct milter_session *session, uint64_t token, enum milter_stage stage,
                                    const void *chunk, size_t size)
{
    struct milter_event event = {
        .session = session,
        .token = token,
        .number = session->number,
        .app = session->run->plan.app,
        .stage = (int)stage,
        .message_began = session->message_began,
        .actions = session->actions,
        .steps = session->steps,
        .log = session->log.bytes,
        .log_size = session->log.size,
        .chunks = chunk != NULL ? chunk : session->chunks.bytes,
        .chunks_size = chunk != NULL ? size : session->chunks.size,
        .content_file = -1,
    };

    if (stage == MILTER_EOM)
        show_content(session, &event);
    if (atomic_load(&session->run->unheard) > 0)
        event.ended_count = milter_take_ended(session->run, event.ended, MILTER_ENDED);
    return event;
}

/* What Python left to be sent, after its call. Frees what was reserved. True: all was sent. */
static bool send_changes(struct milter_session *session, struct milter_event *event, int answer)
{
    bool sent = true;

    if ((answer & MILTER_ANSWERED) != 0 && event->changes_size > 0)
        sent = milter_send_changes(session->ctx, event->changes, event->changes_size,
                                   session->body == BODY_UNTOUCHED);
    free(event->reserved);
    return sent;
}

/*
 * By the thread that serves the session, without a lock. Returns Python's answer,
 * 0 for a failure. What Python has answered counts for the session also when its
 * changes could not be sent: then the message fails, and no more.
 */
static int enter_python(struct milter_session *session, enum milter_stage stage, const void *chunk, size_t size)
{
    const uint64_t token = session->lost ? 0 : begin_call(session, stage);
    char changes[CHANGES_FIRST];
    bool sent = true;
    int answer = 0;

    if (token != 0) {
        struct milter_event event = event_of(session, token, stage, chunk, size);
        event.changes = changes;
        event.changes_capacity = sizeof changes;
        session->seen = session->in_message;
        milter_before_python();
        answer = milter_back_from_python(milter_python_enter(&event));
        end_call(session); /* it may wait, as Python may */
        milter_after_python();
        sent = send_changes(session, &event, answer);
    }
    const bool client_lost = session->client_unread || session->client_deferred; /* and it does not come again */
    const bool answered = (answer & MILTER_ANSWERED) != 0;
    empty_log(session);
    if (!answered || !sent)
        fail(session);
    if (!answered) {
        if (client_lost)
            session->failure = CONNECTION_FAILED;
        return 0;
    }
    session->client_unread = false;
    session->owed = (answer & MILTER_OWED) != 0;
    session->tracked = (answer & MILTER_TRACKS) != 0;
    session->held = (answer & MILTER_HOLDS) != 0;
    return sent ? answer : 0;
}

/* What libmilter does not know, or does not send, is a failure: an unknown code leaves the MTA waiting. */
static sfsistat verdict_of(int answer)
{
    const int verdict = answer & 0xff;

    if ((answer & MILTER_ANSWERED) == 0)
        return SMFIS_TEMPFAIL;
    switch (verdict) {
    case SMFIS_CONTINUE:
    case SMFIS_REJECT:
    case SMFIS_DISCARD:
    case SMFIS_ACCEPT:
    case SMFIS_TEMPFAIL:
    case SMFIS_SKIP:
        return verdict;
    default:
        return SMFIS_TEMPFAIL;
    }
}

/*
 * Is the message decided, so that neither its end nor its abort concerns the
 * filter any more? Python's engine keeps the same account, in _decides().
 */
static bool ends_message(enum milter_stage stage, sfsistat verdict)
{
    if (stage == MILTER_EOM)
        return true;
    if (stage == MILTER_UNKNOWN || verdict == SMFIS_CONTINUE || verdict == SMFIS_SKIP)
        return false;
    if (stage == MILTER_RCPT) /* a refusal concerns this recipient alone */
        return verdict == SMFIS_ACCEPT || verdict == SMFIS_DISCARD;
    return true;
}

/* Keeps a piece of the body for the observers, until Python is entered. */
static void defer_chunk(struct milter_session *session, const void *chunk, size_t size)
{
    if (!buffer_append(&session->chunks, chunk, size)) {
        session->lost = true;
        fail(session);
    }
}

/* Does the event at the end of the log lead into Python, or can it wait there? */
static bool enters(const struct milter_session *session, enum milter_stage stage, size_t size)
{
    const enum milter_mode mode = session->run->plan.mode[stage];
    const bool silent = (session->steps & no_reply_bit[stage]) != 0;
    const bool waited_for = session->client_deferred || session->message_deferred || session->owed;

    return mode == MILTER_ENTER || (waited_for && !silent) || (session->tracked && stage == MILTER_EOM) ||
           session->log.size + session->chunks.size + size > LOG_FULL;
}

/*
 * By each callback, after the event was recorded; without a lock. Returns what
 * libmilter shall do. In a stage that does not reply that is always "no reply":
 * what went wrong there is kept, and answered at the next stage that replies.
 */
static sfsistat conclude(struct milter_session *session, enum milter_stage stage, const void *chunk, size_t size)
{
    const bool silent = (session->steps & no_reply_bit[stage]) != 0;
    sfsistat verdict = SMFIS_CONTINUE;
    bool told = false;

    if (stage >= MILTER_RCPT && stage <= MILTER_EOM && !session->in_message) {
        /*
         * What was said of the message before must not be said of this one, whose sender was not
         * told: Postfix has begun a message with RCPT after one that was accepted at MAIL.
         */
        session->log.size = session->record_mark;
        return silent ? SMFIS_NOREPLY : SMFIS_TEMPFAIL;
    }
    if (session->run->plan.mode[stage] == MILTER_DEFER)
        *(session->in_message ? &session->message_deferred : &session->client_deferred) = true;
    const bool wanted = enters(session, stage, size);
    if (chunk != NULL && (!wanted || session->chunks.size > 0)) {
        defer_chunk(session, chunk, size);
        chunk = NULL;
    }
    if (wanted) {
        const int answer = enter_python(session, stage, chunk, size);
        verdict = verdict_of(answer);
        told = (answer & MILTER_ANSWERED) != 0;
    }
    if (silent)
        return SMFIS_NOREPLY;
    if (session->failure != SOUND && verdict != SMFIS_REJECT) {
        told = told && verdict == SMFIS_TEMPFAIL;
        verdict = SMFIS_TEMPFAIL;
    }
    if (verdict == SMFIS_SKIP && (stage != MILTER_BODY || (session->steps & SMFIP_SKIP) == 0))
        verdict = SMFIS_CONTINUE; /* Sendmail answers a SKIP elsewhere by leaving out the body */
    if (session->in_message && ends_message(stage, verdict)) {
        if (!told)
            forget_message(session);
        end_message(session);
    }
    return verdict;
}

/* Once for each message that was begun and not decided, however often the MTA says ABORT. */
static void abort_message(struct milter_session *session)
{
    if (!session->in_message)
        return;
    if (session->run->plan.mode[MILTER_ABORT] == MILTER_ENTER || session->tracked || session->message_deferred) {
        log_text(session, "A");
        if (enter_python(session, MILTER_ABORT, NULL, 0) == 0)
            forget_message(session);
    } else {
        forget_message(session);
    }
    end_message(session);
}

/* Under registry_lock. Where the list of those who serve only who wants them has this run, or ends. */
static struct milter_run **find_wanted(unsigned long number)
{
    struct milter_run **place = &wanted_runs;

    while (*place != NULL && ((unsigned long)(*place)->plan.app & MILTER_WANTED_MASK) != number)
        place = &(*place)->next_wanted;
    return place;
}

/*
 * By on_negotiate. The run that serves this connection: the one it wants, else the
 * current one; NULL: none. Takes what says so off the offered actions.
 */
static struct milter_run *run_of(unsigned long *offered_actions)
{
    const unsigned long number = *offered_actions >> MILTER_WANTED_SHIFT & MILTER_WANTED_MASK;

    if (number == 0 || atomic_load(&wanted_count) == 0)
        return atomic_load(&current_run);
    pthread_mutex_lock(&registry_lock);
    struct milter_run *run = *find_wanted(number);
    pthread_mutex_unlock(&registry_lock);
    if (run == NULL)
        return atomic_load(&current_run);
    *offered_actions &= ~(MILTER_WANTED_MASK << MILTER_WANTED_SHIFT);
    return run;
}

/* ---- libmilter's callbacks: each by a thread of libmilter, one at a time for a connection - */

/* By on_negotiate. libmilter ignores a command that is out of place; where one is due an answer, it gets it all the same. */
static void answer_within_messages(const struct milter_session *session)
{
    static const char letters[] = "RTLNBE"; /* from MILTER_RCPT to MILTER_EOM */
    char due[sizeof letters] = "";
    size_t n = 0;

    for (int stage = MILTER_RCPT; stage <= MILTER_EOM; stage++)
        if ((session->steps & no_reply_bit[stage]) == 0)
            due[n++] = letters[stage - MILTER_RCPT];
    milter_io_answer(session->descriptor, due);
}

/* The session that this makes belongs to libmilter's context, until on_close takes it back. */
static sfsistat on_negotiate(SMFICTX *ctx, unsigned long offered_actions, unsigned long offered_steps,
                             unsigned long unused2, unsigned long unused3, unsigned long *actions,
                             unsigned long *steps, unsigned long *out2, unsigned long *out3)
{
    struct milter_run *run = run_of(&offered_actions);
    struct milter_session *session = run != NULL ? new_session(ctx, run) : NULL;

    (void)unused2;
    (void)unused3;
    *out2 = *out3 = 0;
    if (session == NULL)
        return SMFIS_REJECT;
    smfi_setpriv(ctx, session);

    const struct milter_plan *plan = &run->plan;
    const bool lacking = (plan->required & ~offered_actions) != 0;
    *actions = plan->actions & offered_actions;
    *steps = plan->steps & offered_steps;
    if ((offered_actions & SMFIF_SETSYMLIST) != 0)
        *actions |= SMFIF_SETSYMLIST;

    if (plan->negotiates || lacking) {
        const uint64_t token = begin_call(session, MILTER_STAGES);
        int answer = 0;
        if (token != 0) {
            milter_before_python();
            answer = milter_python_negotiate(session, token, session->number, plan->app, offered_actions,
                                             offered_steps, actions, steps);
            milter_back_from_python(answer);
            end_call(session);
            milter_after_python();
        }
        if ((answer & MILTER_ANSWERED) == 0)
            return SMFIS_REJECT;
    } else if ((offered_actions & SMFIF_SETSYMLIST) != 0) {
        for (int where = SMFIM_FIRST; where <= SMFIM_LAST; where++)
            if (plan->macros[where] != NULL)
                smfi_setsymlist(ctx, where, (char *)(uintptr_t)plan->macros[where]);
    }

    /*
     * Ways that libmilter's table of states does not have (engine.c, next_states),
     * where it would drop a command without an answer: from an unknown command to
     * the header but by DATA, and from DATA to the body over a declined end of
     * header alone.
     */
    if ((offered_steps & SMFIP_NODATA) == 0)
        *steps |= SMFIP_NOUNKNOWN & offered_steps;
    if ((*steps & SMFIP_NOUNKNOWN) == 0)
        *steps &= ~(unsigned long)SMFIP_NODATA;
    if ((*steps & SMFIP_NOHDRS) == 0)
        *steps &= ~(unsigned long)SMFIP_NOEOH;

    pthread_mutex_lock(&session->lock);
    session->actions = *actions;
    session->steps = *steps;
    pthread_mutex_unlock(&session->lock);
    answer_within_messages(session);
    return SMFIS_CONTINUE;
}

static sfsistat on_connect(SMFICTX *ctx, char *hostname, _SOCK_ADDR *address)
{
    struct milter_session *session = smfi_getpriv(ctx);
    struct sockaddr_in6 hidden;

    if (session == NULL && (session = resume(ctx)) != NULL)
        session->failure = SOUND;
    if (session == NULL)
        return HANG_UP;
    abort_message(session);
    session->client_unread = true;
    if (address == NULL && milter_hidden_client(hostname, &hidden))
        address = (_SOCK_ADDR *)&hidden;
    log_client(session, hostname, address);
    return conclude(session, MILTER_CONNECT, NULL, 0);
}

static sfsistat on_helo(SMFICTX *ctx, char *name)
{
    struct milter_session *session = session_of(ctx);

    if (session == NULL)
        return HANG_UP;
    abort_message(session);
    session->client_unread = true;
    log_text(session, "H");
    log_text(session, name);
    return conclude(session, MILTER_HELO, NULL, 0);
}

/* Nanoseconds of the clock that Python reads by the same name. */
static uint64_t monotonic_now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static sfsistat on_mail(SMFICTX *ctx, char **arguments)
{
    struct milter_session *session = session_of(ctx);

    if (session == NULL)
        return HANG_UP;
    abort_message(session); /* an unknown command hides from libmilter that one is under way */
    session->in_message = true;
    session->message_began = monotonic_now();
    session->seen = session->tracked = false;
    session->message_mark = session->log.size;
    pthread_mutex_lock(&session->lock);
    session->body = BODY_UNTOUCHED;
    pthread_mutex_unlock(&session->lock);
    log_arguments(session, "M", arguments);
    return conclude(session, MILTER_MAIL, NULL, 0);
}

static sfsistat on_rcpt(SMFICTX *ctx, char **arguments)
{
    struct milter_session *session = session_of(ctx);

    if (session == NULL)
        return HANG_UP;
    log_arguments(session, "R", arguments);
    return conclude(session, MILTER_RCPT, NULL, 0);
}

/* Stages that the plan ignores leave no record, or a long message would fill the log. */
static bool ignored(const struct milter_session *session, enum milter_stage stage)
{
    return session->run->plan.mode[stage] == MILTER_IGNORE;
}

static sfsistat on_data(SMFICTX *ctx)
{
    struct milter_session *session = session_of(ctx);

    if (session == NULL)
        return HANG_UP;
    if (!ignored(session, MILTER_DATA))
        log_text(session, "T");
    return conclude(session, MILTER_DATA, NULL, 0);
}

/* A part of the message for on_message; `size` bytes that are libmilter's. */
static void gather(struct milter_session *session, const void *bytes, size_t size)
{
    if (session->run->plan.gathers && session->in_message)
        content_append(&session->content, bytes, size, &session->run->spool);
}

/* With SMFIP_HDR_LEADSPC the value begins right after the colon; handlers see it so only if they asked for that. */
static const char *shown_value(const struct milter_session *session, const char *value)
{
    const bool verbatim = session->run->plan.leading_space || (session->steps & SMFIP_HDR_LEADSPC) == 0;

    return verbatim || *value != ' ' ? value : value + 1;
}

static sfsistat on_header(SMFICTX *ctx, char *name, char *value)
{
    struct milter_session *session = session_of(ctx);

    if (session == NULL)
        return HANG_UP;
    gather(session, name, strlen(name) + 1);
    gather(session, value, strlen(value) + 1);
    session->header_size = content_size(&session->content);
    if (!ignored(session, MILTER_HEADER)) {
        log_text(session, "L");
        log_text(session, name);
        log_text(session, shown_value(session, value));
    }
    return conclude(session, MILTER_HEADER, NULL, 0);
}

static sfsistat on_eoh(SMFICTX *ctx)
{
    struct milter_session *session = session_of(ctx);

    if (session == NULL)
        return HANG_UP;
    if (!ignored(session, MILTER_EOH))
        log_text(session, "N");
    return conclude(session, MILTER_EOH, NULL, 0);
}

/*
 * The chunk is libmilter's memory, valid until this returns.
 *
 * A piece may come with the end of the message, though no known MTA sends that.
 * libmilter then sends any answer but "continue" twice, and does not tell of the
 * end. A message that was decided here is answered there, so it does no harm to
 * go on; where libmilter's packets are not ours, that is not known.
 */
static sfsistat on_body(SMFICTX *ctx, unsigned char *chunk, size_t size)
{
    struct milter_session *session = session_of(ctx);

    if (session == NULL)
        return HANG_UP;
    const bool within = session->in_message;
    gather(session, chunk, size);
    if (ignored(session, MILTER_BODY)) {
        chunk = NULL;
        size = 0;
    } else {
        log_text(session, "B");
        log_number(session, size);
    }
    const sfsistat verdict = conclude(session, MILTER_BODY, chunk, size);
    if (milter_io_command() != END_OF_MESSAGE)
        return verdict;
    if (within && !session->in_message)
        session->decision = verdict;
    return SMFIS_CONTINUE;
}

static sfsistat on_eom(SMFICTX *ctx)
{
    struct milter_session *session = session_of(ctx);

    if (session == NULL)
        return HANG_UP;
    const sfsistat decision = session->decision;
    session->decision = SMFIS_CONTINUE;
    if (decision != SMFIS_CONTINUE)
        return decision;
    log_text(session, "E");
    return conclude(session, MILTER_EOM, NULL, 0);
}

/*
 * Does the text of a command end with it? libmilter looks at others, and not at this one, and keeps its length to
 * itself. Where the end of its data is not known either, the size of libmilter's memory is all there is to go by.
 */
static bool is_text(const char *command)
{
    const char *end = milter_io_data_end();

    if (end != NULL)
        return memchr(command, '\0', (size_t)(end - command)) != NULL;
#ifdef MEMORY_SIZE
    return memchr(command, '\0', MEMORY_SIZE(command)) != NULL;
#else
    return true;
#endif
}

static sfsistat on_unknown(SMFICTX *ctx, const char *command)
{
    struct milter_session *session = session_of(ctx);

    if (session == NULL || !is_text(command))
        return HANG_UP;
    if (!ignored(session, MILTER_UNKNOWN)) {
        log_text(session, "U");
        log_text(session, command);
    }
    return conclude(session, MILTER_UNKNOWN, NULL, 0);
}

static sfsistat on_abort(SMFICTX *ctx)
{
    struct milter_session *session = smfi_getpriv(ctx);

    if (session != NULL)
        abort_message(session);
    return SMFIS_CONTINUE;
}

/*
 * May come first, alone or twice, and at a time-out on libmilter's controller
 * thread, which holds libmilter's own lock meanwhile.
 */
static sfsistat on_close(SMFICTX *ctx)
{
    struct milter_session *session = smfi_getpriv(ctx);

    if (session == NULL)
        return SMFIS_CONTINUE;
    smfi_setpriv(ctx, NULL);
    abort_message(session);
    if (session->held || session->client_deferred || session->run->plan.mode[MILTER_CLOSE] == MILTER_ENTER ||
        (session->known && atomic_load(&session->run->unheard) >= UNHEARD_MOST)) {
        if (session->lost) { /* the end can be told all the same */
            empty_log(session);
            session->lost = false;
        }
        log_text(session, "Q");
        if (enter_python(session, MILTER_CLOSE, NULL, 0) != 0)
            session->known = false; /* else its objects are left */
    }
    release(session);
    return SMFIS_CONTINUE;
}

/* ---- The process ------------------------------------------------------------------------ */

/* Once in a process, before milter_serve. libmilter copies the name. */
int milter_register(const char *name)
{
    const struct smfiDesc description = {
        .xxfi_name = (char *)(uintptr_t)name,
        .xxfi_version = SMFI_VERSION,
        .xxfi_flags = 0, /* on_negotiate decides */
        .xxfi_connect = on_connect,
        .xxfi_helo = on_helo,
        .xxfi_envfrom = on_mail,
        .xxfi_envrcpt = on_rcpt,
        .xxfi_header = on_header,
        .xxfi_eoh = on_eoh,
        .xxfi_body = on_body,
        .xxfi_eom = on_eom,
        .xxfi_abort = on_abort,
        .xxfi_close = on_close,
        .xxfi_unknown = on_unknown,
        .xxfi_data = on_data,
        .xxfi_negotiate = on_negotiate,
    };
    milter_find_macro_arrays();
    milter_watch_forks();
    milter_find_descriptor();
    return smfi_register(description);
}

/* The thread of smfi_main, for the rest of the process; it never enters Python. */
static void *serve(void *argument)
{
    const int wake_fd = (int)(intptr_t)argument;

    /* libmilter's own thread for signals took one (and so it ended well), or it gave up. */
    const char *end = smfi_main() == MI_SUCCESS ? "s" : "!";
    while (write(wake_fd, end, 1) < 0 && errno == EINTR)
        continue;
    return NULL;
}

/*
 * By milter_serve. Handlers run on libmilter's threads, which get the system's default for their stacks:
 * with musl 128 KiB, and so little that Python's deeper functions in C overrun it. glibc's is 8 MiB.
 */
static void enlarge_stacks(void)
{
#ifdef __linux__
    const size_t enough = 8 * 1024 * 1024; /* address space; memory only as far as it is used */
    pthread_attr_t attributes;
    size_t size;

    if (pthread_getattr_default_np(&attributes) != 0)
        return;
    if (pthread_attr_getstacksize(&attributes, &size) == 0 && size < enough &&
        pthread_attr_setstacksize(&attributes, enough) == 0)
        (void)pthread_setattr_default_np(&attributes);
    pthread_attr_destroy(&attributes);
#endif
}

/*
 * Once in a process, after milter_register, smfi_setconn and smfi_opensocket.
 * All signals are blocked in the new thread and those that libmilter starts from
 * it, so that they reach Python's main thread. 0, or an errno.
 */
int milter_serve(int wake_fd)
{
    sigset_t all;
    pthread_t thread;

    enlarge_stacks();
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &startup_mask);
    const int error = pthread_create(&thread, NULL, serve, (void *)(intptr_t)wake_fd);
    pthread_sigmask(SIG_SETMASK, &startup_mask, NULL);
    if (error == 0)
        pthread_detach(thread);
    return error;
}

/* Bytes of one packet, for the whole process. Returns the old limit. */
size_t milter_set_max_data_size(size_t size)
{
    atomic_store(&max_data_size, size);
    milter_io_limit(size);
    return smfi_setmaxdatasize(size);
}

/*
 * The plan is copied; connections from now on follow it, or those that want it.
 * Its place for the count of open sessions stays the caller's, who keeps it for
 * ever: sessions may end after the run. NULL: out of memory.
 */
struct milter_run *milter_begin(const struct milter_plan *plan)
{
    struct milter_run *run = calloc(1, sizeof *run);

    if (run == NULL)
        return NULL;
    run->plan = *plan;
    run->plan.spool_directory = NULL; /* the caller's */
    if (plan->gathers) {
        run->spool = (struct spool){plan->spool_size, strdup(plan->spool_directory)};
        if (run->spool.directory == NULL)
            return NULL;
    }
    for (int where = SMFIM_FIRST; where <= SMFIM_LAST; where++) {
        if (plan->macros[where] == NULL)
            continue;
        run->plan.macros[where] = strdup(plan->macros[where]);
        if (run->plan.macros[where] == NULL)
            return NULL;
    }
    if (!plan->wanted_only) {
        atomic_store(&current_run, run);
        return run;
    }
    pthread_mutex_lock(&registry_lock);
    run->next_wanted = wanted_runs;
    wanted_runs = run;
    atomic_fetch_add(&wanted_count, 1);
    pthread_mutex_unlock(&registry_lock);
    return run;
}

/* By milter_end, which may be called twice. */
static void leave_wanted(struct milter_run *run)
{
    pthread_mutex_lock(&registry_lock);
    struct milter_run **place = &wanted_runs;
    while (*place != NULL && *place != run)
        place = &(*place)->next_wanted;
    if (*place == run) {
        *place = run->next_wanted;
        atomic_fetch_sub(&wanted_count, 1);
    }
    pthread_mutex_unlock(&registry_lock);
}

/* From now on no event of this run enters Python, and new connections are refused. */
void milter_end(struct milter_run *run)
{
    struct milter_run *expected = run;

    atomic_compare_exchange_strong(&current_run, &expected, NULL);
    if (run->plan.wanted_only)
        leave_wanted(run);
    atomic_store(&run->closed, true);
    content_free_kept();
}

/* By the clock: on a busy machine each pause takes longer than it says. */
static int wait_for_zero(atomic_int *count, int milliseconds)
{
    const struct timespec pause = {0, 1000 * 1000};
    const uint64_t end = monotonic_now() + (uint64_t)milliseconds * 1000000;
    int now; /* looked at once: callbacks that the gate turns away are counted for a moment, too */

    while ((now = atomic_load(count)) != 0 && monotonic_now() < end)
        nanosleep(&pause, NULL);
    return now;
}

/* Any thread, without the GIL. Returns how many connections are still open. */
int milter_wait_sessions(struct milter_run *run, int milliseconds)
{
    return wait_for_zero(&run->sessions, milliseconds);
}

/* Any thread, without the GIL. Returns how many callbacks are still in Python. */
int milter_wait_handlers(struct milter_run *run, int milliseconds)
{
    return wait_for_zero(&run->inside, milliseconds);
}

/*
 * Any thread. The numbers of connections that are gone, whose objects Python can
 * drop; their sessions become free. Returns how many.
 */
int milter_take_ended(struct milter_run *run, uint64_t *numbers, int count)
{
    int taken = 0;

    pthread_mutex_lock(&registry_lock);
    for (struct milter_session *session; taken < count && (session = run->ended) != NULL; taken++) {
        numbers[taken] = session->number;
        run->ended = session->next;
        session->next = free_sessions;
        free_sessions = session;
    }
    atomic_fetch_sub(&run->unheard, taken);
    pthread_mutex_unlock(&registry_lock);
    return taken;
}

/* ---- The session: by handlers, without the GIL ------------------------------------------- */

/* Takes the session's lock, and keeps it only when the answer is MILTER_OK. */
static int lock_session(struct milter_session *session, uint64_t token)
{
    if (milter_is_child()) /* where the lock may be taken for ever */
        return MILTER_CHILD;
    pthread_mutex_lock(&session->lock);
    if (session->token == token && token != 0)
        return MILTER_OK;
    pthread_mutex_unlock(&session->lock);
    return MILTER_EXPIRED;
}

/* The same without waiting for the lock. It is taken while an action is under way, which may wait for its MTA. */
static int try_session(struct milter_session *session, uint64_t token)
{
    if (milter_is_child())
        return MILTER_CHILD;
    if (pthread_mutex_trylock(&session->lock) != 0)
        return MILTER_BUSY;
    if (session->token == token && token != 0)
        return MILTER_OK;
    pthread_mutex_unlock(&session->lock);
    return MILTER_EXPIRED;
}

/* Under the session's lock: what an action needs is the end of the message and the MTA's grant (0: none). */
static int may_act(const struct milter_session *session, unsigned long grant, size_t size)
{
    if (session->stage != MILTER_EOM)
        return MILTER_NOT_EOM;
    if ((session->actions & grant) != grant)
        return MILTER_NOT_GRANTED;
    return size > atomic_load(&max_data_size) ? MILTER_TOO_LONG : MILTER_OK;
}

/* The same as lock_session for an action. */
static int lock_for_action(struct milter_session *session, uint64_t token, unsigned long grant, size_t size)
{
    int result = lock_session(session, token);

    if (result != MILTER_OK)
        return result;
    result = may_act(session, grant, size);
    if (result != MILTER_OK)
        pthread_mutex_unlock(&session->lock);
    return result;
}

/* Any action but a part of the body ends the body: Postfix fails a message whose new body is interrupted. */
static int end_action(struct milter_session *session, int sent)
{
    if (session->body == BODY_BEGUN)
        session->body = BODY_ENDED;
    pthread_mutex_unlock(&session->lock);
    return sent == MI_SUCCESS ? MILTER_OK : MILTER_FAILED;
}

/* libmilter takes strings as "char *", and does not write to them. */
static char *text(const char *constant)
{
    return (char *)(uintptr_t)constant;
}

static size_t packet_size(const char *first, const char *second)
{
    return sizeof(uint32_t) + strlen(first) + 1 + (second != NULL ? strlen(second) + 1 : 0);
}

/*
 * Under the session's lock. libmilter knows names of one letter with and without braces; longer ones only as the MTA
 * has written them, and not all MTAs write the braces.
 */
static const char *macro_of(SMFICTX *ctx, const char *name)
{
    const char *value = smfi_getsymval(ctx, text(name));
    const size_t length = strlen(name);
    char bare[128];

    if (value != NULL || length < 4 || length - 2 >= sizeof bare || name[0] != '{')
        return value;
    memcpy(bare, name + 1, length - 2);
    bare[length - 2] = '\0';
    return smfi_getsymval(ctx, bare);
}

/* Under the session's lock, which it gives back; see milter_macro. */
static int copy_macro(struct milter_session *session, const char *name, char *buffer, size_t size)
{
    int result = MILTER_ABSENT;

    milter_mend_macros(session->ctx);
    const char *value = macro_of(session->ctx, name);
    if (value != NULL) {
        const size_t length = strlen(value);
        if (length < size)
            memcpy(buffer, value, length + 1);
        result = (int)length;
    }
    pthread_mutex_unlock(&session->lock);
    return result;
}

/*
 * Copies the value into the buffer, since libmilter's memory is valid only until
 * the next command. Returns the length of the value, or an enum milter_result; a
 * value longer than size - 1 is not copied.
 */
int milter_macro(struct milter_session *session, uint64_t token, const char *name, char *buffer, size_t size)
{
    const int result = lock_session(session, token);

    return result == MILTER_OK ? copy_macro(session, name, buffer, size) : result;
}

/* The same for the one thread that looks after all sessions (milter/watch.py), which waits for none of them. */
int milter_try_macro(struct milter_session *session, uint64_t token, const char *name, char *buffer, size_t size)
{
    const int result = try_session(session, token);

    return result == MILTER_OK ? copy_macro(session, name, buffer, size) : result;
}

/*
 * Has the MTA closed its connection? Then it waits for no answer any more. By the
 * thread that serves the session, or by another one that has the context. 1: yes;
 * 0: no, or it cannot be told (peer.c); MILTER_BUSY: an action is under way;
 * MILTER_EXPIRED.
 */
int milter_mta_gone(struct milter_session *session, uint64_t token)
{
    const int result = try_session(session, token);

    if (result != MILTER_OK)
        return result;
    const bool gone = milter_peer_gone(session->ctx, session->descriptor);
    pthread_mutex_unlock(&session->lock);
    return gone;
}

/* Only in milter_python_negotiate, once for each stage. */
int milter_request_macros(struct milter_session *session, uint64_t token, int where, const char *names)
{
    const int result = lock_session(session, token);

    if (result != MILTER_OK)
        return result;
    const int set = smfi_setsymlist(session->ctx, where, text(names));
    pthread_mutex_unlock(&session->lock);
    return set == MI_SUCCESS ? MILTER_OK : MILTER_FAILED;
}

/*
 * As the last thing before a verdict of the same class, in a stage that replies:
 * libmilter uses the reply up then. Set at another time it would stay, and be
 * sent with a later refusal.
 */
int milter_set_reply(struct milter_session *session, uint64_t token, const char *code, const char *enhanced,
                     char *const *lines, size_t count)
{
    char *l[REPLY_LINES] = {NULL};
    int set;

    if (count < 1 || count > REPLY_LINES)
        return MILTER_FAILED;
    memcpy(l, lines, count * sizeof *l);
    const int result = lock_session(session, token);
    if (result != MILTER_OK)
        return result;
    if (count == 1)
        set = smfi_setreply(session->ctx, text(code), text(enhanced), l[0]);
    else /* the list ends at the first NULL */
        set = smfi_setmlreply(session->ctx, code, enhanced, l[0], l[1], l[2], l[3], l[4], l[5], l[6], l[7], l[8],
                              l[9], l[10], l[11], l[12], l[13], l[14], l[15], l[16], l[17], l[18], l[19], l[20],
                              l[21], l[22], l[23], l[24], l[25], l[26], l[27], l[28], l[29], l[30], l[31],
                              (char *)NULL);
    pthread_mutex_unlock(&session->lock);
    return set == MI_SUCCESS ? MILTER_OK : MILTER_FAILED;
}

int milter_add_header(struct milter_session *session, uint64_t token, const char *name, const char *value)
{
    const int result = lock_for_action(session, token, SMFIF_ADDHDRS, packet_size(name, value));

    if (result != MILTER_OK)
        return result;
    return end_action(session, smfi_addheader(session->ctx, text(name), text(value)));
}

int milter_insert_header(struct milter_session *session, uint64_t token, int index, const char *name,
                         const char *value)
{
    const int result = lock_for_action(session, token, SMFIF_ADDHDRS, packet_size(name, value));

    if (result != MILTER_OK)
        return result;
    return end_action(session, smfi_insheader(session->ctx, index, text(name), text(value)));
}

/* A value of NULL deletes. */
int milter_change_header(struct milter_session *session, uint64_t token, const char *name, int index,
                         const char *value)
{
    const int result = lock_for_action(session, token, SMFIF_CHGHDRS, packet_size(name, value));

    if (result != MILTER_OK)
        return result;
    return end_action(session, smfi_chgheader(session->ctx, text(name), index, text(value)));
}

int milter_change_sender(struct milter_session *session, uint64_t token, const char *address,
                         const char *parameters)
{
    const int result = lock_for_action(session, token, SMFIF_CHGFROM, packet_size(address, parameters));

    if (result != MILTER_OK)
        return result;
    return end_action(session, smfi_chgfrom(session->ctx, text(address), text(parameters)));
}

/* With and without parameters are two actions of the protocol, granted one by one. */
int milter_add_recipient(struct milter_session *session, uint64_t token, const char *address,
                         const char *parameters)
{
    const unsigned long grant = parameters != NULL ? SMFIF_ADDRCPT_PAR : SMFIF_ADDRCPT;
    const int result = lock_for_action(session, token, grant, packet_size(address, parameters));

    if (result != MILTER_OK)
        return result;
    if (parameters != NULL)
        return end_action(session, smfi_addrcpt_par(session->ctx, text(address), text(parameters)));
    return end_action(session, smfi_addrcpt(session->ctx, text(address)));
}

int milter_remove_recipient(struct milter_session *session, uint64_t token, const char *address)
{
    const int result = lock_for_action(session, token, SMFIF_DELRCPT, packet_size(address, NULL));

    if (result != MILTER_OK)
        return result;
    return end_action(session, smfi_delrcpt(session->ctx, text(address)));
}

/* The data is the caller's. The first part replaces the body, also when it is empty; later ones are appended. */
int milter_send_body(struct milter_session *session, uint64_t token, const char *data, size_t size)
{
    int result = lock_for_action(session, token, SMFIF_CHGBODY, 0);

    if (result != MILTER_OK)
        return result;
    if (session->body == BODY_ENDED)
        result = MILTER_BODY_OVER;
    else
        session->body = BODY_BEGUN;
    while (result == MILTER_OK) {
        const size_t part = size < MILTER_BODY_PART ? size : MILTER_BODY_PART;
        if (smfi_replacebody(session->ctx, (unsigned char *)text(data), (int)part) != MI_SUCCESS)
            result = MILTER_FAILED;
        data += part;
        size -= part;
        if (size == 0)
            break;
    }
    pthread_mutex_unlock(&session->lock);
    return result;
}

int milter_quarantine(struct milter_session *session, uint64_t token, const char *reason)
{
    const int result = lock_for_action(session, token, SMFIF_QUARANTINE, packet_size(reason, NULL));

    if (result != MILTER_OK)
        return result;
    return end_action(session, smfi_quarantine(session->ctx, text(reason)));
}

/*
 * Under the session's lock. Within a new body progress would break it, and is left
 * out; whether the body is whole shows only when something follows it.
 */
static int send_progress(struct milter_session *session)
{
    return session->body != BODY_BEGUN ? smfi_progress(session->ctx) : MI_SUCCESS;
}

/* Also by another thread than the handler's. */
int milter_progress(struct milter_session *session, uint64_t token)
{
    const int result = lock_for_action(session, token, 0, 0);

    if (result != MILTER_OK)
        return result;
    int sent = send_progress(session);
    if (!milter_io_flush(session->descriptor))
        sent = MI_FAILURE;
    pthread_mutex_unlock(&session->lock);
    return sent == MI_SUCCESS ? MILTER_OK : MILTER_FAILED;
}

/* Under the session's lock. An MTA that has not read what was sent before needs no more; it would be waited for. */
static int send_progress_if_read(struct milter_session *session)
{
    const int before = milter_io_push(session->descriptor);

    if (before <= 0)
        return before < 0 ? MILTER_FAILED : MILTER_BUSY;
    if (send_progress(session) != MI_SUCCESS || milter_io_push(session->descriptor) < 0)
        return MILTER_FAILED;
    return MILTER_OK;
}

/*
 * By the one thread that shows progress for all sessions (milter/watch.py), so it
 * waits for none of them. A lock that is taken: an action is under way, which
 * shows progress itself, or waits for its MTA.
 */
int milter_offer_progress(struct milter_session *session, uint64_t token)
{
    int result = try_session(session, token);

    if (result != MILTER_OK)
        return result;
    result = may_act(session, 0, 0);
    if (result == MILTER_OK)
        result = send_progress_if_read(session);
    pthread_mutex_unlock(&session->lock);
    return result;
}

/* Once within milter_python_enter: room for so many bytes of changes, which C frees. NULL: out of memory. */
char *milter_reserve_changes(struct milter_event *event, size_t size)
{
    free(event->reserved);
    event->reserved = malloc(size);
    if (event->reserved != NULL) {
        event->changes = event->reserved;
        event->changes_capacity = size;
    }
    return event->reserved;
}
