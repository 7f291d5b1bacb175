//! The foreign functions, under the names that the jumps of `build.rs` lead to: the C name after `softefa_`.
//!
//! What they hand out are boxes whose first field is the foreign struct, so that a foreign pointer is a pointer to
//! the box. A pointer that a caller gives back is one of these and not yet destroyed: that is the contract of verbs,
//! and what every SAFETY comment below that says "the caller's object" rests on.
#![allow(clippy::missing_safety_doc, reason = "the contract of every function is that of its man page")]
#![allow(missing_docs, reason = "documented by the man page of the same name")]

pub mod cq;
pub mod device;
pub mod efadv;
pub mod memory;
pub mod qp;

use libc::c_int;

/// Sets `errno`.
pub(crate) fn set_errno(error: c_int) {
    // SAFETY: the address is that of this thread's errno, always valid.
    unsafe { *libc::__errno_location() = error };
}

/// Null, with `errno` set.
pub(crate) fn fail<T>(error: c_int) -> *mut T {
    set_errno(error);
    std::ptr::null_mut()
}

/// Copies the first `length` bytes of `value` to the caller and clears what is beyond it.
///
/// # Safety
/// `to` has room for `length` bytes.
pub(crate) unsafe fn copy_prefix<T: Copy>(value: &T, to: *mut T, length: usize) {
    let known = length.min(size_of::<T>());
    // SAFETY: `to` has room for `length` bytes, of which the first `known` exist in `value`.
    unsafe {
        to.cast::<u8>().write_bytes(0, length);
        std::ptr::from_ref(value).cast::<u8>().copy_to_nonoverlapping(to.cast(), known);
    }
}
