//! Control messages of version 2: between two agents of this project. They come with [`Immediate::Control`].
//!
//! [`Immediate::Control`]: super::Immediate::Control

use super::CONTROL_BYTES_MAX;
use super::blob::Bytes;
use super::serdes::malformed;
use super::staging::Staging;
use crate::error::Result;

/// Bytes that every message starts with: u8 kind, 3 bytes zero, u64 session.
const HEADER_BYTES: usize = 12;
const FRAGMENT_HEADER_BYTES: usize = HEADER_BYTES + 28;
/// Payload bytes of a full fragment where the peer takes control messages of 8192 bytes.
pub const FRAGMENT_CAPACITY: usize = CONTROL_BYTES_MAX - FRAGMENT_HEADER_BYTES;

const FRAGMENT: u8 = 1;
const TRANSFER_FAILED: u8 = 2;
const ACK: u8 = 3;
const GOODBYE: u8 = 4;
const STAGING: u8 = 5;

/// A control message and the sender's number for the connection ([`HandshakeExtension::session`]): a message of an
/// earlier connection is told by it.
///
/// [`HandshakeExtension::session`]: super::HandshakeExtension::session
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ControlMessage<'a> {
    /// The sender's session.
    pub session: u64,
    /// What it says.
    pub body: Body<'a>,
}

/// What a control message says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body<'a> {
    /// A piece of a notification.
    Fragment(Fragment<'a>),
    /// A transfer with notification has failed: the notification must not be delivered.
    TransferFailed {
        /// The transfer, not 0.
        transfer_id: u64,
        /// Writes that did arrive, as far as the sender knows.
        final_count: u32,
    },
    /// The receiver of writes is done with every transfer below this id.
    Ack {
        /// The floor.
        completed_below: u64,
    },
    /// The sender leaves: nothing comes after it.
    Goodbye,
    /// GPU memory is reached through host memory.
    Staging(Staging<'a>),
}

/// A piece of a notification. All pieces of one repeat all fields but offset and payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fragment<'a> {
    /// For a notification that stands alone: counts up from 1 within the session. Else 0.
    pub message_id: u64,
    /// For the notification of a write transfer: counts up from 1 within the session. Else 0.
    pub transfer_id: u64,
    /// Writes of the transfer that must have arrived before the notification is delivered; 0 without a transfer.
    pub expected_writes: u32,
    /// Bytes of the whole message.
    pub total_len: u32,
    /// Place of the payload in the message.
    pub offset: u32,
    /// The piece; empty only where the whole message is.
    pub payload: &'a [u8],
}

impl<'a> ControlMessage<'a> {
    /// Reads a message. Bytes behind a known body are ignored, an unknown kind is an error (skip it).
    pub fn decode(message: &'a [u8]) -> Result<Self> {
        let cut = || malformed(format!("a control message of {} bytes is cut short", message.len()));
        let mut input = Bytes(message);
        let [kind, ..] = input.take::<4>().ok_or_else(cut)?;
        let session = u64::from_le_bytes(input.take().ok_or_else(cut)?);
        let body = match kind {
            FRAGMENT => Body::Fragment(Fragment::decode(&mut input).ok_or_else(cut)?.checked()?),
            TRANSFER_FAILED => {
                let transfer_id = u64::from_le_bytes(input.take().ok_or_else(cut)?);
                let final_count = u32::from_le_bytes(input.take().ok_or_else(cut)?);
                if transfer_id == 0 {
                    return Err(malformed("transfer 0 is said to have failed"));
                }
                Body::TransferFailed { transfer_id, final_count }
            }
            ACK => Body::Ack { completed_below: u64::from_le_bytes(input.take().ok_or_else(cut)?) },
            GOODBYE => Body::Goodbye,
            STAGING => Body::Staging(Staging::decode(&mut input)?),
            kind => return Err(malformed(format!("a control message has the unknown kind {kind}"))),
        };
        Ok(Self { session, body })
    }

    /// Clears `out` and writes the message into it.
    pub fn encode_into(&self, out: &mut Vec<u8>) {
        let kind = match self.body {
            Body::Fragment(_) => FRAGMENT,
            Body::TransferFailed { .. } => TRANSFER_FAILED,
            Body::Ack { .. } => ACK,
            Body::Goodbye => GOODBYE,
            Body::Staging(_) => STAGING,
        };
        out.clear();
        out.extend_from_slice(&[kind, 0, 0, 0]);
        out.extend_from_slice(&self.session.to_le_bytes());
        match self.body {
            Body::Fragment(fragment) => fragment.encode_into(out),
            Body::TransferFailed { transfer_id, final_count } => {
                out.extend_from_slice(&transfer_id.to_le_bytes());
                out.extend_from_slice(&final_count.to_le_bytes());
            }
            Body::Ack { completed_below } => out.extend_from_slice(&completed_below.to_le_bytes()),
            Body::Goodbye => {}
            Body::Staging(message) => message.encode_into(out),
        }
    }
}

impl<'a> Fragment<'a> {
    fn decode(input: &mut Bytes<'a>) -> Option<Self> {
        Some(Self {
            message_id: u64::from_le_bytes(input.take()?),
            transfer_id: u64::from_le_bytes(input.take()?),
            expected_writes: u32::from_le_bytes(input.take()?),
            total_len: u32::from_le_bytes(input.take()?),
            offset: u32::from_le_bytes(input.take()?),
            payload: input.0,
        })
    }

    fn checked(self) -> Result<Self> {
        if (self.message_id == 0) == (self.transfer_id == 0) {
            return Err(malformed("a notification needs either a message id or a transfer id"));
        }
        if self.transfer_id == 0 && self.expected_writes != 0 {
            return Err(malformed("a notification without a transfer expects writes"));
        }
        let end = u64::from(self.offset) + self.payload.len() as u64;
        if end > u64::from(self.total_len) || (self.payload.is_empty() && self.total_len != 0) {
            return Err(malformed(format!(
                "a notification of {} bytes has a fragment of {} at {}",
                self.total_len,
                self.payload.len(),
                self.offset
            )));
        }
        Ok(self)
    }

    fn encode_into(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.message_id.to_le_bytes());
        out.extend_from_slice(&self.transfer_id.to_le_bytes());
        out.extend_from_slice(&self.expected_writes.to_le_bytes());
        out.extend_from_slice(&self.total_len.to_le_bytes());
        out.extend_from_slice(&self.offset.to_le_bytes());
        out.extend_from_slice(self.payload);
    }
}

/// Which notification a [`FragmentCursor`] cuts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// One that stands alone, with its message id, not 0.
    Message(u64),
    /// One that follows a write transfer.
    Transfer {
        /// Transfer id, not 0.
        id: u64,
        /// Writes with immediate data that the transfer makes.
        expected_writes: u32,
    },
}

/// Cuts one notification into fragments, one at a time, as the control channel has room.
#[derive(Debug, Clone)]
pub struct FragmentCursor {
    session: u64,
    subject: Subject,
    message: Vec<u8>,
    /// Payload bytes of a full fragment.
    capacity: usize,
    /// Offset of the next fragment; `None` when all are out.
    next: Option<u32>,
    last: u32,
}

impl FragmentCursor {
    /// `control_bytes_max` is the peer's, from its [`Extension`](super::Extension).
    pub fn new(session: u64, subject: Subject, message: Vec<u8>, control_bytes_max: u32) -> Result<Self> {
        let control_bytes = CONTROL_BYTES_MAX.min(control_bytes_max as usize);
        let capacity = control_bytes.checked_sub(FRAGMENT_HEADER_BYTES).filter(|capacity| *capacity > 0);
        let Some(capacity) = capacity else {
            return Err(malformed(format!(
                "the peer takes control messages of only {control_bytes_max} bytes"
            )));
        };
        if u32::try_from(message.len()).is_err() {
            return Err(malformed(format!(
                "a notification of {} bytes is more than the wire holds",
                message.len()
            )));
        }
        Ok(Self { session, subject, message, capacity, next: Some(0), last: 0 })
    }

    /// Fragments in all.
    pub fn count(&self) -> usize {
        self.message.len().div_ceil(self.capacity).max(1)
    }

    /// Whether every fragment is out.
    pub fn is_done(&self) -> bool {
        self.next.is_none()
    }

    /// Clears `out` and writes the next fragment into it; `false` when there is none.
    pub fn next_into(&mut self, out: &mut Vec<u8>) -> bool {
        out.clear();
        let Some(offset) = self.next else { return false };
        let start = offset as usize;
        let end = (start + self.capacity).min(self.message.len());
        let (message_id, transfer_id, expected_writes) = match self.subject {
            Subject::Message(id) => (id, 0, 0),
            Subject::Transfer { id, expected_writes } => (0, id, expected_writes),
        };
        let fragment = Fragment {
            message_id,
            transfer_id,
            expected_writes,
            total_len: self.message.len() as u32,
            offset,
            payload: &self.message[start..end],
        };
        ControlMessage { session: self.session, body: Body::Fragment(fragment) }.encode_into(out);
        self.last = offset;
        self.next = (end < self.message.len()).then_some(end as u32);
        true
    }

    /// Takes back the last fragment: the fabric had no room for it.
    pub fn step_back(&mut self) {
        self.next = Some(self.last);
    }
}
