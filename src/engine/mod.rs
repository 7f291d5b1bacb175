//! One method for each NIXL call. Owns everything below and the order of teardown.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Result, Status};
use crate::fabric::MemoryRange;
use crate::types::{AgentName, Desc, MemKind, Op};

/// What NIXL passes when it creates a backend.
#[derive(Debug, Clone)]
pub struct InitParams {
    /// Name of the agent that this engine serves.
    pub local_agent: AgentName,
    /// The user's options (`nixl_b_params_t`).
    pub params: BTreeMap<String, String>,
    /// Whether NIXL asked for a progress thread.
    pub progress_thread: bool,
    /// Longest sleep of the progress thread between two looks, as NIXL asks for it (0: as short as possible).
    pub progress_delay: Duration,
}

/// Metadata handle that NIXL holds for a local or a remote memory region.
#[derive(Debug)]
pub enum Metadata {
    /// A region registered here.
    Local,
    /// A region of a peer.
    Remote,
}

/// One element of a transfer: a range and the region it lies in.
#[derive(Debug, Clone, Copy)]
pub struct XferDesc<'a> {
    /// The range.
    pub desc: Desc,
    /// The region's metadata.
    pub metadata: &'a Arc<Metadata>,
}

/// A notification's sender and message.
pub type Notification = (AgentName, Vec<u8>);

/// A transfer request: prepared once, posted any number of times.
#[derive(Debug)]
pub struct Request;

/// The backend engine of one agent.
#[derive(Debug)]
pub struct Engine;

#[allow(clippy::unused_self, clippy::needless_pass_by_value, missing_docs)]
impl Engine {
    pub fn create(init: InitParams) -> Result<Self> {
        let _ = init;
        Err(todo())
    }

    /// Memory kinds that can be registered, at least one.
    pub fn supported_mems(&self) -> Vec<MemKind> {
        vec![MemKind::Dram]
    }

    /// Registers a range; zero length is refused.
    pub fn register_mem(&self, range: MemoryRange, dev_id: u64, kind: MemKind) -> Result<Arc<Metadata>> {
        let _ = (range, dev_id, kind);
        Err(todo())
    }

    pub fn deregister_mem(&self, metadata: Arc<Metadata>) -> Result<()> {
        let _ = metadata;
        Err(todo())
    }

    pub fn connect(&self, agent: &AgentName) -> Result<()> {
        let _ = agent;
        Err(todo())
    }

    pub fn disconnect(&self, agent: &AgentName) -> Result<()> {
        let _ = agent;
        Err(todo())
    }

    pub fn public_data(&self, metadata: &Metadata) -> Result<Vec<u8>> {
        let _ = metadata;
        Err(todo())
    }

    pub fn conn_info(&self) -> Result<Vec<u8>> {
        Err(todo())
    }

    pub fn load_remote_conn_info(&self, agent: &AgentName, info: &[u8]) -> Result<()> {
        let _ = (agent, info);
        Err(todo())
    }

    pub fn load_remote_md(
        &self,
        desc: Desc,
        kind: MemKind,
        public_data: &[u8],
        agent: &AgentName,
    ) -> Result<Arc<Metadata>> {
        let _ = (desc, kind, public_data, agent);
        Err(todo())
    }

    /// Metadata with which the agent can be its own target.
    pub fn load_local_md(&self, metadata: &Arc<Metadata>) -> Result<Arc<Metadata>> {
        Ok(Arc::clone(metadata))
    }

    pub fn unload_md(&self, metadata: Arc<Metadata>) -> Result<()> {
        drop(metadata);
        Ok(())
    }

    /// `local` and `remote` are walked in step; they have equal counts.
    pub fn prep_xfer<'a>(
        &self,
        op: Op,
        local: impl ExactSizeIterator<Item = XferDesc<'a>> + Clone,
        remote: impl ExactSizeIterator<Item = XferDesc<'a>> + Clone,
        agent: &AgentName,
    ) -> Result<Arc<Request>> {
        let _ = (op, local, remote, agent);
        Err(todo())
    }

    /// `Status::Success` or `Status::InProgress`.
    pub fn post_xfer(&self, request: &Arc<Request>, notification: Option<&[u8]>) -> Result<Status> {
        let _ = (request, notification);
        Err(todo())
    }

    pub fn check_xfer(&self, request: &Arc<Request>) -> Result<Status> {
        let _ = request;
        Err(todo())
    }

    pub fn release_request(&self, request: Arc<Request>) -> Result<()> {
        drop(request);
        Ok(())
    }

    /// Takes everything that has arrived.
    pub fn take_notifications(&self) -> Result<Vec<Notification>> {
        Err(todo())
    }

    pub fn send_notification(&self, agent: &AgentName, message: &[u8]) -> Result<()> {
        let _ = (agent, message);
        Err(todo())
    }

    /// For each range: its attributes, or `None` if it is not memory that this backend can use.
    pub fn query_mem(
        &self,
        kind: MemKind,
        descs: &mut dyn Iterator<Item = Desc>,
    ) -> Result<Vec<Option<BTreeMap<String, String>>>> {
        let _ = (kind, descs);
        Err(todo())
    }

    /// Expected duration of a prepared request and its uncertainty.
    pub fn estimate_cost(&self, request: &Request) -> Result<(Duration, Duration)> {
        let _ = request;
        Err(todo())
    }
}

fn todo() -> Error {
    Error::not_supported("not built yet")
}
