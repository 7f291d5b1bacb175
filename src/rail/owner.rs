//! One owner at a time, and work that others leave for it: nobody waits for the owner, and nothing that was left is forgotten.
//!
//! Checked by plugin-tests/sim/tests/interleavings.rs.

use crate::sync::{AtomicBool, Mutex, MutexGuard, Ordering, PoisonError, SegQueue, TryLockError, fence};

/// What one thread at a time works on.
pub(super) trait Core {
    /// Whether nothing is queued or in flight.
    fn is_idle(&self) -> bool;
    /// Whether something waits that nothing but another turn will move.
    fn has_backlog(&self) -> bool;
}

/// A core, and what is left for whoever owns it.
pub(super) struct Owner<T, C> {
    inbox: SegQueue<C>,
    /// As the last owner left them.
    idle: AtomicBool,
    backlog: AtomicBool,
    /// `None` once it was taken out for good.
    core: Mutex<Option<T>>,
}

impl<T: Core, C> Owner<T, C> {
    pub fn new(core: T) -> Self {
        Self {
            inbox: SegQueue::new(),
            idle: AtomicBool::new(true),
            backlog: AtomicBool::new(false),
            core: Mutex::new(Some(core)),
        }
    }

    /// Leaves work for the owner. It is taken in by the next [`drive`](Self::drive), or by one that is under way.
    pub fn leave(&self, command: C) {
        self.inbox.push(command);
    }

    /// Works as the owner if nobody else does, for as long as something is left.
    pub fn drive(&self, mut work: impl FnMut(&mut T, &SegQueue<C>)) {
        // Pairs with the fence of an owner that is about to leave: one of the two sees the other's write.
        fence(Ordering::SeqCst);
        loop {
            match self.core.try_lock() {
                Ok(mut core) => {
                    let Some(core) = core.as_mut() else { return };
                    self.idle.store(false, Ordering::SeqCst);
                    work(core, &self.inbox);
                    self.idle.store(core.is_idle(), Ordering::SeqCst);
                    self.backlog.store(core.has_backlog(), Ordering::Release);
                }
                // A panic under the lock is reported once, at the boundary; the rail stays still from then on.
                Err(TryLockError::WouldBlock | TryLockError::Poisoned(_)) => return,
            }
            fence(Ordering::SeqCst);
            if self.inbox.is_empty() {
                return;
            }
        }
    }

    /// Whether nothing is queued or in flight: what was left before has been taken in and is over.
    pub fn is_idle(&self) -> bool {
        // In this order: an owner that takes from the inbox has said before that there is something to do.
        self.inbox.is_empty() && self.idle.load(Ordering::SeqCst)
    }

    /// Whether work waits that nothing but driving again will move.
    pub fn has_backlog(&self) -> bool {
        self.backlog.load(Ordering::Acquire) || !self.inbox.is_empty()
    }

    /// Whether work was left that no owner has taken in.
    pub fn has_mail(&self) -> bool {
        !self.inbox.is_empty()
    }

    /// Asks the core, if nobody works on it and nothing is left; `None` if that is not so, true once it was taken out.
    pub fn ask(&self, question: impl FnOnce(&mut T) -> bool) -> Option<bool> {
        let mut core = self.core.try_lock().ok()?;
        match core.as_mut() {
            Some(core) => self.inbox.is_empty().then(|| question(core)),
            None => Some(true),
        }
    }

    /// Waits for the owner to leave.
    pub fn lock(&self) -> MutexGuard<'_, Option<T>> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next of what is left, where there is no owner any more.
    pub fn take_left(&self) -> Option<C> {
        self.inbox.pop()
    }
}
