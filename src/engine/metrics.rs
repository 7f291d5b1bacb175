//! What an engine counts of its transfers where metrics are served, and what it tells of itself when they are asked for. What
//! rails and peers count, they count in any case.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::works::Works;
use crate::error::Status;
use crate::fabric::Libfabric;
use crate::metrics::{Endpoint, Histogram, Metric, Samples, Source, label_of};
use crate::peer::Tally;
use crate::rail::Rail;
use crate::sys::panic::Poison;
use crate::types::Op;

/// Sizes of transfers that are told apart: up to so many bytes, and longer ones.
const SIZES: [(u64, &str); 4] =
    [(64 << 10, "64KiB"), (1 << 20, "1MiB"), (64 << 20, "64MiB"), (u64::MAX, "more")];
/// Peers with series of their own.
const PEERS_SHOWN_MAX: usize = 256;
const OPS: [(Op, &str); 2] = [(Op::Read, "read"), (Op::Write, "write")];
/// Statuses with which transfers end, by name; the last stands for all others.
const ERRORS: [(Status, &str); 5] = [
    (Status::Backend, "backend"),
    (Status::RemoteDisconnect, "remote_disconnect"),
    (Status::Canceled, "canceled"),
    (Status::NotFound, "not_found"),
    (Status::Unknown, "other"),
];

/// Numbers of one engine's transfers.
#[derive(Default)]
pub(super) struct TransferCounts {
    times: [[Histogram; SIZES.len()]; OPS.len()],
    errors: [AtomicU64; ERRORS.len()],
    staged_bytes: [AtomicU64; OPS.len()],
    same_host_bytes: [AtomicU64; OPS.len()],
    /// Transfers that `transfer_timeout_ms` ended.
    late: AtomicU64,
    /// Waits that `drain_timeout_ms` ended.
    undrained: AtomicU64,
}

impl TransferCounts {
    /// A transfer is over.
    pub fn over(&self, tally: &Tally, op: Op, bytes: u64, outcome: Result<Duration, Status>) {
        match outcome {
            Ok(took) => {
                let size = SIZES.iter().position(|(most, _)| bytes <= *most).unwrap_or(SIZES.len() - 1);
                self.times[op as usize][size].record(took);
                tally.add(op, bytes);
            }
            Err(status) => {
                let kind = ERRORS.iter().position(|(of, _)| *of == status).unwrap_or(ERRORS.len() - 1);
                self.errors[kind].fetch_add(1, Ordering::Relaxed);
                tally.add_failed();
            }
        }
    }

    /// A part of a staged transfer is over: its bytes count, the transfer is counted when all of it is over.
    pub fn chunk_over(&self, op: Op, bytes: u64, outcome: Result<Duration, Status>) {
        if outcome.is_ok() {
            self.staged_bytes[op as usize].fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// A transfer that no NIC moved is over.
    pub fn same_host_over(&self, op: Op, bytes: u64, outcome: Result<Duration, Status>) {
        if outcome.is_ok() {
            self.same_host_bytes[op as usize].fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// `transfer_timeout_ms` has ended a transfer.
    pub fn late(&self) {
        self.late.fetch_add(1, Ordering::Relaxed);
    }

    /// `drain_timeout_ms` has ended a wait.
    pub fn undrained(&self) {
        self.undrained.fetch_add(1, Ordering::Relaxed);
    }
}

/// An engine as those see it who ask for its metrics.
struct Scraped {
    works: Arc<Works>,
    poison: Arc<Poison>,
    libfabric: String,
}

/// Serves the metrics of an engine, if that is wanted. Where it cannot be done the log says so, and the backend works without.
pub(super) fn serve(works: &Arc<Works>, library: &Libfabric, poison: &Arc<Poison>) -> Option<Endpoint> {
    let address = works.shared.config.metrics.as_ref()?;
    let name = &works.shared.local.name;
    let libfabric = library.version().to_string();
    let source = Scraped { works: Arc::clone(works), poison: Arc::clone(poison), libfabric };
    match Endpoint::open(address, Arc::new(source)) {
        Ok(endpoint) => {
            log::info!("agent {name}: metrics are served at {}", endpoint.location());
            Some(endpoint)
        }
        Err(e) => {
            log::warn!(
                "agent {name}: no metrics are served: {e}; name another place, or for several processes a range of ports \
                 (metrics=127.0.0.1:9400-9415) or a path with %p"
            );
            None
        }
    }
}

impl Source for Scraped {
    fn gather(&self, samples: &mut Samples) {
        let name = &self.works.shared.local.name;
        samples.begin(label_of(name, std::process::id()));
        // What a panic left half done is not looked at.
        let healthy = !self.poison.is_set()
            && self
                .poison
                .watch(name, "nixl-metrics", || self.works.gather(samples, &self.libfabric))
                .is_some();
        samples.add(Metric::Healthy, &[], healthy);
    }
}

impl Works {
    fn gather(&self, samples: &mut Samples, libfabric: &str) {
        let shared = &self.shared;
        let provider = shared.local.rails[0].device().provider();
        samples.add(Metric::Info, &[&env!("CARGO_PKG_VERSION"), &libfabric, &provider], true);
        for rail in &shared.local.rails {
            gather_rail(rail, samples);
        }
        if let Some(counts) = &shared.counts {
            counts.gather(samples);
            let stalled = shared.local.rails.iter().map(|rail| rail.counters().stalled).sum::<u64>();
            let unanswered = shared.local.unanswered.load(Ordering::Relaxed);
            samples.add(Metric::Deadlines, &[&"connect_timeout_ms"], stalled + unanswered);
        }
        samples.add(Metric::Malformed, &[], shared.malformed.load(Ordering::Relaxed));
        self.gather_peers(samples);
    }

    fn gather_peers(&self, samples: &mut Samples) {
        let mut peers = self.shared.peers.all();
        samples.add(Metric::Peers, &[], peers.len() as u64);
        peers.sort_by_key(|peer| peer.id().0);
        for peer in peers.iter().take(PEERS_SHOWN_MAX) {
            let name = label_of(peer.name(), peer.id().0);
            samples.add(Metric::PeerReady, &[&name], peer.is_ready());
            samples.add(Metric::PeerSameHost, &[&name], peer.is_neighbour());
            let tally = peer.tally();
            for (op, word) in OPS {
                let (transfers, bytes) = tally.moved(op);
                samples.add(Metric::PeerTransfers, &[&name, &word], transfers);
                samples.add(Metric::PeerBytes, &[&name, &word], bytes);
            }
            samples.add(Metric::PeerErrors, &[&name], tally.failed());
            samples.add(Metric::PeerPending, &[&name], peer.pending_bytes());
        }
    }
}

impl TransferCounts {
    fn gather(&self, samples: &mut Samples) {
        for (op, word) in OPS {
            for ((_, size), times) in SIZES.iter().zip(&self.times[op as usize]) {
                samples.add_times(Metric::TransferSeconds, &[&word, size], times);
            }
            let staged = self.staged_bytes[op as usize].load(Ordering::Relaxed);
            samples.add(Metric::StagedBytes, &[&word], staged);
            let same_host = self.same_host_bytes[op as usize].load(Ordering::Relaxed);
            samples.add(Metric::SameHostBytes, &[&word], same_host);
        }
        for ((_, kind), count) in ERRORS.iter().zip(&self.errors) {
            samples.add(Metric::TransferErrors, &[kind], count.load(Ordering::Relaxed));
        }
        for (option, count) in [("transfer_timeout_ms", &self.late), ("drain_timeout_ms", &self.undrained)] {
            samples.add(Metric::Deadlines, &[&option], count.load(Ordering::Relaxed));
        }
    }
}

fn gather_rail(rail: &Rail, samples: &mut Samples) {
    let (id, device, counters) = (rail.id(), rail.device().domain_name(), rail.counters());
    let moved =
        [("read", counters.reads, counters.read_bytes), ("write", counters.writes, counters.write_bytes)];
    for (op, operations, bytes) in moved {
        samples.add(Metric::RailBytes, &[&id, &device, &op], bytes);
        samples.add(Metric::RailOperations, &[&id, &device, &op], operations);
    }
    samples.add(Metric::RailInFlight, &[&id, &device], u64::from(counters.in_flight));
    samples.add(Metric::RailWindow, &[&id, &device], u64::from(counters.window));
    samples.add(Metric::RailPutOff, &[&id, &device], counters.again);
    for (kind, count) in counters.errors.by_kind() {
        samples.add(Metric::RailErrors, &[&id, &device, &kind], count);
    }
    for (direction, count) in [("in", counters.messages_received), ("out", counters.messages_sent)] {
        samples.add(Metric::RailMessages, &[&id, &device, &direction], count);
    }
    samples.add(Metric::RailImmediates, &[&id, &device], counters.immediates);
}
