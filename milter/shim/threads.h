/* SPDX-License-Identifier: GPL-3.0-or-later */
/* See threads.c; only where libmilter's calls are redirected. */
#ifndef MILTER_THREADS_H
#define MILTER_THREADS_H

#include <pthread.h>
#include <stdbool.h>

/*
 * As pthread_create, with an idle thread if there is one. The thread detaches
 * itself, and nobody asks for what it returns. Any thread.
 */
int milter_start_thread(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument);

/* From now on, until it is taken back: pthread_detach fails on this thread. By a thread of libmilter. */
void milter_refuse_detach(bool refuse);

#endif
