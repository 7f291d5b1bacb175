//! The shared half of a device: which process has which queue pair, and the hardware counters.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::process::ProcessId;
use super::{Mapping, Shared};
use crate::abi::verbs::ibv_gid;
use crate::counters::Counters;

/// Queue pairs of one device, over all processes of its host. Numbers are below this; 0 is not used.
pub const QUEUE_PAIRS_MAX: u32 = 1024;

/// One device, in a file named by its GID.
#[repr(C)]
pub struct DeviceTable {
    /// Numbers are given out in turn, so that a restarted process does not get those of its predecessor soon.
    next: AtomicU32,
    reserved: AtomicU32,
    /// Counted by every process of the host.
    pub counters: Counters,
    owners: [AtomicU64; QUEUE_PAIRS_MAX as usize],
}

// SAFETY: atomics only; zero means no owner and nothing counted.
unsafe impl Shared for DeviceTable {}

impl DeviceTable {
    /// Takes a free queue pair number for `owner`; one whose process is gone counts as free.
    pub fn allocate(&self, owner: ProcessId) -> Option<u32> {
        for _ in 0..QUEUE_PAIRS_MAX {
            let number = self.next.fetch_add(1, Ordering::Relaxed) % QUEUE_PAIRS_MAX;
            if number == 0 {
                continue;
            }
            let slot = &self.owners[number as usize];
            let current = slot.load(Ordering::Acquire);
            if ProcessId::from_raw(current).is_some_and(ProcessId::alive) {
                continue;
            }
            if slot.compare_exchange(current, owner.raw(), Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                return Some(number);
            }
        }
        None
    }

    /// Gives a number back.
    pub fn release(&self, number: u32) {
        if let Some(slot) = self.owners.get(number as usize) {
            slot.store(0, Ordering::Release);
        }
    }

    /// The process that has a queue pair; it may be dead.
    pub fn owner(&self, number: u32) -> Option<ProcessId> {
        ProcessId::from_raw(self.owners.get(number as usize)?.load(Ordering::Acquire))
    }
}

/// The file of the device with this GID.
pub fn path(dir: &Path, gid: &ibv_gid) -> PathBuf {
    let mut name = String::from("device-");
    for byte in gid.raw {
        write!(name, "{byte:02x}").expect("string");
    }
    dir.join(name)
}

/// Maps a device of this host.
pub fn create(dir: &Path, gid: &ibv_gid) -> io::Result<Mapping<DeviceTable>> {
    Mapping::create(&path(dir, gid))
}

/// Maps a device of any host; fails if that host never opened it.
pub fn open(dir: &Path, gid: &ibv_gid) -> io::Result<Mapping<DeviceTable>> {
    Mapping::open(&path(dir, gid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_unique_and_of_a_dead_owner_come_back() {
        let path = std::env::temp_dir().join(format!("softefa-device-{}", std::process::id()));
        let table = Mapping::<DeviceTable>::create(&path).expect("map");
        let me = ProcessId::current();
        let mut seen: Vec<_> = std::iter::from_fn(|| table.allocate(me)).collect();
        assert_eq!(seen.len(), QUEUE_PAIRS_MAX as usize - 1);
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), QUEUE_PAIRS_MAX as usize - 1);
        let dead: ProcessId = format!("{}-1", me.pid()).parse().expect("id");
        table.owners[77].store(dead.raw(), Ordering::Relaxed);
        assert_eq!(table.allocate(me), Some(77));
        assert_eq!(table.owner(77), Some(me));
        std::fs::remove_file(path).expect("remove");
    }
}
