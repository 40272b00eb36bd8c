/* SPDX-License-Identifier: GPL-3.0-or-later */
/* Which thread serves which session: see scheduler.c. */
#ifndef MILTER_SCHEDULER_H
#define MILTER_SCHEDULER_H

#include <stdbool.h>

/*
 * By the thread that serves a session, without a lock: around each call of Python.
 * Where libmilter is linked as it is, its own threads go straight into Python.
 */
void milter_before_python(void);
void milter_after_python(void);

/*
 * Before milter_serve: so many threads lead, as many as can run Python at the same
 * time. 1 where there is a GIL.
 */
void milter_lead_by(int threads);

/* Before milter_serve: as smfi_settimeout. */
int milter_set_timeout(int seconds);

#if MILTER_REDIRECT

struct connection;

/* By libmilter's listener: what it has accepted, NULL if there is no entry for it. It starts a session of that next. */
void milter_expect_session(struct connection *connection);

/* By a thread that is about to wait: another one takes its lead. By any other thread it does nothing. */
void milter_hand_over(void);

/* By the thread that serves a session: may it take more from the connection, before others have their turn? */
bool milter_goes_on(void);

/*
 * By libmilter's listener, of an entry whose descriptor somebody closed behind our back: its session is served no
 * more. False: a thread still serves it.
 */
bool milter_abandon(struct connection *connection);

/* By the thread that closes a connection: no thread waits for it any more. */
void milter_unwatch(int fd);

#endif
#endif
