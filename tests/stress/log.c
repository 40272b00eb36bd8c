/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * libmilter's log, where its calls are redirected: a line goes to the pipe in one piece, or to the
 * system's log where the pipe does not take it. The linker sends the shim's calls of vsyslog here.
 */
#define _GNU_SOURCE
#include "stress.h"

#include "redirect.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <syslog.h>
#include <unistd.h>

void __wrap_vsyslog(int priority, const char *format, va_list arguments);

static bool checking;
static unsigned system_log; /* lines that went there while the log was checked */

/* What the shim says only when it is out of something. */
static bool tells_of_faults(const char *line)
{
    return strstr(line, "cannot be served") != NULL || strstr(line, "no thread can be started") != NULL ||
           strstr(line, "cannot be accepted") != NULL;
}

void __wrap_vsyslog(int priority, const char *format, va_list arguments)
{
    char text[2 * PIPE_BUF];

    vsnprintf(text, sizeof text, format, arguments);
    if (checking) {
        if (priority != LOG_ERR || strspn(text, "x") != strlen(text))
            violation("to the system's log: %d %.20s", priority, text);
        system_log++;
    } else if (tells_of_faults(text)) {
        tried(RUN_OUT);
        if (!with_faults)
            violation("in the log: %s", text);
    }
}

/* A line of so many letters. */
static void log_letters(int size)
{
    char letters[2 * PIPE_BUF];

    memset(letters, 'x', (size_t)size);
    letters[size] = '\0';
    errno = EBADMSG;
    syslog(LOG_ERR, "%s", letters);
    if (errno != EBADMSG)
        violation("errno is %d after a log line", errno);
}

static void expect_line(int fd, const char *begin, size_t size)
{
    char line[2 * PIPE_BUF];
    const ssize_t got = read(fd, line, sizeof line);

    if (got != (ssize_t)size || strncmp(line, begin, strlen(begin)) != 0 || line[got - 1] != '\n' ||
        memchr(line, '\n', (size_t)got) != line + got - 1)
        violation("a line of %zd bytes, not %zu: %.20s", got, size, line);
}

/* A pipe that is full, and has room again. */
static void fill(const int *ends)
{
    char lines[2 * PIPE_BUF];

    for (int i = 0; i < 1000 && system_log == 1; i++)
        log_letters(1000);
    if (system_log != 2)
        violation("a line that the pipe does not take goes to the system's log");
    if (read(ends[0], lines, sizeof lines) != (ssize_t)sizeof lines)
        violation("the pipe is full of lines");
    log_letters(1000);
    if (milter_io_log_to(-1) != ends[1] || system_log != 2)
        violation("the pipe has room again");
}

void check_log(void)
{
    int ends[2];

    checking = true;
    log_letters(5);
    if (system_log != 1 || pipe(ends) != 0 || fcntl(ends[1], F_SETFL, O_NONBLOCK) != 0)
        violation("a line without a pipe goes to the system's log");
    if (milter_io_log_to(ends[1]) != -1)
        violation("there was a pipe before");
    syslog(LOG_WARNING, "one\ntwo %d", 3);
    expect_line(ends[0], "<4>one two 3\n", 13);
    log_letters(3 * PIPE_BUF / 2);
    expect_line(ends[0], "<3>xxx", PIPE_BUF);
    fill(ends);
    log_letters(7);
    if (system_log != 3)
        violation("the pipe was given up");
    close(ends[0]);
    close(ends[1]);
    checking = false;
}
