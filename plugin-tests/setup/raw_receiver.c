/* Receives over libfabric's tcp provider and prints what came, byte for byte: what an agent sends, seen by nobody's plugin.
 *
 * usage: raw_receiver
 * Prints "ready <address> <key> <memory>", then a line for each event: "message <immediate> <payload>" or "write <immediate>";
 * all numbers hexadecimal. REGION_BYTES of memory can be written to. Ends with its standard input. */

#include <poll.h>
#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { REGION_BYTES = 1 << 20, MESSAGE_BYTES_MAX = 8192, RECEIVES = 64, KEY = 0x5eed };

static struct fid_ep *endpoint;
static struct fid_cq *queue;
static uint8_t region[REGION_BYTES];
static uint8_t buffers[RECEIVES][MESSAGE_BYTES_MAX];

static void check(const char *what, ssize_t result) {
    if (result < 0) {
        fprintf(stderr, "raw_receiver: %s: %s\n", what, fi_strerror((int)-result));
        exit(1);
    }
}

static void print_hex(const uint8_t *bytes, size_t count) {
    for (size_t at = 0; at < count; at++) printf("%02x", bytes[at]);
}

static void post(uint8_t *buffer) {
    check("fi_recv", fi_recv(endpoint, buffer, MESSAGE_BYTES_MAX, NULL, FI_ADDR_UNSPEC, buffer));
}

static void open_endpoint(void) {
    struct fi_info *hints = fi_allocinfo(), *info;
    struct fid_fabric *fabric;
    struct fid_domain *domain;
    struct fid_av *addresses;
    struct fid_mr *memory;
    struct fi_av_attr av_attr = {.type = FI_AV_TABLE};
    struct fi_cq_attr cq_attr = {.format = FI_CQ_FORMAT_DATA};
    uint8_t name[128];
    size_t name_size = sizeof name;

    hints->caps = FI_MSG | FI_RMA;
    hints->ep_attr->type = FI_EP_RDM;
    hints->domain_attr->cq_data_size = 4;
    hints->domain_attr->mr_mode = FI_MR_VIRT_ADDR | FI_MR_ALLOCATED;
    hints->fabric_attr->prov_name = strdup("tcp");
    check("fi_getinfo", fi_getinfo(FI_VERSION(1, 17), NULL, NULL, 0, hints, &info));
    check("fi_fabric", fi_fabric(info->fabric_attr, &fabric, NULL));
    check("fi_domain", fi_domain(fabric, info, &domain, NULL));
    check("fi_av_open", fi_av_open(domain, &av_attr, &addresses, NULL));
    check("fi_cq_open", fi_cq_open(domain, &cq_attr, &queue, NULL));
    check("fi_endpoint", fi_endpoint(domain, info, &endpoint, NULL));
    check("bind av", fi_ep_bind(endpoint, &addresses->fid, 0));
    check("bind cq", fi_ep_bind(endpoint, &queue->fid, FI_TRANSMIT | FI_RECV));
    check("fi_enable", fi_enable(endpoint));
    check("fi_mr_reg", fi_mr_reg(domain, region, sizeof region, FI_REMOTE_WRITE | FI_REMOTE_READ, 0, KEY, 0, &memory, NULL));
    check("fi_getname", fi_getname(&endpoint->fid, name, &name_size));
    for (int at = 0; at < RECEIVES; at++) post(buffers[at]);
    printf("ready ");
    print_hex(name, name_size);
    printf(" %llx %llx\n", (unsigned long long)fi_mr_key(memory), (unsigned long long)(uintptr_t)region);
    fflush(stdout);
}

int main(void) {
    struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
    open_endpoint();
    while (poll(&input, 1, 1) == 0) {
        struct fi_cq_data_entry entry;
        struct fi_cq_err_entry error = {0};
        ssize_t result;
        while ((result = fi_cq_read(queue, &entry, 1)) == 1) {
            if (entry.flags & FI_RECV) {
                printf("message %llx ", (unsigned long long)entry.data);
                print_hex(entry.op_context, entry.len);
                printf("\n");
                post(entry.op_context);
            } else {
                printf("write %llx\n", (unsigned long long)entry.data);
            }
            fflush(stdout);
        }
        if (result == -FI_EAVAIL) {
            fi_cq_readerr(queue, &error, 0);
            fprintf(stderr, "raw_receiver: %s\n", fi_strerror(error.err));
        } else if (result != -FI_EAGAIN) {
            check("fi_cq_read", result);
        }
    }
    return 0;
}
