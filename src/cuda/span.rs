//! Ranges of memory that a GPU copies, and what is copied in one go.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::{Context, Mapping, Pinned, Stream};
use crate::error::{Error, Result};
use crate::fabric::MemoryRange;
use crate::sys::cuda::CUcontext;

/// Shorter pieces are copied by a kernel of ours, where there are several: each copy that the driver queues costs some 2 us of a
/// processor and leaves the GPU idle for as long, and an H200 moves 4 MB meanwhile (2.1 TB/s within it).
/// `plugin-tests/gpu` has a sweep (`cases.py sweep`) to set it from.
const KERNEL_PIECE_BYTES_MAX: u64 = 4 << 20;

/// Bytes at each end of a range that are read to see whether it can be reached, and how long that may take: a GPU that is busy
/// copies in between.
const TRIED_BYTES: u64 = 16;
const TRY_MS_MAX: u64 = 1000;

/// What a copy needs until it is over.
pub type Owner = Arc<dyn fmt::Debug + Send + Sync>;

/// Page-locked buffers and mappings that copies in flight name.
pub(super) type Keep = Vec<Owner>;

/// A range of host or device memory to copy from or to.
///
/// One of the user's memory lies within a [`MemoryRange`], which stands for the promise that it stays allocated until copies that
/// name it are done. One of a [`Pinned`] buffer or of a [`Mapping`] keeps that by itself.
#[derive(Debug, Clone)]
pub struct Span {
    addr: u64,
    len: u64,
    owner: Option<Owner>,
    /// The context whose kernels may touch it; NULL where none is known.
    kernels: CUcontext,
}

impl Span {
    /// The `len` bytes at `addr` of registered memory. `InvalidParam` if they are not within it, or start at zero.
    pub fn registered(memory: MemoryRange, addr: u64, len: u64) -> Result<Self> {
        if addr == 0 || !memory.contains(addr, len) {
            let (start, bytes) = (memory.addr(), memory.len());
            return Err(Error::invalid(format!("{addr:#x}+{len:#x} is not within {start:#x}+{bytes:#x}")));
        }
        Ok(Self { addr, len, owner: None, kernels: CUcontext::NULL })
    }

    /// A range of memory that `owner` keeps.
    pub(super) fn kept(owner: Owner, addr: u64, len: u64) -> Self {
        Self { addr, len, owner: Some(owner), kernels: CUcontext::NULL }
    }

    /// A part of a mapping, which it keeps.
    pub(super) fn mapped(mapping: &Arc<Mapping>, addr: u64, len: u64) -> Self {
        Self::kept(Arc::clone(mapping) as Owner, addr, len).with_kernels_of(mapping.context())
    }

    /// The same, of which it is known that [kernels](super::Cuda::kernels_reach) of this context may touch it.
    #[must_use]
    pub fn with_kernels_of(self, context: &Context) -> Self {
        Self { kernels: context.handle(), ..self }
    }

    /// `len` bytes of this range from `offset` on. `InvalidParam` if they leave it.
    pub fn part(&self, offset: u64, len: u64) -> Result<Self> {
        self.check_part(offset, len)?;
        Ok(Self { addr: self.addr + offset, len, owner: self.owner.clone(), kernels: self.kernels })
    }

    fn check_part(&self, offset: u64, len: u64) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(Error::invalid(format!("bytes {offset}+{len} are not within a range of {}", self.len))),
        }
    }

    /// Reads its first and its last bytes by a copy in this context: whether it can be reached at all.
    pub fn try_reading(&self, context: &Context) -> Result<()> {
        let len = self.len.min(TRIED_BYTES);
        let (buffer, stream) = (Pinned::new(context, 2 * TRIED_BYTES as usize)?, Stream::new(context)?);
        let mut batch = Batch::default();
        batch.add(&buffer.span(), 0, self, 0, len)?;
        batch.add(&buffer.span(), len, self, self.len - len, len)?;
        stream.start(batch)?.wait(Duration::from_millis(TRY_MS_MAX))
    }

    /// First address.
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the range has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// A piece to copy, within what a [`Batch`] keeps.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    pub to: u64,
    pub from: u64,
    pub len: u64,
    /// The context whose kernels may touch both ends.
    pub kernels: CUcontext,
}

impl Piece {
    /// Whether a kernel copies it, where there are several.
    pub fn is_small(&self) -> bool {
        !self.kernels.is_null() && self.len < KERNEL_PIECE_BYTES_MAX
    }
}

/// Pieces to be copied in one go.
#[derive(Debug, Default)]
pub struct Batch {
    pub(super) pieces: Vec<Piece>,
    pub(super) keep: Keep,
    /// Pieces that a kernel copies, if it can.
    small: usize,
}

impl Batch {
    /// One with room for so many pieces.
    pub fn with_capacity(pieces: usize) -> Self {
        Self { pieces: Vec::with_capacity(pieces), keep: Keep::new(), small: 0 }
    }

    /// Adds `len` bytes: from an offset in `from` to one in `to`. `InvalidParam` if they leave either.
    pub fn add(&mut self, to: &Span, to_offset: u64, from: &Span, from_offset: u64, len: u64) -> Result<()> {
        to.check_part(to_offset, len)?;
        from.check_part(from_offset, len)?;
        for owner in [&to.owner, &from.owner].into_iter().flatten() {
            // Few different ones, and mostly the last.
            if !self.keep.iter().rev().any(|known| Arc::ptr_eq(known, owner)) {
                self.keep.push(Arc::clone(owner));
            }
        }
        let kernels = if to.kernels == from.kernels { to.kernels } else { CUcontext::NULL };
        let piece = Piece { to: to.addr + to_offset, from: from.addr + from_offset, len, kernels };
        if len > 0 {
            self.small += usize::from(piece.is_small());
            self.pieces.push(piece);
        }
        Ok(())
    }

    /// Keeps something until the copies are over, and longer than what was added before.
    pub fn keep(&mut self, owner: Owner) {
        self.keep.push(owner);
    }

    /// How many of its pieces the driver copies, one by one, on a stream that [has a kernel](Stream::has_kernel) or none.
    pub fn singles(&self, has_kernel: bool) -> usize {
        self.pieces.len() - if has_kernel { self.small } else { 0 }
    }

    /// How many pieces it has.
    pub fn len(&self) -> usize {
        self.pieces.len()
    }

    /// Whether there is nothing to copy.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }
}
