/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * A guard for CONNECT.
 *
 * libmilter closes the connection at an address of a client that it cannot read
 * (engine.c, st_connectinfo), and the MTA then treats all mail of that client as
 * mail whose filter has failed. Postfix sends such a one where a proxy says that
 * it does not know the client (XCLIENT ADDR=[UNAVAILABLE]): family 4, address
 * "unknown". The packet is changed before libmilter sees it, its length is not:
 * what cannot be read becomes an address of an unknown family.
 */
#define _GNU_SOURCE

#include "packets.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdint.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/un.h>

enum { PORT = 2 }; /* bytes of the port, between the family and the address */

static const char ipv6_label[] = "IPv6:"; /* libmilter takes it off */

/* Would libmilter take this text, which ends in NUL, for an address of the family? */
static bool is_address(char family, const char *text)
{
    struct in_addr address;
    struct in6_addr address6;

    switch (family) {
    case '4':
        return inet_aton(text, &address) == 1;
    case '6':
        if (strncasecmp(text, ipv6_label, sizeof ipv6_label - 1) == 0)
            text += sizeof ipv6_label - 1;
        return inet_pton(AF_INET6, text, &address6) == 1;
    case 'L':
        return strlen(text) < sizeof((struct sockaddr_un *)0)->sun_path;
    default:
        return false;
    }
}

/*
 * By the thread that serves the session, when libmilter has read all of the data:
 * host name NUL family port address NUL. A host name without an end is left to
 * libmilter, which closes the connection.
 */
void milter_mend_client(char *data, size_t size)
{
    char *end = memchr(data, '\0', size);

    if (end == NULL || end + 1 == data + size)
        return;
    char *family = end + 1;
    const bool whole = data + size - family > 1 + PORT && data[size - 1] == '\0';
    if (!whole || !is_address(*family, family + 1 + PORT))
        *family = 'U';
}
