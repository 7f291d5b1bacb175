//! Binding, enabling and closing: in the order that libfabric asks for, or a breach.

use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nixl_libfabric::sys::libfabric as sys;

use super::object;
use crate::world::{Kind, State};

pub(super) unsafe extern "C" fn bind(one: *mut sys::fid, other: *mut sys::fid, _: u64) -> c_int {
    // SAFETY: objects of ours; the class, which comes first in all of them, tells which.
    let (kind, to) = unsafe { ((*one).fclass, (*other).fclass) };
    if kind == Kind::Mr as usize && to == Kind::Ep as usize {
        // SAFETY: as above.
        let (mr, ep) = unsafe {
            (
                object(one.cast::<sys::fid_mr>(), "fi_mr_bind"),
                object(other.cast::<sys::fid_ep>(), "fi_mr_bind"),
            )
        };
        let mut state = mr.world().state();
        if state.setup_fails() {
            return -libc::ENOMEM;
        }
        state.mrs[mr.index].bound = Some(ep.index);
        state.eps[ep.index].mrs_bound += 1;
        return 0;
    }
    // SAFETY: as above.
    let ep = unsafe { object(one.cast::<sys::fid_ep>(), "fi_ep_bind") };
    let mut state = ep.world().state();
    if kind != Kind::Ep as usize || state.eps[ep.index].enabled {
        state.breach("fi_ep_bind on something else, or after fi_enable");
        return -libc::EINVAL;
    }
    if to == Kind::Eq as usize {
        state.eps[ep.index].eq_offered = true;
    }
    if state.setup_fails() {
        return -libc::ENOMEM;
    }
    // SAFETY: as above.
    unsafe {
        if to == Kind::Cq as usize {
            let cq = object(other.cast::<sys::fid_cq>(), "fi_ep_bind");
            state.eps[ep.index].cq = Some(cq.index);
            state.cqs[cq.index].endpoints_open += 1;
            // One owner for both.
            let shared = cq.occupancy.get_or_init(Arc::default);
            let _ = ep.occupancy.set(Arc::clone(shared));
        } else if to == Kind::Av as usize {
            state.eps[ep.index].av = Some(object(other.cast::<sys::fid_av>(), "fi_ep_bind").index);
        } else if to == Kind::Eq as usize {
            state.eps[ep.index].eq = Some(object(other.cast::<sys::fid_eq>(), "fi_ep_bind").index);
        } else {
            state.breach("fi_ep_bind to something that is no queue");
        }
    }
    0
}

pub(super) unsafe extern "C" fn control(one: *mut sys::fid, command: c_int, _: *mut c_void) -> c_int {
    // SAFETY: an object of ours; see `bind`.
    let kind = unsafe { (*one).fclass };
    if command != sys::FI_ENABLE {
        return -libc::ENOSYS;
    }
    if kind == Kind::Mr as usize {
        // SAFETY: as above.
        let mr = unsafe { object(one.cast::<sys::fid_mr>(), "fi_mr_enable") };
        let mut state = mr.world().state();
        if state.setup_fails() {
            return -libc::ENOMEM;
        }
        state.mrs[mr.index].enabled = true;
        return 0;
    }
    // SAFETY: as above; nothing else is enabled.
    let ep = unsafe { object(one.cast::<sys::fid_ep>(), "fi_enable") };
    let mut state = ep.world().state();
    if state.setup_fails() {
        return -libc::ENOMEM;
    }
    let this = &mut state.eps[ep.index];
    this.enabled = this.cq.is_some() && this.av.is_some();
    if !this.enabled || !this.eq_offered {
        state.breach("an endpoint is enabled without its queues, its event queue or its address vector");
    }
    0
}

pub(super) unsafe extern "C" fn close(one: *mut sys::fid) -> c_int {
    // SAFETY: an object of ours; all kinds have the same members behind their own part, whose class tells which.
    unsafe {
        match (*one).fclass {
            k if k == Kind::Fabric as usize => {
                close_object(one.cast::<sys::fid_fabric>(), State::close_fabric)
            }
            k if k == Kind::Domain as usize => {
                close_object(one.cast::<sys::fid_domain>(), State::close_domain)
            }
            k if k == Kind::Mr as usize => close_object(one.cast::<sys::fid_mr>(), State::close_mr),
            k if k == Kind::Av as usize => close_object(one.cast::<sys::fid_av>(), State::close_av),
            k if k == Kind::Cq as usize => close_object(one.cast::<sys::fid_cq>(), State::close_cq),
            k if k == Kind::Eq as usize => close_object(one.cast::<sys::fid_eq>(), State::close_eq),
            k if k == Kind::Ep as usize => close_object(one.cast::<sys::fid_ep>(), State::close_ep),
            _ => -libc::EINVAL,
        }
    }
}

/// # Safety
/// As [`object`].
unsafe fn close_object<F>(fid: *mut F, end: fn(&mut State, usize) -> Result<(), Busy>) -> c_int {
    // SAFETY: the caller's promise.
    let object = unsafe { object(fid, "fi_close") };
    let mut state = object.world().state();
    match end(&mut state, object.index) {
        Ok(()) => {
            object.open.store(false, Ordering::Relaxed);
            state.closed(object.kind);
            0
        }
        Err(Busy { allowed, why }) => {
            if !allowed {
                state.breach(format!("a {:?} is closed while {why}", object.kind));
            }
            -libc::EBUSY
        }
    }
}

/// What keeps an object from being closed, and whether a user may run into it.
struct Busy {
    allowed: bool,
    why: &'static str,
}

fn unless(busy: bool, why: &'static str) -> Result<(), Busy> {
    if busy { Err(Busy { allowed: false, why }) } else { Ok(()) }
}

impl State {
    fn close_fabric(&mut self, index: usize) -> Result<(), Busy> {
        unless(self.fabrics[index] > 0, "a domain or an event queue of it is open")
    }

    fn close_domain(&mut self, index: usize) -> Result<(), Busy> {
        unless(self.domains[index].children > 0, "something of it is open")?;
        self.fabrics[self.domains[index].fabric] -= 1;
        Ok(())
    }

    fn close_mr(&mut self, index: usize) -> Result<(), Busy> {
        let mr = &self.mrs[index];
        unless(mr.in_flight > 0, "operations that use it are in flight")?;
        if let Some(ep) = mr.bound {
            self.eps[ep].mrs_bound -= 1;
        }
        self.domains[mr.domain].children -= 1;
        self.keys.remove(&(mr.domain, mr.key));
        Ok(())
    }

    fn close_av(&mut self, index: usize) -> Result<(), Busy> {
        unless(self.eps.iter().any(|ep| !ep.closed && ep.av == Some(index)), "an endpoint of it is open")?;
        self.domains[self.avs[index].0 as usize].children -= 1;
        Ok(())
    }

    fn close_cq(&mut self, index: usize) -> Result<(), Busy> {
        unless(self.cqs[index].endpoints_open > 0, "an endpoint of it is open")?;
        self.domains[self.cqs[index].domain].children -= 1;
        Ok(())
    }

    fn close_eq(&mut self, index: usize) -> Result<(), Busy> {
        unless(self.eps.iter().any(|ep| !ep.closed && ep.eq == Some(index)), "an endpoint of it is open")?;
        self.fabrics[self.eqs[index] as usize] -= 1;
        Ok(())
    }

    fn close_ep(&mut self, index: usize) -> Result<(), Busy> {
        if self.eps[index].mrs_bound > 0 {
            return Err(Busy { allowed: true, why: "registrations are bound to it" });
        }
        self.eps[index].closed = true;
        self.on_endpoint_closed(index);
        if let Some(cq) = self.eps[index].cq {
            self.cqs[cq].endpoints_open -= 1;
        }
        self.domains[self.eps[index].domain].children -= 1;
        Ok(())
    }

    /// Nothing may happen on an endpoint between the first and the last post of a batch.
    pub(super) fn not_in_batch(&mut self, ep: usize, call: &str) {
        if self.eps[ep].batch.is_some() {
            self.breach(format!("{call} between the first and the last post of an FI_MORE batch"));
        }
    }
}

pub(super) unsafe extern "C" fn getopt(
    ep: *mut sys::fid,
    _: c_int,
    option: c_int,
    value: *mut c_void,
    len: *mut usize,
) -> c_int {
    if option != sys::FI_OPT_EFA_EMULATED_WRITE {
        return -libc::ENOPROTOOPT;
    }
    // SAFETY: an object of ours; the caller lends a C `bool`.
    unsafe {
        let emulates = object(ep.cast::<sys::fid_ep>(), "fi_getopt").world().state().profile.emulates_writes;
        *value.cast() = u8::from(emulates);
        *len = 1;
    }
    0
}

pub(super) unsafe extern "C" fn setopt(
    _: *mut sys::fid,
    _: c_int,
    _: c_int,
    _: *const c_void,
    _: usize,
) -> c_int {
    // As a libfabric that does not know the option.
    -libc::ENOPROTOOPT
}
