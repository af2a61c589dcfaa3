/*
 * null.c - a host whose device does nothing, to measure what the C API costs,
 * and each of the ways to answer a request.
 *
 *   cc -O2 null.c -o null $(pkg-config --cflags --libs blkfuse) -pthread
 *   touch disk && ./null MODE disk [KEY=VALUE]...       (SIGTERM ends it)
 *
 * MODE is
 *   sync     the callback answers
 *   batch    the queue's thread answers, at the end of its batch
 *   worker   another thread answers
 *   host     as sync, in a thread of this program's for each queue, with epoll
 *
 * benches/compare.sh --hosts compares them.
 */
#define _GNU_SOURCE

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>

#include <blkfuse.h>

#define MAX_QUEUES 256

struct job {
    struct job *next;
    struct blkfuse_request *request;
};

/* One queue's requests that wait for their answer. */
static struct batch {
    struct job *jobs;
} batches[MAX_QUEUES];

static struct {
    pthread_mutex_t lock;
    pthread_cond_t work;
    struct job *jobs;
    bool stopping;
} worker = { PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, NULL, false };

static int64_t null_length(void *opaque)
{
    (void)opaque;
    return INT64_C(8) << 30;
}

static int null_sync(void *opaque, struct blkfuse_request *request, void *buffer, uint64_t offset,
                     uint64_t bytes, uint32_t flags)
{
    (void)opaque, (void)request, (void)buffer, (void)offset, (void)bytes, (void)flags;
    return 0;
}

static int null_later(void *opaque, struct blkfuse_request *request, void *buffer, uint64_t offset,
                      uint64_t bytes, uint32_t flags)
{
    struct batch *batch = (struct batch *)blkfuse_request_queue_ctx(request);
    struct job *job = (struct job *)blkfuse_request_ctx(request);

    (void)opaque, (void)buffer, (void)offset, (void)bytes, (void)flags;
    job->request = request;
    job->next = batch->jobs;
    batch->jobs = job;
    return BLKFUSE_PENDING;
}

static int null_sync_write(void *opaque, struct blkfuse_request *request, const void *buffer,
                           uint64_t offset, uint64_t bytes, uint32_t flags)
{
    return null_sync(opaque, request, (void *)buffer, offset, bytes, flags);
}

static int null_later_write(void *opaque, struct blkfuse_request *request, const void *buffer,
                            uint64_t offset, uint64_t bytes, uint32_t flags)
{
    return null_later(opaque, request, (void *)buffer, offset, bytes, flags);
}

static int queue_start(void *opaque, uint32_t queue, void **queue_ctx)
{
    (void)opaque;
    *queue_ctx = &batches[queue];
    return 0;
}

static void answer(struct job *job)
{
    while (job) {
        struct job *next = job->next;

        blkfuse_request_complete(job->request, 0);
        job = next;
    }
}

static void answer_batch(void *opaque, uint32_t queue, void *queue_ctx)
{
    struct batch *batch = (struct batch *)queue_ctx;
    struct job *jobs = batch->jobs;

    (void)opaque, (void)queue;
    batch->jobs = NULL;
    answer(jobs);
}

static void pass_batch_on(void *opaque, uint32_t queue, void *queue_ctx)
{
    struct batch *batch = (struct batch *)queue_ctx;
    struct job *last = batch->jobs;

    (void)opaque, (void)queue;
    if (!last)
        return;
    while (last->next)
        last = last->next;
    pthread_mutex_lock(&worker.lock);
    last->next = worker.jobs;
    worker.jobs = batch->jobs;
    pthread_cond_signal(&worker.work);
    pthread_mutex_unlock(&worker.lock);
    batch->jobs = NULL;
}

static void *work(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&worker.lock);
    while (!worker.stopping) {
        struct job *jobs = worker.jobs;

        if (!jobs) {
            pthread_cond_wait(&worker.work, &worker.lock);
            continue;
        }
        worker.jobs = NULL;
        pthread_mutex_unlock(&worker.lock);
        answer(jobs);
        pthread_mutex_lock(&worker.lock);
    }
    pthread_mutex_unlock(&worker.lock);
    return NULL;
}

static int64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* An event loop that waits awake for a moment, if that was of use lately. */
static void *loop(void *queue_)
{
    struct blkfuse_queue *queue = (struct blkfuse_queue *)queue_;
    struct epoll_event event = { .events = EPOLLIN };
    int epoll = epoll_create1(EPOLL_CLOEXEC), more = 1;
    int64_t patience = 0;

    if (blkfuse_queue_attach(queue) < 0 ||
        epoll_ctl(epoll, EPOLL_CTL_ADD, blkfuse_queue_get_fd(queue), &event) < 0) {
        fprintf(stderr, "null: %s\n", blkfuse_error_message());
        exit(1);
    }
    while (more >= 0) {
        int64_t start = now_ns(), now = start, last;
        int has = 0;

        while (patience > 0 && !has) {
            has = blkfuse_queue_has_events(queue);
            if (!has)
                sched_yield();
            last = now;
            now = now_ns();
            if (now - start > patience || now - last > 30000)
                break;
        }
        if (!has) {
            epoll_wait(epoll, &event, 1, -1);
            patience = now_ns() - now < 100000 ? 50000 : patience / 2;
        }
        do
            more = blkfuse_queue_dispatch(queue, 0);
        while (more > 0);
    }
    return NULL;
}

static int set(struct blkfuse_export *export_, char *setting)
{
    char *value = strchr(setting, '=');

    if (value)
        *value++ = '\0';
    return blkfuse_export_set_str(export_, setting, value ? value : "on");
}

int main(int argc, char **argv)
{
    struct blkfuse_driver_ops ops;
    struct blkfuse_export *export_ = NULL;
    pthread_t thread, loops[MAX_QUEUES];
    uint64_t queues = 0, i;
    sigset_t signals;
    int number, failed;

    if (argc < 3) {
        fprintf(stderr, "usage: null sync|batch|worker|host FILE [KEY=VALUE]...\n");
        return 2;
    }
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    pthread_sigmask(SIG_BLOCK, &signals, NULL);

    blkfuse_driver_ops_init(&ops);
    ops.request_ctx_size = sizeof(struct job);
    ops.length = null_length;
    ops.queue_start = queue_start;
    ops.read = null_later;
    ops.write = null_later_write;
    if (strcmp(argv[1], "batch") == 0) {
        ops.batch_end = answer_batch;
    } else if (strcmp(argv[1], "worker") == 0) {
        ops.batch_end = pass_batch_on;
    } else {
        ops.read = null_sync;
        ops.write = null_sync_write;
    }
    failed = blkfuse_export_create(&export_, &ops, NULL) < 0 ||
             blkfuse_export_set_str(export_, "mountpoint", argv[2]) < 0 ||
             blkfuse_export_set_bool(export_, "writable", true) < 0 ||
             (strcmp(argv[1], "host") == 0 &&
              blkfuse_export_set_str(export_, "threads", "host") < 0);
    for (number = 3; number < argc && !failed; number++)
        failed = set(export_, argv[number]) < 0;
    if (failed || pthread_create(&thread, NULL, work, NULL) != 0 ||
        blkfuse_export_start(export_) < 0) {
        fprintf(stderr, "null: %s\n", blkfuse_error_message());
        return 1;
    }
    if (strcmp(argv[1], "host") == 0) {
        blkfuse_export_get_u64(export_, "queues", &queues);
        for (i = 0; i < queues; i++) {
            if (pthread_create(&loops[i], NULL, loop,
                               blkfuse_export_get_queue(export_, (uint32_t)i)) != 0)
                return 1;
        }
    }
    sigwait(&signals, &number);
    blkfuse_export_delete_wait(&export_, -1);
    for (i = 0; i < queues; i++)
        pthread_join(loops[i], NULL);
    pthread_mutex_lock(&worker.lock);
    worker.stopping = true;
    pthread_cond_signal(&worker.work);
    pthread_mutex_unlock(&worker.lock);
    pthread_join(thread, NULL);
    return 0;
}
