/* SPDX-License-Identifier: GPL-3.0-or-later */
/* What the stress program looks at inside the shim, where libmilter's calls are redirected to it: see inside.c and leads.c. */
#ifndef INSIDE_H
#define INSIDE_H

/* By the main thread, when all clients have left. What a session has left behind in its connection, or NULL. */
const char *left_behind(void);

/* Any thread. Blocks of memory that packets.c keeps for the next sessions. */
long blocks_kept(void);

/* Any thread: leaders take their lead into Python, until one is found to wait there. */
void forget_waiting(void);

#endif
