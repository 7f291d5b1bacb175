use std::sync::atomic::{AtomicU8, Ordering};

use proptest::prelude::*;

use super::*;
use crate::fabric::MemoryRange;
use crate::memory::Memory;
use crate::neighbour::{Board, Neighbour};

const BYTES: usize = 12 << 20;

/// Registered memory that no rail serves.
fn registered(fill: u8, board: Option<&Arc<Board>>) -> (Arc<Registration>, &'static [AtomicU8]) {
    let (range, bytes) = MemoryRange::leaked(BYTES, fill);
    let mut registration = Registration::new(&[], Vec::new(), Memory::host(range, 0), None).unwrap();
    board.inspect(|board| registration.publish(board));
    (Arc::new(registration), bytes)
}

/// Memory here and at the far end, which is a neighbour's or not.
struct Ends {
    pair: CopyPair,
    near: &'static [AtomicU8],
    far: &'static [AtomicU8],
    published: Arc<Registration>,
}

impl Ends {
    fn new(neighbour: bool) -> Self {
        let boards = [Board::new().unwrap(), Board::new().unwrap()];
        let ((near, near_bytes), (far, far_bytes)) = (registered(1, None), registered(2, Some(&boards[1])));
        let other = if neighbour {
            let neighbour = Arc::new(Neighbour::meet(boards[0].info(), boards[1].info()).unwrap());
            Far::There(NeighbourRegion { neighbour, entry: far.public_metadata().board.unwrap() })
        } else {
            Far::Here(Arc::clone(&far))
        };
        Self { pair: CopyPair { near, far: other }, near: near_bytes, far: far_bytes, published: far }
    }

    fn list(&self, op: Op, pieces: &[(usize, usize)]) -> Arc<CopyList> {
        let piece = |&(at, len): &(usize, usize)| Slice {
            local_addr: self.near[at..].as_ptr() as u64,
            remote_addr: self.far[at..].as_ptr() as u64,
            len: len as u32,
            pair: 0,
        };
        let pieces = pieces.iter().map(piece).collect();
        Arc::new(CopyList::new(op, pieces, vec![self.pair.clone()]).unwrap())
    }
}

/// Drives until something is over.
fn drive(copies: &Copies) -> Option<Result<()>> {
    while copies.is_busy() {
        if let (_, Some(over)) = copies.drive() {
            return Some(over.outcome);
        }
    }
    None
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    /// Pieces with gaps between them, some longer than a turn, shared by threads.
    #[test]
    fn every_byte_is_copied_once_and_no_other(
        lens in prop::collection::vec(prop_oneof![1usize..5000, 1usize..6_000_000], 1..40),
        neighbour: bool,
        reads: bool,
        threads in 1usize..4,
    ) {
        let mut pieces = Vec::new();
        let mut at = 0;
        for len in lens {
            if at + len > BYTES {
                break;
            }
            pieces.push((at, len));
            at += len + 1;
        }
        let ends = Ends::new(neighbour);
        let (op, from, to) = if reads { (Op::Read, 2, ends.near) } else { (Op::Write, 1, ends.far) };
        let copies = Copies::new(threads);
        let before = to[0].load(Ordering::Relaxed);
        copies.push(CopyWork::new(ends.list(op, &pieces), Arc::new(())));
        let overs: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..threads).map(|_| scope.spawn(|| drive(&copies))).collect();
            threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect()
        });
        prop_assert_eq!(overs, [Ok(())], "over once");
        let mut expected = vec![before; BYTES];
        for &(at, len) in &pieces {
            expected[at..at + len].fill(from);
        }
        let found: Vec<_> = to.iter().map(|byte| byte.load(Ordering::Relaxed)).collect();
        prop_assert!(found == expected);
    }
}

#[test]
fn turns_are_bounded_and_work_that_is_stopped_ends() {
    let ends = Ends::new(true);
    let copies = Copies::new(1);
    let work = CopyWork::new(ends.list(Op::Write, &[(0, BYTES)]), Arc::new(()));
    copies.push(Arc::clone(&work));
    assert!(matches!(copies.drive(), (1, None)));
    let arrived = ends.far.iter().filter(|byte| byte.load(Ordering::Relaxed) == 1).count();
    assert_eq!(arrived as u64, TURN_BYTES);
    work.stop();
    let over = copies.drive().1.unwrap();
    assert_eq!(over.outcome.unwrap_err().status(), Status::Canceled);
    assert!(!copies.is_busy() && copies.drive().1.is_none());
}

#[test]
fn many_small_pieces_are_several_turns() {
    let ends = Ends::new(true);
    let copies = Copies::new(1);
    let pieces: Vec<_> = (0..=TURN_PIECES_MAX).map(|number| (2 * number, 1)).collect();
    copies.push(CopyWork::new(ends.list(Op::Write, &pieces), Arc::new(())));
    assert!(copies.drive().1.is_none());
    assert_eq!(copies.drive().1.unwrap().outcome, Ok(()));
}

#[test]
fn memory_that_was_deregistered_in_between_ends_the_work() {
    let ends = Ends::new(true);
    let copies = Copies::new(1);
    copies.push(CopyWork::new(ends.list(Op::Write, &[(0, BYTES)]), Arc::new(())));
    copies.drive();
    assert!(ends.published.withdraw().unwrap().have_left());
    ends.far.iter().for_each(|byte| byte.store(3, Ordering::Relaxed));
    let over = copies.drive().1.unwrap();
    assert_eq!(over.outcome.unwrap_err().status(), Status::NotFound);
    assert!(
        ends.far.iter().all(|byte| byte.load(Ordering::Relaxed) == 3),
        "written after its deregistration"
    );
}

#[test]
fn short_work_does_not_wait_for_long_work() {
    let (long, short) = (Ends::new(true), Ends::new(false));
    let copies = Copies::new(1);
    copies.push(CopyWork::new(long.list(Op::Write, &[(0, BYTES)]), Arc::new("long")));
    copies.push(CopyWork::new(short.list(Op::Write, &[(0, 10)]), Arc::new("short")));
    assert!(copies.drive().1.is_none());
    assert_eq!(copies.drive().1.unwrap().tag.downcast_ref(), Some(&"short"));
    assert_eq!(copies.drive().1.unwrap().tag.downcast_ref(), Some(&"long"));
}

#[test]
fn pieces_outside_their_region_here_are_refused() {
    let ends = Ends::new(true);
    let addr = ends.near.as_ptr() as u64;
    for (local_addr, len, pair) in [(addr - 1, 1, 0), (addr, BYTES as u32 + 1, 0), (addr, 1, 1)] {
        let piece = Slice { local_addr, remote_addr: 0, len, pair };
        assert!(CopyList::new(Op::Write, vec![piece], vec![ends.pair.clone()]).is_err());
    }
}
