/* log.c - the log: who gets which lines, and when no more. */
#include "harness.h"

struct lines {
    pthread_mutex_t lock;
    int of_level[5];
};

static struct lines first = { PTHREAD_MUTEX_INITIALIZER, { 0 } };
static struct lines second = { PTHREAD_MUTEX_INITIALIZER, { 0 } };

static void collect(void *opaque, uint32_t level, const char *message)
{
    struct lines *lines = (struct lines *)opaque;

    CHECK(level >= BLKFUSE_LOG_ERROR && level <= BLKFUSE_LOG_DEBUG);
    CHECK(message[0] != '\0' && strchr(message, '\n') == NULL);
    pthread_mutex_lock(&lines->lock);
    lines->of_level[level]++;
    pthread_mutex_unlock(&lines->lock);
}

static int total(struct lines *lines)
{
    int level, sum = 0;

    pthread_mutex_lock(&lines->lock);
    for (level = 0; level < 5; level++)
        sum += lines->of_level[level];
    pthread_mutex_unlock(&lines->lock);
    return sum;
}

static int odd_read(void *opaque, struct blkfuse_request *request, void *buffer, uint64_t offset,
                    uint64_t bytes, uint32_t flags)
{
    memory_read(opaque, request, buffer, offset, bytes, flags);
    return 42; /* which is a defect, and logged as an error */
}

/* Makes an information and an error. */
static void make_lines(void)
{
    struct blkfuse_driver_ops ops = memory_ops();
    struct blkfuse_export *export_;
    char buffer[16];
    int fd;

    ops.read = odd_read;
    export_ = started(&ops, NULL);
    fd = open_file(O_RDONLY);
    CHECK(pread(fd, buffer, sizeof(buffer), 0) == -1 && errno == EIO);
    close(fd);
    finished(export_);
}

int main(int argc, char **argv)
{
    int before;

    begin(argc, argv);
    CHECK(blkfuse_set_log_callback(0, NULL, NULL) == 0); /* there is none */
    CHECK(blkfuse_set_log_callback(0, collect, &first) == -EINVAL);
    CHECK(blkfuse_error_message()[0] != '\0');
    CHECK(blkfuse_set_log_callback(5, collect, &first) == -EINVAL);
    make_lines();
    CHECK(total(&first) == 0);

    CHECK(blkfuse_set_log_callback(BLKFUSE_LOG_ERROR, collect, &first) == 0);
    make_lines();
    CHECK(first.of_level[BLKFUSE_LOG_ERROR] == 1 && total(&first) == 1);

    CHECK(blkfuse_set_log_callback(BLKFUSE_LOG_INFO, collect, &first) == 0);
    make_lines();
    CHECK(first.of_level[BLKFUSE_LOG_ERROR] == 2);
    CHECK(first.of_level[BLKFUSE_LOG_INFO] >= 1);
    CHECK(first.of_level[BLKFUSE_LOG_DEBUG] == 0);

    /* Another one replaces it; a level that does not exist changes nothing. */
    before = total(&first);
    CHECK(blkfuse_set_log_callback(BLKFUSE_LOG_DEBUG, collect, &second) == 0);
    CHECK(blkfuse_set_log_callback(77, collect, &first) == -EINVAL);
    make_lines();
    CHECK(total(&first) == before && second.of_level[BLKFUSE_LOG_ERROR] == 1);

    /* None. */
    before = total(&second);
    CHECK(blkfuse_set_log_callback(0, NULL, NULL) == 0);
    make_lines();
    CHECK(total(&second) == before);

    /* And again one. */
    CHECK(blkfuse_set_log_callback(BLKFUSE_LOG_ERROR, collect, &second) == 0);
    make_lines();
    CHECK(second.of_level[BLKFUSE_LOG_ERROR] == 2);
    return 0;
}
