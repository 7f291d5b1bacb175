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
const FRAGMENT_HEADER_BYTES: usize = HEADER_BYTES + 16;
/// Payload bytes of a full fragment where the peer takes control messages of 8192 bytes.
pub const FRAGMENT_CAPACITY: usize = CONTROL_BYTES_MAX - FRAGMENT_HEADER_BYTES;

const FRAGMENT: u8 = 1;
const STAGING: u8 = 2;

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
    /// GPU memory is reached through host memory.
    Staging(Staging<'a>),
}

/// A piece of a notification. All pieces of one repeat all fields but offset and payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fragment<'a> {
    /// Tells the notifications of a session apart: counts up from 1.
    pub message_id: u64,
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
            STAGING => Body::Staging(Staging::decode(&mut input)?),
            kind => return Err(malformed(format!("a control message has the unknown kind {kind}"))),
        };
        Ok(Self { session, body })
    }

    /// Clears `out` and writes the message into it.
    pub fn encode_into(&self, out: &mut Vec<u8>) {
        let kind = match self.body {
            Body::Fragment(_) => FRAGMENT,
            Body::Staging(_) => STAGING,
        };
        out.clear();
        out.extend_from_slice(&[kind, 0, 0, 0]);
        out.extend_from_slice(&self.session.to_le_bytes());
        match self.body {
            Body::Fragment(fragment) => fragment.encode_into(out),
            Body::Staging(message) => message.encode_into(out),
        }
    }
}

impl<'a> Fragment<'a> {
    fn decode(input: &mut Bytes<'a>) -> Option<Self> {
        Some(Self {
            message_id: u64::from_le_bytes(input.take()?),
            total_len: u32::from_le_bytes(input.take()?),
            offset: u32::from_le_bytes(input.take()?),
            payload: input.0,
        })
    }

    fn checked(self) -> Result<Self> {
        if self.message_id == 0 {
            return Err(malformed("a notification has the number 0"));
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
        out.extend_from_slice(&self.total_len.to_le_bytes());
        out.extend_from_slice(&self.offset.to_le_bytes());
        out.extend_from_slice(self.payload);
    }
}

/// Cuts one notification into fragments, one at a time, as the control channel has room.
#[derive(Debug, Clone)]
pub struct FragmentCursor {
    session: u64,
    message_id: u64,
    message: Vec<u8>,
    /// Payload bytes of a full fragment.
    capacity: usize,
    /// Offset of the next fragment; `None` when all are out.
    next: Option<u32>,
}

impl FragmentCursor {
    /// `control_bytes_max` is the peer's, from its [`Extension`](super::Extension).
    pub fn new(session: u64, message_id: u64, message: Vec<u8>, control_bytes_max: u32) -> Result<Self> {
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
        Ok(Self { session, message_id, message, capacity, next: Some(0) })
    }

    /// Fragments in all.
    pub fn count(&self) -> usize {
        self.message.len().div_ceil(self.capacity).max(1)
    }

    /// Begins again with the first fragment.
    pub fn restart(&mut self) {
        self.next = Some(0);
    }

    /// Clears `out` and writes the next fragment into it; `false` when there is none.
    pub fn next_into(&mut self, out: &mut Vec<u8>) -> bool {
        out.clear();
        let Some(offset) = self.next else { return false };
        let start = offset as usize;
        let end = (start + self.capacity).min(self.message.len());
        let fragment = Fragment {
            message_id: self.message_id,
            total_len: self.message.len() as u32,
            offset,
            payload: &self.message[start..end],
        };
        ControlMessage { session: self.session, body: Body::Fragment(fragment) }.encode_into(out);
        self.next = (end < self.message.len()).then_some(end as u32);
        true
    }
}
