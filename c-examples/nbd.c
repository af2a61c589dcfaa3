/*
 * nbd.c - a disk of an NBD server, shown as a file.
 *
 * As a program:
 *
 *   cc nbd.c -o nbd $(pkg-config --cflags --libs blkfuse libnbd) -pthread
 *   touch disk && ./nbd nbd://server/export disk [KEY=VALUE]...  (Ctrl-C ends it)
 *
 * As a plugin of blkfused:
 *
 *   cc -DPLUGIN -shared -fPIC nbd.c -o nbd.so $(pkg-config --cflags blkfuse) \
 *      $(pkg-config --cflags --libs libnbd) -pthread
 *   touch disk && blkfused -w --plugin ./nbd.so uri=nbd://server/export disk
 *
 * The URI is what libnbd takes: nbd://HOST, nbds://HOST (with TLS),
 * nbd+unix:///EXPORT?socket=PATH. The keys are connections=N: so many carry data
 * (1 to 16; one for every two CPUs, at most 4, if not given); and, of the
 * program, the properties of an export but "queues" and "threads". A server that
 * does not say that several connections see the same disk gets a single one.
 *
 * If a connection breaks, the requests on it fail with EIO, and so does all
 * that comes later; the file stays until this program, or blkfused, ends.
 *
 * Callbacks send their requests themselves, and a thread for each connection
 * takes the replies and completes the requests. In the program the thread of a
 * connection that carries data runs a queue of the export, too: what the queue
 * brings goes over that connection, and no other thread has to be woken for an
 * I/O. In the plugin the queues have threads of blkfused's. The data go between
 * the socket and the requests' own buffers.
 */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#ifdef PLUGIN
#include <blkfuse-plugin.h>
#else
#include <blkfuse.h>
#endif
#include <libnbd.h>

#define MAX_CONNECTIONS 16
/* libnbd can zero, or ask about, less than 4 GiB at a time. */
#define MAX_RANGE (INT64_C(1) << 30)
/* The largest that an export has, unless the server takes less. */
#define MAX_REQUEST 1048576
/* How long the server has for the last requests when this is to end. */
#define PATIENCE_MS 5000

enum kind { READ, WRITE, FLUSH, ZERO, STATUS };

/* It lives in the request's own room: nothing is allocated for an I/O. */
struct job {
    struct job *next;
    struct blkfuse_request *request;
    struct connection *connection;
    enum kind kind;
    uint32_t flags; /* libnbd's */
    int result;
    uint64_t offset;
    uint64_t bytes;
    char *buffer;
    struct blkfuse_extent *extent;
};

struct list {
    struct job *first, **end;
};

struct connection {
    struct disk *disk;
    pthread_t thread;  /* takes replies, and runs the queue if there is one */
    struct list again; /* the thread's: what has more pieces to do */
    int wake;          /* an eventfd, to have the thread look around */
    struct blkfuse_queue *queue;
    /* Closed by the thread when it ends; whoever else uses it holds the lock,
       and has looked at `lost`. */
    struct nbd_handle *nbd;
    pthread_mutex_t lock;
    bool ending;
    bool lost; /* takes no job any more */
};

struct disk {
    const char *uri;
    /* The first does what is neither read nor write; the data connections are
       those from `first_data` on, which is 0 if there is just one in all. */
    struct connection connections[MAX_CONNECTIONS + 1];
    unsigned wanted, count, first_data, started;
    int64_t size;
    int64_t block_size;
    int64_t max_request;
    bool read_only, multi_conn, can_flush, can_zero, can_status;
    struct blkfuse_driver_ops ops;
    char error[512]; /* why it could not be opened */

    pthread_mutex_t lock; /* of what follows */
    pthread_cond_t changed;
    bool failed, deleted, syncing;
    struct job sync; /* a flush that no request asks for */
};

/* Says what has gone wrong first; the program's status will say that, too. */
static void fail(struct disk *disk, const char *what, const char *why)
{
    pthread_mutex_lock(&disk->lock);
    if (!disk->failed)
        fprintf(stderr, "nbd: %s: %s\n", what, why);
    disk->failed = true;
    pthread_mutex_unlock(&disk->lock);
}

/* ---- Lists ---- */

static void list_clear(struct list *list)
{
    list->first = NULL;
    list->end = &list->first;
}

static void list_append(struct list *list, struct job *job)
{
    job->next = NULL;
    *list->end = job;
    list->end = &job->next;
}

static struct job *list_take_all(struct list *list)
{
    struct job *first = list->first;

    list_clear(list);
    return first;
}

/* ---- A request, from the list to the server and back ---- */

static void complete(struct job *job)
{
    struct disk *disk = job->connection->disk;

    if (job->request) {
        blkfuse_request_complete(job->request, job->result);
        return;
    }
    pthread_mutex_lock(&disk->lock);
    disk->syncing = false;
    pthread_cond_broadcast(&disk->changed);
    pthread_mutex_unlock(&disk->lock);
}

/* libnbd's word that a command has been answered. It must not use the handle. */
static int on_completion(void *job_, int *error)
{
    struct job *job = (struct job *)job_;

    /* Connections break; to a client that is an error of its disk. */
    job->result = *error == ENOTCONN || *error == ESHUTDOWN ? -EIO : -*error;
    return 1; /* libnbd may forget it */
}

/* Comes exactly once for each command, whether it was completed, or could not
   be sent, or its connection was closed; the buffer is not used any more. */
static void on_end(void *job_)
{
    struct job *job = (struct job *)job_;

    if (job->result == 0 && job->bytes > 0)
        list_append(&job->connection->again, job);
    else
        complete(job);
}

/* What libnbd says of the range: pairs of a length and flags. */
static int on_extents(void *job_, const char *context, uint64_t offset, uint32_t *entries,
                      size_t count, int *error)
{
    const uint32_t hole = LIBNBD_STATE_HOLE | LIBNBD_STATE_ZERO;
    struct job *job = (struct job *)job_;
    size_t i;

    (void)error;
    if (strcmp(context, LIBNBD_CONTEXT_BASE_ALLOCATION) != 0 || offset != job->offset || count < 2)
        return 0;
    job->extent->flags = (entries[1] & hole) == hole ? BLKFUSE_EXTENT_HOLE : 0;
    job->extent->bytes = 0;
    for (i = 0; i + 1 < count && ((entries[i + 1] & hole) == hole) == (job->extent->flags != 0);
         i += 2)
        job->extent->bytes += entries[i];
    return 0;
}

/* Sends a job, or the next piece of it; `bytes` is then what is left. What a
   request of status is told about its first piece is enough. */
static void issue(struct job *job)
{
    struct nbd_handle *nbd = job->connection->nbd;
    nbd_completion_callback completion = { on_completion, job, on_end };
    nbd_extent_callback extents = { on_extents, job, NULL };
    bool has_data = job->kind == READ || job->kind == WRITE;
    uint64_t most = has_data ? job->connection->disk->max_request : MAX_RANGE;
    uint64_t piece = job->bytes < most ? job->bytes : most, offset = job->offset;
    char *buffer = job->buffer;

    /* Before it is sent: the answer may come at once, to another thread. */
    job->result = -EIO; /* unless on_completion() comes */
    job->bytes = job->kind == STATUS ? 0 : job->bytes - piece;
    job->offset += job->kind == STATUS ? 0 : piece;
    if (has_data)
        job->buffer += piece;
    switch (job->kind) {
    case READ:
        nbd_aio_pread(nbd, buffer, piece, offset, completion, 0);
        break;
    case WRITE:
        nbd_aio_pwrite(nbd, buffer, piece, offset, completion, 0);
        break;
    case FLUSH:
        nbd_aio_flush(nbd, completion, 0);
        break;
    case ZERO:
        nbd_aio_zero(nbd, piece, offset, completion, job->flags);
        break;
    case STATUS:
        nbd_aio_block_status(nbd, piece, offset, extents, completion, 0);
        break;
    }
}

static void issue_all(struct job *job)
{
    while (job) {
        struct job *next = job->next; /* the job may be gone after this */

        issue(job);
        job = next;
    }
}

/* Sends a job at once, from the queue's thread: that saves waking another. */
static int submit(struct job *job)
{
    struct connection *connection = job->connection;
    bool lost, wake = false;

    pthread_mutex_lock(&connection->lock);
    lost = connection->lost;
    if (!lost) {
        issue(job);
        /* The thread has to look for something else than replies now: the
           server does not take all, or sending has found that it is gone. */
        wake = nbd_aio_get_direction(connection->nbd) != LIBNBD_AIO_DIRECTION_READ;
    }
    pthread_mutex_unlock(&connection->lock);
    if (wake)
        eventfd_write(connection->wake, 1);
    return lost ? -EIO : BLKFUSE_PENDING;
}

/* ---- A connection's thread ---- */

/* Begins what the queue has, if there is one, and answers what is completed.
   Whether there is more to do at once. */
static bool dispatch(struct connection *connection)
{
    int result = connection->queue ? blkfuse_queue_dispatch(connection->queue, 0) : 0;

    if (result < 0)
        connection->queue = NULL; /* the export has ended, and the descriptor with it */
    return result > 0;
}

/* Takes all replies that are there, so that one dispatch can answer them all.
   False if the connection is over. */
static bool take_replies(struct nbd_handle *nbd)
{
    /* Not to be left out: once libnbd was told of a reply it sends nothing until
       that has come. */
    struct pollfd fd = { nbd_aio_get_fd(nbd), POLLIN, 0 };

    do {
        if (nbd_aio_notify_read(nbd) < 0 || nbd_aio_is_closed(nbd) || nbd_aio_is_dead(nbd))
            return false;
    } while (nbd_aio_in_flight(nbd) > 0 && poll(&fd, 1, 0) > 0);
    return true;
}

/* Has the server's side of the connection go on, as far as it can. False if
   that is over. */
static bool notify(struct nbd_handle *nbd, short events)
{
    /* One at a time: what the first does may make the other wrong. */
    if (events & (POLLIN | POLLHUP))
        return take_replies(nbd);
    if (events & POLLOUT)
        return nbd_aio_notify_write(nbd) == 0 && !nbd_aio_is_dead(nbd);
    return !(events & (POLLERR | POLLNVAL));
}

static bool is_ending(struct connection *connection)
{
    bool ending;

    pthread_mutex_lock(&connection->lock);
    ending = connection->ending;
    pthread_mutex_unlock(&connection->lock);
    return ending;
}

/* Serves the connection until it is to end, or breaks, which is false. */
static bool serve(struct connection *connection)
{
    struct nbd_handle *nbd = connection->nbd;
    eventfd_t count;

    for (;;) {
        struct pollfd fds[3] = { { -1, 0, 0 }, { connection->wake, POLLIN, 0 }, { -1, POLLIN, 0 } };
        unsigned direction;
        bool more;

        issue_all(list_take_all(&connection->again));
        more = dispatch(connection);
        fds[0].fd = nbd_aio_get_fd(nbd);
        direction = nbd_aio_get_direction(nbd);
        if (fds[0].fd < 0 || direction == 0)
            return false; /* sending has found it broken */
        fds[0].events = (direction & LIBNBD_AIO_DIRECTION_READ ? POLLIN : 0) |
                        (direction & LIBNBD_AIO_DIRECTION_WRITE ? POLLOUT : 0);
        if (connection->queue)
            fds[2].fd = blkfuse_queue_get_fd(connection->queue);
        if (poll(fds, 3, more ? 0 : -1) < 0 && errno != EINTR)
            return false;
        if (fds[1].revents && eventfd_read(connection->wake, &count) == 0 && is_ending(connection))
            return true;
        if (fds[0].revents && !notify(nbd, fds[0].revents))
            return false;
    }
}

/* From now on all requests are refused. */
static void lose_all(struct disk *disk)
{
    unsigned i;

    for (i = 0; i < disk->count; i++) {
        pthread_mutex_lock(&disk->connections[i].lock);
        disk->connections[i].lost = true;
        pthread_mutex_unlock(&disk->connections[i].lock);
    }
}

static void *run(void *connection_)
{
    struct connection *connection = (struct connection *)connection_;
    struct disk *disk = connection->disk;
    struct job *job, *next;

    if (connection->queue) {
        int error = blkfuse_queue_attach(connection->queue);

        if (error < 0)
            connection->queue = NULL;
        /* It may have ended, with the export, before this thread was there. */
        if (error < 0 && error != -ESHUTDOWN) {
            fail(disk, "a queue", blkfuse_error_message());
            kill(getpid(), SIGTERM);
        }
    }
    if (serve(connection)) {
        nbd_aio_disconnect(connection->nbd, 0);
    } else {
        const char *error = nbd_get_error();

        fail(disk, disk->uri, error ? error : "the server has closed a connection");
    }
    lose_all(disk);
    nbd_close(connection->nbd); /* ends what is in flight, by on_end() */
    for (job = connection->again.first; job; job = next) {
        next = job->next;
        job->result = -EIO;
        complete(job);
    }
    /* Clients get errors as long as the export is there. */
    for (dispatch(connection); connection->queue; dispatch(connection)) {
        struct pollfd fd = { blkfuse_queue_get_fd(connection->queue), POLLIN, 0 };

        poll(&fd, 1, -1);
    }
    return NULL;
}

/* ---- The driver: turns callbacks into jobs ---- */

static int64_t driver_length(void *disk)
{
    return ((struct disk *)disk)->size;
}

static void driver_limits(void *disk, struct blkfuse_limits *limits)
{
    limits->block_size = (uint32_t)((struct disk *)disk)->block_size;
}

static int driver_queue_start(void *disk_, uint32_t queue, void **queue_ctx)
{
    struct disk *disk = (struct disk *)disk_;

    *queue_ctx = &disk->connections[disk->first_data + queue % (disk->count - disk->first_data)];
    return 0;
}

static struct job *job_of(struct disk *disk, struct blkfuse_request *request, enum kind kind,
                          uint64_t offset, uint64_t bytes)
{
    struct job *job = (struct job *)blkfuse_request_ctx(request);

    memset(job, 0, sizeof(*job));
    job->request = request;
    job->kind = kind;
    job->offset = offset;
    job->bytes = bytes;
    job->connection = kind == READ || kind == WRITE
                          ? (struct connection *)blkfuse_request_queue_ctx(request)
                          : &disk->connections[0];
    return job;
}

static int driver_read(void *disk, struct blkfuse_request *request, void *buffer,
                       uint64_t offset, uint64_t bytes, uint32_t flags)
{
    struct job *job = job_of((struct disk *)disk, request, READ, offset, bytes);

    job->buffer = (char *)buffer;
    return flags ? -ENOTSUP : submit(job);
}

static int driver_write(void *disk, struct blkfuse_request *request, const void *buffer,
                        uint64_t offset, uint64_t bytes, uint32_t flags)
{
    struct job *job = job_of((struct disk *)disk, request, WRITE, offset, bytes);

    job->buffer = (char *)buffer;
    return flags ? -ENOTSUP : submit(job);
}

static int driver_flush(void *disk, struct blkfuse_request *request, uint32_t flags)
{
    struct job *job = job_of((struct disk *)disk, request, FLUSH, 0, 0);

    return flags ? -ENOTSUP : submit(job);
}

/* It serves for discarding, too: NBD's own command for that, trim, does not
   promise that zeroes are read afterwards. */
static int driver_write_zeroes(void *disk, struct blkfuse_request *request, uint64_t offset,
                               uint64_t bytes, uint32_t flags)
{
    struct job *job = job_of((struct disk *)disk, request, ZERO, offset, bytes);

    if (flags & ~(uint32_t)BLKFUSE_MAY_UNMAP)
        return -ENOTSUP;
    job->flags = flags & BLKFUSE_MAY_UNMAP ? 0 : LIBNBD_CMD_FLAG_NO_HOLE;
    return submit(job);
}

static int driver_block_status(void *disk, struct blkfuse_request *request, uint64_t offset,
                               uint64_t bytes, struct blkfuse_extent *extent, uint32_t flags)
{
    struct job *job = job_of((struct disk *)disk, request, STATUS, offset, bytes);

    if (flags)
        return -ENOTSUP;
    job->extent = extent;
    /* Data, if the server does not say anything. */
    extent->bytes = bytes;
    extent->flags = 0;
    return submit(job);
}

static void driver_init(struct disk *disk)
{
    struct blkfuse_driver_ops *ops = &disk->ops;

    blkfuse_driver_ops_init(ops);
    ops->request_ctx_size = sizeof(struct job);
    ops->length = driver_length;
    ops->limits = driver_limits;
    ops->read = driver_read;
    ops->write = disk->read_only ? NULL : driver_write;
    ops->flush = disk->can_flush ? driver_flush : NULL;
    ops->write_zeroes = disk->can_zero ? driver_write_zeroes : NULL;
    ops->block_status = disk->can_status ? driver_block_status : NULL;
    ops->queue_start = driver_queue_start;
}

/* ---- Connecting ---- */

static int complain(struct disk *disk, const char *what, const char *why)
{
    snprintf(disk->error, sizeof(disk->error), "%s: %s", what, why);
    return -1;
}

/* Takes the value of the key "connections". */
static int set_connections(struct disk *disk, const char *value)
{
    char *end;
    unsigned long wanted = strtoul(value, &end, 10);

    if (end == value || *end || wanted < 1 || wanted > MAX_CONNECTIONS)
        return complain(disk, "connections", "must be 1 to 16");
    disk->wanted = (unsigned)wanted;
    return 0;
}

static struct disk *new_disk(void)
{
    struct disk *disk = (struct disk *)calloc(1, sizeof(*disk));

    if (disk) {
        pthread_mutex_init(&disk->lock, NULL);
        pthread_cond_init(&disk->changed, NULL);
    }
    return disk;
}

/* Opens one more connection. Without structured replies a reply of data has one
   header less; only the first needs them, to ask what is a hole. */
static int open_connection(struct disk *disk, bool structured)
{
    struct connection *connection = &disk->connections[disk->count];
    struct nbd_handle *nbd = nbd_create();

    if (!nbd)
        return complain(disk, disk->uri, nbd_get_error());
    if (nbd_set_uri_allow_local_file(nbd, true) < 0 ||
        nbd_set_request_structured_replies(nbd, structured) < 0 ||
        /* Else a reply could leave parts of a buffer as they were. */
        nbd_set_pread_initialize(nbd, structured) < 0 ||
        (structured && nbd_add_meta_context(nbd, LIBNBD_CONTEXT_BASE_ALLOCATION) < 0) ||
        nbd_connect_uri(nbd, disk->uri) < 0) {
        complain(disk, disk->uri, nbd_get_error());
        nbd_close(nbd);
        return -1;
    }
    connection->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (connection->wake < 0) {
        complain(disk, "eventfd", strerror(errno));
        nbd_close(nbd);
        return -1;
    }
    connection->disk = disk;
    connection->nbd = nbd;
    pthread_mutex_init(&connection->lock, NULL);
    list_clear(&connection->again);
    disk->count++;
    return 0;
}

/* Learns what the disk is like. */
static int ask(struct disk *disk, struct nbd_handle *nbd)
{
    int64_t least = nbd_get_block_size(nbd, LIBNBD_SIZE_MINIMUM);
    int64_t preferred = nbd_get_block_size(nbd, LIBNBD_SIZE_PREFERRED);
    int64_t most = nbd_get_block_size(nbd, LIBNBD_SIZE_MAXIMUM);

    disk->size = nbd_get_size(nbd);
    if (disk->size < 0)
        return complain(disk, disk->uri, nbd_get_error());
    if (least > 1)
        return complain(disk, disk->uri, "the server takes only whole blocks; "
                                         "put nbdkit with its blocksize filter between");
    if (most > 0 && most < 65536)
        return complain(disk, disk->uri, "the server takes only requests of less than 64 KiB; "
                                         "put nbdkit with its blocksize filter between");
    disk->max_request = most > 0 && most < MAX_REQUEST ? most & ~INT64_C(4095) : MAX_REQUEST;
    disk->block_size = 4096;
    if (preferred >= 512 && preferred <= 1048576 && (preferred & (preferred - 1)) == 0)
        disk->block_size = preferred;
    disk->read_only = nbd_is_read_only(nbd) > 0;
    disk->multi_conn = nbd_can_multi_conn(nbd) > 0;
    disk->can_flush = nbd_can_flush(nbd) > 0;
    disk->can_zero = nbd_can_zero(nbd) > 0;
    disk->can_status = nbd_can_meta_context(nbd, LIBNBD_CONTEXT_BASE_ALLOCATION) > 0;
    return 0;
}

/* Opens all connections: for data as many as are wanted. If that is not said,
   half of the CPUs stay for the clients, and for a server on this machine: with
   more connections each has fewer replies at a time to offer its thread. */
static int connect_disk(struct disk *disk)
{
    unsigned wanted = disk->wanted;
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);

    if (open_connection(disk, true) < 0 || ask(disk, disk->connections[0].nbd) < 0)
        return -1;
    if (!disk->multi_conn)
        return 0;
    if (wanted == 0)
        wanted = cpus < 4 ? 1 : cpus > 8 ? 4 : (unsigned)cpus / 2;
    disk->first_data = 1;
    while (disk->count < 1 + wanted) {
        if (open_connection(disk, false) < 0)
            return -1;
        if (nbd_get_size(disk->connections[disk->count - 1].nbd) != disk->size)
            return complain(disk, disk->uri, "its connections show disks of different sizes");
    }
    return 0;
}

static int start_threads(struct disk *disk)
{
    while (disk->started < disk->count) {
        struct connection *connection = &disk->connections[disk->started];

        if (pthread_create(&connection->thread, NULL, run, connection) != 0)
            return complain(disk, disk->uri, "cannot start a connection's thread");
        disk->started++;
    }
    return 0;
}

/* Ends the connections and their threads; all that they still have fails. */
static void end_connections(struct disk *disk)
{
    unsigned i;

    for (i = 0; i < disk->started; i++) {
        pthread_mutex_lock(&disk->connections[i].lock);
        disk->connections[i].ending = true;
        pthread_mutex_unlock(&disk->connections[i].lock);
        eventfd_write(disk->connections[i].wake, 1);
    }
    for (i = 0; i < disk->count; i++) {
        if (i < disk->started)
            pthread_join(disk->connections[i].thread, NULL);
        else
            nbd_close(disk->connections[i].nbd);
        close(disk->connections[i].wake);
    }
    disk->started = disk->count = 0;
}

static void delete_disk(struct disk *disk)
{
    end_connections(disk);
    free(disk);
}

#ifdef PLUGIN

/* ---- The plugin ---- */

static int plugin_open(const struct blkfuse_plugin_setting *settings, uint32_t flags,
                       const struct blkfuse_driver_ops **ops, void **opaque, char *message,
                       size_t message_size)
{
    struct disk *disk = new_disk();
    int error = -EINVAL;

    if (!disk)
        return -ENOMEM;
    for (; settings->key; settings++) {
        if (strcmp(settings->key, "uri") == 0)
            disk->uri = settings->value;
        else if (set_connections(disk, settings->value) < 0)
            goto failed;
    }
    if (!disk->uri) {
        complain(disk, "uri", "must be given, like uri=nbd://localhost");
        goto failed;
    }
    error = -EIO;
    if (connect_disk(disk) < 0)
        goto failed;
    if ((flags & BLKFUSE_PLUGIN_WRITABLE) && disk->read_only) {
        error = -EROFS;
        complain(disk, disk->uri, "the server does not let it be written to");
        goto failed;
    }
    driver_init(disk);
    if (start_threads(disk) < 0)
        goto failed;
    *ops = &disk->ops;
    *opaque = disk;
    return 0;

failed:
    snprintf(message, message_size, "%s", disk->error);
    delete_disk(disk);
    return error;
}

/* Flushes as a request would, but for none. */
static int plugin_sync(void *disk_)
{
    struct disk *disk = (struct disk *)disk_;
    struct timespec end;
    int error;

    if (!disk->can_flush)
        return 0;
    pthread_mutex_lock(&disk->lock);
    if (disk->syncing) { /* the last one has not been answered yet */
        pthread_mutex_unlock(&disk->lock);
        return -ETIMEDOUT;
    }
    disk->syncing = true;
    pthread_mutex_unlock(&disk->lock);

    memset(&disk->sync, 0, sizeof(disk->sync));
    disk->sync.connection = &disk->connections[0];
    disk->sync.kind = FLUSH;
    error = submit(&disk->sync);

    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += PATIENCE_MS / 1000;
    pthread_mutex_lock(&disk->lock);
    if (error < 0)
        disk->syncing = false;
    while (disk->syncing && error != ETIMEDOUT)
        error = pthread_cond_timedwait(&disk->changed, &disk->lock, &end);
    if (error >= 0)
        error = disk->syncing ? -ETIMEDOUT : disk->sync.result;
    pthread_mutex_unlock(&disk->lock);
    return error;
}

static void plugin_close(void *disk)
{
    delete_disk((struct disk *)disk);
}

const struct blkfuse_plugin *blkfuse_plugin_get(void)
{
    static const struct blkfuse_plugin_key keys[] = {
        { "uri", "the server's disk, like nbd://HOST, nbds://HOST (with TLS) or\n"
                 "nbd+unix:///EXPORT?socket=PATH; must be given" },
        { "connections", "how many carry data, if the server permits several: 1 to 16;\n"
                         "if not given, one for every two CPUs, at most 4" },
        { NULL, NULL },
    };
    static struct blkfuse_plugin plugin;

    blkfuse_plugin_init(&plugin);
    plugin.name = "nbd";
    plugin.version = "1.0";
    plugin.description = "a disk of an NBD server";
    plugin.keys = keys;
    plugin.open = plugin_open;
    plugin.sync = plugin_sync;
    plugin.close = plugin_close;
    return &plugin;
}

#else

/* ---- The program ---- */

static void driver_event(void *disk_, uint32_t event, int error, const char *message)
{
    struct disk *disk = (struct disk *)disk_;

    if (event == BLKFUSE_EVENT_STARTED)
        return;
    if (event == BLKFUSE_EVENT_HALTED)
        fail(disk, message, strerror(-error));
    /* It is over. A callback cannot delete the export; the main thread can. */
    kill(getpid(), SIGTERM);
}

static void driver_deleted(void *disk_)
{
    struct disk *disk = (struct disk *)disk_;

    pthread_mutex_lock(&disk->lock);
    disk->deleted = true;
    pthread_cond_broadcast(&disk->changed);
    pthread_mutex_unlock(&disk->lock);
}

static int configure(struct disk *disk, struct blkfuse_export *export_, const char *file,
                     char **settings)
{
    if (blkfuse_export_set_str(export_, "mountpoint", file) < 0 ||
        blkfuse_export_set_str(export_, "source", disk->uri) < 0 ||
        blkfuse_export_set_bool(export_, "writable", !disk->read_only) < 0 ||
        (disk->max_request < MAX_REQUEST &&
         blkfuse_export_set_u64(export_, "max-request", (uint64_t)disk->max_request) < 0) ||
        /* A queue for each connection that carries data, run by its thread. */
        blkfuse_export_set_u64(export_, "queues", disk->count - disk->first_data) < 0 ||
        blkfuse_export_set_str(export_, "threads", "host") < 0)
        return -1;
    for (; *settings; settings++) {
        char *value = strchr(*settings, '=');

        if (strncmp(*settings, "connections=", 12) == 0)
            continue;
        if (value)
            *value++ = '\0';
        if (blkfuse_export_set_str(export_, *settings, value ? value : "on") < 0)
            return -1;
    }
    return 0;
}

/* Deletes the export. What a server that does not answer still has then fails
   when the connections end; on_end() sees to that. */
static void finish(struct disk *disk, struct blkfuse_export *export_)
{
    if (blkfuse_export_delete_wait(&export_, PATIENCE_MS) == -ETIMEDOUT)
        fail(disk, disk->uri, "the server does not answer; what it was asked for fails");
    end_connections(disk);
    pthread_mutex_lock(&disk->lock);
    while (!disk->deleted)
        pthread_cond_wait(&disk->changed, &disk->lock);
    pthread_mutex_unlock(&disk->lock);
}

/* Shows the disk. Once its queues are there, so are the threads that run them. */
static struct blkfuse_export *start(struct disk *disk, const char *file, char **settings)
{
    struct blkfuse_export *export_ = NULL;
    unsigned i;

    driver_init(disk);
    disk->ops.event = driver_event;
    disk->ops.deleted = driver_deleted;
    if (blkfuse_export_create(&export_, &disk->ops, disk) < 0 ||
        configure(disk, export_, file, settings) < 0 || blkfuse_export_start(export_) < 0) {
        snprintf(disk->error, sizeof(disk->error), "%s", blkfuse_error_message());
        blkfuse_export_delete_wait(&export_, -1);
        return NULL;
    }
    for (i = disk->first_data; i < disk->count; i++)
        disk->connections[i].queue = blkfuse_export_get_queue(export_, i - disk->first_data);
    if (start_threads(disk) < 0) {
        finish(disk, export_);
        return NULL;
    }
    return export_;
}

/* Takes the settings that the connections depend on, or the other way round. */
static int take_settings(struct disk *disk, char **settings)
{
    for (; *settings; settings++) {
        if (strncmp(*settings, "connections=", 12) == 0 &&
            set_connections(disk, *settings + 12) < 0)
            return -1;
        if (strncmp(*settings, "queues=", 7) == 0 || strncmp(*settings, "threads=", 8) == 0)
            return complain(disk, *settings, "each connection that carries data has a queue and a "
                                             "thread; set connections=N");
    }
    return 0;
}

int main(int argc, char **argv)
{
    struct blkfuse_export *export_ = NULL;
    struct disk *disk;
    sigset_t signals;
    int number, status = 1;

    if (argc < 3) {
        fprintf(stderr, "usage: nbd URI FILE [KEY=VALUE]...\n");
        return 2;
    }
    disk = new_disk();
    if (!disk)
        return 1;
    disk->uri = argv[1];
    /* Before there are threads, so that all of them block these signals. */
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &signals, NULL);
    signal(SIGPIPE, SIG_IGN);

    if (take_settings(disk, argv + 3) == 0 && connect_disk(disk) == 0)
        export_ = start(disk, argv[2], argv + 3);
    if (export_) {
        printf("%s shows %s until this ends\n", argv[2], disk->uri);
        fflush(stdout);
        sigwait(&signals, &number);
        finish(disk, export_);
        status = disk->failed;
    } else {
        fprintf(stderr, "nbd: %s\n", disk->error);
    }
    delete_disk(disk);
    return status;
}

#endif
