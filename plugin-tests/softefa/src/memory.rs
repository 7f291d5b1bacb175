//! Registrations and address handles of one device, as one process sees them.

use std::collections::HashMap;

use crate::abi::verbs::{IBV_ACCESS_LOCAL_WRITE, ibv_gid};
use crate::shm::channel::{HOST, Span};

/// Registrations of one device in one process.
pub const REGISTRATIONS_MAX: usize = 256 * 1024;
/// Address handles of one device; numbers are 16 bits and 0xffff means none.
pub const ADDRESS_HANDLES_MAX: u16 = 8192;
/// "No address handle" where a number is expected.
pub const NO_ADDRESS_HANDLE: u16 = 0xffff;

/// A registered range.
#[derive(Clone, Copy, Debug)]
pub struct Registration {
    /// Protection domain.
    pub pd: u32,
    /// Where the memory is.
    pub address: u64,
    /// The address that peers name for its first byte.
    pub iova: u64,
    /// Bytes.
    pub length: u64,
    /// Verbs access flags.
    pub access: u32,
    /// Whose memory it is: [`HOST`] or [`GPU`](crate::shm::channel::GPU).
    pub memory: u64,
}

/// All registrations of a device in this process.
#[derive(Debug)]
pub struct Registrations {
    by_key: HashMap<u32, Registration>,
    next: u32,
}

impl Registrations {
    /// `start` is where keys begin, so that two processes do not hand out the same ones.
    pub fn new(start: u32) -> Self {
        Self { by_key: HashMap::new(), next: start }
    }

    /// Registers and returns the key; `None` when the table is full.
    pub fn insert(&mut self, registration: Registration) -> Option<u32> {
        if self.by_key.len() >= REGISTRATIONS_MAX {
            return None;
        }
        loop {
            // Any odd step visits all keys before one comes again: a stale key stays invalid for long.
            self.next = self.next.wrapping_add(0x9e37_79b1);
            if !self.by_key.contains_key(&self.next) {
                self.by_key.insert(self.next, registration);
                return Some(self.next);
            }
        }
    }

    /// Ends a registration.
    pub fn remove(&mut self, key: u32) -> Option<Registration> {
        self.by_key.remove(&key)
    }

    /// The memory behind `length` bytes at `iova` under `key`, if the registration covers them, belongs to `pd` and
    /// grants `access`.
    pub fn resolve(&self, key: u32, pd: u32, iova: u64, length: u64, access: u32) -> Option<Span> {
        let found = self.by_key.get(&key)?;
        let offset = iova.checked_sub(found.iova)?;
        let fits = offset.checked_add(length)? <= found.length;
        let allowed = found.pd == pd && found.access & access == access;
        (fits && allowed).then(|| Span {
            address: found.address.wrapping_add(offset),
            length,
            memory: found.memory,
        })
    }

    /// Like [`Registrations::resolve`] for the local side, where `write` is all that may be asked.
    pub fn resolve_local(&self, key: u32, pd: u32, iova: u64, length: u64, write: bool) -> Option<Span> {
        if length == 0 {
            return Some(Span { address: 0, length: 0, memory: HOST });
        }
        self.resolve(key, pd, iova, length, if write { IBV_ACCESS_LOCAL_WRITE } else { 0 })
    }
}

/// The address handles of a device in this process. One GID has one number, however often it is asked for.
#[derive(Debug, Default)]
pub struct AddressHandles {
    by_gid: HashMap<[u8; 16], (u16, u32)>,
    used: Vec<bool>,
}

impl AddressHandles {
    /// Takes a reference to the handle for a GID; `None` when the table is full.
    pub fn acquire(&mut self, gid: &ibv_gid) -> Option<u16> {
        if let Some((number, references)) = self.by_gid.get_mut(&gid.raw) {
            *references += 1;
            return Some(*number);
        }
        let number = self.used.iter().position(|used| !used).unwrap_or(self.used.len());
        if number >= usize::from(ADDRESS_HANDLES_MAX) {
            return None;
        }
        if number == self.used.len() {
            self.used.push(true);
        }
        self.used[number] = true;
        self.by_gid.insert(gid.raw, (number as u16, 1));
        Some(number as u16)
    }

    /// Gives a reference back.
    pub fn release(&mut self, gid: &ibv_gid) {
        let Some((number, references)) = self.by_gid.get_mut(&gid.raw) else { return };
        *references -= 1;
        if *references == 0 {
            self.used[usize::from(*number)] = false;
            self.by_gid.remove(&gid.raw);
        }
    }

    /// The number of a GID, or [`NO_ADDRESS_HANDLE`].
    pub fn number(&self, gid: &ibv_gid) -> u16 {
        self.by_gid.get(&gid.raw).map_or(NO_ADDRESS_HANDLE, |(number, _)| *number)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn only_what_lies_inside_resolves(iova in 1_u64.., length: u32, at: u64, bytes: u32) {
            let length = u64::from(length).min(u64::MAX - iova);
            let mut table = Registrations::new(1);
            let registration = Registration { pd: 1, address: 0x1000, iova, length, access: 2, memory: HOST };
            let key = table.insert(registration).expect("room");
            let bytes = u64::from(bytes);
            let at = if at % 2 == 0 { at } else { iova.wrapping_add(at % length.max(1)) };
            let inside = at >= iova && u128::from(at) + u128::from(bytes) <= u128::from(iova) + u128::from(length);
            let found = table.resolve(key, 1, at, bytes, 2);
            prop_assert_eq!(found.is_some(), inside);
            if let Some(span) = found {
                prop_assert_eq!(span.address - 0x1000, at - iova);
            }
            prop_assert!(table.resolve(key, 2, iova, 0, 2).is_none(), "another domain");
            prop_assert!(table.resolve(key, 1, iova, 0, 4).is_none(), "another right");
            prop_assert!(table.remove(key).is_some());
            prop_assert!(table.resolve(key, 1, iova, 0, 2).is_none(), "ended");
        }
    }

    #[test]
    fn one_gid_has_one_handle_until_the_last_reference() {
        let (a, b) = (ibv_gid { raw: [1; 16] }, ibv_gid { raw: [2; 16] });
        let mut handles = AddressHandles::default();
        let first = handles.acquire(&a).expect("room");
        assert_eq!(handles.acquire(&a), Some(first));
        assert_ne!(handles.acquire(&b), Some(first));
        handles.release(&a);
        assert_eq!(handles.number(&a), first);
        handles.release(&a);
        assert_eq!(handles.number(&a), NO_ADDRESS_HANDLE);
    }
}
