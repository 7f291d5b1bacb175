//! Transfers of an agent to itself: copied here, because no NIC carries a packet to its own address.
//!
//! Whoever drives the rails copies a bounded amount at a time, so that a copy of many GiB holds up no call.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use crate::error::{Error, Result, Status};
use crate::fabric::copy_between;
use crate::memory::Registration;

/// Bytes copied in one turn: about a millisecond of host memory bandwidth.
const TURN_BYTES: u64 = 8 << 20;

const IDLE: u8 = 0;
const IN_FLIGHT: u8 = 1;
const DONE: u8 = 2;
const FAILED: u8 = 3;

/// One piece of a copy, inside two registrations.
#[derive(Debug, Clone)]
pub struct LocalPiece {
    /// Region read from.
    pub source: Arc<Registration>,
    /// First byte read.
    pub source_addr: u64,
    /// Region written to.
    pub target: Arc<Registration>,
    /// First byte written.
    pub target_addr: u64,
    /// Bytes.
    pub len: u64,
}

/// A transfer within the agent.
#[derive(Debug)]
pub struct LocalTransfer {
    pieces: Vec<LocalPiece>,
    bytes: u64,
    state: AtomicU8,
    stopped: AtomicBool,
    cursor: Mutex<Cursor>,
}

#[derive(Debug, Default)]
struct Cursor {
    piece: usize,
    offset: u64,
    notification: Option<Vec<u8>>,
    error: Option<Error>,
}

impl LocalTransfer {
    /// A request that was never posted.
    pub fn new(pieces: Vec<LocalPiece>) -> Self {
        let bytes = pieces.iter().map(|p| p.len).sum();
        Self {
            pieces,
            bytes,
            state: AtomicU8::new(IDLE),
            stopped: AtomicBool::new(false),
            cursor: Mutex::default(),
        }
    }

    /// Bytes moved by one post.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Begins a post; to be followed by [`LocalCopies::push`].
    pub fn begin(&self, notification: Option<Vec<u8>>) -> Result<()> {
        if self.state.load(Ordering::Acquire) == IN_FLIGHT {
            return Err(Error::new(Status::RepostActive, "the transfer is still in flight"));
        }
        let regions = || self.pieces.iter().flat_map(|p| [&p.source, &p.target]);
        // Used first, looked at second: a deregistration does it the other way round, so one sees the other.
        regions().for_each(|r| r.begin_use());
        if let Some(gone) = regions().find(|r| r.is_retired()) {
            let error = Error::not_found(format!("a region of the transfer was deregistered: {gone}"));
            regions().for_each(|r| r.end_use());
            return Err(error);
        }
        *self.lock() = Cursor { notification, ..Cursor::default() };
        self.stopped.store(false, Ordering::Relaxed);
        self.state.store(IN_FLIGHT, Ordering::Release);
        Ok(())
    }

    /// What checkXfer answers.
    pub fn status(&self) -> Result<Status> {
        match self.state.load(Ordering::Acquire) {
            DONE => Ok(Status::Success),
            IN_FLIGHT => Ok(Status::InProgress),
            FAILED => Err(self.lock().error.clone().unwrap_or_else(|| Error::backend("the transfer failed"))),
            _ => Err(Error::new(Status::NotPosted, "the transfer was never posted")),
        }
    }

    /// The host lets go of the request; what is not copied yet is not.
    pub fn release(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// Copies up to [`TURN_BYTES`]. Returns the outcome when the transfer is over.
    fn advance(&self) -> Option<Result<Option<Vec<u8>>>> {
        let mut cursor = self.lock();
        let mut left = TURN_BYTES;
        while let Some(piece) = self.pieces.get(cursor.piece) {
            if self.stopped.load(Ordering::Relaxed) {
                return Some(Err(Error::new(Status::Canceled, "the transfer was released in flight")));
            }
            if left == 0 {
                return None;
            }
            let len = left.min(piece.len - cursor.offset);
            let copied = copy_between(
                piece.source.range(),
                piece.source_addr + cursor.offset,
                piece.target.range(),
                piece.target_addr + cursor.offset,
                len,
            );
            if let Err(e) = copied {
                return Some(Err(e));
            }
            left -= len;
            cursor.offset += len;
            if cursor.offset == piece.len {
                cursor.piece += 1;
                cursor.offset = 0;
            }
        }
        Some(Ok(cursor.notification.take()))
    }

    fn finish(&self, error: Option<Error>) {
        let state = if error.is_some() { FAILED } else { DONE };
        self.lock().error = error;
        self.pieces.iter().flat_map(|p| [&p.source, &p.target]).for_each(|r| r.end_use());
        self.state.store(state, Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, Cursor> {
        self.cursor.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Copies under way, oldest first.
#[derive(Debug, Default)]
pub struct LocalCopies(Mutex<VecDeque<Arc<LocalTransfer>>>);

impl LocalCopies {
    /// Adds a transfer that has begun.
    pub fn push(&self, transfer: Arc<LocalTransfer>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push_back(transfer);
    }

    /// Whether something is to be copied.
    pub fn is_busy(&self) -> bool {
        match self.0.try_lock() {
            Ok(queue) => !queue.is_empty(),
            Err(_) => true,
        }
    }

    /// Copies for one turn, unless another thread does. `notify` gets the notification of a transfer that is
    /// over. Returns how much was done.
    pub fn drive(&self, notify: impl FnOnce(Vec<u8>)) -> usize {
        let mut queue = match self.0.try_lock() {
            Ok(queue) => queue,
            Err(TryLockError::Poisoned(e)) => e.into_inner(),
            Err(TryLockError::WouldBlock) => return 0,
        };
        let Some(front) = queue.front() else { return 0 };
        if let Some(outcome) = front.advance() {
            let front = queue.pop_front().expect("it was just looked at");
            match outcome {
                Ok(notification) => {
                    if let Some(message) = notification {
                        notify(message);
                    }
                    front.finish(None);
                }
                Err(e) => front.finish(Some(e)),
            }
        }
        1
    }
}
