//! Opening of objects, and registering of memory.

use std::collections::VecDeque;
use std::ffi::{c_int, c_void};

use nixl_libfabric::sys::libfabric as sys;

use super::tables::{AV, CM, CQ, DOMAIN, EP, EQ, FABRIC, MR, MSG, NONE, RMA, fid, table};
use super::{here, new_object, object};
use crate::world::{Cq, Domain, Ep, Kind, Mr};

pub(super) unsafe extern "C" fn open_fabric(
    _: *mut sys::fi_fabric_attr,
    out: *mut *mut sys::fid_fabric,
    _: *mut c_void,
) -> c_int {
    let (world, _) = here();
    let mut state = world.state();
    if state.setup_fails() {
        return -libc::ENOMEM;
    }
    state.fabrics.push(0);
    let index = state.fabrics.len() - 1;
    let object = sys::fid_fabric { fid: fid(Kind::Fabric), ops: table(&FABRIC), api_version: 0 };
    let object = new_object(object, &world, &mut state, index, Kind::Fabric);
    // SAFETY: the caller gives a place for the object.
    unsafe { out.write(object) };
    0
}

pub(super) unsafe extern "C" fn open_domain(
    fabric: *mut sys::fid_fabric,
    _: *mut sys::fi_info,
    out: *mut *mut sys::fid_domain,
    _: *mut c_void,
) -> c_int {
    // SAFETY: an object and an entry of ours.
    let fabric = unsafe { object(fabric, "fi_domain") };
    let world = fabric.world();
    let (_, host) = here();
    let mut state = world.state();
    if state.setup_fails() {
        return -libc::ENOMEM;
    }
    state.fabrics[fabric.index] += 1;
    state.domains.push(Domain { fabric: fabric.index, host, children: 0 });
    let index = state.domains.len() - 1;
    let object = sys::fid_domain { fid: fid(Kind::Domain), ops: table(&DOMAIN), mr: table(&MR) };
    // SAFETY: as in `open_fabric`.
    unsafe { out.write(new_object(object, world, &mut state, index, Kind::Domain)) };
    0
}

pub(super) unsafe extern "C" fn open_eq(
    fabric: *mut sys::fid_fabric,
    _: *mut sys::fi_eq_attr,
    out: *mut *mut sys::fid_eq,
    _: *mut c_void,
) -> c_int {
    // SAFETY: an object of ours.
    let fabric = unsafe { object(fabric, "fi_eq_open") };
    let mut state = fabric.world().state();
    if state.setup_fails() {
        return -libc::ENOMEM;
    }
    state.fabrics[fabric.index] += 1;
    // An event queue knows its fabric by the order of closing alone: the fabric's index.
    state.eqs.push(fabric.index as u32);
    let index = state.eqs.len() - 1;
    let object = sys::fid_eq { fid: fid(Kind::Eq), ops: table(&EQ) };
    // SAFETY: as in `open_fabric`.
    unsafe { out.write(new_object(object, fabric.world(), &mut state, index, Kind::Eq)) };
    0
}

pub(super) unsafe extern "C" fn open_av(
    domain: *mut sys::fid_domain,
    _: *mut sys::fi_av_attr,
    out: *mut *mut sys::fid_av,
    _: *mut c_void,
) -> c_int {
    // SAFETY: an object of ours.
    let domain = unsafe { object(domain, "fi_av_open") };
    let mut state = domain.world().state();
    if state.setup_fails() {
        return -libc::ENOMEM;
    }
    state.domains[domain.index].children += 1;
    state.avs.push((domain.index as u32, Vec::new()));
    let index = state.avs.len() - 1;
    let object = sys::fid_av { fid: fid(Kind::Av), ops: table(&AV) };
    // SAFETY: as in `open_fabric`.
    unsafe { out.write(new_object(object, domain.world(), &mut state, index, Kind::Av)) };
    0
}

pub(super) unsafe extern "C" fn open_cq(
    domain: *mut sys::fid_domain,
    attr: *mut sys::fi_cq_attr,
    out: *mut *mut sys::fid_cq,
    _: *mut c_void,
) -> c_int {
    // SAFETY: an object of ours; the attributes live through the call.
    let (domain, attr) = unsafe { (object(domain, "fi_cq_open"), &*attr) };
    let mut state = domain.world().state();
    if state.setup_fails() {
        return -libc::ENOMEM;
    }
    if attr.wait_obj != sys::FI_WAIT_NONE {
        return -libc::ENOSYS;
    }
    if attr.format != sys::FI_CQ_FORMAT_DATA {
        state.breach("the queue's format is not FI_CQ_FORMAT_DATA");
    }
    state.domains[domain.index].children += 1;
    let size = if attr.size == 0 { 1024 } else { attr.size };
    state.cqs.push(Cq { domain: domain.index, size, entries: VecDeque::new(), endpoints_open: 0 });
    let index = state.cqs.len() - 1;
    let object = sys::fid_cq { fid: fid(Kind::Cq), ops: table(&CQ) };
    // SAFETY: as in `open_fabric`.
    unsafe { out.write(new_object(object, domain.world(), &mut state, index, Kind::Cq)) };
    0
}

pub(super) unsafe extern "C" fn open_ep(
    domain: *mut sys::fid_domain,
    info: *mut sys::fi_info,
    out: *mut *mut sys::fid_ep,
    _: *mut c_void,
) -> c_int {
    // SAFETY: an object and an entry of ours.
    let (domain, tx_size, rx_size, op_flags) = unsafe {
        let tx = &*(*info).tx_attr;
        (object(domain, "fi_endpoint"), tx.size, (*(*info).rx_attr).size, tx.op_flags)
    };
    let mut state = domain.world().state();
    if state.setup_fails() {
        return -libc::ENOMEM;
    }
    let host = state.domains[domain.index].host;
    let index = state.eps.len();
    let mut name = [0xee; 32];
    name[..8].copy_from_slice(&(index as u64).to_le_bytes());
    name[8..16].copy_from_slice(&(host as u64).to_le_bytes());
    state.domains[domain.index].children += 1;
    state.names.insert(name, index);
    state.eps.push(Ep {
        host,
        domain: domain.index,
        cq: None,
        av: None,
        eq: None,
        eq_offered: false,
        enabled: false,
        closed: false,
        tx_size,
        rx_size,
        op_flags,
        name,
        recvs: VecDeque::new(),
        unmatched: VecDeque::new(),
        pooled: VecDeque::new(),
        contexts: std::collections::BTreeSet::new(),
        outstanding: 0,
        held: Vec::new(),
        batch: None,
        connections: std::collections::HashMap::new(),
        mrs_bound: 0,
        moved: 0,
        doorbells: 0,
        broken: None,
    });
    let object = sys::fid_ep {
        fid: fid(Kind::Ep),
        ops: table(&EP),
        cm: table(&CM),
        msg: table(&MSG),
        rma: table(&RMA),
        tagged: NONE,
        atomic: NONE,
        collective: NONE,
    };
    // SAFETY: as in `open_fabric`.
    unsafe { out.write(new_object(object, domain.world(), &mut state, index, Kind::Ep)) };
    0
}

pub(super) unsafe extern "C" fn register(
    domain: *mut sys::fid,
    attr: *const sys::fi_mr_attr,
    _: u64,
    out: *mut *mut sys::fid_mr,
) -> c_int {
    // SAFETY: an object of ours; the attributes and their one range live through the call.
    let (domain, attr, range) = unsafe {
        let attr = &*attr;
        (object(domain.cast::<sys::fid_domain>(), "fi_mr_regattr"), attr, *attr.mr_iov.cast::<libc::iovec>())
    };
    let mut state = domain.world().state();
    if state.setup_fails() {
        return -libc::ENOMEM;
    }
    let index = state.mrs.len();
    let key = if state.profile.prov_key { state.rng.next() >> 1 | 1 } else { attr.requested_key };
    if state.keys.contains_key(&(domain.index, key)) {
        state.breach(format!("key {key} is in use in this domain"));
        return -sys::FI_ENOKEY;
    }
    state.domains[domain.index].children += 1;
    state.keys.insert((domain.index, key), index);
    state.mrs.push(Mr {
        domain: domain.index,
        addr: range.iov_base as usize,
        len: range.iov_len,
        key,
        bound: None,
        enabled: false,
        in_flight: 0,
    });
    // The descriptor is the index, so that a wrong one is told from a right one without looking behind it.
    let descriptor = (index + 1) as *mut c_void;
    let object = sys::fid_mr { fid: fid(Kind::Mr), mem_desc: descriptor, key };
    // SAFETY: as in `open_fabric`.
    unsafe { out.write(new_object(object, domain.world(), &mut state, index, Kind::Mr)) };
    0
}
