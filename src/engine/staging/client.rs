//! The side that transfers: what it holds of its peers, and its transfers under way.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use super::slots::{SLOT_BYTES, Slots};
use super::transfer::{Active, Chunk, StagedTransfer, Step};
use super::{Directions, Staging};
use crate::cuda::{InFlight, Span};
use crate::engine::remote::Remote;
use crate::engine::shared::Shared;
use crate::error::{Error, Result, Status};
use crate::fabric::{RmaList, Way};
use crate::peer::Peer;
use crate::rail::Rail;
use crate::transfer::plan::{self, Cutter};
use crate::transfer::{Part, Transfer};
use crate::types::{Op, RailId};
use crate::wire::{Body, PublicMetadata, Staging as Message};

/// Slots here, shared by all transfers.
const OWN_SLOTS: u16 = 32;
/// Chunks of one transfer under way.
const CHUNKS_MAX: usize = 32;
/// Shortest slot that is taken from a peer, in bytes.
const SLOT_BYTES_MIN: u32 = 4096;

/// Host memory that a peer has lent.
struct Lease {
    peer: Arc<Peer>,
    /// `None` until the peer has answered.
    granted: Option<Granted>,
}

struct Granted {
    region: PublicMetadata,
    slot_bytes: u32,
    slots: u16,
    free: Vec<u16>,
}

impl Granted {
    /// What a peer lends, if anything can be moved through it.
    fn new(slot_bytes: u32, slots: u16, region: PublicMetadata) -> Result<Self> {
        if slots == 0 {
            return Err(Error::backend("no staging memory is left there"));
        }
        if slot_bytes < SLOT_BYTES_MIN {
            return Err(Error::backend(format!(
                "it lends slots of {slot_bytes} bytes for staging, and {SLOT_BYTES_MIN} are the least"
            )));
        }
        if region.addr.checked_add(u64::from(slots) * u64::from(slot_bytes)).is_none() {
            return Err(Error::backend(format!(
                "it lends {slots} slots of {slot_bytes} bytes from {:#x} on, beyond the address space",
                region.addr
            )));
        }
        Ok(Self { region, slot_bytes, slots, free: (0..slots).rev().collect() })
    }
}

/// See the module.
#[derive(Default)]
pub struct Client {
    own: Option<(Slots, Vec<u16>)>,
    leases: Vec<Lease>,
    active: Vec<Active>,
    /// Chunks of failed transfers that a rail or the peer has not let go of: their slots come back when it does.
    resting: Vec<(Arc<Peer>, Chunk)>,
    /// Copies asked for, with the peer's answer once it has come.
    asked: HashMap<u64, (Arc<Peer>, Option<Result<()>>)>,
    tickets: u64,
}

/// What the steps of a chunk need besides the chunk.
struct Tools<'a> {
    streams: &'a Directions,
    shared: &'a Shared,
}

impl Client {
    /// Takes in a transfer that has begun.
    pub fn add(&mut self, transfer: Arc<StagedTransfer>) {
        self.active.push(Active::new(transfer));
    }

    /// Whether transfers are under way.
    pub fn is_busy(&self) -> bool {
        !self.active.is_empty() || !self.resting.is_empty()
    }

    /// Whether the GPU here copies.
    pub fn is_copying(&self) -> bool {
        let mut chunks = self.active.iter().flat_map(|active| &active.chunks);
        chunks.any(|chunk| matches!(chunk.step, Step::Copying(_)))
    }

    /// A peer lends slots.
    pub fn on_lend(&mut self, peer: &Arc<Peer>, slot_bytes: u32, slots: u16, region: PublicMetadata) {
        let Some(lease) = self.leases.iter_mut().find(|lease| Arc::ptr_eq(&lease.peer, peer)) else { return };
        if lease.granted.is_none() {
            match Granted::new(slot_bytes, slots, region) {
                Ok(mut granted) => {
                    // A peer that is asked again lends the same slots.
                    let active = self.active.iter().filter(|active| Arc::ptr_eq(&active.transfer.peer, peer));
                    let resting = self.resting.iter().filter(|(of, _)| Arc::ptr_eq(of, peer));
                    let held =
                        active.flat_map(|active| &active.chunks).chain(resting.map(|(_, chunk)| chunk));
                    let held: Vec<u16> = held.filter_map(|chunk| chunk.remote_slot).collect();
                    granted.free.retain(|slot| !held.contains(slot));
                    lease.granted = Some(granted);
                }
                Err(why) => self.fail_all(peer, &why.context(peer.name())),
            }
        }
    }

    /// A peer has copied.
    pub fn on_copied(&mut self, peer: &Arc<Peer>, ticket: u64, error: Option<String>) {
        if let Some((asked, answer)) = self.asked.get_mut(&ticket)
            && Arc::ptr_eq(asked, peer)
        {
            *answer = Some(error.map_or(Ok(()), |text| {
                Err(Error::backend(format!("{} could not copy: {text}", peer.name())))
            }));
        }
    }

    fn fail_all(&mut self, peer: &Arc<Peer>, error: &Error) {
        self.leases.retain(|lease| !Arc::ptr_eq(&lease.peer, peer));
        for active in self.active.iter_mut().filter(|active| Arc::ptr_eq(&active.transfer.peer, peer)) {
            active.error.get_or_insert_with(|| error.clone());
        }
    }

    /// Takes every transfer as far as it gets. Returns how many steps were made.
    pub fn advance(&mut self, staging: &Staging, streams: &Directions, shared: &Shared) -> usize {
        self.leases.retain(|lease| lease.peer.check().is_ok());
        let tools = Tools { streams, shared };
        let mut handled = 0;
        let asked = &mut self.asked;
        let at_rest = |(peer, chunk): &mut (Arc<Peer>, Chunk)| match &chunk.step {
            Step::Asked(ticket, _) => {
                let waits = asked.get(ticket).is_some_and(|(_, answer)| answer.is_none());
                let over = !waits || peer.check().is_err();
                if over {
                    asked.remove(ticket);
                }
                over
            }
            // A failed transfer may be given up while it is still in flight.
            Step::Wire(remote) => remote.transfer.is_over(),
            Step::Copying(_) => true,
        };
        for (peer, chunk) in self.resting.extract_if(.., at_rest).collect::<Vec<_>>() {
            self.give_back(&peer, &chunk);
        }
        let mut all = std::mem::take(&mut self.active);
        for active in &mut all {
            handled += self.advance_one(staging, &tools, active);
        }
        all.retain(|active| {
            if active.is_over() {
                active.transfer.finish(active.error.clone(), active.since, shared);
                handled += 1;
            }
            !active.is_over()
        });
        self.active = all;
        handled
    }

    fn advance_one(&mut self, staging: &Staging, tools: &Tools<'_>, active: &mut Active) -> usize {
        let mut handled = 0;
        if active.error.is_none() {
            active.error = if active.transfer.is_stopped() {
                Some(Error::new(Status::Canceled, "the transfer was released in flight"))
            } else if let Some(late) = tools.shared.config.late(active.since.elapsed()) {
                Some(late.context(format_args!("transfer with {}", active.transfer.peer.name())))
            } else {
                active.transfer.peer.check().err()
            };
        }
        for mut chunk in std::mem::take(&mut active.chunks) {
            match self.step(tools, active, &mut chunk) {
                Ok(None) => active.chunks.push(chunk),
                Ok(Some(steps)) if chunk.stage <= LAST_STAGE => {
                    handled += steps;
                    active.chunks.push(chunk);
                }
                Ok(Some(steps)) => {
                    handled += steps;
                    self.give_back(&active.transfer.peer, &chunk);
                }
                Err(e) => {
                    handled += 1;
                    active.error.get_or_insert(e);
                    self.resting.push((Arc::clone(&active.transfer.peer), chunk));
                }
            }
        }
        while active.error.is_none()
            && active.chunks.len() < CHUNKS_MAX
            && active.piece < active.transfer.pieces.len()
        {
            match self.admit(staging, tools, active) {
                Ok(true) => handled += 1,
                Ok(false) => break,
                Err(e) => active.error = Some(e),
            }
        }
        handled
    }

    /// Looks whether the chunk's step is over, and begins the next one. `None` if it is not. After an error the chunk
    /// goes no further.
    fn step(&mut self, tools: &Tools<'_>, active: &Active, chunk: &mut Chunk) -> Result<Option<usize>> {
        let over = match &mut chunk.step {
            Step::Copying(copy) => copy.is_done()?,
            Step::Asked(ticket, since) => self.answered(tools, active, *ticket, *since)?,
            Step::Wire(transfer) => {
                let mut events = Vec::new();
                let status = transfer.status(tools.shared, &mut events);
                tools.shared.act(events);
                status? == Status::Success
            }
        };
        if !over {
            return Ok(None);
        }
        if let Some(error) = &active.error {
            return Err(error.clone());
        }
        chunk.stage += 1;
        self.begin(tools, &active.transfer, chunk)?;
        Ok(Some(1))
    }

    /// Whether the peer has copied. It may still do so after an error: until it has answered, the slots rest.
    fn answered(&mut self, tools: &Tools<'_>, active: &Active, ticket: u64, since: Instant) -> Result<bool> {
        let peer = &active.transfer.peer;
        let (_, answer) = self.asked.get_mut(&ticket).ok_or_else(slot_lost)?;
        if let Some(outcome) = answer.take() {
            self.asked.remove(&ticket);
            return outcome.map(|()| true);
        }
        if let Some(error) = &active.error {
            return Err(error.clone());
        }
        peer.check()?;
        let limit = tools.shared.config.connect_timeout;
        if since.elapsed() < limit {
            return Ok(false);
        }
        Err(Error::disconnected(format!(
            "{} did not copy within {} ms (connect_timeout_ms): does its progress thread run, or its application call \
             NIXL?",
            peer.name(),
            limit.as_millis()
        )))
    }

    /// Begins the chunk's stage, or the first one after it that there is something to do in.
    fn begin(&mut self, tools: &Tools<'_>, transfer: &Arc<StagedTransfer>, chunk: &mut Chunk) -> Result<()> {
        while chunk.stage <= LAST_STAGE {
            // Stage 0 is at the source of the data, the last one at its target.
            let here = (transfer.op == Op::Write) == (chunk.stage == 0);
            chunk.step = match (chunk.stage, chunk.local_slot, chunk.remote_slot) {
                (WIRE_STAGE, ..) => Step::Wire(self.launch(tools, transfer, chunk)?),
                (_, Some(slot), _) if here => Step::Copying(self.copy_here(tools, transfer, chunk, slot)?),
                (_, _, Some(slot)) if !here => self.ask_for_copy(tools, transfer, chunk, slot)?,
                _ => {
                    chunk.stage += 1;
                    continue;
                }
            };
            return Ok(());
        }
        Ok(())
    }

    fn copy_here(
        &self,
        tools: &Tools<'_>,
        transfer: &StagedTransfer,
        chunk: &Chunk,
        slot: u16,
    ) -> Result<InFlight> {
        let piece = &transfer.pieces[chunk.piece];
        let memory = Span::registered(piece.local.range(), piece.local_addr + chunk.offset, chunk.len)?;
        let context = piece.local.copy_context()?;
        let context = context.ok_or_else(|| Error::invalid("the local side is host memory"))?;
        let own = self.own.as_ref().map(|(own, _)| own.span(slot, chunk.len));
        let slot = own.ok_or_else(slot_lost)??;
        tools.streams.copy(&context, chunk.stage == LAST_STAGE, slot, memory)
    }

    fn ask_for_copy(
        &mut self,
        tools: &Tools<'_>,
        transfer: &StagedTransfer,
        chunk: &Chunk,
        slot: u16,
    ) -> Result<Step> {
        self.tickets += 1;
        let message = Message::Copy {
            ticket: self.tickets,
            slot,
            into_memory: chunk.stage == LAST_STAGE,
            addr: transfer.pieces[chunk.piece].remote_addr + chunk.offset,
            len: chunk.len as u32,
        };
        if !transfer.peer.say(Body::Staging(message))? {
            return Err(Error::disconnected(format!("{} is not connected", transfer.peer.name())));
        }
        self.asked.insert(self.tickets, (Arc::clone(&transfer.peer), None));
        tools.shared.kick();
        Ok(Step::Asked(self.tickets, Instant::now()))
    }

    /// Puts the chunk on the wire.
    fn launch(&self, tools: &Tools<'_>, staged: &StagedTransfer, chunk: &Chunk) -> Result<Arc<Remote>> {
        let piece = &staged.pieces[chunk.piece];
        let remote = piece.region()?;
        let (keys, base, remote_addr) = match chunk.remote_slot {
            Some(slot) => {
                let granted = self.granted(&staged.peer).ok_or_else(slot_lost)?;
                let base = granted.region.addr;
                let offset = u64::from(slot) * u64::from(granted.slot_bytes);
                (&granted.region.keys[..], base, base.wrapping_add(offset))
            }
            None => (remote.keys(), remote.base(), piece.remote_addr + chunk.offset),
        };
        let own = self.own.as_ref().map(|(slots, _)| slots);
        let (rails, local_addr, registrations) = match chunk.local_slot {
            Some(slot) => {
                let own = own.ok_or_else(slot_lost)?;
                (own.rails(), own.addr(slot), Vec::new())
            }
            None => (piece.local.rails(), piece.local_addr + chunk.offset, vec![Arc::clone(&piece.local)]),
        };
        let shared = tools.shared;
        let base = if shared.virtual_addresses { 0 } else { base };
        let (lanes, keys) = plan::pair_lanes(rails, keys);
        if lanes.is_empty() {
            return Err(Error::invalid(format!("{} sent no key for its staging memory", staged.peer.name())));
        }
        let mut cutter = Cutter::new(&shared.cutting(), lanes.len(), 1);
        cutter.extend(0, std::iter::once((local_addr, remote_addr.wrapping_sub(base), chunk.len)));
        let region_on = |rail: RailId| match (chunk.local_slot, own) {
            (Some(_), Some(own)) => Some(own.region(rail)),
            _ => piece.local.region(rail),
        };
        let way = |(lane, key): (&plan::Lane, u64)| Some(Way { region: region_on(lane.rail)?, key });
        let ways: Option<_> = lanes.iter().zip(keys).map(way).collect();
        let ways = ways.ok_or_else(|| Error::not_found("a local region is being deregistered"))?;
        let list = Arc::new(RmaList::new(cutter.finish(), ways, 1)?);
        let transfer = Transfer::new(staged.op, vec![Part { lanes, list }], None, registrations);
        let remote = Arc::new(Remote { transfer, peer: Arc::clone(&staged.peer), is_chunk: true });
        remote.post(None, shared)?;
        Ok(remote)
    }

    /// Begins the next chunk, if there are slots for it.
    fn admit(&mut self, staging: &Staging, tools: &Tools<'_>, active: &mut Active) -> Result<bool> {
        let transfer = Arc::clone(&active.transfer);
        let piece = &transfer.pieces[active.piece];
        let needs_own = piece.local.is_staged();
        let needs_lent = piece.region()?.is_staged();
        let mut len = (piece.len - active.offset).min(SLOT_BYTES.into());
        if needs_lent {
            match self.lent_slot(tools, &transfer, active)? {
                Some(slot_bytes) => len = len.min(slot_bytes.into()),
                None => return Ok(false),
            }
        }
        if needs_own && !self.own_slot_is_free(staging, &tools.shared.local.rails)? {
            return Ok(false);
        }
        let local_slot = if needs_own { self.own.as_mut().and_then(|(_, free)| free.pop()) } else { None };
        let lent = if needs_lent { self.granted_mut(&transfer.peer) } else { None };
        let remote_slot = lent.and_then(|granted| granted.free.pop());
        let mut chunk = Chunk {
            piece: active.piece,
            offset: active.offset,
            len,
            local_slot,
            remote_slot,
            stage: 0,
            step: Step::Asked(0, Instant::now()),
        };
        active.offset += len;
        if active.offset == piece.len {
            active.piece += 1;
            active.offset = 0;
        }
        if let Err(e) = self.begin(tools, &transfer, &mut chunk) {
            self.give_back(&transfer.peer, &chunk);
            return Err(e);
        }
        active.chunks.push(chunk);
        Ok(true)
    }

    /// Bytes of the peer's slots if one is free. Asks for slots first, and fails if none come in time.
    fn lent_slot(
        &mut self,
        tools: &Tools<'_>,
        transfer: &StagedTransfer,
        active: &Active,
    ) -> Result<Option<u32>> {
        let peer = &transfer.peer;
        if let Some(lease) = self.leases.iter().find(|lease| Arc::ptr_eq(&lease.peer, peer)) {
            if let Some(granted) = &lease.granted {
                let rests =
                    |(of, chunk): &&(Arc<Peer>, Chunk)| Arc::ptr_eq(of, peer) && chunk.remote_slot.is_some();
                // Others' transfers give theirs back in time.
                if self.resting.iter().filter(rests).count() < usize::from(granted.slots) {
                    return Ok((!granted.free.is_empty()).then_some(granted.slot_bytes));
                }
            }
        } else if peer.say(Body::Staging(Message::Ask))? {
            self.leases.push(Lease { peer: Arc::clone(peer), granted: None });
            tools.shared.kick();
        }
        if active.since.elapsed() > tools.shared.config.connect_timeout {
            return Err(Error::disconnected(format!(
                "{} did not lend staging memory within {} ms (connect_timeout_ms)",
                peer.name(),
                tools.shared.config.connect_timeout.as_millis()
            )));
        }
        Ok(None)
    }

    fn own_slot_is_free(&mut self, staging: &Staging, rails: &[Arc<Rail>]) -> Result<bool> {
        if self.own.is_none() {
            let context = staging.context.get().ok_or_else(|| Error::not_found("no VRAM is registered"))?;
            let slots = Slots::new(context, rails, OWN_SLOTS)?;
            let free = (0..slots.count()).rev().collect();
            self.own = Some((slots, free));
        }
        Ok(self.own.as_ref().is_some_and(|(_, free)| !free.is_empty()))
    }

    fn granted(&self, peer: &Arc<Peer>) -> Option<&Granted> {
        self.leases.iter().find(|lease| Arc::ptr_eq(&lease.peer, peer))?.granted.as_ref()
    }

    fn granted_mut(&mut self, peer: &Arc<Peer>) -> Option<&mut Granted> {
        self.leases.iter_mut().find(|lease| Arc::ptr_eq(&lease.peer, peer))?.granted.as_mut()
    }

    fn give_back(&mut self, peer: &Arc<Peer>, chunk: &Chunk) {
        if let (Some(slot), Some((_, free))) = (chunk.local_slot, &mut self.own) {
            free.push(slot);
        }
        if let (Some(slot), Some(granted)) = (chunk.remote_slot, self.granted_mut(peer)) {
            granted.free.push(slot);
        }
    }
}

fn slot_lost() -> Error {
    Error::backend("a chunk of a staged transfer lost its slot")
}

/// The stages of a chunk: at the source of the data, on the wire, at its target.
const WIRE_STAGE: u8 = 1;
const LAST_STAGE: u8 = 2;

#[cfg(test)]
mod tests {
    use super::{Granted, SLOT_BYTES_MIN};
    use crate::wire::PublicMetadata;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_lease_that_nothing_fits_through_is_refused(slot_bytes: u32, slots: u16, addr: u64) {
            let edges = [(slot_bytes, slots, addr), (slot_bytes % 8192, slots % 3, addr), (slot_bytes, slots, !(addr >> 17))];
            for (slot_bytes, slots, addr) in edges {
                let bytes = u64::from(slot_bytes) * u64::from(slots);
                let usable = slots > 0 && slot_bytes >= SLOT_BYTES_MIN && addr.checked_add(bytes).is_some();
                let granted = Granted::new(slot_bytes, slots, PublicMetadata { keys: vec![Some(1)], addr, board: None, gpu: None });
                prop_assert_eq!(granted.is_ok(), usable);
                if let Ok(granted) = granted {
                    prop_assert_eq!(granted.free.len(), usize::from(slots));
                    prop_assert!(granted.free.iter().all(|&slot| slot < slots));
                }
            }
        }
    }
}
