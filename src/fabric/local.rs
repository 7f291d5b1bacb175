//! Copies between registered ranges of this process.

use super::MemoryRange;
use crate::error::{Error, Result};

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
