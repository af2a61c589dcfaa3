/*
 * dynamic.c - a host that loads the library while it runs, as a plugin or
 * another language does, and unloads it, or leaves that to the end of the
 * process: DYNAMIC MOUNTPOINT QUEUES LIBRARY [stay].
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <unistd.h>

#include <blkfuse.h>

static const char *mountpoint;
static char content[1 << 20];
static int deleted;

static void die(int line, const char *what)
{
    fprintf(stderr, "dynamic.c:%d: %s\n", line, what);
    umount2(mountpoint, MNT_FORCE | MNT_DETACH);
    _exit(1);
}

#define CHECK(condition) ((condition) ? (void)0 : die(__LINE__, #condition))

/* POSIX has dlsym() return functions as data, which ISO C cannot convert. */
#define LOAD(library, name)                                        \
    do {                                                           \
        void *symbol_ = dlsym(library, #name);                     \
        CHECK(symbol_ != NULL);                                    \
        memcpy(&lib.name, &symbol_, sizeof(symbol_));              \
    } while (0)

static struct {
    int (*blkfuse_export_create)(struct blkfuse_export **, const struct blkfuse_driver_ops *, void *);
    int (*blkfuse_export_set_str)(struct blkfuse_export *, const char *, const char *);
    int (*blkfuse_export_start)(struct blkfuse_export *);
    int (*blkfuse_export_delete_wait)(struct blkfuse_export **, int64_t);
    const char *(*blkfuse_error_message)(void);
    uint32_t (*blkfuse_version)(void);
} lib;

static int64_t length(void *opaque)
{
    (void)opaque;
    return sizeof(content);
}

static int read_content(void *opaque, struct blkfuse_request *request, void *buffer,
                        uint64_t offset, uint64_t bytes, uint32_t flags)
{
    (void)opaque, (void)request, (void)flags;
    memcpy(buffer, content + offset, bytes);
    return 0;
}

static void on_deleted(void *opaque)
{
    (void)opaque;
    deleted++;
}

static void serve(const char *queues, const char *path, bool stays)
{
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    struct blkfuse_driver_ops ops;
    struct blkfuse_export *export_ = NULL;
    char buffer[8];
    int fd;

    CHECK(library != NULL);
    LOAD(library, blkfuse_export_create);
    LOAD(library, blkfuse_export_set_str);
    LOAD(library, blkfuse_export_start);
    LOAD(library, blkfuse_export_delete_wait);
    LOAD(library, blkfuse_error_message);
    LOAD(library, blkfuse_version);
    CHECK(lib.blkfuse_version() == BLKFUSE_VERSION);

    blkfuse_driver_ops_init(&ops);
    ops.length = length;
    ops.read = read_content;
    ops.deleted = on_deleted;
    CHECK(lib.blkfuse_export_create(&export_, &ops, NULL) == 0);
    CHECK(lib.blkfuse_export_start(export_) == -EINVAL);
    CHECK(lib.blkfuse_error_message()[0] != '\0');
    CHECK(lib.blkfuse_export_set_str(export_, "mountpoint", mountpoint) == 0);
    CHECK(lib.blkfuse_export_set_str(export_, "queues", queues) == 0);
    CHECK(lib.blkfuse_export_start(export_) == 0);
    fd = open(mountpoint, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0);
    CHECK(pread(fd, buffer, sizeof(buffer), 5) == sizeof(buffer));
    CHECK(memcmp(buffer, "content!", sizeof(buffer)) == 0);
    close(fd);
    CHECK(lib.blkfuse_export_delete_wait(&export_, -1) == 0);
    CHECK(stays || dlclose(library) == 0);
}

int main(int argc, char **argv)
{
    int round;

    if (argc != 4 && argc != 5)
        return 2;
    mountpoint = argv[1];
    memcpy(content + 5, "content!", 8);
    for (round = 0; round < 50; round++)
        serve(argv[2], argv[3], argc == 5);
    CHECK(deleted == 50);
    return 0;
}
