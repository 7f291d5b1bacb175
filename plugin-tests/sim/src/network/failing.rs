//! NICs that fail, endpoints that are closed and hosts that die: what becomes of that which is under way.

use super::{Event, Flight, FlightId, What};
use crate::clock;
use crate::world::{Breakage, State};

/// How the efa provider reports what a queue pair in error gives up: EFA_IO_COMP_STATUS_FLUSHED.
pub(super) const FLUSHED: (i32, i32) = (libc::ECANCELED, 1);
/// How long it takes at most until a NIC that failed has given up what it holds.
pub(super) const FLUSH_NS: u64 = 400_000_000;
/// What a NIC has sent may be held up on the way for so long.
pub(super) const PACKET_LIFETIME_NS: u64 = 50_000_000;
/// How long a NIC tries to reach a host that is gone, in nanoseconds.
const UNREACHABLE_NS: (u64, u64) = (500_000, 3_000_000);

impl State {
    /// Whether an endpoint of a host has failed.
    pub fn has_broken(&self, host: usize) -> bool {
        self.endpoints_of(host).any(|ep| self.eps[ep].broken.is_some())
    }

    /// An endpoint of a host fails, now and for good.
    pub fn break_endpoint(&mut self, host: usize, place: usize, how: Breakage) {
        let ep = self.endpoints_of(host).nth(place).expect("it has so many");
        if self.eps[ep].closed || self.eps[ep].broken.is_some() {
            return;
        }
        if matches!(how, Breakage::Flushes | Breakage::CutOff) {
            // What this NIC has acknowledged its host has: the sender is told that it has left.
            let here = |f: &Flight| f.what == What::Send && f.target == Some(ep) && !f.landed && !f.swallowed;
            let is_acknowledged = |f: &Flight| here(f) && (f.completed || f.pieces_left == 0);
            let acknowledged: Vec<_> =
                self.flights.iter().filter(|(_, f)| is_acknowledged(f)).map(|(id, _)| *id).collect();
            for id in acknowledged {
                self.arrive(id);
            }
        }
        self.eps[ep].broken = Some(how);
        if how == Breakage::Flushes {
            for id in self.flights_of(ep) {
                let is_slow = self.rng.chance(20);
                self.flights.get_mut(&id).expect("it is under way").late = is_slow;
                let takes = if is_slow { self.rng.below(FLUSH_NS) } else { 0 };
                self.at(clock::now_ns() + takes, Event::Flush { flight: id });
            }
            // Its receives are gone, too.
            self.lose(&[ep]);
        }
        if how == Breakage::CutOff {
            self.lose(&[ep]);
            for id in self.flights_of(ep) {
                let (leaves, late) = (self.rng.chance(300), self.rng.chance(500));
                let flight = self.flights.get_mut(&id).expect("it is under way");
                if flight.completed || flight.landed {
                    continue;
                }
                flight.lingers = leaves && flight.what == What::Write;
                flight.late = flight.lingers && late;
                flight.landed = !flight.lingers;
                self.fail_unreachable(id);
            }
        }
    }

    /// The NIC gives an operation up. What it has sent of a write lands nevertheless; a message may arrive.
    pub(super) fn flush(&mut self, id: FlightId) {
        let (late, arrives) = (self.rng.chance(100), self.rng.chance(500));
        let Some(flight) = self.flights.get_mut(&id) else { return };
        flight.late |= late;
        if flight.completed {
            // It was told to have left.
            return;
        }
        flight.landed |= flight.what == What::Read || (flight.what == What::Send && !arrives);
        self.complete(id, Some(FLUSHED));
    }

    /// The endpoint is closed: nothing of it is in flight any more.
    pub(crate) fn on_endpoint_closed(&mut self, ep: usize) {
        let packets_live = self.eps[ep].broken.is_some();
        for id in self.flights_of(ep) {
            let flight = &self.flights[&id];
            if !flight.completed {
                self.mrs[flight.mr].in_flight -= 1;
            }
            if packets_live && flight.what == What::Write && !flight.landed {
                self.keep_payload(id);
                let late = self.rng.chance(100);
                let flight = self.flights.get_mut(&id).expect("it is there");
                (flight.completed, flight.late) = (true, late);
            } else {
                self.flights.remove(&id);
            }
        }
        let receives = std::mem::take(&mut self.eps[ep].recvs);
        for recv in receives {
            self.mrs[recv.mr].in_flight -= 1;
        }
        self.lose(&[ep]);
        let ep = &mut self.eps[ep];
        ep.contexts.clear();
        ep.outstanding = 0;
        ep.unmatched.clear();
        ep.pooled.clear();
        ep.connections.clear();
    }

    /// A host died: connections to it break.
    pub(crate) fn on_death(&mut self, host: usize) {
        let dead: Vec<usize> = self.endpoints_of(host).collect();
        self.lose(&dead);
    }

    /// What was under way to these endpoints fails: at once where there are connections, else when the NIC gives up.
    fn lose(&mut self, dead: &[usize]) {
        for ep in &mut self.eps {
            ep.connections.retain(|target, _| !dead.contains(target));
        }
        let lost: Vec<FlightId> = self
            .flights
            .iter()
            .filter(|(_, f)| f.target.is_some_and(|t| dead.contains(&t)) && !f.completed && !f.landed)
            .map(|(id, _)| *id)
            .collect();
        for id in lost {
            let flight = self.flights.get_mut(&id).expect("it was just there");
            flight.landed = true;
            // Of what the target was to fetch, only that is heard of which a packet was under way for.
            let is_silent =
                self.profile.emulates_writes && flight.what == What::Write && self.rng.chance(900);
            if !is_silent {
                self.fail_unreachable(id);
            }
        }
    }

    pub(super) fn fail_unreachable(&mut self, id: FlightId) {
        let wait = self.rng.within(UNREACHABLE_NS.0, UNREACHABLE_NS.1);
        let (error, provider) = if self.profile.provider == "efa" {
            (libc::EHOSTUNREACH, self.rng.pick(&[9, 13, 15, 4124]))
        } else {
            (libc::ECANCELED, libc::ECONNRESET)
        };
        self.schedule.add(clock::now_ns() + wait, Event::Fail { flight: id, error, provider });
    }

    fn flights_of(&self, ep: usize) -> Vec<FlightId> {
        self.flights.iter().filter(|(_, flight)| flight.source == ep).map(|(id, _)| *id).collect()
    }
}
