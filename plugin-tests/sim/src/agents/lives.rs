//! Lives of agents: they meet, part, stand still, die and come back.

use std::sync::Arc;

use std::time::Duration;

use nixl_libfabric::engine::{Engine, InitParams};
use nixl_libfabric::types::{Desc, MemKind};

use super::{CONNECT_MS, MS, Play, SLOTS, Stage, outcome};
use crate::clock;
use crate::memory::Arena;
use crate::pair::by_network;
use crate::provider;
use crate::world::Breakage;

impl Play {
    // Agents.

    pub(super) fn open(&mut self, index: usize) {
        let host = self.world.add_host();
        let name = self.agents[index].name.clone();
        let init = InitParams {
            local_agent: name,
            params: by_network(self.plan.options.clone()),
            progress_thread: false,
            progress_delay: Duration::ZERO,
            poison: Arc::default(),
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

    /// `i` takes in connection info and metadata of `j`.
    pub(super) fn load(&mut self, i: usize, j: usize) {
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

    pub(super) fn remove_or_load(&mut self) {
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

    pub(super) fn pause(&mut self) {
        let i = self.rng.index(self.agents.len());
        let ms = self.rng.within(1, CONNECT_MS / 4);
        self.agents[i].paused_until = clock::now_ns() + ms * MS;
        self.note(format!("{i} stands still for {ms} ms"));
    }

    /// A NIC fails. One of the same number is spared on every host, so that each two have a way.
    pub(super) fn break_rail(&mut self) {
        let i = self.rng.index(self.agents.len());
        if self.engine(i).is_none() {
            return;
        }
        let host = self.agents[i].host;
        let place =
            (self.plan.spared + self.rng.within(1, self.plan.rails as u64 - 1) as usize) % self.plan.rails;
        // A link that is down tells nobody; with two of them an agent is cut off from whoever it has not told.
        let mut kinds = vec![Breakage::Flushes, Breakage::Refuses];
        if !self.world.state().has_broken(host) {
            kinds.push(Breakage::CutOff);
        }
        let how = self.rng.pick(&kinds);
        self.note(format!("rail {place} of {i} fails: {how:?}"));
        self.world.state().break_endpoint(host, place, how);
    }

    pub(super) fn die_or_return(&mut self) {
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
    pub(super) fn shut(&mut self, i: usize) {
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

    pub(super) fn disturb(&mut self, one: usize, other: usize) {
        self.disturbed[one][other] = true;
        self.disturbed[other][one] = true;
    }

    /// Whether one of the two gets no more messages of the other, as long as both live.
    pub(super) fn is_deaf(&self, i: usize, j: usize) -> bool {
        let (one, other) = (self.agents[i].host, self.agents[j].host);
        let state = self.world.state();
        state.is_deaf(one, other) || state.is_deaf(other, one)
    }
}
