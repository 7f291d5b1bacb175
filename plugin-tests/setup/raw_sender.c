/* Sends arbitrary control messages to an endpoint over libfabric's tcp provider: what a hostile or confused host could send.
 *
 * usage: raw_sender, with lines "<address> <immediate> <payload>" on standard input, each in hexadecimal ("-" for no payload).
 * Prints how many were sent. */

#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MESSAGE_BYTES_MAX = 1 << 16, LINE_BYTES_MAX = 2 * MESSAGE_BYTES_MAX + 256, SEND_SECONDS_MAX = 10, LINGER_MS = 200 };

static struct fid_ep *endpoint;
static struct fid_cq *queue;

static void check(const char *what, ssize_t result) {
    if (result < 0) {
        fprintf(stderr, "raw_sender: %s: %s\n", what, fi_strerror((int)-result));
        exit(1);
    }
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static size_t from_hex(const char *text, uint8_t *bytes, size_t limit) {
    size_t count = 0;
    unsigned value;
    while (count < limit && sscanf(text + 2 * count, "%2x", &value) == 1) bytes[count++] = (uint8_t)value;
    return count;
}

/* Returns whether a completion, good or bad, was there. */
static int reap(void) {
    struct fi_cq_entry entry;
    struct fi_cq_err_entry error = {0};
    ssize_t result = fi_cq_read(queue, &entry, 1);
    if (result == -FI_EAVAIL) {
        fi_cq_readerr(queue, &error, 0);
        fprintf(stderr, "raw_sender: not delivered: %s\n", fi_strerror(error.err));
        return 1;
    }
    return result > 0;
}

static void open_endpoint(struct fid_av **addresses) {
    struct fi_info *hints = fi_allocinfo(), *info;
    struct fid_fabric *fabric;
    struct fid_domain *domain;
    struct fi_av_attr av_attr = {.type = FI_AV_TABLE};
    struct fi_cq_attr cq_attr = {.format = FI_CQ_FORMAT_CONTEXT};

    hints->caps = FI_MSG;
    hints->ep_attr->type = FI_EP_RDM;
    hints->domain_attr->cq_data_size = 4;
    hints->fabric_attr->prov_name = strdup("tcp");
    check("fi_getinfo", fi_getinfo(FI_VERSION(1, 17), NULL, NULL, 0, hints, &info));
    check("fi_fabric", fi_fabric(info->fabric_attr, &fabric, NULL));
    check("fi_domain", fi_domain(fabric, info, &domain, NULL));
    check("fi_av_open", fi_av_open(domain, &av_attr, addresses, NULL));
    check("fi_cq_open", fi_cq_open(domain, &cq_attr, &queue, NULL));
    check("fi_endpoint", fi_endpoint(domain, info, &endpoint, NULL));
    check("bind av", fi_ep_bind(endpoint, &(*addresses)->fid, 0));
    check("bind cq", fi_ep_bind(endpoint, &queue->fid, FI_TRANSMIT | FI_RECV));
    check("fi_enable", fi_enable(endpoint));
}

int main(void) {
    static char line[LINE_BYTES_MAX], address_text[256], payload_text[LINE_BYTES_MAX];
    static uint8_t address[128], payload[MESSAGE_BYTES_MAX];
    struct fid_av *addresses;
    unsigned sent = 0;

    open_endpoint(&addresses);
    while (fgets(line, sizeof line, stdin)) {
        unsigned long immediate;
        fi_addr_t peer;
        if (sscanf(line, "%255s %lx %s", address_text, &immediate, payload_text) != 3) continue;
        size_t size = from_hex(payload_text, payload, sizeof payload);
        from_hex(address_text, address, sizeof address);
        if (fi_av_insert(addresses, address, 1, &peer, 0, NULL) != 1) {
            fprintf(stderr, "raw_sender: bad address %s\n", address_text);
            return 1;
        }
        double deadline = now() + SEND_SECONDS_MAX;
        ssize_t result;
        while ((result = fi_senddata(endpoint, payload, size, NULL, immediate, peer, NULL)) == -FI_EAGAIN) {
            reap();
            if (now() > deadline) check("fi_senddata", result);
        }
        check("fi_senddata", result);
        while (!reap())
            if (now() > deadline) check("completion", -FI_ETIMEDOUT);
        sent++;
    }
    for (double end = now() + LINGER_MS / 1e3; now() < end;) reap();
    printf("%u\n", sent);
    return 0;
}
