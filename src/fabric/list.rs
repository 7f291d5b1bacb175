//! Lists of RMA operations: what a transfer is after it was prepared.
//!
//! Everything that can be checked about an operation is checked when its list is made, once for all posts of it: that
//! its local bytes lie in a region, that one operation takes them, that the region is of the NIC that is to move it.
//! Posting then only reads the list.

use std::ops::Range;
use std::sync::Arc;

use super::domain::Domain;
use super::error::FabricError;
use super::memory::MemoryRegion;

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

pub(super) struct Lane {
    pub(super) domain: Arc<Domain>,
    /// One for each pair.
    pub(super) ways: Box<[Way]>,
}

/// Operations that go over any of some lanes, each over one.
pub struct RmaList {
    slices: Box<[Slice]>,
    lanes: Box<[Lane]>,
    bytes: u64,
}

impl RmaList {
    /// A list of `slices`. `lanes` has, for each lane, a way for each pair.
    pub fn new(slices: Vec<Slice>, lanes: Vec<Vec<Way>>) -> Result<Self, FabricError> {
        let lanes = lanes.into_iter().map(Lane::new).collect::<Result<Box<[_]>, _>>()?;
        let pairs = pairs_of(&lanes)?;
        let len_max = lanes.iter().map(|lane| lane.domain.device().max_msg_size()).min().unwrap_or(0) as u64;
        let mut bytes = 0;
        let (mut known, mut start, mut size, mut longest) = (u32::MAX, 0, 0, 0);
        for slice in &slices {
            if slice.pair != known {
                known = slice.pair;
                let local = pairs.get(known as usize).cloned().unwrap_or_default();
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
        Ok(Self { slices: slices.into(), lanes, bytes })
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

    pub(super) fn lane(&self, lane: u16) -> Option<&Lane> {
        self.lanes.get(lane as usize)
    }
}

impl std::fmt::Debug for RmaList {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} operations of {} bytes over {} lanes", self.slices.len(), self.bytes, self.lanes.len())
    }
}

impl Lane {
    fn new(ways: Vec<Way>) -> Result<Self, FabricError> {
        let first = ways.first().ok_or_else(|| refused("a lane without a way"))?;
        let domain = Arc::clone(first.region.domain());
        if ways.iter().any(|way| !Arc::ptr_eq(way.region.domain(), &domain)) {
            return Err(refused("the ways of a lane are registered on several NICs"));
        }
        Ok(Self { domain, ways: ways.into() })
    }
}

/// Local addresses of each pair that lie in its region on every lane.
fn pairs_of(lanes: &[Lane]) -> Result<Vec<Range<u64>>, FabricError> {
    let count = lanes.first().map_or(0, |lane| lane.ways.len());
    if lanes.iter().any(|lane| lane.ways.len() != count) {
        return Err(refused("lanes with different numbers of ways"));
    }
    let range = |way: &Way| way.region.addr()..way.region.addr() + way.region.len();
    let common = |a: Range<u64>, b: Range<u64>| a.start.max(b.start)..a.end.min(b.end);
    let everywhere = |pair: usize| lanes.iter().map(|lane| range(&lane.ways[pair])).reduce(common);
    Ok((0..count).filter_map(everywhere).collect())
}

fn refused(text: impl Into<String>) -> FabricError {
    FabricError::refused("prepare", text)
}
