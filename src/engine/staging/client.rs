//! The side that transfers: what it holds of its peers, and its transfers under way.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use super::arena::{Arena, Run};
use super::lease::{Granted, Lease};
use super::slots::{Making, SLOT_BYTES, Slots};
use super::transfer::{Active, CHUNK_BYTES_MAX, Chunk, StagedTransfer, Step};
use super::{COPIES_PER_TURN, Directions, Staging};
use crate::cuda::{Context, InFlight, Span};
use crate::engine::remote::Remote;
use crate::engine::shared::Shared;
use crate::error::{Error, Result, Status};
use crate::fabric::{RmaList, Way};
use crate::peer::Peer;
use crate::transfer::plan::{self, Cutter};
use crate::transfer::{Part, Transfer};
use crate::types::{Op, RailId};
use crate::wire::staging::{COPY_RANGES_MAX, Ranges};
use crate::wire::{Body, PublicMetadata, Staging as Message};

/// Slots here, shared by all transfers: 32 MiB.
const OWN_SLOTS: u16 = 512;
/// Chunks of one transfer under way.
const CHUNKS_MAX: usize = 32;

/// Slots of this agent.
#[derive(Default)]
enum Own {
    #[default]
    None,
    Making(Making),
    Ready(Slots, Arena),
}

/// See the module.
#[derive(Default)]
pub struct Client {
    own: Own,
    leases: Vec<Lease>,
    active: Vec<Active>,
    /// Whose turn it is to begin a chunk.
    turn: usize,
    /// Chunks of failed transfers that a rail or the peer has not let go of: their slots come back when it does.
    resting: Vec<(Arc<Peer>, Chunk)>,
    /// Copies asked for, with the peer's answer once it has come.
    asked: HashMap<u64, (Arc<Peer>, Option<Result<()>>)>,
    tickets: u64,
}

/// What the steps of a chunk need besides the chunk.
struct Tools<'a> {
    staging: &'a Staging,
    streams: &'a Directions,
    shared: &'a Shared,
}

impl Client {
    /// Takes in a transfer that has begun.
    pub fn add(&mut self, transfer: Arc<StagedTransfer>) {
        self.active.push(Active::new(transfer));
    }

    /// Whether there is something to do that no message tells of. What rests because a peer has not answered waits for that.
    pub fn is_busy(&self, shared: &Shared) -> bool {
        !self.active.is_empty()
            || matches!(self.own, Own::Making(_))
            || self.resting.iter().any(|(_, chunk)| !matches!(chunk.step, Step::Asked(..)))
            || self.leases.iter().any(|lease| lease.is_unasked(shared.config.connect_timeout))
    }

    /// Whether the GPU here copies.
    pub fn is_copying(&self) -> bool {
        let mut chunks = self.active.iter().flat_map(|active| &active.chunks);
        chunks.any(|chunk| matches!(chunk.step, Step::Copying(_)))
    }

    /// Begins to make slots here, unless that was done.
    pub fn prepare(&mut self, context: &Context, shared: &Shared) -> Result<()> {
        if matches!(self.own, Own::None) {
            self.own = Own::Making(Making::start(context, &shared.local.rails, SLOT_BYTES, OWN_SLOTS)?);
        }
        Ok(())
    }

    /// Slots of a peer will be needed.
    pub fn meet(&mut self, peer: &Arc<Peer>) {
        if self.lease(peer).is_none() {
            self.leases.push(Lease::new(Arc::clone(peer)));
        }
    }

    /// A peer lends slots.
    pub fn on_lend(&mut self, peer: &Arc<Peer>, slot_bytes: u32, slots: u16, region: PublicMetadata) {
        let Some(lease) = self.lease(peer) else { return };
        if let Err(why) = lease.grant(slot_bytes, slots, region) {
            let why = why.context(peer.name());
            self.leases.retain(|lease| !lease.is_of(peer));
            for active in self.active.iter_mut().filter(|active| Arc::ptr_eq(&active.transfer.peer, peer)) {
                active.error.get_or_insert_with(|| why.clone());
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
            if let Some(lease) = self.lease(peer) {
                lease.heard();
            }
        }
    }

    fn lease(&mut self, peer: &Arc<Peer>) -> Option<&mut Lease> {
        self.leases.iter_mut().find(|lease| lease.is_of(peer))
    }

    fn granted(&mut self, peer: &Arc<Peer>) -> Option<&mut Granted> {
        self.lease(peer)?.granted()
    }

    /// Takes every transfer as far as it gets. Returns how much was done.
    pub fn advance(&mut self, staging: &Staging, streams: &Directions, shared: &Shared) -> usize {
        let tools = Tools { staging, streams, shared };
        self.void_leases();
        self.settle_resting();
        let mut handled = usize::from(self.take_made(shared));
        for lease in &mut self.leases {
            // A transfer that needs it hears of an error by itself.
            handled += usize::from(lease.ask() == Ok(true));
        }
        let mut all = std::mem::take(&mut self.active);
        for active in &mut all {
            handled += self.advance_one(&tools, active);
        }
        handled += self.admit_in_turn(&tools, &mut all);
        self.look_after_peers(&all);
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

    /// Takes the slots that are made by now.
    fn take_made(&mut self, shared: &Shared) -> bool {
        let Own::Making(making) = &mut self.own else { return false };
        let Some(made) = making.finished() else { return false };
        self.own = match made {
            Ok(slots) => {
                let arena = Arena::new(slots.count(), slots.slot_bytes());
                Own::Ready(slots, arena)
            }
            Err(e) => {
                log::warn!("agent {}: no staging memory: {e}", shared.local.name);
                for active in self.active.iter_mut().filter(|active| active.needs_own_slots()) {
                    active.error.get_or_insert_with(|| e.clone());
                }
                Own::None
            }
        };
        true
    }

    /// Forgets what was lent in a connection that has ended.
    fn void_leases(&mut self) {
        self.leases.retain(|lease| lease.peer.check().is_ok());
        for lease in self.leases.iter_mut().filter(|lease| lease.is_void()) {
            let peer = Arc::clone(&lease.peer);
            *lease = Lease::new(Arc::clone(&peer));
            let concerned = self.active.iter_mut().filter(|active| Arc::ptr_eq(&active.transfer.peer, &peer));
            for active in concerned.filter(|active| active.chunks.iter().any(|chunk| chunk.lent.is_some())) {
                active.error.get_or_insert_with(|| {
                    Error::disconnected(format!(
                        "{} has begun a new connection and forgotten what it had lent; post the transfer again",
                        peer.name()
                    ))
                });
            }
            // It answers for nothing of before.
            self.asked.retain(|_, (asked, _)| !Arc::ptr_eq(asked, &peer));
        }
    }

    /// Slots come back when nothing can touch them any more.
    fn settle_resting(&mut self) {
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
            Step::New | Step::Copying(_) => true,
        };
        for (peer, mut chunk) in self.resting.extract_if(.., at_rest).collect::<Vec<_>>() {
            self.give_back_own(&mut chunk);
            self.give_back_lent(&peer, &mut chunk);
        }
    }

    fn advance_one(&mut self, tools: &Tools<'_>, active: &mut Active) -> usize {
        let mut handled = 0;
        if active.error.is_none() {
            active.error = if active.transfer.is_stopped() {
                Some(Error::new(Status::Canceled, "the transfer was released in flight"))
            } else if let Some(late) = tools.shared.config.late(active.since.elapsed()) {
                Some(late.context(format_args!("transfer with {}", active.transfer.peer.name())))
            } else {
                let peer = &active.transfer.peer;
                let reach = if self.lease(peer).is_some() { peer.check_reach() } else { peer.check() };
                reach.err()
            };
        }
        // Copies end in the order in which they began; looking at each costs.
        let mut copies_wait = false;
        for mut chunk in std::mem::take(&mut active.chunks) {
            if copies_wait && matches!(chunk.step, Step::Copying(_)) {
                active.chunks.push(chunk);
                continue;
            }
            match self.step(tools, active, &mut chunk) {
                Ok(false) => {
                    copies_wait |= matches!(chunk.step, Step::Copying(_));
                    active.chunks.push(chunk);
                }
                Ok(true) => {
                    handled += 1;
                    if chunk.stage <= LAST_STAGE {
                        active.chunks.push(chunk);
                    } else {
                        self.give_back_own(&mut chunk);
                        self.give_back_lent(&active.transfer.peer, &mut chunk);
                    }
                }
                Err(e) => {
                    handled += 1;
                    active.error.get_or_insert(e);
                    if matches!(chunk.step, Step::Asked(..)) {
                        // What the peer may still touch is its own.
                        self.give_back_own(&mut chunk);
                    }
                    self.resting.push((Arc::clone(&active.transfer.peer), chunk));
                }
            }
        }
        handled
    }

    /// Begins chunks, one of each transfer in turn: a long one holds up no other.
    fn admit_in_turn(&mut self, tools: &Tools<'_>, all: &mut [Active]) -> usize {
        let (mut begun, mut without, mut copies) = (0, 0, 0);
        while without < all.len() && copies < COPIES_PER_TURN {
            self.turn = (self.turn + 1) % all.len();
            let active = &mut all[self.turn];
            without += 1;
            match self.admit(tools, active) {
                Ok(0) => {}
                Ok(pieces) => {
                    copies += pieces;
                    begun += 1;
                    without = 0;
                }
                Err(e) => {
                    active.error.get_or_insert(e);
                }
            }
        }
        begun
    }

    /// A peer that dies says nothing: whether one that is needed is still there is found out now and then.
    fn look_after_peers(&mut self, all: &[Active]) {
        for lease in &mut self.leases {
            if all.iter().any(|active| lease.is_of(&active.transfer.peer)) {
                lease.ask_again();
            }
        }
    }

    /// Looks whether the chunk's step is over, and begins the next one. False if it is not. After an error the chunk goes
    /// no further.
    fn step(&mut self, tools: &Tools<'_>, active: &Active, chunk: &mut Chunk) -> Result<bool> {
        let over = match &mut chunk.step {
            Step::New => true,
            Step::Copying(copy) => copy.is_done()?,
            Step::Asked(ticket, since) => self.answered(tools, active, *ticket, *since)?,
            Step::Wire(remote) => {
                let mut events = Vec::new();
                if let Some(error) = &active.error {
                    remote.fail(error.clone(), &mut events);
                }
                let status = remote.status(tools.shared, &mut events);
                tools.shared.act(events);
                match (status?, &active.error) {
                    // The user has no memory in it, and need not wait for rails to let go.
                    (Status::InProgress, Some(error)) if chunk.own.is_some() => return Err(error.clone()),
                    (status, _) => status == Status::Success,
                }
            }
        };
        if !over {
            return Ok(false);
        }
        if let Some(error) = &active.error {
            return Err(error.clone());
        }
        if chunk.stage == WIRE_STAGE {
            // Nothing reads any more what the data came from.
            match active.transfer.op {
                Op::Write => self.give_back_own(chunk),
                Op::Read => self.give_back_lent(&active.transfer.peer, chunk),
            }
        }
        chunk.stage += 1;
        self.begin(tools, &active.transfer, chunk)?;
        Ok(true)
    }

    /// Whether the peer has copied. It may still do so after an error: until it has answered, the slots rest.
    fn answered(&mut self, tools: &Tools<'_>, active: &Active, ticket: u64, since: Instant) -> Result<bool> {
        let peer = &active.transfer.peer;
        let answer = self.asked.get_mut(&ticket).map(|(_, answer)| answer);
        let answer = answer.ok_or_else(|| active.error.clone().unwrap_or_else(slots_lost))?;
        if let Some(outcome) = answer.take() {
            self.asked.remove(&ticket);
            return outcome.map(|()| true);
        }
        if let Some(error) = &active.error {
            return Err(error.clone());
        }
        let limit = tools.shared.config.connect_timeout;
        if since.elapsed() < limit {
            return Ok(false);
        }
        Err(Error::disconnected(format!(
            "{} did not copy within {} ms (connect_timeout_ms), but takes messages: does its progress thread run, or its \
             application call NIXL?",
            peer.name(),
            limit.as_millis()
        )))
    }

    /// Begins the chunk's stage, or the first one after it that there is something to do in.
    fn begin(&mut self, tools: &Tools<'_>, transfer: &Arc<StagedTransfer>, chunk: &mut Chunk) -> Result<()> {
        while chunk.stage <= LAST_STAGE {
            // Stage 0 is at the source of the data, the last one at its target.
            let here = (transfer.op == Op::Write) == (chunk.stage == 0);
            chunk.step = match chunk.stage {
                WIRE_STAGE => Step::Wire(self.launch(tools, transfer, chunk)?),
                _ if here && chunk.own.is_some() => Step::Copying(self.copy_here(tools, transfer, chunk)?),
                _ if !here && chunk.lent.is_some() => self.ask_for_copy(transfer, chunk)?,
                _ => {
                    chunk.stage += 1;
                    continue;
                }
            };
            return Ok(());
        }
        Ok(())
    }

    /// Slots here, and where a chunk's begin.
    fn own_of(&self, chunk: &Chunk) -> Result<(&Slots, u64)> {
        match (&self.own, &chunk.own) {
            (Own::Ready(slots, arena), Some(run)) => Ok((slots, arena.offset(run).ok_or_else(slots_lost)?)),
            _ => Err(slots_lost()),
        }
    }

    fn copy_here(&self, tools: &Tools<'_>, transfer: &StagedTransfer, chunk: &Chunk) -> Result<InFlight> {
        let local = &transfer.pieces[chunk.cut.from.piece].local;
        let context = local.copy_context()?;
        let context = context.ok_or_else(|| Error::invalid("the local side is host memory"))?;
        let (slots, offset) = self.own_of(chunk)?;
        let pairs = transfer.segments(chunk.cut).map(|segment| {
            let gpu = Span::registered(local.range(), segment.local_addr, segment.len)?;
            Ok((slots.span(offset + segment.at, segment.len)?, gpu))
        });
        tools.streams.copy(&context, chunk.stage == LAST_STAGE, pairs.collect::<Result<_>>()?)
    }

    fn ask_for_copy(&mut self, transfer: &StagedTransfer, chunk: &Chunk) -> Result<Step> {
        let peer = &transfer.peer;
        let lease = self.leases.iter_mut().find(|lease| lease.is_of(peer)).ok_or_else(slots_lost)?;
        self.tickets += 1;
        let (ticket, into_memory) = (self.tickets, chunk.stage == LAST_STAGE);
        let run = chunk.lent.as_ref().ok_or_else(slots_lost)?;
        let granted = lease.granted().filter(|granted| granted.offset(run).is_some());
        let (takes_ranges, slot) = (granted.ok_or_else(slots_lost)?.takes_ranges(), run.first());
        let mut ranges =
            transfer.segments(chunk.cut).map(|segment| (segment.remote_addr, segment.len as u32));
        let mut bytes = Vec::new();
        let message = if takes_ranges {
            Message::CopyRanges { ticket, slot, into_memory, ranges: Ranges::encode(ranges, &mut bytes) }
        } else {
            let (addr, len) = ranges.next().ok_or_else(slots_lost)?;
            Message::Copy { ticket, slot, into_memory, addr, len }
        };
        if !peer.say(Body::Staging(message))? {
            return Err(Error::disconnected(format!("{} is not connected", peer.name())));
        }
        lease.heard();
        self.asked.insert(ticket, (Arc::clone(peer), None));
        Ok(Step::Asked(ticket, Instant::now()))
    }

    /// Puts the chunk on the wire.
    fn launch(&mut self, tools: &Tools<'_>, staged: &StagedTransfer, chunk: &Chunk) -> Result<Arc<Remote>> {
        let piece = &staged.pieces[chunk.cut.from.piece];
        let remote = piece.region()?;
        // Where the chunk begins, if it lies in slots.
        let (keys, base, lent_addr) = match &chunk.lent {
            Some(run) => {
                let granted = self.granted(&staged.peer).ok_or_else(slots_lost)?;
                let base = granted.region().addr;
                (
                    granted.region().keys.clone(),
                    base,
                    Some(base.wrapping_add(granted.offset(run).ok_or_else(slots_lost)?)),
                )
            }
            None => (remote.keys().to_vec(), remote.base(), None),
        };
        let own = chunk.own.as_ref().map(|_| self.own_of(chunk)).transpose()?;
        let (rails, registrations) = match own {
            Some((slots, _)) => (slots.rails(), Vec::new()),
            None => (piece.local.rails(), vec![Arc::clone(&piece.local)]),
        };
        let shared = tools.shared;
        let base = if shared.virtual_addresses { 0 } else { base };
        let (lanes, keys) = plan::pair_lanes(rails, &keys);
        if lanes.is_empty() {
            return Err(Error::invalid(format!("{} sent no key for its staging memory", staged.peer.name())));
        }
        let mut cutter = Cutter::new(&shared.cutting(), lanes.len(), 1);
        let slices = staged.segments(chunk.cut).map(|segment| {
            let local = own.map_or(segment.local_addr, |(slots, offset)| slots.addr() + offset + segment.at);
            let there = lent_addr.map_or(segment.remote_addr, |addr| addr.wrapping_add(segment.at));
            (local, there.wrapping_sub(base), segment.len)
        });
        cutter.extend(0, slices);
        let region_on = |rail: RailId| match own {
            Some((slots, _)) => Some(slots.region(rail)),
            None => piece.local.region(rail),
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

    /// Begins the next chunk, if there are slots for it. Returns the number of its pieces.
    fn admit(&mut self, tools: &Tools<'_>, active: &mut Active) -> Result<usize> {
        if active.is_cut() || active.chunks.len() >= CHUNKS_MAX {
            return Ok(0);
        }
        let transfer = Arc::clone(&active.transfer);
        let piece = &transfer.pieces[active.next.piece];
        let (mut bytes_max, mut pieces_max) = (CHUNK_BYTES_MAX, COPY_RANGES_MAX);
        let needs_lent = piece.region()?.is_staged();
        if needs_lent {
            let Some(granted) = self.lent(tools, active)? else { return Ok(0) };
            bytes_max = bytes_max.min(granted.copy_bytes_max());
            pieces_max = if granted.takes_ranges() { pieces_max } else { 1 };
        }
        let needs_own = active.needs_own_slots();
        if needs_own && !self.own_is_ready(tools)? {
            return Ok(0);
        }
        let mut cut = transfer.cut(active.next, bytes_max, pieces_max);
        // What is much shorter than it could be costs more than it brings; but something gets on at any time.
        let least = if active.chunks.is_empty() { 0 } else { cut.len / 2 };
        let mut chunk = Chunk { cut, own: None, lent: None, stage: 0, step: Step::New };
        if needs_lent {
            let Some((run, bytes)) =
                self.granted(&transfer.peer).and_then(|g| taken(g.arena(), cut.len, least))
            else {
                return self.none_lent(tools, active);
            };
            (chunk.lent, cut) = (Some(run), transfer.cut(active.next, bytes.min(cut.len), pieces_max));
        }
        if let (true, Own::Ready(_, arena)) = (needs_own, &mut self.own) {
            let Some((run, bytes)) = taken(arena, cut.len, least) else {
                self.give_back_lent(&transfer.peer, &mut chunk);
                return Ok(0);
            };
            (chunk.own, cut) = (Some(run), transfer.cut(active.next, bytes.min(cut.len), pieces_max));
        }
        chunk.cut = cut;
        active.next = transfer.behind(cut);
        if let Err(e) = self.begin(tools, &transfer, &mut chunk) {
            self.give_back_own(&mut chunk);
            self.give_back_lent(&transfer.peer, &mut chunk);
            return Err(e);
        }
        active.chunks.push(chunk);
        Ok(transfer.segments(cut).count())
    }

    /// What the peer lends. Asks for it first, and fails if it does not come in time.
    fn lent(&mut self, tools: &Tools<'_>, active: &Active) -> Result<Option<&mut Granted>> {
        let peer = &active.transfer.peer;
        self.meet(peer);
        let at = self.leases.iter().position(|lease| lease.is_of(peer)).ok_or_else(slots_lost)?;
        let lease = &mut self.leases[at];
        if lease.granted().is_none() {
            lease.ask()?;
            if active.since.elapsed() > tools.shared.config.connect_timeout {
                return Err(if peer.is_ready() { did_not_lend(tools, peer) } else { peer.no_answer() });
            }
        }
        Ok(self.leases[at].granted())
    }

    /// All that the peer has lent is in use. Other transfers give theirs back in time; what rests may do so for ever.
    fn none_lent(&self, tools: &Tools<'_>, active: &Active) -> Result<usize> {
        let peer = &active.transfer.peer;
        let lease = self.leases.iter().find(|lease| lease.is_of(peer));
        let resting = self.resting.iter().filter(|(of, _)| Arc::ptr_eq(of, peer));
        let resting =
            resting.filter_map(|(_, chunk)| Some(usize::from(chunk.lent.as_ref()?.count()))).sum::<usize>();
        let all_rest = lease.is_some_and(|lease| lease.slots() <= resting);
        if all_rest && active.since.elapsed() > tools.shared.config.connect_timeout {
            return Err(did_not_lend(tools, peer));
        }
        Ok(0)
    }

    fn own_is_ready(&mut self, tools: &Tools<'_>) -> Result<bool> {
        if matches!(self.own, Own::None) {
            let context = tools.staging.context.get();
            self.prepare(context.ok_or_else(|| Error::not_found("no VRAM is registered"))?, tools.shared)?;
        }
        Ok(matches!(self.own, Own::Ready(..)))
    }

    fn give_back_own(&mut self, chunk: &mut Chunk) {
        if let (Some(run), Own::Ready(_, arena)) = (chunk.own.take(), &mut self.own) {
            arena.give_back(run);
        }
    }

    fn give_back_lent(&mut self, peer: &Arc<Peer>, chunk: &mut Chunk) {
        if let (Some(run), Some(granted)) = (chunk.lent.take(), self.granted(peer)) {
            granted.arena().give_back(run);
        }
    }
}

/// A run for so many bytes, and how many it holds.
fn taken(arena: &mut Arena, bytes: u64, least: u64) -> Option<(Run, u64)> {
    let run = arena.take(bytes, least)?;
    let bytes = arena.bytes(&run);
    Some((run, bytes))
}

fn slots_lost() -> Error {
    Error::backend("a chunk of a staged transfer lost its slots")
}

fn did_not_lend(tools: &Tools<'_>, peer: &Peer) -> Error {
    Error::disconnected(format!(
        "{} did not lend staging memory within {} ms (connect_timeout_ms), but takes messages: does its progress thread \
         run, or its application call NIXL?",
        peer.name(),
        tools.shared.config.connect_timeout.as_millis()
    ))
}

/// The stages of a chunk: at the source of the data, on the wire, at its target.
const WIRE_STAGE: u8 = 1;
const LAST_STAGE: u8 = 2;
