//! What crosses the boundary: structures, callbacks and the table of functions. `include/nixl_libfabric.h` is this file in C.

use std::ffi::{c_char, c_void};
use std::sync::Arc;

use super::guard::Guard;
use crate::engine::{Engine, Metadata, Request};

/// An engine, behind its panic guard.
pub struct EngineHandle {
    pub(super) engine: Engine,
    pub(super) guard: Guard,
}

/// One share of a memory region's metadata.
pub struct MetadataHandle(pub(super) Arc<Metadata>);

/// One share of a transfer request.
pub struct RequestHandle(pub(super) Arc<Request>);

/// Bytes that the caller lends for the length of one call.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Bytes {
    /// First byte; may be null when `len` is 0.
    pub data: *const u8,
    /// Number of bytes.
    pub len: usize,
}

/// A key and its value.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Pair {
    /// The key.
    pub key: Bytes,
    /// Its value.
    pub value: Bytes,
}

/// What NIXL passes when it creates a backend.
#[repr(C)]
pub struct CreateParams {
    /// Name of the agent that the engine serves.
    pub local_agent: Bytes,
    /// The user's options.
    pub options: *const Pair,
    /// Number of options.
    pub options_len: usize,
    /// Whether NIXL asked for a progress thread.
    pub progress_thread: bool,
    /// Longest sleep of the progress thread between two looks, in microseconds.
    pub progress_delay_us: u64,
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
    pub vtable: *const c_void,
    /// Set for a region of this agent.
    pub is_private: bool,
    /// The region's metadata.
    pub handle: *const MetadataHandle,
}

/// One element of a transfer list, laid out as NIXL's `nixlMetaDesc`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct MetaDesc {
    /// The range.
    pub range: BasicDesc,
    /// The region that the range lies in.
    pub metadata: *const MetadataObject,
}

/// A transfer list.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct MetaDescs {
    /// First element; may be null when `len` is 0.
    pub data: *const MetaDesc,
    /// Number of elements.
    pub len: usize,
}

/// One element of a registration list, laid out as NIXL's `nixlBlobDesc`.
#[repr(C)]
pub struct BlobDesc {
    /// The range.
    pub range: BasicDesc,
    /// A C++ string, which the Rust side leaves alone.
    pub meta_info: [u64; 4],
}

/// Takes bytes, by copy. False: there was no memory for them.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct BytesSink {
    /// Passed back to `put`.
    pub context: *mut c_void,
    /// Takes the bytes; must not unwind.
    pub put: unsafe extern "C" fn(context: *mut c_void, bytes: Bytes) -> bool,
}

/// Takes pairs of bytes, one by one, by copy. False: there was no memory for them.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct PairSink {
    /// Passed back to `put`.
    pub context: *mut c_void,
    /// Takes one pair; must not unwind.
    pub put: unsafe extern "C" fn(context: *mut c_void, pair: Pair) -> bool,
}

/// Takes memory kinds (`nixl_mem_t`), one by one. False: there was no memory for it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct MemSink {
    /// Passed back to `put`.
    pub context: *mut c_void,
    /// Takes one kind; must not unwind.
    pub put: unsafe extern "C" fn(context: *mut c_void, mem: i32) -> bool,
}

/// Takes the answers to a memory query: for each range `entry`, then, when it is present, `attribute` for each attribute.
/// False: there was no memory for it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct QuerySink {
    /// Passed back to both functions.
    pub context: *mut c_void,
    /// Begins the next range's answer; must not unwind.
    pub entry: unsafe extern "C" fn(context: *mut c_void, present: bool) -> bool,
    /// Adds an attribute to the answer begun last; must not unwind.
    pub attribute: unsafe extern "C" fn(context: *mut c_void, attribute: Pair) -> bool,
}

/// Every call that the C++ side makes into Rust.
///
/// Rust hands the table over instead of exporting the functions, so that the plugin's only dynamic symbols are the two that
/// NIXL looks for. No function unwinds. Those that return a number return a `nixl_status_t`, and have written a line to the log
/// when it is an error.
///
/// Rules for the caller:
/// - Pointers are valid for the call, except for handles, which this table gave out and which were not given back yet.
/// - `destroy` is called when no other call on the engine is running.
/// - A handle that is released is gone, whatever the status.
#[repr(C)]
pub struct EngineOps {
    /// Name of the plugin, from the name of its file.
    pub plugin_name: unsafe extern "C" fn() -> *const c_char,
    /// Version of the plugin.
    pub plugin_version: unsafe extern "C" fn() -> *const c_char,
    /// Every option with its default.
    pub plugin_options: unsafe extern "C" fn(sink: PairSink),
    /// Memory kinds that an engine made on this machine would support.
    pub plugin_mems: unsafe extern "C" fn(sink: MemSink),

    /// Makes an engine; null is failure, and the log says why.
    pub create: unsafe extern "C" fn(params: *const CreateParams) -> *mut EngineHandle,
    /// Ends an engine.
    pub destroy: unsafe extern "C" fn(engine: *mut EngineHandle),
    /// Memory kinds that the engine supports.
    pub supported_mems: unsafe extern "C" fn(engine: *const EngineHandle, sink: MemSink),

    /// Registers memory.
    pub register_mem: unsafe extern "C" fn(
        engine: *const EngineHandle,
        range: BasicDesc,
        mem: i32,
        out: *mut *mut MetadataHandle,
    ) -> i32,
    /// Ends a registration; takes the handle.
    pub deregister_mem:
        unsafe extern "C" fn(engine: *const EngineHandle, metadata: *mut MetadataHandle) -> i32,
    /// Prepares what `load_remote_md` needs at another agent.
    pub public_data: unsafe extern "C" fn(
        engine: *const EngineHandle,
        metadata: *const MetadataHandle,
        sink: BytesSink,
    ) -> i32,
    /// Metadata with which the agent can be its own target.
    pub load_local_md: unsafe extern "C" fn(
        engine: *const EngineHandle,
        metadata: *const MetadataHandle,
        out: *mut *mut MetadataHandle,
    ) -> i32,
    /// Metadata of a region of another agent.
    pub load_remote_md: unsafe extern "C" fn(
        engine: *const EngineHandle,
        range: BasicDesc,
        mem: i32,
        public_data: Bytes,
        agent: Bytes,
        out: *mut *mut MetadataHandle,
    ) -> i32,
    /// Forgets loaded metadata; takes the handle.
    pub unload_md: unsafe extern "C" fn(engine: *const EngineHandle, metadata: *mut MetadataHandle) -> i32,

    /// What other agents need to reach this one.
    pub conn_info: unsafe extern "C" fn(engine: *const EngineHandle, sink: BytesSink) -> i32,
    /// Takes what another agent's `conn_info` said.
    pub load_remote_conn_info:
        unsafe extern "C" fn(engine: *const EngineHandle, agent: Bytes, info: Bytes) -> i32,
    /// Connects to an agent.
    pub connect: unsafe extern "C" fn(engine: *const EngineHandle, agent: Bytes) -> i32,
    /// Ends the connection to an agent.
    pub disconnect: unsafe extern "C" fn(engine: *const EngineHandle, agent: Bytes) -> i32,

    /// Prepares a transfer; the lists are not kept.
    pub prep_xfer: unsafe extern "C" fn(
        engine: *const EngineHandle,
        op: i32,
        local: MetaDescs,
        remote: MetaDescs,
        agent: Bytes,
        out: *mut *mut RequestHandle,
    ) -> i32,
    /// Starts a transfer; `notification` is null for none.
    pub post_xfer: unsafe extern "C" fn(
        engine: *const EngineHandle,
        request: *const RequestHandle,
        notification: *const Bytes,
    ) -> i32,
    /// How a transfer stands.
    pub check_xfer: unsafe extern "C" fn(engine: *const EngineHandle, request: *const RequestHandle) -> i32,
    /// Gives a request up, in flight or not; takes the handle.
    pub release_request:
        unsafe extern "C" fn(engine: *const EngineHandle, request: *mut RequestHandle) -> i32,
    /// Expected duration of a request and its uncertainty, in microseconds.
    pub estimate_cost: unsafe extern "C" fn(
        engine: *const EngineHandle,
        request: *const RequestHandle,
        duration_us: *mut i64,
        margin_us: *mut i64,
    ) -> i32,

    /// Takes the notifications that have arrived: pairs of sender and message.
    pub take_notifications: unsafe extern "C" fn(engine: *const EngineHandle, sink: PairSink) -> i32,
    /// Sends a notification that belongs to no transfer.
    pub send_notification:
        unsafe extern "C" fn(engine: *const EngineHandle, agent: Bytes, message: Bytes) -> i32,
    /// Says what is known of ranges of memory.
    pub query_mem: unsafe extern "C" fn(
        engine: *const EngineHandle,
        mem: i32,
        descs: *const BlobDesc,
        descs_len: usize,
        sink: QuerySink,
    ) -> i32,
}

unsafe extern "C" {
    /// The C++ side: keeps the table, which must live as long as the process, and returns NIXL's plugin structure
    /// (`nixlBackendPlugin`), which does.
    pub fn nlf_shim_plugin(ops: *const EngineOps) -> *const c_void;
}
