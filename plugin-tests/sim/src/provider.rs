//! libfabric's functions and tables, answered from a [`World`].

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use nixl_libfabric::fabric::Libfabric;
use nixl_libfabric::sys::libfabric as sys;

use crate::network::{Flight, What, scribble};
use crate::world::{AvEntry, Cq, Domain, Ep, Inside, Kind, Mr, Occupancy, Recv, State, World};

thread_local! {
    /// World and host that this thread opens things in.
    static HERE: RefCell<Option<(Arc<World>, usize)>> = const { RefCell::new(None) };
}

/// Runs `body` as that host: what it opens, it opens there.
pub fn on_host<T>(world: &Arc<World>, host: usize, body: impl FnOnce() -> T) -> T {
    let before = HERE.replace(Some((Arc::clone(world), host)));
    let outcome = body();
    HERE.set(before);
    outcome
}

fn here() -> (Arc<World>, usize) {
    HERE.with_borrow(|here| here.clone().expect("inside `on_host`"))
}

/// The simulated library. The worlds that it is used in must outlive what is opened.
pub fn library() -> Libfabric {
    let api = sys::Api { getinfo, freeinfo, fabric: open_fabric, version, strerror };
    // SAFETY: the functions below do what libfabric's do, as far as they are used; that is what this crate is for.
    unsafe { Libfabric::from_api(api) }
}

unsafe extern "C" fn version() -> u32 {
    2 << 16 | 6
}

unsafe extern "C" fn strerror(_: c_int) -> *const c_char {
    c"simulated error".as_ptr()
}

const EAGAIN: c_int = -libc::EAGAIN;

/// An object: libfabric's part first, then where it belongs. Freed with its world, so that a use after its end is seen.
#[repr(C)]
struct Object<F> {
    fid: F,
    world: *const World,
    index: usize,
    kind: Kind,
    /// Of queues, and of endpoints once they are bound to one.
    occupancy: OnceLock<Arc<Occupancy>>,
    open: AtomicBool,
}

impl<F> Object<F> {
    fn world(&self) -> &World {
        // SAFETY: the world frees its objects when it ends, so it is there.
        unsafe { &*self.world }
    }

    fn enter(&self, call: &str) -> Inside<'_> {
        self.occupancy.get_or_init(Arc::default).enter(self.world(), call)
    }
}

/// Objects of a world, freed with it.
#[derive(Debug, Default)]
pub(crate) struct Graveyard(Vec<(*mut c_void, unsafe fn(*mut c_void))>);

// SAFETY: the pointers are owned, and only used to free what is behind them.
unsafe impl Send for Graveyard {}

impl Drop for Graveyard {
    fn drop(&mut self) {
        for (object, free) in self.0.drain(..) {
            // SAFETY: `new_object` put them here together; the world ends, so no engine is left to use the object.
            unsafe { free(object) };
        }
    }
}

fn new_object<F>(fid: F, world: &World, state: &mut State, index: usize, kind: Kind) -> *mut F {
    unsafe fn free<F>(object: *mut c_void) {
        // SAFETY: the object came from `Box::into_raw` below.
        drop(unsafe { Box::from_raw(object.cast::<Object<F>>()) });
    }
    let object = Object { fid, world, index, kind, occupancy: OnceLock::new(), open: AtomicBool::new(true) };
    let object = Box::into_raw(Box::new(object));
    state.graveyard.0.push((object.cast(), free::<F>));
    state.opened(kind);
    object.cast()
}

/// The object behind a pointer that the code under test passes.
///
/// # Safety
/// The pointer is one that [`new_object`] gave for the same kind of object.
unsafe fn object<'a, F>(fid: *mut F, call: &str) -> &'a Object<F> {
    // SAFETY: the caller's promise; objects are freed with their world.
    let object = unsafe { &*fid.cast::<Object<F>>() };
    if !object.open.load(Ordering::Relaxed) {
        object.world().state().breach(format!("{call} on a {:?} that was closed", object.kind));
    }
    object
}

// Tables.

/// Raw pointers to nothing but functions and null.
struct Table<T>(T);

// SAFETY: the tables are never written.
unsafe impl<T> Sync for Table<T> {}

const NONE: *const c_void = ptr::null();

const fn fid_ops(close: unsafe extern "C" fn(*mut sys::fid) -> c_int) -> Table<sys::fi_ops> {
    Table(sys::fi_ops {
        size: size_of::<sys::fi_ops>(),
        close: Some(close),
        bind: Some(bind),
        control: Some(control),
        ops_open: NONE,
        tostr: NONE,
        ops_set: NONE,
    })
}

static CLOSE: Table<sys::fi_ops> = fid_ops(close);
static FABRIC: Table<sys::fi_ops_fabric> = Table(sys::fi_ops_fabric {
    size: size_of::<sys::fi_ops_fabric>(),
    domain: Some(open_domain),
    passive_ep: NONE,
    eq_open: Some(open_eq),
    wait_open: NONE,
    trywait: None,
    domain2: NONE,
});
static DOMAIN: Table<sys::fi_ops_domain> = Table(sys::fi_ops_domain {
    size: size_of::<sys::fi_ops_domain>(),
    av_open: Some(open_av),
    cq_open: Some(open_cq),
    endpoint: Some(open_ep),
    scalable_ep: NONE,
    cntr_open: NONE,
    poll_open: NONE,
    stx_ctx: NONE,
    srx_ctx: NONE,
    query_atomic: NONE,
    query_collective: NONE,
    endpoint2: NONE,
});
static MR: Table<sys::fi_ops_mr> = Table(sys::fi_ops_mr {
    size: size_of::<sys::fi_ops_mr>(),
    reg: NONE,
    regv: NONE,
    regattr: Some(register),
});
static AV: Table<sys::fi_ops_av> = Table(sys::fi_ops_av {
    size: size_of::<sys::fi_ops_av>(),
    insert: Some(av_insert),
    insertsvc: NONE,
    insertsym: NONE,
    remove: Some(av_remove),
    lookup: NONE,
    straddr: NONE,
    av_set: NONE,
});
static CQ: Table<sys::fi_ops_cq> = Table(sys::fi_ops_cq {
    size: size_of::<sys::fi_ops_cq>(),
    read: Some(cq_read),
    readfrom: NONE,
    readerr: Some(cq_readerr),
    sread: NONE,
    sreadfrom: NONE,
    signal: NONE,
    strerror: None,
});
static EQ: Table<sys::fi_ops_eq> = Table(sys::fi_ops_eq {
    size: size_of::<sys::fi_ops_eq>(),
    read: Some(eq_read),
    readerr: None,
    write: NONE,
    sread: NONE,
    strerror: None,
});
static EP: Table<sys::fi_ops_ep> = Table(sys::fi_ops_ep {
    size: size_of::<sys::fi_ops_ep>(),
    cancel: None,
    getopt: NONE,
    setopt: Some(setopt),
    tx_ctx: NONE,
    rx_ctx: NONE,
    rx_size_left: NONE,
    tx_size_left: NONE,
});
static CM: Table<sys::fi_ops_cm> = Table(sys::fi_ops_cm {
    size: size_of::<sys::fi_ops_cm>(),
    setname: NONE,
    getname: Some(getname),
    getpeer: NONE,
    connect: NONE,
    listen: NONE,
    accept: NONE,
    reject: NONE,
    shutdown: NONE,
    join: NONE,
});
static MSG: Table<sys::fi_ops_msg> = Table(sys::fi_ops_msg {
    size: size_of::<sys::fi_ops_msg>(),
    recv: NONE,
    recvv: NONE,
    recvmsg: Some(recvmsg),
    send: NONE,
    sendv: NONE,
    sendmsg: Some(sendmsg),
    inject: NONE,
    senddata: NONE,
    injectdata: NONE,
});
static RMA: Table<sys::fi_ops_rma> = Table(sys::fi_ops_rma {
    size: size_of::<sys::fi_ops_rma>(),
    read: NONE,
    readv: NONE,
    readmsg: Some(readmsg),
    write: NONE,
    writev: NONE,
    writemsg: Some(writemsg),
    inject: NONE,
    writedata: NONE,
    injectdata: NONE,
});

fn table<T>(of: &'static Table<T>) -> *mut T {
    (&raw const of.0).cast_mut()
}

fn fid(kind: Kind) -> sys::fid {
    sys::fid { fclass: kind as usize, context: ptr::null_mut(), ops: table(&CLOSE) }
}

// Discovery.

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

unsafe extern "C" fn getinfo(
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

unsafe extern "C" fn freeinfo(mut info: *mut sys::fi_info) {
    while !info.is_null() {
        // SAFETY: each entry came from `getinfo` as a box, and is freed once.
        let entry = unsafe { Box::from_raw(info.cast::<Entry>()) };
        entry.world.state().closed(Kind::Info);
        info = entry.info.next;
    }
}

// Opening.

unsafe extern "C" fn open_fabric(
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

unsafe extern "C" fn open_domain(
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

unsafe extern "C" fn open_eq(
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

unsafe extern "C" fn open_av(
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

unsafe extern "C" fn open_cq(
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

unsafe extern "C" fn open_ep(
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
        contexts: std::collections::BTreeSet::new(),
        outstanding: 0,
        held: Vec::new(),
        batch: None,
        connections: std::collections::HashMap::new(),
        mrs_bound: 0,
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

unsafe extern "C" fn register(
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

// Binding, enabling, closing.

unsafe extern "C" fn bind(one: *mut sys::fid, other: *mut sys::fid, _: u64) -> c_int {
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

unsafe extern "C" fn control(one: *mut sys::fid, command: c_int, _: *mut c_void) -> c_int {
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

unsafe extern "C" fn close(one: *mut sys::fid) -> c_int {
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
    fn not_in_batch(&mut self, ep: usize, call: &str) {
        if self.eps[ep].batch.is_some() {
            self.breach(format!("{call} between the first and the last post of an FI_MORE batch"));
        }
    }
}

unsafe extern "C" fn setopt(_: *mut sys::fid, _: c_int, _: c_int, _: *const c_void, _: usize) -> c_int {
    // As a libfabric that does not know the option.
    -libc::ENOPROTOOPT
}

unsafe extern "C" fn getname(ep: *mut sys::fid, name: *mut c_void, len: *mut usize) -> c_int {
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

// Addresses.

unsafe extern "C" fn av_insert(
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
    entries.push(Some(AvEntry { target, in_flight: 0 }));
    // SAFETY: the caller gives a place for the address.
    unsafe { address.write(entries.len() as u64 - 1) };
    1
}

unsafe extern "C" fn av_remove(av: *mut sys::fid_av, address: *mut u64, _: usize, _: u64) -> c_int {
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

// Completions.

unsafe extern "C" fn cq_read(cq: *mut sys::fid_cq, buffer: *mut c_void, count: usize) -> isize {
    // SAFETY: an object of ours.
    let cq = unsafe { object(cq, "fi_cq_read") };
    let _inside = cq.enter("fi_cq_read");
    let mut state = cq.world().state();
    let Some(ep) = state.eps.iter().rposition(|ep| ep.cq == Some(cq.index)) else { return EAGAIN as isize };
    state.not_in_batch(ep, "fi_cq_read");
    if state.host_is_dead(state.eps[ep].host) {
        return EAGAIN as isize;
    }
    state.on_call();
    state.on_poll(ep);
    state.match_arrivals(ep);
    let again = state.faults.poll_again;
    let batch = state.poll_batch as u64;
    if state.cqs[cq.index].entries.is_empty() || state.rng.chance(again) {
        return EAGAIN as isize;
    }
    let most = (state.rng.within(1, batch) as usize).min(count);
    let entries = &mut state.cqs[cq.index].entries;
    let good = entries.iter().take(most).take_while(|entry| entry.error.is_none()).count();
    if good == 0 {
        return -(sys::FI_EAVAIL as isize);
    }
    for (place, entry) in entries.drain(..good).enumerate() {
        let entry = sys::fi_cq_data_entry {
            op_context: entry.context as *mut c_void,
            flags: entry.flags,
            len: entry.len,
            buf: ptr::null_mut(),
            data: entry.data,
        };
        // SAFETY: the caller's array has room for `count` entries.
        unsafe { buffer.cast::<sys::fi_cq_data_entry>().add(place).write(entry) };
    }
    state.match_arrivals(ep);
    good as isize
}

unsafe extern "C" fn cq_readerr(cq: *mut sys::fid_cq, out: *mut sys::fi_cq_err_entry, _: u64) -> isize {
    // SAFETY: an object of ours.
    let cq = unsafe { object(cq, "fi_cq_readerr") };
    let _inside = cq.enter("fi_cq_readerr");
    let mut state = cq.world().state();
    state.on_call();
    let again = state.faults.readerr_again;
    if state.rng.chance(again) {
        return EAGAIN as isize;
    }
    let entries = &mut state.cqs[cq.index].entries;
    let Some((error, provider)) = entries.front().and_then(|entry| entry.error) else {
        return EAGAIN as isize;
    };
    let entry = entries.pop_front().expect("it was just looked at");
    // SAFETY: the caller's entry.
    unsafe {
        (*out).op_context = entry.context as *mut c_void;
        (*out).flags = entry.flags;
        (*out).len = entry.len;
        (*out).data = entry.data;
        (*out).err = error;
        (*out).prov_errno = provider;
    }
    1
}

unsafe extern "C" fn eq_read(eq: *mut sys::fid_eq, _: *mut u32, _: *mut c_void, _: usize, _: u64) -> isize {
    // SAFETY: an object of ours.
    unsafe { object(eq, "fi_eq_read") };
    EAGAIN as isize
}

// Posting.

/// What a post names.
struct Order {
    call: &'static str,
    what: What,
    address: u64,
    local: (usize, usize),
    descriptor: usize,
    remote: (u64, u64),
    context: usize,
    data: Option<u32>,
    flags: u64,
}

unsafe extern "C" fn writemsg(ep: *mut sys::fid_ep, msg: *const sys::fi_msg_rma, flags: u64) -> isize {
    // SAFETY: what the caller passes is as fi_writemsg wants it.
    unsafe { rma(ep, msg, flags, What::Write, "fi_writemsg") }
}

unsafe extern "C" fn readmsg(ep: *mut sys::fid_ep, msg: *const sys::fi_msg_rma, flags: u64) -> isize {
    // SAFETY: as above.
    unsafe { rma(ep, msg, flags, What::Read, "fi_readmsg") }
}

/// # Safety
/// As fi_writemsg.
unsafe fn rma(
    ep: *mut sys::fid_ep,
    msg: *const sys::fi_msg_rma,
    flags: u64,
    what: What,
    call: &'static str,
) -> isize {
    // SAFETY: the caller's promise: one local and one remote range.
    unsafe {
        let (msg, iov, remote) = (&*msg, &*(*msg).msg_iov, &*(*msg).rma_iov);
        let order = Order {
            call,
            what,
            address: msg.addr,
            local: (iov.iov_base as usize, iov.iov_len),
            descriptor: *msg.desc as usize,
            remote: (remote.addr, remote.key),
            context: msg.context as usize,
            data: (flags & sys::FI_REMOTE_CQ_DATA != 0).then_some(msg.data as u32),
            flags,
        };
        post(object(ep, call), &order)
    }
}

unsafe extern "C" fn sendmsg(ep: *mut sys::fid_ep, msg: *const sys::fi_msg, flags: u64) -> isize {
    const CALL: &str = "fi_sendmsg";
    // SAFETY: what the caller passes is as fi_sendmsg wants it: one range.
    unsafe {
        let (msg, iov) = (&*msg, &*(*msg).msg_iov);
        let order = Order {
            call: CALL,
            what: What::Send,
            address: msg.addr,
            local: (iov.iov_base as usize, iov.iov_len),
            descriptor: *msg.desc as usize,
            remote: (0, 0),
            context: msg.context as usize,
            data: (flags & sys::FI_REMOTE_CQ_DATA != 0).then_some(msg.data as u32),
            flags,
        };
        post(object(ep, CALL), &order)
    }
}

fn post(ep: &Object<sys::fid_ep>, order: &Order) -> isize {
    let _inside = ep.enter(order.call);
    let mut state = ep.world().state();
    let index = ep.index;
    let more = order.flags & sys::FI_MORE != 0;
    if state.eps[index].batch.is_some_and(|to| order.what != What::Write || to != order.address) {
        state.not_in_batch(index, order.call);
    }
    state.on_call();
    let in_batch = state.eps[index].batch.is_some();
    if let Some(status) = state.post_refused(index, order, in_batch) {
        return status;
    }
    let mr = state.check_post(index, order);
    let Some(mr) = mr else { return -(libc::EINVAL as isize) };
    let this = &state.eps[index];
    let (av, host) = (this.av.expect("enabled"), this.host);
    let target = state.address(this, order.address).and_then(|entry| entry.target);
    if state.host_is_dead(host) {
        // Nobody will ever hear of it; but the post itself works.
        return EAGAIN as isize;
    }
    let payload = (order.what == What::Send).then(|| {
        // SAFETY: the range lies in an open registration, checked above, and is the caller's to lend.
        unsafe { std::slice::from_raw_parts(order.local.0 as *const u8, order.local.1) }.to_vec()
    });
    let id = state.schedule.next_flight();
    // As efa does it: the endpoint's flags hold for operations with flags of their own, too.
    let flags = order.flags | state.eps[index].op_flags;
    let confirmed = flags & sys::FI_DELIVERY_COMPLETE != 0;
    if confirmed && order.what == What::Send {
        state.breach(
            "a message waits for a receipt, which a peer that died after its NIC took it never sends",
        );
    }
    state.flights.insert(
        id,
        Flight {
            what: order.what,
            source: index,
            address: order.address,
            target,
            context: order.context,
            local: order.local,
            mr,
            remote: order.remote,
            data: order.data,
            delivery_complete: confirmed,
            payload,
            pieces_left: 0,
            completed: false,
            landed: false,
            swallowed: false,
            fails: None,
        },
    );
    state.mrs[mr].in_flight += 1;
    state.avs[av].1[order.address as usize].as_mut().expect("checked").in_flight += 1;
    let this = &mut state.eps[index];
    this.contexts.insert(order.context);
    this.outstanding += 1;
    scribble(order.context, index);
    this.held.push(id);
    this.batch = more.then_some(order.address);
    if !more {
        for flight in std::mem::take(&mut state.eps[index].held) {
            state.launch(flight);
        }
    }
    0
}

impl State {
    /// Why a post does not go through now, by chance or for lack of room.
    fn post_refused(&mut self, ep: usize, order: &Order, in_batch: bool) -> Option<isize> {
        let this = &self.eps[ep];
        let full = this.outstanding >= this.tx_size && !self.profile.queues_in_memory;
        let target = self.address(this, order.address).and_then(|entry| entry.target);
        let waits = self.profile.connects && !self.connected(ep, target);
        // Within a batch the caller has reserved room; what it cannot foresee is left out.
        let by_chance = !in_batch && self.rng.chance(self.faults.again);
        if full || waits || by_chance {
            return Some(EAGAIN as isize);
        }
        let refused = !in_batch && self.rng.chance(self.faults.post_error);
        if refused {
            let this = &self.eps[ep];
            let target_host = target.map(|t| self.eps[t].host);
            let message = order.what == What::Send;
            let injury =
                crate::world::Injury { source_host: this.host, target_host, local: order.local, message };
            self.injuries.push(injury);
            return Some(-(libc::ENOMEM as isize));
        }
        None
    }

    /// Checks a post against the rules; gives the registration that it names.
    fn check_post(&mut self, ep: usize, order: &Order) -> Option<usize> {
        let this = &self.eps[ep];
        let mut wrong = Vec::new();
        if !this.enabled {
            wrong.push("on an endpoint that is not enabled");
        }
        if this.contexts.contains(&order.context) {
            wrong.push("with a context that is in flight");
        }
        if order.flags & sys::FI_COMPLETION == 0 {
            wrong.push("without asking for a completion");
        }
        if self.address(this, order.address).is_none() {
            wrong.push("to an address that is not in the address vector");
        }
        let mr = self.open_mr(ep, order.descriptor, order.local);
        if mr.is_none() {
            wrong.push("of memory that is not registered");
        }
        for what in &wrong {
            self.breach(format!("{} {what}", order.call));
        }
        mr.filter(|_| wrong.is_empty())
    }

    /// The registration that a descriptor stands for, if it is open, of this domain, and holds the range.
    fn open_mr(&self, ep: usize, descriptor: usize, (addr, len): (usize, usize)) -> Option<usize> {
        let index = descriptor.checked_sub(1)?;
        let mr = self.mrs.get(index)?;
        let open = self.keys.get(&(mr.domain, mr.key)) == Some(&index);
        let here = mr.domain == self.eps[ep].domain
            && (!self.profile.mr_endpoint || mr.bound == Some(ep) && mr.enabled);
        (open && here && addr >= mr.addr && addr + len <= mr.addr + mr.len).then_some(index)
    }
}

unsafe extern "C" fn recvmsg(ep: *mut sys::fid_ep, msg: *const sys::fi_msg, _: u64) -> isize {
    const CALL: &str = "fi_recvmsg";
    // SAFETY: as in `sendmsg`.
    let (ep, msg, iov) = unsafe { (object(ep, CALL), &*msg, &*(*msg).msg_iov) };
    let _inside = ep.enter(CALL);
    let mut state = ep.world().state();
    state.not_in_batch(ep.index, CALL);
    if state.setup_fails() {
        return -(libc::ENOMEM as isize);
    }
    state.on_call();
    let again = state.faults.again;
    let this = &state.eps[ep.index];
    if state.host_is_dead(this.host) || this.recvs.len() >= this.rx_size.max(4096) || state.rng.chance(again)
    {
        return EAGAIN as isize;
    }
    // SAFETY: one descriptor, as in `sendmsg`.
    let (descriptor, context) = unsafe { (*msg.desc as usize, msg.context as usize) };
    let range = (iov.iov_base as usize, iov.iov_len);
    let Some(mr) = state.open_mr(ep.index, descriptor, range) else {
        state.breach("fi_recvmsg of memory that is not registered");
        return -(libc::EINVAL as isize);
    };
    if !state.eps[ep.index].contexts.insert(context) {
        state.breach("fi_recvmsg with a context that is in flight");
        return -(libc::EINVAL as isize);
    }
    state.mrs[mr].in_flight += 1;
    scribble(context, ep.index);
    state.eps[ep.index].recvs.push_back(Recv { context, addr: range.0, len: range.1, mr });
    state.match_arrivals(ep.index);
    0
}
