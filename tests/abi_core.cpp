// A stand-in for NIXL's core and, with PLUGIN, for a plugin installed with it: the class of a backend engine as released, or with
// what open proposals put into it (one macro each). The core loads the plugin that its argument names, makes an engine, calls it
// through the class, and prints what came back. Names are NIXL's, since they are what is compared; declarations are ours.

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

enum nixl_mem_t { DRAM };
enum nixl_xfer_op_t { READ };
enum nixl_status_t { SUCCESS = 0, NOT_SUPPORTED = -9 };
enum class nixl_cost_t { analytical };
template <class T> class nixlDescList;
class nixlBlobDesc;
class nixlMetaDesc;
class nixlRemoteMetaDesc;
class nixlBackendMD;
class nixlBackendReqH;
class nixlAgentOptionalArgs;
struct nixlBackendOptionalArgs;
class nixlDeviceProxyBackendAdapter {};
struct nixl_xfer_entry_events_t;

using Text = std::string;
using Params = std::unordered_map<Text, Text>;
using Notifs = std::vector<std::pair<Text, Text>>;
using Metas = nixlDescList<nixlMetaDesc>;

struct nixlBackendInitParams {
#ifdef UNKNOWN_PARAMETER
    std::uint64_t flags = 7;
#endif
    Text localAgent;
    Text type;
    Params *customParams;
    bool enableProgTh;
    std::uint64_t pthrDelay;
    int syncMode;
    bool enableTelemetry;
#if defined(NOTIFICATION_CALLBACKS) || defined(TRACER)
    std::unordered_map<Text, std::function<void()>> callbacks;
    void *tracer = nullptr;
#endif
};

class nixlBackendEngine {
  public:
    Text backendType;
    Params customParams;
#ifdef BACKEND_ID
    std::uint64_t backendId = 0;
#endif
    std::vector<int> telemetryEvents;
    std::mutex telemetryMutex;
    bool initErr = false;
    const Text localAgent;
    const bool enableTelemetry = false;
#ifdef TRACER
    void *tracer = nullptr;
#endif

    virtual ~nixlBackendEngine() = default;
    virtual bool supportsRemote() const = 0;
    virtual bool supportsLocal() const = 0;
    virtual bool supportsNotif() const = 0;
#ifdef NOTIFICATION_CALLBACKS
    virtual bool supportsNotifCallback() const { return false; }
    virtual bool supportsNotifInjection() const { return false; }
#endif
#ifdef DEVICE_PROXY
    virtual bool supportsProxy() const { return false; }
#endif
#ifdef SEND_RECEIVE
    virtual bool supportsSendRecv() const { return false; }
#endif
#ifdef UNKNOWN_FUNCTION
    virtual nixl_status_t reserve(std::size_t) { return NOT_SUPPORTED; }
#endif
#ifdef UNKNOWN_DUTY
    virtual bool supportsMore() const = 0;
#endif
    virtual std::vector<nixl_mem_t> getSupportedMems() const = 0;
    virtual nixl_status_t registerMem(const nixlBlobDesc &, const nixl_mem_t &, nixlBackendMD *&) = 0;
    virtual nixl_status_t deregisterMem(nixlBackendMD *) = 0;
    virtual nixl_status_t connect(const Text &) = 0;
    virtual nixl_status_t disconnect(const Text &) = 0;
    virtual nixl_status_t unloadMD(nixlBackendMD *) = 0;
    virtual nixl_status_t prepXfer(const nixl_xfer_op_t &, const Metas &, const Metas &, const Text &, nixlBackendReqH *&,
                                   const nixlBackendOptionalArgs *) const = 0;
    virtual nixl_status_t postXfer(const nixl_xfer_op_t &, const Metas &, const Metas &, const Text &, nixlBackendReqH *&,
                                   const nixlBackendOptionalArgs *) const = 0;
#ifdef SEND_RECEIVE
    virtual nixl_status_t prepTagXfer(nixl_xfer_op_t, const Metas &, const Text &, const Text &, nixlBackendReqH *&,
                                      const nixlBackendOptionalArgs *) const {
        return NOT_SUPPORTED;
    }
    virtual nixl_status_t postTagXfer(nixl_xfer_op_t, const Metas &, const Text &, const Text &, nixlBackendReqH *&,
                                      const nixlBackendOptionalArgs *) const {
        return NOT_SUPPORTED;
    }
#endif
    virtual nixl_status_t checkXfer(nixlBackendReqH *) const = 0;
#ifdef PATH_INFORMATION
    virtual nixl_status_t checkXferEvents(nixlBackendReqH *, nixl_xfer_entry_events_t &) const { return NOT_SUPPORTED; }
    virtual void getXferPathInfo(const nixlBackendReqH *, std::vector<Text> &) const {}
#endif
    virtual nixl_status_t releaseReqH(nixlBackendReqH *) const = 0;
    virtual nixl_status_t prepMemView(const nixlDescList<nixlRemoteMetaDesc> &, void *&,
                                      const nixlBackendOptionalArgs *) const {
        return NOT_SUPPORTED;
    }
    virtual nixl_status_t prepMemView(const Metas &, void *&, const nixlBackendOptionalArgs *) const { return NOT_SUPPORTED; }
    virtual void releaseMemView(void *) const {}
#ifdef DEVICE_PROXY
    virtual nixl_status_t createDeviceProxyBackendAdapter(const nixlBackendInitParams &,
                                                          std::unique_ptr<nixlDeviceProxyBackendAdapter> &) {
        return NOT_SUPPORTED;
    }
#endif
    virtual nixl_status_t getPublicData(const nixlBackendMD *, Text &) const { return NOT_SUPPORTED; }
    virtual nixl_status_t getConnInfo(Text &) const { return NOT_SUPPORTED; }
    virtual nixl_status_t loadRemoteConnInfo(const Text &, const Text &) { return NOT_SUPPORTED; }
    virtual nixl_status_t loadRemoteMD(const nixlBlobDesc &, const nixl_mem_t &, const Text &, nixlBackendMD *&) {
        return NOT_SUPPORTED;
    }
    virtual nixl_status_t loadLocalMD(nixlBackendMD *, nixlBackendMD *&) { return NOT_SUPPORTED; }
    virtual nixl_status_t getNotifs(Notifs &) { return NOT_SUPPORTED; }
    virtual nixl_status_t genNotif(const Text &, const Text &) const { return NOT_SUPPORTED; }
    virtual nixl_status_t queryMem(const nixlDescList<nixlBlobDesc> &, std::vector<std::optional<Params>> &) const {
        return NOT_SUPPORTED;
    }
    virtual nixl_status_t estimateXferCost(const nixl_xfer_op_t &, const Metas &, const Metas &, const Text &,
                                           nixlBackendReqH *const &, std::chrono::microseconds &, std::chrono::microseconds &,
                                           nixl_cost_t &, const nixlAgentOptionalArgs *) const {
        return NOT_SUPPORTED;
    }
#ifdef LAST_FUNCTION
    virtual bool supportsNotifInjection() const { return true; }
#endif
};

#ifdef PLUGIN

// Never made: its constructor is what the table of its base is written for.
struct Engine : nixlBackendEngine {
    Engine();
};
Engine::Engine() {}

#else

#define CHECK(condition)                                                         \
    do {                                                                         \
        if (!(condition)) {                                                      \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                        \
        }                                                                        \
    } while (0)

struct Plugin {
    int api_version;
    nixlBackendEngine *(*create_engine)(const nixlBackendInitParams *);
    void (*destroy_engine)(nixlBackendEngine *);
};

static void call(nixlBackendEngine &engine) {
    CHECK(!engine.initErr && engine.backendType == "LIBFABRIC" && engine.telemetryEvents.empty());
    CHECK(engine.supportsRemote() && engine.supportsNotif() && engine.supportsLocal());
#ifdef NOTIFICATION_CALLBACKS
    CHECK(!engine.supportsNotifCallback() && !engine.supportsNotifInjection());
#endif
#ifdef LAST_FUNCTION
    CHECK(!engine.supportsNotifInjection());
#endif
#ifdef BACKEND_ID
    CHECK(engine.backendId == 0);
#endif
#ifdef DEVICE_PROXY
    std::unique_ptr<nixlDeviceProxyBackendAdapter> adapter;
    CHECK(!engine.supportsProxy() && engine.createDeviceProxyBackendAdapter({}, adapter) == NOT_SUPPORTED && !adapter);
#endif
#ifdef PATH_INFORMATION
    std::vector<Text> paths;
    engine.getXferPathInfo(nullptr, paths);
    CHECK(paths.empty());
#endif
    Text info;
    CHECK(engine.getConnInfo(info) == SUCCESS && !info.empty());
    CHECK(engine.connect("me") == SUCCESS && engine.getSupportedMems().at(0) == DRAM);
    Notifs notifs;
    CHECK(engine.genNotif("me", "hello") == SUCCESS);
    for (int turn = 0; notifs.empty() && turn < 1000000; ++turn) {
        CHECK(engine.getNotifs(notifs) == SUCCESS);
#ifdef UNKNOWN_FUNCTION
        CHECK(engine.reserve(1) == NOT_SUPPORTED);
#endif
    }
    CHECK((notifs == Notifs{{"me", "hello"}}));
}

int main(int, char **arguments) {
    void *library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    CHECK(library);
    const auto *plugin = reinterpret_cast<const Plugin *(*)()>(dlsym(library, "nixl_plugin_init"))();
    Params options = {{"provider", "tcp"}};
    nixlBackendInitParams init = {};
    init.localAgent = "me";
    init.type = "LIBFABRIC";
    init.customParams = &options;
    nixlBackendEngine *engine = plugin->create_engine(&init);
    if (!engine) {
        std::puts("refused");
        return 0;
    }
    call(*engine);
    plugin->destroy_engine(engine);
    std::puts("served");
}

#endif
