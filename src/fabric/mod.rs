//! Safe owning wrappers of libfabric objects: library, device, domain, memory region, endpoint.
//!
//! What makes posting safe:
//! - local memory is named by a [`MemoryRegion`], made of a [`MemoryRange`] whose `unsafe` constructor took the host's
//!   word; what is in flight keeps the region (a share keeps its list's, a buffer its own), so that it is closed after
//!   the provider has let go of it;
//! - a work request's context is a cell of the endpoint's own, in flight at most once;
//! - peers are named by a [`FiAddr`] that the endpoint checks against its own table;
//! - an endpoint closes before its queue, its context cells and the regions that it holds; if libfabric refuses to
//!   close it, they are leaked rather than freed under the provider's hands;
//! - everything that posts or polls takes `&mut Endpoint`: one owner at a time, as `FI_THREAD_COMPLETION` wants it.

// FI_* names stand in prose here as they do in libfabric's manual.
#![allow(clippy::doc_markdown)]

mod completion;
mod device;
mod domain;
pub mod efa;
mod endpoint;
mod error;
mod handle;
mod library;
mod list;
mod local;
mod memory;
mod peers;
mod post;
mod shares;
mod slots;
#[cfg(test)]
mod tests;

pub use completion::{Completion, CompletionError};
pub use device::{AddrFormat, Device, Nic, Query};
pub use domain::{Domain, Fabric};
pub use endpoint::{Endpoint, EndpointOptions};
pub use error::{FabricError, is_disconnect};
pub use library::{Libfabric, Version};
pub use list::{RmaList, Slice, Way};
pub use local::{ProcessCopy, RANGES_MAX, copy_between, copy_with};
pub use memory::{Dmabuf, Hmem, KeptMemory, MemoryRegion, RegisteredBuffer};
pub use peers::{FiAddr, InFlight};
pub use post::{BATCH_WRITES_MAX, Posted, PostedSlices, Recv, Send};

/// A range of memory that NICs, GPUs and this process may read and write: it stands for its maker's promise that they can.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRange {
    addr: u64,
    len: u64,
}

impl MemoryRange {
    /// Takes the host's word that the range is its own and stays mapped until it is deregistered.
    ///
    /// # Safety
    /// `addr..addr + len` must be memory (of the host or of an accelerator) that stays valid, and that tolerates
    /// concurrent access by devices and other threads, for as long as this value or a copy of it is used: until every
    /// registration of it is closed and every copy from or to it ([`copy_between`], a stream's) is over.
    /// A registration is closed when its last [`MemoryRegion`] has been dropped and no operation that was posted with it
    /// is in flight.
    pub unsafe fn assume_registered(addr: u64, len: u64) -> Self {
        Self { addr, len }
    }

    /// Memory for tests, never freed, filled with a byte.
    #[cfg(test)]
    pub(crate) fn leaked(len: usize, fill: u8) -> (Self, &'static [std::sync::atomic::AtomicU8]) {
        let bytes = (0..len).map(|_| std::sync::atomic::AtomicU8::new(fill)).collect::<Vec<_>>().leak();
        // SAFETY: nobody frees it, and atomics tolerate that others write it.
        (unsafe { Self::assume_registered(bytes.as_ptr() as u64, len as u64) }, bytes)
    }

    /// First byte.
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether `len` bytes from `addr` lie inside.
    pub fn contains(&self, addr: u64, len: u64) -> bool {
        addr >= self.addr && addr - self.addr <= self.len && len <= self.len - (addr - self.addr)
    }

    /// Whether the range holds no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// A key for a registration, for providers that let the user choose. Never given twice, so the same range can be
/// registered any number of times.
pub fn next_key() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}
