//! The 32 bits of immediate data that come with a message or with a write.

use super::serdes::malformed;
use crate::error::Result;

/// Immediate data, of the stock wire (version 1) and of ours (version 2).
///
/// The peer index is always the SENDER's index in the RECEIVER's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Immediate {
    /// Stock: a notification fragment comes with it. Receivers do not look at the id.
    StockNotification {
        /// The sender's index.
        index: u8,
        /// The transfer id.
        id: u16,
    },
    /// Stock: one write of a transfer has arrived.
    StockTransfer {
        /// The sender's index.
        index: u8,
        /// The transfer id.
        id: u16,
    },
    /// Stock, and our own connections too: a handshake comes with it. Receivers do not look at the index.
    StockHandshake {
        /// The sender's index, or 0 where it is not known yet.
        index: u8,
    },
    /// Stock, after NIXL 1.5: the word that a transfer has failed comes with it.
    StockFailure {
        /// The sender's index.
        index: u8,
        /// The transfer id.
        id: u16,
    },
    /// Version 2: a control message comes with it.
    Control {
        /// The sender's index, below [`PEERS_MAX`].
        peer: u16,
    },
}

/// Peers that version 2 can tell apart.
pub const PEERS_MAX: u16 = 1 << 14;
/// Peers that the stock wire can tell apart: give a stock peer an index below this.
pub const STOCK_PEERS_MAX: u16 = 1 << 8;
const STOCK_FAILURE: u32 = 1;
const STOCK_NOTIFICATION: u32 = 2;
const STOCK_TRANSFER: u32 = 4;
const STOCK_HANDSHAKE: u32 = 8;
// The stock wire takes its types from the powers of two; ours has three bits set.
const CONTROL: u32 = 0b1011;

const LOW_14: u32 = (1 << 14) - 1;

impl Immediate {
    /// The bits.
    pub fn encode(self) -> u32 {
        let stock = |kind: u32, index: u8, id: u16| kind | u32::from(index) << 4 | u32::from(id) << 12;
        match self {
            Self::StockNotification { index, id } => stock(STOCK_NOTIFICATION, index, id),
            Self::StockTransfer { index, id } => stock(STOCK_TRANSFER, index, id),
            Self::StockHandshake { index } => stock(STOCK_HANDSHAKE, index, 0),
            Self::StockFailure { index, id } => stock(STOCK_FAILURE, index, id),
            Self::Control { peer } => {
                debug_assert!(peer < PEERS_MAX, "a field of 14 bits");
                CONTROL | (u32::from(peer) & LOW_14) << 4
            }
        }
    }

    /// Reads the bits. libfabric hands over 64; the upper half must be zero to be ours.
    pub fn decode(data: u64) -> Result<Self> {
        let bits = u32::try_from(data)
            .map_err(|_| malformed(format!("immediate data {data:#x} has more than 32 bits")))?;
        let index = (bits >> 4) as u8;
        let id = (bits >> 12) as u16;
        let peer = (bits >> 4 & LOW_14) as u16;
        Ok(match bits & 0xf {
            STOCK_NOTIFICATION => Self::StockNotification { index, id },
            STOCK_TRANSFER => Self::StockTransfer { index, id },
            STOCK_HANDSHAKE => Self::StockHandshake { index },
            STOCK_FAILURE => Self::StockFailure { index, id },
            CONTROL => Self::Control { peer },
            kind => return Err(malformed(format!("immediate data {bits:#x} has the unknown type {kind}"))),
        })
    }
}
