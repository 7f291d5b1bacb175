//! Work-request contexts: cells that the provider may scribble on while an operation is in flight, and what each
//! operation holds until it is over.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::Arc;

use super::error::FabricError;
use super::memory::Registration;
use super::peers::FiAddr;
use crate::sys::libfabric as sys;

/// What an operation in flight holds.
pub(super) struct InFlight {
    /// Flags that name the operation in a completion.
    pub(super) flags: u64,
    /// The peer; a receive has none.
    pub(super) peer: Option<FiAddr>,
    /// Keeps the local memory registered.
    pub(super) _region: Arc<Registration>,
}

/// A cell: FI_CONTEXT2 wants 64 bytes; a cache line of its own for each keeps two owners' writes apart.
#[repr(align(64))]
struct Cell(#[allow(dead_code)] MaybeUninit<sys::fi_context2>);

/// The cells of one endpoint and what is in flight on them.
pub(super) struct Slots {
    /// As many as there are states. A raw pointer, not a box: the provider keeps addresses of cells while `Slots` moves.
    cells: NonNull<Cell>,
    states: Box<[Option<InFlight>]>,
    in_flight: u32,
}

// SAFETY: the cells are owned, and never read or written here, only addressed; the rest is Send.
unsafe impl Send for Slots {}

impl Slots {
    pub(super) fn new(count: u32) -> Self {
        let cells: Box<[Cell]> = (0..count).map(|_| Cell(MaybeUninit::zeroed())).collect();
        Self {
            cells: NonNull::new(Box::into_raw(cells).cast()).expect("a box is not null"),
            states: (0..count).map(|_| None).collect(),
            in_flight: 0,
        }
    }

    /// Operations in flight.
    pub(super) fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Address of a cell, if it is in flight.
    pub(super) fn busy_cell(&self, index: u32) -> Option<*mut c_void> {
        self.states.get(index as usize)?.as_ref()?;
        Some(self.cell(index))
    }

    /// Takes a cell for an operation and gives its address.
    pub(super) fn claim(
        &mut self,
        call: &'static str,
        index: u32,
        operation: InFlight,
    ) -> Result<*mut c_void, FabricError> {
        let Some(state) = self.states.get_mut(index as usize) else {
            return Err(FabricError::refused(call, format!("context {index} does not exist")));
        };
        if state.is_some() {
            return Err(FabricError::refused(call, format!("context {index} is in flight already")));
        }
        *state = Some(operation);
        self.in_flight += 1;
        Ok(self.cell(index))
    }

    /// Frees a cell; gives what was held, if anything was in flight on it.
    pub(super) fn release(&mut self, index: u32) -> Option<InFlight> {
        let operation = self.states.get_mut(index as usize)?.take()?;
        self.in_flight -= 1;
        Some(operation)
    }

    /// Index of the cell that a completion names; `None` for an address that is no cell's.
    pub(super) fn index_of(&self, context: *mut c_void) -> Option<u32> {
        let offset = (context as usize).checked_sub(self.cells.addr().get())?;
        let index = offset / size_of::<Cell>();
        (offset % size_of::<Cell>() == 0 && index < self.states.len()).then_some(index as u32)
    }

    fn cell(&self, index: u32) -> *mut c_void {
        debug_assert!((index as usize) < self.states.len());
        self.cells.as_ptr().wrapping_add(index as usize).cast()
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        let cells = std::ptr::slice_from_raw_parts_mut(self.cells.as_ptr(), self.states.len());
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
        let slots = Slots::new(3);
        let base = slots.cells.addr().get();
        assert!(size_of::<Cell>() >= size_of::<sys::fi_context2>());
        for index in 0..3 {
            assert_eq!(slots.index_of(slots.cell(index)), Some(index));
        }
        for stray in [0, 1, base + 1, base - 64, base + 3 * size_of::<Cell>(), usize::MAX] {
            assert_eq!(slots.index_of(stray as *mut c_void), None);
        }
        assert_eq!(slots.busy_cell(0), None);
        assert_eq!(slots.busy_cell(7), None);
    }
}
