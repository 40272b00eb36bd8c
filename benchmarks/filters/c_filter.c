/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The measure of all others: a filter in C on libmilter, written the usual way.
 *
 *   c_filter replying|nr SOCKET
 *
 * It adds X-Sum with the bytes of all header values and of the body. "replying"
 * negotiates nothing, so the MTA waits for its answer to each command; "nr"
 * negotiates "no reply" for each stage but the end of the message.
 *
 * A session's memory is made in connect and given back in close. libmilter calls
 * the functions of one session one after the other, and needs no lock for that.
 */
#include <libmilter/mfapi.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct session {
    unsigned long sum;
};

static const unsigned long NO_REPLIES = SMFIP_NR_CONN | SMFIP_NR_HELO | SMFIP_NR_MAIL | SMFIP_NR_RCPT |
                                        SMFIP_NR_DATA | SMFIP_NR_HDR | SMFIP_NR_EOH | SMFIP_NR_BODY;

static sfsistat done = SMFIS_CONTINUE; /* what each stage but the last answers; set before the first session */

static sfsistat on_negotiate(SMFICTX *ctx, unsigned long actions, unsigned long steps, unsigned long unused2,
                             unsigned long unused3, unsigned long *wanted_actions, unsigned long *wanted_steps,
                             unsigned long *wanted2, unsigned long *wanted3)
{
    (void)ctx, (void)unused2, (void)unused3;
    *wanted_actions = actions & SMFIF_ADDHDRS;
    *wanted_steps = steps & NO_REPLIES;
    *wanted2 = *wanted3 = 0;
    return SMFIS_CONTINUE;
}

static sfsistat on_connect(SMFICTX *ctx, char *hostname, _SOCK_ADDR *address)
{
    struct session *session = calloc(1, sizeof *session);

    (void)hostname, (void)address;
    if (session == NULL)
        abort(); /* the MTA then does what it does without a filter */
    smfi_setpriv(ctx, session);
    return done;
}

static sfsistat on_helo(SMFICTX *ctx, char *name)
{
    (void)ctx, (void)name;
    return done;
}

static sfsistat on_mail(SMFICTX *ctx, char **arguments)
{
    struct session *session = smfi_getpriv(ctx);

    (void)arguments;
    session->sum = 0;
    return done;
}

static sfsistat on_rcpt(SMFICTX *ctx, char **arguments)
{
    (void)ctx, (void)arguments;
    return done;
}

static sfsistat on_data(SMFICTX *ctx)
{
    (void)ctx;
    return done;
}

static sfsistat on_header(SMFICTX *ctx, char *name, char *value)
{
    struct session *session = smfi_getpriv(ctx);

    (void)name;
    session->sum += strlen(value);
    return done;
}

static sfsistat on_eoh(SMFICTX *ctx)
{
    (void)ctx;
    return done;
}

static sfsistat on_body(SMFICTX *ctx, unsigned char *chunk, size_t size)
{
    struct session *session = smfi_getpriv(ctx);

    (void)chunk;
    session->sum += size;
    return done;
}

static sfsistat on_eom(SMFICTX *ctx)
{
    const struct session *session = smfi_getpriv(ctx);
    char name[] = "X-Sum", value[24];

    snprintf(value, sizeof value, "%lu", session->sum);
    return smfi_addheader(ctx, name, value) == MI_SUCCESS ? SMFIS_CONTINUE : SMFIS_TEMPFAIL;
}

static sfsistat on_close(SMFICTX *ctx)
{
    free(smfi_getpriv(ctx));
    smfi_setpriv(ctx, NULL);
    return SMFIS_CONTINUE;
}

int main(int count, char **arguments)
{
    const bool replying = count == 3 && strcmp(arguments[1], "replying") == 0;
    char name[] = "c_filter";

    if (count != 3 || (!replying && strcmp(arguments[1], "nr") != 0)) {
        fputs("usage: c_filter replying|nr SOCKET\n", stderr);
        return 2;
    }
    struct smfiDesc filter = {
        .xxfi_name = name, .xxfi_version = SMFI_VERSION, .xxfi_flags = SMFIF_ADDHDRS,
        .xxfi_connect = on_connect, .xxfi_helo = on_helo, .xxfi_envfrom = on_mail, .xxfi_envrcpt = on_rcpt,
        .xxfi_data = on_data, .xxfi_header = on_header, .xxfi_eoh = on_eoh, .xxfi_body = on_body,
        .xxfi_eom = on_eom, .xxfi_close = on_close, .xxfi_negotiate = replying ? NULL : on_negotiate,
    };
    if (!replying)
        done = SMFIS_NOREPLY;
    if (smfi_register(filter) != MI_SUCCESS || smfi_setconn(arguments[2]) != MI_SUCCESS)
        return 1;
    return smfi_main() == MI_SUCCESS ? 0 : 1;
}
