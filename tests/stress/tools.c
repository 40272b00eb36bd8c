/* SPDX-License-Identifier: GPL-3.0-or-later */
/* What all rooms use: violations, chance, pauses, bytes that grow. */
#include "stress.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

atomic_uint violations, hangs;
atomic_ulong ways[WAYS], seeds;
atomic_uchar fate[MESSAGES];

void violation(const char *format, ...)
{
    va_list arguments;
    char text[512];

    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (atomic_fetch_add(&violations, 1) < 20)
        fprintf(stderr, "VIOLATION %s\n", text);
}

void tried(enum way way)
{
    atomic_fetch_add(&ways[way], 1);
}

/* ---- Those who wait until others have got on: a handler, or a client ---------------------- */

static atomic_int waiting; /* for others */
static atomic_bool may_wait;

/* If so, waits_no_more() follows. */
bool may_wait_for_others(void)
{
    atomic_fetch_add(&waiting, 1);
    if (atomic_load(&may_wait))
        return true;
    atomic_fetch_sub(&waiting, 1);
    return false;
}

void waits_no_more(void)
{
    atomic_fetch_sub(&waiting, 1);
}

/* By the main thread, before it has the clients pause, or ends a run: else that would end the waits, too. */
void let_no_more_wait(void)
{
    atomic_store(&may_wait, false);
    while (atomic_load(&waiting) > 0)
        nap(1000);
}

void let_wait(void)
{
    atomic_store(&may_wait, true);
}

/* ---- Chance and time ------------------------------------------------------------------------ */

static _Thread_local uint64_t random_state;

unsigned chance(unsigned n) /* 0 ... n-1 */
{
    if (random_state == 0)
        random_state = (atomic_fetch_add(&seeds, 1) + 1) * 0x9E3779B97F4A7C15u;
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (unsigned)(random_state >> 33) % n;
}

void nap(unsigned microseconds)
{
    const struct timespec pause = {0, microseconds * 1000L};
    nanosleep(&pause, NULL);
}

static long microseconds_now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000 + time.tv_nsec / 1000;
}

/* Keeps a processor busy. */
void compute(unsigned microseconds)
{
    const long end = microseconds_now() + microseconds;

    while (microseconds_now() < end)
        continue;
}

/* Until then, or until enough has gone wrong. */
void seconds(double s)
{
    while (s > 0 && atomic_load(&violations) < 20) {
        nap(10000);
        s -= 0.01;
    }
}

void mark(unsigned message, unsigned char what)
{
    atomic_fetch_or(&fate[message % MESSAGES], what);
}

/* ---- Bytes that grow ---------------------------------------------------------------------- */

void add(struct bytes *bytes, const void *more, size_t size)
{
    if (bytes->size + size > bytes->room) {
        bytes->room = 2 * (bytes->size + size);
        bytes->at = __real_realloc(bytes->at, bytes->room);
    }
    if (size > 0)
        memcpy(bytes->at + bytes->size, more, size);
    bytes->size += size;
}

void add_text(struct bytes *bytes, const char *text)
{
    add(bytes, text, strlen(text) + 1);
}

void empty(struct bytes *bytes)
{
    if (bytes->room > 64 * 1024) {
        __real_free(bytes->at);
        *bytes = (struct bytes){NULL, 0, 0};
    }
    bytes->size = 0;
}

void discard(struct bytes *bytes)
{
    __real_free(bytes->at);
    *bytes = (struct bytes){NULL, 0, 0};
}

/* A packet as the client will see it: size, letter, bytes. */
void add_packet(struct bytes *packets, char letter, const void *bytes, size_t size)
{
    const uint32_t length = (uint32_t)size;

    add(packets, &length, sizeof length);
    add(packets, &letter, 1);
    add(packets, bytes, size);
}
