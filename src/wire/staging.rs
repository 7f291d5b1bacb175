//! Messages by which one agent moves data in and out of another's GPU memory through host memory.
//! WIRE.md, "Kind 2, staging".

use super::blob::Bytes;
use super::serdes::malformed;
use crate::error::Result;

const ASK: u8 = 1;
const LEND: u8 = 2;
const COPY: u8 = 3;
const COPIED: u8 = 4;
const COPY_RANGES: u8 = 5;

/// Most ranges of one copy.
pub const COPY_RANGES_MAX: usize = 64;
/// Bytes of an agent's longest message about a copy: the header of control messages, its own fields, the ranges.
pub const COPY_BYTES_MAX: u32 = 12 + 16 + (COPY_RANGES_MAX * RANGE_BYTES) as u32;
/// u64 address, u32 length.
const RANGE_BYTES: usize = 12;

/// Longest error text, in bytes; what is longer is cut.
const TEXT_BYTES_MAX: usize = 1024;

/// A message about staging.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Staging<'a> {
    /// Lend me host memory of yours.
    Ask,
    /// Host memory for the receiver alone: slots that lie one behind the other in one region.
    Lend {
        /// Bytes of a slot.
        slot_bytes: u32,
        /// Number of slots; 0 if there is no memory to lend.
        slots: u16,
        /// The region, as [`PublicMetadata`](super::PublicMetadata).
        region: &'a [u8],
    },
    /// Copy between a slot and GPU memory of yours.
    Copy {
        /// The sender's number for it, which comes back.
        ticket: u64,
        /// Which slot, from its beginning.
        slot: u16,
        /// From the slot into GPU memory; else the other way.
        into_memory: bool,
        /// Address in GPU memory.
        addr: u64,
        /// Bytes.
        len: u32,
    },
    /// The same with many ranges of GPU memory, which lie one behind the other from the beginning of the slot on, over
    /// as many slots as it takes. For agents that say so ([`STAGED_RANGES`](super::blob::capability::STAGED_RANGES)).
    CopyRanges {
        /// The sender's number for it, which comes back.
        ticket: u64,
        /// The first slot.
        slot: u16,
        /// From the slots into GPU memory; else the other way.
        into_memory: bool,
        /// Between 1 and [`COPY_RANGES_MAX`].
        ranges: Ranges<'a>,
    },
    /// A copy is over.
    Copied {
        /// Its number.
        ticket: u64,
        /// Why it failed, as text; empty if it did not.
        error: &'a [u8],
    },
}

/// Ranges of memory, as they stand in a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ranges<'a>(&'a [u8]);

impl<'a> Ranges<'a> {
    fn decode(bytes: &'a [u8]) -> Option<Self> {
        let count = bytes.len() / RANGE_BYTES;
        ((1..=COPY_RANGES_MAX).contains(&count) && bytes.len().is_multiple_of(RANGE_BYTES))
            .then_some(Self(bytes))
    }

    /// Clears `bytes` and writes ranges of memory into it, [`COPY_RANGES_MAX`] at most, for a message.
    pub fn encode(ranges: impl Iterator<Item = (u64, u32)>, bytes: &'a mut Vec<u8>) -> Self {
        bytes.clear();
        for (addr, len) in ranges.take(COPY_RANGES_MAX) {
            bytes.extend_from_slice(&addr.to_le_bytes());
            bytes.extend_from_slice(&len.to_le_bytes());
        }
        Self(bytes)
    }

    /// Address and bytes of each.
    pub fn iter(self) -> impl Iterator<Item = (u64, u32)> + 'a {
        let mut rest = Bytes(self.0);
        std::iter::from_fn(move || {
            let addr = u64::from_le_bytes(rest.take()?);
            Some((addr, u32::from_le_bytes(rest.take()?)))
        })
    }
}

impl<'a> Staging<'a> {
    pub(super) fn decode(input: &mut Bytes<'a>) -> Result<Self> {
        let cut = || malformed("a staging message is cut short");
        let [kind, ..] = input.take::<4>().ok_or_else(cut)?;
        let message = match kind {
            ASK => Some(Self::Ask),
            LEND => Self::decode_lend(input),
            COPY => Self::decode_copy(input),
            COPY_RANGES => Self::decode_copy_ranges(input),
            COPIED => {
                input.take().map(|ticket| Self::Copied { ticket: u64::from_le_bytes(ticket), error: input.0 })
            }
            kind => return Err(malformed(format!("a staging message has the unknown kind {kind}"))),
        };
        message.ok_or_else(cut)
    }

    fn decode_lend(input: &mut Bytes<'a>) -> Option<Self> {
        let slot_bytes = u32::from_le_bytes(input.take()?);
        let slots = u16::from_le_bytes(input.take()?);
        Some(Self::Lend { slot_bytes, slots, region: input.0 })
    }

    fn decode_copy(input: &mut Bytes<'a>) -> Option<Self> {
        Some(Self::Copy {
            ticket: u64::from_le_bytes(input.take()?),
            addr: u64::from_le_bytes(input.take()?),
            len: u32::from_le_bytes(input.take()?),
            slot: u16::from_le_bytes(input.take()?),
            into_memory: input.take::<1>()? != [0],
        })
    }

    fn decode_copy_ranges(input: &mut Bytes<'a>) -> Option<Self> {
        let ticket = u64::from_le_bytes(input.take()?);
        let slot = u16::from_le_bytes(input.take()?);
        let [into_memory, _] = input.take()?;
        let ranges = Ranges::decode(input.0)?;
        Some(Self::CopyRanges { ticket, slot, into_memory: into_memory != 0, ranges })
    }

    pub(super) fn encode_into(&self, out: &mut Vec<u8>) {
        let kind = match self {
            Self::Ask => ASK,
            Self::Lend { .. } => LEND,
            Self::Copy { .. } => COPY,
            Self::CopyRanges { .. } => COPY_RANGES,
            Self::Copied { .. } => COPIED,
        };
        out.extend_from_slice(&[kind, 0, 0, 0]);
        match *self {
            Self::Ask => {}
            Self::Lend { slot_bytes, slots, region } => {
                out.extend_from_slice(&slot_bytes.to_le_bytes());
                out.extend_from_slice(&slots.to_le_bytes());
                out.extend_from_slice(region);
            }
            Self::Copy { ticket, slot, into_memory, addr, len } => {
                out.extend_from_slice(&ticket.to_le_bytes());
                out.extend_from_slice(&addr.to_le_bytes());
                out.extend_from_slice(&len.to_le_bytes());
                out.extend_from_slice(&slot.to_le_bytes());
                out.push(into_memory.into());
            }
            Self::CopyRanges { ticket, slot, into_memory, ranges } => {
                out.extend_from_slice(&ticket.to_le_bytes());
                out.extend_from_slice(&slot.to_le_bytes());
                out.extend_from_slice(&[into_memory.into(), 0]);
                out.extend_from_slice(ranges.0);
            }
            Self::Copied { ticket, error } => {
                out.extend_from_slice(&ticket.to_le_bytes());
                out.extend_from_slice(&error[..error.len().min(TEXT_BYTES_MAX)]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn round_trip(message: Staging<'_>) {
        let mut out = Vec::new();
        message.encode_into(&mut out);
        assert_eq!(Staging::decode(&mut Bytes(&out)).unwrap(), message);
        for len in 0..out.len() {
            // Cut short it is an error or another message, never a panic.
            let _ = Staging::decode(&mut Bytes(&out[..len]));
        }
    }

    proptest! {
        #[test]
        fn messages_read_back(
            (ticket, addr, len) in any::<(u64, u64, u32)>(),
            (slot, into_memory) in any::<(u16, bool)>(),
            text in vec(any::<u8>(), 0..200),
            ranges in vec(any::<(u64, u32)>(), 1..=COPY_RANGES_MAX),
        ) {
            round_trip(Staging::Ask);
            round_trip(Staging::Lend { slot_bytes: len, slots: slot, region: &text });
            round_trip(Staging::Copy { ticket, slot, into_memory, addr, len });
            round_trip(Staging::Copied { ticket, error: &text });
            let mut bytes = Vec::new();
            let encoded = Ranges::encode(ranges.iter().copied(), &mut bytes);
            prop_assert_eq!(encoded.iter().collect::<Vec<_>>(), ranges);
            round_trip(Staging::CopyRanges { ticket, slot, into_memory, ranges: encoded });
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in vec(any::<u8>(), 0..64)) {
            let _ = Staging::decode(&mut Bytes(&bytes));
        }

        #[test]
        fn ranges_in_part_none_or_too_many_are_refused(bytes in vec(any::<u8>(), 0..1000)) {
            let mut message = vec![COPY_RANGES, 0, 0, 0];
            message.resize(16, 1);
            message.extend_from_slice(&bytes);
            let whole = bytes.len() % RANGE_BYTES == 0 && (1..=COPY_RANGES_MAX).contains(&(bytes.len() / RANGE_BYTES));
            prop_assert_eq!(Staging::decode(&mut Bytes(&message)).is_ok(), whole);
        }
    }
}
