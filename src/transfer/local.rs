//! Transfers of an agent to itself: copied here, because no NIC carries a packet to its own address.
//!
//! Whoever drives the rails copies a bounded amount at a time, so that a copy of many GiB holds up no call. Where GPU
//! memory takes part a GPU copies, and who drives starts copies and asks whether they are done.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use super::state::PostState;
use crate::cuda::{Context, InFlight, Span, Stream};
use crate::error::{Error, Result, Status};
use crate::fabric::copy_between;
use crate::memory::{Registration, begin_uses};
use crate::types::MemKind;

/// Bytes copied in one turn: about a millisecond of host memory bandwidth.
const TURN_BYTES: u64 = 8 << 20;

/// Pieces that a GPU copies before it is asked whether they are done.
const BATCH_PIECES_MAX: usize = 128;
/// Batches in flight: one that copies, one that waits, so that the GPU need not wait for whoever drives.
const BATCHES_MAX: usize = 2;

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

impl LocalPiece {
    /// The context of the GPU that copies it; none where the processor does.
    fn context(&self) -> Result<Option<Context>> {
        Ok(self.source.copy_context()?.or(self.target.copy_context()?))
    }

    fn within_gpus(&self) -> bool {
        [&self.source, &self.target].iter().all(|region| region.kind() == MemKind::Vram)
    }
}

/// A transfer within the agent.
#[derive(Debug)]
pub struct LocalTransfer {
    pieces: Vec<LocalPiece>,
    state: PostState,
    cursor: Mutex<Cursor>,
}

#[derive(Default)]
struct Cursor {
    piece: usize,
    offset: u64,
    /// What GPUs copy, oldest first.
    flying: VecDeque<InFlight>,
    notification: Option<Vec<u8>>,
    error: Option<Error>,
    posted_at: Option<Instant>,
}

impl fmt::Debug for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cursor")
            .field("piece", &self.piece)
            .field("offset", &self.offset)
            .field("flying", &self.flying.len())
            .field("error", &self.error)
            .finish_non_exhaustive()
    }
}

impl Cursor {
    /// Goes on behind `len` bytes of `piece`.
    fn advance(&mut self, piece: &LocalPiece, len: u64) {
        self.offset += len;
        if self.offset == piece.len {
            self.piece += 1;
            self.offset = 0;
        }
    }

    /// Takes in what GPUs have done.
    fn settle(&mut self) {
        while let Some(oldest) = self.flying.front_mut() {
            match oldest.is_done() {
                Ok(false) => return,
                Ok(true) => {}
                Err(e) => self.error = self.error.take().or(Some(e)),
            }
            self.flying.pop_front();
        }
    }
}

impl LocalTransfer {
    /// A request that was never posted.
    pub fn new(pieces: Vec<LocalPiece>) -> Self {
        Self { pieces, state: PostState::default(), cursor: Mutex::default() }
    }

    /// Begins a post; to be followed by [`LocalCopies::push`].
    pub fn begin(&self, notification: Option<Vec<u8>>) -> Result<()> {
        self.state.check_postable()?;
        begin_uses(self.pieces.iter().flat_map(|p| [&p.source, &p.target]))
            .map_err(|gone| Error::not_found(format!("a region of the transfer was deregistered: {gone}")))?;
        *self.lock() = Cursor { notification, posted_at: Some(Instant::now()), ..Cursor::default() };
        self.state.begin();
        Ok(())
    }

    /// What checkXfer answers.
    pub fn status(&self) -> Result<Status> {
        self.state.status()
    }

    /// The host lets go of the request; what is not copied yet is not.
    pub fn release(&self) {
        self.state.stop();
    }

    /// One turn: up to [`TURN_BYTES`] of the processor's, or batches for GPUs. Returns the outcome when the transfer is
    /// over and nothing is in flight.
    fn advance(
        &self,
        streams: &Streams,
        late: impl FnOnce(Duration) -> Option<Error>,
    ) -> Option<Result<Option<Vec<u8>>>> {
        let mut cursor = self.lock();
        cursor.settle();
        if cursor.error.is_none() && cursor.piece < self.pieces.len() {
            cursor.error = cursor.posted_at.and_then(|at| late(at.elapsed()));
        }
        if cursor.error.is_none() && self.state.is_stopped() {
            cursor.error = Some(Error::new(Status::Canceled, "the transfer was released in flight"));
        }
        if cursor.error.is_none()
            && let Err(e) = self.copy_some(&mut cursor, streams)
        {
            cursor.error = Some(e);
        }
        if !cursor.flying.is_empty() {
            return None;
        }
        match cursor.error.take() {
            Some(e) => Some(Err(e)),
            None if cursor.piece == self.pieces.len() => Some(Ok(cursor.notification.take())),
            None => None,
        }
    }

    fn copy_some(&self, cursor: &mut Cursor, streams: &Streams) -> Result<()> {
        let mut left = TURN_BYTES;
        while let Some(piece) = self.pieces.get(cursor.piece) {
            if let Some(context) = piece.context()? {
                if cursor.flying.len() == BATCHES_MAX {
                    return Ok(());
                }
                self.start_batch(cursor, &context, streams)?;
                continue;
            }
            if left == 0 {
                return Ok(());
            }
            let len = left.min(piece.len - cursor.offset);
            copy_between(
                piece.source.range(),
                piece.source_addr + cursor.offset,
                piece.target.range(),
                piece.target_addr + cursor.offset,
                len,
            )?;
            left -= len;
            cursor.advance(piece, len);
        }
        Ok(())
    }

    /// Has the GPU of `context` copy the next pieces that are its own.
    fn start_batch(&self, cursor: &mut Cursor, context: &Context, streams: &Streams) -> Result<()> {
        let mut pairs = Vec::new();
        // The driver itself copies host memory that is not page-locked, before the call returns.
        let mut left = TURN_BYTES;
        while let Some(piece) = self.pieces.get(cursor.piece) {
            if left == 0 || pairs.len() == BATCH_PIECES_MAX || piece.context()?.as_ref() != Some(context) {
                break;
            }
            let rest = piece.len - cursor.offset;
            let len = if piece.within_gpus() { rest } else { rest.min(left) };
            let target = Span::registered(piece.target.range(), piece.target_addr + cursor.offset, len)?;
            let source = Span::registered(piece.source.range(), piece.source_addr + cursor.offset, len)?;
            pairs.push((target, source));
            if !piece.within_gpus() {
                left -= len;
            }
            cursor.advance(piece, len);
        }
        let batch = streams.get(context).and_then(|stream| stream.copy_all(pairs));
        cursor.flying.push_back(batch.inspect_err(|_| streams.forget(context))?);
        Ok(())
    }

    fn finish(&self, error: Option<Error>) {
        self.pieces.iter().flat_map(|p| [&p.source, &p.target]).for_each(|r| r.end_use());
        self.state.end(error);
    }

    fn lock(&self) -> MutexGuard<'_, Cursor> {
        self.cursor.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The streams on which GPUs copy, one for each context, made when first needed.
#[derive(Default)]
pub struct Streams(Mutex<Vec<Stream>>);

impl Streams {
    /// The stream of a context.
    pub fn get(&self, context: &Context) -> Result<Stream> {
        let mut streams = self.lock();
        if let Some(stream) = streams.iter().find(|stream| stream.context() == context) {
            return Ok(stream.clone());
        }
        let stream = Stream::new(context)?;
        streams.push(stream.clone());
        Ok(stream)
    }

    /// The next copy in this context gets a new stream: the application may have reset the device.
    pub fn forget(&self, context: &Context) {
        self.lock().retain(|stream| stream.context() != context);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Stream>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Copies under way, oldest first.
#[derive(Default)]
pub struct LocalCopies {
    queue: Mutex<VecDeque<Arc<LocalTransfer>>>,
    streams: Streams,
}

impl LocalCopies {
    /// Adds a transfer that has begun.
    pub fn push(&self, transfer: Arc<LocalTransfer>) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).push_back(transfer);
    }

    /// Whether something is to be copied.
    pub fn is_busy(&self) -> bool {
        match self.queue.try_lock() {
            Ok(queue) => !queue.is_empty(),
            Err(_) => true,
        }
    }

    /// Copies for one turn, unless another thread does. `notify` gets the notification of a transfer that is
    /// over; `late` is asked for the error of one that takes so long. Returns how much was done.
    pub fn drive(&self, notify: impl FnOnce(Vec<u8>), late: impl FnOnce(Duration) -> Option<Error>) -> usize {
        let mut queue = match self.queue.try_lock() {
            Ok(queue) => queue,
            Err(TryLockError::Poisoned(e)) => e.into_inner(),
            Err(TryLockError::WouldBlock) => return 0,
        };
        let Some(front) = queue.front() else { return 0 };
        if let Some(outcome) = front.advance(&self.streams, late) {
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
