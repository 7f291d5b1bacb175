//! fi_getinfo: what a host has.

use std::ffi::{CStr, CString, c_char, c_int};
use std::ptr;
use std::sync::Arc;

use nixl_libfabric::sys::libfabric as sys;

use super::here;
use crate::world::{Kind, State, World};

/// An answer of fi_getinfo; its `fi_info` stands first.
#[repr(C)]
struct Entry {
    info: sys::fi_info,
    tx: sys::fi_tx_attr,
    rx: sys::fi_rx_attr,
    ep: sys::fi_ep_attr,
    domain: sys::fi_domain_attr,
    fabric: sys::fi_fabric_attr,
    names: [CString; 3],
    world: Arc<World>,
}

pub(super) unsafe extern "C" fn getinfo(
    version: u32,
    _: *const c_char,
    _: *const c_char,
    _: u64,
    hints: *const sys::fi_info,
    info: *mut *mut sys::fi_info,
) -> c_int {
    let (world, _) = here();
    let mut state = world.state();
    if state.setup_fails() {
        return -libc::ENOMEM;
    }
    // SAFETY: the hints are complete, and live through the call.
    let (mode, provider, fabric, wants_confirmation) = unsafe {
        let fabric = &*(*hints).fabric_attr;
        let name = |text: *const c_char| {
            (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
        };
        let tx = &*(*hints).tx_attr;
        (
            (*hints).mode,
            name(fabric.prov_name),
            name(fabric.name),
            tx.op_flags & sys::FI_DELIVERY_COMPLETE != 0,
        )
    };
    let profile = state.profile;
    let fits = provider.is_none_or(|p| p == profile.provider)
        && fabric.is_none_or(|f| f == profile.fabric)
        && (!profile.rx_cq_data || mode & sys::FI_RX_CQ_DATA != 0)
        && (!wants_confirmation || profile.delivery_complete);
    if !fits {
        return -libc::ENODATA;
    }
    let mut head = ptr::null_mut();
    for rail in (0..state.rails).rev() {
        let entry = new_entry(&world, &state, rail, version, wants_confirmation, head);
        head = Box::into_raw(entry).cast();
        state.opened(Kind::Info);
    }
    // SAFETY: the caller gives a place for the answer.
    unsafe { info.write(head) };
    0
}

fn new_entry(
    world: &Arc<World>,
    state: &State,
    rail: usize,
    version: u32,
    confirmed: bool,
    next: *mut sys::fi_info,
) -> Box<Entry> {
    let profile = state.profile;
    let name = |text: String| CString::new(text).expect("no NUL");
    let names = [name(profile.provider.into()), name(profile.fabric.into()), name(format!("nic{rail}"))];
    // SAFETY: integers and raw pointers, for which zero is a value.
    let mut entry: Box<Entry> = unsafe {
        Box::new(Entry {
            info: std::mem::zeroed(),
            tx: std::mem::zeroed(),
            rx: std::mem::zeroed(),
            ep: std::mem::zeroed(),
            domain: std::mem::zeroed(),
            fabric: std::mem::zeroed(),
            names,
            world: Arc::clone(world),
        })
    };
    let bit = |on: bool, bit: c_int| if on { bit } else { 0 };
    entry.tx.size = state.tx_size;
    entry.tx.op_flags = if confirmed { sys::FI_DELIVERY_COMPLETE } else { 0 };
    entry.tx.msg_order = if profile.orders_writes { sys::FI_ORDER_WAW } else { 0 };
    (entry.tx.iov_limit, entry.tx.rma_iov_limit, entry.rx.iov_limit) = (1, 1, 1);
    entry.rx.size = 512;
    entry.ep.type_ = sys::FI_EP_RDM;
    entry.ep.max_msg_size = 1 << 30;
    entry.ep.max_order_waw_size = if profile.orders_writes { usize::MAX } else { 0 };
    entry.domain.threading = sys::FI_THREAD_SAFE;
    entry.domain.mr_mode = sys::FI_MR_LOCAL
        | sys::FI_MR_ALLOCATED
        | bit(profile.virt_addr, sys::FI_MR_VIRT_ADDR)
        | bit(profile.prov_key, sys::FI_MR_PROV_KEY)
        | bit(profile.mr_endpoint, sys::FI_MR_ENDPOINT);
    (entry.domain.mr_key_size, entry.domain.mr_iov_limit, entry.domain.cq_data_size) = (8, 1, 4);
    entry.fabric.api_version = version;
    entry.info.caps = sys::FI_MSG | sys::FI_RMA;
    entry.info.mode = if profile.rx_cq_data { sys::FI_RX_CQ_DATA } else { 0 };
    entry.info.addr_format = sys::FI_ADDR_EFA;
    entry.fabric.prov_name = entry.names[0].as_ptr().cast_mut();
    entry.fabric.name = entry.names[1].as_ptr().cast_mut();
    entry.domain.name = entry.names[2].as_ptr().cast_mut();
    entry.info.tx_attr = &raw mut entry.tx;
    entry.info.rx_attr = &raw mut entry.rx;
    entry.info.ep_attr = &raw mut entry.ep;
    entry.info.domain_attr = &raw mut entry.domain;
    entry.info.fabric_attr = &raw mut entry.fabric;
    entry.info.next = next;
    entry
}

pub(super) unsafe extern "C" fn freeinfo(mut info: *mut sys::fi_info) {
    while !info.is_null() {
        // SAFETY: each entry came from `getinfo` as a box, and is freed once.
        let entry = unsafe { Box::from_raw(info.cast::<Entry>()) };
        entry.world.state().closed(Kind::Info);
        info = entry.info.next;
    }
}
