//! Everything that an engine has to do: rails and peers, copies, staging. What progress threads drive, and what calls drive
//! where there are none; deadlines; teardown.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::shared::Shared;
use super::staging::Staging;
use crate::neighbour::Board;
use crate::progress::Driver;
use crate::rail::Rail;

/// The part of an engine that outlives a call.
pub(super) struct Works {
    pub shared: Shared,
    pub staging: Staging,
    /// Something waits for a peer.
    waiting: AtomicBool,
    last_tick: AtomicU64,
    started: Instant,
}

/// How often deadlines are looked at where no progress thread does.
const TICK_US: u64 = 10_000;
/// At teardown, how long nothing may happen before what is left is given up.
const DRAIN_SILENCE: Duration = Duration::from_millis(200);

impl Works {
    pub fn new(shared: Shared) -> Self {
        Self {
            shared,
            staging: Staging::default(),
            waiting: AtomicBool::new(false),
            last_tick: AtomicU64::new(0),
            started: Instant::now(),
        }
    }

    /// Drives everything once.
    pub fn drive_all(&self) -> usize {
        self.drive(&self.shared.local.rails)
    }

    /// Gets on with what moves by copies here.
    pub fn drive_copies(&self) -> usize {
        self.shared.drive_copies() + self.staging.drive(&self.shared)
    }

    /// Looks after deadlines, where no progress thread does.
    pub fn tick_if_due(&self) {
        let now = self.started.elapsed().as_micros() as u64;
        let last = self.last_tick.load(Ordering::Relaxed);
        if now - last >= TICK_US
            && self.last_tick.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            self.tick();
            // Peers' messages come in at any rail, once one was lost.
            self.drive_all();
        }
    }

    /// Sends what waits to be sent, for as long as that gets on.
    pub fn drain(&self) {
        let start = Instant::now();
        let mut last_event = start;
        loop {
            let copying = self.shared.copies.is_busy();
            if !copying && self.shared.local.rails.iter().all(|rail| rail.is_idle()) {
                return;
            }
            let handled = self.drive_all();
            let late = start.elapsed() > self.shared.config.drain_timeout;
            // To ask a GPU whether it has copied is something done, too, though nothing gets on.
            if handled > 0 && !(copying && late) {
                last_event = Instant::now();
                continue;
            }
            if late || last_event.elapsed() > DRAIN_SILENCE {
                if late {
                    self.shared.counts.as_ref().inspect(|counts| counts.undrained());
                }
                let left = self.shared.local.rails.iter().filter(|rail| !rail.is_idle()).count();
                let agent = &self.shared.local.name;
                log::warn!(
                    "agent {agent}: the backend is destroyed with operations in flight on {left} rails"
                );
                return;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Waits until no peer of this host copies any more, `drain_timeout_ms` at most.
    fn dismiss(&self, board: &Arc<Board>) {
        let deadline = Instant::now() + self.shared.config.drain_timeout;
        let mut copiers = board.close();
        while !copiers.have_left() {
            if Instant::now() > deadline {
                self.shared.counts.as_ref().inspect(|counts| counts.undrained());
                log::warn!("the backend is destroyed while {} peers of this host copy", copiers.count());
                return;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Closes peers and rails. Nothing drives a rail any more.
    pub fn close(&self) {
        self.shared.local.board.as_ref().inspect(|board| self.dismiss(board));
        let mut events = Vec::new();
        for peer in self.shared.peers.all() {
            if let Some(released) = self.shared.peers.remove(peer.name()) {
                self.shared.release(released, &mut events);
            }
        }
        self.staging.clear();
        for rail in &self.shared.local.rails {
            self.shared.vram.within(|| rail.close(&mut events));
            self.shared.act(std::mem::take(&mut events));
            log::debug!("rail {} ({}): {}", rail.id(), rail.device().domain_name(), rail.counters());
        }
    }
}

impl Driver for Works {
    fn drive(&self, rails: &[Arc<Rail>]) -> usize {
        self.shared.drive_rails(rails.iter()) + self.drive_copies()
    }

    fn may_wait(&self, rails: &[Arc<Rail>]) -> bool {
        self.shared.vram.within(|| rails.iter().all(|rail| rail.try_wait()))
    }

    fn tick(&self) {
        let now = Instant::now();
        let (mut waiting, mut events) = (false, Vec::new());
        for peer in self.shared.peers.all() {
            peer.sweep();
            let (waits, released) = peer.tick(now);
            waiting |= waits;
            self.shared.release(released, &mut events);
        }
        self.waiting.store(waiting, Ordering::Relaxed);
        self.shared.act(events);
    }

    fn is_busy(&self) -> bool {
        self.waiting.load(Ordering::Relaxed)
            || self.shared.copies.is_busy()
            || self.shared.mail.is_busy()
            || self.shared.local.rails.iter().any(|rail| rail.has_backlog() || !rail.is_idle())
    }
}
