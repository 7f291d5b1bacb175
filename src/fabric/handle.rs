//! Ownership of one libfabric object: closed once, on drop.

use std::fmt;
use std::ptr::NonNull;

use super::error::FabricError;
use crate::sys::libfabric::{fid, fid_av, fid_cq, fid_domain, fid_ep, fid_eq, fid_fabric, fid_mr};

/// A libfabric object.
///
/// # Safety
/// The type is `repr(C)` and its first member is a `fid`.
pub(super) unsafe trait Object {
    /// Its name in messages.
    const NAME: &'static str;
}

macro_rules! objects {
    ($($kind:ident: $name:literal,)*) => {
        $(
            // SAFETY: `repr(C)` with `fid: fid` first; the layout test checks it.
            unsafe impl Object for $kind {
                const NAME: &'static str = $name;
            }
        )*
    };
}

objects! {
    fid_fabric: "fabric",
    fid_domain: "domain",
    fid_mr: "memory region",
    fid_av: "address vector",
    fid_cq: "completion queue",
    fid_eq: "event queue",
    fid_ep: "endpoint",
}

/// Owns an open object. Whoever holds it sees to it that what the object depends on outlives it.
pub(super) struct Handle<T: Object> {
    object: NonNull<T>,
    open: bool,
}

// SAFETY: libfabric objects belong to no thread; every threading model allows them to move between threads.
unsafe impl<T: Object> Send for Handle<T> {}

impl<T: Object> Handle<T> {
    /// Takes what an open call gave: its status and the pointer that it filled.
    ///
    /// # Safety
    /// If `status` is 0, `object` must point to an open object that nobody else owns.
    pub(super) unsafe fn from_open(
        call: &'static str,
        status: i32,
        object: *mut T,
    ) -> Result<Self, FabricError> {
        FabricError::check(call, status as isize)?;
        match NonNull::new(object) {
            Some(object) => Ok(Self { object, open: true }),
            None => Err(FabricError::new(call, libc::EINVAL)),
        }
    }

    pub(super) fn as_ptr(&self) -> *mut T {
        self.object.as_ptr()
    }

    pub(super) fn fid(&self) -> *mut fid {
        self.object.as_ptr().cast()
    }

    /// Closes the object. An error leaves it open: the provider may still use what it depends on.
    pub(super) fn close(&mut self) -> Result<(), FabricError> {
        if !self.open {
            return Ok(());
        }
        let fid = self.fid();
        // SAFETY: the object is open; its first member is a fid, whose table has `close`.
        let status = unsafe {
            match (*(*fid).ops).close {
                Some(close) => close(fid),
                None => -libc::ENOSYS,
            }
        };
        FabricError::check("fi_close", status as isize)?;
        self.open = false;
        Ok(())
    }

    /// Lets go of an object that cannot be closed, without another try.
    pub(super) fn abandon(&mut self) {
        self.open = false;
    }

    /// Binds another object to this one.
    ///
    /// # Safety
    /// `other` must stay open for as long as this object is.
    pub(super) unsafe fn bind(&self, other: *mut fid, flags: u64) -> Result<(), FabricError> {
        let fid = self.fid();
        // SAFETY: both objects are open; the caller answers for their order of closing.
        let status = unsafe {
            match (*(*fid).ops).bind {
                Some(bind) => bind(fid, other, flags),
                None => -libc::ENOSYS,
            }
        };
        FabricError::check("fi_bind", status as isize)
    }

    /// Runs a control command.
    ///
    /// # Safety
    /// `arg` must be what the command takes (fi_control(3)).
    pub(super) unsafe fn control(
        &self,
        call: &'static str,
        command: i32,
        arg: *mut std::ffi::c_void,
    ) -> Result<(), FabricError> {
        let fid = self.fid();
        // SAFETY: the object is open; the caller answers for the argument.
        let status = unsafe {
            match (*(*fid).ops).control {
                Some(control) => control(fid, command, arg),
                None => -libc::ENOSYS,
            }
        };
        FabricError::check(call, status as isize)
    }
}

impl<T: Object> Drop for Handle<T> {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            log::warn!("closing a libfabric {} failed, it stays open: {error}", T::NAME);
        }
    }
}

impl<T: Object> fmt::Debug for Handle<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{:p}", T::NAME, self.object)
    }
}
