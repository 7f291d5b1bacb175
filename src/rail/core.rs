//! What the owner of a rail does with it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam_queue::SegQueue;
use slab::Slab;

use super::destination::{DestinationKey, Destinations};
use super::message::Messages;
use super::receive::Receives;
use super::run::Run;
use super::{Command, Counters, Destination, MESSAGE_BYTES_MAX, RailEvents, RailLimits};
use crate::error::{Error, Result};
use crate::fabric::{
    Completion, Device, Domain, Endpoint, EndpointOptions, MemoryRegion, Posted, Rma, RmaFlags, efa, next_key,
};
use crate::types::{Op, RailId};

/// Operations in flight where the device names a smaller queue than a software provider needs to stay busy.
const OPERATIONS_MIN: u32 = 256;
/// And an upper bound, for devices that name an absurd one.
const OPERATIONS_MAX: u32 = 8192;
/// Commands taken in and completion batches handled before posting gets its turn.
const COMMANDS_PER_TURN: usize = 256;
const POLLS_PER_TURN: usize = 8;
/// How often peers that never answer are looked for.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

struct Active {
    run: Run,
    destination: DestinationKey,
    /// Next slice to post.
    cursor: u32,
    /// Operations in flight.
    in_flight: u32,
    /// Nothing more is posted: an operation failed, or the owner stopped the transfer.
    stopped: bool,
    /// It stands in the queue of runs with slices left to post.
    queued: bool,
}

impl Active {
    fn is_posted(&self) -> bool {
        self.stopped || self.cursor == self.run.range.end
    }
}

#[derive(Clone, Copy)]
struct Operation {
    run: usize,
    len: u64,
}

enum Turn {
    /// Nothing is left to post.
    Posted,
    /// The provider or the credits put it off.
    Blocked,
    /// Its share of this turn is used up.
    Yielded,
}

pub(super) struct Core {
    // Closed before anything that its operations refer to.
    endpoint: Endpoint,
    id: RailId,
    device: Device,
    limits: RailLimits,
    counters: Arc<Counters>,
    receives: Receives,
    messages: Messages,
    destinations: Destinations,
    runs: Slab<Active>,
    /// Runs with slices left to post.
    turns: VecDeque<usize>,
    operations: Vec<Option<Operation>>,
    operation_base: u32,
    free: Vec<u32>,
    completions: Vec<Completion>,
    /// The time at the start of this turn.
    now: Instant,
    /// When it was last looked for peers that never answer.
    looked: Instant,
    /// Why the rail no longer works.
    broken: Option<Error>,
}

impl Core {
    pub fn open(
        id: RailId,
        domain: &Arc<Domain>,
        device: &Device,
        limits: &RailLimits,
        counters: Arc<Counters>,
    ) -> Result<Self> {
        let operations = match limits.operations_max {
            0 => (device.tx_size() as u32).clamp(OPERATIONS_MIN, OPERATIONS_MAX),
            n => n,
        };
        let message_base = limits.receive_buffers;
        let operation_base = message_base + limits.send_buffers;
        let contexts = operation_base + operations;
        let mut endpoint = Endpoint::open(
            domain,
            device,
            &EndpointOptions {
                cq_entries: if limits.cq_entries == 0 {
                    contexts as usize
                } else {
                    limits.cq_entries as usize
                },
                context_count: contexts,
                rx_size: efa::rx_size(device, limits.receive_buffers),
                want_wait_fd: limits.want_wait_fd,
                gpu_by_nic: limits.gpu_by_nic,
                ..EndpointOptions::default()
            },
        )?;
        let mut receives = Receives::new(domain, limits.receive_buffers, MESSAGE_BYTES_MAX, next_key())?;
        let messages = Messages::new(
            domain,
            limits.send_buffers,
            message_base,
            next_key(),
            efa::numbers_messages(device),
        )?;
        for buffer in receives.registered().into_iter().chain([messages.registered()]) {
            buffer.region().bind(&endpoint)?;
        }
        receives.post(&mut endpoint)?;
        Ok(Self {
            endpoint,
            id,
            device: device.clone(),
            limits: limits.clone(),
            counters,
            receives,
            messages,
            destinations: Destinations::default(),
            runs: Slab::new(),
            turns: VecDeque::new(),
            operations: vec![None; operations as usize],
            operation_base,
            free: (0..operations).rev().collect(),
            completions: Vec::with_capacity(64),
            now: Instant::now(),
            looked: Instant::now(),
            broken: None,
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

    /// Makes a region usable at this endpoint, where the provider wants that said.
    pub fn bind(&self, region: &MemoryRegion) -> Result<()> {
        Ok(region.bind(&self.endpoint)?)
    }

    /// Whether something waits to be posted.
    pub fn has_backlog(&self) -> bool {
        !self.turns.is_empty() || self.messages.has_unsent()
    }

    pub fn try_wait(&mut self) -> bool {
        !self.has_backlog() && self.endpoint.try_wait()
    }

    /// One turn: new work, completions, receives, messages, runs. Returns how many events it handled.
    pub fn drive(
        &mut self,
        inbox: &SegQueue<Command>,
        unfinished: &AtomicUsize,
        events: &dyn RailEvents,
    ) -> usize {
        self.now = Instant::now();
        let (mut finished, mut handled) = self.take_in(inbox);
        handled += self.poll(events, &mut finished);
        // A user who never takes notifications is met by senders who wait, not by memory that fills up.
        if self.broken.is_none()
            && events.has_room()
            && let Err(e) = self.receives.post(&mut self.endpoint)
        {
            self.break_down(e, &mut finished);
        }
        if self.broken.is_none() {
            let (posted, ended) = self.messages.post(
                &mut self.endpoint,
                &mut self.destinations,
                self.now,
                self.limits.stall_timeout,
            );
            handled += posted + ended;
            finished += ended;
            handled += self.post_runs(&mut finished);
            self.fail_never_met();
        }
        if finished > 0 {
            unfinished.fetch_sub(finished, Ordering::AcqRel);
        }
        handled
    }

    /// Takes in what was left for the rail. Returns how much of it is finished already, and how many events that was.
    fn take_in(&mut self, inbox: &SegQueue<Command>) -> (usize, usize) {
        let (mut finished, mut admitted) = (0, 0);
        for _ in 0..COMMANDS_PER_TURN {
            let Some(command) = inbox.pop() else { break };
            let name = match &command {
                Command::Run(run) => &run.destination,
                Command::Message(message) => &message.destination,
                Command::Admit(endpoints, then) => {
                    self.admit(endpoints);
                    then.on_admitted();
                    finished += 1;
                    admitted += 1;
                    continue;
                }
            };
            let destination = match &self.broken {
                Some(e) => Err(e.clone()),
                None => self.destinations.acquire(name, &mut self.endpoint),
            };
            match (command, destination) {
                (Command::Run(run), Ok(destination)) => {
                    let cursor = run.range.start;
                    let active =
                        Active { run, destination, cursor, in_flight: 0, stopped: false, queued: true };
                    let key = self.runs.insert(active);
                    self.turns.push_back(key);
                }
                (Command::Message(message), Ok(destination)) => {
                    if let Some(deaf) = self.destinations.get(destination).deaf.clone() {
                        self.destinations.release(destination);
                        message.source.on_finished(Err(deaf));
                        finished += 1;
                    } else {
                        self.messages.push(destination, message.source);
                    }
                }
                (Command::Run(run), Err(e)) => {
                    run.owner.on_error(e);
                    run.owner.on_finished();
                    finished += 1;
                }
                (Command::Message(message), Err(e)) => {
                    message.source.on_finished(Err(e));
                    finished += 1;
                }
                (Command::Admit(..), _) => unreachable!("handled above"),
            }
        }
        (finished, admitted)
    }

    fn admit(&mut self, endpoints: &[Destination]) {
        for endpoint in endpoints {
            match self.destinations.acquire(endpoint, &mut self.endpoint) {
                Ok(key) => self.destinations.release(key),
                Err(e) => log::warn!("rail {}: an endpoint of a peer cannot be made known: {e}", self.id),
            }
        }
    }

    fn poll(&mut self, events: &dyn RailEvents, finished: &mut usize) -> usize {
        let mut handled = 0;
        for _ in 0..POLLS_PER_TURN {
            let mut completions = std::mem::take(&mut self.completions);
            let outcome = self.endpoint.poll(&mut completions);
            let count = completions.len();
            for completion in completions.drain(..) {
                *finished += self.complete(completion, events);
            }
            self.completions = completions;
            handled += count;
            if let Err(e) = outcome {
                self.break_down(e, finished);
                return handled;
            }
            if count == 0 {
                break;
            }
        }
        if handled == 0 {
            for event in self.endpoint.drain_events() {
                log::warn!("rail {}: the provider reports: {}", self.id, event.text);
            }
        }
        handled
    }

    /// Handles one completion. Returns how many runs and messages it finished.
    fn complete(&mut self, mut completion: Completion, events: &dyn RailEvents) -> usize {
        let error = completion.error.take().map(|e| Error::from(*e));
        if error.is_some() {
            Counters::add(&self.counters.errors, 1);
        }
        match completion.context {
            Some(context) if self.receives.owns(context) => {
                self.complete_receive(context, &completion, error, events);
                0
            }
            Some(context) if self.messages.owns(context) => {
                Counters::add(&self.counters.messages_sent, 1);
                self.messages.complete(context, error, &mut self.destinations, self.now)
            }
            Some(context) => self.complete_operation(context - self.operation_base, error),
            None => {
                match (error, completion.imm) {
                    (Some(e), _) => log::warn!("rail {}: an operation of a peer failed here: {e}", self.id),
                    (None, Some(immediate)) => self.landed(immediate, events),
                    (None, None) => {}
                }
                0
            }
        }
    }

    fn landed(&mut self, immediate: u32, events: &dyn RailEvents) {
        Counters::add(&self.counters.immediates, 1);
        events.on_immediate(immediate);
    }

    fn complete_receive(
        &mut self,
        context: u32,
        completion: &Completion,
        error: Option<Error>,
        events: &dyn RailEvents,
    ) {
        if let Some(e) = error {
            // The buffer goes back into the ring all the same: a ring that shrinks ends in silence.
            log::warn!("rail {}: a receive failed: {e}", self.id);
        } else if completion.is_remote_write() {
            // efa-direct: a write with immediate data uses up a receive.
            if let Some(immediate) = completion.imm {
                self.landed(immediate, events);
            }
        } else {
            Counters::add(&self.counters.messages_received, 1);
            events.on_message(completion.imm, &self.receives.read(context, completion.len));
        }
        self.receives.recycle(context);
    }

    fn complete_operation(&mut self, index: u32, error: Option<Error>) -> usize {
        let Some(operation) = self.operations[index as usize].take() else {
            log::warn!("rail {}: an operation completed twice; the second completion was ignored", self.id);
            return 0;
        };
        self.free.push(index);
        let active = &mut self.runs[operation.run];
        active.in_flight -= 1;
        let entry = self.destinations.get(active.destination);
        entry.operations -= 1;
        entry.reached |= error.is_none();
        entry.completed(error.as_ref(), self.now);
        if let Some(error) = error {
            active.stopped = true;
            active.run.owner.on_error(error);
        } else {
            let (count, bytes) = match active.run.op {
                Op::Write => (&self.counters.writes, &self.counters.write_bytes),
                Op::Read => (&self.counters.reads, &self.counters.read_bytes),
            };
            Counters::add(count, 1);
            Counters::add(bytes, operation.len);
        }
        self.settle(operation.run)
    }

    /// Ends a run of which nothing is left to post or in flight. One that still has its turn is ended there.
    fn settle(&mut self, key: usize) -> usize {
        let active = &self.runs[key];
        if active.in_flight > 0 || !active.is_posted() || active.queued {
            return 0;
        }
        let active = self.runs.remove(key);
        self.destinations.release(active.destination);
        active.run.owner.on_finished();
        1
    }

    fn post_runs(&mut self, finished: &mut usize) -> usize {
        let mut posted = 0;
        for _ in 0..self.turns.len() {
            if self.free.is_empty() {
                break;
            }
            let Some(key) = self.turns.pop_front() else { break };
            match self.post_run(key, &mut posted) {
                Turn::Posted => {
                    self.runs[key].queued = false;
                    *finished += self.settle(key);
                }
                Turn::Yielded => self.turns.push_back(key),
                Turn::Blocked => {
                    self.turns.push_back(key);
                    self.fail_if_stalled(key);
                }
            }
        }
        posted
    }

    fn post_run(&mut self, key: usize, posted: &mut usize) -> Turn {
        let active = &mut self.runs[key];
        let entry = self.destinations.get(active.destination);
        active.stopped |= active.run.owner.is_stopped();
        for _ in 0..self.limits.batch_slices {
            if active.is_posted() {
                return Turn::Posted;
            }
            // A destination may hold as many operations as are left for all others, so that some always are:
            // a peer that stands still cannot take the rail from the rest.
            if entry.operations as usize >= self.free.len() {
                return Turn::Blocked;
            }
            let Some(&index) = self.free.last() else { return Turn::Blocked };
            let slice = &active.run.slices[active.cursor as usize];
            let is_last = active.cursor + 1 == active.run.range.end;
            let rma = Rma {
                local: &active.run.regions[slice.region as usize],
                local_addr: slice.local_addr,
                len: slice.len as usize,
                remote_addr: slice.remote_addr,
                remote_key: slice.remote_key,
                dest: entry.addr,
                imm: active.run.immediate,
                context: self.operation_base + index,
                flags: RmaFlags {
                    more: false,
                    // Where writes stay in order the last one's arrival tells of all before it.
                    delivery_complete: active.run.op == Op::Write
                        && self.device.delivery_complete()
                        && (is_last || !self.device.orders_writes()),
                },
            };
            let outcome = match active.run.op {
                Op::Write => self.endpoint.write(&rma),
                Op::Read => self.endpoint.read(&rma),
            };
            match outcome {
                Ok(Posted::Yes) => {
                    self.free.pop();
                    self.operations[index as usize] = Some(Operation { run: key, len: slice.len });
                    active.in_flight += 1;
                    active.cursor += 1;
                    entry.operations += 1;
                    entry.last_progress = self.now;
                    *posted += 1;
                }
                Ok(Posted::Again) => {
                    Counters::add(&self.counters.again, 1);
                    return Turn::Blocked;
                }
                Err(e) => {
                    active.stopped = true;
                    active.run.owner.on_error(e.into());
                    return Turn::Posted;
                }
            }
        }
        if active.is_posted() { Turn::Posted } else { Turn::Yielded }
    }

    fn fail_if_stalled(&mut self, key: usize) {
        let active = &mut self.runs[key];
        let entry = self.destinations.get(active.destination);
        if let Some(error) = entry.stalled(self.now, self.limits.stall_timeout) {
            active.stopped = true;
            active.run.owner.on_error(error);
        }
    }

    /// Ends the wait for peers that never answered, where the provider does not. What is in flight to them stays so.
    fn fail_never_met(&mut self) {
        if !efa::shakes_hands(&self.device) || self.now.duration_since(self.looked) < LOOK_INTERVAL {
            return;
        }
        self.looked = self.now;
        for (_, active) in &mut self.runs {
            // Also one with nothing in flight: the provider may put it off for as long as others are.
            if active.stopped {
                continue;
            }
            let entry = self.destinations.get(active.destination);
            if let Some(error) = entry.never_met(self.now, self.limits.stall_timeout) {
                active.stopped = true;
                active.run.owner.on_error(error);
            }
        }
    }

    /// The queue itself failed: nothing more will be heard of what is in flight, so all of it ends now.
    fn break_down(&mut self, error: impl Into<Error>, finished: &mut usize) {
        if self.broken.is_some() {
            return;
        }
        let error: Error = error.into().context(format_args!("rail {} broke down", self.id));
        log::error!("{error}; its transfers fail, restart the process to use the device again");
        self.end_all(&error, finished);
    }

    /// Ends every run and message with this error, and refuses more.
    pub fn end_all(&mut self, error: &Error, finished: &mut usize) {
        self.turns.clear();
        for active in self.runs.drain() {
            active.run.owner.on_error(error.clone());
            active.run.owner.on_finished();
            *finished += 1;
        }
        *finished += self.messages.fail_all(error);
        self.operations.fill(None);
        self.broken = Some(error.clone());
    }
}
