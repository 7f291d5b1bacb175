//! What has been moved to and from a peer. Counted where metrics are served.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::types::Op;

/// Transfers with a peer that are over.
#[derive(Debug, Default)]
pub struct Tally {
    /// By [`Op`]: how many, and their bytes.
    transfers: [AtomicU64; 2],
    bytes: [AtomicU64; 2],
    failed: AtomicU64,
}

impl Tally {
    /// One has gone well.
    pub fn add(&self, op: Op, bytes: u64) {
        self.transfers[op as usize].fetch_add(1, Ordering::Relaxed);
        self.bytes[op as usize].fetch_add(bytes, Ordering::Relaxed);
    }

    /// One has failed.
    pub fn add_failed(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    /// Transfers that went well, and their bytes.
    pub fn moved(&self, op: Op) -> (u64, u64) {
        let read = |of: &[AtomicU64; 2]| of[op as usize].load(Ordering::Relaxed);
        (read(&self.transfers), read(&self.bytes))
    }

    /// Transfers that failed.
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }
}
