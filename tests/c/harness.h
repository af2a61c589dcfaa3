/*
 * harness.h - what the C tests share: checks, a watchdog that leaves nothing
 * mounted, and a device in memory.
 *
 * A test is called as TEST MOUNTPOINT QUEUES. If BLKFUSE_TEST_THREADS is "host",
 * the queues of what start() starts are run by threads of the test's own.
 */
#ifndef HARNESS_H
#define HARNESS_H

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <blkfuse.h>

/* Some tests use a part of it. */
#define MAYBE_UNUSED __attribute__((unused))

#define SIZE (1 << 20)

static const char *mountpoint;
static const char *queues;

/* ---- Failing ---- */

static void unmount_all(void)
{
    int i;

    for (i = 0; i < 16 && umount2(mountpoint, MNT_FORCE | MNT_DETACH) == 0; i++)
        ;
}

static void die(const char *file, int line, const char *what)
{
    fprintf(stderr, "%s:%d: %s\n  errno: %s\n  blkfuse: %s\n", file, line, what, strerror(errno),
            blkfuse_error_message());
    unmount_all();
    _exit(1);
}

#define CHECK(condition) ((condition) ? (void)0 : die(__FILE__, __LINE__, #condition))

/* A call that must fail with `number`, and say why. */
#define REFUSED(call, number)                                                             \
    do {                                                                                  \
        int refused_;                                                                     \
        mark_message();                                                                   \
        refused_ = (call);                                                                \
        if (refused_ != -(number)) {                                                      \
            fprintf(stderr, "got %d: %s\n", refused_, strerror(refused_ < 0 ? -refused_ : 0)); \
            die(__FILE__, __LINE__, #call " == -" #number);                               \
        }                                                                                 \
        CHECK(message_is_new());                                                          \
    } while (0)

static void ignore_log(void *opaque, uint32_t level, const char *message)
{
    (void)opaque, (void)level, (void)message;
}

/* Makes this thread's message a known one. */
MAYBE_UNUSED static void mark_message(void)
{
    CHECK(blkfuse_set_log_callback(99, ignore_log, NULL) == -EINVAL);
}

MAYBE_UNUSED static bool message_is_new(void)
{
    const char *message = blkfuse_error_message();

    return message[0] != '\0' && strcmp(message, "no such log level") != 0;
}

static void *watch(void *arg)
{
    struct timespec patience = { 30, 0 };

    (void)arg;
    nanosleep(&patience, NULL);
    fprintf(stderr, "WATCHDOG: aborting %s\n", mountpoint);
    unmount_all();
    _exit(3);
}

MAYBE_UNUSED static void begin(int argc, char **argv)
{
    pthread_t thread;

    CHECK(argc == 3);
    mountpoint = argv[1];
    queues = argv[2];
    CHECK(pthread_create(&thread, NULL, watch, NULL) == 0);
    CHECK(pthread_detach(thread) == 0);
}

/* ---- Something to wait for ---- */

struct flag {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int value;
};

#define FLAG { PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0 }

MAYBE_UNUSED static void flag_add(struct flag *flag)
{
    pthread_mutex_lock(&flag->lock);
    flag->value++;
    pthread_cond_broadcast(&flag->changed);
    pthread_mutex_unlock(&flag->lock);
}

/* Waits until it is at least `value`; the watchdog ends a wait in vain. */
MAYBE_UNUSED static void flag_wait(struct flag *flag, int value)
{
    pthread_mutex_lock(&flag->lock);
    while (flag->value < value)
        pthread_cond_wait(&flag->changed, &flag->lock);
    pthread_mutex_unlock(&flag->lock);
}

MAYBE_UNUSED static int flag_get(struct flag *flag)
{
    int value;

    pthread_mutex_lock(&flag->lock);
    value = flag->value;
    pthread_mutex_unlock(&flag->lock);
    return value;
}

/* ---- A device in memory ---- */

static char content[SIZE];
static struct flag deleted = FLAG;

MAYBE_UNUSED static int64_t memory_length(void *opaque)
{
    (void)opaque;
    return SIZE;
}

MAYBE_UNUSED static int memory_read(void *opaque, struct blkfuse_request *request, void *buffer,
                                    uint64_t offset, uint64_t bytes, uint32_t flags)
{
    (void)opaque, (void)request;
    CHECK(flags == 0 && offset <= SIZE && bytes <= SIZE - offset);
    memcpy(buffer, content + offset, bytes);
    return 0;
}

MAYBE_UNUSED static int memory_write(void *opaque, struct blkfuse_request *request,
                                     const void *buffer, uint64_t offset, uint64_t bytes,
                                     uint32_t flags)
{
    (void)opaque, (void)request;
    CHECK(flags == 0 && offset <= SIZE && bytes <= SIZE - offset);
    memcpy(content + offset, buffer, bytes);
    return 0;
}

MAYBE_UNUSED static void memory_deleted(void *opaque)
{
    (void)opaque;
    flag_add(&deleted);
}

MAYBE_UNUSED static struct blkfuse_driver_ops memory_ops(void)
{
    struct blkfuse_driver_ops ops;

    blkfuse_driver_ops_init(&ops);
    ops.length = memory_length;
    ops.read = memory_read;
    ops.write = memory_write;
    ops.deleted = memory_deleted;
    return ops;
}

/* An export that is ready to be started. */
MAYBE_UNUSED static struct blkfuse_export *created(const struct blkfuse_driver_ops *ops,
                                                   void *opaque)
{
    struct blkfuse_export *export_ = NULL;

    CHECK(blkfuse_export_create(&export_, ops, opaque) == 0);
    CHECK(blkfuse_export_set_str(export_, "mountpoint", mountpoint) == 0);
    CHECK(blkfuse_export_set_str(export_, "queues", queues) == 0);
    CHECK(blkfuse_export_set_bool(export_, "writable", true) == 0);
    return export_;
}

/* ---- Threads for its queues, if they are to be ours ---- */

static int loops_begun;
static struct flag loops_ended = FLAG;

static void *loop_main(void *queue_)
{
    struct blkfuse_queue *queue = (struct blkfuse_queue *)queue_;
    struct pollfd fd = { blkfuse_queue_get_fd(queue), POLLIN, 0 };
    int result = blkfuse_queue_attach(queue);

    /* The export may have ended before the thread came. */
    CHECK(result == 0 || result == -ESHUTDOWN);
    while (result != -ESHUTDOWN) {
        result = blkfuse_queue_dispatch(queue, 0);
        CHECK(result == 0 || result == 1 || result == -ESHUTDOWN);
        if (result == 0)
            CHECK(poll(&fd, 1, -1) >= 0 || errno == EINTR);
    }
    flag_add(&loops_ended);
    return NULL;
}

/* As blkfuse_export_start(). */
MAYBE_UNUSED static int start(struct blkfuse_export *export_)
{
    const char *whose = getenv("BLKFUSE_TEST_THREADS");
    bool hosts = whose != NULL && strcmp(whose, "host") == 0;
    uint64_t count = 0, i;
    int result;

    if (hosts)
        CHECK(blkfuse_export_set_str(export_, "threads", "host") == 0);
    result = blkfuse_export_start(export_);
    if (!hosts || result < 0)
        return result;
    CHECK(blkfuse_export_get_u64(export_, "queues", &count) == 0);
    for (i = 0; i < count; i++) {
        struct blkfuse_queue *queue = blkfuse_export_get_queue(export_, (uint32_t)i);
        pthread_t thread;

        CHECK(queue != NULL);
        CHECK(pthread_create(&thread, NULL, loop_main, queue) == 0);
        CHECK(pthread_detach(thread) == 0);
        loops_begun++;
    }
    return 0;
}

MAYBE_UNUSED static struct blkfuse_export *started(const struct blkfuse_driver_ops *ops,
                                                   void *opaque)
{
    struct blkfuse_export *export_ = created(ops, opaque);

    CHECK(start(export_) == 0);
    return export_;
}

MAYBE_UNUSED static bool is_mounted(void)
{
    char line[4096], path[1024];
    bool found = false;
    FILE *table = fopen("/proc/self/mountinfo", "r");

    CHECK(table != NULL);
    while (fgets(line, sizeof(line), table))
        if (sscanf(line, "%*s %*s %*s %*s %1023s", path) == 1 && strcmp(path, mountpoint) == 0)
            found = true;
    fclose(table);
    return found;
}

/* Deletes an export whose requests are all answered, and checks its end. */
MAYBE_UNUSED static void finished(struct blkfuse_export *export_)
{
    int before = flag_get(&deleted);

    CHECK(blkfuse_export_delete_wait(&export_, 10000) == 0);
    CHECK(export_ == NULL);
    flag_wait(&loops_ended, loops_begun);
    CHECK(flag_get(&deleted) == before + 1);
    CHECK(!is_mounted());
}

/* ---- A client in a thread of its own ---- */

struct client {
    pthread_t thread;
    int fd;
    bool writes;
    off_t offset;
    char buffer[4096];
    ssize_t result;
    int error;
};

static void *client_main(void *arg)
{
    struct client *client = (struct client *)arg;

    errno = 0;
    client->result = client->writes
                         ? pwrite(client->fd, client->buffer, sizeof(client->buffer), client->offset)
                         : pread(client->fd, client->buffer, sizeof(client->buffer), client->offset);
    client->error = errno;
    return NULL;
}

MAYBE_UNUSED static void client_start(struct client *client, int fd, bool writes, off_t offset)
{
    client->fd = fd;
    client->writes = writes;
    client->offset = offset;
    CHECK(pthread_create(&client->thread, NULL, client_main, client) == 0);
}

/* Waits for its answer. */
MAYBE_UNUSED static void client_join(struct client *client)
{
    CHECK(pthread_join(client->thread, NULL) == 0);
}

MAYBE_UNUSED static int open_file(int flags)
{
    int fd = open(mountpoint, flags | O_CLOEXEC);

    CHECK(fd >= 0);
    return fd;
}

#endif
