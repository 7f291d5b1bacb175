//! What exists in a simulation: hosts, endpoints, queues, registrations; and the rules for using them.
//!
//! A rule that the code under test breaks is noted in [`State::broken`], not panicked about: panics cannot cross the
//! tables of C functions. The driver looks after each call.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::clock;
use crate::network::{Flight, FlightId, Schedule};
use crate::provider::Graveyard;
use crate::rng::Rng;

/// Kind of an object that is opened and closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Kind {
    Info,
    Fabric,
    Domain,
    Mr,
    Av,
    Cq,
    Eq,
    Ep,
}

/// How the simulated provider behaves: what real ones differ in.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct Profile {
    pub provider: &'static str,
    pub fabric: &'static str,
    /// Remote memory is named by address; else by offset.
    pub virt_addr: bool,
    /// The provider chooses keys.
    pub prov_key: bool,
    /// Registrations are bound to endpoints.
    pub mr_endpoint: bool,
    /// FI_DELIVERY_COMPLETE can be had.
    pub delivery_complete: bool,
    /// Writes to one peer land in order.
    pub orders_writes: bool,
    /// Messages to one peer are matched in order.
    pub orders_sends: bool,
    /// Messages are numbered: what follows one that was lost is never delivered.
    pub numbers_messages: bool,
    /// A write with immediate data uses up a receive.
    pub rx_cq_data: bool,
    /// What is for a host happens when that host polls; else its NIC does it alone.
    pub host_driven: bool,
    /// What the transmit queue does not hold waits in memory; else it is put off.
    pub queues_in_memory: bool,
    /// The NIC cannot write: the target's software fetches what is written, and says so. Where it dies, nothing does.
    pub emulates_writes: bool,
    /// Posts are put off while a connection is made, for ever if the peer is dead.
    pub connects: bool,
    /// A poll takes in what the NIC has, and keeps messages for which no receive is posted; else they wait at their sender.
    pub pools_messages: bool,
}

/// The efa fabric of the efa provider.
pub const EFA: Profile = Profile {
    provider: "efa",
    fabric: "efa",
    virt_addr: true,
    prov_key: true,
    mr_endpoint: false,
    delivery_complete: true,
    orders_writes: false,
    orders_sends: false,
    numbers_messages: true,
    rx_cq_data: false,
    host_driven: false,
    queues_in_memory: false,
    emulates_writes: false,
    connects: false,
    pools_messages: true,
};

/// The same on a device without RDMA write.
pub const EFA_READS_ONLY: Profile = Profile { emulates_writes: true, ..EFA };

/// The efa-direct fabric, with writes that use up receives.
pub const EFA_DIRECT: Profile =
    Profile { fabric: "efa-direct", numbers_messages: false, rx_cq_data: true, pools_messages: false, ..EFA };

/// The tcp provider.
pub const TCP: Profile = Profile {
    provider: "tcp",
    fabric: "10.0.0.0/8",
    virt_addr: false,
    prov_key: false,
    orders_writes: true,
    orders_sends: true,
    numbers_messages: false,
    host_driven: true,
    queues_in_memory: true,
    connects: true,
    pools_messages: false,
    ..EFA
};

/// A provider whose registrations are bound to endpoints, as cxi's are.
pub const BOUND_MR: Profile = Profile {
    provider: "cxi",
    fabric: "cxi",
    virt_addr: false,
    mr_endpoint: true,
    numbers_messages: false,
    pools_messages: false,
    ..EFA
};

/// What stands still on the network, until it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)]
pub enum Held {
    #[default]
    Nothing,
    /// Writes and reads; messages get through.
    Rma,
    /// Writes and reads between this host and any other.
    RmaOf(usize),
    All,
}

/// How a NIC fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Breakage {
    /// Its queue pair goes into error: what is in flight and what is posted later completes in error. What has left it
    /// may land all the same.
    Flushes,
    /// Its completion queue cannot be read any more. What is in flight goes on until the endpoint is closed.
    IsMute,
    /// It refuses every post. What is in flight completes.
    Refuses,
    /// Its link is down: it reaches nobody, and nobody reaches it. Nothing else tells. What has left it may land.
    CutOff,
}

/// What goes wrong, in thousandths.
#[derive(Debug, Clone, Default)]
#[allow(missing_docs)]
pub struct Faults {
    /// A post is put off.
    pub again: u32,
    /// A post that follows others of its batch is put off.
    pub again_in_batch: u32,
    /// A post is refused.
    pub post_error: u32,
    /// A poll finds nothing although something is there.
    pub poll_again: u32,
    /// An error is announced and then not there yet.
    pub readerr_again: u32,
    /// A write or read completes in error.
    pub rma_error: u32,
    /// A message completes in error at its sender.
    pub send_error: u32,
    /// Something takes a hundred times longer than usual.
    pub slow: u32,
    /// An endpoint, by host and by its place there, whose writes and reads take so many times longer.
    pub slow_endpoint: Option<(usize, usize, u64)>,
    /// What stands still on the network.
    pub held: Held,
    /// The next so many messages fail.
    pub sends_to_fail: u32,
    /// The n-th call that opens or sets up something fails (counted from 0).
    pub setup_fails_at: Option<u64>,
}

/// An error that the network injected, or found.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct Injury {
    pub source_host: usize,
    pub target_host: Option<usize>,
    /// First local byte and length of the operation; of a message, its buffer.
    pub local: (usize, usize),
    pub message: bool,
}

#[derive(Debug)]
pub(crate) struct Host {
    pub dead: bool,
}

#[derive(Debug)]
pub(crate) struct Mr {
    pub domain: usize,
    pub addr: usize,
    pub len: usize,
    pub key: u64,
    /// Endpoint that it is bound to, and whether it is enabled.
    pub bound: Option<usize>,
    pub enabled: bool,
    /// Operations in flight that name it as local memory.
    pub in_flight: u32,
}

#[derive(Debug)]
pub(crate) struct Entry {
    pub context: usize,
    pub flags: u64,
    pub len: usize,
    pub data: u64,
    /// Error number and provider's error number.
    pub error: Option<(i32, i32)>,
}

#[derive(Debug)]
pub(crate) struct Cq {
    pub domain: usize,
    pub size: usize,
    pub entries: VecDeque<Entry>,
    pub endpoints_open: u32,
}

#[derive(Debug)]
pub(crate) struct Recv {
    pub context: usize,
    pub addr: usize,
    pub len: usize,
    pub mr: usize,
}

/// A message, or a write that uses up a receive, at its target.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub payload: Option<Vec<u8>>,
    pub data: Option<u32>,
    pub len: usize,
}

#[derive(Debug)]
pub(crate) struct AvEntry {
    pub target: Option<usize>,
    pub in_flight: u32,
    /// It has completed a write or a read.
    pub reached: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Connection {
    Connecting(u64),
    Up,
}

#[derive(Debug)]
pub(crate) struct Ep {
    pub host: usize,
    pub domain: usize,
    pub cq: Option<usize>,
    pub av: Option<usize>,
    pub eq: Option<usize>,
    /// Somebody tried to bind an event queue. A provider may refuse.
    pub eq_offered: bool,
    pub enabled: bool,
    pub closed: bool,
    pub tx_size: usize,
    pub rx_size: usize,
    /// Flags of every operation that names none.
    pub op_flags: u64,
    pub name: [u8; 32],
    pub recvs: VecDeque<Recv>,
    /// Arrivals for which no receive was posted, or that no poll has taken in.
    pub unmatched: VecDeque<Arrival>,
    /// What polls have taken in and no receive has met, where the provider keeps that.
    pub pooled: VecDeque<Arrival>,
    /// It has failed.
    pub broken: Option<Breakage>,
    /// Contexts in flight.
    pub contexts: BTreeSet<usize>,
    /// Operations (receives aside) in flight.
    pub outstanding: usize,
    /// Posted with FI_MORE and without a doorbell, and the address they are for.
    pub held: Vec<FlightId>,
    pub batch: Option<u64>,
    pub connections: HashMap<usize, Connection>,
    pub mrs_bound: u32,
    /// Writes and reads that were done.
    pub moved: u64,
    /// Times that the NIC was told of something to send.
    pub doorbells: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Domain {
    pub fabric: usize,
    pub host: usize,
    pub children: u32,
}

/// Everything that a simulation knows.
#[derive(Debug)]
pub struct State {
    pub(crate) profile: Profile,
    pub(crate) rails: usize,
    pub(crate) rng: Rng,
    /// What goes wrong.
    pub faults: Faults,
    /// Longest usual delay, in nanoseconds.
    pub delay_ns: u64,
    /// Entries of the transmit queue.
    pub tx_size: usize,
    /// Most entries that a poll gives.
    pub poll_batch: usize,
    /// Errors that were injected or found.
    pub injuries: Vec<Injury>,
    /// Endpoints, the second of which gets no more messages of the first.
    pub(crate) deaf: HashSet<(usize, usize)>,
    /// Rules that were broken.
    pub broken: Vec<String>,
    /// Calls into the provider since the driver last set it to 0.
    pub calls: u64,
    /// Calls that open or set up something.
    pub setup_calls: u64,
    pub(crate) hosts: Vec<Host>,
    pub(crate) fabrics: Vec<u32>,
    pub(crate) domains: Vec<Domain>,
    pub(crate) mrs: Vec<Mr>,
    pub(crate) keys: HashMap<(usize, u64), usize>,
    pub(crate) avs: Vec<(u32, Vec<Option<AvEntry>>)>,
    pub(crate) cqs: Vec<Cq>,
    pub(crate) eqs: Vec<u32>,
    pub(crate) eps: Vec<Ep>,
    pub(crate) names: HashMap<[u8; 32], usize>,
    pub(crate) flights: BTreeMap<FlightId, Flight>,
    pub(crate) schedule: Schedule,
    pub(crate) graveyard: Graveyard,
    open: BTreeMap<Kind, i64>,
}

/// A call makes more provider calls than this only if it does not end.
const CALLS_MAX: u64 = 3_000_000;

impl State {
    /// Notes that a rule was broken.
    pub fn breach(&mut self, what: impl Into<String>) {
        let what = what.into();
        log::error!("breach: {what}");
        if self.broken.len() < 20 {
            self.broken.push(what);
        }
    }

    pub(crate) fn opened(&mut self, kind: Kind) {
        *self.open.entry(kind).or_default() += 1;
    }

    pub(crate) fn closed(&mut self, kind: Kind) {
        *self.open.entry(kind).or_default() -= 1;
    }

    /// Objects that are open, by kind.
    pub fn open_objects(&self) -> Vec<(Kind, i64)> {
        self.open.iter().filter(|(_, count)| **count != 0).map(|(kind, count)| (*kind, *count)).collect()
    }

    /// Counts a step of set-up; true if it is to fail.
    pub(crate) fn setup_fails(&mut self) -> bool {
        let fails = self.faults.setup_fails_at == Some(self.setup_calls);
        self.setup_calls += 1;
        fails
    }

    /// A call into the provider: time passes, and the network moves.
    pub(crate) fn on_call(&mut self) {
        self.calls += 1;
        if self.calls > CALLS_MAX {
            eprintln!("the call under test does not end: {CALLS_MAX} provider calls. {:?}", self.broken);
            std::process::abort();
        }
        clock::advance(self.rng.within(20, 300));
        self.run_due();
    }

    /// Operations in flight on a host's rails, receives and what will never end aside.
    pub fn operations_in_flight(&self, host: usize) -> usize {
        let endless =
            |flight: &&Flight| flight.swallowed && !flight.completed && self.eps[flight.source].host == host;
        let all: usize = self.live_endpoints(host).map(|ep| ep.outstanding).sum();
        all - self.flights.values().filter(endless).count()
    }

    /// Whether messages of one host no longer reach the other, on any rail.
    pub fn is_deaf(&self, from: usize, to: usize) -> bool {
        let lives = |ep: usize, host| self.eps[ep].host == host && !self.eps[ep].closed;
        self.deaf.iter().any(|&(source, target)| lives(source, from) && lives(target, to))
    }

    /// Receives posted on each rail of a host.
    pub fn receives_posted(&self, host: usize) -> Vec<usize> {
        self.live_endpoints(host).map(|ep| ep.recvs.len()).collect()
    }

    /// Registrations of a host that touch this range and are open.
    pub fn registrations_of(&self, host: usize, addr: usize, len: usize) -> usize {
        let mine = |mr: &&usize| self.domains[self.mrs[**mr].domain].host == host;
        let overlaps = |mr: &&usize| {
            let mr = &self.mrs[**mr];
            mr.addr < addr + len && addr < mr.addr + mr.len
        };
        self.keys.values().filter(mine).filter(overlaps).count()
    }

    fn live_endpoints(&self, host: usize) -> impl Iterator<Item = &Ep> {
        self.eps.iter().filter(move |ep| ep.host == host && !ep.closed)
    }

    pub(crate) fn host_is_dead(&self, host: usize) -> bool {
        self.hosts[host].dead
    }
}

/// A simulation. Objects of the provider point to it, so it outlives every engine in it.
#[derive(Debug)]
pub struct World {
    state: Mutex<State>,
}

impl World {
    /// A network of `rails` NICs for each host.
    pub fn new(seed: u64, profile: Profile, rails: usize) -> Arc<Self> {
        let state = State {
            profile,
            rails,
            rng: Rng::new(seed),
            faults: Faults::default(),
            delay_ns: 20_000,
            tx_size: 1024,
            poll_batch: 64,
            injuries: Vec::new(),
            deaf: HashSet::new(),
            broken: Vec::new(),
            calls: 0,
            setup_calls: 0,
            hosts: Vec::new(),
            fabrics: Vec::new(),
            domains: Vec::new(),
            mrs: Vec::new(),
            keys: HashMap::new(),
            avs: Vec::new(),
            cqs: Vec::new(),
            eqs: Vec::new(),
            eps: Vec::new(),
            names: HashMap::new(),
            flights: BTreeMap::new(),
            schedule: Schedule::default(),
            graveyard: Graveyard::default(),
            open: BTreeMap::new(),
        };
        Arc::new(Self { state: Mutex::new(state) })
    }

    /// Its state.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more host.
    pub fn add_host(&self) -> usize {
        let mut state = self.state();
        state.hosts.push(Host { dead: false });
        state.hosts.len() - 1
    }

    /// The host is gone from one moment to the next. Its engine lives on in this process, but reaches nothing.
    pub fn kill_host(&self, host: usize) {
        let mut state = self.state();
        state.hosts[host].dead = true;
        state.on_death(host);
    }

    /// Lets time pass.
    pub fn pass(&self, ns: u64) {
        clock::advance(ns);
        self.state().run_due();
    }

    /// Lets time pass until the next thing happens on the network, `ns_max` at most.
    pub fn pass_to_next(&self, ns_max: u64) {
        let mut state = self.state();
        let wait =
            state.schedule.next_due().map_or(ns_max, |due| due.saturating_sub(clock::now_ns()).min(ns_max));
        clock::advance(wait);
        state.run_due();
    }
}

/// Whether somebody is inside an endpoint or its queue. FI_THREAD_COMPLETION: one thread at a time in both together.
#[derive(Debug, Default)]
pub(crate) struct Occupancy(AtomicBool);

/// Somebody is inside.
pub(crate) struct Inside<'a>(&'a Occupancy);

impl Occupancy {
    pub fn enter<'a>(&'a self, world: &World, call: &str) -> Inside<'a> {
        if self.0.swap(true, Ordering::SeqCst) {
            world.state().breach(format!("{call}: another thread is inside the endpoint or its queue"));
        }
        if !clock::is_virtual() {
            std::thread::yield_now();
        }
        Inside(self)
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.0.store(false, Ordering::SeqCst);
    }
}
