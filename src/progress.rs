//! Who drives the rails, and when to sleep.
//!
//! Whoever is in a call may drive a rail that nobody holds. With NIXL's progress thread on, threads of our
//! own do so too: each looks after a group of rails, spins for a few tens of microseconds after the last
//! event, and then blocks on the rails' wait objects, or sleeps where the provider has none. Idle costs nothing.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

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
    /// It spins this long after the last event.
    pub spin: Duration,
    /// Longest sleep where no wait object tells of events, and while something is under way.
    pub sleep_max: Duration,
    /// Whether wait objects are used.
    pub use_wait_fd: bool,
}

/// Longest sleep with nothing under way, when wait objects tell of events: a safety net, not a poll.
const IDLE_SLEEP: Duration = Duration::from_secs(1);
/// Longest sleep on wait objects while something is under way: a safety net for wait objects that miss an event.
const BUSY_SLEEP: Duration = Duration::from_millis(5);
/// How often deadlines are looked at.
const TICK: Duration = Duration::from_millis(10);

/// Wakes sleeping progress threads.
#[derive(Debug)]
pub struct Waker {
    event: EventFd,
    sleeping: AtomicBool,
}

impl Waker {
    fn new() -> Result<Self> {
        Ok(Self { event: EventFd::new()?, sleeping: AtomicBool::new(false) })
    }

    /// Ends the thread's sleep, if it sleeps.
    pub fn wake(&self) {
        if self.sleeping.swap(false, Ordering::AcqRel) {
            self.event.signal();
        }
    }
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
            waker.sleeping.store(true, Ordering::Release);
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
        let fds: Option<Vec<i32>> =
            if self.pace.use_wait_fd { self.rails.iter().map(|rail| rail.wait_fd()).collect() } else { None };
        for fd in fds.iter().flatten().copied().chain([self.waker.event.fd()]) {
            if let Err(e) = self.poller.add(fd) {
                log::warn!("the progress thread cannot wait for events ({e}); it sleeps and looks instead");
            }
        }
        let mut last_event = Instant::now();
        let mut last_tick = last_event;
        let mut sleep = Duration::from_micros(1);
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
                sleep = Duration::from_micros(1);
                continue;
            }
            if now.duration_since(last_event) < self.pace.spin {
                std::hint::spin_loop();
                continue;
            }
            let busy = driver.is_busy();
            drop(driver);
            if fds.is_some() {
                self.block(if busy { BUSY_SLEEP } else { IDLE_SLEEP });
            } else {
                // Without wait objects: look ever less often, up to the configured pace.
                sleep = (sleep * 2).min(self.pace.sleep_max);
                self.nap(sleep);
            }
        }
    }

    /// Blocks on the wait objects, unless something is there already.
    fn block(&self, longest: Duration) {
        self.waker.sleeping.store(true, Ordering::SeqCst);
        let idle = self.driver.upgrade().is_none_or(|driver| driver.may_wait(&self.rails));
        if idle {
            self.poller.wait(longest);
        } else {
            // Another thread holds a rail, or work could not be posted: look again soon, but let it go on.
            self.poller.wait(Duration::from_micros(50));
        }
        self.waker.sleeping.store(false, Ordering::Release);
        self.waker.event.clear();
    }

    fn nap(&self, time: Duration) {
        self.waker.sleeping.store(true, Ordering::SeqCst);
        self.poller.wait(time);
        self.waker.sleeping.store(false, Ordering::Release);
        self.waker.event.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn a_panic_on_a_progress_thread_poisons_the_engine_and_ends_all_threads() {
        let poison = Arc::<Poison>::default();
        let (tell, told) = std::sync::mpsc::channel();
        poison.on_panic(move |place| tell.send(place.to_owned()).unwrap());
        let fragile = Arc::new(Fragile::default());
        let driver: Arc<dyn Driver> = Arc::clone(&fragile) as Arc<dyn Driver>;
        let pace = Pace { spin: Duration::ZERO, sleep_max: Duration::from_millis(1), use_wait_fd: false };
        let threads =
            ProgressThreads::start(&driver, vec![vec![], vec![]], pace, &"a".into(), &poison).unwrap();
        assert!(!poison.is_set());
        fragile.breaks.store(true, Ordering::Relaxed);
        let place = told.recv_timeout(Duration::from_secs(30)).expect("the panic is told");
        assert!(place.starts_with("nixl-fabric-") && poison.is_set());
        for (_, thread) in &threads.threads {
            let deadline = Instant::now() + Duration::from_secs(30);
            while !thread.is_finished() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(thread.is_finished());
        }
    }
}
