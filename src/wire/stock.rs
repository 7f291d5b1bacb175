//! Notification fragments of the stock wire.

use std::borrow::Cow;

use super::CONTROL_BYTES_MAX;
use super::blob::Bytes;
use super::serdes::malformed;
use crate::error::Result;

/// Bytes before the payload: in every fragment, and more in the first.
const HEADER_BYTES: usize = 10;
const FIRST_BYTES: usize = 10;
const FIRST_CAPACITY: usize = CONTROL_BYTES_MAX - HEADER_BYTES - FIRST_BYTES;
const CAPACITY: usize = CONTROL_BYTES_MAX - HEADER_BYTES;

/// Largest agent name and message together, in bytes: 65535 fragments.
pub const STOCK_PAYLOAD_MAX: usize = FIRST_CAPACITY + (u16::MAX as usize - 1) * CAPACITY;

/// A fragment of a notification: the agent's name followed by the message, cut into pieces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StockFragment<'a> {
    /// Transfer that the notification belongs to; 0 for one that stands alone.
    pub transfer_id: u16,
    /// Index of this fragment, below the count.
    pub index: u16,
    /// Fragments of the notification, at least 1.
    pub count: u16,
    /// What only fragment 0 says; `Some` exactly there.
    pub first: Option<StockFirst>,
    /// Its part of name and message. Only a notification's sole fragment can be empty.
    pub payload: Cow<'a, [u8]>,
}

/// What fragment 0 says about the whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StockFirst {
    /// Bytes of name and message together.
    pub total_len: u32,
    /// Writes with this transfer id that must have arrived before the notification is delivered.
    pub expected_writes: u32,
    /// Bytes of the name.
    pub name_len: u16,
}

/// Writes of a failed transfer that have arrived or will: the whole of the message that says so.
pub fn final_writes(message: &[u8]) -> Result<u32> {
    let count = Bytes(message).take().map(u32::from_le_bytes);
    count.ok_or_else(|| malformed(format!("the word of a failed transfer has only {} bytes", message.len())))
}

impl<'a> StockFragment<'a> {
    /// Reads a fragment and checks what can be checked of it alone.
    pub fn decode(message: &'a [u8]) -> Result<Self> {
        let cut = || malformed(format!("a notification fragment of {} bytes is cut short", message.len()));
        let mut input = Bytes(message);
        let transfer_id = u16::from_le_bytes(input.take().ok_or_else(cut)?);
        let index = u16::from_le_bytes(input.take().ok_or_else(cut)?);
        let count = u16::from_le_bytes(input.take().ok_or_else(cut)?);
        let payload_len = u32::from_le_bytes(input.take().ok_or_else(cut)?);
        let first = if index == 0 {
            Some(StockFirst {
                total_len: u32::from_le_bytes(input.take().ok_or_else(cut)?),
                expected_writes: u32::from_le_bytes(input.take().ok_or_else(cut)?),
                name_len: u16::from_le_bytes(input.take().ok_or_else(cut)?),
            })
        } else {
            None
        };
        let payload = Cow::Borrowed(input.0);
        if payload.len() != payload_len as usize {
            return Err(malformed(format!(
                "a fragment announces {payload_len} bytes and has {}",
                payload.len()
            )));
        }
        let fragment = Self { transfer_id, index, count, first, payload };
        fragment.check()?;
        Ok(fragment)
    }

    fn check(&self) -> Result<()> {
        if self.index >= self.count {
            return Err(malformed(format!("fragment {} of {} fragments", self.index, self.count)));
        }
        if self.payload.is_empty() && self.index > 0 {
            return Err(malformed(format!("fragment {} of {} is empty", self.index, self.count)));
        }
        let Some(first) = self.first else { return Ok(()) };
        let (total, here) = (first.total_len as usize, self.payload.len());
        // Every other fragment holds at least one byte.
        let fits = if self.count == 1 { here == total } else { here + self.count as usize - 1 <= total };
        if !fits || first.name_len as usize > total {
            return Err(malformed(format!(
                "a notification of {total} bytes has a name of {} and {here} in the first of {} fragments",
                first.name_len, self.count
            )));
        }
        Ok(())
    }

    /// Appends the fragment's bytes.
    pub fn encode_into(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.transfer_id.to_le_bytes());
        out.extend_from_slice(&self.index.to_le_bytes());
        out.extend_from_slice(&self.count.to_le_bytes());
        out.extend_from_slice(&(self.payload.len() as u32).to_le_bytes());
        if let Some(first) = self.first {
            out.extend_from_slice(&first.total_len.to_le_bytes());
            out.extend_from_slice(&first.expected_writes.to_le_bytes());
            out.extend_from_slice(&first.name_len.to_le_bytes());
        }
        out.extend_from_slice(&self.payload);
    }
}

/// Cuts one notification into fragments, one at a time, as the control channel has room.
#[derive(Debug, Clone)]
pub struct StockFragmentCursor {
    transfer_id: u16,
    expected_writes: u32,
    name_len: u16,
    /// Name, then message.
    payload: Vec<u8>,
    count: u16,
    next: u16,
}

impl StockFragmentCursor {
    /// A notification from the agent `name`. `transfer_id` 0 stands alone; several fragments want an id of their own.
    pub fn new(transfer_id: u16, expected_writes: u32, name: &[u8], message: &[u8]) -> Result<Self> {
        let total = name.len() + message.len();
        let name_len = u16::try_from(name.len())
            .ok()
            .filter(|_| total <= STOCK_PAYLOAD_MAX)
            .ok_or_else(|| {
                malformed(format!(
                    "a notification of {} bytes from a name of {} bytes is more than the wire holds ({STOCK_PAYLOAD_MAX} together)",
                    message.len(),
                    name.len()
                ))
            })?;
        let count = 1 + total.saturating_sub(FIRST_CAPACITY).div_ceil(CAPACITY);
        let payload = [name, message].concat();
        Ok(Self { transfer_id, expected_writes, name_len, payload, count: count as u16, next: 0 })
    }

    /// Fragments in all.
    pub fn count(&self) -> u16 {
        self.count
    }

    /// Whether every fragment is out.
    pub fn is_done(&self) -> bool {
        self.next == self.count
    }

    /// Clears `out` and writes the next fragment into it; `false` when there is none.
    pub fn next_into(&mut self, out: &mut Vec<u8>) -> bool {
        out.clear();
        if self.is_done() {
            return false;
        }
        let index = self.next;
        let start = if index == 0 { 0 } else { FIRST_CAPACITY + (index as usize - 1) * CAPACITY };
        let capacity = if index == 0 { FIRST_CAPACITY } else { CAPACITY };
        let end = (start + capacity).min(self.payload.len());
        let first = (index == 0).then_some(StockFirst {
            total_len: self.payload.len() as u32,
            expected_writes: self.expected_writes,
            name_len: self.name_len,
        });
        let payload = Cow::Borrowed(&self.payload[start..end]);
        StockFragment { transfer_id: self.transfer_id, index, count: self.count, first, payload }
            .encode_into(out);
        self.next += 1;
        true
    }
}
