//! Copies: what moves without a NIC. Within the agent, because no NIC carries a packet to its own address; and to and from
//! neighbours, whose memory this process reaches.
//!
//! Whoever drives the rails copies a bounded amount at a time, so that a copy of many GiB holds up no call, and several share a
//! long one. Where GPU memory takes part a GPU copies, and who drives starts copies and asks whether they are done.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::cuda::{Batch, Context, InFlight, Span, Streams};
use crate::error::{Error, Result, Status};
use crate::fabric::{ProcessCopy, RANGES_MAX, Slice, copy_between};
use crate::memory::Registration;
use crate::neighbour::{GpuRegion, LongTurn, Neighbour, NeighbourRegion, Slot};
use crate::rail::Tag;
use crate::types::{MemKind, Op};

/// Bytes copied in one turn: about a millisecond of host memory bandwidth.
const TURN_BYTES: u64 = 8 << 20;
/// Least bytes that a turn leaves to others who could share them.
const SHARE_BYTES_MIN: u64 = 512 << 10;

/// Pieces that one turn copies of a neighbour's: one system call.
const TURN_PIECES_MAX: usize = RANGES_MAX;

/// Pieces that the driver copies one by one before it is asked whether they are done: each takes it some 2 us.
const BATCH_SINGLES_MAX: usize = 128;
/// Pieces of any length that a GPU copies before it is asked.
const BATCH_PIECES_MAX: usize = 8192;
/// Batches in flight: one that copies, one that waits, so that the GPU need not wait for whoever drives.
const BATCHES_MAX: usize = 2;

/// What is at the other end of a copy, and how it is reached.
#[derive(Debug, Clone)]
pub enum Far {
    /// Memory of this agent.
    Here(Arc<Registration>),
    /// Host memory of a neighbour.
    There(NeighbourRegion),
    /// GPU memory of a neighbour.
    Gpu(GpuRegion),
}

/// A region here and one at the other end.
#[derive(Debug, Clone)]
pub struct CopyPair {
    /// The one here.
    pub near: Arc<Registration>,
    /// The other.
    pub far: Far,
}

/// Who copies a pair.
#[derive(Debug, PartialEq)]
enum Copier {
    /// The processor, within this process.
    Processor,
    /// The kernel, between this process and a neighbour.
    Kernel,
    /// A GPU, in this context.
    Gpu(Context),
}

impl CopyPair {
    fn copier(&self) -> Result<Copier> {
        let far = match &self.far {
            Far::Here(far) => far,
            Far::There(_) => return Ok(Copier::Kernel),
            Far::Gpu(far) => return Ok(Copier::Gpu(far.context().clone())),
        };
        let context = self.near.copy_context()?.or(far.copy_context()?);
        Ok(context.map_or(Copier::Processor, Copier::Gpu))
    }

    fn within_gpus(&self) -> bool {
        let is_far = match &self.far {
            Far::Here(far) => far.kind() == MemKind::Vram,
            Far::There(_) => false,
            Far::Gpu(_) => true,
        };
        is_far && self.near.kind() == MemKind::Vram
    }
}

/// Pieces to copy, which lie in pairs of regions. What it holds was checked against them.
pub struct CopyList {
    op: Op,
    pieces: Box<[Slice]>,
    pairs: Box<[CopyPair]>,
    bytes: u64,
}

impl CopyList {
    /// A list of pieces that were checked against the regions at the far end; those here are checked now.
    pub fn new(op: Op, pieces: Vec<Slice>, pairs: Vec<CopyPair>) -> Result<Self> {
        for piece in &pieces {
            let pair = pairs.get(piece.pair as usize);
            if !pair.is_some_and(|pair| pair.near.range().contains(piece.local_addr, piece.len.into())) {
                let (addr, len) = (piece.local_addr, piece.len);
                return Err(Error::invalid(format!("{len} bytes at {addr:#x} are not inside their region")));
            }
        }
        let bytes = pieces.iter().map(|piece| u64::from(piece.len)).sum();
        Ok(Self { op, pieces: pieces.into(), pairs: pairs.into(), bytes })
    }

    /// Bytes in all.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Regions of this agent that it uses.
    pub fn registrations(&self) -> impl Iterator<Item = &Arc<Registration>> {
        self.pairs.iter().flat_map(|pair| {
            let far = match &pair.far {
                Far::Here(far) => Some(far),
                Far::There(_) | Far::Gpu(_) => None,
            };
            std::iter::once(&pair.near).chain(far)
        })
    }

    fn pair(&self, piece: &Slice) -> &CopyPair {
        &self.pairs[piece.pair as usize]
    }
}

/// One post of a list: over when all of it is copied, or when it has failed and nothing of it is in flight.
pub struct CopyWork {
    list: Arc<CopyList>,
    tag: Tag,
    stopped: AtomicBool,
    cursor: Mutex<Cursor>,
}

#[derive(Default)]
struct Cursor {
    /// What is nobody's yet begins in this piece, so many bytes behind its beginning.
    piece: usize,
    offset: u64,
    /// Bytes of it.
    claimed: u64,
    /// Turns under way.
    turns: usize,
    /// What GPUs copy, oldest first.
    flying: VecDeque<Flight>,
    error: Option<Error>,
    /// It was said to be over.
    over: bool,
}

/// What a GPU copies, and whose memory takes part, if it is a neighbour's.
struct Flight {
    copy: InFlight,
    neighbour: Option<Arc<Neighbour>>,
}

/// Pieces that are one's turn to copy: these, but for so many bytes of the first, and so many in all.
struct Claim {
    /// The slot in which a neighbour's are copied.
    slot: Option<Slot>,
    pieces: Range<usize>,
    offset: u64,
    bytes: u64,
}

/// The end of a piece of work.
pub struct CopyOver {
    /// What it belongs to.
    pub tag: Tag,
    /// How it ended.
    pub outcome: Result<()>,
}

impl CopyWork {
    /// A post of a list, that belongs to `tag`.
    pub fn new(list: Arc<CopyList>, tag: Tag) -> Arc<Self> {
        Arc::new(Self { list, tag, stopped: AtomicBool::new(false), cursor: Mutex::default() })
    }

    /// What is not copied yet is not. It is over when somebody drives it next.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// One's turn: takes what is to be copied by the processor, or has a GPU copy. The second says whether others are to look at
    /// it again.
    fn claim(&self, streams: &Streams, drivers: usize) -> (Option<Claim>, bool) {
        let mut cursor = self.lock();
        cursor.settle();
        if cursor.error.is_none() && self.stopped.load(Ordering::Relaxed) {
            cursor.error = Some(Error::new(Status::Canceled, "the transfer was released in flight"));
        }
        let mut claim = None;
        if cursor.error.is_none() && cursor.piece < self.list.pieces.len() {
            match self.claim_some(&mut cursor, streams, drivers) {
                Ok(some) => claim = some,
                Err(e) => cursor.error = Some(e),
            }
        }
        cursor.turns += usize::from(claim.is_some());
        let more = cursor.error.is_none() && cursor.piece < self.list.pieces.len();
        (claim, more || !cursor.flying.is_empty())
    }

    fn claim_some(&self, cursor: &mut Cursor, streams: &Streams, drivers: usize) -> Result<Option<Claim>> {
        let first = self.list.pair(&self.list.pieces[cursor.piece]);
        let copier = first.copier()?;
        if let Copier::Gpu(context) = &copier {
            if cursor.flying.len() < BATCHES_MAX {
                self.start_batch(cursor, context, streams)?;
            }
            return Ok(None);
        }
        let slot = match &first.far {
            Far::There(region) => match region.neighbour.slot() {
                None => return Ok(None),
                slot => slot,
            },
            Far::Here(_) | Far::Gpu(_) => None,
        };
        // The fewer bytes are left, the shorter the turns, so that those who share end together.
        let left = self.list.bytes - cursor.claimed;
        let most = (left / drivers as u64).clamp(SHARE_BYTES_MIN, TURN_BYTES);
        let mut claim = Claim { slot, pieces: cursor.piece..cursor.piece, offset: cursor.offset, bytes: 0 };
        let mut pair = self.list.pieces[cursor.piece].pair;
        while let Some(piece) = self.list.pieces.get(cursor.piece) {
            if claim.bytes == most || claim.pieces.len() == TURN_PIECES_MAX {
                break;
            }
            if piece.pair != pair {
                if self.list.pair(piece).copier()? != copier {
                    break;
                }
                pair = piece.pair;
            }
            let len = (most - claim.bytes).min(u64::from(piece.len) - cursor.offset);
            claim.bytes += len;
            claim.pieces.end = cursor.piece + 1;
            cursor.advance(piece, len);
        }
        cursor.claimed += claim.bytes;
        Ok(Some(claim))
    }

    /// Copies what one has claimed.
    fn copy(&self, claim: &Claim) -> Result<()> {
        let (mut offset, mut left) = (claim.offset, claim.bytes);
        let parts = self.list.pieces[claim.pieces.clone()].iter().map(|piece| {
            let part = Slice {
                local_addr: piece.local_addr + offset,
                remote_addr: piece.remote_addr + offset,
                len: left.min(u64::from(piece.len) - offset) as u32,
                pair: piece.pair,
            };
            offset = 0;
            left -= u64::from(part.len);
            part
        });
        match &claim.slot {
            Some(slot) => self.copy_there(slot, parts),
            None => self.copy_here(parts),
        }
    }

    fn copy_here(&self, mut parts: impl Iterator<Item = Slice>) -> Result<()> {
        parts.try_for_each(|part| {
            let pair = self.list.pair(&part);
            let Far::Here(far) = &pair.far else { return Err(mixed()) };
            let (near, far) = ((pair.near.range(), part.local_addr), (far.range(), part.remote_addr));
            let (source, target) = if self.list.op == Op::Write { (near, far) } else { (far, near) };
            copy_between(source.0, source.1, target.0, target.1, part.len.into())
        })
    }

    /// All parts are of one neighbour: the list is.
    fn copy_there(&self, slot: &Slot, parts: impl Iterator<Item = Slice>) -> Result<()> {
        let turn = slot.begin()?;
        let mut copies = Vec::with_capacity(parts.size_hint().0);
        for part in parts {
            let pair = self.list.pair(&part);
            let Far::There(region) = &pair.far else { return Err(mixed()) };
            turn.check(region, part.remote_addr, part.len.into())?;
            copies.push(ProcessCopy {
                region: pair.near.range(),
                addr: part.local_addr,
                remote_addr: part.remote_addr,
                len: part.len.into(),
            });
        }
        turn.copy(self.list.op, &copies)
    }

    /// Has the GPU of `context` copy the next pieces that are its own: of this agent, or of one neighbour.
    fn start_batch(&self, cursor: &mut Cursor, context: &Context, streams: &Streams) -> Result<()> {
        let far = &self.list.pair(&self.list.pieces[cursor.piece]).far;
        let turn = match far.neighbour() {
            // Without a slot it is another's turn; whoever drives looks again.
            Some(neighbour) => match neighbour.slot() {
                Some(slot) => Some(slot.begin_long()?),
                None => return Ok(()),
            },
            None => None,
        };
        let stream = streams.get(context)?;
        let neighbour = far.neighbour().cloned();
        let mut batch = self.claim_batch(cursor, context, turn.as_ref(), stream.has_kernel())?;
        if let Some(turn) = turn {
            // It is over when nothing is copied any more, whatever becomes of this work.
            batch.keep(Arc::new(turn));
        }
        let copy = stream.start(batch).inspect_err(|_| streams.forget(context))?;
        cursor.flying.push_back(Flight { copy, neighbour });
        Ok(())
    }

    fn claim_batch(
        &self,
        cursor: &mut Cursor,
        context: &Context,
        turn: Option<&LongTurn>,
        has_kernel: bool,
    ) -> Result<Batch> {
        let left = self.list.pieces.len() - cursor.piece;
        let mut batch = Batch::with_capacity(left.min(BATCH_PIECES_MAX));
        // Looked up once for each pair, not for each piece.
        let mut ends: Vec<Option<Ends>> = Vec::new();
        ends.resize_with(self.list.pairs.len(), || None);
        // The driver itself copies host memory that is not page-locked, before the call returns.
        let mut left = TURN_BYTES;
        while let Some(piece) = self.list.pieces.get(cursor.piece) {
            if left == 0 || batch.len() >= BATCH_PIECES_MAX || batch.singles(has_kernel) >= BATCH_SINGLES_MAX
            {
                break;
            }
            let ends = match &mut ends[piece.pair as usize] {
                Some(ends) => ends,
                unknown => match Ends::find(self.list.pair(piece), context, turn)? {
                    Some(found) => unknown.insert(found),
                    None => break,
                },
            };
            let rest = u64::from(piece.len) - cursor.offset;
            let len = if ends.within_gpus { rest } else { rest.min(left) };
            let near = ends.near_offset(piece.local_addr + cursor.offset)?;
            let far = ends.far_offset(piece.remote_addr + cursor.offset)?;
            match self.list.op {
                Op::Write => batch.add(&ends.far, far, &ends.near, near, len)?,
                Op::Read => batch.add(&ends.near, near, &ends.far, far, len)?,
            }
            if !ends.within_gpus {
                left -= len;
            }
            cursor.claimed += len;
            cursor.advance(piece, len);
        }
        Ok(batch)
    }

    /// A turn is over.
    fn end_turn(&self, outcome: Result<()>) {
        let mut cursor = self.lock();
        cursor.turns -= 1;
        if let Err(e) = outcome {
            cursor.error.get_or_insert(e);
        }
    }

    /// The outcome, when it is over; once.
    fn outcome(&self) -> Option<Result<()>> {
        let mut cursor = self.lock();
        let copied = cursor.piece == self.list.pieces.len();
        if cursor.over || cursor.turns > 0 || !cursor.flying.is_empty() || !copied && cursor.error.is_none() {
            return None;
        }
        cursor.over = true;
        Some(cursor.error.take().map_or(Ok(()), Err))
    }

    fn lock(&self) -> MutexGuard<'_, Cursor> {
        self.cursor.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A pair of regions that a GPU copies: all of both, and where they begin.
struct Ends {
    near: Span,
    near_addr: u64,
    far: Span,
    far_addr: u64,
    within_gpus: bool,
}

impl Ends {
    /// `None` if it is not copied in this context, or not in this turn.
    fn find(pair: &CopyPair, context: &Context, turn: Option<&LongTurn>) -> Result<Option<Self>> {
        if pair.copier()? != Copier::Gpu(context.clone()) {
            return Ok(None);
        }
        let (far_addr, far) = match (&pair.far, turn) {
            (Far::Here(far), None) => (far.range().addr(), far.span(context)?),
            (Far::Gpu(far), Some(turn)) => far.span(turn)?,
            _ => return Ok(None),
        };
        let (near, near_addr) = (pair.near.span(context)?, pair.near.range().addr());
        Ok(Some(Self { near, near_addr, far, far_addr, within_gpus: pair.within_gpus() }))
    }

    fn near_offset(&self, addr: u64) -> Result<u64> {
        addr.checked_sub(self.near_addr).ok_or_else(outside)
    }

    fn far_offset(&self, addr: u64) -> Result<u64> {
        addr.checked_sub(self.far_addr).ok_or_else(outside)
    }
}

fn outside() -> Error {
    Error::invalid("a copy begins before its region")
}

impl Far {
    /// The neighbour whose GPU memory it is.
    fn neighbour(&self) -> Option<&Arc<Neighbour>> {
        match self {
            Self::Gpu(far) => Some(&far.region.neighbour),
            Self::Here(_) | Self::There(_) => None,
        }
    }
}

impl Cursor {
    /// Goes on behind `len` bytes of `piece`.
    fn advance(&mut self, piece: &Slice, len: u64) {
        self.offset += len;
        if self.offset == u64::from(piece.len) {
            self.piece += 1;
            self.offset = 0;
        }
    }

    /// Takes in what GPUs have done.
    fn settle(&mut self) {
        while let Some(oldest) = self.flying.front_mut() {
            let mut outcome = match oldest.copy.is_done() {
                Ok(false) => return,
                over => over.map(drop),
            };
            if let Some(neighbour) = &oldest.neighbour {
                outcome = outcome.and_then(|()| neighbour.check_lives());
            }
            self.flying.pop_front();
            if let Err(e) = outcome {
                self.error.get_or_insert(e);
            }
        }
    }
}

fn mixed() -> Error {
    Error::backend("a list of copies mixes what different ones copy")
}

/// Copies under way. Those that want more turns take them one after the other.
pub struct Copies {
    queue: Mutex<VecDeque<Arc<CopyWork>>>,
    streams: Streams,
    /// Pieces of work that are not over.
    active: AtomicUsize,
    /// Threads among which a long copy is shared out.
    drivers: usize,
}

impl Copies {
    /// None under way, and so many threads that drive them.
    pub fn new(drivers: usize) -> Self {
        Self {
            queue: Mutex::default(),
            streams: Streams::default(),
            active: AtomicUsize::new(0),
            drivers: drivers.max(1),
        }
    }

    /// Adds work that has begun.
    pub fn push(&self, work: Arc<CopyWork>) {
        self.active.fetch_add(1, Ordering::AcqRel);
        self.lock().push_back(work);
    }

    /// Whether something is to be copied, or being copied.
    pub fn is_busy(&self) -> bool {
        self.active.load(Ordering::Acquire) > 0
    }

    /// Copies for one turn. Returns how much was done, and the work that was over with it, if any.
    pub fn drive(&self) -> (usize, Option<CopyOver>) {
        if !self.is_busy() {
            return (0, None);
        }
        let Some(work) = self.lock().pop_front() else { return (0, None) };
        let (claim, more) = work.claim(&self.streams, self.drivers);
        if more {
            self.lock().push_back(Arc::clone(&work));
        }
        if let Some(claim) = claim {
            let outcome = work.copy(&claim);
            work.end_turn(outcome);
        }
        let over = work.outcome().map(|outcome| {
            self.active.fetch_sub(1, Ordering::AcqRel);
            CopyOver { tag: Arc::clone(&work.tag), outcome }
        });
        (1, over)
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Arc<CopyWork>>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
