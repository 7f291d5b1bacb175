//! Notifications: reassembly, the wait for a transfer's writes, ids, and the inbox. Pure state machines.
//!
//! A notification comes out once, whole, and after the writes that it follows, in whatever order its fragments and
//! those writes arrive. One [`Receiver`] serves one peer; the state of a peer ends with the peer.
#![forbid(unsafe_code)]

mod assembly;
mod ids;
mod inbox;
mod session;
mod stock;

use crate::error::Result;
use crate::types::AgentName;
use crate::wire::{Fragment, StockFragment};

use assembly::Budget;
pub use ids::{ACK_EVERY, StockIds, WINDOW, WindowIds};
pub use inbox::{Inbox, Notification};
use session::SessionReceiver;
use stock::StockReceiver;

/// What one peer may make us hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Largest notification in bytes (`notif_bytes_max`).
    pub notif_bytes_max: u64,
    /// Most bytes of half-arrived or waiting notifications (`pending_bytes_max`).
    pub pending_bytes_max: u64,
}

/// What has arrived from one peer and is not yet a notification.
///
/// Every call returns the message that it completes, if any. An error means that the input was refused and changed
/// nothing; it belongs to this peer alone.
#[derive(Debug)]
pub struct Receiver {
    budget: Budget,
    stock: StockReceiver,
    session: SessionReceiver,
}

impl Receiver {
    /// For a peer that nothing has come from.
    pub fn new(peer: AgentName, limits: Limits) -> Self {
        Self {
            budget: Budget::new(limits.pending_bytes_max),
            stock: StockReceiver::new(peer, limits.notif_bytes_max),
            session: SessionReceiver::new(limits.notif_bytes_max),
        }
    }

    /// Stock wire: one write of the transfer has arrived.
    pub fn on_stock_immediate(&mut self, transfer_id: u16) -> Result<Option<Vec<u8>>> {
        self.stock.on_immediate(transfer_id, &mut self.budget)
    }

    /// Stock wire: a fragment has arrived.
    pub fn on_stock_fragment(&mut self, fragment: &StockFragment<'_>) -> Result<Option<Vec<u8>>> {
        self.stock.on_fragment(fragment, &mut self.budget)
    }

    /// Version 2: one write of a transfer has arrived.
    pub fn on_transfer_immediate(&mut self, id_low: u16) -> Option<Vec<u8>> {
        self.session.on_immediate(id_low, &mut self.budget)
    }

    /// Version 2: a fragment has arrived.
    pub fn on_fragment(&mut self, fragment: &Fragment<'_>) -> Result<Option<Vec<u8>>> {
        self.session.on_fragment(fragment, &mut self.budget)
    }

    /// Version 2: a transfer has failed at its sender; its notification must not come out.
    pub fn on_transfer_failed(&mut self, transfer_id: u64) -> Result<()> {
        self.session.on_failed(transfer_id, &mut self.budget)
    }

    /// Version 2: the floor to acknowledge, once enough transfers are done since the last.
    pub fn take_ack(&mut self) -> Option<u64> {
        self.session.take_ack()
    }

    /// Bytes held for the peer, with the cost of keeping them.
    pub fn buffered_bytes(&self) -> u64 {
        self.budget.used()
    }
}

#[cfg(test)]
mod tests;
