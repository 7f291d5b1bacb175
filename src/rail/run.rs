//! Runs: the part of a transfer that goes over one rail to one destination.

use std::ops::Range;
use std::sync::Arc;

use super::Destination;
use crate::error::Error;
use crate::fabric::MemoryRegion;
use crate::types::Op;

/// One RMA operation: a piece of local memory and its place at the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slice {
    /// Local virtual address.
    pub local_addr: u64,
    /// Remote address as the provider wants it: virtual, or offset into the remote region.
    pub remote_addr: u64,
    /// Remote key, belonging to the destination's endpoint.
    pub remote_key: u64,
    /// Bytes.
    pub len: u64,
    /// Index of the local region in the run's table.
    pub region: u32,
}

/// Who is told about a run. Called while the rail is held: it must not drive any rail.
pub trait RunOwner: Send + Sync {
    /// Whether the rest of the run need not be posted.
    fn is_stopped(&self) -> bool;
    /// An operation of the run failed; the rest is not posted.
    fn on_error(&self, error: Error);
    /// Nothing of the run is in flight any more and nothing more of it will be posted. Called once.
    fn on_finished(self: Arc<Self>);
}

/// Slices of one transfer for one rail and one destination.
pub struct Run {
    /// Direction.
    pub op: Op,
    /// Where to.
    pub destination: Destination,
    /// Immediate data of each write.
    pub immediate: Option<u32>,
    /// All slices of the transfer.
    pub slices: Arc<[Slice]>,
    /// Those of this run.
    pub range: Range<u32>,
    /// Local regions on this rail, by [`Slice::region`]. Kept until the last operation has completed.
    pub regions: Arc<[MemoryRegion]>,
    /// Who is told.
    pub owner: Arc<dyn RunOwner>,
}
