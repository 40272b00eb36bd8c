/* SPDX-License-Identifier: GPL-3.0-or-later */
/*
 * A message as it is gathered: its header fields and its body, as one run of
 * bytes, in memory, and past a limit in a temporary file without a name.
 *
 * Nothing here knows libmilter or Python: a content belongs to one session, and
 * only the thread that serves it changes it. Python reads it while that thread
 * waits for it.
 */
#ifndef MILTER_CONTENT_H
#define MILTER_CONTENT_H

#include <stdbool.h>
#include <stddef.h>

/* Bytes that grow. All zero is an empty one. */
struct buffer {
    char *bytes;
    size_t size, capacity;
};

bool buffer_append(struct buffer *buffer, const void *bytes, size_t size);
void buffer_free(struct buffer *buffer);

/* Where a message goes that is too large for memory. */
struct spool {
    size_t size; /* bytes of a message that stay in memory */
    const char *directory;
};

/* Made by content_init, emptied by content_clear. */
struct content {
    struct buffer memory; /* what is not in the file */
    size_t in_file;
    bool large; /* the memory is one of those that are kept for the next large message */
    int file;   /* or -1 */
    int error; /* an errno: something is missing, so all of it is worth nothing */
};

void content_init(struct content *content);
void content_append(struct content *content, const void *bytes, size_t size, const struct spool *spool);
void content_finish(struct content *content);
void content_clear(struct content *content);
void content_free_kept(void);
size_t content_size(const struct content *content);

#endif
