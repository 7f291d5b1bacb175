// What `make cost` runs under callgrind: two engines of one plugin in one process, driven in turn by one thread, so that what
// happens between them happens in the same order in every run. Callgrind writes one file for each phase of each transfer, and
// the phase is the file's label. It calls the plugin as NIXL's core does, without the core.
//
// driver PLUGIN.so [-o OPTION=VALUE]... read|write DESCRIPTORS...

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>
#include <valgrind/callgrind.h>

#include "nixl_backend_abi.h"

namespace {

using nixl_abi::BackendEngine;
using nixl_abi::BackendMD;
using nixl_abi::BackendReqH;
using nixl_abi::Mem;
using nixl_abi::Op;
using nixl_abi::Status;

constexpr std::size_t block_bytes = 4096;
// A transfer that took so many polls does not end in reasonable time.
constexpr int polls_max = 10'000;
constexpr int idle_calls = 1000;
constexpr unsigned round_pause_us = 500;
// Of processor time, so that a busy machine counts for nothing. The C++ plugin's post does not return while the peer must poll
// first, and here the peer cannot.
constexpr int transfer_deadline_s = 30;
constexpr int exit_deadline = 3;
const std::string message(64, 'n');

// What was counted until then is in its files.
void on_deadline(int) { _exit(exit_deadline); }

[[noreturn]] void fail(const char *what, int status = 0) {
    std::fprintf(stderr, "cost driver: %s (status %d)\n", what, status);
    std::_Exit(1);
}

void must(Status status, const char *what) {
    if (status != Status::success) {
        fail(what, static_cast<int>(status));
    }
}

// Everything that runs while this exists is counted into one file.
class Phase {
  public:
    Phase(std::size_t descriptors, const char *list, const char *name, int turn)
        : label_(std::to_string(descriptors) + " " + list + " " + name + " " + std::to_string(turn)) {
        CALLGRIND_ZERO_STATS;
    }
    Phase(const Phase &) = delete;
    Phase &operator=(const Phase &) = delete;
    ~Phase() { CALLGRIND_DUMP_STATS_AT(label_.c_str()); }

  private:
    std::string label_;
};

// The core's lists, which the mirror only lets others make.
struct List {
    alignas(nixl_abi::MetaDescs) unsigned char storage[sizeof(nixl_abi::MetaDescs)] = {};
    std::vector<nixl_abi::MetaDesc> &descs = *new (storage + 16) std::vector<nixl_abi::MetaDesc>;

    List() = default;
    List(const List &) = delete;
    List &operator=(const List &) = delete;
    ~List() { descs.~vector(); }
    const nixl_abi::MetaDescs &get() const {
        return *std::launder(reinterpret_cast<const nixl_abi::MetaDescs *>(storage));
    }
};

const nixl_abi::Plugin &open_plugin(const char *path) {
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        fail(dlerror());
    }
    const auto init = reinterpret_cast<const nixl_abi::Plugin *(*)()>(dlsym(library, "nixl_plugin_init"));
    if (!init || !init()) {
        fail("no nixl_plugin_init");
    }
    return *init();
}

// One side: an engine and its registered memory.
struct Side {
    std::string name;
    BackendEngine *engine;
    std::uint64_t memory = 0;
    std::size_t size;
    BackendMD *region = nullptr;

    Side(const nixl_abi::Plugin &plugin, const std::string &agent, const nixl_abi::Params &options, std::size_t bytes)
        : name(agent), size(bytes) {
        nixl_abi::Params all = plugin.get_backend_options();
        for (const auto &[key, value] : options) {
            all[key] = value;
        }
        const nixl_abi::InitParams init = {name, "LIBFABRIC", &all, false, 0, nixl_abi::Sync::none, false};
        engine = plugin.create_engine(&init);
        if (!engine) {
            fail("create_engine");
        }
        void *pages = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
        if (pages == MAP_FAILED) {
            fail("mmap");
        }
        memory = reinterpret_cast<std::uint64_t>(pages);
        must(engine->registerMem(range(), Mem::dram, region), "registerMem");
    }

    nixl_abi::BlobDesc range() const {
        nixl_abi::BlobDesc desc{};
        desc.addr = memory;
        desc.len = size;
        return desc;
    }

    std::string connection() const {
        std::string info;
        must(engine->getConnInfo(info), "getConnInfo");
        return info;
    }

    std::size_t look() {
        nixl_abi::Notifications found;
        const Status status = engine->getNotifs(found);
        // The C++ plugin says "in progress" when it found none.
        if (status != Status::success && status != Status::in_progress) {
            fail("getNotifs", static_cast<int>(status));
        }
        return found.size();
    }
};

// The C++ plugin waits in here until the peer makes progress, so the peer is driven meanwhile.
void introduce(Side &to, Side &peer) {
    std::atomic<bool> done{false};
    std::thread driver([&] {
        while (!done) {
            peer.look();
        }
    });
    must(to.engine->loadRemoteConnInfo(peer.name, peer.connection()), "loadRemoteConnInfo");
    done = true;
    driver.join();
}

// `random` lists jump about on both sides, so that no two neighbours can be joined.
std::vector<std::uint32_t> order(std::size_t count, bool random, std::uint32_t seed) {
    std::vector<std::uint32_t> blocks(count);
    for (std::size_t i = 0; i < count; ++i) {
        blocks[i] = static_cast<std::uint32_t>(i);
    }
    std::mt19937 chance(seed);
    for (std::size_t i = count; random && i > 1; --i) {
        std::swap(blocks[i - 1], blocks[chance() % i]);
    }
    return blocks;
}

void fill(List &list, const Side &side, BackendMD *metadata, const std::vector<std::uint32_t> &blocks) {
    for (const std::uint32_t block : blocks) {
        nixl_abi::MetaDesc desc{};
        desc.addr = side.memory + block * block_bytes;
        desc.len = block_bytes;
        desc.metadata = metadata;
        list.descs.push_back(desc);
    }
}

class Bench {
  public:
    Bench(Op op, Side &near, Side &far, BackendMD *remote) : op_(op), near_(near), far_(far), remote_(remote) {}

    // One transfer from preparation to release. The receiver looks once after each look of the sender.
    void transfer(std::size_t count, bool random, int turn) {
        const itimerval deadline{{0, 0}, {transfer_deadline_s, 0}};
        setitimer(ITIMER_PROF, &deadline, nullptr);
        const char *list = random ? "shuffled" : "contiguous";
        List here, there;
        fill(here, near_, near_.region, order(count, random, 1));
        fill(there, far_, remote_, order(count, random, 2));
        const nixl_abi::OptArgs args{message, true, ""};
        BackendReqH *request = nullptr;
        {
            Phase phase(count, list, "prepare", turn);
            must(near_.engine->prepXfer(op_, here.get(), there.get(), far_.name, request, &args), "prepXfer");
        }
        Status state;
        {
            Phase phase(count, list, "post", turn);
            state = near_.engine->postXfer(op_, here.get(), there.get(), far_.name, request, &args);
        }
        std::size_t received = 0;
        for (int polls = 0; state == Status::in_progress || received == 0; ++polls) {
            if (polls == polls_max) {
                _exit(exit_deadline);
            }
            if (state == Status::in_progress) {
                Phase phase(count, list, "complete", turn);
                state = near_.engine->checkXfer(request);
            } else {
                // DONE, and its notification is still on the way.
                Phase phase(count, list, "complete", turn);
                near_.look();
            }
            {
                Phase phase(count, list, "receive", turn);
                received += far_.look();
            }
            // The kernel and a software device get their turn, so that few polls find nothing.
            usleep(round_pause_us);
        }
        must(state, "the transfer");
        if (turn == 0 && std::memcmp(pointer(here.descs.back().addr), pointer(there.descs.back().addr), block_bytes) != 0) {
            fail("the bytes did not arrive");
        }
        {
            Phase phase(count, list, "idle check", turn);
            for (int i = 0; i < idle_calls; ++i) {
                near_.engine->checkXfer(request);
            }
        }
        Phase phase(count, list, "release", turn);
        must(near_.engine->releaseReqH(request), "releaseReqH");
    }

    void idle(int turn) {
        Phase phase(0, "none", "idle look", turn);
        nixl_abi::Notifications found;
        for (int i = 0; i < idle_calls; ++i) {
            near_.engine->getNotifs(found);
        }
    }

  private:
    static const void *pointer(std::uint64_t address) { return reinterpret_cast<const void *>(address); }

    const Op op_;
    Side &near_, &far_;
    BackendMD *remote_;
};

// More for small transfers, which are quick, than for large ones.
int turns(std::size_t count) { return count <= 64 ? 10 : count <= 4096 ? 4 : 3; }

int connections() {
    int found = 0;
    std::string line;
    for (std::ifstream table("/proc/self/net/tcp"); std::getline(table, line);) {
        found += line.find(" 01 ") != std::string::npos;
    }
    return found / 2;
}

} // namespace

int main(int argc, char **argv) {
    nixl_abi::Params options;
    Op op = Op::write;
    std::vector<std::size_t> counts;
    for (int i = 2; i < argc; ++i) {
        if (std::strcmp(argv[i], "-o") == 0 && i + 1 < argc) {
            const std::string option = argv[++i];
            const auto at = option.find('=');
            options[option.substr(0, at)] = at == std::string::npos ? "" : option.substr(at + 1);
        } else if (std::strcmp(argv[i], "read") == 0 || std::strcmp(argv[i], "write") == 0) {
            op = argv[i][0] == 'r' ? Op::read : Op::write;
        } else {
            counts.push_back(std::strtoul(argv[i], nullptr, 10));
        }
    }
    if (counts.empty() || *std::min_element(counts.begin(), counts.end()) == 0) {
        fail("usage: driver PLUGIN.so [-o OPTION=VALUE]... read|write DESCRIPTORS...");
    }
    const std::size_t most = *std::max_element(counts.begin(), counts.end());
    const std::size_t bytes = most * block_bytes;
    std::signal(SIGPROF, on_deadline);
    const nixl_abi::Plugin &plugin = open_plugin(argv[1]);
    Side near(plugin, "near", options, bytes), far(plugin, "far", options, bytes);
    introduce(near, far);
    introduce(far, near);
    std::memset(reinterpret_cast<void *>((op == Op::write ? near : far).memory), 7, bytes);

    nixl_abi::BlobDesc range = far.range();
    must(far.engine->getPublicData(far.region, range.metaInfo), "getPublicData");
    BackendMD *remote = nullptr;
    must(near.engine->loadRemoteMD(range, Mem::dram, far.name, remote), "loadRemoteMD");

    Bench bench(op, near, far, remote);
    // Uncounted, until each rail has met its peer. Small ones: the C++ plugin posts in a loop until everything is taken, and the
    // peer cannot answer a handshake meanwhile.
    for (int i = 0; i < 64; ++i) {
        bench.transfer(std::min<std::size_t>(most, 32), true, 0);
    }
    std::printf("connections %d\n", connections());
    std::fflush(stdout);
    CALLGRIND_START_INSTRUMENTATION;
    for (int turn = 1; turn < 4; ++turn) {
        bench.idle(turn);
    }
    for (const std::size_t count : counts) {
        // Turn 0 is for what the lists' own sizes warm up; nobody reads its files.
        for (int turn = 0; turn <= turns(count); ++turn) {
            bench.transfer(count, true, turn);
            bench.transfer(count, false, turn);
        }
    }
    // What the engines need to close is not measured.
    std::_Exit(0);
}
