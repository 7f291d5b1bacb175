//! The engine's tables, and what happens when.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::link::Link;
use super::source::Flight;
use super::target::{Arrival, Transfer};
use crate::abi::verbs::ibv_gid;
use crate::config::Config;
use crate::control::{Control, Dice, Effects};
use crate::counters::add;
use crate::memory::{AddressHandles, Registrations};
use crate::queue::cq::Completion;
use crate::queue::qp::QueuePair;
use crate::shm::Mapping;
use crate::shm::device::{self, DeviceTable};
use crate::shm::mailbox::Mailbox;
use crate::shm::process::ProcessId;
use crate::status::Op;
use crate::trace::{Event as Trace, now_ns};

/// How soon the engine tries again what had no room.
const RETRY_NS: u64 = 50_000;

/// A device of this host that this process has opened.
pub struct OpenDevice {
    /// The part that processes share.
    pub table: Mapping<DeviceTable>,
    /// Registrations of this process.
    pub registrations: Registrations,
    /// Address handles of this process.
    pub handles: AddressHandles,
    /// Queue pairs of this process by number.
    pub queue_pairs: HashMap<u32, Arc<QueuePair>>,
}

/// Something that happens at its time.
pub enum Event {
    /// An operation leaves, or is tried again.
    Transmit(Box<Flight>),
    /// An operation without an answer is given up.
    GiveUp(Box<Flight>),
    /// A completion shows.
    Complete(Completion),
}

struct Due {
    at: u64,
    tie: u64,
    event: Event,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.tie) == (other.at, other.tie)
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.tie).cmp(&(other.at, other.tie))
    }
}

/// Everything that the engine's lock protects.
pub struct State {
    pub(super) config: &'static Config,
    pub(super) me: ProcessId,
    pub(super) mailbox: Arc<Mapping<Mailbox>>,
    /// By index among the host's devices.
    pub devices: BTreeMap<usize, OpenDevice>,
    by_gid: HashMap<[u8; 16], usize>,
    pub(super) remotes: HashMap<[u8; 16], Mapping<DeviceTable>>,
    pub(super) links: BTreeMap<ProcessId, Link>,
    pub(super) seen_registrations: u32,
    agenda: BinaryHeap<Reverse<Due>>,
    pub(super) arrivals: VecDeque<Arrival>,
    pub(super) transfers: Vec<Transfer>,
    /// Operations that wait for an answer that will not come.
    #[expect(clippy::vec_box, reason = "an operation carries inline bytes whose address its target has")]
    pub(super) lost: Vec<Box<Flight>>,
    /// Devices that have answered this process once.
    pub(super) responsive: HashSet<[u8; 16]>,
    /// Until when the bucket of a control line and a sending device is busy.
    pub(super) buckets: HashMap<(usize, [u8; 16]), u64>,
    /// Operations that matched a control line.
    pub(super) matches: HashMap<usize, u64>,
    pub(super) control: Control,
    pub(super) dice: Dice,
    next_pd: u32,
}

impl State {
    /// Empty tables.
    pub fn new(config: &'static Config, me: ProcessId, mailbox: Arc<Mapping<Mailbox>>) -> Self {
        let by_gid =
            config.devices.iter().enumerate().map(|(index, device)| (device.gid.raw, index)).collect();
        Self {
            config,
            me,
            mailbox,
            devices: BTreeMap::new(),
            by_gid,
            remotes: HashMap::new(),
            links: BTreeMap::new(),
            seen_registrations: 0,
            agenda: BinaryHeap::new(),
            arrivals: VecDeque::new(),
            transfers: Vec::new(),
            lost: Vec::new(),
            responsive: HashSet::new(),
            buckets: HashMap::new(),
            matches: HashMap::new(),
            control: Control::default(),
            dice: Dice::new(config.seed, &ibv_gid { raw: [0; 16] }, 0, 0, 0),
            next_pd: 0,
        }
    }

    /// Opens a device of this host for this process; opening again is free.
    pub fn open_device(&mut self, index: usize) -> io::Result<()> {
        if self.devices.contains_key(&index) {
            return Ok(());
        }
        let gid = self.config.devices[index].gid;
        let table = device::create(&self.config.dir, &gid)?;
        let start = (self.me.raw() as u32).wrapping_mul(0x85eb_ca6b) ^ (index as u32) << 20;
        let device = OpenDevice {
            table,
            registrations: Registrations::new(start),
            handles: AddressHandles::default(),
            queue_pairs: HashMap::new(),
        };
        self.devices.insert(index, device);
        Ok(())
    }

    /// A device that was opened.
    pub fn device(&mut self, index: usize) -> Option<&mut OpenDevice> {
        self.devices.get_mut(&index)
    }

    /// The open device with this GID.
    pub(super) fn device_by_gid(&self, gid: &ibv_gid) -> Option<(usize, &OpenDevice)> {
        let index = *self.by_gid.get(&gid.raw)?;
        Some((index, self.devices.get(&index)?))
    }

    /// A new protection domain's number.
    pub fn new_pd(&mut self) -> u32 {
        self.next_pd += 1;
        self.next_pd
    }

    /// Adds a queue pair to its device.
    pub fn add_queue_pair(&mut self, qp: &Arc<QueuePair>) {
        if let Some(device) = self.devices.get_mut(&qp.attributes.device) {
            device.queue_pairs.insert(qp.attributes.number, Arc::clone(qp));
        }
    }

    /// Ends a queue pair: when this returns, nothing reads or writes on its behalf any more.
    pub fn remove_queue_pair(&mut self, qp: &Arc<QueuePair>) {
        qp.destroyed.store(true, Ordering::Release);
        self.drop_transfers_of(qp);
        for link in self.links.values_mut() {
            link.drop_flights(|flight| Arc::ptr_eq(&flight.qp, qp));
        }
        self.lost.retain(|flight| !Arc::ptr_eq(&flight.qp, qp));
        // The agenda drops events of destroyed queue pairs as they come up.
        if let Some(device) = self.devices.get_mut(&qp.attributes.device) {
            device.queue_pairs.remove(&qp.attributes.number);
            device.table.release(qp.attributes.number);
        }
        qp.attributes.send_cq.purge(qp);
        qp.attributes.receive_cq.purge(qp);
    }

    /// The seed in force.
    pub(super) fn seed(&self) -> u64 {
        self.control.seed.unwrap_or(self.config.seed)
    }

    /// A new control file.
    pub(super) fn set_control(&mut self, control: Control) {
        if control.seed != self.control.seed {
            self.dice =
                Dice::new(control.seed.unwrap_or(self.config.seed), &ibv_gid { raw: [0; 16] }, 0, 0, 0);
        }
        self.control = control;
        self.matches.clear();
        self.buckets.clear();
    }

    pub(super) fn effects(
        &self,
        source: &ibv_gid,
        destination: &ibv_gid,
        op: Op,
        immediate: bool,
    ) -> Effects {
        self.control.effects(source, destination, op, immediate)
    }

    /// Puts an event on the agenda.
    pub(super) fn at(&mut self, at: u64, event: Event) {
        let tie = self.dice.roll();
        self.agenda.push(Reverse(Due { at, tie, event }));
    }

    /// Does what is due.
    pub(super) fn run_due(&mut self) {
        let now = now_ns();
        while self.agenda.peek().is_some_and(|Reverse(due)| due.at <= now) {
            let Some(Reverse(due)) = self.agenda.pop() else { return };
            match due.event {
                Event::Transmit(flight) if flight.is_live() => self.transmit(flight),
                Event::GiveUp(flight) if flight.is_live() => self.give_up(flight),
                Event::Complete(completion) => self.show(completion),
                Event::Transmit(_) | Event::GiveUp(_) => {}
            }
        }
    }

    /// Puts a completion where its caller finds it; it is lost if its queue is full.
    pub(super) fn show(&self, completion: Completion) {
        if completion.qp.destroyed.load(Ordering::Acquire) {
            return;
        }
        let attributes = &completion.qp.attributes;
        let queue = if completion.receive { &attributes.receive_cq } else { &attributes.send_cq };
        if let Err(lost) = Arc::clone(queue).push(completion) {
            lost.note(Trace::Overrun);
            self.with_counters(&lost.qp, |counters| add(&counters.softefa_cq_overruns, 1));
        }
    }

    /// When the engine must run again by itself, in nanoseconds; `u64::MAX` is never.
    pub(super) fn next_due(&self) -> u64 {
        if !self.transfers.is_empty() {
            return 0;
        }
        let agenda = self.agenda.peek().map_or(u64::MAX, |Reverse(due)| due.at);
        let waits = !self.arrivals.is_empty() || self.links.values().any(Link::waits);
        if waits { agenda.min(now_ns() + RETRY_NS) } else { agenda }
    }
}
