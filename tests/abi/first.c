/*
 * first.c - a host as it was written for the first release, with everything
 * that one had. It is compiled against that release's header and must go on
 * working with every library called libblkfuse.so.0. Do not adapt it to
 * anything newer.
 *
 *   first MOUNTPOINT
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <blkfuse.h>

#define SIZE (1 << 20)
#define HALF (SIZE / 2)

#define CHECK(condition) ((condition) ? (void)0 : die(__LINE__, #condition))

static void die(int line, const char *what)
{
    fprintf(stderr, "first.c:%d: %s\n  errno: %s\n  blkfuse: %s\n", line, what, strerror(errno),
            blkfuse_error_message());
    _exit(1);
}

/* How often each callback came; queues call at once. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

enum { LENGTH, ALLOCATED, LIMITS, READ, WRITE, FLUSH, DISCARD, ZEROES, TRUNCATE, STATUS, QUEUES,
       QUEUES_ENDED, BATCHES, BATCHES_ENDED, IDLE, STARTED, DELETED, LOGGED, CALLS };

static int calls[CALLS];

static void called(int what)
{
    pthread_mutex_lock(&lock);
    calls[what]++;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static int count(int what)
{
    int value;

    pthread_mutex_lock(&lock);
    value = calls[what];
    pthread_mutex_unlock(&lock);
    return value;
}

/* Returns when it has been called; the test's watchdog ends a wait in vain. */
static void await(int what)
{
    pthread_mutex_lock(&lock);
    while (!calls[what])
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

/* The device's first half is in memory, the second in a file. */
struct disk {
    char memory[HALF];
    int file;
    int64_t length;
};

struct scratch {
    long double aligned;
    char more[48];
};

static int64_t disk_length(void *opaque)
{
    called(LENGTH);
    return ((struct disk *)opaque)->length;
}

static int64_t disk_allocated(void *opaque)
{
    (void)opaque;
    called(ALLOCATED);
    return 3 * 512;
}

static void disk_limits(void *opaque, struct blkfuse_limits *limits)
{
    (void)opaque;
    called(LIMITS);
    CHECK(limits->struct_size >= sizeof(*limits) && limits->block_size == 4096);
    limits->block_size = 8192;
}

/* What every request brings with it. */
static void check_request(void *opaque, struct blkfuse_request *request)
{
    struct scratch *scratch = blkfuse_request_ctx(request);

    CHECK(scratch && (uintptr_t)scratch % _Alignof(struct scratch) == 0);
    memset(scratch, 0x5a, sizeof(*scratch));
    CHECK(blkfuse_request_queue_ctx(request) == opaque);
}

static int disk_read(void *opaque, struct blkfuse_request *request, void *buffer, uint64_t offset,
                     uint64_t bytes, uint32_t flags)
{
    struct disk *disk = opaque;

    called(READ);
    check_request(opaque, request);
    CHECK(flags == 0);
    if (offset >= HALF)
        return blkfuse_request_forward(request, disk->file, offset - HALF);
    if (offset + bytes > HALF) { /* the kernel reads ahead */
        uint64_t rest = offset + bytes - HALF;

        bytes -= rest;
        CHECK(pread(disk->file, (char *)buffer + bytes, rest, 0) == (ssize_t)rest);
    }
    memcpy(buffer, disk->memory + offset, bytes);
    CHECK(blkfuse_request_complete(request, 0) == 0);
    return BLKFUSE_PENDING;
}

static int disk_write(void *opaque, struct blkfuse_request *request, const void *buffer,
                      uint64_t offset, uint64_t bytes, uint32_t flags)
{
    struct disk *disk = opaque;

    called(WRITE);
    check_request(opaque, request);
    CHECK(flags == 0);
    if (offset >= HALF)
        return blkfuse_request_forward(request, disk->file, offset - HALF);
    if (offset + bytes > HALF)
        return -EINVAL;
    memcpy(disk->memory + offset, buffer, bytes);
    return 0;
}

static int disk_flush(void *opaque, struct blkfuse_request *request, uint32_t flags)
{
    called(FLUSH);
    check_request(opaque, request);
    CHECK(flags == 0);
    return 0;
}

static int disk_discard(void *opaque, struct blkfuse_request *request, uint64_t offset,
                        uint64_t bytes, uint32_t flags)
{
    called(DISCARD);
    check_request(opaque, request);
    CHECK(flags == 0 && offset + bytes <= SIZE);
    return -ENOTSUP;
}

static int disk_write_zeroes(void *opaque, struct blkfuse_request *request, uint64_t offset,
                             uint64_t bytes, uint32_t flags)
{
    called(ZEROES);
    check_request(opaque, request);
    CHECK((flags & ~BLKFUSE_MAY_UNMAP) == 0 && offset + bytes <= HALF);
    memset(((struct disk *)opaque)->memory + offset, 0, bytes);
    return 0;
}

static int disk_truncate(void *opaque, struct blkfuse_request *request, uint64_t length,
                         uint32_t flags)
{
    called(TRUNCATE);
    check_request(opaque, request);
    CHECK(flags == 0);
    ((struct disk *)opaque)->length = length;
    return 0;
}

static int disk_block_status(void *opaque, struct blkfuse_request *request, uint64_t offset,
                             uint64_t bytes, struct blkfuse_extent *extent, uint32_t flags)
{
    called(STATUS);
    check_request(opaque, request);
    CHECK(flags == 0 && bytes > 0);
    extent->flags = offset < HALF ? 0 : BLKFUSE_EXTENT_HOLE;
    extent->bytes = offset < HALF ? HALF - offset : SIZE - offset;
    return 0;
}

static int disk_queue_start(void *opaque, uint32_t queue, void **queue_ctx)
{
    CHECK(queue < 2);
    *queue_ctx = opaque;
    called(QUEUES);
    return 0;
}

static void disk_queue_stop(void *opaque, uint32_t queue, void *queue_ctx)
{
    CHECK(queue < 2 && queue_ctx == opaque);
    called(QUEUES_ENDED);
}

static void disk_batch_begin(void *opaque, uint32_t queue, void *queue_ctx)
{
    CHECK(queue < 2 && queue_ctx == opaque);
    called(BATCHES);
}

static void disk_batch_end(void *opaque, uint32_t queue, void *queue_ctx)
{
    CHECK(queue < 2 && queue_ctx == opaque);
    called(BATCHES_ENDED);
}

static void disk_idle(void *opaque)
{
    (void)opaque;
    called(IDLE);
}

static void disk_event(void *opaque, uint32_t event, int error, const char *message)
{
    (void)opaque;
    CHECK(message != NULL);
    CHECK(event != BLKFUSE_EVENT_HALTED && event != BLKFUSE_EVENT_UNMOUNTED);
    if (event == BLKFUSE_EVENT_STARTED) {
        CHECK(error == 0);
        called(STARTED);
    }
}

static void disk_deleted(void *opaque)
{
    (void)opaque;
    called(DELETED);
}

static int no_backing_fd(void *opaque)
{
    (void)opaque;
    return -ENOTSUP;
}

static void take_log(void *opaque, uint32_t level, const char *message)
{
    CHECK(opaque == calls && level >= BLKFUSE_LOG_ERROR && level <= BLKFUSE_LOG_DEBUG && message);
    called(LOGGED);
}

/* Memory of `bytes` bytes behind which there is none: whoever thinks that
   the struct in it is as long as a newer one crashes. */
static void *at_the_edge(size_t bytes)
{
    long page = sysconf(_SC_PAGESIZE);
    char *pages = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    CHECK(pages != MAP_FAILED && mprotect(pages + page, page, PROT_NONE) == 0);
    return pages + page - bytes;
}

static void use(const char *path, struct blkfuse_export *export_)
{
    static const char text[] = "the first release";
    char back[sizeof(text)];
    struct stat status;
    int fd = open(path, O_RDWR | O_CLOEXEC);

    CHECK(fd >= 0 && fstat(fd, &status) == 0);
    CHECK(status.st_size == SIZE && status.st_blksize == 8192 && status.st_blocks == 3);
    CHECK(pwrite(fd, text, sizeof(text), 1000) == sizeof(text));
    CHECK(pwrite(fd, text, sizeof(text), HALF + 1000) == sizeof(text));
    CHECK(fsync(fd) == 0);
    CHECK(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) == 0);
    CHECK(pread(fd, back, sizeof(back), 1000) == sizeof(back) && !memcmp(back, text, sizeof(back)));
    CHECK(pread(fd, back, sizeof(back), HALF + 1000) == sizeof(back) &&
          !memcmp(back, text, sizeof(back)));
    CHECK(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096) == 0);
    CHECK(fallocate(fd, FALLOC_FL_ZERO_RANGE, 4096, 4096) == 0);
    CHECK(pread(fd, back, sizeof(back), 1000) == sizeof(back) && back[0] == 0);
    CHECK(lseek(fd, 0, SEEK_HOLE) == HALF);
    CHECK(ftruncate(fd, SIZE - 4096) == 0 && fstat(fd, &status) == 0);
    CHECK(status.st_size == SIZE - 4096);
    CHECK(blkfuse_export_stop(export_, BLKFUSE_STOP_IF_IDLE) == -EBUSY);
    CHECK(close(fd) == 0);
}

static void drain(struct blkfuse_export *export_)
{
    CHECK(blkfuse_export_drain_begin(export_) == 0);
    while (blkfuse_export_drain_poll(export_) == 1)
        await(IDLE);
    CHECK(blkfuse_export_drain_poll(export_) == 0);
    CHECK(blkfuse_export_drain_end(export_) == 0);
    CHECK(blkfuse_export_drain_end(export_) == -EINVAL);
    CHECK(blkfuse_export_drain(export_, 10000) == 0);
}

static void check_properties(struct blkfuse_export *export_, const char *path)
{
    char text[4096];
    uint64_t number = 0;
    bool flag = false;

    CHECK(blkfuse_export_get_str(export_, "mountpoint", text, sizeof(text)) == (int)strlen(path));
    CHECK(strcmp(text, path) == 0);
    CHECK(blkfuse_export_get_str(export_, "mountpoint", text, 1) == -ERANGE);
    CHECK(blkfuse_export_get_u64(export_, "queues", &number) == 0 && number == 2);
    CHECK(blkfuse_export_get_bool(export_, "writable", &flag) == 0 && flag);
    CHECK(blkfuse_export_get_bool(export_, "growable", &flag) == 0 && !flag);
    CHECK(blkfuse_export_get_str(export_, "state", text, sizeof(text)) == (int)strlen("started"));
    CHECK(strcmp(text, "started") == 0);
    CHECK(blkfuse_export_get_str(export_, "transport", text, sizeof(text)) > 0);
    CHECK(strcmp(text, "/dev/fuse") == 0 || strcmp(text, "io_uring") == 0);
    CHECK(blkfuse_export_get_u64(export_, "max-request", &number) == 0 && number == 131072);
    CHECK(blkfuse_export_get_bool(export_, "colour", &flag) == -ENOENT);
    CHECK(blkfuse_export_set_bool(export_, "writable", false) == -EBUSY);
    CHECK(blkfuse_error_message()[0] != '\0');
}

int main(int argc, char **argv)
{
    static struct disk disk = { .file = -1, .length = SIZE };
    const struct blkfuse_driver_ops filled = {
        BLKFUSE_DRIVER_OPS_INIT,
        .request_ctx_size = sizeof(struct scratch),
        .length = disk_length,
        .allocated_size = disk_allocated,
        .limits = disk_limits,
        .read = disk_read,
        .write = disk_write,
        .flush = disk_flush,
        .discard = disk_discard,
        .write_zeroes = disk_write_zeroes,
        .truncate = disk_truncate,
        .block_status = disk_block_status,
        .queue_start = disk_queue_start,
        .queue_stop = disk_queue_stop,
        .batch_begin = disk_batch_begin,
        .batch_end = disk_batch_end,
        .idle = disk_idle,
        .event = disk_event,
        .deleted = disk_deleted,
        .backing_fd = no_backing_fd,
    };
    struct blkfuse_driver_ops *ops = at_the_edge(sizeof(*ops));
    struct blkfuse_stats *stats = at_the_edge(sizeof(*stats));
    struct blkfuse_export *export_ = NULL;
    uint64_t slow = 0;
    int i;

    CHECK(argc == 2);
    CHECK(blkfuse_version() >= BLKFUSE_VERSION);
    CHECK(blkfuse_set_log_callback(BLKFUSE_LOG_DEBUG, take_log, calls) == 0);
    disk.file = memfd_create("second half", MFD_CLOEXEC);
    CHECK(disk.file >= 0 && ftruncate(disk.file, HALF) == 0);

    blkfuse_driver_ops_init(ops);
    CHECK(ops->struct_size == sizeof(*ops) && ops->api_version == BLKFUSE_API_VERSION);
    memcpy(ops, &filled, sizeof(*ops));
    CHECK(blkfuse_export_create(&export_, ops, &disk) == 0 && export_);
    CHECK(blkfuse_export_set_str(export_, "mountpoint", argv[1]) == 0);
    CHECK(blkfuse_export_set_u64(export_, "queues", 2) == 0);
    CHECK(blkfuse_export_set_u64(export_, "max-request", 131072) == 0);
    CHECK(blkfuse_export_set_bool(export_, "writable", true) == 0);
    CHECK(blkfuse_export_start(export_) == 0);
    check_properties(export_, argv[1]);
    use(argv[1], export_);
    drain(export_);
    CHECK(blkfuse_export_resized(export_) == 0);

    CHECK(blkfuse_export_get_stats(export_, stats, sizeof(*stats)) == 0);
    CHECK(stats->read.operations >= 3 && stats->read.bytes > 0 && stats->read.errors == 0);
    CHECK(stats->write.operations >= 2 && stats->write.bytes > 0 && stats->write.errors == 0);
    CHECK(stats->flush.operations >= 2 && stats->allocate.operations >= 2);
    CHECK(stats->other.operations > 0);
    for (i = 0; i < 32; i++)
        slow += stats->latency[i];
    CHECK(slow == stats->read.operations + stats->write.operations);

    CHECK(blkfuse_export_stop(export_, 0) == 0);
    CHECK(blkfuse_export_delete_wait(&export_, 10000) == 0 && !export_);
    CHECK(blkfuse_export_delete(&export_) == 0);
    CHECK(blkfuse_set_log_callback(0, NULL, NULL) == 0);
    for (i = 0; i < CALLS; i++)
        if (i != IDLE && !count(i)) {
            fprintf(stderr, "first.c: callback %d never came\n", i);
            return 1;
        }
    CHECK(count(QUEUES) == 2 && count(QUEUES_ENDED) == 2);
    CHECK(count(BATCHES) == count(BATCHES_ENDED));
    CHECK(count(STARTED) == 1 && count(DELETED) == 1);
    return 0;
}
