/* SPDX-License-Identifier: GPL-3.0-or-later */
/* How the threads of many sessions get into Python: see turns.c. */
#ifndef MILTER_TURNS_H
#define MILTER_TURNS_H

#include "milter_shim.h"

/*
 * By the thread that serves a session, without a lock: calls milter_python_enter
 * with this event, on this thread or on another one that is in Python already,
 * and returns its answer. The event is the caller's.
 */
int milter_take_turn(struct milter_event *event);

#endif
