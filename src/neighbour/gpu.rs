//! GPU memory of a neighbour: mapped when it is first reached, and for as long as its region stands on the board.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::mappings::{Cache, Place};
use super::{Neighbour, NeighbourRegion, Slot};
use crate::cuda::{Context, Handle, Mapping, Shareable, Span};
use crate::error::{Error, Result};
use crate::wire::BoardEntry;

/// What this process has mapped of another one, whatever agents of both it is for: the driver knows processes alone, and returns
/// what is mapped already when it is to map the same handle once more.
pub(super) struct Mappings {
    /// The process, and when it began.
    process: (u32, u64),
    cache: Mutex<Cache<Context, Mapping>>,
}

/// The mappings of all other processes.
static ALL: Mutex<Vec<Weak<Mappings>>> = Mutex::new(Vec::new());

impl Mappings {
    /// Those of a process.
    pub fn of(process: (u32, u64)) -> Arc<Self> {
        let mut all = lock(&ALL);
        all.retain(|mappings| mappings.strong_count() > 0);
        let known = all.iter().filter_map(Weak::upgrade).find(|mappings| mappings.process == process);
        known.unwrap_or_else(|| {
            let mappings = Arc::new(Self { process, cache: Mutex::default() });
            all.push(Arc::downgrade(&mappings));
            mappings
        })
    }

    /// Ends what is for no region any more of which `is_wanted` holds.
    fn retain(&self, is_wanted: impl Fn(&Place) -> bool) {
        let ended = lock(&self.cache).retain(is_wanted);
        if ended > 0 {
            log::debug!("{ended} mappings of process {} end", self.process.0);
        }
    }

    fn is_empty(&self) -> bool {
        lock(&self.cache).is_empty()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Neighbour {
    /// Tries whether GPU memory can be reached: it is mapped for a context, and its first and its last bytes are read.
    pub fn reaches_gpu(
        self: &Arc<Self>,
        entry: BoardEntry,
        range: (u64, u64),
        what: &Arc<Shareable>,
        context: &Context,
    ) -> Result<GpuRegion> {
        if self.process.pid() == std::process::id() {
            return Err(Error::not_supported("it is memory of this process, which CUDA does not map again"));
        }
        let turn = self.slot_for_trial()?.begin_long()?;
        let region = NeighbourRegion { neighbour: Arc::clone(self), entry };
        let region = GpuRegion { region, what: Arc::clone(what), context: context.clone() };
        let (base, span) = region.span(&turn)?;
        let at = range.0.checked_sub(base).ok_or_else(|| Error::invalid("it begins before its region"))?;
        span.part(at, range.1)?.try_reading(context)?;
        self.check_lives()?;
        if !self.is_mapped.swap(true, Ordering::Relaxed) {
            log::info!("GPU memory of process {} is reached by CUDA", self.process.pid());
        }
        Ok(region)
    }

    /// Lets go of what the neighbour has deregistered, and of everything if its process has ended.
    pub fn sweep(&self) {
        if self.mappings.is_empty() {
            return;
        }
        let has_ended = self.process.has_ended();
        self.mappings.retain(|place| !has_ended && self.stands(place));
    }

    /// Whether a region is registered there, as far as it is this neighbour's.
    fn stands(&self, (board, entry): &Place) -> bool {
        *board != self.info.nonce || self.board.is_open() && self.board.region(*entry).is_some()
    }

    /// The peer is removed: nothing of its GPU memory is mapped for it any more, but what copies under way name.
    pub fn unmap(&self) {
        self.is_unmapped.store(true, Ordering::SeqCst);
        self.mappings.retain(|(board, _)| *board != self.info.nonce);
    }

    /// The descriptors by which memory is lent, as our own. Within a turn in which its region was found: they are the lender's for
    /// as long as that is registered.
    fn take_files(&self, what: &Shareable) -> Result<Vec<OwnedFd>> {
        let Handle::Files(files) = &what.handle else { return Ok(Vec::new()) };
        let take = |fd: u32| {
            let file = self.process.take_file(fd);
            file.map_err(|e| {
                Error::not_supported(format!("a file descriptor of its process cannot be taken: {e}"))
            })
        };
        files.iter().map(|(fd, _)| take(*fd)).collect()
    }
}

/// GPU memory of a neighbour, and the context in which it is copied.
#[derive(Clone)]
pub struct GpuRegion {
    /// Where it stands.
    pub region: NeighbourRegion,
    what: Arc<Shareable>,
    context: Context,
}

impl fmt::Debug for GpuRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GPU memory {:#x}+{:#x} of {:?}", self.what.base, self.what.size, self.region.neighbour)
    }
}

impl GpuRegion {
    /// The context in which it is copied.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// All of the region, mapped, and where it begins in the neighbour: to be copied within this turn, and no longer. Fails if it is
    /// not registered there.
    pub fn span(&self, turn: &LongTurn) -> Result<(u64, Span)> {
        let NeighbourRegion { neighbour, entry } = &self.region;
        if !Arc::ptr_eq(neighbour, &turn.slot.neighbour) {
            return Err(Error::invalid("a copy is of another neighbour's memory"));
        }
        let (addr, len) = neighbour.find(*entry)?;
        if neighbour.is_unmapped.load(Ordering::SeqCst) {
            return Err(Error::disconnected("the peer was removed"));
        }
        let open = || {
            let mapping = Mapping::open(&self.context, &self.what, neighbour.take_files(&self.what)?)?;
            log::debug!("{self:?} is mapped");
            Ok(mapping)
        };
        let place = (neighbour.info.nonce, *entry);
        let is_wanted = |place: &Place| neighbour.stands(place);
        let mapping =
            lock(&neighbour.mappings.cache).get(place, &self.what, &self.context, is_wanted, open)?;
        Ok((addr, mapping.span(addr, len)?))
    }
}

/// A turn of copying that outlasts the call in which it begins, because a GPU copies: regions that are found in it stay registered
/// until it is over.
pub struct LongTurn {
    slot: Slot,
}

impl Slot {
    /// Begins to copy, if the process is still the one that was met.
    pub fn begin_long(self) -> Result<LongTurn> {
        let turn = LongTurn { slot: self };
        super::epochs::begin(turn.slot.epoch());
        turn.slot.neighbour.check_face()?;
        Ok(turn)
    }
}

impl fmt::Debug for LongTurn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a turn in the memory of {:?}", self.slot.neighbour)
    }
}

impl Drop for LongTurn {
    fn drop(&mut self) {
        super::epochs::end(self.slot.epoch());
        let neighbour = &self.slot.neighbour;
        if neighbour.is_unmapped.load(Ordering::SeqCst) {
            // The peer was removed while this was copied.
            neighbour.unmap();
        }
    }
}
