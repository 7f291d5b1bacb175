//! Notifications: reassembly, numbers, and the inbox. Pure state machines.
//!
//! A notification comes out once and whole, in whatever order its fragments arrive. An agent of ours sends it when its data
//! has arrived; a stock one does not wait, and its writes are counted here. One [`Receiver`] serves one peer; the state of
//! a peer ends with the peer.
#![forbid(unsafe_code)]

mod assembly;
mod ids;
mod inbox;
mod message;
mod stock;

use crate::error::Result;
use crate::types::AgentName;
use crate::wire::{Fragment, StockFragment};

use assembly::Budget;
pub use ids::StockIds;
pub use inbox::{Inbox, Notification};
use message::MessageReceiver;
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
    messages: MessageReceiver,
}

impl Receiver {
    /// For a peer that nothing has come from.
    pub fn new(peer: AgentName, limits: Limits) -> Self {
        Self {
            budget: Budget::new(limits.pending_bytes_max),
            stock: StockReceiver::new(peer, limits.notif_bytes_max),
            messages: MessageReceiver::new(limits.notif_bytes_max),
        }
    }

    /// Stock wire: so many writes of the transfer have arrived.
    pub fn on_stock_writes(&mut self, transfer_id: u16, count: u32) -> Result<Option<Vec<u8>>> {
        self.stock.on_writes(transfer_id, count, &mut self.budget)
    }

    /// Stock wire: a fragment has arrived.
    pub fn on_stock_fragment(&mut self, fragment: &StockFragment<'_>) -> Result<Option<Vec<u8>>> {
        self.stock.on_fragment(fragment, &mut self.budget)
    }

    /// Stock wire: a transfer has failed, and so many of its writes come all the same.
    pub fn on_stock_failed(&mut self, transfer_id: u16, final_writes: u32) -> Result<()> {
        self.stock.on_failed(transfer_id, final_writes, &mut self.budget)
    }

    /// Our wire: a fragment has arrived.
    pub fn on_fragment(&mut self, fragment: &Fragment<'_>) -> Result<Option<Vec<u8>>> {
        self.messages.on_fragment(fragment, &mut self.budget)
    }

    /// Bytes held for the peer, with the cost of keeping them.
    pub fn buffered_bytes(&self) -> u64 {
        self.budget.used()
    }
}

#[cfg(test)]
mod tests;
