//! Peers: how they are reached, what was agreed with them, and what waits until it is.
#![forbid(unsafe_code)]

mod former;
mod introduction;
mod link;
mod outgoing;
mod table;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use self::former::Agreement;
use self::introduction::Introduction;
use self::link::Link;
use self::outgoing::Outgoing;
pub use self::table::PeerTable;
use crate::error::{Error, Result};
use crate::fabric::efa::NETWORK_HELP;
use crate::notify::{Limits, Receiver, StockIds, WindowIds};
use crate::rail::{Destination, Message, Rail};
use crate::transfer::{Announced, Rates, Transfer};
use crate::types::AgentName;
use crate::wire::immediate::STOCK_PEERS_MAX;
use crate::wire::{
    Body, CONTROL_BYTES_MAX, ConnectionInfo, Extension, FragmentCursor, Handshake, Immediate,
    StockFragmentCursor, Subject,
};

/// Control messages waiting for one peer; beyond it new ones are refused.
const MESSAGES_PENDING_MAX: u64 = 65_536;
/// A hello without an answer is said again after this long.
const HELLO_AGAIN: Duration = Duration::from_secs(1);

/// What all peers of an engine share.
pub struct Local {
    /// Our name.
    pub name: AgentName,
    /// Our connection info.
    pub conn_info: Vec<u8>,
    /// Our rails; the first carries control messages.
    pub rails: Vec<Arc<Rail>>,
    /// Sessions given out; only grows, also over restarts.
    pub sessions: AtomicU64,
    /// Deadline for a peer that does not answer.
    pub connect_timeout: Duration,
    /// Largest notification that we send or take, in bytes.
    pub notif_bytes_max: u64,
    /// Bytes of notifications waiting for one peer.
    pub pending_bytes_max: u64,
    /// How fast transfers have been.
    pub rates: Rates,
    /// A device takes RDMA only from endpoints that it was told of.
    pub introduces: bool,
}

impl Local {
    fn session(&self) -> u64 {
        self.sessions.fetch_add(1, Ordering::Relaxed)
    }

    fn receive_limits(&self) -> Limits {
        Limits { notif_bytes_max: self.notif_bytes_max, pending_bytes_max: self.pending_bytes_max }
    }
}

/// A remote agent, from one loading of its connection info to its removal.
pub struct Peer {
    name: AgentName,
    index: u16,
    local: Arc<Local>,
    info: ConnectionInfo,
    endpoints: Vec<Destination>,
    loaded: AtomicBool,
    state: Mutex<State>,
    receiver: Mutex<Receiver>,
    /// Control messages and their bytes that have not left yet.
    pending_messages: AtomicU64,
    pending_bytes: AtomicU64,
}

struct State {
    link: Link,
    /// Transfers with notification and notifications that wait for the handshake or for the window.
    waiting: VecDeque<Waiting>,
    hello_at: Option<Instant>,
    waiting_since: Option<Instant>,
    /// Outlives the peer: one that is met again goes on with it, while transfers of before may still fail.
    stock_ids: Arc<Mutex<StockIds>>,
    window_ids: WindowIds,
    messages: u64,
    /// Why the peer cannot be used any more.
    gone: Option<Error>,
    /// The last control message that could not be sent.
    suspect: Option<Error>,
}

impl State {
    fn lock_stock_ids(&self) -> MutexGuard<'_, StockIds> {
        self.stock_ids.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Waiting {
    Transfer(Arc<Transfer>, Vec<u8>),
    /// One without a notification, to a peer that must know us first.
    Silent(Arc<Transfer>),
    Notification(Vec<u8>),
    After(Arc<Transfer>, Vec<u8>),
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
        let session = local.session();
        let (link, stock_ids) = match former {
            Some(Agreement { theirs: Some(theirs), ids, .. }) => (Link::resumed(session, theirs), ids),
            Some(Agreement { ids, .. }) => (Link::new(session), ids),
            None => (Link::new(session), Arc::new(Mutex::new(StockIds::starting_at(0)))),
        };
        let endpoints = info.endpoints.iter().map(|e| Destination(e.as_bytes().into())).collect();
        Self {
            receiver: Mutex::new(Receiver::new(name.clone(), local.receive_limits())),
            name,
            index,
            endpoints,
            info,
            loaded: AtomicBool::new(loaded),
            state: Mutex::new(State {
                link,
                waiting: VecDeque::new(),
                hello_at: None,
                waiting_since: None,
                stock_ids,
                window_ids: WindowIds::new(),
                messages: 0,
                gone: None,
                suspect: None,
            }),
            pending_messages: AtomicU64::new(0),
            pending_bytes: AtomicU64::new(0),
            local: Arc::clone(local),
        }
    }

    /// Its agent name.
    pub fn name(&self) -> &AgentName {
        &self.name
    }

    /// Its endpoints, one for each of its rails.
    pub fn endpoint_count(&self) -> usize {
        self.endpoints.len()
    }

    /// One of its endpoints.
    pub fn destination(&self, endpoint: u16) -> Destination {
        self.endpoints[endpoint as usize].clone()
    }

    /// What it said about itself, if it speaks our wire.
    fn extension(&self) -> Option<&Extension> {
        self.info.extension.as_ref().filter(|e| e.speaks_v2())
    }

    /// Largest control message of the version 2 wire, if the peer reads that.
    fn v2_bytes_max(&self, link: &Link) -> Option<u32> {
        // An index that the stock wire has no room for tells, too: its extension may be of a version we do not know.
        let wide = || link.theirs().filter(|t| t.session != 0 && t.index >= STOCK_PEERS_MAX);
        self.extension().map(|e| e.control_bytes_max).or_else(|| wide().map(|_| CONTROL_BYTES_MAX as u32))
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

    /// Sends a control message, unless the handshake is not over: then `false`. It may be lost, but comes at most once.
    pub fn say(self: &Arc<Self>, body: Body<'_>) -> Result<bool> {
        let state = self.lock();
        if let Some(error) = state.gone.as_ref().or(state.suspect.as_ref()) {
            return Err(error.clone());
        }
        let ready = state.link.ready().is_some();
        if ready && let Some((message, immediate)) = control(&state, body) {
            self.hand_over(Outgoing::single(self, message, immediate));
        }
        Ok(ready)
    }

    /// How fast transfers have been.
    pub fn rates(&self) -> &Rates {
        &self.local.rates
    }

    /// Fails if the peer was removed.
    pub fn check(&self) -> Result<()> {
        self.lock().gone.clone().map_or(Ok(()), Err)
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

    /// Starts a posted transfer, and ends the poster's part of it unless it fails. Its runs go to their rails at once, or, where the peer must count its writes,
    /// as soon as the peer has told under which number.
    pub fn start(self: &Arc<Self>, transfer: &Arc<Transfer>, counted: Option<Vec<u8>>) -> Result<()> {
        let Some(message) = counted else {
            self.check()?;
            if self.local.introduces && self.lock().link.ready().is_none() {
                return self.accept(Waiting::Silent(Arc::clone(transfer)));
            }
            transfer.launch(&self.local.rails, None);
            transfer.part_finished();
            return Ok(());
        };
        self.check_message(&message)?;
        self.accept(Waiting::Transfer(Arc::clone(transfer), message))
    }

    /// Queues a notification that stands alone.
    pub fn notify(self: &Arc<Self>, message: Vec<u8>) -> Result<()> {
        self.check_message(&message)?;
        let suspect = self.lock().suspect.clone();
        if let Some(error) = suspect {
            // Say so at once, and try whether the peer is back: the next call will know.
            self.connect()?;
            return Err(error);
        }
        self.accept(Waiting::Notification(message))
    }

    /// Sends the notification of a READ; it is the transfer's last part.
    pub fn notify_after(self: &Arc<Self>, transfer: &Arc<Transfer>, message: Vec<u8>) {
        let outcome = self
            .check_message(&message)
            .and_then(|()| self.accept(Waiting::After(Arc::clone(transfer), message)));
        if let Err(e) = outcome {
            transfer.fail(e);
            transfer.part_finished();
        }
    }

    /// Tells the peer not to wait for the rest of a transfer. A stock peer cannot be told.
    pub fn report_failed_transfer(self: &Arc<Self>, transfer: Announced) {
        let state = self.lock();
        if self.v2_bytes_max(&state.link).is_none() {
            state.lock_stock_ids().retire(transfer.id as u16);
        } else if transfer.session == state.link.session() {
            // In a newer session the number is another transfer's, and the peer has forgotten this one.
            self.post_counted(&state, Body::TransferFailed { transfer_id: transfer.id, final_count: 0 });
        }
    }

    fn check_message(&self, message: &[u8]) -> Result<()> {
        let limit = self.extension().map_or(u64::MAX, |e| e.notif_bytes_max).min(self.local.notif_bytes_max);
        if message.len() as u64 > limit {
            return Err(Error::invalid(format!(
                "a notification of {} bytes for {} is longer than {limit} (notif_bytes_max)",
                message.len(),
                self.name
            )));
        }
        let bytes = self.pending_bytes.load(Ordering::Relaxed) + message.len() as u64;
        let messages = self.pending_messages.load(Ordering::Relaxed);
        if bytes > self.local.pending_bytes_max.max(limit) || messages >= MESSAGES_PENDING_MAX {
            return Err(Error::disconnected(format!(
                "{} does not take its notifications: {messages} with {bytes} bytes wait for it (pending_bytes_max)",
                self.name
            )));
        }
        Ok(())
    }

    fn accept(self: &Arc<Self>, waiting: Waiting) -> Result<()> {
        let mut state = self.lock();
        if let Some(gone) = &state.gone {
            return Err(gone.clone());
        }
        if state.hello_at.is_none() {
            self.say_hello(&mut state)?;
        }
        if state.waiting.is_empty() {
            state.waiting_since = Some(Instant::now());
        }
        state.waiting.push_back(waiting);
        self.flush(state);
        Ok(())
    }

    /// Sends what waits, as far as the handshake and the window allow.
    fn flush(self: &Arc<Self>, mut state: MutexGuard<'_, State>) {
        let ended = self.flush_locked(&mut state);
        drop(state);
        end_parts(ended);
    }

    /// Returns the transfers of which a part is over: to be told so when the lock is free, because the last part
    /// may come back to the peer.
    fn flush_locked(self: &Arc<Self>, state: &mut State) -> Vec<Arc<Transfer>> {
        let mut ended = Vec::new();
        let Some(theirs) = state.link.ready() else { return ended };
        while let Some(next) = state.waiting.pop_front() {
            let outcome = match next {
                Waiting::Notification(message) => self.send_message(state, message, None, theirs.index),
                Waiting::Silent(transfer) => {
                    transfer.launch(&self.local.rails, None);
                    ended.push(transfer);
                    Ok(())
                }
                Waiting::After(transfer, message) => {
                    let outcome = self.send_message(state, message, Some(&transfer), theirs.index);
                    if let Err(e) = &outcome {
                        transfer.fail(e.clone());
                        ended.push(transfer);
                    }
                    outcome
                }
                Waiting::Transfer(transfer, message) => {
                    let Some(id) = self.transfer_id(state) else {
                        state.waiting.push_front(Waiting::Transfer(transfer, message));
                        return ended;
                    };
                    let outcome = self.send_transfer(state, &transfer, id, message, theirs.index);
                    if let Err(e) = &outcome {
                        transfer.fail(e.clone());
                    }
                    ended.push(transfer);
                    outcome
                }
            };
            if let Err(e) = outcome {
                log::warn!("nothing could be sent to {}: {e}", self.name);
            }
        }
        state.waiting_since = None;
        ended
    }

    /// A number for a transfer; `None` while the peer's window is full.
    fn transfer_id(&self, state: &mut State) -> Option<u64> {
        match self.v2_bytes_max(&state.link) {
            Some(_) => state.window_ids.allocate(),
            None => state.lock_stock_ids().allocate().map(u64::from),
        }
    }

    /// Hands out a WRITE and its notification. The poster's part is ended by the caller.
    fn send_transfer(
        self: &Arc<Self>,
        state: &mut State,
        transfer: &Arc<Transfer>,
        id: u64,
        message: Vec<u8>,
        index: u16,
    ) -> Result<()> {
        let expected_writes = transfer.slice_count();
        let (fragments, write_immediate) = if let Some(bytes_max) = self.v2_bytes_max(&state.link) {
            let cursor = FragmentCursor::new(
                state.link.session(),
                Subject::Transfer { id, expected_writes },
                message,
                bytes_max,
            )?;
            let immediate = Immediate::Transfer { peer: index, id_low: WindowIds::low(id) };
            (Outgoing::fragments(self, cursor, index), immediate)
        } else {
            let cursor =
                StockFragmentCursor::new(id as u16, expected_writes, self.local.name.as_bytes(), &message)?;
            let immediate = Immediate::StockTransfer { index: index as u8, id: id as u16 };
            (Outgoing::stock_fragments(self, cursor, index as u8, id as u16), immediate)
        };
        transfer.add_part();
        self.hand_over(fragments.part_of(transfer));
        let (session, immediate) = (state.link.session(), write_immediate.encode());
        transfer.launch(&self.local.rails, Some(Announced { session, id, immediate }));
        Ok(())
    }

    fn send_message(
        self: &Arc<Self>,
        state: &mut State,
        message: Vec<u8>,
        transfer: Option<&Arc<Transfer>>,
        index: u16,
    ) -> Result<()> {
        let outgoing = if let Some(bytes_max) = self.v2_bytes_max(&state.link) {
            state.messages += 1;
            let subject = Subject::Message(state.messages);
            let cursor = FragmentCursor::new(state.link.session(), subject, message, bytes_max)?;
            Outgoing::fragments(self, cursor, index)
        } else {
            // A number of its own keeps the fragments of two messages apart at a stock receiver.
            let id = state.lock_stock_ids().allocate().unwrap_or(0);
            let cursor = StockFragmentCursor::new(id, 0, self.local.name.as_bytes(), &message)?;
            Outgoing::stock_fragments(self, cursor, index as u8, id)
        };
        self.hand_over(match transfer {
            Some(transfer) => outgoing.part_of(transfer),
            None => outgoing,
        });
        Ok(())
    }

    fn say_hello(self: &Arc<Self>, state: &mut State) -> Result<()> {
        let message = Handshake {
            index: self.index,
            name: self.local.name.as_bytes().to_vec(),
            conn: state.link.wants_conn().then(|| self.local.conn_info.clone()),
            extension: Some(state.link.extension()),
        }
        .encode()?;
        state.hello_at = Some(Instant::now());
        state.suspect = None;
        let immediate = Immediate::StockHandshake { index: 0 };
        let hello = Outgoing::single(self, message, immediate);
        if self.local.introduces {
            Introduction::begin(self, hello, &self.local.rails);
        } else {
            self.hand_over(hello);
        }
        Ok(())
    }

    /// Posts what the peer counts by: it is sent again if it fails.
    fn post_counted(self: &Arc<Self>, state: &State, body: Body<'_>) {
        if let Some((message, immediate)) = control(state, body) {
            let session = state.link.session();
            self.hand_over(Outgoing::single(self, message.clone(), immediate).counted_by(message, session));
        }
    }

    fn hand_over(self: &Arc<Self>, outgoing: Outgoing) {
        self.local.rails[0].send(Message { destination: self.destination(0), source: Box::new(outgoing) });
    }

    /// Takes in a handshake of the peer.
    pub fn on_hello(self: &Arc<Self>, hello: &Handshake) -> Result<()> {
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
        let mut state = self.lock();
        let local = &self.local;
        let reaction = state.link.on_hello(hello, || local.session());
        if reaction.receive_anew {
            *self.lock_receiver() = Receiver::new(self.name.clone(), local.receive_limits());
        }
        if reaction.send_anew {
            state.window_ids = WindowIds::new();
            state.messages = 0;
        }
        if reaction.answer
            && let Err(e) = self.say_hello(&mut state)
        {
            log::error!("the handshake with {} cannot be answered: {e}", self.name);
        }
        state.suspect = None;
        self.flush(state);
        Ok(())
    }

    /// Acknowledges transfers of ours.
    pub fn on_ack(self: &Arc<Self>, session: u64, completed_below: u64) -> Result<()> {
        let mut state = self.lock();
        if state.link.theirs().is_none_or(|t| t.session != session) {
            return Ok(());
        }
        state.window_ids.acknowledge(completed_below)?;
        self.flush(state);
        Ok(())
    }

    /// Whether what we count in this session still counts.
    fn is_own_session(&self, session: u64) -> bool {
        let state = self.lock();
        state.gone.is_none() && state.link.session() == session
    }

    /// The peer could not be told what it counts by: both begin to count anew. Without that its window would stay
    /// shut for ever.
    fn number_anew(self: &Arc<Self>, session: u64) {
        let mut state = self.lock();
        if state.gone.is_some() || state.link.session() != session {
            return;
        }
        state.link.begin_anew(self.local.session());
        state.window_ids = WindowIds::new();
        state.messages = 0;
        if let Err(e) = self.say_hello(&mut state) {
            log::warn!("no hello to {}: {e}", self.name);
        }
    }

    /// Whether a message of this session is of the connection as it is now.
    pub fn is_current(&self, session: u64) -> bool {
        self.lock().link.theirs().is_some_and(|t| t.session == session)
    }

    /// Gives what arrived from the peer to its receiver; returns the notification that it completes.
    pub fn receive<T>(self: &Arc<Self>, take: impl FnOnce(&mut Receiver) -> T) -> T {
        let (taken, ack) = {
            let mut receiver = self.lock_receiver();
            let taken = take(&mut receiver);
            (taken, receiver.take_ack())
        };
        if let Some(completed_below) = ack {
            self.post_counted(&self.lock(), Body::Ack { completed_below });
        }
        taken
    }

    /// A control message could not be sent.
    fn on_send_error(&self, error: &Error) {
        let mut state = self.lock();
        if state.suspect.is_none() && state.gone.is_none() {
            log::warn!("{} cannot be reached: {error}", self.name);
            state.suspect = Some(error.clone().context(format_args!("peer {}", self.name)));
        }
        if state.link.ready().is_none() {
            let error = error.clone().context(format_args!("peer {} cannot be reached", self.name));
            let ended = fail_waiting(&mut state, &error);
            drop(state);
            end_parts(ended);
        }
    }

    /// Looks at the peer's deadlines. Returns whether anything waits for it.
    pub fn tick(self: &Arc<Self>, now: Instant) -> bool {
        let mut state = self.lock();
        let Some(since) = state.waiting_since else { return false };
        if now.duration_since(since) > self.local.connect_timeout {
            let error = self.no_answer();
            state.suspect = Some(error.clone());
            let ended = fail_waiting(&mut state, &error);
            drop(state);
            end_parts(ended);
            return false;
        }
        let said = state.hello_at.is_some_and(|at| now.duration_since(at) > HELLO_AGAIN);
        if said
            && state.link.ready().is_none()
            && self.pending_messages.load(Ordering::Relaxed) == 0
            && let Err(e) = self.say_hello(&mut state)
        {
            log::warn!("no hello to {}: {e}", self.name);
        }
        true
    }

    fn no_answer(&self) -> Error {
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
    fn close(&self, why: &Error) {
        let mut state = self.lock();
        state.gone = Some(why.clone());
        let ended = fail_waiting(&mut state, why);
        drop(state);
        end_parts(ended);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_receiver(&self) -> MutexGuard<'_, Receiver> {
        self.receiver.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn end_parts(ended: Vec<Arc<Transfer>>) {
    for transfer in ended {
        transfer.part_finished();
    }
}

/// Fails what waits. Returns the transfers whose waiting part is over.
fn fail_waiting(state: &mut State, error: &Error) -> Vec<Arc<Transfer>> {
    state.waiting_since = None;
    let mut ended = Vec::new();
    for waiting in std::mem::take(&mut state.waiting) {
        match waiting {
            Waiting::Transfer(transfer, _) | Waiting::Silent(transfer) | Waiting::After(transfer, _) => {
                transfer.fail(error.clone());
                ended.push(transfer);
            }
            Waiting::Notification(message) => {
                log::warn!("a notification of {} bytes was not sent: {error}", message.len());
            }
        }
    }
    ended
}

/// A control message of this session and the immediate that goes with it, once the peer's index is known.
fn control(state: &State, body: Body<'_>) -> Option<(Vec<u8>, Immediate)> {
    let theirs = state.link.theirs()?;
    let mut message = Vec::new();
    crate::wire::ControlMessage { session: state.link.session(), body }.encode_into(&mut message);
    Some((message, Immediate::Control { peer: theirs.index }))
}
