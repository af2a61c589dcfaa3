/*
 * raw.c - a raw image, shown as a file: every request is forwarded to it.
 *
 *   cc raw.c -o raw $(pkg-config --cflags --libs blkfuse)
 *   touch disk && ./raw disk.img disk [KEY=VALUE]...          (Ctrl-C ends it)
 *
 * The keys are the properties of an export: ./raw disk.img disk writable=on
 */
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <blkfuse.h>

static int image;

static int64_t raw_length(void *opaque)
{
    off_t end = lseek(image, 0, SEEK_END);
    (void)opaque;
    return end < 0 ? -errno : end;
}

static int raw_read(void *opaque, struct blkfuse_request *request, void *buffer,
                    uint64_t offset, uint64_t bytes, uint32_t flags)
{
    (void)opaque, (void)buffer, (void)bytes, (void)flags;
    return blkfuse_request_forward(request, image, offset);
}

static int raw_write(void *opaque, struct blkfuse_request *request, const void *buffer,
                     uint64_t offset, uint64_t bytes, uint32_t flags)
{
    (void)opaque, (void)buffer, (void)bytes, (void)flags;
    return blkfuse_request_forward(request, image, offset);
}

static int raw_flush(void *opaque, struct blkfuse_request *request, uint32_t flags)
{
    (void)opaque, (void)flags;
    return blkfuse_request_forward(request, image, 0);
}

static int raw_discard(void *opaque, struct blkfuse_request *request, uint64_t offset,
                       uint64_t bytes, uint32_t flags)
{
    (void)opaque, (void)bytes, (void)flags;
    return blkfuse_request_forward(request, image, offset);
}

static int raw_write_zeroes(void *opaque, struct blkfuse_request *request, uint64_t offset,
                            uint64_t bytes, uint32_t flags)
{
    (void)opaque, (void)bytes, (void)flags;
    return blkfuse_request_forward(request, image, offset);
}

static int raw_truncate(void *opaque, struct blkfuse_request *request, uint64_t length,
                        uint32_t flags)
{
    (void)opaque, (void)request, (void)flags;
    return ftruncate(image, (off_t)length) < 0 ? -errno : 0;
}

/* Sets the property that "KEY=VALUE" speaks of. */
static int set(struct blkfuse_export *raw_export, char *argument)
{
    char *value = strchr(argument, '=');

    if (value)
        *value++ = '\0';
    return blkfuse_export_set_str(raw_export, argument, value ? value : "on");
}

int main(int argc, char **argv)
{
    struct blkfuse_driver_ops ops;
    struct blkfuse_export *raw_export = NULL;
    sigset_t stop;
    int signal_number, failed, i;

    if (argc < 3) {
        fprintf(stderr, "usage: raw IMAGE FILE [KEY=VALUE]...\n");
        return 2;
    }
    image = open(argv[1], O_RDWR | O_CLOEXEC);
    if (image < 0)
        image = open(argv[1], O_RDONLY | O_CLOEXEC);
    if (image < 0) {
        fprintf(stderr, "raw: %s: %s\n", argv[1], strerror(errno));
        return 1;
    }
    sigemptyset(&stop);
    sigaddset(&stop, SIGINT);
    sigaddset(&stop, SIGTERM);
    sigprocmask(SIG_BLOCK, &stop, NULL);

    blkfuse_driver_ops_init(&ops);
    ops.length = raw_length;
    ops.read = raw_read;
    ops.write = raw_write;
    ops.flush = raw_flush;
    ops.discard = raw_discard;
    ops.write_zeroes = raw_write_zeroes;
    ops.truncate = raw_truncate;
    failed = blkfuse_export_create(&raw_export, &ops, NULL) < 0 ||
             blkfuse_export_set_str(raw_export, "mountpoint", argv[2]) < 0;
    for (i = 3; i < argc && !failed; i++)
        failed = set(raw_export, argv[i]) < 0;
    if (failed || blkfuse_export_start(raw_export) < 0) {
        fprintf(stderr, "raw: %s\n", blkfuse_error_message());
        blkfuse_export_delete(&raw_export);
        return 1;
    }
    printf("%s shows %s until this ends\n", argv[2], argv[1]);
    fflush(stdout);
    sigwait(&stop, &signal_number);
    return blkfuse_export_delete_wait(&raw_export, -1) < 0;
}
