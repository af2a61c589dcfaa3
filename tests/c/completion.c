/* completion.c - when, how often, from where and with what requests end. */
#include "harness.h"

#include <sched.h>

/* What the read callback does. */
static enum { SYNC, EARLY, EARLY_AND_RETURN, LATER, RETURN } manner;
static int answer; /* of EARLY and RETURN */

/* What it was called with last; the flag counts its calls. */
static struct {
    struct blkfuse_request *request;
    void *buffer;
    uint64_t offset;
    uint64_t bytes;
} last;
static struct flag calls = FLAG;

static int told_read(void *opaque, struct blkfuse_request *request, void *buffer, uint64_t offset,
                     uint64_t bytes, uint32_t flags)
{
    int result = BLKFUSE_PENDING;

    memory_read(opaque, request, buffer, offset, bytes, flags);
    last.request = request;
    last.buffer = buffer;
    last.offset = offset;
    last.bytes = bytes;
    switch (manner) {
    case SYNC:
        result = 0;
        break;
    case EARLY_AND_RETURN:
        result = 0;
        /* fall through */
    case EARLY:
        CHECK(blkfuse_request_complete(request, answer) == 0);
        REFUSED(blkfuse_request_complete(request, 0), EALREADY);
        break;
    case LATER:
        memset(buffer, 0xee, bytes); /* until it is completed */
        break;
    case RETURN:
        result = answer;
        break;
    }
    flag_add(&calls);
    return result;
}

static int complete_last(int result)
{
    if (result == 0)
        memcpy(last.buffer, content + last.offset, last.bytes);
    return blkfuse_request_complete(last.request, result);
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

static void answers(void)
{
    struct blkfuse_driver_ops ops = memory_ops();
    struct blkfuse_export *export_;
    int fd;

    ops.read = told_read;
    export_ = started(&ops, NULL);
    fd = open_file(O_RDWR);

    manner = SYNC;
    expect(fd, 0);
    REFUSED(blkfuse_request_complete(last.request, 0), EALREADY);

    manner = EARLY;
    answer = 0;
    expect(fd, 0);
    REFUSED(blkfuse_request_complete(last.request, 0), EALREADY);
    answer = -ENOSPC;
    expect(fd, ENOSPC);
    answer = 7;
    expect(fd, EIO);
    manner = EARLY_AND_RETURN;
    answer = -EDQUOT; /* the completion counts */
    expect(fd, EDQUOT);

    manner = RETURN;
    answer = -EPERM;
    expect(fd, EPERM);
    answer = BLKFUSE_PENDING + 1;
    expect(fd, EIO);
    answer = 4096;
    expect(fd, EIO);
    answer = -100000;
    expect(fd, EIO);
    answer = INT32_MIN;
    expect(fd, EIO);

    manner = SYNC;
    expect(fd, 0);
    close(fd);
    finished(export_);
}

static void later(void)
{
    struct blkfuse_driver_ops ops = memory_ops();
    struct blkfuse_export *export_;
    struct blkfuse_request *stale;
    struct client client, second;
    int fd, before;

    ops.read = told_read;
    export_ = started(&ops, NULL);
    fd = open_file(O_RDWR);
    manner = SYNC;
    expect(fd, 0);
    stale = last.request;
    manner = LATER;

    before = flag_get(&calls);
    client_start(&client, fd, false, 8192);
    flag_wait(&calls, before + 1);
    /* An older request's name is not that of this one, in whatever slot. */
    REFUSED(blkfuse_request_complete(stale, -EIO), EALREADY);
    CHECK(complete_last(0) == 0);
    REFUSED(blkfuse_request_complete(last.request, -EIO), EALREADY);
    client_join(&client);
    CHECK(client.result == 4096);
    CHECK(memcmp(client.buffer, content + 8192, 4096) == 0);
    REFUSED(blkfuse_request_complete(last.request, -EIO), EALREADY);

    client_start(&client, fd, false, 0);
    flag_wait(&calls, before + 2);
    CHECK(complete_last(-ESTALE) == 0);
    client_join(&client);
    CHECK(client.result == -1 && client.error == ESTALE);

    client_start(&client, fd, false, 0);
    flag_wait(&calls, before + 3);
    CHECK(complete_last(BLKFUSE_PENDING) == 0); /* is no result */
    client_join(&client);
    CHECK(client.result == -1 && client.error == EIO);

    /* In a drain it is completed, and a later one waits. */
    client_start(&client, fd, false, 0);
    flag_wait(&calls, before + 4);
    REFUSED(blkfuse_export_drain(export_, 1), ETIMEDOUT);
    CHECK(blkfuse_export_drain_begin(export_) == 0);
    CHECK(blkfuse_export_drain_poll(export_) == 1);
    client_start(&second, fd, false, 4096);
    CHECK(complete_last(0) == 0);
    client_join(&client);
    CHECK(client.result == 4096);
    CHECK(blkfuse_export_drain(export_, -1) == 0);
    CHECK(blkfuse_export_drain_poll(export_) == 0);
    CHECK(flag_get(&calls) == before + 4);
    CHECK(blkfuse_export_drain_end(export_) == 0);
    REFUSED(blkfuse_export_drain_end(export_), EINVAL);
    flag_wait(&calls, before + 5);
    CHECK(complete_last(0) == 0);
    client_join(&second);
    CHECK(second.result == 4096);
    CHECK(memcmp(second.buffer, content + 4096, 4096) == 0);

    close(fd);
    finished(export_);
}

/* The host has deleted the export; its requests are still answered. */
static void after_the_delete(bool waits)
{
    struct blkfuse_driver_ops ops = memory_ops();
    struct blkfuse_export *export_;
    struct client client;
    int fd, before = flag_get(&calls), deleted_before = flag_get(&deleted);

    ops.read = told_read;
    export_ = started(&ops, NULL);
    fd = open_file(O_RDONLY);
    manner = LATER;
    client_start(&client, fd, false, 4096);
    flag_wait(&calls, before + 1);
    if (waits)
        REFUSED(blkfuse_export_delete_wait(&export_, 1), ETIMEDOUT);
    else
        CHECK(blkfuse_export_delete(&export_) == 0);
    CHECK(export_ == NULL);
    /* Who waits so briefly may see it go. */
    while (waits && is_mounted())
        sched_yield();
    CHECK(!is_mounted());
    CHECK(flag_get(&deleted) == deleted_before);
    CHECK(complete_last(0) == 0);
    client_join(&client);
    CHECK(client.result == 4096);
    CHECK(memcmp(client.buffer, content + 4096, 4096) == 0);
    flag_wait(&deleted, deleted_before + 1);
    close(fd);
}

/* Waiting clients do not wait for the driver. */
static void by_force(void)
{
    struct blkfuse_driver_ops ops = memory_ops();
    struct blkfuse_export *export_;
    struct client client;
    int fd, before = flag_get(&calls);

    ops.read = told_read;
    export_ = started(&ops, NULL);
    fd = open_file(O_RDONLY);
    manner = LATER;
    client_start(&client, fd, false, 4096);
    flag_wait(&calls, before + 1);
    CHECK(blkfuse_export_stop(export_, BLKFUSE_STOP_FORCE) == 0);
    client_join(&client);
    CHECK(client.result == -1);
    CHECK(!is_mounted());
    CHECK(blkfuse_export_drain_poll(export_) == 1);
    CHECK(complete_last(0) == 0);
    close(fd);
    finished(export_);
}

static void *complete_now(void *arg)
{
    CHECK(blkfuse_request_complete((struct blkfuse_request *)arg, 0) == 0);
    return NULL;
}

/* Every operation, completed by a thread that races with the callback. */
static struct flag operations = FLAG;
static struct blkfuse_driver_ops expected;

static int race(struct blkfuse_request *request)
{
    pthread_t thread;
    char *ctx = (char *)blkfuse_request_ctx(request);

    CHECK(ctx != NULL && (uintptr_t)ctx % 16 == 0);
    memset(ctx, 0x55, 100);
    CHECK(strcmp((char *)blkfuse_request_queue_ctx(request), "the queue's") == 0);
    flag_add(&operations);
    CHECK(pthread_create(&thread, NULL, complete_now, request) == 0);
    CHECK(pthread_detach(thread) == 0);
    return BLKFUSE_PENDING;
}

static int race_read(void *opaque, struct blkfuse_request *request, void *buffer, uint64_t offset,
                     uint64_t bytes, uint32_t flags)
{
    CHECK(opaque == &expected);
    memory_read(opaque, request, buffer, offset, bytes, flags);
    return race(request);
}

static int race_write(void *opaque, struct blkfuse_request *request, const void *buffer,
                      uint64_t offset, uint64_t bytes, uint32_t flags)
{
    CHECK(opaque == &expected);
    memory_write(opaque, request, buffer, offset, bytes, flags);
    return race(request);
}

static int race_flush(void *opaque, struct blkfuse_request *request, uint32_t flags)
{
    CHECK(opaque == &expected && flags == 0);
    return race(request);
}

static int race_discard(void *opaque, struct blkfuse_request *request, uint64_t offset,
                        uint64_t bytes, uint32_t flags)
{
    CHECK(opaque == &expected && flags == 0);
    CHECK(offset == 4096 && bytes == 4096);
    return race(request);
}

static int race_write_zeroes(void *opaque, struct blkfuse_request *request, uint64_t offset,
                             uint64_t bytes, uint32_t flags)
{
    CHECK(opaque == &expected && flags == 0);
    CHECK(offset == 8192 && bytes == 4096);
    return race(request);
}

static int race_truncate(void *opaque, struct blkfuse_request *request, uint64_t length,
                         uint32_t flags)
{
    CHECK(opaque == &expected && flags == 0);
    CHECK(length == SIZE / 2);
    return race(request);
}

static int race_block_status(void *opaque, struct blkfuse_request *request, uint64_t offset,
                             uint64_t bytes, struct blkfuse_extent *extent, uint32_t flags)
{
    CHECK(opaque == &expected && flags == 0 && bytes > 0);
    CHECK(extent->bytes == 0 && extent->flags == 0);
    extent->bytes = offset < 16384 ? 16384 - offset : SIZE;
    extent->flags = offset < 16384 ? 0 : BLKFUSE_EXTENT_HOLE;
    return race(request);
}

static int give_queue_ctx(void *opaque, uint32_t queue, void **queue_ctx)
{
    static char text[] = "the queue's";

    CHECK(opaque == &expected && queue < strtoul(queues, NULL, 10));
    CHECK(*queue_ctx == NULL);
    *queue_ctx = text;
    return 0;
}

static void take_queue_ctx(void *opaque, uint32_t queue, void *queue_ctx)
{
    CHECK(opaque == &expected && queue < strtoul(queues, NULL, 10));
    CHECK(strcmp((char *)queue_ctx, "the queue's") == 0);
}

static void every_operation(void)
{
    struct blkfuse_driver_ops ops = memory_ops();
    struct blkfuse_export *export_;
    char buffer[4096], zeroes[4096] = { 0 };
    int fd, round, before;

    ops.request_ctx_size = 100;
    ops.read = race_read;
    ops.write = race_write;
    ops.flush = race_flush;
    ops.discard = race_discard;
    ops.write_zeroes = race_write_zeroes;
    ops.truncate = race_truncate;
    ops.block_status = race_block_status;
    ops.queue_start = give_queue_ctx;
    ops.queue_stop = take_queue_ctx;
    ops.batch_begin = take_queue_ctx;
    ops.batch_end = take_queue_ctx;
    export_ = started(&ops, &expected);
    fd = open_file(O_RDWR);
    for (round = 0; round < 100; round++) {
        before = flag_get(&operations);
        memset(buffer, round, sizeof(buffer));
        CHECK(pwrite(fd, buffer, sizeof(buffer), 12288) == sizeof(buffer));
        CHECK(memcmp(buffer, content + 12288, sizeof(buffer)) == 0);
        memset(buffer, ~round, sizeof(buffer));
        CHECK(pread(fd, buffer, sizeof(buffer), 12288) == sizeof(buffer));
        CHECK(memcmp(buffer, content + 12288, sizeof(buffer)) == 0);
        CHECK(fsync(fd) == 0);
        CHECK(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 4096, 4096) == 0);
        CHECK(fallocate(fd, FALLOC_FL_ZERO_RANGE, 8192, 4096) == 0);
        CHECK(flag_get(&operations) == before + 5);
        CHECK(lseek(fd, 0, SEEK_HOLE) == 16384);
        CHECK(flag_get(&operations) > before + 5);
    }
    before = flag_get(&operations);
    CHECK(ftruncate(fd, SIZE / 2) == 0);
    CHECK(flag_get(&operations) == before + 1);
    CHECK(pread(fd, zeroes, sizeof(zeroes), SIZE / 2) == 0);
    close(fd);
    finished(export_);
}

int main(int argc, char **argv)
{
    size_t i;
    int ends;

    begin(argc, argv);
    for (i = 0; i < SIZE; i++)
        content[i] = (char)(i * 7 ^ i >> 8);
    answers();
    later();
    after_the_delete(false);
    after_the_delete(true);
    by_force();
    every_operation();
    ends = flag_get(&deleted);
    CHECK(ends == 6);
    return 0;
}
