//! Completion queues and the pipes that announce them.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::lock::SpanLock;
use super::qp::QueuePair;
use crate::abi::verbs::ibv_gid;
use crate::status::{Op, Status};
use crate::trace::{Event, Record};

/// Most entries of one queue, a power of two.
pub const ENTRIES_MAX: u32 = 32_768;

/// An entry.
#[derive(Clone, Debug)]
pub struct Completion {
    /// The queue pair that it is about.
    pub qp: Arc<QueuePair>,
    /// Of a receive (or a write that came in), not of a send work request.
    pub receive: bool,
    /// What was done.
    pub op: Op,
    /// The caller's word; 0 for an unsolicited write.
    pub id: u64,
    /// How it ended.
    pub status: Status,
    /// Bytes received.
    pub length: u32,
    /// Immediate data, in network order.
    pub immediate: Option<u32>,
    /// The sender's queue pair.
    pub source_qpn: u32,
    /// The sender's address handle number here.
    pub address_handle: u16,
    /// The sender's device.
    pub source: ibv_gid,
    /// A write that used no receive.
    pub unsolicited: bool,
}

#[derive(Debug, Default)]
struct Ring {
    entries: VecDeque<Completion>,
    armed: bool,
}

impl Completion {
    /// Traces it.
    pub fn note(&self, event: Event) {
        let record = Record {
            peer_qpn: self.source_qpn,
            op: self.op as u8,
            status: self.status.0,
            id: self.id,
            length: u64::from(self.length),
            extra: self.immediate.unwrap_or_default(),
            ..Record::default()
        };
        self.qp.note(event, record);
    }
}

/// The pipe of a completion channel. One word, the queue's cookie, is one event.
#[derive(Debug)]
pub struct EventPipe {
    read: OwnedFd,
    write: OwnedFd,
}

impl EventPipe {
    /// Opens a pipe.
    pub fn new() -> io::Result<Self> {
        let mut ends = [0; 2];
        // SAFETY: the array has room for the two descriptors.
        if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: pipe2 gave both descriptors to this process, and nothing else owns them.
        let (read, write) = unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) };
        // SAFETY: an open descriptor and a flag. A full pipe must not stop the engine; 8192 events fit.
        unsafe { libc::fcntl(write.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
        Ok(Self { read, write })
    }

    /// The end that callers wait on.
    pub fn fd(&self) -> RawFd {
        self.read.as_raw_fd()
    }

    fn announce(&self, cookie: u64) {
        let bytes = cookie.to_ne_bytes();
        // SAFETY: the buffer has the length given; the descriptor is open as long as `self`. A full pipe already
        // wakes its reader, so a refused event is no loss.
        unsafe { libc::write(self.write.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) };
    }

    /// Takes an event, blocking unless the caller made the descriptor non-blocking.
    pub fn take(&self) -> io::Result<u64> {
        let mut bytes = [0_u8; 8];
        // SAFETY: the buffer has the length given; the descriptor is open as long as `self`.
        let read = unsafe { libc::read(self.fd(), bytes.as_mut_ptr().cast(), bytes.len()) };
        match read {
            8 => Ok(u64::from_ne_bytes(bytes)),
            -1 => Err(io::Error::last_os_error()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// A completion queue.
#[derive(Debug)]
pub struct CompletionQueue {
    /// Held from a successful `start_poll` to `end_poll`.
    pub polling: SpanLock,
    capacity: usize,
    ring: Mutex<Ring>,
    length: AtomicUsize,
    events: Option<Arc<EventPipe>>,
    cookie: AtomicU64,
}

impl CompletionQueue {
    /// A queue that announces to `events`. It is rounded up to a power of two, as rdma-core does.
    pub fn new(entries: u32, events: Option<Arc<EventPipe>>) -> Self {
        Self {
            polling: SpanLock::default(),
            capacity: entries.clamp(16, ENTRIES_MAX).next_power_of_two() as usize,
            ring: Mutex::default(),
            length: AtomicUsize::new(0),
            events,
            cookie: AtomicU64::new(0),
        }
    }

    /// The word that announces this queue.
    pub fn set_cookie(&self, cookie: u64) {
        self.cookie.store(cookie, Ordering::Relaxed);
    }

    /// Adds an entry; a full queue gives it back, and then nobody will ever see it.
    pub fn push(&self, completion: Completion) -> Result<(), Completion> {
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        if ring.entries.len() >= self.capacity {
            return Err(completion);
        }
        ring.entries.push_back(completion);
        self.length.store(ring.entries.len(), Ordering::Release);
        if ring.armed {
            ring.armed = false;
            self.announce();
        }
        Ok(())
    }

    /// Takes the oldest entry.
    pub fn pop(&self) -> Option<Completion> {
        if self.length.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let completion = ring.entries.pop_front();
        self.length.store(ring.entries.len(), Ordering::Release);
        completion
    }

    /// Asks for one event at the next entry, or now if there are entries.
    pub fn arm(&self) {
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        if ring.entries.is_empty() {
            ring.armed = true;
        } else {
            self.announce();
        }
    }

    /// Forgets the entries of a queue pair that ends.
    pub fn purge(&self, qp: &Arc<QueuePair>) {
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        ring.entries.retain(|entry| !Arc::ptr_eq(&entry.qp, qp));
        self.length.store(ring.entries.len(), Ordering::Release);
    }

    fn announce(&self) {
        if let Some(events) = &self.events {
            events.announce(self.cookie.load(Ordering::Relaxed));
        }
    }
}
