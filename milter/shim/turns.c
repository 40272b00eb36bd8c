/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Turns: how the threads of many sessions get into Python.
 *
 * With the GIL one thread at a time runs Python. Threads that queue up for it
 * make each other slow: each hand-over puts one thread to sleep and wakes another,
 * on another processor, whose caches know nothing of what it is to do, and nobody
 * runs Python meanwhile. So a thread that finds another one in Python leaves its
 * event in a queue, and waits. A thread of this file's own, the clerk, serves the
 * queue: Python stays on one processor, which stays awake. While it is awake, all events
 * go to it, and those of threads that Python does not know; otherwise a thread serves its
 * own. For a handler nothing changes: a session's events may come on any thread anyway.
 *
 * Without the GIL there is nothing to queue up for, and one clerk would do what all processors
 * could. So milter_shim.c asks here for a turn only if the plan does not send events straight
 * into Python: it does so for a free-threaded Python, and for handlers that are coroutines.
 *
 * The invariants
 *
 *   1. An event is served once: by its own thread, which never put it into the queue or
 *      was told to go by itself when it was taken off; or by the clerk that took it off.
 *   2. A thread leaves milter_take_turn when its event was served, not before. So
 *      what the event refers to may lie on its stack.
 *   3. A struct turn is touched by others under the lock only, but for its state; the
 *      last thing that others do to one is to store the state SERVED or GOES, and
 *      to wake its thread if that sleeps, which needs the lock to go on.
 *   4. Nobody waits long behind a handler that waits (for a database, say), and nobody
 *      who was served waits for anything: a clerk has no session of its own. When the
 *      one in front has been at an event for PATIENCE, it is left alone: all in the queue
 *      go to Python by themselves, and the next ones do not queue up at all; how many,
 *      doubles each time. (PATIENCE is the interval in which Python itself makes a
 *      thread give way to another.)
 *   5. Who is in front, or was called to be, passes that on or gives it up, unless it was
 *      left alone: its number is not `front` any more.
 */
#define _GNU_SOURCE

#include "turns.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

#include "child.h"
#include "io.h"

enum {
    PAUSES = 50,         /* looks of a thread that waits awake, between two times that it gives way */
    STRAIGHT_FIRST = 64, /* events that do not queue up, when it was found that handlers wait */
    STRAIGHT_MOST = 8192
};

/* Nanoseconds. */
static const int64_t PATIENCE = 5 * 1000 * 1000;
static const int64_t AWAKE = 100 * 1000; /* as long as that a thread waits before it goes to sleep */
static const int64_t SHIFT = 250 * 1000; /* as long as that the clerk works before it gives way */

enum state { WAITS, TAKEN, SERVED, GOES };

struct turn {
    struct milter_event *event;
    int answer;
    atomic_int state; /* enum state */
    bool asleep;
    pthread_cond_t wake; /* once it is asleep */
    struct turn *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
/* Under the lock: */
static struct turn *first, **last = &first;
static uint64_t front;     /* the number of the one that is in front, its event in Python; 0: nobody */
static uint64_t fronts;    /* numbers given out */
static int64_t begun;      /* when it began with the event that it is at */
static int64_t took;       /* nanoseconds of the last event of one in front */
static unsigned straight;  /* so many events do not queue up */
static unsigned straight_next = STRAIGHT_FIRST;
static uintptr_t clerk;    /* the number of the clerk that waits to be called, or serves; 0: there is none */
static uintptr_t clerks;   /* numbers given out */
static bool clerk_in_front;
static unsigned clerks_asleep; /* two, for a moment, when one was left alone before it came */
static pthread_cond_t clerk_wake = PTHREAD_COND_INITIALIZER;
static _Atomic uint64_t call; /* what the clerk's number in front is; 0: it is not called. Looked at without the lock */

#if MILTER_IO_WRAPPED /* io.c takes the others for libmilter's */
int __real_pthread_cond_signal(pthread_cond_t *condition);
int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument);
int __real_pthread_detach(pthread_t thread);
#define wake_up      __real_pthread_cond_signal
#define start_thread __real_pthread_create
#define detach       __real_pthread_detach
#else
#define wake_up      pthread_cond_signal
#define start_thread pthread_create
#define detach       pthread_detach
#endif

static int64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* ---- The queue: under the lock ------------------------------------------------------------ */

static void put(struct turn *turn)
{
    turn->next = NULL;
    *last = turn;
    last = &turn->next;
}

static struct turn *take_first(void)
{
    struct turn *turn = first;

    first = turn->next;
    if (first == NULL)
        last = &first;
    return turn;
}

/* The last touch of a turn by another thread than its own. */
static void tell(struct turn *turn, enum state state)
{
    const bool asleep = turn->asleep;

    atomic_store(&turn->state, state);
    if (asleep)
        wake_up(&turn->wake);
}

static void clear_queue(void)
{
    while (first != NULL)
        tell(take_first(), GOES);
}

/* The one in front waits for something: it is left alone. If it is the clerk, then there will be another one. */
static void leave_alone(void)
{
    front = 0;
    if (clerk_in_front)
        clerk = 0;
    clear_queue();
    straight = straight_next;
    if (straight_next < STRAIGHT_MOST)
        straight_next *= 2;
}

/* The caller is in front from now on; its number. */
static uint64_t step_in_front(void)
{
    begun = now();
    clerk_in_front = false;
    return front = ++fronts;
}

/* ---- Waiting ------------------------------------------------------------------------------ */

static void pause_briefly(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static bool is_over(struct turn *turn)
{
    return atomic_load(&turn->state) > TAKEN;
}

static bool is_called(struct turn *unused)
{
    (void)unused;
    return atomic_load(&call) != 0;
}

/*
 * By a waiting thread, without the lock. To be woken up takes longer than most
 * events do. It gives way, in case that the one it waits for has no processor.
 */
static bool wait_awake(bool (*done)(struct turn *turn), struct turn *turn)
{
    const int64_t end = now() + AWAKE;

    do {
        for (int i = 0; i < PAUSES; i++) {
            if (done(turn))
                return true;
            pause_briefly();
        }
        sched_yield();
    } while (now() < end);
    return done(turn);
}

/* By a waiting thread, under the lock, which it gives away while it sleeps. */
static void wait_asleep(struct turn *turn)
{
    pthread_condattr_t attributes;

    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&turn->wake, &attributes);
    pthread_condattr_destroy(&attributes);
    turn->asleep = true;
    while (!is_over(turn)) {
        const int64_t end = begun + PATIENCE;
        const struct timespec time = {.tv_sec = end / 1000000000, .tv_nsec = end % 1000000000};

        if (atomic_load(&turn->state) == TAKEN)
            pthread_cond_wait(&turn->wake, &lock);
        else if (pthread_cond_timedwait(&turn->wake, &lock, &time) == ETIMEDOUT &&
                 atomic_load(&turn->state) == WAITS && now() - begun > PATIENCE)
            leave_alone(); /* and go, being in the queue */
    }
    pthread_cond_destroy(&turn->wake);
}

/* By a thread whose turn is in the queue; under the lock, which is released. How it ended. */
static enum state wait_in_queue(struct turn *turn)
{
    const bool briefly = took <= AWAKE;

    pthread_mutex_unlock(&lock);
    if (!briefly || !wait_awake(is_over, turn)) {
        pthread_mutex_lock(&lock);
        wait_asleep(turn);
        pthread_mutex_unlock(&lock);
    }
    return atomic_load(&turn->state);
}

/* ---- The clerk ---------------------------------------------------------------------------- */

/*
 * By the clerk, between two events. A thread that gave way to it on its own processor, while it
 * waited awake, is not woken up when it was served: it would go on when the clerk's time slice is over.
 */
static void give_way(int64_t *since)
{
    const int64_t time = now();

    if (time - *since > SHIFT) {
        pthread_mutex_unlock(&lock);
        sched_yield();
        pthread_mutex_lock(&lock);
        *since = time;
    }
}

/* Under the lock, which is released while the clerk waits for work, and while it serves the first of the queue. */
static void serve_first(void)
{
    struct turn *turn = take_first();
    const int64_t start = begun = now();

    atomic_store(&turn->state, TAKEN);
    pthread_mutex_unlock(&lock);
    milter_meet_python();
    turn->answer = milter_back_from_python(milter_python_enter(turn->event));
    pthread_mutex_lock(&lock);
    took = now() - start;
    if (straight_next > STRAIGHT_FIRST)
        straight_next--;
    tell(turn, SERVED);
}

/* Under the lock, which is released meanwhile. Returns the clerk's number in front. */
static uint64_t wait_for_call(void)
{
    pthread_mutex_unlock(&lock);
    wait_awake(is_called, NULL);
    pthread_mutex_lock(&lock);
    clerks_asleep++;
    while (atomic_load(&call) == 0)
        pthread_cond_wait(&clerk_wake, &lock);
    clerks_asleep--;
    return atomic_exchange(&call, 0);
}

/* The life of a clerk: until it was left alone, and another one has its place. */
static void *work(void *number_of_the_clerk)
{
    const uintptr_t self = (uintptr_t)number_of_the_clerk;
    int64_t gave_way = now();

    pthread_mutex_lock(&lock);
    while (clerk == self) {
        const uint64_t number = wait_for_call();
        while (front == number && first != NULL) {
            serve_first();
            give_way(&gave_way);
        }
        if (front == number)
            front = 0;
        if (clerk == 0)
            clerk = self;
    }
    pthread_mutex_unlock(&lock);
    return NULL;
}

/* Under the lock. False: there is no memory for a thread. */
static bool start_clerk(void)
{
    pthread_t thread;

    clerk = ++clerks;
    if (start_thread(&thread, NULL, work, (void *)clerk) != 0) {
        clerk = 0;
        return false;
    }
    detach(thread);
    return true;
}

/* Under the lock. Does it look for a call at this moment, without sleep? Then it is the one to serve. */
static bool clerk_is_awake(void)
{
    return clerk != 0 && clerks_asleep == 0;
}

/* Under the lock: the clerk is in front now. */
static void call_clerk(void)
{
    if (clerk == 0 && !start_clerk()) {
        front = 0;
        clear_queue();
        return;
    }
    atomic_store(&call, step_in_front());
    clerk_in_front = true;
    if (clerks_asleep > 0)
        wake_up(&clerk_wake);
}

/* ---- A turn ------------------------------------------------------------------------------- */

/* A thread that Python has not seen yet gets a thread state there, which takes longer than most events do. */
static _Thread_local bool was_there;

/* By any thread, without the lock. */
static int go(struct milter_event *event)
{
    was_there = true;
    milter_meet_python();
    return milter_back_from_python(milter_python_enter(event));
}

/* By a thread that found nobody in front; under the lock, which is released. */
static int go_first(struct milter_event *event)
{
    const uint64_t number = step_in_front();
    const int64_t start = begun;

    pthread_mutex_unlock(&lock);
    const int answer = go(event);
    pthread_mutex_lock(&lock);
    took = now() - start;
    if (front == number) {
        front = 0;
        if (first != NULL)
            call_clerk();
    }
    pthread_mutex_unlock(&lock);
    return answer;
}

/* Under the lock. Is it of no use to queue up, since handlers wait? */
static bool goes_straight(void)
{
    if (front != 0 && now() - begun > PATIENCE)
        leave_alone();
    if (straight == 0)
        return false;
    straight--;
    return true;
}

/* In a child that a handler forked, where there are no other threads. */
static void forget_turns(void)
{
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&clerk_wake, NULL);
    first = NULL;
    last = &first;
    front = 0;
    clerk = 0;
    clerks_asleep = 0;
    atomic_store(&call, 0);
}

static void prepare(void)
{
    (void)pthread_atfork(NULL, NULL, forget_turns);
}

int milter_take_turn(struct milter_event *event)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    struct turn self = {.event = event, .state = WAITS};

    pthread_once(&once, prepare);
    pthread_mutex_lock(&lock);
    if (goes_straight()) {
        pthread_mutex_unlock(&lock);
        return go(event);
    }
    if (front == 0 && was_there && !clerk_is_awake())
        return go_first(event); /* releases the lock */
    put(&self);
    if (front == 0)
        call_clerk();
    if (wait_in_queue(&self) == SERVED) /* releases the lock */
        return self.answer;
    return go(event);
}
