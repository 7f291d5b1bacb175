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
    cutting: Cutting,
    lanes: u64,
    slices: Vec<Slice>,
    /// The piece that the next descriptor may continue.
    open: Piece,
}

#[derive(Debug, Clone, Copy, Default)]
struct Piece {
    local_addr: u64,
    remote_addr: u64,
    len: u64,
    pair: u32,
}

impl Cutter {
    /// For descriptors that go over so many lanes; room for `capacity` of them is made.
    pub fn new(cutting: Cutting, lanes: usize, capacity: usize) -> Self {
        Self { cutting, lanes: lanes as u64, slices: Vec::with_capacity(capacity), open: Piece::default() }
    }

    /// Adds a descriptor pair. Addresses and length were checked: none of them wraps around.
    pub fn add(&mut self, local_addr: u64, remote_addr: u64, len: u64, pair: u32) {
        let open = &mut self.open;
        let continues = open.local_addr.wrapping_add(open.len) == local_addr
            && open.remote_addr.wrapping_add(open.len) == remote_addr
            && open.pair == pair;
        if continues {
            open.len += len;
            return;
        }
        let piece = std::mem::replace(open, Piece { local_addr, remote_addr, len, pair });
        self.cut(piece);
    }

    /// The slices.
    pub fn finish(mut self) -> Vec<Slice> {
        self.cut(self.open);
        self.slices
    }

    fn cut(&mut self, piece: Piece) {
        let Piece { local_addr, remote_addr, len, pair } = piece;
        let chunk = self.chunk_len(len);
        if len <= chunk {
            if len > 0 {
                self.slices.push(Slice { local_addr, remote_addr, len: len as u32, pair });
            }
            return;
        }
        let mut offset = 0;
        while offset < len {
            let len = chunk.min(len - offset) as u32;
            let (local_addr, remote_addr) = (local_addr + offset, remote_addr + offset);
            self.slices.push(Slice { local_addr, remote_addr, len, pair });
            offset += u64::from(len);
        }
    }

    /// Length of the slices of a piece; fits 32 bits, as what a provider takes does.
    fn chunk_len(&self, len: u64) -> u64 {
        let whole = self.cutting.message_bytes_max.min(u32::MAX.into());
        if self.lanes == 1 || len < self.cutting.striping_threshold_bytes {
            return whole;
        }
        let share = len.div_ceil(self.lanes).next_multiple_of(CHUNK_ALIGN);
        share.clamp(CHUNK_BYTES_MIN, self.cutting.chunk_bytes_max.max(CHUNK_BYTES_MIN)).min(whole)
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
            let mut cutter = Cutter::new(Cutting { message_bytes_max, ..CUTTING }, lanes, descs.len());
            let (mut at, mut last, mut expected) = (1 << 20, 0, Vec::new());
            for (len, continues, pair) in descs {
                // The other pair's memory is elsewhere.
                let continues = continues && pair == last;
                at += u64::from(!continues);
                cutter.add(at + (u64::from(pair) << 50), at ^ (1 << 40), len, pair);
                expected.extend((len > 0).then_some((at, at + len, pair)));
                at += len;
                last = pair;
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
            let mut cutter = Cutter::new(CUTTING, lanes, 0);
            for &(addr, len) in descs {
                cutter.add(addr, addr + 500, len, 0);
            }
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
