/*
 * A plugin for tests: a file, served in the way that the key `how` names, by a
 * driver that has every callback and writes down what becomes of it.
 *
 * The variable PLUGIN_FAULT breaks its table, and the key `fault` its open.
 */
#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <blkfuse-plugin.h>

struct device {
    int fd;
    FILE *log;
    bool sync_fails;
    bool threaded;
    bool forwarding;
    /* Requests for the thread. */
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t work;
    struct job *first, **end;
    bool stopping;
};

/* Lives in the request. */
struct job {
    struct job *next;
    struct blkfuse_request *request;
    bool writing;
    void *buffer;
    uint64_t offset, bytes;
};

static void note(struct device *device, const char *format, ...)
{
    va_list list;

    if (!device->log)
        return;
    va_start(list, format);
    vfprintf(device->log, format, list);
    va_end(list);
    fflush(device->log);
}

static int move(struct device *device, bool writing, void *buffer, uint64_t offset, uint64_t bytes)
{
    ssize_t moved = writing ? pwrite(device->fd, buffer, bytes, (off_t)offset)
                            : pread(device->fd, buffer, bytes, (off_t)offset);

    if (moved < 0)
        return -errno;
    return (uint64_t)moved == bytes ? 0 : -EIO;
}

static void *worker(void *opaque)
{
    struct device *device = opaque;

    pthread_mutex_lock(&device->lock);
    for (;;) {
        struct job *job = device->first;

        if (job) {
            struct blkfuse_request *request = job->request;
            int result;

            device->first = job->next;
            if (!device->first)
                device->end = &device->first;
            pthread_mutex_unlock(&device->lock);
            result = move(device, job->writing, job->buffer, job->offset, job->bytes);
            blkfuse_request_complete(request, result);
            pthread_mutex_lock(&device->lock);
        } else if (device->stopping) {
            break;
        } else {
            pthread_cond_wait(&device->work, &device->lock);
        }
    }
    pthread_mutex_unlock(&device->lock);
    return NULL;
}

static int serve(struct device *device, struct blkfuse_request *request, bool writing,
                 void *buffer, uint64_t offset, uint64_t bytes)
{
    struct job *job;

    if (blkfuse_request_queue_ctx(request) != device)
        return -EBADE;
    if (device->forwarding)
        return blkfuse_request_forward(request, device->fd, offset);
    if (!device->threaded)
        return move(device, writing, buffer, offset, bytes);
    job = blkfuse_request_ctx(request);
    job->next = NULL;
    job->request = request;
    job->writing = writing;
    job->buffer = buffer;
    job->offset = offset;
    job->bytes = bytes;
    pthread_mutex_lock(&device->lock);
    *device->end = job;
    device->end = &job->next;
    pthread_cond_signal(&device->work);
    pthread_mutex_unlock(&device->lock);
    return BLKFUSE_PENDING;
}

static int64_t on_length(void *opaque)
{
    off_t end = lseek(((struct device *)opaque)->fd, 0, SEEK_END);

    return end < 0 ? -errno : end;
}

static int64_t on_allocated_size(void *opaque)
{
    (void)opaque;
    return 512 * 77;
}

static void on_limits(void *opaque, struct blkfuse_limits *limits)
{
    (void)opaque;
    limits->block_size = 8192;
}

static int on_read(void *opaque, struct blkfuse_request *request, void *buffer, uint64_t offset,
                   uint64_t bytes, uint32_t flags)
{
    (void)flags;
    note(opaque, "read\n");
    return serve(opaque, request, false, buffer, offset, bytes);
}

static int on_write(void *opaque, struct blkfuse_request *request, const void *buffer,
                    uint64_t offset, uint64_t bytes, uint32_t flags)
{
    (void)flags;
    return serve(opaque, request, true, (void *)buffer, offset, bytes);
}

static int on_flush(void *opaque, struct blkfuse_request *request, uint32_t flags)
{
    (void)request, (void)flags;
    note(opaque, "flush\n");
    return 0;
}

static int on_discard(void *opaque, struct blkfuse_request *request, uint64_t offset,
                      uint64_t bytes, uint32_t flags)
{
    (void)flags;
    note(opaque, "discard\n");
    (void)bytes;
    return blkfuse_request_forward(request, ((struct device *)opaque)->fd, offset);
}

static int on_write_zeroes(void *opaque, struct blkfuse_request *request, uint64_t offset,
                           uint64_t bytes, uint32_t flags)
{
    note(opaque, "write_zeroes%s\n", flags & BLKFUSE_MAY_UNMAP ? ", may unmap" : "");
    (void)bytes;
    return blkfuse_request_forward(request, ((struct device *)opaque)->fd, offset);
}

static int on_truncate(void *opaque, struct blkfuse_request *request, uint64_t length,
                       uint32_t flags)
{
    (void)request, (void)flags;
    return ftruncate(((struct device *)opaque)->fd, (off_t)length) < 0 ? -errno : 0;
}

static int on_block_status(void *opaque, struct blkfuse_request *request, uint64_t offset,
                           uint64_t bytes, struct blkfuse_extent *extent, uint32_t flags)
{
    (void)opaque, (void)request, (void)bytes, (void)flags;
    /* Everything from 64 KiB on is a hole. */
    extent->flags = offset < 65536 ? 0 : BLKFUSE_EXTENT_HOLE;
    extent->bytes = offset < 65536 ? 65536 - offset : 1 << 30;
    return 0;
}

static int on_queue_start(void *opaque, uint32_t queue, void **queue_ctx)
{
    note(opaque, "queue %u starts\n", queue);
    *queue_ctx = opaque;
    return 0;
}

static void on_queue_stop(void *opaque, uint32_t queue, void *queue_ctx)
{
    note(opaque, "queue %u stops%s\n", queue, queue_ctx == opaque ? "" : " with another");
}

static void on_event(void *opaque, uint32_t event, int error, const char *message)
{
    (void)error, (void)message;
    note(opaque, "event %u\n", event);
}

static void on_deleted(void *opaque)
{
    note(opaque, "deleted\n");
}

static int on_backing_fd(void *opaque)
{
    return ((struct device *)opaque)->fd;
}

static int on_sync(void *opaque)
{
    struct device *device = opaque;

    note(device, "sync\n");
    return device->sync_fails ? -ENOSPC : 0;
}

static void on_close(void *opaque)
{
    struct device *device = opaque;

    if (device->threaded) {
        pthread_mutex_lock(&device->lock);
        device->stopping = true;
        pthread_cond_broadcast(&device->work);
        pthread_mutex_unlock(&device->lock);
        pthread_join(device->thread, NULL);
    }
    note(device, "close\n");
    if (device->fd >= 0)
        close(device->fd);
    if (device->log)
        fclose(device->log);
    free(device);
}

static const struct blkfuse_driver_ops driver = {
    BLKFUSE_DRIVER_OPS_INIT,
    .request_ctx_size = sizeof(struct job),
    .length = on_length,
    .allocated_size = on_allocated_size,
    .limits = on_limits,
    .read = on_read,
    .write = on_write,
    .flush = on_flush,
    .discard = on_discard,
    .write_zeroes = on_write_zeroes,
    .truncate = on_truncate,
    .block_status = on_block_status,
    .queue_start = on_queue_start,
    .queue_stop = on_queue_stop,
    .event = on_event,
    .deleted = on_deleted,
    .backing_fd = on_backing_fd,
};

/* A driver that an export refuses. */
static const struct blkfuse_driver_ops unreadable = {
    BLKFUSE_DRIVER_OPS_INIT,
    .length = on_length,
    .deleted = on_deleted,
};

static int on_open(const struct blkfuse_plugin_setting *settings, uint32_t flags,
                   const struct blkfuse_driver_ops **ops, void **opaque, char *message,
                   size_t message_size)
{
    const char *fault = "", *path = NULL;
    struct device *device = calloc(1, sizeof(*device));

    device->fd = -1;
    pthread_mutex_init(&device->lock, NULL);
    pthread_cond_init(&device->work, NULL);
    device->end = &device->first;
    for (; settings->key; settings++) {
        const char *key = settings->key, *value = settings->value;

        if (strcmp(key, "file") == 0)
            path = value;
        else if (strcmp(key, "log") == 0)
            device->log = fopen(value, "ae");
        else if (strcmp(key, "fault") == 0)
            fault = value;
        else if (strcmp(key, "how") == 0) {
            device->threaded = strcmp(value, "thread") == 0;
            device->forwarding = strcmp(value, "forward") == 0;
        }
    }
    note(device, "open %s\n", flags & BLKFUSE_PLUGIN_WRITABLE ? "writable" : "read-only");
    *ops = strcmp(fault, "no-ops") == 0 ? NULL : strcmp(fault, "no-read") == 0 ? &unreadable : &driver;
    *opaque = device;
    device->sync_fails = strcmp(fault, "sync") == 0;
    if (path)
        device->fd = open(path, (flags & BLKFUSE_PLUGIN_WRITABLE ? O_RDWR : O_RDONLY) | O_CLOEXEC);
    if (device->threaded && pthread_create(&device->thread, NULL, worker, device) != 0)
        abort();

    if (strcmp(fault, "message") == 0) {
        snprintf(message, message_size, "the stars are wrong");
        return -EPROTO;
    }
    if (strcmp(fault, "unterminated") == 0) {
        memset(message, 'x', message_size);
        return -EPROTO;
    }
    if (strcmp(fault, "silent") == 0)
        return -EACCES;
    if (strcmp(fault, "positive") == 0)
        return EACCES;
    return 0;
}

const struct blkfuse_plugin *blkfuse_plugin_get(void)
{
    static const struct blkfuse_plugin_key keys[] = {
        { "file", "the file that is served;\nits bytes are the device's" },
        { "log", "where it is written down what happens" },
        { "how", NULL },
        { "fault", "what is wrong" },
        { NULL, NULL },
    };
    static struct {
        struct blkfuse_plugin plugin;
        void *more;
    } table = {
        { BLKFUSE_PLUGIN_INIT, .name = "test", .help = "Nobody should need this.\n",
          .keys = keys, .open = on_open, .sync = on_sync, .close = on_close },
        NULL,
    };
    const char *fault = getenv("PLUGIN_FAULT");

    if (!fault)
        return &table.plugin;
    if (strcmp(fault, "null") == 0)
        return NULL;
    if (strcmp(fault, "size") == 0)
        table.plugin.struct_size = 8;
    if (strcmp(fault, "large") == 0)
        table.plugin.struct_size = 1 << 20;
    if (strcmp(fault, "version") == 0)
        table.plugin.api_version = BLKFUSE_PLUGIN_API_VERSION + 1;
    if (strcmp(fault, "no version") == 0)
        table.plugin.api_version = 0;
    if (strcmp(fault, "later") == 0 || strcmp(fault, "newer") == 0)
        table.plugin.struct_size = sizeof(table);
    if (strcmp(fault, "newer") == 0)
        table.more = &table;
    if (strcmp(fault, "name") == 0)
        table.plugin.name = NULL;
    if (strcmp(fault, "open") == 0)
        table.plugin.open = NULL;
    if (strcmp(fault, "request_complete") == 0)
        table.plugin.request_complete = NULL;
    if (strcmp(fault, "older") == 0)
        table.plugin.struct_size = offsetof(struct blkfuse_plugin, sync);
    return &table.plugin;
}
