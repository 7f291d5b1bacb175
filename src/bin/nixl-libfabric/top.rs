//! `nixl-libfabric top`: what the rails of a process are doing, from its metrics.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use nixl_libfabric::error::{Error, Result};
use nixl_libfabric::metrics::read::{Sample, ask, endpoint_of};
use nixl_libfabric::topology::Json;

use crate::arguments::{Given, usage};

/// Peers in the table: those that moved most.
const PEERS_SHOWN: usize = 10;
/// Clears the screen of a terminal and goes to its upper left corner (ECMA-48 ED, CUP).
const CLEAR: &str = "\x1b[2J\x1b[H";

/// Runs the command. `show` prints a text and says whether somebody still reads; `None` asks for help.
pub fn run(
    mut words: impl Iterator<Item = OsString>,
    mut show: impl FnMut(&str) -> Result<bool>,
) -> Result<Option<()>> {
    let (mut whom, mut json, mut once, mut interval) = (None, false, false, Duration::from_secs(1));
    while let Some(word) = words.next() {
        let mut option = Given::new(word, &mut words)?;
        match option.name.as_str() {
            "--json" => json = true,
            "--once" => once = true,
            "--interval" => interval = option.seconds(1)?,
            "--help" | "-h" => return Ok(None),
            other if other.starts_with('-') => return Err(usage(format!("no option `{other}`"))),
            other if whom.is_none() => whom = Some(other.to_owned()),
            other => return Err(usage(format!("one process at a time, and `{other}` is one more"))),
        }
        option.end()?;
    }
    let whom = whom.ok_or_else(|| usage("top needs a process number, or the address of an endpoint"))?;
    let location = match whom.parse() {
        Ok(pid) => endpoint_of(pid)?,
        Err(_) => whom.clone(),
    };
    let clear = if !json && !once && std::io::stdout().is_terminal() { CLEAR } else { "" };
    let mut before = Look::at(&location)?;
    loop {
        std::thread::sleep(interval);
        let now = Look::at(&location)?;
        let changes = Changes::between(&before, &now);
        let text = if json { changes.json(&whom, &location) } else { changes.text(&whom, &location) };
        if !show(&format!("{clear}{text}"))? || once {
            return Ok(Some(()));
        }
        before = now;
    }
}

/// The metrics at one moment.
struct Look {
    at: Instant,
    samples: Vec<Sample>,
}

impl Look {
    fn at(location: &str) -> Result<Self> {
        let samples = ask(location)?;
        if !samples.iter().any(|sample| sample.name == "nixl_libfabric_healthy") {
            return Err(Error::not_found(format!("at {location} are no metrics of nixl-libfabric")));
        }
        Ok(Self { at: Instant::now(), samples })
    }

    /// The samples of a metric that have these labels.
    fn like(&self, metric: &str, labels: &[(&str, &str)]) -> impl Iterator<Item = &Sample> {
        let named =
            self.samples.iter().filter(move |s| s.name.strip_prefix("nixl_libfabric_") == Some(metric));
        named.filter(move |s| labels.iter().all(|(label, value)| s.label(label) == *value))
    }

    /// Their sum.
    fn sum(&self, metric: &str, labels: &[(&str, &str)]) -> u64 {
        self.like(metric, labels).map(|s| s.value).sum::<f64>() as u64
    }

    /// Another label of the first of them.
    fn first_label(&self, metric: &str, labels: &[(&str, &str)], label: &str) -> String {
        self.like(metric, labels).next().map_or_else(String::new, |s| s.label(label).to_owned())
    }

    /// The values of a label among the samples of a metric that an agent has.
    fn values(&self, metric: &str, agent: &str, label: &str) -> BTreeSet<String> {
        self.like(metric, &[("agent", agent)]).map(|s| s.label(label).to_owned()).collect()
    }
}

/// A number now, and how much it grows in a second.
#[derive(Default, Clone, Copy)]
struct Flow {
    total: u64,
    per_second: u64,
}

/// A column's name, the metric behind it, and the labels of those samples that count.
type Column = (&'static str, &'static str, &'static [(&'static str, &'static str)]);

const RAIL_FLOWS: [Column; 6] = [
    ("write_bytes", "rail_bytes_total", &[("op", "write")]),
    ("read_bytes", "rail_bytes_total", &[("op", "read")]),
    ("write_operations", "rail_operations_total", &[("op", "write")]),
    ("read_operations", "rail_operations_total", &[("op", "read")]),
    ("put_off", "rail_put_off_total", &[]),
    ("errors", "rail_errors_total", &[]),
];
const PEER_FLOWS: [Column; 4] = [
    ("write_bytes", "peer_bytes_total", &[("op", "write")]),
    ("read_bytes", "peer_bytes_total", &[("op", "read")]),
    ("transfers", "peer_transfers_total", &[]),
    ("errors", "peer_errors_total", &[]),
];

struct RailChange {
    rail: u64,
    device: String,
    flows: [Flow; RAIL_FLOWS.len()],
    in_flight: u64,
    window: u64,
}

struct PeerChange {
    name: String,
    ready: bool,
    flows: [Flow; PEER_FLOWS.len()],
}

struct AgentChange {
    name: String,
    /// Labels of its `info`.
    info: BTreeMap<String, String>,
    healthy: bool,
    rails: Vec<RailChange>,
    peers: Vec<PeerChange>,
    peers_known: u64,
    transfer_errors: u64,
    deadlines: u64,
}

/// What has changed between two looks.
struct Changes {
    interval: Duration,
    agents: Vec<AgentChange>,
}

impl Changes {
    fn between(before: &Look, now: &Look) -> Self {
        let pair = Pair { before, now };
        let agents = now.samples.iter().filter(|s| s.name == "nixl_libfabric_healthy");
        Self { interval: now.at - before.at, agents: agents.map(|healthy| pair.agent(healthy)).collect() }
    }

    fn text(&self, whom: &str, location: &str) -> String {
        let mut text = format!("{whom} at {location}\n");
        for agent in &self.agents {
            agent.write(&mut text).expect("a String takes every write");
        }
        text
    }

    fn json(&self, whom: &str, location: &str) -> String {
        let all = Json::Object(vec![
            ("process", Json::text(whom)),
            ("endpoint", Json::text(location)),
            ("interval_ms", Json::Number(self.interval.as_millis() as u64)),
            ("agents", Json::list(&self.agents, AgentChange::json)),
        ]);
        format!("{all}\n")
    }
}

/// Two looks, of which the second one says who is there.
struct Pair<'a> {
    before: &'a Look,
    now: &'a Look,
}

impl Pair<'_> {
    fn agent(&self, healthy: &Sample) -> AgentChange {
        let (now, name) = (self.now, healthy.label("agent").to_owned());
        let of = [("agent", name.as_str())];
        let rails = now.values("rail_operations_in_flight", &name, "rail");
        let mut rails: Vec<_> = rails.iter().map(|rail| self.rail(&name, rail)).collect();
        rails.sort_by_key(|rail| rail.rail);
        let peers = now.values("peer_ready", &name, "peer");
        let mut peers: Vec<_> = peers.into_iter().map(|peer| self.peer(&name, peer)).collect();
        peers.sort_by_key(|peer| {
            let [write, read, ..] = peer.flows;
            std::cmp::Reverse((write.per_second + read.per_second, write.total + read.total))
        });
        let mut infos = now.samples.iter().filter(|s| s.name == "nixl_libfabric_info");
        AgentChange {
            info: infos.find(|s| s.label("agent") == name).map(|s| s.labels.clone()).unwrap_or_default(),
            healthy: healthy.value > 0.0,
            rails,
            peers,
            peers_known: now.sum("peers", &of),
            transfer_errors: now.sum("transfer_errors_total", &of),
            deadlines: now.sum("deadlines_total", &of),
            name,
        }
    }

    fn rail(&self, agent: &str, rail: &str) -> RailChange {
        let of = [("agent", agent), ("rail", rail)];
        RailChange {
            rail: rail.parse().unwrap_or(0),
            device: self.now.first_label("rail_operations_in_flight", &of, "device"),
            flows: self.flows(&RAIL_FLOWS, &of),
            in_flight: self.now.sum("rail_operations_in_flight", &of),
            window: self.now.sum("rail_window_operations", &of),
        }
    }

    fn peer(&self, agent: &str, peer: String) -> PeerChange {
        let of = [("agent", agent), ("peer", peer.as_str())];
        let (ready, flows) = (self.now.sum("peer_ready", &of) > 0, self.flows(&PEER_FLOWS, &of));
        PeerChange { name: peer, ready, flows }
    }

    fn flows<const N: usize>(&self, columns: &[Column; N], of: &[(&str, &str)]) -> [Flow; N] {
        let seconds = (self.now.at - self.before.at).as_secs_f64();
        columns.map(|(_, metric, labels)| {
            let labels: Vec<_> = of.iter().chain(labels).copied().collect();
            let (then, total) = (self.before.sum(metric, &labels), self.now.sum(metric, &labels));
            Flow { total, per_second: (total.saturating_sub(then) as f64 / seconds) as u64 }
        })
    }
}

fn flow_json<const N: usize>(columns: &[Column; N], flows: &[Flow; N]) -> Json {
    let each = columns.iter().zip(flows).map(|((name, ..), flow)| {
        let parts = vec![("total", Json::Number(flow.total)), ("per_second", Json::Number(flow.per_second))];
        (*name, Json::Object(parts))
    });
    Json::Object(each.collect())
}

impl AgentChange {
    fn write(&self, text: &mut String) -> std::fmt::Result {
        let of = |label| self.info.get(label).map_or("?", String::as_str);
        writeln!(
            text,
            "\nagent {}: plugin {}, libfabric {}, provider {}; {} transfers failed, {} deadlines hit{}",
            self.name,
            of("version"),
            of("libfabric"),
            of("provider"),
            self.transfer_errors,
            self.deadlines,
            if self.healthy { "" } else { "; IT HAS PANICKED and refuses all calls: restart the process" },
        )?;
        writeln!(
            text,
            "{:>5} {:<20} {:>10} {:>10} {:>10} {:>10} {:>10} {:>9} {:>8} {:>8}",
            "rail",
            "device",
            "write GB/s",
            "read GB/s",
            "writes/s",
            "reads/s",
            "put off/s",
            "in flight",
            "window",
            "errors"
        )?;
        for rail in &self.rails {
            write_rail(text, &rail.rail.to_string(), &rail.device, &rail.flows, rail.in_flight, rail.window)?;
        }
        if self.rails.len() > 1 {
            let sum = std::array::from_fn(|column| Flow {
                total: self.rails.iter().map(|rail| rail.flows[column].total).sum(),
                per_second: self.rails.iter().map(|rail| rail.flows[column].per_second).sum(),
            });
            let in_flight = self.rails.iter().map(|rail| rail.in_flight).sum();
            write_rail(text, "all", "", &sum, in_flight, self.rails.iter().map(|rail| rail.window).sum())?;
        }
        if self.peers.is_empty() {
            return Ok(());
        }
        writeln!(
            text,
            "{:<38} {:>5} {:>10} {:>10} {:>11} {:>8}",
            "peer", "ready", "write GB/s", "read GB/s", "transfers/s", "errors"
        )?;
        for PeerChange { name, ready, flows: [write, read, transfers, errors] } in
            self.peers.iter().take(PEERS_SHOWN)
        {
            writeln!(
                text,
                "{name:<38} {:>5} {:>10} {:>10} {:>11} {:>8}",
                if *ready { "yes" } else { "no" },
                gigabytes(write.per_second),
                gigabytes(read.per_second),
                transfers.per_second,
                errors.total
            )?;
        }
        match self.peers_known.saturating_sub(PEERS_SHOWN as u64) {
            0 => Ok(()),
            more => writeln!(text, "and {more} more peers"),
        }
    }

    fn json(&self) -> Json {
        let of = |label| self.info.get(label).map_or(Json::Null, Json::text);
        Json::Object(vec![
            ("agent", Json::text(&self.name)),
            ("healthy", Json::Bool(self.healthy)),
            ("version", of("version")),
            ("libfabric", of("libfabric")),
            ("provider", of("provider")),
            ("transfer_errors", Json::Number(self.transfer_errors)),
            ("deadlines", Json::Number(self.deadlines)),
            (
                "rails",
                Json::list(&self.rails, |rail| {
                    Json::Object(vec![
                        ("rail", Json::Number(rail.rail)),
                        ("device", Json::text(&rail.device)),
                        ("operations_in_flight", Json::Number(rail.in_flight)),
                        ("window_operations", Json::Number(rail.window)),
                        ("counters", flow_json(&RAIL_FLOWS, &rail.flows)),
                    ])
                }),
            ),
            ("peers_known", Json::Number(self.peers_known)),
            (
                "peers",
                Json::list(&self.peers, |peer| {
                    Json::Object(vec![
                        ("peer", Json::text(&peer.name)),
                        ("ready", Json::Bool(peer.ready)),
                        ("counters", flow_json(&PEER_FLOWS, &peer.flows)),
                    ])
                }),
            ),
        ])
    }
}

fn write_rail(
    text: &mut String,
    rail: &str,
    device: &str,
    flows: &[Flow; RAIL_FLOWS.len()],
    in_flight: u64,
    window: u64,
) -> std::fmt::Result {
    let [write, read, writes, reads, put_off, errors] = flows;
    writeln!(
        text,
        "{rail:>5} {device:<20} {:>10} {:>10} {:>10} {:>10} {:>10} {in_flight:>9} {window:>8} {:>8}",
        gigabytes(write.per_second),
        gigabytes(read.per_second),
        writes.per_second,
        reads.per_second,
        put_off.per_second,
        errors.total
    )
}

/// Bytes as gigabytes (10^9).
fn gigabytes(bytes: u64) -> String {
    format!("{:.3}", bytes as f64 / 1e9)
}
