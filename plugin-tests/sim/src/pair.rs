//! A few agents under a test's own hands, for what random schedules meet too seldom.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use nixl_libfabric::engine::{Engine, InitParams, Metadata, Request, XferDesc};
use nixl_libfabric::error::{Error, Status};
use nixl_libfabric::types::{AgentName, Desc, MemKind, Op};

use crate::clock::{self, VirtualTime};
use crate::memory::Arena;
use crate::provider;
use crate::world::{Profile, World};

/// Slots of an agent's memory.
const SLOTS: usize = 512;

/// An agent.
pub struct Agent {
    /// Its name.
    pub name: AgentName,
    /// Its host.
    pub host: usize,
    /// Its engine, until it goes.
    pub engine: Option<Engine>,
    /// Its memory.
    pub arena: Arena,
    /// The registration of its memory.
    pub local: Option<Arc<Metadata>>,
    /// What it knows of the others' memory.
    pub remote: BTreeMap<usize, Arc<Metadata>>,
    /// Notifications that it got.
    pub inbox: Vec<(AgentName, Vec<u8>)>,
}

/// Agents in one world.
pub struct Group {
    /// The agents.
    pub agents: Vec<Agent>,
    /// The world; it outlives the engines.
    pub world: Arc<World>,
    _time: VirtualTime,
}

/// These parameters, and unless they say otherwise that the network is used: agents that are all in this process would reach one
/// another without it.
pub fn by_network(mut params: BTreeMap<String, String>) -> BTreeMap<String, String> {
    params.entry("same_host".to_owned()).or_insert_with(|| "off".to_owned());
    params
}

/// Parameters of an engine.
pub fn init(name: &AgentName, options: &[(&str, &str)]) -> InitParams {
    let params = options.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    InitParams {
        local_agent: name.clone(),
        params: by_network(params),
        progress_thread: false,
        progress_delay: Duration::ZERO,
        poison: Arc::default(),
    }
}

impl Group {
    /// Agents who have loaded one another.
    pub fn new(count: usize, profile: Profile, rails: usize, options: &[(&str, &str)]) -> Self {
        let mut group = Self::unconnected(7, count, profile, rails, options);
        for i in 0..count {
            for j in (0..count).filter(|&j| j != i) {
                group.load(i, j);
            }
        }
        group
    }

    /// Agents who know nothing of one another.
    pub fn unconnected(
        seed: u64,
        count: usize,
        profile: Profile,
        rails: usize,
        options: &[(&str, &str)],
    ) -> Self {
        crate::log::start();
        let time = VirtualTime::start();
        let world = World::new(seed, profile, rails);
        let mut group = Self { agents: Vec::new(), world, _time: time };
        for index in 0..count {
            let name = AgentName::from(format!("agent{index}").as_str());
            let host = group.world.add_host();
            let engine = provider::on_host(&group.world, host, || {
                Engine::create_on(provider::library(), init(&name, options))
            });
            let engine = engine.unwrap_or_else(|e| panic!("{e}"));
            let arena = Arena::new(SLOTS);
            let local = Some(engine.register_mem(arena.range(), 0, MemKind::Dram).expect("registered"));
            let (remote, inbox) = (BTreeMap::new(), Vec::new());
            group.agents.push(Agent { name, host, engine: Some(engine), arena, local, remote, inbox });
        }
        group
    }

    /// An agent's engine.
    pub fn engine(&self, i: usize) -> &Engine {
        self.agents[i].engine.as_ref().expect("it has not gone")
    }

    /// `i` takes in what `j` says of itself.
    pub fn load(&mut self, i: usize, j: usize) {
        let other = self.engine(j);
        let info = other.conn_info().expect("connection info");
        let public = other.public_data(self.agents[j].local.as_ref().expect("registered")).expect("metadata");
        let (arena, name) = (&self.agents[j].arena, self.agents[j].name.clone());
        let desc = Desc { addr: arena.addr() as u64, len: arena.len() as u64, dev_id: 0 };
        self.engine(i).load_remote_conn_info(&name, &info).expect("loaded");
        let metadata = self.engine(i).load_remote_md(desc, MemKind::Dram, &public, &name).expect("loaded");
        self.agents[i].remote.insert(j, metadata);
    }

    /// `i` removes `j`.
    pub fn remove(&mut self, i: usize, j: usize) {
        self.agents[i].remote.remove(&j);
        self.engine(i).disconnect(&self.agents[j].name).expect("removed");
    }

    /// Small transfers, which take so many rails in turn: the other end of each has answered then.
    pub fn meet(&mut self, i: usize, j: usize, rails: usize) {
        let request = self.prepare(Op::Write, i, j, &[(0, 1)]).expect("it is known");
        for _ in 0..rails {
            self.engine(i).post_xfer(&request, None).expect("it is known");
            assert_eq!(self.finish(i, &request), Ok(Status::Success));
        }
    }

    /// A transfer of pieces at equal offsets: (offset, length).
    pub fn prepare(&self, op: Op, i: usize, j: usize, pieces: &[(usize, usize)]) -> Result<Request, Error> {
        let desc = |base: usize, (offset, len): (usize, usize)| Desc {
            addr: (base + offset) as u64,
            len: len as u64,
            dev_id: 0,
        };
        let local = self.agents[i].local.as_ref().expect("registered");
        let (near, far) = (self.agents[i].arena.addr(), self.agents[j].arena.addr());
        let near: Vec<_> =
            pieces.iter().map(|p| XferDesc { desc: desc(near, *p), metadata: local }).collect();
        let remote = &self.agents[i].remote[&j];
        let far: Vec<_> = pieces.iter().map(|p| XferDesc { desc: desc(far, *p), metadata: remote }).collect();
        self.engine(i).prep_xfer(op, &near, &far, &self.agents[j].name)
    }

    /// Posts a write of one piece.
    pub fn write(&self, i: usize, j: usize, piece: (usize, usize), note: Option<&[u8]>) -> Request {
        let request = self.prepare(Op::Write, i, j, &[piece]).expect("prepared");
        self.engine(i).post_xfer(&request, note).unwrap_or_else(|e| panic!("{e}"));
        request
    }

    /// Lets an agent look after its own.
    pub fn look(&mut self, i: usize) {
        let Some(engine) = &self.agents[i].engine else { return };
        let got = engine.take_notifications().expect("taken");
        self.agents[i].inbox.extend(got);
    }

    /// Lets all agents live for so many rounds of some microseconds.
    pub fn live(&mut self, rounds: usize) {
        for _ in 0..rounds {
            for i in 0..self.agents.len() {
                self.look(i);
            }
            self.world.pass_to_next(1_000_000);
            self.world.pass(1_000);
        }
    }

    /// Lets all live until the condition holds, and says whether it does within so many milliseconds.
    pub fn live_until(&mut self, ms: u64, mut holds: impl FnMut(&mut Self) -> bool) -> bool {
        let end = clock::now_ns() + ms * 1_000_000;
        while !holds(self) {
            if clock::now_ns() > end {
                return false;
            }
            self.live(1);
        }
        true
    }

    /// Waits for a request of `i`.
    pub fn finish(&mut self, i: usize, request: &Request) -> Result<Status, Error> {
        let mut answer = Ok(Status::InProgress);
        self.live_until(60_000, |group| {
            answer = group.engine(i).check_xfer(request);
            answer != Ok(Status::InProgress)
        });
        answer
    }

    /// Whether `i` got this message.
    pub fn got(&self, i: usize, message: &[u8]) -> usize {
        self.agents[i].inbox.iter().filter(|(_, bytes)| bytes == message).count()
    }

    /// Ends an agent.
    pub fn end(&mut self, i: usize) {
        self.agents[i].remote.clear();
        self.agents[i].local = None;
        self.agents[i].engine = None;
    }

    /// Ends all, and checks that no rule was broken and that nothing is left open.
    pub fn close(mut self) {
        for i in 0..self.agents.len() {
            self.end(i);
        }
        let state = self.world.state();
        assert_eq!(state.broken, Vec::<String>::new());
        assert_eq!(state.open_objects(), Vec::new());
    }
}
