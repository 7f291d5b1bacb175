//! Notifications that wait for the user.

use crate::sync::{AtomicU64, Mutex, Ordering, PoisonError};
use crate::types::AgentName;

/// A notification's sender and message.
pub type Notification = (AgentName, Vec<u8>);

/// What one notification costs beside its bytes, about.
const NOTIFICATION_COST: u64 = 64;

/// Notifications in order of arrival.
///
/// Nothing is dropped: a user who never asks is met by [`has_room`](Self::has_room), on which whoever reads the
/// network leaves messages there, and the fabric holds back their senders.
#[derive(Debug)]
pub struct Inbox {
    waiting: Mutex<Vec<Notification>>,
    /// Cost of what waits. Changed under the lock, read without it.
    bytes: AtomicU64,
    bytes_max: u64,
}

impl Inbox {
    /// Full from `bytes_max` on.
    pub fn new(bytes_max: u64) -> Self {
        Self { waiting: Mutex::new(Vec::new()), bytes: AtomicU64::new(0), bytes_max }
    }

    /// Appends one.
    pub fn push(&self, from: AgentName, message: Vec<u8>) {
        let cost = message.len() as u64 + NOTIFICATION_COST;
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.push((from, message));
        self.bytes.fetch_add(cost, Ordering::Relaxed);
    }

    /// Takes everything. Costs no lock when there is nothing, which is what most calls find.
    pub fn take(&self) -> Vec<Notification> {
        if self.bytes.load(Ordering::Relaxed) == 0 {
            return Vec::new();
        }
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        self.bytes.store(0, Ordering::Relaxed);
        std::mem::take(&mut waiting)
    }

    /// Whether more should be read from the network.
    pub fn has_room(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) < self.bytes_max
    }
}
