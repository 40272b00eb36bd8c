/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What Python sees of C. build_milter.py gives this to cffi's parser, which
 * understands no preprocessor; the compiler checks it against milter_shim.h and
 * libmilter's mfapi.h.
 */

/* libmilter: the process */
int smfi_setconn(char *connection);
int smfi_opensocket(bool remove);
int smfi_setbacklog(int backlog);
int smfi_setdbg(int level);
int smfi_version(unsigned int *major, unsigned int *minor, unsigned int *patchlevel);
#define SMFI_VERSION ...

/* The shim: see milter_shim.h for who may call what. */
enum milter_stage {
    MILTER_CONNECT, MILTER_HELO, MILTER_MAIL, MILTER_RCPT, MILTER_DATA, MILTER_HEADER, MILTER_EOH, MILTER_BODY,
    MILTER_EOM, MILTER_UNKNOWN, MILTER_ABORT, MILTER_CLOSE, MILTER_STAGES
};
enum milter_mode { MILTER_IGNORE, MILTER_RECORD, MILTER_DEFER, MILTER_ENTER };
#define MILTER_ANSWERED ...
#define MILTER_OWED ...
#define MILTER_TRACKS ...
#define MILTER_HOLDS ...
enum milter_result {
    MILTER_OK, MILTER_EXPIRED, MILTER_NOT_EOM, MILTER_NOT_GRANTED, MILTER_TOO_LONG, MILTER_BODY_OVER, MILTER_FAILED,
    MILTER_ABSENT, MILTER_BUSY, MILTER_CHILD, ...
};

struct milter_plan {
    int app;
    unsigned char mode[12];
    unsigned long actions;
    unsigned long required;
    unsigned long steps;
    const char *macros[7];
    int negotiates;
    int gathers;
    int leading_space;
    size_t spool_size;
    const char *spool_directory;
    int *open_sessions;
    int wanted_only;
};
struct milter_run;
struct milter_session;
struct milter_event {
    struct milter_session *session;
    uint64_t token;
    uint64_t number;
    int app;
    int stage;
    uint64_t message_began;
    int ended_count;
    uint64_t ended[16];
    int content_error;
    unsigned long actions;
    unsigned long steps;
    const char *log;
    size_t log_size;
    const char *chunks;
    size_t chunks_size;
    const char *content;
    int content_file;
    size_t content_size;
    size_t header_size;
    char *changes;
    size_t changes_capacity;
    size_t changes_size;
    char *reserved;
};

#define MILTER_WANTED_SHIFT ...
#define MILTER_WANTED_MASK ...

int milter_register(const char *name);
int milter_serve(int wake_fd);
size_t milter_set_max_data_size(size_t size);
struct milter_run *milter_begin(const struct milter_plan *plan);
void milter_end(struct milter_run *run);
int milter_wait_sessions(struct milter_run *run, int milliseconds);
int milter_wait_handlers(struct milter_run *run, int milliseconds);
int milter_take_ended(struct milter_run *run, uint64_t *numbers, int count);

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

/* Forked children: see child.h. */
bool milter_is_child(void);
void milter_hold_newcomers(void);
void milter_let_newcomers_in(void);
int milter_hide(int fd);
void milter_show(int number);

/* libmilter's sessions, listener and log: see scheduler.h and redirect.h. */
int milter_set_timeout(int seconds);
void milter_lead_by(int threads);
#define MILTER_STATIC ...
bool milter_io_wrapped(void);
const char *milter_io_symbols(void);
int milter_io_log_to(int fd);
void milter_io_expect(int family);
bool milter_lacks_ipv6(void);

/* Python, as the shim sees it. */
extern "Python+C" int milter_python_negotiate(struct milter_session *session, uint64_t token, uint64_t number,
                                              int app, unsigned long offered_actions, unsigned long offered_steps,
                                              unsigned long *actions, unsigned long *steps);
extern "Python+C" int milter_python_enter(struct milter_event *event);
