//! Registrations of local memory and descriptions of remote memory.
#![forbid(unsafe_code)]

mod uses;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use self::uses::Uses;
use crate::cuda::{Context, Cuda, Lent, Span};
use crate::error::{Error, Result};
use crate::fabric::{Dmabuf, Hmem, MemoryRange, MemoryRegion, next_key};
use crate::neighbour::{Board, Copiers, GpuRegion, Neighbour, NeighbourRegion, Published};
use crate::rail::Rail;
use crate::types::{AgentName, Desc, MemKind, PeerId, RailId};
use crate::wire::{PublicMetadata, Shareable};

/// Ranges at least this long are registered on several rails at once: pinning takes about 0.1 ms for each MiB.
const PARALLEL_REGISTRATION_BYTES_MIN: u64 = 64 << 20;

/// Key of memory that no rail reaches. It opens nothing: a stock peer's access is refused. Without any key that peer would
/// divide by zero.
const STAGED_KEY: u64 = u64::MAX - 1;

/// Begins a use of each; where one was deregistered, of none, and tells which.
pub fn begin_uses<'a>(
    registrations: impl Iterator<Item = &'a Arc<Registration>> + Clone,
) -> std::result::Result<(), &'a Arc<Registration>> {
    // Used first, looked at second: a deregistration does it the other way round, so one sees the other.
    registrations.clone().for_each(|registration| registration.begin_use());
    let gone = registrations.clone().find(|registration| registration.is_retired());
    gone.map_or(Ok(()), |gone| {
        registrations.for_each(|registration| registration.end_use());
        Err(gone)
    })
}

/// Something that keeps regions of registrations: a prepared request.
pub trait RegionUser: Send + Sync {
    /// Lets go of them for good: one of their ranges is deregistered.
    fn forget_regions(&self);
}

/// Memory to be registered: where it is and what it is.
#[derive(Debug, Clone)]
pub struct Memory {
    /// The range.
    pub range: MemoryRange,
    /// Its kind, as NIXL names it.
    pub kind: MemKind,
    /// Device number that NIXL gave with it.
    pub dev_id: u64,
    /// Its kind, as libfabric names it.
    pub hmem: Hmem,
    /// CUDA context in which to work on it, for memory of a GPU that has one.
    pub context: Option<Context>,
    /// Whether kernels in that context may touch it.
    pub kernels_reach: bool,
    /// GPU memory that agents of this host may map.
    pub lent: Option<Arc<Lent>>,
}

impl Memory {
    /// Host memory.
    pub fn host(range: MemoryRange, dev_id: u64) -> Self {
        Self::new(range, MemKind::Dram, dev_id, Hmem::System)
    }

    /// Memory in no context, which no kernel reaches and nobody maps.
    pub fn new(range: MemoryRange, kind: MemKind, dev_id: u64, hmem: Hmem) -> Self {
        Self { range, kind, dev_id, hmem, context: None, kernels_reach: false, lent: None }
    }

    /// Runs `work` in the memory's context, if it has one: libfabric may call CUDA.
    fn within<R>(&self, work: impl FnOnce() -> R) -> Result<R> {
        match &self.context {
            Some(context) => context.with(work),
            None => Ok(work()),
        }
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:#x}+{} (device {})", self.kind, self.range.addr(), self.range.len(), self.dev_id)
    }
}

/// A range of local memory, registered on the rails that are near it.
pub struct Registration {
    memory: Memory,
    /// One entry for each rail of the engine; all `None` once the range is deregistered.
    regions: Mutex<Vec<Option<MemoryRegion>>>,
    /// Requests that keep regions of it at hand.
    users: Mutex<Vec<Weak<dyn RegionUser>>>,
    /// Rails that have a region, nearest first.
    rails: Vec<RailId>,
    /// Its place on the agent's board, if agents of this host may reach it.
    published: Option<Published>,
    /// By what they map it, if it is GPU memory; `None` once it is deregistered.
    lent: Mutex<Option<Arc<Lent>>>,
    /// Posts in flight, and times that the host has registered it and not deregistered it.
    uses: Uses,
}

impl fmt::Display for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.memory, f)
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Registration {
    /// Registers memory on `rails`, by `dmabuf` if one is given. If one rail refuses, what the others did is undone.
    pub fn new(
        all_rails: &[Arc<Rail>],
        rails: Vec<RailId>,
        mut memory: Memory,
        dmabuf: Option<&Dmabuf>,
    ) -> Result<Self> {
        let rails = working(all_rails, rails).map_err(|e| e.context(&memory))?;
        let register = |rail: RailId| {
            let rail = &all_rails[rail.index()];
            let device = rail.device().domain_name();
            let registered =
                memory.within(|| rail.domain().register(memory.range, memory.hmem, dmabuf, next_key()));
            registered.and_then(|region| Ok(region?)).map_err(|e| {
                e.context(format_args!("{memory} cannot be registered on rail {} ({device})", rail.id()))
            })
        };
        let outcomes: Vec<Result<MemoryRegion>> = if rails.len() > 1
            && memory.range.len() >= PARALLEL_REGISTRATION_BYTES_MIN
        {
            std::thread::scope(|scope| {
                let threads: Vec<_> = rails.iter().map(|&rail| scope.spawn(move || register(rail))).collect();
                let panicked = || Error::backend("a registration thread panicked");
                threads.into_iter().map(|t| t.join().map_err(|_| panicked()).and_then(|r| r)).collect()
            })
        } else {
            rails.iter().map(|&rail| register(rail)).collect()
        };
        let lent = Mutex::new(memory.lent.take());
        // Made before the outcomes are looked at, so that its end undoes what has been done, in the right context.
        let registration = Self {
            memory,
            lent,
            regions: Mutex::new(vec![None; all_rails.len()]),
            users: Mutex::default(),
            rails,
            published: None,
            uses: Uses::new(),
        };
        let mut refusal = None;
        for (rail, outcome) in registration.rails.iter().zip(outcomes) {
            match outcome {
                Ok(region) => registration.lock_regions()[rail.index()] = Some(region),
                Err(e) => refusal = refusal.or(Some(e)),
            }
        }
        if let Some(e) = refusal {
            return Err(e);
        }
        for rail in &registration.rails {
            if let Some(region) = registration.region(*rail) {
                all_rails[rail.index()].bind(&region)?;
            }
        }
        Ok(registration)
    }

    /// Lets agents of this host reach it, if it is memory that they can.
    pub fn publish(&mut self, board: &Arc<Board>) {
        if self.is_host_memory() || self.lock_lent().is_some() {
            self.published = board.publish(self.memory.range);
        }
    }

    /// Agents of this host begin no copy with it any more. Returns those that may be within one.
    pub fn withdraw(&self) -> Option<Copiers> {
        self.published.as_ref().map(Published::withdraw)
    }

    /// The range.
    pub fn range(&self) -> MemoryRange {
        self.memory.range
    }

    /// Kind of memory.
    pub fn kind(&self) -> MemKind {
        self.memory.kind
    }

    /// The context in which a GPU copies this memory; none for memory that the processor copies.
    pub fn copy_context(&self) -> Result<Option<Context>> {
        let ordinal = match (self.memory.hmem, &self.memory.context) {
            (Hmem::System, _) => return Ok(None),
            (Hmem::Cuda { .. }, Some(context)) => return Ok(Some(context.clone())),
            (Hmem::Cuda { device, .. }, None) => device,
            (Hmem::Neuron { .. }, _) => {
                return Err(Error::not_supported(format!("{self}: Neuron memory cannot be copied in place")));
            }
        };
        // Made before the application used the device; by now it may.
        Cuda::get()?.active_context(ordinal as u32)?.map(Some).ok_or_else(|| {
            Error::not_supported(format!(
                "{self}: no CUDA context is active on device {ordinal}: use the device (cudaSetDevice) first"
            ))
        })
    }

    /// Whether the processor copies it.
    pub fn is_host_memory(&self) -> bool {
        matches!(self.memory.hmem, Hmem::System)
    }

    /// Whether no rail reaches it: GPU memory that moves by way of host memory.
    pub fn is_staged(&self) -> bool {
        self.kind() == MemKind::Vram && self.rails.is_empty()
    }

    /// The rails that can move it, nearest first.
    pub fn rails(&self) -> &[RailId] {
        &self.rails
    }

    /// Its region on a rail.
    pub fn region(&self, rail: RailId) -> Option<MemoryRegion> {
        self.lock_regions()[rail.index()].clone()
    }

    /// Notes who keeps regions of it, to be told when they are to be closed.
    pub fn add_user(&self, user: Weak<dyn RegionUser>) {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        if users.len() == users.capacity() {
            users.retain(|user| user.strong_count() > 0);
        }
        users.push(user);
    }

    /// Ends the registration on every rail: when it returns, no NIC reaches the range, unless operations that use
    /// it are in flight.
    pub fn close(&self) {
        drop(self.lock_lent().take());
        let users = std::mem::take(&mut *self.users.lock().unwrap_or_else(PoisonError::into_inner));
        // Taken out here: where the context cannot be entered, they are dropped all the same.
        let regions: Vec<_> = self.lock_regions().iter_mut().filter_map(Option::take).collect();
        if regions.is_empty() {
            return;
        }
        let closed = self.memory.within(move || {
            for user in users.iter().filter_map(Weak::upgrade) {
                user.forget_regions();
            }
            drop(regions);
        });
        if let Err(why) = closed {
            log::warn!("{self} was deregistered outside its context: {why}");
        }
    }

    /// All of it, to be copied by a GPU in this context.
    pub fn span(&self, context: &Context) -> Result<Span> {
        let range = self.memory.range;
        let span = Span::registered(range, range.addr(), range.len())?;
        let reached = self.memory.kernels_reach && self.memory.context.as_ref() == Some(context);
        Ok(if reached { span.with_kernels_of(context) } else { span })
    }

    fn lock_lent(&self) -> MutexGuard<'_, Option<Arc<Lent>>> {
        self.lent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_regions(&self) -> MutexGuard<'_, Vec<Option<MemoryRegion>>> {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What peers need to reach it.
    pub fn public_metadata(&self) -> PublicMetadata {
        let mut keys: Vec<_> =
            self.lock_regions().iter().map(|r| r.as_ref().map(MemoryRegion::key)).collect();
        if self.is_staged() {
            keys[0] = Some(STAGED_KEY);
        }
        let board = self.published.as_ref().map(Published::entry);
        let gpu = self.lock_lent().as_ref().map(|lent| lent.shareable().clone());
        PublicMetadata { keys, addr: self.memory.range.addr(), board, gpu }
    }

    /// Checks that a descriptor lies inside.
    pub fn check(&self, desc: &Desc) -> Result<()> {
        check_inside(desc, self.memory.range.addr(), self.memory.range.len(), self)
    }

    /// A post that uses it begins.
    pub fn begin_use(&self) {
        self.uses.begin();
    }

    /// A post that uses it is over. The last one closes a range whose deregistration did not wait for it.
    pub fn end_use(&self) {
        if self.uses.end() {
            self.close();
        }
    }

    /// Posts in flight that use it.
    pub fn uses(&self) -> usize {
        self.uses.count()
    }

    /// The host registers it once more. `false` if it has been given up already.
    pub fn add_holder(&self) -> bool {
        self.uses.add_holder()
    }

    /// The host deregisters it once. `true` if that was the last time: no new post may use it.
    pub fn drop_holder(&self) -> bool {
        self.uses.drop_holder()
    }

    /// Whether the host has deregistered it.
    pub fn is_retired(&self) -> bool {
        self.uses.is_retired()
    }
}

/// Those of these rails that have not failed; an error if all have.
fn working(all: &[Arc<Rail>], rails: Vec<RailId>) -> Result<Vec<RailId>> {
    let failure = |rail: &RailId| all[rail.index()].failure();
    match rails.first().and_then(failure) {
        Some(error) if rails.iter().all(|rail| failure(rail).is_some()) => {
            Err(error.clone().context("no rail is left that reaches it"))
        }
        _ => Ok(rails.into_iter().filter(|rail| failure(rail).is_none()).collect()),
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.close();
    }
}

/// A range of a peer's memory.
#[derive(Debug)]
pub struct RemoteRegion {
    desc: Desc,
    kind: MemKind,
    agent: AgentName,
    peer: PeerId,
    metadata: PublicMetadata,
    is_staged: bool,
    /// How it is reached without a network, once that was tried.
    nearby: OnceLock<Option<NeighbourRegion>>,
    /// By what it is mapped, if it is GPU memory that its agent lends.
    gpu: Option<Arc<Shareable>>,
    /// How a GPU copies it without a network, for each context in which that was tried.
    nearby_gpu: Mutex<Vec<(Context, Option<GpuRegion>)>>,
}

impl fmt::Display for RemoteRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:#x}+{} of {}", self.kind, self.desc.addr, self.desc.len, self.agent)
    }
}

impl RemoteRegion {
    /// From what the peer said of it. One that `stages_vram` has its VRAM reached through its host memory.
    pub fn new(
        desc: Desc,
        kind: MemKind,
        agent: AgentName,
        peer: PeerId,
        stages_vram: bool,
        metadata: PublicMetadata,
    ) -> Self {
        let is_staged = kind == MemKind::Vram && stages_vram;
        let gpu = metadata.gpu.clone().filter(|_| kind == MemKind::Vram).map(Arc::new);
        let (nearby, nearby_gpu) = (OnceLock::new(), Mutex::default());
        Self { desc, kind, agent, peer, metadata, is_staged, nearby, gpu, nearby_gpu }
    }

    /// How it is copied without a network in a context here, if its agent is a neighbour, it is GPU memory, and that works: it is
    /// tried the first time.
    pub fn nearby_gpu(&self, neighbour: &Arc<Neighbour>, context: &Context) -> Option<GpuRegion> {
        let (entry, gpu) = self.metadata.board.zip(self.gpu.as_ref())?;
        let mut tried = self.nearby_gpu.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, outcome)) = tried.iter().find(|(known, _)| known == context) {
            return outcome.clone();
        }
        let outcome = neighbour.reaches_gpu(entry, (self.desc.addr, self.desc.len), gpu, context);
        if let Err(why) = &outcome {
            log::debug!("{self} is not reached by CUDA, though on this host: {why}");
        }
        tried.push((context.clone(), outcome.ok()));
        tried.last().and_then(|(_, outcome)| outcome.clone())
    }

    /// Kind of memory.
    pub fn kind(&self) -> MemKind {
        self.kind
    }

    /// How it is reached without a network, if its agent is a neighbour and that works: it is tried the first time.
    pub fn nearby(&self, neighbour: &Arc<Neighbour>) -> Option<&NeighbourRegion> {
        self.nearby.get_or_init(|| self.try_nearby(neighbour)).as_ref()
    }

    fn try_nearby(&self, neighbour: &Arc<Neighbour>) -> Option<NeighbourRegion> {
        let entry = self.metadata.board.filter(|_| self.kind == MemKind::Dram)?;
        match neighbour.reaches(entry, self.desc.addr, self.desc.len) {
            Ok(()) => Some(NeighbourRegion { neighbour: Arc::clone(neighbour), entry }),
            Err(why) => {
                log::debug!("{self} is reached by the NICs, though on this host: {why}");
                None
            }
        }
    }

    /// Whether none of the peer's rails reaches it: GPU memory that moves by way of the peer's host memory.
    pub fn is_staged(&self) -> bool {
        self.is_staged
    }

    /// The connection that it is of.
    pub fn peer(&self) -> PeerId {
        self.peer
    }

    /// The range, as NIXL described it.
    pub fn desc(&self) -> &Desc {
        &self.desc
    }

    /// Keys, one for each of the peer's endpoints.
    pub fn keys(&self) -> &[Option<u64>] {
        &self.metadata.keys
    }

    /// Start of the registered region, from which offsets count.
    pub fn base(&self) -> u64 {
        self.metadata.addr
    }

    /// Checks that a descriptor lies inside.
    pub fn check(&self, desc: &Desc) -> Result<()> {
        check_inside(desc, self.desc.addr, self.desc.len, self)
    }
}

fn check_inside(desc: &Desc, addr: u64, len: u64, region: &dyn fmt::Display) -> Result<()> {
    let inside = desc.addr >= addr
        && desc.addr.checked_add(desc.len).is_some_and(|end| end <= addr.saturating_add(len));
    if inside {
        return Ok(());
    }
    Err(Error::invalid(format!("the descriptor {:#x}+{} is not inside {region}", desc.addr, desc.len)))
}
