//! What driving rails brings, and what becomes of it. Nothing here runs while a rail is held, so everything may leave work
//! on any rail, and drive it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::shared::Shared;
use super::{own, remote};
use crate::error::{Error, Result};
use crate::peer::{Introduction, Outgoing, Peer, Released};
use crate::rail::{Event, Message, Tag};
use crate::transfer::CopyOver;
use crate::types::{AgentName, RailId};
use crate::wire::stock::final_writes;
use crate::wire::{Body, ConnectionInfo, ControlMessage, Handshake, Immediate, StockFragment};

/// Malformed messages that are logged one by one; after that, each hundredth.
const MALFORMED_LOGGED: u64 = 20;
/// How often acting on events may lead to more of them in one call. What is left then is the next one's.
const PASSES_MAX: usize = 4;

impl Shared {
    /// Acts on what happened, and on what that leads to.
    pub fn act(&self, mut events: Vec<Event>) {
        for pass in 0.. {
            if events.is_empty() {
                return;
            }
            let mut next = Vec::new();
            for event in events {
                self.on_event(event, &mut next);
            }
            // Messages that were left there: notifications, answers to handshakes.
            for rail in self.local.message_rails().iter().filter(|rail| rail.has_mail()) {
                if pass < PASSES_MAX {
                    self.vram.within(|| rail.drive(self.has_room(), &mut next));
                } else {
                    self.wake();
                }
            }
            events = next;
        }
    }

    fn on_event(&self, event: Event, next: &mut Vec<Event>) {
        let outcome = match event {
            Event::WorkFailed { work } => {
                if let (Some(transfer), Some(error)) = (remote::of_tag(work.tag()), work.error()) {
                    transfer.fail(error, next);
                }
                Ok(())
            }
            Event::WorkOver { work } => {
                let outcome = work.error().map_or(Ok(()), Err);
                if let (Ok(()), Some(transfer)) = (&outcome, remote::of_tag(work.tag())) {
                    transfer.work_done(&work, self);
                }
                self.part_over(work.tag(), outcome, next);
                Ok(())
            }
            Event::WorkLeft { work, error } => {
                if let Some(transfer) = remote::of_tag(work.tag()) {
                    transfer.go_on(&work, error, self, next);
                }
                Ok(())
            }
            Event::WorkWaits { work } => {
                if let Some(transfer) = remote::of_tag(work.tag()) {
                    transfer.widen(&work, self, next);
                }
                Ok(())
            }
            Event::MessageReturned { message, rail, error } => {
                let (before, after) = self.local.rails.split_at(rail.index() + 1);
                let mut others = after.iter().chain(before).filter(|other| other.id() != rail);
                let other = others.find(|other| other.failure().is_none());
                // As often as there are others.
                let outgoing = Arc::clone(&message.tag).downcast::<Outgoing>().ok();
                let may = outgoing.is_some_and(|out| out.returns() + 1 < self.local.rails.len());
                if let Some(other) = other.filter(|_| may) {
                    other.send(message);
                    self.vram.within(|| other.drive(self.has_room(), next));
                } else {
                    self.on_message_over(message.tag, Err(error), next);
                }
                Ok(())
            }
            Event::MessageLost { message, rail, error } => {
                self.send_again(message, rail, error, next);
                Ok(())
            }
            Event::Failed => {
                for peer in self.peers.all() {
                    peer.tell_failure();
                }
                Ok(())
            }
            Event::MessageOver { tag, result } => {
                self.on_message_over(tag, result, next);
                Ok(())
            }
            Event::Admitted { tag } => {
                if let Ok(introduction) = tag.downcast::<Introduction>() {
                    introduction.admitted();
                }
                Ok(())
            }
            Event::Message { immediate, body } => self.on_message(immediate, &body, next),
            Event::Landed { immediate, count } => self.on_landed(immediate, count),
        };
        if let Err(e) = outcome {
            self.refused(&e);
        }
    }

    /// A message was lost between a rail and an endpoint of its peer.
    fn send_again(&self, mut message: Message, rail: RailId, error: Error, next: &mut Vec<Event>) {
        let outgoing = Arc::clone(&message.tag).downcast::<Outgoing>().ok();
        let way =
            outgoing.as_ref().and_then(|out| out.peer().divert(out, rail, &message.destination, &error));
        let Some((other, to)) = way else { return self.on_message_over(message.tag, Err(error), next) };
        message.destination = to;
        other.send(message);
        self.vram.within(|| other.drive(self.has_room(), next));
    }

    /// Copies for one turn, and acts on what that leads to. Returns how much was done.
    pub fn drive_copies(&self) -> usize {
        let (handled, over) = self.copies.drive();
        let Some(CopyOver { tag, outcome }) = over else { return handled };
        if let Some(transfer) = own::of_tag(&tag) {
            transfer.part_over(outcome, self);
        } else {
            let mut events = Vec::new();
            self.part_over(&tag, outcome, &mut events);
            self.act(events);
            if self.local.has_mail() {
                self.kick();
            }
        }
        handled
    }

    /// Transfers no longer wait for their peer.
    pub fn release(&self, released: Released, next: &mut Vec<Event>) {
        for tag in released.begin {
            let Some(transfer) = remote::of_tag(&tag) else { continue };
            transfer.begin(self, next);
            transfer.drive_rails(self, next);
        }
        for (tag, error) in released.failed {
            self.part_over(&tag, Err(error), next);
        }
        released.unmapped.inspect(|neighbour| neighbour.unmap());
    }

    fn part_over(&self, tag: &Tag, outcome: Result<()>, next: &mut Vec<Event>) {
        if let Some(transfer) = remote::of_tag(tag) {
            transfer.part_over(outcome, self, next);
        }
    }

    fn on_message_over(&self, tag: Tag, result: Result<()>, next: &mut Vec<Event>) {
        let Ok(outgoing) = tag.downcast::<Outgoing>() else { return };
        let released = outgoing.peer().on_sent(&outgoing, &result);
        self.release(released, next);
        if let Some(of) = outgoing.of() {
            self.part_over(of, result.map_err(|e| e.context("its notification could not be sent")), next);
        }
    }

    fn on_message(&self, immediate: Option<u32>, body: &[u8], next: &mut Vec<Event>) -> Result<()> {
        let immediate = immediate.ok_or_else(|| Error::invalid("a message without immediate data"))?;
        match Immediate::decode(u64::from(immediate))? {
            Immediate::StockHandshake { .. } => self.on_hello(&Handshake::decode(body)?, next),
            Immediate::StockNotification { index, .. } => {
                let fragment = StockFragment::decode(body)?;
                let Some(peer) = self.peers.by_index(u16::from(index)) else { return Ok(()) };
                let message = peer.receive(|receiver| receiver.on_stock_fragment(&fragment))?;
                self.deliver(&peer, message);
                Ok(())
            }
            Immediate::StockFailure { index, id } => {
                let final_writes = final_writes(body)?;
                let Some(peer) = self.peers.by_index(u16::from(index)) else { return Ok(()) };
                peer.receive(|receiver| receiver.on_stock_failed(id, final_writes))
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
                    Body::Staging(message) => self.mail.take_in(peer, message),
                }
            }
            other @ Immediate::StockTransfer { .. } => {
                Err(Error::invalid(format!("a message came with the immediate data of {other:?}")))
            }
        }
    }

    fn on_hello(&self, hello: &Handshake, next: &mut Vec<Event>) -> Result<()> {
        let name = AgentName::from(hello.name.as_slice());
        if name == self.local.name {
            return Err(Error::invalid(format!(
                "a handshake in our own name ({name}); agent names must differ"
            )));
        }
        let peer = if let Some(conn) = &hello.conn {
            let info = ConnectionInfo::decode(conn)?;
            let (peer, released) = self.peers.load(&name, info, false, &self.local)?;
            self.release(released, next);
            // Whoever is told of us may reach our memory; that both sides say so helps whoever reads their logs.
            peer.neighbour();
            peer
        } else if let Some(peer) = self.peers.get(&name) {
            peer
        } else {
            // It was removed here while the handshake was under way.
            if hello.extension.is_none() {
                self.peers.hear_former(&name, hello.index);
            }
            return Ok(());
        };
        let released = peer.on_hello(hello)?;
        self.release(released, next);
        if peer.stages_vram() {
            // It may have forgotten what it has lent.
            self.mail.set_busy(true);
        }
        Ok(())
    }

    /// Writes of a peer with the C++ plugin, which counts on being counted.
    fn on_landed(&self, immediate: u32, count: u32) -> Result<()> {
        let Immediate::StockTransfer { index, id } = Immediate::decode(u64::from(immediate))? else {
            return Err(Error::invalid(format!(
                "a write came with the immediate data {immediate:#x}, which is no transfer's of the C++ plugin"
            )));
        };
        let Some(peer) = self.peers.by_index(u16::from(index)) else { return Ok(()) };
        // Several notifications may wait under number 0: one by one, so that each write completes one at the most.
        let (times, each) = if id == 0 { (count, 1) } else { (1, count) };
        for _ in 0..times {
            let message = peer.receive(|receiver| receiver.on_stock_writes(id, each))?;
            self.deliver(&peer, message);
        }
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
