/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The shim under stress, without Python: real libmilter, clients that keep the
 * protocol and clients that do not, and a stand-in for Python that fails, sleeps,
 * lies in wait with old contexts, and checks what it is told.
 *
 *   stress seconds [clients [seed [faults [terminated [idle [leads]]]]]]
 *
 *   faults=1: memory runs out now and then, and system calls fail; terminated=1: no garbage without a final NUL;
 *   idle=1: connections pause longer than the time-out (without redirection: needs a libmilter that looks every second);
 *   leads: so many threads lead (scheduler.c)
 *
 * libmilter is linked as it is, or its calls are redirected to the shim, as build_milter.py says. Then
 * the sessions are served by the shim's own scheduler.
 *
 * Each client writes down what it sends (a transcript for each connection and each
 * message), so that the stand-in can compare. What is checked, by the stand-in (S), by the
 * clients (C), and whenever the clients pause (P):
 *
 *   S  a log parses to its last byte, and tells what the client sent: in order, complete, byte for byte
 *   S  a gathered message is what the client sent, in memory up to the spool size, else in a file without
 *      a name; or an error is told, and only where there was one
 *   S  at most one abort for a message, and none after its decision
 *   S  nothing enters without a reason that the plan knows, and nothing after the gate was closed
 *      and the last handler had returned
 *   S  the end of a connection is told once: by an entry, or by milter_take_ended
 *   S  a context acts only while its call goes on
 *   S  a child that it forks can do nothing to a session, and ends when it comes back to the shim
 *   S  one thread at a time is in a session; redirected: also in libmilter's engine (inside.c)
 *   S  redirected: another session is served while a handler waits
 *   C  an answer comes exactly where one was agreed (a missing one is a hang)
 *   C  a message is accepted or discarded only by a verdict of the stand-in, and never once something failed
 *   C  the changes that the stand-in left arrive, all of them, in their order
 *   C  events that were deferred have been told when the message, or the connection, is over
 *   C  a reply's text belongs to the message that is refused
 *   C  nothing stands between two parts of a new body
 *   C  others are served while one client never pauses
 *   P  no session is open, no connection untold, no memory kept, no descriptor left
 *
 * And before: lines of the log go where they are to go (log.c).
 *
 * After enough messages, each of the ways that are to be tried has been tried.
 */
#define _GNU_SOURCE
#include "stress.h"

#include "content.h"
#include "inside.h"
#include "redirect.h"
#include "scheduler.h"

#include <dirent.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    LATE_THREADS = 3,
    ENOUGH = 4000, /* messages to try all ways */
    LEAST_RUNS = 7, /* one of each kind, see make_plan() */
    MOST_SESSIONS = 256 + CLIENTS * 8 /* as many ends may wait to be told, and some connections be open */
};

struct run runs[RUNS];
atomic_int current_app;
atomic_bool stop_clients, stop_all, pause_clients, started;
bool with_faults, idle, terminated;
char path[64], pool[POOL];
static char spool_directory[64];
static long kept_for_ever; /* memory, of libmilter */

static const char *const way_names[WAYS] = {
    "batches",      "full logs",   "gathered in memory", "in a file", "contents lost",  "few changes", "many changes",
    "bad changes",  "quiet ends",  "held ends",          "deferred ends", "many ends",  "aborts",      "pauses",
    "forks",        "packets in parts", "pipelines", "late reads", "floods",         "sleeps",      "computations",
    "changes of the thread", "meetings", "shortages",
};

/* ---- Plans: as plan.py makes them, of any set of handlers ------------------------------------ */

static bool handles(const struct run *run, int stage)
{
    if (run->quiet || run->seldom)
        return run->quiet && stage == MILTER_EOM;
    return run->observing || chance(2) != 0 || (stage == MILTER_EOM && chance(2));
}

static enum milter_mode mode_for(const struct run *run, int stage, bool handled, bool silent)
{
    if (handled)
        return silent && (run->observing || chance(3) != 0) ? MILTER_DEFER : MILTER_ENTER;
    return stage <= MILTER_RCPT ? MILTER_RECORD : MILTER_IGNORE;
}

static void plan_stages(struct run *run, bool wants_messages)
{
    struct milter_plan *plan = &run->plan;
    bool handled[MILTER_STAGES];

    for (int stage = 0; stage < MILTER_STAGES; stage++) {
        handled[stage] = handles(run, stage);
        const bool silent = no_reply[stage] != 0 && (!handled[stage] || run->observing || chance(3) != 0);
        plan->mode[stage] = (unsigned char)mode_for(run, stage, handled[stage], silent);
        if (silent)
            plan->steps |= no_reply[stage];
    }
    if (!handled[MILTER_UNKNOWN])
        plan->steps |= SMFIP_NOUNKNOWN | (handled[MILTER_DATA] ? 0 : SMFIP_NODATA);
    if (!handled[MILTER_HEADER] && !wants_messages)
        plan->steps |= SMFIP_NOHDRS | (handled[MILTER_EOH] ? 0 : SMFIP_NOEOH);
    if (!handled[MILTER_BODY] && !wants_messages)
        plan->steps |= SMFIP_NOBODY;
    else if (handled[MILTER_BODY] && (plan->steps & SMFIP_NR_BODY) == 0)
        plan->steps |= SMFIP_SKIP;
}

static void make_plan(struct run *run, int app)
{
    static const size_t spool_sizes[] = {0, 1, 100, 5000, 100000, 1 << 20};
    struct milter_plan *plan = &run->plan;

    run->quiet = app % 6 == 2;
    run->observing = app % 6 == 3;
    run->seldom = app % 6 == 5;
    run->sound = run->quiet || chance(5) != 0;
    run->bodies_left = chance(2) != 0;
    plan->app = app;
    plan->actions = 0x1ff & ~(unsigned long)SMFIF_SETSYMLIST;
    plan->required = chance(8) == 0 ? SMFIF_ADDRCPT_PAR : 0;
    plan->gathers = run->quiet || (!run->seldom && chance(2) != 0);
    plan->leading_space = chance(2) != 0;
    if (plan->gathers || plan->leading_space)
        plan->steps |= SMFIP_HDR_LEADSPC;
    plan->spool_size = run->quiet ? 1000 : spool_sizes[chance(sizeof spool_sizes / sizeof *spool_sizes)];
    plan->spool_directory = run->sound ? spool_directory : "/nowhere/at/all";
    plan_stages(run, plan->gathers);
    if (run->quiet)
        plan->required = 0;
    else
        plan->negotiates = run->seldom || chance(3) == 0;
    if (chance(2))
        plan->macros[SMFIM_ENVFROM] = "i j {auth_authen}";
}

/* ---- What is left when all clients pause ------------------------------------------------------ */

/* Descriptors of this process, or -1 where nobody tells. */
static int descriptors(void)
{
    DIR *all = opendir("/proc/self/fd");
    int count = 0;

    if (all == NULL)
        return -1;
    while (readdir(all) != NULL)
        count++;
    closedir(all);
    return count;
}

/* Memory that belongs to sessions. Some blocks of redirected ones are kept for the next. */
static long kept_now(void)
{
    return atomic_load(&kept) - blocks_kept() - kept_for_ever;
}

/* Comes after all connections that wait to be accepted, and is served to its end. */
static void come_last(void)
{
    struct numbers none = {0, 0};
    bool served = false;

    while (!served) {
        struct mta m = {.fd = call_filter(), .next = &none};
        if (m.fd < 0)
            continue;
        if (negotiate(&m))
            served = put(&m, 'Q', NULL, 0) && get(&m) == CLOSED;
        else
            served = !m.cut;
        hang_up(&m);
    }
}

static bool all_gone(struct run *run, int least)
{
    return milter_wait_sessions(run->run, 0) == 0 && kept_now() == 0 && left_behind() == NULL && descriptors() <= least;
}

/* All clients have left: nothing may be left of them. */
static void check_rest(struct run *run)
{
    static int least = 1 << 30;

    tried(PAUSES);
    come_last();
    for (int patience = 2000; patience > 0 && !all_gone(run, least); patience--) {
        content_free_kept(); /* kept on purpose, for the next large message */
        nap(10000);
    }
    if (milter_wait_sessions(run->run, 0) != 0)
        violation("%d sessions are left when all clients have gone", milter_wait_sessions(run->run, 0));
    if (kept_now() != 0)
        violation("%ld pieces of memory are kept when all clients have gone", kept_now());
    if (left_behind() != NULL)
        violation("when all clients have gone, %s", left_behind());
    if (atomic_load(&stay) - atomic_load(&current_app) > MOST_SESSIONS)
        violation("%ld sessions were made, and not used again", atomic_load(&stay));
    if (descriptors() > least)
        violation("%d descriptors are open, and once there were %d", descriptors(), least);
    least = descriptors();
}

/* ---- The process ------------------------------------------------------------------------------- */

/* Begins another run. Memory may run out here, too. */
static struct run *begin(int app)
{
    struct run *run = &runs[app];

    make_plan(run, app);
    while ((run->run = milter_begin(&run->plan)) == NULL)
        continue;
    atomic_store(&current_app, app);
    let_wait();
    return run;
}

static void end(struct run *run, int app, int clients)
{
    const bool pause = atomic_load(&stop_clients) || chance(3) == 0;

    let_no_more_wait();
    if (pause) {
        atomic_store(&pause_clients, true);
        while (atomic_load(&pausing) < clients && !atomic_load(&stop_clients))
            nap(1000);
        check_rest(run);
    } else if (chance(2))
        milter_wait_sessions(run->run, (int)chance(200));
    atomic_store(&run->ending, true);
    milter_end(run->run);
    if (milter_wait_handlers(run->run, 20000) != 0)
        violation("handlers do not end");
    else
        atomic_store(&run->gone, true);
    atomic_store(&current_app, 0); /* who negotiates meanwhile cannot tell with which run */
    while (take_ended(run->run) > 0 || atomic_load(&taking) > 0)
        continue;
    if (pause)
        check_ends(app);
    atomic_store(&pause_clients, false);
}

/* Shortages are told in the log, and they and meetings want the shim's own scheduler. */
static bool is_impossible(enum way way)
{
    return (way == MEETINGS && !milter_io_wrapped()) || (way == RUN_OUT && !(milter_io_wrapped() && with_faults));
}

static void report(int app, bool complete)
{
    fprintf(stderr,
            "%d runs, %lu connections, %lu messages (%lu passed, %lu refusals), %lu connections cut, %lu timed out, "
            "%lu entries, %lu late uses (%lu expired), %lu faults, %lu of disks\n",
            app, atomic_load(&connections), atomic_load(&messages), atomic_load(&passed), atomic_load(&refused),
            atomic_load(&cut), atomic_load(&timeouts), atomic_load(&entries), atomic_load(&late_done),
            atomic_load(&late_expired), atomic_load(&faults), atomic_load(&disk_faults));
    for (int way = 0; way < WAYS; way++)
        fprintf(stderr, "%s%s: %lu", way > 0 ? ", " : "", way_names[way], atomic_load(&ways[way]));
    fprintf(stderr, "\n");
    for (int way = 0; way < WAYS; way++)
        if (complete && atomic_load(&ways[way]) == 0 && !is_impossible((enum way)way))
            violation("%s: not tried", way_names[way]);
    if (idle && atomic_load(&timeouts) == 0)
        violation("no client was given up that was silent for longer than the time-out");
    fprintf(stderr, "%u violations, %u hangs\n", atomic_load(&violations), atomic_load(&hangs));
    fflush(stderr);
}

/* libmilter, listening. */
static bool serve(int wake_fd)
{
    char connection[80];

    snprintf(path, sizeof path, "/tmp/stress-%d.sock", (int)getpid());
    snprintf(connection, sizeof connection, "unix:%s", path);
    return milter_register("stress") == MI_SUCCESS && smfi_setconn(connection) == MI_SUCCESS &&
           smfi_setbacklog(256) == MI_SUCCESS && smfi_opensocket(true) == MI_SUCCESS && milter_serve(wake_fd) == 0;
}

static void prepare(void)
{
    for (size_t i = 0; i < CLIENTS * REMEMBERED; i++) {
        pthread_mutex_init(&message_transcripts[i].lock, NULL);
        pthread_mutex_init(&connection_transcripts[i].lock, NULL);
    }
    for (size_t i = 0; i < POOL; i++)
        pool[i] = (char)chance(256);
}

int main(int argc, char **argv)
{
    const double duration = argc > 1 ? atof(argv[1]) : 10;
    const int clients = argc > 2 && atoi(argv[2]) <= CLIENTS ? atoi(argv[2]) : 16;
    int wake[2], app = 0;
    pthread_t *threads = __real_calloc((size_t)clients, sizeof *threads), lates[LATE_THREADS];
    struct timespec begun, now;

    atomic_store(&seeds, (unsigned long)(argc > 3 ? atol(argv[3]) : getpid()) * 1000);
    with_faults = argc > 4 && atoi(argv[4]) != 0;
    terminated = argc > 5 && atoi(argv[5]) != 0;
    idle = argc > 6 && atoi(argv[6]) != 0;
    if (idle)
        milter_set_timeout(1);
    milter_lead_by(argc > 7 ? atoi(argv[7]) : 1);
    signal(SIGPIPE, SIG_IGN);
    prepare();
    if (milter_io_wrapped())
        check_log();
    snprintf(spool_directory, sizeof spool_directory, "/tmp/stress-spool-XXXXXX");
    if (mkdtemp(spool_directory) == NULL || pipe(wake) != 0 || !serve(wake[1])) {
        fprintf(stderr, "libmilter does not start\n");
        return 2;
    }
    kept_for_ever = atomic_load(&kept);
    clock_gettime(CLOCK_MONOTONIC, &begun);
    struct run *run = begin(++app);
    come_last(); /* and first */
    atomic_store(&started, true);
    for (int i = 0; i < clients; i++)
        __real_pthread_create(&threads[i], NULL, client, (void *)(uintptr_t)i);
    for (int i = 0; i < LATE_THREADS; i++)
        __real_pthread_create(&lates[i], NULL, late, NULL);

    do { /* runs of a filter, most of them ended under load */
        seconds(0.1 + chance(500) / 1000.0);
        for (int patience = 1000; run->seldom && atomic_load(&ways[ENDED_ENOUGH]) == 0 && patience > 0; patience--)
            nap(10000);
        end(run, app, clients);
        run = begin(++app);
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while ((app < LEAST_RUNS || (double)(now.tv_sec - begun.tv_sec) < duration) && atomic_load(&violations) < 20 &&
             app < RUNS - 1);

    let_no_more_wait();
    atomic_store(&stop_clients, true);
    for (int i = 0; i < clients; i++)
        pthread_join(threads[i], NULL);
    end(run, app, 0);
    atomic_store(&stop_all, true);
    for (int i = 0; i < LATE_THREADS; i++)
        pthread_join(lates[i], NULL);
    struct pollfd ready = {wake[0], POLLIN, 0};
    if (poll(&ready, 1, 0) != 0)
        violation("libmilter stopped");
    unlink(path);
    if (rmdir(spool_directory) != 0)
        violation("%s: %s", spool_directory, strerror(errno));
    report(app, atomic_load(&messages) > ENOUGH && atomic_load(&violations) == 0);
    __real_free(threads);
    return atomic_load(&violations) != 0;
}
