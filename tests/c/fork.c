/*
 * fork.c - a host that forks while its export is up, as a test tells it:
 * FORK MOUNTPOINT QUEUES on|off fork|exec|clone, where on or off is for io-uring. It
 * prints its child's number, deletes the export at SIGUSR1 and ends at SIGTERM.
 * The child ends when the input does.
 */
#include "harness.h"

#include <signal.h>
#include <sys/syscall.h>

static void be_child(bool executes)
{
    char byte;

    /* What is in memory still works here; what it takes to serve does not. */
    if (executes) {
        execlp("cat", "cat", (char *)NULL);
        _exit(1);
    }
    while (read(0, &byte, 1) > 0)
        ;
    _exit(0);
}

int main(int argc, char **argv)
{
    struct blkfuse_driver_ops ops = memory_ops();
    struct blkfuse_export *export_;
    sigset_t signals;
    int number = 0;
    pid_t child;

    CHECK(argc == 5);
    mountpoint = argv[1];
    queues = argv[2];
    sigemptyset(&signals);
    sigaddset(&signals, SIGUSR1);
    sigaddset(&signals, SIGTERM);
    CHECK(pthread_sigmask(SIG_BLOCK, &signals, NULL) == 0);

    export_ = created(&ops, NULL);
    CHECK(blkfuse_export_set_str(export_, "io-uring", argv[3]) == 0);
    CHECK(blkfuse_export_start(export_) == 0);
    /* Past the C library nothing of the library is told of it. */
    if (strcmp(argv[4], "clone") == 0)
        child = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
    else
        child = fork();
    CHECK(child >= 0);
    if (child == 0)
        be_child(strcmp(argv[4], "exec") == 0);
    printf("%d\n", (int)child);
    fflush(stdout);
    while (sigwait(&signals, &number) == 0 && number == SIGUSR1) {
        finished(export_);
        printf("deleted\n");
        fflush(stdout);
    }
    return 0;
}
