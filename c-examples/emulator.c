/*
 * emulator.c - a host with a life of its own, as an emulator is: a main loop,
 * and I/O threads with event loops of theirs, which run the export's queues.
 *
 *   cc emulator.c -o emulator $(pkg-config --cflags --libs blkfuse) -pthread
 *   touch disk && ./emulator base.img disk [THREADS [KEY=VALUE]...]
 *
 * The disk shows base.img, which is never written: what clients write goes to a
 * layer of its own, an unnamed sparse file in the current directory that is gone
 * in the end. The main loop reads commands, a line each:
 *
 *   snapshot      freezes the top layer; what is written from then on goes to a
 *                 new one
 *   revert        throws the top layer away: the disk is again as it was at the
 *                 last snapshot
 *   move          moves every queue to the next I/O thread
 *   resize BYTES  makes the disk longer
 *   stats         says what clients have done, and which threads did it
 *   quit          ends; so do the end of the input, SIGINT and SIGTERM
 *
 * Each but the last is answered by a line that begins with "ok" or "failed". The
 * status is 0 after quit and what is like it, and if somebody else unmounts the
 * disk; 1 after a failure, 2 if the command line is wrong. Whatever KEY=VALUE
 * says is set as a property of the export, so "io-uring=off" or "queues=4".
 *
 * How to read it: from top to bottom, a block node that knows nothing of loops;
 * the I/O threads, which know nothing of it; the driver between the two; and
 * the main loop with what it does to a disk that is in use.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <blkfuse.h>

#define CLUSTER 65536
#define MAX_LENGTH (UINT64_C(1) << 40)
#define MAX_LAYERS 64
#define MAX_THREADS 16
#define MAX_QUEUES 16
#define WORKERS 2

/* ---- The block node: layers of files, copied on write ---- */

/* A file, and the clusters for which it is the one to look into. */
struct layer {
    int fd;
    _Atomic uint8_t *has; /* for each cluster; NULL: all that no layer above has */
};

static struct {
    /* The first is the base. Changed only in a drain, when nobody reads it. */
    struct layer layers[MAX_LAYERS];
    int count;
    _Atomic uint64_t length;
    /* One writer at a time fills a cluster for the first time. */
    pthread_mutex_t filling;
} node = { .filling = PTHREAD_MUTEX_INITIALIZER };

static int top_layer(void)
{
    return node.count - 1;
}

/* The layer that has the cluster. */
static int layer_of(uint64_t cluster)
{
    int i = top_layer();

    while (i > 0 && !node.layers[i].has[cluster])
        i--;
    return i;
}

/* The layer that has all of the range, or -1 if it is in several. */
static int layer_of_range(uint64_t offset, uint64_t bytes)
{
    uint64_t cluster = offset / CLUSTER;
    int layer = layer_of(cluster);

    while (++cluster * CLUSTER < offset + bytes) {
        if (layer_of(cluster) != layer)
            return -1;
    }
    return layer;
}

/* An empty one, to be put on top. */
static int make_layer(struct layer *layer)
{
    int error;

    layer->fd = open(".", O_RDWR | O_TMPFILE | O_CLOEXEC, 0600);
    if (layer->fd < 0)
        return -errno;
    layer->has = (_Atomic uint8_t *)calloc(MAX_LENGTH / CLUSTER, 1);
    if (layer->has)
        return 0;
    error = -errno;
    close(layer->fd);
    return error;
}

static void free_layer(struct layer *layer)
{
    close(layer->fd);
    free((void *)layer->has);
}

/* Reads all of it; beyond a file's end there are zeroes. */
static int read_file(int fd, char *buffer, uint64_t bytes, uint64_t offset)
{
    while (bytes > 0) {
        ssize_t n = pread(fd, buffer, bytes, (off_t)offset);

        if (n < 0 && errno != EINTR)
            return -errno;
        if (n == 0) {
            memset(buffer, 0, bytes);
            return 0;
        }
        if (n > 0) {
            buffer += n;
            offset += (uint64_t)n;
            bytes -= (uint64_t)n;
        }
    }
    return 0;
}

static int write_file(int fd, const char *buffer, uint64_t bytes, uint64_t offset)
{
    while (bytes > 0) {
        ssize_t n = pwrite(fd, buffer, bytes, (off_t)offset);

        if (n < 0 && errno != EINTR)
            return -errno;
        if (n > 0) {
            buffer += n;
            offset += (uint64_t)n;
            bytes -= (uint64_t)n;
        }
    }
    return 0;
}

/* How much of the range is in its first cluster. */
static uint64_t in_cluster(uint64_t offset, uint64_t bytes)
{
    uint64_t rest = CLUSTER - offset % CLUSTER;

    return bytes < rest ? bytes : rest;
}

/* Blocks: for a worker. */
static int node_read(char *buffer, uint64_t offset, uint64_t bytes)
{
    while (bytes > 0) {
        uint64_t piece = in_cluster(offset, bytes);
        int fd = node.layers[layer_of(offset / CLUSTER)].fd;
        int error = read_file(fd, buffer, piece, offset);

        if (error < 0)
            return error;
        buffer += piece;
        offset += piece;
        bytes -= piece;
    }
    return 0;
}

/* Gives the top layer a cluster that it does not have, with the new bytes in it.
   Whoever reads the cluster meanwhile finds it where it was. */
static int fill_cluster(const char *data, uint64_t offset, uint64_t bytes)
{
    static char cluster[CLUSTER];
    struct layer *top = &node.layers[top_layer()];
    uint64_t number = offset / CLUSTER;
    int error = 0;

    pthread_mutex_lock(&node.filling);
    if (top->has[number]) { /* somebody was faster */
        error = write_file(top->fd, data, bytes, offset);
    } else {
        error = node_read(cluster, number * CLUSTER, CLUSTER);
        memcpy(cluster + offset % CLUSTER, data, bytes);
        if (error == 0)
            error = write_file(top->fd, cluster, CLUSTER, number * CLUSTER);
        if (error == 0)
            top->has[number] = 1;
    }
    pthread_mutex_unlock(&node.filling);
    return error;
}

/* Blocks: for a worker. */
static int node_write(const char *data, uint64_t offset, uint64_t bytes)
{
    while (bytes > 0) {
        struct layer *top = &node.layers[top_layer()];
        uint64_t piece = in_cluster(offset, bytes);
        int error = top->has[offset / CLUSTER] ? write_file(top->fd, data, piece, offset)
                                               : fill_cluster(data, offset, piece);

        if (error < 0)
            return error;
        data += piece;
        offset += piece;
        bytes -= piece;
    }
    return 0;
}

/* ---- I/O threads: an event loop each, and what it is asked to do ---- */

struct call {
    int (*function)(void *);
    void *argument;
    int result;
    bool done;
};

struct io_thread {
    pthread_t thread;
    int epoll;
    int wake; /* an eventfd */
    pthread_mutex_t lock;
    pthread_cond_t finished;
    struct call *call; /* one at a time: only the main loop asks */
    _Atomic bool stopping;
    /* The queues that it runs; only the thread itself looks at them. */
    struct blkfuse_queue *queues[MAX_QUEUES];
    int queue_count;
    _Atomic uint64_t requests; /* that it has begun */
};

static struct io_thread threads[MAX_THREADS];
static int thread_count;
static _Thread_local struct io_thread *this_thread;
/* Whether blkfuse_queue_has_events() sees what comes. */
static _Atomic bool can_look;

static int add_queue(struct blkfuse_queue *queue)
{
    struct epoll_event event = { .events = EPOLLIN, .data.ptr = queue };

    if (epoll_ctl(this_thread->epoll, EPOLL_CTL_ADD, blkfuse_queue_get_fd(queue), &event) < 0)
        return -errno;
    this_thread->queues[this_thread->queue_count++] = queue;
    return 0;
}

static bool has_queue(struct blkfuse_queue *queue)
{
    int i;

    for (i = 0; i < this_thread->queue_count; i++) {
        if (this_thread->queues[i] == queue)
            return true;
    }
    return false;
}

static void remove_queue(struct blkfuse_queue *queue)
{
    int i = 0;

    while (this_thread->queues[i] != queue)
        i++;
    this_thread->queues[i] = this_thread->queues[--this_thread->queue_count];
    /* If the queue has gone with its export there is no descriptor any more, and
       the epoll has forgotten it by itself: then this does nothing. */
    epoll_ctl(this_thread->epoll, EPOLL_CTL_DEL, blkfuse_queue_get_fd(queue), NULL);
}

/* Does what there is to do, and no more than a little of it, so that others in
   this loop have their turn. */
static void dispatch(struct blkfuse_queue *queue)
{
    int more = blkfuse_queue_dispatch(queue, 16);

    /* If there is more, the descriptor stays readable. */
    if (more >= 0)
        return;
    if (more != -ESHUTDOWN) /* which is how a queue ends */
        fprintf(stderr, "emulator: %s\n", blkfuse_error_message());
    remove_queue(queue);
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* Waits awake for a moment, since to be woken takes longer than a request. It
   costs no system call but the offer of the CPU to whoever else needs it. */
static bool wait_awake(struct io_thread *thread, uint64_t limit_ns)
{
    uint64_t start = now_ns(), now = start, last;

    do {
        int i;

        for (i = 0; i < thread->queue_count; i++) {
            if (blkfuse_queue_has_events(thread->queues[i]) > 0)
                return true;
        }
        sched_yield();
        last = now;
        now = now_ns();
        /* Somebody else has had the CPU for long: it is needed. */
    } while (now - start < limit_ns && now - last < 30000);
    return false;
}

static void run_call(struct io_thread *thread)
{
    eventfd_t count;
    struct call *call;

    eventfd_read(thread->wake, &count);
    pthread_mutex_lock(&thread->lock);
    call = thread->call;
    thread->call = NULL;
    pthread_mutex_unlock(&thread->lock);
    if (!call)
        return;
    call->result = call->function(call->argument);
    pthread_mutex_lock(&thread->lock);
    call->done = true;
    pthread_cond_signal(&thread->finished);
    pthread_mutex_unlock(&thread->lock);
}

static void *io_loop(void *thread_)
{
    const uint64_t longest = 50000;
    struct io_thread *thread = (struct io_thread *)thread_;
    uint64_t patience = 0; /* how long to wait awake, in nanoseconds */

    this_thread = thread;
    while (!thread->stopping || thread->queue_count > 0) {
        struct epoll_event events[MAX_QUEUES + 1];
        bool awake = patience > 0 && can_look && wait_awake(thread, patience);
        uint64_t since = now_ns(), asleep;
        bool called = false;
        int i, count = epoll_wait(thread->epoll, events, MAX_QUEUES + 1, awake ? 0 : -1);

        /* Requests that come close upon each other are worth waiting for. */
        asleep = now_ns() - since;
        patience = awake || asleep < 2 * longest ? longest : patience / 2;
        for (i = 0; i < count; i++) {
            if (events[i].data.ptr)
                dispatch((struct blkfuse_queue *)events[i].data.ptr);
            else
                called = true;
        }
        /* Last, for it may take a queue away of which there was an event. */
        if (called)
            run_call(thread);
    }
    return NULL;
}

/* Has a thread do something in between, waits for it, and returns its result. */
static int call_in(struct io_thread *thread, int (*function)(void *), void *argument)
{
    struct call call = { function, argument, 0, false };

    pthread_mutex_lock(&thread->lock);
    thread->call = &call;
    eventfd_write(thread->wake, 1);
    while (!call.done)
        pthread_cond_wait(&thread->finished, &thread->lock);
    pthread_mutex_unlock(&thread->lock);
    return call.result;
}

static int start_threads(int count)
{
    for (; thread_count < count; thread_count++) {
        struct io_thread *thread = &threads[thread_count];
        struct epoll_event event = { .events = EPOLLIN, .data.ptr = NULL };

        thread->epoll = epoll_create1(EPOLL_CLOEXEC);
        thread->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        pthread_mutex_init(&thread->lock, NULL);
        pthread_cond_init(&thread->finished, NULL);
        if (thread->epoll < 0 || thread->wake < 0 ||
            epoll_ctl(thread->epoll, EPOLL_CTL_ADD, thread->wake, &event) < 0 ||
            pthread_create(&thread->thread, NULL, io_loop, thread) != 0)
            return -1;
    }
    return 0;
}

/* Returns when they have no queues any more: not before the disk has gone. */
static void stop_threads(void)
{
    int i;

    for (i = 0; i < thread_count; i++) {
        threads[i].stopping = true;
        eventfd_write(threads[i].wake, 1);
        pthread_join(threads[i].thread, NULL);
        close(threads[i].epoll);
        close(threads[i].wake);
    }
}

/* ---- Workers: for what blocks ---- */

/* It lives in the request's own room: nothing is allocated for an I/O. */
struct job {
    struct job *next;
    struct blkfuse_request *request;
    char *buffer;     /* a read */
    const char *data; /* or a write */
    uint64_t offset, bytes;
};

static struct {
    pthread_t threads[WORKERS];
    int count;
    pthread_mutex_t lock;
    pthread_cond_t work;
    struct job *first, **end;
    bool stopping;
} workers = { .lock = PTHREAD_MUTEX_INITIALIZER,
              .work = PTHREAD_COND_INITIALIZER,
              .end = &workers.first };

static int submit(struct blkfuse_request *request, char *buffer, const char *data,
                  uint64_t offset, uint64_t bytes)
{
    struct job *job = (struct job *)blkfuse_request_ctx(request);

    *job = (struct job){ NULL, request, buffer, data, offset, bytes };
    pthread_mutex_lock(&workers.lock);
    *workers.end = job;
    workers.end = &job->next;
    pthread_cond_signal(&workers.work);
    pthread_mutex_unlock(&workers.lock);
    return BLKFUSE_PENDING;
}

static void *work(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&workers.lock);
    for (;;) {
        struct job *job = workers.first;

        if (job) {
            workers.first = job->next;
            if (!workers.first)
                workers.end = &workers.first;
            pthread_mutex_unlock(&workers.lock);
            /* From any thread: the request's queue wakes up and answers. */
            blkfuse_request_complete(job->request,
                                     job->data
                                         ? node_write(job->data, job->offset, job->bytes)
                                         : node_read(job->buffer, job->offset, job->bytes));
            pthread_mutex_lock(&workers.lock);
        } else if (workers.stopping) {
            break;
        } else {
            pthread_cond_wait(&workers.work, &workers.lock);
        }
    }
    pthread_mutex_unlock(&workers.lock);
    return NULL;
}

static int start_workers(void)
{
    for (; workers.count < WORKERS; workers.count++) {
        if (pthread_create(&workers.threads[workers.count], NULL, work, NULL) != 0)
            return -1;
    }
    return 0;
}

static void stop_workers(void)
{
    int i;

    pthread_mutex_lock(&workers.lock);
    workers.stopping = true;
    pthread_cond_broadcast(&workers.work);
    pthread_mutex_unlock(&workers.lock);
    for (i = 0; i < workers.count; i++)
        pthread_join(workers.threads[i], NULL);
}

/* ---- The driver: called by the I/O threads, from blkfuse_queue_dispatch() ---- */

/* What the main loop waits for besides commands. */
static struct {
    int wake; /* an eventfd */
    _Atomic bool ended, failed, deleted;
} notice;

static void note(_Atomic bool *what)
{
    *what = true;
    eventfd_write(notice.wake, 1);
}

/* It cannot go on. */
static void give_up(void)
{
    notice.failed = true;
    note(&notice.ended);
}

static int64_t driver_length(void *opaque)
{
    (void)opaque;
    return (int64_t)node.length;
}

static int driver_read(void *opaque, struct blkfuse_request *request, void *buffer,
                       uint64_t offset, uint64_t bytes, uint32_t flags)
{
    int layer = layer_of_range(offset, bytes);

    (void)opaque;
    if (flags)
        return -ENOTSUP;
    this_thread->requests++;
    if (layer < 0)
        return submit(request, (char *)buffer, NULL, offset, bytes);
    /* All of it is in one file: there the queue reads it by itself. */
    return blkfuse_request_forward(request, node.layers[layer].fd, offset);
}

static int driver_write(void *opaque, struct blkfuse_request *request, const void *data,
                        uint64_t offset, uint64_t bytes, uint32_t flags)
{
    (void)opaque;
    if (flags)
        return -ENOTSUP;
    this_thread->requests++;
    return submit(request, NULL, (const char *)data, offset, bytes);
}

static int driver_flush(void *opaque, struct blkfuse_request *request, uint32_t flags)
{
    (void)opaque;
    if (flags)
        return -ENOTSUP;
    /* Layers below the top were made durable when they were frozen. */
    return blkfuse_request_forward(request, node.layers[top_layer()].fd, 0);
}

static void driver_idle(void *opaque)
{
    (void)opaque;
    eventfd_write(notice.wake, 1); /* whoever drains looks again */
}

static void driver_event(void *opaque, uint32_t event, int error, const char *message)
{
    (void)opaque, (void)error;
    /* A callback cannot delete the export; the main loop can. */
    if (event == BLKFUSE_EVENT_HALTED) {
        fprintf(stderr, "emulator: %s\n", message);
        give_up();
    } else if (event == BLKFUSE_EVENT_UNMOUNTED) {
        note(&notice.ended);
    }
}

static void driver_deleted(void *opaque)
{
    (void)opaque;
    note(&notice.deleted);
}

/* ---- The main loop's part: what it does to a disk that is in use ---- */

static struct blkfuse_export *disk;
static struct blkfuse_queue *queues[MAX_QUEUES];
static struct io_thread *homes[MAX_QUEUES]; /* which thread runs which queue */
static uint64_t queue_count;

static void wait_for_notice(void)
{
    eventfd_t count;

    while (eventfd_read(notice.wake, &count) < 0 && errno == EINTR)
        ;
}

static bool failed(const char *why)
{
    printf("failed: %s\n", why);
    return false;
}

/* If it succeeds, no callback runs and clients wait until drained_end(). */
static bool drained_begin(void)
{
    if (blkfuse_export_drain_begin(disk) < 0)
        return failed(blkfuse_error_message());
    /* The I/O threads go on, for what is in flight needs them. */
    while (blkfuse_export_drain_poll(disk) > 0)
        wait_for_notice(); /* for driver_idle() */
    return true;
}

static void drained_end(void)
{
    blkfuse_export_drain_end(disk);
}

/* In the I/O thread that is to run the queue from now on. */
static int attach(void *queue_)
{
    struct blkfuse_queue *queue = (struct blkfuse_queue *)queue_;
    /* At first: what can fail must not fail when the thread is attached. */
    int error = add_queue(queue);

    if (error < 0) {
        fprintf(stderr, "emulator: epoll: %s\n", strerror(-error));
        return error;
    }
    error = blkfuse_queue_attach(queue);
    if (error < 0) {
        if (error != -ESHUTDOWN)
            fprintf(stderr, "emulator: %s\n", blkfuse_error_message());
        remove_queue(queue);
    }
    /* A queue that has ended, with its disk, needs nobody. */
    return error == -ESHUTDOWN ? 0 : error;
}

/* In the I/O thread that runs the queue, in a drain. */
static int detach(void *queue_)
{
    struct blkfuse_queue *queue = (struct blkfuse_queue *)queue_;
    int error;

    if (!has_queue(queue))
        return 0; /* it has ended meanwhile */
    error = blkfuse_queue_detach(queue);
    if (error < 0)
        fprintf(stderr, "emulator: %s\n", blkfuse_error_message());
    else
        remove_queue(queue);
    return error;
}

static int move_queue(uint64_t i)
{
    struct io_thread *next = &threads[(homes[i] - threads + 1) % thread_count];
    int error = call_in(homes[i], detach, queues[i]);

    if (error < 0)
        return error;
    error = call_in(next, attach, queues[i]);
    if (error == 0)
        homes[i] = next;
    /* Clients wait for ever for a queue without a thread. */
    else if (call_in(homes[i], attach, queues[i]) < 0)
        give_up();
    return error;
}

static void move(void)
{
    uint64_t i;
    int error = 0;

    if (!drained_begin())
        return;
    for (i = 0; i < queue_count && error == 0; i++)
        error = move_queue(i);
    drained_end();
    if (error < 0)
        failed(strerror(-error));
    else
        printf("ok queue 0 runs in thread %d\n", (int)(homes[0] - threads));
}

static void snapshot(void)
{
    struct layer layer;
    int error = node.count < MAX_LAYERS ? make_layer(&layer) : -EMLINK;

    if (error < 0) {
        failed(strerror(-error));
        return;
    }
    if (!drained_begin()) {
        free_layer(&layer);
        return;
    }
    /* A flush goes to the top layer only; so what is below it has had its own. */
    if (fdatasync(node.layers[top_layer()].fd) < 0)
        error = -errno;
    else
        node.layers[node.count++] = layer;
    drained_end();
    if (error < 0) {
        free_layer(&layer);
        failed(strerror(-error));
    } else {
        printf("ok %d layers\n", node.count);
    }
}

/* What clients have mapped into their memory stays there; all else that they read
   comes from here. */
static void revert(void)
{
    struct layer layer, old;
    int error = make_layer(&layer);

    if (error < 0) {
        failed(strerror(-error));
        return;
    }
    if (!drained_begin()) {
        free_layer(&layer);
        return;
    }
    old = node.layers[top_layer()];
    node.layers[top_layer()] = layer;
    drained_end();
    free_layer(&old);
    printf("ok %d layers\n", node.count);
}

static void resize(const char *bytes)
{
    char *end;
    uint64_t before = node.length, length = strtoull(bytes, &end, 10);

    if (end == bytes || *end || length < before || length > MAX_LENGTH) {
        printf("failed: from %" PRIu64 " to %" PRIu64 " bytes it can be\n", before, MAX_LENGTH);
        return;
    }
    node.length = length;
    if (blkfuse_export_resized(disk) < 0) {
        node.length = before;
        failed(blkfuse_error_message());
        return;
    }
    printf("ok %" PRIu64 " bytes\n", length);
}

static void stats(void)
{
    struct blkfuse_stats stats;
    int i;

    if (blkfuse_export_get_stats(disk, &stats, sizeof(stats)) < 0) {
        failed(blkfuse_error_message());
        return;
    }
    printf("ok %" PRIu64 " reads, %" PRIu64 " writes; by thread:", stats.read.operations,
           stats.write.operations);
    for (i = 0; i < thread_count; i++)
        printf(" %" PRIu64, (uint64_t)threads[i].requests);
    printf("\n");
}

/* False: it is to end. */
static bool obey(const char *command)
{
    if (strcmp(command, "snapshot") == 0)
        snapshot();
    else if (strcmp(command, "revert") == 0)
        revert();
    else if (strcmp(command, "move") == 0)
        move();
    else if (strncmp(command, "resize ", 7) == 0)
        resize(command + 7);
    else if (strcmp(command, "stats") == 0)
        stats();
    else if (strcmp(command, "quit") == 0)
        return false;
    else
        failed("no such command");
    fflush(stdout);
    return true;
}

/* Obeys what lines there are in the input. False: it is to end. */
static bool read_commands(void)
{
    static char buffer[4096];
    static size_t used;
    ssize_t n = read(STDIN_FILENO, buffer + used, sizeof(buffer) - used);
    char *line = buffer, *end;

    if (n <= 0)
        return n < 0 && (errno == EINTR || errno == EAGAIN);
    used += (size_t)n;
    while ((end = (char *)memchr(line, '\n', used - (size_t)(line - buffer)))) {
        *end = '\0';
        if (!obey(line))
            return false;
        line = end + 1;
    }
    used -= (size_t)(line - buffer);
    memmove(buffer, line, used);
    if (used == sizeof(buffer)) { /* it can be none of the commands */
        used = 0;
        return obey("");
    }
    return true;
}

static void main_loop(int signals)
{
    bool on = true;

    while (on && !notice.ended) {
        struct pollfd fds[] = { { .fd = notice.wake, .events = POLLIN },
                                { .fd = signals, .events = POLLIN },
                                { .fd = STDIN_FILENO, .events = POLLIN } };

        if (poll(fds, 3, -1) < 0)
            continue; /* it was interrupted */
        if (fds[0].revents)
            wait_for_notice(); /* which does not wait now */
        else if (fds[1].revents)
            on = false;
        else
            on = read_commands();
    }
}

/* ---- From the beginning to the end ---- */

static int fail(const char *what, const char *why)
{
    fprintf(stderr, "emulator: %s: %s\n", what, why);
    return -1;
}

static int open_base(const char *path)
{
    struct stat status;
    int error;

    node.count = 1;
    node.layers[0].fd = open(path, O_RDONLY | O_CLOEXEC);
    if (node.layers[0].fd < 0 || fstat(node.layers[0].fd, &status) < 0)
        return fail(path, strerror(errno));
    if (!S_ISREG(status.st_mode) || (uint64_t)status.st_size > MAX_LENGTH)
        return fail(path, "not a regular file of at most 1 TiB");
    node.length = (uint64_t)status.st_size;
    error = make_layer(&node.layers[1]);
    if (error < 0)
        return fail("a file to write to, in this directory", strerror(-error));
    node.count = 2;
    return 0;
}

static int configure(const char *file, int count, char **settings)
{
    int i;

    if (blkfuse_export_set_str(disk, "mountpoint", file) < 0 ||
        blkfuse_export_set_u64(disk, "queues", (uint64_t)thread_count) < 0 ||
        blkfuse_export_set_bool(disk, "writable", true) < 0)
        return -1;
    for (i = 0; i < count; i++) {
        char *value = strchr(settings[i], '=');

        if (value)
            *value++ = '\0';
        if (blkfuse_export_set_str(disk, settings[i], value ? value : "on") < 0)
            return -1;
    }
    /* The last word: the driver counts on its threads being these. */
    return blkfuse_export_set_str(disk, "threads", "host");
}

static int start_disk(const char *file, int count, char **settings)
{
    struct blkfuse_driver_ops ops;
    char transport[16];
    uint64_t i;

    blkfuse_driver_ops_init(&ops);
    ops.request_ctx_size = sizeof(struct job);
    ops.length = driver_length;
    ops.read = driver_read;
    ops.write = driver_write;
    ops.flush = driver_flush;
    ops.idle = driver_idle;
    ops.event = driver_event;
    ops.deleted = driver_deleted;
    if (blkfuse_export_create(&disk, &ops, NULL) < 0)
        return fail("cannot create the export", blkfuse_error_message());
    if (configure(file, count, settings) < 0 || blkfuse_export_start(disk) < 0 ||
        blkfuse_export_get_u64(disk, "queues", &queue_count) < 0)
        return fail("cannot start the export", blkfuse_error_message());
    if (queue_count > MAX_QUEUES)
        return fail("queues", "this program can run no more than 16");
    can_look = blkfuse_export_get_str(disk, "transport", transport, sizeof(transport)) > 0 &&
               strcmp(transport, "io_uring") == 0;
    /* The file is there; clients wait until each queue has its thread. */
    for (i = 0; i < queue_count; i++) {
        queues[i] = blkfuse_export_get_queue(disk, (uint32_t)i);
        homes[i] = &threads[i % (uint64_t)thread_count];
        if (call_in(homes[i], attach, queues[i]) < 0)
            return -1; /* said */
    }
    return 0;
}

/* The I/O threads go on: they are needed until their queues have ended. */
static void end_disk(void)
{
    if (!disk)
        return;
    blkfuse_export_delete(&disk);
    while (!notice.deleted)
        wait_for_notice();
}

static int usage(void)
{
    fprintf(stderr, "usage: emulator BASE FILE [THREADS [KEY=VALUE]...]\n"
                    "THREADS is a number from 1 to 16; 2 if not given\n");
    return 2;
}

int main(int argc, char **argv)
{
    sigset_t set;
    char *end = NULL;
    long count = argc > 3 ? strtol(argv[3], &end, 10) : 2;
    bool started = false;
    int signals;

    if (argc < 3 || count < 1 || count > MAX_THREADS || (end && *end))
        return usage();
    /* Before there are threads, so that all of them block these signals. */
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    signals = signalfd(-1, &set, SFD_CLOEXEC);
    notice.wake = eventfd(0, EFD_CLOEXEC);

    if (signals < 0 || notice.wake < 0) {
        fail("its descriptors", strerror(errno));
    } else if (open_base(argv[1]) < 0) {
        /* said */
    } else if (start_threads((int)count) < 0 || start_workers() < 0) {
        fail("its threads", "cannot start them");
    } else if (start_disk(argv[2], argc > 4 ? argc - 4 : 0, argv + 4) == 0) {
        started = true;
        printf("ok %s is a disk of %" PRIu64 " bytes\n", argv[2], (uint64_t)node.length);
        fflush(stdout);
        main_loop(signals);
    }
    end_disk();
    stop_threads();
    stop_workers();
    while (node.count > 1)
        free_layer(&node.layers[--node.count]);
    return started && !notice.failed ? 0 : 1;
}
