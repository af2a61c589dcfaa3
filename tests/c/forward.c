/* forward.c - requests that are forwarded: to where, when, from which thread. */
#include "harness.h"

/* Where in the image the device begins. */
#define START 12345

static int image;

/* What the read callback does. */
static enum { NOW, NOW_AND_RETURN, TWICE, TOO_LATE, LATER, NOWHERE } manner;
static int target;

static struct blkfuse_request *last;
static uint64_t last_offset;
static struct flag calls = FLAG;

static int forward(struct blkfuse_request *request, uint64_t offset)
{
    int result = blkfuse_request_forward(request, target, START + offset);

    CHECK(result == BLKFUSE_PENDING);
    return result;
}

static int forward_read(void *opaque, struct blkfuse_request *request, void *buffer,
                        uint64_t offset, uint64_t bytes, uint32_t flags)
{
    int result = BLKFUSE_PENDING;

    (void)opaque, (void)buffer, (void)bytes;
    CHECK(flags == 0);
    last = request;
    last_offset = offset;
    switch (manner) {
    case NOW:
        result = forward(request, offset);
        break;
    case NOW_AND_RETURN:
        forward(request, offset);
        result = -EPERM;
        break;
    case TWICE:
        result = forward(request, offset);
        REFUSED(blkfuse_request_forward(request, target, 0), EALREADY);
        REFUSED(blkfuse_request_complete(request, -EPERM), EALREADY);
        break;
    case TOO_LATE:
        CHECK(blkfuse_request_complete(request, -EDQUOT) == 0);
        REFUSED(blkfuse_request_forward(request, target, START + offset), EALREADY);
        break;
    case LATER:
        break;
    case NOWHERE:
        REFUSED(blkfuse_request_forward(request, -1, offset), EBADF);
        result = forward(request, offset);
        break;
    }
    flag_add(&calls);
    return result;
}

static int forward_write(void *opaque, struct blkfuse_request *request, const void *buffer,
                         uint64_t offset, uint64_t bytes, uint32_t flags)
{
    (void)opaque, (void)buffer, (void)bytes;
    CHECK(flags == 0);
    return forward(request, offset);
}

static int forward_flush(void *opaque, struct blkfuse_request *request, uint32_t flags)
{
    (void)opaque;
    CHECK(flags == 0);
    return blkfuse_request_forward(request, target, UINT64_MAX);
}

static int forward_discard(void *opaque, struct blkfuse_request *request, uint64_t offset,
                           uint64_t bytes, uint32_t flags)
{
    (void)opaque, (void)bytes;
    CHECK(flags == 0);
    return forward(request, offset);
}

static int forward_write_zeroes(void *opaque, struct blkfuse_request *request, uint64_t offset,
                                uint64_t bytes, uint32_t flags)
{
    (void)opaque, (void)bytes, (void)flags;
    return forward(request, offset);
}

static int refused_truncate(void *opaque, struct blkfuse_request *request, uint64_t length,
                            uint32_t flags)
{
    (void)opaque, (void)length, (void)flags;
    REFUSED(blkfuse_request_forward(request, target, 0), EINVAL);
    return -EROFS;
}

static int refused_block_status(void *opaque, struct blkfuse_request *request, uint64_t offset,
                                uint64_t bytes, struct blkfuse_extent *extent, uint32_t flags)
{
    (void)opaque, (void)offset, (void)bytes, (void)extent, (void)flags;
    REFUSED(blkfuse_request_forward(request, target, 0), EINVAL);
    return -EROFS;
}

static struct blkfuse_driver_ops forward_ops(void)
{
    struct blkfuse_driver_ops ops = memory_ops();

    ops.read = forward_read;
    ops.write = forward_write;
    ops.flush = forward_flush;
    ops.discard = forward_discard;
    ops.write_zeroes = forward_write_zeroes;
    ops.truncate = refused_truncate;
    ops.block_status = refused_block_status;
    return ops;
}

static struct blkfuse_export *forwarding(const char *transport)
{
    struct blkfuse_driver_ops ops = forward_ops();
    struct blkfuse_export *export_ = created(&ops, NULL);

    CHECK(blkfuse_export_set_str(export_, "io-uring", transport) == 0);
    CHECK(start(export_) == 0);
    CHECK(pwrite(image, content, SIZE, START) == SIZE);
    target = image;
    manner = NOW;
    return export_;
}

static void expect(int fd, int error)
{
    char buffer[4096];
    ssize_t n = pread(fd, buffer, sizeof(buffer), 4096);

    if (error == 0) {
        CHECK(n == sizeof(buffer));
        CHECK(memcmp(buffer, content + 4096, sizeof(buffer)) == 0);
    } else {
        CHECK(n == -1 && errno == error);
    }
}

static void within_the_callback(const char *transport)
{
    struct blkfuse_export *export_ = forwarding(transport);
    int fd = open_file(O_RDWR), write_only;

    expect(fd, 0);
    manner = NOW_AND_RETURN; /* the forward counts */
    expect(fd, 0);
    manner = TWICE;
    expect(fd, 0);
    REFUSED(blkfuse_request_complete(last, 0), EALREADY);
    REFUSED(blkfuse_request_forward(last, image, 0), EALREADY);
    manner = TOO_LATE;
    expect(fd, EDQUOT);
    manner = NOWHERE; /* what was refused changes nothing */
    expect(fd, 0);
    REFUSED(blkfuse_request_forward(NULL, image, 0), EINVAL);

    manner = NOW;
    write_only = open("/dev/null", O_WRONLY | O_CLOEXEC);
    CHECK(write_only >= 0);
    target = write_only;
    expect(fd, EBADF);
    target = 1023; /* nobody's */
    expect(fd, EBADF);
    target = image;
    expect(fd, 0);
    CHECK(ftruncate(fd, SIZE + 1) == -1 && errno == EROFS);
    CHECK(lseek(fd, 0, SEEK_HOLE) == -1 && errno == EROFS);

    close(write_only);
    close(fd);
    finished(export_);
}

static void every_operation(const char *transport)
{
    struct blkfuse_export *export_ = forwarding(transport);
    char data[8192], back[8192];
    int fd = open_file(O_RDWR);

    memset(data, 0x5a, sizeof(data));
    CHECK(pwrite(fd, data, sizeof(data), 777) == sizeof(data));
    CHECK(pread(image, back, sizeof(back), START + 777) == sizeof(back));
    CHECK(memcmp(data, back, sizeof(back)) == 0);
    CHECK(fsync(fd) == 0);

    memset(data, 0, sizeof(data));
    CHECK(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 100000, 8192) == 0);
    CHECK(fallocate(fd, FALLOC_FL_ZERO_RANGE, 200000, 8192) == 0);
    CHECK(pread(image, back, sizeof(back), START + 100000) == sizeof(back));
    CHECK(memcmp(data, back, sizeof(back)) == 0);
    CHECK(pread(image, back, sizeof(back), START + 200000) == sizeof(back));
    CHECK(memcmp(data, back, sizeof(back)) == 0);
    CHECK(pread(image, back, 1, START + 99999) == 1 && back[0] == content[99999]);
    CHECK(pread(image, back, 1, START + 208192) == 1 && back[0] == content[208192]);

    /* What the image lacks reads as zeroes. */
    CHECK(ftruncate(image, START + 300001) == 0);
    CHECK(pread(fd, back, sizeof(back), 300000) == sizeof(back));
    CHECK(back[0] == content[300000]);
    CHECK(memcmp(data, back + 1, sizeof(back) - 1) == 0);
    CHECK(pread(fd, back, sizeof(back), 500000) == sizeof(back));
    CHECK(memcmp(data, back, sizeof(back)) == 0);

    close(fd);
    finished(export_);
}

static void *delete_main(void *arg)
{
    struct blkfuse_export *export_ = (struct blkfuse_export *)arg;

    finished(export_);
    return NULL;
}

static void later(const char *transport)
{
    const struct timespec moment = { 0, 1000000 };
    struct blkfuse_export *export_ = forwarding(transport);
    struct client client;
    pthread_t deleting;
    int fd = open_file(O_RDWR), before = flag_get(&calls);

    manner = LATER;
    client_start(&client, fd, false, 8192);
    flag_wait(&calls, before + 1);
    CHECK(forward(last, last_offset) == BLKFUSE_PENDING);
    client_join(&client);
    CHECK(client.result == 4096);
    CHECK(memcmp(client.buffer, content + 8192, 4096) == 0);
    REFUSED(blkfuse_request_forward(last, image, 0), EALREADY);

    /* In a drain, too. */
    client_start(&client, fd, false, 8192);
    flag_wait(&calls, before + 2);
    CHECK(blkfuse_export_drain_begin(export_) == 0);
    CHECK(blkfuse_export_drain_poll(export_) == 1);
    CHECK(forward(last, last_offset) == BLKFUSE_PENDING);
    client_join(&client);
    CHECK(client.result == 4096);
    CHECK(blkfuse_export_drain(export_, -1) == 0);
    CHECK(blkfuse_export_drain_end(export_) == 0);

    /* And when the host is deleting the export. */
    client_start(&client, fd, false, 16384);
    flag_wait(&calls, before + 3);
    CHECK(pthread_create(&deleting, NULL, delete_main, export_) == 0);
    while (is_mounted())
        nanosleep(&moment, NULL);
    CHECK(forward(last, last_offset) == BLKFUSE_PENDING);
    client_join(&client);
    CHECK(client.result == 4096);
    CHECK(memcmp(client.buffer, content + 16384, 4096) == 0);
    close(fd);
    CHECK(pthread_join(deleting, NULL) == 0);
}

/* ---- Many requests, forwarded by a thread as they come ---- */

#define ROUNDS 500
#define CLIENTS 8
#define QUEUED 64

static struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct {
        struct blkfuse_request *request;
        uint64_t offset;
    } queued[QUEUED];
    int count;
    bool ends;
} work = { PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, { { NULL, 0 } }, 0, false };

static int queue_read(void *opaque, struct blkfuse_request *request, void *buffer, uint64_t offset,
                      uint64_t bytes, uint32_t flags)
{
    (void)opaque, (void)buffer, (void)bytes, (void)flags;
    pthread_mutex_lock(&work.lock);
    CHECK(work.count < QUEUED);
    work.queued[work.count].request = request;
    work.queued[work.count++].offset = offset;
    pthread_cond_signal(&work.changed);
    pthread_mutex_unlock(&work.lock);
    return BLKFUSE_PENDING;
}

static void *worker_main(void *arg)
{
    (void)arg;
    pthread_mutex_lock(&work.lock);
    for (;;) {
        while (work.count == 0 && !work.ends)
            pthread_cond_wait(&work.changed, &work.lock);
        if (work.count == 0)
            break;
        work.count--;
        /* Under the lock the callback cannot return first. */
        forward(work.queued[work.count].request, work.queued[work.count].offset);
    }
    pthread_mutex_unlock(&work.lock);
    return NULL;
}

static void *reader_main(void *arg)
{
    char buffer[4096];
    unsigned int n = *(const unsigned int *)arg;
    int fd = open_file(O_RDONLY), i;

    for (i = 0; i < ROUNDS; i++) {
        off_t offset;

        n = n * 1103515245 + 12345;
        offset = (off_t)(n >> 8) % (SIZE - 4096);
        CHECK(pread(fd, buffer, sizeof(buffer), offset) == sizeof(buffer));
        CHECK(memcmp(buffer, content + offset, sizeof(buffer)) == 0);
    }
    close(fd);
    return NULL;
}

static void from_another_thread(const char *transport)
{
    struct blkfuse_driver_ops ops = forward_ops();
    struct blkfuse_export *export_;
    pthread_t worker, readers[CLIENTS];
    unsigned int seeds[CLIENTS];
    int i;

    ops.read = queue_read;
    export_ = created(&ops, NULL);
    CHECK(blkfuse_export_set_str(export_, "io-uring", transport) == 0);
    CHECK(start(export_) == 0);
    CHECK(pwrite(image, content, SIZE, START) == SIZE);
    work.ends = false;
    CHECK(pthread_create(&worker, NULL, worker_main, NULL) == 0);
    for (i = 0; i < CLIENTS; i++) {
        seeds[i] = (unsigned int)i;
        CHECK(pthread_create(&readers[i], NULL, reader_main, &seeds[i]) == 0);
    }
    for (i = 0; i < 20; i++)
        CHECK(blkfuse_export_drain(export_, -1) == 0);
    for (i = 0; i < CLIENTS; i++)
        CHECK(pthread_join(readers[i], NULL) == 0);
    finished(export_);
    pthread_mutex_lock(&work.lock);
    work.ends = true;
    pthread_cond_signal(&work.changed);
    pthread_mutex_unlock(&work.lock);
    CHECK(pthread_join(worker, NULL) == 0);
}

int main(int argc, char **argv)
{
    static const char *const transports[] = { "off", "auto" };
    char path[4096];
    size_t i;

    begin(argc, argv);
    for (i = 0; i < SIZE; i++)
        content[i] = (char)(i * 7 ^ i >> 8);
    snprintf(path, sizeof(path), "%s.image", mountpoint);
    image = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CHECK(image >= 0 && unlink(path) == 0);
    for (i = 0; i < sizeof(transports) / sizeof(transports[0]); i++) {
        within_the_callback(transports[i]);
        every_operation(transports[i]);
        later(transports[i]);
        from_another_thread(transports[i]);
    }
    return 0;
}
