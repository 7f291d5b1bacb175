//! The receiver's half of an operation, and the pieces by which data comes in.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::source::{Flight, Purpose, packets};
use super::state::{Event, State};
use crate::abi::verbs::{IBV_ACCESS_REMOTE_READ, IBV_ACCESS_REMOTE_WRITE};
use crate::bounce::{self, Refused};
use crate::control::{Dice, Effects};
use crate::copy;
use crate::counters::add;
use crate::memory::NO_ADDRESS_HANDLE;
use crate::queue::cq::Completion;
use crate::queue::qp::QueuePair;
use crate::queue::work::Receive;
use crate::shm::Mapping;
use crate::shm::channel::{Channel, Message, Span, kind};
use crate::shm::process::ProcessId;
use crate::status::{Op, Status};
use crate::trace::{Event as Trace, Record, now_ns};

/// Smallest piece into which an operation is cut: about a packet.
const PIECE_BYTES_MIN: u64 = 8192;
/// Largest piece, which bounds how long the engine's lock is held.
const PIECE_BYTES_MAX: u64 = 256 * 1024;

/// A read that waits for room to copy what it asks for.
pub struct Arrival {
    peer: ProcessId,
    message: Message,
}

/// What a transfer is for.
enum Errand {
    /// Somebody's send or write, coming in.
    Incoming {
        message: Message,
        channel: Arc<Mapping<Channel>>,
        qp: Arc<QueuePair>,
        receive: Option<Receive>,
    },
    /// The data of an own read.
    Fetched(Fetched),
}

/// An own read whose data comes.
pub struct Fetched {
    /// The read.
    pub flight: Box<Flight>,
    /// The peer's copy that it comes from, 0 for none.
    pub grant: u64,
}

/// Data on its way into this process, piece by piece.
pub struct Transfer {
    peer: ProcessId,
    from: Vec<Span>,
    to: Vec<Span>,
    piece_bytes: u64,
    /// Pieces still to come; the last one is next.
    pieces: Vec<u64>,
    shuffle: bool,
    errand: Errand,
}

enum Stop {
    /// The data cannot come; the sender is told why.
    Refused(Status),
    /// The sender gave the operation up or died: nobody is told.
    Abandoned,
}

impl Transfer {
    fn new(
        peer: ProcessId,
        from: Vec<Span>,
        to: Vec<Span>,
        effects: &Effects,
        mut dice: Dice,
        errand: Errand,
    ) -> Self {
        let length: u64 = from.iter().map(|span| span.length).sum();
        let wanted = length.div_ceil(u64::from(effects.pieces));
        let piece_bytes = wanted.clamp(PIECE_BYTES_MIN, PIECE_BYTES_MAX);
        let mut pieces: Vec<u64> = (0..length.div_ceil(piece_bytes)).rev().collect();
        if effects.shuffle {
            for last in (1..pieces.len()).rev() {
                pieces.swap(last, dice.below(last as u64 + 1) as usize);
            }
        }
        Self { peer, from, to, piece_bytes, pieces, shuffle: effects.shuffle, errand }
    }

    /// The data of a read that the target granted.
    pub(super) fn fetch(
        peer: ProcessId,
        from: Span,
        to: Vec<Span>,
        fetched: Fetched,
        effects: &Effects,
        dice: Dice,
    ) -> Self {
        Self::new(peer, vec![from], to, effects, dice, Errand::Fetched(fetched))
    }

    fn qp(&self) -> &Arc<QueuePair> {
        match &self.errand {
            Errand::Incoming { qp, .. } => qp,
            Errand::Fetched(fetched) => &fetched.flight.qp,
        }
    }

    /// Moves the next piece.
    fn step(&mut self) -> Result<(), Stop> {
        let Some(piece) = self.pieces.pop() else { return Ok(()) };
        let skip = piece * self.piece_bytes;
        let from = copy::part(&self.from, skip, self.piece_bytes);
        let to = copy::part(&self.to, skip, self.piece_bytes);
        let copied = match &self.errand {
            Errand::Incoming { message, channel, .. } => {
                if !channel.claim(message.slot, message.generation) {
                    return Err(Stop::Abandoned);
                }
                let copied = copy::pull(self.peer, &from, &to);
                channel.unclaim(message.slot, message.generation);
                copied
            }
            Errand::Fetched(_) => copy::pull(self.peer, &from, &to),
        };
        self.qp()
            .note(Trace::Piece, Record { extra: skip as u32, length: self.piece_bytes, ..Record::default() });
        copied.map_err(|error| match error.raw_os_error() {
            Some(libc::ESRCH) if matches!(self.errand, Errand::Incoming { .. }) => Stop::Abandoned,
            Some(libc::ESRCH) => Stop::Refused(Status::REMOTE_BAD_QPN),
            Some(libc::EPERM) => {
                eprintln!(
                    "softefa: may not read the memory of process {}: run both as one user, with ptrace allowed",
                    self.peer.pid()
                );
                Stop::Refused(Status::REMOTE_BAD_ADDRESS)
            }
            _ => Stop::Refused(Status::REMOTE_BAD_ADDRESS),
        })
    }
}

impl State {
    /// Reads what peers sent.
    pub(super) fn receive_messages(&mut self) {
        self.meet_senders();
        for Arrival { peer, message } in std::mem::take(&mut self.arrivals) {
            self.arrive(peer, message);
        }
        let peers: Vec<_> = self.links.keys().copied().collect();
        for peer in peers {
            while let Some(message) = self.next_message(peer) {
                match message.kind {
                    kind::REQUEST => self.arrive(peer, message),
                    kind::REPLY => {
                        let flight = self.links.get_mut(&peer).and_then(|link| link.land(&message));
                        let fetches = flight.is_some_and(|flight| self.answered(flight, &message, peer));
                        if !fetches {
                            self.fetched(peer, message.serial);
                        }
                    }
                    kind::FETCHED => {
                        if let Some(link) = self.links.get_mut(&peer) {
                            link.end_grant(message.serial);
                        }
                    }
                    _ => {}
                }
            }
        }
    }

    fn next_message(&self, peer: ProcessId) -> Option<Message> {
        self.links.get(&peer)?.incoming.as_ref()?.receive()
    }

    /// Opens the channels of processes that registered.
    fn meet_senders(&mut self) {
        let registrations = self.mailbox.registrations();
        if registrations == self.seen_registrations {
            return;
        }
        self.seen_registrations = registrations;
        let mailbox = Arc::clone(&self.mailbox);
        for peer in mailbox.senders() {
            let (dir, me) = (&self.config.dir, self.me);
            let Some(link) = self.link_to(peer) else {
                mailbox.forget(peer);
                continue;
            };
            if link.incoming.is_none() {
                link.incoming = crate::shm::channel::create(dir, peer, me).map(Arc::new).ok();
            }
        }
    }

    /// A request has arrived: the checks of a device, and then its data.
    fn arrive(&mut self, peer: ProcessId, message: Message) {
        let Some(op) = Op::from_raw(message.op) else { return };
        let qp = self.device_by_gid(&message.destination()).and_then(|(_, device)| {
            let qp = device.queue_pairs.get(&message.destination_qpn)?;
            let ready = qp.ready_to_receive() && qp.qkey.load(Ordering::Acquire) == message.qkey;
            ready.then(|| Arc::clone(qp))
        });
        let Some(qp) = qp else {
            self.refuse(peer, &message, Status::REMOTE_BAD_QPN);
            return;
        };
        let has_immediate = message.flags & 1 != 0;
        note(&qp, Trace::Arrive, &message, Status::OK);
        let effects = self.effects(&message.source(), &message.destination(), op, has_immediate);
        let result = match op {
            Op::Send => self.accept_send(peer, &message, &qp, &effects),
            Op::Write => self.accept_write(peer, &message, &qp, &effects),
            Op::Read => self.grant_read(peer, &message, &qp, &effects),
        };
        if let Err(status) = result {
            if status == Status::REMOTE_RNR {
                self.with_counters(&qp, |counters| add(&counters.rx_drops, 1));
            }
            self.refuse(peer, &message, status);
        }
    }

    fn accept_send(
        &mut self,
        peer: ProcessId,
        message: &Message,
        qp: &Arc<QueuePair>,
        effects: &Effects,
    ) -> Result<(), Status> {
        let receive = qp.take_receive().ok_or(Status::REMOTE_RNR)?;
        let length = message.length();
        let to = match self.receive_spans(qp, &receive) {
            Some(to) if receive.length() >= length => copy::part(&to, 0, length),
            found => {
                let status = if found.is_none() { Status::INVALID_LKEY } else { Status::BAD_LENGTH };
                self.complete_receive(message, qp, Some(&receive), status, effects);
                return Err(Status::REMOTE_BAD_LENGTH);
            }
        };
        self.begin_transfer(peer, message, qp, Some(receive), to, effects);
        Ok(())
    }

    fn accept_write(
        &mut self,
        peer: ProcessId,
        message: &Message,
        qp: &Arc<QueuePair>,
        effects: &Effects,
    ) -> Result<(), Status> {
        self.check_peer(message, qp, effects)?;
        let to = self.remote_span(message, qp, IBV_ACCESS_REMOTE_WRITE)?;
        let uses_receive = message.flags & 1 != 0 && !qp.attributes.unsolicited;
        let receive = if uses_receive { Some(qp.take_receive().ok_or(Status::REMOTE_RNR)?) } else { None };
        self.begin_transfer(peer, message, qp, receive, vec![to], effects);
        Ok(())
    }

    fn grant_read(
        &mut self,
        peer: ProcessId,
        message: &Message,
        qp: &Arc<QueuePair>,
        effects: &Effects,
    ) -> Result<(), Status> {
        self.check_peer(message, qp, effects)?;
        let from = self.remote_span(message, qp, IBV_ACCESS_REMOTE_READ)?;
        let mut reply = reply_to(message, Status::OK);
        reply.spans[0] = from;
        if bounce::is_needed(&[from]) {
            let Some(link) = self.links.get_mut(&peer) else { return Ok(()) };
            match link.grant(from) {
                Ok((grant, copy)) => (reply.serial, reply.spans[0]) = (grant, copy),
                Err(Refused::Full) => {
                    self.arrivals.push_back(Arrival { peer, message: *message });
                    return Ok(());
                }
                Err(Refused::Failed(error)) => {
                    eprintln!("softefa: {:#x} of a GPU cannot be read: {error}", from.address);
                    return Err(Status::REMOTE_BAD_ADDRESS);
                }
            }
        }
        self.with_counters(qp, |counters| {
            add(&counters.rx_pkts, 1);
            add(&counters.tx_pkts, packets(from.length));
            add(&counters.tx_bytes, from.length);
            add(&counters.rdma_read_resp_bytes, from.length);
        });
        self.send_reply(peer, reply);
        Ok(())
    }

    /// A device answers RDMA only to those for whom it has an address handle.
    fn check_peer(&self, message: &Message, qp: &QueuePair, effects: &Effects) -> Result<(), Status> {
        let device = self.devices.get(&qp.attributes.device).ok_or(Status::REMOTE_BAD_QPN)?;
        let known = device.handles.number(&message.source()) != NO_ADDRESS_HANDLE;
        if known || !effects.address_check { Ok(()) } else { Err(Status::REMOTE_UNKNOWN_PEER) }
    }

    fn remote_span(&self, message: &Message, qp: &QueuePair, access: u32) -> Result<Span, Status> {
        let device = self.devices.get(&qp.attributes.device).ok_or(Status::REMOTE_BAD_QPN)?;
        let (pd, length) = (qp.attributes.pd, message.length());
        let found = device.registrations.resolve(message.rkey, pd, message.remote_address, length, access);
        found.ok_or(Status::REMOTE_BAD_ADDRESS)
    }

    fn receive_spans(&self, qp: &QueuePair, receive: &Receive) -> Option<Vec<Span>> {
        let device = self.devices.get(&qp.attributes.device)?;
        let resolve = |sge: &crate::abi::verbs::ibv_sge| {
            let length = u64::from(sge.length);
            device.registrations.resolve_local(sge.lkey, qp.attributes.pd, sge.addr, length, true)
        };
        receive.sges[..receive.sge_count].iter().map(resolve).collect()
    }

    fn begin_transfer(
        &mut self,
        peer: ProcessId,
        message: &Message,
        qp: &Arc<QueuePair>,
        receive: Option<Receive>,
        to: Vec<Span>,
        effects: &Effects,
    ) {
        let Some(channel) = self.links.get(&peer).and_then(|link| link.incoming.clone()) else { return };
        let from = message.spans.iter().copied().filter(|span| span.length > 0).collect();
        let errand = Errand::Incoming { message: *message, channel, qp: Arc::clone(qp), receive };
        let dice = message_dice(message, self.seed(), Purpose::Pieces);
        self.transfers.push(Transfer::new(peer, from, to, effects, dice, errand));
    }

    /// Moves up to `limit` pieces of what is on its way in.
    pub(super) fn move_pieces(&mut self, limit: usize) {
        for _ in 0..limit {
            if self.transfers.is_empty() {
                return;
            }
            let shuffle = self.transfers[0].shuffle;
            let index = if shuffle { self.dice.below(self.transfers.len() as u64) as usize } else { 0 };
            let result = match self.still_allowed(&self.transfers[index]) {
                Ok(()) => self.transfers[index].step(),
                Err(stop) => Err(stop),
            };
            match result {
                Ok(()) if !self.transfers[index].pieces.is_empty() => {}
                Ok(()) => {
                    let done = self.take_transfer(index);
                    self.landed(done);
                }
                Err(stop) => {
                    let broken = self.take_transfer(index);
                    self.broken(broken, &stop);
                }
            }
        }
    }

    fn take_transfer(&mut self, index: usize) -> Transfer {
        // Without shuffling the order is a promise.
        if self.transfers[index].shuffle {
            self.transfers.swap_remove(index)
        } else {
            self.transfers.remove(index)
        }
    }

    /// Memory may have been deregistered since the last piece; then not another byte may be written.
    fn still_allowed(&self, transfer: &Transfer) -> Result<(), Stop> {
        match &transfer.errand {
            Errand::Incoming { message, qp, .. } if message.op == Op::Write as u8 => {
                self.remote_span(message, qp, IBV_ACCESS_REMOTE_WRITE).map(|_| ()).map_err(Stop::Refused)
            }
            Errand::Incoming { qp, receive, .. } => {
                let spans =
                    receive.as_ref().map_or(Some(Vec::new()), |receive| self.receive_spans(qp, receive));
                spans.map(|_| ()).ok_or(Stop::Refused(Status::REMOTE_BAD_LENGTH))
            }
            Errand::Fetched(Fetched { flight, .. }) => {
                let device = self.devices.get(&flight.qp.attributes.device).ok_or(Stop::Abandoned)?;
                let sges = &flight.request.sges[..flight.request.sge_count];
                let pd = flight.qp.attributes.pd;
                let registered = sges.iter().all(|sge| {
                    let length = u64::from(sge.length);
                    device.registrations.resolve_local(sge.lkey, pd, sge.addr, length, true).is_some()
                });
                if registered { Ok(()) } else { Err(Stop::Refused(Status::INVALID_LKEY)) }
            }
        }
    }

    /// All pieces are here.
    fn landed(&mut self, transfer: Transfer) {
        match transfer.errand {
            Errand::Fetched(Fetched { flight, grant }) => {
                self.fetched(transfer.peer, grant);
                self.with_counters(&flight.qp, |counters| {
                    add(&counters.rx_pkts, packets(flight.length));
                    add(&counters.rx_bytes, flight.length);
                });
                self.finish(flight, Status::OK);
            }
            Errand::Incoming { message, channel, qp, receive } => {
                // An operation without data was never claimed: is it still meant?
                if transfer.from.is_empty() {
                    if !channel.claim(message.slot, message.generation) {
                        Self::broken_receive(&qp, receive);
                        return;
                    }
                    channel.unclaim(message.slot, message.generation);
                }
                let effects = self.effects(&message.source(), &message.destination(), Op::Send, false);
                note(&qp, Trace::Land, &message, Status::OK);
                let length = message.length();
                self.with_counters(&qp, |counters| {
                    add(&counters.rx_pkts, packets(length));
                    add(&counters.rx_bytes, length);
                    if message.op == Op::Write as u8 {
                        add(&counters.rdma_write_recv_bytes, length);
                    } else {
                        add(&counters.recv_bytes, length);
                        add(&counters.recv_wrs, 1);
                    }
                });
                if message.op == Op::Send as u8 || message.flags & 1 != 0 {
                    self.complete_receive(&message, &qp, receive.as_ref(), Status::OK, &effects);
                }
                self.send_reply(transfer.peer, reply_to(&message, Status::OK));
            }
        }
    }

    fn broken(&mut self, transfer: Transfer, stop: &Stop) {
        match (transfer.errand, stop) {
            (Errand::Fetched(Fetched { flight, grant }), stop) => {
                self.fetched(transfer.peer, grant);
                if let Stop::Refused(status) = stop {
                    self.finish(flight, *status);
                }
            }
            (Errand::Incoming { message, qp, receive, .. }, Stop::Refused(status)) => {
                Self::broken_receive(&qp, receive);
                self.refuse(transfer.peer, &message, *status);
            }
            (Errand::Incoming { qp, receive, .. }, Stop::Abandoned) => Self::broken_receive(&qp, receive),
        }
    }

    /// A receive whose message stayed away waits for the next one.
    fn broken_receive(qp: &QueuePair, receive: Option<Receive>) {
        if let Some(receive) = receive {
            qp.return_receive(receive);
        }
    }

    fn complete_receive(
        &mut self,
        message: &Message,
        qp: &Arc<QueuePair>,
        receive: Option<&Receive>,
        status: Status,
        effects: &Effects,
    ) {
        let Some(device) = self.devices.get(&qp.attributes.device) else { return };
        let completion = Completion {
            qp: Arc::clone(qp),
            receive: true,
            op: Op::from_raw(message.op).unwrap_or(Op::Send),
            id: receive.map_or(0, |receive| receive.id),
            status,
            length: message.length() as u32,
            immediate: (message.flags & 1 != 0).then_some(message.immediate),
            source_qpn: message.source_qpn,
            address_handle: device.handles.number(&message.source()),
            source: message.source(),
            unsolicited: receive.is_none(),
        };
        let mut dice = message_dice(message, self.seed(), Purpose::Show);
        if dice.percent(effects.hold_pct) && effects.reorder_us > 0 {
            self.at(now_ns() + dice.below(effects.reorder_us + 1) * 1000, Event::Complete(completion));
        } else {
            self.show(completion);
        }
    }

    fn refuse(&mut self, peer: ProcessId, message: &Message, status: Status) {
        self.send_reply(peer, reply_to(message, status));
    }

    fn send_reply(&mut self, peer: ProcessId, reply: Message) {
        if let Some(link) = self.links.get_mut(&peer) {
            link.reply(reply);
        }
    }

    /// The peer may forget the copy that it kept for a read.
    fn fetched(&mut self, peer: ProcessId, grant: u64) {
        if let Some(link) = self.links.get_mut(&peer) {
            link.fetched(grant);
        }
    }

    pub(super) fn with_counters(&self, qp: &QueuePair, work: impl FnOnce(&crate::counters::Counters)) {
        if let Some(device) = self.devices.get(&qp.attributes.device) {
            work(&device.table.counters);
        }
    }

    /// Sends what waited for room, and rings bells.
    pub(super) fn flush(&mut self) {
        let peers: Vec<_> = self.links.keys().copied().collect();
        for peer in peers {
            let Some(link) = self.links.get_mut(&peer) else { continue };
            for flight in std::mem::take(&mut link.stalled) {
                self.launch(peer, flight);
            }
            if let Some(link) = self.links.get_mut(&peer) {
                link.flush();
            }
        }
    }

    /// Ends what comes in for a queue pair.
    pub(super) fn drop_transfers_of(&mut self, qp: &Arc<QueuePair>) {
        let (dropped, kept) = std::mem::take(&mut self.transfers)
            .into_iter()
            .partition::<Vec<_>, _>(|transfer| Arc::ptr_eq(transfer.qp(), qp));
        self.transfers = kept;
        for transfer in dropped {
            match transfer.errand {
                Errand::Incoming { message, .. } => {
                    self.refuse(transfer.peer, &message, Status::REMOTE_BAD_QPN);
                }
                Errand::Fetched(Fetched { grant, .. }) => self.fetched(transfer.peer, grant),
            }
        }
        self.flush();
    }

    /// A process is gone: what it sent is forgotten, what it was sent fails.
    pub(super) fn peer_gone(&mut self, peer: ProcessId) {
        let (broken, kept) =
            std::mem::take(&mut self.transfers).into_iter().partition::<Vec<_>, _>(|transfer| {
                transfer.peer == peer && matches!(transfer.errand, Errand::Incoming { .. })
            });
        self.transfers = kept;
        for transfer in broken {
            self.broken(transfer, &Stop::Abandoned);
        }
        self.arrivals.retain(|arrival| arrival.peer != peer);
        let Some(mut link) = self.links.remove(&peer) else { return };
        self.mailbox.forget(peer);
        for flight in link.drop_flights(|_| true) {
            flight.qp.note(Trace::PeerGone, Record { peer_qpn: flight.request.qpn, ..Record::default() });
            self.finish(flight, Status::REMOTE_BAD_QPN);
        }
        let _ = std::fs::remove_file(link.out.path());
        if let Some(incoming) = link.incoming {
            let _ = std::fs::remove_file(incoming.path());
        }
    }
}

fn message_dice(message: &Message, seed: u64, purpose: Purpose) -> Dice {
    Dice::new(seed, &message.source(), message.source_qpn, message.serial, purpose as u64)
}

fn reply_to(message: &Message, status: Status) -> Message {
    Message {
        kind: kind::REPLY,
        op: message.op,
        status: status.0,
        slot: message.slot,
        generation: message.generation,
        ..Message::default()
    }
}

fn note(qp: &QueuePair, event: Trace, message: &Message, status: Status) {
    let record = Record {
        peer_qpn: message.source_qpn,
        op: message.op,
        status: status.0,
        id: message.remote_address,
        length: message.length(),
        extra: message.immediate,
        ..Record::default()
    };
    qp.note(event, record);
}
