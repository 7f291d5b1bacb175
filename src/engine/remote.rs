//! Transfers with a peer whose NICs reach all of the memory: prepared, posted, ended.

use std::any::Any;
use std::collections::HashMap;
use std::sync::Arc;

use super::shared::Shared;
use super::{Metadata, XferDesc, local};
use crate::error::{Error, Result, Status};
use crate::fabric::{RmaList, Way};
use crate::memory::{Registration, RemoteRegion};
use crate::peer::Peer;
use crate::rail::{Event, Tag};
use crate::transfer::plan::{self, Cutter, Cutting, Lane};
use crate::transfer::{Next, Part, Transfer};
use crate::types::{Desc, Op, RailId};

/// A transfer and the peer that it is with.
pub struct Remote {
    pub transfer: Arc<Transfer>,
    pub peer: Arc<Peer>,
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
        match self.peer.admits(&(Arc::clone(self) as Tag)) {
            Ok(true) => self.begin(shared, &mut events),
            Ok(false) => {}
            Err(e) => {
                self.part_over(Err(e.clone()), shared, &mut events);
                shared.act(events);
                return Err(e);
            }
        }
        let rails = self.transfer.rails();
        shared.drive_after(rails, events);
        Ok(())
    }

    /// Invites rails to its work: the poster's part is over.
    pub fn begin(self: &Arc<Self>, shared: &Shared, events: &mut Vec<Event>) {
        let tag = Arc::clone(self) as Tag;
        let destination = |endpoint| self.peer.destination(endpoint);
        self.transfer.launch(&tag, shared.turn(), &shared.local.rails, destination);
        self.part_over(Ok(()), shared, events);
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
            Next::Ended { took, unsent } => {
                unsent.inspect(|&len| self.peer.unreserve(len));
                took.inspect(|&took| shared.remote_rates.record(self.transfer.bytes(), took));
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
        let limit = shared.config.transfer_timeout;
        if status == Status::InProgress && !limit.is_zero() && self.transfer.is_late(limit) {
            let late = format!("it was not done after {} ms (transfer_timeout_ms)", limit.as_millis());
            self.fail(Error::backend(late), events);
        }
        Ok(status)
    }
}

/// The transfer behind a tag.
pub fn of_tag(tag: &Tag) -> Option<Arc<Remote>> {
    let tag: Arc<dyn Any + Send + Sync> = Arc::clone(tag);
    tag.downcast().ok()
}

/// A transfer under preparation: descriptors sorted by the lanes that they may take.
pub struct Preparation<'a> {
    cutting: Cutting,
    peer: &'a Arc<Peer>,
    virtual_addresses: bool,
    capacity: usize,
    registrations: Vec<Arc<Registration>>,
    sets: Vec<LaneSet<'a>>,
    pairs: HashMap<PairKey, Pair<'a>>,
    last: Option<(PairKey, Pair<'a>)>,
    pub is_staged: bool,
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

/// What a descriptor is held against.
#[derive(Clone, Copy)]
struct Pair<'a> {
    set: usize,
    index: u32,
    /// Address and length of the two regions.
    here: (u64, u64),
    there: (u64, u64),
    /// What remote addresses count from.
    base: u64,
    registration: &'a Arc<Registration>,
    remote: &'a RemoteRegion,
}

impl<'a> Preparation<'a> {
    pub fn new(shared: &Shared, peer: &'a Arc<Peer>, capacity: usize) -> Self {
        Self {
            cutting: shared.cutting(),
            peer,
            virtual_addresses: shared.virtual_addresses,
            capacity,
            registrations: Vec::new(),
            sets: Vec::new(),
            pairs: HashMap::new(),
            last: None,
            is_staged: false,
        }
    }

    /// Adds a pair of descriptors.
    pub fn add(&mut self, here: &XferDesc<'a>, there: &XferDesc<'a>) -> Result<()> {
        let key = (Arc::as_ptr(here.metadata) as usize, Arc::as_ptr(there.metadata) as usize);
        let pair = match self.last {
            Some((last, pair)) if last == key => pair,
            _ => self.pair(key, here.metadata, there.metadata)?,
        };
        let (here, there) = (&here.desc, &there.desc);
        if here.len != there.len || !inside(here, pair.here) || !inside(there, pair.there) {
            return Err(pair.mismatch(here, there));
        }
        self.sets[pair.set].cutter.add(here.addr, there.addr - pair.base, here.len, pair.index);
        Ok(())
    }

    fn pair(&mut self, key: PairKey, here: &'a Arc<Metadata>, there: &'a Arc<Metadata>) -> Result<Pair<'a>> {
        let pair = match self.pairs.get(&key) {
            Some(pair) => *pair,
            None => self.add_pair(key, here, there)?,
        };
        self.last = Some((key, pair));
        Ok(pair)
    }

    fn add_pair(
        &mut self,
        key: PairKey,
        here: &'a Arc<Metadata>,
        there: &'a Arc<Metadata>,
    ) -> Result<Pair<'a>> {
        let registration = local(here)?;
        let Metadata::Remote(remote) = there.as_ref() else {
            return Err(Error::invalid("the remote side of a transfer with a peer is memory of this agent"));
        };
        if remote.peer() != self.peer.id() {
            return Err(Error::disconnected(format!(
                "{remote} belongs to an earlier connection with {}; load its metadata again",
                self.peer.name()
            )));
        }
        if !self.registrations.iter().any(|known| Arc::ptr_eq(known, registration)) {
            self.registrations.push(Arc::clone(registration));
        }
        self.is_staged |= registration.is_staged() || remote.is_staged();
        let (lanes, keys) = plan::pair_lanes(registration.rails(), remote.keys());
        if lanes.is_empty() && !self.is_staged {
            return Err(Error::invalid(format!(
                "no rail here that serves {registration} finds a remote key in the metadata of {remote}"
            )));
        }
        let set = self.sets.iter().position(|set| set.lanes == lanes).unwrap_or_else(|| {
            let cutter = Cutter::new(self.cutting, lanes.len(), self.capacity);
            self.sets.push(LaneSet { lanes, pairs: Vec::new(), cutter });
            self.sets.len() - 1
        });
        let pairs = &mut self.sets[set].pairs;
        pairs.push((registration, keys));
        let (range, desc) = (registration.range(), remote.desc());
        let base = if self.virtual_addresses { 0 } else { remote.base() };
        if desc.addr < base {
            return Err(Error::invalid(format!("{remote} begins before its region ({base:#x})")));
        }
        let pair = Pair {
            set,
            index: (pairs.len() - 1) as u32,
            here: (range.addr(), range.len()),
            there: (desc.addr, desc.len),
            base,
            registration,
            remote,
        };
        self.pairs.insert(key, pair);
        Ok(pair)
    }

    /// The transfer.
    pub fn finish(self, op: Op) -> Result<Arc<Transfer>> {
        let mut parts = Vec::with_capacity(self.sets.len());
        for set in self.sets {
            let slices = set.cutter.finish();
            if slices.is_empty() {
                continue;
            }
            let regions = |rail: RailId| -> Result<Vec<_>> {
                set.pairs.iter().map(|(registration, _)| region_on(registration, rail)).collect()
            };
            let ways = set.lanes.iter().enumerate().map(|(at, lane)| {
                let keys = set.pairs.iter().map(|(_, keys)| keys[at]);
                Ok(regions(lane.rail)?
                    .into_iter()
                    .zip(keys)
                    .map(|(region, key)| Way { region, key })
                    .collect())
            });
            let list = Arc::new(RmaList::new(slices, ways.collect::<Result<_>>()?)?);
            parts.push(Part { lanes: set.lanes, list });
        }
        Ok(Transfer::new(op, parts, self.registrations))
    }
}

fn region_on(registration: &Arc<Registration>, rail: RailId) -> Result<crate::fabric::MemoryRegion> {
    registration.region(rail).ok_or_else(|| Error::not_found(format!("{registration} is being deregistered")))
}

fn inside(desc: &Desc, (addr, len): (u64, u64)) -> bool {
    let offset = desc.addr.wrapping_sub(addr);
    offset <= len && desc.len <= len - offset
}

impl Pair<'_> {
    /// Which rule a pair of descriptors breaks.
    #[cold]
    fn mismatch(&self, here: &Desc, there: &Desc) -> Error {
        if here.len != there.len {
            return Error::invalid(format!(
                "a local descriptor has {} bytes and its remote one {}",
                here.len, there.len
            ));
        }
        let outside = self.registration.check(here).and_then(|()| self.remote.check(there));
        outside.err().unwrap_or_else(|| Error::invalid("a descriptor wraps around"))
    }
}
