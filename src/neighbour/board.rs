//! The board: a page that an agent shares with those of its host that reach its memory.
//!
//! It has a word for each registered region, and a slot for each that copies, so that both sides agree who copies what without a
//! system call. Everybody who may reach the agent's memory may write it too, so the owner takes nothing from it but what slots
//! say, and that only to wait for a limited time; a reader checks all that it finds.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::epochs::{self, Place};
use crate::error::{Error, Result};
use crate::fabric::MemoryRange;
use crate::sys::memfd::SharedWords;
use crate::sys::process::{self, Process};
use crate::wire::{BoardEntry, HostInfo};

/// Regions that a board has room for. What is registered beyond is reached by the NICs.
pub const REGIONS_MAX: usize = 8192;
/// Turns of copying that can be under way in an agent's memory: one for each peer, or for each of its threads.
pub const SLOTS_MAX: usize = 1024;

// The board in words. A slot has a cache line for itself.
const MAGIC_AT: usize = 0;
const NONCE_AT: usize = 1;
/// A place as of a region, which is there until the owner goes.
const OPEN_AT: usize = 4;
const SLOTS_AT: usize = 8;
const SLOT_WORDS: usize = 8;
const REGIONS_AT: usize = SLOTS_AT + SLOTS_MAX * SLOT_WORDS;
const REGION_WORDS: usize = 4;
const WORDS: usize = REGIONS_AT + REGIONS_MAX * REGION_WORDS;

/// `nlfboard`, and what changes when anything of the layout does.
const MAGIC: u64 = u64::from_le_bytes(*b"nlfboar1");
const OPEN: u64 = 1;
/// Bytes in which the magic and the nonce stand, at the beginning.
const FACE_BYTES: usize = 24;

/// The words of a board, one's own or another's.
#[derive(Debug)]
pub(super) struct Words(SharedWords);

/// A copier's words.
#[derive(Clone, Copy)]
pub(super) struct Slot<'a> {
    /// Whose it is ([`Owner`]); 0: nobody's.
    pub owner: &'a AtomicU64,
    pub epoch: &'a AtomicU64,
}

impl Words {
    /// Maps another's board.
    pub fn map(file: &OwnedFd) -> std::io::Result<Self> {
        SharedWords::map(file, WORDS).map(Self)
    }

    /// What is at the beginning of a board with this nonce.
    pub fn face(nonce: [u8; 16]) -> [u8; FACE_BYTES] {
        let mut face = [0; FACE_BYTES];
        face[..8].copy_from_slice(&MAGIC.to_ne_bytes());
        face[8..].copy_from_slice(&nonce);
        face
    }

    /// Whether this is at its beginning.
    pub fn has_face(&self, face: &[u8; FACE_BYTES]) -> bool {
        let words =
            [MAGIC_AT, NONCE_AT, NONCE_AT + 1].map(|at| self.0[at].load(Ordering::Acquire).to_ne_bytes());
        words.as_flattened() == face
    }

    /// One of its [`SLOTS_MAX`] slots.
    pub fn slot(&self, number: usize) -> Slot<'_> {
        let at = SLOTS_AT + number * SLOT_WORDS;
        Slot { owner: &self.0[at], epoch: &self.0[at + 1] }
    }

    /// Takes a slot that is nobody's.
    pub fn claim(&self, me: Owner) -> Option<usize> {
        self.claim_from(me, |owner| owner == 0)
    }

    /// Takes a slot whose owner has ended. It takes a few system calls for each slot.
    pub fn claim_of_ended(&self, me: Owner) -> Option<usize> {
        self.claim_from(me, |owner| Owner(owner).has_ended())
    }

    fn claim_from(&self, me: Owner, free: impl Fn(u64) -> bool) -> Option<usize> {
        let claimed = (0..SLOTS_MAX).find(|number| {
            let word = self.slot(*number).owner;
            let owner = word.load(Ordering::Acquire);
            free(owner) && word.compare_exchange(owner, me.0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        })?;
        let epoch = self.slot(claimed).epoch;
        if epochs::turn(epoch).is_some() {
            // Its former owner ended within a turn.
            epochs::end(epoch);
        }
        Some(claimed)
    }

    /// Whether its agent is there: to be asked within a turn.
    pub fn is_open(&self) -> bool {
        self.place(OPEN_AT).range(OPEN).is_some()
    }

    /// The range of the region with this entry, if it is registered: to be asked within a turn.
    pub fn region(&self, entry: BoardEntry) -> Option<(u64, u64)> {
        let number = usize::try_from(entry.number).ok().filter(|number| *number < REGIONS_MAX)?;
        self.place(Self::at(number)).range(entry.generation)
    }

    /// Writes something into every word.
    #[cfg(test)]
    pub fn scribble(&self, with: &[u64]) {
        self.0
            .iter()
            .zip(with.iter().cycle())
            .for_each(|(word, value)| word.store(*value, Ordering::Relaxed));
    }

    fn at(region: usize) -> usize {
        REGIONS_AT + region * REGION_WORDS
    }

    fn place(&self, at: usize) -> Place<'_> {
        Place { generation: &self.0[at], addr: &self.0[at + 1], len: &self.0[at + 2] }
    }
}

/// Bits of an [`Owner`] that tell when its process began: ticks of 10 ms for a thousand years.
const START_BITS: u32 = 42;

/// A process in one word: its number (22 bits, the most that Linux gives) and when it began. One word, so that none can end
/// between two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owner(pub u64);

impl Owner {
    pub fn new(pid: u32, start_time: u64) -> Self {
        Self(u64::from(pid) << START_BITS | start_time & ((1 << START_BITS) - 1))
    }

    fn pid(self) -> u32 {
        (self.0 >> START_BITS) as u32
    }

    /// Whether no such process is left. `false` if that cannot be told.
    fn has_ended(self) -> bool {
        let process = Process::open(self.pid(), self.0 & ((1 << START_BITS) - 1));
        process.is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound)
    }
}

/// An agent's own board.
#[derive(Debug)]
pub struct Board {
    words: Words,
    info: HostInfo,
    places: Mutex<Places>,
    /// The process that made it: a child of it, which has the same board, changes nothing.
    pid: u32,
    _file: OwnedFd,
}

#[derive(Debug)]
struct Places {
    /// Numbers that were given and came back.
    free: Vec<u32>,
    /// Numbers below it were given.
    given: u32,
    generation: u64,
}

impl Board {
    /// A board without regions. Fails where this system has no such thing (memory files, `/proc`).
    pub fn new() -> Result<Arc<Self>> {
        Self::create().map(Arc::new).map_err(|e| Error::not_supported(e.to_string()))
    }

    fn create() -> std::io::Result<Self> {
        let pid = std::process::id();
        let (file, words) = SharedWords::create("nixl-board", WORDS)?;
        let info = HostInfo {
            boot_id: process::boot_id()?,
            pid_namespace: process::pid_namespace()?,
            pid,
            board_fd: file.as_raw_fd() as u32,
            start_time: process::start_time(pid)?,
            board_addr: words.as_ptr() as u64,
            nonce: process::random_id()?,
        };
        for (word, bytes) in words.iter().zip(Words::face(info.nonce).as_chunks().0) {
            word.store(u64::from_ne_bytes(*bytes), Ordering::Relaxed);
        }
        let words = Words(words);
        words.place(OPEN_AT).publish(OPEN, (0, 0));
        let places = Mutex::new(Places { free: Vec::new(), given: 0, generation: 0 });
        Ok(Self { words, info, places, pid, _file: file })
    }

    /// What peers need to find it.
    pub fn info(&self) -> &HostInfo {
        &self.info
    }

    /// Puts up a region; `None` if there is no room.
    pub fn publish(self: &Arc<Self>, range: MemoryRange) -> Option<Published> {
        let mut places = self.lock();
        let number = places.free.pop().or_else(|| {
            let next = places.given;
            places.given += u32::from((next as usize) < REGIONS_MAX);
            ((next as usize) < REGIONS_MAX).then_some(next)
        })?;
        places.generation += 1;
        let entry = BoardEntry { number, generation: places.generation };
        drop(places);
        self.words.place(Words::at(number as usize)).publish(entry.generation, (range.addr(), range.len()));
        Some(Published { board: Arc::clone(self), entry })
    }

    /// No turn that begins from now on finds any region: the agent goes. Returns who copies still.
    pub fn close(self: &Arc<Self>) -> Copiers {
        if self.is_own() {
            self.words.place(OPEN_AT).withdraw();
        }
        self.copiers()
    }

    /// Those that are in a turn now.
    fn copiers(self: &Arc<Self>) -> Copiers {
        let turns = (0..SLOTS_MAX)
            .filter_map(|slot| epochs::turn(self.words.slot(slot).epoch).map(|turn| (slot, turn)))
            .collect();
        Copiers { board: Arc::clone(self), turns }
    }

    fn is_own(&self) -> bool {
        self.pid == std::process::id()
    }

    fn lock(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A region on its agent's board, until it is dropped.
#[derive(Debug)]
pub struct Published {
    board: Arc<Board>,
    entry: BoardEntry,
}

impl Published {
    /// Where it stands.
    pub fn entry(&self) -> BoardEntry {
        self.entry
    }

    /// Takes it down: no turn that begins from now on finds it. Returns who may copy still.
    pub fn withdraw(&self) -> Copiers {
        if self.board.is_own() {
            self.board.words.place(Words::at(self.entry.number as usize)).withdraw();
        }
        self.board.copiers()
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        drop(self.withdraw());
        // Whoever copies still has looked at the place already.
        self.board.lock().free.push(self.entry.number);
    }
}

/// Those that were in a turn when regions were withdrawn.
#[derive(Debug)]
pub struct Copiers {
    board: Arc<Board>,
    turns: Vec<(usize, u64)>,
}

impl Copiers {
    /// Whether all of these turns are over, by their word or because the process has ended.
    pub fn have_left(&mut self) -> bool {
        self.turns.retain(|(slot, turn)| {
            let slot = self.board.words.slot(*slot);
            !epochs::is_over(slot.epoch, *turn) && !Owner(slot.owner.load(Ordering::Acquire)).has_ended()
        });
        self.turns.is_empty()
    }

    /// How many are in a turn still, as last seen.
    pub fn count(&self) -> usize {
        self.turns.len()
    }
}
