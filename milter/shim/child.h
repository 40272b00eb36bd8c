/* SPDX-License-Identifier: GPL-3.0-or-later */
/* What a forked child inherits of the filter: nothing. See child.c. */
#ifndef MILTER_CHILD_H
#define MILTER_CHILD_H

#include <stdbool.h>

/* By milter_register, on the thread that starts the filter: children forked from now on have no way into libmilter. */
void milter_watch_forks(void);

/* By any thread: was this process forked from one in which libmilter runs? */
bool milter_is_child(void);

/*
 * By a thread that is about to enter Python, without a lock: the first time Python makes
 * a state for it, without the GIL, and under a lock of its own, which a child would find
 * taken for ever. So that and a fork exclude each other: see the two functions below.
 */
void milter_meet_python(void);

/* By a thread that forks, before and after, without the GIL: no thread enters Python for the first time meanwhile. */
void milter_hold_newcomers(void);
void milter_let_newcomers_in(void);

/*
 * By the thread that was in Python, at once when it is back, without a lock: gives the
 * answer back. It does not return in a child, which ends here, before anything is
 * written to an MTA.
 */
int milter_back_from_python(int answer);

/*
 * By any thread, without a lock: children get /dev/null in the place of this descriptor
 * and its duplicates; if it listens, also in the place of the connections that were
 * accepted from it. Returns the number for milter_show, -1 where there is no room.
 */
int milter_hide(int fd);

/* By any thread, once, when the descriptor (or the last connection) is closed. Takes -1, and does nothing then. */
void milter_show(int number);

#endif
