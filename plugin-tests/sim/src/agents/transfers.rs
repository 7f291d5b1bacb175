//! Transfers: random ones, and what each may answer.

use nixl_libfabric::engine::XferDesc;
use nixl_libfabric::error::{Error, Status};
use nixl_libfabric::types::{Desc, Op};

use super::{Note, Play, SLOTS, Stage, Xfer, outcome, sides};
use crate::memory::{SLOT, message};

impl Play {
    pub(super) fn begin_transfer(&mut self) {
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
        let request = self.engine(i).expect("awake").prep_xfer(op, &near, &far, &name);
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

    pub(super) fn new_note(&mut self, from: usize, to: usize, xfer: Option<(usize, u32)>) -> u64 {
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

    pub(super) fn tag(index: usize, posts: u32) -> u64 {
        (index as u64 + 1) << 16 | u64::from(posts)
    }

    /// Posts a transfer that is not in flight.
    pub(super) fn post(&mut self, index: usize) {
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

    pub(super) fn answered(&mut self, index: usize, answer: Result<Status, Error>) {
        self.has_failed();
        match answer {
            Ok(Status::InProgress) => {}
            Ok(Status::Success) => self.done(index),
            Ok(other) => self.breach(format!("transfer {index} has the status {other:?}")),
            Err(e) => self.failed(index, &e),
        }
    }

    /// The user was told that it is done: every byte must be there now.
    pub(super) fn done(&mut self, index: usize) {
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

    pub(super) fn check_bytes(&mut self, index: usize, when: &str) {
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

    pub(super) fn failed(&mut self, index: usize, error: &Error) {
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

    pub(super) fn in_flight(&self) -> Vec<usize> {
        let posted = |x: &Xfer| x.stage == Stage::Posted && x.request.is_some();
        (0..self.xfers.len())
            .filter(|&at| posted(&self.xfers[at]) && self.is_awake(self.xfers[at].from))
            .collect()
    }

    pub(super) fn check_one(&mut self) {
        let open = self.in_flight();
        if !open.is_empty() {
            let index = self.rng.pick(&open);
            self.check(index);
        }
    }

    pub(super) fn check(&mut self, index: usize) {
        let xfer = &self.xfers[index];
        let engine = self.engine(xfer.from).expect("awake");
        let answer = engine.check_xfer(xfer.request.as_ref().expect("held"));
        if answer != Ok(Status::InProgress) {
            self.note(format!("check {index}: {}", outcome(&answer)));
        }
        self.answered(index, answer);
    }

    /// Whether both sides are as they were, and the notification is out of the way.
    pub(super) fn is_reusable(&self, index: usize) -> bool {
        let xfer = &self.xfers[index];
        let settled = xfer.note.is_none_or(|id| self.notes[id as usize - 1].received > 0);
        xfer.stage == Stage::Done
            && xfer.request.is_some()
            && settled
            && !xfer.outdated
            && xfer.runs == (self.agents[xfer.from].run, self.agents[xfer.to].run)
            && self.is_awake(xfer.from)
    }

    pub(super) fn repost(&mut self) {
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
    pub(super) fn retire(&mut self, index: usize) {
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
    pub(super) fn release_one(&mut self) {
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

    pub(super) fn transfer_to_self(&mut self) {
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
        let request =
            engine.prep_xfer(Op::Write, &[desc(at)], &[desc(at + SLOT)], &agent.name).expect("prepared");
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
}
