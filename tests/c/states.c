/* states.c - calls at the wrong time, and starts that fail and then do not. */
#include "harness.h"

static void before_the_start(void)
{
    struct blkfuse_driver_ops ops = memory_ops();
    struct blkfuse_export *export_ = NULL;
    struct blkfuse_stats stats;

    CHECK(blkfuse_export_create(&export_, &ops, NULL) == 0);
    REFUSED(blkfuse_export_drain_begin(export_), EINVAL);
    REFUSED(blkfuse_export_drain_poll(export_), EINVAL);
    REFUSED(blkfuse_export_drain_end(export_), EINVAL);
    REFUSED(blkfuse_export_drain(export_, 0), EINVAL);
    REFUSED(blkfuse_export_resized(export_), EINVAL);
    REFUSED(blkfuse_export_stop(export_, 0), EINVAL);
    REFUSED(blkfuse_export_get_stats(export_, &stats, sizeof(stats)), EINVAL);
    finished(export_);
}

static int64_t fails(void *opaque)
{
    return *(int64_t *)opaque;
}

static int queue_fails(void *opaque, uint32_t queue, void **queue_ctx)
{
    (void)queue, (void)queue_ctx;
    return *(int *)opaque;
}

static void limits_fail(void *opaque, struct blkfuse_limits *limits)
{
    CHECK(limits->struct_size == sizeof(*limits) && limits->block_size == 4096);
    limits->block_size = *(uint32_t *)opaque;
}

static void starts_that_fail(void)
{
    struct blkfuse_driver_ops ops = memory_ops();
    struct blkfuse_export *export_;
    char text[64], buffer[16];
    int64_t length;
    uint32_t block_size;
    int result, fd, before = flag_get(&deleted);

    /* Each leaves an export that can be started. */
    export_ = NULL;
    CHECK(blkfuse_export_create(&export_, &ops, NULL) == 0);
    REFUSED(blkfuse_export_start(export_), EINVAL);
    CHECK(strstr(blkfuse_error_message(), "mountpoint") != NULL);
    CHECK(blkfuse_export_set_str(export_, "mountpoint", "/nonexistent/disk") == 0);
    REFUSED(blkfuse_export_start(export_), ENOENT);
    CHECK(strstr(blkfuse_error_message(), "/nonexistent/disk") != NULL);
    CHECK(blkfuse_export_set_str(export_, "mountpoint", "/tmp") == 0);
    CHECK(blkfuse_export_start(export_) < 0);
    CHECK(blkfuse_export_get_str(export_, "state", text, sizeof(text)) > 0);
    CHECK(strcmp(text, "created") == 0);
    CHECK(flag_get(&deleted) == before);
    CHECK(blkfuse_export_set_str(export_, "mountpoint", mountpoint) == 0);
    CHECK(blkfuse_export_set_bool(export_, "growable", true) == 0);
    REFUSED(blkfuse_export_start(export_), EINVAL); /* and not writable */
    CHECK(blkfuse_export_set_bool(export_, "growable", false) == 0);
    CHECK(start(export_) == 0);
    fd = open_file(O_RDONLY);
    CHECK(pread(fd, buffer, sizeof(buffer), 0) == sizeof(buffer));
    close(fd);
    finished(export_);

    /* The driver refuses. */
    ops.length = fails;
    export_ = created(&ops, &length);
    length = -ENODEV;
    REFUSED(blkfuse_export_start(export_), ENODEV);
    length = INT64_MIN;
    REFUSED(blkfuse_export_start(export_), EIO);
    length = -100000;
    REFUSED(blkfuse_export_start(export_), EIO);
    length = 4096;
    CHECK(start(export_) == 0);
    length = -EIO;
    REFUSED(blkfuse_export_resized(export_), EIO);
    length = 8192;
    CHECK(blkfuse_export_resized(export_) == 0);
    fd = open_file(O_RDONLY);
    CHECK(lseek(fd, 0, SEEK_END) == 8192);
    close(fd);
    finished(export_);

    ops = memory_ops();
    ops.queue_start = queue_fails;
    export_ = created(&ops, &result);
    result = -EACCES;
    REFUSED(blkfuse_export_start(export_), EACCES);
    result = 5; /* is no success */
    REFUSED(blkfuse_export_start(export_), EIO);
    CHECK(!is_mounted());
    result = 0;
    CHECK(start(export_) == 0);
    finished(export_);

    ops = memory_ops();
    ops.limits = limits_fail;
    export_ = created(&ops, &block_size);
    block_size = 1000;
    REFUSED(blkfuse_export_start(export_), EINVAL);
    block_size = 8192;
    CHECK(start(export_) == 0);
    finished(export_);

    /* It cannot do what was asked for. */
    ops = memory_ops();
    ops.write = NULL;
    export_ = created(&ops, NULL);
    REFUSED(blkfuse_export_start(export_), EROFS);
    CHECK(blkfuse_export_set_bool(export_, "writable", false) == 0);
    CHECK(start(export_) == 0);
    CHECK(open(mountpoint, O_RDWR | O_CLOEXEC) == -1 && errno == EROFS);
    finished(export_);
}

static void after_the_start(void)
{
    struct blkfuse_driver_ops ops = memory_ops();
    struct blkfuse_export *export_ = started(&ops, NULL), *second;
    char text[64];
    uint64_t number = 0;
    int fd;

    REFUSED(blkfuse_export_start(export_), EINVAL);
    REFUSED(blkfuse_export_set_bool(export_, "writable", false), EBUSY);
    REFUSED(blkfuse_export_set_u64(export_, "queues", 2), EBUSY);
    REFUSED(blkfuse_export_set_str(export_, "source", "x"), EBUSY);
    REFUSED(blkfuse_export_drain_end(export_), EINVAL);
    REFUSED(blkfuse_export_stop(export_, 1u << 31), EINVAL);
    REFUSED(blkfuse_export_stop(export_, BLKFUSE_STOP_FORCE | BLKFUSE_STOP_IF_IDLE), EINVAL);
    CHECK(blkfuse_export_get_str(export_, "state", text, sizeof(text)) > 0);
    CHECK(strcmp(text, "started") == 0);
    CHECK(blkfuse_export_get_str(export_, "protocol", text, sizeof(text)) > 0);
    CHECK(strncmp(text, "7.", 2) == 0);
    CHECK(blkfuse_export_get_str(export_, "mount-method", text, sizeof(text)) > 0);
    CHECK(blkfuse_export_get_str(export_, "transport", text, sizeof(text)) > 0);
    CHECK(blkfuse_export_get_str(export_, "last-error", text, sizeof(text)) == 0);
    CHECK(blkfuse_export_get_u64(export_, "max-request", &number) == 0 && number >= 4096);
    CHECK(blkfuse_export_get_u64(export_, "queues", &number) == 0);
    CHECK(number == strtoull(queues, NULL, 10));

    /* The same place cannot be used twice. */
    second = created(&ops, NULL);
    CHECK(blkfuse_export_start(second) < 0);
    CHECK(strstr(blkfuse_error_message(), mountpoint) != NULL);
    CHECK(blkfuse_export_delete(&second) == 0);

    fd = open_file(O_RDONLY);
    REFUSED(blkfuse_export_stop(export_, BLKFUSE_STOP_IF_IDLE), EBUSY);
    CHECK(is_mounted());
    CHECK(pread(fd, text, sizeof(text), 0) == sizeof(text));
    CHECK(blkfuse_export_stop(export_, 0) == 0);
    CHECK(!is_mounted());
    CHECK(blkfuse_export_stop(export_, BLKFUSE_STOP_FORCE) == 0);
    REFUSED(blkfuse_export_start(export_), EINVAL);
    REFUSED(blkfuse_export_set_bool(export_, "writable", false), EBUSY);
    close(fd);
    finished(export_);
}

static void statistics(void)
{
    struct {
        struct blkfuse_stats stats;
        uint64_t more[2];
    } newer;
    struct blkfuse_driver_ops ops = memory_ops();
    struct blkfuse_export *export_ = started(&ops, NULL);
    struct blkfuse_stats stats;
    uint64_t timed = 0;
    char buffer[4096];
    int fd = open_file(O_RDONLY), i;

    REFUSED(blkfuse_export_get_stats(export_, NULL, sizeof(stats)), EINVAL);
    CHECK(pread(fd, buffer, sizeof(buffer), 0) == sizeof(buffer));
    CHECK(blkfuse_export_drain(export_, -1) == 0);
    CHECK(blkfuse_export_get_stats(export_, &stats, sizeof(stats)) == 0);
    CHECK(stats.read.operations == 1 && stats.read.bytes == sizeof(buffer));
    CHECK(stats.read.errors == 0 && stats.write.operations == 0 && stats.in_flight == 0);
    for (i = 0; i < 32; i++)
        timed += stats.latency[i];
    CHECK(timed == 1);

    /* An older host's is filled as far as it goes, a newer one's with zeroes. */
    memset(&newer, 0xff, sizeof(newer));
    CHECK(blkfuse_export_get_stats(export_, &newer.stats, sizeof(struct blkfuse_op_stats)) == 0);
    CHECK(newer.stats.read.operations == 1);
    CHECK(newer.stats.write.operations == UINT64_MAX);
    CHECK(blkfuse_export_get_stats(export_, &newer.stats, 0) == 0);
    CHECK(blkfuse_export_get_stats(export_, &newer.stats, sizeof(newer)) == 0);
    CHECK(newer.stats.read.operations == 1 && newer.stats.write.operations == 0);
    CHECK(newer.more[0] == 0 && newer.more[1] == 0);
    close(fd);
    finished(export_);
}

int main(int argc, char **argv)
{
    begin(argc, argv);
    before_the_start();
    starts_that_fail();
    after_the_start();
    statistics();
    return 0;
}
