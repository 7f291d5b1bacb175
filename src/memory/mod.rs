//! Registrations of local memory and descriptions of remote memory.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::error::{Error, Result};
use crate::fabric::{Dmabuf, Hmem, MemoryRange, MemoryRegion, next_key};
use crate::peer::Peer;
use crate::rail::Rail;
use crate::types::{Desc, MemKind, RailId};
use crate::wire::PublicMetadata;

/// Ranges at least this long are registered on several rails at once: pinning takes about 0.1 ms for each MiB.
const PARALLEL_REGISTRATION_BYTES_MIN: u64 = 64 << 20;

/// Something that keeps regions of registrations: a prepared request.
pub trait RegionUser: Send + Sync {
    /// Lets go of them for good: one of their ranges is deregistered.
    fn forget_regions(&self);
}

/// A range of local memory, registered on the rails that are near it.
pub struct Registration {
    range: MemoryRange,
    kind: MemKind,
    dev_id: u64,
    /// One entry for each rail of the engine; all `None` once the range is deregistered.
    regions: Mutex<Vec<Option<MemoryRegion>>>,
    /// Requests that keep regions of it at hand.
    users: Mutex<Vec<Weak<dyn RegionUser>>>,
    /// Rails that have a region, nearest first.
    rails: Vec<RailId>,
    /// Posts in flight that use it.
    in_use: AtomicUsize,
    /// Times that the host has registered it and not deregistered it; at 0 no new post may use it.
    holders: AtomicUsize,
}

impl fmt::Display for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:#x}+{} (device {})", self.kind, self.range.addr(), self.range.len(), self.dev_id)
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Registration {
    /// Registers `range` on `rails`. If one refuses, what the others did is undone.
    pub fn new(
        all_rails: &[Arc<Rail>],
        rails: Vec<RailId>,
        range: MemoryRange,
        kind: MemKind,
        dev_id: u64,
        hmem: Hmem,
        dmabuf: Option<&Dmabuf>,
    ) -> Result<Self> {
        let register = |rail: RailId| {
            let rail = &all_rails[rail.index()];
            rail.domain().register(range, hmem, dmabuf, next_key()).map_err(|e| {
                Error::from(e).context(format_args!(
                    "{kind} {:#x}+{} cannot be registered on rail {} ({})",
                    range.addr(),
                    range.len(),
                    rail.id(),
                    rail.device().domain_name()
                ))
            })
        };
        let outcomes: Vec<Result<MemoryRegion>> = if rails.len() > 1
            && range.len() >= PARALLEL_REGISTRATION_BYTES_MIN
        {
            std::thread::scope(|scope| {
                let threads: Vec<_> = rails.iter().map(|&rail| scope.spawn(move || register(rail))).collect();
                let panicked = || Error::backend("a registration thread panicked");
                threads.into_iter().map(|t| t.join().map_err(|_| panicked()).and_then(|r| r)).collect()
            })
        } else {
            rails.iter().map(|&rail| register(rail)).collect()
        };
        let mut regions = vec![None; all_rails.len()];
        for (rail, region) in rails.iter().zip(outcomes) {
            let region = region?;
            all_rails[rail.index()].bind(&region)?;
            regions[rail.index()] = Some(region);
        }
        Ok(Self {
            range,
            kind,
            dev_id,
            regions: Mutex::new(regions),
            users: Mutex::default(),
            rails,
            in_use: AtomicUsize::new(0),
            holders: AtomicUsize::new(1),
        })
    }

    /// The range.
    pub fn range(&self) -> MemoryRange {
        self.range
    }

    /// Kind of memory.
    pub fn kind(&self) -> MemKind {
        self.kind
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
        let users = std::mem::take(&mut *self.users.lock().unwrap_or_else(PoisonError::into_inner));
        for user in users.iter().filter_map(Weak::upgrade) {
            user.forget_regions();
        }
        self.lock_regions().fill(None);
    }

    fn lock_regions(&self) -> MutexGuard<'_, Vec<Option<MemoryRegion>>> {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What peers need to reach it.
    pub fn public_metadata(&self) -> PublicMetadata {
        PublicMetadata {
            keys: self.lock_regions().iter().map(|r| r.as_ref().map(MemoryRegion::key)).collect(),
            addr: self.range.addr(),
        }
    }

    /// Checks that a descriptor lies inside.
    pub fn check(&self, desc: &Desc) -> Result<()> {
        check_inside(desc, self.range.addr(), self.range.len(), self)
    }

    /// A post that uses it begins.
    pub fn begin_use(&self) {
        self.in_use.fetch_add(1, Ordering::SeqCst);
    }

    /// A post that uses it is over.
    pub fn end_use(&self) {
        self.in_use.fetch_sub(1, Ordering::AcqRel);
    }

    /// Posts in flight that use it.
    pub fn uses(&self) -> usize {
        self.in_use.load(Ordering::SeqCst)
    }

    /// The host registers it once more. `false` if it has been given up already.
    pub fn add_holder(&self) -> bool {
        let more = |holders: usize| (holders > 0).then_some(holders + 1);
        self.holders.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).is_ok()
    }

    /// The host deregisters it once. `true` if that was the last time: no new post may use it.
    pub fn drop_holder(&self) -> bool {
        self.holders.fetch_sub(1, Ordering::SeqCst) == 1
    }

    /// Whether the host has deregistered it.
    pub fn is_retired(&self) -> bool {
        self.holders.load(Ordering::SeqCst) == 0
    }
}

/// A range of a peer's memory.
pub struct RemoteRegion {
    desc: Desc,
    kind: MemKind,
    peer: Arc<Peer>,
    metadata: PublicMetadata,
}

impl fmt::Display for RemoteRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:#x}+{} of {}", self.kind, self.desc.addr, self.desc.len, self.peer.name())
    }
}

impl fmt::Debug for RemoteRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl RemoteRegion {
    /// From what the peer said of it.
    pub fn new(desc: Desc, kind: MemKind, peer: Arc<Peer>, metadata: PublicMetadata) -> Self {
        Self { desc, kind, peer, metadata }
    }

    /// Whose it is.
    pub fn peer(&self) -> &Arc<Peer> {
        &self.peer
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
