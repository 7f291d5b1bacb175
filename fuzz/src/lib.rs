//! What is fuzzed: each function takes any bytes and panics where a promise of `nixl_libfabric::wire` or
//! `nixl_libfabric::notify` is broken.

use nixl_libfabric::notify::{Limits, Receiver};
use nixl_libfabric::wire::{
    CONTROL_BYTES_MAX, ConnectionInfo, ControlMessage, Fragment, Handshake, Immediate, PublicMetadata,
    RAILS_MAX, StockFragment,
};

/// Whatever is read is written and read again as the same.
pub fn connection_info(data: &[u8]) {
    let Ok(info) = ConnectionInfo::decode(data) else { return };
    assert!((1..=RAILS_MAX).contains(&info.endpoints.len()));
    assert_eq!(ConnectionInfo::decode(&info.encode()).unwrap(), info);
}

/// The first byte is the number of rails.
pub fn public_metadata(data: &[u8]) {
    let Some((&rails, blob)) = data.split_first() else { return };
    let Ok(metadata) = PublicMetadata::decode(blob, rails.into()) else { return };
    assert_eq!(metadata.keys.len(), rails.into());
    assert_eq!(PublicMetadata::decode(&metadata.encode(), rails.into()).unwrap(), metadata);
}

/// Reads handshakes, and the connection info in them.
pub fn handshake(data: &[u8]) {
    let Ok(handshake) = Handshake::decode(data) else { return };
    if let Some(conn) = &handshake.conn {
        connection_info(conn);
    }
    // What was read may be longer than what may be sent.
    if let Ok(bytes) = handshake.encode() {
        assert!(bytes.len() <= CONTROL_BYTES_MAX);
        assert_eq!(Handshake::decode(&bytes).unwrap(), handshake);
    }
}

/// Eight bytes, as libfabric hands immediates over.
pub fn immediate(data: &[u8]) {
    let Some(bytes) = data.first_chunk() else { return };
    let Ok(immediate) = Immediate::decode(u64::from_le_bytes(*bytes)) else { return };
    assert_eq!(Immediate::decode(immediate.encode().into()).unwrap(), immediate);
}

/// A fragment that is read has nothing that writing would lose.
pub fn stock_fragment(data: &[u8]) {
    let Ok(fragment) = StockFragment::decode(data) else { return };
    let mut bytes = Vec::new();
    fragment.encode_into(&mut bytes);
    assert_eq!(bytes, data);
}

/// Control messages of version 2.
pub fn control_message(data: &[u8]) {
    let Ok(message) = ControlMessage::decode(data) else { return };
    let mut bytes = Vec::new();
    message.encode_into(&mut bytes);
    assert_eq!(ControlMessage::decode(&bytes).unwrap(), message);
}

/// A peer that sends what it likes: the receiver stays within its limits, and delivers nothing above them.
///
/// Each step is a byte that says what comes, and what that needs, from the bytes that follow.
pub fn receiver(data: &[u8]) {
    const LIMITS: Limits = Limits { notif_bytes_max: 300, pending_bytes_max: 4000 };
    let mut receiver = Receiver::new("peer".into(), LIMITS);
    let mut input = Input(data);
    while let Some(kind) = input.byte() {
        let out = match kind % 4 {
            0 => receiver.on_stock_writes(input.number() as u16, input.number() as u32).unwrap_or(None),
            1 => {
                let _ = receiver.on_stock_failed(input.number() as u16, input.number() as u32);
                None
            }
            2 => {
                let numbers = [input.number(), input.number(), input.number()];
                let mut bytes = numbers.map(|number| (number as u16).to_le_bytes()).concat();
                let first = bytes[2..4] == [0, 0];
                let (total, expected, name) =
                    (input.number() as u32, input.number() as u32, input.number() as u16);
                let payload = input.slice();
                bytes.extend((payload.len() as u32).to_le_bytes());
                if first {
                    bytes.extend(total.to_le_bytes());
                    bytes.extend(expected.to_le_bytes());
                    bytes.extend(name.to_le_bytes());
                }
                bytes.extend(payload);
                let fragment = StockFragment::decode(&bytes);
                fragment.and_then(|fragment| receiver.on_stock_fragment(&fragment)).unwrap_or(None)
            }
            _ => {
                let fragment = Fragment {
                    message_id: input.number(),
                    total_len: input.number() as u32,
                    offset: input.number() as u32,
                    payload: input.slice(),
                };
                let mut bytes = Vec::new();
                let body = nixl_libfabric::wire::Body::Fragment(fragment);
                ControlMessage { session: 1, body }.encode_into(&mut bytes);
                // Only what the decoder lets pass reaches the receiver.
                ControlMessage::decode(&bytes).and_then(|_| receiver.on_fragment(&fragment)).unwrap_or(None)
            }
        };
        assert!(out.is_none_or(|message| message.len() as u64 <= LIMITS.notif_bytes_max));
        assert!(receiver.buffered_bytes() <= LIMITS.pending_bytes_max);
    }
}

struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (&byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(byte)
    }

    /// A number of any size; half of them are small ones, which meet each other again and again.
    fn number(&mut self) -> u64 {
        let kind = self.byte().unwrap_or(0);
        let bytes = match kind % 8 {
            0..=3 => return (kind >> 5).into(),
            4 | 5 => 1,
            6 => 2,
            _ => 8,
        };
        (0..bytes).fold(0, |number, _| number << 8 | u64::from(self.byte().unwrap_or(0xff)))
    }

    fn slice(&mut self) -> &'a [u8] {
        let len = self.byte().unwrap_or(0) as usize;
        let (head, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        head
    }
}
