//! Law 8: one owner at a time on an endpoint and its queue. Real threads, real time; the simulated provider notices
//! who enters while another is inside.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nixl_libfabric::engine::{Engine, InitParams, Metadata, XferDesc};
use nixl_libfabric::error::Status;
use nixl_libfabric::types::{AgentName, Desc, MemKind, Op};
use nixl_libfabric_sim::memory::{Arena, SLOT};
use nixl_libfabric_sim::pair::by_network;
use nixl_libfabric_sim::provider::{library, on_host};
use nixl_libfabric_sim::world::{EFA, World};

const THREADS: usize = 4;
const POSTS: u32 = 150;
/// A guard against hanging, not a measurement.
const END: Duration = Duration::from_secs(120);

struct Side {
    name: AgentName,
    engine: Engine,
    local: Arc<Metadata>,
    arena: Arena,
    got: AtomicUsize,
}

// SAFETY: threads touch the arena only in slots of their own, and only through raw pointers.
unsafe impl Sync for Side {}

fn open(world: &Arc<World>, name: &str, progress_thread: bool) -> Side {
    let host = world.add_host();
    let name = AgentName::from(name);
    let init = InitParams {
        local_agent: name.clone(),
        params: by_network([("num_threads".to_owned(), "2".to_owned())].into()),
        progress_thread,
        progress_delay: Duration::from_micros(10),
        poison: Arc::default(),
    };
    let engine = on_host(world, host, || Engine::create_on(library(), init)).unwrap();
    let arena = Arena::new(THREADS);
    let local = engine.register_mem(arena.range(), 0, MemKind::Dram).unwrap();
    Side { name, engine, local, arena, got: AtomicUsize::new(0) }
}

fn load(at: &Side, of: &Side) -> Arc<Metadata> {
    let desc = Desc { addr: of.arena.addr() as u64, len: of.arena.len() as u64, dev_id: 0 };
    at.engine.load_remote_conn_info(&of.name, &of.engine.conn_info().unwrap()).unwrap();
    let public = of.engine.public_data(&of.local).unwrap();
    at.engine.load_remote_md(desc, MemKind::Dram, &public, &of.name).unwrap()
}

/// One application thread: transfers, notifications, and a look at what came, by turns.
fn work(here: &Side, there: &Side, remote: &Arc<Metadata>, thread: usize) {
    let begin = Instant::now();
    let at = |side: &Side| Desc { addr: (side.arena.addr() + thread * SLOT) as u64, len: 512, dev_id: 0 };
    let near = [XferDesc { desc: at(here), metadata: &here.local }];
    let far = [XferDesc { desc: at(there), metadata: remote }];
    let op = if thread.is_multiple_of(2) { Op::Write } else { Op::Read };
    let request = here.engine.prep_xfer(op, &near, &far, &there.name).unwrap();
    for post in 0..POSTS {
        let mut status = here.engine.post_xfer(&request, Some(&post.to_le_bytes()));
        here.engine.send_notification(&there.name, b"alone").unwrap();
        while status == Ok(Status::InProgress) {
            here.got.fetch_add(here.engine.take_notifications().unwrap().len(), Ordering::Relaxed);
            status = here.engine.check_xfer(&request);
            assert!(begin.elapsed() < END, "no end");
        }
        assert_eq!(status, Ok(Status::Success));
    }
    here.engine.release_request(request).unwrap();
}

#[test]
fn one_thread_at_a_time_is_inside_an_endpoint() {
    for progress_thread in [false, true] {
        let world = World::new(3, EFA, 2);
        world.state().delay_ns = 3_000;
        let (a, b) = (open(&world, "a", progress_thread), open(&world, "b", progress_thread));
        let (of_b, of_a) = (load(&a, &b), load(&b, &a));
        std::thread::scope(|scope| {
            for thread in 0..THREADS / 2 {
                let (a, b, of_b, of_a) = (&a, &b, &of_b, &of_a);
                scope.spawn(move || work(a, b, of_b, thread));
                scope.spawn(move || work(b, a, of_a, thread + THREADS / 2));
            }
        });
        let all = (THREADS / 2) * POSTS as usize * 2;
        let begin = Instant::now();
        for side in [&a, &b] {
            while side.got.load(Ordering::Relaxed) < all {
                for one in [&a, &b] {
                    let got = one.engine.take_notifications().unwrap().len();
                    one.got.fetch_add(got, Ordering::Relaxed);
                }
                assert!(begin.elapsed() < END, "{} of {all} came", side.got.load(Ordering::Relaxed));
            }
            assert_eq!(side.got.load(Ordering::Relaxed), all);
        }
        drop((of_a, of_b));
        for side in [a, b] {
            let Side { engine, local, .. } = side;
            drop(local);
            drop(engine);
        }
        let state = world.state();
        assert_eq!(state.broken, Vec::<String>::new());
        assert_eq!(state.open_objects(), Vec::new());
    }
}
