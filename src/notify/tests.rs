use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use super::*;
use crate::wire::{Body, ControlMessage, FragmentCursor, StockFragmentCursor};

const NAME: &str = "peer";
const LIMITS: Limits = Limits { notif_bytes_max: 1 << 20, pending_bytes_max: 1 << 30 };

fn receiver() -> Receiver {
    Receiver::new(NAME.into(), LIMITS)
}

/// What the network delivers.
#[derive(Debug, Clone)]
enum Event {
    Write(u64),
    Fragment(Vec<u8>),
}

fn stock_fragments(id: u16, expected: u32, message: &[u8]) -> Vec<Vec<u8>> {
    let mut cursor = StockFragmentCursor::new(id, expected, NAME.as_bytes(), message).unwrap();
    let mut buffer = Vec::new();
    std::iter::from_fn(|| cursor.next_into(&mut buffer).then(|| buffer.clone())).collect()
}

fn fragments(id: u64, message: &[u8], control_bytes_max: u32) -> Vec<Vec<u8>> {
    let mut cursor = FragmentCursor::new(1, id, message.to_vec(), control_bytes_max).unwrap();
    let mut buffer = Vec::new();
    std::iter::from_fn(|| cursor.next_into(&mut buffer).then(|| buffer.clone())).collect()
}

fn on_stock(receiver: &mut Receiver, bytes: &[u8]) -> Result<Option<Vec<u8>>> {
    receiver.on_stock_fragment(&StockFragment::decode(bytes)?)
}

fn on_v2(receiver: &mut Receiver, bytes: &[u8]) -> Result<Option<Vec<u8>>> {
    match ControlMessage::decode(bytes)?.body {
        Body::Fragment(fragment) => receiver.on_fragment(&fragment),
        other @ Body::Staging(_) => panic!("{other:?}"),
    }
}

/// A message that no other transfer has.
fn message(id: u64, len: usize) -> Vec<u8> {
    id.to_le_bytes().into_iter().cycle().take(len).chain(id.to_le_bytes()).collect()
}

/// Puts `events` into the order of `keys`, and then some of them again.
fn shuffled(mut events: Vec<Event>, keys: &[Index], again: &[Index]) -> Vec<Event> {
    for at in (1..events.len()).rev() {
        let other = keys[at % keys.len()].index(at + 1);
        events.swap(at, other);
    }
    for repeat in again {
        let copy = events[repeat.index(events.len())].clone();
        if matches!(copy, Event::Fragment(_)) {
            events.push(copy);
        }
    }
    events
}

/// Lets everything arrive and checks each delivery: once, whole, after the transfer's writes.
fn run(
    receiver: &mut Receiver,
    events: &[Event],
    expected: &BTreeMap<Vec<u8>, (u64, u32)>,
    stock: bool,
) -> BTreeMap<Vec<u8>, u32> {
    let mut writes: BTreeMap<u64, u32> = BTreeMap::new();
    let mut delivered: BTreeMap<Vec<u8>, u32> = BTreeMap::new();
    for event in events {
        let out = match event {
            Event::Write(id) => {
                *writes.entry(*id).or_default() += 1;
                receiver.on_stock_writes(*id as u16, 1).unwrap()
            }
            // A stock fragment that comes twice is refused; one of ours is passed over.
            Event::Fragment(bytes) if stock => on_stock(receiver, bytes).unwrap_or(None),
            Event::Fragment(bytes) => on_v2(receiver, bytes).unwrap(),
        };
        if let Some(message) = out {
            let (id, expected) = expected[&message];
            assert!(writes.get(&id).copied().unwrap_or(0) >= expected, "transfer {id} is early");
            *delivered.entry(message).or_default() += 1;
        }
    }
    delivered
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn ours_come_once_and_whole(
        lens in vec(0usize..400, 1..40),
        keys in vec(any::<Index>(), 64),
        again in vec(any::<Index>(), 0..5),
    ) {
        let mut events = Vec::new();
        let mut expected = BTreeMap::new();
        for (at, len) in lens.into_iter().enumerate() {
            let id = at as u64 + 1;
            let text = message(id, len);
            events.extend(fragments(id, &text, 100).into_iter().map(Event::Fragment));
            expected.insert(text, (0, 0));
        }
        // A fragment may be seen twice while its notification is unfinished.
        let events = shuffled(events, &keys, &[]);
        let mut repeated = Vec::new();
        for (at, event) in events.iter().enumerate() {
            repeated.push(event.clone());
            let id = |event: &Event| match event {
                Event::Fragment(bytes) => bytes[12..20].to_vec(),
                Event::Write(_) => unreachable!("there are none"),
            };
            let unfinished = events[at + 1..].iter().any(|other| id(other) == id(event));
            if unfinished && again.iter().any(|index| index.index(events.len()) == at) {
                repeated.push(event.clone());
            }
        }
        let mut receiver = receiver();
        let delivered = run(&mut receiver, &repeated, &expected, false);
        prop_assert_eq!(delivered.len(), expected.len());
        prop_assert!(delivered.values().all(|count| *count == 1));
        prop_assert_eq!(receiver.buffered_bytes(), 0);
    }

    #[test]
    fn stock_delivers_once_whole_and_after_the_writes(
        transfers in vec((0u32..8, prop_oneof![0usize..50, 8000usize..30_000]), 1..20),
        first: u16,
        keys in vec(any::<Index>(), 64),
        again in vec(any::<Index>(), 0..5),
    ) {
        let mut events = Vec::new();
        let mut expected = BTreeMap::new();
        let mut ids = StockIds::starting_at(first);
        for (writes, len) in transfers {
            let id = ids.allocate().unwrap();
            let text = message(id.into(), len);
            events.extend(stock_fragments(id, writes, &text).into_iter().map(Event::Fragment));
            events.extend((0..writes).map(|_| Event::Write(id.into())));
            expected.insert(text, (u64::from(id), writes));
        }
        // Repeats only while a notification is unfinished: afterwards the stock wire cannot tell it from a new one.
        let events = shuffled(events, &keys, &[]);
        let mut receiver = receiver();
        let mut repeated = Vec::new();
        for (at, event) in events.iter().enumerate() {
            repeated.push(event.clone());
            if again.iter().any(|index| index.index(events.len()) == at) && is_unfinished(event, &events[at + 1..]) {
                repeated.push(event.clone());
            }
        }
        let delivered = run(&mut receiver, &repeated, &expected, true);
        prop_assert_eq!(delivered.len(), expected.len());
        prop_assert!(delivered.values().all(|count| *count == 1));
        prop_assert_eq!(receiver.buffered_bytes(), 0);
    }

    #[test]
    fn stock_notifications_without_a_number_interleave(
        lens in proptest::collection::btree_set(1usize..12, 1..8),
        keys in vec(any::<Index>(), 64),
    ) {
        let mut expected = BTreeMap::new();
        let mut events = Vec::new();
        for len in lens {
            let text = message(len as u64, len * 8182);
            events.extend(stock_fragments(0, 0, &text).into_iter().map(Event::Fragment));
            expected.insert(text, (0, 0));
        }
        let mut receiver = receiver();
        let delivered = run(&mut receiver, &shuffled(events, &keys, &[]), &expected, true);
        prop_assert_eq!(delivered.len(), expected.len());
        prop_assert_eq!(receiver.buffered_bytes(), 0);
    }

    #[test]
    fn hostile_peers_stay_within_their_budget(
        events in vec((0u8..4, number(), number(), number(), 0usize..100, number(), number()), 0..300),
    ) {
        let limits = Limits { notif_bytes_max: 200, pending_bytes_max: 3000 };
        let mut receiver = Receiver::new(NAME.into(), limits);
        for (kind, id, index, count, len, total, offset) in events {
            let payload = vec![1; len];
            let mut bytes = Vec::new();
            let out = match kind {
                0 => receiver.on_stock_writes(id as u16, total as u32).unwrap_or(None),
                1 => {
                    let _ = receiver.on_stock_failed(id as u16, total as u32);
                    None
                }
                2 => {
                    bytes.extend([id, index, count].map(|number| (number as u16).to_le_bytes()).concat());
                    bytes.extend((len as u32).to_le_bytes());
                    if index as u16 == 0 {
                        bytes.extend((total as u32).to_le_bytes());
                        bytes.extend((offset as u32).to_le_bytes());
                        bytes.extend((NAME.len() as u16).to_le_bytes());
                    }
                    bytes.extend(&payload);
                    on_stock(&mut receiver, &bytes).unwrap_or(None)
                }
                _ => {
                    let (total_len, offset) = (total as u32, offset as u32);
                    let fragment = Fragment { message_id: id, total_len, offset, payload: &payload };
                    ControlMessage { session: 1, body: Body::Fragment(fragment) }.encode_into(&mut bytes);
                    if ControlMessage::decode(&bytes).is_ok() { on_v2(&mut receiver, &bytes).unwrap_or(None) } else { None }
                }
            };
            prop_assert!(out.is_none_or(|message| message.len() <= 200));
            prop_assert!(receiver.buffered_bytes() <= 3000);
        }
    }
}

/// Numbers of any size, most of which meet each other again and again, or lie at an end of their range.
fn number() -> impl Strategy<Value = u64> {
    let edge = |bits: u32| (1u64 << (bits - 1)).wrapping_mul(2).wrapping_sub(1);
    prop_oneof![
        8 => 0u64..8,
        4 => 0u64..300,
        1 => any::<u64>(),
        2 => (prop_oneof![Just(8), Just(16), Just(31), Just(32), Just(63), Just(64)], 0u64..3)
            .prop_map(move |(bits, below)| edge(bits).wrapping_sub(below)),
    ]
}

/// Whether something of the same notification is still to come.
fn is_unfinished(event: &Event, rest: &[Event]) -> bool {
    let id = |event: &Event| match event {
        Event::Fragment(bytes) => u64::from(u16::from_le_bytes([bytes[0], bytes[1]])),
        Event::Write(id) => *id,
    };
    matches!(event, Event::Fragment(_)) && rest.iter().any(|other| id(other) == id(event))
}

/// Everything of a transfer that failed after `arrived` writes, in the order of `keys`.
fn failed_transfer(receiver: &mut Receiver, id: u16, arrived: u32, keys: &[Index]) {
    const WORD: u64 = u64::MAX;
    let text = message(id.into(), 20_000);
    let mut events: Vec<_> =
        stock_fragments(id, arrived + 3, &text).into_iter().map(Event::Fragment).collect();
    events.extend((0..arrived).map(|_| Event::Write(id.into())));
    events.push(Event::Write(WORD));
    for event in shuffled(events, keys, &[]) {
        let out = match event {
            Event::Write(WORD) => receiver.on_stock_failed(id, arrived).map(|()| None),
            Event::Write(_) => receiver.on_stock_writes(id, 1),
            Event::Fragment(bytes) => on_stock(receiver, &bytes),
        };
        assert!(out.is_err() || out == Ok(None), "the notification of a failed transfer came out");
    }
}

proptest! {
    #[test]
    fn a_failed_stock_transfer_has_no_notification_and_leaves_nothing(
        id in 1u16..,
        arrived in 0u32..20,
        keys in vec(any::<Index>(), 64),
    ) {
        let mut receiver = receiver();
        failed_transfer(&mut receiver, id, arrived, &keys);
        prop_assert_eq!(receiver.buffered_bytes(), 0);
        // The next use of the number waits for its own writes.
        let text = message(7, 10);
        prop_assert_eq!(on_stock(&mut receiver, &stock_fragments(id, 1, &text)[0]), Ok(None));
        prop_assert_eq!(receiver.on_stock_writes(id, 1), Ok(Some(text)));
    }
}

#[test]
fn words_of_failed_transfers_take_bounded_memory() {
    let mut receiver = receiver();
    let refused = (1..2000).filter(|&id| receiver.on_stock_failed(id, u32::MAX).is_err()).count();
    assert!((900..1100).contains(&refused), "{refused}");
    assert!(receiver.on_stock_failed(0, 0).is_err(), "a number that stand-alone notifications have");
}

#[test]
fn a_count_left_by_writes_without_notification_is_forgotten_when_its_number_returns() {
    let mut receiver = receiver();
    // A whole turn of transfers of two writes each, none with a notification.
    for id in 1..=u16::MAX {
        for _ in 0..2 {
            assert_eq!(receiver.on_stock_writes(id, 1).unwrap(), None);
        }
    }
    let [bytes] = &stock_fragments(5, 2, b"after two")[..] else { panic!("one fragment") };
    assert_eq!(receiver.on_stock_writes(5, 1).unwrap(), None);
    assert_eq!(on_stock(&mut receiver, bytes).unwrap(), None, "one of two writes has arrived");
    assert_eq!(receiver.on_stock_writes(5, 1).unwrap(), Some(b"after two".to_vec()));
}

#[test]
fn a_notification_whose_writes_never_came_makes_way_when_its_number_returns() {
    let mut receiver = receiver();
    assert_eq!(on_stock(&mut receiver, &stock_fragments(9, 3, b"lost")[0]).unwrap(), None);
    for id in 10..60_000 {
        receiver.on_stock_writes(id, 1).unwrap();
    }
    receiver.on_stock_writes(9, 1).unwrap();
    assert_eq!(on_stock(&mut receiver, &stock_fragments(9, 1, b"new")[0]).unwrap(), Some(b"new".to_vec()));
    assert_eq!(receiver.buffered_bytes(), 0);
}

#[test]
fn a_stand_alone_notification_ages_nothing() {
    let mut receiver = receiver();
    receiver.on_stock_writes(30_000, 1).unwrap();
    receiver.on_stock_writes(32_769, 1).unwrap();
    on_stock(&mut receiver, &stock_fragments(0, 0, b"alone")[0]).unwrap();
    let out = on_stock(&mut receiver, &stock_fragments(30_000, 1, b"soon after")[0]).unwrap();
    assert_eq!(out, Some(b"soon after".to_vec()));
}

#[test]
fn stock_messages_of_equal_length_are_told_apart_by_their_order() {
    let [a, b] = [message(1, 9000), message(2, 9000)];
    let (left, right) = (stock_fragments(0, 0, &a), stock_fragments(0, 0, &b));
    let mut receiver = receiver();
    let mut out = Vec::new();
    for at in 0..left.len() {
        out.extend(on_stock(&mut receiver, &left[at]).unwrap());
        out.extend(on_stock(&mut receiver, &right[at]).unwrap());
    }
    assert_eq!(out, [a, b]);
}

#[test]
fn a_stock_transfer_may_have_number_zero() {
    let mut receiver = receiver();
    assert_eq!(on_stock(&mut receiver, &stock_fragments(0, 2, b"wrapped")[0]).unwrap(), None);
    assert_eq!(
        on_stock(&mut receiver, &stock_fragments(0, 0, b"alone")[0]).unwrap(),
        Some(b"alone".to_vec())
    );
    assert_eq!(receiver.on_stock_writes(0, 1).unwrap(), None);
    assert_eq!(receiver.on_stock_writes(0, 1).unwrap(), Some(b"wrapped".to_vec()));
    assert_eq!(receiver.buffered_bytes(), 0);
}

#[test]
fn a_notification_in_somebody_elses_name_is_dropped() {
    let mut receiver = Receiver::new("other".into(), LIMITS);
    let words = on_stock(&mut receiver, &stock_fragments(0, 0, b"hi")[0]).unwrap_err().to_string();
    assert!(words.contains("other") && words.contains(NAME), "{words}");
}

#[test]
fn an_empty_message_comes_out() {
    let mut receiver = receiver();
    assert_eq!(on_v2(&mut receiver, &fragments(1, b"", 100)[0]).unwrap(), Some(Vec::new()));
    assert_eq!(receiver.buffered_bytes(), 0);
}

#[test]
fn writes_that_come_together_count_as_many() {
    let mut receiver = receiver();
    assert_eq!(on_stock(&mut receiver, &stock_fragments(7, 5, b"five")[0]).unwrap(), None);
    assert_eq!(receiver.on_stock_writes(7, 4).unwrap(), None);
    assert_eq!(receiver.on_stock_writes(7, 1).unwrap(), Some(b"five".to_vec()));
}

#[test]
fn a_large_announcement_alone_allocates_nothing() {
    let mut receiver =
        Receiver::new(NAME.into(), Limits { notif_bytes_max: u64::MAX, pending_bytes_max: 1 << 12 });
    let payload = [1];
    let fragment = |offset| Fragment { message_id: 1, total_len: u32::MAX, offset, payload: &payload };
    assert_eq!(receiver.on_fragment(&fragment(0)).unwrap(), None);
    assert_eq!(receiver.on_fragment(&fragment(u32::MAX - 1)).unwrap(), None);
    assert!(receiver.buffered_bytes() < 1 << 12);
}

#[test]
fn a_message_above_the_limit_is_refused() {
    let limits = Limits { notif_bytes_max: 10_000, pending_bytes_max: 1 << 20 };
    let mut receiver = Receiver::new(NAME.into(), limits);
    assert!(on_stock(&mut receiver, &stock_fragments(1, 0, &[0; 10_001])[0]).is_err());
    assert!(on_v2(&mut receiver, &fragments(1, &[0; 10_001], 8192)[0]).is_err());
    assert_eq!(receiver.buffered_bytes(), 0);
}

#[test]
fn stock_numbers_skip_zero_and_the_retired() {
    let mut ids = StockIds::starting_at(65_534);
    ids.retire(1);
    assert_eq!([ids.allocate(), ids.allocate(), ids.allocate()], [Some(65_534), Some(65_535), Some(2)]);
    for id in 1..=u16::MAX {
        ids.retire(id);
    }
    assert_eq!(ids.allocate(), None);
}

#[test]
fn the_inbox_gives_everything_once_and_says_when_it_is_full() {
    let inbox = Inbox::new(200);
    assert!(inbox.take().is_empty());
    inbox.push("a".into(), vec![1; 100]);
    assert!(inbox.has_room());
    inbox.push("b".into(), vec![2; 100]);
    assert!(!inbox.has_room());
    assert_eq!(inbox.take(), [("a".into(), vec![1; 100]), ("b".into(), vec![2; 100])]);
    assert!(inbox.has_room());
    assert!(inbox.take().is_empty());
}
