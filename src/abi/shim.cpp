// The C++ side of the boundary: an engine class with the virtual functions that NIXL's core calls, each forwarded to one Rust
// function of the table. No logic here, and no exception leaves.

#include <cstddef>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "nixl_backend_abi.h"
#include "nixl_libfabric.h"

namespace {

using nixl_abi::Mem;
using nixl_abi::Op;
using nixl_abi::Status;

// Rust functions, set once by nlf_shim_plugin before the core can call anything.
const NlfEngineOps *ops = nullptr;

// What NIXL holds for a memory region; Rust reads it as NlfMetadataObject.
struct Metadata final : nixl_abi::BackendMD {
    NlfMetadataHandle *handle = nullptr;

    explicit Metadata(bool is_private) : BackendMD(is_private) {}
};

// What NIXL holds for a transfer.
struct Request final : nixl_abi::BackendReqH {
    NlfRequestHandle *handle = nullptr;
};

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Winvalid-offsetof"
static_assert(sizeof(Metadata) == sizeof(NlfMetadataObject) &&
              offsetof(Metadata, isPrivate) == offsetof(NlfMetadataObject, is_private) &&
              offsetof(Metadata, handle) == offsetof(NlfMetadataObject, handle));
static_assert(sizeof(nixl_abi::MetaDesc) == sizeof(NlfMetaDesc) &&
              offsetof(nixl_abi::MetaDesc, metadata) == offsetof(NlfMetaDesc, metadata));
static_assert(sizeof(nixl_abi::BasicDesc) == sizeof(NlfBasicDesc) &&
              offsetof(nixl_abi::BasicDesc, addr) == offsetof(NlfBasicDesc, addr) &&
              offsetof(nixl_abi::BasicDesc, len) == offsetof(NlfBasicDesc, len) &&
              offsetof(nixl_abi::BasicDesc, devId) == offsetof(NlfBasicDesc, dev_id));
static_assert(sizeof(nixl_abi::BlobDesc) == sizeof(NlfBlobDesc));
#pragma GCC diagnostic pop

NlfBytes bytes(const std::string &text) {
    return {reinterpret_cast<const std::uint8_t *>(text.data()), text.size()};
}

std::string text(NlfBytes bytes) { return {reinterpret_cast<const char *>(bytes.data), bytes.len}; }

NlfBasicDesc range(const nixl_abi::BasicDesc &desc) { return {desc.addr, desc.len, desc.devId}; }

// A C++ object's base is at its start, so that a list of NIXL's is a list of Rust's.
NlfSlice_MetaDesc list(const nixl_abi::MetaDescs &descs) {
    return {reinterpret_cast<const NlfMetaDesc *>(descs.descs.data()), descs.descs.size()};
}

NlfMetadataHandle *metadata_handle(const nixl_abi::BackendMD *metadata) {
    return metadata ? static_cast<const Metadata *>(metadata)->handle : nullptr;
}

NlfRequestHandle *request_handle(const nixl_abi::BackendReqH *request) {
    return request ? static_cast<const Request *>(request)->handle : nullptr;
}

// Whatever is thrown here is a failed allocation.
template <class Body> Status guarded(Body body) noexcept {
    try {
        if constexpr (std::is_same_v<decltype(body()), Status>) {
            return body();
        } else {
            return static_cast<Status>(body());
        }
    } catch (...) {
        return Status::backend;
    }
}

// Sinks: Rust calls them with the container as context; they copy and do not throw.
template <class Body> bool stored(Body body) noexcept {
    try {
        body();
        return true;
    } catch (...) {
        return false;
    }
}

extern "C" {

static bool put_string(void *out, NlfBytes data) {
    return stored([&] { static_cast<std::string *>(out)->assign(text(data)); });
}

static bool put_param(void *out, NlfPair pair) {
    return stored([&] { static_cast<nixl_abi::Params *>(out)->emplace(text(pair.key), text(pair.value)); });
}

static bool put_mem(void *out, std::int32_t mem) {
    return stored([&] { static_cast<nixl_abi::Mems *>(out)->push_back(static_cast<Mem>(mem)); });
}

static bool put_notification(void *out, NlfPair pair) {
    return stored([&] {
        static_cast<nixl_abi::Notifications *>(out)->emplace_back(text(pair.key), text(pair.value));
    });
}

static bool begin_answer(void *out, bool known) {
    return stored([&] {
        auto &answer = static_cast<nixl_abi::QueryAnswers *>(out)->emplace_back();
        if (known) {
            answer.emplace();
        }
    });
}

static bool put_attribute(void *out, NlfPair pair) {
    return stored([&] {
        static_cast<nixl_abi::QueryAnswers *>(out)->back().value().emplace(text(pair.key), text(pair.value));
    });
}

} // extern "C"

struct DestroyEngine {
    void operator()(NlfEngineHandle *engine) const { ops->destroy(engine); }
};
using EnginePtr = std::unique_ptr<NlfEngineHandle, DestroyEngine>;

class Engine final : public nixl_abi::BackendEngine {
  public:
    Engine(const nixl_abi::InitParams &init, EnginePtr engine) : BackendEngine(init), engine_(std::move(engine)) {}

    bool supportsRemote() const override { return true; }
    bool supportsLocal() const override { return true; }
    bool supportsNotif() const override { return true; }

    nixl_abi::Mems getSupportedMems() const override {
        nixl_abi::Mems mems;
        ops->supported_mems(engine(), {&mems, put_mem});
        return mems;
    }

    Status registerMem(const nixl_abi::BlobDesc &desc, const Mem &mem, nixl_abi::BackendMD *&out) override {
        return make_metadata(true, out, [&](NlfMetadataHandle **handle) {
            return ops->register_mem(engine(), range(desc), static_cast<int>(mem), handle);
        });
    }

    Status deregisterMem(nixl_abi::BackendMD *metadata) override {
        return guarded([&] {
            const std::unique_ptr<nixl_abi::BackendMD> object(metadata);
            return ops->deregister_mem(engine(), metadata_handle(metadata));
        });
    }

    Status connect(const std::string &agent) override {
        return guarded([&] { return ops->connect(engine(), bytes(agent)); });
    }

    Status disconnect(const std::string &agent) override {
        return guarded([&] { return ops->disconnect(engine(), bytes(agent)); });
    }

    Status unloadMD(nixl_abi::BackendMD *metadata) override {
        return guarded([&] {
            const std::unique_ptr<nixl_abi::BackendMD> object(metadata);
            return ops->unload_md(engine(), metadata_handle(metadata));
        });
    }

    Status prepXfer(const Op &op, const nixl_abi::MetaDescs &local, const nixl_abi::MetaDescs &remote,
                    const std::string &agent, nixl_abi::BackendReqH *&handle,
                    const nixl_abi::OptArgs *) const override {
        return guarded([&] {
            auto request = std::make_unique<Request>();
            const auto status = static_cast<Status>(ops->prep_xfer(
                engine(), static_cast<int>(op), list(local), list(remote), bytes(agent), &request->handle));
            if (status == Status::success) {
                handle = request.release();
            }
            return status;
        });
    }

    // The request knows its operation, lists and agent from prepXfer; the core passes the same again.
    Status postXfer(const Op &, const nixl_abi::MetaDescs &, const nixl_abi::MetaDescs &, const std::string &,
                    nixl_abi::BackendReqH *&handle, const nixl_abi::OptArgs *args) const override {
        return guarded([&] {
            const bool notify = args && args->hasNotif;
            const NlfBytes message = notify ? bytes(args->notifMsg) : NlfBytes{nullptr, 0};
            return ops->post_xfer(engine(), request_handle(handle), notify ? &message : nullptr);
        });
    }

    Status checkXfer(nixl_abi::BackendReqH *request) const override {
        return guarded([&] { return ops->check_xfer(engine(), request_handle(request)); });
    }

    Status releaseReqH(nixl_abi::BackendReqH *request) const override {
        return guarded([&] {
            const std::unique_ptr<nixl_abi::BackendReqH> object(request);
            return ops->release_request(engine(), request_handle(request));
        });
    }

    Status prepMemView(const nixl_abi::RemoteMetaDescs &, void *&, const nixl_abi::OptArgs *) const override {
        return Status::not_supported;
    }

    Status prepMemView(const nixl_abi::MetaDescs &, void *&, const nixl_abi::OptArgs *) const override {
        return Status::not_supported;
    }

    void releaseMemView(void *) const override {}

    Status getPublicData(const nixl_abi::BackendMD *metadata, std::string &out) const override {
        return guarded(
            [&] { return ops->public_data(engine(), metadata_handle(metadata), {&out, put_string}); });
    }

    Status getConnInfo(std::string &out) const override {
        return guarded([&] { return ops->conn_info(engine(), {&out, put_string}); });
    }

    Status loadRemoteConnInfo(const std::string &agent, const std::string &info) override {
        return guarded([&] { return ops->load_remote_conn_info(engine(), bytes(agent), bytes(info)); });
    }

    Status loadRemoteMD(const nixl_abi::BlobDesc &desc, const Mem &mem, const std::string &agent,
                        nixl_abi::BackendMD *&out) override {
        return make_metadata(false, out, [&](NlfMetadataHandle **handle) {
            return ops->load_remote_md(engine(), range(desc), static_cast<int>(mem), bytes(desc.metaInfo),
                                       bytes(agent), handle);
        });
    }

    // An object of its own, so that the core can unload it and deregister the original in either order.
    Status loadLocalMD(nixl_abi::BackendMD *metadata, nixl_abi::BackendMD *&out) override {
        return make_metadata(false, out, [&](NlfMetadataHandle **handle) {
            return ops->load_local_md(engine(), metadata_handle(metadata), handle);
        });
    }

    Status getNotifs(nixl_abi::Notifications &out) override {
        return guarded([&] { return ops->take_notifications(engine(), {&out, put_notification}); });
    }

    Status genNotif(const std::string &agent, const std::string &message) const override {
        return guarded([&] { return ops->send_notification(engine(), bytes(agent), bytes(message)); });
    }

    Status queryMem(const nixl_abi::RegDescs &descs, nixl_abi::QueryAnswers &out) const override {
        return guarded([&] {
            return ops->query_mem(engine(), static_cast<int>(descs.mem),
                                  {reinterpret_cast<const NlfBlobDesc *>(descs.descs.data()), descs.descs.size()},
                                  {&out, begin_answer, {&out, put_attribute}});
        });
    }

    Status estimateXferCost(const Op &, const nixl_abi::MetaDescs &, const nixl_abi::MetaDescs &,
                            const std::string &, nixl_abi::BackendReqH *const &handle,
                            std::chrono::microseconds &duration, std::chrono::microseconds &margin,
                            nixl_abi::Cost &method, const nixl_abi::AgentOptArgs *) const override {
        return guarded([&] {
            std::int64_t duration_us = 0;
            std::int64_t margin_us = 0;
            const auto status = static_cast<Status>(
                ops->estimate_cost(engine(), request_handle(handle), &duration_us, &margin_us));
            if (status == Status::success) {
                duration = std::chrono::microseconds(duration_us);
                margin = std::chrono::microseconds(margin_us);
                method = nixl_abi::Cost::analytical_backend;
            }
            return status;
        });
    }

    // Puts the functions where this core looks for them: into a table of the object's own, which takes the compiler's place.
    void arrange(const NlfEngineLayout &layout) {
        if (layout.len == 0) {
            return;
        }
        const Function *ours = nullptr;
        std::memcpy(&ours, static_cast<void *>(this), sizeof ours);
        table_.assign(ours - words_before, ours);
        for (std::size_t place = 0; place < layout.len; ++place) {
            const auto slot = layout.slots[place];
            table_.push_back(slot < 0 ? answers[-slot - 1] : ours[slot]);
        }
        const Function *theirs = table_.data() + words_before;
        std::memcpy(static_cast<void *>(this), &theirs, sizeof theirs);
    }

  private:
    // A word of a virtual table.
    using Function = void (*)();
    // Before the functions: the offset to the top, and the type information.
    static constexpr std::ptrdiff_t words_before = 2;
    // What stands for functions that are not ours. The ABI lets a function ignore its arguments.
    static const Function answers[3];

    EnginePtr engine_;
    std::vector<Function> table_;

    NlfEngineHandle *engine() const { return engine_.get(); }

    // The object is made first: once Rust has given a handle, nothing here can fail any more.
    template <class Fill> static Status make_metadata(bool is_private, nixl_abi::BackendMD *&out, Fill fill) {
        return guarded([&] {
            auto object = std::make_unique<Metadata>(is_private);
            const auto status = static_cast<Status>(fill(&object->handle));
            if (status == Status::success) {
                out = object.release();
            }
            return status;
        });
    }
};

bool answer_false() { return false; }
Status answer_not_supported() { return Status::not_supported; }
void answer_nothing() {}

const Engine::Function Engine::answers[3] = {
    reinterpret_cast<Function>(answer_false),
    reinterpret_cast<Function>(answer_not_supported),
    answer_nothing,
};

nixl_abi::BackendEngine *create_engine(const nixl_abi::InitParams *init) noexcept {
    try {
        NlfEngineLayout layout{};
        if (!ops->layout(__builtin_return_address(0), init, &layout)) {
            return nullptr;
        }
        std::vector<NlfPair> options;
        if (init->customParams) {
            options.reserve(init->customParams->size());
            for (const auto &[key, value] : *init->customParams) {
                options.push_back({bytes(key), bytes(value)});
            }
        }
        const NlfCreateParams params = {bytes(init->localAgent), {options.data(), options.size()}, init->enableProgTh,
                                        init->pthrDelay};
        EnginePtr handle(ops->create(&params));
        if (!handle) {
            return nullptr;
        }
        auto engine = std::make_unique<Engine>(*init, std::move(handle));
        engine->arrange(layout);
        return engine.release();
    } catch (...) {
        return nullptr;
    }
}

// Whatever stands in its table, it is one of ours.
void destroy_engine(nixl_abi::BackendEngine *engine) noexcept { delete static_cast<Engine *>(engine); }

const char *plugin_name() { return ops->plugin_name(); }

const char *plugin_version() { return ops->plugin_version(); }

nixl_abi::Params backend_options() {
    nixl_abi::Params options;
    ops->plugin_options({&options, put_param});
    return options;
}

nixl_abi::Mems backend_mems() {
    nixl_abi::Mems mems;
    ops->plugin_mems({&mems, put_mem});
    return mems;
}

} // namespace

extern "C" const void *nlf_shim_plugin(const NlfEngineOps *engine_ops) {
    static const nixl_abi::Plugin plugin = {
        1, create_engine, destroy_engine, plugin_name, plugin_version, backend_options, backend_mems,
    };
    ops = engine_ops;
    return &plugin;
}
