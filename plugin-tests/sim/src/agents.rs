//! Random NIXL calls on several agents, held against a small model of what users are promised.
//!
//! The model knows of every transfer where its bytes must be, of every notification who gets it, and of every fault
//! whom it may hurt. After each call the laws are checked that can be checked then; at the end everything calms down,
//! all that was begun must be over, and all that was opened must be closed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use nixl_libfabric::engine::{Engine, InitParams, Metadata, Request, XferDesc};
use nixl_libfabric::error::{Error, Status};
use nixl_libfabric::types::{AgentName, Desc, MemKind, Op};

use crate::clock::{self, VirtualTime};
use crate::memory::{Arena, SLOT, message};
use crate::provider;
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
        Self {
            seed,
            profile,
            rails: rng.within(1, 3) as usize,
            agents: rng.within(2, 5) as usize,
            steps: rng.within(60, 260) as usize,
            faults,
            removals: rng.chance(250),
            deaths: rng.chance(200),
            pauses: rng.chance(300),
            options: numbers.iter().map(|(key, value)| ((*key).to_owned(), value.to_string())).collect(),
            delay_ns: rng.pick(&[1_000, 20_000, 20_000, 500_000]),
            tx_size: rng.pick(&[4, 16, 300, 1024]),
            poll_batch: rng.pick(&[1, 4, 64]),
        }
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

    fn disturb(&mut self, one: usize, other: usize) {
        self.disturbed[one][other] = true;
        self.disturbed[other][one] = true;
    }

    // Agents.

    fn open(&mut self, index: usize) {
        let host = self.world.add_host();
        let name = self.agents[index].name.clone();
        let init = InitParams {
            local_agent: name,
            params: self.plan.options.clone(),
            progress_thread: false,
            progress_delay: Duration::ZERO,
        };
        let faults = std::mem::take(&mut self.world.state().faults);
        let engine = provider::on_host(&self.world, host, || Engine::create_on(provider::library(), init));
        self.world.state().faults = faults;
        let engine = engine.unwrap_or_else(|e| panic!("agent {index} cannot be opened: {e}"));
        let agent = &mut self.agents[index];
        let local = engine.register_mem(agent.arena.range(), 0, MemKind::Dram).expect("registered");
        agent.host = host;
        agent.run += 1;
        agent.local = Some(local);
        agent.engine = Some(engine);
        agent.remote.clear();
        agent.paused_until = 0;
        self.removed[index].fill(false);
        self.note(format!("agent {index} opens on host {host}"));
    }

    fn engine(&self, index: usize) -> Option<&Engine> {
        self.agents[index].engine.as_ref()
    }

    fn is_awake(&self, index: usize) -> bool {
        let agent = &self.agents[index];
        agent.engine.is_some() && agent.paused_until <= clock::now_ns()
    }

    /// `i` takes in connection info and metadata of `j`.
    fn load(&mut self, i: usize, j: usize) {
        let Some(other) = self.engine(j) else { return };
        let info = other.conn_info().expect("connection info");
        let local = self.agents[j].local.clone().expect("registered");
        let public = other.public_data(&local).expect("public data");
        let arena = &self.agents[j].arena;
        let desc = Desc { addr: arena.addr() as u64, len: arena.len() as u64, dev_id: 0 };
        let (name, run) = (self.agents[j].name.clone(), self.agents[j].run);
        let Some(engine) = self.engine(i) else { return };
        let loaded = engine
            .load_remote_conn_info(&name, &info)
            .and_then(|()| engine.load_remote_md(desc, MemKind::Dram, &public, &name));
        self.note(format!("{i} loads {j}: {}", outcome(&loaded.as_ref().map(|_| ()))));
        match loaded {
            Ok(metadata) => {
                self.removed[i][j] = false;
                self.agents[i].remote.insert(j, (run, metadata));
            }
            Err(e) => self.breach(format!("{i} cannot load {j}: {e}")),
        }
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

    fn begin_transfer(&mut self) {
        let Some((i, j)) = self.pick_pair() else { return };
        let (run, remote) = self.agents[i].remote[&j].clone();
        if run != self.agents[j].run {
            // The metadata is of an earlier run, whose memory is gone: its user loads the new before anything else.
            if self.agents[j].engine.is_some() {
                self.load(i, j);
            }
            return;
        }
        let large = self.rng.chance(100);
        let count = if large { 1 } else { self.rng.within(1, 8) as usize };
        let mut pieces = Vec::new();
        for _ in 0..count {
            let len = if large { self.rng.within(131_072, 360_000) } else { self.rng.within(1, SLOT as u64) }
                as usize;
            let slots = len.div_ceil(SLOT);
            let at = (self.rng.index(SLOTS), self.rng.index(SLOTS));
            let Some(near) = self.agents[i].arena.take(slots, at.0) else { break };
            let Some(far) = self.agents[j].arena.take(slots, at.1) else {
                self.agents[i].arena.give(near, slots);
                break;
            };
            pieces.push((near, far, len));
        }
        if pieces.is_empty() {
            return;
        }
        let op = self.rng.pick(&[Op::Write, Op::Write, Op::Read]);
        let local = self.agents[i].local.clone().expect("registered");
        let desc = |base: usize, offset: usize, len: usize| Desc {
            addr: (base + offset) as u64,
            len: len as u64,
            dev_id: 0,
        };
        let bases = (self.agents[i].arena.addr(), self.agents[j].arena.addr());
        let near: Vec<_> =
            pieces.iter().map(|p| XferDesc { desc: desc(bases.0, p.0, p.2), metadata: &local }).collect();
        let far: Vec<_> =
            pieces.iter().map(|p| XferDesc { desc: desc(bases.1, p.1, p.2), metadata: &remote }).collect();
        let name = self.agents[j].name.clone();
        let request = self.engine(i).expect("awake").prep_xfer(op, near.into_iter(), far.into_iter(), &name);
        let request = match request {
            Ok(request) => request,
            Err(e) => {
                if !self.disturbed[i][j] {
                    self.breach(format!("{i} cannot prepare a transfer with {j}: {e}"));
                }
                return;
            }
        };
        let runs = (self.agents[i].run, self.agents[j].run);
        self.xfers.push(Xfer {
            from: i,
            to: j,
            runs,
            op,
            pieces,
            request: Some(request),
            stage: Stage::Done,
            posts: 0,
            note: None,
            injuries: 0,
            outdated: false,
        });
        self.post(self.xfers.len() - 1);
    }

    fn new_note(&mut self, from: usize, to: usize, xfer: Option<(usize, u32)>) -> u64 {
        let id = self.notes.len() as u64 + 1;
        let len = match self.rng.below(20) {
            0 => self.rng.within(8_000, 8_400),
            1 => self.rng.within(10_000, 60_000),
            _ => self.rng.below(200),
        };
        let bytes = message(id, len as usize);
        let runs = (self.agents[from].run, self.agents[to].run);
        self.notes.push(Note { from, to, runs, bytes, xfer, received: 0, promised: false });
        id
    }

    fn tag(index: usize, posts: u32) -> u64 {
        (index as u64 + 1) << 16 | u64::from(posts)
    }

    /// Posts a transfer that is not in flight.
    fn post(&mut self, index: usize) {
        let (from, to) = (self.xfers[index].from, self.xfers[index].to);
        let posts = self.xfers[index].posts + 1;
        self.xfers[index].posts = posts;
        let note = self.rng.chance(500).then(|| self.new_note(from, to, Some((index, posts))));
        let xfer = &mut self.xfers[index];
        xfer.note = note;
        xfer.injuries = self.injuries_seen;
        xfer.stage = Stage::Posted;
        let (source, target) = sides(xfer, &self.agents);
        for (piece, &(.., len)) in xfer.pieces.iter().enumerate() {
            let tag = Self::tag(index, posts) ^ (piece as u64) << 48;
            source.0.fill(source.1[piece], len, tag);
            target.0.fill(target.1[piece], len, 0);
        }
        let bytes = note.map(|id| self.notes[id as usize - 1].bytes.clone());
        let engine = self.agents[from].engine.as_ref().expect("awake");
        let request = self.xfers[index].request.as_ref().expect("held");
        let answer = engine.post_xfer(request, bytes.as_deref());
        self.note(format!(
            "{from} posts {:?} {index}.{posts} with {to}, {} pieces, note {note:?}: {}",
            self.xfers[index].op,
            self.xfers[index].pieces.len(),
            outcome(&answer)
        ));
        self.answered(index, answer);
    }

    fn answered(&mut self, index: usize, answer: Result<Status, Error>) {
        self.has_failed();
        match answer {
            Ok(Status::InProgress) => {}
            Ok(Status::Success) => self.done(index),
            Ok(other) => self.breach(format!("transfer {index} has the status {other:?}")),
            Err(e) => self.failed(index, &e),
        }
    }

    /// The user was told that it is done: every byte must be there now.
    fn done(&mut self, index: usize) {
        self.summary.done += 1;
        self.xfers[index].stage = Stage::Done;
        let (from, to) = (self.xfers[index].from, self.xfers[index].to);
        if self.xfers[index].runs == (self.agents[from].run, self.agents[to].run) {
            self.check_bytes(index, "DONE");
        }
        if let Some(note) = self.xfers[index].note {
            self.notes[note as usize - 1].promised = true;
        }
    }

    fn check_bytes(&mut self, index: usize, when: &str) {
        let xfer = &self.xfers[index];
        let (_, target) = sides(xfer, &self.agents);
        for (piece, offset) in target.1.iter().enumerate() {
            let tag = Self::tag(index, xfer.posts) ^ (piece as u64) << 48;
            let len = xfer.pieces[piece].2;
            if let Some(at) = target.0.differs(*offset, len, tag) {
                let what = format!(
                    "{when} but byte {at} of {len} of piece {piece} of transfer {index}.{} ({:?} {} to {}) is not there",
                    xfer.posts, xfer.op, xfer.from, xfer.to
                );
                self.breach(what);
                return;
            }
        }
    }

    fn failed(&mut self, index: usize, error: &Error) {
        self.summary.failed += 1;
        let xfer = &mut self.xfers[index];
        xfer.stage = Stage::Failed;
        let (from, to) = (xfer.from, xfer.to);
        let ranges: Vec<_> =
            xfer.pieces.iter().map(|p| (self.agents[from].arena.addr() + p.0, p.2)).collect();
        let since = xfer.injuries;
        let hurt = {
            let state = self.world.state();
            state.injuries[since..].iter().any(|injury| {
                let (at, len) = injury.local;
                !injury.message && ranges.iter().any(|(a, l)| at < a + l && *a < at + len)
            })
        };
        self.note(format!("transfer {index} failed: {error}"));
        if !hurt && !self.disturbed[from][to] {
            self.breach(format!(
                "transfer {index} of {from} with {to} failed, and nothing had hurt it: {error}"
            ));
        }
    }

    fn send_notification(&mut self) {
        let Some((i, j)) = self.pick_pair() else { return };
        self.notify(i, j);
    }

    fn notify(&mut self, i: usize, j: usize) -> Option<usize> {
        let id = self.new_note(i, j, None);
        let bytes = self.notes[id as usize - 1].bytes.clone();
        let name = self.agents[j].name.clone();
        let answer = self.engine(i).expect("awake").send_notification(&name, &bytes);
        self.note(format!("{i} notifies {j}, note {id} of {} bytes: {}", bytes.len(), outcome(&answer)));
        self.has_failed();
        match answer {
            Ok(()) => {
                self.notes[id as usize - 1].promised = true;
                Some(id as usize - 1)
            }
            Err(e) => {
                if !self.disturbed[i][j] {
                    self.breach(format!("{i} cannot notify {j}, and nothing is wrong between them: {e}"));
                }
                None
            }
        }
    }

    fn take_notifications(&mut self, i: usize) {
        if !self.is_awake(i) {
            return;
        }
        let taken = self.engine(i).expect("awake").take_notifications();
        match taken {
            Ok(taken) => {
                for (from, bytes) in taken {
                    self.received(i, &from, &bytes);
                }
            }
            Err(e) => self.breach(format!("{i} cannot take notifications: {e}")),
        }
    }

    fn received(&mut self, i: usize, from: &AgentName, bytes: &[u8]) {
        self.summary.notifications += 1;
        let id = bytes.first_chunk().map_or(0, |id| u64::from_le_bytes(*id));
        self.note(format!("{i} gets note {id} of {from}"));
        let Some(note) = (id as usize).checked_sub(1).and_then(|at| self.notes.get_mut(at)) else {
            self.breach(format!("{i} got a notification of {} bytes that nobody sent", bytes.len()));
            return;
        };
        note.received += 1;
        let (count, whole) = (note.received, note.bytes == bytes);
        let right = note.to == i && self.agents[note.from].name == *from && note.runs.1 == self.agents[i].run;
        let current = note.runs.0 == self.agents[note.from].run;
        let xfer = note.xfer;
        if count > 1 {
            self.breach(format!("note {id} came {count} times"));
        }
        if !whole {
            self.breach(format!("note {id} is not what was sent"));
        }
        if !right {
            self.breach(format!("note {id} came to {i}, from {from}"));
        }
        if let Some((index, posts)) = xfer.filter(|_| current && right)
            && self.xfers[index].posts == posts
        {
            self.check_bytes(index, "notified");
        }
    }

    fn in_flight(&self) -> Vec<usize> {
        let posted = |x: &Xfer| x.stage == Stage::Posted && x.request.is_some();
        (0..self.xfers.len())
            .filter(|&at| posted(&self.xfers[at]) && self.is_awake(self.xfers[at].from))
            .collect()
    }

    fn check_one(&mut self) {
        let open = self.in_flight();
        if !open.is_empty() {
            let index = self.rng.pick(&open);
            self.check(index);
        }
    }

    fn check(&mut self, index: usize) {
        let xfer = &self.xfers[index];
        let engine = self.engine(xfer.from).expect("awake");
        let answer = engine.check_xfer(xfer.request.as_ref().expect("held"));
        if answer != Ok(Status::InProgress) {
            self.note(format!("check {index}: {}", outcome(&answer)));
        }
        self.answered(index, answer);
    }

    /// Whether both sides are as they were, and the notification is out of the way.
    fn is_reusable(&self, index: usize) -> bool {
        let xfer = &self.xfers[index];
        let settled = xfer.note.is_none_or(|id| self.notes[id as usize - 1].received > 0);
        xfer.stage == Stage::Done
            && xfer.request.is_some()
            && settled
            && !xfer.outdated
            && xfer.runs == (self.agents[xfer.from].run, self.agents[xfer.to].run)
            && self.is_awake(xfer.from)
    }

    fn repost(&mut self) {
        let ready: Vec<_> = (0..self.xfers.len()).filter(|&at| self.is_reusable(at)).collect();
        if ready.is_empty() {
            return;
        }
        let index = self.rng.pick(&ready);
        if self.rng.chance(500) {
            self.post(index);
        } else {
            self.retire(index);
        }
    }

    /// Releases a transfer that is over, and gives its memory to others.
    fn retire(&mut self, index: usize) {
        let xfer = &mut self.xfers[index];
        let request = xfer.request.take().expect("held");
        let (from, to, pieces) = (xfer.from, xfer.to, xfer.pieces.clone());
        self.agents[from].engine.as_ref().expect("awake").release_request(request).expect("released");
        for (near, far, len) in &pieces {
            let slots = len.div_ceil(SLOT);
            self.agents[from].arena.give(*near, slots);
            self.agents[to].arena.give(*far, slots);
        }
    }

    /// Releases a transfer in flight. Its memory is not used again: nobody knows what is still to land there.
    fn release_one(&mut self) {
        let open = self.in_flight();
        if open.is_empty() {
            return;
        }
        let index = self.rng.pick(&open);
        self.note(format!("release {index} in flight"));
        let xfer = &mut self.xfers[index];
        xfer.stage = Stage::Released;
        let request = xfer.request.take().expect("held");
        let engine = self.agents[xfer.from].engine.as_ref().expect("awake");
        if let Err(e) = engine.release_request(request) {
            self.breach(format!("a request in flight cannot be released: {e}"));
        }
    }

    fn transfer_to_self(&mut self) {
        let i = self.rng.index(self.agents.len());
        if !self.is_awake(i) {
            return;
        }
        let start = self.rng.index(SLOTS);
        let Some(at) = self.agents[i].arena.take(2, start) else { return };
        let len = self.rng.within(1, SLOT as u64) as usize;
        let agent = &self.agents[i];
        let tag = self.rng.next() | 1;
        agent.arena.fill(at, len, tag);
        agent.arena.fill(at + SLOT, len, 0);
        let local = agent.local.clone().expect("registered");
        let desc = |offset: usize| XferDesc {
            desc: Desc { addr: (agent.arena.addr() + offset) as u64, len: len as u64, dev_id: 0 },
            metadata: &local,
        };
        let engine = agent.engine.as_ref().expect("awake");
        let request = engine
            .prep_xfer(Op::Write, [desc(at)].into_iter(), [desc(at + SLOT)].into_iter(), &agent.name)
            .expect("prepared");
        let mut answer = engine.post_xfer(&request, None);
        for _ in 0..10 {
            if answer != Ok(Status::InProgress) {
                break;
            }
            answer = engine.check_xfer(&request);
        }
        let there = agent.arena.differs(at + SLOT, len, tag).is_none();
        engine.release_request(request).expect("released");
        if answer != Ok(Status::Success) || !there {
            self.breach(format!("transfer of {i} to itself: {answer:?}, bytes there: {there}"));
        }
        self.agents[i].arena.give(at, 2);
    }

    fn pause(&mut self) {
        let i = self.rng.index(self.agents.len());
        let ms = self.rng.within(1, CONNECT_MS / 4);
        self.agents[i].paused_until = clock::now_ns() + ms * MS;
        self.note(format!("{i} stands still for {ms} ms"));
    }

    fn remove_or_load(&mut self) {
        let i = self.rng.index(self.agents.len());
        if !self.is_awake(i) {
            return;
        }
        let j = self.rng.index(self.agents.len());
        if i == j {
            return;
        }
        if self.agents[i].remote.remove(&j).is_none() {
            self.load(i, j);
            return;
        }
        let name = self.agents[j].name.clone();
        self.disturb(i, j);
        self.removed[i][j] = true;
        for xfer in self.xfers.iter_mut().filter(|x| (x.from, x.to) == (i, j)) {
            xfer.outdated = true;
        }
        let answer = self.engine(i).expect("awake").disconnect(&name);
        self.note(format!("{i} removes {j}: {}", outcome(&answer)));
        if let Err(e) = answer {
            self.breach(format!("{i} cannot remove {j}: {e}"));
        }
    }

    fn die_or_return(&mut self) {
        let i = self.rng.index(self.agents.len());
        if self.agents[i].engine.is_none() {
            self.open(i);
            return;
        }
        for j in 0..self.agents.len() {
            if i != j {
                self.disturb(i, j);
            }
        }
        let killed = self.rng.chance(600);
        self.note(format!("{i} {}", if killed { "dies" } else { "leaves" }));
        if killed {
            let host = self.agents[i].host;
            self.world.kill_host(host);
        }
        self.shut(i);
        let fresh = Arena::new(SLOTS);
        self.attic.push(std::mem::replace(&mut self.agents[i].arena, fresh));
        self.agents[i].run += 1;
    }

    /// Ends an agent's engine and all that the user holds of it.
    fn shut(&mut self, i: usize) {
        for xfer in &mut self.xfers {
            if xfer.from == i {
                xfer.request = None;
                if xfer.stage == Stage::Posted {
                    xfer.stage = Stage::Released;
                }
            }
        }
        let agent = &mut self.agents[i];
        agent.remote.clear();
        let local = agent.local.take();
        if let (Some(engine), Some(local)) = (&agent.engine, &local) {
            // A user who leaves deregisters; what is still in flight may keep it from being granted.
            let _ = engine.deregister_mem(local);
        }
        drop(local);
        drop(agent.engine.take());
        self.has_failed();
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

    /// A notification that was promised, and that nothing excuses from coming.
    fn is_owed(&self, note: &Note) -> bool {
        note.promised
            && note.received == 0
            && !self.disturbed[note.from][note.to]
            && note.runs == (self.agents[note.from].run, self.agents[note.to].run)
            && self.agents[note.to].engine.is_some()
    }

    /// The faults end, and all that was begun ends, too.
    fn calm_down(&mut self) {
        self.note("calm".to_owned());
        {
            let mut state = self.world.state();
            state.faults = Faults::default();
            state.delay_ns = state.delay_ns.min(20_000);
        }
        let now = clock::now_ns();
        for agent in &mut self.agents {
            agent.paused_until = agent.paused_until.min(now);
        }
        let quiet = self.run_until(CALM_MS, |play| {
            play.in_flight().is_empty() && !play.notes.iter().any(|note| play.is_owed(note))
        });
        if quiet {
            // What comes twice comes late.
            let until = clock::now_ns() + 20 * MS;
            self.run_until(1_000, |_| clock::now_ns() > until);
            return;
        }
        if self.has_failed() {
            return;
        }
        for index in self.in_flight() {
            let xfer = &self.xfers[index];
            let what = format!("transfer {index} of {} with {} does not end", xfer.from, xfer.to);
            self.breach(what);
        }
        let owed: Vec<_> = self.notes.iter().enumerate().filter(|(_, note)| self.is_owed(note)).collect();
        let owed: Vec<_> = owed
            .iter()
            .map(|(at, n)| format!("note {} of {} to {} never came", at + 1, n.from, n.to))
            .collect();
        for what in owed {
            self.breach(what);
        }
    }

    /// Whether one of the two gets no more messages of the other, as long as both live.
    fn is_deaf(&self, i: usize, j: usize) -> bool {
        let (one, other) = (self.agents[i].host, self.agents[j].host);
        let state = self.world.state();
        state.is_deaf(one, other) || state.is_deaf(other, one)
    }

    /// Whatever happened between two agents that both live: it goes on between them, unless the provider cannot.
    fn check_recovery(&mut self) {
        for i in 0..self.agents.len() {
            for j in 0..self.agents.len() {
                if i == j || self.engine(i).is_none() || self.engine(j).is_none() || self.removed[j][i] {
                    continue;
                }
                if self.agents[i].remote.get(&j).is_none_or(|(run, _)| *run != self.agents[j].run) {
                    continue;
                }
                if self.is_deaf(i, j) {
                    continue;
                }
                if !self.notification_gets_through(i, j) {
                    return;
                }
            }
        }
    }

    /// What was wrong is over, and nothing more goes wrong that a user could be told of: from here on nothing is excused.
    fn go_on(&mut self) {
        self.note("go on".to_owned());
        for i in 0..self.agents.len() {
            for j in 0..self.agents.len() {
                let gone = self.engine(i).is_none() || self.engine(j).is_none();
                let outdated =
                    self.agents[i].remote.get(&j).is_some_and(|(run, _)| *run != self.agents[j].run);
                let removed = self.removed[i][j] || self.removed[j][i];
                self.disturbed[i][j] = gone || outdated || removed || self.is_deaf(i, j);
            }
        }
        // What was promised while promises were off is not owed now.
        for note in &mut self.notes {
            note.promised &= note.received > 0;
        }
        let benign = Faults { rma_error: 0, send_error: 0, post_error: 0, ..self.plan.faults.clone() };
        self.world.state().faults = benign;
        (self.plan.removals, self.plan.deaths) = (false, false);
        for _ in 0..self.plan.steps / 2 {
            self.step();
            if self.has_failed() {
                return;
            }
        }
        self.calm_down();
    }

    /// The first try may be refused: it tells the user that something was wrong.
    fn notification_gets_through(&mut self, i: usize, j: usize) -> bool {
        let mut said = false;
        for _ in 0..5 {
            if let Some(id) = self.notify(i, j) {
                said = true;
                if self.run_until(200, |play| play.notes[id].received > 0) {
                    return true;
                }
            }
            self.run_until(2_000, |play| play.in_flight().is_empty());
            for _ in 0..100 {
                self.round();
            }
        }
        let receives = self.world.state().receives_posted(self.agents[j].host);
        self.breach(format!(
            "no notification of {i} reaches {j} any more, though both live; accepted: {said}, receives posted there: {receives:?}"
        ));
        false
    }

    /// Nothing is in flight any more, and everything is as it was in the beginning.
    fn check_capacity(&mut self) {
        let receives: usize = self.plan.options["control_recv_buffers"].parse().expect("a number");
        self.run_until(1_000, |play| {
            let state = play.world.state();
            let open = |a: &&Agent| a.engine.is_some();
            let idle = |a: &Agent| {
                state.operations_in_flight(a.host) == 0 && state.receives_posted(a.host)[0] == receives
            };
            play.agents.iter().filter(open).all(idle)
        });
        for i in 0..self.agents.len() {
            if self.engine(i).is_none() {
                continue;
            }
            let (operations, posted) = {
                let state = self.world.state();
                let host = self.agents[i].host;
                (state.operations_in_flight(host), state.receives_posted(host))
            };
            if operations != 0 {
                self.breach(format!("{i} has {operations} operations in flight that nobody waits for"));
            }
            if posted[0] != receives {
                self.breach(format!("{i} had {receives} receives posted, and has {} now", posted[0]));
            }
        }
    }

    fn close_all(&mut self) {
        let mut order: Vec<usize> = (0..self.agents.len()).collect();
        while !order.is_empty() {
            let i = order.remove(self.rng.index(order.len()));
            self.shut(i);
        }
        let left = self.world.state().open_objects();
        if !left.is_empty() {
            self.breach(format!("objects are open after the last engine has gone: {left:?}"));
        }
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
