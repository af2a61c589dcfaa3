/* arguments.c - everything that can be refused without serving anything. */
#include "harness.h"

static void null_everywhere(void)
{
    struct blkfuse_driver_ops ops = memory_ops();
    struct blkfuse_export *export_ = NULL, *none = NULL;
    struct blkfuse_stats stats;
    char text[64] = "unchanged";
    uint64_t number = 7;
    bool truth = true;

    REFUSED(blkfuse_export_create(NULL, &ops, NULL), EINVAL);
    REFUSED(blkfuse_export_create(&export_, NULL, NULL), EINVAL);
    CHECK(export_ == NULL);
    REFUSED(blkfuse_export_set_bool(none, "writable", true), EINVAL);
    REFUSED(blkfuse_export_set_u64(none, "queues", 1), EINVAL);
    REFUSED(blkfuse_export_set_str(none, "source", "x"), EINVAL);
    REFUSED(blkfuse_export_get_bool(none, "writable", &truth), EINVAL);
    REFUSED(blkfuse_export_get_u64(none, "queues", &number), EINVAL);
    REFUSED(blkfuse_export_get_str(none, "source", text, sizeof(text)), EINVAL);
    REFUSED(blkfuse_export_start(none), EINVAL);
    REFUSED(blkfuse_export_drain_begin(none), EINVAL);
    REFUSED(blkfuse_export_drain_poll(none), EINVAL);
    REFUSED(blkfuse_export_drain_end(none), EINVAL);
    REFUSED(blkfuse_export_drain(none, 0), EINVAL);
    REFUSED(blkfuse_export_resized(none), EINVAL);
    REFUSED(blkfuse_export_stop(none, 0), EINVAL);
    REFUSED(blkfuse_export_get_stats(none, &stats, sizeof(stats)), EINVAL);
    REFUSED(blkfuse_request_complete(NULL, 0), EINVAL);
    CHECK(blkfuse_request_ctx(NULL) == NULL);
    CHECK(blkfuse_request_queue_ctx(NULL) == NULL);

    CHECK(blkfuse_export_create(&export_, &ops, NULL) == 0);
    REFUSED(blkfuse_export_set_bool(export_, NULL, true), EINVAL);
    REFUSED(blkfuse_export_set_u64(export_, NULL, 1), EINVAL);
    REFUSED(blkfuse_export_set_str(export_, NULL, "x"), EINVAL);
    REFUSED(blkfuse_export_set_str(export_, "source", NULL), EINVAL);
    REFUSED(blkfuse_export_get_bool(export_, NULL, &truth), EINVAL);
    REFUSED(blkfuse_export_get_bool(export_, "writable", NULL), EINVAL);
    REFUSED(blkfuse_export_get_u64(export_, NULL, &number), EINVAL);
    REFUSED(blkfuse_export_get_u64(export_, "queues", NULL), EINVAL);
    REFUSED(blkfuse_export_get_str(export_, NULL, text, sizeof(text)), EINVAL);
    REFUSED(blkfuse_export_get_str(export_, "source", NULL, sizeof(text)), EINVAL);
    CHECK(blkfuse_export_delete(&export_) == 0);
    CHECK(truth == true && number == 7 && strcmp(text, "unchanged") == 0);
}

static void properties(void)
{
    struct blkfuse_driver_ops ops = memory_ops();
    struct blkfuse_export *export_ = NULL;
    char text[64] = "unchanged";
    uint64_t number = 7;
    bool truth = true;

    CHECK(blkfuse_export_create(&export_, &ops, NULL) == 0);

    REFUSED(blkfuse_export_set_bool(export_, "colour", true), ENOENT);
    REFUSED(blkfuse_export_set_u64(export_, "", 1), ENOENT);
    REFUSED(blkfuse_export_set_str(export_, "colour", "red"), ENOENT);
    REFUSED(blkfuse_export_get_bool(export_, "colour", &truth), ENOENT);
    REFUSED(blkfuse_export_get_u64(export_, "colour", &number), ENOENT);
    REFUSED(blkfuse_export_get_str(export_, "colour", text, sizeof(text)), ENOENT);
    REFUSED(blkfuse_export_set_bool(export_, "\xff", true), EINVAL);
    CHECK(strstr(blkfuse_error_message(), "UTF-8") != NULL);

    REFUSED(blkfuse_export_set_bool(export_, "queues", true), EINVAL);
    CHECK(strstr(blkfuse_error_message(), "queues") != NULL);
    REFUSED(blkfuse_export_set_u64(export_, "writable", 1), EINVAL);
    REFUSED(blkfuse_export_set_bool(export_, "mountpoint", true), EINVAL);
    REFUSED(blkfuse_export_get_u64(export_, "writable", &number), EINVAL);
    REFUSED(blkfuse_export_get_bool(export_, "queues", &truth), EINVAL);
    REFUSED(blkfuse_export_get_u64(export_, "source", &number), EINVAL);

    REFUSED(blkfuse_export_set_str(export_, "queues", "many"), EINVAL);
    REFUSED(blkfuse_export_set_u64(export_, "queues", 257), EINVAL);
    REFUSED(blkfuse_export_set_str(export_, "writable", "maybe"), EINVAL);
    REFUSED(blkfuse_export_set_str(export_, "allow-other", "some"), EINVAL);
    REFUSED(blkfuse_export_set_u64(export_, "fuse-fd", UINT64_MAX), EINVAL);
    REFUSED(blkfuse_export_set_str(export_, "io-uring", "perhaps"), EINVAL);
    REFUSED(blkfuse_export_set_u64(export_, "queue-depth", 0), EINVAL);
    REFUSED(blkfuse_export_set_u64(export_, "max-request", 65537), EINVAL);
    REFUSED(blkfuse_export_set_str(export_, "memory-budget", "much"), EINVAL);

    REFUSED(blkfuse_export_set_str(export_, "state", "started"), EPERM);
    REFUSED(blkfuse_export_set_u64(export_, "protocol", 7), EPERM);

    /* Not known before the start. */
    REFUSED(blkfuse_export_get_str(export_, "protocol", text, sizeof(text)), ENODATA);
    REFUSED(blkfuse_export_get_str(export_, "transport", text, sizeof(text)), ENODATA);
    REFUSED(blkfuse_export_get_u64(export_, "queue-depth", &number), ENODATA);
    REFUSED(blkfuse_export_get_u64(export_, "fuse-fd", &number), ENODATA);
    CHECK(truth == true && number == 7 && strcmp(text, "unchanged") == 0);

    /* Text is taken for every type, and given. */
    CHECK(blkfuse_export_set_str(export_, "writable", "on") == 0);
    CHECK(blkfuse_export_get_bool(export_, "writable", &truth) == 0 && truth);
    CHECK(blkfuse_export_set_str(export_, "queues", "3") == 0);
    CHECK(blkfuse_export_get_u64(export_, "queues", &number) == 0 && number == 3);
    CHECK(blkfuse_export_get_str(export_, "queues", text, sizeof(text)) == 1);
    CHECK(strcmp(text, "3") == 0);
    CHECK(blkfuse_export_get_str(export_, "writable", text, sizeof(text)) == 2);
    CHECK(strcmp(text, "on") == 0);
    CHECK(blkfuse_export_get_u64(export_, "max-request", &number) == 0 && number == 1048576);
    CHECK(blkfuse_export_set_u64(export_, "max-request", 65536) == 0);
    CHECK(blkfuse_export_get_u64(export_, "max-request", &number) == 0 && number == 65536);
    CHECK(blkfuse_export_get_str(export_, "state", text, sizeof(text)) == 7);
    CHECK(strcmp(text, "created") == 0);

    /* A buffer that is too small is left alone. */
    CHECK(blkfuse_export_set_str(export_, "source", "four") == 0);
    memset(text, 'x', sizeof(text));
    REFUSED(blkfuse_export_get_str(export_, "source", text, 0), ERANGE);
    REFUSED(blkfuse_export_get_str(export_, "source", text, 4), ERANGE);
    CHECK(strstr(blkfuse_error_message(), "5 bytes") != NULL);
    CHECK(text[0] == 'x' && text[4] == 'x');
    CHECK(blkfuse_export_get_str(export_, "source", text, 5) == 4);
    CHECK(strcmp(text, "four") == 0 && text[5] == 'x');

    /* A path need not be UTF-8. */
    CHECK(blkfuse_export_set_str(export_, "mountpoint", "/\xff/disk") == 0);
    CHECK(blkfuse_export_get_str(export_, "mountpoint", text, sizeof(text)) == 7);
    CHECK(strcmp(text, "/\xff/disk") == 0);
    CHECK(blkfuse_export_delete(&export_) == 0);
}

/* A table as a newer header might have it. */
struct newer {
    struct blkfuse_driver_ops ops;
    void (*unknown)(void);
};

static void nothing(void)
{
}

static void tables(void)
{
    struct blkfuse_export *export_ = NULL;
    struct blkfuse_driver_ops ops = memory_ops();
    struct newer newer;
    int before = flag_get(&deleted);

    ops.struct_size = 0;
    REFUSED(blkfuse_export_create(&export_, &ops, NULL), EINVAL);
    ops.struct_size = offsetof(struct blkfuse_driver_ops, read);
    REFUSED(blkfuse_export_create(&export_, &ops, NULL), EINVAL);
    ops.struct_size = sizeof(ops) - 1; /* half a pointer */
    REFUSED(blkfuse_export_create(&export_, &ops, NULL), EINVAL);
    ops.struct_size = SIZE_MAX; /* not initialised */
    REFUSED(blkfuse_export_create(&export_, &ops, NULL), EINVAL);

    ops = memory_ops();
    ops.api_version = BLKFUSE_API_VERSION + 1;
    REFUSED(blkfuse_export_create(&export_, &ops, NULL), ENOTSUP);
    ops.api_version = 0;
    REFUSED(blkfuse_export_create(&export_, &ops, NULL), ENOTSUP);

    ops = memory_ops();
    ops.read = NULL;
    REFUSED(blkfuse_export_create(&export_, &ops, NULL), EINVAL);
    CHECK(strstr(blkfuse_error_message(), "read") != NULL);
    ops = memory_ops();
    ops.length = NULL;
    REFUSED(blkfuse_export_create(&export_, &ops, NULL), EINVAL);
    ops = memory_ops();
    ops.request_ctx_size = (1 << 20) + 1;
    REFUSED(blkfuse_export_create(&export_, &ops, NULL), EINVAL);

    memset(&newer, 0, sizeof(newer));
    newer.ops = memory_ops();
    newer.ops.struct_size = sizeof(newer);
    newer.unknown = nothing;
    REFUSED(blkfuse_export_create(&export_, &newer.ops, NULL), E2BIG);
    CHECK(export_ == NULL);
    CHECK(flag_get(&deleted) == before);

    /* One that a newer host does not use is fine, and so is an older table. */
    newer.unknown = NULL;
    CHECK(blkfuse_export_create(&export_, &newer.ops, NULL) == 0);
    CHECK(blkfuse_export_delete(&export_) == 0);
    CHECK(flag_get(&deleted) == before + 1);
    ops = memory_ops();
    ops.struct_size = offsetof(struct blkfuse_driver_ops, write);
    CHECK(blkfuse_export_create(&export_, &ops, NULL) == 0);
    CHECK(blkfuse_export_delete(&export_) == 0);
    CHECK(flag_get(&deleted) == before + 1); /* it had no such member */
}

static void deleting(void)
{
    struct blkfuse_driver_ops ops = memory_ops();
    struct blkfuse_export *export_ = NULL;
    int before = flag_get(&deleted);

    CHECK(blkfuse_export_delete(NULL) == 0);
    CHECK(blkfuse_export_delete(&export_) == 0);
    CHECK(blkfuse_export_delete_wait(NULL, -1) == 0);
    CHECK(blkfuse_export_delete_wait(&export_, 0) == 0);
    CHECK(flag_get(&deleted) == before);

    /* One that was never started. */
    CHECK(blkfuse_export_create(&export_, &ops, NULL) == 0);
    CHECK(blkfuse_export_delete(&export_) == 0);
    CHECK(export_ == NULL);
    CHECK(flag_get(&deleted) == before + 1);
    CHECK(blkfuse_export_delete(&export_) == 0);
    CHECK(flag_get(&deleted) == before + 1);
    CHECK(blkfuse_export_create(&export_, &ops, NULL) == 0);
    CHECK(blkfuse_export_delete_wait(&export_, -1) == 0);
    CHECK(export_ == NULL);
    CHECK(flag_get(&deleted) == before + 2);
}

static void *other_thread(void *arg)
{
    (void)arg;
    CHECK(strcmp(blkfuse_error_message(), "") == 0);
    REFUSED(blkfuse_request_complete(NULL, 0), EINVAL);
    CHECK(strstr(blkfuse_error_message(), "request") != NULL);
    return NULL;
}

static void messages(void)
{
    struct blkfuse_driver_ops ops = memory_ops();
    struct blkfuse_export *export_ = NULL;
    pthread_t thread;
    const char *message;

    REFUSED(blkfuse_export_start(NULL), EINVAL);
    message = blkfuse_error_message();
    CHECK(strstr(message, "export") != NULL);
    CHECK(pthread_create(&thread, NULL, other_thread, NULL) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    /* Neither another thread's failure nor a success here changes it. */
    CHECK(blkfuse_export_create(&export_, &ops, NULL) == 0);
    CHECK(blkfuse_export_delete(&export_) == 0);
    CHECK(blkfuse_error_message() == message);
    CHECK(strstr(message, "export") != NULL);
}

int main(int argc, char **argv)
{
    begin(argc, argv);
    CHECK(strcmp(blkfuse_error_message(), "") == 0);
    CHECK(blkfuse_version() == BLKFUSE_VERSION);
    null_everywhere();
    properties();
    tables();
    deleting();
    messages();
    return 0;
}
