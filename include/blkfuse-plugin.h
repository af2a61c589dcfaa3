/*
 * blkfuse-plugin.h: block drivers that blkfused loads when it starts.
 *
 *   cc -shared -fPIC disk.c -o disk.so $(pkg-config --cflags blkfuse)
 *   blkfused --plugin ./disk.so size=64M MOUNTPOINT
 *
 * A plugin is a shared library with one function, blkfuse_plugin_get(), that
 * returns a table: what the plugin is called, and how it opens a device. What
 * open gives is what a program gives to blkfuse_export_create(): callbacks and
 * a pointer for them, and all that blkfuse.h says of these holds here. The
 * export itself is blkfused's: a plugin has no handle to it.
 *
 * Linking: a plugin is not linked with libblkfuse. blkfused contains that
 * library, and the functions of blkfuse.h come to the plugin from there when it
 * is loaded. A second copy of the library knows nothing of the requests of the
 * first; a plugin that brings one, shared or static, is refused.
 *
 * What is called when, for each device that is to be exported:
 *
 *   blkfuse_plugin_get -> open -> the callbacks -> ops->deleted -> close
 *
 * - If open fails, nothing follows, and it has freed whatever it allocated.
 * - If it returns 0, close comes once, and last: also if the device could
 *   not be exported. By then no callback is running.
 * - `ops->deleted` comes once before that, unless blkfused has refused the
 *   table of callbacks.
 * - If blkfused is killed, or ends while the plugin still owes an answer to
 *   a request, neither comes, as if the power had failed.
 * - A device is opened before anything is mounted, and once; several devices
 *   of one plugin can be open at once.
 * - The library is never unloaded: its threads may go on until the process
 *   ends.
 *
 * blkfuse_plugin_get and open are called on blkfused's main thread, sync and
 * close on any. None of them may longjmp out; one that unwinds (a C++ exception)
 * ends the process, as from a callback. The signals that end blkfused are blocked
 * in all threads; a plugin must neither change that nor handle them. It may
 * write to standard error.
 *
 * Licence: MIT OR Apache-2.0.
 */
#ifndef BLKFUSE_PLUGIN_H
#define BLKFUSE_PLUGIN_H

#include <blkfuse.h>

/** The version of struct blkfuse_plugin that this header describes. */
#define BLKFUSE_PLUGIN_API_VERSION 1

/** open: the device will be written to; without this it is only read. */
#define BLKFUSE_PLUGIN_WRITABLE 1

/** A key that open understands. */
struct blkfuse_plugin_key {
    /** Its name, without the equals sign. */
    const char *key;
    /** What it means, in a line or a few, for people; or NULL. */
    const char *help;
};

/** What the user has set: KEY=VALUE. */
struct blkfuse_plugin_setting {
    /** One of the keys. */
    const char *key;
    /** All that stood behind the first equals sign; may be empty. */
    const char *value;
};

/**
 * A plugin. Fill in by BLKFUSE_PLUGIN_INIT or blkfuse_plugin_init(), and set at
 * least `name` and `open`. The struct grows only at its end; it, and all that it
 * points to, must stay as it is until the process ends.
 */
struct blkfuse_plugin {
    /** sizeof(struct blkfuse_plugin) as the plugin knows it. */
    size_t struct_size;
    /** BLKFUSE_PLUGIN_API_VERSION as the plugin knows it. */
    uint32_t api_version;
    /** 0. */
    uint32_t reserved;
    /**
     * The function of that name as the plugin finds it, by which blkfused
     * notices a plugin with a copy of libblkfuse of its own.
     */
    int (*request_complete)(struct blkfuse_request *request, int result);
    /** What it is called. Required. */
    const char *name;
    /** Its version, or NULL. */
    const char *version;
    /** What it does, in one line, or NULL. */
    const char *description;
    /**
     * The keys that open understands, up to one whose `key` is NULL; blkfused
     * refuses others. NULL: there are none.
     */
    const struct blkfuse_plugin_key *keys;
    /** What else the help should say, or NULL. */
    const char *help;
    /**
     * Opens a device. `settings` is what the user has set, in that order and
     * perhaps more than once, up to one whose `key` is NULL; it stays valid
     * until close. `flags`: BLKFUSE_PLUGIN_*; others may come, and can be
     * ignored. Stores in `*ops` the callbacks, which are copied when this has
     * returned, and in `*opaque` the pointer that they, sync and close are
     * given.
     *
     * Returns 0; or a negative errno, and then it may have stored in `message`
     * why, as a string of less than `message_size` bytes (of which there are
     * at least 256). blkfused puts the plugin's name in front of it. Required.
     */
    int (*open)(const struct blkfuse_plugin_setting *settings, uint32_t flags,
                const struct blkfuse_driver_ops **ops, void **opaque,
                char *message, size_t message_size);
    /**
     * Makes durable everything that was written, as `ops->flush` does, but for
     * no request. Called when blkfused ends, and only if the export is
     * writable: first while requests may still come, then again before
     * `ops->deleted`. Returns 0 or a negative errno, with which blkfused fails.
     * NULL: nothing is to be done for that.
     */
    int (*sync)(void *opaque);
    /** Frees what open has made. NULL: nothing is to be freed. */
    void (*close)(void *opaque);
};

#ifdef __cplusplus
extern "C" {
#endif

/** What a plugin exports. Returns its table; may be called more than once. */
#ifdef __GNUC__
__attribute__((visibility("default")))
#endif
const struct blkfuse_plugin *blkfuse_plugin_get(void);

#ifdef __cplusplus
}
#endif

/** The members with which a struct blkfuse_plugin must begin, for C's
    designated initialisers. */
#define BLKFUSE_PLUGIN_INIT                                                   \
    .struct_size = sizeof(struct blkfuse_plugin),                             \
    .api_version = BLKFUSE_PLUGIN_API_VERSION,                                \
    .request_complete = blkfuse_request_complete

/** Makes an empty table: everything NULL but what it must begin with. */
static inline void blkfuse_plugin_init(struct blkfuse_plugin *plugin)
{
    memset(plugin, 0, sizeof(*plugin));
    plugin->struct_size = sizeof(*plugin);
    plugin->api_version = BLKFUSE_PLUGIN_API_VERSION;
    plugin->request_complete = blkfuse_request_complete;
}

#endif /* BLKFUSE_PLUGIN_H */
