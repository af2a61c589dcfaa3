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
 * Each is answered by a line that begins with "ok" or "failed".
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

static int push_layer(void)
{
    struct layer *layer = &node.layers[node.count];

    if (node.count == MAX_LAYERS)
        return -EMLINK;
    layer->has = (_Atomic uint8_t *)calloc(MAX_LENGTH / CLUSTER, 1);
    if (!layer->has)
        return -ENOMEM;
    layer->fd = open(".", O_RDWR | O_TMPFILE | O_CLOEXEC, 0600);
    if (layer->fd < 0) {
        int error = -errno;

        free((void *)layer->has);
        return error;
    }
    node.count++;
    return 0;
}

static void pop_layer(void)
{
    struct layer *layer = &node.layers[--node.count];

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

/* Gives the top layer a cluster that it does not have, with the new bytes in it. */
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
    void (*function)(void *);
    void *argument;
    bool done;
};

struct io_thread {
    pthread_t thread;
    int epoll;
    int wake; /* an eventfd */
    pthread_mutex_t lock;
    pthread_cond_t finished;
    struct call *call; /* one at a time: only the main loop asks */
    bool stopping;
    /* The queues that it runs; only the thread itself looks at them. */
    struct blkfuse_queue *queues[MAX_THREADS];
    int queue_count;
    _Atomic uint64_t requests; /* that it has begun */
};

static struct io_thread threads[MAX_THREADS];
static int thread_count;
static _Thread_local struct io_thread *this_thread;

static void add_queue(struct blkfuse_queue *queue)
{
    struct epoll_event event = { .events = EPOLLIN, .data.ptr = queue };

    this_thread->queues[this_thread->queue_count++] = queue;
    epoll_ctl(this_thread->epoll, EPOLL_CTL_ADD, blkfuse_queue_get_fd(queue), &event);
}

static void remove_queue(struct blkfuse_queue *queue)
{
    int i = 0;

    while (this_thread->queues[i] != queue)
        i++;
    this_thread->queues[i] = this_thread->queues[--this_thread->queue_count];
    epoll_ctl(this_thread->epoll, EPOLL_CTL_DEL, blkfuse_queue_get_fd(queue), NULL);
}

/* Does what there is to do, and no more than a little of it, so that others in
   this loop have their turn. */
static void dispatch(struct blkfuse_queue *queue)
{
    int more = blkfuse_queue_dispatch(queue, 16);

    if (more == -ESHUTDOWN)
        remove_queue(queue); /* it has ended */
    else if (more < 0)
        fprintf(stderr, "emulator: %s\n", blkfuse_error_message());
    /* What is more shows at the descriptor: it stays readable. */
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* Waits awake for a moment, since to be woken takes longer than a request. It
   costs no system call but the offer of the CPU to whoever else needs it. */
static bool poll_awake(struct io_thread *thread, uint64_t limit_ns)
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
    call->function(call->argument);
    pthread_mutex_lock(&thread->lock);
    call->done = true;
    pthread_cond_signal(&thread->finished);
    pthread_mutex_unlock(&thread->lock);
}

static bool is_stopping(struct io_thread *thread)
{
    bool stopping;

    pthread_mutex_lock(&thread->lock);
    stopping = thread->stopping;
    pthread_mutex_unlock(&thread->lock);
    return stopping;
}

static void *io_loop(void *thread_)
{
    const uint64_t longest = 50000;
    struct io_thread *thread = (struct io_thread *)thread_;
    uint64_t patience = 0; /* how long to wait awake, in nanoseconds */

    this_thread = thread;
    while (!is_stopping(thread) || thread->queue_count > 0) {
        struct epoll_event events[MAX_THREADS + 1];
        bool awake = patience > 0 && poll_awake(thread, patience);
        uint64_t asleep = now_ns();
        int i, count = epoll_wait(thread->epoll, events, MAX_THREADS + 1, awake ? 0 : -1);

        /* Requests that come close upon each other are worth waiting for. */
        asleep = now_ns() - asleep;
        patience = awake || asleep < 2 * longest ? longest : patience / 2;
        for (i = 0; i < count; i++) {
            if (events[i].data.ptr)
                dispatch((struct blkfuse_queue *)events[i].data.ptr);
            else
                run_call(thread);
        }
    }
    return NULL;
}

/* Has a thread do something in between, and waits for it. */
static void call_in(struct io_thread *thread, void (*function)(void *), void *argument)
{
    struct call call = { function, argument, false };

    pthread_mutex_lock(&thread->lock);
    thread->call = &call;
    eventfd_write(thread->wake, 1);
    while (!call.done)
        pthread_cond_wait(&thread->finished, &thread->lock);
    pthread_mutex_unlock(&thread->lock);
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

/* Returns when they have no queues any more. */
static void stop_threads(void)
{
    int i;

    for (i = 0; i < thread_count; i++) {
        pthread_mutex_lock(&threads[i].lock);
        threads[i].stopping = true;
        pthread_mutex_unlock(&threads[i].lock);
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
    (void)opaque;
    if (event == BLKFUSE_EVENT_HALTED) {
        fprintf(stderr, "emulator: %s (%s)\n", message, strerror(-error));
        notice.failed = true;
    }
    /* A callback cannot delete the export; the main loop can. */
    if (event != BLKFUSE_EVENT_STARTED)
        note(&notice.ended);
}

static void driver_deleted(void *opaque)
{
    (void)opaque;
    note(&notice.deleted);
}

/* ---- The main loop's part: what it does to a disk that is in use ---- */

static struct blkfuse_export *disk;
static struct blkfuse_queue *queues[MAX_THREADS];
static uint64_t queue_count;
static int first_thread; /* which one runs queue 0; the others follow */

static struct io_thread *thread_of(uint64_t queue)
{
    return &threads[((uint64_t)first_thread + queue) % (uint64_t)thread_count];
}

static void wait_for_notice(void)
{
    eventfd_t count;

    while (eventfd_read(notice.wake, &count) < 0 && errno == EINTR)
        ;
}

/* From here until drained_end() no callback runs, and clients wait. */
static void drained_begin(void)
{
    blkfuse_export_drain_begin(disk);
    /* The I/O threads go on, for what is in flight needs them. */
    while (blkfuse_export_drain_poll(disk) > 0)
        wait_for_notice(); /* for driver_idle() */
}

static void drained_end(void)
{
    blkfuse_export_drain_end(disk);
}

static void attach(void *queue)
{
    int error = blkfuse_queue_attach((struct blkfuse_queue *)queue);

    if (error == 0) {
        add_queue((struct blkfuse_queue *)queue);
    } else if (error != -ESHUTDOWN) { /* which is no failure: it has ended */
        fprintf(stderr, "emulator: %s\n", blkfuse_error_message());
        notice.failed = true;
        note(&notice.ended);
    }
}

static void detach(void *queue)
{
    int i;

    /* It may have ended meanwhile, and is then not among this thread's. */
    for (i = 0; i < this_thread->queue_count; i++) {
        if (this_thread->queues[i] == queue) {
            remove_queue((struct blkfuse_queue *)queue);
            if (blkfuse_queue_detach((struct blkfuse_queue *)queue) < 0)
                fprintf(stderr, "emulator: %s\n", blkfuse_error_message());
            return;
        }
    }
}

static void move(void)
{
    uint64_t i;

    drained_begin();
    for (i = 0; i < queue_count; i++)
        call_in(thread_of(i), detach, queues[i]);
    first_thread = (first_thread + 1) % thread_count;
    for (i = 0; i < queue_count; i++)
        call_in(thread_of(i), attach, queues[i]);
    drained_end();
    printf("ok queue 0 runs in thread %d\n", first_thread);
}

static void snapshot(void)
{
    int error;

    drained_begin();
    error = fdatasync(node.layers[top_layer()].fd) < 0 ? -errno : push_layer();
    drained_end();
    if (error < 0)
        printf("failed: %s\n", strerror(-error));
    else
        printf("ok %d layers\n", node.count);
}

static void revert(void)
{
    int error;

    drained_begin();
    pop_layer();
    error = push_layer();
    drained_end();
    if (error < 0)
        printf("failed: %s\n", strerror(-error));
    else
        printf("ok\n");
    if (error < 0) {
        notice.failed = true; /* there is nowhere to write to */
        note(&notice.ended);
    }
}

static void resize(const char *bytes)
{
    char *end;
    uint64_t length = strtoull(bytes, &end, 10);

    if (end == bytes || *end || length < node.length || length > MAX_LENGTH) {
        printf("failed: a disk can only become longer, up to %" PRIu64 " bytes\n", MAX_LENGTH);
        return;
    }
    node.length = length;
    if (blkfuse_export_resized(disk) < 0)
        printf("failed: %s\n", blkfuse_error_message());
    else
        printf("ok %" PRIu64 " bytes\n", length);
}

static void stats(void)
{
    struct blkfuse_stats stats;
    int i;

    if (blkfuse_export_get_stats(disk, &stats, sizeof(stats)) < 0) {
        printf("failed: %s\n", blkfuse_error_message());
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
        printf("failed: no such command\n");
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
        return n < 0 && errno == EINTR;
    used += (size_t)n;
    while ((end = (char *)memchr(line, '\n', used - (size_t)(line - buffer)))) {
        *end = '\0';
        if (!obey(line))
            return false;
        line = end + 1;
    }
    used -= (size_t)(line - buffer);
    memmove(buffer, line, used);
    return used < sizeof(buffer);
}

static void main_loop(int signals)
{
    int epoll = epoll_create1(EPOLL_CLOEXEC), i;
    int sources[] = { STDIN_FILENO, signals, notice.wake };
    bool on = epoll >= 0;

    for (i = 0; on && i < 3; i++) {
        struct epoll_event event = { .events = EPOLLIN, .data.fd = sources[i] };

        on = epoll_ctl(epoll, EPOLL_CTL_ADD, sources[i], &event) == 0;
    }
    while (on && !notice.ended) {
        struct epoll_event event;

        if (epoll_wait(epoll, &event, 1, -1) < 1)
            continue;
        if (event.data.fd == STDIN_FILENO)
            on = read_commands();
        else if (event.data.fd == signals)
            on = false;
        else
            wait_for_notice();
    }
    close(epoll);
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

    node.layers[0].fd = open(path, O_RDONLY | O_CLOEXEC);
    if (node.layers[0].fd < 0 || fstat(node.layers[0].fd, &status) < 0)
        return fail(path, strerror(errno));
    if ((uint64_t)status.st_size > MAX_LENGTH)
        return fail(path, "more than 1 TiB");
    node.length = (uint64_t)status.st_size;
    node.count = 1;
    error = push_layer();
    return error < 0 ? fail("a file to write to, in this directory", strerror(-error)) : 0;
}

static int configure(const char *file, int count, char **settings)
{
    int i;

    if (blkfuse_export_set_str(disk, "mountpoint", file) < 0 ||
        blkfuse_export_set_str(disk, "threads", "host") < 0 ||
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
    return 0;
}

static int start_disk(const char *file, int count, char **settings)
{
    struct blkfuse_driver_ops ops;
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
    if (queue_count > MAX_THREADS)
        return fail("queues", "more than this program has threads for");
    /* The file is there; clients wait until each queue has its thread. */
    for (i = 0; i < queue_count; i++) {
        queues[i] = blkfuse_export_get_queue(disk, (uint32_t)i);
        call_in(thread_of(i), attach, queues[i]);
    }
    return 0;
}

/* The I/O threads must go on until their queues have ended. */
static void end_disk(void)
{
    if (!disk)
        return;
    blkfuse_export_delete(&disk);
    while (!notice.deleted)
        wait_for_notice();
}

int main(int argc, char **argv)
{
    sigset_t set;
    int signals, count = argc > 3 ? atoi(argv[3]) : 2;
    bool started = false;

    if (argc < 3 || count < 1 || count > MAX_THREADS) {
        fprintf(stderr, "usage: emulator BASE FILE [THREADS [KEY=VALUE]...]\n");
        return 2;
    }
    /* Before there are threads, so that all of them block these signals. */
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    signals = signalfd(-1, &set, SFD_CLOEXEC);
    notice.wake = eventfd(0, EFD_CLOEXEC);

    if (signals < 0 || notice.wake < 0 || open_base(argv[1]) < 0) {
        /* said */
    } else if (start_threads(count) < 0 || start_workers() < 0) {
        fail("threads", "cannot start them");
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
        pop_layer();
    return started && !notice.failed ? 0 : 1;
}
