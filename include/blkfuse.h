/*
 * blkfuse: presents a block device as a regular file through FUSE.
 *
 * A program fills in a struct blkfuse_driver_ops, creates an export of it, sets
 * the property "mountpoint", starts the export, and deletes it in the end:
 *
 *   blkfuse_export_create -> blkfuse_export_set_str ... -> blkfuse_export_start
 *        ... blkfuse_export_drain_*, _resized, _get_stats, _stop ...
 *   -> blkfuse_export_delete (or _delete_wait), then ops->deleted comes once
 *
 * Functions return 0 (or what they say) or a negative errno; then
 * blkfuse_error_message() says in words what failed. NULL handles and strings
 * are refused with -EINVAL, not followed.
 *
 * Threads:
 *   set, get, start, stop, drain_*, resized, get_stats   any, also at once
 *   delete, delete_wait         any, once nobody else uses the export
 *   request_complete, request_forward, request_ctx, request_queue_ctx     any
 *   get_queue, queue_get_fd     any
 *   queue_attach                one that will run the queue from then on
 *   queue_dispatch, queue_has_events, queue_detach     the attached one
 *   error_message               speaks of the calling thread
 * With the property "threads" set to "host" the library has no threads for
 * requests; the host's own run the queues:
 *
 *   blkfuse_export_start -> blkfuse_export_get_queue; in the thread for it
 *   blkfuse_queue_attach -> poll blkfuse_queue_get_fd -> blkfuse_queue_dispatch
 *        ... until that returns -ESHUTDOWN, after blkfuse_export_delete()
 *
 * No function but blkfuse_export_drain(), _start(), _stop(), _delete() and
 * _delete_wait() waits for anything. The library installs no signal handlers,
 * prints nothing, and opens everything close-on-exec.
 *
 * fork(): a child has nothing of the exports, whether it executes another program
 * or not (it closes their descriptors before fork() returns), and must not call
 * the library. Only one that is made past the C library, by the system call
 * clone() itself, has copies. It does not keep what the host stops or deletes;
 * but if the host is killed, the clients wait until that child has ended, too.
 *
 * Licence: MIT OR Apache-2.0. Generated from src/capi; do not edit.
 */
#ifndef BLKFUSE_H
#define BLKFUSE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define BLKFUSE_VERSION_MAJOR 0
#define BLKFUSE_VERSION_MINOR 1
#define BLKFUSE_VERSION_PATCH 0
/** The header's version, as blkfuse_version() tells the library's. */
#define BLKFUSE_VERSION (BLKFUSE_VERSION_MAJOR << 16 | BLKFUSE_VERSION_MINOR << 8 | \
                        BLKFUSE_VERSION_PATCH)

/**
 * blkfuse_export_stop(): end requests that wait with an error at once, by
 * aborting the connection, instead of serving what the unmount needs.
 */
#define BLKFUSE_STOP_FORCE 1

/**
 * blkfuse_export_stop(): only if nobody has the file open; else -EBUSY.
 */
#define BLKFUSE_STOP_IF_IDLE 2

/**
 * The version of struct blkfuse_driver_ops that this header describes.
 */
#define BLKFUSE_API_VERSION 1

/**
 * write_zeroes: the range's storage may be given back.
 */
#define BLKFUSE_MAY_UNMAP 1

/**
 * struct blkfuse_extent: nothing is stored there; it reads as zeroes.
 */
#define BLKFUSE_EXTENT_HOLE 1

/**
 * The file can be used.
 */
#define BLKFUSE_EVENT_STARTED 1

/**
 * The export has given up: requests in flight are still answered, others
 * fail. `error` and `message` say why. The host should delete it, though not
 * from within the callback.
 */
#define BLKFUSE_EVENT_HALTED 2

/**
 * Somebody else unmounted the file. The host should delete the export, though
 * not from within the callback.
 */
#define BLKFUSE_EVENT_UNMOUNTED 3

/**
 * Something failed; the export or the operation does not go on.
 */
#define BLKFUSE_LOG_ERROR 1

/**
 * Something is not as it should be, and was dealt with.
 */
#define BLKFUSE_LOG_WARN 2

/**
 * A fact worth a line: started, unmounted from outside, fell back.
 */
#define BLKFUSE_LOG_INFO 3

/**
 * What helps to find a defect.
 */
#define BLKFUSE_LOG_DEBUG 4

/**
 * A callback's answer: the host will call blkfuse_request_complete().
 */
#define BLKFUSE_PENDING 1

/**
 * An export: a block device that appears as a regular file.
 *
 * Life cycle: created, started, stopping, deleted; never back. Every function
 * that takes one may be called from any thread, and from several at once,
 * but none after or during blkfuse_export_delete() of the same export.
 */
struct blkfuse_export;

/**
 * A queue of an export with "threads" set to "host": what one of the host's
 * threads runs. The pointer is a name, not an address to look at: it stays
 * valid, and no other queue of the process will ever have it.
 *
 * One thread at a time attaches itself to a queue, and then calls
 * blkfuse_queue_dispatch() whenever the queue's descriptor is readable, until
 * that returns -ESHUTDOWN or the thread has detached itself. A thread may run
 * several queues. Different queues are independent; all need a thread, for
 * clients wait while one has none.
 */
struct blkfuse_queue;

/**
 * A request in flight. The pointer is a name, not an address to look at.
 */
struct blkfuse_request;

/**
 * What a device prefers. Grows only at its end.
 */
struct blkfuse_limits {
    /**
     * sizeof(struct blkfuse_limits) as the library knows it; a host must not
     * touch members beyond it.
     */
    size_t struct_size;
    /**
     * The preferred size of one I/O in bytes, shown as st_blksize: a power of
     * two of at least 512. Preset to 4096.
     */
    uint32_t block_size;
    /**
     * 0.
     */
    uint32_t reserved;
};

/**
 * A run of bytes of one kind.
 */
struct blkfuse_extent {
    /**
     * Its length in bytes, at least 1.
     */
    uint64_t bytes;
    /**
     * BLKFUSE_EXTENT_HOLE or 0.
     */
    uint32_t flags;
    /**
     * 0.
     */
    uint32_t reserved;
};

/**
 * A block driver: what the host implements.
 *
 * Fill in by blkfuse_driver_ops_init() or BLKFUSE_DRIVER_OPS_INIT and set what
 * the device can do; `length` and `read` are required, everything else may be
 * NULL. The struct grows only at its end, and the library copies it.
 *
 * Threads: callbacks are called from the threads of all queues at once; those
 * of one queue come one after the other. They should not block for long: a
 * queue serves nothing else meanwhile.
 *
 * Data callbacks (read to block_status) return 0 for success, which means all
 * of it; a negative errno; or BLKFUSE_PENDING, after which the host calls
 * blkfuse_request_complete() or blkfuse_request_forward() exactly once. If
 * they did not return BLKFUSE_PENDING `request` is not valid any more. Buffers stay valid until
 * the request is completed, and are page-aligned. `flags` are 0 unless a
 * callback says otherwise; a callback that finds a flag it does not know must
 * fail with -ENOTSUP.
 *
 * Any callback may call any function, except where that one says otherwise.
 * A callback must not longjmp through the library; one that unwinds through
 * it (a C++ exception) ends the process.
 */
struct blkfuse_driver_ops {
    /**
     * sizeof(struct blkfuse_driver_ops) as the host knows it.
     */
    size_t struct_size;
    /**
     * BLKFUSE_API_VERSION as the host knows it.
     */
    uint32_t api_version;
    /**
     * Bytes of blkfuse_request_ctx() that the host wants with each request;
     * at most 1 MiB.
     */
    uint32_t request_ctx_size;
    /**
     * The device's length in bytes, or a negative errno. Required. Called by
     * blkfuse_export_start() and blkfuse_export_resized().
     */
    int64_t (*length)(void *opaque);
    /**
     * The bytes of storage that the device really occupies (st_blocks), or a
     * negative errno; -ENOTSUP, or NULL: all of the length.
     */
    int64_t (*allocated_size)(void *opaque);
    /**
     * Changes what is not as preset in `*limits`. Called by
     * blkfuse_export_start().
     */
    void (*limits)(void *opaque, struct blkfuse_limits *limits);
    /**
     * Reads `bytes` at `offset`, which lie within the length, into `buffer`.
     * Success means that all of it was set: what a callback leaves as it was
     * may be another request's. Required.
     */
    int (*read)(void *opaque,
                struct blkfuse_request *request,
                void *buffer,
                uint64_t offset,
                uint64_t bytes,
                uint32_t flags);
    /**
     * Writes `bytes` at `offset`, which lie within the length. NULL: the
     * export cannot be writable.
     */
    int (*write)(void *opaque,
                 struct blkfuse_request *request,
                 const void *buffer,
                 uint64_t offset,
                 uint64_t bytes,
                 uint32_t flags);
    /**
     * Makes durable everything that was written before. NULL: nothing is to
     * be done for that.
     */
    int (*flush)(void *opaque, struct blkfuse_request *request, uint32_t flags);
    /**
     * Gives the range's storage back; afterwards it must read as zeroes. NULL
     * or -ENOTSUP: write_zeroes with BLKFUSE_MAY_UNMAP is tried.
     */
    int (*discard)(void *opaque,
                   struct blkfuse_request *request,
                   uint64_t offset,
                   uint64_t bytes,
                   uint32_t flags);
    /**
     * Makes the range read as zeroes. Unless `flags` has BLKFUSE_MAY_UNMAP,
     * its storage stays, or becomes, allocated. NULL or -ENOTSUP: zeroes are
     * written.
     */
    int (*write_zeroes)(void *opaque,
                        struct blkfuse_request *request,
                        uint64_t offset,
                        uint64_t bytes,
                        uint32_t flags);
    /**
     * Sets the length. What is cut off is gone; what is added reads as
     * zeroes. One at a time, and no write, discard or zeroing is in flight
     * when the length becomes smaller. NULL: the export cannot be growable,
     * and clients cannot truncate.
     */
    int (*truncate)(void *opaque,
                    struct blkfuse_request *request,
                    uint64_t length,
                    uint32_t flags);
    /**
     * Stores in `*extent` what is at `offset`: it starts there, and may be
     * longer or shorter than `bytes`. NULL or -ENOTSUP: everything counts as
     * data.
     */
    int (*block_status)(void *opaque,
                        struct blkfuse_request *request,
                        uint64_t offset,
                        uint64_t bytes,
                        struct blkfuse_extent *extent,
                        uint32_t flags);
    /**
     * Queue `queue` (from 0) begins to serve; called on its thread before
     * anything else of it. May store a pointer in `*queue_ctx`. Returns 0 or
     * a negative errno, which makes the start fail, or blkfuse_queue_attach(),
     * which calls this anew for every thread.
     */
    int (*queue_start)(void *opaque, uint32_t queue, void **queue_ctx);
    /**
     * The queue has ended, or its thread leaves it; called on its thread, once
     * for each queue_start that returned 0.
     */
    void (*queue_stop)(void *opaque, uint32_t queue, void *queue_ctx);
    /**
     * Requests will follow on this queue: their submission may be held back
     * until batch_end.
     */
    void (*batch_begin)(void *opaque, uint32_t queue, void *queue_ctx);
    /**
     * The batch is over.
     */
    void (*batch_end)(void *opaque, uint32_t queue, void *queue_ctx);
    /**
     * In a drain, the number of requests in flight has become 0: ask
     * blkfuse_export_drain_poll(). From any queue's thread; may come more
     * often than needed, and late.
     */
    void (*idle)(void *opaque);
    /**
     * Something has happened: BLKFUSE_EVENT_*. From any thread. `error` is 0
     * or a negative errno, `message` a sentence or "", valid in the call.
     */
    void (*event)(void *opaque, uint32_t event, int error, const char *message);
    /**
     * The export has gone; no callback is running or will follow. Called
     * once for each successful blkfuse_export_create().
     */
    void (*deleted)(void *opaque);
    /**
     * A descriptor of the regular file whose bytes are the device's, each at
     * its own offset, for the property "passthrough"; or a negative errno:
     * there is none. It stays the host's, must stay open until `deleted`, and
     * may be opened in any mode: the kernel opens the file anew for each
     * client. Called by blkfuse_export_start() and blkfuse_export_resized().
     * NULL: there is none.
     */
    int (*backing_fd)(void *opaque);
};

/**
 * Takes one line of the log. May be called from any thread, also from
 * several at once, and must not call blkfuse. `message` is valid during the
 * call.
 */
typedef void (*blkfuse_log_callback)(void *opaque, uint32_t level, const char *message);

/**
 * What one kind of operation has come to.
 */
struct blkfuse_op_stats {
    /**
     * Requests answered.
     */
    uint64_t operations;
    /**
     * Bytes of data successfully moved.
     */
    uint64_t bytes;
    /**
     * Requests answered with an error.
     */
    uint64_t errors;
};

/**
 * What an export has done since it started. Grows only at its end.
 */
struct blkfuse_stats {
    /**
     * Reads of data.
     */
    struct blkfuse_op_stats read;
    /**
     * Writes of data.
     */
    struct blkfuse_op_stats write;
    /**
     * fsync, fdatasync, and close of a descriptor open for writing.
     */
    struct blkfuse_op_stats flush;
    /**
     * fallocate: holes punched, ranges zeroed, space allocated.
     */
    struct blkfuse_op_stats allocate;
    /**
     * Everything else: attributes, open, release, lseek, statfs.
     */
    struct blkfuse_op_stats other;
    /**
     * Requests that were begun and not yet answered.
     */
    uint64_t in_flight;
    /**
     * Reads and writes by their time from arrival to answer: element n counts
     * those of at least 2^n and less than 2^(n+1) nanoseconds; the first
     * holds what was faster, the last what was slower.
     */
    uint64_t latency[32];
};

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Creates an export of the device behind `ops` and stores it in `*out`.
 *
 * `ops` is copied. `opaque` is passed to every callback and must stay valid
 * until ops->deleted was called. Nothing is mounted yet, and no callback is
 * called before blkfuse_export_start(). On failure `*out` is unchanged, and
 * `deleted` is not called.
 *
 * Returns 0; -EINVAL: a pointer is NULL, or `struct_size` cannot be right, or
 * a required callback is missing, or `request_ctx_size` is too large;
 * -ENOTSUP: the table's API version is not one that this library knows;
 * -E2BIG: the table has callbacks that this library does not know.
 *
 * # Safety
 * `out` and `ops` must point to what their types say, the latter to
 * `struct_size` bytes.
 */
int blkfuse_export_create(struct blkfuse_export **out,
                          const struct blkfuse_driver_ops *ops,
                          void *opaque);

/**
 * Sets a property before the start.
 *
 * | key         | type | default   | meaning                                   |
 * |-------------|------|-----------|-------------------------------------------|
 * | mountpoint  | str  |           | the existing regular file to appear at    |
 * | fuse-fd     | u64  |           | instead of mounting: the descriptor of a mounted /dev/fuse whose INIT nobody has read; mount it with default_permissions, which makes the kernel check the file's mode, and max_read=1048576, or what max-request says; a successful start takes it over |
 * | source      | str  | blkfuse   | what is shown as the mounted device       |
 * | writable    | bool | off       | allow writing                             |
 * | growable    | bool | off       | let writes past the end grow the file     |
 * | passthrough | bool | off       | have the kernel read ops->backing_fd itself, at the bare file's speed, in the place of ops->read; see below |
 * | allow-other | str  | auto      | who else may use the file: on, off, or auto (on if the system permits it) |
 * | queues      | u64  | 0         | how many queues serve it, each with a thread; 0: one for each CPU available, at most 8; after the start: how many there are |
 * | threads     | str  | library   | whose threads these are: library, or host: the host's own attach themselves to the queues, blkfuse_export_get_queue(), and dispatch them from their event loops; clients wait until they do, and over io_uring the process must be allowed to run on every CPU |
 * | io-uring    | str  | auto      | whether requests come through FUSE-over-io_uring: off; on, and start fails where that cannot be; or auto (where it is to be had and has no known defects) |
 * | queue-depth | u64  |           | over io_uring: entries for each of the kernel's ring queues, of which there is one for every possible CPU; 1 to 1024; if not set, at most 64, as memory-budget allows |
 * | max-request | u64  | 1048576   | bytes of the largest read and write; a multiple of 4096 from 65536 to 1048576; if not set, over io_uring it may be less, as memory-budget allows; after the start: what was negotiated |
 * | memory-budget | u64 | 268435456 | bytes that io_uring's buffers may take |
 *
 * io_uring's buffers take possible CPUs x queue-depth x (4096 + max-request)
 * bytes. To fit memory-budget, queue-depth is lowered, to 4 at first (or as
 * many as there are queues for each possible CPU); then max-request, down to
 * 65536; then queue-depth, down to 1. What was set is not lowered: if it does
 * not fit, io_uring cannot be used.
 *
 * These can only be read: state (str: created, started, stopping, ended),
 * transport (str), protocol (str: 7.45), mount-method (str: fsmount, mount,
 * fusermount3, fuse-fd), last-error (str: why the export halted, or empty).
 *
 * "passthrough" is only for a read-only export of a device that is as long as
 * its backing file, a regular one, by a process with CAP_SYS_ADMIN in the
 * initial user namespace, since Linux 6.9; else blkfuse_export_start() fails.
 * Reads are then out of the export's hands: they are not held up by a drain,
 * not counted in the statistics, not limited to the device's length, and who
 * has the file open when the export ends can go on reading. They are what
 * reads of the backing file are: O_DIRECT needs the alignment that its file
 * system wants, and other reads go through the page cache.
 * blkfuse_export_resized() fails with -EINVAL while the two lengths differ.
 *
 * Returns 0; -ENOENT: no such property; -EINVAL: the wrong type or value;
 * -EBUSY: the export was started, or is being started; -EPERM: the property
 * can only be read.
 *
 * # Safety
 * `export` must be a live export or NULL, `key` a string or NULL.
 */
int blkfuse_export_set_bool(struct blkfuse_export *export_,
                            const char *key,
                            bool value);

/**
 * Sets a numeric property; see blkfuse_export_set_bool().
 *
 * # Safety
 * As there.
 */
int blkfuse_export_set_u64(struct blkfuse_export *export_,
                           const char *key,
                           uint64_t value);

/**
 * Sets a property of any type from text (a bool: on or off); see
 * blkfuse_export_set_bool(). `value` is copied; paths need not be UTF-8.
 *
 * # Safety
 * As there; `value` must be a string or NULL.
 */
int blkfuse_export_set_str(struct blkfuse_export *export_,
                           const char *key,
                           const char *value);

/**
 * Reads a property into `*value`; see blkfuse_export_set_bool() for the list.
 *
 * Returns 0; -ENOENT: no such property; -EINVAL: it is of another type;
 * -ENODATA: it has no value at this time. On failure `*value` is unchanged.
 *
 * # Safety
 * `export` must be a live export or NULL, `key` a string or NULL, `value`
 * writable or NULL.
 */
int blkfuse_export_get_bool(const struct blkfuse_export *export_,
                            const char *key,
                            bool *value);

/**
 * Reads a numeric property into `*value`; see blkfuse_export_get_bool().
 *
 * # Safety
 * As there.
 */
int blkfuse_export_get_u64(const struct blkfuse_export *export_,
                           const char *key,
                           uint64_t *value);

/**
 * Reads a property of any type as text into `buffer` of `size` bytes, with a
 * terminating NUL. Returns the text's length in bytes without the NUL;
 * -ERANGE: `size` is not more than that, and nothing was stored. Otherwise
 * as blkfuse_export_get_bool().
 *
 * # Safety
 * As there; `buffer` must have room for `size` bytes, or be NULL.
 */
int blkfuse_export_get_str(const struct blkfuse_export *export_,
                           const char *key,
                           char *buffer,
                           size_t size);

/**
 * Mounts the file and begins to serve it. When this returns 0 the file can be
 * used. When it fails nothing is left behind, and it can be tried again after
 * the properties were changed.
 *
 * Calls length, limits and queue_start, the latter on the queues' threads,
 * and waits for them. Data callbacks and the event STARTED may come before
 * this returns; until then the export does not count as started.
 *
 * Returns 0; -EINVAL: it was started before, or the settings contradict each
 * other; or another negative errno. The message says what of which object
 * failed, and what to do.
 *
 * # Safety
 * `export` must be a live export or NULL.
 */
int blkfuse_export_start(struct blkfuse_export *export_);

/**
 * Begins a drain. From now on no request is begun; those that arrive wait.
 * Drains nest: requests are begun again when as many
 * blkfuse_export_drain_end() have followed. Does not block.
 *
 * Returns 0; -EDEADLK: called from a callback of this export; -EINVAL: not
 * started.
 *
 * # Safety
 * `export` must be a live export or NULL.
 */
int blkfuse_export_drain_begin(struct blkfuse_export *export_);

/**
 * Whether a request is still in flight: 1 or 0. Does not block. In a drain,
 * 0 means that no callback for a request is running or pending, and none will
 * start. ops->idle is called when that becomes so. -EINVAL: not started.
 *
 * # Safety
 * `export` must be a live export or NULL.
 */
int blkfuse_export_drain_poll(struct blkfuse_export *export_);

/**
 * Ends a drain; with the last one, requests that have waited are served.
 * Does not block. -EINVAL: there is no drain, or not started.
 *
 * # Safety
 * `export` must be a live export or NULL.
 */
int blkfuse_export_drain_end(struct blkfuse_export *export_);

/**
 * Waits until every request begun so far is answered, holding later ones up
 * meanwhile. Waits at most `timeout_ms` milliseconds, or without end if that
 * is negative. Must not be called by a thread that is needed to complete
 * requests.
 *
 * Returns 0; -ETIMEDOUT; -EDEADLK: called from a callback of this export, or by
 * a thread that is attached to one of its queues; -EINVAL: not started.
 *
 * # Safety
 * `export` must be a live export or NULL.
 */
int blkfuse_export_drain(struct blkfuse_export *export_, int64_t timeout_ms);

/**
 * The device's length has changed without a client's doing. Calls ops->length
 * and tells the kernel: when this returns, clients that ask see the new length;
 * asynchronous reads and appends through open descriptors go by it, too, unless
 * this is called within a drain or a callback, or by a thread that is attached
 * to a queue, and the length grew within a page (of 4096 bytes): then from the
 * next stat on. Does not wait for clients'
 * truncations that are under way; whichever comes last counts.
 *
 * # Safety
 * `export` must be a live export or NULL.
 */
int blkfuse_export_resized(struct blkfuse_export *export_);

/**
 * Asks for the end: the file vanishes, also while it is open; requests in
 * flight are answered when the driver completes them; whoever still has the
 * file open gets errors. What clients have written into mapped memory is
 * written back after the file has vanished, and requests are served until it
 * is, except with BLKFUSE_STOP_FORCE and in a drain. Returns when that is done,
 * or after two seconds if it takes longer, or at once within a callback and in
 * a thread that is attached to one of the export's queues. `flags`: 0 or
 * BLKFUSE_STOP_*.
 *
 * Threads that are attached to queues go on dispatching until that returns
 * -ESHUTDOWN, or detach themselves. Queues without a thread are run to their
 * end by the library, without calling back but for `event`, `idle` and
 * `deleted`; what clients have in mapped memory is written back only if none
 * is without.
 *
 * Returns 0; -EBUSY: BLKFUSE_STOP_IF_IDLE and the file is in use, and nothing
 * has happened; -EINVAL: unknown flags, or not started; another error: the
 * mount could not be removed, the export ends all the same, and a further call
 * tries again.
 *
 * # Safety
 * `export` must be a live export or NULL.
 */
int blkfuse_export_stop(struct blkfuse_export *export_, uint32_t flags);

/**
 * Drops the host's reference to `*export` and clears the pointer. Stops the
 * export if that has not happened, and waits for the unmounting as
 * blkfuse_export_stop() does. The export goes away when its last request in
 * flight is completed; then ops->deleted is called once, by whatever thread,
 * perhaps before this returns. A NULL or cleared pointer is fine.
 *
 * Returns 0; -EDEADLK: called from a callback of this export; -EBUSY: it is
 * being started. On failure nothing has changed.
 *
 * # Safety
 * `export` must be NULL or point to NULL or to a live export, which nobody
 * else is using.
 */
int blkfuse_export_delete(struct blkfuse_export **export_);

/**
 * As blkfuse_export_delete(), and waits until the export is gone: ops->deleted
 * has been called and no thread is left. Waits at most `timeout_ms`
 * milliseconds, or without end if that is negative. Must not be called by a
 * thread that is needed to complete requests (-EDEADLK in one that is attached
 * to a queue).
 *
 * Returns 0; -ETIMEDOUT: the export is deleted, but the driver has not
 * completed every request; otherwise as blkfuse_export_delete().
 *
 * # Safety
 * As blkfuse_export_delete().
 */
int blkfuse_export_delete_wait(struct blkfuse_export **export_, int64_t timeout_ms);

/**
 * Why the last call on this thread that failed did so: a sentence in English,
 * or "" if none has failed. It stays valid until the next call that fails on
 * this thread. Neither this text nor an errno is stable, except where a
 * function documents it.
 */
const char *blkfuse_error_message(void);

/**
 * The library's version: major << 16 | minor << 8 | patch. The header's is
 * BLKFUSE_VERSION.
 */
uint32_t blkfuse_version(void);

/**
 * Sends the library's log to `callback`, with everything up to `level`
 * (BLKFUSE_LOG_*). NULL ends that, whatever `level` is. There is one log in a
 * process; without a callback nothing is logged. When this returns, the
 * callback that it replaced is not running and will not be called again.
 *
 * Returns 0; -EINVAL: no such level; -EBUSY: the process has a logger that is
 * not ours, as a Rust program may.
 *
 * # Safety
 * `callback` and `opaque` must stay valid until they are replaced. Must not
 * be called from within the callback.
 */
int blkfuse_set_log_callback(uint32_t level, blkfuse_log_callback callback, void *opaque);

/**
 * Queue number `index`, counted from 0 up to the property "queues", of a
 * started export with "threads" set to "host". The same at every call. NULL if
 * there is none, and then blkfuse_error_message() says why.
 *
 * # Safety
 * `export` must be a live export or NULL.
 */
struct blkfuse_queue *blkfuse_export_get_queue(const struct blkfuse_export *export_,
                                               uint32_t index);

/**
 * The descriptor to wait for: readable when the queue has something to do, and
 * now and then for nothing. Level-triggered, for epoll(7), poll(2), select(2)
 * and an io_uring's poll. It stays the same for the queue's life, also from
 * one thread to the next, and while no thread is attached it is not readable.
 * It is the library's: do not read or close it. Once the export was deleted,
 * the dispatch that returns -ESHUTDOWN closes it, and with that epoll forgets it
 * by itself; do not use the number after that. Over /dev/fuse a thread's sleep
 * may end with EINTR without a signal, if requests are forwarded.
 *
 * May be called from any thread. Returns the descriptor; -ESHUTDOWN: the queue
 * and its export have gone; -EINVAL: there was never such a queue.
 */
int blkfuse_queue_get_fd(const struct blkfuse_queue *queue);

/**
 * Makes the calling thread the one that runs the queue. Calls
 * ops->queue_start, whose error it returns. Afterwards the descriptor is
 * readable, so that the thread's loop begins to dispatch. Over io_uring this
 * makes a ring for the thread, so a thread should not attach itself for every
 * little thing.
 *
 * A thread must not end while it is attached (the main thread may, with the
 * process): the export halts then, and if the host does not complete what that
 * queue has in flight within two seconds, `deleted` is never called.
 *
 * Returns 0; -EBUSY: a thread is attached; -ESHUTDOWN: the queue has ended;
 * -EINVAL: there was never such a queue; another errno: there is no io_uring
 * for the thread, and the queue is as it was.
 */
int blkfuse_queue_attach(struct blkfuse_queue *queue);

/**
 * Serves what has come, and begins at most `budget` requests (0: 64); the rest
 * waits. Never blocks, unless a callback does. Callbacks are called from
 * here: a completion by blkfuse_request_complete() only makes the descriptor
 * readable. To be called by the attached thread whenever the descriptor is
 * readable.
 *
 * Returns 1: there is more to do at once, and the descriptor is readable; 0: there is nothing to do until the
 * descriptor is readable; -ESHUTDOWN: the queue has ended, for good: the thread
 * is not attached any more, and ops->queue_stop was called; -EPERM: another
 * thread is attached; -EINVAL: none is, or there was never such a queue;
 * -EDEADLK: within a callback of the same queue.
 */
int blkfuse_queue_dispatch(struct blkfuse_queue *queue,
                           uint32_t budget);

/**
 * Whether blkfuse_queue_dispatch() may find something to do. Makes no system
 * call: for a thread that looks again and again for a while before it sleeps.
 * What comes by /dev/fuse shows only at the descriptor, so over that transport
 * there is little to see.
 *
 * To be called by the attached thread. Returns 1 or 0; errors as
 * blkfuse_queue_dispatch().
 */
int blkfuse_queue_has_events(struct blkfuse_queue *queue);

/**
 * Lets the calling thread leave the queue: it may end, or another one attach
 * itself. Within a drain (blkfuse_export_drain_begin()), once nothing is in
 * flight (blkfuse_export_drain_poll()); requests that come meanwhile wait for
 * the next thread. Also while the export ends, which then needs no thread of
 * the host's any more. Calls ops->queue_stop. Over io_uring this has a thread
 * run on each CPU for a moment, and waits for it: what waits in this thread's
 * ring must be asked back from the kernel.
 *
 * To be called by the attached thread. Returns 0; -EBUSY: there is no drain,
 * or a request is in flight; -EPERM: over io_uring, and this thread may not
 * run on every CPU, and stays attached; -ESHUTDOWN: the queue has ended; otherwise as
 * blkfuse_queue_dispatch().
 */
int blkfuse_queue_detach(struct blkfuse_queue *queue);

/**
 * Completes a request whose callback returned BLKFUSE_PENDING, or is about
 * to: 0 for success (all of it), or a negative errno. To be called exactly
 * once for each such request; afterwards its buffer and its request_ctx are
 * not the host's any more.
 *
 * May be called from any thread, also before the callback has returned, in a
 * drain, and after blkfuse_export_delete(). It neither blocks nor calls back,
 * so the host may hold locks.
 *
 * Returns 0; -EALREADY: the request was completed before, which is noticed
 * while the export lives and unless very many requests have come since;
 * -EINVAL: `request` is NULL.
 *
 * # Safety
 * `request` must be NULL or have been given to a callback of an export that
 * has not gone.
 */
int blkfuse_request_complete(struct blkfuse_request *request, int result);

/**
 * Has a request done elsewhere: its bytes are those from `offset` on of the
 * file that `fd` is open on, a regular file or a block device. The library
 * does the I/O itself, between that file and the request's buffer and without
 * a thread waiting for it, and completes the request. To be called in place
 * of blkfuse_request_complete(), with all that is said there; within the
 * callback, which then returns what this returns:
 *
 *   return blkfuse_request_forward(request, disk->fd, disk->start + offset);
 *
 * or later, if the callback returned BLKFUSE_PENDING.
 *
 * - read: as pread(2); what lies past the end of the file is zeroes
 * - write: as pwrite(2)
 * - flush: as fdatasync(2); `offset` is of no meaning
 * - discard: punches a hole with fallocate(2)
 * - write_zeroes: zeroes the range with fallocate(2), or punches a hole if it
 *   comes with BLKFUSE_MAY_UNMAP
 *
 * What a file cannot discard or zero is done as if the callback had returned
 * -ENOTSUP. Other errors of the I/O are the request's: also those of a
 * descriptor that is not open for what is asked of it. The descriptor must
 * stay open until the request has been answered, which a drain waits for; it
 * is used with its status flags, O_DIRECT and the alignment it wants among
 * them (the buffer is page-aligned).
 *
 * Returns BLKFUSE_PENDING; -EALREADY: as for blkfuse_request_complete();
 * -EBADF: `fd` is negative; -EINVAL: `request` is NULL, or is a truncate or a
 * block_status. After an error the request is as it was before.
 *
 * # Safety
 * As for blkfuse_request_complete(), and `fd` is open until the request has
 * been answered.
 */
int blkfuse_request_forward(struct blkfuse_request *request, int fd, uint64_t offset);

/**
 * The host's room of ops->request_ctx_size bytes for this request, aligned
 * for any type; NULL if the size is 0. What it holds at the beginning is
 * undefined. Valid until the request is completed.
 *
 * # Safety
 * `request` must be NULL or a request in flight.
 */
void *blkfuse_request_ctx(struct blkfuse_request *request);

/**
 * What ops->queue_start stored for the queue of this request, or NULL.
 *
 * # Safety
 * `request` must be NULL or a request in flight.
 */
void *blkfuse_request_queue_ctx(struct blkfuse_request *request);

/**
 * Stores in `*stats` what a started export has done. `size` is
 * sizeof(struct blkfuse_stats) as the host knows it: a host older than the
 * library gets what it knows, a newer one zeroes for the rest.
 *
 * Returns 0; -EINVAL: a pointer is NULL, or not started.
 *
 * # Safety
 * `export` must be a live export or NULL; `stats` must have room for `size`
 * bytes, or be NULL.
 */
int blkfuse_export_get_stats(const struct blkfuse_export *export_,
                             struct blkfuse_stats *stats,
                             size_t size);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

/** The members with which a struct blkfuse_driver_ops must begin, for C's
    designated initialisers. */
#define BLKFUSE_DRIVER_OPS_INIT                                               \
    .struct_size = sizeof(struct blkfuse_driver_ops),                         \
    .api_version = BLKFUSE_API_VERSION

/** Makes an empty table: everything NULL but what it must begin with. */
static inline void blkfuse_driver_ops_init(struct blkfuse_driver_ops *ops)
{
    memset(ops, 0, sizeof(*ops));
    ops->struct_size = sizeof(*ops);
    ops->api_version = BLKFUSE_API_VERSION;
}

#endif /* BLKFUSE_H */
