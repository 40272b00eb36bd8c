/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * libmilter's threads, kept for their next task.
 *
 * libmilter's pool ends a worker as soon as two others have nothing to do, and
 * begins a new one at the next moment when all are busy: under load, for every
 * tenth message or so. For a thread that it has not seen before, Python makes a
 * thread state, which takes far longer than a call. So where libmilter's calls
 * are redirected (see io.c, which takes its calls of pthread_create), a thread
 * whose task has ended waits here for the next one.
 *
 * Who touches what: idle and idle_count, and the fields of an idle thread, under
 * the lock. An idle thread's struct lies on its own stack, which lasts, since the
 * thread leaves the list before it goes on.
 */
#include "threads.h"

#if MILTER_IO_WRAPPED

#include <errno.h>
#include <stdlib.h>

enum { KEPT = 32 }; /* idle threads; more of them end, as without this file */

struct task {
    void *(*start)(void *);
    void *argument;
};

struct idle {
    pthread_t thread;
    pthread_cond_t wake;
    struct task task; /* start is NULL until there is one */
    struct idle *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct idle *idle;
static int idle_count;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static _Thread_local bool detached, refuse_detach;

int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument);
int __real_pthread_cond_signal(pthread_cond_t *condition);
int __real_pthread_detach(pthread_t thread);

/* By a thread whose task has ended. False: there are enough idle ones. */
static bool await_task(struct task *task)
{
    struct idle self = {.thread = pthread_self(), .wake = PTHREAD_COND_INITIALIZER};

    pthread_mutex_lock(&lock);
    if (idle_count == KEPT) {
        pthread_mutex_unlock(&lock);
        return false;
    }
    self.next = idle;
    idle = &self;
    idle_count++;
    while (self.task.start == NULL)
        pthread_cond_wait(&self.wake, &lock);
    pthread_mutex_unlock(&lock);
    pthread_cond_destroy(&self.wake);
    *task = self.task;
    return true;
}

/* The life of each thread of libmilter. Owns the memory of its first task. */
static void *work(void *first)
{
    struct task task = *(struct task *)first;

    free(first);
    do
        task.start(task.argument); /* libmilter joins no thread: nobody asks for what it returns */
    while (await_task(&task));
    return NULL;
}

/* In a forked child, where there are no other threads. */
static void forget_threads(void)
{
    pthread_mutex_init(&lock, NULL);
    idle = NULL;
    idle_count = 0;
}

static void prepare(void)
{
    (void)pthread_atfork(NULL, NULL, forget_threads);
}

/* By the thread that begins another. False: no idle thread. */
static bool hand_over(pthread_t *thread, struct task task)
{
    pthread_mutex_lock(&lock);
    struct idle *taker = idle;
    if (taker != NULL) {
        idle = taker->next;
        idle_count--;
        *thread = taker->thread;
        taker->task = task;
        __real_pthread_cond_signal(&taker->wake); /* io.c takes the other for libmilter's */
    }
    pthread_mutex_unlock(&lock);
    return taker != NULL;
}

int milter_start_thread(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument)
{
    const struct task task = {start, argument};

    pthread_once(&once, prepare);
    if (attributes == NULL && hand_over(thread, task))
        return 0;
    struct task *first = malloc(sizeof *first);
    if (first == NULL)
        return __real_pthread_create(thread, attributes, start, argument);
    *first = task;
    const int error = __real_pthread_create(thread, attributes, work, first);
    if (error != 0)
        free(first);
    return error;
}

/* By a thread that is about to run a worker's task, which then gives its session back (io.c). */
void milter_refuse_detach(bool refuse)
{
    refuse_detach = refuse;
}

/* Each task of libmilter detaches its thread, but a thread can be detached only once. */
__attribute__((used, visibility("hidden"))) int __wrap_pthread_detach(pthread_t thread)
{
    if (refuse_detach)
        return EAGAIN;
    if (pthread_equal(thread, pthread_self())) {
        if (detached)
            return 0;
        detached = true;
    }
    return __real_pthread_detach(thread);
}

#endif
