//! What threads do that meet without waiting, in every order and with every value that the memory model lets them see: the
//! plugin's own files, on loom's atomics and locks.
//!
//! What is checked are promises: what is left for an owner is taken in, no memory is closed while it is used, no sleeper
//! sleeps on, no notification stays behind. `mutants/mutants.toml` takes fences and second looks out, one by one.
#![allow(dead_code, missing_docs, clippy::new_without_default)]

#[path = "../../../src/progress/asleep.rs"]
mod asleep;
#[path = "../../../src/neighbour/epochs.rs"]
mod epochs;
#[path = "../../../src/notify/inbox.rs"]
mod inbox;
#[path = "../../../src/rail/owner.rs"]
mod owner;
#[path = "../../../src/memory/uses.rs"]
mod uses;

/// What the plugin's `types` and `sync` are here.
pub use nixl_libfabric::types;

pub mod sync {
    pub use std::sync::{PoisonError, TryLockError};

    pub use loom::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
    pub use loom::sync::{Mutex, MutexGuard};

    /// A queue that promises as little as one can: who sees that an element came or went sees what was done before that, and
    /// nothing says when another thread sees it. (Two counts, and none of them read before
    /// it is written: loom 0.7 forgets one thread's look at an atomic over a later one of another, and then does not try the
    /// other order.)
    pub struct SegQueue<T> {
        pushed: AtomicUsize,
        popped: AtomicUsize,
        elements: std::sync::Mutex<std::collections::VecDeque<T>>,
    }

    impl<T> SegQueue<T> {
        pub fn new() -> Self {
            Self {
                pushed: AtomicUsize::new(0),
                popped: AtomicUsize::new(0),
                elements: std::sync::Mutex::default(),
            }
        }

        pub fn push(&self, element: T) {
            self.elements.lock().unwrap().push_back(element);
            self.pushed.fetch_add(1, Ordering::AcqRel);
        }

        pub fn pop(&self) -> Option<T> {
            let element = self.elements.lock().unwrap().pop_front()?;
            self.pushed.load(Ordering::Acquire);
            self.popped.fetch_add(1, Ordering::AcqRel);
            Some(element)
        }

        pub fn is_empty(&self) -> bool {
            self.popped.load(Ordering::Acquire) == self.pushed.load(Ordering::Acquire)
        }
    }
}

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::Notify;
use loom::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use loom::thread;

use self::asleep::Asleep;
use self::inbox::Inbox;
use self::owner::{Core, Owner};
use self::sync::SegQueue;
use self::uses::Uses;

/// Takes in what is left, and is idle between two turns.
struct Tray {
    taken: usize,
}

impl Core for Tray {
    fn is_idle(&self) -> bool {
        true
    }
    fn has_backlog(&self) -> bool {
        false
    }
}

/// One turn, as a rail's: what is in the inbox when it begins.
fn turn(tray: &mut Tray, inbox: &SegQueue<()>) {
    if inbox.pop().is_some() {
        tray.taken += 1;
    }
}

#[test]
fn what_is_left_for_an_owner_is_taken_in() {
    loom::model(|| {
        let owner = Arc::new(Owner::new(Tray { taken: 0 }));
        let post = |owner: &Owner<Tray, ()>| {
            owner.leave(());
            owner.drive(turn);
        };
        let other = thread::spawn({
            let owner = Arc::clone(&owner);
            move || post(&owner)
        });
        post(&owner);
        other.join().unwrap();
        assert!(!owner.has_mail(), "neither of the two took it in");
        assert_eq!(owner.lock().as_ref().unwrap().taken, 2);
    });
}

#[test]
fn an_idle_owner_is_through_with_what_was_left() {
    loom::model(|| {
        let owner = Arc::new(Owner::new(Tray { taken: 0 }));
        let over = Arc::new(AtomicUsize::new(0));
        owner.leave(());
        let driver = thread::spawn({
            let (owner, over) = (Arc::clone(&owner), Arc::clone(&over));
            move || {
                owner.drive(|_, inbox| {
                    while inbox.pop().is_some() {
                        over.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        if owner.is_idle() {
            assert_eq!(over.load(Ordering::Relaxed), 1, "idle, and not over");
        }
        driver.join().unwrap();
        assert!(owner.is_idle());
    });
}

/// A registration: closing writes what a use reads.
struct Region {
    uses: Uses,
    memory: UnsafeCell<bool>,
    closed: AtomicBool,
}

impl Region {
    fn close(&self) {
        if !self.closed.swap(true, Ordering::AcqRel) {
            self.memory.with_mut(|open| {
                // SAFETY: nothing uses it any more: what the test is about, and loom sees to.
                unsafe { *open = false };
            });
        }
    }

    /// As `begin_uses`, a transfer, and `Registration::end_use`.
    fn post(&self) {
        self.uses.begin();
        if !self.uses.is_retired() {
            let open = self.memory.with(|open| {
                // SAFETY: it is in use, so nobody closes it: loom says so if somebody does.
                unsafe { *open }
            });
            assert!(open, "a post that saw no deregistration uses closed memory");
        }
        if self.uses.end() {
            self.close();
        }
    }

    /// As `Engine::deregister_mem`: waits a while, then leaves closing to the last use.
    fn deregister(&self) {
        assert!(self.uses.drop_holder());
        for _ in 0..2 {
            if self.uses.count() == 0 {
                return self.close();
            }
            thread::yield_now();
        }
    }
}

#[test]
fn memory_is_closed_when_nothing_uses_it_and_then_for_certain() {
    loom::model(|| {
        let region = Arc::new(Region {
            uses: Uses::new(),
            memory: UnsafeCell::new(true),
            closed: AtomicBool::new(false),
        });
        let post = thread::spawn({
            let region = Arc::clone(&region);
            move || region.post()
        });
        region.deregister();
        post.join().unwrap();
        assert!(region.closed.load(Ordering::Acquire), "the NIC still reaches it");
    });
}

/// A region on a board, and a copier: withdrawn memory is written by its owner.
struct Shared {
    generation: AtomicU64,
    addr: AtomicU64,
    len: AtomicU64,
    epoch: AtomicU64,
    memory: UnsafeCell<bool>,
}

impl Shared {
    fn place(&self) -> epochs::Place<'_> {
        epochs::Place { generation: &self.generation, addr: &self.addr, len: &self.len }
    }

    /// A region of generation 1.
    fn published() -> Arc<Self> {
        let zero = || AtomicU64::new(0);
        let (generation, addr, len, epoch) = (zero(), zero(), zero(), zero());
        let shared = Arc::new(Self { generation, addr, len, epoch, memory: UnsafeCell::new(true) });
        shared.place().publish(1, (10, 11));
        shared
    }

    /// As `Slot::begin` and `Turn`.
    fn turn(&self) {
        epochs::begin(&self.epoch);
        if let Some(range) = self.place().range(1) {
            assert_eq!(range, (10, 11), "the range of another region");
            let mine = self.memory.with(|open| {
                // SAFETY: the region was found in a turn, so its owner waits: what the test is about, and loom sees to.
                unsafe { *open }
            });
            assert!(mine, "memory that was deregistered is copied");
        }
        epochs::end(&self.epoch);
    }
}

#[test]
fn what_is_withdrawn_is_left_by_those_who_copy() {
    loom::model(|| {
        let shared = Shared::published();
        let copier = thread::spawn({
            let shared = Arc::clone(&shared);
            move || (0..2).for_each(|_| shared.turn())
        });
        // As `Published::withdraw` and `Copiers::have_left`.
        shared.place().withdraw();
        if let Some(turn) = epochs::turn(&shared.epoch) {
            while !epochs::is_over(&shared.epoch, turn) {
                thread::yield_now();
            }
        }
        shared.memory.with_mut(|open| {
            // SAFETY: nobody copies it any more: loom says so if somebody does.
            unsafe { *open = false };
        });
        copier.join().unwrap();
    });
}

#[test]
fn a_place_that_is_another_regions_by_now_tells_nothing_of_it() {
    loom::model(|| {
        let shared = Shared::published();
        let copier = thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                // In no turn, as after a wait that was given up.
                shared.place().range(1).inspect(|range| assert_eq!(*range, (10, 11)));
            }
        });
        shared.place().withdraw();
        shared.place().publish(2, (20, 21));
        copier.join().unwrap();
        assert_eq!(shared.place().range(2), Some((20, 21)));
    });
}

#[test]
fn a_sleeper_is_woken_for_what_it_did_not_see() {
    loom::model(|| {
        let (asleep, mail, event) = (Asleep::new(), SegQueue::new(), Notify::new());
        let shared = Arc::new((asleep, mail, event));
        let poster = thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                let (asleep, mail, event) = &*shared;
                mail.push(());
                if asleep.is_to_be_woken() {
                    event.notify();
                }
            }
        });
        let (asleep, mail, event) = &*shared;
        // As `Loop::run` and `Loop::block`. Loom says so if nobody wakes it.
        while mail.pop().is_none() {
            asleep.begin();
            if mail.is_empty() {
                event.wait();
            }
            asleep.end();
        }
        poster.join().unwrap();
    });
}

#[test]
fn each_notification_is_taken_once_and_none_stays_behind() {
    loom::model(|| {
        let inbox = Arc::new(Inbox::new(1));
        let sender = thread::spawn({
            let inbox = Arc::clone(&inbox);
            move || {
                inbox.push("a".into(), vec![1]);
                inbox.push("a".into(), vec![2]);
            }
        });
        let mut taken = inbox.take();
        sender.join().unwrap();
        taken.extend(inbox.take());
        assert_eq!(taken, [("a".into(), vec![1]), ("a".into(), vec![2])]);
        assert!(inbox.has_room(), "what was taken still takes room");
    });
}
