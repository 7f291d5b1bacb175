//! The functions of the table: each turns C into Rust, calls one method of the engine, and turns the answer back.
//!
//! All of them rely on the rules of [`EngineOps`], which the shim keeps and NIXL's core keeps for it; "by the table's rules" in
//! a SAFETY comment means those.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

use super::guard::Guard;
use super::types::{
    BasicDesc, BlobDesc, Bytes, BytesSink, CreateParams, EngineHandle, EngineOps, MemSink, MetaDesc,
    MetaDescs, MetadataHandle, Pair, PairSink, QuerySink, RequestHandle,
};
use super::{available_mems, guard};
use crate::engine::{Engine, InitParams, XferDesc};
use crate::error::{Error, Result, Status};
use crate::fabric::MemoryRange;
use crate::types::{AgentName, Desc, MemKind, Op};

/// The table that the shim gets.
pub static OPS: EngineOps = EngineOps {
    plugin_name: super::plugin_name,
    plugin_version: super::plugin_version,
    plugin_options,
    plugin_mems,
    create,
    destroy,
    supported_mems,
    register_mem,
    deregister_mem,
    public_data,
    load_local_md,
    load_remote_md,
    unload_md,
    conn_info,
    load_remote_conn_info,
    connect,
    disconnect,
    prep_xfer,
    post_xfer,
    check_xfer,
    release_request,
    estimate_cost,
    take_notifications,
    send_notification,
    query_mem,
};

/// NIXL calls from any thread, and gives handles back on another thread than the one that got them.
const _: () = {
    const fn crosses_threads<T: Send + Sync>() {}
    crosses_threads::<EngineHandle>();
    crosses_threads::<MetadataHandle>();
    crosses_threads::<RequestHandle>();
};

impl Bytes {
    fn lend(bytes: &[u8]) -> Self {
        Self { data: bytes.as_ptr(), len: bytes.len() }
    }

    /// # Safety
    /// The bytes stay valid and unchanged for `'a`.
    unsafe fn borrow<'a>(self) -> &'a [u8] {
        // SAFETY: passed on to the caller.
        unsafe { slice(self.data, self.len) }
    }

    /// # Safety
    /// The bytes are valid now.
    unsafe fn to_agent(self) -> AgentName {
        // SAFETY: the bytes are copied before this returns.
        unsafe { self.borrow() }.into()
    }
}

/// The elements of a C++ vector, whose pointer may be null when it is empty.
///
/// # Safety
/// `data` points to `len` elements that stay valid and unchanged for `'a`, or `len` is 0.
unsafe fn slice<'a, T>(data: *const T, len: usize) -> &'a [T] {
    if len == 0 {
        return &[];
    }
    // SAFETY: by the caller's word; a vector's elements are aligned, and its size in bytes is below isize::MAX.
    unsafe { std::slice::from_raw_parts(data, len) }
}

impl From<BasicDesc> for Desc {
    fn from(range: BasicDesc) -> Self {
        Self { addr: range.addr, len: range.len, dev_id: range.dev_id }
    }
}

fn mem_kind(value: i32) -> Result<MemKind> {
    MemKind::try_from(value).map_err(|other| Error::invalid(format!("there is no memory kind {other}")))
}

/// What a sink's refusal becomes.
fn taken(accepted: bool) -> Result<()> {
    if accepted { Ok(()) } else { Err(Error::backend("no memory left to hand the answer to NIXL")) }
}

impl BytesSink {
    fn put(&self, bytes: &[u8]) -> Result<()> {
        // SAFETY: function and context come from the shim as a pair, and it copies the bytes before it returns.
        taken(unsafe { (self.put)(self.context, Bytes::lend(bytes)) })
    }
}

impl PairSink {
    fn put(&self, key: &[u8], value: &[u8]) -> Result<()> {
        put_pair(self.put, self.context, key, value)
    }
}

type PutPair = unsafe extern "C" fn(*mut c_void, Pair) -> bool;

fn put_pair(put: PutPair, context: *mut c_void, key: &[u8], value: &[u8]) -> Result<()> {
    // SAFETY: function and context come from the shim as a pair, and it copies the bytes before it returns.
    taken(unsafe { put(context, Pair { key: Bytes::lend(key), value: Bytes::lend(value) }) })
}

impl MemSink {
    fn put_all(&self, kinds: &[MemKind]) -> Result<()> {
        for &kind in kinds {
            // SAFETY: function and context come from the shim as a pair.
            taken(unsafe { (self.put)(self.context, kind as i32) })?;
        }
        Ok(())
    }
}

impl QuerySink {
    fn put(&self, answer: Option<&BTreeMap<String, String>>) -> Result<()> {
        // SAFETY: function and context come from the shim as a pair.
        taken(unsafe { (self.entry)(self.context, answer.is_some()) })?;
        for (key, value) in answer.into_iter().flatten() {
            put_pair(self.attribute, self.context, key.as_bytes(), value.as_bytes())?;
        }
        Ok(())
    }
}

/// Runs one call on an engine behind its guard.
///
/// # Safety
/// `engine` is null or a live engine.
unsafe fn on_engine(
    engine: *const EngineHandle,
    call: &str,
    body: impl FnOnce(&Engine) -> Result<Status>,
) -> i32 {
    // SAFETY: by the caller's word; `destroy` has it to itself, so shared access is all there is now.
    let Some(handle) = (unsafe { engine.as_ref() }) else {
        return Status::InvalidParam.code();
    };
    handle.guard.run(call, || body(&handle.engine)).unwrap_or_else(|status| status).code()
}

/// A handle that NIXL lent, or an error for null.
///
/// # Safety
/// `handle` is null or a live handle.
unsafe fn lent<'a, T>(handle: *const T, what: &str) -> Result<&'a T> {
    // SAFETY: by the caller's word; handles are never changed, only read and released.
    unsafe { handle.as_ref() }.ok_or_else(|| Error::invalid(format!("NIXL passed no {what}")))
}

/// Takes a handle back.
///
/// # Safety
/// `handle` is null, or came from [`give`] and was not taken back yet.
unsafe fn take<T>(handle: *mut T) -> Option<T> {
    if handle.is_null() {
        return None;
    }
    // SAFETY: `give` made it from a box, and by the caller's word nobody has taken it since.
    Some(*unsafe { Box::from_raw(handle) })
}

/// Hands a handle out.
///
/// # Safety
/// `out` is valid for a write.
unsafe fn give<T>(out: *mut *mut T, handle: T) {
    // SAFETY: by the caller's word.
    unsafe { out.write(Box::into_raw(Box::new(handle))) };
}

unsafe extern "C" fn plugin_options(sink: PairSink) {
    outside_engine("get_backend_options", || {
        crate::config::defaults()
            .iter()
            .try_for_each(|(key, value)| sink.put(key.as_bytes(), value.as_bytes()))
    });
}

unsafe extern "C" fn plugin_mems(sink: MemSink) {
    outside_engine("get_backend_mems", || sink.put_all(&available_mems()));
}

/// Runs a call that belongs to no engine; it has no way to fail but in the log.
fn outside_engine(call: &str, body: impl FnOnce() -> Result<()>) {
    match guard::catch(body) {
        Ok(Ok(())) => {}
        Ok(Err(error)) => log::error!("{call}: {error}"),
        Err(message) => log::error!("{call}: the plugin panicked ({message}); report it"),
    }
}

unsafe extern "C" fn create(params: *const CreateParams) -> *mut EngineHandle {
    // SAFETY: by the table's rules.
    let Some(params) = (unsafe { params.as_ref() }) else {
        return std::ptr::null_mut();
    };
    // SAFETY: by the table's rules.
    let guard = Guard::new(unsafe { params.local_agent.to_agent() });
    // SAFETY: by the table's rules.
    let created = guard.run("createBackend", || Engine::create(unsafe { init_params(params) }?));
    match created {
        Ok(engine) => Box::into_raw(Box::new(EngineHandle { engine, guard })),
        Err(_) => std::ptr::null_mut(),
    }
}

/// # Safety
/// Everything that `params` points to is valid.
unsafe fn init_params(params: &CreateParams) -> Result<InitParams> {
    let mut options = BTreeMap::new();
    // SAFETY: by the caller's word.
    for pair in unsafe { slice(params.options, params.options_len) } {
        // SAFETY: by the caller's word.
        let (key, value) = unsafe { (pair.key.borrow(), pair.value.borrow()) };
        let text = |bytes: &[u8]| {
            String::from_utf8(bytes.to_vec())
                .map_err(|_| Error::invalid(format!("option `{}` is not UTF-8 text", key.escape_ascii())))
        };
        options.insert(text(key)?, text(value)?);
    }
    Ok(InitParams {
        // SAFETY: by the caller's word.
        local_agent: unsafe { params.local_agent.to_agent() },
        params: options,
        progress_thread: params.progress_thread,
        progress_delay: Duration::from_micros(params.progress_delay_us),
    })
}

unsafe extern "C" fn destroy(engine: *mut EngineHandle) {
    // SAFETY: by the table's rules nobody else uses it any more.
    if let Some(EngineHandle { engine, guard }) = unsafe { take(engine) } {
        guard.discard("destroy_engine", engine);
    }
}

unsafe extern "C" fn supported_mems(engine: *const EngineHandle, sink: MemSink) {
    // SAFETY: by the table's rules. An error has been logged, and this call cannot return one.
    let _ = unsafe {
        on_engine(engine, "getSupportedMems", |engine| {
            sink.put_all(&engine.supported_mems())?;
            Ok(Status::Success)
        })
    };
}

unsafe extern "C" fn register_mem(
    engine: *const EngineHandle,
    range: BasicDesc,
    mem: i32,
    out: *mut *mut MetadataHandle,
) -> i32 {
    // SAFETY: by the table's rules.
    unsafe {
        on_engine(engine, "registerMem", |engine| {
            let kind = mem_kind(mem)?;
            if range.addr.checked_add(range.len).is_none() {
                return Err(Error::invalid(format!(
                    "range {:#x} + {} ends beyond the address space",
                    range.addr, range.len
                )));
            }
            // SAFETY: NIXL's contract for registerMem: the range is the user's memory and stays allocated until
            // deregisterMem, and remote agents and devices may access it until then, which is what it is registered for.
            let memory = MemoryRange::assume_registered(range.addr, range.len);
            let metadata = engine.register_mem(memory, range.dev_id, kind)?;
            give(out, MetadataHandle(metadata));
            Ok(Status::Success)
        })
    }
}

unsafe extern "C" fn deregister_mem(engine: *const EngineHandle, metadata: *mut MetadataHandle) -> i32 {
    // SAFETY: by the table's rules.
    unsafe { release_metadata(engine, metadata, "deregisterMem", Engine::deregister_mem) }
}

unsafe extern "C" fn unload_md(engine: *const EngineHandle, metadata: *mut MetadataHandle) -> i32 {
    // SAFETY: by the table's rules.
    unsafe { release_metadata(engine, metadata, "unloadMD", Engine::unload_md) }
}

/// # Safety
/// As for [`on_engine`] and [`take`].
unsafe fn release_metadata(
    engine: *const EngineHandle,
    metadata: *mut MetadataHandle,
    call: &str,
    release: impl FnOnce(&Engine, Arc<crate::engine::Metadata>) -> Result<()>,
) -> i32 {
    // SAFETY: by the caller's word. It is taken before anything can fail: NIXL forgets it whatever the status.
    let metadata = unsafe { take(metadata) };
    // SAFETY: by the caller's word.
    unsafe {
        on_engine(engine, call, |engine| {
            let MetadataHandle(metadata) =
                metadata.ok_or_else(|| Error::invalid("NIXL passed no memory metadata"))?;
            release(engine, metadata)?;
            Ok(Status::Success)
        })
    }
}

unsafe extern "C" fn public_data(
    engine: *const EngineHandle,
    metadata: *const MetadataHandle,
    sink: BytesSink,
) -> i32 {
    // SAFETY: by the table's rules.
    unsafe {
        on_engine(engine, "getPublicData", |engine| {
            sink.put(&engine.public_data(&lent(metadata, "memory metadata")?.0)?)?;
            Ok(Status::Success)
        })
    }
}

unsafe extern "C" fn load_local_md(
    engine: *const EngineHandle,
    metadata: *const MetadataHandle,
    out: *mut *mut MetadataHandle,
) -> i32 {
    // SAFETY: by the table's rules.
    unsafe {
        on_engine(engine, "loadLocalMD", |engine| {
            let loaded = engine.load_local_md(&lent(metadata, "memory metadata")?.0)?;
            give(out, MetadataHandle(loaded));
            Ok(Status::Success)
        })
    }
}

unsafe extern "C" fn load_remote_md(
    engine: *const EngineHandle,
    range: BasicDesc,
    mem: i32,
    public_data: Bytes,
    agent: Bytes,
    out: *mut *mut MetadataHandle,
) -> i32 {
    // SAFETY: by the table's rules.
    unsafe {
        on_engine(engine, "loadRemoteMD", |engine| {
            let kind = mem_kind(mem)?;
            let loaded =
                engine.load_remote_md(range.into(), kind, public_data.borrow(), &agent.to_agent())?;
            give(out, MetadataHandle(loaded));
            Ok(Status::Success)
        })
    }
}

unsafe extern "C" fn conn_info(engine: *const EngineHandle, sink: BytesSink) -> i32 {
    // SAFETY: by the table's rules.
    unsafe {
        on_engine(engine, "getConnInfo", |engine| {
            sink.put(&engine.conn_info()?)?;
            Ok(Status::Success)
        })
    }
}

unsafe extern "C" fn load_remote_conn_info(engine: *const EngineHandle, agent: Bytes, info: Bytes) -> i32 {
    // SAFETY: by the table's rules.
    unsafe {
        on_engine(engine, "loadRemoteConnInfo", |engine| {
            engine.load_remote_conn_info(&agent.to_agent(), info.borrow())?;
            Ok(Status::Success)
        })
    }
}

unsafe extern "C" fn connect(engine: *const EngineHandle, agent: Bytes) -> i32 {
    // SAFETY: by the table's rules.
    unsafe {
        on_engine(engine, "connect", |engine| {
            engine.connect(&agent.to_agent())?;
            Ok(Status::Success)
        })
    }
}

unsafe extern "C" fn disconnect(engine: *const EngineHandle, agent: Bytes) -> i32 {
    // SAFETY: by the table's rules.
    unsafe {
        on_engine(engine, "disconnect", |engine| {
            engine.disconnect(&agent.to_agent())?;
            Ok(Status::Success)
        })
    }
}

/// A transfer list, checked so that it can be walked without errors.
///
/// # Safety
/// By the table's rules for `'a`: the list is valid, and so is the metadata of each element.
unsafe fn checked_list<'a>(list: MetaDescs, side: &str) -> Result<&'a [MetaDesc]> {
    // SAFETY: by the caller's word.
    let elements = unsafe { slice(list.data, list.len) };
    // SAFETY: by the caller's word.
    let lacks_metadata = |element: &MetaDesc| {
        unsafe { element.metadata.as_ref() }.is_none_or(|object| object.handle.is_null())
    };
    match elements.iter().position(lacks_metadata) {
        Some(index) => Err(Error::invalid(format!(
            "{side} descriptor {index} has no memory metadata; is its memory registered with this backend?"
        ))),
        None => Ok(elements),
    }
}

/// # Safety
/// `elements` came from [`checked_list`], and still holds.
unsafe fn walk<'a>(elements: &'a [MetaDesc]) -> impl ExactSizeIterator<Item = XferDesc<'a>> + Clone {
    elements.iter().map(|element| XferDesc {
        desc: element.range.into(),
        // SAFETY: `checked_list` saw that neither pointer is null, and they are valid by the caller's word.
        metadata: unsafe { &(*(*element.metadata).handle).0 },
    })
}

unsafe extern "C" fn prep_xfer(
    engine: *const EngineHandle,
    op: i32,
    local: MetaDescs,
    remote: MetaDescs,
    agent: Bytes,
    out: *mut *mut RequestHandle,
) -> i32 {
    // SAFETY: by the table's rules.
    unsafe {
        on_engine(engine, "prepXfer", |engine| {
            let op =
                Op::try_from(op).map_err(|other| Error::invalid(format!("there is no operation {other}")))?;
            let local = checked_list(local, "local")?;
            let remote = checked_list(remote, "remote")?;
            if local.len() != remote.len() {
                return Err(Error::invalid(format!(
                    "{} local descriptors for {} remote ones",
                    local.len(),
                    remote.len()
                )));
            }
            let request = engine.prep_xfer(op, walk(local), walk(remote), &agent.to_agent())?;
            give(out, RequestHandle(request));
            Ok(Status::Success)
        })
    }
}

unsafe extern "C" fn post_xfer(
    engine: *const EngineHandle,
    request: *const RequestHandle,
    notification: *const Bytes,
) -> i32 {
    // SAFETY: by the table's rules.
    unsafe {
        on_engine(engine, "postXfer", |engine| {
            let message = notification.as_ref().map(|bytes| bytes.borrow());
            engine.post_xfer(&lent(request, "request")?.0, message)
        })
    }
}

unsafe extern "C" fn check_xfer(engine: *const EngineHandle, request: *const RequestHandle) -> i32 {
    // SAFETY: by the table's rules.
    unsafe { on_engine(engine, "checkXfer", |engine| engine.check_xfer(&lent(request, "request")?.0)) }
}

unsafe extern "C" fn release_request(engine: *const EngineHandle, request: *mut RequestHandle) -> i32 {
    // SAFETY: by the table's rules.
    let Some(RequestHandle(request)) = (unsafe { take(request) }) else {
        return Status::InvalidParam.code();
    };
    // SAFETY: by the table's rules.
    let _ = unsafe {
        on_engine(engine, "releaseReqH", move |engine| {
            engine.release_request(request)?;
            Ok(Status::Success)
        })
    };
    // The handle is gone, and an error would make NIXL come back with it. What went wrong is in the log.
    Status::Success.code()
}

unsafe extern "C" fn estimate_cost(
    engine: *const EngineHandle,
    request: *const RequestHandle,
    duration_us: *mut i64,
    margin_us: *mut i64,
) -> i32 {
    let micros = |time: Duration| i64::try_from(time.as_micros()).unwrap_or(i64::MAX);
    // SAFETY: by the table's rules.
    unsafe {
        on_engine(engine, "estimateXferCost", |engine| {
            let (duration, margin) = engine.estimate_cost(&lent(request, "request")?.0)?;
            duration_us.write(micros(duration));
            margin_us.write(micros(margin));
            Ok(Status::Success)
        })
    }
}

unsafe extern "C" fn take_notifications(engine: *const EngineHandle, sink: PairSink) -> i32 {
    // SAFETY: by the table's rules.
    unsafe {
        on_engine(engine, "getNotifs", |engine| {
            for (agent, message) in engine.take_notifications()? {
                sink.put(agent.as_bytes(), &message)?;
            }
            Ok(Status::Success)
        })
    }
}

unsafe extern "C" fn send_notification(engine: *const EngineHandle, agent: Bytes, message: Bytes) -> i32 {
    // SAFETY: by the table's rules.
    unsafe {
        on_engine(engine, "genNotif", |engine| {
            engine.send_notification(&agent.to_agent(), message.borrow())?;
            Ok(Status::Success)
        })
    }
}

unsafe extern "C" fn query_mem(
    engine: *const EngineHandle,
    mem: i32,
    descs: *const BlobDesc,
    descs_len: usize,
    sink: QuerySink,
) -> i32 {
    // SAFETY: by the table's rules.
    unsafe {
        on_engine(engine, "queryMem", |engine| {
            let kind = mem_kind(mem)?;
            let mut ranges = slice(descs, descs_len).iter().map(|desc| Desc::from(desc.range));
            for answer in engine.query_mem(kind, &mut ranges)? {
                sink.put(answer.as_ref())?;
            }
            Ok(Status::Success)
        })
    }
}
