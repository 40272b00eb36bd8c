/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * packets.c with a look inside, and libmilter's engine with a guard around it.
 *
 * The linker sends the scheduler's calls of mi_engine to __wrap_mi_engine, which sees whether
 * a session is served by one thread at a time. It sleeps now and then, so that what comes between
 * two steps, or between the last step and the end, comes often.
 */
#include "../../milter/shim/packets.c"

#include "inside.h"
#include "tools.h"

#if MILTER_REDIRECT

enum { MOST_SERVED = 256 };

static _Atomic(void *) served[MOST_SERVED]; /* contexts of libmilter, each by a thread of its own */

int __real_mi_engine(SMFICTX *ctx);
int __wrap_mi_engine(SMFICTX *ctx);

/* Claims a place first, and looks at the others then: of two threads, one sees the other. */
static int begin_step(SMFICTX *ctx)
{
    int place = 0;
    void *none = NULL;

    while (place < MOST_SERVED && !atomic_compare_exchange_strong(&served[place], &none, ctx)) {
        none = NULL;
        place++;
    }
    if (place == MOST_SERVED)
        violation("more than %d threads serve sessions", MOST_SERVED);
    for (int i = 0; i < MOST_SERVED; i++)
        if (i != place && atomic_load(&served[i]) == ctx)
            violation("two threads serve a session");
    return place;
}

int __wrap_mi_engine(SMFICTX *ctx)
{
    const int place = begin_step(ctx);

    if (chance(500) == 0)
        nap(chance(2000));
    const int result = __real_mi_engine(ctx);
    if (chance(500) == 0)
        nap(chance(2000));
    if (place < MOST_SERVED)
        atomic_store(&served[place], NULL);
    return result;
}

const char *left_behind(void)
{
    for (int fd = 0; fd < milter_most_descriptors(); fd++) {
        const struct connection *connection = entry(fd);

        if (connection == NULL)
            continue;
        if (atomic_load(&connection->open))
            return "a connection is open";
        if (atomic_load(&connection->turn) != 0)
            return "a session has not ended";
        if (connection->block != NULL || connection->data != NULL)
            return "a connection that is closed has memory";
    }
    return blocks_kept() > BLOCKS_KEPT ? "more blocks are kept than are wanted" : NULL;
}

long blocks_kept(void)
{
    pthread_mutex_lock(&blocks_lock);
    const long count = free_count;
    pthread_mutex_unlock(&blocks_lock);
    return count;
}

#else /* libmilter is linked as it is */

const char *left_behind(void)
{
    return NULL;
}

long blocks_kept(void)
{
    return 0;
}

#endif
