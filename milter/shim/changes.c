/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * The changes of a message that Python wants, sent in one go, once it has been
 * left: what is edited in Message costs no second way through the GIL.
 *
 * Changes are a sequence of records, in the order in which they are sent. A
 * record is a letter (that of the protocol's action) and its fields, each of
 * them ended by NUL, but for the body, whose size is told:
 *
 *   h name value           add a header field
 *   i index name value     insert one
 *   m index name value     change one; an empty value deletes it
 *   e address              change the sender
 *   + address              add a recipient
 *   2 address parameters   add one with ESMTP parameters
 *   - address              remove one
 *   b size bytes           replace the body (no NUL behind the bytes)
 */
#include "milter_shim.h"

#include <stdlib.h>
#include <string.h>

struct reader {
    char *next, *end;
};

/* The next field; NULL when there is none, so that a short record sends nothing. */
static char *field(struct reader *reader)
{
    char *start = reader->next;
    char *nul = start < reader->end ? memchr(start, '\0', (size_t)(reader->end - start)) : NULL;

    if (nul == NULL)
        return NULL;
    reader->next = nul + 1;
    return start;
}

static int send_header(SMFICTX *ctx, char letter, struct reader *reader)
{
    const char *index = letter == 'h' ? "0" : field(reader);
    char *name = field(reader), *value = field(reader);

    if (index == NULL || name == NULL || value == NULL)
        return MI_FAILURE;
    if (letter == 'h')
        return smfi_addheader(ctx, name, value);
    if (letter == 'i')
        return smfi_insheader(ctx, atoi(index), name, value);
    return smfi_chgheader(ctx, name, atoi(index), value);
}

static int send_address(SMFICTX *ctx, char letter, struct reader *reader)
{
    char *address = field(reader);
    char *parameters = letter == '2' ? field(reader) : NULL;

    if (address == NULL || (letter == '2' && parameters == NULL))
        return MI_FAILURE;
    if (letter == 'e')
        return smfi_chgfrom(ctx, address, NULL);
    if (letter == '-')
        return smfi_delrcpt(ctx, address);
    return letter == '2' ? smfi_addrcpt_par(ctx, address, parameters) : smfi_addrcpt(ctx, address);
}

static int send_body(SMFICTX *ctx, struct reader *reader)
{
    const char *digits = field(reader);
    const size_t size = digits != NULL ? (size_t)strtoull(digits, NULL, 10) : 0;

    if (digits == NULL || size > (size_t)(reader->end - reader->next))
        return MI_FAILURE;
    char *bytes = reader->next;
    reader->next += size;
    size_t sent = 0;
    do { /* an empty body is one empty part */
        const size_t part = size - sent < MILTER_BODY_PART ? size - sent : MILTER_BODY_PART;
        if (smfi_replacebody(ctx, (unsigned char *)bytes + sent, (int)part) != MI_SUCCESS)
            return MI_FAILURE;
        sent += part;
    } while (sent < size);
    return MI_SUCCESS;
}

/*
 * By the thread that serves the session, at the end of a message, after the call
 * into Python: no context of it can act any more, so no lock is needed. False:
 * libmilter refused one (the connection is gone, or the action was not granted),
 * or there is a second body, which the MTA would append to the first.
 */
bool milter_send_changes(SMFICTX *ctx, char *changes, size_t size, bool body_untouched)
{
    struct reader reader = {changes, changes + size};
    int sent = MI_SUCCESS;

    while (sent == MI_SUCCESS && reader.next < reader.end) {
        const char *letter = field(&reader);
        switch (letter != NULL ? *letter : '\0') {
        case 'h':
        case 'i':
        case 'm':
            sent = send_header(ctx, *letter, &reader);
            break;
        case 'e':
        case '+':
        case '2':
        case '-':
            sent = send_address(ctx, *letter, &reader);
            break;
        case 'b':
            sent = body_untouched ? send_body(ctx, &reader) : MI_FAILURE;
            body_untouched = false;
            break;
        default:
            sent = MI_FAILURE;
        }
    }
    return sent == MI_SUCCESS;
}
