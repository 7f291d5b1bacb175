//! A transfer request: prepared once, posted any number of times.
//!
//! What prepXfer allocates, postXfer reuses. A post counts its parts (one run for each rail and destination,
//! and the notification) and is over when the count is back at zero. Rails hold the request for as long as
//! anything of it is in flight, so a host that releases it early only lets go of its own share.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::plan::PlannedRun;
use super::state::PostState;
use crate::error::{Error, Result, Status};
use crate::fabric::MemoryRegion;
use crate::memory::{RegionUser, Registration, begin_uses};
use crate::peer::Peer;
use crate::rail::{Rail, Run, RunOwner, Slice};
use crate::types::Op;

/// A prepared transfer with one remote peer.
pub struct Transfer {
    op: Op,
    peer: Arc<Peer>,
    bytes: u64,
    slices: Arc<[Slice]>,
    runs: Vec<PlannedRun>,
    /// Local registrations in use; a run's regions stand in the same order.
    registrations: Vec<Arc<Registration>>,
    /// Regions of each run; none once one of the ranges is deregistered.
    regions: Mutex<Vec<Arc<[MemoryRegion]>>>,
    state: PostState,
    /// Parts of this post that are not over.
    parts: AtomicU32,
    post: Mutex<Post>,
}

/// How a peer tells the writes of a transfer from others.
#[derive(Debug, Clone, Copy)]
pub struct Announced {
    /// Our session with the peer, in which the number counts.
    pub session: u64,
    /// The transfer's number.
    pub id: u64,
    /// Immediate data of each write.
    pub immediate: u32,
}

/// What belongs to one post of the request.
#[derive(Debug, Default)]
struct Post {
    /// Sent when the data is here (READ).
    notification: Option<Vec<u8>>,
    /// How the peer counts the writes (WRITE with notification).
    announced: Option<Announced>,
    failed_at: Option<Instant>,
    posted_at: Option<Instant>,
    took: Option<Duration>,
}

impl Transfer {
    /// A request that was never posted. `regions` has one table for each of `runs`.
    pub fn new(
        op: Op,
        peer: Arc<Peer>,
        bytes: u64,
        slices: Vec<Slice>,
        runs: Vec<PlannedRun>,
        registrations: Vec<Arc<Registration>>,
        regions: Vec<Arc<[MemoryRegion]>>,
    ) -> Arc<Self> {
        debug_assert_eq!(runs.len(), regions.len());
        let transfer = Arc::new(Self {
            op,
            peer,
            bytes,
            slices: slices.into(),
            runs,
            registrations,
            regions: Mutex::new(regions),
            state: PostState::default(),
            parts: AtomicU32::new(0),
            post: Mutex::default(),
        });
        for registration in &transfer.registrations {
            let weak: Weak<Self> = Arc::downgrade(&transfer);
            registration.add_user(weak);
        }
        transfer
    }

    /// Direction.
    pub fn op(&self) -> Op {
        self.op
    }

    /// The peer.
    pub fn peer(&self) -> &Arc<Peer> {
        &self.peer
    }

    /// Bytes moved by one post.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// RMA operations of one post: for a WRITE, as many as the peer counts.
    pub fn slice_count(&self) -> u32 {
        self.slices.len() as u32
    }

    /// The rails that it uses, each once or more.
    pub fn runs(&self) -> &[PlannedRun] {
        &self.runs
    }

    /// How long the last successful post took.
    pub fn took(&self) -> Option<Duration> {
        self.lock().took
    }

    /// Begins a post: from here on it is in flight, whatever becomes of it.
    pub fn begin(&self, notification: Option<Vec<u8>>) -> Result<()> {
        self.state.check_postable()?;
        begin_uses(self.registrations.iter()).map_err(|gone| {
            Error::not_found(format!("a local region of the transfer was deregistered: {gone}"))
        })?;
        *self.lock() = Post { notification, posted_at: Some(Instant::now()), ..Post::default() };
        // The poster's own part: the post cannot be over before all of it was handed out.
        self.parts.store(1, Ordering::Relaxed);
        self.state.begin();
        Ok(())
    }

    /// Counts one more part.
    pub fn add_part(&self) {
        self.parts.fetch_add(1, Ordering::Relaxed);
    }

    /// Hands the runs to their rails.
    pub fn launch(self: &Arc<Self>, rails: &[Arc<Rail>], announced: Option<Announced>) {
        self.lock().announced = announced;
        // While the post is in use of its registrations, their regions stay.
        let regions = self.lock_regions();
        debug_assert_eq!(self.runs.len(), regions.len());
        self.parts.fetch_add(self.runs.len() as u32, Ordering::Relaxed);
        for (run, regions) in self.runs.iter().zip(regions.iter()) {
            rails[run.rail.index()].submit(Run {
                op: self.op,
                destination: self.peer.destination(run.endpoint),
                immediate: announced.map(|announced| announced.immediate),
                slices: Arc::clone(&self.slices),
                range: run.range.clone(),
                regions: Arc::clone(regions),
                owner: Arc::clone(self) as Arc<dyn RunOwner>,
            });
        }
    }

    /// Records the first error; what is not posted yet stays so.
    pub fn fail(&self, error: Error) {
        let mut post = self.lock();
        if self.state.fail(error) {
            post.failed_at = Some(Instant::now());
        }
    }

    /// One part is over. The last one ends the post, or sends the notification of a READ as a further part.
    pub fn part_finished(self: &Arc<Self>) {
        if self.parts.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        // Errors are recorded under this lock: what is decided here is what the host is told.
        let mut post = self.lock();
        let failure = self.state.failure();
        if failure.is_none() {
            if let Some(message) = post.notification.take() {
                drop(post);
                self.parts.store(1, Ordering::Relaxed);
                self.peer.notify_after(self, message);
                return;
            }
            post.took = post.posted_at.map(|at| at.elapsed());
            if let Some(took) = post.took {
                self.peer.rates().record(self.bytes, took);
            }
        }
        let announced = post.announced;
        drop(post);
        if let (Some(_), Some(announced)) = (&failure, announced) {
            self.peer.report_failed_transfer(announced);
        }
        for registration in &self.registrations {
            registration.end_use();
        }
        self.state.end(failure);
    }

    /// What checkXfer answers. A failed post is reported when nothing of it is in flight any more, or when
    /// `drain_timeout` has passed since it failed.
    pub fn status(&self, drain_timeout: Duration, transfer_timeout: Option<Duration>) -> Result<Status> {
        let status = self.state.status()?;
        if status != Status::InProgress {
            return Ok(status);
        }
        if self.state.is_stopped() {
            let failed_at = self.lock().failed_at;
            if failed_at.is_some_and(|at| at.elapsed() > drain_timeout) {
                return Err(self.state.error());
            }
        } else if let Some(limit) = transfer_timeout {
            let posted_at = self.lock().posted_at;
            if posted_at.is_some_and(|at| at.elapsed() > limit) {
                self.fail(Error::backend(format!(
                    "the transfer with {} was not done after {} ms (transfer_timeout_ms)",
                    self.peer.name(),
                    limit.as_millis()
                )));
            }
        }
        Ok(status)
    }

    /// The host lets go of the request. In flight, it lives on in the rails until its last completion.
    pub fn release(&self) {
        self.state.stop();
        if self.state.is_in_flight() {
            self.fail(Error::new(Status::Canceled, "the transfer was released in flight"));
        }
    }

    fn lock_regions(&self) -> MutexGuard<'_, Vec<Arc<[MemoryRegion]>>> {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Post> {
        // Every update of the post is a plain store: a panic elsewhere leaves nothing half done.
        self.post.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RunOwner for Transfer {
    fn is_stopped(&self) -> bool {
        self.state.is_stopped()
    }

    fn on_error(&self, error: Error) {
        self.fail(error.context(format_args!("transfer with {}", self.peer.name())));
    }

    fn on_finished(self: Arc<Self>) {
        self.part_finished();
    }
}

impl RegionUser for Transfer {
    fn forget_regions(&self) {
        self.lock_regions().clear();
    }
}
