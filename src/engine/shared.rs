//! What calls and progress threads share: the rails' events, driving, deadlines, teardown.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::placement::Placement;
use super::staging::Staging;
use super::vram::Vram;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::notify::Inbox;
use crate::peer::{Local, Peer, PeerTable};
use crate::progress::{Driver, Waker};
use crate::rail::{Rail, RailEvents};
use crate::transfer::plan::Cutting;
use crate::transfer::{LocalCopies, Rates};
use crate::types::{AgentName, RailId};
use crate::wire::{Body, ConnectionInfo, ControlMessage, Handshake, Immediate, StockFragment};

/// The part of an engine that outlives a call.
pub(super) struct Shared {
    pub config: Config,
    pub local: Arc<Local>,
    pub peers: PeerTable,
    pub inbox: Inbox,
    pub copies: LocalCopies,
    pub local_rates: Rates,
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

/// Malformed messages that are logged one by one; after that, each hundredth.
const MALFORMED_LOGGED: u64 = 20;
/// How often deadlines are looked at where no progress thread does.
const TICK_US: u64 = 10_000;
/// At teardown, how long nothing may happen before what is left is given up.
const DRAIN_SILENCE: Duration = Duration::from_millis(200);

impl Shared {
    /// Drives one rail, for work that was just left there.
    pub fn kick(&self, rail: RailId) {
        let rail = &self.local.rails[rail.index()];
        self.vram.within(|| {
            rail.kick(self);
            self.deliver_mail();
        });
        if rail.has_backlog() {
            self.wake();
        }
    }

    /// Drives these rails and the one for control messages.
    pub fn drive_some(&self, rails: impl Iterator<Item = RailId>) -> usize {
        self.vram.within(|| {
            let control = self.local.rails[0].drive(self);
            let others: usize = rails
                .filter(|rail| rail.index() != 0)
                .map(|rail| self.local.rails[rail.index()].drive(self))
                .sum();
            if control + others > 0 {
                self.deliver_mail();
            }
            control + others
        })
    }

    /// Drives everything once.
    pub fn drive_all(&self) -> usize {
        self.drive(&self.local.rails)
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

    /// Events of one rail can leave work on others: a handshake that lets transfers go, a notification after a READ.
    fn deliver_mail(&self) {
        while let Some(rail) = self.local.rails.iter().find(|rail| rail.has_mail()) {
            if rail.drive(self) == 0 {
                return;
            }
        }
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
        for peer in self.peers.all() {
            self.peers.remove(peer.name());
        }
        self.staging.clear();
        // The control rail last: transfers that end on the others leave messages there.
        for rail in self.local.rails.iter().rev() {
            self.vram.within(|| rail.close());
            log::debug!("rail {} ({}): {}", rail.id(), rail.device().domain_name(), rail.counters());
        }
    }

    fn on_control(&self, immediate: Option<u32>, body: &[u8]) -> Result<()> {
        let immediate = immediate.ok_or_else(|| Error::invalid("a message without immediate data"))?;
        match Immediate::decode(u64::from(immediate))? {
            Immediate::StockHandshake { .. } => self.on_hello(&Handshake::decode(body)?),
            Immediate::StockNotification { index, .. } => {
                let fragment = StockFragment::decode(body)?;
                let Some(peer) = self.peers.by_index(u16::from(index)) else { return Ok(()) };
                let message = peer.receive(|receiver| receiver.on_stock_fragment(&fragment))?;
                self.deliver(&peer, message);
                Ok(())
            }
            Immediate::Control { peer } => {
                let message = ControlMessage::decode(body)?;
                let Some(peer) = self.peers.by_index(peer) else { return Ok(()) };
                if !peer.is_current(message.session) {
                    return Ok(());
                }
                match message.body {
                    Body::Fragment(fragment) => {
                        let message = peer.receive(|receiver| receiver.on_fragment(&fragment))?;
                        self.deliver(&peer, message);
                        Ok(())
                    }
                    Body::TransferFailed { transfer_id, .. } => {
                        peer.receive(|receiver| receiver.on_transfer_failed(transfer_id))
                    }
                    Body::Ack { completed_below } => peer.on_ack(message.session, completed_below),
                    Body::Goodbye => Ok(()),
                    Body::Staging(message) => self.staging.on_message(peer, message),
                }
            }
            other => Err(Error::invalid(format!("a message came with the immediate data of {other:?}"))),
        }
    }

    fn on_hello(&self, hello: &Handshake) -> Result<()> {
        let name = AgentName::from(hello.name.as_slice());
        if name == self.local.name {
            return Err(Error::invalid(format!(
                "a handshake in our own name ({name}); agent names must differ"
            )));
        }
        if let Some(conn) = &hello.conn {
            let info = ConnectionInfo::decode(conn)?;
            return self.peers.load(&name, info, false, &self.local)?.on_hello(hello);
        }
        if let Some(peer) = self.peers.get(&name) {
            return peer.on_hello(hello);
        }
        // It was removed here while the handshake was under way.
        if hello.extension.is_none() {
            self.peers.hear_former(&name, hello.index);
        }
        Ok(())
    }

    fn on_write(&self, immediate: u32) -> Result<()> {
        let (peer, message) = match Immediate::decode(u64::from(immediate))? {
            Immediate::StockTransfer { index, id } => {
                let Some(peer) = self.peers.by_index(u16::from(index)) else { return Ok(()) };
                let message = peer.receive(|receiver| receiver.on_stock_immediate(id))?;
                (peer, message)
            }
            Immediate::Transfer { peer, id_low } => {
                let Some(peer) = self.peers.by_index(peer) else { return Ok(()) };
                let message = peer.receive(|receiver| receiver.on_transfer_immediate(id_low));
                (peer, message)
            }
            other => {
                return Err(Error::invalid(format!("a write came with the immediate data of {other:?}")));
            }
        };
        self.deliver(&peer, message);
        Ok(())
    }

    fn deliver(&self, peer: &Arc<Peer>, message: Option<Vec<u8>>) {
        let Some(message) = message else { return };
        if self.peers.is_heard(peer) {
            self.inbox.push(peer.name().clone(), message);
        } else {
            log::debug!("a notification of {}, which was removed, is dropped", peer.name());
        }
    }

    fn refused(&self, error: &Error) {
        let count = self.malformed.fetch_add(1, Ordering::Relaxed) + 1;
        if count <= MALFORMED_LOGGED || count.is_multiple_of(100) {
            log::warn!("dropped what a peer sent: {error} ({count} so far)");
        }
    }
}

impl RailEvents for Shared {
    fn on_message(&self, immediate: Option<u32>, body: &[u8]) {
        if let Err(e) = self.on_control(immediate, body) {
            self.refused(&e);
        }
    }

    fn on_immediate(&self, immediate: u32) {
        if let Err(e) = self.on_write(immediate) {
            self.refused(&e);
        }
    }

    fn has_room(&self) -> bool {
        self.inbox.has_room()
    }
}

impl Driver for Shared {
    fn drive(&self, rails: &[Arc<Rail>]) -> usize {
        let handled = self.vram.within(|| {
            let handled: usize = rails.iter().map(|rail| rail.drive(self)).sum();
            if handled > 0 {
                self.deliver_mail();
            }
            handled
        });
        handled + self.drive_copies()
    }

    fn may_wait(&self, rails: &[Arc<Rail>]) -> bool {
        self.vram.within(|| rails.iter().all(|rail| rail.try_wait()))
    }

    fn tick(&self) {
        let now = Instant::now();
        let mut waiting = false;
        for peer in self.peers.all() {
            waiting |= peer.tick(now);
        }
        self.waiting.store(waiting, Ordering::Relaxed);
        self.vram.within(|| self.deliver_mail());
    }

    fn is_busy(&self) -> bool {
        self.waiting.load(Ordering::Relaxed)
            || self.copies.is_busy()
            || self.staging.is_busy()
            || self.local.rails.iter().any(|rail| rail.has_backlog() || !rail.is_idle())
    }
}
