//! Tables of functions, as libfabric's objects have them.

use std::ffi::{c_int, c_void};
use std::ptr;

use nixl_libfabric::sys::libfabric as sys;

use super::addresses::{av_insert, av_remove, getname};
use super::lifetime::{bind, close, control, getopt, setopt};
use super::open::{open_av, open_cq, open_domain, open_ep, open_eq, register};
use super::posting::{cq_read, cq_readerr, eq_read, readmsg, recvmsg, sendmsg, writemsg};
use crate::world::Kind;

/// Raw pointers to nothing but functions and null.
pub(super) struct Table<T>(T);

// SAFETY: the tables are never written.
unsafe impl<T> Sync for Table<T> {}

pub(super) const NONE: *const c_void = ptr::null();

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
pub(super) static FABRIC: Table<sys::fi_ops_fabric> = Table(sys::fi_ops_fabric {
    size: size_of::<sys::fi_ops_fabric>(),
    domain: Some(open_domain),
    passive_ep: NONE,
    eq_open: Some(open_eq),
    wait_open: NONE,
    trywait: None,
    domain2: NONE,
});
pub(super) static DOMAIN: Table<sys::fi_ops_domain> = Table(sys::fi_ops_domain {
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
pub(super) static MR: Table<sys::fi_ops_mr> = Table(sys::fi_ops_mr {
    size: size_of::<sys::fi_ops_mr>(),
    reg: NONE,
    regv: NONE,
    regattr: Some(register),
});
pub(super) static AV: Table<sys::fi_ops_av> = Table(sys::fi_ops_av {
    size: size_of::<sys::fi_ops_av>(),
    insert: Some(av_insert),
    insertsvc: NONE,
    insertsym: NONE,
    remove: Some(av_remove),
    lookup: NONE,
    straddr: NONE,
    av_set: NONE,
});
pub(super) static CQ: Table<sys::fi_ops_cq> = Table(sys::fi_ops_cq {
    size: size_of::<sys::fi_ops_cq>(),
    read: Some(cq_read),
    readfrom: NONE,
    readerr: Some(cq_readerr),
    sread: NONE,
    sreadfrom: NONE,
    signal: NONE,
    strerror: None,
});
pub(super) static EQ: Table<sys::fi_ops_eq> = Table(sys::fi_ops_eq {
    size: size_of::<sys::fi_ops_eq>(),
    read: Some(eq_read),
    readerr: None,
    write: NONE,
    sread: NONE,
    strerror: None,
});
pub(super) static EP: Table<sys::fi_ops_ep> = Table(sys::fi_ops_ep {
    size: size_of::<sys::fi_ops_ep>(),
    cancel: None,
    getopt: Some(getopt),
    setopt: Some(setopt),
    tx_ctx: NONE,
    rx_ctx: NONE,
    rx_size_left: NONE,
    tx_size_left: NONE,
});
pub(super) static CM: Table<sys::fi_ops_cm> = Table(sys::fi_ops_cm {
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
pub(super) static MSG: Table<sys::fi_ops_msg> = Table(sys::fi_ops_msg {
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
pub(super) static RMA: Table<sys::fi_ops_rma> = Table(sys::fi_ops_rma {
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

pub(super) fn table<T>(of: &'static Table<T>) -> *mut T {
    (&raw const of.0).cast_mut()
}

pub(super) fn fid(kind: Kind) -> sys::fid {
    sys::fid { fclass: kind as usize, context: ptr::null_mut(), ops: table(&CLOSE) }
}
