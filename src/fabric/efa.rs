//! What is particular to the efa provider: options, error numbers, quirks by version.

use std::ffi::c_int;
use std::sync::Once;

use super::device::Device;
use super::endpoint::EndpointOptions;
use super::error::FabricError;
use super::library::Version;
use crate::sys::libfabric as sys;

/// `FI_OPT_EFA_RNR_RETRY` value for: retry for ever while the peer has no receive posted.
const RNR_RETRY_INFINITE: usize = 7;

/// Entries of an endpoint's receive queue, unless more receives are to be posted. The efa fabric fills the whole queue
/// with packets of 9 KB of its own: the device's 8192 would be 50 MB for each rail, touched when it is opened. A write
/// with immediate data uses one until the queue is polled; when there is none left the sender's NIC tries again.
const RECEIVES: usize = 1024;

/// Entries of an endpoint's transmit queue on the efa fabric, which registers a packet of 9 KB for each: the device's 4096
/// are 37 MB a rail, 1.2 GB with 32. What is in flight at a time on a NIC of 100 Gb/s is a hundredth of that.
const TRANSMITS: usize = 1024;

/// Entries that a device's transmit queue should have.
pub fn tx_size(device: &Device) -> usize {
    if shakes_hands(device) { TRANSMITS.min(device.tx_size()) } else { device.tx_size() }
}

/// Entries of an endpoint's completion queue: all that the device has. It holds what we have in flight and what peers
/// cause, one entry for each of their writes with immediate data, and what finds no room is lost without a word.
const CQ_ENTRIES: usize = 32_768;

/// Entries that the completion queue of an endpoint should have.
pub fn cq_entries(device: &Device) -> Option<usize> {
    is_efa(device.provider()).then_some(CQ_ENTRIES)
}

/// Whether one can sleep on a completion queue's wait object. Of the efa fabric it cannot be had up to 2.4 (ENOSYS), nor
/// later where libfabric's shared memory is on, which is the default; and where it can, nothing arms it again after an
/// event (2.5 and 2.6, prov/efa/src/rdm/efa_rdm_cq.c). efa-direct has one that works from 2.3 on.
pub fn has_wait_object(device: &Device) -> bool {
    !is_efa(device.provider()) || is_direct(device)
}

/// Entries that a receive queue needs for so many receives of ours.
pub fn rx_size(device: &Device, receives: u32) -> Option<usize> {
    is_efa(device.provider()).then(|| RECEIVES.max(receives as usize))
}

/// Whether a provider name is the efa provider's, alone or under a layer.
pub fn is_efa(provider: &str) -> bool {
    provider.split(';').next() == Some("efa")
}

/// Whether a device is of the `efa-direct` fabric: no protocol of libfabric's own between us and the NIC.
pub fn is_direct(device: &Device) -> bool {
    is_efa(device.provider()) && device.fabric_name() == "efa-direct"
}

/// Whether libfabric speaks a protocol of its own with each peer before it moves data: the efa fabric does.
pub fn shakes_hands(device: &Device) -> bool {
    is_efa(device.provider()) && !is_direct(device)
}

/// Whether messages to a peer are numbered, and one that was lost keeps all later ones from being delivered, for as long as
/// both endpoints live: the efa fabric's receive window waits for it, on all versions up to 2.6
/// (prov/efa/src/rdm/efa_rdm_peer.c, `efa_rdm_peer_reorder_msg`), whether or not FI_ORDER_SAS was asked for.
pub fn numbers_messages(device: &Device) -> bool {
    shakes_hands(device)
}

/// Whether a message that finds no receive is copied by the poll that meets it, 9 KB for each into a pool without limit, and
/// its packet given back to the NIC, so that senders are never held back: the efa fabric does, in all versions from 1.22 to
/// 2.6 (prov/efa/src/rdm/efa_rdm_pke.c, `efa_rdm_pke_get_unexp`; `rx_unexp_pkt_pool` is created with "max count = 0, so pool
/// is allowed to grow", and `FI_EFA_RX_COPY_UNEXP` is on). On efa-direct, as with any NIC, the sender's tries again.
pub fn keeps_messages(device: &Device) -> bool {
    shakes_hands(device)
}

/// Receives that a rail must have for what keeps messages not to, whatever comes: a poll takes in 50 packets
/// (`efa_cq_read_size`, 1.22 to 2.6), and hands out as many.
pub const RECEIVES_MIN: u32 = 64;

/// The fewest receives that a rail should have, also one to which nobody is to send.
pub fn receives_min(device: &Device) -> u32 {
    if keeps_messages(device) { RECEIVES_MIN } else { 0 }
}

/// Whether writes to a peer that has completed one may share a doorbell (FI_MORE). Before 2.4 the provider holds the send
/// queue's lock from the first post to the last (prov/efa/src/rdm/efa_rdm_pke.c, `efa_rdm_pke_write`: ibv_wr_start to
/// ibv_wr_complete), and later releases do where they go through rdma-core; up to 2.6 a batch that is posted before the
/// handshake with the peer is over is never sent (ai-dynamo/nixl#1862), hence the completed write.
pub fn batches_writes(device: &Device, version: Version) -> bool {
    is_efa(device.provider()) && version >= Version::new(2, 4)
}

/// Whether a write with immediate data works although the two ends differ in unsolicited write receive: from 2.4 on the
/// target reads the data instead, before that the post fails with EOPNOTSUPP.
///
/// With unsolicited write receive, each such write is a completion queue entry of the target that nothing holds back, and
/// those that find no room are lost while their sender is told that all is well. Without it a write takes a posted receive,
/// and where there is none the sender's NIC tries again: the queue cannot overrun. C++ peers send such
/// writes. Their wheels up to 1.5.0 leave libfabric's default, on; later ones turn it off.
pub fn mismatch_is_emulated(version: Version) -> bool {
    version >= Version::new(2, 4)
}

/// Whether a completion's provider error number says that the peer, or the way to it, is gone
/// (prov/efa/src/efa_errno.h; below 4096 it is the NIC's completion status).
pub fn is_disconnect(prov_code: i32) -> bool {
    matches!(
        prov_code,
        8 // reset by the remote peer
        | 9 // the remote queue pair does not exist, or is in error
        | 13 // unresponsive, was responsive before
        | 14 // the remote side does not know us (any more)
        | 15 // unreachable, never answered
        | 4124 // unresponsive, connection established before
        | 4126 // reachable by the NIC, but no handshake
    )
}

/// Whether a completion's provider error number says that the queue pair here is in error: the NIC flushes what it holds, or
/// has failed inside. Nothing else makes these (prov/efa/src/efa_errno.h, 1.22 to 2.6; closing an endpoint drops what it
/// flushes unseen). The provider listens to none of the device's own events, in all those releases: this is how a NIC's
/// end is heard of.
pub fn is_of_device(prov_code: i32) -> bool {
    matches!(
        prov_code,
        1 // flushed
        | 2 // internal error of the queue pair
    )
}

/// Whether closing an endpoint waits for what is in flight on it, without a deadline. The efa fabric waits for everything
/// up to 2.4 (prov/efa/src/rdm/efa_rdm_ep_fiops.c, `efa_rdm_ep_wait_send`), later for the receipts that it owes; a device
/// that has failed may complete neither. efa-direct destroys its queue pair at once.
pub fn close_waits(device: &Device) -> bool {
    shakes_hands(device)
}

/// What an operator looks at when packets vanish without an error.
pub const NETWORK_HELP: &str = "On EFA compare hw_counters/tx_pkts here with rx_pkts there: if the first rises \
     and the second stays, the security group lacks a self-referencing egress rule, or the address is in a secondary VPC CIDR.";

/// What an operator can do about a completion's provider error number, where its text does not say.
pub fn remedy(prov_code: i32) -> Option<&'static str> {
    match prov_code {
        // The NIC, or the provider's handshake, got no answer.
        13 | 15 | 4124 | 4126 => Some(NETWORK_HELP),
        _ => None,
    }
}

/// One endpoint option.
#[derive(Debug, PartialEq, Eq)]
struct Setting {
    name: &'static str,
    option: c_int,
    value: Value,
    why: &'static str,
}

#[derive(Debug, PartialEq, Eq)]
enum Value {
    /// C `bool`.
    Flag(bool),
    /// C `size_t`.
    Size(usize),
}

/// The options that an endpoint gets before it is enabled.
fn settings(direct: bool, version: Version, options: &EndpointOptions) -> Vec<Setting> {
    let mut settings = vec![Setting {
        name: "FI_OPT_EFA_RNR_RETRY",
        option: sys::FI_OPT_EFA_RNR_RETRY,
        value: Value::Size(RNR_RETRY_INFINITE),
        why: "a peer that is slow to post receives is not an error",
    }];
    if !direct && mismatch_is_emulated(version) {
        settings.push(Setting {
            name: "FI_OPT_EFA_USE_UNSOLICITED_WRITE_RECV",
            option: sys::FI_OPT_EFA_USE_UNSOLICITED_WRITE_RECV,
            value: Value::Flag(false),
            why: "writes with immediate data wait for a receive instead of overrunning the completion queue",
        });
    }
    if options.gpu_by_nic {
        // Permitted, the efa fabric asks CUDA for synchronous copies on each buffer that is posted, which it refuses for
        // VMM memory, and then so does the post (2.1 to 2.6). And it is the one question that tells a NIC which reaches
        // GPU memory from a provider that copies it.
        settings.push(Setting {
            name: "FI_OPT_CUDA_API_PERMITTED",
            option: sys::FI_OPT_CUDA_API_PERMITTED,
            value: Value::Flag(false),
            why: "GPU memory is the NIC's to move",
        });
    }
    settings
}

/// Sets the options by `set(option, value bytes)`. One that this libfabric does not know keeps its default.
///
/// False if the NIC is to move GPU memory and cannot reach it.
pub(super) fn configure(
    device: &Device,
    version: Version,
    options: &EndpointOptions,
    mut set: impl FnMut(c_int, &[u8]) -> Result<(), FabricError>,
) -> bool {
    let mut reaches_gpus = true;
    for Setting { name, option, value, why } in settings(is_direct(device), version, options) {
        let result = match value {
            Value::Flag(flag) => set(option, &[u8::from(flag)]),
            Value::Size(size) => set(option, &size.to_ne_bytes()),
        };
        match result {
            Ok(()) => {}
            Err(error) if option == sys::FI_OPT_CUDA_API_PERMITTED && error.code == libc::EOPNOTSUPP => {
                log::debug!("{device:?}: this NIC cannot reach GPU memory: {error}");
                reaches_gpus = false;
            }
            Err(error) if matches!(error.code, libc::ENOSYS | libc::ENOPROTOOPT) => {
                log::debug!("{device:?}: this libfabric does not know {name} ({why}), its default stays");
            }
            Err(error) => log::warn!("{device:?}: {name} ({why}) cannot be set, its default stays: {error}"),
        }
    }
    reaches_gpus
}

/// Whether this NIC cannot write, as those of a p4d, which is said once in the log; `get` gives a flag of the endpoint.
pub(super) fn emulates_writes(get: impl FnOnce(c_int) -> Option<bool>) -> bool {
    static ONCE: Once = Once::new();
    let emulates = get(sys::FI_OPT_EFA_EMULATED_WRITE) == Some(true);
    if emulates {
        ONCE.call_once(|| {
            log::info!(
                "these EFA devices have no RDMA write: libfabric has the peer's software fetch what is written \
                 (FI_OPT_EFA_EMULATED_WRITE). Of a fetch that fails there nothing tells: transfer_timeout_ms bounds it"
            );
        });
    }
    emulates
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_apart() {
        assert!(is_efa("efa") && is_efa("efa;ofi_rxd"));
        assert!(!is_efa("tcp;ofi_rxm") && !is_efa("efadv") && !is_efa(""));
    }

    #[test]
    fn unsolicited_receives_are_off_where_peers_may_have_them_on() {
        let options = EndpointOptions::default();
        let sets = |direct, minor, option| {
            settings(direct, Version::new(2, minor), &options).iter().any(|s| s.option == option)
        };
        assert!(sets(false, 4, sys::FI_OPT_EFA_USE_UNSOLICITED_WRITE_RECV));
        assert!(!sets(false, 3, sys::FI_OPT_EFA_USE_UNSOLICITED_WRITE_RECV), "a mismatch fails there");
        // There the mode FI_RX_CQ_DATA decides.
        assert!(!sets(true, 4, sys::FI_OPT_EFA_USE_UNSOLICITED_WRITE_RECV));
        assert!(sets(true, 4, sys::FI_OPT_EFA_RNR_RETRY));
    }

    #[test]
    fn cuda_is_forbidden_only_where_there_are_gpus() {
        let option = |gpu_by_nic| {
            let options = EndpointOptions { gpu_by_nic, ..EndpointOptions::default() };
            let settings = settings(false, Version::new(2, 4), &options);
            settings.into_iter().find(|s| s.option == sys::FI_OPT_CUDA_API_PERMITTED).map(|s| s.value)
        };
        assert_eq!(option(true), Some(Value::Flag(false)));
        assert_eq!(option(false), None);
    }
}
