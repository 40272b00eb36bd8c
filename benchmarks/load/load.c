/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * Many MTAs at once, in one process: gives a filter work, checks its answers, and
 * tells how long they took. One JSON object on standard output.
 *
 *   load --socket unix:/run/filter.sock --connections 8 --messages 10000
 *
 * The exit code is 0 when all answers were right, 1 when some were not, 2 when
 * there was nothing to measure.
 *
 * The process has one thread, which waits in epoll. A line is a place for one
 * connection at a time; it takes the next message as soon as its last one was
 * answered, until no message is left or the time is up. What is under way then
 * is waited for: a connection that the filter neglects shows in the figures.
 */
#define _GNU_SOURCE
#include "conversation.h"

#include <errno.h>
#include <getopt.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/un.h>
#include <unistd.h>

enum {
    EVENTS = 256,
    COMPLAINTS = 5,    /* described in the output */
    ENOUGH = 100,      /* wrong answers, and no more messages are sent */
    LINES_TOLD = 64,   /* with more, the longest waits of each are left out */
};

struct options {
    struct address address;
    struct mail mail;
    unsigned connections;
    uint64_t per_connection; /* messages; 0: no end */
    uint64_t messages;
    double seconds; /* 0: no limit */
    unsigned idle;  /* connections to hold after one message each */
    unsigned patience;
};

struct line {
    struct conversation conversation;
    uint32_t watched;  /* events that epoll looks for; 0: none */
    uint64_t answered; /* messages on this connection */
    uint64_t longest;  /* nanoseconds that a message of this line took at most */
};

struct times {
    uint64_t *each;
    size_t count, capacity;
};

static struct options options;
static struct line *lines;
static unsigned line_count, opened; /* lines; lines that were used */
static int epoll;
static uint64_t claimed, right, wrong, under_way, start, end, deadline;
static double load_start; /* processor time of this process */
static bool hopeless;     /* the filter does not answer */
static struct times from_mail, from_connect;
static char complaints[COMPLAINTS][sizeof lines->conversation.complaint];

__attribute__((noreturn)) static void die(const char *what, const char *why)
{
    fprintf(stderr, "load: %s: %s\n", what, why);
    exit(2);
}

/* ---- Times ------------------------------------------------------------------------------ */

static void note_time(struct times *times, uint64_t time)
{
    if (times->count == times->capacity) {
        times->capacity = 2 * times->capacity + 4096;
        times->each = realloc(times->each, times->capacity * sizeof *times->each);
        if (times->each == NULL)
            die("times", "no memory");
    }
    times->each[times->count++] = time;
}

static int compare_times(const void *a, const void *b)
{
    const uint64_t left = *(const uint64_t *)a, other = *(const uint64_t *)b;
    return left < other ? -1 : left > other;
}

static double microseconds(uint64_t nanoseconds)
{
    return (double)nanoseconds / 1e3;
}

static void print_times(const char *name, struct times *times)
{
    if (times->count == 0) {
        printf("\"%s\": null, ", name);
        return;
    }
    qsort(times->each, times->count, sizeof *times->each, compare_times);
    printf("\"%s\": {\"p50\": %.1f, \"p99\": %.1f, \"max\": %.1f}, ", name,
           microseconds(times->each[times->count / 2]), microseconds(times->each[times->count * 99 / 100]),
           microseconds(times->each[times->count - 1]));
}

/* ---- Lines ------------------------------------------------------------------------------ */

/* Whether there is another message to send. */
static bool claim(void)
{
    if (claimed == options.messages || wrong >= ENOUGH || hopeless || (deadline > 0 && now() >= deadline))
        return false;
    claimed++;
    under_way++;
    return true;
}

static enum outcome open_line(struct line *line)
{
    line->watched = 0;
    line->answered = 0;
    return conversation_open(&line->conversation, &options.address, &options.mail, claimed);
}

/* A message is over, well or not. */
static void account(struct line *line)
{
    const struct conversation *conversation = &line->conversation;
    const uint64_t begun = line->answered == 0 ? conversation->connected_at : conversation->begun_at;

    end = now();
    under_way--;
    if (end - begun > line->longest)
        line->longest = end - begun;
    if (conversation->complaint[0] != '\0') {
        if (wrong < COMPLAINTS)
            memcpy(complaints[wrong], conversation->complaint, sizeof *complaints);
        wrong++;
        return;
    }
    right++;
    note_time(&from_mail, end - conversation->begun_at);
    if (line->answered == 0)
        note_time(&from_connect, end - conversation->connected_at);
}

/* What a line does once its message is over. */
static enum outcome carry_on(struct line *line, enum outcome outcome)
{
    account(line);
    line->answered++;
    if (outcome == ANSWERED && options.idle > 0)
        return WAITING;
    if (outcome == ANSWERED && line->answered == options.per_connection)
        conversation_close(&line->conversation);
    if (!claim()) {
        conversation_close(&line->conversation);
        return WAITING;
    }
    return line->conversation.fd < 0 ? open_line(line) : conversation_next(&line->conversation, claimed);
}

static void watch(struct line *line)
{
    const uint32_t wanted = EPOLLIN | (line->conversation.blocked ? EPOLLOUT : 0);
    struct epoll_event event = {.events = wanted, .data.ptr = line};

    if (line->conversation.fd < 0 || line->watched == wanted)
        return;
    if (epoll_ctl(epoll, line->watched == 0 ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, line->conversation.fd, &event) < 0)
        die("epoll_ctl", strerror(errno));
    line->watched = wanted;
}

static void settle(struct line *line, enum outcome outcome)
{
    while (outcome != WAITING)
        outcome = carry_on(line, outcome);
    watch(line);
}

/* Idle connections are opened one after the other, `connections` of them under way at a time. */
static void open_lines(void)
{
    while (opened < line_count && under_way < options.connections && claim()) {
        struct line *line = &lines[opened++];
        settle(line, open_line(line));
    }
}

static void handle(struct line *line, uint32_t events)
{
    enum outcome outcome = WAITING;

    if (line->conversation.fd < 0)
        return;
    if (line->conversation.blocked && (events & EPOLLOUT) != 0)
        outcome = conversation_unblocked(&line->conversation);
    if (outcome == WAITING && (events & ~(uint32_t)EPOLLOUT) != 0)
        outcome = conversation_heard(&line->conversation);
    settle(line, outcome);
}

/* Nothing has come for too long. */
static void give_up(void)
{
    hopeless = true;
    for (unsigned i = 0; i < opened; i++)
        if (lines[i].conversation.fd >= 0 && (options.idle == 0 || lines[i].answered == 0)) {
            conversation_give_up(&lines[i].conversation, options.patience);
            account(&lines[i]);
        }
}

static double processor_seconds(void)
{
    struct rusage used;

    getrusage(RUSAGE_SELF, &used);
    return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
           (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static void work(void)
{
    struct epoll_event events[EVENTS];

    for (open_lines(); under_way > 0; open_lines()) {
        const int count = epoll_wait(epoll, events, EVENTS, (int)options.patience * 1000);
        if (count == 0)
            give_up();
        for (int i = 0; i < count; i++)
            handle(events[i].data.ptr, events[i].events);
    }
}

/* One message before the clock starts: the scripts are written when the filter has answered the negotiation. */
static void rehearse(void)
{
    const struct options asked = options;

    options.messages = options.per_connection = 1;
    options.idle = 0;
    work();
    options = asked;
    claimed = right = 0;
    opened = 0;
    lines[0].longest = 0;
    from_mail.count = from_connect.count = 0;
}

static void perform(void)
{
    start = end = now();
    deadline = options.seconds > 0 ? start + (uint64_t)(options.seconds * 1e9) : 0;
    load_start = processor_seconds();
    work();
}

/* ---- The report ------------------------------------------------------------------------- */

static void report(void)
{
    const double seconds = (double)(end - start) / 1e9;

    printf("{\"messages\": %llu, \"wrong\": %llu, ", (unsigned long long)right, (unsigned long long)wrong);
    printf("\"seconds\": %.6f, \"per_second\": %.1f, ", seconds, seconds > 0 ? (double)right / seconds : 0.0);
    print_times("latency_us", &from_mail);
    print_times("from_connect_us", &from_connect);
    printf("\"longest_us\": [");
    for (unsigned i = 0; i < opened && opened <= LINES_TOLD; i++)
        printf("%s%.1f", i > 0 ? ", " : "", microseconds(lines[i].longest));
    printf("], \"load_cpu_seconds\": %.3f, \"complaints\": [", processor_seconds() - load_start);
    for (unsigned i = 0; i < COMPLAINTS && i < wrong; i++)
        printf("%s\"%s\"", i > 0 ? ", " : "", complaints[i]);
    printf("]}\n");
    fflush(stdout);
}

/* Idle connections stay until the caller closes our standard input. */
static void hold(void)
{
    char ignored[64];

    while (read(STDIN_FILENO, ignored, sizeof ignored) > 0)
        ;
    for (unsigned i = 0; i < opened; i++)
        conversation_close(&lines[i].conversation);
}

/* ---- The command line ------------------------------------------------------------------- */

static const char usage[] =
    "usage: load --socket unix:PATH|inet:PORT@HOST [options]\n"
    "  --connections N      at a time [1]\n"
    "  --per-connection N   messages, then a new connection; 0: the same one for the whole run [1]\n"
    "  --messages N         of the whole run; without it and --seconds: 1000\n"
    "  --seconds S          begin no message later than that\n"
    "  --headers N          [20]\n"
    "  --body BYTES         [4096]\n"
    "  --recipients N       [1]\n"
    "  --idle N             open N connections, a message each, print, and hold them until standard input ends\n"
    "  --patience S         give up when no answer comes for so long [30]\n";

static struct address unix_address(const char *path)
{
    struct address address = {.size = sizeof(struct sockaddr_un)};
    struct sockaddr_un *name = (struct sockaddr_un *)&address.name;

    if (strlen(path) >= sizeof name->sun_path)
        die(path, "too long for a socket");
    name->sun_family = AF_UNIX;
    strcpy(name->sun_path, path);
    return address;
}

static struct address inet_address(const char *text)
{
    const struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM};
    struct addrinfo *found;
    struct address address;
    char port[16];
    const char *host = strchr(text, '@');

    if (host == NULL || (size_t)(host - text) >= sizeof port)
        die(text, "a TCP socket is written inet:PORT@HOST");
    memcpy(port, text, (size_t)(host - text));
    port[host - text] = '\0';
    const int error = getaddrinfo(host + 1, port, &hints, &found);
    if (error != 0)
        die(text, gai_strerror(error));
    memcpy(&address.name, found->ai_addr, found->ai_addrlen);
    address.size = found->ai_addrlen;
    freeaddrinfo(found);
    return address;
}

static struct address parse_address(const char *text)
{
    if (strncmp(text, "unix:", 5) == 0)
        return unix_address(text + 5);
    if (strncmp(text, "inet:", 5) == 0)
        return inet_address(text + 5);
    die(text, "a socket is unix:PATH or inet:PORT@HOST");
}

static double number(const char *text, double most)
{
    char *rest;
    const double value = strtod(text, &rest);

    if (*text == '\0' || *rest != '\0' || !(value >= 0 && value <= most))
        die(text, "not a number that is possible here");
    return value;
}

static void parse(int count, char **arguments)
{
    static const struct option known[] = {
        {"socket", required_argument, NULL, 's'},      {"connections", required_argument, NULL, 'c'},
        {"messages", required_argument, NULL, 'm'},    {"per-connection", required_argument, NULL, 'p'},
        {"seconds", required_argument, NULL, 't'},     {"headers", required_argument, NULL, 'h'},
        {"body", required_argument, NULL, 'b'},        {"recipients", required_argument, NULL, 'r'},
        {"idle", required_argument, NULL, 'i'},        {"patience", required_argument, NULL, 'w'},
        {NULL, 0, NULL, 0},
    };

    options = (struct options){.mail = {20, 4096, 1}, .connections = 1, .per_connection = 1, .patience = 30};
    for (int letter; (letter = getopt_long(count, arguments, "", known, NULL)) != -1;) {
        switch (letter) {
        case 's': options.address = parse_address(optarg); break;
        case 'c': options.connections = (unsigned)number(optarg, 10000); break;
        case 'm': options.messages = (uint64_t)number(optarg, 1e12); break;
        case 'p': options.per_connection = (uint64_t)number(optarg, 1e12); break;
        case 't': options.seconds = number(optarg, 1e6); break;
        case 'h': options.mail.headers = (unsigned)number(optarg, 10000); break;
        case 'b': options.mail.body = (size_t)number(optarg, 1 << 30); break;
        case 'r': options.mail.recipients = (unsigned)number(optarg, 10000); break;
        case 'i': options.idle = (unsigned)number(optarg, 100000); break;
        case 'w': options.patience = (unsigned)number(optarg, 100000); break;
        default: fputs(usage, stderr); exit(2);
        }
    }
    if (options.address.size == 0 || optind != count || options.connections == 0) {
        fputs(usage, stderr);
        exit(2);
    }
    if (options.idle > 0)
        options.messages = options.idle;
    else if (options.messages == 0)
        options.messages = options.seconds > 0 ? UINT64_MAX : 1000;
}

int main(int count, char **arguments)
{
    parse(count, arguments);
    line_count = options.idle > 0 ? options.idle : options.connections;
    lines = calloc(line_count, sizeof *lines);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    if (lines == NULL || epoll < 0)
        die("start", strerror(errno));
    rehearse();
    perform();
    report();
    if (options.idle > 0)
        hold();
    return wrong > 0 ? 1 : right > 0 ? 0 : 2;
}
