//! Neighbours: peers on this host whose memory this process reaches without a network.
//!
//! A peer says in its connection info which process it is and where its [board](board) is. Whether it can be reached depends on
//! much that nobody can list (namespaces, users, security modules, containers), so it is tried: the board's nonce is read from the
//! peer's memory, and the board is mapped. Where anything of it fails, the NICs carry what there is for that peer.
//!
//! Each turn of copying (`process_vm_writev(2)`) reads the nonce again: the process may have ended, or become another program.
#![forbid(unsafe_code)]

mod board;
mod epochs;
mod gpu;
mod mappings;

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use self::board::{Board, Copiers, Published};
use self::board::{Owner, Words};
use self::gpu::Mappings;
pub use self::gpu::{GpuRegion, LongTurn};
pub use self::mappings::MAPPINGS_MAX;
use crate::error::{Error, Result, Status};
use crate::fabric::{ProcessCopy, copy_with};
use crate::sync::AtomicU64;
use crate::sys::process::{self, Process};
use crate::types::Op;
use crate::wire::{BoardEntry, HostInfo};

/// A peer on this host that was reached.
pub struct Neighbour {
    process: Process,
    info: HostInfo,
    board: Words,
    me: Owner,
    /// Slots that are ours, and in no turn.
    slots: Mutex<Vec<usize>>,
    /// This process: a child of it, which has the same slots, leaves them alone.
    pid: u32,
    /// The kernel does not allow it any more.
    lost: AtomicBool,
    /// GPU memory of its process that is mapped here.
    mappings: Arc<Mappings>,
    /// Something of it was mapped, and the log has told so.
    is_mapped: AtomicBool,
    /// The peer was removed: nothing is mapped for it any more.
    is_unmapped: AtomicBool,
}

impl fmt::Debug for Neighbour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {}", self.process.pid())
    }
}

impl Neighbour {
    /// Tries to reach a peer. The error says why the NICs have to.
    pub fn meet(own: &HostInfo, peer: &HostInfo) -> Result<Self> {
        let refuse = |why: &str| Err(Error::not_supported(why));
        if peer.boot_id != own.boot_id {
            return refuse("it is on another host");
        }
        if peer.pid_namespace != own.pid_namespace {
            return refuse("its processes have another namespace (pods: shareProcessNamespace, hostPID)");
        }
        let failed = |what: &'static str| move |e: io::Error| Error::not_supported(format!("{what}: {e}"));
        let process = Process::open(peer.pid, peer.start_time).map_err(failed("its process is not found"))?;
        let users = (process::user(own.pid), process::user(peer.pid));
        if !matches!(users, (Ok(own), Ok(peer)) if own == peer) {
            return refuse("it runs as another user");
        }
        let face = Words::face(peer.nonce);
        let found = process.read_bytes(peer.board_addr).map_err(failed("its memory cannot be read"))?;
        if found != face {
            return refuse("its memory has something else where its board should be");
        }
        let file = process.open_file(peer.board_fd).map_err(failed("its board cannot be opened"))?;
        let board = Words::map(&file).map_err(failed("its board cannot be mapped"))?;
        if !board.has_face(&face) {
            return refuse("the file of its board is another one");
        }
        let me = Owner::new(own.pid, own.start_time);
        let Some(slot) = board.claim(me).or_else(|| board.claim_of_ended(me)) else {
            return refuse("too many reach its memory already");
        };
        Ok(Self {
            process,
            info: *peer,
            board,
            me,
            slots: Mutex::new(vec![slot]),
            pid: std::process::id(),
            lost: AtomicBool::new(false),
            mappings: Mappings::of((peer.pid, peer.start_time)),
            is_mapped: AtomicBool::new(false),
            is_unmapped: AtomicBool::new(false),
        })
    }

    /// Whether the kernel has taken back what it allowed: the peer may have changed its user, or what others may do to it.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Tries whether a region can be reached: its first and its last byte are read. Memory of a device that is mapped into the
    /// process may not be.
    pub fn reaches(self: &Arc<Self>, entry: BoardEntry, addr: u64, len: u64) -> Result<()> {
        let slot = self.slot_for_trial()?;
        let turn = slot.begin()?;
        turn.check_entry(entry, addr, len)?;
        for at in [addr, addr + len.saturating_sub(1)] {
            self.process.read_bytes::<1>(at).map_err(|e| self.broken(&e))?;
        }
        Ok(())
    }

    /// A slot for one turn at a time. `None` while others here have ours, and no other is left.
    pub fn slot(self: &Arc<Self>) -> Option<Slot> {
        let own = self.lock().pop();
        let number = own.or_else(|| self.board.claim(self.me))?;
        Some(Slot { neighbour: Arc::clone(self), number })
    }

    fn slot_for_trial(self: &Arc<Self>) -> Result<Slot> {
        self.slot().ok_or_else(|| Error::not_supported("too many reach its agent's memory at a time"))
    }

    /// Where a region lies in the process: to be asked within a turn.
    fn find(&self, entry: BoardEntry) -> Result<(u64, u64)> {
        if !self.board.is_open() {
            return Err(Error::disconnected("its agent has gone"));
        }
        self.board.region(entry).ok_or_else(|| Error::not_found("the region was deregistered there"))
    }

    /// An error if its process has ended: to be asked when a GPU's copies are over, because a mapping keeps the memory, and
    /// copies into it go well.
    pub fn check_lives(&self) -> Result<()> {
        if self.process.has_ended() { Err(self.ended()) } else { Ok(()) }
    }

    fn ended(&self) -> Error {
        Error::disconnected(format!("its process ({}) has ended", self.process.pid()))
    }

    /// Fails unless the process is still the one that was met.
    fn check_face(&self) -> Result<()> {
        let face = self.process.read_bytes(self.info.board_addr).map_err(|e| self.broken(&e))?;
        if face != Words::face(self.info.nonce) {
            return Err(Error::disconnected("its process has become another program"));
        }
        Ok(())
    }

    fn broken(&self, e: &io::Error) -> Error {
        if e.kind() == io::ErrorKind::NotFound || self.process.has_ended() {
            return self.ended();
        }
        if e.kind() == io::ErrorKind::PermissionDenied && !self.lost.swap(true, Ordering::Relaxed) {
            log::warn!(
                "process {} is reached by the NICs from now on: {e}; transfers that were prepared before fail",
                self.process.pid()
            );
        }
        let what = format!("the memory of its process ({}) cannot be reached: {e}", self.process.pid());
        Error::new(Status::Backend, what)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<usize>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        if self.pid == std::process::id() {
            self.unmap();
            for slot in std::mem::take(&mut *self.lock()) {
                self.board.slot(slot).owner.store(0, Ordering::Release);
            }
        }
    }
}

/// A place on a neighbour's board.
pub struct Slot {
    neighbour: Arc<Neighbour>,
    number: usize,
}

impl Slot {
    /// Begins to copy, if the process is still the one that was met.
    pub fn begin(&self) -> Result<Turn<'_>> {
        epochs::begin(self.epoch());
        let turn = Turn { neighbour: &self.neighbour, slot: self.number };
        self.neighbour.check_face()?;
        Ok(turn)
    }

    fn epoch(&self) -> &AtomicU64 {
        self.neighbour.board.slot(self.number).epoch
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.neighbour.lock().push(self.number);
    }
}

/// A turn of copying: regions that are found in it stay registered until it is dropped.
pub struct Turn<'a> {
    neighbour: &'a Neighbour,
    slot: usize,
}

impl Turn<'_> {
    /// Fails unless the region is this neighbour's and registered there, and the range lies in it.
    pub fn check(&self, region: &NeighbourRegion, addr: u64, len: u64) -> Result<()> {
        if !std::ptr::eq(&raw const *region.neighbour, self.neighbour) {
            return Err(Error::invalid("a copy is of another neighbour's memory"));
        }
        self.check_entry(region.entry, addr, len)
    }

    fn check_entry(&self, entry: BoardEntry, addr: u64, len: u64) -> Result<()> {
        let found = self.neighbour.find(entry);
        let (start, bytes) = found.map_err(|e| e.context(format_args!("{addr:#x}+{len}")))?;
        let inside = addr >= start && addr - start <= bytes && len <= bytes - (addr - start);
        if inside { Ok(()) } else { Err(Error::invalid(format!("{addr:#x}+{len} is not inside its region"))) }
    }

    /// Copies, in the direction of `op`. What is there was [checked](Self::check) in this turn.
    pub fn copy(&self, op: Op, copies: &[ProcessCopy]) -> Result<()> {
        copy_with(&self.neighbour.process, op, copies).map_err(|e| self.neighbour.broken(&e))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        epochs::end(self.neighbour.board.slot(self.slot).epoch);
    }
}

/// A region of a neighbour, as a transfer keeps it.
#[derive(Debug, Clone)]
pub struct NeighbourRegion {
    /// Whose.
    pub neighbour: Arc<Neighbour>,
    /// Where it stands on the board.
    pub entry: BoardEntry,
}

#[cfg(test)]
mod tests;
