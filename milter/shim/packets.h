/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * What packets.c offers: to the shim, which knows sessions, and to the scheduler.
 * The first part is there also when libmilter is linked as it is (MILTER_REDIRECT
 * is 0), and does nothing then.
 */
#ifndef MILTER_PACKETS_H
#define MILTER_PACKETS_H

#include <stdbool.h>
#include <stddef.h>

/*
 * The descriptor of the connection whose packet the calling thread has given to
 * libmilter last: within a callback, that of the callback's connection. -1 when
 * libmilter's packets are not ours.
 */
int milter_io_descriptor(void);

/*
 * By the same thread within a callback: the letter of the command that it is for,
 * and the end of the command's data. 0 and NULL when libmilter's packets are not ours.
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

/* By milter_set_max_data_size: bytes of a packet's data. */
void milter_io_limit(size_t size);

/* See connect_guard.c: the data of a CONNECT, which belongs to libmilter. */
void milter_mend_client(char *data, size_t size);

/* For on_connect and for Python, see connect_guard.c. */
struct sockaddr_in6;
bool milter_hidden_client(const char *hostname, struct sockaddr_in6 *client);
bool milter_lacks_ipv6(void);

#if MILTER_REDIRECT

#include <stdatomic.h>
#include <stdint.h>

/* ---- For redirect.c and scheduler.c -------------------------------------------------------- */

enum { MILTER_HEAD = 5 }; /* bytes before a packet's data */

struct block;

/* A connection that libmilter has accepted: one for each descriptor, never freed. */
struct connection {
    /* Any thread: */
    atomic_bool open;  /* accepted by libmilter, and not closed */
    int fd;            /* its number for ever */
    atomic_int turn;   /* scheduler.c's */
    _Atomic int64_t rests_since; /* the same */
    /* The thread that serves the session: */
    void *ctx;    /* libmilter's, for scheduler.c */
    bool tcp;
    bool ended;   /* the peer has closed its side, all it sent was taken */
    bool ends;    /* the same, as it seems: there may be more to take */
    bool drained; /* nothing was left to take when it was looked at last */
    bool left;    /* the scheduler ended this step before all was taken */
    int error;    /* errno of a read or write that failed for good */
    int timeout;  /* milliseconds, as libmilter gave them with its last packet */
    enum { BETWEEN, WITHIN, WHOLE } stage; /* of the packet that comes next */
    unsigned char head[MILTER_HEAD]; /* the length of what follows it, big-endian, and a letter */
    char command;        /* that letter */
    char failure;        /* what libmilter is told in the place of a packet; 0: none has failed */
    char *data;          /* which libmilter frees; NULL: it has none */
    size_t size;         /* of the data */
    size_t filled;       /* bytes of the head that are here, or of the data */
    bool unheard;        /* the last packet is due an answer, and the shim has not heard of it */
    char due[8];         /* the letters of commands that are due an answer */
    struct block *block;
    unsigned input_begin, input_end;
    unsigned output_begin, output_end;
};

/* Any thread. The connection of a descriptor; NULL for all others, and for all in a forked child. */
struct connection *milter_connection(int fd);

/* By libmilter's listener, which has just accepted it. NULL: no memory, too high a descriptor, or one in use. */
struct connection *milter_adopt(int fd, bool tcp);

/* Any thread. Descriptors of connections are smaller than this. */
int milter_most_descriptors(void);

/* By the thread that begins to serve a connection, on which something may have come; `ends`: its end, too. */
void milter_look_again(struct connection *connection, bool ends);

#endif
#endif
