/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Has the MTA closed its connection?
 *
 * The descriptor tells. packets.c knows it where libmilter's packets are ours. Elsewhere
 * it is private to libmilter, and its place in libmilter's context is found by
 * asking: smfi_progress is given a context of our own, in which every word is the
 * descriptor of /dev/null but one, and shows whether it took that one by writing there.
 */
#define _GNU_SOURCE

#include "milter_shim.h"
#include "packets.h"
#include "redirect.h"

#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { CONTEXT_WORDS = 1024 }; /* the descriptor is one of the first words of any libmilter's context */

static size_t place = CONTEXT_WORDS; /* written once, before libmilter has a thread */

/* By milter_find_descriptor. The second of the two must not block. */
static void ask(int elsewhere, int reader, int probe)
{
    int *context = malloc(CONTEXT_WORDS * sizeof *context);
    char packet[16];

    if (context == NULL)
        return;
    for (size_t i = 0; i < CONTEXT_WORDS; i++)
        context[i] = elsewhere;
    for (size_t i = 0; i < CONTEXT_WORDS && place == CONTEXT_WORDS; i++) {
        context[i] = probe;
        (void)smfi_progress((SMFICTX *)(void *)context);
        if (read(reader, packet, sizeof packet) > 0)
            place = i;
        context[i] = elsewhere;
    }
    free(context);
}

/* By milter_register, once, before libmilter has a thread. Finding nothing only means never to know. */
void milter_find_descriptor(void)
{
    int probe[2];

    if (milter_io_wrapped())
        return;
    const int elsewhere = open("/dev/null", O_WRONLY | O_CLOEXEC);
    if (elsewhere >= 0 && pipe(probe) == 0) {
        (void)fcntl(probe[0], F_SETFL, O_NONBLOCK);
        ask(elsewhere, probe[0], probe[1]);
        close(probe[0]);
        close(probe[1]);
    }
    if (elsewhere >= 0)
        close(elsewhere);
}

/*
 * Under the session's lock, while the session is in Python, so that the connection
 * is open on our side. `known`: its descriptor, if packets.c knows it, or -1. Without waiting.
 */
bool milter_peer_gone(SMFICTX *ctx, int known)
{
    const int fd = known < 0 && place < CONTEXT_WORDS ? ((const int *)(void *)ctx)[place] : known;

    if (fd < 0)
        return false;
#ifdef POLLRDHUP
    struct pollfd peer = {fd, POLLRDHUP, 0};
    const struct timespec at_once = {0, 0};
    return ppoll(&peer, 1, &at_once, NULL) > 0; /* not poll, which packets.c has for libmilter */
#else /* only once all that was sent has been read */
    char byte;
    return recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) == 0;
#endif
}
