//! The device's hardware counters, under the names of the EFA kernel driver's `hw_counters`; those that begin with
//! `softefa_` are our own.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($name:ident: $doc:literal),* $(,)?) => {
        /// Counted by every process that uses the device.
        #[repr(C)]
        #[derive(Debug, Default)]
        pub struct Counters {
            $(#[doc = $doc] pub $name: AtomicU64,)*
        }

        impl Counters {
            /// Name and value of each.
            pub fn all(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.load(Ordering::Relaxed)),)*]
            }
        }
    };
}

counters! {
    tx_bytes: "Bytes sent.",
    tx_pkts: "Packets sent.",
    rx_bytes: "Bytes received.",
    rx_pkts: "Packets received.",
    rx_drops: "Packets dropped for want of a posted receive.",
    send_bytes: "Bytes of completed sends.",
    send_wrs: "Completed sends.",
    recv_bytes: "Bytes of completed receives.",
    recv_wrs: "Completed receives.",
    rdma_read_wrs: "Completed RDMA reads.",
    rdma_read_bytes: "Bytes of completed RDMA reads.",
    rdma_read_wr_err: "Failed RDMA reads.",
    rdma_read_resp_bytes: "Bytes given to reads of others.",
    rdma_write_wrs: "Completed RDMA writes.",
    rdma_write_bytes: "Bytes of completed RDMA writes.",
    rdma_write_wr_err: "Failed RDMA writes.",
    rdma_write_recv_bytes: "Bytes written here by others.",
    retrans_bytes: "Bytes sent again.",
    retrans_pkts: "Packets sent again.",
    retrans_timeout_events: "Times that a sender gave up waiting and sent again.",
    unresponsive_remote_events: "Operations given up because the remote did not answer.",
    impaired_remote_conn_events: "Connections that run below their speed; never counted here.",
    softefa_registered_bytes: "Bytes registered since the device was there; what was deregistered counts, too.",
    softefa_posted_wrs: "Work requests posted to send queues.",
    softefa_doorbells: "Times that a send queue's doorbell rang: one for all requests between `wr_start` and `wr_complete`.",
    softefa_address_handles: "Address handles made; those that were destroyed count, too.",
    softefa_cq_overruns: "Completions lost because their completion queue was full.",
}

/// Adds.
pub fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}
