/* glib.c - a host whose one loop is GLib's: it watches the queues' descriptors
   beside everything else that the program has. */
#include "harness.h"

#include <glib-unix.h>

#define ROUNDS 200

static GMainLoop *loop;
static guint watched; /* how many queues the loop has */
static bool has_deleted;

static gboolean on_readable(gint fd, GIOCondition condition, gpointer queue)
{
    int more = blkfuse_queue_dispatch((struct blkfuse_queue *)queue, 16);

    (void)fd, (void)condition;
    if (more == -ESHUTDOWN) {
        if (--watched == 0)
            g_main_loop_quit(loop);
        return G_SOURCE_REMOVE;
    }
    CHECK(more == 0 || more == 1);
    return G_SOURCE_CONTINUE;
}

/* The loop does other things, too. */
static gboolean on_tick(gpointer ticks)
{
    ++*(int *)ticks;
    return G_SOURCE_CONTINUE;
}

/* The client is done: its thread has the loop delete the export. */
static gboolean on_done(gpointer export_)
{
    struct blkfuse_export *mine = (struct blkfuse_export *)export_;

    REFUSED(blkfuse_export_delete_wait(&mine, -1), EDEADLK);
    CHECK(blkfuse_export_delete(&mine) == 0); /* the queues end in the loop */
    has_deleted = true;
    return G_SOURCE_REMOVE;
}

static void *client(void *export_)
{
    char data[4096], back[4096];
    int fd = open_file(O_RDWR), i;

    for (i = 0; i < ROUNDS; i++) {
        off_t offset = (i * 4096 * 7) % SIZE;

        memset(data, i, sizeof(data));
        CHECK(pwrite(fd, data, sizeof(data), offset) == sizeof(data));
        CHECK(pread(fd, back, sizeof(back), offset) == sizeof(back));
        CHECK(memcmp(data, back, sizeof(back)) == 0);
    }
    CHECK(fsync(fd) == 0);
    close(fd);
    g_idle_add(on_done, export_);
    return NULL;
}

static void serve(const char *transport)
{
    struct blkfuse_driver_ops ops = memory_ops();
    struct blkfuse_export *export_ = created(&ops, NULL);
    uint64_t count = 0, i;
    pthread_t thread;
    guint timer;
    int ticks = 0, before = flag_get(&deleted);

    CHECK(blkfuse_export_set_str(export_, "threads", "host") == 0);
    CHECK(blkfuse_export_set_str(export_, "io-uring", transport) == 0);
    CHECK(blkfuse_export_start(export_) == 0);
    CHECK(blkfuse_export_get_u64(export_, "queues", &count) == 0);
    loop = g_main_loop_new(NULL, FALSE);
    for (i = 0; i < count; i++) {
        struct blkfuse_queue *queue = blkfuse_export_get_queue(export_, (uint32_t)i);

        CHECK(blkfuse_queue_attach(queue) == 0);
        g_unix_fd_add(blkfuse_queue_get_fd(queue), G_IO_IN, on_readable, queue);
        watched++;
    }
    timer = g_timeout_add(1, on_tick, &ticks);
    has_deleted = false;
    CHECK(pthread_create(&thread, NULL, client, export_) == 0);
    g_main_loop_run(loop);
    CHECK(has_deleted && watched == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    flag_wait(&deleted, before + 1);
    CHECK(!is_mounted());
    CHECK(ticks > 0);
    g_source_remove(timer);
    g_main_loop_unref(loop);
}

int main(int argc, char **argv)
{
    begin(argc, argv);
    serve("off");
    serve("auto");
    return 0;
}
