//! Copies of registered memory by the processor: within this process, and with another of this host.

use std::io;

use super::MemoryRange;
use crate::error::{Error, Result};
pub use crate::sys::process::RANGES_MAX;
use crate::sys::process::{Process, Range};
use crate::types::Op;

/// Copies `len` bytes of host memory from one registered range to another; they may overlap.
pub fn copy_between(
    source: MemoryRange,
    source_addr: u64,
    target: MemoryRange,
    target_addr: u64,
    len: u64,
) -> Result<()> {
    if !source.contains(source_addr, len) || !target.contains(target_addr, len) {
        return Err(Error::invalid("a local copy reaches outside its regions"));
    }
    // SAFETY: both are within ranges whose makers promised that they stay valid for as long as they are used, whoever else
    // reads and writes them (`MemoryRange::assume_registered`). Raw pointers, no references: the host and NICs may touch
    // the same bytes meanwhile, as with any transfer. `copy` allows overlap.
    unsafe {
        std::ptr::copy(source_addr as *const u8, target_addr as *mut u8, len as usize);
    }
    Ok(())
}

/// A copy between registered memory here and memory of another process.
#[derive(Debug, Clone, Copy)]
pub struct ProcessCopy {
    /// The registered range here.
    pub region: MemoryRange,
    /// First byte here.
    pub addr: u64,
    /// First byte there.
    pub remote_addr: u64,
    /// Bytes.
    pub len: u64,
}

/// Makes copies from memory here to that of a process ([`Op::Write`]), or back. When it returns without an error all of it has
/// arrived.
pub fn copy_with(process: &Process, op: Op, copies: &[ProcessCopy]) -> io::Result<()> {
    let mut here = Vec::with_capacity(copies.len().min(RANGES_MAX));
    let mut there = Vec::with_capacity(copies.len().min(RANGES_MAX));
    for some in copies.chunks(RANGES_MAX) {
        here.clear();
        there.clear();
        for copy in some {
            if !copy.region.contains(copy.addr, copy.len) {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "a copy reaches outside its region here",
                ));
            }
            here.push(Range::new(copy.addr, copy.len));
            there.push(Range::new(copy.remote_addr, copy.len));
        }
        let (mut here, mut there) = (&mut here[..], &mut there[..]);
        while !here.is_empty() {
            // SAFETY: the local ranges are within ranges whose makers promised that they stay valid for as long as they are used,
            // whoever else reads and writes them (`MemoryRange::assume_registered`); no Rust reference is in them.
            let bytes = unsafe {
                match op {
                    Op::Write => process.write(here, there),
                    Op::Read => process.read(here, there),
                }
            };
            let bytes = bytes?;
            if bytes == 0 {
                return Err(io::Error::other("nothing was copied"));
            }
            (here, there) = (behind(here, bytes), behind(there, bytes));
        }
    }
    Ok(())
}

/// The ranges behind their first `len` bytes.
fn behind(ranges: &mut [Range], mut len: u64) -> &mut [Range] {
    let mut at = 0;
    while let Some(range) = ranges.get_mut(at).filter(|_| len > 0) {
        if len < range.len() {
            *range = range.behind(len);
            break;
        }
        len -= range.len();
        at += 1;
    }
    &mut ranges[at..]
}
