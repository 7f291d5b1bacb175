//! What the owner of a rail does with it.

mod counts;
mod posting;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use slab::Slab;

use super::destination::{DestinationKey, Destinations};
use super::failure::Failure;
use super::message::Messages;
use super::probe::Probes;
use super::receive::Receives;
use super::share::{Fed, Share};
use super::window::Window;
use super::work::Invitation;
use super::{Command, Counters, Destination, Event, MESSAGE_BYTES_MAX, RailLimits, owner};
use crate::error::{Error, Result};
use crate::fabric::{
    Completion, CompletionError, Device, Domain, Endpoint, EndpointOptions, MemoryRegion, efa, next_key,
};
use crate::sync::SegQueue;
use crate::types::{Op, RailId};

/// Operations in flight where the device names a smaller queue than a software provider needs to stay busy.
const OPERATIONS_MIN: u32 = 256;
/// And an upper bound, for devices that name an absurd one.
const OPERATIONS_MAX: u32 = 8192;
/// Commands taken in and completion batches handled before posting gets its turn.
const COMMANDS_PER_TURN: usize = 256;
const POLLS_PER_TURN: usize = 8;
/// Polls of a turn that find nothing before it is taken that there is nothing, where the provider moves data in our polls:
/// tcp's takes in one operation of a peer for each, and says nothing of it.
const QUIET_POLLS_MAX: usize = 4;
/// How often it is looked at what comes without a completion.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// What is particular to the provider.
struct Quirks {
    /// Whether several writes may share a doorbell, to peers that have been reached.
    batches: bool,
    /// See [`QUIET_POLLS_MAX`]; one where a NIC moves the data.
    quiet_polls_max: usize,
    /// Whether the provider keeps messages for which no receive is posted, without limit.
    keeps_messages: bool,
}

pub(super) struct Core {
    // Closed before anything that its operations refer to.
    pub(super) endpoint: Endpoint,
    pub(super) id: RailId,
    pub(super) limits: RailLimits,
    pub(super) counters: Counters,
    /// See [`has_news`](Self::has_news).
    pub(super) news: bool,
    receives: Receives,
    pub(super) probes: Probes,
    pub(super) messages: Messages,
    pub(super) destinations: Destinations,
    pub(super) window: Window,
    pub(super) shares: Slab<Share>,
    /// Shares with something to claim or to post.
    pub(super) turns: VecDeque<usize>,
    /// Shares that leave their work as soon as nothing of it can arrive late.
    pub(super) resting: Vec<usize>,
    completions: Vec<Completion>,
    quirks: Quirks,
    /// Whether everything that completes has arrived, however it was asked for.
    pub(super) completions_confirm: bool,
    /// Posts refused in a row.
    pub(super) refusals: u32,
    /// The time at the start of this turn.
    pub(super) now: Instant,
    /// When it was last looked for peers that never answer.
    looked: Instant,
    /// Since when a batch is open.
    open_since: Option<Instant>,
    /// The rail no longer works.
    pub(super) failure: Option<Failure>,
}

impl owner::Core for Core {
    fn has_backlog(&self) -> bool {
        !self.turns.is_empty() || self.messages.has_unsent()
    }

    /// Receives do not count, nor do questions: they may be without an answer for ever.
    fn is_idle(&self) -> bool {
        self.shares.iter().all(|(_, share)| share.is_probe()) && self.messages.is_empty()
    }
}

impl Core {
    pub fn open(id: RailId, domain: &Arc<Domain>, device: &Device, limits: &RailLimits) -> Result<Self> {
        let batches = efa::batches_writes(device, domain.library().version());
        let transmits = efa::tx_size(device) as u32;
        let operations = match limits.operations_max {
            // A batch must not be put off in the middle: the other half of the queue is for messages and for what the
            // provider sends by itself.
            0 if batches => (transmits / 2).clamp(1, OPERATIONS_MAX),
            0 => transmits.clamp(OPERATIONS_MIN, OPERATIONS_MAX),
            n => n,
        };
        let buffers = limits.receive_buffers + limits.send_buffers;
        let mut endpoint = Endpoint::open(
            domain,
            device,
            &EndpointOptions {
                cq_entries: if limits.cq_entries == 0 {
                    (buffers + operations) as usize
                } else {
                    limits.cq_entries as usize
                },
                buffers,
                operations,
                rx_size: efa::rx_size(device, limits.receive_buffers),
                want_wait_fd: limits.want_wait_fd,
                gpu_by_nic: limits.gpu_by_nic,
                ..EndpointOptions::default()
            },
        )?;
        let mut receives = Receives::new(domain, limits.receive_buffers, MESSAGE_BYTES_MAX, next_key())?;
        let messages = Messages::new(
            id,
            domain,
            limits.send_buffers,
            limits.receive_buffers,
            next_key(),
            efa::numbers_messages(device),
        )?;
        let probes = Probes::new(domain, device)?;
        let buffers = receives.registered().into_iter().chain([messages.registered()]);
        for buffer in buffers.chain(probes.registered()) {
            buffer.region().bind(&endpoint)?;
        }
        receives.post(&mut endpoint)?;
        Ok(Self {
            quirks: Quirks {
                batches,
                quiet_polls_max: if efa::is_efa(device.provider()) { 1 } else { QUIET_POLLS_MAX },
                keeps_messages: efa::keeps_messages(device),
            },
            completions_confirm: !device.orders_writes(),
            refusals: 0,
            endpoint,
            id,
            limits: limits.clone(),
            counters: Counters::default(),
            news: false,
            receives,
            probes,
            messages,
            destinations: Destinations::new(device),
            window: Window::default(),
            shares: Slab::new(),
            turns: VecDeque::new(),
            resting: Vec::new(),
            completions: Vec::with_capacity(64),
            now: Instant::now(),
            looked: Instant::now(),
            open_since: None,
            failure: None,
        })
    }

    pub fn endpoint_name(&mut self) -> Result<Vec<u8>> {
        self.endpoint.name()
    }

    pub fn wait_fd(&self) -> Option<i32> {
        self.endpoint.wait_fd()
    }

    pub fn reaches_gpus(&self) -> bool {
        self.endpoint.reaches_gpus()
    }

    /// What it has done, and how it stands.
    pub fn counters(&self) -> Counters {
        Counters {
            in_flight: self.endpoint.operations_in_flight(),
            window: self.window.operations_max(),
            ..self.counters
        }
    }

    /// Whether counters have changed by what is no event, since the last time that this was asked.
    pub fn has_news(&mut self) -> bool {
        std::mem::take(&mut self.news)
    }

    /// Makes a region usable at this endpoint, where the provider wants that said.
    pub fn bind(&self, region: &MemoryRegion) -> Result<()> {
        Ok(region.bind(&self.endpoint)?)
    }

    pub fn try_wait(&mut self) -> bool {
        if owner::Core::has_backlog(self) {
            return false;
        }
        if self.failure.is_some() { owner::Core::is_idle(self) } else { self.endpoint.try_wait() }
    }

    /// One turn: new work, completions, receives, messages, shares. Appends what happened that concerns others, and
    /// returns how many events it handled. Without `room`, no further messages are received.
    pub fn drive(&mut self, inbox: &SegQueue<Command>, room: bool, events: &mut Vec<Event>) -> usize {
        self.now = Instant::now();
        let mut handled = self.take_in(inbox, events);
        if self.failure.is_some() {
            return handled + self.wind_down(room, events);
        }
        if !self.close_batch(events) {
            return handled;
        }
        handled += self.poll(room, events);
        if self.failure.is_none() {
            handled += self.messages.post(
                &mut self.endpoint,
                &mut self.destinations,
                self.now,
                self.limits.stall_timeout,
                events,
            );
            handled += self.post_shares(events);
            handled += self.look_after_resting(events);
            self.look_around(events);
        }
        if cfg!(debug_assertions) && self.failure.is_none() {
            self.check_counts();
        }
        handled
    }

    /// Takes in what was left for the rail. Returns how many events that was.
    fn take_in(&mut self, inbox: &SegQueue<Command>, events: &mut Vec<Event>) -> usize {
        let mut handled = 0;
        for _ in 0..COMMANDS_PER_TURN {
            let Some(command) = inbox.pop() else { break };
            match command {
                Command::Admit(endpoints, tag) => {
                    self.admit(&endpoints);
                    events.push(Event::Admitted { tag });
                    handled += 1;
                }
                Command::Work(Invitation { work, lane, .. }) if self.failure.is_some() => {
                    if let Some(error) =
                        self.failure().cloned().filter(|_| work.give_back(lane, None, 0, None))
                    {
                        events.push(Event::WorkLeft { work, error });
                    }
                }
                Command::Message(message) if self.failure.is_some() => {
                    let error = self.failure().cloned().expect("it was just looked at");
                    events.push(Event::MessageReturned { message, rail: self.id, error });
                }
                Command::Work(invitation) => match self.acquire(&invitation.destination) {
                    Ok(destination) => {
                        self.turns.push_back(self.shares.insert(Share::new(invitation, destination)));
                    }
                    Err(e) => invitation.work.fail(e, events),
                },
                Command::Message(message) => match self.acquire(&message.destination) {
                    Ok(destination) => match self.destinations.get(destination).deaf.clone() {
                        Some(deaf) => {
                            self.destinations.release(destination);
                            events.push(Event::MessageLost { message, rail: self.id, error: deaf });
                        }
                        None => self.messages.push(destination, message),
                    },
                    Err(e) => events.push(message.over(Err(e))),
                },
            }
        }
        handled
    }

    fn acquire(&mut self, destination: &Destination) -> Result<DestinationKey> {
        self.destinations.acquire(destination, &mut self.endpoint)
    }

    fn admit(&mut self, endpoints: &[Destination]) {
        for endpoint in endpoints.iter().filter(|_| self.failure.is_none()) {
            match self.destinations.acquire(endpoint, &mut self.endpoint) {
                Ok(key) => self.destinations.release(key),
                Err(e) => log::warn!("rail {}: an endpoint of a peer cannot be made known: {e}", self.id),
            }
        }
    }

    /// Takes completions and, with `room`, gives the NIC back the receives that they used.
    ///
    /// A user who never takes notifications is met by senders who wait, not by memory that fills up: where the provider
    /// would keep what no receive is posted for, it is not polled without one, so that its NIC runs out of buffers, too.
    pub(super) fn poll(&mut self, room: bool, events: &mut Vec<Event>) -> usize {
        let mut handled = 0;
        for turn in 1..=POLLS_PER_TURN {
            // On a device that has failed only for what the provider has kept: elsewhere it gives them back at once.
            if room && (self.failure.is_none() || self.quirks.keeps_messages) {
                let posted = self.receives.post(&mut self.endpoint);
                if let (Err(e), None) = (posted, &self.failure) {
                    self.fail(&e, events);
                    return handled;
                }
            }
            if self.quirks.keeps_messages && self.receives.are_used_up() {
                return handled;
            }
            let mut completions = std::mem::take(&mut self.completions);
            let outcome = self.endpoint.poll(&mut completions);
            for completion in completions.drain(..) {
                self.complete(completion, events);
            }
            self.completions = completions;
            match outcome {
                Ok(0) if handled > 0 || turn >= self.quirks.quiet_polls_max => break,
                Ok(count) => handled += count,
                Err(e) => {
                    self.break_down(&e, events);
                    return handled;
                }
            }
        }
        handled
    }

    fn complete(&mut self, completion: Completion, events: &mut Vec<Event>) {
        match completion {
            Completion::Moved { share, count, bytes } => self.moved(share, count, bytes, events),
            Completion::MoveFailed { share, bytes, error } => {
                self.blame(&error, events);
                self.move_failed(share, bytes, Error::from(*error), events);
            }
            Completion::Sent { buffer, error } => {
                self.counters.messages_sent += 1;
                if let Some(error) = &error {
                    self.blame(error, events);
                }
                let error = error.map(|e| Error::from(*e));
                self.counters.errors.sends += u64::from(error.is_some());
                self.messages.complete(buffer, error, &mut self.destinations, self.now, events);
            }
            Completion::Received { buffer, len, imm } => {
                self.counters.messages_received += 1;
                events.push(Event::Message { immediate: imm, body: self.receives.read(buffer, len) });
                self.receives.recycle(buffer);
            }
            Completion::ReceiveFailed { buffer, error } => {
                // The buffer goes back into the ring all the same: a ring that shrinks ends in silence.
                self.counters.errors.receives += 1;
                self.blame(&error, events);
                log::warn!("rail {}: a receive failed: {}", self.id, error.text);
                self.receives.recycle(buffer);
            }
            Completion::Landed { imm, count, buffer } => {
                self.counters.immediates += u64::from(count);
                events.push(Event::Landed { immediate: imm, count });
                if let Some(buffer) = buffer {
                    self.receives.recycle(buffer);
                }
            }
            Completion::Foreign { error } => {
                self.counters.errors.remote += 1;
                log::warn!("rail {}: an operation of a peer failed here: {}", self.id, error.text);
            }
        }
    }

    /// Fails the rail for an error that is the device's own.
    fn blame(&mut self, error: &CompletionError, events: &mut Vec<Event>) {
        if error.is_of_device() && self.failure.is_none() {
            self.fail(&error.text, events);
        }
    }

    fn moved(&mut self, key: u32, count: u32, bytes: u64, events: &mut Vec<Event>) {
        let Some(share) = self.shares.get_mut(key as usize) else { return };
        if share.is_probe() {
            return self.probe_over(key as usize, None, events);
        }
        let (operations, moved) = match share.work.op() {
            Op::Write => (&mut self.counters.writes, &mut self.counters.write_bytes),
            Op::Read => (&mut self.counters.reads, &mut self.counters.read_bytes),
        };
        *operations += u64::from(count);
        *moved += bytes;
        let entry = self.destinations.get(share.destination);
        entry.reached = true;
        entry.completed(None, self.now);
        self.settled(key as usize, count, bytes, events);
    }

    fn move_failed(&mut self, key: u32, bytes: u64, error: Error, events: &mut Vec<Event>) {
        let Some(share) = self.shares.get_mut(key as usize) else { return };
        if share.is_probe() {
            return self.probe_over(key as usize, Some(&error), events);
        }
        match share.work.op() {
            Op::Write => self.counters.errors.writes += 1,
            Op::Read => self.counters.errors.reads += 1,
        }
        // A device that has failed says nothing of its peers.
        if self.failure.is_none() {
            self.destinations.get(share.destination).completed(Some(&error), self.now);
            let work = Arc::clone(&share.work);
            if self.may_be_lost(key as usize, &error) {
                self.completed(key as usize, 1, bytes);
                let share = &self.shares[key as usize];
                if share.posted == 0 && !share.queued {
                    self.end_share(key as usize, events);
                }
                return;
            }
            // Other rails may go on with theirs; what is in flight here settles as it completes.
            work.fail(error, events);
            self.settled(key as usize, 1, bytes, events);
        } else {
            self.completed(key as usize, 1, bytes);
            self.given_up();
        }
    }

    /// Operations of a share are over, and done unless their work has failed.
    fn settled(&mut self, key: usize, count: u32, bytes: u64, events: &mut Vec<Event>) {
        self.completed(key, count, bytes);
        let share = &mut self.shares[key];
        share.held.settled += count;
        if share.is_empty() && share.leaving.is_none() {
            // Before the work is said to be over: the host may then take its memory back.
            self.endpoint.end(key as u32);
            share.held.clear();
        }
        let work = Arc::clone(&share.work);
        let over = work.settle(count);
        if share.posted == 0 && !share.queued {
            self.end_share(key, events);
        }
        if over {
            events.push(Event::WorkOver { work });
        }
    }

    /// Operations of a share are no longer in flight.
    fn completed(&mut self, key: usize, count: u32, bytes: u64) {
        let share = &mut self.shares[key];
        share.posted -= count;
        share.posted_bytes -= bytes;
        if share.is_shared() {
            self.window.settled(count, bytes);
        }
    }

    /// Nothing of a share is in flight, and it has nothing to post.
    fn end_share(&mut self, key: usize, events: &mut Vec<Event>) {
        if self.shares[key].leaving.is_none() {
            self.remove_share(key);
        } else if self.failure.is_none() {
            self.leave_in_time(key, events);
        }
    }

    /// Takes out a share that holds nothing.
    pub(super) fn remove_share(&mut self, key: usize) {
        let share = self.shares.remove(key);
        if share.is_shared() && share.fed == Fed::Enough {
            self.window.sufficed();
        }
        self.endpoint.end(key as u32);
        self.destinations.release(share.destination);
    }

    /// Looks now and then at what announces itself to nobody: the provider's own events, and peers whose software no longer
    /// does what is waited for.
    fn look_around(&mut self, events: &mut Vec<Event>) {
        if self.now.duration_since(self.looked) < LOOK_INTERVAL {
            return;
        }
        self.looked = self.now;
        for error in self.endpoint.drain_events() {
            self.blame(&error, events);
            if error.is_disconnect() {
                self.destinations.suspect(self.now);
            }
        }
        self.ask_again(events);
    }
}
