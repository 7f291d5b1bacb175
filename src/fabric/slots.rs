//! Work-request contexts: cells that the provider may scribble on while an operation is in flight, and what is known
//! of the operation on each.
//!
//! The first cells belong to buffers, each to one, chosen by the caller; the others are given out to RMA operations.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::Arc;

use super::error::FabricError;
use super::memory::Registration;
use super::peers::FiAddr;
use crate::sys::libfabric as sys;

/// What an operation on a buffer holds.
pub(super) struct BufferInFlight {
    /// Flags that name the operation in a completion.
    pub(super) flags: u64,
    /// The peer; a receive has none.
    pub(super) peer: Option<FiAddr>,
    /// Keeps the local memory registered.
    pub(super) _region: Arc<Registration>,
}

/// An RMA operation. It stands beside its cell, not in it: a completion then touches the eight bytes here and not a
/// cache line that the provider owns.
#[derive(Clone, Copy)]
struct Operation {
    /// [`FREE`] if none is in flight.
    share: u32,
    len: u32,
}

const FREE: u32 = u32::MAX;

/// A cell: FI_CONTEXT2 wants 64 bytes; a cache line of its own for each keeps two owners' writes apart.
#[repr(align(64))]
struct Cell(#[allow(dead_code)] MaybeUninit<sys::fi_context2>);

/// What a completion's context stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Context {
    /// The buffer with this number.
    Buffer(u32),
    /// An RMA operation.
    Operation(u32),
}

/// The cells of one endpoint and what is in flight on them.
pub(super) struct Slots {
    /// Buffers' cells first, then operations'. A raw pointer, not a box: the provider keeps addresses of cells while
    /// `Slots` moves.
    cells: NonNull<Cell>,
    buffers: Box<[Option<BufferInFlight>]>,
    operations: Box<[Operation]>,
    /// Operations' cells that are free.
    free: Vec<u32>,
    buffers_in_flight: u32,
}

// SAFETY: the cells are owned, and never read or written here, only addressed; the rest is Send.
unsafe impl Send for Slots {}

impl Slots {
    pub(super) fn new(buffers: u32, operations: u32) -> Self {
        let cells: Box<[Cell]> = (0..buffers + operations).map(|_| Cell(MaybeUninit::zeroed())).collect();
        Self {
            cells: NonNull::new(Box::into_raw(cells).cast()).expect("a box is not null"),
            buffers: (0..buffers).map(|_| None).collect(),
            operations: vec![Operation { share: FREE, len: 0 }; operations as usize].into(),
            free: (0..operations).rev().collect(),
            buffers_in_flight: 0,
        }
    }

    /// Operations in flight, on buffers too.
    pub(super) fn in_flight(&self) -> u32 {
        self.buffers_in_flight + self.operations_in_flight()
    }

    /// Operations in flight.
    pub(super) fn operations_in_flight(&self) -> u32 {
        (self.operations.len() - self.free.len()) as u32
    }

    /// RMA operations that can be posted now.
    pub(super) fn room(&self) -> u32 {
        self.free.len() as u32
    }

    /// Takes the cell of a buffer and gives its address.
    pub(super) fn claim_buffer(
        &mut self,
        call: &'static str,
        index: u32,
        operation: BufferInFlight,
    ) -> Result<*mut c_void, FabricError> {
        let Some(state) = self.buffers.get_mut(index as usize) else {
            return Err(FabricError::refused(call, format!("buffer {index} does not exist")));
        };
        if state.is_some() {
            return Err(FabricError::refused(call, format!("buffer {index} is in flight already")));
        }
        *state = Some(operation);
        self.buffers_in_flight += 1;
        Ok(self.cell(index))
    }

    /// Frees the cell of a buffer; gives what was held, if anything was in flight on it.
    pub(super) fn release_buffer(&mut self, index: u32) -> Option<BufferInFlight> {
        let operation = self.buffers.get_mut(index as usize)?.take()?;
        self.buffers_in_flight -= 1;
        Some(operation)
    }

    /// Takes a cell for an operation: its number and its address. `None` while all are in flight.
    pub(super) fn claim(&mut self, share: u32, len: u32) -> Option<(u32, *mut c_void)> {
        let index = self.free.pop()?;
        self.operations[index as usize] = Operation { share, len };
        Some((index, self.cell(self.buffers.len() as u32 + index)))
    }

    /// Frees the cell of an operation: its share and length, if one was in flight on it.
    pub(super) fn release(&mut self, index: u32) -> Option<(u32, u32)> {
        let operation = self.operations.get_mut(index as usize)?;
        let Operation { share, len } = *operation;
        if share == FREE {
            return None;
        }
        operation.share = FREE;
        self.free.push(index);
        Some((share, len))
    }

    /// What a completion names; `None` for an address that is no cell's.
    pub(super) fn context_of(&self, context: *mut c_void) -> Option<Context> {
        let offset = (context as usize).checked_sub(self.cells.addr().get())?;
        let index = offset / size_of::<Cell>();
        if !offset.is_multiple_of(size_of::<Cell>()) {
            return None;
        }
        if let Some(operation) = index.checked_sub(self.buffers.len()) {
            return (operation < self.operations.len()).then_some(Context::Operation(operation as u32));
        }
        Some(Context::Buffer(index as u32))
    }

    fn cell(&self, index: u32) -> *mut c_void {
        debug_assert!((index as usize) < self.buffers.len() + self.operations.len());
        self.cells.as_ptr().wrapping_add(index as usize).cast()
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        let count = self.buffers.len() + self.operations.len();
        let cells = std::ptr::slice_from_raw_parts_mut(self.cells.as_ptr(), count);
        // SAFETY: from `Box::into_raw` of as many cells, freed once. `Endpoint::drop` leaks the slots instead, if the
        // provider may still have addresses of cells.
        drop(unsafe { Box::from_raw(cells) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_map_back_to_their_cells_only() {
        let slots = Slots::new(1, 2);
        let base = slots.cells.addr().get();
        assert!(size_of::<Cell>() >= size_of::<sys::fi_context2>());
        let contexts = [Context::Buffer(0), Context::Operation(0), Context::Operation(1)];
        for (index, context) in contexts.into_iter().enumerate() {
            assert_eq!(slots.context_of(slots.cell(index as u32)), Some(context));
        }
        for stray in [0, 1, base + 1, base - 64, base + 3 * size_of::<Cell>(), usize::MAX] {
            assert_eq!(slots.context_of(stray as *mut c_void), None);
        }
    }

    #[test]
    fn a_cell_is_in_flight_once() {
        let mut slots = Slots::new(0, 2);
        let (one, other) = (slots.claim(7, 100).unwrap(), slots.claim(8, 200).unwrap());
        assert_ne!(one, other);
        assert_eq!((slots.claim(9, 1), slots.room(), slots.in_flight()), (None, 0, 2));
        assert_eq!(slots.release(one.0), Some((7, 100)));
        assert_eq!(slots.release(one.0), None, "it completed already");
        assert_eq!((slots.release(2), slots.room()), (None, 1));
    }
}
