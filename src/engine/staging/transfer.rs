//! The side that transfers: cuts a transfer into chunks and takes each through its steps.
//!
//! A chunk of a WRITE: from GPU memory into a slot here (if the local side is GPU memory), over the wire into a slot of the
//! peer (or right into its memory, if that is host memory), from that slot into the peer's GPU memory. A READ goes the other
//! way. Chunks are at different steps at a time, so copies there, copies here and the wire overlap.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::cuda::InFlight;
use crate::engine::Metadata;
use crate::engine::remote::Remote;
use crate::engine::shared::Shared;
use crate::error::{Error, Result, Status};
use crate::memory::{Registration, RemoteRegion, begin_uses};
use crate::peer::Peer;
use crate::transfer::PostState;
use crate::types::Op;

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
    /// Whether `next` begins where this one ends, on both sides.
    pub fn goes_on_with(&self, next: &Self) -> bool {
        Arc::ptr_eq(&self.local, &next.local)
            && Arc::ptr_eq(&self.remote, &next.remote)
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

/// Where a chunk is.
pub enum Step {
    /// Copied by the GPU here.
    Copying(InFlight),
    /// Copied by the GPU there: the number under which it was asked for, and when.
    Asked(u64, Instant),
    /// On the wire.
    Wire(Arc<Remote>),
}

/// A part of a piece under way.
pub struct Chunk {
    pub piece: usize,
    pub offset: u64,
    pub len: u64,
    pub local_slot: Option<u16>,
    pub remote_slot: Option<u16>,
    /// Which of the three steps it is in.
    pub stage: u8,
    pub step: Step,
}

/// A posted transfer and its chunks.
pub struct Active {
    pub transfer: Arc<StagedTransfer>,
    /// Next piece to cut, and how much of it is cut.
    pub piece: usize,
    pub offset: u64,
    pub chunks: Vec<Chunk>,
    pub error: Option<Error>,
    pub since: Instant,
}

impl Active {
    pub fn new(transfer: Arc<StagedTransfer>) -> Self {
        Self { transfer, piece: 0, offset: 0, chunks: Vec::new(), error: None, since: Instant::now() }
    }

    /// Whether all has been cut and has arrived, or nothing more will.
    pub fn is_over(&self) -> bool {
        self.chunks.is_empty() && (self.error.is_some() || self.piece == self.transfer.pieces.len())
    }
}
