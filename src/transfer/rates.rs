//! How long transfers take, learned from those that were made.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Shorter transfers tell of the cost of one transfer, longer ones of the cost of a byte.
const SMALL_BYTES_MAX: u64 = 64 << 10;
const LARGE_BYTES_MIN: u64 = 1 << 20;
/// Weight of the newest sample.
const WEIGHT: f64 = 0.125;

/// Running averages over all peers.
#[derive(Debug, Default)]
pub struct Rates(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    transfer: Average,
    byte: Average,
}

/// Mean and mean deviation, in seconds, as TCP keeps them of its round trips (RFC 6298).
#[derive(Debug, Default, Clone, Copy)]
struct Average {
    samples: u64,
    mean: f64,
    deviation: f64,
}

impl Average {
    fn record(&mut self, value: f64) {
        if self.samples == 0 {
            (self.mean, self.deviation) = (value, value / 2.0);
        } else {
            self.deviation += WEIGHT * ((value - self.mean).abs() - self.deviation);
            self.mean += WEIGHT * (value - self.mean);
        }
        self.samples += 1;
    }
}

impl Rates {
    /// A transfer of so many bytes took so long.
    pub fn record(&self, bytes: u64, took: Duration) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if bytes <= SMALL_BYTES_MAX {
            state.transfer.record(took.as_secs_f64());
        } else if bytes >= LARGE_BYTES_MIN {
            let base = state.transfer.mean;
            state.byte.record((took.as_secs_f64() - base).max(0.0) / bytes as f64);
        }
    }

    /// Expected time of a transfer and its deviation; `None` before the first that tells.
    pub fn estimate(&self, bytes: u64) -> Option<(Duration, Duration)> {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = if bytes <= SMALL_BYTES_MAX { state.transfer.samples } else { state.byte.samples };
        if known == 0 {
            return None;
        }
        let seconds = state.transfer.mean + state.byte.mean * bytes as f64;
        let deviation = state.transfer.deviation + state.byte.deviation * bytes as f64;
        Some((Duration::from_secs_f64(seconds), Duration::from_secs_f64(deviation)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_guessed() {
        let rates = Rates::default();
        assert_eq!(rates.estimate(1), None);
        rates.record(4096, Duration::from_micros(20));
        assert!(rates.estimate(1).is_some());
        assert_eq!(rates.estimate(1 << 30), None);
    }

    #[test]
    fn estimates_come_near_what_was_measured() {
        let rates = Rates::default();
        for _ in 0..50 {
            rates.record(4096, Duration::from_micros(20));
            rates.record(10 << 20, Duration::from_micros(20 + 10_000));
        }
        let (expected, deviation) = rates.estimate(20 << 20).unwrap();
        assert!((expected.as_secs_f64() - 0.02002).abs() < 0.0005, "{expected:?}");
        assert!(deviation < Duration::from_millis(2), "{deviation:?}");
    }
}
