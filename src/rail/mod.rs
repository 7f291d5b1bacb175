//! A rail: one libfabric endpoint with its queues, and everything that is in flight on it.
//!
//! Whoever holds the rail's lock owns the endpoint: nobody else may post to it or look at its queues (of the efa
//! provider the plugin asks for `FI_THREAD_COMPLETION`, under which it takes no locks of its own).
//! Others leave work in the inbox and try the lock; the owner empties the inbox before it leaves.
//!
//! A rail knows work, messages and destinations. It knows neither transfers nor agents, and calls nobody: driving it
//! returns what happened, for whoever drove to act on when the rail is free.
#![forbid(unsafe_code)]

mod core;
mod destination;
mod failure;
mod message;
mod receive;
mod share;
mod window;
mod work;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, TryLockError};
use std::time::Duration;

use crossbeam_queue::SegQueue;

use self::core::Core;
pub use self::destination::Destination;
pub use self::message::{Fragments, Message};
pub use self::work::{Invitation, Tag, Work};
use crate::error::{Error, Result};
use crate::fabric::{Device, Domain, MemoryRegion};
use crate::types::RailId;

/// Largest control message, header included: the stock plugin's receive buffers are this long.
pub const MESSAGE_BYTES_MAX: usize = 8192;

/// What happened on a rail.
pub enum Event {
    /// An operation of a piece of work has failed, and others are in flight. Comes once.
    WorkFailed {
        /// The work.
        work: Arc<Work>,
    },
    /// Every operation of a piece of work is settled; [`Work::error`] tells whether well.
    WorkOver {
        /// The work.
        work: Arc<Work>,
    },
    /// A lane of a piece of work can do no more of it. What it had claimed may be claimed anew.
    WorkLeft {
        /// The work.
        work: Arc<Work>,
        /// Why.
        error: Error,
    },
    /// The rail does not take a message, of which nothing has left.
    MessageReturned {
        /// The message.
        message: Message,
        /// The rail.
        rail: RailId,
        /// Why not.
        error: Error,
    },
    /// The rail has failed: see [`Rail::failure`].
    Failed,
    /// Every fragment of a message has left, or one could not.
    MessageOver {
        /// Whose it was.
        tag: Tag,
        /// How it ended.
        result: Result<()>,
    },
    /// The rail takes the operations of endpoints that were announced to it, or it never will.
    Admitted {
        /// Who announced them.
        tag: Tag,
    },
    /// A control message arrived.
    Message {
        /// Its immediate data.
        immediate: Option<u32>,
        /// Its bytes.
        body: Vec<u8>,
    },
    /// Peers' writes with immediate data have landed.
    Landed {
        /// The immediate data.
        immediate: u32,
        /// How many with this one.
        count: u32,
    },
}

/// Sizes and deadlines of a rail.
#[derive(Debug, Clone)]
pub struct RailLimits {
    /// Receive buffers of [`MESSAGE_BYTES_MAX`] kept posted; 0 on rails where no control message arrives.
    pub receive_buffers: u32,
    /// Control messages in flight.
    pub send_buffers: u32,
    /// RMA operations in flight; 0 takes the transmit size of the device.
    pub operations_max: u32,
    /// Slices of one piece of work posted before others have their turn.
    pub batch_slices: u32,
    /// Entries of the completion queue; 0 chooses.
    pub cq_entries: u32,
    /// Work for a destination that accepts nothing at all for this long fails.
    pub stall_timeout: Duration,
    /// Whether to ask the provider for a wait object.
    pub want_wait_fd: bool,
    /// Whether the NIC is to move GPU memory by itself; see [`Rail::reaches_gpus`].
    pub gpu_by_nic: bool,
}

/// What a rail has done since it was opened.
#[derive(Debug, Default, Clone, Copy)]
pub struct Counters {
    /// Bytes written by completed operations.
    pub write_bytes: u64,
    /// Completed write operations.
    pub writes: u64,
    /// Bytes read by completed operations.
    pub read_bytes: u64,
    /// Completed read operations.
    pub reads: u64,
    /// Control messages sent.
    pub messages_sent: u64,
    /// Control messages received.
    pub messages_received: u64,
    /// Writes of peers that were announced by immediate data.
    pub immediates: u64,
    /// Posts that the provider put off.
    pub again: u64,
    /// Operations that completed in error.
    pub errors: u64,
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} writes of {} bytes, {} reads of {} bytes, {} messages out, {} in, {} immediates, {} put off, {} errors",
            self.writes,
            self.write_bytes,
            self.reads,
            self.read_bytes,
            self.messages_sent,
            self.messages_received,
            self.immediates,
            self.again,
            self.errors,
        )
    }
}

enum Command {
    Work(Invitation),
    Message(Message),
    Admit(Vec<Destination>, Tag),
}

/// One network device in use.
pub struct Rail {
    id: RailId,
    device: Device,
    domain: Arc<Domain>,
    endpoint_name: Vec<u8>,
    wait_fd: Option<i32>,
    reaches_gpus: bool,
    inbox: SegQueue<Command>,
    /// Nothing is queued or in flight beside what is in the inbox, as the last owner left it.
    idle: AtomicBool,
    /// Something waits to be posted, as the last owner left it.
    backlog: AtomicBool,
    /// As the last owner left them.
    counters: Mutex<Counters>,
    failure: OnceLock<Error>,
    /// `None` once the rail is closed.
    core: Mutex<Option<Core>>,
}

impl fmt::Debug for Rail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rail")
            .field("id", &self.id)
            .field("device", &self.device.domain_name())
            .finish_non_exhaustive()
    }
}

impl Rail {
    /// Opens an endpoint on `domain` and posts its receives.
    pub fn open(id: RailId, domain: &Arc<Domain>, device: &Device, limits: &RailLimits) -> Result<Self> {
        let mut core = Core::open(id, domain, device, limits)
            .map_err(|e| e.context(format_args!("rail {id} on {}", device.domain_name())))?;
        Ok(Self {
            id,
            device: device.clone(),
            domain: Arc::clone(domain),
            endpoint_name: core.endpoint_name()?,
            wait_fd: core.wait_fd(),
            reaches_gpus: core.reaches_gpus(),
            inbox: SegQueue::new(),
            idle: AtomicBool::new(true),
            backlog: AtomicBool::new(false),
            counters: Mutex::default(),
            failure: OnceLock::new(),
            core: Mutex::new(Some(core)),
        })
    }

    /// This rail's index in its engine.
    pub fn id(&self) -> RailId {
        self.id
    }

    /// The device under it.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The domain in which memory is registered for this rail.
    pub fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }

    /// The endpoint's address as peers need it.
    pub fn endpoint_name(&self) -> &[u8] {
        &self.endpoint_name
    }

    /// Why the rail is out of use for good, if it is.
    pub fn failure(&self) -> Option<&Error> {
        self.failure.get()
    }

    /// What it has done.
    pub fn counters(&self) -> Counters {
        *self.counters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A descriptor that turns readable when there is something to poll for; valid while the rail lives.
    pub fn wait_fd(&self) -> Option<i32> {
        self.wait_fd
    }

    /// False where the provider says that its NIC cannot reach GPU memory, although it would take it: see
    /// [`Endpoint::reaches_gpus`](crate::fabric::Endpoint::reaches_gpus).
    pub fn reaches_gpus(&self) -> bool {
        self.reaches_gpus
    }

    /// Whether nothing is queued or in flight here (receives do not count).
    pub fn is_idle(&self) -> bool {
        // In this order: an owner that takes from the inbox has said before that the rail is not idle.
        self.inbox.is_empty() && self.idle.load(Ordering::SeqCst)
    }

    /// Leaves an invitation to work for the rail's owner.
    pub fn invite(&self, invitation: Invitation) {
        self.inbox.push(Command::Work(invitation));
    }

    /// Leaves a control message for the rail's owner.
    pub fn send(&self, message: Message) {
        self.inbox.push(Command::Message(message));
    }

    /// Makes endpoints known that will write here or read from here, where the device wants that said (efa-direct; the
    /// efa fabric does it by itself).
    pub fn admit(&self, endpoints: Vec<Destination>, tag: Tag) {
        self.inbox.push(Command::Admit(endpoints, tag));
    }

    /// Drives the rail if nobody else does: takes in new work, handles completions, posts. Appends what happened.
    ///
    /// Returns how many events it handled. Work left in the inbox while another thread held the rail is
    /// taken in by that thread before it leaves. Without `room`, no further control messages are received.
    pub fn drive(&self, room: bool, events: &mut Vec<Event>) -> usize {
        let mut handled = 0;
        // Pairs with the fence of an owner that is about to leave: one of the two sees the other's write.
        fence(Ordering::SeqCst);
        loop {
            match self.core.try_lock() {
                Ok(mut core) => {
                    let Some(core) = core.as_mut() else { return handled };
                    self.idle.store(false, Ordering::SeqCst);
                    let done = core.drive(&self.inbox, room, events);
                    if done > 0 {
                        *self.counters.lock().unwrap_or_else(PoisonError::into_inner) = core.counters();
                    }
                    if let Some(failure) = core.failure() {
                        self.failure.get_or_init(|| failure.clone());
                    }
                    handled += done;
                    self.idle.store(core.is_idle(), Ordering::SeqCst);
                    self.backlog.store(core.has_backlog(), Ordering::Release);
                }
                // A panic under the lock is reported once, at the boundary; the rail stays still from then on.
                Err(TryLockError::WouldBlock | TryLockError::Poisoned(_)) => return handled,
            }
            fence(Ordering::SeqCst);
            if self.inbox.is_empty() {
                return handled;
            }
        }
    }

    /// Whether work waits that nothing but driving the rail again will post.
    pub fn has_backlog(&self) -> bool {
        self.backlog.load(Ordering::Acquire) || !self.inbox.is_empty()
    }

    /// Whether work was left that no owner has taken in.
    pub fn has_mail(&self) -> bool {
        !self.inbox.is_empty()
    }

    /// Whether a thread may block on [`Rail::wait_fd`] now: nothing is left to poll for.
    pub fn try_wait(&self) -> bool {
        match self.core.try_lock() {
            Ok(mut core) => core.as_mut().is_none_or(|core| self.inbox.is_empty() && core.try_wait()),
            Err(_) => false,
        }
    }

    /// Makes a region of this rail's domain usable at its endpoint.
    pub fn bind(&self, region: &MemoryRegion) -> Result<()> {
        if !self.device.mr_endpoint() {
            return Ok(());
        }
        self.lock().as_ref().map_or_else(|| Err(self.closed()), |core| core.bind(region))
    }

    /// Closes the endpoint. What is in flight ends with an error; what comes later is refused.
    pub fn close(&self, events: &mut Vec<Event>) {
        let core = self.lock().take();
        let error = self.closed();
        if let Some(mut core) = core {
            core.end_all(&error, events);
        }
        while let Some(command) = self.inbox.pop() {
            match command {
                Command::Work(invitation) => invitation.work.fail(error.clone(), events),
                Command::Message(message) => events.push(message.over(Err(error.clone()))),
                Command::Admit(_, tag) => events.push(Event::Admitted { tag }),
            }
        }
    }

    fn closed(&self) -> Error {
        Error::backend(format!("rail {} is closed", self.id))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Core>> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
