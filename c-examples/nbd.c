/*
 * nbd.c - a disk of an NBD server, shown as a file.
 *
 *   cc nbd.c -o nbd $(pkg-config --cflags --libs blkfuse libnbd) -pthread
 *   touch disk && ./nbd nbd://server/export disk [KEY=VALUE]...  (Ctrl-C ends it)
 *
 * The URI is what libnbd takes: nbd://HOST, nbds://HOST (with TLS),
 * nbd+unix:///EXPORT?socket=PATH. The keys are the properties of an export,
 * and connections=N: so many carry data (1 to 16; as many as there are CPUs,
 * at most 4, if not given). A server that does not say that several connections
 * see the same disk gets a single one.
 *
 * If a connection breaks, the requests on it fail with EIO, and so does all
 * that comes later; the file stays until this program ends.
 *
 * Callbacks send their requests themselves, and a thread for each connection
 * takes the replies and completes the requests. The data go between the socket
 * and the requests' own buffers.
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
#include <unistd.h>

#include <blkfuse.h>
#include <libnbd.h>

#define MAX_CONNECTIONS 16
/* libnbd can zero, or ask about, less than 4 GiB at a time. */
#define MAX_RANGE (UINT64_C(1) << 30)
/* How long the server has for the last requests when this program is to end. */
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
    void *buffer;
    const void *data;
    struct blkfuse_extent *extent;
};

struct list {
    struct job *first, **end;
};

struct connection {
    pthread_t thread;  /* takes replies */
    struct list again; /* the thread's: what has more pieces to do */
    int wake;          /* an eventfd, to have the thread look around */
    /* Closed by the thread when it ends; whoever else uses it holds the lock,
       and has looked at `lost`. */
    struct nbd_handle *nbd;
    pthread_mutex_t lock;
    bool ending;
    bool lost; /* takes no job any more */
};

static struct {
    const char *uri;
    /* The first does what is neither read nor write; the data connections are
       those from `first_data` on, which is 0 if there is just one in all. */
    struct connection connections[MAX_CONNECTIONS + 1];
    unsigned count, first_data;
    int64_t size;
    int64_t block_size;
    int64_t max_request;
    bool read_only, multi_conn, can_flush, can_zero, can_status;
} disk;

static struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool deleted, failed;
} host = { PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, false, false };

/* Says what has gone wrong first; the program's status will say that, too. */
static void fail(const char *what, const char *why)
{
    pthread_mutex_lock(&host.lock);
    if (!host.failed)
        fprintf(stderr, "nbd: %s: %s\n", what, why);
    host.failed = true;
    pthread_mutex_unlock(&host.lock);
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

    if (job->kind == ZERO && job->result == 0 && job->bytes > 0)
        list_append(&job->connection->again, job);
    else
        blkfuse_request_complete(job->request, job->result);
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

/* Sends a job, or the next piece of it. */
static void issue(struct job *job)
{
    struct nbd_handle *nbd = job->connection->nbd;
    nbd_completion_callback completion = { on_completion, job, on_end };
    nbd_extent_callback extents = { on_extents, job, NULL };
    uint64_t offset = job->offset, piece;

    job->result = -EIO; /* unless on_completion() comes */
    switch (job->kind) {
    case READ:
        nbd_aio_pread(nbd, job->buffer, job->bytes, offset, completion, 0);
        break;
    case WRITE:
        nbd_aio_pwrite(nbd, job->data, job->bytes, offset, completion, 0);
        break;
    case FLUSH:
        nbd_aio_flush(nbd, completion, 0);
        break;
    case ZERO:
        piece = job->bytes < MAX_RANGE ? job->bytes : MAX_RANGE;
        job->offset += piece;
        job->bytes -= piece;
        nbd_aio_zero(nbd, piece, offset, completion, job->flags);
        break;
    case STATUS:
        nbd_aio_block_status(nbd, job->bytes < MAX_RANGE ? job->bytes : MAX_RANGE, offset,
                             extents, completion, 0);
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

/* Has the server's side of the connection go on, as far as it can. False if
   that is over. */
static bool notify(struct connection *connection, short events)
{
    struct nbd_handle *nbd = connection->nbd;

    /* One at a time: what the first does may make the other wrong. */
    if (events & (POLLIN | POLLHUP))
        return nbd_aio_notify_read(nbd) == 0 && !nbd_aio_is_closed(nbd) && !nbd_aio_is_dead(nbd);
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
        struct pollfd fds[2] = { { -1, 0, 0 }, { connection->wake, POLLIN, 0 } };
        unsigned direction;

        issue_all(list_take_all(&connection->again));
        fds[0].fd = nbd_aio_get_fd(nbd);
        direction = nbd_aio_get_direction(nbd);
        if (fds[0].fd < 0 || direction == 0)
            return false; /* sending has found it broken */
        fds[0].events = (direction & LIBNBD_AIO_DIRECTION_READ ? POLLIN : 0) |
                        (direction & LIBNBD_AIO_DIRECTION_WRITE ? POLLOUT : 0);
        if (poll(fds, 2, -1) < 0 && errno != EINTR)
            return false;
        if (fds[1].revents && eventfd_read(connection->wake, &count) == 0 && is_ending(connection))
            return true;
        if (fds[0].revents && !notify(connection, fds[0].revents))
            return false;
    }
}

/* From now on all requests are refused. */
static void lose_all(void)
{
    unsigned i;

    for (i = 0; i < disk.count; i++) {
        pthread_mutex_lock(&disk.connections[i].lock);
        disk.connections[i].lost = true;
        pthread_mutex_unlock(&disk.connections[i].lock);
    }
}

static void *run(void *connection_)
{
    struct connection *connection = (struct connection *)connection_;
    struct job *job, *next;

    if (serve(connection)) {
        nbd_aio_disconnect(connection->nbd, 0);
    } else {
        const char *error = nbd_get_error();

        fail(disk.uri, error ? error : "the server has closed a connection");
    }
    lose_all();
    nbd_close(connection->nbd); /* ends what is in flight, by on_end() */
    for (job = connection->again.first; job; job = next) {
        next = job->next;
        blkfuse_request_complete(job->request, -EIO);
    }
    return NULL;
}

/* ---- The driver: turns callbacks into jobs ---- */

static int64_t driver_length(void *opaque)
{
    (void)opaque;
    return disk.size;
}

static void driver_limits(void *opaque, struct blkfuse_limits *limits)
{
    (void)opaque;
    limits->block_size = (uint32_t)disk.block_size;
}

static int driver_queue_start(void *opaque, uint32_t queue, void **queue_ctx)
{
    (void)opaque;
    *queue_ctx = &disk.connections[disk.first_data + queue % (disk.count - disk.first_data)];
    return 0;
}

static struct job *job_of(struct blkfuse_request *request, enum kind kind, uint64_t offset,
                          uint64_t bytes)
{
    struct job *job = (struct job *)blkfuse_request_ctx(request);

    memset(job, 0, sizeof(*job));
    job->request = request;
    job->kind = kind;
    job->offset = offset;
    job->bytes = bytes;
    job->connection = kind == READ || kind == WRITE
                          ? (struct connection *)blkfuse_request_queue_ctx(request)
                          : &disk.connections[0];
    return job;
}

static int driver_read(void *opaque, struct blkfuse_request *request, void *buffer,
                       uint64_t offset, uint64_t bytes, uint32_t flags)
{
    struct job *job = job_of(request, READ, offset, bytes);

    (void)opaque;
    job->buffer = buffer;
    return flags ? -ENOTSUP : submit(job);
}

static int driver_write(void *opaque, struct blkfuse_request *request, const void *buffer,
                        uint64_t offset, uint64_t bytes, uint32_t flags)
{
    struct job *job = job_of(request, WRITE, offset, bytes);

    (void)opaque;
    job->data = buffer;
    return flags ? -ENOTSUP : submit(job);
}

static int driver_flush(void *opaque, struct blkfuse_request *request, uint32_t flags)
{
    (void)opaque;
    return flags ? -ENOTSUP : submit(job_of(request, FLUSH, 0, 0));
}

/* It serves for discarding, too: NBD's own command for that, trim, does not
   promise that zeroes are read afterwards. */
static int driver_write_zeroes(void *opaque, struct blkfuse_request *request, uint64_t offset,
                               uint64_t bytes, uint32_t flags)
{
    struct job *job = job_of(request, ZERO, offset, bytes);

    (void)opaque;
    if (flags & ~(uint32_t)BLKFUSE_MAY_UNMAP)
        return -ENOTSUP;
    job->flags = flags & BLKFUSE_MAY_UNMAP ? 0 : LIBNBD_CMD_FLAG_NO_HOLE;
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
    /* Data, if the server does not say anything. */
    extent->bytes = bytes;
    extent->flags = 0;
    return submit(job);
}

static void driver_event(void *opaque, uint32_t event, int error, const char *message)
{
    (void)opaque;
    if (event == BLKFUSE_EVENT_STARTED)
        return;
    if (event == BLKFUSE_EVENT_HALTED)
        fail(message, strerror(-error));
    /* It is over. A callback cannot delete the export; the main thread can. */
    kill(getpid(), SIGTERM);
}

static void driver_deleted(void *opaque)
{
    (void)opaque;
    pthread_mutex_lock(&host.lock);
    host.deleted = true;
    pthread_cond_broadcast(&host.changed);
    pthread_mutex_unlock(&host.lock);
}

/* ---- Connecting ---- */

static int complain(const char *what, const char *why)
{
    fprintf(stderr, "nbd: %s: %s\n", what, why);
    return -1;
}

/* Opens one more connection. Without structured replies a reply of data has one
   header less; only the first needs them, to ask what is a hole. */
static int open_connection(bool structured)
{
    struct connection *connection = &disk.connections[disk.count];
    struct nbd_handle *nbd = nbd_create();

    if (!nbd)
        return complain(disk.uri, nbd_get_error());
    if (nbd_set_uri_allow_local_file(nbd, true) < 0 ||
        nbd_set_request_structured_replies(nbd, structured) < 0 ||
        /* Else a reply could leave parts of a buffer as they were. */
        nbd_set_pread_initialize(nbd, structured) < 0 ||
        (structured && nbd_add_meta_context(nbd, LIBNBD_CONTEXT_BASE_ALLOCATION) < 0) ||
        nbd_connect_uri(nbd, disk.uri) < 0) {
        complain(disk.uri, nbd_get_error());
        nbd_close(nbd);
        return -1;
    }
    connection->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (connection->wake < 0) {
        complain("eventfd", strerror(errno));
        nbd_close(nbd);
        return -1;
    }
    connection->nbd = nbd;
    pthread_mutex_init(&connection->lock, NULL);
    list_clear(&connection->again);
    disk.count++;
    return 0;
}

/* Learns what the disk is like. */
static int ask(struct nbd_handle *nbd)
{
    int64_t least = nbd_get_block_size(nbd, LIBNBD_SIZE_MINIMUM);
    int64_t preferred = nbd_get_block_size(nbd, LIBNBD_SIZE_PREFERRED);
    int64_t most = nbd_get_block_size(nbd, LIBNBD_SIZE_MAXIMUM);

    disk.size = nbd_get_size(nbd);
    if (disk.size < 0)
        return complain(disk.uri, nbd_get_error());
    if (least > 1)
        return complain(disk.uri, "the server takes only whole blocks; put nbdkit with its "
                                  "blocksize filter between");
    if (most > 0 && most < 65536)
        return complain(disk.uri, "the server takes only requests of less than 64 KiB; put nbdkit "
                                  "with its blocksize filter between");
    disk.max_request = most > 0 && most < 1048576 ? most & ~INT64_C(4095) : 0;
    disk.block_size = 4096;
    if (preferred >= 512 && preferred <= 1048576 && (preferred & (preferred - 1)) == 0)
        disk.block_size = preferred;
    disk.read_only = nbd_is_read_only(nbd) > 0;
    disk.multi_conn = nbd_can_multi_conn(nbd) > 0;
    disk.can_flush = nbd_can_flush(nbd) > 0;
    disk.can_zero = nbd_can_zero(nbd) > 0;
    disk.can_status = nbd_can_meta_context(nbd, LIBNBD_CONTEXT_BASE_ALLOCATION) > 0;
    return 0;
}

/* Opens all connections: `wanted` for data, or as many as are good if that is
   0. */
static int connect_disk(unsigned wanted)
{
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);

    if (open_connection(true) < 0 || ask(disk.connections[0].nbd) < 0)
        return -1;
    if (!disk.multi_conn)
        return 0;
    if (wanted == 0)
        wanted = cpus < 1 ? 1 : cpus > 4 ? 4 : (unsigned)cpus;
    disk.first_data = 1;
    while (disk.count < 1 + wanted) {
        if (open_connection(false) < 0)
            return -1;
        if (nbd_get_size(disk.connections[disk.count - 1].nbd) != disk.size)
            return complain(disk.uri, "its connections show disks of different sizes");
    }
    return 0;
}

/* Ends the connections from `started` on, and the threads of the others. */
static void end_connections(unsigned started)
{
    unsigned i;

    for (i = 0; i < started; i++) {
        pthread_mutex_lock(&disk.connections[i].lock);
        disk.connections[i].ending = true;
        pthread_mutex_unlock(&disk.connections[i].lock);
        eventfd_write(disk.connections[i].wake, 1);
    }
    for (i = 0; i < disk.count; i++) {
        if (i < started)
            pthread_join(disk.connections[i].thread, NULL);
        else
            nbd_close(disk.connections[i].nbd);
        close(disk.connections[i].wake);
    }
}

/* ---- The program ---- */

static int configure(struct blkfuse_export *export_, const char *file, int count, char **settings)
{
    int i;

    if (blkfuse_export_set_str(export_, "mountpoint", file) < 0 ||
        blkfuse_export_set_str(export_, "source", disk.uri) < 0 ||
        blkfuse_export_set_bool(export_, "writable", !disk.read_only) < 0 ||
        (disk.max_request > 0 &&
         blkfuse_export_set_u64(export_, "max-request", (uint64_t)disk.max_request) < 0))
        return -1;
    for (i = 0; i < count; i++) {
        char *value = strchr(settings[i], '=');

        if (strncmp(settings[i], "connections=", 12) == 0)
            continue;
        if (value)
            *value++ = '\0';
        if (blkfuse_export_set_str(export_, settings[i], value ? value : "on") < 0)
            return -1;
    }
    return 0;
}

static struct blkfuse_export *start(const char *file, int count, char **settings)
{
    struct blkfuse_export *export_ = NULL;
    struct blkfuse_driver_ops ops;

    blkfuse_driver_ops_init(&ops);
    ops.request_ctx_size = sizeof(struct job);
    ops.length = driver_length;
    ops.limits = driver_limits;
    ops.read = driver_read;
    ops.write = disk.read_only ? NULL : driver_write;
    ops.flush = disk.can_flush ? driver_flush : NULL;
    ops.write_zeroes = disk.can_zero ? driver_write_zeroes : NULL;
    ops.block_status = disk.can_status ? driver_block_status : NULL;
    ops.queue_start = driver_queue_start;
    ops.event = driver_event;
    ops.deleted = driver_deleted;
    if (blkfuse_export_create(&export_, &ops, NULL) < 0 ||
        configure(export_, file, count, settings) < 0 || blkfuse_export_start(export_) < 0) {
        fprintf(stderr, "nbd: %s\n", blkfuse_error_message());
        blkfuse_export_delete_wait(&export_, -1);
    }
    return export_;
}

/* Deletes the export. What a server that does not answer still has then fails
   when the connections end; on_end() sees to that. */
static void finish(struct blkfuse_export *export_, unsigned started)
{
    if (blkfuse_export_delete_wait(&export_, PATIENCE_MS) == -ETIMEDOUT)
        fail(disk.uri, "the server does not answer; what it was asked for fails");
    end_connections(started);
    pthread_mutex_lock(&host.lock);
    while (!host.deleted)
        pthread_cond_wait(&host.changed, &host.lock);
    pthread_mutex_unlock(&host.lock);
}

/* The value of the setting "connections", or 0. */
static int wanted_connections(int count, char **settings, unsigned *wanted)
{
    int i;

    *wanted = 0;
    for (i = 0; i < count; i++) {
        char *end;

        if (strncmp(settings[i], "connections=", 12) != 0)
            continue;
        *wanted = (unsigned)strtoul(settings[i] + 12, &end, 10);
        if (*end || *wanted < 1 || *wanted > MAX_CONNECTIONS)
            return complain(settings[i], "must be 1 to 16");
    }
    return 0;
}

int main(int argc, char **argv)
{
    struct blkfuse_export *export_ = NULL;
    unsigned started = 0, wanted;
    sigset_t signals;
    int number;

    if (argc < 3) {
        fprintf(stderr, "usage: nbd URI FILE [KEY=VALUE]...\n");
        return 2;
    }
    disk.uri = argv[1];
    /* Before there are threads, so that all of them block these signals. */
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &signals, NULL);
    signal(SIGPIPE, SIG_IGN);

    if (wanted_connections(argc - 3, argv + 3, &wanted) == 0 && connect_disk(wanted) == 0) {
        while (started < disk.count &&
               pthread_create(&disk.connections[started].thread, NULL, run,
                              &disk.connections[started]) == 0)
            started++;
        if (started == disk.count)
            export_ = start(argv[2], argc - 3, argv + 3);
        else
            complain("a connection", "cannot start its thread");
    }
    if (!export_) {
        end_connections(started);
        return 1;
    }
    printf("%s shows %s until this ends\n", argv[2], disk.uri);
    fflush(stdout);
    sigwait(&signals, &number);
    finish(export_, started);
    return host.failed;
}
