//! Whether a thread sleeps, and that it is woken once: no wake-up is lost between its last look and its sleep.
//!
//! Checked by plugin-tests/sim/tests/interleavings.rs.

use crate::sync::{AtomicBool, Ordering, fence};

/// What a sleeper and those who wake it share. Either side writes and looks at what the other wrote after a fence, so one of two
/// that meet sees the other.
#[derive(Debug)]
pub(super) struct Asleep(AtomicBool);

impl Asleep {
    pub fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// The thread is about to sleep. It looks for work once more before it does.
    pub fn begin(&self) {
        self.0.store(true, Ordering::Release);
        fence(Ordering::SeqCst);
    }

    /// It is awake.
    pub fn end(&self) {
        self.0.store(false, Ordering::Release);
    }

    /// Whether whoever asks, who has left work, is to wake it: one of those who ask is told.
    pub fn is_to_be_woken(&self) -> bool {
        fence(Ordering::SeqCst);
        // Looked at first: posts ask, and most find the thread awake.
        self.0.load(Ordering::Acquire) && self.0.swap(false, Ordering::AcqRel)
    }
}
