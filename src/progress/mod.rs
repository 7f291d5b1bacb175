//! Who drives the rails, and when to sleep.
//!
//! Whoever is in a call may drive a rail that nobody holds. With NIXL's progress thread on, threads of our
//! own do so too: each looks after a group of rails, spins for a while after the last event, and then blocks on the
//! rails' wait objects. Where the provider has none that work (efa) it naps, and looks.
#![forbid(unsafe_code)]

mod asleep;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use self::asleep::Asleep;
use crate::error::{Error, Result};
use crate::rail::Rail;
use crate::sys::event::{EventFd, Poller};
use crate::sys::panic::Poison;
use crate::types::AgentName;

/// What progress threads drive: the engine's shared part.
pub trait Driver: Send + Sync {
    /// Drives these rails once. Returns how many events were handled.
    fn drive(&self, rails: &[Arc<Rail>]) -> usize;
    /// Whether a thread may block on these rails' wait objects now. Providers look at their queues to find out.
    fn may_wait(&self, rails: &[Arc<Rail>]) -> bool;
    /// Looks after what has a deadline. Called every few milliseconds while something is under way.
    fn tick(&self);
    /// Whether something is under way that nobody else will wake us for.
    fn is_busy(&self) -> bool;
}

/// When a progress thread sleeps, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// It spins this long after the last event; `None` is `SPIN_BEFORE_BLOCK` or `SPIN_BEFORE_NAP`.
    pub spin: Option<Duration>,
    /// How long it sleeps at a time where no wait object tells of events.
    pub nap: Duration,
    /// Whether wait objects are used.
    pub use_wait_fd: bool,
}

/// How long a thread spins that can block: an event wakes it at once.
const SPIN_BEFORE_BLOCK: Duration = Duration::from_micros(50);
/// How long a thread spins that must look for itself: longer than a peer takes between what belongs together.
const SPIN_BEFORE_NAP: Duration = Duration::from_millis(1);
/// How long it spins for operations in flight that bring no event: a NIC is done in less, a peer that died is not waited for.
const SPIN_IN_FLIGHT: Duration = Duration::from_millis(50);
/// How late a sleep of our threads may end. The kernel's default of 50 us is as long as the naps.
const TIMER_SLACK: Duration = Duration::from_micros(1);

/// Longest sleep with nothing under way, when wait objects tell of events: a safety net, not a poll.
const IDLE_SLEEP: Duration = Duration::from_secs(1);
/// Longest sleep on wait objects while something is under way: a safety net for wait objects that miss an event.
const BUSY_SLEEP: Duration = Duration::from_millis(5);
/// Sleep of a thread that may not block, because another one has a rail or the provider put a post off.
const LOOK_AGAIN: Duration = Duration::from_micros(50);
/// How often deadlines are looked at.
const TICK: Duration = Duration::from_millis(10);

/// Wakes a sleeping progress thread.
#[derive(Debug)]
pub struct Waker {
    event: EventFd,
    /// The thread, if it naps; else it blocks on the event.
    napper: OnceLock<Thread>,
    asleep: Asleep,
}

impl Waker {
    fn new() -> Result<Self> {
        Ok(Self { event: EventFd::new()?, napper: OnceLock::new(), asleep: Asleep::new() })
    }

    /// Ends the thread's sleep, if it sleeps.
    pub fn wake(&self) {
        if self.asleep.is_to_be_woken() {
            match self.napper.get() {
                Some(thread) => thread.unpark(),
                None => self.event.signal(),
            }
        }
    }
}

/// Shares rails out among threads, given the NUMA node of each: a thread has rails of one node, or of as few as can be,
/// and the rails of a node go to its threads in turn, so that those of one GPU, which are neighbours, do not fall to one.
///
/// Returns the rails of each thread by index, none of them empty.
pub fn deal(nodes: &[Option<u32>], threads: usize) -> Vec<Vec<usize>> {
    let mut by_node: BTreeMap<Option<u32>, Vec<usize>> = BTreeMap::new();
    for (rail, node) in nodes.iter().enumerate() {
        by_node.entry(*node).or_default().push(rail);
    }
    let mut by_node: Vec<Vec<usize>> = by_node.into_values().collect();
    let threads = threads.clamp(1, nodes.len().max(1));
    if threads < by_node.len() {
        // The largest first, each to the thread with the fewest.
        by_node.sort_by_key(|rails| std::cmp::Reverse(rails.len()));
        let mut dealt = vec![Vec::new(); threads];
        for rails in by_node {
            if let Some(fewest) = dealt.iter_mut().min_by_key(|group| group.len()) {
                fewest.extend(rails);
            }
        }
        return dealt;
    }
    // One thread for each node, and each one more where a thread has most to do.
    let mut shares = vec![1; by_node.len()];
    for _ in by_node.len()..threads {
        let load = |at: &usize| (by_node[*at].len() * threads / shares[*at], std::cmp::Reverse(*at));
        if let Some(most) = (0..by_node.len()).filter(|&at| shares[at] < by_node[at].len()).max_by_key(load) {
            shares[most] += 1;
        }
    }
    let dealt = by_node.iter().zip(shares).flat_map(|(rails, share)| {
        (0..share).map(move |first| rails.iter().copied().skip(first).step_by(share).collect())
    });
    dealt.collect()
}

/// The progress threads of an engine.
#[derive(Debug, Default)]
pub struct ProgressThreads {
    stop: Arc<AtomicBool>,
    threads: Vec<(Arc<Waker>, JoinHandle<()>)>,
}

impl ProgressThreads {
    /// Starts one thread for each group of rails. A panic on one poisons the engine of `agent`, and ends them all.
    pub fn start(
        driver: &Arc<dyn Driver>,
        groups: Vec<Vec<Arc<Rail>>>,
        pace: Pace,
        agent: &AgentName,
        poison: &Arc<Poison>,
    ) -> Result<Self> {
        let mut started = Self::default();
        for (i, rails) in groups.into_iter().enumerate() {
            let waker = Arc::new(Waker::new()?);
            let loop_ = Loop {
                driver: Arc::downgrade(driver),
                poller: Poller::new()?,
                rails,
                pace,
                waker: Arc::clone(&waker),
                stop: Arc::clone(&started.stop),
                poison: Arc::clone(poison),
            };
            let (name, agent) = (format!("nixl-fabric-{i}"), agent.clone());
            let thread = crate::sys::thread::spawn_without_signals(name.clone(), move || {
                let poison = Arc::clone(&loop_.poison);
                // What the thread owns goes inside as well: dropping it may panic, too.
                let _ = poison.watch(agent, &name, || loop_.run());
            })
            .map_err(|e| Error::backend(format!("no progress thread could be started: {e}")))?;
            started.threads.push((waker, thread));
        }
        Ok(started)
    }

    /// Wakers of the threads, in the order of the groups.
    pub fn wakers(&self) -> Vec<Arc<Waker>> {
        self.threads.iter().map(|(waker, _)| Arc::clone(waker)).collect()
    }
}

impl Drop for ProgressThreads {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        for (waker, thread) in self.threads.drain(..) {
            waker.asleep.begin();
            waker.wake();
            if thread.thread().id() != std::thread::current().id() {
                // Its panics have stopped inside.
                let _ = thread.join();
            }
        }
    }
}

struct Loop {
    driver: Weak<dyn Driver>,
    poller: Poller,
    rails: Vec<Arc<Rail>>,
    pace: Pace,
    waker: Arc<Waker>,
    stop: Arc<AtomicBool>,
    poison: Arc<Poison>,
}

impl Loop {
    fn run(self) {
        crate::sys::thread::set_timer_slack(TIMER_SLACK);
        let blocks = self.pace.use_wait_fd && self.watch_wait_objects();
        if !blocks {
            self.waker.napper.get_or_init(std::thread::current);
        }
        let spin = self.pace.spin.unwrap_or(if blocks { SPIN_BEFORE_BLOCK } else { SPIN_BEFORE_NAP });
        let mut last_event = Instant::now();
        let mut last_tick = last_event;
        while !self.stop.load(Ordering::Acquire) && !self.poison.is_set() {
            let Some(driver) = self.driver.upgrade() else { return };
            let handled = driver.drive(&self.rails);
            let now = Instant::now();
            if now.duration_since(last_tick) >= TICK {
                last_tick = now;
                driver.tick();
            }
            if handled > 0 {
                last_event = now;
                continue;
            }
            let quiet = now.duration_since(last_event);
            if quiet < spin {
                std::hint::spin_loop();
                continue;
            }
            let busy = driver.is_busy();
            if blocks {
                drop(driver);
                self.block(if busy { BUSY_SLEEP } else { IDLE_SLEEP });
            } else if busy && quiet < SPIN_IN_FLIGHT && !spin.is_zero() {
                std::hint::spin_loop();
            } else {
                drop(driver);
                self.nap();
            }
        }
    }

    /// Adds what the thread blocks on to the poller; false if it cannot block.
    fn watch_wait_objects(&self) -> bool {
        let Some(fds) = self.rails.iter().map(|rail| rail.wait_fd()).collect::<Option<Vec<_>>>() else {
            return false;
        };
        fds.into_iter().chain([self.waker.event.fd()]).all(|fd| match self.poller.add(fd) {
            Ok(()) => true,
            Err(e) => {
                log::warn!("the progress thread cannot wait for events ({e}); it sleeps and looks instead");
                false
            }
        })
    }

    /// Blocks on the wait objects, unless something is there already.
    fn block(&self, longest: Duration) {
        self.waker.asleep.begin();
        let idle = self.driver.upgrade().is_none_or(|driver| driver.may_wait(&self.rails));
        if idle {
            self.poller.wait(longest);
        }
        self.waker.asleep.end();
        self.waker.event.clear();
        if !idle {
            // Not on the wait objects: they tell of what the thread that has the rail is about to take in, so this one would look
            // and look, in the time of the processor that the other waits for.
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Sleeps for a moment, unless woken: a futex costs less than a descriptor, and this is done ten thousand times a second.
    fn nap(&self) {
        self.waker.asleep.begin();
        std::thread::park_timeout(self.pace.nap);
        self.waker.asleep.end();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_rails_of_a_gpu_go_to_different_threads() {
        // A p5: 16 devices on each of two nodes, four in a row for each GPU.
        let nodes: Vec<_> = (0..32).map(|rail| Some(rail / 16)).collect();
        let dealt = deal(&nodes, 8);
        assert_eq!(dealt[0], [0, 4, 8, 12]);
        assert_eq!(dealt[7], [19, 23, 27, 31]);
        // More nodes than threads: whole nodes.
        assert_eq!(deal(&[Some(0), Some(1), Some(2), Some(0)], 2), [vec![0, 3], vec![1, 2]]);
        assert_eq!(deal(&[None, None, None], 1), [[0, 1, 2]]);
        assert_eq!(deal(&[None, None], 5), [[0], [1]]);
    }

    proptest! {
        #[test]
        fn every_rail_has_one_thread_and_no_thread_much_more_than_another(
            nodes in proptest::collection::vec(proptest::option::of(0..5_u32), 1..100),
            threads in 0..70_usize,
        ) {
            let dealt = deal(&nodes, threads);
            prop_assert_eq!(dealt.len(), threads.clamp(1, nodes.len()));
            prop_assert!(dealt.iter().all(|group| !group.is_empty()));
            let mut rails: Vec<_> = dealt.iter().flatten().copied().collect();
            rails.sort_unstable();
            prop_assert_eq!(rails, (0..nodes.len()).collect::<Vec<_>>());
            let node_of = |rail: &usize| nodes[*rail];
            let of_node = |node| nodes.iter().filter(|other| **other == node).count();
            let known: BTreeSet<_> = nodes.iter().copied().collect();
            for node in &known {
                let groups: Vec<_> =
                    dealt.iter().filter(|group| group.iter().any(|rail| node_of(rail) == *node)).collect();
                if threads < known.len() {
                    prop_assert_eq!(groups.len(), 1, "a node is not torn apart");
                    continue;
                }
                prop_assert!(groups.iter().all(|group| group.iter().all(|rail| node_of(rail) == *node)));
                let sizes = groups.iter().map(|group| group.len());
                prop_assert!(sizes.clone().max().unwrap() - sizes.min().unwrap() <= 1);
                // Neighbours are apart as far as there are threads.
                let rails: Vec<_> = (0..nodes.len()).filter(|rail| node_of(rail) == *node).collect();
                for window in rails.windows(groups.len().min(of_node(*node))) {
                    let owners: BTreeSet<_> = window
                        .iter()
                        .map(|rail| dealt.iter().position(|group| group.contains(rail)).unwrap())
                        .collect();
                    prop_assert_eq!(owners.len(), window.len());
                }
            }
        }
    }

    /// Drives until it is told to panic.
    #[derive(Default)]
    struct Fragile {
        breaks: AtomicBool,
    }

    impl Driver for Fragile {
        fn drive(&self, _: &[Arc<Rail>]) -> usize {
            assert!(!self.breaks.load(Ordering::Relaxed), "driven while broken");
            0
        }
        fn may_wait(&self, _: &[Arc<Rail>]) -> bool {
            true
        }
        fn tick(&self) {}
        fn is_busy(&self) -> bool {
            false
        }
    }

    /// Never lets its thread block.
    struct Elsewhere;

    impl Driver for Elsewhere {
        fn drive(&self, _: &[Arc<Rail>]) -> usize {
            0
        }
        fn may_wait(&self, _: &[Arc<Rail>]) -> bool {
            false
        }
        fn tick(&self) {}
        fn is_busy(&self) -> bool {
            true
        }
    }

    #[test]
    fn a_thread_leaves_the_processor_to_another_that_takes_in_what_the_wait_objects_tell_of() {
        let driver: Arc<dyn Driver> = Arc::new(Elsewhere);
        let (arrived, poller) = (EventFd::new().unwrap(), Poller::new().unwrap());
        poller.add(arrived.fd()).unwrap();
        arrived.signal();
        let thread = Loop {
            driver: Arc::downgrade(&driver),
            poller,
            rails: Vec::new(),
            pace: Pace { spin: None, nap: Duration::ZERO, use_wait_fd: true },
            waker: Arc::new(Waker::new().unwrap()),
            stop: Arc::default(),
            poison: Arc::default(),
        };
        let start = Instant::now();
        thread.block(BUSY_SLEEP);
        assert!(start.elapsed() >= LOOK_AGAIN, "it looked again at once");
    }

    #[test]
    fn a_panic_on_a_progress_thread_poisons_the_engine_and_ends_all_threads() {
        let poison = Arc::<Poison>::default();
        let fragile = Arc::new(Fragile::default());
        let driver: Arc<dyn Driver> = Arc::clone(&fragile) as Arc<dyn Driver>;
        let pace = Pace { spin: Some(Duration::ZERO), nap: Duration::from_millis(1), use_wait_fd: false };
        let threads =
            ProgressThreads::start(&driver, vec![vec![], vec![]], pace, &"a".into(), &poison).unwrap();
        assert!(!poison.is_set());
        fragile.breaks.store(true, Ordering::Relaxed);
        for (_, thread) in &threads.threads {
            let deadline = Instant::now() + Duration::from_secs(30);
            while !thread.is_finished() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(thread.is_finished() && poison.is_set());
        }
    }
}
