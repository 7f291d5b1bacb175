//! Memory of simulated applications, and the bytes that transfers put there.

use std::alloc::{Layout, alloc_zeroed, dealloc};

use nixl_libfabric::fabric::MemoryRange;

use crate::rng::mix;

/// Bytes of a slot.
pub const SLOT: usize = 4096;

/// Memory that the network writes to, so never seen as a Rust reference; handed out in runs of slots.
#[derive(Debug)]
pub struct Arena {
    memory: *mut u8,
    taken: Vec<bool>,
}

impl Arena {
    /// So many free slots.
    pub fn new(slots: usize) -> Self {
        // SAFETY: the size is not 0.
        let memory = unsafe { alloc_zeroed(Self::layout(slots)) };
        assert!(!memory.is_null());
        Self { memory, taken: vec![false; slots] }
    }

    fn layout(slots: usize) -> Layout {
        Layout::from_size_align(slots * SLOT, SLOT).expect("a small size")
    }

    /// Address of its first byte.
    pub fn addr(&self) -> usize {
        self.memory as usize
    }

    /// Its bytes.
    pub fn len(&self) -> usize {
        self.taken.len() * SLOT
    }

    /// Never.
    pub fn is_empty(&self) -> bool {
        self.taken.is_empty()
    }

    /// The whole, for registration.
    pub fn range(&self) -> MemoryRange {
        // SAFETY: the arena outlives its world's engines: the driver drops it last.
        unsafe { MemoryRange::assume_registered(self.addr() as u64, self.len() as u64) }
    }

    /// Takes neighbouring slots; gives the offset of the first.
    pub fn take(&mut self, slots: usize, start: usize) -> Option<usize> {
        let count = self.taken.len();
        let first = (0..count)
            .map(|i| (start + i) % count)
            .find(|&at| at + slots <= count && self.taken[at..at + slots].iter().all(|taken| !taken))?;
        self.taken[first..first + slots].fill(true);
        Some(first * SLOT)
    }

    /// Gives them back.
    pub fn give(&mut self, offset: usize, slots: usize) {
        self.taken[offset / SLOT..offset / SLOT + slots].fill(false);
    }

    /// Writes the pattern of `tag` to a range; tag 0 is zeroes.
    pub fn fill(&self, offset: usize, len: usize, tag: u64) {
        assert!(offset + len <= self.len());
        for at in 0..len {
            // SAFETY: inside the arena, checked above; no reference to it exists.
            unsafe { self.memory.add(offset + at).write(byte(tag, at)) };
        }
    }

    /// Place of the first byte that is not of the pattern.
    pub fn differs(&self, offset: usize, len: usize, tag: u64) -> Option<usize> {
        assert!(offset + len <= self.len());
        // SAFETY: as in `fill`.
        (0..len).find(|&at| unsafe { self.memory.add(offset + at).read() } != byte(tag, at))
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, freed once.
        unsafe { dealloc(self.memory, Self::layout(self.taken.len())) };
    }
}

/// Byte `at` of the pattern of `tag`.
pub fn byte(tag: u64, at: usize) -> u8 {
    if tag == 0 {
        return 0;
    }
    // One multiplication for eight bytes would do; slots are small.
    (mix(tag ^ (at as u64 >> 3) << 20) >> (8 * (at & 7))) as u8
}

/// A message: its number, then the number's pattern.
pub fn message(id: u64, len: usize) -> Vec<u8> {
    let mut bytes = id.to_le_bytes().to_vec();
    bytes.extend((0..len).map(|at| byte(id, at)));
    bytes
}
