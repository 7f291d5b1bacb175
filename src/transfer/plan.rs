//! Plans: how a transfer is spread over rails. Pure: numbers in, slices out.
//!
//! Made once by prepXfer. Neighbours that are contiguous on both sides within one registration become one
//! piece; large pieces are cut into chunks that go to the rail with the fewest planned bytes; small ones go
//! whole. The result is one flat array of slices, grouped by rail and destination.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::rail::Slice;
use crate::types::RailId;

/// One way for a piece: a local rail, and the peer's endpoint with the remote key that belongs to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lane {
    /// Local rail.
    pub rail: RailId,
    /// Index of the peer's endpoint.
    pub endpoint: u16,
    /// Key of the remote region at that endpoint.
    pub key: u64,
}

/// Pairs the rails on which the local region is registered with the peer's endpoints that have a key for the
/// remote one, so that every rail of the smaller side is used, whatever the two counts are.
pub fn pair_lanes(rails: &[RailId], keys: &[Option<u64>]) -> Vec<Lane> {
    let remote: Vec<(u16, u64)> =
        keys.iter().enumerate().filter_map(|(i, key)| key.map(|key| (i as u16, key))).collect();
    if rails.is_empty() || remote.is_empty() {
        return Vec::new();
    }
    (0..rails.len().max(remote.len()))
        .map(|i| {
            let (endpoint, key) = remote[i % remote.len()];
            Lane { rail: rails[i % rails.len()], endpoint, key }
        })
        .collect()
}

/// A descriptor pair, with its regions as indices into the caller's tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Local virtual address.
    pub local_addr: u64,
    /// Remote address in the form that the provider takes.
    pub remote_addr: u64,
    /// Bytes, equal on both sides.
    pub len: u64,
    /// Index of the local region.
    pub region: u32,
    /// Index of the lane table that fits this pair of regions.
    pub lanes: u32,
}

/// How large pieces are cut.
#[derive(Debug, Clone, Copy)]
pub struct Cutting {
    /// Pieces shorter than this go whole over one rail.
    pub striping_threshold_bytes: u64,
    /// Longest slice where a piece is spread over rails.
    pub chunk_bytes_max: u64,
    /// Longest slice that the provider takes.
    pub message_bytes_max: u64,
}

/// Shortest chunk of a piece that is spread: below it the cost of an operation outweighs a second rail.
const CHUNK_BYTES_MIN: u64 = 128 * 1024;
/// Chunks begin at multiples of this from the start of their piece.
const CHUNK_ALIGN: u64 = 4096;

/// Slices for one rail and one of the peer's endpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedRun {
    /// Local rail.
    pub rail: RailId,
    /// Index of the peer's endpoint.
    pub endpoint: u16,
    /// Its slices in [`Plan::slices`].
    pub range: Range<u32>,
}

/// A transfer spread over rails.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// All slices, those of a run together.
    pub slices: Vec<Slice>,
    /// The runs.
    pub runs: Vec<PlannedRun>,
    /// Bytes in all.
    pub bytes: u64,
}

/// Joins pieces that continue one another on both sides, within one pair of regions.
pub fn merge(pieces: impl Iterator<Item = Piece>) -> Vec<Piece> {
    let mut merged: Vec<Piece> = Vec::with_capacity(pieces.size_hint().0);
    for piece in pieces {
        if let Some(last) = merged.last_mut() {
            let continues = last.local_addr + last.len == piece.local_addr
                && last.remote_addr + last.len == piece.remote_addr
                && (last.region, last.lanes) == (piece.region, piece.lanes);
            if continues {
                last.len += piece.len;
                continue;
            }
        }
        merged.push(piece);
    }
    merged
}

/// Cuts and spreads `pieces`. `turn` decides who comes first among equals, so that transfers of one small
/// piece do not all take the first rail.
pub fn spread(pieces: &[Piece], lane_tables: &[Vec<Lane>], cutting: &Cutting, turn: usize) -> Result<Plan> {
    let mut groups = Groups::default();
    let tables: Vec<Vec<(usize, u64)>> = lane_tables
        .iter()
        .map(|lanes| lanes.iter().map(|lane| (groups.index_of(*lane), lane.key)).collect())
        .collect();
    let mut bytes = 0u64;
    for piece in pieces {
        let lanes = &tables[piece.lanes as usize];
        if lanes.is_empty() {
            return Err(Error::invalid("the peer's metadata has no remote key that any local rail can use"));
        }
        bytes += piece.len;
        let chunk = chunk_len(piece.len, lanes.len() as u64, cutting);
        let mut offset = 0;
        while offset < piece.len {
            let len = chunk.min(piece.len - offset);
            let (group, remote_key) = groups.least_loaded(lanes, turn);
            group.push(Slice {
                local_addr: piece.local_addr + offset,
                remote_addr: piece.remote_addr + offset,
                remote_key,
                len,
                region: piece.region,
            });
            offset += len;
        }
    }
    groups.into_plan(bytes)
}

/// Length of the slices of a piece.
fn chunk_len(len: u64, lanes: u64, cutting: &Cutting) -> u64 {
    let whole = cutting.message_bytes_max;
    if lanes == 1 || len < cutting.striping_threshold_bytes {
        return whole;
    }
    let share = len.div_ceil(lanes).next_multiple_of(CHUNK_ALIGN);
    share.clamp(CHUNK_BYTES_MIN, cutting.chunk_bytes_max.max(CHUNK_BYTES_MIN)).min(whole)
}

struct Group {
    rail: RailId,
    endpoint: u16,
    slices: Vec<Slice>,
    bytes: u64,
}

impl Group {
    fn push(&mut self, slice: Slice) {
        self.bytes += slice.len;
        self.slices.push(slice);
    }
}

#[derive(Default)]
struct Groups(Vec<Group>);

impl Groups {
    fn least_loaded(&mut self, lanes: &[(usize, u64)], turn: usize) -> (&mut Group, u64) {
        let in_turn = (0..lanes.len()).map(|i| lanes[(turn + i) % lanes.len()]);
        let (group, key) = in_turn.min_by_key(|(group, _)| self.0[*group].bytes).expect("there is a lane");
        (&mut self.0[group], key)
    }

    fn index_of(&mut self, lane: Lane) -> usize {
        if let Some(i) = self.0.iter().position(|g| (g.rail, g.endpoint) == (lane.rail, lane.endpoint)) {
            return i;
        }
        self.0.push(Group { rail: lane.rail, endpoint: lane.endpoint, slices: Vec::new(), bytes: 0 });
        self.0.len() - 1
    }

    fn into_plan(self, bytes: u64) -> Result<Plan> {
        let mut plan = Plan { bytes, ..Plan::default() };
        for group in self.0.into_iter().filter(|g| !g.slices.is_empty()) {
            let start = plan.slices.len() as u32;
            plan.slices.extend(group.slices);
            let end = u32::try_from(plan.slices.len())
                .map_err(|_| Error::invalid("a transfer may have at most 4294967295 slices"))?;
            plan.runs.push(PlannedRun { rail: group.rail, endpoint: group.endpoint, range: start..end });
        }
        Ok(plan)
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
            let keys: Vec<_> = (0..remote as u64).map(Some).collect();
            let lanes = pair_lanes(&rails(local), &keys);
            let mut used_rails: Vec<_> = lanes.iter().map(|l| l.rail).collect();
            let mut used_endpoints: Vec<_> = lanes.iter().map(|l| l.endpoint).collect();
            used_rails.sort_unstable();
            used_rails.dedup();
            used_endpoints.sort_unstable();
            used_endpoints.dedup();
            prop_assert_eq!(used_rails.len(), local as usize);
            prop_assert_eq!(used_endpoints.len(), remote);
            prop_assert!(lanes.iter().all(|l| l.key == u64::from(l.endpoint)));
        }

        #[test]
        fn a_plan_covers_every_byte_once(
            lens in prop::collection::vec(0u64..3_000_000, 1..40),
            local in 1u16..9,
            remote in 1usize..9,
            turn in 0usize..100,
        ) {
            let keys: Vec<_> = (0..remote as u64).map(|k| Some(k + 7)).collect();
            let lanes = vec![pair_lanes(&rails(local), &keys)];
            let mut pieces = Vec::new();
            let mut at = 0;
            for len in lens {
                pieces.push(Piece { local_addr: at, remote_addr: at ^ (1 << 40), len, region: 0, lanes: 0 });
                at += len + 1;
            }
            let plan = spread(&pieces, &lanes, &CUTTING, turn).unwrap();
            let mut covered: Vec<_> = plan.slices.iter().map(|s| (s.local_addr, s.len, s.remote_addr)).collect();
            covered.sort_unstable();
            prop_assert_eq!(covered.iter().map(|c| c.1).sum::<u64>(), plan.bytes);
            let mut expected = pieces.iter().filter(|p| p.len > 0).peekable();
            let mut offset = 0;
            for (addr, len, remote) in covered {
                let piece = expected.peek().unwrap();
                prop_assert_eq!(addr, piece.local_addr + offset);
                prop_assert_eq!(remote, piece.remote_addr + offset);
                offset += len;
                if offset == piece.len {
                    expected.next();
                    offset = 0;
                }
            }
            prop_assert!(expected.next().is_none());
            let mut next = 0;
            for run in &plan.runs {
                prop_assert_eq!(run.range.start, next);
                next = run.range.end;
                for slice in &plan.slices[run.range.start as usize..run.range.end as usize] {
                    prop_assert_eq!(slice.remote_key, u64::from(run.endpoint) + 7);
                }
            }
            prop_assert_eq!(next as usize, plan.slices.len());
        }

        #[test]
        fn merging_keeps_the_bytes(cuts in prop::collection::vec(1u64..100, 1..20), gap in 0usize..20) {
            let mut at = 0;
            let pieces: Vec<_> = cuts.iter().enumerate().map(|(i, &len)| {
                if i == gap { at += 1; }
                let piece = Piece { local_addr: at, remote_addr: at + 500, len, region: 0, lanes: 0 };
                at += len;
                piece
            }).collect();
            let merged = merge(pieces.iter().copied());
            prop_assert_eq!(merged.iter().map(|p| p.len).sum::<u64>(), cuts.iter().sum::<u64>());
            prop_assert_eq!(merged.len(), if gap > 0 && gap < cuts.len() { 2 } else { 1 });
        }
    }

    #[test]
    fn large_pieces_use_all_lanes_and_small_ones_take_turns() {
        let lanes = vec![pair_lanes(&rails(4), &[Some(1), Some(2), Some(3), Some(4)])];
        let piece = |len| Piece { local_addr: 0, remote_addr: 0, len, region: 0, lanes: 0 };
        assert_eq!(spread(&[piece(64 << 20)], &lanes, &CUTTING, 0).unwrap().runs.len(), 4);
        let first: Vec<_> =
            (0..4).map(|turn| spread(&[piece(64)], &lanes, &CUTTING, turn).unwrap().runs[0].rail).collect();
        assert_eq!(first, rails(4));
    }

    #[test]
    fn keys_that_are_not_there_leave_no_lane() {
        assert!(pair_lanes(&rails(2), &[None, None]).is_empty());
        assert!(pair_lanes(&[], &[Some(1)]).is_empty());
        assert_eq!(pair_lanes(&rails(1), &[None, Some(9)])[0], Lane { rail: RailId(0), endpoint: 1, key: 9 });
        let piece = Piece { local_addr: 0, remote_addr: 0, len: 1, region: 0, lanes: 0 };
        assert!(spread(&[piece], &[Vec::new()], &CUTTING, 0).is_err());
    }
}
