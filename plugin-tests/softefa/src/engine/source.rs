//! The sender's half of an operation: checks, chance and faults, sending, the answer, the completion.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::link::Link;
use super::state::{Event, State};
use super::target::{Fetched, Transfer};
use crate::abi::verbs::ibv_gid;
use crate::bounce::Bounce;
use crate::control::{Dice, Effects, When};
use crate::counters::{Counters, add};
use crate::memory::NO_ADDRESS_HANDLE;
use crate::queue::cq::Completion;
use crate::queue::qp::{QueuePair, RNR_RETRY_FOREVER};
use crate::queue::work::{INLINE_BYTES_MAX, WorkRequest};
use crate::shm::Mapping;
use crate::shm::channel::{HOST, Message, SPANS_MAX, Span, kind};
use crate::shm::device;
use crate::shm::process::ProcessId;
use crate::status::{Op, Status};
use crate::trace::{Event as Trace, Record, now_ns};

/// Bytes of a packet, and of the longest send (EFA: 8928).
pub const MTU_BYTES: u64 = 8928;
/// Bytes of the longest RDMA operation (EFA: 1 GiB).
pub const RDMA_BYTES_MAX: u64 = 1 << 30;
/// First wait after a receiver was not ready; doubles up to the longest.
const RNR_WAIT_NS: u64 = 20_000;
const RNR_WAIT_MAX_NS: u64 = 1_000_000;
const MICROSECOND_NS: u64 = 1000;

/// Uses of chance, kept apart.
#[derive(Clone, Copy)]
pub(super) enum Purpose {
    Depart = 1,
    Drop,
    NotReady,
    Fail,
    Pieces,
    Acknowledge,
    Show,
}

/// An operation between its post and its completion.
pub struct Flight {
    /// The queue pair that it was posted on.
    pub qp: Arc<QueuePair>,
    /// What was posted.
    pub request: WorkRequest,
    /// The sending device's GID.
    pub source: ibv_gid,
    /// The receiving device's GID.
    pub destination: ibv_gid,
    /// Local memory.
    pub spans: [Span; SPANS_MAX],
    /// Bytes in all.
    pub length: u64,
    /// What its target fetches in place of GPU memory, while it is in its slot.
    pub bounce: Option<Bounce>,
    inline: [u8; INLINE_BYTES_MAX],
    serial: u64,
    attempts: u32,
    unreachable: Option<Duration>,
    ack_delay_us: u64,
    /// Status that the sender will see although the operation landed.
    forced: Option<Status>,
}

impl Flight {
    /// Whether its queue pair still exists.
    pub fn is_live(&self) -> bool {
        !self.qp.destroyed.load(Ordering::Acquire)
    }

    pub(super) fn dice(&self, seed: u64, purpose: Purpose) -> Dice {
        let qpn = self.qp.attributes.number;
        Dice::new(seed, &self.source, qpn, self.serial ^ u64::from(self.attempts) << 48, purpose as u64)
    }

    /// The request as it goes to the target.
    pub fn message(&self, slot: u32, generation: u32) -> Message {
        Message {
            kind: kind::REQUEST,
            op: self.request.op as u8,
            flags: u8::from(self.request.immediate.is_some()),
            status: 0,
            slot,
            generation,
            source_qpn: self.qp.attributes.number,
            destination_qpn: self.request.qpn,
            qkey: self.request.qkey,
            immediate: self.request.immediate.unwrap_or_default(),
            rkey: self.request.rkey,
            remote_address: self.request.remote_address,
            serial: self.serial,
            source_gid: self.source.raw,
            destination_gid: self.destination.raw,
            spans: match &self.bounce {
                Some(bounce) => [bounce.span(), Span::default()],
                None => self.spans,
            },
        }
    }

    /// Whether the data is fetched from here.
    pub fn is_source(&self) -> bool {
        self.request.op != Op::Read
    }

    fn note(&self, event: Trace, status: Status) {
        let record = Record {
            peer_qpn: self.request.qpn,
            op: self.request.op as u8,
            status: status.0,
            id: self.request.id,
            length: self.length,
            extra: self.request.immediate.unwrap_or_default(),
            ..Record::default()
        };
        self.qp.note(event, record);
    }
}

/// Packets that carry so many bytes.
pub(super) fn packets(bytes: u64) -> u64 {
    bytes.div_ceil(MTU_BYTES).max(1)
}

impl State {
    /// A doorbell rang: takes over what was posted before it.
    pub(super) fn ring(&mut self, qp: &Arc<QueuePair>, requests: Vec<WorkRequest>) {
        self.with_counters(qp, |counters| {
            add(&counters.softefa_doorbells, 1);
            add(&counters.softefa_posted_wrs, requests.len() as u64);
        });
        for request in requests {
            self.begin(qp, request);
        }
    }

    /// Takes over a posted work request.
    fn begin(&mut self, qp: &Arc<QueuePair>, request: WorkRequest) {
        let device = &self.config.devices[qp.attributes.device];
        let destination = request.destination.unwrap_or(ibv_gid { raw: [0; 16] });
        let mut flight = Box::new(Flight {
            qp: Arc::clone(qp),
            source: device.gid,
            destination,
            spans: [Span::default(); SPANS_MAX],
            length: request.length(),
            bounce: None,
            inline: request.inline.map_or([0; INLINE_BYTES_MAX], |(bytes, _)| bytes),
            serial: qp.next_serial(),
            attempts: 0,
            unreachable: None,
            ack_delay_us: 0,
            forced: None,
            request,
        });
        if !flight.is_live() {
            return;
        }
        if let Err(status) = self.resolve_local(&mut flight) {
            self.finish(flight, status);
            return;
        }
        let op = flight.request.op;
        let effects = self.effects(&flight.source, &destination, op, flight.request.immediate.is_some());
        flight.unreachable = effects.unreachable;
        flight.ack_delay_us = effects.ack_delay_us;
        if effects.dead_source {
            self.finish(flight, Status::FLUSHED);
            return;
        }
        if self.must_fail(&flight, &effects) {
            let status = Status(effects.status);
            if !effects.land {
                self.finish(flight, status);
                return;
            }
            flight.forced = Some(status);
        }
        let due = self.departure(&flight, &effects);
        if due == 0 {
            self.transmit(flight);
        } else {
            self.at(due, Event::Transmit(flight));
        }
    }

    /// Finds the local memory of a request and checks what a device checks before it sends.
    fn resolve_local(&self, flight: &mut Flight) -> Result<(), Status> {
        let limit = if flight.request.op == Op::Send { MTU_BYTES } else { RDMA_BYTES_MAX };
        if flight.length > limit {
            return Err(Status::BAD_LENGTH);
        }
        if let Some((_, length)) = flight.request.inline {
            // The flight is boxed, so its own bytes stay where they are until it ends.
            flight.spans[0] =
                Span { address: flight.inline.as_ptr() as u64, length: length as u64, memory: HOST };
            return Ok(());
        }
        let write = flight.request.op == Op::Read;
        let attributes = &flight.qp.attributes;
        let device = self.devices.get(&attributes.device).ok_or(Status::FLUSHED)?;
        for (span, sge) in flight.spans.iter_mut().zip(&flight.request.sges[..flight.request.sge_count]) {
            let length = u64::from(sge.length);
            let found = device.registrations.resolve_local(sge.lkey, attributes.pd, sge.addr, length, write);
            *span = found.ok_or(Status::INVALID_LKEY)?;
        }
        Ok(())
    }

    fn must_fail(&mut self, flight: &Flight, effects: &Effects) -> bool {
        let (when, line) = effects.fail;
        if when == When::Never {
            return false;
        }
        let count = self.matches.entry(line).or_default();
        *count += 1;
        match when {
            When::Never => false,
            When::Every(every) => count.is_multiple_of(every),
            When::Nth(nth) => *count == nth,
            When::Percent(percent) => flight.dice(self.seed(), Purpose::Fail).percent(percent),
        }
    }

    /// When an operation leaves; 0 is now.
    fn departure(&mut self, flight: &Flight, effects: &Effects) -> u64 {
        let mut dice = flight.dice(self.seed(), Purpose::Depart);
        let mut wait_us = effects.delay_us + dice.below(effects.jitter_us + 1);
        if dice.percent(effects.hold_pct) {
            wait_us += dice.below(effects.reorder_us + 1);
        }
        let now = now_ns();
        let mut due = now + wait_us * MICROSECOND_NS;
        if effects.gbps > 0.0 {
            let bucket = self.buckets.entry((effects.bucket, flight.source.raw)).or_default();
            // Gbit/s is bits per nanosecond.
            *bucket = due.max(*bucket) + (flight.length as f64 * 8.0 / effects.gbps) as u64;
            due = *bucket;
        }
        if due > now { due } else { 0 }
    }

    /// Sends an operation on its way.
    pub(super) fn transmit(&mut self, flight: Box<Flight>) {
        let op = flight.request.op;
        let effects =
            self.effects(&flight.source, &flight.destination, op, flight.request.immediate.is_some());
        flight.note(Trace::Send, Status::OK);
        if let Some(counters) = self.counters_of(&flight) {
            let bytes = if op == Op::Read { 0 } else { flight.length };
            add(&counters.tx_pkts, packets(bytes));
            add(&counters.tx_bytes, bytes);
        }
        let lost = effects.dead_destination
            || (flight.source == flight.destination && !effects.loopback)
            || flight.dice(self.seed(), Purpose::Drop).percent(effects.drop_pct);
        if lost {
            self.lose(flight);
            return;
        }
        if flight.dice(self.seed(), Purpose::NotReady).percent(effects.rnr_pct) {
            self.not_ready(flight);
            return;
        }
        let Some(owner) = self.remote_owner(&flight) else {
            self.lose_or_refuse(flight);
            return;
        };
        self.launch(owner, flight);
    }

    /// Hands an operation to its link, where it waits if there is no room.
    pub(super) fn launch(&mut self, owner: ProcessId, flight: Box<Flight>) {
        let Some(link) = self.link_to(owner) else {
            self.finish(flight, Status::REMOTE_BAD_QPN);
            return;
        };
        match link.launch(flight) {
            Ok(()) => {}
            Err((flight, None)) => link.stalled.push_back(flight),
            Err((flight, Some(error))) => {
                eprintln!("softefa: {:#x} of a GPU cannot be read: {error}", flight.spans[0].address);
                self.finish(flight, Status::INVALID_LKEY);
            }
        }
    }

    /// The process behind an operation's destination; `None` if the device is unknown or the queue pair is nobody's.
    fn remote_owner(&mut self, flight: &Flight) -> Option<ProcessId> {
        let owner = self.remote_device(&flight.destination)?.owner(flight.request.qpn)?;
        // The housekeeping ends the links of processes that died; only a new acquaintance is looked at here.
        (self.links.contains_key(&owner) || owner.alive()).then_some(owner)
    }

    fn remote_device(&mut self, gid: &ibv_gid) -> Option<&Mapping<device::DeviceTable>> {
        if !self.remotes.contains_key(&gid.raw) {
            let table = device::open(&self.config.dir, gid).ok()?;
            self.remotes.insert(gid.raw, table);
        }
        self.remotes.get(&gid.raw)
    }

    /// A device that nobody ever opened does not answer; one that is there refuses an unknown queue pair.
    fn lose_or_refuse(&mut self, flight: Box<Flight>) {
        if self.remotes.contains_key(&flight.destination.raw) {
            self.responsive.insert(flight.destination.raw);
            self.finish(flight, Status::REMOTE_BAD_QPN);
        } else {
            self.lose(flight);
        }
    }

    /// The packets of an operation go nowhere.
    fn lose(&mut self, flight: Box<Flight>) {
        flight.note(Trace::Lost, Status::OK);
        if let Some(counters) = self.counters_of(&flight) {
            add(&counters.retrans_pkts, packets(flight.length));
            add(&counters.retrans_bytes, flight.length);
            add(&counters.retrans_timeout_events, 1);
        }
        match flight.unreachable {
            Some(after) => self.at(now_ns() + after.as_nanos() as u64, Event::GiveUp(flight)),
            None => self.lost.push(flight),
        }
    }

    /// The wait for an answer is over.
    pub(super) fn give_up(&mut self, flight: Box<Flight>) {
        if let Some(counters) = self.counters_of(&flight) {
            add(&counters.unresponsive_remote_events, 1);
        }
        let answered_once = self.responsive.contains(&flight.destination.raw);
        let status = if answered_once { Status::UNRESPONSIVE_REMOTE } else { Status::UNREACHABLE_REMOTE };
        self.finish(flight, status);
    }

    fn not_ready(&mut self, mut flight: Box<Flight>) {
        flight.bounce = None;
        flight.note(Trace::NotReady, Status::REMOTE_RNR);
        let retry = flight.qp.rnr_retry.load(Ordering::Relaxed);
        if retry != RNR_RETRY_FOREVER && flight.attempts >= retry {
            self.finish(flight, Status::REMOTE_RNR);
            return;
        }
        let wait = (RNR_WAIT_NS << flight.attempts.min(10)).min(RNR_WAIT_MAX_NS);
        flight.attempts += 1;
        self.at(now_ns() + wait, Event::Transmit(flight));
    }

    /// The target answered. Returns whether it is fetched from now.
    pub(super) fn answered(&mut self, flight: Box<Flight>, reply: &Message, link_peer: ProcessId) -> bool {
        self.responsive.insert(flight.destination.raw);
        if !flight.is_live() {
            return false;
        }
        match Status(reply.status) {
            Status::REMOTE_RNR => self.not_ready(flight),
            Status::OK if flight.request.op == Op::Read => return self.fetch(flight, reply, link_peer),
            status => self.finish(flight, status),
        }
        false
    }

    /// A read was granted: the data comes.
    fn fetch(&mut self, flight: Box<Flight>, reply: &Message, peer: ProcessId) -> bool {
        let granted = reply.spans[0];
        if granted.length != flight.length {
            self.finish(flight, Status::REMOTE_BAD_LENGTH);
            return false;
        }
        let effects = self.effects(&flight.source, &flight.destination, Op::Read, false);
        let dice = flight.dice(self.seed(), Purpose::Pieces);
        let to = flight.spans.iter().copied().filter(|span| span.length > 0).collect();
        let transfer =
            Transfer::fetch(peer, granted, to, Fetched { flight, grant: reply.serial }, &effects, dice);
        self.transfers.push(transfer);
        true
    }

    /// Ends an operation for its sender.
    pub(super) fn finish(&mut self, mut flight: Box<Flight>, status: Status) {
        let status = if status == Status::OK { flight.forced.take().unwrap_or(status) } else { status };
        flight.note(Trace::Complete, status);
        if let Some(counters) = self.counters_of(&flight) {
            count_end(counters, flight.request.op, flight.length, status);
        }
        let op = flight.request.op;
        let effects =
            self.effects(&flight.source, &flight.destination, op, flight.request.immediate.is_some());
        let mut dice = flight.dice(self.seed(), Purpose::Acknowledge);
        let mut wait_us = flight.ack_delay_us;
        if dice.percent(effects.hold_pct) {
            wait_us += dice.below(effects.reorder_us + 1);
        }
        let completion = Completion {
            receive: false,
            op,
            id: flight.request.id,
            status,
            length: 0,
            immediate: None,
            source_qpn: 0,
            address_handle: NO_ADDRESS_HANDLE,
            source: flight.source,
            unsolicited: false,
            qp: flight.qp,
        };
        if wait_us == 0 {
            self.show(completion);
        } else {
            self.at(now_ns() + wait_us * MICROSECOND_NS, Event::Complete(completion));
        }
    }

    fn counters_of(&self, flight: &Flight) -> Option<&Counters> {
        Some(&self.devices.get(&flight.qp.attributes.device)?.table.counters)
    }

    /// The link to a process, opened if need be; `None` if that process is gone.
    pub(super) fn link_to(&mut self, peer: ProcessId) -> Option<&mut Link> {
        if !self.links.contains_key(&peer) {
            let link = Link::open(&self.config.dir, self.me, peer).ok()?;
            self.links.insert(peer, link);
        }
        self.links.get_mut(&peer)
    }
}

fn count_end(counters: &Counters, op: Op, length: u64, status: Status) {
    let (requests, bytes, errors) = match op {
        Op::Send => (&counters.send_wrs, &counters.send_bytes, None),
        Op::Write => {
            (&counters.rdma_write_wrs, &counters.rdma_write_bytes, Some(&counters.rdma_write_wr_err))
        }
        Op::Read => (&counters.rdma_read_wrs, &counters.rdma_read_bytes, Some(&counters.rdma_read_wr_err)),
    };
    if status == Status::OK {
        add(requests, 1);
        add(bytes, length);
    } else if let Some(errors) = errors {
        add(errors, 1);
    }
}
