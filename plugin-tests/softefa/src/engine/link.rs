//! What this process has with one other process: a channel each way, and its own operations in flight to it.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::source::Flight;
use crate::bounce::{self, Bounce, Pool, Refused};
use crate::shm::Mapping;
use crate::shm::channel::{self, Channel, Message, SLOTS_MAX, Span, kind};
use crate::shm::mailbox::{self, Mailbox};
use crate::shm::process::ProcessId;

/// How long to wait for a peer that is reading the memory of an operation which ends here. Reading takes
/// microseconds; only a peer stopped in between takes longer.
const RETIRE_WAIT: Duration = Duration::from_millis(500);

/// One other process.
pub struct Link {
    /// That process.
    pub peer: ProcessId,
    mailbox: Mapping<Mailbox>,
    /// To the peer.
    pub out: Arc<Mapping<Channel>>,
    /// From the peer, once it has registered here.
    pub incoming: Option<Arc<Mapping<Channel>>>,
    /// By slot, with the slot's generation.
    flights: Vec<Option<(u32, Box<Flight>)>>,
    free: Vec<u32>,
    /// Operations that wait for a slot or for room in the channel.
    pub stalled: VecDeque<Box<Flight>>,
    /// Replies that wait for room.
    backlog: VecDeque<Message>,
    /// Copies of GPU memory for the peer to fetch.
    bounces: Pool,
    /// Those of them that reads were granted from, by a number that is never 0.
    grants: BTreeMap<u64, Bounce>,
    last_grant: u64,
    dirty: bool,
}

impl Link {
    /// Opens the way to a peer and registers there.
    pub fn open(dir: &Path, me: ProcessId, peer: ProcessId) -> io::Result<Self> {
        let mailbox = mailbox::open(dir, peer)?;
        let out = Arc::new(channel::create(dir, me, peer)?);
        if !mailbox.register(me) {
            return Err(io::Error::other("the peer has all the senders that it can have"));
        }
        Ok(Self {
            peer,
            mailbox,
            out,
            incoming: None,
            flights: std::iter::repeat_with(|| None).take(SLOTS_MAX as usize).collect(),
            free: (0..SLOTS_MAX).rev().collect(),
            stalled: VecDeque::new(),
            backlog: VecDeque::new(),
            bounces: Pool::default(),
            grants: BTreeMap::new(),
            last_grant: 0,
            dirty: false,
        })
    }

    /// Sends an operation; gives it back when there is no room, or, with the reason, when its GPU memory cannot be read.
    pub fn launch(&mut self, mut flight: Box<Flight>) -> Result<(), (Box<Flight>, Option<io::Error>)> {
        if !self.out.has_room() || !self.backlog.is_empty() || self.free.is_empty() {
            return Err((flight, None));
        }
        if flight.is_source() && bounce::is_needed(&flight.spans) {
            match self.bounces.copy(&flight.spans) {
                Ok(bounce) => flight.bounce = Some(bounce),
                Err(Refused::Full) => return Err((flight, None)),
                Err(Refused::Failed(error)) => return Err((flight, Some(error))),
            }
        }
        let Some(slot) = self.free.pop() else { return Err((flight, None)) };
        let generation = self.out.post(slot);
        let message = flight.message(slot, generation);
        // Room was seen above, and this process is the only producer.
        self.out.send(&message);
        self.flights[slot as usize] = Some((generation, flight));
        self.dirty = true;
        Ok(())
    }

    /// Sends a reply, now or when there is room.
    pub fn reply(&mut self, message: Message) {
        if !self.backlog.is_empty() || !self.out.send(&message) {
            self.backlog.push_back(message);
        }
        self.dirty = true;
    }

    /// Copies GPU memory that the peer may read. Returns the number of the grant and where the copy is.
    pub fn grant(&mut self, from: Span) -> Result<(u64, Span), Refused> {
        let bounce = self.bounces.copy(&[from])?;
        let span = bounce.span();
        self.last_grant += 1;
        self.grants.insert(self.last_grant, bounce);
        Ok((self.last_grant, span))
    }

    /// The peer has fetched what it was granted.
    pub fn end_grant(&mut self, grant: u64) {
        self.grants.remove(&grant);
    }

    /// Tells the peer that its grant is of no more use; 0 is none.
    pub fn fetched(&mut self, grant: u64) {
        if grant != 0 {
            self.reply(Message { kind: kind::FETCHED, serial: grant, ..Message::default() });
        }
    }

    /// The operation that a reply is about, which leaves its slot. `None` for an answer to something given up.
    pub fn land(&mut self, reply: &Message) -> Option<Box<Flight>> {
        let place = self.flights.get_mut(reply.slot as usize)?;
        let (_, flight) = place.take_if(|(generation, _)| *generation == reply.generation)?;
        self.close(reply.slot);
        Some(flight)
    }

    /// Sends what waited, and rings the peer's bell if anything was sent.
    pub fn flush(&mut self) {
        while let Some(message) = self.backlog.front() {
            if !self.out.send(message) {
                break;
            }
            self.backlog.pop_front();
        }
        if std::mem::take(&mut self.dirty) {
            self.mailbox.ring();
        }
    }

    /// Whether anything waits for room.
    pub fn waits(&self) -> bool {
        !self.stalled.is_empty() || !self.backlog.is_empty()
    }

    #[expect(clippy::vec_box, reason = "an operation carries inline bytes whose address its target has")]
    /// Ends the operations that `which` picks; the peer no longer reads their memory when this returns.
    pub fn drop_flights(&mut self, which: impl Fn(&Flight) -> bool) -> Vec<Box<Flight>> {
        let mut dropped = Vec::new();
        for slot in 0..self.flights.len() {
            if let Some((_, flight)) = self.flights[slot].take_if(|(_, flight)| which(flight)) {
                dropped.push(flight);
                self.close(slot as u32);
            }
        }
        let (out, kept) =
            std::mem::take(&mut self.stalled).into_iter().partition::<VecDeque<_>, _>(|flight| which(flight));
        self.stalled = kept;
        dropped.extend(out);
        dropped
    }

    fn close(&mut self, slot: u32) {
        let start = Instant::now();
        while !self.out.retire(slot) {
            if start.elapsed() > RETIRE_WAIT || !self.peer.alive() {
                self.out.seize(slot);
                break;
            }
            std::thread::yield_now();
        }
        self.free.push(slot);
    }
}
