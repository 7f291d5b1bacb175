//! Times, counted by how long they are.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds of the buckets in microseconds: a small transfer on EFA takes some 20 us, a large one may take seconds.
pub const BOUNDS_US: [u64; 19] = [
    10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000,
    1_000_000, 2_500_000, 5_000_000, 10_000_000,
];

/// How many times lasted how long. Recording takes no lock.
#[derive(Debug, Default)]
pub struct Histogram {
    /// The last one is of those above every bound.
    buckets: [AtomicU64; BOUNDS_US.len() + 1],
    sum_ns: AtomicU64,
}

/// A histogram at one moment.
#[derive(Debug, PartialEq)]
pub(super) struct Times {
    /// Times in each bucket and all before it; the last is all of them.
    pub up_to: [u64; BOUNDS_US.len() + 1],
    /// All times together.
    pub sum: Duration,
}

impl Histogram {
    /// Something took so long.
    pub fn record(&self, took: Duration) {
        let bucket = BOUNDS_US.partition_point(|&bound| Duration::from_micros(bound) < took);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        // 584 years of transfers fit.
        self.sum_ns.fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
    }

    /// What was recorded. A time that is recorded meanwhile may be in the buckets and not in the sum.
    pub(super) fn times(&self) -> Times {
        let sum = Duration::from_nanos(self.sum_ns.load(Ordering::Relaxed));
        let mut total = 0;
        let up_to = std::array::from_fn(|at| {
            total += self.buckets[at].load(Ordering::Relaxed);
            total
        });
        Times { up_to, sum }
    }
}
