/*
 * ramdisk.c - the smallest host: a 64 MiB device in memory, shown as a file.
 *
 *   cc ramdisk.c -o ramdisk $(pkg-config --cflags --libs blkfuse)
 *   touch disk && ./ramdisk disk [QUEUES]          (Ctrl-C ends it)
 */
#define _POSIX_C_SOURCE 200809L

#include <signal.h>
#include <stdio.h>
#include <string.h>

#include <blkfuse.h>

static char disk[64 << 20];

static int64_t disk_length(void *opaque)
{
    (void)opaque;
    return sizeof(disk);
}

static int disk_read(void *opaque, struct blkfuse_request *request, void *buffer,
                     uint64_t offset, uint64_t bytes, uint32_t flags)
{
    (void)opaque, (void)request, (void)flags;
    memcpy(buffer, disk + offset, bytes);
    return 0;
}

static int disk_write(void *opaque, struct blkfuse_request *request, const void *buffer,
                      uint64_t offset, uint64_t bytes, uint32_t flags)
{
    (void)opaque, (void)request, (void)flags;
    memcpy(disk + offset, buffer, bytes);
    return 0;
}

int main(int argc, char **argv)
{
    struct blkfuse_driver_ops ops;
    struct blkfuse_export *disk_export = NULL;
    sigset_t stop;
    int signal_number;

    if (argc < 2 || argc > 3) {
        fprintf(stderr, "usage: ramdisk FILE [QUEUES]\n");
        return 2;
    }
    sigemptyset(&stop);
    sigaddset(&stop, SIGINT);
    sigaddset(&stop, SIGTERM);
    sigprocmask(SIG_BLOCK, &stop, NULL);

    blkfuse_driver_ops_init(&ops);
    ops.length = disk_length;
    ops.read = disk_read;
    ops.write = disk_write;
    if (blkfuse_export_create(&disk_export, &ops, NULL) < 0 ||
        blkfuse_export_set_str(disk_export, "mountpoint", argv[1]) < 0 ||
        blkfuse_export_set_str(disk_export, "queues", argc == 3 ? argv[2] : "0") < 0 ||
        blkfuse_export_set_bool(disk_export, "writable", true) < 0 ||
        blkfuse_export_start(disk_export) < 0) {
        fprintf(stderr, "ramdisk: %s\n", blkfuse_error_message());
        blkfuse_export_delete(&disk_export);
        return 1;
    }
    printf("%s is a disk of 64 MiB until this ends\n", argv[1]);
    fflush(stdout);
    sigwait(&stop, &signal_number);
    return blkfuse_export_delete_wait(&disk_export, -1) < 0;
}
