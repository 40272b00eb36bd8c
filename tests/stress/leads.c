/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * scheduler.c with a way to make it forget that handlers wait. Else those of the stress program, of which
 * many sleep, would have each leader hand over before it enters, and no watcher would ever take a lead.
 */
#include "../../milter/shim/scheduler.c"

#include "inside.h"

#if MILTER_REDIRECT

void forget_waiting(void)
{
    atomic_store(&waiting, 0);
    atomic_store(&waiting_next, (int)WAITING_FIRST);
}

#else /* libmilter is linked as it is */

void forget_waiting(void)
{
}

#endif
