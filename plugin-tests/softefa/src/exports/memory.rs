//! Protection domains, registrations, address handles.

use libc::{c_int, c_void, size_t};

use super::device::Context;
use super::fail;
use crate::abi::efadv::efadv_ah_attr;
use crate::abi::verbs as v;
use crate::counters::add;
use crate::cuda;
use crate::dmabuf;
use crate::engine::Engine;
use crate::memory::Registration;
use crate::shm::channel::{GPU, HOST};
use crate::trace::{self, Event, Record};

/// An address handle as callers see it.
#[repr(C)]
pub struct AddressHandle {
    verbs: v::ibv_ah,
    /// Where it leads.
    pub gid: v::ibv_gid,
    number: u16,
    device: usize,
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_ibv_alloc_pd(context: *mut v::ibv_context) -> *mut v::ibv_pd {
    let Some(engine) = Engine::get() else { return fail(libc::ENODEV) };
    let handle = engine.lock().new_pd();
    Box::into_raw(Box::new(v::ibv_pd { context, handle }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_ibv_dealloc_pd(pd: *mut v::ibv_pd) -> c_int {
    // SAFETY: the caller's object, made by `softefa_ibv_alloc_pd` and not used after this.
    unsafe { drop(Box::from_raw(pd)) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_ibv_reg_mr(
    pd: *mut v::ibv_pd,
    address: *mut c_void,
    length: size_t,
    access: c_int,
) -> *mut v::ibv_mr {
    // SAFETY: the contract is the same.
    unsafe { softefa_ibv_reg_mr_iova2(pd, address, length, address as u64, access as u32) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_ibv_reg_mr_iova(
    pd: *mut v::ibv_pd,
    address: *mut c_void,
    length: size_t,
    iova: u64,
    access: c_int,
) -> *mut v::ibv_mr {
    // SAFETY: the contract is the same.
    unsafe { softefa_ibv_reg_mr_iova2(pd, address, length, iova, access as u32) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_ibv_reg_mr_iova2(
    pd: *mut v::ibv_pd,
    address: *mut c_void,
    length: size_t,
    iova: u64,
    access: u32,
) -> *mut v::ibv_mr {
    let Some(engine) = Engine::get() else { return fail(libc::ENODEV) };
    // SAFETY: the caller's object.
    let (context, pd_number) = unsafe { ((*pd).context, (*pd).handle) };
    let address = address as u64;
    let memory = if cuda::is_device(address) { GPU } else { HOST };
    if memory == GPU && !engine.config.gpu.pointer {
        // Without nvidia_peermem the kernel looks for pages of the process there, and finds none.
        return fail(libc::EFAULT);
    }
    let registration = Registration { pd: pd_number, address, iova, length: length as u64, access, memory };
    register(engine, pd, context, registration, address)
}

/// The memory is what CUDA has at `iova`: an address says more than the descriptor of a dmabuf, whose pages only a
/// device could reach. So an `iova` other than the memory's own address, which verbs would allow, is refused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_ibv_reg_dmabuf_mr(
    pd: *mut v::ibv_pd,
    offset: u64,
    length: size_t,
    iova: u64,
    fd: c_int,
    access: c_int,
) -> *mut v::ibv_mr {
    let Some(engine) = Engine::get() else { return fail(libc::ENODEV) };
    if !engine.config.gpu.dmabuf {
        return fail(libc::EOPNOTSUPP);
    }
    if let Err(error) = dmabuf::check(fd, offset, length as u64, iova) {
        return fail(error);
    }
    if !cuda::is_device(iova) {
        eprintln!("softefa: a dmabuf is registered at {iova:#x}, where there is no GPU memory: refused");
        return fail(libc::EINVAL);
    }
    // SAFETY: the caller's object.
    let (context, pd_number) = unsafe { ((*pd).context, (*pd).handle) };
    let (length, access) = (length as u64, access as u32);
    let registration = Registration { pd: pd_number, address: iova, iova, length, access, memory: GPU };
    register(engine, pd, context, registration, offset)
}

/// Enters a registration and makes the caller's object; `shown` is the address in it.
fn register(
    engine: &Engine,
    pd: *mut v::ibv_pd,
    context: *mut v::ibv_context,
    registration: Registration,
    shown: u64,
) -> *mut v::ibv_mr {
    // SAFETY: the context of the caller's domain.
    let index = unsafe { Context::of(context) }.index;
    let Registration { iova, length, .. } = registration;
    let key = engine.lock().device(index).and_then(|device| {
        let key = device.registrations.insert(registration)?;
        add(&device.table.counters.softefa_registered_bytes, length);
        Some(key)
    });
    let Some(key) = key else { return fail(libc::ENOMEM) };
    let record = Record { device: index as u16, id: iova, length, extra: key, ..Record::default() };
    trace::note(Event::Register, record);
    Box::into_raw(Box::new(v::ibv_mr {
        context,
        pd,
        addr: shown as *mut c_void,
        length: length as size_t,
        handle: key,
        lkey: key,
        rkey: key,
    }))
}

/// When this returns no byte is written to the memory any more: pieces move under the engine's lock, and each looks
/// the registration up first.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_ibv_dereg_mr(mr: *mut v::ibv_mr) -> c_int {
    let Some(engine) = Engine::get() else { return libc::ENODEV };
    // SAFETY: the caller's object, made by `softefa_ibv_reg_mr_iova2` and not used after this.
    let mr = unsafe { Box::from_raw(mr) };
    // SAFETY: the registration's context is the caller's object too.
    let index = unsafe { Context::of(mr.context) }.index;
    if let Some(device) = engine.lock().device(index) {
        device.registrations.remove(mr.lkey);
    }
    trace::note(Event::Deregister, Record { device: index as u16, extra: mr.lkey, ..Record::default() });
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_ibv_create_ah(
    pd: *mut v::ibv_pd,
    attr: *mut v::ibv_ah_attr,
) -> *mut v::ibv_ah {
    let Some(engine) = Engine::get() else { return fail(libc::ENODEV) };
    // SAFETY: the caller's objects.
    let (context, gid) = unsafe { ((*pd).context, (*attr).dgid) };
    // SAFETY: the domain's context is the caller's object too.
    let index = unsafe { Context::of(context) }.index;
    let number = engine.lock().device(index).and_then(|device| {
        add(&device.table.counters.softefa_address_handles, 1);
        device.handles.acquire(&gid)
    });
    let Some(number) = number else { return fail(libc::ENOMEM) };
    let verbs = v::ibv_ah { context, pd, handle: u32::from(number) };
    Box::into_raw(Box::new(AddressHandle { verbs, gid, number, device: index })).cast()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_ibv_destroy_ah(ah: *mut v::ibv_ah) -> c_int {
    let Some(engine) = Engine::get() else { return libc::ENODEV };
    // SAFETY: the caller's object, made by `softefa_ibv_create_ah` and not used after this.
    let handle = unsafe { Box::from_raw(ah.cast::<AddressHandle>()) };
    if let Some(device) = engine.lock().device(handle.device) {
        device.handles.release(&handle.gid);
    }
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_efadv_query_ah(
    ah: *mut v::ibv_ah,
    attr: *mut efadv_ah_attr,
    length: u32,
) -> c_int {
    // SAFETY: the caller's object.
    let ahn = unsafe { (*ah.cast::<AddressHandle>()).number };
    let answer = efadv_ah_attr { comp_mask: 0, ahn, reserved: [0; 6] };
    // SAFETY: the caller's struct has `length` bytes.
    unsafe { super::copy_prefix(&answer, attr, length as usize) };
    0
}
