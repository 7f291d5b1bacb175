//! What an engine has below its transfers: rails, peers, what came in. What driving rails brings is acted on in `events`;
//! who drives everything is in `works`.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use super::mail::Mail;
use super::metrics::TransferCounts;
use super::placement::Placement;
use super::vram::Vram;
use crate::config::Config;
use crate::notify::Inbox;
use crate::peer::{Local, PeerTable};
use crate::progress::Waker;
use crate::rail::{Event, Rail};
use crate::transfer::plan::Cutting;
use crate::transfer::{Copies, Rates};
use crate::types::RailId;

/// The part of an engine that outlives a call.
pub(super) struct Shared {
    pub config: Config,
    pub local: Arc<Local>,
    pub peers: PeerTable,
    pub inbox: Inbox,
    /// Nothing is received, because the application takes no notifications.
    pub full: AtomicBool,
    pub copies: Copies,
    pub local_rates: Rates,
    pub remote_rates: Rates,
    /// Where metrics are served.
    pub counts: Option<TransferCounts>,
    /// Counts posts and registrations, so that equal ones take turns on the rails.
    pub turns: AtomicUsize,
    pub placement: Placement,
    pub vram: Vram,
    /// What peers say about staging.
    pub mail: Mail,
    /// Remote addresses are virtual ones, not offsets into a region.
    pub virtual_addresses: bool,
    /// Longest operation that every rail takes.
    pub message_bytes_max: u64,
    pub wakers: OnceLock<Vec<Arc<Waker>>>,
    /// Malformed input so far; the log shows the first ones.
    pub malformed: AtomicU64,
}

impl Shared {
    /// The next turn.
    pub fn turn(&self) -> usize {
        self.turns.fetch_add(1, Ordering::Relaxed)
    }

    /// Whether there is room for notifications: whether messages are to be received.
    pub fn has_room(&self) -> bool {
        let room = self.inbox.has_room();
        // Looked at first: rails are driven often, and this changes seldom.
        if self.full.load(Ordering::Relaxed) == room && self.full.swap(!room, Ordering::Relaxed) == room {
            let bytes = self.config.inbox_bytes_max;
            if room {
                log::info!("agent {}: notifications are taken again, and received", self.local.name);
            } else {
                log::warn!(
                    "agent {}: {bytes} bytes of notifications wait for the application (inbox_bytes_max), so its peers \
                     wait, too, until it takes them: does it call getNotifs?",
                    self.local.name
                );
            }
        }
        room
    }

    /// Drives the rails of control messages, where something was just left.
    pub fn kick(&self) {
        self.drive_after(self.local.message_rails().iter().map(|rail| rail.id()), Vec::new());
    }

    /// Drives these rails once each, on which work was just left, and acts on what happened and on `events`.
    pub fn drive_after(&self, rails: impl Iterator<Item = RailId>, mut events: Vec<Event>) {
        let rails = rails.map(|rail| &self.local.rails[rail.index()]);
        let room = self.has_room();
        let backlog = self.vram.within(|| {
            rails.fold(false, |backlog, rail| {
                rail.drive(room, &mut events);
                backlog | !rail.is_idle()
            })
        });
        self.act(events);
        if backlog {
            self.wake();
        }
    }

    /// Drives these rails, and those for control messages, once each.
    pub fn drive_some(&self, rails: impl Iterator<Item = RailId>) -> usize {
        let control = self.local.message_rails();
        let is_other = |rail: &RailId| control.iter().all(|control| control.id() != *rail);
        let others = rails.filter(is_other).map(|rail| &self.local.rails[rail.index()]);
        self.drive_rails(control.iter().chain(others))
    }

    /// Drives these rails once each, and acts on what happened.
    pub fn drive_rails<'a>(&self, rails: impl Iterator<Item = &'a Arc<Rail>>) -> usize {
        let mut events = Vec::new();
        let room = self.has_room();
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

    /// Wakes the progress threads.
    pub fn wake(&self) {
        for waker in self.wakers.get().into_iter().flatten() {
            waker.wake();
        }
    }
}
