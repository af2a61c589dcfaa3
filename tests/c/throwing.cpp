// A plugin that throws where the key says.

#include <stdexcept>

#include <blkfuse-plugin.h>

static int64_t on_length(void *)
{
    return 1 << 20;
}

static int on_read(void *, blkfuse_request *, void *, uint64_t, uint64_t, uint32_t)
{
    throw std::runtime_error("read");
}

static int on_open(const blkfuse_plugin_setting *settings, uint32_t,
                   const blkfuse_driver_ops **ops, void **, char *, size_t)
{
    static blkfuse_driver_ops driver;

    if (settings->key)
        throw std::runtime_error("open");
    blkfuse_driver_ops_init(&driver);
    driver.length = on_length;
    driver.read = on_read;
    *ops = &driver;
    return 0;
}

extern "C" const blkfuse_plugin *blkfuse_plugin_get()
{
    static const blkfuse_plugin_key keys[] = { { "early", nullptr }, { nullptr, nullptr } };
    static blkfuse_plugin plugin;

    blkfuse_plugin_init(&plugin);
    plugin.name = "throwing";
    plugin.keys = keys;
    plugin.open = on_open;
    return &plugin;
}
