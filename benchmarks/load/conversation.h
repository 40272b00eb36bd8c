/* SPDX-License-Identifier: GPL-3.0-or-later */
/* One connection of an MTA to a filter: it says its script, and checks the filter's answers. */
#ifndef BENCHMARK_CONVERSATION_H
#define BENCHMARK_CONVERSATION_H

#include "script.h"

#include <stdbool.h>
#include <sys/socket.h>
#include <sys/uio.h>

enum outcome {
    WAITING,  /* for the filter, or for room to write (`blocked`) */
    ANSWERED, /* the message is over; `complaint` is not empty if the answer was wrong */
    BROKEN,   /* the connection is over, and the message was not answered: `complaint` tells why */
};

struct conversation {
    int fd; /* -1: not connected */
    bool blocked;
    char complaint[160];
    uint64_t connected_at, begun_at; /* nanoseconds: before connect(); before the first byte of MAIL went out */

    const struct mail *mail;
    const struct dialogue *dialogue; /* NULL until the filter has answered the negotiation */
    const struct script *script;
    struct place place;
    struct iovec held; /* bytes that wait for the next write, as in Postfix's buffer */
    uint64_t number;   /* of the message */
    unsigned headers_added;
    size_t input_size;
    char input[4096];
};

struct address {
    struct sockaddr_storage name;
    socklen_t size;
};

uint64_t now(void);
enum outcome conversation_open(struct conversation *self, const struct address *address, const struct mail *mail,
                               uint64_t number);
enum outcome conversation_next(struct conversation *self, uint64_t number);
enum outcome conversation_heard(struct conversation *self);
enum outcome conversation_unblocked(struct conversation *self);
void conversation_give_up(struct conversation *self, unsigned seconds);
void conversation_close(struct conversation *self);

#endif
