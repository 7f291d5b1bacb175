//! The table itself.

use std::time::Duration;

use super::value::{Fabric, FromText, SameHost, Wait};
use super::{Range, Spec, Value, bad_value};
use crate::error::Result;
use crate::metrics::Address;
use crate::topology::{DeviceFilter, GpuDevices};

/// Writes the typed [`Config`] and the rows of [`OPTIONS`] from one list.
macro_rules! options {
    ($( $help:literal $key:literal => $field:ident: $type:ty = $default:literal, $range:expr; )*) => {
        /// What every option is set to.
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct Config {
            $( #[doc = $help] pub $field: $type, )*
        }

        /// Every option, in the README's order.
        pub const OPTIONS: &[Spec] = &[
            $( Spec { key: $key, default: $default, range: $range, help: $help } ),*
        ];

        impl Config {
            /// Takes each option's text from `source` and reads it.
            pub(super) fn read(mut source: impl FnMut(&Spec) -> Value) -> Result<Self> {
                let mut rows = OPTIONS.iter();
                // The fields and the rows come from one list, in one order.
                let mut next = || rows.next().expect("one row for each field");
                Ok(Self {
                    $( $field: {
                        let spec = next();
                        let value = source(spec);
                        <$type as FromText>::from_text(&value.text, spec.range)
                            .map_err(|why| bad_value(spec, &value, &why))?
                    }, )*
                })
            }
        }
    };
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const SWITCH: Range = Range::Word(&["false", "true"]);
const COUNT: &str = "";
const BYTES: &str = "bytes";
const MS: &str = "ms";
const US: &str = "us";

options! {
    "libfabric provider. Empty: efa, else the best of the others, with a warning. `FI_PROVIDER` keeps its meaning."
    "provider" => provider: String = "", Range::Text("a provider's name");

    "Fabric of the efa provider. Empty: the provider's choice."
    "fabric" => fabric: Fabric = "", Range::Word(&["", "efa", "efa-direct"]);

    "Refuse to start on a provider that moves data through the kernel."
    "require_rdma" => require_rdma: bool = "false", SWITCH;

    "Devices to use, by name or PCI address; `*` and `?` match, `!` denies. Empty: all, but of a software provider's one."
    "devices" => devices: DeviceFilter = "", Range::Text("globs, comma-separated, such as `rdmap*,!0000:53:00.0`");

    "Most rails to use; 0: all."
    "max_rails" => max_rails: u16 = "0", Range::Number(0, 1024, COUNT);

    "Rails (endpoints) opened on each device."
    "rails_per_device" => rails_per_device: u16 = "1", Range::Number(1, 16, COUNT);

    "Devices for each GPU, in place of what the topology says."
    "gpu_devices" => gpu_devices: GpuDevices = "",
        Range::Text("`gpu=device,device;gpu=device`, a GPU by PCI address, such as `0000:53:00.0=rdmap79s0,rdmap80s0`");

    "Most bandwidth for one registration of host memory; 0: from the topology."
    "max_bw_per_dram_seg" => max_bw_per_dram_seg_gbps: u64 = "0", Range::Number(0, 1_000_000, "Gb/s");

    "libfabric to load. Empty: the copy already in the process, else `libfabric.so.1`, else the one of the EFA installer."
    "libfabric_path" => libfabric_path: String = "", Range::Text("a path");

    "A piece of at least this size is cut into chunks and spread over rails."
    "striping_threshold" => striping_threshold_bytes: u64 = "131072", Range::Number(0, 1 << 40, BYTES);

    "Largest chunk."
    "chunk_bytes_max" => chunk_bytes_max: u64 = "1048576", Range::Number(128 * KIB, GIB, BYTES);

    "Slices handed to a rail at a time; 0: 1024."
    "split_batch_size" => split_batch_size: usize = "1024", Range::Number(0, 65_536, "slices");

    "Without effect; taken because the C++ plugin has it. No queue of batches stands before a rail here."
    "post_queue_size" => post_queue_size: usize = "32768", Range::Number(0, 1 << 40, "batches");

    "Completion queue entries of a rail; 0: 32768 on efa, else as many as can be in flight."
    "cq_entries" => cq_entries: usize = "0", Range::Number(0, 1 << 20, COUNT);

    "Progress threads, among which the rails are shared out; 0: one. Only where NIXL enables its progress thread."
    "num_threads" => num_threads: usize = "0", Range::Number(0, 64, "threads");

    "A progress thread polls this long after the last event before it sleeps. Empty: 50 where it sleeps on a wait object, else 1000."
    "spin_us" => spin: Option<Duration> = "", Range::Number(0, 1_000_000, US);

    "How an idle progress thread waits: `fd` on the queue's wait object, `sleep` in naps, `auto` fd where there is one that works."
    "wait" => wait: Wait = "auto", Range::Word(&["auto", "fd", "sleep"]);

    "How long a progress thread sleeps at a time without a wait object: as long may a peer's first message wait."
    "sleep_us_max" => sleep_max: Duration = "80", Range::Number(1, 1_000_000, US);

    "Longest wait for a peer that does not answer, or accepts nothing."
    "connect_timeout_ms" => connect_timeout: Duration = "30000", Range::Number(1, 3_600_000, MS);

    "A transfer still in flight after this fails; 0: never."
    "transfer_timeout_ms" => transfer_timeout: Duration = "0", Range::Number(0, 86_400_000, MS);

    "Longest wait for operations in flight when memory is deregistered or the backend is destroyed."
    "drain_timeout_ms" => drain_timeout: Duration = "5000", Range::Number(0, 600_000, MS);

    "Receive buffers of 8 KiB for control messages; on the efa fabric 64 at least."
    "control_recv_buffers" => control_recv_buffers: usize = "256", Range::Number(8, 65_536, "buffers");

    "Send buffers of 8 KiB for control messages."
    "control_send_buffers" => control_send_buffers: usize = "64", Range::Number(1, 65_536, "buffers");

    "Largest notification."
    "notif_bytes_max" => notif_bytes_max: u64 = "67108864", Range::Number(KIB, 512 * MIB, BYTES);

    "Most bytes of notifications that wait for one peer, outgoing and half-arrived each."
    "pending_bytes_max" => pending_bytes_max: u64 = "268435456", Range::Number(64 * KIB, 64 * GIB, BYTES);

    "Bytes of notifications that wait for the application (getNotifs); from there on nothing more is received, and senders wait."
    "inbox_bytes_max" => inbox_bytes_max: u64 = "1073741824", Range::Number(64 * KIB, 64 * GIB, BYTES);

    "GPU memory moves through page-locked host memory where the provider cannot register it. For a peer's GPU memory it must be set there."
    "vram_staging" => vram_staging: bool = "false", SWITCH;

    "Host memory of agents on this host is reached without a network (`auto`), where the kernel lets both. `ptracer_any`: as `auto`, and any process of this user may reach this one's memory where Yama's `ptrace_scope` is 1. `off` also for what peers reach here."
    "same_host" => same_host: SameHost = "auto", Range::Word(&["auto", "off", "ptracer_any"]);

    "Where metrics are served to Prometheus and `nixl-libfabric top`. Empty: nowhere. The first free port of a range; port 0: any; `%p`: the process' number."
    "metrics" => metrics: Option<Address> = "",
        Range::Text("`address:port`, `address:port-port` or an absolute path, such as `127.0.0.1:9400-9415` or `/run/nixl-%p.sock`");
}
