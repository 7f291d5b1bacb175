//! The side that transfers: cuts a transfer into chunks and takes each through its steps.
//!
//! A chunk of a WRITE: from GPU memory into slots here (if the local side is GPU memory), over the wire into slots of the
//! peer (or right into its memory, if that is host memory), from those into the peer's GPU memory. A READ goes the other
//! way. Chunks are at different steps at a time, so copies there, copies here and the wire overlap. Small pieces travel
//! together in a chunk, one behind the other.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::arena::Run;
use crate::cuda::InFlight;
use crate::engine::Metadata;
use crate::engine::remote::Remote;
use crate::engine::shared::Shared;
use crate::error::{Error, Result, Status};
use crate::memory::{Registration, RemoteRegion, begin_uses};
use crate::peer::Peer;
use crate::transfer::PostState;
use crate::types::Op;

/// Most bytes of a chunk; a shorter transfer is one. Each chunk has its messages and calls of the driver, which over tcp cost more
/// than the overlap of shorter ones brings (docs/gpu.md has the measurement).
pub(super) const CHUNK_BYTES_MAX: u64 = 1 << 20;

/// A local and a remote range of equal length.
pub struct StagedPiece {
    pub local: Arc<Registration>,
    pub local_addr: u64,
    /// Metadata of a region of the peer.
    pub remote: Arc<Metadata>,
    pub remote_addr: u64,
    pub len: u64,
}

impl StagedPiece {
    /// Whether both are of the same two regions, so that they can travel together.
    fn is_beside(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.local, &other.local) && Arc::ptr_eq(&self.remote, &other.remote)
    }

    /// Whether `next` begins where this one ends, on both sides.
    pub fn goes_on_with(&self, next: &Self) -> bool {
        self.is_beside(next)
            && self.local_addr + self.len == next.local_addr
            && self.remote_addr + self.len == next.remote_addr
    }

    /// The region of the peer.
    pub fn region(&self) -> Result<&RemoteRegion> {
        match self.remote.as_ref() {
            Metadata::Remote(region) => Ok(region),
            Metadata::Local(_) => Err(Error::invalid("the remote side is memory of this agent")),
        }
    }
}

/// A transfer with a peer in which GPU memory is reached through host memory.
pub struct StagedTransfer {
    pub(super) op: Op,
    pub(super) peer: Arc<Peer>,
    pub(super) pieces: Vec<StagedPiece>,
    bytes: u64,
    state: PostState,
    notification: Mutex<Option<Vec<u8>>>,
}

impl fmt::Debug for StagedTransfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "staged transfer of {} bytes with {}", self.bytes, self.peer.name())
    }
}

impl StagedTransfer {
    /// A request that was never posted.
    pub fn new(op: Op, peer: Arc<Peer>, pieces: Vec<StagedPiece>) -> Self {
        Self {
            op,
            peer,
            bytes: pieces.iter().map(|piece| piece.len).sum(),
            pieces,
            state: PostState::default(),
            notification: Mutex::default(),
        }
    }

    /// Bytes moved by one post.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What follows a place: at most so many bytes, of one pair of regions and at most so many pieces.
    pub(super) fn cut(&self, from: Place, bytes_max: u64, pieces_max: usize) -> Cut {
        let first = &self.pieces[from.piece];
        let mut len = 0;
        let together = self.pieces[from.piece..].iter().take_while(|piece| piece.is_beside(first));
        let mut offset = from.offset;
        for piece in together.take(pieces_max) {
            len += (piece.len - offset).min(bytes_max - len);
            offset = 0;
            if len == bytes_max {
                break;
            }
        }
        Cut { from, len }
    }

    /// What a cut is made of.
    pub(super) fn segments(&self, cut: Cut) -> impl Iterator<Item = Segment> + '_ {
        let (mut offset, mut at) = (cut.from.offset, 0);
        let mut pieces = self.pieces[cut.from.piece..].iter();
        std::iter::from_fn(move || {
            let piece = if at < cut.len { pieces.next() } else { None }?;
            let len = (piece.len - offset).min(cut.len - at);
            let (local_addr, remote_addr) = (piece.local_addr + offset, piece.remote_addr + offset);
            let segment = Segment { at, local_addr, remote_addr, len };
            (offset, at) = (0, at + len);
            Some(segment)
        })
    }

    /// The place behind a cut.
    pub(super) fn behind(&self, cut: Cut) -> Place {
        let Place { mut piece, mut offset } = cut.from;
        let mut left = cut.len;
        while let Some(rest) =
            self.pieces.get(piece).map(|piece| piece.len - offset).filter(|rest| *rest <= left)
        {
            (piece, offset, left) = (piece + 1, 0, left - rest);
        }
        Place { piece, offset: offset + left }
    }

    /// Begins a post.
    pub fn begin(&self, notification: Option<Vec<u8>>) -> Result<()> {
        self.state.check_postable()?;
        self.peer.connect()?;
        begin_uses(self.pieces.iter().map(|piece| &piece.local))
            .map_err(|gone| Error::not_found(format!("a region of the transfer was deregistered: {gone}")))?;
        *self.lock() = notification;
        self.state.begin();
        Ok(())
    }

    /// What checkXfer answers.
    pub fn status(&self) -> Result<Status> {
        self.state.status()
    }

    /// The host lets go of the request; what has not begun does not.
    pub fn release(&self) {
        self.state.stop();
    }

    /// Whether no chunk should begin any more.
    pub fn is_stopped(&self) -> bool {
        self.state.is_stopped()
    }

    /// Everything has moved, or an error has ended it. Nothing is in flight.
    pub(super) fn finish(&self, error: Option<Error>, since: Instant, shared: &Shared) {
        let outcome = match (error, self.lock().take()) {
            (Some(e), _) => Err(e),
            (None, Some(message)) => self.peer.notify(message).map(|released| {
                let mut events = Vec::new();
                shared.release(released, &mut events);
                shared.act(events);
            }),
            (None, None) => Ok(()),
        };
        if let Some(counts) = &shared.counts {
            let outcome = outcome.as_ref().map(|()| since.elapsed()).map_err(Error::status);
            counts.over(self.peer.tally(), self.op, self.bytes, outcome);
        }
        self.pieces.iter().for_each(|piece| piece.local.end_use());
        self.state.end(outcome.err());
    }

    fn lock(&self) -> MutexGuard<'_, Option<Vec<u8>>> {
        self.notification.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place in the pieces of a transfer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Place {
    pub piece: usize,
    pub offset: u64,
}

/// A part of a transfer: pieces of one pair of regions, the first and the last perhaps in part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    pub from: Place,
    pub len: u64,
}

/// What a cut has of one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where it lies in the cut, in bytes from its beginning.
    pub at: u64,
    pub local_addr: u64,
    pub remote_addr: u64,
    pub len: u64,
}

/// Where a chunk is.
pub enum Step {
    /// It has not begun.
    New,
    /// Copied by the GPU here.
    Copying(InFlight),
    /// Copied by the GPU there: the number under which it was asked for, and when.
    Asked(u64, Instant),
    /// On the wire.
    Wire(Arc<Remote>),
}

/// A cut under way.
pub struct Chunk {
    pub cut: Cut,
    /// Slots here, while anything may touch them.
    pub own: Option<Run>,
    /// Slots of the peer, while anything may touch them.
    pub lent: Option<Run>,
    /// Which of the three steps it is in.
    pub stage: u8,
    pub step: Step,
}

/// A posted transfer and its chunks.
pub struct Active {
    pub transfer: Arc<StagedTransfer>,
    /// What comes next.
    pub next: Place,
    pub chunks: Vec<Chunk>,
    pub error: Option<Error>,
    pub since: Instant,
}

impl Active {
    pub fn new(transfer: Arc<StagedTransfer>) -> Self {
        Self { transfer, next: Place::default(), chunks: Vec::new(), error: None, since: Instant::now() }
    }

    /// Whether what comes next is GPU memory here.
    pub fn needs_own_slots(&self) -> bool {
        self.transfer.pieces.get(self.next.piece).is_some_and(|piece| piece.local.is_staged())
    }

    /// Whether nothing is left to cut, or nothing more will be.
    pub fn is_cut(&self) -> bool {
        self.error.is_some() || self.next.piece == self.transfer.pieces.len()
    }

    /// Whether all has been cut and has arrived, or nothing more will.
    pub fn is_over(&self) -> bool {
        self.chunks.is_empty() && self.is_cut()
    }
}
