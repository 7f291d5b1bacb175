//! Queue pairs.

use std::cell::UnsafeCell;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::cq::CompletionQueue;
use super::lock::SpanLock;
use super::work::{Receive, WorkRequest};
use crate::abi::verbs::{IBV_QPS_ERR, IBV_QPS_RESET, IBV_QPS_RTR, IBV_QPS_RTS};
use crate::trace::{self, Event, Record};

/// Value of `rnr_retry` that means for ever.
pub const RNR_RETRY_FOREVER: u32 = 7;

/// What a new queue pair is given.
#[derive(Debug)]
pub struct Attributes {
    /// Its number, unique on the device.
    pub number: u32,
    /// Index of the device among those of the host.
    pub device: usize,
    /// Protection domain.
    pub pd: u32,
    /// Writes with immediate data use no receive.
    pub unsolicited: bool,
    /// Work requests that the send queue holds.
    pub send_max: u32,
    /// Receives that the receive queue holds.
    pub receive_max: u32,
    /// Where sends complete.
    pub send_cq: Arc<CompletionQueue>,
    /// Where receives complete.
    pub receive_cq: Arc<CompletionQueue>,
}

#[derive(Debug, Default)]
struct Receives {
    posted: VecDeque<Receive>,
    used: u32,
}

/// Work requests between `wr_start` and `wr_complete`.
#[derive(Debug, Default)]
pub struct Batch {
    /// In the order of posting.
    pub requests: Vec<WorkRequest>,
    /// The first error of the batch; it fails as a whole.
    pub error: i32,
}

/// A queue pair.
#[derive(Debug)]
pub struct QueuePair {
    /// What it was made with.
    pub attributes: Attributes,
    /// Key that senders must name.
    pub qkey: AtomicU32,
    /// Verbs state.
    pub state: AtomicU32,
    /// Times that a send is repeated when the receiver is not ready.
    pub rnr_retry: AtomicU32,
    /// Destroyed: what still refers to it drops it.
    pub destroyed: AtomicBool,
    serial: AtomicU64,
    send_used: AtomicU32,
    receives: Mutex<Receives>,
    posting: SpanLock,
    batch: UnsafeCell<Batch>,
}

// SAFETY: everything but `batch` is thread-safe by itself, and `batch` is only touched by the holder of `posting`.
unsafe impl Sync for QueuePair {}
// SAFETY: nothing in it belongs to a thread.
unsafe impl Send for QueuePair {}

impl QueuePair {
    /// A queue pair in state RESET.
    pub fn new(attributes: Attributes) -> Self {
        Self {
            attributes,
            qkey: AtomicU32::new(0),
            state: AtomicU32::new(IBV_QPS_RESET),
            rnr_retry: AtomicU32::new(RNR_RETRY_FOREVER),
            destroyed: AtomicBool::new(false),
            serial: AtomicU64::new(0),
            send_used: AtomicU32::new(0),
            receives: Mutex::default(),
            posting: SpanLock::default(),
            batch: UnsafeCell::default(),
        }
    }

    /// Whether messages may arrive.
    pub fn ready_to_receive(&self) -> bool {
        let state = self.state.load(Ordering::Acquire);
        (IBV_QPS_RTR..IBV_QPS_ERR).contains(&state) && !self.destroyed.load(Ordering::Acquire)
    }

    /// Whether work requests may be posted.
    pub fn ready_to_send(&self) -> bool {
        (IBV_QPS_RTS..IBV_QPS_ERR).contains(&self.state.load(Ordering::Acquire))
    }

    /// The number of the next operation, from 0.
    pub fn next_serial(&self) -> u64 {
        self.serial.fetch_add(1, Ordering::Relaxed)
    }

    /// Opens a batch: waits until no other thread has one open.
    pub fn start_batch(&self) {
        if !self.posting.try_lock() {
            self.note(Event::TwoPosters, Record::default());
            self.posting.lock();
        }
        self.with_batch(|batch| *batch = Batch::default());
    }

    /// Works on the open batch.
    ///
    /// Callers are the verbs that rdma-core allows between `wr_start` and `wr_complete` of one thread.
    pub fn with_batch<R>(&self, work: impl FnOnce(&mut Batch) -> R) -> R {
        // SAFETY: the interface gives the batch to the thread that called `wr_start` and holds `posting` since; a
        // caller that breaks this rule races on the real device's send queue just so. The reference ends here.
        work(unsafe { &mut *self.batch.get() })
    }

    /// Ends the batch. `Err` is the batch's error, or ENOMEM when the send queue has no room for all of it.
    pub fn finish_batch(&self) -> Result<Vec<WorkRequest>, i32> {
        let batch = self.with_batch(std::mem::take);
        let result = match batch.error {
            0 => Ok(batch.requests),
            error => Err(error),
        };
        if let Ok(requests) = &result {
            self.send_used.fetch_add(requests.len() as u32, Ordering::AcqRel);
        }
        self.posting.unlock();
        result
    }

    /// Whether the send queue holds one more, next to those of the open batch.
    pub fn has_send_room(&self, batch: &Batch) -> bool {
        self.send_used.load(Ordering::Acquire) + (batch.requests.len() as u32) < self.attributes.send_max
    }

    /// A completion of a send work request was read: its place is free.
    pub fn release_send(&self) {
        self.send_used.fetch_sub(1, Ordering::AcqRel);
    }

    /// A completion of a receive was read: its place is free.
    pub fn release_receive(&self) {
        let mut receives = self.receives.lock().unwrap_or_else(PoisonError::into_inner);
        receives.used = receives.used.saturating_sub(1);
    }

    /// Posts a receive; false when the queue is full.
    pub fn post_receive(&self, receive: Receive) -> bool {
        let mut receives = self.receives.lock().unwrap_or_else(PoisonError::into_inner);
        if receives.used >= self.attributes.receive_max {
            return false;
        }
        receives.used += 1;
        receives.posted.push_back(receive);
        true
    }

    /// Takes the oldest posted receive.
    pub fn take_receive(&self) -> Option<Receive> {
        self.receives.lock().unwrap_or_else(PoisonError::into_inner).posted.pop_front()
    }

    /// Puts back a receive whose message did not come whole.
    pub fn return_receive(&self, receive: Receive) {
        self.receives.lock().unwrap_or_else(PoisonError::into_inner).posted.push_front(receive);
    }

    /// Traces an event of this queue pair.
    pub fn note(&self, event: Event, record: Record) {
        let (qpn, device) = (self.attributes.number, self.attributes.device as u16);
        trace::note(event, Record { qpn, device, ..record });
    }
}
