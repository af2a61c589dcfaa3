/*
 * plugin.c - a driver for blkfused: a disk in memory, filled with a pattern.
 *
 *   cc -shared -fPIC plugin.c -o plugin.so $(pkg-config --cflags blkfuse)
 *   touch disk && blkfused -w --plugin ./plugin.so size=64M pattern=0x5a disk
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <blkfuse-plugin.h>

struct memory {
    uint64_t size;
    unsigned char bytes[];
};

/* ---- The driver: the callbacks that any host has, see ramdisk.c ---- */

static int64_t memory_length(void *opaque)
{
    return (int64_t)((struct memory *)opaque)->size;
}

static int memory_read(void *opaque, struct blkfuse_request *request, void *buffer,
                       uint64_t offset, uint64_t bytes, uint32_t flags)
{
    struct memory *memory = opaque;

    (void)request, (void)flags;
    memcpy(buffer, memory->bytes + offset, bytes);
    return 0;
}

static int memory_write(void *opaque, struct blkfuse_request *request, const void *buffer,
                        uint64_t offset, uint64_t bytes, uint32_t flags)
{
    struct memory *memory = opaque;

    (void)request, (void)flags;
    memcpy(memory->bytes + offset, buffer, bytes);
    return 0;
}

static const struct blkfuse_driver_ops driver = {
    BLKFUSE_DRIVER_OPS_INIT,
    .length = memory_length,
    .read = memory_read,
    .write = memory_write,
};

/* ---- The plugin: how a device comes and goes ---- */

/* Reads a number of at most `limit`, perhaps with a unit; false if it is none. */
static bool parse(const char *text, uint64_t limit, uint64_t *number)
{
    static const char units[] = "KMG";
    const char *unit;
    char *end;

    errno = 0;
    *number = strtoull(text, &end, 0);
    if (errno || end == text || strchr(text, '-'))
        return false;
    if (*end && (unit = strchr(units, *end))) {
        int shift = 10 * (int)(unit - units + 1);

        if (*number > UINT64_MAX >> shift)
            return false;
        *number <<= shift;
        end++;
    }
    return *end == '\0' && *number <= limit;
}

static int memory_open(const struct blkfuse_plugin_setting *settings, uint32_t flags,
                       const struct blkfuse_driver_ops **ops, void **opaque,
                       char *message, size_t message_size)
{
    uint64_t size = 64 << 20, pattern = 0;
    struct memory *memory;

    (void)flags;
    for (; settings->key; settings++) {
        /* No key comes that is not in the list below. */
        bool is_size = strcmp(settings->key, "size") == 0;

        if (!parse(settings->value, is_size ? SIZE_MAX / 2 : 255, is_size ? &size : &pattern)) {
            snprintf(message, message_size, "%s=%s: not a %s", settings->key,
                     settings->value, is_size ? "size" : "byte");
            return -EINVAL;
        }
    }
    memory = malloc(sizeof(*memory) + size);
    if (!memory) {
        snprintf(message, message_size, "no memory for %llu bytes", (unsigned long long)size);
        return -ENOMEM;
    }
    memory->size = size;
    memset(memory->bytes, (int)pattern, size);
    *ops = &driver;
    *opaque = memory;
    return 0;
}

const struct blkfuse_plugin *blkfuse_plugin_get(void)
{
    static const struct blkfuse_plugin_key keys[] = {
        { "size", "bytes of the disk, like 1000001, 64M (the default) or 1G" },
        { "pattern", "the byte that it is filled with, like 0 (the default) or 0x5a" },
        { NULL, NULL },
    };
    static const struct blkfuse_plugin plugin = {
        BLKFUSE_PLUGIN_INIT,
        .name = "memory",
        .version = "1.0",
        .description = "a disk in memory, filled with a pattern",
        .keys = keys,
        .open = memory_open,
        .close = free,
    };

    return &plugin;
}
