/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * One connection of an MTA to a filter.
 *
 * A conversation says its script up to the next stop in one write, reads the
 * filter's answer, and goes on. Opening and messages are scripts alike; what an
 * opening has left after its last stop is held, and goes out with the message,
 * as the ABORT after a message goes out with the next one.
 *
 * The process has one thread; all memory of a conversation is its caller's.
 */
#define _GNU_SOURCE
#include "conversation.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static enum outcome speak(struct conversation *self);

uint64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* The first complaint about a message stays. */
__attribute__((format(printf, 2, 3))) static void complain(struct conversation *self, const char *format, ...)
{
    va_list arguments;

    if (self->complaint[0] != '\0')
        return;
    va_start(arguments, format);
    vsnprintf(self->complaint, sizeof self->complaint, format, arguments);
    va_end(arguments);
}

static enum outcome hang_up(struct conversation *self)
{
    close(self->fd);
    self->fd = -1;
    self->blocked = false;
    return BROKEN;
}

static char awaited(const struct conversation *self)
{
    return self->dialogue == NULL ? 'O' : self->script->stops[self->place.stop].command;
}

/* ---- Speaking --------------------------------------------------------------------------- */

static const struct script *message_of(const struct conversation *self)
{
    return &self->dialogue->messages[self->number % self->dialogue->message_count];
}

static enum outcome begin_message(struct conversation *self)
{
    self->script = message_of(self);
    self->place = (struct place){0, 0};
    self->headers_added = 0;
    self->begun_at = now();
    return speak(self);
}

static void take_off(struct iovec *bytes, size_t size)
{
    bytes->iov_base = (char *)bytes->iov_base + size;
    bytes->iov_len -= size;
}

/* Says what is held and the script up to the next stop. */
static enum outcome speak(struct conversation *self)
{
    const struct script *script = self->script;
    char *rest = script->bytes + self->place.at;

    if (self->place.stop == script->stop_count) { /* only an opening ends without a stop */
        self->held = (struct iovec){rest, script->size - self->place.at};
        return begin_message(self);
    }
    struct iovec words[2] = {self->held, {rest, script->stops[self->place.stop].end - self->place.at}};
    const struct msghdr message = {.msg_iov = words, .msg_iovlen = 2};
    ssize_t said = sendmsg(self->fd, &message, MSG_NOSIGNAL);
    if (said < 0 && errno != EAGAIN && errno != EINTR) {
        complain(self, "the filter closed the connection before the answer to %c (%s)", awaited(self), strerror(errno));
        return hang_up(self);
    }
    const size_t size = said < 0 ? 0 : (size_t)said, of_held = size < self->held.iov_len ? size : self->held.iov_len;
    self->blocked = size < words[0].iov_len + words[1].iov_len;
    take_off(&self->held, of_held);
    self->place.at += size - of_held;
    return WAITING;
}

/* ---- Listening -------------------------------------------------------------------------- */

static const char *printable(const char *bytes, size_t size, char *text, size_t room)
{
    size_t used = 0;

    for (size_t i = 0; i < size && used + 1 < room; i++)
        text[used++] = bytes[i] < ' ' || bytes[i] > '~' || bytes[i] == '"' || bytes[i] == '\\' ? '?' : bytes[i];
    text[used] = '\0';
    return text;
}

static void hear_header(struct conversation *self, const char *data, size_t size)
{
    char expected[64], text[64];
    const int due = snprintf(expected, sizeof expected, "X-Sum%c%s%lu", '\0', self->dialogue->lead, self->script->sum);

    if (self->headers_added++ > 0)
        complain(self, "more than one header was added");
    else if (size != (size_t)due + 1 || memcmp(data, expected, size) != 0)
        complain(self, "added header '%s', due was 'X-Sum?%s%lu?'", printable(data, size, text, sizeof text),
                 self->dialogue->lead, self->script->sum);
}

static enum outcome end_message(struct conversation *self)
{
    self->held = (struct iovec){(void *)abort_message.bytes, abort_message.size};
    return ANSWERED;
}

/* What the filter says at the end of a message. */
static enum outcome hear_verdict(struct conversation *self, char letter, const char *data, size_t size)
{
    if (letter == 'h') {
        hear_header(self, data, size);
        return WAITING;
    }
    if (letter == 'c' || letter == 'a') {
        if (self->headers_added == 0)
            complain(self, "no header was added");
        return end_message(self);
    }
    complain(self, "the answer to E was %c", letter);
    return strchr("rtdys4", letter) != NULL ? end_message(self) : WAITING;
}

static bool skip(struct conversation *self, char command)
{
    switch (command) {
    case 'R': self->place = self->script->after_recipients; return true;
    case 'L': self->place = self->script->after_headers; return true;
    case 'B': self->place = self->script->after_body; return true;
    default: return false;
    }
}

/* What the filter says to a command before the end of a message. */
static enum outcome hear_reply(struct conversation *self, char letter)
{
    const char command = awaited(self);

    if (letter == 'c') {
        self->place.stop++;
        return speak(self);
    }
    if (letter == 's' && skip(self, command))
        return speak(self);
    complain(self, "the answer to %c was %c", command, letter);
    return self->script == &self->dialogue->opening ? hang_up(self) : end_message(self);
}

static enum outcome hear_negotiation(struct conversation *self, char letter, const char *data, size_t size)
{
    if (letter != 'O' || size < 12) {
        complain(self, "the answer to the negotiation was %c", letter);
        return hang_up(self);
    }
    self->dialogue = dialogue_for(self->mail, data, size);
    self->script = &self->dialogue->opening;
    return speak(self);
}

static enum outcome hear(struct conversation *self, char letter, const char *data, size_t size)
{
    if (self->dialogue == NULL)
        return hear_negotiation(self, letter, data, size);
    if (letter == 'p') /* it asks for patience */
        return WAITING;
    if (self->blocked) {
        complain(self, "it answered %c before %c was sent", letter, awaited(self));
        return hang_up(self);
    }
    return awaited(self) == 'E' ? hear_verdict(self, letter, data, size) : hear_reply(self, letter);
}

/* The packets that have come in whole. */
static enum outcome hear_packets(struct conversation *self)
{
    enum outcome outcome = WAITING;
    size_t used = 0;

    while (outcome == WAITING && self->input_size - used >= 5) {
        const unsigned char *length = (const unsigned char *)self->input + used;
        const size_t size = (size_t)length[0] << 24 | (size_t)length[1] << 16 | (size_t)length[2] << 8 | length[3];
        if (size == 0 || size + 4 > sizeof self->input) {
            complain(self, "a packet of %zu bytes while the answer to %c was due", size, awaited(self));
            return hang_up(self);
        }
        if (self->input_size - used < size + 4)
            break;
        outcome = hear(self, self->input[used + 4], self->input + used + 5, size - 1);
        used += size + 4;
    }
    self->input_size -= used;
    memmove(self->input, self->input + used, self->input_size);
    if (outcome == ANSWERED && self->input_size > 0)
        complain(self, "it went on after its verdict");
    return outcome;
}

/* ---- What the caller does --------------------------------------------------------------- */

/* Connects and negotiates; message `number` follows by itself. */
enum outcome conversation_open(struct conversation *self, const struct address *address, const struct mail *mail,
                               uint64_t number)
{
    const int family = address->name.ss_family, on = 1;

    *self = (struct conversation){.mail = mail, .number = number, .connected_at = now()};
    self->begun_at = self->connected_at;
    self->fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (self->fd < 0 || connect(self->fd, (const struct sockaddr *)&address->name, address->size) < 0) {
        complain(self, "no connection: %s", strerror(errno));
        return hang_up(self);
    }
    if (family != AF_UNIX)
        setsockopt(self->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    fcntl(self->fd, F_SETFL, O_NONBLOCK); /* only now: a connection that waits in the backlog is made */
    if (send(self->fd, negotiation.bytes, negotiation.size, MSG_NOSIGNAL) < 0) {
        complain(self, "the filter closed the connection before the negotiation");
        return hang_up(self);
    }
    return WAITING;
}

/* The next message on a connection whose last one was answered. */
enum outcome conversation_next(struct conversation *self, uint64_t number)
{
    self->number = number;
    self->complaint[0] = '\0';
    return begin_message(self);
}

/* The socket has something to read. */
enum outcome conversation_heard(struct conversation *self)
{
    const ssize_t got = read(self->fd, self->input + self->input_size, sizeof self->input - self->input_size);

    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return WAITING;
    if (got <= 0) {
        complain(self, "the filter closed the connection before the answer to %c", awaited(self));
        return hang_up(self);
    }
    self->input_size += (size_t)got;
    return hear_packets(self);
}

/* The socket has room again. */
enum outcome conversation_unblocked(struct conversation *self)
{
    return speak(self);
}

void conversation_give_up(struct conversation *self, unsigned seconds)
{
    complain(self, "no answer to %c within %u seconds", awaited(self), seconds);
    hang_up(self);
}

/* Says farewell as Postfix does. */
void conversation_close(struct conversation *self)
{
    if (self->fd < 0)
        return;
    ssize_t ignored = send(self->fd, farewell.bytes, farewell.size, MSG_NOSIGNAL);
    (void)ignored;
    hang_up(self);
}
