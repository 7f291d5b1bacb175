//! A lock that one foreign call takes and another gives back.

use std::sync::atomic::{AtomicU32, Ordering};

const FREE: u32 = 0;
const HELD: u32 = 1;
const CONTENDED: u32 = 2;

/// rdma-core holds a lock from `wr_start` to `wr_complete` and from `start_poll` to `end_poll`; no guard can span that.
#[derive(Debug, Default)]
pub struct SpanLock(AtomicU32);

impl SpanLock {
    /// Takes the lock if it is free.
    pub fn try_lock(&self) -> bool {
        self.0.compare_exchange(FREE, HELD, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    /// Takes the lock, waiting for it. Like rdma-core's, it is not for taking twice by one thread.
    pub fn lock(&self) {
        if self.try_lock() {
            return;
        }
        while self.0.swap(CONTENDED, Ordering::Acquire) != FREE {
            self.futex(libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG, CONTENDED);
        }
    }

    /// Gives the lock back. The caller took it.
    pub fn unlock(&self) {
        if self.0.swap(FREE, Ordering::Release) == CONTENDED {
            self.futex(libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, 1);
        }
    }

    fn futex(&self, operation: i32, value: u32) {
        // SAFETY: the address is of a live atomic; no timeout is given.
        unsafe { libc::syscall(libc::SYS_futex, self.0.as_ptr(), operation, value, 0, 0, 0) };
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn excludes() {
        let (lock, value) = (SpanLock::default(), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..10_000 {
                        lock.lock();
                        value.store(value.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                        lock.unlock();
                    }
                });
            }
        });
        assert_eq!(value.load(Ordering::Relaxed), 40_000);
    }
}
