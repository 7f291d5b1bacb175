//! Control messages: cut into fragments, sent from a bounded set of registered buffers.
//!
//! Messages to one destination go out in the order in which they were given; fragments of two messages may
//! be in flight together. A destination that accepts nothing keeps only its own messages waiting.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use slab::Slab;

use super::destination::{DestinationKey, Destinations};
use super::work::Tag;
use super::{Destination, Event, MESSAGE_BYTES_MAX};
use crate::error::{Error, Result};
use crate::fabric::{Domain, Endpoint, Posted, RegisteredBuffer, Send as SendArgs};
use crate::types::RailId;

/// The content of a control message.
pub trait Fragments: Send {
    /// Appends the next fragment, at most [`MESSAGE_BYTES_MAX`] bytes, to the empty `fragment` and returns its
    /// immediate data; `None` when the message is complete.
    fn next_fragment(&mut self, fragment: &mut Vec<u8>) -> Option<u32>;

    /// Begins anew, if the receiver minds nothing that comes twice. Says whether it did.
    fn begin_anew(&mut self) -> bool {
        false
    }
}

/// A message of which a fragment has been cut and not sent.
struct Resumed {
    first: Option<(Vec<u8>, u32)>,
    rest: Box<dyn Fragments>,
}

impl Fragments for Resumed {
    fn next_fragment(&mut self, fragment: &mut Vec<u8>) -> Option<u32> {
        let Some((bytes, immediate)) = self.first.take() else { return self.rest.next_fragment(fragment) };
        *fragment = bytes;
        Some(immediate)
    }

    fn begin_anew(&mut self) -> bool {
        let anew = self.rest.begin_anew();
        if anew {
            self.first = None;
        }
        anew
    }
}

/// A control message for one destination.
pub struct Message {
    /// Where to.
    pub destination: Destination,
    /// What.
    pub content: Box<dyn Fragments>,
    /// Whose it is: comes back with [`Event::MessageOver`].
    pub tag: Tag,
}

impl Message {
    /// The event of its end.
    pub fn over(self, result: Result<()>) -> Event {
        Event::MessageOver { tag: self.tag, result }
    }
}

struct Active {
    content: Box<dyn Fragments>,
    tag: Tag,
    destination: DestinationKey,
    /// Fragments in flight.
    outstanding: u32,
    /// Something of it has left.
    begun: bool,
    /// No fragment is left to be cut.
    exhausted: bool,
    error: Option<Error>,
    /// A fragment that the provider put off, and its immediate data. It holds no buffer: a dead peer may put it off
    /// for long.
    put_off: Option<(Vec<u8>, u32)>,
}

impl Active {
    /// Begins anew, if nothing of it has left or its receiver minds nothing that comes twice. Says whether it did.
    fn begin_anew(&mut self) -> bool {
        if !self.begun {
            return true;
        }
        let anew = self.content.begin_anew();
        if anew {
            self.put_off = None;
        }
        anew
    }

    /// What is left of it to send.
    fn unsent(self, destination: Destination) -> Message {
        let content = Box::new(Resumed { first: self.put_off, rest: self.content });
        Message { destination, content, tag: self.tag }
    }

    /// It did not reach its destination.
    fn lost(mut self, rail: RailId, destination: Destination, error: Error) -> Event {
        if self.begin_anew() {
            Event::MessageLost { message: self.unsent(destination), rail, error }
        } else {
            self.over(Err(error))
        }
    }

    fn over(self, result: Result<()>) -> Event {
        Event::MessageOver { tag: self.tag, result }
    }
}

/// What a buffer is for.
#[derive(Clone, Copy)]
enum Slot {
    Free,
    /// A fragment of this message is in flight.
    Of(usize),
    /// The message of the fragment in flight was given up; the buffer is the provider's until it completes.
    Abandoned(DestinationKey),
}

enum Turn {
    /// The destination or the buffers are exhausted for now.
    Blocked,
    /// Nothing is left to send to the destination.
    Empty,
}

pub(super) struct Messages {
    rail: RailId,
    buffer: RegisteredBuffer,
    context_base: u32,
    free: Vec<u32>,
    in_flight: Vec<Slot>,
    /// A message that is lost keeps later ones from being delivered.
    numbered: bool,
    active: Slab<Active>,
    queues: HashMap<DestinationKey, VecDeque<usize>>,
    /// Where messages are numbered: those of which all has left, in their order. One is over when those before it are,
    /// because the loss of one is that of all behind it, also of what has completed.
    sent: HashMap<DestinationKey, VecDeque<usize>>,
    turns: VecDeque<DestinationKey>,
    scratch: Vec<u8>,
}

impl Messages {
    pub fn new(
        rail: RailId,
        domain: &Arc<Domain>,
        count: u32,
        context_base: u32,
        key: u64,
        numbered: bool,
    ) -> Result<Self> {
        Ok(Self {
            rail,
            numbered,
            buffer: RegisteredBuffer::new(domain, count as usize * MESSAGE_BYTES_MAX, key)?,
            context_base,
            free: (0..count).rev().collect(),
            in_flight: vec![Slot::Free; count as usize],
            active: Slab::new(),
            queues: HashMap::new(),
            sent: HashMap::new(),
            turns: VecDeque::new(),
            scratch: Vec::with_capacity(MESSAGE_BYTES_MAX),
        })
    }

    pub fn registered(&self) -> &RegisteredBuffer {
        &self.buffer
    }

    /// Buffers that the provider has.
    pub fn in_flight(&self) -> u32 {
        (self.in_flight.len() - self.free.len()) as u32
    }

    /// How often messages use destinations: each its own, and fragments in flight of those that were given up.
    pub fn users_of_destinations(&self) -> usize {
        let abandoned = self.in_flight.iter().filter(|slot| matches!(slot, Slot::Abandoned(_))).count();
        self.active.len() + abandoned
    }

    /// Panics where two counts of one thing differ.
    pub fn check_counts(&self) {
        let free = self.in_flight.iter().filter(|slot| matches!(slot, Slot::Free)).count();
        assert_eq!(free, self.free.len(), "buffers with nothing in flight; free buffers");
        let of_messages = self.in_flight.iter().filter(|slot| matches!(slot, Slot::Of(_))).count();
        let outstanding: u32 = self.active.iter().map(|(_, message)| message.outstanding).sum();
        assert_eq!(of_messages, outstanding as usize, "buffers of messages; fragments in flight");
        for (key, _) in &self.active {
            let message = &self.active[key];
            let holds = |queues: &HashMap<DestinationKey, VecDeque<usize>>| {
                queues.get(&message.destination).is_some_and(|queue| queue.contains(&key))
            };
            assert!(
                message.outstanding > 0 || holds(&self.queues) || holds(&self.sent),
                "message {key} rests"
            );
        }
        assert_eq!(self.turns.len(), self.queues.len(), "destinations with a turn; with a queue");
    }

    /// Whether something waits to be posted.
    pub fn has_unsent(&self) -> bool {
        !self.turns.is_empty()
    }

    /// Whether nothing is queued or in flight.
    pub fn is_empty(&self) -> bool {
        self.active.is_empty()
    }

    pub fn push(&mut self, destination: DestinationKey, message: Message) {
        let key = self.active.insert(Active {
            content: message.content,
            tag: message.tag,
            destination,
            outstanding: 0,
            begun: false,
            exhausted: false,
            error: None,
            put_off: None,
        });
        let queue = self.queues.entry(destination).or_insert_with(|| {
            // An empty queue has a turn, too, until that finds it so.
            self.turns.push_back(destination);
            VecDeque::new()
        });
        queue.push_back(key);
    }

    /// Posts as much as buffers and provider take. Returns the fragments posted and messages finished.
    pub fn post(
        &mut self,
        endpoint: &mut Endpoint,
        destinations: &mut Destinations,
        now: Instant,
        stall_timeout: Duration,
        events: &mut Vec<Event>,
    ) -> usize {
        let (before, mut posted) = (events.len(), 0);
        for _ in 0..self.turns.len() {
            let Some(destination) = self.turns.pop_front() else { break };
            match self.post_to(destination, endpoint, destinations, &mut posted, events) {
                Turn::Empty => {
                    self.queues.remove(&destination);
                }
                Turn::Blocked => {
                    self.turns.push_back(destination);
                    let entry = destinations.get(destination);
                    let in_flight = endpoint.in_flight_to(entry.addr);
                    if let Some(error) = entry.stalled(in_flight, now, stall_timeout) {
                        self.fail_front(destination, error, destinations, events);
                    }
                }
            }
        }
        posted + events.len() - before
    }

    fn post_to(
        &mut self,
        destination: DestinationKey,
        endpoint: &mut Endpoint,
        destinations: &mut Destinations,
        posted: &mut usize,
        events: &mut Vec<Event>,
    ) -> Turn {
        let addr = destinations.get(destination).addr;
        while let Some(&key) = self.queues.get(&destination).and_then(VecDeque::front) {
            // A destination may hold as many buffers as are left for all others, so that some always are.
            let held = endpoint.in_flight_to(addr).messages as usize;
            let (buffer, immediate) = match self.stage(key, held) {
                Ok(Some(fragment)) => fragment,
                Ok(None) => {
                    self.queues.get_mut(&destination).expect("it was just read").pop_front();
                    if self.numbered {
                        self.sent.entry(destination).or_default().push_back(key);
                    }
                    self.settle(key, destinations, events);
                    continue;
                }
                Err(Full) => return Turn::Blocked,
            };
            let outcome = endpoint.send(&SendArgs {
                buffer: &self.buffer,
                offset: buffer as usize * MESSAGE_BYTES_MAX,
                len: self.scratch.len(),
                imm: Some(immediate),
                dest: addr,
                context: self.context_base + buffer,
            });
            let message = &mut self.active[key];
            match outcome {
                Ok(Posted::Yes) => {
                    self.free.pop();
                    message.outstanding += 1;
                    message.begun = true;
                    self.in_flight[buffer as usize] = Slot::Of(key);
                    *posted += 1;
                }
                Ok(Posted::Again) => {
                    message.put_off = Some((self.scratch.clone(), immediate));
                    return Turn::Blocked;
                }
                Err(e) if !message.begun && e.may_be_of_device() => {
                    message.put_off = Some((self.scratch.clone(), immediate));
                    let message = self.active.remove(key);
                    self.queues.get_mut(&destination).expect("it was just read").pop_front();
                    let to = destinations.get(destination).name.clone();
                    destinations.release(destination);
                    let (message, rail, error) = (message.unsent(to), self.rail, e.into());
                    events.push(Event::MessageReturned { message, rail, error });
                }
                Err(e) => {
                    message.put_off = Some((self.scratch.clone(), immediate));
                    message.exhausted = true;
                    message.error = Some(e.into());
                }
            }
        }
        Turn::Empty
    }

    /// Puts the next fragment of a message into a free buffer, which stays free until the fragment is posted.
    fn stage(&mut self, key: usize, held: usize) -> std::result::Result<Option<(u32, u32)>, Full> {
        let message = &mut self.active[key];
        if message.exhausted {
            return Ok(None);
        }
        if held >= self.free.len() {
            return Err(Full);
        }
        let Some(&buffer) = self.free.last() else { return Err(Full) };
        let immediate = if let Some((bytes, immediate)) = message.put_off.take() {
            self.scratch = bytes;
            immediate
        } else {
            self.scratch.clear();
            let Some(immediate) = message.content.next_fragment(&mut self.scratch) else {
                message.exhausted = true;
                return Ok(None);
            };
            immediate
        };
        debug_assert!(self.scratch.len() <= MESSAGE_BYTES_MAX);
        self.buffer.copy_in(buffer as usize * MESSAGE_BYTES_MAX, &self.scratch);
        Ok(Some((buffer, immediate)))
    }

    /// A fragment's completion.
    pub fn complete(
        &mut self,
        context: u32,
        error: Option<Error>,
        destinations: &mut Destinations,
        now: Instant,
        events: &mut Vec<Event>,
    ) {
        let buffer = context - self.context_base;
        let slot = std::mem::replace(&mut self.in_flight[buffer as usize], Slot::Free);
        let key = match slot {
            Slot::Of(key) => key,
            Slot::Abandoned(destination) => {
                self.free.push(buffer);
                destinations.release(destination);
                return;
            }
            Slot::Free => {
                log::warn!("a send completed twice; the second completion was ignored");
                return;
            }
        };
        self.free.push(buffer);
        let message = &mut self.active[key];
        let entry = destinations.get(message.destination);
        message.outstanding -= 1;
        entry.completed(error.as_ref(), now);
        if let Some(error) = error {
            if self.numbered {
                entry.deaf.get_or_insert_with(|| deafened(&error));
                let destination = message.destination;
                message.error.get_or_insert(error);
                self.abandon(destination, destinations, events);
                return;
            }
            message.error.get_or_insert(error);
            message.put_off = None;
            message.exhausted = true;
        }
        if !self.is_queued(key) {
            self.settle(key, destinations, events);
        }
    }

    /// Ends all messages to a destination that no message reaches any more. What is in flight may complete or not.
    fn abandon(
        &mut self,
        destination: DestinationKey,
        destinations: &mut Destinations,
        events: &mut Vec<Event>,
    ) {
        let unsent = self.queues.remove(&destination).unwrap_or_default();
        let sent = self.sent.remove(&destination).unwrap_or_default();
        self.turns.retain(|&turn| turn != destination);
        let entry = destinations.get(destination);
        let (name, Some(deaf)) = (entry.name.clone(), entry.deaf.clone()) else { return };
        let given_up: Vec<usize> = sent.into_iter().chain(unsent).collect();
        for slot in &mut self.in_flight {
            if matches!(*slot, Slot::Of(key) if given_up.contains(&key)) {
                *slot = Slot::Abandoned(destination);
                destinations.get(destination).users += 1;
            }
        }
        for key in given_up {
            let mut message = self.active.remove(key);
            destinations.release(destination);
            let error = message.error.take().unwrap_or_else(|| deaf.clone());
            events.push(message.lost(self.rail, name.clone(), error));
        }
    }

    fn is_queued(&self, key: usize) -> bool {
        self.queues
            .get(&self.active[key].destination)
            .and_then(VecDeque::front)
            .is_some_and(|&front| front == key)
    }

    /// Ends a message of which nothing is left to send, once nothing of it is in flight, nor, where messages are numbered,
    /// of those before it.
    fn settle(&mut self, key: usize, destinations: &mut Destinations, events: &mut Vec<Event>) {
        let is_over = |message: &Active| message.exhausted && message.outstanding == 0;
        if !is_over(&self.active[key]) {
            return;
        }
        if !self.numbered {
            return self.end(key, destinations, events);
        }
        let destination = self.active[key].destination;
        while let Some(sent) = self.sent.get_mut(&destination) {
            match sent.front() {
                Some(&first) if is_over(&self.active[first]) => {
                    sent.pop_front();
                    self.end(first, destinations, events);
                }
                Some(_) => return,
                None => {
                    self.sent.remove(&destination);
                }
            }
        }
    }

    fn end(&mut self, key: usize, destinations: &mut Destinations, events: &mut Vec<Event>) {
        let mut message = self.active.remove(key);
        events.push(match message.error.take() {
            None => {
                destinations.release(message.destination);
                message.over(Ok(()))
            }
            Some(error) => {
                let to = destinations.get(message.destination).name.clone();
                destinations.release(message.destination);
                message.lost(self.rail, to, error)
            }
        });
    }

    /// The rail has failed: gives messages back of which nothing has left, and those that may come twice. Others end with
    /// this error, because nobody knows whether they arrived.
    pub fn hand_back(&mut self, error: &Error, destinations: &mut Destinations, events: &mut Vec<Event>) {
        self.turns.clear();
        self.queues.clear();
        self.sent.clear();
        for slot in &mut self.in_flight {
            if let Slot::Of(key) = *slot {
                let destination = self.active[key].destination;
                destinations.get(destination).users += 1;
                *slot = Slot::Abandoned(destination);
            }
        }
        for mut message in self.active.drain() {
            let to = destinations.get(message.destination).name.clone();
            destinations.release(message.destination);
            events.push(if message.begin_anew() {
                let (message, rail, error) = (message.unsent(to), self.rail, error.clone());
                Event::MessageReturned { message, rail, error }
            } else {
                message.over(Err(error.clone()))
            });
        }
    }

    /// Ends every message; nothing more will be heard of what is in flight.
    pub fn fail_all(&mut self, error: &Error, events: &mut Vec<Event>) {
        self.turns.clear();
        self.queues.clear();
        self.sent.clear();
        self.in_flight.fill(Slot::Free);
        events.extend(self.active.drain().map(|message| message.over(Err(error.clone()))));
    }

    /// Nothing is in flight to a destination, and it takes nothing.
    fn fail_front(
        &mut self,
        destination: DestinationKey,
        error: Error,
        destinations: &mut Destinations,
        events: &mut Vec<Event>,
    ) {
        let Some(key) = self.queues.get_mut(&destination).and_then(VecDeque::pop_front) else { return };
        destinations.release(destination);
        events.push(self.active.remove(key).over(Err(error)));
    }
}

/// Why a destination hears no more.
fn deafened(error: &Error) -> Error {
    Error::disconnected(format!(
        "a message to an endpoint of it was lost, and the efa provider delivers none that come after it from this rail there. \
         With no other way left, restart that agent or this one (the fabric efa-direct has no such limit). The message was \
         lost to: {error}"
    ))
}

struct Full;
