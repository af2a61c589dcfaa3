/* drain.c - many drains under load, waited for by the idle hook alone. */
#include "harness.h"

#include <sched.h>

#define CLIENTS 4
#define DRAINS 300

struct job {
    struct job *next;
    struct blkfuse_request *request;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct job *jobs;
static bool ending;
static unsigned long reads; /* begun */
static struct flag done = FLAG;

static int queue_read(void *opaque, struct blkfuse_request *request, void *buffer, uint64_t offset,
                      uint64_t bytes, uint32_t flags)
{
    struct job *job = (struct job *)blkfuse_request_ctx(request);

    memory_read(opaque, request, buffer, offset, bytes, flags);
    pthread_mutex_lock(&lock);
    reads++;
    job->request = request;
    job->next = jobs;
    jobs = job;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    return BLKFUSE_PENDING;
}

static void *complete_jobs(void *arg)
{
    (void)arg;
    pthread_mutex_lock(&lock);
    while (!ending || jobs) {
        struct job *job = jobs;

        if (!job) {
            pthread_cond_wait(&changed, &lock);
            continue;
        }
        jobs = job->next;
        pthread_mutex_unlock(&lock);
        CHECK(blkfuse_request_complete(job->request, 0) == 0);
        pthread_mutex_lock(&lock);
    }
    pthread_mutex_unlock(&lock);
    return NULL;
}

static void on_idle(void *opaque)
{
    (void)opaque;
    pthread_mutex_lock(&lock);
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static void *read_on(void *arg)
{
    char buffer[512];
    int fd = *(int *)arg;

    while (flag_get(&done) == 0)
        CHECK(pread(fd, buffer, sizeof(buffer), 0) == sizeof(buffer));
    return NULL;
}

static void drain(struct blkfuse_export *export_)
{
    unsigned long before;
    int i;

    CHECK(blkfuse_export_drain_begin(export_) == 0);
    pthread_mutex_lock(&lock);
    while (blkfuse_export_drain_poll(export_) > 0)
        pthread_cond_wait(&changed, &lock);
    before = reads;
    pthread_mutex_unlock(&lock);

    /* Nested: it stays drained until the outermost end. */
    CHECK(blkfuse_export_drain(export_, -1) == 0);
    for (i = 0; i < 20; i++)
        sched_yield();
    pthread_mutex_lock(&lock);
    CHECK(reads == before);
    CHECK(jobs == NULL);
    pthread_mutex_unlock(&lock);
    CHECK(blkfuse_export_drain_end(export_) == 0);

    /* Who waited is served. */
    pthread_mutex_lock(&lock);
    while (reads == before)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

int main(int argc, char **argv)
{
    struct blkfuse_driver_ops ops = memory_ops();
    struct blkfuse_export *export_;
    pthread_t clients[CLIENTS], worker;
    int fd, i;

    begin(argc, argv);
    ops.request_ctx_size = sizeof(struct job);
    ops.read = queue_read;
    ops.idle = on_idle;
    export_ = started(&ops, NULL);
    fd = open_file(O_RDONLY);
    CHECK(pthread_create(&worker, NULL, complete_jobs, NULL) == 0);
    for (i = 0; i < CLIENTS; i++)
        CHECK(pthread_create(&clients[i], NULL, read_on, &fd) == 0);
    for (i = 0; i < DRAINS; i++)
        drain(export_);
    flag_add(&done);
    for (i = 0; i < CLIENTS; i++)
        CHECK(pthread_join(clients[i], NULL) == 0);
    close(fd);
    finished(export_);
    pthread_mutex_lock(&lock);
    ending = true;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    CHECK(pthread_join(worker, NULL) == 0);
    return 0;
}
