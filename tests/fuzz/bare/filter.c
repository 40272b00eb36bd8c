/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * A plain filter on libmilter, without this library: shows what libmilter itself makes of broken packets.
 *
 *   filter SOCKET [accept-body]
 *
 * It answers an unknown command with the number of characters that it was given, and MAIL with the value of the
 * macro {here}. With accept-body it accepts a message at a piece of its body. It says on standard output when it
 * listens, and which sessions have ended.
 */
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include <libmilter/mfapi.h>

static bool accepts_body;

static sfsistat say(SMFICTX *ctx, const char *text)
{
    char copy[64];

    snprintf(copy, sizeof copy, "%s", text);
    smfi_setreply(ctx, "550", NULL, copy);
    return SMFIS_REJECT;
}

static sfsistat on_unknown(SMFICTX *ctx, const char *command)
{
    char size[24];

    snprintf(size, sizeof size, "%zu", strlen(command));
    return say(ctx, size);
}

static sfsistat on_mail(SMFICTX *ctx, char **arguments)
{
    static char name[] = "{here}";
    const char *value = strcmp(arguments[0], "<look>") == 0 ? smfi_getsymval(ctx, name) : NULL;

    return value != NULL ? say(ctx, value) : SMFIS_CONTINUE;
}

static sfsistat on_body(SMFICTX *ctx, unsigned char *chunk, size_t size)
{
    (void)ctx;
    (void)chunk;
    (void)size;
    return accepts_body ? SMFIS_ACCEPT : SMFIS_CONTINUE;
}

static sfsistat on_header(SMFICTX *ctx, char *name, char *value)
{
    (void)value;
    return name[0] == '\0' ? say(ctx, "a header field without a name") : SMFIS_CONTINUE;
}

static sfsistat on_helo(SMFICTX *ctx, char *name)
{
    (void)ctx;
    (void)name;
    return SMFIS_CONTINUE;
}

static sfsistat on_connect(SMFICTX *ctx, char *hostname, _SOCK_ADDR *address)
{
    (void)ctx;
    (void)hostname;
    (void)address;
    return SMFIS_CONTINUE;
}

/* Declines unknown commands and DATA where the MTA can leave them out, and never answers DATA. */
static sfsistat on_negotiate(SMFICTX *ctx, unsigned long actions, unsigned long steps, unsigned long unused2,
                             unsigned long unused3, unsigned long *wanted, unsigned long *declined,
                             unsigned long *out2, unsigned long *out3)
{
    (void)ctx;
    (void)unused2;
    (void)unused3;
    *wanted = actions & SMFIF_ADDHDRS;
    *declined = (steps & (SMFIP_NODATA | SMFIP_NOUNKNOWN)) | SMFIP_NR_DATA;
    *out2 = *out3 = 0;
    return SMFIS_CONTINUE;
}

int main(int argc, char **argv)
{
    static char name[] = "bare";
    const struct smfiDesc description = {
        .xxfi_name = name,
        .xxfi_version = SMFI_VERSION,
        .xxfi_flags = SMFIF_ADDHDRS,
        .xxfi_connect = on_connect,
        .xxfi_helo = on_helo,
        .xxfi_envfrom = on_mail,
        .xxfi_header = on_header,
        .xxfi_body = on_body,
        .xxfi_unknown = on_unknown,
        .xxfi_negotiate = on_negotiate,
    };

    accepts_body = argc > 2 && strcmp(argv[2], "accept-body") == 0;
    if (argc < 2 || smfi_register(description) != MI_SUCCESS || smfi_setconn(argv[1]) != MI_SUCCESS ||
        smfi_opensocket(true) != MI_SUCCESS)
        return 1;
    printf("listening\n");
    fflush(stdout);
    return smfi_main() == MI_SUCCESS ? 0 : 1;
}
