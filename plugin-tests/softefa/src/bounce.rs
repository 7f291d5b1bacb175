//! Host copies of GPU memory, for the process that fetches it: it can read this one's memory, but not its GPU's.
//!
//! The owner of the memory makes the copy, as the first thing that happens to it on its way, and keeps it until the
//! other side has no more use for it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::copy;
use crate::shm::channel::{GPU, HOST, Span};

/// Bytes of copies that are kept for one peer. An operation that has more goes when no other is on its way to that peer.
pub const BOUNCE_BYTES_MAX: u64 = 64 << 20;

/// The copies kept for one peer.
#[derive(Debug, Default)]
pub struct Pool {
    used: Arc<AtomicU64>,
}

/// A copy. Its place goes back to the pool with it.
#[derive(Debug)]
pub struct Bounce {
    bytes: Vec<u8>,
    used: Arc<AtomicU64>,
}

/// Why there is no copy.
#[derive(Debug)]
pub enum Refused {
    /// Not until others are gone.
    Full,
    /// The memory cannot be read.
    Failed(io::Error),
}

/// Whether any of this is GPU memory.
pub fn is_needed(spans: &[Span]) -> bool {
    spans.iter().any(|span| span.memory == GPU && span.length > 0)
}

impl Pool {
    /// Copies `spans` one behind the other.
    pub fn copy(&self, spans: &[Span]) -> Result<Bounce, Refused> {
        let length: u64 = spans.iter().map(|span| span.length).sum();
        let used = self.used.load(Ordering::Relaxed);
        if used > 0 && used + length > BOUNCE_BYTES_MAX {
            return Err(Refused::Full);
        }
        self.used.fetch_add(length, Ordering::Relaxed);
        let mut bounce = Bounce { bytes: vec![0; length as usize], used: Arc::clone(&self.used) };
        copy::gather(spans, &mut bounce.bytes).map_err(Refused::Failed)?;
        Ok(bounce)
    }
}

impl Bounce {
    /// Where the copy is. It stays there as long as this lives.
    pub fn span(&self) -> Span {
        Span { address: self.bytes.as_ptr() as u64, length: self.bytes.len() as u64, memory: HOST }
    }
}

impl Drop for Bounce {
    fn drop(&mut self) {
        self.used.fetch_sub(self.bytes.len() as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(bytes: &[u8]) -> Span {
        Span { address: bytes.as_ptr() as u64, length: bytes.len() as u64, memory: HOST }
    }

    #[test]
    fn a_full_pool_refuses_until_a_copy_goes_and_takes_one_of_any_size_when_empty() {
        let large = vec![7_u8; BOUNCE_BYTES_MAX as usize + 1];
        let pool = Pool::default();
        let first = pool.copy(&[span(&large)]).expect("an empty pool");
        assert_eq!(first.bytes, large);
        assert!(matches!(pool.copy(&[span(&large[..1])]), Err(Refused::Full)));
        drop(first);
        let halves = [pool.copy(&[span(&large[..1])]), pool.copy(&[span(&large[2..])])];
        assert!(halves.iter().all(Result::is_ok), "just as much as there may be");
        assert!(matches!(pool.copy(&[span(&large[..1])]), Err(Refused::Full)));
    }

    #[test]
    fn memory_that_cannot_be_read_leaves_the_pool_as_it_was() {
        let pool = Pool::default();
        let nowhere = Span { address: 8, length: 8, memory: HOST };
        assert!(matches!(pool.copy(&[nowhere]), Err(Refused::Failed(_))));
        assert_eq!(pool.used.load(Ordering::Relaxed), 0);
    }
}
