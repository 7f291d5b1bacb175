//! Where a request stands: asked by the host from any thread, while whoever drives the rails ends its posts.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result, Status};

// 0 is the state of a request that was never posted.
const IN_FLIGHT: u8 = 1;
const DONE: u8 = 2;
const FAILED: u8 = 3;

/// Where the last post of a request stands. One that was never posted is idle.
#[derive(Debug, Default)]
pub struct PostState {
    state: AtomicU8,
    stopped: AtomicBool,
    error: Mutex<Option<Error>>,
}

impl PostState {
    /// Whether the last post is not over.
    pub fn is_in_flight(&self) -> bool {
        self.state.load(Ordering::Acquire) == IN_FLIGHT
    }

    /// Fails while the last post is not over.
    pub fn check_postable(&self) -> Result<()> {
        if self.is_in_flight() {
            return Err(Error::new(
                Status::RepostActive,
                "the transfer is still in flight; post it again when checkXfer has said that it is done",
            ));
        }
        Ok(())
    }

    /// A post is in flight from here on. All that belongs to it was written before.
    pub fn begin(&self) {
        *self.lock() = None;
        self.stopped.store(false, Ordering::Relaxed);
        self.state.store(IN_FLIGHT, Ordering::Release);
    }

    /// What has not begun of the post should not begin any more.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// Whether [`stop`](Self::stop) or [`fail`](Self::fail) was called since the post began.
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// Stops the post, and keeps its first error. Returns whether this one is.
    pub fn fail(&self, error: Error) -> bool {
        self.stop();
        let mut first = self.lock();
        let is_first = first.is_none();
        first.get_or_insert(error);
        is_first
    }

    /// The error of the post, if it has one.
    pub fn failure(&self) -> Option<Error> {
        self.lock().clone()
    }

    /// The post is over, by this error or well: nothing of it is in flight. One that is said to be well stays so,
    /// whatever error comes after.
    pub fn end(&self, error: Option<Error>) {
        let state = if error.is_some() { FAILED } else { DONE };
        if let Some(error) = error {
            self.fail(error);
        }
        self.state.store(state, Ordering::Release);
    }

    /// The error of a post that has failed.
    pub fn error(&self) -> Error {
        self.failure().unwrap_or_else(|| Error::backend("the transfer failed"))
    }

    /// What checkXfer answers.
    pub fn status(&self) -> Result<Status> {
        match self.state.load(Ordering::Acquire) {
            IN_FLIGHT => Ok(Status::InProgress),
            DONE => Ok(Status::Success),
            FAILED => Err(self.error()),
            _ => Err(Error::new(Status::NotPosted, "the transfer was never posted")),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Error>> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
