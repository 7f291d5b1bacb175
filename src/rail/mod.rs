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
mod owner;
mod probe;
mod receive;
mod share;
mod window;
mod work;

use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use self::core::Core;
pub use self::destination::Destination;
pub use self::message::{Fragments, Message};
use self::owner::Owner;
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
    /// A lane of a piece of work waits for the first answer of the peer there. Others may do the work meanwhile.
    WorkWaits {
        /// The work.
        work: Arc<Work>,
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
    /// A message did not reach its destination, and may be sent again: nothing of it has left, or its receiver minds
    /// nothing that comes twice.
    MessageLost {
        /// The message.
        message: Message,
        /// The rail.
        rail: RailId,
        /// Why.
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
    /// Receive buffers of [`MESSAGE_BYTES_MAX`] kept posted.
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
    pub errors: ErrorCounters,
    /// Pieces of work that were given up because their destination took or completed nothing.
    pub stalled: u64,
    /// RMA operations in flight, now.
    pub in_flight: u32,
    /// Operations of shared work that the rail may hold, now.
    pub window: u32,
}

/// Operations that completed in error, by what they were.
#[derive(Debug, Default, Clone, Copy)]
pub struct ErrorCounters {
    /// Writes of this side.
    pub writes: u64,
    /// Reads of this side.
    pub reads: u64,
    /// Control messages out.
    pub sends: u64,
    /// Control messages in.
    pub receives: u64,
    /// Operations of peers that failed here.
    pub remote: u64,
}

impl ErrorCounters {
    /// Each kind with its name.
    pub fn by_kind(&self) -> [(&'static str, u64); 5] {
        let Self { writes, reads, sends, receives, remote } = *self;
        [("write", writes), ("read", reads), ("send", sends), ("receive", receives), ("remote", remote)]
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.by_kind().iter().map(|(_, count)| count).sum()
    }
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
            self.errors.total(),
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
    /// As the last owner left them.
    counters: Mutex<Counters>,
    failure: OnceLock<Error>,
    owner: Owner<Core, Command>,
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
            counters: Mutex::default(),
            failure: OnceLock::new(),
            owner: Owner::new(core),
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
        self.owner.is_idle()
    }

    /// Leaves an invitation to work for the rail's owner.
    pub fn invite(&self, invitation: Invitation) {
        self.owner.leave(Command::Work(invitation));
    }

    /// Leaves a control message for the rail's owner.
    pub fn send(&self, message: Message) {
        self.owner.leave(Command::Message(message));
    }

    /// Makes endpoints known that will write here or read from here, where the device wants that said (efa-direct; the
    /// efa fabric does it by itself).
    pub fn admit(&self, endpoints: Vec<Destination>, tag: Tag) {
        self.owner.leave(Command::Admit(endpoints, tag));
    }

    /// Drives the rail if nobody else does: takes in new work, handles completions, posts. Appends what happened.
    ///
    /// Returns how many events it handled. Work left in the inbox while another thread held the rail is
    /// taken in by that thread before it leaves. Without `room`, no further control messages are received.
    pub fn drive(&self, room: bool, events: &mut Vec<Event>) -> usize {
        let mut handled = 0;
        self.owner.drive(|core, inbox| {
            let done = core.drive(inbox, room, events);
            if done > 0 || core.has_news() {
                *self.counters.lock().unwrap_or_else(PoisonError::into_inner) = core.counters();
            }
            if let Some(failure) = core.failure() {
                self.failure.get_or_init(|| failure.clone());
            }
            handled += done;
        });
        handled
    }

    /// Whether work waits that nothing but driving the rail again will post.
    pub fn has_backlog(&self) -> bool {
        self.owner.has_backlog()
    }

    /// Whether work was left that no owner has taken in.
    pub fn has_mail(&self) -> bool {
        self.owner.has_mail()
    }

    /// Whether a thread may block on [`Rail::wait_fd`] now: nothing is left to poll for.
    pub fn try_wait(&self) -> bool {
        self.owner.ask(Core::try_wait).unwrap_or(false)
    }

    /// Makes a region of this rail's domain usable at its endpoint.
    pub fn bind(&self, region: &MemoryRegion) -> Result<()> {
        if !self.device.mr_endpoint() {
            return Ok(());
        }
        self.owner.lock().as_ref().map_or_else(|| Err(self.closed()), |core| core.bind(region))
    }

    /// Closes the endpoint. What is in flight ends with an error; what comes later is refused.
    pub fn close(&self, events: &mut Vec<Event>) {
        let core = self.owner.lock().take();
        let error = self.closed();
        if let Some(mut core) = core {
            core.end_all(&error, events);
        }
        while let Some(command) = self.owner.take_left() {
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
}
