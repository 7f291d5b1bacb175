//! What crosses the boundary: structures, callbacks and the table of functions. `include/nixl_libfabric.h` is this file in C.
//!
//! References, boxes and slices appear here as themselves, so that the functions behind the table need almost no unsafe code.
//! What makes that true is kept by C++: see the rules of [`EngineOps`].

use std::ffi::{c_char, c_void};
use std::marker::PhantomData;
use std::sync::Arc;

use super::guard::Guard;
use crate::engine::{Engine, Metadata, Request};
use crate::error::{Error, Result};

/// An engine, behind its panic guard.
pub struct EngineHandle {
    pub(super) engine: Engine,
    pub(super) guard: Guard,
}

/// One share of a memory region's metadata.
pub struct MetadataHandle(pub(super) Arc<Metadata>);

/// One share of a transfer request.
pub struct RequestHandle(pub(super) Request);

/// Elements that the caller lends for the length of one call.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Slice<'a, T> {
    /// First element; may be null when `len` is 0.
    data: *const T,
    /// Number of elements.
    len: usize,
    lent: PhantomData<&'a [T]>,
}

/// Bytes of any kind, also those of text.
pub type Bytes<'a> = Slice<'a, u8>;

/// A key and its value, or a sender and its message.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Pair<'a> {
    /// The key.
    pub key: Bytes<'a>,
    /// Its value.
    pub value: Bytes<'a>,
}

/// What NIXL passes when it creates a backend.
#[repr(C)]
pub struct CreateParams<'a> {
    /// Name of the agent that the engine serves.
    pub local_agent: Bytes<'a>,
    /// The user's options.
    pub options: Slice<'a, Pair<'a>>,
    /// Whether NIXL asked for a progress thread.
    pub progress_thread: bool,
    /// Longest sleep of the progress thread between two looks, in microseconds.
    pub progress_delay_us: u64,
}

/// Virtual functions of an engine in `nixl_backend_abi.h`.
pub const FUNCTIONS: usize = 27;
/// Most virtual functions that an engine can have.
pub const SLOTS_MAX: usize = 64;

/// What stands in each slot of an engine's virtual table.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineLayout {
    /// Number of slots; 0: those of `nixl_backend_abi.h`.
    len: usize,
    /// For each slot the place of our function in `nixl_backend_abi.h`; -1: a function that returns false; -2: one that returns
    /// "not supported"; -3: one that returns nothing.
    slots: [i8; SLOTS_MAX],
}

impl Default for EngineLayout {
    fn default() -> Self {
        Self { len: 0, slots: [0; SLOTS_MAX] }
    }
}

impl EngineLayout {
    /// The layout with these slots; none where they are too many.
    pub fn new(slots: &[i8]) -> Option<Self> {
        let mut layout = Self::default();
        if !slots.iter().copied().eq(0..FUNCTIONS as i8) {
            layout.len = slots.len();
            layout.slots.get_mut(..slots.len())?.copy_from_slice(slots);
        }
        Some(layout)
    }

    /// The slots; none where they are those of `nixl_backend_abi.h`.
    pub fn slots(&self) -> &[i8] {
        &self.slots[..self.len]
    }
}

/// A range of memory, laid out as NIXL's `nixlBasicDesc`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct BasicDesc {
    /// First byte.
    pub addr: u64,
    /// Length in bytes.
    pub len: u64,
    /// Device number.
    pub dev_id: u64,
}

/// The object that NIXL holds for a memory region: its base `nixlBackendMD`, then ours.
#[repr(C)]
pub struct MetadataObject {
    /// The C++ virtual table.
    vtable: *const c_void,
    /// Set for a region of this agent.
    is_private: bool,
    /// The region's metadata.
    pub handle: Option<Box<MetadataHandle>>,
}

/// One element of a transfer list, laid out as NIXL's `nixlMetaDesc`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct MetaDesc<'a> {
    /// The range.
    pub range: BasicDesc,
    /// The region that the range lies in.
    pub metadata: Option<&'a MetadataObject>,
}

/// One element of a registration list, laid out as NIXL's `nixlBlobDesc`.
#[repr(C)]
pub struct BlobDesc {
    /// The range.
    pub range: BasicDesc,
    /// A C++ string, which the Rust side leaves alone.
    meta_info: [u64; 4],
}

/// Takes bytes, by copy.
#[repr(C)]
pub struct BytesSink {
    /// Passed back to `put`.
    context: *mut c_void,
    /// Takes the bytes. False: there was no memory for them. Must not unwind.
    put: unsafe extern "C" fn(context: *mut c_void, bytes: Bytes) -> bool,
}

/// Takes pairs, one by one, by copy.
#[repr(C)]
pub struct PairSink {
    /// Passed back to `put`.
    context: *mut c_void,
    /// Takes one pair. False: there was no memory for it. Must not unwind.
    put: unsafe extern "C" fn(context: *mut c_void, pair: Pair) -> bool,
}

/// Takes memory kinds (`nixl_mem_t`), one by one.
#[repr(C)]
pub struct MemSink {
    /// Passed back to `put`.
    context: *mut c_void,
    /// Takes one kind. False: there was no memory for it. Must not unwind.
    put: unsafe extern "C" fn(context: *mut c_void, mem: i32) -> bool,
}

/// Takes the answers to a memory query, one by one: whether the range is known, then its attributes.
#[repr(C)]
pub struct QuerySink {
    /// Passed back to `begin`.
    context: *mut c_void,
    /// Begins the next range's answer. False: there was no memory for it. Must not unwind.
    begin: unsafe extern "C" fn(context: *mut c_void, known: bool) -> bool,
    /// Takes the attributes of the answer begun last.
    pub attributes: PairSink,
}

/// Every call that the C++ side makes into Rust.
///
/// Rust hands the table over instead of exporting the functions, so that the plugin's only dynamic symbols are the two that
/// NIXL looks for. No function unwinds. Those that return a number return a `nixl_status_t`, and have written a line to the log
/// when it is an error.
///
/// Rules for the C++ side, which NIXL's core keeps where the shim cannot:
/// - What a call gets is valid, and unchanged by others, until it returns.
/// - Handles come from this table. A call that takes one by a pointer to non-const ends it, whatever the status.
/// - `destroy` is called when no other call on the engine is running, and is the last.
/// - Memory that was registered stays allocated until it was deregistered, and devices may access it until then.
#[repr(C)]
pub struct EngineOps {
    /// Name of the plugin, from the name of its file.
    pub plugin_name: extern "C" fn() -> *const c_char,
    /// Version of the plugin.
    pub plugin_version: extern "C" fn() -> *const c_char,
    /// Every option with its default.
    pub plugin_options: extern "C" fn(sink: PairSink),
    /// Memory kinds that an engine made on this machine would support.
    pub plugin_mems: extern "C" fn(sink: MemSink),

    /// Says how the core that calls from `core` wants an engine; false: it must not get one, and the log says why.
    pub layout:
        unsafe extern "C" fn(core: *const c_void, init: *const c_void, out: &mut EngineLayout) -> bool,
    /// Makes an engine; null is failure, and the log says why.
    pub create: extern "C" fn(params: &CreateParams) -> Option<Box<EngineHandle>>,
    /// Ends an engine.
    pub destroy: extern "C" fn(engine: Option<Box<EngineHandle>>),
    /// Memory kinds that the engine supports.
    pub supported_mems: extern "C" fn(engine: &EngineHandle, sink: MemSink),

    /// Registers memory.
    pub register_mem: unsafe extern "C" fn(
        engine: &EngineHandle,
        range: BasicDesc,
        mem: i32,
        out: &mut Option<Box<MetadataHandle>>,
    ) -> i32,
    /// Ends a registration.
    pub deregister_mem: extern "C" fn(engine: &EngineHandle, metadata: Option<Box<MetadataHandle>>) -> i32,
    /// Says what `load_remote_md` needs at another agent.
    pub public_data:
        extern "C" fn(engine: &EngineHandle, metadata: Option<&MetadataHandle>, sink: BytesSink) -> i32,
    /// Metadata with which the agent can be its own target.
    pub load_local_md: extern "C" fn(
        engine: &EngineHandle,
        metadata: Option<&MetadataHandle>,
        out: &mut Option<Box<MetadataHandle>>,
    ) -> i32,
    /// Metadata of a region of another agent.
    pub load_remote_md: extern "C" fn(
        engine: &EngineHandle,
        range: BasicDesc,
        mem: i32,
        public_data: Bytes,
        agent: Bytes,
        out: &mut Option<Box<MetadataHandle>>,
    ) -> i32,
    /// Forgets loaded metadata.
    pub unload_md: extern "C" fn(engine: &EngineHandle, metadata: Option<Box<MetadataHandle>>) -> i32,

    /// Says what other agents need to reach this one.
    pub conn_info: extern "C" fn(engine: &EngineHandle, sink: BytesSink) -> i32,
    /// Takes what another agent's `conn_info` said.
    pub load_remote_conn_info: extern "C" fn(engine: &EngineHandle, agent: Bytes, info: Bytes) -> i32,
    /// Connects to an agent.
    pub connect: extern "C" fn(engine: &EngineHandle, agent: Bytes) -> i32,
    /// Ends the connection to an agent.
    pub disconnect: extern "C" fn(engine: &EngineHandle, agent: Bytes) -> i32,

    /// Prepares a transfer; the lists are not kept.
    pub prep_xfer: extern "C" fn(
        engine: &EngineHandle,
        op: i32,
        local: Slice<MetaDesc>,
        remote: Slice<MetaDesc>,
        agent: Bytes,
        out: &mut Option<Box<RequestHandle>>,
    ) -> i32,
    /// Starts a transfer; `notification` is null for none.
    pub post_xfer: extern "C" fn(
        engine: &EngineHandle,
        request: Option<&RequestHandle>,
        notification: Option<&Bytes>,
    ) -> i32,
    /// Says how a transfer stands.
    pub check_xfer: extern "C" fn(engine: &EngineHandle, request: Option<&RequestHandle>) -> i32,
    /// Gives a request up, in flight or not.
    pub release_request: extern "C" fn(engine: &EngineHandle, request: Option<Box<RequestHandle>>) -> i32,
    /// Expected duration of a request and its uncertainty, in microseconds.
    pub estimate_cost: extern "C" fn(
        engine: &EngineHandle,
        request: Option<&RequestHandle>,
        duration_us: &mut i64,
        margin_us: &mut i64,
    ) -> i32,

    /// Takes the notifications that have arrived: sender and message.
    pub take_notifications: extern "C" fn(engine: &EngineHandle, sink: PairSink) -> i32,
    /// Sends a notification that belongs to no transfer.
    pub send_notification: extern "C" fn(engine: &EngineHandle, agent: Bytes, message: Bytes) -> i32,
    /// Says what is known of ranges of memory.
    pub query_mem:
        extern "C" fn(engine: &EngineHandle, mem: i32, descs: Slice<BlobDesc>, sink: QuerySink) -> i32,
}

unsafe extern "C" {
    /// The C++ side: keeps the table, which must live as long as the process, and returns NIXL's plugin structure
    /// (`nixlBackendPlugin`), which does.
    pub fn nlf_shim_plugin(ops: *const EngineOps) -> *const c_void;
}

impl<'a, T> Slice<'a, T> {
    /// The elements.
    pub fn get(self) -> &'a [T] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: a slice is only made below, from a Rust slice, and by C++ from a vector or a string, by the rules of
        // `EngineOps`: `len` aligned elements that stay valid and unchanged for the call, whose length `'a` is.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }
    }
}

impl<'a, T> From<&'a [T]> for Slice<'a, T> {
    fn from(elements: &'a [T]) -> Self {
        Self { data: elements.as_ptr(), len: elements.len(), lent: PhantomData }
    }
}

/// What a sink's answer means.
fn taken(accepted: bool) -> Result<()> {
    if accepted { Ok(()) } else { Err(Error::backend("no memory left to hand the answer to NIXL")) }
}

impl BytesSink {
    /// Hands bytes over.
    pub fn put(&self, bytes: &[u8]) -> Result<()> {
        // SAFETY: C++ made function and context as a pair that is valid for the call; the bytes are copied.
        taken(unsafe { (self.put)(self.context, bytes.into()) })
    }
}

impl PairSink {
    /// Hands one pair over.
    pub fn put(&self, key: &[u8], value: &[u8]) -> Result<()> {
        // SAFETY: C++ made function and context as a pair that is valid for the call; the bytes are copied.
        taken(unsafe { (self.put)(self.context, Pair { key: key.into(), value: value.into() }) })
    }
}

impl MemSink {
    /// Hands one memory kind over.
    pub fn put(&self, mem: i32) -> Result<()> {
        // SAFETY: C++ made function and context as a pair that is valid for the call.
        taken(unsafe { (self.put)(self.context, mem) })
    }
}

impl QuerySink {
    /// Begins the answer for the next range.
    pub fn begin(&self, known: bool) -> Result<()> {
        // SAFETY: C++ made function and context as a pair that is valid for the call.
        taken(unsafe { (self.begin)(self.context, known) })
    }
}
