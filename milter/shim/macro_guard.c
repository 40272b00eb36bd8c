/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * A guard for smfi_getsymval.
 *
 * libmilter keeps the macros of each stage as an array of names and values that
 * ends in NULL. From an MTA that sends a name without a value, the array has an
 * odd length, and smfi_getsymval, which goes on by two, reads past its end and
 * follows what it finds there (seen in 8.17.1: the process crashes).
 *
 * The arrays are private to libmilter, so their places in its context are found
 * by asking: smfi_getsymval is given a context of our own, in which every word
 * points to an empty array but one, and tells whether it looked there.
 */
#include "milter_shim.h"

#include <stdlib.h>
#include <string.h>

enum {
    CONTEXT_WORDS = 2048, /* far more than any libmilter's context has */
    MOST_ARRAYS = 32
};

static size_t places[MOST_ARRAYS];
static size_t places_found;

/* By milter_register, once, before libmilter has a thread. Finding nothing only means to guard nothing. */
void milter_find_macro_arrays(void)
{
    static char name[] = "{milter_probe}", value[] = "here";
    static char *empty[] = {NULL}, *probe[] = {name, value, NULL};
    char ***context = malloc(CONTEXT_WORDS * sizeof *context);

    if (context == NULL)
        return;
    for (size_t i = 0; i < CONTEXT_WORDS; i++)
        context[i] = empty;
    for (size_t i = 0; i < CONTEXT_WORDS && places_found < MOST_ARRAYS; i++) {
        context[i] = probe;
        if (smfi_getsymval((SMFICTX *)(void *)context, name) == value)
            places[places_found++] = i;
        context[i] = empty;
    }
    free(context);
}

/* By milter_macro, under the session's lock. A name at the end without a value is taken off. */
void milter_mend_macros(SMFICTX *ctx)
{
    char ***context = (char ***)(void *)ctx;

    for (size_t i = 0; i < places_found; i++) {
        char **array = context[places[i]];
        size_t length = 0;
        if (array == NULL)
            continue;
        while (array[length] != NULL)
            length++;
        if (length % 2 != 0)
            array[length - 1] = NULL;
    }
}
