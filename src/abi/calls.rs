//! The functions of the table: each turns C into Rust, calls one method of the engine, and turns the answer back.

use std::collections::BTreeMap;
use std::ffi::{c_char, c_void};
use std::sync::Arc;
use std::time::Duration;

use super::guard::{self, Guard};
use super::layout;
use super::name;
use super::types::{
    BasicDesc, BlobDesc, Bytes, BytesSink, CreateParams, EngineHandle, EngineLayout, EngineOps, MemSink,
    MetaDesc, MetadataHandle, PairSink, QuerySink, RequestHandle, Slice,
};
use crate::engine::{Engine, InitParams, Metadata, Request, XferElement, available_mems};
use crate::error::{Error, Result, Status};
use crate::fabric::MemoryRange;
use crate::sys::panic::{Poison, catch};
use crate::types::{AgentName, Desc, MemKind, Op};

/// The table that the shim gets.
pub static OPS: EngineOps = EngineOps {
    plugin_name,
    plugin_version,
    plugin_options,
    plugin_mems,
    layout,
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

impl EngineHandle {
    /// Runs a call of NIXL's that answers with a status; `NIXL_SUCCESS` unless `body` says otherwise.
    fn status<T: Into<Outcome>>(&self, call: &str, body: impl FnOnce(&Engine) -> Result<T>) -> i32 {
        match self.guard.run(call, || body(&self.engine)) {
            Ok(outcome) => outcome.into().0.code(),
            Err(status) => status.code(),
        }
    }
}

/// How a call ended that did not fail.
struct Outcome(Status);

impl From<()> for Outcome {
    fn from((): ()) -> Self {
        Self(Status::Success)
    }
}

impl From<Status> for Outcome {
    fn from(status: Status) -> Self {
        Self(status)
    }
}

impl From<BasicDesc> for Desc {
    fn from(range: BasicDesc) -> Self {
        Self { addr: range.addr, len: range.len, dev_id: range.dev_id }
    }
}

fn agent_name(bytes: Bytes) -> AgentName {
    bytes.get().into()
}

fn mem_kind(value: i32) -> Result<MemKind> {
    MemKind::try_from(value).map_err(|other| Error::invalid(format!("there is no memory kind {other}")))
}

fn metadata_of(handle: Option<&MetadataHandle>) -> Result<&Arc<Metadata>> {
    handle.map(|handle| &handle.0).ok_or_else(|| Error::invalid("NIXL passed no memory metadata"))
}

fn request_of(handle: Option<&RequestHandle>) -> Result<&Request> {
    handle.map(|handle| &handle.0).ok_or_else(|| Error::invalid("NIXL passed no request"))
}

fn taken_back<T>(handle: Option<Box<T>>) -> Result<T> {
    handle.map(|handle| *handle).ok_or_else(|| Error::invalid("NIXL gave back nothing"))
}

extern "C" fn plugin_name() -> *const c_char {
    catch(name::plugin_name).unwrap_or(name::DEFAULT).as_ptr()
}

extern "C" fn plugin_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

extern "C" fn plugin_options(sink: PairSink) {
    without_engine("get_backend_options", || {
        let options = crate::config::defaults();
        options.iter().try_for_each(|(key, value)| sink.put(key.as_bytes(), value.as_bytes()))
    });
}

extern "C" fn plugin_mems(sink: MemSink) {
    without_engine("get_backend_mems", || available_mems().iter().try_for_each(|&mem| sink.put(mem as i32)));
}

/// Runs a call that belongs to no engine and has no status: its failure is only a line in the log.
fn without_engine(call: &str, body: impl FnOnce() -> Result<()>) {
    match catch(body) {
        Ok(Ok(())) => {}
        Ok(Err(error)) => log::error!(target: guard::LOG, "{call}: {error}"),
        Err(message) => log::error!(target: guard::LOG, "{call}: the plugin panicked ({message}); report it"),
    }
}

/// # Safety
/// As for [`layout::of_process`].
unsafe extern "C" fn layout(core: *const c_void, init: *const c_void, out: &mut EngineLayout) -> bool {
    // SAFETY: the caller's word.
    let found = catch(|| unsafe { layout::of_process(core, init) });
    let why = match found {
        Ok(Ok(layout)) => {
            *out = layout;
            return true;
        }
        Ok(Err(error)) => error.to_string(),
        Err(message) => format!("the plugin panicked ({message}); report it"),
    };
    log::error!(target: guard::LOG, "cannot create the backend: {why}");
    false
}

extern "C" fn create(params: &CreateParams) -> Option<Box<EngineHandle>> {
    let poison = Arc::<Poison>::default();
    let guard = Guard::new(agent_name(params.local_agent), Arc::clone(&poison));
    let engine = guard
        .run_or_error("cannot create the backend", || Engine::create(init_params(params, poison)?))
        .ok()?;
    Some(Box::new(EngineHandle { engine, guard }))
}

fn init_params(params: &CreateParams, poison: Arc<Poison>) -> Result<InitParams> {
    let text = |bytes: Bytes| {
        let bytes = bytes.get();
        String::from_utf8(bytes.to_vec())
            .map_err(|_| Error::invalid(format!("option text \"{}\" is not UTF-8", bytes.escape_ascii())))
    };
    let options = params.options.get().iter();
    Ok(InitParams {
        local_agent: agent_name(params.local_agent),
        params: options.map(|pair| Ok((text(pair.key)?, text(pair.value)?))).collect::<Result<_>>()?,
        progress_thread: params.progress_thread,
        progress_delay: Duration::from_micros(params.progress_delay_us),
        poison,
    })
}

extern "C" fn destroy(engine: Option<Box<EngineHandle>>) {
    if let Some(engine) = engine {
        let EngineHandle { engine, guard } = *engine;
        guard.discard("destroy_engine", engine);
    }
}

extern "C" fn supported_mems(engine: &EngineHandle, sink: MemSink) {
    // NIXL takes no status here; the error is in the log.
    let _ = engine.status("getSupportedMems", |engine| {
        engine.supported_mems().iter().try_for_each(|&mem| sink.put(mem as i32))
    });
}

/// # Safety
/// The range stays allocated, and open to devices, until its registration has ended.
unsafe extern "C" fn register_mem(
    engine: &EngineHandle,
    range: BasicDesc,
    mem: i32,
    out: &mut Option<Box<MetadataHandle>>,
) -> i32 {
    engine.status("registerMem", |engine| {
        let kind = mem_kind(mem)?;
        if range.addr.checked_add(range.len).is_none() {
            let BasicDesc { addr, len, .. } = range;
            return Err(Error::invalid(format!("{len} bytes from {addr:#x} end beyond the address space")));
        }
        // SAFETY: the caller's word, which is NIXL's contract with its user: the memory is the user's and stays allocated
        // until deregisterMem, and that remote agents reach it meanwhile is what it is registered for.
        let memory = unsafe { MemoryRange::assume_registered(range.addr, range.len) };
        *out = Some(Box::new(MetadataHandle(engine.register_mem(memory, range.dev_id, kind)?)));
        Ok(())
    })
}

extern "C" fn deregister_mem(engine: &EngineHandle, metadata: Option<Box<MetadataHandle>>) -> i32 {
    // NIXL forgets the handle whatever the status, so it ends here in any case.
    engine.status("deregisterMem", move |engine| engine.deregister_mem(&taken_back(metadata)?.0))
}

extern "C" fn public_data(engine: &EngineHandle, metadata: Option<&MetadataHandle>, sink: BytesSink) -> i32 {
    engine.status("getPublicData", |engine| sink.put(&engine.public_data(metadata_of(metadata)?)?))
}

extern "C" fn load_local_md(
    engine: &EngineHandle,
    metadata: Option<&MetadataHandle>,
    out: &mut Option<Box<MetadataHandle>>,
) -> i32 {
    engine.status("loadLocalMD", |engine| {
        *out = Some(Box::new(MetadataHandle(engine.load_local_md(metadata_of(metadata)?)?)));
        Ok(())
    })
}

extern "C" fn load_remote_md(
    engine: &EngineHandle,
    range: BasicDesc,
    mem: i32,
    public_data: Bytes,
    agent: Bytes,
    out: &mut Option<Box<MetadataHandle>>,
) -> i32 {
    engine.status("loadRemoteMD", |engine| {
        let kind = mem_kind(mem)?;
        let loaded = engine.load_remote_md(range.into(), kind, public_data.get(), &agent_name(agent))?;
        *out = Some(Box::new(MetadataHandle(loaded)));
        Ok(())
    })
}

extern "C" fn unload_md(engine: &EngineHandle, metadata: Option<Box<MetadataHandle>>) -> i32 {
    engine.status("unloadMD", move |engine| engine.unload_md(taken_back(metadata)?.0))
}

extern "C" fn conn_info(engine: &EngineHandle, sink: BytesSink) -> i32 {
    engine.status("getConnInfo", |engine| sink.put(&engine.conn_info()?))
}

extern "C" fn load_remote_conn_info(engine: &EngineHandle, agent: Bytes, info: Bytes) -> i32 {
    engine.status("loadRemoteConnInfo", |engine| engine.load_remote_conn_info(&agent_name(agent), info.get()))
}

extern "C" fn connect(engine: &EngineHandle, agent: Bytes) -> i32 {
    engine.status("connect", |engine| engine.connect(&agent_name(agent)))
}

extern "C" fn disconnect(engine: &EngineHandle, agent: Bytes) -> i32 {
    engine.status("disconnect", |engine| engine.disconnect(&agent_name(agent)))
}

impl<'a> XferElement<'a> for MetaDesc<'a> {
    fn desc(&self) -> Desc {
        self.range.into()
    }

    fn metadata(&self) -> Option<&'a Arc<Metadata>> {
        self.metadata?.handle.as_deref().map(|handle| &handle.0)
    }

    fn region(&self) -> usize {
        self.metadata.map_or(0, |object| std::ptr::from_ref(object).addr())
    }
}

extern "C" fn prep_xfer(
    engine: &EngineHandle,
    op: i32,
    local: Slice<MetaDesc>,
    remote: Slice<MetaDesc>,
    agent: Bytes,
    out: &mut Option<Box<RequestHandle>>,
) -> i32 {
    engine.status("prepXfer", |engine| {
        let op = Op::try_from(op).map_err(|op| Error::invalid(format!("there is no operation {op}")))?;
        let request = engine.prep_xfer(op, local.get(), remote.get(), &agent_name(agent))?;
        *out = Some(Box::new(RequestHandle(request)));
        Ok(())
    })
}

extern "C" fn post_xfer(
    engine: &EngineHandle,
    request: Option<&RequestHandle>,
    notification: Option<&Bytes>,
) -> i32 {
    engine.status("postXfer", |engine| {
        engine.post_xfer(request_of(request)?, notification.map(|message| message.get()))
    })
}

extern "C" fn check_xfer(engine: &EngineHandle, request: Option<&RequestHandle>) -> i32 {
    engine.status("checkXfer", |engine| engine.check_xfer(request_of(request)?))
}

extern "C" fn release_request(engine: &EngineHandle, request: Option<Box<RequestHandle>>) -> i32 {
    let _ = engine.status("releaseReqH", move |engine| engine.release_request(taken_back(request)?.0));
    // The handle is gone and what went wrong is in the log: an error would make NIXL come back with the handle.
    Status::Success.code()
}

extern "C" fn estimate_cost(
    engine: &EngineHandle,
    request: Option<&RequestHandle>,
    duration_us: &mut i64,
    margin_us: &mut i64,
) -> i32 {
    let micros = |time: Duration| i64::try_from(time.as_micros()).unwrap_or(i64::MAX);
    engine.status("estimateXferCost", |engine| {
        let (duration, margin) = engine.estimate_cost(request_of(request)?)?;
        *duration_us = micros(duration);
        *margin_us = micros(margin);
        Ok(())
    })
}

extern "C" fn take_notifications(engine: &EngineHandle, sink: PairSink) -> i32 {
    engine.status("getNotifs", |engine| {
        let arrived = engine.take_notifications()?;
        arrived.iter().try_for_each(|(agent, message)| sink.put(agent.as_bytes(), message))
    })
}

extern "C" fn send_notification(engine: &EngineHandle, agent: Bytes, message: Bytes) -> i32 {
    engine.status("genNotif", |engine| engine.send_notification(&agent_name(agent), message.get()))
}

extern "C" fn query_mem(engine: &EngineHandle, mem: i32, descs: Slice<BlobDesc>, sink: QuerySink) -> i32 {
    engine.status("queryMem", |engine| {
        let kind = mem_kind(mem)?;
        let answers = engine.query_mem(kind, &mut descs.get().iter().map(|desc| desc.range.into()))?;
        answers.iter().try_for_each(|answer| put_answer(&sink, answer.as_ref()))
    })
}

fn put_answer(sink: &QuerySink, answer: Option<&BTreeMap<String, String>>) -> Result<()> {
    sink.begin(answer.is_some())?;
    let mut attributes = answer.into_iter().flatten();
    attributes.try_for_each(|(key, value)| sink.attributes.put(key.as_bytes(), value.as_bytes()))
}
