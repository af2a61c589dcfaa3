/*
 * async.c - a host that completes later: the callbacks only queue their
 * requests, and a pool of threads does the work and completes them.
 *
 *   cc async.c -o async $(pkg-config --cflags --libs blkfuse) -pthread
 *   touch disk && ./async disk [QUEUES [KEY=VALUE]...]
 *
 * KEY=VALUE sets a property of the export; blkfuse.h lists them.
 * SIGUSR1 drains the export for a moment, as a program would to take a
 * snapshot; SIGINT and SIGTERM end it.
 */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include <blkfuse.h>

#define DISK_SIZE (64 << 20)
#define BLOCK_SIZE (64 << 10)
#define BLOCKS (DISK_SIZE / BLOCK_SIZE)
#define WORKERS 4

/* ---- The device: memory, and a map of the blocks that are in use ---- */

static char data[DISK_SIZE];
static bool in_use[BLOCKS];
static pthread_mutex_t map_lock = PTHREAD_MUTEX_INITIALIZER;

static int disk_write(const void *buffer, uint64_t offset, uint64_t bytes)
{
    uint64_t block;

    memcpy(data + offset, buffer, bytes);
    /* Afterwards, so that no punch_hole() that runs now forgets the block. */
    pthread_mutex_lock(&map_lock);
    for (block = offset / BLOCK_SIZE; block * BLOCK_SIZE < offset + bytes; block++)
        in_use[block] = true;
    pthread_mutex_unlock(&map_lock);
    return 0;
}

static int disk_zero(uint64_t offset, uint64_t bytes, bool may_unmap)
{
    uint64_t end = offset + bytes, block;

    pthread_mutex_lock(&map_lock);
    memset(data + offset, 0, bytes);
    for (block = offset / BLOCK_SIZE; block * BLOCK_SIZE < end; block++) {
        if (!may_unmap)
            in_use[block] = true;
        else if (block * BLOCK_SIZE >= offset && (block + 1) * BLOCK_SIZE <= end)
            in_use[block] = false;
    }
    pthread_mutex_unlock(&map_lock);
    return 0;
}

static int disk_status(uint64_t offset, struct blkfuse_extent *extent)
{
    uint64_t first = offset / BLOCK_SIZE, last = first;

    pthread_mutex_lock(&map_lock);
    while (last + 1 < BLOCKS && in_use[last + 1] == in_use[first])
        last++;
    extent->flags = in_use[first] ? 0 : BLKFUSE_EXTENT_HOLE;
    pthread_mutex_unlock(&map_lock);
    extent->bytes = (last + 1) * BLOCK_SIZE - offset;
    return 0;
}

/* ---- The pool: requests wait in a list until a worker takes them ---- */

enum kind { READ, WRITE, FLUSH, ZERO, DISCARD, STATUS };

/* It lives in the request's own room: nothing is allocated for an I/O. */
struct job {
    struct job *next;
    struct blkfuse_request *request;
    enum kind kind;
    bool may_unmap;
    uint64_t offset;
    uint64_t bytes;
    void *buffer;
    const void *data;
    struct blkfuse_extent *extent;
};

static struct {
    pthread_mutex_t lock;
    pthread_cond_t work;
    struct job *first, **end;
    bool stopping;
} pool = { PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, NULL, &pool.first, false };

static struct job *job_of(struct blkfuse_request *request, enum kind kind, uint64_t offset,
                          uint64_t bytes)
{
    struct job *job = (struct job *)blkfuse_request_ctx(request);

    memset(job, 0, sizeof(*job));
    job->request = request;
    job->kind = kind;
    job->offset = offset;
    job->bytes = bytes;
    return job;
}

static int submit(struct job *job)
{
    pthread_mutex_lock(&pool.lock);
    *pool.end = job;
    pool.end = &job->next;
    pthread_cond_signal(&pool.work);
    pthread_mutex_unlock(&pool.lock);
    return BLKFUSE_PENDING;
}

static int perform(const struct job *job)
{
    switch (job->kind) {
    case READ:
        memcpy(job->buffer, data + job->offset, job->bytes);
        return 0;
    case WRITE:
        return disk_write(job->data, job->offset, job->bytes);
    case FLUSH:
        return 0; /* a disk of memory has nothing to make durable */
    case ZERO:
    case DISCARD:
        return disk_zero(job->offset, job->bytes, job->may_unmap);
    case STATUS:
        return disk_status(job->offset, job->extent);
    }
    return -EINVAL;
}

static void *worker(void *arg)
{
    (void)arg;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        struct job *job = pool.first;

        if (job) {
            pool.first = job->next;
            if (!pool.first)
                pool.end = &pool.first;
            pthread_mutex_unlock(&pool.lock);
            /* Completing takes the job away, since it lives in the request. */
            blkfuse_request_complete(job->request, perform(job));
            pthread_mutex_lock(&pool.lock);
        } else if (pool.stopping) {
            break;
        } else {
            pthread_cond_wait(&pool.work, &pool.lock);
        }
    }
    pthread_mutex_unlock(&pool.lock);
    return NULL;
}

/* ---- The driver: turns callbacks into jobs ---- */

static int64_t driver_length(void *opaque)
{
    (void)opaque;
    return DISK_SIZE;
}

static int driver_read(void *opaque, struct blkfuse_request *request, void *buffer,
                       uint64_t offset, uint64_t bytes, uint32_t flags)
{
    struct job *job = job_of(request, READ, offset, bytes);

    (void)opaque;
    if (flags)
        return -ENOTSUP;
    job->buffer = buffer;
    return submit(job);
}

static int driver_write(void *opaque, struct blkfuse_request *request, const void *buffer,
                        uint64_t offset, uint64_t bytes, uint32_t flags)
{
    struct job *job = job_of(request, WRITE, offset, bytes);

    (void)opaque;
    if (flags)
        return -ENOTSUP;
    job->data = buffer;
    return submit(job);
}

static int driver_flush(void *opaque, struct blkfuse_request *request, uint32_t flags)
{
    (void)opaque;
    return flags ? -ENOTSUP : submit(job_of(request, FLUSH, 0, 0));
}

static int driver_discard(void *opaque, struct blkfuse_request *request, uint64_t offset,
                          uint64_t bytes, uint32_t flags)
{
    struct job *job = job_of(request, DISCARD, offset, bytes);

    (void)opaque;
    if (flags)
        return -ENOTSUP;
    job->may_unmap = true;
    return submit(job);
}

static int driver_write_zeroes(void *opaque, struct blkfuse_request *request, uint64_t offset,
                               uint64_t bytes, uint32_t flags)
{
    struct job *job = job_of(request, ZERO, offset, bytes);

    (void)opaque;
    if (flags & ~(uint32_t)BLKFUSE_MAY_UNMAP)
        return -ENOTSUP;
    job->may_unmap = (flags & BLKFUSE_MAY_UNMAP) != 0;
    return submit(job);
}

static int driver_block_status(void *opaque, struct blkfuse_request *request, uint64_t offset,
                               uint64_t bytes, struct blkfuse_extent *extent, uint32_t flags)
{
    struct job *job = job_of(request, STATUS, offset, bytes);

    (void)opaque;
    if (flags)
        return -ENOTSUP;
    job->extent = extent;
    return submit(job);
}

/* ---- What the library tells, and the main thread waits for ---- */

static struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    pthread_t main_thread;
    bool deleted;
    bool failed;
} host = { PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, false, false };

static void driver_idle(void *opaque)
{
    (void)opaque;
    pthread_mutex_lock(&host.lock);
    pthread_cond_broadcast(&host.changed);
    pthread_mutex_unlock(&host.lock);
}

static void driver_event(void *opaque, uint32_t event, int error, const char *message)
{
    (void)opaque;
    if (event == BLKFUSE_EVENT_STARTED)
        return;
    if (event == BLKFUSE_EVENT_HALTED) {
        fprintf(stderr, "async: %s (%s)\n", message, strerror(-error));
        pthread_mutex_lock(&host.lock);
        host.failed = true;
        pthread_mutex_unlock(&host.lock);
    }
    /* It is over. A callback cannot delete the export; the main thread can. */
    pthread_kill(host.main_thread, SIGTERM);
}

static void driver_deleted(void *opaque)
{
    (void)opaque;
    pthread_mutex_lock(&host.lock);
    host.deleted = true;
    pthread_cond_broadcast(&host.changed);
    pthread_mutex_unlock(&host.lock);
}

/* While drained nothing reads or writes the disk, and clients wait. */
static void pause_io(struct blkfuse_export *disk)
{
    struct blkfuse_stats stats;

    if (blkfuse_export_drain_begin(disk) < 0)
        return;
    pthread_mutex_lock(&host.lock);
    while (blkfuse_export_drain_poll(disk) > 0)
        pthread_cond_wait(&host.changed, &host.lock); /* for driver_idle() */
    pthread_mutex_unlock(&host.lock);

    if (blkfuse_export_get_stats(disk, &stats, sizeof(stats)) == 0)
        printf("drained after %" PRIu64 " reads and %" PRIu64 " writes\n",
               stats.read.operations, stats.write.operations);
    fflush(stdout);
    blkfuse_export_drain_end(disk);
}

/* Sets the property that a "KEY=VALUE" names. */
static int set_property(struct blkfuse_export *disk, char *setting)
{
    char *value = strchr(setting, '=');

    if (!value)
        return blkfuse_export_set_str(disk, setting, "");
    *value = '\0';
    return blkfuse_export_set_str(disk, setting, value + 1);
}

static int configure(struct blkfuse_export *disk, int argc, char **argv)
{
    int i;

    if (blkfuse_export_set_str(disk, "mountpoint", argv[1]) < 0 ||
        blkfuse_export_set_str(disk, "queues", argc > 2 ? argv[2] : "0") < 0 ||
        blkfuse_export_set_bool(disk, "writable", true) < 0)
        return -1;
    for (i = 3; i < argc; i++) {
        if (set_property(disk, argv[i]) < 0)
            return -1;
    }
    return 0;
}

int main(int argc, char **argv)
{
    struct blkfuse_driver_ops ops;
    struct blkfuse_export *disk = NULL;
    pthread_t workers[WORKERS];
    sigset_t signals;
    int i, number = 0, started, status = 1;

    if (argc < 2) {
        fprintf(stderr, "usage: async FILE [QUEUES [KEY=VALUE]...]\n");
        return 2;
    }
    /* Before there are threads, so that all of them block these signals. */
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &signals, NULL);
    host.main_thread = pthread_self();

    for (started = 0; started < WORKERS; started++) {
        if (pthread_create(&workers[started], NULL, worker, NULL) != 0) {
            fprintf(stderr, "async: cannot start a thread\n");
            goto stop_workers;
        }
    }

    blkfuse_driver_ops_init(&ops);
    ops.request_ctx_size = sizeof(struct job);
    ops.length = driver_length;
    ops.read = driver_read;
    ops.write = driver_write;
    ops.flush = driver_flush;
    ops.discard = driver_discard;
    ops.write_zeroes = driver_write_zeroes;
    ops.block_status = driver_block_status;
    ops.idle = driver_idle;
    ops.event = driver_event;
    ops.deleted = driver_deleted;
    if (blkfuse_export_create(&disk, &ops, NULL) < 0) {
        fprintf(stderr, "async: %s\n", blkfuse_error_message());
        goto stop_workers;
    }
    if (configure(disk, argc, argv) < 0 || blkfuse_export_start(disk) < 0) {
        fprintf(stderr, "async: %s\n", blkfuse_error_message());
    } else {
        printf("%s is a disk of 64 MiB until this ends\n", argv[1]);
        fflush(stdout);
        status = 0;
        while (sigwait(&signals, &number) == 0 && number == SIGUSR1)
            pause_io(disk);
    }

    /* The export goes when the last request is completed, so the workers must
       outlive it. (blkfuse_export_delete_wait() would do the waiting, too.) */
    blkfuse_export_delete(&disk);
    pthread_mutex_lock(&host.lock);
    while (!host.deleted)
        pthread_cond_wait(&host.changed, &host.lock);
    if (host.failed)
        status = 1;
    pthread_mutex_unlock(&host.lock);

stop_workers:
    pthread_mutex_lock(&pool.lock);
    pool.stopping = true;
    pthread_cond_broadcast(&pool.work);
    pthread_mutex_unlock(&pool.lock);
    for (i = 0; i < started; i++)
        pthread_join(workers[i], NULL);
    return status;
}
