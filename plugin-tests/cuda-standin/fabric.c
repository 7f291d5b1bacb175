// A libfabric that takes GPU memory, for tests without a GPU: the system's libfabric with one difference.
//
// Its tcp provider offers FI_HMEM under the name of a NIC's provider, speaks API 1.20 and takes dmabufs. Memory of a GPU it
// registers as host memory, which it is where the driver is the stand-in of cuda.c. Each registration, its end, and the
// first look at a completion queue without a CUDA context are written into that driver's call log.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <rdma/fabric.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DMABUF (1ULL << 40)
// fi_mr_dmabuf of 1.20.
struct dmabuf { int fd; uint64_t offset; size_t len; void *base_addr; };

static struct { int hmem, dmabuf, cuda, nic; } option = { 1, 1, 1, 1 };
static atomic_int gpu_regions, looked_without_context;

// The provider's name: one of a NIC, or of software that copies by CUDA.
static const char *ours(void) { return option.nic ? "standin-nic" : "tcp"; }

static void *driver_symbol(const char *name) {
    void *driver = dlopen(getenv("NIXL_LIBFABRIC_LIBCUDA"), RTLD_NOW | RTLD_NOLOAD);
    void *symbol = driver ? dlsym(driver, name) : NULL;
    if (!symbol) abort();
    return symbol;
}

static void note(const char *text) { ((void (*)(const char *))driver_symbol("standin_note"))(text); }
static void *context(void) { return ((void *(*)(void))driver_symbol("standin_current"))(); }

static void *real(const char *name, const char *version) {
    static void *library;
    if (!library) library = dlopen(REAL_LIBFABRIC, RTLD_NOW | RTLD_LOCAL);
    void *symbol = library ? dlvsym(library, name, version) : NULL;
    if (!symbol) { fprintf(stderr, "%s: %s\n", REAL_LIBFABRIC, dlerror()); abort(); }
    return symbol;
}

// Connectionless tcp endpoints are a layer's up to 1.17, and tcp's own from then on.
static char *real_provider(void) {
    uint32_t version = ((uint32_t (*)(void))real("fi_version", "FABRIC_1.0"))();
    return version < FI_VERSION(1, 18) ? "tcp;ofi_rxm" : "tcp";
}

uint32_t fi_version(void) { return FI_VERSION(1, 20); }
const char *fi_strerror(int code) { return ((const char *(*)(int))real("fi_strerror", "FABRIC_1.0"))(code); }

static void rename_to(struct fi_fabric_attr *attr, const char *name) {
    free(attr->prov_name);
    attr->prov_name = strdup(name);
}

void fi_freeinfo(struct fi_info *info) {
    ((void (*)(struct fi_info *))real("fi_freeinfo", "FABRIC_1.3"))(info);
}

int fi_getinfo(uint32_t version, const char *node, const char *service, uint64_t flags, const struct fi_info *hints,
               struct fi_info **info) {
    int (*get)(uint32_t, const char *, const char *, uint64_t, const struct fi_info *, struct fi_info **) =
        real("fi_getinfo", "FABRIC_1.3");
    struct fi_info asked = *hints;
    struct fi_fabric_attr fabric = *hints->fabric_attr;
    struct fi_domain_attr domain = *hints->domain_attr;
    int hmem = (asked.caps & FI_HMEM) != 0;
    if (hmem && !option.hmem) return -FI_ENODATA;
    asked.caps &= ~FI_HMEM;
    domain.mr_mode &= ~FI_MR_HMEM;
    if (!fabric.prov_name || !strcmp(fabric.prov_name, ours())) fabric.prov_name = real_provider();
    asked.fabric_attr = &fabric;
    asked.domain_attr = &domain;
    int rc = get(FI_VERSION(1, 17), node, service, flags, &asked, info);
    for (struct fi_info *one = rc ? NULL : *info; one; one = one->next) {
        rename_to(one->fabric_attr, ours());
        if (!hmem) continue;
        one->caps |= FI_HMEM;
        one->domain_attr->mr_mode |= FI_MR_HMEM;
        one->fabric_attr->api_version = version;
    }
    return rc;
}

// The entry as the real library gave it, for a call that opens something.
static void disguise(struct fi_info *info, int on) {
    static __thread uint64_t hmem;
    static __thread uint32_t version;
    rename_to(info->fabric_attr, on ? ours() : real_provider());
    if (!on) {
        hmem = info->caps & FI_HMEM;
        version = info->fabric_attr->api_version;
        info->caps &= ~FI_HMEM;
        info->domain_attr->mr_mode &= ~FI_MR_HMEM;
        info->fabric_attr->api_version = FI_VERSION(1, 17);
    } else if (hmem) {
        info->caps |= FI_HMEM;
        info->domain_attr->mr_mode |= FI_MR_HMEM;
        info->fabric_attr->api_version = version;
    }
}

// Puts `mine` in place of a table's entry: the object gets a copy of its table, one for each kind of object.
#define REPLACE(object, table, member, mine, saved) \
    do { \
        static typeof(*(object)->table) copy; \
        if ((object)->table == &copy) break; \
        copy = *(object)->table; \
        saved = copy.member; \
        copy.member = mine; \
        (object)->table = &copy; \
    } while (0)

static int (*real_close)(struct fid *);
static int close_region(struct fid *fid) {
    note("fi_close(mr)");
    atomic_fetch_sub(&gpu_regions, 1);
    return real_close(fid);
}

static int (*real_regattr)(struct fid *, const struct fi_mr_attr *, uint64_t, struct fid_mr **);
static int regattr(struct fid *fid, const struct fi_mr_attr *attr, uint64_t flags, struct fid_mr **mr) {
    if (attr->iface != FI_HMEM_CUDA) return real_regattr(fid, attr, flags, mr);
    struct fi_mr_attr host = *attr;
    struct iovec range = {};
    char text[64];
    snprintf(text, sizeof text, "fi_mr_regattr cuda%d %s", attr->device.cuda, flags & DMABUF ? "dmabuf" : "address");
    note(text);
    if (!option.cuda) return -FI_EINVAL;
    if (flags & DMABUF) {
        const struct dmabuf *dmabuf = (const void *)attr->mr_iov;
        if (!option.dmabuf || fcntl(dmabuf->fd, F_GETFD) < 0) return -FI_EOPNOTSUPP;
        range = (struct iovec){ (char *)dmabuf->base_addr + dmabuf->offset, dmabuf->len };
        host.mr_iov = &range;
    }
    host.iface = FI_HMEM_SYSTEM;
    host.device.reserved = 0;
    int rc = real_regattr(fid, &host, flags & ~DMABUF, mr);
    if (rc == 0) {
        REPLACE(&(*mr)->fid, ops, close, close_region, real_close);
        atomic_fetch_add(&gpu_regions, 1);
    }
    return rc;
}

static ssize_t (*real_read)(struct fid_cq *, void *, size_t);
static ssize_t read_cq(struct fid_cq *cq, void *buffer, size_t count) {
    if (atomic_load(&gpu_regions) && !context() && !atomic_exchange(&looked_without_context, 1))
        note("fi_cq_read without a context");
    return real_read(cq, buffer, count);
}

static int (*real_cq_open)(struct fid_domain *, struct fi_cq_attr *, struct fid_cq **, void *);
static int cq_open(struct fid_domain *domain, struct fi_cq_attr *attr, struct fid_cq **cq, void *user) {
    int rc = real_cq_open(domain, attr, cq, user);
    if (rc == 0) REPLACE(*cq, ops, read, read_cq, real_read);
    return rc;
}

static int (*real_endpoint)(struct fid_domain *, struct fi_info *, struct fid_ep **, void *);
static int endpoint(struct fid_domain *domain, struct fi_info *info, struct fid_ep **ep, void *user) {
    disguise(info, 0);
    int rc = real_endpoint(domain, info, ep, user);
    disguise(info, 1);
    return rc;
}

static int (*real_domain)(struct fid_fabric *, struct fi_info *, struct fid_domain **, void *);
static int open_domain(struct fid_fabric *fabric, struct fi_info *info, struct fid_domain **domain, void *user) {
    disguise(info, 0);
    int rc = real_domain(fabric, info, domain, user);
    disguise(info, 1);
    if (rc) return rc;
    // The copy that the second line makes has the first one's entry in it.
    REPLACE(*domain, ops, cq_open, cq_open, real_cq_open);
    REPLACE(*domain, ops, endpoint, endpoint, real_endpoint);
    REPLACE(*domain, mr, regattr, regattr, real_regattr);
    return 0;
}

int fi_fabric(struct fi_fabric_attr *attr, struct fid_fabric **fabric, void *user) {
    int (*open)(struct fi_fabric_attr *, struct fid_fabric **, void *) = real("fi_fabric", "FABRIC_1.1");
    struct fi_fabric_attr asked = *attr;
    asked.prov_name = real_provider();
    asked.api_version = FI_VERSION(1, 17);
    int rc = open(&asked, fabric, user);
    if (rc == 0) REPLACE(*fabric, ops, domain, open_domain, real_domain);
    return rc;
}

// ---- the test's side ----

// nic: whether it is a NIC's provider; hmem: whether FI_HMEM is offered; dmabuf: whether one is taken; cuda: whether GPU
// memory can be registered at all.
void standin_fabric_option(const char *key, int value) {
    if (!strcmp(key, "hmem")) option.hmem = value;
    else if (!strcmp(key, "dmabuf")) option.dmabuf = value;
    else if (!strcmp(key, "nic")) option.nic = value;
    else if (!strcmp(key, "cuda")) option.cuda = value;
    else abort();
    looked_without_context = 0;
}
