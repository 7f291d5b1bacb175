//! GPU memory that moves by way of host memory, on a stand-in driver.

mod cuda_bed;

use std::sync::{Arc, Mutex, Once};
use std::time::Instant;

use cuda_bed::bytes_at;
use cuda_bed::stage::{DEADLINE, MIB, Stage, desc, fill_at, register, vram, wait, wait_for};
use nixl_libfabric::engine::{Engine, Metadata, Request};
use nixl_libfabric::error::{Result, Status};
use nixl_libfabric::types::{Desc, MemKind, Op};
use nixl_libfabric::wire::ConnectionInfo;
use nixl_libfabric::wire::blob::capability;

/// Agents with GPU memory that no rail reaches, and host memory.
struct Staged {
    engines: Vec<Engine>,
    gpu: Vec<u64>,
    host: Vec<Vec<u8>>,
    regions: Vec<[Arc<Metadata>; 2]>,
    stage: Stage,
}

const STAGED_BYTES: usize = 5 * MIB + 4321;
const NAMES: [&str; 4] = ["one", "two", "three", "four"];

impl Staged {
    fn new(progress_thread: bool) -> Self {
        Self::with(progress_thread, &[])
    }

    fn with(progress_thread: bool, options: &[(&str, &str)]) -> Self {
        Self::of(2, progress_thread, options, <[u8]>::to_vec)
    }

    /// So many agents, which know one another by what `told` makes of their connection info.
    fn of(
        count: usize,
        progress_thread: bool,
        options: &[(&str, &str)],
        told: impl Fn(&[u8]) -> Vec<u8>,
    ) -> Self {
        let stage = Stage::new();
        stage.fabric_option("hmem", 0);
        stage.bed.option("polls", 2);
        let options = [&[("vram_staging", "true")], options].concat();
        let names = &NAMES[..count];
        let engines: Vec<_> =
            names.iter().map(|name| stage.engine_with(name, progress_thread, &options)).collect();
        let gpu: Vec<_> = (0..count).map(|i| stage.gpu(i as i32 % 2, STAGED_BYTES, 0)).collect();
        let host = vec![vec![0_u8; STAGED_BYTES]; count];
        let register = |i: usize| {
            let on_host = host[i].as_ptr() as u64;
            [
                vram(&engines[i], gpu[i], STAGED_BYTES, i as u64 % 2).unwrap(),
                register(&engines[i], MemKind::Dram, on_host, STAGED_BYTES, 0).unwrap(),
            ]
        };
        let regions = (0..count).map(register).collect();
        for (engine, name) in engines.iter().zip(names) {
            for (other, _) in engines.iter().zip(names).filter(|(_, other)| *other != name) {
                other.load_remote_conn_info(&(*name).into(), &told(&engine.conn_info().unwrap())).unwrap();
            }
        }
        Self { engines, gpu, host, regions, stage }
    }

    /// Address of an agent's memory of a kind.
    fn addr(&self, agent: usize, kind: MemKind) -> u64 {
        if kind == MemKind::Vram { self.gpu[agent] } else { self.host[agent].as_ptr() as u64 }
    }

    fn region(&self, agent: usize, kind: MemKind) -> &Arc<Metadata> {
        &self.regions[agent][usize::from(kind == MemKind::Dram)]
    }

    /// The second agent's memory as the first one knows it.
    fn remote(&self, kind: MemKind) -> Arc<Metadata> {
        self.remote_of(1, kind)
    }

    /// An agent's memory as the first one knows it.
    fn remote_of(&self, agent: usize, kind: MemKind) -> Arc<Metadata> {
        let range = Desc { addr: self.addr(agent, kind), len: STAGED_BYTES as u64, dev_id: 0 };
        let blob = self.engines[agent].public_data(self.region(agent, kind)).unwrap();
        self.engines[0].load_remote_md(range, kind, &blob, &NAMES[agent].into()).unwrap()
    }

    /// GPU memory of the first agent with that of another: all, if no piece is longer than `piece`, else that much.
    fn prepare(&self, op: Op, agent: usize, remote: &Arc<Metadata>, piece: usize) -> Request {
        let bytes = piece.min(STAGED_BYTES);
        let (local, far) =
            (desc(self.region(0, MemKind::Vram), self.gpu[0], bytes), desc(remote, self.gpu[agent], bytes));
        self.engines[0].prep_xfer(op, &[local], &[far], &NAMES[agent].into()).unwrap()
    }

    /// A WRITE of all GPU memory of the first agent to that of the second.
    fn prepare_write(&self, remote: &Arc<Metadata>) -> Request {
        self.prepare(Op::Write, 1, remote, STAGED_BYTES)
    }

    /// Waits, while the second agent is driven.
    fn wait(&self, request: &Request) -> Result<Status> {
        wait(&[&self.engines[0], &self.engines[1]], request)
    }

    /// Drives all agents until something is so.
    fn until(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let start = Instant::now();
        while !is_so() {
            assert!(start.elapsed() < DEADLINE, "{what} does not come");
            for engine in &self.engines {
                engine.take_notifications().unwrap();
            }
        }
    }

    /// Calls of the driver since the last time that begin so.
    fn calls(&self, names: &[&str]) -> Vec<String> {
        let log = self.stage.bed.take_log();
        log.into_iter().filter(|line| names.iter().any(|name| line.starts_with(name))).collect()
    }
}

/// Lines of the log so far that hold this.
fn told(what: &str) -> usize {
    struct Kept(Mutex<Vec<String>>);
    impl log::Log for Kept {
        fn enabled(&self, _: &log::Metadata) -> bool {
            true
        }
        fn log(&self, record: &log::Record) {
            self.0.lock().unwrap().push(record.args().to_string());
        }
        fn flush(&self) {}
    }
    static KEPT: Kept = Kept(Mutex::new(Vec::new()));
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        log::set_logger(&KEPT).unwrap();
        log::set_max_level(log::LevelFilter::Debug);
    });
    KEPT.0.lock().unwrap().iter().filter(|line| line.contains(what)).count()
}

#[test]
fn staged_memory_moves_both_ways_between_all_kinds() {
    for progress_thread in [false, true] {
        let bed = Staged::new(progress_thread);
        assert_eq!(bed.engines[0].supported_mems(), [MemKind::Dram, MemKind::Vram]);
        let kinds = [MemKind::Vram, MemKind::Dram];
        let mut fill = 1_u8;
        for (near, far) in kinds.into_iter().flat_map(|near| kinds.map(|far| (near, far))) {
            let remote = bed.remote(far);
            let (here, there) = (bed.addr(0, near), bed.addr(1, far));
            for op in [Op::Write, Op::Read] {
                let (source, target) = if op == Op::Write { (here, there) } else { (there, here) };
                fill_at(source, STAGED_BYTES, fill);
                fill_at(target, STAGED_BYTES, 0);
                let len = STAGED_BYTES - 200;
                let (local, far) =
                    (desc(bed.region(0, near), here + 100, len), desc(&remote, there + 100, len));
                let request = bed.engines[0].prep_xfer(op, &[local], &[far], &"two".into()).unwrap();
                bed.engines[0].post_xfer(&request, Some(b"moved")).unwrap();
                let mut notified = 0;
                let (one, two) = (&bed.engines[0], &bed.engines[1]);
                assert_eq!(
                    wait_for(&[one, two], &request, &mut notified),
                    Ok(Status::Success),
                    "{op:?} {near}"
                );
                let bytes = bytes_at(target, STAGED_BYTES);
                assert!(bytes[..100].iter().chain(&bytes[STAGED_BYTES - 100..]).all(|byte| *byte == 0));
                assert!(bytes[100..STAGED_BYTES - 100].iter().all(|byte| *byte == fill), "{op:?} {near}");
                let start = Instant::now();
                while notified == 0 {
                    notified += two.take_notifications().unwrap().len();
                    one.take_notifications().unwrap();
                    assert!(start.elapsed() < DEADLINE, "no notification");
                }
                fill += 1;
            }
        }
        assert_eq!(bed.stage.bed.thread_state(), (0, 0, 0));
        let Staged { stage, engines, regions, .. } = bed;
        drop(regions);
        drop(engines);
        let live = stage.bed.live();
        assert_eq!((live.0, live.1, live.2), (0, 0, 0), "streams, events and pinned memory are given back");
    }
}

#[test]
fn staged_pieces_in_great_number_and_any_order_arrive() {
    let bed = Staged::new(false);
    let (here, there, remote) = (bed.gpu[0], bed.gpu[1], bed.remote(MemKind::Vram));
    let pattern: Vec<u8> = (0..STAGED_BYTES).map(|i| (i % 251) as u8).collect();
    // SAFETY: the stand-in's memory is host memory of that length.
    unsafe { std::ptr::copy_nonoverlapping(pattern.as_ptr(), here as *mut u8, STAGED_BYTES) };
    let piece = 8 << 10;
    let count = STAGED_BYTES / piece;
    // A stride that has no divisor in common with the count visits every piece once.
    let places = (0..count).map(|i| (i * 7 % count) * piece).collect::<Vec<_>>();
    let list = |metadata, base: u64| {
        let places = places.clone();
        places.into_iter().map(move |at| desc(metadata, base + at as u64, piece)).collect::<Vec<_>>()
    };
    let (local, far) = (list(bed.region(0, MemKind::Vram), here), list(&remote, there));
    let request = bed.engines[0].prep_xfer(Op::Write, &local, &far, &"two".into()).unwrap();
    for _ in 0..2 {
        fill_at(there, STAGED_BYTES, 0);
        bed.stage.bed.take_log();
        bed.engines[0].post_xfer(&request, None).unwrap();
        assert_eq!(bed.wait(&request), Ok(Status::Success));
        assert_eq!(bytes_at(there, count * piece), pattern[..count * piece]);
        // Up to 64 of them travel together.
        let copies = bed.calls(&["cuEventRecord"]).len();
        assert!(copies <= 2 * count.div_ceil(64), "{copies} copies of {count} pieces");
    }
}

#[test]
fn a_staged_transfer_fails_with_its_reason_and_the_next_one_works() {
    let bed = Staged::new(false);
    let remote = bed.remote(MemKind::Vram);
    let prepare = || bed.prepare_write(&remote);
    // Both agents copy with the one driver: the first calls fail here, later ones at the peer.
    for nth in [1, 4, 7, 12] {
        let request = prepare();
        bed.engines[0].post_xfer(&request, None).unwrap();
        bed.stage.bed.fail("cuMemcpyAsync", nth, 700);
        let outcome = bed.wait(&request);
        bed.stage.bed.fail("", 0, 0);
        if let Err(error) = outcome {
            assert!(error.to_string().contains("STANDIN_ERROR_700"), "{error}");
        }
        let next = prepare();
        bed.engines[0].post_xfer(&next, None).unwrap();
        assert_eq!(bed.wait(&next), Ok(Status::Success), "after copy {nth} failed");
    }
    let Staged { stage, engines, regions, .. } = bed;
    drop((remote, regions, engines));
    stage.bed.reset_counts();
}

#[test]
fn a_staged_transfer_can_be_released_and_its_peer_can_leave() {
    let bed = Staged::new(false);
    let remote = bed.remote(MemKind::Vram);
    let prepare = || bed.prepare_write(&remote);
    let request = prepare();
    bed.engines[0].post_xfer(&request, None).unwrap();
    bed.engines[0].release_request(request).unwrap();
    let request = prepare();
    bed.engines[0].post_xfer(&request, None).unwrap();
    assert_eq!(bed.wait(&request), Ok(Status::Success));
    bed.engines[0].post_xfer(&request, None).unwrap();
    bed.engines[0].disconnect(&"two".into()).unwrap();
    assert_eq!(bed.wait(&request).unwrap_err().status(), Status::RemoteDisconnect);
    bed.engines[0].deregister_mem(bed.region(0, MemKind::Vram)).unwrap();
}

#[test]
fn slots_of_a_peer_that_does_not_answer_in_time_come_back_when_it_does() {
    let lends = told(" lends ");
    let bed = Staged::with(false, &[("connect_timeout_ms", "1000")]);
    let remote = bed.remote(MemKind::Vram);
    bed.until("the word of the lender", || told(" lends ") > lends);
    // What a READ begins with is a copy at the peer.
    let request = bed.prepare(Op::Read, 1, &remote, STAGED_BYTES);
    bed.engines[0].post_xfer(&request, None).unwrap();
    assert_eq!(bed.wait(&request), Ok(Status::Success));
    // The peer's application calls nothing. A third of its slots for each post.
    for round in 0..4 {
        bed.engines[0].post_xfer(&request, None).unwrap();
        let error = wait(&[&bed.engines[0]], &request).unwrap_err();
        assert!(error.to_string().contains("connect_timeout_ms"), "round {round}: {error}");
    }
    for fill in [7, 8] {
        fill_at(bed.gpu[1], STAGED_BYTES, fill);
        bed.engines[0].post_xfer(&request, None).unwrap();
        assert_eq!(bed.wait(&request), Ok(Status::Success));
        assert!(bytes_at(bed.gpu[0], STAGED_BYTES).iter().all(|byte| *byte == fill));
    }
}

#[test]
fn a_staged_transfer_ends_after_transfer_timeout_ms() {
    let bed = Staged::with(false, &[("transfer_timeout_ms", "1500")]);
    let remote = bed.remote(MemKind::Vram);
    let request = bed.prepare_write(&remote);
    // Without a lease, and with one.
    for lent in [false, true] {
        bed.engines[0].post_xfer(&request, None).unwrap();
        let error = wait(&[&bed.engines[0]], &request).unwrap_err();
        assert!(error.to_string().contains("transfer_timeout_ms"), "{lent}: {error}");
        bed.engines[0].post_xfer(&request, None).unwrap();
        assert_eq!(bed.wait(&request), Ok(Status::Success), "{lent}");
    }
}

#[test]
fn nothing_is_left_to_be_made_ready_for_the_first_transfer() {
    for progress_thread in [false, true] {
        let before = told("two lends ");
        let bed = Staged::new(progress_thread);
        let remote = bed.remote(MemKind::Vram);
        // Slots of both agents, and those that one lends the other.
        bed.until("page-locked memory", || bed.stage.bed.count("pinned") == 3);
        bed.until("the word of the lender", || told("two lends ") == before + 1);
        bed.stage.bed.take_log();
        let asked = told("asks for staging memory");
        for op in [Op::Write, Op::Read] {
            let request = bed.prepare(op, 1, &remote, MIB);
            bed.engines[0].post_xfer(&request, None).unwrap();
            assert_eq!(bed.wait(&request), Ok(Status::Success));
        }
        assert_eq!(bed.calls(&["cuMemHostAlloc", "cuStreamCreate", "cuDevicePrimaryCtxRetain"]), [""; 0]);
        assert_eq!(told("asks for staging memory"), asked);
    }
}

#[test]
fn what_fits_in_a_chunk_is_copied_once_on_each_side() {
    let bed = Staged::new(false);
    let remote = bed.remote(MemKind::Vram);
    for op in [Op::Write, Op::Read] {
        for (bytes, copies) in [(100 << 10, 2), (MIB, 2), (MIB + 1, 4)] {
            let request = bed.prepare(op, 1, &remote, bytes);
            bed.engines[0].post_xfer(&request, None).unwrap();
            assert_eq!(bed.wait(&request), Ok(Status::Success));
            let seen = bed.calls(&["cuMemcpyAsync"]);
            assert_eq!(seen.len(), copies, "{op:?} of {bytes} bytes: {seen:?}");
        }
    }
}

#[test]
fn a_short_transfer_does_not_wait_for_long_ones() {
    const TIMES: usize = 8;
    let bed = Staged::new(false);
    let remote = bed.remote(MemKind::Vram);
    // The same range again and again: 40 MiB, of 16 MiB that the peer lends.
    let long = |_| {
        let local = vec![desc(bed.region(0, MemKind::Vram), bed.gpu[0], STAGED_BYTES); TIMES];
        let far = vec![desc(&remote, bed.gpu[1], STAGED_BYTES); TIMES];
        bed.engines[0].prep_xfer(Op::Write, &local, &far, &"two".into()).unwrap()
    };
    let long: Vec<_> = (0..TIMES).map(long).collect();
    let short = bed.prepare(Op::Write, 1, &remote, 4096);
    bed.engines[0].post_xfer(&short, None).unwrap();
    assert_eq!(bed.wait(&short), Ok(Status::Success));
    for request in long.iter().chain([&short]) {
        bed.engines[0].post_xfer(request, None).unwrap();
    }
    assert_eq!(bed.wait(&short), Ok(Status::Success));
    let done =
        long.iter().filter(|request| bed.engines[0].check_xfer(request) == Ok(Status::Success)).count();
    assert_eq!(done, 0, "long transfers that were over first");
    for request in &long {
        assert_eq!(bed.wait(request), Ok(Status::Success));
    }
}

#[test]
fn peers_that_do_not_answer_hold_no_slots_of_others() {
    let lends = told(" lends ");
    let bed = Staged::of(4, false, &[("connect_timeout_ms", "1000")], <[u8]>::to_vec);
    let remotes: Vec<_> = (1..4).map(|agent| bed.remote_of(agent, MemKind::Vram)).collect();
    bed.until("the words of the lenders", || told(" lends ") == lends + 3);
    let request = |agent: usize| bed.prepare(Op::Read, agent, &remotes[agent - 1], STAGED_BYTES);
    for agent in 1..4 {
        let request = request(agent);
        bed.engines[0].post_xfer(&request, None).unwrap();
        assert_eq!(wait(&[&bed.engines[0], &bed.engines[agent]], &request), Ok(Status::Success));
    }
    // Two peers stand still until everything that they have lent rests: half as much as there is here, each.
    for (round, agent) in (0..8).map(|round| (round, 1 + round % 2)) {
        let request = request(agent);
        bed.engines[0].post_xfer(&request, None).unwrap();
        let error = wait(&[&bed.engines[0]], &request).unwrap_err();
        assert!(error.to_string().contains("connect_timeout_ms"), "round {round}: {error}");
    }
    let request = request(3);
    bed.engines[0].post_xfer(&request, None).unwrap();
    assert_eq!(wait(&[&bed.engines[0], &bed.engines[3]], &request), Ok(Status::Success));
}

/// As an agent says it that knows neither copies of many ranges nor copies over several slots.
fn without_ranges(info: &[u8]) -> Vec<u8> {
    let mut info = ConnectionInfo::decode(info).unwrap();
    info.extension.as_mut().unwrap().capabilities &= !capability::STAGED_RANGES;
    info.encode()
}

#[test]
fn agents_of_before_copies_of_many_ranges_are_served() {
    let bed = Staged::of(2, false, &[], without_ranges);
    let remote = bed.remote(MemKind::Vram);
    let (here, there) = (bed.gpu[0], bed.gpu[1]);
    let pieces =
        |metadata, base: u64| (0..40).map(|i| desc(metadata, base + i * 8192, 4096)).collect::<Vec<_>>();
    for op in [Op::Write, Op::Read] {
        let (source, target) = if op == Op::Write { (here, there) } else { (there, here) };
        fill_at(source, STAGED_BYTES, 7);
        fill_at(target, STAGED_BYTES, 0);
        let whole = bed.prepare(op, 1, &remote, STAGED_BYTES);
        bed.engines[0].post_xfer(&whole, None).unwrap();
        assert_eq!(bed.wait(&whole), Ok(Status::Success));
        assert!(bytes_at(target, STAGED_BYTES).iter().all(|byte| *byte == 7));
        fill_at(target, STAGED_BYTES, 0);
        bed.stage.bed.take_log();
        let (local, far) = (pieces(bed.region(0, MemKind::Vram), here), pieces(&remote, there));
        let request = bed.engines[0].prep_xfer(op, &local, &far, &"two".into()).unwrap();
        bed.engines[0].post_xfer(&request, None).unwrap();
        assert_eq!(bed.wait(&request), Ok(Status::Success));
        assert_eq!(bed.calls(&["cuEventRecord"]).len(), 80, "a copy for each piece");
        let bytes = bytes_at(target, 40 * 8192);
        assert!(bytes.iter().enumerate().all(|(i, byte)| *byte == if i % 8192 < 4096 { 7 } else { 0 }));
    }
}

#[test]
fn an_agent_that_was_removed_and_added_again_gets_slots_anew() {
    let bed = Staged::new(false);
    let remote = bed.remote(MemKind::Vram);
    let (one, two) = (&bed.engines[0], &bed.engines[1]);
    for (round, op) in [Op::Write, Op::Read, Op::Write].into_iter().enumerate() {
        let lends = told("two lends ");
        if round > 0 {
            two.disconnect(&"one".into()).unwrap();
            two.load_remote_conn_info(&"one".into(), &one.conn_info().unwrap()).unwrap();
            bed.until("the word of the lender", || told("two lends ") > lends);
        }
        let (source, target) = if op == Op::Write { (0, 1) } else { (1, 0) };
        fill_at(bed.gpu[source], STAGED_BYTES, 40 + round as u8);
        let request = bed.prepare(op, 1, &remote, STAGED_BYTES);
        one.post_xfer(&request, None).unwrap();
        assert_eq!(bed.wait(&request), Ok(Status::Success), "round {round}");
        assert!(bytes_at(bed.gpu[target], STAGED_BYTES).iter().all(|byte| *byte == 40 + round as u8));
    }
}
