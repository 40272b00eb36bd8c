/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What the rooms of the stress program share: stress.c is the process and says what is
 * checked, mta.c the clients, standin.c the stand-in for Python, transcript.c what was sent,
 * faults.c memory and disks that run out and system calls that fail, log.c the log,
 * inside.c and leads.c what lies within the shim, tools.c the rest.
 */
#ifndef STRESS_H
#define STRESS_H

#include "milter_shim.h"
#include "tools.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    MESSAGES = 1 << 22,
    FIRST_NUMBER = 1000, /* of messages and connections; garbage has lower ones */
    CLIENTS = 64,        /* at most; the numbers of each are its own, modulo this */
    REMEMBERED = 64,     /* messages and connections of one client */
    RUNS = 1 << 14,
    PACKET = 65535,
    POOL = 1 << 20
};
enum { FAILED = 1, ACCEPTED = 2, DISCARDED = 4, PASSED = 8, BLIND = 16 }; /* of a message */

/* What is to be tried at least once. */
enum way {
    BATCHES,
    FULL_LOGS,
    IN_MEMORY,
    IN_FILE,
    CONTENT_LOST,
    FEW_CHANGES,
    MANY_CHANGES,
    BAD_CHANGES,
    ENDED_QUIETLY,
    ENDED_HELD,
    ENDED_DEFERRED,
    ENDED_ENOUGH,
    ABORTED,
    PAUSES,
    FORKED,
    PARTS,
    PIPELINES,
    LATE_READS,
    FLOODS,
    SLEEPS,
    COMPUTES,
    OTHER_THREADS,
    MEETINGS,
    RUN_OUT,
    WAYS
};

/* One run of the filter. */
struct run {
    struct milter_run *run;
    struct milter_plan plan;
    bool sound;            /* the directory for long messages is there */
    bool bodies_left;      /* new bodies are left as changes; else handlers send them */
    bool quiet;            /* only whole messages are wanted; the stand-in keeps nothing, and never fails */
    bool seldom;           /* only negotiations are wanted */
    bool observing;        /* all handlers observe */
    atomic_bool ending;    /* the gate is about to be closed */
    atomic_bool gone;      /* nothing may enter */
};

/* Bytes that grow: the stress's own, which no fault concerns. */
struct bytes {
    char *at;
    size_t size, room;
};

/*
 * What a client sends of one message, or of one connection outside of its messages:
 * written before the packet is sent, so that whoever is told of it finds it here.
 */
struct transcript {
    pthread_mutex_t lock;
    unsigned number;       /* of the message, or the connection */
    struct bytes log;      /* as the shim would write it, but with the space after a colon */
    size_t told;           /* how much of the log the stand-in has been told */
    bool finished;         /* all of it was sent, and the client said that this is the end */
    /* Of a message: */
    unsigned connection;
    size_t before;         /* size of the connection's log when it began */
    struct bytes content;  /* what is to be gathered */
    size_t header_size;
    struct bytes changes;  /* packets that the stand-in's changes make */
    /* Of a connection: */
    bool ruined;           /* the stand-in failed with what belongs to no message */
};

/* The numbers of one client's next message and connection. */
struct numbers {
    unsigned message, connection;
};

/* A connection, as its client sees it. */
struct mta {
    int fd;
    struct numbers *next;
    unsigned version;
    unsigned long steps;
    int app;
    unsigned message;
    struct transcript *connection_log, *message_log;
    bool in_message;
    bool ended, cut;       /* closed by the filter, or by us in the middle of a packet */
    struct bytes out;      /* packets that are not sent yet */
    struct bytes packet;   /* the last answer */
    struct bytes changes;  /* packets before a verdict */
    unsigned sent[REMEMBERED], made[REMEMBERED]; /* the messages and connections of this socket */
    unsigned sent_count, made_count;
};

/* Instead of an answer's letter. */
enum { CLOSED = 0, HANGS = '?' };

extern struct run runs[RUNS];
extern atomic_int current_app;
extern atomic_bool stop_clients, stop_all, pause_clients;
extern atomic_int pausing; /* clients */
extern atomic_int taking;  /* threads that take ended connections */
extern atomic_uint violations, hangs;
extern atomic_ulong ways[WAYS];
extern atomic_ulong messages, connections, entries, late_done, late_expired, passed, refused, cut, timeouts;
extern atomic_ulong seeds, faults, disk_faults;
extern atomic_long kept; /* allocations of the shim that grow and go */
extern atomic_long stay; /* sessions and runs */
extern atomic_uchar fate[MESSAGES]; /* by the number of the message */
extern atomic_bool started; /* libmilter is, so that system calls may fail */
extern bool with_faults, idle, terminated; /* terminated: garbage ends with NUL, as libmilter takes for granted */
extern char path[64];
extern char pool[POOL]; /* bytes for bodies */
extern const unsigned long no_reply[MILTER_STAGES];
extern struct transcript message_transcripts[CLIENTS * REMEMBERED], connection_transcripts[CLIENTS * REMEMBERED];

/* tools.c */
void tried(enum way way);
bool may_wait_for_others(void);
void waits_no_more(void);
void let_no_more_wait(void);
void let_wait(void);
void mark(unsigned message, unsigned char what);
void add(struct bytes *bytes, const void *more, size_t size);
void add_text(struct bytes *bytes, const char *text);
void add_packet(struct bytes *packets, char letter, const void *bytes, size_t size);
void empty(struct bytes *bytes);
void discard(struct bytes *bytes);

/* faults.c: the linker sends the shim's calls to __wrap_*, and the stress's own go to __real_*. */
void *__real_malloc(size_t);
void *__real_realloc(void *, size_t);
void *__real_calloc(size_t, size_t);
void __real_free(void *);
int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument);

/* transcript.c */
enum milter_mode mode_of(const struct run *run, char letter);
const char *field(const char **at, const char *end);
const char *record_end(const char *at, const char *end);
struct transcript *begin_transcript(struct transcript *all, unsigned number);
struct transcript *find_transcript(struct transcript *all, unsigned number);
bool more_records(const struct transcript *t, size_t *at, size_t limit, const struct run *run);

/* standin.c, which has the two ways into Python, too */
int take_ended(struct milter_run *run);
void *late(void *unused);
void check_ends(int app);

/* log.c */
void check_log(void);

/* mta.c */
bool goes_on(void);
void hang_up(struct mta *m);
int call_filter(void);
bool negotiate(struct mta *m);
bool put(struct mta *m, char command, const void *data, size_t size);
char get(struct mta *m);
void *client(void *argument);

#endif
