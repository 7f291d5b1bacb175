//! Devices and contexts.

use std::ffi::c_char;
use std::os::unix::ffi::OsStrExt;
use std::sync::OnceLock;

use libc::{c_int, c_void, size_t};

use super::{cq, fail, qp};
use crate::abi::verbs as v;
use crate::config::{Config, Device};
use crate::engine::Engine;
use crate::engine::source::MTU_BYTES;
use crate::memory::{ADDRESS_HANDLES_MAX, REGISTRATIONS_MAX};
use crate::queue::cq::ENTRIES_MAX;
use crate::queue::work::SEND_SGE_MAX;
use crate::shm::device::QUEUE_PAIRS_MAX;
use crate::sysfs;

/// Entries of a send queue.
pub const SEND_MAX: u32 = 4096;
/// Entries of a receive queue, times the pieces that each may have.
pub const RECEIVE_MAX: u32 = 32_768;

/// A device as callers see it.
#[repr(C)]
pub struct DeviceHandle {
    verbs: v::ibv_device,
    index: usize,
}

// SAFETY: written once before it is shared; callers only read it.
unsafe impl Sync for DeviceHandle {}
// SAFETY: nothing in it belongs to a thread.
unsafe impl Send for DeviceHandle {}

/// An open device as callers see it.
#[repr(C)]
pub struct Context {
    verbs: v::verbs_context,
    /// Index among the devices of the host.
    pub index: usize,
}

impl Context {
    /// The context behind a caller's pointer.
    ///
    /// # Safety
    /// `context` is the caller's object.
    pub unsafe fn of<'a>(context: *mut v::ibv_context) -> &'a Self {
        let offset = std::mem::offset_of!(v::verbs_context, context);
        // SAFETY: the caller's object lies at this offset in a `Context`, whose first field is the `verbs_context`.
        unsafe { &*context.byte_sub(offset).cast::<Self>() }
    }

    /// The device.
    pub fn device(&self) -> Option<&'static Device> {
        Config::get()?.devices.get(self.index)
    }
}

fn handles() -> &'static [DeviceHandle] {
    static HANDLES: OnceLock<Vec<DeviceHandle>> = OnceLock::new();
    HANDLES.get_or_init(|| {
        let Some(config) = Config::get() else { return Vec::new() };
        if let Err(error) = sysfs::create(config) {
            eprintln!("softefa: {}: {error}", config.sysfs().display());
            return Vec::new();
        }
        if std::env::var_os("SYSFS_PATH").is_none() {
            // SAFETY: libfabric reads this variable right after it lists devices, in the same thread; a program that
            // reads its environment in another thread meanwhile is told by README.md to set the variable itself.
            unsafe { std::env::set_var("SYSFS_PATH", config.sysfs()) };
        }
        config.devices.iter().enumerate().map(|(index, device)| handle(config, index, device)).collect()
    })
}

fn handle(config: &Config, index: usize, device: &Device) -> DeviceHandle {
    let mut verbs = v::ibv_device {
        ops: [None; 2],
        node_type: v::IBV_NODE_UNSPECIFIED,
        transport_type: v::IBV_TRANSPORT_UNSPECIFIED,
        name: [0; 64],
        dev_name: [0; 64],
        dev_path: [0; 256],
        ibdev_path: [0; 256],
    };
    put(&mut verbs.name, device.name.as_bytes());
    put(&mut verbs.dev_name, format!("uverbs{index}").as_bytes());
    put(&mut verbs.dev_path, sysfs::verbs_path(config, index).as_os_str().as_bytes());
    put(&mut verbs.ibdev_path, sysfs::ibdev_path(config, device).as_os_str().as_bytes());
    DeviceHandle { verbs, index }
}

/// Writes a C string, cut to fit.
fn put(to: &mut [c_char], text: &[u8]) {
    let room = to.len() - 1;
    for (to, byte) in to.iter_mut().zip(text.iter().take(room)) {
        *to = *byte as c_char;
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_ibv_get_device_list(count: *mut c_int) -> *mut *mut v::ibv_device {
    let handles = handles();
    // SAFETY: plain allocation; the size does not overflow for at most 64 devices.
    let list = unsafe { libc::calloc(handles.len() + 1, size_of::<*mut v::ibv_device>()) };
    let list = list.cast::<*mut v::ibv_device>();
    if list.is_null() {
        return fail(libc::ENOMEM);
    }
    for (index, handle) in handles.iter().enumerate() {
        // SAFETY: the list has room for all handles and a null. Callers do not write to a device.
        unsafe { list.add(index).write((&raw const handle.verbs).cast_mut()) };
    }
    if !count.is_null() {
        // SAFETY: the caller's pointer.
        unsafe { count.write(handles.len() as c_int) };
    }
    list
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_ibv_free_device_list(list: *mut *mut v::ibv_device) {
    // SAFETY: `softefa_ibv_get_device_list` allocated it with calloc.
    unsafe { libc::free(list.cast()) };
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_ibv_get_device_name(device: *mut v::ibv_device) -> *const c_char {
    // SAFETY: the caller's object; only an address is taken.
    unsafe { (&raw const (*device).name).cast() }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_ibv_get_device_guid(device: *mut v::ibv_device) -> u64 {
    // SAFETY: the caller's object is the first field of a `DeviceHandle`.
    let index = unsafe { (*device.cast::<DeviceHandle>()).index };
    Config::get().and_then(|config| config.devices.get(index)).map_or(0, guid)
}

fn guid(device: &Device) -> u64 {
    u64::from_ne_bytes(device.gid.raw[8..].try_into().unwrap_or_default())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_ibv_open_device(device: *mut v::ibv_device) -> *mut v::ibv_context {
    // SAFETY: the caller's object is the first field of a `DeviceHandle`.
    let index = unsafe { (*device.cast::<DeviceHandle>()).index };
    let Some(engine) = Engine::get() else { return fail(libc::ENODEV) };
    if let Err(error) = engine.lock().open_device(index) {
        return fail(error.raw_os_error().unwrap_or(libc::EIO));
    }
    let ops = v::ibv_context_ops {
        compat_query_device: None,
        compat_query_port: None,
        compat_memory: [None; 5],
        memory_windows: [None; 3],
        compat_create_cq: None,
        poll_cq: Some(cq::poll_cq),
        req_notify_cq: Some(cq::req_notify_cq),
        compat_queues: [None; 7],
        post_srq_recv: None,
        compat_qp: [None; 4],
        post_send: Some(qp::post_send),
        post_recv: Some(qp::post_recv),
        compat_rest: [None; 5],
    };
    let context = v::ibv_context {
        device,
        ops,
        cmd_fd: -1,
        async_fd: -1,
        num_comp_vectors: 4,
        mutex: libc::PTHREAD_MUTEX_INITIALIZER,
        abi_compat: v::VERBS_ABI_IS_EXTENDED as *mut c_void,
    };
    let verbs = v::verbs_context {
        query_port: Some(query_port),
        unused_to_create_cq_ex: [None; 24],
        create_cq_ex: Some(cq::create_cq_ex),
        private: std::ptr::null_mut(),
        query_device_ex: Some(query_device_ex),
        unused_to_create_qp_ex: [None; 5],
        create_qp_ex: Some(qp::create_qp_ex),
        unused_to_placeholder3: [None; 4],
        placeholder3: 0,
        sz: size_of::<v::verbs_context>(),
        context,
    };
    let context = Box::into_raw(Box::new(Context { verbs, index }));
    // SAFETY: just made; only an address is taken.
    unsafe { &raw mut (*context).verbs.context }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_ibv_close_device(context: *mut v::ibv_context) -> c_int {
    // SAFETY: the caller's object, made by `softefa_ibv_open_device` and not used after this.
    unsafe { drop(Box::from_raw(std::ptr::from_ref(Context::of(context)).cast_mut())) };
    0
}

fn device_attr(device: &Device) -> v::ibv_device_attr {
    let id = Config::get().map_or(0, |config| config.topology.device_id);
    v::ibv_device_attr {
        fw_ver: [b'0' as c_char; 64].map({
            let mut text = b"0.0.0.0\0".iter();
            move |_| text.next().map_or(0, |byte| *byte as c_char)
        }),
        node_guid: guid(device),
        sys_image_guid: guid(device),
        max_mr_size: 1 << 40,
        page_size_cap: 0xffff_f000,
        vendor_id: 0x1d0f,
        vendor_part_id: id,
        hw_ver: id,
        max_qp: QUEUE_PAIRS_MAX as c_int,
        max_qp_wr: SEND_MAX as c_int,
        device_cap_flags: 0,
        max_sge: SEND_SGE_MAX as c_int,
        max_sge_rd: 1,
        max_cq: QUEUE_PAIRS_MAX as c_int * 2,
        max_cqe: ENTRIES_MAX as c_int,
        max_mr: REGISTRATIONS_MAX as c_int,
        max_pd: 1024,
        unused_rd_atom: [0; 5],
        atomic_cap: 0,
        unused_ee_to_mcast: [0; 8],
        max_ah: c_int::from(ADDRESS_HANDLES_MAX),
        unused_fmr_srq: [0; 5],
        max_pkeys: 1,
        local_ca_ack_delay: 0,
        phys_port_cnt: 1,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_ibv_query_device(
    context: *mut v::ibv_context,
    attr: *mut v::ibv_device_attr,
) -> c_int {
    // SAFETY: the caller's object.
    let Some(device) = (unsafe { Context::of(context) }).device() else { return libc::ENODEV };
    // SAFETY: the caller's struct.
    unsafe { attr.write(device_attr(device)) };
    0
}

unsafe extern "C" fn query_device_ex(
    context: *mut v::ibv_context,
    _input: *const c_void,
    attr: *mut v::ibv_device_attr,
    length: size_t,
) -> c_int {
    // SAFETY: the caller's struct has `length` bytes and begins with an `ibv_device_attr`.
    unsafe { attr.cast::<u8>().write_bytes(0, length) };
    if length < size_of::<v::ibv_device_attr>() {
        return libc::EINVAL;
    }
    // SAFETY: as above.
    unsafe { softefa_ibv_query_device(context, attr) }
}

/// Verbs codes of speed and width of a link.
fn speed_and_width(gbps: u32) -> (u8, u8) {
    // Speeds: 32 is 25 Gbit/s a lane, 64 is 50, 128 is 100; width 2 is 4 lanes, 4 is 8.
    match gbps {
        0..=100 => (32, 2),
        101..=200 => (64, 2),
        201..=400 => (128, 2),
        _ => (128, 4),
    }
}

fn port_attr(gbps: u32) -> v::ibv_port_attr {
    let (active_speed, active_width) = speed_and_width(gbps);
    v::ibv_port_attr {
        state: v::IBV_PORT_ACTIVE,
        max_mtu: v::IBV_MTU_4096,
        active_mtu: v::IBV_MTU_4096,
        gid_tbl_len: 1,
        max_msg_sz: MTU_BYTES as u32,
        pkey_tbl_len: 1,
        lmc: 1,
        max_vl_num: 1,
        active_width,
        active_speed,
        phys_state: 5,
        ..v::ibv_port_attr::default()
    }
}

unsafe extern "C" fn query_port(
    _context: *mut v::ibv_context,
    port: u8,
    attr: *mut v::ibv_port_attr,
    length: size_t,
) -> c_int {
    let Some(config) = Config::get().filter(|_| port == 1) else { return libc::EINVAL };
    // SAFETY: the caller's struct has `length` bytes.
    unsafe { super::copy_prefix(&port_attr(config.topology.gbps), attr, length) };
    0
}

/// The symbol is for programs older than the extended struct: theirs ends before `port_cap_flags2`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_ibv_query_port(
    context: *mut v::ibv_context,
    port: u8,
    attr: *mut v::ibv_port_attr,
) -> c_int {
    // SAFETY: the caller's struct has at least the old length.
    unsafe { query_port(context, port, attr, std::mem::offset_of!(v::ibv_port_attr, port_cap_flags2)) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_ibv_query_gid(
    context: *mut v::ibv_context,
    port: u8,
    index: c_int,
    gid: *mut v::ibv_gid,
) -> c_int {
    // SAFETY: the caller's object.
    let Some(device) = (unsafe { Context::of(context) }).device() else { return -1 };
    if port != 1 || index != 0 {
        return -1;
    }
    // SAFETY: the caller's union, which may be less aligned than `ibv_gid` says.
    unsafe { gid.cast::<[u8; 16]>().write(device.gid.raw) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn softefa_ibv_query_pkey(
    _context: *mut v::ibv_context,
    _port: u8,
    _index: c_int,
    pkey: *mut u16,
) -> c_int {
    // SAFETY: the caller's pointer.
    unsafe { pkey.write(0xffff) };
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn softefa_ibv_get_pkey_index(_context: *mut v::ibv_context, _port: u8, _pkey: u16) -> c_int {
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn softefa_ibv_fork_init() -> c_int {
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn softefa_ibv_is_fork_initialized() -> c_int {
    v::IBV_FORK_UNNEEDED
}
