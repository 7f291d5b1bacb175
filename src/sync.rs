//! What threads that meet without waiting are made of. One place for it, so that the simulator's test of interleavings can
//! put loom's in its stead.
#![forbid(unsafe_code)]

pub use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
pub use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

pub use crossbeam_queue::SegQueue;
