//! Peers: how they are reached, what was agreed with them, and what waits until it is.
//!
//! A peer decides nothing about transfers: it hands back which of them may begin and which have failed ([`Released`]), and
//! whoever called acts on that.
#![forbid(unsafe_code)]

mod avoided;
mod former;
mod introduction;
mod link;
mod outbox;
mod table;
mod tally;
mod wires;

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use self::avoided::{Avoided, REST};
use self::former::Agreement;
pub use self::introduction::Introduction;
use self::link::Link;
use self::outbox::{Outbox, Pending, Waiting};
pub use self::table::PeerTable;
pub use self::tally::Tally;
pub use self::wires::Outgoing;
use crate::error::{Error, Result, Status};
use crate::fabric::efa::NETWORK_HELP;
use crate::neighbour::{Board, Neighbour};
use crate::notify::{Limits, Receiver, StockIds};
use crate::rail::{Destination, Rail, Tag};
use crate::types::{AgentName, PeerId, RailId};
use crate::wire::immediate::STOCK_PEERS_MAX;
use crate::wire::{Body, ConnectionInfo, Extension, Handshake, HandshakeExtension, Immediate};

/// A hello without an answer is said again after this long.
const HELLO_AGAIN: Duration = Duration::from_secs(1);

/// What all peers of an engine share.
pub struct Local {
    /// Our name.
    pub name: AgentName,
    /// Our connection info.
    pub conn_info: Vec<u8>,
    /// Where agents of this host look to reach our memory; `None` where they may not, and we do not reach theirs.
    pub board: Option<Arc<Board>>,
    /// Our rails; peers send control messages to the first, and ours to another when that has failed.
    pub rails: Vec<Arc<Rail>>,
    /// Sessions given out; only grows, also over restarts.
    pub sessions: AtomicU64,
    /// Deadline for a peer that does not answer.
    pub connect_timeout: Duration,
    /// Largest notification that we send or take, in bytes.
    pub notif_bytes_max: u64,
    /// Bytes of notifications waiting for one peer.
    pub pending_bytes_max: u64,
    /// Messages of some peer go another way than over the [control rail](Self::control_rail).
    pub has_diverted: AtomicBool,
    /// A device takes RDMA only from endpoints that it was told of.
    pub introduces: bool,
    /// How often a peer did not answer in time.
    pub unanswered: AtomicU64,
}

impl Local {
    /// The rail that carries control messages: the first that works.
    pub fn control_rail(&self) -> &Arc<Rail> {
        self.rails.iter().find(|rail| rail.failure().is_none()).unwrap_or(&self.rails[0])
    }

    /// The rails over which messages go.
    pub fn message_rails(&self) -> &[Arc<Rail>] {
        if self.has_diverted.load(Ordering::Relaxed) {
            return &self.rails;
        }
        std::slice::from_ref(self.control_rail())
    }

    /// Whether a message was left with one of them.
    pub fn has_mail(&self) -> bool {
        self.message_rails().iter().any(|rail| rail.has_mail())
    }

    /// The endpoints that peers should not use any more.
    fn retired(&self) -> [u64; 2] {
        let mut words = [0; 2];
        for rail in self.rails.iter().filter(|rail| rail.failure().is_some()) {
            if let Some(word) = words.get_mut(rail.id().index() / 64) {
                *word |= 1 << (rail.id().index() % 64);
            }
        }
        words
    }

    fn receive_limits(&self) -> Limits {
        Limits { notif_bytes_max: self.notif_bytes_max, pending_bytes_max: self.pending_bytes_max }
    }
}

/// A remote agent, from one loading of its connection info to its removal.
pub struct Peer {
    name: AgentName,
    id: PeerId,
    index: u16,
    local: Arc<Local>,
    info: ConnectionInfo,
    endpoints: Vec<Destination>,
    loaded: AtomicBool,
    state: Mutex<State>,
    /// The peer's session as the link knows it: read for every message, without the lock.
    session_now: AtomicU64,
    receiver: Mutex<Receiver>,
    pending: Pending,
    /// Its endpoints that have failed.
    retired: [AtomicU64; 2],
    /// How often the way of its control messages has changed; see [`way`](Self::way).
    diversions: AtomicU16,
    avoided: Avoided,
    /// Hellos that have not left: another one would only stand behind them.
    hellos_unsent: AtomicU32,
    /// How its memory is reached without a network, once that was tried.
    neighbour: OnceLock<Option<Arc<Neighbour>>>,
    tally: Tally,
}

struct State {
    link: Link,
    outbox: Outbox,
    hello_at: Option<Instant>,
    /// Outlives the peer: one that is met again goes on with it, while messages of before may still fail.
    stock_ids: Arc<Mutex<StockIds>>,
    /// Notifications sent in this session.
    messages: u64,
    /// Why the peer cannot be used any more.
    gone: Option<Error>,
    /// The last control message that could not be sent.
    suspect: Option<Error>,
}

impl State {
    /// Why no message should be sent.
    fn trouble(&self) -> Option<Error> {
        self.gone.as_ref().or(self.suspect.as_ref()).cloned()
    }

    fn lock_stock_ids(&self) -> MutexGuard<'_, StockIds> {
        self.stock_ids.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What no longer waits for a peer: transfers, by the tags that they came with.
#[derive(Default)]
#[must_use]
pub struct Released {
    /// These may begin.
    pub begin: Vec<Tag>,
    /// These failed.
    pub failed: Vec<(Tag, Error)>,
    /// GPU memory of this one is unmapped: the peer was removed.
    pub unmapped: Option<Arc<Neighbour>>,
}

impl Peer {
    /// `former` is what was agreed with the same run of the agent before it was removed here.
    fn new(
        name: AgentName,
        index: u16,
        info: ConnectionInfo,
        loaded: bool,
        former: Option<Agreement>,
        local: &Arc<Local>,
    ) -> Self {
        let session = local.sessions.fetch_add(1, Ordering::Relaxed);
        let (link, stock_ids) = match former {
            Some(Agreement { theirs: Some(theirs), ids, .. }) => (Link::resumed(session, theirs), ids),
            Some(Agreement { ids, .. }) => (Link::new(session), ids),
            None => (Link::new(session), Arc::new(Mutex::new(StockIds::starting_at(0)))),
        };
        let endpoints = info.endpoints.iter().map(|e| Destination(e.as_bytes().into())).collect();
        Self {
            receiver: Mutex::new(Receiver::new(name.clone(), local.receive_limits())),
            name,
            id: PeerId(session),
            index,
            endpoints,
            info,
            loaded: AtomicBool::new(loaded),
            state: Mutex::new(State {
                link,
                outbox: Outbox::default(),
                hello_at: None,
                stock_ids,
                messages: 0,
                gone: None,
                suspect: None,
            }),
            session_now: AtomicU64::new(0),
            pending: Pending::new(local.pending_bytes_max),
            retired: Default::default(),
            diversions: AtomicU16::new(0),
            avoided: Avoided::default(),
            hellos_unsent: AtomicU32::new(0),
            neighbour: OnceLock::new(),
            tally: Tally::default(),
            local: Arc::clone(local),
        }
    }

    /// Its agent name.
    pub fn name(&self) -> &AgentName {
        &self.name
    }

    /// Tells it from every other peer of this engine, of the same name too.
    pub fn id(&self) -> PeerId {
        self.id
    }

    /// Its endpoints, one for each of its rails.
    pub fn endpoint_count(&self) -> usize {
        self.endpoints.len()
    }

    /// One of its endpoints.
    pub fn destination(&self, endpoint: u16) -> Destination {
        self.endpoints[endpoint as usize].clone()
    }

    /// Whether it said that one of its endpoints has failed.
    pub fn has_retired(&self, endpoint: u16) -> bool {
        let word = self.retired.get(endpoint as usize / 64);
        word.is_some_and(|word| word.load(Ordering::Relaxed) >> (endpoint % 64) & 1 == 1)
    }

    /// A rail here did not reach one of its endpoints, and others reached it.
    pub fn avoid(&self, rail: RailId, endpoint: u16, device: &str, why: &Error) {
        if self.avoided.add(rail, endpoint, Instant::now()) {
            log::warn!(
                "rail {rail} on {device} does not reach endpoint {endpoint} of {}, while others reach it: {why}. It is left \
                 out for {} s, then tried again. Look at the links of both devices",
                self.name,
                REST.as_secs()
            );
        }
    }

    /// Whether a rail is to be left out for one of its endpoints.
    pub fn avoids(&self, rail: RailId, endpoint: u16) -> bool {
        self.avoided.holds(rail, endpoint)
    }

    /// The way of its control messages: a rail that works, and an endpoint that it has not retired. At first the first of
    /// both; of an agent of ours, which receives at each of its endpoints, the next of both after each diversion.
    fn way(&self) -> (&Arc<Rail>, u16) {
        let (rails, endpoints) = (&self.local.rails, self.endpoints.len());
        let diversions = self.diversions.load(Ordering::Relaxed) as usize;
        let turned = |count: usize| (0..count).map(move |i| (diversions + i) % count);
        let rail = turned(rails.len()).find(|&i| rails[i].failure().is_none()).unwrap_or(0);
        let endpoint = turned(endpoints).find(|&i| self.extension().is_none() || !self.has_retired(i as u16));
        (&rails[rail], endpoint.unwrap_or(0) as u16)
    }

    /// A message was lost on its way. Gives another, if there is one, and if it was not sent again before: a way that leads
    /// nowhere costs as long as a NIC tries. Whether rail or endpoint is to blame is not known, so both change.
    pub fn divert(
        &self,
        outgoing: &Outgoing,
        rail: RailId,
        to: &Destination,
        why: &Error,
    ) -> Option<(&Arc<Rail>, Destination)> {
        if self.extension().is_none() || outgoing.is_diverted() || self.check().is_err() {
            return None;
        }
        let is_same = |(other, endpoint): (&Arc<Rail>, u16)| {
            other.id() == rail && self.endpoints[endpoint as usize] == *to
        };
        // A rail that takes no messages has passed it on: what tells is the endpoint, where there are several.
        let (first, endpoint) = self.way();
        let is_way = self.endpoints[endpoint as usize] == *to;
        if is_way && (self.endpoints.len() > 1 || first.id() == rail) {
            self.local.has_diverted.store(true, Ordering::Relaxed);
            self.diversions.fetch_add(1, Ordering::Relaxed);
            let (other, endpoint) = self.way();
            if !is_same((other, endpoint)) {
                log::warn!(
                    "messages to {} go over rail {} to its endpoint {endpoint}: over rail {rail} one was lost: {why}",
                    self.name,
                    other.id()
                );
            }
        }
        let way = self.way();
        (!is_same(way)).then(|| (way.0, self.destination(way.1)))
    }

    /// One of our rails has failed: says so, if the peer was greeted at all.
    pub fn tell_failure(self: &Arc<Self>) {
        let mut state = self.lock();
        if state.gone.is_none()
            && state.hello_at.is_some()
            && let Err(e) = self.say_hello(&mut state)
        {
            log::warn!("{} cannot be told of a rail that has failed: {e}", self.name);
        }
    }

    /// What to remember when the peer is removed; nothing of one that speaks our wire, which answers every hello.
    fn agreement(&self) -> Option<Agreement> {
        if self.extension().is_some() {
            return None;
        }
        let state = self.lock();
        Some(Agreement {
            control_endpoint: self.info.endpoints[0].clone(),
            theirs: state.link.theirs().map(|theirs| theirs.index),
            ids: Arc::clone(&state.stock_ids),
        })
    }

    /// Whether its VRAM is reached through its host memory.
    pub fn stages_vram(&self) -> bool {
        self.extension().is_some_and(Extension::stages_vram)
    }

    /// How its memory is reached without a network, if it is on this host and that works: it is tried the first time.
    pub fn neighbour(&self) -> Option<&Arc<Neighbour>> {
        self.neighbour.get_or_init(|| self.meet()).as_ref().filter(|neighbour| !neighbour.is_lost())
    }

    /// Whether it was tried and works.
    pub fn is_neighbour(&self) -> bool {
        self.neighbour.get().is_some_and(|tried| tried.as_ref().is_some_and(|neighbour| !neighbour.is_lost()))
    }

    fn meet(&self) -> Option<Arc<Neighbour>> {
        let (own, info) = (self.local.board.as_ref()?, self.info.host.as_ref()?);
        match Neighbour::meet(own.info(), info) {
            Ok(neighbour) => {
                log::info!(
                    "{} is on this host: its host memory is reached directly ({neighbour:?})",
                    self.name
                );
                Some(Arc::new(neighbour))
            }
            Err(why) => {
                log::debug!("{} is reached by the NICs: {why}", self.name);
                None
            }
        }
    }

    /// Whether copies that staging asks it for may have many ranges and take several slots.
    pub fn stages_ranges(&self) -> bool {
        self.extension().is_some_and(Extension::stages_ranges)
    }

    /// Its number for the connection, 0 until it has told. Another one says that it has forgotten what belonged to the last.
    pub fn session(&self) -> u64 {
        self.session_now.load(Ordering::Acquire)
    }

    /// Whether the handshake is over.
    pub fn is_ready(&self) -> bool {
        self.lock().link.ready().is_some()
    }

    /// Bytes of notifications that have not left, with what each costs.
    pub fn pending_bytes(&self) -> u64 {
        self.pending.bytes()
    }

    /// Transfers with it that are over.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Fails if the peer was removed.
    pub fn check(&self) -> Result<()> {
        self.lock().gone.clone().map_or(Ok(()), Err)
    }

    /// Fails if the peer was removed, or if a message to it could not be sent since it was last greeted.
    pub fn check_reach(&self) -> Result<()> {
        self.lock().trouble().map_or(Ok(()), Err)
    }

    /// Says hello, unless that was done and nothing has failed since.
    pub fn connect(self: &Arc<Self>) -> Result<()> {
        let mut state = self.lock();
        if let Some(gone) = &state.gone {
            return Err(gone.clone());
        }
        if state.hello_at.is_none() || state.suspect.is_some() {
            self.say_hello(&mut state)?;
        }
        Ok(())
    }

    /// Whether a transfer may begin now; else it waits, and comes back when the peer is ready or has failed.
    pub fn admits(self: &Arc<Self>, transfer: &Tag) -> Result<bool> {
        let mut state = self.lock();
        if let Some(gone) = &state.gone {
            return Err(gone.clone());
        }
        if !self.local.introduces || state.link.ready().is_some() {
            return Ok(true);
        }
        if state.hello_at.is_none() {
            self.say_hello(&mut state)?;
        }
        state.outbox.push(Waiting::Transfer(Arc::clone(transfer)));
        Ok(false)
    }

    /// Takes room for the notification that a transfer will send when its data has arrived.
    pub fn reserve(&self, len: usize) -> Result<()> {
        self.check_length(len)?;
        self.pending.reserve(len, &self.name)
    }

    /// Gives back the room of a notification that will not be sent.
    pub fn unreserve(&self, len: usize) {
        self.pending.release(len);
    }

    /// Queues a notification that stands alone.
    pub fn notify(self: &Arc<Self>, message: Vec<u8>) -> Result<Released> {
        let suspect = self.lock().suspect.clone();
        if let Some(error) = suspect {
            // Say so at once, and try whether the peer is back: the next call will know.
            self.connect()?;
            return Err(error);
        }
        self.reserve(message.len())?;
        let len = message.len();
        self.accept(Waiting::Message { message, of: None }).inspect_err(|_| self.unreserve(len))
    }

    /// Queues the notification of a transfer whose data has arrived; there is [room](Self::reserve) for it.
    pub fn notify_after(self: &Arc<Self>, transfer: &Tag, message: Vec<u8>) -> Result<Released> {
        let len = message.len();
        self.accept(Waiting::Message { message, of: Some(Arc::clone(transfer)) })
            .inspect_err(|_| self.unreserve(len))
    }

    fn accept(self: &Arc<Self>, waiting: Waiting) -> Result<Released> {
        let mut state = self.lock();
        if let Some(gone) = &state.gone {
            return Err(gone.clone());
        }
        if state.hello_at.is_none() {
            self.say_hello(&mut state)?;
        }
        state.outbox.push(waiting);
        Ok(self.flush(&mut state))
    }

    /// Sends what waits, if the peer is ready.
    fn flush(self: &Arc<Self>, state: &mut State) -> Released {
        let mut released = Released::default();
        let Some(theirs) = state.link.ready() else { return released };
        for waiting in state.outbox.take() {
            match waiting {
                Waiting::Transfer(transfer) => released.begin.push(transfer),
                Waiting::Message { message, of } => {
                    let len = message.len();
                    if let Err(e) = self.send_notification(state, theirs, message, of.clone()) {
                        self.pending.release(len);
                        log::warn!("a notification of {len} bytes could not be sent to {}: {e}", self.name);
                        released.failed.extend(of.map(|of| (of, e)));
                    }
                }
            }
        }
        released
    }

    /// Sends a control message, unless the handshake is not over: then `false`. It may be lost, but comes at most once.
    pub fn say(self: &Arc<Self>, body: Body<'_>) -> Result<bool> {
        let state = self.lock();
        if let Some(error) = state.trouble() {
            return Err(error);
        }
        let ready = state.link.ready().is_some();
        if ready {
            self.send_body(&state, body);
        }
        Ok(ready)
    }

    fn say_hello(self: &Arc<Self>, state: &mut State) -> Result<()> {
        let message = Handshake {
            index: self.index,
            name: self.local.name.as_bytes().to_vec(),
            conn: state.link.wants_conn().then(|| self.local.conn_info.clone()),
            extension: Some(HandshakeExtension { retired: self.local.retired(), ..state.link.extension() }),
        }
        .encode()?;
        state.hello_at = Some(Instant::now());
        state.suspect = None;
        self.hellos_unsent.fetch_add(1, Ordering::Relaxed);
        let hello = self.single(message, Immediate::StockHandshake { index: 0 });
        if self.local.introduces {
            Introduction::begin(self, hello, &self.local.rails);
        } else {
            self.hand_over(hello.0, hello.1);
        }
        Ok(())
    }

    /// Takes in a handshake of the peer.
    pub fn on_hello(self: &Arc<Self>, hello: &Handshake) -> Result<Released> {
        if self.extension().is_some() && hello.extension.is_none() {
            return Err(Error::invalid(format!(
                "a handshake of the stock wire in the name of {}, which speaks ours",
                self.name
            )));
        }
        if hello.extension.is_none() && hello.index >= STOCK_PEERS_MAX {
            return Err(Error::invalid(format!(
                "{} gives us the index {}, which its wire has no room for",
                self.name, hello.index
            )));
        }
        for (word, said) in self.retired.iter().zip(hello.extension.unwrap_or_default().retired) {
            if said & !word.fetch_or(said, Ordering::Relaxed) != 0 {
                log::warn!("devices of {} have failed; nothing more goes to those endpoints", self.name);
            }
        }
        let mut state = self.lock();
        let reaction = state.link.on_hello(hello);
        self.session_now.store(state.link.theirs().map_or(0, |theirs| theirs.session), Ordering::Release);
        if reaction.receive_anew {
            *self.lock_receiver() = Receiver::new(self.name.clone(), self.local.receive_limits());
        }
        if reaction.answer
            && let Err(e) = self.say_hello(&mut state)
        {
            log::error!("the handshake with {} cannot be answered: {e}", self.name);
        }
        state.suspect = None;
        state.outbox.progress();
        Ok(self.flush(&mut state))
    }

    /// Gives what arrived from the peer to its receiver; returns the notification that it completes.
    pub fn receive<T>(&self, take: impl FnOnce(&mut Receiver) -> T) -> T {
        take(&mut self.lock_receiver())
    }

    /// A control message has left, or could not be sent.
    pub fn on_sent(&self, outgoing: &Outgoing, result: &Result<()>) -> Released {
        outgoing.over(result);
        let Err(error) = result else { return Released::default() };
        if error.status() != Status::RemoteDisconnect && outgoing.of().is_some() {
            return Released::default();
        }
        let mut state = self.lock();
        if state.suspect.is_none() && state.gone.is_none() {
            log::warn!("{} cannot be reached: {error}", self.name);
            state.suspect = Some(error.clone().context(format_args!("peer {}", self.name)));
        }
        if state.link.ready().is_some() {
            return Released::default();
        }
        self.fail_waiting(
            &mut state,
            &error.clone().context(format_args!("peer {} cannot be reached", self.name)),
        )
    }

    /// Looks at the peer's deadlines. Says whether anything waits for it.
    pub fn tick(self: &Arc<Self>, now: Instant) -> (bool, Released) {
        let mut state = self.lock();
        let Some(since) = state.outbox.stuck_since() else { return (false, Released::default()) };
        if now.duration_since(since) > self.local.connect_timeout {
            let error = self.no_answer();
            self.local.unanswered.fetch_add(1, Ordering::Relaxed);
            state.suspect = Some(error.clone());
            return (false, self.fail_waiting(&mut state, &error));
        }
        let said = state.hello_at.is_some_and(|at| now.duration_since(at) > HELLO_AGAIN);
        if said
            && state.link.ready().is_none()
            && self.hellos_unsent.load(Ordering::Relaxed) == 0
            && let Err(e) = self.say_hello(&mut state)
        {
            log::warn!("no hello to {}: {e}", self.name);
        }
        (true, Released::default())
    }

    /// What is said of a peer that does not answer the handshake in time.
    pub fn no_answer(&self) -> Error {
        // Nothing in the connection info tells NIXL 1.0 to 1.3 from later ones. They drop our hello.
        let older = if self.extension().is_none() {
            "It runs NIXL's C++ plugin. If that is of NIXL 1.0 to 1.3, whose wire is another (no handshake): upgrade it to \
             1.4 or later, or to this plugin. If it knows an earlier run of this agent by its name: remove that there. "
        } else {
            ""
        };
        Error::disconnected(format!(
            "{} did not answer our handshake within {} ms (connect_timeout_ms). {older}Is it alive, does its progress \
             thread run or its application call NIXL, and do packets reach it? {NETWORK_HELP}",
            self.name,
            self.local.connect_timeout.as_millis()
        ))
    }

    /// The peer is removed: nothing more is sent, and what waits fails.
    fn close(&self, why: &Error) -> Released {
        let mut state = self.lock();
        state.gone = Some(why.clone());
        let unmapped = self.neighbour.get().cloned().flatten();
        Released { unmapped, ..self.fail_waiting(&mut state, why) }
    }

    /// Lets go of GPU memory that the peer has deregistered, or that outlives its process.
    pub fn sweep(&self) {
        if let Some(Some(neighbour)) = self.neighbour.get() {
            neighbour.sweep();
        }
    }

    /// Fails what waits.
    fn fail_waiting(&self, state: &mut State, error: &Error) -> Released {
        let mut released = Released::default();
        for waiting in state.outbox.take() {
            match waiting {
                Waiting::Transfer(transfer) => released.failed.push((transfer, error.clone())),
                Waiting::Message { message, of } => {
                    self.pending.release(message.len());
                    match of {
                        Some(transfer) => released.failed.push((transfer, error.clone())),
                        None => log::warn!("a notification of {} bytes was not sent: {error}", message.len()),
                    }
                }
            }
        }
        released
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_receiver(&self) -> MutexGuard<'_, Receiver> {
        self.receiver.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
