/* SPDX-License-Identifier: GPL-3.0-or-later */
/* The records of a log, and what the clients write down of what they send. */
#include "stress.h"

#include <stdlib.h>
#include <string.h>

struct transcript message_transcripts[CLIENTS * REMEMBERED], connection_transcripts[CLIENTS * REMEMBERED];

const unsigned long no_reply[MILTER_STAGES] = {
    SMFIP_NR_CONN, SMFIP_NR_HELO, SMFIP_NR_MAIL, SMFIP_NR_RCPT, SMFIP_NR_DATA,
    SMFIP_NR_HDR,  SMFIP_NR_EOH,  SMFIP_NR_BODY, 0,             SMFIP_NR_UNKN,
};

enum milter_mode mode_of(const struct run *run, char letter)
{
    static const char letters[] = "CHMRTLNBEUAQ"; /* by stage */
    const char *found = strchr(letters, letter);

    if (found == NULL || (letter == 'E' && run->plan.mode[MILTER_EOM] == MILTER_IGNORE))
        return MILTER_RECORD; /* the end is always told */
    return run->plan.mode[found - letters];
}

const char *field(const char **at, const char *end)
{
    const char *start = *at, *nul = start < end ? memchr(start, 0, (size_t)(end - start)) : NULL;

    if (nul == NULL)
        return NULL;
    *at = nul + 1;
    return start;
}

/* Where the record ends; NULL when it is broken, as it may be when memory ran out. */
const char *record_end(const char *at, const char *end)
{
    const char *letter = field(&at, end);
    int fields = 0;

    if (letter == NULL || letter[0] == 0 || letter[1] != 0)
        return NULL;
    if (strchr("MR", *letter) != NULL) {
        const char *count = field(&at, end);
        fields = count != NULL ? atoi(count) : 0;
        if (fields < 1)
            return NULL;
    } else if (strchr("CHULB", *letter) != NULL)
        fields = *letter == 'C' ? 4 : *letter == 'L' ? 2 : 1;
    else if (strchr("TNEAQX", *letter) == NULL)
        return NULL;
    for (; fields > 0; fields--)
        if (field(&at, end) == NULL)
            return NULL;
    return at;
}

/* ---- Transcripts -------------------------------------------------------------------------- */

static struct transcript *place_of(struct transcript *all, unsigned number)
{
    return &all[(number - FIRST_NUMBER) % (CLIENTS * REMEMBERED)];
}

/* By a client. The caller unlocks it. */
struct transcript *begin_transcript(struct transcript *all, unsigned number)
{
    struct transcript *t = place_of(all, number);

    pthread_mutex_lock(&t->lock);
    t->number = number;
    t->told = t->before = t->header_size = 0;
    t->finished = t->ruined = false;
    empty(&t->log);
    empty(&t->content);
    empty(&t->changes);
    return t;
}

/* Locked; NULL when it has made way for another one. */
struct transcript *find_transcript(struct transcript *all, unsigned number)
{
    struct transcript *t = place_of(all, number);

    if (number < FIRST_NUMBER)
        return NULL;
    pthread_mutex_lock(&t->lock);
    if (t->number == number)
        return t;
    pthread_mutex_unlock(&t->lock);
    return NULL;
}

/* Skips records of stages that the plan ignores. Returns whether others are left before `limit`. */
bool more_records(const struct transcript *t, size_t *at, size_t limit, const struct run *run)
{
    while (*at < limit && mode_of(run, t->log.at[*at]) == MILTER_IGNORE)
        *at = (size_t)(record_end(t->log.at + *at, t->log.at + t->log.size) - t->log.at);
    return *at < limit;
}
