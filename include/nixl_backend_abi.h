// NIXL's backend plugin ABI (api_version 1) as the compiled core expects it: our own declarations of the same shapes.
//
// Facts read off NIXL's public headers and its wheels 1.0.0 to 1.5.1, whose order of virtual functions and layout are one:
// x86-64 and aarch64 Linux, libstdc++ with the C++11 std::string. `src/abi/layout.rs` compares the order with the NIXL that
// makes an engine, `tests/abi_layout.rs` with the wheels that tests run on.
// A namespace of our own and hidden visibility, so that no weak symbol of ours ever meets one of libnixl.so.
#ifndef NIXL_BACKEND_ABI_H
#define NIXL_BACKEND_ABI_H

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#pragma GCC visibility push(hidden)

namespace nixl_abi {

enum class Mem : int { dram = 0, vram = 1, block = 2, object = 3, file = 4 };
enum class Op : int { read = 0, write = 1 };
enum class Sync : int { none = 0, strict = 1, rw = 2 };
enum class Cost : int { analytical_backend = 0 };

enum class Status : int {
    in_progress = 1,
    success = 0,
    not_posted = -1,
    invalid_param = -2,
    backend = -3,
    not_found = -4,
    mismatch = -5,
    not_allowed = -6,
    repost_active = -7,
    unknown = -8,
    not_supported = -9,
    remote_disconnect = -10,
    canceled = -11,
    no_telemetry = -12,
};

using Params = std::unordered_map<std::string, std::string>;
using Mems = std::vector<Mem>;
using Notifications = std::vector<std::pair<std::string, std::string>>;
using QueryAnswers = std::vector<std::optional<Params>>;

struct InitParams {
    std::string localAgent;
    std::string type;
    Params *customParams;
    bool enableProgTh;
    std::uint64_t pthrDelay; // microseconds
    Sync syncMode;
    bool enableTelemetry;
};

// Base of what an engine hands out for a memory region.
struct BackendMD {
    bool isPrivate;

    explicit BackendMD(bool is_private) : isPrivate(is_private) {}
    BackendMD(const BackendMD &) = delete;
    BackendMD &operator=(const BackendMD &) = delete;
    virtual ~BackendMD() = default;
};

// Base of what an engine hands out for a transfer.
struct BackendReqH {
    BackendReqH() = default;
    BackendReqH(const BackendReqH &) = delete;
    BackendReqH &operator=(const BackendReqH &) = delete;
    virtual ~BackendReqH() = default;
};

struct BasicDesc {
    std::uint64_t addr;
    std::uint64_t len;
    std::uint64_t devId;
};

struct MetaDesc : BasicDesc {
    BackendMD *metadata;
};

struct BlobDesc : BasicDesc {
    std::string metaInfo;
};

struct RemoteMetaDesc; // only named: memory views are not supported

// Read only: NIXL's core makes these, and its virtual functions are not ours to call.
template <class Desc> struct DescList {
    Mem mem;
    std::vector<Desc> descs;

    DescList(const DescList &) = delete;
    DescList &operator=(const DescList &) = delete;
    virtual ~DescList() = default;
};

using MetaDescs = DescList<MetaDesc>;
using RegDescs = DescList<BlobDesc>;
using RemoteMetaDescs = DescList<RemoteMetaDesc>;

// Optional arguments of a transfer.
struct OptArgs {
    std::string notifMsg;
    bool hasNotif;
    std::string customParam;
};

struct AgentOptArgs; // only passed as a pointer

// Base of every engine. The core reads members in place: the type and the options, then, behind the telemetry vector and its
// mutex, whether making the engine failed. All that stands behind the options is zero here and stays so, which is "no telemetry"
// and "no failure" wherever a version of NIXL has them (ai-dynamo/nixl#1652 puts a number before them).
class BackendEngine {
  public:
    std::string backendType;
    Params customParams;
    alignas(8) const unsigned char zeros[256] = {};

    explicit BackendEngine(const InitParams &init)
        : backendType(init.type), customParams(init.customParams ? *init.customParams : Params()) {}
    BackendEngine(const BackendEngine &) = delete;
    BackendEngine &operator=(const BackendEngine &) = delete;

    // The order from here on is the order of the slots.
    virtual ~BackendEngine() = default;
    virtual bool supportsRemote() const = 0;
    virtual bool supportsLocal() const = 0;
    virtual bool supportsNotif() const = 0;
    virtual Mems getSupportedMems() const = 0;
    virtual Status registerMem(const BlobDesc &, const Mem &, BackendMD *&out) = 0;
    virtual Status deregisterMem(BackendMD *) = 0;
    virtual Status connect(const std::string &agent) = 0;
    virtual Status disconnect(const std::string &agent) = 0;
    virtual Status unloadMD(BackendMD *) = 0;
    virtual Status prepXfer(const Op &, const MetaDescs &local, const MetaDescs &remote, const std::string &agent,
                            BackendReqH *&handle, const OptArgs *) const = 0;
    virtual Status postXfer(const Op &, const MetaDescs &local, const MetaDescs &remote, const std::string &agent,
                            BackendReqH *&handle, const OptArgs *) const = 0;
    virtual Status checkXfer(BackendReqH *) const = 0;
    virtual Status releaseReqH(BackendReqH *) const = 0;
    virtual Status prepMemView(const RemoteMetaDescs &, void *&, const OptArgs *) const = 0;
    virtual Status prepMemView(const MetaDescs &, void *&, const OptArgs *) const = 0;
    virtual void releaseMemView(void *) const = 0;
    virtual Status getPublicData(const BackendMD *, std::string &out) const = 0;
    virtual Status getConnInfo(std::string &out) const = 0;
    virtual Status loadRemoteConnInfo(const std::string &agent, const std::string &info) = 0;
    virtual Status loadRemoteMD(const BlobDesc &, const Mem &, const std::string &agent, BackendMD *&out) = 0;
    virtual Status loadLocalMD(BackendMD *, BackendMD *&out) = 0;
    virtual Status getNotifs(Notifications &out) = 0;
    virtual Status genNotif(const std::string &agent, const std::string &message) const = 0;
    virtual Status queryMem(const RegDescs &, QueryAnswers &out) const = 0;
    virtual Status estimateXferCost(const Op &, const MetaDescs &local, const MetaDescs &remote,
                                    const std::string &agent, BackendReqH *const &handle,
                                    std::chrono::microseconds &duration, std::chrono::microseconds &margin,
                                    Cost &method, const AgentOptArgs *) const = 0;
};

// What nixl_plugin_init returns.
struct Plugin {
    int api_version; // 1
    BackendEngine *(*create_engine)(const InitParams *); // null is failure
    void (*destroy_engine)(BackendEngine *);
    const char *(*get_plugin_name)();
    const char *(*get_plugin_version)();
    Params (*get_backend_options)();
    Mems (*get_backend_mems)();
};

// offsetof on classes with virtual functions is conditionally supported; GCC and Clang support it without virtual bases.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Winvalid-offsetof"

static_assert(sizeof(void *) == 8 && sizeof(std::string) == 32 && sizeof(Params) == 56 && sizeof(Mems) == 24,
              "this ABI is that of 64-bit libstdc++ with the C++11 std::string");
#if !defined(__x86_64__) && !defined(__aarch64__)
#error "NIXL's ABI is only known on x86-64 and aarch64"
#endif

static_assert(offsetof(InitParams, type) == 32 && offsetof(InitParams, customParams) == 64 &&
                  offsetof(InitParams, enableProgTh) == 72 && offsetof(InitParams, pthrDelay) == 80 &&
                  offsetof(InitParams, syncMode) == 88 && offsetof(InitParams, enableTelemetry) == 92 &&
                  sizeof(InitParams) == 96,
              "nixlBackendInitParams");

static_assert(offsetof(BackendMD, isPrivate) == 8 && sizeof(BackendMD) == 16, "nixlBackendMD");
static_assert(sizeof(BackendReqH) == 8, "nixlBackendReqH");

static_assert(offsetof(BasicDesc, len) == 8 && offsetof(BasicDesc, devId) == 16 && sizeof(BasicDesc) == 24,
              "nixlBasicDesc");
static_assert(offsetof(MetaDesc, metadata) == 24 && sizeof(MetaDesc) == 32, "nixlMetaDesc");
static_assert(offsetof(BlobDesc, metaInfo) == 24 && sizeof(BlobDesc) == 56, "nixlBlobDesc");
static_assert(offsetof(MetaDescs, mem) == 8 && offsetof(MetaDescs, descs) == 16 && sizeof(MetaDescs) == 40,
              "nixlDescList");
static_assert(offsetof(OptArgs, hasNotif) == 32 && offsetof(OptArgs, customParam) == 40 && sizeof(OptArgs) == 72,
              "nixlBackendOptionalArgs");

// NIXL 1.0 to 1.5 end at 168 bytes and a mutex.
static_assert(offsetof(BackendEngine, backendType) == 8 && offsetof(BackendEngine, customParams) == 40 &&
                  offsetof(BackendEngine, zeros) == 96 && sizeof(BackendEngine) >= 168 + sizeof(std::mutex),
              "nixlBackendEngine");

static_assert(offsetof(Plugin, create_engine) == 8 && offsetof(Plugin, destroy_engine) == 16 &&
                  offsetof(Plugin, get_plugin_name) == 24 && offsetof(Plugin, get_plugin_version) == 32 &&
                  offsetof(Plugin, get_backend_options) == 40 && offsetof(Plugin, get_backend_mems) == 48 &&
                  sizeof(Plugin) == 56,
              "nixlBackendPlugin");

#pragma GCC diagnostic pop

} // namespace nixl_abi

#pragma GCC visibility pop

#endif
