//! Transfers with a peer whose NICs reach all of the memory: prepared, posted, ended.

use std::any::Any;
use std::collections::HashMap;
use std::sync::Arc;

use super::shared::Shared;
use super::{Metadata, XferElement, local, metadata};
use crate::error::{Error, Result, Status};
use crate::fabric::{RmaList, Way};
use crate::memory::{Registration, RemoteRegion};
use crate::peer::Peer;
use crate::rail::{Destination, Event, Tag, Work};
use crate::transfer::plan::{self, Cutter, Lane};
use crate::transfer::{CopyList, CopyPair, Far, Next, Part, Transfer};
use crate::types::{MemKind, Op, RailId};

/// A transfer and the peer that it is with.
pub struct Remote {
    pub transfer: Arc<Transfer>,
    pub peer: Arc<Peer>,
    /// It moves a part of a staged transfer.
    pub is_chunk: bool,
}

impl Remote {
    /// Begins a post. What is not over when it returns ends by events.
    pub fn post(self: &Arc<Self>, notification: Option<Vec<u8>>, shared: &Shared) -> Result<()> {
        let len = notification.as_ref().map(Vec::len);
        if let Some(len) = len {
            self.peer.reserve(len)?;
        }
        if let Err(e) = self.transfer.begin(notification) {
            len.inspect(|&len| self.peer.unreserve(len));
            return Err(e);
        }
        let mut events = Vec::new();
        // A neighbour's memory is reached whatever devices were told.
        let admitted = if self.transfer.is_copied() {
            self.peer.check().map(|()| true)
        } else {
            self.peer.admits(&(Arc::clone(self) as Tag))
        };
        match admitted {
            Ok(true) => self.begin(shared, &mut events),
            Ok(false) => {}
            Err(e) => {
                self.part_over(Err(e.clone()), shared, &mut events);
                shared.act(events);
                return Err(e);
            }
        }
        if self.transfer.is_copied() {
            shared.act(events);
            shared.drive_copies();
            // Threads share what is left.
            if shared.copies.is_busy() {
                shared.wake();
            }
        } else {
            shared.drive_after(self.transfer.rails(), events);
        }
        Ok(())
    }

    /// Invites rails to its work: the poster's part is over.
    pub fn begin(self: &Arc<Self>, shared: &Shared, events: &mut Vec<Event>) {
        let tag = Arc::clone(self) as Tag;
        let rails = &shared.local.rails;
        let (way, prefer) = (|lane| self.way(lane, shared), |lane| self.prefers(lane));
        let launched = self.transfer.launch(&tag, shared.turn(), rails, &shared.copies, way, prefer);
        self.part_over(if launched { Ok(()) } else { Err(no_rail(shared)) }, shared, events);
    }

    /// A lane has left work of the transfer: others take over.
    pub fn go_on(&self, work: &Arc<Work>, why: Error, shared: &Shared, events: &mut Vec<Event>) {
        let rails = &shared.local.rails;
        let (way, prefer) = (|lane| self.way(lane, shared), |lane| self.prefers(lane));
        if !self.transfer.go_on(work, rails, way, prefer) {
            self.fail(why.context("no other rail is left for it"), events);
            return;
        }
        self.drive_rails(shared, events);
    }

    /// A lane of work waits: others may do it meanwhile.
    pub fn widen(&self, work: &Arc<Work>, shared: &Shared, events: &mut Vec<Event>) {
        let (way, prefer) = (|lane| self.way(lane, shared), |lane| self.prefers(lane));
        self.transfer.widen(work, &shared.local.rails, way, prefer);
        self.drive_rails(shared, events);
    }

    /// Drives the rails that the last post took, each once.
    pub fn drive_rails(&self, shared: &Shared, events: &mut Vec<Event>) {
        let room = shared.has_room();
        for rail in self.transfer.rails() {
            shared.vram.within(|| shared.local.rails[rail.index()].drive(room, events));
        }
    }

    /// Work is done: lanes that did not reach the peer are the worse for it, because others did.
    pub fn work_done(&self, work: &Arc<Work>, shared: &Shared) {
        for (lane, why) in self.transfer.useless(work) {
            let rail = &shared.local.rails[lane.rail.index()];
            self.peer.avoid(lane.rail, lane.endpoint, rail.device().domain_name(), &why);
        }
    }

    /// Where a lane leads, if both its ends work.
    fn way(&self, lane: Lane, shared: &Shared) -> Option<Destination> {
        let works = shared.local.rails[lane.rail.index()].failure().is_none();
        (works && !self.peer.has_retired(lane.endpoint)).then(|| self.peer.destination(lane.endpoint))
    }

    /// Whether a lane has not failed to lead to the peer lately.
    fn prefers(&self, lane: Lane) -> bool {
        !self.peer.avoids(lane.rail, lane.endpoint)
    }

    /// A part of the post is over: its work, its notification, or what the poster had to do.
    pub fn part_over(self: &Arc<Self>, outcome: Result<()>, shared: &Shared, events: &mut Vec<Event>) {
        if let Err(e) = outcome {
            self.fail(e, events);
        }
        match self.transfer.part_over() {
            Next::Nothing => {}
            Next::Notify(message) => {
                let tag = Arc::clone(self) as Tag;
                match self.peer.notify_after(&tag, message) {
                    Ok(released) => shared.release(released, events),
                    Err(e) => self.part_over(Err(e), shared, events),
                }
            }
            Next::Ended { outcome, unsent } => {
                unsent.inspect(|&len| self.peer.unreserve(len));
                let (op, bytes) = (self.transfer.op(), self.transfer.bytes());
                let _ = outcome.inspect(|&took| shared.remote_rates.record(bytes, took));
                match &shared.counts {
                    Some(counts) if self.is_chunk => counts.chunk_over(op, bytes, outcome),
                    Some(counts) => {
                        if self.transfer.is_copied() {
                            counts.same_host_over(op, bytes, outcome);
                        }
                        counts.over(self.peer.tally(), op, bytes, outcome);
                    }
                    None => {}
                }
            }
        }
    }

    /// Fails the post; what of it is not posted yet stays so.
    pub fn fail(&self, error: Error, events: &mut Vec<Event>) {
        let error = error.context(format_args!("transfer with {}", self.peer.name()));
        self.transfer.fail(error, events);
    }

    /// What checkXfer answers.
    pub fn status(&self, shared: &Shared, events: &mut Vec<Event>) -> Result<Status> {
        let status = self.transfer.status(shared.config.drain_timeout)?;
        if let Some(late) = failed_late(&self.transfer, status, shared) {
            self.fail(late, events);
        }
        Ok(status)
    }
}

/// The error of a post that takes longer than `transfer_timeout_ms`.
pub(super) fn failed_late(transfer: &Transfer, status: Status, shared: &Shared) -> Option<Error> {
    let elapsed = transfer.elapsed().filter(|_| status == Status::InProgress)?;
    let late = shared.config.late(elapsed)?;
    shared.counts.as_ref().inspect(|counts| counts.late());
    Some(late)
}

fn no_rail(shared: &Shared) -> Error {
    let failed = shared.local.rails.iter().find_map(|rail| rail.failure().cloned());
    let failed = failed.unwrap_or_else(|| Error::backend("the peer says that its devices have failed"));
    failed.context("no rail is left that reaches this memory")
}

/// The transfer behind a tag.
pub fn of_tag(tag: &Tag) -> Option<Arc<Remote>> {
    let tag: Arc<dyn Any + Send + Sync> = Arc::clone(tag);
    tag.downcast().ok()
}

/// A transfer under preparation: descriptors sorted by the lanes that they may take.
pub struct Preparation<'e, 'a> {
    shared: &'e Shared,
    peer: &'e Arc<Peer>,
    capacity: usize,
    registrations: Vec<Arc<Registration>>,
    sets: Vec<LaneSet<'a>>,
    pairs: HashMap<PairKey, Pair>,
    pub is_staged: bool,
    /// How the peer's regions are reached without a network, where all are: in the order of the pairs of the only set.
    nearby: Option<Vec<Far>>,
}

/// Pairs of regions with the same lanes.
struct LaneSet<'a> {
    lanes: Vec<Lane>,
    /// For each pair: the local region, and the remote key on each lane.
    pairs: Vec<(&'a Arc<Registration>, Vec<u64>)>,
    cutter: Cutter,
}

/// A pair of metadata handles, by address: they outlive the preparation.
type PairKey = (usize, usize);

/// What a pair of descriptors is held against.
#[derive(Clone, Copy)]
struct Pair {
    set: usize,
    index: u32,
    /// Address and length of the remote region.
    there: (u64, u64),
    /// What remote addresses count from.
    base: u64,
}

impl<'e, 'a> Preparation<'e, 'a> {
    /// `nearby`: no NIC is to move it, because all of it [is near](is_nearby).
    pub fn new(shared: &'e Shared, peer: &'e Arc<Peer>, capacity: usize, nearby: bool) -> Self {
        Self {
            shared,
            peer,
            capacity,
            registrations: Vec::new(),
            sets: Vec::new(),
            pairs: HashMap::new(),
            is_staged: false,
            nearby: nearby.then(Vec::new),
        }
    }

    /// Adds pairs of descriptors, from lists of one length. What belongs to a pair of regions is looked up when it
    /// changes; what is done for each pair of descriptors is kept short, because lists are long.
    // Not inlined: within its caller the loop keeps less in registers, or not, as anything else of the caller changes (60 or 73
    // instructions for each descriptor).
    #[inline(never)]
    pub fn add(&mut self, local: &[impl XferElement<'a>], remote: &[impl XferElement<'a>]) -> Result<()> {
        let mut at = 0;
        while let (Some(here), Some(there)) = (local.get(at), remote.get(at)) {
            let key = key_of(here, there);
            let pair = self.pair(key, here, there)?;
            let both = local[at..].iter().zip(&remote[at..]);
            let alike = both.map_while(|(here, there)| {
                let (near, far) = (here.desc(), there.desc());
                // That the local side lies in its region is looked at when the list is made.
                let offset = far.addr.wrapping_sub(pair.there.0);
                let inside = offset <= pair.there.1 && near.len <= pair.there.1 - offset;
                let fits = key_of(here, there) == key && near.len == far.len && inside;
                fits.then(|| (near.addr, far.addr.wrapping_sub(pair.base), near.len))
            });
            let added = self.sets[pair.set].cutter.extend(pair.index, alike);
            if added == 0 {
                return Err(mismatch(here, there));
            }
            at += added;
        }
        Ok(())
    }

    fn pair(
        &mut self,
        key: PairKey,
        here: &impl XferElement<'a>,
        there: &impl XferElement<'a>,
    ) -> Result<Pair> {
        if let Some(pair) = self.pairs.get(&key) {
            return Ok(*pair);
        }
        let (registration, remote) = regions(here, there)?;
        if remote.peer() != self.peer.id() {
            return Err(Error::disconnected(format!(
                "{remote} belongs to an earlier connection with {}; load its metadata again",
                self.peer.name()
            )));
        }
        if !self.registrations.iter().any(|known| Arc::ptr_eq(known, registration)) {
            self.registrations.push(Arc::clone(registration));
        }
        if let Some(pair) = self.pair_nearby(registration, remote) {
            self.pairs.insert(key, pair);
            return Ok(pair);
        }
        self.is_staged |= registration.is_staged() || remote.is_staged();
        let (lanes, keys) = plan::pair_lanes(registration.rails(), remote.keys());
        if lanes.is_empty() && !self.is_staged {
            return Err(Error::invalid(format!(
                "no rail here that serves {registration} finds a remote key in the metadata of {remote}"
            )));
        }
        let set = self.sets.iter().position(|set| set.lanes == lanes).unwrap_or_else(|| {
            let cutter = Cutter::new(&self.shared.cutting(), lanes.len(), self.capacity);
            self.sets.push(LaneSet { lanes, pairs: Vec::new(), cutter });
            self.sets.len() - 1
        });
        let pairs = &mut self.sets[set].pairs;
        pairs.push((registration, keys));
        let desc = remote.desc();
        let base = if self.shared.virtual_addresses { 0 } else { remote.base() };
        if desc.addr < base {
            return Err(Error::invalid(format!("{remote} begins before its region ({base:#x})")));
        }
        let pair = Pair { set, index: (pairs.len() - 1) as u32, there: (desc.addr, desc.len), base };
        self.pairs.insert(key, pair);
        Ok(pair)
    }

    /// A pair that is copied: those make one set, without lanes.
    fn pair_nearby(&mut self, registration: &'a Arc<Registration>, remote: &'a RemoteRegion) -> Option<Pair> {
        let nearby = self.nearby.as_mut()?;
        nearby.push(nearby_region(self.shared, self.peer, registration, remote)?);
        if self.sets.is_empty() {
            let cutter = Cutter::whole(self.capacity);
            self.sets.push(LaneSet { lanes: Vec::new(), pairs: Vec::new(), cutter });
        }
        self.sets[0].pairs.push((registration, Vec::new()));
        let desc = remote.desc();
        Some(Pair { set: 0, index: nearby.len() as u32 - 1, there: (desc.addr, desc.len), base: 0 })
    }

    /// The transfer of what was added, if it is copied.
    fn finish_nearby<'d>(
        self,
        op: Op,
        nearby: &[Far],
        local: &[impl XferElement<'d>],
        remote: &[impl XferElement<'d>],
    ) -> Result<Arc<Transfer>> {
        let mut copies = None;
        for set in self.sets {
            let pairs = set
                .pairs
                .into_iter()
                .zip(nearby)
                .map(|((near, _), far)| CopyPair { near: Arc::clone(near), far: far.clone() });
            let list = CopyList::new(op, set.cutter.finish(), pairs.collect());
            copies = Some(list.map_err(|e| first_outside(local, remote).unwrap_or(e))?);
        }
        Ok(Transfer::new(op, Vec::new(), copies, self.registrations))
    }

    /// The transfer of the lists that were added.
    pub fn finish<'d>(
        mut self,
        op: Op,
        local: &[impl XferElement<'d>],
        remote: &[impl XferElement<'d>],
    ) -> Result<Arc<Transfer>> {
        if let Some(nearby) = self.nearby.take() {
            return self.finish_nearby(op, &nearby, local, remote);
        }
        let mut parts = Vec::with_capacity(self.sets.len());
        for set in self.sets {
            let slices = set.cutter.finish();
            if slices.is_empty() {
                continue;
            }
            let mut ways = Vec::with_capacity(set.lanes.len() * set.pairs.len());
            for (at, lane) in set.lanes.iter().enumerate() {
                for (registration, keys) in &set.pairs {
                    ways.push(Way { region: region_on(registration, lane.rail)?, key: keys[at] });
                }
            }
            let list = RmaList::new(slices, ways, set.pairs.len())
                .map_err(|e| first_outside(local, remote).unwrap_or_else(|| e.into()))?;
            let list = Arc::new(list);
            parts.push(Part { lanes: set.lanes, list });
        }
        Ok(Transfer::new(op, parts, None, self.registrations))
    }
}

/// Whether all of a transfer is reached without a network. One descriptor that is not, and the NICs move all.
pub fn is_nearby<'a>(
    shared: &Shared,
    peer: &Arc<Peer>,
    local: &[impl XferElement<'a>],
    remote: &[impl XferElement<'a>],
) -> bool {
    if peer.neighbour().is_none() {
        return false;
    }
    let mut known = None;
    local.iter().zip(remote).all(|(here, there)| {
        let key = Some(key_of(here, there));
        let near = known == key
            || regions(here, there)
                .is_ok_and(|(own, theirs)| nearby_region(shared, peer, own, theirs).is_some());
        known = key;
        near
    })
}

/// How a pair of regions is reached without a network, if it is.
fn nearby_region(
    shared: &Shared,
    peer: &Arc<Peer>,
    registration: &Registration,
    remote: &RemoteRegion,
) -> Option<Far> {
    let neighbour = peer.neighbour().filter(|_| remote.peer() == peer.id())?;
    if remote.kind() == MemKind::Dram {
        // Host memory of another process is nothing that a GPU could copy.
        let nearby = remote.nearby(neighbour).filter(|_| registration.is_host_memory());
        return nearby.cloned().map(Far::There);
    }
    // In the context of the memory here; host memory is copied by a GPU whose memory was registered, if there is one.
    let context = registration.copy_context().ok()?.or_else(|| shared.vram.own_context().cloned())?;
    remote.nearby_gpu(neighbour, &context).map(Far::Gpu)
}

/// Which region the first wrong descriptor is not inside of.
fn first_outside<'a>(local: &[impl XferElement<'a>], remote: &[impl XferElement<'a>]) -> Option<Error> {
    local.iter().zip(remote).find_map(|(here, there)| outside(here, there))
}

fn region_on(registration: &Arc<Registration>, rail: RailId) -> Result<crate::fabric::MemoryRegion> {
    registration.region(rail).ok_or_else(|| Error::not_found(format!("{registration} is being deregistered")))
}

fn key_of<'a>(here: &impl XferElement<'a>, there: &impl XferElement<'a>) -> PairKey {
    (here.region(), there.region())
}

fn regions<'a>(
    here: &impl XferElement<'a>,
    there: &impl XferElement<'a>,
) -> Result<(&'a Arc<Registration>, &'a RemoteRegion)> {
    match metadata(there)?.as_ref() {
        Metadata::Remote(remote) => Ok((local(metadata(here)?)?, remote)),
        Metadata::Local(_) => {
            Err(Error::invalid("the remote side of a transfer with a peer is memory of this agent"))
        }
    }
}

/// Which rule a pair of descriptors breaks.
#[cold]
fn mismatch<'a>(here: &impl XferElement<'a>, there: &impl XferElement<'a>) -> Error {
    let (near, far) = (here.desc().len, there.desc().len);
    if near != far {
        return Error::invalid(format!("a local descriptor has {near} bytes and its remote one {far}"));
    }
    outside(here, there).unwrap_or_else(|| Error::invalid("a descriptor wraps around"))
}

/// Which region a pair of descriptors is not inside of.
fn outside<'a>(here: &impl XferElement<'a>, there: &impl XferElement<'a>) -> Option<Error> {
    let checked = regions(here, there)
        .and_then(|(own, theirs)| own.check(&here.desc()).and_then(|()| theirs.check(&there.desc())));
    checked.err()
}
