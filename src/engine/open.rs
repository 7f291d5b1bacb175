//! From options to open rails.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use super::InitParams;
use super::discover::{self, Found, names};
use super::mail::Mail;
use super::metrics::{self, TransferCounts};
use super::placement::Placement;
use super::shared::Shared;
use super::vram::{self, Vram};
use super::works::Works;
use crate::config::{Config, SameHost, Wait};
use crate::cuda::Runtime;
use crate::error::{Error, Result};
use crate::fabric::{Device, Domain, Fabric, Libfabric, efa};
use crate::metrics::Endpoint;
use crate::neighbour::Board;
use crate::notify::Inbox;
use crate::peer::{Local, PeerTable};
use crate::progress::{Driver, Pace, ProgressThreads, deal};
use crate::rail::{MESSAGE_BYTES_MAX, Rail, RailLimits};
use crate::sys::process::allow_any_tracer;
use crate::transfer::{Copies, Rates};
use crate::types::RailId;
use crate::wire::blob::capability;
use crate::wire::{ConnectionInfo, EndpointName, Extension, Handshake, HandshakeExtension};

/// Receives on rails to which peers send only when the first has failed.
const SPARE_RECEIVES: u32 = 16;
/// Operations in flight on a rail of a software provider.
const SOFTWARE_OPERATIONS: u32 = 8192;

/// Opens everything that an engine needs.
pub(super) fn open(
    init: InitParams,
    library: Option<Libfabric>,
) -> Result<(Arc<Works>, Option<ProgressThreads>, Option<Endpoint>)> {
    let config = Config::from_params(&init.params)?;
    let path = Some(Path::new(&config.libfabric_path)).filter(|path| !path.as_os_str().is_empty());
    let library = library.map_or_else(|| Libfabric::load(path), Ok)?;
    let use_wait_fd = init.progress_thread && config.wait != Wait::Sleep;
    vram::lead_to_cudart();
    let (found, rails) = vram::in_application_context(|| {
        let mut found = discover::find(&library, &config)?;
        let rails = open_rails(&library, &mut found, &config, use_wait_fd)?;
        Ok::<_, Error>((found, rails))
    })?;
    let lends = config.same_host != SameHost::Off;
    let vram = Vram::find(&rails, &found, config.vram_staging, lends, &init.local_agent);
    let placement = Placement::new(rails.iter().map(|rail| (rail.id(), rail.device())), &config)?;
    let mut extension = Extension::ours(incarnation(), MESSAGE_BYTES_MAX as u32, config.notif_bytes_max);
    extension.capabilities |= capability::STAGED_RANGES;
    if vram.is_staged() {
        extension.capabilities |= capability::STAGED_VRAM;
    }
    let endpoints =
        rails.iter().map(|rail| EndpointName::new(rail.endpoint_name())).collect::<Result<_>>()?;
    let board = open_board(config.same_host);
    let host = board.as_ref().map(|board| *board.info());
    let conn_info = ConnectionInfo { endpoints, extension: Some(extension), host }.encode();
    check_handshake(init.local_agent.as_bytes(), &conn_info, rails.len())?;
    let local = Arc::new(Local {
        name: init.local_agent,
        conn_info,
        sessions: AtomicU64::new(incarnation()),
        connect_timeout: config.connect_timeout,
        notif_bytes_max: config.notif_bytes_max,
        pending_bytes_max: config.pending_bytes_max,
        introduces: found.devices.iter().any(efa::is_direct),
        unanswered: AtomicU64::new(0),
        has_diverted: AtomicBool::new(false),
        board,
        rails,
    });
    let works = Arc::new(Works::new(Shared {
        peers: PeerTable::default(),
        inbox: Inbox::new(config.inbox_bytes_max),
        full: AtomicBool::new(false),
        copies: Copies::new(if init.progress_thread { config.num_threads.max(1) + 1 } else { 1 }),
        local_rates: Rates::default(),
        remote_rates: Rates::default(),
        counts: config.metrics.is_some().then(TransferCounts::default),
        turns: AtomicUsize::new(first_turn(local.name.as_bytes())),
        placement,
        vram,
        mail: Mail::default(),
        virtual_addresses: found.devices[0].mr_virt_addr(),
        message_bytes_max: message_bytes_max(&found.devices),
        wakers: OnceLock::new(),
        malformed: AtomicU64::new(0),
        local: Arc::clone(&local),
        config,
    }));
    let shared = &works.shared;
    let progress = if init.progress_thread {
        let pace = Pace {
            spin: shared.config.spin,
            nap: shared.config.sleep_max.max(init.progress_delay),
            use_wait_fd,
        };
        let driver: Arc<dyn Driver> = Arc::clone(&works) as Arc<dyn Driver>;
        let nodes: Vec<_> = local.rails.iter().map(|rail| shared.placement.numa_node(rail.id())).collect();
        let groups = deal(&nodes, shared.config.num_threads)
            .into_iter()
            .map(|group| group.into_iter().map(|rail| Arc::clone(&local.rails[rail])).collect())
            .collect();
        let threads = ProgressThreads::start(&driver, groups, pace, &local.name, &init.poison)?;
        let _ = shared.wakers.set(threads.wakers());
        Some(threads)
    } else {
        None
    };
    log::info!(
        "agent {}: libfabric {} ({}), provider {}{}, {} rails on {}, memory {}, topology by {}, progress {}",
        local.name,
        library.version(),
        library.origin(),
        found.devices[0].provider(),
        if found.software { " (software)" } else { "" },
        local.rails.len(),
        names(&found.devices),
        shared.vram.mems().iter().map(ToString::to_string).collect::<Vec<_>>().join("+"),
        shared.placement.origin,
        if progress.is_some() { "by threads" } else { "by the callers" },
    );
    let metrics = metrics::serve(&works, &library, &init.poison);
    Ok((works, progress, metrics))
}

/// Opens rails on the devices that were found; where none can be opened, on the first of the spares that can.
fn open_rails(
    library: &Libfabric,
    found: &mut Found,
    config: &Config,
    want_wait_fd: bool,
) -> Result<Vec<Arc<Rail>>> {
    let mut failures: Vec<Error> = Vec::new();
    loop {
        let mut rails: Vec<Arc<Rail>> = Vec::new();
        let counts =
            rails_on_each(found.devices.len(), config.rails_per_device as usize, config.max_rails as usize);
        let each = found.devices.iter().zip(counts);
        for device in each.flat_map(|(device, count)| std::iter::repeat_n(device, count)) {
            let id = RailId(rails.len() as u16);
            match open_rail(library, device, id, config, found.software, want_wait_fd) {
                Ok(rail) => rails.push(Arc::new(rail)),
                Err(e) => {
                    log::warn!("{} is left out: {e}", device.domain_name());
                    failures.push(e);
                }
            }
        }
        if !rails.is_empty() {
            return Ok(rails);
        }
        let Some(spare) = found.spares.pop_front() else { break };
        found.devices = vec![spare];
    }
    Err(match failures.into_iter().next() {
        Some(e) => e.context("no rail could be opened"),
        None => Error::not_found("there is no device to open a rail on"),
    })
}

/// Rails on each device, the same but for one. `rails_max` 0 is no limit.
fn rails_on_each(devices: usize, per_device: usize, rails_max: usize) -> Vec<usize> {
    let total = match rails_max {
        0 => devices * per_device,
        limit => limit.min(devices * per_device),
    };
    (0..devices).map(|i| total / devices + usize::from(i < total % devices)).collect()
}

fn open_rail(
    library: &Libfabric,
    device: &Device,
    id: RailId,
    config: &Config,
    software: bool,
    want_wait_fd: bool,
) -> Result<Rail> {
    let fabric = Fabric::open(library, device)?;
    let domain = Domain::open(&fabric, device)?;
    let control = id == RailId(0);
    let receives = match (control, efa::is_direct(device)) {
        (true, _) => (config.control_recv_buffers as u32).max(efa::receives_min(device)),
        // Writes with immediate data use up receives there.
        (false, true) => (device.rx_size() as u32).clamp(1, 512),
        (false, false) => efa::receives_min(device).max(SPARE_RECEIVES),
    };
    let limits = RailLimits {
        receive_buffers: receives,
        send_buffers: if control { config.control_send_buffers as u32 } else { 1 },
        // A software provider queues in memory what a NIC would not take, and its peer answers when the scheduler
        // lets it: the deeper the queue, the fewer turns a transfer takes.
        operations_max: if software { SOFTWARE_OPERATIONS } else { 0 },
        batch_slices: config.batch_slices(),
        cq_entries: match config.cq_entries {
            0 => efa::cq_entries(device).unwrap_or(0) as u32,
            entries => entries as u32,
        },
        stall_timeout: config.connect_timeout,
        want_wait_fd,
        // Asked for only where there is some (`discover`).
        gpu_by_nic: device.has_hmem() && matches!(Runtime::get(), Ok(Runtime::Cuda(_))),
    };
    Rail::open(id, &domain, device, &limits)
}

/// Where agents of this host find what they need to reach our memory, if they may.
fn open_board(same_host: SameHost) -> Option<Arc<Board>> {
    if same_host == SameHost::Off {
        return None;
    }
    if same_host == SameHost::PtracerAny
        && let Err(e) = allow_any_tracer()
    {
        log::debug!("same_host=ptracer_any: {e}; this kernel has no Yama, which it speaks to");
    }
    let board = Board::new();
    board.inspect_err(|why| log::debug!("agents of this host are reached by the NICs: {why}")).ok()
}

/// An error if no handshake can tell a peer of so many rails.
fn check_handshake(agent: &[u8], conn_info: &[u8], rails: usize) -> Result<()> {
    let extension = HandshakeExtension { session: 1, peer_session: 1, answer_wanted: true, retired: [1; 2] };
    let (name, conn) = (agent.to_vec(), Some(conn_info.to_vec()));
    Handshake { index: 0, name, conn, extension: Some(extension) }
        .encode()
        .map(|_| ())
        .map_err(|e| e.context(format_args!("no peer could be told of {rails} rails")))
}

/// A length that every device takes in one operation, a multiple of the page size.
fn message_bytes_max(devices: &[Device]) -> u64 {
    let least = devices.iter().map(|device| device.max_msg_size() as u64).min().unwrap_or(u64::MAX);
    // An operation longer than a gigabyte gains nothing, and some providers name sizes that they cannot keep.
    let least = least.min(1 << 30);
    if least > 4096 { least & !4095 } else { least.max(1) }
}

/// Where an agent begins to take turns on its rails, so that those of a host, or of a fleet, do not all begin with the same.
fn first_turn(name: &[u8]) -> usize {
    // FNV-1a: the same for a name on every run.
    name.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    }) as usize
        % 1024
}

/// Microseconds since 1970: grows over restarts, and two runs of an agent never have the same.
fn incarnation() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_micros() as u64)
}

#[cfg(test)]
mod tests {
    use super::{MESSAGE_BYTES_MAX, check_handshake, rails_on_each};
    use crate::wire::{ConnectionInfo, EndpointName, Extension};

    /// Connection info of so many rails on EFA, whose endpoint names have 32 bytes.
    fn conn_info(rails: usize) -> Vec<u8> {
        let endpoints = vec![EndpointName::new(&[7; 32]).unwrap(); rails];
        let extension = Some(Extension::ours(1, MESSAGE_BYTES_MAX as u32, 1 << 20));
        ConnectionInfo { endpoints, extension, host: None }.encode()
    }

    #[test]
    fn more_rails_than_a_handshake_can_name_are_refused() {
        check_handshake(b"agent", &conn_info(96), 96).unwrap();
        let refused = check_handshake(b"agent", &conn_info(128), 128).unwrap_err().to_string();
        assert!(refused.contains("128 rails") && refused.contains("max_rails"), "{refused}");
    }

    #[test]
    fn rails_are_shared_out_evenly() {
        assert_eq!(rails_on_each(4, 1, 0), [1, 1, 1, 1]);
        assert_eq!(rails_on_each(2, 5, 3), [2, 1]);
        assert_eq!(rails_on_each(2, 5, 1), [1, 0]);
        assert_eq!(rails_on_each(1, 3, 9), [3]);
    }
}
