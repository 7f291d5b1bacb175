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
    /// Starts one thread for each group of rails.
    pub fn start(driver: &Arc<dyn Driver>, groups: Vec<Vec<Arc<Rail>>>, pace: Pace) -> Result<Self> {
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
            };
            let thread = crate::sys::thread::spawn_without_signals(format!("nixl-fabric-{i}"), move || {
                loop_.run();
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
            if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
                log::error!("a progress thread panicked");
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
}

impl Loop {
    fn run(&self) {
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
        while !self.stop.load(Ordering::Acquire) {
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
