/* SPDX-License-Identifier: GPL-3.0-or-later */
/* What an MTA says to a filter: the bytes of an opening and of messages, and where it waits for an answer. */
#ifndef BENCHMARK_SCRIPT_H
#define BENCHMARK_SCRIPT_H

#include <stddef.h>
#include <stdint.h>

/* The work that a message is. */
struct mail {
    unsigned headers;
    size_t body;
    unsigned recipients;
};

/* After `end` bytes the MTA waits for the answer to `command`. */
struct stop {
    size_t end;
    char command;
};

/* Where a script goes on when the filter answers SKIP to a command that repeats. */
struct place {
    size_t at, stop;
};

struct script {
    char *bytes;
    size_t size, capacity;
    struct stop *stops;
    size_t stop_count, stop_capacity;
    struct place after_recipients, after_headers, after_body;
    unsigned long sum; /* what the filter must find: sizes of the header's values and of the body */
};

/* All scripts for one answer to the negotiation. */
struct dialogue {
    struct script opening;   /* CONNECT and HELO */
    struct script *messages; /* they differ a little: no two have the same sum */
    size_t message_count;
    const char *lead; /* what stands before a value that the filter adds: a space with HDR_LEADSPC */
    struct dialogue *next;
    size_t answer_size;
    char answer[];
};

/* A packet that is the same in each conversation. */
struct packet {
    const char *bytes;
    size_t size;
};
extern const struct packet negotiation, abort_message, farewell;

const struct dialogue *dialogue_for(const struct mail *mail, const char *answer, size_t size);

#endif
