//! eventfd and ppoll/epoll: what a thread blocks on.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use crate::error::{Error, Result};

/// A counter that another thread makes readable (eventfd(2)).
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// A new one, not signalled.
    pub fn new() -> Result<Self> {
        // SAFETY: eventfd takes no pointers; the result is checked before it is owned.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(Error::backend(format!("eventfd: {}", io::Error::last_os_error())));
        }
        // SAFETY: `fd` was just opened and nothing else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The descriptor, valid while `self` lives.
    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Makes it readable.
    pub fn signal(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: the pointer and length describe `one`, which lives across the call. A full counter (EAGAIN)
        // is readable already, which is all that is wanted.
        unsafe { libc::write(self.fd(), one.as_ptr().cast(), one.len()) };
    }

    /// Makes it unreadable.
    pub fn clear(&self) {
        let mut count = [0u8; 8];
        // SAFETY: the pointer and length describe `count`, which lives across the call.
        unsafe { libc::read(self.fd(), count.as_mut_ptr().cast(), count.len()) };
    }
}

/// A set of descriptors to wait on (epoll(7), level-triggered).
#[derive(Debug)]
pub struct Poller(OwnedFd);

impl Poller {
    /// An empty set.
    pub fn new() -> Result<Self> {
        // SAFETY: epoll_create1 takes no pointers; the result is checked before it is owned.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(Error::backend(format!("epoll_create1: {}", io::Error::last_os_error())));
        }
        // SAFETY: `fd` was just opened and nothing else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Adds a descriptor.
    pub fn add(&self, fd: RawFd) -> io::Result<()> {
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 0 };
        // SAFETY: `event` lives across the call; a bad `fd` is an error, not undefined behaviour.
        let rc = unsafe { libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &raw mut event) };
        if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Waits until a descriptor is readable or the time is over. A signal may end it early.
    pub fn wait(&self, longest: Duration) {
        let time = libc::timespec {
            tv_sec: longest.as_secs() as libc::time_t,
            tv_nsec: libc::c_long::from(longest.subsec_nanos()),
        };
        let mut set = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: both pointers describe locals that live across the call; a null signal mask changes nothing.
        // An epoll descriptor is itself pollable, and ppoll takes times below a millisecond, which epoll_wait does not.
        unsafe { libc::ppoll(&raw mut set, 1, &raw const time, std::ptr::null()) };
    }
}

/// A descriptor that [`poll`] looks at.
#[derive(Debug, Clone, Copy)]
pub struct Watched {
    /// The descriptor.
    pub fd: RawFd,
    /// Whether to wait until it can be written to; else until it can be read.
    pub write: bool,
}

/// Waits until one of these descriptors can be read or written, or has failed, or the time is over (poll(2)). A signal may end
/// it early.
pub fn poll(watched: &[Watched], longest: Duration) {
    let one = |watched: &Watched| libc::pollfd {
        fd: watched.fd,
        events: if watched.write { libc::POLLOUT } else { libc::POLLIN },
        revents: 0,
    };
    let mut set: Vec<libc::pollfd> = watched.iter().map(one).collect();
    // Rounded up: a wait for the rest of a millisecond must not spin.
    let ms = longest.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32;
    // SAFETY: the pointer and length describe `set`, which lives across the call; a bad descriptor is an event, not
    // undefined behaviour.
    unsafe { libc::poll(set.as_mut_ptr(), set.len() as libc::nfds_t, ms) };
}
