//! Page-locked host memory.

use std::ffi::c_void;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use super::{Context, Span, describe};
use crate::error::{Error, Result};
use crate::fabric::KeptMemory;
use crate::sys::cuda as sys;

/// Most bytes of one page-locked buffer.
pub const PINNED_BYTES_MAX: usize = 1 << 30;

/// Page-locked host memory, which a GPU copies from and to at full speed and asynchronously.
///
/// The GPU and the NIC write it, so it is no slice: [`Pinned::read`] and [`Pinned::write`] copy. It is freed when it and
/// the copies that name it are gone.
pub struct Pinned(Arc<Memory>);

struct Memory {
    context: Context,
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: it owns plain memory that is not bound to a thread; Rust accesses it by the copies of `Pinned` alone.
unsafe impl Send for Memory {}
// SAFETY: as above; a shared `Pinned` only reads, and writing takes an exclusive one.
unsafe impl Sync for Memory {}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:p}+{:#x}", self.base, self.len)
    }
}

impl Pinned {
    /// `len` bytes, at most [`PINNED_BYTES_MAX`], zeroed, page-locked for every context.
    pub fn new(context: &Context, len: usize) -> Result<Self> {
        if len == 0 || len > PINNED_BYTES_MAX {
            let what = format!("a page-locked buffer of {len} bytes (1 to {PINNED_BYTES_MAX} are possible)");
            return Err(Error::invalid(what));
        }
        let cuda = context.cuda();
        let mut base: *mut c_void = std::ptr::null_mut();
        // SAFETY: writes one pointer.
        let rc = context.with(|| unsafe {
            (cuda.api().mem_host_alloc)(&raw mut base, len, sys::MEMHOSTALLOC_PORTABLE)
        })?;
        cuda.check("cuMemHostAlloc", rc).map_err(|e| e.context(format!("page-locking {len} bytes")))?;
        let base = NonNull::new(base.cast::<u8>())
            .ok_or_else(|| Error::backend("cuMemHostAlloc succeeded without memory"))?;
        // SAFETY: `len` bytes at `base` were allocated just now and are ours alone.
        unsafe { base.write_bytes(0, len) };
        Ok(Self(Arc::new(Memory { context: context.clone(), base, len })))
    }

    /// The whole buffer. Copies keep it; whoever hands its address to a NIC keeps it for as long as that takes.
    pub fn span(&self) -> Span {
        let (addr, len) = (self.0.base.as_ptr() as u64, self.0.len as u64);
        Span::kept(self.0.clone(), addr, len)
    }

    /// Copies bytes from `offset` on out of the buffer. `InvalidParam` if they leave it.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<()> {
        let from = self.at(offset, into.len())?;
        // SAFETY: the range is within the buffer, which lives; `into` is Rust memory and cannot overlap it.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies bytes into the buffer from `offset` on. `InvalidParam` if they leave it.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) -> Result<()> {
        let to = self.at(offset, bytes.len())?;
        // SAFETY: as in `read`; the exclusive borrow keeps other writes of ours away.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    /// Where `len` bytes from `offset` on begin, if they are within the buffer.
    fn at(&self, offset: usize, len: usize) -> Result<*mut u8> {
        self.span().part(offset as u64, len as u64)?;
        // SAFETY: the offset is at most the length of the buffer.
        Ok(unsafe { self.0.base.as_ptr().add(offset) })
    }
}

// SAFETY: the buffer is allocated once, never moves and is freed by `Memory::drop` alone; nothing refers to its bytes.
unsafe impl KeptMemory for Pinned {
    fn addr(&self) -> u64 {
        self.0.base.as_ptr() as u64
    }

    fn len(&self) -> u64 {
        self.0.len as u64
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let cuda = self.context.cuda();
        // SAFETY: allocated by `Pinned::new`, freed once: the last of the buffer and of the copies that name it is gone.
        let freed = self.context.with(|| unsafe { (cuda.api().mem_free_host)(self.base.as_ptr().cast()) });
        match freed {
            Ok(sys::SUCCESS | sys::ERROR_DEINITIALIZED) => {}
            Ok(rc) => log::warn!("cuMemFreeHost: {}", describe(cuda.api(), rc)),
            Err(why) => log::warn!("freeing page-locked memory: {why}"),
        }
    }
}
