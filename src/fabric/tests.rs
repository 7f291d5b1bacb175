//! Two endpoints in one process over libfabric's tcp provider and 127.0.0.1.
//!
//! `NIXL_TEST_LIBFABRIC` names another libfabric than the system's, `NIXL_TEST_PROVIDER` another provider, with a fabric
//! after a colon if need be (`efa:efa-direct`). Without any libfabric, the tests say so and pass.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::types::Op;

const WAIT_MAX: Duration = Duration::from_secs(20);

fn library() -> Option<Libfabric> {
    let path = std::env::var_os("NIXL_TEST_LIBFABRIC");
    match Libfabric::load(path.as_deref().map(std::path::Path::new)) {
        Ok(library) => Some(library),
        Err(error) if path.is_none() => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn device(library: &Libfabric) -> Device {
    let wish = std::env::var("NIXL_TEST_PROVIDER").unwrap_or_else(|_| "tcp".into());
    let (provider, fabric) = wish.split_once(':').map_or((&*wish, None), |(p, f)| (p, Some(f.into())));
    let query =
        Query { provider: Some(provider.into()), fabric, delivery_complete: true, ..Query::default() };
    let devices = library.discover(&query).unwrap();
    // Sockets stay on this host; NICs have no loopback address to prefer.
    let loopback = devices.iter().find(|device| device.loopback());
    loopback.or(devices.first()).unwrap_or_else(|| panic!("no {wish} device")).clone()
}

struct Side {
    endpoint: Endpoint,
    domain: Arc<Domain>,
    keys: u64,
}

impl Side {
    fn open(library: &Libfabric, device: &Device) -> Self {
        let fabric = Fabric::open(library, device).unwrap();
        let domain = Domain::open(&fabric, device).unwrap();
        let options = EndpointOptions { buffers: 8, operations: 8, ..EndpointOptions::default() };
        let endpoint = Endpoint::open(&domain, device, &options).unwrap();
        Self { endpoint, domain, keys: 0 }
    }

    fn buffer(&mut self, len: usize) -> RegisteredBuffer {
        self.keys += 1;
        RegisteredBuffer::new(&self.domain, len, self.keys).unwrap()
    }
}

/// Two sides that know each other.
fn pair() -> Option<(Side, Side, FiAddr, FiAddr)> {
    let library = library()?;
    let device = device(&library);
    let (mut a, mut b) = (Side::open(&library, &device), Side::open(&library, &device));
    let to_b = a.endpoint.insert_address(&b.endpoint.name().unwrap()).unwrap();
    let to_a = b.endpoint.insert_address(&a.endpoint.name().unwrap()).unwrap();
    Some((a, b, to_b, to_a))
}

/// Posts, driving both sides until the post is taken.
fn post(
    a: &mut Endpoint,
    b: &mut Endpoint,
    seen: &mut [Vec<Completion>; 2],
    mut post: impl FnMut(&mut Endpoint) -> Result<Posted, FabricError>,
) {
    let start = Instant::now();
    while post(a).unwrap() == Posted::Again {
        a.poll(&mut seen[0]).unwrap();
        b.poll(&mut seen[1]).unwrap();
        assert!(start.elapsed() < WAIT_MAX, "the queue stays full");
    }
}

/// Drives both sides until each has seen as many completions as said.
fn drive(a: &mut Endpoint, b: &mut Endpoint, seen: &mut [Vec<Completion>; 2], want: [usize; 2]) {
    let start = Instant::now();
    while seen[0].len() < want[0] || seen[1].len() < want[1] {
        a.poll(&mut seen[0]).unwrap();
        b.poll(&mut seen[1]).unwrap();
        assert!(start.elapsed() < WAIT_MAX, "no completion: {seen:?}");
    }
}

#[test]
fn messages_arrive_whole_and_with_their_immediate() {
    let Some((mut a, mut b, to_b, _)) = pair() else { return };
    let (mut out, inbox) = (a.buffer(8192), b.buffer(2 * 8192));
    let mut seen = [Vec::new(), Vec::new()];
    for context in 0..2 {
        let recv = Recv { buffer: &inbox, offset: context as usize * 8192, len: 8192, context };
        assert_eq!(b.endpoint.recv(&recv).unwrap(), Posted::Yes);
    }
    assert!(b.endpoint.recv(&Recv { buffer: &inbox, offset: 0, len: 1, context: 0 }).is_err(), "in flight");
    out.copy_in(100, b"hello");
    let send = Send { buffer: &out, offset: 100, len: 5, imm: Some(0xdead_beef), dest: to_b, context: 7 };
    post(&mut a.endpoint, &mut b.endpoint, &mut seen, |e| e.send(&send));
    drive(&mut a.endpoint, &mut b.endpoint, &mut seen, [1, 1]);
    let [[Completion::Sent { buffer: 7, error: None }], [received]] = seen.each_ref().map(Vec::as_slice)
    else {
        panic!("{seen:?}")
    };
    let &Completion::Received { buffer: slot, len: 5, imm: Some(0xdead_beef) } = received else {
        panic!("{received:?}")
    };
    assert_eq!(inbox.copy_out(slot as usize * 8192, 5), b"hello");
    assert_eq!((a.endpoint.in_flight(), b.endpoint.in_flight()), (0, 1));
    let again = Recv { buffer: &inbox, offset: 0, len: 8192, context: slot };
    assert_eq!(b.endpoint.recv(&again).unwrap(), Posted::Yes, "the buffer is free again");
}

/// A list of pieces (local offset, remote offset, length) of two buffers, over one lane.
fn list(local: &RegisteredBuffer, remote: &RegisteredBuffer, pieces: &[(usize, usize, u32)]) -> Arc<RmaList> {
    let slice = |&(near, far, len): &(usize, usize, u32)| Slice {
        local_addr: local.addr_of(near),
        remote_addr: remote.region().remote_base() + far as u64,
        len,
        pair: 0,
    };
    let way = Way { region: local.region().clone(), key: remote.region().key() };
    Arc::new(RmaList::new(pieces.iter().map(slice).collect(), vec![way], 1).unwrap())
}

/// Posts all of a list as share 0, driving both sides until it is done; gives what the completions say.
fn move_all(
    a: &mut Side,
    b: &mut Side,
    to_b: FiAddr,
    op: Op,
    list: &Arc<RmaList>,
    batch: bool,
) -> (u32, u64) {
    a.endpoint.begin(0, Arc::clone(list), 0, to_b, None).unwrap();
    let (mut posted, mut done) = (0, (0, 0));
    let mut seen = [Vec::new(), Vec::new()];
    let start = Instant::now();
    while done.0 < list.len() {
        if posted < list.len() {
            let outcome = a.endpoint.post_slices(0, op, posted..list.len(), list.len(), batch);
            assert!(matches!(outcome.stopped, None | Some(Ok(Posted::Again))), "{outcome:?}");
            posted += outcome.count;
            assert_eq!(a.endpoint.in_flight_to(to_b).rma, posted - done.0);
        }
        a.endpoint.poll(&mut seen[0]).unwrap();
        b.endpoint.poll(&mut seen[1]).unwrap();
        for completion in seen[0].drain(..) {
            let Completion::Moved { share: 0, count, bytes } = completion else { panic!("{completion:?}") };
            done = (done.0 + count, done.1 + bytes);
        }
        assert!(start.elapsed() < WAIT_MAX, "no completion");
    }
    a.endpoint.end(0);
    assert_eq!((a.endpoint.in_flight(), a.endpoint.in_flight_to(to_b)), (0, InFlight::default()));
    assert!(seen[1].is_empty(), "a write tells the peer nothing: {seen:?}");
    done
}

#[test]
fn writes_and_reads_move_every_byte() {
    const LEN: usize = 300_000;
    let Some((mut a, mut b, to_b, _)) = pair() else { return };
    let (mut source, target, back) = (a.buffer(LEN), b.buffer(LEN), a.buffer(LEN));
    let data: Vec<u8> = (0..LEN).map(|i| (i * 7 % 251) as u8).collect();
    source.copy_in(0, &data);
    // More pieces than cells.
    let pieces: Vec<_> = (0..100).map(|i| (i * 3000, i * 3000, 3000)).collect();
    let write = list(&source, &target, &pieces);
    assert_eq!(move_all(&mut a, &mut b, to_b, Op::Write, &write, false), (100, LEN as u64));
    assert!(target.copy_out(0, LEN) == data);

    // Half of it, from the middle: addresses and offsets agree.
    let read = list(&back, &target, &[(1, 1000, LEN as u32 / 2)]);
    assert_eq!(move_all(&mut a, &mut b, to_b, Op::Read, &read, false), (1, LEN as u64 / 2));
    assert!(back.copy_out(1, LEN / 2) == data[1000..1000 + LEN / 2]);
    assert_eq!(back.copy_out(0, 1), [0]);

    // Now that the peer was reached, writes may share doorbells.
    source.copy_in(0, &data.iter().map(|byte| byte ^ 0xff).collect::<Vec<_>>());
    assert_eq!(move_all(&mut a, &mut b, to_b, Op::Write, &write, true), (100, LEN as u64));
    assert!(target.copy_out(0, LEN).iter().zip(&data).all(|(there, here)| *there == here ^ 0xff));
}

#[test]
fn what_is_wrong_is_refused_before_libfabric_sees_it() {
    let Some((mut a, mut b, to_b, _)) = pair() else { return };
    let (local, foreign) = (a.buffer(100), b.buffer(100));
    let way = |buffer: &RegisteredBuffer| Way { region: buffer.region().clone(), key: 0 };
    let slice = |local_addr, len, pair| vec![Slice { local_addr, remote_addr: 0, len, pair }];
    let at = local.addr_of(0);
    for (what, slices) in [
        ("beyond the end", slice(at + 1, 100, 0)),
        ("before the start", slice(at - 1, 100, 0)),
        ("wraps around", slice(u64::MAX, u32::MAX, 0)),
        ("no such pair", slice(at, 100, 1)),
    ] {
        let error = RmaList::new(slices, vec![way(&local)], 1).unwrap_err();
        assert_eq!(error.code, libc::EINVAL, "{what}");
    }
    assert!(RmaList::new(slice(at, 100, 0), vec![way(&local), way(&foreign)], 1).is_err());
    assert!(RmaList::new(slice(at, 100, 0), vec![way(&local), way(&foreign)], 2).is_err());
    assert!(RmaList::new(slice(at, 100, 0), vec![way(&local)], 2).is_err());
    let good = Arc::new(RmaList::new(slice(at, 100, 0), vec![way(&local)], 1).unwrap());
    let elsewhere = RmaList::new(slice(foreign.addr_of(0), 100, 0), vec![way(&foreign)], 1).unwrap();
    assert!(a.endpoint.begin(0, Arc::new(elsewhere), 0, to_b, None).is_err(), "another NIC's memory");
    assert!(a.endpoint.begin(0, Arc::clone(&good), 1, to_b, None).is_err(), "no such lane");
    assert!(a.endpoint.post_slices(0, Op::Write, 0..1, 1, false).stopped.unwrap().is_err(), "not begun");
    a.endpoint.begin(0, Arc::clone(&good), 0, to_b, None).unwrap();
    assert!(a.endpoint.begin(0, Arc::clone(&good), 0, to_b, None).is_err(), "in use");
    a.endpoint.end(0);
    assert!(a.endpoint.insert_address(&[]).is_err());
    assert!(a.endpoint.insert_address(&[0xff; 300]).is_err());
    let send = Send { buffer: &local, offset: 0, len: 101, imm: None, dest: to_b, context: 0 };
    assert!(a.endpoint.send(&send).is_err(), "beyond the end");
    a.endpoint.remove_address(to_b).unwrap();
    assert!(a.endpoint.begin(0, good, 0, to_b, None).is_err(), "removed");
    assert_eq!(a.endpoint.in_flight(), 0);
}

#[test]
fn a_region_in_flight_is_not_closed() {
    let Some((mut a, _b, _, _)) = pair() else { return };
    let buffer = a.buffer(100);
    let region = buffer.region().clone();
    assert_eq!(
        a.endpoint.recv(&Recv { buffer: &buffer, offset: 0, len: 100, context: 3 }).unwrap(),
        Posted::Yes
    );
    drop(buffer);
    let region = region.close().expect_err("the receive holds it");
    // The endpoint goes first; then nothing holds the region.
    drop(a.endpoint);
    assert!(region.close().is_ok());
}

#[test]
fn a_peer_that_goes_away_fails_what_is_in_flight() {
    const LEN: usize = 4 << 20;
    let Some((mut a, mut b, to_b, _)) = pair() else { return };
    let (source, target) = (a.buffer(LEN), b.buffer(LEN));
    move_all(&mut a, &mut b, to_b, Op::Write, &list(&source, &target, &[(0, 0, 1)]), false);
    // Connected. Now the peer goes without looking at what comes.
    a.endpoint.begin(1, list(&source, &target, &[(0, 0, LEN as u32)]), 0, to_b, None).unwrap();
    assert_eq!(a.endpoint.post_slices(1, Op::Write, 0..1, 1, false).count, 1);
    assert!(a.endpoint.remove_address(to_b).is_err(), "in flight");
    // Ended in flight, a share stays until its last completion.
    a.endpoint.end(1);
    assert_eq!(a.endpoint.in_flight_to(to_b).rma, 1);
    drop(b.endpoint);
    let mut failed = Vec::new();
    let start = Instant::now();
    while failed.is_empty() {
        a.endpoint.poll(&mut failed).unwrap();
        assert!(start.elapsed() < WAIT_MAX, "no completion");
    }
    match &failed[0] {
        Completion::MoveFailed { share: 1, bytes: 4_194_304, error } => {
            assert!(error.is_disconnect(), "{error:?}");
        }
        // A NIC takes a write without its host's help.
        Completion::Moved { share: 1, count: 1, .. } => {
            assert!(!a.domain.device().provider().starts_with("tcp"), "the peer did not take it");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(a.endpoint.in_flight(), 0);
    assert_eq!(a.endpoint.drain_events(), []);
    a.endpoint.remove_address(to_b).unwrap();
}

#[test]
fn a_dead_address_blocks_nobody_else() {
    let Some((mut a, mut b, to_b, _)) = pair() else { return };
    let gone = Side::open(b.domain.library(), b.domain.device());
    let to_gone = a.endpoint.insert_address(&gone.endpoint.name().unwrap()).unwrap();
    drop(gone.endpoint);
    let (out, inbox) = (a.buffer(16), b.buffer(16));
    assert_eq!(
        b.endpoint.recv(&Recv { buffer: &inbox, offset: 0, len: 16, context: 0 }).unwrap(),
        Posted::Yes
    );
    let send = Send { buffer: &out, offset: 0, len: 16, imm: None, dest: to_b, context: 1 };
    let mut seen = [Vec::new(), Vec::new()];
    // libfabric's tcp tries to connect again on every post and answers Again for ever: the caller has to have a deadline.
    for _ in 0..100 {
        match a.endpoint.send(&Send { dest: to_gone, context: 0, ..send }) {
            Ok(Posted::Yes) => break,
            Ok(Posted::Again) => {}
            Err(error) => {
                assert!(is_disconnect(error.code), "{error}");
                break;
            }
        }
        a.endpoint.poll(&mut seen[0]).unwrap();
    }
    post(&mut a.endpoint, &mut b.endpoint, &mut seen, |e| e.send(&send));
    drive(&mut a.endpoint, &mut b.endpoint, &mut seen, [0, 1]);
    assert!(matches!(seen[1][0], Completion::Received { .. }), "{seen:?}");
    let ours =
        |c: &Completion| matches!(c, Completion::Sent { buffer, error } if error.is_none() || *buffer == 0);
    assert!(seen[0].iter().all(ours), "{seen:?}");
}

#[test]
fn a_file_descriptor_wakes_the_sleeper() {
    let Some((mut a, mut b, to_b, _)) = pair() else { return };
    let Some(fd) = b.endpoint.wait_fd() else {
        println!("skipped: {:?} has no file descriptor to sleep on", b.domain.device());
        return;
    };
    let (out, inbox) = (a.buffer(64), b.buffer(64));
    assert_eq!(
        b.endpoint.recv(&Recv { buffer: &inbox, offset: 0, len: 64, context: 0 }).unwrap(),
        Posted::Yes
    );
    let (about_to_sleep, sleeper) = std::sync::mpsc::channel();
    let sender = std::thread::spawn(move || {
        sleeper.recv().unwrap();
        let send = Send { buffer: &out, offset: 0, len: 64, imm: None, dest: to_b, context: 0 };
        let mut seen = Vec::new();
        let start = Instant::now();
        while a.endpoint.send(&send).unwrap() == Posted::Again {
            a.endpoint.poll(&mut seen).unwrap();
            assert!(start.elapsed() < WAIT_MAX);
        }
        while seen.is_empty() {
            a.endpoint.poll(&mut seen).unwrap();
            assert!(start.elapsed() < WAIT_MAX);
        }
        seen.remove(0)
    });
    let mut seen = Vec::new();
    let start = Instant::now();
    let mut slept = 0;
    while seen.is_empty() {
        assert!(start.elapsed() < WAIT_MAX);
        if b.endpoint.try_wait() {
            let _ = about_to_sleep.send(());
            let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
            // SAFETY: one pollfd is passed; the descriptor is the endpoint's, which lives.
            let ready = unsafe { libc::poll(&raw mut poll, 1, WAIT_MAX.as_millis() as i32) };
            assert!(ready > 0, "nothing woke the sleeper");
            slept += 1;
        }
        b.endpoint.poll(&mut seen).unwrap();
    }
    assert!(matches!(seen[0], Completion::Received { .. }), "{seen:?}");
    assert!(slept > 0);
    assert_eq!(sender.join().unwrap(), Completion::Sent { buffer: 0, error: None });
}

#[test]
fn discovery_tells_what_a_host_offers() {
    let Some(library) = library() else { return };
    let devices = library.discover(&Query::default()).unwrap();
    for device in &devices {
        println!("{device:?}: {:?}", device.nic());
        assert!(!device.provider().is_empty() && !device.domain_name().is_empty());
        assert!(device.tx_size() > 0 && device.max_msg_size() > 0);
    }
    let nobody = Query { provider: Some("no-such-provider".into()), ..Query::default() };
    assert!(library.discover(&nobody).unwrap().is_empty());
    assert!(device(&library).delivery_complete());
}

#[test]
fn failures_to_open_leave_nothing_behind() {
    let Some(library) = library() else { return };
    let device = device(&library);
    let fabric = Fabric::open(&library, &device).unwrap();
    let domain = Domain::open(&fabric, &device).unwrap();
    let options = EndpointOptions { tx_size: Some(usize::MAX), ..EndpointOptions::default() };
    assert!(Endpoint::open(&domain, &device, &options).is_err(), "no queue is that long");
    let _endpoint = Endpoint::open(&domain, &device, &EndpointOptions::default()).unwrap();
    assert_eq!(Arc::strong_count(&domain), 2, "the failed one let go");
}
