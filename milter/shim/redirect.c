/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * libmilter's listener and its log, where its calls are redirected; and whether they
 * are. (Its packets and its sessions: packets.c, scheduler.c.)
 *
 * Without a descriptor for it, a connection cannot be accepted, and libmilter would
 * try again at once, for ever. So a failed accept takes a while here. It is logged
 * once when it begins, and once when it is over.
 */
#define _GNU_SOURCE

#include "redirect.h"

#if MILTER_REDIRECT

#include "packets.h"
#include "scheduler.h"

#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <link.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <syslog.h>
#include <unistd.h>

#if __ELF_NATIVE_CLASS == 64
#define R_SYMBOL(info) ELF64_R_SYM(info)
#else
#define R_SYMBOL(info) ELF32_R_SYM(info)
#endif

enum { PAUSE = 50 }; /* milliseconds until the next accept, when one has failed */

static atomic_int log_descriptor = -1;
static atomic_int expected_family = AF_UNSPEC;


/* ---- The log ----------------------------------------------------------------------------- */

int milter_io_log_to(int fd)
{
    return atomic_exchange(&log_descriptor, fd);
}

/* By any thread of libmilter, whose errno stays as it was. */
static void log_line(int priority, const char *format, va_list arguments)
{
    const int saved = errno, fd = atomic_load(&log_descriptor);
    char line[PIPE_BUF];
    va_list again;

    va_copy(again, arguments);
    const int prefix = snprintf(line, sizeof line, "<%d>", priority);
    int size = vsnprintf(line + prefix, sizeof line - (size_t)prefix, format, arguments);
    if (size < 0)
        size = 0;
    size += prefix;
    if (size > (int)sizeof line - 1)
        size = (int)sizeof line - 1;
    for (int i = 0; i < size; i++)
        if (line[i] == '\n')
            line[i] = ' ';
    line[size++] = '\n';
    if (fd < 0 || write(fd, line, (size_t)size) != size) {
        errno = saved;
        vsyslog(priority, format, again);
    }
    va_end(again);
    errno = saved;
}

void milter_log(int priority, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    log_line(priority, format, arguments);
    va_end(arguments);
}

void ours_syslog(int priority, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    log_line(priority, format, arguments);
    va_end(arguments);
}

void ours___syslog_chk(int priority, int flag, const char *format, ...)
{
    va_list arguments;

    (void)flag;
    va_start(arguments, format);
    log_line(priority, format, arguments);
    va_end(arguments);
}

/* ---- The listener ------------------------------------------------------------------------ */

void milter_io_expect(int family)
{
    atomic_store(&expected_family, family);
}

static bool accept_fails; /* for want of something; libmilter's listener alone touches it */

static bool is_shut(int fd)
{
    struct pollfd listener = {fd, 0, 0};

    return real_poll(&listener, 1, 0) > 0 && (listener.revents & POLLHUP) != 0;
}

static bool runs_out(int error)
{
    return error == EMFILE || error == ENFILE || error == ENOMEM || error == ENOBUFS;
}

/*
 * By libmilter's listener: accept has failed. libmilter tries again at once, so
 * that waits here for a while. A socket that does not listen is one that another
 * process has shut down, or that was replaced behind the descriptor: nothing to
 * tell of, but libmilter would give up after some. Returns the errno for libmilter.
 */
static int note_failed_accept(int fd, int error)
{
    struct rlimit limit = {0, 0};

    if (error == EINVAL || is_shut(fd)) {
        real_poll(NULL, 0, PAUSE);
        return EAGAIN;
    }
    if (!runs_out(error))
        return error;
    if (!accept_fails) {
        accept_fails = true;
        (void)getrlimit(RLIMIT_NOFILE, &limit);
        milter_log(LOG_ERR,
                   "connections cannot be accepted (%s): they wait until others have ended. A process may have %llu "
                   "open files: raise the limit (systemd: LimitNOFILE=; ulimit -n), or let the MTA open fewer "
                   "connections",
                   strerror(error), (unsigned long long)limit.rlim_cur);
    }
    real_poll(NULL, 0, PAUSE);
    return error;
}

/* By libmilter's listener, which has accepted a connection: it is over when no other one waits. */
static void note_accept(int fd)
{
    struct pollfd others = {fd, POLLIN, 0};

    if (accept_fails && real_poll(&others, 1, 0) == 0) {
        accept_fails = false;
        milter_log(LOG_NOTICE, "all connections that waited were accepted");
    }
}

int ours_accept(int fd, struct sockaddr *address, socklen_t *size)
{
    const socklen_t room = size != NULL ? *size : 0;
    const int accepted = real_accept(fd, address, size);

    if (!milter_io_wrapped())
        return accepted;
    if (size != NULL && *size > room)
        *size = room; /* of another family; libmilter takes this for the size of its memory at the next call */
    if (accepted < 0) {
        errno = note_failed_accept(fd, errno);
        return accepted;
    }
    note_accept(fd);
    const bool named = address != NULL && *size >= sizeof address->sa_family;
    const int family = atomic_load(&expected_family);
    milter_expect_session(
        milter_adopt(accepted, named && (address->sa_family == AF_INET || address->sa_family == AF_INET6)));
    if (named && family != AF_UNSPEC)
        address->sa_family = (sa_family_t)family; /* libmilter looks at nothing else of it */
    return accepted;
}

/* ---- Do the calls arrive? ----------------------------------------------------------------- */

#if MILTER_STATIC

/*
 * MILTER_IO_SYMBOLS comes from the build: X(close) X(poll) and so on, the names
 * that libmilter's archive refers to. The linker treats a reference from here
 * like one from there, so it shows where those end.
 */
#define X(symbol)                                                                                                      \
    void reference_##symbol(void) __asm__(#symbol);                                                                    \
    void wrapper_##symbol(void) __asm__("__wrap_" #symbol);
MILTER_IO_SYMBOLS
#undef X

/* Any thread. Volatile, or the compiler would say that two names are two functions. */
bool milter_io_wrapped(void)
{
#define X(symbol) {reference_##symbol, wrapper_##symbol},
    static void (*const volatile pairs[][2])(void) = {MILTER_IO_SYMBOLS};
#undef X
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++)
        if (pairs[i][0] != pairs[i][1])
            return false;
    return true;
}

const char *milter_io_symbols(void)
{
#define X(symbol) #symbol " "
    return MILTER_IO_SYMBOLS;
#undef X
}

#else

int (*real_accept)(int fd, struct sockaddr *address, socklen_t *size);
int (*real_close)(int fd);
int (*real_poll)(struct pollfd *fds, nfds_t count, int timeout);
int (*real___poll_chk)(struct pollfd *fds, nfds_t count, int timeout, size_t size);
void (*real_syslog)(int priority, const char *format, ...);
void (*real___syslog_chk)(int priority, int flag, const char *format, ...);
char *(*real_mi_rd_cmd)(int sd, struct timeval *timeout, char *command, size_t *size, char *name);
int (*real_mi_wr_cmd)(int sd, struct timeval *timeout, int command, char *data, size_t size);
int (*real_mi_pool_controller_init)(void);
int (*real_mi_start_session)(SMFICTX *ctx);

#define CALL(name) {#name, (void **)&real_##name, false}
static struct {
    const char *name;
    void **real;
    bool arrives; /* libmilter makes this call, and it comes here */
} calls[] = {
    CALL(accept),       CALL(close),     CALL(poll),      CALL(__poll_chk),
    CALL(syslog),       CALL(__syslog_chk), CALL(mi_rd_cmd), CALL(mi_wr_cmd),
    CALL(mi_start_session), CALL(mi_pool_controller_init),
};
enum { CALLS = sizeof calls / sizeof *calls };

static bool wrapped;      /* written once, when the extension is loaded */
static char symbols[256]; /* the same */

/* Where libmilter lies, and its table for the dynamic linker. */
struct place {
    ElfW(Addr) base;
    const ElfW(Dyn) *dynamic;
};

/* By dl_iterate_phdr: stops at the object that smfi_main lies in. */
static int find_libmilter(struct dl_phdr_info *object, size_t size, void *found)
{
    struct place *place = found;
    const ElfW(Addr) address = (ElfW(Addr))(uintptr_t)smfi_main;
    bool here = false;

    (void)size;
    place->base = object->dlpi_addr;
    place->dynamic = NULL;
    for (int i = 0; i < object->dlpi_phnum; i++) {
        const ElfW(Phdr) *part = &object->dlpi_phdr[i];
        const ElfW(Addr) start = object->dlpi_addr + part->p_vaddr;
        if (part->p_type == PT_LOAD && address >= start && address < start + part->p_memsz)
            here = true;
        if (part->p_type == PT_DYNAMIC)
            place->dynamic = (const ElfW(Dyn) *)start;
    }
    return here;
}

/* An entry of that table; 0: there is none. Addresses are absolute with glibc, and relative with others. */
static ElfW(Addr) entry_of(const struct place *place, ElfW(Sxword) tag)
{
    for (const ElfW(Dyn) *entry = place->dynamic; entry->d_tag != DT_NULL; entry++)
        if (entry->d_tag == tag)
            return entry->d_un.d_ptr;
    return 0;
}

static const void *address_of(const struct place *place, ElfW(Sxword) tag)
{
    const ElfW(Addr) address = entry_of(place, tag);

    return (const void *)(address < place->base ? place->base + address : address);
}

/* Does this function lie in this extension? Its name alone may lead elsewhere. */
static bool is_here(const void *function)
{
    Dl_info its, own;

    return dladdr(function, &its) != 0 && dladdr(&wrapped, &own) != 0 && its.dli_fbase == own.dli_fbase;
}

/* Where do these references of libmilter lead? False: one of them that should come here does not. */
static bool look_at(const struct place *place, ElfW(Sxword) table, ElfW(Addr) size)
{
    const ElfW(Rela) *references = address_of(place, table);
    const ElfW(Sym) *names = address_of(place, DT_SYMTAB);
    const char *text = address_of(place, DT_STRTAB);

    for (size_t i = 0; i < size / sizeof *references; i++) {
        const char *name = text + names[R_SYMBOL(references[i].r_info)].st_name;
        for (int j = 0; j < CALLS; j++) {
            if (strcmp(name, calls[j].name) != 0)
                continue;
            calls[j].arrives = true;
            if (!is_here(*(void **)(place->base + references[i].r_offset)))
                return false;
        }
    }
    return true;
}

static bool arrives(const char *name)
{
    for (int i = 0; i < CALLS; i++)
        if (strcmp(name, calls[i].name) == 0)
            return calls[i].arrives;
    return false;
}

/* All calls come here, and so does each without which it is not the libmilter that this was written for. */
static bool all_arrive(void)
{
    struct place place;

    if (dl_iterate_phdr(find_libmilter, &place) == 0 || place.dynamic == NULL ||
        entry_of(&place, DT_PLTREL) != DT_RELA)
        return false;
    return look_at(&place, DT_JMPREL, entry_of(&place, DT_PLTRELSZ)) &&
           look_at(&place, DT_RELA, entry_of(&place, DT_RELASZ)) && arrives("accept") && arrives("close") &&
           (arrives("poll") || arrives("__poll_chk")) && arrives("mi_rd_cmd") && arrives("mi_wr_cmd");
}

/* When the extension is loaded, after the dynamic linker has done its work. */
__attribute__((constructor)) static void look(void)
{
    for (int i = 0; i < CALLS; i++)
        *calls[i].real = dlsym(RTLD_NEXT, calls[i].name);
    wrapped = all_arrive();
    for (int i = 0; i < CALLS; i++)
        if (calls[i].arrives) {
            strcat(symbols, calls[i].name);
            strcat(symbols, " ");
        }
}

bool milter_io_wrapped(void)
{
    return wrapped;
}

const char *milter_io_symbols(void)
{
    return symbols;
}

#endif

#else /* libmilter is linked as it is */

bool milter_io_wrapped(void)
{
    return false;
}

const char *milter_io_symbols(void)
{
    return "";
}

int milter_io_log_to(int fd)
{
    (void)fd;
    return -1;
}

void milter_io_expect(int family)
{
    (void)family;
}

#endif
