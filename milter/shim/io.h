/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What io.c offers: to the shim, which knows sessions, and to Python, which
 * reads libmilter's log lines. The same functions are there when libmilter is
 * linked as it is (MILTER_IO_WRAPPED is 0), and do nothing then.
 */
#ifndef MILTER_IO_H
#define MILTER_IO_H

#include <stdbool.h>
#include <stddef.h>

/*
 * The descriptor that the calling thread has read last, by a thread of
 * libmilter: within a callback, that of the callback's connection. -1 when
 * libmilter's I/O is not wrapped.
 */
int milter_io_descriptor(void);

/*
 * By the same thread within a callback: the letter of the command that it is for,
 * and the end of the command's data. 0 and NULL when libmilter's I/O is not wrapped.
 */
char milter_io_command(void);
const char *milter_io_data_end(void);

/*
 * By the thread that serves a connection. Commands of these letters (seven at most)
 * are due an answer: one of which the shim does not hear, since libmilter ignores it,
 * gets a temporary failure. Of the others it has heard says each callback.
 */
void milter_io_answer(int fd, const char *letters);
void milter_io_heard(int fd);

/*
 * Write what was gathered for this connection, and wait for a peer that reads
 * slowly, as libmilter would have. By the thread that serves it, or by another
 * one under the session's lock while that thread is in Python. False: it could
 * not be written, and the session will end. True for any other descriptor, -1
 * among them.
 */
bool milter_io_flush(int fd);

/*
 * The same without waiting, by the same threads. 1: all is written (or this is any
 * other descriptor); 0: the peer must read first; -1: it failed, and the session
 * will end.
 */
int milter_io_push(int fd);

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

/* For io.c, see connect_guard.c: the data of a CONNECT, which belongs to libmilter. */
void milter_mend_client(char *data, size_t size);

/* For on_connect and for Python, see connect_guard.c. */
struct sockaddr_in6;
bool milter_hidden_client(const char *hostname, struct sockaddr_in6 *client);
bool milter_lacks_ipv6(void);

/* Has the linker redirected libmilter's calls to io.c, all that the build names? */
bool milter_io_wrapped(void);

/* Their names, each with a space after it. */
const char *milter_io_symbols(void);

#endif
