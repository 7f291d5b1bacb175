//! Asking where a buffer lies must not change where it lies.

use std::ptr;

use nixl_libfabric::sys::page::page_bytes;
use nixl_libfabric::topology::{MemoryNodes, numa_nodes_of};

const LEN: usize = 4 << 20;

/// Anonymous memory that nobody has touched.
struct Mapping(*mut libc::c_void);

impl Mapping {
    fn new() -> Self {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                LEN,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED);
        Self(start)
    }

    fn address(&self) -> u64 {
        self.0.addr() as u64
    }

    /// Pages that were ever touched, by the process's page map: bit 63 of an entry says in memory, bit 62 swapped out.
    fn pages_present(&self) -> usize {
        use std::os::unix::fs::FileExt;
        let map = std::fs::File::open("/proc/self/pagemap").unwrap();
        let page = page_bytes();
        let mut entries = vec![0u8; LEN / page as usize * 8];
        map.read_exact_at(&mut entries, self.address() / page * 8).unwrap();
        entries
            .chunks_exact(8)
            .filter(|entry| u64::from_le_bytes((*entry).try_into().unwrap()) >> 62 != 0)
            .count()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping made above, which nothing refers to any more.
        unsafe { libc::munmap(self.0, LEN) };
    }
}

#[test]
fn a_buffer_that_nobody_touched_stays_that_way() {
    let mapping = Mapping::new();
    let found = MemoryNodes::of(mapping.address(), LEN as u64);
    assert!(!matches!(found, MemoryNodes::Present(_)), "{found:?}");
    assert_eq!(mapping.pages_present(), 0);
}

#[test]
fn all_bytes_of_a_buffer_are_accounted_for() {
    let mapping = Mapping::new();
    // SAFETY: the mapping is LEN bytes long and writable.
    unsafe { ptr::write_bytes(mapping.0.cast::<u8>(), 1, LEN) };
    for len in [1, 4096, LEN as u64 - 5] {
        let nodes = numa_nodes_of(mapping.address() + 3, len);
        assert_eq!(nodes.iter().map(|&(_, bytes)| bytes).sum::<u64>(), len);
    }
}

#[test]
fn addresses_that_are_nobodys_are_no_trouble() {
    for (addr, len) in [(0, 1), (0, u64::MAX), (u64::MAX, u64::MAX), (1 << 60, 1 << 50), (0x1000, 0)] {
        let bytes: u64 = numa_nodes_of(addr, len).iter().map(|&(_, bytes)| bytes).sum();
        assert!(bytes == 0 || bytes == len);
    }
}
