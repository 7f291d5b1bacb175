//! What calls and progress threads share: driving rails, deadlines, teardown. What driving brings is acted on in
//! `events`.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use super::placement::Placement;
use super::staging::Staging;
use super::vram::Vram;
use crate::config::Config;
use crate::notify::Inbox;
use crate::peer::{Local, PeerTable};
use crate::progress::{Driver, Waker};
use crate::rail::{Event, Rail};
use crate::transfer::plan::Cutting;
use crate::transfer::{LocalCopies, Rates};
use crate::types::RailId;

/// The part of an engine that outlives a call.
pub(super) struct Shared {
    pub config: Config,
    pub local: Arc<Local>,
    pub peers: PeerTable,
    pub inbox: Inbox,
    pub copies: LocalCopies,
    pub local_rates: Rates,
    pub remote_rates: Rates,
    /// Counts posts and registrations, so that equal ones take turns on the rails.
    pub turns: AtomicUsize,
    pub placement: Placement,
    pub vram: Vram,
    pub staging: Staging,
    /// Remote addresses are virtual ones, not offsets into a region.
    pub virtual_addresses: bool,
    /// Longest operation that every rail takes.
    pub message_bytes_max: u64,
    pub wakers: OnceLock<Vec<Arc<Waker>>>,
    /// Something waits for a peer.
    pub waiting: AtomicBool,
    pub last_tick: AtomicU64,
    pub started: Instant,
    /// Malformed input so far; the log shows the first ones.
    pub malformed: AtomicU64,
}

/// How often deadlines are looked at where no progress thread does.
const TICK_US: u64 = 10_000;
/// At teardown, how long nothing may happen before what is left is given up.
const DRAIN_SILENCE: Duration = Duration::from_millis(200);

impl Shared {
    /// The next turn.
    pub fn turn(&self) -> usize {
        self.turns.fetch_add(1, Ordering::Relaxed)
    }

    /// Drives the rail of control messages, where something was just left.
    pub fn kick(&self) {
        self.drive_after([RailId(0)].into_iter(), Vec::new());
    }

    /// Drives these rails once each, on which work was just left, and acts on what happened and on `events`.
    pub fn drive_after(&self, rails: impl Iterator<Item = RailId>, mut events: Vec<Event>) {
        let rails = rails.map(|rail| &self.local.rails[rail.index()]);
        let backlog = self.vram.within(|| {
            rails.fold(false, |backlog, rail| {
                rail.drive(self.inbox.has_room(), &mut events);
                backlog | !rail.is_idle()
            })
        });
        self.act(events);
        if backlog {
            self.wake();
        }
    }

    /// Drives these rails, and the one for control messages, once each.
    pub fn drive_some(&self, rails: impl Iterator<Item = RailId>) -> usize {
        let others = rails.filter(|rail| rail.index() != 0).map(|rail| &self.local.rails[rail.index()]);
        self.drive_rails(std::iter::once(&self.local.rails[0]).chain(others))
    }

    /// Drives everything once.
    pub fn drive_all(&self) -> usize {
        self.drive(&self.local.rails)
    }

    fn drive_rails<'a>(&self, rails: impl Iterator<Item = &'a Arc<Rail>>) -> usize {
        let mut events = Vec::new();
        let room = self.inbox.has_room();
        let handled = self.vram.within(|| rails.map(|rail| rail.drive(room, &mut events)).sum());
        self.act(events);
        handled
    }

    /// How pieces are cut.
    pub fn cutting(&self) -> Cutting {
        Cutting {
            striping_threshold_bytes: self.config.striping_threshold_bytes,
            chunk_bytes_max: self.config.chunk_bytes_max,
            message_bytes_max: self.message_bytes_max,
        }
    }

    /// Gets on with what moves by copies here.
    pub fn drive_copies(&self) -> usize {
        let copied = self.copies.drive(|message| self.inbox.push(self.local.name.clone(), message));
        copied + self.staging.drive(self)
    }

    /// Wakes the progress threads.
    pub fn wake(&self) {
        for waker in self.wakers.get().into_iter().flatten() {
            waker.wake();
        }
    }

    /// Looks after deadlines, where no progress thread does.
    pub fn tick_if_due(&self) {
        let now = self.started.elapsed().as_micros() as u64;
        let last = self.last_tick.load(Ordering::Relaxed);
        if now - last >= TICK_US
            && self.last_tick.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            self.tick();
        }
    }

    /// Sends what waits to be sent, for as long as that gets on.
    pub fn drain(&self) {
        let start = Instant::now();
        let mut last_event = start;
        while !self.local.rails.iter().all(|rail| rail.is_idle()) {
            if self.drive_all() > 0 {
                last_event = Instant::now();
            } else if last_event.elapsed() > DRAIN_SILENCE || start.elapsed() > self.config.drain_timeout {
                let left = self.local.rails.iter().filter(|rail| !rail.is_idle()).count();
                log::warn!("the backend is destroyed with operations in flight on {left} rails");
                return;
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }

    /// Closes peers and rails. Nothing drives a rail any more.
    pub fn close(&self) {
        let mut events = Vec::new();
        for peer in self.peers.all() {
            if let Some(released) = self.peers.remove(peer.name()) {
                self.release(released, &mut events);
            }
        }
        self.staging.clear();
        // The control rail last: transfers that end on the others leave messages there.
        for rail in self.local.rails.iter().rev() {
            self.vram.within(|| rail.close(&mut events));
            self.act(std::mem::take(&mut events));
            log::debug!("rail {} ({}): {}", rail.id(), rail.device().domain_name(), rail.counters());
        }
    }
}

impl Driver for Shared {
    fn drive(&self, rails: &[Arc<Rail>]) -> usize {
        self.drive_rails(rails.iter()) + self.drive_copies()
    }

    fn may_wait(&self, rails: &[Arc<Rail>]) -> bool {
        self.vram.within(|| rails.iter().all(|rail| rail.try_wait()))
    }

    fn tick(&self) {
        let now = Instant::now();
        let (mut waiting, mut events) = (false, Vec::new());
        for peer in self.peers.all() {
            let (waits, released) = peer.tick(now);
            waiting |= waits;
            self.release(released, &mut events);
        }
        self.waiting.store(waiting, Ordering::Relaxed);
        self.act(events);
    }

    fn is_busy(&self) -> bool {
        self.waiting.load(Ordering::Relaxed)
            || self.copies.is_busy()
            || self.staging.is_busy()
            || self.local.rails.iter().any(|rail| rail.has_backlog() || !rail.is_idle())
    }
}
