// Drives the shim as NIXL's core does, through the virtual functions alone, above a table of functions that is a small engine
// in this file: one region of memory, transfers that copy at once, notifications to oneself. Exits with 0 when all held.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "nixl_backend_abi.h"
#include "nixl_libfabric.h"

#define CHECK(condition)                                                                  \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);          \
            std::exit(1);                                                                 \
        }                                                                                 \
    } while (0)

struct NlfEngineHandle {
    std::string agent;
    std::vector<std::pair<std::string, std::string>> inbox;
};
struct NlfMetadataHandle {
    NlfBasicDesc range;
    std::string blob;
};
struct NlfRequestHandle {
    std::vector<std::pair<void *, const void *>> copies;
    std::vector<std::size_t> lengths;
};

namespace {

using nixl_abi::Mem;
using nixl_abi::Op;
using nixl_abi::Status;

// What lives on the far side of the table.
int engines = 0;
int regions = 0;
int requests = 0;
// What the next call to the table returns, when not 0.
int failure = 0;

int fail_once() { return std::exchange(failure, 0); }

std::string text(NlfBytes bytes) { return {reinterpret_cast<const char *>(bytes.data), bytes.len}; }

NlfBytes bytes(const char *literal) {
    return {reinterpret_cast<const std::uint8_t *>(literal), std::strlen(literal)};
}

void *pointer(std::uint64_t address) { return reinterpret_cast<void *>(address); }

const char *plugin_name() { return "LIBFABRIC"; }
const char *plugin_version() { return "1.2.3"; }
void plugin_options(NlfPairSink sink) { CHECK(sink.put(sink.context, {bytes("num_threads"), bytes("0")})); }
void plugin_mems(NlfMemSink sink) { CHECK(sink.put(sink.context, 0) && sink.put(sink.context, 1)); }

// Slots of the next engine, when there are any.
std::vector<std::int8_t> slots;
bool known_core = true;

bool layout(const void *core, const void *init, NlfEngineLayout *out) {
    CHECK(core && init);
    out->len = slots.size();
    std::copy(slots.begin(), slots.end(), out->slots);
    return known_core;
}

NlfEngineHandle *create(const NlfCreateParams *params) {
    if (fail_once()) {
        return nullptr;
    }
    CHECK(params->progress_thread && params->progress_delay_us == 250);
    CHECK(params->options.len == 1 && text(params->options.data[0].key) == "num_threads" &&
          text(params->options.data[0].value) == "4");
    ++engines;
    return new NlfEngineHandle{text(params->local_agent), {}};
}

void destroy(NlfEngineHandle *engine) {
    --engines;
    delete engine;
}

void supported_mems(const NlfEngineHandle *, NlfMemSink sink) { CHECK(sink.put(sink.context, 0)); }

int give_region(NlfBasicDesc range, std::string blob, NlfMetadataHandle **out) {
    if (const int status = fail_once()) {
        return status;
    }
    ++regions;
    *out = new NlfMetadataHandle{range, std::move(blob)};
    return 0;
}

int register_mem(const NlfEngineHandle *, NlfBasicDesc range, int mem, NlfMetadataHandle **out) {
    CHECK(mem == 0 && range.dev_id == 7);
    return give_region(range, "region", out);
}

int release_region(const NlfEngineHandle *, NlfMetadataHandle *metadata) {
    if (!metadata) {
        return -2;
    }
    --regions;
    delete metadata;
    return fail_once();
}

int public_data(const NlfEngineHandle *, const NlfMetadataHandle *metadata, NlfBytesSink sink) {
    const NlfBytes blob = {reinterpret_cast<const std::uint8_t *>(metadata->blob.data()), metadata->blob.size()};
    return sink.put(sink.context, blob) ? 0 : -3;
}

int load_local_md(const NlfEngineHandle *, const NlfMetadataHandle *metadata, NlfMetadataHandle **out) {
    return give_region(metadata->range, metadata->blob, out);
}

int load_remote_md(const NlfEngineHandle *, NlfBasicDesc range, int, NlfBytes blob, NlfBytes agent,
                   NlfMetadataHandle **out) {
    CHECK(text(agent) == "peer");
    return give_region(range, text(blob), out);
}

int conn_info(const NlfEngineHandle *, NlfBytesSink sink) {
    return sink.put(sink.context, {reinterpret_cast<const std::uint8_t *>("a\0b"), 3}) ? 0 : -3;
}

int load_remote_conn_info(const NlfEngineHandle *, NlfBytes agent, NlfBytes info) {
    return text(agent) == "peer" && text(info) == std::string("a\0b", 3) ? 0 : -5;
}

int to_agent(const NlfEngineHandle *, NlfBytes agent) { return text(agent) == "peer" ? 0 : -4; }

int prep_xfer(const NlfEngineHandle *, int op, NlfSlice_MetaDesc local, NlfSlice_MetaDesc remote, NlfBytes agent,
              NlfRequestHandle **out) {
    CHECK(text(agent) == "peer" && local.len == remote.len);
    if (const int status = fail_once()) {
        return status;
    }
    ++requests;
    auto *request = new NlfRequestHandle;
    for (std::size_t i = 0; i < local.len; ++i) {
        const NlfMetaDesc &here = local.data[i];
        const NlfMetaDesc &there = remote.data[i];
        CHECK(here.metadata->is_private && !there.metadata->is_private);
        CHECK(here.range.addr >= here.metadata->handle->range.addr && here.range.dev_id == 7);
        CHECK(there.metadata->handle->blob == "region");
        void *to = pointer(op == 1 ? there.range.addr : here.range.addr);
        void *from = pointer(op == 1 ? here.range.addr : there.range.addr);
        request->copies.emplace_back(to, from);
        request->lengths.push_back(here.range.len);
    }
    *out = request;
    return 0;
}

int post_xfer(const NlfEngineHandle *engine, const NlfRequestHandle *request, const NlfBytes *notification) {
    if (!request) {
        return -2;
    }
    for (std::size_t i = 0; i < request->copies.size(); ++i) {
        std::memcpy(request->copies[i].first, request->copies[i].second, request->lengths[i]);
    }
    if (notification) {
        const_cast<NlfEngineHandle *>(engine)->inbox.emplace_back(engine->agent, text(*notification));
    }
    return 1;
}

int check_xfer(const NlfEngineHandle *, const NlfRequestHandle *request) { return request ? 0 : -2; }

int release_request(const NlfEngineHandle *, NlfRequestHandle *request) {
    --requests;
    delete request;
    return 0;
}

int estimate_cost(const NlfEngineHandle *, const NlfRequestHandle *request, std::int64_t *duration,
                  std::int64_t *margin) {
    *duration = static_cast<std::int64_t>(request->lengths.size()) * 100;
    *margin = 9;
    return fail_once();
}

int take_notifications(const NlfEngineHandle *engine, NlfPairSink sink) {
    for (const auto &[agent, message] : engine->inbox) {
        const NlfBytes key = {reinterpret_cast<const std::uint8_t *>(agent.data()), agent.size()};
        const NlfBytes value = {reinterpret_cast<const std::uint8_t *>(message.data()), message.size()};
        CHECK(sink.put(sink.context, {key, value}));
    }
    const_cast<NlfEngineHandle *>(engine)->inbox.clear();
    return 0;
}

int send_notification(const NlfEngineHandle *, NlfBytes agent, NlfBytes message) {
    return text(agent) == "peer" && text(message).empty() ? 0 : -4;
}

int query_mem(const NlfEngineHandle *, int mem, NlfSlice_BlobDesc descs, NlfQuerySink sink) {
    CHECK(mem == 0);
    for (std::size_t i = 0; i < descs.len; ++i) {
        const bool known = descs.data[i].range.len != 0;
        CHECK(sink.begin(sink.context, known));
        if (known) {
            CHECK(sink.attributes.put(sink.attributes.context, {bytes("rails"), bytes("2")}));
            CHECK(sink.attributes.put(sink.attributes.context, {bytes("numa"), bytes("")}));
        }
    }
    return 0;
}

const NlfEngineOps table = {
    plugin_name,        plugin_version, plugin_options, plugin_mems,       layout,     create,     destroy,
    supported_mems,     register_mem,   release_region, public_data,       load_local_md,
    load_remote_md,     release_region, conn_info,      load_remote_conn_info,
    to_agent,           to_agent,       prep_xfer,      post_xfer,         check_xfer, release_request,
    estimate_cost,      take_notifications,             send_notification, query_mem,
};

nixl_abi::BlobDesc blob_desc(void *start, std::size_t length, std::string blob = "") {
    nixl_abi::BlobDesc desc{};
    desc.addr = reinterpret_cast<std::uint64_t>(start);
    desc.len = length;
    desc.devId = 7;
    desc.metaInfo = std::move(blob);
    return desc;
}

// The core's lists, which our mirror only lets others make.
template <class Desc> struct List {
    alignas(nixl_abi::DescList<Desc>) unsigned char storage[sizeof(nixl_abi::DescList<Desc>)] = {};
    std::vector<Desc> &descs = *new (storage + 16) std::vector<Desc>;

    ~List() { descs.~vector(); }
    const nixl_abi::DescList<Desc> &get() const {
        return *std::launder(reinterpret_cast<const nixl_abi::DescList<Desc> *>(storage));
    }
};

nixl_abi::MetaDesc meta_desc(void *start, std::size_t length, nixl_abi::BackendMD *metadata) {
    nixl_abi::MetaDesc desc{};
    desc.addr = reinterpret_cast<std::uint64_t>(start);
    desc.len = length;
    desc.devId = 7;
    desc.metadata = metadata;
    return desc;
}

void plugin_describes_itself(const nixl_abi::Plugin &plugin) {
    CHECK(plugin.api_version == 1);
    CHECK(std::string(plugin.get_plugin_name()) == "LIBFABRIC");
    CHECK(std::string(plugin.get_plugin_version()) == "1.2.3");
    CHECK((plugin.get_backend_options() == nixl_abi::Params{{"num_threads", "0"}}));
    CHECK((plugin.get_backend_mems() == nixl_abi::Mems{Mem::dram, Mem::vram}));
}

void engine_describes_itself(nixl_abi::BackendEngine &engine) {
    CHECK(engine.supportsRemote() && engine.supportsLocal() && engine.supportsNotif());
    CHECK((engine.getSupportedMems() == nixl_abi::Mems{Mem::dram}));
    CHECK(engine.backendType == "Libfabric");
    CHECK((engine.customParams == nixl_abi::Params{{"num_threads", "4"}}));
}

void engine_connects(nixl_abi::BackendEngine &engine) {
    std::string info;
    CHECK(engine.getConnInfo(info) == Status::success && info == std::string("a\0b", 3));
    CHECK(engine.loadRemoteConnInfo("peer", info) == Status::success);
    CHECK(engine.loadRemoteConnInfo("peer", "") == Status::mismatch);
    CHECK(engine.connect("peer") == Status::success && engine.disconnect("peer") == Status::success);
    CHECK(engine.connect("nobody") == Status::not_found);
    CHECK(engine.genNotif("peer", "") == Status::success);
}

void engine_transfers(nixl_abi::BackendEngine &engine) {
    std::vector<unsigned char> source(64, 1);
    std::vector<unsigned char> target(64, 0);
    nixl_abi::BackendMD *local = nullptr;
    nixl_abi::BackendMD *self = nullptr;
    nixl_abi::BackendMD *remote = nullptr;
    failure = -2;
    CHECK(engine.registerMem(blob_desc(source.data(), 64), Mem::dram, local) == Status::invalid_param && !local);
    CHECK(engine.registerMem(blob_desc(source.data(), 64), Mem::dram, local) == Status::success && local);
    CHECK(engine.loadLocalMD(local, self) == Status::success && self && self != local);
    std::string blob;
    CHECK(engine.getPublicData(local, blob) == Status::success && blob == "region");
    CHECK(engine.loadRemoteMD(blob_desc(target.data(), 64, blob), Mem::dram, "peer", remote) == Status::success);
    CHECK(local->isPrivate && !self->isPrivate && !remote->isPrivate);

    List<nixl_abi::MetaDesc> here;
    List<nixl_abi::MetaDesc> there;
    for (std::size_t at = 0; at < 64; at += 16) {
        here.descs.push_back(meta_desc(source.data() + at, 16, local));
        there.descs.push_back(meta_desc(target.data() + at, 16, remote));
    }
    nixl_abi::BackendReqH *request = nullptr;
    failure = -4;
    CHECK(engine.prepXfer(Op::write, here.get(), there.get(), "peer", request, nullptr) == Status::not_found);
    CHECK(!request);
    CHECK(engine.postXfer(Op::write, here.get(), there.get(), "peer", request, nullptr) == Status::invalid_param);
    CHECK(engine.checkXfer(nullptr) == Status::invalid_param);
    CHECK(engine.prepXfer(Op::write, here.get(), there.get(), "peer", request, nullptr) == Status::success);

    nixl_abi::OptArgs args{"", true, ""};
    CHECK(engine.postXfer(Op::write, here.get(), there.get(), "peer", request, &args) == Status::in_progress);
    args.hasNotif = false;
    CHECK(engine.postXfer(Op::write, here.get(), there.get(), "peer", request, &args) == Status::in_progress);
    CHECK(engine.postXfer(Op::write, here.get(), there.get(), "peer", request, nullptr) == Status::in_progress);
    CHECK(engine.checkXfer(request) == Status::success && target == source);
    nixl_abi::Notifications notifications;
    CHECK(engine.getNotifs(notifications) == Status::success);
    CHECK((notifications == nixl_abi::Notifications{{"me", ""}}));

    std::chrono::microseconds duration{};
    std::chrono::microseconds margin{};
    auto method = static_cast<nixl_abi::Cost>(5);
    const auto estimate = [&] {
        return engine.estimateXferCost(Op::write, here.get(), there.get(), "peer", request, duration, margin,
                                       method, nullptr);
    };
    failure = -9;
    CHECK(estimate() == Status::not_supported && duration.count() == 0);
    CHECK(estimate() == Status::success && duration.count() == 400 && margin.count() == 9);
    CHECK(method == nixl_abi::Cost::analytical_backend);

    CHECK(engine.releaseReqH(request) == Status::success && requests == 0);
    CHECK(engine.unloadMD(self) == Status::success && engine.unloadMD(nullptr) == Status::invalid_param);
    failure = -3;
    CHECK(engine.deregisterMem(local) == Status::backend);
    CHECK(engine.unloadMD(remote) == Status::success && regions == 0);
}

void engine_answers_queries(nixl_abi::BackendEngine &engine) {
    List<nixl_abi::BlobDesc> ranges;
    ranges.descs.push_back(blob_desc(nullptr, 0));
    ranges.descs.push_back(blob_desc(nullptr, 4096, "longer than a short string, so that it is on the heap"));
    nixl_abi::QueryAnswers answers;
    CHECK(engine.queryMem(ranges.get(), answers) == Status::success && answers.size() == 2);
    CHECK(!answers[0] && (answers[1] == nixl_abi::Params{{"rails", "2"}, {"numa", ""}}));
}

} // namespace

int main() {
    const auto *plugin = static_cast<const nixl_abi::Plugin *>(nlf_shim_plugin(&table));
    CHECK(plugin == nlf_shim_plugin(&table));
    plugin_describes_itself(*plugin);

    nixl_abi::Params options = {{"num_threads", "4"}};
    const nixl_abi::InitParams init = {"me", "Libfabric", &options, true, 250, nixl_abi::Sync::rw, true};
    failure = -3;
    CHECK(!plugin->create_engine(&init) && engines == 0);
    nixl_abi::BackendEngine *engine = plugin->create_engine(&init);
    CHECK(engine && engines == 1);
    engine_describes_itself(*engine);
    engine_connects(*engine);
    engine_transfers(*engine);
    engine_answers_queries(*engine);
    plugin->destroy_engine(engine);
    CHECK(engines == 0);
    known_core = false;
    CHECK(!plugin->create_engine(&init) && engines == 0);
    known_core = true;

    // Where the core wants other functions at places of ours, they stand there, and the rest moves on.
    slots = {0, 1, -1, 2, 4, 5, -2, -3, 9};
    engine = plugin->create_engine(&init);
    CHECK(!engine->supportsRemote() && engine->supportsLocal() && engine->supportsNotif());
    CHECK(engine->connect("nobody") == Status::not_found);
    plugin->destroy_engine(engine);
    CHECK(engines == 0);
    std::puts("all held");
}
