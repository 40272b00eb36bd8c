/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * libmilter's listener and its log: see redirect.c. The functions are there also
 * when libmilter is linked as it is (MILTER_REDIRECT is 0), and do nothing then.
 */
#ifndef MILTER_REDIRECT_H
#define MILTER_REDIRECT_H

#include <stdbool.h>

#ifndef MILTER_REDIRECT
#define MILTER_REDIRECT 0
#endif
#ifndef MILTER_STATIC
#define MILTER_STATIC 0
#endif

#if MILTER_REDIRECT

#include <libmilter/mfapi.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/time.h>

/*
 * A function that libmilter calls by its name, and that is ours_… here, while real_…
 * is the one of that name.
 *
 * A static libmilter's calls are redirected by the linker (--wrap). A shared one's are
 * by the dynamic linker, which looks for the name in this extension first, and so
 * finds ours: milter/_extension.py asks for that order.
 */
#if MILTER_STATIC
#define MILTER_CALL(type, name, arguments)                                                                             \
    type ours_##name arguments __asm__("__wrap_" #name) __attribute__((used, visibility("hidden")));                  \
    type real_##name arguments __asm__("__real_" #name)
#else
#define MILTER_CALL(type, name, arguments)                                                                             \
    type ours_##name arguments __asm__(#name) __attribute__((used));                                                  \
    extern type(*real_##name) arguments
#endif

MILTER_CALL(int, accept, (int fd, struct sockaddr *address, socklen_t *size));
MILTER_CALL(int, close, (int fd));
MILTER_CALL(int, poll, (struct pollfd *fds, nfds_t count, int timeout));
MILTER_CALL(int, __poll_chk, (struct pollfd *fds, nfds_t count, int timeout, size_t size));
MILTER_CALL(void, syslog, (int priority, const char *format, ...)) __attribute__((format(printf, 2, 3)));
MILTER_CALL(void, __syslog_chk, (int priority, int flag, const char *format, ...));
MILTER_CALL(char *, mi_rd_cmd, (int sd, struct timeval *timeout, char *command, size_t *size, char *name));
MILTER_CALL(int, mi_wr_cmd, (int sd, struct timeval *timeout, int command, char *data, size_t size));
MILTER_CALL(int, mi_pool_controller_init, (void));
MILTER_CALL(int, mi_start_session, (SMFICTX *ctx));

#endif

/* Do libmilter's calls arrive here, all that it makes? */
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
