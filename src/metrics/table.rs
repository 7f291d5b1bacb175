//! Every metric: name, kind, labels, help. docs/metrics.md shows this table.

use std::fmt::Write as _;

/// What a metric's numbers mean, in Prometheus' words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts by size.
    Histogram,
}

impl Kind {
    /// As a `# TYPE` line has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// One row of the table.
#[derive(Debug)]
pub struct Spec {
    /// Its full name.
    pub name: &'static str,
    /// What its numbers mean.
    pub kind: Kind,
    /// Labels beside `agent`, which all have.
    pub labels: &'static [&'static str],
    /// One line of help.
    pub help: &'static str,
}

/// Writes the [`Metric`]s and the rows of [`METRICS`] from one list.
macro_rules! metrics {
    ($( $help:literal $kind:ident $metric:ident = $name:literal [$($label:literal),*]; )*) => {
        /// Every metric.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Metric { $( #[doc = $help] $metric, )* }

        /// The table, in the order of [`Metric`].
        pub const METRICS: &[Spec] = &[ $( Spec {
            name: concat!("nixl_libfabric_", $name),
            kind: Kind::$kind,
            labels: &[$($label),*],
            help: $help,
        } ),* ];
    };
}

metrics! {
    "Versions of the plugin and of libfabric, and the provider; always 1."
    Gauge Info = "info" ["version", "libfabric", "provider"];
    "1; 0 when the plugin has panicked and this backend refuses all calls."
    Gauge Healthy = "healthy" [];

    "Bytes of completed operations of this side: written to peers, or read from them. What peers do by RDMA is counted at their side."
    Counter RailBytes = "rail_bytes_total" ["rail", "device", "op"];
    "Completed RDMA operations of this side."
    Counter RailOperations = "rail_operations_total" ["rail", "device", "op"];
    "RDMA operations in flight."
    Gauge RailInFlight = "rail_operations_in_flight" ["rail", "device"];
    "Operations of transfers shared by several rails that this one may hold at a time."
    Gauge RailWindow = "rail_window_operations" ["rail", "device"];
    "Posts that the provider put off because its queue was full. They are made again."
    Counter RailPutOff = "rail_put_off_total" ["rail", "device"];
    "Operations that completed in error: write or read of this side, send or receive of a control message, or remote, an operation of a peer."
    Counter RailErrors = "rail_errors_total" ["rail", "device", "kind"];
    "Control messages: handshakes, notifications, staging."
    Counter RailMessages = "rail_messages_total" ["rail", "device", "direction"];
    "Writes of C++ peers that were announced by immediate data."
    Counter RailImmediates = "rail_immediates_total" ["rail", "device"];

    "Time of transfers that went well, from post to the end of the last byte, and of the notification if there is one."
    Histogram TransferSeconds = "transfer_seconds" ["op", "size"];
    "Transfers that failed, by what the application is told."
    Counter TransferErrors = "transfer_errors_total" ["kind"];
    "Bytes that this side moved by way of host memory (`vram_staging`)."
    Counter StagedBytes = "staged_bytes_total" ["op"];
    "Bytes that this side moved to and from peers on this host without a network (`same_host`)."
    Counter SameHostBytes = "same_host_bytes_total" ["op"];
    "Deadlines hit, by the option that sets them."
    Counter Deadlines = "deadlines_total" ["option"];
    "Messages of peers that were dropped because they made no sense."
    Counter Malformed = "malformed_messages_total" [];

    "Peers known. Only the first 256 have series of their own."
    Gauge Peers = "peers" [];
    "1 when the handshake with the peer is over."
    Gauge PeerReady = "peer_ready" ["peer"];
    "1 when the peer is on this host and its host memory is reached without a network."
    Gauge PeerSameHost = "peer_same_host" ["peer"];
    "Transfers with the peer that went well."
    Counter PeerTransfers = "peer_transfers_total" ["peer", "op"];
    "Bytes of these."
    Counter PeerBytes = "peer_bytes_total" ["peer", "op"];
    "Transfers with the peer that failed."
    Counter PeerErrors = "peer_errors_total" ["peer"];
    "Bytes of notifications that wait for the peer, or for a transfer's end."
    Gauge PeerPending = "peer_pending_bytes" ["peer"];
}

impl Metric {
    /// Its row.
    pub fn spec(self) -> &'static Spec {
        &METRICS[self as usize]
    }
}

/// The table as Markdown.
pub fn markdown_table() -> String {
    let mut table = String::from("| Metric | Kind | Labels | Meaning |\n|---|---|---|---|\n");
    for spec in METRICS {
        let labels: Vec<_> = spec.labels.iter().map(|label| format!("`{label}`")).collect();
        writeln!(table, "| `{}` | {} | {} | {} |", spec.name, spec.kind.name(), labels.join(", "), spec.help)
            .expect("a String takes every write");
    }
    table
}
