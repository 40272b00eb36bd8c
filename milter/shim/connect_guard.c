/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * A guard for CONNECT.
 *
 * libmilter closes the connection at an address of a client that it cannot read
 * (engine.c, st_connectinfo), and the MTA then treats all mail of that client as
 * mail whose filter has failed. Postfix sends such a one where a proxy says that
 * it does not know the client (XCLIENT ADDR=[UNAVAILABLE]): family 4, address
 * "unknown". And a libmilter that was built without IPv6 (without NETINET6, which is
 * Sendmail's own default) cannot read any address of family 6.
 *
 * So the packet is changed before libmilter sees it; its length is not. After that
 * the family is 4 or L, with an address that libmilter can read, or it is U, for
 * unknown, which libmilter never looks behind. What follows the U is either a port
 * and an IPv6 address that this file can read, or nothing but NULs. on_connect gets
 * that IPv6 address from here, whatever libmilter was built with: so there is one
 * way, and all tests go it.
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

/* Read what libmilter's mi_inet_pton would take: a text that ends in NUL, with the label of SMTP or without. */
static bool read_ipv6(const char *text, struct in6_addr *address)
{
    if (strncasecmp(text, ipv6_label, sizeof ipv6_label - 1) == 0)
        text += sizeof ipv6_label - 1;
    return inet_pton(AF_INET6, text, address) == 1;
}

/* May this family stand before this text, which ends in NUL? Of family 6: can read_ipv6 read it? */
static bool is_address(char family, const char *text)
{
    struct in_addr address;
    struct in6_addr address6;

    switch (family) {
    case '4':
        return inet_aton(text, &address) == 1;
    case '6':
        return read_ipv6(text, &address6);
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
        memset(family, '\0', (size_t)(data + size - family)); /* nothing that looks like an IPv6 address stays */
    if (*family == '6' || *family == '\0')
        *family = 'U';
}

/*
 * By the thread that serves the session, in on_connect, where libmilter knows no
 * address: the host name that it was given is the beginning of the data above, so
 * the family U follows it. The client is the caller's. False: there is no IPv6
 * address; so it is too where libmilter's I/O is not wrapped.
 */
bool milter_hidden_client(const char *hostname, struct sockaddr_in6 *client)
{
    const char *end = milter_io_data_end(), *family = hostname + strlen(hostname) + 1;

    memset(client, 0, sizeof *client);
    client->sin6_family = AF_INET6;
    if (end == NULL || end - family <= 1 + PORT)
        return false;
    memcpy(&client->sin6_port, family + 1, PORT);
    return read_ipv6(family + 1 + PORT, &client->sin6_addr);
}

/* libmilter's own; the first one is there only if it was built with IPv6, the second one always. */
extern int mi_inet_pton(int family, const char *text, void *address) __attribute__((weak));
extern int mi_stop(void) __attribute__((weak));

/*
 * Any thread. True: this libmilter, which may be another one than that of the build,
 * knows no IPv6. A libmilter that hides its own names is not known to.
 */
bool milter_lacks_ipv6(void)
{
    return mi_stop != NULL && mi_inet_pton == NULL;
}
