//! The two wires: how a notification becomes control messages for a peer of ours, and for the C++ plugin.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::link::{Link, Theirs};
use super::{Peer, State};
use crate::error::{Error, Result};
use crate::notify::StockIds;
use crate::rail::{Fragments, Message, Tag};
use crate::wire::immediate::STOCK_PEERS_MAX;
use crate::wire::{
    Body, CONTROL_BYTES_MAX, ControlMessage, Extension, FragmentCursor, Immediate, StockFragmentCursor,
};

/// A control message on its way: what its [`Event::MessageOver`](crate::rail::Event::MessageOver) is tagged with.
pub struct Outgoing {
    peer: Arc<Peer>,
    bytes: usize,
    /// The transfer that it follows.
    of: Option<Tag>,
    /// Its number at a stock peer, which waits for all fragments.
    stock_id: Option<(Arc<Mutex<StockIds>>, u16)>,
    is_hello: bool,
    diverted: AtomicBool,
    returned: AtomicUsize,
}

impl Outgoing {
    /// The peer.
    pub fn peer(&self) -> &Arc<Peer> {
        &self.peer
    }

    /// The transfer that it follows.
    pub fn of(&self) -> Option<&Tag> {
        self.of.as_ref()
    }

    /// Whether it was sent another way before; from now on it was.
    pub(super) fn is_diverted(&self) -> bool {
        self.diverted.swap(true, Ordering::Relaxed)
    }

    /// A rail did not take it: how often that was so before.
    pub fn returns(&self) -> usize {
        self.returned.fetch_add(1, Ordering::Relaxed)
    }

    /// It has left, or not.
    pub(super) fn over(&self, result: &Result<()>) {
        self.peer.pending.release(self.bytes);
        if self.is_hello {
            self.peer.hellos_unsent.fetch_sub(1, Ordering::Relaxed);
        }
        if let (Some((ids, id)), Err(_)) = (&self.stock_id, result) {
            ids.lock().unwrap_or_else(PoisonError::into_inner).retire(*id);
        }
    }
}

/// A message of one fragment.
struct Single {
    message: Vec<u8>,
    immediate: Immediate,
    sent: bool,
}

impl Fragments for Single {
    fn next_fragment(&mut self, fragment: &mut Vec<u8>) -> Option<u32> {
        let sent = std::mem::replace(&mut self.sent, true);
        (!sent).then(|| {
            fragment.extend_from_slice(&self.message);
            self.immediate.encode()
        })
    }

    fn begin_anew(&mut self) -> bool {
        // A hello may come twice.
        let repeats = matches!(self.immediate, Immediate::StockHandshake { .. });
        self.sent &= !repeats;
        repeats
    }
}

impl Fragments for (FragmentCursor, u32) {
    fn next_fragment(&mut self, fragment: &mut Vec<u8>) -> Option<u32> {
        self.0.next_into(fragment).then_some(self.1)
    }

    fn begin_anew(&mut self) -> bool {
        // The receiver knows which numbers it has delivered.
        self.0.restart();
        true
    }
}

impl Fragments for (StockFragmentCursor, u32) {
    fn next_fragment(&mut self, fragment: &mut Vec<u8>) -> Option<u32> {
        self.0.next_into(fragment).then_some(self.1)
    }
}

impl Peer {
    /// What it said about itself, if it speaks our wire.
    pub(super) fn extension(&self) -> Option<&Extension> {
        self.info.extension.as_ref().filter(|e| e.speaks_v2())
    }

    /// Largest control message of the version 2 wire, if the peer reads that.
    fn v2_bytes_max(&self, link: &Link) -> Option<u32> {
        // An index that the stock wire has no room for tells, too: its extension may be of a version we do not know.
        let wide = || link.theirs().filter(|t| t.session != 0 && t.index >= STOCK_PEERS_MAX);
        self.extension().map(|e| e.control_bytes_max).or_else(|| wide().map(|_| CONTROL_BYTES_MAX as u32))
    }

    /// Longest notification that both sides take.
    pub(super) fn check_length(&self, len: usize) -> Result<()> {
        let limit = self.extension().map_or(u64::MAX, |e| e.notif_bytes_max).min(self.local.notif_bytes_max);
        if len as u64 > limit {
            return Err(Error::invalid(format!(
                "a notification of {len} bytes for {} is longer than {limit} (notif_bytes_max)",
                self.name
            )));
        }
        Ok(())
    }

    /// Sends a notification, whose bytes are counted already. It says itself that it waits for no writes: they have
    /// arrived.
    pub(super) fn send_notification(
        self: &Arc<Self>,
        state: &mut State,
        theirs: Theirs,
        message: Vec<u8>,
        of: Option<Tag>,
    ) -> Result<()> {
        let bytes = message.len();
        let (content, stock_id): (Box<dyn Fragments>, _) =
            if let Some(bytes_max) = self.v2_bytes_max(&state.link) {
                state.messages += 1;
                let cursor = FragmentCursor::new(state.link.session(), state.messages, message, bytes_max)?;
                (Box::new((cursor, Immediate::Control { peer: theirs.index }.encode())), None)
            } else {
                let id = state.lock_stock_ids().allocate().unwrap_or(0);
                let cursor = StockFragmentCursor::new(id, 0, self.local.name.as_bytes(), &message)?;
                let immediate = Immediate::StockNotification { index: theirs.index as u8, id }.encode();
                (Box::new((cursor, immediate)), Some((Arc::clone(&state.stock_ids), id)))
            };
        let (peer, diverted, returned) = (Arc::clone(self), AtomicBool::new(false), AtomicUsize::new(0));
        self.hand_over(content, Outgoing { peer, bytes, of, stock_id, is_hello: false, diverted, returned });
        Ok(())
    }

    /// Sends a control message of this session, once the peer's index is known.
    pub(super) fn send_body(self: &Arc<Self>, state: &State, body: Body<'_>) {
        let Some(theirs) = state.link.theirs() else { return };
        let mut message = Vec::new();
        ControlMessage { session: state.link.session(), body }.encode_into(&mut message);
        self.send_single(message, Immediate::Control { peer: theirs.index });
    }

    /// Sends a message of one fragment.
    pub(super) fn send_single(self: &Arc<Self>, message: Vec<u8>, immediate: Immediate) {
        let (content, outgoing) = self.single(message, immediate);
        self.hand_over(content, outgoing);
    }

    /// A message of one fragment, counted.
    pub(super) fn single(
        self: &Arc<Self>,
        message: Vec<u8>,
        immediate: Immediate,
    ) -> (Box<dyn Fragments>, Outgoing) {
        self.pending.add(message.len());
        let outgoing = Outgoing {
            peer: Arc::clone(self),
            bytes: message.len(),
            of: None,
            stock_id: None,
            is_hello: matches!(immediate, Immediate::StockHandshake { .. }),
            diverted: AtomicBool::new(false),
            returned: AtomicUsize::new(0),
        };
        (Box::new(Single { message, immediate, sent: false }), outgoing)
    }

    /// Leaves a message for the rail that it goes over.
    pub(super) fn hand_over(&self, content: Box<dyn Fragments>, outgoing: Outgoing) {
        let (rail, endpoint) = self.way();
        let destination = self.destination(endpoint);
        rail.send(Message { destination, content, tag: Arc::new(outgoing) });
    }

    /// Whether what a message says of its session is of the connection as it is now.
    pub fn is_current(&self, session: u64) -> bool {
        self.session() == session
    }
}
