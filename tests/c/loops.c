/* loops.c - queues that the host's threads run: who may do what, when, and with
   what the library answers. The main thread serves, and so is never a client. */
#include "harness.h"

#include <poll.h>

#define MAX_QUEUES 16

static const char *transport;

/* Calls that are known by their names. */
static struct blkfuse_queue *all[MAX_QUEUES];
static int count;

/* A function that returns a queue must return none, and say why. */
#define NO_QUEUE(call)              \
    do {                            \
        mark_message();             \
        CHECK((call) == NULL);      \
        CHECK(message_is_new());    \
    } while (0)

/* ---- An export whose queues are ours ---- */

static struct blkfuse_export *hosted(const struct blkfuse_driver_ops *ops, void *opaque)
{
    struct blkfuse_export *export_ = created(ops, opaque);
    uint64_t number = 0;
    int i;

    CHECK(blkfuse_export_set_str(export_, "threads", "host") == 0);
    CHECK(blkfuse_export_set_str(export_, "io-uring", transport) == 0);
    CHECK(blkfuse_export_start(export_) == 0);
    CHECK(blkfuse_export_get_u64(export_, "queues", &number) == 0 && number <= MAX_QUEUES);
    count = (int)number;
    for (i = 0; i < count; i++) {
        all[i] = blkfuse_export_get_queue(export_, (uint32_t)i);
        CHECK(all[i] != NULL);
        CHECK(blkfuse_queue_get_fd(all[i]) >= 0);
    }
    return export_;
}

static void attach_all(void)
{
    int i;

    for (i = 0; i < count; i++)
        CHECK(blkfuse_queue_attach(all[i]) == 0);
}

static bool is_readable(struct blkfuse_queue *queue, int timeout_ms)
{
    struct pollfd fd = { blkfuse_queue_get_fd(queue), POLLIN, 0 };
    int n;

    CHECK(fd.fd >= 0);
    do
        n = poll(&fd, 1, timeout_ms);
    while (n < 0 && errno == EINTR);
    CHECK(n >= 0);
    return n > 0;
}

/* Serves what there is. */
static void dispatch_all(void)
{
    int i, more;

    for (i = 0; i < count; i++) {
        more = blkfuse_queue_dispatch(all[i], 0);
        CHECK(more == 0 || more == 1);
        if (more)
            CHECK(is_readable(all[i], 0));
    }
}

/* Waits until one of them has something to do; after `timeout_ms` at the latest. */
static void wait_all(int timeout_ms)
{
    struct pollfd fds[MAX_QUEUES];
    int i;

    for (i = 0; i < count; i++) {
        /* That of a queue that has gone is negative, and passed over. */
        fds[i].fd = blkfuse_queue_get_fd(all[i]);
        fds[i].events = POLLIN;
    }
    CHECK(poll(fds, (nfds_t)count, timeout_ms) >= 0 || errno == EINTR);
}

/* Serves until all queues have ended. They end together, not one by one. */
static void serve_to_the_end(void)
{
    bool has_ended[MAX_QUEUES] = { false };
    int i, left = count;

    while (left > 0) {
        for (i = 0; i < count; i++) {
            int more = blkfuse_queue_dispatch(all[i], 0);

            CHECK(more == 0 || more == 1 || more == -ESHUTDOWN);
            CHECK(!has_ended[i] || more == -ESHUTDOWN);
            if (more == -ESHUTDOWN && !has_ended[i]) {
                has_ended[i] = true;
                left--;
            }
        }
        if (left == count)
            wait_all(-1);
    }
}

/* Serves until a flag has a value. */
static void serve_until(struct flag *flag, int value)
{
    while (flag_get(flag) < value) {
        dispatch_all();
        /* Whether a client is done does not show there, and is looked at again. */
        wait_all(1);
    }
}

/* The host asks for the end, and runs its queues until then. */
static void ended(struct blkfuse_export *export_)
{
    int i, before = flag_get(&deleted);

    CHECK(blkfuse_export_stop(export_, 0) == 0); /* does not wait for us */
    serve_to_the_end();
    /* It has ended for good, but its name and its descriptor are there. */
    for (i = 0; i < count; i++) {
        REFUSED(blkfuse_queue_dispatch(all[i], 0), ESHUTDOWN);
        REFUSED(blkfuse_queue_attach(all[i]), ESHUTDOWN);
        REFUSED(blkfuse_queue_detach(all[i]), ESHUTDOWN);
        CHECK(blkfuse_queue_has_events(all[i]) != 0);
        CHECK(blkfuse_queue_get_fd(all[i]) >= 0);
        CHECK(blkfuse_export_get_queue(export_, (uint32_t)i) == all[i]);
    }
    finished(export_);
    CHECK(flag_get(&deleted) == before + 1);
    /* And now only the name. */
    for (i = 0; i < count; i++) {
        REFUSED(blkfuse_queue_dispatch(all[i], 0), ESHUTDOWN);
        REFUSED(blkfuse_queue_has_events(all[i]), ESHUTDOWN);
        REFUSED(blkfuse_queue_attach(all[i]), ESHUTDOWN);
        REFUSED(blkfuse_queue_detach(all[i]), ESHUTDOWN);
        REFUSED(blkfuse_queue_get_fd(all[i]), ESHUTDOWN);
    }
}

/* ---- Clients, in threads of their own ---- */

static struct flag clients_done = FLAG;

/* Opens, reads 4096 bytes, and closes: all of which somebody has to serve. */
struct reader {
    pthread_t thread;
    off_t offset;
    char buffer[4096];
    ssize_t result;
};

static void *reader_main(void *arg)
{
    struct reader *reader = (struct reader *)arg;
    int fd = open_file(O_RDONLY);

    reader->result = pread(fd, reader->buffer, sizeof(reader->buffer), reader->offset);
    close(fd);
    flag_add(&clients_done);
    return NULL;
}

static void reader_start(struct reader *reader, off_t offset)
{
    reader->offset = offset;
    CHECK(pthread_create(&reader->thread, NULL, reader_main, reader) == 0);
}

static void reader_join(struct reader *reader)
{
    CHECK(pthread_join(reader->thread, NULL) == 0);
    CHECK(reader->result == sizeof(reader->buffer));
    CHECK(memcmp(reader->buffer, content + reader->offset, sizeof(reader->buffer)) == 0);
}

static void read_served(off_t offset)
{
    struct reader reader;
    int before = flag_get(&clients_done);

    reader_start(&reader, offset);
    serve_until(&clients_done, before + 1);
    reader_join(&reader);
}

/* Has another thread do something that does not need this one. */
static void elsewhere(void *(*function)(void *), void *arg)
{
    pthread_t thread;

    CHECK(pthread_create(&thread, NULL, function, arg) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
}

/* ---- The tests ---- */

static void which_queues_there_are(void)
{
    struct blkfuse_driver_ops ops = memory_ops();
    struct blkfuse_export *export_;

    NO_QUEUE(blkfuse_export_get_queue(NULL, 0));
    export_ = created(&ops, NULL);
    CHECK(blkfuse_export_set_str(export_, "threads", "host") == 0);
    REFUSED(blkfuse_export_set_str(export_, "threads", "mine"), EINVAL);
    NO_QUEUE(blkfuse_export_get_queue(export_, 0)); /* it is not started */
    CHECK(blkfuse_export_set_str(export_, "threads", "library") == 0);
    CHECK(blkfuse_export_start(export_) == 0);
    NO_QUEUE(blkfuse_export_get_queue(export_, 0));
    CHECK(strstr(blkfuse_error_message(), "\"threads\"") != NULL);
    finished(export_);

    export_ = hosted(&ops, NULL);
    REFUSED(blkfuse_export_set_str(export_, "threads", "library"), EBUSY);
    CHECK(count == atoi(queues));
    NO_QUEUE(blkfuse_export_get_queue(export_, (uint32_t)count));
    NO_QUEUE(blkfuse_export_get_queue(export_, UINT32_MAX));
    CHECK(blkfuse_export_get_queue(export_, 0) == all[0]);
    CHECK(count == 1 || all[1] != all[0]);
    CHECK(count == 1 || blkfuse_queue_get_fd(all[1]) != blkfuse_queue_get_fd(all[0]));
    attach_all();
    ended(export_);
}

static void wrong_names(void)
{
    struct blkfuse_queue *const wrong[] = {
        NULL,
        (struct blkfuse_queue *)1,
        (struct blkfuse_queue *)((uintptr_t)all[0] + 1),
        (struct blkfuse_queue *)((uintptr_t)all[0] + 8),
        (struct blkfuse_queue *)((uintptr_t)all[0] + 16000), /* not made so far */
        (struct blkfuse_queue *)&all,
        (struct blkfuse_queue *)(UINTPTR_MAX - 15),
        (struct blkfuse_queue *)UINTPTR_MAX,
    };
    size_t i;

    for (i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        REFUSED(blkfuse_queue_get_fd(wrong[i]), EINVAL);
        REFUSED(blkfuse_queue_attach(wrong[i]), EINVAL);
        REFUSED(blkfuse_queue_dispatch(wrong[i], 0), EINVAL);
        REFUSED(blkfuse_queue_has_events(wrong[i]), EINVAL);
        REFUSED(blkfuse_queue_detach(wrong[i]), EINVAL);
    }
}

static void *not_attached(void *queue_)
{
    struct blkfuse_queue *queue = (struct blkfuse_queue *)queue_;

    REFUSED(blkfuse_queue_attach(queue), EBUSY);
    REFUSED(blkfuse_queue_dispatch(queue, 0), EPERM);
    CHECK(strstr(blkfuse_error_message(), "queue 0") != NULL);
    REFUSED(blkfuse_queue_has_events(queue), EPERM);
    REFUSED(blkfuse_queue_detach(queue), EPERM);
    CHECK(blkfuse_queue_get_fd(queue) >= 0);
    return NULL;
}

static void the_wrong_thread_and_time(void)
{
    struct blkfuse_driver_ops ops = memory_ops();
    struct blkfuse_export *export_ = hosted(&ops, NULL), *before = export_;
    int i;

    wrong_names();
    for (i = 0; i < count; i++) {
        REFUSED(blkfuse_queue_dispatch(all[i], 0), EINVAL);
        REFUSED(blkfuse_queue_has_events(all[i]), EINVAL);
        REFUSED(blkfuse_queue_detach(all[i]), EINVAL);
        CHECK(!is_readable(all[i], 0));
        CHECK(blkfuse_queue_attach(all[i]) == 0);
        CHECK(is_readable(all[i], 0));
        REFUSED(blkfuse_queue_attach(all[i]), EBUSY);
    }
    elsewhere(not_attached, all[0]);
    read_served(0);

    /* What would wait for the caller itself. */
    REFUSED(blkfuse_export_drain(export_, -1), EDEADLK);
    REFUSED(blkfuse_export_drain(export_, 0), EDEADLK);
    REFUSED(blkfuse_export_delete_wait(&export_, -1), EDEADLK);
    REFUSED(blkfuse_export_delete_wait(&export_, 0), EDEADLK);
    CHECK(export_ == before);

    REFUSED(blkfuse_queue_detach(all[0]), EBUSY);
    CHECK(strstr(blkfuse_error_message(), "drain") != NULL);
    read_served(4096);
    CHECK(blkfuse_export_drain_begin(export_) == 0);
    while (blkfuse_export_drain_poll(export_) > 0)
        dispatch_all();
    for (i = 0; i < count; i++) {
        CHECK(blkfuse_queue_detach(all[i]) == 0);
        CHECK(!is_readable(all[i], 0));
        REFUSED(blkfuse_queue_detach(all[i]), EINVAL);
        REFUSED(blkfuse_queue_dispatch(all[i], 0), EINVAL);
    }
    CHECK(blkfuse_export_drain(export_, 0) == 0); /* this thread is free to wait */
    attach_all();
    CHECK(blkfuse_export_drain_end(export_) == 0);
    read_served(8192);
    ended(export_);
}

static struct flag tried = FLAG;

static int try_read(void *opaque, struct blkfuse_request *request, void *buffer, uint64_t offset,
                    uint64_t bytes, uint32_t flags)
{
    int i, busy = 0;

    /* One of them has called this; the others can be dispatched from here. */
    for (i = 0; i < count; i++) {
        int more = blkfuse_queue_dispatch(all[i], 0);

        if (more == -EDEADLK) {
            REFUSED(blkfuse_queue_dispatch(all[i], 0), EDEADLK);
            REFUSED(blkfuse_queue_has_events(all[i]), EDEADLK);
            REFUSED(blkfuse_queue_detach(all[i]), EDEADLK);
            REFUSED(blkfuse_queue_attach(all[i]), EBUSY);
            busy++;
        } else {
            CHECK(more == 0 || more == 1);
        }
    }
    CHECK(busy == 1);
    flag_add(&tried);
    return memory_read(opaque, request, buffer, offset, bytes, flags);
}

static void within_a_callback(void)
{
    struct blkfuse_driver_ops ops = memory_ops();
    struct blkfuse_export *export_;
    int before = flag_get(&tried);

    ops.read = try_read;
    export_ = hosted(&ops, NULL);
    attach_all();
    read_served(0);
    CHECK(flag_get(&tried) > before);
    ended(export_);
}

/* What the driver says of its threads. */
static struct {
    int error;
    pthread_t thread; /* which it was called by last */
    int starts, stops;
    char names[MAX_QUEUES];
} told;

static int tell_start(void *opaque, uint32_t queue, void **queue_ctx)
{
    CHECK(opaque == &told && (int)queue < count);
    CHECK(*queue_ctx == NULL);
    if (told.error != 0)
        return told.error;
    told.thread = pthread_self();
    told.starts++;
    *queue_ctx = &told.names[queue];
    return 0;
}

static void tell_stop(void *opaque, uint32_t queue, void *queue_ctx)
{
    CHECK(opaque == &told && queue_ctx == &told.names[queue]);
    CHECK(pthread_equal(told.thread, pthread_self()));
    told.stops++;
}

/* Reads who has begun the queue that it comes by. */
static int read_name(void *opaque, struct blkfuse_request *request, void *buffer, uint64_t offset,
                     uint64_t bytes, uint32_t flags)
{
    const char *name = (const char *)blkfuse_request_queue_ctx(request);

    CHECK(name >= told.names && name < told.names + count);
    CHECK(pthread_equal(told.thread, pthread_self()));
    content[offset] = *name;
    return memory_read(opaque, request, buffer, offset, bytes, flags);
}

static void a_driver_that_refuses_a_thread(void)
{
    struct blkfuse_driver_ops ops = memory_ops();
    struct blkfuse_export *export_;
    int i;

    memset(&told, 0, sizeof(told));
    ops.read = read_name;
    ops.queue_start = tell_start;
    ops.queue_stop = tell_stop;
    export_ = hosted(&ops, &told);
    for (i = 0; i < count; i++) {
        told.error = -EACCES;
        REFUSED(blkfuse_queue_attach(all[i]), EACCES);
        told.error = 7; /* is no success */
        REFUSED(blkfuse_queue_attach(all[i]), EIO);
        REFUSED(blkfuse_queue_dispatch(all[i], 0), EINVAL);
        CHECK(!is_readable(all[i], 0));
        told.error = 0;
        CHECK(blkfuse_queue_attach(all[i]) == 0);
        CHECK(told.starts == i + 1);
    }
    read_served(0);
    CHECK(told.stops == 0);
    ended(export_);
    CHECK(told.starts == count && told.stops == count);
}

static void *next_thread(void *arg)
{
    (void)arg;
    attach_all();
    flag_add(&tried);
    serve_to_the_end();
    return NULL;
}

static void from_thread_to_thread(void)
{
    struct blkfuse_driver_ops ops = memory_ops();
    struct blkfuse_export *export_;
    struct reader reader;
    pthread_t next;
    int i, before = flag_get(&tried);

    memset(&told, 0, sizeof(told));
    memset(told.names, 'a', sizeof(told.names));
    ops.read = read_name;
    ops.queue_start = tell_start;
    ops.queue_stop = tell_stop;
    export_ = hosted(&ops, &told);
    attach_all();
    read_served(0);
    CHECK(content[0] == 'a');
    CHECK(blkfuse_export_drain_begin(export_) == 0);
    while (blkfuse_export_drain_poll(export_) > 0)
        dispatch_all();
    for (i = 0; i < count; i++)
        CHECK(blkfuse_queue_detach(all[i]) == 0);
    CHECK(told.stops == count);

    memset(told.names, 'b', sizeof(told.names));
    CHECK(pthread_create(&next, NULL, next_thread, NULL) == 0);
    flag_wait(&tried, before + 1);
    CHECK(told.starts == 2 * count);
    CHECK(pthread_equal(told.thread, next));
    CHECK(blkfuse_export_drain_end(export_) == 0);
    reader_start(&reader, 4096);
    reader_join(&reader);
    CHECK(content[4096] == 'b');
    finished(export_); /* by a thread that runs no queue */
    CHECK(pthread_join(next, NULL) == 0);
    CHECK(told.stops == 2 * count);
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

static void *complete_held(void *arg)
{
    (void)arg;
    CHECK(blkfuse_request_complete(held, 0) == 0);
    return NULL;
}

static bool any_is_readable(void)
{
    int i;

    for (i = 0; i < count; i++) {
        if (is_readable(all[i], 0))
            return true;
    }
    return false;
}

static void a_completion_elsewhere_wakes_the_queue(void)
{
    struct blkfuse_driver_ops ops = memory_ops();
    struct blkfuse_export *export_;
    struct reader reader;
    int round;

    ops.read = hold_read;
    export_ = hosted(&ops, NULL);
    attach_all();
    for (round = 0; round < 20; round++) {
        int before = flag_get(&clients_done), calls = flag_get(&holding);

        reader_start(&reader, round * 4096);
        serve_until(&holding, calls + 1);
        while (any_is_readable())
            dispatch_all();
        elsewhere(complete_held, NULL);
        /* It makes the descriptor readable, and does nothing else. */
        CHECK(any_is_readable());
        CHECK(flag_get(&clients_done) == before);
        serve_until(&clients_done, before + 1);
        reader_join(&reader);
        CHECK(flag_get(&holding) == calls + 1);
    }
    ended(export_);
}

static struct flag reads = FLAG;

static int count_read(void *opaque, struct blkfuse_request *request, void *buffer, uint64_t offset,
                      uint64_t bytes, uint32_t flags)
{
    flag_add(&reads);
    return memory_read(opaque, request, buffer, offset, bytes, flags);
}

#define READERS 8

static void no_more_than_the_budget(void)
{
    struct blkfuse_driver_ops ops = memory_ops();
    struct blkfuse_export *export_;
    struct reader readers[READERS];
    int i, before = flag_get(&clients_done);

    ops.read = count_read;
    export_ = hosted(&ops, NULL);
    attach_all();
    for (i = 0; i < READERS; i++)
        reader_start(&readers[i], i * 4096);
    while (flag_get(&clients_done) < before + READERS) {
        for (i = 0; i < count; i++) {
            int begun = flag_get(&reads), more = blkfuse_queue_dispatch(all[i], 1);

            CHECK(more == 0 || (more == 1 && is_readable(all[i], 0)));
            CHECK(flag_get(&reads) <= begun + 1);
        }
        wait_all(1);
    }
    for (i = 0; i < READERS; i++)
        reader_join(&readers[i]);
    ended(export_);
}

/* Nobody was ever attached, or nobody is any more. */
static void ends_without_a_thread(void)
{
    struct blkfuse_driver_ops ops = memory_ops();
    struct blkfuse_export *export_ = hosted(&ops, NULL);
    int i;

    finished(export_);
    for (i = 0; i < count; i++)
        REFUSED(blkfuse_queue_attach(all[i]), ESHUTDOWN);

    /* A thread may leave in the middle of the end. */
    export_ = hosted(&ops, NULL);
    attach_all();
    read_served(0);
    CHECK(blkfuse_export_stop(export_, 0) == 0);
    for (i = 0; i < count; i++) {
        int left = blkfuse_queue_detach(all[i]);

        CHECK(left == 0 || left == -EBUSY);
        while (left == -EBUSY && blkfuse_queue_dispatch(all[i], 0) != -ESHUTDOWN)
            left = blkfuse_queue_detach(all[i]);
    }
    finished(export_);
}

int main(int argc, char **argv)
{
    static const char *const transports[] = { "off", "auto" };
    size_t i;

    begin(argc, argv);
    for (i = 0; i < SIZE; i++)
        content[i] = (char)(i * 7 ^ i >> 8);
    for (i = 0; i < sizeof(transports) / sizeof(transports[0]); i++) {
        transport = transports[i];
        which_queues_there_are();
        the_wrong_thread_and_time();
        within_a_callback();
        a_driver_that_refuses_a_thread();
        from_thread_to_thread();
        a_completion_elsewhere_wakes_the_queue();
        no_more_than_the_budget();
        ends_without_a_thread();
    }
    return 0;
}
