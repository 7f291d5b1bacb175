//! The peers that an endpoint knows.

use std::collections::HashMap;

use crate::error::{Error, Result, Status};

/// A peer's endpoint, as this endpoint knows it. It stands for nothing at another endpoint, and for nothing after it
/// was removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FiAddr {
    entry: u32,
    generation: u32,
}

/// Operations to a peer that are in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct InFlight {
    /// Writes and reads.
    pub rma: u32,
    /// Messages.
    pub messages: u32,
}

/// Table of peers. libfabric trusts the numbers that it is given; this table does not.
#[derive(Default)]
pub(super) struct Peers {
    entries: Vec<Peer>,
    free: Vec<u32>,
    by_name: HashMap<Box<[u8]>, u32>,
}

#[derive(Default)]
struct Peer {
    raw: u64,
    generation: u32,
    /// How often it was inserted; 0 if the entry is free.
    uses: u32,
    in_flight: InFlight,
    name: Box<[u8]>,
}

impl Peers {
    fn get(&self, address: FiAddr) -> Option<&Peer> {
        self.entries
            .get(address.entry as usize)
            .filter(|peer| peer.uses > 0 && peer.generation == address.generation)
    }

    /// libfabric's number of a peer, if it is known.
    pub(super) fn raw(&self, address: FiAddr) -> Option<u64> {
        self.get(address).map(|peer| peer.raw)
    }

    /// What is in flight to a peer.
    pub(super) fn in_flight(&self, address: FiAddr) -> InFlight {
        self.get(address).map_or_else(InFlight::default, |peer| peer.in_flight)
    }

    /// So many more writes or reads are in flight.
    pub(super) fn started(&mut self, address: FiAddr, count: u32) {
        self.entries[address.entry as usize].in_flight.rma += count;
    }

    /// So many are over.
    pub(super) fn finished(&mut self, address: FiAddr, count: u32) {
        self.entries[address.entry as usize].in_flight.rma -= count;
    }

    /// A message is in flight.
    pub(super) fn sent(&mut self, address: FiAddr) {
        self.entries[address.entry as usize].in_flight.messages += 1;
    }

    /// It is over.
    pub(super) fn send_over(&mut self, address: FiAddr) {
        self.entries[address.entry as usize].in_flight.messages -= 1;
    }

    /// Counts one more use of a name that is known. Names are compared without the zeroes that pad them.
    pub(super) fn find(&mut self, name: &[u8]) -> Option<FiAddr> {
        let entry = *self.by_name.get(trimmed(name))?;
        let peer = &mut self.entries[entry as usize];
        peer.uses += 1;
        Some(FiAddr { entry, generation: peer.generation })
    }

    pub(super) fn insert(&mut self, name: &[u8], raw: u64) -> FiAddr {
        let name: Box<[u8]> = trimmed(name).into();
        let entry = self.free.pop().unwrap_or_else(|| {
            self.entries.push(Peer::default());
            (self.entries.len() - 1) as u32
        });
        self.by_name.insert(name.clone(), entry);
        let peer = &mut self.entries[entry as usize];
        *peer = Peer { raw, uses: 1, in_flight: InFlight::default(), name, generation: peer.generation };
        FiAddr { entry, generation: peer.generation }
    }

    /// Counts one use less; gives libfabric's number when it was the last.
    pub(super) fn remove(&mut self, address: FiAddr) -> Result<Option<u64>> {
        let Some(peer) = self.get(address) else {
            return Err(Error::invalid("the peer's address is not known on this endpoint"));
        };
        let count = peer.in_flight.rma + peer.in_flight.messages;
        if peer.uses == 1 && count > 0 {
            return Err(Error::new(
                Status::NotAllowed,
                format!("{count} operations to this peer are in flight"),
            ));
        }
        let peer = &mut self.entries[address.entry as usize];
        peer.uses -= 1;
        if peer.uses > 0 {
            return Ok(None);
        }
        peer.generation = peer.generation.wrapping_add(1);
        self.by_name.remove(&peer.name);
        self.free.push(address.entry);
        Ok(Some(peer.raw))
    }
}

fn trimmed(name: &[u8]) -> &[u8] {
    let len = name.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    &name[..len]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_peer_with_operations_in_flight_stays() {
        let mut peers = Peers::default();
        let address = peers.insert(b"a", 1);
        peers.started(address, 2);
        assert_eq!(peers.remove(address).unwrap_err().status(), Status::NotAllowed);
        peers.finished(address, 2);
        assert_eq!(peers.remove(address).unwrap(), Some(1));
    }

    proptest! {
        /// Against a model: a map from name to (address, uses), and the addresses that have died.
        #[test]
        fn an_address_lives_from_its_first_insertion_to_its_last_removal(
            steps in prop::collection::vec((0u8..6, any::<bool>()), 0..200),
        ) {
            let mut peers = Peers::default();
            let mut alive = std::collections::BTreeMap::<u8, (FiAddr, u64, u32)>::new();
            let mut dead = Vec::new();
            let mut next_raw = 100;
            for (name, insert) in steps {
                let bytes = [name + 1, 0, 0];
                if insert {
                    let known = peers.find(&bytes);
                    prop_assert_eq!(known, alive.get(&name).map(|(address, ..)| *address));
                    if known.is_none() {
                        next_raw += 1;
                        let address = peers.insert(&bytes[..1], next_raw);
                        prop_assert!(!dead.contains(&address));
                        alive.insert(name, (address, next_raw, 0));
                    }
                    alive.get_mut(&name).unwrap().2 += 1;
                } else if let Some((address, raw, uses)) = alive.get_mut(&name) {
                    *uses -= 1;
                    let last = *uses == 0;
                    prop_assert_eq!(peers.remove(*address).unwrap(), last.then_some(*raw));
                    if last {
                        dead.push(*address);
                        alive.remove(&name);
                    }
                }
                for (address, raw, _) in alive.values() {
                    prop_assert_eq!(peers.raw(*address), Some(*raw));
                }
                for address in &dead {
                    prop_assert_eq!(peers.raw(*address), None);
                    prop_assert!(peers.remove(*address).is_err());
                }
            }
        }
    }
}
