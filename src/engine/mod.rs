//! One method for each NIXL call. Owns everything below and the order of teardown.
#![forbid(unsafe_code)]

mod discover;
mod events;
mod mail;
mod metrics;
mod open;
mod own;
mod placement;
mod remote;
mod shared;
mod staging;
mod vram;
mod works;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

pub use self::discover::available_mems;
pub(crate) use self::discover::{find as find_devices, is_software};
use self::own::Own;
use self::remote::{Preparation, Remote, is_nearby};
use self::staging::StagedPiece;
pub use self::staging::StagedTransfer;
use self::works::Works;
use crate::error::{Error, Result, Status};
use crate::fabric::{Libfabric, MemoryRange};
use crate::memory::{Memory, Registration, RemoteRegion};
use crate::metrics::Endpoint;
use crate::neighbour::Copiers;
pub use crate::notify::Notification;
use crate::progress::ProgressThreads;
use crate::sys::panic::Poison;
use crate::types::{AgentName, Desc, MemKind, Op};
use crate::wire::{ConnectionInfo, PublicMetadata};

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
    /// Marks the engine when a thread of its own panics, as the caller marks it when a call does.
    pub poison: Arc<Poison>,
}

/// Metadata handle that NIXL holds for a local or a remote memory region.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "it stands in an `Arc` from the beginning")]
pub enum Metadata {
    /// A region registered here.
    Local(Arc<Registration>),
    /// A region of a peer.
    Remote(RemoteRegion),
}

/// One element of a transfer: a range and the region it lies in.
#[derive(Debug, Clone, Copy)]
pub struct XferDesc<'a> {
    /// The range.
    pub desc: Desc,
    /// The region's metadata.
    pub metadata: &'a Arc<Metadata>,
}

/// What a list of a transfer is made of: [`XferDesc`], or whatever a caller has that tells the same. Lists are long, so
/// nothing of them is copied.
pub trait XferElement<'a> {
    /// The range.
    fn desc(&self) -> Desc;
    /// The region's metadata; without it the transfer is refused.
    fn metadata(&self) -> Option<&'a Arc<Metadata>>;
    /// Something that is equal for elements with the same metadata.
    fn region(&self) -> usize;
}

impl<'a> XferElement<'a> for XferDesc<'a> {
    fn desc(&self) -> Desc {
        self.desc
    }

    fn metadata(&self) -> Option<&'a Arc<Metadata>> {
        Some(self.metadata)
    }

    fn region(&self) -> usize {
        std::ptr::from_ref(self.metadata).addr()
    }
}

/// A transfer request: prepared once, posted any number of times.
pub enum Request {
    /// With a remote agent.
    Remote(RemoteTransfer),
    /// With a remote agent, GPU memory by way of host memory.
    Staged(Arc<StagedTransfer>),
    /// Within this agent.
    Own(OwnTransfer),
}

/// A request to a peer whose memory is reached by its NICs, or without them.
pub struct RemoteTransfer(Arc<Remote>);

/// A request to this agent itself.
pub struct OwnTransfer(Arc<Own>);

/// The backend engine of one agent.
pub struct Engine {
    works: Arc<Works>,
    progress: Option<ProgressThreads>,
    metrics: Option<Endpoint>,
    registered: Mutex<HashMap<RangeKey, Weak<Registration>>>,
}

/// Address, length, kind and device of a registered range.
type RangeKey = (u64, u64, MemKind, u64);

#[allow(clippy::unused_self, reason = "one method for each NIXL call")]
impl Engine {
    /// Opens the rails and starts the progress threads.
    pub fn create(init: InitParams) -> Result<Self> {
        Self::open(init, None)
    }

    /// As [`create`](Self::create), on a libfabric that the caller has: tests bring a simulated one.
    pub fn create_on(library: Libfabric, init: InitParams) -> Result<Self> {
        Self::open(init, Some(library))
    }

    fn open(init: InitParams, library: Option<Libfabric>) -> Result<Self> {
        let (works, progress, metrics) = open::open(init, library)?;
        Ok(Self { works, progress, metrics, registered: Mutex::default() })
    }

    /// Memory kinds that can be registered, at least one.
    pub fn supported_mems(&self) -> Vec<MemKind> {
        self.works.shared.vram.mems()
    }

    /// Registers a range; zero length is refused.
    pub fn register_mem(&self, range: MemoryRange, dev_id: u64, kind: MemKind) -> Result<Arc<Metadata>> {
        if range.is_empty() {
            return Err(Error::invalid(format!(
                "a range of length 0 at {:#x} cannot be registered",
                range.addr()
            )));
        }
        if range.addr().checked_add(range.len()).is_none() {
            return Err(Error::invalid(format!(
                "the range {:#x}+{} wraps around",
                range.addr(),
                range.len()
            )));
        }
        // The core wants one metadata for one range, so a range that is registered again shares its registration.
        let mut registered = self.lock_registered();
        let key = (range.addr(), range.len(), kind, dev_id);
        if let Some(known) = registered.get(&key).and_then(Weak::upgrade)
            && known.add_holder()
        {
            return Ok(Arc::new(Metadata::Local(known)));
        }
        let turn = self.works.shared.turn() as u64;
        let mut registration = match kind {
            MemKind::Dram => {
                let rails = self.works.shared.placement.rails_for_host(range, turn);
                Registration::new(self.rails(), rails, Memory::host(range, dev_id), None)?
            }
            MemKind::Vram => {
                self.works.shared.vram.register(self.rails(), &self.works.shared.placement, range, dev_id)?
            }
            other => return Err(Error::not_supported(format!("{other} memory is not for this backend"))),
        };
        log::debug!("registered {registration} on {} rails", registration.rails().len());
        if let Some(board) = &self.works.shared.local.board {
            registration.publish(board);
        }
        let registration = Arc::new(registration);
        if registration.is_staged() {
            self.works.staging.add_region(&registration, &self.works.shared)?;
        }
        registered.retain(|_, known| known.strong_count() > 0);
        registered.insert(key, Arc::downgrade(&registration));
        Ok(Arc::new(Metadata::Local(registration)))
    }

    /// Ends a registration. Waits for transfers in flight that use it, `drain_timeout_ms` at most.
    pub fn deregister_mem(&self, metadata: &Arc<Metadata>) -> Result<()> {
        let registration = local(metadata)?;
        if !registration.drop_holder() {
            return Ok(());
        }
        let deadline = Instant::now() + self.works.shared.config.drain_timeout;
        let mut copiers = registration.withdraw();
        let mut left = || copiers.as_mut().is_none_or(Copiers::have_left);
        while registration.uses() > 0 || !left() {
            if Instant::now() > deadline {
                self.works.shared.counts.as_ref().inspect(|counts| counts.undrained());
                return Err(Error::new(
                    Status::NotAllowed,
                    format!(
                        "{registration} is still used by {} transfers in flight, and by {} peers of this host that copy, \
                         after {} ms (drain_timeout_ms); do not free the memory before they are over",
                        registration.uses(),
                        copiers.map_or(0, |copiers| copiers.count()),
                        self.works.shared.config.drain_timeout.as_millis()
                    ),
                ));
            }
            if self.works.drive_all() == 0 {
                std::thread::sleep(Duration::from_micros(20));
            }
        }
        registration.close();
        Ok(())
    }

    /// Begins the handshake with a peer. It does not wait: transfers and notifications do, without blocking.
    pub fn connect(&self, agent: &AgentName) -> Result<()> {
        if self.is_self(agent) {
            return Ok(());
        }
        self.peer(agent)?.connect()?;
        self.works.shared.kick();
        Ok(())
    }

    /// Removes a peer. What waits for it fails; what is in flight ends by itself.
    pub fn disconnect(&self, agent: &AgentName) -> Result<()> {
        if self.is_self(agent) {
            return Ok(());
        }
        let released = self.works.shared.peers.remove(agent);
        let released =
            released.ok_or_else(|| Error::not_found(format!("there is no peer {agent} to disconnect")))?;
        self.release(released);
        Ok(())
    }

    /// What a peer needs to reach a registered region.
    pub fn public_data(&self, metadata: &Metadata) -> Result<Vec<u8>> {
        Ok(local(metadata)?.public_metadata().encode())
    }

    /// What a peer needs to reach this agent.
    pub fn conn_info(&self) -> Result<Vec<u8>> {
        Ok(self.works.shared.local.conn_info.clone())
    }

    /// Takes in a peer's connection info and says hello.
    pub fn load_remote_conn_info(&self, agent: &AgentName, info: &[u8]) -> Result<()> {
        if self.is_self(agent) {
            return Ok(());
        }
        let info = ConnectionInfo::decode(info)
            .map_err(|e| e.context(format_args!("connection info of {agent}")))?;
        let (peer, released) = self.works.shared.peers.load(agent, info, true, &self.works.shared.local)?;
        self.release(released);
        // Tried here and not by the first transfer: it takes some 100 us.
        peer.neighbour();
        peer.connect()?;
        self.works.shared.kick();
        Ok(())
    }

    /// Takes in what a peer said of one of its regions.
    pub fn load_remote_md(
        &self,
        desc: Desc,
        kind: MemKind,
        public_data: &[u8],
        agent: &AgentName,
    ) -> Result<Arc<Metadata>> {
        let peer = self.peer(agent)?;
        let metadata = PublicMetadata::decode(public_data, peer.endpoint_count())
            .map_err(|e| e.context(format_args!("metadata of a region of {agent}")))?;
        let (id, stages) = (peer.id(), peer.stages_vram());
        let region = RemoteRegion::new(desc, kind, agent.clone(), id, stages, metadata);
        if region.is_staged() {
            self.works.staging.meet(&peer, &self.works.shared);
        }
        Ok(Arc::new(Metadata::Remote(region)))
    }

    /// Metadata with which the agent can be its own target.
    pub fn load_local_md(&self, metadata: &Arc<Metadata>) -> Result<Arc<Metadata>> {
        local(metadata)?;
        Ok(Arc::clone(metadata))
    }

    /// Lets go of a region's metadata.
    pub fn unload_md(&self, metadata: Arc<Metadata>) -> Result<()> {
        drop(metadata);
        Ok(())
    }

    /// Resolves a transfer down to its operations. `local` and `remote` are walked in step.
    pub fn prep_xfer<'a>(
        &self,
        op: Op,
        local: &[impl XferElement<'a>],
        remote: &[impl XferElement<'a>],
        agent: &AgentName,
    ) -> Result<Request> {
        if local.len() != remote.len() {
            return Err(Error::invalid(format!(
                "{} local descriptors and {} remote ones; a transfer needs as many of both",
                local.len(),
                remote.len()
            )));
        }
        if self.is_self(agent) {
            return Ok(Request::Own(OwnTransfer(Arc::new(Own::prepare(op, local, remote)?))));
        }
        let peer = self.peer(agent)?;
        let nearby = is_nearby(&self.works.shared, &peer, local, remote);
        let mut preparation = Preparation::new(&self.works.shared, &peer, local.len(), nearby);
        preparation.add(local, remote)?;
        if preparation.is_staged {
            return prep_staged(op, peer, local, remote);
        }
        let transfer = preparation.finish(op, local, remote)?;
        Ok(Request::Remote(RemoteTransfer(Arc::new(Remote { transfer, peer, is_chunk: false }))))
    }

    /// Posts a request: `Status::Success` or `Status::InProgress`.
    pub fn post_xfer(&self, request: &Request, notification: Option<&[u8]>) -> Result<Status> {
        let notification = notification.map(<[u8]>::to_vec);
        match request {
            Request::Own(OwnTransfer(own)) => {
                own.post(notification, &self.works.shared)?;
                self.works.shared.wake();
                own.status(&self.works.shared)
            }
            Request::Staged(transfer) => {
                transfer.begin(notification)?;
                self.works.staging.post(Arc::clone(transfer), &self.works.shared);
                self.works.shared.kick();
                self.works.drive_copies();
                self.works.shared.wake();
                transfer.status()
            }
            Request::Remote(RemoteTransfer(remote)) => {
                remote.post(notification, &self.works.shared)?;
                self.status(remote)
            }
        }
    }

    /// How a posted request stands. Drives what it uses, so that it gets on without a progress thread too.
    pub fn check_xfer(&self, request: &Request) -> Result<Status> {
        match request {
            Request::Own(OwnTransfer(own)) => {
                if own.status(&self.works.shared) == Ok(Status::InProgress) {
                    self.works.shared.drive_copies();
                }
                own.status(&self.works.shared)
            }
            Request::Staged(transfer) => {
                if transfer.status() == Ok(Status::InProgress) {
                    self.works.drive_all();
                    if self.progress.is_none() {
                        self.works.tick_if_due();
                    }
                }
                transfer.status()
            }
            Request::Remote(RemoteTransfer(remote)) => {
                let status = self.status(remote);
                if status != Ok(Status::InProgress) {
                    return status;
                }
                if remote.transfer.is_copied() {
                    self.works.shared.drive_copies();
                }
                self.works.shared.drive_some(remote.transfer.rails());
                if self.progress.is_none() {
                    self.works.tick_if_due();
                }
                self.status(remote)
            }
        }
    }

    fn status(&self, remote: &Remote) -> Result<Status> {
        let mut events = Vec::new();
        let status = remote.status(&self.works.shared, &mut events);
        self.works.shared.act(events);
        status
    }

    fn release(&self, released: crate::peer::Released) {
        let mut events = Vec::new();
        self.works.shared.release(released, &mut events);
        self.works.shared.act(events);
    }

    /// Lets go of a request. In flight, it ends by itself.
    pub fn release_request(&self, request: Request) -> Result<()> {
        match request {
            Request::Own(OwnTransfer(own)) => own.transfer.release(&mut Vec::new()),
            Request::Staged(transfer) => transfer.release(),
            Request::Remote(RemoteTransfer(remote)) => {
                let mut events = Vec::new();
                remote.transfer.release(&mut events);
                self.works.shared.act(events);
            }
        }
        Ok(())
    }

    /// Takes everything that has arrived.
    pub fn take_notifications(&self) -> Result<Vec<Notification>> {
        let waiting = self.works.shared.inbox.take();
        if self.progress.is_none() {
            self.works.drive_all();
            self.works.tick_if_due();
        } else if waiting.is_empty() {
            self.works.shared.drive_some(std::iter::empty());
        }
        if waiting.is_empty() { Ok(self.works.shared.inbox.take()) } else { Ok(waiting) }
    }

    /// Sends a notification that belongs to no transfer. It does not wait for the peer.
    pub fn send_notification(&self, agent: &AgentName, message: &[u8]) -> Result<()> {
        if self.is_self(agent) {
            self.works.shared.inbox.push(agent.clone(), message.to_vec());
            return Ok(());
        }
        let released = self.peer(agent)?.notify(message.to_vec())?;
        self.release(released);
        self.works.shared.kick();
        Ok(())
    }

    /// For each range: its attributes, or `None` if no NIC of this backend can move it.
    pub fn query_mem(
        &self,
        kind: MemKind,
        descs: &mut dyn Iterator<Item = Desc>,
    ) -> Result<Vec<Option<BTreeMap<String, String>>>> {
        let placement = &self.works.shared.placement;
        let describe = |desc: Desc| match kind {
            MemKind::Dram => placement.describe_host(&desc),
            MemKind::Vram => self.works.shared.vram.describe(placement, &desc),
            _ => None,
        };
        Ok(descs.map(describe).collect())
    }

    /// Expected duration of a prepared request and its uncertainty, from transfers that were made.
    pub fn estimate_cost(&self, request: &Request) -> Result<(Duration, Duration)> {
        let (rates, bytes) = match request {
            Request::Staged(transfer) => (&self.works.shared.remote_rates, transfer.bytes()),
            Request::Remote(RemoteTransfer(remote)) => {
                (&self.works.shared.remote_rates, remote.transfer.bytes())
            }
            Request::Own(OwnTransfer(own)) => (&self.works.shared.local_rates, own.transfer.bytes()),
        };
        rates.estimate(bytes).ok_or_else(|| {
            Error::not_supported(
                "no transfer of this kind and size was measured yet, so none can be estimated",
            )
        })
    }

    fn lock_registered(&self) -> MutexGuard<'_, HashMap<RangeKey, Weak<Registration>>> {
        self.registered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rails(&self) -> &[Arc<crate::rail::Rail>] {
        &self.works.shared.local.rails
    }

    fn is_self(&self, agent: &AgentName) -> bool {
        *agent == self.works.shared.local.name
    }

    fn peer(&self, agent: &AgentName) -> Result<Arc<crate::peer::Peer>> {
        self.works.shared.peers.get(agent).ok_or_else(|| {
            Error::not_found(format!("there is no peer {agent}; load its metadata first (add_remote_agent)"))
        })
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.works.drain();
        drop(self.metrics.take());
        // Threads first: nothing may drive a rail that is being closed.
        drop(self.progress.take());
        self.works.close();
    }
}

/// A transfer that goes by way of host memory, of descriptors that were checked.
fn prep_staged<'a>(
    op: Op,
    peer: Arc<crate::peer::Peer>,
    local_descs: &[impl XferElement<'a>],
    remote_descs: &[impl XferElement<'a>],
) -> Result<Request> {
    let mut pieces: Vec<StagedPiece> = Vec::new();
    for (here, there) in local_descs.iter().zip(remote_descs).filter(|(here, _)| here.desc().len > 0) {
        let piece = StagedPiece {
            local: Arc::clone(local(metadata(here)?)?),
            local_addr: here.desc().addr,
            remote: Arc::clone(metadata(there)?),
            remote_addr: there.desc().addr,
            len: here.desc().len,
        };
        match pieces.last_mut() {
            Some(last) if last.goes_on_with(&piece) => last.len += piece.len,
            _ => pieces.push(piece),
        }
    }
    Ok(Request::Staged(Arc::new(StagedTransfer::new(op, peer, pieces))))
}

fn metadata<'a>(element: &impl XferElement<'a>) -> Result<&'a Arc<Metadata>> {
    element.metadata().ok_or_else(|| {
        let Desc { addr, len, .. } = element.desc();
        Error::invalid(format!("NIXL passed no metadata with the descriptor {addr:#x}+{len}"))
    })
}

fn local(metadata: &Metadata) -> Result<&Arc<Registration>> {
    match metadata {
        Metadata::Local(registration) => Ok(registration),
        Metadata::Remote(region) => Err(Error::invalid(format!("{region} is not memory of this agent"))),
    }
}
