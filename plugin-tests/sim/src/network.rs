//! What happens on the network, and when.

mod failing;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use nixl_libfabric::sys::libfabric as sys;
use nixl_libfabric::wire::{Body, ControlMessage, Handshake, Immediate};

use failing::{FLUSH_NS, FLUSHED, PACKET_LIFETIME_NS};

use crate::clock;
use crate::rng::mix;
use crate::world::{Arrival, AvEntry, Breakage, Connection, Entry, Ep, Held, Injury, State};

/// Number of an operation; never used twice.
pub type FlightId = u64;

/// Most pieces that one operation's data is cut into.
const PIECES_MAX: u64 = 4;
/// Packets that one poll takes in where the provider keeps messages: efa's `efa_cq_read_size`.
const PACKETS_PER_POLL: usize = 50;
/// Messages that such a provider may keep for want of receives: those of a poll or two, not all that peers send.
const MESSAGES_KEPT_MAX: usize = 128;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    Write,
    Read,
    Send,
}

/// A write, read or send that was posted.
#[derive(Debug)]
pub(crate) struct Flight {
    pub what: What,
    pub source: usize,
    /// Index in the address vector, and what it stands for.
    pub address: u64,
    pub target: Option<usize>,
    pub context: usize,
    pub local: (usize, usize),
    pub mr: usize,
    pub remote: (u64, u64),
    pub data: Option<u32>,
    pub delivery_complete: bool,
    /// What a message holds, or a write whose sender was told that it may use its buffer again.
    pub payload: Option<Vec<u8>>,
    pub pieces_left: u32,
    /// The sender's completion is out.
    pub completed: bool,
    /// Nothing of it is to come at the target.
    pub landed: bool,
    /// A message that is never delivered, because an earlier one was lost.
    pub swallowed: bool,
    /// Its next piece is held up on the way.
    pub late: bool,
    /// What has left for it lands, although it is given up.
    pub lingers: bool,
    /// It is to fail when this many pieces are left.
    pub fails: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Event {
    Piece {
        flight: FlightId,
        offset: usize,
        len: usize,
    },
    Arrive {
        flight: FlightId,
    },
    Complete {
        flight: FlightId,
    },
    Fail {
        flight: FlightId,
        error: i32,
        provider: i32,
    },
    /// The sender's NIC gives it up because it has failed itself.
    Flush {
        flight: FlightId,
    },
}

/// Events by time; those of one moment in the order in which they were planned.
#[derive(Debug, Default)]
pub(crate) struct Schedule {
    heap: BinaryHeap<Reverse<(u64, u64, Event)>>,
    /// Events that are due at hosts that have not polled yet, by endpoint.
    waiting: Vec<VecDeque<Event>>,
    /// Events of writes and reads that are held back.
    held: Vec<Event>,
    counter: u64,
    /// Time of the last ordered event from one endpoint to another.
    last: std::collections::HashMap<(usize, usize), u64>,
    flights: FlightId,
}

impl Schedule {
    fn add(&mut self, due: u64, event: Event) {
        self.counter += 1;
        self.heap.push(Reverse((due, self.counter, event)));
    }

    pub(crate) fn next_due(&self) -> Option<u64> {
        self.heap.peek().map(|Reverse((due, ..))| *due)
    }

    fn take_due(&mut self, now: u64) -> Option<Event> {
        if self.next_due()? > now {
            return None;
        }
        self.heap.pop().map(|Reverse((.., event))| event)
    }

    pub(crate) fn next_flight(&mut self) -> FlightId {
        self.flights += 1;
        self.flights
    }
}

impl State {
    fn delay(&mut self) -> u64 {
        let slow = self.rng.chance(self.faults.slow);
        let delay = self.rng.below(self.delay_ns) + 100;
        if slow { delay * 100 } else { delay }
    }

    fn at(&mut self, from: u64, event: Event) {
        let due = from + self.delay();
        self.schedule.add(due, event);
    }

    /// Everything whose time has come.
    pub(crate) fn run_due(&mut self) {
        if self.faults.held == Held::All {
            return;
        }
        if self.faults.held == Held::Nothing {
            for event in std::mem::take(&mut self.schedule.held) {
                self.run(event);
            }
        }
        let now = clock::now_ns();
        while let Some(event) = self.schedule.take_due(now) {
            if self.is_held(event) {
                self.schedule.held.push(event);
                continue;
            }
            match self.waits_for_host(event) {
                Some(ep) => {
                    let waiting = &mut self.schedule.waiting;
                    if waiting.len() <= ep {
                        waiting.resize_with(ep + 1, VecDeque::new);
                    }
                    waiting[ep].push_back(event);
                }
                None => self.run(event),
            }
        }
    }

    /// The target's software has a look: of what waited for that it takes in one operation, as tcp does.
    pub(crate) fn on_poll(&mut self, ep: usize) {
        while let Some(event) = self.schedule.waiting.get_mut(ep).and_then(VecDeque::pop_front) {
            self.run(event);
            let (Event::Piece { flight, .. } | Event::Arrive { flight }) = event else { continue };
            if self.flights.get(&flight).is_none_or(|flight| flight.pieces_left == 0) {
                break;
            }
        }
        if self.profile.pools_messages {
            self.take_in(ep);
        }
    }

    /// The provider takes what its NIC has out of the buffers that it has posted itself.
    fn take_in(&mut self, index: usize) {
        let ep = &mut self.eps[index];
        let packets = ep.unmatched.len().min(PACKETS_PER_POLL);
        ep.pooled.extend(ep.unmatched.drain(..packets));
        self.match_arrivals(index);
        let kept = self.eps[index].pooled.iter().filter(|arrival| arrival.payload.is_some()).count();
        if kept > MESSAGES_KEPT_MAX {
            self.breach(format!(
                "the provider keeps {kept} messages that no receive has met, and there is no end to it"
            ));
        }
    }

    fn is_held(&self, event: Event) -> bool {
        let (Event::Piece { flight, .. }
        | Event::Arrive { flight }
        | Event::Complete { flight }
        | Event::Flush { flight }
        | Event::Fail { flight, .. }) = event;
        let Some(flight) = self.flights.get(&flight) else { return false };
        let is_at = |ep: usize, host| self.eps[ep].host == host;
        flight.what != What::Send
            && match self.faults.held {
                Held::Nothing => false,
                Held::RmaOf(host) => {
                    is_at(flight.source, host) || flight.target.is_some_and(|target| is_at(target, host))
                }
                Held::Rma | Held::All => true,
            }
    }

    fn waits_for_host(&self, event: Event) -> Option<usize> {
        if !self.profile.host_driven {
            return None;
        }
        match event {
            Event::Piece { flight, .. } | Event::Arrive { flight } => self.flights.get(&flight)?.target,
            Event::Complete { .. } | Event::Fail { .. } | Event::Flush { .. } => None,
        }
    }

    fn run(&mut self, event: Event) {
        match event {
            Event::Piece { flight, offset, len } => self.piece(flight, offset, len),
            Event::Arrive { flight } => self.arrive(flight),
            Event::Complete { flight } => self.complete(flight, None),
            Event::Fail { flight, error, provider } => self.complete(flight, Some((error, provider))),
            Event::Flush { flight } => self.flush(flight),
        }
    }

    /// How many times longer than usual an endpoint takes.
    fn slowness(&self, ep: usize) -> u64 {
        match self.faults.slow_endpoint {
            Some((host, place, times)) if self.endpoints_of(host).nth(place) == Some(ep) => times,
            _ => 1,
        }
    }

    fn endpoints_of(&self, host: usize) -> impl Iterator<Item = usize> + '_ {
        (0..self.eps.len()).filter(move |&ep| self.eps[ep].host == host)
    }

    /// Writes and reads that were done over each endpoint of a host.
    pub fn moved(&self, host: usize) -> Vec<u64> {
        self.endpoints_of(host).map(|ep| self.eps[ep].moved).collect()
    }

    /// Times that each NIC of a host was told of something to send.
    pub fn doorbells(&self, host: usize) -> Vec<u64> {
        self.endpoints_of(host).map(|ep| self.eps[ep].doorbells).collect()
    }

    /// The doorbell rings for an operation: its events are planned.
    pub(crate) fn launch(&mut self, id: FlightId) {
        let now = clock::now_ns();
        let Some(flight) = self.flights.get(&id) else { return };
        if self.eps[flight.source].broken == Some(Breakage::Flushes) {
            self.flights.get_mut(&id).expect("it was just there").landed = true;
            self.at(now, Event::Flush { flight: id });
            return;
        }
        self.log_message("sent", flight);
        let (what, len, source, target) = (flight.what, flight.local.1, flight.source, flight.target);
        let (confirmed, message) = (flight.delivery_complete, flight.what == What::Send);
        let reachable = target.filter(|&t| self.is_reachable(t));
        if reachable.is_none() || self.eps[source].broken == Some(Breakage::CutOff) {
            self.fail_unreachable(id);
            return;
        }
        let pair = (source, target.unwrap_or_default());
        if message && self.deaf.contains(&pair) {
            self.swallow(id);
            return;
        }
        let chance = if message { self.faults.send_error } else { self.faults.rma_error };
        let mut fails = self.rng.chance(chance);
        if message && self.faults.sends_to_fail > 0 {
            self.faults.sends_to_fail -= 1;
            fails = true;
        }
        if message && fails && self.profile.numbers_messages {
            self.deaf.insert(pair);
        }
        let pieces = if message { 1 } else { self.rng.within(1, PIECES_MAX.min(len.max(1) as u64)) };
        let left_at_failure = fails.then(|| self.rng.within(1, pieces) as u32);
        let flight = self.flights.get_mut(&id).expect("it was just there");
        flight.pieces_left = pieces as u32;
        flight.fails = left_at_failure;
        let ordered = (what == What::Write && self.profile.orders_writes)
            || (what == What::Send && self.profile.orders_sends);
        let slowness = if message { 1 } else { self.slowness(source) };
        let mut begin = 0;
        for piece in 0..pieces {
            let end = if piece + 1 == pieces { len } else { len * (piece as usize + 1) / pieces as usize };
            let due = now + self.delay() * slowness;
            self.plan(
                due,
                ordered.then_some((source, target)),
                Event::Piece { flight: id, offset: begin, len: end - begin },
            );
            begin = end;
        }
        // A sender that asked for no more than transmission may be told before anything has landed.
        if what == What::Write && !confirmed && !fails && self.rng.chance(700) {
            self.at(now, Event::Complete { flight: id });
        }
        if message && !fails && self.rng.chance(300) {
            self.at(now, Event::Complete { flight: id });
        }
    }

    /// The message waits at its target for one that was lost. Its sender may be told that it has left.
    fn swallow(&mut self, id: FlightId) {
        let told = self.rng.chance(300);
        let flight = self.flights.get_mut(&id).expect("it is there");
        flight.swallowed = true;
        let (local, source, target) = (flight.local, flight.source, flight.target);
        let target_host = target.map(|t| self.eps[t].host);
        self.injuries.push(Injury { source_host: self.eps[source].host, target_host, local, message: true });
        if told {
            self.at(clock::now_ns(), Event::Complete { flight: id });
        }
    }

    fn plan(&mut self, mut due: u64, pair: Option<(usize, Option<usize>)>, event: Event) {
        if let Some((source, Some(target))) = pair {
            let last = self.schedule.last.entry((source, target)).or_default();
            due = due.max(*last);
            *last = due;
        }
        self.schedule.add(due, event);
    }

    fn is_reachable(&self, ep: usize) -> bool {
        let ep = &self.eps[ep];
        let is_gone = matches!(ep.broken, Some(Breakage::Flushes | Breakage::CutOff));
        !ep.closed && !is_gone && !self.host_is_dead(ep.host)
    }

    /// A piece of data lands; or a message reaches its target.
    fn piece(&mut self, id: FlightId, offset: usize, len: usize) {
        let Some(flight) = self.flights.get(&id) else { return };
        if flight.landed {
            return;
        }
        if flight.late {
            // It leaves the NIC no later than that gives it up.
            let gone = flight.completed;
            self.flights.get_mut(&id).expect("it is there").late = !gone;
            let wait = if gone { self.rng.below(PACKET_LIFETIME_NS) } else { FLUSH_NS / 100 };
            self.schedule.add(clock::now_ns() + wait, Event::Piece { flight: id, offset, len });
            return;
        }
        let target = flight.target.expect("it was launched");
        if self.host_is_dead(self.eps[flight.source].host) {
            self.flights.get_mut(&id).expect("it is there").landed = true;
            return;
        }
        if !self.is_reachable(target) {
            self.flights.get_mut(&id).expect("it is there").landed = true;
            if self.flights[&id].completed {
                self.forget(id);
            } else {
                self.fail_unreachable(id);
            }
            return;
        }
        if flight.fails == Some(flight.pieces_left) {
            let (error, provider) = self.random_error();
            self.complete(id, Some((error, provider)));
            return;
        }
        let flight = &self.flights[&id];
        if flight.what != What::Send && len > 0 {
            let moved = self.copy(flight, offset, len);
            if !moved {
                // EFA_IO_COMP_STATUS_REMOTE_ERROR_BAD_ADDRESS, as the efa provider reports it.
                self.complete(id, Some((libc::EINVAL, 7)));
                return;
            }
        }
        let flight = self.flights.get_mut(&id).expect("it is there");
        flight.pieces_left -= 1;
        if flight.pieces_left == 0 {
            self.all_landed(id);
        }
    }

    fn random_error(&mut self) -> (i32, i32) {
        // Local, remote and transport errors that do not say that the peer is gone.
        self.rng.pick(&[
            (libc::EINVAL, 3),
            (libc::EIO, 5),
            (libc::EIO, 10),
            (libc::ENOMEM, 4),
            (sys::FI_EOTHER, 12),
        ])
    }

    fn all_landed(&mut self, id: FlightId) {
        let now = clock::now_ns();
        let flight = &self.flights[&id];
        let (what, has_data) = (flight.what, flight.data.is_some());
        let order = Some((flight.source, flight.target)).filter(|_| self.profile.orders_sends);
        if what == What::Send || has_data {
            let due = now + if order.is_some() { 0 } else { self.delay() };
            self.plan(due, order, Event::Arrive { flight: id });
        } else {
            self.flights.get_mut(&id).expect("it is there").landed = true;
        }
        if self.flights[&id].completed {
            if self.flights[&id].landed {
                self.forget(id);
            }
        } else {
            self.at(now, Event::Complete { flight: id });
        }
    }

    /// Moves bytes between the two sides; false if the remote side has no such memory.
    fn copy(&self, flight: &Flight, offset: usize, len: usize) -> bool {
        let target = flight.target.expect("it was launched");
        let Some(remote) = self.remote_address(target, flight, offset, len) else { return false };
        let local = match &flight.payload {
            Some(bytes) => bytes.as_ptr() as usize + offset,
            None => flight.local.0 + offset,
        };
        let (from, to) = if flight.what == What::Read { (remote, local) } else { (local, remote) };
        // SAFETY: the remote range lies in an open registration, and whoever registered it answers for it; the local
        // one lies in a registration that is open, because closing it under an operation is a breach that ends the
        // run before its memory is freed, or in the payload. Nothing else runs in this process meanwhile that holds a
        // reference to either.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, len) };
        true
    }

    fn remote_address(&self, target: usize, flight: &Flight, offset: usize, len: usize) -> Option<usize> {
        let (addr, key) = flight.remote;
        let domain = self.eps[target].domain;
        let mr = &self.mrs[*self.keys.get(&(domain, key))?];
        if self.profile.mr_endpoint && !(mr.enabled && mr.bound == Some(target)) {
            return None;
        }
        let base = if self.profile.virt_addr { 0 } else { mr.addr };
        let start = base.checked_add(usize::try_from(addr).ok()?)?.checked_add(offset)?;
        (start >= mr.addr && start + len <= mr.addr + mr.len).then_some(start)
    }

    /// What a message says, for the log.
    fn log_message(&self, event: &str, flight: &Flight) {
        if !log::log_enabled!(log::Level::Debug) {
            return;
        }
        let Some(bytes) = &flight.payload else { return };
        let host = |ep: usize| self.eps[ep].host;
        let imm = Immediate::decode(u64::from(flight.data.unwrap_or(0)));
        let text = match imm {
            Ok(Immediate::StockHandshake { .. }) => Handshake::decode(bytes)
                .map_or_else(|e| e.to_string(), |h| format!("hello index {} {:?}", h.index, h.extension)),
            Ok(Immediate::Control { peer }) => ControlMessage::decode(bytes).map_or_else(
                |e| e.to_string(),
                |m| match m.body {
                    Body::Fragment(f) => format!(
                        "as {peer} session {} fragment of message {} at {} of {}",
                        m.session, f.message_id, f.offset, f.total_len
                    ),
                    body @ Body::Staging(_) => format!("as {peer} session {} {body:?}", m.session),
                },
            ),
            other => format!("{other:?}, {} bytes", bytes.len()),
        };
        log::debug!("host {} to {:?}: {event}: {text}", host(flight.source), flight.target.map(host));
    }

    /// A message meets a receive, or a write's immediate data meets the completion queue.
    fn arrive(&mut self, id: FlightId) {
        let Some(flight) = self.flights.get_mut(&id) else { return };
        flight.landed = true;
        let target = flight.target.expect("it was launched");
        let arrival = Arrival {
            payload: if flight.what == What::Send { flight.payload.clone() } else { None },
            data: flight.data,
            len: flight.local.1,
        };
        let completed = flight.completed;
        self.log_message("arrives", &self.flights[&id]);
        if self.is_reachable(target) {
            self.eps[target].unmatched.push_back(arrival);
            self.match_arrivals(target);
        }
        if completed {
            self.forget(id);
        }
    }

    /// Gives arrivals to receives for as long as there are both, and immediates to the queue.
    pub(crate) fn match_arrivals(&mut self, target: usize) {
        let uses_receive = self.profile.rx_cq_data;
        let drops = self.profile.provider == "efa";
        loop {
            let ep = &mut self.eps[target];
            let Some(cq) = ep.cq else { return };
            let cq = &mut self.cqs[cq];
            // Resource management: what the queue cannot hold waits outside. EFA's devices have none.
            if cq.entries.len() >= cq.size && !drops {
                return;
            }
            let free = |a: &Arrival| a.payload.is_none() && !uses_receive;
            let arrived = if self.profile.pools_messages { &mut ep.pooled } else { &mut ep.unmatched };
            let at = if ep.recvs.is_empty() { arrived.iter().position(free) } else { Some(0) };
            let Some(arrival) = at.and_then(|at| arrived.remove(at)) else { return };
            let with_data = if arrival.data.is_some() { sys::FI_REMOTE_CQ_DATA } else { 0 };
            let data = u64::from(arrival.data.unwrap_or(0));
            if free(&arrival) {
                let flags = sys::FI_REMOTE_WRITE | sys::FI_RMA | with_data;
                cq.entries.push_back(Entry { context: 0, flags, len: arrival.len, data, error: None });
                self.look_for_overrun(target);
                continue;
            }
            let recv = ep.recvs.pop_front().expect("it was looked at");
            let (flags, len) = match &arrival.payload {
                Some(bytes) => {
                    let len = bytes.len().min(recv.len);
                    // SAFETY: the receive's buffer lies in a registration that stays open for as long as it is posted.
                    unsafe { std::ptr::copy(bytes.as_ptr(), recv.addr as *mut u8, len) };
                    (sys::FI_RECV | sys::FI_MSG, len)
                }
                None => (sys::FI_REMOTE_WRITE | sys::FI_RMA, arrival.len),
            };
            let too_long = arrival.payload.as_ref().is_some_and(|bytes| bytes.len() > recv.len);
            cq.entries.push_back(Entry {
                context: recv.context,
                flags: flags | with_data,
                len,
                data,
                error: None,
            });
            if too_long {
                self.breach("a message is longer than its receive");
            }
            self.over(target, recv.context, recv.mr);
            self.look_for_overrun(target);
        }
    }

    /// What an EFA device's queue cannot hold is lost, without a word.
    fn look_for_overrun(&mut self, ep: usize) {
        let Some(cq) = self.eps[ep].cq.map(|cq| &self.cqs[cq]) else { return };
        if self.profile.provider == "efa" && cq.entries.len() > cq.size {
            self.breach("a completion that finds no room in its queue");
        }
    }

    /// The sender is told.
    fn complete(&mut self, id: FlightId, error: Option<(i32, i32)>) {
        let Some(flight) = self.flights.get_mut(&id) else { return };
        // Lost on the way: nobody has acknowledged it.
        let is_lost = flight.what == What::Send && flight.landed && flight.pieces_left > 0;
        if flight.completed || (is_lost && error.is_none()) {
            return;
        }
        flight.completed = true;
        if error.is_none() && flight.what != What::Send {
            self.eps[flight.source].moved += 1;
        }
        if error.is_some_and(|error| error != FLUSHED) && !flight.lingers {
            flight.landed = true;
        }
        if error.is_some() {
            self.log_message("fails", &self.flights[&id]);
        }
        let flight = &self.flights[&id];
        let (source, context, mr, address, local) =
            (flight.source, flight.context, flight.mr, flight.address, flight.local);
        let flags = match flight.what {
            What::Write => sys::FI_WRITE | sys::FI_RMA,
            What::Read => sys::FI_READ | sys::FI_RMA,
            What::Send => sys::FI_SEND | sys::FI_MSG,
        };
        let (message, target) = (flight.what == What::Send, flight.target);
        if flight.what == What::Send {
            // SAFETY: the buffer lies in a registration that is held by the operation until now.
            let now = unsafe { std::slice::from_raw_parts(local.0 as *const u8, local.1) };
            if flight.payload.as_deref() != Some(now) {
                self.breach(format!("the buffer of a message was changed in flight (context {context:#x})"));
            }
        } else if !flight.landed && flight.what == What::Write {
            self.keep_payload(id);
        }
        if self.flights[&id].landed {
            self.forget(id);
        }
        // A transfer has other rails than one that failed; a message that it may have carried is not sent again.
        if error.is_some_and(|error| error != FLUSHED || message) {
            let target_host = target.map(|t| self.eps[t].host);
            let source_host = self.eps[source].host;
            self.injuries.push(Injury { source_host, target_host, local, message });
        }
        // Providers leave the flags of some error entries empty.
        let flags = if error.is_some() && self.rng.chance(500) { 0 } else { flags };
        self.over(source, context, mr);
        let ep = &mut self.eps[source];
        ep.outstanding -= 1;
        if let Some(av) = ep.av
            && let Some(entry) = self.avs[av].1.get_mut(address as usize).and_then(Option::as_mut)
        {
            entry.in_flight -= 1;
            entry.reached |= error.is_none() && !message;
        }
        if let Some(cq) = self.eps[source].cq {
            self.cqs[cq].entries.push_back(Entry { context, flags, len: 0, data: 0, error });
            self.look_for_overrun(source);
        }
    }

    /// A context and a registration are free of an operation.
    fn over(&mut self, ep: usize, context: usize, mr: usize) {
        if !scribbled(context, ep) {
            self.breach(format!("context {context:#x} was written to, or freed, in flight"));
        }
        self.eps[ep].contexts.remove(&context);
        self.mrs[mr].in_flight -= 1;
    }

    /// The owner of a write's bytes may change them from now on.
    fn keep_payload(&mut self, id: FlightId) {
        let flight = self.flights.get_mut(&id).expect("it is there");
        // SAFETY: the bytes lie in a registration that is held by the operation until now.
        let bytes = unsafe { std::slice::from_raw_parts(flight.local.0 as *const u8, flight.local.1) };
        flight.payload.get_or_insert_with(|| bytes.to_vec());
    }

    fn forget(&mut self, id: FlightId) {
        self.flights.remove(&id);
    }

    /// Whether a post to this endpoint goes through now, where there are connections.
    pub(crate) fn connected(&mut self, ep: usize, target: Option<usize>) -> bool {
        let Some(target) = target.filter(|&t| self.is_reachable(t)) else { return false };
        let now = clock::now_ns();
        let wait = self.delay() * 2;
        match self.eps[ep].connections.get(&target) {
            Some(Connection::Up) => true,
            Some(Connection::Connecting(until)) if *until > now => false,
            Some(Connection::Connecting(_)) => {
                self.eps[ep].connections.insert(target, Connection::Up);
                true
            }
            None => {
                self.eps[ep].connections.insert(target, Connection::Connecting(now + wait));
                false
            }
        }
    }

    pub(crate) fn address(&self, ep: &Ep, address: u64) -> Option<&AvEntry> {
        self.avs[ep.av?].1.get(address as usize)?.as_ref()
    }
}

/// What the provider writes into a context while it is in flight: it owns it.
fn pattern(context: usize, ep: usize, word: u64) -> u64 {
    // Not the address itself: it differs from run to run.
    mix(ep as u64 ^ word << 32 ^ (context as u64 & 0xfff))
}

/// Takes possession of a context.
pub(crate) fn scribble(context: usize, ep: usize) {
    for word in 0..8 {
        // SAFETY: FI_CONTEXT2: the user lends 64 bytes for as long as the operation is in flight.
        unsafe { (context as *mut u64).add(word).write_unaligned(pattern(context, ep, word as u64)) };
    }
}

fn scribbled(context: usize, ep: usize) -> bool {
    (0..8).all(|word| {
        // SAFETY: as in `scribble`.
        unsafe { (context as *const u64).add(word).read_unaligned() == pattern(context, ep, word as u64) }
    })
}
