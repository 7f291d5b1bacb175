//! A process's mailbox: who sends to it, and the bell that wakes it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

use super::process::ProcessId;
use super::{Mapping, Shared};

/// Processes that may send to one process.
pub const SENDERS_MAX: usize = 1024;

/// Shared by the process that owns it and all that send to it.
#[repr(C)]
pub struct Mailbox {
    bell: AtomicU32,
    asleep: AtomicU32,
    registrations: AtomicU32,
    reserved: AtomicU32,
    senders: [AtomicU64; SENDERS_MAX],
}

// SAFETY: atomics only; zero means nobody registered and nobody asleep.
unsafe impl Shared for Mailbox {}

impl Mailbox {
    /// A sender makes itself known. False when the table is full.
    pub fn register(&self, sender: ProcessId) -> bool {
        let free =
            |slot: &AtomicU64| slot.compare_exchange(0, sender.raw(), Ordering::AcqRel, Ordering::Relaxed);
        let done = self.senders.iter().any(|slot| free(slot).is_ok());
        self.registrations.fetch_add(1, Ordering::AcqRel);
        done
    }

    /// The owner forgets a sender that is gone.
    pub fn forget(&self, sender: ProcessId) {
        for slot in &self.senders {
            let _ = slot.compare_exchange(sender.raw(), 0, Ordering::AcqRel, Ordering::Relaxed);
        }
    }

    /// Changes with every registration.
    pub fn registrations(&self) -> u32 {
        self.registrations.load(Ordering::Acquire)
    }

    /// All that registered.
    pub fn senders(&self) -> impl Iterator<Item = ProcessId> + '_ {
        self.senders.iter().filter_map(|slot| ProcessId::from_raw(slot.load(Ordering::Acquire)))
    }

    /// Says that there is something in a channel, and wakes the owner if it sleeps.
    pub fn ring(&self) {
        self.bell.fetch_add(1, Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) != 0 {
            self.wake();
        }
    }

    fn wake(&self) {
        let word: *const u32 = self.bell.as_ptr();
        // SAFETY: the word is in a shared mapping that outlives the call; FUTEX_WAKE only takes its address.
        unsafe { libc::syscall(libc::SYS_futex, word, libc::FUTEX_WAKE, i32::MAX, 0, 0, 0) };
    }

    /// Rings so far.
    pub fn bell(&self) -> u32 {
        self.bell.load(Ordering::SeqCst)
    }

    /// The owner waits until the bell is no longer `seen`, or `limit`. With `wakeable` senders wake it; without, it
    /// costs them nothing and the owner wakes by itself.
    pub fn wait(&self, seen: u32, limit: Duration, wakeable: bool) {
        self.asleep.store(u32::from(wakeable), Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let time =
            libc::timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
        let word: *const u32 = self.bell.as_ptr();
        // SAFETY: the word is in a shared mapping that outlives the call, the time is on this stack. The kernel
        // compares the word with `seen` before it sleeps, so a ring in between is not lost.
        unsafe { libc::syscall(libc::SYS_futex, word, libc::FUTEX_WAIT, seen, &raw const time, 0, 0) };
        self.asleep.store(0, Ordering::SeqCst);
    }

    /// Whether the owner's thread sleeps and would be woken by a ring.
    pub fn asleep(&self) -> bool {
        self.asleep.load(Ordering::SeqCst) != 0
    }
}

/// The file of a process's mailbox.
pub fn path(dir: &Path, owner: ProcessId) -> PathBuf {
    dir.join(format!("mailbox-{owner}"))
}

/// Maps the own mailbox.
pub fn create(dir: &Path, owner: ProcessId) -> io::Result<Mapping<Mailbox>> {
    Mapping::create(&path(dir, owner))
}

/// Maps another process's mailbox.
pub fn open(dir: &Path, owner: ProcessId) -> io::Result<Mapping<Mailbox>> {
    Mapping::open(&path(dir, owner))
}
