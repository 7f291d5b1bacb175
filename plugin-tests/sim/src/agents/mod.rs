//! Random NIXL calls on several agents, held against a small model of what users are promised.
//!
//! The model knows of every transfer where its bytes must be, of every notification who gets it, and of every fault
//! whom it may hurt. After each call the laws are checked that can be checked then; at the end everything calms down,
//! all that was begun must be over, and all that was opened must be closed.

mod lives;
mod notifications;
mod recovery;
mod transfers;

use std::collections::BTreeMap;
use std::sync::Arc;

use nixl_libfabric::engine::{Engine, Metadata, Request};
use nixl_libfabric::types::{AgentName, Op};

use crate::clock::{self, VirtualTime};
use crate::memory::Arena;
use crate::rng::Rng;
use crate::world::{EFA, EFA_DIRECT, Faults, Profile, TCP, World};

const MS: u64 = 1_000_000;
/// Slots of an agent's memory.
const SLOTS: usize = 160;
/// The option connect_timeout_ms.
const CONNECT_MS: u64 = 2_000;
/// When all faults are over, everything ends within this.
const CALM_MS: u64 = 4 * CONNECT_MS;

/// What a schedule is made of; all of it comes from the seed.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The seed.
    pub seed: u64,
    /// The provider.
    pub profile: Profile,
    /// NICs of each host.
    pub rails: usize,
    /// Agents.
    pub agents: usize,
    /// Calls made before everything calms down.
    pub steps: usize,
    /// Faults of the network.
    pub faults: Faults,
    /// Whether peers are removed and loaded again.
    pub removals: bool,
    /// Whether agents die, leave and come back.
    pub deaths: bool,
    /// Whether agents stand still for a while.
    pub pauses: bool,
    /// Whether NICs fail.
    pub breaks: bool,
    /// The NIC of each host that does not.
    pub spared: usize,
    options: BTreeMap<String, String>,
    delay_ns: u64,
    tx_size: usize,
    poll_batch: usize,
}

impl Plan {
    /// The plan of a seed.
    pub fn of(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let profile = rng.pick(&[EFA, EFA, EFA, TCP, EFA_DIRECT]);
        let mut some = |most: u32| if rng.chance(500) { rng.below(u64::from(most)) as u32 } else { 0 };
        let mut faults = Faults {
            again: some(300),
            poll_again: some(300),
            readerr_again: some(500),
            slow: some(60),
            ..Faults::default()
        };
        if rng.chance(400) {
            faults.rma_error = rng.below(60) as u32;
            faults.post_error = rng.below(10) as u32;
        }
        if rng.chance(200) {
            faults.send_error = rng.below(60) as u32;
        }
        let numbers = [
            ("connect_timeout_ms", CONNECT_MS),
            ("drain_timeout_ms", 300),
            ("control_recv_buffers", rng.pick(&[8, 9, 16, 64])),
            ("control_send_buffers", rng.pick(&[1, 2, 3, 8, 16])),
            ("split_batch_size", rng.pick(&[1, 3, 16, 1024])),
            ("striping_threshold", rng.pick(&[0, 4096, 131_072])),
            ("chunk_bytes_max", 131_072),
            ("notif_bytes_max", 1 << 20),
        ];
        let mut plan = Self {
            seed,
            profile,
            rails: rng.within(1, 3) as usize,
            agents: rng.within(2, 5) as usize,
            steps: rng.within(60, 260) as usize,
            faults,
            removals: rng.chance(250),
            deaths: rng.chance(200),
            pauses: rng.chance(300),
            breaks: false,
            spared: 0,
            options: numbers.iter().map(|(key, value)| ((*key).to_owned(), value.to_string())).collect(),
            delay_ns: rng.pick(&[1_000, 20_000, 20_000, 500_000]),
            tx_size: rng.pick(&[4, 16, 300, 1024]),
            poll_batch: rng.pick(&[1, 4, 64]),
        };
        // A software provider's writes may arrive after they have failed, so they are not done anew.
        plan.breaks = plan.rails > 1 && !profile.orders_writes && rng.chance(400);
        plan.spared = rng.index(plan.rails);
        plan
    }
}

/// Why a schedule failed: the laws that did not hold, and what had happened.
#[derive(Debug)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// What did not hold.
    pub broken: Vec<String>,
    /// The last steps.
    pub trace: Vec<String>,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for line in &self.trace {
            writeln!(f, "  {line}")?;
        }
        for line in &self.broken {
            writeln!(f, "BROKEN: {line}")?;
        }
        write!(
            f,
            "seed {}; replay: SIM_SEED={} cargo test -p nixl-libfabric-sim --test schedules -- --nocapture",
            self.seed, self.seed
        )
    }
}

/// Runs the schedule of a seed, in a thread of its own, because the standard library's hash keys are per thread.
pub fn run(plan: &Plan) -> Result<Summary, Failure> {
    let plan = plan.clone();
    let seed = plan.seed;
    // Looked at once in a process: not in the time, and with the hash keys, of the first schedule.
    nixl_libfabric::topology::Machine::here();
    let thread = std::thread::Builder::new().spawn(move || {
        let _time = VirtualTime::start();
        Play::new(plan).run()
    });
    thread.expect("a thread").join().unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
        Err(Failure { seed, broken: vec![format!("panic: {}", text.unwrap_or_default())], trace: Vec::new() })
    })
}

/// What a schedule did.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// Transfers done.
    pub done: u64,
    /// Transfers failed.
    pub failed: u64,
    /// Notifications received.
    pub notifications: u64,
    /// Calls into the provider.
    pub calls: u64,
    /// Virtual time that passed.
    pub virtual_ns: u64,
}

struct Agent {
    name: AgentName,
    host: usize,
    engine: Option<Engine>,
    /// Memory of this run of the agent; earlier runs' is in [`Play::attic`].
    arena: Arena,
    local: Option<Arc<Metadata>>,
    /// What it has loaded of the others, with the run of them that it is of.
    remote: BTreeMap<usize, (u32, Arc<Metadata>)>,
    run: u32,
    paused_until: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Posted,
    Done,
    Failed,
    Released,
}

struct Xfer {
    from: usize,
    to: usize,
    runs: (u32, u32),
    op: Op,
    /// Local offset, remote offset, length; slots of each are taken on both sides.
    pieces: Vec<(usize, usize, usize)>,
    request: Option<Request>,
    stage: Stage,
    posts: u32,
    /// The notification of this post.
    note: Option<u64>,
    /// Injuries before this post.
    injuries: usize,
    /// It is of a connection that its user has removed.
    outdated: bool,
}

struct Note {
    from: usize,
    to: usize,
    runs: (u32, u32),
    bytes: Vec<u8>,
    xfer: Option<(usize, u32)>,
    received: u32,
    /// The user was told that it is on its way, or done.
    promised: bool,
}

struct Play {
    plan: Plan,
    rng: Rng,
    agents: Vec<Agent>,
    attic: Vec<Arena>,
    xfers: Vec<Xfer>,
    notes: Vec<Note>,
    /// Pairs (from, to) between which messages were lost, or one of which left: promises are off.
    disturbed: Vec<Vec<bool>>,
    /// The first removed the second and did not load it again: it wants to hear nothing of it.
    removed: Vec<Vec<bool>>,
    injuries_seen: usize,
    trace: Vec<String>,
    broken: Vec<String>,
    summary: Summary,
    started_ns: u64,
    // Last: objects of the provider point to it.
    world: Arc<World>,
}

impl Play {
    fn new(plan: Plan) -> Self {
        let world = World::new(plan.seed ^ 0xfab, plan.profile, plan.rails);
        {
            let mut state = world.state();
            (state.delay_ns, state.tx_size, state.poll_batch) =
                (plan.delay_ns, plan.tx_size, plan.poll_batch);
        }
        let count = plan.agents;
        let mut play = Self {
            rng: Rng::new(plan.seed ^ 0xca11),
            agents: Vec::new(),
            attic: Vec::new(),
            xfers: Vec::new(),
            notes: Vec::new(),
            disturbed: vec![vec![false; count]; count],
            removed: vec![vec![false; count]; count],
            injuries_seen: 0,
            trace: Vec::new(),
            broken: Vec::new(),
            summary: Summary::default(),
            started_ns: clock::now_ns(),
            world,
            plan,
        };
        for index in 0..count {
            let name = AgentName::from(format!("agent{index}").as_str());
            let arena = Arena::new(SLOTS);
            let agent = Agent {
                name,
                host: 0,
                engine: None,
                arena,
                local: None,
                remote: BTreeMap::new(),
                run: 0,
                paused_until: 0,
            };
            play.agents.push(agent);
            play.open(index);
        }
        play
    }

    fn note(&mut self, line: String) {
        let at = (clock::now_ns() - self.started_ns) as f64 / 1e3;
        let line = format!("{at:>12.1} us  {line}");
        log::info!("{line}");
        if self.trace.len() > 60 {
            self.trace.drain(..20);
        }
        self.trace.push(line);
    }

    fn breach(&mut self, what: String) {
        self.note(format!("BROKEN: {what}"));
        self.broken.push(what);
    }

    fn run(mut self) -> Result<Summary, Failure> {
        self.world.state().faults = self.plan.faults.clone();
        for i in 0..self.agents.len() {
            for j in 0..self.agents.len() {
                if i != j && self.rng.chance(800) {
                    self.load(i, j);
                }
            }
        }
        for _ in 0..self.plan.steps {
            self.step();
            if self.has_failed() {
                return self.end();
            }
        }
        self.calm_down();
        if !self.has_failed() {
            self.check_recovery();
        }
        if !self.has_failed() {
            self.go_on();
        }
        if !self.has_failed() {
            self.check_capacity();
        }
        if !self.has_failed() {
            self.close_all();
        }
        self.end()
    }

    fn end(mut self) -> Result<Summary, Failure> {
        self.has_failed();
        self.summary.virtual_ns = clock::now_ns() - self.started_ns;
        if self.broken.is_empty() {
            return Ok(self.summary);
        }
        let failure = Failure {
            seed: self.plan.seed,
            broken: std::mem::take(&mut self.broken),
            trace: std::mem::take(&mut self.trace),
        };
        // After a breach memory may be in use that is to be freed: keep all of it.
        std::mem::forget(self);
        Err(failure)
    }

    /// Takes over what the network has noticed.
    fn has_failed(&mut self) -> bool {
        let (broken, injuries) = {
            let mut state = self.world.state();
            self.summary.calls += state.calls;
            state.calls = 0;
            (std::mem::take(&mut state.broken), state.injuries[self.injuries_seen..].to_vec())
        };
        for what in broken {
            self.breach(format!("rule of use: {what}"));
        }
        self.injuries_seen += injuries.len();
        for injury in injuries {
            if !injury.message {
                continue;
            }
            let of = |host: usize| self.agents.iter().position(|agent| agent.host == host);
            let (from, to) = (of(injury.source_host), injury.target_host.and_then(of));
            if let (Some(from), Some(to)) = (from, to) {
                self.disturb(from, to);
            }
        }
        !self.broken.is_empty()
    }

    fn engine(&self, index: usize) -> Option<&Engine> {
        self.agents[index].engine.as_ref()
    }

    fn is_awake(&self, index: usize) -> bool {
        let agent = &self.agents[index];
        agent.engine.is_some() && agent.paused_until <= clock::now_ns()
    }

    /// The pair that a transfer or notification may go between now.
    fn pick_pair(&mut self) -> Option<(usize, usize)> {
        let i = self.rng.index(self.agents.len());
        if !self.is_awake(i) {
            return None;
        }
        let known: Vec<usize> = self.agents[i].remote.keys().copied().collect();
        if known.is_empty() { None } else { Some((i, self.rng.pick(&known))) }
    }

    // Steps.

    fn step(&mut self) {
        let sleeps = clock::sleeps();
        match self.rng.below(100) {
            0..18 => self.begin_transfer(),
            18..28 => self.send_notification(),
            28..50 => self.check_one(),
            50..70 => {
                let i = self.rng.index(self.agents.len());
                self.take_notifications(i);
            }
            70..74 => self.repost(),
            74..77 => self.release_one(),
            94 if self.plan.breaks => self.break_rail(),
            77..95 => {
                let ns = self.rng.pick(&[200, 2_000, 20_000, 100_000, 2 * MS]);
                self.world.pass(ns);
            }
            95..97 if self.plan.removals => self.remove_or_load(),
            97 if self.plan.pauses => self.pause(),
            98 if self.plan.deaths => self.die_or_return(),
            _ => self.transfer_to_self(),
        }
        if clock::sleeps() != sleeps && !self.plan.deaths {
            self.breach("a call slept".to_owned());
        }
    }

    // The end.

    /// Every agent looks after its own once.
    fn round(&mut self) {
        for i in 0..self.agents.len() {
            self.take_notifications(i);
        }
        for index in self.in_flight() {
            self.check(index);
        }
        self.world.pass_to_next(5 * MS);
        self.world.pass(1_000);
    }

    fn run_until(&mut self, ms: u64, over: impl Fn(&Self) -> bool) -> bool {
        let deadline = clock::now_ns() + ms * MS;
        while !over(self) {
            if clock::now_ns() > deadline || self.has_failed() {
                return false;
            }
            self.round();
        }
        true
    }
}

/// The arena and offsets that a transfer reads from, and those that it writes to.
#[allow(clippy::type_complexity)]
fn sides<'a>(xfer: &Xfer, agents: &'a [Agent]) -> ((&'a Arena, Vec<usize>), (&'a Arena, Vec<usize>)) {
    let near = (&agents[xfer.from].arena, xfer.pieces.iter().map(|p| p.0).collect());
    let far = (&agents[xfer.to].arena, xfer.pieces.iter().map(|p| p.1).collect());
    match xfer.op {
        Op::Write => (near, far),
        Op::Read => (far, near),
    }
}

fn outcome<T: std::fmt::Debug, E: std::fmt::Display>(result: &Result<T, E>) -> String {
    match result {
        Ok(value) => format!("{value:?}"),
        Err(e) => format!("error: {e}"),
    }
}
