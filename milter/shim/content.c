/* SPDX-License-Identifier: GPL-3.0-or-later */
/* See content.h. Each function is called by the owner of its argument. */
#define _GNU_SOURCE /* O_TMPFILE, where there is one */

#include "content.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    BUFFER_FIRST = 512,
    LARGE = 128 * 1024,           /* a message larger than this gets a buffer of the spool size */
    LARGE_MOST = 8 * 1024 * 1024, /* if that is not larger than this */
    CONTENT_FIRST = 8 * 1024,  /* most messages fit in this, or are far larger */
    FILE_BUFFER = 64 * 1024,   /* header fields are small: they are written together */
    PATH_LONGEST = 4096,
    LARGE_KEPT = 8 /* buffers of the spool size that are kept for the next large message */
};

/* ---- Large buffers, kept for the next large message ---------------------------------------- */

/*
 * A megabyte of fresh memory costs more than the copy into it: the kernel hands it
 * over page by page, and malloc gives it back at once. All of the same size, since
 * it is the run's spool size. Under the lock.
 */
static pthread_mutex_t large_lock = PTHREAD_MUTEX_INITIALIZER;
static char *large[LARGE_KEPT];
static size_t large_count, large_size;

/* Any thread. NULL: out of memory. */
static char *take_large(size_t size)
{
    char *bytes = NULL;

    pthread_mutex_lock(&large_lock);
    if (large_count > 0 && large_size == size)
        bytes = large[--large_count];
    pthread_mutex_unlock(&large_lock);
    return bytes != NULL ? bytes : malloc(size);
}

/* Any thread; the caller's no more. */
static void give_large_back(char *bytes, size_t size)
{
    pthread_mutex_lock(&large_lock);
    if (large_size != size)
        while (large_count > 0)
            free(large[--large_count]);
    large_size = size;
    if (large_count < LARGE_KEPT) {
        large[large_count++] = bytes;
        bytes = NULL;
    }
    pthread_mutex_unlock(&large_lock);
    free(bytes);
}

/* Any thread, when a run ends. */
void content_free_kept(void)
{
    pthread_mutex_lock(&large_lock);
    while (large_count > 0)
        free(large[--large_count]);
    pthread_mutex_unlock(&large_lock);
}

/* ---- Buffers ------------------------------------------------------------------------------- */

/* Makes room for `size` bytes more. False: out of memory, nothing has changed. */
static bool reserve(struct buffer *buffer, size_t size, size_t first)
{
    if (size <= buffer->capacity - buffer->size)
        return true;
    size_t capacity = buffer->capacity > 0 ? buffer->capacity : first;
    while (capacity - buffer->size < size) {
        if (capacity > SIZE_MAX / 2)
            return false;
        capacity *= 2;
    }
    char *bytes = realloc(buffer->bytes, capacity);
    if (bytes == NULL)
        return false;
    buffer->bytes = bytes;
    buffer->capacity = capacity;
    return true;
}

static void put(struct buffer *buffer, const void *bytes, size_t size)
{
    if (size > 0)
        memcpy(buffer->bytes + buffer->size, bytes, size);
    buffer->size += size;
}

bool buffer_append(struct buffer *buffer, const void *bytes, size_t size)
{
    if (!reserve(buffer, size, BUFFER_FIRST))
        return false;
    put(buffer, bytes, size);
    return true;
}

void buffer_free(struct buffer *buffer)
{
    free(buffer->bytes);
    *buffer = (struct buffer){NULL, 0, 0};
}

void content_init(struct content *content)
{
    *content = (struct content){.file = -1};
}

/* Returns the descriptor of a file that has no name any more, or -1. */
static int temporary_file(const char *directory)
{
    char path[PATH_LONGEST];

#ifdef O_TMPFILE
    const int nameless = open(directory, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (nameless >= 0)
        return nameless;
    if (errno == EMFILE || errno == ENFILE || errno == ENOSPC)
        return -1;
#endif
    if ((size_t)snprintf(path, sizeof path, "%s/milter-XXXXXX", directory) >= sizeof path) {
        errno = ENAMETOOLONG;
        return -1;
    }
    const int file = mkostemp(path, O_CLOEXEC);
    if (file >= 0 && unlink(path) != 0) { /* mail must not stay on the disk under a name */
        const int error = errno;
        close(file);
        errno = error;
        return -1;
    }
    return file;
}

static int write_all(int file, const char *bytes, size_t size)
{
    while (size > 0) {
        const ssize_t written = write(file, bytes, size);
        if (written < 0 && errno == EINTR)
            continue;
        if (written <= 0)
            return written < 0 ? errno : ENOSPC;
        bytes += written;
        size -= (size_t)written;
    }
    return 0;
}

static void free_memory(struct content *content)
{
    if (content->large)
        give_large_back(content->memory.bytes, content->memory.capacity);
    else
        free(content->memory.bytes);
    content->memory = (struct buffer){NULL, 0, 0};
    content->large = false;
}

/* Writes what is in memory to the file, and `bytes` after it. Returns an errno or 0. */
static int spill(struct content *content, const void *bytes, size_t size, const char *directory)
{
    if (content->file < 0) {
        content->file = temporary_file(directory);
        if (content->file < 0)
            return errno;
    }
    int error = write_all(content->file, content->memory.bytes, content->memory.size);
    if (error == 0)
        error = write_all(content->file, bytes, size);
    content->in_file += content->memory.size + size;
    if (content->memory.capacity > FILE_BUFFER)
        free_memory(content);
    content->memory.size = 0;
    return error;
}

/* Room in memory for so many bytes more, which the limit allows. False: out of memory. */
static bool reserve_memory(struct content *content, size_t size, const struct spool *spool)
{
    struct buffer *memory = &content->memory;

    if (content->file >= 0 || memory->size + size <= LARGE || spool->size > LARGE_MOST)
        return reserve(memory, size, CONTENT_FIRST);
    if (!content->large) {
        char *bytes = take_large(spool->size);
        if (bytes == NULL)
            return false;
        if (memory->size > 0)
            memcpy(bytes, memory->bytes, memory->size);
        free(memory->bytes);
        memory->bytes = bytes;
        memory->capacity = spool->size;
        content->large = true;
    }
    return true; /* it holds all that the limit allows */
}

/*
 * Once something failed, this does nothing: the error stands for the whole content. Without memory the content goes
 * to the file at once; and when it is lost, its memory serves the others.
 */
void content_append(struct content *content, const void *bytes, size_t size, const struct spool *spool)
{
    const size_t limit = content->file < 0 ? spool->size : FILE_BUFFER;

    if (content->error != 0)
        return;
    if (size <= limit && content->memory.size <= limit - size && reserve_memory(content, size, spool)) {
        put(&content->memory, bytes, size);
        return;
    }
    content->error = spill(content, bytes, size, spool->directory);
    if (content->error != 0)
        free_memory(content);
}

/* Before it is read: a content with a file lies in it completely. */
void content_finish(struct content *content)
{
    if (content->error == 0 && content->file >= 0 && content->memory.size > 0)
        content->error = spill(content, NULL, 0, NULL);
}

void content_clear(struct content *content)
{
    if (content->file >= 0)
        close(content->file);
    free_memory(content);
    content_init(content);
}

size_t content_size(const struct content *content)
{
    return content->in_file + content->memory.size;
}
