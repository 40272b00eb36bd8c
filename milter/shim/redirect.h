/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * libmilter's listener and its log: see redirect.c. The functions are there also
 * when libmilter is linked as it is (MILTER_IO_WRAPPED is 0), and do nothing then.
 */
#ifndef MILTER_REDIRECT_H
#define MILTER_REDIRECT_H

#include <stdbool.h>

/* A function that the linker puts in the place of one that libmilter calls. */
#define WRAP __attribute__((used, visibility("hidden")))

/* Has the linker redirected libmilter's calls, all that the build names? */
bool milter_io_wrapped(void);

/* Their names, each with a space after it. */
const char *milter_io_symbols(void);

/*
 * libmilter's log lines go to this descriptor, a non-blocking pipe, each with
 * its priority: "<3>text\n", PIPE_BUF bytes at most. -1, and whatever the pipe
 * does not take: to the system's log. Any thread. Returns the descriptor until
 * now, which must stay open: a line may be on its way to it.
 */
int milter_io_log_to(int fd);

/*
 * libmilter refuses a connection of another family than its first listener's, and
 * looks at nothing else of the address. So it is told this family (AF_*) of all
 * connections, and can be given listeners of any. Before the first connection.
 */
void milter_io_expect(int family);

/* Any thread of libmilter or of the shim: a line of libmilter's log, with a priority as syslog has it. */
void milter_log(int priority, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
