//! NUMA nodes of a host buffer.

use std::collections::BTreeMap;
use std::sync::Once;

use crate::sys::numa::{Policy, node_of_this_cpu, nodes_of_pages, policy_of};
use crate::sys::page::page_bytes;

/// Most pages asked about for one buffer, spread evenly over it.
const PAGES_SAMPLED_MAX: u64 = 64;

/// Where a buffer lies, and how that is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemoryNodes {
    /// Pages of it are in memory: (NUMA node, bytes), by a sample.
    Present(Vec<(u32, u64)>),
    /// No page is in memory yet, as for a buffer that nobody wrote to: where its policy will put them.
    Expected(Vec<(u32, u64)>),
    /// The kernel does not say.
    Unknown,
}

/// NUMA nodes of a host buffer with the bytes on each, most first; empty where the kernel does not say.
///
/// A sample of pages is looked up, none is faulted in. Of a buffer that is not in memory yet, the memory policy
/// tells: registering it will fault its pages in, on the caller's thread.
pub fn numa_nodes_of(addr: u64, len: u64) -> Vec<(u32, u64)> {
    match MemoryNodes::of(addr, len) {
        MemoryNodes::Present(nodes) | MemoryNodes::Expected(nodes) => nodes,
        MemoryNodes::Unknown => Vec::new(),
    }
}

impl MemoryNodes {
    /// Looks a buffer up.
    pub fn of(addr: u64, len: u64) -> Self {
        if len == 0 {
            return Self::Unknown;
        }
        let pages = sample(addr, len, page_bytes());
        match nodes_of_pages(&pages) {
            Ok(found) => {
                let present: Vec<u32> = found.into_iter().flatten().collect();
                if present.is_empty() {
                    Self::expected(pages[0], len)
                } else {
                    Self::Present(share(&present, len))
                }
            }
            Err(error) => {
                // Container runtimes forbid the call by default (CAP_SYS_NICE in Docker's seccomp profile).
                static ONCE: Once = Once::new();
                ONCE.call_once(|| {
                    log::info!(
                        "NUMA nodes of host buffers are guessed from the CPU that registers them: move_pages: {error}; \
                         allow the call (CAP_SYS_NICE in a container) for devices by where the memory is"
                    );
                });
                Self::expected(pages[0], len)
            }
        }
    }

    fn expected(addr: u64, len: u64) -> Self {
        let nodes = match policy_of(addr) {
            Ok(Policy::Nodes(nodes)) => nodes,
            // Where even the policy is withheld it is most likely the default one.
            Ok(Policy::Local) | Err(_) => node_of_this_cpu().into_iter().collect(),
        };
        if nodes.is_empty() { Self::Unknown } else { Self::Expected(share(&nodes, len)) }
    }
}

/// Addresses of at most [`PAGES_SAMPLED_MAX`] pages of a buffer, the first and the last among them.
fn sample(addr: u64, len: u64, page: u64) -> Vec<u64> {
    let first = addr / page;
    let last = addr.saturating_add(len - 1) / page;
    let steps = (last - first).min(PAGES_SAMPLED_MAX - 1);
    let span = u128::from(last - first);
    (0..=steps)
        .map(|step| (first + (span * u128::from(step) / u128::from(steps.max(1))) as u64) * page)
        .collect()
}

/// Divides `len` by how often a node was seen, most first; the rounding goes to the first.
fn share(seen: &[u32], len: u64) -> Vec<(u32, u64)> {
    let mut counts: BTreeMap<u32, u64> = BTreeMap::new();
    for &node in seen {
        *counts.entry(node).or_default() += 1;
    }
    let total = seen.len() as u128;
    let mut shares: Vec<(u32, u64)> = counts
        .into_iter()
        .map(|(node, count)| (node, (u128::from(len) * u128::from(count) / total) as u64))
        .collect();
    shares.sort_by_key(|&(node, bytes)| (std::cmp::Reverse(bytes), node));
    let sum: u64 = shares.iter().map(|&(_, bytes)| bytes).sum();
    if let Some((_, bytes)) = shares.first_mut() {
        *bytes += len - sum;
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_hold_both_ends_and_stay_inside() {
        for (addr, len) in
            [(0x1000, 1), (0x1fff, 2), (0x1000, 64 * 4096), (0x10, 1 << 40), (u64::MAX - 9, 10)]
        {
            let pages = sample(addr, len, 4096);
            assert!(pages.len() as u64 <= PAGES_SAMPLED_MAX);
            assert_eq!(pages[0], addr & !0xfff);
            assert_eq!(*pages.last().unwrap(), (addr + (len - 1)) & !0xfff);
            assert!(pages.is_sorted_by(|a, b| a < b), "{pages:x?}");
        }
    }

    #[test]
    fn shares_add_up() {
        assert_eq!(share(&[1, 0, 1], 100), [(1, 67), (0, 33)]);
        assert_eq!(share(&[3], 7), [(3, 7)]);
    }

    #[test]
    fn memory_of_this_process_is_somewhere() {
        let touched = vec![1u8; 1 << 20];
        let nodes = numa_nodes_of(touched.as_ptr() as u64, touched.len() as u64);
        assert_eq!(nodes.iter().map(|&(_, bytes)| bytes).sum::<u64>(), 1 << 20);
        assert_eq!(MemoryNodes::of(touched.as_ptr() as u64, 0), MemoryNodes::Unknown);
    }
}
