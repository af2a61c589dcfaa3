/* passthrough.c - the kernel reads a host's backing file in the host's place. */
#include "harness.h"

static int backing_fd(void *opaque)
{
    return *(int *)opaque;
}

static int read_in_vain(void *opaque, struct blkfuse_request *request, void *buffer,
                        uint64_t offset, uint64_t bytes, uint32_t flags)
{
    (void)opaque, (void)request, (void)buffer, (void)offset, (void)bytes, (void)flags;
    return -EIO;
}

static struct blkfuse_export *wanting(const struct blkfuse_driver_ops *ops, int *image)
{
    struct blkfuse_export *export_ = created(ops, image);

    CHECK(blkfuse_export_set_bool(export_, "writable", false) == 0);
    CHECK(blkfuse_export_set_bool(export_, "passthrough", true) == 0);
    return export_;
}

int main(int argc, char **argv)
{
    struct blkfuse_driver_ops ops;
    struct blkfuse_export *export_;
    char name[] = "/tmp/blkfuse-XXXXXX", buffer[4096];
    int image, none = -ENOTSUP, fd;
    bool passthrough = false;

    begin(argc, argv);
    image = mkstemp(name);
    CHECK(image >= 0 && unlink(name) == 0);
    CHECK(pwrite(image, "image", 5, SIZE - 5) == 5);
    ops = memory_ops();
    ops.read = read_in_vain;

    /* Without the callback, with one that has none, and in an older table. */
    export_ = wanting(&ops, &image);
    REFUSED(blkfuse_export_start(export_), EOPNOTSUPP);
    finished(export_);
    ops.backing_fd = backing_fd;
    export_ = wanting(&ops, &none);
    REFUSED(blkfuse_export_start(export_), EOPNOTSUPP);
    finished(export_);
    ops.struct_size = offsetof(struct blkfuse_driver_ops, backing_fd);
    export_ = wanting(&ops, &image);
    REFUSED(blkfuse_export_start(export_), EOPNOTSUPP);
    finished(export_);

    ops.struct_size = sizeof(ops);
    export_ = wanting(&ops, &image);
    CHECK(start(export_) == 0);
    CHECK(blkfuse_export_get_bool(export_, "passthrough", &passthrough) == 0 && passthrough);
    fd = open_file(O_RDONLY);
    CHECK(pread(fd, buffer, sizeof(buffer), SIZE - 5) == 5 && memcmp(buffer, "image", 5) == 0);
    /* The image became longer, but the device did not. */
    CHECK(ftruncate(image, SIZE + 1) == 0);
    REFUSED(blkfuse_export_resized(export_), EINVAL);
    CHECK(close(fd) == 0);
    finished(export_);
    CHECK(close(image) == 0);
    return 0;
}
