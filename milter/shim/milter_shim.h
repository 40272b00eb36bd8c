/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The shim's interface to Python: what cdef.h declares to cffi, said once more
 * for the C compiler, which compares the two.
 *
 * Nothing here knows the Python API. Python is entered by the two functions at
 * the end, which cffi generates.
 */
#ifndef MILTER_SHIM_H
#define MILTER_SHIM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <libmilter/mfapi.h>

/* The stages of a conversation, as indexes. */
enum milter_stage {
    MILTER_CONNECT,
    MILTER_HELO,
    MILTER_MAIL,
    MILTER_RCPT,
    MILTER_DATA,
    MILTER_HEADER,
    MILTER_EOH,
    MILTER_BODY,
    MILTER_EOM,
    MILTER_UNKNOWN,
    MILTER_ABORT,
    MILTER_CLOSE,
    MILTER_STAGES
};

/* What the shim does with the events of a stage. */
enum milter_mode {
    MILTER_IGNORE, /* nobody wants to know */
    MILTER_RECORD, /* remember it for a later call into Python */
    MILTER_DEFER,  /* handlers observe it: with the next event that enters, at the latest when the message ends */
    MILTER_ENTER   /* call Python at once */
};

/*
 * What Python answers: a verdict (SMFIS_*) in the low byte, and these flags. An
 * answer without MILTER_ANSWERED is a failure. cffi returns 0 when a callback
 * raises or was never attached, so a failure can never look like a verdict.
 */
#define MILTER_ANSWERED 0x100
#define MILTER_OWED     0x200 /* Python owes an error: enter it at the next stage that replies */
#define MILTER_TRACKS   0x400 /* Python keeps state of this message: tell it how it ends */
#define MILTER_HOLDS    0x800 /* Python keeps state of this session: tell it when it ends */

/* How many ended connections Python is told of in one call. */
#define MILTER_ENDED 16

/* Bytes of one smfi_replacebody, which takes an int. */
#define MILTER_BODY_PART ((size_t)1 << 30)

/* What the functions below return. */
enum milter_result {
    MILTER_OK = 0,
    MILTER_EXPIRED = -1,     /* the call of the handler is over */
    MILTER_NOT_EOM = -2,     /* possible only at the end of the message */
    MILTER_NOT_GRANTED = -3, /* the MTA did not grant this action */
    MILTER_TOO_LONG = -4,    /* longer than one packet of the protocol */
    MILTER_BODY_OVER = -5,   /* another action came after the first part of the new body */
    MILTER_FAILED = -6,      /* libmilter refused, or the connection is gone */
    MILTER_ABSENT = -7,      /* no such macro */
    MILTER_BUSY = -8,        /* not without waiting */
    MILTER_CHILD = -9        /* this process is a forked child, which has no way to the MTA */
};

/* What a registry of handlers implies; Python's memory, copied by milter_begin. */
struct milter_plan {
    int app;                           /* Python's number of the registry */
    unsigned char mode[MILTER_STAGES]; /* enum milter_mode for each stage */
    unsigned long actions;             /* SMFIF_*: wanted where offered */
    unsigned long required;            /* SMFIF_*: a session without them is refused */
    unsigned long steps;               /* SMFIP_*: wanted where offered */
    const char *macros[SMFIM_LAST + 1]; /* symbol lists by SMFIM_*, NULL for the MTA's default */
    int negotiates;                    /* Python wants to see each negotiation */
    int gathers;                       /* whole messages are wanted at their end */
    int leading_space;                 /* handlers want the space after a header's colon */
    size_t spool_size;                 /* bytes of a gathered message that stay in memory */
    const char *spool_directory;       /* for the file of a longer one */
    int *open_sessions;                /* where to count them besides, for somebody who looks on; or NULL */
    int wanted_only;                   /* serve only connections that want this app, see below */
};

/*
 * Whom a connection wants: a test of several filters in one process puts the
 * number of the app into these bits of the actions that it offers. libmilter
 * passes on nothing else that comes so early. No MTA sets them (the highest one
 * of mfdef.h is 0x100), and while no run is for those who want it alone, nobody
 * looks at them.
 */
#define MILTER_WANTED_SHIFT 12
#define MILTER_WANTED_MASK  0x7ffffUL

/* One run of a filter, from start to stop. */
struct milter_run;
struct milter_session;

/* One entry into Python: what the shim tells, and where Python leaves its changes. Valid until the call returns. */
struct milter_event {
    struct milter_session *session;
    uint64_t token;
    uint64_t number;        /* of the session */
    int app;
    int stage;              /* of the event at the end of the log */
    uint64_t message_began; /* when MAIL came last: nanoseconds of CLOCK_MONOTONIC */
    int ended_count;        /* connections that are gone, whose objects Python can drop: */
    uint64_t ended[MILTER_ENDED];
    int content_error;      /* errno: the message could not be gathered */
    unsigned long actions;  /* granted */
    unsigned long steps;    /* agreed */
    const char *log;
    size_t log_size;
    const char *chunks;     /* of the body, one after another; the log tells their sizes */
    size_t chunks_size;
    const char *content;    /* at the end of a message that was gathered, or NULL: it lies in the file */
    int content_file;       /* a descriptor, or -1 */
    size_t content_size;
    size_t header_size;     /* of the content: name NUL value NUL ...; the rest is the body */
    char *changes;          /* for Python to fill in, see changes.c */
    size_t changes_capacity;
    size_t changes_size;
    char *reserved;         /* by milter_reserve_changes */
};

/* The process: called by the thread that starts and stops a filter. */
int milter_register(const char *name);
int milter_serve(int wake_fd);
size_t milter_set_max_data_size(size_t size);
struct milter_run *milter_begin(const struct milter_plan *plan);
void milter_end(struct milter_run *run);
int milter_wait_sessions(struct milter_run *run, int milliseconds);
int milter_wait_handlers(struct milter_run *run, int milliseconds);
int milter_take_ended(struct milter_run *run, uint64_t *numbers, int count);

/* The session: called by a handler, or by any thread that holds a context. */
int milter_macro(struct milter_session *session, uint64_t token, const char *name, char *buffer, size_t size);
int milter_try_macro(struct milter_session *session, uint64_t token, const char *name, char *buffer, size_t size);
int milter_mta_gone(struct milter_session *session, uint64_t token);
int milter_request_macros(struct milter_session *session, uint64_t token, int where, const char *names);
int milter_set_reply(struct milter_session *session, uint64_t token, const char *code, const char *enhanced,
                     char *const *lines, size_t count);
int milter_add_header(struct milter_session *session, uint64_t token, const char *name, const char *value);
int milter_insert_header(struct milter_session *session, uint64_t token, int index, const char *name,
                         const char *value);
int milter_change_header(struct milter_session *session, uint64_t token, const char *name, int index,
                         const char *value);
int milter_change_sender(struct milter_session *session, uint64_t token, const char *address,
                         const char *parameters);
int milter_add_recipient(struct milter_session *session, uint64_t token, const char *address,
                         const char *parameters);
int milter_remove_recipient(struct milter_session *session, uint64_t token, const char *address);
int milter_send_body(struct milter_session *session, uint64_t token, const char *data, size_t size);
int milter_quarantine(struct milter_session *session, uint64_t token, const char *reason);
int milter_progress(struct milter_session *session, uint64_t token);
int milter_offer_progress(struct milter_session *session, uint64_t token);

char *milter_reserve_changes(struct milter_event *event, size_t size);

/* Within the shim: macro_guard.c, peer.c, changes.c. */
void milter_find_macro_arrays(void);
void milter_mend_macros(SMFICTX *ctx);
void milter_find_descriptor(void);
bool milter_peer_gone(SMFICTX *ctx, int known);
bool milter_send_changes(SMFICTX *ctx, char *changes, size_t size, bool body_untouched);

/* The two ways into Python, generated by cffi. */
int milter_python_negotiate(struct milter_session *session, uint64_t token, uint64_t number, int app,
                            unsigned long offered_actions, unsigned long offered_steps, unsigned long *actions,
                            unsigned long *steps);
int milter_python_enter(struct milter_event *event);

#endif
