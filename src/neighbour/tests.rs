use std::process::{Child, Command};
use std::sync::atomic::AtomicU8;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::board::SLOTS_MAX;
use super::*;
use crate::fabric::MemoryRange;

/// An agent of this process: its board, and memory of its own.
struct Agent {
    board: Arc<Board>,
    range: MemoryRange,
    memory: &'static [AtomicU8],
}

impl Agent {
    fn new(bytes: usize, fill: u8) -> Self {
        let (range, memory) = MemoryRange::leaked(bytes, fill);
        Self { board: Board::new().unwrap(), range, memory }
    }

    fn has(&self, part: std::ops::Range<usize>, byte: u8) -> bool {
        self.memory[part].iter().all(|found| found.load(Ordering::Relaxed) == byte)
    }

    fn meets(&self, other: &Self) -> Result<Arc<Neighbour>> {
        Neighbour::meet(self.board.info(), other.board.info()).map(Arc::new)
    }
}

fn region(neighbour: &Arc<Neighbour>, published: &Published) -> NeighbourRegion {
    NeighbourRegion { neighbour: Arc::clone(neighbour), entry: published.entry() }
}

/// A process that ends when it is told to.
fn sleeper() -> Child {
    Command::new("sleep").arg("600").spawn().unwrap()
}

fn owner(child: &Child) -> Owner {
    Owner::new(child.id(), process::start_time(child.id()).unwrap())
}

#[test]
fn memory_of_a_neighbour_is_written_and_read() {
    let (near, far) = (Agent::new(8192, 1), Agent::new(8192, 2));
    let (here, there) = (near.range, far.range);
    let neighbour = near.meets(&far).unwrap();
    let published = far.board.publish(there).unwrap();
    neighbour.reaches(published.entry(), there.addr(), there.len()).unwrap();
    let (slot, region) = (neighbour.slot().unwrap(), region(&neighbour, &published));
    let copy = |at: u64, len| ProcessCopy {
        region: here,
        addr: here.addr() + at,
        remote_addr: there.addr() + at,
        len,
    };
    let turn = slot.begin().unwrap();
    turn.check(&region, there.addr(), there.len()).unwrap();
    turn.copy(Op::Write, &[copy(0, 100), copy(8191, 1)]).unwrap();
    turn.copy(Op::Read, &[copy(4000, 10)]).unwrap();
    drop(turn);
    assert!(far.has(0..100, 1) && far.has(100..8191, 2) && far.has(8191..8192, 1));
    assert!(near.has(0..4000, 1) && near.has(4000..4010, 2) && near.has(4010..8192, 1));
}

#[test]
fn only_what_is_registered_is_reached() {
    let (near, far) = (Agent::new(1, 0), Agent::new(4096, 0));
    let there = far.range;
    let (addr, len) = (there.addr(), there.len());
    let neighbour = near.meets(&far).unwrap();
    let published = far.board.publish(there).unwrap();
    let (entry, region) = (published.entry(), region(&neighbour, &published));
    let slot = neighbour.slot().unwrap();
    let turn = slot.begin().unwrap();
    for (addr, len) in [(addr - 1, 2), (addr, len + 1), (addr + len, 1), (u64::MAX, 2), (addr + 1, u64::MAX)]
    {
        assert_eq!(turn.check(&region, addr, len).unwrap_err().status(), Status::InvalidParam);
    }
    turn.check(&region, addr + len, 0).unwrap();
    let other =
        NeighbourRegion { entry: BoardEntry { generation: entry.generation + 1, ..entry }, ..region.clone() };
    assert_eq!(turn.check(&other, addr, len).unwrap_err().status(), Status::NotFound);
    let nowhere = NeighbourRegion { entry: BoardEntry { number: u32::MAX, ..entry }, ..region.clone() };
    assert_eq!(turn.check(&nowhere, addr, len).unwrap_err().status(), Status::NotFound);
    drop(turn);
    // The same memory, registered anew, has another generation, in the same place.
    drop(published);
    let again = far.board.publish(there).unwrap();
    assert_eq!(again.entry().number, entry.number);
    let turn = slot.begin().unwrap();
    assert_eq!(turn.check(&region, addr, len).unwrap_err().status(), Status::NotFound);
    turn.check_entry(again.entry(), addr, len).unwrap();
    drop(turn);
    far.board.close();
    assert_eq!(
        slot.begin().unwrap().check_entry(again.entry(), addr, 1).unwrap_err().status(),
        Status::RemoteDisconnect
    );
}

#[test]
fn withdrawing_waits_for_turns_and_for_no_dead() {
    let (near, far) = (Agent::new(1, 0), Agent::new(4096, 0));
    let there = far.range;
    let neighbour = near.meets(&far).unwrap();
    let published = far.board.publish(there).unwrap();
    assert!(published.withdraw().have_left(), "nobody copies");
    let slots = [neighbour.slot().unwrap(), neighbour.slot().unwrap()];
    let turns = slots.each_ref().map(|slot| slot.begin().unwrap());
    let mut copiers = published.withdraw();
    let [first, second] = turns;
    drop(first);
    assert!(!copiers.have_left() && copiers.count() == 1);
    let later = slots[0].begin().unwrap();
    drop(second);
    assert!(copiers.have_left(), "a turn that began later does not find the region");
    drop(later);
    // One that is killed within a turn: its word stays odd.
    let mut child = sleeper();
    let number = neighbour.board.claim(owner(&child)).unwrap();
    epochs::begin(neighbour.board.slot(number).epoch);
    let mut copiers = published.withdraw();
    assert!(!copiers.have_left());
    child.kill().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !copiers.have_left() {
        assert!(Instant::now() < deadline, "a dead process is waited for");
        std::thread::yield_now();
    }
    child.wait().unwrap();
    assert_eq!(neighbour.board.claim_of_ended(neighbour.me), Some(number));
    assert!(epochs::turn(neighbour.board.slot(number).epoch).is_none());
}

#[test]
fn a_full_board_takes_nobody_until_somebody_ends() {
    let (near, far) = (Agent::new(1, 0), Agent::new(1, 0));
    let neighbour = near.meets(&far).unwrap();
    let mut child = sleeper();
    let owner = owner(&child);
    let claimed = std::iter::from_fn(|| neighbour.board.claim(owner)).count();
    assert_eq!(claimed, SLOTS_MAX - 1);
    let refused = near.meets(&far).unwrap_err().to_string();
    assert!(refused.contains("too many"), "{refused}");
    let own = neighbour.slot().unwrap();
    assert!(neighbour.slot().is_none());
    drop(own);
    child.kill().unwrap();
    child.wait().unwrap();
    near.meets(&far).unwrap();
    drop(neighbour);
    assert_eq!(far.board.publish(far.range).unwrap().entry().number, 0);
}

#[test]
fn whoever_is_not_the_peer_is_not_reached() {
    let (near, far) = (Agent::new(1, 0), Agent::new(1, 0));
    let (own, peer) = (near.board.info(), *far.board.info());
    Neighbour::meet(own, &peer).unwrap();
    let stranger = sleeper();
    let began = process::start_time(stranger.id()).unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    let null = std::os::fd::AsRawFd::as_raw_fd(&null) as u32;
    let wrong = [
        ("another host", HostInfo { boot_id: [7; 16], ..peer }),
        ("namespace", HostInfo { pid_namespace: 7, ..peer }),
        ("not found", HostInfo { start_time: peer.start_time + 1, ..peer }),
        ("not found", HostInfo { pid: 1 << 22, ..peer }),
        ("cannot be read", HostInfo { board_addr: 8, ..peer }),
        ("something else", HostInfo { nonce: [7; 16], ..peer }),
        ("something else", HostInfo { board_addr: peer.board_addr + 8, ..peer }),
        ("cannot be read", HostInfo { pid: stranger.id(), start_time: began, ..peer }),
        ("another one", HostInfo { board_fd: own.board_fd, ..peer }),
        ("cannot be opened", HostInfo { board_fd: null, ..peer }),
        ("cannot be opened", HostInfo { board_fd: u32::MAX, ..peer }),
    ];
    for (why, info) in wrong {
        let refused = Neighbour::meet(own, &info).unwrap_err().to_string();
        assert!(refused.contains(why), "{refused}, and not: {why}");
    }
    let mut stranger = stranger;
    stranger.kill().unwrap();
    stranger.wait().unwrap();
}

#[test]
fn a_board_has_room_for_so_many_regions_and_no_more() {
    let agent = Agent::new(1, 0);
    let all: Vec<_> = std::iter::from_fn(|| agent.board.publish(agent.range)).collect();
    assert_eq!(all.len(), board::REGIONS_MAX);
    drop(all);
    assert!(agent.board.publish(agent.range).is_some());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn scribbling_on_a_board_ends_no_one(words in proptest::collection::vec(any::<u64>(), 64), entry: (u32, u64)) {
        let (near, far) = (Agent::new(1, 0), Agent::new(1, 0));
        let neighbour = near.meets(&far).unwrap();
        let published = far.board.publish(far.range).unwrap();
        neighbour.board.scribble(&words);
        let mut copiers = published.withdraw();
        copiers.have_left();
        prop_assert!(copiers.count() <= SLOTS_MAX);
        let entries = [BoardEntry { number: entry.0, generation: entry.1 }, published.entry()];
        for entry in entries {
            neighbour.board.region(entry);
        }
        neighbour.board.claim(neighbour.me);
        let slot = neighbour.slot();
        // Its own nonce may be scribbled over, too: then this is another program.
        let _ = slot.map(|slot| slot.begin().map(|turn| turn.check_entry(published.entry(), far.range.addr(), 1)));
        drop(published);
        prop_assert!(far.board.publish(far.range).is_some());
        far.board.close().have_left();
    }
}
