/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The scheduler: which thread serves which session.
 *
 * libmilter has a pool of workers, and its engine is a step: it serves all commands
 * of a session that are here, and returns. Where its calls are redirected (redirect.h),
 * those of mi_pool_controller_init and mi_start_session come to this file, so that its
 * sessions are served by our threads instead:
 *
 *   The leader waits with epoll for all connections, and takes one step of libmilter's
 *   engine for each on which something has come. So one thread enters Python, which need not
 *   wait for the GIL, and no thread wakes another for an event. Without a GIL as many
 *   threads lead as can run Python at the same time.
 *   The watcher looks every few milliseconds whether a leader is still in the same call
 *   of Python. If so, it takes the lead: the old leader finishes its step, and becomes a
 *   spare thread.
 *   A spare thread waits until a watcher is wanted. There is always one, or one is begun.
 *
 * A handler that waits (for a database, say) is found out by the watcher; and by its
 * leader afterwards: the call took long, and the thread was off its processor by its own
 * will. For the next calls, leaders then hand over before they enter Python, so that all
 * sessions wait side by side. How many calls, doubles each time, until it was wrong.
 *
 * A thread that leads, and is about to wait for a peer that does not read, hands over, too.
 *
 * (A libmilter with a thread for each connection starts no sessions here. Its threads go
 * straight into Python, and so they do where its calls are not redirected.)
 *
 * The invariants
 *
 *   1. A session is served by one thread at a time: by the one that moved its `turn` from
 *      RESTS to SERVED. That thread alone moves it back, or ends the session. Others that
 *      hear of news meanwhile move it to AGAIN, and leave it alone.
 *   2. News are not lost. Epoll tells of each arrival once (EPOLLET), and a session rests
 *      only when all that came was taken; or else epoll is asked to tell it again (watch_again).
 *   3. A connection's entry outlives it (packets.c), so news of one that has ended by now
 *      do no harm: its turn is ENDED, or the descriptor's next session finds nothing to do.
 *   4. A lead has one holder, or it is vacant and a watcher takes it. Only holders wait for
 *      news; for a moment one that has just lost the lead may still do so, and does no harm.
 *   5. There is a watcher, or a thread on its way to be one; or no thread could be begun,
 *      and a leader keeps its lead until one can, or a spare one comes.
 *   6. A leader's struct lies on its thread's stack. Others look at it under the lock, and
 *      only while it holds a lead; so a thread that ends takes the lock before.
 *
 * Locks: `lock` is for the fields below it. No function of libmilter or Python is called under it.
 */
#define _GNU_SOURCE

#include "scheduler.h"

#include "child.h"
#include "milter_shim.h"
#include "packets.h"
#include "redirect.h"

#if MILTER_REDIRECT

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <syslog.h>
#include <time.h>
#include <unistd.h>

enum {
    LEADS = 64,          /* at most */
    SPARES = 32,         /* threads that are kept for later; more of them end */
    TICK = 5,            /* milliseconds between two looks of the watcher */
    PATIENCE = 4,        /* ticks that a leader may compute in one call; one that sleeps has one */
    QUIET = 20,          /* ticks without a call, after which the watcher sleeps */
    STEP = 16,           /* times that a session takes what has come, before others get on */
    WAITING_FIRST = 64,  /* calls that go without the lead, when it was found that handlers wait */
    WAITING_MOST = 8192,
    PAUSE = 50           /* milliseconds, when something is wrong that may pass */
};

/* Nanoseconds. */
static const int64_t LONG = 200 * 1000;                /* a call that may have waited */
static const int64_t RETRY = 100 * 1000 * 1000;        /* until a thread is tried again, when there was none */
static const int64_t SWEEP = (int64_t)10 * 1000 * 1000 * 1000; /* between two looks for silent MTAs, at most */
static const int64_t SECOND = 1000 * 1000 * 1000;

static const uint32_t NEWS = EPOLLIN | EPOLLRDHUP | EPOLLET;

enum turn { ENDED, RESTS, SERVED, AGAIN };

struct leader {
    atomic_uint calls; /* odd: it is in Python, or about to be */
    pid_t thread;
    /* The thread's own: */
    int64_t entered;
    long switches;     /* times that it had given up its processor, when it looked last */
    long waits;        /* for news, since then */
    unsigned taken;    /* of the connection that it serves, in this step */
    bool counts;       /* this call may show that handlers wait */
    /* The watcher's: */
    unsigned seen, ticks;
};

/* libmilter's; see its worker.c, engine.c and handler.c. */
enum { MI_CONTINUE = 1 };
int mi_engine(SMFICTX *ctx);
void mi_clr_ctx(SMFICTX *ctx);

static int news = -1; /* of epoll; made before the first thread */
static int lead_count = 1;
static _Atomic int64_t timeout = 7210 * (int64_t)1000000000; /* libmilter's default */
static _Atomic(struct leader *) leads[LEADS]; /* who holds each; NULL: it is vacant. Written under the lock */
static atomic_bool watcher_sleeps;
static atomic_bool unwatched;  /* a watcher is wanted, and no thread can be begun */
static atomic_int waiting;     /* so many calls go without the lead */
static atomic_int waiting_next = WAITING_FIRST;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
/* Under the lock: */
static pthread_cond_t watcher_wake; /* with the monotonic clock */
static pthread_cond_t spare_wake = PTHREAD_COND_INITIALIZER;
static bool watcher_wanted = true;
static int spares;
static int64_t tried; /* when no thread could be begun */
static bool failing;  /* that was said */
static int64_t next_sweep;

/* This thread's, while it serves; NULL for threads of others. */
static _Thread_local struct leader *self;
/* Of libmilter's listener. */
static _Thread_local struct connection *expected;

static int64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * SECOND + time.tv_nsec;
}

/* ---- Threads ------------------------------------------------------------------------------ */

static void *work(void *unused);

/* Under the lock. Says once that there are no threads, and once that there are again. */
static bool begin_thread(void)
{
    pthread_t thread;
    const int error = pthread_create(&thread, NULL, work, NULL);

    atomic_store(&unwatched, error != 0);
    if (error == 0) {
        pthread_detach(thread);
        if (failing)
            milter_log(LOG_NOTICE, "threads can be started again");
        failing = false;
        return true;
    }
    tried = now();
    if (!failing)
        milter_log(LOG_ERR,
                   "no thread can be started (%s): connections wait for those that there are. Raise the limit "
                   "of threads (systemd: TasksMax=, LimitNPROC=; ulimit -u) or of memory, or let the MTA open "
                   "fewer connections",
                   strerror(error));
    failing = true;
    return false;
}

/* Under the lock, by a watcher that leaves its place. */
static void want_watcher(void)
{
    watcher_wanted = true;
    if (spares > 0)
        pthread_cond_signal(&spare_wake);
    else
        begin_thread();
}

/* Under the lock. One that could not be begun before is tried from time to time. */
static bool is_watched(void)
{
    if (!atomic_load(&unwatched))
        return true;
    return now() - tried > RETRY && begin_thread();
}

/* ---- Leads -------------------------------------------------------------------------------- */

/* Any thread. The place of the lead that this leader holds, or -1. */
static int lead_of(const struct leader *leader)
{
    for (int i = 0; i < lead_count; i++)
        if (atomic_load(&leads[i]) == leader)
            return i;
    return -1;
}

static bool leads_now(void)
{
    return self != NULL && lead_of(self) >= 0;
}

void milter_hand_over(void)
{
    if (!leads_now())
        return;
    pthread_mutex_lock(&lock);
    const int place = lead_of(self);
    if (place >= 0 && is_watched()) {
        atomic_store(&leads[place], NULL);
        pthread_cond_signal(&watcher_wake);
    }
    pthread_mutex_unlock(&lock);
}

/* Handlers wait, as has just been seen. */
static void expect_waiting(void)
{
    const int next = atomic_load(&waiting_next);

    atomic_store(&waiting, next);
    if (next < WAITING_MOST)
        atomic_store(&waiting_next, next * 2);
}

/* A call was short, or computed all the time. */
static void expect_no_waiting(void)
{
    const int next = atomic_load(&waiting_next);

    if (next > WAITING_FIRST)
        atomic_store(&waiting_next, next - 1);
}

/* How often has this thread given up its processor by its own will, to wait for something? */
static long switches(void)
{
    struct rusage usage;

    return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_nvcsw : 0;
}

/* By a leader, after a long call. It waits for news as well, so that this is too small rather than too large. */
static bool has_waited(void)
{
    const long all = switches(), mine = all - self->switches - self->waits;

    self->switches = all;
    self->waits = 0;
    return mine > 0;
}

void milter_before_python(void)
{
    milter_meet_python();
    if (!leads_now())
        return;
    if (atomic_load(&unwatched)) {
        pthread_mutex_lock(&lock);
        (void)is_watched();
        pthread_mutex_unlock(&lock);
    }
    self->counts = atomic_load(&waiting) <= 0;
    if (!self->counts) {
        atomic_fetch_sub(&waiting, 1);
        milter_hand_over();
    }
    self->entered = now();
    atomic_fetch_add(&self->calls, 1);
    if (atomic_load(&watcher_sleeps)) {
        pthread_mutex_lock(&lock);
        pthread_cond_signal(&watcher_wake);
        pthread_mutex_unlock(&lock);
    }
}

void milter_after_python(void)
{
    if (self == NULL || (atomic_load(&self->calls) & 1) == 0)
        return;
    atomic_fetch_add(&self->calls, 1);
    if (!self->counts || !leads_now()) /* a lead that was lost was seen by the watcher */
        return;
    if (now() - self->entered > LONG && has_waited())
        expect_waiting();
    else
        expect_no_waiting();
}

/* ---- Sessions ----------------------------------------------------------------------------- */

/* By the thread that serves the session, whose turn is over: it rests, and epoll tells again if there is something. */
static void watch_again(struct connection *connection)
{
    struct epoll_event event = {NEWS, {.ptr = connection}};

    atomic_store(&connection->rests_since, now());
    atomic_store(&connection->turn, RESTS);
    /* It fails if another thread has ended the session by now. */
    (void)epoll_ctl(news, EPOLL_CTL_MOD, connection->fd, &event);
}

/* By the thread that serves the session, after a step that goes on. */
static void rest(struct connection *connection)
{
    int expected_turn = SERVED;

    if (connection->left) {
        watch_again(connection);
        return;
    }
    atomic_store(&connection->rests_since, now());
    if (!atomic_compare_exchange_strong(&connection->turn, &expected_turn, RESTS))
        watch_again(connection);
}

/* By a leader that has the session's turn. `ends`: the peer sends no more, or something is wrong. */
static void serve(struct connection *connection, bool ends)
{
    self->taken = 0;
    milter_look_again(connection, ends);
    if (mi_engine(connection->ctx) == MI_CONTINUE) {
        rest(connection);
    } else {
        atomic_store(&connection->turn, ENDED);
        mi_clr_ctx(connection->ctx);
    }
}

/* Any thread. Does it have the session's turn now? If another one has, that one will look again. */
static bool take_turn(struct connection *connection)
{
    for (;;) {
        int turn = RESTS;

        if (atomic_compare_exchange_strong(&connection->turn, &turn, SERVED))
            return true;
        if (turn != SERVED || atomic_compare_exchange_strong(&connection->turn, &turn, AGAIN))
            return false;
    }
}

/* By a leader. False: look again. */
static bool wait_for_news(struct epoll_event *event)
{
    const int count = epoll_wait(news, event, 1, -1);

    self->waits++;
    if (count < 0 && errno != EINTR)
        real_poll(NULL, 0, PAUSE); /* somebody has closed the descriptor: there is nothing to do but to wait */
    return count == 1;
}

/* By a leader, until it has lost its lead. */
static void lead(void)
{
    while (leads_now()) {
        struct epoll_event event;

        if (wait_for_news(&event) && take_turn(event.data.ptr))
            serve(event.data.ptr, (event.events & ~(uint32_t)EPOLLIN) != 0);
    }
}

bool milter_goes_on(void)
{
    return self == NULL || (self->taken++ < STEP && leads_now());
}

/* ---- The watcher -------------------------------------------------------------------------- */

/* Does this thread compute, or would if it had a processor? Where nothing tells: no. */
static bool computes(pid_t thread)
{
    char path[64], text[512];
    const char *state;

    snprintf(path, sizeof path, "/proc/self/task/%d/stat", (int)thread);
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    const ssize_t size = read(fd, text, sizeof text - 1);
    close(fd);
    text[size > 0 ? size : 0] = '\0';
    state = strrchr(text, ')'); /* behind the name, which may have any */
    return state != NULL && strncmp(state, ") R", 3) == 0;
}

/* Under the lock. Is this leader still in the call in which it was some ticks ago? */
static bool is_kept(struct leader *leader)
{
    const unsigned calls = atomic_load(&leader->calls);

    if (calls != leader->seen || (calls & 1) == 0) {
        leader->seen = calls;
        leader->ticks = 0;
        return false;
    }
    leader->ticks++;
    if (computes(leader->thread))
        return leader->ticks >= PATIENCE;
    expect_waiting();
    return true;
}

/* Under the lock: the watcher takes this lead. */
static void hold(int place)
{
    self->thread = (pid_t)syscall(SYS_gettid);
    self->switches = switches();
    self->seen = atomic_load(&self->calls);
    self->ticks = 0;
    self->waits = 0;
    atomic_store(&leads[place], self);
}

/* Under the lock. True: the watcher leads now. `busy` tells whether any leader was in Python lately. */
static bool take_lead(bool *busy)
{
    *busy = false;
    for (int i = 0; i < lead_count; i++) {
        struct leader *leader = atomic_load(&leads[i]);
        const unsigned seen = leader != NULL ? leader->seen : 0;

        if (leader == NULL || is_kept(leader)) {
            hold(i);
            return true;
        }
        *busy = *busy || leader->seen != seen || (leader->seen & 1) != 0;
    }
    return false;
}

static bool anyone_in_python(void)
{
    for (int i = 0; i < lead_count; i++) {
        struct leader *leader = atomic_load(&leads[i]);
        if (leader == NULL || (atomic_load(&leader->calls) & 1) != 0)
            return true;
    }
    return false;
}

/* Under the lock, which is released meanwhile: until then, or until somebody wakes the watcher. */
static void sleep_until(int64_t end)
{
    const struct timespec time = {.tv_sec = end / SECOND, .tv_nsec = end % SECOND};

    pthread_cond_timedwait(&watcher_wake, &lock, &time);
}

/*
 * By the watcher, without the lock: ends the sessions whose MTA is silent for too long. It only shuts the connection;
 * a leader then sees its end. Returns when to look again.
 */
static int64_t end_silent_sessions(void)
{
    const int64_t time = now(), limit = atomic_load(&timeout);

    for (int fd = 0; fd < milter_most_descriptors(); fd++) {
        struct connection *connection = milter_connection(fd);
        int turn = RESTS;

        if (connection == NULL || time - atomic_load(&connection->rests_since) <= limit ||
            !atomic_compare_exchange_strong(&connection->turn, &turn, SERVED))
            continue;
        if (time - atomic_load(&connection->rests_since) > limit)
            (void)shutdown(fd, SHUT_RD);
        watch_again(connection);
    }
    return time + (limit / 4 < SWEEP ? limit / 4 : SWEEP);
}

/* Under the lock, which is released meanwhile: until this thread leads. */
static void watch(void)
{
    int quiet = 0;
    bool busy;

    while (!take_lead(&busy)) {
        const int64_t time = now();

        quiet = busy ? 0 : quiet + 1;
        if (time >= next_sweep) {
            pthread_mutex_unlock(&lock);
            const int64_t next = end_silent_sessions();
            pthread_mutex_lock(&lock);
            next_sweep = next;
        } else if (quiet < QUIET) {
            sleep_until(time + (int64_t)TICK * 1000 * 1000);
        } else {
            atomic_store(&watcher_sleeps, true);
            if (!anyone_in_python()) /* or one was on its way before it could know */
                sleep_until(next_sweep);
            atomic_store(&watcher_sleeps, false);
            quiet = 0;
        }
    }
}

/* The life of each thread of the scheduler. */
static void *work(void *unused)
{
    struct leader leader = {.calls = 0};

    self = &leader;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!watcher_wanted && spares < SPARES) {
            spares++;
            pthread_cond_wait(&spare_wake, &lock);
            spares--;
        }
        if (!watcher_wanted)
            break;
        watcher_wanted = false;
        atomic_store(&unwatched, false);
        watch();
        want_watcher();
        pthread_mutex_unlock(&lock);
        lead();
        pthread_mutex_lock(&lock);
    }
    pthread_mutex_unlock(&lock);
    return unused;
}

/* ---- Start and end ------------------------------------------------------------------------ */

void milter_lead_by(int threads)
{
    lead_count = threads < 1 ? 1 : threads > LEADS ? LEADS : threads;
}

int milter_set_timeout(int seconds)
{
    atomic_store(&timeout, seconds * SECOND);
    return smfi_settimeout(seconds);
}

void milter_expect_session(struct connection *connection)
{
    expected = connection;
}

bool milter_abandon(struct connection *connection)
{
    int turn = RESTS;

    return atomic_compare_exchange_strong(&connection->turn, &turn, ENDED) || turn == ENDED;
}

void milter_unwatch(int fd)
{
    if (news >= 0)
        (void)epoll_ctl(news, EPOLL_CTL_DEL, fd, NULL); /* a child that is about to be begun may have it, too */
}

/* In a forked child, where there are no other threads. */
static void leave_news(void)
{
    if (news >= 0)
        close(news);
    news = -1;
}

/* By libmilter's listener, before it accepts connections. */
int ours_mi_pool_controller_init(void)
{
    pthread_condattr_t attributes;

#if !MILTER_STATIC
    if (!milter_io_wrapped())
        return real_mi_pool_controller_init();
#endif
    if (news >= 0)
        return MI_SUCCESS;
    news = epoll_create1(EPOLL_CLOEXEC);
    if (news < 0) {
        milter_log(LOG_ERR, "epoll_create1 failed: %s", strerror(errno));
        return MI_FAILURE;
    }
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&watcher_wake, &attributes);
    pthread_condattr_destroy(&attributes);
    (void)pthread_atfork(NULL, NULL, leave_news);
    pthread_mutex_lock(&lock);
    const bool begun = begin_thread();
    pthread_mutex_unlock(&lock);
    return begun ? MI_SUCCESS : MI_FAILURE;
}

/* By libmilter's listener. The context belongs to the session, and is freed at its end. */
int ours_mi_start_session(SMFICTX *ctx)
{
    struct connection *connection = expected;
    struct epoll_event event = {NEWS, {.ptr = connection}};

#if !MILTER_STATIC
    if (!milter_io_wrapped())
        return real_mi_start_session(ctx);
#endif
    if (connection == NULL) {
        milter_log(LOG_ERR, "a connection cannot be served: no memory, or too many descriptors");
        mi_clr_ctx(ctx);
        return MI_SUCCESS;
    }
    connection->ctx = ctx;
    atomic_store(&connection->turn, SERVED); /* here: late news of the connection before must not begin it */
    if (epoll_ctl(news, EPOLL_CTL_ADD, connection->fd, &event) == 0) {
        rest(connection);
    } else {
        milter_log(LOG_ERR, "a connection cannot be served: %s", strerror(errno));
        atomic_store(&connection->turn, ENDED);
        mi_clr_ctx(ctx);
    }
    return MI_SUCCESS;
}

#else /* libmilter is linked as it is */

void milter_before_python(void)
{
    milter_meet_python();
}

void milter_after_python(void)
{
}

void milter_lead_by(int threads)
{
    (void)threads;
}

int milter_set_timeout(int seconds)
{
    return smfi_settimeout(seconds);
}

#endif
