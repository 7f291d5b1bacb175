//! Bytes that NIXL's own LIBFABRIC plugin has sent, of each version with a handshake: our codecs read them, write the
//! same again, and our receiver makes of them what the sender meant. `plugin-tests/e2e/test_interop_wire.py` captures
//! them.

use std::collections::HashMap;
use std::path::Path;

use nixl_libfabric::notify::{Limits, Receiver};
use nixl_libfabric::types::AgentName;
use nixl_libfabric::wire::{
    ConnectionInfo, Handshake, Immediate, PublicMetadata, StockFragment, StockFragmentCursor,
};

/// What a stock agent sent: immediate data, if it was a message or a write, and bytes.
type Event = (Option<u64>, Vec<u8>);

fn from_hex(text: &str) -> Vec<u8> {
    let digits = text.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).unwrap());
    digits.map(|pair| u8::from_str_radix(pair, 16).unwrap()).collect()
}

/// The events of each fixture, by what they are, in the order in which they came.
fn captures() -> Vec<(String, HashMap<String, Vec<Event>>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("plugin-tests/fixtures/stock-wire");
    let mut captures = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let mut events: HashMap<String, Vec<Event>> = HashMap::new();
        for line in std::fs::read_to_string(&path).unwrap().lines().filter(|line| !line.starts_with('#')) {
            let [what, immediate, bytes] = line.split(' ').collect::<Vec<_>>()[..] else {
                panic!("{}: a line of three words", path.display())
            };
            let immediate = (immediate != "-").then(|| u64::from_str_radix(immediate, 16).unwrap());
            let bytes = if bytes == "-" { Vec::new() } else { from_hex(bytes) };
            events.entry(what.to_owned()).or_default().push((immediate, bytes));
        }
        captures.push((path.file_name().unwrap().to_string_lossy().into_owned(), events));
    }
    assert!(captures.len() >= 3, "fixtures of three versions");
    captures
}

#[test]
fn connection_info_reads_and_writes_the_same() {
    for (file, events) in captures() {
        let bytes = &events["connection_info"][0].1;
        let info = ConnectionInfo::decode(bytes).unwrap();
        assert_eq!((info.endpoints.len(), info.extension), (1, None), "{file}");
        assert_eq!(&info.encode(), bytes, "{file}");
    }
}

#[test]
fn public_metadata_reads_and_writes_the_same() {
    for (file, events) in captures() {
        let bytes = &events["public_metadata"][0].1;
        let metadata = PublicMetadata::decode(bytes, 1).unwrap();
        assert_eq!(metadata.keys, [Some(metadata.addr)], "{file}: over tcp it asks for the address as key");
        assert_eq!(&metadata.encode(), bytes, "{file}");
    }
}

#[test]
fn handshakes_read_and_write_the_same() {
    for (file, events) in captures() {
        for (what, has_conn) in [("handshake_with_conn", true), ("handshake_without_conn", false)] {
            let (immediate, bytes) = &events[what][0];
            let immediate = immediate.unwrap();
            let Immediate::StockHandshake { index: 0 } = Immediate::decode(immediate).unwrap() else {
                panic!("{file}: {immediate:#x} is not a handshake's")
            };
            let handshake = Handshake::decode(bytes).unwrap();
            assert!(handshake.name.starts_with(b"stock-") && handshake.extension.is_none(), "{file}");
            assert_eq!(handshake.conn.is_some(), has_conn, "{file}");
            if let Some(conn) = &handshake.conn {
                assert_eq!(&ConnectionInfo::decode(conn).unwrap().encode(), conn, "{file}");
            }
            assert_eq!(&handshake.encode().unwrap(), bytes, "{file}");
        }
    }
}

/// The sender's name, its message, and how many writes it follows; every fragment is checked on the way.
fn notification(file: &str, events: &[Event]) -> (Vec<u8>, Vec<u8>, u32, u16) {
    let fragments: Vec<_> = events.iter().map(|(_, bytes)| StockFragment::decode(bytes).unwrap()).collect();
    for ((immediate, bytes), fragment) in events.iter().zip(&fragments) {
        let immediate = immediate.unwrap();
        let decoded = Immediate::decode(immediate).unwrap();
        let id = fragment.transfer_id;
        assert_eq!(decoded, Immediate::StockNotification { index: 7, id }, "{file}: {immediate:#x}");
        assert_eq!(u64::from(decoded.encode()), immediate, "{file}");
        let mut again = Vec::new();
        fragment.encode_into(&mut again);
        assert_eq!(&again, bytes, "{file}");
    }
    let first = fragments[0].first.unwrap();
    let mut name: Vec<u8> = fragments.iter().flat_map(|fragment| fragment.payload.to_vec()).collect();
    let message = name.split_off(first.name_len as usize);
    let id = fragments[0].transfer_id;
    let mut cursor = StockFragmentCursor::new(id, first.expected_writes, &name, &message).unwrap();
    let mut cut = Vec::new();
    for (_, bytes) in events {
        assert!(cursor.next_into(&mut cut));
        assert_eq!(&cut, bytes, "{file}: cut in another way");
    }
    assert!(cursor.is_done());
    (name, message, first.expected_writes, id)
}

#[test]
fn notifications_read_and_write_the_same() {
    for (file, events) in captures() {
        let long: Vec<u8> = (1..=250).cycle().take(9000).collect();
        for (what, text, writes) in [
            ("alone", b"alone".as_slice(), 0),
            ("long", &long, 0),
            ("write_message", b"over", 3),
            ("read_message", b"over", 0),
        ] {
            let (name, message, expected, id) = notification(&file, &events[what]);
            assert!(name.starts_with(b"stock-"), "{file}");
            assert_eq!((message.as_slice(), expected), (text, writes), "{file}: {what}");
            assert_eq!(id == 0, matches!(what, "alone" | "long"), "{file}: {what} has the number {id}");
        }
    }
}

#[test]
fn a_notification_comes_out_after_the_writes_that_were_captured() {
    let limits = Limits { notif_bytes_max: 1 << 20, pending_bytes_max: 1 << 20 };
    for (file, events) in captures() {
        let (name, message, _, number) = notification(&file, &events["write_message"]);
        let writes = &events["write_write"];
        assert_eq!(writes.len(), 3, "{file}");
        let mut receiver = Receiver::new(AgentName::from(name.as_slice()), limits);
        let fragment = StockFragment::decode(&events["write_message"][0].1).unwrap();
        assert_eq!(receiver.on_stock_fragment(&fragment).unwrap(), None, "{file}: not before the writes");
        for (at, (immediate, _)) in writes.iter().enumerate() {
            let decoded = Immediate::decode(immediate.unwrap()).unwrap();
            let Immediate::StockTransfer { index: 7, id } = decoded else { panic!("{file}: {decoded:?}") };
            assert_eq!(id, number, "{file}");
            // Only its upper four bits, a sequence that no receiver reads, may differ.
            assert_eq!(u64::from(decoded.encode()), immediate.unwrap() & 0x0fff_ffff, "{file}");
            let out = receiver.on_stock_writes(id, 1).unwrap();
            assert_eq!(out, (at == 2).then(|| message.clone()), "{file}: write {at}");
        }
    }
}
