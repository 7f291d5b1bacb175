//! Safe owning wrappers of libfabric objects.

/// A range of memory that NICs may read and write while it is registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRange {
    addr: u64,
    len: u64,
}

impl MemoryRange {
    /// Takes the host's word that the range is its own and stays mapped until it is deregistered.
    ///
    /// # Safety
    /// `addr..addr + len` must be memory (of the host or of an accelerator) that stays valid, and that
    /// tolerates concurrent access by devices, until every registration of it has been dropped.
    pub unsafe fn assume_registered(addr: u64, len: u64) -> Self {
        Self { addr, len }
    }

    /// First byte.
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the range holds no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}
