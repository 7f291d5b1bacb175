//! Lists of RMA operations: what a transfer is after it was prepared.
//!
//! Everything that can be checked about an operation is checked when its list is made, once for all posts of it: that
//! its local bytes lie in a region, that one operation takes them, that the region is of the NIC that is to move it.
//! Posting then only reads the list.

use std::ops::Range;
use std::sync::Arc;

use super::error::FabricError;
use super::memory::{MemoryRegion, RegisteredBuffer};

/// One RMA operation: a piece of local memory and its place at the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slice {
    /// Local virtual address.
    pub local_addr: u64,
    /// Remote address as the provider wants it: virtual, or offset into the remote region.
    pub remote_addr: u64,
    /// Bytes.
    pub len: u32,
    /// Which pair of regions it lies in.
    pub pair: u32,
}

/// A pair of regions as one lane sees it: the local one as its NIC knows it, and the key of the remote one at the
/// endpoint that the lane leads to.
#[derive(Debug, Clone)]
pub struct Way {
    /// Registration of the local memory.
    pub region: MemoryRegion,
    /// Key of the remote registration.
    pub key: u64,
}

/// Operations that go over any of some lanes, each over one.
pub struct RmaList {
    slices: Box<[Slice]>,
    /// Those of the first lane, then those of the second, and so on.
    ways: Box<[Way]>,
    pairs: usize,
    bytes: u64,
}

impl RmaList {
    /// A list of `slices`, which lie in so many pairs of regions. `ways` has one for each pair, lane after lane.
    pub fn new(slices: Vec<Slice>, ways: Vec<Way>, pairs: usize) -> Result<Self, FabricError> {
        if ways.is_empty() || pairs == 0 || !ways.len().is_multiple_of(pairs) {
            return Err(refused(format!("{} ways for lanes of {pairs}", ways.len())));
        }
        for lane in ways.chunks(pairs) {
            if lane.iter().any(|way| !Arc::ptr_eq(way.region.domain(), lane[0].region.domain())) {
                return Err(refused("the ways of a lane are registered on several NICs"));
            }
        }
        let len_max = ways
            .iter()
            .step_by(pairs)
            .map(|way| way.region.domain().device().max_msg_size())
            .min()
            .unwrap_or(0) as u64;
        let locals: Vec<_> =
            (0..pairs).map(|pair| everywhere(ways.iter().skip(pair).step_by(pairs))).collect();
        let mut bytes = 0;
        let (mut known, mut start, mut size, mut longest) = (u32::MAX, 0, 0, 0);
        for slice in &slices {
            if slice.pair != known {
                known = slice.pair;
                let local = locals.get(known as usize).cloned().unwrap_or_default();
                (start, size) = (local.start, local.end.saturating_sub(local.start));
                longest = len_max.min(size);
            }
            let (offset, len) = (slice.local_addr.wrapping_sub(start), u64::from(slice.len));
            if len > longest || offset > size - len {
                return Err(refused(format!(
                    "{} bytes at {:#x} are not inside their region, or more than one operation takes ({len_max})",
                    slice.len, slice.local_addr
                )));
            }
            bytes += len;
        }
        if u32::try_from(slices.len()).is_err() {
            return Err(refused("a transfer may have at most 4294967295 operations"));
        }
        Ok(Self { slices: slices.into(), ways: ways.into(), pairs, bytes })
    }

    /// Operations.
    pub fn len(&self) -> u32 {
        self.slices.len() as u32
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.slices.is_empty()
    }

    /// Bytes in all.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The operations.
    pub fn slices(&self) -> &[Slice] {
        &self.slices
    }

    /// One byte of the remote memory of a lane, to be read into a buffer.
    pub fn probe(&self, lane: u16, answer: &RegisteredBuffer) -> Result<Self, FabricError> {
        let (Some(slice), Some(ways)) = (self.slices.first(), self.lane(lane)) else {
            return Err(refused(format!("{self:?} has no lane {lane}")));
        };
        let way = Way { region: answer.region().clone(), key: ways[slice.pair as usize].key };
        let byte = Slice { local_addr: answer.addr_of(0), remote_addr: slice.remote_addr, len: 1, pair: 0 };
        Self::new(vec![byte], vec![way], 1)
    }

    /// The ways of a lane, one for each pair. All are of one NIC.
    pub(super) fn lane(&self, lane: u16) -> Option<&[Way]> {
        self.ways.chunks(self.pairs).nth(lane.into())
    }
}

impl std::fmt::Debug for RmaList {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} operations of {} bytes over {} lanes",
            self.slices.len(),
            self.bytes,
            self.ways.len() / self.pairs
        )
    }
}

/// Local addresses that lie in the regions of all these ways.
fn everywhere<'a>(ways: impl Iterator<Item = &'a Way>) -> Range<u64> {
    let range = |way: &Way| way.region.addr()..way.region.addr() + way.region.len();
    let common = |a: Range<u64>, b: Range<u64>| a.start.max(b.start)..a.end.min(b.end);
    ways.map(range).reduce(common).unwrap_or_default()
}

fn refused(text: impl Into<String>) -> FabricError {
    FabricError::refused("prepare", text)
}
