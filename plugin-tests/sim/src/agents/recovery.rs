//! The end of a run: faults cease, and everything that was promised must come true.

use nixl_libfabric::fabric::efa;

use super::{Agent, CALM_MS, MS, Play};
use crate::clock;
use crate::world::Faults;

impl Play {
    /// The faults end, and all that was begun ends, too.
    pub(super) fn calm_down(&mut self) {
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

    /// Whatever happened between two agents that both live: it goes on between them, unless the provider cannot.
    pub(super) fn check_recovery(&mut self) {
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
    pub(super) fn go_on(&mut self) {
        self.note("go on".to_owned());
        for i in 0..self.agents.len() {
            for j in 0..self.agents.len() {
                let gone = self.engine(i).is_none() || self.engine(j).is_none();
                let outdated =
                    self.agents[i].remote.get(&j).is_some_and(|(run, _)| *run != self.agents[j].run);
                let removed = self.removed[i][j] || self.removed[j][i];
                // Whoever was never greeted by an agent is not told of its rails that failed.
                let untold = self.world.state().has_broken(self.agents[j].host);
                self.disturbed[i][j] = gone || outdated || removed || untold || self.is_deaf(i, j);
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

    /// Nothing is in flight any more, and everything is as it was in the beginning.
    pub(super) fn check_capacity(&mut self) {
        let asked: usize = self.plan.options["control_recv_buffers"].parse().expect("a number");
        let least = if self.plan.profile.pools_messages { efa::RECEIVES_MIN as usize } else { 0 };
        let receives = asked.max(least);
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

    pub(super) fn close_all(&mut self) {
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
