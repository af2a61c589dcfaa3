/* reentrancy.c - what a callback may do with its own export, and what not. */
#include "harness.h"

static struct blkfuse_export *mine;
static struct flag tried = FLAG;
static bool trying;

/* Would wait for the caller itself. */
static void try_all(void)
{
    struct blkfuse_export *before = mine;
    struct blkfuse_stats stats;
    uint64_t number = 0;

    REFUSED(blkfuse_export_delete(&mine), EDEADLK);
    REFUSED(blkfuse_export_delete_wait(&mine, 0), EDEADLK);
    REFUSED(blkfuse_export_delete_wait(&mine, -1), EDEADLK);
    REFUSED(blkfuse_export_drain_begin(mine), EDEADLK);
    REFUSED(blkfuse_export_drain(mine, -1), EDEADLK);
    REFUSED(blkfuse_export_drain(mine, 0), EDEADLK);
    CHECK(mine == before);
    /* What is allowed. */
    CHECK(blkfuse_export_drain_poll(mine) >= 0);
    CHECK(blkfuse_export_get_u64(mine, "queues", &number) == 0 && number > 0);
    CHECK(blkfuse_export_get_stats(mine, &stats, sizeof(stats)) == 0);
    flag_add(&tried);
}

static int64_t try_length(void *opaque)
{
    if (trying)
        try_all();
    return memory_length(opaque);
}

static int64_t try_allocated_size(void *opaque)
{
    (void)opaque;
    try_all();
    return -ENOTSUP;
}

static int try_read(void *opaque, struct blkfuse_request *request, void *buffer, uint64_t offset,
                    uint64_t bytes, uint32_t flags)
{
    try_all();
    return memory_read(opaque, request, buffer, offset, bytes, flags);
}

static int try_flush(void *opaque, struct blkfuse_request *request, uint32_t flags)
{
    (void)opaque, (void)flags;
    CHECK(blkfuse_request_complete(request, 0) == 0);
    try_all();
    return BLKFUSE_PENDING;
}

static void try_queue(void *opaque, uint32_t queue, void *queue_ctx)
{
    (void)opaque, (void)queue, (void)queue_ctx;
    if (trying)
        try_all();
}

static int start_queue(void *opaque, uint32_t queue, void **queue_ctx)
{
    (void)opaque, (void)queue, (void)queue_ctx;
    REFUSED(blkfuse_export_delete(&mine), EBUSY);
    REFUSED(blkfuse_export_delete_wait(&mine, -1), EBUSY);
    REFUSED(blkfuse_export_start(mine), EINVAL);
    REFUSED(blkfuse_export_set_bool(mine, "writable", false), EBUSY);
    REFUSED(blkfuse_export_drain_begin(mine), EINVAL);
    return 0;
}

static struct flag unmounted = FLAG;
static struct flag idle = FLAG;

static void try_event(void *opaque, uint32_t event, int error, const char *message)
{
    (void)opaque;
    CHECK(message != NULL);
    if (event == BLKFUSE_EVENT_STARTED) {
        CHECK(error == 0);
        REFUSED(blkfuse_export_delete(&mine), EBUSY);
        return;
    }
    CHECK(event == BLKFUSE_EVENT_UNMOUNTED && error == 0);
    try_all();
    CHECK(blkfuse_export_stop(mine, 0) == 0);
    flag_add(&unmounted);
}

static void try_idle(void *opaque)
{
    (void)opaque;
    try_all();
    flag_add(&idle);
}

static struct blkfuse_driver_ops trying_ops(void)
{
    struct blkfuse_driver_ops ops = memory_ops();

    ops.length = try_length;
    ops.allocated_size = try_allocated_size;
    ops.read = try_read;
    ops.flush = try_flush;
    ops.queue_start = start_queue;
    ops.queue_stop = try_queue;
    ops.batch_begin = try_queue;
    ops.batch_end = try_queue;
    ops.event = try_event;
    ops.idle = try_idle;
    return ops;
}

static void from_everywhere(void)
{
    struct blkfuse_driver_ops ops = trying_ops();
    struct stat attributes;
    char buffer[512];
    int fd, before;

    mine = created(&ops, NULL);
    CHECK(blkfuse_export_start(mine) == 0);
    trying = true;
    fd = open_file(O_RDWR);
    before = flag_get(&tried);
    CHECK(pread(fd, buffer, sizeof(buffer), 0) == sizeof(buffer));
    CHECK(fsync(fd) == 0);
    CHECK(fstat(fd, &attributes) == 0 && attributes.st_size == SIZE);
    CHECK(blkfuse_export_resized(mine) == 0);
    CHECK(flag_get(&tried) >= before + 4);
    close(fd);

    /* From outside; the event's callback cannot delete, this thread can. */
    CHECK(umount2(mountpoint, MNT_DETACH) == 0);
    flag_wait(&unmounted, 1);
    trying = false;
    finished(mine);
    mine = NULL;
}

static struct blkfuse_request *held;
static struct flag holding = FLAG;

static int hold_read(void *opaque, struct blkfuse_request *request, void *buffer, uint64_t offset,
                     uint64_t bytes, uint32_t flags)
{
    memory_read(opaque, request, buffer, offset, bytes, flags);
    held = request;
    flag_add(&holding);
    return BLKFUSE_PENDING;
}

static void from_idle(void)
{
    struct blkfuse_driver_ops ops = trying_ops();
    struct client client;
    int fd;

    ops.read = hold_read;
    mine = created(&ops, NULL);
    CHECK(blkfuse_export_start(mine) == 0);
    fd = open_file(O_RDONLY);
    client_start(&client, fd, false, 0);
    flag_wait(&holding, 1);
    CHECK(blkfuse_export_drain_begin(mine) == 0);
    CHECK(blkfuse_request_complete(held, 0) == 0);
    flag_wait(&idle, 1);
    client_join(&client);
    CHECK(client.result == 4096);
    CHECK(blkfuse_export_drain(mine, -1) == 0); /* the hook has returned */
    CHECK(blkfuse_export_drain_end(mine) == 0);
    close(fd);
    finished(mine);
    mine = NULL;
}

static int stop_read(void *opaque, struct blkfuse_request *request, void *buffer, uint64_t offset,
                     uint64_t bytes, uint32_t flags)
{
    CHECK(blkfuse_export_stop(mine, 0) == 0);
    return memory_read(opaque, request, buffer, offset, bytes, flags);
}

static struct flag queues_stopped = FLAG;

static void try_queue_stop(void *opaque, uint32_t queue, void *queue_ctx)
{
    (void)opaque, (void)queue, (void)queue_ctx;
    try_all();
    flag_add(&queues_stopped);
}

static void stopped_by_a_callback(void)
{
    struct blkfuse_driver_ops ops = trying_ops();
    char buffer[512];
    int fd;

    ops.read = stop_read;
    ops.queue_stop = try_queue_stop;
    mine = created(&ops, NULL);
    CHECK(blkfuse_export_start(mine) == 0);
    fd = open_file(O_RDONLY);
    CHECK(pread(fd, buffer, sizeof(buffer), 0) == sizeof(buffer));
    flag_wait(&queues_stopped, atoi(queues));
    close(fd);
    finished(mine);
    CHECK(flag_get(&queues_stopped) == atoi(queues));
}

int main(int argc, char **argv)
{
    begin(argc, argv);
    from_everywhere();
    from_idle();
    stopped_by_a_callback();
    CHECK(flag_get(&deleted) == 3);
    return 0;
}
