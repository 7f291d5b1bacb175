use proptest::array;
use proptest::collection::vec;
use proptest::option::of as option;
use proptest::prelude::*;

use super::serdes::{Reader, Writer};
use super::*;
use crate::wire::blob::capability;
use crate::wire::gpu::{FILES_MAX, HANDLE_BYTES, Handle};

fn endpoint() -> impl Strategy<Value = EndpointName> {
    let len = prop_oneof![4 => 1usize..=56, 1 => 57usize..=256];
    len.prop_flat_map(|len| vec(any::<u8>(), len)).prop_map(|name| EndpointName::new(&name).unwrap())
}

fn extension() -> impl Strategy<Value = Extension> {
    any::<(u32, u64, u32, u64)>().prop_map(
        |(capabilities, incarnation, control_bytes_max, notif_bytes_max)| Extension {
            capabilities,
            incarnation,
            control_bytes_max,
            notif_bytes_max,
        },
    )
}

fn host() -> impl Strategy<Value = HostInfo> {
    any::<([u8; 16], u64, u32, u32, u64, u64, [u8; 16])>().prop_map(
        |(boot_id, pid_namespace, pid, board_fd, start_time, board_addr, nonce)| HostInfo {
            boot_id,
            pid_namespace,
            pid,
            board_fd,
            start_time,
            board_addr,
            nonce,
        },
    )
}

fn shareable() -> impl Strategy<Value = Shareable> {
    let ipc = array::uniform32(any::<u8>()).prop_map(|half| {
        let mut handle = [0; HANDLE_BYTES];
        handle[7..39].copy_from_slice(&half);
        Handle::Ipc(handle)
    });
    let files = vec(any::<(u32, u64)>(), 0..FILES_MAX).prop_map(Handle::Files);
    (any::<(u64, u64, u64)>(), prop_oneof![ipc, files]).prop_map(|((base, size, id), handle)| Shareable {
        base,
        size,
        id,
        handle,
    })
}

fn board_entry() -> impl Strategy<Value = BoardEntry> {
    (any::<u32>(), 1..=u64::MAX).prop_map(|(number, generation)| BoardEntry { number, generation })
}

fn stock_fragments(cursor: &mut StockFragmentCursor) -> Vec<Vec<u8>> {
    let mut buffer = Vec::new();
    std::iter::from_fn(|| cursor.next_into(&mut buffer).then(|| buffer.clone())).collect()
}

fn fragments(cursor: &mut FragmentCursor) -> Vec<Vec<u8>> {
    let mut buffer = Vec::new();
    std::iter::from_fn(|| cursor.next_into(&mut buffer).then(|| buffer.clone())).collect()
}

proptest! {
    #[test]
    fn connection_info_reads_back(names in vec(endpoint(), 1..40), ext in extension(), host in option(host())) {
        let info = ConnectionInfo { endpoints: names, extension: Some(ext), host };
        let mut blob = info.encode();
        blob.extend_from_slice(b"of a later version");
        prop_assert_eq!(ConnectionInfo::decode(&blob).unwrap(), info);
    }

    #[test]
    fn a_stock_reader_finds_its_part_unchanged(names in vec(endpoint(), 1..20), ext in extension(), host in host()) {
        let mut info = ConnectionInfo { endpoints: names, extension: None, host: None };
        let stock = info.encode();
        info.extension = Some(ext);
        let older = info.encode();
        prop_assert!(older.starts_with(&stock));
        info.host = Some(host);
        prop_assert!(info.encode().starts_with(&older), "as a reader of our older versions does");
    }

    #[test]
    fn metadata_reads_back(
        keys in vec(option(0..u64::MAX), 0..64),
        addr: u64,
        board in option(board_entry()),
        gpu in option(shareable()),
    ) {
        let metadata = PublicMetadata { keys, addr, board, gpu };
        let mut blob = metadata.encode();
        blob.extend_from_slice(b"of a later version");
        prop_assert_eq!(PublicMetadata::decode(&blob, metadata.keys.len()).unwrap(), metadata);
    }

    #[test]
    fn handshakes_read_back(
        index: u16,
        name in vec(any::<u8>(), 1..100),
        conn in proptest::option::of(vec(any::<u8>(), 1..4000)),
        ext in proptest::option::of((1u64.., any::<u64>(), any::<bool>(), any::<[u64; 2]>())),
    ) {
        let extension = ext.map(|(session, peer_session, answer_wanted, retired)| {
            HandshakeExtension { session, peer_session, answer_wanted, retired }
        });
        let handshake = Handshake { index, name, conn, extension };
        prop_assert_eq!(Handshake::decode(&handshake.encode().unwrap()).unwrap(), handshake);
    }

    #[test]
    fn immediates_read_back(index: u8, id: u16, peer in 0..immediate::PEERS_MAX) {
        for immediate in [
            Immediate::StockNotification { index, id },
            Immediate::StockTransfer { index, id },
            Immediate::StockHandshake { index },
            Immediate::StockFailure { index, id },
            Immediate::Control { peer },
        ] {
            prop_assert_eq!(Immediate::decode(immediate.encode().into()).unwrap(), immediate);
        }
    }

    #[test]
    fn stock_fragments_read_back(
        id: u16,
        expected: u32,
        name in vec(any::<u8>(), 0..9000),
        message in vec(any::<u8>(), 0..40_000),
    ) {
        let mut cursor = StockFragmentCursor::new(id, expected, &name, &message).unwrap();
        let count = cursor.count();
        let parts = stock_fragments(&mut cursor);
        prop_assert_eq!(parts.len(), count as usize);
        let mut joined = Vec::new();
        for (index, bytes) in parts.iter().enumerate() {
            prop_assert!(bytes.len() <= CONTROL_BYTES_MAX);
            let fragment = StockFragment::decode(bytes).unwrap();
            prop_assert_eq!((fragment.transfer_id, fragment.index as usize, fragment.count), (id, index, count));
            if let Some(first) = fragment.first {
                prop_assert_eq!(first.expected_writes, expected);
                prop_assert_eq!(first.total_len as usize, name.len() + message.len());
                prop_assert_eq!(first.name_len as usize, name.len());
            }
            joined.extend_from_slice(&fragment.payload);
        }
        prop_assert_eq!(joined, [name, message].concat());
    }

    #[test]
    fn fragments_read_back(session: u64, id in 1u64.., message in vec(any::<u8>(), 0..40_000), room in 29u32..10_000) {
        let mut cursor = FragmentCursor::new(session, id, message.clone(), room).unwrap();
        let count = cursor.count();
        let parts = fragments(&mut cursor);
        prop_assert_eq!(parts.len(), count);
        let mut joined = Vec::new();
        for bytes in &parts {
            prop_assert!(bytes.len() <= CONTROL_BYTES_MAX.min(room as usize));
            let decoded = ControlMessage::decode(bytes).unwrap();
            let ControlMessage { session: read, body: Body::Fragment(fragment) } = decoded else { panic!("a fragment") };
            prop_assert_eq!((read, fragment.message_id), (session, id));
            prop_assert_eq!(fragment.offset as usize, joined.len());
            prop_assert_eq!(fragment.total_len as usize, message.len());
            joined.extend_from_slice(fragment.payload);
        }
        prop_assert_eq!(&joined, &message);
    }

    /// Whatever a decoder takes it must be able to write, and read again as the same.
    #[test]
    fn decoders_survive_any_bytes(bytes in vec(any::<u8>(), 0..300)) {
        decode_all(&bytes);
    }

    #[test]
    fn decoders_survive_damaged_messages(
        names in vec(endpoint(), 1..4),
        ext in extension(),
        host in option(host()),
        board in option(board_entry()),
        gpu in option(shareable()),
        damage in vec((any::<proptest::sample::Index>(), any::<u8>()), 1..4),
        cut: proptest::sample::Index,
    ) {
        let conn = ConnectionInfo { endpoints: names, extension: Some(ext), host }.encode();
        let extension = Some(HandshakeExtension { session: 1, peer_session: 2, answer_wanted: true, retired: [0; 2] });
        let handshake = Handshake { index: 3, name: b"name".to_vec(), conn: Some(conn.clone()), extension };
        let metadata = PublicMetadata { keys: vec![Some(1), None], addr: 7, board, gpu };
        for mut bytes in [conn, handshake.encode().unwrap(), metadata.encode()] {
            for (at, value) in &damage {
                let at = at.index(bytes.len());
                bytes[at] = *value;
            }
            decode_all(&bytes);
            decode_all(&bytes[..cut.index(bytes.len())]);
        }
    }
}

fn decode_all(bytes: &[u8]) {
    if let Ok(info) = ConnectionInfo::decode(bytes) {
        assert_eq!(ConnectionInfo::decode(&info.encode()).unwrap(), info);
    }
    if let Ok(metadata) = PublicMetadata::decode(bytes, 2) {
        assert_eq!(PublicMetadata::decode(&metadata.encode(), 2).unwrap(), metadata);
    }
    if let Ok(handshake) = Handshake::decode(bytes) {
        assert_eq!(Handshake::decode(&handshake.encode().unwrap()).unwrap(), handshake);
    }
    if let Ok(fragment) = StockFragment::decode(bytes) {
        let mut out = Vec::new();
        fragment.encode_into(&mut out);
        assert_eq!(out, bytes);
    }
    if let Ok(message) = ControlMessage::decode(bytes) {
        let mut out = Vec::new();
        message.encode_into(&mut out);
        assert_eq!(ControlMessage::decode(&out).unwrap(), message);
    }
}

fn info(rails: usize) -> ConnectionInfo {
    ConnectionInfo { endpoints: vec![EndpointName::new(b"ep").unwrap(); rails], extension: None, host: None }
}

#[test]
fn connection_info_has_the_stock_bytes() {
    let mut want = b"nixlSerDes|num_rails\x01\0\0\0\0\0\0\x001|dest_data_ep_0\x38\0\0\0\0\0\0\0ep".to_vec();
    want.resize(want.len() + 54, 0);
    want.push(b'|');
    assert_eq!(info(1).encode(), want);
}

#[test]
fn fragments_have_the_stock_bytes() {
    let mut cursor = StockFragmentCursor::new(0x0102, 5, b"me", b"hi").unwrap();
    let want = b"\x02\x01\0\0\x01\0\x04\0\0\0\x04\0\0\0\x05\0\0\0\x02\0mehi";
    assert_eq!(stock_fragments(&mut cursor), [want.to_vec()]);
}

#[test]
fn the_word_of_a_failed_transfer_has_the_stock_bytes() {
    assert_eq!(Immediate::decode(0x0123_4ab1).unwrap(), Immediate::StockFailure { index: 0xab, id: 0x1234 });
    assert_eq!(stock::final_writes(b"\x05\0\0\x80").unwrap(), 0x8000_0005);
    assert_eq!(stock::final_writes(b"\xff\xff\xff\xffmore").unwrap(), u32::MAX);
    assert!(stock::final_writes(b"\x05\0\0").unwrap_err().to_string().contains("3 bytes"));
}

#[test]
fn a_handshake_of_another_version_is_refused_by_name_and_version() {
    let mut writer = Writer::new();
    writer.field("ver", &2u16.to_le_bytes());
    let bare = Handshake::decode(&writer.clone().finish()).unwrap_err().to_string();
    assert!(bare.contains("version 2"), "{bare}");
    writer.field("name", b"prefill-0");
    writer.field("has_conn", &[0]);
    let words = Handshake::decode(&writer.finish()).unwrap_err().to_string();
    assert!(words.contains("agent prefill-0") && words.contains("version 2"), "{words}");
}

#[test]
fn immediates_have_the_stock_bits() {
    assert_eq!(Immediate::StockTransfer { index: 0xab, id: 0x1234 }.encode(), 0x0123_4ab4);
    assert_eq!(Immediate::StockNotification { index: 1, id: 0 }.encode(), 0x12);
    assert_eq!(Immediate::StockHandshake { index: 0 }.encode(), 0x8);
    // The sequence bits, which receivers do not use, may hold anything.
    assert_eq!(Immediate::decode(0xf000_0004).unwrap(), Immediate::StockTransfer { index: 0, id: 0 });
    for unknown in [0, 3, 0xf, 1 << 32 | 4] {
        assert!(Immediate::decode(unknown).is_err(), "{unknown:#x}");
    }
}

#[test]
fn rail_counts_are_bounded() {
    assert_eq!(ConnectionInfo::decode(&info(RAILS_MAX).encode()).unwrap().endpoints.len(), RAILS_MAX);
    assert!(ConnectionInfo::decode(&info(RAILS_MAX + 1).encode()).is_err());
    for count in ["0", "-1", "+1", "", "99999999999999", "1 ", "1025"] {
        let mut writer = Writer::new();
        writer.field("num_rails", count.as_bytes());
        assert!(ConnectionInfo::decode(&writer.finish()).is_err(), "{count}");
    }
}

#[test]
fn the_largest_connection_info_fits() {
    let ext = Extension { capabilities: 0, incarnation: 0, control_bytes_max: 0, notif_bytes_max: 0 };
    let endpoints = vec![EndpointName::new(&[1; 256]).unwrap(); RAILS_MAX];
    let info = ConnectionInfo { endpoints, extension: Some(ext), host: None };
    assert_eq!(ConnectionInfo::decode(&info.encode()).unwrap(), info);
}

#[test]
fn a_later_version_of_an_extension_means_the_stock_wire() {
    let mut writer = Writer::new();
    writer.field("num_rails", b"1");
    writer.field("dest_data_ep_0", &[0; 56]);
    writer.field("nlf_ext", &2u16.to_le_bytes());
    assert_eq!(ConnectionInfo::decode(&writer.finish()).unwrap().extension, None);
}

#[test]
fn a_longer_extension_of_our_version_is_read() {
    let ext = Extension {
        capabilities: capability::WIRE_V2,
        incarnation: 5,
        control_bytes_max: 6,
        notif_bytes_max: 7,
    };
    let blob = ConnectionInfo { extension: Some(ext), ..info(1) }.encode();
    let mut reader = Reader::new(&blob).unwrap();
    let count = reader.field("num_rails").unwrap();
    let name = reader.field("dest_data_ep_0").unwrap();
    let longer = [reader.field("nlf_ext").unwrap(), b"more"].concat();
    let mut writer = Writer::new();
    writer.field("num_rails", count);
    writer.field("dest_data_ep_0", name);
    writer.field("nlf_ext", &longer);
    let read = ConnectionInfo::decode(&writer.finish()).unwrap().extension.unwrap();
    assert_eq!(read, ext);
    assert!(read.speaks_v2());
}

#[test]
fn a_field_longer_than_the_blob_is_refused() {
    for len in [5u64, 100, u64::MAX, u64::MAX - 1, 1 << 63] {
        let blob = [b"nixlSerDes|tag".as_slice(), &len.to_le_bytes(), b"abcd|"].concat();
        assert!(Reader::new(&blob).unwrap().field("tag").is_err(), "{len}");
    }
}

#[test]
fn a_handshake_that_does_not_fit_is_refused_by_its_writer() {
    let handshake = Handshake { index: 0, name: vec![b'n'; 8192], conn: None, extension: None };
    assert!(handshake.encode().unwrap_err().to_string().contains("8192"));
}

#[test]
fn fragments_that_contradict_themselves_are_refused() {
    let good = |index: u16, count: u16, len: u32, total: u32, name: u16, payload: &[u8]| {
        let mut bytes = [0u16.to_le_bytes(), index.to_le_bytes(), count.to_le_bytes()].concat();
        bytes.extend_from_slice(&len.to_le_bytes());
        if index == 0 {
            bytes.extend_from_slice(&total.to_le_bytes());
            bytes.extend_from_slice(&0u32.to_le_bytes());
            bytes.extend_from_slice(&name.to_le_bytes());
        }
        bytes.extend_from_slice(payload);
        StockFragment::decode(&bytes).is_ok()
    };
    assert!(good(0, 1, 4, 4, 2, b"mehi"));
    assert!(good(1, 2, 2, 0, 0, b"hi"));
    assert!(!good(0, 0, 4, 4, 2, b"mehi"), "no fragments");
    assert!(!good(2, 2, 2, 0, 0, b"hi"), "index beyond count");
    assert!(!good(0, 1, 5, 4, 2, b"mehi"), "length of another size");
    assert!(!good(0, 1, 4, 5, 2, b"mehi"), "total of another size");
    assert!(!good(0, 1, 4, 4, 5, b"mehi"), "name longer than all");
    assert!(!good(0, 3, 4, 5, 2, b"mehi"), "no byte for the third");
    assert!(!good(1, 2, 0, 0, 0, b""), "empty second");
}
