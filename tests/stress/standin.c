/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The stand-in for Python: the two functions that the shim calls, and threads that use its
 * contexts late. It checks what it is told, gives random verdicts, and fails now and then.
 */
#define _GNU_SOURCE
#include "stress.h"

#include "inside.h"
#include "redirect.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    CONVERSATIONS = 1 << 16,
    CONTEXTS = 512,
    LOG_FULL = 64 * 1024 /* of the shim */
};

atomic_ulong entries, late_done, late_expired;
atomic_int taking;
static atomic_ulong disk_faults_told;

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

    switch (chance(12)) {
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
        break;
    case 8: return milter_offer_progress(session, token);
    case 9: return milter_try_macro(session, token, "i", buffer, sizeof buffer);
    case 10: {
        const int gone = milter_mta_gone(session, token);
        return gone < 0 ? gone : MILTER_OK;
    }
    }
    return milter_progress(session, token);
}

/* By a thread that has nothing to do with sessions. The main thread waits for it before it counts. */
static void take_ended_late(void)
{
    atomic_fetch_add(&taking, 1);
    const int app = atomic_load(&current_app);
    if (app != 0 && !runs[app].seldom)
        take_ended(runs[app].run);
    atomic_fetch_sub(&taking, 1);
}

void *late(void *unused)
{
    (void)unused;
    while (!atomic_load(&stop_all)) {
        struct context *context = atomic_load(&contexts[chance(CONTEXTS)]);
        if (chance(100) == 0)
            take_ended_late();
        if (context == NULL) {
            nap(100);
            continue;
        }
        const bool over = atomic_load(&context->over);
        const int result = act(context->session, context->token, context->bodies);
        atomic_fetch_add(&late_done, 1);
        if (result == MILTER_EXPIRED)
            atomic_fetch_add(&late_expired, 1);
        else if (over && result != MILTER_BUSY) /* nobody looked whose call it is */
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
    atomic_flag inside; /* a thread is */
    bool client, in_message, owes;
    bool lost;         /* where the log stands in the transcript of the message is not known any more */
    unsigned message, connection;
    size_t at, client_at, body_at; /* in the transcripts */
    int flags;         /* of the last answer */
    struct context *last;
};
static struct conversation conversations[CONVERSATIONS];
static _Atomic pthread_t last_thread; /* that was entered by */

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

int take_ended(struct milter_run *run)
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
    if (event->content != NULL || (event->content_size <= run->plan.spool_size && !with_faults)) /* no memory: a file */
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
    /* The largest is more than the socket takes while the client does not read. */
    const size_t size = chance(4) != 0 ? chance(200) : chance((chance(2) != 0 ? 3 : 12) * PACKET);
    const char *body = pool + chance(POOL - 12 * PACKET);
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
    if (atomic_flag_test_and_set(&c->inside))
        violation("two threads are in one session");
    c->known = true;
    if (!pthread_equal(atomic_exchange(&last_thread, pthread_self()), pthread_self()))
        tried(OTHER_THREADS);
}

static int leave_conversation(struct conversation *c, int answer)
{
    if (c->app % 2 == 0 && chance(4) == 0)
        forget_waiting();
    atomic_flag_clear(&c->inside);
    return answer;
}

int milter_python_negotiate(struct milter_session *session, uint64_t token, uint64_t number, int app,
                            unsigned long offered_actions, unsigned long offered_steps, unsigned long *actions,
                            unsigned long *steps)
{
    (void)offered_steps, (void)steps;
    struct conversation *c = conversation_of(number, app);
    enter_conversation(c, app);
    if (chance(50) == 0 || (runs[app].plan.required & ~offered_actions) != 0)
        return leave_conversation(c, 0);
    if (chance(4) == 0)
        *actions &= ~(unsigned long)SMFIF_CHGBODY;
    if ((*actions & SMFIF_SETSYMLIST) != 0)
        milter_request_macros(session, token, SMFIM_ENVFROM, "i j");
    return leave_conversation(c, MILTER_ANSWERED);
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

/* Until another session is served. One at a time: it must not be the last one that could be served. */
static void meet_another(void)
{
    static atomic_flag taken = ATOMIC_FLAG_INIT;
    int patience = 20000;

    if (!milter_io_wrapped() || atomic_flag_test_and_set(&taken))
        return;
    if (!may_wait_for_others()) {
        atomic_flag_clear(&taken);
        return;
    }
    const unsigned long before = atomic_load(&entries);
    while (atomic_load(&entries) == before && patience > 0) {
        nap(1000);
        patience--;
    }
    if (patience == 0)
        violation("no other session is served while a handler waits");
    else
        tried(MEETINGS);
    waits_no_more();
    atomic_flag_clear(&taken);
}

/* Longer than the scheduler has patience: 5 ms with a thread that sleeps, 20 ms with one that computes. */
static void keep_the_thread(const struct conversation *c)
{
    if (c->message < FIRST_NUMBER)
        return;
    switch (chance(500)) {
    case 0:
        tried(SLEEPS);
        nap(6000 + chance(10000));
        break;
    case 1:
        tried(COMPUTES);
        compute(30000);
        break;
    case 2:
    case 3:
        meet_another();
        break;
    }
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
    keep_the_thread(c);
    if (!quiet && chance(30) == 0)
        return fail(c, r);

    const int answer = answer_of(c, event, r), verdict = answer & 0xff;
    if (event->stage == MILTER_EOM && (verdict == SMFIS_CONTINUE || verdict == SMFIS_ACCEPT) && chance(3) == 0 &&
        !leave_changes(c, event, r->run))
        return fail(c, r);
    c->flags = c->in_message ? answer : answer & ~MILTER_TRACKS;
    return answer;
}

/* A handler forks, and its child comes back as its parent does. */
static void fork_child(const struct milter_event *event, int answer)
{
    int status = 0;
    const pid_t child = fork();

    if (child == 0) {
        for (int i = 0; i < 20; i++)
            if (act(event->session, event->token, true) != MILTER_CHILD)
                _exit(9);
        return; /* with the answer */
    }
    tried(FORKED);
    while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR)
        continue;
    if (!WIFEXITED(status) || WEXITSTATUS(status) != ((answer & MILTER_ANSWERED) != 0 ? 0 : 1))
        violation("a child ended with the status %x", (unsigned)status);
}

int milter_python_enter(struct milter_event *event)
{
    if (event->app == 0) /* a thread comes for the first time */
        return 0;
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
    const int answer = enter(c, event, &r);
    if (chance(700) == 0)
        fork_child(event, answer);
    return leave_conversation(c, answer);
}

/* By the main thread, when no session is open and the gate is closed: everybody knows of every end. */
void check_ends(int app)
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
