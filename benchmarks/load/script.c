/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What an MTA says to a filter, written down before it is said.
 *
 * The words are those of Postfix: the same macros before the same commands, a
 * packet of macros before each header and each piece of the body, an ABORT after
 * each message. Steps that the filter declined (NO bits) are left out; after a
 * step that it does not reply to (NR bits) there is no stop. So a conversation
 * only has to copy bytes up to the next stop.
 *
 * The process has one thread. Dialogues are made when a filter's answer to the
 * negotiation is seen for the first time, and kept until the process ends.
 */
#include "script.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    CHUNK = 65535,              /* bytes of a body packet */
    VARIANTS = 64,              /* different messages, if they are not too large */
    VARIANTS_SIZE = 4 << 20,   /* bytes of all messages together */
    VARIANTS_LEAST = 4,
    LINE = 78,                  /* bytes of a line of the body, with CRLF */
    LISTS = 7,                  /* lists of macros that a filter may ask for */
    NO_LIST = -1,
};

/* Steps, as the filter names them in its answer. */
enum {
    NO_CONNECT = 0x1, NO_HELO = 0x2, NO_MAIL = 0x4, NO_RCPT = 0x8, NO_BODY = 0x10, NO_HEADERS = 0x20, NO_EOH = 0x40,
    NR_HEADER = 0x80, NO_DATA = 0x200, NR_CONNECT = 0x1000, NR_HELO = 0x2000, NR_MAIL = 0x4000, NR_RCPT = 0x8000,
    NR_DATA = 0x10000, NR_EOH = 0x40000, NR_BODY = 0x80000, LEADING_SPACE = 0x100000,
};

/* Version 6, all actions, all steps: what Postfix and Sendmail offer. */
const struct packet negotiation = {"\0\0\0\x0dO\0\0\0\6\0\0\1\xff\0\x1f\xff\xff", 17};
const struct packet abort_message = {"\0\0\0\1A", 5};
const struct packet farewell = {"\0\0\0\1A\0\0\0\1A\0\0\0\1Q", 15};

struct stage {
    char command;
    uint32_t declined, no_reply;
    bool silent;        /* no macros are sent for it when it is declined */
    int list;           /* which list of macros a filter may ask for */
    const char *macros; /* those that are sent when it does not */
};

static const struct stage CONNECT = {'C', NO_CONNECT, NR_CONNECT, false, 0, "j {daemon_name} {daemon_addr} v _"};
static const struct stage HELO = {'H', NO_HELO, NR_HELO, false, 1, ""};
static const struct stage MAIL = {'M', NO_MAIL, NR_MAIL, false, 2, "{mail_addr} {mail_host} {mail_mailer}"};
static const struct stage RCPT = {'R', NO_RCPT, NR_RCPT, false, 3, "i {rcpt_addr} {rcpt_host} {rcpt_mailer}"};
static const struct stage DATA = {'T', NO_DATA, NR_DATA, false, 4, "i"};
static const struct stage HEADER = {'L', NO_HEADERS, NR_HEADER, true, NO_LIST, "i"};
static const struct stage EOH = {'N', NO_EOH, NR_EOH, true, 6, "i"};
static const struct stage BODY = {'B', NO_BODY, NR_BODY, true, 5, "i"};
static const struct stage EOM = {'E', 0, 0, false, 5, "i"};

static const char *const macro_values[][2] = {
    {"j", "mx.sink.example"}, {"daemon_name", "mx.sink.example"}, {"daemon_addr", "192.0.2.25"}, {"v", "Postfix 3.7.11"},
    {"_", "client.example [192.0.2.8]"}, {"client_addr", "192.0.2.8"}, {"client_name", "client.example"},
    {"client_port", "50432"}, {"client_ptr", "client.example"}, {"mail_addr", "ann@client.example"},
    {"mail_host", "client.example"}, {"mail_mailer", "smtp"}, {"rcpt_addr", "bob@sink.example"},
    {"rcpt_host", "sink.example"}, {"rcpt_mailer", "smtp"}, {"i", "4YbQ2x3kTzz9rjV"},
};

/* What was agreed, and how far the writing of a script has come. */
struct agreement {
    uint32_t steps;
    const char *macros[LISTS]; /* NULL: the MTA's own */
    bool queued;               /* the message has a queue id, as it has from the second recipient on */
};

/* ---- Bytes ------------------------------------------------------------------------------ */

static void *grown(void *memory, size_t size)
{
    void *larger = realloc(memory, size);
    if (larger == NULL) {
        fputs("load: no memory\n", stderr);
        exit(2);
    }
    return larger;
}

static void put(struct script *script, const void *bytes, size_t size)
{
    if (size > script->capacity - script->size) {
        script->capacity = 2 * (script->size + size);
        script->bytes = grown(script->bytes, script->capacity);
    }
    memcpy(script->bytes + script->size, bytes, size);
    script->size += size;
}

static void put_text(struct script *script, const char *text)
{
    put(script, text, strlen(text) + 1);
}

/* Returns where the packet begins, for end_packet(). */
static size_t begin_packet(struct script *script, char command)
{
    const size_t start = script->size;

    put(script, "\0\0\0", 4);
    put(script, &command, 1);
    return start;
}

static void end_packet(struct script *script, size_t start)
{
    const size_t size = script->size - start - 4;
    unsigned char *length = (unsigned char *)script->bytes + start;

    length[0] = (unsigned char)(size >> 24);
    length[1] = (unsigned char)(size >> 16);
    length[2] = (unsigned char)(size >> 8);
    length[3] = (unsigned char)size;
}

static uint32_t number_at(const char *bytes)
{
    const unsigned char *b = (const unsigned char *)bytes;
    return (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3];
}

/* ---- Stages ----------------------------------------------------------------------------- */

/* The value of a macro, its name given with braces or without; NULL: it has none. */
static const char *macro_value(const struct agreement *agreed, const char *name, size_t size)
{
    if (size > 2 && name[0] == '{') {
        name++;
        size -= 2;
    }
    if (size == 1 && *name == 'i' && !agreed->queued)
        return NULL;
    for (size_t i = 0; i < sizeof macro_values / sizeof *macro_values; i++)
        if (strlen(macro_values[i][0]) == size && memcmp(macro_values[i][0], name, size) == 0)
            return macro_values[i][1];
    return NULL;
}

static void put_macros(struct script *script, const struct agreement *agreed, const struct stage *stage)
{
    const char *asked = stage->list == NO_LIST ? NULL : agreed->macros[stage->list];
    const char *names = asked != NULL ? asked : stage->macros;
    const size_t start = begin_packet(script, 'D');

    put(script, &stage->command, 1);
    while (*(names += strspn(names, " ")) != '\0') {
        const size_t size = strcspn(names, " ");
        const char *value = macro_value(agreed, names, size);
        if (value != NULL) {
            put(script, names, size);
            put(script, "", 1);
            put_text(script, value);
        }
        names += size;
    }
    end_packet(script, start);
}

static void put_stop(struct script *script, char command)
{
    if (script->stop_count == script->stop_capacity) {
        script->stop_capacity = 2 * script->stop_capacity + 4;
        script->stops = grown(script->stops, script->stop_capacity * sizeof *script->stops);
    }
    script->stops[script->stop_count++] = (struct stop){script->size, command};
}

/* The macros, the command with its data, and a stop if the filter replies. */
static void say(struct script *script, const struct agreement *agreed, const struct stage *stage, const void *data,
                size_t size)
{
    const bool declined = (agreed->steps & stage->declined) != 0;

    if (!declined || !stage->silent)
        put_macros(script, agreed, stage);
    if (declined)
        return;
    const size_t start = begin_packet(script, stage->command);
    put(script, data, size);
    end_packet(script, start);
    if ((agreed->steps & stage->no_reply) == 0)
        put_stop(script, stage->command);
}

static struct place here(const struct script *script)
{
    return (struct place){script->size, script->stop_count};
}

/* ---- A message -------------------------------------------------------------------------- */

static const char *const field_names[] = {"Received", "From", "To", "Subject", "Date", "Message-ID", "MIME-Version",
                                          "Content-Type"};
enum { FIELD_NAMES = sizeof field_names / sizeof *field_names, SUBJECT = 3 };

/* Text of just this size. One message of 16 has a subject that is not ASCII: counting characters would be wrong. */
static void compose_value(char *value, size_t size, unsigned field, unsigned variant)
{
    static const char words[] = "the quick brown fox jumps over the lazy dog 0123456789 ";

    for (size_t i = 0; i < size; i++)
        value[i] = words[(i + field * 7 + variant * 3) % (sizeof words - 1)];
    if (field == SUBJECT && variant % 16 == 5)
        memcpy(value, "\xc3\xa9t\xc3\xa9", 5);
    if (field == 0)
        memcpy(value + 20, "\n\t", 2); /* a folded one */
    value[0] = value[0] == ' ' ? '-' : value[0];
    value[size] = '\0';
}

static void say_header(struct script *script, const struct agreement *agreed, unsigned field, unsigned variant)
{
    char value[512], name[32], data[600];
    const size_t size = 24 + field * 37 % 60 + (field == 0 ? variant : 0);

    compose_value(value, size, field, variant);
    if (field < FIELD_NAMES)
        snprintf(name, sizeof name, "%s", field_names[field]);
    else
        snprintf(name, sizeof name, "X-Field-%u", field);
    const char *lead = (agreed->steps & LEADING_SPACE) != 0 ? " " : "";
    const int used = snprintf(data, sizeof data, "%s%c%s%s", name, '\0', lead, value);
    say(script, agreed, &HEADER, data, (size_t)used + 1);
    script->sum += size;
}

static void say_body(struct script *script, const struct agreement *agreed, size_t size, unsigned variant)
{
    static char chunk[CHUNK];

    for (size_t i = 0; i < sizeof chunk; i++)
        chunk[i] = (char)(i % LINE == LINE - 2 ? '\r' : i % LINE == LINE - 1 ? '\n' : 'a' + (int)((i + variant) % 26));
    script->sum += size;
    for (; size > 0; size -= size < CHUNK ? size : CHUNK)
        say(script, agreed, &BODY, chunk, size < CHUNK ? size : CHUNK);
}

static void compose_message(struct script *script, const struct agreement *opening, const struct mail *mail,
                            unsigned variant)
{
    static const char sender[] = "<ann@client.example>\0SIZE=5000";
    struct agreement agreed = *opening;
    char recipient[64];

    say(script, &agreed, &MAIL, sender, sizeof sender);
    for (unsigned i = 0; i < mail->recipients; i++) {
        const int used = snprintf(recipient, sizeof recipient, "<bob%u@sink.example>", i);
        say(script, &agreed, &RCPT, recipient, (size_t)used + 1);
        agreed.queued = true;
    }
    script->after_recipients = here(script);
    agreed.queued = true;
    say(script, &agreed, &DATA, "", 0);
    for (unsigned i = 0; i < mail->headers; i++)
        say_header(script, &agreed, i, variant);
    script->after_headers = here(script);
    say(script, &agreed, &EOH, "", 0);
    if (mail->body > 0)
        say_body(script, &agreed, mail->body + variant, variant);
    script->after_body = here(script);
    say(script, &agreed, &EOM, "", 0);
}

/* ---- Dialogues -------------------------------------------------------------------------- */

static struct agreement read_answer(const char *answer, size_t size)
{
    struct agreement agreed = {.steps = number_at(answer + 8)};

    for (size_t i = 12; i + 4 < size;) {
        const uint32_t list = number_at(answer + i);
        const char *names = answer + i + 4;
        if (list < LISTS && *names != '\0')
            agreed.macros[list] = names;
        i += 4 + strlen(names) + 1;
    }
    return agreed;
}

static struct dialogue *new_dialogue(const struct mail *mail, const char *answer, size_t size)
{
    static const char client[] = "client.example\0" "4\xc5\x00" "192.0.2.8", name[] = "client.example";
    struct dialogue *dialogue = grown(NULL, sizeof *dialogue + size + 1);

    memset(dialogue, 0, sizeof *dialogue);
    dialogue->answer_size = size;
    memcpy(dialogue->answer, answer, size);
    dialogue->answer[size] = '\0'; /* ends a list of macros that has no end */

    const struct agreement agreed = read_answer(dialogue->answer, size);
    dialogue->lead = (agreed.steps & LEADING_SPACE) != 0 ? " " : "";
    say(&dialogue->opening, &agreed, &CONNECT, client, sizeof client);
    say(&dialogue->opening, &agreed, &HELO, name, sizeof name);

    const size_t fitting = VARIANTS_SIZE / (mail->body + 1);
    dialogue->message_count = fitting < VARIANTS_LEAST ? VARIANTS_LEAST : fitting > VARIANTS ? VARIANTS : fitting;
    dialogue->messages = grown(NULL, dialogue->message_count * sizeof *dialogue->messages);
    memset(dialogue->messages, 0, dialogue->message_count * sizeof *dialogue->messages);
    for (unsigned i = 0; i < dialogue->message_count; i++)
        compose_message(&dialogue->messages[i], &agreed, mail, i);
    return dialogue;
}

/*
 * By a conversation, when the filter has answered the negotiation with these
 * bytes (12 or more, checked by the caller). The dialogue is not the caller's.
 */
const struct dialogue *dialogue_for(const struct mail *mail, const char *answer, size_t size)
{
    static struct dialogue *known;

    for (const struct dialogue *dialogue = known; dialogue != NULL; dialogue = dialogue->next)
        if (dialogue->answer_size == size && memcmp(dialogue->answer, answer, size) == 0)
            return dialogue;
    struct dialogue *dialogue = new_dialogue(mail, answer, size);
    dialogue->next = known;
    known = dialogue;
    return dialogue;
}
