//! Plans: how a transfer becomes slices. Pure: numbers in, slices out.
//!
//! Made once by prepXfer. Neighbours that are contiguous on both sides within one pair of regions become one piece;
//! large pieces are cut into chunks, small ones go whole. Which rail moves a slice is decided when it is moved.

use crate::fabric::Slice;
use crate::types::RailId;

/// One way from here to the peer: a local rail, and an endpoint of the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Lane {
    /// Local rail.
    pub rail: RailId,
    /// Index of the peer's endpoint.
    pub endpoint: u16,
}

/// Pairs the rails on which the local region is registered with the peer's endpoints that have a key for the
/// remote one, so that every rail of the smaller side is used, whatever the two counts are. Gives the keys with the
/// lanes.
pub fn pair_lanes(rails: &[RailId], keys: &[Option<u64>]) -> (Vec<Lane>, Vec<u64>) {
    let remote: Vec<(u16, u64)> =
        keys.iter().enumerate().filter_map(|(i, key)| key.map(|key| (i as u16, key))).collect();
    if rails.is_empty() || remote.is_empty() {
        return (Vec::new(), Vec::new());
    }
    (0..rails.len().max(remote.len()))
        .map(|i| {
            let (endpoint, key) = remote[i % remote.len()];
            (Lane { rail: rails[i % rails.len()], endpoint }, key)
        })
        .unzip()
}

/// Whether a lane may lead to a peer that these did not lead to: whether one device that has failed, here or there, would
/// explain all of them, and the lane does without it. What takes two devices to explain is a peer that is gone.
pub fn may_lead(lost: &[Lane], lane: Lane) -> bool {
    let Some(first) = lost.first() else { return true };
    let all_of_rail = lost.iter().all(|other| other.rail == first.rail);
    let all_of_endpoint = lost.iter().all(|other| other.endpoint == first.endpoint);
    all_of_rail && lane.rail != first.rail || all_of_endpoint && lane.endpoint != first.endpoint
}

/// How large pieces are cut.
#[derive(Debug, Clone, Copy)]
pub struct Cutting {
    /// Pieces shorter than this are not cut for the sake of spreading.
    pub striping_threshold_bytes: u64,
    /// Longest slice of a piece that is spread over rails.
    pub chunk_bytes_max: u64,
    /// Longest slice that the provider takes.
    pub message_bytes_max: u64,
}

/// Shortest chunk of a piece that is spread: below it the cost of an operation outweighs a second rail. One more rail
/// is invited for each so many bytes of a transfer.
const CHUNK_BYTES_MIN: u64 = 128 * 1024;
/// Chunks begin at multiples of this from the start of their piece.
const CHUNK_ALIGN: u64 = 4096;
/// Longest slice of what no NIC moves: a multiple of the page size whose length fits.
const SLICE_BYTES_MAX: u64 = 1 << 31;
/// One more rail is invited for each so many slices.
const SLICES_PER_RAIL: usize = 16;

/// Rails that one post is worth.
pub fn rails_worth(slices: usize, bytes: u64, lanes: usize) -> usize {
    let by_bytes = usize::try_from(bytes.div_ceil(CHUNK_BYTES_MIN)).unwrap_or(usize::MAX);
    by_bytes.max(slices.div_ceil(SLICES_PER_RAIL)).min(slices).min(lanes).max(1)
}

/// Makes slices of descriptors that share their lanes: joins what continues, and cuts what is long.
#[derive(Debug)]
pub struct Cutter {
    /// Pieces up to this length are one slice.
    whole_bytes_max: u64,
    chunk_bytes_max: u64,
    message_bytes_max: u64,
    lanes: u64,
    slices: Vec<Slice>,
    /// The last piece, if it is too long for one slice; else it is the last slice.
    long: Option<Piece>,
}

#[derive(Debug, Clone, Copy)]
struct Piece {
    local_addr: u64,
    remote_addr: u64,
    len: u64,
    pair: u32,
}

impl Piece {
    fn continues(&self, last: &Self) -> bool {
        let ends =
            (last.local_addr.wrapping_add(last.len), last.remote_addr.wrapping_add(last.len), last.pair);
        (self.local_addr, self.remote_addr, self.pair) == ends
    }
}

impl From<Slice> for Piece {
    fn from(Slice { local_addr, remote_addr, len, pair }: Slice) -> Self {
        Self { local_addr, remote_addr, len: len.into(), pair }
    }
}

impl Cutter {
    /// For descriptors that go over so many lanes; room for `capacity` of them is made.
    pub fn new(cutting: &Cutting, lanes: usize, capacity: usize) -> Self {
        // A slice's length has 32 bits.
        let message_bytes_max = cutting.message_bytes_max.min(u32::MAX.into());
        let spread_from = if lanes > 1 { cutting.striping_threshold_bytes } else { u64::MAX };
        Self {
            whole_bytes_max: spread_from.saturating_sub(1).min(message_bytes_max),
            chunk_bytes_max: cutting.chunk_bytes_max.max(CHUNK_BYTES_MIN),
            message_bytes_max,
            lanes: lanes as u64,
            slices: Vec::with_capacity(capacity),
            long: None,
        }
    }

    /// For descriptors that no NIC moves: nothing is cut but what a slice cannot hold.
    pub fn whole(capacity: usize) -> Self {
        let longest = SLICE_BYTES_MAX;
        let cutting = Cutting {
            striping_threshold_bytes: longest,
            chunk_bytes_max: longest,
            message_bytes_max: longest,
        };
        Self::new(&cutting, 1, capacity)
    }

    /// Adds pairs of descriptors of one pair of regions: address here, address there, length. Returns how many there were.
    /// None of them wraps around, or it will be refused when its region is looked at.
    #[inline]
    pub fn extend(&mut self, pair: u32, pieces: impl Iterator<Item = (u64, u64, u64)>) -> usize {
        let mut count = 0;
        // Where the last piece ends here, and up to which length others are a slice at once.
        let (mut end, mut plain_max) = self.state();
        for (local_addr, remote_addr, len) in pieces {
            count += 1;
            // One comparison tells what is rare: nothing to move, or more than one slice takes.
            if len.wrapping_sub(1) < plain_max && local_addr != end {
                self.slices.push(Slice { local_addr, remote_addr, len: len as u32, pair });
                end = local_addr.wrapping_add(len);
            } else if len > 0 {
                self.add_slowly(Piece { local_addr, remote_addr, len, pair });
                (end, plain_max) = self.state();
            }
        }
        count
    }

    /// The slices.
    pub fn finish(mut self) -> Vec<Slice> {
        self.cut_long();
        self.slices
    }

    fn state(&self) -> (u64, u64) {
        match (&self.long, self.slices.last()) {
            (Some(long), _) => (long.local_addr.wrapping_add(long.len), 0),
            (None, Some(last)) => (last.local_addr.wrapping_add(last.len.into()), self.whole_bytes_max),
            (None, None) => (0, self.whole_bytes_max),
        }
    }

    fn add_slowly(&mut self, piece: Piece) {
        if let Some(long) = &mut self.long {
            if piece.continues(long) {
                long.len = long.len.saturating_add(piece.len);
                return;
            }
            self.cut_long();
        } else if let Some(last) = self.slices.last_mut() {
            let mut whole = Piece::from(*last);
            if piece.continues(&whole) {
                whole.len = whole.len.saturating_add(piece.len);
                if whole.len <= self.whole_bytes_max {
                    last.len = whole.len as u32;
                } else {
                    self.slices.pop();
                    self.long = Some(whole);
                }
                return;
            }
        }
        self.long = Some(piece);
        if piece.len <= self.whole_bytes_max {
            self.cut_long();
        }
    }

    fn cut_long(&mut self) {
        let Some(Piece { local_addr, remote_addr, len, pair }) = self.long.take() else { return };
        let chunk = self.chunk_len(len);
        let mut offset = 0;
        while offset < len {
            let len = chunk.min(len - offset) as u32;
            let (local_addr, remote_addr) =
                (local_addr.wrapping_add(offset), remote_addr.wrapping_add(offset));
            self.slices.push(Slice { local_addr, remote_addr, len, pair });
            offset += u64::from(len);
        }
    }

    /// Length of the slices of a piece.
    fn chunk_len(&self, len: u64) -> u64 {
        if len <= self.whole_bytes_max || self.lanes == 1 {
            return self.message_bytes_max;
        }
        let share = len.div_ceil(self.lanes).next_multiple_of(CHUNK_ALIGN);
        share.clamp(CHUNK_BYTES_MIN, self.chunk_bytes_max).min(self.message_bytes_max)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CUTTING: Cutting = Cutting {
        striping_threshold_bytes: 128 * 1024,
        chunk_bytes_max: 1 << 20,
        message_bytes_max: 1 << 30,
    };

    fn rails(count: u16) -> Vec<RailId> {
        (0..count).map(RailId).collect()
    }

    proptest! {
        #[test]
        fn every_rail_of_the_smaller_side_is_used(local in 1u16..40, remote in 1usize..40) {
            let keys: Vec<_> = (0..remote as u64).map(|k| Some(k + 7)).collect();
            let (lanes, keys) = pair_lanes(&rails(local), &keys);
            let mut used_rails: Vec<_> = lanes.iter().map(|l| l.rail).collect();
            let mut used_endpoints: Vec<_> = lanes.iter().map(|l| l.endpoint).collect();
            used_rails.sort_unstable();
            used_rails.dedup();
            used_endpoints.sort_unstable();
            used_endpoints.dedup();
            prop_assert_eq!(used_rails.len(), local as usize);
            prop_assert_eq!(used_endpoints.len(), remote);
            prop_assert!(lanes.iter().zip(&keys).all(|(lane, key)| *key == u64::from(lane.endpoint) + 7));
        }

        /// Descriptors anywhere, some behind one another, in two pairs of regions.
        #[test]
        fn slices_cover_every_byte_once(
            descs in prop::collection::vec((0u64..3_000_000, any::<bool>(), 0u32..2), 0..40),
            lanes in 1usize..9,
            message_bytes_max in prop::sample::select(vec![4096u64, 1 << 20, 1 << 30]),
        ) {
            let mut cutter = Cutter::new(&Cutting { message_bytes_max, ..CUTTING }, lanes, descs.len());
            let (mut at, mut last, mut expected, mut pieces) = (1 << 20, 0, Vec::new(), Vec::new());
            for (len, continues, pair) in descs {
                // The other pair's memory is elsewhere.
                let continues = continues && pair == last;
                at += u64::from(!continues);
                pieces.push((pair, (at + (u64::from(pair) << 50), at ^ (1 << 40), len)));
                expected.extend((len > 0).then_some((at, at + len, pair)));
                at += len;
                last = pair;
            }
            for run in pieces.chunk_by(|a, b| a.0 == b.0) {
                prop_assert_eq!(cutter.extend(run[0].0, run.iter().map(|piece| piece.1)), run.len());
            }
            let slices = cutter.finish();
            let mut bytes = slices.iter().flat_map(|slice| {
                let start = slice.local_addr - (u64::from(slice.pair) << 50);
                assert_eq!(start ^ (1 << 40), slice.remote_addr);
                assert!(slice.len > 0 && u64::from(slice.len) <= message_bytes_max);
                [(start, start + u64::from(slice.len), slice.pair)]
            });
            // Slices in order give the descriptors, joined or cut.
            let mut open: Option<(u64, u64, u32)> = None;
            for (start, end, pair) in expected {
                let mut reached = start;
                while reached < end {
                    let (from, to, of) = open.take().or_else(|| bytes.next()).expect("a slice lacks");
                    prop_assert_eq!((from, of), (reached, pair));
                    reached = to.min(end);
                    open = (to > reached).then_some((reached, to, of));
                }
            }
            prop_assert!(open.is_none() && bytes.next().is_none());
        }

        #[test]
        fn a_post_is_worth_a_rail_at_least_and_no_more_than_there_are(
            slices in 1usize..100_000, bytes in 1u64..1 << 40, lanes in 1usize..64,
        ) {
            let worth = rails_worth(slices, bytes, lanes);
            prop_assert!((1..=lanes.min(slices)).contains(&worth));
            prop_assert!(rails_worth(slices + 1, bytes + (1 << 20), lanes) >= worth);
        }
    }

    #[test]
    fn neighbours_join_and_large_pieces_are_cut_for_all_lanes() {
        let cut = |lanes, descs: &[(u64, u64)]| {
            let mut cutter = Cutter::new(&CUTTING, lanes, 0);
            cutter.extend(0, descs.iter().map(|&(addr, len)| (addr, addr + 500, len)));
            cutter.finish().into_iter().map(|slice| u64::from(slice.len)).collect::<Vec<_>>()
        };
        assert_eq!(cut(4, &[(10, 20), (30, 5), (36, 1)]), [25, 1]);
        assert_eq!(cut(4, &[(0, 64 << 20)]).len(), 64);
        assert_eq!(cut(4, &[(0, 512 << 10)]), [128 << 10; 4]);
        assert_eq!(cut(1, &[(0, 64 << 20)]), [64 << 20]);
        assert_eq!(cut(1, &[(0, 3 << 30)]), [1 << 30; 3]);
        assert!(cut(4, &[(0, 0), (7, 0)]).is_empty());
    }

    #[test]
    fn small_posts_take_one_rail_and_large_ones_all() {
        assert_eq!(rails_worth(1, 4096, 4), 1);
        assert_eq!(rails_worth(16, 65_536, 4), 1);
        assert_eq!(rails_worth(17, 69_632, 4), 2);
        assert_eq!(rails_worth(4, 512 << 10, 4), 4);
        assert_eq!(rails_worth(4096, 16 << 20, 32), 32);
    }

    #[test]
    fn keys_that_are_not_there_leave_no_lane() {
        assert!(pair_lanes(&rails(2), &[None, None]).0.is_empty());
        assert!(pair_lanes(&[], &[Some(1)]).0.is_empty());
        let (lanes, keys) = pair_lanes(&rails(1), &[None, Some(9)]);
        assert_eq!((lanes[0], keys[0]), (Lane { rail: RailId(0), endpoint: 1 }, 9));
    }
}
