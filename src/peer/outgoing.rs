//! Control messages on their way out: fragments with their immediate data, and who waits for them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Peer;
use crate::error::{Result, Status};
use crate::rail::MessageSource;
use crate::transfer::Transfer;
use crate::wire::{FragmentCursor, Immediate, StockFragmentCursor};

enum Content {
    Single(Option<Vec<u8>>),
    Fragments(FragmentCursor),
    Stock(StockFragmentCursor),
}

/// One control message for a peer.
pub(super) struct Outgoing {
    peer: Arc<Peer>,
    content: Content,
    immediate: u32,
    bytes: u64,
    transfer: Option<Arc<Transfer>>,
    retry: Option<Retry>,
}

/// A message that the peer's counting depends on.
struct Retry {
    message: Vec<u8>,
    session: u64,
    left: u8,
}

/// How often such a message is sent again when sending fails. After that the numbers start anew.
const RETRIES: u8 = 3;

impl Outgoing {
    pub fn single(peer: &Arc<Peer>, message: Vec<u8>, immediate: Immediate) -> Self {
        let bytes = message.len();
        Self::new(peer, Content::Single(Some(message)), bytes, immediate.encode())
    }

    pub fn fragments(peer: &Arc<Peer>, cursor: FragmentCursor, index: u16) -> Self {
        let bytes = cursor.count() * crate::rail::MESSAGE_BYTES_MAX;
        Self::new(peer, Content::Fragments(cursor), bytes, Immediate::Control { peer: index }.encode())
    }

    pub fn stock_fragments(peer: &Arc<Peer>, cursor: StockFragmentCursor, index: u8, id: u16) -> Self {
        let bytes = cursor.count() as usize * crate::rail::MESSAGE_BYTES_MAX;
        Self::new(peer, Content::Stock(cursor), bytes, Immediate::StockNotification { index, id }.encode())
    }

    fn new(peer: &Arc<Peer>, content: Content, bytes: usize, immediate: u32) -> Self {
        let bytes = bytes as u64;
        peer.pending_messages.fetch_add(1, Ordering::Relaxed);
        peer.pending_bytes.fetch_add(bytes, Ordering::Relaxed);
        Self { peer: Arc::clone(peer), content, immediate, bytes, transfer: None, retry: None }
    }

    /// The peer must learn this for as long as the session lasts: it counts by it.
    pub fn counted_by(mut self, message: Vec<u8>, session: u64) -> Self {
        self.retry = Some(Retry { message, session, left: RETRIES });
        self
    }

    fn again(&mut self) {
        let Some(Retry { message, session, left }) = self.retry.take() else { return };
        if !self.peer.is_own_session(session) {
            return;
        }
        if left == 0 {
            self.peer.number_anew(session);
            return;
        }
        let mut again =
            Self::new(&self.peer, Content::Single(Some(message.clone())), message.len(), self.immediate);
        again.retry = Some(Retry { message, session, left: left - 1 });
        self.peer.hand_over(again);
    }

    /// The message is a part of a transfer, which is not over before it has left.
    pub fn part_of(mut self, transfer: &Arc<Transfer>) -> Self {
        self.transfer = Some(Arc::clone(transfer));
        self
    }
}

impl MessageSource for Outgoing {
    fn next_fragment(&mut self, fragment: &mut Vec<u8>) -> Option<u32> {
        let more = match &mut self.content {
            Content::Single(message) => message.take().map(|m| *fragment = m).is_some(),
            Content::Fragments(cursor) => cursor.next_into(fragment),
            Content::Stock(cursor) => cursor.next_into(fragment),
        };
        more.then_some(self.immediate)
    }

    fn on_finished(mut self: Box<Self>, result: Result<()>) {
        self.peer.pending_messages.fetch_sub(1, Ordering::Relaxed);
        self.peer.pending_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        if let Err(e) = &result
            && (e.status() == Status::RemoteDisconnect || self.transfer.is_none())
        {
            self.peer.on_send_error(e);
        }
        if result.is_err() {
            self.again();
        }
        if let Some(transfer) = self.transfer {
            if let Err(e) = result {
                transfer.fail(e.context("its notification could not be sent"));
            }
            transfer.part_finished();
        }
    }
}
