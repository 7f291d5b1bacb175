//! Names of endpoints, and address vectors.

use std::ffi::{c_int, c_void};
use std::ptr;

use nixl_libfabric::sys::libfabric as sys;

use super::object;
use crate::world::AvEntry;

pub(super) unsafe extern "C" fn getname(ep: *mut sys::fid, name: *mut c_void, len: *mut usize) -> c_int {
    // SAFETY: an object of ours; the caller's buffer is as long as it says.
    unsafe {
        let ep = object(ep.cast::<sys::fid_ep>(), "fi_getname");
        let mut state = ep.world().state();
        if state.setup_fails() {
            return -libc::ENOMEM;
        }
        let bytes = &state.eps[ep.index].name;
        if *len < bytes.len() {
            return -sys::FI_ETOOSMALL;
        }
        ptr::copy(bytes.as_ptr(), name.cast(), bytes.len());
        *len = bytes.len();
    }
    0
}

pub(super) unsafe extern "C" fn av_insert(
    av: *mut sys::fid_av,
    name: *const c_void,
    count: usize,
    address: *mut u64,
    _: u64,
    _: *mut c_void,
) -> c_int {
    // SAFETY: an object of ours; the caller lends as many bytes as this provider's addresses have.
    let (av, name) = unsafe { (object(av, "fi_av_insert"), *name.cast::<[u8; 32]>()) };
    let mut state = av.world().state();
    state.on_call();
    if count != 1 || name[16..] != [0xee; 16] {
        return 0;
    }
    let target = state.names.get(&name).copied();
    let entries = &mut state.avs[av.index].1;
    entries.push(Some(AvEntry { target, in_flight: 0, reached: false }));
    // SAFETY: the caller gives a place for the address.
    unsafe { address.write(entries.len() as u64 - 1) };
    1
}

pub(super) unsafe extern "C" fn av_remove(
    av: *mut sys::fid_av,
    address: *mut u64,
    _: usize,
    _: u64,
) -> c_int {
    // SAFETY: an object of ours; one address.
    let (av, address) = unsafe { (object(av, "fi_av_remove"), *address) };
    let mut state = av.world().state();
    state.on_call();
    match state.avs[av.index].1.get_mut(address as usize).and_then(Option::take) {
        Some(entry) if entry.in_flight > 0 => {
            state.breach("an address was removed while operations to it are in flight");
        }
        Some(_) => {}
        None => state.breach("an address was removed that is not there"),
    }
    0
}
