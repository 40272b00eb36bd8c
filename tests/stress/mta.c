/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The clients: MTAs that keep the protocol, of all its versions, and some that do not. Each
 * writes down what it sends, and judges what it is answered.
 */
#define _GNU_SOURCE
#include "stress.h"

#include <arpa/inet.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { PATIENCE = 20000 }; /* milliseconds until a missing answer counts as one */

atomic_ulong messages, connections, passed, refused, cut, timeouts;
atomic_int pausing;

/* All packets until now. Some in two parts, also within a packet, and with time between them. */
static bool send_out(struct mta *m)
{
    const size_t size = m->out.size;
    const size_t part = size > 1 && chance(8) == 0 ? 1 + chance((unsigned)size - 1) : size;

    for (size_t done = 0; done < size;) {
        const ssize_t n = send(m->fd, m->out.at + done, (done < part ? part : size) - done, MSG_NOSIGNAL);
        if (n <= 0) {
            m->ended = true;
            break;
        }
        done += (size_t)n;
        if (done == part && part < size && chance(2) == 0) {
            tried(PARTS);
            nap(chance(20) == 0 ? 30000 : chance(1000));
        }
    }
    empty(&m->out);
    return !m->ended;
}

/* The packet is sent, or goes out with the next ones. */
bool put(struct mta *m, char command, const void *data, size_t size)
{
    const uint32_t length = htonl((uint32_t)size + 1);
    const size_t before = m->out.size;

    add(&m->out, &length, 4);
    add(&m->out, &command, 1);
    add(&m->out, data, size);
    if (chance(3000) == 0) { /* the connection drops anywhere, also within a packet */
        m->out.size = before + chance((unsigned)size + 5);
        send_out(m);
        m->ended = m->cut = true;
        atomic_fetch_add(&cut, 1);
        if (chance(4) == 0) /* and is seen to be dropped only later */
            nap(chance(50000));
    }
    if (!m->ended && m->out.size < PACKET && chance(3) == 0) {
        tried(PIPELINES);
        return true;
    }
    return send_out(m);
}

/* The client is done. */
void hang_up(struct mta *m)
{
    if (!m->ended)
        send_out(m);
    close(m->fd);
    discard(&m->out);
    discard(&m->packet);
    discard(&m->changes);
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
char get(struct mta *m)
{
    char head[5], instead;
    uint32_t length;

    if (!m->ended)
        send_out(m);
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
    if (!m->ended)
        send_out(m);
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

/*
 * The answer is left unread for a while, or until others have got on: at the end of a message it may be more
 * than the filter can write. One client at a time waits for others.
 */
static void read_late(struct mta *m)
{
    static atomic_flag taken = ATOMIC_FLAG_INIT;
    const unsigned long before = atomic_load(&connections);
    int patience = PATIENCE;

    if (!send_out(m))
        return;
    tried(LATE_READS);
    if (chance(2) == 0 || atomic_flag_test_and_set(&taken)) {
        nap(chance(30000));
        return;
    }
    const bool waits = may_wait_for_others();
    while (waits && atomic_load(&connections) < before + 2 && patience > 0) {
        nap(1000);
        patience--;
    }
    if (patience == 0)
        violation("nobody else is served while a client does not read");
    if (waits)
        waits_no_more();
    atomic_flag_clear(&taken);
}

/* The changes before the answer; the answer's letter. */
static char answer_of_stage(struct mta *m, char stage)
{
    bool in_body = false, body_over = false;

    m->changes.size = 0;
    if (chance(stage == 'E' ? 8 : 200) == 0)
        read_late(m);
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
    if (idle && chance(20) == 0 && send_out(m))
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

bool negotiate(struct mta *m)
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

int call_filter(void)
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

bool goes_on(void)
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

static bool say_helo(struct mta *m)
{
    note(m, "H", "flood", NULL);
    return put(m, 'H', "flood", 6);
}

/*
 * Never pauses, until others have got on: there is always a command on its way. One client at a time,
 * for of several each would wait for the others.
 */
static void flood(struct mta *m)
{
    enum { AHEAD = 300, MOST = 200000 };
    static atomic_flag taken = ATOMIC_FLAG_INIT;
    unsigned said = 0, answered = 0;

    if (m->ended || atomic_flag_test_and_set(&taken))
        return;
    const unsigned long before = atomic_load(&connections);
    const bool waits = may_wait_for_others();
    while (waits && atomic_load(&connections) < before + 3 && said < MOST && !m->ended) {
        if (!say_helo(m))
            break;
        said++;
        if (said > answered + AHEAD)
            for (unsigned i = 0; i < AHEAD / 2 && judge(m, SMFIP_NR_HELO, 'H') == ON; i++)
                answered++;
    }
    while (answered < said && judge(m, SMFIP_NR_HELO, 'H') == ON)
        answered++;
    tried(FLOODS);
    if (waits)
        waits_no_more();
    if (said == MOST)
        violation("nobody else is served while a client never pauses");
    atomic_flag_clear(&taken);
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

void *client(void *argument)
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
            if (chance(10) == 0)
                flood(&m);
            quit(&m);
        }
        if (m.ended) {
            withdraw_ends(message_transcripts, m.sent, m.sent_count);
            withdraw_ends(connection_transcripts, m.made, m.made_count);
        }
        hang_up(&m);
    }
    return NULL;
}
