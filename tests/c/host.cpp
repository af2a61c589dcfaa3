// host.cpp - a C++17 host: a class that owns its export, and a lambda-fed
// thread that completes its reads. The test is its own client.
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <sys/mount.h>
#include <unistd.h>

#include <blkfuse.h>

namespace {

void check(int result)
{
    if (result < 0)
        throw std::runtime_error(blkfuse_error_message());
}

void require(bool condition, const char *what)
{
    if (!condition)
        throw std::runtime_error(what);
}

class Disk {
public:
    Disk(const std::string &mountpoint, const std::string &queues) : worker_([this] { work(); })
    {
        blkfuse_driver_ops ops;
        blkfuse_driver_ops_init(&ops);
        ops.length = [](void *self) { return static_cast<int64_t>(of(self).data_.size()); };
        ops.read = [](void *self, blkfuse_request *request, void *buffer, uint64_t offset,
                      uint64_t bytes, uint32_t) {
            of(self).later([self, request, buffer, offset, bytes] {
                std::memcpy(buffer, of(self).data_.data() + offset, bytes);
                blkfuse_request_complete(request, 0);
            });
            return BLKFUSE_PENDING;
        };
        ops.write = [](void *self, blkfuse_request *, const void *buffer, uint64_t offset,
                       uint64_t bytes, uint32_t) {
            std::memcpy(of(self).data_.data() + offset, buffer, bytes);
            return 0;
        };
        try {
            check(blkfuse_export_create(&export_, &ops, this));
            check(blkfuse_export_set_str(export_, "mountpoint", mountpoint.c_str()));
            check(blkfuse_export_set_str(export_, "queues", queues.c_str()));
            check(blkfuse_export_set_bool(export_, "writable", true));
            check(blkfuse_export_start(export_));
        } catch (...) {
            end();
            throw;
        }
    }

    ~Disk() { end(); }
    Disk(const Disk &) = delete;
    Disk &operator=(const Disk &) = delete;

    const std::vector<char> &data() const { return data_; }

private:
    static Disk &of(void *self) { return *static_cast<Disk *>(self); }

    void end()
    {
        blkfuse_export_delete_wait(&export_, -1);
        later(nullptr);
        worker_.join();
    }

    void later(std::function<void()> job)
    {
        std::lock_guard<std::mutex> hold(lock_);
        jobs_.push_back(std::move(job));
        changed_.notify_one();
    }

    void work()
    {
        for (;;) {
            std::unique_lock<std::mutex> hold(lock_);
            changed_.wait(hold, [this] { return !jobs_.empty(); });
            auto job = std::move(jobs_.front());
            jobs_.pop_front();
            hold.unlock();
            if (!job)
                return;
            job();
        }
    }

    std::vector<char> data_ = std::vector<char>(1 << 20);
    std::mutex lock_;
    std::condition_variable changed_;
    std::deque<std::function<void()>> jobs_;
    blkfuse_export *export_ = nullptr;
    std::thread worker_; // last: it uses the others
};

void use(const std::string &mountpoint, const std::string &queues)
{
    Disk disk(mountpoint, queues);
    int fd = open(mountpoint.c_str(), O_RDWR | O_CLOEXEC);
    require(fd >= 0, "open");
    const std::string text = "from C++";
    std::string back(text.size(), '\0');
    const auto size = static_cast<ssize_t>(text.size());
    require(pwrite(fd, text.data(), text.size(), 4093) == size, "write");
    require(pread(fd, &back[0], back.size(), 4093) == size, "read");
    require(back == text, "the text");
    require(std::memcmp(disk.data().data() + 4093, text.data(), text.size()) == 0, "the data");
    close(fd);
}

} // namespace

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    std::thread([path = std::string(argv[1])] {
        std::this_thread::sleep_for(std::chrono::seconds(30));
        std::fprintf(stderr, "WATCHDOG: aborting %s\n", path.c_str());
        umount2(path.c_str(), MNT_FORCE | MNT_DETACH);
        _exit(3);
    }).detach();
    try {
        use(argv[1], argv[2]);
        try {
            Disk nowhere("/nonexistent/disk", argv[2]);
            require(false, "a disk at no place");
        } catch (const std::runtime_error &error) {
            require(std::strstr(error.what(), "/nonexistent/disk") != nullptr, error.what());
        }
        use(argv[1], argv[2]);
    } catch (const std::exception &error) {
        std::fprintf(stderr, "host: %s\n", error.what());
        umount2(argv[1], MNT_FORCE | MNT_DETACH);
        return 1;
    }
    return 0;
}
